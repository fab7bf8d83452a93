"""What different settings of ``halt_poll_ns`` would have made of the halts of a run."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._text import format_number, format_table
from kvmstats_fast.analysis.whole_run import WholeRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from kvmstats_fast.analysis.histogram import Histogram
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.samples import Samples

_HISTOGRAMS = ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")


@dataclass(frozen=True, slots=True, eq=False)
class HaltPollAdvice:
    """What different settings of ``halt_poll_ns`` would have made of the halts of a run; ``print(advice)`` is a table.

    Attributes
    ----------
    rows : numpy.ndarray
        Structured, one row a setting: ``halt_poll_ns`` (int64, ns), and float64 bounds of three fractions.
        ``caught_low`` and ``caught_high``: of all halts, those that polling would have caught. ``poll_low`` and
        ``poll_high``: of the vCPUs' time, what polling would have taken. ``vain_low`` and ``vain_high``: of their time,
        what polling that caught nothing would have taken.
    halts : int
        How many halts the run had.
    caught, poll : float
        The fraction of halts that polling caught, and of the vCPUs' time that it took, as it was set. NaN without a
        halt or without time; `poll` also where ``halt_poll_success_ns`` and ``halt_poll_fail_ns`` were not sampled.
    """

    rows: npt.NDArray[np.void]
    halts: int
    caught: float
    poll: float

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("halt_poll_ns", "catches", "polls", "of it in vain")]
        for row in self.rows.tolist():
            setting, *bounds = row
            pairs = zip(bounds[::2], bounds[1::2], strict=True)
            percent = ((format_number(100 * low, ".1f"), format_number(100 * high, ".1f")) for low, high in pairs)
            table.append((f"{setting}", *(f"{low} to {high} %" for low, high in percent)))
        caught, poll = format_number(100 * self.caught, ".1f"), format_number(100 * self.poll, ".2f")
        first = (
            f"{self.halts} halts; as it was set, polling caught {caught} % of them and took {poll} % of the vCPUs' time"
        )
        return first + "\n" + format_table(table, "<>><")


#: In ns; 0 is off. ``KVM_HALT_POLL_NS_DEFAULT`` is 200000 on x86, 500000 on arm64 and riscv.
_SETTINGS = (0, 10_000, 25_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000)


def halt_poll_advice(samples: Samples, settings: Iterable[int] | None = None) -> HaltPollAdvice | None:
    """Return what settings of ``halt_poll_ns`` would have done; see `Samples.halt_poll_advice`."""
    try:
        settings = [operator.index(setting) for setting in (_SETTINGS if settings is None else settings)]
    except TypeError:
        raise TypeError(f"settings is {settings!r}; it must be whole numbers of ns") from None
    if not settings or min(settings) < 0 or max(settings) >= 1 << 63:
        raise ValueError(f"settings is {settings}; it must be one or more numbers of ns, each from 0 to 2**63 - 1")
    run = WholeRun(samples, "vcpu")
    kernels = [(part, columns) for part, columns in run.kernels if set(part.names).issuperset(_HISTOGRAMS)]
    if not kernels:
        return None
    elapsed = sum(float(np.nansum(run.seconds[columns])) for _, columns in kernels) * 1e9 or np.nan
    histograms = [tuple(part.histogram(name).sum() for name in _HISTOGRAMS) for part, _ in kernels]
    polls_caught = sum(int(success.count) for success, _, _ in histograms)
    halts = polls_caught + sum(int(wait.count) for _, _, wait in histograms)
    rows = np.zeros(len(settings), [("halt_poll_ns", np.int64), *((name, np.float64) for name in _BOUNDS)])
    rows["halt_poll_ns"] = settings
    for row in rows:
        caught, cost = np.zeros(2), np.zeros(2)
        limit = int(row["halt_poll_ns"])
        for counts, low, high in itertools.chain.from_iterable(_durations(*kernel) for kernel in histograms):
            # A halt of less than the limit is caught, and costs what it takes; any other costs the limit.
            caught += (counts[high <= limit].sum(), counts[low < limit].sum())
            cost += (counts @ np.minimum(low, limit), counts @ np.minimum(high, limit))
        vain = (halts - caught[::-1]) * limit
        parts = (caught / halts if halts else caught * np.nan, cost / elapsed, vain / elapsed)
        for name, value in zip(_BOUNDS, np.concatenate(parts), strict=True):
            row[name] = value
    totals = [hist.total for success, fail, _ in histograms for hist in (success, fail)]
    polled = np.nan if None in totals else sum(totals)
    return HaltPollAdvice(
        rows,
        halts,
        polls_caught / halts if halts else np.nan,
        polled * 1e9 / elapsed,
    )


_BOUNDS = ("caught_low", "caught_high", "poll_low", "poll_high", "vain_low", "vain_high")


def _durations(success: Histogram, fail: Histogram, wait: Histogram) -> Iterator[tuple[Values, Values, Values]]:
    """Yield counts of halts, and the bounds in ns of how long each took from its first poll to its wake-up.

    A halt that polling caught took as long as the poll. Any other took its poll, if it had one, and its wait; which
    poll went with which wait is not recorded, only the bounds of all polls.
    """
    # Whole ns add up exactly, seconds do not; powers of two come back as what they were.
    edges, poll_edges, wait_edges = (hist.edges * 1e9 for hist in (success, fail, wait))
    yield success.counts.astype(np.float64), edges[:-1], edges[1:]
    polls = np.flatnonzero(fail.counts)
    least = poll_edges[polls[0]] if polls.size and fail.count >= wait.count else 0.0
    most = poll_edges[polls[-1] + 1] if polls.size else 0.0
    yield wait.counts.astype(np.float64), wait_edges[:-1] + least, wait_edges[1:] + most
