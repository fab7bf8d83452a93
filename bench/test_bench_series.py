"""What is worked out over all sweeps, beside copies of the values and bare loops over their cache lines.

Results are arrays of their own, in memory that the system has to find and to clear first, which takes longer than to
fill it. So is the copy that they stand beside; the row of a copy into memory that is there says what that makes.
Processor time, because who else wants the processor matters more than what is compared.
"""

import time
from functools import partial

import numpy as np
import pytest
import table
from long_run import FIVE, long_run

from kvmstats_fast import changes, series

ROUNDS = 7
#: Sweeps, files and statistics: rows of 5 words, and of all.
RUNS = [(500_000, 8, FIVE), (6000, 64, None)]
TWICE = ("at most", 2)


@pytest.fixture(scope="module", params=RUNS, ids=["5 statistics", "all statistics"])
def run(request):
    """Samples, and what they are."""
    sweeps, files, stats = request.param
    x = long_run(sweeps, files, stats)
    size = x.groups[0].values.nbytes
    return (
        x,
        f"{sweeps} sweeps x {files} vCPUs, {'all' if stats is None else len(stats)} statistics, {size / 1e6:.0f} MB",
    )


def timed(call):
    """Return a timer of one call, of its processor time; letting go of what it returns is not counted."""

    def timer():
        start = time.process_time_ns()
        result = call()
        took = time.process_time_ns() - start
        del result
        return took

    return timer


def compare(benchmark, title, contenders, rounds=ROUNDS):
    """Compare calls, (call, target) by label."""
    timers = {label: (timed(call), target) for label, (call, target) in contenders.items()}
    table.compare_timers(benchmark, f"{title}: processor time", timers, rounds=rounds)
    benchmark.pedantic(next(iter(contenders.values()))[0], rounds=1)


def copy_words(limit, values, out=None):
    """Copy values, one by one, by the ordinary stores of a loop in C; into new memory, if there is no other."""
    ffi, lib = limit
    out = np.empty(values.shape, np.uint64) if out is None else out
    step = values.strides[-1] // 8
    lib.copy_words(pointer(ffi, values), values.size, step, pointer(ffi, out))
    return out


def divide_words(limit, values, time):
    """Work out rates of (sweeps, files) by a loop in C, as one writes it in an afternoon, into new memory."""
    ffi, lib = limit
    out = np.empty((len(values) - 1, values.shape[1]))
    where = pointer(ffi, values), *values.shape, values.strides[1] // 8
    lib.divide_words(*where, ffi.from_buffer("long long[]", time), ffi.from_buffer("double[]", out))
    return out


def pointer(ffi, values):
    """Return the address of the first value."""
    return ffi.cast("unsigned long long *", values.__array_interface__["data"][0])


@pytest.mark.benchmark(group="series")
def test_all_statistics(benchmark, limit, run):
    """Rates, changes, sums and copies of all statistics, each in one pass."""
    x, about = run
    values, names = x.groups[0].values, x.names
    room = values.copy()
    views = [x.groups[0].view(name) for name in names]
    contenders = {
        "memcpy of the values into new memory": (values.copy, None),
        "Samples.rates(), float64 per second": (x.rates, TWICE),
        "changes": (partial(changes.deltas, x, names), TWICE),
        "resets": (partial(changes.resets, x, names), None),
        "totals": (partial(changes.totals, x, names), None),
        "each by itself in a piece (gather)": (partial(series.gather, views), TWICE),
        "Samples.rate() of each, one after the other": (lambda: [x.rate(name) for name in names], None),
        "numpy.diff of each, no reset, no rate": (lambda: [np.diff(x[name], axis=0) for name in names], None),
        "a loop in C that copies, into new memory": (lambda: copy_words(limit, values.reshape(-1)), None),
        "the same, into memory that is there": (lambda: copy_words(limit, values.reshape(-1), room.reshape(-1)), None),
        "memcpy into memory that is there": (lambda: np.copyto(room, values), None),
    }
    compare(benchmark, f"series of {about}", contenders)


@pytest.mark.benchmark(group="series")
def test_one_statistic(benchmark, limit, run):
    """The same of one, beside a loop that reads a word of each of its cache lines, and writes nothing."""
    x, about = run
    assert np.array_equal(divide_words(limit, x["exits"], x.time), x.rate("exits"))
    ffi, lib = limit
    one = x["exits"].reshape(-1)  # a view: rows of all files and sweeps, evenly apart
    assert np.shares_memory(one, x.groups[0].values)
    step = one.strides[0] // 8
    lines = max(step, 8)  # words from a line that is read to the next
    contenders = {
        "limit: a loop in C that sums": (
            lambda: lib.sum_words(pointer(ffi, one), one.size * step // lines, lines),
            None,
        ),
        "writing as many values into new memory": (lambda: np.full(one.size, 1, np.uint64), None),
        "a loop in C that copies, into new memory": (lambda: copy_words(limit, one), None),
        "a loop in C that takes rates, into new memory": (lambda: divide_words(limit, x["exits"], x.time), None),
        "Samples.rate()": (lambda: x.rate("exits"), ("at most", 1.3)),
        "Samples.delta()": (lambda: x.delta("exits"), ("at most", 1.3)),
        "Samples.resets()": (lambda: x.resets("exits"), ("at most", 1.3)),
        "Samples.total()": (lambda: x.total("exits"), ("at most", 1.3)),
        "by itself in a piece (gather)": (lambda: series.gather([x["exits"]]), ("at most", 1.3)),
        "numpy.diff(), no reset, no rate": (lambda: np.diff(x["exits"], axis=0), None),
    }
    compare(benchmark, f"one statistic of {about}", contenders, rounds=4 * ROUNDS)


@pytest.mark.benchmark(group="series")
def test_frames(benchmark, run):
    """Data frames and datasets, beside what pyarrow makes of the same values, and a copy."""
    x, about = run
    contenders = {
        "to_arrow().to_pandas(), a histogram in a column": (lambda: x.to_arrow().to_pandas(), None),
        "to_pandas(), a column for each bucket": (x.to_pandas, TWICE),
        'to_pandas(values="rate")': (lambda: x.to_pandas(values="rate"), TWICE),
        "to_xarray()": (x.to_xarray, TWICE),
        'to_xarray(values="rate")': (lambda: x.to_xarray(values="rate"), TWICE),
        "memcpy of the values into new memory": (x.groups[0].values.copy, None),
    }
    compare(benchmark, f"tables of {about}", contenders)
