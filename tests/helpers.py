"""What several test files need."""

import os
import struct
import sys
import warnings
from pathlib import Path

import kvmstats_fast

DATA = Path(__file__).parent / "data"


def open_fds():
    """How many fds this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


NOBODY = 65534


def forked(work, uid=None):
    """Run `work` in a forked child, as another user if told so, and return the child's pid; see `exit_status`.

    The child ends without clean-up; what it raises is printed, and is exit status 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while threads run: the child uses none of them
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may leave the child
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def exit_status(pid):
    """Wait for a forked child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class CtrlC:
    """In a ``with`` block, KeyboardInterrupt at the `at`th bytecode instruction of the package's own code.

    `left` is more than 0 if there were not so many.
    """

    package = str(Path(kvmstats_fast.__file__).parent)

    def __init__(self, at):
        self.left = at

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.package):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt


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
