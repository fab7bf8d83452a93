"""Fixtures, and the count of tests that ran against a real VM."""

import gc
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from holder import Holder
from large import is_here, why_missing

from kvmstats_fast.testing import KvmUnavailableError, TinyGuest, exit_counter

#: The files that take longest come first, so that none ends alone: by turns one that waits, and one that computes.
LONGEST = (
    *("top_screen", "c_core", "export_serve", "hold", "libvirt", "leaks", "sampler", "twin", "export_prometheus"),
    *("recordings", "wall_clock", "cli_terminal", "watch", "inject", "cli_record", "foreign", "attach", "recording"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: two more than there are processors, for at any time some tests wait for a VM, a tick or a terminal."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_collection_modifyitems(items):
    """Put the longest files first."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_configure(config):
    """Handle SIGINT, which tests send to themselves, even where a shell has it ignored in the background.

    And forget how wide the terminal is, of which pytest-xdist tells its processes: what tests read goes to none. And
    let the hundreds of interpreters that are started keep what the first one has compiled. And have pytest-xdist hand
    out files in their order, not by how many tests they have.
    """
    for name in ("COLUMNS", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.option.loadscopereorder = False


def pytest_collection_finish():
    """Keep what was imported from the collector: a test that asks for it waits for its own garbage only."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Skip a test, with the reason, where a library is not installed, or no VM can be made for a test of a real one."""
    for mark in item.iter_markers("needs"):
        if not is_here(mark.args[0]):
            pytest.skip(why_missing(mark.args[0]))
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


@pytest.fixture(scope="session", autouse=True)
def _hang_ups():
    """Let programs end of SIGHUP, also where nohup has it ignored: what is handled here, they do not inherit."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


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


@pytest.fixture(
    params=[
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
    ],
    ids=lambda library: library[0],
)
def under_green_threads(request):
    """A function: the lines that a program prints in which a library has replaced Python's threads and polls."""
    library, patch = request.param
    if find_spec(library) is None:  # not imported here: eventlet warns of every later fork
        pytest.skip(f"there is no {library}")

    def run(code, *arguments):
        code = f"import warnings; warnings.simplefilter('ignore')\n{patch}\n{code}"
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


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
