"""What a person sees at the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmstats_fast
from kvmstats_fast import cli
from kvmstats_fast._text import describe_error, format_table
from kvmstats_fast.cli import _grammar, demo
from kvmstats_fast.testing import KvmUnavailableError, exit_counter


def kvmstats(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "kvmstats_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.real_vm
def test_demo_shows_a_real_vm_with_the_right_numbers():
    """The README's first command: a real VM, the counters that moved, and the verdict."""
    done = kvmstats("demo", "-n", "300")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A real VM on /dev/kvm with 2 vCPUs")
    said = re.findall(r"vcpu (\d) left the guest (\d+) times, (\w+) rose by ([\d,]+): right", done.stdout)
    assert [words[:3] for words in said] == [("0", "300", exit_counter()), ("1", "600", exit_counter())]
    assert all(int(moved) >= int(left) for _, left, _, moved in said)  # a busy host interrupts some, see counts_right


@pytest.mark.real_vm
def test_demo_prints_one_json_object_a_file():
    """--json: a line per stats file, with who it is and what moved."""
    done = kvmstats("demo", "--json", "-n", "5", "--vcpus", "3")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["source"], line["kind"], line["vcpu"]) for line in lines] == [
        ("kvm", "vm", None),
        *[("kvm", "vcpu", i) for i in range(3)],
    ]
    assert [line["delta"][exit_counter()] >= 5 * (i + 1) for i, line in enumerate(lines[1:])] == [True] * 3


def test_demo_says_that_made_up_files_are_made_up():
    """--synthetic: no VM, and the first word says so."""
    done = kvmstats("demo", "--synthetic", "-n", "7")
    assert done.returncode == 0
    assert done.stdout.startswith("SYNTHETIC: no VM ran")
    assert "exits rose by 14: right" in done.stdout
    assert json.loads(kvmstats("demo", "--synthetic", "--json").stdout.splitlines()[0])["source"] == "synthetic"


def test_demo_without_kvm_gives_the_reason_and_goes_on_with_made_up_files(monkeypatch, capsys):
    """Where no VM can be made, stderr says why, stdout that the files are made up, and the exit status is 0."""

    def refuse():
        raise KvmUnavailableError(2, "no VM can be made on /dev/kvm: No such file or directory; is the module loaded?")

    monkeypatch.setattr(demo, "exit_counter", refuse)
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("SYNTHETIC")
    assert err == (
        "kvmstats: no VM can be made on /dev/kvm: No such file or directory; is the module loaded?; made-up stats "
        "files instead\n"
    )


@pytest.mark.parametrize("error", [OSError(25, "KVM_GET_STATS_FD: refused"), kvmstats_fast.KvmStatsError("odd exit")])
def test_demo_goes_on_with_made_up_files_whatever_keeps_a_vm_from_running(monkeypatch, capsys, error):
    """A kernel without stats files, or a guest that leaves for another reason, is no end of the demonstration."""

    def refuse():
        raise error

    monkeypatch.setattr(demo, "exit_counter", refuse)
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("SYNTHETIC")
    assert "made-up stats files instead" in err


def test_no_stdout_is_no_traceback():
    """A shell's >&- leaves nowhere to print to, and that is all."""
    command = f"exec {sys.executable} -m kvmstats_fast demo --synthetic >&-"
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""


