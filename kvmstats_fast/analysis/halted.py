"""How long vCPUs were halted in sweeps that come batch by batch, as `time_between` has it of all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast import series

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.stat import Stat

    Seconds = npt.NDArray[np.float64]


class Halted:
    """The halts of some vCPUs of one kernel.

    What a halt counts when it ends may reach back to before the first sweep, and what is under way at the last is
    counted by none. Both are known only when all sweeps of a stretch have been seen.

    Parameters
    ----------
    stat : Stat
        Of what counts halts.
    files : int
    """

    def __init__(self, stat: Stat, files: int) -> None:
        self._stat = stat
        self._files, self._start = files, 0
        self._done = np.zeros(files)
        self._clear()

    def begin(self, time: int) -> None:
        """Begin a stretch at a sweep, which follows nothing."""
        self._done, self._start = self.seconds, time
        self._clear()

    def _clear(self) -> None:
        self._counted, self._before = np.zeros(self._files), np.zeros(self._files)
        self._has_ended = np.zeros(self._files, np.bool_)
        self._until, self._awake, self._ended = np.zeros(self._files), np.zeros(self._files), np.zeros(self._files)
        self._is_under_way = np.zeros(self._files, np.bool_)

    def add(
        self,
        time: npt.NDArray[np.int64],
        halts: npt.NDArray[np.uint64],
        blocking: npt.NDArray[np.uint64] | None,
        ends: npt.NDArray[np.intp],
    ) -> None:
        """Add sweeps, (T,) and (T, n), of which the first was added before unless it begins the stretch.

        Those of each file mean something up to its end, an index.
        """
        seconds = (time - self._start) / 1e9
        (deltas,) = series.deltas([self._stat], [halts])
        changes = self._stat.scale_array(deltas)
        changes[np.arange(1, len(time))[:, None] >= ends] = 0
        read = np.flatnonzero(ends > 0)
        last = ends[read] - 1
        has_changed = (changes != 0).any(axis=0)
        for file in np.flatnonzero(has_changed & ~self._has_ended).tolist():
            first = int(np.flatnonzero(changes[:, file])[0])
            self._before[file] = max(changes[first, file] - seconds[first + 1], 0)
        self._has_ended |= has_changed
        self._counted += changes.sum(axis=0)
        # A halt under way began no earlier than the sweep before the last that saw one end, or one that saw none.
        for file in np.flatnonzero(has_changed).tolist():
            self._ended[file] = seconds[np.flatnonzero(changes[:, file])[-1]]
        self._until[read] = seconds[last]
        if blocking is not None:
            self._is_under_way[read] = blocking[last, read] != 0
            for file, stop in zip(read.tolist(), last.tolist(), strict=True):
                awake = np.flatnonzero(blocking[: stop + 1, file] == 0)
                if awake.size:
                    self._awake[file] = seconds[awake[-1]]

    @property
    def seconds(self) -> Seconds:
        """Return how long each was halted, in all stretches, (n,)."""
        under_way = np.where(self._is_under_way, self._until - np.maximum(self._awake, self._ended), 0)
        total: Seconds = self._done + np.maximum(self._counted - self._before + under_way, 0)
        return total
