"""Recorder: Samples written to disk as they come, an Arrow IPC stream for each kind of file."""

from __future__ import annotations

import errno
import operator
import os
import re
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmstats_fast._resource import Closing
from kvmstats_fast.formats import arrow, need
from kvmstats_fast.formats._put import PRIVATE, check_mode, make_directories, open_new
from kvmstats_fast.formats.limits import MOST_IN_BATCH
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.pending import Pending, bytes_per_sweep
from kvmstats_fast.formats.stream_file import END_OF_STREAM
from kvmstats_fast.joining import renumber
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator


class _File:
    """What pyarrow writes to: every byte reaches the kernel or raises."""

    closed = False

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.position = 0
        self._fd = open_new(path, mode)

    def write(self, data: Any) -> int:
        """Write all of it, which may take several system calls."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view and not self.closed:
            written = os.write(self._fd, view)
            self.position += written
            view = view[written:]
        return size

    def flush(self) -> None:
        """Do nothing: no byte waits here."""

    def sync(self) -> None:
        """Have it on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if not self.closed:
            self.closed = True
            os.close(self._fd)

    def cut(self, position: int) -> None:
        """End the stream at `position`, after its last whole batch; remove the file if it has none."""
        try:
            with suppress(OSError):  # if there is no room for the end mark, the file ends without it
                if position:
                    os.ftruncate(self._fd, position)
                    os.pwrite(self._fd, END_OF_STREAM, position)
                else:
                    self.path.unlink()
        finally:
            self.close()


