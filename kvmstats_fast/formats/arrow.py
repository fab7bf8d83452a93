"""Samples as Arrow record batches, and back: one row for each sweep and file, one column for each statistic.

A batch is of files of one kind and schema. Nothing is lost on the way: the schema's metadata has the verbatim header
and descriptors, each field's what its descriptor says, and a batch's own what happened while it was sampled. Rows of a
file that had failed are left out, because their values mean nothing.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.errors import described, raised
from kvmstats_fast.groups import Columns, Group
from kvmstats_fast.samples import FileInfo, SampleError, Samples
from kvmstats_fast.schema import schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvmstats_fast.schema import Schema

__all__ = ["Origin", "one_group", "table", "to_batch", "to_samples"]

#: Columns in front of the statistics. `time` is the wall clock; the monotonic one is `wall_offset` less.
OWN = ("time", "tick", "sweep_ns", "file", "id", "vcpu_id")

_FORMAT = "1"


@dataclass(frozen=True)
class Origin:
    """What all batches of a stream have in common; it is the metadata of their schema.

    Attributes
    ----------
    recording : str
        Tells recordings apart.
    version : str
        Of the package that wrote it.
    files : tuple of FileInfo
        All files of the recording, also those of other streams.
    columns : tuple of int
        Which of `files` this stream is of.
    """

    recording: str
    part: int
    version: str
    host: str
    kernel: str
    interval: float
    wall_offset: int
    files: tuple[FileInfo, ...]
    columns: tuple[int, ...]
    kind: str
    stats: Schema

    def encoded(self) -> dict[str, str]:
        """Return it as schema metadata: ASCII, because not every reader of Arrow takes bytes."""
        plain = {
            name: getattr(self, name)
            for name in ("recording", "part", "version", "host", "kernel", "interval", "wall_offset", "columns", "kind")
        }
        plain["files"] = [astuple(info) for info in self.files]
        metadata = {f"kvmstats.{name}": json.dumps(value) for name, value in plain.items()}
        metadata["kvmstats.format"] = _FORMAT
        metadata["kvmstats.header_and_descriptors"] = b64encode(self.stats.encoding.prefix).decode()
        return metadata

    @classmethod
    def decoded(cls, metadata: Mapping[bytes, bytes] | None, source: str) -> Origin:
        """Make it from schema metadata."""
        found = {key.decode(): value.decode() for key, value in (metadata or {}).items() if key[:9] == b"kvmstats."}
        written = found.get("kvmstats.format")
        if written != _FORMAT:
            what = "no recording of kvmstats_fast" if written is None else f"a recording of format {written}"
            raise KvmStatsError(f"{source}: this is {what}; this version reads format {_FORMAT}")
        plain = {
            key.removeprefix("kvmstats."): json.loads(value)
            for key, value in found.items()
            if key not in ("kvmstats.format", "kvmstats.header_and_descriptors")
        }
        plain["files"] = tuple(FileInfo(*info) for info in plain["files"])
        plain["columns"] = tuple(plain["columns"])
        of_kind = {index for index, info in enumerate(plain["files"]) if info.kind == plain["kind"]}
        if not of_kind.issuperset(plain["columns"]):
            raise ValueError(f"not all of files {plain['columns']} are of kind {plain['kind']}")
        prefix = b64decode(found["kvmstats.header_and_descriptors"])
        return cls(**plain, stats=schema_of(prefix, f"{source}: header and descriptors"))


#: Names that no column of a statistic may have: our own, and what xarray's dimensions are called.
_TAKEN = frozenset((*OWN, "vm", "vcpu", "bucket"))


def _word(code: IntEnum | int) -> str:
    return code.name.lower() if isinstance(code, IntEnum) else str(code)


def column_name(name: str) -> str:
    """Return what the column of a statistic is called: text, and no name of our own."""
    name = _text(name)
    return f"stat.{name}" if name in _TAKEN else name


def stat_fields(stats: Schema, names: list[str]) -> list[Any]:
    """Arrow fields of the statistics, each with its descriptor as metadata."""
    pa = need("pyarrow", "arrow")
    order = {name: index for index, name in enumerate(stats)}
    fields = []
    for name in names:
        stat = stats[name]
        words = {what: _word(getattr(stat, what)) for what in ("type", "unit", "base")}
        words |= {what: str(getattr(stat, what)) for what in ("exponent", "size", "offset", "bucket_size")}
        words |= {"units": stat.units(), "descriptor": str(order[name])}
        value = pa.uint64()
        if stat.shape:
            value = pa.list_(pa.field("item", value, nullable=False), stat.size)
        metadata = {f"kvmstats.{what}": word for what, word in words.items()}
        fields.append(pa.field(column_name(name), value, nullable=False, metadata=metadata))
    return fields


def arrow_schema(origin: Origin, names: list[str]) -> Any:
    """Return the schema of a stream's batches."""
    pa = need("pyarrow", "arrow")
    types = (
        pa.timestamp("ns", "UTC"),
        pa.uint64(),
        pa.int64(),
        pa.int32(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.int64(),
    )
    own = [pa.field(name, kind, nullable=False) for name, kind in zip(OWN, types, strict=True)]
    if origin.kind == "vm":
        own.pop()
    return pa.schema(own + stat_fields(origin.stats, names), metadata=origin.encoded())


def one_group(samples: Samples) -> Group:
    """Return the only group of samples; KeyError if they are of several kinds or kernels."""
    if not samples.groups:
        raise KeyError("these samples are of no files")
    if len(samples.groups) != 1:
        kinds = {group.kind for group in samples.groups}
        raise KeyError(
            "VM and vCPU files have different statistics: take samples.vm or samples.vcpu"
            if len(kinds) > 1
            else f"these are files of {len(samples.groups)} different kernels: take the parts of samples.split()"
        )
    return samples.groups[0]


def lives_of(samples: Samples, columns: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_] | None:
    """Tell where a file had not failed, (T, n); None if none has."""
    lives = None
    where = {file: place for place, file in enumerate(columns.tolist())}
    for error in samples.errors:
        if error.file in where and error.sweep < len(samples):
            if lives is None:
                lives = np.ones((len(samples), len(columns)), np.bool_)
            lives[error.sweep :, where[error.file]] = False
    return lives


def to_batch(samples: Samples, group: Group, schema: Any) -> tuple[Any, dict[str, str]]:
    """Return a group's record batch and its own metadata."""
    pa = need("pyarrow", "arrow")
    columns = group.columns
    lives = lives_of(samples, columns)
    shape = (len(samples), len(columns))

    def rows_of(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if lives is not None:
            return values[lives]
        return np.ascontiguousarray(values).reshape(-1, *values.shape[2:])

    def own(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return rows_of(np.broadcast_to(values, shape))

    infos = [samples.files[index] for index in columns.tolist()]
    ids: dict[str, int] = {}
    places = np.array([ids.setdefault(_text(info.id), len(ids)) for info in infos], np.int32)
    arrays = [
        _from_numpy(pa.timestamp("ns", "UTC"), own((samples.time + samples.wall_offset)[:, None])),
        _from_numpy(pa.uint64(), own(samples.tick[:, None])),
        _from_numpy(pa.int64(), own(samples.sweep_ns[:, None])),
        _from_numpy(pa.int32(), own(columns.astype(np.int32))),
        pa.DictionaryArray.from_arrays(_from_numpy(pa.int32(), own(places)), _strings(list(ids))),
    ]
    if group.kind == "vcpu":
        arrays.append(_from_numpy(pa.int64(), own(np.array([info.vcpu_id for info in infos], np.int64))))
    for array, field in zip(group.contiguous(), list(schema)[len(arrays) :], strict=True):
        values = _from_numpy(pa.uint64(), rows_of(array).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(values, type=field.type) if array.ndim == 3 else values)
    happened: dict[str, Any] = {
        "sweeps": len(samples),
        "missed": samples.missed,
        "overruns": samples.overruns,
        "interrupted": samples.interrupted,
        "errors": [(error.file, error.sweep, *described(error.error)) for error in samples.errors],
    }
    if lives is not None and not lives.any(axis=1).all():
        rowless = ~lives.any(axis=1)
        clock = (samples.tick[rowless], samples.time[rowless], samples.sweep_ns[rowless])
        happened["rowless"] = [part.tolist() for part in clock]
    metadata = {f"kvmstats.{name}": json.dumps(value) for name, value in happened.items()}
    return pa.record_batch(arrays, schema=schema), metadata


def _text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def to_samples(batch: Any, metadata: Mapping[bytes, bytes] | None, origin: Origin) -> Samples:
    """Return a batch as Samples of all the recording's files, whose arrays are the batch's own memory."""
    found = {key.decode(): json.loads(value) for key, value in (metadata or {}).items() if key[:9] == b"kvmstats."}
    sweeps, files = found["kvmstats.sweeps"], len(origin.columns)
    time = as_numpy(batch.column("time")) - origin.wall_offset
    tick, sweep_ns = as_numpy(batch.column("tick")), as_numpy(batch.column("sweep_ns"))
    stats = [
        (field, column) for field, column in zip(batch.schema, batch.columns, strict=True) if field.name not in OWN
    ]
    arrays = [as_numpy(column) for _, column in stats]
    if batch.num_rows == sweeps * files:
        clock = tuple(values.reshape(sweeps, files)[:, 0] for values in (time, sweep_ns, tick))
        arrays = [values.reshape(sweeps, files, *values.shape[1:]) for values in arrays]
    else:
        clock, arrays = _spread(batch, origin, (time, sweep_ns, tick), arrays, found.get("kvmstats.rowless"))
        if len(clock[0]) != sweeps:
            raise KvmStatsError(f"a batch says that it has {sweeps} sweeps, but has rows of {len(clock[0])}")
    places = {}
    for place, (field, _) in enumerate(stats):
        stat = origin.stats.stats[int(field.metadata[b"kvmstats.descriptor"])]
        places[stat.name] = (stat, place)
    group = Columns(origin.stats, origin.kind, places, np.array(origin.columns, np.intp), tuple(arrays))
    return Samples(
        (group,),
        origin.files,
        *clock,
        interval=origin.interval,
        wall_offset=origin.wall_offset,
        missed=found["kvmstats.missed"],
        overruns=found["kvmstats.overruns"],
        errors=tuple(SampleError(file, sweep, raised(*error)) for file, sweep, *error in found["kvmstats.errors"]),
        interrupted=found["kvmstats.interrupted"],
        host=origin.host,
        kernel=origin.kernel,
    )


def _from_numpy(kind: Any, values: npt.NDArray[Any]) -> Any:
    """Return an Arrow array that is this memory (pyarrow.array would import pandas)."""
    pa = need("pyarrow", "arrow")
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _strings(texts: list[str]) -> Any:
    pa = need("pyarrow", "arrow")
    raw = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, raw)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(ends), pa.py_buffer(b"".join(raw)))


def as_numpy(column: Any) -> npt.NDArray[Any]:
    """Return a column's values without a copy: (rows,) or (rows, buckets)."""
    width = getattr(column.type, "list_size", None)
    if width is not None:
        return as_numpy(column.flatten()).reshape(len(column), width)
    dtype = np.dtype({"uint64": np.uint64, "int32": np.int32}.get(str(column.type), np.int64))
    if not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


def _spread(
    batch: Any,
    origin: Origin,
    clock: tuple[npt.NDArray[Any], ...],
    arrays: list[npt.NDArray[Any]],
    rowless: list[list[int]] | None,
) -> tuple[tuple[npt.NDArray[Any], ...], list[npt.NDArray[Any]]]:
    """Put rows to their sweep and file where some are missing; what is missing is 0."""
    more = rowless or [[], [], []]
    files = as_numpy(batch.column("file"))
    # Who has failed stays so: a sweep has files of the sweep before, in ascending order, and rowless ones come last.
    # (Ticks do not tell sweeps apart: of runs put together each begins at 0.)
    begins = np.concatenate([np.ones(min(len(files), 1), np.bool_), files[1:] <= files[:-1]])
    row = np.cumsum(begins) - 1
    time, sweep_ns, tick = (
        np.concatenate([values[begins], np.array(extra, values.dtype)])
        for values, extra in zip(clock, (more[1], more[2], more[0]), strict=True)
    )
    place = {file: index for index, file in enumerate(origin.columns)}
    column = np.array([place[file] for file in files.tolist()], np.intp)
    result = []
    for values in arrays:
        spread = np.zeros((len(tick), len(origin.columns), *values.shape[1:]), values.dtype)
        spread[row, column] = values
        result.append(spread)
    return (time, sweep_ns, tick), result


def table(samples: Samples) -> Any:
    """Return samples of one kind and kernel as a ``pyarrow.Table``."""
    pa = need("pyarrow", "arrow")
    group = one_group(samples)
    origin = origin_of(samples, group, recording="", part=0)
    batch, _ = to_batch(samples, group, arrow_schema(origin, list(group.places)))
    return pa.Table.from_batches([batch])


def origin_of(samples: Samples, group: Group, *, recording: str, part: int) -> Origin:
    """Return what a stream of such samples says of itself."""
    from kvmstats_fast import __version__  # noqa: PLC0415 - the package imports us

    return Origin(
        recording=recording,
        part=part,
        version=__version__,
        host=samples.host,
        kernel=samples.kernel,
        interval=samples.interval,
        wall_offset=samples.wall_offset,
        files=samples.files,
        columns=tuple(group.columns.tolist()),
        kind=group.kind,
        stats=group.schema,
    )
