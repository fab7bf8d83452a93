"""The wall clock jumps while files are sampled: every time that is shown is right, and the user is told once."""

import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.sampling.wall_clock import WallClock
from kvmstats_fast.testing import SyntheticStats

#: Adds seconds to CLOCK_REALTIME, and to nothing else: a file has how many, how many from a later time on, when that
#: is, counted from when another thread than the first asks next, and the number of this change.
STEP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static volatile double *file;
static double since, number;
__attribute__((constructor)) static void init(void)
{
    int fd = open(getenv("STEP_FILE"), O_RDONLY);
    file = mmap(0, 32, PROT_READ, MAP_SHARED, fd, 0);
}
static double shift(void)
{
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    double seconds = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    if (number != file[3] && syscall(SYS_gettid) != getpid()) {
        since = seconds;
        number = file[3];
    }
    return number == file[3] && seconds >= since + file[2] ? file[1] : file[0];
}
int clock_gettime(clockid_t clock, struct timespec *now)
{
    int status = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) {
        long long ns = now->tv_nsec + (long long)(shift() * 1e9);
        now->tv_sec += ns / 1000000000 - (ns % 1000000000 < 0);
        now->tv_nsec = ns % 1000000000 + (ns % 1000000000 < 0 ? 1000000000 : 0);
    }
    return status;
}
"""

PROGRAM = """
import os, struct, sys, threading, time, warnings
import numpy as np
import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

steps = [0.0]

def step(seconds, after=None):
    # At once; or so many seconds after the run that comes has asked for the time.
    numbers = (steps[-1] if after else seconds, seconds, after or 0, len(steps) if after else 0)
    with open(os.environ["STEP_FILE"], "r+b", buffering=0) as file:
        file.write(struct.pack("4d", *numbers))
    steps.append(seconds)

made = SyntheticStats(); file = made.open(); sampler = kf.Sampler([file])
kind, seconds = sys.argv[1], float(sys.argv[2])
offset = time.time_ns() - time.monotonic_ns()
"""

KINDS = {
    "run": "step(seconds, after=0.2); x = sampler.run(0.1, duration=1.6)",
    "run without end": ("step(seconds, after=0.2)\nthreading.Timer(0.6, sampler.stop).start(); x = sampler.run(0.01)"),
    "stream": (
        "parts = []\n"
        "with sampler.stream(0.002, chunk=10) as stream:\n"
        "    for part in stream:\n"
        "        parts.append(part)\n"
        "        if len(parts) == 4: step(seconds)\n"
        "        if len(parts) == 20: break\n"  # more than a stream is ahead
        "x = kf.Samples.concatenate(parts)"
    ),
    "measure": "with kf.measure([file]) as m: step(seconds)\nx = m.samples",
}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A function that runs code in a process whose wall clock can be set, and returns what it prints."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "step.c").write_text(STEP)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "step.so"), str(folder / "step.c")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no gcc to build a clock that can be set")

    def run(code, *arguments):
        (folder / "by").write_bytes(bytes(32))
        environment = {"LD_PRELOAD": str(folder / "step.so"), "STEP_FILE": str(folder / "by"), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", PROGRAM + code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


CHECK = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    CODE
told = [str(one.message) for one in caught if one.category is kf.SamplingWarning]
assert all(one.filename == "<string>" for one in caught)
jumps = np.diff(x.wall_time - x.time)
print(len(told), *told, sep="|")
print(*[round(float(jump) / 1e9, 2) for jump in jumps[abs(jumps) > 10**6]])
print(abs(int(x.wall_time[0] - x.time[0]) - offset) < 10**7, abs(int(x.wall_time[-1]) - time.time_ns()) < 3 * 10**9)
"""


@pytest.mark.parametrize("seconds", [28800, -1_700_000_000, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_clock_is_followed_and_told_once(stepped, kind, seconds):
    """The clock is set, or the host was asleep: all times are right, and one warning points at the caller's line."""
    code = CHECK.replace("CODE", KINDS[kind].replace("\n", "\n    "))
    told, jumps, right = stepped(code, kind, seconds)
    count, *texts = told.split("|")
    assert count == "1"
    assert f"the wall clock jumped by {seconds:+.3f} s while files were sampled" in texts[0]
    assert [float(jump) for jump in jumps.split()] == [pytest.approx(seconds, abs=0.02)]
    assert right == "True True"


def test_a_clock_that_stands_has_no_steps():
    """However noisy the two readings are, samples of one run have one offset, and no warning comes."""
    with SyntheticStats() as made, made.open() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = kf.Sampler([file])
        before = time.time_ns()
        for samples in (sampler.run(0.001, duration=1.1), sampler.run(0, count=100_000)):
            assert samples.wall_steps == ()
            assert before < samples.wall_time[0] < samples.wall_time[-1] < time.time_ns()
        with sampler.stream(0.001, chunk=1, count=300) as stream:
            whole = kf.Samples.concatenate(list(stream))
        assert whole.wall_steps == ()


def test_steps_are_told_from_errors_of_reading():
    """Up to 1 ms the offset stays, above it is taken over, above 10 ms the user is told; slow drift adds up."""
    remarks = []
    clock = WallClock(1000, remarks)
    assert clock.follow(1000 + 10**6) == 1000
    assert clock.follow(1000 - 10**6) == 1000
    assert clock.follow(1000 + 2 * 10**6) == 1000 + 2 * 10**6
    assert clock.follow(1000 + 11 * 10**6) == 1000 + 11 * 10**6
    assert remarks == []
    assert clock.follow(0) == 0
    assert len(remarks) == 1
    assert clock.follow(0) == 0
    assert len(remarks) == 1
    assert clock.follow(-(10**18)) == -(10**18)
    assert len(remarks) == 2


def test_the_offset_is_read_exactly():
    """Of some tries the best: two readings differ by less than the time of a sweep, on a busy host too."""
    with SyntheticStats() as made, made.open() as file:
        sweep_ns = kf.Sampler([file]).run(0, count=1000).sweep_ns
    clocks = [
        (time.monotonic_ns(), time.time_ns(), time.monotonic_ns(), lib.kvmstats_wall_offset()) for _ in range(1000)
    ]
    before, wall, after, offsets = np.array(clocks).T
    assert np.median(np.abs(offsets - np.median(offsets))) < np.median(sweep_ns)
    beyond = np.maximum(wall - after - offsets, offsets - (wall - before))  # of what two readings of the other allow
    assert np.median(beyond) < np.median(sweep_ns)


ERRORS = """
warnings.simplefilter("error")
numbers, refused = [], 0
with sampler.stream(0.005, chunk=10, count=200) as stream:
    while True:
        try:
            part = next(stream)
        except StopIteration:
            break
        except kf.SamplingWarning:
            refused += 1
            continue
        numbers.append(len(part) + part.missed)
        if len(numbers) == 4: step(seconds)
print(sum(numbers), refused)
step(0, after=0.2)
try:
    sampler.run(0.1, duration=1.6)
except kf.SamplingWarning as error:
    print(len(error.samples) + error.samples.missed, len(error.samples.wall_steps))
"""


def test_where_warnings_are_errors_no_chunk_is_lost(stepped):
    """The chunk of which a stream warned comes with the next call; a run's samples are in the exception."""
    assert stepped(ERRORS, "stream", 3600) == ["200 1", "16 1"]
