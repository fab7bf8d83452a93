"""kvmstats record: a recording of what comes and goes, whole whatever ends it."""

import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from holder import Holder
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.cli import record
from kvmstats_fast.testing import exit_counter

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.real_vm


@contextmanager
def recording(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "kvmstats_fast", "record", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def sweeps_in(path):
    """How many are on the disk."""
    return len(kf.Samples.load(path)) if path.exists() and any(path.iterdir()) else 0


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_what_a_guest_did_is_recorded_and_a_signal_ends_it(tmp_path, end):
    """Every exit; SIGHUP begins new files; the last line says what can be done with it."""
    path = tmp_path / "out"
    with (
        Holder() as vmm,
        recording("-p", vmm.pid, "-I", "5ms", "-o", path, "-e", "exits", "-e", "fpu_reload") as running,
    ):
        assert until(path.exists)  # it samples by then
        vmm.do("guest.run(500, vcpu=1)")
        for part in range(2):  # so there was a sweep since
            running.send_signal(signal.SIGHUP)
            assert until((path / f"vcpu-{part:05}.arrows").exists)
        running.send_signal(end)
        _, err = running.communicate()
    assert running.returncode == 0
    assert re.search(rf"sweeps of 1 VM, \d+ ticks missed, .*: kvmstats report {path}\n$", err)
    assert {one.name for one in path.iterdir()} >= {"vcpu-00000.arrows", "vcpu-00001.arrows"}
    run = kf.Samples.load(path)
    assert run.total(exit_counter())[1] >= 500
    assert run.total(exit_counter())[0] == 0


def test_it_records_while_a_command_runs_and_has_its_status(tmp_path, capsys):
    """A VM that comes meanwhile is taken up; what is there is not replaced."""
    path = tmp_path / "out"
    with Holder() as vmm:
        command = [sys.executable, "-c", "import sys, time; time.sleep(0.2); sys.exit(9)"]
        options = ["-p", str(vmm.pid), "-I", "10ms", "-o", str(path)]
        assert cli.main(["record", *options, "--", *command]) == 9
        assert sweeps_in(path) > 3
        assert cli.main(["record", *options, "-n", "1"]) == 1
        assert "it is not empty" in capsys.readouterr().err
        assert cli.main(["record", *options, "-n", "2", "--force"]) == 0
        run = kf.Samples.load(path)
        assert len(run) + run.missed == 2
        (path / "mine").touch()
        assert cli.main(["record", *options, "-n", "2", "--force"]) == 1
        assert (path / "mine").exists()


def test_only_the_last_files_are_kept(tmp_path):
    """--rotate and --keep: what is old goes, what is left can be read."""
    path = tmp_path / "out"
    options = ["-I", "10ms", "-o", path, "--rotate", "0.1s", "--keep", "2"]
    with Holder(1) as vmm, recording("-p", vmm.pid, *options) as running:
        assert until(lambda: any(one.name > "vcpu-00003" for one in path.glob("vcpu-*")))
        running.send_signal(signal.SIGINT)
        running.communicate()
    assert len(list(path.glob("vcpu-*"))) == 2
    with pytest.warns(kf.RecordingWarning, match="missing"):
        x = kf.Samples.load(path)
    assert 0 < len(x) < x.tick[-1]


def test_a_kill_loses_only_what_waited(tmp_path):
    """What was flushed can be read; with a small flush that is nearly all."""
    path = tmp_path / "out"
    with Holder(1) as vmm, recording("-p", vmm.pid, "-I", "1ms", "-o", path, "--rotate", "0.2s") as running:
        assert until((path / "vcpu-00001.arrows").exists)
        running.kill()
        running.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kf.RecordingWarning)  # a batch may have been cut short
        assert len(kf.Samples.load(path)) > 20


