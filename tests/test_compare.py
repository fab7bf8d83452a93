"""What became of each statistic from one set of runs to another, and how sure that is."""

import math

import numpy as np
import pytest
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast.analysis.compare import BLOCKS, _Bootstrap, _Measure
from kvmstats_fast.analysis.welch import Welch, quantile_of_t
from kvmstats_fast.testing import exit_counter

STATS = [
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("requests", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("memory", kf.StatType.INSTANT, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
    kf.Stat("halt_wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 5, -1),
]


def run(sweeps=65, files=2, stats=STATS, **steps):
    """A run, a sweep a second, in which each file's statistics grow by so much a sweep; `memory` stays."""
    time = np.arange(sweeps)[:, None] * np.ones(files, int)
    values = {name: time * step if name != "memory" else time * 0 + step for name, step in steps.items()}
    return run_of(group_of(stats, range(files), values | {"halt_wait_hist": np.zeros((sweeps, files, 5))}))


def test_rates_are_over_all_files_in_base_units():
    """What counts up is per second, what does not is the mean; a histogram is left out."""
    compared = kf.compare(run(exits=10, halt_wait_ns=10**8, memory=4), run(exits=15, halt_wait_ns=10**8, memory=2))
    assert set(compared) == {"exits", "requests", "halt_wait_ns", "memory", "exits_imbalance"}
    exits, wait, memory = (compared[name] for name in ("exits", "halt_wait_ns", "memory"))
    assert (exits.a, exits.b, exits.ratio, exits.units) == (20, 30, 1.5, "1/s")
    assert (wait.a, wait.ratio, wait.units) == (pytest.approx(0.2), 1, "s/s")
    assert (memory.a, memory.b, memory.units) == (8192, 4096, "B")
    assert (exits.low, exits.high) == pytest.approx((1.5, 1.5))  # nothing varies
    assert compared.method == "block bootstrap over time"


@pytest.mark.parametrize(
    ("per", "a", "b", "units"),
    [("requests", 5, 2, "1/requests"), (128, 10, 10, "1/unit"), ((128, 256), 10, 5, "1/unit")],
)
def test_counts_are_divided_by_work(per, a, b, units):
    """By what another statistic counted, or by so many units of work."""
    one, two = run(exits=10, requests=2, memory=1), run(exits=10, requests=5, memory=1)
    for sides in ((one, two), ([one] * 3, [two] * 2)):
        compared = kf.compare(*sides, per=per)
        exits = compared["exits"]
        assert (exits.a, exits.b, exits.units) == (a, b, units)
        assert compared["memory"].ratio == 1


def test_figures_have_intervals_too():
    """Of one run a side they come from blocks, as those of statistics do."""
    change = kf.compare(run(exits=[10, 30]), run(exits=[10, 70]))["exits_imbalance"]
    assert change.ratio != 1
    assert (change.low, change.high) == pytest.approx((change.ratio, change.ratio))  # nothing varies


def test_a_cleared_counter_and_missed_ticks_change_nothing():
    """The rate is what was counted over the time that passed."""
    counts = np.arange(40)[:, None] * 10
    cleared = np.where(np.arange(40)[:, None] < 20, counts, counts - 190)
    times = np.cumsum([0, *([10**9] * 19), 5 * 10**9, *([10**9] * 19)])
    plain = run_of(group_of(STATS, [0], {"exits": counts}))
    odd = run_of(group_of(STATS, [0], {"exits": cleared}), times=times)
    compared = kf.compare(plain, odd)["exits"]
    assert (compared.a, compared.b) == (10, 390 / 43)


def test_files_of_several_kernels_are_added_up():
    """Each scaled by its own descriptors."""
    micro = [kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -6, 1, -1)]
    grows = np.arange(20)[:, None]
    both = run_of(
        group_of(STATS, [0], {"halt_wait_ns": grows * 10**8}), group_of(micro, [1], {"halt_wait_ns": grows * 10**5})
    )
    compared = kf.compare(both, [both])
    assert compared["halt_wait_ns"].a == pytest.approx(0.2)
    assert compared["exits"].a == 0


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.995, 3, 5.84091), (0.95, 8, 1.859548), (0.975, 1e6, 1.95997)],
)
def test_quantiles_of_t_are_those_of_the_tables(p, freedom, value):
    """From one degree of freedom on."""
    assert quantile_of_t(p, freedom) == pytest.approx(value, rel=2e-4)


