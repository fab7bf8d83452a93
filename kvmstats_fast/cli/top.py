"""``kvmstats top``: what VMs do, on a screen, while they come and go."""

from __future__ import annotations

import socket
import sys
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmstats_fast.cli._grammar import UsageError, add_targets, duration, interval, named_vms, number, usage_errors
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats import need

if TYPE_CHECKING:
    import argparse

    from kvmstats_fast.top.feed import Feed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Show the VMs of this host live, as they come and go: exits by kind, where the time of their vCPUs goes, and "
        "which of them wait for a processor. With FILE, replay a recording. Press ? for the keys. This needs the "
        "extra [tui]: pip install 'kvmstats-fast[tui]'."
    )
    add_targets(parser)
    parser.add_argument(
        "-e",
        "--event",
        action="append",
        metavar="EVENT",
        help="statistic to show as a column, or a glob (may be repeated)",
    )
    parser.add_argument(
        "-I",
        "--interval",
        type=interval,
        metavar="TIME",
        help="time between sweeps (default: 1s); with FILE, of each step",
    )
    parser.add_argument("-d", "--duration", type=duration, metavar="TIME", help="exit after this time (10s, 5m)")
    parser.add_argument(
        "-n",
        "--count",
        type=number,
        metavar="N",
        help="exit after N frames, of which at most four a second are drawn",
    )
    parser.add_argument("--per-vcpu", action="store_true", help="start with a row for each vCPU")
    parser.add_argument(
        "--speed", type=_speed, metavar="FACTOR", help="replay FILE this many times as fast (default: 1)"
    )


def _speed(text: str) -> float:
    from argparse import ArgumentTypeError  # noqa: PLC0415 - for its error alone

    try:
        factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1e6:
        raise ArgumentTypeError(f"{text!r} is not a factor above 0, such as 10 or 0.5")
    return factor


def run(arguments: argparse.Namespace) -> int:
    """Show it until the user ends it."""
    from kvmstats_fast.cli._targets import check_targets  # noqa: PLC0415 - imports numpy

    check_targets(arguments, guests_of_files=True)
    if arguments.speed and not arguments.file:
        raise UsageError("--speed is for replaying a recording: it needs FILE")
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise KvmStatsError(
            "top needs a terminal, and stdin, stdout or stderr is not one; `kvmstats stat -I 1s` prints the same"
        )
    need("textual", "tui")
    return _show(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from kvmstats_fast.top.app import TopApp  # noqa: PLC0415 - imports textual
    from kvmstats_fast.top.model import Model  # noqa: PLC0415

    model = Model()
    model.by = "vcpu" if arguments.per_vcpu else "vm"
    model.events = tuple(arguments.event or ())
    with ExitStack() as opened:
        with usage_errors():
            feed = _open(arguments, opened)
        app = TopApp(
            feed,
            model,
            "" if arguments.file else socket.gethostname(),
            count=arguments.count,
            seconds=arguments.duration,
        )
        opened.callback(feed.stop)
        before, warnings.showwarning = warnings.showwarning, app.note
        opened.callback(setattr, warnings, "showwarning", before)
        feed.start(app.take, app.wake)
        app.run()
    if feed.error is not None:
        raise feed.error
    return app.return_code or 0


def _open(arguments: argparse.Namespace, opened: ExitStack) -> Feed:
    """Return where samples come from."""
    from kvmstats_fast.cli._files import check_no_capture, check_selection, open_runs  # noqa: PLC0415
    from kvmstats_fast.cli._targets import open_targets  # noqa: PLC0415
    from kvmstats_fast.selection import Selection  # noqa: PLC0415
    from kvmstats_fast.top.feed import FilesFeed, HostFeed, Replay  # noqa: PLC0415

    if arguments.file:
        runs = open_runs(arguments.file)
        check_no_capture(runs, "top")
        chosen = Selection.of(tuple(arguments.event or ()), arguments.guest, None, None, None)
        check_selection(runs, chosen, "these files")
        return Replay(arguments.file, arguments.interval, arguments.speed or 1.0, arguments.guest)
    if arguments.socket:
        return FilesFeed(open_targets(arguments, opened).files, arguments.interval or 1.0)
    return HostFeed(named_vms(arguments), arguments.interval or 1.0, inject=arguments.inject)
