"""The schedstat of each vCPU's thread, opened for a plan; and what is said where there is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import printable
from kvmstats_fast.errors import SamplingWarning, warn_caller
from kvmstats_fast.handle import ThisProcess
from kvmstats_fast.schedstat import Schedstat
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.threads import find_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvmstats_fast.stats_file import StatsFile

_UNKNOWN = "nothing tells which thread of process {pid} runs it (see VirtualMachine.threads)"
_NO_PROCESS = "the process that it belongs to is not known: attach() to its VMM"
_ENDED = "thread {tid} of process {pid} has ended"
_NOT_BUILT = "there is no schedstat in /proc/PID/task: this kernel was built without CONFIG_SCHED_INFO"
_SWITCHED_OFF = "this kernel does not count it: boot with `delayacct`, or set the sysctl kernel.task_delayacct to 1"


def open_schedstats(
    files: Sequence[StatsFile], tell: Callable[[str, type[Warning]], object] = warn_caller
) -> dict[StatsFile, Schedstat]:
    """Open the schedstat of each vCPU's thread, as far as there is one; `tell` of those without (default: warn).

    Returns
    -------
    dict
        Each is closed with the StatsFile, or when nobody has it any more.

    Raises
    ------
    OSError
        If one cannot be opened for another reason, such as too many open files.
    VmGoneError
        If a VMM has exited.
    """
    found: dict[StatsFile, Schedstat] = {}
    missing: dict[str, list[StatsFile]] = {}
    for some in _by_process(list(dict.fromkeys(files))):
        pid, threads = _find_threads(some)
        for file in some:
            if file.vcpu_id is None:
                continue
            tid = threads.get(file.vcpu_id)
            if pid is None or tid is None:
                opened: Schedstat | str = _NO_PROCESS if pid is None else _UNKNOWN.format(pid=pid)
            else:
                opened = _open(pid, tid)
            if isinstance(opened, str):
                missing.setdefault(opened, []).append(file)
            else:
                file.handle.attach(opened)
                found[file] = opened
    for why, some in missing.items():
        ids = ", ".join(printable(file.id) for file in some[:3]) + (", ..." if len(some) > 3 else "")
        tell(f"no sched_* statistics of {ids}: {why}", SamplingWarning)
    return found


def _by_process(files: Sequence[StatsFile]) -> list[list[StatsFile]]:
    """Return the files of each VirtualMachine, those of this process, and those of which no more is known."""
    groups: dict[object, list[StatsFile]] = {}
    for file in files:
        owner = file.handle.owner
        groups.setdefault(owner.machine if owner.machine is not None else owner is ThisProcess.owner, []).append(file)
    return list(groups.values())


def _find_threads(files: Sequence[StatsFile]) -> tuple[int | None, Mapping[int, int]]:
    """Return the process of files that belong together, and the threads of its vCPUs; None if it is not known."""
    owner = files[0].handle.owner
    machine: Any = owner.machine
    if machine is not None:
        return machine.pid, machine.threads
    if owner is ThisProcess.owner:
        found = find_threads(Process(os.getpid()), files)
        return os.getpid(), {vcpu_id: thread.tid for vcpu_id, thread in found.items()}
    return None, {}


def _open(pid: int, tid: int) -> Schedstat | str:
    """Open the schedstat of a thread, or return why there is none."""
    try:
        opened = Schedstat.open(pid, tid)
        if any(opened.read()):
            return opened
    except ProcessLookupError:
        return _ENDED.format(pid=pid, tid=tid)
    except FileNotFoundError:
        if not Path(f"/proc/{pid}/task/{tid}").exists():
            return _ENDED.format(pid=pid, tid=tid)
        return _NOT_BUILT
    return _SWITCHED_OFF
