"""How much a file may claim to hold, compared before any of it is allocated, as docs/recording-format.md says."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.sampling.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Dates that a conversion makes directories for: ten years.
MOST_DATES = 3660
#: Stats files of a recording.
MOST_FILES = 1 << 20
#: Bytes of one field of metadata.
MOST_METADATA = 64 << 20
#: A compressed block may become so many bytes, or so many times its size if that is more.
ALWAYS_ALLOWED = 1 << 30
#: A Recorder stays well below it: what is decompressed at once is memory that a reader needs beside the values.
MOST_IN_BATCH = 32 << 20
MOST_TIMES = 1000
_SHORTAGES = ("Cannot allocate memory", "not enough memory")
#: So many bytes are not worth looking for.
_SMALL = 16 << 20


def check_size(size: int, stored: int, source: str, enough: int = 0) -> None:
    """Raise KvmStatsError if so many bytes cannot have been `stored` in so few; MemoryError if there is no room.

    There was room for `enough`, one after the other: to look again takes as long as to decompress some megabytes.
    """
    if size > max(ALWAYS_ALLOWED, MOST_TIMES * stored):
        raise KvmStatsError(
            f"{source}: {stored} bytes claim to hold {size}; more than {ALWAYS_ALLOWED} bytes, or {MOST_TIMES} times "
            "what is stored, are refused"
        )
    if size > enough:
        check_memory(size, source)


def as_shortage(error: Exception, source: str) -> MemoryError | None:
    """Return a MemoryError if that is what it is: Arrow's is an ArrowException, too, and its codecs only say so."""
    short = isinstance(error, MemoryError) or any(text in str(error) for text in _SHORTAGES)
    return MemoryError(f"{source}: {error}") if short else None


@contextmanager
def saying_shortage(target: Path) -> Iterator[None]:
    """Have a shortage of memory while `target` is written be a MemoryError, in whatever form Arrow says so."""
    try:
        yield
    except Exception as error:
        if shortage := as_shortage(error, str(target)):
            raise shortage from error
        raise


def check_memory(size: int, source: str) -> None:
    """Raise MemoryError if so many bytes are not available: the kernel would grant them, and kill a process later."""
    available = Memory().available() if size > _SMALL else None
    if available is not None and size > available:
        raise MemoryError(f"{source}: it takes {size >> 20} MiB, and {available >> 20} MiB are available")
