"""The pytest plugin: counters beside tests and benchmarks, exactly those of the measured rounds, and budgets."""

import gc
import json
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from holder import WITH_GUESTS

from kvmstats_fast.plugins.rounds import RoundTimer
from kvmstats_fast.testing import exit_counter

pytest_plugins = ["pytester"]

#: What pytest-benchmark finds out of the machine and of git takes longer than these tests.
LITTLE = """
def pytest_benchmark_generate_machine_info(config):
    return {}
def pytest_benchmark_generate_commit_info(config):
    return {}
"""

CONFTEST = """
import pytest
from kvmstats_fast.testing import SyntheticStats, TinyGuest

@pytest.fixture(scope="session")
def made():
    with SyntheticStats("x86", "vcpu") as made:
        yield made

@pytest.fixture(scope="session")
def kvmstats_files(made):
    with made.open() as file:
        yield [file]
"""

REAL = """
import pytest
from kvmstats_fast.testing import TinyGuest

@pytest.fixture(scope="session")
def guest():
    with TinyGuest() as guest:
        yield guest

@pytest.fixture(scope="session")
def kvmstats_files(guest):
    files = guest.open_stats()
    yield files
    for file in files:
        file.close()
"""

QUIET = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
QUICK = (*QUIET, "--benchmark-max-time=0.01", "--benchmark-min-rounds=3")


@pytest.fixture
def run(pytester, monkeypatch):
    """A function that runs tests with the plugin, and returns the result and the benchmarks' JSON."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # there pytest-benchmark disables all benchmarks
    pytester.makeconftest(LITTLE + CONFTEST)

    def run(code, *options):
        pytester.makepyfile(code)
        path = pytester.path / "out.json"
        if "(benchmark" in code:
            options = (f"--benchmark-json={path}", *options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pytest-benchmark warns of a file without benchmarks
            result = pytester.runpytest_inprocess(*QUICK, *options)
            gc.collect()  # and may leave that file open
        text = path.read_text() if path.exists() else ""
        return result, json.loads(text) if text else None

    return run


def exact():
    """The counter of this host's KVM that is exact."""
    return "io_exits" if exit_counter() == "io_exits" else "fpu_reload"


def counted(out, name):
    """What the JSON says of a benchmark."""
    (found,) = [one for one in out["benchmarks"] if one["name"] == name]
    return found["extra_info"]["kvmstats"]


# ---- benchmarks


ROUNDS = """
def test_plain(benchmark, kvmstats, made):
    benchmark(made.add, "exits", 10)

def test_warm(benchmark, kvmstats, made):
    benchmark.pedantic(made.add, ("exits", 10), rounds=3, warmup_rounds=5)

def test_iterations(benchmark, kvmstats, made):
    benchmark.pedantic(made.add, ("exits", 10), rounds=4, iterations=7, warmup_rounds=2)

def test_setup(benchmark, kvmstats, made):
    def setup():
        made.add("exits", 1000)
    def teardown():
        made.add("exits", 300)
    benchmark.pedantic(lambda: made.add("exits", 10), setup=setup, teardown=teardown, rounds=5)

def test_differs(benchmark, kvmstats, made):
    counts = iter([1, 2, 6])
    benchmark.pedantic(lambda: made.add("exits", next(counts)), rounds=3)
"""


def test_counters_are_of_the_measured_rounds_only(run):
    """Not of calibration, warm-up, setup, teardown and the extra call: totals, per iteration, and the spread."""
    result, out = run(ROUNDS, "--benchmark-warmup=on", "--benchmark-warmup-iterations=50")
    result.assert_outcomes(passed=5)
    for name, rounds, iterations in (("test_warm", 3, 1), ("test_iterations", 4, 7), ("test_setup", 5, 1)):
        one = counted(out, name)
        assert (one["rounds"], one["iterations"]) == (rounds, iterations)
        assert one["counts"]["exits"] == 10 * rounds * iterations
        assert (one["per_iteration"]["exits"], one["stddev"]["exits"]) == (10.0, 0.0)
    plain = counted(out, "test_plain")
    (stats,) = [one["stats"] for one in out["benchmarks"] if one["name"] == "test_plain"]
    assert (plain["rounds"], plain["iterations"]) == (stats["rounds"], stats["iterations"])
    assert plain["counts"]["exits"] == 10 * stats["rounds"] * stats["iterations"]
    differs = counted(out, "test_differs")
    assert (differs["counts"]["exits"], differs["per_iteration"]["exits"]) == (9, 3.0)
    assert differs["stddev"]["exits"] == pytest.approx(7**0.5)


