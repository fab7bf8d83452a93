"""Recordings: what a Recorder wrote, read batch by batch or as a whole."""

from __future__ import annotations

import errno
import sys
import warnings
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.errors import KvmStatsError, RecordingWarning
from kvmstats_fast.formats import need
from kvmstats_fast.formats.steps import STEP_BYTES, to_samples_joined
from kvmstats_fast.formats.stream_file import StreamFile
from kvmstats_fast.formats.whole import Whole
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.formats.steps import Batch

_PACKAGE = str(Path(__file__).parents[1])


def _warn(text: str) -> None:
    """Warn at the line that called into the package."""
    level, frame = 1, sys._getframe()  # noqa: SLF001 - public in spite of its name
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RecordingWarning, level)


def find_files(path: Path) -> list[Path]:
    """Return the files of a recording, or the one file that `path` is."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no recording", str(path))
    if path.suffix == ".npz":
        raise KvmStatsError(f"{path}: an .npz file is not a recording: read it with Samples.load")
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if one.suffix == ".arrows")
    if not found:
        raise KvmStatsError(f"{path}: not a recording: there is no .arrows file in it")
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
        A random id, which the files of a recording share.
    interval : float
        Seconds between ticks.
    wall_offset : int
        ns to add to the samples' `time` for CLOCK_REALTIME, at the first sweep; `Samples.wall_time` knows of later
        changes.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    KvmStatsError, FormatError
        If it is not a recording, or one that this version does not read. Also while it is read: the message names the
        file, and the field or column that is wrong.
    OSError
        If the kernel refuses to open one of its files.

    Warns
    -----
    RecordingWarning
        Once, when all has been read, if something is missing: a file, a part, the end of a file. Everything else is
        read.

    Notes
    -----
    Arrow streams have no checksum: bytes that changed on the disk are noticed only if they contradict others, or
    cannot be decompressed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: dict[int, list[StreamFile]] = {}
        refused = []
        for one in find_files(self.path):
            try:
                file = StreamFile(one)
            except KvmStatsError as error:  # noqa: PERF203 - of one file
                refused.append(error)
            except FileNotFoundError:  # deleted since the directory was listed
                if not self.path.is_dir():
                    raise
            else:
                self._parts.setdefault(file.origin.part, []).append(file)
        if not self._parts:
            raise refused[0] if refused else FileNotFoundError(errno.ENOENT, "there is no recording", str(path))
        self._refused = [str(error) for error in refused]
        for files in self._parts.values():
            files.sort(key=lambda file: file.origin.columns)  # the order in which they were sampled
        first = min(self._parts.items())[1][0].origin
        kept = self._check_origins(first)
        self._kept = sorted(kept)
        #: Of all files that were recorded, those whose values are here: one stream alone has those of one kind.
        self.files: tuple[FileInfo, ...] = tuple(first.files[index] for index in self._kept)
        self._kinds_gone = sorted({info.kind for index, info in enumerate(first.files) if index not in kept})
        self.host, self.kernel, self.version = first.host, first.kernel, first.version
        self.recording, self.interval, self.wall_offset = first.recording, first.interval, first.wall_offset

    def _check_origins(self, first: Origin) -> set[int]:
        """Return which files' values are here; KvmStatsError if the files of this directory do not belong together."""
        kept: set[int] = set()
        for files in self._parts.values():
            here: set[int] = set()
            for file in files:
                origin = file.origin
                if origin.recording != first.recording:
                    raise KvmStatsError(
                        f"{self.path}: these are files of different recordings: give each a directory of its own"
                    )
                for name in ("files", "host", "kernel", "interval"):
                    if getattr(origin, name) != getattr(first, name):
                        raise KvmStatsError(
                            f"{file.path}: kvmstats.{name} is damaged: it differs from that of the other files"
                        )
                if not here.isdisjoint(origin.columns):
                    raise KvmStatsError(f"{file.path}: kvmstats.columns overlaps that of another file of its part")
                here.update(origin.columns)
            kept |= here
        return kept

    def __repr__(self) -> str:
        return f"<Recording {str(self.path)!r}>"

    def __iter__(self) -> Iterator[Samples]:
        """Give the batches in turn; their arrays are the file's memory where it is not compressed."""
        return (samples for samples, _ in self._read(0, in_place=True))

    def read(self, size: int) -> Iterator[Samples]:
        """Give the batches in turn, small ones put together until their values take `size` bytes."""
        return (samples for samples, _ in self._read(size, in_place=False))

    def _read(self, size: int, *, in_place: bool) -> Iterator[tuple[Samples, int]]:
        """Give Samples, and how many bytes they take in their files."""
        lost = [f"{error}; it was left out" for error in self._refused]
        seen = []
        for number, files in sorted(self._parts.items()):
            there = {}
            for file in files:
                with suppress(FileNotFoundError):  # deleted since the recording was opened
                    there[file] = file.read(lost, in_place=in_place)
            if not there:
                continue
            seen.append(number)
            here = {index for file in there for index in file.origin.columns}
            if gone := {info.kind for index, info in zip(self._kept, self.files, strict=True) if index not in here}:
                lost.append(
                    f"part {number} has no file of kind {_join(gone)}; {_join(file.path for file in there)}, of the "
                    "same sweeps, was left out and can be read by itself"
                )
                continue
            yield from self._join_kinds(there, size, lost)
        if self.path.is_dir():
            lost[:0] = _name_gaps(seen, max(self._parts))
            if self._kinds_gone and not self._refused:
                lost.append(f"the file of kind {_join(self._kinds_gone)} is missing")
        if lost:
            _warn(f"{self.path}: not all of this recording could be read: {'; '.join(lost)}")

    def _join_kinds(
        self, there: dict[StreamFile, Iterator[Batch]], size: int, lost: list[str]
    ) -> Iterator[tuple[Samples, int]]:
        """Put the batches of the kinds together, which were sampled together, and those that follow each other."""
        files = list(there)
        waiting: list[list[Batch]] = []
        waiting_size = 0
        while True:
            read = {file: next(batches, None) for file, batches in there.items()}
            present = [batch for batch in read.values() if batch is not None]
            if len(present) < len(read):
                break
            waiting.append(present)
            waiting_size += sum(batch.size for batch in present)
            if waiting_size >= size:
                yield from self._to_samples(files, waiting)
                waiting, waiting_size = [], 0
        if waiting:
            yield from self._to_samples(files, waiting)
        if present:
            ahead = _join(file.path for file, batch in read.items() if batch is not None)
            lost.append(
                f"{ahead} has batches after the end of the other kind's file, which were left out: it can be read by "
                "itself"
            )
            for batches in there.values():
                for _ in batches:
                    pass  # so that what is lost of each is told

    def _to_samples(self, files: Sequence[StreamFile], waiting: list[list[Batch]]) -> Iterator[tuple[Samples, int]]:
        """Give batches of all files as one; one by one where they do not go together, or where one is damaged."""
        try:
            kinds = [
                to_samples_joined(batches, file.stats, file.origin)
                for file, batches in zip(files, zip(*waiting, strict=True), strict=True)
            ]
            _check_same_sweeps(files, kinds)
            for batches in waiting:
                _check_same_happened(files, batches)
        except KvmStatsError:
            if len(waiting) == 1:
                raise
        else:
            whole = kinds[0].restrict([group for samples in kinds for group in samples.groups], self._kept)
            yield whole, sum(batch.stored for batches in waiting for batch in batches)
            return
        for batches in waiting:
            yield from self._to_samples(files, [batches])

    def load(self) -> Samples:
        """Return all of it as one Samples; of a single uncompressed batch without a copy.

        Raises
        ------
        MemoryError
            If it does not fit: iterate over it instead.
        KvmStatsError
            If there is no whole batch in it.
        """
        pool = need("pyarrow", "arrow").default_memory_pool()
        whole = Whole(sum(file.size for part in self._parts.values() for file in part))
        # A single batch stays where it is; more are copied once, each let go of as soon as that is done.
        for samples, stored in self._read(STEP_BYTES, in_place=self._has_one_batch()):
            with self._calling_it_damaged():
                whole.add(samples, stored)
            del samples
            pool.release_unused()  # it would keep what batches were read and decompressed to
        with self._calling_it_damaged():
            joined = whole.join()
        if joined is None:
            raise KvmStatsError(f"{self.path}: there is no whole batch in this recording")
        return joined

    def _has_one_batch(self) -> bool:
        with suppress(FileNotFoundError):
            return len(self._parts) == 1 and all(file.has_one_batch() for part in self._parts.values() for file in part)
        return False

    @contextmanager
    def _calling_it_damaged(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise KvmStatsError(f"{self.path}: this recording is damaged: {error}") from error


def read_batches(source: Samples | Recording | str | os.PathLike[str], size: int = STEP_BYTES) -> Iterator[Samples]:
    """Give Samples, or those of a recording in steps of about `size` bytes; KvmStatsError if it has none."""
    if isinstance(source, Samples):
        yield source
        return
    recording = source if isinstance(source, Recording) else Recording(source)
    empty = True
    for samples in recording.read(size):
        empty = False
        yield samples
    if empty:
        raise KvmStatsError(f"{recording.path}: there is no whole batch in this recording")


def _check_same_sweeps(files: Sequence[StreamFile], kinds: Sequence[Samples]) -> None:
    """Raise KvmStatsError unless samples of several kinds say the same of when they were taken."""
    for file, samples in zip(files, kinds, strict=True):
        for name in ("time", "tick", "sweep_ns"):
            if not np.array_equal(getattr(samples, name), getattr(kinds[0], name)):
                raise KvmStatsError(
                    f"{file.path}: column {name!r} is not that of the other kinds: not of the same sweeps"
                )


def _check_same_happened(files: Sequence[StreamFile], batches: Sequence[Batch]) -> None:
    """Raise KvmStatsError unless batches of several kinds say the same of how they were sampled."""
    for file, batch in zip(files, batches, strict=True):
        for name, value in batch.happened.items():
            if name != "rowless" and value != batches[0].happened[name]:
                raise KvmStatsError(f"{file.path}: kvmstats.{name} of a batch is not that of the other kinds")


def _join(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def _name_gaps(seen: Sequence[int], last: int) -> list[str]:
    """Name the parts before `last` that are not there."""
    gaps = [(before + 1, after - 1) for before, after in pairwise([-1, *seen, last + 1]) if after - before > 1]
    if not gaps:
        return []
    named = [str(low) if low == high else f"{low} to {high}" for low, high in gaps]
    one = len(gaps) == 1 and gaps[0][0] == gaps[0][1]
    return [f"{'part' if one else 'parts'} {', '.join(named)} {'is' if one else 'are'} missing"]
