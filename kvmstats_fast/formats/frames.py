"""Samples as a pandas DataFrame and as an xarray Dataset."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import NONE, column_name, find_live, one_group, whose
from kvmstats_fast.formats.values import check_values, find_parts, find_units, find_values
from kvmstats_fast.series import gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

_NS = np.dtype("datetime64[ns]")


def to_pandas(samples: Samples, *, values: str, si: bool) -> Any:
    """See `Samples.to_pandas`."""
    pd = need("pandas", "pandas")
    group = one_group(samples)
    check_values(values)
    rows = samples if values == "raw" else samples[1:]
    live = find_live(rows.errors, len(rows), group.columns)
    index, pids = _index(rows, group, live)
    # Columns of one type that are side by side are one array, (columns, rows), which pandas takes as it is.
    blocks: list[tuple[list[str], npt.NDArray[Any]]] = []
    done = 0
    for part, found in find_parts(samples, values, si=si):
        together = [[*some] for _, some in groupby(_columns(group, found), lambda column: column[1].dtype)]
        if not blocks:
            room = [np.empty((len(some), len(pids)), some[0][1].dtype) for some in together]
            blocks = [([name for name, _ in some], block) for some, block in zip(together, room, strict=True)]
        alive = None if live is None else live[part]
        start, done = done, done + int(together[0][0][1].size if alive is None else np.count_nonzero(alive))
        for (_, block), some in zip(blocks, together, strict=True):
            _fill(block[:, start:done], [array for _, array in some], alive)
    parts = [pd.DataFrame(block.T, index, names, copy=False) for names, block in blocks]
    frame = parts[0] if len(parts) == 1 else pd.concat([pd.DataFrame(index=index), *parts], axis=1)
    frame.insert(0, "pid", pids)
    units = {"pid": ""}
    for name, (stat, _) in group.places.items():
        units |= dict.fromkeys(_names(name, stat), find_units(stat, values, si=si))
    frame.attrs["units"] = units
    return frame


def _names(name: str, stat: Stat) -> list[str]:
    """Return the names of a statistic's columns."""
    column = column_name(name)
    return [f"{column}[{i}]" for i in range(stat.size)] if stat.shape else [column]


def _columns(group: Group, found: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Give the columns of statistics by name, (T, n) each."""
    for name, array in found.items():
        stat, _ = group.places[name]
        yield from zip(_names(name, stat), np.moveaxis(array, 2, 0) if stat.shape else [array], strict=True)


def _fill(block: npt.NDArray[Any], columns: Sequence[npt.NDArray[Any]], live: npt.NDArray[np.bool_] | None) -> None:
    """Write columns, (T, n) each, into the rows of a block; of the files that are live."""
    if live is not None:
        for row, values in zip(block, columns, strict=True):
            row[:] = values[live]
        return
    words = [values.view(np.uint64) for values in columns]  # which all of them are as large as
    gather(words, [*block.view(np.uint64).reshape(len(columns), *columns[0].shape)])


def _index(samples: Samples, group: Group, live: npt.NDArray[np.bool_] | None) -> tuple[Any, Any]:
    """Return the index of the rows, and their pids."""
    pd = need("pandas", "pandas")

    def flat(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows = np.broadcast_to(values, (len(samples), len(group.columns)))
        return rows.ravel() if live is None else rows[live]

    about = whose(samples, group.columns)
    pids = flat(about.pop("pid"))
    # Coded by sweep and by file: there are far fewer of these than rows.
    levels = {"time": pd.DatetimeIndex(samples.wall_time.view(_NS)).tz_localize("UTC"), **about}
    coded = {name: pd.Index(level).factorize() for name, level in levels.items()}
    codes = [
        flat((code[:, None] if name == "time" else code).astype(np.min_scalar_type(-len(level) - 1)))
        for name, (code, level) in coded.items()
    ]
    index = pd.MultiIndex([level for _, level in coded.values()], codes, names=[*levels])
    return index, pd.arrays.IntegerArray(pids, pids == NONE)


def to_xarray(samples: Samples, *, values: str, si: bool) -> Any:
    """See `Samples.to_xarray`."""
    xr = need("xarray", "xarray")
    kinds = [group.kind for group in samples.groups]
    if len(set(kinds)) != len(kinds):
        one_group(samples)  # its error says what to do
    samples, found = find_values(samples, values, si=si)
    prefixes = {kind: "" if len(kinds) == 1 else f"{kind}_" for kind in kinds}
    variables: dict[str, Any] = {}
    buckets: dict[tuple[str, bytes], str] = {}
    coordinates: dict[str, Any] = {"time": ("time", samples.wall_time.view(_NS))}
    for group in samples.groups:
        for name, labels in whose(samples, group.columns).items():
            coordinates[name if name == group.kind else prefixes[group.kind] + name] = (group.kind, labels)
        ids = [samples.files[index].id for index in group.columns.tolist()]
        coordinates[f"{group.kind}_file"] = (group.kind, ids)
        for name, (stat, _) in group.places.items():
            dims = ["time", group.kind]
            about = {
                "units": find_units(stat, values, si=si) or "1",
                "type": str(getattr(stat.type, "name", stat.type)).lower(),
            }
            if stat.shape:
                edges = stat.bucket_edges()[:-1] if stat.is_histogram else np.arange(float(stat.size))
                unit = stat.units(si=True) or "1"
                # Histograms with the same buckets share a dimension.
                bucket = buckets.setdefault((unit, edges.tobytes()), f"bucket{len(buckets) + 1 if buckets else ''}")
                dims.append(bucket)
                coordinates[bucket] = (bucket, edges, {"units": unit, "long_name": "lower edge of the bucket"})
            variables[column_name(name)] = (dims, found[name], about)
    origin = {
        "host": samples.host,
        "kernel": samples.kernel,
        "interval": samples.interval,
        "missed": samples.missed,
        "errors": [f"{samples.files[e.file]} from sweep {e.sweep} on: {e.error}" for e in samples.errors],
    }
    coordinates |= {name: ("time", getattr(samples, name)) for name in ("tick", "sweep_ns")}
    return xr.Dataset(variables, coordinates, origin)
