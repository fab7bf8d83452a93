"""The watch over VMMs: when one exits, the files that were borrowed from it are let go of at once."""

from __future__ import annotations

import errno
import os
import select
import threading
from _thread import start_new_thread
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from kvmstats_fast._text import printable
from kvmstats_fast.errors import VmGoneError
from kvmstats_fast.handle import null_fd

if TYPE_CHECKING:
    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import Process


class Watched:
    """A VMM that is watched, and what was borrowed from it.

    Parameters
    ----------
    process : Process
        The VMM, held; from now on it is closed by this object.
    vmm : str
        Its program.

    Attributes
    ----------
    files : tuple of StatsFile
        What to let go of when it exits.
    gone : VmGoneError or None
        That it has exited.
    """

    def __init__(self, process: Process, vmm: str) -> None:
        self.process = process
        self.vmm = vmm
        self.files: tuple[StatsFile, ...] = ()
        self.gone: VmGoneError | None = None

    def exited(self) -> VmGoneError:
        """Return the error that says so."""
        return VmGoneError(
            errno.ESRCH, f"process {self.process.pid} ({printable(self.vmm)}) has exited, and its VM with it"
        )

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


class Watcher:
    """One thread that waits for all VMMs to exit.

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
        self.lock = threading.RLock()
        self._watched: WeakValueDictionary[int, Watched] = WeakValueDictionary()
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()

    def add(self, watched: Watched) -> None:
        """Have its `end` called when the process exits."""
        null_fd()  # now, because a file is revoked even when there are too many open
        with self.lock:
            if self._epoll is None:
                epoll = select.epoll()
                start_new_thread(self._work, (epoll,))  # in one step, for the sake of Ctrl-C
                self._epoll = epoll
            self._epoll.register(watched.process, select.EPOLLIN)
            self._watched[watched.process.fileno()] = watched

    def remove(self, process: Process) -> None:
        """Watch the process no more, if it is watched."""
        epoll = self._epoll
        if epoll is not None:
            with suppress(OSError, ValueError):  # it is not watched, or closed
                epoll.unregister(process)

    def _work(self, epoll: select.epoll) -> None:
        while True:
            for pidfd, _ in epoll.poll():
                with self.lock:
                    watched = self._watched.get(pidfd)
                    if watched is not None and not (watched.process.is_held and watched.process.fileno() == pidfd):
                        watched = None  # closed, and its number may be another's
                    if watched is not None and not watched.process.ended:
                        continue  # another one, which has got the number meanwhile
                    with suppress(OSError):
                        epoll.unregister(pidfd)
                    if watched is not None:
                        watched.end()
                watched = None


WATCHER = Watcher()
os.register_at_fork(before=WATCHER.hold, after_in_parent=WATCHER.release, after_in_child=WATCHER.forget)
