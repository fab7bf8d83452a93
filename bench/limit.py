"""The limits: bare C loops over the same fds, compiled on the spot and run in this process.

`sweeps` calls the C library's pread, as a good C programmer does; `sweeps_in_place` makes the system call where it
stands, as this package does (csrc/read.h), and nothing else. `lost_ticks` and `overslept_ticks` are the limits of a
schedule: the ticks that a loop misses on this machine which only reads the clock, or only sleeps from tick to tick.
`sum_words`, `copy_words` and `divide_words` are those of what is worked out over values in memory: they read them, and
write nothing, as many, or rates.
"""

import importlib.util
import statistics
import tempfile
import threading
from pathlib import Path

import numpy as np
from cffi import FFI

_CSRC = Path(__file__).parent.parent / "csrc"
_SOURCE = """
#include "clock.h"
#include "read.h"
#include <sys/prctl.h>

/* Returns the ticks that passed while another thread had the processor: gaps between clock readings, in intervals. */
static long lost_ticks(long interval, long long duration)
{
    long lost = 0;
    long long before = now_ns(), end = before + duration;
    while (before < end) {
        long long now = now_ns();
        lost += ((now < end ? now : end) - before) / interval;
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
        long long now = now_ns();
        long late = ((now < end ? now : end) - due) / interval;
        missed += late;
        due += late * interval;
    }
    prctl(PR_SET_TIMERSLACK, slack);
    return missed;
}

/* Returns the nanoseconds of one reading of short texts that the kernel writes anew each time, as in /proc. */
static double text_reads(const int *fds, long n, long repeat)
{
    char text[64];
    long long start = now_ns();
    for (long r = 0; r < repeat; ++r)
        for (long i = 0; i < n; ++i)
            if (pread_once(fds[i], text, sizeof text, 0) <= 0)
                return -1;
    return (double)(now_ns() - start) / repeat;
}

/* Returns how many ns of so many another thread had the processor: gaps of more than 5 us between clock readings. */
static long long lost_ns(long long duration)
{
    long long lost = 0, before = now_ns(), end = before + duration;
    while (before < end) {
        long long now = now_ns();
        if (now - before > 5000)
            lost += now - before;
        before = now;
    }
    return lost;
}
"""

#: Bare loops over values that are in memory.
_SERIES = """
/* Adds up words that are so far apart. */
static unsigned long long sum_words(const unsigned long long *words, long n, long step)
{
    unsigned long long sum = 0;
    for (long i = 0; i < n; ++i)
        sum += words[i * step];
    return sum;
}

/* Writes them side by side. */
static void copy_words(const unsigned long long *words, long n, long step, unsigned long long *out)
{
    for (long i = 0; i < n; ++i)
        out[i] = words[i * step];
}

/* Writes by how much they rose a second, sweep by sweep; of files whose words are so far apart. */
static void divide_words(const unsigned long long *words, long sweeps, long files, long step, const long long *time,
                         double *out)
{
    for (long sweep = 1; sweep < sweeps; ++sweep) {
        const unsigned long long *after = words + sweep * files * step, *before = after - files * step;
        double seconds = (time[sweep] - time[sweep - 1]) / 1e9;
        for (long file = 0; file < files; ++file)
            *out++ = (double)(after[file * step] - before[file * step]) / seconds;
    }
}
"""

#: A bare loop over files, with the call that reads one still to be filled in. From one sweep to the next it goes `step`
#: bytes on.
_SWEEPS = """
static double NAME(const int *fds, const long *positions, long n, long size, char *rows, long step, long repeat)
{
    long long start = now_ns();
    for (long r = 0; r < repeat; ++r)
        for (long i = 0; i < n; ++i)
            if (READ(fds[i], rows + r * step + i * size, (size_t)size, positions[i]) != size)
                return -1;
    return (double)(now_ns() - start) / repeat;
}
"""
_READS = {"sweeps": "pread", "sweeps_in_place": "pread_once"}


def compile_limit():
    """Return (ffi, lib); lib.sweeps* give the nanoseconds of one sweep, the others numbers of ticks or nanoseconds."""
    builder = FFI()
    for name in _READS:
        builder.cdef(f"double {name}(const int *, const long *, long, long, char *, long, long);")
    builder.cdef("long lost_ticks(long, long long); long overslept_ticks(long, long long);")
    builder.cdef("long long lost_ns(long long); double text_reads(const int *, long, long);")
    builder.cdef("unsigned long long sum_words(const unsigned long long *, long, long);")
    builder.cdef("void copy_words(const unsigned long long *, long, long, unsigned long long *);")
    builder.cdef("void divide_words(const unsigned long long *, long, long, long, const long long *, double *);")
    builder.set_source(
        "_kvmstats_limit",
        _SOURCE
        + _SERIES
        + "".join(_SWEEPS.replace("NAME", name).replace("READ", read) for name, read in _READS.items()),
        include_dirs=[str(_CSRC)],
        extra_compile_args=["-O2"],
    )
    with tempfile.TemporaryDirectory() as folder:
        spec = importlib.util.spec_from_file_location("_kvmstats_limit", builder.compile(folder))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.ffi, module.lib


LIBC, IN_PLACE = "limit: pread, a bare C loop", "limit: the call in place, a bare C loop"
KEPT = "limit: the same, each sweep into rows of its own"


def sweep_timers(limit, files, repeat):
    """Timers of the bare loops, ns per file, into rows that stand side by side as a Sampler's do, or a run's."""
    ffi, lib = limit
    size = files[0].schema.data_size
    row = len(files) * size
    fds = ffi.new("int[]", [file.fileno() for file in files])
    positions = ffi.new("long[]", [file.header.data_offset for file in files])

    def timer(sweeps, step=0):
        rows = np.empty(row + step * (repeat - 1), np.uint8)

        def timed():
            rows.fill(0)  # as the rows of a run are, before its clock starts
            return sweeps(fds, positions, len(files), size, ffi.from_buffer("char[]", rows), step, repeat) / len(files)

        return timed

    return {LIBC: timer(lib.sweeps), IN_PLACE: timer(lib.sweeps_in_place), KEPT: timer(lib.sweeps_in_place, row)}


def free_processors(limit, wanted, milliseconds=20):
    """Return a call that finds out how free so many processors are, and says so of all the times it was called."""
    shares = []

    def look():
        lost = [0] * wanted

        def spin(place):
            lost[place] = limit[1].lost_ns(milliseconds * 1_000_000)

        threads = [threading.Thread(target=spin, args=(place,)) for place in range(wanted)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shares.append(1 - max(lost) / (milliseconds * 1e6))
        return f"{wanted} processors at once were free {statistics.median(shares):.0%} of the time"

    return look
