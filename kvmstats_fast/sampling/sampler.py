"""Sampler: many stats files, one C call a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvmstats_fast._arguments import article
from kvmstats_fast._kvmstats import lib
from kvmstats_fast._resource import Unique
from kvmstats_fast.errors import SamplingWarning
from kvmstats_fast.groups import find_groups
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.memory import MemoryWatch
from kvmstats_fast.sampling.plan import LiveRow, Plan
from kvmstats_fast.sampling.run import Run, attach_samples, find_run, first_error
from kvmstats_fast.sampling.schedule import DEPTH, Schedule
from kvmstats_fast.sampling.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import SampleError
    from kvmstats_fast.sampling.plan import StatsFiles

_sweep = lib.kvmstats_sweep  # the hot call: looking it up in lib would cost a tenth of it


class Sampler(Unique):
    """Read many stats files again and again: one pread per file, one C call per sweep.

    Parameters
    ----------
    files : iterable of StatsFile, or mapping
        Files of VMs and vCPUs, of any schemas; or iterables of those, such as a `VirtualMachine`. They must stay open
        while they are sampled: a file that is closed has failed. A mapping labels the VMs: ``{"web": files, "db":
        machine}``; otherwise `FileInfo.vm` says how the label is chosen.
    stats : str or iterable of str, optional
        Names or globs (``"halt_*"``): only these are read and kept. Default: all. A file that has none of them is left
        out.
    threads : int
        Number of threads that share each sweep of a run or stream, for hosts with hundreds of vCPUs and idle
        processors.
    sched : bool
        Also read what the host's scheduler counts for each vCPU's thread, in the same sweep: ``sched_run_ns``, how long
        it ran, ``sched_wait_ns``, how long it was runnable and waited for a processor (both cumulative times), and
        ``sched_timeslices``, how often it was given one. They are statistics of the vCPU like all others, for `stats`,
        too; docs/sampling.md says what the kernel counts. A vCPU whose thread ends has failed.

    Raises
    ------
    KeyError
        If a name or glob matches no statistic of any file.
    TypeError, ValueError
        If `files` is not an iterable of open StatsFiles or is empty, a label is not text or its files are not of one
        VM, or `threads` is out of range.
    VmGoneError, OSError
        With `sched`: if a VMM has exited, or its threads cannot be inspected.

    Warns
    -----
    SamplingWarning
        With `sched`: names the vCPUs without these statistics, because their thread is not known
        (`VirtualMachine.threads`) or this kernel does not count it. Their other statistics are sampled.

    Notes
    -----
    A Sampler belongs to one thread at a time, and raises RuntimeError if it is used from two. Several Samplers run in
    parallel: the GIL is released in every sweep.
    """

    def __init__(
        self,
        files: StatsFiles,
        stats: str | Iterable[str] | None = None,
        threads: int = 1,
        *,
        sched: bool = False,
    ) -> None:
        self._live = LiveRow(Plan(files, stats, threads, sched=sched))
        self._c = self._live.c

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The files that are sampled, in the order given."""
        return self._live.plan.origin.files

    # A keyword-only argument would add a fiftieth to what a sweep of one file takes.
    def sweep(self, strict: bool = False) -> None:
        """Read every file once; `view` shows what was read.

        Parameters
        ----------
        strict : bool
            Raise the error of the first file that failed. Otherwise its values are 0 and `errors` says why, until the
            next sweep, which tries it again.

        Raises
        ------
        RuntimeError
            If a run, a stream or another thread is using this Sampler.
        OSError, FormatError, ValueError
            If all files failed, or with `strict` one.
        """
        status = _sweep(self._c)
        if status:
            self._live.check(status, strict=strict)

    @property
    def errors(self) -> tuple[SampleError, ...]:
        """Files that failed in the last `sweep`, and why."""
        return self._live.find_errors(0, 1)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Return the live values of a statistic, which every `sweep` updates in place.

        Returns
        -------
        numpy.ndarray
            uint64, shape ``(n,)``, a histogram's ``(n, buckets)``: a column for each file that has the statistic, in
            the order of `files`. 0 before the first sweep.

        Raises
        ------
        TypeError
            If `name` is not a str.
        KeyError
            If no file has it; or if both VM and vCPU files have it, or files of different kernels, which one view
            cannot show.
        """
        if not isinstance(name, str):
            raise TypeError(f"name is {article(name)}; it must be the name of a statistic")
        found = find_groups(self._live.groups, name)
        if len(found) > 1:
            raise KeyError(f"{name!r} is in files of {len(found)} different schemas; use a Sampler for each to view it")
        return cast("npt.NDArray[np.uint64]", found[0].view(name)[0])

    def run(  # noqa: PLR0913 - a schedule has that many sides
        self,
        interval: float,
        count: int | None = None,
        duration: float | None = None,
        wait: str = "sleep",
        *,
        cpu: int | Iterable[int] | None = None,
        priority: int | None = None,
        strict: bool = False,
    ) -> Samples:
        """Sweep on a schedule.

        Parameters
        ----------
        interval : float
            Seconds between sweeps; 0: as fast as possible.
        count : int, optional
            Number of ticks.
        duration : float, optional
            Seconds after which the run ends. Without `count` and `duration` it runs until Ctrl-C, or until no file is
            left.
        wait : {"sleep", "spin", "hybrid"}
            ``"sleep"`` yields the processor, and wakes up late by as much as timer and scheduler take. ``"hybrid"``
            spins for as long as sleeps are late, at most 150 us a tick, and hardly at all once the scheduler has taken
            the processor away. ``"spin"`` never sleeps: for a dedicated processor. docs/sampling.md says which suits
            which host.
        cpu : int or iterable of int, optional
            Processors to run on.
        priority : int, optional
            From 1 to 99: only the threads of the run are scheduled under SCHED_FIFO, before every thread that is not
            real-time itself (sched(7); ``-p`` of cyclictest). It needs CAP_SYS_NICE, or an RLIMIT_RTPRIO of at least
            this.
        strict : bool
            Raise the error of the first file that fails; its attribute ``samples`` has the samples so far.

        Returns
        -------
        Samples
            A late sweep is taken once, and the ticks that passed meanwhile are missed: ``len(samples) +
            samples.missed`` is the number of ticks. Ctrl-C and `stop` end the run, not the program:
            ``samples.interrupted``.

        Raises
        ------
        MemoryError
            If that many samples do not fit into memory; `stream` needs little, and `stats` reduces it. A run without an
            end does not raise it: it ends with a warning when memory runs short.
        KvmStatsError
            If its threads cannot be started: the message names the limits.
        PermissionError
            If they may not have that priority: the message says what is needed.
        RuntimeError
            If a run, a stream or another thread is using this Sampler.
        TypeError, ValueError
            For arguments of a wrong type or out of range.

        Warns
        -----
        SamplingWarning
            If the wall clock jumped by more than 10 ms between two chunks of the run (1 s; without an end 0.1 s); if it
            ended because memory ran short (``samples.interrupted``). If warnings are errors, its attribute ``samples``
            has the samples.
        """
        schedule = Schedule(interval, count, duration, wait, cpu=cpu, priority=priority)
        run, samples = (self._run_bounded if schedule.is_bounded else self._run_unbounded)(schedule, strict=strict)
        if strict and samples.errors:
            raise first_error(samples)
        try:
            run.warn()
        except SamplingWarning as warning:  # where warnings are errors
            raise attach_samples(warning, samples) from None
        return samples

    def _run_bounded(self, schedule: Schedule, *, strict: bool) -> tuple[Run, Samples]:
        """Do a run whose sweeps all have their room from the start."""
        chunks, chunk = schedule.split()
        with Run(self._live, schedule, chunk, chunks, strict=strict) as run:
            return run, run.finish(run.all_samples)

    def _run_unbounded(self, schedule: Schedule, *, strict: bool) -> tuple[Run, Samples]:
        """Do a run whose end is not known: collect its chunks until it ends, or memory runs short."""
        size = self._live.plan.sweep_bytes
        chunk = schedule.choose_chunk(size)
        watch = MemoryWatch(2 * DEPTH * chunk * size)  # what the ring still holds, and its copy
        parts: list[Samples] = []

        def collect() -> Samples:
            # All there is to remember is how many parts there are: wherever Ctrl-C comes, it loses none.
            while run.wait(len(parts)):
                parts.append(run.copy_chunk(len(parts)))
                run.release(len(parts))
                if watch.is_short(len(parts) * chunk * size):
                    run.remarks.append(watch.remark)
                    run.stop()
            samples = Samples.concatenate(parts or [run.copy_chunk(0)])
            samples.missed, samples.overruns = run.totals
            return samples

        with Run(self._live, schedule, chunk, DEPTH, strict=strict) as run:
            return run, run.finish(collect)

    def stop(self) -> bool:
        """Stop the current run or stream of this Sampler, from any thread; `run` returns what was sampled.

        Returns
        -------
        bool
            Whether there was one.
        """
        run = find_run(self._live)
        if run is None:
            return False
        run.stop()
        return True

    def stream(  # noqa: PLR0913 - a schedule has that many sides
        self,
        interval: float,
        chunk: int | None = None,
        wait: str = "sleep",
        *,
        count: int | None = None,
        duration: float | None = None,
        depth: int = DEPTH,
        cpu: int | Iterable[int] | None = None,
        priority: int | None = None,
        strict: bool = False,
    ) -> Stream:
        """Sweep on a schedule in the background, and yield Samples after Samples.

        Parameters
        ----------
        interval, wait, count, duration, cpu, priority
            As for `run`.
        chunk : int, optional
            Sweeps in each Samples. Default: those of 0.1 s, at most 4 MiB.
        depth : int
            Size of the ring in chunks: how far a reader may fall behind. Ticks for which there is no room are missed,
            and counted in ``missed`` and ``overruns`` of the next Samples and of the stream.
        strict : bool
            Raise the error of the first file that fails, after yielding the samples before it.

        Returns
        -------
        Stream
            For ``with``: an iterator that ends with the schedule, or when no file is left.

        Raises
        ------
        TypeError, ValueError
            For arguments of a wrong type or out of range. The other errors of `run` are raised where the ``with`` block
            begins.

        Warns
        -----
        SamplingWarning
            In the iteration, if the wall clock jumped by more than 10 ms between two chunks.
        """
        return Stream(
            self._live,
            Schedule(interval, count, duration, wait, cpu=cpu, priority=priority),
            chunk,
            depth,
            strict=strict,
        )

    def __repr__(self) -> str:
        kinds = [info.kind for info in self.files]
        names = {name for group in self._live.plan.groups for name in group.places}
        return f"<Sampler of {kinds.count('vm')} VM and {kinds.count('vcpu')} vCPU files, {len(names)} statistics>"
