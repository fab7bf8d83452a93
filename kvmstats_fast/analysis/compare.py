"""One set of runs against another: rates, their ratio, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import check_fraction, find_fitting
from kvmstats_fast._text import format_number, format_table
from kvmstats_fast.abi import StatType
from kvmstats_fast.analysis.welch import Welch
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.stat import Stat

    Values: TypeAlias = npt.NDArray[np.float64]
    Per: TypeAlias = str | float | tuple[float, float] | None

#: A run without others beside it is cut into so many pieces of time. Fewer leave the interval wide; more are too short
#: to be independent.
BLOCKS = 16

_OVER_TIME = "block bootstrap over time"
_DRAWS = 2000
_STEADY = 0.9  # a run whose blocks are more alike than that has no rate to speak of; the interval is wide enough then


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one statistic or figure from A to B.

    Attributes
    ----------
    name : str
    a, b : float
        Over all files: for counts, the rate per second or per unit of work; for instant values and figures, the mean.
        With several runs, the mean over the runs. Base units.
    ratio : float
        b / a; NaN if both are 0, or one is not known.
    low, high : float
        The confidence interval of `ratio`; NaN if there is none: too few sweeps, or nothing counted on one side.
    units : str
        Of `a` and `b`: ``"1/s"``, ``"s/s"``, ``"1/exits"``; empty for a fraction.
    """

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    units: str


