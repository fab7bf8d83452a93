"""``kvmstats run``: start a VMM under the hold library, and show its statistics at its end."""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import describe_error
from kvmstats_fast.cli._output import open_private
from kvmstats_fast.cli._stats_table import print_stats
from kvmstats_fast.errors import KvmStatsError, VmGoneError
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.borrow import borrow, by_vcpu, find_known, hold_process, list_files

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import Process

_LOOK = 0.2  # s between looks for new VMs and vCPUs
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as a shell's

#: The signals that would end this process are passed on to the VMM, with whose end it ends. Not these: what cannot be
#: caught, what stops and continues, what is ignored by default, and faults of this process.
_NOT_PASSED_ON = {
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
    *(signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGPIPE, signal.SIGXFSZ),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.usage = "kvmstats run [options] [--] COMMAND ..."
    parser.description = (
        "Start COMMAND, any dynamically linked VMM, under the hold library, which opens the stats files of its VMs "
        "and vCPUs. When it exits, show its statistics, on stderr, because stdout is the VMM's. No privilege is "
        "needed. The exit status is that of COMMAND, 127 if it is not found, 126 if it cannot be executed."
    )
    parser.add_argument(
        "-e",
        "--event",
        action="append",
        metavar="EVENT",
        help="statistic to show, or a glob (may be repeated; default: all)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write JSON to FILE, one object per stats file, instead of the table"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the VMM and its arguments")


class _NotStartedError(KvmStatsError):
    """The command is not there, or cannot be executed."""

    def __init__(self, status: int, error: OSError) -> None:
        super().__init__(describe_error(error))
        self.status = status


def run(arguments: argparse.Namespace) -> int:
    """Run a VMM to its end."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        print("kvmstats run: name the VMM to start: kvmstats run -- qemu-system-x86_64 -accel kvm ...", file=sys.stderr)
        return 2
    path = arguments.json and Path(arguments.json)
    return start_and_show(command, arguments.event, path, force=arguments.force)


def start_and_show(command: list[str], events: list[str] | None, path: Path | None, *, force: bool) -> int:
    """Run a VMM to its end, and write what its files said as JSON to a new file, or as a table to stderr."""
    with ExitStack() as stack:
        pass_on_to = _pass_signals_on(stack)  # before there is a file that a signal would leave behind
        output = stack.enter_context(open_private(path, force=force, whole=True)) if path else None
        files: list[StatsFile] = []
        stack.callback(_close, files)
        process = stack.enter_context(_start(command))
        pass_on_to(process)
        destroyed: dict[StatsFile, dict[str, Any]] = {}
        for file in _watched(process, files):
            destroyed[file] = _stats(file, events)
        stats = [destroyed[file] if file in destroyed else _stats(file, events) for file in files]
        status = process.returncode
        if output is not None:
            for file, values in zip(files, stats, strict=True):
                who = {"pid": process.pid, "id": file.id, "kind": file.kind, "vcpu": file.vcpu_id}
                print(json.dumps(who | {"stats": values}), file=output)
        elif files:
            print(f"\n{command[0]} (process {process.pid}):\n", file=sys.stderr)
            print_stats(files, stats, sys.stderr)
        if not files:
            print(
                f"kvmstats: no stats file of {command[0]} (process {process.pid}) was seen. Causes: it made no VM; the "
                "VM was gone at once; another process that it started made it; or the hold library could not keep the "
                "files (LD_PRELOAD cleared, another root directory, a low `ulimit -n`)",
                file=sys.stderr,
            )
    return status if status >= 0 else 128 - status


def _start(command: list[str]) -> subprocess.Popen[Any]:
    try:
        return hold.start(command, close_fds=False)  # the shell's 3<>/dev/tap5
    except OSError as error:
        raise not_started(error) from None


def not_started(error: OSError) -> Exception:
    """Return what to raise for a command that could not be started; a shell's exit status goes with it."""
    if isinstance(error, FileNotFoundError):
        return _NotStartedError(_NOT_FOUND, error)
    if error.errno in (errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENOEXEC):
        return _NotStartedError(_NOT_EXECUTABLE, error)
    return error


def _close(files: list[StatsFile]) -> None:
    for file in files:
        file.close()


def _stats(file: StatsFile, patterns: list[str] | None) -> dict[str, Any]:
    """Values of the statistics that were asked for, as JSON has them."""
    chosen = {name for pattern in patterns or ("*",) for name in file.schema.matches(pattern)}
    values = {name: value for name, value in file.snapshot().items() if name in chosen}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _pass_signals_on(stack: ExitStack) -> Callable[[subprocess.Popen[Any]], None]:
    """Catch signals until `stack` is closed, and pass them on to the VMM, once the function returned is told it.

    Ctrl-C is caught only: the terminal sends it to the VMM, too.
    """
    arrived: list[int] = []
    vmms: list[subprocess.Popen[Any]] = []

    def handle(number: int, _: object) -> None:
        for process in vmms:
            process.send_signal(number)
        if not vmms:
            arrived.append(number)

    def pass_on_to(process: subprocess.Popen[Any]) -> None:
        vmms.append(process)
        for number in arrived:
            process.send_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals() - _NOT_PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup: the VMM is to ignore it, too
                handler = (lambda *_: None) if number == signal.SIGINT else handle
                stack.callback(signal.signal, number, signal.signal(number, handler))
    return pass_on_to


def _watched(process: subprocess.Popen[Any], files: list[StatsFile]) -> Iterator[StatsFile]:
    """Wait for the VMM, and collect its files meanwhile: they can still be read when it is gone.

    The files of a VM that it has destroyed are yielded and then closed, because they keep its memory in the kernel.
    """
    pause, said = 0.0, ""
    vmm: Process | None = None
    while process.poll() is None:
        try:
            held = []
            vmm = vmm or hold_process(process.pid)
            for file in borrow(vmm, list_files(vmm), known=files):
                own = find_known(file, files)
                if own is None:
                    files.append(file)
                else:
                    file.close()
                held.append(own or file)
            # A process that holds none any more may be exiting, and its vCPUs may still run.
            for file in files if held else ():
                if file not in held and not file.closed:
                    yield file
                    file.close()
        except VmGoneError:
            pass
        except (KvmStatsError, OSError) as error:  # the VMM goes on, and the next look may succeed
            if said != (said := describe_error(error)):
                print(f"kvmstats: {said}", file=sys.stderr)
        pause = min(pause + 0.02, _LOOK)  # often at first, for a short run
        with suppress(TimeoutExpired):
            process.wait(pause)
    files.sort(key=by_vcpu)
