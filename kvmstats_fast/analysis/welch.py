"""Welch: the confidence interval of a ratio of two means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Spread(NamedTuple):
    """How much values differ: their variance by the square of their mean, NaN of fewer than two; and how many."""

    square: float
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return that of the values that are not NaN."""
        known = np.array([value for value in values if not math.isnan(value)])
        if known.size < 2:
            return cls(math.nan, known.size)
        return cls(float(known.var(ddof=1) / known.mean() ** 2), known.size)


class _Run(Protocol):
    whole: float


class Welch:
    """Makes the interval of a ratio of two means, by Welch's t-test on its logarithm.

    Parameters
    ----------
    confidence : float
    """

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence

    def __call__(self, a: Sequence[_Run], b: Sequence[_Run], log_ratio: float) -> tuple[float, float]:
        """Return that of the means of runs."""
        spread_a, spread_b = (Spread.of(run.whole for run in runs) for runs in (a, b))
        return self.between(spread_a, spread_b, log_ratio)

    def between(self, a: Spread, b: Spread, log_ratio: float) -> tuple[float, float]:
        """Return that of means of values that spread so; NaN where neither side has two values."""
        # One value has no spread of its own.
        square_a = b.square if a.number == 1 else a.square
        square_b = a.square if b.number == 1 else b.square
        error_a, error_b = square_a / a.number, square_b / b.number
        if not error_a + error_b > 0:
            return (math.exp(log_ratio),) * 2 if error_a + error_b == 0 else (math.nan, math.nan)
        if min(a.number, b.number) == 1:
            freedom = float(max(a.number, b.number) - 1)
        else:
            freedom = (error_a + error_b) ** 2 / (error_a**2 / (a.number - 1) + error_b**2 / (b.number - 1))
        half = quantile_of_t((1 + self._confidence) / 2, freedom) * math.sqrt(error_a + error_b)
        return math.exp(log_ratio - half), math.exp(log_ratio + half)


def quantile_of_t(p: float, freedom: float) -> float:
    """Return a quantile, at least the median, of Student's t with 1 degree of freedom or more.

    With t = sqrt(freedom) tan(x) the density is that of cos(x)**(freedom - 1), which has no tail to cut off.
    """
    x = np.linspace(0.0, min(math.pi / 2, 40 / math.sqrt(freedom)), 1 << 16)
    density = np.cos(x) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * p - 1) * area[-1], area, x)))
