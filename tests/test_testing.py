"""What users test their own code with does what it says, and refuses what it cannot do."""

import copy
import errno
import os
import pickle
import platform
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers import DATA, exit_status, forked, open_fds

import kvmstats_fast as kf
from kvmstats_fast.testing import (
    KvmUnavailableError,
    SyntheticStats,
    TinyGuest,
    counts_right,
    make_samples,
    tiny_guest,
)

OPEN = kf.StatsFile.from_bytes((DATA / "captures" / "arm64-6.1" / "vm-after.bin").read_bytes())


@pytest.fixture(scope="module", autouse=True)
def _close():
    """The file of this module is closed at its end."""
    yield
    OPEN.close()


STAT = kf.Stat("n", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "vax"}, "arch is 'vax'; it must be one of 'arm64', 'mips'"),
        ({"kind": "cpu"}, "kind is 'cpu'"),
        ({"byteorder": "middle"}, "byteorder is 'middle'"),
        ({"layout": "v3"}, "v3"),
        ({"value_size": 2}, "value_size is 2"),
        ({"value_size": 4}, "only in VM files of the v2 and v5 layouts"),
        ({"kind": "vm", "value_size": 4, "layout": "v9"}, "only in VM files of the v2 and v5 layouts"),
        ({"count_defect": True}, "x86 vCPU files of the v2 layout"),
        ({"count_defect": True, "layout": "v2", "kind": "vm"}, "x86 vCPU files of the v2 layout"),
        ({"options": ["CONFIG_KVM"]}, r"unknown options \['CONFIG_KVM'\]"),
        ({"options": "CONFIG_KVM_MIPS_VZ"}, "must be a collection"),
        ({"vcpu_id": -1}, "vcpu_id is -1"),
        ({"stats": [STAT, STAT]}, "two statistics have the same name"),
        ({"stats": [replace(STAT, type=16)]}, "type is 16; a descriptor holds 0 to 15"),
        ({"stats": [replace(STAT, size=0)]}, "size is 0"),
        ({"stats": [replace(STAT, offset=4)]}, "multiple of 8"),
        ({"stats": [replace(STAT, name="a\0b")]}, "is not a name"),
        ({"stats": [replace(STAT, name="")]}, "is not a name"),
    ],
)
def test_a_file_no_kernel_has_is_not_made(arguments, message):
    """Impossible combinations are ValueErrors that say what is possible, and cost no fd."""
    before = open_fds()
    with pytest.raises(ValueError, match=message):
        SyntheticStats(**arguments)
    assert open_fds() == before


