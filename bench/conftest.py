"""A real vCPU to measure on."""

import pytest
import table
from limit import compile_limit

from kvmstats_fast.testing import KvmUnavailableError, SyntheticStats, TinyGuest


@pytest.fixture(scope="session")
def vcpu_fd():
    """The fd of a real vCPU; skips where there is no KVM."""
    try:
        with TinyGuest() as guest:
            guest.run(100)
            yield guest.vcpu_fds[0]
    except KvmUnavailableError as error:
        pytest.skip(f"no real VM: {error.strerror}")


@pytest.fixture(scope="session")
def stats_fd():
    """A vCPU's stats file: a real one, or made up where there is no KVM."""
    try:
        with TinyGuest() as guest:
            guest.run(100)
            files = guest.open_stats()
            yield files[1].fileno()
            for file in files:
                file.close()
    except KvmUnavailableError:
        with SyntheticStats() as made:
            yield made.fileno()


@pytest.fixture(scope="session")
def limit():
    """(ffi, lib) of what is measured against."""
    return compile_limit()


def pytest_addoption(parser):
    """--json FILE writes the table for programs."""
    parser.addoption("--json", metavar="FILE", help="write the benchmark table to FILE")


def pytest_terminal_summary(terminalreporter, config):
    """Print the table."""
    if not table.ROWS:
        return
    terminalreporter.write_line("")
    for line in table.lines():
        terminalreporter.write_line(line)
    if config.getoption("--json"):
        table.write_json(config.getoption("--json"))
