"""Which processes of this machine have VMs: what /proc says of their files, command lines and permissions."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from kvmstats_fast._kvmstats import lib
from kvmstats_fast.abi import KVM_LINK
from kvmstats_fast.vmm.refusal import reason_of_refusal

__all__ = ["HeldFile", "VmProcess", "find_vms", "may_attach"]

_NO_FD = 2**31 - 1  # above the largest value of the sysctl fs.nr_open, so no process can have it


class HeldFile(NamedTuple):
    """A stats file that a process has open.

    Attributes
    ----------
    kind : {"vm", "vcpu"}
    vcpu_id : int or None
        None for a VM's.
    fd : int
        Its number in that process.
    """

    kind: Literal["vm", "vcpu"]
    vcpu_id: int | None
    fd: int


@dataclass(frozen=True, slots=True)
class VmProcess:
    """A process that has files of KVM open, or may have.

    Attributes
    ----------
    pid : int
    vmm : str
        The VMM's program, as ``"qemu-system-x86_64"``: the name of its file, or where that may not be seen, what its
        command line or ``comm`` calls it.
    name : str
        Name of the guest, where the command line tells it: QEMU ``-name``, Firecracker ``--id``, crosvm and kvmtool
        ``--name``. Otherwise empty; cloud-hypervisor has no such option. Nothing makes it unique.
    uid : int
        Its real user.
    vms : int or None
        How many VMs it has open. None if its files may not be seen.
    vcpus : tuple of int, or None
        Ids of the vCPUs it has open, ascending; with several VMs one may occur several times. None as above.
    held : tuple of HeldFile, or None
        The stats files it has open, by fd. None as above.
    start_time : int
        When it started, in clock ticks since boot (field 22 of ``/proc/PID/stat``). Two looks that agree in pid and
        start_time saw the same process.
    attachable : bool
        Whether this process may take fds from it (``pidfd_getfd(2)``): the kernel's own answer, of that moment.
    why_not : str
        Why it may not; empty if it may. What helps is in the error of `attach`.
    """

    pid: int
    vmm: str
    name: str
    uid: int
    vms: int | None
    vcpus: tuple[int, ...] | None
    held: tuple[HeldFile, ...] | None
    start_time: int
    attachable: bool
    why_not: str


def find_vms(proc: str | os.PathLike[str] = "/proc") -> list[VmProcess]:
    """Find the processes that have VMs, vCPUs or their stats files open.

    Parameters
    ----------
    proc : path
        Where the proc file system is. If it is not that of this process' own pid namespace (the host's in a container,
        a copy), nothing in it is attachable.

    Returns
    -------
    list of VmProcess
        By pid. Threads are no processes of their own; a process that ends meanwhile is left out.

    Raises
    ------
    OSError
        If `proc` itself cannot be read.

    Notes
    -----
    The files of a process are shown to its own user, if it is dumpable, and as a rule to root
    (``PTRACE_MODE_READ_FSCREDS``, ``fs/proc/base.c``). Of any other only the names are known: if one of them is that of
    a known VMM (QEMU, Firecracker, cloud-hypervisor, crosvm, kvmtool), the process is listed with None for what is not
    known; if not, it is not listed. So without privilege a VM of another user's unknown VMM is missing, and so is what
    /proc hides altogether: processes of pid namespaces that are not inside the own one, and with the mount option
    ``hidepid`` those of other users.

    A VM or vCPU that a process has open several times counts once if the kernel can tell (``kcmp(2)``); otherwise each
    fd counts.
    """
    return scan(proc)[0]


def scan(proc: str | os.PathLike[str]) -> tuple[list[VmProcess], int]:
    """As `find_vms`; and how many processes show neither their files nor the name of a known VMM."""
    root = os.fspath(proc)
    own = is_own(root)
    found, unseen = [], 0
    for pid in sorted(int(name) for name in os.listdir(root) if name.isascii() and name.isdigit()):  # noqa: PTH208
        folder = f"{root}/{pid}"
        with suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):  # it has ended, or is none
            try:
                if files := _kvm_files(folder):
                    found.append(_seen(folder, pid, files, own=own))
            except PermissionError:  # perhaps by now only: it has changed its user, or guards itself
                process, hidden = _unseen(folder, pid, own=own)
                found += process
                unseen += hidden
    return found, unseen


def describe(pid: int) -> VmProcess | None:
    """As `find_vms`, for one process; None if it shows no file of KVM, or is not there."""
    folder = f"/proc/{pid}"
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if files := _kvm_files(folder):
            return _seen(folder, pid, files, own=True)
    return None


def may_attach(pid: int) -> str:
    """Ask the kernel whether this process may take fds from another one.

    Parameters
    ----------
    pid : int

    Returns
    -------
    str
        Why not; empty if it may.

    Notes
    -----
    ``pidfd_getfd(2)`` looks at the permission (``PTRACE_MODE_ATTACH_REALCREDS``, as for ``ptrace(2)``) before it looks
    for the fd (``kernel/pid.c``), so it is asked for an fd that no process can have: EBADF is a yes. That changes
    nothing; a security module may log a refusal. The answer is of that moment.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return _refusal("pidfd_open", pid, error.errno or 0)
    try:
        answer = -lib.kvmstats_getfd(pidfd, _NO_FD)
    finally:
        os.close(pidfd)
    return "" if answer == errno.EBADF else _refusal("pidfd_getfd", pid, answer)


