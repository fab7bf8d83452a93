"""Why the kernel refuses one process the files of another, and what to do about it.

`facts_of` gathers the facts, and `explain` works out what they mean, in the order in which the kernel decides:
``__ptrace_may_access`` of ``kernel/ptrace.c`` with ``PTRACE_MODE_ATTACH_REALCREDS`` (which is what pidfd_getfd(2) asks
for), ``cap_ptrace_access_check`` of ``security/commoncap.c``, and ``Documentation/admin-guide/LSM/Yama.rst``.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.ways import HAND_OVER, HOLD

if TYPE_CHECKING:
    from collections.abc import Callable

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SYS_PTRACE = 1 << 1, 1 << 2, 1 << 19  # include/uapi/linux/capability.h
_FIRST_USER_NAMESPACE = "user:[4026531837]"  # include/linux/proc_ns.h: PROC_USER_INIT_INO
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


@dataclass(frozen=True)
class Facts:
    """What decides whether this process may take a file of process `pid`.

    Attributes
    ----------
    pid : int
        The other process.
    errno : int
        What the kernel answered.
    visible : bool
        Whether ``/proc/PID`` is there.
    my_ids, ids : tuple of int
        This process' real uid and gid; the other's real, effective and saved uid and then gid (empty: not known).
    capable : bool
        Whether this process has CAP_SYS_PTRACE.
    reads_all : bool
        Whether it has CAP_DAC_READ_SEARCH or CAP_DAC_OVERRIDE: ``/proc/PID/fd`` is a folder of the other process' user,
        or of root if that is not dumpable, and CAP_SYS_PTRACE does not open it.
    more_capable : bool
        Whether the other process has capabilities that this one lacks.
    dumpable : bool
        False if the kernel guards its memory: it was setuid, unreadable, or asked for it (``PR_SET_DUMPABLE``).
    descendant : bool
        Whether it is a child of this process, or a child's child.
    yama : int or None
        ``kernel.yama.ptrace_scope``; None where the kernel has no Yama.
    other_user_namespace : bool
        Whether it appears to be in another user namespace, where this process' capabilities may not count.
    filtered : bool
        Whether this process has a seccomp filter, as containers have.
    """

    pid: int
    errno: int
    visible: bool = True
    my_ids: tuple[int, int] = (0, 0)
    ids: tuple[int, ...] = ()
    capable: bool = False
    reads_all: bool = False
    more_capable: bool = False
    dumpable: bool = True
    descendant: bool = False
    yama: int | None = None
    other_user_namespace: bool = False
    filtered: bool = False


def explain_refusal(pid: int, error: int) -> str:
    """Return why the kernel answered `error` when a file of process `pid` was asked for, and what helps.

    Parameters
    ----------
    pid : int
        The other process, as this process' pid namespace numbers it.
    error : int
        Errno of pidfd_open(2), pidfd_getfd(2), or of reading ``/proc/PID/fd``.

    Returns
    -------
    str
        The reason, and the remedies, the one that needs the least privilege first.

    Notes
    -----
    The facts are looked up now, after the refusal: a process that ends or changes its user meanwhile gets the
    explanation of what it is now.
    """
    return explain(facts_of(pid, error))


def refused(call: str, pid: int, error: int) -> AttachError:
    """Return the exception for a call that asked for process `pid` and was answered with this errno."""
    kind = VmGoneError if error == errno.ESRCH else AttachError
    return kind(error, f"{call} of process {pid}: {os.strerror(error)}; {explain_refusal(pid, error)}")


def reason_of_refusal(pid: int, error: int) -> str:
    """Return the reason that `explain_refusal` gives, without the remedies."""
    return _reason_and_remedies(facts_of(pid, error))[0]


def facts_of(pid: int, error: int) -> Facts:
    """Return what `explain` needs, looked up now; what cannot be looked up keeps its default."""
    me, process = Process(os.getpid()), Process(pid)
    mine, theirs = me.status(), {}
    dumpable = True
    with suppress(OSError):
        process.find_live_thread()
        theirs = process.status()
        dumpable = process.owner() == _numbers(theirs, "Uid")[1]
    return Facts(
        pid,
        error,
        visible=bool(theirs),
        my_ids=(os.getuid(), os.getgid()),
        ids=(*_numbers(theirs, "Uid")[:3], *_numbers(theirs, "Gid")[:3]),
        capable=bool(_hex(mine, "CapEff") & _CAP_SYS_PTRACE),
        reads_all=bool(_hex(mine, "CapEff") & (_CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH)),
        more_capable=bool(_hex(theirs, "CapPrm") & ~_hex(mine, "CapPrm")),
        dumpable=dumpable,
        descendant=_descends(pid),
        yama=_yama(),
        other_user_namespace=_in_other_user_namespace(process, me),
        filtered=mine.get("Seccomp", "0") != "0",
    )


def explain(facts: Facts) -> str:
    """Return the reason and its remedies as text; a pure function of the facts."""
    reason, remedies = _reason_and_remedies(facts)
    if len(remedies) == 1:
        return f"{reason}. What helps: {remedies[0]}"
    listed = "; ".join(f"({i}) {remedy}" for i, remedy in enumerate(remedies, 1))
    return f"{reason}. What helps, the least privilege first: {listed}"


def _reason_and_remedies(facts: Facts) -> tuple[str, list[str]]:
    row = next(row for row in _TABLE if row.applies(facts))
    uid, gid = (facts.ids[1], facts.ids[4]) if facts.ids else (None, None)
    known = {"pid": facts.pid, "uid": uid, "gid": gid, "me": facts.my_ids, "yama": facts.yama}
    reason = row.reason.format(said=os.strerror(facts.errno), **known)
    return reason, [remedy.format(**known) for remedy in row.remedies]


def _numbers(status: dict[str, str], name: str) -> list[int]:
    return [int(word) for word in status.get(name, "").split()]


def _hex(status: dict[str, str], name: str) -> int:
    return int(status.get(name, "0"), 16)


def _yama() -> int | None:
    with suppress(OSError, ValueError):
        return int(_YAMA.read_text())
    return None


def _descends(pid: int) -> bool:
    me = os.getpid()
    while pid > 1:
        try:
            pid = int(Process(pid).status()["PPid"])
        except (OSError, KeyError):
            return False
        if pid == me:
            return True
    return False


def _in_other_user_namespace(process: Process, me: Process) -> bool:
    mine = me.user_namespace()
    try:
        return process.user_namespace() != mine
    except PermissionError:  # as where no capability of ours counts: then it is likely, if ours is not the first one
        return mine != _FIRST_USER_NAMESPACE
    except OSError:
        return False


class _Row(NamedTuple):
    applies: Callable[[Facts], bool]
    reason: str
    remedies: tuple[str, ...]


def _forbidden(facts: Facts) -> bool:
    return facts.errno in (errno.EPERM, errno.EACCES)


def _guarded(facts: Facts) -> bool:
    """Return whether only CAP_SYS_PTRACE would help where something else is missing, too."""
    return _forbidden(facts) and not facts.capable


def _of_another(facts: Facts) -> bool:
    return _guarded(facts) and bool(facts.ids) and facts.ids != (facts.my_ids[0],) * 3 + (facts.my_ids[1],) * 3


def _is_anothers_folder(facts: Facts) -> bool:
    return bool(facts.ids) and (facts.ids[1] != facts.my_ids[0] or not facts.dumpable)


_CAPABILITY = (
    "give this process CAP_SYS_PTRACE alone (a systemd unit's AmbientCapabilities=CAP_SYS_PTRACE, "
    "`setpriv --inh-caps +sys_ptrace --ambient-caps +sys_ptrace`, a container's `--cap-add SYS_PTRACE`)"
)
_CAPABILITIES = (
    "give this process CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH alone (a systemd unit's "
    "AmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH, `setpriv --inh-caps +sys_ptrace,+dac_read_search "
    "--ambient-caps +sys_ptrace,+dac_read_search`, a container's `--cap-add SYS_PTRACE --cap-add DAC_READ_SEARCH`)"
)
_ROOT = "run this as root"
_NAMESPACE = (
    "run this in the VMM's pid namespace, or in the host's (`nsenter --target PID --pid --mount`, a container's "
    "`--pid host`)"
)

#: The first row that applies is the answer: the kernel's own order.
_TABLE = (
    _Row(
        lambda facts: facts.errno == errno.ENOSYS,
        "this kernel has no pidfd_getfd, which came with Linux 5.6, or a container's filter hides it",
        (HAND_OVER.advice, "use a newer kernel, or a container with CAP_SYS_PTRACE"),
    ),
    _Row(
        lambda facts: facts.errno == errno.ENOTSUP,
        "the first thread of process {pid} has ended, and before Linux 6.9 files cannot be taken through another one",
        (HAND_OVER.advice, "use a newer kernel"),
    ),
    _Row(
        lambda facts: facts.errno == errno.EMFILE,
        "this process has as many files open as it may",
        ("raise `ulimit -n` (RLIMIT_NOFILE)",),
    ),
    _Row(
        lambda facts: facts.errno == errno.ENFILE,
        "the machine has as many files open as it may",
        ("raise the sysctl fs.file-max",),
    ),
    _Row(
        lambda facts: _forbidden(facts) and not facts.visible,
        "process {pid} cannot be seen here: /proc is mounted with hidepid, which hides the processes of other users",
        ("run this as the VMM's user", "join the group that /proc's mount option gid= names", _CAPABILITIES),
    ),
    _Row(
        lambda facts: not facts.visible,
        "process {pid} has ended, or cannot be seen from here. Possible causes: it is in another pid namespace; /proc "
        "is mounted with hidepid",
        (
            "take the pid that this process' own /proc shows (NSpid in /proc/PID/status on the host has both)",
            _NAMESPACE,
        ),
    ),
    _Row(
        lambda facts: not _forbidden(facts),
        "the kernel says: {said}",
        (HAND_OVER.advice,),
    ),
    _Row(
        lambda facts: _of_another(facts) and len(set(facts.ids[:3])) == len(set(facts.ids[3:])) == 1,
        "process {pid} runs as uid {uid} and gid {gid}, this one as uid {me[0]} and gid {me[1]}: both must be the same",
        (
            "run this as its user (`setpriv --reuid {uid} --regid {gid} --clear-groups`)",
            HAND_OVER.advice,
            _CAPABILITIES,
            _ROOT,
        ),
    ),
    _Row(
        _of_another,
        "process {pid} runs as uid {uid} and gid {gid}, but has other real or saved ids: all must be uid {me[0]} and "
        "gid {me[1]}, as those of this process are",
        (HAND_OVER.advice, _CAPABILITIES, _ROOT),
    ),
    _Row(
        lambda facts: _guarded(facts) and not facts.dumpable,
        "the kernel guards process {pid}. Possible causes: it changed its user; its program is setuid or not readable; "
        "it asked for that (PR_SET_DUMPABLE)",
        (HAND_OVER.advice, _CAPABILITIES, _ROOT),
    ),
    _Row(
        lambda facts: facts.yama is not None and facts.yama >= 3,
        "kernel.yama.ptrace_scope is {yama}: nobody may attach to a process, not even root",
        (
            HAND_OVER.advice,
            "boot with a lower kernel.yama.ptrace_scope: this value cannot be lowered before the next boot",
        ),
    ),
    _Row(
        lambda facts: _guarded(facts) and facts.yama == 2,
        "kernel.yama.ptrace_scope is 2: only a process with CAP_SYS_PTRACE may attach to another one",
        (
            HAND_OVER.advice,
            _CAPABILITY,
            _ROOT,
            "for the whole machine: sysctl kernel.yama.ptrace_scope=1, which allows a process its children",
        ),
    ),
    _Row(
        lambda facts: _guarded(facts) and facts.yama == 1 and not facts.descendant,
        "kernel.yama.ptrace_scope is 1: a process may attach to its children only, and process {pid} is not "
        "one of this process' children",
        (
            HOLD.advice,
            "let the VMM name this process (PR_SET_PTRACER)",
            HAND_OVER.advice,
            _CAPABILITY,
            _ROOT,
            "for the whole machine: sysctl kernel.yama.ptrace_scope=0",
        ),
    ),
    _Row(
        lambda facts: _guarded(facts) and facts.more_capable,
        "process {pid} has capabilities that this process lacks",
        ("run the VMM without them, or this process with the same ones", HAND_OVER.advice, _CAPABILITY, _ROOT),
    ),
    _Row(
        lambda facts: facts.other_user_namespace,
        "process {pid} appears to be in another user namespace, where the capabilities of this process do not count",
        ("run this in the VMM's user namespace, or in one above it (on the host)", HAND_OVER.advice),
    ),
    _Row(
        lambda facts: facts.errno == errno.EACCES and not facts.reads_all and _is_anothers_folder(facts),
        "/proc/{pid}/fd belongs to another user (to root, if the kernel guards process {pid}), and CAP_SYS_PTRACE, "
        "which this process has, does not open it",
        (HAND_OVER.advice, _CAPABILITIES, _ROOT),
    ),
    _Row(
        lambda facts: facts.filtered,
        "a seccomp filter of this process, such as a container's, or a security module (SELinux, AppArmor) forbids it",
        (
            HAND_OVER.advice,
            "use a container with CAP_SYS_PTRACE, which the usual filter takes into account",
            "allow it in the module's policy",
        ),
    ),
    _Row(
        lambda _: True,
        "probably a security module (SELinux, AppArmor) forbids it",
        (
            HAND_OVER.advice,
            "allow it in the module's policy; its log names the rule (`dmesg`, `ausearch -m avc`)",
        ),
    ),
)
