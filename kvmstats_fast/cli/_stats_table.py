"""The table of ``demo`` and ``run``: a row for each statistic, a column for each stats file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from kvmstats_fast._text import display_width, format_table
from kvmstats_fast.cli._screen import Screen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmstats_fast.stats_file import StatsFile


def print_stats(files: Sequence[StatsFile], changes: Sequence[Mapping[str, Any]], output: TextIO | None = None) -> None:
    """Print by how much the statistics of each file changed, those that changed in none left out.

    Parameters
    ----------
    files : sequence of StatsFile
        The columns.
    changes : sequence of mapping
        For each file, an int by the name of the statistic; of a histogram, the list of its buckets' changes.
    output : file, optional
        Default: stdout.
    """

    def cell(file: StatsFile, changed: Mapping[str, Any], name: str) -> str:
        if name not in file.schema:
            return ""
        change = changed.get(name, 0)
        return f"{sum(change):+d} in {len(change)} buckets" if isinstance(change, list) else f"{change:+d}"

    columns = list(zip(files, changes, strict=True))
    titles = ["vm" if file.vcpu_id is None else f"vcpu {file.vcpu_id}" for file in files]
    rows = [["", *titles], ["stats in the file", *(str(len(file.schema)) for file in files)]]
    names = dict.fromkeys(name for changed in changes for name, change in changed.items() if _is_any(change))
    rows += [[name, *(cell(file, changed, name) for file, changed in columns)] for name in names]
    screen = Screen.of(sys.stdout if output is None else output)
    for number, part in enumerate(_split(rows, screen.width) if screen.is_terminal else [rows]):
        screen.print(*([""] if number else []), format_table(part, "<" + ">" * (len(part[0]) - 1)))


def _split(rows: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """Yield tables that fit a width, each with the first column and some of the others; with at least one of them."""
    widths = [max(map(display_width, column)) + 2 for column in zip(*rows, strict=True)]
    start = 1
    while start < len(widths):
        stop, left = start + 1, width - widths[0] - widths[start] + 2
        while stop < len(widths) and (left := left - widths[stop]) >= 0:
            stop += 1
        yield [[row[0], *row[start:stop]] for row in rows]
        start = stop


def _is_any(change: Any) -> bool:
    return any(change) if isinstance(change, list) else bool(change)
