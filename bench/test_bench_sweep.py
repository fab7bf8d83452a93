"""Sweeps over many real vCPUs, beside the bare system calls and beside what people do without this package."""

import contextlib
import itertools
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from qemu import needs_qemu, plain_qemu
from rivals import PythonStatsFile
from table import add, compare_timers, nothing, per_call

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


def limit_timer(limit, files, repeat):
    """The bare loop, into rows that stand side by side as a Sampler's do."""
    ffi, lib = limit
    size = files[0].schema.data_size
    rows = np.zeros((len(files), size), np.uint8)
    fds = ffi.new("int[]", [file.fileno() for file in files])
    positions = ffi.new("long[]", [file.header.data_offset for file in files])
    pointer = ffi.from_buffer("char[]", rows)
    return lambda: lib.sweeps(fds, positions, len(files), size, pointer, repeat) / len(files)


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

    at_most = {1: ("at most", 1.4), 64: ("at most", 1.03)}.get(count)
    timers = {
        "limit: pread in a bare C loop": (limit_timer(limit, chosen, repeat), None),
        "Sampler.sweep(), a call from Python each": (python(sampler.sweep), at_most),
        "Sampler.run(0), sweeps in the C loop": (
            lambda: of_run(sampler, repeat + 1) / count,
            ("at most", 1.4) if count == 1 else None,
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
        compare_timers(benchmark, f"sweep of {count} vCPU files, ns per file", timers, rounds=ROUNDS)
    benchmark.pedantic(sampler.sweep, rounds=ROUNDS, iterations=repeat)


@pytest.mark.benchmark(group="sweep")
def test_cost_per_file_is_flat(benchmark, limit, files):
    """Per-file cost of 1000 files against 64, of 512 too, in the same rounds; and the same of the limit."""
    samplers = {count: kf.Sampler(files[:count]) for count in (64, 512, 1000)}
    timers = {
        f"{count} files": (
            lambda sampler=sampler, count=count: per_call(sampler.sweep, 16_000 // count) / count,
            ("at most", 1.1) if count == 1000 else None,
        )
        for count, sampler in samplers.items()
    }
    timers |= {
        f"{count} files, limit": (limit_timer(limit, files[:count], 16_000 // count), None) for count in (64, 1000)
    }
    compare_timers(benchmark, "cost of a file in a wide sweep, ns per file", timers, rounds=ROUNDS)
    benchmark.pedantic(samplers[64].sweep, rounds=ROUNDS, iterations=16)


def of_run(sampler, count):
    """ns of one sweep in a run without a schedule."""
    samples = sampler.run(0, count=count)
    return float(samples.time[-1] - samples.time[0]) / (count - 1)


@pytest.mark.benchmark(group="run")
def test_threads_share_a_wide_sweep(benchmark, files):
    """One thread against two over 1000 files, in the C loop of a run."""
    two, one = kf.Sampler(files, threads=2), kf.Sampler(files)
    timers = {
        "threads=2": (lambda: of_run(two, 30), None),
        "threads=1": (lambda: of_run(one, 30), ("at least", 1.7)),
    }
    compare_timers(benchmark, "run over 1000 vCPU files, ns per sweep", timers, rounds=ROUNDS)
    benchmark.pedantic(lambda: of_run(two, 30), rounds=3, iterations=1)


@pytest.mark.benchmark(group="sweep")
def test_cost_of_stats(benchmark, files):
    """What choosing statistics saves: little time, for the system call is the cost; much memory."""
    chosen = files[:64]
    five = ["exits", "io_exits", "halt_exits", "irq_injections", "fpu_reload"]
    samplers = {
        "all 138 words": kf.Sampler(chosen),
        "stats: exits": kf.Sampler(chosen, "exits"),
        "stats: five, gathered": kf.Sampler(chosen, five),
        "stats: halt_*, gathered": kf.Sampler(chosen, "halt_*"),
    }
    timers = {
        label: (lambda sampler=sampler: per_call(sampler.sweep, 60) / 64, None) for label, sampler in samplers.items()
    }
    compare_timers(benchmark, "stats= in a sweep of 64 vCPU files, ns per file", timers, rounds=ROUNDS)
    benchmark.pedantic(samplers["stats: exits"].sweep, rounds=ROUNDS, iterations=60)


@pytest.mark.benchmark(group="schedule")
def test_quality_of_the_schedule(benchmark, limit, files):
    """How late sweeps of one vCPU are, and how many ticks are missed, for each rate and wait; one second each."""
    sampler = kf.Sampler(files[:1])
    for hertz, wait in itertools.product((1000, 10_000, 100_000), ("sleep", "hybrid", "spin")):
        samples = sampler.run(1 / hertz, duration=1, wait=wait)
        on_time = samples.time - samples.tick.astype(np.int64) * (10**9 // hertz)
        p50, p99, worst = np.percentile(on_time - on_time.min(), [50, 99, 100])
        text = f"late p50 {p50 / 1e3:.1f} us, p99 {p99 / 1e3:.1f} us, max {worst / 1e3:.0f} us; "
        share = samples.missed / (len(samples) + samples.missed)
        text += f"missed {samples.missed} of {len(samples) + samples.missed} ({share:.2%})"
        if (hertz, wait) == (100_000, "spin"):
            text += f"; under 0.1 %: {'reached' if share < 0.001 else 'MISSED'}"
        add("schedule of one vCPU, one second", f"{hertz} Hz, {wait}", None, verdict=text)
    for hertz in (10_000, 100_000):
        lost = limit[1].lost_ticks(10**9 // hertz, 10**9)
        text = f"missed {lost} of {hertz} ({lost / hertz:.2%}): gaps in which this machine did not let it run"
        add(
            "schedule of one vCPU, one second",
            f"{hertz} Hz, limit: a loop that only reads the clock",
            None,
            verdict=text,
        )
    benchmark.pedantic(lambda: sampler.run(0, count=100), rounds=3, iterations=1)


@needs_qemu
@pytest.mark.benchmark(group="rivals")
def test_against_qemu_query_stats(benchmark, files, tmp_path):
    """query-stats over QMP on a live QEMU with 4 vCPUs, per vCPU, beside a sweep of as many files."""
    vcpus = 4
    with contextlib.ExitStack() as stack:
        _, monitor = plain_qemu(tmp_path, stack, vcpus=vcpus)
        found = monitor("query-stats", target="vcpu")
        assert len([entry for entry in found if entry["provider"] == "kvm"]) == vcpus
        sampler = kf.Sampler(files[:vcpus])
        timers = {
            "Sampler.sweep()": (lambda: per_call(sampler.sweep, 500) / vcpus, None),
            "QEMU query-stats over QMP": (
                lambda: per_call(lambda: monitor("query-stats", target="vcpu"), 10) / vcpus,
                ("at least", 1000),
            ),
        }
        compare_timers(benchmark, "all statistics of a vCPU, ns per vCPU", timers, rounds=ROUNDS)
    benchmark.pedantic(sampler.sweep, rounds=ROUNDS, iterations=100)


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
