"""A report as text, in the width of the terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, TextIO

from kvmstats_fast._text import printable
from kvmstats_fast.cli._present import arrange, bars, fit_table, terminal_width
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

if TYPE_CHECKING:
    from kvmstats_fast.cli._recorded import Recorded
    from kvmstats_fast.cli._report_blocks import Block, Table

_MOST = 20  # runs and VMs that are listed


def write(recorded: Recorded, output: TextIO, *, zero: bool) -> None:
    """Write it."""
    width = terminal_width(output)
    kernels = dict.fromkeys((run.host, run.kernel) for run in recorded.runs)
    hosts = [
        f"Host {printable(host) or 'unknown'}, kernel {printable(kernel) or 'unknown'}" for host, kernel in kernels
    ]
    paragraphs = [[line for host in hosts for line in textwrap.wrap(host, width, subsequent_indent="  ")]]
    paragraphs += [_lines(runs_table(recorded.runs), width), _lines(lives_table(recorded.lives), width)]
    for block in find_blocks(recorded, zero=zero):
        paragraphs += _describe(block, width, output)
    if recorded.advice is not None and recorded.advice.halts:
        paragraphs.append(textwrap.wrap(advice_text(recorded.advice), width))
        paragraphs.append(_lines(advice_table(recorded.advice), width))
    print("\n\n".join("\n".join(lines) for lines in paragraphs), file=output)
    output.flush()


def _describe(block: Block, width: int, output: TextIO) -> list[list[str]]:
    cells = [spread_cells(row, indent, every, block.vcpus) for indent, row, every in arrange(block.rows)]
    lines = fit_table([SPREAD_HEAD, *cells], SPREAD_ALIGN, width, SPREAD_DROP) if cells else []
    paragraphs = [[block.title, *(lines or ([] if block.rows else ["  nothing moved"]))]]
    paragraphs += [bars(row, width, output) for row in block.rows if row.stat.is_histogram]
    if block.figures:
        figures = [(f"  {name}", value, printable(formula, 1 << 10)) for name, value, formula in block.figures]
        paragraphs.append(fit_table(figures, "<><", width, [2]))
    return paragraphs


def _lines(table: Table, width: int) -> list[str]:
    lines = fit_table(table.rows[: _MOST + 1], table.align, width, table.drop)
    left = len(table.rows) - 1 - _MOST
    return [*lines, f"... and {left} more, which -j has"] if left > 0 else lines
