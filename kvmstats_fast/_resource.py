"""What owns file descriptors: acquired and stored in one step, closed once."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from itertools import starmap
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from kvmstats_fast._text import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self


_pop = list.pop


class HasFileno(Protocol):
    """Anything with a ``fileno()``."""

    def fileno(self) -> int:
        """Return the file descriptor."""


def fd_of(file: int | HasFileno) -> int:
    """Return the number of a file descriptor, or of an object that has one."""
    if type(file) is int:  # nearly always: to look for fileno() in it would take as long as all the rest
        return file
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
        link = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - pathlib takes longer to import than this package
        return f"fd {fd} ({printable(link, 256)})"
    return f"fd {fd}"


class Unique:
    """Base of what cannot be copied or pickled, because two objects would own the same file or memory."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled, because it owns files or memory; make another one")


class Closing(Unique, ABC):
    """Base of what is closed at the end of a ``with`` block."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Fd(Closing):
    """Owner of a file descriptor from the instant the kernel returns it.

    ``Fd(os.open, path, flags)`` calls ``os.open(path, flags)`` and owns the result. Signal handlers run only between
    bytecode instructions, and call and store are one instruction: Ctrl-C comes before it, when there is no fd, or after
    it, when the fd has an owner. In the same way `close` and `replace` take the fd and act on it. When the object goes,
    the fd is closed, in whatever thread that is; of two threads that close one Fd, exactly one closes the fd.

    Parameters
    ----------
    call : callable
        A function written in C, or a `functools.partial` of one. It returns the fd, or -errno.
    *arguments
        Positional arguments of `call`.
    owned : bool
        Whether `close` and the end of this object close the fd. May be set at any time.

    Raises
    ------
    OSError
        As `call` raises it, or with the errno that it returned.
    """

    __slots__ = ("_held", "owned")

    def __init__(self, call: Callable[..., int], *arguments: Any, owned: bool = True) -> None:
        self.owned = owned
        held: list[int] = []  # the fd, or nothing: the methods of a list are atomic
        self._held = held
        held += starmap(call, (arguments,))
        if held[0] < 0:
            error = -held.pop()
            raise OSError(error, os.strerror(error))

    @classmethod
    def adopt(cls, fd: int, owned: bool = True) -> Self:
        """Return the owner of an fd that is open already; with ``owned=False`` it only keeps the number."""
        self = cls.__new__(cls)
        self.owned = owned
        self._held = [fd]
        return self

    @property
    def closed(self) -> bool:
        """Whether the fd was closed."""
        return not self._held

    def fileno(self) -> int:
        """Return the number; ValueError if closed."""
        try:
            return self._held[0]
        except IndexError:
            raise ValueError("this file descriptor is closed") from None

    def replace(self, other: int) -> None:
        """Put a duplicate of `other` in place of the fd, which keeps its number; if that fails, close it."""
        with suppress(IndexError):
            fd = self._held[0]
            try:
                self._held.extend(map(os.dup2, (other,), map(_pop, (self._held,)), (False,)))
            except OSError:  # the number is above a limit that was lowered in the meantime
                os.close(fd)

    def close(self) -> None:
        """Close the fd if it is owned; a second call does nothing."""
        try:
            if self.owned:
                for _ in map(os.close, map(_pop, (self._held,))):
                    pass
            else:
                self._held.pop()
        except IndexError:  # closed already
            pass

    def __del__(self) -> None:
        held = getattr(self, "_held", None)
        if held and held[0] >= 0:  # below 0: Ctrl-C came before the error was raised
            self.close()
