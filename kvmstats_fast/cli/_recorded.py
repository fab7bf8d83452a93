"""What recordings say, added up over their runs: which VMs there were, their rows with a spread, figures, advice."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import describe_error, plain_number
from kvmstats_fast.analysis.several_runs import SeveralRuns
from kvmstats_fast.analysis.tally import cover_ns
from kvmstats_fast.cli._files import EVERYTHING, check_no_capture, check_selection, open_runs
from kvmstats_fast.cli._rows import Row, add_buckets, rates_over_time, rows_of
from kvmstats_fast.errors import KvmStatsError, RecordingWarning, warn_caller
from kvmstats_fast.formats.wanted import resample_steps
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.halt_poll import HaltPollAdvice
    from kvmstats_fast.cli._files import Run as Source
    from kvmstats_fast.cli._rows import Key
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.wanted import Step
    from kvmstats_fast.selection import Selection

_STEPS = 1000  # that the rates of a run are of, at most
SPREAD = ("min", "median", "p99")


@dataclass(slots=True, eq=False)
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
    is_capture : bool
        Whether it is one reading, of no time.
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
    is_capture: bool = False
    vms: dict[str, None] = field(default_factory=dict)

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
            "vms": [*self.vms],
        }


@dataclass(slots=True)
class Life:
    """A VM as it was recorded, from the first run that has it to the last; `ended` says how, where that was seen."""

    host: str
    vm: str
    pid: int | None
    runs: list[Run] = field(default_factory=list)
    vcpus: set[int] = field(default_factory=set)
    ended: str = ""

    @property
    def start(self) -> int:
        """CLOCK_REALTIME in ns of the first sweep."""
        return min(run.start for run in self.runs)

    @property
    def stop(self) -> int:
        """CLOCK_REALTIME in ns of the last sweep."""
        return max(run.stop for run in self.runs)

    @property
    def seconds(self) -> float:
        """How long it was recorded."""
        return cover(self.runs)

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
    read : list of (int, int)
        From when to when its files were read in each run, of CLOCK_REALTIME in ns.
    time : list of numpy.ndarray
        Of each run CLOCK_REALTIME in ns at the edges of the steps, int64 (steps + 1,).
    steps : list of numpy.ndarray
        Of each run the rate in each step, of instant values the value, float64 (steps,).
    """

    read: list[tuple[int, int]] = field(default_factory=list)
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

    def whole(self) -> Row:
        """Return the row without what it was from step to step."""
        return Row(*(getattr(self, name) for name in Row.__slots__))

    def add_run(self, row: Row, run: Run) -> None:
        """Add what the row was in a further run."""
        is_further = bool(self.read)
        self.read.append((run.start, run.start + round(np.nan_to_num(row.seconds) * 1e9)))
        if is_further:
            self.value = self.value + row.value if self.is_counted else row.value
            self.buckets = add_buckets(self.buckets, row.buckets)
            self.pid = self.pid if self.pid == row.pid else None
            if self.rate is None or row.rate is None:
                self.rate = row.rate if self.rate is None else self.rate
            else:
                self.rate = self.value / (cover_ns(self.read) / 1e9)


def cover(runs: Iterable[Run]) -> float:
    """Return how many seconds any of some runs covers."""
    return cover_ns((run.start, run.stop) for run in runs) / 1e9


class Recorded:
    """What runs say together.

    Parameters
    ----------
    by : {"vm", "vcpu", "host"}
    with_steps : bool
        Whether it is asked what rates were over time.

    Attributes
    ----------
    runs : list of Run
    files : list of FileInfo
    lives : list of Life
    rows : list of Summary
    advice : HaltPollAdvice or None
    """

    def __init__(self, by: str, *, with_steps: bool) -> None:
        self.by, self._with_steps = by, with_steps
        self.runs: list[Run] = []
        self._lives: dict[tuple[str, str, int | None], Life] = {}
        self._rows: dict[Key, Summary] = {}
        self._files: dict[FileInfo, None] = {}
        self._known: dict[object, Run] = {}
        self._together = SeveralRuns()

    @property
    def files(self) -> list[FileInfo]:
        return list(self._files)

    @property
    def lives(self) -> list[Life]:
        return list(self._lives.values())

    @property
    def rows(self) -> list[Summary]:
        return list(self._rows.values())

    def figures(self, by: str = "") -> Figures:
        """Return figures; by default of what the rows are of."""
        return self._together.figures(by or self.by)

    @property
    def advice(self) -> HaltPollAdvice | None:
        return self._together.halt_poll_advice()

    def add(self, source: Source, selection: Selection, step: float | None) -> None:
        """Take a run, later than those before; `step` is what its rates over time are of."""
        run = _describe(source, step)
        if run is None:
            warn_caller(f"{source.path}: there is no sweep in it", RecordingWarning)
            return
        known = self._known.setdefault(source.identity() or source, run)
        if (known.start, known.stop, known.sweeps) == (run.start, run.stop, run.sweeps):
            run = known  # another kind of its files
        if run not in self.runs:
            self.runs.append(run)
        over_time = _OverTime(self.by)
        steps = self._count(source.read(selection), run)
        if self._with_steps and not run.is_capture:
            for part in resample_steps(steps, run.step):
                over_time.add(part.samples, follows=part.follows)
        for _ in steps:  # if there is more than nothing of that
            pass
        for key, row in rows_of(self._together.end_run(), self.by).items():
            if key not in self._rows:
                self._rows[key] = Summary(*(getattr(row, name) for name in Row.__slots__))
            self._rows[key].add_run(row, run)
            for edges, values in over_time.find(key):
                self._rows[key].time.append(edges)
                self._rows[key].steps.append(values)

    def _count(self, steps: Iterable[Step], run: Run) -> Iterator[Step]:
        """Count what happened in steps, and give them."""
        for step in steps:
            self._together.add_step(step.samples, follows=step.follows)
            for vm, part in step.samples.by_vm().items():
                info = part.files[0]
                key = (info.host, vm, info.pid)
                life = self._lives.setdefault(key, Life(*key))
                if run not in life.runs[-1:]:
                    life.runs.append(run)
                    life.ended = ""
                life.vcpus |= {one.vcpu_id for one in part.files if one.vcpu_id is not None}
                life.ended = next((describe_error(error.error) for error in part.errors), life.ended)
            run.vms |= dict.fromkeys(step.samples.vms)
            self._files |= dict.fromkeys(step.samples.files)
            yield step


