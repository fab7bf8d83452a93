"""VirtualMachine: attach, launch, and what happens when the VMM goes."""

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import exit_status, forked, open_fds, run_while, stats_fds, until
from holder import Holder
from qemu import HOLDS_VCPUS, Qmp, arguments, firmware, needs_qemu, plain_qemu

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.cli import main
from kvmstats_fast.vmm import borrow as borrowing
from kvmstats_fast.vmm import machine as machine_module
from kvmstats_fast.vmm import proc as proc_module
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.watch import WATCHER

#: A VMM that is there as soon as a busy machine lets it: the interpreter imports next to nothing.
QUICKLY = (sys.executable, "-I", "-S", "-c")
VMM = """
import fcntl, os, time
vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)  # KVM_CREATE_VM, KVM_CREATE_VCPU
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
"""


class NoKcmp:
    """The core on a kernel without kcmp."""

    kvmstats_getfd = staticmethod(lib.kvmstats_getfd)

    @staticmethod
    def kvmstats_same_file(*_):
        """Say so."""
        return -errno.ENOSYS


# ---- what is had


@pytest.mark.real_vm
def test_what_a_vmm_holds_is_borrowed_and_counts_its_exits(holder):
    """The VM's and both vCPUs' files, live; nothing is left when it is closed, and the VMM runs on."""
    kf.attach(holder.pid).close()  # the watch has an fd of its own
    fds = open_fds()
    with kf.attach(holder.pid) as machine:
        assert (machine.pid, machine.how, machine.alive, machine.process) == (holder.pid, "borrow", True, None)
        assert machine.vm.kind == "vm"
        assert [file.vcpu_id for file in machine.vcpus] == [0, 1]
        assert machine.files == (machine.vm, *machine.vcpus) == tuple(machine)
        assert machine.explain() == ""
        counter = "exits"
        before = [file.snapshot()[counter] for file in machine.vcpus]
        holder.do("guest.run(500, 1)")
        change = [file.snapshot()[counter] - b for file, b in zip(machine.vcpus, before, strict=True)]
        assert change[0] == 0
        assert machine.vcpus[1].snapshot()["exits"] >= 500
        assert "alive: VM and 2 vCPUs, borrow" in repr(machine)
    assert "closed" in repr(machine)
    machine.close()
    with pytest.raises(ValueError, match="attach to it again"):
        machine.alive  # noqa: B018 - it is a property
    assert open_fds() == fds
    holder.do("guest.run(1, 0)")


@pytest.mark.real_vm
def test_a_vm_is_attached_to_by_the_name_of_its_guest(resources):
    """One that several have is an error with their pids, one that none has an error with those that are like it."""
    web, db = f"web-frontend-{os.getpid()}", f"db-{os.getpid()}"
    one, two = (resources.enter_context(Holder(1, name=name)) for name in (web, db))
    with kf.attach(web) as machine:
        assert (machine.pid, machine.name) == (one.pid, web)
    with pytest.raises(kf.AttachError, match=rf"no VM is called '{web[1:]}'; did you mean .*{web}.*\?") as caught:
        kf.attach(web[1:])
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(kf.AttachError, match=r"no VM is called '2e\\x1b'\. .*`kvmstats list` shows all VMs"):
        kf.attach("2e\x1b")
    again = resources.enter_context(Holder(1, name=db))
    pids = " or ".join(map(str, sorted((two.pid, again.pid))))
    with pytest.raises(kf.AttachError, match=f"2 VMs are called '{db}': pass the pid of one, {pids}") as caught:
        kf.attach(db)
    assert caught.value.errno == errno.ENOTUNIQ
    with pytest.raises(ValueError, match="the name of the guest is empty"):
        kf.attach("")


@pytest.mark.real_vm
def test_what_could_not_be_had_is_none_and_explained(resources):
    """A VMM that holds only its vCPUs' files, as QEMU 8.1 does: `vm` is None, and what would get it is said."""
    holder = resources.enter_context(Holder(hold="vcpus"))
    with kf.attach(holder.pid) as machine:
        assert machine.vm is None
        assert [file.vcpu_id for file in machine.vcpus] == [0, 1]
        text = machine.explain()
        assert text.startswith("the VM's file: python")
        assert [word in text for word in ("launch()", "hold-path", "send_files", "inject=True")] == [True] * 4
        x = kf.Sampler(machine).run(0, count=3)
        assert x["exits"].shape == (3, 2)


