"""Reading the data of one open stats file, again and again."""

import os

import numpy as np
import pytest
from rivals import PythonStatsFile
from table import compare

import kvmstats_fast as kf


@pytest.fixture
def file(stats_fd):
    return kf.StatsFile(stats_fd, closefd=False)


@pytest.mark.benchmark(group="read")
def test_read_into_against_preadv(benchmark, file):
    """read_into is to be 1.25x faster than preadv into the same array."""
    fd, position = file.fileno(), file.header.data_offset
    out = np.empty(file.schema.num_values, np.uint64)
    size = out.nbytes
    buffers = [out]
    read_into, preadv, pread, frombuffer = file.read_into, os.preadv, os.pread, np.frombuffer
    compare(
        benchmark,
        f"{size} bytes of values into numpy",
        {
            "StatsFile.read_into(out)": (lambda: read_into(out), None),
            "os.preadv(fd, [out], position)": (lambda: preadv(fd, [out], position), ("at least", 1.25)),
            "os.preadv, its list made once": (lambda: preadv(fd, buffers, position), None),
            "np.frombuffer(os.pread())": (lambda: frombuffer(pread(fd, size, position), np.uint64), None),
            "StatsFile.read(), a fresh array": (file.read, None),
            "StatsFile.snapshot(), a dict": (file.snapshot, None),
        },
    )


@pytest.mark.benchmark(group="read")
def test_read_into_against_one_pread_per_stat(benchmark, file, vcpu_fd):
    """The way of the kernel's selftest: one pread per statistic."""
    out = np.empty(file.schema.num_values, np.uint64)
    rival = PythonStatsFile(vcpu_fd)
    compare(
        benchmark,
        f"all {len(file.schema)} statistics of a vCPU",
        {
            "StatsFile.read_into(out)": (lambda: file.read_into(out), None),
            "Python, struct, one pread per statistic": (rival.one_pread_per_stat, None),
        },
        loops=500,
    )
    rival.close()
