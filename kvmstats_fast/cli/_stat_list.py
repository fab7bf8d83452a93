"""The statistics of VMs, captured files or recordings: what each is, in which unit, and in which buckets."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvmstats_fast._text import format_si, plain_number, printable
from kvmstats_fast.cli._captures import is_capture, read_images
from kvmstats_fast.cli._files import open_runs
from kvmstats_fast.cli._output import ObjectWriter
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.cli._targets import named_pids
from kvmstats_fast.vmm.machine import attach

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from kvmstats_fast.stat import Stat


_FIELDS = ("of", "name", "type", "unit", "size", "edges")


def print_stats(arguments: argparse.Namespace, output: TextIO) -> None:
    """Print a row for each statistic of each kind of file."""
    writer, screen = ObjectWriter(arguments, output, _FIELDS), Screen.of(output, arguments.color)
    for number, (whose, stats) in enumerate(_kinds(arguments)):
        if not writer.text:
            writer.write_objects({"of": whose} | _fields(stat) for stat in stats)
            continue
        rows = [("NAME", "TYPE", "UNIT", "BUCKETS")]
        rows += [(printable(stat.name), _type(stat), stat.units() or "-", _buckets(stat)) for stat in stats]
        title = screen.wrap(f"{printable(whose, 4096)}: {len(rows) - 1} statistics")
        screen.print(*([""] if number else []), *map(screen.title, title), *screen.table(rows, "<<<<", (3,)))


def _kinds(arguments: argparse.Namespace) -> Iterator[tuple[str, Iterable[Stat]]]:
    """Yield what is listed: of a VM, one vCPU stands for all."""
    with ExitStack() as opened:
        for pid in named_pids(arguments):
            machine = opened.enter_context(attach(pid))
            shown = set()
            for file in machine.files:
                if (file.kind, file.schema.fingerprint) not in shown:
                    shown.add((file.kind, file.schema.fingerprint))
                    yield f"{file.kind} of {machine.name or 'process'} ({pid})", file.schema.stats
        for path in arguments.file:
            yield from _kinds_of(path)


def _kinds_of(path: str) -> Iterator[tuple[str, Iterable[Stat]]]:
    """Yield the kinds of captured files by their ids, and those of recordings."""
    if is_capture(Path(path)):
        for file, image in read_images(Path(path)):
            yield f"{image.id} in {file}", image.schema.stats
        return
    shown: set[tuple[str, tuple[Stat, ...]]] = set()
    for run in open_runs([path]):
        first = next(run.read(), None)
        for part in first.samples.split() if first else ():
            stats = tuple(replace(part.stat(name), offset=0) for name in part.names)
            if (part.files[0].kind, stats) not in shown:
                shown.add((part.files[0].kind, stats))
                yield f"{part.files[0].kind} in {path}", stats


def _type(stat: Stat) -> str:
    return str(getattr(stat.type, "name", stat.type)).lower()


def _buckets(stat: Stat) -> str:
    if not stat.is_histogram:
        return f"{stat.size} values" if stat.shape else "-"
    edges, unit = stat.bucket_edges().tolist(), stat.units(si=True)
    return f"{stat.size}, the last from {format_si(edges[-2], unit)}"


def _fields(stat: Stat) -> dict[str, Any]:
    edges = [plain_number(edge) for edge in stat.bucket_edges().tolist()] if stat.is_histogram else None
    return {"name": stat.name, "type": _type(stat), "unit": stat.units(), "size": stat.size, "edges": edges}
