"""How much a file may claim to hold, compared before any of it is allocated; docs/recording.md states the same."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from kvmstats_fast.errors import KvmStatsError

#: Dates that a conversion makes directories for: ten years.
MOST_DATES = 3660
#: Stats files of a recording.
MOST_FILES = 1 << 20
#: Bytes of one field of metadata.
MOST_METADATA = 64 << 20
#: A compressed block may become so many bytes, or so many times its size if that is more.
ALWAYS_ALLOWED = 1 << 30
#: A Recorder stays well below it.
MOST_IN_BATCH = 256 << 20
MOST_TIMES = 1000
#: So many bytes are not worth looking for.
_SMALL = 16 << 20


def check_size(size: int, stored: int, source: str) -> None:
    """Raise KvmStatsError if so many bytes cannot have been `stored` in so few; MemoryError if there is no room."""
    if size > max(ALWAYS_ALLOWED, MOST_TIMES * stored):
        raise KvmStatsError(
            f"{source}: {stored} bytes claim to hold {size}; more than {ALWAYS_ALLOWED} bytes, or {MOST_TIMES} times "
            "what is stored, are refused"
        )
    check_memory(size, source)


def check_memory(size: int, source: str) -> None:
    """Raise MemoryError if so many bytes are not available: the kernel would grant them, and kill a process later."""
    if size > _SMALL and size > available_memory():
        raise MemoryError(f"{source}: it takes {size >> 20} MiB, more than is available; read it in parts")


def available_memory() -> int:
    """Return how many bytes can be used without swapping; more than there can be where /proc does not say."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize
