"""Feed: where samples come from, in a thread of its own: VMs of this host, files that were handed over, recordings."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import waits_for
from kvmstats_fast.formats.recordings import open_recordings
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.follow import follow
from kvmstats_fast.sampling.sampler import Sampler
from kvmstats_fast.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from kvmstats_fast.sampling.follow import Follow
    from kvmstats_fast.stats_file import StatsFile

#: Of a recording, what is shown at a time unless the user says, and the longest wait where there is a gap: in s.
_STEP = 1.0
_LONGEST_GAP = 3.0
_SLOWEST, _FASTEST = 1 / 64, 4096.0


class Feed(ABC):
    """Gives samples, in a thread of its own, each with the last sweep of those before if that is of the same files.

    Attributes
    ----------
    interval : float
        Seconds from one to the next.
    is_over : bool
        Whether nothing comes any more.
    error : Exception or None
        Why it ended, if not of itself.
    waits : str
        What it says where there is no VM.
    """

    is_recorded = False
    waits = waits_for(None)

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.is_over = False
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._has_begun, self._is_refused = threading.Event(), False
        self._is_stopped = False

    def start(self, give: Callable[[Samples], object], notify: Callable[[], object]) -> None:
        """Begin, and wait for that: what fails at once is raised here. `notify` is called when it is over."""
        self._give, self._notify = give, notify
        self._thread = threading.Thread(target=self._work, name="kvmstats-feed", daemon=True)
        self._thread.start()
        self._has_begun.wait()
        if self._is_refused and self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - it is shown, and raised at the end
            self.error, self._is_refused = error, not self._has_begun.is_set()
        self.is_over = True
        self._has_begun.set()
        self._notify()

    @abstractmethod
    def _run(self) -> None:
        """Give samples until the end."""

    def stop(self) -> None:
        """End it, and wait for that."""
        self._is_stopped = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    @abstractmethod
    def _wake(self) -> None:
        """Have the thread look at what was changed."""

    def change(self, interval: float) -> None:
        """Go on with another interval."""
        self.interval = interval
        self._wake()

    @property
    def vms(self) -> int | None:
        """How many VMs are attached to; None if that is not known."""
        return None

    @property
    def refused(self) -> dict[int, str]:
        """Pids of VMMs that cannot be attached to, and why."""
        return {}


class _Live(Feed):
    """Samples of a stream, which is opened anew for another interval."""

    interval: float
    _stream: Any = None

    def _run(self) -> None:
        while not self._is_stopped:
            self._interval = self.interval
            with self._open(self.interval) as stream:
                self._stream = stream
                if self._is_stopped or self._interval != self.interval:  # before it could be ended
                    continue
                self._has_begun.set()
                for samples in stream:
                    self._give(samples)
                if self._interval == self.interval:
                    return

    @abstractmethod
    def _open(self, interval: float) -> AbstractContextManager[Iterable[Samples]]:
        """Return what samples are read of."""

    @abstractmethod
    def _end(self, stream: Any) -> None:
        """Have an open stream end."""

    def _wake(self) -> None:
        if self._stream is not None:
            self._end(self._stream)


class HostFeed(_Live):
    """The VMs of this host, while they come and go.

    Parameters
    ----------
    names, inject
        As for `follow`.
    interval : float
    """

    def __init__(self, names: Sequence[str | int] | None, interval: float, *, inject: bool = False) -> None:
        super().__init__(interval)
        self._names, self._inject = names, inject
        self.waits = waits_for(names)

    def _open(self, interval: float) -> Follow:
        return follow(self._names, interval, inject=self._inject, overlap=True, sched=True)

    def _end(self, stream: Any) -> None:
        stream.stop()

    @property
    def vms(self) -> int | None:
        """How many VMs are attached to."""
        return None if self._stream is None else len(self._stream.machines)

    @property
    def refused(self) -> dict[int, str]:
        """Pids of VMMs that cannot be attached to, and why."""
        return {} if self._stream is None else self._stream.refused


class FilesFeed(_Live):
    """Open stats files, such as those that were handed over."""

    def __init__(self, files: Sequence[StatsFile], interval: float) -> None:
        super().__init__(interval)
        self._sampler = Sampler(files)

    @contextmanager
    def _open(self, interval: float) -> Iterator[Iterable[Samples]]:
        with self._sampler.stream(interval) as chunks:
            yield overlapping(chunks)

    def _end(self, stream: Any) -> None:  # noqa: ARG002 - its Sampler ends it
        self._sampler.stop()


def overlapping(chunks: Iterable[Samples]) -> Iterator[Samples]:
    """Give each with the last sweep of the one before, where that is of the same files."""
    last: list[Samples] = []
    for samples in chunks:
        if not len(samples):
            continue
        try:
            joined = Samples.concatenate([*last, samples])
        except ValueError:
            joined = samples
        yield joined
        last = [samples[-1:]]
        last[0].missed = last[0].overruns = 0


class Replay(Feed):
    """What was recorded, at the speed at which it was, or another one.

    Parameters
    ----------
    paths : sequence of str
        Recordings, Parquet data sets, ``.npz`` files.
    interval : float or None
        Seconds of the recording that are shown at a time, if its sweeps are no rarer.
    speed : float
        How much faster than it was recorded.
    vms : sequence of str, optional
        Names or globs of VMs. Default: all.

    Attributes
    ----------
    speed : float
    is_paused : bool
    """

    is_recorded = True

    def __init__(
        self,
        paths: Sequence[str],
        interval: float | None = None,
        speed: float = 1.0,
        vms: Sequence[str] | None = None,
    ) -> None:
        super().__init__(interval or _STEP)
        self._selection = Selection.of((), vms, None, None, None)
        self.speed = speed
        self.is_paused = False
        self._steps = 0
        self._changed = threading.Condition()
        self._whole = [path for path in paths if path.endswith(".npz")]
        others = [path for path in paths if path not in self._whole]
        self._recordings = open_recordings(others) if others else ()

    def _run(self) -> None:
        recorded = chain(map(Samples.load, self._whole), self._recordings)
        for samples in overlapping(one for one in map(self._selection.take, recorded) if one.files):
            self._has_begun.set()
            start = 0
            while start < max(len(samples) - 1, 1) and not self._is_stopped:
                until = int(samples.time[start]) + round(self.interval * 1e9)
                stop = max(int(np.searchsorted(samples.time, until, "right")) - 1, start + 1)
                some = samples[start : stop + 1]
                if start:  # what was missed before its first sweep was said with the last one of the step before
                    some.missed -= samples[start : start + 1].missed
                self._give(some)
                self._wait(min(some.elapsed, max(_LONGEST_GAP, self.interval, samples.interval)))
                start = stop
            if self._is_stopped:
                return

    def _wait(self, seconds: float) -> None:
        """Wait as long as so much of a recording takes; while it is paused, until the next step."""
        waited, now = 0.0, time.monotonic()
        with self._changed:
            while not self._is_stopped:
                if self._steps:
                    self._steps -= 1
                    return
                left = None if self.is_paused else seconds / self.speed - waited
                if left is not None and left <= 0:
                    return
                self._changed.wait(left)
                before, now = now, time.monotonic()
                waited += 0 if left is None else now - before

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def pause(self, *, is_paused: bool) -> None:
        """Stand still, or go on."""
        with self._changed:
            self.is_paused = is_paused
            self._changed.notify_all()

    def step(self) -> None:
        """Give what comes next, also while it stands still."""
        with self._changed:
            self._steps += 1
            self._changed.notify_all()

    def change_speed(self, factor: float) -> None:
        """Be faster or slower by a factor."""
        with self._changed:
            self.speed = min(max(self.speed * factor, _SLOWEST), _FASTEST)
            self._changed.notify_all()
