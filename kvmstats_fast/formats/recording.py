"""Recordings: what a Recorder wrote, read batch by batch or as a whole."""

from __future__ import annotations

import errno
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast.errors import KvmStatsError, RecordingWarning, Retold, warn_caller
from kvmstats_fast.formats import need
from kvmstats_fast.formats.recorded_run import RecordedRun
from kvmstats_fast.formats.steps import STEP_BYTES
from kvmstats_fast.formats.stream_file import StreamFile
from kvmstats_fast.formats.wanted import ALWAYS, Step, Wanted, check_order
from kvmstats_fast.formats.whole import Whole
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.origin import Origin
    from kvmstats_fast.selection import Selection
    from kvmstats_fast.spans import Span

_MOST_NAMED = 4


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
        below = sorted({str(one.parent) for one in path.glob("*/*.arrows")})
        named = ", ".join([*below[:_MOST_NAMED], *(["..."] if len(below) > _MOST_NAMED else [])])
        hint = f"; there are recordings below it, of which to name one: {named}" if below else ""
        raise KvmStatsError(f"{path}: not a recording: there is no .arrows file in it{hint}")
    return found


class Recording:
    """A recording on disk: iterate over it for Samples, batch by batch, or `load` it as a whole.

    Parameters
    ----------
    path : path-like
        The directory that a `Recorder` made, or one of its files.

    Attributes
    ----------
    files : tuple of FileInfo
        The files of all runs: a recorder that is given samples of other files begins another run in the same recording.
    host, kernel : str
        Where it was recorded: host name, and release and machine of the kernel.
    version : str
        Version of kvmstats_fast that wrote it.
    recording : str
        A random id, shared by the files of a recording.
    interval : float
        Seconds between ticks, in the first run.
    wall_offset : int
        ns to add to the samples' `time` for CLOCK_REALTIME, at the first sweep; `Samples.wall_time` knows of later
        changes.
    runs : list of RecordedRun
        Internal.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    KvmStatsError, FormatError
        If it is not a recording, or of a format that this version does not read. Also while it is read: the message
        names the file, and the field or column that is wrong.
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
        files, refused = [], []
        for one in find_files(self.path):
            try:
                files.append(StreamFile(one))
            except KvmStatsError as error:  # noqa: PERF203 - of one file
                refused.append(error)
            except FileNotFoundError:  # deleted since the directory was listed
                if not self.path.is_dir():
                    raise
        self._refused = [str(error) for error in refused]
        try:
            if not files:
                raise refused[0] if refused else FileNotFoundError(errno.ENOENT, "there is no recording", str(path))
        finally:
            refused.clear()  # their tracebacks have this frame, and what was opened, which would stay open
        first = min(files, key=lambda file: file.origin.part).origin
        self._check_origins(files, first)
        runs: dict[int, list[StreamFile]] = {}
        for file in files:
            runs.setdefault(file.origin.run, []).append(file)
        self.runs = [RecordedRun(of_run) for _, of_run in sorted(runs.items())]
        self._check_runs()
        self.files: tuple[FileInfo, ...] = tuple(dict.fromkeys(info for run in self.runs for info in run.files))
        self.host, self.kernel, self.version = first.host, first.kernel, first.version
        self.recording, self.interval, self.wall_offset = first.recording, first.interval, first.wall_offset

    def _check_origins(self, files: Iterable[StreamFile], first: Origin) -> None:
        """Raise KvmStatsError if the files of this directory are not of one recording."""
        for file in files:
            if file.origin.recording != first.recording:
                raise KvmStatsError(
                    f"{self.path}: these are files of different recordings: give each a directory of its own"
                )
            for name in ("host", "kernel"):
                if getattr(file.origin, name) != getattr(first, name):
                    raise KvmStatsError(
                        f"{file.path}: kvmstats.{name} is damaged: it differs from that of the other files"
                    )

    def _check_runs(self) -> None:
        """Raise KvmStatsError unless the parts of each run follow those of the run before."""
        for before, after in pairwise(self.runs):
            if before.numbers[-1] >= after.numbers[0]:
                raise KvmStatsError(
                    f"{self.path}: kvmstats.run is damaged: part {after.numbers[0]} is of run {after.first.run}, part "
                    f"{before.numbers[-1]} of run {before.first.run}"
                )

    def __repr__(self) -> str:
        return f"<Recording {str(self.path)!r}>"

    def __iter__(self) -> Iterator[Samples]:
        """Give the batches in turn; their arrays are the file's memory where it is not compressed."""
        return (step.samples for _, step in self._read_all(0, in_place=True))

    def read(self, size: int) -> Iterator[Samples]:
        """Yield the batches in turn, small ones put together until their values take `size` bytes."""
        return (step.samples for _, step in self._read_all(size, in_place=False))

    def read_runs(self, size: int) -> Iterator[tuple[int, Step]]:
        """Give the batches, as `read` does, with the number of the run.

        KvmStatsError if there is no whole batch, or if one cannot follow that before.
        """
        empty = True
        for run, pairs in groupby(self._read_all(size, in_place=False), key=itemgetter(0)):
            for step in check_order((step for _, step in pairs), self.path):
                empty = False
                yield run, step
        if empty:
            raise KvmStatsError(f"{self.path}: there is no whole batch in this recording")

    def _read_all(self, size: int, *, in_place: bool, wanted: Wanted | None = None) -> Iterator[tuple[int, Step]]:
        """Give what is wanted of all runs, by their numbers."""
        lost = [f"{error}; it was left out" for error in self._refused]
        seen: list[int] = []
        for run in self.runs:
            for step in run.read(wanted or Wanted(), size, lost, seen, in_place=in_place):
                yield run.first.run, step
        self._warn(lost, seen, self.runs)

    def read_run(self, run: RecordedRun, wanted: Wanted, size: int) -> Iterator[Step]:
        """Give what is wanted of one run, and warn of what is missing of it."""
        lost = [f"{error}; it was left out" for error in self._refused if run is self.runs[0]]
        seen: list[int] = []
        yield from run.read(wanted, size, lost, seen, in_place=False)
        self._warn(lost, seen, [run])

    def _warn(self, lost: list[str], seen: Sequence[int], runs: Sequence[RecordedRun]) -> None:
        """Warn of what is missing of runs that follow each other."""
        if self.path.is_dir():
            before = [run.numbers[-1] for run in self.runs[: self.runs.index(runs[0])]]
            lost[:0] = _name_gaps(seen, before[-1] if before else -1, runs[-1].numbers[-1])
            kinds_gone = sorted({kind for run in runs for kind in run.kinds_gone})
            if kinds_gone and not self._refused:
                lost.append(f"the file of kind {', '.join(kinds_gone)} is missing")
        if lost:
            text = f"{self.path}: not all of this recording could be read: {'; '.join(lost)}"
            warn_caller(text, RecordingWarning)

    def load(self) -> Samples:
        """Return all of it as one Samples; a single uncompressed batch is not copied. See `Samples.load`.

        Raises
        ------
        MemoryError
            If it does not fit into memory: iterate over it instead.
        KvmStatsError
            If it has no whole batch; or if it has several runs, each of other stats files: iterate over it, or see
            `open_recordings`.
        """
        return self.load_some(None, ALWAYS)

    def load_some(self, selection: Selection | None, span: Span) -> Samples:
        """Return what is selected as one Samples. Internal: `Samples.load` is what users call."""
        if len(self.runs) > 1:
            raise KvmStatsError(
                f"{self.path}: its {len(self.runs)} runs are of different stats files and do not make one Samples: "
                "iterate over it, or read it with kvmstats_fast.open_recordings"
            )
        (run,) = self.runs
        names = None
        if selection is not None:
            selection.check(run.files, run.names, str(self.path))
            names = frozenset(selection.find_stats(run.names))
        began = run.began() if span.is_relative else None
        wanted = Wanted(names, span=span, since=0 if began is None else int(began.time[0]))
        pool = need("pyarrow", "arrow").default_memory_pool()
        whole = Whole(run.size)
        # A single batch stays where it is; more are copied once, each let go of as soon as that is done.
        for _, step in self._read_all(STEP_BYTES, in_place=run.has_one_batch(), wanted=wanted):
            if whole and not step.follows:
                raise ValueError(
                    f"{self.path}: the wall clock was set back, so that these samples pass this time more than once: "
                    "give seconds from the start"
                )
            with self._calling_it_damaged():
                whole.add(step.samples, step.stored)
            del step
            pool.release_unused()  # it would keep what batches were read and decompressed to
        with self._calling_it_damaged():
            joined = whole.join()
        if joined is not None:
            return joined
        for step in run.read(Wanted(names), 0, [], [], in_place=True):
            return step.samples[:0]
        raise KvmStatsError(f"{self.path}: there is no whole batch in this recording")

    def _calling_it_damaged(self) -> Retold:
        return Retold(ValueError, lambda error: KvmStatsError(f"{self.path}: this recording is damaged: {error}"))


def read_runs(source: Samples | Recording | str | os.PathLike[str]) -> Iterator[tuple[int, Step]]:
    """Give Samples, or those of a recording in steps of some megabytes, with the number of the run.

    KvmStatsError as `Recording.read_runs`.
    """
    if isinstance(source, Samples):
        return iter([(0, Step(source, 0, follows=False))])
    recording = source if isinstance(source, Recording) else Recording(source)
    return recording.read_runs(STEP_BYTES)


def read_batches(source: Samples | Recording | str | os.PathLike[str]) -> Iterator[Samples]:
    """Give the Samples of `read_runs`."""
    return (step.samples for _, step in read_runs(source))


def _name_gaps(seen: Sequence[int], before: int, last: int) -> list[str]:
    """Name the parts behind `before`, and up to `last`, that are not there."""
    gaps = [(one + 1, other - 1) for one, other in pairwise([before, *seen, last + 1]) if other - one > 1]
    if not gaps:
        return []
    named = [str(low) if low == high else f"{low} to {high}" for low, high in gaps]
    one = len(gaps) == 1 and gaps[0][0] == gaps[0][1]
    return [f"{'part' if one else 'parts'} {', '.join(named)} {'is' if one else 'are'} missing"]
