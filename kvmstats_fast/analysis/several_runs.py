"""What each file did over several runs, so that figures and advice follow from all of them as from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.analysis.formulas import figures_of
from kvmstats_fast.analysis.halt_poll import HaltPollAdvice, Halts, advise, gather_halts
from kvmstats_fast.analysis.whole_run import WholeRun

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples


class _Joined(WholeRun):
    """The changes of several runs, added up file by file; of the runs themselves nothing is kept."""

    def __init__(self) -> None:
        self.kernels = []
        self.names, self.counts = [], []
        self._places: dict[FileInfo, int] = {}
        self._seconds: dict[int, float] = {}
        self._changes: dict[str, dict[int, float]] = {}
        self._ends: dict[str, dict[int, float]] = {}
        self._halted: dict[int, float] = {}

    def add(self, run: WholeRun) -> None:
        """Add a run, which is later than those before."""
        places = [self._places.setdefault(info, len(self._places)) for info in run.files]
        self.names = list(dict.fromkeys([*self.names, *run.names]))
        self.counts = list(dict.fromkeys([*self.counts, *run.counts]))
        _add(self._seconds, places, run.seconds)
        _add(self._halted, places, run.halted())
        for name in run.names:
            having = run.files_having([name])
            at = [places[file] for file in having]
            changes, ends = self._changes.setdefault(name, {}), self._ends.setdefault(name, {})
            _add(changes, at, run.change(name)[having])
            known = zip(at, run.end(name)[having].tolist(), strict=True)
            ends.update((place, end) for place, end in known if not np.isnan(end) or place not in ends)
        self.files = tuple(self._places)
        self.seconds = self._spread(self._seconds)

    def change(self, name: str) -> Values:
        return self._spread(self._changes[name])

    def end(self, name: str) -> Values:
        return self._spread(self._ends[name])

    def halted(self) -> Values:
        return self._spread(self._halted)

    def files_having(self, names: Iterable[str]) -> list[int]:
        return sorted(set.intersection(*(set(self._changes.get(name, ())) for name in names)))

    def _spread(self, by_place: dict[int, float]) -> Values:
        values = np.full(len(self._places), np.nan)
        values[list(by_place)] = list(by_place.values())
        return values


def _add(sums: dict[int, float], places: list[int], values: Values) -> None:
    """Add values in their places; NaN adds nothing, and stands where nothing is known."""
    for place, value in zip(places, values.tolist(), strict=True):
        before = sums.get(place, np.nan)
        sums[place] = value if np.isnan(before) else before if np.isnan(value) else before + value


class SeveralRuns:
    """Takes runs one after the other, and says what follows from all of them.

    A file is the same in two runs if its `FileInfo` is: what it counted is added up, and so is the time.
    """

    def __init__(self) -> None:
        self._vcpus, self._vms = _Joined(), _Joined()
        self._halts: list[Halts] = []
        self._hosts: set[str] = set()

    def add(self, samples: Samples) -> None:
        """Take a run, which is later than those before."""
        self._vcpus.add(WholeRun(samples, "vcpu"))
        self._vms.add(WholeRun(samples, "vm"))
        self._halts += gather_halts(samples)
        self._hosts.add(samples.host)

    def figures(self, by: str) -> Figures:
        """Return what `Samples.figures` does, of all runs; there must be one."""
        return figures_of(self._vcpus, self._vms, by)

    def halt_poll_advice(self) -> HaltPollAdvice | None:
        """Return what `Samples.halt_poll_advice` does, of all runs."""
        return advise(self._halts, self._hosts)
