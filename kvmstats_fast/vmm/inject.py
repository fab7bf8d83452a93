"""Have a running VMM open the stats files it does not hold yet, through its own threads (x86-64).

How a thread is made to do it, and why it survives the death of whoever makes it, is drawn in ``csrc/inject.h``.
Here is what surrounds it: which fds and threads to use, and what became of it.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.abi import Layout, ioctl_number
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.vmm.hazard import check_hazards
from kvmstats_fast.vmm.mark import drop_dead
from kvmstats_fast.vmm.refusal import explain_refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmstats_fast.vmm.proc import KvmFile, Process


#: When the tracer ended: after the last step it had done, ``enum kvmstats_inject_step``.
_STEPS = {
    lib.KVMSTATS_STEP_NONE: "before it was seized",
    lib.KVMSTATS_STEP_SEIZE: "after PTRACE_SEIZE",
    lib.KVMSTATS_STEP_INTERRUPT: "after PTRACE_INTERRUPT",
    lib.KVMSTATS_STEP_STOP: "after it had stopped",
    lib.KVMSTATS_STEP_REGS: "after its registers were read",
    lib.KVMSTATS_STEP_STATUS: "after its seccomp mode was read",
    lib.KVMSTATS_STEP_XSTATE: "after its extended registers were read",
    lib.KVMSTATS_STEP_MASK: "after its signal mask was read",
    lib.KVMSTATS_STEP_CODE: "after the C library's code was checked",
    lib.KVMSTATS_STEP_FRAME: "after the signal frame was written",
    lib.KVMSTATS_STEP_COMMIT: "after its registers were set",
    lib.KVMSTATS_STEP_DETACH: "after PTRACE_DETACH",
}


class Result(IntEnum):
    """How an attempt on a thread ended (``enum kvmstats_inject_result`` of ``csrc/inject.h``)."""

    DONE = lib.KVMSTATS_INJECT_DONE
    UNSUPPORTED = lib.KVMSTATS_INJECT_UNSUPPORTED
    GONE = lib.KVMSTATS_INJECT_GONE
    KERNEL_THREAD = lib.KVMSTATS_INJECT_KERNEL_THREAD
    TRACED = lib.KVMSTATS_INJECT_TRACED
    HALTED = lib.KVMSTATS_INJECT_HALTED
    SECCOMP = lib.KVMSTATS_INJECT_SECCOMP
    SHADOW_STACK = lib.KVMSTATS_INJECT_SHADOW_STACK
    FOREIGN_ABI = lib.KVMSTATS_INJECT_FOREIGN_ABI
    NO_SYSCALL = lib.KVMSTATS_INJECT_NO_SYSCALL
    OTHER_CALL = lib.KVMSTATS_INJECT_OTHER_CALL
    CODE = lib.KVMSTATS_INJECT_CODE
    XSTATE = lib.KVMSTATS_INJECT_XSTATE
    STACK = lib.KVMSTATS_INJECT_STACK
    TIMEOUT = lib.KVMSTATS_INJECT_TIMEOUT
    KILLED = lib.KVMSTATS_INJECT_KILLED


_MESSAGES = {
    Result.DONE: "it called KVM_GET_STATS_FD, but no new stats file appeared in /proc/{pid}/fd. Possible causes: the "
    "process has as many files open as it may (RLIMIT_NOFILE); the VM belongs to another process; the kernel is older "
    "than 5.14",
    Result.UNSUPPORTED: "only on x86-64 can threads be made to open files: let the VMM open them and hand them over",
    Result.GONE: "it has ended",
    Result.KERNEL_THREAD: "it is a worker of the kernel",
    Result.TRACED: "process {value} traces it (a debugger, strace?): end that first",
    Result.HALTED: "it is stopped by a signal: continue it first (kill -CONT {pid})",
    Result.SECCOMP: "it has a seccomp filter (mode {value}), which may kill the VMM for a call it does not expect: let "
    "the VMM open its stats files, or start it without the filter",
    Result.SHADOW_STACK: "it has a shadow stack (CET), which forbids the way back",
    Result.FOREIGN_ABI: "it runs 32-bit or x32 code ({value:#x})",
    Result.NO_SYSCALL: "it was never found in a system call (last seen at {value:#x})",
    Result.OTHER_CALL: "it was never found in KVM_RUN (last seen in system call {value})",
    Result.CODE: "the code at {value:#x} has changed",
    Result.XSTATE: "its extended register state of {value} bytes is not understood",
    Result.STACK: "there is no writable memory below its stack ({value:#x})",
    Result.TIMEOUT: "it did not stop in time: it sleeps in the kernel, where no signal wakes it",
    Result.KILLED: "the tracer was killed {when}, which does no harm: try again",
}

_ERRNO = {
    Result.DONE: errno.ENODATA,
    Result.UNSUPPORTED: errno.ENOTSUP,
    Result.GONE: errno.ESRCH,
    Result.KERNEL_THREAD: errno.EPERM,
    Result.TRACED: errno.EBUSY,
    Result.HALTED: errno.EBUSY,
    Result.SECCOMP: errno.EPERM,
    Result.SHADOW_STACK: errno.EPERM,
    Result.FOREIGN_ABI: errno.ENOTSUP,
    Result.NO_SYSCALL: errno.EAGAIN,
    Result.OTHER_CALL: errno.EAGAIN,
    Result.CODE: errno.EFAULT,
    Result.XSTATE: errno.ENOTSUP,
    Result.STACK: errno.EFAULT,
    Result.TIMEOUT: errno.ETIMEDOUT,
    Result.KILLED: errno.EINTR,
}

#: Another moment may be better.
_TRANSIENT = {Result.NO_SYSCALL, Result.OTHER_CALL}
#: No reason to report: kernel workers show the registers of the thread that created them.
_SAYS_NOTHING = {Result.GONE, Result.KERNEL_THREAD}

_C_LIBRARY = re.compile(r"/(?:libc[.-]|ld-musl)[^/]*$")
_KVM_RUN = 0xAE80
_NR_IOCTL = 16
_CALL = b"\x0f\x05\xc3"  # syscall; ret
_RESTORERS = (b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05")  # mov $15, %rax or %eax; syscall
_PIECE = 1 << 20

_PATIENCE = 2.0  # s: how long a thread may take to stop, and one that has been let go to make its call
_FIRST_NAP, _LONGEST_NAP = 0.0005, 0.02  # s


@dataclass(frozen=True)
class Injected:
    """What became of one VM or vCPU of the process.

    Attributes
    ----------
    kind : {"vm", "vcpu"}
    vcpu_id : int or None
        Number of the vCPU, None for a VM.
    kvm_fd : int
        Its fd in that process; the lowest of several that are one open file.
    stats_fd : int or None
        Fd of its stats file in that process. None after an error, and where files are held but not known to be its own:
        see `open_missing`.
    opened : bool
        Whether it was opened now; it stays open in that process.
    tid : int or None
        Thread that opened it.
    stopped_ns : int
        How long that thread stood still for it, in ns.
    result : Result or None
        How the last attempt ended; None if there was none.
    error : AttachError or None
        Why there is no stats file; what the kernel refused has its errno (EPERM: this process may not trace that one).
    """

    kind: Literal["vm", "vcpu"]
    vcpu_id: int | None
    kvm_fd: int
    stats_fd: int | None = None
    opened: bool = False
    tid: int | None = None
    stopped_ns: int = 0
    result: Result | None = None
    error: AttachError | None = None


class _Subject(NamedTuple):
    """A VM or vCPU: its id, and its fds, which are all one open file."""

    vcpu_id: int | None
    fds: tuple[int, ...]

    def outcome(self, **what: Any) -> Injected:
        return Injected("vm" if self.vcpu_id is None else "vcpu", self.vcpu_id, self.fds[0], **what)

    def __str__(self) -> str:
        return f"fd {self.fds[0]} ({'VM' if self.vcpu_id is None else f'vCPU {self.vcpu_id}'})"


class _Attempt(NamedTuple):
    """What a thread did."""

    tid: int
    result: Result | None
    fd: int = -1
    stopped_ns: int = 0
    signals: int = 0
    error: AttachError | None = None


def open_missing(process: Process, *, timeout: float = 5.0) -> list[Injected]:
    """Have a VMM open the stats files of its VMs and vCPUs that it does not hold yet.

    One of its threads is stopped for each (some 0.1 ms; out of ``KVM_RUN`` some ms), and the call it is in ends as by a
    signal. A vCPU's file is opened by the thread that runs that vCPU.

    Parameters
    ----------
    process : Process
        The VMM, held. This process must be allowed to trace it (``PTRACE_MODE_ATTACH``, ptrace(2)).
    timeout : float
        Seconds for all of it, more than 0.

    Returns
    -------
    list of Injected
        For each VM, then each vCPU, in the order of their fds. Failures are in it, with their ``error``.

    Raises
    ------
    VmGoneError
        If the process ends meanwhile.
    AttachError
        If it is this process, may not be traced, has no VM, runs code written in Go, is frozen, or has not the code
        that this needs; and off x86-64.

    Notes
    -----
    Links in ``/proc/PID/fd`` give a stats file's kind and vCPU number, not its VM, and its own id names the thread that
    made the VM or vCPU. So in a process with several VMs the held files of a kind can only be counted: as many as
    there are VMs count as one for each, and ``stats_fd`` is None; with fewer, each VM gets a new one. A file that is
    opened here is known to be that of its fd.

    A vCPU whose VM is paused is not in ``KVM_RUN``, and nothing shows which thread is its own: it is refused.

    A thread needs room below its stack as for a signal handler, which cannot be seen from outside; C, C++ and Rust have
    it. Programs built by Go, which have not, are known by a note or a section of their ELF.
    """
    deadline = time.monotonic() + timeout
    if lib.kvmstats_inject(ffi.new("struct kvmstats_inject *")) == Result.UNSUPPORTED:
        raise AttachError(_ERRNO[Result.UNSUPPORTED], _MESSAGES[Result.UNSUPPORTED])
    pid = process.pid
    if pid == os.getpid():
        raise AttachError(errno.EINVAL, f"process {pid} is this one: open its stats files with StatsFile.open")
    try:
        return Injection(process, deadline).open_missing()
    except (FileNotFoundError, ProcessLookupError):
        raise VmGoneError(errno.ESRCH, f"process {pid} has ended") from None
    except PermissionError as error:
        process.check_alive()
        number = error.errno or errno.EPERM
        text = f"{error.filename}: {os.strerror(number)}; {explain_refusal(pid, number)}"
        raise AttachError(number, text) from None


class Injection:
    """The attempts on a process' threads, for the time of one call."""

    def __init__(self, process: Process, deadline: float) -> None:
        self.process = process
        self.deadline = deadline
        self.refused: dict[int, _Attempt] = {}  # threads that are not to be tried again
        self.call = self.restorer = 0  # addresses of code; see find_code

    def open_missing(self) -> list[Injected]:
        """Return what became of each VM and vCPU."""
        subjects, held = self.look()
        if not subjects:
            raise AttachError(
                errno.ENOENT, f"process {self.process.pid} has no fd of a VM or vCPU open: is it the VMM?"
            )
        found: dict[_Subject, Injected] = {}
        for subject in subjects:
            alike = sum(other.vcpu_id == subject.vcpu_id for other in subjects)
            files = self.process.group(file for file in held if file.vcpu_id == subject.vcpu_id)
            if len(files) >= alike:
                found[subject] = subject.outcome(stats_fd=files[0][0].fd if alike == 1 else None)
        found |= self.open([subject for subject in subjects if subject not in found])
        return [found[subject] for subject in subjects]

    def open(self, subjects: list[_Subject]) -> dict[_Subject, Injected]:
        """Open one more stats file for each."""
        if subjects:
            check_hazards(self.process)
            self.call, self.restorer = self.find_code()
        found = {subject: self.open_vm(subject) for subject in subjects if subject.vcpu_id is None}
        return found | self.open_vcpus([subject for subject in subjects if subject.vcpu_id is not None])

    # ---- what can be seen

    def look(self) -> tuple[list[_Subject], list[KvmFile]]:
        """Return VMs, then vCPUs by number, and the stats files that are held."""
        files = drop_dead(self.process, self.process.kvm_files())
        groups = self.process.group(file for file in files if not file.is_stats)
        subjects = [_Subject(group[0].vcpu_id, tuple(file.fd for file in group)) for group in groups]
        subjects.sort(key=lambda subject: -1 if subject.vcpu_id is None else subject.vcpu_id)
        return subjects, [file for file in files if file.is_stats]

    def threads(self) -> Iterator[tuple[int, list[str]]]:
        """Threads with the words of their ``syscall`` file."""
        for tid in self.process.threads():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                yield tid, self.process.thread_syscall(tid)

    def find_code(self) -> tuple[int, int]:
        """Return addresses of a ``syscall; ret`` and of a restorer in one mapped file: what holds the C library."""
        lines = self.process.read("maps").decode(errors="surrogateescape").splitlines()
        with self.process.open_memory() as memory:
            for line in sorted(lines, key=lambda line: not _C_LIBRARY.search(line)):  # the most likely first
                span, mode, _, _, inode, *_ = line.split(maxsplit=5)
                if mode != "r-xp" or inode == "0":
                    continue
                start, end = (int(word, 16) for word in span.split("-"))
                code = _read_code(memory.fileno(), start, end)
                call = code.find(_CALL)
                restorer = next((at for at in map(code.find, _RESTORERS) if at >= 0), -1)
                if call >= 0 and restorer >= 0:
                    return start + call, start + restorer
        text = f"process {self.process.pid} has no C library for x86-64 mapped, which its threads need for the call"
        raise AttachError(errno.ENOTSUP, text)

    # ---- what is done

    def attempt(self, tid: int, fds: tuple[int, ...], *, in_run: bool, kill_after: int = 0) -> _Attempt:
        """Try one thread. `kill_after` is a step after which the tracer dies, for tests."""
        number = ioctl_number(Layout.MERGED)[1]
        keep = ffi.new("int32_t[]", fds)
        job = ffi.new("struct kvmstats_inject *")
        job.pid, job.tid, job.fds, job.num_fds, job.in_run = self.process.tid, tid, keep, len(fds), in_run
        job.request, job.call, job.restorer, job.kill_after = number, self.call, self.restorer, kill_after
        job.timeout_ns = max(1, int(min(_PATIENCE, self.deadline - time.monotonic()) * 1e9))
        status = lib.kvmstats_inject(job)
        pid = self.process.pid
        where = f"thread {tid} of process {pid}"
        if status < 0:
            text = f"ptrace on {where}, {_STEPS[job.step]}: {os.strerror(-status)}"
            attempt = _Attempt(tid, None, error=AttachError(-status, text))
        else:
            result = Result(status)
            text = _MESSAGES[result].format(pid=pid, value=job.value, when=_STEPS[job.step])
            error = AttachError(_ERRNO[result], f"{where}: {text}")
            attempt = _Attempt(tid, result, job.fd, job.stopped_ns, job.signals, error)
        if attempt.result != Result.DONE and attempt.result not in _TRANSIENT:
            self.refused[tid] = attempt
        return attempt

    def settle(self, subject: _Subject, attempt: _Attempt, before: set[int]) -> Injected:
        """Wait for the file that a thread has been sent to open."""
        until = min(self.deadline, time.monotonic() + _PATIENCE)
        facts = {"tid": attempt.tid, "stopped_ns": attempt.stopped_ns, "result": attempt.result}
        nap = _FIRST_NAP
        while not (new := self.held_now(subject) - before):
            if time.monotonic() >= until:
                return subject.outcome(error=_explain(subject, attempt), **facts)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        return subject.outcome(stats_fd=min(new), opened=True, **facts)

    def is_late(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() >= self.deadline

    def held_now(self, subject: _Subject) -> set[int]:
        """Return the fds of the stats files of this kind that the process holds."""
        files = self.process.kvm_files()
        return {file.fd for file in files if file.is_stats and file.vcpu_id == subject.vcpu_id}

    def open_vm(self, subject: _Subject) -> Injected:
        """Have any thread open a VM's file, for its ioctl does not wait; first those in KVM_RUN, which expect EINTR."""
        last = None
        nap = _FIRST_NAP
        while True:
            order = sorted(self.threads(), key=lambda thread: (_runs(thread[1]) is None, thread[1] == ["running"]))
            able = [tid for tid, _ in order if tid not in self.refused]
            for tid in able:
                if self.is_late():
                    break
                before = self.held_now(subject)
                attempt = self.attempt(tid, subject.fds[:1], in_run=False)
                if attempt.result == Result.DONE:
                    return self.settle(subject, attempt, before)
                if attempt.result not in _SAYS_NOTHING:
                    last = attempt
            if not able or self.is_late():
                return self.give_up(subject, last)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)

    def open_vcpus(self, subjects: list[_Subject]) -> dict[_Subject, Injected]:
        """Have the thread in a vCPU's KVM_RUN open its file; where a running thread is shows when it is stopped."""
        found: dict[_Subject, Injected] = {}
        by_fd = {fd: subject for subject in subjects for fd in subject.fds}
        nap = _FIRST_NAP
        while by_fd:
            self.process.check_alive()
            able = False
            for tid, words in self.threads():
                if not by_fd or self.is_late():
                    break
                fd = _runs(words)
                subject = by_fd.get(-1 if fd is None else fd)
                if tid in self.refused:
                    if subject and self.refused[tid].result not in _SAYS_NOTHING:
                        found[subject] = self.give_up(subject, self.refused[tid])
                        by_fd = {fd: other for fd, other in by_fd.items() if other is not subject}
                    continue
                able = True
                if not subject and words != ["running"]:
                    continue
                held = [file for file in self.process.kvm_files() if file.is_stats]
                attempt = self.attempt(tid, tuple(by_fd), in_run=True)
                if attempt.result == Result.DONE:
                    subject = by_fd[attempt.fd]
                    found[subject] = self.settle(
                        subject, attempt, {file.fd for file in held if file.vcpu_id == subject.vcpu_id}
                    )
                    by_fd = {fd: other for fd, other in by_fd.items() if other is not subject}
            if not able or self.is_late():
                reasons = [attempt for attempt in self.refused.values() if attempt.result not in _SAYS_NOTHING]
                last = reasons[-1] if reasons else None  # of a thread that may be the one
                return found | {subject: self.give_up(subject, last) for subject in by_fd.values()}
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        return found

    def give_up(self, subject: _Subject, attempt: _Attempt | None) -> Injected:
        """Return that no file was opened, and why."""
        if attempt is not None:
            return subject.outcome(tid=attempt.tid, result=attempt.result, error=_explain(subject, attempt))
        text = f"no thread was found in {'a system call' if subject.vcpu_id is None else 'its KVM_RUN'} in time"
        hint = "" if subject.vcpu_id is None else ". Is the VM paused? The file can only be opened while the vCPU runs"
        return subject.outcome(error=AttachError(errno.EAGAIN, f"process {self.process.pid}, {subject}: {text}{hint}"))


def _runs(words: list[str]) -> int | None:
    """Return the fd whose ``KVM_RUN`` a thread is in, by its ``syscall`` file."""
    if len(words) > 3 and int(words[0]) == _NR_IOCTL and int(words[2], 16) & 0xFFFFFFFF == _KVM_RUN:
        return int(words[1], 16)
    return None


def _read_code(memory: int, start: int, end: int) -> bytes:
    """Read as much of a mapping as can be read."""
    code = bytearray()
    while len(code) < end - start:
        try:
            piece = os.pread(memory, min(_PIECE, end - start - len(code)), start + len(code))
        except OSError:  # a page beyond the end of its file
            break
        if not piece:
            break
        code += piece
    return bytes(code)


def _explain(subject: _Subject, attempt: _Attempt) -> AttachError | None:
    """Return the error of the attempt, which says what it was for."""
    error = attempt.error
    return error and AttachError(error.errno, f"the stats file of {subject}: {error.strerror}")
