"""Recordings: directories of Arrow IPC streams, one for each kind of file, written batch by batch."""

from __future__ import annotations

import errno
import itertools
import operator
import os
import threading
import warnings
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvmstats_fast._resource import Closing
from kvmstats_fast.errors import KvmStatsError, RecordingWarning
from kvmstats_fast.formats import arrow, need
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvmstats_fast.groups import Columns
    from kvmstats_fast.samples import FileInfo

_END = b"\xff\xff\xff\xff\0\0\0\0"  # end of an IPC stream


#: What comes of metadata with bytes that changed on the disk.
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError)


class _File:
    """What pyarrow writes to: every byte reaches the kernel or raises."""

    closed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while view and not self.closed:
            written = os.write(self._fd, view)
            self.position += written
            view = view[written:]
        return size

    def flush(self) -> None:
        """Nothing waits here."""

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)

    def cut(self, position: int) -> None:
        """End the stream at `position`, behind its last whole batch; without one there is no stream."""
        try:
            with suppress(OSError):  # where even these do not fit, the file ends without them
                if position:
                    os.ftruncate(self._fd, position)
                    os.pwrite(self._fd, _END, position)
                else:
                    self.path.unlink()
        finally:
            self.close()


class Recorder(Closing):
    """Writes Samples to disk as they come, so that a crash loses at most what was not yet written.

    Parameters
    ----------
    path : path-like
        The directory to make, which must not exist (or be empty). It will have a file for each kind of stats file,
        ``vm-00000.arrows`` and ``vcpu-00000.arrows``: Arrow IPC streams.
    compression : {"zstd", "lz4", None}
        Of the batches. None: larger files, which `Recording` reads without a copy.
    rotate_bytes, rotate_seconds : optional
        Begin new files (``-00001``) when one has become as large, or as many seconds were recorded into it. Each is
        readable without the others.
    sync : bool
        Have each batch on the disk before `write` returns (``fsync``): a power failure loses no more than a crash.

    Attributes
    ----------
    sweeps : int
        Written so far.
    size : int
        Bytes written so far.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[arrow]'``.

    Examples
    --------
    >>> with Recorder("run1") as recorder, sampler.stream(0.001) as stream:     # doctest: +SKIP
    ...     for x in stream:
    ...         recorder.write(x)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        compression: str | None = "zstd",
        rotate_bytes: int | None = None,
        rotate_seconds: float | None = None,
        sync: bool = False,
    ) -> None:
        self._files: list[tuple[_File, Any]] = []
        self._closed = True
        if rotate_bytes is not None and operator.index(rotate_bytes) < 1:
            raise ValueError(f"rotate_bytes is {rotate_bytes}; it must be at least 1")
        if rotate_seconds is not None and not rotate_seconds > 0:
            raise ValueError(f"rotate_seconds is {rotate_seconds}; it must be above 0")
        if compression not in (None, "zstd", "lz4"):
            raise ValueError(f"compression is {compression!r}; it must be 'zstd', 'lz4' or None")
        self._pa = need("pyarrow", "arrow")
        self.path = Path(path)
        self._compression = compression
        self._rotate = (rotate_bytes or float("inf"), rotate_seconds or float("inf"))
        self._sync = sync
        self._recording = os.urandom(16).hex()
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._part = 0
        self._first: Samples | None = None
        self._last: int | None = None
        self._began: int | None = None
        self.sweeps = self.size = 0
        self.path.mkdir(parents=True, exist_ok=True)
        if next(self.path.iterdir(), None) is not None:
            raise FileExistsError(errno.EEXIST, "there is something in it already: record to another path", str(path))
        self._closed = False

    def write(self, samples: Samples) -> None:
        """Write samples, which must follow those written before.

        Raises
        ------
        OSError
            If they cannot be written, as on a full disk (ENOSPC): the recording has ended, with all that was written
            before.
        ValueError
            If they are of other files or of another run than those before, earlier than those, or of no files; or if
            the recording has ended.
        RuntimeError
            In a forked child, because the recording is its parent's, or while another thread writes.
        """
        if self._closed:
            raise ValueError(f"{self.path}: this recording has ended")
        if self._pid != os.getpid():
            raise RuntimeError(
                f"{self.path}: this recording stayed in the parent process: record to a path of your own"
            )
        if not self._writing.acquire(blocking=False):
            raise RuntimeError(f"{self.path}: another thread is writing to this recording: it has one writer")
        try:
            self._write(samples)
        finally:
            self._writing.release()

    def _write(self, samples: Samples) -> None:
        self._check(samples)
        ends: list[tuple[_File, int]] = []
        try:
            self._begin_part(samples)
            ends = [(file, file.position) for file, _ in self._files]
            for (file, writer), group in zip(self._files, samples.groups, strict=True):
                batch, metadata = arrow.to_batch(samples, group, writer[1])
                writer[0].write_batch(batch, custom_metadata=metadata)
                if self._sync:
                    file.sync()
        except BaseException as error:
            # Ctrl-C too may have left half a batch behind.
            self._closed = True
            for file, position in ends or [(file, 0) for file, _ in self._files]:
                file.cut(position)
            self._files = []
            if isinstance(error, OSError):
                kept = f"the recording ends after {self.sweeps} sweeps" + (", which can be read" if self.sweeps else "")
                where = str(error.filename or self.path)
                raise OSError(error.errno, f"{error.strerror or error}; {kept}", where) from None
            raise
        if self._first is None:
            self._first = samples[:0]
        if len(samples):
            self._last = int(samples.time[-1])
        self.sweeps += len(samples)
        self.size += sum(file.position - position for file, position in ends)

    def _check(self, samples: Samples) -> None:
        if not isinstance(samples, Samples):
            raise TypeError(f"samples is a {type(samples).__name__}; it must be Samples")
        if not samples.groups:
            raise ValueError(f"{self.path}: these samples are of no files: there is nothing to write")
        if self._first is not None and _run_of(samples) != _run_of(self._first):
            raise ValueError(f"{self.path}: these samples are of other files or of another run: record them apart")
        if len(samples) and self._last is not None and samples.time[0] < self._last:
            raise ValueError(f"{self.path}: these samples are of before those written: write them in order of time")

    def _begin_part(self, samples: Samples) -> None:
        """Open files, if it is time for it."""
        if self._files:
            size, seconds = self._rotate
            if self._began is None and len(samples):
                self._began = int(samples.time[0])
            lasted = (int(samples.time[-1]) - self._began) / 1e9 if len(samples) and self._began is not None else 0.0
            if lasted < seconds and max(file.position for file, _ in self._files) < size:
                return
            self._end_part()
            self._part += 1
        self._began = int(samples.time[0]) if len(samples) else None
        pa = self._pa
        options = pa.ipc.IpcWriteOptions(compression=self._compression)
        counts: dict[str, int] = {}
        for group in samples.groups:
            counts[group.kind] = number = counts.get(group.kind, 0) + 1
            label = group.kind + (str(number) if number > 1 else "")
            origin = arrow.origin_of(samples, group, recording=self._recording, part=self._part)
            schema = arrow.arrow_schema(origin, list(group.places))
            file = _File(self.path / f"{label}-{self._part:05}.arrows")
            self._files.append((file, None))
            writer = pa.ipc.new_stream(pa.PythonFile(file, "w"), schema, options=options)
            self._files[-1] = (file, (writer, schema))
        self.size += sum(file.position for file, _ in self._files)

    def _end_part(self) -> None:
        files, self._files = self._files, []
        with ExitStack() as stack:
            for file, writer in files:
                stack.callback(file.close)
                if writer is not None and self._pid == os.getpid():  # a forked child must not end it
                    stack.callback(writer[0].close)

    def close(self) -> None:
        """End the recording; a second call does nothing."""
        self._closed = True
        self._end_part()

    def __repr__(self) -> str:
        return f"<Recorder {str(self.path)!r}: {self.sweeps} sweeps, {self.size} bytes>"


def _run_of(samples: Samples) -> tuple[Any, ...]:
    """Tell runs apart: all that is written once for a recording."""
    about = (samples.wall_offset, samples.interval, samples.host, samples.kernel)
    return (samples.files, [group.signature for group in samples.groups], *about)


class _Stream:
    """One file of a recording, read from a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pa = need("pyarrow", "arrow")
        _, reader = self._open()
        try:
            self.origin = arrow.Origin.decoded(reader.schema.metadata, str(path))
        except _DAMAGE as error:
            raise KvmStatsError(f"{path}: its metadata is damaged: {error!r}") from error

    def _open(self) -> tuple[Any, Any]:
        source = self._pa.memory_map(os.fsencode(self.path))  # may be refused, which says nothing of what is in it
        try:
            return source, self._pa.ipc.open_stream(source)
        except (self._pa.ArrowException, OSError) as error:
            size = self.path.stat().st_size
            raise KvmStatsError(f"{self.path}: no Arrow stream begins in these {size} bytes: {error}") from None

    def __iter__(self) -> Iterator[Samples]:
        source, reader = self._open()
        whole, batches = source.tell(), 0
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            except (StopIteration, self._pa.ArrowException, OSError):  # how a stream ends, and how a torn one does
                break
            whole, batches = source.tell(), batches + 1
            try:
                batch.validate()  # pyarrow aborts the process where a list is longer than its values
                samples = arrow.to_samples(batch, metadata, self.origin)
            except (*_DAMAGE, KvmStatsError) as error:
                raise KvmStatsError(f"{self.path}: batch {batches} is damaged: {error!r}") from error
            yield samples
        source.seek(whole)
        rest = source.read()
        if rest != _END:
            lost = f"the {len(rest)} bytes behind it are no whole batch and are lost" if rest else "what came is lost"
            warnings.warn(
                f"{self.path}: this recording was not ended: {batches} whole batches to byte {whole}; {lost}",
                RecordingWarning,
                stacklevel=2,
            )


