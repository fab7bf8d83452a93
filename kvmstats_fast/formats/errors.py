"""Exceptions of sampled files, as JSON keeps them."""

from __future__ import annotations

from typing import Any

from kvmstats_fast.errors import ErrorCode, FormatError, KvmStatsError


def described(error: Exception) -> tuple[str, list[Any]]:
    """Return an exception's kind and arguments."""
    if isinstance(error, FormatError):
        return "FormatError", [int(error.code), error.offset, str(error)]
    if isinstance(error, OSError):
        return "OSError", [error.errno, error.strerror]
    return type(error).__name__, [str(error)]


def raised(kind: str, arguments: list[Any]) -> Exception:
    """Return the exception; one of a kind that samples do not have becomes a KvmStatsError."""
    if kind == "FormatError":
        return FormatError(ErrorCode(arguments[0]), *arguments[1:])
    return {"OSError": OSError, "ValueError": ValueError}.get(kind, KvmStatsError)(*arguments)
