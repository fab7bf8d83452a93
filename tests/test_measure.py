"""A block is measured by two sweeps: what it counted, while it runs and afterwards, however blocks meet."""

import asyncio
import json
import os
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from helpers import take_away

import kvmstats_fast as kf
from kvmstats_fast.sampling import measured
from kvmstats_fast.sampling.readings import Span
from kvmstats_fast.testing import SyntheticStats, counts_right, exit_counter


@pytest.fixture
def made(resources):
    """Three made-up files: a VM's and two vCPUs'."""
    kinds = [("vm", 0), ("vcpu", 0), ("vcpu", 1)]
    return [resources.enter_context(SyntheticStats("x86", kind, vcpu_id=i)) for kind, i in kinds]


@pytest.fixture
def files(made, resources):
    """Them, opened."""
    return [resources.enter_context(one.open()) for one in made]


@pytest.fixture
def exits(made):
    """A function that makes a vCPU of these exit so many times."""
    return lambda count, vcpu=0: made[1 + vcpu].add("exits", count)


def test_it_says_what_happened_in_between(made, files):
    """Deltas and rates are of the block alone; elapsed and cost are seconds, and the cost is in elapsed."""
    made[1].add("exits", 1000)
    with kf.measure(files, ["exits", "halt_wait_hist", "mmu_unsync"]) as m:
        made[1].add("exits", 5)
        made[2].add("halt_wait_hist", 3, bucket=4)
        time.sleep(0.02)
    assert m.delta["exits"].tolist() == [5, 0]
    assert m.delta["halt_wait_hist"][1].tolist() == [0, 0, 0, 0, 3] + [0] * 27
    assert m.rate["exits"][0] == pytest.approx(5 / m.elapsed)
    assert m.elapsed >= 0.02
    assert 0 < m.cost < m.elapsed
    assert sorted(m.delta) == ["exits", "halt_wait_hist", "mmu_unsync"]
    assert len(m.samples) == len(m.rate["exits"]) == 2
    assert m.samples.tick.tolist() == [0, 1]
    with pytest.raises(KeyError, match="io_exits"):
        m.delta["io_exits"]


def test_an_error_of_the_block_comes_out(files):
    """Also when it took the files with it; then nothing is known of the block."""
    m = kf.measure(files)

    def close_and_fail():
        for file in files:
            file.close()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), m:
        close_and_fail()
    with pytest.raises(RuntimeError, match="at its end no file could be read"):
        _ = m.counts
    with pytest.raises(ValueError, match="closed"), m:
        pass


def test_counts_are_plain_ints_added_up_over_files(files, exits):
    """JSON writes them as they are; what one file counts and another does not is there, too."""
    with kf.measure(files) as m:
        exits(400)
        exits(600, vcpu=1)
    counts = m.counts
    assert counts["exits"] == 1000
    assert {type(count) for count in counts.values()} == {int}
    assert json.loads(json.dumps(counts)) == counts
    assert "remote_tlb_flush" in counts
    # Neither levels, peaks nor histograms.
    kinds = {m.samples.stat(name).type for name in counts}
    assert kinds == {kf.StatType.CUMULATIVE}


def test_counts_are_those_of_delta(made, files, resources):
    """Cleared counters, halves of a uint64, files of another kernel, and a file that failed included."""
    other = resources.enter_context(SyntheticStats("arm64", "vcpu", vcpu_id=2))
    files.append(resources.enter_context(other.open()))
    made[1].add("exits", 7)
    made[2].add("halt_wait_ns", 2**63)
    made[1].add("halt_wait_ns", 1)
    with kf.measure(files) as m:
        made[1].set("exits", 3)
        made[1].add("halt_wait_ns", 2**63)
        made[2].add("halt_wait_ns", 2**62)
        made[2].add("exits", 2**63)
        other.add("exits", 2**63)
    assert m.counts["exits"] == 3 + 2**63 + 2**63
    assert m.counts["halt_wait_ns"] == 2**63 + 2**62
    with kf.measure(files) as m:
        made[2].add("exits", 5)
        made[1].add("exits", 9)
        files[1].close()
    assert [error.file for error in m.samples.errors] == [1]
    for name, count in m.counts.items():
        assert count == int(m.delta[name].sum()), name
    assert m.counts["exits"] == 5


