"""What a run counted, as rows: the fields that every verb prints, under the same names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import plain_number
from kvmstats_fast.abi import StatType
from kvmstats_fast.analysis.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.analysis.tally import KernelCounts
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

    #: Host, VM, vCPU and statistic, wherever that lies in a file.
    Key: TypeAlias = tuple[str, str, int | None, Stat]


@dataclass(slots=True)
class Row:
    """One statistic of a VM, or of a vCPU, over a run.

    Attributes
    ----------
    vm : str
    pid, vcpu : int or None
        `vcpu` is None for what a whole VM did.
    stat : Stat
    value : int or float
        In base units: what was counted; of instant values and peaks the last one. Of a histogram how many values.
    rate : float or None
        Per second; None of instant values and peaks, and where that is not defined.
    buckets : list of int or None
        Of a histogram.
    seconds : float
        How long any of its files was read; NaN of no time.
    """

    host: str
    vm: str
    pid: int | None
    vcpu: int | None
    stat: Stat
    value: float
    rate: float | None
    buckets: list[int] | None
    seconds: float

    @property
    def is_counted(self) -> bool:
        """Whether the value adds up."""
        return _is_counted(self.stat)

    @property
    def moved(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.value) and not math.isnan(self.value)

    def fields(self, time: float | None = None) -> dict[str, Any]:
        """Return the row as JSON has it: plain Python, under the names of `ROW_FIELDS`."""
        row: dict[str, Any] = {} if time is None else {"time": time}
        row |= {"host": self.host, "vm": self.vm, "pid": self.pid, "vcpu": self.vcpu, "name": self.stat.name}
        row |= {"value": self.value, "rate": self.rate, "unit": self.unit}
        if self.buckets is not None:
            row["buckets"] = self.buckets
            row["edges"] = [plain_number(edge) for edge in self.edges]
        return row

    @property
    def unit(self) -> str:
        """Of `value`, a symbol of base units; empty for counts. A histogram's values are counts."""
        return "" if self.buckets is not None else self.stat.units(si=True)

    @property
    def edges(self) -> list[float]:
        """Of a histogram's buckets, in base units of the statistic; empty for other rows of values."""
        return self.stat.bucket_edges().tolist() if self.stat.is_histogram else []


def make_rows(samples: Samples, by: str = "vm") -> list[Row]:
    """Return the rows of all VMs, vCPUs or hosts of a run, in the order of the files and of their statistics."""
    tally = Tally()
    tally.add(samples, follows=False)
    return [*rows_of(tally.last_run(), by).values()]


def rows_of(counts: Iterable[KernelCounts], by: str) -> dict[Key, Row]:
    """Return the rows of what was counted in a run; those of the same, as on a host with two kernels, are added up."""
    parts: dict[tuple[str, str], dict[Key, Row]] = {}
    for one in counts:
        groups = group(one.files, by)
        for stat in one.stats.values():
            for columns in groups:
                row = _make_row(one, stat, columns, by)
                rows, key = parts.setdefault((row.host, row.vm), {}), key_of(row)
                rows[key] = _add(rows[key], row) if key in rows else row
    return {key: row for rows in parts.values() for key, row in rows.items()}


def rates_over_time(samples: Samples, by: str) -> Iterator[tuple[Key, npt.NDArray[np.float64]]]:
    """Yield the keys of the rows of one value, each with its rate from each sweep to the next, (T - 1,).

    Of instant values it is the value at each sweep, (T,). Of peaks, and statistics of several values, there is nothing.
    """
    for part in samples.split():
        groups = group(part.files, by)
        stats = [stat for stat in map(part.stat, part.names) if not stat.shape and stat.type != StatType.PEAK]
        rates = part.rates([stat.name for stat in stats if stat.grows])
        for stat in stats:
            values = rates[stat.name] if stat.grows else _known(part, part.si(stat.name))
            known = ~np.isnan(values)
            for columns in groups:
                sums = np.where(known[:, columns], values[:, columns], 0).sum(axis=1)
                yield _key(part.files[columns[0]], stat, by), np.where(known[:, columns].any(axis=1), sums, np.nan)


def group(files: Sequence[FileInfo], by: str) -> list[list[int]]:
    """Return which files of one kind a row is of, for each row of a statistic."""
    rows: dict[tuple[object, ...], list[int]] = {}
    for index, info in enumerate(files):
        whose = (info.host,) if by == "host" else (info.host, info.vm)
        rows.setdefault((*whose, index) if by == "vcpu" and info.kind == "vcpu" else whose, []).append(index)
    return [*rows.values()]


def key_of(row: Row) -> Key:
    """Return what rows of the same in several runs have in common."""
    return row.host, row.vm, row.vcpu, replace(row.stat, offset=0)


def add_buckets(a: list[int] | None, b: list[int] | None) -> list[int] | None:
    """Return the counts of two histograms of the same buckets together."""
    return None if a is None or b is None else [x + y for x, y in zip(a, b, strict=True)]


def _key(info: FileInfo, stat: Stat, by: str) -> Key:
    vm, vcpu = "" if by == "host" else info.vm, info.vcpu_id if by == "vcpu" else None
    return info.host, vm, vcpu, replace(stat, offset=0)


def _add(a: Row, b: Row) -> Row:
    value, seconds = a.value + b.value, _longest([a.seconds, b.seconds])
    rate = _rate(a.stat, value, seconds)
    return replace(a, value=value, rate=rate, buckets=add_buckets(a.buckets, b.buckets), seconds=seconds)


def _known(part: Samples, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return values with NaN where a file had failed."""
    known = values.astype(np.float64)
    for error in part.errors:
        known[error.sweep :, error.file] = np.nan
    return known


def _make_row(counts: KernelCounts, stat: Stat, columns: Sequence[int], by: str) -> Row:
    counted = _is_counted(stat)
    changes = counts.change[stat.name] if counted else counts.end[stat.name]
    info = counts.files[columns[0]]
    host, vm, vcpu, _ = _key(info, stat, by)
    chosen = stat.as_signed(changes[columns])
    buckets = chosen.sum(axis=0).tolist() if stat.shape else None
    total = sum(chosen.tolist()) if buckets is None else sum(buckets)
    value = total if buckets is not None else total / stat.factor if stat.exponent < 0 else total * stat.factor
    seconds = _longest(counts.seconds[columns].tolist())
    pid = None if by == "host" else info.pid
    return Row(host, vm, pid, vcpu, stat, value, _rate(stat, value, seconds), buckets, seconds)


def _rate(stat: Stat, value: float, seconds: float) -> float | None:
    """Return what was counted by the time that any of its files was read: one that died early adds no rate."""
    return None if math.isnan(seconds) or not _is_counted(stat) else value / seconds


def _is_counted(stat: Stat) -> bool:
    """Return whether its changes add up; those of instant values and peaks do not."""
    return stat.grows and stat.type != StatType.PEAK


def _longest(seconds: Iterable[float]) -> float:
    return max((one for one in seconds if not math.isnan(one)), default=math.nan)
