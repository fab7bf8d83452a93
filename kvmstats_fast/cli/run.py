"""``kvmstats run``: start a VMM so that its statistics can be had, and say at its end what they came to."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from kvmstats_fast.cli.demo import print_table
from kvmstats_fast.errors import KvmStatsError, VmGoneError
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.borrow import borrow, by_vcpu, known_as

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from kvmstats_fast.stats_file import StatsFile

_LOOK = 0.2  # s between looks for VMs and vCPUs that were made since
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def add_parser(verbs: Any) -> None:
    """Add this verb to argparse's subparsers."""
    parser = verbs.add_parser(
        "run",
        help="start a VMM and show its statistics at its end",
        usage="kvmstats run [-h] [-e EVENT] [--json FILE] [--] COMMAND ...",
        description="Start COMMAND, any dynamically linked VMM, under the hold library, which opens the stats files of "
        "its VMs and vCPUs; wait for it; and show what its statistics came to. No privilege is needed. The table goes "
        "to stderr, because stdout is the VMM's. The exit status is that of COMMAND.",
    )
    parser.add_argument(
        "-e",
        "--event",
        action="append",
        metavar="EVENT",
        help="statistic or glob to show (may be repeated; default: all)",
    )
    parser.add_argument("--json", metavar="FILE", help="write one JSON object per stats file to FILE, and no table")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the VMM and its arguments")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Run a VMM to its end."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        print("kvmstats run: name the VMM to start: kvmstats run -- qemu-system-x86_64 -accel kvm ...", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        output = stack.enter_context(_new(Path(arguments.json))) if arguments.json else None
        files: list[StatsFile] = []
        stack.callback(_close, files)
        pass_on_to = _pass_signals_on(stack)
        process = stack.enter_context(hold.start(command, close_fds=False))  # the shell's 3<>/dev/tap5
        pass_on_to(process)
        destroyed: dict[StatsFile, dict[str, Any]] = {}
        for file in _watched(process, files):
            destroyed[file] = _stats(file, arguments.event)
        stats = [destroyed[file] if file in destroyed else _stats(file, arguments.event) for file in files]
        status = process.returncode
        if output is not None:
            for file, values in zip(files, stats, strict=True):
                who = {"pid": process.pid, "id": file.id, "kind": file.kind, "vcpu": file.vcpu_id}
                print(json.dumps(who | {"stats": values}), file=output)
        elif files:
            print(f"\n{command[0]} (process {process.pid}):\n", file=sys.stderr)
            moved = [{name: value for name, value in one.items() if _is_any(value)} for one in stats]
            print_table(files, moved, sys.stderr)
        if not files:
            print(
                f"kvmstats: no stats file of {command[0]} (process {process.pid}) was seen: it made no VM, or one that "
                "was gone at once, or one in another process that it started; or the hold library could not keep the "
                "files (LD_PRELOAD cleared, another root directory, a low `ulimit -n`)",
                file=sys.stderr,
            )
    return status if status >= 0 else 128 - status


@contextmanager
def _new(path: Path) -> Iterator[TextIO]:
    """Open a new file, which is there afterwards only if all went well."""
    with path.open("x", encoding="utf-8") as file:
        try:
            yield file
        except BaseException:
            path.unlink()
            raise


def _close(files: list[StatsFile]) -> None:
    for file in files:
        file.close()


def _stats(file: StatsFile, patterns: list[str] | None) -> dict[str, Any]:
    """Values of the statistics that were asked for, as JSON has them."""
    chosen = {name for pattern in patterns or ("*",) for name in file.schema.matches(pattern)}
    values = {name: value for name, value in file.snapshot().items() if name in chosen}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _is_any(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _pass_signals_on(stack: ExitStack) -> Callable[[subprocess.Popen[Any]], None]:
    """End with the VMM, not before it: Ctrl-C reaches it from the terminal, the others through us, once it is named."""
    arrived: list[int] = []
    named: list[subprocess.Popen[Any]] = []

    def handle(number: int, _: object) -> None:
        for process in named:
            process.send_signal(number)
        if not named:
            arrived.append(number)

    def pass_on_to(process: subprocess.Popen[Any]) -> None:
        named.append(process)
        for number in arrived:
            process.send_signal(number)

    if threading.current_thread() is threading.main_thread():
        handlers = {**dict.fromkeys(_PASSED_ON, handle), signal.SIGINT: lambda *_: None}
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup: the VMM is to ignore it, too
                stack.callback(signal.signal, number, signal.signal(number, handler))
    return pass_on_to


def _watched(process: subprocess.Popen[Any], files: list[StatsFile]) -> Iterator[StatsFile]:
    """Wait for the VMM, and collect its files meanwhile: they can be read when it is gone.

    Those of a VM that it has destroyed are yielded, and closed behind that, because they keep its memory in the kernel.
    """
    pause, said = 0.0, ""
    while process.poll() is None:
        try:
            held = []
            for file in borrow(process.pid, known=files):
                own = known_as(file, files)
                if own is None:
                    files.append(file)
                else:
                    file.close()
                held.append(own or file)
            # A process that holds none any more may just be exiting, and its vCPUs not have stopped yet.
            for file in files if held else ():
                if file not in held and not file.closed:
                    yield file
                    file.close()
        except VmGoneError:
            pass
        except (KvmStatsError, OSError) as error:  # the VMM is not to suffer from it, and may be asked again
            if said != (said := str(error)):
                print(f"kvmstats: {error}", file=sys.stderr)
        pause = min(pause + 0.02, _LOOK)  # soon at first: it may be short
        with suppress(TimeoutExpired):
            process.wait(pause)
    files.sort(key=by_vcpu)
