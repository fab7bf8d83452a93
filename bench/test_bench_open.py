"""Opening a stats file: the first of its kind (cold), and every further one (warm)."""

import contextlib
import fcntl
import os
from operator import methodcaller

import pytest
from rivals import KVM_GET_STATS_FD, PythonStatsFile
from table import add, compare, per_call

import kvmstats_fast as kf
from kvmstats_fast import schema as schema_module
from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.testing import KvmUnavailableError, TinyGuest


def warm(vcpu_fd):
    kf.StatsFile.open(vcpu_fd).close()


def nothing(_):
    """Only open the file, and close it."""


def cold(vcpu_fd, use=nothing):
    schema_module.CACHE.clear()
    with kf.StatsFile.open(vcpu_fd) as file:
        use(file)


def python(vcpu_fd, use=nothing):
    with contextlib.closing(PythonStatsFile(vcpu_fd)) as file:
        use(file)


snapshot = methodcaller("snapshot")


def system_calls(vcpu_fd):
    fd = fcntl.ioctl(vcpu_fd, KVM_GET_STATS_FD)
    os.pread(fd, 8192, 0)
    os.close(fd)


@pytest.mark.benchmark(group="open")
def test_next_open_against_python(benchmark, vcpu_fd):
    """A warm open is to be 5x faster than parsing in Python."""
    compare(
        benchmark,
        "next open of a vCPU's stats file, and close",
        {
            "StatsFile.open (schema cached)": (lambda: warm(vcpu_fd), None),
            "pure Python, struct": (lambda: python(vcpu_fd), ("at least", 5)),
            "its system calls alone (ioctl, pread, close)": (lambda: system_calls(vcpu_fd), None),
        },
        loops=300,
    )


@pytest.mark.benchmark(group="open")
def test_first_open_against_python(benchmark, vcpu_fd):
    """The first open of a kind pays for the Schema object."""
    compare(
        benchmark,
        "first open of a kind (the cache emptied each time), and close",
        {
            "StatsFile.open (cold)": (lambda: cold(vcpu_fd), None),
            "pure Python, struct": (lambda: python(vcpu_fd), ("at least", 1)),
            "StatsFile.open (cold) and snapshot()": (lambda: cold(vcpu_fd, snapshot), None),
            "pure Python, and a dict of values, one pread": (lambda: python(vcpu_fd, snapshot), None),
            "StatsFile.open (cold) and its Stats": (lambda: cold(vcpu_fd, lambda file: file.schema.stats), None),
        },
        loops=300,
    )


@pytest.mark.benchmark(group="open")
@pytest.mark.parametrize("count", [1, 8, 64])
def test_making_a_sampler(benchmark, count):
    """What a Sampler costs before its first sweep, beside the opening of one file."""
    try:
        guest = TinyGuest(count)
    except KvmUnavailableError as error:
        pytest.skip(f"no real VM: {error.strerror}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(guest)
        files = [stack.enter_context(kf.StatsFile.open(fd)) for fd in guest.vcpu_fds]
        few = ["exits", "halt_exits", "fpu_reload"]
        compare(
            benchmark,
            f"a Sampler of {count} vCPU files",
            {
                "Sampler(files)": (lambda: kf.Sampler(files), None),
                "Sampler(files, three names)": (lambda: kf.Sampler(files, few), None),
                'Sampler(files, "halt_*")': (lambda: kf.Sampler(files, "halt_*"), None),
                "Sampler(files), and its .files": (lambda: kf.Sampler(files).files, None),
                "StatsFile.open of one of them, and close": (lambda: warm(guest.vcpu_fds[0]), None),
            },
            loops=max(10, 300 // count),
        )


@pytest.mark.benchmark(group="parse")
def test_cold_parse_in_c(benchmark, stats_fd):
    """The C walk over header and descriptors, without system calls, against the same walk in Python."""
    blob = os.pread(stats_fd, 8192, 0)
    data = ffi.from_buffer("char[]", blob)
    header, fault = ffi.new("struct kvmstats_header *"), ffi.new("struct kvmstats_fault *")
    lib.kvmstats_read_header(data, len(blob), 0, header, fault)
    descs = ffi.new("struct kvmstats_desc[]", header.num_desc)
    size = len(blob)

    def walk():
        lib.kvmstats_read_header(data, size, 0, header, fault)
        lib.kvmstats_read_descriptors(data, size, header, descs, fault)

    def schema():
        schema_module.CACHE.clear()
        return schema_module.schema_of(blob, "")

    title = f"parse of header and {header.num_desc} descriptors, no system call"
    compare(
        benchmark,
        title,
        {
            "C walk, two calls through cffi": (walk, None),
            "with names and a Schema": (schema, None),
            "with Stats, too": (lambda: schema().stats, None),
        },
    )
    best = min(per_call(walk, 500) for _ in range(50))
    add(title, "C walk, best of 50 loops", best, verdict=f"under 5000 ns: {'reached' if best < 5000 else 'MISSED'}")
