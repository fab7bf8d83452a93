"""Recorder: Samples written to disk as they come, an Arrow IPC stream for each kind of file."""

from __future__ import annotations

import atexit
import errno
import os
import re
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from kvmstats_fast._arguments import check_integer, check_seconds
from kvmstats_fast._resource import Closing
from kvmstats_fast.formats import need
from kvmstats_fast.formats._put import PRIVATE, check_mode, make_directories
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.part_writer import PartWriter
from kvmstats_fast.formats.pending import Pending
from kvmstats_fast.formats.stream_writer import Options, Written
from kvmstats_fast.joining import renumber
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Values that make a batch worth its price, unless the caller says.
_BATCH_BYTES = 16 << 20


class Recorder(Closing):
    """Write Samples to disk as they arrive; a crash loses the last few seconds at most.

    Each batch in a file costs bytes and time. Small samples therefore wait in memory until there are enough of them
    (`flush_seconds`, `flush_bytes`); a killed process loses what waits. At 1 Hz the result is still small: it goes to
    the tail of the recording, which are separate files, and is rewritten as one batch when there is enough for a large
    one (`batch_bytes`). So a recording at 1 Hz is as small as one that was written in one piece. `close`, and so the
    end of a ``with`` block, writes what waits, and leaves no tail.

    Parameters
    ----------
    path : path-like
        The directory to create; it must not exist, or be empty. It gets an Arrow IPC stream for each kind of stats
        file, ``vm-00000.arrows`` and ``vcpu-00000.arrows``. Samples of other files than before, as when a VM comes or
        goes, begin another run: new files in the same directory.
    compression : {"zstd", "lz4", None}
        Compression of the batches. None: larger files, which `Recording` reads without a copy.
    rotate_bytes, rotate_seconds : optional
        Begin new files (``-00001``) when a file has reached this size, or holds this many seconds. Each can be read
        without the others.
    flush_seconds : float
        Write what waits when it covers this many seconds, by the samples' own clock, or has waited this long when
        `write` is called. 0: samples have been passed to the kernel when `write` returns.
    flush_bytes : int
        Write what waits when its values take this many bytes.
    batch_bytes : int, optional
        Rewrite the tail as one batch when its values take this many bytes; until then they are kept in memory, too.
        Samples of an eighth of this size (and of `flush_bytes`) become a batch of their own at once. 0: never rewrite.
        Default: 16 MiB; 0 if nothing waits.
    sync : bool
        Put everything on the disk (``fsync``) before `write` returns, so that nothing waits, and neither a crash nor a
        power failure loses what was written.
    mode : int
        Permissions of the files, whatever the umask; whoever may read them can enter the directory. Default: the owner
        only, because a recording shows what a guest does, and when.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    TypeError, ValueError
        For arguments of a wrong type or out of range.
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
        batch_bytes: int | None = None,
        sync: bool = False,
        mode: int = PRIVATE,
    ) -> None:
        self._pending = Pending(0, 0, 0)
        self._closed = True
        if rotate_bytes is not None:
            rotate_bytes = check_integer("rotate_bytes", rotate_bytes, 1)
        if rotate_seconds is not None:
            rotate_seconds = check_seconds("rotate_seconds", rotate_seconds, zero=False)
        flush_seconds = check_seconds("flush_seconds", flush_seconds, zero=True)
        flush_bytes = check_integer("flush_bytes", flush_bytes, 1)
        if batch_bytes is not None:
            batch_bytes = check_integer("batch_bytes", batch_bytes, 0)
        if compression not in (None, "zstd", "lz4"):
            raise ValueError(f"compression is {compression!r}; it must be 'zstd', 'lz4' or None")
        check_mode(mode)
        need("pyarrow", "arrow")
        self.path = Path(path)
        waits = flush_seconds > 0 and not sync
        if batch_bytes is None:
            batch_bytes = _BATCH_BYTES if waits else 0
        # So that the chunks of a stream, which end at 4 MiB, are written once.
        own = max(flush_bytes if waits else 0, batch_bytes // 8)
        self._rotate = (rotate_bytes or float("inf"), rotate_seconds or float("inf"))
        self._pending = Pending(flush_seconds if waits else 0, flush_bytes, own)
        self._options, self._batch_bytes = Options(compression, sync, mode), batch_bytes
        self._recording = os.urandom(16).hex()
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._part = self._new_part(0, 0, Written())
        self._first: Samples | None = None
        self._failed: set[int] = set()
        self._last: int | None = None
        self._next_tick = self._accepted = 0
        make_directories(self.path, mode)
        if next(self.path.iterdir(), None) is not None:
            raise FileExistsError(
                errno.EEXIST, "it is not empty: record to another path (or `kvmstats record --force`)", str(path)
            )
        self._closed = False
        _RECORDERS.add(self)

    @property
    def sweeps(self) -> int:
        """Sweeps written so far: passed to the kernel, and not lost if this process is killed."""
        return self._part.written.sweeps

    @property
    def size(self) -> int:
        """Bytes of the batches written so far; fewer after small ones were rewritten as one."""
        return self._part.written.size

    @property
    def pending(self) -> int:
        """Sweeps that wait to be written, and are lost if this process is killed."""
        return self._pending.sweeps

    def write(self, samples: Samples) -> None:
        """Write samples, or let them wait for more; they must follow those written before.

        The caller may reuse the arrays. The wall clock may have been set meanwhile: each batch keeps its own offset. If
        ticks do not ascend from those before, because a run counted from 0 again, they are renumbered as by
        `Samples.concatenate`. Compressed samples of more than 32 MiB become several batches.

        Raises
        ------
        OSError
            If they, or those that waited, cannot be written, as on a full disk (ENOSPC): the recording has ended, and
            keeps all that was written before. The message says how many sweeps that is, and how many are lost.
        ValueError
            If they are of another host or kernel than those before; if they are of the same files, but of other
            statistics or another interval; if they are earlier; if a file that had failed was read again; if they are
            of no files; if they say what readers refuse (docs/recording-format.md); or if the recording has ended.
        RuntimeError
            In a forked child, because the recording is its parent's, or while another thread writes.

        Notes
        -----
        Ctrl-C while a batch is written removes that batch, and ends the recording; `close` writes what waited to new
        files. What was in the tail stays there.
        """
        if self._closed:
            raise ValueError(f"{self.path}: this recording has ended")
        if self._pid != os.getpid():
            raise RuntimeError(f"{self.path}: this recording belongs to the parent process: record to another path")
        with self._lock():
            if self._check(samples):
                self._end_part()
                self._begin_part(self._part.run + 1)
                self._first, self._failed, self._next_tick = None, set(), 0
            elif self._is_over(samples):
                self._end_part()
                self._begin_part(self._part.run)
            if len(samples):
                samples = replace(samples, tick=renumber(samples.tick, self._next_tick))
            if self._pending.is_enough(samples):
                self._accept(samples)
                self._flush()
                with self._counting_losses():
                    self._part.add(samples, own=True)
            else:
                is_time = self._pending.add(samples, self.sweeps)
                self._accept(samples)
                if is_time:
                    self._flush()

    def rotate(self) -> None:
        """Begin new files: what was recorded so far is complete, and can be moved away.

        Raises
        ------
        OSError, RuntimeError, ValueError
            As `write`.
        """
        if self._closed:
            raise ValueError(f"{self.path}: this recording has ended")
        with self._lock():
            self._end_part()
            self._begin_part(self._part.run)

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
        samples = self._take_pending()
        if samples is not None:
            with self._counting_losses():
                self._part.add(samples, own=False)
        self._pending.clear()

    def _take_pending(self) -> Samples | None:
        """Return what waits: all of it, unless Ctrl-C ended an earlier attempt to write it; None if it is nothing."""
        if not self._pending:
            return None
        samples = self._pending.join()
        written = self.sweeps - self._pending.start
        if not written:
            return samples
        return replace(samples[written:], missed=0) if written < len(samples) else None

    @contextmanager
    def _counting_losses(self) -> Iterator[None]:
        """End the recording where what is done to it fails, with all that was written before."""
        try:
            yield
        except BaseException as error:
            self._closed = True
            self._part.end_here()
            if isinstance(error, OSError):
                self._pending.clear()
                kept = f"the recording ends after {self.sweeps} sweeps" + (", which can be read" if self.sweeps else "")
                lost = f"the last {self._accepted - self.sweeps} sweeps given to it are lost"
                where = str(error.filename or self.path)
                raise OSError(error.errno, f"{error.strerror or error}; {lost}; {kept}", where) from None
            raise

    def _new_part(self, number: int, run: int, before: Written) -> PartWriter:
        origin = {"recording": self._recording, "run": run, "part": number}
        return PartWriter(self.path, before, self._batch_bytes, self._options, origin)

    def _end_part(self) -> None:
        """End the part with what waits."""
        samples = self._take_pending()
        with self._counting_losses():
            self._part.end(samples)
        self._pending.clear()

    def _begin_part(self, run: int) -> None:
        """Go on in new files, of this run, behind a part that was ended."""
        number = self._part.number + self._part.has_files
        self._part = self._new_part(number, run, self._part.written)

    def _check(self, samples: Samples) -> bool:
        """Return whether these samples begin a run, because they are of other files than those before.

        Raise ValueError unless they can be written: of the same files, `Samples.concatenate` decides.
        """
        if not isinstance(samples, Samples):
            raise TypeError(f"samples is a {type(samples).__name__}; it must be Samples")
        if not samples.groups:
            raise ValueError(f"{self.path}: these samples are of no files: there is nothing to write")
        if len(samples) and self._last is not None and samples.time[0] < self._last:
            raise ValueError(f"{self.path}: these samples are older than those before: write them in the order of time")
        if self._first is None or samples.files != self._first.files:
            for group in samples.groups:  # now: they may wait, with others, for as long as they like
                Origin.of(samples, group).encode()
        if self._first is None:
            return False
        if differs := _find_difference(self._first, samples):
            raise ValueError(f"{self.path}: these samples are of other {differs} than those before: record them apart")
        if samples.files != self._first.files:
            return True
        failed = {error.file for error in samples.errors if not error.sweep}
        if len(samples) and not self._failed <= failed:
            ids = ", ".join(samples.files[index].id for index in sorted(self._failed - failed))
            raise ValueError(f"{self.path}: {ids} had failed and was read again: record these samples apart")
        return False

    def _is_over(self, samples: Samples) -> bool:
        """Whether the part, or what waits to begin it, is too old for these samples, or too large for any."""
        began = self._pending.began if self._part.began is None else self._part.began
        too_old = began is not None and len(samples) > 0 and int(samples.time[-1]) - began >= self._rotate[1] * 1e9
        return too_old or self._part.longest >= self._rotate[0]

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
            self._part.let_go()
            return
        with self._lock():
            self._closed = True
            if self._part.is_over and self._pending:  # an error ended it
                self._begin_part(self._part.run)
            if not self._part.is_over:
                self._end_part()

    def leave(self) -> None:
        """Write what would be lost with this object. Internal."""
        if self._pending or (not self._closed and self._part.has_tail):
            self.close()

    __del__ = leave

    def __repr__(self) -> str:
        waiting = f", {self.pending} more wait" if self.pending else ""
        return f"<Recorder {str(self.path)!r}: {self.sweeps} sweeps, {self.size} bytes{waiting}>"


_RECORDERS: WeakSet[Recorder] = WeakSet()


@atexit.register
def _leave_all() -> None:
    """Write what waits while imports work: without a GIL, what a module names goes when they no longer do."""
    with ExitStack() as each:  # one that fails keeps no other from being written
        for recorder in _RECORDERS:
            each.callback(recorder.leave)


def is_stream_name(name: str) -> bool:
    """Whether a file of this name in a recording's directory is one that a Recorder wrote."""
    return bool(_STREAM_NAME.fullmatch(name))


_STREAM_NAME = re.compile(r"(vm|vcpu)[0-9]*-[0-9]{5,}(\.tail)?\.arrows")


def _find_difference(before: Samples, after: Samples) -> str | None:
    """Name what may not change within a recording, and did; with other files, another run, more may."""
    names = ["host", "kernel"]
    if before.files == after.files:
        if [group.signature for group in before.groups] != [group.signature for group in after.groups]:
            return "statistics or kernels"
        names.append("interval")
    return next((name for name in names if getattr(before, name) != getattr(after, name)), None)
