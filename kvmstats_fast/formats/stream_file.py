"""One file of a recording, an Arrow IPC stream, read from a memory map."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from kvmstats_fast._resource import Fd
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need
from kvmstats_fast.formats.batches import read_happened, stats_of, to_samples
from kvmstats_fast.formats.ipc import NoMessageError, measure_next
from kvmstats_fast.formats.limits import check_size
from kvmstats_fast.formats.origin import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmstats_fast.samples import Samples

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
        *_, reader = self._open()
        self._schema = reader.schema
        self.origin = Origin.decode(self._schema.metadata, str(path))
        self._stats = stats_of(self._schema, self.origin, str(path))

    def _open(self) -> tuple[memoryview, Any, Any]:
        """Return the file's bytes, a source of them, and a reader that has read the schema."""
        pa = self._pa
        with open_regular(self.path) as fd:
            try:
                # By its fd, so that it is the file that was looked at. The map stays when both are closed.
                with pa.memory_map(f"/proc/self/fd/{fd.fileno()}") as file:
                    buffer = file.read_buffer()
            except OSError as error:
                raise self._shortage(error) or OSError(error.errno, error.strerror, str(self.path)) from None
        source = pa.BufferReader(buffer)
        try:
            reader = pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise self._shortage(error) or KvmStatsError(
                f"{self.path}: not a recording: no Arrow stream begins in its {len(buffer)} bytes: {error}"
            ) from None
        return memoryview(buffer).cast("B"), source, reader

    def _shortage(self, error: Exception) -> MemoryError | None:
        """Return a MemoryError if that is what it is: Arrow's is an ArrowException, too, and its codecs only say so."""
        short = isinstance(error, MemoryError) or any(text in str(error) for text in _SHORTAGES)
        return MemoryError(f"{self.path}: {error}") if short else None

    def read(self, lost: list[str]) -> Iterator[tuple[Samples, dict[str, Any]]]:
        """Open it and give Samples batch by batch, with what `read_happened` returned.

        What cannot be read is added to `lost`. FileNotFoundError, at once, if the file has been deleted.
        """
        view, source, reader = self._open()
        if not reader.schema.equals(self._schema, check_metadata=True):
            raise KvmStatsError(f"{self.path}: another file took its place while it was read")
        return self._read_batches(view, source, reader, lost)

    def _read_batches(
        self, view: memoryview, source: Any, reader: Any, lost: list[str]
    ) -> Iterator[tuple[Samples, dict[str, Any]]]:
        whole, batches = source.tell(), 0
        while (read := self._read_batch(view, source, reader)) is not None:
            whole, batches = source.tell(), batches + 1
            batch, metadata = read
            name = f"{self.path}: batch {batches}"
            try:
                batch.validate()  # pyarrow aborts the process where a list is longer than its values
            except self._pa.ArrowInvalid as error:
                raise KvmStatsError(f"{name} is damaged: {error}") from None
            happened = read_happened(metadata, self.origin, name)
            yield to_samples(batch, self._stats, happened, self.origin, name), happened
        rest = len(view) - whole
        if view[whole:] != END_OF_STREAM:
            torn = f"the {rest} bytes after that are not a whole batch" if rest else "nothing follows"
            lost.append(f"{self.path} was not ended: it has {batches} whole batches, to byte {whole}; {torn}")

    def _read_batch(self, view: memoryview, source: Any, reader: Any) -> tuple[Any, Any] | None:
        """Return the next batch and its metadata; None at the end of the stream, or of what is whole of it."""
        try:
            claim = measure_next(view, source.tell())
            if claim is None:
                return None
            check_size(*claim, str(self.path))
            read: tuple[Any, Any] = reader.read_next_batch_with_custom_metadata()
        except NoMessageError:
            return None
        except (StopIteration, self._pa.ArrowException, OSError) as error:  # bytes that changed on the disk
            if shortage := self._shortage(error):
                raise shortage from None
            return None
        return read


_SHORTAGES = ("Cannot allocate memory", "not enough memory")
