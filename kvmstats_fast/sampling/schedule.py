"""Schedule: when sweeps are due, how the thread waits for them, on which processors, and before whom."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvmstats_fast._arguments import article, check_integer, check_seconds
from kvmstats_fast._kvmstats import lib

#: The ways to wait for the next tick, by name; `Sampler.run` and docs/sampling.md say what each is for.
WAITS = {
    "sleep": lib.KVMSTATS_WAIT_SLEEP,
    "spin": lib.KVMSTATS_WAIT_SPIN,
    "hybrid": lib.KVMSTATS_WAIT_HYBRID,
}
#: How long "hybrid" spins for a tick at most: a sleeper in a virtual machine often wakes up to this late.
HYBRID_SPIN_NS = 150_000
#: More ticks than any run sees; times the interval it still fits an int64 of ns.
FOREVER = 1 << 62
#: No interval or duration may be longer, in s: 30 years.
LONGEST = 1e9

#: Of SCHED_FIFO, which runs before everything that is not real-time itself (sched(7)).
_PRIORITIES = os.sched_get_priority_min(os.SCHED_FIFO), os.sched_get_priority_max(os.SCHED_FIFO)

#: How long a stream's chunk lasts, and how large it may be, unless the caller says.
_CHUNK_SECONDS = 0.1
_CHUNK_BYTES = 4 << 20
#: Sweeps in a chunk of a stream, and of a run, where no interval tells how many a time brings.
_CHUNK_SWEEPS = 1000
_RUN_SWEEPS = 1 << 16


#: Chunks of room for a run whose end is not known, unless the caller says.
DEPTH = 8


class Schedule:
    """When the sweeps of a run are due: the arguments of `Sampler.run`, checked.

    Attributes
    ----------
    interval_ns : int
        Between ticks; 0: as fast as possible.
    ticks : int
        How many there are, FOREVER if neither `count` nor `duration` limits them.
    duration_ns : int
        After which a run without interval ends; 0: no limit, or `ticks` is the limit.
    is_bounded : bool
        Whether `ticks` is known to be reached, so that all sweeps can have their room from the start.
    wait : int
        One of WAITS' numbers.
    cpus : frozenset of int or None
        Processors to run on; None: those of the process.
    priority : int
        Of SCHED_FIFO, from 1 on; 0: the policy of the thread that starts the run.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range; the message says what it must be.
    """

    __slots__ = ("cpus", "duration_ns", "interval_ns", "is_bounded", "priority", "ticks", "wait")

    def __init__(  # noqa: PLR0913 - a schedule has that many sides
        self,
        interval: float,
        count: int | None,
        duration: float | None,
        wait: str,
        *,
        cpu: int | Iterable[int] | None = None,
        priority: int | None = None,
    ) -> None:
        interval = check_seconds("interval", interval, LONGEST, zero=True)
        self.interval_ns = round(interval * 1e9)
        if interval and not self.interval_ns:
            raise ValueError(f"interval is {interval} s; the clock counts ns, so it must be 0 or at least 1e-9")
        self.duration_ns = 0
        self.ticks = FOREVER // max(self.interval_ns, 1)
        self.is_bounded = False
        if duration is not None:
            nanoseconds = max(round(check_seconds("duration", duration, LONGEST, zero=False) * 1e9), 1)
            if self.interval_ns:
                self.ticks = min(self.ticks, -(-nanoseconds // self.interval_ns))
                self.is_bounded = True
            else:
                self.duration_ns = nanoseconds
        if count is not None:
            self.ticks = min(self.ticks, check_integer("count", count, 1))
            self.is_bounded = not self.duration_ns
        if not isinstance(wait, str):
            raise TypeError(f"wait is {article(wait)}; it must be one of {', '.join(map(repr, WAITS))}")
        if wait not in WAITS:
            raise ValueError(f"wait is {wait!r}; it must be one of {', '.join(map(repr, WAITS))}")
        self.wait = WAITS[wait]
        self.cpus = None if cpu is None else _check_cpus(cpu)
        self.priority = 0 if priority is None else check_integer("priority", priority, *_PRIORITIES)

    def split(self) -> tuple[int, int]:
        """Return in how many chunks of how many sweeps a bounded run is taken: of a second each.

        The wall clock is read once for each chunk.
        """
        chunk = max(1, round(1e9 / self.interval_ns)) if self.interval_ns else _RUN_SWEEPS
        chunk = min(chunk, self.ticks)
        return -(-self.ticks // chunk), chunk

    def choose_chunk(self, row_bytes: int) -> int:
        """Return how many sweeps a stream's chunk has by default: those of 0.1 s, but no more than 4 MiB of them."""
        wanted = _CHUNK_SECONDS * 1e9 / self.interval_ns if self.interval_ns else _CHUNK_SWEEPS
        return max(1, min(round(wanted), _CHUNK_BYTES // row_bytes, self.ticks))


def _check_cpus(cpu: int | Iterable[int]) -> frozenset[int]:
    cpus = frozenset(check_integer("cpu", one, 0) for one in (cpu if isinstance(cpu, Iterable) else (cpu,)))
    allowed = os.sched_getaffinity(0)
    if not cpus or not cpus <= allowed:
        raise ValueError(f"cpu is {cpu}; this process may run on {', '.join(map(str, sorted(allowed)))}")
    return cpus
