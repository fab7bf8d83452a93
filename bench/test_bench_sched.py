"""What it takes to read the scheduler's statistics in the same sweep, beside what it takes to read them from Python."""

import contextlib
import os
import threading
import warnings
from pathlib import Path

import pytest
from table import compare_timers, nothing, per_call

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, TinyGuest

COUNTS = (1, 64)


@pytest.fixture(scope="module")
def files():
    """Files of vCPUs, each of which has a sleeping thread that is called as Firecracker's are."""
    end = threading.Event()
    named = threading.Barrier(max(COUNTS) + 1)

    def sleep(number):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(f"fc_vcpu {number}")
        named.wait()
        end.wait()

    with contextlib.ExitStack() as stack:
        try:
            guest = stack.enter_context(TinyGuest(max(COUNTS)))
        except KvmUnavailableError as error:
            pytest.skip(f"no VM of {max(COUNTS)} vCPUs: {error.strerror}")
        stack.callback(end.set)
        for number in range(max(COUNTS)):
            threading.Thread(target=sleep, args=(number,)).start()
        named.wait()
        yield [stack.enter_context(kf.StatsFile.open(fd)) for fd in guest.vcpu_fds]


@pytest.mark.benchmark(group="sched")
@pytest.mark.parametrize("count", COUNTS)
def test_sweep_with_and_without_the_scheduler(benchmark, limit, files, count):
    """ns per vCPU of one sweep, all statistics, with and without those of its thread."""
    chosen = files[:count]
    loops = max(1, 4000 // count)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kf.SamplingWarning)
        samplers = {sched: kf.Sampler(chosen, sched=sched) for sched in (False, True)}
    tids = [int(path.name) for path in Path("/proc/self/task").iterdir() if "fc_vcpu" in (path / "comm").read_text()]
    fds = [os.open(f"/proc/self/task/{tid}/schedstat", os.O_RDONLY) for tid in sorted(tids)[:count]]

    ffi, lib = limit
    handles = ffi.new("int[]", fds)

    def by_hand():
        samplers[False].sweep()
        return [[*map(int, os.pread(fd, 64, 0).split())] for fd in fds]

    def python(call):
        return lambda: (per_call(call, loops) - per_call(nothing, loops)) / count

    timers = {
        "Sampler.sweep()": (python(samplers[False].sweep), None),
        "Sampler.sweep(), sched=True": (python(samplers[True].sweep), None),
        "limit: pread of the schedstats alone, a bare C loop": (
            lambda: lib.text_reads(handles, count, loops) / count,
            None,
        ),
        "Sampler.sweep(), and os.pread and int() for each thread": (python(by_hand), None),
    }
    try:
        compare_timers(benchmark, f"With the scheduler's statistics: {count} vCPUs, ns per vCPU", timers)
        benchmark.pedantic(samplers[True].sweep, rounds=21, iterations=10)
    finally:
        for fd in fds:
            os.close(fd)
