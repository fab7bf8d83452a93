"""Having a running VMM open its stats files: the VMM goes on as before, whatever becomes of whoever asks."""

import ctypes
import errno
import json
import mmap
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers import exit_status, forked, names_thread, refuse_call, stats_fds, until, watchdog
from qemu import HOLDS_VCPUS, Qmp, arguments, firmware, needs_qemu

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import ffi, lib
from kvmstats_fast.errors import AttachError, VmGoneError
from kvmstats_fast.vmm import inject
from kvmstats_fast.vmm.borrow import hold_process
from kvmstats_fast.vmm.inject import Result
from kvmstats_fast.vmm.proc import Process

# The full counts: KVMSTATS_INJECT_ROUNDS=200, some ten minutes.
ROUNDS = int(os.environ.get("KVMSTATS_INJECT_ROUNDS", "6"))
KILLS = max(1, ROUNDS // 10)

TARGET = Path(__file__).parent / "c" / "inject_target.c"
CC = shlex.split(os.environ.get("CC", "gcc"))
STEPS = {
    name.removeprefix("KVMSTATS_STEP_"): step
    for step, name in sorted(ffi.typeof("enum kvmstats_inject_step").elements.items())
    if name != "KVMSTATS_STEP_NONE"
}
MANY_FILES = ["sh", "-c", 'ulimit -n $(ulimit -Hn); exec "$@"', "sh"]
# What the calls that inject_target's threads wait in come back with, by a signal whose handler has SA_RESTART.
RESTARTED = {"futex", "read"}

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="inject.c is for x86-64")
pytestmark = [x86_64, pytest.mark.real_vm]


