"""Families: what becomes of the values of a sweep; all that does not change from sweep to sweep is worked out once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from itertools import chain, compress, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from kvmstats_fast.abi import StatType
from kvmstats_fast.export.names import Family, bucket_bounds, find_sum, name_family

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.export.ledger import Gone, Values
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.groups import Block
    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat


#: Names that are not a statistic's.
RESERVED = ("kvm_vm", "kvm_vm_info", "kvm_vm_vcpus")
_SUMS = {"counter": "added up over the VM's vCPUs", "histogram": "added up over the VM's vCPUs"}
_PEAK = "the highest of the VM's vCPUs"


class _Filled(NamedTuple):
    """The values of a table in one sweep.

    Attributes
    ----------
    raw : numpy.ndarray
        uint64, (rows, words).
    scaled : numpy.ndarray
        float64, (rows, words that are shown by themselves), in base units.
    columns : list of list of float
        The same, word by word.
    """

    raw: Values
    scaled: npt.NDArray[np.float64]
    columns: list[list[float]]


class _Series(NamedTuple):
    """Samples that one statistic of one table makes.

    Attributes
    ----------
    table : int
    each : int
        How many samples a row makes.
    names, labels
        Of each sample, row by row.
    read : callable
        Returns their values.
    """

    table: int
    each: int
    names: Iterable[str]
    labels: list[dict[str, str]]
    read: Callable[[_Filled], list[float]]


class _Table(ABC):
    """Rows of values, each of a file, or of the vCPUs of a VM added up."""

    def __init__(self, schema: Schema, kind: str, places: Mapping[str, tuple[Stat, int]]) -> None:
        self.schema, self.kind, self.places = schema, kind, places
        self.labels: list[dict[str, str]] = []
        self.files: list[list[int]] = []  # that each row is of
        self._shown: list[int] = []  # words that are shown by themselves, and how they are scaled
        self._signed: list[int] = []
        self._factors: list[float] = []
        self._divisors: list[float] = []
        self._buckets: dict[tuple[float, ...], list[dict[str, str]]] = {}

    @abstractmethod
    def fill(self, values: Sequence[Values]) -> Values:
        """Return the rows, from the values of each group of files."""

    def show(self, stat: Stat, word: int) -> int:
        """Have a word of each row scaled, and return its column."""
        column, known = len(self._shown), not stat.unknown
        if known and stat.type == StatType.INSTANT:
            self._signed.append(column)
        self._shown.append(word)
        factor = stat.float_factor if known else 1.0
        self._factors.append(factor if stat.exponent > 0 else 1.0)
        self._divisors.append(factor if stat.exponent < 0 else 1.0)
        return column

    def scale(self, raw: Values) -> _Filled:
        """Return the rows with what is shown, in base units: all of it in a few steps."""
        chosen = raw[:, self._shown]
        scaled = chosen.astype(np.float64)
        scaled[:, self._signed] = chosen[:, self._signed].view(np.int64)
        scaled *= self._factors
        scaled /= self._divisors
        return _Filled(raw, scaled, scaled.T.tolist())

    def bucket_labels(self, bounds: list[float], more: int) -> list[dict[str, str]]:
        """Return the labels of a histogram's samples: those of its buckets, and of `more` others; made once."""
        key = (*bounds, float(more))
        if key not in self._buckets:
            edges = [floatToGoString(bound) for bound in (*bounds, np.inf)]
            self._buckets[key] = [
                one for labels in self.labels for one in (*({**labels, "le": edge} for edge in edges), *[labels] * more)
            ]
        return self._buckets[key]


class _Files(_Table):
    """A row for each file of a group."""

    def __init__(self, group: int, block: Block, files: Sequence[FileInfo]) -> None:
        super().__init__(block.schema, block.kind, block.places)
        self._group = group
        for index in block.columns.tolist():
            info = files[index]
            self.files.append([index])
            self.labels.append({"vm": info.vm} | ({} if info.vcpu_id is None else {"vcpu": str(info.vcpu_id)}))

    def fill(self, values: Sequence[Values]) -> Values:
        """Return them as they are."""
        return values[self._group]