@pytest.mark.real_vm
def test_a_vmm_that_holds_nothing_is_refused_with_the_ways_there_are(resources):
    """So is a process without a VM, one that is not there, and this one's own pid is no special case."""
    holder = resources.enter_context(Holder(hold="nothing"))
    fds = open_fds()
    with pytest.raises(
        kf.AttachError, match=r"holds no stats files.*launch\(\).*QEMU 8\.1.*send_files.*inherited_files.*inject=True"
    ):
        kf.attach(holder.pid)
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        with pytest.raises(kf.AttachError, match=f"process {sleeper.pid} has no VM"):
            kf.attach(sleeper.pid)
        sleeper.kill()
    with pytest.raises(kf.VmGoneError):
        kf.attach(sleeper.pid)
    assert open_fds() == fds


@pytest.mark.real_vm
def test_refresh_adds_what_is_new_and_closes_what_the_vmm_closed(resources):
    """A file opened since is added, one closed since is closed here too; the others stay the same objects."""
    holder = resources.enter_context(Holder(hold="vcpus"))
    with kf.attach(holder.pid) as machine:
        first, last = machine.vcpus
        assert machine.refresh() is False
        assert machine.vcpus == (first, last)
        holder.do("files.pop().close()")
        assert machine.refresh() is True
        assert machine.vcpus == (first,)
        assert "vCPU 1's" in machine.explain()
        with pytest.raises(kf.AttachError, match="has closed this stats file"):
            last.read()
        holder.do("files += guest.open_stats()")
        assert machine.refresh() is True
        assert machine.vm is not None
        assert [file.vcpu_id for file in machine.vcpus] == [0, 1]
        assert machine.explain() == ""
        machine.vcpus[1].read()


@pytest.mark.real_vm
def test_the_number_of_a_file_that_refresh_closed_is_not_reused_at_once(resources):
    """A run may be about to read it: what is opened next must not be read in its place."""
    holder = resources.enter_context(Holder(hold="vcpus"))
    kf.attach(holder.pid).close()
    fds = open_fds()
    with kf.attach(holder.pid) as machine:
        number = machine.vcpus[-1].fileno()
        holder.do("files.pop().close()")
        assert machine.refresh()
        with Path(os.devnull).open() as another:
            assert another.fileno() != number
            assert Path(f"/proc/self/fd/{number}").readlink() == Path(os.devnull)
        assert not machine.refresh()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    assert open_fds() == fds


@pytest.mark.real_vm
@pytest.mark.parametrize("has_kcmp", [True, False])
def test_refresh_keeps_its_files_when_the_vmm_opens_them_once_more(holder, monkeypatch, has_kcmp):
    """Even at lower numbers, and where the kernel does not tell duplicates: a run goes on with what it has."""
    if not has_kcmp:
        for module in (borrowing, proc_module):
            monkeypatch.setattr(module, "lib", NoKcmp())
    with kf.attach(holder.pid) as machine:
        files = machine.files
        assert len(files) == 3
        holder.do("any(map(os.close, spare)); files += guest.open_stats()")
        assert machine.refresh() is False
        assert machine.files == files
        assert not any(file.closed for file in files)


# ---- when the VMM goes


@pytest.mark.real_vm
def test_files_are_closed_soon_after_the_vmm_is_gone(resources):
    """Within 100 ms, whether anybody looks or not; what is asked then says what happened. Tried up to ten times."""
    for attempt in range(10):
        holder = resources.enter_context(Holder())
        others = len(stats_fds())
        machine = kf.attach(holder.pid)
        assert len(stats_fds()) == others + 3
        holder.process.kill()
        holder.process.wait()
        gone = time.monotonic()
        assert until(lambda others=others: len(stats_fds()) == others)
        took = time.monotonic() - gone
        assert machine.alive is False
        for call in (machine.vcpus[0].read, machine.vm.snapshot, machine.refresh):
            with pytest.raises(kf.VmGoneError, match=rf"process {holder.pid} \(python.*has exited"):
                call()
        assert "has exited" in machine.explain()
        assert "gone" in repr(machine)
        machine.close()
        if took < 0.1:
            break
        assert attempt < 9, f"the last of ten tries took {took} s"


