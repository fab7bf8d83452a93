"""Where the values of a run lie in memory: groups of files that share one kind and one schema.

Internal. `Samples.groups` holds what this module defines; users see the arrays through `Samples`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import check_name
from kvmstats_fast.errors import unknown_stat
from kvmstats_fast.series import gather

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat

    #: Which sweeps or files are taken, ascending.
    Key: TypeAlias = slice | npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Group(ABC):
    """The files of one kind and schema, and their values."""

    schema: Schema
    kind: str
    places: dict[str, tuple[Stat, int]]  #: name to the statistic and where its values are
    columns: npt.NDArray[np.intp]  #: index of each file in ``Samples.files``, ascending

    @abstractmethod
    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Return the values of a statistic, (sweeps, files) or (sweeps, files, buckets), without a copy."""

    @abstractmethod
    def take_sweeps(self, key: Key) -> Group:
        """Return those sweeps: a view of a slice, a copy of an array of indices."""

    @abstractmethod
    def take_files(self, key: Key) -> Group:
        """Return those of the group's files: a view of a slice, a copy of an array of indices."""

    @abstractmethod
    def take_stats(self, names: Collection[str]) -> Group:
        """Return those of the group's statistics, without a copy."""

    @abstractmethod
    def contiguous(self) -> list[npt.NDArray[np.uint64]]:
        """Return the values of every statistic as a C-contiguous array, copied only where they are not one."""

    @property
    def words(self) -> int:
        """How many values a file has in a sweep."""
        return sum(stat.size for stat, _ in self.places.values())

    def with_arrays(self, arrays: Iterable[npt.NDArray[np.uint64]], columns: npt.NDArray[np.intp]) -> Columns:
        """Return a group of these files with an array for each of these statistics."""
        places = {name: (stat, index) for index, (name, (stat, _)) in enumerate(self.places.items())}
        return Columns(self.schema, self.kind, places, columns, tuple(arrays))

    @property
    def signature(self) -> tuple[str, Schema, tuple[str, ...], tuple[int, ...]]:
        """Return what was sampled of which files; two groups can be joined if theirs are equal."""
        return self.kind, self.schema, tuple(self.places), tuple(self.columns.tolist())


@dataclass(frozen=True, slots=True)
class Block(Group):
    """What a Sampler fills: one array for all statistics, a reading a row. A place is a word of the row."""

    values: npt.NDArray[np.uint64]  #: (sweeps, files, words)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Return the values of a statistic."""
        stat, word = self.places[name]
        return self.values[:, :, word : word + stat.size] if stat.shape else self.values[:, :, word]

    def take_sweeps(self, key: Key) -> Block:
        """Return those sweeps."""
        return self.with_values(self.values[key])

    def with_values(self, values: npt.NDArray[np.uint64]) -> Block:
        """Return other values of the same files."""
        return Block(self.schema, self.kind, self.places, self.columns, values)  # replace() takes four times as long

    def take_files(self, key: Key) -> Group:
        """Return those files."""
        if isinstance(key, slice) or self.is_dense:
            return replace(self, values=self.values[:, key], columns=self.columns[key])
        return self.with_arrays((self.view(name)[:, key] for name in self.places), self.columns[key])

    def take_stats(self, names: Collection[str]) -> Block:
        """Return those statistics, which stay where they are among the others."""
        return replace(self, places={name: place for name, place in self.places.items() if name in names})

    @property
    def is_dense(self) -> bool:
        """Whether most of the array is values of these statistics: a copy of the others would be for nothing."""
        return bool(2 * self.words > self.values.shape[2])

    def contiguous(self) -> list[npt.NDArray[np.uint64]]:
        """Copy every statistic into an array of its own."""
        return [*gather([self.view(name) for name in self.places])]


@dataclass(frozen=True, slots=True)
class Columns(Group):
    """What a recording is read into: an array for each statistic. A place is an index into them."""

    arrays: tuple[npt.NDArray[np.uint64], ...]  #: each (sweeps, files) or (sweeps, files, buckets)

    def view(self, name: str) -> npt.NDArray[np.uint64]:
        """Return the values of a statistic."""
        return self.arrays[self.places[name][1]]

    def take_sweeps(self, key: Key) -> Columns:
        """Return those sweeps."""
        return replace(self, arrays=tuple(array[key] for array in self.arrays))

    def take_files(self, key: Key) -> Columns:
        """Return those files."""
        return replace(self, arrays=tuple(array[:, key] for array in self.arrays), columns=self.columns[key])

    def take_stats(self, names: Collection[str]) -> Columns:
        """Return those statistics."""
        places = {name: place for name, place in self.places.items() if name in names}
        arrays = [self.arrays[index] for _, index in places.values()]
        return replace(self, places=places).with_arrays(arrays, self.columns)

    def contiguous(self) -> list[npt.NDArray[np.uint64]]:
        """Return the arrays."""
        return [np.ascontiguousarray(array) for array in self.arrays]


def join_groups(groups: Sequence[Group]) -> Group:
    """Return one group with the sweeps of several that have the same signature, one after the other."""
    first = groups[0]
    blocks = [group for group in groups if isinstance(group, Block) and group.is_dense]
    rows = {(*block.places.items(), block.values.shape[1:]) for block in blocks}
    if len(blocks) == len(groups) and len(rows) == 1:
        return replace(blocks[0], values=np.concatenate([block.values for block in blocks]))
    arrays = (np.concatenate([group.view(name) for group in groups]) for name in first.places)
    return first.with_arrays(arrays, first.columns)


def find_groups(groups: Sequence[Group], name: str) -> list[Group]:
    """Return the groups that have a statistic; KeyError if none has it, or groups of both kinds."""
    check_name(name)
    found = [group for group in groups if name in group.places]
    if not found:
        raise unknown_stat(name, (known for group in groups for known in group.places), "these samples")
    if len({group.kind for group in found}) > 1:
        raise KeyError(f"{name!r} is in VM and in vCPU files: ask for samples.vm[{name!r}] or samples.vcpu[{name!r}]")
    return found


def find_columns(groups: Sequence[Group], name: str) -> npt.NDArray[np.intp]:
    """Return the indices of the files that have a statistic, ascending; KeyError as `find_groups`."""
    return np.sort(np.concatenate([group.columns for group in find_groups(groups, name)]))


def join_columns(parts: Sequence[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]], axis: int = 1) -> npt.NDArray[Any]:
    """Return the arrays of several groups as one, in the order of their files, which are along an axis."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([columns for columns, _ in parts]))
    return np.concatenate([array for _, array in parts], axis=axis).take(order, axis=axis)


def find_key(indices: npt.NDArray[np.intp]) -> Key:
    """Return ascending indices as a slice if they are evenly spaced, of which numpy makes a view; else as they are."""
    steps = np.diff(indices)
    if not indices.size or (steps != steps[:1]).any():
        return indices if indices.size else slice(0)
    return slice(int(indices[0]), int(indices[-1]) + 1, int(steps[0]) if steps.size else 1)