def test_set_and_add_are_seen_by_open_files_at_once():
    """Writers and readers meet in the file: plain values, single buckets, whole histograms, wrap-around."""
    with SyntheticStats() as made, made.open() as file:
        made.set("exits", 2**64 - 1)
        made.add("exits", 3)
        made.set("halt_wait_hist", np.arange(32, dtype=np.uint64))
        made.add("halt_wait_hist", np.uint64(100), bucket=31)
        made.add("irq_exits", -1)
        snapshot = file.snapshot()
    assert snapshot["exits"] == 2
    assert snapshot["halt_wait_hist"].tolist() == [*range(31), 131]
    assert snapshot["irq_exits"] == 2**64 - 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda made: made.set("nothing", 1), KeyError, "nothing"),
        (lambda made: made.add("nothing", 1), KeyError, "nothing"),
        (lambda made: made.set("exits", -1), ValueError, "does not fit"),
        (lambda made: made.set("exits", 2**64), ValueError, "8 bytes"),
        (lambda made: made.set("halt_wait_hist", 1), ValueError, "has 32 values, not 1"),
        (lambda made: made.set("exits", [1, 2]), ValueError, "has 1 values, not 2"),
        (lambda made: made.set("exits", b"a"), TypeError, "neither an integer"),
        (lambda made: made.add("exits", 1.5), TypeError, "float"),
        (lambda made: made.add("halt_wait_hist", 1, bucket=32), IndexError, "no bucket 32"),
        (lambda made: made.add("halt_wait_hist", 1, bucket=-1), IndexError, "no bucket -1"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(change, error, message):
    """Wrong names, values, lengths and buckets are refused and nothing is half-written."""
    with SyntheticStats() as made:
        before = made.to_bytes()
        with pytest.raises(error, match=message):
            change(made)
        assert made.to_bytes() == before


def test_a_made_up_file_answers_pread_as_the_kernel_does():
    """Any position and length; across the end short, behind it nothing."""
    with SyntheticStats() as made:
        data = made.to_bytes()
        fd = made.fileno()
        assert os.pread(fd, 16, len(data) - 8) == data[-8:]
        assert os.pread(fd, 16, len(data)) == b""
        assert os.pread(fd, 16, len(data) + 1000) == b""
        assert os.pread(fd, 5, 3) == data[3:8]
        assert not os.get_inheritable(fd)


def test_a_closed_made_up_file_says_so_and_what_it_opened_lives_on():
    """Close twice, use after close, and a StatsFile that outlives its maker."""
    made = SyntheticStats()
    made.set("exits", 4)
    with made.open() as file:
        made.close()
        made.close()
        assert file.snapshot()["exits"] == 4
    for use in (made.fileno, made.open, made.to_bytes, lambda: made.add("exits", 1)):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "module loaded"),
        (errno.EACCES, "group"),
        (errno.EPERM, "device rules"),
        (errno.ENODEV, "hardware virtualisation"),
        (errno.EBUSY, "another hypervisor"),
    ],
)
def test_a_machine_without_kvm_is_explained(monkeypatch, number, remedy):
    """What the kernel says about /dev/kvm comes back with its errno and a remedy, and costs no fd."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    before = open_fds()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmUnavailableError, match=remedy) as caught:
        TinyGuest()
    assert caught.value.errno == number
    assert isinstance(caught.value, kf.KvmStatsError)
    assert isinstance(caught.value, OSError)
    monkeypatch.undo()
    assert open_fds() == before


def test_another_architecture_is_told_that_the_guest_is_x86_64(monkeypatch):
    """No ioctl of x86 is tried elsewhere."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(KvmUnavailableError, match=r"not on this architecture.*aarch64"):
        TinyGuest()


def test_a_guest_has_at_least_one_vcpu():
    """vcpus=0 is a ValueError."""
    with pytest.raises(ValueError, match="at least one"):
        TinyGuest(0)


@pytest.mark.real_vm
def test_a_guest_that_cannot_have_so_many_vcpus_leaves_nothing_behind():
    """KVM's refusal in mid-making closes what was made."""
    before = open_fds()
    with pytest.raises(KvmUnavailableError):
        TinyGuest(100_000)
    assert open_fds() == before


@pytest.mark.real_vm
def test_a_closed_guest_says_so(guest):
    """Close twice, and run and open after close."""
    guest.run(1)
    guest.close()
    guest.close()
    for use in (lambda: guest.run(1), guest.open_stats):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.real_vm
@pytest.mark.parametrize(("exits", "vcpu", "error"), [(-1, 0, ValueError), (1, 2, ValueError), (1, -1, ValueError)])
def test_a_run_that_cannot_be_is_refused(guest, exits, vcpu, error):
    """No negative exits, and no vCPU that the guest has not."""
    with pytest.raises(error, match="this guest has 2 vCPUs"):
        guest.run(exits, vcpu)


@pytest.mark.real_vm
def test_a_child_process_may_not_run_the_guest(guest):
    """KVM answers EIO to a forked child, and the error names the call."""
    guest.run(1)

    def work():
        with pytest.raises(OSError, match="KVM_RUN of vCPU 0: Input/output error; only the process that made the VM"):
            guest.run(1)

    assert exit_status(forked(work)) == 0