@pytest.mark.real_vm
def test_a_run_ends_with_what_was_sampled_when_the_only_vmm_goes(holder):
    """Samples up to there, and an error of each file that says why; strict raises it, with the samples."""
    with kf.attach(holder.pid) as machine:
        x = run_while(holder.process.kill, kf.Sampler(machine, "exits").run, 0.001, duration=60)
    assert 10 < len(x) < 30_000
    assert [type(error.error) for error in x.errors] == [kf.VmGoneError] * 2
    assert {info.pid for info in x.files} == {holder.pid}


@pytest.mark.real_vm
def test_a_strict_run_raises_when_the_vmm_goes(holder):
    """VmGoneError, with what was sampled."""
    with kf.attach(holder.pid) as machine, pytest.raises(kf.VmGoneError) as caught:
        run_while(holder.process.kill, kf.Sampler(machine, "exits").run, 0.001, duration=60, strict=True)
    assert len(caught.value.samples) > 10


@pytest.mark.real_vm
def test_the_other_vm_goes_on_without_a_gap_when_one_is_killed(resources):
    """A Sampler at 1 kHz over two VMs: kill -9 of one leaves the other's columns and every tick as they were."""
    one, other = resources.enter_context(Holder()), resources.enter_context(Holder())
    with kf.attach(one.pid) as first, kf.attach(other.pid) as second:
        sampler = kf.Sampler([first, second], "exits")
        killed = []

        def kill():
            other.do("guest.run(300, 0)")
            one.process.kill()
            killed.append(time.monotonic_ns())
            assert until(lambda: all(file.closed for file in first))
            other.do("guest.run(700, 0)")
            time.sleep(0.2)  # so there was a sweep since
            sampler.stop()

        x = run_while(kill, sampler.run, 0.001, count=30_000)
        assert x.interrupted
        assert len(stats_fds()) >= 3
        assert len(x) + x.missed >= x.tick[-1] + 1
        assert [x.files[error.file].pid for error in x.errors] == [one.pid] * 2
        last = int(x.time[x.errors[0].sweep])
        columns = [i for i, info in enumerate(x.columns("exits")) if info.pid == other.pid]
        assert (np.diff(x["exits"][:, columns].astype(np.int64), axis=0) >= 0).all()
        assert x.delta("exits")[:, columns].sum() >= 1000
        assert np.isfinite(x.rate("exits")[:, columns]).all()
        assert last > killed[0] - 10**7
        assert first.alive is False
        assert second.alive is True
        assert all(file.closed for file in first)


@pytest.mark.real_vm
def test_a_sampler_keeps_its_virtual_machine(holder):
    """Nobody else has to: the watch over the VMM does not end with the name of the machine."""
    sampler = kf.Sampler([kf.attach(holder.pid)], "exits")
    x = run_while(holder.process.kill, sampler.run, 0.001, duration=60)
    assert len(x.errors) == 2
    sampler._live.plan.files[0].handle.owner.machine.close()


@pytest.mark.real_vm
def test_a_forked_child_leaves_the_parents_watch_alone(holder):
    """A child that attaches and goes away disturbs nothing; it watches for itself."""
    with kf.attach(holder.pid) as machine:

        def work():
            own = kf.attach(holder.pid)
            os.kill(holder.pid, signal.SIGKILL)
            assert until(lambda: own.vm.closed)

        assert exit_status(forked(work)) == 0
        assert until(lambda: machine.vm.closed)


@pytest.mark.real_vm
def test_many_machines_that_come_and_go_leave_nothing(resources):
    """Fifty times attached and closed, a kill among them: no fd, and one thread."""
    holder = resources.enter_context(Holder())
    with kf.attach(holder.pid):
        pass
    fds, threads = open_fds(), threading.active_count()
    for _ in range(50):
        kf.attach(holder.pid).close()
    assert (open_fds(), threading.active_count()) == (fds, threads)
    machine = kf.attach(holder.pid)
    holder.process.kill()
    assert until(lambda: all(file.closed for file in machine))
    machine.close()
    assert open_fds() == fds


