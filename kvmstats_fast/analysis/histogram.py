"""Histogram: bucket counts with their edges, and what follows from them about the values that were counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvmstats_fast._arguments import article, check_fraction, check_integer
from kvmstats_fast._text import format_html, format_si, format_table, plain_number
from kvmstats_fast.abi import StatType
from kvmstats_fast.changes import add_exactly
from kvmstats_fast.file_info import check_by, group_files
from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import row_key
from kvmstats_fast.groups import find_columns, find_groups
from kvmstats_fast.stat import Stat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples

_MOST = 1 << 64
#: What a table has: these quantiles, and rows for so many files.
_QUANTILES = (0.5, 0.9, 0.99)
_MOST_ROWS = 50
_ALIGN = "<>>>>>"


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a kernel histogram, of one file or of many.

    A bucket is a range: a value that it counted lay somewhere between its two edges. A quantile is therefore a pair of
    bounds, and so is a mean, unless the kernel also adds up the same values in a counter.

    Parameters
    ----------
    stat : Stat
        The histogram's descriptor.
    counts : array_like
        uint64, shape ``(buckets,)``, or ``(n, buckets)`` of n files.
    raw_total : array_like, optional
        The sum of all counted values, in the histogram's raw units (ns): uint64, shape ``()`` or ``(n,)``.
    files : sequence of FileInfo, optional
        The file of each row of the counts, or the files that are added up.

    Attributes
    ----------
    count : numpy.ndarray
        Number of counted values: uint64, shape ``()`` or ``(n,)``.

    Raises
    ------
    TypeError, ValueError
        If `stat` is not a histogram, or the counts or files do not fit it, or add up to 2**64 or more.

    Notes
    -----
    The edges are those of ``kvm_stats_linear_hist_update`` and ``kvm_stats_log_hist_update``
    (``include/linux/kvm_host.h``); the last bucket is open: it also counts all larger values.

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
    files: tuple[FileInfo, ...] = ()
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
        object.__setattr__(self, "files", tuple(self.files))
        if counts.ndim == 2 and self.files and len(self.files) != len(counts):
            raise ValueError(f"files are {len(self.files)}, the counts are of {len(counts)}")

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

    def by(self, by: str) -> dict[str, Histogram]:
        """Add up the files of each VM.

        Parameters
        ----------
        by : {"vm", "host", "vcpu"}
            Whether to return a histogram per VM, host, or vCPU.

        Returns
        -------
        dict
            Histograms of shape ``(buckets,)`` by label: ``h.by("vm")["web"].quantile(0.99)``.

        Raises
        ------
        TypeError, ValueError
            If `by` is none of these; if this histogram is of one file or already added up; or if `files` is not known.
        """
        check_by(by)
        self._check_has_files()
        if not self.files and len(self.counts):
            raise ValueError("it is not known whose these counts are: they were given without files")
        return {label: self[rows].sum() for label, rows in group_files(self.files, by).items()}

    def __getitem__(self, file: int | slice | Sequence[int]) -> Histogram:
        """Of one file, or of some."""
        self._check_has_files()
        rows = np.arange(len(self.counts))[file].reshape(-1).tolist() if self.files else ()
        total = self.raw_total
        return replace(
            self,
            counts=self.counts[file],
            raw_total=None if total is None else total[file],
            files=tuple(self.files[row] for row in rows),
        )

    def _check_has_files(self) -> None:
        if self.counts.ndim == 1:
            raise TypeError("this histogram is of one file, or summed up: it has buckets, see counts")

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
        return replace(self, counts=counts, raw_total=total, files=self.files if self.files == other.files else ())

    def quantile(self, q: float | Iterable[float]) -> tuple[Any, Any]:
        """Return bounds of a quantile: the value of rank ``ceil(q * count)`` lies in ``[low, high)``.

        Parameters
        ----------
        q : float, or sequence of float
            From 0 to 1, taken as the decimal that it prints as: 0.1 of 30 values is rank 3.

        Returns
        -------
        low, high : float, or numpy.ndarray of shape (n,); of several quantiles (q,) or (q, n)
            In base units; `high` is inf in the last bucket; both are NaN where nothing was counted. This is
            ``numpy.quantile(values, q, axis=0, method="inverted_cdf")``, as far as the buckets tell.
        """
        if np.ndim(cast("float", q)):
            bounds = [self._bounds(check_fraction("q", one)) for one in cast("Iterable[float]", q)]
            rows = np.array(bounds, np.float64).reshape(len(bounds), 2, self.count.size)
            low, high = rows[:, 0], rows[:, 1]
            return (low[:, 0], high[:, 0]) if self.counts.ndim == 1 else (low, high)
        low, high = self._bounds(check_fraction("q", q))
        return self._shaped(low), self._shaped(high)

    def _bounds(self, q: float) -> npt.NDArray[np.float64]:
        """Return the edges of the bucket that a quantile of each row lies in, (2, n)."""
        from fractions import Fraction  # noqa: PLC0415 - imports decimal, which few need

        exact = Fraction(repr(q))
        cumulated = np.cumsum(self.counts.reshape(-1, self.counts.shape[-1]), axis=1)
        counts = cumulated[:, -1].tolist()
        ranks = np.array([max(1, -(-count * exact.numerator // exact.denominator)) for count in counts], np.uint64)
        buckets = np.minimum(np.sum(cumulated < ranks[:, None], axis=1), self.stat.size - 1)
        bounds = np.stack([self.edges[buckets], self.edges[buckets + 1]])
        bounds[:, cumulated[:, -1] == 0] = np.nan
        return bounds

    def cdf(self) -> npt.NDArray[np.float64]:
        """Return the fraction of values below each upper edge ``edges[1:]``.

        Returns
        -------
        numpy.ndarray
            float64, the shape of `counts`; the last is 1. NaN where nothing was counted.
        """
        cumulated = np.cumsum(self.counts, axis=-1).astype(np.float64)
        count = cumulated[..., -1:]
        return np.divide(cumulated, count, out=np.full_like(cumulated, np.nan), where=count > 0)

    def mean_bounds(self) -> tuple[Any, Any]:
        """Return bounds of the mean: all values at the lower, or all at the upper edge of their bucket.

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
        """Sum of all counted values, in base units: float, or float64 of shape (n,); None if no counter has it."""
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

    def __str__(self) -> str:
        return format_table(self._rows(), _ALIGN)

    def _repr_html_(self) -> str:
        return format_html(self._rows(), _ALIGN)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return a table: a row for each file, but no more than a screen has, and one for all."""
        rows = [(self.stat.name, "count", "mean", *(f"{100 * q:g} %" for q in _QUANTILES))]
        shown: list[tuple[str, Histogram]] = []
        if self.counts.ndim == 2:
            labels = [str(info) for info in self.files] or [f"file {row}" for row in range(len(self.counts))]
            shown = [(label, self[row]) for row, label in enumerate(labels[:_MOST_ROWS])]
        more = len(self.counts) - len(shown) if shown else 0
        for label, one in [*shown, (f"all, also {more} more" if more else "all", self.sum())]:
            bounds = zip(*one.quantile(_QUANTILES), strict=True)
            between = (" to ".join(format_si(edge, self.units) for edge in pair) for pair in bounds)
            mean = "-" if one.mean is None else format_si(one.mean, self.units)
            rows.append((label, f"{one.count}", mean, *("-" if not one.count else cell for cell in between)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python, ready for ``json.dumps``.

        Returns
        -------
        dict
            ``name``, ``units``, ``edges`` (None: the last bucket is open), ``of`` (labels of `files`), ``counts``,
            ``count`` and ``mean``: for several files these three are lists, in the order of ``of``. An unknown mean is
            None.
        """
        mean = np.full(self.count.shape, np.nan) if self.mean is None else np.asarray(self.mean)
        means = [plain_number(one) for one in mean.reshape(-1).tolist()]
        return {
            "name": self.stat.name,
            "units": self.units,
            "edges": [plain_number(edge) for edge in self.edges.tolist()],
            "of": [str(info) for info in self.files],
            "counts": self.counts.tolist(),
            "count": self.count.tolist(),
            "mean": means[0] if self.counts.ndim == 1 else means,
        }

    def to_pandas(self) -> Any:
        """Return the counts as a ``pandas.DataFrame``: a row for each bucket.

        Returns
        -------
        pandas.DataFrame
            Indexed by intervals in base units, closed on the left. For several files a column for each, with the levels
            ``host``, ``vm`` and ``vcpu`` (-1: the VM itself); otherwise the column ``count``.
        """
        pd = need("pandas", "pandas")
        index = pd.IntervalIndex.from_breaks(self.edges, closed="left", name=self.stat.name)
        if self.counts.ndim == 1:
            return pd.DataFrame({"count": self.counts}, index=index)
        frame = pd.DataFrame(self.counts.T, index=index)
        if self.files:
            keys = [row_key(info) for info in self.files]
            frame.columns = pd.MultiIndex.from_tuples(keys, names=["host", "vm", "vcpu"])
        return frame


