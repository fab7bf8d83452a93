"""Schedstat: what the scheduler counts of a vCPU's thread, beside the statistics of its stats file."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Fd
from kvmstats_fast.abi import StatBase, StatType, StatUnit
from kvmstats_fast.handle import Handle, refused
from kvmstats_fast.image import merged_head
from kvmstats_fast.schema import schema_of
from kvmstats_fast.stat import Stat

if TYPE_CHECKING:
    from kvmstats_fast.schema import Schema

_seconds = partial(Stat, type=StatType.CUMULATIVE, unit=StatUnit.SECONDS, base=StatBase.POW10, exponent=-9, size=1)
_count = partial(Stat, type=StatType.CUMULATIVE, unit=StatUnit.NONE, base=StatBase.POW10, exponent=0, size=1)
#: The statistics, in the order of the text (``csrc/schedstat.h``).
STATS = (
    _seconds("sched_run_ns", offset=0),
    _seconds("sched_wait_ns", offset=8),
    _count("sched_timeslices", offset=16),
)
#: What a vCPU's files are called where their statistics are those of its stats file and these.
_SOURCE = "the statistics of a vCPU with those of its thread"
_HINTS = {
    errno.ESRCH: "the thread of this vCPU has ended",
    errno.ENODATA: "it ends without a newline: is proc(5) mounted on /proc?",
    errno.EBADMSG: "it is not three numbers: is proc(5) mounted on /proc?",
    errno.EOVERFLOW: "it has a number above 2**64 - 1: is proc(5) mounted on /proc?",
}


class Schedstat(Handle):
    """The open ``schedstat`` of a vCPU's thread.

    Parameters
    ----------
    fd : Fd
        Of ``/proc/PID/task/TID/schedstat``.

    Notes
    -----
    It is closed when the object goes, and with the Handle of the vCPU's stats file that it is attached to.
    """

    __slots__ = ("__weakref__", "_values")

    def __init__(self, fd: Fd) -> None:
        self._values = ffi.new("uint64_t[]", lib.KVMSTATS_SCHEDSTAT_VALUES)
        fields = (fd.fileno(), lib.KVMSTATS_SCHEDSTAT, 0, 0, lib.KVMSTATS_SCHEDSTAT_VALUES, self._values)
        super().__init__(fd, ffi.new("struct kvmstats_source *", fields), "schedstat")

    @classmethod
    def open(cls, pid: int, tid: int) -> Schedstat:
        """Open that of a thread; OSError as open(2) has it."""
        return cls(Fd(os.open, f"/proc/{pid}/task/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC))

    def read(self) -> tuple[int, ...]:
        """Return its values, one for each of `STATS`.

        Raises
        ------
        OSError
            ESRCH once the thread has ended; EBADMSG, EOVERFLOW or ENODATA if it is no schedstat.
        """
        status = lib.kvmstats_read(self.source)
        if status:
            raise self.failure(-status, self.source.got)
        return tuple(self._values)

    def failure(self, error: int, got: int) -> Exception:  # noqa: ARG002 - as of a stats file
        """Return what to raise when the C core could not read."""
        self.check_open()
        return refused(error, "pread", self.source.fd, _HINTS)


def with_thread(schema: Schema) -> Schema:
    """Return the schema of a vCPU's statistics and, behind them, those of its thread.

    Whatever reads recordings can read these: they are what a stats file would have if KVM counted it.

    Raises
    ------
    FormatError
        If the kernel has a statistic of such a name itself.
    """
    stats = [*schema.stats, *(replace(stat, offset=stat.offset + schema.data_size) for stat in STATS)]
    return schema_of(merged_head("", stats, "="), _SOURCE)
