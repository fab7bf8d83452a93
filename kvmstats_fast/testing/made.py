"""make_samples: Samples made up, with times and values of the caller's, without anything being sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import article, check_all, check_seconds
from kvmstats_fast.errors import unknown_stat
from kvmstats_fast.file_info import FileInfo, identify
from kvmstats_fast.groups import Columns
from kvmstats_fast.samples import SampleError, Samples
from kvmstats_fast.spans import Span
from kvmstats_fast.testing.synthetic import SyntheticStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from kvmstats_fast.schema import Schema
    from kvmstats_fast.spans import When
    from kvmstats_fast.stat import Stat

_SWEEP_NS = 1000


def make_samples(  # noqa: PLR0913 - samples have that many sides
    files: Iterable[SyntheticStats],
    values: Mapping[str, npt.ArrayLike],
    *,
    interval: float = 1.0,
    start: When = "2026-01-01T00:00Z",
    tick: npt.ArrayLike | None = None,
    errors: Iterable[SampleError] = (),
    kernel: str = "",
) -> Samples:
    """Make up Samples of imaginary VMs, even over days, in no time.

    Parameters
    ----------
    files : iterable of SyntheticStats
        The files to sample; their own values do not matter. Those that have none of `values` are left out.
    values : mapping
        Names of statistics to raw values, whole numbers, which broadcast to ``(T, n)``, a histogram's to
        ``(T, n, buckets)``: T sweeps of the n files that have the statistic. uint64 of that shape is not copied.
    interval : float
        Seconds between ticks, above 0.
    start : str, datetime or datetime64
        Wall clock at tick 0, as for `Samples.between`.
    tick : array_like, optional
        Tick of each sweep, ascending; gaps are missed ticks. Default: consecutive, as many as the first of `values`
        has. A long run is made in parts, each with its own ticks.
    errors : iterable of SampleError
        Files that failed, by their index in the samples, and at which sweep; their values are 0 from there on.
    kernel : str
        As in `Samples`.

    Returns
    -------
    Samples
        Their `host` is that of the files, if it is one.

    Raises
    ------
    KeyError
        If no file has one of the statistics.
    TypeError, ValueError
        For values that do not fit, or ticks that do not ascend; the message says which.

    Examples
    --------
    >>> web = [SyntheticStats(vcpu_id=i, vm="web", host="a") for i in range(2)]
    >>> day = 86400
    >>> x = make_samples(web, {"exits": np.arange(3 * day)[:, None] * [1000, 500]}, start="2026-11-23T00:00Z")
    >>> x.total("exits") / x.elapsed
    array([1000.,  500.])
    """
    made = check_all("files", files, SyntheticStats)
    interval_ns = round(check_seconds("interval", interval, 1e9, zero=False) * 1e9)
    schemas = [one.schema for one in made]
    given = {name: _check_values(name, some, schemas) for name, some in values.items()}
    if not given:
        raise ValueError("values is empty; it must have a statistic at least")
    ticks = _check_ticks(tick, len(next(iter(given.values()))))
    chosen = [index for index, schema in enumerate(schemas) if not given.keys().isdisjoint(schema)]
    members: dict[tuple[Schema, str], list[int]] = {}
    for place, index in enumerate(chosen):
        members.setdefault((schemas[index], made[index].kind), []).append(place)
    failed = check_all("errors", errors, SampleError)
    groups = []
    for (schema, kind), columns in members.items():
        names = [name for name in given if name in schema]
        arrays = []
        for name in names:
            owners = [place for place, index in enumerate(chosen) if name in schemas[index]]
            array = _fit(name, given[name], (len(ticks), len(owners), *schema[name].shape))
            arrays.append(_take(array, [owners.index(place) for place in columns]))
        for error in failed:
            if error.file in columns:
                arrays = [_blank(array, columns.index(error.file), error.sweep) for array in arrays]
        places = {name: (schema[name], index) for index, name in enumerate(names)}
        groups.append(Columns(schema, kind, places, np.array(columns, np.intp), tuple(arrays)))
    infos = identify([_describe(made[index]) for index in chosen], "made-up")
    hosts = {info.host for info in infos}
    moment = Span.of(start, None).start
    if moment is None or not moment.is_wall:
        raise ValueError(f"start is {start}; it must be a time of the wall clock, such as '2026-01-01T00:00Z'")
    return Samples(
        tuple(groups),
        infos,
        ticks.astype(np.int64) * interval_ns,
        np.full(len(ticks), _SWEEP_NS, np.int64),
        ticks,
        interval=interval_ns / 1e9,
        wall_offset=moment.ns,
        missed=int(ticks[-1] - ticks[0]) + 1 - len(ticks) if len(ticks) else 0,
        errors=failed,
        host=hosts.pop() if len(hosts) == 1 else "",
        kernel=kernel,
    )


def _describe(made: SyntheticStats) -> FileInfo:
    owner = made.owner
    return FileInfo(made.id, made.kind, made.vcpu_id, owner.pid, owner.name, owner.vm, owner.host)


def _check_values(name: str, values: npt.ArrayLike, schemas: list[Schema]) -> npt.NDArray[Any]:
    """Return the values of a statistic as an array of whole numbers."""
    stats: list[Stat] = [schema[name] for schema in schemas if name in schema]
    if not stats:
        raise unknown_stat(name, (known for schema in schemas for known in schema), "these files")
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"values[{name!r}] has dtype {array.dtype}; values are raw, and so whole numbers")
    if array.ndim == 0:
        raise ValueError(f"values[{name!r}] is one number; it must have a value for each sweep")
    if array.dtype.kind == "i" and any(stat.grows for stat in stats) and array.min(initial=0) < 0:
        raise ValueError(f"values[{name!r}] has {array.min()}, but what only grows is not negative")
    return array


def _check_ticks(tick: npt.ArrayLike | None, sweeps: int) -> npt.NDArray[np.uint64]:
    ticks = np.asarray(range(sweeps) if tick is None else tick)
    if ticks.ndim != 1 or (ticks.dtype.kind not in "iu" and ticks.size):
        raise TypeError(f"tick is {article(tick)}; it must be whole numbers, one for each sweep")
    if ticks.size and (ticks[0] < 0 or not (ticks[1:] > ticks[:-1]).all()):
        raise ValueError("tick must ascend, and not be negative")
    return ticks.astype(np.uint64)


def _fit(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """Return an array as uint64 of a shape, copied only where it must be."""
    try:
        full = np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"values[{name!r}] has shape {array.shape}; it must broadcast to {shape}") from None
    return full if full.dtype == np.uint64 else full.astype(np.uint64)


def _take(array: npt.NDArray[np.uint64], columns: list[int]) -> npt.NDArray[np.uint64]:
    return array if columns == list(range(array.shape[1])) else array[:, columns]


def _blank(array: npt.NDArray[np.uint64], column: int, sweep: int) -> npt.NDArray[np.uint64]:
    array = array.copy()
    array[sweep:, column] = 0
    return array
