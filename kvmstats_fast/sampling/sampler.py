"""Sampler: many stats files, one C call a sweep; runs and streams on a schedule."""

from __future__ import annotations

import atexit
import itertools
import operator
import os
import select
import signal
import threading
import time
from _thread import allocate_lock, start_new_thread
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Unique
from kvmstats_fast.errors import KvmStatsError, unknown_stat
from kvmstats_fast.groups import Block, find_groups
from kvmstats_fast.samples import FileInfo, SampleError, Samples
from kvmstats_fast.stats_file import StatsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import numpy.typing as npt
    from typing_extensions import Self

    from kvmstats_fast.schema import Schema, Stat

__all__ = ["Sampler", "Stream", "measure"]

_sweep = lib.kvmstats_sweep  # the hot call: looking it up in lib would cost a tenth of it

_WAITS = {
    "sleep": lib.KVMSTATS_WAIT_SLEEP,
    "spin": lib.KVMSTATS_WAIT_SPIN,
    "hybrid": lib.KVMSTATS_WAIT_HYBRID,
}
#: A sleeper wakes up to this late here and there (a virtual machine's timer and scheduler): "hybrid" spins that long.
_HYBRID_SPIN_NS = 150_000
#: How long a wait in Python may keep Ctrl-C or the end of a run waiting, in seconds.
_POLL = 0.05
#: A stream's chunk is to last this long and to be no larger than this, unless the caller says otherwise.
_CHUNK_SECONDS = 0.1
_CHUNK_BYTES = 4 << 20
_FOREVER = 1 << 62
_LONGEST = 1e9  # seconds, 30 years; of it the clock's ns have room for some
_BUSY = "this Sampler is at work already, in a run, a stream or another thread: each needs a Sampler of its own"


