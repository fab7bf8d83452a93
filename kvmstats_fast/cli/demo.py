"""``kvmstats demo``: run a tiny real VM, and show which of its statistics moved, and that they are right."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TextIO

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.testing import SyntheticStats, TinyGuest, counts_right, exit_counter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt

    from kvmstats_fast.stats_file import StatsFile

    Run = Callable[[int, int], None]
    IsRight = Callable[[Mapping[str, int], int], bool]


def add_parser(verbs: Any) -> None:
    """Add this verb to argparse's subparsers."""
    parser = verbs.add_parser(
        "demo",
        help="run a tiny real VM and show the statistics that moved",
        description="Run a tiny VM on /dev/kvm, vCPU i making (i + 1) * EXITS exits, and show the statistics that "
        "moved. Where no VM can be made, made-up stats files take its place, and the output says so.",
    )
    parser.add_argument(
        "-n", "--exits", type=_number(10**9), default=1000, help="exits of vCPU 0 (default: %(default)s)"
    )
    parser.add_argument("--vcpus", type=_number(4096), default=2, help="number of vCPUs (default: %(default)s)")
    parser.add_argument("--synthetic", action="store_true", help="use made-up stats files even if a VM can be made")
    parser.add_argument("--json", action="store_true", help="print one JSON object per stats file")
    parser.set_defaults(verb=run)


def _number(largest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {largest}")
        return int(text)

    return number


def run(arguments: argparse.Namespace) -> int:
    """Do the demo; exit status 1 if a counter is not what the exits made it."""
    wanted = [(i + 1) * arguments.exits for i in range(arguments.vcpus)]
    with ExitStack() as resources:
        files, run_vcpu, counter, is_right = _start(resources, arguments)
        before = [file.read() for file in files]
        for vcpu, exits in enumerate(wanted):
            run_vcpu(exits, vcpu)
        # Unsigned arithmetic: a gauge that fell gives a huge number, which _moved turns back.
        moved = [_moved(file, file.read() - first) for file, first in zip(files, before, strict=True)]
        right = [is_right(delta, exits) for delta, exits in zip(moved[1:], wanted, strict=True)]
        if arguments.json:
            source = "kvm" if is_right is counts_right else "synthetic"
            for file, delta in zip(files, moved, strict=True):
                who = {"source": source, "id": file.id, "kind": file.kind, "vcpu": file.vcpu_id}
                print(json.dumps(who | {"delta": delta}))
        else:
            print_table(files, moved)
            print()
            for vcpu, (exits, good) in enumerate(zip(wanted, right, strict=True)):
                count = moved[1 + vcpu].get(counter, 0)
                verdict = "right" if good else "WRONG"
                if good and count != exits:
                    verdict += ", the host interrupted an exit"
                print(f"vcpu {vcpu} left the guest {exits} times, {counter} moved by {count}: {verdict}")
    return 0 if all(right) else 1


def _start(resources: ExitStack, arguments: argparse.Namespace) -> tuple[list[StatsFile], Run, str, IsRight]:
    """Make a VM or its stand-in: stats files (the VM's first), what makes exits, their counter, and its check."""
    if not arguments.synthetic:
        try:
            counter = exit_counter()
            guest = resources.enter_context(TinyGuest(arguments.vcpus))
            files = [resources.enter_context(file) for file in guest.open_stats()]
        except (KvmStatsError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"kvmstats: {reason}; made-up stats files instead", file=sys.stderr)
        else:
            _say(arguments, f"A real VM on /dev/kvm with {arguments.vcpus} vCPUs, read through its stats files:")
            return files, guest.run, counter, counts_right
    kinds = [("vm", 0), *(("vcpu", i) for i in range(arguments.vcpus))]
    made = [resources.enter_context(SyntheticStats("x86", kind, vcpu_id=i)) for kind, i in kinds]
    files = [resources.enter_context(one.open()) for one in made]
    _say(arguments, f"SYNTHETIC: no VM ran; made-up stats files of one with {arguments.vcpus} vCPUs:")

    def add_exits(exits: int, vcpu: int) -> None:
        made[1 + vcpu].add("exits", exits)

    return files, add_exits, "exits", lambda delta, exits: delta.get("exits") == exits


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, end="\n\n")


def _moved(file: StatsFile, delta: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """Signed change of every statistic that changed; a histogram's as the list of its buckets' changes."""
    signed = delta.astype("int64").tolist()
    result: dict[str, Any] = {}
    for stat in file.schema.stats:
        words = signed[stat.offset // 8 :][: stat.size]
        if any(words):
            result[stat.name] = words if stat.shape else words[0]
    return result


def print_table(files: list[StatsFile], moved: list[dict[str, Any]], output: TextIO | None = None) -> None:
    """Print a column for each file; what moved in none is not shown."""
    titles = ["vm" if file.vcpu_id is None else f"vcpu {file.vcpu_id}" for file in files]
    names = dict.fromkeys(name for delta in moved for name in delta)
    pairs = list(zip(files, moved, strict=True))
    rows = [["", *titles], ["stats in the file", *(str(len(file.schema)) for file in files)]]
    rows.extend([name, *(_cell(file, delta, name) for file, delta in pairs)] for name in names)
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, rest, strict=True))
        print("  ".join([name.ljust(first), *padded]).rstrip(), file=output)


def _cell(file: StatsFile, delta: dict[str, Any], name: str) -> str:
    if name not in file.schema:
        return ""
    change = delta.get(name, 0)
    return f"{sum(change):+d} in {len(change)} buckets" if isinstance(change, list) else f"{change:+d}"
