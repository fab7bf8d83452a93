"""Stats files that another process holds: duplicates of its fds, by pidfd_getfd(2)."""

from __future__ import annotations

import errno
import os
import select
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._kvmstats import lib
from kvmstats_fast.abi import KVM_LINK, StatType
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.stats_file import StatsFile
from kvmstats_fast.vmm.find import is_own
from kvmstats_fast.vmm.refusal import explain_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["borrow"]

_STATS = {"vm-stats", "vcpu-stats"}


def borrow(pid: int, fds: Iterable[int] | None = None, *, known: Sequence[StatsFile] = ()) -> list[StatsFile]:
    """Open, here, the stats files that another process has open.

    Parameters
    ----------
    pid : int
        The process. It need not help, nor notice.
    fds : iterable of int, optional
        Which of its fds; default: all its stats files, without those that mean the same VM or vCPU.
    known : sequence of StatsFile
        Borrowed before: of several that mean the same, a duplicate of one of these is kept.

    Returns
    -------
    list of StatsFile
        The caller's to close: files of VMs first, then of vCPUs by number. In the order of `fds`, if they are given. An
        empty list if the process holds none, or if it closed them meanwhile.

    Raises
    ------
    VmGoneError
        If there is no such process, or it ended meanwhile.
    AttachError
        If the kernel refuses, with the reason and what to do; or if one of `fds` is not open or no stats file.
    FormatError
        If a file is no stats file that can be read.

    Notes
    -----
    The process is held by a pidfd before anything is read of it, so a later one of the same pid is never taken for it;
    an fd that it closes and opens anew as another file meanwhile is noticed, because the copy is looked at.

    Two files mean the same if they are duplicates (kcmp), or if the process has one VM, both have the same id, and no
    counter of the one is out of step with the other's. In a process with several VMs, ids are ambiguous, and files that
    were opened apart are all kept.
    """
    with hold_process(pid) as pidfd, ExitStack() as opened:
        links = _links(pid, pidfd)
        if fds is None:
            numbers = sorted(fd for fd, link in links.items() if _what(link) in _STATS)
        else:
            numbers = [_checked(pid, fd, links) for fd in fds]
        files = []
        for fd in numbers:
            if (file := _take(pid, pidfd, fd)) is not None:
                files.append(opened.enter_context(file))
            elif fds is not None:
                raise AttachError(errno.EBADF, f"process {pid} closed its fd {fd} just now")
        if fds is None:
            files = _distinct(files, known, only_one_vm=_has_one_vm(pid, links))
        opened.pop_all()
    return files


@contextmanager
def hold_process(pid: int) -> Iterator[int]:
    """Hold a pidfd for the block."""
    if pid <= 0:
        raise ValueError(f"{pid} is no pid: it must be positive")
    check_proc(pid)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as failure:
        error = failure.errno or 0
        if error in (errno.EINVAL, errno.ENOENT):  # the second since Linux 6.15
            hint = "pass the pid of its process (Tgid in its status)"
            raise AttachError(error, f"pidfd_open: {pid} is a thread: {hint}") from None
        raise _refused("pidfd_open", pid, error) from None
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def check_proc(pid: int) -> None:
    """Refuse a /proc that shows another process of that number than the kernel's calls mean."""
    if not is_own("/proc"):
        raise AttachError(
            errno.ENXIO,
            f"/proc is not that of this process' pid namespace, so its process {pid} is another one than the kernel's: "
            "mount the namespace's own (`unshare --mount-proc`), or run this in the namespace that /proc is of "
            "(`nsenter --target PID --pid --mount`)",
        )


