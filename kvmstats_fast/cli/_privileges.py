"""Privileges: give up those that attaching to VMs does not take, or all of them.

Capabilities belong to threads: each has those that the thread had which started it. So they are given up before any
thread starts, and numpy starts some when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

#: include/uapi/linux/capability.h. Who has these may take files of other users' VMMs, and see which they are.
TO_ATTACH = frozenset({2, 19})  # CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_MOST = 64


def keep_only(capabilities: frozenset[int]) -> None:
    """Give up all capabilities of this thread but these, for good; without any it does nothing but forbid new ones.

    Parameters
    ----------
    capabilities : frozenset of int
        Those that this thread has of them, it keeps.

    Raises
    ------
    OSError
        If the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for one in range(_MOST):  # takes CAP_SETPCAP: whoever has none, has none to lose in an exec, either
        if one not in capabilities:
            libc.prctl(_PR_CAPBSET_DROP, one, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those above 31
    _check(libc.capget(header, data))
    for half in (0, 1):
        mask = sum(1 << one % 32 for one in capabilities if one // 32 == half)
        permitted = data[3 * half + 1] & mask
        data[3 * half : 3 * half + 3] = [permitted, permitted, 0]
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(libc.capset(header, data))


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"giving up capabilities: {os.strerror(error)}")


@contextmanager
def before_giving_up_all() -> Iterator[Executor]:
    """Give up all capabilities, for good, but for one thread; it ends with the block."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # starts it
        keep_only(frozenset())
        yield pool


def raise_file_limit() -> None:
    """Allow as many open files as this process may have: each vCPU takes two."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
