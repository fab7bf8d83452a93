"""kvmstats report: what was recorded, over several runs, as text, JSON, CSV, a picture and a page."""

import csv
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import made
import numpy as np
import pytest
from helpers import DATA

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.analysis.several_runs import SeveralRuns
from kvmstats_fast.cli import _report_plot
from kvmstats_fast.formats import need

S = 10**9
COUNT = (kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
TIME = (kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1)
HIST = (kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 20, -1)
HALTS = ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")
STATS = [
    *(kf.Stat(name, *COUNT) for name in ("exits", "io_exits", "halt_exits", "still")),
    kf.Stat("halt_wait_ns", *TIME),
    *(kf.Stat(name, *HIST) for name in HALTS),
    kf.Stat("memory", kf.StatType.INSTANT, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
]


def run_of(host="here", start=1_790_000_000, pid=1, scale=1, **about):
    """Ten seconds of a VM of two vCPUs, of which the second only waits; the tick before the last was missed."""
    seconds = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10])
    steps = (seconds * (seconds + 1) // 2)[:, None] * np.array([[scale, 0]])  # 1, 2, 3 ... a second
    buckets = np.zeros(20, np.int64)
    buckets[16:18] = 2, 1
    values = {"exits": steps * 300, "io_exits": steps * 100, "halt_exits": steps * 200}
    values |= {"halt_wait_ns": seconds[:, None] * np.array([[4, 4]]) * S // 10, "memory": steps % 7 + 1}
    values |= dict.fromkeys(HALTS, steps[:, :, None] * buckets)
    about = {"wall_offset": start * S, "interval": 1.0, "missed": 1, "kernel": "6.18.0 x86_64"} | about
    sweep_ns = np.full(10, 200_000)
    x = made.run_of(
        made.group_of(STATS, [0, 1], values), times=seconds * S, ticks=seconds, sweep_ns=sweep_ns, host=host, **about
    )
    x.files = tuple(replace(info, pid=pid) for info in x.files)
    return x


@pytest.fixture
def recording(tmp_path):
    """One such run."""
    run_of().save(path := tmp_path / "made.npz")
    return str(path)


def report(capsys, *arguments):
    """What it prints."""
    assert cli.main(["report", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def objects(capsys, *arguments):
    """Its JSON, by what the objects are."""
    found = {}
    for one in map(json.loads, report(capsys, *arguments, "-j").splitlines()):
        found.setdefault(one.pop("what"), []).append(one)
    return found


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_text_is_what_it_was_and_fits_the_terminal(recording, capsys, monkeypatch, columns):
    """Run, VM, rates with their spread, histograms, figures and advice; KVMSTATS_GOLDEN=1 writes the files anew."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out, path = report(capsys, recording), DATA / "report" / f"{columns}.txt"
    if os.environ.get("KVMSTATS_GOLDEN"):
        path.write_text(out)
    assert out == path.read_text()
    assert max(map(len, out.splitlines())) <= columns


def test_json_has_the_fields_of_every_verb_and_the_spread(recording, capsys):
    """An object for each run, VM, statistic and figure, and one for the advice; what did not move is left out."""
    found = objects(capsys, recording)
    assert {name: len(of) for name, of in found.items()} == {
        "run": 1,
        "vm": 1,
        "statistic": 8,
        "figure": 5,
        "halt_poll_advice": 1,
    }
    (run,), (vm,) = found["run"], found["vm"]
    assert (run["start"], run["seconds"], run["sweeps"], run["missed"]) == ("2026-09-21T14:13:20.000000000", 10, 10, 1)
    assert run["cost"] == pytest.approx(10 * 200e-6 / 10)
    assert (vm["vm"], vm["pid"], vm["vcpus"], vm["seconds"], vm["ended"]) == ("web", 1, 2, 10, "")
    rows = {row["name"]: row for row in found["statistic"]}
    who = {"host": "here", "vm": "web", "pid": 1, "vcpu": None, "name": "exits"}
    rates = [300 * second for second in range(1, 9)] + [300 * 9.5]
    low, middle, high = np.quantile(rates, (0, 0.5, 0.99))
    assert rows["exits"] == who | {
        "value": 16500,
        "rate": 1650.0,
        "unit": "",
        "min": low,
        "median": middle,
        "p99": pytest.approx(high),
    }
    assert (rows["memory"]["rate"], rows["memory"]["min"], rows["memory"]["unit"]) == (None, 2048.0, "B")
    assert "min" not in rows["halt_wait_hist"]
    assert found["halt_poll_advice"][0]["halts"] == 2 * 3 * 55
    assert "still" not in rows
    assert [objects(capsys, recording, "-I", step)["run"][0]["step"] for step in ("10ms", "2s")] == [1, 2]
    assert len(objects(capsys, recording, "-z")["statistic"]) == 9


def test_csv_has_the_spread_in_columns(recording, capsys):
    """After the fields that every verb has."""
    (row,) = csv.DictReader(io.StringIO(report(capsys, recording, "-x", "-e", "exits")))
    assert (row["value"], row["rate"], row["min"], row["median"], row["bucket"]) == (
        "16500",
        "1650.0",
        "300.0",
        "1500.0",
        "",
    )


@pytest.mark.parametrize(
    ("by", "keys"), [("vm", [("web", None)]), ("vcpu", [("web", 0), ("web", 1)]), ("host", [("", None)])]
)
def test_values_are_of_what_by_says(recording, capsys, by, keys):
    """Of each VM, vCPU or host: rows, and figures."""
    found = objects(capsys, recording, "--by", by, "-e", "halt_wait_ns", "-e", "exits", "-z")
    for name in ("exits", "halt_wait_ns"):
        assert [(row["vm"], row["vcpu"]) for row in found["statistic"] if row["name"] == name] == keys
    assert sum(row["value"] for row in found["statistic"] if row["name"] == "exits") == 16500
    assert [(row["vm"], row["vcpu"]) for row in found["figure"] if row["name"] == "exits/s"] == keys


def test_runs_are_added_up_in_the_order_of_time(tmp_path, capsys):
    """Totals are those of all, rates by the time that was recorded; VMs of different pids are lives of their own."""
    run_of(start=1_790_000_100, pid=2, scale=3).save(tmp_path / "later.npz")
    with kf.Recorder(tmp_path / "r", flush_seconds=0) as recorder:
        x = run_of()
        recorder.write(x[:6])
        recorder.write(x[6:])
    found = objects(capsys, tmp_path / "later.npz", tmp_path / "r", "-I", "1s")
    assert [(life["pid"], life["seconds"]) for life in found["vm"]] == [(1, 10), (2, 10)]
    assert [run["start"][14:19] for run in found["run"]] == ["13:20", "15:00"]
    rows = {row["name"]: row for row in found["statistic"]}
    assert (rows["exits"]["value"], rows["exits"]["rate"], rows["exits"]["pid"]) == (4 * 16500, 4 * 16500 / 20, None)
    assert (rows["exits"]["min"], rows["exits"]["p99"] > 7000) == (300, True)
    assert rows["halt_wait_hist"]["buckets"][16:18] == [4 * 110, 4 * 55]
    assert rows["memory"]["value"] == (55 * 3 % 7 + 2) * 1024
    figures = {row["name"]: row["value"] for row in found["figure"]}
    assert figures["io_exits/s"] == pytest.approx((1 + 3) * 5500 / 20)  # by the time, as the rows are


def test_what_was_recorded_at_the_same_time_is_counted_in_the_same_time(tmp_path, capsys):
    """Two recordings of a host that overlap by half: its rate is that of all in the time that any of them covers."""
    run_of().save(tmp_path / "a.npz")
    run_of(start=1_790_000_005, pid=2).save(tmp_path / "b.npz")
    found = objects(capsys, tmp_path / "a.npz", tmp_path / "b.npz", "--by", "host", "-e", "exits")
    (row,) = found["statistic"]
    assert (row["value"], row["rate"]) == (2 * 16500, pytest.approx(2 * 16500 / 15))


@pytest.mark.parametrize("by", ["vm", "vcpu", "host"])
def test_a_vm_that_died_early_in_a_run_has_its_rate_by_the_time_that_it_was_read(by, tmp_path, capsys):
    """Over several runs too: what a run goes on for without it is no time of it."""
    first = run_of()
    first.errors = tuple(kf.SampleError(file, 3, kf.VmGoneError(3, "gone")) for file in range(2))
    first.groups[0].values[3:] = 0
    for number, x in enumerate((first, run_of(start=1_790_000_100))):
        x.save(tmp_path / f"{number}")
    (row, *_) = objects(capsys, tmp_path, "--by", by, "-e", "exits")["statistic"]
    rates = kf.open_recordings(tmp_path).mean_rate("exits", by=by)
    assert row["value"] == 300 * (3 + 55)
    assert row["rate"] == pytest.approx(next(iter(rates.values()))) == pytest.approx(300 * 58 / (2 + 10))


@pytest.mark.parametrize("by", ["vm", "host"])
def test_a_vcpu_that_died_early_adds_what_it_counted_and_no_rate_of_its_own(by, tmp_path, capsys):
    """The rate of a VM is what its files counted by the time that any of them was read, as its figure is."""
    x = run_of()
    x.errors = (kf.SampleError(0, 3, kf.VmGoneError(3, "gone")),)
    x.groups[0].values[3:, 0] = 0
    x.save(tmp_path / "run")
    found = objects(capsys, tmp_path, "--by", by, "-e", "exits")
    assert found["statistic"][0]["rate"] == pytest.approx(900 / 10)
    assert found["figure"][0]["value"] == pytest.approx(900 / 10)


@pytest.mark.parametrize("last", [True, False])
def test_a_run_of_one_sweep_takes_nothing_from_the_others(last, tmp_path, capsys):
    """Nothing is counted in it, in no time: what counts is as without it, before others and after them."""
    run_of().save(tmp_path / "whole")
    alone = {row["name"]: row for row in objects(capsys, tmp_path)["statistic"]}
    run_of(start=1_790_000_100 if last else 1_780_000_000)[:1].save(tmp_path / "one")
    for row in objects(capsys, tmp_path)["statistic"]:
        if row["name"] != "memory":
            assert (row["value"], row["rate"]) == (alone[row["name"]]["value"], alone[row["name"]]["rate"])
            assert row.get("buckets") == alone[row["name"]].get("buckets")
        del alone[row["name"]]
    assert not alone


def test_two_halves_say_what_the_whole_does():
    """Figures and advice of a run that is given in parts, which share a sweep, are those of the run."""
    x = run_of()
    together = SeveralRuns()
    together.add(x[:4])
    together.add(x[3:])
    for by in ("vcpu", "vm", "host"):
        figures = together.figures(by)
        assert set(figures) == set(x.figures(by))
        for name, figure in x.figures(by).items():
            assert np.allclose(figures[name].values, figure.values, equal_nan=True), name
            assert (figures[name].labels, figures[name].formula) == (figure.labels, figure.formula)
    halves, whole = together.halt_poll_advice().to_dict(), x.halt_poll_advice().to_dict()
    for one, other in zip(halves.pop("rows"), whole.pop("rows"), strict=True):
        assert one == pytest.approx(other)
    assert halves == pytest.approx(whole, nan_ok=True)


def test_what_was_recorded_for_no_time_or_not_at_all_has_no_rate(tmp_path, capsys):
    """One sweep, a file that failed at once and a VM that died have what is known of them, in every form."""
    x = run_of()
    x[:1].save(tmp_path / "one.npz")
    error = kf.VmGoneError("the VM is gone")
    gone = replace(x, errors=(kf.SampleError(0, 0, error), kf.SampleError(1, 0, error)))
    gone.save(tmp_path / "gone.npz")
    for name in ("one", "gone"):
        found = objects(capsys, tmp_path / f"{name}.npz", "-z")
        rows = {row["name"]: row for row in found["statistic"]}
        assert {rows["exits"][key] for key in ("rate", "min", "median", "p99")} == {None}
        assert found["vm"][0]["ended"] == ("the VM is gone" if name == "gone" else "")
        arguments = (
            tmp_path / f"{name}.npz",
            "-z",
            "--html",
            tmp_path / f"{name}.html",
            "-o",
            tmp_path / f"{name}.txt",
        )
        assert report(capsys, *arguments) == ""
        text = (tmp_path / f"{name}.txt").read_text()
        assert ("exits" in text, "halt_poll_ns" in text) == (True, False)  # there was no halt to give advice on
        assert "exits" in Page((tmp_path / f"{name}.html").read_text()).text


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Keep an element and its attributes."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        """Keep text."""
        self.text += data


def test_the_page_needs_nothing_and_escapes_names(tmp_path, capsys):
    """No request leaves it, whatever a guest is called; its scripts and styles are its own, and a policy says so."""
    x = run_of(host='<img src="x">')
    x.files = tuple(replace(info, vm="<script>alert(1)</script>&\x1b\udcff") for info in x.files)
    x.save(tmp_path / "x.npz")
    assert report(capsys, tmp_path / "x.npz", "--html", tmp_path / "x.html") == ""
    text = (tmp_path / "x.html").read_bytes().decode()
    page = Page(text)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"<script>.*", "", text, flags=re.DOTALL))
    assert "fetch" not in text
    names = {name for _, attributes in page.tags for name in attributes}
    assert names.isdisjoint({"src", "href", "srcset", "action", "data", "poster"})
    assert not any(name.startswith("on") for name in names)
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("script"), tags.count("img"), tags.count("link")) == (1, 0, 0)
    assert "default-src 'none'" in next(one["content"] for _, one in page.tags if one.get("http-equiv"))
    assert "VM <script>alert(1)</script>&\\x1b" in page.text
    assert tags.count("svg") >= 8
    assert {one.get("data-value") for _, one in page.tags} >= {"16500", "1650.0"}


def test_a_picture_is_drawn(recording, tmp_path, capsys):
    """A panel for each statistic with a rate; what is no format, and nothing to draw, is one error."""
    assert report(capsys, recording, "--plot", tmp_path / "x.png") == ""
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", recording, "--plot", str(tmp_path / "x.nothing")]) == 2
    assert "does not end in the name of a format: " in capsys.readouterr().err
    assert cli.main(["report", recording, "-e", "still", "--plot", str(tmp_path / "y.png")]) == 2
    assert "there is nothing to plot" in capsys.readouterr().err
    assert cli.main(["report", recording, "--plot", str(tmp_path / "x.png")]) == 1
    assert "x.png" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"made.npz", "x.png"}


def test_a_picture_that_cannot_be_drawn_leaves_nothing_written(recording, tmp_path, capsys, monkeypatch):
    """Neither the page nor the text: a format that there is not, or a missing library, is told first."""
    page, text, picture = (["--html", "x.html"], ["-o", "x.txt"], ["--plot", "x.nothing"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", recording, *page, *text, *picture]) == 2
    assert "does not end in the name of a format" in capsys.readouterr().err
    monkeypatch.setattr(_report_plot, "need", lambda _, extra: need("not_there", extra))
    assert cli.main(["report", recording, *page, *text, "--plot", "x.png"]) == 1
    assert "pip install 'kvmstats-fast[plot]'" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"made.npz"}


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["-e", "nothing"], 2, "nothing"),
        (["-g", "db"], 2, "no VM 'db'"),
        (["gone.npz"], 1, "gone.npz: No such file"),
    ],
)
def test_what_is_not_there_is_one_error(recording, capsys, arguments, status, reason):
    """A statistic, a VM or a file that no run has: a reason in one line."""
    assert cli.main(["report", recording, *arguments]) == status
    assert reason in capsys.readouterr().err
