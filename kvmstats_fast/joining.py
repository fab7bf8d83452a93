"""Samples that follow each other as one: what must agree, what is kept for each part, what is renumbered."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.groups import join_groups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.samples import SampleError, Samples


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Return the sweeps of all parts; see `Samples.concatenate`."""
    if not parts:
        raise ValueError("there are no samples to concatenate")
    first = parts[0]
    if len(parts) == 1:
        return first
    for before, after in pairwise(parts):
        _check_follows(before, after)
    errors: dict[int, SampleError] = {}
    offsets: dict[int, int] = {}
    ticks: list[npt.NDArray[np.uint64]] = []
    start, next_tick = 0, 0
    for part in parts:
        for error in part.errors:
            errors.setdefault(error.file, error._replace(sweep=error.sweep + start))
        for sweep, offset in ((0, part.wall_offset), *part.wall_steps):
            offsets[start + sweep] = offset
        if len(part):
            ticks.append(renumber(part.tick, next_tick))
            next_tick = int(ticks[-1][-1]) + 1
        start += len(part)
    wall_offset, wall_steps = find_steps(offsets, start)
    return replace(
        first,
        groups=tuple(join_groups(groups) for groups in zip(*(part.groups for part in parts), strict=True)),
        time=np.concatenate([part.time for part in parts]),
        sweep_ns=np.concatenate([part.sweep_ns for part in parts]),
        tick=np.concatenate(ticks) if ticks else first.tick,
        wall_offset=wall_offset,
        wall_steps=wall_steps,
        missed=sum(part.missed for part in parts),
        overruns=sum(part.overruns for part in parts),
        errors=tuple(errors.values()),
        interrupted=any(part.interrupted for part in parts),
    )


def find_steps(offsets: Mapping[int, int], sweeps: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return `wall_offset` and `wall_steps` of samples; `offsets` maps sweeps, 0 first, to what holds from there on."""
    first = last = offsets[0]
    steps = []
    for sweep, offset in offsets.items():
        if offset != last and sweep < sweeps:
            steps.append((sweep, offset))
            last = offset
    return first, tuple(steps)


def spread_offsets(wall_offset: int, steps: Sequence[tuple[int, int]], sweeps: int) -> npt.NDArray[np.int64]:
    """Return the wall-clock offset of each sweep, int64 (T,); `steps` beyond the last sweep hold for none."""
    starts = np.minimum([0, *(sweep for sweep, _ in steps), sweeps], sweeps)
    return np.repeat(np.array([wall_offset, *(offset for _, offset in steps)], np.int64), np.diff(starts))


def _check_follows(before: Samples, after: Samples) -> None:
    """Raise ValueError if these samples cannot be joined, with what disagrees."""
    if after.files != before.files:
        raise ValueError(f"these samples are of different files: {len(before.files)} and then {len(after.files)} files")
    if [group.signature for group in before.groups] != [group.signature for group in after.groups]:
        raise ValueError("these samples are of the same files, but of different statistics or kernels")
    for what in ("host", "kernel", "interval"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            raise ValueError(f"these samples differ in their {what}: {old!r} and then {new!r}")
    if len(before) and len(after) and after.time[0] < before.time[-1]:
        raise ValueError(
            f"these samples are not in the order of time: the later part starts at {after.time[0]} ns, before the end "
            f"of the earlier one at {before.time[-1]} ns"
        )
    failed = {error.file for error in after.errors if not error.sweep}
    for error in before.errors:
        if len(after) and error.file not in failed:
            file = before.files[error.file].id
            raise ValueError(f"{file} failed in the earlier part ({error.error}) and was read again in the later one")


def renumber(tick: npt.NDArray[np.uint64], least: int) -> npt.NDArray[np.uint64]:
    """Return ticks that start at `least` or above: as they are, or counted from `least` on.

    ValueError if a uint64 does not hold them.
    """
    if int(tick[0]) >= least:
        return tick
    if int(tick[-1]) + least >= 1 << 64:
        raise ValueError(
            f"tick {tick[-1]} of a later part cannot be counted on from {least}: it would not fit a uint64"
        )
    return tick + np.uint64(least)


def join_kinds(kinds: Sequence[Samples]) -> Samples:
    """Return samples of different files that were taken in the same sweeps as one; ValueError if they were not."""
    whole = kinds[0]
    for other in kinds[1:]:
        if not np.array_equal(other.time, whole.time):
            raise ValueError(f"the {other.files[0].kind} files of a run have other sweeps than its other files")
        first = len(whole.files)
        groups = (replace(group, columns=group.columns + first) for group in other.groups)
        errors = (error._replace(file=error.file + first) for error in other.errors)
        whole = replace(
            whole,
            groups=(*whole.groups, *groups),
            files=(*whole.files, *other.files),
            errors=(*whole.errors, *errors),
        )
    return whole
