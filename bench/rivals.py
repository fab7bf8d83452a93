"""What one does without this package, written as well as plain Python allows."""

import fcntl
import os
import struct
from typing import NamedTuple

KVM_GET_STATS_FD = 0xAECE
_HEADER = struct.Struct("=6I")
_DESC = struct.Struct("=IhHII")


class Descriptor(NamedTuple):
    name: str
    type: int
    unit: int
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


class PythonStatsFile:
    """A pure-Python open: the ioctl, then header, id and descriptors parsed with struct."""

    def __init__(self, kvm_fd):
        self.fd = fcntl.ioctl(kvm_fd, KVM_GET_STATS_FD)
        flags, name_size, num_desc, id_offset, desc_offset, data_offset = _HEADER.unpack(os.pread(self.fd, 24, 0))
        if flags:
            raise ValueError(flags)
        self.id = os.pread(self.fd, name_size, id_offset).split(b"\0", 1)[0].decode()
        stride = 16 + name_size
        table = os.pread(self.fd, num_desc * stride, desc_offset)
        self.stats = {}
        size_of_data = 0
        for at in range(0, num_desc * stride, stride):
            flags, exponent, size, offset, bucket_size = _DESC.unpack_from(table, at)
            name = table[at + 16 : at + stride].split(b"\0", 1)[0].decode()
            self.stats[name] = Descriptor(
                name, flags & 15, flags >> 4 & 15, flags >> 8 & 15, exponent, size, offset, bucket_size
            )
            size_of_data = max(size_of_data, offset + 8 * size)
        self.data_offset = data_offset
        self.data_size = size_of_data
        # The positions of a loop with one pread per statistic, as the kernel's selftest reads.
        self.places = [(8 * s.size, data_offset + s.offset, struct.Struct(f"={s.size}Q")) for s in self.stats.values()]

    def one_pread_per_stat(self):
        fd = self.fd
        return [values.unpack(os.pread(fd, size, at)) for size, at, values in self.places]

    def snapshot(self):
        words = self.data_size // 8
        values = struct.unpack(f"={words}Q", os.pread(self.fd, self.data_size, self.data_offset))
        return {
            stat.name: values[at] if stat.size == 1 else values[at : at + stat.size]
            for stat in self.stats.values()
            for at in (stat.offset // 8,)
        }

    def close(self):
        os.close(self.fd)
