"""What several test files need."""

import struct
from pathlib import Path

DATA = Path(__file__).parent / "data"


def open_fds():
    """How many fds this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def independent_read(pread):
    """Read a merged stats file with struct alone: ({name: values}, [(name, offset)]), one pread per statistic.

    `pread(size, position)` gives the bytes.
    """
    flags, name_size, num_desc, _, desc_offset, data_offset = struct.unpack("=6I", pread(24, 0))
    assert flags == 0
    values, order = {}, []
    for i in range(num_desc):
        raw = pread(16 + name_size, desc_offset + i * (16 + name_size))
        _, _, size, offset, _ = struct.unpack_from("=IhHII", raw)
        name = raw[16:].split(b"\0")[0].decode()
        values[name] = struct.unpack(f"={size}Q", pread(8 * size, data_offset + offset))
        order.append((name, offset))
    return values, order


def as_tuples(snapshot):
    """A snapshot in the form of `independent_read`'s values."""
    return {name: tuple(value.tolist()) if hasattr(value, "tolist") else (value,) for name, value in snapshot.items()}
