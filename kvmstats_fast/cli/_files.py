"""What FILE may be: a recording, a Parquet data set, an .npz, or captured stats files; each gives runs."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast.cli._captures import is_capture, read_capture
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.sources import find_sources
from kvmstats_fast.formats.steps import STEP_BYTES
from kvmstats_fast.formats.wanted import Step, Wanted, check_order
from kvmstats_fast.joining import join_kinds
from kvmstats_fast.samples import Samples
from kvmstats_fast.selection import Selection, take_files

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.sources import Source

EVERYTHING = Selection(None, None, None, None, None)
#: What a capture is not asked for.
HAS_NO_RATE = "a capture is one reading, which has no rate"


class Run(ABC):
    """The sweeps of one set of stats files, of which a part is in memory at a time.

    Attributes
    ----------
    path : Path
    files : tuple of FileInfo
    began : int or None
        When the first sweep was: ns of the wall clock. None if there is none.
    is_capture : bool
        Whether it is one reading, see `read_capture`.
    """

    path: Path
    files: tuple[FileInfo, ...]
    began: int | None
    is_capture = False

    @abstractmethod
    def names(self, selection: Selection = EVERYTHING) -> list[str]:
        """Return the names of the statistics of the files that are selected."""

    @abstractmethod
    def read(self, selection: Selection = EVERYTHING) -> Iterator[Step]:
        """Give what is selected; nothing if nothing is. Where nothing is missing a step `follows` the one before."""

    def identity(self) -> object:
        """Return what two kinds of files of one run have in common; None if there is no other."""
        return None


class _Stored(Run):
    def __init__(self, source: Source) -> None:
        self.path, self.files, self.began, self._source = source.path, source.files, source.began, source

    def _choose(self, selection: Selection) -> frozenset[int]:
        return frozenset(self._source.indices[index] for index in selection.find_files(self.files))

    def names(self, selection: Selection = EVERYTHING) -> list[str]:
        return self._source.names_of(self._choose(selection))

    def read(self, selection: Selection = EVERYTHING) -> Iterator[Step]:
        names = frozenset(selection.find_stats(self.names(selection)))
        if not names:
            return
        wanted_files = frozenset(self.files[index] for index in selection.find_files(self.files))
        steps = self._source.read(Wanted(names, self._choose(selection)), STEP_BYTES)
        for step in check_order(steps, self.path):
            files = step.samples.files
            kept = [index for index, info in enumerate(files) if info in wanted_files]
            yield step._replace(samples=take_files(step.samples, kept))

    def identity(self) -> object:
        return self._source.origin.identity


class _InMemory(Run):
    def __init__(self, path: Path, samples: Samples, *, is_capture: bool) -> None:
        self.path, self.files, self._samples, self.is_capture = path, samples.files, samples, is_capture
        self.began = int(samples.wall_time[0]) if len(samples) else None

    def names(self, selection: Selection = EVERYTHING) -> list[str]:
        return [*replace(selection, names=None).take(self._samples).names]

    def read(self, selection: Selection = EVERYTHING) -> Iterator[Step]:
        chosen = selection.take(self._samples)
        if chosen.files and len(chosen):
            yield Step(chosen, 0, follows=True)


def choose(arguments: argparse.Namespace) -> Selection:
    """Return what the command line chooses of files: with -e, -g and --vcpu."""
    return Selection.of(tuple(arguments.event or ()), arguments.guest, arguments.vcpu, None, None)


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Return the runs in files, in the order of time.

    Raises
    ------
    OSError, KvmStatsError
        If a file is not there, is none of these, or has a run that another has, too, or another reading of a VM.
    """
    runs: list[Run] = []
    stored = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            if not has_magic(name):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
            stored.append(name)  # whose error is about what it fits
        elif path.suffix == ".npz" and not path.is_dir():
            runs.append(_InMemory(path, Samples.load(path), is_capture=False))
        elif is_capture(path):
            runs.append(_InMemory(path, read_capture(path), is_capture=True))
        elif all(folder.is_dir() and any(folder.iterdir()) for folder in (path / "full", path / "overview")):
            raise KvmStatsError(
                f"{name}: a flight recorder's two recordings of the same time do not add up: name {path / 'full'}, "
                f"which has all sweeps around what was found, or {path / 'overview'}, one a second"
            )
        else:
            stored.append(name)
    _check_captures(runs)
    runs += map(_Stored, find_sources(stored) if stored else ())
    return sorted(runs, key=lambda run: (run.began is None, run.began or 0))


def _check_captures(runs: Iterable[Run]) -> None:
    """Raise KvmStatsError if a VM or vCPU was captured twice: what it counted would count twice."""
    there: dict[FileInfo, Run] = {}
    for run in runs:
        for info in run.files if run.is_capture else ():
            if (other := there.setdefault(info, run)) is not run:
                raise KvmStatsError(f"{other.path} and {run.path} are two readings of {info}: name one")


def check_selection(runs: Sequence[Run], selection: Selection, what: str) -> None:
    """Raise KeyError for a condition that no file of any run fulfils, or a name that fits none of the names."""
    files = [info for run in runs for info in run.files]
    names = dict.fromkeys(name for run in runs for name in run.names(selection))
    selection.check(files, [*names], what)


def load_runs(path: str, selection: Selection = EVERYTHING) -> list[Samples]:
    """Return the runs in a file, each as a whole; KeyError if nothing is selected of any.

    The kinds of files of a run, which a data set keeps apart, are one again.
    """
    found: dict[object, list[Samples]] = {}
    runs = open_runs([path])
    check_selection(runs, selection, path)
    for number, run in enumerate(runs):
        if parts := [step.samples for step in run.read(selection)]:
            found.setdefault(run.identity() or number, []).append(Samples.concatenate(parts))
    if not found:
        raise KvmStatsError(f"{path}: there is no sweep in it")
    return [join_kinds(kinds) for kinds in found.values()]


def check_no_capture(runs: Iterable[Run], option: str) -> None:
    """Raise ValueError for an option that takes time to have passed."""
    for run in runs:
        if run.is_capture:
            raise ValueError(f"{run.path}: {HAS_NO_RATE}: {option} does not go with it")
