"""Conformance: whether a stats file keeps the rules of its format, each rule by itself, with the bytes that show it.

C1 to C20 are what the kernel's own selftest asserts (``tools/testing/selftests/kvm/kvm_binary_stats_test.c``), D1 to D6
what its documentation says beyond that (``Documentation/virt/kvm/api.rst``, KVM_GET_STATS_FD). The file is walked here
once more, in plain Python: what the C core refuses is what there is to be shown.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast._text import printable
from kvmstats_fast.abi import StatType, StatUnit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Read = Callable[[int, int], bytes]  # size and offset, as os.pread has them

PASS, FAIL, NOT_APPLICABLE = "PASS", "FAIL", "N/A"

_MOST_BYTES = 1 << 26  # of descriptors or data that are looked at
_NAME_SIZES = (32, 48)


class Finding(NamedTuple):
    """What became of one rule.

    Attributes
    ----------
    rule : str
        ``"C1"`` to ``"C20"``, ``"D1"`` to ``"D6"``.
    title : str
        What it demands.
    verdict : {"PASS", "FAIL", "N/A"}
    evidence : str
        The bytes that break it, or why it does not apply; empty if it is kept.
    """

    rule: str
    title: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Live:
    """What can be tried of an open file, and not of bytes.

    Attributes
    ----------
    fd : int
        The stats file.
    wait : callable
        Lets the VM run for a moment.
    capability : int or None
        What KVM_CHECK_EXTENSION(KVM_CAP_BINARY_STATS_FD) answers; None: it could not be asked.
    open_again : callable, optional
        Returns another stats fd of the same VM or vCPU, as only the process that made it can.
    read_without_vm : callable, optional
        Reads the file when the VM's own fds are closed; as before.
    """

    fd: int
    wait: Callable[[], None]
    capability: int | None = None
    open_again: Callable[[], int] | None = None
    read_without_vm: Callable[[], bytes] | None = None


class _Descriptor(NamedTuple):
    at: int
    flags: int
    exponent: int
    size: int
    offset: int
    bucket_size: int
    raw_name: bytes

    @property
    def name(self) -> str:
        return printable(self.raw_name.split(b"\0")[0].decode(errors="replace"))

    @property
    def type(self) -> int:
        return self.flags & 0xF

    @property
    def unit(self) -> int:
        return self.flags >> 4 & 0xF

    @property
    def base(self) -> int:
        return self.flags >> 8 & 0xF

    def __str__(self) -> str:
        return f"descriptor {self.name!r} at byte {self.at}"


@dataclass
class _Walk:
    """The blocks of a file, as its header places them."""

    read: Read
    layout: str = ""
    order: str = "<"
    header_size: int = 24
    name_size: int = 0
    num_desc: int = 0
    id_offset: int = 0
    desc_offset: int = 0
    data_offset: int = 0
    head: bytes = b""
    table: bytes = b""
    descriptors: list[_Descriptor] = field(default_factory=list)

    @property
    def stride(self) -> int:
        return 16 + self.name_size

    @property
    def id_size(self) -> int:
        return self.name_size if self.layout == "merged" else 64

    @property
    def data_size(self) -> int:
        return max((one.offset + 8 * one.size for one in self.descriptors), default=0)

    def blocks(self) -> dict[str, tuple[int, int]]:
        """Where each block begins and ends."""
        return {
            "header": (0, self.header_size),
            "id": (self.id_offset, self.id_offset + self.id_size),
            "descriptors": (self.desc_offset, self.desc_offset + self.stride * self.num_desc),
            "data": (self.data_offset, self.data_offset + self.data_size),
        }


def check_file(read: Read, live: Live | None = None) -> list[Finding]:
    """Return what becomes of each rule.

    Parameters
    ----------
    read : callable
        Returns at most so many bytes from an offset, as ``os.pread`` does.
    live : Live, optional
        Of an open file. Without it, what only such a file can show does not apply.

    Returns
    -------
    list of Finding
        One for each rule, in their order. If there is no header to be read, C1 fails and the rest does not apply.
    """
    walk = _walk(read)
    found: dict[str, Finding] = {}
    for name in sorted(_RULES, key="C20".__eq__):  # which closes the VM: the last
        title, rule = _RULES[name]
        lost = [one for one, dependent in _NEEDED.items() if name in dependent and found[one].verdict == FAIL]
        if lost:
            found[name] = Finding(name, title, NOT_APPLICABLE, f"{lost[0]} is broken: what this is about is not there")
        else:
            found[name] = Finding(name, title, *_judge(rule(walk, live)))
    return [found[name] for name in _RULES]


class _NotApplicable(NamedTuple):
    why: str


def _judge(result: str | _NotApplicable | None) -> tuple[str, str]:
    if isinstance(result, _NotApplicable):
        return NOT_APPLICABLE, result.why
    return (FAIL, result) if result else (PASS, "")


# ---- the walk


def _walk(read: Read) -> _Walk:
    walk = _Walk(read, head=read(80, 0))
    head = walk.head
    if len(head) < 24:
        return walk
    if len(head) >= 80 and head.startswith(b"kvm"):
        walk.order, walk.header_size = _order_of(head, 64), 80
        name_size, walk.num_desc, walk.desc_offset, walk.data_offset = struct.unpack_from(walk.order + "4I", head, 64)
        walk.layout = "v2" if name_size == _NAME_SIZES[0] else "v5"
    elif len(head) >= 80 and head[16:19] == b"kvm":
        walk.order, walk.header_size, walk.id_offset = _order_of(head, 0), 80, 16
        name_size, walk.num_desc, walk.desc_offset, walk.data_offset = struct.unpack_from(walk.order + "4I", head)
        walk.layout = "v9"
    else:
        walk.order, walk.layout = _order_of(head, 4), "merged"
        fields = struct.unpack_from(walk.order + "6I", head)
        _, name_size, walk.num_desc, walk.id_offset, walk.desc_offset, walk.data_offset = fields
    walk.name_size = name_size
    walk.table = _read_fully(read, min(walk.stride * walk.num_desc, _MOST_BYTES), walk.desc_offset)
    _take_descriptors(walk)
    return walk


def _order_of(head: bytes, at: int) -> str:
    """Return the byte order in which the size of names is the smaller one."""
    little, big = (struct.unpack_from(order + "I", head, at)[0] for order in "<>")
    return "<" if little <= big else ">"


def _read_fully(read: Read, size: int, offset: int) -> bytes:
    parts, got = [], 0
    while got < size and (part := read(size - got, offset + got)):
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def _take_descriptors(walk: _Walk) -> None:
    position = 0
    for at in range(0, len(walk.table) - walk.stride + 1, walk.stride):
        flags, exponent, size, offset, bucket_size = struct.unpack_from(walk.order + "IhHII", walk.table, at)
        if walk.layout in ("v2", "v5"):  # those two words are not in use there: values follow each other
            offset, bucket_size = position, 0
        position += 8 * size
        name = walk.table[at + 16 : at + walk.stride]
        walk.descriptors.append(_Descriptor(walk.desc_offset + at, flags, exponent, size, offset, bucket_size, name))


def _bytes(walk: _Walk, at: int, size: int) -> str:
    """Return bytes of the file as evidence."""
    return f"bytes {at} to {at + size - 1}: {walk.read(size, at).hex(' ')}"


def _first(failures: Iterator[str]) -> str | None:
    return next(failures, None)


# ---- the rules. Each returns what breaks it, or why it does not apply, or None.


def _c1(walk: _Walk, live: Live | None) -> str | None:
    if not walk.layout:
        return f"a header takes 24 bytes, and there are {len(walk.head)}: {walk.head.hex(' ')}"
    if walk.layout == "merged" and any(walk.head[:4]):
        return f"flags are not 0: {_bytes(walk, 0, 4)}"
    again = [walk.read(walk.header_size, 0) for _ in range(2 if live else 0)]
    if any(one != walk.head[: walk.header_size] for one in again):
        return f"it reads {again[0].hex(' ')} the second time"
    return None


def _c2(walk: _Walk, _: Live | None) -> str | None:
    raw = walk.read(walk.id_size, walk.id_offset)
    if b"\0" not in raw:
        return f"no NUL in the {walk.id_size} bytes from byte {walk.id_offset}: {raw[:32].hex(' ')} ..."
    return None if raw.startswith(b"kvm") else f"it starts with {raw[:8].hex(' ')}, at byte {walk.id_offset}"


def _c3(walk: _Walk, _: Live | None) -> _NotApplicable | None:
    return None if walk.num_desc == 0 else _NotApplicable(f"there are {walk.num_desc}")


def _c4(walk: _Walk, _: Live | None) -> str | None:
    return _placed(walk, walk.desc_offset, {"merged": 16, "v9": 8}.get(walk.layout, 72))


def _c5(walk: _Walk, _: Live | None) -> str | None:
    return _placed(walk, walk.data_offset, {"merged": 20, "v9": 12}.get(walk.layout, 76))


def _placed(walk: _Walk, offset: int, at: int) -> str | None:
    return None if offset >= walk.header_size else f"it is {offset}, {_bytes(walk, at, 4)}"


def _c6(walk: _Walk, _: Live | None) -> str | None:
    end = walk.blocks()["descriptors"][1]
    if walk.desc_offset <= walk.data_offset < end:
        return f"descriptors are from byte {walk.desc_offset} to {end}, data from byte {walk.data_offset}"
    return None


def _c7(walk: _Walk, _: Live | None) -> str | None:
    return _first(f"{one}: no NUL in {one.raw_name.hex(' ')}" for one in walk.descriptors if b"\0" not in one.raw_name)


def _c8(walk: _Walk, _: Live | None) -> str | None:
    return _first(
        f"{one}: type {one.type}, unit {one.unit}, base {one.base}; {_bytes(walk, one.at, 4)}"
        for one in walk.descriptors
        if one.type > StatType.LOG_HIST or one.unit > StatUnit.BOOLEAN or one.base > 1
    )


def _c9(walk: _Walk, _: Live | None) -> str | None:
    def fits(one: _Descriptor) -> bool:
        if one.unit == StatUnit.SECONDS:
            return one.exponent <= 0
        return one.exponent == 0 if one.unit == StatUnit.BOOLEAN else one.exponent >= 0

    return _first(
        f"{one}: unit {one.unit}, exponent {one.exponent}; {_bytes(walk, one.at + 4, 2)}"
        for one in walk.descriptors
        if one.unit <= StatUnit.BOOLEAN and not fits(one)
    )


def _c10(walk: _Walk, _: Live | None) -> str | None:
    return _first(f"{one}: {_bytes(walk, one.at + 6, 2)}" for one in walk.descriptors if one.size == 0)


def _c11(walk: _Walk, _: Live | None) -> str | _NotApplicable | None:
    if walk.layout in ("v2", "v5", "v9"):
        return _NotApplicable(f"layout {walk.layout} has no bucket sizes")
    return _first(
        f"{one}: type {one.type}, {_bytes(walk, one.at + 12, 4)}"
        for one in walk.descriptors
        if (one.bucket_size != 0) != (one.type == StatType.LINEAR_HIST)
    )


def _c12(walk: _Walk, _: Live | None) -> str | None:
    if walk.data_size >= 8 * walk.num_desc:
        return None
    return f"data are {walk.data_size} bytes, and {walk.num_desc} statistics take {8 * walk.num_desc}"


def _c13(walk: _Walk, _: Live | None) -> str | None:
    end = walk.blocks()["data"][1]
    if walk.data_offset < walk.desc_offset < end:
        return f"data are from byte {walk.data_offset} to {end}, descriptors from byte {walk.desc_offset}"
    return None


def _c14(walk: _Walk, _: Live | None) -> str | None:
    if len(walk.descriptors) < walk.num_desc:
        return f"{walk.num_desc} descriptors are promised; the file ends in number {len(walk.descriptors)}"
    wanted = min(walk.data_size, _MOST_BYTES)
    got = len(walk.read(wanted, walk.data_offset))
    return None if got == wanted else f"{wanted} bytes were asked for at byte {walk.data_offset}, and {got} came"


def _c15(walk: _Walk, _: Live | None) -> str | None:
    got = ((one, len(walk.read(8 * one.size, walk.data_offset + one.offset))) for one in walk.descriptors)
    if _c14(walk, None):
        return None  # the one bulk read says it
    return _first(
        f"{one}: {8 * one.size} bytes at byte {walk.data_offset + one.offset}, and {size} came"
        for one, size in got
        if size != 8 * one.size
    )


_CLOSED = _NotApplicable("it takes an open file")


def _c16(_: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None or live.capability is None:
        return _CLOSED if live is None else _NotApplicable("/dev/kvm cannot be asked")
    return None if live.capability > 0 else f"KVM_CAP_BINARY_STATS_FD is {live.capability}"


def _c17(_: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None:
        return _CLOSED
    fd = os.dup(live.fd)
    os.close(fd)
    try:
        os.pread(fd, 1, 0)
    except OSError as error:
        return None if error.errno == errno.EBADF else f"it gives {os.strerror(error.errno or 0)}"
    return "it can still be read"


def _c18(walk: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None or live.open_again is None:
        return _CLOSED if live is None else _NotApplicable("only the process that made the VM can open another one")
    fd = live.open_again()
    try:
        header = os.pread(fd, walk.header_size, 0)
    finally:
        os.close(fd)
    return None if header == walk.head[: walk.header_size] else f"a second one reads {header.hex(' ')}"


def _c19(walk: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None:
        return _CLOSED
    fd = os.dup(live.fd)
    try:
        header = os.pread(fd, walk.header_size, 0)
    finally:
        os.close(fd)
    return None if header == walk.head[: walk.header_size] else f"the duplicate reads {header.hex(' ')}"


def _c20(walk: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None or live.read_without_vm is None:
        return _CLOSED if live is None else _NotApplicable("the VM's fds are not this process'")
    header = live.read_without_vm()
    return None if header == walk.head[: walk.header_size] else f"it reads {header.hex(' ') or 'nothing'}"


def _d1(walk: _Walk, _: Live | None) -> str | None:
    for what, offset in (("id", walk.id_offset), ("descriptors", walk.desc_offset), ("data", walk.data_offset)):
        if offset % 8:
            return f"the block of {what} begins at byte {offset}"
    return _first(
        f"{one}: offset {one.offset}, {_bytes(walk, one.at + 8, 4)}" for one in walk.descriptors if one.offset % 8
    )


def _d2(walk: _Walk, _: Live | None) -> str | None:
    blocks = walk.blocks()
    if walk.layout != "merged":
        blocks.pop("id")  # it is a part of the header
    for (one, (a, b)), (other, (c, d)) in combinations(blocks.items(), 2):
        # What C4, C5, C6 and C13 say is theirs.
        if a < d and c < b and "id" in (one, other):
            return f"{one} from byte {a} to {b}, {other} from byte {c} to {d}"
    return None


def _d3(walk: _Walk, _: Live | None) -> str | None:
    for one in walk.descriptors:
        if one.unit == StatUnit.BOOLEAN and one.type < StatType.LINEAR_HIST:
            at = walk.data_offset + one.offset
            raw = walk.read(8 * one.size, at)
            for index, (word,) in enumerate(struct.iter_unpack(walk.order + "Q", raw[: len(raw) // 8 * 8])):
                if word > 1:
                    return f"{one.name!r} is {word}, {_bytes(walk, at + 8 * index, 8)}"
    return None


def _d4(walk: _Walk, _: Live | None) -> str | None:
    return _first(
        f"{one}: type {one.type}, size {one.size}, bucket_size {one.bucket_size}; {_bytes(walk, one.at, 16)}"
        for one in walk.descriptors
        if one.unit == StatUnit.BOOLEAN
        and one.type in (StatType.LINEAR_HIST, StatType.LOG_HIST)
        and (one.type, one.size) != (StatType.LINEAR_HIST, 2)
    )


def _d5(walk: _Walk, live: Live | None) -> str | _NotApplicable | None:
    if live is None:
        return _CLOSED
    size = min(walk.data_size, _MOST_BYTES) // 8 * 8
    before = walk.read(size, walk.data_offset)
    live.wait()
    after = walk.read(size, walk.data_offset)
    grows = (StatType.CUMULATIVE, StatType.PEAK, StatType.LINEAR_HIST, StatType.LOG_HIST)
    for one in walk.descriptors:
        if one.type in grows:
            for at in range(one.offset, one.offset + 8 * one.size, 8):
                words = [struct.unpack_from(walk.order + "Q", raw, at)[0] for raw in (before, after) if len(raw) > at]
                if words != sorted(words):
                    where = f"bytes {walk.data_offset + at} to {walk.data_offset + at + 7}"
                    return f"{one.name!r} fell from {words[0]} to {words[1]}, {where}: somebody may have cleared it"
    return None


def _d6(walk: _Walk, _: Live | None) -> str | None:
    seen: dict[bytes, _Descriptor] = {}
    for one in walk.descriptors:
        before = seen.setdefault(one.raw_name.split(b"\0")[0], one)
        if before is not one:
            return f"{one}, and at byte {before.at}"
    return None


_RULES = {
    "C1": ("the header can be read at byte 0, again and again", _c1),
    "C2": ("the id can be read, starts with kvm, and is shorter than its field", _c2),
    "C3": ("there may be no statistic", _c3),
    "C4": ("descriptors begin behind the header", _c4),
    "C5": ("data begin behind the header", _c5),
    "C6": ("descriptors do not reach into the data", _c6),
    "C7": ("each name is shorter than its field", _c7),
    "C8": ("type, unit and base are known", _c8),
    "C9": ("the exponent's sign fits the unit", _c9),
    "C10": ("no statistic has size 0", _c10),
    "C11": ("linear histograms, and only they, have a bucket size", _c11),
    "C12": ("data are at least 8 bytes for each statistic", _c12),
    "C13": ("data do not reach into the descriptors", _c13),
    "C14": ("one read returns all the data", _c14),
    "C15": ("a read of each statistic returns it whole", _c15),
    "C16": ("KVM says that it has stats files", _c16),
    "C17": ("a closed fd gives EBADF", _c17),
    "C18": ("a VM or vCPU may have several stats files", _c18),
    "C19": ("a duplicate of the fd reads the same", _c19),
    "C20": ("it can be read when the VM's fd is closed", _c20),
    "D1": ("offsets are multiples of 8", _d1),
    "D2": ("the id overlaps no other block", _d2),
    "D3": ("booleans are 0 or 1", _d3),
    "D4": ("histograms of booleans are linear and have two buckets", _d4),
    "D5": ("what is cumulative or a peak does not fall", _d5),
    "D6": ("names are unique", _d6),
}
#: Without these, what others are about cannot be found.
_NEEDED = {
    "C1": set(_RULES) - {"C1"},
    "C4": {"C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15", "D1", "D2", "D3", "D4", "D5", "D6"},
    "C5": {"C6", "C13", "C14", "C15", "D2", "D3", "D5"},
}
