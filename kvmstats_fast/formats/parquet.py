"""Samples and recordings as Parquet data sets."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import astuple, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import arrow, need
from kvmstats_fast.formats._put import PRIVATE, check_mode, make_directories, put_file
from kvmstats_fast.formats.limits import MOST_DATES
from kvmstats_fast.formats.recording import Recording, read_batches
from kvmstats_fast.formats.steps import STEP_BYTES
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import TypeAlias

    from kvmstats_fast.file_info import FileInfo

    #: What a file has rows of: kind, date, host, fingerprint of the schema, and the files of the run.
    _Where: TypeAlias = tuple[str, str, str, str, tuple[FileInfo, ...]]

#: So much is sorted in memory, and goes into one file.
_ROWS_BYTES = 256 << 20
_ENCODINGS = ("BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN")
_ORDER = [("file", "ascending"), ("time", "ascending")]


def to_parquet(  # noqa: PLR0913 - what a data set can be like
    source: Samples | Recording | str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    host: str | None = None,
    encoding: str = "BYTE_STREAM_SPLIT",
    overwrite: bool = False,
    mode: int = PRIVATE,
) -> list[Path]:
    """Convert samples or a recording to a hive-partitioned Parquet data set, which several hosts may share.

    Parameters
    ----------
    source : Samples, Recording or path of a recording
    root : path-like
        The files become ``ROOT/vcpu/date=YYYY-MM-DD/HOST-*.parquet``, and ``ROOT/vm/...``: a data set for each kind,
        because their columns differ. Dates are UTC.
    host : str, optional
        What the column ``host`` says. Default: the name of the host where the samples were taken.
    encoding : {"BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"}
        Of integers. The first is for readers since 2024 or so (DuckDB 2); all readers know the other two.
    overwrite : bool
        Replace the files of the same samples or recording.
    mode : int
        Permissions of the files, whatever the umask; directories that are made can be entered by whoever may read them.
        By default the owner alone may: where others are to read the data set or add to it, say 0o640 or 0o660.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    FileExistsError
        If these samples or this recording were converted to this place before, without `overwrite`.
    KvmStatsError
        If a recording has no whole batch, or is on more than 3660 dates.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[arrow]'``.

    Notes
    -----
    The columns are those of `Samples.to_arrow`. The host is one of them, and not in the names of directories, because
    readers guess types from these: ``host=007`` would be the number 7. In each file rows are sorted by file
    then time, statistics are compressed with zstd and encoded without a dictionary: neighbours differ little.
    Histograms are lists. Values are raw, and what their descriptors say is in the metadata of the fields. Each file is
    there as a whole or not at all.
    """
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}; it must be one of {', '.join(map(repr, _ENCODINGS))}")
    check_mode(mode)
    if not isinstance(source, Samples | Recording):
        source = Recording(source)
    name = _name(source) if isinstance(source, Samples) else source.recording
    writer = _Parquet(Path(root), host, name, encoding, overwrite=overwrite, mode=mode)
    for samples in read_batches(source, min(STEP_BYTES, _ROWS_BYTES)):
        for part in samples.split():
            writer.add(part)
    writer.flush()
    return writer.written


def _name(samples: Samples) -> str:
    """Name samples by when and of what they are, as random bytes name a recording: the same twice is noticed."""
    what = [samples.host, samples.wall_offset, samples.names, [astuple(info) for info in samples.files]]
    digest = blake2b(json.dumps(what).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples.time).data)
    return digest.hexdigest()


class _Parquet:
    """Collects rows by kind, date and schema, and writes a file for every so many bytes."""

    def __init__(  # noqa: PLR0913 - what to_parquet is told
        self, root: Path, host: str | None, name: str, encoding: str, *, overwrite: bool, mode: int
    ) -> None:
        self._pa, self._pq = need("pyarrow", "arrow"), need("pyarrow.parquet", "arrow")
        self._root, self._host, self._name, self._encoding = root, host, name, encoding
        self._overwrite, self._mode = overwrite, mode
        self._waiting: dict[_Where, list[Any]] = {}
        self._sizes: dict[_Where, int] = {}
        self._numbers: dict[tuple[str, str, str, str], int] = {}
        self._dates: set[str] = set()
        self.written: list[Path] = []

    def add(self, samples: Samples) -> None:
        """Take samples of one kind and kernel."""
        host = self._host or samples.host or "unknown"
        samples = replace(samples, host=host, files=tuple(replace(info, host=host) for info in samples.files))
        fingerprint = samples.groups[0].schema.fingerprint[:8]
        for date, part in _cut_by_date(samples):
            self._dates.add(date)
            if len(self._dates) > MOST_DATES:
                raise KvmStatsError(f"recording {self._name}: column 'time' is on more than {MOST_DATES} dates")
            where = (samples.files[0].kind, date, host, fingerprint, samples.files)
            rows = arrow.table(part, self._name)
            self._waiting.setdefault(where, []).append(rows)
            self._sizes[where] = self._sizes.get(where, 0) + rows.nbytes
            if self._sizes[where] >= _ROWS_BYTES:
                self._write(where)

    def flush(self) -> None:
        """Write what is left."""
        for where in list(self._waiting):
            self._write(where)

    def _write(self, where: _Where) -> None:
        table = self._pa.concat_tables(self._waiting.pop(where)).sort_by(_ORDER)
        del self._sizes[where]
        kind, date, host, fingerprint, _ = where
        number = self._numbers[where[:4]] = self._numbers.get(where[:4], -1) + 1
        name = f"{_quote(host)}-{self._name}-{fingerprint}-{number:05}.parquet"
        path = self._root / kind / f"date={date}" / name
        table = arrow.decode_dictionaries(table)  # which are for the reader's memory, not for the file
        split = [column.path for column in self._columns(table) if column.physical_type == "INT64"]
        make_directories(path.parent, self._mode)
        try:
            # Not beside it: were it left there by a kill, some readers would stumble over it.
            with put_file(path, overwrite=self._overwrite, mode=self._mode, beside=self._root) as file:
                self._pq.write_table(
                    table,
                    file,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding=dict.fromkeys(split, self._encoding),
                    sorting_columns=self._pq.SortingColumn.from_ordering(table.schema, _ORDER),
                )
        except FileExistsError:
            raise FileExistsError(
                errno.EEXIST, "it was converted before; overwrite=True replaces it", str(path)
            ) from None
        self.written.append(path)

    def _columns(self, table: Any) -> list[Any]:
        """Return the Parquet columns of a table; what a list's elements are called there is pyarrow's choice."""
        sink = self._pa.BufferOutputStream()
        self._pq.write_table(table.slice(0, 0), sink)
        schema = self._pq.ParquetFile(self._pa.BufferReader(sink.getvalue())).schema
        return [schema.column(index) for index in range(len(schema.names))]


def _cut_by_date(samples: Samples) -> Iterator[tuple[str, Samples]]:
    """Cut samples where the date changes, UTC; by numpy, because pyarrow would ask a database of time zones."""
    dates = samples.wall_time.view("datetime64[ns]").astype("datetime64[D]")
    starts = [0, *(np.flatnonzero(dates[1:] != dates[:-1]) + 1).tolist(), len(dates)]
    for start, stop in pairwise(starts):
        if start < stop:
            yield str(dates[start]), samples[start:stop]


def _quote(host: str) -> str:
    """Return a host's name as the start of a file name, percent-encoded: neither hidden nor too long."""
    raw = host.encode("utf-8", "surrogateescape")
    quoted = re.sub(rb"^[._]|[^A-Za-z0-9._-]", lambda match: b"%%%02X" % match[0][0], raw).decode()
    return quoted[:150]
