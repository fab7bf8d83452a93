"""``kvmstats list``: which processes have VMs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import describe_error, printable
from kvmstats_fast.cli._grammar import FILE_HELP, add_output, add_vms
from kvmstats_fast.cli._output import ObjectWriter, open_output
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.file_info import Known, label_vms
from kvmstats_fast.vmm.find import say_holds_none, scan
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.ways import split_advice

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from kvmstats_fast.vmm.find import VmProcess

_FIELDS = ("vm", "pid", "vmm", "name", "uid", "vms", "vcpus", "attachable", "why_not", "start_time")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "List the VMMs of this host, how many VMs and vCPUs they have, and whether they can be attached to. With -p, "
        "-g or FILE (a recording, Parquet data set or capture), list statistics instead: their types, units and "
        "buckets."
    )
    add_vms(parser)
    parser.add_argument("-w", "--why", action="store_true", help="also say how to get the files that are missing")
    add_output(parser)
    parser.add_argument("file", nargs="*", metavar="FILE", help=FILE_HELP)


def run(arguments: argparse.Namespace) -> int:
    """List them; exit status 0 also if there are none."""
    with open_output(arguments) as output:
        if arguments.pid or arguments.guest or arguments.file:
            from kvmstats_fast.cli import _stat_list  # noqa: PLC0415 - numpy, which a list of VMs does without

            _stat_list.print_stats(arguments, output)
            return 0
        found, unseen = scan("/proc")
        writer = ObjectWriter(arguments, output, _FIELDS)
        if not writer.text:
            writer.write_objects(_objects(found))
        elif found:
            screen = Screen.of(output, arguments.color)
            _print_table(found, screen)
            if arguments.why:
                _print_reasons(found, screen)
    if not found:
        print("kvmstats: no process has a VM open", file=sys.stderr)
    if unseen:
        print(
            f"kvmstats: processes whose files this user may not see, and whose name is not a known VMM's: {unseen}",
            file=sys.stderr,
        )
    return 0


def _objects(found: list[VmProcess]) -> Iterator[dict[str, Any]]:
    """Yield what `find_vms` knows of each, and the label that the other verbs call its VM by.

    `attachable` is whether `attach` would have anything: a VMM that holds no files is not.
    """
    labels = label_vms([Known(f"kvm-{one.pid}", "vm", None, one.pid, one.name, "") for one in found])
    for process, vm in zip(found, labels, strict=True):
        held = None if process.held is None else [file._asdict() for file in process.held]
        nothing = {}
        if _has_nothing(process):
            nothing = {"attachable": False, "why_not": say_holds_none(Process(process.pid), process.vmm)}
        yield {"vm": vm} | asdict(process) | {"held": held} | nothing


def _print_table(found: list[VmProcess], screen: Screen) -> None:
    rows = [("PID", "VMM", "NAME", "VCPUS", "STATS FILES", "ATTACH")]
    rows += [
        (
            str(process.pid),
            printable(process.vmm),
            printable(process.name) or "-",
            _vcpus(process),
            _held(process),
            _attach(process),
        )
        for process in found
    ]
    screen.print(*screen.table(rows, "><<<<<", (4, 1)))


def _print_reasons(found: list[VmProcess], screen: Screen) -> None:
    """Say of each VM what is missing, and what helps: once for all whom the same does."""
    from kvmstats_fast.vmm.machine import attach  # noqa: PLC0415 - numpy, as above

    reasons: dict[str, list[str]] = {}
    for process in found:
        try:
            with attach(process.pid) as machine:
                lacking = machine.explain()
        except (KvmStatsError, OSError) as error:
            lacking = describe_error(error)
        if lacking:
            reason, helps = split_advice(lacking)
            reasons.setdefault(helps, []).append(f"{process.pid}: {reason}")
    for helps, lines in reasons.items():
        screen.print(
            "", *(line for text in lines for line in screen.wrap(text)), *(screen.wrap(helps) if helps else [])
        )


def _vcpus(process: VmProcess) -> str:
    if process.vcpus is None:
        return "?"
    return f"{len(process.vcpus)}" + (f" in {process.vms} VMs" if process.vms is not None and process.vms > 1 else "")


def _attach(process: VmProcess) -> str:
    """How to attach, or why not."""
    if not process.attachable:
        return f"no: {process.why_not}"
    return "no files: see -w" if _has_nothing(process) else "yes"


def _has_nothing(process: VmProcess) -> bool:
    """Return whether it may be attached to, but holds nothing that could be had."""
    return process.attachable and process.held == ()


def _held(process: VmProcess) -> str:
    if process.held is None:
        return "?"
    kinds = ["vm"] if any(file.kind == "vm" for file in process.held) else []
    vcpus = _ranges({file.vcpu_id for file in process.held if file.vcpu_id is not None})
    return ", ".join(kinds + ([f"vcpu {vcpus}"] if vcpus else [])) or "none"


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,5``."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
