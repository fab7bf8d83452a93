"""Which processes of this machine have VMs: what /proc says of their files, command lines and permissions."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvmstats_fast._text import printable
from kvmstats_fast.errors import AttachError
from kvmstats_fast.vmm.hazard import has_filter
from kvmstats_fast.vmm.mark import drop_dead
from kvmstats_fast.vmm.proc import KvmFile, Process, is_own
from kvmstats_fast.vmm.refusal import reason_of_refusal
from kvmstats_fast.vmm.ways import advise

if TYPE_CHECKING:
    from collections.abc import Callable


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
    """A process that has a VM or vCPUs open, or may have.

    Attributes
    ----------
    pid : int
    vmm : str
        The VMM's program, such as ``"qemu-system-x86_64"``: the name of its file, or if that is not accessible, the
        name on its command line or in ``comm``.
    name : str
        Name of the guest, if the command line has it: QEMU ``-name``, Firecracker ``--id``, crosvm and kvmtool
        ``--name``, StratoVirt ``-name``. Otherwise empty; cloud-hypervisor has no such option. It need not be unique.
    uid : int
        Its real user.
    vms : int or None
        Number of VMs it has open. None if its files are not accessible.
    vcpus : tuple of int, or None
        Ids of the vCPUs it has open, ascending; with several VMs an id may occur several times. None as above.
    held : tuple of HeldFile, or None
        The stats files it has open, by fd, but for those of VMs that are gone. None as above.
    start_time : int
        When it started, in clock ticks since boot (field 22 of ``/proc/PID/stat``). The same pid and start_time mean
        the same process.
    attachable : bool
        Whether this process may take fds from it (``pidfd_getfd(2)``): the kernel's own answer at that moment.
    why_not : str
        Why it may not; empty if it may. The error of `attach` says how to change that.
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
    """Find the processes that have VMs or vCPUs open.

    Parameters
    ----------
    proc : path
        Path of the proc file system. If it is not that of this process's own pid namespace (the host's in a container,
        a copy), nothing in it is attachable.

    Returns
    -------
    list of VmProcess
        Ordered by pid. Processes that exit meanwhile are left out, and so are monitors: processes that have stats files
        open but neither a VM nor a vCPU.

    Raises
    ------
    OSError
        If `proc` itself cannot be read.

    Notes
    -----
    The files of a process are visible to its own user if it is dumpable, and usually to root
    (``PTRACE_MODE_READ_FSCREDS``, ``fs/proc/base.c``). Of any other process only the names are visible. If one of them
    is that of a known VMM (QEMU, Firecracker, cloud-hypervisor, crosvm, kvmtool, StratoVirt), the process is listed
    with None for what is not known; otherwise it is left out. So without privilege, VMs of another user's unknown VMM
    are missing, and so are processes that /proc hides: those outside this pid namespace, and with the mount option
    ``hidepid`` those of other users.

    A VM or vCPU that a process has open several times counts once if the kernel can tell (``kcmp(2)``); otherwise each
    fd counts.
    """
    return scan(proc)[0]


def scan(proc: str | os.PathLike[str]) -> tuple[list[VmProcess], int]:
    """Return what `find_vms` does, and how many processes show neither their files nor the name of a known VMM."""
    root = os.fspath(proc)
    own = is_own(root)
    looks = [look_at(Process(pid, root, own=own)) for pid in list_pids(root)]
    return [look.vms for look in looks if look.vms is not None], sum(look.is_hidden for look in looks)


def list_pids(root: str = "/proc") -> list[int]:
    """Return the pids of a proc tree, ascending."""
    return sorted(int(name) for name in os.listdir(root) if name.isascii() and name.isdigit())  # noqa: PTH208


class Look(NamedTuple):
    """What a process shows.

    Attributes
    ----------
    vms : VmProcess or None
        None if it has no VM, or is not known to have one.
    is_hidden : bool
        Whether it shows neither its files nor the name of a known VMM, so that it may have one.
    """

    vms: VmProcess | None
    is_hidden: bool


def look_at(process: Process) -> Look:
    """Return what a process shows; one that has ended has no VM."""
    with suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):  # it has ended, or is none
        try:
            files = process.kvm_files()
            return Look(describe(process, drop_dead(process, files)) if has_vm(files) else None, False)
        except PermissionError:  # perhaps by now only: it has changed its user, or guards itself
            hidden = _describe_hidden(process)
            return Look(hidden, hidden is None and _has_program(process))
    return Look(None, False)


