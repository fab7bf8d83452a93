"""FileInfo: whose statistics a stats file has; and the labels that join the files of one VM."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

#: Characters that a label may have: recordings with longer texts are refused.
MOST_LABEL = 4096
#: Characters of a guest's name: a command line has room for megabytes, and each row of a table would have them.
MOST_NAME = 1024


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The host, VM and vCPU of a column. As text it is ``web/0``, vCPU 0 of the VM web, or ``web``, that VM's own file.

    Attributes
    ----------
    id : str
        The id string of the file, ``kvm-PID`` or ``kvm-TID/vcpu-N``. It is not a key: two VMs of one process may have
        the same, and the vCPUs of one VM name the threads that made them.
    kind : {"vm", "vcpu"}
    vcpu_id : int or None
        None for the file of a VM.
    pid : int or None
        Pid of the VMM, if it is known: for files of a `VirtualMachine`, and for those of this process's own VMs.
    name : str
        Name of the guest, as on the VMM's command line, at most 1024 characters; empty if it is not known.
    vm : str
        A label shared by the files of one VM, and by no other VM sampled with it. The first of these that applies:

        - the caller's label: ``Sampler({"web": files, "db": more})``;
        - the guest's name, followed by the pid where two VMs share it: ``"web (pid 123)"``;
        - ``"pid 123"``, where there is no name;
        - the thread in the id, ``"kvm-123"``, where the VMM is not known either: files that were handed over,
          captures. It joins the files that one thread made, as small VMMs do; those of QEMU's vCPUs it leaves apart.

        A VM has one file of its own and one per vCPU. If a process or a thread has several VMs, nothing says which file
        belongs to which. Each file then gets a label of its own, with its place among the given files: ``"pid 123 (file
        4)"``. The caller's labels can tell such VMs apart.
    host : str
        Name of the host on which it was read.
    """

    id: str
    kind: str
    vcpu_id: int | None
    pid: int | None = None
    name: str = ""
    vm: str = ""
    host: str = ""

    def __str__(self) -> str:
        vm = self.vm or self.id
        return vm if self.vcpu_id is None else f"{vm}/{self.vcpu_id}"


class Known(NamedTuple):
    """What is known of a file before its VM has a label: fields of `FileInfo`."""

    id: str
    kind: str
    vcpu_id: int | None
    pid: int | None
    name: str
    vm: str


def identify(files: Sequence[FileInfo], host: str) -> tuple[FileInfo, ...]:
    """Return files with `vm` and `host`, where they have none yet; `FileInfo` has the rule."""
    if all(info.vm and info.host for info in files):
        return tuple(files)
    labels = label_vms(files)
    return tuple(replace(info, vm=vm, host=info.host or host) for info, vm in zip(files, labels, strict=True))


def label_vms(files: Sequence[FileInfo | Known]) -> list[str]:
    """Return the label of each file's VM, by the rule in `FileInfo`."""
    owners: dict[Hashable, list[int]] = {}
    for index, info in enumerate(files):
        owners.setdefault(_owner(info) or index, []).append(index)
    vms: list[list[int]] = []
    for indices in owners.values():
        if _may_be_one_vm([files[index] for index in indices]):
            vms.append(indices)
        else:
            vms.extend([index] for index in indices)
    labels = [_describe(files[first]) or f"file {first}" for first, *_ in vms]
    if len(set(labels)) < len(vms):
        labels = _make_unique(labels, [first for first, *_ in vms], files)
    found = [""] * len(files)
    for indices, label in zip(vms, labels, strict=True):
        for index in indices:
            found[index] = label
    return found


def _make_unique(labels: list[str], firsts: list[int], files: Sequence[FileInfo | Known]) -> list[str]:
    """Return labels that differ, by the pids of VMs that share one, or by the place of each VM's first file."""
    pids = Counter(files[first].pid for first in firsts)
    endings = []
    for first in firsts:
        info = files[first]
        by_pid = info.pid is not None and pids[info.pid] == 1
        endings.append("" if info.vm else f" (pid {info.pid})" if by_pid else f" (file {first})")
    # No two endings are the same, so each turn leaves at least one label less to change.
    while shared := {label for label, count in Counter(labels).items() if count > 1}:
        labels = [label + ending if label in shared else label for label, ending in zip(labels, endings, strict=True)]
    return labels


#: What each file is added to, by the word that says so.
_BY: dict[str, Callable[[FileInfo], str]] = {
    "host": lambda info: info.host,
    "vm": lambda info: info.vm,
    "vcpu": str,
}


def check_by(by: str) -> None:
    """Raise ValueError if this is no word for what files are added up by."""
    if by not in tuple(_BY):  # which need not be hashable
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(map(repr, _BY))}")


def group_files(files: Sequence[FileInfo], by: str) -> dict[str, list[int]]:
    """Return the indices of the files of each VM (`by` is ``"vm"``), host or vCPU, by its label."""
    check_by(by)
    groups: dict[str, list[int]] = {}
    for index, info in enumerate(files):
        groups.setdefault(_BY[by](info), []).append(index)
    return groups


def _owner(info: FileInfo | Known) -> Hashable:
    """Return what the files of a VM have in common; None if nothing is known."""
    if info.vm:
        return ("vm", info.vm)
    return ("pid", info.pid) if info.pid is not None else _describe(info) or None


def _describe(info: FileInfo | Known) -> str:
    """Return the label of a VM, which need not be the only one of that label; empty if nothing is known."""
    if info.vm:
        return info.vm
    known = info.name or (f"pid {info.pid}" if info.pid is not None else "")
    text = known or (info.id if info.kind == "vm" else info.id.rpartition("/")[0])
    return text.encode("utf-8", "backslashreplace").decode()  # no table or file takes surrogates


def _may_be_one_vm(files: Sequence[FileInfo | Known]) -> bool:
    """Whether no two files are of the same thing; those whose label was given are."""
    return bool(files[0].vm) or len({(info.kind, info.vcpu_id) for info in files}) == len(files)
