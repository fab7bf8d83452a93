"""One part of a recording as it is written: large batches, and the tail, small ones that will be written as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmstats_fast.formats.pending import bytes_of
from kvmstats_fast.formats.stream_writer import Options, StreamWriter, Written
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from pathlib import Path


class PartWriter:
    """The files of a part: those that stay, and those of its tail.

    Each batch has a price, and zstd finds little to save in a small one. What is written little by little therefore
    goes to the tail first, which has files of its own; when its values take `batch_bytes` they are written again as one
    batch, behind the others, and the tail is removed. The tail says how many sweeps were before it (`Origin.tail`): a
    reader that finds more there knows that the tail is among them. So nothing is lost or read twice, wherever a kill
    comes in between.

    Parameters
    ----------
    directory : Path
    before : Written
        What the parts before it have.
    batch_bytes : int
        0: without a tail.
    options : Options
    origin : dict
        Fields of `Origin` that samples do not know: recording, run, part.

    Attributes
    ----------
    run, number : int
    began : int or None
        Time of its first sweep.
    is_over : bool
        Whether its files have been ended.
    """

    def __init__(
        self, directory: Path, before: Written, batch_bytes: int, options: Options, origin: dict[str, Any]
    ) -> None:
        self.run, self.number = origin["run"], origin["part"]
        self.began: int | None = None
        self.is_over = False
        self._directory, self._options, self._batch_bytes = directory, options, batch_bytes
        self._before, self._origin = before, origin
        self._stay: StreamWriter | None = None
        self._tail: StreamWriter | None = None
        self._tail_start = 0
        self._held: list[Samples] = []  # what the tail has

    @property
    def written(self) -> Written:
        """Return what this part and those before it have."""
        stay = self._stay.written if self._stay else Written()
        tail = self._tail.written if self._tail else Written()
        if self._tail_start < stay.sweeps or not tail.size:  # what the tail had is among the others now
            tail = Written()
        return Written(self._before.sweeps + stay.sweeps + tail.sweeps, self._before.size + stay.size + tail.size)

    @property
    def has_files(self) -> bool:
        """Return whether anything was written."""
        return self.written != self._before

    @property
    def has_tail(self) -> bool:
        """Return whether there is something to be written again."""
        return bool(self._held)

    @property
    def longest(self) -> int:
        """Return the bytes of the largest file that stays."""
        return self._stay.longest if self._stay else 0

    def add(self, samples: Samples, *, own: bool) -> None:
        """Write samples: as a batch of their `own`, or with others, for which their arrays are kept."""
        self._begin(samples)
        if own:
            self._merge([])
            self._append(samples)
        elif sum(map(bytes_of, (*self._held, samples))) >= self._batch_bytes:
            self._merge([samples])
        else:
            if self._tail is None:
                self._tail_start = self._stay.written.sweeps if self._stay else 0
                self._tail = self._open(f"-{self.number:05}.tail", samples, tail=self._tail_start)
            self._tail.append(samples)
            self._held.append(samples)

    def _begin(self, samples: Samples) -> None:
        if self.began is None and len(samples):
            self.began = int(samples.time[0])

    def _open(self, name: str, samples: Samples, tail: int | None) -> StreamWriter:
        return StreamWriter(self._directory, name, samples, self._options, **self._origin, tail=tail)

    def _append(self, samples: Samples) -> None:
        """Write a batch that stays."""
        if self._stay is None:
            self._stay = self._open(f"-{self.number:05}", samples, tail=None)
        self._stay.append(samples)

    def _merge(self, more: list[Samples]) -> None:
        """Write what the tail has, and more, as a batch that stays; remove the tail."""
        parts = [*self._held, *more]
        self._held = []  # if this fails, the tail stays on the disk as it is
        if parts:
            whole = Samples.concatenate(parts)
            del parts
            self._append(whole)
            self._drop_tail()

    def _drop_tail(self) -> None:
        if self._tail is not None:
            self._tail.remove()
        self._tail = None

    def end(self, samples: Samples | None = None) -> None:
        """Write the last samples, and end the files."""
        if samples is not None:
            self._begin(samples)
        self._merge([] if samples is None else [samples])
        self.is_over = True
        if self._stay is not None:
            self._stay.end()

    def end_here(self) -> None:
        """End the files as they are, after an error: what is in the tail stays there, unless it is among the others."""
        self.is_over, self._held = True, []
        if self._stay is not None:
            self._stay.stop()
            if self._tail is not None and self._tail_start < self._stay.written.sweeps:
                self._tail.remove()
        if self._tail is not None:
            self._tail.stop()

    def let_go(self) -> None:
        """Close the files: in a forked child."""
        self.is_over, self._held = True, []
        for streams in (self._stay, self._tail):
            if streams is not None:
                streams.let_go()
