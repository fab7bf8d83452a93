"""Plots of samples, with matplotlib: rates over time, histograms, and a heat map of many vCPUs.

Each function draws into the Axes it is given, or into a new figure, and returns the Axes. matplotlib is the extra
``kvmstats-fast[plot]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import format_si
from kvmstats_fast.analysis.time_shares import NEEDED, divide_samples
from kvmstats_fast.formats import need

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvmstats_fast.analysis.histogram import Histogram
    from kvmstats_fast.samples import Samples

__all__ = ["heatmap", "histogram", "rates", "time_shares"]

#: More lines than this cannot be told apart: they are drawn as a median and a band.
_LINES = 10
#: Points across a plot; more are averaged, because a screen does not show them.
_POINTS = 1000
#: Seconds that a step of shares lasts at least, and how many there are at most.
_SHARE_STEP = 0.1
_SHARE_POINTS = 300


def _axes(ax: Any) -> Any:
    return need("matplotlib.pyplot", "plot").subplots(layout="constrained")[1] if ax is None else ax


def _rate(samples: Samples, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Seconds since the start at the edges of each step, and the rate in it, (steps, n).

    Steps of many sweeps if there are many: their rate is exact, what lies between is not shown.
    """
    if samples.stat(name).shape:
        raise ValueError(f"{name} is a histogram: plot.histogram shows it")
    if len(samples) < 2:
        raise ValueError(f"a rate needs two sweeps, these samples have {len(samples)}")
    steps = -(-(len(samples) - 1) // _POINTS)
    seconds = (samples.time - samples.time[0]) / 1e9
    rate = samples.rate(name)
    edges = np.append(np.arange(0, len(samples) - 1, steps), len(samples) - 1)
    lasted = np.diff(seconds)
    weighted = np.where(np.isnan(rate), 0, rate) * lasted[:, None]
    known = np.where(np.isnan(rate), 0, lasted[:, None])
    change, time = (np.add.reduceat(part, edges[:-1], axis=0) for part in (weighted, known))
    mean: npt.NDArray[np.float64] = np.divide(change, time, out=np.full_like(change, np.nan), where=time > 0)
    return seconds[edges], mean


def _bands(samples: Samples, name: str) -> dict[str, list[int]]:
    """Return the columns that share a band, by what the band is called: those of a VM, or all if there are many VMs."""
    files = samples.columns(name)
    by_vm: dict[str, list[int]] = {}
    for column, info in enumerate(files):
        by_vm.setdefault(info.vm, []).append(column)
    if len(by_vm) > _LINES:
        return {f"{len(by_vm)} VMs": list(range(len(files)))}
    return by_vm


def rates(samples: Samples, names: str | Iterable[str], ax: Any = None) -> Any:
    """Plot rates over time, a line for each file: ``web/0`` is vCPU 0 of the VM web.

    More than 10 files become a median for each VM, and a band from minimum to maximum; more than 10 VMs become one for
    all.

    Parameters
    ----------
    samples : Samples
    names : str or iterable of str
        Statistics of one unit. Rates are in base units per second.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    KeyError, ValueError
        If a name was not sampled or is a histogram, the units differ, or there are fewer than two sweeps.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("names is empty: name a statistic to draw")
    units = {samples.stat(name).rate_units for name in names}
    if len(units) > 1:
        raise ValueError(f"these statistics have different units, {', '.join(sorted(units))}: draw them apart")
    drawn = {name: _rate(samples, name) for name in names}
    ax = _axes(ax)
    for name, (edges, rate) in drawn.items():
        prefix = f"{name}, " if len(names) > 1 else ""
        if rate.shape[1] <= _LINES:
            for values, info in zip(rate.T, samples.columns(name), strict=True):
                ax.stairs(values, edges, label=f"{prefix}{info}", baseline=None)
            continue
        for whose, columns in _bands(samples, name).items():
            part = rate[:, columns]
            known = ~np.isnan(part).all(axis=1)
            spread = np.full((3, len(part)), np.nan)
            spread[:, known] = np.nanquantile(part[known], (0, 0.5, 1), axis=1)
            low, middle, high = spread
            label = f"{prefix}{whose}: median of {len(columns)}"
            color = ax.stairs(middle, edges, label=label, baseline=None).get_edgecolor()
            label = f"{prefix}{whose}: least to most"
            ax.stairs(high, edges, baseline=low, fill=True, alpha=0.25, color=color, label=label)
    ax.set(xlabel="time since start (s)", ylabel=f"{names[0] if len(names) == 1 else 'rate'} ({units.pop()})")
    ax.margins(x=0)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.legend(loc="best", fontsize="small")
    return ax


def histogram(hist: Histogram, ax: Any = None) -> Any:
    """Plot the counts of a histogram, summed over files.

    Parameters
    ----------
    hist : Histogram
        As `Samples.histogram` gives it.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Notes
    -----
    It shows the first to the last bucket that is not 0; the open last bucket is drawn as wide as the one before.
    Buckets of a logarithmic histogram are equally wide, as they are on a logarithmic axis.
    """
    whole = hist.sum()
    used = np.flatnonzero(whole.counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, whole.stat.size)
    ax = _axes(ax)
    ax.bar(np.arange(first, last) + 0.5, whole.counts[first:last].astype(np.float64), width=1.0, edgecolor="white")
    step = -(-(last - first) // 16)
    ticks = range(first, last + 1, step)
    ax.set_xticks(list(ticks), [format_si(whole.edges[i], whole.units) for i in ticks], rotation=45, ha="right")
    ax.set(xlabel=whole.stat.name, ylabel="count", xlim=(first, last))
    has_mean = whole.mean is not None and whole.count > 0
    ax.set_title(f"{int(whole.count)} counted" + (f", mean {format_si(whole.mean, whole.units)}" if has_mean else ""))
    return ax


def time_shares(samples: Samples, ax: Any = None) -> Any:
    """Plot where the time of vCPUs went, as stacked areas: running, polling, halted, steal (waiting), other.

    Parameters
    ----------
    samples : Samples
        Sampled with ``sched=True``. All vCPUs are plotted together; use `Samples.select` for one.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        A step is at least 0.1 s, because how long a thread ran is only known at scheduler ticks.

    Raises
    ------
    KeyError, ValueError
        If no vCPU has the statistics, or there are fewer than two sweeps.
    """
    parts = [part for part in samples.vcpu.split() if set(part.names).issuperset(NEEDED)]
    if not parts:
        raise KeyError(f"no vCPU has all of {', '.join(NEEDED)}: sample with sched=True")
    if len(samples) < 2:
        raise ValueError(f"a share needs two sweeps, these samples have {len(samples)}")
    seconds = (samples.time - samples.time[0]) / 1e9
    step = max(_SHARE_STEP, seconds[-1] / _SHARE_POINTS)
    starts = np.searchsorted(seconds, np.arange(0, max(seconds[-1] - step / 2, step / 4), step))
    edges = np.append(np.unique(starts[starts < len(seconds) - 1]), len(seconds) - 1)
    divided = [divide_samples(part, edges) for part in parts]
    elapsed = sum(whole.sum(axis=1) for whole, _ in divided)
    ax = _axes(ax)
    shares = {
        name: np.divide(sum(some[name].sum(axis=1) for _, some in divided), elapsed, where=elapsed > 0, out=0 * elapsed)
        for name in divided[0][1]
    }
    corners = np.repeat(seconds[edges], 2)[1:-1]
    ax.stackplot(corners, [np.repeat(share, 2) for share in shares.values()], labels=list(shares), linewidth=0)
    ax.set(xlabel="time since start (s)", ylabel="share of the time", ylim=(0, 1))
    ax.margins(x=0)
    ax.legend(loc="best", fontsize="small")
    return ax


def heatmap(samples: Samples, name: str, ax: Any = None) -> Any:
    """Plot the rate of a statistic as colours: time from left to right, a row for each file, ``web/0``.

    Parameters
    ----------
    samples : Samples
    name : str
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Files that had failed are blank from there on.

    Raises
    ------
    KeyError, ValueError
        As `rates`.
    """
    edges, rate = _rate(samples, name)
    ax = _axes(ax)
    files = np.arange(rate.shape[1] + 1) - 0.5
    least = np.fmin.reduce(rate, axis=None, initial=0)  # below 0 where a value fell
    mesh = ax.pcolormesh(edges, files, np.ma.masked_invalid(rate.T), shading="flat", rasterized=True, vmin=least)
    step = -(-rate.shape[1] // 24)
    whose = [str(info) for info in samples.columns(name)]
    ax.set_yticks(range(0, len(whose), step), whose[::step])
    ax.invert_yaxis()
    ax.set_xlabel("time since start (s)")
    ax.figure.colorbar(mesh, ax=ax, label=f"{name} ({samples.stat(name).rate_units})")
    return ax