def test_what_was_flushed_survives_ten_kills(tmp_path):
    """At moments of its own choosing: all that was on the disk before the kill is read, and no sweep is there twice."""
    rng = random.Random(20)
    with Holder(1) as vmm:
        for number in range(10):
            path = tmp_path / f"out{number}"
            with recording("-p", vmm.pid, "-I", "1ms", "-o", path, "--rotate", "100ms") as running:
                assert until((path / "vcpu-00001.arrows").exists)
                time.sleep(rng.random() * 0.15)
                # A part is complete once the next one is there.
                last = max(int(one.name[5:10]) for one in path.glob("vcpu-?????.arrows"))
                whole = [path / f"{kind}-{part:05}.arrows" for kind in ("vm", "vcpu") for part in range(last)]
                sizes = {one: one.stat().st_size for one in whole}
                running.kill()
                running.wait()
            assert {one: one.stat().st_size for one in whole} == sizes
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", kf.RecordingWarning)  # of the part that was cut short
                run = kf.Samples.load(path)
                flushed = sum(len(kf.Samples.load(one)) for one in whole if one.name.startswith("vcpu-"))
            assert len(run) >= flushed > 0
            assert (np.diff(run.tick.astype(np.int64)) > 0).all()
            assert run.total("exits").tolist() == [0]


def test_a_flight_recorder_keeps_a_burst_in_full_and_a_sweep_a_second(tmp_path, capsys):
    """With what was before and after it, and nothing else at full rate."""
    path = tmp_path / "out"
    work = "import time; time.sleep(0.5); guest.run(20000); time.sleep(0.5)"
    with Holder(1) as vmm:
        options = ["-p", str(vmm.pid), "-I", "2ms", "-o", str(path), "--when", f"{exit_counter()}>1/s"]  # one in 2 ms
        options += ["--before", "100ms", "--after", "100ms"]
        with recording(*options) as running:
            assert until((path / "full").exists)
            vmm.do(work)
            running.send_signal(signal.SIGINT)
            running.communicate()
    full, overview = (kf.Samples.load(path / part) for part in ("full", "overview"))
    assert full.total(exit_counter())[0] >= 20000
    counts = full[exit_counter()][:, 0]
    began, ended = np.flatnonzero(np.diff(counts))[[0, -1]]
    assert 0 < began < ended < len(full) - 2
    assert full.time[began] - full.time[0] <= 0.11e9
    assert full.tick.tolist() == sorted(set(full.tick.tolist()))
    assert overview.interval == 1.0
    capsys.readouterr()


@pytest.mark.parametrize("held", [True, False])
def test_what_a_flight_recorder_says_can_be_typed_and_both_parts_are_not_added_up(tmp_path, capsys, held):
    """It names a recording in which there is something; the folder of both would count everything twice."""
    path = tmp_path / "out"
    with Holder(1) as vmm:
        options = ["-p", str(vmm.pid), "-I", "100ms", "-n", "5", "-o", str(path)]  # a busy host misses some
        assert cli.main(["record", *options, "--when", f"exits{'<' if held else '>'}1e9/s"]) == 0
    said = capsys.readouterr().err
    assert ("of them kept" if held else "none kept: the condition never held") in said
    assert cli.main(shlex.split(said.rpartition(": kvmstats ")[2])) == 0
    assert cli.main(["report", str(path)]) == (1 if held else 0)
    assert ("do not add up: name" in capsys.readouterr().err) is held


def test_a_signal_that_comes_while_a_recording_is_opened_is_not_lost(tmp_path, monkeypatch):
    """Who waits for its path may send one at once: SIGHUP is no end then, and SIGTERM an ordinary one."""
    opening = record._open

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return opening(*arguments)

    monkeypatch.setattr(record, "_open", interrupted)
    unseen = []
    before = {
        number: signal.signal(number, lambda *it: unseen.append(it)) for number in (signal.SIGHUP, signal.SIGTERM)
    }
    try:
        with Holder(1) as vmm:
            assert cli.main(["record", "-p", str(vmm.pid), "-d", "60s", "-o", str(tmp_path / "out")]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not unseen


@pytest.mark.parametrize("when", [[], ["--when", "exits>1e9/s"]])
def test_where_there_is_one_sweep_it_is_told_that_rates_need_two(tmp_path, capsys, when):
    """And so what --when says about them; two sweeps say nothing of the kind."""
    with Holder(1) as vmm:
        for sweeps in (1, 5):  # of which a busy host misses some
            options = ["-p", str(vmm.pid), "-I", "200ms", "-n", str(sweeps), "-o", str(tmp_path / f"out{sweeps}")]
            assert cli.main(["record", *options, *when]) == 0
            said = "one sweep was recorded; rates, and conditions about them, need two: a longer -d or a shorter -I"
            assert (said in capsys.readouterr().err) is (sweeps == 1)


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--", "/no/such/command"], 127, "/no/such/command: No such file or directory"),
        (["-e", "exitz"], 2, "no statistic 'exitz'"),
        (["-d", "10ms", "-g", "no-such-guest"], 0, "no VM came; nothing was recorded"),
    ],
)
def test_where_nothing_was_recorded_nothing_is_left(tmp_path, capsys, more, status, said):
    """No folder that is no recording, and no command that would fail; an empty folder of the user's stays."""
    path = tmp_path / "out"
    with Holder(1) as vmm:
        who = [] if "-g" in more else ["-p", str(vmm.pid)]
        for mine in (False, True):
            assert cli.main(["record", *who, "-o", str(path), *more]) == status
            assert said in (err := capsys.readouterr().err)
            assert ("no VM called no-such-guest yet; it waits for one" in err) is ("-g" in more)
            assert "kvmstats report" not in err
            assert "Errno" not in err
            assert path.exists() is mine
            path.mkdir(exist_ok=True)


