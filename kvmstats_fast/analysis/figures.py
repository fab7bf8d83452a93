"""Figures that follow from several statistics, and what a halt_poll_ns would do.

What the kernel counts is described in ``Documentation/virt/kvm/halt-polling.rst`` and, statistic by statistic, where
it is counted: ``virt/kvm/kvm_main.c`` (halts), ``arch/x86/kvm/mmu`` (page faults, pages).
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmstats_fast._table import format_table
from kvmstats_fast.abi import StatType, StatUnit
from kvmstats_fast.groups import find_columns

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.analysis.histogram import Histogram
    from kvmstats_fast.samples import FileInfo, Samples

    Values = npt.NDArray[np.float64]

#: Counters of exits by kind: ``io_exits``, ``exit_instruction``, ``wfi_exit_stat``, ``mmio_exit_user``.
_EXIT_KIND = re.compile(r"(?:.+_)?exits?(?:_.+)?")
_ALL_EXITS = ("exits", "sum_exits")
_PAGE_SIZES = {"pages_4k": 1 << 12, "pages_2m": 1 << 21, "pages_1g": 1 << 30}
_HALT_TIMES = ("halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns")
_POLL_TIMES = ("halt_poll_success_ns", "halt_poll_fail_ns")
_HALT_HISTOGRAMS = ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One derived figure of a run.

    Attributes
    ----------
    name : str
    values : numpy.ndarray
        float64, shape ``(n,)``: one for each of `files`. NaN where it is not defined: a ratio to nothing, a run of one
        sweep, a file that failed at once. For a figure over all files `files` is empty and the shape ``(1,)``.
    units : str
        ``"1/s"``, or empty for a fraction.
    files : tuple of FileInfo
        Whose they are: the files that have every part of it.
    formula : str
        From what it was worked out.
    """

    name: str
    values: Values
    units: str
    files: tuple[FileInfo, ...]
    formula: str


class Figures(Mapping[str, Figure]):
    """Derived figures by name. ``print(figures)`` is a table; a figure the kernel has no parts for is not in it."""

    def __init__(self, made: Iterable[Figure]) -> None:
        self._by_name = {figure.name: figure for figure in made}

    def __getitem__(self, name: str) -> Figure:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __str__(self) -> str:
        if not self:
            return "no figures: these files have no parts for any"
        rows: list[tuple[str, ...]] = [("", "min", "mean", "max", "", "")]
        for figure in self.values():
            known = figure.values[~np.isnan(figure.values)]
            numbers = (known.min(), known.mean(), known.max()) if known.size else (np.nan,) * 3
            cells = [_number(number, ".4g") for number in numbers]
            whose = f"of {len(figure.files)} files" if figure.files else "over all"
            rows.append((figure.name, *cells, figure.units, f"{whose}: {figure.formula}"))
        return format_table(rows, "<>>>><")


class _Changes:
    """Changes over a whole run by file, NaN where a file does not have a statistic.

    Each kernel's files are scaled by its own descriptors, which need not be those of another.
    """

    def __init__(self, samples: Samples, kind: str) -> None:
        of_kind = samples.vm if kind == "vm" else samples.vcpu
        self.files = of_kind.files
        self.parts = [(part, group.columns) for part, group in zip(of_kind.split(), of_kind.groups, strict=True)]
        stats = [part.stat(name) for part, _ in self.parts for name in part.names]
        self.names = list(dict.fromkeys(stat.name for stat in stats if not stat.shape))
        counts = (stat for stat in stats if (stat.type, stat.unit) == (StatType.CUMULATIVE, StatUnit.NONE))
        self.counts = list(dict.fromkeys(stat.name for stat in counts if not stat.shape))
        sweeps = len(samples)
        last = np.full(len(self.files), sweeps - 1)
        for error in of_kind.errors:
            last[error.file] = min(error.sweep, sweeps) - 1
        self._last = last
        time = samples.time if sweeps else np.zeros(1, np.int64)
        # A file that failed counts up to where it did.
        self.seconds = (time[np.maximum(last, 0)] - time[0]) / 1e9
        self.seconds[self.seconds <= 0] = np.nan

    def change(self, name: str) -> Values:
        """Change in base units, by file."""
        return self._by_file(name, lambda part, _: part.total(name), needed=2)

    def end(self, name: str) -> Values:
        """Last value that was read, in base units, by file."""
        return self._by_file(name, lambda part, last: part[name][last, np.arange(len(last))], needed=1)

    def _by_file(
        self, name: str, raw: Callable[[Samples, npt.NDArray[np.intp]], npt.NDArray[Any]], needed: int
    ) -> Values:
        """Scale what `raw` gives of each kernel's files; NaN for those with fewer sweeps than are needed."""
        result = np.full(len(self.files), np.nan)
        for part, columns in self._having(name):
            if len(part) >= needed:
                result[columns] = part.stat(name).scale_array(raw(part, np.maximum(self._last[columns], 0)))
        result[self._last < needed - 1] = np.nan
        return result

    def _having(self, *names: str) -> list[tuple[Samples, npt.NDArray[np.intp]]]:
        """Return those with all these numbers, kernel by kernel."""
        return [
            (part, columns)
            for part, columns in self.parts
            if all(name in part.names and not part.stat(name).shape for name in names)
        ]

    def figure(self, name: str, values: Values, units: str, formula: str, parts: Iterable[str]) -> Figure:
        """Make a figure of the files that have all its parts, which may be none."""
        kept = sorted(file for _, columns in self._having(*parts) for file in columns.tolist())
        return Figure(name, values[kept], units, tuple(self.files[i] for i in kept), formula)