@pytest.mark.real_vm
def test_a_machine_that_was_dropped_leaves_nothing(holder):
    """No fd; and when its VMM exits afterwards, the watch does not run in circles over it."""
    kf.attach(holder.pid).close()
    fds = open_fds()
    machine = kf.attach(holder.pid)
    del machine
    with pytest.warns(ResourceWarning, match="unclosed <StatsFile"):
        gc.collect()
    assert open_fds() == fds
    used, began = time.process_time(), time.monotonic()
    holder.end()
    time.sleep(0.3)
    assert time.process_time() - used < (time.monotonic() - began) / 2


@pytest.mark.real_vm
def test_the_files_alone_keep_the_watch(holder):
    """Whoever keeps only some of the files has them closed at the end of the VMM too."""
    file = kf.attach(holder.pid).vcpus[1]
    gc.collect()
    holder.process.kill()
    assert until(lambda: file.closed)
    with pytest.raises(kf.VmGoneError, match="has exited"):
        file.read()


@pytest.mark.real_vm
def test_files_are_closed_when_no_other_may_be_opened(resources):
    """A VMM that exits while this process has as many files open as it may; the watch goes on to the next."""
    holders = [resources.enter_context(Holder()) for _ in range(2)]
    machines = [resources.enter_context(kf.attach(holder.pid)) for holder in holders]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    with ExitStack() as full:
        full.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        with suppress(OSError):
            while True:
                full.callback(os.close, os.dup(0))
        for holder, machine in zip(holders, machines, strict=True):
            holder.process.kill()
            assert until(lambda machine=machine: all(file.closed for file in machine), 5)


@pytest.mark.real_vm
def test_an_attach_that_fails_half_way_leaves_nothing(holder, monkeypatch):
    """Whatever fails behind the borrowing: the look at the process, its end, or the watch."""
    kf.attach(holder.pid).close()
    fds = open_fds()

    def fails(*_):
        raise OSError(errno.EMFILE, "too many")

    for where, what in ((machine_module, "describe"), (machine_module.WATCHER, "add")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, fails)
            with pytest.raises(OSError, match=r"(?i)too many"):
                kf.attach(holder.pid)
        assert open_fds() == fds

    def exits(*arguments):
        about = describe(*arguments)
        holder.process.kill()
        holder.process.wait()
        return about

    describe = machine_module.describe
    monkeypatch.setattr(machine_module, "describe", exits)
    with pytest.raises(kf.VmGoneError):
        kf.attach(holder.pid)
    assert open_fds() == fds


@pytest.mark.real_vm
def test_a_machine_that_is_closed_while_it_is_refreshed_stays_closed(holder, monkeypatch):
    """As a signal handler may do: refresh says so, and what it had borrowed is closed."""
    machine = kf.attach(holder.pid)
    links, borrow = len(stats_fds()), machine_module.borrow

    def closing(*arguments, **_):
        files = borrow(*arguments)
        machine.close()
        return files

    monkeypatch.setattr(machine_module, "borrow", closing)
    with pytest.raises(ValueError, match="is closed"):
        machine.refresh()
    assert len(stats_fds()) == links - 3
    assert all(file.closed for file in machine)


@pytest.mark.real_vm
def test_the_watch_does_not_mix_up_reused_numbers(resources):
    """A machine whose pidfd has the number of one whose VMM has just exited lives on."""
    one, other = resources.enter_context(Holder(1)), resources.enter_context(Holder(1))
    first, second = kf.attach(one.pid), resources.enter_context(kf.attach(other.pid))
    number = first._watched.process.fileno()
    with WATCHER.lock:
        one.end()
        time.sleep(0.05)  # the watcher has heard of it, and waits for the lock
        first.close()
        taken = []
        while (again := proc_module.Process.hold(other.pid)).fileno() != number:
            taken.append(again)
        second._watched.close()
        second._watched.process = again
        WATCHER.add(second._watched)
    time.sleep(0.05)
    assert second.alive
    second.vm.read()
    other.process.kill()
    assert until(lambda: second.vm.closed)


# ---- launch


