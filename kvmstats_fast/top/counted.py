"""Counted: what the files of VMs counted since a moment, while VMs and vCPUs come and go.

Memory does not grow with time: of a VM that has gone nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.analysis.tally import KernelCounts
from kvmstats_fast.analysis.time_shares import HALT, time_between
from kvmstats_fast.analysis.whole_run import Whole
from kvmstats_fast.changes import totals
from kvmstats_fast.groups import Columns
from kvmstats_fast.samples import Samples
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.changes import Change
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat


@dataclass(frozen=True, slots=True)
class Part:
    """What the files of one kind and kernel counted.

    Attributes
    ----------
    stats : dict of str to Stat
        By name.
    change : dict of str to numpy.ndarray
        What each statistic changed by, raw: (n,) or (n, buckets).
    begin, end : dict of str to numpy.ndarray
        Its first and its last value, raw: uint64 (n,) or (n, buckets).
    span : tuple of int
        CLOCK_MONOTONIC in ns at the first sweep and the last.
    seconds, halted : numpy.ndarray
        float64 (n,): how long each file was read, and how much of that its vCPU was halted.
    failed : numpy.ndarray
        bool (n,): whether it cannot be read any more.
    """

    schema: Schema
    kind: str
    files: tuple[FileInfo, ...]
    stats: dict[str, Stat]
    change: dict[str, Change]
    begin: dict[str, npt.NDArray[np.uint64]]
    end: dict[str, npt.NDArray[np.uint64]]
    span: tuple[int, int]
    seconds: Values
    halted: Values
    failed: npt.NDArray[np.bool_]

    @property
    def counts(self) -> KernelCounts:
        """What other rooms make rows of."""
        seconds = np.where(self.seconds > 0, self.seconds, np.nan)
        return KernelCounts(self.files, self.stats, self.change, self.end, seconds)

    def take(self, rows: Sequence[int]) -> Part:
        """Return what some of the files counted."""
        return replace(
            self,
            files=tuple(self.files[row] for row in rows),
            change={name: one[rows] for name, one in self.change.items()},
            begin={name: one[rows] for name, one in self.begin.items()},
            end={name: one[rows] for name, one in self.end.items()},
            seconds=self.seconds[rows],
            halted=self.halted[rows],
            failed=self.failed[rows],
        )


#: What files counted, by kind and kernel.
Counted = tuple[Part, ...]


def count(samples: Samples) -> Counted:
    """Return what was counted from the first of these sweeps, of which there is at least one, to the last."""
    last = last_sweeps(samples)
    parts = []
    for part, group in zip(samples.split(), samples.groups, strict=True):
        ends = last[group.columns]
        rows = np.maximum(ends, 0), np.arange(len(ends))
        stats = {name: part.stat(name) for name in part.names}
        halted = np.zeros(len(ends))
        if len(samples) > 1 and HALT in stats and group.kind == "vcpu":
            halted = time_between(part, HALT, np.array([0, len(samples) - 1]))[0]
        parts.append(
            Part(
                group.schema,
                group.kind,
                part.files,
                stats,
                {name: total.exact() for name, total in totals(part, part.names).items()},
                {name: part[name][0] for name in stats},
                {name: part[name][rows] for name in stats},
                (int(samples.time[0]), int(samples.time[-1])),
                (samples.time[rows[0]] - samples.time[0]) / 1e9,
                halted,
                ends < len(samples) - 1,
            )
        )
    return tuple(parts)


def add(before: Counted, now: Counted) -> Counted:
    """Return what the files that are there now counted, and counted before."""
    return tuple(_add(before, part) for part in now)


def _add(before: Counted, now: Part) -> Part:
    for part in before:
        if part.files == now.files and part.stats == now.stats:
            return _sum(now, part, slice(None), slice(None))
    places = {_key(info): (part, row) for part in before for row, info in enumerate(part.files)}
    for part in before:
        here = [
            (row, places[_key(info)][1])
            for row, info in enumerate(now.files)
            if _key(info) in places and places[_key(info)][0] is part
        ]
        if here:
            rows, old = map(np.array, zip(*here, strict=True))
            now = _sum(now, part, rows, old)
    return now


def _key(info: FileInfo) -> tuple[object, ...]:
    return info.host, info.vm, info.pid, info.kind, info.vcpu_id


def _sum(now: Part, before: Part, rows: npt.NDArray[np.intp] | slice, old: npt.NDArray[np.intp] | slice) -> Part:
    """Return `now`, in these rows with what the old ones of `before` counted."""
    change = {}
    for name, one in now.change.items():
        known = before.change.get(name)
        if known is not None and known.shape[1:] == one.shape[1:] and known.dtype == one.dtype:
            one = one.copy()  # noqa: PLW2901 - others have it, too
            one[rows] += known[old]
        change[name] = one
    seconds, halted = now.seconds.copy(), now.halted.copy()
    seconds[rows] += before.seconds[old]
    halted[rows] += before.halted[old]
    return replace(now, change=change, seconds=seconds, halted=halted)


def bridge(before: Counted, now: Counted) -> Counted:
    """Return what was counted now, and since before it: that which neither has, where the files have changed between.

    Counters that fell were cleared, or the VM was made anew: what they have now was counted since.
    """
    between: Counted = ()
    for part in now:
        for other in before:
            if (part.schema, part.stats) == (other.schema, other.stats) and other.span[1] < part.span[0]:
                places = {_key(info): row for row, info in enumerate(other.files) if not other.failed[row]}
                rows = [row for row, info in enumerate(part.files) if _key(info) in places]
                if rows:
                    old = [places[_key(part.files[row])] for row in rows]
                    between += count(_join(other.take(old), part.take(rows)))
    return add(between, now)


def _join(before: Part, now: Part) -> Samples:
    """Return the last sweep of the same files before, and the first now, as samples."""
    arrays = tuple(np.stack([before.end[name], now.begin[name]]) for name in now.stats)
    places = {name: (stat, place) for place, (name, stat) in enumerate(now.stats.items())}
    group = Columns(now.schema, now.kind, places, np.arange(len(now.files)), arrays)
    span = np.array([before.span[1], now.span[0]], np.int64)
    return Samples((group,), now.files, span, np.zeros(2, np.int64), np.arange(2, dtype=np.uint64))


class WholeCounted(Whole):
    """What files of a kind counted, for what follows from it: `Whole` has the rules."""

    def __init__(self, counted: Counted, kind: str) -> None:
        self._parts = []
        files: list[FileInfo] = []
        for part in counted:
            if part.kind == kind:
                self._parts.append((part, np.arange(len(files), len(files) + len(part.files))))
                files += part.files
        super().__init__(tuple(files), [stat for part, _ in self._parts for stat in part.stats.values()])
        self.seconds = np.concatenate([np.empty(0), *(part.seconds for part, _ in self._parts)])
        self.seconds[self.seconds <= 0] = np.nan

    def change(self, name: str) -> Values:
        """Return the change of a statistic, (n,)."""
        result = self._nothing()
        for part, places in self._having(name):
            result[places] = part.stats[name].scale_array(part.change[name])
        result[np.isnan(self.seconds)] = np.nan
        return result

    def end(self, name: str) -> Values:
        """Return the last value of a statistic that was read, (n,)."""
        result = self._nothing()
        for part, places in self._having(name):
            result[places] = part.stats[name].scale_array(part.end[name])
        return result

    def halted(self) -> Values:
        """Return how long each vCPU was halted, in seconds, (n,)."""
        result = self._nothing()
        for part, places in self._having(HALT):
            result[places] = part.halted
        result[np.isnan(self.seconds)] = np.nan
        return result

    def elapsed(self, files: Sequence[int]) -> float:
        """Return how many seconds any of some files was read; NaN if that is no time."""
        return float(np.fmax.reduce(self.seconds[files], initial=np.nan))

    def files_having(self, names: Iterable[str]) -> list[int]:
        """Return the indices of the files that have all these statistics."""
        return [place for _, places in self._having(*names) for place in places.tolist()]

    def _nothing(self) -> Values:
        return np.full(len(self.files), np.nan)

    def _having(self, *names: str) -> list[tuple[Part, npt.NDArray[np.intp]]]:
        return [
            one for one in self._parts if all(name in one[0].stats and not one[0].stats[name].shape for name in names)
        ]
