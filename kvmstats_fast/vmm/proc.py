"""The one reader of /proc/PID: a process, its files of KVM, and which of them are one open file."""

from __future__ import annotations

import errno
import os
import re
import select
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvmstats_fast._kvmstats import lib
from kvmstats_fast._resource import Closing, Fd, HasFileno
from kvmstats_fast._unpatched import unpatched
from kvmstats_fast.abi import KVM_LINK
from kvmstats_fast.errors import VmGoneError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

_FEW_THREADS = 8  # to look at more of them takes as long as to look at the files
_NO_FD = 2**31 - 1  # above the largest value of the sysctl fs.nr_open, so no process can have it
_PIDFD_THREAD = os.O_EXCL  # include/uapi/linux/pidfd.h: a pidfd of a thread, Linux 6.9
_PIDFD_LINKS = ("anon_inode:[pidfd]", "pidfd:")  # before and since Linux 6.9
_PIDFD_PID = re.compile(rb"^Pid:\t(\d+)$", re.MULTILINE)  # fs/pidfs.c: pidfd_show_fdinfo
# include/linux/sched.h
_PF_EXITING = 0x4  # it is letting go of its files and memory
_PF_WORKERS = 0x10 | 0x4000 | 0x200000  # PF_IO_WORKER, PF_USER_WORKER, PF_KTHREAD


class KvmFile(NamedTuple):
    """A file of KVM that a process has open.

    Attributes
    ----------
    kind : {"vm", "vcpu"}
    vcpu_id : int or None
        None for a VM's.
    fd : int
        Its number in that process.
    is_stats : bool
        Whether it is the stats file of a VM or vCPU, not the VM or vCPU itself.
    """

    kind: Literal["vm", "vcpu"]
    vcpu_id: int | None
    fd: int
    is_stats: bool


def kvm_file(link: str, fd: int) -> KvmFile | None:
    """Return what a link in ``/proc/PID/fd`` says of a file of KVM, None for any other file."""
    match = KVM_LINK.fullmatch(link) if link.startswith("anon_inode:") else None
    if match is None:
        return None
    kind: Literal["vm", "vcpu"] = "vm" if match["what"].startswith("vm") else "vcpu"
    vcpu_id = None if match["vcpu"] is None else int(match["vcpu"])
    return KvmFile(kind, vcpu_id, fd, match["what"].endswith("-stats"))


def is_own(root: str) -> bool:
    """Return whether the pids in a proc tree are those of this process' pid namespace."""
    try:
        return str(Path(root, "self").readlink()) == str(os.getpid())
    except OSError:
        return False


