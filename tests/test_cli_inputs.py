"""What FILE may be: the same answers of a recording, a data set or an .npz; of a capture values, and no rates."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from holder import Holder
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.cli import _files
from kvmstats_fast.formats.wanted import Step, resample_steps
from kvmstats_fast.testing import counts_right, exit_counter

pytest.importorskip("pyarrow")

CAPTURES = Path(__file__).parent / "data" / "captures" / "x86_64-6.1"
COUNT = (kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
VM = [kf.Stat("remote_tlb_flush", *COUNT)]
VCPU = [
    kf.Stat("exits", *COUNT),
    kf.Stat("halt_wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 5, -1),
    kf.Stat("blocking", kf.StatType.INSTANT, kf.StatUnit.BOOLEAN, kf.StatBase.POW10, 0, 1, -1),
]


def made(sweeps=40, vcpus=2, name="web", start=0, **about):
    """A VM and its vCPUs, a sweep a second: vCPU i exits 100 * (i + 1) times a second."""
    steps = np.arange(sweeps)[:, None]
    exits = steps * 100 * np.arange(1, vcpus + 1)
    hist = exits[:, :, None] * np.array([0, 1, 0, 2, 0])
    x = run_of(
        group_of(VM, [0], {"remote_tlb_flush": steps * 7}, kind="vm"),
        group_of(VCPU, range(1, 1 + vcpus), {"exits": exits, "halt_wait_hist": hist, "blocking": exits * 0 + 1}),
        interval=1.0,
        wall_offset=(1_790_000_000 + start) * 10**9,
        **about,
    )
    x.files = tuple(replace(info, vm=name, name=name) for info in x.files)
    return x


@pytest.fixture(params=["npz", "arrows", "parquet"])
def stored(request, tmp_path):
    """The same run in each form."""
    path = tmp_path / f"run.{request.param}"
    if request.param == "parquet":
        made().save(tmp_path / "first.arrows")
        kf.to_parquet(tmp_path / "first.arrows", path)
    else:
        made().save(path)
    return str(path)


def rows(capsys, *arguments):
    """The objects that it prints."""
    assert cli.main([*map(str, arguments), "-j"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_a_form_makes_no_difference(stored, capsys):
    """The verbs say the same, with the VM's and the vCPUs' statistics, which a data set keeps apart."""
    found = {row["name"]: (row["value"], row["rate"]) for row in rows(capsys, "stat", stored)}
    assert found == {
        "remote_tlb_flush": (39 * 7, 7.0),
        "exits": (39 * 300, 300.0),
        "halt_wait_hist": (39 * 900, 900.0),
        "blocking": (2, None),
    }
    report = rows(capsys, "report", stored)
    (run,), (vm,) = ([one for one in report if one["what"] == what] for what in ("run", "vm"))
    assert (run["sweeps"], run["seconds"], run["vms"], vm["vcpus"], vm["seconds"]) == (40, 39, ["web"], 2, 39)
    of_report = {row["name"]: (row["value"], row["rate"]) for row in report if row["what"] == "statistic"}
    assert of_report == found
    compared = {row["name"]: (row["a"], row["ratio"]) for row in rows(capsys, "compare", stored, stored)}
    assert compared["exits"] == (300, 1)
    assert compared["remote_tlb_flush"] == (7, 1)
    listed = {row["name"] for row in rows(capsys, "list", stored)}
    assert listed == {"remote_tlb_flush", *(stat.name for stat in VCPU)}
    both = rows(capsys, "stat", stored, "-e", "exits", "-e", "remote_*")
    assert {row["name"] for row in both} == {"exits", "remote_tlb_flush"}
    (one,) = rows(capsys, "stat", stored, "-e", "exits", "--vcpu", "1", "-g", "w*")
    assert one["value"] == 39 * 100


def test_intervals_of_a_recording_are_those_of_its_sweeps_and_add_up(stored, capsys):
    """-I shows it as it would have been shown then; -n and -d end it; what is left of an interval has its time."""
    found = rows(capsys, "stat", stored, "-I", "10s", "-e", "exits")
    assert [(row["time"], row["value"], row["rate"]) for row in found] == [
        (9, 2700, 300),
        (19, 3000, 300),
        (29, 3000, 300),
        (39, 3000, 300),
    ]
    assert rows(capsys, "stat", stored, "-I", "10s", "-e", "exits", "-n", "2") == found[:2]
    assert rows(capsys, "stat", stored, "-I", "10s", "-e", "exits", "-d", "20s") == found[:2]
    assert cli.main(["stat", stored, "-I", "10s", "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("9.000 s\nVM web (pid 1), 2 vCPUs, 9.000 s\n")
    assert out.count("VM web") == 1
    assert "remote_tlb_flush" in out
    assert cli.main(["stat", stored, "-I", "10ms"]) == 2
    assert "taken each 1 s" in capsys.readouterr().err


def test_vms_that_come_and_go_are_added_up(tmp_path, capsys):
    """Of a recording of several runs, and of several recordings: each VM by itself, with the time that it was there."""
    with kf.Recorder(tmp_path / "host", flush_seconds=0) as recorder:
        recorder.write(made(11))
        later = made(21, name="db", start=100)
        recorder.write(replace(later, time=later.time + 100 * 10**9, wall_offset=1_790_000_000 * 10**9))
    made(11, start=200).save(tmp_path / "later.npz")
    found = rows(capsys, "stat", tmp_path / "host", tmp_path / "later.npz", "-e", "exits")
    assert [(row["vm"], row["value"], row["rate"]) for row in found] == [("web", 6000, 300), ("db", 6000, 300)]
    assert cli.main(["stat", str(tmp_path / "host"), "-e", "exits"]) == 0
    out = capsys.readouterr().out
    assert "VM web (pid 1), 2 vCPUs, 10.000 s" in out
    assert "VM db (pid 1), 2 vCPUs, 20.000 s" in out
    runs = rows(capsys, "compare", tmp_path / "host", tmp_path / "later.npz", "-e", "exits", "-g", "web")
    assert runs[0]["ratio"] == 1


def test_a_capture_has_values_and_no_rates(capsys):
    """What was counted since the VM was made; what takes time says so, and what takes none does not."""
    after = CAPTURES / "vcpu0-after.bin"
    image = kf.parse(after.read_bytes())
    found = {row["name"]: row for row in rows(capsys, "stat", after, "-z")}
    assert set(found) == set(image)
    for name, row in found.items():
        assert row["rate"] is None, name
        expected = image.schema.unpack(image.values, si=True)[name]
        assert np.array_equal(row.get("buckets", row["value"]), expected), name
    assert cli.main(["stat", str(after), str(CAPTURES / "vm-after.bin")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("VM kvm-1, 1 vCPU, one reading: counts since the VM was made\n  exits")
    assert cli.main(["report", str(after)]) == 0
    assert "one reading" in capsys.readouterr().out
    (change,) = rows(capsys, "compare", after, after, "--per", "exits", "-e", "io_exits")
    assert change["a"] == image["io_exits"] / image["exits"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["stat", "vcpu0-after.bin", "-I", "1s"], 2, "a capture is one reading, which has no rate: -I"),
        (["report", "vcpu0-after.bin", "-I", "1s"], 2, "one reading, which has no rate: -I"),
        (["compare", "vcpu0-before.bin", "vcpu0-after.bin"], 2, "divide by a statistic (--per STAT)"),
        (["stat", "vcpu0-before.bin", "vcpu0-after.bin"], 1, "are two readings of kvm-1/0: name one"),
        (["stat", "notes.txt"], 1, "notes.txt: neither a recording nor a captured stats file"),
        (["report", "notes.txt"], 1, "notes.txt: neither a recording nor a captured stats file"),
        (["stat", "nothing"], 1, "nothing: No such file or directory"),
        (["stat", "vcpu0-after.bin", "-d", "1s"], 2, "-d of a recording"),
        (["stat", "vcpu0-after.bin", "-e", "nothing"], 2, "nothing"),
    ],
)
def test_what_a_file_cannot_be_asked_is_one_error(arguments, status, text, capsys, monkeypatch):
    """A reason in one line, before anything is printed."""
    monkeypatch.chdir(CAPTURES)
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), text in err) == ("", 1, True), err


@pytest.mark.real_vm
def test_a_capture_of_a_vm_is_read_by_every_verb(tmp_path, capsys):
    """By the guest's name, with the values that the kernel gave."""
    with Holder(2, name="web") as vmm:
        vmm.do("guest.run(500, vcpu=1)")
        folder = tmp_path / "capture"
        assert cli.main(["capture", "-p", str(vmm.pid), "-o", str(folder)]) == 0
        capsys.readouterr()
    every = rows(capsys, "stat", folder, "--per-vcpu", "-z")
    found = [row for row in every if row["name"] == exit_counter()]
    assert [(row["vm"], row["pid"], row["vcpu"]) for row in found] == [("web", vmm.pid, 0), ("web", vmm.pid, 1)]
    assert counts_right({row["name"]: row["value"] for row in every if row["vcpu"] == 1}, 500)
    (vm,) = (one for one in rows(capsys, "report", folder) if one["what"] == "vm")
    assert (vm["vm"], vm["vcpus"], vm["seconds"]) == ("web", 2, 0)
    assert cli.main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.count(" PASS, 0 FAIL") == 3
    assert rows(capsys, "list", folder)


