"""Base classes of what owns a file descriptor or C memory."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
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
        raise TypeError(f"{file!r} is no file descriptor: pass its number, or an object with fileno()") from None


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