@pytest.mark.real_vm
@needs_qemu
def test_a_launched_qemu_is_sampled_through_its_boot(tmp_path):
    """All five files, from the firmware's first exits on; its end ends the run."""
    command, path = arguments(tmp_path)
    with kf.launch([*command, "-name", "guest=first"], vcpus=4, stderr=subprocess.DEVNULL) as machine:
        try:
            assert (machine.how, machine.name, machine.vmm) == ("launch", "first", "qemu-system-x86_64")
            assert machine.vm is not None
            assert [file.vcpu_id for file in machine.vcpus] == [0, 1, 2, 3]
            x = kf.Sampler(machine).run(0.001, duration=0.5)
            assert not x.errors
            assert x.vcpu.delta("exits").any()
            assert {(info.pid, info.name) for info in x.files} == {(machine.pid, "first")}
            assert [file.pid for file in x.files] == [machine.process.pid] * 5
            monitor = Qmp(path, machine.process)
            monitor("quit")
            monitor.close()
            x = kf.Sampler(machine, "exits").run(0.001, duration=60)
            assert len(x.errors) == 4
        finally:
            machine.process.kill()
            machine.process.wait()


@pytest.mark.real_vm
@needs_qemu
def test_vcpus_that_are_plugged_in_later_are_added(tmp_path):
    """device_add, then refresh."""
    command, path = arguments(tmp_path, "-smp", "1,maxcpus=2")
    with kf.launch(command, vcpus=1, stderr=subprocess.DEVNULL) as machine:
        monitor = Qmp(path, machine.process)
        try:
            free = next(cpu for cpu in monitor("query-hotpluggable-cpus") if "qom-path" not in cpu)
            monitor("device_add", driver=free["type"], id="later", **free["props"])
            assert until(machine.refresh)
            assert [file.vcpu_id for file in machine.vcpus] == [0, 1]
            machine.vcpus[1].read()
        finally:
            monitor.close()
            machine.process.kill()
            machine.process.wait()