def test_a_gap_between_steps_is_not_resampled_away():
    """The last sweep before a gap, and all behind it, which do not follow it: however few they are at once."""
    x = made(10)
    steps = [Step(x[:4], 0, follows=True), Step(x[6:7], 0, follows=False), Step(x[7:], 0, follows=True)]
    found = [(step.follows, step.samples.tick.tolist()) for step in resample_steps(steps, 1.0)]
    assert found == [(True, [0, 1, 2]), (True, [3]), (False, [6, 7, 8]), (True, [9])]


@pytest.mark.parametrize("arguments", [["report"], ["stat"], ["stat", "-I", "10s"], ["list"], ["compare", "run"]])
def test_what_is_missing_of_a_recording_is_told_once(arguments, tmp_path, capsys, monkeypatch):
    """A part that is gone and one that was cut short, in one line; the rest is read."""
    monkeypatch.chdir(tmp_path)
    whole = made(90)
    with kf.Recorder("run", flush_seconds=0) as recorder:
        for start in range(0, 90, 30):
            recorder.write(whole[start : start + 30])
            recorder.rotate()
    for kind in ("vm", "vcpu"):
        Path(f"run/{kind}-00001.arrows").unlink()
    last = Path("run/vcpu-00002.arrows")
    last.write_bytes(last.read_bytes()[:-300])
    assert cli.main([*arguments, "run"]) == 0
    out, err = capsys.readouterr()
    assert out
    lines = err.splitlines()
    assert len(lines) == (0 if arguments == ["list"] else 1), err
    assert all("part 1 is missing; " in line and "vcpu-00002.arrows was not ended" in line for line in lines)


