"""Recordings as Parquet data sets and CSV."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import ExitStack
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import arrow, need
from kvmstats_fast.formats.recording import Recording
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["to_csv", "to_parquet"]

#: So much is sorted in memory, and goes into one file.
_ROWS_BYTES = 256 << 20


def _batches(source: Samples | Recording | str | os.PathLike[str]) -> Iterator[Samples]:
    if isinstance(source, Samples):
        yield source
    else:
        yield from source if isinstance(source, Recording) else Recording(source)


def to_parquet(
    source: Samples | Recording | str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    host: str | None = None,
    encoding: str = "BYTE_STREAM_SPLIT",
    overwrite: bool = False,
) -> list[Path]:
    """Convert samples or a recording to a hive-partitioned Parquet data set, which several hosts may share.

    Parameters
    ----------
    source : Samples, Recording or path of a recording
    root : path-like
        The files become ``ROOT/vcpu/host=HOST/date=YYYY-MM-DD/*.parquet``, and ``ROOT/vm/...``: a data set for each
        kind, because their columns differ. Dates are UTC.
    host : str, optional
        Default: the name of the host where the samples were taken.
    encoding : {"BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"}
        Of integers. The first is for readers since 2024 or so (DuckDB 2); all readers know the other two.
    overwrite : bool
        Replace the files of the same samples or recording.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    FileExistsError
        If these samples or this recording were converted to this place before, without `overwrite`.
    KvmStatsError
        If a recording has no whole batch.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[arrow]'``.

    Notes
    -----
    In each file rows are sorted by file then time, statistics are compressed with zstd and encoded without a
    dictionary: neighbours differ little. Histograms are lists. Values are raw, and what
    their descriptors say is in the metadata of the fields, as in `Samples.to_arrow`. Each file is there as a whole or
    not at all.
    """
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}; it must be one of {', '.join(map(repr, _ENCODINGS))}")
    if not isinstance(source, Samples | Recording):
        source = Recording(source)
    name = _name(source) if isinstance(source, Samples) else source.recording
    writer = _Parquet(Path(root), host, name, encoding, overwrite=overwrite)
    empty = True
    for samples in _batches(source):
        empty = False
        for part in samples.split():
            writer.add(part)
    if empty:
        raise KvmStatsError(f"{source}: this recording has no whole batch")
    writer.flush()
    return writer.written


def _name(samples: Samples) -> str:
    """Name samples by when and of what they are, as random bytes name a recording: the same twice is noticed."""
    what = [samples.host, samples.wall_offset, samples.names, [astuple(info) for info in samples.files]]
    digest = blake2b(json.dumps(what).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples.time).data)
    return digest.hexdigest()


_ENCODINGS = ("BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN")


class _Parquet:
    """Collects rows by kind and date, and writes a file for every so many bytes."""

    def __init__(self, root: Path, host: str | None, name: str, encoding: str, *, overwrite: bool) -> None:
        self._pa, self._pq = need("pyarrow", "arrow"), need("pyarrow.parquet", "arrow")
        self._root, self._host, self._name, self._overwrite = root, host, name, overwrite
        self._encoding = encoding
        self._waiting: dict[tuple[str, str, str], list[Any]] = {}
        self._sizes: dict[tuple[str, str, str], int] = {}
        self._numbers: dict[tuple[str, str, str], int] = {}
        self.written: list[Path] = []

    def add(self, samples: Samples) -> None:
        """Take samples of one kind and kernel."""
        table = arrow.table(samples)
        # By numpy: pyarrow asks a database of time zones for UTC too, which not every system has.
        dates = arrow.as_numpy(table["time"].combine_chunks()).view("datetime64[ns]").astype("datetime64[D]")
        host = self._host or samples.host or "unknown"
        fingerprint = samples.groups[0].schema.fingerprint[:8]
        for date in np.unique(dates):
            where = (samples.files[0].kind, f"host={_quoted(host)}/date={date}", fingerprint)
            rows = table if (dates == date).all() else table.filter(self._pa.array(dates == date))
            self._waiting.setdefault(where, []).append(rows)
            self._sizes[where] = self._sizes.get(where, 0) + rows.nbytes
            if self._sizes[where] >= _ROWS_BYTES:
                self._write(where)

    def flush(self) -> None:
        """Write what is left."""
        for where in list(self._waiting):
            self._write(where)

    def _write(self, where: tuple[str, str, str]) -> None:
        tables = self._waiting.pop(where)
        del self._sizes[where]
        kind, partition, fingerprint = where
        number = self._numbers[where] = self._numbers.get(where, -1) + 1
        path = self._root / kind / partition / f"{self._name}-{fingerprint}-{number:05}.parquet"
        if path.exists() and not self._overwrite:
            raise FileExistsError(errno.EEXIST, "it was converted before; overwrite=True replaces it", str(path))
        table = self._pa.concat_tables(tables).sort_by([("file", "ascending"), ("time", "ascending")])
        # Ids as plain text: a dictionary is for the reader's memory, not for the file.
        place = table.schema.get_field_index("id")
        field = table.schema.field(place).with_type(self._pa.string())
        table = table.set_column(place, field, table.column(place).cast(self._pa.string()))
        split = [column.path for column in self._columns(table) if column.physical_type == "INT64"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not beside it: were it left there by a kill, some readers would stumble over it.
        made = self._root / f".{path.name}.{os.getpid()}.part"
        try:
            with self._pa.OSFile(os.fsencode(made), "wb") as sink:
                self._pq.write_table(
                    table,
                    sink,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding=dict.fromkeys(split, self._encoding),
                    sorting_columns=self._pq.SortingColumn.from_ordering(
                        table.schema, [("file", "ascending"), ("time", "ascending")]
                    ),
                )
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        self.written.append(path)

    def _columns(self, table: Any) -> list[Any]:
        """Return the Parquet columns of a table; what a list's elements are called there is pyarrow's choice."""
        sink = self._pa.BufferOutputStream()
        self._pq.write_table(table.slice(0, 0), sink)
        schema = self._pq.ParquetFile(self._pa.BufferReader(sink.getvalue())).schema
        return [schema.column(index) for index in range(len(schema.names))]


def _quoted(host: str) -> str:
    """Quote what a directory's name cannot have, as Hive does."""
    raw = host.encode("utf-8", "surrogateescape")
    return re.sub(rb"[^A-Za-z0-9._-]", lambda match: b"%%%02X" % match[0][0], raw).decode()


def to_csv(
    source: Samples | Recording | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert samples or a recording of one kind to a CSV file.

    Parameters
    ----------
    source : Samples, Recording or path of a recording
    path : path-like
    kind : {"vm", "vcpu"}, optional
        Which, if both were sampled.
    overwrite : bool
        Replace the file.

    Raises
    ------
    FileExistsError
        If there is something at `path`, without `overwrite`.
    KeyError
        As `Samples.to_arrow`.
    KvmStatsError
        If a recording has no whole batch.

    Notes
    -----
    The columns are those of `Samples.to_arrow`, a histogram's with one for each bucket (``halt_wait_hist[3]``). Values
    are raw. The file is there as a whole or not at all.
    """
    pa, csv = need("pyarrow", "arrow"), need("pyarrow.csv", "arrow")
    path = Path(path)
    if kind not in (None, "vm", "vcpu"):
        raise ValueError(f"kind is {kind!r}; it must be 'vm' or 'vcpu'")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise FileExistsError(errno.EEXIST, "it is there already; overwrite=True replaces it", str(path))
    made = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = None
    try:
        with ExitStack() as stack:
            for samples in _batches(source):
                table = _flat(pa, arrow.table(samples if kind is None else _of_kind(samples, kind)))
                if writer is None:
                    sink = stack.enter_context(pa.OSFile(os.fsencode(made), "wb"))
                    writer = stack.enter_context(csv.CSVWriter(sink, table.schema))
                writer.write_table(table)
        if writer is None:
            raise KvmStatsError(f"{source}: this recording has no whole batch")  # noqa: TRY301 - nothing is left either
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _of_kind(samples: Samples, kind: str) -> Samples:
    one = samples.vm if kind == "vm" else samples.vcpu
    if not one.files:
        raise KeyError(f"none of these samples' files is of kind {kind!r}")
    return one


def _flat(pa: Any, table: Any) -> Any:
    """Return a table without lists or dictionaries."""
    pc = need("pyarrow.compute", "arrow")
    columns: dict[str, Any] = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_fixed_size_list(field.type):
            values = arrow.as_numpy(column.combine_chunks())
            columns |= {f"{field.name}[{i}]": pa.array(values[:, i]) for i in range(field.type.list_size)}
        elif pa.types.is_timestamp(field.type):
            # Without its time zone, which pyarrow would look up in a database that not every system has.
            text = column.cast(pa.timestamp("ns")).cast(pa.string())
            columns[field.name] = pc.binary_join_element_wise(text, "Z", "")
        else:
            columns[field.name] = column.cast(pa.string()) if pa.types.is_dictionary(field.type) else column
    return pa.table(columns)
