"""The stats files of a VM that another program made: attach, launch, and the VirtualMachine they give."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from _thread import start_new_thread
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from kvmstats_fast._resource import Closing
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.handle import Owner, null_fd
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.borrow import borrow, by_vcpu, check_alive, hold_process, known_as
from kvmstats_fast.vmm.find import VmProcess, describe

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence

    from kvmstats_fast.stats_file import StatsFile

__all__ = ["VirtualMachine", "attach", "launch"]

_POLL = 0.01  # s between looks at a VMM that is starting
_SETTLED = 0.05  # s without another vCPU: a VMM makes them one after the other


class VirtualMachine(Closing):
    """The stats files of a running VM, whoever made it; made by `attach` and `launch`.

    It can be sampled as it is, ``Sampler(machine)``, and with others, ``Sampler([one, another])``. When its VMM exits
    its files are closed at once, because an open stats file keeps the memory of its VM in the kernel allocated; a run
    goes on with the others, and has a `SampleError` with a `VmGoneError` for each of its files.

    Attributes
    ----------
    pid : int
        Of the VMM.
    vmm, name : str
        The VMM's program, and what its command line calls the guest (empty: nothing).
    how : {"borrow", "inject", "launch"}
        How its files were had.
    vm : StatsFile or None
        The VM's file; None if it could not be had, or if the process has several VMs, whose files nothing tells apart
        but their number.
    vcpus : tuple of StatsFile
        Those of the vCPUs, by number.
    files : tuple of StatsFile
        All of them.
    process : subprocess.Popen or None
        The VMM, if `launch` started it; it is the caller's to end and to wait for.
    """

    def __init__(
        self,
        about: VmProcess,
        files: list[StatsFile],
        how: Literal["borrow", "inject", "launch"],
        process: subprocess.Popen[Any] | None,
        pidfd: int,
    ) -> None:
        self._pidfd = -1  # what __del__ needs, should the rest fail
        self._closed = False
        self._gone: VmGoneError | None = None
        self._about = about
        self.pid, self.vmm, self.name, self.how, self.process = about.pid, about.vmm, about.name, how, process
        self._trouble: list[str] = []
        self._set(files)
        self._pidfd = os.dup(pidfd)
        try:
            _WATCHER.add(self._pidfd, self)
        except BaseException:
            self._forget()
            raise

    def _set(self, files: list[StatsFile]) -> None:
        self.files = tuple(files)
        machines = [file for file in files if file.kind == "vm"]
        self.vm = machines[0] if len(machines) == 1 else None
        self.vcpus = tuple(file for file in files if file.kind == "vcpu")
        for file in files:
            file.handle.owner = Owner(self.pid, self.name, self)

    @property
    def alive(self) -> bool:
        """Whether the VMM runs."""
        if self._gone is not None:
            return False
        if self._pidfd < 0:
            raise ValueError(f"this VirtualMachine (process {self.pid}) is closed: attach to it again")
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def refresh(self) -> bool:
        """Look again: vCPUs that were plugged in are added, files that the VMM has closed are closed here too.

        Returns
        -------
        bool
            Whether anything changed. A Sampler samples the files it was made with: make another one then.

        Raises
        ------
        VmGoneError
            If the VMM has exited.
        AttachError
            If the process may not be attached to any more.
        """
        self._check()
        with ExitStack() as found, _WATCHER.lock:
            kept, fresh = [], []
            for file in borrow(self.pid, known=self.files):
                found.callback(file.close)
                same = known_as(file, self.files)
                if same is None:
                    fresh.append(file)
                else:
                    file.close()
                    kept.append(same)
            about = describe(self.pid)
            self._check()  # it lives, so all of that was about it
            found.pop_all()
            stale = [own for own in self.files if own not in kept]
            for file in stale:
                file.handle.revoke(
                    AttachError(errno.ENODEV, f"{file.id}: process {self.pid} has closed this stats file")
                )
                file.close()
                file.handle.owner.machine = None
            self._set(sorted([*kept, *fresh], key=by_vcpu))
            self._about = about or self._about
        return bool(fresh or stale)

    def explain(self) -> str:
        """Say what could not be had, why, and what would get it; empty if nothing is missing."""
        about, lines = self._about, list(self._trouble)
        if self._gone is not None:
            return str(self._gone)
        machines = sum(file.kind == "vm" for file in self.files)
        have = sorted(file.vcpu_id for file in self.files if file.vcpu_id is not None)
        missing = sorted(set(about.vcpus or ()) - set(have))
        what = []
        if (about.vms or 0) > machines:
            what.append(
                "the VM's file" if machines == 0 and about.vms == 1 else f"{(about.vms or 0) - machines} VM files"
            )
        if missing:
            numbers = ", ".join(map(str, missing))
            what.append(f"those of vCPUs {numbers}" if len(missing) > 1 else f"vCPU {numbers}'s")
        if what:
            lines.append(
                f"{' and '.join(what)}: {self.vmm} (process {self.pid}) does not hold it. Start the VMM by "
                "launch(), or with LD_PRELOAD set to what `python -m kvmstats_fast hold-path` prints; or let it open "
                "the file and hand it over (send_files); or, where that is acceptable, attach(pid, inject=True)"
            )
        if machines > 1:
            lines.append(
                f"process {self.pid} has {machines} VMs: their files are in `files`, and `vm` is None, because nothing "
                "says which vCPU is of which VM"
            )
        return "\n".join(lines)

    def close(self) -> None:
        """Close the files; the VM runs on. A second call does nothing."""
        with _WATCHER.lock:
            self._closed = True
            self._forget()
            for file in self.files:
                file.close()
                file.handle.owner.machine = None

    def _forget(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            _WATCHER.close(pidfd)

    # For when nobody has it any more: its files say themselves that they were not closed.
    __del__ = _forget

    def _end(self) -> None:
        """Let go of the files: the VMM has exited."""
        self._gone = VmGoneError(errno.ESRCH, f"process {self.pid} ({self.vmm}) has exited, and its VM with it")
        for file in self.files:
            file.handle.revoke(self._gone)

    def _check(self) -> None:
        if not self.alive:
            raise self._gone or VmGoneError(errno.ESRCH, f"process {self.pid} ({self.vmm}) has exited")

    def __iter__(self) -> Iterator[StatsFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        state = "closed" if self._closed else "gone" if self._gone else "alive"
        vm = "VM and " if self.vm is not None else ""
        return f"<VirtualMachine{name} of {self.vmm} ({self.pid}), {state}: {vm}{len(self.vcpus)} vCPUs, {self.how}>"


class _Watcher:
    """One thread that waits for all VMMs to exit.

    Its lock is that of all machines: one that is ended, closed or refreshed is so by one thread. It is reentrant,
    because a signal handler may close what is just being closed.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self.forget()

    def hold(self) -> None:
        """Before a fork: not in the middle of something, which in the child nobody would finish."""
        self.lock.acquire()

    def release(self) -> None:
        """After a fork, in the parent."""
        self.lock.release()

    def forget(self) -> None:
        """In a forked child: what the parent watches is the parent's."""
        self.lock = threading.RLock()
        self._machines: WeakValueDictionary[int, VirtualMachine] = WeakValueDictionary()
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()

    def add(self, pidfd: int, machine: VirtualMachine) -> None:
        """Have its `_end` called when the process exits."""
        null_fd()  # now, because a file is revoked even when there are too many open
        with self.lock:
            if self._epoll is None:
                epoll = select.epoll()
                start_new_thread(self._work, (epoll,))  # in one step, for the sake of Ctrl-C
                self._epoll = epoll
            self._epoll.register(pidfd, select.EPOLLIN)
            self._machines[pidfd] = machine

    def close(self, pidfd: int) -> None:
        """Close it, and watch it no more. Without the lock: a `__del__` comes by here, in whatever thread."""
        epoll = self._epoll
        if epoll is not None:
            with suppress(OSError):  # it is watched no more
                epoll.unregister(pidfd)
        os.close(pidfd)

    def _work(self, epoll: select.epoll) -> None:
        while True:
            for pidfd, _ in epoll.poll():
                with self.lock:
                    machine = self._machines.get(pidfd)
                    if machine is not None and machine._pidfd == pidfd and machine.alive:
                        continue  # another one, which has got the number meanwhile
                    with suppress(OSError):
                        epoll.unregister(pidfd)
                    if machine is not None and machine._pidfd == pidfd:
                        machine._end()
                machine = None


