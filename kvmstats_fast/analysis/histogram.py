"""Histogram: bucket counts with their edges, and what follows from them about the values that were counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import article, check_fraction, check_integer
from kvmstats_fast.abi import StatType
from kvmstats_fast.changes import add_exactly
from kvmstats_fast.groups import find_columns, find_groups
from kvmstats_fast.stat import Stat

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.samples import Samples

_MOST = 1 << 64


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a kernel histogram, of one file or of many.

    A bucket is a range: all that is known of a value that it counted is that it lay between two edges. A quantile or a
    mean is therefore a pair of bounds, and a number only where the kernel adds up the same values in a counter.

    Parameters
    ----------
    stat : Stat
        The histogram's descriptor.
    counts : array_like
        uint64, shape ``(buckets,)``, or ``(n, buckets)`` of n files.
    raw_total : array_like, optional
        The sum of all that was counted, in the histogram's raw units (ns): uint64, shape ``()`` or ``(n,)``.

    Attributes
    ----------
    count : numpy.ndarray
        How many were counted: uint64, shape ``()`` or ``(n,)``.

    Raises
    ------
    TypeError, ValueError
        If `stat` is not a histogram, or the counts do not fit it, or add up to 2**64 or more.

    Notes
    -----
    The edges are those of ``kvm_stats_linear_hist_update`` and ``kvm_stats_log_hist_update``
    (``include/linux/kvm_host.h``); the last bucket is open, it also counts all that is larger.

    Examples
    --------
    >>> from kvmstats_fast import Stat, StatBase, StatType, StatUnit
    >>> stat = Stat("wait_hist", StatType.LOG_HIST, StatUnit.SECONDS, StatBase.POW10, -9, 5, 0)
    >>> h = Histogram(stat, [0, 0, 90, 9, 1])
    >>> h.quantile(0.5), h.quantile(1), h.mean_bounds()
    ((2e-09, 4e-09), (8e-09, inf), (2.24e-09, inf))
    """

    stat: Stat
    counts: npt.NDArray[np.uint64]
    raw_total: npt.NDArray[np.uint64] | None = None
    count: npt.NDArray[np.uint64] = field(init=False)
    _edges: npt.NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.stat, Stat):
            raise TypeError(f"stat is {article(self.stat)}; it must be the Stat of a histogram")
        object.__setattr__(self, "_edges", self.stat.bucket_edges())
        counts = _whole_numbers(self.counts, "counts")
        if counts.ndim not in (1, 2) or counts.shape[-1] != self.stat.size:
            raise ValueError(f"counts have shape {counts.shape}; {self.stat.name} has {self.stat.size} buckets")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "count", add_exactly(counts, -1, f"the counts of {self.stat.name}"))
        if self.raw_total is not None:
            total = _whole_numbers(self.raw_total, "raw_total")
            if total.shape != counts.shape[:-1]:
                raise ValueError(f"raw_total has shape {total.shape}, the counts are of {counts.shape[:-1]}")
            object.__setattr__(self, "raw_total", total)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Edges in base units, float64 (buckets + 1,): bucket i counted ``edges[i] <= value < edges[i + 1]``."""
        return self._edges

    @property
    def units(self) -> str:
        """Unit of the edges: ``"s"``, ``"B"``, or empty."""
        return self.stat.units(si=True)

    def sum(self) -> Histogram:
        """Add the files up: a histogram of shape ``(buckets,)``."""
        if self.counts.ndim == 1:
            return self
        total = self.raw_total
        return replace(
            self,
            counts=add_exactly(self.counts, 0, f"the counts of {self.stat.name}"),
            raw_total=None if total is None else add_exactly(total, 0, f"the totals of {self.stat.name}"),
        )

    def __getitem__(self, file: int | slice) -> Histogram:
        """Of one file, or of some."""
        if self.counts.ndim == 1:
            raise TypeError("this histogram is of one file, or summed up: it has buckets, see counts")
        total = self.raw_total
        return replace(self, counts=self.counts[file], raw_total=None if total is None else total[file])

    def __add__(self, other: Histogram) -> Histogram:
        return self._combined(other, np.add, "sum")

    def __sub__(self, other: Histogram) -> Histogram:
        return self._combined(other, np.subtract, "difference")

    def _combined(self, other: Histogram, operation: np.ufunc, what: str) -> Histogram:
        if not isinstance(other, Histogram):
            return NotImplemented
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"histograms of shapes {self.counts.shape} and {other.counts.shape} have no {what}")
        if self.units != other.units or not np.array_equal(self.edges, other.edges):
            raise ValueError(f"{self.stat.name} and {other.stat.name} have different buckets, and so no {what}")
        counts = _checked(operation, self.counts, other.counts, f"{what} of {self.stat.name}")
        total = None
        same_scale = (self.stat.base, self.stat.exponent) == (other.stat.base, other.stat.exponent)
        if self.raw_total is not None and other.raw_total is not None and same_scale:
            total = _checked(operation, self.raw_total, other.raw_total, f"{what} of the totals of {self.stat.name}")
        return replace(self, counts=counts, raw_total=total)

    def quantile(self, q: float) -> tuple[Any, Any]:
        """Bounds of a quantile: the value of rank ``ceil(q * count)`` lies in ``[low, high)``.

        Parameters
        ----------
        q : float
            From 0 to 1, read as the decimal that it prints as: the median of 0.1 * 30 values is of rank 3.

        Returns
        -------
        low, high : float, or numpy.ndarray of shape (n,)
            In base units; `high` is inf in the last bucket; both are NaN where nothing was counted. This is
            ``numpy.quantile(values, q, method="inverted_cdf")``, as far as the buckets tell.
        """
        q = check_fraction("q", q)
        from fractions import Fraction  # noqa: PLC0415 - imports decimal, which few need

        exact = Fraction(repr(q))
        rows = self.counts.reshape(-1, self.counts.shape[-1])
        bounds = np.full((2, len(rows)), np.nan)
        for i, cumulated in enumerate(np.cumsum(rows, axis=1)):
            count = int(cumulated[-1])
            if count:
                rank = max(1, -(-count * exact.numerator // exact.denominator))
                bucket = int(np.searchsorted(cumulated, np.uint64(rank)))
                bounds[:, i] = self.edges[bucket : bucket + 2]
        return self._shaped(bounds[0]), self._shaped(bounds[1])

    def cdf(self) -> npt.NDArray[np.float64]:
        """Return which fraction was below each upper edge ``edges[1:]``.

        Returns
        -------
        numpy.ndarray
            float64, the shape of `counts`; the last is 1. NaN where nothing was counted.
        """
        cumulated = np.cumsum(self.counts, axis=-1).astype(np.float64)
        count = cumulated[..., -1:]
        return np.divide(cumulated, count, out=np.full_like(cumulated, np.nan), where=count > 0)

    def mean_bounds(self) -> tuple[Any, Any]:
        """Bounds between which the mean lies, if all were at the lower or all at the upper edge of their bucket.

        Returns
        -------
        low, high : float, or numpy.ndarray of shape (n,)
            In base units; `high` is inf if the last bucket counted anything; NaN where nothing was counted.
        """
        return self._mean_at(self.edges[:-1]), self._mean_at(self.edges[1:])

    def _mean_at(self, values: npt.NDArray[np.float64]) -> Any:
        """Return the mean, if all in a bucket had its value; an empty one may have any, also inf."""
        counts = self.counts.astype(np.float64)
        with np.errstate(over="ignore"):  # a scale that no kernel has makes it inf
            sums = np.multiply(counts, values, out=np.zeros_like(counts), where=counts > 0).sum(axis=-1)
        return self._per_count(sums)

    @property
    def total(self) -> Any:
        """Sum of all that was counted, in base units: float, or float64 of shape (n,); None where no counter has it."""
        if self.raw_total is None:
            return None
        return self._shaped(np.asarray(self.stat.scale_array(self.raw_total)))

    @property
    def mean(self) -> Any:
        """Mean in base units, from the kernel's own sum; NaN where nothing was counted, None without such a sum."""
        total = self.total
        return None if total is None else self._per_count(np.asarray(total))

    def _per_count(self, sums: npt.NDArray[np.float64]) -> Any:
        count = self.count.astype(np.float64)
        return self._shaped(np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0))

    def _shaped(self, values: npt.NDArray[np.float64]) -> Any:
        return values.reshape(-1)[0].item() if self.counts.ndim == 1 else values

    def __repr__(self) -> str:
        files = "" if self.counts.ndim == 1 else f" of {len(self.counts)} files"
        count = sum(self.count.reshape(-1).tolist())
        return f"<Histogram {self.stat.name}{files}: {count} in {self.stat.size} buckets>"


