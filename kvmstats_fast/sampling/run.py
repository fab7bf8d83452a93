"""Run: sweeps on a schedule in a thread of the C core, and how it ends: by itself, by Ctrl-C, in a forked child."""

from __future__ import annotations

import atexit
import errno
import itertools
import math
import mmap
import os
import resource
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Closing, Fd
from kvmstats_fast.errors import THREAD_LIMITS, KvmStatsError, SamplingWarning, warn_caller
from kvmstats_fast.joining import find_steps
from kvmstats_fast.sampling.memory import check_memory
from kvmstats_fast.sampling.plan import IN_USE, Rows
from kvmstats_fast.sampling.schedule import FOREVER, HYBRID_SPIN_NS
from kvmstats_fast.sampling.wall_clock import WallClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.plan import LiveRow, Plan
    from kvmstats_fast.sampling.schedule import Schedule

#: How long Ctrl-C may go unnoticed when it comes just before a wait begins, in ms.
_WAIT_MS = 50
#: How long the end of the interpreter waits for a read that hangs in the kernel, in ms.
_EXIT_MS = 1000
#: A chunk that no run completes: to wait for its end.
_NO_CHUNK = (1 << 64) - 1


class _Ring:
    """What a run writes to, `depth` chunks of `chunk` sweeps, and the thread that writes to it.

    The thread is the C core's and never enters Python: it takes no GIL, runs no destructor and no signal handler, and
    is a kernel thread whatever a library has put in place of Python's threads. `_RINGS` holds this object until the
    thread has ended, so that the memory is there as long as the thread writes to it.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of
        self, c: Any, plan: Plan, schedule: Schedule, chunk: int, depth: int, *, strict: bool
    ) -> None:
        slots = min(chunk * depth, schedule.ticks)
        check_memory(slots * plan.sweep_bytes, slots)
        rows = self.rows = Rows(plan, slots)
        self._event = Fd(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._keep = (
            ffi.from_buffer("int64_t[]", rows.time, True),
            ffi.from_buffer("int64_t[]", rows.sweep_ns, True),
            ffi.from_buffer("uint64_t[]", rows.tick, True),
            ffi.new("struct kvmstats_chunk[]", depth),
            _make_mask(schedule.cpus),
        )
        self.c = c
        c.time, c.sweep_ns, c.tick, c.chunks, cpus = self._keep
        if schedule.cpus:
            c.cpus, c.cpu_words = cpus, len(cpus)
        c.depth, c.chunk = depth, chunk
        c.files, c.num_files = rows.structs, plan.num_reads
        c.scratch, c.scratch_size = rows.scratch, plan.scratch_words
        c.interval, c.ticks, c.duration = schedule.interval_ns, schedule.ticks, schedule.duration_ns
        c.spin_ns, c.wait, c.priority = HYBRID_SPIN_NS, schedule.wait, schedule.priority
        c.threads, c.strict, c.event_fd = plan.threads, strict, self._event.fileno()

    def end(self) -> None:
        """End the run, wait for its thread to be gone, and close the eventfd; a second call does nothing."""
        lib.kvmstats_stop(self.c)
        lib.kvmstats_join(self.c)
        self.c.event_fd = -1
        self._event.close()

    def forsake(self) -> None:
        """In a forked child, where the thread is not: end it."""
        self.c.joinable, self.c.ended = 0, 1
        self.end()


class Run(Closing):
    """A run that somebody waits for, from the start of the ``with`` block to its end.

    When the object goes without that, the run is told to stop. Its memory is kept until the next run after that begins.

    Attributes
    ----------
    remarks : list of str
        What the user must be warned of when the samples are handed out.
    """

    def __init__(self, live: LiveRow, schedule: Schedule, chunk: int, depth: int, *, strict: bool) -> None:
        _end_forgotten()
        self.remarks: list[str] = []
        self._live = live
        self._owner = next(_OWNERS)
        self._failure: Exception | None = None
        self._interval = schedule.interval_ns / 1e9
        self._wall_clock = WallClock(lib.kvmstats_wall_offset(), self.remarks)
        self._c = ffi.new("struct kvmstats_run *")
        _RUNS[self._owner] = self
        if lib.kvmstats_lock(live.c, self._owner):
            # 1 is a sweep. A run that is no more may have been kept from unlocking, by Ctrl-C in its __del__.
            last = live.c.owner
            if last > 1 and last not in _RUNS:
                lib.kvmstats_unlock(live.c, last)
            if lib.kvmstats_lock(live.c, self._owner):
                raise RuntimeError(IN_USE)
        try:
            self._ring = _Ring(self._c, live.plan, schedule, chunk, depth, strict=strict)
        except BaseException:
            lib.kvmstats_unlock(live.c, self._owner)  # at once: the exception may keep this object alive
            raise

    def __enter__(self) -> Self:
        _RINGS[self._owner] = self._ring
        # One call, so that Ctrl-C comes before it, and there is no thread, or after it, and the ring knows of it.
        error = -lib.kvmstats_start(self._c)
        if error:
            self.close()
            if error == errno.EPERM and self._c.priority:
                raise _priority_refused(self._c.priority)
            raise _thread_refused(error)
        return self

    def close(self) -> None:
        """End the run, and wait until its thread is gone."""
        self._ring.end()
        _RINGS.pop(self._owner, None)
        lib.kvmstats_unlock(self._live.c, self._owner)

    def __del__(self) -> None:
        # Never waits: whoever collects garbage has not asked for that. `_end_forgotten` does the rest.
        if hasattr(self, "_c"):
            lib.kvmstats_stop(self._c)
            lib.kvmstats_unlock(self._live.c, self._owner)
            if self._c.ended and self._owner in _RINGS:
                self.close()

    def forsake(self) -> None:
        """In a forked child: the run goes on in the parent, and is over here."""
        self._failure = RuntimeError("this run or stream stayed in the parent process; start one of your own")

    def resume(self, start: int, tick: int) -> None:
        """Before the run starts: go on with a schedule whose tick 0 was due at `start` (ns), from this tick on."""
        self._c.start, self._c.first_tick = start, tick

    def stop(self) -> None:
        """Ask the run to end, even before it has begun. From any thread."""
        lib.kvmstats_stop(self._c)

    def is_due(self, number: int, timeout: float) -> bool:
        """Wait for a chunk, or for the end, but no longer than `timeout` seconds; return whether either is there."""
        deadline = time.monotonic() + timeout
        left_ms = timeout * 1000
        while not lib.kvmstats_wait(self._c, number, math.ceil(max(min(left_ms, _WAIT_MS), 0))):
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                return False
        return True

    def wait(self, number: int = _NO_CHUNK) -> bool:
        """Wait for a chunk, by default for the end; False if the run ended without it.

        Raises
        ------
        KvmStatsError, MemoryError, RuntimeError
            If it ended because a thread could not be started; if it belongs to the parent process.
        """
        while not lib.kvmstats_wait(self._c, number, _WAIT_MS):
            pass
        if lib.kvmstats_ready(self._c) > number:
            return True
        if self._failure is not None:
            raise self._failure
        if self._c.status:
            raise _thread_refused(-self._c.status)
        return False

    @property
    def totals(self) -> tuple[int, int]:
        """Ticks missed, and those of them for lack of room, up to now."""
        return self._c.missed, self._c.overruns

    @property
    def next_tick(self) -> int:
        """The tick after those that were taken or missed up to now."""
        next_tick: int = self._c.first_tick + self._c.taken + self._c.missed
        return next_tick

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its last tick."""
        return bool(self._c.stop) and self.next_tick < self._c.ticks

    def finish(self, collect: Callable[[], Samples]) -> Samples:
        """Return what `collect` does, which waits for the end of the run; Ctrl-C stops the run, and calls it again."""
        interrupted = False
        while True:
            try:
                samples = collect()
            except KeyboardInterrupt:  # noqa: PERF203 - this is what the loop is for
                interrupted = True
                self.stop()
            else:
                samples.interrupted = interrupted or self.interrupted
                return samples

    def copy_chunk(self, number: int) -> Samples:
        """Return a copy of a chunk that is ready; if there is none with this number, empty samples."""
        if lib.kvmstats_ready(self._c) <= number:
            return self._make_samples(slice(0, 0), self._c.taken, FOREVER, copy=True)
        place = number % self._c.depth
        chunk = self._c.chunks[place]
        start = place * self._c.chunk
        samples = self._make_samples(slice(start, start + chunk.used), chunk.first, chunk.first + chunk.used, copy=True)
        samples.missed, samples.overruns = chunk.missed, chunk.overruns
        samples.wall_offset = self._wall_clock.follow(chunk.wall_offset)
        return samples

    def release(self, chunks: int) -> None:
        """Let the run use the room of its first `chunks` chunks again."""
        lib.kvmstats_release(self._c, chunks)

    def all_samples(self) -> Samples:
        """Wait for the end, and return all sweeps of a run that had room for them; not copied."""
        self.wait()
        samples = self._make_samples(slice(self._c.taken), 0, FOREVER, copy=False)
        samples.missed, samples.overruns = self.totals
        chunks = self._c.chunks[0 : lib.kvmstats_ready(self._c)]
        self.remarks.clear()  # Ctrl-C may have come between here and the end: then this is done again
        clock = WallClock(chunks[0].wall_offset if len(samples) else self._wall_clock.offset, self.remarks)
        offsets = {chunk.first: clock.follow(chunk.wall_offset) for chunk in chunks}
        samples.wall_offset, samples.wall_steps = find_steps(offsets or {0: clock.offset}, len(samples))
        return samples

    def warn(self) -> None:
        """Warn of each remark, once."""
        while self.remarks:
            warn_caller(self.remarks.pop(0), SamplingWarning)

    def _make_samples(self, slots: slice, start: int, stop: int, *, copy: bool) -> Samples:
        """Return the sweeps in these slots, which are sweeps `start` to `stop` of the run."""
        rows = self._ring.rows
        return rows.make_samples(
            slots,
            copy=copy,
            interval=self._interval,
            wall_offset=self._wall_clock.offset,
            errors=rows.find_errors(start, stop),
        )


