"""Stream: Samples after Samples, taken in the background."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvmstats_fast._arguments import check_integer
from kvmstats_fast._resource import Unique
from kvmstats_fast.sampling.run import Run, first_error

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.plan import LiveRow
    from kvmstats_fast.sampling.schedule import Schedule


class ChunkReader:
    """Reads the chunks of a run that has been started, in order."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._number = 0
        self._reported = [0, 0]

    def is_due(self, timeout: float) -> bool:
        """Wait until `take` need not wait, but no longer than `timeout` seconds; return whether that is so."""
        return self._run.is_due(self._number, timeout)

    def take(self) -> Samples | None:
        """Return the next chunk, None at the end. The last one may have no sweep, but ticks that were missed."""
        run = self._run
        is_chunk = run.wait(self._number)
        # Ticks missed after the last sweep; and a run that took no sweep still says of which files.
        rest = [total - reported for total, reported in zip(run.totals, self._reported, strict=True)]
        if not is_chunk and self._number and not any(rest):
            return None
        samples = run.copy_chunk(self._number)
        if not is_chunk:
            samples.missed, samples.overruns = rest
        run.warn()  # before the chunk is given back: where warnings are errors, the next call returns it
        self._number += 1
        run.release(self._number)
        self._reported = [self._reported[0] + samples.missed, self._reported[1] + samples.overruns]
        return samples


class Turn:
    """The turn to read, which one thread has at a time: a ``with`` block, in which another one gets RuntimeError."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._free = [None]  # pop() is atomic, and no fork finds it half done

    def __enter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            what = self._what
            raise RuntimeError(f"another thread is reading this {what}; a {what} has one reader") from None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._free.append(None)


class Stream(Unique):
    """An iterator over the Samples of a run in the background; created by `Sampler.stream`, used with ``with``.

    Attributes
    ----------
    missed, overruns : int
        Ticks missed so far, and how many of them because the reader had left no room.
    """

    def __init__(self, live: LiveRow, schedule: Schedule, chunk: int | None, depth: int, *, strict: bool) -> None:
        chunk = schedule.choose_chunk(live.plan.sweep_bytes) if chunk is None else check_integer("chunk", chunk, 1)
        depth = check_integer("depth", depth, 1)
        self._make = partial(Run, live, schedule, chunk, depth, strict=strict)
        self._run: Run | None = None
        self._strict = strict
        self._error: Exception | None = None
        self._turn = Turn("stream")
        self.missed = self.overruns = 0

    def __enter__(self) -> Self:
        if self._run is not None:
            raise RuntimeError("a stream runs once; ask the Sampler for another one")
        run = self._make()
        run.__enter__()
        self._chunks = ChunkReader(run)
        self._run = run
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run = self._running()
        try:
            run.close()
        finally:
            self.missed, self.overruns = run.totals

    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("a stream starts where its `with` block begins")
        return self._run

    def stop(self) -> None:
        """Stop the run, from any thread; the samples taken so far can still be read."""
        self._running().stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Samples:
        run = self._running()
        with self._turn:
            if self._error is not None:
                raise self._error
            samples = self._chunks.take()
            if samples is None:
                raise StopIteration
            self.missed, self.overruns = run.totals
            if self._strict and samples.errors:
                self._error = first_error(samples)
            return samples
