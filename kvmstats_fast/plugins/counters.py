"""Counters of a VM for tests: of the whole test, of blocks of it, and of the measured rounds of a benchmark."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmstats_fast.analysis.suites import EXTRA_INFO
from kvmstats_fast.errors import unknown_stat
from kvmstats_fast.plugins.rounds import RoundTimer
from kvmstats_fast.sampling.measure import measure
from kvmstats_fast.sampling.measured import Measured
from kvmstats_fast.sampling.plan import Plan
from kvmstats_fast.sampling.readings import Source, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmstats_fast.sampling.plan import StatsFiles


class Counters:
    """What the fixture ``kvmstats`` gives: the counters of a VM.

    Attributes
    ----------
    files : iterable of StatsFile
        What the fixture ``kvmstats_files`` gives.
    machine : dict
        Where they are from: host, kernel, and the fingerprints of what the files list.
    """

    def __init__(self, files: StatsFiles) -> None:
        self.files = files
        self._plan = Plan(files, None, threads=1)
        self._source = Source(self._plan)
        self._measures: dict[object, measure] = {}
        origin = self._plan.origin
        schemas = sorted({f"{group.kind} {group.schema.fingerprint}" for group in self._plan.groups})
        self.machine: dict[str, Any] = {"host": origin.host, "kernel": origin.kernel, "schemas": schemas}

    def measure(self, stats: str | Iterable[str] | None = None) -> measure:
        """Return a `kvmstats_fast.measure` of these files, made once for the same `stats`."""
        key = stats if stats is None or isinstance(stats, str) else tuple(stats)
        if key not in self._measures:
            self._measures[key] = measure(self.files, key)
        return self._measures[key]

    @contextmanager
    def watch(self, benchmark: Any, timer: object) -> Iterator[Watched]:
        """Count a block, and the measured rounds of a benchmark in it; nothing is told of a block that raised."""
        watched = Watched(Tally(self._plan, spreads=True))
        rounds = timer if isinstance(timer, RoundTimer) else None
        if rounds is not None:
            rounds.follow(benchmark, self._source, watched.rounds)
        whole = Measured(self._source)
        try:
            yield watched
        except BaseException as error:
            whole.close(error)
            raise
        finally:
            if rounds is not None:
                rounds.finish()
        whole.close(None)
        watched.finish(whole, benchmark)


class Watched:
    """What was counted in a test.

    Attributes
    ----------
    rounds : Tally
        What each measured round counted.
    errors : list of str
        Files that could not be read.
    """

    def __init__(self, rounds: Tally) -> None:
        self.rounds = rounds
        self.errors: list[str] = []
        self._test: dict[str, int] = {}
        self._iterations = 0

    def finish(self, whole: Measured, benchmark: Any) -> None:
        """Take what the block and its rounds counted; a benchmark gets it into its ``extra_info``."""
        self._test = whole.counts
        samples = whole.samples
        self.errors = [f"{samples.files[error.file].id}: {error.error}" for error in samples.errors]
        if not self.rounds.pairs:
            return
        self._iterations = benchmark.stats.iterations
        spreads = self.rounds.spreads.items()
        benchmark.extra_info[EXTRA_INFO] = {
            "rounds": self.rounds.pairs,
            "iterations": self._iterations,
            "counts": self.rounds.counts,
            "per_iteration": self._per("iteration"),
            # Of the rounds' own values per iteration: what a comparison needs for an interval.
            "stddev": {name: spread / self._iterations for name, spread in spreads},
        }

    def knows(self, per: str) -> bool:
        """Whether there are counts per this; a benchmark that is disabled has no rounds, and so no iterations."""
        return per == "test" or self.rounds.pairs > 0

    def find(self, name: str, per: str) -> float:
        """Return how much a statistic counted; KeyError if no file has it."""
        counts = self._per(per)
        if name not in counts:
            raise unknown_stat(name, counts, "what these files count")
        return counts[name]

    def _per(self, per: str) -> dict[str, float]:
        if per == "test":
            return dict(self._test)
        parts = self.rounds.pairs * (self._iterations if per == "iteration" else 1)
        return {name: count / parts for name, count in self.rounds.counts.items()}

    def describe(self, per: str) -> str:
        """Say what counts are per."""
        if per == "test":
            return per
        return f"{per}, the mean of {self.rounds.pairs} rounds of {self._iterations} iterations"

    def to_dict(self) -> dict[str, Any]:
        """Return what counted, for JSON: per iteration of a benchmark, or else per test."""
        per = "iteration" if self.rounds.pairs else "test"
        return {"per": per, "counts": {name: count for name, count in self._per(per).items() if count}}
