"""Stream: Samples after Samples, taken in the background."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from kvmstats_fast._arguments import check_integer
from kvmstats_fast._resource import Unique
from kvmstats_fast.sampling.run import Run, attach_samples

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.plan import LiveRow
    from kvmstats_fast.sampling.schedule import Schedule


class Stream(Unique):
    """An iterator over the Samples of a run in the background: made by `Sampler.stream`, used with ``with``.

    Attributes
    ----------
    missed, overruns : int
        Ticks missed up to now, and those of them for which the reader had left no room.
    """

    def __init__(self, live: LiveRow, schedule: Schedule, chunk: int | None, depth: int, *, strict: bool) -> None:
        chunk = schedule.choose_chunk(live.plan.sweep_bytes) if chunk is None else check_integer("chunk", chunk, 1)
        depth = check_integer("depth", depth, 1)
        self._make = partial(Run, live, schedule, chunk, depth, strict=strict)
        self._run: Run | None = None
        self._strict = strict
        self._number = 0
        self._reported = [0, 0]
        self._error: Exception | None = None
        self._reader = threading.Lock()
        self.missed = self.overruns = 0

    def __enter__(self) -> Self:
        if self._run is not None:
            raise RuntimeError("a stream runs once; ask the Sampler for another one")
        self._run = self._make()
        self._run.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run = self._running()
        try:
            run.close()
        finally:
            self.missed, self.overruns = run.totals

    def __del__(self) -> None:
        run = getattr(self, "_run", None)
        if run is not None:
            run.close()  # nobody is left to read

    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("a stream starts where its `with` block begins")
        return self._run

    def stop(self) -> None:
        """End the run; the samples taken so far can still be read."""
        self._running().stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Samples:
        run = self._running()
        if not self._reader.acquire(blocking=False):
            raise RuntimeError("another thread is reading this stream; a stream has one reader")
        try:
            return self._take(run)
        finally:
            self._reader.release()

    def _take(self, run: Run) -> Samples:
        if self._error is not None:
            raise self._error
        if run.wait(self._number):
            samples = run.samples(self._number, copy=True)
            self._number += 1
            run.release(self._number)
        else:
            # Ticks missed after the last sweep; and a run that took no sweep still says of which files.
            rest = [total - reported for total, reported in zip(run.totals, self._reported, strict=True)]
            if not any(rest) and self._number:
                raise StopIteration
            samples = run.samples(self._number, copy=True)
            samples.missed, samples.overruns = rest
            self._number += 1
        self._reported = [self._reported[0] + samples.missed, self._reported[1] + samples.overruns]
        self.missed, self.overruns = run.totals
        if self._strict and samples.errors:
            self._error = attach_samples(samples)
        return samples