def test_a_file_that_could_not_be_read_before_the_block_has_no_change(made, files):
    """Although it can be after it: all that it ever counted is not what it counted in the block."""
    made[1].add("exits", 100)
    kept = os.dup(files[1].fileno())
    take_away(files[1].fileno())
    with kf.measure(files, "exits") as m:
        os.dup2(kept, files[1].fileno(), inheritable=False)
        os.close(kept)
        made[2].add("exits", 5)
    assert m.counts == {"exits": 5}
    assert m.delta["exits"].tolist() == [0, 5]
    assert [(error.file, error.sweep) for error in m.samples.errors] == [(0, 0)]


def test_it_is_used_again_and_again(files, exits):
    """Each block has its own result, which later blocks leave alone; the measure has the last one's."""
    m = kf.measure(files, "exits")
    with pytest.raises(RuntimeError, match="nothing was measured yet"):
        _ = m.counts
    blocks = []
    for count in range(3):
        with m as block:
            exits(count)
        blocks.append(block)
        assert m.counts == {"exits": count}
        assert m.elapsed == block.elapsed
    assert [block.counts["exits"] for block in blocks] == [0, 1, 2]
    assert blocks[1].samples.time[1] <= blocks[2].samples.time[0]


def test_making_it_is_what_costs(files, monkeypatch):
    """Entering and leaving it again takes two sweeps and looks at no file's descriptors."""
    m = kf.measure(files, "exits")
    monkeypatch.setattr(kf.StatsFile, "schema", property(lambda _: pytest.fail("a schema was looked at")))
    with m:
        pass
    assert m.counts == {"exits": 0}


def test_it_can_be_read_within_the_block(files, exits):
    """What there was so far, anew at each look."""
    with kf.measure(files, "exits") as m:
        exits(3)
        assert m.counts == {"exits": 3}
        exits(4)
        assert m.counts == {"exits": 7}
        assert m.delta["exits"].tolist() == [7, 0]
        first = m.elapsed
        assert m.elapsed > first
        exits(5)
    assert m.counts == {"exits": 12}
    assert m.elapsed > first


def test_blocks_may_be_nested(files, exits):
    """In blocks of another measure or of the same: each counts all that happens within it."""
    m, other = kf.measure(files, "exits"), kf.measure(files)
    with m as outer, other:
        exits(1)
        with m as inner:
            exits(2)
            assert m.counts == {"exits": 2}
        exits(4)
        assert m.counts == {"exits": 7}
    assert (outer.counts["exits"], inner.counts["exits"], other.counts["exits"]) == (7, 2, 7)
    assert m.counts == outer.counts


def test_blocks_of_two_measures_may_overlap(files, exits):
    """Each is left by its own."""
    a, b = kf.measure(files, "exits"), kf.measure(files, "exits")
    a.__enter__()
    exits(1)
    b.__enter__()
    exits(2)
    a.__exit__(None, None, None)
    exits(4)
    with a:
        exits(8)
    b.__exit__(None, None, None)
    assert (a.counts["exits"], b.counts["exits"]) == (8, 14)


def test_phases_are_parts_of_a_block(files, exits):
    """Each by its name; one that is entered again adds up, one that is left open is not there, one that raised is."""

    def crash():
        exits(5)
        raise ZeroDivisionError

    with kf.measure(files, "exits") as m:
        with m.phase("boot") as boot:
            exits(700)
            with boot.phase("firmware"):
                exits(1)
        for _ in range(200):
            with m.phase("request"):
                exits(3)
        with pytest.raises(ZeroDivisionError), m.phase("crash"):
            crash()
        open_one = m.phase("never left")
        open_one.__enter__()
    assert {name: phase.counts["exits"] for name, phase in m.phases.items()} == {
        "boot": 701,
        "request": 600,
        "crash": 5,
    }
    assert m.counts == {"exits": 1306}
    assert boot.counts == {"exits": 701}
    assert boot.phases["firmware"].counts == {"exits": 1}
    request = m.phases["request"]
    assert request.entries == 200
    assert 0 < request.elapsed < m.elapsed
    assert request.cost > 0  # half of it is outside: on a busy host that may be more than all that is within
    with pytest.raises(RuntimeError, match="phase 'late' is a part of a block that has ended"):
        m.phase("late")
    with pytest.raises(TypeError, match="name is an int"):
        m.phase(3)


def test_a_measure_has_the_phases_of_its_block(files, exits):
    """Without `as`."""
    m = kf.measure(files, "exits")
    with m, m.phase("boot"):
        exits(2)
    assert m.phases["boot"].counts == {"exits": 2}


