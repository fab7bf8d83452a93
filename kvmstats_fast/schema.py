"""What one kind of stats file holds: Schema, and the cache of schemas.

What is worked out of header and descriptors is worked out once per kernel and kind of file, as late as possible; every
further file of that kind gets the same `Schema` object.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from kvmstats_fast._arguments import check_name, check_names, find_fitting
from kvmstats_fast._kvmstats import ffi
from kvmstats_fast.abi import Layout, StatUnit, split_flags
from kvmstats_fast.encoding import Encoding, read_descriptors, read_header
from kvmstats_fast.errors import ErrorCode, FormatError, format_error, unknown_stat
from kvmstats_fast.stat import Stat, decode, is_row

if TYPE_CHECKING:
    import numpy.typing as npt

#: A value as `Schema.unpack` gives it: a histogram is an array of counts.
Value: TypeAlias = "int | bool | float | npt.NDArray[np.uint64]"


class Schema(Mapping[str, Stat]):
    """The statistics of one kind of stats file: a mapping of names to `Stat`, in the order of the descriptors.

    Files with the same header and descriptors share one Schema, so ``a.schema is b.schema`` holds for all vCPUs of a
    kernel. Two schemas are equal if these bytes are. Schemas are immutable and hashable, and can be pickled.

    Attributes
    ----------
    header : Header
    data_size : int
        Bytes of all values as uint64, words that no descriptor names included.
    encoding : Encoding
        Internal: how the bytes of a file are recognised and read. It may change in any version.
    """

    __slots__ = ("_dtype", "_index", "_places", "_stats", "_unpacking", "data_size", "encoding", "header")

    def __init__(self, encoding: Encoding, index: dict[str, int]) -> None:
        self.header = encoding.header
        self.data_size = encoding.data_size
        self._index = index
        self._stats: list[tuple[Stat, ...]] = []
        self._dtype: np.dtype[np.void] | None = None
        self._places: dict[str, tuple[Stat, int]] | None = None
        self._unpacking: list[tuple[str, int, int, bool]] | None = None
        self.encoding = encoding  # last: from here on nothing can be changed

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "encoding") and not name.startswith("_"):
            raise AttributeError(f"a Schema is shared by all files of its kind: {name} cannot be changed")
        super().__setattr__(name, value)

    @property
    def stats(self) -> tuple[Stat, ...]:
        """The statistics, in the order of the descriptors. Created on first access."""
        if not self._stats:
            self._stats.append(self._make_stats())  # of two threads that do so the first one's count
        return self._stats[0]

    def _make_stats(self) -> tuple[Stat, ...]:
        return tuple(
            Stat(name, *split_flags(flags), exponent, size, offset, bucket_size)
            for name, (_, _, flags, exponent, size, offset, bucket_size) in zip(
                self._index, self._read_descriptors(), strict=True
            )
        )

    def _read_descriptors(self) -> list[tuple[int, ...]]:
        """Return the fields of each ``struct kvmstats_desc``; they are not kept, for few are looked at again."""
        encoding = self.encoding
        parsed = read_header(encoding.prefix, "", repair=encoding.repaired)
        fields: list[tuple[int, ...]] = read_descriptors(encoding.prefix, parsed, "").tolist()
        return fields

    @property
    def places(self) -> dict[str, tuple[Stat, int]]:
        """By name each statistic, and the value at which its own start. Internal; not to be changed."""
        if self._places is None:
            self._places = {stat.name: (stat, stat.offset // 8) for stat in self.stats}
        return self._places

    @property
    def layout(self) -> Layout:
        """Layout of the file."""
        return self.header.layout

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """``"little"`` or ``"big"``: byte order of the file; values are always returned in this machine's."""
        return self.header.byteorder

    @property
    def num_values(self) -> int:
        """Length of a file's values as uint64."""
        return self.data_size // 8

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Structured dtype with the kernel's offsets: ``values.view(schema.dtype)["exits"]`` copies nothing.

        The view has shape ``(1,)`` for one reading of shape ``(num_values,)``; a histogram is a sub-array. (A file
        without descriptors has no view: numpy cannot view an array as a type without fields.)
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
            In the order of the patterns, and for one glob in the order of the file; each once.

        Raises
        ------
        KeyError
            If a pattern matches nothing; the message names near misses.
        """
        chosen: dict[str, Stat] = {}
        for pattern in check_names("patterns", patterns):
            fitting = self.matches(pattern)
            if not fitting:
                raise unknown_stat(pattern, self, "this file")
            chosen.update(fitting)
        return tuple(chosen.values())

    def matches(self, pattern: str) -> dict[str, Stat]:
        """Find the statistics that match a name or glob; there may be none."""
        stats = self.stats
        return {name: stats[self._index[name]] for name in find_fitting(pattern, self._index)}

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
            For each statistic an int, a bool (unit BOOLEAN, if it is 0 or 1), a float (`si`), or for a histogram an
            array of counts, a view into `values`.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.uint64:
            raise TypeError(f"values must be a uint64 array, not {getattr(values, 'dtype', type(values).__name__)}")
        if values.shape != (self.num_values,):
            raise ValueError(f"values have shape {values.shape}, this schema has ({self.num_values},)")
        plain = values.tolist()
        result: dict[str, Value] = {}
        for name, word, end, is_boolean in self._make_unpacking():
            if end:
                result[name] = values[word:end]
            elif is_boolean and plain[word] <= 1:
                result[name] = bool(plain[word])
            else:
                result[name] = plain[word]
        for stat in self.stats if si else ():
            value = result[stat.name]
            if stat.unknown:
                warnings.warn(f"{stat.name} is left as it is: unknown {stat.unknown}", RuntimeWarning, 3)
            if type(value) is int:
                result[stat.name] = stat.to_base_units(value)
        return result

    def _make_unpacking(self) -> list[tuple[str, int, int, bool]]:
        """Per statistic its name, its place among the values (end 0: a plain number), and whether it is a boolean."""
        if self._unpacking is None:
            unpacking = []
            for name, (_, _, flags, _, size, offset, _) in zip(self._index, self._read_descriptors(), strict=True):
                type_, unit, _ = split_flags(flags)
                word = offset // 8
                unpacking.append((name, word, word + size if is_row(type_, size) else 0, unit == StatUnit.BOOLEAN))
            self._unpacking = unpacking  # whole: other threads share this schema
        return self._unpacking

    def __getitem__(self, name: str) -> Stat:
        try:
            return self.stats[self._index[name]]
        except (KeyError, TypeError):
            check_name(name)
            raise unknown_stat(name, self, "this file") from None

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

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


def schema_of(blob: bytes, source: str, repair: bool = False) -> Schema:
    """Return the schema of the file that starts with `blob`, which reaches at least to the end of the descriptors."""
    known = CACHE.find(blob)
    if known is not None:
        return known
    parsed = read_header(blob, source, repair=repair)
    descs = read_descriptors(blob, parsed, source)
    schema = Schema(Encoding(blob, parsed), _index(blob, descs, source))
    # A repaired schema must never be found for a file that is opened to be read: its data is not its own.
    return schema if schema.encoding.repaired else CACHE.add(schema)


def _index(blob: bytes, descs: npt.NDArray[Any], source: str) -> dict[str, int]:
    """Return which descriptor has which name; FormatError if two have the same."""
    ends = zip(descs["name_offset"].tolist(), descs["name_length"].tolist(), strict=True)
    names = [decode(blob[at : at + length]) for at, length in ends]
    index = dict(zip(names, range(len(names)), strict=True))
    if len(index) < len(names):
        raise _duplicate(names, descs["name_offset"].tolist(), source)
    return index


def _duplicate(names: list[str], offsets: list[int], source: str) -> FormatError:
    """Return the error for the first name that an earlier descriptor has too."""
    seen: dict[str, int] = {}
    place = next(place for place, name in enumerate(names) if seen.setdefault(name, place) != place)
    name = names[place]
    fault = ffi.new("struct kvmstats_fault *")
    fault.offset, fault.value, fault.index = offsets[place], offsets[seen[name]], place
    return format_error(ErrorCode.DUPLICATE, fault, source, name=name)
