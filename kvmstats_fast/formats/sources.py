"""Runs wherever they were written to: recordings and Parquet data sets, found by path, and read in the same way."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._arguments import article
from kvmstats_fast.errors import KvmStatsError, RecordingWarning, warn_caller
from kvmstats_fast.formats.parquet_file import ParquetFile
from kvmstats_fast.formats.recording import Recording
from kvmstats_fast.formats.wanted import Step, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.formats.recorded_run import RecordedRun
    from kvmstats_fast.formats.stream_file import StreamFile

_NO_STATS = Wanted(frozenset())


class Source(ABC):
    """One run: the sweeps of one set of stats files, wherever they are.

    Attributes
    ----------
    path : Path
        Of the recording, or the first file, for messages.
    origin : Origin
    files : tuple of FileInfo
        Those of `origin` whose values are here.
    indices : tuple of int
        Of `files` in those of `origin`.
    began : int or None
        When the first sweep was: ns of the wall clock. None if there is none.
    """

    path: Path
    origin: Origin
    files: tuple[FileInfo, ...]
    indices: tuple[int, ...]
    began: int | None

    @abstractmethod
    def streams(self) -> Sequence[StreamFile | ParquetFile]:
        """Return the files that it is read from."""

    @abstractmethod
    def read(self, wanted: Wanted, size: int) -> Iterator[Step]:
        """Give what is wanted, at least `size` bytes of values at once where that is possible.

        Warns of what is missing, when all has been read.
        """

    def names_of(self, files: frozenset[int]) -> list[str]:
        """Return the names of the statistics of files, by their indices in those of `origin`."""
        having = (stream for stream in self.streams() if not files.isdisjoint(stream.origin.columns))
        return list(dict.fromkeys(stat.name for stream in having for stat in stream.stats))


class RecordedSource(Source):
    """A run of a recording."""

    def __init__(self, recording: Recording, run: RecordedRun) -> None:
        self._recording, self._run = recording, run
        self.path, self.origin, self.files = recording.path, run.first, run.files
        self.indices = run.indices
        first = run.began()
        self.began = None if first is None else int(first.wall_time[0])

    def streams(self) -> Sequence[StreamFile]:
        """Return the streams of all parts."""
        return self._run.streams

    def read(self, wanted: Wanted, size: int) -> Iterator[Step]:
        """Give the batches, small ones put together."""
        return self._recording.read_run(self._run, wanted, size)


class ParquetSource(Source):
    """What a data set has of one kind of files of a run."""

    def __init__(self, files: Sequence[ParquetFile]) -> None:
        self._files = sorted(files, key=lambda file: (file.first_tick, file.path))
        first = self._files[0]
        self.path, self.origin = first.path, first.origin
        for file in self._files:
            for name in ("files", "columns", "host", "kernel", "interval"):
                if getattr(file.origin, name) != getattr(self.origin, name):
                    raise KvmStatsError(
                        f"{file.path}: kvmstats.{name} is damaged: it is not that of {first.path}, of the same run"
                    )
        self.indices = self.origin.columns
        self.files = tuple(self.origin.files[index] for index in self.indices)
        sweeps = (samples for file in self._files for samples in file.read(_NO_STATS) if samples is not None)
        self.began = next((int(samples.wall_time[0]) for samples in sweeps if len(samples)), None)

    def streams(self) -> Sequence[ParquetFile]:
        """Return the files."""
        return self._files

    def read(self, wanted: Wanted, size: int) -> Iterator[Step]:  # noqa: ARG002 - row groups are large enough
        """Give the row groups."""
        return wanted.take(self._read(wanted))

    def _read(self, wanted: Wanted) -> Iterator[Step]:
        follows, gone = True, []
        for file in self._files:
            try:
                groups = file.read(wanted)
            except FileNotFoundError:
                gone.append(file.path)
                continue
            for samples in groups:
                if samples is None:
                    follows = False
                    continue
                yield Step(samples, 0, follows)
                follows = True
        if gone:
            paths = ", ".join(map(str, gone))
            warn_caller(f"{paths}: deleted since the data set was opened; the rest was read", RecordingWarning)


def find_sources(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Return the runs at these paths, in the order of time; see `open_recordings`."""
    sources: list[Source] = []
    parquet: dict[tuple[object, ...], list[ParquetFile]] = {}
    seen: dict[Path, None] = {}
    for path in _expand(paths):
        for one in _find(path):
            seen.setdefault(one)
    for path in seen:
        if path.suffix == ".parquet":
            file = ParquetFile(path)
            origin = file.origin
            key = (origin.recording, origin.run, origin.kind, origin.host, origin.stats)
            parquet.setdefault(key, []).append(file)
        else:
            recording = Recording(path)
            sources += [RecordedSource(recording, run) for run in recording.runs]
    sources += map(ParquetSource, parquet.values())
    _check_different(sources)
    return sorted(sources, key=lambda source: (source.began is None, source.began or 0, source.origin.host))


def _expand(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Give the paths that were named, or that a glob fits."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    elif not isinstance(paths, Iterable):
        raise TypeError(f"paths is {article(paths)}; it must be a path or glob, or several")
    named = list(paths)
    if not named:
        raise ValueError("paths is empty: name a recording, a data set, or a glob")
    for one in named:
        if not isinstance(one, (str, os.PathLike)):
            raise TypeError(f"paths has {article(one)}; it must be a path or glob, or several")
        if isinstance(one, str) and has_magic(one) and not Path(one).exists():
            found = sorted(glob(one, recursive=True))  # noqa: PTH207 - of a path from anywhere
            if not found:
                raise FileNotFoundError(errno.ENOENT, "no recording has a name like this", one)
            yield from map(Path, found)
        else:
            yield Path(one)


def _find(path: Path) -> list[Path]:
    """Return the recordings, by directory, and the Parquet files at a path or anywhere below it."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no recording", str(path))
    if path.suffix == ".npz":
        raise KvmStatsError(f"{path}: an .npz file is not a recording: read it with Samples.load")
    if not path.is_dir():
        return [path]
    found = []
    for directory, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(directory)
        if any(name.endswith(".arrows") for name in names):
            found.append(here)
        found += [here / name for name in sorted(names) if name.endswith(".parquet") and not name.startswith(".")]
    if not found:
        raise KvmStatsError(f"{path}: there is no recording in it, and no Parquet file")
    return found


def _check_different(sources: Iterable[Source]) -> None:
    """Raise KvmStatsError if a run is there twice: all that was counted in it would be."""
    there: dict[tuple[object, ...], Source] = {}
    for source in sources:
        origin = source.origin
        for index in source.indices if origin.recording else ():
            other = there.setdefault((origin.recording, origin.run, origin.host, origin.files[index]), source)
            if other is not source:
                raise KvmStatsError(
                    f"{other.path} and {source.path} have the same run, of recording {origin.recording}: name one"
                )
