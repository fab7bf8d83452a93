"""Which sweeps, and over how long: ranges of time, a sweep a second, mean rates."""

import itertools
import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction

import made
import numpy as np
import pandas as pd
import pytest
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest, counts_right, exit_counter

COUNTER = kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
STATS = (
    COUNTER,
    replace(COUNTER, name="wait_ns", unit=kf.StatUnit.SECONDS, exponent=-9),
    replace(COUNTER, name="gauge", type=kf.StatType.INSTANT),
    replace(COUNTER, name="wait_hist", type=kf.StatType.LOG_HIST, unit=kf.StatUnit.SECONDS, exponent=-9, size=3),
)
NOON = datetime(2026, 11, 27, 12, tzinfo=timezone.utc)
NOON_NS = int(NOON.timestamp()) * 10**9


def samples_of(values, failed=(), **about):
    """Samples of `exits` (T, n), the other statistics made of it."""
    values = np.array(values, np.uint64).reshape(len(values), np.shape(values)[1])
    columns = dict.fromkeys(("exits", "wait_ns", "gauge"), values)
    columns["wait_hist"] = np.stack([values, values // 2, np.zeros_like(values)], axis=2)
    about = {"interval": 1.0, "wall_offset": NOON_NS} | about
    return made.run_of(made.group_of(STATS, range(values.shape[1]), columns), failed=failed, **about)


# ---- ranges of time


STEPS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([-7, -2, -1, 1, 5, 3600])), max_size=3)


@examples(100)
@given(STEPS, st.lists(st.integers(-9, 25), min_size=2, max_size=4), st.booleans())
def test_a_range_has_the_sweeps_whose_own_clock_lies_in_it(steps, limits, by_wall):
    """Each chunk's clock counts; adjacent ranges share no sweep and leave none out; a clock set back is told."""
    parts = []
    for i in range(12):
        part = samples_of([[i]], times=[i * 10**9 + 5 * 10**12], ticks=[i])
        part.wall_offset += sum(by for at, by in steps if at <= i) * 10**9 - 5 * 10**12
        parts.append(part)
    x = kf.Samples.concatenate(parts)
    clock = [(int(wall) - NOON_NS) / 1e9 for wall in x.wall_time] if by_wall else [float(i) for i in range(12)]
    limits = sorted(limits if by_wall else {abs(limit) for limit in limits})
    taken = []
    for low, high in itertools.pairwise([None, *limits, None]):
        inside = [i for i, at in enumerate(clock) if (low is None or low <= at) and (high is None or at < high)]
        start, stop = (one if one is None or not by_wall else NOON + timedelta(seconds=one) for one in (low, high))
        if inside and inside != list(range(inside[0], inside[-1] + 1)):
            with pytest.raises(ValueError, match=rf"set back .* take samples\[{inside[0]}:"):
                x.between(start, stop)
            return
        part = x.between(start, stop)
        assert part["exits"].ravel().tolist() == inside
        made.assert_same(part, x[inside[0] : inside[-1] + 1] if inside else x[:0])
        assert not inside or np.shares_memory(part["exits"], x["exits"])
        taken += inside
    assert sorted(taken) == list(range(12))


@pytest.mark.parametrize(
    "when",
    [
        "2026-11-27 12:00:03",
        "2026-11-27T12:00:03.000000000Z",
        "2026-11-27 13:00:03+01:00",
        "2026-11-27 06:30:03.0 -0530",
        NOON + timedelta(seconds=3),
        (NOON + timedelta(seconds=3)).replace(tzinfo=None),
        (NOON + timedelta(seconds=3)).astimezone(timezone(timedelta(hours=-9))),
        np.datetime64("2026-11-27T12:00:03"),
        np.datetime64("2026-11-27T12:00:03", "ns"),
        pd.Timestamp("2026-11-27 12:00:03"),
        pd.Timestamp("2026-11-27 21:00:03", tz="Asia/Tokyo"),
        3,
        np.float32(3),
        Fraction(3),
    ],
)
def test_a_time_is_said_in_many_ways(when):
    """Text, datetime and datetime64 of any zone and unit, pandas' timestamps, seconds: to the nanosecond."""
    at = 3 * 10**9
    x = samples_of([[0], [1], [2], [3]], times=[0, at - 1, at, at + 1])
    assert x.between(when)["exits"].ravel().tolist() == [2, 3]
    assert x.between(None, when)["exits"].ravel().tolist() == [0, 1]


