"""The ways to get at stats files, in the order in which a production host will like them.

Messages and the table of docs/attach.md quote them.
"""

from __future__ import annotations

from typing import NamedTuple


class Way(NamedTuple):
    """A way to get at the stats files of a VM.

    Attributes
    ----------
    name : str
    call : str
        What to write, as Markdown.
    needs : str
        What it takes.
    effect : str
        What happens to the VMM.
    advice : str
        What to do, to whom lacks stats files; the words of messages.
    """

    name: str
    call: str
    needs: str
    effect: str
    advice: str


BORROW = Way(
    "borrow",
    "`attach(pid)`",
    "a VMM that holds its stats files, which each of the next ways achieves, and permission to trace it",
    "none",
    "attach(pid) borrows the files that a VMM holds",
)
HOLD = Way(
    "hold",
    "`launch([...])`, `kvmstats run -- ...`, or `LD_PRELOAD`",
    "you start the VMM; no privilege",
    "one more ioctl when a VM or vCPU is created, and one more fd for as long as it lives",
    "start the VMM by launch(), by `kvmstats run`, or with LD_PRELOAD set to what `python -m kvmstats_fast hold-path` "
    "prints",
)
QEMU = Way(
    "QEMU 8.1",
    "`attach(pid)`",
    "QEMU 8.1 or later, which holds the files of its vCPUs, but not the VM's; permission to trace it",
    "none",
    "use QEMU 8.1 or later, which holds the files of its vCPUs",
)
HAND_OVER = Way(
    "hand over",
    "`send_files`, `receive_files`",
    "a VMM that you can change, and a Unix socket",
    "what you make it do",
    "let the VMM open its stats files and hand them over (send_files, SCM_RIGHTS), which needs no permission at all",
)
INHERIT = Way(
    "inherit",
    "`StatsFile(fd)`, `inherited_files()`",
    "a VMM that you can change, and that starts the monitor or keeps its files with systemd",
    "what you make it do",
    "let the VMM pass them to a monitor that it starts, or keep them with systemd (inherited_files)",
)
INJECT = Way(
    "inject",
    "`attach(pid, inject=True)`",
    "x86-64, permission to trace the VMM, no seccomp filter in it",
    "one thread at a time is stopped for a moment, and makes the ioctl",
    "where that is acceptable, attach(pid, inject=True), which is --inject",
)

#: `HOLD` for a domain of libvirt, which starts the VMM itself; docs/attach.md has the steps.
HOLD_DOMAIN = HOLD._replace(
    advice="it is a domain of libvirt: copy the hold library to where its QEMU can read it (`install -D -m 755 "
    '"$(kvmstats hold-path)" /usr/lib/kvmstats/libkvmstats-hold.so`), set LD_PRELOAD to the copy with <qemu:env> in '
    "the domain's XML, then `virsh destroy` and `virsh start` (a reboot keeps the old process)",
)

#: The least intrusive first.
WAYS = (BORROW, HOLD, QEMU, HAND_OVER, INHERIT, INJECT)


def advise(*, inject: bool = True, vcpus: bool = True, domain: bool = False) -> str:
    """Return what to do about stats files that a VMM does not hold, in order.

    Parameters
    ----------
    inject : bool
        Whether injection may be recommended: not to a VMM under a seccomp filter, nor where it was just refused.
    vcpus : bool
        Whether files of vCPUs are among them.
    domain : bool
        Whether libvirt started the VMM, which then is a QEMU that nobody changes.
    """
    ways = [HOLD_DOMAIN if domain else HOLD, *([QEMU] if vcpus else [])]
    ways += [] if domain else [HAND_OVER, INHERIT]
    ways += [INJECT] if inject else []
    *before, last = [way.advice for way in ways]
    return f"{'; '.join(before)}; or {last}" if before else last


def leave_out_advice(text: str) -> str:
    """Return the reason in a refusal, without what helps."""
    return split_advice(text)[0]


def split_advice(text: str) -> tuple[str, str]:
    """Return the reason in a refusal, and what helps, if that is said."""
    reason, _, helps = text.partition(". What helps")
    return reason, helps and f"What helps{helps}"
