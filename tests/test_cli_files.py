"""What the command line does with files: compare, convert, capture, list; and with command lines that make no sense."""

import json
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from holder import Holder
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.cli import _VERBS, _privileges

CAPTURES = Path(__file__).parent / "data" / "captures"
EXITS = [
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("requests", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
]
#: How many command lines: 1,000 by hand.
LINES = int(os.environ.get("KVMSTATS_COMMAND_LINES", "150"))

WORDS = """
-p -g -e -I -d -n -j -x -o -z -w --vcpu --per --work --to --fail-if --socket --force --per-vcpu --kind --confidence
--synthetic --json --csv --values delta 0 -1 1 999999999 1e9 nan * exits ex* a1.npz a?.npz . 0-3 csv vm /dev/null
/proc/self/mem
no/such/file exits>5% 10us
"""


@pytest.fixture
def recordings(tmp_path):
    """Two runs of 100 exits a second, a1 and a2, and two of 110, b1 and b2; 10 and 11 requests."""
    for name, exits in (("a1", 100), ("a2", 102), ("b1", 150), ("b2", 151)):
        steps = np.arange(40)[:, None]
        run_of(group_of(EXITS, [0], {"exits": steps * exits, "requests": steps * 10})).save(tmp_path / f"{name}.npz")
    return tmp_path


def test_recordings_are_compared(recordings, capsys):
    """A glob or commas for several runs a side; JSON has plain numbers."""
    assert cli.main(["compare", f"{recordings}/a?.npz", f"{recordings}/b1.npz,{recordings}/b2.npz", "-j"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (rows["exits"]["a"], rows["exits"]["b"]) == (101, 150.5)
    assert rows["exits"]["low"] < 150.5 / 101 < rows["exits"]["high"]
    assert (
        cli.main(["compare", f"{recordings}/a?.npz", f"{recordings}/b?.npz", "--per", "requests", "-e", "exits"]) == 0
    )
    out = capsys.readouterr().out
    assert "1/requests" in out
    assert "spread of runs" in out
    assert cli.main(["compare", f"{recordings}/a1.npz", f"{recordings}/b1.npz", "--work", "39,78", "-e", "exits"]) == 0
    assert "0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limits", "status"),
    [(["exits>5%"], 1), (["exits > 20%"], 1), (["exits>60%"], 0), (["exits<-5%"], 0), (["exits>60%", "exits>1%"], 1)],
)
def test_a_limit_that_is_exceeded_fails_a_suite(recordings, capsys, limits, status):
    """Beyond doubt: with the whole interval; the limit is named on stderr."""
    options = [word for limit in limits for word in ("--fail-if", limit)]
    assert cli.main(["compare", f"{recordings}/a?.npz", f"{recordings}/b?.npz", *options]) == status
    err = capsys.readouterr().err
    assert err == (f"kvmstats: exceeded: {limits[-1]}\n" if status else "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--fail-if", "exits"], "'exits' is not a limit"),
        (["--fail-if", "exits<5%"], "is not a limit"),
        (["--fail-if", "nosuch>5%"], "'nosuch' is not on both sides; none of the "),
        (["--fail-if", "exit>5%"], "'exit' is not on both sides; did you mean 'exits'"),
        (["--per", "nothing"], "nothing"),
        (["--confidence", "2"], "confidence is 2.0"),
        (["--work", "0"], "per is 0.0"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_status_2(recordings, capsys, options, text):
    """One line, which says what it must be."""
    assert cli.main(["compare", f"{recordings}/a1.npz", f"{recordings}/b1.npz", *options]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), text in err) == (1, True), err


def test_a_recording_is_converted(recordings, capsys):
    """To the format that the name ends in, or that is named; what is there stays, without --force."""
    source = f"{recordings}/a1.npz"
    before = kf.Samples.load(source)
    for name in ("out.csv", "out.arrows", "out.parquet", "again.npz"):
        assert cli.main(["convert", source, "-o", str(recordings / name)]) == 0
        assert capsys.readouterr().out == f"{recordings / name}\n"
    assert np.array_equal(kf.Samples.load(recordings / "out.arrows")["exits"], before["exits"])
    assert cli.main(["convert", source, "-o", str(recordings / "out.csv")]) == 1
    assert "out.csv" in capsys.readouterr().err
    assert cli.main(["convert", source, "-o", str(recordings / "out.csv"), "--force"]) == 0
    assert cli.main(["convert", source, "-o", str(recordings / "what")]) == 2
    assert (
        "does not end in the name of a format: say --to parquet, csv, perfetto, npz, arrows, merged"
        in capsys.readouterr().err
    )


