"""Plan: which statistics are read of which files, and where the values land."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakSet

import numpy as np

from kvmstats_fast._arguments import article, check_integer
from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._text import printable
from kvmstats_fast.abi import StatType
from kvmstats_fast.encoding import kind_of
from kvmstats_fast.errors import warn_caller
from kvmstats_fast.file_info import MOST_LABEL, FileInfo, Known, label_vms
from kvmstats_fast.groups import Block
from kvmstats_fast.samples import SampleError, Samples
from kvmstats_fast.sampling.vcpu_threads import open_schedstats
from kvmstats_fast.sampling.words import Row, choose_rows
from kvmstats_fast.schedstat import STATS, with_thread
from kvmstats_fast.stats_file import StatsFile

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvmstats_fast.handle import Handle

    #: What can be sampled: files, or lists of them, such as a VirtualMachine; or these by labels of the caller's.
    StatsFiles: TypeAlias = (
        Iterable[StatsFile | Iterable[StatsFile]] | Mapping[str, StatsFile | Iterable[StatsFile | Iterable[StatsFile]]]
    )

_FILES = ffi.typeof("struct kvmstats_file[]")
#: Bytes that a sweep takes besides its values: its time, how long it took, its tick.
_CLOCK_BYTES = 24
#: Memory of this size is a piece of pages that are there.
_PART_OF_A_PAGE = 512
IN_USE = "this Sampler is in use by a run, a stream or another thread; each needs a Sampler of its own"


class NothingToSample(ValueError):  # noqa: N818 - users catch ValueError
    """No file has a chosen statistic."""


class _Read(NamedTuple):
    """One of the reads of a sweep.

    Attributes
    ----------
    file : int
        Which file it is of.
    handle : Handle
        What is read: the file, or the schedstat of the vCPU's thread.
    word : int
        Of the file's row, at which its values start.
    """

    file: int
    handle: Handle
    word: int


class _Origin(NamedTuple):
    """Attributes of Samples that say where they come from."""

    files: tuple[FileInfo, ...]
    host: str
    kernel: str


class Plan:
    """Which statistics are read of which files: what a Sampler, its runs and its streams share.

    Parameters
    ----------
    files, stats, threads, sched
        As for `Sampler`.
    tell : callable
        Called with a message about vCPUs that have no schedstat, and SamplingWarning. Default: warn.

    Attributes
    ----------
    files : list of StatsFile
        Those that have one of the chosen statistics.
    num_files : int
        How many these are.
    num_reads : int
        How many reads a sweep takes: one a file, and one more for each vCPU whose thread's schedstat is read.
    groups : tuple of Block
        The files of one kind and schema each, without room for a sweep.
    threads : int
        How many share a sweep of a run.
    sweep_bytes : int
        Size of one sweep, its times included.
    scratch_words : int
        Room that each thread needs to pick the words of a row out of what it read.

    Raises
    ------
    KeyError, TypeError, ValueError
        As `Sampler`.
    """

    def __init__(
        self,
        files: StatsFiles,
        stats: str | Iterable[str] | None,
        threads: int,
        *,
        sched: bool = False,
        tell: Callable[[str, type[Warning]], object] = warn_caller,
    ) -> None:
        by_vm = _check_files(files)
        self.threads = check_integer("threads", threads, 1, lib.KVMSTATS_MAX_THREADS)
        schedstats = open_schedstats([file for some in by_vm.values() for file in some], tell) if sched else {}
        opened = [
            (file, vm, with_thread(file.schema) if file in schedstats else file.schema)
            for vm, some in by_vm.items()
            for file in some
        ]
        # By identity: the hash of a schema takes as long as all else that is done for a file here.
        schemas = {id(schema): (schema, file.schema.num_values) for file, _, schema in opened}
        rows = choose_rows(dict(schemas.values()), stats, [stat.name for stat in STATS] if sched else ())
        row_of = {key: rows[schema] for key, (schema, _) in schemas.items()}
        self.files: list[StatsFile] = []
        # Of all that were given, so that what is chosen of them does not change their labels.
        self._known: list[Known] = []
        self._chosen: list[int] = []
        self._origin: _Origin | None = None
        members: dict[tuple[Row, str], list[int]] = {}
        fields: list[tuple[Any, ...]] = []
        self.reads: list[_Read] = []
        for place, (file, vm, schema) in enumerate(opened):
            known, row = _describe(file, vm), row_of[id(schema)]
            self._known.append(known)
            if row.places:
                number = len(self.files)
                members.setdefault((row, known.kind), []).append(number)
                self.files.append(file)
                self._chosen.append(place)
                self.reads.append(_Read(number, file.handle, 0))
                fields.append(row.file.read_from(file.handle.source))
                if row.thread.width:
                    self.reads.append(_Read(number, schedstats[file], row.file.width))
                    fields.append(row.thread.read_from(schedstats[file].source))
        if not fields:
            raise NothingToSample("there is nothing to sample: no files, or none with statistics")
        self.num_files, self.num_reads = len(self.files), len(fields)
        groups, words = [], 0
        for (row, kind), columns in members.items():
            room = np.empty((0, len(columns), row.width), np.uint64)
            groups.append(Block(row.schema, kind, row.places, np.array(columns, np.intp), room))
            words += len(columns) * row.width
        self.groups = tuple(groups)
        self.sweep_bytes = 8 * words + _CLOCK_BYTES
        self.scratch_words = max([row.scratch_words for row in rows.values()])
        self._rows = rows  # the C structs point into what they keep
        self._structs = ffi.new(_FILES, fields)

    @property
    def origin(self) -> _Origin:
        """Where the samples come from. Worked out when first asked for."""
        if self._origin is None:
            machine, vms = os.uname(), label_vms(self._known)
            host, kernel = machine.nodename, f"{machine.release} {machine.machine}"
            files = tuple(
                FileInfo(*self._known[place][:-1], vms[place], file.handle.owner.host or host)
                for place, file in zip(self._chosen, self.files, strict=True)
            )
            self._origin = _Origin(files, host, kernel)
        return self._origin

    @cached_property
    def counters(self) -> tuple[tuple[str, int, int], ...]:
        """Cumulative statistics of one value: name, index of the group, and word of its rows."""
        return tuple(
            (name, index, word)
            for index, group in enumerate(self.groups)
            for name, (stat, word) in group.places.items()
            if stat.type == StatType.CUMULATIVE and not stat.shape
        )

    def copy_structs(self) -> Any:
        """Return a ``struct kvmstats_file[]`` of the reads, none of which has failed or has rows yet."""
        structs = ffi.new(_FILES, self.num_reads)
        ffi.memmove(structs, self._structs, ffi.sizeof(structs))
        return structs

    def why_failed(self, read: _Read, struct: Any) -> Exception:
        """Return what to raise for a read that failed, as its C struct says."""
        file = self.files[read.file]
        lost = file.handle.lost
        if lost is not None:
            return copy(lost)  # a run may attach its samples to it
        if file.closed:
            return ValueError(f"StatsFile {printable(file.id)} was closed while it was being sampled")
        return read.handle.failure(struct.error, struct.position + struct.got)


class Rows:
    """Room for a number of sweeps of a plan: the arrays, and the C structs that point into them.

    Attributes
    ----------
    plan : Plan
    groups : tuple of Block
        With values of shape (slots, files, words).
    time, sweep_ns, tick : numpy.ndarray
        Of shape (slots,), as in `Samples`.
    structs : struct kvmstats_file[]
    scratch : uint64_t *
    """

    def __init__(self, plan: Plan, slots: int) -> None:
        self.plan = plan
        # Filled, so that every page is there before a run's clock starts: a page fault costs more than a read.
        self.groups = tuple(
            group.with_values(_filled((slots, *group.values.shape[1:]), np.uint64)) for group in plan.groups
        )
        self.time, self.sweep_ns = _filled(slots, np.int64), _filled(slots, np.int64)
        self.tick = _filled(slots, np.uint64)
        self.scratch = ffi.NULL
        if plan.scratch_words:
            scratch = _filled(plan.scratch_words * plan.threads, np.uint64)
            self.scratch = ffi.from_buffer("uint64_t[]", scratch, True)
        structs = self.structs = plan.copy_structs()
        self._keep = [ffi.from_buffer("uint64_t[]", group.values, True) for group in self.groups]
        rows: list[Any] = [None] * plan.num_files
        for group, base in zip(self.groups, self._keep, strict=True):
            _, columns, width = group.values.shape
            for place, index in enumerate(group.columns.tolist()):
                rows[index] = base + place * width, columns * width
        for read, struct in zip(plan.reads, structs, strict=True):
            row, step = rows[read.file]
            struct.row, struct.step = row + read.word, step

    def find_errors(self, start: int, stop: int) -> tuple[SampleError, ...]:
        """Return the files that had failed by sweep `stop` of a run; the sweeps they name count from `start`."""
        failed: dict[int, tuple[_Read, Any]] = {}
        for read, struct in zip(self.plan.reads, self.structs, strict=True):
            if struct.error and struct.failed_at < stop:
                before = failed.get(read.file)
                if before is None or struct.failed_at < before[1].failed_at:
                    failed[read.file] = read, struct
        return tuple(
            SampleError(index, max(struct.failed_at - start, 0), self.plan.why_failed(read, struct))
            for index, (read, struct) in failed.items()
        )

    def blank(self, groups: Iterable[Block], errors: Iterable[SampleError]) -> None:
        """Set to 0 what was read of files that had failed: of a vCPU whose thread has ended the file lives on."""
        if self.plan.num_reads > self.plan.num_files:
            for error in errors:
                for group in groups:
                    group.values[error.sweep :, group.columns == error.file] = 0

    def make_samples(self, slots: slice, *, copy: bool, **about: Any) -> Samples:
        """Return some of the sweeps as Samples; `about` are more of their attributes."""
        groups = tuple(group.take_sweeps(slots) for group in self.groups)
        time, sweep_ns, tick = self.time[slots], self.sweep_ns[slots], self.tick[slots]
        if copy:
            groups = tuple(group.with_values(group.values.copy()) for group in groups)
            time, sweep_ns, tick = time.copy(), sweep_ns.copy(), tick.copy()
        self.blank(groups, about.get("errors", ()))
        files, host, kernel = self.plan.origin
        return Samples(groups, files, time, sweep_ns, tick, host=host, kernel=kernel, **about)


class LiveRow(Rows):
    """Room for one sweep, which each sweep fills again; and the lock of whoever reads by this plan.

    Attributes
    ----------
    c : struct kvmstats_sweep *
        For ``lib.kvmstats_sweep``, ``kvmstats_lock`` and ``kvmstats_unlock``.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, 1)
        self.c = ffi.new(
            "struct kvmstats_sweep *", (self.structs, plan.num_reads, self.scratch, plan.scratch_words, 0, 0)
        )
        _LIVE_ROWS.add(self)

    def check(self, status: int, *, strict: bool) -> None:
        """Raise what is wrong with a sweep for which ``lib.kvmstats_sweep`` returned `status`."""
        if status < 0:
            raise RuntimeError(IN_USE)
        errors = self.find_errors(0, 1) if status else ()
        if status == self.plan.num_reads or (strict and status):
            raise errors[0].error
        self.blank(self.groups, errors)


