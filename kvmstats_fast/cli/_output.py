"""Where a verb's data goes and in which form: JSON, CSV or text; to stdout or a new file."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvmstats_fast.cli._grammar import UsageError
from kvmstats_fast.formats._put import PRIVATE, open_new, taken

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvmstats_fast.cli._rows import Row

_REPLACED = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


#: Of a row of a statistic, in the order of columns.
ROW_FIELDS = ("time", "host", "vm", "pid", "vcpu", "name", "value", "rate", "unit", "bucket")


class ObjectWriter:
    """Writes objects as JSON or CSV, as the command line says; `text` is what is asked for by neither.

    Parameters
    ----------
    arguments : argparse.Namespace
    output : text file
    columns : sequence of str
        Of CSV; what an object has beyond them is in JSON alone.
    """

    def __init__(self, arguments: argparse.Namespace, output: TextIO, columns: Sequence[str]) -> None:
        self.text = not arguments.json and arguments.csv is None
        self.output = output
        self._csv: Any = None
        if arguments.csv is not None:
            if len(arguments.csv) != 1 or arguments.csv in '\n\r"':
                raise UsageError(f"{arguments.csv!r} is not a separator: it must be one character, and no quote")
            self._csv = csv.DictWriter(
                output, columns, extrasaction="ignore", delimiter=arguments.csv, lineterminator="\n"
            )
            self._csv.writeheader()

    def write_objects(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Write objects; what is None, or not there, is an empty cell, and a list is its values with blanks between."""
        for one in objects:
            if self._csv is None:
                print(to_json(one), file=self.output)
            else:
                self._csv.writerow({name: _cell(value) for name, value in one.items()})
        self.output.flush()


def to_json(one: Mapping[str, Any]) -> str:
    """Return an object as JSON, with what a terminal would act on escaped."""
    text = json.dumps(one, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class RowWriter(ObjectWriter):
    """Writes rows of statistics; in CSV with a column for each of `more`, fields that only rows of this verb have."""

    def __init__(self, arguments: argparse.Namespace, output: TextIO, more: Sequence[str] = ()) -> None:
        super().__init__(arguments, output, (*ROW_FIELDS, *more))

    def write(self, rows: Sequence[Row], time: float | None = None) -> None:
        """Write rows; in CSV a histogram has a row for each bucket that counted, which its lower edge names."""
        self.write_objects(one for row in rows for one in self._split(row, row.fields(time)))

    def _split(self, row: Row, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._csv is None or row.buckets is None:
            yield fields
            return
        for edge, count in zip(row.edges or range(len(row.buckets)), row.buckets, strict=False):
            if count:
                yield fields | {"value": count, "rate": None, "bucket": edge}


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


class _Replacing(io.FileIO):
    """A file that keeps what was in it until something is written."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w")
        self.has_begun = False

    def begin(self) -> None:
        """Take away what was in it; a second call does nothing."""
        if not self.has_begun:
            self.has_begun = True
            if stat.S_ISREG(os.fstat(self.fileno()).st_mode):  # not a device or a pipe
                self.truncate(0)

    def write(self, data: Any) -> int:
        """Write behind what was written before."""
        self.begin()
        return super().write(data)


@contextmanager
def open_private(path: Path, *, force: bool, whole: bool = False) -> Iterator[TextIO]:
    """Open a new file, the user's alone; with `force` also one that is there.

    What fails before anything was written leaves no new file, and one that was there as it was; what fails later leaves
    what was written. Where only the `whole` is worth something, that is removed, and a whole may be empty.
    """
    is_new = True
    try:
        fd = open_new(path, PRIVATE)
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
        if not force:
            raise taken(path) from None
        fd, is_new = os.open(path, _REPLACED, PRIVATE), False
    raw = _Replacing(fd)
    with io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", newline="") as file:
        is_ended = False
        try:
            yield file
            file.flush()
            raw.begin()
            is_ended = True
        finally:
            with suppress(OSError):  # raised already, or by the end of this block
                file.flush()
            is_half = whole and not is_ended and (is_new or raw.has_begun)
            is_nothing = not whole and is_new and not os.fstat(fd).st_size
            if is_half or is_nothing:
                path.unlink(missing_ok=True)


@contextmanager
def open_output(arguments: argparse.Namespace) -> Iterator[TextIO]:
    """Open what ``-o`` names; a new file that nothing came to be in is removed again."""
    if arguments.output == "-":
        yield sys.stdout
    else:
        with open_private(Path(arguments.output), force=arguments.force) as file:
            yield file
