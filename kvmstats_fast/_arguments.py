"""Checks of arguments that several rooms share: a wrong one is named, with what it must be."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, SupportsFloat, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_T = TypeVar("_T")


def article(value: object) -> str:
    """Return ``a str`` or ``an int``: the type of a value, to name in a message."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def check_integer(
    name: str, value: object, least: int, most: int | None = None, error: type[Exception] = ValueError
) -> int:
    """Return an argument as an int; TypeError if it is not a whole number, `error` if it is out of range."""
    wanted = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = operator.index(cast("int", value))
    except TypeError:
        raise TypeError(f"{name} is {article(value)}; it must be a whole number, {wanted}") from None
    if number < least or (most is not None and number > most):
        raise error(f"{name} is {number}; it must be {wanted}")
    return number


def check_seconds(name: str, value: object, most: float = math.inf, *, zero: bool) -> float:
    """Return an argument as seconds; TypeError if it is not a number, ValueError if it is out of range."""
    wanted = "0 or more seconds" if zero else "more than 0 seconds"
    wanted += f", at most {most:g}" if most < math.inf else ""
    if not isinstance(value, (Real, SupportsFloat)) or isinstance(value, str):
        raise TypeError(f"{name} is {article(value)}; it must be a number of seconds")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not (0 <= seconds <= most) or (seconds == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be {wanted}")
    return seconds


def check_fraction(name: str, value: object) -> float:
    """Return an argument from 0 to 1 as a float; TypeError if it is not a number, ValueError if it is out of range."""
    if not isinstance(value, (Real, SupportsFloat)) or isinstance(value, str):
        raise TypeError(f"{name} is {article(value)}; it must be a number from 0 to 1")
    fraction = float(value)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to 1")
    return fraction


def check_name(value: object) -> None:
    """Raise TypeError if this cannot be the name of a statistic."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is {article(value)}, not the name of a statistic")


def check_names(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """Return an argument that is one name or several as a tuple; TypeError if it is neither."""
    wanted = "it must be a name or glob, or several"
    if isinstance(value, str):
        return (value,)
    try:
        names = tuple(value)
    except TypeError:
        raise TypeError(f"{name} is {article(value)}; {wanted}") from None
    for one in names:
        if not isinstance(one, str):
            raise TypeError(f"{name} has {article(one)}; {wanted}")
    return names


def find_fitting(pattern: str, known: Collection[str]) -> list[str]:
    """Return what a name or glob fits: the name alone if it is known, for names may look like globs."""
    if pattern in known:
        return [pattern]
    from fnmatch import filter as matching  # noqa: PLC0415 - for patterns alone

    return matching(known, pattern)  # on POSIX case matters there too


def check_kind(kind: str | None) -> None:
    """Raise ValueError if this is no kind of stats file, nor None for both."""
    if kind not in (None, "vm", "vcpu"):
        raise ValueError(f"kind is {kind!r}; it must be 'vm' or 'vcpu'")


def check_all(name: str, value: Iterable[_T], kind: type[_T]) -> tuple[_T, ...]:
    """Return an argument of several objects of a kind as a tuple; TypeError if it is anything else."""
    wanted = f"it must be several {kind.__name__}"
    try:
        objects = tuple(value)
    except TypeError:
        raise TypeError(f"{name} is {article(value)}; {wanted}") from None
    for one in objects:
        if not isinstance(one, kind):
            raise TypeError(f"{name} has {article(one)}; {wanted}")
    return objects