def status(pid, key):
    """That field of each thread of a process."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = (task / "status").read_text().splitlines()
            found[int(task.name)] = next(line.split()[1] for line in lines if line.startswith(key + ":"))
    return found


def left_alone(pid):
    """No thread is stopped or traced."""
    return until(lambda: not {"t", "T"} & set(status(pid, "State").values())) and set(
        status(pid, "TracerPid").values()
    ) == {"0"}


def borrow(pid, fd):
    """Open another process' fd as a StatsFile."""
    pidfd = os.pidfd_open(pid)
    try:
        got = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)  # pidfd_getfd
        assert got >= 0, os.strerror(ctypes.get_errno())
        return kf.StatsFile(got, closefd=True)
    finally:
        os.close(pidfd)


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A busy host may have no processor for a tracer, or for the thread that it stops, for more than 2 seconds."""
    monkeypatch.setattr(inject, "_PATIENCE", 20)


def open_missing(pid, **options):
    """inject.open_missing, for a pid."""
    with hold_process(pid) as process:
        return inject.open_missing(process, **options)


def vmm_of(pid, seconds=30):
    """The inside of open_missing, ready to use."""
    vmm = inject.Injection(Process.hold(pid), time.monotonic() + seconds)
    vmm.call, vmm.restorer = vmm.find_code()
    return vmm


def ask(vmm, tid, fds, *, in_run=False, **more):
    """Attempt until the thread is met in a call, by a tracer that the machine lets begin in time."""

    def was_met(attempt):
        not_begun = attempt.result == Result.KILLED and inject._STEPS[lib.KVMSTATS_STEP_NONE] in str(attempt.error)
        return attempt.result not in inject._TRANSIENT and not not_begun

    return until(lambda: was_met(a := vmm.attempt(tid, fds, in_run=in_run, **more)) and a)


# ---- QEMU


class Qemu:
    """A QEMU with four vCPUs and its monitor, `qmp`."""

    def __init__(self, folder, *more):
        command, path = arguments(folder, *more)
        self.process = subprocess.Popen([*MANY_FILES, *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid = self.process.pid
        self.qmp = Qmp(path, self.process)
        self.word = self.qmp.word
        until(lambda: sum(not file.is_stats for file in Process(self.pid).kvm_files()) == 5)

    def runs(self):
        """Whether the VM is running."""
        return self.process.poll() is None and self.qmp("query-status")["status"] == "running"

    def close(self):
        """End it."""
        self.qmp.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def qemu(tmp_path, resources):
    """A QEMU whose firmware is starting."""
    machine = Qemu(tmp_path)
    resources.callback(machine.close)
    return machine


@pytest.fixture(scope="module")
def one_qemu(tmp_path_factory):
    """A QEMU for all tests, with that firmware, which is paused."""
    folder = tmp_path_factory.mktemp("qemu")
    machine = Qemu(folder, *firmware(folder))
    try:
        assert until(lambda: machine.word(0x7000), 30)
        machine.qmp("stop")
        yield machine
    finally:
        machine.close()


@pytest.fixture
def busy_qemu(one_qemu):
    """A QEMU whose guest counts at 0x7000 as fast as it can, and at 0x46c the ticks of its clock."""
    one_qemu.qmp("cont")
    yield one_qemu
    one_qemu.qmp("stop")


def counter_of(machine):
    """The stats file of vCPU 0."""
    return borrow(machine.pid, open_missing(machine.pid, timeout=30)[1].stats_fd)


def busiest_thread(machine):
    """That of vCPU 0, which never sleeps: it has run the longest."""
    tasks = Path(f"/proc/{machine.pid}/task").iterdir()
    return int(max(tasks, key=lambda task: int((task / "schedstat").read_text().split()[0])).name)


def print_times(name, ns):
    """Say how long threads stood still."""
    text = f"median {statistics.median(ns) / 1e3:.0f} us, max {max(ns) / 1e3:.0f} us"
    print(f"{name}: {len(ns)} stops, {text}")  # noqa: T201 - for who runs the full counts


@needs_qemu
def test_a_running_qemu_opens_all_files_once(qemu, resources):
    """Each VM and vCPU gets its own file, it reads and counts, and a second call finds them there."""
    results = open_missing(qemu.pid, timeout=30)
    assert [(r.kind, r.vcpu_id) for r in results] == [("vm", None), *(("vcpu", i) for i in range(4))]
    done = [(None, True, Result.DONE)]
    vcpus = [(None, False, None)] if HOLDS_VCPUS else done
    assert [(r.error, r.opened, r.result) for r in results] == done + vcpus * 4
    assert len({r.stats_fd for r in results}) == 5
    assert all((r.stopped_ns > 0) == r.opened for r in results)
    files = [resources.enter_context(borrow(qemu.pid, r.stats_fd)) for r in results]
    assert [(file.kind, file.vcpu_id) for file in files] == [(r.kind, r.vcpu_id) for r in results]
    # QEMU makes each vCPU in the thread that runs it.
    assert HOLDS_VCPUS or all(names_thread(file.id, r.tid) for file, r in zip(files[1:], results[1:], strict=True))
    before = files[1].snapshot()["exits"]
    assert until(lambda: files[1].snapshot()["exits"] > before)
    assert qemu.runs()
    assert left_alone(qemu.pid)
    again = open_missing(qemu.pid, timeout=30)
    assert [(r.stats_fd, r.opened, r.error, r.stopped_ns) for r in again] == [
        (r.stats_fd, False, None, 0) for r in results
    ]


@needs_qemu
def test_attach_has_them_opened(qemu):
    """attach(pid, inject=True) has all files of a VMM that held none, and a plain attach has them from then on."""
    with kf.attach(qemu.pid, inject=True, timeout=30) as machine:
        assert machine.how == "inject"
        assert [(file.kind, file.vcpu_id) for file in machine.files] == [("vm", None), *(("vcpu", i) for i in range(4))]
    with kf.attach(qemu.pid) as machine:
        assert machine.how == "borrow"
        assert len(machine.files) == 5
    assert qemu.runs()


@needs_qemu
def test_the_same_qemu_again_and_again(busy_qemu, resources):
    """However often it is asked, the VM stays running, its clock and counters go on, and no thread stays stopped."""
    vm, *vcpus = ([], [], [], [], [])
    counter = resources.enter_context(counter_of(busy_qemu))
    ticks, exits = busy_qemu.word(0x46C), counter.snapshot()["exits"]
    for _ in range(ROUNDS):
        count = busy_qemu.word(0x7000)
        vmm = inject.Injection(Process.hold(busy_qemu.pid), time.monotonic() + 30)
        subjects, held = vmm.look()
        for i, result in enumerate(vmm.open(subjects).values()):
            assert result.error is None
            assert result.stats_fd not in {file.fd for file in held}
            (vm, *vcpus)[i].append(result.stopped_ns)
        assert busy_qemu.runs()
        assert left_alone(busy_qemu.pid)
        assert until(lambda count=count: busy_qemu.word(0x7000) != count)
    assert until(lambda: busy_qemu.word(0x46C) > ticks)
    assert counter.snapshot()["exits"] > exits
    for name, stops in zip(["VM", *(f"vCPU {i}" for i in range(4))], (vm, *vcpus), strict=True):
        print_times(name, stops)


@needs_qemu
def test_fresh_qemus(tmp_path):
    """A QEMU is asked as soon as it has its vCPUs, while the firmware starts, and goes on."""
    stops = []
    for _ in range(max(2, ROUNDS // 2 if ROUNDS < 100 else ROUNDS)):
        machine = Qemu(tmp_path)
        try:
            results = open_missing(machine.pid, timeout=30)
            assert [r.error for r in results] == [None] * 5
            stops += [r.stopped_ns for r in results]
            with borrow(machine.pid, results[1].stats_fd) as file:
                before = file.snapshot()["exits"]
                assert until(lambda file=file, before=before: file.snapshot()["exits"] > before)
            assert machine.runs()
            assert left_alone(machine.pid)
        finally:
            machine.close()
    print_times("all", stops)


def kill_once(machine, counter, *, in_run, tid, step):
    """Kill the tracer of a thread behind that step, look whether all is well, and ask again."""
    vmm = vmm_of(machine.pid)
    subject = vmm.look()[0][in_run]
    before = vmm.held_now(subject)

    def new():
        return len(vmm.held_now(subject) - before)

    killed = ask(vmm, tid, subject.fds, in_run=in_run, kill_after=step)
    assert killed.result == Result.KILLED
    assert f"the tracer was killed {inject._STEPS[step]}, which does no harm" in str(killed.error)
    made = step >= STEPS["COMMIT"]
    assert until(lambda: new() == made)
    assert left_alone(machine.pid)
    assert machine.runs()
    exits, count = counter.snapshot()["exits"], machine.word(0x7000)
    assert ask(vmm, tid, subject.fds, in_run=in_run).result == Result.DONE
    assert until(lambda: new() == made + 1)
    assert until(lambda: counter.snapshot()["exits"] > exits and machine.word(0x7000) != count)
    assert machine.runs()
    assert left_alone(machine.pid)


@needs_qemu
@pytest.mark.parametrize("step", STEPS)
def test_qemu_survives_a_tracer_that_dies(busy_qemu, resources, step):
    """Killed behind any step, in a vCPU's thread or the main one, it leaves a VM that runs on and can be asked."""
    counter = resources.enter_context(counter_of(busy_qemu))
    vcpu_thread = busiest_thread(busy_qemu)
    for _ in range(KILLS):
        for in_run, tid in ((True, vcpu_thread), (False, busy_qemu.pid)):
            kill_once(busy_qemu, counter, in_run=in_run, tid=tid, step=STEPS[step])


@needs_qemu
def test_a_paused_vm_is_refused_and_does_as_soon_as_it_runs(qemu):
    """The VM's own file can be had at once, those of vCPUs that run nowhere cannot, and the reason is told in time."""
    qemu.qmp("stop")
    with watchdog(60):  # nothing but the timeout ends it
        for timeout in (0.5, 2, 10):  # a busy host takes some of it for the VM's file
            vm, *vcpus = open_missing(qemu.pid, timeout=timeout)
            if vm.error is None:
                break
    assert vm.error is None
    assert len(vcpus) == 4
    for vcpu in () if HOLDS_VCPUS else vcpus:
        with pytest.raises(AttachError, match=rf"vCPU {vcpu.vcpu_id}.*KVM_RUN.*paused"):
            raise vcpu.error
    qemu.qmp("cont")
    assert [r.error for r in open_missing(qemu.pid, timeout=30)] == [None] * 5
    assert qemu.runs()


@needs_qemu
def test_a_qemu_with_a_seccomp_filter_is_refused(tmp_path, resources):
    """-sandbox on installs filters: no call is made, and the VM runs on."""
    try:
        machine = Qemu(tmp_path, "-sandbox", "on")
    except AssertionError:
        pytest.skip("this QEMU has no -sandbox")
    resources.callback(machine.close)
    results = open_missing(machine.pid, timeout=30)
    held = 4 if HOLDS_VCPUS else 0
    assert [r.result for r in results] == [Result.SECCOMP] * (5 - held) + [None] * held
    assert len(stats_fds(machine.pid)) == held
    assert machine.runs()
    assert left_alone(machine.pid)


# ---- a VMM that compares its registers


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Compile inject_target."""
    if shutil.which(CC[0]) is None:
        pytest.skip(f"there is no C compiler {CC[0]}")
    file = tmp_path_factory.mktemp("inject") / "inject_target"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-pthread"]
    done = subprocess.run([*CC, *flags, TARGET, "-o", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return file


class Target:
    """A running inject_target."""

    def __init__(self, program, vms=1, vcpus=2, *words):
        self.process = subprocess.Popen(
            [*MANY_FILES, program, str(vms), str(vcpus), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        if self.process.stdout.readline() != "ready\n":
            self.close()
            pytest.fail("inject_target did not start")
        self.tids = {name.rstrip("0123456789"): thread["tid"] for name, thread in self.report()["threads"].items()}

    def say(self, word):
        """Give a command."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def report(self):
        """Counts of threads and guests."""
        self.say("report")
        return json.loads(self.process.stdout.readline())

    def wait(self):
        """Let each thread begin to wait in its call."""
        guests = {thread["tid"] for name, thread in self.report()["threads"].items() if name.startswith("vcpu")}
        assert until(lambda: {state for tid, state in status(self.pid, "State").items() if tid not in guests} == {"S"})

    def close_stats(self):
        """Let it close its stats files."""
        self.say("close")
        assert until(lambda: not stats_fds(self.pid))

    def thread(self, name):
        """Counts of one thread."""
        return next(t for n, t in self.report()["threads"].items() if n.rstrip("0123456789") == name)

    def is_well(self):
        """No register, mask, stack or guest value has changed, and each guest goes on."""
        before = self.report()
        assert before["guest_bad"] == 0
        assert [n for n, t in before["threads"].items() if t["bad"] or t["other"]] == [], before
        assert left_alone(self.pid)
        return until(lambda: all(a != b for a, b in zip(before["guest"], self.report()["guest"], strict=True)))

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def target(program, resources):
    """Start an inject_target."""

    def start(*arguments):
        made = Target(program, *arguments)
        resources.callback(made.close)
        return made

    return start