@pytest.mark.real_vm
def test_vcpus_run_side_by_side(guest, stats):
    """Two threads run two vCPUs at once, and each counts its own exits."""
    before = [file.snapshot() for file in stats[1:]]
    threads = [threading.Thread(target=guest.run, args=(500 * (i + 1), i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, file in enumerate(stats[1:]):
        after = file.snapshot()
        change = {name: after[name] - before[i][name] for name in file.schema if not file.schema[name].shape}
        assert counts_right(change, 500 * (i + 1))


@pytest.mark.parametrize(
    ("counter", "change", "right"),
    [
        ("io_exits", {"io_exits": 10}, True),
        ("io_exits", {"io_exits": 11, "preemption_other": 5}, False),
        ("exits", {"exits": 10, "fpu_reload": 10}, True),
        ("exits", {"exits": 10}, False),
        ("exits", {"exits": 11, "fpu_reload": 10}, True),
        ("exits", {"exits": 12, "fpu_reload": 10}, False),
        ("exits", {"exits": 12, "fpu_reload": 10, "preemption_other": 1}, True),
        ("exits", {"exits": 13, "fpu_reload": 10, "preemption_other": 1}, False),
        ("exits", {"exits": 14, "fpu_reload": 12, "preemption_other": 1, "signal_exits": 2}, True),
        ("exits", {"exits": 14, "fpu_reload": 13, "preemption_other": 1, "signal_exits": 2}, False),
        ("exits", {"exits": 9, "fpu_reload": 10, "preemption_other": 9}, False),
        ("exits", {}, False),
    ],
)
def test_only_what_the_host_did_excuses_an_exit_too_many(monkeypatch, counter, change, right):
    """io_exits and fpu_reload are exact; exits may be more by what the host interrupts, never less."""
    monkeypatch.setattr(tiny_guest, "exit_counter", lambda: counter)
    assert counts_right(change, 10) is right


@pytest.mark.parametrize("owner", [SyntheticStats, lambda: SyntheticStats().open(), lambda: kf.Sampler([OPEN])])
def test_what_owns_files_cannot_be_copied(owner):
    """A copy would close the other's fd, or write into its memory: copy, deepcopy and pickle are TypeErrors."""
    one = owner()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(one)
    getattr(one, "close", int)()


def test_the_core_imports_nothing_of_testing():
    """Imports point one way: the public names need neither testing nor the command line."""
    code = "import sys; from kvmstats_fast import *; print([m for m in sys.modules if m.startswith('kvmstats_fast.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "testing" not in out
    assert "cli" not in out


# ---- whose a made-up file is, and what happens to it


def test_a_made_up_file_is_whose_it_is_said_to_be(resources):
    """vm, host, name and pid are in FileInfo; without them nothing is known but the id."""
    kinds = [("vm", 0), ("vcpu", 0), ("vcpu", 1)]
    whose = {"vm": "web", "host": "far", "name": "guest=1", "pid": 7}
    made = [resources.enter_context(SyntheticStats(kind=kind, vcpu_id=i, **whose)) for kind, i in kinds]
    made.append(resources.enter_context(SyntheticStats(pid=8)))
    files = [resources.enter_context(one.open()) for one in made]
    infos = kf.Sampler(files).files
    assert [str(info) for info in infos] == ["web", "web/0", "web/1", "kvm-8/0"]
    assert [(info.host, info.name, info.pid) for info in infos[:3]] == [("far", "guest=1", 7)] * 3
    assert (infos[3].host, infos[3].name, infos[3].pid) == (os.uname().nodename, "", None)
    assert kf.Sampler({"mine": files[:3]}).files[0].vm == "mine"


def test_a_made_up_vm_dies_is_made_anew_and_fails(resources):
    """As a Sampler sees real ones: VmGoneError from then on; reads that fail until they do not."""
    made, other = (resources.enter_context(SyntheticStats(vm=vm, pid=7)) for vm in ("web", "db"))
    with other.open():
        other.rebuild()  # once, /dev/null is opened
    fds = open_fds()
    with made.open() as file, other.open() as living:
        sampler = kf.Sampler([file, living], "exits")
        made.set("exits", 5)
        made.fail()
        sampler.sweep()
        assert [(e.file, e.error.errno) for e in sampler.errors] == [(0, errno.EIO)]
        with made.open() as late, pytest.raises(OSError, match="Input/output error"):
            late.read()
        made.fail(errno.ENODATA)
        with pytest.raises(kf.FormatError, match="cut short"):
            file.read()
        made.fail(errno.EBADF)
        with pytest.raises(OSError, match="not open for reading"):
            file.read()
        made.recover()
        made.recover()
        sampler.sweep()
        assert (sampler.errors, sampler.view("exits").tolist()) == ((), [5, 0])
        made.rebuild()
        x = sampler.run(0.001, count=3)
        assert [(e.file, type(e.error), e.error.errno) for e in x.errors] == [(0, kf.VmGoneError, errno.ENODEV)]
        with made.open() as again:
            assert again.snapshot()["exits"] == 0
            made.die()
            with pytest.raises(kf.VmGoneError, match=r"process 7 .* has exited") as caught:
                again.read()
            assert caught.value.errno == errno.ESRCH
        for _ in range(2):
            with pytest.raises(kf.VmGoneError, match="has exited"):
                made.open()
        made.rebuild()
        made.add("exits", 3)
        with made.open() as again:
            assert again.snapshot()["exits"] == 3
        assert living.snapshot()["exits"] == 0
    assert open_fds() == fds
    with pytest.raises(ValueError, match=r"error is 2; it must be one of errno\.EIO, errno\.EBADF, errno\.ENODATA"):
        made.fail(errno.ENOENT)


# ---- samples made up


@pytest.fixture
def web(resources):
    """The VM's file and two vCPUs' of a made-up VM."""
    kinds = [("vm", 0), ("vcpu", 0), ("vcpu", 1)]
    whose = {"vm": "web", "host": "far", "pid": 7}
    return [resources.enter_context(SyntheticStats(kind=kind, vcpu_id=i, **whose)) for kind, i in kinds]


def test_made_up_samples_are_what_a_sampler_would_have_given(web, resources):
    """The same files and values, in the same columns, for statistics of both kinds and a histogram."""
    stats = ["exits", "halt_wait_hist", "remote_tlb_flush"]
    rng = np.random.default_rng(1)
    shapes = {"exits": (4, 2), "halt_wait_hist": (4, 2, 32), "remote_tlb_flush": (4, 1)}
    values = {name: np.cumsum(rng.integers(0, 9, shapes[name]), axis=0) for name in stats}
    sampler = kf.Sampler([resources.enter_context(one.open()) for one in web], stats)
    parts = []
    for sweep in range(4):
        web[0].set("remote_tlb_flush", values["remote_tlb_flush"][sweep, 0])
        for i, one in enumerate(web[1:]):
            one.set("exits", values["exits"][sweep, i])
            one.set("halt_wait_hist", values["halt_wait_hist"][sweep, i])
        parts.append(sampler.run(0.25, count=1))
    sampled = kf.Samples.concatenate(parts)
    made = make_samples(web, values, interval=0.25)
    assert made.files == sampled.files
    assert [(g.kind, g.columns.tolist()) for g in made.groups] == [(g.kind, g.columns.tolist()) for g in sampled.groups]
    for name in stats:
        assert made.stat(name) == sampled.stat(name)
        assert np.array_equal(made[name], sampled[name])
    assert (made.tick.tolist(), made.interval, made.host) == ([0, 1, 2, 3], 0.25, "far")
    assert made.elapsed == 0.75


def test_three_days_are_made_in_parts_with_their_own_times(web):
    """Ticks and clocks go on from part to part; days, totals and rates are those of a run that long."""
    days = np.arange(3 * 86400).reshape(3, -1)
    parts = [
        make_samples(web, {"exits": tick[:, None] * [1000, 10]}, start="2026-11-23T00:00Z", tick=tick) for tick in days
    ]
    x = kf.Samples.concatenate(parts)
    assert x.total("exits").tolist() == [1000 * (3 * 86400 - 1), 10 * (3 * 86400 - 1)]
    assert x.mean_rate("exits").tolist() == [1000, 10]
    assert len(x.between("2026-11-24T00:00Z", "2026-11-25T00:00Z")) == 86400
    assert x.wall_time.view("datetime64[ns]")[-1] == np.datetime64("2026-11-25T23:59:59")
    assert (x.missed, x.wall_steps, len(x.files)) == (0, (), 2)


def test_made_up_samples_have_misses_failures_and_no_needless_copy(web):
    """Ticks between those given were missed; a file that failed is 0 from there on; uint64 is taken as it is."""
    exits = np.arange(6, dtype=np.uint64).reshape(3, 2) + 1
    gone = kf.SampleError(1, 2, kf.VmGoneError(errno.ESRCH, "gone"))
    x = make_samples(web, {"exits": exits, "halt_exits": [[1]] * 3}, tick=[5, 6, 9], errors=[gone])
    assert (x.missed, x.time.tolist(), x.errors) == (2, [5 * 10**9, 6 * 10**9, 9 * 10**9], (gone,))
    assert x["exits"].tolist() == [[1, 2], [3, 4], [5, 0]]
    assert np.isnan(x.rate("exits")[1, 1])
    assert exits[2, 1] == 6
    x = make_samples(web, {"exits": exits, "mmu_unsync": [[-1], [2], [3]]})
    assert np.shares_memory(x["exits"], exits)
    assert x.si("mmu_unsync").tolist() == [[-1], [2], [3]]
    assert len(make_samples(web, {"exits": np.zeros((0, 2), np.uint64)})) == 0


@pytest.mark.parametrize(
    ("values", "more", "error", "message"),
    [
        ({}, {}, ValueError, "values is empty"),
        ({"exists": [[1]]}, {}, KeyError, "no statistic 'exists' in these files; did you mean exits"),
        (
            {"exits": [[1.5]]},
            {},
            TypeError,
            r"values\['exits'\] has dtype float64; values are raw, and so whole numbers",
        ),
        ({"exits": 5}, {}, ValueError, "is one number; it must have a value for each sweep"),
        ({"exits": [[1, 2, 3]]}, {}, ValueError, r"has shape \(1, 3\); it must broadcast to \(1, 2\)"),
        ({"exits": [[1, -2]]}, {}, ValueError, "has -2, but what only grows is not negative"),
        ({"exits": [[1]] * 2}, {"tick": [1, 1]}, ValueError, "tick must ascend"),
        ({"exits": [[1]] * 2}, {"tick": [-1, 1]}, ValueError, "not be negative"),
        ({"exits": [[1]] * 2}, {"tick": [0.5, 1]}, TypeError, "tick is a list; it must be whole numbers"),
        ({"exits": [[1]] * 2}, {"start": 5.0}, ValueError, "must be a time of the wall clock"),
        ({"exits": [[1]] * 2}, {"start": "Monday"}, ValueError, "start"),
        ({"exits": [[1]] * 2}, {"interval": 0}, ValueError, "interval is 0; it must be more than 0"),
        ({"exits": [[1]] * 2}, {"errors": [5]}, TypeError, "errors has an int"),
    ],
)
def test_samples_that_cannot_be_are_not_made_up(web, values, more, error, message):
    """What does not fit is named, with what it must be."""
    with pytest.raises(error, match=message):
        make_samples(web, values, **more)
    with pytest.raises(TypeError, match="files has a str"):
        make_samples(["web"], {"exits": [[1]]})


def test_a_recording_of_made_up_hosts_is_one_of_days(tmp_path, resources):
    """Two hosts, a VM that is made anew on the second day: recorded and loaded back, they are told apart and add up."""
    pytest.importorskip("pyarrow")
    loaded = []
    for host in ("a", "b"):
        vcpus = [resources.enter_context(SyntheticStats(vcpu_id=i, vm="web", host=host, pid=7)) for i in range(2)]
        ticks = np.arange(2 * 1440).reshape(2, -1)  # a sweep a minute
        counts = [tick[:, None] % 1440 * [60, 6] for tick in ticks]
        gone = [kf.SampleError(i, 1000, kf.VmGoneError(errno.ENODEV, "made anew")) for i in range(2)]
        first, second = (
            make_samples(vcpus, {"exits": some}, interval=60, tick=tick, errors=errors)
            for some, tick, errors in zip(counts, ticks, (gone, []), strict=True)
        )
        for number, x in enumerate((first, second)):
            x.save(tmp_path / f"{host}{number}")
            loaded.append(kf.Samples.load(tmp_path / f"{host}{number}"))
        assert second.total("exits").tolist() == [60 * 1439, 6 * 1439]
        assert first.total("exits").tolist() == [60 * 999, 6 * 999]
    assert [x.files[1].host for x in loaded] == ["a", "a", "b", "b"]
    assert [x.total("exits").tolist() for x in loaded[2:]] == [[60 * 999, 6 * 999], [60 * 1439, 6 * 1439]]
    assert [len(x.errors) for x in loaded] == [2, 0, 2, 0]