def run_histogram(samples: Samples, name: str, sweep: int | None) -> Histogram:
    """Return what a histogram counted in a run, or by one sweep of it; see `Samples.histogram`."""
    stat = samples.stat(name)
    stat.bucket_edges()  # its error says why there are none
    if sweep is not None:
        sweep = check_integer("sweep", sweep, -len(samples), len(samples) - 1, error=IndexError)

    def counted(samples: Samples, name: str) -> npt.NDArray[np.uint64]:
        return (samples.total(name) if sweep is None else samples[name][sweep]).astype(np.uint64)

    total = None
    adder = name.removesuffix("_hist") + "_ns"
    groups = find_groups(samples.groups, name)
    adders = [group.places[adder][0] for group in groups if adder in group.places]
    scales = {(one.type, one.unit, one.base, one.exponent) for one in adders}
    if len(adders) == len(groups) and scales == {(StatType.CUMULATIVE, stat.unit, stat.base, stat.exponent)}:
        files = find_columns(samples.groups, name).tolist()
        total = counted(samples.restrict(groups, files), adder)
    return Histogram(stat, counted(samples, name), total)


def _whole_numbers(values: object, what: str) -> npt.NDArray[np.uint64]:
    array = np.asarray(values)
    if array.dtype == np.uint64:
        return array.copy()  # what the caller does to its own changes nothing here
    whole = array.dtype.kind in "iub"
    if not whole:  # numpy takes a list of small numbers and some above 2**63 for floats
        array = np.asarray(values, object)
        whole = all(isinstance(number, (int, np.integer)) for number in array.flat)
    if not whole or (array.size and not 0 <= int(array.min()) <= int(array.max()) < _MOST):
        raise TypeError(f"{what} must be whole numbers, none negative or above 2**64 - 1")
    return array.astype(np.uint64)


def _checked(
    operation: np.ufunc, a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64], what: str
) -> npt.NDArray[np.uint64]:
    result = operation(a, b)
    if operation is np.subtract and (b > a).any():
        raise ValueError(f"the {what} would be negative: it was subtracted from less")
    if operation is np.add and (result < a).any():
        raise ValueError(f"the {what} is more than a uint64 holds")
    return np.asarray(result, np.uint64)