def test_changes_are_converted_too(recordings, capsys):
    """To Parquet and CSV, with --values; where a format has no place for them the command line is wrong."""
    x = kf.Samples.load(recordings / "a1.npz")
    for values in ("delta", "rate"):
        for name in ("csv", "parquet"):
            out = recordings / f"{values}.{name}"
            command = ["convert", f"{recordings}/a1.npz", "-o", str(out), "--values", values]
            assert cli.main([*command, *(["--kind", "vcpu"] if name == "csv" else [])]) == 0
        x.vcpu.to_csv(recordings / "x.csv", values=values, overwrite=True)
        assert (recordings / f"{values}.csv").read_bytes() == (recordings / "x.csv").read_bytes()
        (path,) = (recordings / f"{values}.parquet").glob("vcpu/*/*")
        found = pq.read_table(path, partitioning=None)["exits"].to_pylist()
        changes = x.vcpu.delta("exits") if values == "delta" else x.vcpu.rate("exits")
        assert found == changes.T.ravel().tolist()
    capsys.readouterr()
    for name in ("npz", "arrows", "perfetto", "merged"):
        out = recordings / f"new.{name}"
        assert cli.main(["convert", f"{recordings}/a1.npz", "-o", str(out), "--values", "raw"]) == 2
        assert f"--values is for parquet and csv; {name} has them as they were read" in capsys.readouterr().err
        assert not out.exists()


