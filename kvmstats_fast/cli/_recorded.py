"""What recordings say, added up over their runs: which VMs there were, their rows with a spread, figures, advice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import describe_error, plain_number
from kvmstats_fast.analysis.several_runs import SeveralRuns
from kvmstats_fast.cli._rows import Row, make_rows, rows_over_time
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.recording import Recording
from kvmstats_fast.formats.steps import STEP_BYTES
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.halt_poll import HaltPollAdvice

_STEPS = 1000  # that the rates of a run are of, at most
SPREAD = ("min", "median", "p99")


@dataclass(slots=True)
class Run:
    """A run: sweeps of one set of files.

    Attributes
    ----------
    start, stop : int
        CLOCK_REALTIME in ns at the first and last sweep.
    step : float
        Seconds that a rate over time is of.
    sweep_ns : int
        What all sweeps took.
    """

    host: str
    kernel: str
    start: int
    stop: int
    sweeps: int
    interval: float
    missed: int
    sweep_ns: int
    step: float
    vms: list[str]

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.stop - self.start) / 1e9

    @property
    def cost(self) -> float:
        """What sweeps took, as a share of the time of one processor; NaN of no time."""
        return self.sweep_ns / (self.stop - self.start) if self.stop > self.start else math.nan

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "host": self.host,
            "kernel": self.kernel,
            "start": str(np.datetime64(self.start, "ns")),
            "stop": str(np.datetime64(self.stop, "ns")),
            "seconds": self.seconds,
            "sweeps": self.sweeps,
            "interval": self.interval,
            "missed": self.missed,
            "cost": plain_number(self.cost),
            "step": self.step,
            "vms": self.vms,
        }


@dataclass(slots=True)
class Life:
    """A VM as it was recorded, from the first run that has it to the last; `ended` says how, where that was seen."""

    host: str
    vm: str
    pid: int | None
    start: int
    stop: int
    seconds: float = 0.0
    vcpus: set[int] = field(default_factory=set)
    ended: str = ""

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "host": self.host,
            "vm": self.vm,
            "pid": self.pid,
            "vcpus": len(self.vcpus),
            "start": str(np.datetime64(self.start, "ns")),
            "stop": str(np.datetime64(self.stop, "ns")),
            "seconds": self.seconds,
            "ended": self.ended,
        }


@dataclass(slots=True)
class Summary(Row):
    """A row of all runs, and what it was from step to step.

    Attributes
    ----------
    runs : list of (Run, float or None)
        The runs that have it, and its rate over each.
    time : list of numpy.ndarray
        Of each run CLOCK_REALTIME in ns at the edges of the steps, int64 (steps + 1,).
    steps : list of numpy.ndarray
        Of each run the rate in each step, of instant values the value, float64 (steps,).
    """

    runs: list[tuple[Run, float | None]] = field(default_factory=list)
    time: list[npt.NDArray[np.int64]] = field(default_factory=list)
    steps: list[npt.NDArray[np.float64]] = field(default_factory=list)

    @property
    def spread(self) -> tuple[float, ...]:
        """Minimum, median and 99th percentile over all steps; NaN where there is none."""
        values = np.concatenate(self.steps) if self.steps else np.empty(0)
        values = values[~np.isnan(values)]
        return tuple(np.quantile(values, (0, 0.5, 0.99)).tolist()) if values.size else (math.nan,) * 3

    def fields(self, time: float | None = None) -> dict[str, Any]:
        """Return the row as JSON has it."""
        spread = zip(SPREAD, map(plain_number, self.spread), strict=True)
        return Row.fields(self, time) | (dict(spread) if self.buckets is None else {})

    def add_run(self, row: Row, run: Run, edges: npt.NDArray[np.int64], steps: npt.NDArray[np.float64]) -> None:
        """Add what the row was in a further run."""
        if self.runs:
            self.value = row.value if row.rate is None and row.buckets is None else self.value + row.value
            self.buckets = _add_buckets(self.buckets, row.buckets)
            self.pid = self.pid if self.pid == row.pid else None
        self.runs.append((run, row.rate))
        self.rate = _mean_rate(self.runs)
        if steps.size:
            self.time.append(edges)
            self.steps.append(steps)


def _add_buckets(a: list[int] | None, b: list[int] | None) -> list[int] | None:
    return None if a is None or b is None else [x + y for x, y in zip(a, b, strict=True)]


def _mean_rate(runs: list[tuple[Run, float | None]]) -> float | None:
    """Return the rate over all runs: what was counted in them, by the time that any of them covers."""
    known = [(run, rate) for run, rate in runs if rate is not None and run.seconds]
    if len(known) < 2:
        return known[0][1] if known else None
    covered, until = 0, 0
    for start, stop in sorted((run.start, run.stop) for run, _ in known):
        covered += max(stop - max(start, until), 0)
        until = max(until, stop)
    return sum(rate * run.seconds for run, rate in known) / (covered / 1e9)


class Recorded:
    """What runs say together.

    Attributes
    ----------
    by : {"vm", "vcpu", "host"}
    runs : list of Run
    lives : list of Life
    rows : list of Summary
    figures : Figures
    advice : HaltPollAdvice or None
    """

    def __init__(self, by: str) -> None:
        self.by = by
        self.runs: list[Run] = []
        self._lives: dict[tuple[str, str, int | None], Life] = {}
        self._rows: dict[tuple[Any, ...], Summary] = {}
        self._together = SeveralRuns()

    @property
    def lives(self) -> list[Life]:
        return list(self._lives.values())

    @property
    def rows(self) -> list[Summary]:
        return list(self._rows.values())

    @property
    def figures(self) -> Figures:
        return self._together.figures(self.by)

    @property
    def advice(self) -> HaltPollAdvice | None:
        return self._together.halt_poll_advice()

    def add(self, samples: Samples, step: float | None) -> None:
        """Take a run of at least one sweep, later than those before; `step` is what its rates over time are of."""
        run = _describe(samples, step)
        self.runs.append(run)
        self._together.add(samples)
        for vm, part in samples.by_vm().items():
            info = part.files[0]
            key = (info.host, vm, info.pid)
            life = self._lives.setdefault(key, Life(*key, run.start, run.stop))
            life.start, life.stop = min(life.start, run.start), max(life.stop, run.stop)
            life.seconds += run.seconds
            life.vcpus |= {one.vcpu_id for one in part.files if one.vcpu_id is not None}
            life.ended = next((describe_error(error.error) for error in part.errors), "")
        resampled = samples.resample(run.step) if len(samples) > 1 else samples
        over_time = _add_up(rows_over_time(resampled, self.by))
        totals = _add_up((row, _NOTHING) for row in make_rows(samples, self.by))
        for key_of_row, (row, _) in totals.items():
            steps = over_time[key_of_row][1]
            # Values have a time each, rates lie between two.
            edges = resampled.wall_time[[*range(len(resampled)), -1][: len(steps) + 1]]
            if key_of_row not in self._rows:
                self._rows[key_of_row] = Summary(*(getattr(row, name) for name in Row.__slots__))
            self._rows[key_of_row].add_run(row, run, edges, steps)


_NOTHING: npt.NDArray[np.float64] = np.empty(0)


def _add_up(
    rows: Iterable[tuple[Row, npt.NDArray[np.float64]]],
) -> dict[tuple[Any, ...], tuple[Row, npt.NDArray[np.float64]]]:
    """Return the rows of a run by what they are of; those of the same, as on a host with two kernels, are added."""
    found: dict[tuple[Any, ...], tuple[Row, npt.NDArray[np.float64]]] = {}
    for row, steps in rows:
        key = (row.host, row.vm, row.vcpu, replace(row.stat, offset=0))
        if key in found:
            before, known = found[key]
            before.value += row.value
            before.rate = None if before.rate is None or row.rate is None else before.rate + row.rate
            before.buckets = _add_buckets(before.buckets, row.buckets)
            found[key] = before, known + steps
        else:
            found[key] = row, steps
    return found


def _describe(samples: Samples, step: float | None) -> Run:
    start = int(samples.wall_time[0])
    ns = int(samples.time[-1]) - int(samples.time[0])
    return Run(
        samples.host,
        samples.kernel,
        start,
        start + ns,
        len(samples),
        samples.interval,
        samples.missed,
        int(samples.sweep_ns.sum()),
        max(step or _round_up(ns / 1e9 / _STEPS), samples.interval, 1e-9),
        list(samples.vms),
    )


def _round_up(seconds: float) -> float:
    """Return the next of 1, 2, 5, 10 ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(seconds, 1e-6)))
    return next(factor * power for factor in (1, 2, 5, 10) if seconds <= factor * power * (1 + 1e-9))


