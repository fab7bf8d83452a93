"""What `measure` adds to a block, beside an empty context manager, two sweeps, and a measure made for each block."""

import contextlib

import pytest
from table import compare

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, TinyGuest


@pytest.fixture
def files():
    """The files of a VM with two vCPUs."""
    with contextlib.ExitStack() as stack:
        try:
            guest = stack.enter_context(TinyGuest(2))
        except KvmUnavailableError as error:
            pytest.skip(f"no real VM: {error.strerror}")
        yield [stack.enter_context(file) for file in guest.open_stats()]


@pytest.mark.benchmark(group="measure")
def test_an_empty_block(benchmark, files):
    """A VM and two vCPUs, all statistics. Two sweeps are what cannot be saved."""
    measure, empty, sampler = kf.measure(files), contextlib.nullcontext(), kf.Sampler(files)

    def block():
        with measure:
            pass

    def without():
        with empty:
            pass

    def two_sweeps():
        sampler.sweep()
        sampler.sweep()

    def made_for_it():
        with kf.measure(files):
            pass

    with measure as measured:
        pass
    contenders = {
        "two sweeps": (two_sweeps, None),
        "with nullcontext()": (without, None),
        "with measure, made before": (block, ("at most", 5.0)),
        "m.counts afterwards": (lambda: measured.counts, None),
        "with kf.measure(files), made for it": (made_for_it, None),
    }
    compare(benchmark, "An empty block, VM and two vCPUs", contenders, loops=100)
