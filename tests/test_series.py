"""Changes, rates, resets and sums of many statistics at once, against numpy's, one statistic at a time."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import series_twin as twin
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from made import ODD, group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import series
from kvmstats_fast.testing import SyntheticStats

EDGES = np.array([0, 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
#: Every type with every scale: negative, positive and unknown ones; one that no float reaches.
SCALED = [replace(stat, name=f"{stat.name}{power}", exponent=power) for stat in ODD for power in (-9, 0, 10)]
SCALED.append(replace(ODD[0], exponent=32767))


def grown(rng, shape):
    """Counters that mostly grow, and now and then are cleared or jump to an edge."""
    values = np.cumsum(rng.integers(0, 1000, shape, np.uint64), axis=0)
    for odds, other in ((0.9, 0), (0.95, rng.choice(EDGES, shape)), (0.98, rng.integers(0, 2**64, shape, np.uint64))):
        np.copyto(values, other, where=rng.random(shape) > odds)
    return values


@st.composite
def tables(draw):
    """Statistics, their values and the time: in rows, by themselves, or as no sampler lays them out."""
    stats = draw(st.lists(st.sampled_from(SCALED), min_size=1, max_size=5, unique_by=lambda stat: stat.name))
    sweeps, files = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    way = draw(st.sampled_from(["rows", "columns", "transposed", "askew"]))
    sizes = [stat.size for stat in stats]
    starts = np.cumsum([1, *sizes])
    rows = grown(rng, (sweeps, files, starts[-1] + 1))
    values = []
    for stat, start in zip(stats, starts, strict=False):
        one = rows[:, :, start : start + stat.size]
        if way == "columns":
            one = one.copy()
        elif way == "transposed":
            one = np.asfortranarray(one)
        elif way == "askew":
            memory = np.empty(one.nbytes + 3, np.uint8)[3:].view(np.uint64)
            memory[:] = one.ravel()
            one = memory.reshape(one.shape)
        values.append(one if stat.shape else one[:, :, 0])
    time = np.cumsum(rng.choice([0, 1, 999, 10**6, 10**9 + 7], sweeps)).astype(np.int64)
    key = slice(draw(st.integers(0, 3)), None, draw(st.sampled_from([1, 1, 2, 3])))
    chosen = slice(draw(st.integers(0, 1)), None, draw(st.sampled_from([1, 1, 2])))
    return stats, [one[key, chosen] for one in values], time[key], draw(st.sampled_from([1, 200, 2000, 1 << 18]))


def assert_same(found, wanted):
    """Equal in type, shape and every bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


@examples(120)
@given(tables())
def test_all_at_once_are_to_the_last_bit_what_numpy_makes_of_each(table):
    """Whatever the types, scales, strides, resets, edges and tiles; also of no sweep, or of one."""
    stats, values, time, tile_bytes = table
    with mock.patch.object(series, "TILE_BYTES", tile_bytes):
        found = (
            series.gather(values),
            series.deltas(stats, values),
            series.rates(stats, values, time),
            series.resets(stats, values),
            series.totals(stats, values),
        )
    for stat, one, same, delta, rate, cleared, total in zip(stats, values, *found, strict=True):
        assert_same(same, one)
        assert_same(delta, twin.delta(stat, one))
        assert_same(rate, twin.rate(stat, one, time))
        assert_same(cleared, twin.find_resets(stat, one))
        wanted, overflowed = twin.total(stat, one)
        assert_same(total.values, wanted)
        assert total.overflowed == overflowed


@pytest.mark.parametrize("sweeps", range(2, 14))
def test_each_rate_of_one_file_is_by_its_own_seconds(sweeps):
    """However many there are: four at once, those that are left, or the last alone."""
    rng = np.random.default_rng(sweeps)
    values, time = grown(rng, (sweeps, 1)), np.cumsum(rng.integers(1, 10**9, sweeps))
    (rate,) = series.rates([ODD[0]], [values], time)
    assert_same(rate, twin.rate(ODD[0], values, time))


def odd_run(failed=()):
    """Samples of every kind of statistic, of files of two kernels, whose columns alternate."""
    rng = np.random.default_rng(5)
    kernels = []
    for files, stats in (([0, 2], ODD), ([1, 3, 4], [*ODD[3:], ODD[0]])):
        shape = (50, len(files))
        values = {stat.name: grown(rng, shape + stat.shape) for stat in stats}
        kernels.append(group_of(stats, files, values))
    return run_of(*kernels, times=np.cumsum(rng.integers(0, 10**9, 50)), failed=failed)


@pytest.mark.parametrize("failed", [[], [(0, 7), (3, 20), (4, 0)]])
def test_rates_are_those_of_each_statistic(failed):
    """Of several kernels, and of files that failed, as `rate` and numpy have them."""
    x = odd_run(failed)
    rates = x.rates()
    assert list(rates) == list(x.names)
    for name, rate in rates.items():
        assert_same(rate, x.rate(name))
        wanted = twin.rate(x.stat(name), x[name], x.time)
        for file, sweep in failed:
            places = [i for i, info in enumerate(x.columns(name)) if info == x.files[file]]
            wanted[max(sweep - 1, 0) :, places] = np.nan
        assert_same(rate, wanted)


def test_rates_are_asked_for_by_names_and_globs():
    """In their order, each once; what fits nothing is an error, and so is a name of VM and vCPU files."""
    x = odd_run()
    assert list(x.rates("wait_ns")) == ["wait_ns"]
    assert list(x.rates(["several", "w*", "wait_ns"])) == ["several", "wait_ns", "wait_hist"]
    assert x.rates([]) == {}
    with pytest.raises(KeyError, match="did you mean exits"):
        x.rates(["gauge", "exit"])
    with pytest.raises(TypeError, match="names is an int"):
        x.rates(5)
    with (
        SyntheticStats(stats=ODD, kind="vm") as vm,
        SyntheticStats(stats=ODD) as vcpu,
        vm.open() as a,
        vcpu.open() as b,
    ):
        both = kf.Sampler([a, b]).run(0, count=2)
    with pytest.raises(KeyError, match="VM and in vCPU files"):
        both.rates()
    assert list(both.vm.rates()) == [*both.names]
