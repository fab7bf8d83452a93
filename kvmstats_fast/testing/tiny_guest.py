"""TinyGuest: a real VM on /dev/kvm whose vCPUs exit exactly as often as asked."""

from __future__ import annotations

import errno
import fcntl
import mmap
import operator
import os
import platform
import struct
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._resource import Closing
from kvmstats_fast.errors import KvmStatsError, KvmUnavailableError
from kvmstats_fast.stats_file import StatsFile

if TYPE_CHECKING:
    from collections.abc import Mapping

# include/uapi/linux/kvm.h, as x86-64 encodes them
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_SET_TSS_ADDR = 0xAE47
_KVM_RUN = 0xAE80
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_EXIT_IO = 2
_EXIT_REASON_AT = 8  # of struct kvm_run

_LOAD_ADDRESS = 0x1000
_TSS_ADDRESS = 0x7FFFD000  # anywhere the guest has no memory
_GUEST = bytes.fromhex("e610 ebfc")  # again: out 0x10, al; jmp again

_HINTS = {
    errno.ENOENT: "is the kvm module loaded, virtualisation switched on in the firmware, and the device passed into "
    "this container?",
    errno.EACCES: "add this user to the group that owns it (usually kvm), or run as root",
    errno.EPERM: "a security module or the container's device rules forbid it",
    errno.ENODEV: "this machine offers no hardware virtualisation",
    errno.EBUSY: "another hypervisor has the processor's virtualisation",
    errno.EINVAL: "are these more vCPUs than KVM makes (KVM_CAP_MAX_VCPUS)?",
    errno.EMFILE: "raise `ulimit -n` (RLIMIT_NOFILE): a guest has an fd per vCPU",
}


class TinyGuest(Closing):
    """A real VM of a few pages, on x86-64 hosts: each vCPU runs a real-mode loop of one `out` instruction.

    Each `out` makes the vCPU leave ``KVM_RUN`` once, so the exact change of the exit counters is known.

    Parameters
    ----------
    vcpus : int
        Number of vCPUs, with ids 0 to vcpus - 1.

    Attributes
    ----------
    vm_fd : int
        Fd of the VM, for ``StatsFile.open``.
    vcpu_fds : tuple of int
        Fds of the vCPUs.

    Raises
    ------
    KvmUnavailableError
        If /dev/kvm is missing, not permitted or not usable, or the host is not x86-64.

    Notes
    -----
    One thread may run one vCPU while another runs another, or reads statistics. Open a vCPU's stats file while it does
    not run: the ioctl waits for ``KVM_RUN`` to end.
    """

    def __init__(self, vcpus: int = 1) -> None:
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        if vcpus < 1:
            raise ValueError(f"vcpus is {vcpus}; a guest has at least one")
        machine = platform.machine()
        if machine not in ("x86_64", "amd64"):
            raise KvmUnavailableError(
                errno.ENOTSUP, f"not on this architecture: TinyGuest is x86-64 code, not {machine}"
            )
        try:
            self._build(vcpus)
        except BaseException:
            self.close()
            raise

    def _build(self, vcpus: int) -> None:
        try:
            self._kvm_fd = self._keep(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
            self.vm_fd = self._keep(fcntl.ioctl(self._kvm_fd, _KVM_CREATE_VM, 0))
            self._run_size: int = fcntl.ioctl(self._kvm_fd, _KVM_GET_VCPU_MMAP_SIZE)
            # Intel processors without "unrestricted guest" need three pages for real mode; others ignore it.
            fcntl.ioctl(self.vm_fd, _KVM_SET_TSS_ADDR, _TSS_ADDRESS)
            memory = mmap.mmap(-1, mmap.PAGESIZE)
            self._maps.append(memory)
            memory[: len(_GUEST)] = _GUEST
            address = np.frombuffer(memory, np.uint8).ctypes.data
            region = struct.pack("=IIQQQ", 0, 0, _LOAD_ADDRESS, len(memory), address)
            fcntl.ioctl(self.vm_fd, _KVM_SET_USER_MEMORY_REGION, region)
            self.vcpu_fds = tuple(self._keep(fcntl.ioctl(self.vm_fd, _KVM_CREATE_VCPU, i)) for i in range(vcpus))
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "")
            raise KvmUnavailableError(
                error.errno, f"no VM can be made on /dev/kvm: {error.strerror}" + (f"; {hint}" if hint else "")
            ) from error
        # Per vCPU its struct kvm_run, mapped when it first runs.
        self._runs: list[mmap.mmap | None] = [None] * vcpus

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def run(self, exits: int, vcpu: int = 0) -> None:
        """Run a vCPU until it has left the guest exactly `exits` times, each time for one `out` instruction.

        Raises
        ------
        KvmStatsError
            If the guest leaves for any other reason.
        OSError
            If the kernel refuses to run it.

        Notes
        -----
        A signal that arrives meanwhile ends a ``KVM_RUN`` early, which is tried again; KVM may count that too.
        """
        self._check_open()
        exits = operator.index(exits)
        if exits < 0 or not 0 <= vcpu < len(self.vcpu_fds):
            raise ValueError(f"no {exits} exits of vCPU {vcpu}: this guest has {len(self.vcpu_fds)} vCPUs, from 0 on")
        fd = self.vcpu_fds[vcpu]
        run = self._runs[vcpu] or self._start(vcpu)
        while exits > 0:
            try:
                fcntl.ioctl(fd, _KVM_RUN, 0)
            except InterruptedError:  # a signal, whose handler has run by now
                continue
            except OSError as error:
                hint = "; only the process that made the VM may run it" if error.errno == errno.EIO else ""
                raise OSError(error.errno, f"KVM_RUN of vCPU {vcpu}: {error.strerror}{hint}") from None
            (reason,) = struct.unpack_from("=I", run, _EXIT_REASON_AT)
            if reason != _KVM_EXIT_IO:
                raise KvmStatsError(f"vCPU {vcpu} left the guest with exit reason {reason}, not KVM_EXIT_IO")
            exits -= 1

    def _check_open(self) -> None:
        if not self._fds:
            raise ValueError("this TinyGuest is closed")

    def _start(self, vcpu: int) -> mmap.mmap:
        """Set the registers to the start of the loop, and map what KVM says about an exit."""
        fd = self.vcpu_fds[vcpu]
        sregs = bytearray(0x138)
        fcntl.ioctl(fd, _KVM_GET_SREGS, sregs)
        struct.pack_into("=Q", sregs, 0, 0)  # cs.base
        struct.pack_into("=H", sregs, 12, 0)  # cs.selector
        fcntl.ioctl(fd, _KVM_SET_SREGS, sregs)
        registers = struct.pack("=18Q", *[0] * 16, _LOAD_ADDRESS, 2)  # ..., rip, rflags (bit 1 is always set)
        fcntl.ioctl(fd, _KVM_SET_REGS, registers)
        run = mmap.mmap(fd, self._run_size)
        self._runs[vcpu] = run
        self._maps.append(run)
        return run

    def open_stats(self) -> list[StatsFile]:
        """Open all stats files: the VM's, then each vCPU's. The caller must close them."""
        self._check_open()
        with ExitStack() as opened:
            files = [opened.enter_context(StatsFile.open(fd)) for fd in (self.vm_fd, *self.vcpu_fds)]
            opened.pop_all()
        return files

    def close(self) -> None:
        """Close the VM, its vCPUs and its memory. A second call does nothing."""
        while self._fds:
            os.close(self._fds.pop())
        while self._maps:
            self._maps.pop().close()

    def __del__(self) -> None:
        self.close()


