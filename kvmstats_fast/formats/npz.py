"""Samples.save and Samples.load: a recording of one batch, or an ``.npz`` for those who have only numpy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
import zlib
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.formats.errors import described, raised
from kvmstats_fast.groups import Columns
from kvmstats_fast.samples import FileInfo, SampleError, Samples
from kvmstats_fast.schema import schema_of

if TYPE_CHECKING:
    import io

    import numpy.typing as npt

_FORMAT = 1


def save(samples: Samples, path: str | os.PathLike[str], *, overwrite: bool, compression: str | None) -> None:
    """Write beside `path`, and put it there when it is whole."""
    path = Path(path)
    if compression not in (None, "zstd", "lz4"):
        raise ValueError(f"compression is {compression!r}; it must be 'zstd', 'lz4' or None")
    if not overwrite and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, "it is there already; overwrite=True replaces it", str(path))
    if path.is_dir() and not path.is_symlink() and any(one.suffix != ".arrows" for one in path.iterdir()):
        # Not overwrite=True either may take away what is none of ours.
        raise FileExistsError(errno.EEXIST, "there is more in it than a recording: save to another path", str(path))
    if not samples.files:
        raise ValueError(f"{path}: these samples are of no files: there is nothing to save")
    made = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".npz":
            with made.open("wb") as file:
                _write_npz(samples, file, compressed=compression is not None)
        else:
            from kvmstats_fast.formats.recording import Recorder  # noqa: PLC0415 - needs pyarrow

            with Recorder(made, compression=compression) as recorder:
                recorder.write(samples)
        _put(made, path)
    except BaseException as error:
        with suppress(NotADirectoryError):
            _remove(made)
        if isinstance(error, OSError) and str(error.filename) == str(made):
            error.filename = str(path)
        raise


def _put(made: Path, path: Path) -> None:
    if not (path.is_dir() or path.is_symlink() or made.is_dir()):
        made.replace(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists() or path.is_symlink():
        path.rename(old)
    try:
        made.rename(path)
    except BaseException:
        if old.exists() or old.is_symlink():
            old.rename(path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Samples:
    """Read a recording or an .npz."""
    if Path(path).suffix == ".npz":
        return _read_npz(Path(path))
    from kvmstats_fast.formats.recording import Recording  # noqa: PLC0415 - needs pyarrow

    return Recording(path).load()


def _write_npz(samples: Samples, file: io.BufferedWriter, *, compressed: bool) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "time": samples.time,
        "sweep_ns": samples.sweep_ns,
        "tick": samples.tick,
    }
    about: dict[str, Any] = {
        "format": _FORMAT,
        **{name: getattr(samples, name) for name in _PLAIN},
        "files": [astuple(info) for info in samples.files],
        "errors": [(error.file, error.sweep, *described(error.error)) for error in samples.errors],
        "groups": [],
    }
    for number, group in enumerate(samples.groups):
        order = {name: index for index, name in enumerate(group.schema)}
        about["groups"].append({"kind": group.kind, "stats": [order[name] for name in group.places]})
        arrays[f"{number}.columns"] = group.columns
        arrays[f"{number}.header_and_descriptors"] = np.frombuffer(group.schema.encoding.prefix, np.uint8)
        for name in group.places:
            arrays[f"{number}.{order[name]}"] = group.view(name)
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]


#: What comes of a file that is something else, or whose bytes changed.
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, EOFError, NotImplementedError)
#: Attributes of Samples that JSON holds as they are.
_PLAIN = ("interval", "wall_offset", "missed", "overruns", "interrupted", "host", "kernel")


def _read_npz(path: Path) -> Samples:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != _FORMAT:
                raise KvmStatsError(f"{path}: format {about['format']}; this version reads {_FORMAT}")
            groups = []
            for number, one in enumerate(about["groups"]):
                prefix = arrays[f"{number}.header_and_descriptors"].tobytes()
                schema = schema_of(prefix, f"{path}: header and descriptors")
                stats = [schema.stats[index] for index in one["stats"]]
                places = {stat.name: (stat, place) for place, stat in enumerate(stats)}
                values = tuple(arrays[f"{number}.{index}"] for index in one["stats"])
                groups.append(Columns(schema, one["kind"], places, arrays[f"{number}.columns"], values))
            return Samples(
                tuple(groups),
                tuple(FileInfo(*info) for info in about["files"]),
                arrays["time"],
                arrays["sweep_ns"],
                arrays["tick"],
                errors=tuple(SampleError(file, sweep, raised(*error)) for file, sweep, *error in about["errors"]),
                **{name: about[name] for name in _PLAIN},
            )
    except (*_DAMAGE, zlib.error, zipfile.BadZipFile) as error:
        raise KvmStatsError(f"{path}: this is no .npz that Samples.save wrote, or it is damaged: {error}") from error
