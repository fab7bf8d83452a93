"""How much memory a run may take: made-up machines, and real limits."""

import os
import resource
import subprocess
import sys

import pytest

import kvmstats_fast as kf
from kvmstats_fast.sampling import memory
from kvmstats_fast.sampling.memory import Memory
from kvmstats_fast.testing import SyntheticStats

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path):
    """A function that writes files below an empty root, and returns what is available there."""

    def write(files, root=tmp_path):
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Memory(root).available()

    return write


MEMINFO = {"proc/meminfo": "MemTotal:  8388608 kB\nMemFree: 1024 kB\nMemAvailable:    4194304 kB\n"}
MOUNT = "30 24 0:26 {root} {point} rw,nosuid shared:9 - {kind} {kind} {options}\n"


def v2(path="/a/b", root="/", point="/sys/fs/cgroup"):
    """The files by which a process finds its cgroup of version 2."""
    return MEMINFO | {
        "proc/self/cgroup": f"1:name=systemd:/x\n0::{path}\n",
        "proc/self/mountinfo": MOUNT.format(root=root, point=point, kind="cgroup2", options="rw,nsdelegate"),
    }


def v1(path="/a/b", root="/", point="/sys/fs/cgroup/memory"):
    """The same for version 1, beside other controllers."""
    mounts = MOUNT.format(root="/", point="/sys/fs/cgroup/cpu", kind="cgroup", options="rw,cpu")
    mounts += MOUNT.format(root=root, point=point, kind="cgroup", options="rw,memory")
    return MEMINFO | {"proc/self/cgroup": f"4:cpu:/y\n3:memory,hugetlb:{path}\n0::/\n", "proc/self/mountinfo": mounts}


def group_v2(folder, limit, current, cache=0, high="max"):
    """The files of a cgroup of version 2."""
    stat = f"anon 7\nfile 99999999999\nactive_file {cache // 2}\ninactive_file {cache - cache // 2}\n"
    names = ("memory.max", "memory.high", "memory.current", "memory.stat")
    return {f"{folder}/{name}": f"{text}\n" for name, text in zip(names, (limit, high, current, stat), strict=True)}


def group_v1(folder, limit, usage, cache=0):
    """The files of a cgroup of version 1."""
    stat = f"active_file 1\ninactive_file 1\ntotal_active_file {cache}\ntotal_inactive_file 0\n"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{folder}/{name}": f"{text}\n" for name, text in zip(names, (limit, usage, stat), strict=True)}


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        (MEMINFO, 4096),
        ({"proc/meminfo": "MemTotal: 5 kB\n"}, None),
        (v2(), 4096),
        (v2() | group_v2(f"{V2}/a/b", 200 * MIB, 50 * MIB), 150),
        (v2() | group_v2(f"{V2}/a/b", 200 * MIB, 190 * MIB, cache=100 * MIB), 110),
        (v2() | group_v2(f"{V2}/a/b", "max", 50 * MIB), 4096),
        (v2() | group_v2(f"{V2}/a/b", "max", 50 * MIB, high=80 * MIB), 30),
        (v2() | group_v2(f"{V2}/a/b", 200 * MIB, 300 * MIB), 0),
        (v2() | group_v2(f"{V2}/a/b", "max", 0) | group_v2(f"{V2}/a", 90 * MIB, 60 * MIB), 30),
        (v2() | group_v2(f"{V2}/a/b", 70 * MIB, 0) | group_v2(f"{V2}/a", 90 * MIB, 60 * MIB), 30),
        (v2() | group_v2(f"{V2}/a/b", 20 * MIB, 0) | group_v2(f"{V2}/a", 90 * MIB, 60 * MIB), 20),
        (v2() | group_v2(V2, 90 * MIB, 60 * MIB), 30),
        (v2("/", "/") | group_v2(V2, 90 * MIB, 60 * MIB), 30),
        (v2("/../../up") | group_v2(V2, 90 * MIB, 60 * MIB), 30),
        (v2("/docker/c", "/docker/c") | group_v2(V2, 90 * MIB, 60 * MIB), 30),
        (v2("/docker/c", "/elsewhere") | group_v2(V2, 90 * MIB, 60 * MIB), 30),
        (v2(point=r"/sys/my\040cgroup") | group_v2("sys/my cgroup/a/b", 90 * MIB, 60 * MIB), 30),
        (v2() | group_v2(f"{V2}/a/b", "a lot", 60 * MIB), 4096),
        (v2() | group_v2(f"{V2}/a/b", -1, 60 * MIB), 4096),
        (v2() | group_v2(f"{V2}/a/b", 90 * MIB, ""), 4096),
        (v2() | group_v2(f"{V2}/a/b", "1" * 5000, 60 * MIB), 4096),
        (v1() | group_v1(f"{V1}/a/b", 200 * MIB, 50 * MIB), 150),
        (v1() | group_v1(f"{V1}/a/b", 200 * MIB, 190 * MIB, cache=100 * MIB), 110),
        (v1() | group_v1(f"{V1}/a/b", 9223372036854771712, 50 * MIB), 4096),
        (v1() | group_v1(f"{V1}/a/b", 9223372036854771712, 0) | group_v1(f"{V1}/a", 90 * MIB, 60 * MIB), 30),
        (v1() | group_v1(V1, 90 * MIB, 60 * MIB), 30),
        (v1("/docker/c", "/docker/c") | group_v1(V1, 90 * MIB, 60 * MIB), 30),
        (v1() | {"proc/meminfo": "nothing\n"} | group_v1(f"{V1}/a/b", 90 * MIB, 60 * MIB), 30),
        (
            MEMINFO | {"proc/self/cgroup": "nonsense\n::::\n0::\n", "proc/self/mountinfo": "x\n - \n1 2 3 4 5 - a\n"},
            4096,
        ),
    ],
)
def test_the_least_of_machine_and_cgroups_is_available(tree, files, available):
    """MemAvailable, the process' cgroups and all above them, of either version; what makes no sense is left out."""
    assert tree(files) == (None if available is None else available * MIB)