#: Rings whose thread may be running, and the runs that somebody may wait for, by the owner that locks the Sampler.
_RINGS: dict[int, _Ring] = {}
_RUNS: WeakValueDictionary[int, Run] = WeakValueDictionary()
_OWNERS = itertools.count(2)


def find_run(live: LiveRow) -> Run | None:
    """Return the run that is under way, if there is one."""
    return _RUNS.get(live.c.owner)


def _end_forgotten() -> None:
    """End the rings that no run has any more, and that have stopped by now."""
    for owner, ring in list(_RINGS.items()):
        if owner not in _RUNS:
            lib.kvmstats_stop(ring.c)
            if ring.c.ended or not ring.c.joinable:  # not joinable: Ctrl-C came before its thread was made
                ring.end()
                _RINGS.pop(owner, None)


@atexit.register
def _end_all() -> None:
    """End the threads before the interpreter takes back the memory they write to."""
    for ring in list(_RINGS.values()):
        lib.kvmstats_stop(ring.c)
        lib.kvmstats_wait(ring.c, _NO_CHUNK, _EXIT_MS)
        if ring.c.ended:
            ring.end()


def _forsake_all() -> None:
    for ring in _RINGS.values():
        ring.forsake()
    for run in list(_RUNS.values()):
        run.forsake()
    _RINGS.clear()


