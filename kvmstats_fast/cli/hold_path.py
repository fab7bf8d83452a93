"""``kvmstats hold-path``: where the hold library is, for the LD_PRELOAD of a VMM that something else starts."""

from __future__ import annotations

import stat
import sys
from typing import TYPE_CHECKING

from kvmstats_fast.vmm.hold import hold_library

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe this verb."""
    parser.description = (
        "Print the path of the hold library. Named in LD_PRELOAD (Environment=LD_PRELOAD=... in a systemd unit), it "
        "makes a VMM open the stats files of its VMs and vCPUs and keep them open, so that they can be borrowed. "
        "Warn if other users, such as libvirt's, cannot read it."
    )


def run(_: argparse.Namespace) -> int:
    """Print it."""
    path = hold_library()
    print(path)
    if closed := _closed_to_others(path):
        mode = stat.S_IMODE(closed.stat().st_mode)
        print(
            f"kvmstats: other users cannot read the library: {closed} has mode {mode:o}. For a VMM of another user "
            f"install a copy: install -D -m 755 {path} /usr/lib/kvmstats/{path.name}",
            file=sys.stderr,
        )
    return 0


def _closed_to_others(path: Path) -> Path | None:
    """Return what keeps other users from reading a file: the file itself or a folder above it."""
    needed = [(path, stat.S_IROTH), *((folder, stat.S_IXOTH) for folder in path.parents)]
    return next((one for one, bit in needed if not one.stat().st_mode & bit), None)
