"""``kvmstats export``: the VMs of a host for Prometheus, over HTTP or as a file for node_exporter."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._text import printable
from kvmstats_fast.cli._grammar import UsageError, add_selection, add_targets, interval, named_vms, number, usage_errors
from kvmstats_fast.vmm.ways import leave_out_advice

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from prometheus_client import CollectorRegistry

    from kvmstats_fast.export import Collector

#: Above the ports that exporters are registered with; 203 is KVM_CAP_BINARY_STATS_FD.
_LISTEN = "127.0.0.1:10203"
_INTERVAL = 15.0
_LOOK = 1.0  # s between looks at the host, at least


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Serve the statistics of every VM of this host, or of those that are named, to Prometheus. They are read "
        "when it scrapes, in base units, and summed over the vCPUs of each VM. VMs and vCPUs are picked up as they "
        "appear, and dropped as they go. Capabilities that are not needed for attaching to VMs are given up at once."
    )
    add_targets(parser, recorded=False, socket=False)
    add_selection(parser)
    parser.add_argument("--per-vcpu", action="store_true", help="export each vCPU, instead of a VM's sums")
    parser.add_argument(
        "--sched",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="export what the host's scheduler counts for vCPU threads: sched_* (default: yes)",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS:PORT",
        help=f"serve HTTP here; also [::1]:PORT, or PORT on 127.0.0.1 (may be repeated; default: {_LISTEN})",
    )
    parser.add_argument(
        "--textfile", metavar="PATH", help="write this .prom file for node_exporter, instead of serving HTTP"
    )
    parser.add_argument(
        "-I",
        "--interval",
        type=interval,
        metavar="TIME",
        help=f"time between writes of --textfile (default: {_INTERVAL:g}s)",
    )
    parser.add_argument(
        "-n", "--count", type=number, metavar="N", help="exit after N writes of --textfile, and keep it"
    )
    parser.add_argument(
        "--attach-once",
        action="store_true",
        help="attach to the VMs that run now, then give up all capabilities: later VMs are not picked up",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    for option, given in (("-I", arguments.interval), ("-n", arguments.count)):
        if given and not arguments.textfile:
            raise UsageError(f"{option} is for writing a file: it needs --textfile")
    if arguments.count and arguments.listen:
        raise UsageError("-n ends with the last write, and --listen goes on: give one or the other")

    from kvmstats_fast.cli._privileges import TO_ATTACH, before_giving_up_all, keep_only  # noqa: PLC0415

    with ExitStack() as opened:
        attacher = None
        if arguments.attach_once:
            attacher = opened.enter_context(before_giving_up_all())
        else:
            keep_only(TO_ATTACH)
        return _export(arguments, opened, attacher)  # which imports what starts threads


def _export(arguments: argparse.Namespace, attached: ExitStack, attacher: Executor | None) -> int:
    import kvmstats_fast.export  # noqa: F401, PLC0415 - without the extra it says what to install
    from kvmstats_fast.cli._command import ended_by_signals  # noqa: PLC0415
    from kvmstats_fast.cli._privileges import raise_file_limit  # noqa: PLC0415
    from kvmstats_fast.export.notify import notify  # noqa: PLC0415
    from kvmstats_fast.export.serve import listen, make_registry, parse_address, serving  # noqa: PLC0415
    from kvmstats_fast.export.textfile import check_textfile  # noqa: PLC0415

    path = Path(arguments.textfile) if arguments.textfile else None
    with usage_errors():
        addresses = [parse_address(one) for one in arguments.listen or ([] if path else [_LISTEN])]
        if path is not None:
            check_textfile(path)
    raise_file_limit()
    with ExitStack() as opened, ended_by_signals() as ended:
        servers = [opened.enter_context(listen(*address)) for address in addresses]
        collector = opened.enter_context(_make_collector(arguments, attacher))
        attached.close()  # so that thread ends
        registry = make_registry(collector)
        for server in servers:
            opened.enter_context(serving(server, registry, _say))
        shown = _Shown(collector, [server.url for server in servers] + ([str(path)] if path else []))
        opened.callback(notify, "STOPPING=1")
        if path is None:
            shown.begin()
            while not ended.wait(_LOOK):
                shown.update()
        else:
            _write(path, make_registry(collector, process=False), arguments, ended, shown)
    return 0


def _make_collector(arguments: argparse.Namespace, attacher: Executor | None) -> Collector:
    """Attach to the VMs that are there."""
    from kvmstats_fast.export.collector import Collector  # noqa: PLC0415
    from kvmstats_fast.vmm.watch import WATCHER  # noqa: PLC0415

    def make() -> Collector:
        return Collector(
            named_vms(arguments),
            arguments.event,
            per_vcpu=arguments.per_vcpu,
            vcpus=arguments.vcpu,
            sched=arguments.sched,
            inject=arguments.inject,
            rescan=None if arguments.attach_once else _LOOK,
        )

    with usage_errors():
        if attacher is None:
            return make()
        WATCHER.start()  # by this thread, which has no capabilities
        return attacher.submit(make).result()


def _write(
    path: Path, registry: CollectorRegistry, arguments: argparse.Namespace, ended: threading.Event, shown: _Shown
) -> None:
    """Write the file again and again. At the end of a service it is removed: it would be read for ever."""
    from kvmstats_fast.export.textfile import write_textfile  # noqa: PLC0415

    step, written = arguments.interval or _INTERVAL, 0
    due = time.monotonic()
    try:
        while written != arguments.count and not ended.wait(max(due - time.monotonic(), 0)):
            write_textfile(path, registry)
            if not written:
                shown.begin()
            written += 1
            due = max(due + step, time.monotonic())
            shown.update()
    finally:
        if written and not arguments.count:
            path.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(f"kvmstats: {text}", file=sys.stderr, flush=True)


class _Shown:
    """Says on stderr what is exported where, and who is left out."""

    def __init__(self, collector: Collector, places: Sequence[str]) -> None:
        self._collector, self._places = collector, places
        self._refused: dict[int, str] = {}

    def begin(self) -> None:
        """Say, to systemd, too, that it is there, and what there is now."""
        from kvmstats_fast.export.notify import notify  # noqa: PLC0415

        vms = len(self._collector.machines)
        _say(f"{vms} VM{'' if vms == 1 else 's'} at {', '.join(self._places)}")
        self.update()
        notify("READY=1")

    def update(self) -> None:
        """Say who is left out that was not before."""
        refused = self._collector.refused
        for pid, why in refused.items():
            if self._refused.get(pid) != why:
                short = printable(leave_out_advice(why), 400)
                _say(f"process {pid} is left out: {short}")
        self._refused = refused
