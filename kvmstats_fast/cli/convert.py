"""``kvmstats convert``: a recording, or a captured stats file, in another format."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kvmstats_fast.cli._captures import read_bytes
from kvmstats_fast.cli._grammar import UsageError, usage_errors
from kvmstats_fast.formats._put import PRIVATE, put_file
from kvmstats_fast.formats.values import VALUES
from kvmstats_fast.image import to_merged
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Convert FILE, a recording, to Parquet (OUT is the root of a data set), CSV, a Perfetto trace, .npz or a "
        "recording (arrows); or convert a captured stats file from an old layout to the current one (merged)."
    )
    parser.add_argument("file", metavar="FILE", help="a recording or a captured stats file")
    parser.add_argument("--to", choices=list(_FORMATS), help="format of OUT (default: by its suffix)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="new file or directory; - is stdout, for formats that are one file",
    )
    parser.add_argument("--kind", choices=("vm", "vcpu"), help="for CSV: which files, if the recording has both")
    parser.add_argument(
        "--values",
        choices=VALUES,
        help="for Parquet and CSV: values as read, the change since the previous sweep, or that change per second "
        "(default: raw)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing output")


def run(arguments: argparse.Namespace) -> int:
    """Convert it."""
    ending = arguments.output.rpartition(".")[2]
    name = arguments.to or _ENDINGS.get(ending, ending)
    if name not in _FORMATS:
        raise UsageError(f"{arguments.output} does not end in the name of a format: say --to {', '.join(_FORMATS)}")
    if arguments.values and name not in _HAVING_VALUES:
        raise UsageError(f"--values is for {' and '.join(_HAVING_VALUES)}; {name} has them as they were read")
    if arguments.output == "-":
        return _to_stdout(arguments, name)
    if name in ("npz", "arrows") and (name == "npz") != (ending == "npz"):
        named = "name it *.npz, by which it is read as one" if name == "npz" else "what is named *.npz is read as one"
        raise UsageError(f"{arguments.output}: {named}")
    with usage_errors():  # what the format cannot hold
        _FORMATS[name](arguments)
    print(arguments.output)
    return 0


def _to_stdout(arguments: argparse.Namespace, name: str) -> int:
    """Convert to a file that is then copied: the formats seek, and are whole or nothing."""
    if name in ("parquet", "arrows"):
        raise UsageError(f"{name} is a directory of files, which stdout cannot be: name one with -o")
    if sys.stdout.isatty() and name != "csv":
        raise UsageError(f"{name} is not for a terminal: redirect stdout, or name a file with -o")
    with TemporaryDirectory(prefix="kvmstats-") as folder:
        arguments.output = str(Path(folder) / f"out.{name}")
        with usage_errors():
            _FORMATS[name](arguments)
        with Path(arguments.output).open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return 0


def _to_parquet(arguments: argparse.Namespace) -> None:
    from kvmstats_fast.formats.parquet import to_parquet  # noqa: PLC0415 - only who uses it needs pyarrow

    to_parquet(_source(arguments), arguments.output, values=arguments.values or "raw", overwrite=arguments.force)


def _to_csv(arguments: argparse.Namespace) -> None:
    from kvmstats_fast.formats.csv import to_csv  # noqa: PLC0415 - only who uses it needs pyarrow

    values = arguments.values or "raw"
    to_csv(_source(arguments), arguments.output, kind=arguments.kind, values=values, overwrite=arguments.force)


def _to_perfetto(arguments: argparse.Namespace) -> None:
    from kvmstats_fast.formats.perfetto import to_perfetto  # noqa: PLC0415 - only who uses it needs perfetto

    to_perfetto(_source(arguments), arguments.output, overwrite=arguments.force)


def _source(arguments: argparse.Namespace) -> Samples | str:
    """Return what is to be converted; a recording by its path, so that it is read batch by batch."""
    return Samples.load(arguments.file) if arguments.file.endswith(".npz") else str(arguments.file)


def _save(arguments: argparse.Namespace) -> None:
    Samples.load(arguments.file).save(arguments.output, overwrite=arguments.force)


def _to_merged(arguments: argparse.Namespace) -> None:
    merged = to_merged(read_bytes(Path(arguments.file)))
    with put_file(Path(arguments.output), overwrite=arguments.force, mode=PRIVATE) as output:
        output.write(merged)


_FORMATS: dict[str, Callable[[argparse.Namespace], None]] = {
    "parquet": _to_parquet,
    "csv": _to_csv,
    "perfetto": _to_perfetto,
    "npz": _save,
    "arrows": _save,
    "merged": _to_merged,
}
#: Those whose columns may have changes or rates instead.
_HAVING_VALUES = ("parquet", "csv")
#: Endings that name a format other than by its own name.
_ENDINGS = {"pftrace": "perfetto"}
