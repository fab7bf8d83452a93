"""The stats files of a VM that another program made: attach, launch, and the VirtualMachine that they return."""

from __future__ import annotations

import errno
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from kvmstats_fast._arguments import check_integer, check_seconds
from kvmstats_fast._resource import Closing
from kvmstats_fast._text import printable
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.borrow import borrow, by_vcpu, find_known, hold_process, list_files
from kvmstats_fast.vmm.find import VmProcess, describe, has_vm, is_domain, vcpus_of
from kvmstats_fast.vmm.hazard import has_filter
from kvmstats_fast.vmm.mark import Marks
from kvmstats_fast.vmm.refusal import refused
from kvmstats_fast.vmm.watch import WATCHER, Watched
from kvmstats_fast.vmm.ways import advise

if TYPE_CHECKING:
    import os
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import KvmFile, Process

_POLL = 0.01  # s between looks at a VMM that is starting
_LONGEST = 1e9  # s
_SETTLED = 0.05  # s without another vCPU: a VMM makes them one after the other


class VirtualMachine(Closing):
    """The stats files of a running VM that this process may not have started; made by `attach` and `launch`.

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
        How its files were obtained.
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
        watched: Watched,
        about: VmProcess,
        how: Literal["borrow", "inject", "launch"],
        trouble: Sequence[str],
    ) -> None:
        self._about = about
        self._trouble = trouble
        self._closed = False
        self._watched = watched
        self.pid, self.vmm, self.name, self.how = about.pid, about.vmm, about.name, how
        self.process: subprocess.Popen[Any] | None = None
        self._set(watched.files)
        WATCHER.add(watched)

    def _set(self, files: Sequence[StatsFile]) -> None:
        self.files = tuple(files)
        machines = [file for file in files if file.kind == "vm"]
        self.vm = machines[0] if len(machines) == 1 else None
        self.vcpus = tuple(file for file in files if file.kind == "vcpu")
        for file in files:
            file.handle.owner = replace(file.handle.owner, pid=self.pid, name=self.name, machine=self)

    @property
    def alive(self) -> bool:
        """Whether the VMM runs."""
        if self._watched.gone is not None:
            return False
        if self._closed:
            raise ValueError(f"this VirtualMachine (process {self.pid}) is closed: attach to it again")
        return not self._watched.process.ended

    def refresh(self) -> bool:
        """Look again: add vCPUs that were plugged in, close files that the VMM has closed.

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
        self._check_alive()
        process = self._watched.process
        with ExitStack() as found, WATCHER.lock:
            kept, fresh = [], []
            listed = list_files(process)
            marks = _mark(process, listed)
            for file in borrow(process, listed, known=self.files):
                found.callback(file.close)
                same = find_known(file, self.files)
                if same is None:
                    fresh.append(file)
                else:
                    file.close()
                    kept.append(same)
            about = _describe(process, listed)
            self._check_alive()  # so all of that was about it; and it was not closed meanwhile
            found.pop_all()
            stale = [own for own in self.files if own not in kept]
            for file in stale:
                file.handle.revoke(
                    AttachError(errno.ENODEV, f"{printable(file.id)}: process {self.pid} has closed this stats file")
                )
                file.close()
                file.handle.owner = replace(file.handle.owner, machine=None)
            self._watched.watch(sorted([*kept, *fresh], key=by_vcpu), marks)
            self._set(self._watched.files)
            self._about = about
        return bool(fresh or stale)

    def explain(self) -> str:
        """Return what could not be had, why, and what would get it; empty if nothing is missing."""
        if self._watched.gone is not None:
            return str(self._watched.gone.strerror)
        lines = list(self._trouble)
        lines += {str(getattr(file.handle.lost, "strerror", "")): None for file in self.files if file.handle.lost}
        machines = sum(file.kind == "vm" for file in self.files)
        have = {file.vcpu_id for file in self.files}
        vms = (self._about.vms or 0) - machines
        vcpus = sorted(set(self._about.vcpus or ()) - have)
        missing = []
        if vms > 0:
            missing.append("the VM's file" if self._about.vms == 1 else f"{vms} VM files")
        if vcpus:
            numbers = ", ".join(map(str, vcpus))
            missing.append(f"vCPU {numbers}'s" if len(vcpus) == 1 else f"those of vCPUs {numbers}")
        if missing:
            lines.append(
                f"{' and '.join(missing)}: {printable(self.vmm)} (process {self.pid}) does not hold "
                f"{'it' if vms + len(vcpus) == 1 else 'them'}. What helps, the least intrusive first: "
                + _advise(self._watched.process, inject=not self._trouble, vcpus=bool(vcpus))
            )
        if machines > 1:
            lines.append(
                f"process {self.pid} has {machines} VMs: their files are in `files`, and `vm` is None, because nothing "
                "says which vCPU is of which VM"
            )
        return "\n".join(lines)

    def close(self) -> None:
        """Close the files; the VM runs on. A second call does nothing."""
        with WATCHER.lock:
            self._closed = True
            self._watched.close()
            for file in self.files:
                file.close()
                file.handle.owner = replace(file.handle.owner, machine=None)

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._watched.gone or self._watched.exited()

    def __iter__(self) -> Iterator[StatsFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        name = f" '{printable(self.name)}'" if self.name else ""
        state = "closed" if self._closed else "gone" if self._watched.gone else "alive"
        vm = "VM and " if self.vm is not None else ""
        of = f"of {printable(self.vmm)} ({self.pid})"
        return f"<VirtualMachine{name} {of}, {state}: {vm}{len(self.vcpus)} vCPUs, {self.how}>"


def attach(pid: int, inject: bool = False, *, timeout: float = 2.0) -> VirtualMachine:
    """Return the statistics of a running VM, whoever started it.

    The stats files that its VMM holds are borrowed, which the VMM does not notice. QEMU from 8.1 on holds those of its
    vCPUs; what was started by `launch` or under the hold library holds all.

    Parameters
    ----------
    pid : int
        Of the VMM; `find_vms` lists them.
    inject : bool
        Have the VMM's own threads open the files that it does not hold, by ptrace (x86-64). Each thread is stopped for
        a moment, and a system call that it sleeps in ends as by a signal. The files stay open in the VMM, so this is
        needed once for each VM. Read ``docs/attach.md`` before you do this to a VM that matters.
    timeout : float
        Seconds for `inject`.

    Returns
    -------
    VirtualMachine
        With what could be had; ``explain()`` says what could not, and what would get it.

    Raises
    ------
    TypeError, ValueError
        If `pid` cannot be a pid, or `timeout` is not a number above 0.
    VmGoneError
        If there is no such process, or it exits meanwhile.
    AttachError
        If nothing can be had: not permitted, no VM, stats files of other processes only, or a VMM that holds none. The
        message says which of these it is, and what to do, the least intrusive first.
    """
    timeout = check_seconds("timeout", timeout, _LONGEST, zero=False)
    with ExitStack() as opened:
        process = opened.enter_context(hold_process(pid))
        how: Literal["borrow", "inject"] = "borrow"
        trouble = []
        if inject:
            from kvmstats_fast.vmm.inject import open_missing  # noqa: PLC0415 - the last resort

            for one in open_missing(process, timeout=timeout):
                if one.opened:
                    how = "inject"
                if one.error is not None:
                    trouble.append(str(one.error))
        machine = _open(process, how, trouble)
        opened.pop_all()
    return machine


def _open(process: Process, how: Literal["borrow", "inject", "launch"], trouble: Sequence[str]) -> VirtualMachine:
    """Borrow what a VMM holds; the VirtualMachine then owns `process`."""
    listed = list_files(process)
    marks = _mark(process, listed)  # before anything is borrowed, so that a VM made in between is noticed
    with ExitStack() as opened:
        files = borrow(process, listed) if has_vm(listed) else []
        for file in files:
            opened.callback(file.close)
        about = _describe(process, listed)
        process.check_alive()  # so all of that was about the process that is held
        if not files:
            raise _nothing(process, about, listed, trouble)
        machine = VirtualMachine(Watched(process, about.vmm, files, marks), about, how, trouble)
        opened.pop_all()
    return machine


def _mark(process: Process, listed: list[KvmFile]) -> Marks | None:
    try:
        return Marks(process, listed)
    except OSError:  # to be told by borrow, which asks for more
        return None


def _describe(process: Process, listed: list[KvmFile]) -> VmProcess:
    try:
        return describe(process, listed)
    except OSError as error:
        process.check_alive()
        raise refused(f"reading {process.folder}", process.pid, error.errno or 0) from None


def _nothing(process: Process, about: VmProcess, listed: list[KvmFile], trouble: Sequence[str]) -> AttachError:
    pid = process.pid
    if not listed:
        return AttachError(
            errno.ENOENT, f"process {pid} has no VM: none of its files is one of KVM. `kvmstats list` shows who has one"
        )
    if not has_vm(listed):
        return AttachError(
            errno.ENOENT,
            f"{printable(about.vmm)} (process {pid}) has no VM: it has stats files open, but neither a VM nor a vCPU. "
            "So they come from another process, as those of a monitor do: attach to that; `kvmstats list` shows it",
        )
    if trouble:
        return AttachError(
            errno.ENODATA,
            f"no stats file of process {pid} could be opened: {'; '.join(trouble)}. What helps, the least intrusive "
            f"first: {_advise(process, inject=False)}",
        )
    return AttachError(
        errno.ENODATA,
        f"{printable(about.vmm)} (process {pid}) holds no stats files, and the kernel opens them only for the process "
        f"that made the VM. What helps, the least intrusive first: {_advise(process)}",
    )


def _advise(process: Process, *, inject: bool = True, vcpus: bool = True) -> str:
    return advise(inject=inject and not has_filter(process), vcpus=vcpus, domain=is_domain(process))


def launch(
    argv: Sequence[str | os.PathLike[str]],
    *,
    vcpus: int | None = None,
    timeout: float = 10.0,
    env: Mapping[str, str] | None = None,
    **popen: Any,
) -> VirtualMachine:
    """Start a VMM, and return the statistics of its VM; no privilege is needed.

    It runs under the hold library, which opens the stats file of each VM and vCPU that it makes, and keeps it open.

    Parameters
    ----------
    argv : sequence of str or path
        The VMM, any dynamically linked program, and its arguments.
    vcpus : int, optional
        How many vCPUs to wait for. Default: until there is a VM with a vCPU, and no other one was made for 50 ms.
    timeout : float
        Seconds to wait.
    env, **popen
        Passed on to `subprocess.Popen`.

    Returns
    -------
    VirtualMachine
        Its attribute `process` is the ``Popen``. vCPUs that are made later are added by `refresh`.

    Raises
    ------
    AttachError
        If the program cannot be made to hold its files (it is static, or setuid), before it is started; or if it has
        made no VM, or fewer vCPUs, in `timeout` seconds: then it has been killed.
    VmGoneError
        If it exits before that.
    OSError
        If it cannot be started.
    TypeError, ValueError
        If `vcpus` is not a whole number, 1 or more, or `timeout` is not a number, 0 or more.
    """
    vcpus = None if vcpus is None else check_integer("vcpus", vcpus, 1)
    timeout = check_seconds("timeout", timeout, _LONGEST, zero=True)
    started: list[subprocess.Popen[Any]] = []
    try:
        with ExitStack() as opened:
            popened = hold.start(argv, env=env, started=started, **popen)
            process = opened.enter_context(hold_process(popened.pid))
            _wait_for_vcpus(process, popened, vcpus, timeout)
            machine = _open(process, "launch", ())
            machine.process = popened
            opened.pop_all()
            return machine
    except BaseException:
        for popened in started:
            popened.kill()
            popened.wait()
            for pipe in (popened.stdin, popened.stdout, popened.stderr):
                if pipe is not None:
                    pipe.close()
        raise


def _wait_for_vcpus(process: Process, popened: subprocess.Popen[Any], vcpus: int | None, timeout: float) -> None:
    """Return when a VMM that is starting holds the files of its vCPUs."""
    deadline = time.monotonic() + timeout
    seen, since = 0, time.monotonic()
    while True:
        status = popened.poll()
        if status is not None:
            raise VmGoneError(errno.ESRCH, f"{popened.args!r} {_say_exit(status)} before it had made a VM")
        made, held = _count_vcpus(process)
        now = time.monotonic()
        if held != seen:
            seen, since = held, now
        if seen >= vcpus if vcpus is not None else seen > 0 and now - since >= _SETTLED:
            return
        if now >= deadline:
            if made > seen:
                what = f"{made} vCPUs, of which it holds the stats files of {seen},"
                hint = (
                    "Does a wrapper keep the hold library from it (LD_PRELOAD cleared, another root directory)? Is its "
                    "`ulimit -n` not 512 above its number of files? Is the kernel older than 5.14?"
                )
            else:
                what = f"{seen} of {vcpus} vCPUs" if vcpus else "no VM with a vCPU"
                hint = "Does it use KVM (QEMU: -accel kvm), and in this process, not in one that it starts?"
            raise AttachError(
                errno.ETIMEDOUT,
                f"{popened.args!r} (process {popened.pid}) has made {what} in {timeout} s, and was killed. {hint}",
            )
        time.sleep(_POLL)


def _count_vcpus(process: Process) -> tuple[int, int]:
    """Return how many vCPUs there are, and of how many the file is held: some VMMs have two of each."""
    try:
        files = process.kvm_files()
    except OSError:  # it is about to end, or not to be seen yet
        return 0, 0
    vcpus = Counter(vcpus_of(process, files))
    held = Counter(file.vcpu_id for file in files if file.is_stats and file.vcpu_id is not None)
    return vcpus.total(), (held & vcpus).total()


def _say_exit(status: int) -> str:
    if status == 0:
        return "exited with status 0 (one that goes into the background, as by -daemonize: find_vms shows its pid)"
    if status > 0:
        return f"exited with status {status}"
    hint = " (a seccomp filter that does not know KVM_GET_STATS_FD?)" if -status == signal.SIGSYS else ""
    return f"was killed by signal {-status}{hint}"
