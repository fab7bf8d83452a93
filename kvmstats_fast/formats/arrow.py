"""Samples as Arrow record batches, and back: one row for each sweep and file, one column for each statistic.

A batch is of files of one kind and schema. Nothing is lost on the way: the metadata of the schema has the verbatim
header and descriptors (`Origin`), that of each field what its descriptor says, and that of a batch what happened while
it was sampled. Rows of a file that had failed are left out, because their values mean nothing.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.file_info import identify
from kvmstats_fast.formats import need
from kvmstats_fast.formats.errors import describe
from kvmstats_fast.formats.origin import BATCH_FIELDS, FORMAT, Origin
from kvmstats_fast.formats.values import Columns, check_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import SampleError, Samples
    from kvmstats_fast.stat import Stat

#: Columns that say whose a row is.
WHOSE = ("host", "vm", "pid", "vcpu")
#: Columns in front of the statistics; vcpu_id in files of vCPUs only. Those of format 1 start at `time`.
OWN = (*WHOSE, "time", "tick", "sweep_ns", "file", "id", "vcpu_id")
#: Those that say which sweep and file a row is of; what the others say is in the metadata, too.
ROWS = ("time", "tick", "sweep_ns", "file")
#: What the column `vcpu` has for the file of a VM; and `pid`, where integers have no null, for one that is not known.
NONE = -1

#: Names that no column of a statistic may have: our own, xarray's dimension, and what Parquet data sets add.
TAKEN = frozenset((*OWN, "bucket", "date"))


def column_name(name: str) -> str:
    """Return what the column of a statistic is called: text, and no name of our own."""
    name = readable(name)
    return f"stat.{name}" if name in TAKEN else name


def readable(text: str) -> str:
    """Return a name or id as UTF-8 can encode it: bytes that were none are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _word(code: IntEnum | int) -> str:
    return code.name.lower() if isinstance(code, IntEnum) else str(code)


def own_fields(kind: str, written: int = FORMAT, *, plain: bool = False) -> list[Any]:
    """Return the fields of the columns in front of the statistics, in the format `written`; texts `plain` or coded."""
    pa = need("pyarrow", "arrow")
    text = pa.string() if plain else pa.dictionary(pa.int32(), pa.string())
    types = (
        text,
        text,
        pa.int64(),
        pa.int64(),
        pa.timestamp("ns", "UTC"),
        pa.uint64(),
        pa.int64(),
        pa.int32(),
        text,
        pa.int64(),
    )
    fields = [pa.field(name, of_type, nullable=name == "pid") for name, of_type in zip(OWN, types, strict=True)]
    return fields[len(WHOSE) if written == 1 else 0 : None if kind == "vcpu" else -1]


def stat_field(stat: Stat, place: int, values: str = "raw") -> Any:
    """Return the field of a statistic, with its descriptor as metadata; `place` is that of the descriptor."""
    pa = need("pyarrow", "arrow")
    words = {what: _word(getattr(stat, what)) for what in ("type", "unit", "base")}
    words |= {what: str(getattr(stat, what)) for what in ("exponent", "size", "offset", "bucket_size")}
    words |= {"units": stat.rate_units if values == "rate" else stat.units(), "descriptor": str(place)}
    value = {"raw": pa.uint64(), "delta": pa.uint64() if stat.grows else pa.int64(), "rate": pa.float64()}[values]
    if stat.shape:
        value = pa.list_(pa.field("item", value, nullable=False), stat.size)
    metadata = {f"kvmstats.{what}": word for what, word in words.items()}
    return pa.field(column_name(stat.name), value, nullable=False, metadata=metadata)


def arrow_schema(origin: Origin, names: Sequence[str], values: str = "raw") -> Any:
    """Return the schema of the batches of a file."""
    places = {name: place for place, name in enumerate(origin.stats)}
    fields = [stat_field(origin.stats[name], places[name], values) for name in names]
    metadata = origin.encode() | ({} if values == "raw" else {"kvmstats.values": json.dumps(values)})
    return need("pyarrow", "arrow").schema(own_fields(origin.kind) + fields, metadata=metadata)


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


def find_live(
    errors: Sequence[SampleError], sweeps: int, columns: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_] | None:
    """Tell of which files, at the indices `columns`, each sweep has values: bool (T, n); None if of all."""
    live = None
    places = {file: place for place, file in enumerate(columns.tolist())}
    for error in errors:
        if error.file in places and error.sweep < sweeps:
            if live is None:
                live = np.ones((sweeps, len(columns)), np.bool_)
            live[error.sweep :, places[error.file]] = False
    return live


def whose(samples: Samples, columns: npt.NDArray[np.intp]) -> dict[str, Any]:
    """Return what the columns WHOSE have for the files at the indices `columns`: lists of str, and int64 (n,)."""
    files = identify(samples.files, samples.host)
    infos = [files[index] for index in columns.tolist()]
    return {
        "host": [readable(info.host) for info in infos],
        "vm": [readable(info.vm) for info in infos],
        "pid": np.array([NONE if info.pid is None else info.pid for info in infos], np.int64),
        "vcpu": np.array([NONE if info.vcpu_id is None else info.vcpu_id for info in infos], np.int64),
    }


