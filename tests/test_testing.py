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
from helpers import DATA, open_fds

import kvmstats_fast as kf
from kvmstats_fast.testing import KvmUnavailableError, SyntheticStats, TinyGuest, counts_right, tiny_guest

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
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            guest.run(1)
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "KVM_RUN of vCPU 0: Input/output error; only the process that made the VM" in pipe.read()


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
