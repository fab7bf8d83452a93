"""Batches that follow each other as one: what each costs in Python is paid once for many."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.batches import to_samples
from kvmstats_fast.joining import find_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

#: So many bytes of values are worked on at once: small beside what a recording holds, large beside what a step costs.
STEP_BYTES = 8 << 20


@dataclass(frozen=True)
class Batch:
    """A record batch of a file, valid to Arrow.

    Attributes
    ----------
    records : pyarrow.RecordBatch or None
        None: none of it is wanted.
    happened : dict
        What its metadata says (`Happened.read`).
    source : str
        For messages: file and number.
    size : int
        Bytes of its columns.
    stored : int
        Bytes that it takes in the file.
    """

    records: Any
    happened: dict[str, Any]
    source: str
    size: int
    stored: int


def to_samples_joined(batches: Sequence[Batch], stats: Sequence[Stat], origin: Origin) -> Samples:
    """Return batches as Samples, as `Samples.concatenate` would join those of each.

    Raises
    ------
    KvmStatsError
        If there is something wrong with one of them; of several, each has to be looked at to say which it is.
    """
    if len(batches) == 1:
        (batch,) = batches
        return to_samples(batch.records, stats, batch.happened, origin, batch.source)
    source = f"{batches[0].source} and those behind it"
    samples = to_samples(_join_records(batches), stats, _join_happened(batches), origin, source)
    starts = list(accumulate(batch.happened["sweeps"] for batch in batches))[:-1]
    places = np.array([start for start in starts if 0 < start < len(samples)], np.intp)
    if (samples.tick[places] <= samples.tick[places - 1]).any():
        raise KvmStatsError(f"{source}: their ticks start again")
    return samples


def _join_records(batches: Sequence[Batch]) -> Any:
    """Return one record batch."""
    table = need("pyarrow", "arrow").Table.from_batches([batch.records for batch in batches])
    joined = table.combine_chunks().to_batches()
    if len(joined) != 1:
        raise KvmStatsError("these batches have no rows, or too many for one")
    return joined[0]


def _join_happened(batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what happened in all of them."""
    start = 0
    errors: dict[int, list[Any]] = {}
    offsets: dict[int, int] = {}
    rowless: list[list[int]] = [[], [], []]
    for batch in batches:
        happened = batch.happened
        failed = happened["errors"]
        if failed or errors:
            still = {file for file, sweep, *_ in failed if not sweep}
            if happened["sweeps"] and not errors.keys() <= still:
                raise KvmStatsError(f"{batch.source}: a file that had failed was read again")
            for file, sweep, *rest in failed:
                errors.setdefault(file, [file, start + sweep, *rest])
        offsets[start] = happened["wall_offset"]
        for sweep, offset in happened["wall_steps"]:
            if not 0 < sweep < happened["sweeps"]:
                raise KvmStatsError(f"{batch.source}: wall_steps are not within its sweeps")
            offsets[start + sweep] = offset
        for values, more in zip(rowless, happened["rowless"], strict=True):
            values.extend(more)
        start += happened["sweeps"]
    wall_offset, wall_steps = find_steps(offsets, start)
    return {
        "sweeps": start,
        "errors": list(errors.values()),
        "wall_offset": wall_offset,
        "wall_steps": wall_steps,
        "missed": sum(batch.happened["missed"] for batch in batches),
        "overruns": sum(batch.happened["overruns"] for batch in batches),
        "interrupted": any(batch.happened["interrupted"] for batch in batches),
        "rowless": rowless,
    }
