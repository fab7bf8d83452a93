"""What different settings of ``halt_poll_ns`` would have made of the halts of a run."""

from __future__ import annotations

import itertools
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmstats_fast._arguments import check_fraction
from kvmstats_fast._text import format_html, format_number, format_table, plain_number
from kvmstats_fast.formats import need
from kvmstats_fast.spans import read_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvmstats_fast.analysis.histogram import Histogram
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.samples import Samples

#: What the advice follows from.
HISTOGRAMS = ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")


@dataclass(frozen=True, slots=True, eq=False)
class HaltPollAdvice:
    """What other settings of ``halt_poll_ns`` would have caught and cost in a run; ``print(advice)`` prints a table.

    Attributes
    ----------
    rows : numpy.ndarray
        Structured, one row per setting: ``halt_poll_ns`` (int64, ns), and float64 bounds of three fractions.
        ``caught_low`` and ``caught_high``: the halts that polling would have caught, of all halts. ``poll_low`` and
        ``poll_high``: the time that polling would have taken, of the vCPUs' time. ``vain_low`` and ``vain_high``: the
        part of that time that would have caught nothing, of the vCPUs' time.
    halts : int
        Number of halts in the run.
    caught, poll : float
        The fraction of halts that polling caught, and of the vCPUs' time that it took, with the actual setting. NaN
        without halts or time; `poll` also if ``halt_poll_success_ns`` and ``halt_poll_fail_ns`` were not sampled.
    most_vain : float
        The largest fraction of the vCPUs' time that `best` may poll in vain.
    present : int or None
        The host's current ``halt_poll_ns``; None if the samples are of another host, or it cannot be read. A VMM may
        have set another value for its VM (``KVM_CAP_HALT_POLL``).
    """

    rows: npt.NDArray[np.void]
    halts: int
    caught: float
    poll: float
    most_vain: float = 0.01
    present: int | None = None

    @property
    def best(self) -> int | None:
        """The setting that catches most halts at little cost.

        Among the settings that poll in vain for at most `most_vain` of the vCPUs' time (``vain_high``), the one that is
        certain to catch the largest fraction of halts (``caught_low``); of equal ones, the smallest. None if there is
        no such setting, or there were no halts.
        """
        cheap = self.rows[self.rows["vain_high"] <= self.most_vain]
        if not self.halts or not len(cheap):
            return None
        return int(min(cheap["halt_poll_ns"][cheap["caught_low"] == cheap["caught_low"].max()]))

    def __str__(self) -> str:
        return "\n".join((*self._summary(), *([format_table(self._rows(), _ALIGN)] if self.halts else [])))

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(self._summary())}</p>{format_html(self._rows(), _ALIGN) if self.halts else ''}"

    def _summary(self) -> tuple[str, ...]:
        now = "" if self.present is None else f"; halt_poll_ns is {self.present} now"
        if not self.halts:
            return (f"no halt was counted, so there is nothing that polling could have caught{now}",)
        caught, poll = format_number(100 * self.caught, ".1f"), format_number(100 * self.poll, ".2f")
        first = (
            f"{self.halts} halts; as it was set, polling caught {caught} % of them and took {poll} % of the vCPUs' time"
        )
        best = "none is the best" if self.best is None else f"{self.best} catches most"
        rule = f"of the settings that poll in vain for at most {100 * self.most_vain:g} % of the vCPUs' time"
        return first, f"{best} {rule}{now}"

    def _rows(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = [("halt_poll_ns", "catches", "polls", "of it in vain")]
        for row in self.rows.tolist():
            setting, *bounds = row
            pairs = zip(bounds[::2], bounds[1::2], strict=True)
            percent = ((format_number(100 * low, ".1f"), format_number(100 * high, ".1f")) for low, high in pairs)
            table.append((f"{setting}", *(f"{low} to {high} %" for low, high in percent)))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python, ready for ``json.dumps``: the attributes, `best`, and a dict for each row.

        Undefined values are None.
        """
        names = self.rows.dtype.names or ()
        return {
            "halts": self.halts,
            "caught": plain_number(self.caught),
            "poll": plain_number(self.poll),
            "most_vain": self.most_vain,
            "present": self.present,
            "best": self.best,
            "rows": [dict(zip(names, map(plain_number, row), strict=True)) for row in self.rows.tolist()],
        }

    def to_pandas(self) -> Any:
        """Return `rows` as a ``pandas.DataFrame``, indexed by ``halt_poll_ns``; ``attrs`` has the rest of `to_dict`."""
        frame = need("pandas", "pandas").DataFrame(self.rows).set_index("halt_poll_ns")
        frame.attrs |= {name: value for name, value in self.to_dict().items() if name != "rows"}
        return frame


_ALIGN = "<>><"

#: In ns; 0 is off. ``KVM_HALT_POLL_NS_DEFAULT`` is 200000 on x86, 500000 on arm64 and riscv.
_SETTINGS = (0, 10_000, 25_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000)


class Halts(NamedTuple):
    """What the vCPUs of one kernel did in a run: the histograms of `HISTOGRAMS`, over so many seconds of theirs."""

    histograms: tuple[Histogram, ...]
    seconds: float


#: Where KVM's module parameter is.
PARAMETER = Path("/sys/module/kvm/parameters/halt_poll_ns")


def halt_poll_advice(
    samples: Samples, settings: Iterable[int] | None = None, most_vain: float = 0.01
) -> HaltPollAdvice | None:
    """Return what settings of ``halt_poll_ns`` would have done; see `Samples.halt_poll_advice`."""
    most_vain = check_fraction("most_vain", most_vain)
    try:
        settings = [operator.index(setting) for setting in (_SETTINGS if settings is None else settings)]
    except TypeError:
        raise TypeError(f"settings is {settings!r}; it must be whole numbers of ns") from None
    if not settings or min(settings) < 0 or max(settings) >= 1 << 63:
        raise ValueError(f"settings is {settings}; it must be one or more numbers of ns, each from 0 to 2**63 - 1")
    return advise(_gather_halts(samples), {samples.host}, settings, most_vain)


def _gather_halts(samples: Samples) -> list[Halts]:
    """Return the halts of each kernel's vCPUs that have the histograms."""
    parts = [part for part in samples.vcpu.split() if set(part.names).issuperset(HISTOGRAMS)]
    return [
        Halts(
            tuple(part.histogram(name).sum() for name in HISTOGRAMS),
            float(np.nansum(read_seconds(part))),
        )
        for part in parts
    ]


def advise(
    halts_of: Sequence[Halts], hosts: set[str], settings: Sequence[int] = _SETTINGS, most_vain: float = 0.01
) -> HaltPollAdvice | None:
    """Return the advice that follows from the halts of these hosts, of one run or several; None without any."""
    if not halts_of:
        return None
    elapsed = sum(seconds for _, seconds in halts_of) * 1e9 or np.nan
    histograms = [one for one, _ in halts_of]
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
        most_vain,
        _read_parameter() if hosts == {os.uname().nodename} else None,
    )


def _read_parameter() -> int | None:
    try:
        return int(PARAMETER.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


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
