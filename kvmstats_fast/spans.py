"""Spans: the sweeps of a slice, of a range of time, and the last of each second; and how long files were read."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmstats_fast._arguments import article, check_seconds
from kvmstats_fast.groups import find_columns, find_key
from kvmstats_fast.joining import find_steps

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.groups import Key
    from kvmstats_fast.samples import Samples

    #: What a moment may be given as.
    When: TypeAlias = str | datetime | np.datetime64 | float

_FORM = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?\s?(?:(Z)|([+-])(\d\d):?(\d\d))?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LONGEST = 1e9  # seconds, 30 years
_CLOCK = np.iinfo(np.int64)


class Moment(NamedTuple):
    """A time in ns: of the wall clock since 1970 (UTC), or else since the first sweep."""

    ns: int
    is_wall: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A range of time: the arguments of `Samples.between`, checked.

    Attributes
    ----------
    start, stop : Moment or None
        What is at `start` is in it, what is at `stop` is not; None is no limit.
    """

    start: Moment | None
    stop: Moment | None

    @classmethod
    def of(cls, start: When | None, stop: When | None) -> Span:
        """Check the arguments of `Samples.between`; TypeError or ValueError if they are none."""
        first, last = _read_moment("start", start), _read_moment("stop", stop)
        if first is not None and last is not None and first.is_wall == last.is_wall and first > last:
            raise ValueError(f"start is {start}, which is after stop, {stop}")
        return cls(first, last)

    @property
    def is_relative(self) -> bool:
        """Return whether anything of it counts from the first sweep."""
        return any(moment is not None and not moment.is_wall for moment in (self.start, self.stop))

    def within(self, other: Span, start: int) -> Span:
        """Return what both have, by the wall clock; what counts from the first sweep counts from `start` there."""
        ranges = [
            [moment if moment is None or moment.is_wall else Moment(start + moment.ns, is_wall=True) for moment in pair]
            for pair in ((self.start, other.start), (self.stop, other.stop))
        ]
        starts, stops = ([moment for moment in pair if moment is not None] for pair in ranges)
        return Span(max(starts, default=None), min(stops, default=None))

    def moved(self, ns: int) -> Span:
        """Return the same range for samples that start so many ns later: of what counts from the first sweep."""
        moments = (
            moment if moment is None or moment.is_wall else moment._replace(ns=moment.ns - ns)
            for moment in (self.start, self.stop)
        )
        return Span(*moments)

    def may_have(self, wall: tuple[int, int], since: tuple[int, int]) -> bool:
        """Whether it has any of the ns from first to last: of the wall clock, and since the first sweep."""
        return not (
            (self.start is not None and (wall if self.start.is_wall else since)[1] < self.start.ns)
            or (self.stop is not None and (wall if self.stop.is_wall else since)[0] >= self.stop.ns)
        )

    def find(self, samples: Samples) -> list[slice]:
        """Return which sweeps are in the range; several slices if the wall clock went back and passed it again."""
        inside = np.ones(len(samples) + 2, np.bool_)
        inside[[0, -1]] = False
        for moment, is_start in ((self.start, True), (self.stop, False)):
            if moment is not None and len(samples):
                clock = samples.wall_time if moment.is_wall else samples.time - samples.time[0]
                limit = min(max(moment.ns, _CLOCK.min), _CLOCK.max)
                inside[1:-1] &= clock >= limit if is_start else clock < limit
        edges = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
        return [slice(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def between(samples: Samples, span: Span) -> Samples:
    """Return the sweeps of a range of time; see `Samples.between`."""
    found = span.find(samples)
    if len(found) > 1:
        passes = " and ".join(f"samples[{one.start}:{one.stop}]" for one in found)
        raise ValueError(
            f"the wall clock was set back while these samples were taken, so that they pass this time {len(found)} "
            f"times: take {passes}, or give seconds from the start"
        )
    return samples[found[0] if found else slice(0)]


def take_sweeps(samples: Samples, key: Key) -> Samples:
    """Return the sweeps of a slice, as views, or those at ascending indices; see `Samples`."""
    kept: range | npt.NDArray[np.intp]
    if isinstance(key, slice):
        start, stop, step = key.indices(len(samples))
        if step <= 0:
            raise ValueError("samples are in the order of time: a slice's step must be positive")
        kept = range(start, stop, step)
    else:
        start, stop, step, kept = int(key[0]), int(key[-1]) + 1, 0, key
    part = replace(
        samples,
        groups=tuple(group.take_sweeps(key) for group in samples.groups),
        time=samples.time[key],
        sweep_ns=samples.sweep_ns[key],
        tick=samples.tick[key],
    )
    if (start, stop, step) == (0, len(samples), 1):
        return part
    if samples.wall_steps:
        before = ((sweep, offset) for sweep, offset in samples.wall_steps if sweep < stop)
        offsets = {0: samples.wall_offset} | {bisect_left(kept, sweep): offset for sweep, offset in before}
        part.wall_offset, part.wall_steps = find_steps(offsets, len(part))
    # Ticks that were missed before a sweep go with it, so that parts add up to the whole.
    part.missed = part.overruns = 0
    if stop > start:
        part.missed = _gaps(samples.tick[max(start - 1, 0) : stop])
        if not start:  # below 0 where a part of a recording is gone, whose ticks were sampled
            part.missed += max(samples.missed - _gaps(samples.tick), 0)
    part.errors = tuple(
        error._replace(sweep=bisect_left(kept, error.sweep)) for error in samples.errors if error.sweep < stop
    )
    return part


def _gaps(tick: npt.NDArray[np.uint64]) -> int:
    """Return how many ticks were missed between these; where they fall, a further run counts from 0."""
    signed = tick.astype(np.int64)
    gaps = np.diff(signed) - 1
    return int(np.where(gaps < 0, signed[1:], gaps).sum())


def resample(samples: Samples, interval: float, since: int | None = None) -> Samples:
    """Return the last sweep of each interval; see `Samples.resample`.

    Without a schedule intervals are counted from the first sweep, or the `time` of another.
    """
    seconds = check_seconds("interval", interval, _LONGEST, zero=False)
    new, old = round(seconds * 1e9), round(samples.interval * 1e9)
    if new < max(old, 1):
        raise ValueError(
            f"interval is {interval} s; these samples were taken each {samples.interval:g} s, and resample makes them "
            "fewer, not more"
        )
    if not len(samples):
        return replace(samples, interval=new / 1e9)
    # Without a schedule the clock says in which interval a sweep lies.
    clock = samples.tick if old else (samples.time - (samples.time[0] if since is None else since)).astype(np.uint64)
    ticks = _scale_ticks(clock, old or 1, new)
    last = np.append(np.flatnonzero(ticks[1:] != ticks[:-1]), len(ticks) - 1)
    part = take_sweeps(samples, find_key(last))
    part.tick = ticks[last]
    part.interval, part.missed, part.overruns = new / 1e9, _gaps(ticks[last]), 0
    if old:
        # Of ticks that are not known to be missed, because a part of a recording is gone, none counts.
        part.missed = min(part.missed + _count_outside(samples, part.tick, old, new), samples.missed)
    return part


def _count_outside(samples: Samples, ticks: npt.NDArray[np.uint64], old: int, new: int) -> int:
    """Return how many whole new intervals were missed before the first sweep, which is at `ticks`, and after the last.

    Ticks that were missed at neither side of a sweep were so before the first, or after the last if it had none before.
    """
    outside = max(samples.missed - _gaps(samples.tick), 0)
    first, last = int(samples.tick[0]), int(samples.tick[-1])
    before = min(first, outside)
    start, stop = -(-(first - before) * old // new), (last + 1 + outside - before) * old // new
    return max(int(ticks[0]) - start, 0) + max(stop - 1 - int(ticks[-1]), 0)


def _scale_ticks(tick: npt.NDArray[np.uint64], old: int, new: int) -> npt.NDArray[np.uint64]:
    """Return in which of the new intervals each tick lies, both in ns."""
    exact = tick if int(tick[-1]) * old < 1 << 64 else tick.astype(object)
    return (exact * old // new).astype(np.uint64)


def last_sweeps(samples: Samples) -> npt.NDArray[np.intp]:
    """Return the last sweep that could read each file, (files,); -1 if none could."""
    last = np.full(len(samples.files), len(samples) - 1, np.intp)
    for error in samples.errors:
        last[error.file] = min(error.sweep, len(samples)) - 1
    return last


def read_seconds(samples: Samples) -> npt.NDArray[np.float64]:
    """Return how long each file was read, from the first sweep to the last that could, (files,); NaN if no time."""
    time = samples.time if len(samples) else np.zeros(1, np.int64)
    seconds: npt.NDArray[np.float64] = (time[np.maximum(last_sweeps(samples), 0)] - time[0]) / 1e9
    seconds[seconds <= 0] = np.nan
    return seconds


def mean_rate(samples: Samples, name: str) -> npt.NDArray[np.float64]:
    """Return the change per second over the whole run; see `Samples.mean_rate`."""
    total, stat = samples.total(name), samples.stat(name)
    change = total.astype(np.float64) if stat.is_histogram else stat.scale_array(total)
    seconds = read_seconds(samples)[find_columns(samples.groups, name)]
    return change / seconds.reshape(-1, *[1] * (change.ndim - 1))


def _read_moment(name: str, value: When | None) -> Moment | None:
    """Return an argument as a moment; TypeError or ValueError if it is none, which names it."""
    if value is None:
        return None
    if isinstance(value, np.datetime64):
        return Moment(_read_datetime64(name, value), is_wall=True)
    if isinstance(value, datetime):
        if value != value:  # noqa: PLR0124 - pandas' NaT
            raise ValueError(f"{name} is {value}, which is no time")
        since = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)) - _EPOCH
        return Moment(since // timedelta(microseconds=1) * 1000 + getattr(value, "nanosecond", 0), is_wall=True)
    if isinstance(value, str):
        return Moment(_read_text(name, value), is_wall=True)
    try:
        seconds = check_seconds(name, value, _LONGEST, zero=True)
    except TypeError:
        wanted = "text such as '2026-11-27 14:00', a datetime, a datetime64, or seconds from the start"
        raise TypeError(f"{name} is {article(value)}; it must be {wanted}") from None
    return Moment(round(seconds * 1e9), is_wall=False)


def _read_text(name: str, text: str) -> int:
    """Return the ns since 1970 of a time in ISO 8601, in UTC unless it says where."""
    found = _FORM.fullmatch(text)
    error = "not of a known form"
    if found is not None:
        *fields, fraction, _, sign, hours, minutes = found.groups()
        year, month, day, hour, minute, second = (int(field or 0) for field in fields)
        try:
            moment = datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
        except ValueError as wrong:
            error = str(wrong)
        else:
            seconds = (moment - _EPOCH) // timedelta(seconds=1)
            ahead = int(hours) * 3600 + int(minutes) * 60 if sign else 0
            return (seconds + ahead * (1 if sign == "-" else -1)) * 10**9 + int((fraction or "").ljust(9, "0"))
    wanted = "it must be a date or time such as '2026-11-27', '2026-11-27 14:00' or '2026-11-27T14:00:05.5+01:00'"
    raise ValueError(f"{name} is {text!r}: {error}; {wanted}")


def _read_datetime64(name: str, value: np.datetime64) -> int:
    """Return the ns since 1970 of a datetime64 of any unit."""
    is_fine = np.datetime_data(value.dtype)[0] in ("ns", "ps", "fs", "as")  # none of these is out of range
    if np.isnat(value) or not (is_fine or isinstance(value.item(), date)):
        raise ValueError(f"{name} is {value}, which is no time from the year 1 to 9999")
    seconds = value.astype("datetime64[s]")
    rest = (value - seconds).astype("timedelta64[ns]").astype(np.int64)
    return int(seconds.astype(np.int64)) * 10**9 + int(rest)