def test_no_register_is_lost(target):
    """Each thread, in whatever call it waits, keeps all registers, its red zone, its mask and its sigaltstack."""
    vmm_process = target(1, 2, "busy")
    vmm = vmm_of(vmm_process.pid, 3600)
    (vm, *vcpus), _ = vmm.look()
    vmm_process.wait()
    before = vmm_process.report()["threads"]
    stops = defaultdict(list)
    for _ in range(ROUNDS):
        for name, thread in before.items():
            held = vmm.held_now(vm)
            attempt = ask(vmm, thread["tid"], vm.fds)
            assert attempt.result == Result.DONE, attempt.error
            assert vmm.settle(vm, attempt, held).error is None
            stops[name.rstrip("0123456789")].append(attempt.stopped_ns)
        for result in vmm.open_vcpus(vcpus).values():
            assert result.error is None
            stops["vcpu"].append(result.stopped_ns)
        vmm_process.close_stats()
    assert vmm_process.is_well()
    for name, thread in vmm_process.report()["threads"].items():
        kind = name.rstrip("0123456789")
        ended = thread["calls"] - before[name]["calls"]
        if kind in RESTARTED:
            assert ended == 0, name
        elif kind != "vcpu":
            assert ended == thread["eintr"] - before[name]["eintr"] > 0, name
        print_times(name, stops[kind])
    vmm_process.say("wake")
    assert until(lambda: vmm_process.thread("read")["calls"] and vmm_process.thread("futex")["calls"])
    assert vmm_process.is_well()


@pytest.mark.parametrize("step", STEPS)
def test_no_register_is_lost_when_the_tracer_dies(target, step):
    """Killed behind any step, in any call, it leaves a thread that keeps all its registers and can be asked again."""
    # From the stop on it is all one to a thread how its vCPU was stopped: running, or halted.
    vmm_process = target(1, 2, *["busy"] * (STEPS[step] <= STEPS["STOP"]))
    vmm = vmm_of(vmm_process.pid, 3600)
    (vm, *vcpus), _ = vmm.look()
    vmm_process.wait()
    for _ in range(KILLS):
        for name, thread in vmm_process.report()["threads"].items():
            fds, in_run = vm.fds, False
            if name.startswith("vcpu"):
                fds, in_run = tuple(fd for vcpu in vcpus for fd in vcpu.fds), True
            before = len(stats_fds(vmm_process.pid))
            assert ask(vmm, thread["tid"], fds, in_run=in_run, kill_after=STEPS[step]).result == Result.KILLED
            made = STEPS[step] >= STEPS["COMMIT"]
            assert until(lambda n=before + made: len(stats_fds(vmm_process.pid)) == n)
            assert left_alone(vmm_process.pid)
            assert ask(vmm, thread["tid"], fds, in_run=in_run).result == Result.DONE
            assert until(lambda n=before + made + 1: len(stats_fds(vmm_process.pid)) == n)
        vmm_process.close_stats()
    assert vmm_process.is_well()


def test_no_signal_is_lost(target):
    """Queued signals that arrive all the while reach their handler, each once, also those that come before the stop."""
    vmm_process = target(1, 2)
    vmm = vmm_of(vmm_process.pid, 3600)
    vm = vmm.look()[0][0]
    libc = ctypes.CDLL(None, use_errno=True)
    sent = done = handed_on = 0
    stop = threading.Event()
    tids = [thread["tid"] for thread in vmm_process.report()["threads"].values()]

    def send():
        nonlocal sent
        while not stop.is_set():
            for tid in tids:
                # tgkill of a real-time signal, which is queued, not merged.
                sent += libc.syscall(234, vmm_process.pid, tid, int(signal.SIGRTMIN)) == 0
            time.sleep(0.00002)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        # The moment between SEIZE and the stop is short: one attempt in sixty meets a signal there.
        for i in range(10 * ROUNDS):
            for tid in tids:
                attempt = vmm.attempt(tid, vm.fds, in_run=False)
                # With a signal handed on the thread stands at the start of its handler.
                assert attempt.result in {Result.DONE, Result.NO_SYSCALL}, attempt.error
                handed_on += attempt.signals
                done += attempt.result == Result.DONE
            if i >= ROUNDS and handed_on:
                break
    finally:
        stop.set()
        thread.join()
    print(f"{done} calls, {sent} signals, {handed_on} of them handed on")  # noqa: T201 - for who runs the full counts
    assert until(lambda: vmm_process.report()["handled"] == sent), (vmm_process.report()["handled"], sent)
    assert until(lambda: len(stats_fds(vmm_process.pid)) == done)
    assert vmm_process.is_well()


def test_a_vcpus_file_is_opened_by_its_own_thread_only(target):
    """A thread that is in no KVM_RUN of that vCPU is not made to wait for it."""
    vmm_process = target(1, 2)
    vmm = vmm_of(vmm_process.pid)
    _, first, second = vmm.look()[0]
    tids = [t["tid"] for name, t in vmm_process.report()["threads"].items() if name.startswith("vcpu")]
    assert vmm.attempt(vmm_process.tids["poll"], first.fds, in_run=True).result == Result.OTHER_CALL
    assert vmm.attempt(tids[0], second.fds, in_run=True).result == Result.OTHER_CALL
    assert ask(vmm, tids[1], first.fds + second.fds, in_run=True).fd == second.fds[0]
    assert vmm_process.is_well()