os.register_at_fork(after_in_child=_forsake_all)


def attach_samples(error: Exception, samples: Samples) -> Exception:
    """Return an exception with what was sampled before it as its attribute ``samples``."""
    error.samples = samples  # type: ignore[attr-defined]
    return error


def first_error(samples: Samples) -> Exception:
    """Return the first error of a strict run, with what was sampled before as its attribute ``samples``."""
    return attach_samples(min(samples.errors, key=lambda error: error.sweep).error, samples)


def _make_mask(cpus: frozenset[int] | None) -> Any:
    """Return a mask of processors as the kernel wants it: a bit each, in words of the machine."""
    bits = 8 * ffi.sizeof("unsigned long")
    words = [0] * (max(cpus or {0}) // bits + 1)
    for cpu in cpus or ():
        words[cpu // bits] |= 1 << cpu % bits
    return ffi.new("unsigned long[]", words)


def _priority_refused(priority: int) -> PermissionError:
    """Return what to raise when the threads of a run may not have this priority."""
    allowed = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    limit = "unlimited" if allowed == resource.RLIM_INFINITY else allowed
    return PermissionError(
        errno.EPERM,
        f"priority is {priority}, which this process may not use. It takes CAP_SYS_NICE, or an RLIMIT_RTPRIO of at "
        f"least {priority} (here {limit}; `ulimit -r`, rtprio in limits.conf, LimitRTPRIO= of a systemd unit). If it "
        "has either, a container's seccomp filter or a cgroup without cpu.rt_runtime_us forbids it",
    )


def _thread_refused(error: int) -> Exception:
    """Return what to raise when a thread of a run could not be made, or could not run where it was told to."""
    text = f"the threads of this run cannot be started: {os.strerror(error)}"
    if error == errno.EINVAL:
        return KvmStatsError(f"{text}; the processors given as cpu are no longer allowed to this process")
    if error != errno.EAGAIN:
        return KvmStatsError(text)
    # pthread_create says EAGAIN for a stack that finds no room, too.
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    try:
        mmap.mmap(-1, 8 << 20 if soft == resource.RLIM_INFINITY else max(soft, mmap.PAGESIZE)).close()
    except (OSError, ValueError):
        return MemoryError("there is not enough memory for the stack of a thread")
    return KvmStatsError(f"{text}; {THREAD_LIMITS}")
