"""One run of a recording as it is read: its parts in turn, the batches of all kinds of a part together."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.steps import to_samples_joined
from kvmstats_fast.formats.stream_file import StreamFile
from kvmstats_fast.formats.wanted import Step, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.steps import Batch
    from kvmstats_fast.samples import Samples

#: A recorder that goes on may put another tail in the place of one that is being opened, file by file.
_ATTEMPTS = 5
#: Only when the sweeps were.
_NO_STATS = Wanted(frozenset())


class RecordedRun:
    """The sweeps of one set of stats files.

    Parameters
    ----------
    files : list of StreamFile
        All that are of this run.

    Attributes
    ----------
    files : tuple of FileInfo
        Of all that were sampled, those whose values are here: one stream alone has those of one kind.
    indices : tuple of int
        Of these in `Origin.files`.
    parts : dict
        The streams by part, without those of tails.
    tails : dict
        Those of tails.
    kinds_gone : list of str
        Kinds of which no stream is here.
    """

    def __init__(self, files: Sequence[StreamFile]) -> None:
        self.parts: dict[int, list[StreamFile]] = {}
        self.tails: dict[int, list[StreamFile]] = {}
        for file in sorted(files, key=lambda file: file.origin.columns):  # the order in which they were sampled
            places = self.parts if file.origin.tail is None else self.tails
            places.setdefault(file.origin.part, []).append(file)
        self.first = min(files, key=lambda file: (file.origin.part, file.origin.columns)).origin
        kept = self._check_origins()
        self.indices = tuple(sorted(kept))
        self.files: tuple[FileInfo, ...] = tuple(self.first.files[index] for index in self.indices)
        self.kinds_gone = sorted({info.kind for index, info in enumerate(self.first.files) if index not in kept})

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of its parts, ascending."""
        return sorted({*self.parts, *self.tails})

    @property
    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(file.size for file in self.streams)

    def _check_origins(self) -> set[int]:
        """Return which files' values are here; KvmStatsError if the streams do not belong together."""
        kept: set[int] = set()
        for files in (*self.parts.values(), *self.tails.values()):
            here: set[int] = set()
            for file in files:
                for name in ("files", "interval"):
                    if getattr(file.origin, name) != getattr(self.first, name):
                        raise KvmStatsError(
                            f"{file.path}: kvmstats.{name} is damaged: it differs from that of the other files"
                        )
                if not here.isdisjoint(file.origin.columns):
                    raise KvmStatsError(f"{file.path}: kvmstats.columns overlaps that of another file of its part")
                here.update(file.origin.columns)
            kept |= here
        return kept

    def find_stay(self, number: int) -> list[StreamFile]:
        """Return the streams of a part, those that were begun since the recording was opened too."""
        found = list(self.parts.get(number, []))
        for tail in self.tails.get(number, ()):
            path = tail.path.with_name(tail.path.name.replace(".tail.", "."))
            if path != tail.path and all(path != file.path for file in found):
                with suppress(FileNotFoundError, KvmStatsError):  # not yet begun
                    found.append(StreamFile(path))
        return sorted(found, key=lambda file: file.origin.columns)

    def has_one_batch(self) -> bool:
        """Whether there is no second batch."""
        files = [file for files in self.parts.values() for file in files]
        with suppress(FileNotFoundError):
            return len(self.parts) == 1 and not self.tails and all(file.has_one_batch() for file in files)
        return False

    @property
    def streams(self) -> list[StreamFile]:
        """Return all streams, in the order of the parts."""
        places = (place.get(number, []) for number in self.numbers for place in (self.parts, self.tails))
        return [file for files in places for file in files]

    @property
    def names(self) -> list[str]:
        """Return the names of the statistics that were sampled, each once."""
        return list(dict.fromkeys(stat.name for file in self.streams for stat in file.stats))

    def began(self) -> Samples | None:
        """Return the first sweep, without values; None if there is none."""
        for file in self.streams:
            with suppress(FileNotFoundError):
                for batch in file.read(_NO_STATS, [], in_place=True):
                    samples = to_samples_joined([batch], [], file.origin)
                    if len(samples):
                        return samples[:1]
        return None

    def read(self, wanted: Wanted, size: int, lost: list[str], seen: list[int], *, in_place: bool) -> Iterator[Step]:
        """Give what is wanted, at least `size` bytes of values at once, but the last ones.

        What cannot be read is added to `lost`, and the numbers of the parts that were read to `seen`.
        """
        return wanted.take(_RunReader(self, wanted, size, lost, in_place=in_place).read(seen))


