"""The flight recorder keeps all sweeps around what it finds, however they come, and nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast.sampling.flight import Condition, EachSecond, Flight

STATS = [
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("blocking", kf.StatType.INSTANT, kf.StatUnit.BOOLEAN, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("halt_poll_success_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("halt_poll_fail_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
]
TICK = 10**7  # ns between sweeps


def made(steps, **other):
    """A run of two vCPUs, a sweep each 10 ms; `steps` is what the first one's exits grow by."""
    exits = np.stack([np.cumsum([0, *steps]), np.arange(len(steps) + 1)], axis=1)
    times = np.arange(len(exits)) * TICK
    return run_of(group_of(STATS, [0, 1], {"exits": exits} | other), times=times)


def chunks_of(samples, cuts):
    """The samples in pieces."""
    edges = sorted({0, len(samples), *(cut % len(samples) for cut in cuts)})
    return [samples[a:b] for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    bursts=st.lists(st.booleans(), min_size=1, max_size=120),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    before=st.integers(0, 15),
    after=st.integers(0, 15),
)
def test_it_keeps_what_is_near_a_sweep_for_which_the_condition_holds(bursts, cuts, before, after):
    """As a look at the whole run would; each sweep once, in order, and nothing in memory that ends before `before`."""
    run = made([1000 if burst else 1 for burst in bursts])
    flight = Flight(Condition.parse("exits>50000/s"), before * TICK / 1e9, after * TICK / 1e9)
    kept = []
    for chunk in chunks_of(run, cuts):
        kept += [int(tick) for part in flight.feed(chunk) for tick in part.tick]
        assert all(part.time[-1] >= chunk.time[-1] - before * TICK for part in flight._waiting)
    found = [at + 1 for at, burst in enumerate(bursts) if burst]
    assert kept == [tick for tick in range(len(run)) if any(at - before <= tick <= at + after for at in found)]


@settings(max_examples=40, deadline=None)
@given(
    times=st.lists(st.integers(0, 6 * 10**9), min_size=1, max_size=60, unique=True), cuts=st.lists(st.integers(0, 99))
)
def test_the_overview_has_the_last_sweep_of_each_second(times, cuts):
    """With a tick a second, and seconds without a sweep counted as missed."""
    run = run_of(group_of(STATS, [0], {"exits": np.arange(len(times))[:, None]}), times=sorted(times))
    each, given_sweeps = EachSecond(), []
    for chunk in chunks_of(run, cuts):
        given_sweeps += each.feed(chunk)
    given_sweeps += each.end()
    seconds = (run.time - run.time[0]) // 10**9
    last = {int(second): int(time) for second, time in zip(seconds, run.time, strict=True)}
    assert [(int(one.tick[0]), int(one.time[0])) for one in given_sweeps] == list(last.items())
    assert {one.interval for one in given_sweeps} == {1.0}
    assert len(given_sweeps) + sum(one.missed for one in given_sweeps) == max(last) + 1


@pytest.mark.parametrize(
    ("text", "per_vcpu", "holds"),
    [
        ("exits>1050/s", False, [False, True, False, True]),  # 1000 and 100 a second: together
        ("exits>1050/s", True, [False, False, False, True]),
        ("exits<150/s", False, [False, False, True, False]),
        ("blocking>0", False, [False, False, True, True]),
        ("halt_wait_ns>0.5", True, [False, False, True, True]),
        ("halted_fraction > 20%", False, [True] * 4),
        ("halted_fraction<20%", False, [False] * 4),
    ],
)
def test_a_condition_is_a_rate_a_value_or_a_figure(text, per_vcpu, holds):
    """Of a VM's sum or of any vCPU; of a figure over the samples as a whole."""
    waits = np.array([[0, 0], [0, 0], [1, 0], [2, 0]]) * TICK
    values = {"blocking": [[0, 0], [0, 0], [1, 0], [0, 1]], "halt_wait_ns": waits}
    run = made([10, 0, 20], **values)
    assert Condition.parse(text, per_vcpu=per_vcpu).judge(run).tolist() == holds


@pytest.mark.parametrize(
    "text", ["exits", "exits>", ">5", "exits>-5", "exits>5/m", "exits=5", "exits>5%%", "a b>5", ""]
)
def test_what_is_no_condition_is_refused(text):
    """With examples of what is."""
    with pytest.raises(ValueError, match="is not a condition such as 'exits>50000/s'"):
        Condition.parse(text)


def test_a_name_that_is_not_there_is_an_error():
    """With what is near."""
    with pytest.raises(KeyError, match="no statistic or figure 'exit' in these samples; did you mean exits"):
        Condition.parse("exit>5").judge(made([1, 2]))


def test_samples_without_a_sweep_are_passed_over():
    """As a chunk in which nothing was read: neither keeps or ends anything."""
    run = made([1000, 1])
    flight, overview = Flight(Condition.parse("exits>50000/s"), 1, 1), EachSecond()
    assert not [*flight.feed(run[:0]), *overview.feed(run[:0]), *overview.end()]
    assert sum(len(part) for part in flight.feed(run)) == 3


def test_a_figure_of_one_sweep_holds_of_nothing():
    """It is of the changes between two: the first sweep alone is no error, and a name that is there in none is."""
    run = made([1, 2], halt_wait_ns=[[0, 0], [1, 0], [2, 0]])
    flight = Flight(Condition.parse("halted_fraction>99%"), 1, 1)
    assert not list(flight.feed(run[:1]))
    assert not list(flight.feed(run[1:]))
    with pytest.raises(KeyError, match="no statistic or figure 'halt' in these samples"):
        list(Flight(Condition.parse("halt>5"), 1, 1).feed(run))


def test_the_overview_gives_the_last_sweep_of_files_that_others_replace():
    """Though its second is not over: of the samples that follow it would be no part."""
    run = made([1, 2])
    others = run_of(group_of(STATS, [0], {"exits": [[5], [6]]}), times=[3 * TICK, 4 * TICK])
    overview = EachSecond()
    assert not list(overview.feed(run))
    (last,) = overview.feed(others)
    assert (last.files, last.time.tolist()) == (run.files, run.time[-1:].tolist())
