"""A host with more threads that want to run than processors: what waits and priorities make of it."""

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import NOBODY, exit_status, forked, kernel_threads, open_fds
from holder import Holder
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats


@pytest.fixture
def files():
    with SyntheticStats() as made, made.open() as one, made.open() as other:
        yield [one, other]


@pytest.fixture
def real_time():
    """Skip where a thread of this process may not run under SCHED_FIFO."""
    refused = []

    def work():
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))  # of this thread, which ends
        except PermissionError as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if refused:
        pytest.skip("SCHED_FIFO takes CAP_SYS_NICE, or an RLIMIT_RTPRIO")


@pytest.fixture
def busy():
    """A processor that another process uses all the time."""
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen(["taskset", "-c", str(cpu), "sh", "-c", "while :; do :; done"]) as hog:
        yield cpu
        hog.kill()


def missed(files, cpu, wait, **options):
    """The share of its ticks that a run of a quarter of a second missed."""
    samples = kf.Sampler(files).run(0.0001, count=2500, wait=wait, cpu=cpu, **options)
    assert len(samples) + samples.missed == 2500
    return samples.missed / 2500


@pytest.mark.usefixtures("real_time")
def test_a_run_with_a_priority_goes_before_others(files, busy):
    """Where others have half of the processor or more, it misses far fewer ticks."""
    for _ in range(4):
        before, after = missed(files, busy, "spin"), missed(files, busy, "spin", priority=10)
        if after <= before / 2:
            break
    assert after <= before / 2


def policies(threads):
    """Policy and priority of threads."""
    return {(os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority) for thread in threads}


@pytest.mark.usefixtures("real_time")
def test_the_priority_is_that_of_the_threads_of_the_run_alone(files):
    """All of them have it, and no other thread; the next run without one has none."""
    before = kernel_threads()
    ordinary = policies(before)
    sampler = kf.Sampler(files, threads=2)
    for options, wanted in (({"priority": 7}, {(os.SCHED_FIFO, 7)}), ({}, ordinary)):
        with sampler.stream(0.001, chunk=1, **options) as stream:
            next(stream)
            own = kernel_threads() - before
            assert (len(own), policies(own)) == (2, wanted)
            assert policies(before) == ordinary
    assert policies(before) == ordinary


@pytest.mark.real_vm
@pytest.mark.usefixtures("real_time")
def test_a_recording_s_priority_is_that_of_the_thread_that_samples(tmp_path):
    """`kvmstats record --priority`: what writes to the disk, and all else, stays as it was."""
    pytest.importorskip("pyarrow")
    path = tmp_path / "run"
    command = [sys.executable, "-m", "kvmstats_fast", "record", "-I", "1ms", "--priority", "7", "-o", path]
    with Holder() as vmm, subprocess.Popen([*command, "-p", str(vmm.pid)], stderr=subprocess.PIPE) as running:
        try:
            assert until(path.exists)  # it samples by then
            threads = Path(f"/proc/{running.pid}/task").iterdir()
            assert policies(int(thread.name) for thread in threads) == {*policies([0]), (os.SCHED_FIFO, 7)}
        finally:
            running.kill()


def test_a_priority_that_is_refused_says_what_it_takes(files):
    """PermissionError, before anything is sampled; a limit allows what is within it, and the Sampler can be used."""
    sampler = kf.Sampler(files)
    most = resource.getrlimit(resource.RLIMIT_RTPRIO)[1]

    def work():
        allowed = min(most, 5)
        resource.setrlimit(resource.RLIMIT_RTPRIO, (allowed, most))
        gc.collect()  # what tests before have left
        fds = open_fds()
        text = rf"CAP_SYS_NICE, or an RLIMIT_RTPRIO of at least {allowed + 1} \(here {allowed}; `ulimit -r`"
        with pytest.raises(PermissionError, match=text):
            sampler.run(0, count=1, priority=allowed + 1)
        with pytest.raises(PermissionError, match="priority is 99"), sampler.stream(0, priority=99):
            pass
        assert open_fds() == fds
        assert len(sampler.run(0, count=3, priority=allowed or None)) == 3

    if os.geteuid():
        pytest.skip("only root can give up its capabilities")
    assert exit_status(forked(work, uid=NOBODY)) == 0


@pytest.mark.parametrize(
    ("priority", "error", "text"),
    [
        (0, ValueError, "priority is 0; it must be from 1 to 99"),
        (100, ValueError, "priority is 100; it must be from 1 to 99"),
        ("high", TypeError, "priority is a str; it must be a whole number, from 1 to 99"),
        (1.0, TypeError, "priority is a float; it must be a whole number, from 1 to 99"),
    ],
)
def test_a_priority_that_cannot_be_one_is_refused(files, priority, error, text):
    """Before anything is sampled, by run and by stream."""
    sampler = kf.Sampler(files)
    for use in (sampler.run, sampler.stream):
        with pytest.raises(error, match=text):
            use(0.001, count=1, priority=priority)
