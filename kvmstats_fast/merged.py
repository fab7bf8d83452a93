"""Stats files of the original patch series as files of the merged layout."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvmstats_fast.abi import Layout, join_flags
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.schema import parse

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt
    from typing_extensions import Buffer

    from kvmstats_fast.schema import Stat

__all__ = ["to_merged"]

_NAME_SIZE = 48  # KVM_STATS_NAME_SIZE, include/uapi/linux/kvm.h


def to_merged(data: Buffer | npt.NDArray[Any]) -> bytes:
    """Rewrite a stats file of any layout as one of the merged layout, which today's tools read.

    Parameters
    ----------
    data : bytes-like
        A whole stats file.

    Returns
    -------
    bytes
        In the byte order of `data`; a merged file as it is. Names, id, flags, exponents and values are the same;
        4-byte values are widened, and the offsets that v2 and v5 lack are written out.

    Raises
    ------
    FormatError
        If the bytes are no stats file that can be read, or one that has no values (the count defect).
    """
    image = parse(data)
    if image.schema.layout is Layout.MERGED:
        return bytes(memoryview(data))  # type: ignore[arg-type]
    if image.values is None:  # parse without repair gives none such
        raise KvmStatsError(f"{image.id}: this file has no values")
    order = "<" if image.schema.byteorder == "little" else ">"
    return _head(image.id, image.schema.stats, order) + image.values.astype(f"{order}u8").tobytes()


def _head(file_id: str, stats: Iterable[Stat], order: str) -> bytes:
    """Header, id and descriptors of a merged file, whose data follows; `order` is struct's."""
    raw_id = file_id.encode("utf-8", "surrogateescape")
    names = [(stat, stat.name.encode("utf-8", "surrogateescape")) for stat in stats]
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
