"""StatsFile: one open stats file, whose descriptors are read once and whose data is read again and again."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Closing, Fd, HasFileno, describe_fd, fd_of
from kvmstats_fast.abi import Layout, ioctl_number
from kvmstats_fast.errors import truncated
from kvmstats_fast.schema import CACHE, Header, Schema, Value, kind_of, read_header, schema_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer, Self

__all__ = ["StatsFile"]


_SOURCE = ffi.typeof("struct kvmstats_source *")
_NO_ARRAY = object()  # what no caller can pass
_read = lib.kvmstats_read  # the hot call: looking it up in lib would cost a tenth of it

#: One read of this many bytes takes in a whole file of today's kernels (4056 bytes on x86), data included.
_FIRST_READ = 8192

#: What to do about an ioctl that the kernel refuses. Sources: virt/kvm/kvm_main.c and api.rst 4.133.
_OPEN_HINTS = {
    errno.ENOTTY: "this is no VM or vCPU of a kernel that has the call: KVM_GET_STATS_FD came with Linux 5.14, the "
    "series' KVM_STATS_GETFD is in no released kernel",
    errno.EINVAL: "a /dev/kvm fd has no statistics: pass the fd of a VM (KVM_CREATE_VM) or vCPU (KVM_CREATE_VCPU); a "
    "vCPU of a kernel before 5.14 answers this too",
    errno.EIO: "the VM belongs to another process: only the process that created it may ask for its stats files. Have "
    "that process open them and pass them on (SCM_RIGHTS); reading them is allowed to whoever holds them",
    errno.EPERM: "a security module or seccomp filter of this process forbids the call",
    errno.EACCES: "a security module of this process forbids the call",
    errno.EMFILE: "this process has as many files open as it may: raise `ulimit -n` (RLIMIT_NOFILE)",
    errno.ENFILE: "the machine has as many files open as it may: raise the sysctl fs.file-max",
    errno.EBADF: "that fd is not open",
}

_NO_STATS_FILE = "this is no stats file; to ask a VM or vCPU fd for its own, use StatsFile.open(fd)"
_READ_HINTS = {
    errno.EBADF: "the fd is not open, or not for reading: was it closed elsewhere?",
    errno.EINVAL: _NO_STATS_FILE,
    errno.ESPIPE: _NO_STATS_FILE,
    errno.EISDIR: _NO_STATS_FILE,
    errno.EIO: "the kernel cannot read it; if it is a stats file, its VM refuses",
    errno.EPERM: "a security module or seccomp filter of this process forbids the call",
    errno.EACCES: "a security module of this process forbids the call",
    errno.EFAULT: "on a kernel with the original series this means that the VM is gone: close its stats files first",
}


@cache
def null_fd() -> Fd:
    """Return an fd of ``/dev/null``, which stays open: once had, it needs no other when there are too many open."""
    return Fd(os.open, os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _refused(error: int, call: str, fd: int, hints: dict[int, str]) -> OSError:
    """Return the kernel's refusal as an OSError that says which call, on what, and what to do."""
    hint = hints.get(error)
    return OSError(error, f"{call} on {describe_fd(fd)}: {os.strerror(error)}" + (f"; {hint}" if hint else ""))


def _pread(fd: int, size: int, position: int) -> bytes:
    try:
        return os.pread(fd, size, position)
    except OSError as error:
        raise _refused(error.errno or 0, "pread", fd, _READ_HINTS) from None


def _read_on(fd: int, blob: bytes, end: int) -> bytes:
    """Read on where `blob`, the start of the file, ends, to byte `end` or to the end of the file."""
    # As much again as the file has shown to hold: a header that promises more must not make us allocate it.
    while len(blob) < end and (more := _pread(fd, min(end, 2 * len(blob)) - len(blob), len(blob))):
        blob += more
    return blob


def _read_schema(fd: int) -> tuple[bytes, Schema]:
    """Return the start of the file, at least to the end of its descriptors, and its schema."""
    blob = _pread(fd, _FIRST_READ, 0)
    schema = CACHE.find(blob)
    if schema is None:
        source = describe_fd(fd)
        if len(blob) == _FIRST_READ:
            blob = _read_on(fd, blob, read_header(blob, source).prefix_size)
        schema = schema_of(blob, source)
    return blob, schema


@dataclass(slots=True)
class Owner:
    """Whose file it is: the VMM that made the VM, as far as that is known.

    Attributes
    ----------
    pid : int or None
        Of the VMM.
    name : str
        Of the guest; empty if not known.
    machine : object
        The VirtualMachine that the file belongs to: as long as one of its files is used, its VMM is watched.
    """

    pid: int | None = None
    name: str = ""
    machine: object = None


