"""Stats files handed over from process to process through a Unix socket.

The protocol is docs/fd-passing.md, byte by byte, with a sender in C.
"""

from __future__ import annotations

import errno
import fcntl
import math
import operator
import os
import resource
import select
import socket
import stat
import struct
import time
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmstats_fast._resource import Closing, Fd, HasFileno, describe_fd, fd_of
from kvmstats_fast._unpatched import unpatched
from kvmstats_fast.errors import FormatError, HandOverError
from kvmstats_fast.stats_file import StatsFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MAGIC = b"KVMSTATS"
_VERSION = 1
_MESSAGE = struct.Struct("=8sHHI")  # magic, version, fds with this message, fds still to come
_MOST_FDS = 253  # in one message: SCM_MAX_FD, include/net/scm.h
_SCM_PIDFD = 4  # include/linux/socket.h: the sender's, for a socket with SO_PASSPIDFD
#: Room for them, and for what the socket's own options add to a message (SO_PASSCRED, SO_PASSSEC, SO_PASSPIDFD).
_CONTROL_SIZE = socket.CMSG_SPACE(4 * _MOST_FDS) + 512
_UCRED = struct.Struct("=iII")  # pid, uid, gid: struct ucred, include/linux/socket.h
_LONGEST_POLL = 2**31 - 1  # ms


def send_files(
    sock: int | HasFileno,
    files: Iterable[int | HasFileno],
    *,
    uid: int | None = None,
    timeout: float | None = 30.0,
) -> None:
    """Hand open stats files over to the process at the other end of a Unix socket.

    Parameters
    ----------
    sock : socket.socket, int or object with fileno()
        A connected Unix stream socket. Its timeout and blocking mode do not matter and stay as they are.
    files : iterable of StatsFile, int or object with fileno()
        Any number of them, in the order in which they will arrive. The caller keeps them, open.
    uid : int, optional
        The user that the peer must be. Default: the user of this process, or root.
    timeout : float or None
        Seconds that the peer may take to make room, in total; None: no limit.

    Raises
    ------
    HandOverError
        If the peer belongs to another user (nothing is sent then), or closes the connection.
    TimeoutError
        If the peer does not read. It has received some of the files, and will refuse them.
    TypeError, ValueError
        If `sock` is not a connected Unix stream socket.
    OSError
        If one of the files is not open, or the kernel refuses to pass it on; the message says what to do.

    Notes
    -----
    Returns when the kernel has taken everything; nothing comes back from the peer, so a VMM never waits for its
    monitor. Files on their way are held by the kernel: the caller may close its own, and the socket.

    The peer's user comes from ``SO_PEERCRED``: that of the process that called ``connect``, ``listen`` or
    ``socketpair``.
    """
    fds = [_sendable(i, file) for i, file in enumerate(files)]
    deadline = _deadline(timeout)
    with _connection(sock) as connection:
        _check_peer(connection, uid)
        for sent in range(0, max(len(fds), 1), _MOST_FDS):
            batch = fds[sent : sent + _MOST_FDS]
            message = _MESSAGE.pack(_MAGIC, _VERSION, len(batch), len(fds) - sent - len(batch))
            _send(connection, message, batch, deadline, f"{sent} of {len(fds)} files were sent")


def receive_files(sock: int | HasFileno, *, uid: int | None = None, timeout: float | None = 30.0) -> list[StatsFile]:
    """Receive the stats files that `send_files`, or a VMM that speaks its protocol, hands over.

    Parameters
    ----------
    sock : socket.socket, int or object with fileno()
        A connected Unix stream socket. Its timeout and blocking mode do not matter and stay as they are.
    uid : int, optional
        The user that the peer must be. Default: the user of this process, or root.
    timeout : float or None
        Seconds that the peer may take in total; None: no limit.

    Returns
    -------
    list of StatsFile
        In the order in which they were sent; they own their fds, which are close-on-exec. No byte after the hand-over
        is read, so the connection is free for other use.

    Raises
    ------
    HandOverError
        If the peer belongs to another user (nothing is read then), goes away before everything has arrived, or does not
        speak the protocol; or if this process may not open so many files.
    FormatError
        If one of the files is not a stats file; the message says which.
    TimeoutError
        If not everything has arrived in time.
    TypeError, ValueError
        If `sock` is not a connected Unix stream socket.
    OSError
        If the kernel refuses to read one of the files.

    Notes
    -----
    After an error, Ctrl-C included, everything that had arrived is closed.
    """
    deadline = _deadline(timeout)
    files: list[StatsFile] = []
    with _Arrivals() as arrivals:
        with _connection(sock) as connection:
            pid = _check_peer(connection, uid)
            _receive(connection, arrivals, deadline)
        total = len(arrivals.fds)
        try:
            for i, fd in enumerate(arrivals.fds, 1):
                files.append(open_stats_file(fd, f"file {i} of {total} from process {pid}"))
            arrivals.fds = []  # they are the files' own from here on
            return files  # noqa: TRY300 - a Ctrl-C that comes here is for the handler too
        except BaseException:
            for file in files:
                file.close()
            raise


