"""The files that failed while they were sampled, as JSON keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmstats_fast.errors import AttachError, ErrorCode, FormatError, KvmStatsError, VmGoneError
from kvmstats_fast.formats.metadata import (
    INT32,
    INT64,
    UINT64,
    Check,
    Wrong,
    anything,
    either,
    listed,
    optional,
    row,
    text,
    whole,
)
from kvmstats_fast.samples import SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What a file can fail with, by the name that is kept; of a subclass that is none of these, the nearest.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (VmGoneError, AttachError, FormatError, OSError, ValueError, KvmStatsError)
}
_MESSAGE = row(text(1 << 16))
_OS_ERROR = either(row(optional(whole(*INT32)), optional(text(1 << 16))), _MESSAGE)
_FORMAT_ERROR = row(whole(min(ErrorCode), max(ErrorCode)), whole(*UINT64), text(1 << 16))


def describe(errors: Iterable[SampleError]) -> list[tuple[int, int, str, list[Any]]]:
    """Return file, sweep, exception and its arguments of each."""
    return [(error.file, error.sweep, *_describe(error.error)) for error in errors]


def _describe(error: Exception) -> tuple[str, list[Any]]:
    if isinstance(error, FormatError):
        return "FormatError", [int(error.code), error.offset, str(error)]
    name = next((kind.__name__ for kind in type(error).__mro__ if kind in _KINDS.values()), "KvmStatsError")
    if isinstance(error, OSError) and error.errno is not None:
        return name, [error.errno, error.strerror]
    return name, [str(error)]


def check_errors(files: int) -> Check:
    """Accept what `describe` returns for samples of so many files."""
    shape = listed(row(whole(0, files - 1), whole(0, INT64[1]), text(), anything))

    def check(value: Any) -> None:
        shape(value)
        for index, (_, _, name, arguments) in enumerate(value):
            kind = _KINDS.get(name, KvmStatsError)
            accept = _FORMAT_ERROR if kind is FormatError else _OS_ERROR if issubclass(kind, OSError) else _MESSAGE
            try:
                accept(arguments)
            except Wrong as wrong:
                wrong.where = f"[{index}][3]{wrong.where}"
                raise
        if len({file for file, *_ in value}) < len(value):
            raise Wrong(value, "of different files")

    return check


def restore(errors: list[list[Any]]) -> tuple[SampleError, ...]:
    """Return the errors; an exception whose name is not known here becomes a KvmStatsError."""
    return tuple(SampleError(file, sweep, _restore(name, arguments)) for file, sweep, name, arguments in errors)


def _restore(name: str, arguments: list[Any]) -> Exception:
    kind = _KINDS.get(name, KvmStatsError)
    return FormatError(ErrorCode(arguments[0]), *arguments[1:]) if kind is FormatError else kind(*arguments)