def test_demo_fails_when_a_counter_is_wrong(monkeypatch, capsys):
    """A wrong number is called wrong and is exit status 1."""
    start = demo._start

    def one_exit_lost(resources, arguments):
        subject = start(resources, arguments)
        return subject._replace(make_exits=lambda exits, vcpu: subject.make_exits(exits - 1, vcpu))

    monkeypatch.setattr(demo, "_start", one_exit_lost)
    assert cli.main(["demo", "--synthetic"]) == 1
    assert "exits rose by 999: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["demo", "-n", "0"], ["demo", "-n", "x"], ["demo", "-n", str(2**63)]]
)
def test_bad_arguments_are_exit_status_2_and_say_what_is_wrong(arguments):
    """Argparse's convention: usage and reason on stderr, nothing on stdout."""
    done = kvmstats(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: kvmstats" in done.stderr


def test_an_error_is_one_line_on_stderr(monkeypatch, capsys):
    """Errors of the package and of the kernel are no tracebacks."""

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(demo, "_start", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr() == ("", "kvmstats: Too many open files\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (kvmstats_fast.VmGoneError("gone"), 4),
        (PermissionError(13, "no"), 3),
        (OSError(1, "no"), 3),
        (_grammar.UsageError("these do not go together"), 2),
        (kvmstats_fast.KvmStatsError("odd"), 1),
        (ImportError("install it"), 1),
        (MemoryError("too much"), 1),
    ],
)
@pytest.mark.parametrize("verb", sorted(cli._VERBS))
def test_what_is_raised_is_a_status_whatever_the_verb(monkeypatch, capsys, verb, error, status):
    """And one line, but for Ctrl-C."""

    def fail(_):
        raise error

    needed = {"compare": ["a", "b"], "convert": ["a", "-o", "b"], "capture": ["-o", "a"], "report": ["a"]}
    monkeypatch.setattr(f"kvmstats_fast.cli.{verb.replace('-', '_')}.run", fail)
    assert cli.main([verb, *needed.get(verb, [])]) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", "" if status == 130 else f"kvmstats: {describe_error(error)}\n")


def test_a_reader_that_goes_away_is_no_traceback():
    """Output into a closed pipe ends quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        command = [sys.executable, "-m", "kvmstats_fast", "demo", "--synthetic"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_version_is_the_packages():
    """--version prints the version of the distribution."""
    assert kvmstats("--version").stdout == f"kvmstats {kvmstats_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "--json"], ["list", "--help"]])
def test_what_needs_no_numpy_imports_none(arguments):
    """Help, the version and the list of VMs come without the time that numpy takes to load."""
    code = (
        "import sys\n"
        "from kvmstats_fast.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1].split()
    assert "argparse" in loaded
    assert "numpy" not in loaded


def test_help_has_a_line_for_each_verb_and_each_verb_has_a_help(capsys):
    """The table of verbs and the modules of the verbs agree; every option of a verb is described."""
    listed = re.findall(r"^    ([a-z-]+)\b", kvmstats("--help").stdout, re.MULTILINE)
    modules = sorted(path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("[a-z]*.py"))
    assert sorted(listed) == modules
    for verb in listed:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([verb, "--help"])
        out, err = capsys.readouterr()
        assert out.startswith(f"usage: kvmstats {verb}")
        assert err == ""


@pytest.mark.parametrize(
    ("rows", "align", "text"),
    [
        ([["a", "1"], ["bcd", "22"]], "<>", "a     1\nbcd  22"),
        ([["a", "1", "x"], ["bcd", "22", ""]], "><<", "  a  1   x\nbcd  22"),
        # A wide character takes two cells of a terminal, a combining one none.
        ([["\u65e5\u672c", "1"], ["abcde", "2"]], "<<", "\u65e5\u672c   1\nabcde  2"),
        ([["e\u0301t\u00e9", "1"], ["abcde", "2"]], ">>", "  e\u0301t\u00e9  1\nabcde  2"),
    ],
)
def test_columns_of_a_table_line_up_in_a_terminal(rows, align, text):
    """Left or right, whatever the script; no blanks at the end of a line."""
    assert format_table(rows, align) == text


@pytest.mark.parametrize(
    ("modes", "closed"),
    [
        ((0o755, 0o755, 0o644), None),
        ((0o755, 0o711, 0o604), None),
        ((0o755, 0o755, 0o640), "lib/hold.so"),
        ((0o755, 0o754, 0o644), "lib"),
        ((0o700, 0o755, 0o644), "."),
    ],
)
def test_hold_path_warns_where_other_users_could_not_read_the_library(open_folder, monkeypatch, capsys, modes, closed):
    """The file without o+r, any folder above it without o+x: stderr names which, and a command that helps."""
    library = open_folder / "lib" / "hold.so"
    library.parent.mkdir()
    library.touch()
    for path, mode in zip((open_folder, library.parent, library), modes, strict=True):
        path.chmod(mode)
    monkeypatch.setattr("kvmstats_fast.cli.hold_path.hold_library", lambda: library)
    assert cli.main(["hold-path"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{library}\n"
    if closed is None:
        assert err == ""
    else:
        assert f": {open_folder / closed} has mode " in err
        assert f"install -D -m 755 {library} /usr/lib/kvmstats/hold.so" in err