def _divided(a: Values, b: Values) -> Values:
    result: Values = np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0)
    return result


def figures(samples: Samples) -> Figures:
    """Work out the derived figures of a run; see `Samples.figures`."""
    made: list[Figure] = []
    vcpu = _Changes(samples, "vcpu")
    _exits(vcpu, made)
    _halts(vcpu, made)
    _page_faults(vcpu, made)
    _pages(_Changes(samples, "vm"), made)
    return Figures(figure for figure in made if figure.values.size)


def _exits(vcpu: _Changes, made: list[Figure]) -> None:
    for name in filter(_EXIT_KIND.fullmatch, vcpu.counts):
        rates = vcpu.change(name) / vcpu.seconds
        made.append(vcpu.figure(f"{name}/s", rates, "1/s", name, [name]))
        if name in _ALL_EXITS:
            made.append(_imbalance(name, made[-1]))


def _imbalance(name: str, of: Figure) -> Figure:
    values = of.values[~np.isnan(of.values)]
    mean = values.mean() if values.size else 0.0
    imbalance = [values.max() / mean - 1 if mean > 0 else np.nan] if of.files else []
    return Figure(f"{name}_imbalance", np.array(imbalance, np.float64), "", (), f"max / mean - 1 of {of.name}")


def _halts(vcpu: _Changes, made: list[Figure]) -> None:
    names = set(vcpu.names)
    counts = ("halt_successful_poll", "halt_attempted_poll")
    if names.issuperset(counts):
        ratio = _divided(vcpu.change(counts[0]), vcpu.change(counts[1]))
        made.append(vcpu.figure("halt_poll_success_ratio", ratio, "", " / ".join(counts), counts))
    if names.issuperset(_POLL_TIMES):
        success, fail = (vcpu.change(name) for name in _POLL_TIMES)
        formula = f"{_POLL_TIMES[0]} / ({' + '.join(_POLL_TIMES)})"
        made.append(vcpu.figure("halt_poll_time_ratio", _divided(success, success + fail), "", formula, _POLL_TIMES))
    if names.issuperset(_HALT_TIMES):
        halted = sum(vcpu.change(name) for name in _HALT_TIMES) / vcpu.seconds
        formula = f"({' + '.join(_HALT_TIMES)}) / elapsed"
        made.append(vcpu.figure("halted_fraction", halted, "", formula, _HALT_TIMES))
        made.append(_imbalance("halted", made[-1]))


def _page_faults(vcpu: _Changes, made: list[Figure]) -> None:
    if "pf_taken" not in vcpu.names:
        return
    taken = vcpu.change("pf_taken")
    made.append(vcpu.figure("pf_taken/s", taken / vcpu.seconds, "1/s", "pf_taken", ["pf_taken"]))
    for name in vcpu.names:
        # pf_guest counts faults that the guest handles itself, which KVM did not take.
        if name.startswith("pf_") and name not in ("pf_taken", "pf_guest"):
            share = _divided(vcpu.change(name), taken)
            made.append(vcpu.figure(f"{name}_share", share, "", f"{name} / pf_taken", [name, "pf_taken"]))


def _pages(vm: _Changes, made: list[Figure]) -> None:
    if not set(vm.names).issuperset(_PAGE_SIZES):
        return
    mapped = {name: vm.end(name) * size for name, size in _PAGE_SIZES.items()}
    everything = np.sum(list(mapped.values()), axis=0)
    share = _divided(everything - mapped["pages_4k"], everything)
    formula = "bytes mapped by pages_2m and pages_1g / all, at the end"
    made.append(vm.figure("large_page_share", share, "", formula, _PAGE_SIZES))


class DutyCycle(NamedTuple):
    """How much of the time a boolean statistic was 1, as polled.

    Attributes
    ----------
    fraction, low, high : numpy.ndarray
        float64 (n,): the fraction of sweeps that saw a 1, and the bounds of its confidence interval. NaN for a file
        without sweeps.
    """

    fraction: Values
    low: Values
    high: Values


