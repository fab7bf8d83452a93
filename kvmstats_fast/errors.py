"""Every exception and warning of the package, and what makes them of what the C core returns."""

from __future__ import annotations

import sys
import warnings
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from kvmstats_fast._kvmstats import lib
from kvmstats_fast._text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType


class ErrorCode(IntEnum):
    """What is wrong with a stats file (``enum kvmstats_error`` in ``csrc/kvmstats.h``)."""

    TRUNCATED = lib.KVMSTATS_E_TRUNCATED
    LAYOUT = lib.KVMSTATS_E_LAYOUT
    FLAGS = lib.KVMSTATS_E_FLAGS
    NAME_SIZE = lib.KVMSTATS_E_NAME_SIZE
    NUM_DESC = lib.KVMSTATS_E_NUM_DESC
    COUNT_DEFECT = lib.KVMSTATS_E_COUNT_DEFECT
    BLOCK_ALIGN = lib.KVMSTATS_E_BLOCK_ALIGN
    OVERLAP = lib.KVMSTATS_E_OVERLAP
    STAT_SIZE = lib.KVMSTATS_E_STAT_SIZE
    STAT_ALIGN = lib.KVMSTATS_E_STAT_ALIGN
    STAT_NAME = lib.KVMSTATS_E_STAT_NAME
    DATA_SIZE = lib.KVMSTATS_E_DATA_SIZE
    DUPLICATE = lib.KVMSTATS_E_DUPLICATE


class KvmStatsError(Exception):
    """Base class of the package's own errors. If the kernel refuses a call, that is an `OSError` with its errno."""


class FormatError(KvmStatsError, ValueError):
    """The bytes are not a KVM stats file that can be read.

    Attributes
    ----------
    code : ErrorCode
        What is wrong.
    offset : int
        Byte offset in the file.
    """

    def __init__(self, code: ErrorCode, offset: int, message: str) -> None:
        super().__init__(code, offset, message)  # all of them, so that copy and pickle can call it again
        self.code = code
        self.offset = offset

    def __str__(self) -> str:
        return str(self.args[2])


class AttachError(KvmStatsError, OSError):
    """The stats files of another process cannot be obtained; the message says why, and what to do."""


class VmGoneError(AttachError):
    """The process has exited or never existed (``errno`` is ESRCH), or runs on without its VM (ENODEV)."""


class HandOverError(KvmStatsError):
    """Stats files were not handed over: the peer is the wrong user, went away, or does not speak the protocol."""


class KvmUnavailableError(KvmStatsError, OSError):
    """No VM can be created here; the message says why and what to do, ``errno`` is the kernel's."""


class RecordingWarning(UserWarning):
    """Part of a recording could not be read; the text says which files, parts or batches are missing."""


class SamplingWarning(UserWarning):
    """A run, stream or measure differs from what was asked for.

    The wall clock jumped, memory ran short, or the thread of a vCPU is not known.
    """


#: What keeps a process from starting a thread, when the kernel says EAGAIN.
THREAD_LIMITS = (
    "the limits are RLIMIT_NPROC (ulimit -u) of this user, pids.max of this process' cgroups, and the sysctls "
    "kernel.threads-max and kernel.pid_max"
)

_BLOCKS = {
    lib.KVMSTATS_BLOCK_HEADER: "header",
    lib.KVMSTATS_BLOCK_ID: "id",
    lib.KVMSTATS_BLOCK_DESCRIPTORS: "descriptors",
    lib.KVMSTATS_BLOCK_DATA: "data",
}