def row_key(info: FileInfo) -> tuple[str, str, int]:
    """Return host, VM and number of the vCPU of a file, as these columns have them."""
    return readable(info.host), readable(info.vm), NONE if info.vcpu_id is None else info.vcpu_id


def to_batch(
    samples: Samples,
    group: Group,
    schema: Any,
    values: Sequence[npt.NDArray[Any]] | None = None,
    *,
    by_file: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Return a group's record batch, and what its own metadata says; of these values, or its own.

    Its rows are in the order of time; or `by_file`, those of a file together.
    """
    pa = need("pyarrow", "arrow")
    columns = group.columns
    live = find_live(samples.errors, len(samples), columns)
    shape = (len(samples), len(columns))

    def rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if by_file:
            values = values.swapaxes(0, 1)
        if live is not None:
            return values[live.T if by_file else live]
        return np.ascontiguousarray(values).reshape(-1, *values.shape[2:])

    def own(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return rows(np.broadcast_to(values, shape))

    def text(texts: Iterable[str]) -> Any:
        codes: dict[str, int] = {}
        places = np.array([codes.setdefault(readable(one), len(codes)) for one in texts], np.int32)
        return pa.DictionaryArray.from_arrays(_from_numpy(pa.int32(), own(places)), _strings(list(codes)))

    about = whose(samples, columns)
    arrays = [
        text(about["host"]),
        text(about["vm"]),
        _from_numpy(pa.int64(), own(about["pid"]), nulls=own(about["pid"] == NONE)),
        _from_numpy(pa.int64(), own(about["vcpu"])),
        _from_numpy(pa.timestamp("ns", "UTC"), own(samples.wall_time[:, None])),
        _from_numpy(pa.uint64(), own(samples.tick[:, None])),
        _from_numpy(pa.int64(), own(samples.sweep_ns[:, None])),
        _from_numpy(pa.int32(), own(columns.astype(np.int32))),
        text(samples.files[index].id for index in columns.tolist()),
    ]
    if group.kind == "vcpu":
        arrays.append(arrays[OWN.index("vcpu")])
    for array, field in zip(values or group.contiguous(), list(schema)[len(arrays) :], strict=True):
        flat = rows(array).reshape(-1)
        if array.ndim == 3:
            one = _from_numpy(field.type.value_type, flat)
            arrays.append(pa.FixedSizeListArray.from_arrays(one, type=field.type))
        else:
            arrays.append(_from_numpy(field.type, flat))
    happened: dict[str, Any] = {
        "sweeps": len(samples),
        **{name: getattr(samples, name) for name in BATCH_FIELDS},
        "errors": describe(samples.errors),
    }
    if live is not None and not live.any(axis=1).all():
        rowless = ~live.any(axis=1)
        clock = (samples.tick[rowless], samples.time[rowless], samples.sweep_ns[rowless])
        happened["rowless"] = [part.tolist() for part in clock]
    return pa.record_batch(arrays, schema=schema), happened


def _from_numpy(kind: Any, values: npt.NDArray[Any], *, nulls: npt.NDArray[np.bool_] | None = None) -> Any:
    """Return an Arrow array that is this memory (pyarrow.array would import pandas)."""
    pa = need("pyarrow", "arrow")
    valid = None if nulls is None or not nulls.any() else pa.py_buffer(np.packbits(~nulls, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)])


def _strings(texts: list[str]) -> Any:
    pa = need("pyarrow", "arrow")
    raw = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, raw)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(ends), pa.py_buffer(b"".join(raw)))


def items(column: Any) -> Any:
    """Return the values of a column of lists, none of which is null; pyarrow's flatten() imports pyarrow.compute."""
    width = column.type.list_size
    return column.values.slice(column.offset * width, len(column) * width)


def as_numpy(column: Any) -> npt.NDArray[Any]:
    """Return a column's values without a copy: (rows,) or (rows, buckets)."""
    width = getattr(column.type, "list_size", None)
    if width is not None:
        return as_numpy(items(column)).reshape(len(column), width)
    dtype = np.dtype({"uint64": np.uint64, "int32": np.int32, "double": np.float64}.get(str(column.type), np.int64))
    if not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


def table(samples: Samples, *, values: str = "raw", columns: Columns | None = None, follows: bool = False) -> Any:
    """Return samples of one kind and kernel as a ``pyarrow.Table``; of those that `columns` had before, the next."""
    pa = need("pyarrow", "arrow")
    check_values(values)
    group = one_group(samples)
    schema = arrow_schema(Origin.of(samples, group), list(group.places), values)
    rows, found = (columns or Columns(values)).find(samples, follows=follows)
    batch, _ = to_batch(rows, one_group(rows), schema, found)
    return pa.Table.from_batches([batch])


def decode_dictionaries(table: Any) -> Any:
    """Return a table whose texts are plain strings."""
    pa = need("pyarrow", "arrow")
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(place).cast(pa.string())
            table = table.set_column(place, field.with_type(pa.string()), plain)
    return table