def duty_cycle(samples: Samples, name: str, confidence: float = 0.95) -> DutyCycle:
    """Estimate how much of the time a boolean was 1; see `Samples.duty_cycle`."""
    stat = samples.stat(name)
    if stat.unit != StatUnit.BOOLEAN or stat.shape:
        raise ValueError(f"{name} is no boolean (its unit is {stat.unit!r}): a duty cycle is of what is 0 or 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    values = samples[name]
    if (values > 1).any():
        raise ValueError(f"{name} is a boolean, but {values.max()} was read")
    lives = np.full(len(samples.files), len(values))
    for error in samples.errors:
        lives[error.file] = min(error.sweep, len(values))
    from statistics import NormalDist  # noqa: PLC0415 - imports half of the library

    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rows = []
    for column, file in zip(values.T.astype(np.float64), find_columns(samples.groups, name).tolist(), strict=True):
        rows.append(_wilson(column[: lives[file]], z))
    return DutyCycle(*np.array(rows, np.float64).reshape(-1, 3).T)


def _wilson(seen: Values, z: float) -> tuple[float, float, float]:
    """Wilson's score interval, for as many independent sweeps as these are worth."""
    n = float(len(seen))
    if not n:
        return (np.nan,) * 3
    p = float(seen.mean())
    if 0 < p < 1:
        deviation = seen - p
        correlation = float(deviation[1:] @ deviation[:-1]) / float(deviation @ deviation)
        # Of a chain of two states; anticorrelated sweeps are not credited with more than there were.
        n = max(n * (1 - correlation) / (1 + correlation), 1.0) if correlation > 0 else n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class HaltPollAdvice:
    """What different settings of ``halt_poll_ns`` would have made of the halts of a run; ``print(advice)``.

    Attributes
    ----------
    rows : numpy.ndarray
        Structured, one row a setting: ``halt_poll_ns`` (int64, ns); ``caught_low`` and ``caught_high``: between which
        fractions of all halts polling would have caught; ``poll_low`` and ``poll_high``: which fraction of the vCPUs'
        time it would have cost; ``vain_low`` and ``vain_high``: which fraction of their time polling that caught
        nothing.
    halts : int
        How many halts the run had.
    caught, poll : float
        What polling did catch and cost, as it was set: fractions as above. NaN without a halt or without time, `poll`
        also where ``halt_poll_success_ns`` and ``halt_poll_fail_ns`` were not sampled.
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
            percent = ((_number(100 * low, ".1f"), _number(100 * high, ".1f")) for low, high in pairs)
            table.append((f"{setting}", *(f"{low} to {high} %" for low, high in percent)))
        return (
            f"{self.halts} halts; as it was set, polling caught {_number(100 * self.caught, '.1f')} % of them and took "
            f"{_number(100 * self.poll, '.2f')} % of the vCPUs' time\n" + format_table(table, "<>><")
        )


#: 0: off. 200000 is the default of x86 (``KVM_HALT_POLL_NS_DEFAULT``); that of arm64 and riscv is 500000.
_SETTINGS = (0, 10_000, 25_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000)


def halt_poll_advice(samples: Samples, settings: Iterable[int] = _SETTINGS) -> HaltPollAdvice | None:
    """Say what settings of ``halt_poll_ns`` would have done; see `Samples.halt_poll_advice`."""
    try:
        settings = [operator.index(setting) for setting in settings]
    except TypeError:
        raise TypeError(f"settings are {settings!r}; they must be whole numbers, of ns") from None
    if not settings or min(settings) < 0 or max(settings) >= 1 << 63:
        raise ValueError(f"settings are {settings}; they must be ns, at least one, none negative or above 2**63 - 1")
    changes = _Changes(samples, "vcpu")
    kernels = [(part, columns) for part, columns in changes.parts if set(part.names).issuperset(_HALT_HISTOGRAMS)]
    if not kernels:
        return None
    elapsed = sum(float(np.nansum(changes.seconds[columns])) for _, columns in kernels) * 1e9 or np.nan
    histograms = [tuple(part.histogram(name).sum() for name in _HALT_HISTOGRAMS) for part, _ in kernels]
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
    """Give counts of halts, with the bounds in ns of how long they took from the first poll to the wake-up.

    A halt that polling caught took as long as the poll. Any other took its poll, if it had one, and its wait; which
    poll went with which wait is not known, only between which bounds all polls were.
    """
    # Whole ns add up exactly, seconds do not; powers of two come back as what they were.
    edges, poll_edges, wait_edges = (hist.edges * 1e9 for hist in (success, fail, wait))
    yield success.counts.astype(np.float64), edges[:-1], edges[1:]
    polls = np.flatnonzero(fail.counts)
    least = poll_edges[polls[0]] if polls.size and fail.count >= wait.count else 0.0
    most = poll_edges[polls[-1] + 1] if polls.size else 0.0
    yield wait.counts.astype(np.float64), wait_edges[:-1] + least, wait_edges[1:] + most


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)
