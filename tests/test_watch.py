"""A VM may go while its VMM runs on: its files are let go of soon, and those of other VMs are not."""

import _thread
import errno
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import exit_status, forked, open_fds, run_while, stats_fds, until
from holder import WITH_GUESTS

import kvmstats_fast as kf
from kvmstats_fast._resource import Fd
from kvmstats_fast.vmm import mark, watch
from kvmstats_fast.vmm.borrow import hold_process
from kvmstats_fast.vmm.inject import open_missing
from kvmstats_fast.vmm.proc import KvmFile, Process

#: A VMM that runs each line of its stdin.
VMM = f"""{WITH_GUESTS}
import os
def boot(vcpus=1):
    guest = TinyGuest(vcpus)
    return guest, guest.open_stats()
def stop(guest, files):
    for file in files:
        file.close()
    guest.close()
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""

pytestmark = pytest.mark.real_vm


class Vmm:
    """A VMM in a process of its own."""

    def __init__(self, resources):
        self.process = resources.enter_context(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", VMM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        resources.callback(self.process.kill)
        self.pid = self.process.pid
        assert self.process.stdout.readline() == "ready\n"

    def do(self, line):
        """Have it run a line of Python."""
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def vmm(resources):
    """A VMM that has no VM yet."""
    return Vmm(resources)


def look(machine):
    """Have the watch look now."""
    with watch.WATCHER.lock:
        machine._watched.look()
    return [file.closed for file in machine.files]


# ---- it is gone


def test_a_vm_that_is_made_anew_in_the_same_process_is_noticed(vmm):
    """By the watch alone: its files are let go of, say what to do, and refresh takes up the new VM."""
    vmm.do("guest, files = boot(2)")
    with kf.attach(vmm.pid) as machine:
        vmm.do("guest.run(1000)")
        old = machine.files
        fds = len(stats_fds())
        vmm.do("stop(guest, files); guest, files = boot(2)")
        assert until(lambda: all(file.closed for file in old), 30)
        assert len(stats_fds()) == fds - 3
        for file in old:
            with pytest.raises(kf.VmGoneError, match=rf"the VM of process {vmm.pid} .* is gone.*refresh") as caught:
                file.read()
            assert caught.value.errno == errno.ENODEV
        assert machine.alive
        assert "is gone" in machine.explain()
        assert machine.refresh()
        assert [file.vcpu_id for file in machine.files] == [None, 0, 1]
        with kf.measure(machine, "exits") as measured:
            vmm.do("guest.run(500)")
        assert measured.delta["exits"].sum() >= 500
        assert machine.explain() == ""
    assert watch._PERIOD <= 1


@pytest.mark.parametrize(
    "then",
    [
        "stop(guest, files); guest, files = boot()",
        "stop(guest, files)",
        "stop(guest, files); guest = TinyGuest(1)",
        "spare = os.dup(0); stop(guest, files); os.close(spare); guest, files = boot()",
        "stop(guest, files); files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]",
        "os.execv(sys.executable, [sys.executable, '-c', VMM])",
        "os.execv(sys.executable, [sys.executable, '-c', VMM.replace('print', 'guest, files = boot(); print', 1)])",
    ],
    ids=["new", "none", "new, without stats files", "new, at other fds", "other files", "executed", "executed, new"],
)
@pytest.mark.parametrize("ran", [1000, 0])
def test_a_vm_that_is_gone_is_told_whatever_comes_after_it(vmm, then, ran):
    """Nothing, another VM at the same or other fds, other files at the same fds, another program."""
    vmm.do(f"VMM = {VMM!r}")
    vmm.do("guest, files = boot()")
    with kf.attach(vmm.pid) as machine:
        if ran:
            vmm.do(f"guest.run({ran})")
        assert look(machine) == [False] * 2
        if "execv" in then:
            print(then, file=vmm.process.stdin, flush=True)
            assert vmm.process.stdout.readline() == "ready\n"
        else:
            vmm.do(then)
        assert look(machine) == [True] * 2
        with pytest.raises(kf.VmGoneError, match="runs on"):
            machine.files[0].read()
        machine.refresh()
        assert [file.kind for file in machine.files] == (["vm", "vcpu"] if "boot" in then else [])


def test_a_run_goes_on_with_the_files_of_other_vms(vmm, resources):
    """Those of the VM that was made anew end with VmGoneError; no tick of the others is lost."""
    other = Vmm(resources)
    for one in (vmm, other):
        one.do("guest, files = boot()")
    with kf.attach(vmm.pid) as first, kf.attach(other.pid) as second:
        sampler = kf.Sampler([first, second], "exits")

        def make_anew():
            vmm.do("stop(guest, files); guest, files = boot(); guest.run(5)")
            assert until(lambda: all(file.closed for file in first))
            time.sleep(0.2)  # so there was a sweep since
            sampler.stop()

        x = run_while(make_anew, sampler.run, 0.001, count=30_000)
        assert {(type(error.error), x.files[error.file].pid) for error in x.errors} == {(kf.VmGoneError, vmm.pid)}
        assert len(x) + x.missed >= x.tick[-1] + 1
        assert not any(file.closed for file in second)


def test_a_file_that_its_user_has_closed_is_passed_over(vmm):
    """When one of two VMs of a process goes: its files are closed, and the other of the VM that stays is not."""
    vmm.do("one, its = boot(); other, more = boot(); one.run(100); other.run(300)")
    with kf.attach(vmm.pid) as machine:
        min(machine.vcpus, key=lambda file: file.snapshot()["exits"]).close()
        vmm.do("stop(other, more)")
        assert sum(look(machine)) == 3


def test_the_files_of_another_vm_of_the_process_stay(vmm):
    """Two VMs with the same ids in one process, of which one is made anew, then goes for good."""
    vmm.do("one, its = boot(); other, more = boot(); one.run(100); other.run(300)")
    with kf.attach(vmm.pid) as machine:
        assert len(machine.files) == 4
        before = [file.snapshot()["exits"] for file in machine.vcpus]
        stays, goes = (machine.vcpus[i] for i in sorted((0, 1), key=lambda i: before[i]))
        vmm.do("stop(other, more); other, more = boot(); other.run(7)")
        closed = look(machine)
        assert (sum(closed), goes.closed, stays.closed) == (2, True, False)
        vmm.do("one.run(11)")
        assert stays.snapshot()["exits"] >= 111
        machine.refresh()
        assert min(file.snapshot()["exits"] for file in machine.vcpus) < 100
        vmm.do("stop(other, more)")
        assert sum(look(machine)) == 2
        assert not stays.closed


@pytest.mark.parametrize("ran", [1000, 0])
def test_a_vm_whose_files_were_injected_is_noticed_too(vmm, ran):
    """They stay open in the VMM for ever, so nothing but the mark tells that their VM is another one by now."""
    vmm.do("guest = TinyGuest(1); thread = None")
    with hold_process(vmm.pid) as process:
        open_missing(process, timeout=2)
    with kf.attach(vmm.pid) as machine:
        assert [file.kind for file in machine] == ["vm"]
        vmm.do(f"guest.run({ran})" if ran else "pass")
        vmm.do("guest.close(); guest = TinyGuest(1)")
        assert look(machine) == [True]
        # The old file is open in the VMM as before, and taken for the new VM's by nobody.
        assert len(stats_fds(vmm.pid)) == 1
        assert machine.refresh()
        assert machine.files == ()
        with pytest.raises(kf.AttachError, match="holds no stats files"):
            kf.attach(vmm.pid)
        with kf.attach(vmm.pid, inject=True) as again:
            assert (again.how, len(stats_fds(vmm.pid))) == ("inject", 2)
            before = again.vm.read()
            vmm.do("guest.run(100)")
            assert (again.vm.read() != before).any()


# ---- it is not


@pytest.mark.parametrize(
    "then",
    [
        "[file.close() for file in files]",
        "[file.close() for file in files]; files = guest.open_stats()",
        "more = guest.open_stats()",
        "copies = [os.dup(file.fileno()) for file in files]; [file.close() for file in files]",
        "os.close(guest.vm_fd); guest.vm_fd = -1",
    ],
    ids=["closes its stats files", "opens them anew", "opens them twice", "has duplicates", "closes the VM's fd"],
)
@pytest.mark.parametrize("ran", [1000, 0])
def test_a_vmm_that_only_tidies_up_keeps_its_vm(vmm, then, ran):
    """As long as VM and vCPUs are there, or a stats file that keeps in step, the files stay and count."""
    vmm.do("guest, files = boot()")
    with kf.attach(vmm.pid) as machine:
        vmm.do(f"guest.run({ran})" if ran else "pass")
        vmm.do(then)
        for _ in range(3):
            assert look(machine) == [False] * 2
            before = machine.vcpus[0].snapshot()["exits"]
            vmm.do("guest.run(10)")
            assert machine.vcpus[0].snapshot()["exits"] >= before + 10


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EPERM, errno.EACCES, errno.EINVAL])
def test_a_kernel_that_lets_no_vm_be_marked_closes_no_file(vmm, monkeypatch, number):
    """Where a mark is refused nothing is known, and nothing is let go of; attach works as ever."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    vmm.do("guest, files = boot()")
    with monkeypatch.context() as patch:
        patch.setattr(mark.fcntl, "fcntl", refuse)
        machine = kf.attach(vmm.pid)
    with machine:
        vmm.do("stop(guest, files); guest, files = boot()")
        assert look(machine) == [False] * 2
        assert machine.refresh()
        vmm.do("stop(guest, files); guest, files = boot()")
        assert look(machine) == [True] * 2