def test_a_time_is_read_to_the_nanosecond():
    """As tables print it, and as pandas and numpy have it; a date is its first moment."""
    x = samples_of([[i] for i in range(4)], times=[0, 1, 2, 3])
    for when in ("2026-11-27 12:00:00.000000002", pd.Timestamp(NOON_NS + 2), np.datetime64(NOON_NS + 2, "ns"), 2e-9):
        assert x.between(when)["exits"].ravel().tolist() == [2, 3]
    assert len(x.between("2026-11-27", "2026-11-28")) == len(x.between(np.datetime64("2026-11"))) == 4
    assert len(x.between("2026-11-28")) == len(x.between(None, "2026-11-27")) == len(x[:0].between(0, 1)) == 0
    assert len(x.between("0001-01-01", "9999-12-31")) == 4


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (("14:00",), ValueError, "start is '14:00': not of a known form; it must be a date or time such as"),
        (("2026-13-01",), ValueError, "start is '2026-13-01': month must be in 1..12"),
        (("now",), ValueError, "start is 'now'"),
        (("2026-11-27 14:00 CET",), ValueError, "not of a known form"),
        (("",), ValueError, "not of a known form"),
        ((np.datetime64("NaT", "ns"),), ValueError, "start is NaT, which is no time"),
        ((None, pd.NaT), ValueError, "stop is NaT, which is no time"),
        ((np.datetime64(2**62, "D"),), ValueError, "no time from the year 1 to 9999"),
        ((-1,), ValueError, "start is -1; it must be 0 or more seconds"),
        ((math.nan,), ValueError, "start is nan"),
        (([1],), TypeError, "start is a list; it must be text such as '2026-11-27 14:00', a datetime"),
        ((b"2026",), TypeError, "start is a bytes; it must be text"),
        ((5, 4), ValueError, "start is 5, which is after stop, 4"),
        (("2026-11-27", "2026-11-26"), ValueError, "start is 2026-11-27, which is after stop, 2026-11-26"),
    ],
)
def test_what_is_no_time_is_refused_by_name(limits, error, message):
    """A time without a day, what no calendar has, NaT and NaN, and a range that is the wrong way round."""
    with pytest.raises(error, match=message):
        samples_of([[0], [1]]).between(*limits)


# ---- a sweep a second


