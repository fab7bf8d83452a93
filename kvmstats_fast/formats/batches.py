"""Arrow record batches as Samples, once they are known to be what their metadata says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.arrow import as_numpy, find_live, items, own_fields, stat_field
from kvmstats_fast.formats.errors import check_errors, restore
from kvmstats_fast.formats.limits import check_memory
from kvmstats_fast.formats.metadata import INT64, UINT64, Check, Wrong, listed, mapping, row, whole
from kvmstats_fast.formats.origin import BATCH_FIELDS, read_field
from kvmstats_fast.groups import Columns
from kvmstats_fast.joining import spread_offsets
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.stat import Stat


def stats_of(schema: Any, origin: Origin, source: str, *, plain: bool = False) -> list[Stat]:
    """Return the statistics of a file's columns; KvmStatsError unless the columns are what their metadata says.

    Texts are `plain`, or coded.
    """
    own = own_fields(origin.kind, origin.format, plain=plain)
    found: dict[int, Stat] = {}
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise KvmStatsError(f"{source}: the name of a column is not UTF-8: {error}") from None
    if len(names) < len(own):
        raise KvmStatsError(f"{source}: column {own[len(names)].name!r} is missing")
    for place, field in enumerate(schema):
        if place < len(own):
            expected = own[place]
            allowed = [expected.name]
        else:
            raw = (field.metadata or {}).get(b"kvmstats.descriptor", b"")
            index = int(raw) if raw.isdigit() and len(raw) < 8 else len(origin.stats)
            if index >= len(origin.stats) or index in found:
                raise KvmStatsError(
                    f"{source}: column {place}: kvmstats.descriptor is {raw[:20]!r}; it must be the number of a "
                    f"descriptor, from 0 to {len(origin.stats) - 1}, that no other column has"
                )
            stat = found[index] = origin.stats.stats[index]
            expected = stat_field(stat, index)
            allowed = [expected.name, expected.name.removeprefix("stat.")]  # fewer names were taken in format 1
        if names[place] not in allowed or field.type != expected.type:
            raise KvmStatsError(
                f"{source}: column {place} is {short_repr(names[place])} of type {short_repr(str(field.type))}; by its "
                f"metadata it must be {short_repr(allowed[0])} of type {expected.type}"
            )
    return list(found.values())


def _check_rowless(value: Any) -> None:
    """Accept tick, time and sweep_ns of the sweeps without a row."""
    row(listed(whole(*UINT64)), listed(whole(*INT64)), listed(whole(*INT64)))(value)
    if len(set(map(len, value))) > 1:
        raise Wrong(value, "three lists of the same length")


#: What a batch has if its metadata does not say so.
ABSENT: dict[str, Any] = {"rowless": [[], [], []], "wall_steps": []}


def happened_checks(origin: Origin) -> dict[str, Check]:
    """Return what the metadata of a batch has."""
    return BATCH_FIELDS | {"sweeps": whole(0, INT64[1]), "errors": check_errors(len(origin.files))}


def check_batches(origin: Origin) -> Check:
    """Accept what happened in batch after batch, in one list."""
    required, rowless = mapping(happened_checks(origin)), mapping({"rowless": _check_rowless})

    def check(value: Any) -> None:
        required(value)
        if "rowless" in value:
            rowless(value)

    return listed(check)


class Happened:
    """Reads what the metadata of the batches of a file says of each; what does not change from batch to batch, once."""

    def __init__(self, origin: Origin) -> None:
        self._checks = happened_checks(origin)
        self._absent = dict(ABSENT)
        if origin.format == 1:  # one offset for the whole recording
            self._absent["wall_offset"] = origin.wall_offset
            self._checks = {name: check for name, check in self._checks.items() if not name.startswith("wall_")}
        self._keys = {name: f"kvmstats.{name}".encode() for name in (*self._checks, "rowless")}
        self._last: dict[str, tuple[bytes | None, Any]] = {}

    def read(self, metadata: Mapping[bytes, bytes] | None, source: str) -> dict[str, Any]:
        """Return what the metadata of a batch says, checked; its values are shared with other batches."""
        metadata = dict(metadata or {})
        checks = self._checks
        if self._keys["rowless"] in metadata:
            checks = checks | {"rowless": _check_rowless}
        happened = dict(self._absent)
        for name, check in checks.items():
            raw = metadata.get(self._keys[name])
            if raw is None or self._last.get(name, (None, None))[0] != raw:
                self._last[name] = (raw, read_field(metadata, name, check, source))
            happened[name] = self._last[name][1]
        return happened


def check_steps(happened: dict[str, Any], sweeps: int, source: str) -> None:
    """Raise KvmStatsError unless the steps of the wall clock are at ascending sweeps."""
    places = [0, *(sweep for sweep, _ in happened["wall_steps"]), sweeps]
    if len(places) > 2 and any(after <= before for before, after in pairwise(places)):
        raise KvmStatsError(f"{source}: wall_steps are not at ascending sweeps, from 1 to {sweeps - 1}")


def check_order(time: npt.NDArray[np.int64], source: str) -> None:
    """Raise KvmStatsError unless time ascends."""
    if (time[1:] < time[:-1]).any():
        raise KvmStatsError(f"{source}: 'time' is not in the order of time")


@dataclass(frozen=True)
class _Rows:
    """Which rows a batch must have: those of the files that had not failed, sweep by sweep."""

    columns: npt.NDArray[np.intp]  #: (n,)
    live: npt.NDArray[np.bool_] | None  #: (T, n); None: no file had failed
    sweeps: int  #: those that have rows; the others come after them
    by_file: bool  #: whether the rows of a file stand together, not those of a sweep

    def _table(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return one value a row by sweep and file, (sweeps, n), where no file had failed."""
        shape = (self.sweeps, len(self.columns))
        return values.reshape(shape[::-1]).T if self.by_file else values.reshape(shape)

    @cached_property
    def _places(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return of which sweep and which of `columns` each row is, where a file had failed."""
        live = np.zeros((0, 0), np.bool_) if self.live is None else self.live
        if not self.by_file:
            return np.nonzero(live)  # type: ignore[return-value]
        files, sweeps = np.nonzero(live.T)
        return sweeps, files

    def are(self, files: npt.NDArray[np.int32]) -> bool:
        """Whether the rows of a batch are of these files."""
        if self.live is None:
            fits = len(files) == self.sweeps * len(self.columns)
            return fits and bool((self._table(files) == self.columns).all())
        if self.live[self.sweeps :].any() or not self.live[: self.sweeps].any(axis=1).all():
            return False
        return np.array_equal(files, self.columns[self._places[1]])

    def per_sweep(self, values: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """Return the value of each sweep, (sweeps,); None if it differs between rows of one."""
        if self.live is None:
            table = self._table(values)
            return table[:, 0].copy() if (table == table[:, :1]).all() else None
        sweeps, _ = self._places
        of_sweep = np.zeros(self.sweeps, values.dtype)
        of_sweep[sweeps] = values
        return of_sweep if np.array_equal(of_sweep[sweeps], values) else None

    def spread(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the values by sweep and file; 0 where a file had failed."""
        if self.live is None:
            shape = (self.sweeps, len(self.columns))
            if self.by_file:
                return values.reshape(*shape[::-1], *values.shape[1:]).swapaxes(0, 1)
            return values.reshape(*shape, *values.shape[1:])
        spread = np.zeros((*self.live.shape, *values.shape[1:]), np.uint64)
        if self.by_file:
            spread.swapaxes(0, 1)[self.live.T] = values
        else:
            spread[self.live] = values
        return spread


def to_samples(  # noqa: PLR0913 - what a batch is
    batch: Any,
    stats: Sequence[Stat],
    happened: dict[str, Any],
    origin: Origin,
    source: str,
    *,
    by_file: bool = False,
) -> Samples:
    """Return a batch as Samples of all the recording's files, whose arrays are the batch's own memory.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        Valid to Arrow, and of the types that `stats_of` accepted.
    stats : sequence of Stat
        What `stats_of` returned.
    happened : dict
        What `Happened.read` returned.
    origin : Origin
    source : str
        For messages.
    by_file : bool
        Whether the rows of a file stand together, not those of a sweep.

    Raises
    ------
    KvmStatsError
        If the rows are not those that `happened` speaks of.
    """
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if (column.null_count and field.name != "pid") or (
            hasattr(field.type, "list_size") and items(column).null_count
        ):
            raise KvmStatsError(f"{source}: column {field.name!r} has nulls")
    sweeps, columns = happened["sweeps"], np.array(origin.columns, np.intp)
    rowless = dict(zip(("tick", "time", "sweep_ns"), happened["rowless"], strict=True))
    read = sweeps - len(rowless["time"])
    if not 0 <= read <= batch.num_rows:
        raise KvmStatsError(
            f"{source}: kvmstats.sweeps is {sweeps}; {batch.num_rows} rows and {len(rowless['time'])} sweeps without "
            "a row were found"
        )
    errors = restore(happened["errors"])
    failed = any(error.sweep < sweeps for error in errors)
    words = sum(stat.size for stat in stats)
    if failed:
        check_memory(sweeps * len(columns) * (8 * words + 1), source)
    rows = _Rows(columns, find_live(errors, sweeps, columns), read, by_file)
    if not rows.are(as_numpy(batch.column("file"))):
        raise KvmStatsError(
            f"{source}: column 'file' does not have the files of kvmstats.columns in each of {sweeps} sweeps, but for "
            "those of kvmstats.errors"
        )
    clock: dict[str, npt.NDArray[Any]] = {}
    for name in rowless:
        values = rows.per_sweep(as_numpy(batch.column(name)))
        if values is None:
            raise KvmStatsError(f"{source}: column {name!r} has several values in one sweep")
        clock[name] = values
    check_steps(happened, sweeps, source)
    clock["time"] = _to_monotonic(clock["time"], happened, source)
    clock = {name: np.concatenate([clock[name], np.array(more, clock[name].dtype)]) for name, more in rowless.items()}
    check_order(clock["time"], source)
    arrays = tuple(rows.spread(as_numpy(column)) for column in batch.columns[len(batch.columns) - len(stats) :])
    places = {stat.name: (stat, place) for place, stat in enumerate(stats)}
    return Samples(
        (Columns(origin.stats, origin.kind, places, columns, arrays),),
        origin.files,
        clock["time"],
        clock["sweep_ns"],
        clock["tick"],
        errors=errors,
        interval=origin.interval,
        host=origin.host,
        kernel=origin.kernel,
        **{name: happened[name] for name in BATCH_FIELDS} | {"wall_steps": tuple(map(tuple, happened["wall_steps"]))},
    )


def _to_monotonic(wall: npt.NDArray[np.int64], happened: dict[str, Any], source: str) -> npt.NDArray[np.int64]:
    """Return CLOCK_MONOTONIC of the sweeps that have rows."""
    offsets = spread_offsets(happened["wall_offset"], happened["wall_steps"], len(wall))
    if len(wall):
        lowest, highest = int(wall.min()) - int(offsets.max()), int(wall.max()) - int(offsets.min())
        if lowest < INT64[0] or highest > INT64[1]:
            raise KvmStatsError(f"{source}: column 'time' less kvmstats.wall_offset is not within 64 bits")
    return wall - offsets