def test_an_old_stats_file_becomes_one_of_today(tmp_path, capsys):
    """Which `list` shows, with types and units, and `check` finds in order."""
    old, new = CAPTURES / "v2-x86_64" / "vcpu0-after.bin", tmp_path / "new.bin"
    assert cli.main(["convert", str(old), "--to", "merged", "-o", str(new)]) == 0
    assert kf.parse(new.read_bytes()).snapshot() == kf.parse(old.read_bytes()).snapshot()
    assert cli.main(["check", str(new)]) == 0
    capsys.readouterr()
    assert cli.main(["list", str(CAPTURES / "x86_64-6.1" / "vcpu0-after.bin")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["halt_wait_ns", "cumulative", "ns", "-"] in rows
    assert ["halt_wait_hist", "log_hist", "ns", "32,", "the", "last", "from", "1.07", "s"] in rows


def test_the_statistics_of_a_recording_are_listed(recordings, capsys):
    """As JSON, one object each."""
    assert cli.main(["list", f"{recordings}/a1.npz", "-j"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["type"], row["unit"], row["edges"]) for row in rows] == [
        ("exits", "cumulative", "", None),
        ("requests", "cumulative", "", None),
    ]


@pytest.mark.real_vm
def test_the_files_of_a_vm_are_captured_whole(tmp_path, capsys):
    """As the kernel gives them, with what they are of; not over what is there."""
    with Holder(1) as vmm:
        folder = tmp_path / "capture"
        assert cli.main(["capture", "-p", str(vmm.pid), "-o", str(folder)]) == 0
        about = json.loads((folder / "about.json").read_text())
        assert [(one["file"], one["kind"], one["vcpu"], one["pid"]) for one in about["files"]] == [
            ("000-vm.bin", "vm", None, vmm.pid),
            ("001-vcpu0.bin", "vcpu", 0, vmm.pid),
        ]
        with kf.attach(vmm.pid) as machine:
            for file, one in zip(machine.files, about["files"], strict=True):
                image = kf.parse((folder / one["file"]).read_bytes())
                assert (image.id, image.schema.fingerprint) == (file.id, file.schema.fingerprint)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert cli.main(["capture", "-p", str(vmm.pid), "-o", str(folder)]) == 1
        assert cli.main(["capture", "-p", str(vmm.pid), "--socket", "x", "-o", str(folder)]) == 2
        assert cli.main(["list", "-p", str(vmm.pid), "-w"]) == 0
        (folder / "mine").touch()
        assert cli.main(["capture", "-p", str(vmm.pid), "-o", str(folder), "--force"]) == 1
        assert (folder / "mine").exists()
    capsys.readouterr()


@contextmanager
def ended_after(seconds):
    """SIGINT, again and again, once so much time has passed: an ordinary end of what lasts."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_command_line_that_makes_no_sense_is_one_reason_and_a_status(recordings, capsys, monkeypatch):
    """Whatever is put together: no traceback, status 0 to 4, and a reason on stderr where it is not 0."""
    monkeypatch.chdir(recordings)
    for name in ("keep_only", "raise_file_limit"):  # what `export` does to its process, it would do to this one
        monkeypatch.setattr(_privileges, name, lambda *_: None)
    words = [*WORDS.split(), "", " ", "\x1b[31m", "x" * 5000]
    rng = random.Random(LINES)
    verbs = [verb for verb in _VERBS if verb not in ("run", "demo")]
    for _ in range(LINES):
        line = [rng.choice(verbs), *rng.choices(words, k=rng.randrange(6))]
        if line[0] in ("stat", "record"):  # which else last until a signal comes
            line += ["-d", "1us"]
        if line[0] == "export":
            line += ["--textfile", "vms.prom", "-n", "1"]
        try:
            with ended_after(0.5 if line[0] == "export" else 30):  # it serves until it is told to end
                status = cli.main(line)
        except SystemExit as ended:
            status = ended.code
        _, err = capsys.readouterr()
        assert status in (0, 1, 2, 3, 4) or (line[0] == "export" and status == 130), line
        assert "Traceback" not in err, line
        assert err or status in (0, 1, 130), line


#: Command lines that write to OUT what is there already, or takes a choice; FILE is a recording of both kinds of files.
REFUSED = {
    "stat FILE -j -o OUT": "--force",
    "report FILE --html OUT": "--force",
    "report FILE --plot OUT.png": "--force",
    "convert FILE -o OUT --to csv --kind vm": "--force",
    "convert FILE -o OUT.npz": "--force",
    "convert FILE -o new.csv": "--kind",
    "run --json OUT true": "--force",
    "stat -j -o OUT -- true": "--force",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_names_the_option_that_helps(line, tmp_path, monkeypatch, capsys):
    """Who types a command line is told how to write what helps there; with it, it is done."""
    monkeypatch.chdir(tmp_path)
    values = {"exits": np.arange(9)[:, None], "requests": np.arange(9)[:, None]}
    run_of(group_of(EXITS, [0], values), group_of(EXITS, [1], values, kind="vm")).save("FILE.npz")
    for name in ("OUT", "OUT.png", "OUT.npz"):
        Path(name).write_text("something")
    words = line.replace("FILE", "FILE.npz").split()
    assert cli.main(words) in (1, 2)
    helps = REFUSED[line]
    assert helps in (err := capsys.readouterr().err)
    assert "overwrite" not in err  # as who calls the library would write it
    assert "samples." not in err
    at = words.index("--") if "--" in words else 1
    assert cli.main([*words[:at], helps, *(["vcpu"] if helps == "--kind" else []), *words[at:]]) == 0
    assert all(Path(word).read_bytes() != b"something" for word in words if word.startswith("OUT"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("out.txt", "--to", "npz"), "out.txt: name it *.npz"),
        (("out.npz", "--to", "arrows"), "out.npz: what is named *.npz is read as one"),
    ],
)
def test_what_is_converted_can_be_read_under_its_name(recordings, words, said, capsys):
    """A format is not written under a name by which it would be taken for another one."""
    assert cli.main(["convert", f"{recordings}/a1.npz", "-o", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path(words[0]).exists()


@pytest.mark.parametrize(
    "line",
    [
        "run --json OUT --force /nowhere/vmm",
        "stat -j -o OUT --force -- /nowhere/vmm",
        "stat FILE -j -o OUT --force -e nothing_of_this_name",
        "report nowhere -j -o OUT --force",
        "report FILE nowhere --html OUT --force",
        "compare FILE nowhere -j -o OUT --force",
        "list nowhere -j -o OUT --force",
        "check nowhere -j -o OUT --force",
        "convert nowhere --to csv -o OUT --force",
    ],
)
def test_what_fails_leaves_what_it_was_to_replace(line, tmp_path, monkeypatch, capsys):
    """--force replaces a file by what a verb has to say, and by nothing else."""
    monkeypatch.chdir(tmp_path)
    run_of(group_of(EXITS, [0], {"exits": np.arange(9)[:, None]})).save("FILE.npz")
    Path("OUT").write_text("something")
    assert cli.main(line.replace("FILE", "FILE.npz").split()) not in (0, 130)
    assert Path("OUT").read_text() == "something"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE.npz", "OUT"]
    capsys.readouterr()
