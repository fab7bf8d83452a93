"""What vCPUs that share a processor do with their time, as this package and as a plain reader of /proc have it.

    python bench/time_shares.py [SECONDS]       # 5; as root, so that what else runs here matters little

Two vCPUs that never sleep are kept on one processor: of two TinyGuests, and of one QEMU. Each should run half of the
time and wait for the other half. Then the second vCPU of a QEMU halts for good. The vCPUs run at nice -20; what others
take of their processor is missing from both, and /proc says how much it was.
"""

import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from holder import Holder
from qemu import Qmp, arguments, firmware
from test_sched import SPIN, schedstat

import kvmstats_fast as kf

SHARES = ("running", "polling", "halted", "steal", "other")
#: The last one, so that the interrupts of the first, and this process, are elsewhere.
CPU = max(os.sched_getaffinity(0))


def start_guests(stack):
    """Two processes with a VM of one vCPU."""
    holders = [stack.enter_context(Holder(1, before=SPIN)) for _ in range(2)]
    return [stack.enter_context(kf.attach(holder.pid)) for holder in holders]


def start_qemu(stack, *, spin):
    """A QEMU with two vCPUs."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    command, path = arguments(folder, *firmware(folder, spin=spin), vcpus=2)
    process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    stack.callback(process.kill)
    stack.callback(Qmp(path, process).close)
    return [stack.enter_context(kf.attach(process.pid, inject=True))]


def show(title, machines, seconds):
    """Keep all vCPUs on one processor and print how they spend their time there."""
    tids = [(machine.pid, tid) for machine in machines for tid in machine.threads.values()]
    for _, tid in tids:
        os.sched_setaffinity(tid, {CPU})
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, tid, -20)
    time.sleep(0.5)
    sampler = kf.Sampler(machines, sched=True)
    began, before = time.monotonic(), [schedstat(*tid) for tid in tids]
    x = sampler.run(0.01, duration=seconds)
    elapsed, after = time.monotonic() - began, [schedstat(*tid) for tid in tids]
    shares = {name: x.figures()[f"{name}_share"].values for name in SHARES}
    print(f"\n{title}, {x.elapsed:.2f} s")
    print("vCPU", *(f"{name:>8}" for name in SHARES), "     sum   /proc: run   wait")
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        row = [shares[name][place] for name in SHARES]
        proc = [(new[part] - old[part]) / 1e9 / elapsed for part in (0, 1)]
        print(f"{place:4}", *(f"{one:8.3f}" for one in (*row, sum(row))), f"   {proc[0]:10.3f} {proc[1]:6.3f}")


def main(seconds):
    """Print a table for each."""
    with suppress(OSError):
        os.setsid()  # a group of the scheduler's for this process and the vCPUs (sched(7), autogroup),
        Path("/proc/self/autogroup").write_text("-20")  # which weighs more than those of others
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors when it began")
    for title, start in (
        ("Two TinyGuests that never sleep", start_guests),
        ("A QEMU, two vCPUs that never sleep", lambda stack: start_qemu(stack, spin=True)),
        ("A QEMU, the second vCPU halts", lambda stack: start_qemu(stack, spin=False)),
    ):
        with ExitStack() as stack:
            show(title, start(stack), seconds)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