def open_stats_file(fd: Fd, source: str) -> StatsFile:
    """Open a stats file that another process has passed on; errors say which it is."""
    try:
        return StatsFile(fd)
    except FormatError as error:
        raise FormatError(error.code, error.offset, f"{source}: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"{source}: {error.strerror}") from None


class _Arrivals(Closing):
    """Owner of the fds that arrive, from the instant recvmsg(2) returns.

    Attributes
    ----------
    fds : list of Fd
        Those that were sent, in order.
    """

    def __init__(self) -> None:
        self.fds: list[Fd] = []
        self._raw: list[Any] = []  # a message as recvmsg returns it, or what is left of its fds

    def receive(self, connection: socket.SocketType, size: int) -> tuple[bytes, int]:
        """Receive up to `size` bytes and the fds with them; return the bytes and the message's flags."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        # Call and store are one instruction, and so is each change of the owner below.
        self._raw.extend(map(connection.recvmsg, (size,), (_CONTROL_SIZE,), (flags,)))
        data, ancillary, got, _ = self._raw[-1]
        sent = _fds_in(ancillary, socket.SCM_RIGHTS)
        rest = _fds_in(ancillary, _SCM_PIDFD)
        fds = [*sent, *rest]
        self._raw[-1] = fds
        self.fds.extend(Fd(fds.pop, 0) for _ in sent)
        self._close_raw()
        return data, got

    def close(self) -> None:
        """Close what is still owned."""
        self._close_raw()
        for fd in self.fds:
            fd.close()

    def _close_raw(self) -> None:
        while self._raw:
            fds = self._raw[-1]
            if isinstance(fds, tuple):  # Ctrl-C came in between
                fds = self._raw[-1] = [fd for kind in (socket.SCM_RIGHTS, _SCM_PIDFD) for fd in _fds_in(fds[1], kind)]
            while fds:
                any(map(os.close, map(fds.pop, (-1,))))
            self._raw.pop()


def _fds_in(ancillary: list[tuple[int, int, bytes]], kind: int) -> list[int]:
    """Return the fds in the control messages of this kind; the kernel has errors in their place, too."""
    fds = array("i")
    for level, its_kind, data in ancillary:
        if (level, its_kind) == (socket.SOL_SOCKET, kind):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return [fd for fd in fds if fd >= 0]


# ---- the connection


@contextmanager
def _connection(sock: int | HasFileno) -> Iterator[socket.SocketType]:
    """Check that it is a connected Unix stream socket; for the block, give an object of our own for it."""
    fd = fd_of(sock)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise OSError(error.errno, f"fstat on fd {fd}: {error.strerror}; is the socket closed?") from None
    if not is_socket:
        raise ValueError(f"{describe_fd(fd)} is not a socket: stats files are handed over through a Unix stream socket")
    own: list[socket.SocketType] = []
    try:
        blocking = os.get_blocking(fd)
        own.extend(map(socket.SocketType, (-1,), (-1,), (-1,), map(os.dup, (fd,))))  # one instruction, for Ctrl-C
        os.set_blocking(fd, blocking)  # which the line above changes after socket.setdefaulttimeout()
        (connection,) = own
        if (connection.family, connection.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise ValueError(
                f"fd {fd} is a socket of family {connection.family} and type {connection.type}: stats files are handed "
                f"over through AF_UNIX ({socket.AF_UNIX:d}), SOCK_STREAM ({socket.SOCK_STREAM:d})"
            )
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"fd {fd} is a listening socket: pass a connection that its accept() returns")
        try:
            connection.getpeername()
        except OSError as error:
            raise ValueError(f"fd {fd} is not connected ({error.strerror}): connect() or accept() first") from None
        yield connection
    finally:
        for connection in own:
            connection.close()


def _check_peer(connection: socket.SocketType, uid: int | None) -> int:
    """Refuse the wrong user; return the peer's pid."""
    allowed = {os.geteuid(), 0} if uid is None else {operator.index(uid)}
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, peer_uid, _ = _UCRED.unpack(credentials)
    if peer_uid not in allowed:
        raise HandOverError(
            f"the peer, process {pid}, has uid {peer_uid}; allowed is {' or '.join(map(str, sorted(allowed)))}: pass "
            f"uid={peer_uid} to allow it"
        )
    return int(pid)


def _deadline(timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not timeout >= 0:
        raise ValueError(f"timeout is {timeout}; it must be a number of seconds, 0 or more, or None")
    return time.monotonic() + timeout


def _wait(connection: socket.SocketType, event: int, deadline: float, progress: str) -> None:
    """Wait until the socket can be read or written; `progress` is for the error."""
    poll = unpatched("select", "poll")()
    poll.register(connection.fileno(), event)
    left = deadline - time.monotonic()
    if not poll.poll(None if left == math.inf else min(max(0, math.ceil(left * 1000)), _LONGEST_POLL)):
        raise TimeoutError(errno.ETIMEDOUT, f"the peer took too long: {progress}")


def _send(connection: socket.SocketType, message: bytes, fds: list[int], deadline: float, progress: str) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    while message:
        _wait(connection, select.POLLOUT, deadline, progress)
        try:
            sent = connection.sendmsg([message], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            raise HandOverError(f"the peer closed the connection: {progress}") from None
        except OSError as error:
            hint = (
                "; this user has more files under way in sockets than `ulimit -n` (RLIMIT_NOFILE) allows, until the "
                "peers read them"
                if error.errno == errno.ETOOMANYREFS
                else ""
            )
            raise OSError(error.errno, f"sendmsg with {len(fds)} fds: {error.strerror}{hint}; {progress}") from None
        message, control = message[sent:], []  # the fds go with the first byte


def _receive(connection: socket.SocketType, arrivals: _Arrivals, deadline: float) -> None:
    """Receive the whole hand-over."""
    total = left = -1
    while left:
        before = len(arrivals.fds)
        progress = f"{before} of {total} files had arrived" if total >= 0 else "nothing had arrived"
        data = b""
        while len(data) < _MESSAGE.size:
            data += _receive_piece(connection, arrivals, _MESSAGE.size - len(data), deadline, progress)
        magic, version, fds, more = _MESSAGE.unpack(data)
        arrived = len(arrivals.fds) - before
        if magic != _MAGIC:
            raise HandOverError(f"the peer does not speak the hand-over protocol: it sent {data!r}; {progress}")
        if version != _VERSION:
            raise HandOverError(
                f"the peer speaks version {version} of the hand-over protocol, this package version {_VERSION}: update "
                "the older one"
            )
        if arrived != fds:
            raise HandOverError(f"a message announces {fds} fds, but has {arrived}; {progress}")
        if total < 0:
            total = left = fds + more
        if more != left - fds or (more and not fds):
            raise HandOverError(
                f"a message of {fds} fds announces {more} more, where {left - fds} were due; {progress}"
            )
        left = more


def _receive_piece(
    connection: socket.SocketType, arrivals: _Arrivals, size: int, deadline: float, progress: str
) -> bytes:
    """Receive up to `size` bytes of a message, and the fds that come with them."""
    while True:
        _wait(connection, select.POLLIN, deadline, progress)
        try:
            data, flags = arrivals.receive(connection, size)
        except BlockingIOError:
            continue
        except ConnectionResetError:
            data, flags = b"", 0
        if flags & socket.MSG_CTRUNC:
            raise HandOverError(
                "the kernel could not give this process all fds of a message. Either it has as many files open as it "
                f"may, {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise `ulimit -n` (RLIMIT_NOFILE); or a "
                f"security module forbids it; {progress}"
            )
        if not data:
            raise HandOverError(f"the peer closed the connection, or died: {progress}")
        return data


def _sendable(index: int, file: int | HasFileno) -> int:
    fd = fd_of(file)
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        raise OSError(error.errno, f"file {index + 1} to send, fd {fd}: {error.strerror}") from None
    return fd
