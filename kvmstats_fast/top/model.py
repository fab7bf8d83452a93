"""Model: what the screen shows and how: filled by the thread that reads samples, asked by the one that shows them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.top.counted import add, bridge, count
from kvmstats_fast.top.table import Table, fits, make_table

if TYPE_CHECKING:
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.top.counted import Counted
    from kvmstats_fast.top.table import Who

#: How fast it is forgotten, from one frame to the next, which kinds of exits there were many of.
_MEMORY = 0.9


class Model:
    """What was counted, and what of it is wanted.

    Attributes
    ----------
    by : {"vm", "vcpu"}
        What has a row.
    events, guests : tuple of str
        Globs of what is shown: statistics, VMs. Empty: exits by kind, all.
    sort : str
        Name of a column; where there is none of this name, all exits take its place.
    is_reversed : bool
    is_total : bool
        Whether it shows what was counted since the reset, instead of in the last interval.
    last, total : Counted
        What was counted in the last interval, and since the reset, as of the last `advance`.
    wall_time : int
        CLOCK_REALTIME in ns of the last sweep.
    missed, frames : int
        Ticks that were missed since the start, and frames in which anything was counted.
    """

    def __init__(self) -> None:
        self.by, self.sort = "vm", "exits/s"
        self.is_reversed = self.is_total = False
        self.events: tuple[str, ...] = ()
        self.guests: tuple[str, ...] = ()
        self.last: Counted = ()
        self.total: Counted = ()
        self.weights: dict[str, float] = {}
        self.wall_time = self.missed = self.frames = 0
        self._before: Counted = ()  # what came last, of the thread that takes it
        self._lock = threading.Lock()  # of what follows
        self._came: Counted | None = None  # since the last `advance`
        self._since: Counted = ()
        self._about = (0, 0)

    def take(self, samples: Samples) -> None:
        """Take samples: whether they begin with the last sweep of those before or after it, nothing is left out."""
        if not len(samples):
            return
        now = count(samples)
        self._before, now = now, bridge(self._before, now)
        with self._lock:
            self._came = now if self._came is None else add(self._came, now)
            self._since = add(self._since, now)
            self._about = int(samples.wall_time[-1]), self._about[1] + samples.missed

    def forget(self) -> None:
        """Have nothing to show: there is no VM any more."""
        with self._lock:
            self._came, self._since = (), ()

    def advance(self) -> bool:
        """Have what came be what is shown; return whether anything came.

        Where files have changed, the first sweep says only which there are: those that are still there keep what they
        had.
        """
        with self._lock:
            came, self._came = self._came, None
            if came is None:
                return False
            self.total = self._since
            self.wall_time, self.missed = self._about
        if any(part.seconds.any() for part in came):
            self.last = came
            self.frames += 1
        else:
            self.last = add(self.last, came)
        return True

    def reset(self) -> None:
        """Count from here on."""
        with self._lock:
            self._since = ()
            self.total = self.last

    def table(self) -> Table:
        """Return the rows and columns that are wanted."""
        table = make_table(self.total if self.is_total else self.last, self.by, self.events)
        self._weigh(table)
        return table

    def _weigh(self, table: Table) -> None:
        """Keep in mind which kinds of exits there are many of, so that columns do not come and go with each frame."""
        faded = {name: _MEMORY * weight for name, weight in self.weights.items() if weight > 1e-6}
        self.weights = {}
        for column, values in zip(table.columns, table.values.T, strict=True):
            if column.is_kind:
                least = 1e-6 if self.events else 0.0
                self.weights[column.name] = max(faded.get(column.name, 0) + float(np.nansum(values)), least)

    def sorts(self, table: Table) -> list[str]:
        """Return by which columns a table can be sorted: those that it may show."""
        return ["name", *(one.name for one in table.columns if not one.is_kind or self.weights.get(one.name))]

    @property
    def vms(self) -> int:
        """How many VMs there are."""
        return len({(info.host, info.vm) for part in self.last for info in part.files})

    @property
    def vcpus(self) -> int:
        """How many vCPUs there are."""
        return sum(len(part.files) for part in self.last if part.kind == "vcpu")

    @property
    def has_events(self) -> bool:
        """Whether there is a statistic that `events` choose."""
        return any(fits(one, name) for part in self.last for name in part.stats for one in self.events)

    def has(self, who: Who) -> bool:
        """Return whether a VM or vCPU is there."""
        return any(
            (info.host, info.vm) == (who.host, who.vm) and who.vcpu in (None, info.vcpu_id)
            for part in self.last
            for info in part.files
        )
