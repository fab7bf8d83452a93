"""A VMM under ``kvmstats run``: its signals, files and exit status are as without it, and its statistics are shown."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers import stats_fds, until
from qemu import Qmp, arguments, needs_qemu

import kvmstats_fast as kf
from kvmstats_fast.cli import main
from kvmstats_fast.cli import run as run_module
from kvmstats_fast.testing import counts_right


@pytest.mark.real_vm
@needs_qemu
def test_kvmstats_run_shows_what_the_statistics_came_to(tmp_path):
    """The table on stderr, the VMM's own stdout untouched, its exit status ours; --json for programs."""
    command, path = arguments(tmp_path)
    for options in ([], ["--json", str(tmp_path / "stats")]):
        with subprocess.Popen(
            [sys.executable, "-m", "kvmstats_fast", "run", "-e", "exits", "-e", "halt_*", *options, "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            assert until(lambda child=child: child.pid in {ppid(found.pid) for found in kf.find_vms()})
            with closing(Qmp(path, child)) as monitor:
                assert until(lambda child=child: len(stats_fds(child.pid)) == 5)
                time.sleep(0.3)
                monitor("quit")
            out, err = child.communicate(timeout=30)
        assert (child.returncode, out) == (0, ""), err
    rows = [json.loads(line) for line in (tmp_path / "stats").read_text().splitlines()]
    assert [(row["kind"], row["vcpu"]) for row in rows] == [("vm", None), *(("vcpu", i) for i in range(4))]
    assert rows[1]["stats"]["exits"] > 0
    assert rows[0]["stats"] == {}
    assert len(rows[1]["stats"]["halt_wait_hist"]) == 32
    assert set(rows[1]["stats"]) >= {"exits", "halt_wait_ns"}


def ppid(pid):
    """The parent of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_kvmstats_run_gives_the_status_of_what_it_ran():
    """Of a program that makes no VM too; a signal is 128 more than its number; nothing to run is an error."""

    def run(*command):
        result = subprocess.run(
            [sys.executable, "-m", "kvmstats_fast", "run", *command], capture_output=True, text=True, check=False
        )
        return result.returncode, result.stderr

    status, err = run("--", sys.executable, "-c", "raise SystemExit(7)")
    assert (status, "made no VM" in err) == (7, True)
    assert run("--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")[0] == 128 + signal.SIGKILL
    status, err = run("--")
    assert (status, "name the VMM to start" in err) == (2, True)


def test_kvmstats_run_outlives_a_refusal(monkeypatch, capsys, tmp_path):
    """What may not be borrowed is said once, and the VMM runs to its end, whose status is given."""

    def refuse(*_, **__):
        raise kf.AttachError(errno.EPERM, "not permitted")

    monkeypatch.setattr(run_module, "borrow", refuse)
    assert main(["run", "--", sys.executable, "-c", "import time; time.sleep(0.2); raise SystemExit(7)"]) == 7
    err = capsys.readouterr().err
    assert (err.count("not permitted"), "made no VM" in err) == (1, True)
    monkeypatch.undo()
    # The file of a run that did not come about would be in the way of the next one.
    path = tmp_path / "stats"
    assert main(["run", "--json", str(path), "--", "no-such-vmm"]) == 127
    assert not path.exists()
    assert main(["run", "--json", str(path), "--", sys.executable, "-c", ""]) == 0
    assert path.read_text() == ""
    assert path.stat().st_mode & 0o777 == 0o600  # it shows what the guest did
    assert "made no VM" in capsys.readouterr().err
    assert main(["run", "--json", str(path), "--", sys.executable, "-c", "print('ran')"]) == 1
    assert "it is there already" in capsys.readouterr().err


@pytest.mark.real_vm
def test_kvmstats_run_lets_go_of_a_vm_that_was_destroyed(tmp_path):
    """Its statistics are shown all the same; its memory in the kernel is not kept for the rest of the run."""
    vmm = (
        "import sys\n"
        "from kvmstats_fast.testing import TinyGuest\n"
        "for exits in map(int, sys.argv[1:]):\n"
        "    with TinyGuest(1) as guest:\n"
        "        guest.run(exits)\n"
        "        print('made', flush=True)\n"
        "        sys.stdin.readline()\n"
    )
    shown = ["-e", "exits", "-e", "fpu_reload", "-e", "preempt*", "-e", "signal_exits"]
    command = [sys.executable, "-m", "kvmstats_fast", "run", *shown, "--json", str(tmp_path / "stats"), "--"]
    child = subprocess.Popen(
        [*command, sys.executable, "-c", vmm, "500", "700"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        before = set()
        for _ in range(2):
            assert child.stdout.readline() == "made\n"
            assert until(lambda before=before: len(now := stats_fds(child.pid)) == 2 and not now & before)
            before = stats_fds(child.pid)
            child.stdin.write("\n")
            child.stdin.flush()
    rows = [json.loads(line) for line in (tmp_path / "stats").read_text().splitlines()]
    assert [row["vcpu"] for row in rows] == [None, None, 0, 0]
    assert rows[0]["stats"] == {}  # none of those that were asked for
    assert all(counts_right(row["stats"], exits) for row, exits in zip(rows[2:], (500, 700), strict=True))


def test_kvmstats_run_passes_on_a_signal_that_comes_before_the_vmm(monkeypatch):
    """SIGTERM just before there is somebody to pass it on to ends the VMM, not kvmstats alone."""
    start = run_module.hold.start

    def signalled(argv, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(argv, **options)

    monkeypatch.setattr(run_module.hold, "start", signalled)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run", "--", sys.executable, "-c", "import time; time.sleep(60)"]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_vmm_under_kvmstats_run_ignores_the_signals_that_were_ignored():
    """Under nohup, or behind a script's &, neither a hangup nor Ctrl-C ends the VMM, as without kvmstats."""
    ignored = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}
    code = "import signal; print([int(n) for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN])"

    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, "-m", "kvmstats_fast", "run", "--", sys.executable, "-c", code]
    out = subprocess.run(command, preexec_fn=ignore, capture_output=True, text=True, check=True).stdout
    assert ignored <= set(json.loads(out))


