"""Roster: the VMs of this host that are attached to, while they come and go."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast._arguments import article, check_seconds
from kvmstats_fast._resource import Closing
from kvmstats_fast.errors import KvmStatsError, VmGoneError
from kvmstats_fast.file_info import MOST_NAME
from kvmstats_fast.vmm.borrow import hold_process
from kvmstats_fast.vmm.find import has_vm, is_called, list_pids, look_at, may_attach
from kvmstats_fast.vmm.machine import LONGEST, attach
from kvmstats_fast.vmm.proc import Process, is_own

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.find import VmProcess
    from kvmstats_fast.vmm.machine import VirtualMachine
    from kvmstats_fast.vmm.proc import KvmFile


class _Followed(NamedTuple):
    """A VM that is attached to; and its VMM's files of KVM, from before the last time that this was looked at."""

    machine: VirtualMachine
    label: str
    listed: list[KvmFile] | None


#: What refusals are counted by.
REASONS = ("not_permitted", "no_stats_files", "no_vm", "shared_vm", "too_many_open_files", "other")
_REASONS = {
    errno.EPERM: "not_permitted",
    errno.EACCES: "not_permitted",
    errno.ENODATA: "no_stats_files",
    errno.ENOENT: "no_vm",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
}


class Refusal(NamedTuple):
    """Why a VM cannot be attached to, or not anew: in words, and as one of `REASONS`."""

    why: str
    reason: str

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Return what an error of `attach` or `VirtualMachine.refresh` says."""
        number = getattr(error, "errno", None) or 0
        return cls(str(getattr(error, "strerror", None) or error), _REASONS.get(number, "other"))


class _TurnedDown(NamedTuple):
    """A process that could not be attached to: how it was then, why, and by whose VM if that is the reason."""

    state: tuple[object, ...]
    refusal: Refusal
    owner: int | None


class Roster(Closing):
    """The VMs that are attached to, of those that are wanted; used with ``with``.

    A VM keeps its label as long as it is attached to, also if it is made anew in the same process. The label is the
    guest's name, or ``"pid 123"``; followed by the pid if another VM has it at the time.

    Parameters
    ----------
    names : str, int, iterable of these, or None
        Globs of guests' names, pids of VMMs; None: all VMs. A pid is the process that has it where the block begins.
    inject, timeout
        As for `attach`.

    Attributes
    ----------
    refusals : dict of int to Refusal
        Pids of the VMMs that cannot be attached to, or not anew, and why; as of the last `update`.
    """

    def __init__(self, names: str | int | Iterable[str | int] | None, *, inject: bool, timeout: float) -> None:
        self._globs, self._pids = _check_names(names)
        self._wants_all = names is None
        self._inject = inject
        self._timeout = check_seconds("timeout", timeout, LONGEST, zero=False)
        self._held: dict[int, Process] = {}  # those given by their pid
        self._followed: dict[int, _Followed] = {}
        self._leaving: list[VirtualMachine] = []
        self._turned_down: dict[int, _TurnedDown] = {}
        #: Processes without a VM that is wanted, and how they were then. One without any VM has none until it runs.
        self._passed_over: dict[int, tuple[object, ...]] = {}
        self.refusals: dict[int, Refusal] = {}

    def __enter__(self) -> Self:
        """Hold the processes that were given by their pid; the errors are those of `attach`."""
        with ExitStack() as opened:
            for pid in self._pids:
                self._held[pid] = opened.enter_context(hold_process(pid))
            opened.pop_all()
        return self

    @property
    def machines(self) -> dict[str, VirtualMachine]:
        """What is attached to, by label; also for another thread than the one that looks at the host."""
        return {one.label: one.machine for one in list(self._followed.values())}

    @property
    def refused(self) -> dict[int, str]:
        """Why VMMs cannot be attached to, in words, by pid."""
        return {pid: refusal.why for pid, refusal in self.refusals.items()}

    @property
    def has_ended(self) -> bool:
        """Whether nothing can come: pids alone were given, and all of these processes have ended."""
        pids_alone = not self._wants_all and not self._globs
        return pids_alone and not self._followed and all(process.ended for process in self._held.values())

    def files(self) -> dict[str, list[StatsFile]]:
        """Return the files that are open, by label.

        Of a process with several VMs nothing says which file is of which VM, and each has a label of its own.
        """
        found: dict[str, list[StatsFile]] = {}
        for machine, label, _ in self._followed.values():
            kinds = Counter((file.kind, file.vcpu_id) for file in machine)
            if max(kinds.values(), default=0) == 1:
                found[label] = [file for file in machine if not file.closed]
            else:
                for index, file in enumerate(machine):
                    if not file.closed:
                        ending = f" (file {index})"
                        found[_unlike(found, label + ending, ending)] = [file]
        return {label: files for label, files in found.items() if files}

    def update(self, meanwhile: Callable[[], None]) -> None:
        """Look at the host: take up VMs and vCPUs that came, let go of those that went.

        Files of VMs that went stay open until `settle`, because a run may be reading them.

        Parameters
        ----------
        meanwhile : callable
            Called after each process, because a host may have many.

        Raises
        ------
        OSError
            If /proc cannot be read.
        """
        pids = list_pids() if self._wants_all or self._globs else list(self._held)
        own = is_own("/proc")  # of another pid namespace nothing is attachable
        refused: dict[int, Refusal] = {}
        found: dict[int, VmProcess] = {}
        for pid in self._followed.keys() - set(pids):
            self._look_again(Process(pid, own=own), refused)
        for pid in pids:
            process = Process(pid, own=own)
            if pid in self._followed:
                self._look_again(process, refused)
            if pid not in self._followed and pid != os.getpid() and (about := self._look_at(process)) is not None:
                found[pid] = about
            meanwhile()
        for about in found.values():
            self._take_up(about, refused)
            meanwhile()
        for pid, process in self._held.items():
            if pid not in found and pid not in self._followed and not process.ended:
                why = "it is this process" if pid == os.getpid() else may_attach(pid)
                none = Refusal("it has no VM; if it makes one, that is followed", "no_vm")
                refused[pid] = Refusal(why, "not_permitted") if why else none
        self._turned_down = {pid: one for pid, one in self._turned_down.items() if pid in found}
        self._passed_over = {pid: self._passed_over[pid] for pid in self._passed_over.keys() & set(pids)}
        self.refusals = refused

    def _look_at(self, process: Process) -> VmProcess | None:
        """Describe a process that has a VM which is wanted."""
        pid = process.pid
        before = self._passed_over.pop(pid, None)
        state: tuple[object, ...] | None = process.activity()  # first: what comes in between is seen the next time
        if state is None or state != before:
            files = None
            with suppress(OSError):  # it has ended, or guards itself
                files = process.kvm_files()
                if has_vm(files):
                    state = (process.start_time(), files)
            if files is None or (has_vm(files) and state != before):
                about = look_at(process).vms
                if about is not None and self._wants(about):
                    return about
        if state is not None:
            self._passed_over[pid] = state
        return None

    def _wants(self, about: VmProcess) -> bool:
        if self._wants_all or any(is_called(about, glob) for glob in self._globs):
            return True
        process = self._held.get(about.pid)
        return process is not None and not process.ended

    def _look_again(self, process: Process, refused: dict[int, Refusal]) -> None:
        """Refresh what is attached to if it is not as it was; let go of it if it has no VM any more."""
        pid = process.pid
        one = self._followed[pid]
        listed = None
        try:
            with suppress(OSError):  # it has ended, or guards itself by now
                listed = process.kvm_files()
            if one.machine.alive and one.machine.look() and listed == one.listed:
                return
            one.machine.refresh(self._inject, timeout=self._timeout)
        except VmGoneError:
            self._let_go(pid)
        except (KvmStatsError, OSError) as error:
            refused[pid] = Refusal.of(error)  # what is had can be read on
        else:
            self._followed[pid] = one._replace(listed=listed)
            if not one.machine.files or not has_vm(listed or []):
                self._let_go(pid)

    def _take_up(self, about: VmProcess, refused: dict[int, Refusal]) -> None:
        """Attach to a VMM, unless that was in vain when it was last like this."""
        pid = about.pid
        state: tuple[object, ...] = (about.start_time, about.attachable, about.vms, about.vcpus, about.held)
        before = self._turned_down.get(pid)
        if not about.attachable:
            if not _has_ended(pid):
                refused[pid] = Refusal(about.why_not, "not_permitted")
        elif before is not None and before.state == state and (before.owner is None or before.owner in self._followed):
            refused[pid] = before.refusal
        else:
            owner = listed = None
            with suppress(OSError):  # as attach will say
                listed = Process(pid).kvm_files()
            try:
                with ExitStack() as opened:
                    machine = opened.enter_context(attach(pid, self._inject, timeout=self._timeout))
                    if machine.about.start_time != about.start_time:  # another process by now
                        return
                    if (owner := self._find_owner(machine)) is None:
                        self._followed[pid] = _Followed(machine, self._choose_label(about), listed)
                        opened.pop_all()
                        return
                why = f"its VM is that of process {owner}: it was forked from that, or takes its statistics"
                refusal = Refusal(why, "shared_vm")
            except VmGoneError:
                return
            except (KvmStatsError, OSError) as error:
                refusal = Refusal.of(error)
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                    state = ()  # whoever closes files, the next attempt may do better
            refused[pid] = refusal
            self._turned_down[pid] = _TurnedDown(state, refusal, owner)

    def _find_owner(self, machine: VirtualMachine) -> int | None:
        """Return which other process made the VM, None if this one did; let go of one that is in its place."""
        for pid, other in list(self._followed.items()):
            if machine.shares_vm(other.machine):
                if _has_made_vm(other.machine.about, machine.about):
                    return pid
                self._let_go(pid)
        return None

    def _choose_label(self, about: VmProcess) -> str:
        name = about.name[:MOST_NAME].encode("utf-8", "backslashreplace").decode()  # no table or file takes surrogates
        return _unlike(self.machines, name or f"pid {about.pid}", f" (pid {about.pid})")

    def _let_go(self, pid: int) -> None:
        self._leaving.append(self._followed[pid].machine)
        del self._followed[pid]

    def settle(self) -> None:
        """Close the files of VMs that went: nobody reads them any more."""
        while self._leaving:
            self._leaving[-1].close()
            self._leaving.pop()

    def close(self) -> None:
        """Let go of all VMs."""
        with ExitStack() as closing:
            for process in self._held.values():
                closing.callback(process.close)
            for machine, _, _ in self._followed.values():
                closing.callback(machine.close)
            closing.callback(self.settle)


def _check_names(names: str | int | Iterable[str | int] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the globs and the pids among `names`."""
    wanted = "it must be a name or glob of guests, a pid, or several of these"
    if names is None:
        return (), ()
    if isinstance(names, (bytes, bytearray)) or not isinstance(names, (str, int, Iterable)):
        raise TypeError(f"names is {article(names)}; {wanted}")
    several = [names] if isinstance(names, (str, int)) else list(names)
    if not several:
        raise ValueError("names is empty; leave it out to follow all VMs")
    for one in several:
        if isinstance(one, bool) or not isinstance(one, (str, int)):
            raise TypeError(f"names has {article(one)}; {wanted}")
        if one == "":
            raise ValueError("names has an empty name; a VM without a name is followed by the pid of its VMM")
    return tuple(one for one in several if isinstance(one, str)), tuple(one for one in several if isinstance(one, int))


def _has_ended(pid: int) -> bool:
    try:
        with Process.hold(pid) as process:
            return process.ended
    except OSError as error:
        return error.errno == errno.ESRCH


def _has_made_vm(one: VmProcess, other: VmProcess) -> bool:
    """Return whether the first of two processes that have the same VM open has made it.

    A monitor holds the process whose files it takes, also while it has a VM's fd for a moment, to mark it (`Marks`). A
    forked child is younger than its parent.
    """
    if one.pid in Process(other.pid).held_pids():
        return True
    if other.pid in Process(one.pid).held_pids():
        return False
    return (one.start_time, one.pid) < (other.start_time, other.pid)


def _unlike(taken: Iterable[str], label: str, ending: str) -> str:
    """Return a label that is not taken yet."""
    while label in taken:
        label += ending
    return label
