"""What a run counted, as rows: the fields that every verb prints, under the same names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import plain_number
from kvmstats_fast.abi import StatType

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

FIELDS = ("time", "host", "vm", "pid", "vcpu", "name", "value", "rate", "unit", "bucket")


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
    """

    host: str
    vm: str
    pid: int | None
    vcpu: int | None
    stat: Stat
    value: float
    rate: float | None
    buckets: list[int] | None

    @property
    def moved(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.value) and not math.isnan(self.value)

    def fields(self, time: float | None = None) -> dict[str, Any]:
        """Return the row as JSON has it: plain Python, under the names of `FIELDS`."""
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
    """Return the rows of all VMs, vCPUs or hosts, in the order of the files and of their statistics."""
    return [
        row
        for part, groups in _group(samples, by)
        for name in part.names
        for row in _rows_of(part, part.stat(name), groups, by)
    ]


def rows_over_time(samples: Samples, by: str) -> Iterator[tuple[Row, npt.NDArray[np.float64]]]:
    """Yield each row that `make_rows` gives, with its rate from each sweep to the next, (T - 1,).

    Of instant values it is the value at each sweep, (T,), and of peaks and histograms there is nothing, (0,).
    """
    for part, groups in _group(samples, by):
        for name in part.names:
            stat = part.stat(name)
            values = np.empty((0, len(part.files)))
            if not (stat.shape or stat.type == StatType.PEAK):
                values = part.rate(name) if stat.grows else _known(part, part.si(name))
            for row, group in zip(_rows_of(part, stat, groups, by), groups, strict=True):
                known = ~np.isnan(values[:, group]).all(axis=1)
                yield row, np.where(known, np.nansum(values[:, group], axis=1), np.nan)


def _known(part: Samples, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return values with NaN where a file had failed."""
    known = values.astype(np.float64)
    for error in part.errors:
        known[error.sweep :, error.file] = np.nan
    return known


def _group(samples: Samples, by: str) -> Iterator[tuple[Samples, list[list[int]]]]:
    """Yield the files of one kind and kernel, and which of them a row is of."""
    for whole in [samples] if by == "host" else samples.by_vm().values():
        for part in whole.split():
            alone = by == "vcpu" and part.files[0].kind == "vcpu"
            yield part, [[i] for i in range(len(part.files))] if alone else [list(range(len(part.files)))]


def _rows_of(part: Samples, stat: Stat, groups: list[list[int]], by: str) -> Iterator[Row]:
    name = stat.name
    if stat.type == StatType.PEAK or not stat.grows:
        values, rates = _last(part, name), None
    else:
        values, rates = part.total(name), part.mean_rate(name)
    for group in groups:
        info = part.files[group[0]]
        vm, pid = ("", None) if by == "host" else (info.vm, info.pid)
        chosen = stat.as_signed(values[group])
        buckets = chosen.sum(axis=0).tolist() if stat.shape else None
        total = sum(chosen.tolist()) if buckets is None else sum(buckets)
        value = total if buckets is not None else total / stat.factor if stat.exponent < 0 else total * stat.factor
        rate = None if rates is None else _sum_known(rates[group])
        yield Row(info.host, vm, pid, info.vcpu_id if by == "vcpu" else None, stat, value, rate, buckets)


def _last(part: Samples, name: str) -> npt.NDArray[Any]:
    """Return the last value of each file that was read."""
    last = np.full(len(part.files), len(part) - 1)
    for error in part.errors:
        last[error.file] = max(min(error.sweep, len(part)) - 1, 0)
    values: npt.NDArray[Any] = part[name][last, np.arange(len(last))]
    return values


def _sum_known(rates: npt.NDArray[np.float64]) -> float | None:
    known = rates[~np.isnan(rates)]
    return float(known.sum()) if known.size else None
