"""Results of pytest-benchmark and pyperf against each other: rounds, runs or files are the units, and limits hold."""

import json
import math

import numpy as np
import pytest

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.analysis.suites import compare_suites, is_suite, read_suite
from kvmstats_fast.analysis.welch import Spread, Welch


def benchmark(name, rounds, **counts):
    """A benchmark of pytest-benchmark; counts are (mean, standard deviation)."""
    extra = {
        "rounds": rounds,
        "iterations": 4,
        "counts": {stat: round(mean * rounds * 4) for stat, (mean, _) in counts.items()},
        "per_iteration": {stat: mean for stat, (mean, _) in counts.items()},
        "stddev": {stat: deviation for stat, (_, deviation) in counts.items()},
    }
    return {"name": name, "fullname": f"test_it.py::{name}", "extra_info": {"kvmstats": extra}}


def pyperf(name, *runs):
    """A benchmark of pyperf; of each run what it counted. What all have in common stands once, as pyperf has it."""
    metadata = [{f"kvmstats_{stat}": count for stat, count in run.items()} for run in runs]
    common = {key: value for key, value in metadata[0].items() if all(one.get(key) == value for one in metadata)}
    own = [{key: value for key, value in one.items() if key not in common} for one in metadata]
    calibration = {"metadata": {"calibrate_loops": 8}, "warmups": [[1, 0.1]]}
    return {
        "metadata": common | {"name": name, "kvmstats_values": 3},
        "runs": [calibration, *({"metadata": one, "values": [0.1, 0.2]} for one in own)],
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes results, and returns the path."""
    paths = []

    def write(*benchmarks, **more):
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps({"benchmarks": benchmarks, **more}))
        return str(paths[-1])

    return write


def compare(a, b):
    """Comparisons of the files of two sides."""
    return compare_suites([read_suite(path) for path in a], [read_suite(path) for path in b])[0]


def test_rounds_are_the_units_of_one_file(write):
    """The interval is that of Welch's test of the rounds' own values, which the file has no more."""
    generator = np.random.default_rng(1)
    rounds = [generator.normal(100, 10, 30), generator.normal(120, 20, 12)]
    sides = [[write(benchmark("test_a", len(x), exits=(x.mean(), x.std(ddof=1))))] for x in rounds]
    change = compare(*sides)["test_it.py::test_a"]["exits"]
    assert (change.a, change.b) == (pytest.approx(rounds[0].mean()), pytest.approx(rounds[1].mean()))
    expected = Welch(0.95).between(*(Spread.of(x) for x in rounds), math.log(change.ratio))
    assert (change.low, change.high) == pytest.approx(expected)
    assert change.low < change.ratio < change.high
    assert change.units == "1/iteration"


def test_runs_are_the_units_of_pyperf(write):
    """A run that has no value of a statistic counted none; calibration is no run."""
    a = write(pyperf("boot", {"exits": 10.0, "io_exits": 4.0}, {"exits": 11.0}, {"exits": 12.0}))
    b = write(pyperf("boot", {"exits": 20.0, "halt_exits": 1.0}, {"exits": 22.0}, {"exits": 24.0}))
    compared = compare([a], [b])["boot"]
    assert (compared.runs, compared.method) == ((3, 3), "spread of runs")
    change = compared["exits"]
    assert (change.a, change.b, change.units) == (11, 22, "1/loop")
    expected = Welch(0.95).between(Spread.of([10, 11, 12]), Spread.of([20, 22, 24]), math.log(2))
    assert (change.low, change.high) == pytest.approx(expected)
    assert compared["io_exits"].a == pytest.approx(4 / 3)
    assert (compared["io_exits"].b, compared["io_exits"].ratio) == (0, 0)
    assert compared.exceeds("halt_exits", 5.0)


def test_a_limit_holds_for_benchmarks_that_counted_nothing(write, capsys):
    """Of a statistic that others count; one that none counts is no name."""
    path = write(pyperf("boot", {"exits": 10.0}, {"exits": 11.0}), pyperf("idle", {"halt_exits": 1.0}))
    assert cli.main(["compare", path, path, "--fail-if", "exits>5%"]) == 0
    assert cli.main(["compare", path, path, "--fail-if", "io_exits>5%"]) == 2
    assert "'io_exits' is not on both sides" in capsys.readouterr().err


def test_what_is_equal_in_all_runs_is_found(write):
    """Pyperf writes it once for the benchmark, or for the file if there is one benchmark."""
    a = pyperf("boot", {"exits": 10.0}, {"exits": 10.0})
    metadata = a.pop("metadata")
    found = read_suite(write(a, metadata=metadata))
    assert found["boot"].counts["exits"].mean == 10
    assert found["boot"].number == 2


def test_files_are_the_units_if_a_side_has_several(write):
    """Runs of a suite differ by more than their rounds do."""
    a = [write(benchmark("test_a", 1000, exits=(mean, 0.1))) for mean in (100, 104, 102)]
    b = [write(benchmark("test_a", 1000, exits=(mean, 0.1))) for mean in (103, 105, 110)]
    compared = compare(a, b)["test_it.py::test_a"]
    assert (compared.runs, compared.method) == ((3, 3), "spread of files")
    assert compared["exits"].low < 1 < compared["exits"].high
    assert compare(a[:1], b[2:])["test_it.py::test_a"].exceeds("exits", 0.05)


def test_one_round_has_no_interval(write):
    """On both sides."""
    a, b = ([write(benchmark("test_a", 1, exits=(mean, 0.0)))] for mean in (10.0, 20.0))
    change = compare(a, b)["test_it.py::test_a"]["exits"]
    assert change.ratio == 2
    assert math.isnan(change.low)


GOLDEN = """\
test_it.py::test_a
A: 20 rounds; B: 20 rounds; 0.95 intervals from the spread of rounds
          A   B  B / A  from   to
exits    20  21   1.05  1.05 1.05  1/iteration
0 or not defined on both sides: 1
"""


def test_the_command_line_compares_each_benchmark(write, capsys):
    """As a table or JSON, with limits; what one side alone has is said."""
    a = write(benchmark("test_a", 20, exits=(20.0, 0.0), io_exits=(0.0, 0.0)), benchmark("test_old", 20))
    b = write(benchmark("test_a", 20, exits=(21.0, 0.0), io_exits=(0.0, 0.0)))
    assert cli.main(["compare", a, b, "--fail-if", "exits>4%"]) == 1
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [line.split() for line in GOLDEN.splitlines()] + [[]]
    assert err.splitlines() == [
        "kvmstats: on one side only: test_it.py::test_old",
        "kvmstats: exceeded: test_it.py::test_a: exits>4%",
    ]
    assert cli.main(["compare", a, b, "--fail-if", "exits>5%", "-j", "-e", "exits"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "benchmark": "test_it.py::test_a",
        "name": "exits",
        "a": 20.0,
        "b": 21.0,
        "ratio": 1.05,
        "low": pytest.approx(1.05),
        "high": pytest.approx(1.05),
        "unit": "1/iteration",
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--per", "exits"], "--per is for recordings"),
        (["-g", "web"], "-g is for recordings"),
        (["--confidence", "2"], "confidence is 2.0; it must be between 0 and 1"),
        (["-e", "exit"], "'exit' is not on both sides; did you mean 'exits'?"),
        (["--fail-if", "exit>1%"], "'exit' is not on both sides"),
    ],
)
def test_options_that_do_not_fit_are_named(write, capsys, options, text):
    """Those of recordings, and names that are not there."""
    path = write(benchmark("test_a", 20, exits=(20.0, 0.0)))
    assert cli.main(["compare", path, path, *options]) == 2
    assert text in capsys.readouterr().err


def test_results_without_counters_and_recordings_are_refused(write, capsys, tmp_path):
    """With what to do."""
    plain = {"name": "x", "fullname": "x", "extra_info": {}}
    path = write(plain)
    assert cli.main(["compare", path, path]) == 2
    assert "no benchmark has counters on both sides" in capsys.readouterr().err
    other = tmp_path / "recording.npz"
    other.write_bytes(b"PK")
    assert not is_suite(other)
    assert cli.main(["compare", path, str(other)]) == 2
    assert "give the same kind on both sides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"benchmarks": 3}',
        '{"benchmarks": [3]}',
        '{"benchmarks": [{"fullname": "x"}]}',
        '{"benchmarks": [{"fullname": "x", "extra_info": {"kvmstats": 3}}]}',
        '{"benchmarks": [{"fullname": "x", "extra_info": {"kvmstats": {"rounds": 0, "per_iteration": {}}}}]}',
        json.dumps({"benchmarks": [benchmark("x", 2, exits=(1, math.nan))]}),
        '{"benchmarks": [{"runs": [{"values": [1], "metadata": {"kvmstats_values": 1, "kvmstats_exits": "x"}}]}]}',
        '{"benchmarks": [{"runs": [{"values": [1], "metadata": {"kvmstats_values": 1, "kvmstats_exits": 1e999}}]}]}',
        '{"benchmarks": [{"runs": 3}]}',
        pytest.param('{"a":' * 100_000, id="nested"),
        pytest.param('{"benchmarks": [' + "9" * 5000 + "]}", id="digits"),
    ],
)
def test_what_no_suite_wrote_is_one_error(tmp_path, text):
    """Whatever it is, with the path."""
    path = tmp_path / "other.json"
    path.write_text(text)
    assert is_suite(path)
    with pytest.raises(kf.KvmStatsError, match=r"other\.json is not what pytest-benchmark or pyperf writes"):
        read_suite(path)


def test_a_benchmark_without_counters_is_left_out(write):
    """Of those that pyperf ran, one that the hook did not count is on neither side."""
    bare = {"metadata": {"name": "plain"}, "runs": [{"metadata": {}, "values": [0.1]}]}
    path = write(bare, pyperf("boot", {"exits": 10.0}, {"exits": 11.0}))
    assert list(compare([path], [path])) == ["boot"]
