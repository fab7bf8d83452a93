"""Fixtures, and the count of tests that ran against a real VM."""

import struct
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmstats_fast.testing import KvmUnavailableError, TinyGuest, exit_counter

DATA = Path(__file__).parent / "data"


def pytest_runtest_setup(item):
    """A test of a real VM skips, with the reason, where no VM can be made."""
    if item.get_closest_marker("real_vm"):
        try:
            exit_counter()
        except KvmUnavailableError as error:
            pytest.skip(f"no real VM: {error.strerror}")


def pytest_terminal_summary(terminalreporter):
    """Say how many tests of a real VM ran."""

    def count(*outcomes):
        return sum(
            "real_vm" in report.keywords
            for outcome in outcomes
            for report in terminalreporter.stats.get(outcome, ())
            if report.when == "call" or outcome == "skipped"
        )

    ran, skipped = count("passed", "failed"), count("skipped")
    terminalreporter.write_line(f"real-VM tests: {ran} ran, {skipped} skipped")


@pytest.fixture
def resources():
    """An ExitStack that is closed when the test is over."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def guest(resources):
    """A real VM with two vCPUs."""
    return resources.enter_context(TinyGuest(2))


@pytest.fixture
def stats(guest, resources):
    """Its stats files: VM, vCPU 0, vCPU 1."""
    return [resources.enter_context(file) for file in guest.open_stats()]


def independent_read(pread):
    """Read a merged stats file with struct alone: ({name: values}, [(name, offset)]), one pread per statistic.

    `pread(size, position)` gives the bytes.
    """
    flags, name_size, num_desc, _, desc_offset, data_offset = struct.unpack("=6I", pread(24, 0))
    assert flags == 0
    values, order = {}, []
    for i in range(num_desc):
        raw = pread(16 + name_size, desc_offset + i * (16 + name_size))
        _, _, size, offset, _ = struct.unpack_from("=IhHII", raw)
        name = raw[16:].split(b"\0")[0].decode()
        values[name] = struct.unpack(f"={size}Q", pread(8 * size, data_offset + offset))
        order.append((name, offset))
    return values, order


def as_tuples(snapshot):
    """A snapshot in the form of `independent_read`'s values."""
    return {name: tuple(value.tolist()) if hasattr(value, "tolist") else (value,) for name, value in snapshot.items()}