_WATCHER = _Watcher()
os.register_at_fork(
    before=_WATCHER.hold,
    after_in_parent=_WATCHER.release,
    after_in_child=_WATCHER.forget,
)


def attach(pid: int, inject: bool = False, *, timeout: float = 2.0) -> VirtualMachine:
    """Get at the statistics of a running VM, whoever made it.

    The stats files that its VMM holds are borrowed: nothing happens to the VMM, and it does not notice. Which VMMs hold
    theirs: QEMU from 8.1 on those of its vCPUs; whatever was started by `launch` or under the hold library, all.

    Parameters
    ----------
    pid : int
        Of the VMM; `find_vms` lists them.
    inject : bool
        Where the VMM holds less than there is, have its own threads open the rest, by ptrace (x86-64). Each is stopped
        for a moment, and a system call that it sleeps in ends as by a signal. The files stay open in the VMM, so this
        is needed once. Read ``docs/attach.md`` before you do this to a VM that matters.
    timeout : float
        Seconds for `inject`.

    Returns
    -------
    VirtualMachine
        With what could be had; ``explain()`` says what could not, and what would get it.

    Raises
    ------
    VmGoneError
        If there is no such process, or it exits meanwhile.
    AttachError
        If nothing can be had: not permitted, no VM, or a VMM that holds no stats files. The message says which of these
        it is, and what to do, in the order of least privilege.
    """
    how: Literal["borrow", "inject"] = "borrow"
    trouble: list[str] = []
    if inject:
        from kvmstats_fast.vmm import inject as injection  # noqa: PLC0415 - the last resort

        for one in injection.open_missing(pid, timeout=timeout):
            if one.opened:
                how = "inject"
            if one.error is not None:
                trouble.append(str(one.error))
    return _machine(pid, how, trouble)


