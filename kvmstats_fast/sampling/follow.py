"""follow: the VMs of a host, sampled on one schedule while they come and go."""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from kvmstats_fast._arguments import check_integer, check_names, check_seconds
from kvmstats_fast._kvmstats import lib
from kvmstats_fast._resource import Fd, Unique
from kvmstats_fast._unpatched import unpatched
from kvmstats_fast.errors import VmGoneError, unknown_stat
from kvmstats_fast.sampling.plan import LiveRow, NothingToSample, Plan
from kvmstats_fast.sampling.relay import Relay
from kvmstats_fast.sampling.schedule import DEPTH, LONGEST, Schedule
from kvmstats_fast.sampling.stream import Turn
from kvmstats_fast.schedstat import with_thread
from kvmstats_fast.vmm.roster import Roster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.machine import VirtualMachine

#: How long a wait lasts at most, in s: poll(2) counts ms in an int.
_LONGEST_WAIT = 1e6


class Choice:
    """Which statistics are sampled, of files whose kinds are not known beforehand.

    Parameters
    ----------
    patterns : tuple of str or None
        Names and globs; None: everything.
    sched : bool
        Whether vCPUs have the statistics of their threads, too.
    """

    def __init__(self, patterns: tuple[str, ...] | None, *, sched: bool = False) -> None:
        self._patterns, self.sched = patterns, sched
        self._fitting: dict[Schema, tuple[str, ...]] = {}  # of each schema that was seen
        self._kinds: set[str] = set()

    def of(self, files: Iterable[StatsFile]) -> tuple[str, ...] | None:
        """Return those that fit a statistic of these files; None: everything.

        Raises
        ------
        KeyError
            For one that fits nothing: neither in the VMs' files nor in the vCPUs', once both were seen; or if none of
            them fits anything that was seen.
        """
        if self._patterns is None:
            return None
        here: dict[Schema, None] = {}
        for file in files:
            here[file.schema] = None
            if file.schema not in self._fitting:
                self._kinds.add(file.kind)
                schema = with_thread(file.schema) if self.sched and file.kind == "vcpu" else file.schema
                fitting = tuple(pattern for pattern in self._patterns if schema.matches(pattern))
                self._fitting[file.schema] = fitting
        known = {pattern for fitting in self._fitting.values() for pattern in fitting}
        unknown = [pattern for pattern in self._patterns if pattern not in known]
        if unknown and (len(self._kinds) > 1 or not known):
            raise unknown_stat(
                unknown[0], (name for schema in self._fitting for name in schema), "the files of these VMs"
            )
        return tuple(dict.fromkeys(pattern for schema in here for pattern in self._fitting[schema]))


