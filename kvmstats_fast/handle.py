"""Handle: what a StatsFile has open, for the rooms that read it without its methods."""

from __future__ import annotations

import errno
import os
from copy import copy
from functools import cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

from kvmstats_fast._resource import Fd, describe_fd
from kvmstats_fast._text import printable
from kvmstats_fast.errors import truncated

_NOT_A_STATS_FILE = "this is not a stats file; to open that of a VM or vCPU fd, use StatsFile.open(fd)"
_READ_HINTS = {
    errno.EBADF: "the fd is not open, or not open for reading: was it closed elsewhere?",
    errno.EINVAL: _NOT_A_STATS_FILE,
    errno.ESPIPE: _NOT_A_STATS_FILE,
    errno.EISDIR: _NOT_A_STATS_FILE,
    errno.EIO: "the kernel cannot read it; for a stats file this means that its VM refuses",
    errno.EPERM: "a security module or seccomp filter of this process forbids the call",
    errno.EACCES: "a security module of this process forbids the call",
    errno.EFAULT: "on a kernel with the original patch series this means that the VM is gone: close its stats files "
    "before the VM",
}


def refused(error: int, call: str, fd: int, hints: dict[int, str]) -> OSError:
    """Return the kernel's refusal as an OSError that says which call, on which fd, and what to do."""
    hint = hints.get(error)
    return OSError(error, f"{call} on {describe_fd(fd)}: {os.strerror(error)}" + (f"; {hint}" if hint else ""))


def read_refused(error: int, fd: int) -> OSError:
    """Return what to raise when pread was refused with this errno."""
    return refused(error, "pread", fd, _READ_HINTS)


@cache
def null_fd() -> Fd:
    """Return an fd of ``/dev/null`` that stays open, so that it is there when too many others are."""
    return Fd(os.open, os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class Owner(NamedTuple):
    """Whose file it is: the VMM that created the VM, as far as that is known.

    Attributes
    ----------
    pid : int or None
        Of the VMM.
    name : str
        Of the guest; empty if not known.
    vm, host : str
        Label of the VM, and the host on which it is; empty for what is known otherwise (`FileInfo`).
    fd : int or None
        Its number in the VMM from which it was borrowed.
    machine : object
        The VirtualMachine that the file belongs to, kept so that its VMM is watched while one of its files is used.
    """

    pid: int | None = None
    name: str = ""
    machine: object = None
    fd: int | None = None
    vm: str = ""
    host: str = ""


_UNKNOWN = Owner()


class ThisProcess:
    """Whose files this process opens itself: its own, because the kernel opens those of the caller's VMs only.

    Attributes
    ----------
    owner : Owner
        Kept, because a system call and an object for each file would add a tenth to what it takes to open it.
    """

    owner: ClassVar[Owner] = Owner(os.getpid())


def _follow_fork() -> None:
    ThisProcess.owner = Owner(os.getpid())


os.register_at_fork(after_in_child=_follow_fork)


class Handle:
    """What a StatsFile has open.

    Attributes
    ----------
    fd : Fd
        It is owned if closing the StatsFile closes it.
    source : struct kvmstats_source *
        What the C core reads by. Its fd is -1 once the file is closed or revoked.
    owner : Owner
    lost : Exception or None
        Why the file was revoked.
    """

    __slots__ = ("_attached", "_id", "fd", "lost", "owner", "source")

    def __init__(self, fd: Fd, source: Any, file_id: str) -> None:
        self.owner = _UNKNOWN
        self.lost: Exception | None = None
        self.fd = fd
        self.source = source
        self._id = file_id
        self._attached: WeakValueDictionary[int, Handle] | None = None

    def attach(self, other: Handle) -> None:
        """Have another Handle, of what is read beside this file, closed and revoked with this one."""
        if self._attached is None:
            self._attached = WeakValueDictionary()
        self._attached[id(other)] = other
        if self.lost is not None:
            other.revoke(self.lost)  # meanwhile, by another thread
        elif self.closed:
            other.close()

    def _list_attached(self) -> list[Handle]:
        references = [] if self._attached is None else self._attached.valuerefs()
        return [other for reference in references if (other := reference()) is not None]

    @property
    def closed(self) -> bool:
        """Whether the file was closed or revoked."""
        closed: bool = self.source.fd < 0
        return closed

    def check_open(self) -> None:
        """Raise what keeps the file from being read: why it was revoked, or ValueError if it is closed."""
        if self.lost is not None:
            raise copy(self.lost)  # an error that is raised again keeps the frames of all whom it went through
        if self.closed:
            raise ValueError(f"this StatsFile ({printable(self._id)}) is closed; open the stats file again")

    def failure(self, error: int, got: int) -> Exception:
        """Return what to raise when the C core could not read.

        Parameters
        ----------
        error : int
            The errno.
        got : int
            With ENODATA: at which byte the file ended.
        """
        self.check_open()
        source = self.source
        if error == errno.ENODATA:
            return truncated(describe_fd(source.fd), got, source.position + source.count * source.value_size)
        return read_refused(error, source.fd)

    def close(self) -> None:
        """Close the fd, if it is owned; a second call does nothing."""
        self.source.fd = -1
        self.fd.close()
        if self._attached is not None:  # hardly ever
            for other in self._list_attached():
                other.close()

    def revoke(self, why: Exception) -> None:
        """Let go of the stats file while other threads may be reading it; from now on they get `why`.

        Its number stays taken, by ``/dev/null``, until `close`: a read that is under way finds nothing there, and never
        a file that was opened in the meantime.
        """
        if self.closed or not self.fd.owned:
            return
        null, self.lost = null_fd().fileno(), why
        self.source.fd = -1
        self.fd.replace(null)
        for other in self._list_attached():
            other.revoke(why)