def run_histogram(samples: Samples, name: str, sweep: int | None) -> Histogram:
    """Return what a histogram counted in a run, or by one sweep of it; see `Samples.histogram`."""
    stat = samples.stat(name)
    stat.bucket_edges()  # its error says why there are none
    if sweep is not None:
        sweep = check_integer("sweep", sweep, -len(samples), len(samples) - 1, error=IndexError)

    def counted(samples: Samples, name: str) -> npt.NDArray[np.uint64]:
        return (samples.total(name) if sweep is None else samples[name][sweep]).astype(np.uint64)

    total = None
    adder = adder_of(name)
    groups = find_groups(samples.groups, name)
    adders = [group.places[adder][0] for group in groups if adder in group.places]
    if len(adders) == len(groups) and all(adds_up(one, stat) for one in adders):
        files = find_columns(samples.groups, name).tolist()
        total = counted(samples.restrict(groups, files), adder)
    return Histogram(stat, counted(samples, name), total, samples.columns(name))


def adder_of(name: str) -> str:
    """Return the name of the counter that adds up what a histogram counts, if the kernel has one."""
    return name.removesuffix("_hist") + "_ns"


def adds_up(adder: Stat, stat: Stat) -> bool:
    """Whether a counter adds up values in the raw units of a histogram."""
    scale = (adder.type, adder.unit, adder.base, adder.exponent)
    return scale == (StatType.CUMULATIVE, stat.unit, stat.base, stat.exponent)


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
