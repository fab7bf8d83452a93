"""Results of benchmark suites against each other: what pytest-benchmark and pyperf wrote, with counters of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmstats_fast.analysis.compare import Change, Comparison
from kvmstats_fast.analysis.welch import Spread, Welch
from kvmstats_fast.errors import KvmStatsError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

#: The key of pytest-benchmark's ``extra_info``, and what names in pyperf's metadata start with.
EXTRA_INFO, PREFIX = "kvmstats", "kvmstats_"
_VALUES = PREFIX + "values"


class Count(NamedTuple):
    """What a statistic counted per iteration or loop: the mean of rounds or runs, and how these spread."""

    mean: float
    spread: Spread


class Counted(NamedTuple):
    """What was counted in one benchmark: by name of the statistic, in so many rounds or runs."""

    counts: dict[str, Count]
    number: int
    unit: str


def is_suite(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file of JSON, such as suites write, and so no recording."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def read_suite(path: str | os.PathLike[str]) -> dict[str, Counted]:
    """Return what was counted in each benchmark that was counted.

    Parameters
    ----------
    path : path-like
        What ``pytest --benchmark-json`` or ``--benchmark-save`` wrote, or ``pyperf -o``.

    Raises
    ------
    OSError
        If it cannot be read.
    KvmStatsError
        If it is something else.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        found = [_read_benchmark(one, content) for one in content["benchmarks"]]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise KvmStatsError(f"{path} is not what pytest-benchmark or pyperf writes: {error!r}") from None
    return {name: counted for name, counted in found if counted is not None}


def _read_benchmark(one: dict[str, Any], content: dict[str, Any]) -> tuple[str, Counted | None]:
    if "runs" in one:
        return _read_pyperf(one, content)
    name, extra = str(one["fullname"]), one["extra_info"].get(EXTRA_INFO)
    if extra is None:
        return name, None
    rounds = extra["rounds"]
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}")
    counts = {}
    for stat, value in extra["per_iteration"].items():
        mean, deviation = _number(value), _number(extra["stddev"][stat])
        square = (deviation / mean) ** 2 if mean else 0.0
        counts[stat] = Count(mean, Spread(square if rounds > 1 else math.nan, rounds))
    return name, Counted(counts, rounds, "round")


def _read_pyperf(one: dict[str, Any], content: dict[str, Any]) -> tuple[str, Counted | None]:
    # What all runs have in common stands once, for the benchmark or for the file.
    common = {**content.get("metadata", {}), **one.get("metadata", {})}
    runs = [{**common, **run.get("metadata", {})} for run in one["runs"] if run.get("values")]
    runs = [run for run in runs if _VALUES in run]
    if not runs:
        return str(common.get("name", "")), None
    names = dict.fromkeys(key for run in runs for key in run if key.startswith(PREFIX) and key != _VALUES)
    counts = {
        name.removeprefix(PREFIX): _join([_number(run.get(name, 0)) for run in runs])  # 0 is left out
        for name in names
    }
    return str(runs[0]["name"]), Counted(counts, len(runs), "run")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{value!r} is not a count")
    return float(value)


def _join(values: Sequence[float]) -> Count:
    mean = sum(values) / len(values)
    return Count(mean, Spread.of(values) if mean else Spread(0.0 if len(values) > 1 else math.nan, len(values)))


def compare_suites(
    a: Iterable[Mapping[str, Counted]], b: Iterable[Mapping[str, Counted]], confidence: float = 0.95
) -> tuple[dict[str, Comparison], list[str]]:
    """Compare what was counted in two sets of results.

    Parameters
    ----------
    a, b : iterable of mapping
        What `read_suite` returned, of one file or several. Of one file the rounds (pytest-benchmark) or runs (pyperf)
        are the units that the interval stands on; of several on a side the files are.
    confidence : float
        Confidence level of the intervals.

    Returns
    -------
    comparisons : dict of str to Comparison
        By benchmark; those that both sides have. `Change.units` is ``"1/iteration"`` or ``"1/loop"``.
    missing : list of str
        Benchmarks that one side has.
    """
    sides = [list(a), list(b)]
    several = max(map(len, sides)) > 1
    found = [[name for results in side for name in results] for side in sides]
    # Of all benchmarks: pyperf's hook leaves out what one counted nothing of.
    results = (results for side in sides for results in side)
    stats = dict.fromkeys(stat for one in results for counted in one.values() for stat in counted.counts)
    comparisons = {}
    for name in dict.fromkeys(found[0]):
        if name in found[1]:
            both = [[results[name] for results in side if name in results] for side in sides]
            comparisons[name] = _compare(both, stats, confidence, several=several)
    missing = [name for name in dict.fromkeys(found[0] + found[1]) if name not in comparisons]
    return comparisons, missing


def _compare(sides: list[list[Counted]], stats: Iterable[str], confidence: float, *, several: bool) -> Comparison:
    interval = Welch(confidence)
    units = "1/loop" if sides[0][0].unit == "run" else "1/iteration"
    changes = []
    for name in stats:
        a, b = (_count(side, name, several=several) for side in sides)
        ratio = b.mean / a.mean if a.mean else math.inf if b.mean else math.nan
        low = high = math.nan
        if a.mean and b.mean:
            low, high = interval.between(a.spread, b.spread, math.log(ratio))
        changes.append(Change(name, a.mean, b.mean, ratio, low, high, units))
    runs = [len(side) if several else side[0].number for side in sides]
    unit = "file" if several else sides[0][0].unit
    return Comparison(changes, (runs[0], runs[1]), confidence, method=f"spread of {unit}s")


def _count(side: list[Counted], name: str, *, several: bool) -> Count:
    """Return what one side counted; what is not there counted nothing, as pyperf's hook writes it."""
    if several:
        return _join([counted.counts[name].mean if name in counted.counts else 0.0 for counted in side])
    nothing = Count(0.0, Spread(0.0, side[0].number))
    return side[0].counts.get(name, nothing)
