"""Whose statistics a verb shows: those of VMs of this host, or files that are handed over."""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast._text import describe_error
from kvmstats_fast.cli._grammar import UsageError, usage_errors
from kvmstats_fast.errors import AttachError, KvmStatsError
from kvmstats_fast.vmm.find import find_guests, find_vms
from kvmstats_fast.vmm.handover import receive_files
from kvmstats_fast.vmm.machine import attach
from kvmstats_fast.vmm.ways import leave_out_advice

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from contextlib import ExitStack

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.machine import VirtualMachine


class Targets(NamedTuple):
    """Open stats files, and the programs of the VMMs they are of by pid."""

    files: list[StatsFile]
    vmms: dict[int, str]


def are_named(arguments: argparse.Namespace) -> bool:
    """Return whether the command line says whose statistics are meant."""
    return bool(arguments.pid or arguments.guest or arguments.socket or arguments.file)


def check_targets(arguments: argparse.Namespace, *, guests_of_files: bool = False) -> None:
    """Raise UsageError if live VMs and files are named together; a guest may be one of a file's, if that is so said."""
    live = [
        option
        for option, given in (
            ("-p", arguments.pid),
            ("-g", arguments.guest and not (guests_of_files and arguments.file)),
            ("--socket", arguments.socket),
            ("--inject", arguments.inject),
        )
        if given
    ]
    if live and arguments.file:
        raise UsageError(f"{live[0]} names VMs that run, and {arguments.file[0]} is a file: give one or the other")
    if arguments.socket and len(live) > 1:
        raise UsageError(f"--socket takes the files that are handed over; {live[0]} does not go with it")


def open_targets(arguments: argparse.Namespace, opened: ExitStack) -> Targets:
    """Open the stats files that are asked for; `opened` closes them.

    A VM that may not be attached to is named on stderr, with the reason, and left out.

    Raises
    ------
    KvmStatsError, OSError
        If there is none, or none may be attached to: then the error of the last one.
    """
    if arguments.socket:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(arguments.socket)
            except OSError as failed:
                raise OSError(failed.errno, failed.strerror or str(failed), arguments.socket) from None
            files = receive_files(sock)
        for file in files:
            opened.callback(file.close)
        return Targets(files, {})
    machines: list[VirtualMachine] = []
    refused: dict[int, Exception] = {}
    for pid in _choose(arguments):
        with _kept(refused, pid):
            machines.append(opened.enter_context(attach(pid, inject=arguments.inject)))
    last = refused.popitem()[1] if refused and not machines else None
    for pid, error in refused.items():
        print(f"kvmstats: process {pid} is left out: {_shorten(error, pid, arguments)}", file=sys.stderr)
    if last is not None:
        raise last
    for machine in machines:
        if (lacking := machine.explain()) and machine.pid in (arguments.pid or []):
            print(f"kvmstats: {lacking}", file=sys.stderr)
    files = [file for machine in machines for file in machine.files]
    return Targets(files, {machine.pid: machine.vmm for machine in machines})


def _shorten(error: Exception, pid: int, arguments: argparse.Namespace) -> str:
    """Return the reason; what helps is only for whom it was asked for by its pid."""
    text = describe_error(error)
    return text if pid in (arguments.pid or []) else f"{leave_out_advice(text)}. (-p {pid} says what helps)"


@contextmanager
def _kept(errors: dict[int, Exception], pid: int) -> Iterator[None]:
    try:
        yield
    except (KvmStatsError, OSError) as error:
        errors[pid] = error


def _choose(arguments: argparse.Namespace) -> list[int]:
    """Return the pids that are asked for; all VMs if nothing is."""
    if arguments.pid or arguments.guest:
        return named_pids(arguments)
    pids = [process.pid for process in find_vms()]
    if not pids:
        raise AttachError(errno.ENOENT, "no process has a VM open")
    return pids


def named_pids(arguments: argparse.Namespace) -> list[int]:
    """Return the pids of the VMMs that are named, by pid or by the name of the guest."""
    pids = list(arguments.pid or [])
    for guest in arguments.guest or []:
        with usage_errors():
            pids += [process.pid for process in find_guests(guest)]
    return list(dict.fromkeys(pids))
