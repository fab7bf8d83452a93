"""Samples.save and Samples.load: a recording of one batch, or an ``.npz`` for those who have only numpy."""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import check_names
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.file_info import FileInfo, identify
from kvmstats_fast.formats._put import put_directory, put_file
from kvmstats_fast.formats.batches import check_order, check_steps
from kvmstats_fast.formats.errors import check_errors, describe, restore
from kvmstats_fast.formats.limits import check_size
from kvmstats_fast.formats.metadata import INT64, Check, check_written, listed, mapping, read_json, whole
from kvmstats_fast.formats.origin import BATCH_FIELDS, FORMAT, HOST, INTERVAL, KERNEL, KIND, check_files, check_format
from kvmstats_fast.formats.stream_file import open_regular
from kvmstats_fast.formats.wanted import ALWAYS
from kvmstats_fast.groups import Columns
from kvmstats_fast.samples import Samples
from kvmstats_fast.schema import schema_of
from kvmstats_fast.selection import Selection
from kvmstats_fast.spans import between

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvmstats_fast.spans import Span

#: Attributes of Samples that JSON holds as they are.
_PLAIN: dict[str, Check] = BATCH_FIELDS | {"interval": INTERVAL, "host": HOST, "kernel": KERNEL}


def save(
    samples: Samples, path: str | os.PathLike[str], *, overwrite: bool, compression: str | None, mode: int
) -> None:
    """See `Samples.save`."""
    path = Path(path)
    if compression not in (None, "zstd", "lz4"):
        raise ValueError(f"compression is {compression!r}; it must be 'zstd', 'lz4' or None")
    if not samples.files:
        raise ValueError(f"{path}: these samples are of no files: there is nothing to save")
    if path.suffix == ".npz":
        with put_file(path, overwrite=overwrite, mode=mode) as file:
            _write_npz(samples, file, compressed=compression is not None)
        return
    from kvmstats_fast.formats.recorder import Recorder, is_stream_name  # noqa: PLC0415 - needs pyarrow

    with (
        put_directory(path, overwrite=overwrite, mode=mode, ours=is_stream_name) as made,
        Recorder(made, compression=compression, flush_seconds=0, mode=mode) as recorder,
    ):
        recorder.write(samples)


def load(path: str | os.PathLike[str], stats: str | Iterable[str] | None, span: Span) -> Samples:
    """See `Samples.load`."""
    selection = None
    if stats is not None:
        selection = Selection.of(check_names("stats", stats), None, None, None, None)
        if selection.names is None:
            raise ValueError("stats is empty: name statistics, or leave it out for all of them")
    if Path(path).suffix == ".npz":
        samples, names = _read_npz(Path(path), selection)
        if selection is not None:
            selection.check(samples.files, names, str(path))
            samples = selection.take(samples)
        return samples if span == ALWAYS else between(samples, span)
    from kvmstats_fast.formats.recording import Recording  # noqa: PLC0415 - needs pyarrow

    return Recording(path).load_some(selection, span)


def _write_npz(samples: Samples, file: Any, *, compressed: bool) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "time": samples.time,
        "sweep_ns": samples.sweep_ns,
        "tick": samples.tick,
    }
    about: dict[str, Any] = {
        "format": FORMAT,
        **{name: getattr(samples, name) for name in _PLAIN},
        "files": [astuple(info) for info in samples.files],
        "errors": describe(samples.errors),
        "groups": [],
    }
    for number, group in enumerate(samples.groups):
        order = {name: index for index, name in enumerate(group.schema)}
        about["groups"].append({"kind": group.kind, "stats": [order[name] for name in group.places]})
        arrays[f"{number}.columns"] = group.columns.astype(np.int64)
        arrays[f"{number}.header_and_descriptors"] = np.frombuffer(group.schema.encoding.prefix, np.uint8)
        for name in group.places:
            arrays[f"{number}.{order[name]}"] = group.view(name)
    text = json.dumps(about)
    check_written({"about": text}, {"about": mapping(_PLAIN | {"files": check_files(FORMAT)})})
    arrays["about"] = np.frombuffer(text.encode(), np.uint8)
    (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]


def _read_npz(path: Path, selection: Selection | None) -> tuple[Samples, list[str]]:
    """Return all sweeps of the selected statistics, and the names of all statistics there are."""
    with open_regular(path) as fd, _File(fd.fileno(), closefd=False) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _Npz(path, archive, file.size).read(selection)
        except (KvmStatsError, MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - zipfile lets anything out when bytes are not a ZIP archive
            raise KvmStatsError(f"{path}: not an .npz that Samples.save wrote, or a damaged one: {error}") from None


class _File(io.FileIO):
    """What zipfile reads from: it trusts the archive that there is as much to read as that says; this does not."""

    @property
    def size(self) -> int:
        """Return how many bytes there are."""
        return os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """Return so many bytes, or all that are left."""
        left = max(self.size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left)) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        start = (0, self.tell(), self.size)[whence]
        return super().seek(min(max(start + offset, 0), self.size))