def test_a_vm_is_marked_once_in_its_life(vmm):
    """However many monitors come and go; the marks do not add up in the VMM."""
    vmm.do("guest, files = boot(3)")

    def locks():
        infos = Path(f"/proc/{vmm.pid}/fdinfo").iterdir()
        return [line for info in infos for line in info.read_text().splitlines() if line.startswith("lock:")]

    assert locks() == []
    for _ in range(3):
        with kf.attach(vmm.pid) as machine, kf.attach(vmm.pid):
            machine.refresh()
        assert len(locks()) == 2
    vmm.do("stop(guest, files)")
    assert locks() == []


def test_looking_leaves_nothing_and_touches_no_file_of_the_user(vmm):
    """No fd, and the array that a file reads into is the one that its owner gave it."""
    vmm.do("guest, files = boot(); guest.run(9)")
    with kf.attach(vmm.pid) as machine:
        out = machine.vcpus[0].read()
        machine.vcpus[0].read_into(out)
        fds = open_fds()
        vmm.do("[file.close() for file in files]; files = guest.open_stats()")
        kept = out.copy()
        vmm.do("guest.run(1)")
        for _ in range(10):
            look(machine)
        assert open_fds() == fds
        assert (out == kept).all()


def test_what_a_look_costs(vmm, resources):
    """A look at a VM that is there finds it there; how much processor time that takes is printed."""
    vmm.do("guest, files = boot()")
    machines = [resources.enter_context(kf.attach(vmm.pid)) for _ in range(50)]
    took = []
    for _ in range(5):
        began = time.thread_time()
        watch.WATCHER._look()
        took.append((time.thread_time() - began) / len(machines))
    print(f"processor time of a look: {min(took) * 1e6:.1f} us for each VM")  # noqa: T201 - for who wants to know
    assert not any(file.closed for machine in machines for file in machine)