_MESSAGES = {
    ErrorCode.TRUNCATED: "the file is cut short: it ends here, but its {block} should reach byte {limit}",
    ErrorCode.LAYOUT: "not a KVM stats file: {value:#010x} here fits none of the known layouts",
    ErrorCode.FLAGS: "the header's flags are {value:#x}, of a format that this version does not know (flags 0 only); "
    "install a newer kvmstats-fast",
    ErrorCode.NAME_SIZE: "name_size is {value}; a name has 1 to {limit} bytes",
    ErrorCode.NUM_DESC: "the header counts {value} descriptors; more than {limit} are refused",
    ErrorCode.COUNT_DEFECT: "the header counts {value} descriptors, which is the size of the table in bytes: the count "
    "defect of the original series' x86 vCPU files. The table has {limit} descriptors. What such a kernel serves as "
    "data is the memory after the table, not the counters; parse(data, repair=True) returns the descriptors alone",
    ErrorCode.BLOCK_ALIGN: "the {block} start at byte {value}, which is not a multiple of {limit}",
    ErrorCode.OVERLAP: "the {block} start at byte {value}, which overlaps the {other}, which ends at byte {limit}",
    ErrorCode.STAT_SIZE: "descriptor {index} has size 0",
    ErrorCode.STAT_ALIGN: "descriptor {index} has data offset {value}, which is not a multiple of {limit}",
    ErrorCode.STAT_NAME: "descriptor {index} has an empty name",
    ErrorCode.DATA_SIZE: "the values of descriptor {index} end at byte {value} of the data; more than {limit} are "
    "refused",
    ErrorCode.DUPLICATE: "descriptor {index} has the name {name!r}, as the one at byte {value} has",
}


def format_error(code: int, fault: Any, source: str, *, name: str = "") -> FormatError:
    """Turn a negative return of the C core and its ``struct kvmstats_fault`` into the exception to raise.

    `source` says which file, `name` (duplicates) which statistic. Loosely typed: a fault is cffi's.
    """
    error = ErrorCode(code)
    text = _MESSAGES[error].format(
        value=fault.value,
        limit=fault.limit,
        index=fault.index,
        block=_BLOCKS[fault.block],
        other=_BLOCKS[fault.other],
        name=name,
    )
    return FormatError(error, fault.offset, f"{source}: byte {fault.offset}: {text}")


def truncated(source: str, offset: int, limit: int) -> FormatError:
    """Return the error for a data block that ends at byte `offset` instead of `limit`."""
    text = _MESSAGES[ErrorCode.TRUNCATED].format(block="data", limit=limit)
    return FormatError(ErrorCode.TRUNCATED, offset, f"{source}: byte {offset}: {text}")


def unknown_stat(name: str, known: Iterable[str], where: str) -> KeyError:
    """Return the error for a name or glob that fits no statistic in `where`; `known` are those there are."""
    return unknown_name("statistic", name, known, where)


def unknown_name(what: str, name: str, known: Iterable[str], where: str) -> KeyError:
    """Return the error for a name or glob that fits nothing; it says `what` is named, and what is near."""
    from difflib import get_close_matches  # noqa: PLC0415 - for this message alone

    names = list(dict.fromkeys(known))
    near = get_close_matches(name, names, n=3)
    hint = (
        f"did you mean {', '.join(map(printable, near))}?"
        if near
        else f"none of the {len(names)} names there is similar"
    )
    return KeyError(f"no {what} {name!r} in {where}; {hint}")


class Retold:
    """Has errors of a block come out as others, which `tell` makes of them.

    A generator of `contextlib` would be in a cycle with what it caught (from CPython 3.12 on, python/cpython#129280):
    whatever the frames of the block have open would stay so until that is collected.
    """

    __slots__ = ("_kinds", "_tell")

    def __init__(
        self, kinds: type[Exception] | tuple[type[Exception], ...], tell: Callable[[Exception], Exception]
    ) -> None:
        self._kinds, self._tell = kinds, tell

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, self._kinds):
            raise self._tell(error) from error  # a name for it would be a cycle, too


_PACKAGE = __file__.rpartition("/")[0] + "/"


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn at the line that called into this package."""
    level, frame = 1, sys._getframe()  # noqa: SLF001 - the documented way to it
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, level)
