"""What the scheduler counts of a vCPU's thread is a statistic of that vCPU."""

import errno
import gc
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import IN_FIRST_PID_NAMESPACE, open_fds
from holder import Holder
from qemu import needs_qemu, plain_qemu, until

import kvmstats_fast as kf
from kvmstats_fast._resource import Fd
from kvmstats_fast.cli import main
from kvmstats_fast.sampling import vcpu_threads
from kvmstats_fast.sampling.plan import Plan, Rows
from kvmstats_fast.schedstat import STATS, Schedstat, with_thread
from kvmstats_fast.testing import SyntheticStats
from kvmstats_fast.vmm import threads
from kvmstats_fast.vmm.proc import KvmFile
from kvmstats_fast.vmm.threads import find_threads

NAMES = tuple(stat.name for stat in STATS)
REAL = pytest.mark.real_vm
#: A thread that runs the vCPU of a Holder for ever, called as QEMU's are.
SPIN = """
import threading
def spin():
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
        comm.write("CPU 0/KVM")
    started.set()
    guest.run(1 << 60)
started = threading.Event()
threading.Thread(target=spin, daemon=True).start()
started.wait()
"""


def schedstat(pid, tid):
    """The plain twin: what /proc says of a thread now."""
    return tuple(map(int, Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()))


class Vcpu:
    """A thread that runs a vCPU when told to, and is called as Firecracker's are."""

    def __init__(self, guest, number):
        self._exits, self._go, self._done = 0, threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(guest, number), daemon=True)
        self._thread.start()
        self._done.acquire()
        self.tid = self._thread.native_id

    def _work(self, guest, number):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(f"fc_vcpu {number}")
        self._done.release()
        while self._go.acquire() and self._exits:
            guest.run(self._exits, number)
            self._done.release()

    def run(self, exits):
        """Run the vCPU, then let it sleep, and give what /proc says of it: it does not change until it runs again."""
        self._exits = exits
        self._go.release()
        self._done.acquire()
        assert until(lambda: "S" in Path(f"/proc/self/task/{self.tid}/stat").read_text().rpartition(")")[2][:3])
        return schedstat(os.getpid(), self.tid)

    def end(self):
        """End the thread, and wait until the kernel knows of none."""
        self._exits = 0
        self._go.release()
        self._thread.join()
        assert until(lambda: not Path(f"/proc/self/task/{self.tid}").exists())


@pytest.fixture
def vcpus(guest, resources):
    """Threads for both vCPUs of the guest."""
    made = [Vcpu(guest, number) for number in range(2)]
    for vcpu in made:
        resources.callback(vcpu.end)
    return made


@REAL
def test_columns_are_what_proc_says(stats, vcpus):
    """Each vCPU's columns are the numbers of its own thread, and the other statistics are as without them."""
    said = [vcpu.run(100 * (1 + number)) for number, vcpu in enumerate(vcpus)]
    x = kf.Sampler(stats, sched=True).run(0, count=3)
    for place, name in enumerate(NAMES):
        assert x[name].tolist() == [[numbers[place] for numbers in said]] * 3
        assert [info.vcpu_id for info in x.columns(name)] == [0, 1]
    plain = kf.Sampler(stats).run(0, count=3)
    assert x.names == plain.names + NAMES
    assert all((x.vcpu[name] == plain.vcpu[name]).all() for name in plain.vcpu.names)
    assert x.stat("sched_wait_ns").units() == "ns"
    assert x.si("sched_run_ns")[0, 1] == pytest.approx(said[1][0] / 1e9)


@REAL
def test_names_and_globs_choose_among_them(stats, vcpus):
    """Any mix of both kinds, in any order; alone, they leave out the VM's file."""
    said = dict(zip(NAMES, np.transpose([vcpu.run(10) for vcpu in vcpus]).tolist(), strict=True))
    for chosen in (["sched_*"], ["sched_wait_ns"], ["sched_timeslices", "exits", "sched_run_ns"], ["*_timeslices"]):
        sampler = kf.Sampler(stats, chosen, sched=True)
        x = sampler.run(0, count=2)
        assert [info.kind for info in x.files] == ["vcpu", "vcpu"]
        for name in set(x.names) & said.keys():
            assert x[name].tolist() == [said[name]] * 2
        assert x.names[0] in (chosen[0], "sched_run_ns", "sched_timeslices")
        sampler.sweep()
        assert sampler.view(x.names[0]).tolist() == said.get(x.names[0])
    with pytest.raises(KeyError, match="did you mean sched_run_ns"):
        kf.Sampler(stats, "sched_run", sched=True)