def test_a_thread_outside_system_calls_is_let_alone(target):
    """Where it might be in a restartable sequence it is not touched, and goes on."""
    vmm_process = target(0, 0, "spin")
    attempt = vmm_of(vmm_process.pid).attempt(vmm_process.tids["spin"], (0,), in_run=False)
    assert attempt.result == Result.NO_SYSCALL
    before = vmm_process.thread("spin")["calls"]
    assert until(lambda: vmm_process.thread("spin")["calls"] > before)
    assert left_alone(vmm_process.pid)


def test_a_thread_that_nothing_wakes_times_out(target):
    """One that waits for a vfork child is given up in time, and is as before."""
    vmm_process = target(0, 0, "vfork")
    attempt = vmm_of(vmm_process.pid, 0.2).attempt(vmm_process.tids["vfork"], (0,), in_run=False)
    assert attempt.result == Result.TIMEOUT
    assert vmm_process.thread("vfork")["calls"] == 0  # it waits yet
    vmm_process.say("wake")
    assert until(lambda: vmm_process.thread("vfork")["calls"] == 1)


def test_a_tracer_that_hangs_is_killed(target):
    """One that is itself stopped does not hold up its caller, and leaves no zombie."""

    def children():
        return {int(c) for t in Path("/proc/self/task").iterdir() for c in (t / "children").read_text().split()}

    def stop_another(mine):
        for child in until(lambda: children() - mine, seconds=2):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)

    for _ in range(10):
        vmm_process = target(0, 0, "vfork")
        stopper = threading.Thread(target=stop_another, args=[children()])
        stopper.start()
        attempt = vmm_of(vmm_process.pid, 0.2).attempt(vmm_process.tids["vfork"], (0,), in_run=False)
        stopper.join()
        if attempt.result != Result.TIMEOUT:  # which it is where the tracer ends before it is stopped
            break
    assert attempt.result == Result.KILLED
    assert vmm_process.thread("vfork")["calls"] == 0  # it waits yet
    assert os.waitpid(-1, os.WNOHANG | 0x40000000) == (0, 0)
    vmm_process.say("wake")
    assert until(lambda: vmm_process.thread("vfork")["calls"] == 1)


def test_kernel_threads_are_never_touched(target):
    """KVM's worker shows the registers of the thread that made it, and is refused by its flags."""
    vmm_process = target(1, 1)
    tasks = Path(f"/proc/{vmm_process.pid}/task")
    workers = [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().startswith("kvm-")]
    if not workers:
        pytest.skip("this kernel's KVM has no worker among the VMM's threads")
    vmm = vmm_of(vmm_process.pid)
    assert {vmm.attempt(tid, (0,), in_run=False).result for tid in workers} == {Result.KERNEL_THREAD}


def test_a_seccomp_filter_is_refused(target):
    """A thread with a filter is not made to do anything."""
    vmm_process = target(1, 2, "seccomp")
    results = open_missing(vmm_process.pid, timeout=30)
    assert {r.result for r in results} == {Result.SECCOMP}
    for result in results:
        with pytest.raises(AttachError, match=r"fd \d+ \((VM|vCPU \d)\): thread \d+ of process \d+: .*seccomp.*mode 2"):
            raise result.error
    assert not stats_fds(vmm_process.pid)
    assert vmm_process.is_well()


def test_a_stopped_process_is_refused_and_stays_stopped(target):
    """SIGSTOP is the user's: refused with what to do, and after SIGCONT all is well."""
    vmm_process = target(1, 2)
    os.kill(vmm_process.pid, signal.SIGSTOP)
    assert until(lambda: set(status(vmm_process.pid, "State").values()) >= {"T"})
    results = open_missing(vmm_process.pid, timeout=0.5)
    assert {r.result for r in results} <= {Result.HALTED, None}
    assert results[0].result == Result.HALTED
    assert "kill -CONT" in str(results[0].error)
    assert status(vmm_process.pid, "State")[vmm_process.pid] == "T"
    os.kill(vmm_process.pid, signal.SIGCONT)
    assert [r.error for r in open_missing(vmm_process.pid, timeout=30)] == [None] * 3
    assert vmm_process.is_well()


TRACER = """
import ctypes, os, sys, time
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
for tid in map(int, os.listdir(f"/proc/{pid}/task")):
    libc.ptrace(0x4206, tid, 0, 0)  # PTRACE_SEIZE
print("traced", flush=True)
sys.stdin.read()
"""