class _RunReader:
    """Reads a run once."""

    def __init__(self, run: RecordedRun, wanted: Wanted, size: int, lost: list[str], *, in_place: bool) -> None:
        self._run, self._wanted, self._size, self._lost, self._in_place = run, wanted, size, lost, in_place
        self._kept = sorted({index for file in self._choose(run.streams) for index in file.origin.columns})
        self._follows = True
        self._sweeps = 0  # of the part that were read or passed over

    def _choose(self, files: Iterable[StreamFile]) -> list[StreamFile]:
        return [file for file in files if self._wanted.has_any(file.origin, file.stats)]

    def read(self, seen: list[int]) -> Iterator[Step]:
        """Give the parts in turn."""
        for number in self._run.numbers:
            # The tail first: what is moved out of it later is moved to a file that is not yet open.
            tail = self._open_tail(self._choose(self._run.tails.get(number, [])))
            stay = self._open(self._choose(self._run.find_stay(number)))
            if stay or tail:
                seen.append(number)
                yield from self._read_part(number, stay, tail)

    def _open(self, files: Iterable[StreamFile]) -> dict[StreamFile, Iterator[Batch]]:
        """Return those of the streams that are there, with their batches."""
        opened = {}
        for file in files:
            with suppress(FileNotFoundError):  # deleted since the recording was opened
                opened[file] = file.read(self._wanted, self._lost, in_place=self._in_place)
        return opened

    def _open_tail(self, files: Sequence[StreamFile]) -> dict[StreamFile, Iterator[Batch]]:
        """Return the streams of a tail as it is now, with their batches, all of the same tail if that can be had."""
        opened: dict[StreamFile, Iterator[Batch]] = {}
        for _ in range(_ATTEMPTS):
            opened = {}
            for file in files:
                with suppress(FileNotFoundError, KvmStatsError):  # it was removed, and another is being begun
                    opened |= self._open([StreamFile(file.path)])
            if len(opened) in (0, len(files)) and len({file.origin.tail for file in opened}) <= 1:
                break
        return opened

    def _read_part(
        self, number: int, stay: dict[StreamFile, Iterator[Batch]], tail: dict[StreamFile, Iterator[Batch]]
    ) -> Iterator[Step]:
        start = max((file.origin.tail or 0 for file in tail), default=None)
        self._sweeps = 0
        if not self._gone(stay):
            yield from self._join_kinds(stay, tail_start=start)
            if start is not None and self._sweeps < start:
                missing = start - self._sweeps
                self._lost.append(f"of part {number}, {missing} sweeps before those in its tail are missing")
        elif start != 0:  # else there was none to write to it
            self._lost.append(self._name_missing(number, stay))
        if start is None or self._sweeps > start:
            return  # what was in the tail is among the others now
        if not self._gone(tail):
            yield from self._join_kinds(tail)
        else:
            self._lost.append(self._name_missing(number, tail))

    def _gone(self, there: Iterable[StreamFile]) -> list[str]:
        """Return of which kinds a stream is missing."""
        here = {index for file in there for index in file.origin.columns}
        return sorted({self._run.first.files[index].kind for index in self._kept if index not in here})

    def _name_missing(self, number: int, there: Iterable[StreamFile]) -> str:
        text = f"part {number} has no file of kind {_join(self._gone(there))}"
        paths = _join(file.path for file in there)
        return f"{text}; {paths}, of the same sweeps, was left out and can be read by itself" if paths else text

    def _join_kinds(self, there: dict[StreamFile, Iterator[Batch]], *, tail_start: int | None = None) -> Iterator[Step]:
        """Put the batches of the kinds together, which were sampled together, and those that follow each other."""
        files = list(there)
        waiting: list[list[Batch]] = []
        waiting_size = 0
        for batches in self._read_together(there, tail_start):
            is_wanted = batches[0].records is not None
            for batch in batches:
                if (batch.records is not None) != is_wanted:
                    raise KvmStatsError(f"{batch.source}: column 'time' is not that of the other kinds")
            if is_wanted:
                waiting.append(batches)
                waiting_size += sum(batch.size for batch in batches)
            if waiting and (not is_wanted or waiting_size >= self._size):
                yield from self._to_samples(files, waiting)
                waiting, waiting_size = [], 0
            self._follows &= is_wanted
        if waiting:
            yield from self._to_samples(files, waiting)

    def _read_together(self, there: dict[StreamFile, Iterator[Batch]], tail_start: int | None) -> Iterator[list[Batch]]:
        """Give the batches that all kinds have; where a tail starts behind them, what one has beyond them is in it."""
        while True:
            read = {file: next(batches, None) for file, batches in there.items()}
            present = [batch for batch in read.values() if batch is not None]
            if len(present) < len(read):
                break
            self._sweeps += present[0].happened["sweeps"]
            yield present
        if present:
            if self._sweeps != tail_start:
                ahead = _join(file.path for file, batch in read.items() if batch is not None)
                self._lost.append(
                    f"{ahead} has batches after the end of the other kind's file, which were left out: it can be read "
                    "by itself"
                )
            for batches in there.values():
                for _ in batches:
                    pass  # so that what is lost of each is told

    def _to_samples(self, files: Sequence[StreamFile], waiting: list[list[Batch]]) -> Iterator[Step]:
        """Give batches of all files as one; one by one where they do not go together, or where one is damaged."""
        try:
            kinds = [
                to_samples_joined(
                    batches, [file.stats[index] for index in self._wanted.choose(file.stats)], file.origin
                )
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
            yield Step(whole, sum(batch.stored for batches in waiting for batch in batches), self._follows)
            self._follows = True
            return
        for batches in waiting:
            yield from self._to_samples(files, [batches])


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
