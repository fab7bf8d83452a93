"""Stats files from another process: handed over through a Unix socket, or inherited from the service manager.

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
from contextlib import contextmanager, suppress
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvmstats_fast._resource import HasFileno, describe_fd, fd_of
from kvmstats_fast.abi import KVM_LINK
from kvmstats_fast.errors import FormatError, HandOverError
from kvmstats_fast.stats_file import StatsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAGIC = b"KVMSTATS"
_VERSION = 1
_MESSAGE = struct.Struct("=8sHHI")  # magic, version, fds with this message, fds still to come
_MOST_FDS = 253  # in one message: SCM_MAX_FD, include/net/scm.h
#: Room for them, and for what the socket's own options add to a message (SO_PASSCRED, SO_PASSSEC).
_CONTROL_SIZE = socket.CMSG_SPACE(4 * _MOST_FDS) + 512
_UCRED = struct.Struct("=iII")  # pid, uid, gid: struct ucred, include/linux/socket.h
_LONGEST_POLL = 2**31 - 1  # ms

_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
#: This package's own stand-ins for stats files: ``StatsFile.from_bytes`` and ``SyntheticStats``.
_STAND_INS = ("/memfd:kvmstats-capture", "/memfd:kvmstats-synthetic")

_T = TypeVar("_T")
_Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # what recvmsg returns


def send_files(
    sock: int | HasFileno,
    files: Iterable[int | HasFileno],
    *,
    uid: int | None = None,
    timeout: float | None = 30.0,
) -> None:
    """Hand open stats files to the process at the other end of a Unix socket.

    Parameters
    ----------
    sock : socket.socket, int or object with fileno()
        A connected Unix stream socket. Its timeout and blocking mode do not matter and stay as they are.
    files : iterable of StatsFile, int or object with fileno()
        Any number of them, in the order in which they will arrive. They stay open here, and the caller's.
    uid : int, optional
        The user that the peer must be. Default: the user of this process, or root.
    timeout : float or None
        Seconds that the peer may take to make room, in all; None: for ever.

    Raises
    ------
    HandOverError
        If the peer is another user's (nothing is sent then), or closes the connection.
    TimeoutError
        If the peer does not read. It has got a part of the files, which it will refuse.
    TypeError, ValueError
        If `sock` is no connected Unix stream socket.
    OSError
        If one of the files is not open, or the kernel refuses to pass it on; the message says what to do.

    Notes
    -----
    Returns when the kernel has taken everything; nothing comes back from the peer, so a VMM never waits for its
    monitor. Files on their way are held by the kernel: the caller may close its own, and the socket.

    Who the peer is comes from ``SO_PEERCRED``: the user of the process that called ``connect``, ``listen`` or
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
    """Take the stats files that `send_files`, or a VMM that speaks its protocol, hands over.

    Parameters
    ----------
    sock : socket.socket, int or object with fileno()
        A connected Unix stream socket. Its timeout and blocking mode do not matter and stay as they are.
    uid : int, optional
        The user that the peer must be. Default: the user of this process, or root.
    timeout : float or None
        Seconds that the peer may take, in all; None: for ever.

    Returns
    -------
    list of StatsFile
        In the order in which they were sent; they own their fds, which are close-on-exec. Not a byte behind the
        hand-over is read: the connection can go on to serve something else.

    Raises
    ------
    HandOverError
        If the peer is another user's (nothing is read then), goes away before everything has arrived, or does not speak
        the protocol; or if this process may not open so many files.
    FormatError
        If one of the files is no stats file; the message says which.
    TimeoutError
        If not everything has arrived in time.
    TypeError, ValueError
        If `sock` is no connected Unix stream socket.
    OSError
        If the kernel refuses to read one of the files.

    Notes
    -----
    After an error, Ctrl-C included, everything that had arrived is closed.
    """
    deadline = _deadline(timeout)
    messages: list[_Received] = []
    files: list[StatsFile] = []
    # Until the last line before the return, the fds belong to `messages` alone: each is closed once, whatever happens.
    try:
        with _connection(sock) as connection:
            pid = _check_peer(connection, uid)
            total = _receive(connection, messages, deadline)
        for i, fd in enumerate(_fds_in(messages), 1):
            files.append(_unowned(fd, f"file {i} of {total} from process {pid}"))
        _own(files, True)
        return files  # noqa: TRY300 - a Ctrl-C that comes here is for the handler too
    except BaseException:
        _own(files, False)
        for fd in _fds_in(messages):
            with suppress(OSError):  # of a file that is no stats file
                os.close(fd)
        raise