def naive_resample(ticks, missed, old, new):
    """Which sweeps are the last of each new interval, the numbers of these, and how many there are without one."""
    number = [tick * old // new for tick in ticks]
    last = [i for i, one in enumerate(number) if i + 1 == len(number) or number[i + 1] != one]
    return last, [number[i] for i in last], {tick * old // new for tick in missed} - set(number)


@examples(150)
@given(
    st.lists(st.booleans(), min_size=1, max_size=80),
    st.sampled_from([(10, 10), (10, 30), (100, 1000), (7, 100), (333_333, 10**6), (10**6, 10**9)]),
    st.integers(0, 79),
)
def test_resampling_keeps_the_last_sweep_of_each_interval_and_counts_those_without_one(taken, intervals, cut):
    """Every tick is taken or missed; at the new interval too, and in every part that is cut out at a full interval."""
    old, new = intervals
    ticks = [tick for tick, was_taken in enumerate(taken) if was_taken]
    missed = set(range(len(taken))) - set(ticks)
    times = [tick * old * 1000 + tick % 3 for tick in ticks]
    x = samples_of(np.reshape(ticks, (-1, 1)), times=times, ticks=ticks)
    x.interval, x.missed, x.overruns = old / 1e6, len(missed), len(missed)
    if not ticks:
        assert len(x.resample(new / 1e6)) == 0
        return
    y = x.resample(new / 1e6)
    last, numbers, without = naive_resample(ticks, missed, old, new)
    assert y["exits"].ravel().tolist() == [ticks[i] for i in last]
    assert y.tick.tolist() == numbers
    assert y.tick.dtype == np.uint64
    assert (y.interval, y.overruns) == (pytest.approx(new / 1e6), 0)
    whole = {tick for tick in without if (tick + 1) * new <= len(taken) * old or tick < numbers[-1]}
    assert y.missed == len(whole)
    for name in ("time", "sweep_ns", "wall_time"):
        assert getattr(y, name).tolist() == getattr(x, name)[last].tolist()
    if old == new:
        made.assert_same(y, replace(x, overruns=0))
    made.assert_same(y.resample(new * 5 / 1e6), x.resample(new * 5 / 1e6))
    # Cut where an interval ends, parts resampled are the whole resampled; but a part does not know which ticks were
    # missed behind the last sweep, and which before the first.
    if not taken[-1]:
        return
    at = next((i for i in range(min(cut, len(ticks)), 0, -1) if i - 1 in last), 0)
    parts = [part.resample(new / 1e6) for part in (x[:at], x[at:]) if len(part)]
    made.assert_same(kf.Samples.concatenate(parts), y)


def test_without_a_schedule_the_clock_says_which_second_it_is():
    """Of sweeps as fast as possible, the last before each second since the first; a second without one is missed."""
    start = 12_345_678_901
    times = [start + at for at in (0, 1, 10**9 - 1, 10**9, 4 * 10**9 + 3, 4 * 10**9 + 9)]
    x = samples_of(np.arange(6)[:, None], times=times, interval=0.0)
    y = x.resample(1)
    assert y["exits"].ravel().tolist() == [2, 3, 5]
    assert (y.tick.tolist(), y.missed, y.interval) == ([0, 1, 4], 2, 1.0)


def test_resampled_samples_keep_failures_and_clocks(tmp_path):
    """Several chunks with a clock each and a file that fails: saved and loaded, and joined, they say the same."""
    values = np.arange(200).reshape(100, 2)
    values[37:, 1] = 0
    x = samples_of(values, failed=[(1, 37)], ticks=range(100), interval=0.1, times=np.arange(100) * 10**8)
    x.wall_steps = ((23, NOON_NS + 10**9), (24, NOON_NS), (55, NOON_NS - 5))
    y = x.resample(1.0)
    last = [*range(9, 100, 10)]
    assert y.wall_time.tolist() == x.wall_time[last].tolist()
    assert [(error.file, error.sweep) for error in y.errors] == [(1, 3)]
    assert y.delta("exits").tolist() == [[20, 20], [20, 20], *[[20, 0]] * 7]
    assert np.shares_memory(y["exits"], x["exits"])
    made.assert_same(kf.Samples.concatenate([x[:50].resample(1), x[50:].resample(1)]), y)
    for name in ("run", "run.npz"):
        y.save(tmp_path / name)
        made.assert_same(kf.Samples.load(tmp_path / name), y)
    assert y.between("2026-11-27 12:00:04", "2026-11-27 12:00:06")["exits"][:, 0].tolist() == [98, 118]


def test_a_part_that_is_gone_from_a_recording_was_not_missed():
    """Its ticks were taken; neither they nor intervals of them are counted as missed."""
    x = samples_of(
        np.arange(4)[:, None], ticks=[0, 1, 900, 901], interval=0.01, times=[0, 10**7, 9 * 10**9, 9 * 10**9 + 10**7]
    )
    assert (x.missed, x.resample(1).missed, x.resample(1).tick.tolist()) == (0, 0, [0, 9])


def test_ticks_missed_before_a_part_count_where_they_fill_an_interval():
    """Those of an interval whose start was sampled before are not a whole one; those after the last sweep neither."""
    for first, missed, without in ((15, 10, 0), (15, 15, 1), (25, 15, 1), (25, 16, 1), (35, 26, 2), (30, 21, 2)):
        x = samples_of([[0], [1]], ticks=[first, first + 1])
        x.missed = missed
        assert x.resample(10).missed == without
    x = samples_of([[0], [1]], ticks=[0, 1])
    for missed, without in ((17, 0), (18, 1), (27, 1), (28, 2)):
        x.missed = missed
        assert x.resample(10).missed == without


def test_ticks_beyond_what_an_int64_of_ns_counts_are_resampled_exactly():
    """A tick has 64 bits, whatever its interval."""
    ticks = [2**61, 2**61 + 59, 2**61 + 60, 2**64 - 1]
    y = samples_of(np.arange(4)[:, None], ticks=ticks).resample(60)
    assert y.tick.tolist() == [*dict.fromkeys(tick // 60 for tick in ticks)]


@pytest.mark.parametrize(
    ("interval", "error"), [(0.5, ValueError), (0, ValueError), (-1, ValueError), ("1s", TypeError), (None, TypeError)]
)
def test_resampling_makes_sweeps_fewer(interval, error):
    """A shorter interval, or none, is refused by name."""
    with pytest.raises(error, match="interval is"):
        samples_of([[0], [1]]).resample(interval)


# ---- totals by time


@examples(80)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([1, 10**6, 10**9, 7 * 10**9]), st.booleans()), max_size=12),
    st.none() | st.integers(0, 12),
)
@example([(50, 10**9, False)] * 10 + [(1, 10**11, True)], None)
def test_a_mean_rate_is_all_that_was_counted_by_the_time_it_took(steps, fails):
    """Whatever ticks were missed, and whenever a counter was cleared; of a file that failed until then."""
    values, times, counted = [0], [0], [0]
    for grown, by, is_cleared in steps:
        values.append(values[-1] + grown if not is_cleared else min(values[-1] // 2, grown))
        is_reset = values[-1] < values[-2]
        counted.append(counted[-1] + (values[-1] if is_reset else values[-1] - values[-2]))
        times.append(times[-1] + by)
    end = len(values) - 1 if fails is None else min(fails, len(values)) - 1
    failed = [(1, fails)] if fails is not None and fails < len(values) else []
    x = samples_of([[value] * 2 for value in values], failed=failed, times=times)
    assert x.elapsed == times[-1] / 1e9

    def rate(counted, time):
        return counted / (time / 1e9) if time > 0 else math.nan

    expected = [rate(counted[-1], times[-1]), rate(counted[end], times[end]) if end >= 0 else math.nan]
    np.testing.assert_allclose(x.mean_rate("exits"), expected, rtol=1e-12)
    np.testing.assert_allclose(x.mean_rate("wait_ns"), [one / 1e9 for one in expected], rtol=1e-12)
    net = [rate(values[-1], times[-1]), rate(values[end], times[end]) if end >= 0 else math.nan]
    np.testing.assert_allclose(x.mean_rate("gauge"), net, rtol=1e-12)
    np.testing.assert_allclose(x.mean_rate("wait_hist")[:, 0], expected, rtol=1e-12)
    assert x.mean_rate("wait_hist").shape == (2, 3)
    np.testing.assert_allclose(x.mean_rate("exits"), x.figures()["exits/s"].values, rtol=1e-12)


def test_no_time_has_no_mean_rate():
    """No sweep and one sweep: NaN, and 0 seconds."""
    x = samples_of([[1, 2], [3, 4]])
    for part in (x[:0], x[:1]):
        assert part.elapsed == 0
        assert np.isnan(part.mean_rate("exits")).tolist() == [True, True]
        assert np.isnan(part.mean_rate("wait_hist")).all()


@pytest.mark.real_vm
def test_the_mean_of_rates_is_wrong_where_ticks_are_missed_and_the_mean_rate_is_not(resources):
    """A real guest runs between two sweeps of a run that lacks most of its ticks."""
    guest = resources.enter_context(TinyGuest(1))
    files = [resources.enter_context(file) for file in guest.open_stats()]
    sampler = kf.Sampler(files)
    parts = [sampler.run(0, count=50)]
    guest.run(5000, 0)
    parts.append(sampler.run(0, count=50))
    x = kf.Samples.concatenate(parts)
    name = exit_counter()
    change = {stat: int(x.vcpu.total(stat)[0]) for stat in x.vcpu.names if not x.vcpu.stat(stat).shape}
    assert counts_right(change, 5000)
    assert x.mean_rate(name) * x.elapsed == pytest.approx([change[name]])
    v = x.select(name)
    assert v.between(0, v.elapsed + 1).mean_rate(name) == x.mean_rate(name)
    assert x.vcpu.rate(name).mean() != pytest.approx(x.mean_rate(name)[0], rel=0.5)
