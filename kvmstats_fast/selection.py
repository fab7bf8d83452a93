"""Selection: which statistics of which files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._arguments import check_integer, check_kind, check_names, find_fitting
from kvmstats_fast.errors import unknown_name, unknown_stat
from kvmstats_fast.file_info import group_files
from kvmstats_fast.groups import find_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples


@dataclass(frozen=True, slots=True)
class Selection:
    """Which statistics of which files: the arguments of `Samples.select`, checked; None is no condition.

    Attributes
    ----------
    names, vm, host : tuple of str or None
        Names or globs: of statistics, of VMs (`FileInfo.vm`), of hosts.
    vcpu : tuple of int or None
    kind : {None, "vm", "vcpu"}
    """

    names: tuple[str, ...] | None
    vm: tuple[str, ...] | None
    host: tuple[str, ...] | None
    vcpu: tuple[int, ...] | None
    kind: str | None

    @classmethod
    def of(
        cls,
        names: tuple[str, ...],
        vm: str | Iterable[str] | None,
        vcpu: int | Iterable[int] | None,
        kind: str | None,
        host: str | Iterable[str] | None,
    ) -> Selection:
        """Check the arguments of `Samples.select`; TypeError or ValueError if they are none."""
        check_kind(kind)
        return cls(
            check_names("names", names) or None,
            None if vm is None else check_names("vm", vm),
            None if host is None else check_names("host", host),
            None if vcpu is None else _check_vcpus(vcpu),
            kind,
        )

    def find_files(self, files: Sequence[FileInfo]) -> list[int]:
        """Return the indices of the files that fulfil all conditions; there may be none."""
        vms = _find(self.vm, [info.vm for info in files])
        hosts = _find(self.host, [info.host for info in files])
        return [
            index
            for index, info in enumerate(files)
            if (vms is None or info.vm in vms)
            and (hosts is None or info.host in hosts)
            and (self.vcpu is None or info.vcpu_id in self.vcpu)
            and self.kind in (None, info.kind)
        ]

    def find_stats(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that are selected, in their order; there may be none."""
        chosen = _find(self.names, names)
        return [name for name in names if chosen is None or name in chosen]

    def take(self, samples: Samples) -> Samples:
        """Return what is selected of samples; of no files if nothing is."""
        files, groups = self.find_files(samples.files), samples.groups
        if self.names is not None:
            names = frozenset(self.find_stats(samples.names))
            groups = tuple(group.take_stats(names) for group in groups if not names.isdisjoint(group.places))
            having = {index for group in groups for index in group.columns.tolist()}
            files = [index for index in files if index in having]
        return take_files(replace(samples, groups=groups), files)

    def check(self, files: Sequence[FileInfo], names: Sequence[str], where: str) -> None:
        """Raise KeyError for a condition that none of the files fulfils, or a name that fits none of the names.

        Parameters
        ----------
        files : sequence of FileInfo
            All there are.
        names : sequence of str
            The statistics of those that are selected.
        where : str
            What these are, for the message.
        """
        for what, patterns in (("VM", self.vm), ("host", self.host)):
            known = dict.fromkeys(info.vm if what == "VM" else info.host for info in files)
            for pattern in patterns or ():
                if not find_fitting(pattern, known):
                    raise unknown_name(what, pattern, known, where)
        numbers = {info.vcpu_id for info in files if info.vcpu_id is not None}
        for number in self.vcpu or ():
            if number not in numbers:
                there = f"from {min(numbers)} to {max(numbers)}" if numbers else "none"
                raise KeyError(f"no vCPU {number} in {where}; the numbers of vCPUs there are {there}")
        if not self.find_files(files):
            wanted = ((what, getattr(self, what)) for what in ("vm", "vcpu", "kind", "host"))
            conditions = ", ".join(f"{what} {value!r}" for what, value in wanted if value is not None)
            raise KeyError(f"no file in {where} fulfils all of these: {conditions or 'there are no files'}")
        for pattern in self.names or ():
            if not find_fitting(pattern, names):
                raise unknown_stat(pattern, names, where)


def select(samples: Samples, selection: Selection) -> Samples:
    """Return what is selected of samples; KeyError if a condition or name fits nothing; see `Samples.select`."""
    files = frozenset(selection.find_files(samples.files))
    names = dict.fromkeys(
        name for group in samples.groups if not files.isdisjoint(group.columns.tolist()) for name in group.places
    )
    selection.check(samples.files, [*names], "these samples")
    return selection.take(samples)


def split_by_vm(samples: Samples) -> dict[str, Samples]:
    """Return the samples of each VM by its label; see `Samples.by_vm`."""
    return {vm: take_files(samples, files) for vm, files in group_files(samples.files, "vm").items()}


def take_files(samples: Samples, files: Sequence[int]) -> Samples:
    """Return the same sweeps of the files at these ascending indices; views where they are evenly spaced."""
    if len(files) == len(samples.files):
        return samples
    wanted = np.array(files, np.intp)
    groups = []
    for group in samples.groups:
        places = np.searchsorted(group.columns, wanted)
        is_there = places < len(group.columns)
        is_there[is_there] = group.columns[places[is_there]] == wanted[is_there]
        if is_there.any():
            groups.append(group.take_files(find_key(places[is_there])))
    return restrict(samples, groups, files)


def restrict(samples: Samples, groups: Iterable[Group], files: Sequence[int]) -> Samples:
    """Return the same sweeps of these groups and files only; the groups' columns are indices among all files."""
    new = {index: position for position, index in enumerate(files)}
    return replace(
        samples,
        groups=tuple(
            replace(group, columns=np.array([new[index] for index in group.columns.tolist()], np.intp))
            for group in groups
        ),
        files=tuple(samples.files[index] for index in files),
        errors=tuple(error._replace(file=new[error.file]) for error in samples.errors if error.file in new),
    )


def _check_vcpus(vcpu: int | Iterable[int]) -> tuple[int, ...]:
    return tuple(check_integer("vcpu", one, 0) for one in (vcpu if isinstance(vcpu, Iterable) else (vcpu,)))


def _find(patterns: tuple[str, ...] | None, known: Sequence[str]) -> frozenset[str] | None:
    """Return what of the known any of the patterns fits; None if there are no patterns."""
    if patterns is None:
        return None
    names = dict.fromkeys(known)
    return frozenset(name for pattern in patterns for name in find_fitting(pattern, names))