def test_the_numbers_are_plain(run):
    """Ints and floats that JSON has, and the machine that they are from."""
    _, out = run(ROUNDS)
    one = counted(out, "test_warm")
    assert {type(count) for count in one["counts"].values()} == {int}
    assert {type(count) for count in one["per_iteration"].values()} == {float}
    assert "UNSERIALIZABLE" not in json.dumps(out)
    machine = out["machine_info"]["kvmstats"]
    assert machine["host"] == os.uname().nodename
    assert machine["kernel"].startswith(os.uname().release)
    assert len(machine["schemas"]) == 1


def test_the_timer_that_was_chosen_is_the_clock(run):
    """By the marker or by the option; its name stays, and other options of the marker do."""
    code = """
import pytest, time
@pytest.mark.benchmark(timer=time.process_time, group="mine")
def test_marked(benchmark, kvmstats):
    benchmark.pedantic(lambda: None, rounds=2)
def test_option(benchmark, kvmstats):
    benchmark.pedantic(lambda: None, rounds=2)
"""
    _, out = run(code, "--benchmark-timer=time.thread_time")
    found = {one["name"]: one for one in out["benchmarks"]}
    assert found["test_marked"]["options"]["timer"] == "process_time"
    assert found["test_marked"]["group"] == "mine"
    assert found["test_option"]["options"]["timer"] == "thread_time"
    assert found["test_option"]["extra_info"]["kvmstats"]["rounds"] == 2


def test_readings_are_in_no_duration():
    """They come before the first look at the clock and after the second; calibration takes none."""
    looks = []

    class Recorder:
        def read(self):
            looks.append("read")
            return "reading"

        def add(self, *_):
            looks.append("add")

    benchmark = SimpleNamespace(stats=None)
    timer = RoundTimer(lambda: looks.append("look"))
    timer.follow(benchmark, Recorder(), Recorder())
    timer(), timer()
    assert looks == ["look", "look"]
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
    looks.clear()
    for measured in (False, True):  # a warm-up, and a round
        timer(), looks.append("work"), timer()
        benchmark.stats.stats.data += [0.0] * measured
    one = ["look", "read", "look", "work", "look", "read"]
    assert looks == one * 2
    assert timer.finish() == 1
    assert looks == [*one * 2, "add"]


def test_a_benchmark_that_does_not_ask_is_left_alone(run):
    """Without the fixture and without a VM that is named, nothing is counted."""
    result, out = run("def test_it(benchmark):\n    benchmark.pedantic(lambda: None)")
    assert out["benchmarks"][0]["extra_info"] == {}
    assert "kvmstats" not in out["machine_info"]
    assert "kvmstats --" not in result.stdout.str()


def test_a_round_that_raises_is_the_error(run):
    """And the next benchmark counts as if nothing had been."""
    code = """
def test_bad(benchmark, kvmstats):
    benchmark.pedantic(lambda: 1 / 0, rounds=2)
def test_good(benchmark, kvmstats, made):
    benchmark.pedantic(made.add, ("exits", 3), rounds=2)
"""
    result, out = run(code)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*ZeroDivisionError*"])
    assert counted(out, "test_good")["counts"]["exits"] == 6


def test_many_rounds_take_little_memory(run):
    """More than are added up at once."""
    code = """
def test_many(benchmark, kvmstats, made):
    benchmark.pedantic(made.add, ("exits", 2), rounds=1000)
"""
    _, out = run(code)
    assert counted(out, "test_many")["counts"]["exits"] == 2000


