"""Sweeps over many real vCPUs, beside the bare system calls and beside what people do without this package."""

import contextlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from limit import IN_PLACE, LIBC, free_processors, sweep_timers
from rivals import PythonStatsFile
from table import compare_timers, nothing, per_call

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, TinyGuest

COUNTS = (1, 8, 64, 512, 1000)
ROUNDS = 21


@pytest.fixture(scope="module")
def guest():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10_000), hard))
    try:
        with TinyGuest(max(COUNTS)) as guest:
            yield guest
    except KvmUnavailableError as error:
        pytest.skip(f"no VM of {max(COUNTS)} vCPUs: {error.strerror}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def files(guest):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(kf.StatsFile.open(fd)) for fd in guest.vcpu_fds]


#: By number of files: what a sweep from Python, and one of a run, may cost of the bare loop of the C library's pread.
SWEEP_TARGETS = {1: 1.45, 64: 1.0}
RUN_TARGETS = {1: 1.18, 8: 1.08, 64: 1.06}


def at_most(targets, count):
    """The target of a row, if there is one for so many files."""
    return ("at most", targets[count], LIBC) if count in targets else None


@pytest.mark.benchmark(group="sweep")
@pytest.mark.parametrize("count", COUNTS)
def test_sweep_against_the_limit_and_the_rivals(benchmark, limit, files, guest, count):
    """ns per file of one sweep over `count` vCPUs, all statistics."""
    chosen = files[:count]
    repeat = max(1, 4000 // count)
    sampler = kf.Sampler(chosen)
    size, position = chosen[0].schema.data_size, chosen[0].header.data_offset
    fds = [file.fileno() for file in chosen]
    buffers = [np.empty(size // 8, np.uint64) for _ in fds]

    def preadv():
        for fd, buffer in zip(fds, buffers, strict=True):
            os.preadv(fd, [buffer], position)

    def frombuffer():
        return [np.frombuffer(os.pread(fd, size, position), np.uint64) for fd in fds]

    def python(call, slower=1):
        loops = max(1, repeat // slower)
        return lambda: (per_call(call, loops) - per_call(nothing, loops)) / count

    timers = {label: (timer, None) for label, timer in sweep_timers(limit, chosen, repeat).items()} | {
        "Sampler.sweep(), a call from Python each": (python(sampler.sweep), at_most(SWEEP_TARGETS, count)),
        "Sampler.run(0), sweeps in the C loop": (
            lambda: of_run(sampler, repeat + 1) / count,
            at_most(RUN_TARGETS, count),
        ),
        "os.preadv into a buffer per file": (python(preadv), None),
        "np.frombuffer(os.pread())": (python(frombuffer), None),
    }
    with contextlib.ExitStack() as stack:
        rivals = [PythonStatsFile(fd) for fd in guest.vcpu_fds[:count]]
        for rival in rivals:
            stack.callback(rival.close)
        slow = python(lambda: [rival.one_pread_per_stat() for rival in rivals], 20)
        timers["one pread per statistic, Python"] = (slow, ("at least", 100) if count == 64 else None)
        title = f"sweep of {count} vCPU files, ns per file"
        compare_timers(benchmark, title, timers, reference=(LIBC, IN_PLACE), rounds=ROUNDS)
    benchmark.pedantic(sampler.sweep, rounds=ROUNDS, iterations=repeat)


@pytest.mark.benchmark(group="sweep")
def test_cost_per_file_is_flat(benchmark, limit, files):
    """Per-file cost of 1000 files against 64, of 512 too, in the same rounds; and the same of the call in place."""
    samplers = {count: kf.Sampler(files[:count]) for count in (64, 512, 1000)}
    timers = {
        f"{count} files": (
            lambda sampler=sampler, count=count: per_call(sampler.sweep, 16_000 // count) / count,
            ("at most", 1.1) if count == 1000 else None,
        )
        for count, sampler in samplers.items()
    }
    timers |= {
        f"{count} files, limit": (sweep_timers(limit, files[:count], 16_000 // count)[IN_PLACE], None)
        for count in (64, 1000)
    }
    compare_timers(benchmark, "cost of a file in a wide sweep, ns per file", timers, rounds=ROUNDS)
    benchmark.pedantic(samplers[64].sweep, rounds=ROUNDS, iterations=16)


def of_run(sampler, count):
    """ns of one sweep in a run without a schedule."""
    samples = sampler.run(0, count=count)
    return float(samples.time[-1] - samples.time[0]) / (count - 1)


@pytest.mark.benchmark(group="run")
def test_threads_share_a_wide_sweep(benchmark, limit, files):
    """One thread against two over 1000 files, in the C loop of a run: it takes two processors that are free."""
    two, one = kf.Sampler(files, threads=2), kf.Sampler(files)
    timers = {
        "threads=2": (lambda: of_run(two, 30), None),
        "threads=1": (lambda: of_run(one, 30), ("at least", 1.7)),
    }
    title = "run over 1000 vCPU files, ns per sweep"
    compare_timers(benchmark, title, timers, rounds=ROUNDS, note=free_processors(limit, 2))
    benchmark.pedantic(lambda: of_run(two, 30), rounds=3, iterations=1)


@pytest.mark.benchmark(group="sweep")
def test_cost_of_stats(benchmark, files):
    """What choosing statistics saves: little time, for the system call is the cost; much memory."""
    chosen = files[:64]
    five = ["exits", "io_exits", "halt_exits", "irq_injections", "fpu_reload"]
    samplers = {
        f"all {chosen[0].schema.num_values} words": kf.Sampler(chosen),
        "stats: exits": kf.Sampler(chosen, "exits"),
        "stats: five, gathered": kf.Sampler(chosen, five),
        "stats: halt_*, gathered": kf.Sampler(chosen, "halt_*"),
    }
    timers = {
        label: (lambda sampler=sampler: per_call(sampler.sweep, 60) / 64, None) for label, sampler in samplers.items()
    }
    compare_timers(benchmark, "stats= in a sweep of 64 vCPU files, ns per file", timers, rounds=ROUNDS)
    benchmark.pedantic(samplers["stats: exits"].sweep, rounds=ROUNDS, iterations=60)


@pytest.mark.usefixtures("guest")
@pytest.mark.benchmark(group="rivals")
def test_against_debugfs(benchmark, files):
    """One debugfs file per statistic, for those that can be read."""
    folders = sorted(Path("/sys/kernel/debug/kvm").glob(f"{os.getpid()}-*/vcpu0/..")) if os.geteuid() == 0 else []
    names = [path for folder in folders[:1] for path in sorted(folder.iterdir()) if path.is_file()]
    readable = []
    for path in names:
        with contextlib.suppress(OSError):
            path.read_text()
            readable.append(path)
    if len(readable) < 5:
        pytest.skip(f"debugfs shows {len(readable)} statistics of this VM (not root, not mounted, or locked down)")
    sampler = kf.Sampler(files[:1])
    timers = {
        f"Sampler.sweep(), {len(files[0].schema)} statistics": (lambda: per_call(sampler.sweep, 500), None),
        f"debugfs, {len(readable)} files": (lambda: per_call(lambda: [p.read_text() for p in readable], 5), None),
    }
    compare_timers(benchmark, "one reading", timers, rounds=ROUNDS)
    benchmark.pedantic(sampler.sweep, rounds=ROUNDS, iterations=100)
