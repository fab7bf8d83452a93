"""How runs and streams end: by stop, in a fork, without a thread, forgotten; and that nothing waits for ever."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import NOBODY, become, exit_status, forked, kernel_threads, open_fds, until

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.sampling import run
from kvmstats_fast.testing import SyntheticStats


@pytest.fixture
def files(resources):
    """Two made-up files of vCPUs, open."""
    made = [resources.enter_context(SyntheticStats("x86", "vcpu", vcpu_id=i)) for i in range(2)]
    return [resources.enter_context(one.open()) for one in made]


#: How a program starts that has a Sampler `sampler` of a made-up file.
SAMPLER = """
import os, sys, threading, time, warnings
import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats
made = SyntheticStats(); file = made.open(); sampler = kf.Sampler([file])
"""


def in_a_process(code, *arguments, seconds=60):
    """The output of a program that starts like that; it fails if the program hangs."""
    command = [sys.executable, "-W", "ignore", "-c", SAMPLER + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# ---- stop


@pytest.mark.parametrize("arguments", [{"count": 10**6}, {}, {"duration": 3600}])
@pytest.mark.parametrize("interval", [0.001, 60])
def test_stop_ends_a_run_from_another_thread_with_its_samples(files, interval, arguments):
    """Bounded or not, between two ticks or long before the next: run returns what was sampled, as interrupted."""
    sampler = kf.Sampler(files, "exits")
    assert sampler.stop() is False
    stopped, before = [], kernel_threads()

    def stop():
        until(lambda: len(kernel_threads() - before) == 2)  # this one, and that of the run
        time.sleep(0.2)
        stopped.append(sampler.stop())

    thread = threading.Thread(target=stop)
    thread.start()
    samples = sampler.run(interval, **arguments)
    thread.join()
    assert stopped == [True]
    assert samples.interrupted
    assert 0 < len(samples) < 10_000
    assert (np.diff(samples.tick.astype(np.int64)) > 0).all()
    assert sampler.stop() is False
    assert not sampler.run(0, count=3).interrupted


def test_stop_of_a_run_that_has_not_begun_is_not_lost(files, monkeypatch):
    """A stop that comes while the run prepares its memory ends it before its first sweep."""
    sampler = kf.Sampler(files)
    monkeypatch.setattr(run, "check_memory", lambda *_: sampler.stop())
    samples = sampler.run(0.001, count=10**5)
    assert (len(samples), samples.interrupted) == (0, True)
    assert sampler.run(0.001).interrupted


def test_stop_ends_a_stream_and_what_it_has_can_be_read(files):
    """Sampler.stop is Stream.stop for who only has the Sampler."""
    sampler = kf.Sampler(files)
    with sampler.stream(0.001, chunk=5) as stream:
        first = next(stream)
        assert sampler.stop() is True
        whole = kf.Samples.concatenate([first, *stream])
    assert whole.tick.tolist()[:5] == first.tick.tolist()


def test_a_run_that_ended_by_itself_was_not_interrupted(files):
    """A stop after the last tick changes nothing."""
    sampler = kf.Sampler(files)
    assert not sampler.run(0, count=3).interrupted
    assert sampler.stop() is False


ASYNC = """
import asyncio, signal

def interrupt():
    while len(os.listdir("/proc/self/task")) < 4:  # with asyncio's thread, and that of the run
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)

async def main():
    threading.Thread(target=interrupt).start()
    try:
        await asyncio.to_thread(sampler.run, 0.01)
    finally:
        print(sampler.stop())

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("Ctrl-C")
"""


def test_ctrl_c_ends_an_asyncio_program_that_awaits_a_run():
    """The run is in a thread that asyncio waits for: stop, called when the task is cancelled, ends it."""
    assert in_a_process(ASYNC).split() == ["True", "Ctrl-C"]


# ---- threads


def test_no_python_thread_is_needed(files, monkeypatch):
    """Whatever a library puts in place of Python's threads, locks and select: runs and streams do not use them."""

    def refuse(*_, **__):
        pytest.fail("used")

    for name in ("_thread.start_new_thread", "threading.Thread.start", "select.poll", "select.select", "time.sleep"):
        monkeypatch.setattr(name, refuse)
    sampler = kf.Sampler(files, threads=2)
    assert len(sampler.run(0.001, count=3)) <= 3
    assert len(sampler.run(0, count=3, duration=60)) == 3
    with sampler.stream(0, chunk=1, count=3) as stream:
        assert len(list(stream)) == 3


