"""Changes of a statistic from sweep to sweep: differences, resets, rates and sums, in one pass over memory each.

Inner to the package: functions over arrays of raw values whose first axis is time. `Samples` has the public methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.groups import cut_rows, rows_per_block

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.stat import Stat

#: Changes that a sum over time holds at once, in sweeps.
TOTAL_ROWS = 1 << 14

_MOST = 1 << 64


def delta(values: npt.NDArray[np.uint64], *, grows: bool) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
    """Return the change from each sweep to the next: uint64 of what grows, else int64."""
    change = np.empty((max(len(values) - 1, 0), *values.shape[1:]), np.uint64)
    for rows in cut_rows(len(change), rows_per_block(values)):
        _subtract(values, rows, change[rows], grows=grows)
    return change if grows else change.view(np.int64)


def rate(values: npt.NDArray[np.uint64], time: npt.NDArray[np.int64], stat: Stat) -> npt.NDArray[np.float64]:
    """Return the change per second in base units; NaN between two sweeps of the same ns."""
    seconds = np.diff(time) / 1e9
    seconds[seconds == 0] = np.nan
    factor = 1.0 if stat.is_histogram else stat.float_factor
    if stat.exponent < 0:
        seconds, factor = seconds * factor, 1.0  # 10**9 is exact as a float, 10**-9 is not
    seconds = seconds.reshape(-1, *[1] * (values.ndim - 1))
    result = np.empty((len(seconds), *values.shape[1:]))
    room = np.empty((min(len(result), rows_per_block(values)), *values.shape[1:]), np.uint64)
    for rows in cut_rows(len(result), rows_per_block(values)):
        part = result[rows]
        change = room[: len(part)]
        _subtract(values, rows, change, grows=stat.grows)
        np.divide(change if stat.grows else change.view(np.int64), seconds[rows], out=part)
        if factor != 1:
            part *= factor
    return result


def find_resets(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return where a statistic that grows fell, (sweeps - 1, files); a histogram is cleared as a whole."""
    return _fell(values[:-1], values[1:])


def add_exactly(values: npt.NDArray[np.uint64], axis: int, what: str) -> npt.NDArray[np.uint64]:
    """Return the sum along an axis; ValueError, which names `what` is added, if a uint64 does not hold it."""
    result = np.asarray(np.add.reduce(values, axis=axis, dtype=np.uint64))
    # Floats show what may have wrapped round; only then are Python's integers worth their time.
    if (np.add.reduce(values, axis=axis, dtype=np.float64) > _MOST * 0.99).any():
        exact = np.add.reduce(values.astype(object), axis=axis)
        if not np.array_equal(exact, result.astype(object)):
            raise ValueError(f"{what} add up to more than a uint64 holds")
    return result


def _fell(before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    fell: npt.NDArray[np.bool_] = after < before
    return np.any(fell, axis=2) if fell.ndim == 3 else fell


def _subtract(values: npt.NDArray[np.uint64], rows: slice, out: npt.NDArray[np.uint64], *, grows: bool) -> None:
    """Write the changes of some rows; where what grows fell, somebody cleared it, and its value is the change."""
    both = np.ascontiguousarray(values[rows.start : rows.stop + 1])  # it is read twice: better near than far apart
    before, after = both[:-1], both[1:]
    np.subtract(after, before, out=out)
    if grows:
        fell = _fell(before, after)
        if fell.any():
            np.copyto(out, after, where=fell if fell.ndim == out.ndim else fell[..., None])
