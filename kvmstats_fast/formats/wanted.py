"""What of a recording is read: some statistics, files, a range of time. The rest is passed over, not decompressed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.metadata import INT64
from kvmstats_fast.joining import join_samples
from kvmstats_fast.spans import Span, resample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

ALWAYS = Span(None, None)


class Step(NamedTuple):
    """Samples that were read at once.

    Attributes
    ----------
    samples : Samples
    stored : int
        Bytes that they take in their files.
    follows : bool
        Whether they follow those of the step before: nothing between them was passed over.
    """

    samples: Samples
    stored: int
    follows: bool


@dataclass(frozen=True)
class Wanted:
    """What of a run is read.

    Attributes
    ----------
    names : frozenset of str or None
        Of statistics; None: all.
    files : frozenset of int or None
        Indices in `Origin.files`; of a stream that has one of them all files are read. None: all.
    span : Span
    since : int
        Where seconds of the span count from: `Samples.time` of the first sweep of the run.
    """

    names: frozenset[str] | None = None
    files: frozenset[int] | None = None
    span: Span = ALWAYS
    since: int = 0

    def choose(self, stats: Sequence[Stat]) -> list[int]:
        """Return which of the statistics of a file are read."""
        return [index for index, stat in enumerate(stats) if self.names is None or stat.name in self.names]

    def has_any(self, origin: Origin, stats: Sequence[Stat]) -> bool:
        """Whether anything of a stream is read."""
        return bool(self.choose(stats)) and not (self.files is not None and self.files.isdisjoint(origin.columns))

    def may_have(self, wall: npt.NDArray[np.int64], happened: dict[str, Any]) -> bool:
        """Whether any of the sweeps of a batch may be in the range; `wall` is when those of its rows were."""
        steps = [(0, happened["wall_offset"]), *map(tuple, happened["wall_steps"])]
        ticks, rowless, _ = happened["rowless"]
        first_rowless = happened["sweeps"] - len(ticks)
        times = [
            time + steps[max(bisect_right(steps, (sweep, INT64[1])) - 1, 0)][1]
            for sweep, time in enumerate(rowless, first_rowless)
        ]
        offsets = [offset for _, offset in steps]
        if len(wall):
            times += [int(wall.min()), int(wall.max())]
        if not times:
            return False
        first, last = min(times), max(times)
        return self.span.may_have((first, last), (first - max(offsets) - self.since, last - min(offsets) - self.since))

    def take(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Give the sweeps in the range, of samples that follow each other."""
        is_whole = True  # to the end of the step before
        for step in steps:
            if self.span == ALWAYS:
                yield step
                continue
            samples = step.samples
            end, is_whole = 0 if step.follows and is_whole else -1, False
            since = int(samples.time[0]) - self.since if len(samples) else 0
            for one in self.span.moved(since).find(samples):
                yield Step(samples[one], step.stored, one.start == end)
                end, is_whole = one.stop, one.stop == len(samples)


def check_order(steps: Iterable[Step], path: Path) -> Iterator[Step]:
    """Give the steps of a run; KvmStatsError, which names its `path`, where they cannot follow those before."""
    last: int | None = None
    failed: set[int] = set()
    for step in steps:
        samples = step.samples
        if len(samples):
            if last is not None and int(samples.time[0]) < last:
                raise KvmStatsError(f"{path}: this recording is damaged: its sweeps are not in the order of time")
            if not failed <= {error.file for error in samples.errors if not error.sweep}:
                raise KvmStatsError(f"{path}: this recording is damaged: a file that had failed was read again")
            last = int(samples.time[-1])
            failed |= {error.file for error in samples.errors}
        yield step


def resample_steps(steps: Iterable[Step], interval: float) -> Iterator[Step]:
    """Give the last sweep of each interval; the last of a step is held back until it is known to be that."""
    held: Samples | None = None
    since: int | None = None
    follows = True  # whether what is given next follows what was given before
    for step in steps:
        if not step.follows:
            if held is not None:
                yield Step(held, 0, follows)
            held, follows = None, False
        if not len(step.samples):
            continue
        since = int(step.samples.time[0]) if since is None else since
        found = resample(step.samples, interval, since)
        is_apart = held is not None and held.tick[0] < found.tick[0]
        whole = join_samples([held, found]) if held is not None and is_apart else found
        held = whole[-1:]
        if len(whole) > 1:
            yield Step(whole[:-1], 0, follows)
            follows = True
    if held is not None:
        yield Step(held, 0, follows)
