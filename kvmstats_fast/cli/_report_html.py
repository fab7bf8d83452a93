"""A report as one page, which needs nothing else: it goes into a ticket, is read off line, and prints."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast import __version__
from kvmstats_fast._text import format_si, printable
from kvmstats_fast.cli._present import arrange
from kvmstats_fast.cli._report_blocks import (
    SPREAD_ALIGN,
    SPREAD_HEAD,
    advice_table,
    advice_text,
    find_blocks,
    lives_table,
    runs_table,
    spread_cells,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvmstats_fast.cli._recorded import Recorded, Summary
    from kvmstats_fast.cli._report_blocks import Block, Table

_POINTS, _HEIGHT = 160, 24  # of a line over time

_STYLE = """
:root { color-scheme: light dark; --fg: #1b1f24; --bg: #fff; --dim: #5b6570; --rule: #d8dee4; --bar: #2f6fb7; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #dfe3e8; --bg: #14171a; --dim: #97a1ab; --rule: #353c43; --bar: #6aa5e3; }
}
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: var(--fg); background: var(--bg);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h1, h2, h3, td { overflow-wrap: anywhere; }
p { max-width: 50rem; } .dim { color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; }
.r { text-align: right; } .in { padding-left: 1.4rem; } td.text { white-space: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--bar); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
svg { display: block; } svg path { fill: none; stroke: var(--bar); stroke-width: 1.2; } svg rect { fill: var(--bar); }
.bars td { border: 0; padding-top: 0; padding-bottom: 0; }
@media print {
  :root { --fg: #000; --bg: #fff; --dim: #444; --rule: #bbb; --bar: #333; }
  body { margin: 0; max-width: none; font-size: 9pt; } .wide { overflow: visible; }
  h2, h3 { break-after: avoid; } tr, .bars { break-inside: avoid; }
}
"""

#: A click on the title of a column sorts by it, numbers by their value, and another the other way round.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (row, at) => {
    const cell = row.cells[at], text = cell.dataset.value ?? cell.textContent;
    return cell.dataset.value === undefined && isNaN(parseFloat(text)) ? text : parseFloat(text.replaceAll(",", ""));
  };
  table.tHead.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th"), down = head.ariaSort === "descending", at = head.cellIndex;
    table.tHead.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
    head.ariaSort = down ? "ascending" : "descending";
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
      : typeof a === "number" ? 1 : typeof b === "number" ? -1 : a.localeCompare(b);
    const rows = [...body.rows].sort((a, b) => order(key(a, at), key(b, at)));
    body.append(...(down ? rows : rows.reverse()));
  }));
}
"""


def make_page(recorded: Recorded, *, zero: bool) -> str:
    """Return the page; whatever others have named is escaped in it."""
    kernels = dict.fromkeys((run.host, run.kernel) for run in recorded.runs)
    vms = ", ".join(printable(vm) for vm in dict.fromkeys(life.vm for life in recorded.lives))
    title = escape(f"KVM statistics: {printable(vms, 200)}")
    start, stop = min(run.start for run in recorded.runs), max(run.stop for run in recorded.runs)
    parts = [
        f"<h1>{title}</h1>",
        *(f"<p>Host {_text(host) or 'unknown'}, kernel {_text(kernel) or 'unknown'}</p>" for host, kernel in kernels),
        "<h2>Runs</h2>",
        _table(runs_table(recorded.runs)),
        "<h2>VMs</h2>",
        _table(lives_table(recorded.lives)),
    ]
    for block in find_blocks(recorded, zero=zero):
        parts += _describe(block, start, stop)
    if recorded.advice is not None and recorded.advice.halts:
        parts += ["<h2>halt_poll_ns</h2>", f"<p>{_text(advice_text(recorded.advice))}</p>"]
        parts.append(_table(advice_table(recorded.advice)))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="dim">kvmstats_fast {__version__}. Times are UTC.</p>\n'
        + f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text, 1 << 12))


def _table(table: Table) -> str:
    rows = ([(cell, None) for cell in row] for row in table.rows[1:])
    return _sortable(table.rows[0], table.align, ["".join(_cells(row, table.align)) for row in rows])