def test_a_traced_process_is_refused(target):
    """Whose threads a debugger has are left to it, and the message says which process that is."""
    vmm_process = target(1, 2)
    command = [sys.executable, "-c", TRACER, str(vmm_process.pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout.readline() == "traced\n"
        results = open_missing(vmm_process.pid, timeout=30)  # of which it takes little: no thread is left to try
        assert {r.result for r in results} == {Result.TRACED}
        assert f"process {tracer.pid} traces it" in str(results[0].error)
        tracer.stdin.close()
    assert [r.error for r in open_missing(vmm_process.pid, timeout=30)] == [None] * 3
    assert vmm_process.is_well()


def test_a_process_that_has_no_fd_free_is_told(target, monkeypatch):
    """The ioctl's refusal cannot be seen, so the message names what may be the reason; the process is well."""
    monkeypatch.setattr(inject, "_PATIENCE", 0.5)
    vmm_process = target(1, 1, "full")
    results = open_missing(vmm_process.pid, timeout=30)
    assert {r.result for r in results} == {Result.DONE}
    for result in results:
        assert not result.opened
        with pytest.raises(AttachError, match="RLIMIT_NOFILE"):
            raise result.error
    assert vmm_process.is_well()


def test_a_process_without_a_vm_is_refused(target):
    """It says that this is not the VMM."""
    with pytest.raises(AttachError, match="no fd of a VM or vCPU"):
        open_missing(target(0, 0).pid)


def test_a_process_that_is_not_there_is_refused(target):
    """A pid that is nobody's, one that has just died, and a zombie."""
    vmm_process = target(1, 1)
    vmm = vmm_of(vmm_process.pid)
    vmm_process.process.kill()
    until(
        lambda: (
            not list(Path(f"/proc/{vmm_process.pid}/task").iterdir())
            or "Z" in status(vmm_process.pid, "State").values()
        )
    )
    assert vmm.attempt(vmm_process.pid, (0,), in_run=False).result == Result.GONE
    with pytest.raises(VmGoneError, match="ended"):  # a zombie
        open_missing(vmm_process.pid, timeout=30)
    vmm_process.process.wait()
    with pytest.raises(VmGoneError, match=r"No such process; process .* has ended, or"):
        open_missing(vmm_process.pid, timeout=30)
    assert vmm.attempt(vmm_process.pid, (0,), in_run=False).result == Result.GONE


def test_this_process_is_sent_to_the_simple_way():
    """Who has a VM of its own needs no tracer."""
    with pytest.raises(AttachError, match=r"StatsFile\.open"):
        open_missing(os.getpid())
    for timeout in (0, -1, float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"timeout is {timeout}; it must be more than 0 seconds"):
            kf.attach(os.getpid(), inject=True, timeout=timeout)


def test_a_vmm_that_dies_meanwhile_is_a_clear_error(program):
    """Killed at any moment: an AttachError in time, or results with errors, and never a hang."""
    for i in range(max(4, ROUNDS // 2)):
        with ExitStack() as stack:
            vmm_process = Target(program, 1, 4)
            stack.callback(vmm_process.close)
            threading.Timer(0.002 * i, vmm_process.process.kill).start()
            with watchdog(60), suppress(AttachError):  # long before the timeout
                for result in open_missing(vmm_process.pid, timeout=3600):
                    assert result.error is None or isinstance(result.error, AttachError), result


def test_files_of_several_vms_are_told_apart_as_far_as_can_be(target, resources):
    """What is opened now is known; what was held is only counted, and a second fd of a VM is no second VM."""
    vmm_process = target(2, 1, "twice")
    results = open_missing(vmm_process.pid, timeout=30)
    assert [(r.kind, r.vcpu_id, r.opened) for r in results] == [("vm", None, True)] * 2 + [("vcpu", 0, True)] * 2
    assert len({r.kvm_fd for r in results}) == len({r.stats_fd for r in results}) == 4
    files = [resources.enter_context(borrow(vmm_process.pid, r.stats_fd)) for r in results]
    assert [file.kind for file in files] == ["vm", "vm", "vcpu", "vcpu"]
    again = open_missing(vmm_process.pid, timeout=30)
    assert [(r.stats_fd, r.opened, r.error) for r in again] == [(None, False, None)] * 4
    assert len(stats_fds(vmm_process.pid)) == 4
    assert vmm_process.is_well()


def test_one_held_file_of_several_vms_is_nobodys(target):
    """With fewer files than VMs each VM gets a new one, because whose the held one is cannot be told."""
    vmm_process = target(2, 1, "held")
    before = stats_fds(vmm_process.pid)
    assert len(before) == 2
    results = open_missing(vmm_process.pid, timeout=30)
    assert [(r.opened, r.error) for r in results] == [(True, None)] * 4
    assert not before & {r.stats_fd for r in results}
    one = target(1, 1, "held")
    assert [(r.opened, r.error) for r in open_missing(one.pid, timeout=30)] == [(False, None)] * 2
    assert {r.stats_fd for r in open_missing(one.pid, timeout=30)} == stats_fds(one.pid)


# ---- this process


def test_the_tracer_leaves_no_trace_here(target):
    """No SIGCHLD, no zombie, no fd, no changed mask; children of others are not reaped."""
    vmm_process = target(1, 2)
    vmm = vmm_of(vmm_process.pid)
    fds = sorted(Path("/proc/self/fd").iterdir())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    told = []
    before = signal.signal(signal.SIGCHLD, lambda *_: told.append(1))
    other = os.posix_spawn("/bin/sleep", ["sleep", "100"], {})
    try:
        for kill_after in (0, *STEPS.values()):
            vmm.attempt(vmm_process.tids["poll"], vmm.look()[0][0].fds, in_run=False, kill_after=kill_after)
        assert told == []
        assert os.waitpid(-1, os.WNOHANG | 0x40000000) == (0, 0)  # __WALL: nor one that sends no SIGCHLD
        assert sorted(Path("/proc/self/fd").iterdir()) == fds
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        signal.signal(signal.SIGCHLD, before)


def test_signals_to_this_process_do_not_reach_the_tracer(target):
    """Signals that come here all the while neither end nor delay it."""
    vmm_process = target(1, 2)
    got = []
    before = signal.signal(signal.SIGALRM, lambda *_: got.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        assert [r.error for r in open_missing(vmm_process.pid, timeout=30)] == [None] * 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert got
    assert vmm_process.is_well()


def test_wrong_code_addresses_are_refused(target):
    """What stands there is looked at while the thread stands still."""
    vmm_process = target(1, 1)
    vmm = vmm_of(vmm_process.pid)
    for name in ("call", "restorer"):
        good = getattr(vmm, name)
        for wrong in (good + 1, 0, 2**64 - 4):
            setattr(vmm, name, wrong)
            attempt = vmm.attempt(vmm_process.tids["poll"], vmm.look()[0][0].fds, in_run=False)
            assert attempt.result == Result.CODE
            assert f"{wrong:#x}" in str(attempt.error)
        setattr(vmm, name, good)
    assert not stats_fds(vmm_process.pid)
    assert vmm_process.is_well()


def test_32_bit_code_is_refused(tmp_path):
    """A thread whose code segment is not that of 64-bit code is let alone."""
    source, program = tmp_path / "pause.s", tmp_path / "pause"
    source.write_text(".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n")
    command = [*CC, "-m32", "-nostdlib", "-static", "-no-pie", source, "-o", program]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no 32-bit programs can be made here")
    with subprocess.Popen([program]) as process:
        try:
            time.sleep(0.1)
            if process.poll() is not None:
                pytest.skip("no 32-bit programs run here")
            vmm = inject.Injection(Process.hold(process.pid), time.monotonic() + 30)
            with pytest.raises(AttachError, match="no C library for x86-64"):
                vmm.find_code()
            vmm.call = vmm.restorer = 4096
            assert vmm.attempt(process.pid, (0,), in_run=False).result == Result.FOREIGN_ABI
            assert left_alone(process.pid)
            assert process.poll() is None
        finally:
            process.kill()


LOW_STACK = """
.globl _start
_start: mov $8, %rsp
wait: mov $34, %eax  # pause
syscall
jmp wait
syscall  # what a C library has
ret
mov $15, %rax
syscall
"""


def test_a_stack_that_ends_at_address_0_is_refused(tmp_path):
    """Where the frame would wrap round to the end of memory, nothing is written, and the thread goes on."""
    source, program = tmp_path / "low.s", tmp_path / "low"
    source.write_text(LOW_STACK)
    subprocess.run([*CC, "-nostdlib", "-static", "-no-pie", source, "-o", program], check=True)
    with subprocess.Popen([program]) as process:
        try:
            assert until(lambda: status(process.pid, "State") == {process.pid: "S"})  # all of it is mapped, then
            vmm = vmm_of(process.pid)
            attempt = ask(vmm, process.pid, (0,))
            assert attempt.result == Result.STACK
            assert "no writable memory below its stack (0x8)" in str(attempt.error)
            assert left_alone(process.pid)
            assert process.poll() is None
        finally:
            process.kill()


def test_a_refused_trace_has_the_kernels_errno(target, monkeypatch):
    """What ptrace answers is the errno of each file's error, which says what it was for."""
    vmm_process = target(1, 1)
    real = lib.kvmstats_inject

    class Refusing:
        def __getattr__(self, name):
            return getattr(lib, name)

        def kvmstats_inject(self, job):
            return -errno.EPERM if job.pid else real(job)

    monkeypatch.setattr(inject, "lib", Refusing())
    for result in open_missing(vmm_process.pid, timeout=30):
        with pytest.raises(AttachError, match=r"stats file of fd \d+ .*ptrace on thread \d+ ") as caught:
            raise result.error
        assert caught.value.errno == errno.EPERM


#: What the kernel may refuse: the system call (asm/unistd_64.h) and its arguments; its errno; how the attempt ends.
REFUSED = {
    "memory to share with the tracer": (9, {3: 0x21}, errno.ENOMEM, None, "before it was seized"),
    "a process": (56, {0: 0}, errno.EAGAIN, None, "before it was seized"),
    "a file": (257, {2: os.O_RDONLY | os.O_CLOEXEC}, errno.EMFILE, None, "before it was seized"),
    "to read it": (0, {2: 16383}, errno.EIO, None, "before it was seized"),
    "SEIZE": (101, {0: 0x4206}, errno.EPERM, None, "before it was seized"),
    "INTERRUPT": (101, {0: 0x4207}, errno.EIO, None, "after PTRACE_SEIZE"),
    "registers": (101, {0: 0x4204, 2: 1}, errno.EIO, None, "after it had stopped"),
    "extended registers": (101, {0: 0x4204, 2: 0x202}, errno.ENODEV, None, "after its seccomp mode was read"),
    "the mask": (101, {0: 0x420A}, errno.EIO, None, "after its extended registers were read"),
    "to read its memory": (310, {}, errno.ENOSYS, Result.NO_SYSCALL, "never found in a system call"),
    "to write its memory": (311, {}, errno.ENOSYS, Result.STACK, "no writable memory below its stack"),
    "to set registers": (101, {0: 0x4205}, errno.EIO, None, "after the signal frame was written"),
    "DETACH": (101, {0: 17}, errno.ESRCH, Result.DONE, ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_whatever_the_kernel_refuses_the_thread_goes_on(target, what):
    """The error says what was refused and when, nothing is opened, the thread keeps its registers and can be asked."""
    number, arguments, error, result, when = REFUSED[what]
    vmm_process = target(1, 1)
    vmm = vmm_of(vmm_process.pid)
    fds, tid = vmm.look()[0][0].fds, vmm_process.tids["poll"]

    def attempt():
        refuse_call(number, arguments, error)
        for _ in range(100):
            attempt = vmm.attempt(tid, fds, in_run=False)
            if attempt.result == result:
                break
        assert attempt.result == result
        assert when in str(attempt.error)
        assert result is not None or attempt.error.errno == error

    assert exit_status(forked(attempt)) == 0
    done = result == Result.DONE
    assert until(lambda: len(stats_fds(vmm_process.pid)) == done)
    assert vmm_process.is_well()
    assert ask(vmm, tid, fds).result == Result.DONE
    assert until(lambda: len(stats_fds(vmm_process.pid)) == done + 1)
    assert vmm_process.is_well()


def test_a_process_that_may_not_be_looked_at_is_explained(target, monkeypatch):
    """Where /proc refuses, the error has its errno and names the file."""
    vmm_process = target(1, 1)

    def refuse(process):
        raise PermissionError(errno.EACCES, "Permission denied", f"{process.folder}/fd")

    monkeypatch.setattr(Process, "kvm_files", refuse)
    with pytest.raises(AttachError, match=rf"/proc/{vmm_process.pid}/fd: Permission denied; ") as caught:
        open_missing(vmm_process.pid, timeout=30)
    assert caught.value.errno == errno.EACCES
    monkeypatch.undo()


def test_bad_jobs_are_refused():
    """A job without a process, thread, fd or time is EINVAL, before anything is started."""
    fds = ffi.new("int32_t[]", [0])
    good = {"pid": 1, "tid": 1, "fds": fds, "num_fds": 1, "timeout_ns": 1}
    for name in ("pid", "tid", "num_fds", "timeout_ns"):
        job = ffi.new("struct kvmstats_inject *", good | {name: 0})
        assert lib.kvmstats_inject(job) == -errno.EINVAL


def test_every_result_has_its_message():
    """The results and steps of C are all known in Python."""
    names = {name.removeprefix("KVMSTATS_INJECT_") for name in dir(lib) if name.startswith("KVMSTATS_INJECT_")}
    assert names == {result.name for result in Result} == {result.name for result in inject._MESSAGES}
    assert set(inject._ERRNO) == set(Result)
    assert set(inject._STEPS) == {*STEPS.values(), lib.KVMSTATS_STEP_NONE}


def test_off_x86_64_injection_is_said_to_be_no_way(monkeypatch):
    """Before anything is looked at, with what to do instead."""

    class Elsewhere:
        def __getattr__(self, name):
            return getattr(lib, name)

        def kvmstats_inject(self, _):
            return int(Result.UNSUPPORTED)

    monkeypatch.setattr(inject, "lib", Elsewhere())
    with pytest.raises(AttachError, match=r"only on x86-64 .* hand them over") as caught:
        open_missing(os.getpid())
    assert caught.value.errno == errno.ENOTSUP


def test_code_is_looked_for_as_far_as_its_file_goes(tmp_path):
    """A mapping may be longer: what lies behind the end of the file is no code, and no error."""
    page = mmap.PAGESIZE
    (tmp_path / "code").write_bytes(b"x" * 100)
    with (tmp_path / "code").open("r+b") as file, mmap.mmap(-1, 4 * page) as room:
        libc = ctypes.CDLL(None)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
        at = ctypes.addressof(ctypes.c_char.from_buffer(room))
        fixed = 0x10 | mmap.MAP_PRIVATE
        assert libc.mmap(at, 3 * page, mmap.PROT_READ, fixed, file.fileno(), 0) == at
        with Process(os.getpid()).open_memory() as memory:
            assert inject._read_code(memory.fileno(), at, at + 3 * page) == b"x" * 100 + bytes(page - 100)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inject, "_PIECE", page)
            with Process(os.getpid()).open_memory() as memory:
                assert inject._read_code(memory.fileno(), at, at + 3 * page) == b"x" * 100 + bytes(page - 100)


def test_a_process_that_has_ended_has_no_code():
    """Its memory is empty, which is the end of what can be read."""
    with subprocess.Popen(["sleep", "100"]) as process, Process(process.pid).open_memory() as memory:
        process.kill()
        process.wait()
        assert inject._read_code(memory.fileno(), 4096, 8192) == b""
