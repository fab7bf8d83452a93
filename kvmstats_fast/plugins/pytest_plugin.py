"""pytest plugin: what KVM counted beside each test and benchmark, and budgets for it.

It is loaded by every run of pytest where this package is installed: what a test does not use is not imported.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from kvmstats_fast._text import describe_error
from kvmstats_fast.plugins.budget import Budget
from kvmstats_fast.plugins.target import SOCKET_VARIABLE, VM_VARIABLE, open_target

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from kvmstats_fast.plugins.counters import Counters
    from kvmstats_fast.plugins.rounds import RoundTimer
    from kvmstats_fast.sampling.plan import StatsFiles
    from kvmstats_fast.stats_file import StatsFile

#: The key of what is told of a test in ``user_properties``, which pytest-xdist carries to the process that prints.
PROPERTY = "kvmstats"
_MARKER = (
    "kvm_budget(statistic=limit, ..., per='test'): fail if KVM counts more than that in the test, or with "
    "pytest-benchmark per 'round' or 'iteration'"
)


class _Session:
    """What tests of one process share: counters are made once for the same files."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._counters: Counters | None = None
        self._timers: dict[Any, RoundTimer] = {}
        self.machine: dict[str, Any] = {}

    def setting(self, name: str, variable: str) -> str:
        """Return an option, else the ini file's, else the environment's."""
        given = self._config.getoption(f"kvmstats_{name}") or self._config.getini(f"kvmstats_{name}")
        return str(given or os.environ.get(variable, ""))

    @property
    def target(self) -> tuple[str, str]:
        """The VM and the socket that are named; one of them counts, an option before the ini file and that first."""
        vm, path = self._config.getoption("kvmstats_vm"), self._config.getoption("kvmstats_socket")
        if vm and path:
            raise pytest.UsageError("--kvmstats-vm and --kvmstats-socket both name a VM; give one of them")
        if vm or path:
            return vm or "", path or ""
        path = self.setting("socket", SOCKET_VARIABLE)
        return ("", path) if path else (self.setting("vm", VM_VARIABLE), "")

    def refuse(self, reason: str) -> NoReturn:
        """Skip the test, or fail it if it must run."""
        if self._config.getoption("kvmstats_required") or self._config.getini("kvmstats_required"):
            pytest.fail(f"no KVM statistics: {reason}", pytrace=False)
        pytest.skip(f"no KVM statistics: {reason}")

    def count(self, files: StatsFiles) -> Counters:
        """Return the counters of these files."""
        from kvmstats_fast.plugins.counters import Counters  # noqa: PLC0415 - reaches numpy

        if self._counters is None or self._counters.files is not files:
            self._counters = Counters(files)
            self.machine = self._counters.machine
        return self._counters

    def timer(self, clock: Any) -> RoundTimer:
        """Return a timer that counts, in place of a clock or of the one that pytest-benchmark would choose."""
        from kvmstats_fast.plugins.rounds import RoundTimer, load_clock  # noqa: PLC0415 - for benchmarks alone

        clock = clock or load_clock(self._config.getoption("benchmark_timer"))
        return self._timers.setdefault(clock, RoundTimer(clock))


_SESSION = pytest.StashKey[_Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and the same for ini files."""
    group = parser.getgroup("kvmstats", "KVM statistics beside tests and benchmarks")
    group.addoption("--kvmstats-vm", metavar="NAME|PID", help="the VM whose statistics are counted")
    group.addoption("--kvmstats-socket", metavar="PATH", help="the Unix socket that hands over its stats files")
    group.addoption(
        "--kvmstats-required", action="store_true", help="fail, instead of skip, tests whose VM cannot be read"
    )
    parser.addini("kvmstats_vm", f"as --kvmstats-vm; the environment has {VM_VARIABLE}", default="")
    parser.addini("kvmstats_socket", f"as --kvmstats-socket; the environment has {SOCKET_VARIABLE}", default="")
    parser.addini("kvmstats_required", "as --kvmstats-required", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker means."""
    config.addinivalue_line("markers", _MARKER)
    config.stash[_SESSION] = _Session(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the tests count that are to: those with a budget, and benchmarks if a VM is named."""
    session = config.stash[_SESSION]
    has_target = any(session.target)
    has_timer = config.pluginmanager.hasplugin("benchmark")
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        is_benchmark = has_timer and "benchmark" in names
        budgets = _budgets(item, is_benchmark=is_benchmark)
        if "kvmstats" not in names and (budgets or (has_target and is_benchmark)):
            names.append("kvmstats")
        if is_benchmark and "kvmstats" in names:
            mark = item.get_closest_marker("benchmark")
            given = dict(mark.kwargs) if mark else {}
            given["timer"] = session.timer(given.get("timer"))
            item.add_marker(pytest.mark.benchmark(**given), append=False)


def _budgets(item: pytest.Item, *, is_benchmark: bool) -> list[Budget]:
    marks = item.iter_markers("kvm_budget")
    return [Budget(item.nodeid, mark.args, mark.kwargs, is_benchmark=is_benchmark) for mark in marks]


@pytest.fixture(scope="session")
def kvmstats_files(pytestconfig: pytest.Config) -> Generator[Iterable[StatsFile], None, None]:
    """Give the stats files of the VM that is named. Override it to choose: files, or a VirtualMachine."""
    from kvmstats_fast.errors import KvmStatsError  # noqa: PLC0415 - reaches the compiled core

    session = pytestconfig.stash[_SESSION]
    vm, path = session.target
    if not (vm or path):
        session.refuse(f"no VM is named: give --kvmstats-vm NAME|PID, set {VM_VARIABLE}, or override kvmstats_files")
    target = open_target(vm, path)
    try:
        files = target.__enter__()
    except (KvmStatsError, OSError, ValueError) as error:
        session.refuse(describe_error(error))
    yield files
    target.__exit__(None, None, None)


@pytest.fixture
def kvmstats(pytestconfig: pytest.Config, kvmstats_files: StatsFiles) -> Counters:
    """Give the counters of a VM: ``with kvmstats.measure() as m`` in a test; the whole test is counted by itself."""
    return pytestconfig.stash[_SESSION].count(kvmstats_files)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Count what happens in a test, tell it, and hold it against the test's budgets."""
    arguments: dict[str, Any] = getattr(item, "funcargs", {})
    counters = arguments.get("kvmstats")
    if counters is None:
        return (yield)
    benchmark, mark = arguments.get("benchmark"), item.get_closest_marker("benchmark")
    timer = mark.kwargs.get("timer") if benchmark is not None and mark else None
    budgets = _budgets(item, is_benchmark=benchmark is not None)
    with counters.watch(benchmark, timer) as watched:
        result = yield
    over = [text for budget in budgets if (text := budget.check(watched))]
    told = watched.to_dict() | {"unchecked": [budget.per for budget in budgets if not watched.knows(budget.per)]}
    item.user_properties.append((PROPERTY, json.dumps(told)))
    if over:
        pytest.fail("\n\n".join(over), pytrace=False)
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add whose statistics they are: the host, its kernel, and what its files list."""
    if machine := config.stash[_SESSION].machine:
        machine_info["kvmstats"] = machine


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a table of what was counted."""
    told = []
    for outcome in ("passed", "failed", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, ()):
            found = dict(getattr(report, "user_properties", ())).get(PROPERTY)
            if found and report.when == "call":
                told.append((report.nodeid, json.loads(found)))
    if not told:
        return
    from kvmstats_fast.plugins.summary import format_summary  # noqa: PLC0415 - for this table alone

    terminalreporter.section("kvmstats", sep="-", yellow=True)
    terminalreporter.write_line(format_summary(told))