def test_it_decorates_functions_and_coroutine_functions(files, exits):
    """Each call is a block, which recursion nests; the function keeps its name and what it returns."""
    m = kf.measure(files, "exits")

    @m
    def work(count):
        """Work."""
        exits(count)
        return m.counts["exits"] + (work(count - 1) if count else 0)

    assert work(2) == 2 + 1 + 0
    assert m.counts == {"exits": 3}
    assert (work.__name__, work.__doc__) == ("work", "Work.")

    @m
    async def wait():
        await asyncio.sleep(0)
        exits(9)
        return "done"

    assert asyncio.run(wait()) == "done"
    assert m.counts == {"exits": 9}

    def generate():
        yield

    with pytest.raises(TypeError, match="generate is a generator"):
        m(generate)
    with pytest.raises(TypeError, match="an int cannot be decorated"):
        m(7)


def test_tasks_and_threads_may_overlap_in_one_measure(files, exits):
    """Whoever leaves first, each leaves its own block."""
    m = kf.measure(files, "exits")

    async def task(enter, leave, started):
        await enter.wait()
        async with m as block:
            started.set()
            await leave.wait()
        return block

    async def overlap():
        events = [asyncio.Event() for _ in range(5)]
        enter_b, leave_a, leave_b, a_started, b_started = events
        now = asyncio.Event()
        now.set()
        a = asyncio.create_task(task(now, leave_a, a_started))
        b = asyncio.create_task(task(enter_b, leave_b, b_started))
        await a_started.wait()
        exits(1)
        enter_b.set()
        await b_started.wait()
        exits(10)
        leave_a.set()
        first = await a
        exits(100)
        leave_b.set()
        return first, await b

    a, b = asyncio.run(overlap())
    assert (a.counts["exits"], b.counts["exits"]) == (11, 110)

    results, barrier = [], threading.Barrier(3)

    def thread():
        barrier.wait()
        for _ in range(200):
            with m as block:
                pass
            results.append(block.counts["exits"])

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert results == [0] * 600


def test_a_block_may_be_left_in_another_context(files, exits):
    """As the fixtures of some test runners are; a block that was not entered cannot be left."""
    m = kf.measure(files, "exits")

    async def enter():
        m.__enter__()

    async def leave():
        exits(4)
        m.__exit__(None, None, None)

    asyncio.run(enter())
    asyncio.run(leave())
    assert m.counts == {"exits": 4}
    with pytest.raises(RuntimeError, match="left, but was not entered"):
        m.__exit__(None, None, None)


@pytest.mark.real_vm
def test_the_exits_of_a_block_are_counted(guest, stats):
    """What a real guest did in the block, and nothing else."""
    with kf.measure(stats) as m:
        guest.run(250, vcpu=1)
    change = {name: int(m.delta[name][1]) for name in m.samples.vcpu.names if not m.samples.stat(name).shape}
    assert counts_right(change, 250)
    assert counts_right(m.counts, 250)
    assert m.delta[exit_counter()][0] == 0
    assert np.array_equal(m.samples.time, np.sort(m.samples.time))


def test_a_warning_that_is_an_error_does_not_hide_that_of_the_block(files, monkeypatch):
    """Where warnings are errors it comes out of the block, unless that raised; what was measured is there."""

    def with_a_remark(*readings):
        span = Span(*readings)
        span.remarks.append("the wall clock jumped")
        return span

    monkeypatch.setattr(measured, "Span", with_a_remark)
    with pytest.raises(kf.SamplingWarning, match="the wall clock jumped"), kf.measure(files) as m:
        pass
    assert m.elapsed > 0
    with pytest.raises(LookupError, match="of the block"), kf.measure(files) as m:
        raise LookupError("of the block")
    assert m.elapsed > 0


def test_a_phase_says_how_often_it_was_entered(files):
    """In its text, with how long that took."""
    with kf.measure(files) as m:
        for _ in range(2):
            with m.phase("boot"):
                pass
    assert repr(m.phases["boot"]) == f"<Phase: entered 2 times, {m.phases['boot'].elapsed:.6g} s>"


def test_a_block_at_whose_end_no_file_can_be_read_says_so(files):
    """Though it raised nothing: what was counted is not known."""
    closing = ExitStack()
    for file in files:
        closing.callback(file.close)
    with pytest.raises(ValueError, match="closed"), kf.measure(files):
        closing.close()
