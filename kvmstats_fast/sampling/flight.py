"""The flight recorder: out of all samples, those around what a condition finds; and one sweep a second of the rest."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.errors import unknown_name
from kvmstats_fast.file_info import group_files
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

_CONDITION = re.compile(
    r"(?P<name>[^<>\s]+)\s*(?P<side>[<>])\s*(?P<number>[0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(?P<unit>/s|%)?"
)


@dataclass(frozen=True)
class Condition:
    """Whether a statistic or figure is beyond a limit, in any VM or, `per_vcpu`, in any vCPU.

    Attributes
    ----------
    name : str
        A statistic: what counts up is taken as its rate from sweep to sweep, per second in base units, what does not as
        its value. Or a figure, which is worked out over each Samples that is judged.
    above : bool
        Whether it is to be above the limit, or below.
    limit : float
    per_vcpu : bool
    """

    name: str
    above: bool
    limit: float
    per_vcpu: bool

    @classmethod
    def parse(cls, text: str, *, per_vcpu: bool = False) -> Condition:
        """Return the condition that a text such as ``exits>50000/s`` or ``halted_fraction<5%`` states.

        Raises
        ------
        ValueError
            If it states none.
        """
        found = _CONDITION.fullmatch(text.strip())
        if not found:
            raise ValueError(f"{text!r} is not a condition such as 'exits>50000/s' or 'halted_fraction<5%'")
        limit = float(found["number"]) / (100 if found["unit"] == "%" else 1)
        return cls(found["name"], found["side"] == ">", limit, per_vcpu)

    def judge(self, samples: Samples) -> npt.NDArray[np.bool_]:
        """Return for each sweep whether the condition holds, bool (T,).

        Raises
        ------
        KeyError
            If there is no such statistic or figure.
        """
        holds = np.zeros(len(samples), np.bool_)
        if self.name in samples.names:
            for part in samples.split():
                if self.name in part.names and not part.stat(self.name).shape:
                    self._judge_statistic(part, holds)
            return holds
        figures = samples.figures(by="vcpu" if self.per_vcpu else "vm")
        if self.name not in figures:
            raise unknown_name("statistic or figure", self.name, [*samples.names, *figures], "these samples")
        holds[:] = self._is_beyond(figures[self.name].values).any()
        return holds

    def _judge_statistic(self, part: Samples, holds: npt.NDArray[np.bool_]) -> None:
        grows = part.stat(self.name).grows
        values = part.rate(self.name) if grows else part.si(self.name).astype(np.float64)
        if not self.per_vcpu:
            vms = group_files(part.files, "vm").values()
            values = np.stack([np.nansum(values[:, columns], axis=1) for columns in vms], axis=1)
        holds[len(holds) - len(values) :] |= self._is_beyond(values).any(axis=1)

    def _is_beyond(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        return values > self.limit if self.above else values < self.limit


class Flight:
    """Picks from Samples that are fed to it, in order, the sweeps around those for which a condition holds.

    In memory are no more than the samples that reach into the last `before` seconds.

    Parameters
    ----------
    condition : Condition
    before, after : float
        Seconds that are kept before the first and behind the last sweep for which it holds.
    """

    def __init__(self, condition: Condition, before: float, after: float) -> None:
        self._condition = condition
        self._before, self._after = round(before * 1e9), round(after * 1e9)
        self._waiting: deque[Samples] = deque()
        self._last: Samples | None = None
        self._until = -1

    def feed(self, samples: Samples) -> Iterator[Samples]:
        """Yield what is to be kept, of these samples and of those that waited."""
        if not len(samples):
            return
        times = samples.time[self._judge(samples)]
        self._waiting.append(samples)
        for part in list(self._waiting):
            yield from self._pick(part, times)
        if times.size:
            self._until = max(self._until, int(times[-1]) + self._after)
        self._forget(int(samples.time[-1]))

    def _judge(self, samples: Samples) -> npt.NDArray[np.bool_]:
        """Judge sweeps, the first by its change from the last one before, if that is of the same files."""
        before = self._last
        self._last = samples[-1:]
        if before is None or before.files != samples.files:
            return self._condition.judge(samples)
        return self._condition.judge(Samples.concatenate([before, samples]))[1:]

    def _pick(self, part: Samples, times: npt.NDArray[np.int64]) -> Iterator[Samples]:
        """Yield the stretches of a part that are wanted, and keep what is behind them, which may be wanted later."""
        time = part.time
        change = np.zeros(len(time) + 1, np.int64)
        np.add.at(change, np.searchsorted(time, times - self._before), 1)
        np.add.at(change, np.searchsorted(time, times + self._after, "right"), -1)
        wanted = (np.cumsum(change[:-1]) > 0) | (time <= self._until)
        self._waiting.popleft()
        edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            self._until = max(self._until, int(time[stop - 1]))
            yield part[start:stop]
        rest = part[int(edges[-1]) if edges.size else 0 :]
        if len(rest):
            self._waiting.append(rest)

    def _forget(self, now: int) -> None:
        while self._waiting and self._waiting[0].time[-1] < now - self._before:
            self._waiting.popleft()


class EachSecond:
    """Picks from Samples that are fed to it the last sweep of each second, as samples of an interval of 1 s."""

    def __init__(self) -> None:
        self._start: int | None = None
        self._held: Samples | None = None
        self._given = -1

    def feed(self, samples: Samples) -> Iterator[Samples]:
        """Yield sweeps of seconds that are over."""
        if not len(samples):
            return
        if self._start is None:
            self._start = int(samples.time[0])
        seconds = (samples.time - self._start) // 10**9
        if self._held is not None:
            held = int((self._held.time[0] - self._start) // 10**9)
            if held < seconds[0] or self._held.files != samples.files:
                yield from self._give(self._held, held)
        last = [*np.flatnonzero(np.diff(seconds)).tolist()]
        for index in last:
            yield from self._give(samples[index : index + 1], int(seconds[index]))
        self._held = samples[-1:]

    def end(self) -> Iterator[Samples]:
        """Yield the last sweep of the last second."""
        if self._held is not None and self._start is not None:
            yield from self._give(self._held, int((self._held.time[0] - self._start) // 10**9))
            self._held = None

    def _give(self, sweep: Samples, second: int) -> Iterator[Samples]:
        if second > self._given:
            missed = second - self._given - 1
            self._given = second
            yield replace(sweep, interval=1.0, tick=np.array([second], np.uint64), missed=missed, overruns=0)