def _sortable(head: Sequence[str], align: str, rows: Sequence[str]) -> str:
    """Return a table of rows of cells, which are HTML."""
    titles = (
        f'<th scope="col"{_class(side)}>{f"<button>{escape(cell)}</button>" if cell else ""}</th>'
        for cell, side in zip(head, align, strict=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{"".join(titles)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(cells: Sequence[tuple[str, float | None]], align: str) -> Iterator[str]:
    """Yield cells with what they are sorted by, if it is not their text."""
    for (cell, value), side in zip(cells, align, strict=True):
        data = "" if value is None else f' data-value="{value if math.isfinite(value) else ""}"'
        yield f"<td{_class(side)}{data}>{escape(cell)}</td>"


def _class(side: str) -> str:
    return ' class="r"' if side == ">" else ""


def _describe(block: Block, start: int, stop: int) -> Iterator[str]:
    yield f"<h2>{escape(block.title)}</h2>"
    rows = []
    for indent, row, every in arrange(block.rows):
        name, *texts = spread_cells(row, "", every, block.vcpus)
        share = row.value / every.value if every and every.value else math.nan
        values = (row.value, math.nan if row.rate is None else row.rate, *row.spread, share)
        side = ' class="in"' if len(indent) > 2 else ""
        cells = "".join(_cells([*zip(texts, values, strict=True)], SPREAD_ALIGN[1:]))
        rows.append(f"<td{side}>{escape(name)}</td>{cells}<td>{_line(row, start, stop)}</td>")
    if rows:
        head = ("statistic", *SPREAD_HEAD[1:-1], "share", "over time")
        yield _sortable(head, SPREAD_ALIGN + "<", rows)
    elif not block.rows:
        yield "<p>Nothing changed.</p>"
    yield from (_bars(row) for row in block.rows if row.stat.is_histogram)
    if block.figures:
        yield "<h3>Figures</h3>"
        figures = (
            f'<td>{_text(name)}</td><td class="r">{escape(value)}</td><td class="text">{_text(formula)}</td>'
            for name, value, formula in block.figures
        )
        yield _sortable(("figure", "value", "is"), "<><", list(figures))


def _line(row: Summary, start: int, stop: int) -> str:
    """Return a rate over time as a line, from 0 to its largest value; gaps are where nothing was recorded."""
    if not row.steps or stop <= start:
        return ""
    values = _on_grid(row, start, stop)
    low, high = float(np.fmin.reduce(values, initial=0)), float(np.fmax.reduce(values, initial=0))
    scale = (_HEIGHT - 2) / (high - low) if high > low else 0.0
    path, draws = [], False
    for x, value in enumerate(values.tolist()):
        if not math.isnan(value):
            y = f"{_HEIGHT - 1 - (value - low) * scale:.1f}"
            path.append(f"L{x} {y}H{x + 1}" if draws else f"M{x} {y}H{x + 1}")
        draws = not math.isnan(value)
    return (
        f'<svg width="{_POINTS}" height="{_HEIGHT}" role="img" aria-label="over time"><path d="{"".join(path)}"/></svg>'
    )


def _on_grid(row: Summary, start: int, stop: int) -> npt.NDArray[np.float64]:
    """Return the mean of the steps that begin in each of `_POINTS` parts of the time; a long step is in all of its."""
    sums, counts = np.zeros(_POINTS), np.zeros(_POINTS)
    width = (stop - start) / _POINTS
    for edges, steps in zip(row.time, row.steps, strict=True):
        known = ~np.isnan(steps)
        places = np.clip((edges - start) / width, 0, _POINTS - 1e-9)
        first = places[:-1].astype(np.intp)
        last = np.maximum(np.ceil(places[1:]).astype(np.intp), first + 1)
        for one in np.flatnonzero(known).tolist():
            sums[first[one] : last[one]] += steps[one]
            counts[first[one] : last[one]] += 1
    mean: npt.NDArray[np.float64] = np.divide(sums, counts, out=np.full(_POINTS, np.nan), where=counts > 0)
    return mean


def _bars(row: Summary) -> str:
    """Return a histogram: a row for each bucket from the first to the last that counted anything."""
    counts, edges, unit = row.buckets or [], row.edges, row.stat.units(si=True)
    used = [index for index, count in enumerate(counts) if count]
    lines = []
    for index in range(used[0], used[-1] + 1) if used else ():
        low, high = (escape(format_si(edge, unit)) for edge in edges[index : index + 2])
        lines.append(
            f'<tr><td class="r">{low}</td><td>to</td><td class="r">{high}</td><td class="r">{counts[index]:,}</td>'
            f'<td><svg width="400" height="12" role="img" aria-label="{counts[index]:,}">'
            f'<rect width="{400 * counts[index] / max(counts):.1f}" height="12"/></svg></td></tr>'
        )
    return (
        f"<h3>{_text(row.stat.name)}: {row.value:,} values</h3>\n"
        f'<div class="wide"><table class="bars"><tbody>{"".join(lines)}</tbody></table></div>'
    )