def bursts(rng, runs, length=2000, burst=10):
    """Counts in bursts that last so many sweeps, summed up in blocks: (runs, BLOCKS)."""
    state = np.repeat(rng.gamma(2.0, 1.0, (runs, length // burst)), burst, axis=1)
    return rng.poisson(50 * state).reshape(runs, BLOCKS, -1).sum(axis=2).astype(float)


def coverage(interval, sides):
    """How often the interval holds the ratio 1."""
    inside = 0
    for a, b in zip(*sides, strict=True):
        low, high = interval(a, b, math.log(sum(m.whole for m in b) * len(a) / sum(m.whole for m in a) / len(b)))
        inside += low < 1 < high
    return inside / len(sides[0])


def test_an_interval_over_time_holds_the_truth_as_often_as_it_says():
    """Two runs of the same guest, whose counts come in bursts; bench/simulate_compare.py has more of them."""
    rng = np.random.default_rng(7)
    below = np.full(BLOCKS, 125.0)
    sides = [[[_Measure(row, below, "", row.sum() / 2000)] for row in bursts(rng, 400)] for _ in "ab"]
    assert 0.92 < coverage(_Bootstrap(0.95), sides) < 0.98
    assert 0.73 < coverage(_Bootstrap(0.8), sides) < 0.87


@pytest.mark.parametrize(("a", "b"), [(3, 3), (5, 2), (1, 6)])
def test_an_interval_over_runs_holds_the_truth_as_often_as_it_says(a, b):
    """Runs that differ by 10 % from one to the next; also where one side is a single run."""
    rng = np.random.default_rng(8)
    one = np.ones(1)
    sides = [[[_Measure(one, one, "", rate) for rate in row] for row in rng.normal(1, 0.1, (400, n))] for n in (a, b)]
    assert 0.92 < coverage(Welch(0.95), sides) < 0.99


def test_work_that_varies_from_block_to_block_makes_no_interval_wider():
    """Of so many exits for each unit of it, whatever a block's share of the work is, the ratio is known."""
    rng = np.random.default_rng(4)
    work = rng.integers(100, 1000, (2, BLOCKS)).astype(float)
    a, b = ([_Measure(each * below, below, "", each)] for each, below in zip((3.0, 6.0), work, strict=True))
    assert _Bootstrap(0.95)(a, b, math.log(2)) == pytest.approx((2, 2))


def test_a_block_has_time_to_be_like_the_next():
    """Bursts as long as a block widen the interval: what is counted over 8 of them is not known as over 16."""
    rng = np.random.default_rng(9)
    below = np.full(BLOCKS, 125.0)
    sides = [[[_Measure(row, below, "", row.sum() / 2000)] for row in bursts(rng, 200, burst=250)] for _ in "ab"]
    assert coverage(_Bootstrap(0.95), sides) > 0.85


def test_exceeding_takes_the_whole_interval():
    """Above by more, or below by more; from nothing to something is more than any fraction."""
    names = ("a", "b", "ratio", "low", "high")
    rows = {
        "up": (1, 1.2, 1.2, 1.1, 1.3),
        "new": (0, 5, math.inf, math.nan, math.nan),
        "gone": (5, 0, 0, math.nan, math.nan),
    }
    changes = [kf.Change(name, units="", **dict(zip(names, row, strict=True))) for name, row in rows.items()]
    compared = kf.Comparison(changes, (1, 1), 0.95)
    assert [compared.exceeds("up", fraction) for fraction in (0.05, 0.1, 0.15, -0.05)] == [True, False, False, False]
    assert compared.exceeds("new", 100)
    assert not compared.exceeds("gone", 0)
    down = kf.Comparison([kf.Change("x", 1, 0.8, 0.8, 0.7, 0.9, "")], (1, 1), 0.95)
    assert [down.exceeds("x", fraction) for fraction in (-0.05, -0.1, -0.2, 0.05)] == [True, False, False, False]


def test_short_runs_have_a_ratio_and_no_interval():
    """As have statistics that one side never counted."""
    change = kf.compare(run(sweeps=10, exits=1), run(sweeps=10, exits=2))["exits"]
    assert (change.ratio, math.isnan(change.low), math.isnan(change.high)) == (2, True, True)
    change = kf.compare(run(exits=0), run(exits=2))["exits"]
    assert (change.ratio, math.isnan(change.low)) == (math.inf, True)
    assert math.isnan(kf.compare(run(), run())["exits"].ratio)


def test_it_is_told_as_a_table_a_dict_and_a_frame():
    """With what only one side has, and how many did not move."""
    compared = kf.compare(run(exits=10), [run(exits=20), run(exits=22, stats=STATS[:1])])
    assert compared.runs == (1, 2)
    assert compared.method == "spread of runs"
    assert set(compared) == {"exits", "exits_imbalance"}
    lines = str(compared).splitlines()
    assert lines[0] == "A: 1 run; B: 2 runs; 0.95 intervals from the spread of runs"
    assert lines[2].split()[:4] == ["exits", "20", "42", "2.1"]
    assert lines[-2] == "0 or not defined on both sides: 1"
    assert lines[-1] == "on one side only: requests, halt_wait_ns, memory"
    frame = compared.to_pandas()
    assert compared.to_dict()["exits"] == frame.loc["exits"].to_dict()
    assert frame.loc["exits", "ratio"] == 2.1
    with pytest.raises(KeyError, match="'exit' is not on both sides; did you mean 'exits'"):
        compared["exit"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (lambda x: (x, []), {}, ValueError, "b has no run"),
        (lambda x: (7, x), {}, TypeError, "a is 7; it must be Samples"),
        (lambda x: (x, [7]), {}, TypeError, "b has 7 in it"),
        (lambda x: (x[:1], x), {}, ValueError, "a run of a has 1 sweeps; a rate takes two"),
        (lambda x: (x, x), {"per": 0}, ValueError, "per is 0"),
        (lambda x: (x, x), {"per": (1, 2, 3)}, ValueError, "per has 3 numbers"),
        (lambda x: (x, x), {"per": "memory"}, KeyError, "does not count up"),
        (lambda x: (x, x), {"per": "request"}, KeyError, "request"),
        (lambda x: (x, x), {"confidence": 1}, ValueError, "confidence is 1"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, options, error, text):
    """The side, and what it must be."""
    with pytest.raises(error, match=text):
        kf.compare(*arguments(run(exits=1)), **options)


@pytest.mark.real_vm
def test_exits_of_a_real_guest_per_unit_of_work(guest, stats):
    """A guest that exits half as often again for each unit of work; a signal may add an exit to a run."""
    counter = exit_counter() if exit_counter() == "io_exits" else "fpu_reload"
    sides = []
    for exits in (200, 300):
        sides.append([])
        for _ in range(3):
            with kf.measure(stats) as measured:
                guest.run(exits)
            sides[-1].append(measured.samples)
    change = kf.compare(*sides, per=10)[counter]
    assert (change.a, change.b) == (pytest.approx(20, rel=0.01), pytest.approx(30, rel=0.01))
    assert change.low <= change.ratio <= change.high
    assert change.units == "1/unit"
