"""Samples step by step in one allocation, each let go of when it has been copied there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.groups import Columns


class Whole:
    """Samples that follow each other, joined as they come; of one alone nothing is copied.

    Parameters
    ----------
    stored : int
        Bytes that all of them take in their files. Of them those of the first are known to be so many sweeps; so is
        guessed how many there will be. Room that is not used costs no memory.
    """

    def __init__(self, stored: int) -> None:
        self._stored, self._taken = stored, 0
        self._heads: list[Samples] = []
        self._groups: tuple[Columns, ...] = ()
        self._arrays: list[list[npt.NDArray[np.uint64]]] = []
        self._sweeps = self._room = 0

    def __bool__(self) -> bool:
        return bool(self._heads)

    def add(self, samples: Samples, stored: int) -> None:
        """Add samples, which take so many bytes in their files; ValueError if they are of other statistics."""
        groups = cast("tuple[Columns, ...]", samples.groups)
        self._taken += stored
        if not self._heads:
            self._groups, self._room = groups, len(samples)
            self._arrays = [list(group.arrays) for group in groups]
        elif [group.signature for group in groups] != [group.signature for group in self._groups]:
            raise ValueError("its parts are of different statistics")
        else:
            stop = self._sweeps + len(samples)
            if stop > self._room:
                self._grow(stop)
            for arrays, group in zip(self._arrays, groups, strict=True):
                for array, values in zip(arrays, group.arrays, strict=True):
                    array[self._sweeps : stop] = values
        self._sweeps += len(samples)
        self._heads.append(replace(samples, groups=()))

    def _grow(self, sweeps: int) -> None:
        """Make room for what there will be, at least so many sweeps, one statistic after the other."""
        expected = sweeps * self._stored // max(self._taken, 1)
        self._room = max(sweeps, expected + expected // 64, self._room + self._room // 4)
        self._groups = tuple(replace(group, arrays=()) for group in self._groups)
        for arrays in self._arrays:
            for place, array in enumerate(arrays):
                arrays[place] = np.empty((self._room, *array.shape[1:]), np.uint64)
                arrays[place][: self._sweeps] = array[: self._sweeps]
                del array

    def join(self) -> Samples | None:
        """Return all of them, None if there were none; ValueError if `Samples.concatenate` refuses them."""
        if not self._heads:
            return None
        whole = Samples.concatenate(self._heads)
        for arrays in self._arrays:
            for array in arrays:
                if len(array) > self._sweeps:
                    array.resize((self._sweeps, *array.shape[1:]), refcheck=False)
        groups = zip(self._groups, self._arrays, strict=True)
        return replace(whole, groups=tuple(replace(group, arrays=tuple(arrays)) for group, arrays in groups))