#: The header of an array as numpy writes it; numpy would read any literal of Python here.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<>|](?:u1|u8|i8|i4))', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9]{1,18}(?:, [0-9]{1,18}){0,2}),?\), \} *\n",
    re.DOTALL,
)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _Npz:
    """The members of an ``.npz``, each of which is checked before it is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int) -> None:
        self._path, self._archive = path, archive
        members = archive.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise KvmStatsError(f"{path}: two of its members have the same name")
        if any(member.compress_type not in _COMPRESSIONS for member in members):
            raise KvmStatsError(f"{path}: compressed in a way that Samples.save does not use")
        stored = sum(member.compress_size for member in members)
        if stored > size:
            raise KvmStatsError(f"{path}: its members claim {stored} of its {size} bytes")
        check_size(sum(member.file_size for member in members), stored, str(path))

    def read(self, selection: Selection | None) -> tuple[Samples, list[str]]:
        """Return all sweeps of the selected statistics, and the names of all statistics there are."""
        about = self._read_about()
        time = self._array("time", np.int64)
        sweep_ns, tick = self._array("sweep_ns", np.int64, time.shape), self._array("tick", np.uint64, time.shape)
        check_steps(about, len(time), str(self._path))
        check_order(time, str(self._path))
        names: dict[str, None] = {}
        samples = Samples(
            self._read_groups(about, len(time), selection, names),
            identify([FileInfo(*info) for info in about["files"]], about["host"]),
            time,
            sweep_ns,
            tick,
            errors=restore(about["errors"]),
            **{name: about[name] for name in _PLAIN} | {"wall_steps": tuple(map(tuple, about["wall_steps"]))},
        )
        return samples, [*names]

    def _read_about(self) -> dict[str, Any]:
        """Return what the file says of itself, checked."""
        raw = self._array("about", np.uint8).tobytes()
        source = str(self._path)
        written = read_json(raw, "about", source, mapping({"format": whole(0, INT64[1])}))["format"]
        check_format(written, source)
        files = read_json(raw, "about", source, mapping({"files": check_files(written)}))["files"]
        checks = _PLAIN | {"groups": _GROUPS, "errors": check_errors(len(files))}
        about: dict[str, Any] = {}
        if written == 1:
            about["wall_steps"] = []
            del checks["wall_steps"]
        about |= read_json(raw, "about", source, mapping(checks))
        return about

    def _read_groups(
        self, about: dict[str, Any], sweeps: int, selection: Selection | None, names: dict[str, None]
    ) -> tuple[Columns, ...]:
        """Return the groups: their files, schema, and the values that are selected; add the names of all to `names`."""
        groups = []
        seen: set[int] = set()
        for number, group in enumerate(about["groups"]):
            member = f"{number}.header_and_descriptors"
            schema = schema_of(self._array(member, np.uint8).tobytes(), f"{self._path}: {member}")
            columns = self._array(f"{number}.columns", np.intp)
            files = columns.tolist()
            if (
                files != sorted(set(files))
                or not seen.isdisjoint(files)
                or not all(
                    0 <= file < len(about["files"]) and about["files"][file][1] == group["kind"] for file in files
                )
            ):
                raise KvmStatsError(
                    f"{self._path}: {number}.columns must be ascending indices of files of kind {group['kind']!r} that "
                    "no other group has"
                )
            seen.update(files)
            order = group["stats"]
            if len(set(order)) < len(order) or max(order, default=0) >= len(schema):
                raise KvmStatsError(f"{self._path}: about['groups'][{number}]['stats'] must be different descriptors")
            there = [schema.stats[index].name for index in order]
            names |= dict.fromkeys(there)
            chosen = frozenset(there if selection is None else selection.find_stats(there))
            order = [index for index in order if schema.stats[index].name in chosen]
            stats = [schema.stats[index] for index in order]
            arrays = tuple(
                self._array(f"{number}.{index}", np.uint64, (sweeps, len(files), *stat.shape))
                for index, stat in zip(order, stats, strict=True)
            )
            places = {stat.name: (stat, place) for place, stat in enumerate(stats)}
            groups.append(Columns(schema, group["kind"], places, columns, arrays))
        return tuple(groups)

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """Return an array; without a shape, one of one dimension and any length."""
        member = self._members.get(f"{name}.npy")
        if member is None:
            raise KvmStatsError(f"{self._path}: not an .npz that Samples.save wrote: {name!r} is missing")
        with self._archive.open(member) as file:
            start = file.read(10)
            start += file.read(int.from_bytes(start[8:], "little"))
            header = _HEADER.fullmatch(start)
            if header is None:
                raise KvmStatsError(f"{self._path}: {name!r} is not an array that Samples.save writes")
            of_type, fortran = np.dtype(header[1].decode()), header[2] == b"True"
            found = tuple(map(int, header[3].split(b",")))
            expected = np.dtype(dtype)
            if of_type.kind != expected.kind or (len(found) != 1 if shape is None else found != shape):
                wanted = "of one dimension" if shape is None else f"of shape {shape}"
                raise KvmStatsError(
                    f"{self._path}: {name!r} is {of_type} of shape {found}; it must be {expected} {wanted}"
                )
            if math.prod(found) * of_type.itemsize != member.file_size - len(start):
                raise KvmStatsError(f"{self._path}: {name!r} has not the bytes of shape {found}")
            array = np.empty(found[::-1] if fortran else found, of_type)
            room = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            for place in range(0, len(room) + 1, _CHUNK):  # at the end zipfile compares the checksum
                room[place : place + _CHUNK] = file.read(_CHUNK)
        return (array.T if fortran else array).astype(expected, copy=False)


_CHUNK = 1 << 20
_GROUPS = listed(mapping({"kind": KIND, "stats": listed(whole(0, INT64[1]))}))