def inherited_files(name: str | None = None, *, unset_environment: bool = False) -> list[StatsFile]:
    """Take the stats files that the service manager passed to this process, as ``sd_listen_fds(3)`` does.

    ``LISTEN_FDS`` says how many fds there are, from 3 on, ``LISTEN_PID`` for which process they are meant, and
    ``LISTEN_FDNAMES`` what they are called. (A single fd that a parent process left open needs none of this:
    ``StatsFile(fd)``.)

    Parameters
    ----------
    name : str, optional
        Only fds of this name (``FileDescriptorName=``, ``FDNAME=``).
    unset_environment : bool
        Remove the variables, so that no child takes them for its own. Also done if an error is raised.

    Returns
    -------
    list of StatsFile
        Those of the fds that are stats files, in their order; empty if nothing was passed to this process. They own
        their fds. The others stay open, for who knows what to do with them.

    Raises
    ------
    ValueError
        If a variable is not what ``sd_listen_fds(3)`` calls valid.
    OSError
        If an fd that is announced is not open, or a stats file cannot be read.
    FormatError
        If one is a stats file of a kind that this package cannot read. After an error all fds stay open.

    Notes
    -----
    All passed fds, stats files or not, are made close-on-exec. What is a stats file is told by its link in
    ``/proc/self/fd``: ``anon_inode:kvm-vm-stats`` and the like (``virt/kvm/kvm_main.c``), and the files that
    `StatsFile.from_bytes` and `SyntheticStats` make.
    """
    try:
        passed = _passed_fds()
    finally:
        if unset_environment:
            for variable in _LISTEN_VARIABLES:
                os.environ.pop(variable, None)
    files: list[StatsFile] = []
    try:
        for fd, its_name in passed:
            try:
                os.set_inheritable(fd, False)
            except OSError as error:
                raise OSError(error.errno, f"LISTEN_FDS says that fd {fd} was passed: {error.strerror}") from None
            if name in (None, its_name) and _is_stats_file(fd):
                files.append(_unowned(fd, f"{its_name!r} of LISTEN_FDS"))
        _own(files, True)
        return files  # noqa: TRY300 - a Ctrl-C that comes here is for the handler too
    except BaseException:
        _own(files, False)
        raise


# ---- ownership


def _unowned(fd: int, who: str) -> StatsFile:
    """Open a stats file that leaves its fd to us; errors say whose it is."""
    try:
        return StatsFile(fd, closefd=False)
    except FormatError as error:
        raise FormatError(error.code, error.offset, f"{who}: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"{who}: {error.strerror}") from None


def _own(files: list[StatsFile], owned: bool) -> None:
    for file in files:
        file.handle.fd.owned = owned


def _append(results: list[_T], function: Callable[..., _T], *arguments: Iterable[Any]) -> None:
    """Call and append in one C call, so that no Ctrl-C comes between a new fd and the list that knows of it."""
    results.extend(map(function, *arguments))


# ---- the connection


@contextmanager
def _connection(sock: int | HasFileno) -> Iterator[socket.SocketType]:
    """Check that it is a socket for files, and give an object of our own for it."""
    fd = fd_of(sock)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise OSError(error.errno, f"fstat on fd {fd}: {error.strerror}; is the socket closed?") from None
    if not is_socket:
        raise ValueError(f"{describe_fd(fd)} is no socket: stats files are handed over through a Unix stream socket")
    own: list[socket.SocketType] = []
    try:
        blocking = os.get_blocking(fd)
        _append(own, socket.SocketType, (-1,), (-1,), (-1,), map(os.dup, (fd,)))
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
        raise ValueError(f"timeout is {timeout}; it must be a number of seconds from 0 on, or None")
    return time.monotonic() + timeout


def _wait(connection: socket.SocketType, event: int, deadline: float, progress: str) -> None:
    """Wait until the socket can be read or written; `progress` is for the error."""
    poll = select.poll()
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
                "; this user has more files under way in sockets than `ulimit -n` (RLIMIT_NOFILE) allows: the peers "
                "must read"
                if error.errno == errno.ETOOMANYREFS
                else ""
            )
            raise OSError(error.errno, f"sendmsg with {len(fds)} fds: {error.strerror}{hint}; {progress}") from None
        message, control = message[sent:], []  # the fds go with the first byte


