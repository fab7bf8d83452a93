"""follow: VMs and vCPUs that come and go, on one schedule; whom it leaves alone; and how it ends."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import exit_status, forked, kernel_threads, open_fds, watchdog
from holder import Holder
from nursery import Nursery
from qemu import HOLDS_VCPUS, needs_qemu, plain_qemu, until

import kvmstats_fast as kf
from kvmstats_fast.sampling import follow as follow_module
from kvmstats_fast.testing import SyntheticStats
from kvmstats_fast.vmm import roster as roster_module
from kvmstats_fast.vmm.find import list_pids
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.roster import Roster

#: How many VMs are born and die; the whole proof is KVMSTATS_BIRTHS=200, which takes 30 s.
BIRTHS = int(os.environ.get("KVMSTATS_BIRTHS", "8"))
#: Names of guests that no other VM of the host has.
WEB, DB = (f"{name}-{os.getpid()}" for name in ("web", "db"))


@pytest.fixture(scope="module")
def living():
    """A VMM with two vCPUs, to which nothing happens."""
    with Holder() as vmm:
        yield vmm


def read_until(chunks, condition, seconds=30):
    """Read chunks until one fulfils a condition; all of them."""
    read, deadline = [], time.monotonic() + seconds
    for x in chunks:
        read.append(x)
        if condition(x):
            return read
        assert time.monotonic() < deadline, x.files
    return read


def pids(x):
    """Of which processes samples are."""
    return {info.pid for info in x.files}


def check_accounts(chunks, read, interval):
    """All chunks of a follow that has ended: each tick was taken once, and no earlier than it was due, or counted."""
    tick = np.concatenate([x.tick for x in read]).astype(np.int64)
    times = np.concatenate([x.time for x in read])
    assert (np.diff(tick) > 0).all()
    due = tick * round(interval * 1e9)
    assert ((times - due) >= times[0] - due[0] - interval * 1e9).all()
    missed = sum(x.missed for x in read)
    assert (missed, sum(x.overruns for x in read)) == (chunks.missed, chunks.overruns)
    assert len(tick) + missed + chunks.idle >= tick[-1] + 1


# ---- who comes and goes


class Looks:
    """Records when a follow looked at the host, and what it was attached to then."""

    def __init__(self, monkeypatch):
        self.all = []  # (begin, end, pids)
        update = Roster.update

        def record(roster, meanwhile):
            begin = time.monotonic_ns()
            update(roster, meanwhile)
            self.all.append((begin, time.monotonic_ns(), {machine.pid for machine in roster.machines.values()}))

        monkeypatch.setattr(Roster, "update", record)


@pytest.mark.real_vm
def test_no_vm_is_overlooked_and_no_tick_lost_while_many_are_born_and_die(monkeypatch, resources):
    """Each look takes up every VM that holds its files; each is sampled; ticks are taken or counted; no fd stays."""
    nursery = resources.enter_context(Nursery())
    seconds, rescan = BIRTHS * 0.15, 1.0 if BIRTHS >= 100 else 0.1
    first = nursery.bear()[0]
    kf.attach(first).close()  # the watch has an fd of its own
    fds, threads = open_fds(), kernel_threads()
    looks = Looks(monkeypatch)
    held, dead = {first: time.monotonic_ns()}, {}
    rng = random.Random(1)

    def live():
        begin = time.monotonic()
        for number in range(BIRTHS):
            time.sleep(max(begin + number * seconds / BIRTHS - time.monotonic(), 0))
            pid, at = nursery.bear(rng.choice([1, 1, 2]))
            held[pid] = at
            if number >= min(BIRTHS // 2, 20):
                old = rng.choice(nursery.alive)
                dead[old] = time.monotonic_ns()
                nursery.kill(old)
        while nursery.alive:
            dead[nursery.alive[0]] = time.monotonic_ns()
            nursery.kill(nursery.alive[0])

    thread = threading.Thread(target=live)
    count = round((seconds + 3 * rescan) * 1000)
    with kf.follow(nursery.name, interval=0.001, stats="exits", rescan=rescan, count=count) as chunks:
        thread.start()
        read = list(chunks)
    thread.join()
    assert (open_fds(), kernel_threads()) == (fds, threads)

    check_accounts(chunks, read, 0.001)
    assert sum(map(len, read)) + chunks.missed + chunks.idle == count
    sampled = {}
    for x in read:
        for pid in pids(x) - {error.file for error in x.errors}:
            sampled.setdefault(pid, int(x.time[0]))
    unseen = []
    for pid, at in held.items():
        while_alive = [look for look in looks.all if at < look[0] and look[1] < dead[pid]]
        assert all(pid in attached for _, _, attached in while_alive)
        if while_alive[1:]:  # it was there until the next look, and so long was sampled
            unseen.append((sampled[pid] - at) / 1e9)
    assert set(sampled) <= set(held)
    if BIRTHS >= 100:
        between = np.diff([begin for begin, _, _ in looks.all]).max() / 1e9
        text = f"{len(held)} VMs, {len(looks.all)} looks at most {between:.3f} s apart, first sampled after "
        text += f"{np.median(unseen):.3f} s, at most {max(unseen):.3f} s; {chunks.missed} of {count} ticks missed"
        print(text)  # noqa: T201 - for who runs the whole proof


@pytest.mark.real_vm
def test_a_vm_that_is_made_anew_keeps_its_label_and_a_vcpu_joins_it(resources):
    """One process: a vCPU comes, then another VM; every chunk has one set of files, and what went says why."""
    vmm = resources.enter_context(Holder(1, name=WEB))
    other = resources.enter_context(Holder(1, name=DB))
    with kf.follow([WEB, DB], interval=0.001, stats=["exits", "remote_tlb_flush"], rescan=0.1) as chunks:
        read = [next(chunks)]
        assert [str(info) for info in read[0].files] == [WEB, f"{WEB}/0", DB, f"{DB}/0"]
        vmm.do("guest.add_vcpu(); files.append(stats_of(guest.vcpu_fds[1]))")
        read += read_until(chunks, lambda x: len(x.files) == 5)
        assert [str(info) for info in read[-1].files] == [WEB, *(f"{WEB}/{i}" for i in range(2)), DB, f"{DB}/0"]
        machine = chunks.machines[WEB]
        vmm.do("[file.close() for file in files]; guest.close()")
        vmm.do("guest = TinyGuest(3); files = guest.open_stats()")
        read += read_until(chunks, lambda x: len(x.files) == 6)
        assert [str(info) for info in read[-1].files] == [WEB, *(f"{WEB}/{i}" for i in range(3)), DB, f"{DB}/0"]
        assert chunks.machines == {WEB: machine, DB: chunks.machines[DB]}
        other.end()
        fds = open_fds()
        read += read_until(chunks, lambda x: len(x.files) == 4)
        assert list(chunks.machines) == [WEB]
        assert chunks.refused == {}
        assert open_fds() == fds - 3  # two stats files and a pidfd
        chunks.stop()
        read += chunks
    check_accounts(chunks, read, 0.001)
    errors = {(x.files[e.file].vm, type(e.error), e.error.errno) for x in read for e in x.errors}
    assert errors <= {(WEB, kf.VmGoneError, errno.ENODEV), (DB, kf.VmGoneError, errno.ESRCH)}
    assert [n for n, _ in itertools.groupby(len(x.files) for x in read)] in ([4, 5, 6, 4], [4, 5, 2, 6, 4])
    assert all(file.closed for file in machine.files)


@pytest.mark.real_vm
def test_labels_tell_vms_of_one_name_apart_and_do_not_change(resources):
    """The first is "web" as long as it is there; the one that comes has its pid behind it; then the name is free."""
    first = resources.enter_context(Holder(1, name=WEB))
    with kf.follow(f"?{WEB[1:]}*", interval=0.01, rescan=0.05) as chunks:
        assert next(chunks).vms == (WEB,)
        second = resources.enter_context(Holder(1, name=WEB))
        x = read_until(chunks, lambda x: len(x.vms) == 2)[-1]
        assert x.vms == (WEB, f"{WEB} (pid {second.pid})")
        assert {info.vm for info in x.files if info.pid == first.pid} == {WEB}
        first.end()
        assert read_until(chunks, lambda x: len(x.vms) == 1)[-1].vms == (f"{WEB} (pid {second.pid})",)
        third = resources.enter_context(Holder(1, name=WEB))
        x = read_until(chunks, lambda x: len(x.vms) == 2)[-1]
        assert {info.vm for info in x.files if info.pid == third.pid} == {WEB}


@pytest.mark.real_vm
def test_files_of_a_process_with_several_vms_have_labels_of_their_own(resources):
    """Nothing says which vCPU is of which VM; the labels are in every chunk the same."""
    vmm = resources.enter_context(Holder(1, before="more = TinyGuest(1); held = more.open_stats()"))
    with kf.follow(vmm.pid, interval=0.001, rescan=0.05) as chunks:
        x = next(chunks)
        assert x.vms == tuple(f"pid {vmm.pid} (file {i})" for i in range(4))
        vmm.do("[file.close() for file in held]; more.close()")
        assert read_until(chunks, lambda x: len(x.files) == 2)[-1].vms == (f"pid {vmm.pid}",)


@pytest.mark.real_vm
@needs_qemu
def test_qemus_that_hold_nothing_are_injected_also_when_a_vcpu_is_plugged_in(tmp_path, resources):
    """Two, one of which ends; without inject=True they are refused, and what a QEMU lacks is said."""
    more = "-smp", "1,maxcpus=2", "-name"
    (one, monitor), (two, _) = (plain_qemu(tmp_path, resources, *more, f"guest={WEB}.{i}") for i in range(2))
    if not HOLDS_VCPUS:
        with kf.follow(f"{WEB}.*", duration=0.01) as chunks:
            assert list(chunks) == []
            assert set(chunks.refused) == {one.pid, two.pid}
            assert "holds no stats files" in chunks.refused[one.pid]
    stats = ["exits", "remote_tlb_flush"]
    with kf.follow(f"{WEB}.*", 0.002, stats, rescan=0.1, inject=True, timeout=30) as chunks:
        x = read_until(chunks, lambda x: len(x.files) == 4)[-1]
        assert sorted(map(str, x.files)) == [f"{WEB}.0", f"{WEB}.0/0", f"{WEB}.1", f"{WEB}.1/0"]
        free = next(cpu for cpu in monitor("query-hotpluggable-cpus") if "qom-path" not in cpu)
        monitor("device_add", driver=free["type"], id="later", **free["props"])
        x = read_until(chunks, lambda x: len(x.files) == 5)[-1]
        assert f"{WEB}.0/1" in map(str, x.files)
        assert chunks.machines[f"{WEB}.0"].explain() == ""
        two.kill()
        assert read_until(chunks, lambda x: len(x.files) == 3)[-1].vms == (f"{WEB}.0",)
    assert one.poll() is None


# ---- who is wanted


@pytest.mark.real_vm
def test_names_globs_and_pids_choose(resources):
    """Mixed as one likes; a pid is that process and no later one. Where only pids were given, their end is the end."""
    web, db, none = (resources.enter_context(Holder(1, name=name)) for name in (WEB, DB, None))
    with kf.follow([f"{WEB[:-1]}*", none.pid], 0.001, "exits") as chunks:
        assert {info.pid for info in next(chunks).files} == {web.pid, none.pid}
    with kf.follow(f"??{DB[2:]}", 0.001, "exits") as chunks:
        assert next(chunks).vms == (DB,)
    with kf.follow(none.pid, 0.001, "exits", rescan=0.05) as chunks:
        assert next(chunks).vms == (f"pid {none.pid}",)
        none.end()
        assert {type(e.error) for x in chunks for e in x.errors} <= {kf.VmGoneError}
    with pytest.raises(kf.VmGoneError, match=f"no process {none.pid}|has ended"), kf.follow([db.pid, none.pid]):
        pytest.fail("it has ended")
    db.do("2 + 2")


def test_a_pid_that_was_handed_out_anew_is_another_process():
    """What was asked for is the process that had the pid then; the next one that has it is not followed."""
    asked = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Roster(asked.pid, inject=False, timeout=2.0) as roster:
        seen = kf.VmProcess(asked.pid, "qemu", "", 0, 1, (0,), (), 4711, True, "")
        assert roster._wants(seen)
        assert not roster.has_ended
        asked.communicate()
        assert not roster._wants(seen)
        assert roster.has_ended


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (1.5, TypeError, "names is a float; it must be a name or glob of guests, a pid, or several of these"),
        ([True], TypeError, "names has a bool"),
        (b"web", TypeError, "names is a bytes; it must be"),
        ([], ValueError, "names is empty; leave it out"),
        ("", ValueError, "names has an empty name"),
        (0, ValueError, "0 is not a pid"),
    ],
)
def test_names_of_a_wrong_type_are_named(names, error, message):
    """One sentence, with what they must be."""
    with pytest.raises(error, match=message), kf.follow(names):
        pytest.fail("taken")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"interval": -1}, ValueError, "interval is -1"),
        ({"rescan": 0}, ValueError, "rescan is 0; it must be more than 0 seconds"),
        ({"rescan": "1"}, TypeError, "rescan is a str"),
        ({"stats": 5}, TypeError, "stats is an int"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
        ({"depth": 0}, ValueError, "depth is 0"),
        ({"threads": 0}, ValueError, "threads is 0"),
        ({"timeout": 0}, ValueError, "timeout is 0"),
        ({"wait": "busy"}, ValueError, "wait is 'busy'"),
    ],
)
def test_a_wrong_argument_is_an_error_at_once(wrong, error, message):
    """Before anything is opened."""
    with pytest.raises(error, match=message):
        kf.follow(**wrong)


@pytest.mark.real_vm
def test_a_process_without_a_vm_is_waited_for(resources):
    """By its pid; refused says so, and when it makes one, that is sampled."""
    vmm = resources.enter_context(Holder(1))
    vmm.do("[file.close() for file in files]; guest.close()")
    with kf.follow(vmm.pid, 0.001, "exits", rescan=0.05) as chunks:
        assert chunks.refused == {vmm.pid: "it has no VM; if it makes one, that is followed"}
        threading.Timer(0.1, vmm.do, ["guest = TinyGuest(1); files = guest.open_stats()"]).start()
        assert pids(next(chunks)) == {vmm.pid}
        assert chunks.refused == {}
        assert chunks.idle > 10
        assert chunks.missed < chunks.idle + 1000


@pytest.mark.real_vm
def test_a_vmm_that_gives_its_vm_up_is_let_go_of(resources):
    """It runs on, and is taken up again when it makes one."""
    vmm = resources.enter_context(Holder(1, name=WEB))
    with Roster(WEB, inject=False, timeout=2.0) as roster:
        for is_there in (True, False, True):
            roster.update(lambda: None)
            assert [machine.pid for machine in roster.machines.values()] == [vmm.pid] * is_there
            if is_there:
                vmm.do("[file.close() for file in files]; guest.close()")
            else:
                vmm.do("guest = TinyGuest(1); files = guest.open_stats()")


@pytest.mark.real_vm
def test_a_vmm_that_was_refused_is_tried_again_when_it_has_changed_and_not_before(monkeypatch, resources):
    """A VMM is not bothered each second; what it opens later is taken up at the next look."""
    vmm = resources.enter_context(Holder(1, hold="nothing"))
    attempts = []
    attach = roster_module.attach
    monkeypatch.setattr(roster_module, "attach", lambda *a, **k: (attempts.append(a), attach(*a, **k))[1])
    looks = Looks(monkeypatch)
    with kf.follow(vmm.pid, 0.001, "exits", rescan=0.02) as chunks:
        assert "holds no stats files" in chunks.refused[vmm.pid]
        assert not chunks.refused[vmm.pid].startswith("[Errno")

        def open_later():
            assert until(lambda: len(looks.all) > 4)
            vmm.do("files = guest.open_stats()")

        threading.Thread(target=open_later).start()
        assert pids(next(chunks)) == {vmm.pid}
    assert len(looks.all) > len(attempts) == 2


@pytest.mark.real_vm
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="a kernel without CONFIG_SCHED_INFO")
def test_what_has_not_changed_is_not_looked_at_again(monkeypatch, resources):
    """Neither the files of a process that has not run, nor a VM that is not wanted; what they do is seen at once."""
    other = resources.enter_context(Holder(1, name=DB))
    vmm = resources.enter_context(Holder(1, name=WEB))
    vmm.do("[file.close() for file in files]; guest.close()")
    listed, described = [], []
    kvm_files, look_at = Process.kvm_files, roster_module.look_at
    monkeypatch.setattr(Process, "kvm_files", lambda self: (listed.append(self.pid), kvm_files(self))[1])
    monkeypatch.setattr(roster_module, "look_at", lambda process: (described.append(process.pid), look_at(process))[1])

    def look():
        turns = []
        roster.update(lambda: turns.append(0))
        assert len(turns) >= len(list_pids()) - 20  # as many as there were, a few more or less
        return [listed.count(vmm.pid), described.count(other.pid)]

    with Roster(WEB, inject=False, timeout=2.0) as roster:
        before = look()
        assert until(lambda: look() == look())  # it may have run a little when it was first looked at
        assert before == [1, 1]
        vmm.do("guest = TinyGuest(1); files = guest.open_stats()")
        other.do("files += guest.open_stats()")
        last = look()
        assert [machine.pid for machine in roster.machines.values()] == [vmm.pid]
        assert last[1] == 2


@pytest.mark.real_vm
@pytest.mark.usefixtures("stats")
def test_neither_itself_nor_a_monitor_nor_a_forked_child_is_followed(resources):
    """A monitor that has the VM's fd in its hands, to mark it, and a child that was forked by the VMM, keep nothing."""
    monitor = (
        "import sys, time; import kvmstats_fast as kf\n"
        "machine = kf.attach(int(input())); process = machine._watched.process\n"
        "taken = [process.take(file.fd) for file in process.kvm_files() if not file.is_stats]\n"
        "print('ready', flush=True); time.sleep(1000)"
    )
    process = resources.enter_context(
        subprocess.Popen([sys.executable, "-c", monitor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    resources.callback(process.kill)
    vmm = resources.enter_context(Holder(1))  # younger than its monitor
    print(vmm.pid, file=process.stdin, flush=True)
    assert process.stdout.readline() == "ready\n"
    assert vmm.pid in Process(process.pid).held_pids()
    vmm.do("child = os.fork() or __import__('time').sleep(1000)")
    child = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == vmm.pid)
    resources.callback(os.kill, child, signal.SIGKILL)
    assert {vmm.pid, process.pid, child, os.getpid()} <= {one.pid for one in kf.find_vms()}
    for names in (None, [process.pid, vmm.pid, child, os.getpid()]):
        with kf.follow(names, 0.001, "exits", rescan=0.05) as chunks, watchdog(60):
            for number, x in enumerate(chunks):
                assert vmm.pid in pids(x)
                assert not pids(x) & {process.pid, child, os.getpid()}
                if number >= 2 and set(chunks.refused) >= {process.pid, child}:  # each was looked at
                    break
            assert chunks.refused.get(os.getpid(), "it is this process") == "it is this process"
            assert f"its VM is that of process {vmm.pid}" in chunks.refused[child]


def _parent(folder):
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


# ---- which statistics


@pytest.fixture
def choose(resources):
    """The choice of statistics, asked about files of these kinds in turn."""

    def choose(patterns, *kinds):
        choice = follow_module.Choice(patterns)
        made = {kind: resources.enter_context(SyntheticStats(kind=kind).open()) for kind in ("vm", "vcpu")}
        return [choice.of([made[kind] for kind in some]) for some in kinds]

    return choose


VM, VCPU, BOTH = ["vm"], ["vcpu"], ["vm", "vcpu"]


def test_a_statistic_need_not_be_in_every_set_of_files(choose):
    """An agent does not fail because the VMs of a kind have gone; nor because none has come yet."""
    assert choose(("exits", "remote_*"), BOTH, VM, VCPU) == [("remote_*", "exits"), ("remote_*",), ("exits",)]
    assert choose(("exits", "remote_*"), VCPU, VM, BOTH) == [("exits",), ("remote_*",), ("remote_*", "exits")]
    assert choose(None, VM) == [None]
    assert choose(("exits",), VCPU, VM) == [("exits",), ()]


def test_a_statistic_that_is_nowhere_is_an_error_as_soon_as_that_is_known(choose):
    """Once files of both kinds were seen; or at once, if nothing would be sampled for ever."""
    with pytest.raises(KeyError, match="no statistic 'exists' in the files of these VMs; did you mean exits"):
        choose(("exists",), VCPU)
    with pytest.raises(KeyError, match="exists"):
        choose(("exits", "exists"), VCPU, BOTH)
    assert choose(("exits", "exists"), VCPU, VCPU) == [("exits",)] * 2


@pytest.mark.real_vm
def test_what_no_statistic_is_called_is_told_where_the_block_begins(living):
    """As Sampler tells it; nothing stays open."""
    kf.attach(living.pid).close()
    fds = open_fds()
    with pytest.raises(KeyError, match="exists"), kf.follow(living.pid, stats="exists"):
        pytest.fail("found")
    assert open_fds() == fds


# ---- how it ends


@pytest.mark.real_vm
def test_without_a_vm_it_waits_until_its_end():
    """The schedule's end, or a stop by another thread; no chunk of no files is given."""
    with kf.follow("no-such-guest", 0.001, duration=0.05) as chunks:
        assert list(chunks) == []
        assert (chunks.idle, chunks.missed) == (50, 0)
    with kf.follow("no-such-guest", 0, duration=0.05) as chunks:
        assert list(chunks) == []
    with kf.follow("no-such-guest", 600, rescan=600) as chunks:
        threading.Timer(0.1, chunks.stop).start()
        with watchdog(60):
            assert list(chunks) == []
    chunks.stop()  # too late to matter


@pytest.mark.real_vm
def test_on_look_is_called_after_each_look_also_while_no_chunk_comes(resources):
    """When it is, what is refused is that of this look."""
    vmm = resources.enter_context(Holder(1))
    vmm.do("[file.close() for file in files]; guest.close()")
    seen = []
    with kf.follow(vmm.pid, 0.001, rescan=0.02, duration=0.5) as chunks:
        chunks.on_look = lambda: seen.append(chunks.refused)
        assert list(chunks) == []
    assert 2 < len(seen) <= 26
    assert all(vmm.pid in refused for refused in seen)


@pytest.mark.real_vm
@pytest.mark.parametrize("interval", [0.001, 60])
def test_stop_ends_it_from_another_thread_and_what_it_has_can_be_read(living, interval):
    """In the middle of a wait for the next chunk or the next look; the ticks add up."""
    threads = threading.active_count()
    with kf.follow(living.pid, interval, "exits", rescan=60) as chunks:
        read = [next(chunks)]
        threading.Timer(0.05, chunks.stop).start()
        read += chunks
        with pytest.raises(StopIteration):
            next(chunks)
        check_accounts(chunks, read, interval)
    assert threading.active_count() <= threads + 1  # the watch of VMMs, if it had not been started


@pytest.mark.real_vm
def test_ticks_that_are_missed_after_the_last_sweep_are_told(living):
    """Samples without a sweep have them at the end, so that what was read adds up."""
    with kf.follow(living.pid, interval=0.001, chunk=1, depth=1) as chunks:
        assert until(lambda: chunks.overruns)
        chunks.stop()
        read = list(chunks)
    assert len(read[-1]) == 0
    check_accounts(chunks, read, 0.001)


@pytest.mark.real_vm
def test_chunks_that_overlap_begin_where_the_last_one_ended(living):
    """With overlap=True the last sweep of a chunk is also the first of the next; without, none is there twice."""
    for overlap in (True, False):
        with kf.follow(living.pid, interval=0.001, chunk=1, count=100, overlap=overlap) as chunks:
            sweeps = [x.tick.tolist() for x in chunks if len(x)]
        assert [before[-1] == after[0] for before, after in itertools.pairwise(sweeps)] == [overlap] * (len(sweeps) - 1)


def test_it_runs_once_in_its_block():
    """Outside it there is nothing to read or to stop."""
    chunks = kf.follow("no-such-guest", duration=0.01)
    for call in (chunks.stop, lambda: next(chunks)):
        with pytest.raises(RuntimeError, match="a follow starts where its `with` block begins"):
            call()
    assert "not begun" in repr(chunks)
    with chunks:
        assert "0 VMs, 0 refused" in repr(chunks)
    with pytest.raises(RuntimeError, match="a follow runs once"), chunks:
        pytest.fail("it began")


@pytest.mark.real_vm
def test_an_exception_of_the_caller_leaves_nothing(living):
    """Neither an fd nor a thread, in the middle of a change too."""
    kf.attach(living.pid).close()
    fds, threads = open_fds(), kernel_threads()
    with pytest.raises(ZeroDivisionError), kf.follow(living.pid, 0.001, rescan=0.01) as chunks:
        _ = len(next(chunks)) / 0
    assert (open_fds(), kernel_threads()) == (fds, threads)


@pytest.mark.real_vm
def test_it_stays_in_the_parent_when_the_process_forks(living):
    """The child is told so, with VMs and without, and can end the block; the parent reads on."""
    with kf.follow(living.pid, 0.001, "exits") as chunks, kf.follow("no-such-guest", 600, rescan=600) as idle:
        next(chunks)

        def child():
            for one in (chunks, idle):
                with pytest.raises(RuntimeError, match=r"this .* stayed in the parent process"):
                    next(one)
                one.__exit__(None, None, None)

        assert exit_status(forked(child)) == 0
        assert len(next(chunks))


@pytest.mark.real_vm
def test_a_second_reader_is_refused(living):
    """One thread reads; another gets RuntimeError and takes nothing away."""
    with kf.follow(living.pid, 60, "exits") as chunks:
        read = [next(chunks)]
        thread = threading.Thread(target=lambda: read.extend(chunks))
        thread.start()
        assert until(lambda: not chunks._turn._free)
        with pytest.raises(RuntimeError, match="another thread is reading this follow; a follow has one reader"):
            next(chunks)
        chunks.stop()
        thread.join()


@pytest.mark.real_vm
def test_chunks_that_come_during_a_long_look_are_not_lost(living, monkeypatch):
    """While the host is looked at the run has room for more than its ring holds: what comes is taken out of that."""
    depth, looks = 8, []
    update = Roster.update

    def take_long(roster, meanwhile):
        looks.append(roster)
        if len(looks) == 2:
            assert until(lambda: meanwhile() or len(chunks._waiting) > 2 * depth)
        update(roster, meanwhile)

    monkeypatch.setattr(Roster, "update", take_long)
    with kf.follow(living.pid, 0.001, "exits", rescan=0.05, chunk=2, depth=depth) as chunks:
        read = read_until(chunks, lambda _: len(looks) > 2)
        chunks.stop()
        read += chunks
        check_accounts(chunks, read, 0.001)


def test_a_host_that_takes_long_to_look_at_is_looked_at_half_of_the_time(monkeypatch):
    """A look of 20 ms with rescan=1 ms is followed by 20 ms of reading."""
    begins = []

    def take_long(*_):
        begins.append(time.monotonic())
        time.sleep(0.02)

    monkeypatch.setattr(Roster, "update", take_long)
    with kf.follow("no-such-guest", 0.001, rescan=0.001, duration=0.4) as chunks:
        assert list(chunks) == []
    assert np.diff(begins).min() >= 0.04


# ---- what fails once


@pytest.mark.real_vm
def test_a_vm_for_which_no_file_was_free_is_tried_again(monkeypatch, living):
    """Though it has not changed: whoever has closed files meanwhile, it is followed then."""
    attach, attempts = roster_module.attach, []

    def be_full(*arguments, **options):
        attempts.append(arguments)
        if len(attempts) < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return attach(*arguments, **options)

    monkeypatch.setattr(roster_module, "attach", be_full)
    with kf.follow(living.pid, 0.001, "exits", rescan=0.02) as chunks:
        assert "Too many open files" in chunks.refused[living.pid]
        assert pids(next(chunks)) == {living.pid}
        assert not chunks.refused
    assert len(attempts) == 3


@pytest.mark.real_vm
def test_a_vm_that_cannot_be_refreshed_is_read_on(monkeypatch, resources):
    """With the files that are had; why is told until it can be."""
    vmm = resources.enter_context(Holder(1))

    def refuse(*_, **__):
        raise kf.AttachError(errno.EMFILE, "no file is free")

    with kf.follow(vmm.pid, 0.001, "exits", rescan=0.02) as chunks:
        next(chunks)
        with monkeypatch.context() as patch:
            patch.setattr(kf.VirtualMachine, "refresh", refuse)
            vmm.do("files += guest.open_stats()")
            read_until(chunks, lambda _: vmm.pid in chunks.refused)
            assert "no file is free" in chunks.refused[vmm.pid]
            assert pids(next(chunks)) == {vmm.pid}
        read_until(chunks, lambda _: vmm.pid not in chunks.refused)


@pytest.mark.real_vm
def test_a_process_that_took_a_pid_between_two_looks_is_not_the_one_that_was_seen(monkeypatch, living):
    """It is looked at anew, and followed if it is wanted, too."""
    look_at, seen = roster_module.look_at, []

    def see_another(process):
        look = look_at(process)
        if process.pid == living.pid:
            seen.append(process.pid)
            if len(seen) == 1:
                return look._replace(vms=replace(look.vms, start_time=1))
        return look

    monkeypatch.setattr(roster_module, "look_at", see_another)
    with Roster(living.pid, inject=False, timeout=2.0) as roster:
        roster.update(lambda: None)
        assert (roster.machines, roster.refusals) == ({}, {})
        living.do("2 + 2")
        roster.update(lambda: None)
        assert [machine.pid for machine in roster.machines.values()] == [living.pid]


def test_a_process_that_has_ended_meanwhile_is_not_refused():
    """Whether it may be attached to is no question any more."""
    process = subprocess.Popen(["true"])
    process.wait()
    assert roster_module._has_ended(process.pid)
    assert not roster_module._has_ended(os.getpid())


@pytest.mark.real_vm
def test_files_without_a_chosen_statistic_are_not_sampled(resources):
    """While there are no others nothing is; that is no error, and ends when one has it."""
    vmm = resources.enter_context(Holder(1))
    with kf.follow(vmm.pid, 0.001, "exits", rescan=0.02) as chunks:
        assert [info.kind for info in next(chunks).files] == ["vcpu"]
        vmm.do("files.pop().close()")

        def open_later():
            time.sleep(0.1)
            vmm.do("files += guest.open_stats()[1:]")

        opener = threading.Thread(target=open_later)
        opener.start()
        read_until(chunks, lambda x: chunks.idle and len(x.files) == 1)
        opener.join()
    with (
        pytest.warns(kf.SamplingWarning, match="nothing tells which thread"),
        kf.follow(vmm.pid, 0.001, "sched_*", sched=True, rescan=0.02, duration=0.1) as chunks,
    ):
        assert not list(chunks)


def gone_at_first(monkeypatch, module, name):
    """Have a function find, once, that the VM has just gone; return the arguments of that call."""
    function, gone = getattr(module, name), []

    def be_late(*arguments, **options):
        if not gone:
            gone.append(arguments)
            raise kf.VmGoneError(errno.ESRCH, "it has ended")
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, be_late)
    return gone


@pytest.mark.real_vm
def test_a_vm_that_goes_while_its_run_is_prepared_is_left_out_of_it(monkeypatch, living):
    """The run is prepared again, of the files that are left."""
    gone = gone_at_first(monkeypatch, follow_module, "Plan")
    with kf.follow(living.pid, 0.001, "exits") as chunks:
        assert pids(next(chunks)) == {living.pid}
    assert gone


@pytest.mark.real_vm
def test_a_vmm_that_ends_before_it_is_attached_to_is_nobody(monkeypatch, living):
    """It is not refused, and the next look finds who is there."""
    gone = gone_at_first(monkeypatch, roster_module, "attach")
    with Roster(living.pid, inject=False, timeout=2.0) as roster:
        roster.update(lambda: None)
        assert (roster.machines, roster.refusals, len(gone)) == ({}, {}, 1)
        living.do("2 + 2")
        roster.update(lambda: None)
        assert [machine.pid for machine in roster.machines.values()] == [living.pid]
