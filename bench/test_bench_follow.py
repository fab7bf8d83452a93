"""What looks at the host cost a follow: processor time, and ticks."""

import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import table
from nursery import Nursery

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, exit_counter
from kvmstats_fast.vmm.find import list_pids
from kvmstats_fast.vmm.roster import Roster

PROCESSES, VMS, VCPUS, FILES = 200, 20, 4, 30
ROUNDS, SECONDS = 9, 2
NEVER = 1e6

#: Processes that do nothing, with as many files as an ordinary one.
_CROWD = """
import os, signal, sys
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
pids = []
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if not pid:
        signal.pause()
    pids.append(pid)
print("ready", flush=True)
sys.stdin.read()
for pid in pids:
    os.kill(pid, signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def host():
    """A host of 200 processes, of which 20 have a VM of 4 vCPUs each; the name of their guests."""
    try:
        exit_counter()
    except KvmUnavailableError as error:
        pytest.skip(f"no real VM: {error.strerror}")
    with ExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        for _ in range(VMS):
            nursery.bear(VCPUS)
        missing = max(PROCESSES - len(list_pids()) - 1, 0)
        command = [sys.executable, "-S", "-c", _CROWD, str(missing), str(FILES)]
        crowd = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert crowd.stdout.readline() == "ready\n"
        yield nursery


def cost(call, loops):
    """The processor time of a call, of this thread, in ns."""
    start = time.thread_time_ns()
    for _ in range(loops):
        call()
    return (time.thread_time_ns() - start) / loops


def test_look(benchmark, host):
    """Processor time of a look at a host on which nothing has changed, and of taking up a VM."""
    title = f"a look at {len(list_pids())} processes, {VMS} of them with a VM of {VCPUS} vCPUs: processor time"
    with Roster(host.name, inject=False, timeout=2.0) as roster:
        roster.update(lambda: None)
        assert len(roster.machines) == VMS
        table.compare_timers(
            benchmark,
            title,
            {
                "a look": (lambda: cost(lambda: roster.update(lambda: None), 3), None),
                "find_vms()": (lambda: cost(kf.find_vms, 3), None),
                "attach and close one VM": (lambda: cost(lambda: kf.attach(host.alive[0]).close(), 3), None),
            },
        )
    benchmark.pedantic(lambda: None, rounds=1)


def test_missed(benchmark, host):
    """Ticks missed at 1 kHz with looks each second, ten times a second, and without any; in turn."""
    ways = {"no looks": NEVER, "a look a second": 1.0, "ten looks a second": 0.1}
    missed = {label: [] for label in ways}
    for number in range(ROUNDS):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for label in order:
            with kf.follow(host.name, 0.001, rescan=ways[label], duration=SECONDS) as chunks:
                for _ in chunks:
                    pass
            missed[label].append(chunks.missed / SECONDS)
    title = f"ticks of 1000 a second that {VMS} VMs of {VCPUS} vCPUs miss, {ROUNDS} times {SECONDS} s in turn"
    for label, values in missed.items():
        more = statistics.median(value - none for value, none in zip(values, missed["no looks"], strict=True))
        text = f"median {statistics.median(values):.1f}, {min(values):.1f} to {max(values):.1f}"
        table.add(title, label, None, verdict=f"{text}; {more:+.1f} against no looks")
    benchmark.pedantic(lambda: None, rounds=1)


def test_change(benchmark, host):
    """Ticks missed at 1 kHz in the second in which a VM comes, and in one in which none does; in turn."""
    seconds = {"a VM comes": [], "none comes": []}
    for _ in range(ROUNDS):
        with kf.follow(host.name, 0.001, rescan=0.2, chunk=100) as chunks:
            for label, values in seconds.items():
                if label == "a VM comes":
                    host.bear(VCPUS)
                before = chunks.missed
                for x in chunks:
                    if x.tick[-1] % 1000 >= 900:
                        break
                values.append(chunks.missed - before)
        host.kill(host.alive[-1])
    title = f"ticks of 1000 missed in a second, {VMS} VMs of {VCPUS} vCPUs, {ROUNDS} times in turn"
    for label, values in seconds.items():
        text = f"median {statistics.median(values):.1f}, {min(values)} to {max(values)}"
        table.add(title, label, None, verdict=text)
    benchmark.pedantic(lambda: None, rounds=1)
