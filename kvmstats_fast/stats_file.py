"""StatsFile: one open stats file, whose descriptors are read once and whose data is read again and again."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast._resource import Closing, Fd, HasFileno, describe_fd, fd_of
from kvmstats_fast._text import printable
from kvmstats_fast.abi import Layout, ioctl_number
from kvmstats_fast.encoding import Header, kind_of, read_header
from kvmstats_fast.handle import Handle, ThisProcess, read_refused, refused
from kvmstats_fast.schema import CACHE, Schema, Value, schema_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer, Self


_NO_ARRAY = object()  # no caller can pass it
_read = lib.kvmstats_read  # the hot call: looking it up in lib would cost a tenth of it

#: One read of this many bytes takes in a whole file of today's kernels (4056 bytes on x86), data included.
_FIRST_READ = 8192

#: What to do when the kernel refuses the ioctl. Sources: virt/kvm/kvm_main.c; api.rst 4.133.
_OPEN_HINTS = {
    errno.ENOTTY: "this is not the fd of a VM or vCPU, or the kernel lacks the call: KVM_GET_STATS_FD came with Linux "
    "5.14, and no released kernel has KVM_STATS_GETFD of the original patch series",
    errno.EINVAL: "it is an fd of /dev/kvm, which has no statistics (pass that of a VM, from KVM_CREATE_VM, or of a "
    "vCPU, from KVM_CREATE_VCPU), or that of a vCPU on a kernel before Linux 5.14",
    errno.EIO: "the VM belongs to another process, and only the process that created it can open its stats files. "
    "attach(pid) borrows the files that a VMM holds; or let the VMM open its stats files and hand them over "
    "(send_files, SCM_RIGHTS), which needs no permission at all",
    errno.EPERM: "a security module or seccomp filter of this process forbids the call",
    errno.EACCES: "a security module of this process forbids the call",
    errno.EMFILE: "this process has as many files open as it may: raise `ulimit -n` (RLIMIT_NOFILE)",
    errno.ENFILE: "the machine has as many files open as it may: raise the sysctl fs.file-max",
    errno.EBADF: "this fd is not open",
}


def _read_on(fd: int, blob: bytes, end: int) -> bytes:
    """Return `blob`, the start of the file, continued to byte `end` or to the end of the file."""
    try:
        # Twice as much each time: a header that promises more than there is must not make us allocate it.
        while len(blob) < end and (more := os.pread(fd, min(end, 2 * len(blob)) - len(blob), len(blob))):
            blob += more
    except OSError as error:
        raise read_refused(error.errno or 0, fd) from None
    return blob


def _learn(fd: int, blob: bytes) -> tuple[bytes, Schema]:
    """Return the start of a file of a new kind, at least to the end of its descriptors, and its schema."""
    source = describe_fd(fd)
    if len(blob) == _FIRST_READ:
        blob = _read_on(fd, blob, read_header(blob, source).prefix_size)
    return blob, schema_of(blob, source)


class StatsFile(Closing):
    """One stats file of a VM or vCPU.

    Header and descriptors are read at opening, and parsed only if no file with the same ones was opened before. After
    that only the data is read, with one pread per reading.

    Parameters
    ----------
    stats_fd : int or object with fileno()
        An open stats file, of any layout. If the constructor raises, the caller still owns the fd.
    closefd : bool
        Whether `close` closes `stats_fd`.

    Attributes
    ----------
    schema : Schema
        Header and descriptors; files with the same ones share the object.

    Raises
    ------
    FormatError
        If it is not a stats file, or one that is not supported.
    OSError
        If the kernel refuses the read; the message says what to do.

    Notes
    -----
    Not thread-safe: an object belongs to one thread at a time. Several objects, of one VM too, may be read in parallel;
    the GIL is released while the kernel copies.

    KVM takes no lock for the copy: each value is whole (on 64-bit hosts), but the values of one reading are not of one
    instant. An open stats file keeps the VM's memory allocated in the kernel, even after the VMM has exited
    (``kvm_vm_stats_release``, ``virt/kvm/kvm_main.c``): close it then. On kernels with the original patch series it is
    the other way round: a stats file must be closed before its VM.
    """

    __slots__ = ("_id", "_keep", "_out", "_own", "handle", "schema")

    def __init__(self, stats_fd: int | HasFileno, closefd: bool = True) -> None:
        held = stats_fd if isinstance(stats_fd, Fd) else None
        fd = fd_of(stats_fd) if held is None else held.fileno()
        try:
            blob = os.pread(fd, _FIRST_READ, 0)
        except OSError as error:
            raise read_refused(error.errno or 0, fd) from None
        schema = CACHE.find(blob)
        if schema is None:
            blob, schema = _learn(fd, blob)
        self.schema = schema
        encoding = schema.encoding
        self._id = file_id = encoding.read_id(blob)
        value_size = 8
        if len(blob) < encoding.data_end:
            value_size = encoding.value_size(len(_read_on(fd, blob, encoding.data_end)), file_id, describe_fd(fd))
        self._own: npt.NDArray[np.uint64] | None = None
        self._out: object = _NO_ARRAY
        self._keep: Any = None
        source = encoding.make_source(fd, value_size)
        self.handle = Handle(held or Fd.adopt(fd, closefd), source, file_id)

    @classmethod
    def open(cls, kvm_fd: int | HasFileno, layout: Layout | str = Layout.MERGED) -> Self:
        """Open the stats file of a VM or vCPU that this process created.

        Parameters
        ----------
        kvm_fd : int or object with fileno()
            The fd of a VM (``KVM_CREATE_VM``) or of a vCPU (``KVM_CREATE_VCPU``).
        layout : {"merged", "v2"}
            ``"merged"`` issues ``KVM_GET_STATS_FD`` (Linux 5.14 and later), ``"v2"`` the ``KVM_STATS_GETFD`` of the
            original patch series. The layout of the file that the kernel returns is recognised by its bytes.

        Returns
        -------
        StatsFile
            It owns the new fd, which is close-on-exec.

        Raises
        ------
        OSError
            ENOTTY: an older kernel, or not a KVM fd. EIO: the VM of another process. EINVAL: ``/dev/kvm`` itself, or a
            vCPU on an older kernel. The message says what to do.
        FormatError
            If the kernel returns a file that cannot be read.

        Notes
        -----
        The ioctl of a vCPU waits for that vCPU to leave ``KVM_RUN`` (``vcpu->mutex``): open a vCPU's file before it
        runs, or from its own thread.
        """
        fd = fd_of(kvm_fd)
        call, number = ioctl_number(layout if isinstance(layout, Layout) else Layout(layout))
        try:
            stats_fd = Fd(fcntl.ioctl, fd, number)
        except OSError as error:
            raise refused(error.errno or 0, call, fd, _OPEN_HINTS) from None
        file = cls(stats_fd)
        file.handle.owner = ThisProcess.owner  # the kernel opens the files of the caller's own VMs only
        return file

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """Return a StatsFile that reads `data`, a capture, from a sealed memfd like a live file.

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
            If the bytes are not a stats file, or not one that can be read.
        """
        memory = Fd(os.memfd_create, "kvmstats-capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(memory.fileno(), "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            return cls(memory)
        except BaseException:
            memory.close()  # the traceback, which may be kept, would keep it open
            raise

    @property
    def header(self) -> Header:
        """Header of the file."""
        return self.schema.header

    @property
    def id(self) -> str:
        """Id string, as read at opening: ``kvm-PID``, or ``kvm-TID/vcpu-N`` (the thread that created the vCPU).

        A label, not a key: two VMs of one process have the same id. In the v2 layout it names the reader.
        """
        return self._id

    @property
    def kind(self) -> Literal["vm", "vcpu"]:
        """``"vm"`` or ``"vcpu"``, according to the id."""
        return kind_of(self._id)[0]

    @property
    def vcpu_id(self) -> int | None:
        """Number of the vCPU; None for the file of a VM."""
        return kind_of(self._id)[1]

    @property
    def closed(self) -> bool:
        """Whether the file is closed, also because its VM is gone."""
        handle = getattr(self, "handle", None)  # missing if the constructor of a subclass failed before ours
        return handle is None or handle.closed

    def fileno(self) -> int:
        """Return the file descriptor; ValueError if closed."""
        self.handle.check_open()
        fd: int = self.handle.source.fd
        return fd

    def read(self) -> npt.NDArray[np.uint64]:
        """Read all values, with one pread.

        Returns
        -------
        numpy.ndarray
            A new array, uint64, shape ``(schema.num_values,)``: raw values in this machine's byte order.
            ``.view(schema.dtype)["exits"]`` selects a statistic.

        Raises
        ------
        OSError, FormatError, ValueError
            As `read_into`.
        """
        if self._own is None:
            self._own = np.empty(self.schema.num_values, np.uint64)
        return self.read_into(self._own).copy()

    def read_into(self, out: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Read all values into the caller's array, with one pread and without allocating.

        Parameters
        ----------
        out : numpy.ndarray
            uint64 in this machine's byte order, shape ``(schema.num_values,)``, C-contiguous, writable. Pass the same
            array each time: it is checked only if it is not the one of the previous call, and kept alive until another
            one is passed or until `close`. So do not resize it, change its dtype or make it read-only in place.

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
            If the file has become shorter than its descriptors require.

        Notes
        -----
        After an error `out` may be partly overwritten.
        """
        if out is not self._out:
            self._prepare(out)
        source = self.handle.source
        status = _read(source)
        if status:
            raise self.handle.failure(-status, source.position + source.got)
        return out

    def snapshot(self, si: bool = False) -> dict[str, Value]:
        """Read all values and return them by name.

        Parameters
        ----------
        si : bool
            Scale plain numbers to base units: ``halt_wait_ns`` becomes seconds.

        Returns
        -------
        dict
            In the order of the descriptors: an int, a bool (unit BOOLEAN), a float (with `si`, for a negative
            exponent), or for a histogram a uint64 array of shape ``(buckets,)``.

        Raises
        ------
        OSError, FormatError, ValueError
            As `read_into`.
        """
        return self.schema.unpack(self.read(), si=si)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        handle = getattr(self, "handle", None)  # missing as in `closed`
        if handle is not None:
            self._out, self._own, self._keep = _NO_ARRAY, None, None
            handle.close()

    def _prepare(self, out: npt.NDArray[np.uint64]) -> None:
        self.handle.check_open()
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out is a {type(out).__name__}; it must be a numpy array")
        if out.dtype != np.uint64 or not out.dtype.isnative:
            raise TypeError(f"out has dtype {out.dtype.str}; it must be uint64 in this machine's byte order")
        if out.shape != (self.schema.num_values,):
            raise ValueError(f"out has shape {out.shape}; it must be ({self.schema.num_values},)")
        if not out.flags.c_contiguous:
            raise ValueError("out is not C-contiguous; it must be, because the kernel fills it in one piece")
        if not out.flags.writeable:
            raise ValueError("out is read-only; it must be writable")
        self._keep = ffi.from_buffer("uint64_t[]", out, True)
        self.handle.source.values = self._keep
        self._out = out

    def __enter__(self) -> Self:
        self.handle.check_open()
        return self

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)  # missing as in `closed`
        if handle is not None and handle.source.fd >= 0 and handle.fd.owned:
            text = f"unclosed {self!r}"
            self.close()  # first, because the warning may be an error
            warnings.warn(text, ResourceWarning, 2, source=self)

    def __repr__(self) -> str:
        where = "gone" if self.handle.lost else "closed" if self.closed else f"fd {self.handle.source.fd}"
        return f"<StatsFile {printable(self._id)} ({self.kind}), {where}, {len(self.schema)} stats>"