class Comparison(Mapping[str, Change]):
    """Changes from A to B, by name of statistic or figure; ``print(comparison)`` prints a table.

    Attributes
    ----------
    runs : tuple of (int, int)
        Number of runs (or rounds) in A and in B.
    method : str
        What the intervals are computed from: the spread of runs (or of a suite's rounds), or a block bootstrap over
        time.
    confidence : float
    missing : tuple of str
        What only one side has.
    """

    def __init__(
        self,
        changes: Iterable[Change],
        runs: tuple[int, int],
        confidence: float,
        missing: Iterable[str] = (),
        method: str = "",
    ) -> None:
        self._by_name = {change.name: change for change in changes}
        self.runs = runs
        self.confidence = confidence
        self.missing = tuple(missing)
        self.method = method or (_OVER_TIME if max(runs) == 1 else "spread of runs")

    def __getitem__(self, name: str) -> Change:
        try:
            return self._by_name[name]
        except KeyError:
            near = get_close_matches(name, self._by_name, n=1) if isinstance(name, str) else []  # `5 in compared`
            hint = f"did you mean {near[0]!r}?" if near else f"none of the {len(self)} names there is similar"
            raise KeyError(f"{name!r} is not on both sides; {hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def select(self, *names: str) -> Comparison:
        """Return the comparison of some statistics and figures only.

        Parameters
        ----------
        *names : str
            Names or globs.

        Raises
        ------
        KeyError
            If one of them fits nothing.
        """
        chosen = {name for pattern in names for name in find_fitting(pattern, self) or [self[pattern].name]}
        return Comparison(
            [change for name, change in self.items() if name in chosen], self.runs, self.confidence, (), self.method
        )

    def exceeds(self, name: str, fraction: float) -> bool:
        """Return whether the whole confidence interval of a change is beyond a fraction.

        Parameters
        ----------
        name : str
        fraction : float
            0.05: whether B is more than 5 % above A. -0.05: whether it is more than 5 % below.

        Returns
        -------
        bool
            True if the whole interval is beyond it. If A counted nothing and B something, B is above any fraction.
            Otherwise, without an interval, False.

        Raises
        ------
        KeyError
            If it is not on both sides.
        """
        change = self[name]
        if fraction < 0:
            return change.high < 1 + fraction
        return change.low > 1 + fraction or (change.a == 0 and change.b > 0)

    def to_dict(self) -> dict[str, dict[str, float | str]]:
        """Return the changes as plain Python: ``{"exits": {"a": ..., "b": ..., "ratio": ...}}``."""
        rows = {}
        for change in self.values():
            row = asdict(change)
            rows[row.pop("name")] = row
        return rows

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``, a row for each name; ImportError without pandas."""
        import pandas as pd  # noqa: PLC0415 - an extra

        columns = ["a", "b", "ratio", "low", "high", "units"]
        frame = pd.DataFrame.from_dict(self.to_dict(), orient="index", columns=columns)
        return frame.rename_axis("name")

    def __str__(self) -> str:
        return "\n".join([self.heading, format_table(self.table(), "<>>>>><"), *self.remarks])

    @property
    def heading(self) -> str:
        """The number of runs, and what the intervals are computed from."""
        unit = self.method.removeprefix("spread of ").removesuffix("s") if self.method != _OVER_TIME else "run"
        runs = [f"{n} {unit}{'' if n == 1 else 's'}" for n in self.runs]
        return f"A: {runs[0]}; B: {runs[1]}; {self.confidence:g} intervals from the {self.method}"

    @property
    def remarks(self) -> list[str]:
        """Remarks that are not in the table."""
        still = len(self) + 1 - len(self.table())
        remarks = [f"0 or not defined on both sides: {still}"] if still else []
        return remarks + ([f"on one side only: {', '.join(self.missing)}"] if self.missing else [])

    def table(self) -> list[tuple[str, ...]]:
        """Return the cells of the printed table, with a row of titles: whatever counted on any side."""
        rows: list[tuple[str, ...]] = [("", "A", "B", "B / A", "from", "to", "")]
        for change in self.values():
            if any(value and not math.isnan(value) for value in (change.a, change.b)):
                ratios = [format_number(value, ".4g") for value in (change.ratio, change.low, change.high)]
                values = [format_number(value, ".5g") for value in (change.a, change.b)]
                rows.append((change.name, *values, *ratios, change.units))
        return rows


def compare(
    a: Samples | Iterable[Samples], b: Samples | Iterable[Samples], per: Per = None, confidence: float = 0.95
) -> Comparison:
    """Compare the counts of one set of runs with those of another.

    Parameters
    ----------
    a, b : Samples, or iterable of Samples
        One run or several, of any VMs; for `Recordings`, each run, which must fit in memory. Statistics are added up
        over all files of a run, so compare like with like: ``x.select(vm="web")``.
    per : str, float or (float, float), optional
        What to divide counts by, instead of seconds: a statistic, or the units of work of each run (one number for A
        and one for B, if they differ). Instant values and figures are not divided.
    confidence : float
        Confidence level of the intervals.

    Returns
    -------
    Comparison
        A mapping of names to `Change`: cumulative and instant statistics of one value, and figures that are fractions.

    Raises
    ------
    ValueError
        If a side has no run, a run has fewer than two sweeps, or a number is not above 0.
    KeyError
        If `per` is not a cumulative statistic of every run.
    TypeError
        If a side is neither Samples nor an iterable of them.

    Notes
    -----
    With several runs on a side, runs are the units: the interval is that of Welch's t-test on the logarithm of the
    ratio, since what differs from run to run cannot be seen within one. A side of one run is taken to spread as the
    other does.

    With one run a side, each is cut into 16 blocks of time, and the interval is a studentized bootstrap over these,
    widened where neighbouring blocks are alike. It predicts what would come out if the same run went on, and says
    nothing about another run. Simulated with counters in bursts, a 95 % interval holds the true ratio in 93 to 97 % of
    the cases if a run lasts a hundred bursts or longer; in a shorter one it holds it less often. The draws are the same
    each time.
    """
    confidence = check_fraction("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    sides = [_runs("a", a), _runs("b", b)]
    works = per if isinstance(per, tuple) else (per, per)
    if len(works) != 2:
        raise ValueError(f"per has {len(works)} numbers; it must be one for each side")
    counts = (len(sides[0]), len(sides[1]))
    blocks = BLOCKS if max(counts) == 1 else 1
    measured = [[_measure(run, work, blocks) for run in runs] for runs, work in zip(sides, works, strict=True)]
    names = [set.intersection(*({*run} for run in runs)) for runs in measured]
    shared = [name for name in measured[0][0] if name in names[0] & names[1]]
    missing = dict.fromkeys(name for runs in measured for run in runs for name in run if name not in shared)
    interval = _Bootstrap(confidence) if max(counts) == 1 else Welch(confidence)
    changes = [_change(name, [[run[name] for run in runs] for runs in measured], interval) for name in shared]
    return Comparison(changes, counts, confidence, missing)


def _runs(side: str, runs: Samples | Iterable[Samples]) -> list[Samples]:
    if isinstance(runs, Samples):
        runs = [runs]
    elif not isinstance(runs, Iterable):
        raise TypeError(f"{side} is {runs!r}; it must be Samples, or several of them")
    whole = getattr(runs, "runs", None)  # of Recordings; iterating them gives pieces of runs, which are no runs
    found = list(whole() if callable(whole) else runs)
    for run in found:
        if not isinstance(run, Samples):
            raise TypeError(f"{side} has {run!r} in it; it must be Samples, or several of them")
        if len(run) < 2:
            raise ValueError(f"a run of {side} has {len(run)} sweeps; a rate takes two")
    if not found:
        raise ValueError(f"{side} has no run")
    return found


@dataclass(slots=True)
class _Measure:
    """A ratio of two sums over the blocks of a run: (blocks,) each. `whole` is its value for the whole run."""

    above: Values
    below: Values
    units: str
    whole: float


def _measure(run: Samples, per: str | float | None, blocks: int) -> dict[str, _Measure]:
    """Return what is compared, by name; with fewer sweeps than it takes for blocks, one block."""
    blocks = blocks if len(run) > blocks else 1
    edges = np.linspace(0, len(run) - 1, blocks + 1).astype(int).tolist()
    pieces = [run[start : stop + 1] for start, stop in pairwise(edges)]
    below, unit = _below(run, pieces, per)
    sweeps = np.array([float(len(piece)) for piece in pieces])
    result: dict[str, _Measure] = {}
    for stat, parts in _statistics(run, pieces):
        if stat.type == StatType.CUMULATIVE:
            above, under, units = _add_changes(stat.name, parts), below, f"{stat.units(si=True) or 1}/{unit}"
        else:
            above, under, units = _add_levels(stat.name, parts), sweeps, stat.units(si=True)
        if (before := result.get(stat.name)) is not None:  # of another kernel's files
            above = above + before.above
        result[stat.name] = _Measure(above, under, units, _divide(above.sum(), under.sum()))
    of_pieces = [piece.figures() for piece in pieces] if blocks > 1 else []
    for name, figure in run.figures().items():
        if not figure.units:
            means = [_mean_figure(figures, name) for figures in of_pieces] if blocks > 1 else [_mean(figure.values)]
            result[name] = _Measure(np.array(means), np.ones(blocks), "", _mean(figure.values))
    return result


def _statistics(run: Samples, pieces: list[Samples]) -> Iterator[tuple[Stat, list[Samples]]]:
    """Yield each kernel's statistics of one value that count up or are instant, with its files in each piece."""
    for whole, *parts in zip(run.split(), *(piece.split() for piece in pieces), strict=True):
        for name in whole.names:
            stat = whole.stat(name)
            if not stat.shape and stat.type in (StatType.CUMULATIVE, StatType.INSTANT):
                yield stat, parts


def _below(run: Samples, pieces: list[Samples], per: str | float | None) -> tuple[Values, str]:
    if per is None:
        return np.array([float(piece.time[-1] - piece.time[0]) / 1e9 for piece in pieces]), "s"
    if isinstance(per, str):
        stat = run.stat(per)
        if stat.shape or stat.type != StatType.CUMULATIVE:
            raise KeyError(f"per is {per!r}, which does not count up; it must be a cumulative statistic of one value")
        found = [_add_changes(per, parts) for one, parts in _statistics(run, pieces) if one.name == per]
        return np.sum(found, axis=0), per
    if not (isinstance(per, int | float) and 0 < per < math.inf):
        raise ValueError(f"per is {per!r}; it must be a statistic's name, or a number above 0")
    return np.full(len(pieces), per / len(pieces)), "unit"


def _add_changes(name: str, pieces: list[Samples]) -> Values:
    """Return how much the files counted in each piece, in base units."""
    return np.array([float(np.sum(piece.stat(name).scale_array(piece.total(name)))) for piece in pieces])


def _add_levels(name: str, pieces: list[Samples]) -> Values:
    """Return the sum over sweeps of the files' values in each piece, in base units."""
    return np.array([float(np.sum(piece.si(name))) for piece in pieces])


def _mean_figure(figures: Figures, name: str) -> float:
    return _mean(figures[name].values) if name in figures else math.nan


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _divide(a: float, b: float) -> float:
    return float(a / b) if b else math.nan


def _change(name: str, sides: list[list[_Measure]], interval: _Bootstrap | Welch) -> Change:
    a, b = (_mean(np.array([run.whole for run in runs])) for runs in sides)
    ratio = _divide(b, a) if a or not b else math.inf
    low, high = interval(sides[0], sides[1], math.log(ratio)) if a > 0 and b > 0 else (math.nan, math.nan)
    return Change(name, a, b, ratio, low, high, sides[0][0].units)


class _Bootstrap:
    """The interval of a ratio of two runs, each cut into blocks of time."""

    def __init__(self, confidence: float) -> None:
        self._tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        generator = np.random.default_rng(0)
        draws = [generator.multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS), _DRAWS) for _ in range(2)]
        self._draws = [np.concatenate([np.ones((1, BLOCKS), draw.dtype), draw]) for draw in draws]

    def __call__(self, a: list[_Measure], b: list[_Measure], log_ratio: float) -> tuple[float, float]:
        if {len(a[0].above), len(b[0].above)} != {BLOCKS}:
            return math.nan, math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            log_a, square_a = self._estimate(a[0], self._draws[0])
            log_b, square_b = self._estimate(b[0], self._draws[1])
            logs, errors = log_b - log_a, np.sqrt(square_a + square_b)
            off = (logs[1:] - logs[0]) / errors[1:]
        if errors[0] == 0:
            return (math.exp(log_ratio),) * 2
        off = off[np.isfinite(off)]
        if not off.size or not np.isfinite(errors[0]):
            return math.nan, math.nan
        alike = max((_likeness(a[0]) + _likeness(b[0])) / 2 + 1 / BLOCKS, 0.0)  # of few blocks it is taken too low
        alike = min(alike, _STEADY)
        error = errors[0] * math.sqrt((1 + alike) / (1 - alike))
        below, above = np.quantile(off, self._tails)
        return math.exp(log_ratio - above * error), math.exp(log_ratio - below * error)

    @staticmethod
    def _estimate(measure: _Measure, draws: npt.NDArray[np.int64]) -> tuple[Values, Values]:
        """Return for each draw the log of the ratio of sums, and its variance by linearization."""
        above, below = measure.above, measure.below
        over, under = draws @ above, draws @ below
        ratio = over / under
        squares = draws @ (above * above) - 2 * ratio * (draws @ (above * below)) + ratio**2 * (draws @ (below * below))
        variance = np.maximum(squares, 0) * BLOCKS / (BLOCKS - 1) / over**2
        return np.log(ratio), variance


def _likeness(measure: _Measure) -> float:
    """Return the correlation of neighbouring blocks."""
    rest = measure.above - measure.below * measure.above.sum() / measure.below.sum()
    square = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / square if square else 0.0
