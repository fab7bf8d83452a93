"""One file of a recording, an Arrow IPC stream, read from a memory map."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmstats_fast._resource import Fd
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import ROWS, as_numpy
from kvmstats_fast.formats.batches import Happened, stats_of
from kvmstats_fast.formats.ipc import NoMessageError, measure_next
from kvmstats_fast.formats.limits import as_shortage, check_size
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.steps import Batch
from kvmstats_fast.formats.wanted import ALWAYS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from kvmstats_fast.formats.wanted import Wanted
    from kvmstats_fast.stat import Stat

#: The last bytes of a stream that was ended.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def open_regular(path: Path) -> Fd:
    """Return the fd of a regular file; KvmStatsError for anything else (a FIFO would wait for a writer)."""
    try:
        fd = Fd(os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise KvmStatsError(f"{path}: not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
        fd.close()
        raise KvmStatsError(f"{path}: not a regular file")
    return fd


class StreamFile:
    """One file of a recording.

    Attributes
    ----------
    path : Path
    origin : Origin
    stats : list of Stat
        Of its columns.
    size : int
        Bytes of it, when it was opened.

    Raises
    ------
    KvmStatsError, FormatError
        If it is not a recording's, or one that this version does not read.
    OSError
        If the kernel refuses to open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pa = need("pyarrow", "arrow")
        opened = self._open(in_place=True)
        self.size = len(opened.view)
        self._schema = self._begin(opened, None).stream.schema
        self.origin = Origin.decode(self._schema.metadata, str(path))
        self.stats: list[Stat] = stats_of(self._schema, self.origin, str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where it is: another process opens it anew."""
        return type(self), (self.path,)

    def _open(self, *, in_place: bool) -> _Opened:
        """Open the file.

        What is read `in_place` stays, with the map, for as long as it is used; else `_Opened.forget` works.
        """
        pa = self._pa
        forgetful = None
        with open_regular(self.path) as fd:
            try:
                if in_place or not os.fstat(fd.fileno()).st_size:
                    # By its fd, so that it is the file that was looked at. The map stays when both are closed.
                    with pa.memory_map(f"/proc/self/fd/{fd.fileno()}") as file:
                        buffer = file.read_buffer()
                else:
                    forgetful = mmap.mmap(fd.fileno(), 0, prot=mmap.PROT_READ)
                    buffer = pa.py_buffer(forgetful)
            except OSError as error:
                raise as_shortage(error, str(self.path)) or OSError(
                    error.errno, error.strerror, str(self.path)
                ) from None
        return _Opened(memoryview(buffer).cast("B"), buffer, forgetful)

    def _begin(self, opened: _Opened, columns: list[int] | None) -> _Reader:
        """Return a reader of some columns, which has read the schema; KvmStatsError if there is none."""
        pa = self._pa
        source = pa.BufferReader(opened.buffer)
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=columns)
        try:
            stream = pa.ipc.open_stream(source, options=options)
        except (pa.ArrowException, OSError) as error:
            raise as_shortage(error, str(self.path)) or KvmStatsError(
                f"{self.path}: not a recording: no Arrow stream begins in its {len(opened.view)} bytes: {error}"
            ) from None
        return _Reader(source, stream, None if columns is None else self._find_buffers(columns))

    def _find_buffers(self, columns: list[int]) -> npt.NDArray[np.intp]:
        """Return the numbers of the buffers that columns have in a batch: of each a bitmap of nulls, and values."""
        sizes = [
            3 if self._pa.types.is_fixed_size_list(kind) else 2 for kind in self._schema.types
        ]  # a list has a bitmap too
        ends = np.cumsum(sizes)
        return np.concatenate([np.arange(ends[column] - sizes[column], ends[column]) for column in columns])

    def has_one_batch(self) -> bool:
        """Whether there is nothing behind the first batch."""
        opened = self._open(in_place=True)
        try:
            claim = measure_next(opened.view, self._begin(opened, None).source.tell())
            return claim is None or measure_next(opened.view, claim[2]) is None
        except NoMessageError:
            return True

    def read(self, wanted: Wanted, lost: list[str], *, in_place: bool) -> Iterator[Batch]:
        """Open it and give batch by batch what is wanted, `in_place` as the file's memory where it is not compressed.

        What cannot be read is added to `lost`. FileNotFoundError, at once, if the file has been deleted.
        """
        opened = self._open(in_place=in_place)
        if not self._begin(opened, None).stream.schema.equals(self._schema, check_metadata=True):
            raise KvmStatsError(f"{self.path}: another file took its place while it was read")
        return self._read_batches(opened, wanted, lost)

    def _read_batches(self, opened: _Opened, wanted: Wanted, lost: list[str]) -> Iterator[Batch]:
        names = self._schema.names
        columns = [*map(names.index, ROWS), *(len(names) - len(self.stats) + one for one in wanted.choose(self.stats))]
        reader = self._begin(opened, columns)
        clock = None if wanted.span == ALWAYS else self._begin(opened, [names.index("time")])
        happened = Happened(self.origin)
        view, whole, batches = opened.view, reader.source.tell(), 0
        while (read := self._read_batch(view, whole, clock or reader, batches)) is not None:
            what = happened.read(read.metadata, read.name)
            records = read.records
            if clock is not None:
                is_wanted = wanted.may_have(as_numpy(records.column(0)), what)
                if not is_wanted and batches:
                    reader.source.seek(clock.source.tell())
                elif (
                    both := self._read_batch(view, whole, reader, batches)
                ) is None:  # dictionaries come with the first
                    break
                else:
                    records = both.records
                    del both
                records = records if is_wanted else None
            start, whole, batches = whole, (clock or reader).source.tell(), batches + 1
            size = 0 if records is None else records.nbytes
            yield Batch(records, what, read.name, size, whole - start)
            del records, read
            opened.forget(start)
        rest = len(view) - whole
        if view[whole:] != END_OF_STREAM:
            torn = f"the {rest} bytes after that are not a whole batch" if rest else "nothing follows"
            lost.append(f"{self.path} was not ended: it has {batches} whole batches, to byte {whole}; {torn}")

    def _read_batch(self, view: memoryview, start: int, reader: _Reader, batches: int) -> _Read | None:
        """Return the next batch; None at the end of the stream, or of what is whole of it."""
        name = f"{self.path}: batch {batches + 1}"
        try:
            claim = measure_next(view, start, reader.buffers)
            if claim is None:
                return None
            check_size(*claim[:2], str(self.path), enough=reader.largest)
            reader.largest = max(reader.largest, claim[0])
            records, metadata = reader.stream.read_next_batch_with_custom_metadata()
        except NoMessageError:
            return None
        except (StopIteration, self._pa.ArrowException, OSError) as error:  # bytes that changed on the disk
            if shortage := as_shortage(error, str(self.path)):
                raise shortage from None
            return None
        try:
            records.validate()  # pyarrow aborts the process where a list is longer than its values
        except self._pa.ArrowInvalid as error:
            raise KvmStatsError(f"{name} is damaged: {error}") from None
        return _Read(records, metadata, name)


@dataclass
class _Reader:
    """What reads which buffers of a stream, and from where; and to what the largest of its batches decompressed."""

    source: Any
    stream: Any
    buffers: npt.NDArray[np.intp] | None
    largest: int = 0


class _Read(NamedTuple):
    """A record batch, its metadata, and what it is called in messages."""

    records: Any
    metadata: Any
    name: str


@dataclass
class _Opened:
    """The bytes of a file."""

    view: memoryview
    buffer: Any
    forgetful: mmap.mmap | None
    forgotten: int = 0

    def forget(self, before: int) -> None:
        """Have the kernel take back the memory of the bytes before a place, which can be read again."""
        if self.forgetful is not None and before - self.forgotten >= _FORGET_BYTES:
            before -= before % mmap.PAGESIZE
            self.forgetful.madvise(mmap.MADV_DONTNEED, self.forgotten, before - self.forgotten)
            self.forgotten = before


_FORGET_BYTES = 4 << 20