PATCHED = """
import signal, subprocess
print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), len(sampler.run(0.001, count=5, wait="spin")) <= 5)
with sampler.stream(0.001, chunk=2, count=6) as stream:
    print(sum(len(part) + part.missed for part in stream))
print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), subprocess.run(["true"]).returncode)
ours = os.getpid()
before = set(os.listdir("/proc/self/task"))  # a thread that has been joined is there a little longer
if not os.fork():
    while before.issuperset(os.listdir(f"/proc/{ours}/task")):  # the run's thread is not there yet
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(ours, signal.SIGINT)
    os._exit(0)
print(sampler.run(0.01).interrupted)
"""


def test_runs_work_under_green_threads(under_green_threads):
    """After monkey-patching: a real thread, no signal blocked in the caller's; Ctrl-C and subprocess go on working."""
    assert under_green_threads(SAMPLER + PATCHED) == ["0 True", "6", "0 0", "True"]


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (3, 1), (2, 2), (4, 3)])
def test_a_thread_that_cannot_be_made_is_an_error_that_names_the_limits(files, threads, most):
    """At RLIMIT_NPROC, whichever thread it is: the message says which limits there are, none of those that were made is
    left, and the Sampler is free afterwards.
    """
    if os.getuid():
        pytest.skip("only root can become a user without other processes")
    sampler = kf.Sampler(files, threads=threads)

    def work():
        import resource  # noqa: PLC0415 - of the child only

        become(NOBODY, 0)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        fds = open_fds()

        def read_on():
            with sampler.stream(0) as chunks:
                list(chunks)

        for use in (lambda: sampler.run(0, count=1), lambda: sampler.run(0), read_on):
            with pytest.raises(kf.KvmStatsError, match=r"cannot be started: .*RLIMIT_NPROC .*pids\.max"):
                use()
        assert open_fds() == fds
        assert len(kernel_threads()) == 1
        sampler.sweep()

    assert exit_status(forked(work)) == 0


