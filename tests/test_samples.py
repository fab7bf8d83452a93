"""What a run gives: changes, rates, resets, base units, parts and wholes."""

import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from made import group_of, run_of
from strategies import valid_files

import kvmstats_fast as kf
from kvmstats_fast import series
from kvmstats_fast.testing import SyntheticStats

STATS = [
    kf.Stat("count", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("gauge", kf.StatType.INSTANT, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("peak", kf.StatType.PEAK, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
    kf.Stat("time", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 3, -1),
    kf.Stat("odd", 9, kf.StatUnit.NONE, kf.StatBase.POW10, 3, 1, -1),
]


def samples_of(rows, *, times=None, ticks=None, failed=()):
    """Samples of vCPUs with rows[t][file] = {name: value}, made by hand."""
    values = {}
    for stat in STATS:
        column = values[stat.name] = np.zeros((len(rows), len(rows[0]), *stat.shape), np.uint64)
        for t, row in enumerate(rows):
            for file, named in enumerate(row):
                column[t, file] = named.get(stat.name, 0)
    return run_of(group_of(STATS, range(len(rows[0])), values), times=times, ticks=ticks, failed=failed)


def test_values_are_views_of_one_array():
    """x[name] is (T, n) or (T, n, buckets) and shares memory with every other view; slices do too."""
    x = samples_of([[{"count": i, "hist": [i, 0, 1]}, {}] for i in range(5)])
    assert (x["count"].shape, x["hist"].shape, len(x)) == ((5, 2), (5, 2, 3), 5)
    assert x["count"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(x["count"], x["count"])
    part = x[1:4]
    assert np.shares_memory(part["count"], x["count"])
    assert part["count"][:, 0].tolist() == [1, 2, 3]
    assert np.shares_memory(part.time, x.time)


def test_a_growing_counter_that_falls_was_reset_and_its_change_is_the_new_value():
    """A negative delta of a cumulative or peak value is a reset, of 64-bit counters above 2^53 too."""
    big = 2**63 + 5
    x = samples_of([[{"count": v, "peak": v}] for v in (10, 15, 3, 3, big, 7)])
    for name in ("count", "peak"):
        assert x.delta(name)[:, 0].tolist() == [5, 3, 0, big - 3, 7]
        assert x.delta(name).dtype == np.uint64
        assert x.resets(name)[:, 0].tolist() == [False, True, False, False, True]


def test_a_gauge_goes_up_and_down_without_a_reset():
    """Deltas of INSTANT statistics, and of types not known, are signed."""
    x = samples_of([[{"gauge": v, "odd": v}] for v in (10, 15, 3)])
    for name in ("gauge", "odd"):
        assert x.delta(name)[:, 0].tolist() == [5, -12]
        assert x.delta(name).dtype == np.int64
        assert not x.resets(name).any()
        assert x.resets(name).shape == (2, 1)


def test_a_histogram_is_reset_as_a_whole():
    """One bucket that fell makes the change of every bucket its new value, for that file alone."""
    rows = [[{"hist": [5, 5, 5]}, {"hist": [1, 1, 1]}], [{"hist": [6, 0, 5]}, {"hist": [1, 2, 1]}]]
    x = samples_of(rows)
    assert x.delta("hist").tolist() == [[[6, 0, 5], [0, 1, 0]]]
    assert x.resets("hist").tolist() == [[True, False]]


def test_rates_are_in_base_units_per_second():
    """Nanoseconds per second become s/s, KiB become bytes, counts stay counts, unknown codes stay raw."""
    rows = [[{}], [{"count": 10, "time": 500_000_000, "peak": 3, "hist": [2, 4, 6], "gauge": 1, "odd": 7}], [{}]]
    x = samples_of(rows, times=[0, 2 * 10**9, 4 * 10**9])
    assert x.rate("count")[0] == 5
    assert x.rate("time")[0] == 0.25
    assert x.rate("peak")[0] == 3 * 1024 / 2
    assert x.rate("hist")[0].tolist() == [[1, 2, 3]]
    assert x.rate("gauge")[:, 0].tolist() == [0.5, -0.5]
    assert x.rate("odd")[0] == 3.5
    assert x.rate("count").dtype == np.float64


def test_a_failed_file_has_no_changes_and_no_rates():
    """From the sweep at which it failed deltas are 0, resets False and rates NaN; other columns are untouched."""
    rows = [[{"count": 10, "hist": 9}, {"count": 10}], [{"count": 20}, {"count": 20}], [{}, {"count": 30}], [{}, {}]]
    x = samples_of(rows, failed=[(0, 2)])
    assert x.delta("count").tolist() == [[10, 10], [0, 10], [0, 0]]
    assert x.resets("count").tolist() == [[False, False], [False, False], [False, True]]
    assert np.isnan(x.rate("count")).tolist() == [[False, False], [True, False], [True, False]]
    assert np.isnan(x.rate("hist")[1:, 0]).all()
    assert x[2:].errors[0].sweep == 0
    assert x[:2].errors == ()
    assert x[::2].errors[0].sweep == 1


def test_parts_put_together_are_the_whole():
    """Slices concatenate to what they were cut from; missed ticks add up; one part alone is not copied."""
    x = samples_of([[{"count": i}] for i in range(9)], ticks=[0, 1, 2, 5, 6, 7, 8, 10, 11])
    x.missed = 3
    for cuts in ((4, 6), (3, 7), (1, 2)):
        parts = [x[: cuts[0]], x[cuts[0] : cuts[1]], x[cuts[1] :]]
        whole = kf.Samples.concatenate(parts)
        assert whole["count"].tolist() == x["count"].tolist()
        assert whole.tick.tolist() == x.tick.tolist()
        assert whole.missed == x[:].missed == 3
    assert [part.missed for part in (x[:3], x[3:7], x[7:])] == [0, 2, 1]
    x.missed = 5  # two before the first, as a stream's chunk may have
    assert [part.missed for part in (x[:3], x[3:7], x[7:])] == [2, 2, 1]
    assert kf.Samples.concatenate([x]) is x


def test_parts_of_runs_put_together_tell_what_each_missed():
    """Their ticks begin anew with each run, and a run may have missed its first ones: none is less than 0."""
    first = samples_of([[{"count": i}] for i in range(3)], ticks=[0, 2, 3])
    second = samples_of([[{"count": i}] for i in range(3)], ticks=[1, 2, 5])
    first.missed, second.missed = 1, 3
    second.time += first.time[-1]
    x = kf.Samples.concatenate([first, second])
    assert [part.missed for part in (x[:2], x[2:4], x[4:])] == [1, 1, 2]
    assert [part.missed for part in (x[:3], x[3:])] == [1, 3]
    x.missed = 0  # as of a recording that lacks a part
    assert [part.missed for part in (x[:1], x[1:])] == [0, 4]


def test_parts_that_do_not_belong_together_are_refused():
    """No parts, other files, or the wrong order are ValueErrors."""
    x = samples_of([[{"count": i}] for i in range(4)])
    other = samples_of([[{"count": i}, {}] for i in range(4)])
    with pytest.raises(ValueError, match="no samples"):
        kf.Samples.concatenate([])
    with pytest.raises(ValueError, match="different files: 1 and then 2 files"):
        kf.Samples.concatenate([x, other])
    with pytest.raises(ValueError, match="order of time"):
        kf.Samples.concatenate([x[2:], x[:2]])
    for what, old, new in (("host", "here", "another"), ("kernel", "", "6.1 x86_64"), ("interval", 0.0, 0.5)):
        with pytest.raises(ValueError, match=f"differ in their {what}: {old!r} and then {new!r}"):
            kf.Samples.concatenate([x[:2], replace(x[2:], **{what: new})])
    few = run_of(group_of(STATS[:1], [0], {"count": [[1]]}), times=[9 * 10**9])
    with pytest.raises(ValueError, match="different statistics or kernels"):
        kf.Samples.concatenate([x, few])
    with pytest.raises(ValueError, match="must be positive"):
        x[::-1]
    with pytest.raises(TypeError, match="3 is neither"):
        x[3]


def test_ticks_of_runs_put_together_ascend():
    """A run that counted from 0 again is counted on from the last tick, also behind an empty part; others stay."""
    runs = [samples_of([[{}]] * len(ticks), ticks=ticks) for ticks in ([0, 2, 3], [9], [1, 2, 5], [11, 12], [12])]
    for i, run in enumerate(runs):
        run.time += i * 10**10
    runs[1] = runs[1][:0]
    assert kf.Samples.concatenate(runs).tick.tolist() == [0, 2, 3, 5, 6, 9, 11, 12, 25]
    assert kf.Samples.concatenate(runs[::2]).tick.dtype == np.uint64
    assert runs[2].tick.tolist() == [1, 2, 5]
    last = samples_of([[{}]], times=[10**12], ticks=[2**64 - 1])
    assert kf.Samples.concatenate([runs[0], last]).tick.tolist() == [0, 2, 3, 2**64 - 1]
    with pytest.raises(ValueError, match="tick 0 of a later part cannot be counted on"):
        kf.Samples.concatenate([last, samples_of([[{}]], times=[10**13])])


def test_a_file_that_failed_and_came_back_is_not_joined_over():
    """Values that were read are never marked as failed; of a file that stays failed all parts can be joined."""
    rows = [[{}, {}]] * 4
    failed, alive = samples_of(rows, failed=[(1, 2)]), samples_of(rows)
    alive.time += 10**10
    assert kf.Samples.concatenate([failed[:3], failed[3:]]).errors == failed.errors
    assert kf.Samples.concatenate([failed, alive[:0]]).errors == failed.errors
    with pytest.raises(ValueError, match=r"kvm-1/vcpu-1 failed in the earlier part \(.*gone\) and was read again"):
        kf.Samples.concatenate([failed, alive])


CUTS = st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 4)).map(lambda cut: slice(*cut))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(-(10**18), 10**18)), max_size=4), CUTS, st.integers(0, 9))
@examples(200)
def test_each_sweep_keeps_its_wall_clock(steps, cut, at):
    """Whatever is cut out and put together again, every sweep has the offset that held when it was taken."""
    parts = [samples_of([[{"count": i}]], times=[i * 10**9], ticks=[i]) for i in range(9)]
    offset = 10**18
    for i, part in enumerate(parts):
        offset = dict(steps).get(i, offset)
        part.wall_offset = offset
    wall = [int(part.time[0]) + part.wall_offset for part in parts]
    x = kf.Samples.concatenate(parts)
    assert (x.wall_time.tolist(), x.wall_time.dtype) == (wall, np.int64)
    assert x[cut].wall_time.tolist() == wall[cut]
    assert x.vcpu[cut][:].wall_time.tolist() == wall[cut]
    assert all(0 < sweep < len(x[cut]) for sweep, _ in x[cut].wall_steps)
    assert len(x.wall_steps) < max(2, len(dict(steps)) + 1)
    assert kf.Samples.concatenate([x[:at], x[at:]]).wall_steps == x.wall_steps
    assert x.to_xarray()["time"].values.view(np.int64).tolist() == wall


