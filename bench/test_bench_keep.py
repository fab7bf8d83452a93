"""Recording and loading."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import table
from long_run import FIVE, long_run
from test_bench_schedule import PRIORITY, may_be_real_time

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, TinyGuest

PARTS, SECONDS = 3, 2
BARE_SECONDS = 0.5  # of each bare loop, before each part
MARGIN = 0.001
DROPPED = "samples dropped, not recorded"  # what this machine misses without a recorder


@contextmanager
def busy_vcpus(vcpus):
    """The stats files of vCPUs that are run in turn."""
    try:
        guest = TinyGuest(vcpus)
    except KvmUnavailableError as error:
        pytest.skip(f"no real VM: {error.strerror}")
    over = threading.Event()

    def live():
        vcpu = 0
        while not over.wait(0.01):
            guest.run(100, vcpu % vcpus)
            vcpu += 1

    with ExitStack() as stack:
        stack.enter_context(guest)
        files = [stack.enter_context(file) for file in guest.open_stats()]
        thread = threading.Thread(target=live)
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)
        yield files[1:]


@pytest.mark.parametrize(
    "case",
    [
        (64, None, 1000, "sleep", "zstd", None),
        (64, None, 1000, "sleep", "lz4", None),
        (64, None, 1000, "sleep", None, None),
        (64, None, 1000, "sleep", DROPPED, None),
        (64, None, 1000, "hybrid", "zstd", None),
        (64, None, 1000, "hybrid", DROPPED, None),
        (64, None, 1000, "sleep", "zstd", PRIORITY),
        (64, None, 1000, "hybrid", "zstd", PRIORITY),
        (8, FIVE, 10_000, "hybrid", "zstd", None),
        (8, FIVE, 10_000, "spin", "zstd", None),
        (8, FIVE, 10_000, "spin", DROPPED, None),
        (8, FIVE, 10_000, "hybrid", "zstd", PRIORITY),
    ],
)
def test_recording(benchmark, tmp_path, limit, case):
    """Ticks missed, the recorder's share of a processor, and how much smaller the file is than the values."""
    vcpus, stats, rate, wait, compression, priority = case
    ticks = PARTS * SECONDS * rate
    spent = np.zeros(3)  # seconds: on the clock, of this thread, of this process
    bare = []

    def record():
        raw = missed = overruns = 0
        with ExitStack() as stack:
            recorder = None
            if compression != DROPPED:
                recorder = stack.enter_context(kf.Recorder(tmp_path / "run", compression=compression))
            sampler = kf.Sampler(files, stats)
            for _ in range(PARTS):
                bare.append(bare_loss(limit, rate, wait))
                before = clocks()
                with sampler.stream(1 / rate, wait=wait, duration=SECONDS, priority=priority) as stream:
                    for samples in stream:
                        raw += sum(group.values.nbytes for group in samples.groups)
                        if recorder is not None:
                            recorder.write(samples)
                spent[:] += clocks() - before
                missed, overruns = missed + stream.missed, overruns + stream.overruns
        return missed, overruns, raw / recorder.size if recorder else 0.0

    with busy_vcpus(vcpus) as files:
        if priority and not may_be_real_time(kf.Sampler(files)):
            pytest.skip("a priority takes CAP_SYS_NICE, or an RLIMIT_RTPRIO")
        missed, overruns, ratio = benchmark.pedantic(record, rounds=1)
    elapsed, own, everything = spent
    title = f"recording {PARTS} x {SECONDS} s of {vcpus} vCPUs, {len(stats) if stats else 'all'} statistics, {rate} Hz"
    smaller = f"{ratio:.1f}x smaller than the values; " if ratio else ""
    more = missed / ticks - np.mean(bare)
    text = (
        f"missed {missed / ticks:.2%} ({overruns} ticks for the recorder), a bare loop in between {np.mean(bare):.2%}; "
        f"recorder {own / elapsed:.1%} of a CPU, with sampling and guest {everything / elapsed:.1%}; {smaller}"
        f"at most {MARGIN:.1%} more than the loop: {'reached' if more <= MARGIN else 'MISSED'}"
    )
    label = f"{wait}, {compression or 'not compressed'}" + (f", priority {priority}" if priority else "")
    table.add(title, label, None, verdict=text)


def clocks():
    """Seconds on the clock, and of processor time of this thread and of the process."""
    return np.array([time.monotonic(), time.thread_time(), time.process_time()])