class Recorder(Closing):
    """Writes Samples to disk as they come; a crash loses the last few seconds at most.

    Each batch in the file has a price, in bytes and in time. Small samples therefore wait, in memory, until they make a
    batch worth writing: at 1 Hz eleven sweeps, in a tenth of the bytes that one by one take. What a killed process
    loses is what waits, see `flush_seconds` and `flush_bytes`; `close`, and so the end of a ``with`` block, writes it.

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
    flush_seconds : float
        Write what waits when it covers so many seconds, by the samples' own clock, or has waited for so long when
        `write` is called. 0: each `write` is a batch, which is in the kernel's hands before it returns.
    flush_bytes : int
        Write what waits when its values take so many bytes. Samples of this size are written at once.
    sync : bool
        Have everything on the disk before `write` returns (``fsync``), each time; nothing waits. Then neither a crash
        nor a power failure loses what was written.
    mode : int
        Permissions of the files, whatever the umask; the directory can be entered by whoever may read them. By default
        the owner alone may: a recording shows what a guest does, and when.

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

    def __init__(  # noqa: PLR0913 - what a recording can be like
        self,
        path: str | os.PathLike[str],
        *,
        compression: str | None = "zstd",
        rotate_bytes: int | None = None,
        rotate_seconds: float | None = None,
        flush_seconds: float = 10.0,
        flush_bytes: int = 1 << 20,
        sync: bool = False,
        mode: int = PRIVATE,
    ) -> None:
        self._files: list[tuple[_File, Any]] = []
        self._pending = Pending(0, 0)
        self._closed = True
        if rotate_bytes is not None and operator.index(rotate_bytes) < 1:
            raise ValueError(f"rotate_bytes is {rotate_bytes}; it must be at least 1")
        if rotate_seconds is not None and not rotate_seconds > 0:
            raise ValueError(f"rotate_seconds is {rotate_seconds}; it must be above 0")
        if not flush_seconds >= 0:
            raise ValueError(f"flush_seconds is {flush_seconds}; it must be at least 0")
        if operator.index(flush_bytes) < 1:
            raise ValueError(f"flush_bytes is {flush_bytes}; it must be at least 1")
        if compression not in (None, "zstd", "lz4"):
            raise ValueError(f"compression is {compression!r}; it must be 'zstd', 'lz4' or None")
        check_mode(mode)
        self._pa = need("pyarrow", "arrow")
        self.path = Path(path)
        self._compression = compression
        self._rotate = (rotate_bytes or float("inf"), rotate_seconds or float("inf"))
        self._pending = Pending(0 if sync else flush_seconds, flush_bytes)
        self._sync, self._mode = sync, mode
        self._recording = os.urandom(16).hex()
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._part = 0
        self._first: Samples | None = None
        self._failed: set[int] = set()
        self._last: int | None = None
        self._next_tick = self._accepted = 0
        self._written = (0, 0)  # sweeps and bytes, so that one assignment counts a batch
        self._began: int | None = None
        make_directories(self.path, mode)
        if next(self.path.iterdir(), None) is not None:
            raise FileExistsError(errno.EEXIST, "it is not empty: record to another path", str(path))
        self._closed = False

    @property
    def sweeps(self) -> int:
        """Sweeps written so far: in the kernel's hands, not lost if this process is killed."""
        return self._written[0]

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._written[1]

    @property
    def pending(self) -> int:
        """Sweeps that wait to be written, and are lost if this process is killed."""
        return self._pending.sweeps

    def write(self, samples: Samples) -> None:
        """Write samples, which must follow those written before, or let them wait for others.

        Nothing that is done to their arrays later changes what is written. Their wall clock may have been set
        meanwhile: each keeps its own offset. Where their ticks do not ascend from those before, because a run counted
        from 0 again, they are counted on as by `Samples.concatenate`. Compressed samples of more than 256 MiB become
        several batches.

        Raises
        ------
        OSError
            If they, or those that waited, cannot be written, as on a full disk (ENOSPC): the recording has ended, with
            all that was written before. The message says how many sweeps that are, and how many are lost.
        ValueError
            If they differ from those before in their files, statistics, interval, host or kernel, or are earlier; if a
            file that had failed was read again; if they are of no files; or if the recording has ended.
        RuntimeError
            In a forked child, because the recording is its parent's, or while another thread writes.

        Notes
        -----
        Ctrl-C while a batch is written takes that batch back, and ends the recording; what had waited before is
        written by `close`, into new files.
        """
        if self._closed:
            raise ValueError(f"{self.path}: this recording has ended")
        if self._pid != os.getpid():
            raise RuntimeError(f"{self.path}: this recording belongs to the parent process: record to another path")
        with self._lock():
            self._check(samples)
            if len(samples):
                samples = replace(samples, tick=renumber(samples.tick, self._next_tick))
            if self._pending.is_enough(samples):
                self._accept(samples)
                self._flush()
                self._write(samples)
            else:
                began = self._began if self._files else self._pending.began
                if self._pending and self._is_over(began, samples):
                    self._flush()
                is_time = self._pending.add(samples, self.sweeps)
                self._accept(samples)
                if is_time:
                    self._flush()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if not self._writing.acquire(blocking=False):
            raise RuntimeError(f"{self.path}: another thread is writing to this recording: it has one writer")
        try:
            yield
        finally:
            self._writing.release()

    def _accept(self, samples: Samples) -> None:
        """Remember what later samples must follow."""
        if self._first is None:
            self._first = samples[:0]
        self._accepted += len(samples)
        self._failed |= {error.file for error in samples.errors}
        if len(samples):
            self._last = int(samples.time[-1])
            self._next_tick = int(samples.tick[-1]) + 1

    def _flush(self) -> None:
        """Write what waits."""
        if self._pending:
            samples = self._pending.join()
            # All of it, unless Ctrl-C ended an earlier attempt.
            written = self.sweeps - self._pending.start
            self._write(replace(samples[written:], missed=0) if written else samples)
            self._pending.clear()

    def _write(self, samples: Samples) -> None:
        for part in self._cut(samples):
            self._write_batch(part)

    def _cut(self, samples: Samples) -> Iterator[Samples]:
        """Cut samples into batches that any reader has room to decompress; uncompressed ones are read in place."""
        step = max(MOST_IN_BATCH // (max(bytes_per_sweep([group]) for group in samples.groups) + 1), 1)
        if self._compression is None or len(samples) <= step:
            yield samples
            return
        yield replace(samples[:step], missed=samples.missed, overruns=samples.overruns)
        for start in range(step, len(samples), step):
            yield replace(samples[start : start + step], missed=0)  # of which sweeps they were missed is in `tick`

    def _write_batch(self, samples: Samples) -> None:
        before = self._written
        ends: list[tuple[_File, int]] = []
        try:
            self._begin_part(samples)
            ends = [(file, file.position) for file, _ in self._files]
            for (file, writer), group in zip(self._files, samples.groups, strict=True):
                batch, metadata = arrow.to_batch(samples, group, writer[1])
                writer[0].write_batch(batch, custom_metadata=metadata)
                if self._sync:
                    file.sync()
            grown = sum(file.position - position for file, position in ends)
            self._written = (before[0] + len(samples), before[1] + grown)
        except BaseException as error:
            # Ctrl-C too may have left half a batch behind.
            self._closed = True
            if self._written is before:
                for file, position in ends or [(file, 0) for file, _ in self._files]:
                    file.cut(position)
                self._files = []
                if any(position for _, position in ends):
                    self._part += 1  # for what close() has still to write
            if isinstance(error, OSError):
                self._pending.clear()
                kept = f"the recording ends after {self.sweeps} sweeps" + (", which can be read" if self.sweeps else "")
                lost = f"the last {self._accepted - self.sweeps} sweeps given to it are lost"
                where = str(error.filename or self.path)
                raise OSError(error.errno, f"{error.strerror or error}; {lost}; {kept}", where) from None
            raise

    def _check(self, samples: Samples) -> None:
        """Raise ValueError unless these samples can follow those that were written: `Samples.concatenate` decides."""
        if not isinstance(samples, Samples):
            raise TypeError(f"samples is a {type(samples).__name__}; it must be Samples")
        if not samples.groups:
            raise ValueError(f"{self.path}: these samples are of no files: there is nothing to write")
        if self._first is not None and (differs := _find_difference(self._first, samples)):
            raise ValueError(f"{self.path}: these samples are of other {differs} than those before: record them apart")
        if len(samples) and self._last is not None and samples.time[0] < self._last:
            raise ValueError(f"{self.path}: these samples are older than those before: write them in the order of time")
        failed = {error.file for error in samples.errors if not error.sweep}
        if len(samples) and not self._failed <= failed:
            ids = ", ".join(samples.files[index].id for index in sorted(self._failed - failed))
            raise ValueError(f"{self.path}: {ids} had failed and was read again: record these samples apart")

    def _is_over(self, began: int | None, samples: Samples) -> bool:
        """Whether a part that began at a time is too old for these."""
        return began is not None and len(samples) > 0 and int(samples.time[-1]) - began >= self._rotate[1] * 1e9

    def _begin_part(self, samples: Samples) -> None:
        """Open files, unless there are some that are neither too large nor too old."""
        if self._files:
            if self._began is None and len(samples):
                self._began = int(samples.time[0])
            largest = max(file.position for file, _ in self._files)
            if largest < self._rotate[0] and not self._is_over(self._began, samples):
                return
            self._end_part()
            self._part += 1
        self._began = int(samples.time[0]) if len(samples) else None
        pa = self._pa
        # Without Arrow's threads: it ends the process where it cannot start one.
        options = pa.ipc.IpcWriteOptions(compression=self._compression, use_threads=False)
        counts: dict[str, int] = {}
        for group in samples.groups:
            counts[group.kind] = number = counts.get(group.kind, 0) + 1
            label = group.kind + (str(number) if number > 1 else "")
            origin = Origin.of(samples, group, recording=self._recording, part=self._part)
            schema = arrow.arrow_schema(origin, list(group.places))
            file = _File(self.path / f"{label}-{self._part:05}.arrows", self._mode)
            self._files.append((file, None))
            writer = pa.ipc.new_stream(pa.PythonFile(file, "w"), schema, options=options)
            self._files[-1] = (file, (writer, schema))

    def _end_part(self) -> None:
        files, self._files = self._files, []
        with ExitStack() as stack:
            for file, writer in files:
                stack.callback(file.close)
                if writer is not None and self._pid == os.getpid():  # a forked child must not end it
                    stack.callback(writer[0].close)

    def close(self) -> None:
        """Write what waits, and end the recording; a second call does nothing.

        Raises
        ------
        OSError
            As `write`.
        RuntimeError
            While another thread writes.
        """
        if self._pid != os.getpid():  # what waits is the parent's to write
            self._closed = True
            self._end_part()
            return
        with self._lock():
            self._closed = True
            try:
                self._flush()
            finally:
                self._end_part()

    def __del__(self) -> None:
        if self._pending:
            self.close()

    def __repr__(self) -> str:
        waiting = f", {self.pending} more wait" if self.pending else ""
        return f"<Recorder {str(self.path)!r}: {self.sweeps} sweeps, {self.size} bytes{waiting}>"


def is_stream_name(name: str) -> bool:
    """Whether a file of this name in a recording's directory is one that a Recorder wrote."""
    return bool(_STREAM_NAME.fullmatch(name))


_STREAM_NAME = re.compile(r"(vm|vcpu)[0-9]*-[0-9]{5,}\.arrows")


def _find_difference(before: Samples, after: Samples) -> str | None:
    """Name what may not change within a recording, and did."""
    if [group.signature for group in before.groups] != [group.signature for group in after.groups]:
        return "statistics or kernels" if before.files == after.files else "files"
    names = ("files", "interval", "host", "kernel")
    return next((name for name in names if getattr(before, name) != getattr(after, name)), None)
