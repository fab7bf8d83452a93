"""How much of the time a boolean statistic was 1, from how often it was seen to be 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmstats_fast._arguments import check_fraction
from kvmstats_fast.abi import StatType, StatUnit
from kvmstats_fast.groups import find_columns
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

    Values = npt.NDArray[np.float64]


class DutyCycle(NamedTuple):
    """How much of the time a boolean statistic was 1.

    Attributes
    ----------
    fraction, low, high : numpy.ndarray
        float64 (n,): the fraction of sweeps that read 1, and the bounds of its confidence interval. NaN for a file
        without sweeps.
    """

    fraction: Values
    low: Values
    high: Values


def duty_cycle(samples: Samples, name: str, confidence: float = 0.95) -> DutyCycle:
    """Return how much of the time a boolean was 1; see `Samples.duty_cycle`."""
    confidence = check_fraction("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    values = samples[name]
    most = int(values.max(initial=0))
    if why := _why_no_boolean(samples.stat(name), most):
        raise ValueError(f"{name} is not a boolean: {why}")
    lives = last_sweeps(samples) + 1
    from statistics import NormalDist  # noqa: PLC0415 - imports half of the library

    z = NormalDist().inv_cdf((1 + confidence) / 2)
    files = find_columns(samples.groups, name).tolist()
    rows = [_wilson(column[: lives[file]], z) for column, file in zip(values.T.astype(np.float64), files, strict=True)]
    return DutyCycle(*np.array(rows, np.float64).reshape(-1, 3).T)


def _why_no_boolean(stat: Stat, most: int) -> str:
    """Return why a statistic, of which `most` is the highest value, has no duty cycle; empty if it has one.

    Kernels before 6.0 have no unit for booleans ("kvm: stats: tell userspace which values are boolean"): ``guest_mode``
    and ``blocking`` are instant values without a unit there.
    """
    if stat.shape:
        return f"it has {stat.size} values"
    if stat.unit != StatUnit.BOOLEAN:
        if stat.unit != StatUnit.NONE or stat.exponent:
            return f"its unit is {stat.units()}"
        if stat.type != StatType.INSTANT:
            return f"it is {str(getattr(stat.type, 'name', stat.type)).lower()}, not instant"
    return f"{most} was read" if most > 1 else ""


def _wilson(sweeps: Values, z: float) -> tuple[float, float, float]:
    """Return the fraction of ones and Wilson's score interval, for the independent sweeps that these are worth."""
    n = float(len(sweeps))
    if not n:
        return (np.nan,) * 3
    p = float(sweeps.mean())
    if 0 < p < 1:
        deviation = sweeps - p
        correlation = float(deviation[1:] @ deviation[:-1]) / float(deviation @ deviation)
        # Of a chain of two states; anticorrelated sweeps are not credited with more than there were.
        n = max(n * (1 - correlation) / (1 + correlation), 1.0) if correlation > 0 else n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, max(middle - half, 0.0), min(middle + half, 1.0)