class _Plan:
    """What is read of a file of one schema, and what of that is kept."""

    def __init__(self, schema: Schema, patterns: tuple[str, ...] | None) -> None:
        stats = schema.stats if patterns is None else _selected(schema, patterns)
        self.first = 0  # word of the data at which the pread starts
        self.count = self.width = schema.num_values
        self.gather: npt.NDArray[np.uint32] | None = None
        self.places = {stat.name: (stat, stat.offset // 8) for stat in stats}
        if patterns is None or not stats:
            return
        words = np.concatenate([np.arange(stat.size) + stat.offset // 8 for stat in stats])
        starts = np.cumsum([0, *(stat.size for stat in stats)]).tolist()
        self.places = {stat.name: (stat, start) for stat, start in zip(stats, starts, strict=False)}
        self.first = int(words.min())
        self.count = int(words.max()) - self.first + 1
        self.width = len(words)
        if not np.array_equal(words, np.arange(self.first, self.first + self.width)):
            self.gather = (words - self.first).astype(np.uint32)


def _flat(files: Iterable[StatsFile | Iterable[StatsFile]]) -> Iterator[StatsFile]:
    for file in files:
        if isinstance(file, StatsFile) or not isinstance(file, Iterable):
            yield file
        else:
            yield from file


def _selected(schema: Schema, patterns: tuple[str, ...]) -> tuple[Stat, ...]:
    """Return the statistics of this schema that a pattern fits, each once; here a pattern may fit none."""
    chosen: dict[str, Stat] = {}
    for pattern in patterns:
        chosen.update(schema.matches(pattern))
    return tuple(chosen.values())


class Sampler(Unique):
    """Reads many stats files at once, again and again: one pread a file, one C call a sweep.

    Parameters
    ----------
    files : iterable of StatsFile
        Of VMs and vCPUs, of any schemas; or of iterables of those, as a `VirtualMachine` is one. They must stay open as
        long as they are to be sampled; one that is closed has failed.
    stats : str or iterable of str, optional
        Names or globs (``"halt_*"``): only these are read and kept. Default: everything. A file that has none of them
        is left out.
    threads : int
        How many threads share each sweep of a run or stream, for hosts with hundreds of vCPUs and cores to spare.

    Raises
    ------
    KeyError
        If a name or glob fits no statistic of any file.
    TypeError, ValueError
        If `files` are no open StatsFiles or there are none, or `threads` is out of range.

    Notes
    -----
    A Sampler belongs to one thread at a time, and raises RuntimeError if it is used from two. Several Samplers run in
    parallel: the GIL is released in every sweep.
    """

    def __init__(
        self,
        files: Iterable[StatsFile | Iterable[StatsFile]],
        stats: str | Iterable[str] | None = None,
        threads: int = 1,
    ) -> None:
        chosen = list(_flat(files))
        for file in chosen:
            if not isinstance(file, StatsFile):
                raise TypeError(f"files has a {type(file).__name__}; it must be StatsFiles only")
            file.handle.check_open()
        threads = operator.index(threads)
        if not 1 <= threads <= lib.KVMSTATS_MAX_THREADS:
            raise ValueError(f"threads is {threads}; it must be from 1 to {lib.KVMSTATS_MAX_THREADS}")
        patterns = None if stats is None else (stats,) if isinstance(stats, str) else tuple(stats)
        schemas = dict.fromkeys(file.schema for file in chosen)
        for pattern in patterns or ():
            if not any(schema.matches(pattern) for schema in schemas):
                raise unknown_stat(pattern, itertools.chain.from_iterable(schemas), "these files")
        plans = {schema: _Plan(schema, patterns) for schema in schemas}
        sampled = [file for file in chosen if plans[file.schema].places]
        if not sampled:
            raise ValueError("there is nothing to sample: no files, or none that has statistics")
        self._threads = threads
        self._sampled = sampled
        self.files = tuple(
            FileInfo(file.id, file.kind, file.vcpu_id, file.handle.owner.pid, file.handle.owner.name)
            for file in sampled
        )
        self._groups = self._make_groups(plans)
        self._keep: list[Any] = []  # what the C structs point to
        self._files = self._make_files(plans)
        span = max((plan.count for plan in plans.values() if plan.gather is not None), default=0)
        scratch = np.zeros(span * threads, np.uint64)
        self._sweep = ffi.new(
            "struct kvmstats_sweep *", (self._files, len(sampled), self._address(scratch), span, 0, 0)
        )

    def _make_groups(self, plans: dict[Schema, _Plan]) -> tuple[Block, ...]:
        members: dict[tuple[Schema, str], list[int]] = {}
        for index, file in enumerate(self._sampled):
            members.setdefault((file.schema, file.kind), []).append(index)
        return tuple(
            Block(
                schema,
                kind,
                plans[schema].places,
                np.array(columns, np.intp),
                np.zeros((1, len(columns), plans[schema].width), np.uint64),
            )
            for (schema, kind), columns in members.items()
        )

    def _make_files(self, plans: dict[Schema, _Plan]) -> Any:
        files = ffi.new("struct kvmstats_file[]", len(self._sampled))
        gathers = {
            schema: ffi.NULL if plan.gather is None else ffi.from_buffer("uint32_t[]", plan.gather)
            for schema, plan in plans.items()
        }
        self._keep.append(gathers)
        for index, file in enumerate(self._sampled):
            plan, source = plans[file.schema], file.handle.source
            files[index].source = source
            files[index].position = source.position + plan.first * source.value_size
            files[index].count = plan.count
            files[index].gather = gathers[file.schema]
            files[index].width = plan.width
        _point_rows(files, self._groups, self._keep)
        return files

    def _address(self, array: npt.NDArray[np.uint64]) -> Any:
        if not array.size:
            return ffi.NULL
        pointer = ffi.from_buffer("uint64_t[]", array, True)
        self._keep.append(pointer)
        return pointer

    def sweep(self, *, strict: bool = False) -> None:
        """Read every file once; `view` shows what was read.

        Parameters
        ----------
        strict : bool
            Raise the error of the first file that failed. Otherwise its values are 0 and `errors` says why, until the
            next sweep, which tries it again.

        Raises
        ------
        RuntimeError
            If another thread is using this Sampler.
        OSError, FormatError
            If all files failed, or with `strict` one.
        """
        status = _sweep(self._sweep)
        if status:
            if status < 0:
                raise RuntimeError(_BUSY)
            if strict or status == len(self.files):
                raise self.errors[0].error

    @property
    def errors(self) -> tuple[SampleError, ...]:
        """Files that failed in the last `sweep`, and why."""
        return tuple(self._errors(self._files, 0, 1))

    def _errors(self, files: Any, start: int, stop: int) -> Iterator[SampleError]:
        """Files that had failed by sweep `stop` of a run; the index counts from sweep `start`."""
        for index, file in enumerate(self._sampled):
            entry = files[index]
            if entry.error and entry.failed_at < stop:
                lost = file.handle.lost
                if lost is not None:
                    error: Exception = type(lost)(*lost.args)  # a run may add its samples to it
                elif file.closed:
                    error = ValueError(f"StatsFile {file.id} was closed while it was sampled")
                else:
                    error = file.handle.failure(entry.error, entry.position + entry.got)
                yield SampleError(index, max(entry.failed_at - start, 0), error)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Give the live values of a statistic, which every `sweep` updates in place.

        Returns
        -------
        numpy.ndarray
            uint64, shape ``(n,)``, a histogram's ``(n, buckets)``: a column for each file that has the statistic, in
            the order of `files`. 0 before the first sweep.

        Raises
        ------
        KeyError
            If no file has it, or VM and vCPU files both, or files of different kernels (no one view can show those).
        """
        found = find_groups(self._groups, name)
        if len(found) > 1:
            raise KeyError(f"{name!r} is in files of {len(found)} different schemas: sample them apart to view it")
        return cast("npt.NDArray[np.uint64]", found[0].view(name)[0])

    def run(  # noqa: PLR0913 - a schedule has that many sides
        self,
        interval: float,
        count: int | None = None,
        duration: float | None = None,
        wait: str = "sleep",
        *,
        cpu: int | Iterable[int] | None = None,
        strict: bool = False,
    ) -> Samples:
        """Sweep on a schedule.

        Parameters
        ----------
        interval : float
            Seconds between sweeps; 0: as fast as possible.
        count : int, optional
            How many ticks of the schedule there are.
        duration : float, optional
            Seconds after which it ends. Without `count` and `duration`: until Ctrl-C, or until no file is left.
        wait : {"sleep", "spin", "hybrid"}
            ``"sleep"`` gives the processor away between sweeps and is late by what timer and scheduler take;
            ``"spin"`` takes a processor for itself; ``"hybrid"`` sleeps, and spins the last 150 us.
        cpu : int or iterable of int, optional
            Processors to run on.
        strict : bool
            End with the error of the first file that fails; the samples so far are its attribute ``samples``.

        Returns
        -------
        Samples
            A late tick is taken late and those it overtook are counted: ``len(samples) + samples.missed`` is the
            number of ticks. Ctrl-C ends the run, not the program: ``samples.interrupted``.

        Raises
        ------
        MemoryError
            If the samples of so many sweeps do not fit into memory; `stream` needs little, `stats` less.
        RuntimeError
            If another thread is using this Sampler.
        ValueError
            For arguments out of range.
        """
        schedule = _Schedule(interval, count, duration, wait, cpu)
        if not schedule.is_bounded:
            return self._run_unbounded(schedule, strict)
        with _Run(self, schedule, schedule.ticks, 1, strict) as run:
            interrupted = _await(run, run.stop)
            run.check()
            samples = run.samples(0, copy=False)
            samples.missed, samples.overruns = run.totals
            samples.interrupted = interrupted
            if strict and samples.errors:
                raise _with_samples(samples)
            return samples

    def _run_unbounded(self, schedule: _Schedule, strict: bool) -> Samples:
        """Collect a stream to its end, which Ctrl-C may make."""
        collector = _Collector(Stream(self, schedule, None, 8, strict=strict))
        with collector.stream:
            # In a thread of its own, because Ctrl-C may come between any two steps of this one, and lose a part.
            start_new_thread(collector.work, ())
            interrupted = _await(collector, collector.stream.stop)
        if not collector.parts and collector.failure is not None:
            raise collector.failure
        samples = Samples.concatenate(collector.parts)
        samples.interrupted = interrupted
        if collector.failure is not None:
            collector.failure.samples = samples  # type: ignore[attr-defined]
            raise collector.failure
        return samples

    def stream(  # noqa: PLR0913 - a schedule has that many sides
        self,
        interval: float,
        chunk: int | None = None,
        wait: str = "sleep",
        *,
        count: int | None = None,
        duration: float | None = None,
        depth: int = 8,
        cpu: int | Iterable[int] | None = None,
        strict: bool = False,
    ) -> Stream:
        """Sweep on a schedule in the background, and give Samples after Samples.

        Parameters
        ----------
        interval, wait, count, duration, cpu
            As for `run`.
        chunk : int, optional
            Sweeps in each Samples. Default: what 0.1 s bring, at most 4 MiB.
        depth : int
            Chunks of room: a reader may fall behind by so many. Ticks for which there is no room are missed and
            counted, in the next Samples' ``missed`` and ``overruns`` and in the stream's.
        strict : bool
            Raise the error of the first file that fails, behind the samples that were taken before.

        Returns
        -------
        Stream
            For ``with``: an iterator that ends with the schedule, or when no file is left.
        """
        return Stream(self, _Schedule(interval, count, duration, wait, cpu), chunk, depth, strict=strict)

    def __repr__(self) -> str:
        kinds = [info.kind for info in self.files]
        names = dict.fromkeys(name for group in self._groups for name in group.places)
        return f"<Sampler of {kinds.count('vm')} VM and {kinds.count('vcpu')} vCPU files, {len(names)} statistics>"


def _here_and_now() -> tuple[int, str, str]:
    """Offset of the wall clock, host name, and kernel."""
    offset = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    machine = os.uname()
    return offset, machine.nodename, f"{machine.release} {machine.machine}"


def _with_samples(samples: Samples) -> Exception:
    """Return the first error of a strict run, with what was sampled before."""
    error = min(samples.errors, key=lambda error: error.sweep).error
    error.samples = samples  # type: ignore[attr-defined]
    return error


class _End:
    """An event that whoever waits for it may be interrupted at: each step that matters is a single call in C.

    After a Ctrl-C between two steps of threading.Event's, its condition is released without having been acquired
    (RuntimeError), or stays acquired, and the other thread hangs.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Tell those that wait; once."""
        self._is_set = True
        self._lock.release()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> None:
        """Wait so long at most."""
        if not self._is_set and self._lock.acquire(timeout=seconds):
            self._lock.release()


class _Ends(Protocol):
    """Something in another thread that has an end to wait for."""

    ended: _End


def _await(work: _Ends, stop: Callable[[], None]) -> bool:
    """Wait for an end; Ctrl-C makes it `stop`, and the result True.

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


class _Collector:
    """Takes all that a stream gives, in a thread."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.parts: list[Samples] = []
        self.failure: BaseException | None = None
        self.ended = _End()

    def work(self) -> None:
        """Collect until the stream ends or fails, or memory does."""
        size = 0
        try:
            for part in self.stream:
                self.parts.append(part)
                size += sum(cast("Block", group).values.nbytes for group in part.groups)
                _check_memory(size, sum(map(len, self.parts)))  # as much again, to put the parts together
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self.failure = error
        finally:
            self.ended.set()


def _point_rows(files: Any, groups: Iterable[Block], keep: list[Any]) -> None:
    """Tell each C file where its rows are in its group's array, and how far apart."""
    for group in groups:
        base = ffi.from_buffer("uint64_t[]", group.values, True)
        keep.append(base)
        _, columns, width = group.values.shape
        for place, index in enumerate(group.columns.tolist()):
            files[index].row = base + place * width
            files[index].step = columns * width
            files[index].error = 0


class _Schedule:
    """The checked arguments of a run."""

    def __init__(
        self,
        interval: float,
        count: int | None,
        duration: float | None,
        wait: str,
        cpu: int | Iterable[int] | None,
    ) -> None:
        count = None if count is None else operator.index(count)
        if not 0 <= interval <= _LONGEST:
            raise ValueError(f"interval is {interval}; it must be 0 or a number of seconds, at most {_LONGEST:g}")
        if count is not None and count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        if duration is not None and not 0 < duration <= _LONGEST:
            raise ValueError(f"duration is {duration}; it must be a number of seconds above 0, at most {_LONGEST:g}")
        if wait not in _WAITS:
            raise ValueError(f"wait is {wait!r}; it must be one of {', '.join(map(repr, _WAITS))}")
        self.interval_ns = round(interval * 1e9)
        if interval and not self.interval_ns:
            raise ValueError(f"interval is {interval} s; the clock counts ns")
        self.wait = _WAITS[wait]
        self.duration_ns = 0
        ticks = _FOREVER // max(self.interval_ns, 1)
        if duration is not None:
            nanoseconds = max(round(duration * 1e9), 1)
            if self.interval_ns:
                ticks = min(ticks, -(-nanoseconds // self.interval_ns))
            else:
                self.duration_ns = nanoseconds
        #: Whether the number of sweeps is known beforehand, so that they can have one array from the start.
        self.is_bounded = (
            duration is not None
            if self.interval_ns and count is None
            else (count is not None and (duration is None or self.interval_ns > 0))
        )
        self.ticks = ticks if count is None else min(ticks, count)
        self.cpus: set[int] | None = None
        if cpu is not None:
            self.cpus = {operator.index(one) for one in (cpu if isinstance(cpu, Iterable) else (cpu,))}
            if not self.cpus or not self.cpus <= os.sched_getaffinity(0):
                allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
                raise ValueError(f"cpu is {cpu}; this process may run on {allowed}")


class _Run:
    """A C run, its buffers, and the thread that is in it.

    The thread holds this object, and this object all that C writes to: whatever happens to the caller, memory that the
    run writes to is there until the thread has left C.
    """

    def __init__(self, sampler: Sampler, schedule: _Schedule, chunk: int, depth: int, strict: bool) -> None:
        self._sampler = sampler
        self._event = -1
        self._owner = next(_OWNERS)
        self._failure: BaseException | None = None
        self._threads: list[int] = []
        self.ended = _End()
        _OWNING[self._owner] = self
        if lib.kvmstats_lock(sampler._sweep, self._owner):
            last = sampler._sweep.owner
            # 1 is a sweep. A run that is no more may have been kept from unlocking, by Ctrl-C in its __del__.
            if last > 1 and last not in _OWNING:
                lib.kvmstats_unlock(sampler._sweep, last)
            if lib.kvmstats_lock(sampler._sweep, self._owner):
                raise RuntimeError(_BUSY)
        try:
            self._prepare(sampler, schedule, chunk, depth, strict)
        except BaseException:
            self._free()
            raise

    def _prepare(self, sampler: Sampler, schedule: _Schedule, chunk: int, depth: int, strict: bool) -> None:
        slots = chunk * depth
        self._chunk, self._depth = chunk, depth
        row = sum(group.values.nbytes for group in sampler._groups) + 24
        _check_memory(slots * row, slots)
        # Filled, so that every page is there before the clock starts: a page fault costs more than a read.
        self._time = np.full(slots, 0, np.int64)
        self._sweep_ns = np.full(slots, 0, np.int64)
        self._tick = np.full(slots, 0, np.uint64)
        self._groups = tuple(
            replace(group, values=np.full((slots, *group.values.shape[1:]), 0, np.uint64)) for group in sampler._groups
        )
        self._keep: list[Any] = []
        self._files = ffi.new("struct kvmstats_file[]", len(sampler.files))
        ffi.memmove(self._files, sampler._files, ffi.sizeof("struct kvmstats_file") * len(sampler.files))
        _point_rows(self._files, self._groups, self._keep)
        self._chunks = ffi.new("struct kvmstats_chunk[]", depth)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        run = self.c = ffi.new("struct kvmstats_run *")
        run.files, run.num_files = self._files, len(sampler.files)
        run.scratch, run.scratch_size = sampler._sweep.scratch, sampler._sweep.scratch_size
        run.interval, run.ticks, run.duration = schedule.interval_ns, schedule.ticks, schedule.duration_ns
        run.spin_ns, run.wait = _HYBRID_SPIN_NS, schedule.wait
        run.threads, run.strict, run.event_fd = sampler._threads, strict, self._event
        run.depth, run.chunk, run.chunks = depth, chunk, self._chunks
        run.time = self._pointer("int64_t[]", self._time)
        run.sweep_ns = self._pointer("int64_t[]", self._sweep_ns)
        run.tick = self._pointer("uint64_t[]", self._tick)
        self._interval = schedule.interval_ns / 1e9
        self._cpus = schedule.cpus
        self._wall_offset, self._host, self._kernel = _here_and_now()

    def _pointer(self, ctype: str, array: npt.NDArray) -> Any:  # type: ignore[type-arg]
        pointer = ffi.from_buffer(ctype, array, True)
        self._keep.append(pointer)
        return pointer

    def _work(self) -> None:
        try:
            # Ctrl-C is for the thread that waits for us.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)
            lib.kvmstats_run(self.c)
        except BaseException as error:  # noqa: BLE001 - raised again where the run is waited for
            self._failure = error
        finally:
            self.ended.set()

    def __enter__(self) -> Self:
        _RUNNING.add(self)
        try:
            # In one step, so that Ctrl-C comes before it, and there is no thread, or behind it, and we know of it.
            self._threads.extend(map(start_new_thread, (self._work,), ((),)))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the run and wait for that; Ctrl-C meanwhile is raised when all is put away."""
        self.stop()
        interrupted = _await(self, self.stop) if self._threads else False
        self._free()
        if interrupted:
            raise KeyboardInterrupt

    def _free(self) -> None:
        try:
            _RUNNING.discard(self)
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)
        finally:
            lib.kvmstats_unlock(self._sampler._sweep, self._owner)

    # For when Ctrl-C or an error kept `close` from being reached. The thread holds us, so it is not in C any more.
    __del__ = _free

    def abandon(self) -> None:
        """In a forked child, where the thread is not."""
        self._failure = RuntimeError("this run or stream stayed in the parent process: start one of your own")
        self.ended = _End()
        self.ended.set()
        self._free()

    def stop(self) -> None:
        """Ask the run to end."""
        lib.kvmstats_stop(self.c)

    def check(self) -> None:
        """Raise what kept an ended run from running."""
        if self._failure is not None:
            raise self._failure
        if self.c.status:
            raise KvmStatsError(f"the threads of the run could not be made: {os.strerror(-self.c.status)}")

    @property
    def totals(self) -> tuple[int, int]:
        """Ticks missed, and those of them for lack of room, up to now."""
        return self.c.missed, self.c.overruns

    def wait(self, number: int) -> bool:
        """Wait for a chunk; False if the run is over without it."""
        while lib.kvmstats_ready(self.c) <= number:
            if self.ended.is_set():
                if lib.kvmstats_ready(self.c) > number:
                    break
                self.check()
                return False
            poll = select.poll()
            poll.register(self._event, select.POLLIN)
            if poll.poll(_POLL * 1000):
                os.eventfd_read(self._event)
        return True

    def samples(self, number: int, *, copy: bool) -> Samples:
        """Give a chunk's samples, which must be ready, or empty ones if there is no such chunk; copied out or not."""
        is_there = lib.kvmstats_ready(self.c) > number
        place = number % self._depth
        chunk = self._chunks[place]
        used = chunk.used if is_there else 0
        part = slice(place * self._chunk, place * self._chunk + used)
        arrays = [self._time[part], self._sweep_ns[part], self._tick[part]]
        values = [group.values[part] for group in self._groups]
        if copy:
            arrays = [array.copy() for array in arrays]
            values = [array.copy() for array in values]
        first = chunk.first if is_there else self.c.taken
        errors = tuple(self._sampler._errors(self._files, first, first + used if is_there else _FOREVER))
        return Samples(
            tuple(replace(group, values=array) for group, array in zip(self._groups, values, strict=True)),
            self._sampler.files,
            *cast("Any", arrays),
            interval=self._interval,
            wall_offset=self._wall_offset,
            missed=chunk.missed if is_there else 0,
            overruns=chunk.overruns if is_there else 0,
            errors=errors,
            host=self._host,
            kernel=self._kernel,
        )


#: Runs whose thread is in C. It must not be there any more when the interpreter takes its memory back; in a forked
#: child it is not there at all.
_RUNNING: WeakSet[_Run] = WeakSet()
_OWNERS = itertools.count(2)
#: Those that may have locked a Sampler.
_OWNING: WeakValueDictionary[int, _Run] = WeakValueDictionary()


@atexit.register
def _end_runs() -> None:
    for run in list(_RUNNING):
        run.stop()
        run.ended.wait(1)


def _abandon_runs() -> None:
    for run in list(_RUNNING):
        run.abandon()


os.register_at_fork(after_in_child=_abandon_runs)


def _check_memory(size: int, slots: int) -> None:
    """Refuse what would not fit: the kernel would hand the memory out, and kill somebody when it is filled."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:") and size > int(line.split()[1]) * 1024:
            raise MemoryError(
                f"{slots} sweeps of these files take {size >> 20} MiB, more than is available; keep fewer statistics "
                "(stats=), or take them in parts with stream()"
            )


class Stream(Unique):
    """Samples after Samples from a run in the background; made by `Sampler.stream`, used with ``with``.

    Attributes
    ----------
    missed, overruns : int
        Ticks missed up to now, and those of them for which the reader had left no room.
    """

    def __init__(self, sampler: Sampler, schedule: _Schedule, chunk: int | None, depth: int, *, strict: bool) -> None:
        if chunk is None:
            row = sum(group.values.nbytes for group in sampler._groups) + 24
            wanted = _CHUNK_SECONDS * 1e9 / schedule.interval_ns if schedule.interval_ns else 1000
            chunk = max(1, min(round(wanted), _CHUNK_BYTES // row, schedule.ticks))
        chunk, depth = operator.index(chunk), operator.index(depth)
        if chunk < 1 or depth < 1:
            raise ValueError(f"chunk is {chunk} and depth {depth}; both must be at least 1")
        self._make = partial(_Run, sampler, schedule, chunk, depth, strict)
        self._run: _Run | None = None
        self._strict = strict
        self._number = 0
        self._reported = [0, 0]
        self._error: Exception | None = None
        self._reader = threading.Lock()
        self.missed = self.overruns = 0

    def __enter__(self) -> Self:
        if self._run is not None:
            raise RuntimeError("a stream runs once: ask the Sampler for another one")
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

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("a stream starts where its `with` begins")
        return self._run

    def stop(self) -> None:
        """End the run; the samples taken so far can still be read."""
        self._running().stop()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Samples:
        run = self._running()
        if not self._reader.acquire(blocking=False):
            raise RuntimeError("another thread is reading this stream: it has one reader")
        try:
            return self._take(run)
        finally:
            self._reader.release()

    def _take(self, run: _Run) -> Samples:
        if self._error is not None:
            raise self._error
        if run.wait(self._number):
            samples = run.samples(self._number, copy=True)
            self._number += 1
            lib.kvmstats_release(run.c, self._number)
        else:
            # What was missed behind the last sweep; and a run that took none still says of which files.
            rest = [total - reported for total, reported in zip(run.totals, self._reported, strict=True)]
            if not any(rest) and self._number:
                raise StopIteration
            samples = run.samples(self._number, copy=True)
            samples.missed, samples.overruns = rest
            self._number += 1
        self._reported = [self._reported[0] + samples.missed, self._reported[1] + samples.overruns]
        self.missed, self.overruns = run.totals
        if self._strict and samples.errors:
            self._error = _with_samples(samples)
        return samples


class _Changes(Mapping[str, "npt.NDArray[Any]"]):
    """Names to changes, worked out when asked for."""

    def __init__(self, samples: Samples, change: Callable[[str], npt.NDArray[Any]]) -> None:
        self._samples = samples
        self._change = change

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = self._change(name)[0]
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples.names)

    def __len__(self) -> int:
        return len(self._samples.names)


class measure:  # noqa: N801 - used as a function is
    """What happened while a block of code ran.

    Parameters
    ----------
    files : iterable of StatsFile
    stats : str or iterable of str, optional
        As for `Sampler`.

    Attributes
    ----------
    elapsed : float
        Seconds from one reading to the other.
    delta, rate : mapping
        ``m.delta["exits"]``: change of each file that has the statistic, as `Samples.delta` says, shape ``(n,)`` or
        ``(n, buckets)``; ``m.rate["exits"]`` the same per second, as `Samples.rate` says.
    samples : Samples
        The two readings.
    cost : float
        Seconds that the two readings took: what the measurement added to what it measured is about half of it (the
        half of each that lies between the two).

    Examples
    --------
    >>> with measure(files, "exits") as m:      # doctest: +SKIP
    ...     work()
    >>> m.delta["exits"]                        # doctest: +SKIP
    """

    def __init__(
        self, files: Iterable[StatsFile | Iterable[StatsFile]], stats: str | Iterable[str] | None = None
    ) -> None:
        self._sampler = Sampler(files, stats)
        self._readings: list[tuple[int, int, list[npt.NDArray[np.uint64]], tuple[SampleError, ...]]] = []

    def _read(self) -> None:
        start = time.monotonic_ns()
        self._sampler.sweep()
        took = time.monotonic_ns() - start
        values = [group.values.copy() for group in self._sampler._groups]
        self._readings.append((start, took, values, self._sampler.errors))

    def __enter__(self) -> Self:
        if self._readings:
            raise RuntimeError("this measure has been used: make another one")
        self._read()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._read()
        except (KvmStatsError, OSError, ValueError):
            if exc is not None:
                return  # what went wrong in the block is the news
            raise
        sampler = self._sampler
        starts, took, values, errors = zip(*self._readings, strict=True)
        failed = {error.file: error._replace(sweep=i) for i in (1, 0) for error in errors[i]}
        groups = tuple(
            replace(group, values=np.concatenate(pair))
            for group, pair in zip(sampler._groups, zip(*values, strict=True), strict=True)
        )
        clock = (np.array(starts, np.int64), np.array(took, np.int64), np.arange(2, dtype=np.uint64))
        offset, host, kernel = _here_and_now()
        self.samples = Samples(
            groups,
            sampler.files,
            *clock,
            wall_offset=offset,
            errors=tuple(failed.values()),
            host=host,
            kernel=kernel,
        )
        self.elapsed = (starts[1] - starts[0]) / 1e9
        self.cost = sum(took) / 1e9
        self.delta: Mapping[str, npt.NDArray[Any]] = _Changes(self.samples, self.samples.delta)
        self.rate: Mapping[str, npt.NDArray[Any]] = _Changes(self.samples, self.samples.rate)
