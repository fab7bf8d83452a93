"""Tally: what was counted of each file over runs that no memory holds, added up as their samples come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmstats_fast._text import printable
from kvmstats_fast.analysis.formulas import figures_of
from kvmstats_fast.analysis.halted import Halted
from kvmstats_fast.analysis.time_shares import BLOCKING, HALT, NEEDED
from kvmstats_fast.analysis.whole_run import Whole
from kvmstats_fast.changes import add_exactly, add_up_group
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.file_info import group_files
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.changes import Change, Total
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat


class Counted(NamedTuple):
    """What a statistic changed by over all runs.

    Attributes
    ----------
    stat : Stat
    files : tuple of FileInfo
        One for each file and run.
    change : numpy.ndarray
        The shape and dtype of `Samples.total`.
    """

    stat: Stat
    files: tuple[FileInfo, ...]
    change: Change


class KernelCounts(NamedTuple):
    """What was counted of the files of one kind and kernel in a run.

    Attributes
    ----------
    files : tuple of FileInfo
    stats : dict
        The Stat by name.
    change : dict
        By name, the shape and dtype of `Samples.total`.
    end : dict
        By name the last value that was read of each file, uint64; 0 of a file that was never read.
    seconds : numpy.ndarray
        How long each file was read, float64 (n,); NaN of no time.
    """

    files: tuple[FileInfo, ...]
    stats: dict[str, Stat]
    change: dict[str, Change]
    end: dict[str, npt.NDArray[np.uint64]]
    seconds: npt.NDArray[np.float64]


@dataclass
class _Kernel:
    """The files of one kind and kernel in a run, and what their statistics changed by and ended at."""

    stats: dict[str, Stat]
    columns: npt.NDArray[np.intp]
    change: dict[str, Change] = field(default_factory=dict)
    end: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)
    halted: Halted | None = None

    def __post_init__(self) -> None:
        if self.stats.keys() >= set(NEEDED):  # nothing follows from it alone
            self.halted = Halted(self.stats[HALT], len(self.columns))

    def add(self, total: Total) -> None:
        """Add a change of a statistic; ValueError if a uint64 does not hold their sum."""
        change = total.exact()
        before = self.change.get(total.name)
        if before is not None:
            change = before + change
            if change.dtype == np.uint64 and (change < before).any():
                raise ValueError(f"the changes of {total.name} add up to more than a uint64 holds")
        self.change[total.name] = change

    def count(self, values: Sequence[npt.NDArray[np.uint64]], ends: npt.NDArray[np.intp]) -> None:
        """Count what happened in sweeps, of each file up to its end."""
        read = ends > 0
        rows = np.maximum(ends - 1, 0), np.arange(len(ends))
        for total, one in zip(add_up_group([*self.stats.values()], values, ends), values, strict=True):
            self.add(total)
            end = self.end.setdefault(total.name, np.zeros(total.change.shape, np.uint64))
            end[read] = one[rows][read]

    def count_halts(
        self,
        time: npt.NDArray[np.int64],
        values: Sequence[npt.NDArray[np.uint64]],
        ends: npt.NDArray[np.intp],
        before: tuple[int, Sequence[npt.NDArray[np.uint64]]] | None,
    ) -> None:
        """Count how long vCPUs were halted in sweeps that follow the one before, if there is one."""
        if self.halted is None:
            return
        names = list(self.stats)
        of = {name: values[names.index(name)] for name in (HALT, BLOCKING) if name in names}
        if before is None:
            self.halted.begin(int(time[0]))
        else:
            time = np.concatenate([[before[0]], time])
            of = {name: np.concatenate([before[1][names.index(name)][None], one]) for name, one in of.items()}
            ends = np.where(ends > 0, ends + 1, 0)
        self.halted.add(time, of[HALT], of.get(BLOCKING), ends)


class _Run:
    """One run, as its samples come."""

    def __init__(self, samples: Samples) -> None:
        self.files = samples.files
        self.kernels = [
            _Kernel({name: stat for name, (stat, _) in group.places.items()}, group.columns) for group in samples.groups
        ]
        self.read_ns = np.zeros(len(self.files), np.int64)
        #: Where an uninterrupted stretch of sweeps begins, by the wall clock; and what `read_ns` was there.
        self.stretches: list[tuple[int, npt.NDArray[np.int64]]] = []
        #: The first and the last sweep, each by the wall clock and by `Samples.time`.
        self.began = self.ended = (0, 0)
        #: `Samples.time` of the last sweep that was added, and its values by kernel and statistic.
        self._last: tuple[int, list[list[npt.NDArray[np.uint64]]]] | None = None

    def add(self, samples: Samples, *, follows: bool) -> None:
        """Count what happened from sweep to sweep, and since the last that was added if they follow it."""
        if not len(samples):
            return
        last = last_sweeps(samples)
        if not follows:
            self._last = None
        values = [[group.view(name) for name in kernel.stats] for kernel, group in self._zip(samples)]
        if not self.stretches:
            self.began = int(samples.wall_time[0]), int(samples.time[0])
        self.ended = int(samples.wall_time[-1]), int(samples.time[-1])
        if self._last is None:
            self.stretches.append((int(samples.wall_time[0]), self.read_ns.copy()))
        else:
            time, rows = self._last
            read = last >= 0
            self.read_ns[read] += samples.time[0] - time
            for kernel, old, new in zip(self.kernels, rows, values, strict=True):
                pairs = [np.stack((a, b[0])) for a, b in zip(old, new, strict=True)]
                kernel.count(pairs, np.where(read[kernel.columns], 2, 1))
        self.read_ns += samples.time[np.maximum(last, 0)] - samples.time[0]
        for place, (kernel, new) in enumerate(zip(self.kernels, values, strict=True)):
            ends = last[kernel.columns] + 1
            kernel.count(new, ends)
            kernel.count_halts(samples.time, new, ends, self._last and (self._last[0], self._last[1][place]))
        self._last = int(samples.time[-1]), [[one[-1].copy() for one in new] for new in values]

    def _zip(self, samples: Samples) -> Iterator[tuple[_Kernel, Group]]:
        return zip(self.kernels, samples.groups, strict=True)

    def overlaps(self, other: _Run) -> bool:
        """Return whether they have time in common by both clocks, of which either may begin anew or be set back."""
        ranges = zip(self.began, self.ended, other.began, other.ended, strict=True)
        return all(start < other_stop and other_start < stop for start, stop, other_start, other_stop in ranges)

    def counts(self) -> Iterator[KernelCounts]:
        """Yield what was counted of each kind and kernel, if there was a sweep."""
        for kernel in self.kernels if self._last is not None else ():
            columns = kernel.columns
            seconds = np.where(self.read_ns[columns] > 0, self.read_ns[columns] / 1e9, np.nan)
            files = tuple(self.files[index] for index in columns.tolist())
            yield KernelCounts(files, kernel.stats, kernel.change, kernel.end, seconds)

    def ns_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Return from when to when any of some files were read, by the wall clock of the start of each stretch."""
        marks = [*(ns for _, ns in self.stretches), self.read_ns]
        lengths = (int((after[rows] - before[rows]).max(initial=0)) for before, after in pairwise(marks))
        return [(start, start + length) for (start, _), length in zip(self.stretches, lengths, strict=True)]


