"""The measured rounds of a pytest-benchmark test: what was counted in each, and in nothing around them."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmstats_fast.sampling.readings import Reading, Source, Tally


class RoundTimer:
    """A timer for ``benchmark(timer=...)`` that takes a reading beside each look at the clock.

    pytest-benchmark has no hook for a round. But it looks at its timer, which is the user's to choose, before and after
    each round, and it keeps the durations of the measured ones. So the two looks after which there is one more duration
    are those of a measured round; calibration, warm-up, setup and teardown are not. The readings lie outside the two
    looks, so that durations stay what they were.

    Parameters
    ----------
    clock : callable
        The timer that is asked for.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # pytest-benchmark prints the timer's name, and a JSON file has it.
        self.__name__ = getattr(clock, "__name__", repr(clock))
        self.__module__ = getattr(clock, "__module__", "") or "builtins"
        self._benchmark: Any = None

    def follow(self, benchmark: Any, source: Source, tally: Tally) -> None:
        """Count the rounds of a benchmark from here on."""
        self._benchmark, self._source, self._tally = benchmark, source, tally
        self._known = 0
        self._first: Reading | None = None
        self._last: Reading | None = None

    def finish(self) -> int:
        """Stop counting; return how many rounds were measured."""
        benchmark, self._benchmark = self._benchmark, None
        if benchmark.stats is None:  # it is disabled, or was not used
            return 0
        self._settle(benchmark)
        return self._known

    def _settle(self, benchmark: Any) -> None:
        """Count the last round if its duration was kept."""
        rounds = len(benchmark.stats.stats.data)
        if rounds > self._known and self._first is not None and self._last is not None:
            self._tally.add(self._first, self._last)
        self._known = rounds
        self._first = self._last = None

    def __call__(self) -> float:
        """Return the time."""
        now = self._clock()  # before anything else: it may be the end of a round
        benchmark = self._benchmark
        if benchmark is None or benchmark.stats is None:  # calibration
            return now
        if self._first is not None and self._last is None:
            self._last = self._source.read()
            return now
        self._settle(benchmark)
        self._first = self._source.read()
        return self._clock()


def load_clock(name: str) -> Callable[[], float]:
    """Return the clock that ``--benchmark-timer`` names."""
    module, _, attribute = name.rpartition(".")
    clock: Callable[[], float] = getattr(sys.modules.get(module) or import_module(module), attribute)
    return clock