def load_runs(path: str) -> Iterator[Samples]:
    """Give the runs of a recording, or of an ``.npz``, one by one; KvmStatsError if there is no sweep in it."""
    empty = True
    for _, batches in groupby(_read(path), _what):
        empty = False
        yield Samples.concatenate(list(batches))
    if empty:
        raise KvmStatsError(f"{path}: there is no sweep in it")


def _read(path: str) -> Iterator[Samples]:
    if path.endswith(".npz"):
        return filter(len, [Samples.load(path)])
    return filter(len, Recording(path).read(STEP_BYTES))


def _began(path: str) -> int:
    """Return when a recording began; one without a sweep is refused when it is its turn."""
    return next((int(samples.wall_time[0]) for samples in _read(path)), 0)


def _what(samples: Samples) -> tuple[Any, ...]:
    """Return what sweeps of one run have in common."""
    return samples.files, samples.interval, samples.host, samples.names


def summarize(
    paths: Iterable[str], by: str, choose: Callable[[Samples], Samples], step: float | None = None
) -> Recorded:
    """Read recordings.

    Parameters
    ----------
    paths : iterable of str
    by : {"vm", "vcpu", "host"}
    choose : callable
        Returns what is wanted of a run; KeyError if nothing is.
    step : float, optional
        Seconds that rates over time are of; default: a thousandth of each run, or its interval.

    Raises
    ------
    KeyError
        If nothing is wanted of any run: that of the last.
    KvmStatsError, OSError
        If a file is not there, or is no recording.
    """
    recorded = Recorded(by)
    missing: list[KeyError] = []
    for run in chain.from_iterable(map(load_runs, sorted(paths, key=_began))):
        chosen = _choose(run, choose, missing)
        if chosen is not None:
            recorded.add(chosen, step)
    if not recorded.runs:
        raise missing[-1]
    return recorded


def _choose(run: Samples, choose: Callable[[Samples], Samples], missing: list[KeyError]) -> Samples | None:
    try:
        return choose(run)
    except KeyError as error:
        missing.append(error)
        return None