@REAL
@pytest.mark.parametrize("path", ["run.npz", "run"])
def test_recordings_keep_them(stats, vcpus, tmp_path, path):
    """What is loaded is what was saved, can be joined with it and selected from it."""
    vcpus[0].run(5)
    x = kf.Sampler(stats, sched=True).run(0, count=4)
    x.save(tmp_path / path)
    y = kf.Samples.load(tmp_path / path)
    assert y.names == x.names
    assert all((y[name] == x[name]).all() for name in NAMES)
    assert y.stat("sched_run_ns") == x.stat("sched_run_ns")
    both = kf.Samples.concatenate([x[:2], y[2:]]).select("sched_*", vcpu=0)
    assert both["sched_run_ns"].tolist() == [[x["sched_run_ns"][0, 0]]] * 4


@REAL
def test_a_thread_that_ends_is_a_vcpu_that_failed(stats, vcpus):
    """From then on the vCPU's values are 0, with one error that says so; the other files go on."""
    for vcpu in vcpus:
        vcpu.run(50)
    sampler = kf.Sampler(stats, sched=True)
    with sampler.stream(0, chunk=20, depth=2) as chunks:
        first = next(chunks)
        vcpus[1].end()
        last = next(chunk for chunk in chunks if chunk.errors)
        sampler.stop()
    assert not first.errors
    (error,) = last.errors
    assert last.files[error.file].vcpu_id == 1
    assert isinstance(error.error, ProcessLookupError)
    assert "has ended" in str(error.error)
    for name in ("sched_timeslices", "guest_mode", "exits"):
        assert not last.vcpu[name][error.sweep :, 1].any()
    assert last["sched_timeslices"][: error.sweep, 1].all()
    assert last["sched_timeslices"][:, 0].all()

    sampler.sweep()
    assert [error.file for error in sampler.errors] == [2]
    assert sampler.view("exits").tolist()[1] == 0
    assert sampler.view("sched_timeslices").tolist()[0] > 0
    with pytest.raises(ProcessLookupError):
        sampler.sweep(strict=True)


@REAL
def test_a_vcpu_whose_thread_is_not_known_lacks_them(stats, vcpus):
    """It is named in one warning, and everything else of it is sampled; so are the others."""
    vcpus[1].end()
    with pytest.warns(kf.SamplingWarning, match="vcpu-1: nothing tells which thread") as said:
        sampler = kf.Sampler(stats, sched=True)
    assert len(said) == 1
    assert said[0].filename == __file__
    x = sampler.run(0, count=2)
    assert x["exits"].shape == (2, 2)
    assert [info.vcpu_id for info in x.columns("sched_run_ns")] == [0]


def test_files_of_unknown_processes_lack_them():
    """Files that were handed over, captures: there is no telling whose threads these are."""
    with SyntheticStats() as made, made.open() as file:
        with pytest.warns(kf.SamplingWarning, match=r"attach\(\) to its VMM"):
            x = kf.Sampler([file], sched=True).run(0, count=2)
        assert not set(NAMES) & set(x.names)
        with pytest.warns(kf.SamplingWarning), pytest.raises(ValueError, match="nothing to sample"):
            kf.Sampler([file], "sched_*", sched=True)


@REAL
@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "CONFIG_SCHED_INFO"), (b"0 0 0\n", "kernel.task_delayacct")],
    ids=["not built", "switched off"],
)
def test_a_kernel_that_does_not_count_is_said_once(stats, vcpus, monkeypatch, text, said):
    """One warning for all vCPUs, and their other statistics."""
    assert vcpus

    def open_other(pid, tid):
        if text is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"/proc/{pid}/task/{tid}/schedstat")
        return other(text)

    monkeypatch.setattr(Schedstat, "open", open_other)
    with pytest.warns(kf.SamplingWarning, match=said) as warned:
        sampler = kf.Sampler(stats, sched=True)
    assert len(warned) == 1
    assert not set(NAMES) & set(sampler.run(0, count=2).names)


