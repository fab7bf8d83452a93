"""What a person sees of every verb, for two real VMs: in terminals of several widths, in pipes, on full devices."""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
import warnings
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path

import pytest
from helpers import stats_fds, until
from holder import Holder
from qemu import firmware, needs_qemu, plain_qemu

from kvmstats_fast import cli
from kvmstats_fast._text import display_width
from kvmstats_fast.cli import _VERBS
from kvmstats_fast.cli._screen import fit_table, wrap_text
from kvmstats_fast.vmm.hold import hold_library

pytest.importorskip("pyarrow")

CAPTURE = str(Path(__file__).parent / "data" / "captures" / "x86_64-6.1" / "vcpu0-after.bin")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[mK]")
VERB = (sys.executable, "-m", "kvmstats_fast")


def run_in_child(arguments, outputs, environment=()):
    """Run it in a child process that need not import anything, with these fds as its stdout and stderr: its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which the child uses none
        pid = os.fork()
    if pid:
        return pid
    status = 70  # as of a traceback that is not shown
    try:
        for number, fd in zip((1, 2), outputs, strict=True):
            os.dup2(fd, number)
        os.environ |= dict(environment)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
        try:
            status = cli.main([str(word) for word in arguments])
        except SystemExit as ended:
            status = ended.code
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - which is what is looked for
        traceback.print_exc()
    finally:
        os._exit(status)


def on_terminal(columns, *arguments, **environment):
    """Run it in a pseudo-terminal: (status, all it wrote)."""
    outer, inner = pty.openpty()
    ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "NO_COLOR"):
            patch.delenv(name, raising=False)
        pid = run_in_child(arguments, (inner, inner), {"TERM": "xterm"} | environment)
    os.close(inner)
    return collect(pid, outer)


def in_pipe(*arguments):
    """Run it with a pipe for both: (status, all it wrote)."""
    reading, writing = os.pipe()
    pid = run_in_child(arguments, (writing, writing))
    os.close(writing)
    return collect(pid, reading)


def collect(pid, fd):
    """Read all that a child writes, and wait for it."""
    parts = []
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except OSError:  # the other end of a terminal is closed
            part = b""
        if not part:
            break
        parts.append(part)
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), b"".join(parts).decode()


def into(stdout, *arguments):
    """Run it with this stdout: (status, what it wrote to stderr)."""
    reading, writing = os.pipe()
    pid = run_in_child(arguments, (stdout, writing))
    os.close(writing)
    return collect(pid, reading)


@pytest.fixture(scope="module")
def vms(tmp_path_factory):
    """Two VMs that are run by QEMU under the hold library: their VMMs' pids. One has a name of wide characters."""
    folder = tmp_path_factory.mktemp("vms")
    with ExitStack() as resources, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(hold_library()))
        boot = firmware(folder, "REST")
        names = (f"web-{os.getpid()}", f"\u65e5\u672c\u8a9e-{os.getpid()}")
        found = [plain_qemu(folder, resources, *boot, "-name", f"guest={name}", vcpus=2)[0].pid for name in names]
        yield found


