"""Samples as a pandas DataFrame and as an xarray Dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import NONE, column_name, find_live, one_group, whose

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

_NS = np.dtype("datetime64[ns]")


def _getter(samples: Samples, *, si: bool) -> Callable[[str], npt.NDArray[Any]]:
    return samples.si if si else samples.__getitem__


def _units(stat: Stat, *, si: bool) -> str:
    """Return the unit of values; a histogram's are counts, whatever its edges are in."""
    return "" if stat.is_histogram else stat.units(si)


def to_pandas(samples: Samples, *, si: bool) -> Any:
    """See `Samples.to_pandas`."""
    pd = need("pandas", "pandas")
    group = one_group(samples)
    shape = (len(samples), len(group.columns))
    live = find_live(samples.errors, len(samples), group.columns)
    wall = samples.wall_time.view(_NS)

    def flat(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows = np.broadcast_to(values, shape + values.shape[2:])
        return np.ascontiguousarray(rows).reshape(-1, *values.shape[2:]) if live is None else rows[live]

    get = _getter(samples, si=si)
    about = whose(samples, group.columns)
    pids = flat(about.pop("pid"))
    columns: dict[str, Any] = {"pid": pd.arrays.IntegerArray(pids, pids == NONE)}
    units = {"pid": ""}
    for name, (stat, _) in group.places.items():
        values, column = flat(get(name)), column_name(name)
        parts = {f"{column}[{i}]": values[:, i] for i in range(stat.size)} if stat.shape else {column: values}
        columns |= parts
        units |= dict.fromkeys(parts, _units(stat, si=si))
    # Coded by sweep and by file: there are far fewer of these than rows.
    levels = {"time": pd.DatetimeIndex(wall).tz_localize("UTC"), **about}
    coded = {name: pd.Index(level).factorize() for name, level in levels.items()}
    codes = [flat(code[:, None] if name == "time" else code) for name, (code, _) in coded.items()]
    index = pd.MultiIndex([level for _, level in coded.values()], codes, names=[*levels])
    frame = pd.DataFrame(columns, index=index)
    frame.attrs["units"] = units
    return frame


def to_xarray(samples: Samples, *, si: bool) -> Any:
    """See `Samples.to_xarray`."""
    xr = need("xarray", "xarray")
    kinds = [group.kind for group in samples.groups]
    if len(set(kinds)) != len(kinds):
        one_group(samples)  # its error says what to do
    get = _getter(samples, si=si)
    prefixes = {kind: "" if len(kinds) == 1 else f"{kind}_" for kind in kinds}
    variables: dict[str, Any] = {}
    buckets: dict[tuple[str, bytes], str] = {}
    coordinates: dict[str, Any] = {"time": ("time", samples.wall_time.view(_NS))}
    for group in samples.groups:
        for name, values in whose(samples, group.columns).items():
            coordinates[name if name == group.kind else prefixes[group.kind] + name] = (group.kind, values)
        ids = [samples.files[index].id for index in group.columns.tolist()]
        coordinates[f"{group.kind}_file"] = (group.kind, ids)
        for name, (stat, _) in group.places.items():
            dims = ["time", group.kind]
            about = {"units": _units(stat, si=si) or "1", "type": str(getattr(stat.type, "name", stat.type)).lower()}
            if stat.shape:
                edges = stat.bucket_edges()[:-1] if stat.is_histogram else np.arange(float(stat.size))
                unit = stat.units(si=True) or "1"
                # Histograms with the same buckets share a dimension.
                bucket = buckets.setdefault((unit, edges.tobytes()), f"bucket{len(buckets) + 1 if buckets else ''}")
                dims.append(bucket)
                coordinates[bucket] = (bucket, edges, {"units": unit, "long_name": "lower edge of the bucket"})
            variables[column_name(name)] = (dims, get(name), about)
    origin = {
        "host": samples.host,
        "kernel": samples.kernel,
        "interval": samples.interval,
        "missed": samples.missed,
        "errors": [f"{samples.files[e.file]} from sweep {e.sweep} on: {e.error}" for e in samples.errors],
    }
    coordinates |= {name: ("time", getattr(samples, name)) for name in ("tick", "sweep_ns")}
    return xr.Dataset(variables, coordinates, origin)
