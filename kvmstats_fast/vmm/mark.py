"""Marks on the VMs of another process, which tell whether they are still there.

A VMM may destroy its VM and make another one, with the same ids and fds, without ending; what was borrowed then reads
the same numbers for ever. Names and numbers do not tell, and whoever held the VM's own file open would keep the VM.
So the VM is marked: by an advisory lock of one byte (``F_OFD_SETLK``, fcntl(2)) at an offset chosen at random. Such a
lock belongs to the open file, can be seen through every file of the same inode, which is one for all files of KVM, and
vanishes with the last fd of the file, in whatever process. It keeps nothing open, and nobody waits for it. A file is
marked once in its life: whoever comes later finds the mark in ``/proc/PID/fdinfo``.

A stats file that was injected stays open in the VMM, after the end of its VM too. It is marked as dead then, so that
nobody takes it for one of the VM that comes next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from kvmstats_fast._resource import Fd, HasFileno

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import KvmFile, Process

_FLOCK = struct.Struct("hhqqi4x" if struct.calcsize("P") == 8 else "hhqqi")  # struct flock: type, whence, start, length
_FIRST = 1 << 62  # no file of KVM is that long
_DEAD = _FIRST - 1  # on a stats file whose VM is gone
_LOCK = re.compile(rb"lock:\t\d+: OFDLCK +ADVISORY +READ -1 \S+ (\d+) \1")  # fs/locks.c: lock_get_status


class Marks:
    """The marks on the VMs that a process has open.

    Each VM has one on its own file and one on its first vCPU, and is there as long as one of them is: a VMM may close
    its VM's file and go on with the vCPUs.

    Parameters
    ----------
    process : Process
        Held.
    files : list of KvmFile
        What it has open.

    Raises
    ------
    OSError
        If the kernel or a security module forbids a mark, or the process has ended.

    Attributes
    ----------
    vms : int
        How many VMs there are, as far as is known.
    """

    def __init__(self, process: Process, files: list[KvmFile]) -> None:
        first = min((file.vcpu_id for file in files if file.vcpu_id is not None and not file.is_stats), default=None)
        own = [file for file in files if not file.is_stats]
        self._by_kind = [
            marks
            for marks in (
                _mark(process, (file for file in own if file.kind == "vcpu" and file.vcpu_id == first)),
                _mark(process, (file for file in own if file.kind == "vm")),
            )
            if marks
        ]
        self.vms = max(map(len, self._by_kind), default=0)

    def overlap(self, other: Marks) -> bool:
        """Return whether a VM has marks of both."""
        return not set().union(*self._by_kind).isdisjoint(set().union(*other._by_kind))

    def forget_lost(self) -> int:
        """Return how many VMs have gone since the last call."""
        gone = []
        for marks in self._by_kind:
            gone.append({mark for mark in marks if not _is_there(mark)})
            if not gone[-1]:
                return 0
        for marks, lost in zip(self._by_kind, gone, strict=True):
            marks.difference_update(lost)
        number = min(map(len, gone), default=0)
        self.vms -= number
        return number


@cache
def _probe() -> tuple[Fd, Fd, int]:
    """Return two files of the inode that KVM's have, too (``fs/anon_inodes.c``): the second one has this mark."""
    probe, marked, mark = Fd(os.eventfd, 0), Fd(os.eventfd, 0), _new_mark()
    _lock(marked, mark)
    return probe, marked, mark


def _new_mark() -> int:
    return _FIRST | int.from_bytes(os.urandom(7), "little")


def _mark(process: Process, files: Iterable[KvmFile]) -> set[int]:
    """Return the marks of these files, set now if they have none; duplicates of a file have one."""
    marks = set()
    for file in files:
        mark = next((mark for mark in _find(process, file) if mark >= _FIRST), 0)
        if not mark and (copy := process.take(file.fd)) is not None:
            mark = _new_mark()
            with copy:
                _lock(copy, mark)
        if mark and _is_there(mark):
            marks.add(mark)
    return marks


def mark_dead(file: StatsFile) -> None:
    """Mark a stats file whose VM is gone, in whatever processes it is still open."""
    _lock(file, _DEAD)


def drop_dead(process: Process, files: list[KvmFile]) -> list[KvmFile]:
    """Return a process' files without the stats files of VMs that are gone."""
    with suppress(OSError):  # where nothing can be marked, nothing is
        if _is_there(_DEAD):  # as a rule on no file of the machine
            return [file for file in files if not file.is_stats or _DEAD not in _find(process, file)]
    return files


def _find(process: Process, file: KvmFile) -> list[int]:
    try:
        return [int(start) for start in _LOCK.findall(process.file_info(file.fd))]
    except FileNotFoundError:  # closed meanwhile
        return []


def _lock(file: HasFileno, mark: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, mark, 1, 0))


def _is_there(mark: int) -> bool:
    """Return whether a lock stands in the way of one that would be at this place.

    Raises
    ------
    OSError
        If the kernel says so, or if its answers are not about KVM's files any more, as where a program closed fds that
        are not its own: VMs that run would be taken for gone, and marked as dead for every monitor of the machine.
    """
    probe, _marked, known = _probe()
    if _stands(probe, mark):
        return True
    if not _stands(probe, known):
        raise OSError(errno.EBADF, "an fd by which VMs are watched was closed by the program")
    return False


def _stands(probe: Fd, mark: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, mark, 1, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(probe, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK
