"""A report as text, in the width of the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmstats_fast._text import printable
from kvmstats_fast.cli._present import arrange, bars
from kvmstats_fast.cli._report_blocks import (
    SPREAD_ALIGN,
    SPREAD_DROP,
    SPREAD_HEAD,
    advice_table,
    advice_text,
    find_blocks,
    lives_table,
    runs_table,
    spread_cells,
)
from kvmstats_fast.cli._screen import fit_table, wrap_text

if TYPE_CHECKING:
    from kvmstats_fast.cli._recorded import Recorded
    from kvmstats_fast.cli._report_blocks import Block, Table
    from kvmstats_fast.cli._screen import Screen

_MOST = 20  # runs and VMs that are listed


def write(recorded: Recorded, screen: Screen, *, zero: bool) -> None:
    """Write it."""
    kernels = dict.fromkeys((run.host, run.kernel) for run in recorded.runs)
    hosts = [
        f"Host {printable(host) or 'unknown'}, kernel {printable(kernel) or 'unknown'}" for host, kernel in kernels
    ]
    paragraphs = [[line for host in hosts for line in wrap_text(host, screen.width)]]
    paragraphs += [_lines(runs_table(recorded.runs), screen), _lines(lives_table(recorded.lives), screen)]
    for block in find_blocks(recorded, zero=zero):
        paragraphs += _describe(block, screen)
    if recorded.advice is not None and recorded.advice.halts:
        paragraphs.append(wrap_text(advice_text(recorded.advice), screen.width, ""))
        paragraphs.append(_lines(advice_table(recorded.advice), screen))
    screen.print("\n\n".join("\n".join(lines) for lines in paragraphs))
    screen.output.flush()


def _describe(block: Block, screen: Screen) -> list[list[str]]:
    cells = [spread_cells(row, indent, every, block.vcpus) for indent, row, every in arrange(block.rows)]
    lines = fit_table([SPREAD_HEAD, *cells], SPREAD_ALIGN, screen.width, SPREAD_DROP) if cells else []
    lines[:1] = map(screen.head, lines[:1])
    title = wrap_text(block.title, screen.width)
    paragraphs = [[*map(screen.title, title), *(lines or ([] if block.rows else ["  nothing changed"]))]]
    paragraphs += [bars(row, screen) for row in block.rows if row.stat.is_histogram]
    if block.figures:
        figures = [(f"  {name}", value, printable(formula, 1 << 10)) for name, value, formula in block.figures]
        paragraphs.append(fit_table(figures, "<><", screen.width, [2]))
    return paragraphs


def _lines(table: Table, screen: Screen) -> list[str]:
    lines = fit_table(table.rows[: _MOST + 1], table.align, screen.width, table.drop)
    lines[0] = screen.head(lines[0])
    left = len(table.rows) - 1 - _MOST
    return [*lines, f"... and {left} more, which -j has"] if left > 0 else lines