def _receive(connection: socket.SocketType, messages: list[_Received], deadline: float) -> int:
    """Receive the whole hand-over; returns how many files it has."""
    total = left = -1
    arrived = 0
    while left:
        progress = f"{arrived} of {total} files had arrived" if total >= 0 else "nothing had arrived"
        data = b""
        while len(data) < _MESSAGE.size:
            data += _receive_piece(connection, messages, _MESSAGE.size - len(data), deadline, progress)
        magic, version, fds, more = _MESSAGE.unpack(data)
        if magic != _MAGIC:
            raise HandOverError(f"the peer does not speak the hand-over protocol: it sent {data!r}; {progress}")
        if version != _VERSION:
            raise HandOverError(
                f"the peer speaks version {version} of the hand-over protocol, this package version {_VERSION}: one of "
                "them is older"
            )
        before, arrived = arrived, len(_fds_in(messages))
        if arrived - before != fds:
            raise HandOverError(f"a message says that it has {fds} fds, but it has {arrived - before}; {progress}")
        if total < 0:
            total = left = fds + more
        if more != left - fds or (more and not fds):
            raise HandOverError(
                f"a message of {fds} fds says that {more} follow, where {left - fds} were due; {progress}"
            )
        left = more
    return total


def _receive_piece(
    connection: socket.SocketType, messages: list[_Received], size: int, deadline: float, progress: str
) -> bytes:
    """Receive up to `size` bytes of a message, and what fds come with them."""
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    while True:
        _wait(connection, select.POLLIN, deadline, progress)
        try:
            _append(messages, connection.recvmsg, (size,), (_CONTROL_SIZE,), (flags,))
        except BlockingIOError:
            continue
        except ConnectionResetError:
            data, got = b"", 0
        else:
            data, _, got, _ = messages[-1]
        if got & socket.MSG_CTRUNC:
            raise HandOverError(
                "the kernel could not give this process all fds of a message: it may have "
                f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files open, raise `ulimit -n` (RLIMIT_NOFILE); or a "
                f"security module forbids it; {progress}"
            )
        if not data:
            raise HandOverError(f"the peer closed the connection, or died: {progress}")
        return data


def _fds_in(messages: list[_Received]) -> list[int]:
    fds = array("i")
    for _, ancillary, _, _ in messages:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _sendable(index: int, file: int | HasFileno) -> int:
    fd = fd_of(file)
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        raise OSError(error.errno, f"file {index + 1} to send, fd {fd}: {error.strerror}") from None
    return fd


# ---- the service manager


def _passed_fds() -> Iterable[tuple[int, str]]:
    """Fds and their names, as the environment has them; none if they are not for this process."""
    numbers = []
    for variable in ("LISTEN_PID", "LISTEN_FDS"):
        text = os.environ.get(variable)
        if text is None:
            return ()
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"the environment has {variable}={text!r}, which is no number; see sd_listen_fds(3)")
        numbers.append(int(text))
    pid, how_many = numbers
    if pid != os.getpid():
        return ()
    text = os.environ.get("LISTEN_FDNAMES")
    if text is None:
        return zip(count(_FIRST_INHERITED), repeat("unknown", how_many), strict=False)
    names = text.split(":") if text else []
    if len(names) != how_many:
        raise ValueError(f"the environment has LISTEN_FDS={how_many}, but LISTEN_FDNAMES={text!r}: {len(names)} names")
    return enumerate(names, _FIRST_INHERITED)


def _is_stats_file(fd: int) -> bool:
    link = str(Path(f"/proc/self/fd/{fd}").readlink())
    kvm = KVM_LINK.fullmatch(link)
    return (kvm is not None and kvm["what"].endswith("-stats")) or link.startswith(_STAND_INS)