def test_a_program_that_makes_no_vm_is_ended_and_said_so():
    """One that exits, one that goes on without a VM: nothing of it is left."""
    with pytest.raises(kf.VmGoneError, match="exited with status 3 before it had made a VM"):
        kf.launch([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(kf.VmGoneError, match=r"exited with status 0 \(one that goes into the background"):
        kf.launch([sys.executable, "-c", ""])
    for number, then in (
        (signal.SIGKILL, "before"),
        (signal.SIGSYS, r"\(a seccomp filter that does not know KVM_GET_"),
    ):
        with pytest.raises(kf.VmGoneError, match=rf"was killed by signal {number:d} {then}"):
            kf.launch([sys.executable, "-c", f"import os; os.kill(os.getpid(), {number:d})"])
    fds = open_fds()
    with pytest.raises(kf.AttachError, match=r"made no VM with a vCPU in 0\.3 s, and was killed.*-accel kvm") as caught:
        kf.launch([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3, stdout=subprocess.PIPE)
    pid = int(str(caught.value).split("(process ")[1].split(")")[0])
    assert not Path(f"/proc/{pid}").exists()
    assert open_fds() == fds


@pytest.mark.real_vm
def test_a_vmm_that_could_not_hold_its_files_is_not_said_to_have_made_no_vm(capsys):
    """One that may not open an fd where the hold library would put it: what was made is told from what is held."""
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n" + VMM
    with pytest.raises(kf.AttachError, match=r"has made 1 vCPUs, of which it holds the stats files of 0, .*ulimit -n"):
        kf.launch([*QUICKLY, code + "time.sleep(60)"], timeout=2)
    assert main(["run", "--", *QUICKLY, code]) == 0
    assert "the hold library could not keep the files" in capsys.readouterr().err


@pytest.mark.real_vm
def test_launch_counts_vcpus_and_not_their_files():
    """A VMM that opens its vCPU's file itself, as QEMU 8.1 does, has a vCPU with two files; a bad number is refused."""
    code = VMM + "stats = fcntl.ioctl(vcpu, 0xAECE)  # KVM_GET_STATS_FD\ntime.sleep(60)"
    with pytest.raises(kf.AttachError, match="1 of 2 vCPUs"):
        kf.launch([*QUICKLY, code], vcpus=2, timeout=2)
    with kf.launch([*QUICKLY, code], vcpus=1) as machine, machine.process as process:
        process.kill()
    for name, values in (("vcpus", ("2", [1], 1.5)), ("timeout", ("2", [1], None))):
        for value in values:
            with pytest.raises(TypeError, match=rf"{name} is an? \w+; it must be a (whole )?number"):
                kf.launch([sys.executable, "-c", code], **{name: value})
    with pytest.raises(TypeError, match="timeout is a str; it must be a number of seconds"):
        kf.attach(os.getpid(), inject=True, timeout="2")
    with pytest.raises(ValueError, match="vcpus is 0"):
        kf.launch([sys.executable, "-c", code], vcpus=0)


@pytest.mark.real_vm
@needs_qemu
def test_a_static_program_is_not_started(tmp_path):
    """It would not load the library: refused before it runs."""
    source, program, ran = tmp_path / "a.c", tmp_path / "a", tmp_path / "ran"
    source.write_text(f'#include <stdio.h>\nint main(void) {{ return !fopen("{ran}", "w"); }}\n')
    subprocess.run(["gcc", "-static", source, "-o", program], check=True)
    with pytest.raises(kf.AttachError, match="statically linked"):
        kf.launch([program])
    assert not ran.exists()


# ---- injection, behind the same door


@pytest.mark.real_vm
@needs_qemu
def test_attach_with_inject_has_everything_and_the_next_only_borrows(tmp_path, resources):
    """What QEMU does not hold its threads open, afterwards it is there; the VM runs on.

    Before 8.1 it holds nothing, from then on its vCPUs' files, which are had without injection.
    """
    process, monitor = plain_qemu(tmp_path, resources, *firmware(tmp_path))
    assert until(lambda: monitor.word(0x7000), 30)
    if HOLDS_VCPUS:
        with kf.attach(process.pid) as machine:
            assert (machine.how, machine.vm) == ("borrow", None)
            assert [file.vcpu_id for file in machine.vcpus] == [0, 1, 2, 3]
            assert "the VM's file" in machine.explain()
    else:
        with pytest.raises(kf.AttachError, match="holds no stats files"):
            kf.attach(process.pid)
    with kf.attach(process.pid, inject=True, timeout=30) as machine:
        assert machine.how == "inject", machine.explain()
        assert machine.vm is not None
        assert [file.vcpu_id for file in machine.vcpus] == [0, 1, 2, 3]
        counted = monitor.word(0x7000)
        assert until(lambda: monitor.word(0x7000) > counted)
        assert monitor("query-status")["status"] == "running"
    with kf.attach(process.pid, inject=True) as again:
        assert again.how == "borrow"
        assert len(again.files) == 5


@pytest.mark.real_vm
def test_a_vmm_that_cannot_be_seen_yet_is_waited_for(monkeypatch):
    """As between its fork and its start: that is no VM without files."""
    kvm_files, refused = Process.kvm_files, []

    def be_hidden(process):
        if len(refused) < 3:
            refused.append(process.pid)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return kvm_files(process)

    monkeypatch.setattr(Process, "kvm_files", be_hidden)
    with kf.launch([*QUICKLY, VMM + "time.sleep(60)"], vcpus=1) as machine, machine.process as process:
        assert len(refused) == 3
        assert [file.vcpu_id for file in machine.vcpus] == [0]
        process.kill()


@pytest.mark.real_vm
def test_a_process_whose_threads_may_not_be_seen_has_no_known_ones(holder, monkeypatch):
    """The error names their folder; what is read of the VM is read on."""

    def refuse(process):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{process.folder}/task")

    with kf.attach(holder.pid) as machine:
        monkeypatch.setattr(Process, "threads", refuse)
        with pytest.raises(kf.AttachError, match=rf"reading /proc/{holder.pid}/task") as caught:
            machine.threads  # noqa: B018 - it raises
        assert caught.value.errno == errno.EACCES
        machine.vm.read()


@pytest.mark.real_vm
def test_a_process_with_several_vms_is_explained(resources):
    """Whose vCPU is whose nobody can know: `vm` is None, and the files are all there."""
    vmm = resources.enter_context(Holder(1, before="more = TinyGuest(1); held = more.open_stats()"))
    with kf.attach(vmm.pid) as machine:
        assert (machine.vm, len(machine.files)) == (None, 4)
        assert f"process {vmm.pid} has 2 VMs: their files are in `files`" in machine.explain()