def _refusal(call: str, pid: int, error: int) -> str:
    return "it has ended" if error == errno.ESRCH else f"{call}: {reason_of_refusal(pid, error)}"


def is_own(root: str) -> bool:
    """Whether the pids in it are those of our pid namespace: then self is what we are called."""
    try:
        return str(Path(root, "self").readlink()) == str(os.getpid())
    except OSError:
        return False


# ---- one process


class _KvmFile(NamedTuple):
    what: str  # vm, vcpu, vm-stats, vcpu-stats
    vcpu: int | None
    fd: int


def _kvm_files(folder: str) -> list[_KvmFile]:
    """KVM's files among those that a process has open."""
    files = []
    directory = os.open(f"{folder}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - what iterdir() adds is what takes the time
            try:
                link = os.readlink(name, dir_fd=directory)
            except FileNotFoundError:
                continue  # closed meanwhile
            if link.startswith("anon_inode:") and (match := KVM_LINK.fullmatch(link)):
                files.append(_KvmFile(match["what"], None if match["vcpu"] is None else int(match["vcpu"]), int(name)))
    finally:
        os.close(directory)
    return sorted(files, key=lambda file: file.fd)


def _seen(folder: str, pid: int, files: list[_KvmFile], *, own: bool) -> VmProcess:
    program = ""
    with suppress(FileNotFoundError):  # a process that is ending loses its program before its files
        program = Path(folder, "exe").readlink().name.removesuffix(" (deleted)")
    arguments = _arguments(folder)
    names = [name for name in (program, *_names(folder, arguments)) if name]
    vms, vcpus = _count(pid, files, own=own)
    held = [
        HeldFile("vm" if file.what == "vm-stats" else "vcpu", file.vcpu, file.fd)
        for file in files
        if file.what.endswith("-stats")
    ]
    why_not = _why_not(folder, pid, own=own)
    return VmProcess(
        pid=pid,
        vmm=names[0],
        name=_guest_name(_known(names), arguments),
        uid=_uid(folder),
        vms=vms,
        vcpus=vcpus,
        held=tuple(held),
        start_time=_start_time(folder),
        attachable=not why_not,
        why_not=why_not,
    )


def _unseen(folder: str, pid: int, *, own: bool) -> tuple[list[VmProcess], int]:
    """Describe a process by its names, if they are those of a known VMM; 1: they are not, but it may be one."""
    try:
        arguments = _arguments(folder)
        names = _names(folder, arguments)
    except PermissionError:  # hidepid
        return [], 1
    if not arguments:  # a kernel thread, or one that has ended and was not waited for
        return [], 0
    vmm = _known(names)
    if vmm is None:
        return [], 1
    why_not = _why_not(folder, pid, own=own) or reason_of_refusal(pid, errno.EACCES)
    process = VmProcess(
        pid=pid,
        vmm=next(name for name in names if vmm.program.match(name)),
        name=_guest_name(vmm, arguments),
        uid=_uid(folder),
        vms=None,
        vcpus=None,
        held=None,
        start_time=_start_time(folder),
        attachable=False,
        why_not=why_not,
    )
    return [process], 0


def _why_not(folder: str, pid: int, *, own: bool) -> str:
    return may_attach(pid) if own else f"{folder} is not of this process' pid namespace"


def _count(pid: int, files: list[_KvmFile], *, own: bool) -> tuple[int, tuple[int, ...]]:
    """How many VMs there are, and the ids of the vCPUs: of several fds for one open file, one counts."""
    different: list[_KvmFile] = []
    for file in files:
        if file.what.endswith("-stats"):
            continue
        same = [one.fd for one in different if (one.what, one.vcpu) == (file.what, file.vcpu)] if own else []
        if all(lib.kvmstats_same_file(pid, file.fd, fd) != 1 for fd in same):
            different.append(file)
    vcpus = sorted(file.vcpu for file in different if file.what == "vcpu" and file.vcpu is not None)
    return sum(file.what == "vm" for file in different), tuple(vcpus)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _arguments(folder: str) -> list[str]:
    raw = Path(folder, "cmdline").read_bytes()
    return [_text(word) for word in raw.removesuffix(b"\0").split(b"\0")] if raw else []


def _names(folder: str, arguments: list[str]) -> list[str]:
    """Return what it calls itself: the first word of the command line, and comm."""
    comm = _text(Path(folder, "comm").read_bytes()).removesuffix("\n")
    return [*(word.rpartition("/")[2] for word in arguments[:1]), comm]


def _uid(folder: str) -> int:
    match = re.search(rb"^Uid:\s*(\d+)", Path(folder, "status").read_bytes(), re.MULTILINE)
    return int(match[1]) if match else -1


def _start_time(folder: str) -> int:
    # comm, in parentheses, may have parentheses and blanks itself.
    return int(Path(folder, "stat").read_bytes().rpartition(b")")[2].split()[19])


# ---- names


class _Vmm(NamedTuple):
    program: re.Pattern[str]  # of the first 15 characters, which is all that comm has
    option: str  # that names the guest; empty if there is none


#: Sources: QEMU's qemu-options.hx and util/qemu-option.c; src/firecracker/src/main.rs of Firecracker;
#: cloud-hypervisor/src/main.rs; src/crosvm/cmdline.rs of crosvm (--name since 2024); builtin-run.c of kvmtool.
_QEMU = _Vmm(re.compile(r"qemu-system-|qemu-kvm|kvm$"), "-name")
_VMMS = (
    _QEMU,
    _Vmm(re.compile(r"firecracker(?!-containerd)"), "--id"),
    _Vmm(re.compile(r"cloud-hyperviso"), ""),
    _Vmm(re.compile(r"crosvm"), "--name"),
    _Vmm(re.compile(r"lkvm$|lkvm-static$|kvmtool$"), "--name"),
)


def _known(names: list[str]) -> _Vmm | None:
    return next((vmm for name in names for vmm in _VMMS if vmm.program.match(name)), None)


def _guest_name(vmm: _Vmm | None, arguments: list[str]) -> str:
    if vmm is None or not vmm.option:
        return ""
    if vmm is _QEMU:
        return _qemu_name(arguments)
    for word, following in pairwise([*arguments, ""]):
        if word == "--":
            break
        if word == vmm.option:
            return following
        if word.startswith(vmm.option + "="):
            return word.partition("=")[2]
    return ""


def _qemu_name(arguments: list[str]) -> str:
    """Value of ``-name guest=NAME,...`` or ``-name NAME,...``; a comma in it is doubled, and the last option wins."""
    guest = ""
    for word, value in pairwise(arguments):
        if word in ("-name", "--name"):
            for i, part in enumerate(re.findall(r"[^,]*(?:,,[^,]*)*", value)):
                key, equals, rest = part.partition("=")
                if not equals or "," in key:
                    key, rest = ("guest", part) if i == 0 else (part, "")
                if key == "guest":
                    guest = rest.replace(",,", ",")
    return guest
