"""Run: sweeps on a schedule in a thread of their own, and how it ends: by itself, by Ctrl-C, in a forked child."""

from __future__ import annotations

import atexit
import itertools
import os
import select
import signal
import time
from _thread import allocate_lock, start_new_thread
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet, WeakValueDictionary

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Closing, Fd
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.sampling.memory import check_memory
from kvmstats_fast.sampling.plan import IN_USE, Rows
from kvmstats_fast.sampling.schedule import FOREVER, HYBRID_SPIN_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.plan import LiveRow
    from kvmstats_fast.sampling.schedule import Schedule

#: How long a wait in Python may delay Ctrl-C or the end of a run, in seconds.
_POLL = 0.05


class End:
    """An event whose waiter may be interrupted anywhere: each step that matters is a single call in C.

    After a Ctrl-C between two steps of threading.Event's, its condition is released without having been acquired
    (RuntimeError), or stays acquired, and the other thread hangs.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake up those that wait; once."""
        self._is_set = True
        self._lock.release()

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._is_set

    def wait(self, seconds: float) -> None:
        """Wait for at most so long."""
        if not self._is_set and self._lock.acquire(timeout=seconds):
            self._lock.release()


class Ending(Protocol):
    """Work in another thread, with an end to wait for."""

    ended: End


def wait_for_end(work: Ending, stop: Callable[[], None]) -> bool:
    """Wait for an end; Ctrl-C calls `stop`, and makes the result True.

    Not by Thread.join, which takes a thread for ended when Ctrl-C interrupts it (before Python 3.13).
    """
    interrupted = False
    while not work.ended.is_set():
        try:
            work.ended.wait(_POLL)
        except KeyboardInterrupt:  # noqa: PERF203 - this is what the loop waits for
            interrupted = True
            stop()
    return interrupted


