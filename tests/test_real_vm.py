"""What a real kernel serves is what we say it serves."""

import errno
import os
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from helpers import as_tuples, independent_read, names_thread

import kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest, counts_right, exit_counter

pytestmark = pytest.mark.real_vm


def test_values_equal_those_of_an_independent_reader(guest, stats):
    """Every value and every offset of VM and vCPU files equals what struct and os.pread find."""
    guest.run(123)
    for file in stats:
        values, order = independent_read(partial(os.pread, file.fileno()))
        assert as_tuples(file.snapshot()) == values
        assert [(stat.name, stat.offset) for stat in file.schema.stats] == order
        named = file.read().view(file.schema.dtype)
        assert {name: tuple(np.atleast_1d(named[name][0]).tolist()) for name in file.schema} == values


@pytest.mark.parametrize("exits", [0, 1, 1000])
def test_the_exit_counter_moves_by_exactly_the_exits_made(guest, stats, exits):
    """N exits move the exit counter of that vCPU by N, of the other by nothing; only a preemption excuses a retry."""
    counter = exit_counter()
    for _ in range(10):
        before = [file.snapshot() for file in stats[1:]]
        guest.run(exits, vcpu=1)
        after = [file.snapshot() for file in stats[1:]]
        assert after[0][counter] == before[0][counter]
        change = {name: after[1][name] - before[1][name] for name in stats[1].schema if not stats[1].schema[name].shape}
        assert counts_right(change, exits)
        if change[counter] == exits:
            return
    pytest.fail("the host preempted the vCPU in each of 10 runs")


def test_offsets_are_the_kernels_and_not_positions(stats):
    """Where the kernel lists a statistic before the one that precedes it in the data, its own offset is used."""
    vm = stats[0].schema
    if not {"max_mmu_rmap_size", "max_mmu_page_hash_collisions"} <= set(vm):
        pytest.skip("this kernel's VM file has not the two statistics that are listed out of order")
    names = list(vm)
    assert names.index("max_mmu_rmap_size") < names.index("max_mmu_page_hash_collisions")
    assert vm["max_mmu_rmap_size"].offset == vm["max_mmu_page_hash_collisions"].offset + 8
    assert vm.dtype.fields["max_mmu_rmap_size"][1] == vm["max_mmu_rmap_size"].offset


def test_files_say_whose_they_are(stats):
    """Kind, number and id come from the file, and the layout is the merged one in this machine's byte order."""
    assert [(file.kind, file.vcpu_id) for file in stats] == [("vm", None), ("vcpu", 0), ("vcpu", 1)]
    assert all(names_thread(file.id, threading.get_native_id()) for file in stats)  # as the main one it is the process
    assert [file.id.partition("/")[2] for file in stats] == ["", "vcpu-0", "vcpu-1"]
    for file in stats:
        assert (file.header.layout, file.header.byteorder) == (kf.Layout.MERGED, sys.byteorder)
        assert file.header.num_desc == len(file.schema)


def test_every_vcpu_has_the_same_schema_object():
    """All vCPU files of a kernel share one Schema, which is not the VM's."""
    with TinyGuest(16) as guest:
        vm, *vcpus = guest.open_stats()
        assert len({id(file.schema) for file in vcpus}) == 1
        assert vm.schema is not vcpus[0].schema
        for file in (vm, *vcpus):
            file.close()


def test_what_the_kernel_calls_boolean_or_histogram_is_one(stats):
    """`blocking` is a bool, a halt histogram is a row of counts with its edges in seconds."""
    schema = stats[1].schema
    snapshot = stats[1].snapshot()
    booleans = [stat for stat in schema.stats if stat.unit == kf.StatUnit.BOOLEAN]
    histograms = [stat for stat in schema.stats if stat.type == kf.StatType.LOG_HIST]
    assert all(isinstance(snapshot[stat.name], bool) for stat in booleans)
    for stat in histograms:
        assert snapshot[stat.name].shape == (stat.size,)
        assert stat.bucket_edges()[1] == 1e-9
    if not (booleans and histograms):
        pytest.skip("this kernel has no booleans or no histograms")


def test_files_outlive_their_vm(guest, stats):
    """A stats file holds its VM: after everything else is closed it still gives the last values."""
    guest.run(5)
    counts = stats[1].snapshot()[exit_counter()]
    assert counts >= 5
    guest.close()
    assert stats[1].snapshot()[exit_counter()] == counts


def test_a_stats_file_is_not_inherited_by_programs_that_are_started(stats):
    """The kernel makes stats files close-on-exec, and so they stay."""
    assert not any(os.get_inheritable(file.fileno()) for file in stats)


def test_dev_kvm_itself_is_refused_with_what_to_pass_instead():
    """EINVAL of /dev/kvm names the call and the fds that have statistics."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match=r"KVM_GET_STATS_FD on fd .*/dev/kvm.*KVM_CREATE_VM") as caught:
            kf.StatsFile.open(fd)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_a_vm_fd_taken_for_a_stats_file_is_refused_with_what_to_do(guest):
    """Passing a VM fd to StatsFile() instead of StatsFile.open() says so."""
    with pytest.raises(OSError, match=r"anon_inode:kvm-vm\b.*StatsFile\.open") as caught:
        kf.StatsFile(guest.vm_fd)
    assert caught.value.errno in (errno.EINVAL, errno.ESPIPE)


def test_the_ioctl_of_the_series_is_unknown_to_todays_kernel(guest):
    """layout="v2" issues the series' own ioctl: ENOTTY, with the reason."""
    with pytest.raises(OSError, match=r"KVM_STATS_GETFD on fd .*no released kernel") as caught:
        kf.StatsFile.open(guest.vm_fd, layout="v2")
    assert caught.value.errno == errno.ENOTTY


def test_another_process_is_refused_but_may_read_what_it_is_given(guest, stats):
    """EIO says that only the maker of a VM may open its stats files; an inherited stats file reads all the same."""
    guest.run(7)
    code = (
        "import sys, kvmstats_fast as kf\n"
        "vm, stats = map(int, sys.argv[1:3])\n"
        "print(kf.StatsFile(stats).snapshot()[sys.argv[3]], flush=True)\n"
        "try: kf.StatsFile.open(vm)\n"
        "except OSError as error: print(error.errno, error.strerror)\n"
    )
    fds = (guest.vm_fd, stats[1].fileno())
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, fds), exit_counter()]
    done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=True)
    count, refusal = done.stdout.splitlines()
    assert int(count) == stats[1].snapshot()[exit_counter()]
    assert refusal.startswith(f"{errno.EIO} KVM_GET_STATS_FD")
    assert "belongs to another process" in refusal


def test_reading_goes_on_while_a_vcpu_runs(guest, stats):
    """Sampling from one thread while another runs the guest never goes backwards and ends at the exact count."""
    schema = stats[1].schema
    word = schema[exit_counter()].offset // 8
    before = stats[1].snapshot()
    seen, rounds = [before[exit_counter()]], 0

    def exit_until_seen():
        nonlocal rounds
        while len(set(seen)) < 10:
            guest.run(100)
            rounds += 1

    thread = threading.Thread(target=exit_until_seen)
    thread.start()
    out = np.empty(schema.num_values, np.uint64)
    while thread.is_alive():
        seen.append(int(stats[1].read_into(out)[word]))
    thread.join()
    after = stats[1].snapshot()
    assert seen == sorted(seen)
    assert counts_right({name: after[name] - before[name] for name in schema if not schema[name].shape}, 100 * rounds)
