"""Recordings: runs of any hosts, VMs and times, as far as memory goes one batch of them at a time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np

from kvmstats_fast._arguments import check_name, check_seconds
from kvmstats_fast.analysis.histogram import Histogram, adder_of, adds_up
from kvmstats_fast.analysis.tally import Counted, Tally, add_changes, group
from kvmstats_fast.errors import unknown_stat
from kvmstats_fast.file_info import check_by
from kvmstats_fast.formats import need
from kvmstats_fast.formats._put import PRIVATE
from kvmstats_fast.formats.parquet import write_parquet
from kvmstats_fast.formats.sources import Source, find_sources
from kvmstats_fast.formats.wanted import ALWAYS, Step, Wanted, check_order, resample_steps
from kvmstats_fast.joining import join_kinds
from kvmstats_fast.samples import Samples
from kvmstats_fast.selection import Selection, take_files
from kvmstats_fast.spans import Span

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.spans import When

    Total: TypeAlias = int | npt.NDArray[np.uint64] | npt.NDArray[np.int64]
    Rate: TypeAlias = float | npt.NDArray[np.float64]

_Answer = TypeVar("_Answer")

#: Values that are worked on at once, at least: batches as a Recorder writes them are not copied together.
_STEP_BYTES = 2 << 20


def open_recordings(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Recordings:
    """Open recordings, and Parquet data sets from `to_parquet`, to query them together.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        Recordings, data sets, directories of either at any depth; globs such as ``"rec/*"``.

    Returns
    -------
    Recordings

    Raises
    ------
    FileNotFoundError
        If nothing is there, or nothing matches a glob.
    KvmStatsError, FormatError
        If something there is not a recording, or a recording is there twice.
    TypeError, ValueError
        If `paths` are not paths.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[arrow]'``.

    Examples
    --------
    >>> r = open_recordings("rec/*")        # doctest: +SKIP
    >>> {vm: h.quantile(0.99) for vm, h in r.histogram("halt_wait_hist").items()}       # doctest: +SKIP
    >>> r.between("2026-11-27 14:00", "2026-11-27 15:00").mean_rate("exits", by="host")     # doctest: +SKIP
    """
    sources = find_sources(paths)
    return Recordings(tuple(_Run(source, files) for source, files in zip(sources, _label(sources), strict=True)))


@dataclass(frozen=True)
class _Run:
    """A source, and its files with labels that no other VM of all the runs has."""

    source: Source
    files: tuple[FileInfo, ...]


def _label(sources: Iterable[Source]) -> list[tuple[FileInfo, ...]]:
    """Return the files of each source; a VM whose label is on several hosts has that of the host behind it."""
    of_runs = [source.files for source in sources]
    hosts = Counter(vm for vm, _ in {(info.vm, info.host) for files in of_runs for info in files})
    return [
        tuple(replace(info, vm=f"{info.vm} ({info.host})") if hosts[info.vm] > 1 else info for info in files)
        for files in of_runs
    ]


class Recordings:
    """Runs of any hosts, VMs and times, opened by `open_recordings`. A run is the sweeps of one set of stats files.

    Answers are about all runs together; iterating yields their Samples, run after run, some megabytes at a time.
    `select`, `between` and `resample` choose what is read: the rest is not decompressed.

    Memory use is bounded, however long a run is. The changes of a statistic are kept for further questions about it;
    iteration and figures read again.

    Attributes
    ----------
    hosts, vms, names : tuple of str
        Each once. The label of a VM is that of `FileInfo`; if VMs of several hosts share it, the host is appended:
        ``"web (node1)"``.
    files : tuple of FileInfo
        All stats files, each once.
    """

    def __init__(
        self,
        runs: tuple[_Run, ...],
        selections: tuple[Selection, ...] = (),
        span: Span = ALWAYS,
        interval: float | None = None,
    ) -> None:
        self._runs, self._selections, self._span, self._interval = runs, selections, span, interval
        self._counted: dict[str, Tally] = {}

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._runs)

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """All stats files, each once."""
        chosen = (run.files[index] for run in self._runs for index in self._choose(run))
        return tuple(dict.fromkeys(chosen))

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the hosts."""
        return tuple(dict.fromkeys(info.host for info in self.files))

    @property
    def vms(self) -> tuple[str, ...]:
        """Labels of the VMs."""
        return tuple(dict.fromkeys(info.vm for info in self.files))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics."""
        return tuple(dict.fromkeys(name for run in self._runs for name in self._names_of(run)))

    def __repr__(self) -> str:
        text = f"{len(self)} runs of {len(self.vms)} VMs on {len(self.hosts)} hosts, {len(self.names)} statistics"
        return f"<Recordings: {text}>"

    def _choose(self, run: _Run) -> list[int]:
        """Return which of the files of a run are selected."""
        chosen = list(range(len(run.files)))
        for selection in self._selections:
            chosen = [chosen[index] for index in selection.find_files([run.files[index] for index in chosen])]
        return chosen

    def _names_of(self, run: _Run) -> list[str]:
        """Return which statistics of a run are selected."""
        names = run.source.names_of(frozenset(run.source.indices[index] for index in self._choose(run)))
        for selection in self._selections:
            names = selection.find_stats(names)
        return names

    # ---- what is read

    def select(
        self,
        *names: str,
        vm: str | Iterable[str] | None = None,
        vcpu: int | Iterable[int] | None = None,
        kind: str | None = None,
        host: str | Iterable[str] | None = None,
    ) -> Recordings:
        """Return the same runs with some statistics and files only; parameters are those of `Samples.select`."""
        selection = Selection.of(names, vm, vcpu, kind, host)
        kept = Recordings(self._runs, (*self._selections, replace(selection, names=None)), self._span, self._interval)
        selection.check(self.files, kept.names, "these recordings")
        chosen = Recordings(self._runs, (*self._selections, selection), self._span, self._interval)
        runs = tuple(run for run in self._runs if chosen._choose(run) and chosen._names_of(run))
        return Recordings(runs, chosen._selections, self._span, self._interval)

    def between(self, start: When | None, stop: When | None = None) -> Recordings:
        """Return the same runs in a range of time: from `start` on, and before `stop`.

        Parameters
        ----------
        start, stop : str, datetime.datetime, numpy.datetime64, float or None
            As for `Samples.between`; seconds count from the first sweep of all runs. If the wall clock was set back, a
            run may pass the range twice: both times are read.

        Raises
        ------
        TypeError, ValueError
            As `Samples.between`.
        """
        first = min((run.source.began for run in self._runs if run.source.began is not None), default=0)
        span = self._span.within(Span.of(start, stop), first)
        return Recordings(self._runs, self._selections, span, self._interval)

    def resample(self, interval: float) -> Recordings:
        """Return the same runs with the last sweep of each interval, within the range chosen by `between`.

        Parameters
        ----------
        interval : float
            In seconds; no shorter than that of the runs.

        Raises
        ------
        TypeError, ValueError
            As `Samples.resample`; for a run that is too slow, when that is read.
        """
        seconds = check_seconds("interval", interval, 1e9, zero=False)
        return Recordings(self._runs, self._selections, self._span, max(seconds, self._interval or 0))

    def __iter__(self) -> Iterator[Samples]:
        """Give the samples of the runs in the order of their beginnings, some megabytes at a time.

        What a counter did between two of them is in neither: `total` and the others know of it.
        """
        for run in self._runs:
            for step in self._read(run):
                yield step.samples

    def runs(self) -> Iterator[Samples]:
        """Yield the samples of each run as a whole, in the order of their starts, however much memory that takes.

        The files of VMs and of vCPUs, which a data set separates, are one run again.

        Raises
        ------
        ValueError
            If those of one run do not have the same sweeps.
        """
        kinds: dict[object, list[_Run]] = {}
        for number, run in enumerate(self._runs):
            kinds.setdefault(run.source.origin.identity or number, []).append(run)
        for together in kinds.values():
            read = [[step.samples for step in self._read(run)] for run in together]
            if whole := [Samples.concatenate(parts) for parts in read if parts]:
                yield join_kinds(whole)

    def _read(self, run: _Run, *, relabel: bool = True) -> Iterator[Step]:
        """Give what is wanted of a run."""
        chosen = self._choose(run)
        names = frozenset(self._names_of(run))
        labels = dict(zip(run.source.files, run.files, strict=True))
        wanted_files = frozenset(run.source.files[index] for index in chosen)
        wanted = Wanted(names, frozenset(run.source.indices[index] for index in chosen), self._span)
        steps = check_order(run.source.read(wanted, _STEP_BYTES), run.source.path)
        files: tuple[FileInfo, ...] = ()
        try:
            for step in steps if self._interval is None else resample_steps(steps, self._interval):
                samples = step.samples
                if files != samples.files:  # they are the same ones for most of a run
                    files = samples.files
                    kept = [index for index, info in enumerate(files) if info in wanted_files]
                    labelled = tuple(labels[files[index]] for index in kept)
                samples = take_files(samples, kept)
                yield step._replace(samples=replace(samples, files=labelled) if relabel else samples)
        finally:
            need("pyarrow", "arrow").default_memory_pool().release_unused()  # it would keep what was decompressed

    # ---- answers

    @overload
    def total(self, name: str, by: str = "vm") -> dict[str, Total]: ...
    @overload
    def total(self, name: str, by: None) -> Total: ...
    def total(self, name: str, by: str | None = "vm") -> dict[str, Total] | Total:
        """Return how much a statistic changed while it was sampled, raw: the sum of `Samples.total`.

        Parameters
        ----------
        name : str
        by : {"vm", "host", "vcpu", None}
            What to return a number for, by label (`vms`; for a vCPU ``"web/0"``). None: one number for everything.

        Returns
        -------
        dict, or one of its values
            int; for a histogram, an array of the changes of its buckets. Changes between two runs are not included.

        Raises
        ------
        KeyError
            If there is no such statistic, or if both VM and vCPU files have it, or its types or units differ.
        ValueError
            If `by` is none of these, or the sum does not fit.
        KvmStatsError
            If two runs sampled it from the same file at the same time, as two recorders do: it would count twice.
        """
        _, counted = self._count(name, by)
        return _only(_add_up(counted, by), by)

    @overload
    def mean_rate(self, name: str, by: str = "vm") -> dict[str, Rate]: ...
    @overload
    def mean_rate(self, name: str, by: None) -> Rate: ...
    def mean_rate(self, name: str, by: str | None = "vm") -> dict[str, Rate] | Rate:
        """Return the change per second in base units: `total` divided by the time that the VM or host was sampled.

        Parameters and errors are those of `total`.

        Returns
        -------
        dict, or one of its values
            float; for a histogram, an array of float64. NaN if that time is 0. It is the time during which any file was
            sampled: time that runs share counts once, and time between runs does not count.
        """
        tally, counted = self._count(name, by)
        seconds, stat = tally.seconds(by), counted.stat
        rates: dict[str, Rate] = {}
        for label, total in _add_up(counted, by).items():
            change = np.asarray(total, np.float64 if stat.is_histogram else None)
            scaled = change if stat.is_histogram else stat.scale_array(change)
            rate = scaled / (seconds[label] or np.nan)
            rates[label] = rate if stat.shape else float(rate)
        return _only(rates, by)

    @overload
    def histogram(self, name: str, by: str = "vm") -> dict[str, Histogram]: ...
    @overload
    def histogram(self, name: str, by: None) -> Histogram: ...
    def histogram(self, name: str, by: str | None = "vm") -> dict[str, Histogram] | Histogram:
        """Return what a histogram counted in all runs.

        Parameters and errors are those of `total`.

        Returns
        -------
        dict, or one of its values
            `Histogram` of shape ``(buckets,)``: ``r.histogram("halt_wait_hist")["web"].quantile(0.99)``. It has a
            `mean` under the same condition as that of `Samples.histogram`.

        Raises
        ------
        ValueError
            If it is no histogram.
        """
        tally, counted = self._count(name, by)
        counted.stat.bucket_edges()  # its error says why there are none
        total = tally.count(adder_of(name))
        if total is not None and (total.files != counted.files or not adds_up(total.stat, counted.stat)):
            total = None
        raw = None if total is None else total.change.astype(np.uint64)
        whole = Histogram(counted.stat, counted.change.astype(np.uint64), raw, counted.files)
        return whole.sum() if by is None else whole.by(by)

    def figures(self, by: str = "vm") -> Figures:
        """Return derived figures of all runs together.

        Parameters
        ----------
        by : {"vm", "host", "vcpu"}
            Of what there is a value.

        Returns
        -------
        Figures
            As `Samples.figures`; a rate is divided by the time during which any file of the VM or host was sampled.

        Raises
        ------
        ValueError
            If `by` is none of these.
        KvmStatsError
            As `total`.
        """
        check_by(by)
        stats = [stat for run in self._runs for stream in run.source.streams() for stat in stream.stats]
        return self._tally(stat.name for stat in stats if not stat.shape).figures(by)

    def _tally(self, names: Iterable[str]) -> Tally:
        """Count what the statistics of these names changed by, in all runs."""
        tally, wanted = Tally(), frozenset(names)
        for run in self._runs:
            there = tuple(name for name in self._names_of(run) if name in wanted)
            if there:
                only = Selection(there, None, None, None, None)
                part = Recordings((run,), (*self._selections, only), self._span, self._interval)
                for step in part._read(run):
                    tally.add(step.samples, follows=step.follows)
                tally.end_run()
        return tally

    def _count(self, name: str, by: str | None) -> tuple[Tally, Counted]:
        """Count what a statistic, and what adds it up, changed by; what was counted before is at hand."""
        if by is not None:
            check_by(by)
        check_name(name)
        if name not in self.names:
            raise unknown_stat(name, self.names, "these recordings")
        if name not in self._counted:
            self._counted |= dict.fromkeys((name, adder_of(name)), self._tally((name, adder_of(name))))
        tally = self._counted[name]
        counted = tally.count(name)
        if counted is None:
            raise KeyError(f"{name!r} was not sampled in this range of time")
        if len({info.kind for info in counted.files}) > 1:
            raise KeyError(f"{name!r} is in VM and in vCPU files: take select(kind='vm') or select(kind='vcpu')")
        return tally, counted

    # ---- elsewhere

    def to_parquet(
        self,
        root: str | os.PathLike[str],
        *,
        values: str = "raw",
        encoding: str = "BYTE_STREAM_SPLIT",
        overwrite: bool = False,
        mode: int = PRIVATE,
    ) -> list[Path]:
        """Add the runs, or the selection, to a Parquet data set; see `kvmstats_fast.to_parquet`.

        Changes are those within each run: what a counter did between two runs, or in time that was not selected, is in
        no row.
        """
        by_name: dict[str, list[_Run]] = {}
        for run in self._runs:
            by_name.setdefault(self._name(run.source), []).append(run)
        written = []
        for name, runs in by_name.items():
            steps = ((run.source.origin.run, step) for run in runs for step in self._read(run, relabel=False))
            written += write_parquet(
                steps, Path(root), name, host=None, values=values, encoding=encoding, overwrite=overwrite, mode=mode
            )
        return written

    def _name(self, source: Source) -> str:
        """Return by what name a recording goes in a data set: that of the whole, or of what is selected of it."""
        what = (self._selections, self._span, self._interval)
        if what == ((), ALWAYS, None) and source.origin.recording:
            return source.origin.recording
        about = json.dumps([source.origin.recording, str(source.path), repr(what)])
        return blake2b(about.encode(), digest_size=16).hexdigest()


def _add_up(counted: Counted, by: str | None) -> dict[str, Total]:
    """Return what files changed by together."""
    if not counted.stat.shape:
        changes = counted.change.tolist()
        return {label: sum(changes[row] for row in rows) for label, rows in group(counted.files, by).items()}
    what = f"the changes of {counted.stat.name}"
    return {
        label: add_changes([counted.change[row] for row in rows], what)
        for label, rows in group(counted.files, by).items()
    }


def _only(answers: dict[str, _Answer], by: str | None) -> dict[str, _Answer] | _Answer:
    return answers[""] if by is None else answers
