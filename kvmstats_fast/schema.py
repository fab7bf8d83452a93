"""What one kind of stats file holds: Header, Schema, and the cache of schemas.

The walk over header and descriptors is C (``csrc/layout.c``); this module calls it, turns what it finds into objects
once per kernel and kind of file, and hands out the same `Schema` object for every further file of that kind.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from kvmstats_fast._arguments import check_name, check_names, find_fitting
from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.abi import LAYOUT_OF_CODE, Layout, StatUnit, split_flags
from kvmstats_fast.errors import ErrorCode, format_error, truncated, unknown_stat
from kvmstats_fast.stat import Stat, decode

if TYPE_CHECKING:
    import numpy.typing as npt

#: A value as `Schema.unpack` gives it: a histogram is an array of counts.
Value: TypeAlias = "int | bool | float | npt.NDArray[np.uint64]"


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a stats file (``struct kvm_stats_header``), the same fields for every layout.

    Attributes
    ----------
    layout : Layout
    byteorder : str
        ``"little"`` or ``"big"``: of the host that made the file.
    flags : int
        0, the only value defined so far.
    name_size : int
        Bytes of a name's field; descriptors are ``16 + name_size`` bytes apart.
    num_desc : int
        Number of descriptors (for a repaired file the true one, not what its header says).
    id_offset, desc_offset, data_offset : int
        Byte of the file where each block starts.
    """

    layout: Layout
    byteorder: Literal["little", "big"]
    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How the bytes of a file of one schema are recognised and read. Inner to the package.

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
    prefix : bytes
        The file up to the end of its descriptors, with everything blanked that does not make the schema: the id, and
        gaps between blocks. `schema_of` makes the schema of it again.
    windows : tuple of (slice, bytes)
        What `prefix` has that is not blank: the header without the id, and the descriptors.
    """

    header: Header
    swapped: bool
    repaired: bool
    id_size: int
    data_size: int
    prefix: bytes
    windows: tuple[tuple[slice, bytes], ...]

    def fits(self, blob: bytes) -> bool:
        """Whether `blob`, the start of a file, has this header and these descriptors (and room for an id)."""
        for window, raw in self.windows:  # all() of a generator takes three times as long
            if blob[window] != raw:
                return False
        return len(blob) >= len(self.prefix)

    def read_id(self, blob: bytes) -> str:
        """Return the id in `blob`, the start of a file: to its NUL or to the end of its room, whichever is first."""
        start = self.header.id_offset
        return decode(blob[start : start + self.id_size].partition(b"\0")[0])

    @property
    def data_end(self) -> int:
        """Byte of the file where the values end, if each has 8 bytes."""
        return self.header.data_offset + self.data_size

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


class Schema(Mapping[str, Stat]):
    """What one kind of stats file holds: a mapping of names to `Stat`, in the order of the descriptors.

    Files with the same header and descriptors share one Schema object, so ``a.schema is b.schema`` holds for all vCPUs
    of a kernel. Two schemas are equal if those bytes are. Schemas are immutable, hashable and can be pickled.

    Attributes
    ----------
    stats : tuple of Stat
    header : Header
    data_size : int
        Bytes of all values as uint64, words that no descriptor names included.
    encoding : Encoding
        Inner to the package: how the bytes of a file are recognised and read. It may change in any version.
    """

    __slots__ = (
        "_by_name",
        "_dtype",
        "_places",
        "data_size",
        "encoding",
        "header",
        "stats",
    )

    def __init__(self, blob: bytes, parsed: Any, stats: tuple[Stat, ...]) -> None:
        swapped = bool(parsed.swapped)
        self.header = Header(
            layout=LAYOUT_OF_CODE[parsed.layout],
            byteorder="little" if (sys.byteorder == "little") != swapped else "big",
            flags=parsed.flags,
            name_size=parsed.name_size,
            num_desc=parsed.num_desc,
            id_offset=parsed.id_offset,
            desc_offset=parsed.desc_offset,
            data_offset=parsed.data_offset,
        )
        self.stats = stats
        self.data_size: int = parsed.data_size
        self._by_name = {stat.name: stat for stat in stats}
        self._dtype: np.dtype[np.void] | None = None
        self._places: list[tuple[Stat, str, int, int, bool, str]] | None = None
        # What makes a schema: the header without the id, and the table. Everything else of the file is blanked.
        windows = [
            slice(parsed.key_offset, parsed.key_offset + parsed.key_size),
            slice(parsed.desc_offset, parsed.desc_end),
        ]
        if self.layout is not Layout.MERGED:
            windows.append(slice(parsed.id_offset, parsed.id_offset + 4))  # "kvm-": these layouts are known by it
        prefix = bytearray(parsed.prefix_size)
        for window in windows:
            prefix[window] = blob[window]
        self.encoding = Encoding(  # last: from here on nothing can be changed
            self.header,
            swapped,
            bool(parsed.count_defect),
            parsed.id_size,
            self.data_size,
            bytes(prefix),
            tuple((window, blob[window]) for window in windows),
        )

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "encoding") and not name.startswith("_"):
            raise AttributeError(f"a Schema is shared by all files of its kind: {name} cannot be changed")
        super().__setattr__(name, value)

    @property
    def layout(self) -> Layout:
        """Layout of the file."""
        return self.header.layout

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """``"little"`` or ``"big"``: of the file; values are always handed out in this machine's."""
        return self.header.byteorder

    @property
    def num_values(self) -> int:
        """Length of a file's values as uint64."""
        return self.data_size // 8

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Structured dtype with the kernel's offsets: ``values.view(schema.dtype)["exits"]`` copies nothing.

        The view has shape ``(1,)`` for one reading of shape ``(num_values,)``; a histogram is a sub-array. (Of a file
        without descriptors there is no view: numpy cannot view an array as a type without fields.)
        """
        if self._dtype is None:
            self._dtype = np.dtype(
                {
                    "names": list(self),
                    "formats": [(np.uint64, stat.shape) for stat in self.stats],
                    "offsets": [stat.offset for stat in self.stats],
                    "itemsize": self.data_size,
                }
            )
        return self._dtype

    @property
    def fingerprint(self) -> str:
        """128 bits in hexadecimal over header and descriptors: equal for equal schemas, on every machine."""
        import hashlib  # noqa: PLC0415 - loads OpenSSL, for this method alone

        return hashlib.blake2b(self.encoding.prefix + bytes([self.encoding.repaired]), digest_size=16).hexdigest()

    def select(self, *patterns: str) -> tuple[Stat, ...]:
        """Find statistics by name or glob (``halt_*``; case matters).

        Returns
        -------
        tuple of Stat
            In the order of the patterns, those of one glob in the order of the file; each once.

        Raises
        ------
        KeyError
            If a pattern fits nothing; the message names near misses.
        """
        chosen: dict[str, Stat] = {}
        for pattern in check_names("patterns", patterns):
            fitting = self.matches(pattern)
            if not fitting:
                raise unknown_stat(pattern, self, "this file")
            chosen.update(fitting)
        return tuple(chosen.values())

    def matches(self, pattern: str) -> dict[str, Stat]:
        """Find the statistics that a name or glob fits, by name; there may be none."""
        return {name: self[name] for name in find_fitting(pattern, self)}

    def unpack(self, values: npt.NDArray[np.uint64], *, si: bool = False) -> dict[str, Value]:
        """Name the values of one reading.

        Parameters
        ----------
        values : numpy.ndarray
            uint64, shape ``(num_values,)``.
        si : bool
            Scale plain numbers to base units (seconds, bytes ...): int where the exponent is not negative, else float.
            A statistic with an unknown code is left raw, with a RuntimeWarning.

        Returns
        -------
        dict
            Per statistic an int, a bool (unit BOOLEAN, if it is 0 or 1), a float (`si`), or for a histogram an
            array of counts, a view into `values`.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.uint64:
            raise TypeError(f"values must be a uint64 array, not {getattr(values, 'dtype', type(values).__name__)}")
        if values.shape != (self.num_values,):
            raise ValueError(f"values have shape {values.shape}, this schema has ({self.num_values},)")
        plain = values.tolist()
        result: dict[str, Value] = {}
        for stat, name, word, end, is_boolean, unknown in self._unpacking():
            if si and unknown:
                warnings.warn(f"{name} is left as it is: unknown {unknown}", RuntimeWarning, 3)
            if end:
                result[name] = values[word:end]
                continue
            value = plain[word]
            if is_boolean and value <= 1:
                value = bool(value)
            elif si:
                value = stat.to_base_units(value)
            result[name] = value
        return result

    def _unpacking(self) -> list[tuple[Stat, str, int, int, bool, str]]:
        """Per statistic its name, its place among the values (end 0: a plain number), and what its codes are."""
        if self._places is None:
            places = []
            for stat in self.stats:
                word = stat.offset // 8
                end = word + stat.size if stat.shape else 0
                places.append((stat, stat.name, word, end, stat.unit == StatUnit.BOOLEAN, stat.unknown))
            self._places = places  # whole: other threads share this schema
        return self._places

    def __getitem__(self, name: str) -> Stat:
        try:
            return self._by_name[name]
        except (KeyError, TypeError):
            check_name(name)
            raise unknown_stat(name, self, "this file") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.stats)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Schema):
            return NotImplemented
        mine, others = self.encoding, other.encoding
        return (mine.prefix, mine.repaired) == (others.prefix, others.repaired)

    def __hash__(self) -> int:
        return hash(self.encoding.prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return schema_of, (self.encoding.prefix, "a pickled schema", self.encoding.repaired)

    def __repr__(self) -> str:
        return f"<Schema {self.layout} {self.byteorder}-endian: {len(self)} stats, {self.num_values} values>"


_ID = re.compile(r"(?:.*/)?vcpu-([0-9]+)", re.DOTALL)


def kind_of(file_id: str) -> tuple[Literal["vm", "vcpu"], int | None]:
    """``("vcpu", 3)`` for ``kvm-PID/vcpu-3``, else ``("vm", None)``."""
    match = _ID.fullmatch(file_id)
    return ("vcpu", int(match[1])) if match else ("vm", None)


class _Entry:
    """A schema in the cache: when it was used last, and roughly how many bytes it keeps."""

    __slots__ = ("cost", "schema", "used")

    def __init__(self, schema: Schema, used: int) -> None:
        self.schema = schema
        self.used = used
        # A Stat with its name, its place in `unpack` and its field in `dtype` take 700 bytes; the table is kept twice.
        self.cost = 700 * len(schema) + 2 * len(schema.encoding.prefix)


class SchemaCache:
    """The schemas that were used last, one object for each kind of file.

    It takes no lock: a thread that held one would not be there in a forked child, and a signal handler would wait for
    the code that it interrupted. Each step is one operation of a dict, which is atomic; to be iterated over it is
    copied.

    Parameters
    ----------
    capacity : int
        Schemas that are kept.
    size : int
        Bytes that they may keep together. One that is larger by itself is not kept.
    """

    def __init__(self, capacity: int, size: int) -> None:
        self._capacity = capacity
        self._size = size
        self._entries: dict[bytes, _Entry] = {}
        self._latest: Schema | None = None  # most files are of the kind of the one before
        self._uses = count()

    def find(self, blob: bytes) -> Schema | None:
        """Return the schema of a file that starts with `blob`, if it is known."""
        latest = self._latest
        if latest is not None and latest.encoding.fits(blob):
            return latest
        for entry in self._entries.copy().values():
            if entry.schema.encoding.fits(blob):
                return self._use(entry)
        return None

    def add(self, schema: Schema) -> Schema:
        """Return the one object that stands for `schema` from now on: itself, or an equal one that was there first."""
        entry = _Entry(schema, next(self._uses))
        if entry.cost > self._size:
            return schema
        first = self._entries.setdefault(schema.encoding.prefix, entry)
        self._use(first)
        self._evict()
        return first.schema

    def _use(self, entry: _Entry) -> Schema:
        entry.used = next(self._uses)
        self._latest = entry.schema
        return entry.schema

    def _evict(self) -> None:
        room = self._size
        last_used = sorted(self._entries.copy().items(), key=lambda item: -item[1].used)
        for number, (prefix, entry) in enumerate(last_used):
            room -= entry.cost
            if room < 0 or number >= self._capacity:
                self._entries.pop(prefix, None)

    def clear(self) -> None:
        """Forget all schemas."""
        self._entries.clear()
        self._latest = None


#: More kinds of files than one process meets: two per kernel, with at most 98 statistics, and those of recordings.
CACHE = SchemaCache(capacity=64, size=8 << 20)

# The C struct's fields as numpy sees them, so that all descriptors become Python numbers in one call.
_DESC_CTYPE = ffi.typeof("struct kvmstats_desc")
_DESC_DTYPE = np.dtype(
    {
        "names": [name for name, _ in _DESC_CTYPE.fields],
        "formats": [field.type.cname.removesuffix("_t") for _, field in _DESC_CTYPE.fields],
        "offsets": [field.offset for _, field in _DESC_CTYPE.fields],
        "itemsize": ffi.sizeof("struct kvmstats_desc"),
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


def schema_of(blob: bytes, source: str, repair: bool = False) -> Schema:
    """Return the schema of the file that starts with `blob`, which reaches at least to the end of the descriptors."""
    known = CACHE.find(blob)
    if known is not None:
        return known
    header = read_header(blob, source, repair=repair)
    fault = ffi.new("struct kvmstats_fault *")
    # Before the table is known to be there, nothing is allocated for it.
    room = header.num_desc if header.desc_end <= len(blob) else 0
    descs = ffi.new("struct kvmstats_desc[]", room)
    code = lib.kvmstats_read_descriptors(ffi.from_buffer("char[]", blob), len(blob), header, descs, fault)
    if code:
        raise format_error(code, fault, source)
    stats = []
    seen: dict[str, int] = {}
    for index, (name_offset, name_length, flags, exponent, size, offset, bucket_size) in enumerate(
        np.frombuffer(ffi.buffer(descs), _DESC_DTYPE).tolist()
    ):
        name = decode(blob[name_offset : name_offset + name_length])
        if name in seen:
            fault.offset, fault.value, fault.index = name_offset, seen[name], index
            raise format_error(ErrorCode.DUPLICATE, fault, source, name=name)
        seen[name] = name_offset
        stats.append(Stat(name, *split_flags(flags), exponent, size, offset, bucket_size))
    schema = Schema(blob, header, tuple(stats))
    # A repaired schema must never be found for a file that is opened to be read: its data is not its own.
    return schema if header.count_defect else CACHE.add(schema)