class _Sums(_Table):
    """A row for each VM all of whose vCPUs are in a group: what they have together."""

    def __init__(self, group: int, block: Block, rows: Mapping[str, list[int]], gone: Gone) -> None:
        super().__init__(block.schema, block.kind, block.places)
        self._group = group
        columns = block.columns.tolist()
        self._order = np.array([row for some in rows.values() for row in some], np.intp)
        self._starts = np.cumsum([0, *map(len, rows.values())])[:-1]
        self._peaks = [word for stat, word in block.places.values() if stat.type == StatType.PEAK and not stat.unknown]
        self._more = np.zeros((len(rows), block.values.shape[2]), np.uint64)
        for place, (vm, some) in enumerate(rows.items()):
            self.labels.append({"vm": vm})
            self.files.append([columns[row] for row in some])
            for counted in gone.get(vm, {}).values():
                for name, value in counted.items():
                    if name in block.places:
                        word = block.places[name][1]
                        self._more[place, word : word + value.size] += value

    def fill(self, values: Sequence[Values]) -> Values:
        """Add them up."""
        rows = values[self._group][self._order]
        sums: Values = np.add.reduceat(rows, self._starts, axis=0) + self._more
        if self._peaks:
            sums[:, self._peaks] = np.maximum.reduceat(rows[:, self._peaks], self._starts, axis=0)
        return sums


class _Mixed(_Table):
    """A row for each VM whose vCPUs are in several groups: of the statistics that all of them have."""

    def __init__(self, tables: Sequence[_Table], rows: Mapping[str, list[tuple[int, int]]]) -> None:
        parts = [[tables[table] for table, _ in some] for some in rows.values()]
        every = [one for some in parts for one in some]
        names = [name for name in every[0].places if all(name in one.places for one in every)]
        words = iter(np.cumsum([0, *(every[0].places[name][0].size for name in names)]).tolist())
        super().__init__(every[0].schema, every[0].kind, {n: (every[0].places[n][0], next(words)) for n in names})
        self._peaks = [word for stat, word in self.places.values() if stat.type == StatType.PEAK and not stat.unknown]
        self._tables = tables
        self._parts = [
            [(table, row, [w for n in names for w in _words(*tables[table].places[n])]) for table, row in some]
            for some in rows.values()
        ]
        for vm, some in rows.items():
            self.labels.append({"vm": vm})
            self.files.append([index for table, row in some for index in tables[table].files[row]])

    def fill(self, values: Sequence[Values]) -> Values:
        """Add up what was added up in each group."""
        filled = [table.fill(values) for table in self._tables]
        rows = []
        for parts in self._parts:
            some = np.stack([filled[table][row, words] for table, row, words in parts])
            rows.append(some.sum(axis=0, dtype=np.uint64))
            rows[-1][self._peaks] = some.max(axis=0)[self._peaks]
        return np.stack(rows)


def _words(stat: Stat, word: int) -> range:
    return range(word, word + stat.size)


class Families:
    """The families of metrics of a set of files.

    Parameters
    ----------
    groups : sequence of Block
        The files, by kind and schema.
    files : sequence of FileInfo
    per_vcpu : bool
        Whether each vCPU has its samples, instead of a VM's together.
    patterns : sequence of str or None
        Names and globs of statistics; None: all.
    gone : dict
        What vCPUs that were unplugged had counted, which stays in the sum of their VM: a counter does not fall.
    """

    def __init__(
        self,
        groups: Sequence[Block],
        files: Sequence[FileInfo],
        *,
        per_vcpu: bool,
        patterns: Sequence[str] | None = None,
        gone: Gone | None = None,
    ) -> None:
        self._tables: list[_Table] = []
        vcpus = [(number, group) for number, group in enumerate(groups) if group.kind == "vcpu"]
        for number, group in enumerate(groups):
            if group.kind == "vm" or per_vcpu:
                self._tables.append(_Files(number, group, files))
        if not per_vcpu:
            self._tables += _add_up(vcpus, files, gone or {})
        self._vms = [info.vm for info in files]
        self._per_vcpu = per_vcpu
        self._families: list[tuple[Family, list[_Series]]] = []
        self._plan(patterns)

    def _plan(self, patterns: Sequence[str] | None) -> None:
        found: dict[tuple[str, str], tuple[Family, list[_Series]]] = {}
        taken = set(RESERVED)
        for number, table in enumerate(self._tables):
            for name, stat, word in _choose(table, patterns):
                if (table.kind, name) not in found:
                    family = name_family(table.kind, stat, taken)
                    taken.add(family.name)
                    found[table.kind, name] = self._explain(table.kind, stat, family), []
                family, series = found[table.kind, name]
                series.append(_series(number, table, family, stat, word))
        self._families = list(found.values())

    def _explain(self, kind: str, stat: Stat, family: Family) -> Family:
        if kind == "vm" or self._per_vcpu:
            return family
        how = _PEAK if stat.type == StatType.PEAK else _SUMS.get(family.type, "added up over the VM's vCPUs")
        return family._replace(help=f"{family.help.removesuffix(').')}; {how}).")

    def collect(self, values: Sequence[Values], failed: Collection[int]) -> Iterator[Metric]:
        """Yield the families with their samples.

        Parameters
        ----------
        values : sequence of numpy.ndarray
            Of each group: uint64, (files, words).
        failed : collection of int
            Indices of files that could not be read: they have no samples, nor has a sum that they are part of.
        """
        filled = [table.scale(table.fill(values)) for table in self._tables]
        good = [self._find_good(table, failed) for table in self._tables]
        for family, series in self._families:
            metric = Metric(family.name, family.help, family.type)
            for one in series:
                samples: Iterable[Sample] = map(Sample, one.names, one.labels, one.read(filled[one.table]))
                keep = good[one.table]
                if keep is not None:
                    samples = compress(samples, chain.from_iterable(repeat(row, one.each) for row in keep))
                metric.samples += samples
            if metric.samples:
                yield metric

    def _find_good(self, table: _Table, failed: Collection[int]) -> list[bool] | None:
        """Return which rows of a table can be shown; None: all."""
        if not failed:
            return None
        return [not any(index in failed for index in some) for some in table.files]