def may_have_vm(pid: int) -> bool:
    """Return whether a process has a VM, or is called like a known VMM, which may make one."""
    process = Process(pid)
    if look_at(process).vms is not None:
        return True
    with suppress(OSError):  # it has ended
        return _describe_hidden(process) is not None
    return False


def is_called(process: VmProcess, guest: str) -> bool:
    """Return whether the guest of a VMM has this name, or one that this glob fits."""
    return process.name == guest or fnmatchcase(process.name, guest)


def find_guests(guest: str) -> list[VmProcess]:
    """Return the VMMs whose guests have this name, or names that this glob fits; errors are those of `find_guest`."""
    return _find_called(guest, lambda process: is_called(process, guest))


def find_guest(name: str) -> int:
    """Return the pid of the VMM whose guest has this name.

    Raises
    ------
    ValueError
        If it is empty.
    AttachError
        If there is none, or more than one; the message says which there are.
    """
    pids = [str(one.pid) for one in _find_called(name, lambda process: process.name == name)]
    if len(pids) == 1:
        return int(pids[0])
    raise AttachError(
        errno.ENOTUNIQ, f"{len(pids)} VMs are called '{printable(name)}': pass the pid of one, {' or '.join(pids)}"
    )


def _find_called(guest: str, fits: Callable[[VmProcess], bool]) -> list[VmProcess]:
    if not guest:
        raise ValueError("the name of the guest is empty; a VM without a name is attached to by the pid of its VMM")
    found, hidden = scan("/proc")
    if chosen := [one for one in found if fits(one)]:
        return chosen
    from difflib import get_close_matches  # noqa: PLC0415 - for this message alone

    near = get_close_matches(guest, {one.name for one in found if one.name})
    text = f"no VM is called '{printable(guest)}'"
    text += f"; did you mean {' or '.join(map(printable, near))}?" if near else "."
    if hidden:
        text += f" Processes that may have one, but whose files this user may not see: {hidden}."
    text += " `kvmstats list` shows all VMs; one without a name is attached to by the pid of its VMM"
    raise AttachError(errno.ENOENT, text)


def may_attach(pid: int) -> str:
    """Ask the kernel whether this process may take fds from another one.

    Parameters
    ----------
    pid : int

    Returns
    -------
    str
        Why not; empty if it may. `Process.refusal` says how that is known.
    """
    try:
        process = Process.hold(pid)
    except OSError as error:
        return _say_refusal("pidfd_open", pid, error.errno or 0)
    with process:
        return _why_not(process)


# ---- one process


def describe(process: Process, files: list[KvmFile]) -> VmProcess:
    """Describe a process that shows its files, of which these are KVM's.

    Raises
    ------
    OSError
        As `Process` has it, if it guards itself by now or ends.
    """
    program, arguments = _program_name(process.program()), process.arguments()
    if _LINKER.fullmatch(program):
        arguments = _skip_linker(arguments)
        program = ""
    names = [name for name in (program, *_names(process, arguments)) if name]
    why_not = _why_not(process)
    return VmProcess(
        pid=process.pid,
        vmm=names[0],
        name=_guest_name(_known(names), arguments),
        uid=_uid(process),
        vms=len(process.group(file for file in files if file.kind == "vm" and not file.is_stats)),
        vcpus=vcpus_of(process, files),
        held=tuple(HeldFile(file.kind, file.vcpu_id, file.fd) for file in files if file.is_stats),
        start_time=process.start_time(),
        attachable=not why_not,
        why_not=why_not,
    )


def has_vm(files: list[KvmFile]) -> bool:
    """Return whether a VM or vCPU is among a process' files, not just stats files, which may be another's."""
    return any(not file.is_stats for file in files)


def is_domain(process: Process) -> bool:
    """Return whether libvirt started the process: it names files of its state folder (qemuDomainSetPrivatePaths)."""
    try:
        return any("/libvirt/qemu/" in argument for argument in process.arguments())
    except OSError:
        return False


def is_qemu(process: VmProcess) -> bool:
    """Return whether the VMM is QEMU, by the name of its program."""
    return _known([process.vmm]) is _QEMU


def advise_on(process: Process, *, inject: bool = True, vcpus: bool = True) -> str:
    """Return what to do about stats files that a VMM does not hold; `inject` and `vcpus` as `advise` has them."""
    return advise(inject=inject and not has_filter(process), vcpus=vcpus, domain=is_domain(process))


def say_holds_none(process: Process, vmm: str) -> str:
    """Return why a VMM that may be attached to has nothing to attach to, and what helps."""
    return (
        f"{printable(vmm)} (process {process.pid}) holds no stats files, and the kernel opens them only for the "
        f"process that made the VM. What helps, the least intrusive first: {advise_on(process)}"
    )


