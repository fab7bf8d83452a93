"""Relay: one schedule, kept by one run after another, each of files of its own."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmstats_fast._resource import Closing
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.run import Run
from kvmstats_fast.sampling.schedule import FOREVER
from kvmstats_fast.sampling.stream import ChunkReader

if TYPE_CHECKING:
    from kvmstats_fast.sampling.plan import LiveRow
    from kvmstats_fast.sampling.schedule import Schedule


class _Leg:
    """One of the runs, and where it is read."""

    def __init__(self, live: LiveRow, schedule: Schedule, chunk: int, depth: int) -> None:
        self.run = Run(live, schedule, chunk, depth, strict=False)
        self.chunks = ChunkReader(self.run)
        self._last: Samples | None = None

    def put_before(self, samples: Samples) -> Samples:
        """Return a chunk with the last sweep of the chunk before it."""
        last, self._last = self._last, samples[-1:]
        self._last.missed = self._last.overruns = 0  # they were counted with the chunk that it was a part of
        return samples if last is None else Samples.concatenate([last, samples])


class Relay(Closing):
    """Samples on one schedule while the files change.

    A run ends before the next one starts, but the next one has taken its memory by then: as a rule a change takes less
    than a tick at 1 kHz. What it does take is missed, and counted by the run that comes.

    Parameters
    ----------
    schedule : Schedule
    chunk : int or None
        Sweeps in each Samples; None: as many as `Schedule.choose_chunk` says.
    depth : int
        Chunks of room for each run.
    overlap : bool
        Whether a chunk begins with the last sweep of the one before it, if that is of the same run.

    Attributes
    ----------
    idle : int
        Ticks that passed while there was nothing to sample. They are neither taken nor missed.
    """

    def __init__(self, schedule: Schedule, chunk: int | None, depth: int, *, overlap: bool = False) -> None:
        self._schedule = schedule
        self._overlap = overlap
        self._chunk, self._depth = chunk, depth
        self._start = 0
        self._next_tick = 0  # the first that no run has had
        self._is_idle = False  # whether no run has those that are due
        self._legs: list[_Leg] = []  # those that have not been read to their end; all but the last have ended
        self._read = (0, 0)  # ticks missed and overruns of those that have
        self._rest: Samples | None = None  # ticks that a run missed after its last sweep
        self._is_stopped = False
        self.idle = 0

    def hand_over(self, live: LiveRow | None) -> None:
        """Sample these files from now on, or none; the first call begins the schedule.

        Raises
        ------
        MemoryError
            If there is no room for their samples; those that were sampled are sampled on.
        KvmStatsError
            If the thread cannot be started; then none is sampled.
        """
        leg = None
        if live is not None:
            chunk = self._chunk or self._schedule.choose_chunk(live.plan.sweep_bytes)
            leg = _Leg(live, self._schedule, chunk, self._depth)
        self._start = self._start or time.monotonic_ns()
        if self._legs:
            self._end(self._legs[-1])
        if leg is None:
            self._is_idle = True
            return
        self._count_idle()
        leg.run.resume(self._start, self._next_tick)
        self._legs.append(leg)  # before it starts, so that whatever comes in between finds it to end
        if self._is_stopped:  # what stops it from here on finds it
            leg.run.stop()
        try:
            leg.run.__enter__()
        except BaseException:
            leg.run.close()
            self._legs.remove(leg)
            self._is_idle = True
            raise
        self._is_idle = False

    def _end(self, leg: _Leg) -> None:
        """End a run and wait for that; ticks that passed since one that has ended by itself are idle."""
        if leg.run.is_due(FOREVER, 0):
            self._is_idle = True
        leg.run.stop()
        leg.run.wait()
        self._next_tick = max(self._next_tick, leg.run.next_tick)

    def _count_idle(self) -> None:
        """Count the ticks that were due since there was something to sample."""
        interval = self._schedule.interval_ns
        if self._is_idle and interval:
            due = min(-((self._start - time.monotonic_ns()) // interval), self._schedule.ticks)
            passed = max(due - self._next_tick, 0)
            self.idle += passed
            self._next_tick += passed

    def take(self, timeout: float) -> Samples | None:
        """Return the next chunk with a sweep; None if there is none within `timeout` seconds, or none will come."""
        while self._legs:
            leg = self._legs[0]
            if not leg.chunks.is_due(timeout):
                return None
            samples = leg.chunks.take()
            if samples is None:
                self._retire(leg)
                continue
            if self._rest is not None:
                samples.missed += self._rest.missed
                samples.overruns += self._rest.overruns
                self._rest = None
            if len(samples):
                return leg.put_before(samples) if self._overlap else samples
            if samples.missed:
                self._rest = samples
        return None

    def take_rest(self) -> Samples | None:
        """Return Samples without a sweep that have the ticks which no chunk has that was given, if there are any."""
        rest, self._rest = self._rest, None
        return rest

    def _retire(self, leg: _Leg) -> None:
        """Let go of a run that was read to its end."""
        if leg is self._legs[-1]:
            self._end(leg)
        missed, overruns = leg.run.totals
        leg.run.close()
        self._legs.remove(leg)
        self._read = self._read[0] + missed, self._read[1] + overruns

    @property
    def is_sampling(self) -> bool:
        """Whether there are runs that have not been read to their end."""
        return bool(self._legs)

    @property
    def is_over(self) -> bool:
        """Whether no tick is left."""
        self._count_idle()
        end = self.end
        return self._next_tick >= self._schedule.ticks or (end is not None and time.monotonic() > end)

    @property
    def end(self) -> float | None:
        """When the schedule ends, by ``time.monotonic()``, as far as that is known."""
        schedule = self._schedule
        if schedule.interval_ns and schedule.is_bounded:
            return (self._start + (schedule.ticks - 1) * schedule.interval_ns) / 1e9
        return (self._start + schedule.duration_ns) / 1e9 if schedule.duration_ns else None

    @property
    def totals(self) -> tuple[int, int]:
        """Ticks missed, and those of them for lack of room, up to now."""
        totals = [self._read, *(leg.run.totals for leg in self._legs)]
        return sum(missed for missed, _ in totals), sum(overruns for _, overruns in totals)

    def stop(self) -> None:
        """End the schedule; what was sampled can still be taken. From any thread."""
        self._is_stopped = True
        for leg in list(self._legs):
            leg.run.stop()

    def close(self) -> None:
        """End all runs."""
        with ExitStack() as closing:
            for leg in self._legs:
                closing.callback(leg.run.close)
