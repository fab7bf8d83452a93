"""Samples and recordings as Parquet data sets."""

from __future__ import annotations

import errno
import json
import re
from contextlib import ExitStack
from dataclasses import astuple, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmstats_fast._arguments import article
from kvmstats_fast.errors import KvmStatsError, Retold
from kvmstats_fast.formats import need
from kvmstats_fast.formats._put import PRIVATE, check_mode, make_directories, put_file
from kvmstats_fast.formats.arrow import arrow_schema, decode_dictionaries, one_group, to_batch
from kvmstats_fast.formats.limits import MOST_DATES, saying_shortage
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.parquet_file import check_same_values
from kvmstats_fast.formats.pending import bytes_of, bytes_per_sweep, cut_sweeps
from kvmstats_fast.formats.recording import Recording, read_runs
from kvmstats_fast.formats.values import Columns, check_values
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt
    from typing_extensions import Self

    from kvmstats_fast.formats.wanted import Step

#: So much is a row group, which is worked on in memory; and so much goes into one file.
_GROUP_BYTES = 32 << 20
_FILE_BYTES = 256 << 20
_ENCODINGS = ("BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN")
_ORDER = [("file", "ascending"), ("time", "ascending")]


def to_parquet(  # noqa: PLR0913 - what a data set can be like
    source: Samples | Recording | str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    host: str | None = None,
    values: str = "raw",
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
        Contents of the column ``host``. Default: the name of the host where the samples were taken.
    values : {"raw", "delta", "rate"}
        Contents of the columns of statistics, as in `Samples.to_arrow`. A data set has one of these.
    encoding : {"BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"}
        Of integers. The first is for readers since 2024 or so (DuckDB 2); all readers know the other two. Rates are
        split unless this is ``"PLAIN"``: of floats, all readers know that.
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
        If a recording has no whole batch, or is on more than 3660 dates; or if the data set there has other `values`.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[arrow]'``.

    Notes
    -----
    The columns are those of `Samples.to_arrow`. The host is a column, and not part of directory names, because readers
    guess types from these: ``host=007`` would be the number 7. Row groups follow each other in time, and in each the
    rows are sorted by file, then time. Statistics are compressed with zstd and encoded without a dictionary, because
    neighbours differ little. Histograms are lists. The metadata of the fields have the descriptors. Each file is
    written completely or not at all. `open_recordings` reads a data set of raw values back.

    Changes are computed per run, across its batches, files and dates; between two runs there are none. Each is in the
    row, and so in the file, of the later of its two sweeps.
    """
    if not isinstance(source, (Samples, Recording)):
        source = Recording(source)
    name = _name(source) if isinstance(source, Samples) else source.recording
    return write_parquet(
        read_runs(source),
        Path(root),
        name,
        host=host,
        values=values,
        encoding=encoding,
        overwrite=overwrite,
        mode=mode,
    )


def write_parquet(  # noqa: PLR0913 - what to_parquet is told
    steps: Iterable[tuple[int, Step]],
    root: Path,
    name: str,
    *,
    host: str | None,
    values: str,
    encoding: str,
    overwrite: bool,
    mode: int,
) -> list[Path]:
    """Write the samples of runs, each with the number of its run; `name` is that of the recording. See `to_parquet`."""
    check_values(values)
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}; it must be one of {', '.join(map(repr, _ENCODINGS))}")
    check_mode(mode)
    if not isinstance(host, str | None):
        raise TypeError(f"host is {article(host)}; it must be the name of a host")
    with _Parquet(root, host, name, _Options(values, encoding, overwrite, mode)) as writer:
        for run, step in steps:
            for part in step.samples.split():
                writer.add(part, run, follows=step.follows)
    return writer.written


def _name(samples: Samples) -> str:
    """Name samples by when and of what they are, as random bytes name a recording: the same twice is noticed."""
    what = [samples.host, samples.wall_offset, samples.names, [astuple(info) for info in samples.files]]
    digest = blake2b(json.dumps(what).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples.time).data)
    return digest.hexdigest()


class _Options(NamedTuple):
    """How files are written: see `to_parquet`."""

    values: str
    encoding: str
    overwrite: bool
    mode: int


class _Where(NamedTuple):
    """What a file has rows of: the kind of stats files, a date, a host, a schema, a run."""

    kind: str
    date: str
    host: str
    fingerprint: str
    run: int


class _Parquet:
    """Writes sweeps to files by kind, date, host, schema and run, a new one after so many bytes."""

    def __init__(self, root: Path, host: str | None, name: str, options: _Options) -> None:
        self._root, self._host, self._name, self._options = root, host, name, options
        self._open: dict[_Where, _File] = {}
        #: Of the run that is being added, by kind, host and schema.
        self._run, self._columns = -1, dict[tuple[str, ...], Columns]()
        self._checked: set[str] = set()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._dates: set[str] = set()
        self.written: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Write what is left; take back what is not whole if anything was raised."""
        with ExitStack() as stack:
            for file in self._open.values():
                stack.push(file.discard)
            if raised[0] is not None:
                stack.pop_all().__exit__(*raised)  # type: ignore[arg-type]
                return
            while self._open:
                self._end(next(iter(self._open)))
            stack.pop_all()

    def add(self, samples: Samples, run: int, *, follows: bool) -> None:
        """Take samples of one kind and kernel, which `follows` those of the run before them."""
        host = self._host or samples.host or "unknown"
        samples = replace(samples, host=host, files=tuple(replace(info, host=host) for info in samples.files))
        kind, fingerprint = samples.files[0].kind, samples.groups[0].schema.fingerprint[:8]
        step = max(_GROUP_BYTES // max(bytes_per_sweep(samples.groups), 1), 1)
        by_date = list(_cut_by_date(samples))
        self._dates.update(date for date, _ in by_date)
        if len(self._dates) > MOST_DATES:
            raise KvmStatsError(f"recording {self._name}: column 'time' is on more than {MOST_DATES} dates")
        if run != self._run:
            self._run, self._columns = run, {}
        columns = self._columns.setdefault((kind, host, fingerprint), Columns(self._options.values))
        for date, of_date in by_date:
            where = _Where(kind, date, host, fingerprint, run)
            for other in [other for other in self._open if other._replace(date=date) == where != other]:
                self._end(other)
            for part in cut_sweeps(of_date, range(step, len(of_date), step)):
                rows, values = columns.find(part, follows=follows)
                follows = True
                if not len(rows):
                    continue
                if where not in self._open:
                    self._open[where] = self._begin(where, rows)
                self._open[where].add(rows, values)
                if self._open[where].size >= _FILE_BYTES:
                    self._end(where)

    def _begin(self, where: _Where, samples: Samples) -> _File:
        if where.kind not in self._checked:
            self._checked.add(where.kind)
            check_same_values(self._root / where.kind, self._options.values)
        number = self._numbers[where[:4]] = self._numbers.get(where[:4], -1) + 1
        name = f"{_quote(where.host)}-{self._name}-{where.fingerprint}-{number:05}.parquet"
        path = self._root / where.kind / f"date={where.date}" / name
        self.written.append(path)
        with _saying_what_is_there(path):
            return _File(path, self._root, samples, self._options, recording=self._name, run=where.run, part=number)

    def _end(self, where: _Where) -> None:
        file = self._open[where]
        with _saying_what_is_there(file.path):
            file.end()
        del self._open[where]


class _File:
    """A file of a data set: row groups of sweeps that follow each other, in each the rows of a file together.

    Attributes
    ----------
    path : Path
    size : int
        Bytes of the values it has.
    """

    def __init__(self, path: Path, root: Path, samples: Samples, options: _Options, **origin: Any) -> None:
        self._pa, pq = need("pyarrow", "arrow"), need("pyarrow.parquet", "arrow")
        self.path, self.size = path, 0
        self._waiting: list[tuple[Samples, list[npt.NDArray[Any]] | None]] = []
        self._happened: list[dict[str, Any]] = []
        group = one_group(samples)
        self._coded = arrow_schema(Origin.of(samples, group, **origin), list(group.places), options.values)
        empty = decode_dictionaries(self._coded.empty_table())  # which are for a reader's memory, not for the file
        self._schema = empty.schema
        of_type = {
            "INT64": options.encoding,
            "DOUBLE": "PLAIN" if options.encoding == "PLAIN" else "BYTE_STREAM_SPLIT",
        }
        encodings = {
            column.path: of_type[column.physical_type]
            for column in self._columns(pq, empty)
            if column.physical_type in of_type
        }
        make_directories(path.parent, options.mode)
        with ExitStack() as stack:
            # Not beside it: were it left there by a kill, some readers would stumble over it.
            file = stack.enter_context(put_file(path, overwrite=options.overwrite, mode=options.mode, beside=root))
            self._writer = stack.enter_context(
                pq.ParquetWriter(
                    file,
                    self._schema,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding=encodings,
                    sorting_columns=pq.SortingColumn.from_ordering(self._schema, _ORDER),
                )
            )
            self._stack = stack.pop_all()

    def _columns(self, pq: Any, table: Any) -> list[Any]:
        """Return the Parquet columns of a table; what a list's elements are called there is pyarrow's choice."""
        sink = self._pa.BufferOutputStream()
        pq.write_table(table, sink)
        schema = pq.ParquetFile(self._pa.BufferReader(sink.getvalue())).schema
        return [schema.column(index) for index in range(len(schema.names))]

    def add(self, samples: Samples, values: list[npt.NDArray[Any]] | None) -> None:
        """Add samples, of which not many wait to be written, and what the columns of statistics hold of them."""
        self._waiting.append((samples, values))
        self.size += bytes_of(samples)
        if sum(bytes_of(waiting) for waiting, _ in self._waiting) >= _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        parts, values = zip(*self._waiting, strict=True)
        self._waiting = []
        samples = Samples.concatenate(parts)
        joined = None if values[0] is None else [np.concatenate(of_column) for of_column in zip(*values, strict=True)]
        batch, happened = to_batch(samples, one_group(samples), self._coded, joined, by_file=True)
        table = decode_dictionaries(self._pa.Table.from_batches([batch]))
        with saying_shortage(self.path):
            self._writer.write_table(table, row_group_size=max(len(table), 1))
        self._happened.append(happened)

    def end(self) -> None:
        """Write what waits, and have it in its place."""
        if self._waiting:
            self._write()
        self._writer.add_key_value_metadata({"kvmstats.batches": json.dumps(self._happened)})
        self._stack.close()

    def discard(self, *raised: Any) -> None:
        """Leave nothing of it."""
        self._stack.__exit__(*raised)


def _saying_what_is_there(path: Path) -> Retold:
    text = "it was converted before; overwrite=True replaces it"
    return Retold(FileExistsError, lambda _: FileExistsError(errno.EEXIST, text, str(path)))


def _cut_by_date(samples: Samples) -> Iterator[tuple[str, Samples]]:
    """Cut samples where the date changes, UTC; by numpy, because pyarrow would ask a database of time zones."""
    dates = samples.wall_time.view("datetime64[ns]").astype("datetime64[D]")
    edges = (np.flatnonzero(dates[1:] != dates[:-1]) + 1).tolist()
    for start, part in zip((0, *edges), cut_sweeps(samples, edges), strict=True):
        if len(part):
            yield str(dates[start]), part


def _quote(host: str) -> str:
    """Return a host's name as the start of a file name, percent-encoded: neither hidden nor too long."""
    raw = host.encode("utf-8", "surrogateescape")
    quoted = re.sub(rb"^[._]|[^A-Za-z0-9._-]", lambda match: b"%%%02X" % match[0][0], raw).decode()
    return quoted[:150]
