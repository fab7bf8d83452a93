"""A VM's rows as a person reads them: exits by kind, times as a share of the vCPUs', histograms as bars."""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING, TextIO, TypeVar

from kvmstats_fast._text import display_width, format_si, format_table, printable
from kvmstats_fast.abi import StatType
from kvmstats_fast.analysis.formulas import ALL_EXITS, EXIT_KIND

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmstats_fast.cli._rows import Row
    from kvmstats_fast.samples import Samples

_LEAST_BAR = 10


def terminal_width(output: TextIO) -> int:
    """Return how many columns there are; 80 where it is no terminal, but for what COLUMNS says."""
    if output.isatty() or "COLUMNS" in os.environ:
        return max(shutil.get_terminal_size().columns, 20)
    return 80


def present(samples: Samples, rows: Sequence[Row], vmms: Mapping[int, str], output: TextIO) -> None:
    """Print a block for each VM."""
    width = terminal_width(output)
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row.host, row.vm), []).append(row)
    fractions = [figure for figure in samples.figures(by="vm").values() if not figure.units]
    for number, (whose, block) in enumerate(blocks.items()):
        vcpus = {info.vcpu_id for info in samples.files if (info.host, info.vm) == whose} - {None}
        lines = ["", _title(block[0], len(vcpus), samples.elapsed, vmms)][not number :]
        for vcpu in dict.fromkeys(row.vcpu for row in block):
            chosen = [row for row in block if row.vcpu == vcpu]
            lines += [] if vcpu is None else [f" vCPU {vcpu}"]
            lines += _table(chosen, len(vcpus) or 1 if vcpu is None else 1, width)
            for row in chosen:
                if row.stat.is_histogram:
                    lines += ["", *bars(row, width, output)]
        derived = [
            (f"  {figure.name}", f"{100 * value:.1f} %")
            for figure in fractions
            for host, vm, value in zip(figure.hosts, figure.vms, figure.values.tolist(), strict=True)
            if (host, vm) == whose and not math.isnan(value)
        ]
        if derived:
            lines += ["", *format_table(derived, "<>").splitlines()]
        print("\n".join(lines), file=output)


def _title(row: Row, vcpus: int, elapsed: float, vmms: Mapping[int, str]) -> str:
    vmm = f"{printable(vmms[row.pid])}, " if row.pid is not None and row.pid in vmms else ""
    pid = "" if row.pid is None else f" ({vmm}pid {row.pid})"
    return f"VM {printable(row.vm)}{pid}, {vcpus} vCPU{'' if vcpus == 1 else 's'}, {elapsed:.3f} s"


def fit_table(rows: Sequence[Sequence[str]], align: str, width: int, drop: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table; without the columns `drop`, one after the other, until it is no wider than that."""
    kept = list(range(len(align)))
    for column in [None, *drop]:
        kept = [one for one in kept if one != column]
        cells = [[row[one] for one in kept] for row in rows]
        lines = format_table(cells, "".join(align[one] for one in kept)).splitlines()
        if max(map(display_width, lines)) <= width:
            break
    return lines


_Row = TypeVar("_Row", bound="Row")


def arrange(rows: Sequence[_Row]) -> list[tuple[str, _Row, _Row | None]]:
    """Return rows of numbers in the order in which they are shown: their indent, the row, and what it is a share of."""
    plain = [row for row in rows if row.buckets is None]
    every = next((row for row in plain if row.stat.name in ALL_EXITS), None)
    kinds = [row for row in plain if every and row is not every and EXIT_KIND.fullmatch(row.stat.name)]
    kinds.sort(key=lambda row: -row.value)
    rest = [row for row in plain if row is not every and row not in kinds]
    shown = [("  ", every, every)] if every else []
    return [*shown, *(("    ", row, every) for row in kinds), *(("  ", row, None) for row in rest)]


def _table(rows: Sequence[Row], vcpus: int, width: int) -> list[str]:
    cells = [_cells(row, indent, every, vcpus) for indent, row, every in arrange(rows)]
    if not cells:
        return ["  nothing moved"] if not rows else []
    return fit_table(cells, "<>><", width, [3])


def _cells(row: Row, indent: str, every: Row | None, vcpus: int) -> tuple[str, str, str, str]:
    name, value = indent + printable(row.stat.name), format_value(row, row.value)
    if row.rate is None:
        return name, value, "", "now" if row.stat.type == StatType.INSTANT else "peak"
    if row.unit == "s":
        return (
            name,
            value,
            format_rate(row, row.rate, vcpus),
            "of its time" if vcpus == 1 else f"of {vcpus} vCPUs' time",
        )
    return name, value, format_rate(row, row.rate, vcpus), format_share(row, every)


def format_value(row: Row, value: float) -> str:
    """Return a value of a statistic as text."""
    return format_si(value, row.unit) if row.unit else f"{value:,}"


def format_rate(row: Row, rate: float, vcpus: int) -> str:
    """Return a rate as text; of time it is a share of that of so many vCPUs."""
    if row.unit == "s":
        return f"{100 * rate / vcpus:.1f} %"
    return f"{format_si(rate, row.unit)}/s" if row.unit else f"{rate:,.1f}/s"


def format_share(row: Row, every: Row | None) -> str:
    """Return what a kind of exits is of all, as text."""
    return f"{100 * row.value / every.value:.1f} %" if every and every is not row and every.value else ""


def bars(row: Row, width: int, output: TextIO) -> list[str]:
    """Return a histogram: a line for each bucket from the first to the last that counted anything."""
    counts, edges, unit = row.buckets or [], row.edges, row.stat.units(si=True)
    lines = [f"  {printable(row.stat.name)}: {row.value:,} value{'' if row.value == 1 else 's'}"]
    if not any(counts):
        return lines
    first = next(i for i, count in enumerate(counts) if count)
    last = max(i for i, count in enumerate(counts) if count)
    cells = [
        (f"    {format_si(edges[i], unit)}", "to", format_si(edges[i + 1], unit), f"{counts[i]:,}")
        for i in range(first, last + 1)
    ]
    text = format_table(cells, "><>>").splitlines()
    room = max(width - max(map(display_width, text)) - 2, _LEAST_BAR)
    for line, count in zip(text, counts[first : last + 1], strict=True):
        lines.append(f"{line}  {_bar(count / max(counts), room, output)}".rstrip())
    return lines


def _bar(fraction: float, room: int, output: TextIO) -> str:
    encoding = (getattr(output, "encoding", None) or "ascii").lower().replace("-", "")
    if encoding != "utf8":
        return "#" * round(fraction * room)
    eighths = round(fraction * room * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
