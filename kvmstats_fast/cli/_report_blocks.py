"""The tables of a report, as cells of text: the same for a terminal and for a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._text import format_number, format_si, printable
from kvmstats_fast.abi import StatType
from kvmstats_fast.cli._present import format_rate, format_share, format_value, of_time

if TYPE_CHECKING:
    from kvmstats_fast.analysis.halt_poll import HaltPollAdvice
    from kvmstats_fast.cli._recorded import Life, Recorded, Run, Summary


@dataclass(slots=True)
class Table:
    """Cells of text, the first row a title; how columns are aligned, and which go first where there is no room."""

    rows: list[tuple[str, ...]]
    align: str
    drop: tuple[int, ...] = ()


@dataclass(slots=True)
class Block:
    """What is said of one VM, vCPU or host."""

    title: str
    vcpus: int
    rows: list[Summary]
    figures: list[tuple[str, str, str]]  #: name, value, formula


def find_blocks(recorded: Recorded, *, zero: bool) -> list[Block]:
    """Return a block for each VM, vCPU or host, in the order in which they were recorded."""
    blocks: dict[tuple[str, str, int | None], Block] = {}
    hosts = {run.host for run in recorded.runs}
    vcpus: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for life in recorded.lives:
        numbers = {(life.vm, vcpu) for vcpu in life.vcpus}
        for whose in ((life.host, life.vm), (life.host, "")):
            vcpus.setdefault(whose, set()).update(numbers)
    for row in recorded.rows:
        count = max(len(vcpus.get((row.host, row.vm), ())), 1) if row.vcpu is None else 1
        title = f"VM {printable(row.vm)}" if row.vm else f"Host {printable(row.host) or 'unknown'}"
        title += f" on {printable(row.host)}" if row.vm and len(hosts) > 1 else ""
        title += f", {count} vCPU{'' if count == 1 else 's'}" if row.vcpu is None else f", vCPU {row.vcpu}"
        block = blocks.setdefault((row.host, row.vm, row.vcpu), Block(title, count, [], []))
        if row.moved or zero:
            block.rows.append(row)
    counted = {row.stat.name for row in recorded.rows}
    for figure in recorded.figures().values():
        if figure.name.removesuffix("/s") in counted:
            continue  # it is the rate of a statistic, which has a row
        for index, value in enumerate(figure.values.tolist()):
            vm, vcpu = figure.vms[index] if figure.vms else "", figure.files[index].vcpu_id if figure.files else None
            of = blocks.get((figure.hosts[index], vm, vcpu))
            if of is not None and not math.isnan(value):
                text = f"{value:,.1f}/s" if figure.units else f"{100 * value:.1f} %"
                of.figures.append((figure.name, text, figure.formula))
    return list(blocks.values())


SPREAD_ALIGN = "<>>>>><"
#: Where there is no room: shares first, then totals, least and most.
SPREAD_DROP = (6, 1, 3, 5)
SPREAD_HEAD = ("", "total", "rate", "min", "median", "p99", "")


def spread_cells(row: Summary, indent: str, every: Summary | None, vcpus: int) -> tuple[str, ...]:
    """Return a row of a table of rates; of instant values it has the last, and the spread of values."""
    name, value = indent + printable(row.stat.name), format_value(row, row.value)
    if row.stat.type in (StatType.INSTANT, StatType.PEAK) or not row.stat.grows:
        how = "peak" if row.stat.type == StatType.PEAK else "last"
        return name, value, "", *(_value(row, one) for one in row.spread), how
    remark = format_share(row, every)
    if row.unit == "s":
        remark = of_time(row.rate or 0.0, vcpus)
    rates = ("-" if one is None or math.isnan(one) else format_rate(row, one, vcpus) for one in (row.rate, *row.spread))
    return name, value, *rates, remark


def _value(row: Summary, value: float) -> str:
    return "-" if math.isnan(value) else format_si(value, row.unit) if row.unit else f"{value:,.6g}"


def runs_table(runs: list[Run]) -> Table:
    """Return when runs were taken, how many ticks they missed, and what they cost."""
    head = ("run", "UTC", "for", "interval", "sweeps", "missed", "a sweep took", "of a processor", "rates of")
    rows = [
        (
            str(number),
            _clock(run.start),
            "one reading" if run.is_capture else _seconds(run.seconds),
            format_si(run.interval, "s") if run.interval else "none",
            f"{run.sweeps:,}",
            f"{run.missed:,} ({100 * run.missed / (run.sweeps + run.missed):.2g} %)" if run.missed else "0",
            format_si(run.sweep_ns / 1e9 / run.sweeps, "s"),
            f"{format_number(100 * run.cost, '.2f')} %",
            format_si(run.step, "s"),
        )
        for number, run in enumerate(runs, 1)
    ]
    return Table([head, *rows], "><>>>>>>>", (8, 6, 3, 7, 0))


def lives_table(lives: list[Life]) -> Table:
    """Return which VMs there were, and when."""
    hosts = len({life.host for life in lives}) > 1
    rows = [
        (
            printable(life.vm),
            printable(life.host),
            "" if life.pid is None else str(life.pid),
            str(len(life.vcpus)),
            _clock(life.start),
            "one reading" if all(run.is_capture for run in life.runs) else _seconds(life.seconds),
            printable(life.ended),
        )
        for life in lives
    ]
    head = ("VM", "host", "pid", "vCPUs", "UTC", "recorded for", "ended")
    kept = [i for i in range(7) if (hosts or i != 1) and (i != 6 or any(life.ended for life in lives))]
    table = [tuple(row[i] for i in kept) for row in [head, *rows]]
    return Table(table, "".join("<<>><><"[i] for i in kept), tuple(kept.index(i) for i in (6, 2, 3) if i in kept))


def advice_text(advice: HaltPollAdvice) -> str:
    """Return what was, and what would be best."""
    now = "" if advice.present is None else f" This host's halt_poll_ns is {advice.present:,} now."
    if advice.best is None:
        best = "No setting is the best"
    else:
        best = f"{advice.best:,} catches most" if advice.best else "0, no polling, is the best"
    caught, poll = format_number(100 * advice.caught, ".1f"), format_number(100 * advice.poll, ".2f")
    return (
        f"{advice.halts:,} halts; as it was set, polling caught {caught} % of them and took {poll} % of the vCPUs' "
        f"time. {best} of the settings that poll in vain for at most {100 * advice.most_vain:g} % of it.{now}"
    )


def advice_table(advice: HaltPollAdvice) -> Table:
    """Return what each setting would have caught and cost, in percent: from the least to the most that it may be."""
    rows = []
    for row in advice.to_dict()["rows"]:
        setting = row["halt_poll_ns"]
        pairs = ((row[f"{name}_low"], row[f"{name}_high"]) for name in ("caught", "poll", "vain"))
        ranges = ("-" if None in pair else f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f} %" for pair in pairs)
        marks = [mark for mark, at in (("best", advice.best), ("now", advice.present)) if at == setting]
        rows.append((f"{setting:,}", *ranges, ", ".join(marks)))
    return Table([("halt_poll_ns", "catches", "polls", "in vain", ""), *rows], ">>>><", (2, 3))


def _clock(ns: int) -> str:
    return "unknown" if not ns else str(np.datetime64(ns, "ns").astype("datetime64[s]")).replace("T", " ")


def _seconds(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.3f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
