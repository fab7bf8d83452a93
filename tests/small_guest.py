"""A TinyGuest without numpy, which takes ten times as long to import as all else that a process with a VM needs."""

import ctypes
import fcntl
import mmap
import os
import struct

# include/uapi/linux/kvm.h, as x86-64 encodes them
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_GET_STATS_FD = 0xAECE
KVM_EXIT_IO = 2

LOAD_ADDRESS = 0x1000
LOOP = bytes.fromhex("e610 ebfc")  # again: out 0x10, al; jmp again


def stats_of(fd):
    """Open the stats file of a VM or vCPU."""
    return os.fdopen(fcntl.ioctl(fd, KVM_GET_STATS_FD), "rb", 0)


class TinyGuest:
    """A VM whose vCPUs exit as often as asked; `open_stats` gives plain files."""

    def __init__(self, vcpus=1):
        self._fds, self._maps = [], []
        kvm = self._keep(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        self.vm_fd = self._keep(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        self._run_size = fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
        fcntl.ioctl(self.vm_fd, KVM_SET_TSS_ADDR, 0x7FFFD000)
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._maps.append(memory)
        memory[: len(LOOP)] = LOOP
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("=IIQQQ", 0, 0, LOAD_ADDRESS, len(memory), address)
        fcntl.ioctl(self.vm_fd, KVM_SET_USER_MEMORY_REGION, region)
        self.vcpu_fds, self._runs = (), []
        for _ in range(vcpus):
            self.add_vcpu()

    def _keep(self, fd):
        self._fds.append(fd)
        return fd

    def add_vcpu(self):
        """Make the next one."""
        self.vcpu_fds += (self._keep(fcntl.ioctl(self.vm_fd, KVM_CREATE_VCPU, len(self.vcpu_fds))),)
        self._runs.append(None)

    def run(self, exits, vcpu=0):
        """Run a vCPU until it has left the guest so often."""
        fd = self.vcpu_fds[vcpu]
        if self._runs[vcpu] is None:
            sregs = bytearray(0x138)
            fcntl.ioctl(fd, KVM_GET_SREGS, sregs)
            struct.pack_into("=Q", sregs, 0, 0)  # cs.base
            struct.pack_into("=H", sregs, 12, 0)  # cs.selector
            fcntl.ioctl(fd, KVM_SET_SREGS, sregs)
            fcntl.ioctl(fd, KVM_SET_REGS, struct.pack("=18Q", *[0] * 16, LOAD_ADDRESS, 2))  # ..., rip, rflags
            self._runs[vcpu] = mmap.mmap(fd, self._run_size)
            self._maps.append(self._runs[vcpu])
        while exits > 0:
            try:
                fcntl.ioctl(fd, KVM_RUN, 0)
            except InterruptedError:  # a signal, whose handler has run by now
                continue
            assert struct.unpack_from("=I", self._runs[vcpu], 8) == (KVM_EXIT_IO,)
            exits -= 1

    def open_stats(self):
        """Open the stats files of the VM and each vCPU."""
        return [stats_of(fd) for fd in (self.vm_fd, *self.vcpu_fds)]

    def close(self):
        """Let go of it."""
        while self._fds:
            os.close(self._fds.pop())
        while self._maps:
            self._maps.pop().close()
