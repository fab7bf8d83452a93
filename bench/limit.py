"""The limit: a bare C loop of pread over the same fds, compiled on the spot and run in this process.

`lost_ticks` and `overslept_ticks` are the limits of a schedule: the ticks that a loop misses on this machine which only
reads the clock, or only sleeps from tick to tick.
"""

import importlib.util
import tempfile

from cffi import FFI

_SOURCE = """
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Returns the ticks that passed while another thread had the processor: gaps between clock readings, in intervals. */
static long lost_ticks(long interval, long long duration)
{
    long lost = 0;
    long long before = now_ns(), end = before + duration;
    while (before < end) {
        long long now = now_ns();
        lost += (now - before) / interval;
        before = now;
    }
    return lost;
}

/* Returns the ticks that a thread slept through which only sleeps, with the least timer slack. */
static long overslept_ticks(long interval, long long duration)
{
    long missed = 0;
    int slack = prctl(PR_GET_TIMERSLACK);
    long long due = now_ns() + interval, end = due + duration;
    prctl(PR_SET_TIMERSLACK, 1);
    for (; due < end; due += interval) {
        struct timespec at = {due / 1000000000, due % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, 0);
        long late = (now_ns() - due) / interval;
        missed += late;
        due += late * interval;
    }
    prctl(PR_SET_TIMERSLACK, slack);
    return missed;
}

static double sweeps(const int *fds, const long *positions, long n, long size, char *rows, long repeat)
{
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (long r = 0; r < repeat; ++r)
        for (long i = 0; i < n; ++i)
            if (pread(fds[i], rows + i * size, (size_t)size, positions[i]) != size)
                return -1;
    clock_gettime(CLOCK_MONOTONIC, &b);
    return ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec)) / repeat;
}
"""


def compile_limit():
    """Return (ffi, lib); lib.sweeps gives the nanoseconds of one sweep, the others numbers of ticks."""
    builder = FFI()
    builder.cdef("double sweeps(const int *, const long *, long, long, char *, long);")
    builder.cdef("long lost_ticks(long, long long); long overslept_ticks(long, long long);")
    builder.set_source("_kvmstats_limit", _SOURCE, extra_compile_args=["-O2"])
    with tempfile.TemporaryDirectory() as folder:
        spec = importlib.util.spec_from_file_location("_kvmstats_limit", builder.compile(folder))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.ffi, module.lib
