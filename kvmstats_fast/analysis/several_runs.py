"""What each file did over several runs, so that figures and advice follow from all of them as from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmstats_fast.analysis.halt_poll import HaltPollAdvice, Halts, advise, gather_halts
from kvmstats_fast.analysis.tally import Tally

if TYPE_CHECKING:
    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.samples import Samples


class SeveralRuns:
    """Takes runs one after the other, and says what follows from all of them.

    A vCPU is the same in two runs if its host, VM and number are, also in another process: what it counted is added up,
    and so is the time.
    """

    def __init__(self) -> None:
        self._tally = Tally()
        self._halts: list[Halts] = []
        self._hosts: set[str] = set()

    def add(self, samples: Samples) -> None:
        """Take a run, which is later than those before."""
        self._tally.add(samples, follows=False)
        self._tally.end_run()
        self._halts += gather_halts(samples)
        self._hosts.add(samples.host)

    def figures(self, by: str) -> Figures:
        """Return what `Samples.figures` does, of all runs; there must be one."""
        return self._tally.figures(by)

    def halt_poll_advice(self) -> HaltPollAdvice | None:
        """Return what `Samples.halt_poll_advice` does, of all runs."""
        return advise(self._halts, self._hosts)
