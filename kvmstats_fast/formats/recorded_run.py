"""One run of a recording as it is read: its parts in turn, the batches of all kinds of a part together."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.steps import to_samples_joined
from kvmstats_fast.formats.stream_file import StreamFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.steps import Batch
    from kvmstats_fast.samples import Samples

#: A recorder that goes on may put another tail in the place of one that is being opened, file by file.
_ATTEMPTS = 5


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
        self._kept = sorted(kept)
        self.files: tuple[FileInfo, ...] = tuple(self.first.files[index] for index in self._kept)
        self.kinds_gone = sorted({info.kind for index, info in enumerate(self.first.files) if index not in kept})

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of its parts, ascending."""
        return sorted({*self.parts, *self.tails})

    @property
    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(file.size for places in (self.parts, self.tails) for files in places.values() for file in files)

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

    def has_one_batch(self) -> bool:
        """Whether there is no second batch."""
        files = [file for files in self.parts.values() for file in files]
        with suppress(FileNotFoundError):
            return len(self.parts) == 1 and not self.tails and all(file.has_one_batch() for file in files)
        return False

    def read(self, size: int, lost: list[str], seen: list[int], *, in_place: bool) -> Iterator[tuple[Samples, int]]:
        """Give Samples of at least `size` bytes of values, but the last ones, and how many bytes they take in files.

        What cannot be read is added to `lost`, and the numbers of the parts that were read to `seen`.
        """
        for number in self.numbers:
            # The tail first: what is moved out of it later is moved to a file that is not yet open.
            tail = self._open_tail(self.tails.get(number, []), lost, in_place=in_place)
            stay = _open(self._find_stay(number), lost, in_place=in_place)
            if stay or tail:
                seen.append(number)
                yield from self._read_part(number, stay, tail, size, lost)

    def _open_tail(
        self, files: Sequence[StreamFile], lost: list[str], *, in_place: bool
    ) -> dict[StreamFile, Iterator[Batch]]:
        """Return the streams of a tail as it is now, with their batches, all of the same tail if that can be had."""
        opened: dict[StreamFile, Iterator[Batch]] = {}
        for _ in range(_ATTEMPTS):
            opened = {}
            for file in files:
                with suppress(FileNotFoundError, KvmStatsError):  # it was removed, and another is being begun
                    opened |= _open([StreamFile(file.path)], lost, in_place=in_place)
            if len(opened) in (0, len(files)) and len({file.origin.tail for file in opened}) <= 1:
                break
        return opened

    def _find_stay(self, number: int) -> list[StreamFile]:
        """Return the streams of a part, those that were begun since the recording was opened too."""
        found = list(self.parts.get(number, []))
        for tail in self.tails.get(number, ()):
            path = tail.path.with_name(tail.path.name.replace(".tail.", "."))
            if path != tail.path and all(path != file.path for file in found):
                with suppress(FileNotFoundError, KvmStatsError):  # not yet begun
                    found.append(StreamFile(path))
        return sorted(found, key=lambda file: file.origin.columns)

    def _read_part(
        self,
        number: int,
        stay: dict[StreamFile, Iterator[Batch]],
        tail: dict[StreamFile, Iterator[Batch]],
        size: int,
        lost: list[str],
    ) -> Iterator[tuple[Samples, int]]:
        start = max((file.origin.tail or 0 for file in tail), default=None)
        sweeps = 0
        if self._has_all_kinds(stay):
            for samples, stored in self._join_kinds(stay, size, lost, tail_start=start):
                sweeps += len(samples)
                yield samples, stored
            if start is not None and sweeps < start:
                lost.append(f"of part {number}, {start - sweeps} sweeps before those in its tail are missing")
        elif start != 0:  # else there was none to write to it
            lost.append(self._name_missing(number, stay))
        if start is None or sweeps > start:
            return  # what was in the tail is among the others now
        if self._has_all_kinds(tail):
            yield from self._join_kinds(tail, size, lost)
        else:
            lost.append(self._name_missing(number, tail))

    def _gone(self, there: Iterable[StreamFile]) -> set[str]:
        here = {index for file in there for index in file.origin.columns}
        return {info.kind for index, info in zip(self._kept, self.files, strict=True) if index not in here}

    def _has_all_kinds(self, there: Iterable[StreamFile]) -> bool:
        return not self._gone(there)

    def _name_missing(self, number: int, there: Sequence[StreamFile] | dict[StreamFile, Iterator[Batch]]) -> str:
        text = f"part {number} has no file of kind {_join(sorted(self._gone(there)))}"
        if not there:
            return text
        left_out = f"{_join(file.path for file in there)}, of the same sweeps, was left out and can be read by itself"
        return f"{text}; {left_out}"

    def _join_kinds(
        self,
        there: dict[StreamFile, Iterator[Batch]],
        size: int,
        lost: list[str],
        *,
        tail_start: int | None = None,
    ) -> Iterator[tuple[Samples, int]]:
        """Put the batches of the kinds together, which were sampled together, and those that follow each other.

        Where a tail starts behind them, what one kind has beyond them is in it.
        """
        files = list(there)
        waiting: list[list[Batch]] = []
        waiting_size = sweeps = 0
        while True:
            read = {file: next(batches, None) for file, batches in there.items()}
            present = [batch for batch in read.values() if batch is not None]
            if len(present) < len(read):
                break
            waiting.append(present)
            waiting_size += sum(batch.size for batch in present)
            sweeps += present[0].happened["sweeps"]
            if waiting_size >= size:
                yield from self._to_samples(files, waiting)
                waiting, waiting_size = [], 0
        if waiting:
            yield from self._to_samples(files, waiting)
        if present:
            if sweeps != tail_start:
                ahead = _join(file.path for file, batch in read.items() if batch is not None)
                lost.append(
                    f"{ahead} has batches after the end of the other kind's file, which were left out: it can be read "
                    "by itself"
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


def _open(files: Iterable[StreamFile], lost: list[str], *, in_place: bool) -> dict[StreamFile, Iterator[Batch]]:
    """Return those of the streams that are there, with their batches."""
    opened = {}
    for file in files:
        with suppress(FileNotFoundError):  # deleted since the recording was opened
            opened[file] = file.read(lost, in_place=in_place)
    return opened


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
