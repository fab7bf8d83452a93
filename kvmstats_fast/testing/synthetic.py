"""SyntheticStats: a memfd that answers pread as KVM's stats files do."""

from __future__ import annotations

import errno
import operator
import os
import struct
import sys
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmstats_fast._resource import Closing, Fd
from kvmstats_fast.abi import Layout, join_flags
from kvmstats_fast.errors import VmGoneError
from kvmstats_fast.handle import Owner
from kvmstats_fast.image import parse
from kvmstats_fast.stats_file import StatsFile
from kvmstats_fast.testing.stat_lists import ARCHITECTURES, OPTIONS, placed, stats_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from kvmstats_fast.handle import Handle
    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat

_ID_SIZE = 64  # of the layouts before the merge
#: How far the file of a kernel with the count defect claims to reach, and how far it does (seen on Linux 5.10).
_DEFECT_SIZE = 66896
#: Files whose reads fail so, at a position near their start: what is at address 0 of a process cannot be read.
_FAILING = {
    errno.EIO: ("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC),
    errno.EBADF: (os.devnull, os.O_WRONLY | os.O_CLOEXEC),
    errno.ENODATA: (os.devnull, os.O_RDONLY | os.O_CLOEXEC),
}


class SyntheticStats(Closing):
    """A stats file made up in memory: ``pread`` on it answers as on KVM's own, at any position and length.

    Parameters
    ----------
    arch : {"arm64", "mips", "powerpc-book3s", "powerpc-booke", "s390", "x86"}
        The architecture whose statistics it has: those of the original patch series, but for x86 in the merged layout
        those of Linux 6.18, with histograms and booleans.
    kind : {"vm", "vcpu"}
    layout : {"merged", "v9", "v5", "v2"}
    byteorder : {"little", "big"}
        Default: this machine's.
    options : collection of str
        Kernel configuration options that add statistics. Default: all, ``CONFIG_KVM_MIPS_VZ`` and
        ``CONFIG_CPU_LOONGSON64``.
    stats : iterable of Stat, optional
        Statistics of your own instead of the architecture's. One with offset -1, and in the v2 and v5 layouts, which
        have no offsets, each of them, follows the one before it.
    value_size : {8, 4}
        4: a VM file of a 32-bit kernel, in the v2 and v5 layouts.
    vcpu_id, pid : int
        What the id string says.
    vm, host, name : str
        The VM's label, the host and the guest's name, which `FileInfo` has for opened files. With any of them, `pid` is
        the VMM's, too.
    count_defect : bool
        The x86 vCPU file of the original series as it was: the header counts bytes instead of descriptors, and behind
        the table stands other kernel memory, not the values.

    Raises
    ------
    ValueError
        For a combination that no kernel has, or a Stat that no descriptor can hold.

    Examples
    --------
    >>> with SyntheticStats("x86", "vcpu") as made, made.open() as f:
    ...     made.add("exits", 1000)
    ...     f.snapshot()["exits"]
    1000
    """

    def __init__(  # noqa: PLR0913 - a file has that many sides
        self,
        arch: str = "x86",
        kind: str = "vcpu",
        *,
        layout: Layout | str = Layout.MERGED,
        byteorder: str = sys.byteorder,
        options: Collection[str] = OPTIONS,
        stats: Iterable[Stat] | None = None,
        value_size: int = 8,
        vcpu_id: int = 0,
        pid: int | None = None,
        vm: str = "",
        host: str = "",
        name: str = "",
        count_defect: bool = False,
    ) -> None:
        self._fd = -1
        self._handles: list[Handle] = []  # of the files that were opened
        self._gone: VmGoneError | None = None
        self._failing: Fd | None = None
        self.layout = Layout(layout)
        pid = os.getpid() if pid is None else pid
        positional = self.layout in (Layout.V2, Layout.V5)
        for what, value, allowed in (
            ("arch", arch, ARCHITECTURES),
            ("kind", kind, ("vm", "vcpu")),
            ("byteorder", byteorder, ("little", "big")),
            ("value_size", value_size, (8, 4)),
        ):
            if value not in allowed:
                raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        if isinstance(options, str) or not OPTIONS.issuperset(options):
            raise ValueError(f"unknown options {options!r}; it must be a collection, known are {sorted(OPTIONS)}")
        if min(vcpu_id, pid) < 0:
            raise ValueError(f"vcpu_id is {vcpu_id} and pid {pid}; neither can be negative")
        if value_size == 4 and not (positional and kind == "vm"):
            raise ValueError("values have 4 bytes only in VM files of the v2 and v5 layouts")
        if count_defect and (arch, kind, self.layout, stats) != ("x86", "vcpu", Layout.V2, None):
            raise ValueError("the count defect is of x86 vCPU files of the v2 layout")
        self.kind, self.vcpu_id = kind, vcpu_id if kind == "vcpu" else None
        self.owner = Owner(pid, name, vm=vm, host=host) if vm or host or name else Owner()
        self.id = f"kvm-{pid}" + (f"/vcpu-{vcpu_id}" if kind == "vcpu" else "")
        self._order = "<" if byteorder == "little" else ">"
        self._value = self._order + ("Q" if value_size == 8 else "I")
        self._value_size = value_size
        self._count_defect = count_defect
        name_size = 32 if self.layout is Layout.V2 else 48
        if stats is None:
            stats = stats_of(arch, kind, merged=self.layout is Layout.MERGED, options=options)
        stats = placed(replace(stat, offset=-1) for stat in stats) if positional else placed(stats)
        raw = _named(stats, name_size)
        #: What the file holds: names (cut to the layout's room) to statistics.
        self.stats = {name.decode("utf-8", "surrogateescape"): stat for name, stat in raw.items()}

        table = b"".join(self._descriptor(name, stat, name_size) for name, stat in raw.items())
        head, self._data_offset = self._head(len(raw), len(table), name_size)
        image = head + table
        if count_defect:
            image += self._other_memory(len(image))
        else:
            words = max((stat.offset // 8 + stat.size for stat in raw.values()), default=0)
            image += bytes(words * value_size)
        self._fd = os.memfd_create("kvmstats-synthetic", os.MFD_CLOEXEC)
        with open(self._fd, "wb", closefd=False) as file:
            file.write(image)

    def _descriptor(self, name: bytes, stat: Stat, name_size: int) -> bytes:
        """``struct kvm_stats_desc``; the last two words are unused before v9."""
        positional = self.layout in (Layout.V2, Layout.V5)
        return struct.pack(
            f"{self._order}IhHII{name_size}s",
            join_flags(stat.type, stat.unit, stat.base),
            stat.exponent,
            stat.size,
            0 if positional else stat.offset,
            0 if positional else stat.bucket_size,
            name,
        )

    def _head(self, num_desc: int, table_size: int, name_size: int) -> tuple[bytes, int]:
        """Header and id, and where the data will start: header, id, descriptors and data follow each other."""
        file_id = self.id.encode()
        if self.layout is Layout.MERGED:
            start = 24 + name_size
            fields = (0, name_size, num_desc, 24, start, start + table_size)
            return struct.pack(f"{self._order}6I{name_size}s", *fields, file_id), start + table_size
        start = 16 + _ID_SIZE
        count = table_size if self._count_defect else num_desc
        header = struct.pack(f"{self._order}4I", name_size, count, start, start + table_size)
        # Behind the NUL stands what was on the kernel's stack.
        file_id = (file_id + b"\0").ljust(_ID_SIZE, b"\xa5")
        return (header + file_id if self.layout is Layout.V9 else file_id + header), start + table_size

    def _other_memory(self, start: int) -> bytes:
        """Return what a kernel with the count defect serves as data: its VM header and table, then whatever comes."""
        with SyntheticStats("x86", "vm", layout=Layout.V2, byteorder=self._byteorder) as vm:
            image = vm.to_bytes()[_ID_SIZE : vm._data_offset]
        return image.ljust(_DEFECT_SIZE - start, b"\xa5")

    @property
    def _byteorder(self) -> str:
        return "little" if self._order == "<" else "big"

    def fileno(self) -> int:
        """Return the file descriptor; ValueError if closed."""
        if self._fd < 0:
            raise ValueError("this SyntheticStats is closed")
        return self._fd

    @property
    def schema(self) -> Schema:
        """Header and descriptors, as in an opened file."""
        return parse(self.to_bytes()).schema

    def open(self) -> StatsFile:
        """Open the file as users do: a StatsFile of its own, which outlives this object as a real one does.

        Raises
        ------
        VmGoneError
            If its VM is gone (`die`).
        """
        if self._gone is not None:
            raise copy(self._gone)
        file = StatsFile(Fd(os.dup, self.fileno()))
        file.handle.owner = self.owner
        self._handles = [handle for handle in self._handles if not handle.closed]
        self._handles.append(file.handle)
        if self._failing is not None:
            file.handle.fd.replace(self._failing.fileno())
        return file

    # ---- what happens to VMs

    def die(self) -> None:
        """Let the VMM exit: opened files are closed with `VmGoneError` (ESRCH), and none can be opened."""
        self._gone = VmGoneError(errno.ESRCH, f"process {self.owner.pid} (synthetic) has exited, and its VM with it")
        self._revoke(self._gone)

    def rebuild(self) -> None:
        """Let the VM be recreated: opened files are closed with `VmGoneError` (ENODEV), and counts begin at 0."""
        self._gone = None
        self._revoke(VmGoneError(errno.ENODEV, f"the VM of process {self.owner.pid} (synthetic) is gone"))
        self.recover()
        if not self._count_defect:
            os.pwrite(self.fileno(), bytes(os.fstat(self._fd).st_size - self._data_offset), self._data_offset)

    def _revoke(self, why: Exception) -> None:
        while self._handles:
            self._handles.pop().revoke(why)

    def fail(self, error: int = errno.EIO) -> None:
        """Let every read fail, of files opened before and after, until `recover`.

        Parameters
        ----------
        error : {errno.EIO, errno.EBADF, errno.ENODATA}
            What a read fails with. With ENODATA the file has no data any more, which is a FormatError to the reader.

        Raises
        ------
        ValueError
            For any other error.
        """
        if error not in _FAILING:
            names = ", ".join(f"errno.{errno.errorcode[one]}" for one in _FAILING)
            raise ValueError(f"error is {error}; it must be one of {names}")
        self._failing = Fd(os.open, *_FAILING[error])
        self._replace(self._failing.fileno())

    def recover(self) -> None:
        """Let reads succeed again."""
        if self._failing is not None:
            self._replace(self.fileno())
            self._failing.close()
            self._failing = None

    def _replace(self, fd: int) -> None:
        for handle in self._handles:
            if not handle.closed:
                handle.fd.replace(fd)

    # ---- what it holds

    def to_bytes(self) -> bytes:
        """Return the whole file as it is now."""
        return os.pread(self.fileno(), os.fstat(self._fd).st_size, 0)

    def set(self, name: str, value: int | Iterable[int]) -> None:
        """Set the value of a statistic, or the counts of a histogram.

        Raises
        ------
        KeyError
            If the file has no such statistic.
        ValueError
            If the value does not fit an unsigned value of the file, or the number of values is wrong, or the file has
            the count defect and so no values.
        """
        stat, position = self._find(name)
        numbers = _numbers(value)
        if len(numbers) != stat.size:
            raise ValueError(f"{name} has {stat.size} values, not {len(numbers)}")
        for number in numbers:
            if not 0 <= number < 1 << 8 * self._value_size:
                raise ValueError(f"{name}: {number} does not fit an unsigned value of {self._value_size} bytes")
        os.pwrite(self._fd, b"".join(struct.pack(self._value, number) for number in numbers), position)

    def add(self, name: str, increment: int, bucket: int = 0) -> None:
        """Add to a statistic, or to one bucket of a histogram; it wraps as the kernel's unsigned integers do.

        Raises
        ------
        KeyError, ValueError
            As `set`. IndexError: if there is no such bucket.
        """
        stat, position = self._find(name)
        increment = operator.index(increment)
        if not 0 <= bucket < stat.size:
            raise IndexError(f"{name} has {stat.size} values; there is no bucket {bucket}")
        position += bucket * self._value_size
        (old,) = struct.unpack(self._value, os.pread(self._fd, self._value_size, position))
        new = (old + increment) % (1 << 8 * self._value_size)
        os.pwrite(self._fd, struct.pack(self._value, new), position)

    def _find(self, name: str) -> tuple[Stat, int]:
        self.fileno()
        if self._count_defect:
            raise ValueError("a file with the count defect has no values")
        stat = self.stats[name]
        return stat, self._data_offset + stat.offset // 8 * self._value_size

    def close(self) -> None:
        """Close the file. A second call does nothing; what `open` gave stays open."""
        if self._failing is not None:
            self._failing.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyntheticStats {self.id} {self.layout} {self._byteorder}-endian, {len(self.stats)} stats>"


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _numbers(value: int | Iterable[int]) -> tuple[int, ...]:
    """Return one integer or several, of whatever integer type, as Python's."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{value!r} is neither an integer nor several")
    try:
        return (operator.index(value),)  # type: ignore[arg-type]
    except TypeError:
        return tuple(operator.index(number) for number in value)  # type: ignore[union-attr]


def _named(stats: tuple[Stat, ...], name_size: int) -> dict[bytes, Stat]:
    """Return the statistics by the bytes of their names in the file.

    As the C initialiser of a char[name_size] does with a longer string: it cuts it, and no NUL is left.
    """
    for stat in stats:
        _check(stat)
    raw = {_encode(stat.name)[:name_size]: stat for stat in stats}
    if len(raw) < len(stats):
        raise ValueError(f"two statistics have the same name (of which this layout keeps {name_size} bytes)")
    return raw


def _check(stat: Stat) -> None:
    """Refuse what no descriptor can say."""
    codes = {"type": stat.type, "unit": stat.unit, "base": stat.base}
    ranges = {**{what: (code, 0, 15) for what, code in codes.items()}, "size": (stat.size, 1, 0xFFFF)}
    ranges |= {"exponent": (stat.exponent, -0x8000, 0x7FFF), "bucket_size": (stat.bucket_size, 0, 0xFFFFFFFF)}
    ranges |= {"offset": (stat.offset, 0, 0xFFFFFFF8)}
    for what, (number, low, high) in ranges.items():
        if not low <= number <= high:
            raise ValueError(f"{stat.name}: {what} is {number}; a descriptor holds {low} to {high}")
    if stat.offset % 8:
        raise ValueError(f"{stat.name}: offset is {stat.offset}; it must be a multiple of 8")
    if not stat.name or "\0" in stat.name:
        raise ValueError(f"{stat.name!r} is not a name: it must not be empty or contain NUL")