def bare_loss(limit, rate, wait):
    """The share of ticks that a bare loop misses which only sleeps, or only reads the clock; the better for hybrid."""
    loops = {"sleep": (limit[1].overslept_ticks,), "spin": (limit[1].lost_ticks,)}
    chosen = loops.get(wait) or (*loops["sleep"], *loops["spin"])
    return min(loop(10**9 // rate, round(BARE_SECONDS * 1e9)) for loop in chosen) / (rate * BARE_SECONDS)


LOAD = """
import sys, time
import numpy as np, pyarrow
import kvmstats_fast as kf

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = peak_kib()
start = time.perf_counter_ns()
x = kf.Samples.load(sys.argv[1])
loaded = time.perf_counter_ns() - start
peak = peak_kib()
total = int(x["exits"][-1].sum())
print(loaded, time.perf_counter_ns() - start, peak - before, len(x), x["exits"].flags.owndata, total, anonymous_kib())
"""


def test_loading(benchmark, tmp_path):
    """Load a recording of about 1 GB, in one batch or a hundred, compressed or not: time and peak memory."""
    sweeps, files = 15_000, 64
    x = long_run(sweeps, files)
    nbytes = x.groups[0].values.nbytes
    wanted = int(x["exits"][-1].sum())
    cases = {}
    for compression in (None, "zstd"):
        for batches in (1, 100):
            path = tmp_path / f"{compression}-{batches}"
            start = time.perf_counter_ns()
            with kf.Recorder(path, compression=compression) as recorder:
                for i in range(0, sweeps, sweeps // batches):
                    recorder.write(x[i : i + sweeps // batches])
            label = f"{batches} batch{'es' if batches > 1 else ''}, {compression or 'not compressed'}"
            cases[label] = (path, time.perf_counter_ns() - start, recorder.size)
    del x
    title = f"load of {nbytes / 1e9:.2f} GB of values ({sweeps} sweeps x {files} vCPUs, all statistics)"

    def load(path):
        result = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=True)
        return result.stdout.split()

    for label, (path, wrote, size) in cases.items():
        runs = sorted((load(path) for _ in range(3)), key=lambda run: int(run[0]))
        loaded, touched, peak, length, owned, total, anonymous = runs[1]
        assert (int(length), int(total)) == (sweeps, wanted)
        text = (
            f"one column read after {int(touched) / 1e6:.0f} ms; peak memory +{int(peak) / 1024:.0f} MiB, "
            f"{int(peak) * 1024 / nbytes:.2f}x the values (of its own {int(anonymous) / 1024:.0f} MiB); "
            f"{'copied' if owned == 'True' else 'in place'}; file {size / 1e9:.2f} GB, written in {wrote / 1e9:.1f} s"
        )
        table.add(title, label, int(loaded), verdict=text)
    compare_with_read(benchmark, cases["100 batches, not compressed"][0])
    benchmark.pedantic(lambda: load(cases["1 batch, not compressed"][0]), rounds=1)


#: As much memory, in pages as large; nothing is read.
TOUCH = """
import os, sys, time
import numpy, pyarrow
size = os.path.getsize(sys.argv[1])
start = time.perf_counter_ns()
numpy.empty(size, numpy.uint8)[::4096] = 1
print(time.perf_counter_ns() - start)
"""

READ = """
import sys, time
import numpy, pyarrow
start = time.perf_counter_ns()
with open(sys.argv[1], "rb") as file:
    file.read()
print(time.perf_counter_ns() - start)
"""

#: The same into memory that numpy got, and so into pages as large as its own.
READ_INTO = """
import os, sys, time
import numpy, pyarrow
size = os.path.getsize(sys.argv[1])
start = time.perf_counter_ns()
with open(sys.argv[1], "rb", buffering=0) as file:
    place, whole = 0, numpy.empty(size, numpy.uint8)
    while place < size:
        place += file.readinto(whole[place:])
print(time.perf_counter_ns() - start)
"""


def compare_with_read(benchmark, path):
    """Load a recording that is copied, and read() its file, each in a new process: memory is new to both.

    numpy asks the kernel for huge pages, read() gets small ones. A virtual machine may have given free memory back to
    its host, in huge pages (Documentation/mm/free_page_reporting.rst): to get it again takes longer than all that is
    compared here. So before each of them another process touches as much memory, which is free again then and there.
    """
    (file,) = path.iterdir()

    def run(code, where, huge="1"):
        environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": huge}
        call = [sys.executable, "-c", code, where]
        return subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout.split()

    def timed(*what):
        def timer():
            run(TOUCH, file)
            return int(run(*what)[0])

        return timer

    table.compare_timers(
        benchmark,
        "load of 100 batches, not compressed, beside read() of the file, into memory that the host has not taken back",
        {
            "limit: read() of the file": (timed(READ, file), None),
            "the same into huge pages": (timed(READ_INTO, file), None),
            "Samples.load": (timed(LOAD, path), ("at most", 1.5)),
            "Samples.load, into small pages": (timed(LOAD, path, "0"), ("at most", 1.5)),
            "touching as much new memory, huge pages": (timed(TOUCH, file), None),
            "touching as much new memory, small pages": (timed(TOUCH, file, "0"), None),
        },
        rounds=9,
    )
