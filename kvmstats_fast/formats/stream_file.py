"""One file of a recording, an Arrow IPC stream, read from a memory map."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmstats_fast._resource import Fd
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.batches import Happened, stats_of
from kvmstats_fast.formats.ipc import NoMessageError, measure_next
from kvmstats_fast.formats.limits import check_size
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.steps import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        self._schema = opened.reader.schema
        self.origin = Origin.decode(self._schema.metadata, str(path))
        self.stats: list[Stat] = stats_of(self._schema, self.origin, str(path))

    def _open(self, *, in_place: bool) -> _Opened:
        """Open the file, and a reader of it that has read the schema.

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
                raise self._shortage(error) or OSError(error.errno, error.strerror, str(self.path)) from None
        source = pa.BufferReader(buffer)
        try:
            reader = pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise self._shortage(error) or KvmStatsError(
                f"{self.path}: not a recording: no Arrow stream begins in its {len(buffer)} bytes: {error}"
            ) from None
        return _Opened(memoryview(buffer).cast("B"), source, reader, forgetful)

    def _shortage(self, error: Exception) -> MemoryError | None:
        """Return a MemoryError if that is what it is: Arrow's is an ArrowException, too, and its codecs only say so."""
        short = isinstance(error, MemoryError) or any(text in str(error) for text in _SHORTAGES)
        return MemoryError(f"{self.path}: {error}") if short else None

    def has_one_batch(self) -> bool:
        """Whether there is nothing behind the first batch."""
        opened = self._open(in_place=True)
        try:
            claim = measure_next(opened.view, opened.source.tell())
            return claim is None or measure_next(opened.view, claim[2]) is None
        except NoMessageError:
            return True

    def read(self, lost: list[str], *, in_place: bool) -> Iterator[Batch]:
        """Open it and give batch by batch, `in_place` as the memory of the file where it is not compressed.

        What cannot be read is added to `lost`. FileNotFoundError, at once, if the file has been deleted.
        """
        opened = self._open(in_place=in_place)
        if not opened.reader.schema.equals(self._schema, check_metadata=True):
            raise KvmStatsError(f"{self.path}: another file took its place while it was read")
        return self._read_batches(opened, lost)

    def _read_batches(self, opened: _Opened, lost: list[str]) -> Iterator[Batch]:
        view, whole, batches = opened.view, opened.source.tell(), 0
        happened = Happened(self.origin)
        while (read := self._read_batch(view, whole, opened.reader)) is not None:
            start, whole, batches = whole, opened.source.tell(), batches + 1
            batch, metadata, size = read
            name = f"{self.path}: batch {batches}"
            try:
                batch.validate()  # pyarrow aborts the process where a list is longer than its values
            except self._pa.ArrowInvalid as error:
                raise KvmStatsError(f"{name} is damaged: {error}") from None
            yield Batch(batch, happened.read(metadata, name), name, size, whole - start)
            del batch, read
            opened.forget(start)
        rest = len(view) - whole
        if view[whole:] != END_OF_STREAM:
            torn = f"the {rest} bytes after that are not a whole batch" if rest else "nothing follows"
            lost.append(f"{self.path} was not ended: it has {batches} whole batches, to byte {whole}; {torn}")

    def _read_batch(self, view: memoryview, start: int, reader: Any) -> tuple[Any, Any, int] | None:
        """Return the next batch, its metadata and size; None at the end of the stream, or of what is whole of it."""
        try:
            claim = measure_next(view, start)
            if claim is None:
                return None
            size, stored, _ = claim
            check_size(size, stored, str(self.path))
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        except NoMessageError:
            return None
        except (StopIteration, self._pa.ArrowException, OSError) as error:  # bytes that changed on the disk
            if shortage := self._shortage(error):
                raise shortage from None
            return None
        return batch, metadata, max(size, stored)


@dataclass
class _Opened:
    """The bytes of a file, and what reads them."""

    view: memoryview
    source: Any
    reader: Any
    forgetful: mmap.mmap | None
    forgotten: int = 0

    def forget(self, before: int) -> None:
        """Have the kernel take back the memory of the bytes before a place, which can be read again."""
        if self.forgetful is not None and before - self.forgotten >= _FORGET_BYTES:
            before -= before % mmap.PAGESIZE
            self.forgetful.madvise(mmap.MADV_DONTNEED, self.forgotten, before - self.forgotten)
            self.forgotten = before


_FORGET_BYTES = 4 << 20
_SHORTAGES = ("Cannot allocate memory", "not enough memory")