# ---- budgets


BUDGETS = """
import pytest

@pytest.mark.kvm_budget(exits=100)
def test_kept(made):
    made.add("exits", 100)

@pytest.mark.kvm_budget(exits=99, halt_exits=5, io_exits=0)
@pytest.mark.kvm_budget(mmio_exits=0)
def test_exceeded(made):
    made.add("exits", 100)
    made.add("halt_exits", 5)
    made.add("io_exits", 3)
    made.add("mmio_exits", 1)

@pytest.mark.kvm_budget(exits=70, per="round")
@pytest.mark.kvm_budget(exits=10, per="iteration")
def test_rounds_kept(benchmark, made):
    benchmark.pedantic(made.add, ("exits", 10), rounds=4, iterations=7, warmup_rounds=2)

@pytest.mark.kvm_budget(exits=69, per="round")
@pytest.mark.kvm_budget(exits=9.5, per="iteration")
def test_rounds_exceeded(benchmark, made):
    benchmark.pedantic(made.add, ("exits", 10), rounds=4, iterations=7, warmup_rounds=2)

@pytest.mark.kvm_budget(exits=0)
def test_other_failure():
    assert False, "this is the news"
"""

MESSAGE = """\
KVM budget exceeded, per test:
statistic   counted  budget  over by
mmio_exits        1       0        1

KVM budget exceeded, per test:
statistic  counted  budget  over by
exits          100      99        1  +1.0%
io_exits         3       0        3
"""

ROUNDS_MESSAGE = """\
KVM budget exceeded, per iteration, the mean of 4 rounds of 7 iterations:
statistic  counted  budget  over by
exits           10     9.5      0.5  +5.3%

KVM budget exceeded, per round, the mean of 4 rounds of 7 iterations:
statistic  counted  budget  over by
exits           70      69        1  +1.4%
"""


def test_a_budget_passes_at_n_and_fails_below(run):
    """With a table of what was exceeded, and by how much; what a test itself raises comes out instead."""
    result, _ = run(BUDGETS)
    result.assert_outcomes(passed=2, failed=3)
    text = result.stdout.str()
    assert MESSAGE in text
    assert ROUNDS_MESSAGE in text
    result.stdout.fnmatch_lines(["*this is the news*"])


def test_a_budget_of_a_statistic_that_is_not_there_is_one_line(run):
    """It says which there are, and shows no source of the plugin."""
    result, _ = run("import pytest\n@pytest.mark.kvm_budget(exit=1)\ndef test_it(made):\n    pass")
    result.assert_outcomes(failed=1)
    title = next(number for number, line in enumerate(result.outlines) if " test_it " in line)
    message = "kvm_budget: no statistic 'exit' in what these files count; did you mean exits"
    assert result.outlines[title + 1].startswith(message)
    assert result.outlines[title + 2].startswith(("---", "==="))  # the next section


