"""``kvmstats capture``: the whole stats files of a VM, for a bug report."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast import __version__
from kvmstats_fast.cli._captures import ABOUT, TIME
from kvmstats_fast.cli._grammar import add_targets
from kvmstats_fast.cli._targets import check_targets, open_targets
from kvmstats_fast.formats._put import PRIVATE, open_new, put_directory

if TYPE_CHECKING:
    import argparse

    from kvmstats_fast.stats_file import StatsFile

_OURS = re.compile(r"[0-9]+-(vm|vcpu[0-9]+)\.bin|about\.json")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Save the raw stats files of VMs, NUMBER-vm.bin and NUMBER-vcpuN.bin, in a new directory, with about.json, "
        "which names the host, kernel, VMM and guest. `stat`, `report`, `check` and `list` read them. They hold "
        "counters only: nothing of the guest's memory."
    )
    add_targets(parser, recorded=False)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--force", action="store_true", help="replace a directory that an earlier capture made")


def run(arguments: argparse.Namespace) -> int:
    """Write them, all or none."""
    arguments.file = []
    check_targets(arguments)
    with ExitStack() as opened:
        targets = open_targets(arguments, opened)
        path = Path(arguments.output)
        with put_directory(path, overwrite=arguments.force, mode=PRIVATE, ours=_OURS.fullmatch) as folder:
            about = []
            for number, file in enumerate(targets.files):
                name = f"{number:03}-{'vm' if file.vcpu_id is None else f'vcpu{file.vcpu_id}'}.bin"
                _write(folder / name, read_whole(file))
                pid = file.handle.owner.pid
                vmm = targets.vmms.get(pid) if pid is not None else None
                about.append(
                    {"file": name, "id": file.id, "kind": file.kind, "vcpu": file.vcpu_id}
                    | {"pid": pid, "vmm": vmm, "guest": file.handle.owner.name}
                )
            system = os.uname()
            facts = {
                "host": system.nodename,
                "kernel": system.release,
                "machine": system.machine,
                "kvmstats_fast": __version__,
            }
            facts["time"] = time.strftime(TIME, time.gmtime())
            _write(folder / ABOUT, (json.dumps(facts | {"files": about}, indent=1) + "\n").encode())
    print(path)
    return 0


def read_whole(file: StatsFile) -> bytes:
    """Return all bytes of a stats file, from its header to the end of its data."""
    fd, parts, at = file.fileno(), [], 0
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _write(path: Path, data: bytes) -> None:
    with open(open_new(path, PRIVATE), "wb") as file:  # noqa: PTH123 - of an fd
        file.write(data)
