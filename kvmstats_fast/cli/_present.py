"""A VM's rows as a person reads them: exits by kind, times as a share of the vCPUs', histograms as bars."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvmstats_fast._text import display_width, format_si, format_table, printable
from kvmstats_fast.abi import StatType
from kvmstats_fast.analysis.formulas import ALL_EXITS, EXIT_KIND
from kvmstats_fast.cli._screen import fit_table, wrap_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.cli._rows import Row
    from kvmstats_fast.cli._screen import Screen
    from kvmstats_fast.file_info import FileInfo

_LEAST_BAR = 10


class Vm(NamedTuple):
    """What a block says of its VM, beside its rows.

    Attributes
    ----------
    vcpus : int
    seconds : float or None
        How long it was counted; None of a capture, which is one reading.
    vmm : str
        The program, if it is known.
    figures : list of (str, float)
        Those that are fractions.
    """

    vcpus: int
    seconds: float | None
    vmm: str
    figures: list[tuple[str, float]]


def vms_of(
    infos: Iterable[FileInfo],
    figures: Figures,
    seconds: Callable[[tuple[str, str]], float | None],
    vmms: Mapping[int, str] = MappingProxyType({}),
) -> dict[tuple[str, str], Vm]:
    """Return what is known of each VM, by its host and label."""
    vms: dict[tuple[str, str], Vm] = {}
    vcpus: dict[tuple[str, str], set[int | None]] = {}
    for info in infos:
        whose = (info.host, info.vm)
        vcpus.setdefault(whose, set()).add(info.vcpu_id)
        vmm = "" if info.pid is None else vmms.get(info.pid, "")
        vms[whose] = Vm(len(vcpus[whose] - {None}), seconds(whose), vmm, [])
    for figure in figures.values():
        for host, vm, value in zip(figure.hosts, figure.vms, figure.values.tolist(), strict=True):
            if not figure.units and not math.isnan(value):
                vms[host, vm].figures.append((figure.name, value))
    return vms


def present(rows: Sequence[Row], vms: Mapping[tuple[str, str], Vm], screen: Screen, *, zero: bool) -> None:
    """Print a block for each VM; what did not move is left out, unless `zero`."""
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row.host, row.vm), []).append(row)
    hosts = {host for host, _ in blocks}
    for number, (whose, block) in enumerate(blocks.items()):
        about = vms[whose]
        lines = [""] if number else []
        title = _title(block[0], about, several_hosts=len(hosts) > 1)
        lines += map(screen.title, wrap_text(title, screen.width))
        shown = [row for row in block if row.moved or zero]
        lines += [] if shown else ["  nothing changed"]
        for vcpu in dict.fromkeys(row.vcpu for row in shown):
            chosen = [row for row in shown if row.vcpu == vcpu]
            lines += [] if vcpu is None else [f" vCPU {vcpu}"]
            lines += _table(chosen, about.vcpus or 1 if vcpu is None else 1, screen.width)
            for row in chosen:
                if row.stat.is_histogram:
                    lines += ["", *bars(row, screen)]
        if about.figures:
            cells = [(f"  {name}", f"{100 * value:.1f} %") for name, value in about.figures]
            lines += ["", *fit_table(cells, "<>", screen.width)]
        screen.print(*lines)


def _title(row: Row, about: Vm, *, several_hosts: bool) -> str:
    vmm = f"{printable(about.vmm)}, " if about.vmm else ""
    pid = "" if row.pid is None else f" ({vmm}pid {row.pid})"
    host = f" on {printable(row.host)}" if several_hosts else ""
    time = "one reading: counts since the VM was made" if about.seconds is None else f"{about.seconds:.3f} s"
    label = row.vm.removesuffix(f" (pid {row.pid})")
    return f"VM {printable(label)}{pid}{host}, {about.vcpus} vCPU{'' if about.vcpus == 1 else 's'}, {time}"


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
    return fit_table(cells, "<>><", width, [3]) if cells else []


def _cells(row: Row, indent: str, every: Row | None, vcpus: int) -> tuple[str, str, str, str]:
    name, value = indent + printable(row.stat.name), format_value(row, row.value)
    if row.stat.type == StatType.PEAK or not row.stat.grows:
        return name, value, "", "peak" if row.stat.type == StatType.PEAK else "now"
    if row.rate is None:
        return name, value, "", format_share(row, every)
    if row.unit == "s":
        return name, value, format_rate(row, row.rate, vcpus), of_time(row.rate, vcpus)
    return name, value, format_rate(row, row.rate, vcpus), format_share(row, every)


def format_value(row: Row, value: float) -> str:
    """Return a value of a statistic as text."""
    return format_si(value, row.unit) if row.unit else f"{value:,}"


def format_rate(row: Row, rate: float, vcpus: int) -> str:
    """Return a rate as text; of time it is a share of that of so many vCPUs."""
    if row.unit == "s":
        return f"{100 * rate / vcpus:.1f} %"
    return f"{format_si(rate, row.unit)}/s" if row.unit else f"{rate:,.1f}/s"


def of_time(rate: float, vcpus: int) -> str:
    """Return what a rate of time is a share of; a wait is counted when it ends, also what of it was earlier."""
    whose = "of its time" if vcpus == 1 else f"of {vcpus} vCPUs' time"
    return f"{whose}: in part earlier" if rate > vcpus * 1.001 else whose


def format_share(row: Row, every: Row | None) -> str:
    """Return what a kind of exits is of all, as text; a kernel that emulates counts more of some kinds than exits."""
    if not every or every is row or not row.value <= every.value > 0:
        return ""
    return f"{100 * row.value / every.value:.1f} %"


def bars(row: Row, screen: Screen) -> list[str]:
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
    room = max(screen.width - max(map(display_width, text)) - 2, _LEAST_BAR)
    for line, count in zip(text, counts[first : last + 1], strict=True):
        lines.append(f"{line}  {screen.bar(_bar(count / max(counts) * room, screen))}".rstrip())
    return lines


def _bar(cells: float, screen: Screen) -> str:
    if not screen.has_blocks:
        return "#" * round(cells)
    eighths = round(cells * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
