"""What the messages of an Arrow IPC stream claim, read before Arrow allocates memory for them.

Arrow decompresses a batch as it reads it, into as many bytes as the batch claims to need. The metadata of a message is
a flatbuffer (``format/Message.fbs`` of Arrow): a table starts with the distance to its vtable, which has the place of
each field; a compressed buffer starts with its size when decompressed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_SIZE = 8  # bytes of the size that a compressed buffer starts with
_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # of the union MessageHeader; a dictionary comes before the batch that uses it


class NoMessageError(Exception):
    """No whole message is there: the stream is torn, or these bytes are something else."""


def measure_next(
    stream: memoryview, start: int, chosen: npt.NDArray[np.intp] | None = None
) -> tuple[int, int, int] | None:
    """Return how many bytes the next record batch claims to decompress to, in how many they are stored, and its end.

    Parameters
    ----------
    stream : memoryview
        Of bytes: a whole IPC stream.
    start : int
        Byte at which a message starts.
    chosen : numpy.ndarray, optional
        Numbers of the buffers of the batch that will be decompressed. Default: all.

    Returns
    -------
    tuple of int, or None
        Dictionaries included; None at the end of the stream.

    Raises
    ------
    NoMessageError
    """
    try:
        return _measure_next(stream, start, chosen)
    except struct.error:
        raise NoMessageError from None


def _measure_next(stream: memoryview, start: int, chosen: npt.NDArray[np.intp] | None) -> tuple[int, int, int] | None:
    claimed = stored = 0
    while True:
        if start == len(stream):
            return None
        mark, size = struct.unpack_from("<Ii", stream, start)
        if mark != _CONTINUATION or size < 0:
            raise NoMessageError
        if not size:
            return None
        start += 8
        message = _Table.at_root(stream[start : start + size])
        start += size
        kind, header = message.number(1, "B"), message.table(2)
        body = message.number(3, "q")
        if header is None or not 0 <= body <= len(stream) - start:
            raise NoMessageError
        batch = header.table(1) if kind == _DICTIONARY_BATCH else header
        if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH) or batch is None:
            raise NoMessageError
        claimed += _measure_body(batch, stream[start : start + body], None if kind == _DICTIONARY_BATCH else chosen)
        stored += body
        start += body
        if kind == _RECORD_BATCH:
            return claimed, stored, start


def _measure_body(batch: _Table, body: memoryview, chosen: npt.NDArray[np.intp] | None) -> int:
    """Return to how many bytes the compressed buffers of a RecordBatch decompress; others are read in place."""
    if batch.table(3) is None:  # not compressed
        return 0
    pairs, end = batch.pairs(2), len(body)
    if chosen is not None:
        if chosen.max(initial=-1) >= len(pairs):
            raise NoMessageError
        pairs = pairs[chosen]
    offsets, lengths = pairs[pairs[:, 1] != 0].T
    if ((offsets < 0) | (offsets > end) | (lengths < _SIZE) | (lengths > end - offsets)).any():
        raise NoMessageError
    sizes = np.frombuffer(body, np.uint8)[offsets[:, None] + np.arange(_SIZE)].view("<i8")
    if (sizes < -1).any():
        raise NoMessageError
    return sum(size for size in sizes.ravel().tolist() if size > 0)  # -1: this buffer is not compressed


class _Table:
    """A table of a flatbuffer. Offsets that lead out of it raise struct.error or NoMessageError."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data, self._place = data, place
        self._vtable = place - self._unpack("i", place)
        self._size = self._unpack("H", self._vtable)

    @classmethod
    def at_root(cls, data: memoryview) -> _Table:
        """Return the table that a flatbuffer starts with."""
        (place,) = struct.unpack_from("<I", data)
        return cls(data, place)

    def _unpack(self, form: str, place: int) -> int:
        if place < 0:  # struct counts it from the end
            raise NoMessageError
        value: int = struct.unpack_from("<" + form, self._data, place)[0]
        return value

    def _field(self, index: int) -> int | None:
        place = 4 + 2 * index
        offset = self._unpack("H", self._vtable + place) if place + 2 <= self._size else 0
        return self._place + offset if offset else None

    def number(self, index: int, form: str) -> int:
        """Return a number, 0 if it is left out."""
        place = self._field(index)
        return 0 if place is None else self._unpack(form, place)

    def table(self, index: int) -> _Table | None:
        """Return an inner table, None if it is left out."""
        place = self._field(index)
        return None if place is None else _Table(self._data, place + self._unpack("I", place))

    def pairs(self, index: int) -> npt.NDArray[np.int64]:
        """Return a vector of structs of two int64, (n, 2)."""
        place = self._field(index)
        if place is None:
            return np.empty((0, 2), np.int64)
        place += self._unpack("I", place)
        end = place + 4 + 16 * self._unpack("I", place)
        if end > len(self._data):
            raise NoMessageError
        return np.frombuffer(self._data[place + 4 : end], "<i8").reshape(-1, 2).astype(np.int64)