def _files_of(path: Path) -> list[Path]:
    """Return the files of a recording, or the one that this is."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no recording", str(path))
    if path.suffix == ".npz":
        raise KvmStatsError(f"{path}: this is no recording but an .npz: Samples.load reads it")
    if path.is_file():
        return [path]
    found = sorted(one for one in path.iterdir() if one.suffix == ".arrows")
    if not found:
        raise KvmStatsError(f"{path}: there is no recording: it has no .arrows file")
    return found


class Recording:
    """A recording on disk: iterate over it for Samples batch by batch, or `load` it as a whole.

    Parameters
    ----------
    path : path-like
        The directory that a `Recorder` made, or one of its files.

    Attributes
    ----------
    files : tuple of FileInfo
    host, kernel : str
        Where it was made: host name, and release and machine of the kernel.
    version : str
        Of the kvmstats_fast that made it.
    recording : str
        Tells recordings apart; their parts have it in common.
    interval : float
        Seconds between ticks.
    wall_offset : int
        ns to add to the samples' `time` for CLOCK_REALTIME.

    Raises
    ------
    FileNotFoundError, KvmStatsError
        If there is no recording, or one that this version does not read.
    OSError
        If the kernel refuses to open one of its files.

    Warns
    -----
    RecordingWarning
        While it is read, where it was not ended, or a file of it is missing. What is whole is read all the same.

    Notes
    -----
    Arrow streams have no checksum: bytes that changed on the disk are not noticed, unless compression does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: dict[int, list[_Stream]] = {}
        unread = []
        for one in _files_of(self.path):
            try:
                stream = _Stream(one)
            except KvmStatsError as error:
                unread.append(error)
                continue
            self._parts.setdefault(stream.origin.part, []).append(stream)
        for streams in self._parts.values():
            streams.sort(key=lambda stream: stream.origin.columns)  # the order in which they were sampled
        if not self._parts:
            raise unread[0]
        for failure in unread:
            warnings.warn(f"{failure}; it is left out", RecordingWarning, stacklevel=2)
        origins = [stream.origin for part in self._parts.values() for stream in part]
        first = origins[0]
        if any(origin.recording != first.recording for origin in origins):
            raise KvmStatsError(f"{path}: files of different recordings lie here: give each a directory of its own")
        for stream in itertools.chain(*self._parts.values()):
            if stream.origin.files != first.files:
                raise KvmStatsError(f"{stream.path}: its metadata is damaged: other stats files than in the first file")
        #: Of all files that were recorded, those that are here: one stream alone has those of one kind.
        self._kept = sorted({index for origin in origins for index in origin.columns})
        self.files: tuple[FileInfo, ...] = tuple(first.files[index] for index in self._kept)
        gone = {info.kind for index, info in enumerate(first.files) if index not in self._kept}
        if gone and not unread and self.path.is_dir():
            warnings.warn(
                f"{path}: the file of kind {', '.join(sorted(gone))} is missing", RecordingWarning, stacklevel=2
            )
        self.host, self.kernel, self.version = first.host, first.kernel, first.version
        self.recording, self.interval, self.wall_offset = first.recording, first.interval, first.wall_offset

    def __repr__(self) -> str:
        return f"<Recording {str(self.path)!r}>"

    def __iter__(self) -> Iterator[Samples]:
        """Give the batches in turn; each has arrays of its own, which are the file's memory if not compressed."""
        expected = min(self._parts)
        for number, streams in sorted(self._parts.items()):
            if number != expected:
                missing = f"parts {expected} to {number - 1} are" if number - expected > 1 else f"part {expected} is"
                warnings.warn(f"{self.path}: {missing} missing", RecordingWarning, stacklevel=2)
            expected = number + 1
            here = {index for stream in streams for index in stream.origin.columns}
            if gone := {info.kind for index, info in zip(self._kept, self.files, strict=True) if index not in here}:
                names = ", ".join(str(stream.path) for stream in streams)
                warnings.warn(
                    f"{self.path}: part {number} has no file of kind {', '.join(sorted(gone))}; of the same sweeps "
                    f"{names} is left out here: open it by itself to read it",
                    RecordingWarning,
                    stacklevel=2,
                )
                continue
            yield from self._together(streams)

    def _together(self, streams: list[_Stream]) -> Iterator[Samples]:
        """Put the batches of the kinds together, which were sampled together."""
        readers = [iter(stream) for stream in streams]
        while True:
            batches = [next(reader, None) for reader in readers]
            present = [batch for batch in batches if batch is not None]
            if len(present) < len(batches):
                ahead = [str(s.path) for s, batch in zip(streams, batches, strict=True) if batch is not None]
                if ahead:
                    warnings.warn(
                        f"{', '.join(ahead)} has batches behind the end of the other kind's file, left out here: open "
                        "the file by itself to read them",
                        RecordingWarning,
                        stacklevel=3,
                    )
                    for reader in readers:
                        for _ in reader:
                            pass  # so that what is lost of each is said
                return
            if any(not np.array_equal(present[0].tick, batch.tick) for batch in present):
                raise KvmStatsError(f"{self.path}: the files of its kinds are not of the same sweeps")
            yield present[0].restrict([group for batch in present for group in batch.groups], self._kept)

    def load(self) -> Samples:
        """Return all of it as one Samples; of a single uncompressed batch without a copy.

        Raises
        ------
        MemoryError
            If it does not fit; iterate over it then.
        """
        parts = list(self)
        if not parts:
            raise KvmStatsError(f"{self.path}: this recording has no whole batch")
        if len(parts) == 1:
            return parts[0]
        try:
            return _concatenated(parts)
        except ValueError as error:
            raise KvmStatsError(f"{self.path}: this recording is damaged: {error}") from error


def _concatenated(parts: list[Samples]) -> Samples:
    """Put parts together, letting go of them statistic by statistic, so that memory is needed only once."""
    every = [[cast("Columns", group) for group in part.groups] for part in parts]
    heads = [replace(group, arrays=()) for group in every[0]]
    rooms = [
        [list(arrays) for arrays in zip(*(group.arrays for group in groups), strict=True)]
        for groups in zip(*every, strict=True)
    ]
    parts = [replace(part, groups=()) for part in parts]
    every.clear()
    groups = tuple(
        replace(head, arrays=tuple(_emptied(room) for room in columns))
        for head, columns in zip(heads, rooms, strict=True)
    )
    return replace(Samples.concatenate(parts), groups=groups)


def _emptied(room: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    joined = np.concatenate(room)
    room.clear()
    need("pyarrow", "arrow").default_memory_pool().release_unused()  # it would keep what batches were decompressed to
    return joined