class _OverTime:
    """The rates of a run from step to step, stretch by stretch of sweeps that follow each other."""

    def __init__(self, by: str) -> None:
        self._by = by
        self._last: Samples | None = None
        self._times: list[list[npt.NDArray[np.int64]]] = []
        self._values: list[dict[Key, list[npt.NDArray[np.float64]]]] = []

    def add(self, samples: Samples, *, follows: bool) -> None:
        """Take resampled sweeps."""
        before, self._last = self._last, samples[-1:]
        is_new = before is None or not follows
        if is_new:
            self._times.append([])
            self._values.append({})
        whole = samples if before is None or is_new else Samples.concatenate([before, samples])
        self._times[-1].append(samples.wall_time)
        here: dict[Key, npt.NDArray[np.float64]] = {}
        for key, values in rates_over_time(whole, self._by):
            # Values have a time each, rates lie between two.
            new = values[1:] if len(values) == len(whole) and not is_new else values
            here[key] = here[key] + new if key in here else new
        for key, new in here.items():
            self._values[-1].setdefault(key, []).append(new)

    def find(self, key: Key) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """Yield the edges of steps and what was in them, for each stretch that has any."""
        for times, values in zip(self._times, self._values, strict=True):
            steps = np.concatenate(values.get(key, [np.empty(0)]))
            time = np.concatenate(times)
            if steps.size:
                yield time[[*range(len(time)), -1][: len(steps) + 1]], steps


def _describe(source: Source, step: float | None) -> Run | None:
    """Return how long a run was, and what it cost, for which one of its statistics is read; None if it has no sweep."""
    first: Samples | None = None
    sweeps = missed = sweep_ns = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordingWarning)  # said when all of it is read
        for one in source.read(replace(EVERYTHING, names=tuple(source.names()[:1]))):
            if len(one.samples):
                last = one.samples
                first = first or last
                sweeps, missed = sweeps + len(last), missed + last.missed
                sweep_ns += int(last.sweep_ns.sum())
    if first is None:
        return None
    start, ns = int(first.wall_time[0]), int(last.time[-1]) - int(first.time[0])
    return Run(
        first.host,
        first.kernel,
        start,
        start + ns,
        1 if source.is_capture else sweeps,
        first.interval,
        missed,
        sweep_ns,
        max(step or _round_up(ns / 1e9 / _STEPS), first.interval, 1e-9),
        is_capture=source.is_capture,
    )


def _round_up(seconds: float) -> float:
    """Return the next of 1, 2, 5, 10 ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(seconds, 1e-6)))
    return next(factor * power for factor in (1, 2, 5, 10) if seconds <= factor * power * (1 + 1e-9))


def summarize(
    paths: Sequence[str], by: str, selection: Selection, step: float | None = None, *, with_steps: bool = True
) -> Recorded:
    """Read what files say, a part of them at a time.

    Parameters
    ----------
    paths : sequence of str
    by : {"vm", "vcpu", "host"}
    selection : Selection
    step : float, optional
        Seconds that rates over time are of; default: a thousandth of each run, or its interval.
    with_steps : bool
        Whether it is asked what rates were over time.

    Raises
    ------
    KeyError
        If there is something that no run has.
    ValueError
        If rates are asked for of a capture.
    KvmStatsError, OSError
        If a file is not there, or is none that has runs, or there is no sweep in any.
    """
    recorded = Recorded(by, with_steps=with_steps)
    sources = open_runs(paths)
    if step is not None or not all(source.is_capture for source in sources):
        check_no_capture(sources, "a recording" if step is None else "-I")
    check_selection(sources, selection, "these files")
    for source in sources:
        if source.names(selection) and selection.find_stats(source.names(selection)):
            recorded.add(source, selection, step)
    if not recorded.runs:
        raise KvmStatsError(f"{sources[0].path}: there is no sweep in it")
    return recorded
