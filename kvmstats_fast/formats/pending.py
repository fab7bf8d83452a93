"""Samples that wait to be written: small ones are put together, because each batch has a price of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmstats_fast.groups import join_groups
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmstats_fast.groups import Group


def bytes_per_sweep(groups: Sequence[Group]) -> int:
    """Return how many bytes the values of one sweep take."""
    return 8 * sum(len(group.columns) * group.words for group in groups)


def bytes_of(samples: Samples) -> int:
    """Return how many bytes the values of samples take."""
    return len(samples) * bytes_per_sweep(samples.groups)


def cut_sweeps(samples: Samples, edges: Iterable[int]) -> Iterator[Samples]:
    """Cut samples at ascending sweeps, and lose nothing that they say.

    What they say of ticks that were missed is said of the first piece; of failures behind the last sweep, of the last.
    """
    behind = tuple(error for error in samples.errors if error.sweep >= len(samples))
    for start, stop in pairwise((0, *edges, len(samples))):
        part = samples[start:stop]
        part.missed, part.overruns = (0, 0) if start else (samples.missed, samples.overruns)
        if start and stop == len(samples):
            part.errors += tuple(error._replace(sweep=error.sweep - start) for error in behind)
        yield part


class Pending:
    """Copies of Samples that follow each other, until there are enough of them for a batch.

    Parameters
    ----------
    seconds : float
        They are enough when they cover so many seconds, or the first was added so long ago.
    size : int
        Or when their values take so many bytes.
    own : int
        Samples whose values take so many bytes by themselves need not wait at all.

    Attributes
    ----------
    start : int
        How many sweeps had been written before the first of them was added.
    sweeps : int
        How many there are.
    """

    def __init__(self, seconds: float, size: int, own: int) -> None:
        self._ns, self._size, self._own = seconds * 1e9, size, own
        self._parts: list[Samples] = []
        self._since = 0  # when the first was added
        self.start = self.sweeps = 0

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def began(self) -> int | None:
        """Return the time of the first sweep; None if there is none."""
        return next((int(part.time[0]) for part in self._parts if len(part)), None)

    def is_enough(self, samples: Samples) -> bool:
        """Whether these are enough for a batch by themselves, and need not be copied."""
        return bytes_of(samples) >= self._own

    def add(self, samples: Samples, written: int) -> bool:
        """Add a copy, which later changes of the caller's arrays do not reach; return whether they are enough now.

        So many sweeps were `written` before.
        """
        part = replace(
            samples,
            groups=tuple(join_groups([group]) for group in samples.groups),
            time=samples.time.copy(),
            sweep_ns=samples.sweep_ns.copy(),
            tick=samples.tick.copy(),
        )
        now = time.monotonic_ns()
        if not self._parts:
            self._since, self.start = now, written
        self._parts.append(part)
        self.sweeps += len(part)
        age = now - self._since
        if len(part) and self.began is not None:
            age = max(age, int(part.time[-1]) - self.began)
        return age >= self._ns or self.sweeps * bytes_per_sweep(part.groups) >= self._size

    def join(self) -> Samples:
        """Return them as one."""
        return Samples.concatenate(self._parts)

    def clear(self) -> None:
        """Forget them: they are written, or lost."""
        self._parts, self.sweeps = [], 0