def test_a_table_ends_the_run(run):
    """A line for each test, per iteration of a benchmark; what counted in most of them comes first."""
    result, _ = run(BUDGETS)
    result.stdout.fnmatch_lines(
        [
            "*- kvmstats -*",
            "test*  per * exits *",
            "*::test_kept * test * 100 *",
            "*::test_rounds_kept * iteration * 10 *",
            "*::test_exceeded * test * 100 *",
        ]
    )


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("1000", "it takes limits by name of a statistic, such as exits=1000"),
        ("per='test'", "it takes limits by name of a statistic"),
        ("exits=1, per='loop'", "per is 'loop'; it must be one of 'test', 'round', 'iteration'"),
        ("exits=-1", "exits is -1; a limit must be a number, 0 or more"),
        ("exits='many'", "exits is 'many'; a limit must be a number"),
        ("exits=1, per='round'", "per='round' is for tests with the benchmark fixture of pytest-benchmark"),
    ],
)
def test_a_budget_that_does_not_fit_is_named_before_any_test_runs(run, marker, text):
    """The test, and what the marker must be."""
    result, _ = run(f"import pytest\n@pytest.mark.kvm_budget({marker})\ndef test_it(made):\n    pass")
    result.stderr.fnmatch_lines([f"ERROR: kvm_budget of *::test_it: {text.replace('[', '[[]')}*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_a_budget_of_files_that_cannot_be_read_is_not_kept(run):
    """Part of them failed: what they counted is not known."""
    code = """
import os, pytest
from kvmstats_fast.testing import SyntheticStats

@pytest.fixture
def kvmstats_files(made):
    with SyntheticStats("x86", "vcpu", vcpu_id=1) as other, made.open() as one, other.open() as two:
        yield [one, two]

@pytest.mark.kvm_budget(exits=100)
def test_it(kvmstats_files):
    kvmstats_files[1].close()
"""
    result, _ = run(code)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["KVM budget not kept: not all files could be read", "kvm-*/vcpu-1: *closed*"])


# ---- the fixture


def test_blocks_are_measured(run):
    """As kvmstats_fast.measure does; made once for the same statistics, and once for all tests."""
    code = """
seen = []
def test_block(kvmstats, made):
    with kvmstats.measure("exits") as m:
        made.add("exits", 4)
    assert m.counts == {"exits": 4}
    assert kvmstats.measure("exits") is kvmstats.measure("exits")
    assert len(kvmstats.measure(["exits", "halt_*"]).__enter__().counts) > 5
    seen.append(kvmstats)
def test_again(kvmstats):
    assert kvmstats is seen[0]
"""
    result, _ = run(code)
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("how", ["--kvmstats-vm=no-such-guest", "--kvmstats-socket=nowhere", "ini", "environment", ""])
def test_without_a_vm_tests_skip_or_fail(run, pytester, monkeypatch, how):
    """With the reason, however it was named."""
    pytester.makeconftest(LITTLE)
    options = [how] if how.startswith("--") else []
    if how == "ini":
        pytester.makeini("[pytest]\nkvmstats_vm = no-such-guest")
    if how == "environment":
        monkeypatch.setenv("KVMSTATS_VM", "no-such-guest")
    code = """
import pytest
def test_fixture(kvmstats):
    pass
@pytest.mark.kvm_budget(exits=1)
def test_budget():
    pass
def test_benchmark(benchmark):
    benchmark.pedantic(lambda: None)
def test_plain():
    pass
"""
    result, _ = run(code, "-rs", *options)
    reason = {"--kvmstats-socket=nowhere": "nowhere*", "": "no VM is named: give --kvmstats-vm*"}
    expected = reason.get(how, "*no-such-guest*")
    # A benchmark counts if a VM is named.
    result.assert_outcomes(passed=1 + (not how), skipped=2 + bool(how))
    result.stdout.fnmatch_lines([f"*no KVM statistics: *{expected}"])
    if how in ("ini", ""):
        result, _ = run(code, "--kvmstats-required", *options)
        result.assert_outcomes(passed=1 + (not how), errors=2 + bool(how))
        result.stdout.fnmatch_lines([f"*no KVM statistics: *{expected}"])


def test_two_names_are_one_too_many(run):
    """Of the same rank."""
    result, _ = run("def test_it(): pass", "--kvmstats-vm=1", "--kvmstats-socket=x")
    result.stderr.fnmatch_lines(["ERROR: --kvmstats-vm and --kvmstats-socket both name a VM*"])


def test_a_vm_that_is_named_is_counted(run, pytester, holder):
    """By its pid, for benchmarks that do not ask for the fixture."""
    pytester.makeconftest(LITTLE)
    code = "def test_it(benchmark):\n    benchmark.pedantic(lambda: None, rounds=2)"
    result, out = run(code, f"--kvmstats-vm={holder.pid}")
    result.assert_outcomes(passed=1)
    assert "exits" in counted(out, "test_it")["counts"]


# ---- beside other plugins


def test_an_unrelated_run_imports_neither_numpy_nor_the_core(pytester):
    """Although the plugin is loaded."""
    pytester.makepyfile("""
import sys
def test_it(request):
    assert request.config.pluginmanager.hasplugin("kvmstats")
    assert "numpy" not in sys.modules
    assert "kvmstats_fast._kvmstats" not in sys.modules
""")
    result = pytester.runpytest_subprocess(*QUIET)
    result.assert_outcomes(passed=1)


def test_it_works_without_pytest_benchmark(pytester):
    """Budgets of tests, and no rounds."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("""
import pytest
@pytest.mark.kvm_budget(exits=9)
def test_it(made):
    made.add("exits", 10)
""")
    result = pytester.runpytest_inprocess(*QUIET, "-p", "no:benchmark")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["exits           10       9        1  +11.1%"])


def test_a_benchmark_that_is_disabled_says_so_of_its_budget(run):
    """As all are under pytest-xdist; it runs once, and what it counted in all is still held against its budget."""
    code = """
import pytest
@pytest.mark.kvm_budget(exits=1, per="round")
@pytest.mark.kvm_budget(exits=10)
def test_it(benchmark, made):
    benchmark(made.add, "exits", 10)
"""
    result, _ = run(code, "--benchmark-disable")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*::test_it: no budget per round: benchmarks are disabled"])


def test_each_worker_of_xdist_counts_for_itself(run):
    """The table has the tests of all."""
    pytest.importorskip("xdist")
    code = """
import pytest
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.kvm_budget(exits=3)
def test_it(made, count):
    made.add("exits", count)
"""
    result, _ = run(code, "-n1")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines([f"*::test_it[[]{count}[]] * test *{count}" for count in (1,)])
    assert sum("::test_it[" in line and " test " in line for line in result.outlines) == 4


# ---- a real guest


@pytest.mark.real_vm
def test_the_vmm_that_the_guide_starts_ends_with_the_suite(run, pytester, tmp_path):
    """docs/suites.md's fixture starts one for all tests, counts it, and leaves no process behind."""
    guide = (Path(__file__).parents[1] / "docs" / "suites.md").read_text()
    fixture = re.search(r"^@pytest.fixture.*\ndef kvmstats_files(?s:.*?)(?=^```)", guide, re.MULTILINE)[0]
    program = tmp_path / "vmm.py"
    program.write_text(f"{WITH_GUESTS}\nguest = TinyGuest()\nimport time\ntime.sleep(60)")
    fixture = fixture.replace('"qemu-system-x86_64", ...', f"{sys.executable!r}, {str(program)!r}")
    assert str(program) in fixture
    pytester.makeconftest(f"{LITTLE}import pytest\nimport kvmstats_fast as kf\n{fixture}")
    code = """
import pathlib
def test_it(kvmstats, kvmstats_files):
    assert kvmstats_files.alive
    pathlib.Path("pid").write_text(str(kvmstats_files.pid))
"""
    result, _ = run(code)
    result.assert_outcomes(passed=1)
    assert not Path("/proc", (pytester.path / "pid").read_text()).exists()


@pytest.mark.real_vm
def test_the_rounds_of_a_real_guest_are_exact(run, pytester):
    """A guest of 20 exits per iteration: the JSON has just these, and a budget of one less is exceeded."""
    pytester.makeconftest(LITTLE + REAL)
    code = f"""
import pytest
@pytest.mark.kvm_budget({exact()}=20, per="iteration")
def test_plain(benchmark, guest):
    benchmark(guest.run, 20)
@pytest.mark.kvm_budget({exact()}=19, per="iteration")
def test_over(benchmark, guest):
    benchmark(guest.run, 20)
def test_pedantic(benchmark, guest, kvmstats):
    benchmark.pedantic(guest.run, (20,), rounds=6, iterations=3, warmup_rounds=2)
"""
    result, out = run(code)
    result.assert_outcomes(passed=2, failed=1)
    for name in ("test_plain", "test_over", "test_pedantic"):
        one = counted(out, name)
        assert one["counts"][exact()] == 20 * one["rounds"] * one["iterations"]
        assert one["per_iteration"][exact()] == 20.0
    assert counted(out, "test_pedantic")["rounds"] == 6
