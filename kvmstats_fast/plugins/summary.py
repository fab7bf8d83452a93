"""The table at the end of a run of pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import format_table

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLUMNS = 6


def format_summary(told: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return a line for each test, and a column for each of the statistics that counted in most of them.

    Parameters
    ----------
    told : sequence of (str, dict)
        The tests, and of each what `Watched.to_dict` gives and the budgets that were not checked.
    """
    seen: dict[str, tuple[int, float]] = {}
    for _, one in told:
        for name, count in one["counts"].items():
            tests, most = seen.get(name, (0, 0.0))
            seen[name] = tests + 1, max(most, count)
    # Times in ns come after counts of events: they would always be the largest.
    names = sorted(seen, key=lambda name: (name.endswith("_ns"), -seen[name][0], -seen[name][1], name))
    shown = names[:_COLUMNS]
    rows = [("test", "per", *shown)]
    for test, one in told:
        rows.append((test, one["per"], *(f"{one['counts'].get(name, 0):.6g}" for name in shown)))
    lines = [format_table(rows, "<<" + ">" * len(shown))]
    if len(names) > len(shown):
        lines.append(f"also counted: {', '.join(names[len(shown) :])}")
    for test, one in told:
        lines += [f"{test}: no budget per {per}: benchmarks are disabled" for per in one["unchecked"]]
    return "\n".join(lines)
