"""The watch over VMMs: what was borrowed is let go of when its VM or the VMM is gone."""

from __future__ import annotations

import errno
import os
import select
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from kvmstats_fast._kvmstats import lib
from kvmstats_fast._text import printable
from kvmstats_fast._unpatched import unpatched
from kvmstats_fast.errors import THREAD_LIMITS, AttachError, KvmStatsError, VmGoneError
from kvmstats_fast.handle import null_fd
from kvmstats_fast.vmm.mark import Marks, mark_dead

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import Process

_EVENTS = 16  # VMMs whose end one call tells; by default it takes 12 KiB, for a thousand
_PERIOD = 1.0  # s between looks at the files of a VMM that runs


class Watched:
    """A VMM that is watched, and what was borrowed from it.

    A VM may go before its process does: cloud-hypervisor makes a new one at each reboot, and a VMM may execute itself
    anew. `look` notices that by the marks on its VMs.

    Parameters
    ----------
    process : Process
        The VMM, held; from now on it is closed by this object.
    vmm : str
        Its program.
    files : iterable of StatsFile
        What to let go of.
    marks : Marks or None
        Of its VMs; None if they cannot be marked.

    Attributes
    ----------
    files : tuple of StatsFile
    gone : VmGoneError or None
        That the VMM has exited.
    """

    def __init__(self, process: Process, vmm: str, files: Iterable[StatsFile], marks: Marks | None) -> None:
        self.process = process
        self.who = f"process {process.pid} ({printable(vmm)})"
        self.files = tuple(files)
        self.gone: VmGoneError | None = None
        self._marks = marks

    def watch(self, files: Iterable[StatsFile], marks: Marks | None) -> None:
        """Watch these files from now on."""
        self.files = tuple(files)
        self._marks = marks

    def exited(self) -> VmGoneError:
        """Return the error that says that the VMM has exited."""
        return VmGoneError(errno.ESRCH, f"{self.who} has exited, and its VM with it")

    def end(self) -> None:
        """Let go of the files: the VMM has exited."""
        self.gone = self.exited()
        for file in self.files:
            file.handle.revoke(self.gone)

    def close(self) -> None:
        """Watch it no more. Without the lock: a ``__del__`` comes by here, in whatever thread."""
        WATCHER.remove(self.process)
        self.process.close()

    # For when nobody has it any more: its files say themselves that they were not closed.
    __del__ = close

    # ---- whether the VM is still there, and whose it is

    def shares_vm(self, other: Watched) -> bool:
        """Return whether a VM of this process is one of another's, too, as far as they are marked."""
        return self._marks is not None and other._marks is not None and self._marks.overlap(other._marks)

    def look(self) -> None:
        """Let go of the files of a VM that is gone while the VMM runs."""
        if self._marks is None or not self._marks.forget_lost():
            return
        text = f"the VM of {self.who} is gone, and the process runs on: refresh() attaches to the VM that it has now"
        for file in self.files:
            if self._marks.vms == 0 or self._has_closed(file):
                with suppress(OSError, ValueError, KvmStatsError):  # closed already
                    mark_dead(file)
                file.handle.revoke(VmGoneError(errno.ENODEV, text))

    def _has_closed(self, file: StatsFile) -> bool:
        """Return whether the VMM has closed the fd that was borrowed: so does one that destroys one of its VMs."""
        fd = file.handle.owner.fd
        if fd is None or file.closed:
            return False
        same = lib.kvmstats_same_file(os.getpid(), file.handle.source.fd, self.process.tid, fd)
        return same in (0, -errno.EBADF)


class Watcher:
    """One thread that waits for all VMMs to exit, and looks at their files now and then.

    Its lock is that of all machines: one that is ended, closed or refreshed is so by one thread. It is reentrant,
    because a signal handler may close what is just being closed.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self.forget()

    def hold(self) -> None:
        """Before a fork: not in the middle of something, which in the child nobody would finish."""
        self.lock.acquire()

    def release(self) -> None:
        """After a fork, in the parent."""
        self.lock.release()

    def forget(self) -> None:
        """In a forked child: what the parent watches is the parent's."""
        self.lock = unpatched("_thread", "RLock")()
        self._watched: WeakValueDictionary[int, Watched] = WeakValueDictionary()
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()

    def start(self) -> select.epoll:
        """Start the thread, if there is none yet; it has the capabilities of the thread that calls this first.

        Raises
        ------
        AttachError
            If it cannot be started: what is not watched would keep the memory of its VM.
        """
        with self.lock:
            if self._epoll is None:
                try:
                    epoll = unpatched("select", "epoll")()
                    start_thread = unpatched("_thread", "start_new_thread")
                    start_thread(self._work, (epoll,))  # in one step, for the sake of Ctrl-C
                except OSError as error:
                    raise AttachError(error.errno, f"the VMM cannot be watched: {error.strerror}") from None
                except RuntimeError:
                    text = f"the thread that watches VMMs cannot be started; {THREAD_LIMITS}"
                    raise AttachError(errno.EAGAIN, text) from None
                self._epoll = epoll
            return self._epoll

    def add(self, watched: Watched) -> None:
        """Have its `end` called when the process exits."""
        null_fd()  # now, because a file is revoked even when there are too many open
        with self.lock:
            self.start().register(watched.process, select.EPOLLIN)
            self._watched[watched.process.fileno()] = watched

    def remove(self, process: Process) -> None:
        """Watch the process no more, if it is watched."""
        epoll = self._epoll
        if epoll is not None:
            with suppress(OSError, ValueError):  # it is not watched, or closed
                epoll.unregister(process)

    def _work(self, epoll: select.epoll) -> None:
        due = time.monotonic() + _PERIOD
        while True:
            for pidfd, _ in epoll.poll(max(0.0, due - time.monotonic()), _EVENTS):
                self._end(epoll, pidfd)
            if time.monotonic() >= due:
                self._look()
                due = time.monotonic() + _PERIOD

    def _end(self, epoll: select.epoll, pidfd: int) -> None:
        """Let go of the files of a VMM that has exited."""
        with self.lock:
            watched = self._watched.get(pidfd)
            if watched is not None and not (watched.process.is_held and watched.process.fileno() == pidfd):
                watched = None  # closed, and its number may be another's
            if watched is not None and not watched.process.ended:
                return  # another one, which has got the number meanwhile
            with suppress(OSError):
                epoll.unregister(pidfd)
            if watched is not None:
                watched.end()

    def _look(self) -> None:
        """Look at each VMM that runs."""
        for pidfd in list(self._watched):
            with self.lock:
                watched = self._watched.get(pidfd)
                if watched is not None and watched.process.is_held:
                    with suppress(OSError, MemoryError):  # the others are looked at, and this one in a second
                        watched.look()


WATCHER = Watcher()
os.register_at_fork(before=WATCHER.hold, after_in_parent=WATCHER.release, after_in_child=WATCHER.forget)