@pytest.fixture(scope="module")
def recorded(vms, tmp_path_factory):
    """Both, as `record` wrote them."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    pids = [word for pid in vms for word in ("-p", str(pid))]
    subprocess.run([*VERB, "record", *pids, "-I", "20ms", "-d", "1s", "-o", path], check=True, stderr=subprocess.PIPE)
    return path


def lines_of(verb, vms, recorded, folder):
    """Command lines of a verb, for VMs that run and for what was recorded."""
    pids = [word for pid in vms for word in ("-p", str(pid))]
    new = folder / f"new-{time.monotonic_ns()}"
    return {
        "list": [[], pids[:2], [recorded], [CAPTURE]],
        "stat": [[*pids, "-d", "200ms", "-z"], [recorded], [recorded, "-I", "500ms"], [CAPTURE]],
        "report": [[recorded], [recorded, "--by", "vcpu"], [CAPTURE]],
        "record": [[*pids, "-n", "20", "-I", "20ms", "-o", new]],
        "compare": [[recorded, recorded]],
        "convert": [[recorded, "-o", f"{new}.npz"]],
        "capture": [[*pids, "-o", new]],
        "check": [pids[:2], [CAPTURE]],
        "demo": [["-n", "10", "--vcpus", "3"]],
        "run": [["true"]],
        "hold-path": [[]],
    }[verb]


#: Verbs of which all output are tables and prose; the others name files, whose paths are as long as they are.
FITTING = ("list", "stat", "report", "compare", "check", "demo")
COVERED = (*FITTING, "record", "convert", "capture", "run", "hold-path")


@needs_qemu
@pytest.mark.real_vm
@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("verb", COVERED)
def test_a_verb_fits_a_terminal(verb, columns, vms, recorded, tmp_path):
    """No line is wider than it, in cells; wide characters take two of them."""
    lines = lines_of(verb, vms, recorded, tmp_path)
    for arguments in lines if columns == 50 else lines[:1]:
        status, text = on_terminal(columns, verb, *arguments)
        assert status == 0, text
        assert "Traceback" not in text
        plain = ESCAPES.sub("", text)
        assert "\x1b" not in plain
        if verb in FITTING:
            # A path is a word that is as long as it is.
            shown = [line for line in re.split(r"[\r\n]+", plain) if not line.startswith("kvmstats: ")]
            wide = [line for line in shown if display_width(line) > columns and "/" not in line]
            assert not wide, wide


@needs_qemu
@pytest.mark.real_vm
@pytest.mark.parametrize("verb", COVERED)
def test_a_verb_writes_no_color_into_a_pipe_and_ends_quietly_with_it(verb, vms, recorded, tmp_path):
    """No escapes; a reader that goes away is status 1 and no message; a full device is an error."""
    for arguments in lines_of(verb, vms, recorded, tmp_path):
        status, text = in_pipe(verb, *arguments)
        assert (status, "\x1b" in text) == (0, False), text
    if verb in ("record", "run"):
        return  # what they say goes to stderr
    reading, closed = os.pipe()
    os.close(reading)
    status, text = into(closed, verb, *lines_of(verb, vms, recorded, tmp_path)[0])
    os.close(closed)
    assert (status, "Traceback" in text, "roken pipe" in text) == (1, False, False), text
    full = os.open("/dev/full", os.O_WRONLY)
    status, text = into(full, verb, *lines_of(verb, vms, recorded, tmp_path)[0])
    os.close(full)
    assert (status, text.splitlines()[-1]) == (1, "kvmstats: No space left on device"), text


@pytest.mark.parametrize("line", [["--help"], ["list", CAPTURE], ["stat", CAPTURE], ["report", CAPTURE, "-j"]])
def test_a_full_device_is_one_line_and_status_1(line):
    """At the end of the process, too, when the interpreter flushes what is buffered; which PYTHONUNBUFFERED hides."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        running = subprocess.Popen([*VERB, *line], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
        _, err = running.communicate()
    assert (running.returncode, err.splitlines()) == (1, ["kvmstats: No space left on device"])


def test_every_verb_is_looked_at():
    """A new verb joins these tests, or says here where it is tested."""
    elsewhere = {"top", "export"}  # test_top_screen.py, test_export.py
    assert set(_VERBS) - elsewhere == set(COVERED)


