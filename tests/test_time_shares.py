"""Where the time of vCPUs goes: shares that add up, and halts where they were."""

import os
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import numpy as np
import pytest
from helpers import examples
from holder import Holder
from hypothesis import strategies as st
from qemu import firmware, needs_qemu, plain_qemu, until
from test_sched import NAMES, REAL, SPIN, schedstat

import kvmstats_fast as kf
from kvmstats_fast import plot
from kvmstats_fast.analysis.tally import Tally, _WholeTally
from kvmstats_fast.analysis.time_shares import HALT, NEEDED, divide_samples, time_between
from kvmstats_fast.analysis.whole_run import WholeRun
from kvmstats_fast.schedstat import STATS
from kvmstats_fast.stat import Stat
from kvmstats_fast.testing import SyntheticStats, make_samples
from kvmstats_fast.vmm.threads import FIRST_NAMESPACE

SHARES = ("running", "polling", "halted", "steal", "other")
MS = 1_000_000
HALTS = [Stat(name, 0, 2, 0, -9, 1, -1) for name in NEEDED[2:]]


def made(halts, **values):
    """Samples of one vCPU at 1 s intervals: what it had been halted for at each, in ms, and other values."""
    stats = [*HALTS, *STATS, Stat("blocking", 1, 4, 0, 0, 1, -1)]
    stats = [Stat(s.name, s.type, s.unit, s.base, s.exponent, s.size, -1) for s in stats]
    with SyntheticStats(stats=stats) as file:
        named = {stat.name: [0] * len(halts) for stat in stats} | values
        named["halt_wait_ns"] = [halt * MS for halt in halts]
        return make_samples([file], {name: np.reshape(some, (-1, 1)) for name, some in named.items()})


def halted(samples, *edges):
    """How long the vCPU was halted between some sweeps, in ms."""
    return (time_between(samples, HALT, np.array(edges))[:, 0] * 1000).round(6).tolist()


def test_a_halt_is_where_it_was_and_not_where_it_is_counted():
    """KVM counts a halt when it ends: 2500 ms at second 3 were the time from 0.5 s on."""
    x = made([0, 0, 0, 2500, 2500], blocking=[0, 1, 1, 0, 0])
    assert halted(x, 0, 1, 2, 3, 4) == [500, 1000, 1000, 0]
    assert halted(x, 0, 4) == [2500]


def test_a_halt_counts_for_no_longer_than_the_samples():
    """One that began an hour before them ends in them."""
    x = made([0, 0, 3_600_000, 3_600_000], blocking=[1, 1, 0, 0])
    assert halted(x, 0, 1, 2, 3) == [1000, 1000, 0]


@pytest.mark.parametrize(
    ("halts", "blocking", "expected"),
    [
        ([0, 0, 0, 0], [1, 1, 1, 1], [1000, 1000, 1000]),
        ([0, 0, 0, 0], [0, 1, 1, 1], [1000, 1000, 1000]),
        ([0, 0, 0, 0], [1, 0, 1, 1], [0, 1000, 1000]),
        ([0, 100, 100, 100], [1, 1, 1, 1], [1000, 1000, 1000]),
        ([0, 0, 100, 100], [0, 0, 1, 1], [0, 1000, 1000]),
        ([0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0]),
    ],
)
def test_a_halt_under_way_at_the_end_counts_for_as_long_as_it_can_have_lasted(halts, blocking, expected):
    """From the last sweep that shows that it had not begun; a vCPU that does not block is in none."""
    x = made(halts, blocking=blocking)
    found = halted(x, 0, 1, 2, 3)
    assert all(abs(one - other) <= 100 for one, other in zip(found, expected, strict=True)), found


def test_shares_of_made_up_times_are_exact():
    """Polling is not counted as running too, nor waiting as halted too."""
    times = {"sched_run_ns": 500 * MS, "sched_wait_ns": 200 * MS, "halt_poll_success_ns": 100 * MS}
    x = made([0, 250], **{name: [0, value] for name, value in times.items()})
    shares = {name: figure.values[0] for name, figure in x.figures().items() if name.endswith("_share")}
    expected = {"running": 0.4, "polling": 0.1, "halted": 0.25, "steal": 0.2, "other": 0.05}
    assert shares == pytest.approx({f"{name}_share": value for name, value in expected.items()})
    y = made([0, 450], **{name: [0, value] for name, value in times.items()})
    assert y.figures()["halted_share"].values[0] == pytest.approx(0.3)
    assert y.figures()["other_share"].values[0] == pytest.approx(0)


def test_without_the_scheduler_s_statistics_there_are_no_shares():
    """And no figure fails."""
    with SyntheticStats() as file:
        x = make_samples([file], {stat.name: [[0], [1]] for stat in HALTS})
    assert not [name for name in x.figures() if name in {f"{name}_share" for name in SHARES}]
    with pytest.raises(KeyError, match="sched=True"):
        plot.time_shares(x)


def test_a_vcpu_that_failed_is_divided_until_then():
    """What is behind that means nothing."""
    x = made([0, 0, 0, 0], sched_run_ns=[0, 1000 * MS, 0, 0])
    x.errors = (kf.samples.SampleError(0, 2, OSError()),)
    assert x.figures()["running_share"].values.tolist() == [1.0]
    elapsed, parts = divide_samples(x, np.array([0, 1, 3]))
    assert elapsed[:, 0].tolist() == [1, 0]
    assert parts["running"][:, 0].tolist() == [1, 0]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_vcpu_that_failed_before_a_second_sweep_was_halted_for_no_time(failed):
    """Two sweeps that were read make a time; what is behind them means nothing."""
    x = made([0, 900, 900], blocking=[0, 1, 1])
    x.errors = (kf.samples.SampleError(0, failed, OSError()),)
    assert halted(x, 0, 1, 2) == [0, 0]