def test_a_name_in_vm_and_vcpu_files_must_be_asked_for_by_kind():
    """x[name] does not guess; x.vm and x.vcpu have their own files' columns."""
    with SyntheticStats(stats=STATS, kind="vm") as vm, SyntheticStats(stats=STATS) as vcpu:
        vm.set("count", 1)
        vcpu.set("count", 2)
        with vm.open() as a, vcpu.open() as b:
            x = kf.Sampler([b, a]).run(0, count=2)
            with pytest.raises(KeyError, match=r"samples\.vm\['count'\]"):
                x["count"]
            assert x.vm["count"].tolist() == [[1], [1]]
            assert x.vcpu["count"].tolist() == [[2], [2]]
            assert [info.kind for info in x.vm.columns("count")] == ["vm"]
            assert [info.kind for info in x.vcpu.files] == ["vcpu"]
            assert "1 VM and 0 vCPU files" in repr(x.vm)
            assert x.vcpu.delta("count").tolist() == [[0]]
            with pytest.raises(KeyError, match="did you mean count"):
                x["counts"]


def test_the_descriptor_of_a_sampled_statistic_is_at_hand():
    """names, stat and columns say what was sampled."""
    x = samples_of([[{}, {}]])
    assert x.names == tuple(stat.name for stat in STATS)
    assert x.stat("time").exponent == -9
    assert [info.vcpu_id for info in x.columns("time")] == [0, 1]


