"""Page: what is known of one VM or vCPU, as lines: its statistics, where its time goes, and its histograms as bars."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._text import display_width, format_si, printable
from kvmstats_fast.analysis.histogram import Histogram, adder_of, adds_up
from kvmstats_fast.cli._present import arrange, bars, format_rate, format_share, format_value
from kvmstats_fast.cli._rows import Row, rows_of
from kvmstats_fast.cli._screen import Screen, fit_table
from kvmstats_fast.top.table import fits, make_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmstats_fast.top.counted import Counted, Part
    from kvmstats_fast.top.table import Who

_WIDE = 120  # from here on histograms are beside the statistics
_QUANTILES = (0.5, 0.99)


def find(counted: Counted, who: Who) -> Counted:
    """Return what one VM or vCPU counted."""
    return tuple(chosen for part in counted if (chosen := _take(part, who)) is not None)


def _take(part: Part, who: Who) -> Part | None:
    rows = [
        row
        for row, info in enumerate(part.files)
        if (info.host, info.vm) == (who.host, who.vm) and who.vcpu in (None, info.vcpu_id)
    ]
    return part.take(rows) if rows else None


def vcpus_of(counted: Counted, who: Who) -> list[int]:
    """Return the numbers of a VM's vCPUs."""
    whole = find(counted, who.of(None))
    return sorted(info.vcpu_id for part in whole for info in part.files if info.vcpu_id is not None)


def seconds_of(counted: Counted, who: Who) -> float:
    """Return how long a VM or vCPU was read."""
    return max((float(part.seconds.max()) for part in find(counted, who)), default=0.0)


def make_page(last: Counted, total: Counted, who: Who, width: int, events: Sequence[str] = ()) -> list[str]:
    """Return the lines about a VM or vCPU.

    Parameters
    ----------
    last, total : Counted
        What was counted in the last interval, and since the reset.
    who : Who
    width : int
    events : sequence of str
        Globs of statistics; none: those that moved.
    """
    last, total = find(last, who), find(total, who)
    rows = [row for row in _make_rows(last, total, who) if _is_wanted(row, events)]
    vcpus = sum(len(part.files) for part in total if part.kind == "vcpu") or 1
    is_wide = width >= _WIDE
    left = [*_shares(last, who), "", *_numbers(rows, vcpus, width // 2 if is_wide else width)]
    right = list(_histograms(rows, total, width - width // 2 - 2 if is_wide else width))
    if not is_wide:
        return [*left, "", *right]
    lines = max(len(left), len(right))
    left, right = left + [""] * (lines - len(left)), right + [""] * (lines - len(right))
    return [one + " " * (width // 2 + 2 - display_width(one)) + other for one, other in zip(left, right, strict=True)]


def _is_wanted(row: Row, events: Sequence[str]) -> bool:
    return any(fits(one, row.stat.name) for one in events) if events else row.moved


def _make_rows(last: Counted, total: Counted, who: Who) -> Iterator[Row]:
    """Yield a row for each statistic: what it counted since the reset, and its rate in the last interval."""
    by = "vm" if who.vcpu is None else "vcpu"
    now = rows_of((part.counts for part in last), by)
    for key, row in rows_of((part.counts for part in total), by).items():
        yield replace(row, rate=now[key].rate if key in now else None)


def _shares(last: Counted, who: Who) -> Iterator[str]:
    """Yield where the time of the vCPUs goes."""
    table = make_table(last, "vm" if who.vcpu is None else "vcpu")
    for row in range(len(table.rows)):
        cells = [
            (column, table.values[row, place]) for place, column in enumerate(table.columns) if column.form == "share"
        ]
        for group in dict.fromkeys(column.group for column, _ in cells):
            several = (f"{column.title} {column.format(v)}" for column, v in cells if column.group == group)
            yield f"{group}: {'  '.join(several)}"


def _numbers(rows: Sequence[Row], vcpus: int, width: int) -> list[str]:
    cells = [("", "since reset", "now", "of exits")]
    for indent, row, every in arrange(rows):
        now = "" if row.rate is None else format_rate(row, row.rate, vcpus)
        name = indent[2:] + printable(row.stat.name)
        cells.append((name, format_value(row, row.value), now, format_share(row, every)))
    return fit_table(cells, "<>>>", width, [3]) if len(cells) > 1 else ["nothing changed yet"]


def _histograms(rows: Sequence[Row], total: Counted, width: int) -> Iterator[str]:
    encoding = (sys.__stdout__ or sys.stderr).encoding
    for row in rows:
        if row.buckets is None:
            continue
        title, *lines = bars(row, Screen(sys.stdout, width, encoding=encoding))
        yield title[2:]
        if described := _describe(row, total):
            yield f"  {described}"
        yield from (line[4:] for line in lines)
        yield ""


def _describe(row: Row, total: Counted) -> str:
    """Return mean and quantiles of a histogram since the reset, as text."""
    stat = row.stat
    if not stat.is_histogram or not row.value:
        return ""
    name = adder_of(stat.name)
    having = [part for part in total if stat.name in part.stats]
    adders = [part.stats.get(name) for part in having]
    known = all(adder is not None and adds_up(adder, stat) for adder in adders)
    raw = np.array([part.change[name].sum() for part in having], np.uint64).sum() if known else None
    histogram = Histogram(stat, np.array(row.buckets, np.uint64), raw)
    unit = histogram.units
    text = "" if histogram.mean is None else f"mean {format_si(histogram.mean, unit)}, "
    bounds = zip(_QUANTILES, *histogram.quantile(_QUANTILES), strict=True)
    return text + ", ".join(
        f"{100 * q:g} % " + (f"< {format_si(high, unit)}" if np.isfinite(high) else f"≥ {format_si(low, unit)}")
        for q, low, high in bounds
    )
