"""``kvmstats list``: which processes have VMs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from kvmstats_fast._text import describe_error, format_table, printable
from kvmstats_fast.cli._grammar import FILE_HELP, number
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.vmm.find import scan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from kvmstats_fast.vmm.find import VmProcess


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "List the processes that have VMs or vCPUs open, and whether their fds may be borrowed. With -p or FILE, a "
        "recording, Parquet data set or capture, list statistics: their type, unit and buckets."
    )
    parser.add_argument("-p", "--pid", action="append", type=number, metavar="PID", help="VMM (may be repeated)")
    parser.add_argument("-w", "--why", action="store_true", help="also say what would help where files are missing")
    parser.add_argument("-j", "--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("file", nargs="*", metavar="FILE", help=FILE_HELP)


def run(arguments: argparse.Namespace) -> int:
    """List them; exit status 0 also if there are none."""
    if arguments.pid or arguments.file:
        from kvmstats_fast.cli import _stat_list  # noqa: PLC0415 - numpy, which a list of VMs does without

        _stat_list.print_stats(arguments)
        return 0
    found, unseen = scan("/proc")
    if arguments.json:
        for process in found:
            held = None if process.held is None else [file._asdict() for file in process.held]
            print(json.dumps(asdict(process) | {"held": held}))
    elif found:
        _print_table(found)
        if arguments.why:
            _print_reasons(found)
    if not found:
        print("kvmstats: no process has a VM open", file=sys.stderr)
    if unseen:
        print(
            f"kvmstats: processes that do not show this user their files, and have no known VMM's name: {unseen}",
            file=sys.stderr,
        )
    return 0


def _print_table(found: list[VmProcess]) -> None:
    rows = [("PID", "VMM", "NAME", "VCPUS", "STATS FILES", "ATTACH")]
    rows += [
        (
            str(process.pid),
            _shown(process.vmm),
            _shown(process.name) or "-",
            _vcpus(process),
            _held(process),
            "yes" if process.attachable else f"no: {process.why_not}",
        )
        for process in found
    ]
    print(format_table(rows, "><<<<<"))


def _print_reasons(found: list[VmProcess]) -> None:
    """Say of each VM what is missing and what helps."""
    from kvmstats_fast.vmm.machine import attach  # noqa: PLC0415 - numpy, as above

    for process in found:
        try:
            with attach(process.pid) as machine:
                lacking = machine.explain()
        except (KvmStatsError, OSError) as error:
            lacking = describe_error(error)
        if lacking:
            print(f"\n{process.pid}: {lacking}")


def _shown(name: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(name).encode(encoding, "backslashreplace").decode(encoding)


def _vcpus(process: VmProcess) -> str:
    if process.vcpus is None:
        return "?"
    return f"{len(process.vcpus)}" + (f" in {process.vms} VMs" if process.vms is not None and process.vms > 1 else "")


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
