"""Helpers of several test files."""

import ctypes
import dis
import os
import random
import re
import signal
import struct
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import settings

import kvmstats_fast as kf

DATA = Path(__file__).parent / "data"
DERANDOMIZE = bool(os.environ.get("CI"))


def examples(count):
    """Hypothesis settings for this many examples, without a deadline; in CI always the same ones."""
    return settings(max_examples=count, deadline=None, derandomize=DERANDOMIZE)


def numbers(count):
    """So many numbers to make examples of: in CI always the same ones, elsewhere others each time.

    The processes of one run of pytest-xdist have the same: it takes them to have collected the same tests.
    """
    first = 0 if DERANDOMIZE else random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6) * count
    return range(first, first + count)


def open_fds():
    """The number of fds that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def kernel_threads():
    """The threads of this process, as the kernel numbers them; one that ends was joined before /proc forgets it."""
    is_exiting = 4  # PF_EXITING, of the ninth field
    threads = set()
    for path in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            if not int((path / "stat").read_text().rpartition(")")[2].split()[6]) & is_exiting:
                threads.add(int(path.name))
    return threads


def run_while(work, run, *arguments, **options):
    """Run a Sampler, and when it has run for 0.1 s do `work` in another thread; what `run` returns."""
    before = kernel_threads()

    def wait_and_work():
        until(lambda: len(kernel_threads() - before) == 2)  # this one, and that of the run
        time.sleep(0.1)
        work()

    thread = threading.Thread(target=wait_and_work)
    thread.start()
    try:
        return run(*arguments, **options)
    finally:
        thread.join()


NOBODY = 65534


def stats_fds(pid="self"):
    """The fds of a process that are stats files."""
    found = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            if "-stats" in str(one.readlink()):
                found.add(int(one.name))
    return found


def take_away(fd):
    """Make fd fail as a closed one does, with EBADF, while its number stays taken.

    After a plain close() the next file that any thread opens has the number, and would be read in its place.
    """
    unreadable = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(unreadable, fd, inheritable=False)
    finally:
        os.close(unreadable)


CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 1 << 2, 1 << 19


def become(uid, capabilities):
    """Change to another user with these capabilities and no others."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities = 8
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    # Version 3; then effective, permitted and inheritable ones, of which those above 31 come second.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(header, (ctypes.c_uint32 * 6)(capabilities, capabilities)) == 0, os.strerror(ctypes.get_errno())


def refuse_call(number, arguments, error):
    """Have a system call with these arguments, {which: value}, fail in this thread and what it forks: seccomp(2)."""
    load, equal, answer = 0x20, 0x15, 0x06  # linux/bpf_common.h
    allow, fail = 0x7FFF0000, 0x00050000  # linux/seccomp.h
    tests = [(0, number), *((16 + 8 * which, value) for which, value in arguments.items())]  # struct seccomp_data
    code = []
    for left, (offset, value) in zip(range(len(tests), 0, -1), tests, strict=True):
        code += (load, 0, 0, offset), (equal, 0, 2 * left - 1, value)
    code += (answer, 0, 0, fail | error), (answer, 0, 0, allow)
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    head = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, with_filter = 38, 22, 2  # linux/prctl.h
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, with_filter, head) == 0, os.strerror(ctypes.get_errno())


def forked(work, uid=None, capabilities=0):
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
            become(uid, capabilities)
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


#: The id of a stats file has the host's number of a thread, which a pid namespace of its own does not show.
IN_FIRST_PID_NAMESPACE = Path("/proc/self/ns/pid").readlink() == Path("pid:[4026531836]")  # linux/proc_ns.h


def names_thread(stats_id, tid):
    """Whether the id of a stats file names this thread, as far as can be known here."""
    return re.fullmatch(rf"kvm-{tid if IN_FIRST_PID_NAMESPACE else '[0-9]+'}(/vcpu-[0-9]+)?", stats_id)


def until(condition, seconds=30):
    """Wait for something to be true, and give it."""
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return result


@contextmanager
def watchdog(seconds=20):
    """End what hangs with a TimeoutError."""

    def ring(*_):
        raise TimeoutError("it hangs")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class CtrlC:
    """In a ``with`` block, KeyboardInterrupt at the `at`th bytecode instruction of the code in `folder`.

    By default that is the package's own. `left` is more than 0 if there were not so many. It comes one instruction
    later than at the two where an exception handler begins and ends: no signal handler runs there, and since Python
    3.11 the exception handled would stay the thread's, with its traceback and all that the frames own.
    """

    ENDS_OF_A_HANDLER = frozenset(dis.opmap.get(name) for name in ("PUSH_EXC_INFO", "POP_EXCEPT"))

    def __init__(self, at, folder=str(Path(kf.__file__).parent)):
        self.left, self.folder = at, folder

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left <= 0 and frame.f_code.co_code[frame.f_lasti] not in self.ENDS_OF_A_HANDLER:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one only now
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
