"""``kvmstats demo``: run a tiny real VM, show which of its statistics moved, and check them."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.cli._stats_table import print_stats
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.testing import SyntheticStats, TinyGuest, counts_right, exit_counter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.stats_file import StatsFile


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Run a tiny VM on /dev/kvm, whose vCPU i makes (i + 1) * EXITS exits, and show the statistics that changed. "
        "If no VM can be made, use synthetic stats files, and say so."
    )
    parser.add_argument(
        "-n", "--exits", type=_number(10**9), default=1000, help="exits of vCPU 0 (default: %(default)s)"
    )
    parser.add_argument("--vcpus", type=_number(4096), default=2, help="number of vCPUs (default: %(default)s)")
    parser.add_argument("--synthetic", action="store_true", help="use synthetic stats files even if a VM can be made")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per stats file")


def _number(largest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {largest}")
        return int(text)

    return number


class _Subject(NamedTuple):
    """A VM or its stand-in."""

    source: str  # "kvm" or "synthetic"
    files: list[StatsFile]  # the VM's first
    make_exits: Callable[[int, int], None]  # how many, of which vCPU
    counter: str  # the statistic that counts them
    is_right: Callable[[Mapping[str, int], int], bool]  # whether the changes of a vCPU agree with so many exits


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration; the exit status is 1 if a counter did not move by the exits made."""
    exits = [(i + 1) * arguments.exits for i in range(arguments.vcpus)]
    with ExitStack() as resources:
        subject = _start(resources, arguments)
        before = [file.read() for file in subject.files]
        for vcpu, count in enumerate(exits):
            subject.make_exits(count, vcpu)
        # Unsigned arithmetic: an instant statistic that fell gives a huge number, which _changes turns back.
        changes = [_changes(file, file.read() - first) for file, first in zip(subject.files, before, strict=True)]
        right = [subject.is_right(changed, count) for changed, count in zip(changes[1:], exits, strict=True)]
        if arguments.json:
            for file, changed in zip(subject.files, changes, strict=True):
                who = {"source": subject.source, "id": file.id, "kind": file.kind, "vcpu": file.vcpu_id}
                print(json.dumps(who | {"delta": changed}))
        else:
            print_stats(subject.files, changes)
            print()
            screen = Screen.of(sys.stdout)
            for vcpu, (count, good) in enumerate(zip(exits, right, strict=True)):
                counted = changes[1 + vcpu].get(subject.counter, 0)
                verdict = "right" if good else "WRONG"
                if good and counted != count:
                    verdict += ", the host interrupted an exit"
                text = f"vcpu {vcpu} left the guest {count} times, {subject.counter} rose by {counted}: {verdict}"
                screen.print(*screen.wrap(text))
    return 0 if all(right) else 1


def _start(resources: ExitStack, arguments: argparse.Namespace) -> _Subject:
    """Return a VM, or where none can be made or none is wanted, synthetic stats files."""
    if not arguments.synthetic:
        try:
            counter = exit_counter()
            guest = resources.enter_context(TinyGuest(arguments.vcpus))
            files = [resources.enter_context(file) for file in guest.open_stats()]
        except (KvmStatsError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"kvmstats: {reason}; made-up stats files instead", file=sys.stderr)
        else:
            _print_title(arguments, f"A real VM on /dev/kvm with {arguments.vcpus} vCPUs, read through its stats files")
            return _Subject("kvm", files, guest.run, counter, counts_right)
    kinds = [("vm", 0), *(("vcpu", i) for i in range(arguments.vcpus))]
    synthetic = [resources.enter_context(SyntheticStats("x86", kind, vcpu_id=i)) for kind, i in kinds]
    files = [resources.enter_context(one.open()) for one in synthetic]
    _print_title(arguments, f"SYNTHETIC: no VM ran; made-up stats files of one with {arguments.vcpus} vCPUs")

    def add_exits(count: int, vcpu: int) -> None:
        synthetic[1 + vcpu].add("exits", count)

    return _Subject("synthetic", files, add_exits, "exits", lambda changed, count: changed.get("exits") == count)


def _print_title(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        screen = Screen.of(sys.stdout)
        screen.print(*screen.wrap(f"{text}:"), "")


def _changes(file: StatsFile, delta: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """Return the signed change of every statistic that changed; of a histogram, the list of its buckets' changes."""
    signed = delta.astype("int64").tolist()
    result: dict[str, Any] = {}
    for stat in file.schema.stats:
        words = signed[stat.offset // 8 :][: stat.size]
        if any(words):
            result[stat.name] = words if stat.shape else words[0]
    return result