def test_this_machine_has_some_memory():
    """On the real /proc the answer is of the order of what the machine has."""
    available = Memory().available()
    if available is None:
        pytest.skip("nothing here says how much memory is available")
    assert 0 < available < 1 << 50
    memory.check_memory(available // 2, 1)
    with pytest.raises(MemoryError, match=rf"7 sweeps .* {2 * available >> 20} MiB, and \d+ MiB are available"):
        memory.check_memory(2 * available, 7)


def test_without_any_source_nothing_is_refused(monkeypatch, tmp_path):
    """The check is advice: where it cannot be had, runs and streams go on without it."""
    monkeypatch.setattr(memory, "Memory", lambda: Memory(tmp_path))
    memory.check_memory(1 << 60, 1)
    with SyntheticStats() as made, made.open() as file:
        sampler = kf.Sampler([file])
        assert len(sampler.run(0, count=5000)) == 5000
        assert len(sampler.run(0, count=5000, duration=60)) == 5000


class Shrinking:
    """Memory of which there is less and less."""

    def __init__(self):
        self.left = 100 * MIB

    def available(self):
        """Return less than before."""
        self.left -= 5 * MIB
        return self.left


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"interval": 0, "duration": 60}])
def test_a_run_without_end_ends_with_its_samples_when_memory_runs_short(monkeypatch, arguments):
    """Before the kernel kills the process, the samples come back as interrupted, with one warning that says why."""
    monkeypatch.setattr(memory, "Memory", Shrinking)
    with SyntheticStats() as made, made.open() as file:
        sampler = kf.Sampler([file])
        with pytest.warns(kf.SamplingWarning, match=r"because memory ran short: .*stream\(\)") as caught:
            samples = sampler.run(**arguments)
        assert [warning.filename for warning in caught] == [__file__]
        assert samples.interrupted
        assert samples.tick.tolist() == list(range(len(samples)))
        assert len(sampler.run(0, count=3)) == 3


@pytest.mark.filterwarnings("error::kvmstats_fast.SamplingWarning")
def test_where_warnings_are_errors_the_samples_are_in_the_error(monkeypatch):
    """Nothing is lost: the exception has what was sampled."""
    monkeypatch.setattr(memory, "Memory", Shrinking)
    with SyntheticStats() as made, made.open() as file:
        with pytest.raises(kf.SamplingWarning) as caught:
            kf.Sampler([file]).run(0)
        assert len(caught.value.samples) > 0
        assert caught.value.samples.interrupted


#: Samples in a child for each amount of room that is named.
LIMITED = """
import os, resource, sys
import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

made = SyntheticStats()
file = made.open()
sampler = kf.Sampler([file], threads={threads})

def attempt(room):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room,) * 2)
    try:
        if {stream}:
            with sampler.stream(0, chunk=10, count=20) as stream:
                sweeps = sum(len(part) for part in stream)
        else:
            sweeps = len(sampler.run(0, count=20))
        print(sweeps == 20, flush=True)
    except MemoryError:
        print("MemoryError", flush=True)
    os._exit(0)

for room in sys.argv[1:]:
    pid = os.fork() or attempt(int(room))
    assert os.waitpid(pid, 0)[1] == 0, room
"""


@pytest.mark.measures_memory
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_under_a_limit_of_memory_a_run_is_right_or_a_memory_error(threads, stream):
    """However little room is left, also for the stacks of the threads: no hang, no other error, no wrong result."""
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        pytest.skip("RLIMIT_AS is limited already")
    code = LIMITED.format(threads=threads, stream=stream)
    rooms = [str(room << 10) for room in (0, 64, 512, 4096, 8400, 9000, 17000, 40000, 200_000)]
    command = [sys.executable, "-c", code, *rooms]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # else a child has the stacks of its parent's threads
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert len(outcomes) == len(rooms)
    assert set(outcomes) == {"MemoryError", "True"}
    assert outcomes[-1] == "True"
