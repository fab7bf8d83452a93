"""Hypothesis strategies for stats files: valid ones, with what they were made of, and damaged ones."""

from __future__ import annotations

import dataclasses
import re
import struct
from dataclasses import dataclass

from hypothesis import strategies as st

ORDERS = {"<": "little", ">": "big"}
#: Name sizes a layout can have; merged takes any.
NAME_SIZES = {"v2": [32], "v5": [48], "v9": [32, 48]}
POSITIONAL = ("v2", "v5")

#: Numbers at which a reader may go wrong.
BOUNDARIES = [
    *(0, 1, 2, 4, 7, 8, 9, 16, 23, 24, 25, 31, 32, 33, 47, 48, 49, 64, 72, 79, 80, 81, 88, 128, 136),
    *(0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0xFFF8, 0xFFFF, 0x10000, 0x10001),
    *(0x0FFFFFF0, 0x0FFFFFF8, 0x10000000, 0x10000008, 0x18000000, 0x20000000, 0x30000000),
    *(0x7FFFFFF8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFF8, 0xFFFFFFFF),
]


@dataclass
class Built:
    """A file, and what a reader must find in it: stats as in twin.StatsFile; words: all of the data, None if lost."""

    data: bytes
    layout: str
    byteorder: str
    id: bytes
    stats: list[tuple[bytes, int, int, int, int, int, int, int]]
    words: list[int] | None
    name_size: int
    places: dict[str, int]  # where the blocks start


def _padded(label: bytes, size: int, filler: bytes) -> bytes:
    """Return a field of `size` bytes: the label, a NUL if there is room, and what happens to stand behind it."""
    return (label + b"\0" + filler * size)[:size]


def _names(name_size: int) -> st.SearchStrategy[bytes]:
    """Draw names: plain, of any letters, of any bytes, and as long as their field."""
    plain = st.text(alphabet="abcdefg_", min_size=1, max_size=min(name_size, 12)).map(str.encode)
    letters = st.text(min_size=1, max_size=min(name_size, 8)).map(lambda name: name.encode()[:name_size])
    raw = st.binary(min_size=1, max_size=min(name_size, 8))
    full = raw.map(lambda part: (part * name_size)[:name_size])
    return st.one_of(plain, plain, letters, raw, full).map(lambda name: name.replace(b"\0", b"0"))


#: Every type, unit and base there is and some there are not, without and with the reserved bits.
FLAGS = [
    reserved | base << 8 | unit << 4 | type_
    for reserved in (0, 0, 0x1000, 0xFFFFF000)
    for base in (0, 0, 1, 1, 2, 15)
    for unit in (0, 1, 2, 3, 4, 5, 15)
    for type_ in (0, 1, 2, 3, 4, 5, 15)
]

_numbers = st.tuples(
    st.sampled_from(FLAGS),
    st.one_of(st.sampled_from([0, 0, -9, 9, -32768, 32767]), st.integers(-32768, 32767)),  # exponent
    st.one_of(st.just(1), st.integers(1, 40)),  # size
    st.one_of(st.sampled_from([0, 1, 1000]), st.integers(0, 0xFFFFFFFF)),  # bucket_size
    st.integers(0, 3),  # words before it that no descriptor names
)

_labels = st.one_of(
    st.sampled_from([b"", b"1", b"12345", b"7/vcpu-0", b"12345/vcpu-17", b"1/vcpu-", b"1/vcpu-x", b"vcpu-1"]),
    st.binary(max_size=60).map(lambda label: label.replace(b"\0", b"0")),
)


