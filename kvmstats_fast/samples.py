"""Samples: what a run gives, as numpy arrays."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, overload

from kvmstats_fast import changes, selection, spans
from kvmstats_fast._arguments import check_all
from kvmstats_fast.answers import Answers
from kvmstats_fast.conversions import Conversions
from kvmstats_fast.groups import find_columns, find_groups, join_columns
from kvmstats_fast.joining import join_samples, spread_offsets
from kvmstats_fast.selection import Selection

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.groups import Group
    from kvmstats_fast.spans import When
    from kvmstats_fast.stat import Stat


class SampleError(NamedTuple):
    """A file that failed while it was sampled.

    Attributes
    ----------
    file : int
        Index of the file in ``samples.files``.
    sweep : int
        Index into ``samples.time`` of the first sweep that could not read it. From there on its values are 0 and mean
        nothing.
    error : Exception
        Why: OSError, FormatError, VmGoneError, or ValueError for a StatsFile that was closed.
    """

    file: int
    sweep: int
    error: Exception


@dataclass(slots=True, eq=False, repr=False)
class Samples(Answers, Conversions):
    """The sweeps of a run, in numpy arrays: T sweeps of n files.

    ``samples["exits"]`` has the raw values of a statistic, uint64, shape ``(T, n)``, a histogram's ``(T, n, buckets)``,
    with one column for each file that has the statistic (`columns`); it is a view, unless files of different kernels
    are mixed. ``samples[10:20]`` selects these sweeps, as views, too.

    Attributes
    ----------
    time : numpy.ndarray
        int64 (T,): CLOCK_MONOTONIC in ns at the start of each sweep.
    sweep_ns : numpy.ndarray
        int64 (T,): how long each sweep took, in ns.
    tick : numpy.ndarray
        uint64 (T,): tick of each sweep on the schedule; gaps are missed ticks.
    interval : float
        Seconds between ticks; 0: as fast as possible.
    wall_offset : int
        ns to add to `time` for CLOCK_REALTIME, at the first sweep.
    wall_steps : tuple of (int, int)
        Where that offset changed, because the clock was set or the host was suspended: the first sweep (an index into
        `time`) with another offset, and that offset in ns. Ascending. `wall_time` uses both.
    missed : int
        Ticks that were not sampled because something took longer than an interval: ``len(samples) + missed`` is the
        number of ticks.
    overruns : int
        How many of `missed` are because a slow reader of a stream had left no room. (0 for a slice: not known for
        parts.)
    files : tuple of FileInfo
        The files, in the order given.
    errors : tuple of SampleError
        Files that failed; from then on their columns mean nothing (deltas 0, rates NaN).
    interrupted : bool
        Whether the run was ended before its last tick: by Ctrl-C, by `Sampler.stop`, or because memory ran short.
    host, kernel : str
        Where they were sampled: host name, and release and machine of the kernel (``"6.18.0 x86_64"``).
    groups : tuple of Group
        Internal (``kvmstats_fast/groups.py``): where the values lie. It may change in any version.
    """

    groups: tuple[Group, ...]
    files: tuple[FileInfo, ...]
    time: npt.NDArray[np.int64]
    sweep_ns: npt.NDArray[np.int64]
    tick: npt.NDArray[np.uint64]
    _: KW_ONLY
    interval: float = 0.0
    wall_offset: int = 0
    wall_steps: tuple[tuple[int, int], ...] = ()
    missed: int = 0
    overruns: int = 0
    errors: tuple[SampleError, ...] = ()
    interrupted: bool = False
    host: str = ""
    kernel: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics that were sampled, each once."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group.places))

    @property
    def vms(self) -> tuple[str, ...]:
        """Labels of the VMs (`FileInfo.vm`), each once, in the order of `files`."""
        return tuple(dict.fromkeys(info.vm for info in self.files))

    @property
    def wall_time(self) -> npt.NDArray[np.int64]:
        """CLOCK_REALTIME in ns at the start of each sweep, int64 (T,); ``.view("datetime64[ns]")`` is UTC.

        It follows the wall clock, which may be set: unlike `time` it can jump and go backwards.
        """
        if not self.wall_steps:
            return self.time + self.wall_offset
        return self.time + spread_offsets(self.wall_offset, self.wall_steps, len(self))

    @property
    def elapsed(self) -> float:
        """Seconds from the first to the last sweep; 0 for fewer than two sweeps."""
        return (int(self.time[-1]) - int(self.time[0])) / 1e9 if len(self) else 0.0

    @property
    def vm(self) -> Samples:
        """The same sweeps with the VM files only."""
        return Selection.of((), None, None, "vm", None).take(self)

    @property
    def vcpu(self) -> Samples:
        """The same sweeps with the vCPU files only."""
        return Selection.of((), None, None, "vcpu", None).take(self)

    def select(
        self,
        *names: str,
        vm: str | Iterable[str] | None = None,
        vcpu: int | Iterable[int] | None = None,
        kind: str | None = None,
        host: str | Iterable[str] | None = None,
    ) -> Samples:
        """Return the same sweeps with some statistics and files only.

        Parameters
        ----------
        *names : str
            Names or globs of statistics (``"exits"``, ``"halt_*"``); files that have none of them are left out. Without
            names, all statistics.
        vm, host : str or iterable of str, optional
            Labels of VMs (`vms`), names of hosts; or globs. An exact name takes precedence over a glob.
        vcpu : int or iterable of int, optional
            Numbers of vCPUs: selects those of every VM.
        kind : {"vm", "vcpu"}, optional

        Returns
        -------
        Samples
            Statistics and files keep their order. Arrays are views if the files are evenly spaced.

        Raises
        ------
        KeyError
            If a name, VM, vCPU or host does not exist, or no file meets all conditions.
        TypeError, ValueError
            If an argument is of a wrong type, or `kind` is neither.
        """
        return selection.select(self, Selection.of(names, vm, vcpu, kind, host))

    def by_vm(self) -> dict[str, Samples]:
        """Return the samples of each VM by label, in the order of `vms`; views like those of `select`."""
        return selection.split_by_vm(self)

    def between(self, start: When | None, stop: When | None = None) -> Samples:
        """Return the sweeps in a range of time, as views: from `start` on, and before `stop`.

        Parameters
        ----------
        start, stop : str, datetime.datetime, numpy.datetime64, float or None
            Wall-clock time: ISO 8601 text, a datetime or a datetime64, in UTC unless it names a zone, like the times in
            all tables. Or seconds since the first sweep. None: no limit.

        Returns
        -------
        Samples
            Adjacent ranges share no sweep and leave none out. The result may be empty.

        Raises
        ------
        TypeError, ValueError
            If these are not times, or `start` is after `stop`; or if the wall clock was set back, so that the samples
            pass the range more than once: the message says where.
        """
        return spans.between(self, spans.Span.of(start, stop))

    def resample(self, interval: float) -> Samples:
        """Return the last sweep of each interval, such as each second.

        Parameters
        ----------
        interval : float
            In seconds; no shorter than that of these samples.

        Returns
        -------
        Samples
            With that `interval`; `tick` counts intervals on the schedule of the run (without a schedule, since the
            first sweep), and `missed` those without a sweep. Views, if the sweeps are evenly spaced.

        Raises
        ------
        TypeError, ValueError
            If it is not a number of seconds, or is shorter.

        Notes
        -----
        Values are as they were read; nothing is averaged. A reset is only noticed if a value falls between two sweeps,
        so `total` of all sweeps notices more resets than that of fewer. Parts that were cut where an interval ends give
        what the whole gives; an interval that was cut has a sweep in each part.
        """
        return spans.resample(self, interval)

    def split(self) -> tuple[Samples, ...]:
        """Return the samples of each kind and schema separately, without a copy."""
        return tuple(self.restrict([group], group.columns.tolist()) for group in self.groups)

    def restrict(self, groups: Iterable[Group], files: Sequence[int]) -> Samples:
        """Return the same sweeps, of these groups and files only. Internal."""
        return selection.restrict(self, groups, files)

    def stat(self, name: str) -> Stat:
        """Return the descriptor of a statistic: its type, unit and scale.

        Raises
        ------
        KeyError
            If it was not sampled, or if files of different kernels differ in more of it than its offset.
        """
        stats = [group.places[name][0] for group in find_groups(self.groups, name)]
        if any(replace(stat, offset=stats[0].offset) != stats[0] for stat in stats[1:]):
            raise KeyError(
                f"{name!r} has different types, units or scales in files of different kernels: take the samples apart "
                "with split()"
            )
        return stats[0]

    def columns(self, name: str) -> tuple[FileInfo, ...]:
        """Return the files that the columns of ``samples[name]`` belong to."""
        return tuple(self.files[index] for index in find_columns(self.groups, name))

    @overload
    def __getitem__(self, key: str) -> npt.NDArray[np.uint64]: ...
    @overload
    def __getitem__(self, key: slice) -> Samples: ...
    def __getitem__(self, key: str | slice) -> npt.NDArray[np.uint64] | Samples:
        if isinstance(key, slice):
            return spans.take_sweeps(self, key)
        if isinstance(key, str):
            return self._values(key)
        raise TypeError(f"{key!r} is neither the name of a statistic nor a slice of sweeps")

    def _values(self, name: str) -> npt.NDArray[np.uint64]:
        found = find_groups(self.groups, name)
        sizes = sorted({group.places[name][0].size for group in found})
        if len({group.places[name][0].shape for group in found}) > 1:
            raise KeyError(
                f"{name!r} has different numbers of values in files of different kernels, "
                f"{' and '.join(map(str, sizes))}: take the samples apart with split()"
            )
        return join_columns([(group.columns, group.view(name)) for group in found])

    def delta(self, name: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
        """Return the change of a statistic from each sweep to the next, raw.

        Returns
        -------
        numpy.ndarray
            Shape ``(T - 1, n)``, a histogram's ``(T - 1, n, buckets)``. uint64 for statistics that never fall
            (cumulative, peak, histograms): where such a value fell, somebody cleared it (`resets`), and the change is
            the new value. int64 for instant values. 0 where a file had failed.
        """
        return changes.deltas(self, [name])[name]

    def total(self, name: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
        """Return how much a statistic changed over the whole run, raw: the sum of `delta` over time.

        Returns
        -------
        numpy.ndarray
            Shape ``(n,)``, a histogram's ``(n, buckets)``; the dtype of `delta`. Memory use does not grow with the
            number of sweeps.

        Raises
        ------
        ValueError
            If a statistic that was cleared during the run adds up to more than a uint64 holds.
        """
        return changes.totals(self, [name])[name].exact()

    def mean_rate(self, name: str) -> npt.NDArray[np.float64]:
        """Return the change per second in base units over the whole run: `total` divided by its time.

        Returns
        -------
        numpy.ndarray
            float64, shape ``(n,)``, a histogram's ``(n, buckets)``; units as in `rate`. It is right even if ticks were
            missed or a counter was cleared. For a file that failed, it is the mean until then. NaN if that time is 0.

        Raises
        ------
        ValueError
            As `total`.
        """
        return spans.mean_rate(self, name)

    def resets(self, name: str) -> npt.NDArray[np.bool_]:
        """Return where a statistic that never falls did fall, because somebody cleared it through debugfs.

        Returns
        -------
        numpy.ndarray
            bool, shape ``(T - 1, n)``; all False for instant values.
        """
        return changes.resets(self, [name])[name]

    def rate(self, name: str) -> npt.NDArray[np.float64]:
        """Return the change per second in base units, from each sweep to the next.

        Returns
        -------
        numpy.ndarray
            float64, the shape of `delta`. ``halt_wait_ns`` gives seconds per second; a histogram counts per second
            and bucket. NaN where a file had failed, and between two sweeps of the same ns.

        Notes
        -----
        If ticks were missed, the mean of these is not the mean rate of the run, because a step of a second weighs no
        more than one of a millisecond. Use `mean_rate`.
        """
        return changes.rates(self, [name])[name]

    def rates(self, names: str | Iterable[str] | None = None) -> dict[str, npt.NDArray[np.float64]]:
        """Return the rates of many statistics, in one pass over memory.

        Parameters
        ----------
        names : str or iterable of str, optional
            Names or globs (``"halt_*"``). Default: all.

        Returns
        -------
        dict of str to numpy.ndarray
            What `rate` returns for each name; in the order of `names`, and of the samples. The arrays share one piece
            of memory, which exists as long as any of them: copy what you keep.

        Raises
        ------
        KeyError
            If a pattern matches nothing, or both VM and vCPU files have a name: see `vm`, `vcpu`.
        """
        return changes.rates(self, changes.choose(self, names))

    def si(self, name: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """Return the values of a statistic in base units: seconds, bytes ... (``samples.stat(name).units(si=True)``).

        Returns
        -------
        numpy.ndarray
            The shape of ``samples[name]``. Exact uint64 if raw values are multiplied by a whole number and none becomes
            too large; otherwise float64. Instant values are signed, int64 instead of uint64: the kernel's counters can
            fall below 0. A histogram's values are counts, which have no unit, and a statistic with an unknown code has
            none either: both stay raw.
        """
        return self.stat(name).to_si(self._values(name))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        stats: str | Iterable[str] | None = None,
        start: When | None = None,
        stop: When | None = None,
    ) -> Samples:
        """Read what `save` or a `Recorder` wrote, or part of it; the rest is not decompressed.

        Parameters
        ----------
        path : path-like
            A recording's directory, one of its files, or an ``.npz``.
        stats : str or iterable of str, optional
            Names or globs of statistics, as for `select`.
        start, stop : str, datetime.datetime, numpy.datetime64, float or None
            A range of time, as for `between`.

        Returns
        -------
        Samples
            Its arrays are read-only if they are mapped from the file: for a single uncompressed batch, as `save` writes
            it.

        Raises
        ------
        FileNotFoundError, KvmStatsError
            If it does not exist, or is not a recording; or if it has several runs: see `open_recordings`.
        KeyError
            If there is no such statistic.
        TypeError, ValueError
            As `between`.

        Warns
        -----
        RecordingWarning
            If the recording was not ended; all whole batches are read.
        """
        from kvmstats_fast.formats import npz  # noqa: PLC0415 - reaches pyarrow

        return npz.load(path, stats, spans.Span.of(start, stop))

    @classmethod
    def concatenate(cls, parts: Iterable[Samples]) -> Samples:
        """Join consecutive parts of one stream or of several runs; a single part is not copied.

        Returns
        -------
        Samples
            `wall_steps` keeps the offset of each part. If the ticks of a part do not ascend from those before it,
            because its run counted from 0 again, they are renumbered: its tick 0 follows the last tick before it.

        Raises
        ------
        ValueError
            If there are no parts; if they differ in their files, statistics, interval, host or kernel; if they are not
            in order of time; or if a file that failed in one part was read in a later one. The message says which.
        """
        return join_samples(check_all("parts", parts, Samples))

    def __len__(self) -> int:
        return len(self.time)

    def __repr__(self) -> str:
        kinds = [info.kind for info in self.files]
        text = f"{len(self)} sweeps of {kinds.count('vm')} VM and {kinds.count('vcpu')} vCPU files"
        text += f" in {self.elapsed:.6g} s"
        text += f", {len(self.names)} statistics, {self.missed} ticks missed"
        if self.errors:
            text += f", {len(self.errors)} files failed"
        return f"<Samples: {text}{', interrupted' if self.interrupted else ''}>"
