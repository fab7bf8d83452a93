"""A budget: how much a test may make KVM count."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from kvmstats_fast._text import format_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmstats_fast.plugins.counters import Watched

_PER = ("test", "round", "iteration")


class Budget:
    """What a ``@pytest.mark.kvm_budget(exits=1000, per="round")`` allows.

    Attributes
    ----------
    per : {"test", "round", "iteration"}
        What the limits are of: the whole test, or the mean of the measured rounds, or of their iterations.

    Raises
    ------
    pytest.UsageError
        If the marker does not fit.
    """

    def __init__(self, test: str, args: tuple[Any, ...], given: Mapping[str, Any], *, is_benchmark: bool) -> None:
        limits = dict(given)
        per = limits.pop("per", "test")
        fault = ""
        if args or not limits:
            fault = "it takes limits by name of a statistic, such as exits=1000"
        elif per not in _PER:
            fault = f"per is {per!r}; it must be one of {', '.join(map(repr, _PER))}"
        elif per != "test" and not is_benchmark:
            fault = f"per={per!r} is for tests with the benchmark fixture of pytest-benchmark"
        for name, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
                fault = f"{name} is {limit!r}; a limit must be a number, 0 or more"
        if fault:
            raise pytest.UsageError(f"kvm_budget of {test}: {fault}")
        self.per: str = per
        self._limits = limits

    def check(self, watched: Watched) -> str:
        """Return what was exceeded, and by how much, as a table; empty if nothing was, or if it is not known.

        If files could not be read, or have no such statistic, it says so.
        """
        if watched.errors:
            return "\n".join(["KVM budget not kept: not all files could be read", *watched.errors])
        if not watched.knows(self.per):
            return ""
        rows = [("statistic", "counted", "budget", "over by", "")]
        for name, limit in self._limits.items():
            try:
                counted = watched.find(name, self.per)
            except KeyError as error:
                return f"kvm_budget: {error.args[0]}"
            if counted > limit:
                share = f"{(counted - limit) / limit:+.1%}" if limit else ""
                rows.append((name, f"{counted:.12g}", f"{limit:.12g}", f"{counted - limit:.12g}", share))
        if len(rows) == 1:
            return ""
        return f"KVM budget exceeded, per {watched.describe(self.per)}:\n{format_table(rows, '<>>>>')}"
