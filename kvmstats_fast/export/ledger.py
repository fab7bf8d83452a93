"""Ledger: what vCPUs had counted that are gone while their VM is there, so that its sums do not fall."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmstats_fast.abi import StatType
from kvmstats_fast.errors import KvmStatsError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.sampling.plan import Plan
    from kvmstats_fast.stat import Stat
    from kvmstats_fast.stats_file import StatsFile

    Values = npt.NDArray[np.uint64]
    #: By VM, vCPU and statistic.
    Gone = dict[str, dict[int, dict[str, Values]]]


class Ledger:
    """What each file was read to have last, and what those had that are gone.

    Attributes
    ----------
    gone : dict
        What is to be added to the sums of VMs.
    """

    def __init__(self) -> None:
        self.gone: Gone = {}
        self._read: dict[StatsFile, tuple[str, Mapping[str, tuple[Stat, int]], Values]] = {}

    def note(self, plan: Plan, values: Sequence[Values], failed: Collection[int]) -> None:
        """Take note of what was read: of each group, (files, words). Files that failed keep what they had."""
        infos = plan.origin.files
        for group, rows in zip(plan.groups, values, strict=True):
            for index, row in zip(group.columns.tolist(), rows, strict=True):
                if index not in failed:
                    self._read[plan.files[index]] = infos[index].vm, group.places, row

    def settle(self, files: Mapping[str, Sequence[StatsFile]]) -> None:
        """Work out what is gone, now that these files are there, by VM.

        A VM is the one that it was if one of its files is. A vCPU that comes back with at least what it had is the same
        one (QEMU plugs in the one that it kept), and its own file counts on; its thread is another one.
        """
        there = {file for some in files.values() for file in some}
        alive = {vm for file, (vm, _, _) in self._read.items() if file in there}
        self.gone = {vm: counted for vm, counted in self.gone.items() if vm in alive}
        for file in [file for file in self._read if file not in there]:
            vm, places, row = self._read.pop(file)
            if vm in alive and file.vcpu_id is not None:
                counted = self.gone.setdefault(vm, {}).setdefault(file.vcpu_id, {})
                for name, (stat, word) in places.items():
                    if stat.grows and stat.type != StatType.PEAK:
                        counted[name] = counted.get(name, 0) + row[word : word + stat.size]
        for vm, counts in self.gone.items():
            for file in files.get(vm, ()):
                if file not in self._read and file.vcpu_id in counts:
                    _forget(counts[file.vcpu_id], file)


def _forget(counted: dict[str, Values], file: StatsFile) -> None:
    """Let go of what a vCPU had counted that is there again."""
    try:
        row = file.read()
    except (OSError, ValueError, KvmStatsError):  # it has gone again
        return
    own = {name: file.schema.places[name] for name in counted if name in file.schema.places}
    if all((row[word : word + stat.size] >= counted[name]).all() for name, (stat, word) in own.items()):
        for name in own:
            del counted[name]
