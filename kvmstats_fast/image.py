"""A whole stats file in memory: `parse` for any layout, and `to_merged`, which rewrites it in the layout of today."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvmstats_fast._arguments import article
from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.abi import Layout, StatUnit, join_flags
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.schema import schema_of
from kvmstats_fast.stat import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, KeysView

    import numpy.typing as npt
    from typing_extensions import Buffer

    from kvmstats_fast.encoding import Header
    from kvmstats_fast.schema import Schema, Value
    from kvmstats_fast.stat import Stat


class StatsImage:
    """A whole stats file in memory: ``image["exits"]`` is a raw value, as from `Schema.unpack`.

    It supports iteration over names, ``len``, ``in`` and ``dict(image)``. It is not a `collections.abc.Mapping`,
    because `values` is the array and not a method.

    Attributes
    ----------
    schema : Schema
    id : str
        A label (``kvm-PID``, ``kvm-TID/vcpu-N``), not a key: it need not be unique.
    values : numpy.ndarray or None
        uint64, shape ``(schema.num_values,)``; None for a repaired file, which has none.
    """

    __slots__ = ("id", "schema", "values")

    def __init__(self, schema: Schema, id: str, values: npt.NDArray[np.uint64] | None) -> None:  # noqa: A002
        self.schema = schema
        self.id = id
        self.values = values

    @property
    def header(self) -> Header:
        """Header of the file."""
        return self.schema.header

    def snapshot(self, si: bool = False) -> dict[str, Value]:
        """Name the values, as `StatsFile.snapshot` does; KvmStatsError if the file has none."""
        return self.schema.unpack(self._present(), si=si)

    def _present(self) -> npt.NDArray[np.uint64]:
        if self.values is None:
            raise KvmStatsError(
                f"{self.id}: this file has no values: its kernel has the count defect and serves other memory in their "
                "place"
            )
        return self.values

    def __getitem__(self, name: str) -> Any:  # Value, but then image["exits"] + 1 would need a cast
        stat, values = self.schema[name], self._present()
        word = stat.offset // 8
        if stat.shape:
            return values[word : word + stat.size]
        value = int(values[word])
        return bool(value) if stat.unit == StatUnit.BOOLEAN and value <= 1 else value

    def __contains__(self, name: object) -> bool:
        return name in self.schema

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema)

    def __len__(self) -> int:
        return len(self.schema)

    def keys(self) -> KeysView[str]:
        """Return the names of the statistics; ``dict(image)`` uses it."""
        return self.schema.keys()

    def __repr__(self) -> str:
        return f"<StatsImage {self.id!r}: {self.schema!r}{' without values' if self.values is None else ''}>"


def parse(data: Buffer | npt.NDArray[Any], *, repair: bool = False) -> StatsImage:
    """Parse a whole stats file that is in memory, of any layout and byte order.

    Parameters
    ----------
    data : bytes-like
        The file's bytes, from the header to the end of its data.
    repair : bool
        Accept the count defect of the original series' x86 vCPU files (count is the table's size in bytes). Such a
        file has true descriptors, but its data is other kernel memory: ``values`` is None.

    Returns
    -------
    StatsImage

    Raises
    ------
    FormatError
        If the bytes are not a stats file that can be read; ``code`` and ``offset`` say why and where.

    Notes
    -----
    A VM file of the v2 and v5 layouts whose data is exactly half as long as its descriptors ask for is taken for one
    of a 32-bit kernel (4-byte values), because that is what those look like.
    """
    try:
        blob = data if isinstance(data, bytes) else memoryview(cast("Buffer", data)).tobytes()
    except TypeError:
        raise TypeError(f"data is {article(data)}; it must be the bytes of a stats file") from None
    source = f"stats file of {len(blob)} bytes"
    schema = schema_of(blob, source, repair)
    encoding = schema.encoding
    file_id = encoding.read_id(blob)
    if encoding.repaired:
        return StatsImage(schema, file_id, None)
    start = schema.header.data_offset
    value_size = encoding.value_size(len(blob), file_id, source)
    values = np.empty(schema.num_values, np.uint64)
    lib.kvmstats_copy_values(
        ffi.from_buffer("char[]", blob) + start,
        value_size,
        encoding.swapped,
        schema.num_values,
        ffi.from_buffer("uint64_t[]", values, True),
    )
    return StatsImage(schema, file_id, values)


_NAME_SIZE = 48  # KVM_STATS_NAME_SIZE, include/uapi/linux/kvm.h


def to_merged(data: Buffer | npt.NDArray[Any]) -> bytes:
    """Rewrite a stats file of any layout in the merged layout, which today's tools read.

    Parameters
    ----------
    data : bytes-like
        A whole stats file.

    Returns
    -------
    bytes
        In the byte order of `data`; a merged file is returned as it is. Names, id, flags, exponents and values are the
        same; 4-byte values are widened, and the offsets that v2 and v5 lack are added.

    Raises
    ------
    FormatError
        If the bytes are not a stats file that can be read, or one without values (the count defect).
    """
    image = parse(data)
    if image.schema.layout is Layout.MERGED:
        return bytes(memoryview(cast("Buffer", data)))
    values = cast("npt.NDArray[np.uint64]", image.values)  # not None: nothing was repaired
    order = "<" if image.schema.byteorder == "little" else ">"
    return merged_head(image.id, image.schema.stats, order) + values.astype(f"{order}u8").tobytes()


def merged_head(file_id: str, stats: Iterable[Stat], order: str) -> bytes:
    """Return header, id and descriptors of a merged file, whose data follows; `order` is struct's."""
    raw_id = encode(file_id)
    names = [(stat, encode(stat.name)) for stat in stats]
    # The kernel's own size, unless an old name or id and its NUL need more; descriptors stay aligned to 8 bytes.
    longest = max(map(len, (raw_id, *(name for _, name in names))))
    name_size = max(_NAME_SIZE, (longest + 8) // 8 * 8)
    start = 24 + name_size
    data_offset = start + len(names) * (16 + name_size)
    head = struct.pack(f"{order}6I{name_size}s", 0, name_size, len(names), 24, start, data_offset, raw_id)
    return head + b"".join(
        struct.pack(
            f"{order}IhHII{name_size}s",
            join_flags(stat.type, stat.unit, stat.base),
            stat.exponent,
            stat.size,
            stat.offset,
            stat.bucket_size,
            name,
        )
        for stat, name in names
    )