def other(text):
    """Open a file that holds something else."""
    fd = Fd(os.memfd_create, "other")
    os.write(fd.fileno(), text)
    return Schedstat(fd)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", errno.ENODATA),
        (b"1 2 3", errno.ENODATA),
        (b"1 2\n", errno.EBADMSG),
        (b"1 2 3 4\n", errno.EBADMSG),
        (b"1  2 3\n", errno.EBADMSG),
        (b" 1 2 3\n", errno.EBADMSG),
        (b"-1 2 3\n", errno.EBADMSG),
        (b"1 2 0x3\n", errno.EBADMSG),
        (b"1 2 3\0\n", errno.EBADMSG),
        ("1 2 ٣\n".encode(), errno.EBADMSG),
        (b"1 2 3\n" * 2, errno.EBADMSG),
        (b"1" * 5000 + b"\n", errno.EBADMSG),
        (b"18446744073709551616 0 0\n", errno.EOVERFLOW),
    ],
)
def test_what_is_no_schedstat_is_refused(text, code):
    """It has the errno of what is wrong, and the message says which file; it is never taken for numbers."""
    with pytest.raises(OSError, match="memfd:other") as refused:
        other(text).read()
    assert refused.value.errno == code


def test_the_largest_numbers_are_read():
    """All of uint64."""
    assert other(b"18446744073709551615 0 18446744073709551615\n").read() == (2**64 - 1, 0, 2**64 - 1)


@pytest.mark.parametrize("layout", ["merged", "v9", "v5", "v2"])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_statistics_of_any_layout_can_have_them_behind_theirs(layout, byteorder):
    """The schema has the file's statistics as they are, and three more, and is one object for each kind of file."""
    with SyntheticStats(layout=layout, byteorder=byteorder) as made:
        schema = made.schema
    wider = with_thread(schema)
    assert wider.stats[: len(schema)] == schema.stats
    assert tuple(wider)[len(schema) :] == NAMES
    assert wider.num_values == schema.num_values + 3
    assert with_thread(schema) is wider
    with pytest.raises(kf.FormatError, match="sched_run_ns"):
        with_thread(wider)


@REAL
def test_its_fds_are_closed_with_the_file_and_with_the_sampler(stats, vcpus):
    """Whichever goes first."""
    assert vcpus
    gc.collect()  # what other tests have left
    before = open_fds()
    sampler = kf.Sampler(stats, sched=True)
    assert open_fds() == before + 2
    stats[1].close()
    assert open_fds() == before
    sampler.sweep()
    (error,) = sampler.errors
    assert "was closed while" in str(error.error)
    del sampler, error
    gc.collect()
    assert open_fds() == before - 1


@REAL
def test_followed_vms_and_the_command_line_have_them(tmp_path, capfd):
    """`sched_*` are chosen as others are, also where the VM's file has none of what is chosen."""
    with Holder(1, before=SPIN) as holder:
        with kf.follow(holder.pid, 0.001, ["sched_*", "exits"], sched=True, count=3) as chunks:
            x = kf.Samples.concatenate(list(chunks))
        assert set(x.names) == {*NAMES, "exits"}
        assert x["sched_timeslices"].all()
        with pytest.raises(KeyError), kf.follow(holder.pid, 0.001, ["sched_*"], count=3) as chunks:
            list(chunks)
        path = tmp_path / "recording"
        common = ["-p", str(holder.pid), "--sched", "-e", "sched_*"]
        assert main(["record", *common, "-n", "2", "-I", "1ms", "-o", str(path)]) == 0
        assert set(kf.Samples.load(path).names) == set(NAMES)
        capfd.readouterr()
        assert main(["stat", *common, "-d", "20ms", "-z", "-j"]) == 0
        said = capfd.readouterr().out
        assert all(name in said for name in NAMES)
    assert main(["stat", "--sched", str(path)]) == 2


def test_what_is_attached_to_a_file_that_is_gone_is_gone():
    """A file may be closed, or let go of, while a Sampler is made of it."""
    with SyntheticStats() as made:
        closed, lost = made.open(), made.open()
        early, late, too_late = (other(b"1 2 3\n") for _ in range(3))
        lost.handle.attach(early)
        lost.handle.revoke(kf.VmGoneError(errno.ESRCH, "gone"))
        lost.handle.attach(late)
        closed.close()
        closed.handle.attach(too_late)
        for one, error in ((early, kf.VmGoneError), (late, kf.VmGoneError), (too_late, ValueError)):
            with pytest.raises(error):
                one.read()
        lost.close()
        assert all(one.fd.closed for one in (early, late, too_late))


