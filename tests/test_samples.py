"""What a run gives: changes, rates, resets, parts and wholes."""

import numpy as np
import pytest

import kvmstats_fast as kf
from kvmstats_fast.samples import Block
from kvmstats_fast.testing import SyntheticStats

STATS = [
    kf.Stat("count", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("gauge", kf.StatType.INSTANT, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("peak", kf.StatType.PEAK, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
    kf.Stat("time", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 3, -1),
    kf.Stat("odd", 9, kf.StatUnit.NONE, kf.StatBase.POW10, 3, 1, -1),
]


def samples_of(rows, *, times=None, ticks=None, errors=(), kind="vcpu"):
    """Samples with rows[t][file] = {name: value}, made by hand."""
    with SyntheticStats(stats=STATS, kind=kind) as made:
        schema = kf.parse(made.to_bytes()).schema
    places = {stat.name: (stat, stat.offset // 8) for stat in schema.stats}
    values = np.zeros((len(rows), len(rows[0]), schema.num_values), np.uint64)
    for t, row in enumerate(rows):
        for file, named in enumerate(row):
            for name, value in named.items():
                stat, word = places[name]
                values[t, file, word : word + stat.size] = value
    n = len(rows[0])
    time = np.array(times if times is not None else [i * 10**9 for i in range(len(rows))], np.int64)
    tick = np.array(ticks if ticks is not None else range(len(rows)), np.uint64)
    files = tuple(kf.FileInfo(f"kvm-1/vcpu-{i}", kind, i) for i in range(n))
    group = Block(schema, kind, places, np.arange(n), values)
    return kf.Samples((group,), files, (time, np.ones(len(rows), np.int64), tick), errors=tuple(errors))


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
    x = samples_of(rows, errors=[kf.SampleError(0, 2, OSError(9, "gone"))])
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


def test_parts_that_do_not_belong_together_are_refused():
    """No parts, other files, or the wrong order are ValueErrors."""
    x = samples_of([[{"count": i}] for i in range(4)])
    other = samples_of([[{"count": i}, {}] for i in range(4)])
    with pytest.raises(ValueError, match="no samples"):
        kf.Samples.concatenate([])
    with pytest.raises(ValueError, match="different files"):
        kf.Samples.concatenate([x, other])
    with pytest.raises(ValueError, match="order of time"):
        kf.Samples.concatenate([x[2:], x[:2]])
    with pytest.raises(ValueError, match="must be positive"):
        x[::-1]
    with pytest.raises(TypeError, match="3 is neither"):
        x[3]


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
