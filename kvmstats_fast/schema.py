"""What a stats file holds: Stat, Schema, the schema cache, and parse() for a whole file in memory.

The walk over header and descriptors is C (``csrc/layout.c``); this module calls it, turns what it finds into objects
once per kernel and kind of file, and hands out the same `Schema` object for every further file of that kind.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, KeysView, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.abi import KNOWN, LAYOUT_OF_CODE, Layout, StatBase, StatType, StatUnit, split_flags
from kvmstats_fast.errors import ErrorCode, KvmStatsError, format_error, truncated, unknown_stat

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

__all__ = ["Header", "Schema", "Stat", "StatsImage", "parse"]

#: A value as `Schema.unpack` gives it: a histogram is an array of counts.
Value: TypeAlias = "int | bool | float | npt.NDArray[np.uint64]"


@dataclass(frozen=True, slots=True)
class Stat:
    """One statistic, as its descriptor says (``struct kvm_stats_desc``).

    Attributes
    ----------
    name : str
        Bytes that are no UTF-8 are kept by ``surrogateescape``.
    type, unit, base : StatType, StatUnit, StatBase, or int
        An int is a code this package does not know; such a statistic is kept raw (see `unknown`).
    exponent : int
        A value in base units is ``raw * 10**exponent`` (or 2, after `base`).
    size : int
        Number of uint64 values: 1, or the buckets of a histogram.
    offset : int
        Bytes from the start of the values (as uint64), a multiple of 8.
    bucket_size : int
        Width of a linear histogram's buckets, else 0.
    """

    name: str
    type: StatType | int
    unit: StatUnit | int
    base: StatBase | int
    exponent: int
    size: int
    offset: int
    bucket_size: int = 0

    @property
    def is_histogram(self) -> bool:
        """Whether the values are bucket counts."""
        return self.type in (StatType.LINEAR_HIST, StatType.LOG_HIST)

    @property
    def shape(self) -> tuple[int, ...]:
        """``()`` for a plain number, ``(size,)`` for a histogram or any other statistic of several values."""
        return (self.size,) if self.size != 1 or self.is_histogram else ()

    @property
    def unknown(self) -> str:
        """Which codes this package does not know, such as ``"type 7, base 3"``; empty for all that exist so far."""
        codes = {"type": self.type, "unit": self.unit, "base": self.base}
        return ", ".join(f"{what} {code}" for what, code in codes.items() if code not in KNOWN[what])

    @property
    def scale(self) -> int | float:
        """What a raw value is multiplied with: an int where exact, 1 where a code is unknown."""
        return self.to_base_units(1)

    def to_base_units(self, raw: int) -> int | float:
        """Scale a raw value: exact while it is an integer, else the nearest float; unscaled if a code is unknown."""
        return _scaled(raw, self.factor, self.exponent)

    def units(self, si: bool = False) -> str:
        """Return the unit's symbol: of raw values (``"ns"``, ``"KiB"``), or with `si` of base units (``"s"``, ``"B"``).

        Returns
        -------
        str
            Empty for plain counts and booleans. A histogram's unit is of its buckets' edges; its values are counts. The
            code in words where this package does not know it (``"unit 9"``), because then the value is left raw.
        """
        if self.unknown:
            return self.unknown
        symbol = _SYMBOLS[StatUnit(self.unit)]
        if si or not self.exponent:
            return symbol
        radix = StatBase(self.base).radix
        prefix = _PREFIXES.get((radix, self.exponent)) if symbol in ("s", "B") else None
        return f"{radix}^{self.exponent} {symbol}".rstrip() if prefix is None else prefix + symbol

    @property
    def factor(self) -> int:
        """What to multiply a raw value with, or to divide it by if the exponent is negative; 1 if a code is unknown."""
        if self.exponent == 0 or self.unknown:
            return 1
        factor: int = StatBase(self.base).radix ** abs(self.exponent)
        return factor

    @property
    def _float_factor(self) -> float:
        return float(min(self.factor, _LARGEST))

    def _in_floats(self, values: npt.NDArray[np.uint64 | np.int64]) -> npt.NDArray[np.float64]:
        """Scale an array of raw values: each as `to_base_units` does, but for a rounding."""
        result: npt.NDArray[np.float64] = (np.divide if self.exponent < 0 else np.multiply)(values, self._float_factor)
        return result

    def bucket_edges(self) -> npt.NDArray[np.float64]:
        """Edges of a histogram's buckets, in base units.

        Bucket i counts what fell into ``[edges[i], edges[i + 1])``. Linear: ``i * bucket_size``. Logarithmic: 0, 1,
        2, 4, 8 ... (``kvm_stats_linear_hist_update`` and ``kvm_stats_log_hist_update``, ``include/linux/kvm_host.h``).

        Returns
        -------
        numpy.ndarray
            float64, shape ``(size + 1,)``; the last is inf, because the last bucket also counts all that is above it.
            Raw where a code is unknown (see `unknown`).

        Raises
        ------
        ValueError
            If this is no histogram, or a linear one without a bucket size.
        """
        if self.type == StatType.LINEAR_HIST:
            if self.bucket_size == 0:
                raise ValueError(f"{self.name} is a linear histogram, but its descriptor has bucket_size 0")
            raw: Iterable[int] = (i * self.bucket_size for i in range(self.size))
        elif self.type == StatType.LOG_HIST:
            raw = chain((0,), (1 << i for i in range(self.size - 1)))
        else:
            raise ValueError(f"{self.name} is no histogram: its type is {self.type!r}")
        edges = np.full(self.size + 1, np.inf)
        factor = self.factor
        with suppress(OverflowError):  # from the first edge on that no float reaches, they are inf
            for i, edge in enumerate(raw):
                edges[i] = float(_scaled(edge, factor, self.exponent))
        return edges


_LARGEST = 10**270  # of any uint64, over a ns, it makes what is still a float; no kernel has such an exponent
_SYMBOLS = {StatUnit.NONE: "", StatUnit.BYTES: "B", StatUnit.SECONDS: "s", StatUnit.CYCLES: "cycles"}
_SYMBOLS[StatUnit.BOOLEAN] = ""
_PREFIXES = dict(zip(((10, exponent) for exponent in (-12, -9, -6, -3, 3, 6, 9, 12)), "pnumkMGT", strict=True))
_PREFIXES |= {(2, 10 * power): f"{letter}i" for power, letter in enumerate("KMGTPE", 1)}


def _scaled(raw: int, factor: int, exponent: int) -> int | float:
    return raw / factor if exponent < 0 and factor != 1 else raw * factor


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


class Schema(Mapping[str, Stat]):
    """What one kind of stats file holds: a mapping of names to `Stat`, in the order of the descriptors.

    Files with the same header and descriptors share one Schema object, so ``a.schema is b.schema`` holds for all vCPUs
    of a kernel. Two schemas are equal if those bytes are. Schemas are immutable, hashable and can be pickled.

    Attributes
    ----------
    stats : tuple of Stat
    header : Header
    """

    __slots__ = (
        "_by_name",
        "_dtype",
        "_id_size",
        "_key",
        "_places",
        "_prefix",
        "_repaired",
        "data_size",
        "header",
        "stats",
        "swapped",
    )

    def __init__(self, blob: bytes, parsed: Any, stats: tuple[Stat, ...]) -> None:
        #: Whether the file is in the other byte order than this machine.
        self.swapped = bool(parsed.swapped)
        self.header = Header(
            layout=LAYOUT_OF_CODE[parsed.layout],
            byteorder="little" if (sys.byteorder == "little") != self.swapped else "big",
            flags=parsed.flags,
            name_size=parsed.name_size,
            num_desc=parsed.num_desc,
            id_offset=parsed.id_offset,
            desc_offset=parsed.desc_offset,
            data_offset=parsed.data_offset,
        )
        self.stats = stats
        #: Bytes of all values as uint64, words that no descriptor names included.
        self.data_size: int = parsed.data_size
        self._by_name = {stat.name: stat for stat in stats}
        self._dtype: np.dtype[np.void] | None = None
        self._places: list[tuple[Stat, str, int, int, bool, str]] | None = None
        self._id_size: int = parsed.id_size
        self._repaired = bool(parsed.count_defect)
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
        self._prefix = bytes(prefix)
        self._key = tuple((window, blob[window]) for window in windows)  # last: from here on nothing can be changed

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "_key") and not name.startswith("_"):
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
        without descriptors there is no view: numpy has none of a type without fields.)
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
        return hashlib.blake2b(self._prefix + bytes([self._repaired]), digest_size=16).hexdigest()

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
        for pattern in patterns:
            fitting = self.matches(pattern)
            if not fitting:
                raise unknown_stat(pattern, self, "this file")
            chosen.update(fitting)
        return tuple(chosen.values())

    def matches(self, pattern: str) -> dict[str, Stat]:
        """Find the statistics that a name or glob fits, by name; there may be none."""
        if pattern in self:
            return {pattern: self[pattern]}
        return {name: stat for name, stat in self.items() if fnmatchcase(name, pattern)}

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
        stat = self._by_name.get(name)
        if stat is None:
            raise unknown_stat(name, self, "this file")
        return stat

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
        return (self._prefix, self._repaired) == (other._prefix, other._repaired)

    def __hash__(self) -> int:
        return hash(self._prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return schema_of, (self._prefix, "a pickled schema", self._repaired)

    def __repr__(self) -> str:
        return f"<Schema {self.layout} {self.byteorder}-endian: {len(self)} stats, {self.num_values} values>"

    # ---- for the readers of this package

    def fits(self, blob: bytes) -> bool:
        """Whether `blob`, the start of a file, holds this schema's header and descriptors (and room for an id)."""
        for window, raw in self._key:  # all() of a generator takes three times as long
            if blob[window] != raw:
                return False
        return len(blob) >= len(self._prefix)

    def id_of(self, blob: bytes) -> str:
        """Return the id in `blob`, the start of a file: to its NUL or to the end of its room, whichever is first."""
        start = self.header.id_offset
        return decode(blob[start : start + self._id_size].partition(b"\0")[0])

    @property
    def data_end(self) -> int:
        """Byte of the file where the values end, if each has 8 bytes."""
        return self.header.data_offset + self.data_size

    def value_size(self, file_end: int, file_id: str, source: str) -> int:
        """Bytes of a value in a file that ends at byte `file_end`: 8, or 4 of an old 32-bit kernel.

        Before the merge, VM statistics were ``unsigned long`` (from v8 u64), vCPU statistics u64. Nothing follows
        them, so half the size means 4-byte values: a file of 8-byte values cut at exactly half looks the same.
        """
        if file_end >= self.data_end or not self.data_size:
            return 8
        half = file_end - self.header.data_offset == self.data_size // 2 and self.layout in (Layout.V2, Layout.V5)
        if half and kind_of(file_id)[0] == "vm":
            return 4
        raise truncated(source, file_end, self.data_end)