@pytest.mark.parametrize("verb", ["stat", "report", "list", "check"])
def test_color_is_for_terminals_and_can_be_had_or_forbidden(verb):
    """NO_COLOR and TERM=dumb are heeded, --color wins; it is the same text."""
    outputs = {}
    for name, arguments, environment in (
        ("auto", [], {}),
        ("forbidden", [], {"NO_COLOR": "1"}),
        ("empty", [], {"NO_COLOR": ""}),
        ("dumb", [], {"TERM": "dumb"}),
        ("never", ["--color", "never"], {}),
        ("always", ["--color=always"], {"NO_COLOR": "1"}),
    ):
        status, outputs[name] = on_terminal(80, verb, CAPTURE, *arguments, **environment)
        assert status in (0, 1)
    assert {name: "\x1b[" in text for name, text in outputs.items()} == {
        "auto": True,
        "forbidden": False,
        "empty": True,
        "dumb": False,
        "never": False,
        "always": True,
    }
    assert len({ESCAPES.sub("", text) for text in outputs.values()}) == 1
    assert "\x1b" not in in_pipe(verb, CAPTURE)[1]
    assert "\x1b[" in in_pipe(verb, CAPTURE, "--color", "always")[1]


def test_without_a_verb_all_verbs_are_named():
    """The help, on stderr, and the status of a command line that is not complete."""
    done = subprocess.run(VERB, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(re.search(rf"^    {verb}\b", done.stderr, re.MULTILINE) for verb in _VERBS)


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_terminal_that_is_not_utf_8_gets_escapes(locale):
    """No traceback for a micro sign or a bar."""
    environment = os.environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    halts = Path(CAPTURE).with_name("halt-vcpu0-after.bin")
    done = subprocess.run([*VERB, "stat", halts], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "##" in done.stdout


@pytest.mark.parametrize(("width", "lines"), [(9, ["ab cd ef", "  gh"]), (5, ["ab cd", "  ef", "  gh"])])
def test_text_is_wrapped_by_cells(width, lines):
    """Behind a word; what is longer than a line is on its own."""
    assert wrap_text("ab cd ef gh", width) == lines
    assert wrap_text("\u65e5\u672c \u65e5\u672c", 8) == ["\u65e5\u672c", "  \u65e5\u672c"]
    assert wrap_text("x" * 20 + " y", 10) == ["x" * 20, "  y"]


def test_a_table_gives_up_columns_and_then_cuts():
    """In the order that is asked for; a cell that is cut says so."""
    rows = [("name", "value", "why"), ("\u65e5\u672c" * 10, "12", "because of this")]
    assert fit_table(rows, "<><", 50, (2,))[0].split() == ["name", "value"]
    narrow = fit_table(rows, "<><", 20, (2,))
    assert max(map(display_width, narrow)) <= 20
    assert narrow[1].split() == ["\u65e5\u672c" * 2 + "\u65e5...", "12"]


@pytest.mark.real_vm
def test_a_vm_that_dies_ends_nothing(tmp_path):
    """`stat` shows the others, and names what was lost; `record` has what there was, and goes on."""
    work = [sys.executable, "-c", "import sys; sys.stdin.readline()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Holder(1) as other:
        for left, status in ((other.pid, 0), (None, 4)):
            with Holder(1) as vmm:
                pids = [word for pid in (vmm.pid, left) if pid for word in ("-p", str(pid))]
                running = subprocess.Popen([*VERB, "stat", *pids, "-j", "-z", "-e", "exits", "--", *work], **pipes)
                children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
                assert until(children.read_text)
            # It has heard of it: before that the files read as ever.
            assert until(lambda pid=running.pid, files=2 if left else 0: len(stats_fds(pid)) == files)
            out, err = running.communicate("go\n")
            assert (running.returncode, "has exited, and its VM with it" in err) == (status, True), err
            assert "Traceback" not in err
            assert left in [*(json.loads(line)["pid"] for line in out.splitlines()), None]
    path = tmp_path / "run"
    with Holder(1) as vmm:
        line = [*VERB, "record", "-p", str(vmm.pid), "-I", "10ms", "-o", path, "--rotate", "50ms"]
        running = subprocess.Popen(line, **pipes)
        assert until((path / "vcpu-00002.arrows").exists)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert (running.returncode, "Traceback" in err) == (0, False), err
    status, text = on_terminal(80, "report", path)
    assert (status, "Traceback" in text) == (0, False), text