def test_who_is_left_out_is_told_at_once_while_nothing_can_be_recorded(tmp_path, capsys):
    """By name or by pid; not that there is no such VM, and again only for another reason."""
    path = str(tmp_path / "out")
    with Holder(1, hold="nothing", name="bare") as vmm:
        for who in (["-g", "bare"], ["-p", str(vmm.pid)]):
            assert cli.main(["record", *who, "-d", "1.3s", "-o", path]) == 0  # that is two looks
            left_out, waits, end = capsys.readouterr().err.splitlines()
            assert left_out.startswith(f"kvmstats: process {vmm.pid} is left out: ")
            assert left_out.endswith("only for the process that made the VM")
            assert waits.startswith("kvmstats: no VM can be recorded yet; it waits for one")
            assert end == "kvmstats: no VM could be attached to; nothing was recorded"


def test_who_comes_and_is_left_out_is_told_before_anything_is_recorded(tmp_path):
    """While it waits for its first VM."""
    with recording("-g", "late-*", "-d", "30s", "-o", tmp_path / "out") as running:
        assert running.stderr.readline() == "kvmstats: no VM called late-* yet; it waits for one\n"
        with Holder(1, hold="nothing", name="late-one") as vmm:
            assert running.stderr.readline().startswith(f"kvmstats: process {vmm.pid} is left out: ")


def test_a_pid_that_is_no_vmm_is_an_error_at_once(tmp_path, capsys):
    """As with stat -p; a VMM that has made no VM yet is waited for, by its pid."""
    path = tmp_path / "out"
    with subprocess.Popen(["sleep", "60"]) as other:
        assert cli.main(["record", "-p", str(other.pid), "-o", str(path)]) == 1
        assert f"process {other.pid} has no VM: " in capsys.readouterr().err
        other.kill()
    with subprocess.Popen(["firecracker", "60"], executable="/bin/sleep") as young:
        assert cli.main(["record", "-p", str(young.pid), "-d", "10ms", "-o", str(path)]) == 0
        assert f"process {young.pid} is left out: it has no VM; if it makes one" in capsys.readouterr().err
        young.kill()
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--before", "1s"], "--before is for a flight recorder: it needs --when"),
        (["--per-vcpu"], "--per-vcpu is for a flight recorder"),
        (["--rotate", "5x"], "'5x' is neither a size above 0 (500k, 100M, 2G) nor a time (30s, 10m, 1h)"),
        (["-o", "-"], "a recording is a directory, which stdout cannot be: name one with -o"),
        (["--keep", "2"], "--keep removes old files: it needs --rotate"),
        (["-e", "sched_run_ns"], "it needs --sched"),
        (["--when", "exits"], "is not a condition"),
        (["--priority", "100"], "priority is 100; it must be from 1 to 99"),
    ],
)
def test_arguments_that_do_not_go_together_are_status_2(arguments, text, capsys):
    """Before anything is attached to or written."""
    try:
        status = cli.main(["record", *arguments])
    except SystemExit as ended:  # of argparse
        status = ended.code
    assert status == 2
    assert text in capsys.readouterr().err
