"""Readings of files, one sweep each, and what was counted between two, or between many pairs."""

from __future__ import annotations

import math
import threading
from time import monotonic_ns
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmstats_fast._kvmstats import lib
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.plan import LiveRow, Plan
from kvmstats_fast.sampling.wall_clock import WallClock

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.samples import SampleError

# The hot calls: looked up once.
_sweep, _wall_offset = lib.kvmstats_sweep, lib.kvmstats_wall_offset
_LOW_HALF = (1 << 32) - 1
#: Pairs of readings that are kept before they are added up.
_PENDING = 64


class Reading(NamedTuple):
    """Every file read once: one sweep, with the values of each group of files, (1, files, words)."""

    time: int
    sweep_ns: int
    wall_offset: int
    values: tuple[npt.NDArray[np.uint64], ...]
    errors: tuple[SampleError, ...]


class Source(threading.local):
    """Reads the files of a plan, into memory that each thread has for itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._live = LiveRow(plan)
        self._values = [group.values for group in self._live.groups]

    def read(self) -> Reading:
        """Return a reading; raises what is wrong if no file can be read."""
        live, offset = self._live, _wall_offset()
        start = monotonic_ns()
        status = _sweep(live.c)
        sweep_ns = monotonic_ns() - start
        if status:
            live.check(status, strict=False)
        errors = live.find_errors(0, 1) if status else ()
        return Reading(start, sweep_ns, offset, tuple([values.copy() for values in self._values]), errors)


class Span:
    """Two readings, and what follows from them."""

    def __init__(self, plan: Plan, first: Reading, last: Reading) -> None:
        if first.errors:
            last = _leave_out(plan, last, first.errors)
        self._plan, self._readings = plan, (first, last)
        self._samples: Samples | None = None
        self.remarks: list[str] = []
        self._offset = WallClock(first.wall_offset, self.remarks).follow(last.wall_offset)

    @property
    def elapsed(self) -> float:
        """Seconds from one reading to the other."""
        first, last = self._readings
        return (last.time - first.time) / 1e9

    @property
    def cost(self) -> float:
        """Seconds that the readings took."""
        return sum(reading.sweep_ns for reading in self._readings) / 1e9

    @property
    def samples(self) -> Samples:
        """The readings, as Samples."""
        if self._samples is None:
            offsets = (self._readings[0].wall_offset, self._offset)
            self._samples = Samples.concatenate(map(self._one_sweep, range(2), self._readings, offsets))
        return self._samples

    def _one_sweep(self, tick: int, reading: Reading, wall_offset: int) -> Samples:
        pairs = zip(self._plan.groups, reading.values, strict=True)
        groups = tuple(group.with_values(values) for group, values in pairs)
        files, host, kernel = self._plan.origin
        return Samples(
            groups,
            files,
            np.array([reading.time], np.int64),
            np.array([reading.sweep_ns], np.int64),
            np.array([tick], np.uint64),
            wall_offset=wall_offset,
            errors=reading.errors,
            host=host,
            kernel=kernel,
        )

    def count(self) -> dict[str, int]:
        """Return how much each statistic counted."""
        tally = Tally(self._plan)
        self.add_to(tally)
        return tally.counts

    def add_to(self, tally: Tally) -> None:
        """Count these two readings with others."""
        tally.add(*self._readings)


class Tally:
    """Adds up what was counted between pairs of readings of one plan.

    All words of the files of a group are added at once, and of many pairs: a pass for each statistic of each pair would
    take a hundred times as long.

    Parameters
    ----------
    plan : Plan
    spreads : bool
        Whether to keep what `spreads` needs, too.

    Attributes
    ----------
    pairs : int
        How many there were.
    """

    def __init__(self, plan: Plan, *, spreads: bool = False) -> None:
        self._plan = plan
        self._keeps_spreads = spreads
        self.pairs = 0
        self._pending: list[tuple[Reading, Reading]] = []
        self._totals = [[0] * group.values.shape[2] for group in plan.groups]
        # Of the differences from the first pair: squares of large counts leave floats no room for small differences.
        self._origins: list[npt.NDArray[np.float64]] = []
        self._sums: list[npt.NDArray[np.float64]] = []
        self._squares: list[npt.NDArray[np.float64]] = []

    def add(self, first: Reading, last: Reading) -> None:
        """Count what happened between two readings."""
        self.pairs += 1
        self._pending.append((first, last))
        if len(self._pending) == _PENDING:
            self._add_up()

    def _add_up(self) -> None:
        pairs, self._pending = self._pending, []
        for place in range(len(self._plan.groups) if pairs else 0):
            before, after = (np.stack([pair[side].values[place][0] for pair in pairs]) for side in range(2))
            change = np.where(after < before, after, after - before)  # (pairs, files, words); what fell was cleared
            # In halves, whose sums a uint64 holds.
            high, low = (change >> np.uint64(32)).sum(axis=1), (change & np.uint64(_LOW_HALF)).sum(axis=1)
            sums = zip(high.sum(axis=0).tolist(), low.sum(axis=0).tolist(), self._totals[place], strict=True)
            self._totals[place] = [(above << 32) + below + before for above, below, before in sums]
            if self._keeps_spreads:
                self._add_squares(place, high * 2.0**32 + low)

    def _add_squares(self, place: int, counts: npt.NDArray[np.float64]) -> None:
        if len(self._origins) == place:
            self._origins.append(counts[0])
            self._sums.append(np.zeros_like(counts[0]))
            self._squares.append(np.zeros_like(counts[0]))
        counts = counts - self._origins[place]
        self._sums[place] += counts.sum(axis=0)
        self._squares[place] += (counts**2).sum(axis=0)

    @property
    def counts(self) -> dict[str, int]:
        """How much each cumulative statistic of one value counted in all pairs; of any kernel's files."""
        self._add_up()
        counts: dict[str, int] = {}
        for name, place, word in self._plan.counters:
            counts[name] = counts.get(name, 0) + self._totals[place][word]
        return counts

    @property
    def spreads(self) -> dict[str, float]:
        """The standard deviation of what each counted from pair to pair; 0 of one pair."""
        self._add_up()
        variances: dict[str, float] = {}
        for name, place, word in self._plan.counters if self.pairs else ():
            mean = float(self._sums[place][word]) / self.pairs
            variance = max(float(self._squares[place][word]) / self.pairs - mean * mean, 0.0)
            variances[name] = variances.get(name, 0.0) + variance * self.pairs / max(self.pairs - 1, 1)
        return {name: math.sqrt(variance) for name, variance in variances.items()}


def _leave_out(plan: Plan, reading: Reading, errors: tuple[SampleError, ...]) -> Reading:
    """Return the reading without files that could not be read before: of these there is no change to tell."""
    failed = [error.file for error in errors]
    for group, values in zip(plan.groups, reading.values, strict=True):
        values[:, np.isin(group.columns, failed)] = 0
    others = tuple(error for error in reading.errors if error.file not in failed)
    return reading._replace(errors=errors + others)