def _machine(
    pid: int,
    how: Literal["borrow", "inject", "launch"],
    trouble: list[str],
    process: subprocess.Popen[Any] | None = None,
) -> VirtualMachine:
    with hold_process(pid) as pidfd, ExitStack() as opened:
        files = borrow(pid)
        for file in files:
            opened.callback(file.close)
        about = describe(pid)
        check_alive(pid, pidfd)  # so all of that was about the process that is watched
        if about is None or not files:
            raise _nothing(pid, about, trouble)
        machine = VirtualMachine(about, files, how, process, pidfd)
        machine._trouble = trouble
        opened.pop_all()
        return machine


def _nothing(pid: int, about: VmProcess | None, trouble: list[str]) -> AttachError:
    if about is None:
        return AttachError(
            errno.ENOENT, f"process {pid} has no VM: none of its files is one of KVM. `kvmstats list` shows who has one"
        )
    if trouble:
        return AttachError(errno.ENODATA, f"no stats file of process {pid} could be opened: " + "; ".join(trouble))
    return AttachError(
        errno.ENODATA,
        f"{about.vmm} (process {pid}) holds no stats files that could be borrowed, and the kernel opens them for "
        "nobody but the process that made the VM. In the order of preference: start the VMM by launch(), or with "
        "LD_PRELOAD set to what `python -m kvmstats_fast hold-path` prints; use QEMU 8.1 or later, which holds those "
        "of its vCPUs; let the VMM hand them over (send_files); or attach(pid, inject=True)",
    )