class Follow(Unique):
    """An iterator over the Samples of VMs that come and go; created by `follow`, used with ``with``.

    Attributes
    ----------
    refused : dict of int to str
        Pids of VMMs that were asked for and cannot be attached to, or whose new vCPUs cannot be read; and why. As of
        the last look at the host.
    machines : dict of str to VirtualMachine
        The VMs attached to now, by label (`FileInfo.vm`); ``explain()`` says what is missing. `Follow` closes them.
    missed, overruns : int
        Ticks missed so far, and how many of them because the reader had left no room.
    idle : int
        Ticks so far at which there was nothing to sample; they are not missed. Sweeps, `missed` and `idle` add up to
        the ticks of the schedule so far.
    on_look : callable or None
        Called by the reader's thread, without arguments, after each look at the host in the iteration: `refused` and
        `machines` are new then, also while no chunk comes. None unless it is set.
    """

    def __init__(self, roster: Roster, relay: Relay, choice: Choice, threads: int, rescan: float) -> None:
        self._roster, self._relay, self._choice = roster, relay, choice
        self._threads, self._rescan = threads, rescan
        self._opened: ExitStack | None = None
        self._pid = 0
        self._due = 0.0  # when to look at the host again
        self._sampled: dict[str, list[StatsFile]] | None = None
        self._waiting: deque[Samples] = deque()  # chunks that came while the host was looked at
        self._is_stopped = False
        self.on_look: Callable[[], object] | None = None
        self._turn = Turn("follow")

    # ---- what is known of it

    @property
    def refused(self) -> dict[int, str]:
        """Pids of VMMs that cannot be attached to, and why."""
        return dict(self._roster.refused)

    @property
    def machines(self) -> dict[str, VirtualMachine]:
        """What is attached to now, by label."""
        return self._roster.machines

    @property
    def missed(self) -> int:
        """Ticks missed up to now."""
        return self._relay.totals[0]

    @property
    def overruns(self) -> int:
        """Those of them for which the reader had left no room."""
        return self._relay.totals[1]

    @property
    def idle(self) -> int:
        """Ticks so far at which there was nothing to sample."""
        return self._relay.idle

    # ---- its block

    def __enter__(self) -> Self:
        if self._pid:
            raise RuntimeError("a follow runs once; make another one")
        self._pid = os.getpid()
        self._opened = opened = ExitStack()
        try:
            self._wake = opened.enter_context(Fd(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            opened.enter_context(self._roster)
            opened.callback(self._relay.close)
            self._look()
        except BaseException:  # Ctrl-C, too: behind the last call none comes before the block has begun
            self._opened = None
            opened.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running().close()

    def _running(self) -> ExitStack:
        if self._opened is None:
            raise RuntimeError("a follow starts where its `with` block begins")
        return self._opened

    def stop(self) -> None:
        """Stop, from any thread; the samples taken so far can still be read."""
        self._running()
        self._is_stopped = True
        self._relay.stop()
        with suppress(ValueError):  # its block has ended
            os.eventfd_write(self._wake.fileno(), 1)

    # ---- its chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Samples:
        self._running()
        if os.getpid() != self._pid:
            raise RuntimeError("this follow stayed in the parent process; start one of your own")
        with self._turn:
            while not self._waiting:
                if not self._is_stopped and time.monotonic() >= self._due:
                    self._look()
                elif (samples := self._relay.take(max(self._due - time.monotonic(), 0))) is not None:
                    return samples
                elif not self._relay.is_sampling:
                    self._wait_for_vms()
            return self._waiting.popleft()

    def _look(self) -> None:
        """Look at the host, and sample what is there from now on."""
        began = time.monotonic()
        self._due = began + self._rescan  # whatever comes in between
        self._roster.update(self._take_chunks)
        files = self._roster.files()
        if files != self._sampled or (files and not self._relay.is_sampling):
            self._relay.hand_over(self._prepare(files))
            self._sampled = files
        self._roster.settle()
        now = time.monotonic()
        self._due = max(self._due, now + (now - began))  # on a host that takes long to look at, half of the time
        if self.on_look is not None:
            self.on_look()

    def _prepare(self, files: dict[str, list[StatsFile]]) -> LiveRow | None:
        """Return what a run of these files needs; None if none of them has a chosen statistic."""
        while files:
            stats = self._choice.of(file for some in files.values() for file in some)
            if stats == ():
                break
            try:
                return LiveRow(Plan(files, stats, self._threads, sched=self._choice.sched))
            except NothingToSample:  # of these vCPUs the threads are not known
                break
            except VmGoneError:  # a moment ago: its files are closed
                files = self._roster.files()
        return None

    def _take_chunks(self) -> None:
        """Take what is there, so that the run has room while the host is looked at."""
        while (samples := self._relay.take(0)) is not None:
            self._waiting.append(samples)

    def _wait_for_vms(self) -> None:
        """Wait until it is time to look for VMs; StopIteration if none will be sampled any more."""
        if self._is_stopped or self._relay.is_over or self._roster.has_ended:
            rest = self._relay.take_rest()
            if rest is None:
                raise StopIteration
            self._waiting.append(rest)
            return
        end = self._relay.end
        until = self._due if end is None else min(self._due, end)
        poll = unpatched("select", "poll")()
        poll.register(self._wake, select.POLLIN)
        poll.poll(math.ceil(1000 * min(max(until - time.monotonic(), 0), _LONGEST_WAIT)))

    def __repr__(self) -> str:
        state = "not begun" if self._opened is None else f"{len(self.machines)} VMs, {len(self.refused)} refused"
        return f"<Follow: {state}>"


def follow(  # noqa: PLR0913 - what `attach` and `Sampler.stream` take
    names: str | int | Iterable[str | int] | None = None,
    interval: float = 1.0,
    stats: str | Iterable[str] | None = None,
    rescan: float = 1.0,
    *,
    inject: bool = False,
    timeout: float = 2.0,
    overlap: bool = False,
    chunk: int | None = None,
    wait: str = "sleep",
    count: int | None = None,
    duration: float | None = None,
    depth: int = DEPTH,
    cpu: int | Iterable[int] | None = None,
    priority: int | None = None,
    threads: int = 1,
    sched: bool = False,
) -> Follow:
    """Sample the VMs of this host on one schedule while VMs and vCPUs come and go.

    At the start of the ``with`` block it attaches to the existing VMs (`attach`), and the schedule starts. VMs and
    vCPUs are picked up as they appear, and dropped as they go; a VM that is recreated in the same process is dropped
    and picked up. This process, other monitors, and forked children of VMMs are left out. If there is no VM, it waits
    for one.

    Parameters
    ----------
    names : str, int, or iterable of these, optional
        Names of guests, or globs of names (``"web-*"``), and pids of VMMs. Default: all VMs. A pid means the process
        that has it when the block begins.
    interval : float
        Seconds between sweeps; 0: as fast as possible.
    stats : str or iterable of str, optional
        Names or globs of statistics. Default: everything.
    rescan : float
        Seconds between looks at the host. A new VM is not overlooked for longer, as long as the caller comes back for
        the next chunk in that time.
    inject, timeout
        As for `attach`.
    overlap : bool
        Begin each Samples with the last sweep of the previous one, as long as the files are the same. Then
        `Samples.total` and `Samples.mean_rate` of successive Samples leave nothing out. Otherwise, changes between the
        last sweep of one and the first of the next are in neither, and there are no rates if each has one sweep.
    chunk, wait, count, duration, depth, cpu, priority
        As for `Sampler.stream`. `count` and `duration` are those of the whole schedule, with or without VMs.
    threads, sched
        As for `Sampler`. A vCPU whose thread is not known when it is picked up has no ``sched_*`` statistics until
        other VMs or vCPUs come or go.

    Returns
    -------
    Follow
        For ``with``: an iterator over Samples, each of one set of files. It ends with the schedule, by `Follow.stop`,
        or, if only pids were given, when all these processes have exited. A VM keeps its label (`FileInfo.vm`) as long
        as it exists: its guest's name, or ``"pid 123"``, with the pid appended if another VM had the name first.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type or out of range.
    VmGoneError, AttachError
        At the start of the block, if there is no process with a given pid, or it may not be held.
    KeyError
        There or in the iteration, if a name or glob of `stats` matches no statistic, neither of VMs nor of vCPUs, once
        files of both were seen; or if none matches anything.
    OSError
        There or in the iteration, if /proc cannot be read.
    KvmStatsError, PermissionError, MemoryError
        As `Sampler.run`.

    Warns
    -----
    SamplingWarning
        As `Sampler.stream`; and as `Sampler`, with `sched`.

    Notes
    -----
    Tick k is due at start + k * interval, whatever the files are by then: `Samples.tick` and `Samples.time` continue
    from chunk to chunk. A change of files usually takes less than a ms. Ticks that pass meanwhile are counted in the
    next chunk's `Samples.missed`, and those that pass while there is no VM in `Follow.idle`. A file whose VM goes has a
    `SampleError` until the next look, and is then left out.

    The reader's thread looks at the host, between chunks, while the run in the background goes on.

    Examples
    --------
    >>> with follow("web-*", interval=1, stats="exits", overlap=True) as chunks:  # doctest: +SKIP
    ...     for x in chunks:
    ...         send(x.columns("exits"), x.mean_rate("exits"))
    """
    choice = Choice(None if stats is None else check_names("stats", stats), sched=sched)
    relay = Relay(
        Schedule(interval, count, duration, wait, cpu=cpu, priority=priority),
        None if chunk is None else check_integer("chunk", chunk, 1),
        check_integer("depth", depth, 1),
        overlap=overlap,
    )
    rescan = check_seconds("rescan", rescan, LONGEST, zero=False)
    threads = check_integer("threads", threads, 1, lib.KVMSTATS_MAX_THREADS)
    return Follow(Roster(names, inject=inject, timeout=timeout), relay, choice, threads, rescan)
