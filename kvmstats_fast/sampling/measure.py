"""measure: what happened while a block of code ran."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvmstats_fast._kvmstats import lib
from kvmstats_fast.errors import KvmStatsError, SamplingWarning, warn_caller
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.plan import LiveRow, Plan
from kvmstats_fast.sampling.wall_clock import WallClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    import numpy.typing as npt
    from typing_extensions import Self

    from kvmstats_fast.sampling.plan import StatsFiles


class _Changes(Mapping[str, "npt.NDArray[Any]"]):
    """Names to changes, worked out when asked for."""

    def __init__(self, samples: Samples, change: Callable[[str], npt.NDArray[Any]]) -> None:
        self._samples = samples
        self._change = change

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = self._change(name)[0]
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples.names)

    def __len__(self) -> int:
        return len(self._samples.names)


class measure:  # noqa: N801 - used as a function is
    """Measure what happens while a block of code runs.

    Parameters
    ----------
    files, stats
        As for `Sampler`.

    Attributes
    ----------
    elapsed : float
        Seconds from one reading to the other.
    delta, rate : mapping
        ``m.delta["exits"]``: the change of each file that has the statistic, as `Samples.delta` says, shape ``(n,)`` or
        ``(n, buckets)``; ``m.rate["exits"]`` the same per second, as `Samples.rate` says.
    samples : Samples
        The two readings.
    cost : float
        Seconds that the two readings took together. About half of it lies between the two and is a part of `elapsed`:
        so much the measurement adds to what it measures.

    Raises
    ------
    OSError, FormatError, ValueError
        If no file can be read, before or after the block; after a block that raised, its own error comes out instead.

    Warns
    -----
    SamplingWarning
        If the wall clock jumped by more than 10 ms in the meantime.

    Examples
    --------
    >>> with measure(files, "exits") as m:      # doctest: +SKIP
    ...     work()
    >>> m.delta["exits"]                        # doctest: +SKIP
    """

    def __init__(self, files: StatsFiles, stats: str | Iterable[str] | None = None) -> None:
        self._live = LiveRow(Plan(files, stats, threads=1))
        self._readings: list[Samples] = []
        self._remarks: list[str] = []

    def _read(self) -> None:
        live, offset = self._live, self._wall_clock.follow(lib.kvmstats_wall_offset())
        start = time.monotonic_ns()
        status = lib.kvmstats_sweep(live.c)
        live.sweep_ns[0] = time.monotonic_ns() - start
        live.check(status, strict=False)
        live.time[0], live.tick[0] = start, len(self._readings)
        errors = live.find_errors(0, 1)
        self._readings.append(live.make_samples(slice(1), copy=True, wall_offset=offset, errors=errors))

    def __enter__(self) -> Self:
        if self._readings:
            raise RuntimeError("this measure has been used; make another one")
        self._wall_clock = WallClock(lib.kvmstats_wall_offset(), self._remarks)
        self._read()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._read()
        except (KvmStatsError, OSError, ValueError):
            if exc is not None:
                return  # what went wrong in the block is the news
            raise
        samples = self.samples = Samples.concatenate(self._readings)
        self.elapsed = int(samples.time[1] - samples.time[0]) / 1e9
        self.cost = int(samples.sweep_ns.sum()) / 1e9
        self.delta: Mapping[str, npt.NDArray[Any]] = _Changes(samples, samples.delta)
        self.rate: Mapping[str, npt.NDArray[Any]] = _Changes(samples, samples.rate)
        for remark in self._remarks:
            warn_caller(remark, SamplingWarning)
