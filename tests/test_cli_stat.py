"""kvmstats stat: what was counted, as a table, JSON or CSV; of VMs that run, while a command runs, of recordings."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from holder import Holder
from made import group_of, run_of
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.cli import _grammar, stat
from kvmstats_fast.testing import counts_right, exit_counter

STATS = [
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("io_exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("halt_exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("halt_wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 5, -1),
    kf.Stat("memory", kf.StatType.INSTANT, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
    kf.Stat("still", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
]
GOLDEN = """\
VM web (pid 1), 2 vCPUs, 10.000 s
  exits          3,000  300.0/s
    halt_exits   2,000  200.0/s  66.7 %
    io_exits     1,000  100.0/s  33.3 %
  halt_wait_ns     8 s   40.0 %  of 2 vCPUs' time
  memory        4.1 kB           now

  halt_wait_hist: 30 values
    1 ns  to  2 ns  20  ########################################################
    2 ns  to  4 ns  10  ############################

  exits_imbalance  100.0 %
"""


@pytest.fixture
def recording(tmp_path):
    """Ten seconds of a VM of two vCPUs, the first of which did it all, but for waiting."""
    steps = np.arange(11)[:, None] * np.array([[1, 0]])
    waits = np.arange(11)[:, None] * np.array([[4, 4]]) * 10**8
    buckets = steps[:, :, None] * np.array([0, 2, 1, 0, 0])
    values = {"exits": steps * 300, "io_exits": steps * 100, "halt_exits": steps * 200, "halt_wait_ns": waits}
    values |= {"halt_wait_hist": buckets, "memory": np.full((11, 2), 2)}
    run_of(group_of(STATS, [0, 1], values)).save(path := tmp_path / "made.npz")
    return str(path)


def test_a_recording_is_a_table(recording, capsys):
    """Exits by kind and their share, times as a share of the vCPUs', a histogram as bars; what is still is left out."""
    assert cli.main(["stat", recording]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.replace("█", "#") == GOLDEN


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_a_table_fits_the_terminal(recording, capsys, monkeypatch, columns):
    """Bars take what room there is; in a narrow one shares are left out."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["stat", recording]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert max(line.count("█") for line in lines) > columns / 3


def test_json_and_csv_have_the_fields_that_every_verb_has(recording, capsys):
    """One object a line; in CSV a histogram has a row for each bucket that counted, named by its lower edge."""
    assert cli.main(["stat", recording, "-j", "-z", "-e", "exits", "-e", "halt_*", "-e", "still"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"exits", "halt_exits", "halt_wait_ns", "halt_wait_hist", "still"}
    who = {"host": "here", "vm": "web", "pid": 1, "vcpu": None}
    assert rows["exits"] == who | {"name": "exits", "value": 3000, "rate": 300.0, "unit": ""}
    assert rows["halt_wait_ns"] == who | {"name": "halt_wait_ns", "value": 8.0, "rate": 0.8, "unit": "s"}
    assert rows["halt_wait_hist"]["buckets"] == [0, 20, 10, 0, 0]
    assert rows["halt_wait_hist"]["edges"] == [0.0, 1e-9, 2e-9, 4e-9, 8e-9, None]
    assert cli.main(["stat", recording, "-x;", "-e", "halt_wait_hist", "-e", "exits", "--per-vcpu"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter=";"))
    assert [(line["vcpu"], line["name"], line["value"], line["bucket"]) for line in lines] == [
        ("0", "exits", "3000", ""),
        ("0", "halt_wait_hist", "20", "1e-09"),
        ("0", "halt_wait_hist", "10", "2e-09"),
    ]


def test_vcpus_are_chosen_and_told_apart(recording, capsys):
    """--vcpu takes some, --per-vcpu shows each."""
    assert cli.main(["stat", recording, "-j", "--per-vcpu", "-e", "halt_wait_ns"]) == 0
    assert [json.loads(line)["vcpu"] for line in capsys.readouterr().out.splitlines()] == [0, 1]
    assert cli.main(["stat", recording, "-j", "--vcpu", "1", "-e", "halt_wait_ns"]) == 0
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == [4.0]


def test_output_goes_to_a_new_file_which_is_the_users_alone(recording, tmp_path, capsys):
    """What is there is not replaced without --force."""
    path = tmp_path / "out.json"
    assert cli.main(["stat", recording, "-j", "-e", "exits", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["value"] == 3000
    assert path.stat().st_mode & 0o777 == 0o600
    assert cli.main(["stat", recording, "-j", "-o", str(path)]) == 1
    assert "out.json: it is there already; --force replaces it" in capsys.readouterr().err
    assert cli.main(["stat", recording, "-j", "-e", "exits", "-o", str(path), "--force"]) == 0
    assert json.loads(path.read_text())["value"] == 3000
    for force in ([], ["--force"]):  # which would not help
        assert cli.main(["stat", recording, "-o", str(tmp_path), *force]) == 1
        assert capsys.readouterr().err == f"kvmstats: {tmp_path}: Is a directory\n"


@pytest.mark.real_vm
def test_a_guest_is_counted_while_a_command_runs():
    """Exactly the exits it made; the exit status is the command's."""
    with Holder() as vmm:
        work = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"]
        pids = ("-p", str(vmm.pid))
        arguments = [sys.executable, "-m", "kvmstats_fast", "stat", *pids, "-j", "--per-vcpu", "--", *work]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
            assert until(children.read_text)  # so what it counts from has been read
            vmm.do("guest.run(500, vcpu=1)")
            out, _ = running.communicate("go\n")
        assert running.returncode == 7
        rows = {(row["vcpu"], row["name"]): row["value"] for row in map(json.loads, out.splitlines())}
        assert counts_right({name: value for (vcpu, name), value in rows.items() if vcpu == 1}, 500)
        assert (0, exit_counter()) not in rows


@pytest.mark.real_vm
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_intervals_add_up_and_a_signal_ends_them(end):
    """A block each interval, with the time since the start; Ctrl-C, SIGTERM and a hang-up are the ordinary end."""
    with Holder() as vmm:
        arguments = [sys.executable, "-m", "kvmstats_fast", "stat", "-p", str(vmm.pid), "-I", "20ms", "-j", "-z"]
        with subprocess.Popen([*arguments, "-e", "exits"], stdout=subprocess.PIPE, text=True) as running:
            first = json.loads(running.stdout.readline())
            vmm.do("guest.run(300)")
            counted, times = first["value"], [first["time"]]
            while counted < 300:
                row = json.loads(running.stdout.readline())
                counted += row["value"]
                times.append(row["time"])
            running.send_signal(end)
            running.communicate()
        assert running.returncode == 0
        assert counted <= 310
        assert times == sorted(set(times))


@pytest.mark.real_vm
def test_guests_that_cannot_be_had_are_told_apart_by_the_exit_status(capsys):
    """No such VM 1, a process without one 1, one that is gone 4, arguments that do not go together 2."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for arguments, status, text in (
        (["-g", "no-such-guest"], 1, "no VM is called 'no-such-guest'"),
        (["-p", str(os.getpid())], 1, "has no VM"),
        (["-p", str(gone.pid)], 4, "has ended"),
        (["-p", "1", "file"], 2, "-p names VMs that run"),
        (["-n", "3"], 2, "-n is the number of intervals"),
        (["-e", "exits", "-e", "sched_*"], 2, "sched_* is what the host's scheduler counts: it needs --sched"),
        (["--socket", "/no/such/socket"], 1, "/no/such/socket: No such file or directory"),
        (["--socket", "/" + "x" * 200], 1, ": AF_UNIX path too long"),
        (["-g", "*", "-d", "1", "--", "true"], 2, "-d cannot be combined with a command: sampling lasts"),
        (["-z", "--", "qemu"], 2, "-z does not go with a VMM that is started here"),
        (["-I", "1s", "--", "qemu"], 2, "-I does not go with a VMM that is started here"),
        (["--", "/no/such/vmm"], 127, "kvmstats: /no/such/vmm: No such file"),
    ):
        assert cli.main(["stat", *arguments]) == status
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        assert text in err


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (_grammar.interval, "100us", 1e-4),
        (_grammar.interval, "5", 5e-3),
        (_grammar.interval, "1.5s", 1.5),
        (_grammar.duration, "5", 5),
        (_grammar.duration, "2m", 120),
        (_grammar.vcpu_ranges, "0-3,7", (0, 1, 2, 3, 7)),
    ],
)
def test_times_have_units_and_vcpus_ranges(parse, text, value):
    """A bare interval is milliseconds, as in perf; a bare duration seconds."""
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "arguments",
    [["-I", "0"], ["-I", "1 s"], ["-I", "-1"], ["-I", "1e3"], ["-I", "nan"], ["-d", "1d"], ["-n", "0"], ["-p", "x"]]
    + [["--vcpu", text] for text in ("3-1", "a", "1,,2", "-1", "9" * 20)]
    + [["-x", "ab"], ["-j", "-x"]],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, capsys, recording):
    """Argparse's usage, and the reason; nothing on stdout."""
    try:
        status = cli.main(["stat", *([] if "-p" in arguments else [recording]), *arguments])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert "Traceback" not in err


def test_a_vm_of_which_nothing_moved_is_named(recording, capsys):
    """It says so, instead of nothing at all; JSON and CSV have no rows."""
    assert cli.main(["stat", recording, "-e", "still"]) == 0
    assert capsys.readouterr().out == "VM web (pid 1), 2 vCPUs, 10.000 s\n  nothing changed\n"
    assert cli.main(["stat", recording, "-e", "still", "-j"]) == 0
    assert not capsys.readouterr().out


@pytest.mark.real_vm
@pytest.mark.parametrize("interval", [[], ["-I", "10ms"]])
def test_a_vm_that_ends_is_shown_as_it_was_read_last_and_named_once(interval, monkeypatch):
    """Those that run are counted on; when the last one has ended, it is over, as of itself."""
    monkeypatch.setattr(stat, "_LOOK", 0.01)
    with Holder(name="one") as one, Holder(name="two") as two:
        run = "guest.run(300)"
        steps = iter([lambda: (one.do(run), two.do(run)), lambda: None, one.end, lambda: None, two.end])

        def take(latest, samples):
            there = taken(latest, samples)
            next(steps, lambda: None)()
            return there

        taken = stat._Latest.take
        monkeypatch.setattr(stat._Latest, "take", take)
        command = ["stat", "-p", str(one.pid), "-p", str(two.pid), *interval, "-j", "-e", exit_counter()]
        out, said = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(said):
            assert cli.main(command) == 0
        rows = [json.loads(line) for line in out.getvalue().splitlines()]
        for vmm in (one, two):
            assert 300 <= sum(row["value"] for row in rows if row["pid"] == vmm.pid) <= 310
            assert said.getvalue().count(f"process {vmm.pid} ") == 1
        assert "Errno" not in said.getvalue()
        assert said.getvalue().count("has exited") == 2


@pytest.mark.real_vm
@pytest.mark.parametrize("interval", [[], ["-I", "1h"]])
@pytest.mark.parametrize(("words", "said"), [(["-e", "exitz"], "'exitz'"), (["--vcpu", "0,7"], "has a vCPU 7")])
def test_what_no_vm_has_is_said_before_anything_is_counted(interval, words, said, tmp_path, capsys):
    """Not after the hour for which it was to be counted: the command is not even started."""
    with Holder() as vmm:
        command = ["--", "touch", str(tmp_path / "started")]
        assert cli.main(["stat", "-p", str(vmm.pid), *words, *interval, *command]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "started").exists()