def test_repr_is_a_sentence_a_person_can_read():
    """How many sweeps of what, how long, what was missed."""
    x = samples_of([[{}, {}]] * 3)
    assert repr(x) == "<Samples: 3 sweeps of 0 VM and 2 vCPU files in 2 s, 6 statistics, 0 ticks missed>"
    assert "0 sweeps" in repr(x[:0])
    assert x[:0].delta("count").shape == (0, 2)
    assert x[:1].rate("hist").shape == (0, 2, 3)


# ---- against plain Python

#: unit, base, exponent, and what a raw value is multiplied with
SCALES = [
    (kf.StatUnit.NONE, kf.StatBase.POW10, 0, Fraction(1)),
    (kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, Fraction(1, 10**9)),
    (kf.StatUnit.SECONDS, kf.StatBase.POW10, 3, Fraction(1000)),
    (kf.StatUnit.BYTES, kf.StatBase.POW2, 10, Fraction(1024)),
    (kf.StatUnit.BYTES, kf.StatBase.POW2, -3, Fraction(1, 8)),
    (kf.StatUnit.SECONDS, kf.StatBase.POW10, 30, Fraction(10**30)),
    (kf.StatUnit.NONE, 7, -3, Fraction(1)),  # no such base: raw
]
TYPES = [*kf.StatType, 9]
GROWING = (kf.StatType.CUMULATIVE, kf.StatType.PEAK, kf.StatType.LINEAR_HIST, kf.StatType.LOG_HIST)
WORDS = st.one_of(st.integers(0, 3), st.integers(0, 1000), st.sampled_from([2**53 + 1, 2**63, 2**64 - 1]))
FIRST, LAST = (replace(STATS[0], name=name) for name in ("first", "last"))