def _choose(table: _Table, patterns: Sequence[str] | None) -> Iterator[tuple[str, Stat, int]]:
    chosen = None if patterns is None else {n for one in patterns for n in table.schema.matches(one)}
    for name, (stat, word) in table.places.items():
        if chosen is None or name in chosen:
            yield name, stat, word


def _add_up(groups: Sequence[tuple[int, Block]], files: Sequence[FileInfo], gone: Gone) -> Iterator[_Table]:
    """Yield tables of the sums of each VM's vCPUs."""
    vcpus = Counter(info.vm for info in files if info.kind == "vcpu")
    partial: list[_Table] = []
    mixed: dict[str, list[tuple[int, int]]] = {}
    for number, group in groups:
        rows: dict[str, list[int]] = {}
        for row, index in enumerate(group.columns.tolist()):
            rows.setdefault(files[index].vm, []).append(row)
        whole = {vm: some for vm, some in rows.items() if len(some) == vcpus[vm]}
        if whole:
            yield _Sums(number, group, whole, gone)
        rest = {vm: some for vm, some in rows.items() if vm not in whole}
        if rest:
            # What is gone is added once.
            partial.append(_Sums(number, group, rest, {vm: gone.get(vm, {}) for vm in rest if vm not in mixed}))
            for row, vm in enumerate(rest):
                mixed.setdefault(vm, []).append((len(partial) - 1, row))
    if mixed:
        yield _Mixed(partial, mixed)


# ---- the samples of a statistic


def _series(number: int, table: _Table, family: Family, stat: Stat, word: int) -> _Series:
    if family.type == "histogram":
        return _histogram(number, table, family, stat, word)
    name = f"{family.name}_total" if family.type == "counter" else family.name
    columns = [table.show(stat, word + i) for i in range(stat.size)]
    first = columns[0]
    if stat.shape:
        labels = [{**one, "index": str(i)} for one in table.labels for i in range(stat.size)]
        return _Series(
            number, stat.size, repeat(name), labels, lambda filled: filled.scaled[:, columns].ravel().tolist()
        )
    return _Series(number, 1, repeat(name), table.labels, lambda filled: filled.columns[first])


def _histogram(number: int, table: _Table, family: Family, stat: Stat, word: int) -> _Series:
    bounds = bucket_bounds(stat)
    total = find_sum(stat, {name: one for name, (one, _) in table.places.items()})
    names = [f"{family.name}_bucket"] * stat.size + [f"{family.name}_count"]
    names += [] if total is None else [f"{family.name}_sum"]
    each = len(names)
    column = None if total is None else table.show(total, table.places[total.name][1])

    def read(filled: _Filled) -> list[float]:
        found = np.empty((len(filled.raw), each))
        np.cumsum(filled.raw[:, word : word + stat.size], axis=1, out=found[:, : stat.size])
        found[:, stat.size] = found[:, stat.size - 1]
        if column is not None:
            found[:, -1] = filled.scaled[:, column]
        flat: list[float] = found.ravel().tolist()
        return flat

    return _Series(number, each, names * len(table.labels), table.bucket_labels(bounds, each - stat.size), read)