def test_a_processor_that_is_gone_is_an_error(files, monkeypatch):
    """What the schedule allowed and the kernel then refuses ends the run with the reason."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5000)))
    with pytest.raises(kf.KvmStatsError, match="Invalid argument; the processors given as cpu are no longer allowed"):
        kf.Sampler(files).run(0, count=1, cpu=4999)


# ---- forgotten


def test_a_stream_that_is_forgotten_in_a_cycle_only_stops(files, monkeypatch):
    """Its collection, in whatever thread, waits for nothing; thread, memory and eventfd are gone with the next run."""
    sampler, before, fds = kf.Sampler(files), kernel_threads(), open_fds()
    waited, end = [], run._Ring.end

    def end_here(ring):
        if not ring.c.ended:
            waited.append(threading.current_thread())
        end(ring)

    monkeypatch.setattr(run._Ring, "end", end_here)
    for _ in range(10):
        cycle = [sampler.stream(0.001)]
        cycle.append(cycle)
        cycle[0].__enter__()
        del cycle
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join(20)
        assert not collector.is_alive()
        assert len(sampler.run(0, count=1)) == 1
    assert until(lambda: kernel_threads() == before)
    sampler.run(0, count=1)
    assert not waited
    assert open_fds() == fds
    assert not run._RINGS


def test_an_exception_that_keeps_a_run_alive_does_not_keep_the_sampler_busy(files, monkeypatch):
    """What failed before its thread was made has given the Sampler back, whoever still holds the traceback."""
    sampler = kf.Sampler(files)
    with monkeypatch.context() as patch:
        patch.setattr(run, "Rows", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError) as caught:
            sampler.run(0, count=1)
    assert caught.value.__traceback__ is not None
    assert len(sampler.run(0, count=1)) == 1


def test_the_end_of_a_stream_is_told_and_not_looked_for(files, monkeypatch):
    """A reader that waits is woken up by the end: with waits of an hour nothing takes long."""
    monkeypatch.setattr(run, "_WAIT_MS", 3_600_000)
    sampler = kf.Sampler(files)
    for _ in range(100):
        with sampler.stream(0, chunk=2, count=4) as stream:
            assert [len(part) for part in stream] == [2, 2]
        assert len(sampler.run(0, count=4)) == 4


# ---- forks and the end of the program


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_in_the_middle_of_sweeps_leaves_the_child_a_free_sampler(files, threads):
    """Whatever other threads do with Samplers at the fork: in the child sweep, run and stream work."""
    samplers = [kf.Sampler(files, threads=threads) for _ in range(3)]
    done = threading.Event()

    def sweep():
        while not done.is_set():
            samplers[0].sweep()

    def sample():
        while not done.is_set():
            samplers[1].run(0, count=20)

    def use():
        for sampler in samplers:
            sampler.sweep()
            assert len(sampler.run(0, count=3)) == 3
            with sampler.stream(0, chunk=2, count=4) as stream:
                assert len(list(stream)) == 2

    workers = [threading.Thread(target=work) for work in (sweep, sample)]
    for worker in workers:
        worker.start()
    try:
        with samplers[2].stream(0.0001) as stream:
            next(stream)
            for _ in range(15):
                child = forked(use)
                assert until(lambda child=child: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
                assert exit_status(child) == 0
            next(stream)
    finally:
        done.set()
        for worker in workers:
            worker.join()


def test_a_forgotten_stream_is_no_burden_for_a_child(files):
    """The child has neither the thread of the parent's stream nor its eventfd."""
    with kf.Sampler(files).stream(0.001) as stream:
        next(stream)

        def look():
            assert len(kernel_threads()) == 1
            assert stream._run._ring.c.event_fd == -1
            with pytest.raises(RuntimeError, match="stayed in the parent process"):
                for _ in stream:
                    pass

        assert exit_status(forked(look)) == 0
        next(stream)


