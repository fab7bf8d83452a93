"""The command line: one module a verb. stdout is data, stderr is messages."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

import kvmstats_fast
from kvmstats_fast.cli import demo, hold_path, run
from kvmstats_fast.cli import list as list_
from kvmstats_fast.errors import KvmStatsError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_VERBS = (demo, list_, run, hold_path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvmstats", description="KVM's binary statistics, per VM and per vCPU.")
    parser.add_argument("--version", action="version", version=f"kvmstats {kvmstats_fast.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0; 1 for an error, which stderr names; 130 after Ctrl-C. (argparse exits with 2 for bad arguments.)
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.verb(arguments)
        if sys.stdout is not None:  # a shell's >&-
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough; keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (KvmStatsError, OSError) as error:
        print(f"kvmstats: {error}", file=sys.stderr)
        return 1
    return status
