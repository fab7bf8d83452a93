"""Which thread of a VMM runs which vCPU."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import KvmFile, Process

    _Search: TypeAlias = Callable[[Process, Sequence[int], Sequence[StatsFile]], Iterator[tuple[int, int]]]

KnownBy: TypeAlias = Literal["KVM_RUN", "name", "id"]
#: include/linux/proc_ns.h, PROC_PID_INIT_INO: KVM writes the numbers of this pid namespace into ids.
FIRST_NAMESPACE = "pid:[4026531836]"
_ID = re.compile(r"kvm-(\d+)(?:/vcpu-\d+)?")
#: QEMU (with debug-threads=on, as libvirt starts it), Firecracker, cloud-hypervisor, crosvm, kvmtool.
_NAME = re.compile(r"CPU (\d+)/KVM|fc_vcpu (\d+)|(?:crosvm_)?vcpu(\d+)|kvm-vcpu-(\d+)")
_KVM_RUN = 0xAE80  # include/uapi/linux/kvm.h; MIPS and PowerPC set further bits


class VcpuThread(NamedTuple):
    """The thread that runs a vCPU.

    Attributes
    ----------
    tid : int
    known_by : {"KVM_RUN", "name", "id"}
        That it was seen in this call for the vCPU's fd; or by what it is called; or by the id of the stats file, which
        names the thread that made the vCPU.
    """

    tid: int
    known_by: KnownBy


def find_threads(process: Process, files: Sequence[StatsFile]) -> dict[int, VcpuThread]:
    """Return the threads that run the vCPUs of a process, in the order of the vCPUs; without those that are not known.

    Parameters
    ----------
    process : Process
    files : sequence of StatsFile
        Its stats files.

    Raises
    ------
    OSError
        FileNotFoundError or ProcessLookupError if the process has ended; PermissionError if its folder may not be seen.

    Notes
    -----
    A process may have several VMs. Then a vCPU's number may be that of several vCPUs, and such a vCPU is not known.

    A vCPU that runs is not seen in ``KVM_RUN``: the kernel shows the system call of threads that sleep.
    """
    counts = Counter(file.vcpu_id for file in files if file.vcpu_id is not None)
    wanted = {vcpu_id for vcpu_id, count in counts.items() if count == 1}
    found: dict[int, VcpuThread] = {}
    tids = process.threads()
    ways: tuple[tuple[KnownBy, _Search], ...] = (("KVM_RUN", _in_kvm_run), ("name", _by_name), ("id", _by_id))
    for known_by, search in ways:
        if wanted <= found.keys():
            break
        candidates: dict[int, set[int]] = {}
        for vcpu_id, tid in search(process, tids, files):
            candidates.setdefault(vcpu_id, set()).add(tid)
        for vcpu_id, threads in candidates.items():
            if vcpu_id in wanted and vcpu_id not in found and len(threads) == 1:
                found[vcpu_id] = VcpuThread(threads.pop(), known_by)
    return dict(sorted(found.items()))


def _in_kvm_run(process: Process, tids: Sequence[int], _: Sequence[StatsFile]) -> Iterator[tuple[int, int]]:
    """Yield the vCPUs and threads that sleep in KVM_RUN, as far as their system calls may be seen."""
    vcpus: dict[int, list[list[KvmFile]]] = {}
    for group in process.group(file for file in process.kvm_files() if file.kind == "vcpu" and not file.is_stats):
        vcpus.setdefault(group[0].vcpu_id or 0, []).append(group)
    owner = {file.fd: vcpu_id for vcpu_id, (group, *others) in vcpus.items() if not others for file in group}
    for tid in tids:
        with suppress(OSError, ValueError):  # it has ended, or may not be traced; it runs, or is in no call
            number, fd, request, *_rest = (int(word, 16) for word in process.thread_syscall(tid))
            if number > 0 and fd in owner and request & 0xFFFF == _KVM_RUN and not process.is_worker(tid):
                yield owner[fd], tid


def _by_name(process: Process, tids: Sequence[int], _: Sequence[StatsFile]) -> Iterator[tuple[int, int]]:
    """Yield the vCPUs and threads that are called so."""
    for tid in tids:
        with suppress(OSError):  # it has ended
            match = _NAME.fullmatch(process.thread_name(tid))
            if match:
                yield int(match[match.lastindex or 0]), tid


def _by_id(process: Process, tids: Sequence[int], files: Sequence[StatsFile]) -> Iterator[tuple[int, int]]:
    """Yield the vCPUs and threads that ids name: of VMMs such as QEMU, where each thread makes the vCPU that it runs.

    Not so where the thread is the first of the process, or made the VM or another vCPU, too.
    """
    if str(Path("/proc/self/ns/pid").readlink()) != FIRST_NAMESPACE:
        return
    made = [(file.vcpu_id, int(match[1])) for file in files if (match := _ID.fullmatch(file.id))]
    makers = Counter(tid for _, tid in made)
    for vcpu_id, tid in made:
        if vcpu_id is not None and tid in tids and tid != process.pid and makers[tid] == 1:
            yield vcpu_id, tid