@hypothesis.given(
    steps=st.lists(
        st.tuples(st.sampled_from([0, 0, 100, 1500, 9000]), st.sampled_from([0, 1])), min_size=2, max_size=9
    ),
    cuts=st.sets(st.integers(1, 8), max_size=4),
    failed=st.none() | st.integers(0, 9),
    is_gap=st.sets(st.integers(1, 8), max_size=2),
)
@hypothesis.settings(examples(150))
def test_halts_that_come_batch_by_batch_are_those_of_the_whole(steps, cuts, failed, is_gap):
    """However a run is cut, and where a file fails; what is apart is a run of its own."""
    changes, blocking = zip(*steps, strict=True)
    x = made(np.cumsum(changes).tolist(), blocking=list(blocking))
    if failed is not None:
        x.errors = (kf.samples.SampleError(0, failed, OSError()),)
    tally, edges = Tally(), sorted({0, *(cut for cut in cuts if cut < len(x)), len(x)})
    for start, stop in pairwise(edges):
        tally.add(x[start:stop], follows=start not in is_gap)
    stretches = [x[a:b] for a, b in pairwise(sorted({0, *(is_gap & {*edges}), len(x)}))]
    wanted = np.nansum([WholeRun(one, "vcpu").halted() for one in stretches if len(one)])
    assert np.nansum(_WholeTally(tally._runs, "vcpu").halted()) == pytest.approx(wanted)


def test_the_plot_has_an_area_for_each_share():
    """Stacked, so that they reach 1; steps of 0.1 s at least."""
    pytest.importorskip("matplotlib").use("agg")
    x = made([0, 500, 1000, 1500], sched_run_ns=np.arange(4) * 500 * MS)
    ax = plot.time_shares(x)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(SHARES)
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in ax.collections]
    assert tops == pytest.approx([0.5, 0.5, 1, 1, 1])


# ---- real vCPUs


def shares_of(samples):
    """The shares of each vCPU, (5, n)."""
    figures = samples.figures()
    return np.array([figures[f"{name}_share"].values for name in SHARES])


def two_guests(resources, cpu):
    """Two VMs of one vCPU each, which never sleeps."""
    pin = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\n"
    holders = [resources.enter_context(Holder(1, before=pin + SPIN)) for _ in range(2)]
    return [resources.enter_context(kf.attach(holder.pid)) for holder in holders]


def two_of_qemu(resources, cpu):
    """A QEMU of two vCPUs that never sleep; only the ids of their files say which threads run them."""
    if str(Path("/proc/self/ns/pid").readlink()) != FIRST_NAMESPACE:
        pytest.skip("the ids of KVM's files have the numbers of another pid namespace")
    folder = Path(resources.enter_context(TemporaryDirectory()))
    process, monitor = plain_qemu(folder, resources, *firmware(folder, "SPIN"), vcpus=2)
    machine = resources.enter_context(kf.attach(process.pid, inject=True))
    for tid in (one["thread-id"] for one in monitor("query-cpus-fast")):
        os.sched_setaffinity(tid, {cpu})
    return [machine]


@REAL
@pytest.mark.parametrize("start", [two_guests, pytest.param(two_of_qemu, marks=needs_qemu)])
def test_two_vcpus_on_one_processor_share_it(start, resources):
    """They run and wait as long as /proc says of the same time, and both together run no longer than it lasted."""
    machines = start(resources, min(os.sched_getaffinity(0)))
    tids = [(machine.pid, tid) for machine in machines for tid in machine.threads.values()]
    assert len(tids) == 2

    def proc():
        return np.array([schedstat(*tid) for tid in tids])

    measured = kf.measure(machines, sched=True)
    outer = proc()
    with measured as m:
        inner = proc()
        until(lambda: min((proc() - inner)[:, 2]) >= 8)
        inner = proc() - inner
    outer = proc() - outer
    counted = np.transpose([m.delta[name] for name in NAMES])
    assert (inner <= counted).all()
    assert (counted <= outer).all()
    run, wait = counted[:, 0] / 1e9, counted[:, 1] / 1e9
    assert run.sum() <= m.elapsed + 0.02  # and what they had run since the last tick before
    shares = dict(zip(SHARES, shares_of(m.samples), strict=True))
    assert shares["running"] + shares["polling"] == pytest.approx(run / m.elapsed)
    assert shares["steal"] == pytest.approx(wait / m.elapsed)
    assert sum(shares.values()) == pytest.approx(np.maximum(1, (run + wait) / m.elapsed))


@needs_qemu
@REAL
def test_a_guest_that_halts_is_halted(tmp_path, resources):
    """The second vCPU of a firmware halts for good: its halt never ends, and yet its time is that of a halt."""
    process, _ = plain_qemu(tmp_path, resources, vcpus=2)
    machine = resources.enter_context(kf.attach(process.pid, inject=True))
    sampler = kf.Sampler([machine.vcpus[1]], [*NEEDED, "blocking"], sched=True)
    x = until(lambda: (some := sampler.run(0.01, count=5))["blocking"].all() and not some.total(HALT) and some)
    shares = dict(zip(SHARES, shares_of(x)[:, 0].tolist(), strict=True))
    assert shares["halted"] > 0.9
    assert sum(shares.values()) == pytest.approx(1, abs=0.1)  # a tick of 4 ms in 40