def test_memory_does_not_grow_with_a_recording(tmp_path, capsys, monkeypatch):
    """Four times the sweeps are reported, counted and shown in the same memory."""
    monkeypatch.setattr(_files, "STEP_BYTES", 1 << 16)
    peaks = []
    for sweeps in (8_000, 32_000):
        with kf.Recorder(tmp_path / f"{sweeps}", flush_seconds=0, batch_bytes=1 << 16) as recorder:
            whole = made(sweeps)
            for start in range(0, sweeps, 500):
                recorder.write(whole[start : start + 500])
            del whole
    for arguments in (["report", "-j"], ["stat", "-j"], ["stat", "-I", "1000s", "-j"]):
        peaks = []
        for sweeps in (8_000, 8_000, 32_000):  # the first time what is imported counts, too
            tracemalloc.start()
            assert cli.main([*arguments, str(tmp_path / f"{sweeps}")]) == 0
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            capsys.readouterr()
        assert peaks[2] < 1.5 * peaks[1] + (1 << 18), arguments


@pytest.mark.parametrize("words", [["FIRST", "SECOND", "-e", "exits"], ["FIRST", "-e", "exits", "SECOND"]])
@pytest.mark.parametrize("verb", ["stat", "report"])
def test_files_may_stand_before_options_and_behind_them(verb, words, tmp_path, capsys):
    """As everywhere on a command line."""
    paths = {"FIRST": tmp_path / "1.npz", "SECOND": tmp_path / "2.npz"}
    for number, path in enumerate(paths.values()):
        x = made(start=1000 * number)
        x.time += 10**12 * number
        x.save(path)
    found = [
        row for row in rows(capsys, verb, *(paths.get(word, word) for word in words)) if row.get("name") == "exits"
    ]
    assert [row["value"] for row in found] == [2 * 39 * 300]


@pytest.mark.parametrize("words", [["stat", "x", "--bogus", "y"], ["record", "--vcpu", "0"], ["export", "x.npz"]])
def test_what_a_verb_does_not_take_is_refused_with_its_usage(words, capsys):
    """Not with that of all verbs."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    err = capsys.readouterr().err
    assert err.startswith(f"usage: kvmstats {words[0]} ")
    assert f"kvmstats {words[0]}: error: unrecognized arguments: " in err
