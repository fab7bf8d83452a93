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


def make_rows(samples: Samples, *, per_vcpu: bool = False) -> list[Row]:
    """Return the rows of all VMs, or of all vCPUs, in the order of the files and of their statistics."""
    rows: list[Row] = []
    for vm in samples.by_vm().values():
        for part in vm.split():
            by_vcpu = per_vcpu and part.files[0].kind == "vcpu"
            groups = [[i] for i in range(len(part.files))] if by_vcpu else [list(range(len(part.files)))]
            for name in part.names:
                rows += _rows_of(part, part.stat(name), groups, by_vcpu=by_vcpu)
    return rows


def _rows_of(part: Samples, stat: Stat, groups: list[list[int]], *, by_vcpu: bool) -> Iterator[Row]:
    name = stat.name
    if stat.type == StatType.PEAK or not stat.grows:
        values, rates = _last(part, name), None
    else:
        values, rates = part.total(name), part.mean_rate(name)
    for group in groups:
        info = part.files[group[0]]
        vcpu = info.vcpu_id if by_vcpu else None
        chosen = stat.as_signed(values[group])
        buckets = chosen.sum(axis=0).tolist() if stat.shape else None
        total = sum(chosen.tolist()) if buckets is None else sum(buckets)
        value = total if buckets is not None else total / stat.factor if stat.exponent < 0 else total * stat.factor
        rate = None if rates is None else _sum_known(rates[group])
        yield Row(info.host, info.vm, info.pid, vcpu, stat, value, rate, buckets)


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
