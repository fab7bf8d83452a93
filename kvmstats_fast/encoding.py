"""How the bytes of one kind of stats file are recognised and read: Header, Encoding, and the walk, which is C."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.abi import LAYOUT_OF_CODE, Layout
from kvmstats_fast.errors import format_error, truncated


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a stats file (``struct kvm_stats_header``), the same fields for every layout.

    Attributes
    ----------
    layout : Layout
    byteorder : str
        ``"little"`` or ``"big"``: byte order of the host that wrote the file.
    flags : int
        0, the only value defined so far.
    name_size : int
        Size of a name field in bytes; descriptors are ``16 + name_size`` bytes apart.
    num_desc : int
        Number of descriptors (for a repaired file the true number, not the header's).
    id_offset, desc_offset, data_offset : int
        Byte offset in the file at which each block starts.
    """

    layout: Layout
    byteorder: Literal["little", "big"]
    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int


_SOURCE = ffi.typeof("struct kvmstats_source *")
_DESCS = ffi.typeof("struct kvmstats_desc[]")
_DESC = _DESCS.item
# The C struct's fields as numpy sees them, so that all descriptors become Python numbers in one call.
_DESC_DTYPE = np.dtype(
    {
        "names": [name for name, _ in _DESC.fields],
        "formats": [field.type.cname.removesuffix("_t") for _, field in _DESC.fields],
        "offsets": [field.offset for _, field in _DESC.fields],
        "itemsize": ffi.sizeof(_DESC),
    }
)


def read_header(blob: bytes, source: str, *, repair: bool = False) -> Any:
    """Return the C core's ``struct kvmstats_header`` of the file that starts with `blob`."""
    header = ffi.new("struct kvmstats_header *")
    fault = ffi.new("struct kvmstats_fault *")
    code = lib.kvmstats_read_header(ffi.from_buffer("char[]", blob), len(blob), repair, header, fault)
    if code:
        raise format_error(code, fault, source)
    return header


def read_descriptors(blob: bytes, header: Any, source: str) -> np.ndarray[Any, Any]:
    """Return the descriptors of the file that starts with `blob`, one record for each ``struct kvmstats_desc``."""
    fault = ffi.new("struct kvmstats_fault *")
    # Before the table is known to be there, nothing is allocated for it.
    room = header.num_desc if header.desc_end <= len(blob) else 0
    descs = ffi.new(_DESCS, room)
    code = lib.kvmstats_read_descriptors(ffi.from_buffer("char[]", blob), len(blob), header, descs, fault)
    if code:
        raise format_error(code, fault, source)
    return np.frombuffer(ffi.buffer(descs), _DESC_DTYPE)


class Encoding:
    """How the bytes of a file of one schema are recognised and read. Internal.

    Parameters
    ----------
    blob : bytes
        The start of a file.
    parsed : struct kvmstats_header *
        What the C core has read there; of its descriptors, too.

    Attributes
    ----------
    header : Header
    swapped : bool
        Whether the file is in the other byte order than this machine.
    repaired : bool
        Whether the file has the count defect, and so no values.
    id_size : int
        Bytes of the room for the id.
    data_size : int
        Bytes of all values as uint64, words that no descriptor names included.
    data_end : int
        Byte of the file where the values end, if each has 8 bytes.
    prefix : bytes
        The file up to the end of its descriptors, with everything blanked that does not make the schema: the id, and
        gaps between blocks. `schema_of` makes the schema of it again.
    windows : tuple of (bytes, int)
        What `prefix` has that is not blank, and where: the header without the id, and the descriptors.
    template : struct kvmstats_source
        How the C core reads the values, without an fd and for values of 8 bytes; copied for each file.
    """

    __slots__ = ("data_end", "data_size", "header", "id_size", "prefix", "repaired", "swapped", "template", "windows")

    def __init__(self, blob: bytes, parsed: Any) -> None:
        self.swapped = bool(parsed.swapped)
        self.repaired = bool(parsed.count_defect)
        self.id_size: int = parsed.id_size
        self.data_size: int = parsed.data_size
        self.header = header = Header(
            layout=LAYOUT_OF_CODE[parsed.layout],
            byteorder="little" if (sys.byteorder == "little") != self.swapped else "big",
            flags=parsed.flags,
            name_size=parsed.name_size,
            num_desc=parsed.num_desc,
            id_offset=parsed.id_offset,
            desc_offset=parsed.desc_offset,
            data_offset=parsed.data_offset,
        )
        self.data_end = header.data_offset + self.data_size
        # What makes a schema: the header without the id, and the table. Everything else of the file is blanked.
        windows = [
            slice(parsed.key_offset, parsed.key_offset + parsed.key_size),
            slice(header.desc_offset, parsed.desc_end),
        ]
        if header.layout is not Layout.MERGED:
            windows.append(slice(header.id_offset, header.id_offset + 4))  # "kvm-": these layouts are known by it
        prefix = bytearray(parsed.prefix_size)
        for window in windows:
            prefix[window] = blob[window]
        self.prefix = bytes(prefix)
        self.windows = tuple((blob[window], window.start) for window in windows)
        self.template: Any = ffi.new(_SOURCE, (-1, 8, self.swapped, header.data_offset, self.data_size // 8))[0]

    def fits(self, blob: bytes) -> bool:
        """Whether `blob`, the start of a file, has this header and these descriptors (and room for an id)."""
        for raw, start in self.windows:  # all() of a generator takes three times as long
            if not blob.startswith(raw, start):
                return False
        return len(blob) >= len(self.prefix)

    def read_id(self, blob: bytes) -> str:
        """Return the id in `blob`, the start of a file: to its NUL or to the end of its room, whichever is first."""
        start = self.header.id_offset
        return blob[start : start + self.id_size].partition(b"\0")[0].decode("utf-8", "surrogateescape")

    def make_source(self, fd: int, value_size: int) -> Any:
        """Return a new ``struct kvmstats_source *`` that reads the values from `fd`."""
        source = ffi.new(_SOURCE, self.template)  # copied: a third of the time that it takes to fill one in
        source.fd, source.value_size = fd, value_size
        return source

    def value_size(self, file_end: int, file_id: str, source: str) -> int:
        """Return the bytes of a value in a file that ends at byte `file_end`: 8, or 4 of an old 32-bit kernel.

        Before the merge, VM statistics were ``unsigned long`` (from v8 u64), vCPU statistics u64. Nothing follows
        them, so half the size means 4-byte values: a file of 8-byte values cut at exactly half looks the same.
        """
        if file_end >= self.data_end or not self.data_size:
            return 8
        positional = self.header.layout in (Layout.V2, Layout.V5)
        if positional and file_end - self.header.data_offset == self.data_size // 2 and kind_of(file_id)[0] == "vm":
            return 4
        raise truncated(source, file_end, self.data_end)


def kind_of(file_id: str) -> tuple[Literal["vm", "vcpu"], int | None]:
    """``("vcpu", 3)`` for ``kvm-PID/vcpu-3``, else ``("vm", None)``."""
    before, found, number = file_id.rpartition("vcpu-")  # a regular expression takes four times as long
    if found and before[-1:] in ("", "/") and number.isdecimal() and number.isascii():
        return "vcpu", int(number)
    return "vm", None