def check_alive(pid: int, pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(0):
        raise VmGoneError(errno.ESRCH, f"process {pid} has ended")


def _refused(call: str, pid: int, error: int) -> AttachError:
    kind = VmGoneError if error == errno.ESRCH else AttachError
    return kind(error, f"{call} of process {pid}: {os.strerror(error)}; {explain_refusal(pid, error)}")


def _links(pid: int, pidfd: int) -> dict[int, str]:
    """Return what /proc calls each fd of the process."""
    folder = f"/proc/{pid}/fd"
    links = {}
    try:
        for name in os.listdir(folder):  # noqa: PTH208 - names are what is wanted
            with suppress(FileNotFoundError):  # closed meanwhile
                links[int(name)] = str(Path(folder, name).readlink())
    except OSError as error:
        check_alive(pid, pidfd)
        raise _refused(f"reading {folder}", pid, error.errno or 0) from None
    # As long as the process lives, its pid is its own: all that was read just now is about it.
    check_alive(pid, pidfd)
    return links


def _what(link: str) -> str:
    match = KVM_LINK.fullmatch(link)
    return match["what"] if match else ""


def _checked(pid: int, fd: int, links: dict[int, str]) -> int:
    if fd not in links:
        raise AttachError(errno.EBADF, f"process {pid} has no fd {fd} open")
    if _what(links[fd]) not in _STATS:
        raise AttachError(errno.EINVAL, f"fd {fd} of process {pid} is no stats file but {links[fd]}")
    return fd


def _take(pid: int, pidfd: int, fd: int) -> StatsFile | None:
    """Duplicate the process' stats fd; None if it was closed meanwhile."""
    copy = lib.kvmstats_getfd(pidfd, fd)
    if copy == -errno.EBADF:
        return None
    if copy < 0:
        check_alive(pid, pidfd)
        raise _refused(f"pidfd_getfd of fd {fd}", pid, -copy)
    try:
        if _what(str(Path(f"/proc/self/fd/{copy}").readlink())) in _STATS:
            return StatsFile(copy)
    except BaseException:
        os.close(copy)
        raise
    os.close(copy)  # another file by now
    return None


def _has_one_vm(pid: int, links: dict[int, str]) -> bool:
    """Whether all VM fds of the process are duplicates of one."""
    first, *rest = [fd for fd, link in links.items() if _what(link) == "vm"] or [-1]
    return first >= 0 and all(lib.kvmstats_same_file(pid, first, fd) == 1 for fd in rest)


def _distinct(files: list[StatsFile], known: Sequence[StatsFile], *, only_one_vm: bool) -> list[StatsFile]:
    """Sort the files, and close those that mean the same as one before."""
    kept: dict[str, list[StatsFile]] = {}
    for file in sorted(files, key=lambda file: (by_vcpu(file), known_as(file, known) is None)):
        like = kept.setdefault(file.id, [])
        if any(same_file(file, other) or (only_one_vm and _in_step(file, other)) for other in like):
            file.close()
        else:
            like.append(file)
    return [file for like in kept.values() for file in like]


def by_vcpu(file: StatsFile) -> int:
    """Key to sort files by: those of VMs, then of vCPUs by number."""
    return -1 if file.vcpu_id is None else file.vcpu_id


def same_file(file: StatsFile, other: StatsFile) -> bool:
    """Whether two are duplicates of one open file; False if the kernel has no kcmp(2)."""
    return bool(lib.kvmstats_same_file(os.getpid(), file.fileno(), other.fileno()) == 1)


def known_as(file: StatsFile, known: Sequence[StatsFile]) -> StatsFile | None:
    """Find the file among those that were borrowed before; by its id, if the kernel has no kcmp(2)."""
    for one in known:
        if one.id == file.id and not one.closed:
            answer = lib.kvmstats_same_file(os.getpid(), file.fileno(), one.fileno())
            if answer == 1 or answer < 0:
                return one
    return None


def _in_step(file: StatsFile, other: StatsFile) -> bool:
    """Whether what only grows has grown alike in both, as it must if they are of one VM or vCPU."""
    if file.schema is not other.schema:
        return False
    before, between, after = file.read(), other.read(), file.read()
    growing = [stat for stat in file.schema.stats if stat.type != StatType.INSTANT and isinstance(stat.type, StatType)]
    words = [word for stat in growing for word in range(stat.offset // 8, stat.offset // 8 + stat.size)]
    return bool(((before[words] <= between[words]) & (between[words] <= after[words])).all())