def test_a_vmm_under_kvmstats_run_has_the_files_that_the_shell_opened_for_it(tmp_path):
    """As `qemu -netdev tap,fd=3 3<>/dev/tap5` has; and nothing of ours."""
    code = "import os; print([int(fd) for fd in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + fd)])"
    command = [sys.executable, "-m", "kvmstats_fast", "run", "--json", str(tmp_path / "stats"), "--"]
    with (tmp_path / "tap").open("x") as tap:
        fds = [*range(3), tap.fileno()]
        vmm = [sys.executable, "-c", code]
        out = subprocess.run([*command, *vmm], pass_fds=fds[3:], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == fds


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda _: "no-such-vmm-in-path", 127),
        (lambda folder: folder / "missing", 127),
        (lambda folder: script(folder, "#!/no/such/interpreter\n", 0o755), 127),
        (lambda folder: script(folder, "#!/bin/sh\n", 0o644), 126),
        (lambda folder: folder, 126),
        (lambda folder: script(folder, "#!/bin/sh\n", 0o755) / "below", 126),
    ],
    ids=["not in PATH", "no file", "no interpreter", "not executable", "a folder", "below a file"],
)
def test_a_command_that_cannot_be_started_has_the_status_of_a_shell(tmp_path, capfd, make, status):
    """127 if it is not there, 126 if it cannot be executed; stderr names it, and no file of statistics is left."""
    command = str(make(tmp_path))
    assert main(["run", "--json", str(tmp_path / "stats"), "--", command]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert ("/no/such/interpreter" if "script" in command and status == 127 else command) in err
    assert not (tmp_path / "stats").exists()


def script(folder, text, mode):
    """A file with this text."""
    path = folder / "script"
    path.write_text(text)
    path.chmod(mode)
    return path


#: What ends a process, can be caught, and is not a fault or something that the terminal sends to the VMM as well.
ENDING = [
    *("SIGTERM", "SIGHUP", "SIGQUIT", "SIGABRT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGPOLL"),
    *("SIGPWR", "SIGXCPU", "SIGRTMIN", "SIGRTMAX"),
]


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_ends_the_vmm_and_then_the_run(tmp_path, name):
    """Whatever would end kvmstats goes to the VMM, whose end it shows: no run leaves an empty file of statistics."""
    number = getattr(signal, name)
    code = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); print('ready', flush=True); input()"
    command = [sys.executable, "-m", "kvmstats_fast", "run", "--json", str(tmp_path / "stats"), "--"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def heed():  # a shell has its background jobs ignore SIGQUIT
        signal.signal(number, signal.SIG_DFL)

    vmm = [*command, sys.executable, "-c", code]
    with subprocess.Popen(vmm, text=True, preexec_fn=heed, **pipes) as child:  # noqa: PLW1509 - a system call, no lock
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.wait(60) == 128 + number
        assert "made no VM" in child.stderr.read()
    assert (tmp_path / "stats").read_text() == ""


@pytest.mark.parametrize("command", ["no-such-vmm", sys.executable])
def test_a_signal_before_there_is_a_vmm_leaves_no_file_without_a_vmm(tmp_path, monkeypatch, capfd, command):
    """The signal is caught before the file is made: it cannot come between the two."""
    made = run_module.open_private

    def signalled(path, **more):
        os.kill(os.getpid(), signal.SIGUSR1)
        return made(path, **more)

    monkeypatch.setattr(run_module, "open_private", signalled)
    status = main(["run", "--json", str(tmp_path / "stats"), "--", command, "-c", "import time; time.sleep(60)"])
    if command == "no-such-vmm":
        assert (status, (tmp_path / "stats").exists()) == (127, False)
    else:
        assert (status, (tmp_path / "stats").read_text()) == (128 + signal.SIGUSR1, "")
    capfd.readouterr()