def _place(draw, sizes, layout, start):
    """Say where each block starts and where the file ends: any order and gaps as far as the layout has them."""
    order = [name for name in ("id", "desc", "data") if name in sizes]
    if layout != "v9":
        order = draw(st.one_of(st.just(order), st.permutations(order)))
    offsets = {}
    for name in order:
        gap = 0 if (layout, name) == ("v9", "desc") else draw(st.sampled_from([0, 0, 0, 8, 24, 8000]))
        start = offsets[name] = -(-start // 8) * 8 + gap
        start += sizes[name]
    return offsets, start, order[-1]


def _table(order, name_size, layout, stats, filler):
    """Return the descriptors; what the positional layouts leave unused is filled with something."""
    unused = struct.unpack(order + "II", _padded(filler, 8, filler))
    return b"".join(
        struct.pack(order + "IhHII", flags, exponent, size, *(unused if layout in POSITIONAL else (offset, width)))
        + _padded(name, name_size, filler)
        for name, flags, exponent, size, offset, width in stats
    )


def _offsets_of(draw, numbers, layout):
    """Give every stat its offset: one after the other, or with gaps, shuffled, or even on top of each other."""
    if layout in POSITIONAL:
        return [8 * sum(size for _, _, size, _, _ in numbers[:i]) for i in range(len(numbers))]
    way = draw(st.sampled_from(["in order", "shuffled", "anywhere"]))
    if way == "anywhere":
        return [8 * draw(st.integers(0, 60)) for _ in numbers]
    offsets = {}
    start = 0
    places = range(len(numbers))
    for i in draw(st.permutations(places)) if way == "shuffled" else places:
        _, _, size, _, gap = numbers[i]
        offsets[i] = start + 8 * gap
        start = offsets[i] + 8 * size
    return [offsets[i] for i in places]


@st.composite
def valid_files(draw, layouts=("merged", "merged", "v2", "v5", "v9"), at_least=0):
    """Draw a file that follows every rule of the format and has so many statistics."""
    layout = draw(st.sampled_from(layouts))
    order = draw(st.sampled_from(sorted(ORDERS)))
    # Next to the sizes in use, all those that a rounding to 8 or a fixed 48 would get wrong.
    any_size = st.one_of(st.just(48), st.integers(1, 64), st.sampled_from([65, 255, 4096]))
    name_size = draw(st.sampled_from(NAME_SIZES[layout]) if layout in NAME_SIZES else any_size)
    filler = draw(st.sampled_from([b"\0", b"\xff", b"kvm-", b"a"]))

    names = draw(st.lists(_names(name_size), min_size=at_least, max_size=6, unique=True))
    numbers = [draw(_numbers) for _ in names]
    offsets = _offsets_of(draw, numbers, layout)
    stats = [
        (name, flags, exponent, size, offset, width)
        for name, (flags, exponent, size, width, _), offset in zip(names, numbers, offsets, strict=True)
    ]
    count = max((offset // 8 + size for _, _, _, size, offset, _ in stats), default=0)
    word = st.one_of(st.sampled_from([0, 1, 2, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF]), st.integers(0, 2**64 - 1))
    few = draw(st.lists(word, min_size=1, max_size=8))
    words = [few[i % len(few)] ^ i for i in range(count)]

    id_size = 64 if layout in NAME_SIZES else name_size
    label = b"kvm-" * (layout in NAME_SIZES or draw(st.booleans())) + draw(_labels)
    label = label[: draw(st.sampled_from([id_size, id_size, min(5, id_size)]))]
    is_vcpu = re.fullmatch(rb"vcpu-[0-9]+", label.rpartition(b"/")[2])

    table = _table(order, name_size, layout, stats, filler)
    sizes = {"desc": len(table), "data": 8 * count}
    if layout == "merged":
        sizes["id"] = id_size
    places, end, last = _place(draw, sizes, layout, 24 if layout == "merged" else 80)

    value = "Q"
    tail = draw(st.sampled_from([b"", b"", b"\0", b"\xff" * 40]))
    if layout in POSITIONAL and count and last == "data" and not is_vcpu and draw(st.booleans()):
        value, tail = "I", b""  # the VM file of a 32-bit kernel
        words = [word & 0xFFFFFFFF for word in words]
        end -= 4 * count
    data = bytearray(_padded(b"", end, draw(st.sampled_from([b"\0", b"\xee"]))))
    if layout == "merged":
        data[:24] = struct.pack(order + "6I", 0, name_size, len(stats), places["id"], places["desc"], places["data"])
        data[places["id"] : places["id"] + id_size] = _padded(label, id_size, filler)
    else:
        head = struct.pack(order + "4I", name_size, len(stats), places["desc"], places["data"])
        field_of_id = _padded(label, 64, filler)
        data[:80] = head + field_of_id if layout == "v9" else field_of_id + head
    data[places["desc"] : places["desc"] + len(table)] = table
    data[places["data"] : places["data"] + len(words) * struct.calcsize(value)] = struct.pack(
        f"{order}{len(words)}{value}", *words
    )
    return Built(
        bytes(data) + tail,
        layout,
        ORDERS[order],
        label,
        [
            (
                name,
                flags & 15,
                flags >> 4 & 15,
                flags >> 8 & 15,
                exponent,
                size,
                offset,
                0 if layout in POSITIONAL else w,
            )
            for name, flags, exponent, size, offset, w in stats
        ],
        words,
        name_size,
        places,
    )


@st.composite
def files_with_a_duplicate(draw):
    """Draw a file that is valid but for a name that stands in it twice."""
    built = draw(valid_files(at_least=2))
    first, second = sorted(draw(st.permutations(range(len(built.stats))))[:2])
    start_of = lambda index: built.places["desc"] + index * (16 + built.name_size) + 16  # noqa: E731
    data = bytearray(built.data)
    name = built.data[start_of(first) :][: built.name_size]
    data[start_of(second) : start_of(second) + built.name_size] = name
    return bytes(data)


@st.composite
def files_with_a_grown_stat(draw):
    """Draw a file in which one statistic claims more values than it had, which may reach into the block behind."""
    built = draw(valid_files(at_least=1))
    order = next(order for order, name in ORDERS.items() if name == built.byteorder)
    index = draw(st.integers(0, len(built.stats) - 1))
    place = built.places["desc"] + index * (16 + built.name_size) + 6
    size = built.stats[index][5] + draw(st.integers(1, 100))
    return built.data[:place] + struct.pack(order + "H", size) + built.data[place + 2 :]


@st.composite
def files_with_the_count_defect(draw):
    """Draw a vCPU file as the series makes them on x86: the count is the table's size, the data is other memory."""
    built = draw(valid_files(layouts=POSITIONAL, at_least=1))
    order = next(order for order, name in ORDERS.items() if name == built.byteorder)
    size = len(built.stats) * (16 + built.name_size)
    table = built.data[built.places["desc"] :][:size]
    start = 80 + draw(st.sampled_from([0, 0, 8, 48]))
    head = struct.pack(order + "4I", built.name_size, size, start, start + size)
    memory = draw(st.binary(max_size=200))
    data = (_padded(built.id, 64, b"\xff") + head).ljust(start, b"\0") + table + memory
    return dataclasses.replace(built, data=data, words=None, places={"desc": start, "data": start + size})


def files():
    """Draw any file of the strategies above, as bytes."""
    sound, defective = valid_files(), files_with_the_count_defect()
    return st.one_of(
        sound.map(lambda built: built.data),
        defective.map(lambda built: built.data),
        files_with_a_duplicate(),
        files_with_a_grown_stat(),
    )


# ---- damage

DAMAGES = ["bit", "byte", "u32<", "u32>", "truncate", "insert", "remove", "splice"]


def damage(data: bytes, kind: str, where: int, value: int, other: bytes) -> bytes:
    """Return `data` with one thing changed; any `where` and `value` will do, `other` is what is put in."""
    at = where % (len(data) + 1)
    if kind.startswith("u32"):
        at -= at % 4  # numbers stand at multiples of 4 where name_size is one
    new, behind = {
        "bit": (bytes(byte ^ 1 << value % 8 for byte in data[at : at + 1]), at + 1),
        "byte": (bytes([value & 0xFF]), at + 1),
        "u32<": (struct.pack("<I", value & 0xFFFFFFFF), at + 4),
        "u32>": (struct.pack(">I", value & 0xFFFFFFFF), at + 4),
        "truncate": (b"", len(data)),
        "insert": (other, at),
        "remove": (b"", at + value % 64),
        "splice": (other[at:], len(data)),
    }[kind]
    return data[:at] + new + data[behind:]


_one_damage = st.tuples(
    st.sampled_from(DAMAGES),
    st.one_of(st.integers(0, 24).map(lambda i: 4 * i), st.integers(0, 2**13)),
    st.one_of(st.sampled_from(BOUNDARIES), st.integers(0, 2**32 - 1)),
    st.binary(max_size=64),
)


@st.composite
def damaged(draw, originals):
    """Draw a file, and a list of what becomes of it by one change each, and by one on top of the other."""
    original = ruin = draw(originals)
    results = []
    for how in draw(st.lists(_one_damage, min_size=1, max_size=4)):
        ruin = damage(ruin, *how)
        results += [damage(original, *how), ruin]
    return original, results