def decode(raw: bytes) -> str:
    """Text of a name or id; nothing is lost."""
    return raw.decode("utf-8", "surrogateescape")


_ID = re.compile(r"(?:.*/)?vcpu-([0-9]+)", re.DOTALL)


def kind_of(file_id: str) -> tuple[Literal["vm", "vcpu"], int | None]:
    """``("vcpu", 3)`` for ``kvm-PID/vcpu-3``, else ``("vm", None)``."""
    match = _ID.fullmatch(file_id)
    return ("vcpu", int(match[1])) if match else ("vm", None)


#: Bytes of header and table; those of today's kernels are below 5000.
_LARGEST_KEPT = 1 << 20


class _Cache:
    """The schemas seen last, most recent first. Reading takes no lock: the tuple is only ever replaced."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: tuple[Schema, ...] = ()
        self._lock = threading.Lock()

    def find(self, blob: bytes) -> Schema | None:
        """Return the schema of a file that starts with `blob`, if one is known."""
        for index, schema in enumerate(self._entries):
            if schema.fits(blob):
                if index:
                    self._put_first(schema)
                return schema
        return None

    def add(self, schema: Schema) -> Schema:
        """Return the one object that stands for `schema` from now on: itself, or the equal one that was first.

        A table beyond all measure is not kept: whoever reads strange files must not run out of memory.
        """
        return self._put_first(schema) if len(schema._prefix) <= _LARGEST_KEPT else schema

    def _put_first(self, schema: Schema) -> Schema:
        with self._lock:
            first = next((entry for entry in self._entries if entry == schema), schema)
            others = (entry for entry in self._entries if entry is not first)
            self._entries = (first, *others)[: self._capacity]
        return first


#: More kinds of files than one process meets: two per kernel, and recordings of other machines.
CACHE = _Cache(capacity=64)

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


class StatsImage:
    """A whole stats file in memory: ``image["exits"]`` is a raw value, as `Schema.unpack` gives it.

    Names can be iterated over, counted and looked for with ``in``, and ``dict(image)`` works; `values` is the array.

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
        """Names of the statistics, so that ``dict(image)`` works."""
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
        If the bytes are no stats file that can be read; ``code`` and ``offset`` say why and where.

    Notes
    -----
    A VM file of the v2 and v5 layouts whose data is exactly half as long as its descriptors ask for is taken for one
    of a 32-bit kernel (4-byte values), because that is what those look like.
    """
    blob = data if isinstance(data, bytes) else memoryview(cast("Buffer", data)).tobytes()
    source = f"stats file of {len(blob)} bytes"
    schema = schema_of(blob, source, repair)
    file_id = schema.id_of(blob)
    if schema._repaired:
        return StatsImage(schema, file_id, None)
    start = schema.header.data_offset
    value_size = schema.value_size(len(blob), file_id, source)
    values = np.empty(schema.num_values, np.uint64)
    lib.kvmstats_copy_values(
        ffi.from_buffer("char[]", blob) + start,
        value_size,
        schema.swapped,
        schema.num_values,
        ffi.from_buffer("uint64_t[]", values, True),
    )
    return StatsImage(schema, file_id, values)