# ---- borrowers


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), MemoryError()], ids=repr)
def test_a_look_that_fails_does_not_end_the_watch(vmm, resources, monkeypatch, error):
    """It is about one VM, and of that moment: the others, and the end of this one, are noticed."""
    vmm.do("guest, files = boot()")
    other = Vmm(resources)
    other.do("guest, files = boot()")
    first, second = (resources.enter_context(kf.attach(one.pid)) for one in (vmm, other))
    look_at, failed = watch.Watched.look, threading.Event()

    def fail(watched):
        if watched is first._watched:
            failed.set()
            raise error
        look_at(watched)

    monkeypatch.setattr(watch.Watched, "look", fail)
    assert failed.wait(30)
    other.do("stop(guest, files)")
    until(lambda: all(file.closed for file in second.files))
    vmm.process.kill()
    until(lambda: all(file.closed for file in first.files))


def test_a_watch_that_cannot_begin_is_an_error_that_names_the_limits(vmm):
    """Of `attach`; one that follows the VM says why it does not, and goes on. Nothing stays open."""
    vmm.do("guest, files = boot()")

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", refuse)
            fds = open_fds()
            with pytest.raises(kf.AttachError, match=r"cannot be started; .*RLIMIT_NPROC .*pids\.max"):
                kf.attach(vmm.pid)
            with kf.follow(vmm.pid, 0.001, count=3) as chunks:
                assert not list(chunks)
                assert "RLIMIT_NPROC" in chunks.refused[vmm.pid]
            assert open_fds() == fds

    assert exit_status(forked(work)) == 0