@st.composite
def scaled_stats(draw):
    """A statistic of any type and scale, and what its raw values are multiplied with."""
    type_ = draw(st.sampled_from(TYPES))
    unit, base, exponent, scale = draw(st.sampled_from(SCALES))
    size = draw(st.integers(1, 3)) if type_ in (kf.StatType.LINEAR_HIST, kf.StatType.LOG_HIST) else 1
    width = int(type_ == kf.StatType.LINEAR_HIST)
    return kf.Stat("x", type_, unit, base, exponent, size, -1, width), Fraction(1) if type_ == 9 else scale


@st.composite
def runs(draw):
    """A statistic, its scale, its readings, when they were taken, and which files failed when."""
    stat, scale = draw(scaled_stats())
    sweeps, n = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    values = [[[draw(WORDS) for _ in range(stat.size)] for _ in range(n)] for _ in range(sweeps)]
    steps = draw(st.lists(st.sampled_from([0, 1, 999, 10**9, 3 * 10**9]), min_size=sweeps, max_size=sweeps))
    failed = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 12)), max_size=2, unique_by=lambda f: f[0]))
    failed = [(file, sweep) for file, sweep in failed if sweep < sweeps]
    return (
        stat,
        scale,
        np.array(values, np.uint64).reshape(sweeps, n, stat.size),
        list(itertools.accumulate(steps)),
        failed,
    )


def run_with(drawn, storage):
    """Samples of such a run: in a block its values stand between others."""
    stat, _, values, times, failed = drawn
    values = values.reshape(*values.shape[:2], *stat.shape)
    group = group_of([FIRST, stat, LAST], range(values.shape[1]), {"x": values}, storage=storage)
    return run_of(group, times=times, failed=failed)


STORAGES = st.sampled_from(["block", "columns"])
SLICES = st.builds(slice, *[st.one_of(st.none(), st.integers(-13, 13))] * 2, st.sampled_from([None, None, 1, 2, 3, 5]))


