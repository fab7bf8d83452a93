"""launch: a VMM that is started so that it holds its stats files, and the VirtualMachine that it makes."""

from __future__ import annotations

import errno
import signal
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvmstats_fast._arguments import check_integer, check_seconds
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.borrow import hold_process
from kvmstats_fast.vmm.find import vcpus_of
from kvmstats_fast.vmm.machine import LONGEST, open_machine

if TYPE_CHECKING:
    import os
    import subprocess
    from collections.abc import Mapping, Sequence

    from kvmstats_fast.vmm.machine import VirtualMachine
    from kvmstats_fast.vmm.proc import Process

_POLL = 0.01  # s between looks at a VMM that is starting
_SETTLED = 0.05  # s without another vCPU: a VMM makes them one after the other


def launch(
    argv: Sequence[str | os.PathLike[str]],
    *,
    vcpus: int | None = None,
    timeout: float = 10.0,
    env: Mapping[str, str] | None = None,
    **popen: Any,
) -> VirtualMachine:
    """Start a VMM, and return the stats files of its VM; no privilege is needed.

    It runs under the hold library, which opens the stats file of each VM and vCPU that it creates, and keeps it open.

    Parameters
    ----------
    argv : sequence of str or path
        The VMM, any dynamically linked program, and its arguments.
    vcpus : int, optional
        Number of vCPUs to wait for. Default: wait until there is a VM with a vCPU, and no other vCPU was created for 50
        ms.
    timeout : float
        Seconds to wait.
    env, **popen
        Passed on to `subprocess.Popen`.

    Returns
    -------
    VirtualMachine
        Its attribute `process` is the ``Popen``: the caller ends it, and waits for it. `close`, or leaving a ``with``
        block, closes the files only; the VM runs on. `refresh` adds vCPUs that are created later.

    Raises
    ------
    AttachError
        If the program cannot be made to hold its files (it is static, or setuid), before it is started; or if it has
        created no VM, or too few vCPUs, within `timeout` seconds: then it has been killed.
    VmGoneError
        If it exits before that.
    OSError
        If it cannot be started.
    TypeError, ValueError
        If `vcpus` is not a whole number, 1 or more, or `timeout` is not a number, 0 or more.
    """
    vcpus = None if vcpus is None else check_integer("vcpus", vcpus, 1)
    timeout = check_seconds("timeout", timeout, LONGEST, zero=True)
    started: list[subprocess.Popen[Any]] = []
    try:
        with ExitStack() as opened:
            popened = hold.start(argv, env=env, started=started, **popen)
            process = opened.enter_context(hold_process(popened.pid))
            _wait_for_vcpus(process, popened, vcpus, timeout)
            machine = open_machine(process, "launch", ())
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
