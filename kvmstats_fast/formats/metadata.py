"""What a file may say of itself: the types, shapes and ranges of its metadata, checked once, before any of it is used.

A file may come from anywhere. JSON that has passed its check can be used without further precaution, and what has not
is one KvmStatsError that names the file and the field. The checks are a few functions of our own, because ``.npz``
files are read with numpy alone, where no library that validates is at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from reprlib import repr as short_repr
from typing import Any, TypeAlias

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.file_info import MOST_LABEL
from kvmstats_fast.formats.limits import MOST_FILES, MOST_METADATA

#: Raises `Wrong` for a value that it does not accept.
Check: TypeAlias = Callable[[Any], None]


INT32, INT64, UINT64 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1), (0, 2**64 - 1)


class Wrong(Exception):  # noqa: N818 - it never leaves this package
    """A value is not what its check accepts: where it stands in the field, and what it must be."""

    def __init__(self, value: object, must_be: str) -> None:
        super().__init__()
        self.where, self.value, self.must_be = "", value, must_be

    def __str__(self) -> str:
        return f"{self.where} is {short_repr(self.value)}; it must be {self.must_be}"


def anything(_: Any) -> None:
    """Accept anything."""


def whole(low: int, high: int) -> Check:
    """Accept an int from `low` to `high`."""

    def check(value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Wrong(value, f"a whole number from {low} to {high}")

    return check


def number(low: float, high: float) -> Check:
    """Accept an int or float from `low` to `high`, which NaN is not."""

    def check(value: Any) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Wrong(value, f"a number from {low:g} to {high:g}")

    return check


def flag(value: Any) -> None:
    """Accept a bool."""
    if type(value) is not bool:
        raise Wrong(value, "true or false")


def text(most: int = MOST_LABEL) -> Check:
    """Accept a text of at most so many characters."""

    def check(value: Any) -> None:
        if type(value) is not str or len(value) > most:
            raise Wrong(value, f"a text of at most {most} characters")
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise Wrong(value, "a text that UTF-8 can encode") from None

    return check


def pattern(regex: str, what: str) -> Check:
    """Accept a text that a regular expression matches as a whole."""
    compiled = re.compile(regex)

    def check(value: Any) -> None:
        if type(value) is not str or not compiled.fullmatch(value):
            raise Wrong(value, what)

    return check


def choice(*allowed: str) -> Check:
    """Accept one of some texts."""

    def check(value: Any) -> None:
        if value not in allowed:
            raise Wrong(value, " or ".join(map(repr, allowed)))

    return check


def optional(inner: Check) -> Check:
    """Accept null, too."""

    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def either(*inner: Check) -> Check:
    """Accept what one of some checks accepts."""

    def check(value: Any) -> None:
        wrong = []
        for one in inner:
            try:
                return one(value)
            except Wrong as error:  # noqa: PERF203 - there are two
                wrong.append(error.must_be)
        raise Wrong(value, " or ".join(wrong))

    return check


def listed(inner: Check, most: int = MOST_FILES, least: int = 0) -> Check:
    """Accept a list of at most so many values."""

    def check(value: Any) -> None:
        if type(value) is not list or not least <= len(value) <= most:
            raise Wrong(value, f"a list of {least} to {most}")
        for index, one in enumerate(value):
            _check_inside(inner, one, index)

    return check


def row(*inner: Check) -> Check:
    """Accept a list with one value for each check."""

    def check(value: Any) -> None:
        if type(value) is not list or len(value) != len(inner):
            raise Wrong(value, f"a list of {len(inner)}")
        for index, (one, check_one) in enumerate(zip(value, inner, strict=True)):
            _check_inside(check_one, one, index)

    return check


def mapping(inner: dict[str, Check]) -> Check:
    """Accept an object with these fields; it may have others."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise Wrong(value, "an object")
        for name, check_one in inner.items():
            if name not in value:
                raise Wrong(value, f"an object with the field {name!r}")
            _check_inside(check_one, value[name], name)

    return check


def check_written(fields: Mapping[str, str], checks: Mapping[str, Check]) -> None:
    """Raise ValueError if a reader would refuse the JSON of any of these fields."""
    try:
        for field, check in checks.items():
            read_json(fields[field].encode(), field, "these samples cannot be written", check)
    except KvmStatsError as error:
        raise ValueError(str(error)) from None


def _check_inside(check: Check, value: Any, key: int | str) -> None:
    try:
        check(value)
    except Wrong as wrong:
        wrong.where = f"[{key!r}]{wrong.where}"
        raise


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # converting digits takes quadratic time
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _parse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_json(raw: bytes, field: str, source: str, check: Check) -> Any:
    """Return what a field's JSON says, checked; KvmStatsError names `source` and the field."""
    if len(raw) > MOST_METADATA:
        raise KvmStatsError(f"{source}: {field} has {len(raw)} bytes; more than {MOST_METADATA} are refused")
    try:
        value = json.loads(raw.decode("ascii"), parse_int=_parse_int, parse_constant=_parse_constant)
    except (ValueError, RecursionError) as error:  # not ASCII, not JSON, a number or a nesting beyond measure
        raise KvmStatsError(f"{source}: {field} is damaged: it is not JSON: {error}") from None
    try:
        check(value)
    except Wrong as wrong:
        raise KvmStatsError(f"{source}: {field}{wrong}") from None
    return value