@examples(150)
@given(runs(), SLICES, STORAGES, st.sampled_from([1, 16, 50, 100, 1 << 18]))
def test_changes_rates_and_resets_are_those_of_each_pair_of_sweeps(drawn, key, storage, tile_bytes):
    """Whatever the type, scale, tiles and steps: each change is the difference of two readings, in plain integers."""
    stat, scale, values, times, failed = drawn
    with mock.patch.object(series, "TILE_BYTES", tile_bytes):
        x = run_with(drawn, storage)[key]
        delta, rate, resets = x.delta("x"), x.rate("x"), x.resets("x")
    kept = range(len(values))[key]
    growing = stat.type in GROWING
    n = values.shape[1]
    shape = (max(len(kept) - 1, 0), n, *stat.shape)
    assert (delta.shape, rate.shape, resets.shape) == (shape, shape, shape[:2])
    assert (delta.dtype, rate.dtype, resets.dtype) == (np.uint64 if growing else np.int64, np.float64, np.bool_)
    assert x["x"].tolist() == values[key].reshape(len(kept), n, *stat.shape).tolist()
    for row, (t0, t1) in enumerate(itertools.pairwise(kept)):
        for file in range(n):
            before, after = values[t0, file].tolist(), values[t1, file].tolist()
            fell = growing and any(b > a for b, a in zip(before, after, strict=True))
            changes = [a if fell else a - b for b, a in zip(before, after, strict=True)]
            if not growing:
                changes = [(change + 2**63) % 2**64 - 2**63 for change in changes]
            if t1 >= dict(failed).get(file, len(values)):
                fell, changes = False, [0] * stat.size
            assert np.ravel(delta[row, file]).tolist() == changes
            assert resets[row, file] == fell
            seconds = Fraction(times[t1] - times[t0], 10**9)
            known = seconds and t1 < dict(failed).get(file, len(values))
            for change, said in zip(changes, np.ravel(rate[row, file]), strict=True):
                true = float(change * (1 if stat.is_histogram else scale) / seconds) if known else math.nan
                assert said == pytest.approx(true, rel=1e-14, abs=0, nan_ok=True)


@examples(60)
@given(runs(), st.sampled_from([1, 50, 100, 1 << 18]), STORAGES)
def test_the_sum_of_all_changes_is_made_part_by_part(drawn, tile_bytes, storage):
    """Of any length it is the sum of delta over time, as the same numbers, or an error where no uint64 holds it."""
    x = run_with(drawn, storage)
    delta = x.delta("x")
    exact = np.asarray(delta.astype(object).sum(axis=0))
    with mock.patch.object(series, "TILE_BYTES", tile_bytes):
        if delta.dtype == np.uint64 and (exact >= 2**64).any():
            with pytest.raises(ValueError, match="more than a uint64 holds"):
                x.total("x")
            return
        total = x.total("x")
    assert total.dtype == delta.dtype
    np.testing.assert_array_equal(total, delta.sum(axis=0))


@examples(100)
@given(runs(), STORAGES)
def test_base_units_are_exact_where_they_are_whole_and_fit(drawn, storage):
    """Multiplied values stay whole while all of them fit, else they are floats; counts and the unknown stay raw.

    Instant values are signed.
    """
    stat, scale, values, _, _ = drawn
    x = run_with(drawn, storage)
    si, raw = x.si("x"), x["x"]
    whole = np.uint64
    true = values.ravel().tolist()
    if stat.type == kf.StatType.INSTANT and stat.base != 7:
        whole = np.int64
        true = [value - 2**64 if value >= 2**63 else value for value in true]
    assert si.shape == raw.shape
    if stat.is_histogram or scale == 1:
        assert si.size == 0 or np.shares_memory(si, raw)
        assert (si.dtype, si.ravel().tolist()) == (whole, true)
        return
    true = [value * scale for value in true]
    limits = np.iinfo(whole)
    if scale > 1 and all(limits.min <= value <= limits.max for value in true):
        assert (si.dtype, si.ravel().tolist()) == (whole, true)
    else:
        assert si.dtype == np.float64
        np.testing.assert_allclose(si.ravel(), np.array([float(number) for number in true]), rtol=4e-16, atol=0)


@pytest.mark.parametrize("exponent", [-32768, -1000, -9, -1, 0, 1, 3, 19, 20, 63, 64, 400, 32767])
@pytest.mark.parametrize("base", [kf.StatBase.POW2, kf.StatBase.POW10, 5])
@pytest.mark.parametrize("type_", [kf.StatType.CUMULATIVE, kf.StatType.INSTANT, kf.StatType.PEAK, 9])
def test_a_number_and_an_array_have_the_same_base_units(type_, base, exponent):
    """snapshot(si=True) and Samples.si say the same of every value, scale and type, and neither is a huge integer."""
    stat = kf.Stat("x", type_, kf.StatUnit.NONE, base, exponent, 1, -1)
    for raw in (0, 1, 3, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1):
        (si,) = run_of(group_of([stat], [0], {"x": [[raw]]})).si("x").ravel()
        number = stat.to_base_units(raw)
        assert abs(number) < 2**128 or isinstance(number, float)
        assert float(number) == pytest.approx(float(si), rel=4e-16, abs=1e-250)