def vcpus_of(process: Process, files: list[KvmFile]) -> tuple[int, ...]:
    """Return the ids of the vCPUs that a process has open, ascending."""
    groups = process.group(file for file in files if file.kind == "vcpu" and not file.is_stats)
    return tuple(sorted(group[0].vcpu_id for group in groups if group[0].vcpu_id is not None))


def _describe_hidden(process: Process) -> VmProcess | None:
    """Describe a process that does not show its files, if its names are those of a known VMM."""
    try:
        arguments = process.arguments()
        if arguments and _LINKER.fullmatch(_program_name(arguments[0])):
            arguments = _skip_linker(arguments)
        names = _names(process, arguments)
    except PermissionError:  # hidepid
        return None
    vmm = _known(names)
    if vmm is None or not arguments:
        return None
    return VmProcess(
        pid=process.pid,
        vmm=next(name for name in names if vmm.program.match(name)),
        name=_guest_name(vmm, arguments),
        uid=_uid(process),
        vms=None,
        vcpus=None,
        held=None,
        start_time=process.start_time(),
        attachable=False,
        why_not=_why_not(process) or reason_of_refusal(process.pid, errno.EACCES),
    )


def _has_program(process: Process) -> bool:
    """Return whether it may run a program, which kernel threads do not."""
    try:
        return bool(process.arguments())
    except PermissionError:
        return True


def _why_not(process: Process) -> str:
    if not process.is_own:
        return f"{process.folder} is not of this process' pid namespace"
    if not process.is_held:
        return may_attach(process.pid)
    error = process.refusal()
    return _say_refusal("pidfd_getfd", process.pid, error) if error else ""


def _say_refusal(call: str, pid: int, error: int) -> str:
    return "it has ended" if error == errno.ESRCH else f"{call}: {reason_of_refusal(pid, error)}"


def _names(process: Process, arguments: list[str]) -> list[str]:
    """Return what it calls itself: the first word of the command line, and comm."""
    return [_program_name(name) for name in (*arguments[:1], process.comm())]


def _uid(process: Process) -> int:
    return int(process.status().get("Uid", "-1").split()[0])


# ---- names


class _Vmm(NamedTuple):
    program: re.Pattern[str]  # of the first 15 characters, which is all that comm has
    option: str  # that names the guest; empty if there is none


#: Sources: QEMU's qemu-options.hx and util/qemu-option.c; src/firecracker/src/main.rs of Firecracker;
#: cloud-hypervisor/src/main.rs; src/crosvm/cmdline.rs of crosvm (--name since 2024); builtin-run.c of kvmtool;
#: machine_manager/src/cmdline.rs of StratoVirt.
_QEMU = _Vmm(re.compile(r"qemu-system-|qemu-kvm|kvm$"), "-name")
_VMMS = (
    _QEMU,
    _Vmm(re.compile(r"firecracker(?!-containerd)"), "--id"),
    _Vmm(re.compile(r"cloud-hyperviso"), ""),
    _Vmm(re.compile(r"crosvm"), "--name"),
    _Vmm(re.compile(r"lkvm$|lkvm-static$|kvmtool$"), "--name"),
    _Vmm(re.compile(r"stratovirt"), "-name"),
)


#: The dynamic linker, called as a program: its options that take a word (glibc's elf/rtld.c, musl's ldso/dynlink.c).
_LINKER = re.compile(r"ld-linux.*\.so\.\d|ld-musl-.*\.so\.1|ld(64)?\.so\.\d|ld-\d.*\.so")
_LINKER_OPTIONS = {
    f"--{name}"
    for name in (
        *("library-path", "preload", "audit", "argv0", "inhibit-rpath"),
        *("glibc-hwcaps-prepend", "glibc-hwcaps-mask"),
    )
}


def _program_name(path: str) -> str:
    """Return the name of a program, without what NixOS' wrappers add: ``.qemu-kvm-wrapped``, cut short in comm."""
    name = path.rpartition("/")[2]
    bare = name.removeprefix(".").rstrip("_").removesuffix("-wrapped")
    return bare if name.startswith(".") and (bare != name[1:] or _known([bare])) else name


def _skip_linker(arguments: list[str]) -> list[str]:
    """Return the command line of the program that the dynamic linker runs."""
    words = iter(arguments[1:])
    for word in words:
        if word in _LINKER_OPTIONS:
            next(words, None)
        elif not word.startswith("--"):
            return [word, *words]
    return arguments


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
