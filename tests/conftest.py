"""Fixtures, and the count of tests that ran against a real VM."""

import signal
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from holder import Holder

from kvmstats_fast.testing import KvmUnavailableError, TinyGuest, exit_counter


def pytest_configure():
    """Handle SIGINT, which tests send to themselves, even where a shell has it ignored in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    """Skip a test of a real VM, with the reason, where no VM can be made."""
    if item.get_closest_marker("real_vm"):
        try:
            exit_counter()
        except KvmUnavailableError as error:
            pytest.skip(f"no real VM: {error.strerror}")


def pytest_terminal_summary(terminalreporter):
    """Print how many tests of a real VM ran."""

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
    """An ExitStack that is closed at the end of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def open_folder():
    """A folder that every user may enter, as pytest's own are not."""
    with TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def guest(resources):
    """A real VM with two vCPUs."""
    return resources.enter_context(TinyGuest(2))


@pytest.fixture
def stats(guest, resources):
    """Its stats files: VM, vCPU 0, vCPU 1."""
    return [resources.enter_context(file) for file in guest.open_stats()]


@pytest.fixture
def holder(resources):
    """A VMM with two vCPUs, in another process, that holds all its stats files."""
    return resources.enter_context(Holder())
