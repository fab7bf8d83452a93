"""The arguments that verbs share, and their values: times with units, ranges of vCPUs, and where output goes."""

from __future__ import annotations

import argparse
import re

from kvmstats_fast.cli._screen import add_color
from kvmstats_fast.errors import KvmStatsError, Retold

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(rf"([0-9]+\.?[0-9]*|\.[0-9]+)({'|'.join(_SECONDS)})?")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_MOST_VCPUS = 1 << 16
FILE_HELP = "a recording, Parquet data set or capture"


class UsageError(KvmStatsError):
    """Arguments that do not go together."""

    status = 2  # what the process exits with


def usage_errors() -> Retold:
    """Have names that are not there, and values that do not fit, be errors of the command line."""
    return Retold((KeyError, ValueError), lambda error: UsageError(str(error.args[0] if error.args else error)))


def interval(text: str) -> float:
    """Return a time in seconds: ``100us``, ``1ms``, ``1s``; a bare number is milliseconds."""
    return _parse_time(text, "ms", "milliseconds")


def duration(text: str) -> float:
    """Return a time in seconds: ``500ms``, ``10s``, ``2m``, ``1h``; a bare number is seconds."""
    return _parse_time(text, "s", "seconds")


def _parse_time(text: str, unit: str, bare: str) -> float:
    found = _TIME.fullmatch(text)
    seconds = float(found[1]) * _SECONDS[found[2] or unit] if found else 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: a number above 0 with ns, us, ms, s, m or h; a bare number is {bare}"
        )
    return seconds


def size(text: str) -> int:
    """Return bytes: ``500k``, ``100M``, ``2G``; a bare number is bytes."""
    found = re.fullmatch(r"([0-9]{1,12})([kMG])?B?", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0, such as 500k, 100M or 2G")
    return int(found[1]) * {"k": 10**3, "M": 10**6, "G": 10**9}.get(found[2], 1)


def number(text: str) -> int:
    """Return a whole number above 0."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def vcpu_ranges(text: str) -> tuple[int, ...]:
    """Return the numbers of ``0-3,7``."""
    found: list[int] = []
    for part in text.split(","):
        ends = _RANGE.fullmatch(part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends and len(part) < 15 else (1, 0)
        if not first <= last < _MOST_VCPUS:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of vCPUs such as 0-3,7")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def add_targets(parser: argparse.ArgumentParser, *, recorded: bool = True, socket: bool = True) -> None:
    """Add what names VMs; and a socket, and recordings, where the verb takes them."""
    group = parser.add_argument_group("VMs to read (default: every VM of this host that can be attached to)")
    add_vms(group)
    group.add_argument("--inject", action="store_true", help="make a VMM open the stats files that it does not hold")
    if socket:
        group.add_argument("--socket", metavar="PATH", help="receive stats files from a VMM through a Unix socket")
    if recorded:
        group.add_argument("file", nargs="*", metavar="FILE", help=f"{FILE_HELP}, instead of a VM")


def add_vms(parser: argparse._ActionsContainer) -> None:
    """Add what names VMs that run."""
    parser.add_argument(
        "-p", "--pid", action="append", type=number, metavar="PID", help="pid of a VMM (may be repeated)"
    )
    parser.add_argument(
        "-g", "--guest", action="append", metavar="GUEST", help="name of a guest, or a glob (may be repeated)"
    )


def named_vms(arguments: argparse.Namespace) -> list[int | str] | None:
    """Return the pids, guests' names and globs that `follow` takes; None for every VM."""
    return [*(arguments.pid or []), *(arguments.guest or [])] or None


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add what chooses statistics and vCPUs."""
    add_event(parser)
    parser.add_argument("--vcpu", type=vcpu_ranges, metavar="LIST", help="only these vCPUs, such as 0-3,7")


def add_event(parser: argparse.ArgumentParser) -> None:
    """Add what chooses statistics."""
    parser.add_argument(
        "-e", "--event", action="append", metavar="EVENT", help="statistic, or a glob (may be repeated)"
    )


def add_guest(parser: argparse.ArgumentParser) -> None:
    """Add what chooses VMs of recordings."""
    parser.add_argument(
        "-g", "--guest", action="append", metavar="GUEST", help="name of a VM, or a glob (may be repeated)"
    )


def add_sched(parser: argparse.ArgumentParser) -> None:
    """Add what asks for the statistics of vCPUs' threads."""
    parser.add_argument(
        "--sched",
        action="store_true",
        help="also read what the host's scheduler counts for vCPU threads: sched_*, which -e selects, too",
    )


def check_sched(arguments: argparse.Namespace) -> None:
    """Raise UsageError if statistics of vCPUs' threads are named, and not asked for."""
    for event in arguments.event or ():
        if event.startswith("sched_") and not arguments.sched:
            raise UsageError(f"{event} is what the host's scheduler counts: it needs --sched")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the form of the output and its place."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-j", "--json", action="store_true", help="print JSON, one object per line")
    form.add_argument(
        "-x", "--csv", nargs="?", const=",", metavar="SEP", help="print CSV, separated by SEP (default: a comma)"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="write to a new file (default: -, which is stdout)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_color(parser)