@cache
def exit_counter() -> str:
    """Return the name of the statistic that counts TinyGuest's exits exactly, on this host's kind of KVM.

    ``"io_exits"`` on AMD and Intel hardware (``exits`` counts a few of other kinds too), ``"exits"`` on PVM, which
    emulates real mode and counts no I/O; there an exit that the host preempts may count twice (see `counts_right`).
    Found by running a guest once.

    Raises
    ------
    KvmUnavailableError
        As `TinyGuest`.
    """
    with TinyGuest() as guest, StatsFile.open(guest.vcpu_fds[0]) as stats:
        before = stats.snapshot()["io_exits"]
        guest.run(1)
        return "io_exits" if stats.snapshot()["io_exits"] != before else "exits"


def counts_right(change: Mapping[str, int], exits: int) -> bool:
    """Return whether the exit counter of a vCPU's file changed as `exits` exits of a TinyGuest must change it.

    Parameters
    ----------
    change : mapping
        Change of each statistic of the vCPU; a missing one did not change.
    exits : int
        Number of exits of the vCPU.

    Returns
    -------
    bool
        ``io_exits`` must be exact. Where ``exits`` counts, ``fpu_reload`` must be, which KVM counts once for each
        ``KVM_RUN`` (those that a signal ended come on top); ``exits`` may be more, because the host may take the
        processor away in mid-exit, and KVM then counts the second try: by the preemptions and signals in `change`, and
        by one for an interrupt, which nothing counts.
    """
    counter = exit_counter()
    more = change.get(counter, 0) - exits
    if counter == "io_exits":
        return more == 0
    signals = change.get("signal_exits", 0)
    if not 0 <= change.get("fpu_reload", 0) - exits <= signals:
        return False
    preemptions = change.get("preemption_other", 0) + change.get("preemption_reported", 0)
    return 0 <= more <= preemptions + signals + 1