class Tally:
    """What files counted, run by run. Memory grows with the number of runs and files, not with that of sweeps."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._goes_on = False

    def end_run(self) -> None:
        """Have what is added next be another run."""
        self._goes_on = False

    def add(self, samples: Samples, *, follows: bool) -> None:
        """Add samples, which `follows` those before them or come after a gap in which nothing is known."""
        if not self._goes_on:
            self._runs.append(_Run(samples))
            self._goes_on = True
        self._runs[-1].add(samples, follows=follows)

    def last_run(self) -> list[KernelCounts]:
        """Return what was counted in the run that has not ended, by kind and kernel; nothing if there is none."""
        return [*self._runs[-1].counts()] if self._goes_on else []

    def count(self, name: str) -> Counted | None:
        """Return how much a statistic changed, None if no file has it.

        Raises
        ------
        KeyError
            If it is of different types, units or sizes in different runs.
        KvmStatsError
            If a file was sampled by two runs at the same time, so that it would count twice.
        """
        found = [(run, kernel) for run in self._runs for kernel in run.kernels if name in kernel.change]
        if not found:
            return None
        _check_once((run, kernel, {name}) for run, kernel in found)
        stats = [replace(kernel.stats[name], offset=0) for _, kernel in found]
        if any(stat != stats[0] for stat in stats[1:]):
            raise KeyError(f"{name!r} has different types, units or sizes in runs of different kernels: select some")
        files = tuple(run.files[index] for run, kernel in found for index in kernel.columns.tolist())
        return Counted(stats[0], files, np.concatenate([kernel.change[name] for _, kernel in found]))

    def seconds(self, by: str | None) -> dict[str, float]:
        """Return how long any file of each VM (`by` is ``"vm"``), host or vCPU was read; overlaps count once.

        With None for `by` there is one number, for all of them.
        """
        stretches: dict[str, list[tuple[int, int]]] = {}
        for run in self._runs:
            for label, rows in group(run.files, by).items():
                stretches.setdefault(label, []).extend(run.ns_of(rows))
        return {label: cover_ns(found) / 1e9 for label, found in stretches.items()}

    def figures(self, by: str) -> Figures:
        """Return the figures of all runs together, see `Samples.figures`; a rate is over the time of `seconds`.

        Raises
        ------
        KvmStatsError
            As `count`.
        """
        _check_once((run, kernel, kernel.change.keys()) for run in self._runs for kernel in run.kernels)
        return figures_of(_WholeTally(self._runs, "vcpu"), _WholeTally(self._runs, "vm"), by)


def _check_once(found: Iterable[tuple[_Run, _Kernel, AbstractSet[str]]]) -> None:
    """Raise KvmStatsError if two of the runs have the same statistic of the same file at the same time."""
    runs: dict[FileInfo, list[tuple[_Run, AbstractSet[str]]]] = {}
    for run, kernel, names in found:
        for index in kernel.columns.tolist():
            runs.setdefault(run.files[index], []).append((run, names))
    for info, there in runs.items():
        there.sort(key=lambda one: one[0].began)
        before: list[tuple[_Run, AbstractSet[str]]] = []  # those that have not ended by then
        for run, names in there:
            before = [one for one in before if one[0].ended > run.began]
            for other, others in before:
                if (twice := names & others) and run.overlaps(other):
                    raise KvmStatsError(
                        f"{min(twice)} of {printable(str(info))} was sampled by two runs at the same time, and would "
                        "count twice: name the recordings of one of them, or take other times of them by themselves "
                        "(between)"
                    )
            before.append((run, names))


def group(files: Sequence[FileInfo], by: str | None) -> dict[str, list[int]]:
    """Return the indices of the files of each VM, host or vCPU, by its label; all by an empty one if `by` is None."""
    return {"": list(range(len(files)))} if by is None else group_files(files, by)


class _WholeTally(Whole):
    """Changes over several runs by vCPU or VM, which may have been other files in each."""

    def __init__(self, runs: Sequence[_Run], kind: str) -> None:
        self._runs = runs
        places: dict[tuple[str, str], int] = {}
        files: dict[int, FileInfo] = {}
        #: Of each run and kernel of the kind: which of `files` its columns are.
        self._kernels: list[tuple[_Kernel, npt.NDArray[np.intp]]] = []
        stretches: dict[int, list[tuple[int, int]]] = {}
        for run in runs:
            for kernel in run.kernels:
                infos = [run.files[index] for index in kernel.columns.tolist()]
                if infos[0].kind != kind:
                    continue
                at = [places.setdefault((info.host, str(info)), len(places)) for info in infos]
                files |= dict(zip(at, infos, strict=True))
                self._kernels.append((kernel, np.array(at, np.intp)))
                for place, index in zip(at, kernel.columns.tolist(), strict=True):
                    stretches.setdefault(place, []).extend(run.ns_of([index]))
        super().__init__(
            tuple(files[place] for place in range(len(files))),
            [stat for kernel, _ in self._kernels for stat in kernel.stats.values()],
        )
        self._stretches = stretches
        self.seconds = np.array([cover_ns(stretches[place]) / 1e9 or np.nan for place in range(len(files))], np.float64)

    def change(self, name: str) -> Values:
        """Return the change of a statistic, (n,)."""
        known = np.zeros(len(self.files), np.bool_)
        result = np.zeros(len(self.files))
        for kernel, places in self._having(name):
            np.add.at(result, places, kernel.stats[name].scale_array(kernel.change[name]))
            known[places] = True
        return np.where(known & ~np.isnan(self.seconds), result, np.nan)

    def end(self, name: str) -> Values:
        """Return the last value of a statistic that was read, (n,)."""
        result = np.full(len(self.files), np.nan)
        for kernel, places in self._having(name):
            result[places] = kernel.stats[name].scale_array(kernel.end[name])
        return result

    def halted(self) -> Values:
        """Return how long each vCPU was halted, in seconds, (n,)."""
        result = np.full(len(self.files), np.nan)
        for kernel, places in self._kernels:
            if kernel.halted is not None:
                result[places] = np.nan_to_num(result[places]) + kernel.halted.seconds
        return np.where(np.isnan(self.seconds), np.nan, result)

    def elapsed(self, files: Sequence[int]) -> float:
        """Return how many seconds any of some files was read; NaN if that is no time."""
        return cover_ns(one for file in files for one in self._stretches[file]) / 1e9 or np.nan

    def files_having(self, names: Iterable[str]) -> list[int]:
        """Return the indices of the files that have all these statistics."""
        having = (frozenset(place for _, places in self._having(name) for place in places.tolist()) for name in names)
        return sorted(frozenset.intersection(*having))

    def _having(self, name: str) -> list[tuple[_Kernel, npt.NDArray[np.intp]]]:
        """Return the kernels that have a statistic of one value."""
        return [one for one in self._kernels if name in one[0].change and not one[0].stats[name].shape]


def add_changes(parts: Sequence[Change], what: str) -> Change:
    """Return the sum of changes; ValueError, which names `what` is added, if a uint64 does not hold it."""
    whole = np.stack(parts)
    if whole.dtype == np.int64:
        signed: npt.NDArray[np.int64] = whole.sum(axis=0)
        return signed
    return add_exactly(whole.view(np.uint64), 0, what)


def cover_ns(stretches: Iterable[tuple[int, int]]) -> int:
    """Return how long stretches are together, what they have in common counted once."""
    length, until = 0, None
    for start, stop in sorted(stretches):
        length += max(stop - (start if until is None else max(start, until)), 0)
        until = stop if until is None else max(until, stop)
    return length
