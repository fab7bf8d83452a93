"""Where a verb's data goes and in which form: JSON, CSV or text; to stdout or a new file."""

from __future__ import annotations

import csv
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvmstats_fast.cli._grammar import UsageError
from kvmstats_fast.cli._rows import FIELDS
from kvmstats_fast.formats._put import PRIVATE, open_new

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from kvmstats_fast.cli._rows import Row

_REPLACED = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class RowWriter:
    """Writes rows as JSON or CSV, as the command line says; `text` is what is asked for by neither.

    In CSV there is a column for each of `more`, too: fields that only rows of this verb have.
    """

    def __init__(self, arguments: argparse.Namespace, output: TextIO, more: Sequence[str] = ()) -> None:
        self.text = not arguments.json and arguments.csv is None
        self.output = output
        self._csv: Any = None
        self._columns = (*FIELDS, *more)
        if arguments.csv is not None:
            if len(arguments.csv) != 1 or arguments.csv in '\n\r"':
                raise UsageError(f"{arguments.csv!r} is not a separator: it must be one character, and no quote")
            self._csv = csv.writer(output, delimiter=arguments.csv, lineterminator="\n")
            self._csv.writerow(self._columns)

    def write(self, rows: Sequence[Row], time: float | None = None) -> None:
        """Write rows; in CSV a histogram has a row for each bucket that counted, which its lower edge names."""
        for row in rows:
            fields = row.fields(time)
            if self._csv is None:
                print(json.dumps(fields, ensure_ascii=False), file=self.output)
            elif row.buckets is None:
                self._csv.writerow([_cell(fields.get(name)) for name in self._columns])
            else:
                lower = row.edges or list(range(len(row.buckets)))
                for edge, count in zip(lower, row.buckets, strict=False):
                    if count:
                        one = fields | {"value": count, "rate": None, "bucket": edge}
                        self._csv.writerow([_cell(one.get(name)) for name in self._columns])
        self.output.flush()


def _cell(value: object) -> object:
    return "" if value is None else value


@contextmanager
def open_output(arguments: argparse.Namespace) -> Iterator[TextIO]:
    """Open what ``-o`` names: a new file, the user's alone, that is removed again if nothing came to be in it."""
    if arguments.output == "-":
        yield sys.stdout
        return
    path = Path(arguments.output)
    fd = os.open(path, _REPLACED, PRIVATE) if arguments.force else open_new(path, PRIVATE)
    with open(fd, "w", encoding="utf-8", newline="") as file:  # noqa: PTH123 - of an fd
        try:
            yield file
        finally:
            file.flush()
            if not os.fstat(fd).st_size and not arguments.force:
                path.unlink()
