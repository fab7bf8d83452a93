"""Series: each statistic by itself, its changes, rates, resets and sums, in one pass over memory (``csrc/series.h``).

Internal: functions over raw values of several statistics of the same sweeps and files, uint64 arrays (T, n)
or (T, n, buckets), which may be views into rows. What they return is in one piece of memory. `changes` has them over
Samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvmstats_fast.stat import Stat

    Values = npt.NDArray[np.uint64]

#: Bytes of values that are worked on at once: with what is next and the results they fit the second cache.
TILE_BYTES = 1 << 17
_LINE = 64  # bytes of a cache line


class Sum(NamedTuple):
    """The sum of a statistic's changes, (n,) or (n, buckets), and whether one is more than a uint64 holds."""

    values: npt.NDArray[np.uint64] | npt.NDArray[np.int64]
    overflowed: bool


def gather(values: Sequence[Values], out: Sequence[Values] | None = None) -> Sequence[Values]:
    """Return copies of the values, each C-contiguous; in the arrays `out`, which are, or in new ones."""
    results = _room([one.shape for one in values], np.uint64) if out is None else out
    _work(lib.kvmstats_gather, values, results)
    return results


def deltas(stats: Sequence[Stat], values: Sequence[Values]) -> list[npt.NDArray[np.uint64] | npt.NDArray[np.int64]]:
    """Return the change from each sweep to the next: uint64 of what grows, else int64."""
    results = _room(_shapes(values), np.uint64)
    _work(lib.kvmstats_deltas, values, results, stats)
    return [_signed(stat, one) for stat, one in zip(stats, results, strict=True)]


def rates(
    stats: Sequence[Stat], values: Sequence[Values], time: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.float64]]:
    """Return the change per second in base units; NaN between two sweeps of the same ns."""
    results = _room(_shapes(values), np.float64)
    _work(lib.kvmstats_rates, values, results, stats, np.ascontiguousarray(time))
    return results


def resets(stats: Sequence[Stat], values: Sequence[Values]) -> list[npt.NDArray[np.bool_]]:
    """Return where a value that grows fell, (T - 1, n); a histogram is cleared as a whole."""
    results = _room([shape[:2] for shape in _shapes(values)], np.bool_)
    _work(lib.kvmstats_resets, values, results, stats)
    return results


def totals(stats: Sequence[Stat], values: Sequence[Values]) -> list[Sum]:
    """Return the sum of the changes over all sweeps."""
    results = _room([one.shape[1:] for one in values], np.uint64)
    overflowed = _work(lib.kvmstats_totals, values, results, stats)
    return [Sum(_signed(stat, one), over) for stat, one, over in zip(stats, results, overflowed, strict=True)]


def _shapes(values: Sequence[Values]) -> list[tuple[int, ...]]:
    return [(max(len(one) - 1, 0), *one.shape[1:]) for one in values]


def _room(shapes: Sequence[tuple[int, ...]], dtype: type[np.generic]) -> list[npt.NDArray[Any]]:
    """Return arrays that lie one behind the other, each in cache lines of its own.

    The system gives memory by the page, and clears each: large pages, for which many arrays are too small, cost less.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    room = [-(-size // _LINE) * _LINE for size in sizes]
    memory = np.empty(sum(room), dtype)
    starts = np.cumsum([0, *room])
    return [
        memory[start : start + size].reshape(shape) for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def _signed(stat: Stat, values: Values) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
    return values if stat.grows else values.view(np.int64)


def _work(
    function: Callable[[Any], int],
    values: Sequence[Values],
    results: Sequence[npt.NDArray[Any]],
    stats: Sequence[Stat] | None = None,
    time: npt.NDArray[np.int64] | None = None,
) -> list[bool]:
    """Call a function of ``csrc/series.h``; return what it sets `overflowed` to."""
    if not values:
        return []
    values = [_in_steps(one) for one in values]
    series = ffi.new("struct kvmstats_series[]", len(values))
    for i, (one, out) in enumerate(zip(values, results, strict=True)):
        entry = series[i]
        entry.values, entry.out = _address("uint64_t *", one), _address("void *", out)
        entry.sweep_step, entry.file_step = one.strides[0] // 8, one.strides[1] // 8
        entry.width = one.shape[2] if one.ndim == 3 else 1
        if stats is not None:
            entry.grows = stats[i].grows
            entry.divide, entry.multiply = _scale(stats[i])
    table = ffi.new("struct kvmstats_table *")
    table.series, table.num_series = series, len(values)
    table.sweeps, table.files = values[0].shape[:2]
    table.tile = max(TILE_BYTES // _bytes_per_file(values), 1)
    table.time = ffi.NULL if time is None else _address("int64_t *", time)
    if function(table):
        raise MemoryError("the values are more than there are addresses")
    return [bool(entry.overflowed) for entry in series]


def _scale(stat: Stat) -> tuple[float, float]:
    """Return what to divide and to multiply rates by: 10**9 is exact as a float, 10**-9 is not."""
    if stat.is_histogram:
        return 1.0, 1.0
    return (stat.float_factor, 1.0) if stat.exponent < 0 else (1.0, stat.float_factor)


def _in_steps(values: Values) -> Values:
    """Return values that C can walk over, or a copy: aligned, forward, and each file's in one piece."""
    in_one_piece = values.ndim == 2 or values.strides[2] == values.itemsize
    if in_one_piece and values.flags.aligned and min(values.strides) >= 0:
        return values
    return np.require(values, requirements=["C", "A"])


def _bytes_per_file(values: Sequence[Values]) -> int:
    """Return how many bytes a file's values take of a cache, at most; those of one row share its lines."""
    alone, shared, row = 0, 0, 0
    for one in values:
        size = one.itemsize * (one.shape[2] if one.ndim == 3 else 1)
        if one.strides[1] > size:
            shared += max(size, _LINE)
            row = max(row, one.strides[1])
        else:
            alone += size
    return alone + min(shared, row)


def _address(kind: str, array: npt.NDArray[Any]) -> Any:
    return ffi.cast(kind, array.__array_interface__["data"][0])
