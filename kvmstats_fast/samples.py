"""Samples: what a run gives, as numpy arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast, overload

import numpy as np

from kvmstats_fast.abi import StatType

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvmstats_fast.schema import Schema, Stat

__all__ = ["FileInfo", "SampleError", "Samples"]

_Scalar = TypeVar("_Scalar", bound=np.generic)

_LARGEST = 10**300  # beyond it floats end; no kernel has such an exponent

#: Statistics of these types never fall, unless somebody clears them.
_GROWING = (StatType.CUMULATIVE, StatType.PEAK, StatType.LINEAR_HIST, StatType.LOG_HIST)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Whose statistics a column holds.

    Attributes
    ----------
    id : str
        The id string of the file: a label, not a key.
    kind : str
        ``"vm"`` or ``"vcpu"``.
    vcpu_id : int or None
        None for a VM.
    """

    id: str
    kind: str
    vcpu_id: int | None


class SampleError(NamedTuple):
    """A file that failed while it was sampled.

    Attributes
    ----------
    file : int
        Its index in ``samples.files``.
    sweep : int
        Its values are 0 and mean nothing from this sweep on (an index into ``samples.time``).
    error : Exception
        OSError or FormatError, with what happened.
    """

    file: int
    sweep: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Group(ABC):
    """The files of one kind and schema, and their values."""

    schema: Schema
    kind: str
    places: dict[str, tuple[Stat, int]]  #: name to the statistic and where its values are
    columns: npt.NDArray[np.intp]  #: index of each file

    @abstractmethod
    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Give the values of a statistic, (sweeps, files) or (sweeps, files, buckets), without a copy."""

    @abstractmethod
    def part(self, key: slice) -> Group:
        """Those sweeps, without a copy."""


@dataclass(frozen=True, slots=True)
class Block(Group):
    """What a Sampler fills: one array for all statistics, a reading a row. A place is a word of the row."""

    values: npt.NDArray[np.uint64]  #: (sweeps, files, words)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Give the values of a statistic."""
        stat, word = self.places[name]
        return self.values[:, :, word : word + stat.size] if stat.shape else self.values[:, :, word]

    def part(self, key: slice) -> Block:
        """Those sweeps."""
        return replace(self, values=self.values[key])


@dataclass(frozen=True, slots=True)
class Columns(Group):
    """What comes out of a file: an array for each statistic. A place is an index into them."""

    arrays: tuple[npt.NDArray[np.uint64], ...]  #: each (sweeps, files) or (sweeps, files, buckets)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Give the values of a statistic."""
        return self.arrays[self.places[name][1]]

    def part(self, key: slice) -> Columns:
        """Those sweeps."""
        return replace(self, arrays=tuple(array[key] for array in self.arrays))


def _joined(groups: Sequence[Group]) -> Group:
    """Put the sweeps of equal groups one behind the other."""
    first = groups[0]
    if all(isinstance(group, Block) for group in groups):
        blocks = cast("Sequence[Block]", groups)
        return replace(blocks[0], values=np.concatenate([block.values for block in blocks]))
    places = {name: (stat, index) for index, (name, (stat, _)) in enumerate(first.places.items())}
    arrays = tuple(np.concatenate([group.view(name) for group in groups]) for name in places)
    return Columns(first.schema, first.kind, places, first.columns, arrays)


def find_groups(groups: Sequence[Group], name: str) -> list[Group]:
    """Return the groups that have a statistic, all of one kind; KeyError if there is none or the kind is open."""
    found = [group for group in groups if name in group.places]
    if not found:
        names = dict.fromkeys(known for group in groups for known in group.places)
        near = get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise KeyError(f"no statistic {name!r} was sampled{hint}")
    if len({group.kind for group in found}) > 1:
        raise KeyError(f"{name!r} is in VM and in vCPU files: ask for samples.vm[{name!r}] or samples.vcpu[{name!r}]")
    return found


