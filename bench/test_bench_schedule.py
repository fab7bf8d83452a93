"""Schedules: how late sweeps are and how many ticks are missed, by wait, on the host as it is and on a busy one.

The host decides most of it. So each row stands beside a bare C loop of the same rounds, which only sleeps from tick to
tick or only reads the clock: what that loop misses, nobody can help.
"""

import os
import statistics
import subprocess
import threading
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from table import add, turns

import kvmstats_fast as kf
from kvmstats_fast.sampling.schedule import WAITS
from kvmstats_fast.testing import KvmUnavailableError, SyntheticStats, TinyGuest

SECONDS, ROUNDS = 0.3, 5
PRIORITY = 50
SLEEPS, READS = "limit: a loop that sleeps", "limit: a loop that reads the clock"
#: What a wait cannot be better than: one of the loops, or whichever of them misses less.
LIMITS = {"sleep": (SLEEPS,), "spin": (READS,), "hybrid": (SLEEPS, READS)}
MARGIN = 0.001


@pytest.fixture(scope="module")
def file():
    """A real vCPU's, or a made-up one."""
    with ExitStack() as stack:
        try:
            guest = stack.enter_context(TinyGuest(1))
            yield stack.enter_context(kf.StatsFile.open(guest.vcpu_fds[0]))
        except KvmUnavailableError:
            yield stack.enter_context(stack.enter_context(SyntheticStats()).open())


@pytest.fixture
def busy_host():
    """Three processes that want a processor each for every two there are, in sessions of their own as VMMs are."""
    hogs = [
        subprocess.Popen(["sh", "-c", "while :; do :; done"], start_new_session=True)
        for _ in range(-(-3 * len(os.sched_getaffinity(0)) // 2))
    ]
    yield len(hogs)
    for hog in hogs:
        hog.kill()
        hog.wait()


def lateness(samples):
    """How late each sweep was, in ns, if the one that was least late was not."""
    late = samples.time - samples.tick.astype(np.int64) * round(samples.interval * 1e9)
    return late - late.min()


def of_run(sampler, hertz, wait, priority):
    """The share of ticks that a run missed, and how late its sweeps were."""
    samples = sampler.run(1 / hertz, duration=SECONDS, wait=wait, priority=priority)
    return samples.missed / (samples.missed + len(samples)), lateness(samples)


def of_loop(loop, hertz):
    """The share of ticks that a bare loop missed, in a thread of its own as a run has."""
    missed = []
    thread = threading.Thread(target=lambda: missed.append(loop(10**9 // hertz, round(SECONDS * 1e9))))
    thread.start()
    thread.join()
    return missed[0] / (SECONDS * hertz), None


def may_be_real_time(sampler):
    """Whether a run may have a priority here."""
    try:
        sampler.run(0, count=1, priority=PRIORITY)
    except PermissionError:
        return False
    return True


def compare_schedules(title, limit, file, hertz, priorities):
    """Rows for each wait and priority, and for the bare loops, all in turn."""
    sampler = kf.Sampler([file])
    timers = {SLEEPS: partial(of_loop, limit[1].overslept_ticks, hertz)}
    timers[READS] = partial(of_loop, limit[1].lost_ticks, hertz)
    limits = {}
    for priority in priorities:
        for wait in WAITS:
            label = f"{wait}, priority {priority}" if priority else wait
            timers[label] = partial(of_run, sampler, hertz, wait, priority)
            limits[label] = LIMITS[wait]
    missed, late = {label: [] for label in timers}, {label: [] for label in timers}
    for number in range(ROUNDS):
        for label in turns(timers, number):
            share, times = timers[label]()
            missed[label].append(share)
            late[label].append(times)
    for label, shares in missed.items():
        text = f"missed {statistics.median(shares):6.2%} [{min(shares):.2%}, {max(shares):.2%}]"
        if label in limits:
            p50, p99 = np.percentile(np.concatenate(late[label]), [50, 99]) / 1e3
            least = [min(some) for some in zip(*(missed[loop] for loop in limits[label]), strict=True)]
            low, more, high = statistics.quantiles([a - b for a, b in zip(shares, least, strict=True)], n=4)
            reached = "reached" if more <= MARGIN else "MISSED"
            text += (
                f"; late p50 {p50:.1f} us, p99 {p99:.1f} us; {more:+.2%} [{low:+.2%}, {high:+.2%}] beside the loop: "
            )
            text += f"at most {MARGIN:+.1%}: {reached}"
        add(f"{title}, {hertz} Hz", label, None, verdict=text)


@pytest.mark.benchmark(group="schedule")
@pytest.mark.parametrize("hertz", [1000, 10_000, 100_000])
def test_on_the_host_as_it_is(benchmark, limit, file, hertz):
    """One vCPU, each wait."""
    title = f"schedule of one vCPU, {ROUNDS} x {SECONDS} s each, the host as it is"
    compare_schedules(title, limit, file, hertz, [None])
    benchmark.pedantic(lambda: kf.Sampler([file]).run(0, count=100), rounds=3, iterations=1)


@pytest.mark.benchmark(group="schedule")
@pytest.mark.parametrize("hertz", [1000, 10_000])
def test_on_a_busy_host(benchmark, limit, file, busy_host, hertz):
    """One vCPU, each wait, with a priority and without, while others want all processors."""
    priorities = [None, PRIORITY] if may_be_real_time(kf.Sampler([file])) else [None]
    title = f"schedule of one vCPU, {ROUNDS} x {SECONDS} s each, beside {busy_host} processes that use a processor each"
    compare_schedules(title, limit, file, hertz, priorities)
    if len(priorities) == 1:
        add(f"{title}, {hertz} Hz", "with a priority", None, verdict="skipped: it takes CAP_SYS_NICE")
    benchmark.pedantic(lambda: kf.Sampler([file]).run(0, count=100), rounds=3, iterations=1)
