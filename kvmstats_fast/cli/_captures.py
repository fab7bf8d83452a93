"""Captured stats files: one, or the directory that `kvmstats capture` made; what a kernel said at one moment."""

from __future__ import annotations

import calendar
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.encoding import kind_of
from kvmstats_fast.errors import FormatError, KvmStatsError
from kvmstats_fast.file_info import FileInfo, identify
from kvmstats_fast.groups import Block
from kvmstats_fast.image import parse
from kvmstats_fast.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmstats_fast.image import StatsImage
    from kvmstats_fast.schema import Schema

ABOUT = "about.json"
TIME = "%Y-%m-%dT%H:%M:%SZ"
_MOST = 1 << 27  # bytes of a captured file
#: Of recordings and data sets: Arrow's file and stream formats, zip, Parquet.
_OTHERS = (b"ARROW1", b"\xff\xff\xff\xff", b"PK", b"PAR1")


def is_capture(path: Path) -> bool:
    """Return whether there is a captured stats file, or a directory of them, and no recording."""
    if path.is_dir():
        return any(one.suffix == ".bin" for one in path.iterdir())
    with path.open("rb") as file:
        start = file.read(8)
    return bool(start) and not start.startswith(_OTHERS)


def list_files(path: Path) -> list[Path]:
    """Return the stats files of a capture; KvmStatsError if there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if one.suffix == ".bin")
    if not found:
        raise KvmStatsError(f"{path}: there is no captured stats file in it: none ends in .bin")
    return found


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a captured file; KvmStatsError if it is larger than any stats file."""
    with path.open("rb") as file:
        data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise KvmStatsError(f"{path}: it is larger than {_MOST >> 20} MiB, which no stats file is")
    return data


def read_images(path: Path) -> Iterator[tuple[Path, StatsImage]]:
    """Yield each stats file of a capture; KvmStatsError if it is none."""
    return ((one, _parse(one)) for one in list_files(path))


def _parse(path: Path) -> StatsImage:
    try:
        return parse(read_bytes(path), repair=True)
    except FormatError as error:
        raise KvmStatsError(f"{path}: neither a recording nor a captured stats file: {error}") from None


def read_capture(path: Path) -> Samples:
    """Return a capture as samples of two sweeps at one time: the making of the VM, when all counters were 0, and this.

    So what was counted is what they say, and there is no rate. Instant values and peaks are the same in both.

    Raises
    ------
    KvmStatsError, OSError
        If it is no capture, or one of its files has no values.
    """
    about = _read_about(path)
    known = {one.get("file"): one for one in about.get("files", ()) if isinstance(one, dict)}
    parts: dict[tuple[str, Schema], list[int]] = {}
    infos, values = [], []
    for index, (file, image) in enumerate(read_images(path)):
        if image.values is None:
            raise KvmStatsError(f"{file}: this file has no values: its kernel has the count defect")
        kind, vcpu_id = kind_of(image.id)
        infos.append(FileInfo(image.id, kind, vcpu_id, *_owner(known.get(file.name, {}))))
        parts.setdefault((kind, image.schema), []).append(index)
        values.append(image.values)
    groups = []
    for (one_kind, schema), columns in parts.items():
        block = np.stack([values[index] for index in columns])[None].repeat(2, axis=0)
        for stat in schema.stats:
            if stat.grows:
                block[0, :, stat.offset // 8 :][:, : stat.size] = 0
        places = {stat.name: (stat, stat.offset // 8) for stat in schema.stats}
        groups.append(Block(schema, one_kind, places, np.array(columns, np.intp), block))
    zeros = np.zeros(2, np.int64)
    kernel = " ".join(str(about[name]) for name in ("kernel", "machine") if about.get(name))
    return Samples(
        tuple(groups),
        identify(infos, _text(about, "host")),
        zeros,
        zeros,
        np.arange(2, dtype=np.uint64),
        wall_offset=_when(about),
        host=_text(about, "host"),
        kernel=kernel,
    )


def _read_about(path: Path) -> dict[str, Any]:
    """Return what is known of the files; what an older version did not write, or nobody, is not there."""
    file = path / ABOUT if path.is_dir() else path.with_name(ABOUT)
    try:
        about = json.loads(read_bytes(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise KvmStatsError(f"{file}: it is damaged: {error}") from None
    return about if isinstance(about, dict) else {}


def _owner(one: dict[str, Any]) -> tuple[int | None, str]:
    pid = one.get("pid")
    return pid if isinstance(pid, int) else None, _text(one, "guest")


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    return value if isinstance(value, str) else ""


def _when(about: dict[str, Any]) -> int:
    """Return when it was, ns since 1970; 0 if that is not known."""
    try:
        return calendar.timegm(time.strptime(_text(about, "time"), TIME)) * 10**9
    except ValueError:
        return 0
