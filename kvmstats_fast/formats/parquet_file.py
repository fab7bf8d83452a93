"""One Parquet file that `to_parquet` wrote, read back row group by row group."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvmstats_fast._text import printable
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import ROWS, as_numpy
from kvmstats_fast.formats.batches import ABSENT, check_batches, stats_of, to_samples
from kvmstats_fast.formats.errors import describe
from kvmstats_fast.formats.limits import as_shortage, check_size
from kvmstats_fast.formats.origin import Origin, read_field
from kvmstats_fast.formats.stream_file import open_regular
from kvmstats_fast.formats.wanted import ALWAYS
from kvmstats_fast.samples import SampleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kvmstats_fast.formats.wanted import Wanted
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

_Result = TypeVar("_Result")


class ParquetFile:
    """One file of a data set.

    Attributes
    ----------
    path : Path
    origin : Origin
    stats : list of Stat
        Of its columns.
    first_tick : int
        Of its rows, by which files that follow each other are put in order.

    Raises
    ------
    KvmStatsError, FormatError
        If `to_parquet` did not write it, or a version that this one does not read.
    OSError
        If the kernel refuses to open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pa = need("pyarrow", "arrow")
        file = self._open()
        self._schema = self._call(lambda: file.schema_arrow)
        self.origin = Origin.decode(self._schema.metadata, str(path))
        self.stats: list[Stat] = stats_of(self._schema, self.origin, str(path), plain=True)
        self.first_tick: int = self._call(lambda: self._read_first_tick(file))
        #: What happened in each row group; what format 2 wrote is one batch, and does not say.
        self._batches: list[dict[str, Any]] | None = None
        if self.origin.format > 2:
            about = file.metadata.metadata or {}
            self._batches = read_field(about, "batches", check_batches(self.origin), str(path))
            if len(self._batches) != file.num_row_groups:
                raise KvmStatsError(
                    f"{path}: kvmstats.batches is about {len(self._batches)} row groups; it has {file.num_row_groups}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where it is: another process opens it anew."""
        return type(self), (self.path,)

    def _open(self) -> Any:
        pq = need("pyarrow.parquet", "arrow")
        with open_regular(self.path) as fd:
            self._size = os.fstat(fd.fileno()).st_size
            # By its fd, so that it is the file that was looked at. The map stays when both are closed.
            return self._call(lambda: pq.ParquetFile(f"/proc/self/fd/{fd.fileno()}", memory_map=True))

    def _call(self, call: Callable[[], _Result]) -> _Result:
        """Return what a call of Arrow gives; its errors are of what is in this file, but for a shortage of memory."""
        try:
            return call()
        except (self._pa.ArrowException, OSError, ValueError) as error:
            raise as_shortage(error, str(self.path)) or KvmStatsError(
                f"{self.path}: not a Parquet file, or a damaged one: {error}"
            ) from None

    def read(self, wanted: Wanted) -> Iterator[Samples | None]:
        """Give what is wanted of row group after row group; None for one that has nothing of it.

        FileNotFoundError, at once, if the file has been deleted.
        """
        file = self._open()
        if not self._call(lambda: file.schema_arrow).equals(self._schema, check_metadata=True):
            raise KvmStatsError(f"{self.path}: another file took its place while it was read")
        return self._read_all(file, wanted)

    def _read_all(self, file: Any, wanted: Wanted) -> Iterator[Samples | None]:
        stats = [self.stats[index] for index in wanted.choose(self.stats)]
        if self._batches is None:
            name = f"{self.path}: its rows"
            records = self._read(file, range(file.num_row_groups), stats, name)
            if len(records):
                yield to_samples(records, stats, self._infer(records, name), self.origin, name, by_file=True)
            return
        for number, batch in enumerate(self._batches):
            name, happened = f"{self.path}: row group {number + 1}", ABSENT | batch
            if wanted.span != ALWAYS and not wanted.may_have(self._read_times(file, number), happened):
                yield None
            else:
                records = self._read(file, [number], stats, name)
                yield to_samples(records, stats, happened, self.origin, name, by_file=True)

    # What a footer says of each column is not asked for: where that of a damaged one contradicts itself, Arrow ends the
    # process (std::terminate). Reading such a column is an error.

    @staticmethod
    def _read_first_tick(file: Any) -> int:
        """Return the tick of the first row, 0 if there is none."""
        for batch in file.iter_batches(batch_size=1, columns=["tick"], use_threads=False):
            for tick in batch.column(0).to_pylist():
                return tick if isinstance(tick, int) else 0
        return 0

    def _read_times(self, file: Any, number: int) -> npt.NDArray[np.int64]:
        """Return the times of a row group."""
        column = self._call(lambda: file.read_row_group(number, columns=["time"], use_threads=False)).column(0)
        return as_numpy(column.combine_chunks())

    def _read(self, file: Any, groups: Sequence[int], stats: Sequence[Stat], name: str) -> Any:
        """Return the record batch of some row groups: the columns that are used, and those of statistics."""
        rows = sum(file.metadata.row_group(number).num_rows for number in groups)
        width = 8 * (len(ROWS) + sum(stat.size for stat in stats))
        check_size(rows * width, self._size, str(self.path))
        first = len(self._schema.names) - len(self.stats)
        names = [*ROWS, *(self._schema.names[first + self.stats.index(stat)] for stat in stats)]
        # A name is also the start of a nested one to Arrow, which then reads more than was asked for.
        table = self._call(lambda: file.read_row_groups(list(groups), columns=names, use_threads=False)).select(names)
        try:
            table.validate()
        except self._pa.ArrowInvalid as error:
            raise KvmStatsError(f"{name} is damaged: {error}") from None
        batches = table.combine_chunks().to_batches()
        if not batches:
            arrays = [self._pa.array([], field.type) for field in table.schema]
            return self._pa.record_batch(arrays, schema=table.schema)
        if len(batches) > 1:
            raise KvmStatsError(f"{name} are too many for one batch")
        return batches[0]

    def _infer(self, records: Any, name: str) -> dict[str, Any]:
        """Return what happened in rows that do not say so: where those of a file end, it had failed."""
        files, tick = as_numpy(records.column("file")), as_numpy(records.column("tick"))
        starts, stops = (np.searchsorted(files, self.origin.columns, side) for side in ("left", "right"))
        counts = (stops - starts).tolist()
        longest = counts.index(max(counts))
        ticks = tick[starts[longest] : stops[longest]]
        errors = []
        for file, start, count in zip(self.origin.columns, starts.tolist(), counts, strict=True):
            if not np.array_equal(tick[start : start + count], ticks[:count]):
                raise KvmStatsError(f"{name}: column 'tick' does not have the same sweeps for each file")
            if count < len(ticks):
                errors.append(SampleError(file, count, KvmStatsError("it failed: it has no further rows")))
        return ABSENT | {
            "sweeps": len(ticks),
            "wall_offset": self.origin.wall_offset,
            "missed": int((np.diff(ticks) - np.uint64(1)).sum()) if len(ticks) > 1 else 0,
            "overruns": 0,
            "interrupted": False,
            "errors": describe(errors),
        }


def check_same_values(directory: Path, values: str) -> None:
    """Raise KvmStatsError if a data set has other values, in columns of the same names; one file of it says so."""
    pa, pq = need("pyarrow", "arrow"), need("pyarrow.parquet", "arrow")
    for path in directory.glob("date=*/*.parquet"):
        try:
            with open_regular(path) as fd:
                metadata = pq.read_schema(f"/proc/self/fd/{fd.fileno()}").metadata or {}
        except (pa.ArrowException, OSError, KvmStatsError):
            continue  # gone, or not of ours
        if b"kvmstats.format" in metadata:
            there = metadata.get(b"kvmstats.values", b'"raw"').decode("ascii", "backslashreplace")
            if there != json.dumps(values):
                raise KvmStatsError(
                    f"{directory}: {path.name} has {printable(there)} values, and these are {json.dumps(values)}: give "
                    "them a data set of their own"
                )
            return
