"""Stats files that another process holds: duplicates of its fds, by pidfd_getfd(2)."""

from __future__ import annotations

import errno
import operator
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._kvmstats import lib
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.handle import Owner
from kvmstats_fast.stats_file import StatsFile
from kvmstats_fast.vmm.mark import drop_dead
from kvmstats_fast.vmm.proc import KvmFile, Process, is_own, kvm_file
from kvmstats_fast.vmm.refusal import refused

if TYPE_CHECKING:
    from collections.abc import Sequence


def hold_process(pid: int) -> Process:
    """Return a process, held by a pidfd; the caller closes it.

    Raises
    ------
    TypeError, ValueError
        If `pid` cannot be a pid.
    VmGoneError
        If there is no such process.
    AttachError
        If it is a thread, or /proc is that of another pid namespace; or if the kernel refuses, with the reason and what
        to do.
    """
    try:
        pid = operator.index(None if isinstance(pid, bool) else pid)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{pid!r} is not a pid: pass the number of the VMM's process, as find_vms() lists it") from None
    if not 0 < pid < 2**31:
        raise ValueError(f"{pid} is not a pid: it must be positive, and have at most 31 bits")
    if not Path("/proc/self").is_symlink():
        raise AttachError(errno.ENXIO, "there is no proc file system at /proc: mount one (`mount -t proc proc /proc`)")
    if not is_own("/proc"):
        raise AttachError(
            errno.ENXIO,
            f"/proc belongs to another pid namespace, so its process {pid} is not the one that system calls would "
            "reach. Mount this namespace's own (`unshare --mount-proc`), or run this in the namespace of /proc "
            "(`nsenter --target PID --pid --mount`)",
        )
    try:
        return Process.hold(pid)
    except OSError as failure:
        error = failure.errno or 0
        if error in (errno.EINVAL, errno.ENOENT):  # the second since Linux 6.15
            text = f"pidfd_open: {pid} is a thread: pass the pid of its process (Tgid in /proc/{pid}/status)"
            raise AttachError(error, text) from None
        raise refused("pidfd_open", pid, error) from None


def list_files(process: Process) -> list[KvmFile]:
    """Return the files of KVM that a held process has open, by fd, but for the stats files of VMs that are gone.

    Raises
    ------
    VmGoneError
        If it has ended.
    AttachError
        If its files may not be seen, with the reason and what to do.
    """
    try:
        files = drop_dead(process, process.kvm_files())
    except ProcessLookupError:
        raise VmGoneError(errno.ESRCH, f"process {process.pid} has ended") from None
    except FileNotFoundError:
        process.check_alive()  # else /proc hides it, as with hidepid
        raise refused(f"reading {process.folder}/fd", process.pid, errno.EACCES) from None
    except OSError as error:
        process.check_alive()
        raise refused(f"reading {process.folder}/fd", process.pid, error.errno or 0) from None
    process.check_alive()  # so the pid was its own, and all of that is about it
    return files


def borrow(process: Process, files: Sequence[KvmFile], *, known: Sequence[StatsFile] = ()) -> list[StatsFile]:
    """Open, here, the stats files that another process has open.

    Parameters
    ----------
    process : Process
        Held. It need not help, and does not notice.
    files : sequence of KvmFile
        What it has open, as `list_files` returns it.
    known : sequence of StatsFile
        Borrowed before: of several duplicates, the one of these is kept.

    Returns
    -------
    list of StatsFile
        Files of VMs, then of vCPUs by number; of several that are of the same VM or vCPU, one. The caller closes them.
        Empty if the process holds none, or has closed them since.

    Raises
    ------
    VmGoneError
        If the process has ended.
    AttachError
        If the kernel refuses, with the reason and what to do.
    FormatError
        If a stats file cannot be read.

    Notes
    -----
    An fd that the process closes, and opens anew as another file meanwhile, is noticed: the duplicate is looked at.

    Two files are of the same VM or vCPU if they are duplicates (``kcmp(2)``); or if the process has one VM, both have
    the same id, and each counter of the one keeps in step with the other's. In a process with several VMs, ids are
    ambiguous, and files that were opened apart are all kept.
    """
    has_one_vm = len(process.group(file for file in files if file.kind == "vm" and not file.is_stats)) == 1
    with ExitStack() as opened:
        copies = (_take(process, file) for file in files if file.is_stats)
        taken = [opened.enter_context(copy) for copy in copies if copy is not None]
        kept = _drop_duplicates(taken, known, has_one_vm=has_one_vm)
        opened.pop_all()
    return kept


def _take(process: Process, file: KvmFile) -> StatsFile | None:
    """Return a duplicate of a stats file that a held process has open; None if it was closed meanwhile."""
    try:
        copy = process.take(file.fd)
    except OSError as error:
        process.check_alive()
        raise refused(f"pidfd_getfd of fd {file.fd}", process.pid, error.errno or 0) from None
    if copy is None:
        return None
    what = kvm_file(str(Path(f"/proc/self/fd/{copy.fileno()}").readlink()), file.fd)
    if what is None or not what.is_stats:  # another file by now
        copy.close()
        return None
    stats = StatsFile(copy)
    stats.handle.owner = Owner(process.pid, fd=file.fd)
    return stats


def _drop_duplicates(files: list[StatsFile], known: Sequence[StatsFile], *, has_one_vm: bool) -> list[StatsFile]:
    """Sort the files, and close those of the same VM or vCPU as one before."""
    kept: dict[str, list[StatsFile]] = {}
    for file in sorted(files, key=lambda file: (by_vcpu(file), find_known(file, known) is None)):
        alike = kept.setdefault(file.id, [])
        if any(_is_duplicate(file, other) or (has_one_vm and _is_in_step(file, other)) for other in alike):
            file.close()
        else:
            alike.append(file)
    return [file for alike in kept.values() for file in alike]


def by_vcpu(file: StatsFile) -> int:
    """Return what to sort files by: those of VMs, then of vCPUs by number."""
    return -1 if file.vcpu_id is None else file.vcpu_id


def find_known(file: StatsFile, known: Sequence[StatsFile]) -> StatsFile | None:
    """Return the file among those borrowed before; by its id, if the kernel has no kcmp(2)."""
    for one in known:
        if one.id == file.id and not one.closed:
            answer = _compare(file, one)
            if answer == 1 or answer < 0:
                return one
    return None


def _is_duplicate(file: StatsFile, other: StatsFile) -> bool:
    return _compare(file, other) == 1


def _compare(file: StatsFile, other: StatsFile) -> int:
    own = os.getpid()
    return int(lib.kvmstats_same_file(own, file.fileno(), own, other.fileno()))


def _is_in_step(file: StatsFile, other: StatsFile) -> bool:
    """Return whether what only grows has grown alike in both, as it must in files of one VM or vCPU."""
    if file.schema is not other.schema:
        return False
    before, between, after = file.read(), other.read(), file.read()
    words = [
        word
        for stat in file.schema.stats
        if stat.grows
        for word in range(stat.offset // 8, stat.offset // 8 + stat.size)
    ]
    return bool(((before[words] <= between[words]) & (between[words] <= after[words])).all())