class Samples:
    """The sweeps of a run, in numpy arrays: T sweeps of n files.

    ``samples["exits"]`` are the raw values of a statistic, uint64, shape ``(T, n)``, a histogram's ``(T, n, buckets)``,
    one column for each file that has the statistic (`columns`); a view, unless files of different kernels are mixed.
    ``samples[10:20]`` are those sweeps, views too.

    Attributes
    ----------
    time : numpy.ndarray
        int64 (T,): CLOCK_MONOTONIC in ns at the start of each sweep.
    sweep_ns : numpy.ndarray
        int64 (T,): how long each sweep took, in ns.
    tick : numpy.ndarray
        uint64 (T,): number of each sweep on the schedule; a gap is ticks that were missed.
    interval : float
        Seconds between ticks; 0: as fast as possible.
    wall_offset : int
        ns to add to `time` for CLOCK_REALTIME, as it was when the run started.
    missed : int
        Ticks that were not sampled because something took longer than an interval: ``len(samples) + missed`` is the
        number of ticks there were.
    overruns : int
        Those of `missed` for which a slow reader of a stream had left no room. (0 for a slice: not known of parts.)
    files : tuple of FileInfo
        The files, in the order they were given.
    errors : tuple of SampleError
        Files that failed; their columns mean nothing from then on (deltas 0, rates NaN).
    interrupted : bool
        Whether Ctrl-C ended the run.
    """

    __slots__ = (
        "_groups",
        "errors",
        "files",
        "interrupted",
        "interval",
        "missed",
        "overruns",
        "sweep_ns",
        "tick",
        "time",
        "wall_offset",
    )

    def __init__(  # noqa: PLR0913 - what a run knows
        self,
        groups: tuple[Group, ...],
        files: tuple[FileInfo, ...],
        clock: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]],
        *,
        interval: float = 0.0,
        wall_offset: int = 0,
        missed: int = 0,
        overruns: int = 0,
        errors: tuple[SampleError, ...] = (),
        interrupted: bool = False,
    ) -> None:
        self._groups = groups
        self.files = files
        self.time, self.sweep_ns, self.tick = clock
        self.interval = interval
        self.wall_offset = wall_offset
        self.missed = missed
        self.overruns = overruns
        self.errors = errors
        self.interrupted = interrupted

    def _like(
        self,
        groups: tuple[Group, ...],
        clock: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]],
        missed: int,
        errors: tuple[SampleError, ...],
    ) -> Samples:
        return Samples(
            groups,
            self.files,
            clock,
            interval=self.interval,
            wall_offset=self.wall_offset,
            missed=missed,
            errors=errors,
            interrupted=self.interrupted,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics that were sampled, each once."""
        return tuple(dict.fromkeys(name for group in self._groups for name in group.places))

    @property
    def vm(self) -> Samples:
        """The same sweeps, of the VM files only."""
        return self._of_kind("vm")

    @property
    def vcpu(self) -> Samples:
        """The same sweeps, of the vCPU files only."""
        return self._of_kind("vcpu")

    def _of_kind(self, kind: str) -> Samples:
        kept = [index for index, info in enumerate(self.files) if info.kind == kind]
        place = {index: new for new, index in enumerate(kept)}
        groups = tuple(
            replace(group, columns=np.array([place[index] for index in group.columns.tolist()], np.intp))
            for group in self._groups
            if group.kind == kind
        )
        errors = tuple(error._replace(file=place[error.file]) for error in self.errors if error.file in place)
        part = self._like(groups, (self.time, self.sweep_ns, self.tick), self.missed, errors)
        part.files = tuple(self.files[index] for index in kept)
        part.overruns = self.overruns
        return part

    def stat(self, name: str) -> Stat:
        """Return the descriptor of a statistic: its type, unit and scale."""
        return find_groups(self._groups, name)[0].places[name][0]

    def columns(self, name: str) -> tuple[FileInfo, ...]:
        """Whose values the columns of ``samples[name]`` are."""
        return tuple(self.files[index] for index in self._columns(name))

    def _columns(self, name: str) -> npt.NDArray[np.intp]:
        found = find_groups(self._groups, name)
        return np.sort(np.concatenate([group.columns for group in found]))

    @overload
    def __getitem__(self, key: str) -> npt.NDArray[np.uint64]: ...
    @overload
    def __getitem__(self, key: slice) -> Samples: ...
    def __getitem__(self, key: str | slice) -> npt.NDArray[np.uint64] | Samples:
        if isinstance(key, slice):
            return self._slice(key)
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is neither the name of a statistic nor a slice of sweeps")
        found = find_groups(self._groups, key)
        if len(found) == 1:
            return found[0].view(key)
        shapes = {group.places[key][0].shape for group in found}
        if len(shapes) > 1:
            raise KeyError(f"{key!r} has {len(shapes)} different numbers of buckets in these files: sample them apart")
        order = np.argsort(np.concatenate([group.columns for group in found]))
        return np.concatenate([group.view(key) for group in found], axis=1)[:, order]

    def _slice(self, key: slice) -> Samples:
        start, stop, step = key.indices(len(self))
        if step <= 0:
            raise ValueError("samples are in the order of time: a slice's step must be positive")
        clock = (self.time[key], self.sweep_ns[key], self.tick[key])
        groups = tuple(group.part(key) for group in self._groups)
        if (start, stop, step) == (0, len(self), 1):
            part = self._like(groups, clock, self.missed, self.errors)
            part.overruns = self.overruns
            return part
        # The ticks that were missed before a sweep go with it, so that parts add up to the whole.
        missed = 0
        if stop > start:
            before = int(self.tick[start - 1]) if start else int(self.tick[0]) - 1 - self._missed_before_first()
            missed = int(self.tick[stop - 1]) - before - (stop - start)
        errors = tuple(
            error._replace(sweep=max(0, -(-(error.sweep - start) // step)))
            for error in self.errors
            if error.sweep < stop
        )
        return self._like(groups, clock, missed, errors)

    def _missed_before_first(self) -> int:
        return self.missed - (int(self.tick[-1]) - int(self.tick[0]) + 1 - len(self))

    def delta(self, name: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
        """Change of a statistic from each sweep to the next, raw.

        Returns
        -------
        numpy.ndarray
            Shape ``(T - 1, n)``, a histogram's ``(T - 1, n, buckets)``. uint64 for what only grows (cumulative, peak,
            histograms): where such a value went backwards somebody cleared it (`resets`), and the change is the new
            value. int64 for what goes up and down. 0 where a file had failed.
        """
        values = self[name]
        before, after = values[:-1], values[1:]
        change = after - before
        if self.stat(name).type not in _GROWING:
            signed = change.view(np.int64)
            return self._blank(name, signed, 0)
        fell = self._fell(name, before, after)
        if fell.any():
            change = np.where(fell if change.ndim == fell.ndim else fell[..., None], after, change)
        return self._blank(name, change, 0)

    def _fell(self, name: str, before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        fell: npt.NDArray[np.bool_] = after < before
        if fell.ndim == 3:
            fell = np.any(fell, axis=2)  # a histogram is cleared as a whole
        return self._blank(name, fell, 0)

    def resets(self, name: str) -> npt.NDArray[np.bool_]:
        """Where a statistic that only grows went backwards, because it was cleared (through debugfs).

        Returns
        -------
        numpy.ndarray
            bool, shape ``(T - 1, n)``; all False for statistics that go up and down.
        """
        values = self[name]
        if self.stat(name).type not in _GROWING:
            return np.zeros((max(len(values) - 1, 0), values.shape[1]), np.bool_)
        return self._fell(name, values[:-1], values[1:])

    def rate(self, name: str) -> npt.NDArray[np.float64]:
        """Change per second in base units, from each sweep to the next.

        Returns
        -------
        numpy.ndarray
            float64, the shape of `delta`. ``halt_wait_ns`` gives seconds per second; a histogram counts per second
            and bucket. NaN where a file had failed.
        """
        change = self.delta(name)
        stat = self.stat(name)
        rate = change.astype(np.float64)
        if not stat.is_histogram:
            factor = float(min(stat.factor, _LARGEST))  # 10**9 is exact as a float, 10**-9 is not
            rate = rate / factor if stat.exponent < 0 else rate * factor
        seconds = np.diff(self.time) / 1e9
        seconds[seconds == 0] = np.nan  # two sweeps in one ns: the rate is not known
        rate /= seconds.reshape(-1, *[1] * (rate.ndim - 1))
        return self._blank(name, rate, np.nan)

    def _blank(self, name: str, changes: npt.NDArray[_Scalar], value: float) -> npt.NDArray[_Scalar]:
        """Overwrite the changes of files that had failed; the array is ours to write to, whatever its dtype."""
        columns = self._columns(name).tolist() if self.errors else []
        for error in self.errors:
            if error.file in columns:
                changes[max(error.sweep - 1, 0) :, columns.index(error.file)] = value
        return changes

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """Put parts that follow each other together, as those of one stream; one part alone is not copied.

        Raises
        ------
        ValueError
            If there are none, if they are of different files or statistics, or not in the order of time.
        """
        if not parts:
            raise ValueError("no samples to concatenate")
        first = parts[0]
        if len(parts) == 1:
            return first
        for before, after in pairwise(parts):
            if after.files != before.files or after._sampled != before._sampled:
                raise ValueError("these samples are of different files or statistics")
            if len(before) and len(after) and after.time[0] < before.time[-1]:
                raise ValueError("these samples are not in the order of time")
        groups = tuple(_joined(groups) for groups in zip(*(part._groups for part in parts), strict=True))
        clock = (
            np.concatenate([part.time for part in parts]),
            np.concatenate([part.sweep_ns for part in parts]),
            np.concatenate([part.tick for part in parts]),
        )
        errors: dict[int, SampleError] = {}
        start = 0
        for part in parts:
            for error in part.errors:
                errors.setdefault(error.file, error._replace(sweep=error.sweep + start))
            start += len(part)
        result = first._like(groups, clock, sum(part.missed for part in parts), tuple(errors.values()))
        result.overruns = sum(part.overruns for part in parts)
        result.interrupted = any(part.interrupted for part in parts)
        return result

    @property
    def _sampled(self) -> list[tuple[str, Schema, list[str], list[int]]]:
        """What was sampled of which files."""
        return [(group.kind, group.schema, list(group.places), group.columns.tolist()) for group in self._groups]

    def __len__(self) -> int:
        return len(self.time)

    def __repr__(self) -> str:
        kinds = [info.kind for info in self.files]
        seconds = (int(self.time[-1]) - int(self.time[0])) / 1e9 if len(self) else 0.0
        text = f"{len(self)} sweeps of {kinds.count('vm')} VM and {kinds.count('vcpu')} vCPU files in {seconds:.6g} s"
        text += f", {len(self.names)} statistics, {self.missed} ticks missed"
        if self.errors:
            text += f", {len(self.errors)} files failed"
        return f"<Samples: {text}{', interrupted' if self.interrupted else ''}>"
