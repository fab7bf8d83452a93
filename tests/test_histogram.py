"""Histograms against the samples they were made of: what they say contains the truth, and no more is said."""

import doctest
import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import series
from kvmstats_fast.analysis import histogram as histogram_module

LOG = kf.Stat("wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 5, 0)
LINEAR = replace(LOG, name="size_hist", type=kf.StatType.LINEAR_HIST, bucket_size=50)

#: unit, base, exponent, and what a raw value is multiplied with
SCALES = [
    (kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, Fraction(1, 10**9)),
    (kf.StatUnit.NONE, kf.StatBase.POW10, 0, Fraction(1)),
    (kf.StatUnit.SECONDS, kf.StatBase.POW10, 3, Fraction(1000)),
    (kf.StatUnit.BYTES, kf.StatBase.POW2, 10, Fraction(1024)),
    (kf.StatUnit.BYTES, kf.StatBase.POW2, -3, Fraction(1, 8)),
    (kf.StatUnit.CYCLES, 7, 5, Fraction(1)),  # no such base: raw
]

_powers = st.builds(lambda power, by: max((1 << power) + by, 0), st.integers(0, 61), st.sampled_from([-1, 0, 1]))
VALUES = st.one_of(st.integers(0, 40), _powers, st.integers(0, 1 << 62))
VALUE_LISTS = st.lists(VALUES, max_size=40)


@st.composite
def hist_stats(draw):
    """A histogram's descriptor, and the scale of its raw values."""
    unit, base, exponent, scale = draw(st.sampled_from(SCALES))
    size = draw(st.integers(1, 70))
    width = draw(st.one_of(st.just(0), st.sampled_from([1, 7, 1000]), st.integers(1, 2**32 - 1)))
    kind = kf.StatType.LINEAR_HIST if width else kf.StatType.LOG_HIST
    return kf.Stat("h", kind, unit, base, exponent, size, 0, width), scale


def bucket_of(stat, value):
    """The bucket the kernel counts a raw value in: fls64(value), or value / bucket_size; the last bucket is open."""
    index = value // stat.bucket_size if stat.bucket_size else value.bit_length()
    return min(index, stat.size - 1)


def raw_edges(stat):
    """The lower edge of every bucket: the least raw value that the kernel counts there."""
    if stat.bucket_size:
        return [i * stat.bucket_size for i in range(stat.size)]
    return [0, *(1 << i for i in range(stat.size - 1))]


def bounds_of(stat, scale, bucket):
    """The edges of a bucket in base units, each the nearest float."""
    lower = raw_edges(stat)
    return float(lower[bucket] * scale), float(lower[bucket + 1] * scale) if bucket + 1 < stat.size else math.inf


def counts_of(stat, values):
    """How many of the values each bucket counts."""
    found = Counter(bucket_of(stat, value) for value in values)
    return [found[bucket] for bucket in range(stat.size)]


def histogram_of(stat, values):
    """A histogram of one file's raw values."""
    return kf.Histogram(stat, np.array(counts_of(stat, values), np.uint64))


def about(number):
    """As near as a few roundings of floats come."""
    return pytest.approx(float(number), rel=1e-13, abs=0)


# ---- what is said of the values


@examples(100)
@given(hist_stats())
def test_edges_are_where_the_kernel_starts_to_count_in_the_next_bucket(drawn):
    """A value at an edge is counted above it and the one before it below; edges are the nearest floats."""
    stat, scale = drawn
    h = histogram_of(stat, [])
    for bucket, edge in enumerate(raw_edges(stat)):
        assert bucket_of(stat, edge) == bucket
        assert bucket == 0 or bucket_of(stat, edge - 1) == bucket - 1
        assert tuple(h.edges[bucket : bucket + 2]) == bounds_of(stat, scale, bucket)
    assert h.edges.shape == (stat.size + 1,)
    assert h.units == stat.units(si=True)


QUANTILES = st.one_of(
    st.sampled_from([0, 1, 0.1, 0.5, 0.9, 0.99, 0.07, 1e-9, 1.0, 0.0, True]),
    st.integers(0, 1000).map(lambda n: n / 1000),
    st.floats(0, 1),
)


@examples(150)
@given(hist_stats(), VALUE_LISTS, QUANTILES)
def test_a_quantile_is_between_the_edges_of_the_bucket_that_counted_it(drawn, values, q):
    """The bounds are those of the bucket of the value of rank ceil(q * count), q being the decimal it prints as."""
    stat, scale = drawn
    low, high = histogram_of(stat, values).quantile(q)
    if not values:
        assert math.isnan(low)
        assert math.isnan(high)
        return
    rank = max(1, math.ceil(Fraction(repr(float(q))) * len(values)))
    value = sorted(values)[rank - 1]
    assert (low, high) == bounds_of(stat, scale, bucket_of(stat, value))
    assert low <= float(value * scale) <= high
    assert (type(low), type(high)) == (float, float)
    if rank == max(1, math.ceil(q * len(values))):  # where numpy's own product is not rounded up by a bit
        assert np.quantile(np.sort(np.array(values)), q, method="inverted_cdf") == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(("q", "count", "rank"), [(0.1, 30, 3), (0.07, 100, 7), (0.29, 100, 29), (0.7, 10, 7)])
def test_a_quantile_is_of_the_decimal_that_was_written(q, count, rank):
    """0.07 of 100 is rank 7, although the product of the floats is above 7."""
    stat = kf.Stat("h", kf.StatType.LINEAR_HIST, kf.StatUnit.NONE, kf.StatBase.POW10, 0, count + 1, 0, 1)
    h = histogram_of(stat, range(1, count + 1))
    assert h.quantile(q) == (rank, rank + 1)
    assert h.quantile(np.float64(q)) == (rank, rank + 1)


@examples(100)
@given(hist_stats(), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6), QUANTILES)
def test_counts_of_any_size_are_exact_or_refused(drawn, counts, q):
    """Above 2^53, where floats end, count and rank are still exact; a sum above 2^64 - 1 is refused."""
    stat, scale = drawn
    stat = replace(stat, size=len(counts))
    if sum(counts) >= 1 << 64:
        with pytest.raises(ValueError, match="the counts of h add up to more than a uint64 holds"):
            kf.Histogram(stat, np.array(counts, np.uint64))
        counts = [count // len(counts) for count in counts]
    h = kf.Histogram(stat, np.array(counts, np.uint64))
    assert int(h.count) == sum(counts)
    assert f"{sum(counts)} in {stat.size} buckets" in repr(h)
    if not sum(counts):
        return
    rank = max(1, math.ceil(Fraction(repr(float(q))) * sum(counts)))
    bucket = next(i for i in range(stat.size) if sum(counts[: i + 1]) >= rank)
    assert h.quantile(q) == bounds_of(stat, scale, bucket)


def test_a_rank_above_2_to_the_53_is_not_rounded():
    """The last two of 2^53 + 2 values are each in a bucket of their own."""
    h = kf.Histogram(LOG, [2**53, 1, 1, 0, 0])
    assert h.quantile(1) == (2e-9, 4e-9)
    assert h.quantile(1 - 2**-52) == (1e-9, 2e-9)
    assert h.quantile(1 - 2**-51) == (0, 1e-9)
    assert h.count == 2**53 + 2
    assert h.count.dtype == np.uint64


@examples(100)
@given(hist_stats(), VALUE_LISTS)
def test_the_cdf_is_the_fraction_below_each_upper_edge(drawn, values):
    """It is exactly that, the nearest float; 1 at the end, NaN of nothing."""
    stat, _ = drawn
    cdf = histogram_of(stat, values).cdf()
    assert (cdf.dtype, cdf.shape) == (np.float64, (stat.size,))
    if not values:
        assert np.isnan(cdf).all()
        return
    upper = [*raw_edges(stat)[1:], math.inf]
    assert cdf.tolist() == [sum(value < edge for value in values) / len(values) for edge in upper]


@examples(120)
@given(hist_stats(), VALUE_LISTS)
def test_the_mean_is_between_its_bounds_and_they_are_no_wider_than_the_buckets(drawn, values):
    """The bounds are the means of all lower and all upper edges; with the kernel's sum the mean is the true one."""
    stat, scale = drawn
    counts = counts_of(stat, values)
    h = kf.Histogram(stat, np.array(counts, np.uint64), sum(values) % 2**64)
    low, high = h.mean_bounds()
    if not values:
        assert np.isnan([low, high, h.mean]).all()
        assert h.total == 0
        return
    n = len(values)
    lower = raw_edges(stat)
    assert low == about(sum(count * edge for count, edge in zip(counts, lower, strict=True)) * scale / n)
    if counts[-1]:
        assert high == math.inf
    else:
        assert high == about(sum(count * edge for count, edge in zip(counts, lower[1:], strict=False)) * scale / n)
    true = Fraction(sum(values), n) * scale
    assert float(true) >= low * (1 - 1e-13)
    assert float(true) <= high * (1 + 1e-13)
    if sum(values) < 1 << 64:
        assert h.mean == about(true)
        assert h.total == about(sum(values) * scale)
        assert (type(h.mean), type(h.total), type(low)) == (float, float, float)


OWNERS = [
    kf.FileInfo(f"id {i}", "vcpu", i, vm=vm, host=host)
    for i, (vm, host) in enumerate([("<web>", "a"), ("db", "a"), ("<web>", "a"), ("db", "b")])
]


@examples(60)
@given(hist_stats(), st.lists(VALUE_LISTS, min_size=1, max_size=4), st.lists(st.floats(0, 1), max_size=4))
def test_several_quantiles_are_each_of_them(drawn, files, qs):
    """An axis of quantiles comes first, as numpy has it."""
    stat, _ = drawn
    h = kf.Histogram(stat, [counts_of(stat, values) for values in files])
    for what, shape in ((h, (len(qs), len(files))), (h[0], (len(qs),))):
        low, high = what.quantile(qs)
        assert low.shape == high.shape == shape
        for each, q in zip(zip(low, high, strict=True), qs, strict=True):
            np.testing.assert_array_equal(each, what.quantile(q))
    np.testing.assert_array_equal(h.quantile(np.array(qs)), h.quantile(tuple(qs)))


@examples(60)
@given(st.lists(VALUE_LISTS, min_size=4, max_size=4), st.sampled_from(["vm", "host", "vcpu"]), st.booleans())
def test_the_histogram_of_a_vm_is_that_of_all_its_files(values, by, summed):
    """Counts and totals are added up by the label of the VM, host or vCPU."""
    totals = [sum(row) % 2**60 for row in values] if summed else None
    h = kf.Histogram(LOG, [counts_of(LOG, row) for row in values], totals, OWNERS)
    label = {"vm": lambda one: one.vm, "host": lambda one: one.host, "vcpu": str}[by]
    parts = h.by(by)
    assert list(parts) == list(dict.fromkeys(map(label, OWNERS)))
    for name, part in parts.items():
        rows = [i for i, one in enumerate(OWNERS) if label(one) == name]
        assert part.counts.tolist() == counts_of(LOG, [value for i in rows for value in values[i]])
        assert part.raw_total is None if totals is None else int(part.raw_total) == sum(totals[i] for i in rows)
        assert part.files == tuple(OWNERS[i] for i in rows)
    assert (h[1:3].files, h[-1].files, h[[0, 3]].files) == (tuple(OWNERS[1:3]), (OWNERS[3],), (OWNERS[0], OWNERS[3]))
    assert ((h + h).files, (h[:2] + h[2:]).files, h.sum().files) == (tuple(OWNERS), (), tuple(OWNERS))


def test_a_histogram_without_files_has_no_vms():
    """What has one row, whose rows are nobody's, or a wrong word is refused by name."""
    h = kf.Histogram(LOG, [[1, 0, 0, 0, 0]] * 4)
    with pytest.raises(ValueError, match="not known whose these counts are"):
        h.by("vm")
    with pytest.raises(TypeError, match="of one file, or summed up"):
        h.sum().by("vm")
    with pytest.raises(ValueError, match="by is 'guest'; it must be one of"):
        replace(h, files=OWNERS).by("guest")
    with pytest.raises(ValueError, match="files are 3, the counts are of 4"):
        replace(h, files=OWNERS[:3])


def test_a_histogram_is_plain_python_and_a_frame_and_a_table():
    """With every count and whose it is, and what is not defined as None or a dash."""
    counts = [[1, 0, 90, 8, 1], [0] * 5, [0, 0, 0, 5, 0], [1, 0, 0, 0, 0]]
    h = kf.Histogram(LOG, counts, [500, 0, 30, 0], OWNERS)
    plain = h.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["of"] == ["<web>/0", "db/1", "<web>/2", "db/3"]
    assert (plain["counts"], plain["count"]) == (counts, [100, 0, 5, 1])
    assert plain["mean"] == [5e-9, None, pytest.approx(6e-9), 0.0]
    assert (plain["units"], plain["edges"]) == ("s", [0.0, 1e-9, 2e-9, 4e-9, 8e-9, None])
    one = h[0].to_dict()
    assert (one["of"], one["counts"], one["count"], one["mean"]) == (["<web>/0"], counts[0], 100, 5e-9)
    assert kf.Histogram(LOG, counts[0]).to_dict()["mean"] is None
    frame = h.to_pandas()
    assert frame["a", "<web>", 0].tolist() == counts[0]
    assert (frame.columns.names, frame.to_numpy().dtype) == (["host", "vm", "vcpu"], np.uint64)
    assert (frame.index[2].left, frame.index[2].right, frame.index.closed) == (2e-9, 4e-9, "left")
    assert h.sum().to_pandas()["count"].tolist() == np.sum(counts, axis=0).tolist()
    assert replace(h, files=()).to_pandas()[3].tolist() == counts[3]
    lines = str(h).splitlines()
    assert lines[0].split() == ["wait_hist", "count", "mean", "50", "%", "90", "%", "99", "%"]
    assert [line.split()[0] for line in lines[1:]] == ["<web>/0", "db/1", "<web>/2", "db/3", "all"]
    assert " ".join(lines[1].split()) == "<web>/0 100 5 ns 2 ns to 4 ns 2 ns to 4 ns 4 ns to 8 ns"
    assert lines[2].split()[1:] == ["0", *"----"]
    assert str(h[0]).splitlines()[1].split()[0] == "all"
    assert "&lt;web&gt;/0" in h._repr_html_()
    many = kf.Histogram(LOG, np.eye(70, 5, dtype=np.uint64))
    assert str(many).splitlines()[-1].split()[:4] == ["all,", "also", "20", "more"]
    assert len(str(many).splitlines()) == 52


def test_without_a_counter_that_adds_the_values_up_there_is_no_mean():
    """There is no total either, and never a guess from the buckets."""
    h = histogram_of(LOG, [1, 2, 3])
    assert (h.total, h.mean, h.raw_total) == (None, None, None)


def test_one_value_is_its_own_quantile_everywhere():
    """All quantiles of one value are its bucket, the last bucket has no upper bound."""
    h = histogram_of(LOG, [3])
    assert {h.quantile(q) for q in (0, 0.5, 1)} == {(2e-9, 4e-9)}
    assert histogram_of(LOG, [10**9]).quantile(0.5) == (8e-9, math.inf)
    assert histogram_of(LOG, [10**9]).mean_bounds() == (8e-9, math.inf)


@pytest.mark.parametrize("stat", [replace(LOG, exponent=400), replace(LOG, exponent=0, size=2000)])
def test_edges_that_no_float_reaches_count_only_if_something_is_there(stat):
    """Buckets that begin beyond the floats and are empty change no mean, and nothing warns or overflows."""
    h = kf.Histogram(stat, [2, *[0] * (stat.size - 1)], 3)
    low, high = h.mean_bounds()
    assert low == 0
    assert high == float(h.edges[1])
    assert h.total > 0
    beyond = kf.Histogram(stat, [0] * (stat.size - 1) + [1])
    assert beyond.mean_bounds() == (math.inf, math.inf)
    assert beyond.quantile(0.5) == (math.inf, math.inf)


# ---- algebra


FILES = st.lists(VALUE_LISTS, max_size=4)


@examples(100)
@given(hist_stats(), FILES, st.floats(0, 1))
def test_several_files_are_as_many_histograms(drawn, files, q):
    """Row i of (n, buckets) says what the file's own histogram says; the sum is that of all values together."""
    stat, _ = drawn
    counts = np.array([counts_of(stat, values) for values in files], np.uint64).reshape(-1, stat.size)
    totals = np.array([sum(values) % 2**58 for values in files], np.uint64)
    h = kf.Histogram(stat, counts, totals)
    alone = [kf.Histogram(stat, row, total) for row, total in zip(counts, totals, strict=True)]
    assert h.count.tolist() == [len(values) for values in files]
    for said, ones in (
        (h.quantile(q), [one.quantile(q) for one in alone]),
        (h.mean_bounds(), [one.mean_bounds() for one in alone]),
    ):
        np.testing.assert_array_equal(np.array(said), np.array(ones).reshape(-1, 2).T)
    for said, ones in ((h.cdf(), [one.cdf() for one in alone]), (h.mean, [one.mean for one in alone])):
        np.testing.assert_array_equal(said, np.array(ones).reshape(np.shape(said)))
    assert h.total.tolist() == [one.total for one in alone]
    assert h.mean.shape == h.quantile(q)[0].shape == (len(files),)

    whole = h.sum()
    assert whole.counts.tolist() == counts_of(stat, [value for values in files for value in values])
    assert (whole.counts.shape, whole.count.shape) == ((stat.size,), ())
    assert int(whole.raw_total) == sum(totals.tolist())
    assert whole.sum() is whole
    for i in range(len(files)):
        assert h[i].counts.tolist() == counts[i].tolist()
        assert h[i].raw_total == totals[i]
    assert h[1:].counts.tolist() == counts[1:].tolist()
    assert h[1:].raw_total.tolist() == totals[1:].tolist()
    assert len(list(h)) == len(files)


@examples(100)
@given(hist_stats(), st.lists(st.tuples(VALUE_LISTS, VALUE_LISTS), min_size=1, max_size=3), st.booleans())
def test_adding_and_taking_away_are_of_the_values(drawn, pairs, summed):
    """The sum is the histogram of both's values, (a + b) - b is a again, with their sums."""
    stat, _ = drawn

    def made(lists):
        h = kf.Histogram(
            stat,
            np.array([counts_of(stat, values) for values in lists], np.uint64),
            np.array([sum(values) % 2**58 for values in lists], np.uint64),
        )
        return h.sum() if summed else h

    a, b = made([first for first, _ in pairs]), made([second for _, second in pairs])
    both = a + b
    together = np.array([counts_of(stat, first + second) for first, second in pairs])
    assert both.counts.tolist() == (together.sum(axis=0) if summed else together).tolist()
    assert both.count.tolist() == (a.count + b.count).tolist()
    assert both.raw_total.tolist() == (a.raw_total + b.raw_total).tolist()
    back = both - b
    assert back.counts.tolist() == a.counts.tolist()
    assert back.raw_total.tolist() == a.raw_total.tolist()
    assert back.count.tolist() == a.count.tolist()
    assert (both.counts.dtype, both.raw_total.dtype) == (np.uint64, np.uint64)


def test_sums_that_no_uint64_holds_are_refused():
    """Nothing wraps round: over buckets, over files, of two histograms, of the totals; 2^64 - 1 is not too many."""
    half = kf.Histogram(LOG, [2**63, 0, 0, 0, 0])
    other = kf.Histogram(LOG, [0, 2**63, 0, 0, 0])
    for add in (lambda: half + half, lambda: half + other):
        with pytest.raises(ValueError, match="more than a uint64 holds"):
            add()
    totals = kf.Histogram(LOG, [1, 0, 0, 0, 0], 2**63)
    with pytest.raises(ValueError, match="totals of wait_hist is more than a uint64 holds"):
        totals + totals
    for shape in ((5,), (1, 5), (2, 5)):  # each file by itself
        counts = np.zeros(shape, np.uint64)
        counts[..., :2] = 2**63
        with pytest.raises(ValueError, match="the counts of wait_hist add up to more"):
            kf.Histogram(LOG, counts)
    files = kf.Histogram(LOG, np.array([half.counts, other.counts]))
    with pytest.raises(ValueError, match="the counts of wait_hist add up to more"):
        files.sum()
    with pytest.raises(ValueError, match="the totals of wait_hist add up to more"):
        kf.Histogram(LOG, np.eye(2, 5, dtype=np.uint64), [2**63, 2**63]).sum()
    assert f"2 files: {2**64} in 5" in repr(files)
    most = kf.Histogram(LOG, [2**63, 2**63 - 1, 0, 0, 0])
    assert int(most.count) == 2**64 - 1
    assert most.quantile(1) == (1e-9, 2e-9)


def test_what_is_no_part_cannot_be_taken_away():
    """A difference is never negative, neither of a bucket nor of the sum."""
    a, b = kf.Histogram(LOG, [5, 5, 0, 0, 0], 5), kf.Histogram(LOG, [1, 6, 0, 0, 0], 1)
    with pytest.raises(ValueError, match="the difference of wait_hist would be negative"):
        a - b
    with pytest.raises(ValueError, match="the difference of the totals of wait_hist would be negative"):
        a - kf.Histogram(LOG, [1, 0, 0, 0, 0], 6)


def test_only_histograms_with_the_same_buckets_are_added():
    """Other shapes, edges or units are refused, what is not a histogram is a TypeError; the same edges are enough."""
    a = kf.Histogram(LOG, [1, 2, 3, 4, 5], 7)
    with pytest.raises(ValueError, match=r"shapes \(5,\) and \(1, 5\) have no sum"):
        a + kf.Histogram(LOG, [[1, 2, 3, 4, 5]])
    for other in (LINEAR, replace(LOG, exponent=-6), replace(LOG, unit=kf.StatUnit.NONE)):
        with pytest.raises(ValueError, match="have different buckets, and so no difference"):
            a - kf.Histogram(other, [0] * 5)
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 1
    assert (a + kf.Histogram(replace(LOG, name="b", offset=8), [1] * 5, 1)).raw_total == 8
    assert (a + kf.Histogram(LOG, [1] * 5)).raw_total is None
    assert (a + kf.Histogram(LOG, [1] * 5)).counts.tolist() == [2, 3, 4, 5, 6]


def test_totals_of_different_raw_units_are_not_added():
    """Where equal edges come of different scales, the counts are added and the sums are left out."""
    fine = replace(LINEAR, exponent=-9, bucket_size=1000)
    coarse = replace(LINEAR, exponent=-6, bucket_size=1)
    assert fine.bucket_edges().tolist() == coarse.bucket_edges().tolist()
    both = kf.Histogram(fine, [1] * 5, 5000) + kf.Histogram(coarse, [1] * 5, 5)
    assert both.counts.tolist() == [2] * 5
    assert both.raw_total is None


def test_truths_count_as_one():
    """``values > limit`` is an array of counts too."""
    assert kf.Histogram(LOG, np.arange(5) == 3).counts.tolist() == [0, 0, 0, 1, 0]


# ---- wrong input


@pytest.mark.parametrize(
    ("stat", "counts", "total", "error", "said"),
    [
        (replace(LOG, type=kf.StatType.CUMULATIVE), [1] * 5, None, ValueError, "wait_hist is not a histogram"),
        (replace(LINEAR, bucket_size=0), [1] * 5, None, ValueError, "size_hist .* bucket_size 0"),
        (LOG, [1] * 4, None, ValueError, r"counts have shape \(4,\); wait_hist has 5 buckets"),
        (LOG, 5, None, ValueError, r"counts have shape \(\)"),
        (LOG, np.ones((2, 2, 5), int), None, ValueError, r"counts have shape \(2, 2, 5\)"),
        (LOG, [1.0] * 5, None, TypeError, "counts must be whole numbers, none negative"),
        (LOG, [-1, 0, 0, 0, 0], None, TypeError, "counts must be whole numbers, none negative"),
        (LOG, [2**64, 0, 0, 0, 0], None, TypeError, "counts must be whole numbers"),
        (LOG, ["a"] * 5, None, TypeError, "counts must be whole numbers"),
        (LOG, [1] * 5, 0.5, TypeError, "raw_total must be whole numbers"),
        (LOG, [1] * 5, -1, TypeError, "raw_total must be whole numbers"),
        (LOG, [1] * 5, [1], ValueError, r"raw_total has shape \(1,\)"),
        (LOG, [[1] * 5] * 2, 1, ValueError, r"raw_total has shape \(\)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(stat, counts, total, error, said):
    """Neither a shape nor a number that no kernel counts becomes a histogram."""
    with pytest.raises(error, match=said):
        kf.Histogram(stat, counts, total)


@pytest.mark.parametrize("q", [-0.001, 1.001, math.nan, math.inf, 50])
def test_a_quantile_is_of_a_fraction(q):
    """Neither percent nor NaN."""
    with pytest.raises(ValueError, match=f"q is {q}; it must be from 0 to 1"):
        histogram_of(LOG, [1]).quantile(q)


def test_a_single_histogram_has_no_files_to_choose_from():
    """An index into one file's histogram is refused, and so is to go through it; there is no file 2 of 2."""
    h = histogram_of(LOG, [1])
    with pytest.raises(TypeError, match="of one file, or summed up"):
        h[0]
    with pytest.raises(TypeError, match="of one file, or summed up"):
        list(h)
    two = kf.Histogram(LOG, np.ones((2, 5), np.uint64))
    with pytest.raises(IndexError):
        two[2]
    assert two[-1].counts.tolist() == [1] * 5


def test_any_whole_numbers_become_uint64():
    """Lists, small ints and booleans are counts too, also none at all of no file."""
    for counts in ([1, 0, 2, 0, 0], np.array([1, 0, 2, 0, 0], np.int8), np.array([1, 0, 2, 0, 0], object).astype(int)):
        h = kf.Histogram(LOG, counts, 3)
        assert (h.counts.dtype, h.raw_total.dtype, h.counts.tolist()) == (np.uint64, np.uint64, [1, 0, 2, 0, 0])
    empty = kf.Histogram(LOG, np.zeros((0, 5), np.uint64))
    assert empty.sum().counts.tolist() == [0] * 5
    assert empty.cdf().shape == (0, 5)
    assert empty.quantile(0.5)[0].shape == empty.mean_bounds()[0].shape == (0,)
    assert "of 0 files: 0 in 5 buckets" in repr(empty)


def test_the_docstrings_examples_are_true():
    """What the docstring shows is what is printed."""
    failed, tried = doctest.testmod(histogram_module)
    assert (failed, tried > 0) == (0, True)


# ---- of a run

HIST = replace(LOG, name="halt_wait_hist", offset=-1)
ADDER = kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1)


@st.composite
def histories(draw):
    """Per interval and file: the values that were counted, and whether the histogram was cleared before them."""
    n = draw(st.integers(1, 3))
    intervals = draw(st.integers(0, 7))
    one = st.tuples(st.lists(st.integers(0, 20), max_size=4), st.sampled_from([False] * 5 + [True]))
    return [[draw(one) for _ in range(n)] for _ in range(intervals + 1)]


def counted(history, stat):
    """What stands in each file at each sweep: counts (T, n, buckets) and sums (T, n)."""
    counts = np.zeros((len(history), len(history[0]), stat.size), np.uint64)
    sums = np.zeros(counts.shape[:2], np.uint64)
    for t, row in enumerate(history):
        for file, (values, cleared) in enumerate(row):
            before = (counts[t - 1, file], sums[t - 1, file]) if t and not cleared else (0, 0)
            counts[t, file] = np.array(counts_of(stat, values), np.uint64) + np.uint64(before[0])
            sums[t, file] = np.uint64(sum(values)) + np.uint64(before[1])
    return counts, sums


def changes_of(values):
    """Sum of the changes over time, histograms cleared as a whole: one row of Python ints after the other."""
    total = [0] * len(values[0])
    for before, after in pairwise(values):
        fell = any(b > a for b, a in zip(before, after, strict=True))
        total = [t + a - (0 if fell else b) for t, b, a in zip(total, before, after, strict=True)]
    return total


@examples(100)
@given(
    histories(),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=2, unique_by=lambda pair: pair[0]),
    st.sampled_from(["block", "columns"]),
    st.sampled_from([1, 50, 200]),
    st.data(),
)
def test_the_histogram_of_a_run_is_what_its_files_counted(history, failures, storage, tile_bytes, data):
    """File by file the changes of every interval, also where it was cleared, up to where it failed; parts add up."""
    counts, sums = counted(history, HIST)
    sweeps, n = sums.shape
    failures = [(file, sweep) for file, sweep in failures if file < n and sweep < sweeps]
    for file, sweep in failures:
        counts[sweep:, file] = sums[sweep:, file] = 0
    values = {"halt_wait_hist": counts, "halt_wait_ns": sums}
    x = run_of(group_of([ADDER, HIST], range(n), values, storage=storage), failed=failures)
    with mock.patch.object(series, "TILE_BYTES", tile_bytes):
        h = x.histogram("halt_wait_hist")
        cut = data.draw(st.integers(0, sweeps - 1))
        parts = x[: cut + 1].histogram("halt_wait_hist"), x[cut:].histogram("halt_wait_hist")
    for file in range(n):
        end = dict(failures).get(file, sweeps)
        assert h.counts[file].tolist() == changes_of(counts[:end, file].tolist() or [[0] * 5])
        assert [h.raw_total[file]] == changes_of(sums[:end, file, None].tolist() or [[0]])
    together = parts[0] + parts[1]
    assert together.counts.tolist() == h.counts.tolist()
    assert together.raw_total.tolist() == h.raw_total.tolist()
    assert h.counts.shape == (n, 5)
    if not any(cleared for row in history for _, cleared in row) and not failures:
        for file in range(n):
            all_values = [value for row in history[1:] for value in row[file][0]]
            assert h.counts[file].tolist() == counts_of(HIST, all_values)
            if all_values:
                assert h.mean[file] == about(Fraction(sum(all_values), len(all_values) * 10**9))
    sweep = data.draw(st.integers(-sweeps, sweeps - 1))
    at = x.histogram("halt_wait_hist", sweep)
    assert (at.counts.tolist(), at.raw_total.tolist()) == (counts[sweep].tolist(), sums[sweep].tolist())


def test_a_run_of_one_sweep_or_none_counted_nothing():
    """Zeros, of the right shape, and a sweep that is not there is an IndexError."""
    x = run_of(group_of([HIST], range(2), {"halt_wait_hist": np.ones((3, 2, 5))}))
    for part in (x[:0], x[:1]):
        assert part.histogram("halt_wait_hist").counts.tolist() == [[0] * 5] * 2
    with pytest.raises(IndexError):
        x.histogram("halt_wait_hist", 3)
    with pytest.raises(IndexError):
        x[:0].histogram("halt_wait_hist", -1)


@pytest.mark.parametrize(
    "adder",
    [
        replace(ADDER, exponent=-6),
        replace(ADDER, unit=kf.StatUnit.NONE),
        replace(ADDER, base=kf.StatBase.POW2),
        replace(ADDER, name="halt_wait_us"),
        replace(ADDER, name="wait_ns"),
    ],
)
def test_a_counter_of_something_else_is_no_sum(adder):
    """Only the counter of that name and scale gives a mean."""
    x = run_of(group_of([adder, HIST], [0], {"halt_wait_hist": np.ones((2, 1, 5))}))
    assert x.histogram("halt_wait_hist").mean is None


def test_a_sum_is_of_the_same_files_or_of_none():
    """Where some files lack the counter, or only the other kind's have it, there is no mean and no error."""
    ones = {"halt_wait_hist": np.ones((2, 1, 5))}
    with_sum, without = group_of([ADDER, HIST], [0], ones), group_of([HIST], [1], ones)
    assert run_of(with_sum, without).histogram("halt_wait_hist").mean is None
    assert run_of(with_sum).histogram("halt_wait_hist").mean is not None
    # The same label twice: two VMs of one process.
    apart = run_of(group_of([HIST], [0], ones), group_of([ADDER], [1], {"halt_wait_ns": np.ones((2, 1))}))
    apart.files = (apart.files[0],) * 2
    assert apart.histogram("halt_wait_hist").mean is None
    vm = group_of([ADDER], [1], {"halt_wait_ns": np.ones((2, 1))}, kind="vm")
    assert run_of(with_sum, vm).histogram("halt_wait_hist").counts.tolist() == [[0] * 5]


def test_what_is_no_histogram_has_none():
    """The error names the statistic and its type; an unknown name is a KeyError."""
    x = run_of(group_of([ADDER, HIST], [0], {"halt_wait_ns": np.ones((2, 1))}))
    with pytest.raises(ValueError, match=r"halt_wait_ns is not a histogram"):
        x.histogram("halt_wait_ns")
    with pytest.raises(KeyError, match="did you mean"):
        x.histogram("halt_wait_hists")


def test_changes_that_no_uint64_holds_are_refused_rather_than_wrapped():
    """A histogram that was cleared and counted again beyond 2**64 in all is an error, not a small number."""
    stat = kf.Stat("h", kf.StatType.LOG_HIST, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 2, -1)
    values = np.zeros((5, 1, 2), np.uint64)
    values[:, 0, 1] = [0, 2**63, 0, 2**63, 0]
    x = run_of(group_of([stat], [0], {"h": values}))
    assert x[:3].histogram("h").counts.tolist() == [[0, 2**63]]
    with pytest.raises(ValueError, match="more than a uint64 holds"):
        x.histogram("h")


def test_what_the_caller_does_to_its_counts_changes_no_histogram():
    """The counts are the histogram's own."""
    stat = kf.Stat("h", kf.StatType.LOG_HIST, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 2, -1)
    counts = np.array([1, 2], np.uint64)
    h = kf.Histogram(stat, counts)
    counts[:] = 9
    assert (h.counts.tolist(), int(h.count)) == ([1, 2], 3)


@pytest.mark.parametrize("exponent", [297, 308, 32767])
def test_a_mean_that_no_float_reaches_is_infinite(exponent):
    """The bounds are as large as a float can tell, without a warning."""
    stat = kf.Stat("h", kf.StatType.LOG_HIST, kf.StatUnit.NONE, kf.StatBase.POW10, exponent, 4, -1)
    low, high = kf.Histogram(stat, [0, 0, 2**62, 2**62]).mean_bounds()
    assert (low > 1e297, high) == (True, math.inf)
