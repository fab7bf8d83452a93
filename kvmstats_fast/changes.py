"""Changes of samples: from sweep to sweep, per second, where counters were cleared, and over the whole run.

Internal: `Samples` has the public methods, and `series` works them out for files of one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from kvmstats_fast import series
from kvmstats_fast._arguments import check_names, find_fitting
from kvmstats_fast.errors import unknown_stat
from kvmstats_fast.groups import find_columns, join_columns
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.series import Values
    from kvmstats_fast.stat import Stat

    Change: TypeAlias = npt.NDArray[np.uint64] | npt.NDArray[np.int64]

_Scalar = TypeVar("_Scalar", bound=np.generic)
_MOST = 1 << 64


class Total(NamedTuple):
    """How much a statistic changed over a run, modulo 2**64, and whether that is too little."""

    name: str
    change: Change
    overflowed: bool

    def exact(self) -> Change:
        """Return the change; ValueError if a uint64 does not hold it."""
        if self.overflowed:
            raise ValueError(
                f"the changes of {self.name}, which was cleared on the way, add up to more than a uint64 holds"
            )
        return self.change


def deltas(samples: Samples, names: Sequence[str]) -> dict[str, Change]:
    """Return the change from each sweep to the next, by name; see `Samples.delta`."""
    found = _collect(samples, names, lambda _, stats, values: series.deltas(stats, values))
    return {name: _blank(samples, name, change, 0) for name, change in found.items()}


def rates(samples: Samples, names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the change per second, by name; see `Samples.rate`."""
    found = _collect(samples, names, lambda _, stats, values: series.rates(stats, values, samples.time))
    return {name: _blank(samples, name, rate, np.nan) for name, rate in found.items()}


def resets(samples: Samples, names: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return where statistics were cleared, by name; see `Samples.resets`."""
    found = _collect(samples, names, lambda _, stats, values: series.resets(stats, values))
    return {name: _blank(samples, name, cleared, 0) for name, cleared in found.items()}


def totals(samples: Samples, names: Sequence[str]) -> dict[str, Total]:
    """Return the change over the whole run, by name; see `Samples.total`."""
    ends = last_sweeps(samples) + 1
    overflowed: set[str] = set()

    def add_up(group: Group, stats: Sequence[Stat], values: Sequence[Values]) -> list[Change]:
        sums = add_up_group(stats, values, ends[group.columns])
        overflowed.update(one.name for one in sums if one.overflowed)
        return [one.change for one in sums]

    found = _collect(samples, names, add_up, axis=0)
    return {name: Total(name, change, name in overflowed) for name, change in found.items()}


def add_up_group(stats: Sequence[Stat], values: Sequence[Values], ends: npt.NDArray[np.intp]) -> list[Total]:
    """Return the changes of statistics of the files of a group, each up to the sweep before its end."""
    if not values:
        return []
    if (ends == len(values[0])).all():
        parts = [series.totals(stats, values)]
    else:  # what a file has from the sweep on at which it failed means nothing
        files = enumerate(ends.tolist())
        parts = [series.totals(stats, [one[:stop, i : i + 1] for one in values]) for i, stop in files]
    return [
        Total(stat.name, np.concatenate([one.values for one in sums]), any(one.overflowed for one in sums))
        for stat, sums in zip(stats, zip(*parts, strict=True), strict=True)
    ]


def choose(samples: Samples, names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the statistics that names or globs fit, each once; None: all. KeyError if one fits nothing."""
    if names is None:
        return samples.names
    chosen: dict[str, None] = {}
    for pattern in check_names("names", names):
        fitting = find_fitting(pattern, samples.names)
        if not fitting:
            raise unknown_stat(pattern, samples.names, "these samples")
        chosen |= dict.fromkeys(fitting)
    return tuple(chosen)


def add_exactly(values: npt.NDArray[np.uint64], axis: int, what: str) -> npt.NDArray[np.uint64]:
    """Return the sum along an axis; ValueError, which names `what` is added, if a uint64 does not hold it."""
    result = np.asarray(np.add.reduce(values, axis=axis, dtype=np.uint64))
    # Floats show what may have wrapped round; only then are Python's integers worth their time.
    if (np.add.reduce(values, axis=axis, dtype=np.float64) > _MOST * 0.99).any():
        exact = np.add.reduce(values.astype(object), axis=axis)
        if not np.array_equal(exact, result.astype(object)):
            raise ValueError(f"{what} add up to more than a uint64 holds")
    return result


def _collect(
    samples: Samples,
    names: Sequence[str],
    work: Callable[[Group, Sequence[Stat], Sequence[Values]], Sequence[npt.NDArray[Any]]],
    axis: int = 1,
) -> dict[str, npt.NDArray[Any]]:
    """Return by name what `work` makes of the statistics of each group, all at once; files are along `axis`."""
    for name in names:
        samples.stat(name)  # its error says why there is no common one
    parts: dict[str, list[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]]] = {name: [] for name in names}
    for group in samples.groups:
        here = [name for name in parts if name in group.places]
        stats, values = [group.places[name][0] for name in here], [group.view(name) for name in here]
        for name, result in zip(here, work(group, stats, values), strict=True):
            parts[name].append((group.columns, result))
    return {name: join_columns(found, axis) for name, found in parts.items()}


def _blank(samples: Samples, name: str, changes: npt.NDArray[_Scalar], value: float) -> npt.NDArray[_Scalar]:
    """Overwrite the changes of files that had failed, and return them."""
    columns = find_columns(samples.groups, name).tolist() if samples.errors else []
    for error in samples.errors:
        if error.file in columns:
            changes[max(error.sweep - 1, 0) :, columns.index(error.file)] = value
    return changes
