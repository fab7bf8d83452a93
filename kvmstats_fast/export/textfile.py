"""Textfile: metrics as a file for node_exporter's textfile collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from kvmstats_fast.formats._put import put_file

if TYPE_CHECKING:
    from pathlib import Path

#: node_exporter runs as another user.
_READABLE = 0o644


def write_textfile(path: Path, registry: CollectorRegistry) -> None:
    """Write what a registry collects to a file, whole or not at all; one that is there is replaced.

    Raises
    ------
    ValueError
        If the name does not end in ``.prom``: node_exporter would not read it.
    OSError
        If it cannot be written; what was there is left.
    """
    check_textfile(path)
    text = generate_latest(registry)
    with put_file(path, overwrite=True, mode=_READABLE) as file:
        view = memoryview(text)
        while view:
            view = view[file.write(view) :]


def check_textfile(path: Path) -> None:
    """Raise ValueError unless node_exporter reads files of this name."""
    if path.suffix != ".prom" or path.name == ".prom":
        raise ValueError(f"{str(path)!r} does not end in .prom: node_exporter would not read it")
