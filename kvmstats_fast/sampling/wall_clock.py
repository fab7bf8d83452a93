"""WallClock: how far CLOCK_REALTIME is from CLOCK_MONOTONIC over a run, and when that changed."""

from __future__ import annotations

#: The offset is the same if it is read within this of the one before: the two clocks cannot be read at once.
_READING_ERROR_NS = 1_000_000
#: Users are warned of a change of more than this.
_STEP_NS = 10_000_000


class WallClock:
    """Follows the offset between the clocks, which is read anew for each chunk of a run.

    It changes when the clock is set, and when the host was suspended: CLOCK_MONOTONIC does not count that time.

    Parameters
    ----------
    offset : int
        What to add to CLOCK_MONOTONIC for CLOCK_REALTIME at first, in ns; `lib.kvmstats_wall_offset` reads it.
    remarks : list of str
        Where what users must be warned of is added.

    Attributes
    ----------
    offset : int
        As of the last chunk.
    """

    def __init__(self, offset: int, remarks: list[str]) -> None:
        self.offset = offset
        self._remarks = remarks

    def follow(self, offset: int) -> int:
        """Return the offset of a chunk: as it was read, or as that of the chunk before if only the reading differs."""
        step = offset - self.offset
        if abs(step) > _READING_ERROR_NS:
            self.offset = offset
        if abs(step) > _STEP_NS:
            self._remarks.append(
                f"the wall clock jumped by {step / 1e9:+.3f} s while files were sampled: it was set, or the host was "
                "suspended; wall_time follows it"
            )
        return self.offset
