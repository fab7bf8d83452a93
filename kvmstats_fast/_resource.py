"""What owns a file descriptor or C memory."""

from __future__ import annotations

import operator
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self


class HasFileno(Protocol):
    """Anything with a ``fileno()``."""

    def fileno(self) -> int:
        """Return the file descriptor."""


def fd_of(file: int | HasFileno) -> int:
    """Return the number of a file descriptor, or of an object that has one."""
    fileno = getattr(file, "fileno", None)
    if fileno is not None:
        return int(fileno())
    try:
        return operator.index(file)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{file!r} is not a file descriptor: pass its number, or an object with fileno()") from None


def describe_fd(fd: int) -> str:
    """Return ``fd 7 (anon_inode:kvm-vm)``, as /proc shows it."""
    with suppress(OSError):
        return f"fd {fd} ({Path(f'/proc/self/fd/{fd}').readlink()})"
    return f"fd {fd}"


class Unique:
    """Cannot be copied or pickled: two would own the same file descriptor or memory."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled: it owns files or memory; make another one")


class Closing(Unique):
    """Is closed at the end of a ``with`` block."""

    __slots__ = ()

    def close(self) -> None:
        """Close it; a second call does nothing."""
        raise AssertionError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Fd(Closing):
    """Owns a file descriptor from the instant the kernel hands it out.

    ``Fd(os.open, path, flags)`` calls ``os.open(path, flags)`` and owns what that returns. Signal handlers run between
    bytecode instructions only, and the call and the store are one instruction: Ctrl-C comes before it, when there is no
    fd, or after it, when the fd has an owner. So do `close` and `replace` take the fd and act on it. An fd that nobody
    owns any more is closed, in whatever thread; of two threads that close one Fd, one does.

    Parameters
    ----------
    call : callable
        Written in C, and so are its results; `functools.partial` is, too. It returns the fd, or -errno.
    *arguments
        Positional arguments of `call`.
    owned : bool
        Whether `close` and the end of this object close the fd. It may be set at any time, which is one instruction.

    Raises
    ------
    OSError
        As `call` raises it, or with the errno that it returned.
    """

    __slots__ = ("_held", "owned")

    def __init__(self, call: Callable[..., int], *arguments: Any, owned: bool = True) -> None:
        self.owned = owned
        self._held: list[int] = []  # of one fd or none: its methods are atomic
        self._held.extend(map(call, *((argument,) for argument in arguments)))
        if self._held[0] < 0:
            error = -self._held.pop()
            raise OSError(error, os.strerror(error))

    @classmethod
    def adopt(cls, fd: int, owned: bool = True) -> Self:
        """Own an fd that is open already, or keep its number only."""
        return cls(operator.index, fd, owned=owned)

    @property
    def closed(self) -> bool:
        """Whether there is no fd to own any more."""
        return not self._held

    def fileno(self) -> int:
        """Return the number; ValueError if closed."""
        try:
            return self._held[0]
        except IndexError:
            raise ValueError("this file descriptor is closed") from None

    def detach(self) -> int:
        """Give the fd away: the caller closes it."""
        try:
            return self._held.pop()
        except IndexError:
            raise ValueError("this file descriptor is closed") from None

    def replace(self, other: int) -> None:
        """Put a duplicate of `other` in this fd's place: the number stays taken. If that fails the fd is closed."""
        with suppress(IndexError):
            fd = self._held[0]
            try:
                self._held.extend(map(os.dup2, (other,), map(list.pop, (self._held,)), (False,)))
            except OSError:  # the number is above a limit that was lowered since
                os.close(fd)

    def close(self) -> None:
        """Close the fd if it is owned; a second call does nothing."""
        with suppress(IndexError):
            if self.owned:
                any(map(os.close, map(list.pop, (self._held,))))
            else:
                self._held.pop()

    def __del__(self) -> None:
        if getattr(self, "_held", None):
            self.close()

    def __repr__(self) -> str:
        return f"<Fd {self._held[0]}>" if self._held else "<Fd, closed>"