def _is_readable(pidfd: HasFileno) -> bool:
    poll = unpatched("select", "poll")()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Process(Closing):
    """A process as ``/proc/PID`` shows it; made by `hold`, it is also held by a pidfd.

    A held process is never mistaken for a later one of the same pid: what was read is about it if it is alive
    afterwards (`check_alive`). Its first thread may end before the others (``pthread_exit`` in ``main``); then
    ``/proc/PID`` has no files, program or memory any more, and they are read through a thread that lives.

    Parameters
    ----------
    pid : int
    root : str
        Where the proc file system is.
    own : bool
        Whether `root` is that of this process' pid namespace, so that system calls mean the same process.

    Notes
    -----
    What the kernel refuses is raised as the OSError that it is: PermissionError, or FileNotFoundError and
    ProcessLookupError if the process has ended.
    """

    __slots__ = ("_own", "_pidfd", "_root", "_thread_pidfd", "_tid", "pid")

    def __init__(self, pid: int, root: str = "/proc", *, own: bool = True) -> None:
        self.pid = pid
        self._root = root
        self._own = own
        self._tid = pid  # the thread that it is looked at through
        self._pidfd: Fd | None = None
        self._thread_pidfd: Fd | None = None  # of that thread, if it is not the first

    @classmethod
    def hold(cls, pid: int) -> Self:
        """Return the process, held by a pidfd; OSError as pidfd_open(2) has it."""
        process = cls(pid)
        process._pidfd = Fd(os.pidfd_open, pid)
        return process

    @property
    def is_own(self) -> bool:
        """Whether system calls mean the same process by its pid."""
        return self._own

    @property
    def is_held(self) -> bool:
        """Whether a pidfd holds it."""
        return self._pidfd is not None and not self._pidfd.closed

    def close(self) -> None:
        """Let go of the process."""
        for pidfd in (self._pidfd, self._thread_pidfd):
            if pidfd is not None:
                pidfd.close()

    def fileno(self) -> int:
        """Return the pidfd, which polls readable when all threads have ended; ValueError if there is none."""
        if self._pidfd is None:
            raise ValueError(f"process {self.pid} is not held")
        return self._pidfd.fileno()

    # ---- whether it lives

    @property
    def ended(self) -> bool:
        """Whether all threads of the held process have ended."""
        return _is_readable(self)

    def check_alive(self) -> None:
        """Raise VmGoneError if the held process has ended."""
        if self.ended:
            raise VmGoneError(errno.ESRCH, f"process {self.pid} has ended")

    def _has_ended(self, tid: int) -> bool:
        """Return whether a thread has ended, or is about to; the first stays in /proc, as a zombie, until all have."""
        try:
            stat = _contents(f"{self.folder}/task/{tid}/stat" if tid != self.pid else f"{self.folder}/stat")
        except (FileNotFoundError, ProcessLookupError):
            return True
        return bool(int(_fields(stat)[6]) & _PF_EXITING)

    def find_live_thread(self) -> bool:
        """Look through another thread if the one looked through has ended, and return whether it had.

        Raises
        ------
        ProcessLookupError
            If none lives.
        """
        if not self._has_ended(self._tid):
            return False
        with suppress(FileNotFoundError):
            for tid in self.threads():
                if not self._has_ended(tid):
                    self._tid, self._thread_pidfd = tid, None
                    return True
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"{self._root}/{self.pid}")

    # ---- its files

    def kvm_files(self) -> list[KvmFile]:
        """Return its open files of KVM, by fd, of one listing of ``/proc/PID/fd``.

        A file whose link cannot be read, for whatever reason, is left out like one that was closed meanwhile.

        Raises
        ------
        PermissionError
            If its files may not be seen.
        FileNotFoundError, ProcessLookupError
            If it has ended.
        """
        while True:
            try:
                links = self._links()
            except PermissionError:  # the files of a process that has ended are root's
                if not self.find_live_thread():
                    raise
                continue
            except FileNotFoundError:
                if self._tid == self.pid or not self.find_live_thread():
                    raise
                continue
            if links or not self.find_live_thread():
                return sorted((file for fd, link in links if (file := kvm_file(link, fd))), key=lambda file: file.fd)

    def held_pids(self) -> set[int]:
        """Return the processes that it holds by pidfds, as far as it shows its files."""
        pids = set()
        with suppress(OSError):
            for fd, link in self._links():
                if link.startswith(_PIDFD_LINKS):
                    with suppress(OSError):  # closed meanwhile
                        found = _PIDFD_PID.search(self.file_info(fd))
                        pids.add(int(found[1]) if found else 0)
        return pids

    def _links(self) -> list[tuple[int, str]]:
        """Return what /proc calls each of its fds."""
        links = []
        refused = None
        with Fd(os.open, self._path("fd"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as folder:
            for name in os.listdir(folder.fileno()):  # noqa: PTH208 - Path has no folder by its fd
                try:
                    links.append((int(name), os.readlink(name, dir_fd=folder.fileno())))
                except PermissionError as error:  # noqa: PERF203 - each file may fail by itself
                    refused = error
                except OSError:  # closed meanwhile, a path that is longer than PATH_MAX, ...
                    continue
        if refused and not links:  # it has guarded itself since
            raise refused
        return links

    def group(self, files: Iterable[KvmFile]) -> list[list[KvmFile]]:
        """Put those files together that are one open file; where the kernel cannot tell, each is by itself."""
        groups: dict[tuple[str, int | None, bool], list[list[KvmFile]]] = {}
        for file in files:
            alike = groups.setdefault((file.kind, file.vcpu_id, file.is_stats), [])
            for group in alike:
                if self._own and lib.kvmstats_same_file(self._tid, group[0].fd, self._tid, file.fd) == 1:
                    group.append(file)
                    break
            else:
                alike.append([file])
        return [group for alike in groups.values() for group in alike]

    def take(self, fd: int) -> Fd | None:
        """Return a duplicate of an fd of the held process; None if it is not open there.

        Raises
        ------
        OSError
            As pidfd_getfd(2) has it; ENOTSUP if the first thread has ended, and the kernel has no pidfds of others.
        """
        while True:
            if self._tid != self.pid and self._thread_pidfd is None:
                self._hold_thread()
            try:
                return Fd(lib.kvmstats_getfd, (self._thread_pidfd or self).fileno(), fd)
            except OSError as error:
                if error.errno == errno.EBADF:
                    return None
                if error.errno != errno.ESRCH or self.ended or not self.find_live_thread():
                    raise

    def refusal(self) -> int:
        """Return the errno by which the kernel refuses the fds of the held process to this one; 0 if it gives them.

        ``pidfd_getfd(2)`` looks at the permission (``PTRACE_MODE_ATTACH_REALCREDS``, as for ``ptrace(2)``) before it
        looks for the fd (``kernel/pid.c``), so it is asked for an fd that no process can have: EBADF is a yes. That
        changes nothing; a security module may log a refusal. The answer is of that moment.
        """
        try:
            self.take(_NO_FD)
        except OSError as error:
            return error.errno or 0
        return 0

    def _hold_thread(self) -> None:
        """Hold the thread that is looked through by a pidfd of its own: only a live one still has the files."""
        try:
            pidfd = Fd(os.pidfd_open, self._tid, _PIDFD_THREAD)
        except OSError as error:
            if error.errno == errno.EINVAL:  # Linux before 6.9
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from None
            if error.errno == errno.ESRCH:  # it has ended: whoever asked looks for another
                return
            raise
        if self._tid in self.threads() and not _is_readable(pidfd):  # it lives, so the number is still its own
            self._thread_pidfd = pidfd

    # ---- what else it shows

    @property
    def tid(self) -> int:
        """A thread that has its files and memory: the first one, unless that was seen to have ended."""
        return self._tid

    @property
    def folder(self) -> str:
        """Its folder in /proc."""
        return f"{self._root}/{self.pid}"

    def _path(self, name: str) -> str:
        """Return the path of what only a live thread has."""
        thread = f"/task/{self._tid}" if self._tid != self.pid else ""
        return f"{self.folder}{thread}/{name}"

    def read(self, name: str) -> bytes:
        """Return a file below its folder, as ``maps``; of a thread that has files and memory."""
        return _contents(self._path(name))

    def file_info(self, fd: int) -> bytes:
        """Return what the kernel says of an fd: position, flags, locks."""
        return self.read(f"fdinfo/{fd}")

    def open_memory(self) -> Fd:
        """Open its memory for reading."""
        return Fd(os.open, self._path("mem"), os.O_RDONLY | os.O_CLOEXEC)

    def open_program(self) -> Fd:
        """Open the file that it runs for reading."""
        return Fd(os.open, self._path("exe"), os.O_RDONLY | os.O_CLOEXEC)

    def threads(self) -> list[int]:
        """Return its threads, ascending, kernel threads that work for it included."""
        return sorted(map(int, os.listdir(f"{self.folder}/task")))  # noqa: PTH208 - numbers, not paths

    def activity(self) -> tuple[bytes, ...] | None:
        """Return what changes when one of its threads runs, which it must to open a file; None if that is not known.

        A thread's ``schedstat`` has its time on a processor, its time in a queue for one, and how often it got one.
        """
        with suppress(OSError):  # it has ended; or a kernel without CONFIG_SCHED_INFO
            threads = os.stat(f"{self.folder}/task").st_nlink - 2  # noqa: PTH116
            if threads == 1:
                return (_line(f"{self.folder}/schedstat"),)
            if threads <= _FEW_THREADS:
                return tuple(_line(f"{self.folder}/task/{tid}/schedstat") for tid in self.threads())
        return None

    def thread_syscall(self, tid: int) -> list[str]:
        """Return the words of a thread's ``syscall`` file, or ``running``; ProcessLookupError if it has ended."""
        folder = f"{self.folder}/task/{tid}"
        try:
            return _contents(f"{folder}/syscall").decode().split()
        except PermissionError:  # what has ended, and was not waited for, belongs to root
            if _contents(f"{folder}/stat").rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
            raise

    def is_worker(self, tid: int) -> bool:
        """Return whether a thread is the kernel's, which shows the system call that its maker was in."""
        return bool(int(_fields(_contents(f"{self.folder}/task/{tid}/stat"))[6]) & _PF_WORKERS)

    def thread_name(self, tid: int) -> str:
        """Return the name that a thread goes by, at most 15 bytes."""
        return _text(_contents(f"{self.folder}/task/{tid}/comm")).removesuffix("\n")

    def program(self) -> str:
        """Return the name of the file that it runs; empty if it is just ending, which loses that first."""
        with suppress(FileNotFoundError):
            return Path(self._path("exe")).readlink().name.removesuffix(" (deleted)")
        return ""

    def arguments(self) -> list[str]:
        """Return its command line; empty for a kernel thread, and for a process that has ended."""
        raw = self.read("cmdline")
        return [_text(word) for word in raw.removesuffix(b"\0").split(b"\0")] if raw else []

    def comm(self) -> str:
        """Return the name that its thread goes by, at most 15 bytes."""
        return _text(_contents(f"{self.folder}/comm")).removesuffix("\n")

    def status(self) -> dict[str, str]:
        """Return the lines of its ``status`` file, by name."""
        lines = _text(self.read("status")).splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def owner(self) -> int:
        """Return the uid that its files in /proc belong to: its effective one, or root's if it is not dumpable."""
        return os.stat(self._path("status")).st_uid  # noqa: PTH116

    def user_namespace(self) -> str:
        """Return what identifies its user namespace, as ``user:[4026531837]``."""
        return str(Path(self._path("ns/user")).readlink())

    def start_time(self) -> int:
        """Return when it started, in clock ticks since boot."""
        return int(_fields(_contents(f"{self.folder}/stat"))[19])


def _line(path: str) -> bytes:
    """Return what a file of one line holds, in half the time of `_contents`."""
    with Fd(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as file:
        return os.read(file.fileno(), 256)


def _contents(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a quarter of the time of Path.read_bytes
        return file.readall()


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _fields(stat: bytes) -> list[str]:
    """Return the fields of a ``stat`` file behind comm, which may have parentheses and blanks itself."""
    return stat.rpartition(b")")[2].decode().split()