class Handle:
    """What a StatsFile has open, for the rooms that read it past its methods: Sampler and VirtualMachine.

    Attributes
    ----------
    fd : Fd
        Whether it is owned is whether closing the StatsFile closes it.
    source : struct kvmstats_source *
        What the C core reads by. Its fd is -1 once the file is closed or revoked.
    owner : Owner
    lost : Exception or None
        Why the file was revoked.
    """

    __slots__ = ("_id", "fd", "lost", "owner", "source")

    def __init__(self, fd: Fd, file_id: str, schema: Schema, value_size: int) -> None:
        self.owner = Owner()
        self.lost: Exception | None = None
        self.fd = fd
        self._id = file_id
        self.source: Any = ffi.new(
            _SOURCE, (fd.fileno(), value_size, schema.swapped, schema.header.data_offset, schema.num_values)
        )

    @property
    def closed(self) -> bool:
        """Whether the file was closed or revoked."""
        return bool(self.source.fd < 0)

    def check_open(self) -> None:
        """Raise what keeps the file from being read: why it was revoked, or ValueError if it is closed."""
        if self.lost is not None:
            raise self.lost
        if self.closed:
            raise ValueError(f"this StatsFile ({self._id}) is closed: open the stats file again")

    def failure(self, error: int, got: int) -> Exception:
        """Return what to raise when the core could not read: `error` is its errno, `got` how far an early end is."""
        self.check_open()
        source = self.source
        if error == errno.ENODATA:
            return truncated(describe_fd(source.fd), got, source.position + source.count * source.value_size)
        return _refused(error, "pread", source.fd, _READ_HINTS)

    def close(self) -> None:
        """Close the fd, if it is owned; a second call does nothing."""
        self.source.fd = -1
        self.fd.close()

    def revoke(self, why: Exception) -> None:
        """Let go of the stats file while others may be reading it in other threads; they get `why`.

        Its number stays taken, by ``/dev/null``, until `close`: a read that is under way finds nothing there, and never
        another file that was opened meanwhile.
        """
        if self.closed or not self.fd.owned:
            return
        null, self.lost = null_fd().fileno(), why
        self.source.fd = -1
        self.fd.replace(null)