def read_wall_offset() -> int:
    """Return what must be added to CLOCK_MONOTONIC for CLOCK_REALTIME, in ns."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Run(Closing):
    """A run of the C core in a thread of its own, and the room that it writes to: `depth` chunks of `chunk` sweeps.

    The thread holds this object, and this object all that C writes to: whatever happens to the caller, the memory is
    there until the thread has left C.
    """

    def __init__(self, live: LiveRow, schedule: Schedule, chunk: int, depth: int, *, strict: bool) -> None:
        self._live = live
        self._owner = next(_OWNERS)
        self._failure: BaseException | None = None
        self._threads: list[int] = []
        self.ended = End()
        _OWNING[self._owner] = self
        if lib.kvmstats_lock(live.c, self._owner):
            last = live.c.owner
            # 1 is a sweep. A run that is no more may have been kept from unlocking, by Ctrl-C in its __del__.
            if last > 1 and last not in _OWNING:
                lib.kvmstats_unlock(live.c, last)
            if lib.kvmstats_lock(live.c, self._owner):
                raise RuntimeError(IN_USE)
        try:
            self._prepare(schedule, chunk, depth, strict=strict)
        except BaseException:
            self._free()
            raise

    def _prepare(self, schedule: Schedule, chunk: int, depth: int, *, strict: bool) -> None:
        slots = chunk * depth
        self._chunk, self._depth = chunk, depth
        plan = self._live.plan
        check_memory(slots * plan.sweep_bytes, slots)
        rows = self._rows = Rows(plan, slots)
        self._chunks = ffi.new("struct kvmstats_chunk[]", depth)
        self._event = Fd(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        run = self._c = ffi.new("struct kvmstats_run *")
        run.files, run.num_files = rows.structs, len(plan.files)
        run.scratch, run.scratch_size = rows.scratch, plan.scratch_words
        run.interval, run.ticks, run.duration = schedule.interval_ns, schedule.ticks, schedule.duration_ns
        run.spin_ns, run.wait = HYBRID_SPIN_NS, schedule.wait
        run.threads, run.strict, run.event_fd = plan.threads, strict, self._event.fileno()
        run.depth, run.chunk, run.chunks = depth, chunk, self._chunks
        self._keep = (
            ffi.from_buffer("int64_t[]", rows.time, True),
            ffi.from_buffer("int64_t[]", rows.sweep_ns, True),
            ffi.from_buffer("uint64_t[]", rows.tick, True),
        )
        run.time, run.sweep_ns, run.tick = self._keep
        self._interval = schedule.interval_ns / 1e9
        self._cpus = schedule.cpus
        self._wall_offset = read_wall_offset()

    def _work(self) -> None:
        try:
            # Ctrl-C is for the thread that waits for us.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)
            lib.kvmstats_run(self._c)
        except BaseException as error:  # noqa: BLE001 - raised again where the run is waited for
            self._failure = error
        finally:
            self.ended.set()

    def __enter__(self) -> Self:
        _RUNNING.add(self)
        try:
            # In one step, so that Ctrl-C comes before it, and there is no thread, or after it, and we know of it.
            self._threads.extend(map(start_new_thread, (self._work,), ((),)))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the run and wait for that; Ctrl-C meanwhile is raised when all is put away."""
        self.stop()
        interrupted = wait_for_end(self, self.stop) if self._threads else False
        self._free()
        if interrupted:
            raise KeyboardInterrupt

    def _free(self) -> None:
        try:
            _RUNNING.discard(self)
            if hasattr(self, "_event"):
                self._event.close()
        finally:
            lib.kvmstats_unlock(self._live.c, self._owner)

    # For when Ctrl-C or an error kept `close` from being reached. The thread holds us, so it is not in C any more.
    __del__ = _free

    def abandon(self) -> None:
        """In a forked child, where the thread is not."""
        self._failure = RuntimeError("this run or stream stayed in the parent process; start one of your own")
        self.ended = End()
        self.ended.set()
        self._free()

    def stop(self) -> None:
        """Ask the run to end."""
        lib.kvmstats_stop(self._c)

    def check(self) -> None:
        """Raise what kept an ended run from running."""
        if self._failure is not None:
            raise self._failure
        if self._c.status:
            raise KvmStatsError(f"the threads of the run could not be made: {os.strerror(-self._c.status)}")

    @property
    def totals(self) -> tuple[int, int]:
        """Ticks missed, and those of them for lack of room, up to now."""
        return self._c.missed, self._c.overruns

    def wait(self, number: int) -> bool:
        """Wait for a chunk; False if the run is over without it."""
        while lib.kvmstats_ready(self._c) <= number:
            if self.ended.is_set():
                if lib.kvmstats_ready(self._c) > number:
                    break
                self.check()
                return False
            poll = select.poll()
            poll.register(self._event, select.POLLIN)
            if poll.poll(_POLL * 1000):
                os.eventfd_read(self._event.fileno())
        return True

    def samples(self, number: int, *, copy: bool) -> Samples:
        """Return the samples of a chunk that is ready, or empty ones if there is no such chunk; copied or not."""
        is_there = lib.kvmstats_ready(self._c) > number
        place = number % self._depth
        chunk = self._chunks[place]
        used = chunk.used if is_there else 0
        first = chunk.first if is_there else self._c.taken
        return self._rows.make_samples(
            slice(place * self._chunk, place * self._chunk + used),
            copy=copy,
            interval=self._interval,
            wall_offset=self._wall_offset,
            missed=chunk.missed if is_there else 0,
            overruns=chunk.overruns if is_there else 0,
            errors=self._rows.find_errors(first, first + used if is_there else FOREVER),
        )

    def release(self, chunks: int) -> None:
        """Give the room of the first `chunks` chunks back to the run."""
        lib.kvmstats_release(self._c, chunks)


#: Runs whose thread is in C. It must not be there any more when the interpreter takes its memory back; in a forked
#: child it is not there at all.
_RUNNING: WeakSet[Run] = WeakSet()
_OWNERS = itertools.count(2)
#: Those that may have locked a Sampler.
_OWNING: WeakValueDictionary[int, Run] = WeakValueDictionary()


@atexit.register
def _end_runs() -> None:
    for run in list(_RUNNING):
        run.stop()
        run.ended.wait(1)


def _abandon_runs() -> None:
    for run in list(_RUNNING):
        run.abandon()


os.register_at_fork(after_in_child=_abandon_runs)


def attach_samples(samples: Samples) -> Exception:
    """Return the first error of a strict run, with what was sampled before as its attribute ``samples``."""
    error = min(samples.errors, key=lambda error: error.sweep).error
    error.samples = samples  # type: ignore[attr-defined]
    return error