def launch(
    argv: Sequence[str | os.PathLike[str]],
    *,
    vcpus: int | None = None,
    timeout: float = 10.0,
    env: Mapping[str, str] | None = None,
    **popen: Any,
) -> VirtualMachine:
    """Start a VMM so that its statistics can be had, without privilege.

    It runs under the hold library, which opens the stats file of each VM and vCPU that it makes, and keeps it open.

    Parameters
    ----------
    argv : sequence of str or path
        The VMM, any dynamically linked program, and its arguments.
    vcpus : int, optional
        How many vCPUs to wait for. Default: until there is a VM with a vCPU, and for 50 ms no other one was made.
    timeout : float
        Seconds for that.
    env, **popen
        Passed on to `subprocess.Popen`.

    Returns
    -------
    VirtualMachine
        Its attribute `process` is the ``Popen``. vCPUs that are made later are added by `refresh`.

    Raises
    ------
    AttachError
        If the program cannot be made to hold its files (it is static, or setuid), before it is started; or if in
        `timeout` it made no VM, or fewer vCPUs: then it has been killed.
    VmGoneError
        If it exited before.
    OSError
        If it cannot be started.
    ValueError
        If `vcpus` is less than 1.
    """
    if vcpus is not None and vcpus < 1:
        raise ValueError(f"vcpus is {vcpus}; it must be at least 1")
    process = hold.start(argv, env=env, **popen)
    try:
        return _when_ready(process, vcpus, timeout)
    except BaseException:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        raise


def _exit(status: int) -> str:
    if status == 0:
        return "exited with status 0 (one that goes into the background, as by -daemonize: find_vms shows its pid)"
    if status > 0:
        return f"exited with status {status}"
    hint = " (a seccomp filter that does not know KVM_GET_STATS_FD?)" if -status == signal.SIGSYS else ""
    return f"was killed by signal {-status}{hint}"


def _vcpus_held(about: VmProcess) -> int:
    """How many vCPUs there are whose file is held; QEMU 8.1 under the hold library has two of each."""
    held = Counter(file.vcpu_id for file in about.held or () if file.vcpu_id is not None)
    return (held & Counter(about.vcpus or ())).total()


def _when_ready(process: subprocess.Popen[Any], vcpus: int | None, timeout: float) -> VirtualMachine:
    deadline = time.monotonic() + timeout
    seen, since = 0, time.monotonic()
    while True:
        status = process.poll()
        if status is not None:
            raise VmGoneError(errno.ESRCH, f"{process.args!r} {_exit(status)} before it had made a VM")
        about = describe(process.pid)
        count = _vcpus_held(about) if about else 0
        if count != seen:
            seen, since = count, time.monotonic()
        now = time.monotonic()
        settled = seen > 0 and now - since >= _SETTLED if vcpus is None else seen >= vcpus
        if settled and about is not None:
            return _machine(process.pid, "launch", [], process)
        if now >= deadline:
            made = len(about.vcpus or ()) if about else 0
            if made > seen:
                what = f"{made} vCPUs, of which it holds the stats files of {seen},"
                hint = (
                    "Did a wrapper keep the hold library from it (LD_PRELOAD cleared, another root directory), is its "
                    "`ulimit -n` not 512 above its number of files, or is the kernel older than 5.14?"
                )
            else:
                what = f"{seen} of {vcpus} vCPUs" if vcpus else "no VM with a vCPU"
                hint = "Does it use KVM (QEMU: -accel kvm), and in this process, not in one that it starts?"
            raise AttachError(
                errno.ETIMEDOUT,
                f"{process.args!r} (process {process.pid}) has made {what} in {timeout} s, and was killed. {hint}",
            )
        time.sleep(_POLL)