ENDINGS = {
    "a stream that nobody left": "stream = sampler.stream(0.0001); stream.__enter__(); next(stream)",
    "in a daemon's hands": (
        "threading.Thread(target=lambda: [None for x in sampler.stream(0.0001).__enter__()], daemon=True).start()\n"
        "time.sleep(0.1)"
    ),
    "a run in a daemon": "threading.Thread(target=sampler.run, args=(0.0001,), daemon=True).start(); time.sleep(0.1)",
    "in a cycle": "c = [sampler.stream(0.0001)]; c.append(c); c[0].__enter__(); next(c[0]); del c",
    "a run at the end": "import atexit; atexit.register(lambda: sampler.run(0, count=3))",
    "a run after the end": (
        "class Last:\n    def __del__(self, sampler=sampler): sampler.run(0, count=3)\nlast = Last(); last.me = last"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_whatever_is_under_way(ending):
    """No crash, no hang, no message."""
    assert in_a_process(ENDINGS[ending] + "\nprint('end')") == "end"


def test_at_the_end_of_a_program_no_thread_reads_on(files):
    """It would write to memory that the interpreter takes back."""
    before = kernel_threads()
    with kf.Sampler(files).stream(0.001) as stream:
        next(stream)
        assert kernel_threads() > before
        run._end_all()
        assert kernel_threads() == before


# ---- what is asked for wrongly


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda sampler, _: sampler.run("1"), "interval is a str; it must be a number of seconds"),
        (lambda sampler, _: sampler.run(None), "interval is a NoneType; it must be a number of seconds"),
        (lambda sampler, _: sampler.run(1j), "interval is a complex; it must be a number of seconds"),
        (lambda sampler, _: sampler.run(0, count="3"), "count is a str; it must be a whole number, at least 1"),
        (lambda sampler, _: sampler.run(0, count=2.5), "count is a float; it must be a whole number, at least 1"),
        (lambda sampler, _: sampler.run(0, duration="1"), "duration is a str; it must be a number of seconds"),
        (lambda sampler, _: sampler.run(0, duration=[1]), "duration is a list; it must be a number of seconds"),
        (
            lambda sampler, _: sampler.run(0, count=1, wait=3),
            "wait is an int; it must be one of 'sleep', 'spin', 'hybrid'",
        ),
        (lambda sampler, _: sampler.run(0, count=1, wait=["spin"]), "wait is a list; it must be one of"),
        (lambda sampler, _: sampler.run(0, count=1, cpu="0"), "cpu is a str; it must be a whole number, at least 0"),
        (lambda sampler, _: sampler.run(0, count=1, cpu=1.0), "cpu is a float; it must be a whole number, at least 0"),
        (lambda sampler, _: sampler.stream(0, chunk="9"), "chunk is a str; it must be a whole number, at least 1"),
        (
            lambda sampler, _: sampler.stream(0, depth=None),
            "depth is a NoneType; it must be a whole number, at least 1",
        ),
        (lambda sampler, _: sampler.view(3), "name is an int; it must be the name of a statistic"),
        (lambda *_: kf.Sampler(3), "files is an int; it must be StatsFiles, or lists of them"),
        (lambda *_: kf.Sampler(None), "files is a NoneType; it must be StatsFiles"),
        (lambda *_: kf.Sampler("web"), "files has a str; it must be StatsFiles"),
        (lambda sampler, _: kf.Sampler([sampler]), "files has a Sampler; it must be StatsFiles"),
        (lambda *_: kf.Sampler([[3]]), "files has an int; it must be StatsFiles"),
        (lambda _, file: kf.Sampler([file], 3), "stats is an int; it must be a name or glob, or several"),
        (lambda _, file: kf.Sampler([file], [3]), "stats has an int; it must be a name or glob"),
        (lambda _, file: kf.Sampler([file], b"exits"), "stats has an int; it must be a name or glob"),
        (
            lambda _, file: kf.Sampler([file], threads="2"),
            "threads is a str; it must be a whole number, from 1",
        ),
        (lambda *_: kf.measure(3), "files is an int; it must be StatsFiles"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named_with_what_it_must_be(files, use, message):
    """One sentence, and the Sampler is free afterwards."""
    sampler = kf.Sampler(files)
    with pytest.raises(TypeError) as caught:
        use(sampler, files[0])
    assert message in str(caught.value)
    assert len(sampler.run(0, count=1)) == 1


def test_a_name_that_is_missing_is_looked_for_in_all_files(resources):
    """The hint knows the names of every file, not of the first one only."""
    vm = resources.enter_context(resources.enter_context(SyntheticStats("x86", "vm")).open())
    vcpu = resources.enter_context(resources.enter_context(SyntheticStats("x86", "vcpu")).open())
    for files in ([vm, vcpu], [vcpu, vm]):
        with pytest.raises(KeyError, match="did you mean halt_exits"):
            kf.Sampler(files, "halt_exit")
        with pytest.raises(KeyError, match="did you mean remote_tlb_flush"):
            kf.Sampler(files, "remote_tlb_flus")
        with pytest.raises(KeyError, match="did you mean halt_exits"):
            kf.Sampler(files).view("halt_exit")


def test_a_run_that_is_no_more_does_not_keep_the_sampler(files):
    """Ctrl-C may have come while it was let go of: the next run has the Sampler."""
    sampler = kf.Sampler(files)
    assert lib.kvmstats_lock(sampler._live.c, 1 << 40) == 0  # an owner that is nobody's
    assert len(sampler.run(0, count=1)) == 1


def test_another_reason_why_threads_cannot_start_is_told_without_limits():
    """They have nothing to do with it."""
    text = str(run._thread_refused(errno.EPERM))
    assert text == "the threads of this run cannot be started: Operation not permitted"
