"""What each file of one kind did over a whole run, in base units: what figures and advice are worked out from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.abi import StatType, StatUnit
from kvmstats_fast.analysis.time_shares import HALT, time_between
from kvmstats_fast.changes import Total, totals
from kvmstats_fast.file_info import group_files
from kvmstats_fast.spans import last_sweeps, read_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

    Values = npt.NDArray[np.float64]


class Whole(ABC):
    """Changes over a whole run, or several, by file; NaN where a file does not have a statistic, or was not read.

    Attributes
    ----------
    files : tuple of FileInfo
        Those of the kind.
    names : list of str
        Statistics of one value that any file has.
    counts : list of str
        Those of `names` that count up, without a unit.
    seconds : numpy.ndarray
        float64 (n,): from the first sweep to the last that could read the file; NaN if that is no time.
    """

    seconds: Values

    def __init__(self, files: tuple[FileInfo, ...], stats: Iterable[Stat]) -> None:
        self.files = files
        single = [stat for stat in stats if not stat.shape]
        self.names = list(dict.fromkeys(stat.name for stat in single))
        counts = (stat for stat in single if (stat.type, stat.unit) == (StatType.CUMULATIVE, StatUnit.NONE))
        self.counts = list(dict.fromkeys(stat.name for stat in counts))

    @abstractmethod
    def change(self, name: str) -> Values:
        """Return the change of a statistic in base units, (n,)."""

    @abstractmethod
    def end(self, name: str) -> Values:
        """Return the last value of a statistic that was read, in base units, (n,)."""

    @abstractmethod
    def halted(self) -> Values:
        """Return how long each vCPU was halted, in seconds, as `time_between` has it, (n,)."""

    @abstractmethod
    def files_having(self, names: Iterable[str]) -> list[int]:
        """Return the indices of the files that have all these statistics."""

    @abstractmethod
    def elapsed(self, files: Sequence[int]) -> float:
        """Return how many seconds any of some files was read; NaN if that is no time."""

    def per_second(self, values: Values, by: str) -> Values:
        """Return values by the time that a file was read, or any of those that it is added up with."""
        if by == "vcpu":
            return values / self.seconds
        seconds = np.empty(len(self.files))
        for files in group_files(self.files, by).values():
            seconds[files] = self.elapsed(files)
        return values / seconds


class WholeRun(Whole):
    """Changes over a whole run by file; NaN where a file does not have a statistic, or was not read often enough.

    Each kernel's files are scaled by its own descriptors, which may differ from another's.

    Attributes
    ----------
    kernels : list of (Samples, numpy.ndarray)
        The files of each kernel, and their indices in `files`.
    """

    def __init__(self, samples: Samples, kind: str) -> None:
        chosen = samples.vm if kind == "vm" else samples.vcpu
        self.kernels = [(part, group.columns) for part, group in zip(chosen.split(), chosen.groups, strict=True)]
        super().__init__(chosen.files, [part.stat(name) for part, _ in self.kernels for name in part.names])
        self._totals: dict[int, dict[str, Total]] = {}
        self._last = last_sweeps(chosen)
        self.seconds = read_seconds(chosen)

    def change(self, name: str) -> Values:
        """Return the change of a statistic, (n,)."""
        return self._collect(name, lambda part, _: self._total(part, name), needed=2)

    def elapsed(self, files: Sequence[int]) -> float:
        """Return how many seconds any of some files was read; NaN if that is no time."""
        known = self.seconds[files][~np.isnan(self.seconds[files])]
        return float(known.max(initial=0)) or np.nan

    def _total(self, part: Samples, name: str) -> npt.NDArray[Any]:
        """Return the change of a statistic of one kernel; those of all its others are found in the same pass."""
        if id(part) not in self._totals:
            self._totals[id(part)] = totals(part, [one for one in part.names if not part.stat(one).shape])
        return self._totals[id(part)][name].exact()

    def end(self, name: str) -> Values:
        """Return the last value of a statistic that was read, (n,)."""
        return self._collect(name, lambda part, last: part[name][last, np.arange(len(last))], needed=1)

    def halted(self) -> Values:
        """Return how long each vCPU was halted, in seconds, as `time_between` has it, (n,)."""
        result = np.full(len(self.files), np.nan)
        for part, columns in self._having(HALT):
            if len(part) > 1:
                result[columns] = time_between(part, HALT, np.array([0, len(part) - 1]))[0]
        result[self._last < 1] = np.nan
        return result

    def _collect(
        self, name: str, raw: Callable[[Samples, npt.NDArray[np.intp]], npt.NDArray[Any]], needed: int
    ) -> Values:
        """Scale what `raw` gives of each kernel's files; NaN for those with fewer sweeps than are needed."""
        result = np.full(len(self.files), np.nan)
        for part, columns in self._having(name):
            if len(part) >= needed:
                result[columns] = part.stat(name).scale_array(raw(part, np.maximum(self._last[columns], 0)))
        result[self._last < needed - 1] = np.nan
        return result

    def files_having(self, names: Iterable[str]) -> list[int]:
        """Return the indices of the files that have all these statistics."""
        return sorted(file for _, columns in self._having(*names) for file in columns.tolist())

    def _having(self, *names: str) -> list[tuple[Samples, npt.NDArray[np.intp]]]:
        return [
            (part, columns)
            for part, columns in self.kernels
            if all(name in part.names and not part.stat(name).shape for name in names)
        ]
