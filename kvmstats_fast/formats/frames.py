"""Samples as a pandas DataFrame and as an xarray Dataset."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import NONE, column_name, find_live, one_group, whose
from kvmstats_fast.formats.values import find_units, find_values
from kvmstats_fast.series import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples

_NS = np.dtype("datetime64[ns]")


def to_pandas(samples: Samples, *, values: str, si: bool) -> Any:
    """See `Samples.to_pandas`."""
    pd = need("pandas", "pandas")
    group = one_group(samples)
    samples, found = find_values(samples, values, si=si)
    live = find_live(samples.errors, len(samples), group.columns)
    columns: dict[str, npt.NDArray[Any]] = {}
    units = {"pid": ""}
    for name, array in found.items():
        stat, column = group.places[name][0], column_name(name)
        parts = {f"{column}[{i}]": array[:, :, i] for i in range(stat.size)} if stat.shape else {column: array}
        columns |= parts
        units |= dict.fromkeys(parts, find_units(stat, values, si=si))
    index, pids = _index(samples, group, live)
    # Columns of one type that are side by side are one array, which pandas takes as it is.
    blocks = [
        pd.DataFrame(_as_rows(list(side_by_side), live).T, index, [name for name, _ in side_by_side], copy=False)
        for side_by_side in (list(some) for _, some in groupby(columns.items(), lambda one: one[1].dtype))
    ]
    frame = blocks[0] if len(blocks) == 1 else pd.concat([pd.DataFrame(index=index), *blocks], axis=1)
    frame.insert(0, "pid", pids)
    frame.attrs["units"] = units
    return frame


def _as_rows(columns: Sequence[tuple[str, npt.NDArray[Any]]], live: npt.NDArray[np.bool_] | None) -> npt.NDArray[Any]:
    """Return columns, (T, n) each, as one array (columns, rows)."""
    first = columns[0][1]
    if live is not None:
        return np.stack([values[live] for _, values in columns])
    rows = np.empty((len(columns), first.size), first.dtype)
    words = [values.view(np.uint64) for _, values in columns]  # which all of them are as large as
    gather(words, [row.view(np.uint64).reshape(first.shape) for row in rows])
    return rows


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
