"""The stats files of a VM that another program made: attach, and the VirtualMachine that it returns."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from kvmstats_fast._arguments import check_seconds
from kvmstats_fast._resource import Closing
from kvmstats_fast._text import printable
from kvmstats_fast.errors import AttachError
from kvmstats_fast.file_info import MOST_NAME
from kvmstats_fast.vmm.borrow import borrow, by_vcpu, find_known, hold_process, list_files
from kvmstats_fast.vmm.find import VmProcess, advise_on, describe, find_guest, has_vm, say_holds_none
from kvmstats_fast.vmm.mark import Marks
from kvmstats_fast.vmm.refusal import refused
from kvmstats_fast.vmm.threads import find_threads
from kvmstats_fast.vmm.watch import WATCHER, Watched

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.proc import KvmFile, Process
    from kvmstats_fast.vmm.threads import KnownBy, VcpuThread

#: No call may wait longer, in s.
LONGEST = 1e9


class VirtualMachine(Closing):
    """The stats files of a running VM, whoever started it; created by `attach` and `launch`.

    Pass it to a Sampler, ``Sampler(machine)``, alone or with others, ``Sampler([one, another])``. When its VMM exits,
    its files are closed at once, because an open stats file keeps the memory of its VM allocated in the kernel; a run
    goes on with the others, and has a `SampleError` with a `VmGoneError` for each of its files.

    Attributes
    ----------
    pid : int
        Of the VMM.
    vmm, name : str
        The VMM's program, and the name of the guest on its command line (empty: none).
    about : VmProcess
        The VMM as `find_vms` describes it, as of `attach` or the last `refresh`.
    how : {"borrow", "inject", "launch"}
        How its files were obtained.
    vm : StatsFile or None
        The VM's file; None if it is missing, or if the process has several VMs, because nothing says which file
        belongs to which.
    vcpus : tuple of StatsFile
        Those of the vCPUs, by number.
    files : tuple of StatsFile
        All of them.
    process : subprocess.Popen or None
        The VMM, if `launch` started it; the caller must end it and wait for it.
    """

    def __init__(
        self,
        watched: Watched,
        about: VmProcess,
        how: Literal["borrow", "inject", "launch"],
        trouble: Sequence[str],
    ) -> None:
        self.about = about
        self._trouble = trouble
        self._threads: dict[int, VcpuThread] | None = None  # None: nobody has asked
        self._closed = False
        self._stale: list[StatsFile] = []  # of the last refresh; revoked, but their numbers are taken until the next
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
            file.handle.owner = file.handle.owner._replace(pid=self.pid, name=self.name[:MOST_NAME], machine=self)

    @property
    def alive(self) -> bool:
        """Whether the VMM is running."""
        if self._watched.gone is not None:
            return False
        if self._closed:
            raise ValueError(f"this VirtualMachine (process {self.pid}) is closed: attach to it again")
        return not self._watched.process.ended

    @property
    def threads(self) -> dict[int, int]:
        """The thread (tid) that runs each vCPU, by the vCPU's number; only vCPUs whose thread is known.

        Raises
        ------
        VmGoneError
            If the VMM has exited.
        AttachError
            If its directory in /proc is not accessible.

        Notes
        -----
        A thread that is not known now may be known later: a vCPU that never sleeps does not reveal its thread by a
        system call. After this was accessed, `explain` names the vCPUs whose thread is not known.
        """
        return {vcpu_id: thread.tid for vcpu_id, thread in self._find_threads().items()}

    @property
    def threads_known_by(self) -> dict[int, KnownBy]:
        """How the thread of each vCPU in `threads` is known, by the vCPU's number.

        ``"KVM_RUN"``: the thread was seen in this call for the vCPU's fd. ``"name"``: its name says so, such as ``CPU
        0/KVM``, ``fc_vcpu 0`` or ``vcpu0``. ``"id"``: the id of the vCPU's stats file names it, which is right if each
        thread creates the vCPU that it runs, as in QEMU.
        """
        return {vcpu_id: thread.known_by for vcpu_id, thread in self._find_threads().items()}

    def _find_threads(self) -> dict[int, VcpuThread]:
        """Look for the threads that are not known yet, or have ended."""
        self._check_alive()
        process = self._watched.process
        try:
            there, known = process.threads(), self._threads or {}
            known = {vcpu_id: thread for vcpu_id, thread in known.items() if thread.tid in there}
            if any(file.vcpu_id not in known for file in self.vcpus):
                known = find_threads(process, self.files) | known
        except OSError as error:
            process.check_alive()
            raise refused(f"reading {process.folder}/task", self.pid, error.errno or 0) from None
        self._check_alive()  # so all of that was about it
        self._threads = known
        return known

    def look(self) -> bool:
        """Check now, instead of within a second, whether a VM of a running VMM is gone.

        Returns
        -------
        bool
            Whether all files are open; those of a VM that is gone are closed.
        """
        with WATCHER.lock:
            if not self._closed and self._watched.gone is None:
                self._watched.look()
        return not any(file.closed for file in self.files)

    def shares_vm(self, other: VirtualMachine) -> bool:
        """Return whether a VM of this process is one of another process, too: it was forked, or took the VM's fd."""
        return self._watched.shares_vm(other._watched)

    def refresh(self, inject: bool = False, *, timeout: float = 2.0) -> bool:
        """Add vCPUs that were plugged in, and close files that the VMM has closed.

        Parameters
        ----------
        inject, timeout
            As for `attach`: for vCPUs that were plugged in since.

        Returns
        -------
        bool
            Whether anything changed. A Sampler keeps sampling the files it was created with: create a new one then.

        Raises
        ------
        VmGoneError
            If the VMM has exited.
        AttachError
            If the process can no longer be attached to.
        """
        timeout = check_seconds("timeout", timeout, LONGEST, zero=False)
        self._check_alive()
        process = self._watched.process
        if inject:
            opened, self._trouble = _inject(process, timeout)
            self.how = "inject" if opened else self.how
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
                file.handle.owner = file.handle.owner._replace(machine=None)
            # Not those of now: a run may be about to read one, and would read what is opened next under its number.
            for file in self._stale:
                file.close()
            self._stale = stale
            self._watched.watch(sorted([*kept, *fresh], key=by_vcpu), marks)
            self._set(self._watched.files)
            self.about = about
        return bool(fresh or stale)

    def explain(self) -> str:
        """Return what is missing, why, and how to get it; empty if nothing is missing."""
        if self._watched.gone is not None:
            return str(self._watched.gone.strerror)
        lines = list(self._trouble)
        lines += {str(getattr(file.handle.lost, "strerror", "")): None for file in self.files if file.handle.lost}
        machines = sum(file.kind == "vm" for file in self.files)
        have = {file.vcpu_id for file in self.files}
        vms = (self.about.vms or 0) - machines
        vcpus = sorted(set(self.about.vcpus or ()) - have)
        missing = []
        if vms > 0:
            missing.append("the VM's file" if self.about.vms == 1 else f"{vms} VM files")
        if vcpus:
            numbers = ", ".join(map(str, vcpus))
            missing.append(f"vCPU {numbers}'s" if len(vcpus) == 1 else f"those of vCPUs {numbers}")
        if missing:
            lines.append(
                f"{' and '.join(missing)}: {printable(self.vmm)} (process {self.pid}) does not hold "
                f"{'it' if vms + len(vcpus) == 1 else 'them'}. What helps, the least intrusive first: "
                + advise_on(self._watched.process, inject=not self._trouble, vcpus=bool(vcpus))
            )
        asked, threads = self._threads is not None, self._threads or {}
        unknown = [file.vcpu_id for file in self.vcpus if asked and file.vcpu_id not in threads]
        if unknown:
            numbers = f"vCPU {unknown[0]}" if len(unknown) == 1 else f"vCPUs {', '.join(map(str, unknown))}"
            lines.append(
                f"the thread of {numbers}: it was not seen in KVM_RUN and has neither a name that tells (`CPU 0/KVM`; "
                "QEMU: -name debug-threads=on) nor one in the id of its stats file. Look again while the guest is idle"
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
            for file in (*self.files, *self._stale):
                file.close()
                file.handle.owner = file.handle.owner._replace(machine=None)

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._watched.exited()

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


def attach(pid: int | str, inject: bool = False, *, timeout: float = 2.0) -> VirtualMachine:
    """Attach to a running VM, whoever started it, and return its stats files.

    The stats files that its VMM holds are borrowed; the VMM does not notice. QEMU from 8.1 on holds those of its vCPUs;
    a VMM that was started by `launch` or under the hold library holds all.

    Parameters
    ----------
    pid : int or str
        Pid of the VMM, see `find_vms`; or the guest's name, if exactly one VM of the host has it.
    inject : bool
        Make the VMM's own threads open the files that it does not hold, by ptrace (x86-64). Each thread is stopped for
        a moment, and a system call that it sleeps in is interrupted as by a signal. The files stay open in the VMM, so
        this is needed once per VM. Read ``docs/attach.md`` before you do this to a VM that matters.
    timeout : float
        Seconds for `inject`.

    Returns
    -------
    VirtualMachine
        With the files that were obtained; ``explain()`` says what is missing, and how to get it.

    Raises
    ------
    TypeError, ValueError
        If `pid` cannot be a pid or a name, or `timeout` is not a number above 0.
    VmGoneError
        If there is no such process, or it exits meanwhile.
    AttachError
        If no file can be obtained: not permitted, no VM, stats files of other processes only, or a VMM that holds none;
        or if no VM has the name, or several have. The message says which, and what to do, the least intrusive first.
    """
    timeout = check_seconds("timeout", timeout, LONGEST, zero=False)
    with ExitStack() as opened:
        process = opened.enter_context(hold_process(find_guest(pid) if isinstance(pid, str) else pid))
        any_opened, trouble = _inject(process, timeout) if inject else (False, [])
        machine = open_machine(process, "inject" if any_opened else "borrow", trouble)
        opened.pop_all()
    return machine


def _inject(process: Process, timeout: float) -> tuple[bool, list[str]]:
    """Have a VMM open the files that it does not hold; return whether it opened any, and what went wrong."""
    from kvmstats_fast.vmm.inject import open_missing  # noqa: PLC0415 - the last resort

    attempts = open_missing(process, timeout=timeout)
    return any(one.opened for one in attempts), [str(one.error) for one in attempts if one.error is not None]


def open_machine(
    process: Process, how: Literal["borrow", "inject", "launch"], trouble: Sequence[str]
) -> VirtualMachine:
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
            f"first: {advise_on(process, inject=False)}",
        )
    return AttachError(
        errno.ENODATA,
        say_holds_none(process, about.vmm),
    )
