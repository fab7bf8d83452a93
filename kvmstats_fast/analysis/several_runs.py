"""What each file did over several runs, so that figures and advice follow from all of them as from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.analysis.halt_poll import HISTOGRAMS, HaltPollAdvice, Halts, advise
from kvmstats_fast.analysis.histogram import Histogram, adder_of, adds_up
from kvmstats_fast.analysis.tally import Tally

if TYPE_CHECKING:
    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.tally import KernelCounts
    from kvmstats_fast.samples import Samples


class SeveralRuns:
    """Takes runs one after the other, each in one piece or in several, and says what follows from all of them.

    A vCPU is the same in two runs if its host, VM and number are, also in another process: what it counted is added up,
    and so is the time.
    """

    def __init__(self) -> None:
        self._tally = Tally()
        self._halts: list[Halts] = []
        self._hosts: set[str] = set()

    def add(self, samples: Samples) -> None:
        """Take a run, which is later than those before."""
        self.add_step(samples, follows=False)
        self.end_run()

    def add_step(self, samples: Samples, *, follows: bool) -> None:
        """Take samples of a run, which `follows` those before them or come after a gap of which nothing is known."""
        self._tally.add(samples, follows=follows)
        self._hosts.add(samples.host)

    def end_run(self) -> list[KernelCounts]:
        """Have what is added next be another run; return what this one counted."""
        counts = self._tally.last_run()
        self._tally.end_run()
        self._halts += [_halts(one) for one in counts if one.files[0].kind == "vcpu" and one.stats.keys() >= _NEEDED]
        return counts

    def figures(self, by: str) -> Figures:
        """Return what `Samples.figures` does, of all runs; there must be one."""
        return self._tally.figures(by)

    def halt_poll_advice(self) -> HaltPollAdvice | None:
        """Return what `Samples.halt_poll_advice` does, of all runs."""
        return advise(self._halts, self._hosts)


_NEEDED = frozenset(HISTOGRAMS)


def _halts(counts: KernelCounts) -> Halts:
    return Halts(tuple(_histogram(counts, name).sum() for name in HISTOGRAMS), float(np.nansum(counts.seconds)))


def _histogram(counts: KernelCounts, name: str) -> Histogram:
    stat, adder = counts.stats[name], counts.stats.get(adder_of(name))
    total = counts.change[adder.name].astype(np.uint64) if adder is not None and adds_up(adder, stat) else None
    return Histogram(stat, counts.change[name].astype(np.uint64), total, counts.files)
