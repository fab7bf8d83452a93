"""Memory: how much this process may still take before the kernel kills something.

The kernel grants memory that it does not have, and kills a process when it is used. So a run is measured beforehand
against what is available: of the machine (MemAvailable of /proc/meminfo), of the process' own memory cgroups and all
cgroups above them (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst), and of RLIMIT_AS. A source that
cannot be read is left out.
"""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast._cgroups import find_cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Less is not worth measuring: it takes a tenth of a millisecond, and an interpreter takes more.
_TRIFLE = 1 << 20
#: What the rest of the program may take before memory is looked at again, and how soon that is.
_MARGIN = 16 << 20
_WATCH_SECONDS = 0.1


class _Files(NamedTuple):
    """The files of one version of the memory controller: its limits, what is used, and what of that is page cache."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))


class Memory:
    """What is available to this process, as often as it is asked for.

    Parameters
    ----------
    root : path-like
        Where ``/proc`` and the mounts of the cgroups are looked for.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)
        self._cgroups = list(self._find_cgroups())

    def available(self) -> int | None:
        """Return how many bytes are available, or None if nothing says so."""
        known = [self._on_machine(), self._in_address_space(), *(_left(*cgroup) for cgroup in self._cgroups)]
        return min((max(left, 0) for left in known if left is not None), default=None)

    def _on_machine(self) -> int | None:
        found = re.search(r"^MemAvailable: +(\d+) kB$", _read(self._root / "proc/meminfo"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _in_address_space(self) -> int | None:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = _number(_read(self._root / "proc/self/statm").partition(" ")[0])
        return None if limit == resource.RLIM_INFINITY or pages is None else limit - pages * resource.getpagesize()

    def _find_cgroups(self) -> Iterator[tuple[Path, _Files]]:
        """Yield the folders of this process' memory cgroups and of all above them, as far as they are mounted."""
        about = (_read(self._root / "proc/self" / name) for name in ("cgroup", "mountinfo"))
        for version, top, shown in find_cgroups("memory", *about):
            below = shown or PurePosixPath()  # if it is not shown, the process' own cgroup is what is mounted
            for folder in (below, *below.parents):
                yield self._root / str(top).lstrip("/") / folder, _V1 if version == 1 else _V2


class MemoryWatch:
    """Says when a run that keeps all its samples must end.

    Parameters
    ----------
    reserve : int
        Bytes that will be needed besides the samples.

    Attributes
    ----------
    remark : str
        What to tell the user, once memory is short.
    """

    def __init__(self, reserve: int) -> None:
        self.remark = ""
        self._memory = Memory()
        self._reserve = reserve + _MARGIN
        self._next_size, self._next_time = 0, 0.0

    def is_short(self, size: int) -> bool:
        """Whether samples of this size could only just be joined, for which they are copied. True once."""
        now = time.monotonic()
        if self.remark or (size < self._next_size and now < self._next_time):
            return False
        available = self._memory.available()
        room = size if available is None else available - size - self._reserve
        self._next_size, self._next_time = size + room // 16, now + _WATCH_SECONDS
        if room >= 0:
            return False
        self.remark = (
            f"the run ended early, because memory ran short: its samples take {size >> 20} MiB, as much is needed to "
            f"join them, and {(available or 0) >> 20} MiB are available; take them in parts with stream(), or keep "
            "fewer statistics (stats=)"
        )
        return True


def check_memory(size: int, sweeps: int) -> None:
    """Raise MemoryError if so many bytes are not available."""
    if size < _TRIFLE:
        return
    available = Memory().available()
    if available is not None and size > available:
        raise MemoryError(
            f"{sweeps} sweeps of these files take {size >> 20} MiB, and {available >> 20} MiB are available; keep "
            "fewer statistics (stats=), or take the sweeps in parts with stream()"
        )


def _left(folder: Path, files: _Files) -> int | None:
    """Return what a cgroup leaves: its lowest limit, less what is used, but for page cache, which can be dropped."""
    usage = _number(_read(folder / files.usage))
    limits = [limit for name in files.limits if (limit := _number(_read(folder / name))) is not None]
    if usage is None or not limits:
        return None
    lines = (line.partition(" ") for line in _read(folder / "memory.stat").splitlines())
    cache = sum(_number(value) or 0 for name, _, value in lines if name in files.cache)
    return min(limits) - max(usage - cache, 0)


def _read(path: Path) -> str:
    """Return the text of a file, or none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """Return what a file says, or None where it says ``max``, or nothing that makes sense."""
    text = text.strip()
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None