@pytest.mark.parametrize(("base", "exponent"), [(kf.StatBase.POW2, 10), (kf.StatBase.POW10, 3), (kf.StatBase.POW2, 63)])
def test_base_units_are_whole_up_to_the_last_one_that_fits(base, exponent):
    """The largest product below 2^64 is exact, one more makes floats of all."""
    stat = replace(STATS[2], base=base, exponent=exponent)
    most = (2**64 - 1) // stat.factor
    x = run_of(group_of([stat], [0], {"peak": [[1], [most], [most + 1]]}))
    assert x[:2].si("peak").tolist() == [[stat.factor], [most * stat.factor]]
    assert x[:2].si("peak").dtype == np.uint64
    assert x.si("peak").dtype == np.float64
    assert x.si("peak")[2, 0] == float((most + 1) * stat.factor)


def test_base_units_of_exponents_beyond_all_reason():
    """0 times anything is 0, exactly; what no float reaches is as large as a float can tell, or nearly 0."""
    stats = [replace(STATS[3], name=f"e{exponent}", exponent=exponent) for exponent in (32767, -32768)]
    x = run_of(group_of(stats, [0], {"e32767": [[0], [1]], "e-32768": [[0], [1]]}))
    assert x[:1].si("e32767").tolist() == [[0]]
    assert x[:1].si("e32767").dtype == np.uint64
    assert x.si("e32767")[1, 0] >= 1e270
    assert 0 <= x.si("e-32768")[1, 0] <= 1e-270


@examples(50)
@given(runs(), SLICES, st.integers(0, 12))
def test_a_block_and_columns_give_the_same(drawn, key, cut):
    """Values, descriptors and parts are the same, views of what was given, and can be put together in any mix."""
    block, columns = (run_with(drawn, storage) for storage in ("block", "columns"))
    assert block.names == columns.names == ("first", "x", "last")
    assert block.stat("x") == columns.stat("x")
    for a, b in ((block, columns), (block[key], columns[key]), (block.vcpu, columns.vcpu)):
        for name in a.names:
            assert a[name].dtype == b[name].dtype == np.uint64
            np.testing.assert_array_equal(a[name], b[name])
            np.testing.assert_array_equal(a.delta(name), b.delta(name))
            assert b[name].size == 0 or np.shares_memory(b[name], columns[name])
    for first, second in itertools.product((block, columns), repeat=2):
        whole = kf.Samples.concatenate([first[:cut], second[cut:]])
        assert len(whole) == len(block)
        for name in block.names:
            np.testing.assert_array_equal(whole[name], block[name])
        assert {(error.file, error.sweep) for error in whole.errors} == set(drawn[-1])


def analysed(x, name):
    """Everything there is to say of a statistic, but what is refused with good reason."""
    stat = x.stat(name)
    yield from (x.delta(name), x.rate(name), x.si(name), x.resets(name), stat.units(), stat.units(si=True))
    if not stat.is_histogram:
        return
    try:
        for h in (x.histogram(name), x.histogram(name, -1)):
            yield from (h.quantile(0.5), h.cdf(), h.mean_bounds(), h.mean, repr(h), h.sum())
    except ValueError as error:
        if not re.search("bucket_size 0|add up to more than a uint64", str(error)):
            raise


@examples(60)
@given(valid_files(at_least=1))
def test_whatever_a_file_may_hold_can_be_analysed(built):
    """No type, unit, scale, width or number that a sound file can have is an error or a warning of floats."""
    with kf.StatsFile.from_bytes(built.data) as file:
        x = kf.Sampler([file]).run(0, count=3)
    for name in x.names:
        assert list(analysed(x, name))
    assert str(x.figures())
    assert x.halt_poll_advice() is None


OTHER = [replace(STATS[0], name="other"), STATS[0], STATS[4]]


@pytest.mark.parametrize("storage", ["block", "columns"])
def test_split_takes_kinds_and_kernels_apart(storage):
    """Each part has the files, columns and failures of one kind and schema, and the whole run's sweeps."""
    a = group_of(STATS, [1, 4], {"count": [[1, 4], [2, 8], [3, 9]]}, storage=storage)
    b = group_of(OTHER, [0, 3], {"count": [[7, 5], [8, 6], [9, 9]], "other": [[1, 2], [3, 5], [6, 9]]}, storage=storage)
    vm = group_of(STATS, [2], {"count": [[2], [3], [4]]}, kind="vm", storage=storage)
    x = run_of(a, b, vm, failed=[(3, 2), (4, 1)])
    x.missed, x.overruns = 5, 2
    parts = x.split()
    assert [[info.vcpu_id for info in part.files] for part in parts] == [[1, 4], [0, 3], [None]]
    assert [part["count"].tolist() for part in parts] == [
        [[1, 4], [2, 8], [3, 9]],
        [[7, 5], [8, 6], [9, 9]],
        [[2], [3], [4]],
    ]
    assert [[(error.file, error.sweep) for error in part.errors] for part in parts] == [[(1, 1)], [(1, 2)], []]
    assert [part.names for part in parts] == [x.vm.names, ("other", "count", "hist"), x.vm.names]
    for part in parts:
        assert part.columns("count") == part.files
        assert (part.missed, part.overruns, len(part)) == (5, 2, 3)
        assert part.time is x.time
        assert len(part.split()) == 1
        assert np.shares_memory(part["count"], part.split()[0]["count"])
    assert x.vcpu["count"].tolist() == [[7, 1, 5, 4], [8, 2, 6, 8], [9, 3, 9, 9]]
    assert [info.vcpu_id for info in x.vcpu.columns("count")] == [0, 1, 3, 4]
    assert x.vcpu.delta("count").tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert x["other"].tolist() == [[1, 2], [3, 5], [6, 9]]
    assert x.delta("other").tolist() == [[2, 3], [3, 0]]
    assert x.resets("other").shape == (2, 2)
    np.testing.assert_array_equal(x.rate("other"), [[2, 3], [3, math.nan]])


def test_a_file_without_any_of_the_statistics_is_in_no_part():
    """It stays among the files of the whole, and its failure with it."""
    x = run_of(group_of(STATS, [0], {"count": [[1], [2]]}), failed=[(0, 1), (1, 0)])
    x.files += (kf.FileInfo("kvm-1", "vm", None),)
    (part,) = x.split()
    assert len(part.files) == 1
    assert [error.file for error in part.errors] == [0]
    assert (len(x.vm.files), x.vm.names, x.vm.split()) == (1, (), ())


@pytest.mark.parametrize("change", [{"exponent": -6}, {"type": kf.StatType.INSTANT}, {"unit": kf.StatUnit.CYCLES}])
def test_what_two_kernels_count_differently_must_be_taken_apart(change):
    """Raw values can be had of both; a change, a rate or a unit of both would be that of one of them."""
    values = {"time": [[1], [2]]}
    other = [replace(stat, **change) if stat.name == "time" else stat for stat in STATS]
    x = run_of(group_of(STATS, [0], values), group_of(other, [1], values))
    assert x["time"].tolist() == [[1, 1], [2, 2]]
    for call in (x.stat, x.delta, x.rate, x.si, x.resets, x.histogram, x.duty_cycle):
        with pytest.raises(KeyError, match=r"'time' has different types, units or scales .* split\(\)"):
            call("time")
    assert [part.delta("time").tolist() for part in x.split()] == [[[1]], [[1]]]
    moved = run_of(group_of(STATS, [0], values), group_of(STATS[2:], [1], values))
    assert moved.delta("time").tolist() == [[1, 1]]


def test_histograms_with_different_buckets_have_no_common_array():
    """The error says so; each kernel's part has its own."""
    wide = [replace(stat, size=4) if stat.name == "hist" else stat for stat in STATS]
    values = {"count": [[1], [2]]}
    x = run_of(group_of(STATS, [0], values), group_of(wide, [1], values))
    with pytest.raises(KeyError, match="different numbers of values in files of different kernels, 3 and 4"):
        x["hist"]
    assert [part["hist"].shape for part in x.split()] == [(2, 1, 3), (2, 1, 4)]
