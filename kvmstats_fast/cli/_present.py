"""A VM's rows as a person reads them: exits by kind, times as a share of the vCPUs', histograms as bars."""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING, TextIO

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
                    lines += ["", *_bars(row, width, output)]
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


def _table(rows: Sequence[Row], vcpus: int, width: int) -> list[str]:
    plain = [row for row in rows if row.buckets is None]
    every = next((row for row in plain if row.stat.name in ALL_EXITS), None)
    kinds = [row for row in plain if every and row is not every and EXIT_KIND.fullmatch(row.stat.name)]
    kinds.sort(key=lambda row: -row.value)
    rest = [row for row in plain if row is not every and row not in kinds]
    cells = [_cells(row, "  ", every, vcpus) for row in ([every] if every else [])]
    cells += [_cells(row, "    ", every, vcpus) for row in kinds]
    cells += [_cells(row, "  ", None, vcpus) for row in rest]
    if not cells:
        return ["  nothing moved"] if not rows else []
    lines = format_table(cells, "<>><").splitlines()
    if max(map(display_width, lines)) > width:
        lines = format_table([row[:3] for row in cells], "<>>").splitlines()
    return lines


def _cells(row: Row, indent: str, every: Row | None, vcpus: int) -> tuple[str, str, str, str]:
    name = indent + printable(row.stat.name)
    if row.unit:
        value = format_si(row.value, row.unit)
        if row.rate is None:
            return name, value, "", "now" if row.stat.type == StatType.INSTANT else "peak"
        if row.unit == "s":
            whose = "of its time" if vcpus == 1 else f"of {vcpus} vCPUs' time"
            return name, value, f"{100 * row.rate / vcpus:.1f} %", whose
        return name, value, f"{format_si(row.rate, row.unit)}/s", ""
    value = f"{row.value:,}"
    if row.rate is None:
        return name, value, "", "now" if row.stat.type == StatType.INSTANT else "peak"
    share = f"{100 * row.value / every.value:.1f} %" if every and every is not row and every.value else ""
    return name, value, f"{row.rate:,.1f}/s", share


def _bars(row: Row, width: int, output: TextIO) -> list[str]:
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