class StatsFile(Closing):
    """One stats file of a VM or vCPU.

    Header and descriptors are read when it is opened, and parsed only if no file of this kind was opened before; then
    only the data is read, with one pread a reading.

    Parameters
    ----------
    stats_fd : int or object with fileno()
        An open stats file, of any layout. If the constructor raises, the fd is still the caller's.
    closefd : bool
        Whether `close` closes `stats_fd`.

    Attributes
    ----------
    schema : Schema
        What the file holds; the same object for all files of a kind.

    Raises
    ------
    FormatError
        If the file is no stats file that can be read.
    OSError
        If the kernel refuses the read; the message says what to do.

    Notes
    -----
    Not thread-safe: an object belongs to one thread at a time. Several objects, also of one VM, may be read in
    parallel; the GIL is released while the kernel copies.

    KVM takes no lock for the copy: each value is whole (on 64-bit hosts), but the values of one reading are not of one
    instant. An open stats file keeps the memory of its VM in the kernel allocated, after the end of the VMM too
    (``kvm_vm_stats_release``, ``virt/kvm/kvm_main.c``): close it then. Kernels that ran the original series do the
    opposite: there a stats file must be closed before its VM.
    """

    __slots__ = ("_id", "_keep", "_out", "_own", "handle", "schema")

    def __init__(self, stats_fd: int | HasFileno, closefd: bool = True) -> None:
        fd = fd_of(stats_fd)
        blob, schema = _read_schema(fd)
        self.schema = schema
        self._id = file_id = schema.id_of(blob)
        value_size = 8
        if len(blob) < schema.data_end:
            value_size = schema.value_size(len(_read_on(fd, blob, schema.data_end)), file_id, describe_fd(fd))
        self._own: npt.NDArray[np.uint64] | None = None
        self._out: object = _NO_ARRAY
        self._keep: Any = None
        held = stats_fd if isinstance(stats_fd, Fd) else Fd.adopt(fd, closefd)
        self.handle = Handle(held, file_id, schema, value_size)

    @classmethod
    def open(cls, kvm_fd: int | HasFileno, layout: Layout | str = Layout.MERGED) -> Self:
        """Ask KVM for the stats file of a VM or vCPU of this process.

        Parameters
        ----------
        kvm_fd : int or object with fileno()
            The fd of a VM (``KVM_CREATE_VM``) or of a vCPU (``KVM_CREATE_VCPU``).
        layout : {"merged", "v2"}
            ``"merged"`` issues ``KVM_GET_STATS_FD`` (Linux 5.14 and later), ``"v2"`` the original series'
            ``KVM_STATS_GETFD``. What comes back is recognised by its bytes.

        Returns
        -------
        StatsFile
            It owns the new fd, which is close-on-exec.

        Raises
        ------
        OSError
            ENOTTY: an older kernel, or no KVM fd. EIO: the VM of another process. EINVAL: ``/dev/kvm`` itself, or a
            vCPU of an older kernel. The message says what to do.
        FormatError
            If what comes back is no stats file that can be read.

        Notes
        -----
        The ioctl of a vCPU waits for that vCPU to leave ``KVM_RUN`` (``vcpu->mutex``): open a vCPU's file before it
        runs, or from its own thread.
        """
        fd = fd_of(kvm_fd)
        call, number = ioctl_number(Layout(layout))
        try:
            stats_fd = Fd(fcntl.ioctl, fd, number)
        except OSError as error:
            raise _refused(error.errno or 0, call, fd, _OPEN_HINTS) from None
        return cls(stats_fd)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """Serve a capture through the live path: a sealed memfd that holds `data`.

        Parameters
        ----------
        data : bytes-like
            A whole stats file, of any layout and byte order.

        Returns
        -------
        StatsFile

        Raises
        ------
        FormatError
            If the bytes are no stats file that can be read.
        """
        memory = Fd(os.memfd_create, "kvmstats-capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(memory.fileno(), "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        return cls(memory)

    @property
    def header(self) -> Header:
        """Header of the file."""
        return self.schema.header

    @property
    def id(self) -> str:
        """The id string, read at opening: ``kvm-PID``, or ``kvm-TID/vcpu-N`` (TID: the thread that made the vCPU).

        A label, not a key: two VMs of one process have the same. In the v2 layout it names the reader.
        """
        return self._id

    @property
    def kind(self) -> Literal["vm", "vcpu"]:
        """``"vm"`` or ``"vcpu"``, as the id says."""
        return kind_of(self._id)[0]

    @property
    def vcpu_id(self) -> int | None:
        """Number of the vCPU, None for a VM's file."""
        return kind_of(self._id)[1]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        handle = getattr(self, "handle", None)  # none if a subclass failed before it came to us
        return handle is None or handle.closed

    def fileno(self) -> int:
        """Return the file descriptor; ValueError if closed."""
        self.handle.check_open()
        fd: int = self.handle.source.fd
        return fd

    def read(self) -> npt.NDArray[np.uint64]:
        """Read all values, one pread.

        Returns
        -------
        numpy.ndarray
            A new uint64 array of shape ``(schema.num_values,)``, raw, in this machine's byte order;
            ``.view(schema.dtype)["exits"]`` names a part of it.

        Raises
        ------
        OSError, FormatError, ValueError
            As `read_into`.
        """
        if self._own is None:
            self._own = np.empty(self.schema.num_values, np.uint64)
        return self.read_into(self._own).copy()

    def read_into(self, out: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Read all values into an array of the caller's, one pread, nothing allocated.

        Parameters
        ----------
        out : numpy.ndarray
            uint64 in this machine's byte order, shape ``(schema.num_values,)``, C-contiguous, writable. An array that
            is not the one of the call before is checked and prepared, and kept alive until another one comes or until
            `close`: pass the same array again and again. It is not checked again, so do not resize it, change its dtype
            or make it read-only in place meanwhile.

        Returns
        -------
        numpy.ndarray
            `out`.

        Raises
        ------
        TypeError, ValueError
            If `out` is not such an array, or the StatsFile is closed.
        OSError
            If the kernel refuses the read.
        FormatError
            If the file has become shorter than its descriptors say. After an error `out` may be partly overwritten.
        """
        if out is not self._out:
            self._prepare(out)
        source = self.handle.source
        status = _read(source)
        if status:
            raise self.handle.failure(-status, source.position + source.got)
        return out

    def snapshot(self, si: bool = False) -> dict[str, Value]:
        """Read all values and name them.

        Parameters
        ----------
        si : bool
            Scale plain numbers to base units: ``halt_wait_ns`` becomes seconds.

        Returns
        -------
        dict
            Per statistic an int, a bool (unit BOOLEAN), a float (`si` and a negative exponent), or for a histogram a
            uint64 array of shape ``(buckets,)``. In the order of the descriptors.

        Raises
        ------
        OSError, FormatError, ValueError
            As `read_into`.
        """
        return self.schema.unpack(self.read(), si=si)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if not self.closed:
            self._out, self._own, self._keep = _NO_ARRAY, None, None
        if hasattr(self, "handle"):
            self.handle.close()

    def _prepare(self, out: npt.NDArray[np.uint64]) -> None:
        self.handle.check_open()
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out is a {type(out).__name__}; it must be a numpy array")
        if out.dtype != np.uint64 or not out.dtype.isnative:
            raise TypeError(f"out has dtype {out.dtype.str}; it must be uint64 in this machine's byte order")
        if out.shape != (self.schema.num_values,):
            raise ValueError(f"out has shape {out.shape}; this file needs ({self.schema.num_values},)")
        if not out.flags.c_contiguous:
            raise ValueError("out is not C-contiguous: the values of a file stand side by side")
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        self._keep = ffi.from_buffer("uint64_t[]", out, True)
        self.handle.source.values = self._keep
        self._out = out

    def __enter__(self) -> Self:
        self.handle.check_open()
        return self

    def __del__(self) -> None:
        if not self.closed and self.handle.fd.owned:
            text = f"unclosed {self!r}"
            self.close()  # first, because the warning may be an error
            warnings.warn(text, ResourceWarning, 2, source=self)

    def __repr__(self) -> str:
        where = "gone" if self.handle.lost else "closed" if self.closed else f"fd {self.handle.source.fd}"
        return f"<StatsFile {self._id} ({self.kind}), {where}, {len(self.schema)} stats>"
