"""The VM that a suite names: by its name or pid, or by the socket that hands over its files."""

from __future__ import annotations

import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import kvmstats_fast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmstats_fast.stats_file import StatsFile

#: How to name a VM where no option can be given.
VM_VARIABLE, SOCKET_VARIABLE = "KVMSTATS_VM", "KVMSTATS_SOCKET"


@contextmanager
def open_target(vm: str, path: str) -> Iterator[Iterable[StatsFile]]:
    """Open the files of a VM by its guest's name or its pid; or those that a Unix socket at `path` hands over.

    Raises
    ------
    KvmStatsError, OSError
        If they cannot be had; the message says why, and what to do.
    """
    with ExitStack() as opened:
        files: Iterable[StatsFile]
        if path:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(path)
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror}: no stats files from the socket", path) from None
                files = kvmstats_fast.receive_files(connection)
            for file in files:
                opened.callback(file.close)
        else:
            files = opened.enter_context(kvmstats_fast.attach(int(vm) if vm.isdecimal() else vm))
        yield files