@REAL
def test_a_vcpu_fails_once(stats, vcpus):
    """When its file and its thread both fail, it has one error, that of the first sweep."""
    assert vcpus
    rows = Rows(Plan(stats, None, 1, sched=True), 8)
    for struct, (error, sweep) in enumerate([(0, 0), (errno.EIO, 6), (errno.ESRCH, 2), (errno.EIO, 3), (0, 0)]):
        rows.structs[struct].error, rows.structs[struct].failed_at = error, sweep
    errors = rows.find_errors(0, 8)
    assert [(error.file, error.sweep, error.error.errno) for error in errors] == [
        (1, 2, errno.ESRCH),
        (2, 3, errno.EIO),
    ]


# ---- which thread


@REAL
def test_a_machine_tells_the_threads_of_its_vcpus():
    """By what they are called; of the others explain() says that nothing is known, once this was asked for."""
    with Holder(2, before=SPIN) as holder, kf.attach(holder.pid) as machine:
        assert not machine.explain()
        (tid,) = machine.threads.values()
        assert Path(f"/proc/{holder.pid}/task/{tid}/comm").read_text() == "CPU 0/KVM\n"
        assert machine.threads_known_by == {0: "name"}
        assert "the thread of vCPU 1:" in machine.explain()
        with pytest.warns(kf.SamplingWarning, match="vcpu-1"):
            sampler = kf.Sampler(machine, "sched_*", sched=True)
        assert [info.vcpu_id for info in sampler.files] == [0]
        holder.end()
        until(lambda: not machine.alive)
        until(lambda: all(file.closed for file in machine))
        with pytest.raises(kf.VmGoneError):
            sampler.sweep()
        with pytest.raises(kf.VmGoneError):
            machine.threads  # noqa: B018 - it raises


class Threads(SimpleNamespace):
    """A process of made-up threads: by tid their name and the words of their system call."""

    pid = 10

    def threads(self):
        """Return their tids."""
        return sorted(self.of)

    def thread_name(self, tid):
        """Return its name."""
        return self.of[tid][0]

    def thread_syscall(self, tid):
        """Return the words of its call."""
        return self.of[tid][1].split()

    def is_worker(self, tid):
        """Return whether it is the kernel's."""
        return self.of[tid][0].startswith("kvm-nx")

    def kvm_files(self):
        """Return the vCPUs."""
        return self.files

    def group(self, files):
        """Return each by itself."""
        return [[file] for file in files]


def threads_of(of, ids=("kvm-10", "kvm-10/vcpu-0", "kvm-10/vcpu-1"), vcpus=(0, 1)):
    """The threads that are found among these, and how."""
    fds = [KvmFile("vcpu", vcpu_id, 20 + place, is_stats=False) for place, vcpu_id in enumerate(vcpus)]
    numbers = [int(name.rpartition("-")[2]) if "/" in name else None for name in ids]
    files = [SimpleNamespace(id=name, vcpu_id=number) for name, number in zip(ids, numbers, strict=True)]
    return {vcpu: tuple(thread) for vcpu, thread in find_threads(Threads(of=of, files=fds), files).items()}


IN_RUN = "16 {:#x} 0xae80 0x0 0x0 0x0 0x0 0x7ffe 0x7fff"
NO_CALL = ("qemu", "running")


@pytest.mark.parametrize(
    ("name", "number"),
    [("CPU 0/KVM", 0), ("CPU 11/KVM", 11), ("fc_vcpu 3", 3), ("vcpu7", 7), ("crosvm_vcpu2", 2), ("kvm-vcpu-1", 1)],
)
def test_threads_are_known_by_the_names_that_vmms_give_them(name, number):
    """QEMU, Firecracker, cloud-hypervisor, crosvm and kvmtool."""
    ids = (f"kvm-10/vcpu-{number}",)
    assert threads_of({10: NO_CALL, 11: (name, "running")}, ids) == {number: (11, "name")}
    assert threads_of({10: NO_CALL, 11: (f"{name}x", "running")}, ids) == {}


