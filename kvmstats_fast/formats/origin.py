"""What all batches of a recording's file have in common: the metadata of its Arrow schema."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.file_info import FileInfo, identify
from kvmstats_fast.formats.limits import MOST_FILES
from kvmstats_fast.formats.metadata import (
    INT32,
    INT64,
    UINT64,
    Check,
    Wrong,
    check_written,
    choice,
    flag,
    listed,
    number,
    optional,
    pattern,
    read_json,
    row,
    text,
    whole,
)
from kvmstats_fast.schema import schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmstats_fast.groups import Group
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.schema import Schema

#: Version of the file format, which docs/recording-format.md describes. Format 2 lacked `run` and `tail`. Format 1 also
#: lacked `vm` and `host` of files, and had one `wall_offset` for all batches.
FORMAT = 3

KIND = choice("vm", "vcpu")
HOST = text(255)
KERNEL = text(255)
INTERVAL = number(0, 1e12)
#: A Parquet file that was made of Samples, not of a recording, has no id.
_ID = pattern("([0-9a-f]{32})?", "32 hexadecimal digits")
#: Fields of FileInfo.
_FILE = (text(), KIND, optional(whole(0, 2**32 - 1)), optional(whole(0, INT32[1])), text(), text(), HOST)
_FIELDS_OF_FORMAT_1 = 5
_COLUMNS = listed(whole(0, MOST_FILES - 1), least=1)


def check_files(written: int) -> Check:
    """Accept the fields of FileInfo, file by file, as the format `written` has them."""
    rows = listed(row(*(_FILE[:_FIELDS_OF_FORMAT_1] if written == 1 else _FILE)))

    def check(value: Any) -> None:
        rows(value)
        for index, (_, kind, vcpu_id, *_) in enumerate(value):
            if (kind == "vcpu") != (vcpu_id is not None):
                wrong = Wrong(vcpu_id, "the id of a vCPU, and null for a VM")
                wrong.where = f"[{index}][2]"
                raise wrong

    return check


def check_columns(value: Any) -> None:
    """Accept indices of files, ascending."""
    _COLUMNS(value)
    if any(after <= before for before, after in pairwise(value)):
        raise Wrong(value, "ascending")


#: Attributes of Samples that belong to a batch.
BATCH_FIELDS: dict[str, Check] = {
    "wall_offset": whole(*INT64),
    "wall_steps": listed(row(whole(1, INT64[1]), whole(*INT64))),
    "missed": whole(0, UINT64[1]),
    "overruns": whole(0, UINT64[1]),
    "interrupted": flag,
}

_CHECKS: dict[str, Check] = {
    "recording": _ID,
    "run": whole(0, INT32[1]),
    "part": whole(0, INT32[1]),
    "version": text(255),
    "host": HOST,
    "kernel": KERNEL,
    "interval": INTERVAL,
    "wall_offset": whole(*INT64),
    "files": check_files(FORMAT),
    "columns": check_columns,
    "kind": KIND,
    "tail": optional(whole(0, INT64[1])),
}
#: What formats 1 and 2 did not say.
_ABSENT: dict[str, Any] = {"run": 0, "tail": None}


@dataclass(frozen=True)
class Origin:
    """What a file of a recording says of itself.

    Attributes
    ----------
    recording : str
        Random, the same in all files of a recording.
    run : int
        Which of the runs of the recording: each is of other stats files.
    part : int
        Which of the files that follow each other (rotation, runs).
    tail : int or None
        Of the tail of a part: how many sweeps are in front of it. If the part has more, the tail is among them.
    version : str
        Of the package that wrote it.
    files : tuple of FileInfo
        All stats files of the recording, also those whose values are in other files.
    columns : tuple of int
        Which of `files` this one has values of, ascending.
    kind : str
        Of those.
    stats : Schema
        Of those.
    """

    recording: str
    run: int
    part: int
    tail: int | None
    version: str
    host: str
    kernel: str
    interval: float
    wall_offset: int
    files: tuple[FileInfo, ...]
    columns: tuple[int, ...]
    kind: str
    stats: Schema
    format: int = FORMAT

    @property
    def identity(self) -> tuple[str, int, str] | None:
        """What the kinds of files of one run have in common; None if it is of no recording."""
        return (self.recording, self.run, self.host) if self.recording else None

    @classmethod
    def of(cls, samples: Samples, group: Group, **own: Any) -> Origin:
        """Return what a file with a group of these samples says of itself; `own` is what samples do not know."""
        from kvmstats_fast import __version__  # noqa: PLC0415 - the package imports this

        about: dict[str, Any] = {"recording": "", "run": 0, "part": 0, "tail": None} | own
        return cls(
            **about,
            version=__version__,
            host=samples.host,
            kernel=samples.kernel,
            interval=samples.interval,
            wall_offset=samples.wall_offset,
            files=samples.files,
            columns=tuple(group.columns.tolist()),
            kind=group.kind,
            stats=group.schema,
        )

    def encode(self) -> dict[str, str]:
        """Return it as schema metadata: ASCII, because not every reader of Arrow takes bytes.

        Raises
        ------
        ValueError
            If it says what readers refuse.
        """
        plain = {name: getattr(self, name) for name in _CHECKS}
        plain["files"] = [astuple(info) for info in self.files]
        metadata = {f"kvmstats.{name}": json.dumps(value) for name, value in plain.items()}
        check_written(metadata, {f"kvmstats.{name}": check for name, check in _CHECKS.items()})
        metadata["kvmstats.format"] = str(FORMAT)
        metadata["kvmstats.header_and_descriptors"] = b64encode(self.stats.encoding.prefix).decode()
        return metadata

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes] | None, source: str) -> Origin:
        """Return what schema metadata says; KvmStatsError names `source` and the field that is wrong."""
        metadata = metadata or {}
        if b"kvmstats.format" not in metadata:
            raise KvmStatsError(f"{source}: not a recording of kvmstats_fast: its metadata has no kvmstats.format")
        if b"kvmstats.values" in metadata:
            raise KvmStatsError(
                f"{source}: its columns have changes, not raw values; no samples can be made of them: read it with "
                "DuckDB, Polars or pandas, or open what it was made of"
            )
        written = read_field(metadata, "format", whole(0, INT32[1]), source)
        check_format(written, source)
        checks = _CHECKS | {"files": check_files(written)}
        absent = _ABSENT if written < FORMAT else {}
        found = absent | {
            name: read_field(metadata, name, check, source) for name, check in checks.items() if name not in absent
        }
        files = identify([FileInfo(*info) for info in found.pop("files")], found["host"])
        columns = tuple(found.pop("columns"))
        if columns[-1] >= len(files) or any(files[index].kind != found["kind"] for index in columns):
            raise KvmStatsError(
                f"{source}: kvmstats.columns is damaged: not all of its files are of kind {found['kind']!r}"
            )
        try:
            prefix = b64decode(metadata[b"kvmstats.header_and_descriptors"], validate=True)
        except (KeyError, ValueError):
            raise KvmStatsError(f"{source}: kvmstats.header_and_descriptors is missing or not base64") from None
        stats = schema_of(prefix, f"{source}: kvmstats.header_and_descriptors")
        return cls(files=files, columns=columns, stats=stats, format=written, **found)


def check_format(written: int, source: str) -> None:
    """Raise KvmStatsError unless this version reads a format."""
    if not 1 <= written <= FORMAT:
        raise KvmStatsError(f"{source}: a recording of format {written}; this version reads formats 1 to {FORMAT}")


def read_field(metadata: Mapping[bytes, bytes], name: str, check: Check, source: str) -> Any:
    """Return the value of a metadata key, checked."""
    key = f"kvmstats.{name}"
    raw = metadata.get(key.encode())
    if raw is None:
        raise KvmStatsError(f"{source}: {key} is missing from its metadata")
    return read_json(raw, key, source, check)
