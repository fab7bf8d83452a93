"""The numbers of KVM's binary statistics interface: descriptor codes, layouts, ioctls.

Sources: ``include/uapi/linux/kvm.h`` and ``Documentation/virt/kvm/api.rst`` 4.133 (KVM_GET_STATS_FD) of Linux; for the
pre-merge layouts the patch series "KVM statistics data fd-based binary interface". The layouts themselves are drawn
in ``csrc/kvmstats.h``.
"""

from __future__ import annotations

import os
import re
from enum import Enum, IntEnum
from functools import cache

from kvmstats_fast._kvmstats import lib


class StatType(IntEnum):
    """Type of a statistic (``KVM_STATS_TYPE_*``, unshifted: bits 0-3 of the descriptor's flags)."""

    CUMULATIVE = 0  #: only grows, until someone writes 0 to the matching debugfs file
    INSTANT = 1  #: goes up and down
    PEAK = 2  #: the highest value seen
    LINEAR_HIST = 3  #: bucket counts, all buckets equally wide (Linux 5.15)
    LOG_HIST = 4  #: bucket counts, each bucket twice as wide as the one before (Linux 5.15)


class StatUnit(IntEnum):
    """Unit of a statistic (``KVM_STATS_UNIT_*``, unshifted: bits 4-7); for a histogram, the unit of its range."""

    NONE = 0
    BYTES = 1
    SECONDS = 2
    CYCLES = 3
    BOOLEAN = 4  #: 0 or 1 (Linux 6.0)


class StatBase(IntEnum):
    """Base of the scale (``KVM_STATS_BASE_*``, unshifted: bits 8-11): base units are raw * base**exponent."""

    POW10 = 0
    POW2 = 1

    @property
    def radix(self) -> int:
        """10 or 2."""
        return 2 if self is StatBase.POW2 else 10


class Layout(str, Enum):
    """Layout of header and descriptors, named after the version of the patch series that introduced it."""

    V2 = "v2"  #: series v2 to v4
    V5 = "v5"  #: series v5 to v8
    V9 = "v9"  #: series v9 to v11
    MERGED = "merged"  #: Linux 5.14 and later

    __hash__ = str.__hash__  # as the text that it is equal to; Enum's own is Python code

    def __str__(self) -> str:
        return self.value


#: The C core's numbers for the layouts (``enum kvmstats_layout``).
LAYOUT_OF_CODE = {
    lib.KVMSTATS_LAYOUT_V2: Layout.V2,
    lib.KVMSTATS_LAYOUT_V5: Layout.V5,
    lib.KVMSTATS_LAYOUT_V9: Layout.V9,
    lib.KVMSTATS_LAYOUT_MERGED: Layout.MERGED,
}

#: By the name of a Stat's attribute: the codes this package knows.
KNOWN: dict[str, dict[int, int]] = {
    "type": {int(code): code for code in StatType},
    "unit": {int(code): code for code in StatUnit},
    "base": {int(code): code for code in StatBase},
}


def split_flags(flags: int) -> tuple[int, int, int]:
    """Type, unit and base of a descriptor's flags; a code this package does not know stays a plain int."""
    return _split(flags & 0xFFF)


@cache
def _split(flags: int) -> tuple[int, int, int]:
    """Split the 12 bits that are defined; kept, because few combinations occur and each of them often."""
    type_, unit, base = flags & 0xF, flags >> 4 & 0xF, flags >> 8
    return KNOWN["type"].get(type_, type_), KNOWN["unit"].get(unit, unit), KNOWN["base"].get(base, base)


def join_flags(type_: int, unit: int, base: int) -> int:
    """Put type, unit and base where a descriptor's flags have them."""
    return type_ | unit << 4 | base << 8


#: Where /proc/PID/fd/N leads to if it is KVM's (``virt/kvm/kvm_main.c``; with brackets on some kernels).
KVM_LINK = re.compile(r"anon_inode:\[?kvm-(?P<what>vm|vcpu|vm-stats|vcpu-stats)(?::(?P<vcpu>[0-9]+))?\]?")

_KVMIO = 0xAE
# name of the call, number, size of what it reads
_IOCTLS = {
    Layout.MERGED: ("KVM_GET_STATS_FD", 0xCE, 0),
    Layout.V2: ("KVM_STATS_GETFD", 0xCC, 80),
}


@cache
def ioctl_number(layout: Layout, machine: str = os.uname().machine) -> tuple[str, int]:
    """Name and number of the ioctl that opens the stats file of a VM or vCPU fd.

    Parameters
    ----------
    layout : Layout
        ``MERGED`` (Linux 5.14 and later) or ``V2`` (the original series).
    machine : str, optional
        As ``os.uname().machine`` has it, which is the default. MIPS and PowerPC encode the direction of an ioctl in
        three bits of which "none" is 1, other architectures in two of which it is 0
        (``arch/{mips,powerpc}/include/uapi/asm/ioctl.h``, ``include/uapi/asm-generic/ioctl.h``).

    Returns
    -------
    tuple of str and int

    Raises
    ------
    ValueError
        For a layout whose ioctl never had a settled number.
    """
    if layout not in _IOCTLS:
        raise ValueError(
            f"no ioctl is known for layout {str(layout)!r}: open({', '.join(map(repr, map(str, _IOCTLS)))}) works; "
            "a stats fd that you got otherwise is read by StatsFile(stats_fd) in any layout"
        )
    name, number, size = _IOCTLS[layout]
    three_bits = machine.startswith(("mips", "ppc"))
    none, read = (1 << 29, 2 << 29) if three_bits else (0, 2 << 30)
    return name, (read if size else none) | size << 16 | _KVMIO << 8 | number
