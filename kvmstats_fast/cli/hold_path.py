"""``kvmstats hold-path``: where the hold library is, for the LD_PRELOAD of a VMM that something else starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmstats_fast.vmm.hold import hold_library

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe this verb."""
    parser.description = (
        "Print the path of a shared library that, named in LD_PRELOAD, makes a VMM open the stats files of its VM and "
        "vCPUs and keep them, so that they can be borrowed: Environment=LD_PRELOAD=... in a systemd unit."
    )


def run(_: argparse.Namespace) -> int:
    """Print it."""
    print(hold_library())
    return 0