def test_a_watch_for_which_no_file_can_be_opened_is_an_error_that_says_so(vmm):
    """Of `attach`, with the kernel's errno; nothing stays open."""
    vmm.do("guest, files = boot()")

    def refuse():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(select, "epoll", refuse)
            fds = open_fds()
            with pytest.raises(kf.AttachError, match="the VMM cannot be watched: Too many open files") as caught:
                kf.attach(vmm.pid)
            assert caught.value.errno == errno.EMFILE
            assert open_fds() == fds
        kf.attach(vmm.pid).close()

    assert exit_status(forked(work)) == 0


def test_a_file_that_is_closed_while_marks_are_looked_for_has_none():
    """The others are looked at all the same."""
    with Fd(os.eventfd, 0) as file:  # which has the inode that KVM's files have
        mark.mark_dead(file)
        gone, dead = (KvmFile("vm", None, fd, is_stats=True) for fd in (1 << 20, file.fileno()))
        assert mark.drop_dead(Process(os.getpid()), [gone, dead]) == [gone]


def test_a_borrower_is_no_vmm(vmm):
    """A monitor is not listed, not even by itself, and attaching to it is refused with the reason."""
    vmm.do("guest, files = boot()")
    monitor = (
        "import sys, kvmstats_fast as kf\nmachine = kf.attach(int(sys.argv[1]))\nprint('ready', flush=True)\ninput()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", monitor, str(vmm.pid)]
    with kf.attach(vmm.pid), subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"ready\n"
            listed = {process.pid for process in kf.find_vms()}
            assert vmm.pid in listed
            assert not listed & {other.pid, os.getpid()}
            for pid in (other.pid, os.getpid()):
                with pytest.raises(kf.AttachError, match=rf"process {pid}\) has no VM: .* neither a VM nor a vCPU"):
                    kf.attach(pid)
        finally:
            other.kill()


GREEN = """
import signal, subprocess, sys, time
import kvmstats_fast as kf
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
vmm = subprocess.Popen([sys.executable, "-W", "ignore", "-c", sys.argv[1]], **pipes)
vmm.stdout.readline()
vmm.stdin.write(b"guest, files = boot()\\n")
vmm.stdin.flush()
vmm.stdout.readline()
machine = kf.attach(vmm.pid)
kf.Sampler(machine).sweep()
print(len(machine.vcpus), len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
vmm.stdin.close()
vmm.wait()
while not all(file.closed for file in machine):
    time.sleep(0.01)
print(machine.alive)
"""


def test_a_vmm_is_watched_under_green_threads(under_green_threads):
    """After monkey-patching: attach works, by a watch in a thread of its own that sees the VMM's end."""
    assert under_green_threads(GREEN, VMM) == ["1 0", "False"]


def test_a_program_that_closes_our_fds_has_no_vm_marked_as_dead(vmm):
    """Another file in the place of the fd by which marks are seen: the VM runs on, and others can attach to it."""
    vmm.do("guest, files = boot()")

    def work():
        machine = kf.attach(vmm.pid)
        with Path(os.devnull).open("rb") as other:
            os.dup2(other.fileno(), mark._probe()[0].fileno())
        with pytest.raises(OSError, match="closed by the program"):
            look(machine)
        assert not any(file.closed for file in machine.files)

    assert exit_status(forked(work)) == 0
    with kf.attach(vmm.pid) as machine:
        assert len(machine.files) == 2


def test_the_files_of_a_vm_that_is_gone_are_held_neither_for_find_vms_nor_for_attach(vmm):
    """Which agree, whatever the process still has open."""
    vmm.do("guest, files = boot()")
    with kf.attach(vmm.pid) as machine:
        mark.mark_dead(machine.vcpus[0])
    (found,) = [process for process in kf.find_vms() if process.pid == vmm.pid]
    assert [file.kind for file in found.held] == ["vm"]
    with kf.attach(vmm.pid) as machine:
        assert [file.kind for file in machine.files] == ["vm"]