_LIVE_ROWS: WeakSet[LiveRow] = WeakSet()


def _unlock_all() -> None:
    """In a forked child: of the threads that held a lock none is here."""
    for live in _LIVE_ROWS:
        live.c.owner = 0


os.register_at_fork(after_in_child=_unlock_all)


def _filled(shape: int | tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Return an array of zeros whose pages are there, unlike those of `numpy.zeros`."""
    array = np.zeros(shape, dtype)
    if array.nbytes > _PART_OF_A_PAGE:
        array.fill(0)
    return array


def _check_files(files: StatsFiles) -> dict[str, list[StatsFile]]:
    """Return the files by the caller's label of their VM, ``""`` if there is none; all are open StatsFiles."""
    if not isinstance(files, Mapping):
        return {"": _flatten("files", files)}
    by_vm: dict[str, list[StatsFile]] = {}
    for vm, some in files.items():
        _check_label(vm)
        name = f"files[{vm!r}]"
        if vm in by_vm:
            raise ValueError(f"{name} is there twice; each VM must have a label of its own")
        by_vm[vm] = _flatten(name, [some] if isinstance(some, StatsFile) else some)
        for (kind, vcpu_id), count in Counter((file.kind, file.vcpu_id) for file in by_vm[vm]).items():
            if count > 1:
                what = "files of a VM" if kind == "vm" else f"files of vCPU {vcpu_id}"
                raise ValueError(f"{name} has {count} {what}; a label joins the files of one VM: give each VM its own")
    return by_vm


def _check_label(vm: object) -> None:
    """Raise unless this can be a label in every table and file."""
    if not isinstance(vm, str):
        raise TypeError(f"files has {article(vm)} as the label of a VM; it must be a str")
    if not vm or any("\ud800" <= character <= "\udfff" for character in vm):
        raise ValueError(f"files has {vm!r} as the label of a VM; it must be text, and not empty")
    if len(vm) > MOST_LABEL:
        raise ValueError(
            f"files has '{printable(vm)}' as the label of a VM, of {len(vm)} characters; it may have {MOST_LABEL}"
        )


def _flatten(name: str, files: Iterable[StatsFile | Iterable[StatsFile]]) -> list[StatsFile]:
    """Return the files of a list, and of the lists in it."""
    wanted = "it must be StatsFiles, or lists of them"
    if isinstance(files, StatsFile) or not isinstance(files, Iterable):
        raise TypeError(f"{name} is {article(files)}; {wanted}")
    chosen: list[StatsFile] = []
    for one in files:
        chosen.extend([one] if isinstance(one, StatsFile) or not isinstance(one, Iterable) else one)
    for file in chosen:
        if not isinstance(file, StatsFile):
            raise TypeError(f"{name} has {article(file)}; {wanted}")
        file.handle.check_open()
    return chosen


def _describe(file: StatsFile, vm: str) -> Known:
    owner, file_id = file.handle.owner, file.id
    return Known(file_id, *kind_of(file_id), owner.pid, owner.name, vm or owner.vm)
