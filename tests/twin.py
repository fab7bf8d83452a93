"""A second parser of KVM's binary statistics files: plain Python, struct only, slow, and the oracle of the tests.

It shares no code and no structure with the package. What it knows is what is known of the format: a table of the four
layouts, tried one after the other in both byte orders, and lists of things that must hold, tried in order. The first
that does not hold is the TwinError. Sizes that are refused (LARGEST_...) are the package's decision, not the format's.
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass

NATIVE = "<" if sys.byteorder == "little" else ">"
FOREIGN = ">" if NATIVE == "<" else "<"
ENDIAN = {"<": "little", ">": "big"}

LARGEST_NAME_SIZE = 4096
LARGEST_TABLE = 65536
LARGEST_DATA = 256 * 1024 * 1024

MARK = b"kvm-"  # with this begins the id of every file from before the merge


class TwinError(Exception):
    """The bytes are not a stats file; `code_name` is a name of kvmstats_fast.ErrorCode, `offset` the byte at fault."""

    def __init__(self, code_name: str, offset: int) -> None:
        super().__init__(f"{code_name} at byte {offset}")
        self.code_name = code_name
        self.offset = offset


@dataclass
class StatsFile:
    """All that a stats file says. A stat is (name, type, unit, base, exponent, size, offset, bucket_size)."""

    layout: str
    byteorder: str
    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int
    id: str
    stats: list[tuple[str, int, int, int, int, int, int, int]]
    values: list[int] | None


@dataclass
class Head:
    """The header's numbers as they stand in the file, and at which byte each of them stands."""

    layout: str
    order: str  # "<" or ">"
    numbers: dict[str, int]
    places: dict[str, int]
    header_size: int
    id_offset: int
    id_size: int

    @property
    def positional(self) -> bool:
        """Whether descriptors have no offsets, and each stat starts where the one before it ended."""
        return self.layout in ("v2", "v5")

    @property
    def stride(self) -> int:
        """Bytes from one descriptor to the next."""
        return 16 + self.numbers["name_size"]