def test_the_system_call_that_a_thread_is_in_comes_first():
    """It is the vCPU's fd that counts, whatever the thread is called; a kernel worker shows its maker's call."""
    of = {10: NO_CALL, 11: ("vcpu1", IN_RUN.format(20)), 12: ("kvm-nx-lpage-re", IN_RUN.format(20))}
    of |= {13: ("vcpu0", "16 0x15 0x4004ae8b 0x0 0x0 0x0 0x0 0x7ffe 0x7fff"), 14: ("pool", "-1 0x14 0xae80")}
    assert threads_of(of)[0] == (11, "KVM_RUN")


def test_threads_are_in_the_order_of_their_vcpus():
    """However each of them was found."""
    found = threads_of({10: NO_CALL, 11: ("vcpu0", "running"), 12: ("pool", IN_RUN.format(21))})
    assert [*found.items()] == [(0, (11, "name")), (1, (12, "KVM_RUN"))]


@pytest.mark.skipif(not IN_FIRST_PID_NAMESPACE, reason="ids have other numbers than this pid namespace")
def test_an_id_names_a_thread_where_each_thread_makes_its_own_vcpu():
    """Not the first thread, nor one that made several, nor one that is not of the process."""
    of = dict.fromkeys((10, 11, 12), NO_CALL)
    assert threads_of(of, ("kvm-10", "kvm-11/vcpu-0", "kvm-12/vcpu-1")) == {0: (11, "id"), 1: (12, "id")}
    assert threads_of(of, ("kvm-10", "kvm-11/vcpu-0", "kvm-11/vcpu-1")) == {}
    assert threads_of(of, ("kvm-11", "kvm-11/vcpu-0", "kvm-13/vcpu-1")) == {}
    assert threads_of(of) == {}


def test_a_number_of_two_vcpus_names_no_thread():
    """In a process with several VMs a vCPU's number is not enough."""
    of = {10: NO_CALL, 11: ("vcpu0", IN_RUN.format(20)), 12: ("vcpu0", "running")}
    assert threads_of(of, ("kvm-10/vcpu-0",), vcpus=(0, 0)) == {}
    assert threads_of(of, ("kvm-10/vcpu-0",) * 3, vcpus=(0,)) == {}


@pytest.mark.skipif(not IN_FIRST_PID_NAMESPACE, reason="ids have other numbers than this pid namespace")
@needs_qemu
@REAL
def test_qemu_s_vcpus_have_their_threads_and_their_times(tmp_path, resources):
    """Each vCPU has a thread of its own, whose numbers are those that /proc has of it."""
    process, monitor = plain_qemu(tmp_path, resources, vcpus=2)
    expected = {cpu["cpu-index"]: cpu["thread-id"] for cpu in monitor("query-cpus-fast")}
    with resources.enter_context(kf.attach(process.pid, inject=True)) as machine:
        assert machine.threads == expected
        sampler = kf.Sampler(machine, "sched_*", sched=True)
        monitor("stop")
        before = [schedstat(process.pid, tid) for tid in expected.values()]
        sampler.sweep()
        after = [schedstat(process.pid, tid) for tid in expected.values()]
        read = np.transpose([sampler.view(name) for name in NAMES])
        assert (np.array(before) <= read).all()
        assert (read <= np.array(after)).all()


def test_ids_name_no_thread_of_another_pid_namespace(monkeypatch):
    """Their numbers are those of the first one, which here may be others' or nobody's."""
    monkeypatch.setattr(threads, "FIRST_NAMESPACE", "pid:[1]")
    assert threads_of(dict.fromkeys((10, 11, 12), NO_CALL), ("kvm-10", "kvm-11/vcpu-0", "kvm-12/vcpu-1")) == {}


@pytest.mark.parametrize(
    ("tid", "error", "text"),
    [
        (1 << 22, FileNotFoundError(), "has ended"),  # no thread has this number
        (None, FileNotFoundError(), "built without CONFIG_SCHED_INFO"),
        (None, ProcessLookupError(), "has ended"),
    ],
)
def test_why_a_thread_has_no_schedstat_is_told(monkeypatch, tid, error, text):
    """One that has ended, before or while it is read, or a kernel that has none of any."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(vcpu_threads.Schedstat, "open", refuse)
    assert text in vcpu_threads._open(os.getpid(), tid or threading.get_native_id())
