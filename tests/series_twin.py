"""Changes, rates, resets and sums in plain numpy: what csrc/series.c must give to the last bit."""

import numpy as np


def find_resets(stat, values):
    """Where a statistic that grows fell, (sweeps - 1, files); a histogram is cleared as a whole."""
    fell = values[1:] < values[:-1]
    fell = fell.any(axis=2) if fell.ndim == 3 else fell
    return fell if stat.grows else np.zeros_like(fell)


def delta(stat, values):
    """The change from each sweep to the next: uint64 of what grows, else int64."""
    fell = find_resets(stat, values)
    change = values[1:] - values[:-1]
    np.copyto(change, values[1:], where=fell if fell.ndim == change.ndim else fell[..., None])
    return change if stat.grows else change.view(np.int64)


def rate(stat, values, time):
    """The change per second in base units; NaN between two sweeps of the same ns."""
    seconds = np.diff(time) / 1e9
    seconds[seconds == 0] = np.nan
    factor = 1.0 if stat.is_histogram else stat.float_factor
    if stat.exponent < 0:
        seconds, factor = seconds * factor, 1.0  # 10**9 is exact as a float, 10**-9 is not
    return delta(stat, values) / seconds.reshape(-1, *[1] * (values.ndim - 1)) * factor


def total(stat, values):
    """The sum of the changes modulo 2**64, and whether one of what grows is 2**64 or more."""
    change = delta(stat, values)
    exact = change.astype(object).sum(axis=0)
    return change.sum(axis=0, dtype=change.dtype), bool(stat.grows and (exact >= 2**64).any())
