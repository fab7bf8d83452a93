"""How much memory a run may take."""

from __future__ import annotations

from pathlib import Path


def check_memory(size: int, sweeps: int) -> None:
    """Raise MemoryError if so many bytes are not available: the kernel would grant them, and kill a process later."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:") and size > int(line.split()[1]) * 1024:
            raise MemoryError(
                f"{sweeps} sweeps of these files take {size >> 20} MiB, more than is available; keep fewer statistics "
                "(stats=), or take the sweeps in parts with stream()"
            )