def parse(data: bytes, repair: bool = False) -> StatsFile:
    """Parse a whole stats file; TwinError if it is none. repair: take the count defect, give no values."""
    head = find_layout(data)
    defective = mend_count(head, repair)
    check_limits(head)
    check_blocks(head)

    for end in (head.id_offset + head.id_size, table_range(head).stop):
        if len(data) < end:
            raise TwinError("TRUNCATED", len(data))
    file_id = text(data[head.id_offset :][: head.id_size])
    stats = read_stats(data, head)
    data_size = max((offset + 8 * size for _, _, _, _, _, size, offset, _ in stats), default=0)
    check_end_of_data(head, data_size)
    check_names(stats, head)
    return StatsFile(
        layout=head.layout,
        byteorder=ENDIAN[head.order],
        flags=0,
        name_size=head.numbers["name_size"],
        num_desc=head.numbers["num_desc"],
        id_offset=head.id_offset,
        desc_offset=head.numbers["desc_offset"],
        data_offset=head.numbers["data_offset"],
        id=file_id,
        stats=stats,
        values=None if defective else read_values(data, head, data_size // 8, file_id),
    )


def text(field: bytes) -> str:
    """Return a name or id: to its NUL or to the end of its field, whichever is first."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


# ---- which layout


def find_layout(data: bytes) -> Head:
    """Try one layout after the other."""
    if data.startswith(MARK):
        return read_v2_or_v5(data)
    need(data, 24)
    return read_v9(data) or read_merged(data)


def need(data: bytes, size: int) -> None:
    """Refuse a file that ends before its header does."""
    if len(data) < size:
        raise TwinError("TRUNCATED", len(data))


def numbers_at(data: bytes, order: str, names: str, start: int) -> tuple[dict[str, int], dict[str, int]]:
    """Read one u32 per name, from byte `start` on: the numbers, and the bytes at which they stand."""
    keys = names.split()
    values = struct.unpack_from(f"{order}{len(keys)}I", data, start)
    return dict(zip(keys, values, strict=True)), {key: start + 4 * i for i, key in enumerate(keys)}


def read_v2_or_v5(data: bytes) -> Head:
    """Id first; name_size tells which of the two it is, and the byte order."""
    need(data, 80)
    for order in (NATIVE, FOREIGN):
        numbers, places = numbers_at(data, order, "name_size num_desc desc_offset data_offset", 64)
        layout = {32: "v2", 48: "v5"}.get(numbers["name_size"])
        if layout:
            return Head(layout, order, numbers, places, header_size=80, id_offset=0, id_size=64)
    raise TwinError("LAYOUT", 64)


def read_v9(data: bytes) -> Head | None:
    """Id last; descriptors always follow the header, so that 80 stands in a place where merged has a count."""
    for order in (NATIVE, FOREIGN):
        numbers, places = numbers_at(data, order, "name_size num_desc desc_offset data_offset", 0)
        if numbers["name_size"] in (32, 48) and numbers["desc_offset"] == 80 and data[16:20] == MARK:
            need(data, 80)
            return Head("v9", order, numbers, places, header_size=80, id_offset=16, id_size=64)
    return None


def read_merged(data: bytes) -> Head:
    """Flags are 0; the order is the one in which the id follows the header, else one in which name_size is sane."""
    fields = "flags name_size num_desc id_offset desc_offset data_offset"
    readings = {order: numbers_at(data, order, fields, 0) for order in (NATIVE, FOREIGN)}
    usual = [order for order, (numbers, _) in readings.items() if numbers["id_offset"] == 24]
    sane = [order for order, (numbers, _) in readings.items() if 1 <= numbers["name_size"] <= LARGEST_NAME_SIZE]
    order = [*usual, *sane, NATIVE][0]
    numbers, places = readings[order]
    if numbers["flags"]:
        raise TwinError("FLAGS" if usual else "LAYOUT", 0)
    return Head(
        "merged", order, numbers, places, header_size=24, id_offset=numbers["id_offset"], id_size=numbers["name_size"]
    )


# ---- what must hold of the header


def mend_count(head: Head, repair: bool) -> bool:
    """Put the true count where the size of the table in bytes stands (x86 vCPU files of the series)."""
    if not 1 <= head.numbers["name_size"] <= LARGEST_NAME_SIZE:
        raise TwinError("NAME_SIZE", head.places["name_size"])
    table_size = head.numbers["data_offset"] - head.numbers["desc_offset"]
    true_count, rest = divmod(table_size, head.stride)
    if not head.positional or rest or true_count < 1 or head.numbers["num_desc"] != table_size:
        return False
    if not repair:
        raise TwinError("COUNT_DEFECT", head.places["num_desc"])
    head.numbers["num_desc"] = true_count
    return True


def check_limits(head: Head) -> None:
    """Refuse more descriptors than the package takes."""
    if head.numbers["num_desc"] > LARGEST_TABLE:
        raise TwinError("NUM_DESC", head.places["num_desc"])


def table_range(head: Head) -> range:
    """Bytes of the descriptors."""
    start = head.numbers["desc_offset"]
    return range(start, start + head.numbers["num_desc"] * head.stride)


def meet(one: range, other: range) -> bool:
    """Whether two blocks overlap; an empty one does if it stands strictly inside the other."""
    return not (one.stop <= other.start or other.stop <= one.start)


def check_blocks(head: Head) -> None:
    """Each block is 8-byte aligned, behind the header, and apart from the others; the data's end is not known yet."""
    first_of_data = head.numbers["data_offset"]
    blocks = {
        "id_offset": range(head.id_offset, head.id_offset + head.id_size),
        "desc_offset": table_range(head),
        "data_offset": range(first_of_data, first_of_data + (head.numbers["num_desc"] > 0)),
    }
    if "id_offset" not in head.numbers:
        del blocks["id_offset"]  # it is in the header
    for name, block in blocks.items():
        if block.start % 8:
            raise TwinError("BLOCK_ALIGN", head.places[name])
        if block.start < head.header_size:
            raise TwinError("OVERLAP", head.places[name])
    for name, other in (("desc_offset", "id_offset"), ("data_offset", "id_offset"), ("data_offset", "desc_offset")):
        if other in blocks and meet(blocks[name], blocks[other]):
            raise TwinError("OVERLAP", head.places[name])


# ---- descriptors


def read_stats(data: bytes, head: Head) -> list[tuple[str, int, int, int, int, int, int, int]]:
    """Read all descriptors."""
    form = struct.Struct(f"{head.order}IhHII{head.numbers['name_size']}s")
    stats = []
    free = 0  # where the next stat starts if it does not say so itself
    for place in table_range(head)[:: form.size]:
        flags, exponent, size, offset, bucket_size, field = form.unpack_from(data, place)
        offset_place = place + 8
        if head.positional:
            offset, bucket_size, offset_place = free, 0, place + 6
        free = offset + 8 * size
        name = text(field)
        must_hold = (
            ("STAT_NAME", place + 16, name != ""),
            ("STAT_SIZE", place + 6, size > 0),
            ("STAT_ALIGN", place + 8, offset % 8 == 0),
            ("DATA_SIZE", offset_place, free <= LARGEST_DATA),
        )
        for code_name, at, holds in must_hold:
            if not holds:
                raise TwinError(code_name, at)
        stats.append((name, flags % 16, flags // 16 % 16, flags // 256 % 16, exponent, size, offset, bucket_size))
    return stats


def check_end_of_data(head: Head, data_size: int) -> None:
    """Now that it is known where the data ends: it may stand before another block and reach into it."""
    start = head.numbers["data_offset"]
    data_range = range(start, start + data_size)
    id_range = range(head.id_offset, head.id_offset + head.id_size)
    if meet(data_range, id_range) or meet(data_range, table_range(head)):
        raise TwinError("OVERLAP", head.places["data_offset"])


def check_names(stats: list[tuple[str, int, int, int, int, int, int, int]], head: Head) -> None:
    """No two stats have the same name."""
    known = set()
    for index, (name, *_) in enumerate(stats):
        if name in known:
            raise TwinError("DUPLICATE", table_range(head)[index * head.stride] + 16)
        known.add(name)


# ---- values


def read_values(data: bytes, head: Head, count: int, file_id: str) -> list[int]:
    """Read all words of the data as u64; those of a VM file of an old 32-bit kernel are u32 and end the file."""
    start = head.numbers["data_offset"]
    if count == 0:
        return []
    if len(data) >= start + 8 * count:
        return list(struct.unpack_from(f"{head.order}{count}Q", data, start))
    of_a_vcpu = re.fullmatch(r"vcpu-[0-9]+", file_id.rpartition("/")[2])
    if head.positional and not of_a_vcpu and len(data) == start + 4 * count:
        return list(struct.unpack_from(f"{head.order}{count}I", data, start))
    raise TwinError("TRUNCATED", len(data))
