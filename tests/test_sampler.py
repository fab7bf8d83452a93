"""Sweeps, runs and streams: every tick is accounted for, and every value is the kernel's."""

import errno
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, CtrlC, exit_status, forked, kernel_threads, open_fds, take_away, until

import kvmstats_fast as kf
from kvmstats_fast.sampling import memory
from kvmstats_fast.testing import SyntheticStats, TinyGuest, counts_right, exit_counter


@pytest.fixture
def made(resources):
    """Three made-up files: a VM's and two vCPUs'."""
    kinds = [("vm", 0), ("vcpu", 0), ("vcpu", 1)]
    return [resources.enter_context(SyntheticStats("x86", kind, vcpu_id=i)) for kind, i in kinds]


@pytest.fixture
def files(made, resources):
    """Them, opened."""
    return [resources.enter_context(one.open()) for one in made]


class Ticking:
    """Adds 1 to `exits` of a made-up file as fast as it can, in a thread."""

    def __init__(self, made):
        self.made, self.count, self.done = made, 0, False
        self.thread = threading.Thread(target=self.work)

    def work(self):
        """Tick."""
        while not self.done:
            self.made.add("exits", 1)
            self.count += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done = True
        self.thread.join()


# ---- sweep and view


def test_a_sweep_updates_the_live_rows_in_place(made, files):
    """view() is a row of n values (or n rows of buckets) that each sweep overwrites."""
    sampler = kf.Sampler(files)
    exits, hist = sampler.view("exits"), sampler.view("halt_wait_hist")
    assert (exits.tolist(), hist.shape) == ([0, 0], (2, 32))
    made[1].add("exits", 5)
    made[2].add("exits", 7)
    made[2].add("halt_wait_hist", 9, bucket=31)
    sampler.sweep()
    assert exits.tolist() == [5, 7]
    assert hist[1].tolist() == [0] * 31 + [9]
    assert sampler.view("exits").base is not None
    assert np.shares_memory(sampler.view("exits"), exits)


def test_stats_keeps_only_what_was_chosen_in_a_row_of_that_size(made, files):
    """With stats= the narrowest pread is made, and rows hold the chosen values only, gathered where they have gaps."""
    made[1].set("exits", 3)
    made[1].set("halt_wait_hist", range(32))
    made[1].set("notify_window_exits", 8)
    for stats, width, span in [
        ("exits", 1, 1),
        (["exits", "io_exits"], 2, 2),
        (["io_exits", "exits"], 2, 2),
        (["notify_window_exits", "halt_wait_hist", "exits"], 34, 67),
        ("halt_*", 104, 103 + 18),
    ]:
        sampler = kf.Sampler(files, stats)
        (group,) = sampler._live.groups
        assert group.values.shape == (1, 2, width)
        assert (sampler._live.structs[0].count == span) or stats == "halt_*"
        assert [info.kind for info in sampler.files] == ["vcpu", "vcpu"]
        sampler.sweep()
        names = [stat.name for stat, _ in group.places.values()]
        for name in names:
            expected = files[1].snapshot()[name]
            assert np.array_equal(sampler.view(name)[0], expected), name
        for missing in {"exits", "pf_taken"} - set(names):
            with pytest.raises(KeyError, match=missing):
                sampler.view(missing)


def test_files_of_different_kernels_layouts_and_byte_orders_are_sampled_together(resources):
    """One sampler reads v2 and merged, big- and little-endian, 4- and 8-byte files, and gives each its own value."""
    made = [
        SyntheticStats("x86", "vm", layout="v2", value_size=4, byteorder="big"),
        SyntheticStats("x86", "vm", layout="v2", byteorder="little"),
        SyntheticStats("s390", "vcpu", layout="v9", byteorder="big"),
        SyntheticStats("arm64", "vcpu", layout="merged"),
        SyntheticStats("x86", "vcpu"),
    ]
    for i, one in enumerate(made):
        resources.enter_context(one)
        name = "remote_tlb_flush" if one.kind == "vm" else "halt_wakeup"
        one.set(name, 1000 + i)
    files = [resources.enter_context(one.open()) for one in made]
    for stats in (None, ["halt_wakeup", "remote_tlb_flush", "exits"]):
        samples = kf.Sampler(files, stats).run(0, count=3)
        assert samples["remote_tlb_flush"].tolist() == [[1000, 1001]] * 3
        assert samples["halt_wakeup"].tolist() == [[1002, 1003, 1004]] * 3
        assert [info.id for info in samples.columns("halt_wakeup")] == [file.id for file in files[2:]]
    with pytest.raises(KeyError, match="different schemas"):
        kf.Sampler(files).view("halt_wakeup")


def test_what_cannot_be_sampled_is_refused(files):
    """Wrong types, closed files, unknown names, no files, too many threads: each says what is wrong."""
    with pytest.raises(TypeError, match="files has an int; it must be StatsFiles"):
        kf.Sampler([files[0].fileno()])
    with pytest.raises(ValueError, match="nothing to sample"):
        kf.Sampler([])
    with pytest.raises(KeyError, match="did you mean halt_exits"):
        kf.Sampler(files[1:], ["exits", "halt_exit"])
    with pytest.raises(ValueError, match="threads is 0"):
        kf.Sampler(files, threads=0)
    with pytest.raises(ValueError, match="threads is 65"):
        kf.Sampler(files, threads=65)
    closed = kf.StatsFile.from_bytes((DATA / "captures" / "arm64-6.1" / "vm-after.bin").read_bytes())
    closed.close()
    with pytest.raises(ValueError, match="is closed"):
        kf.Sampler([closed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": -1}, "interval is -1"),
        ({"interval": float("nan")}, "interval is nan"),
        ({"interval": 1e-10}, "clock counts ns"),
        ({"interval": 1e10}, "interval is 10000000000.0; .* at most 1e"),
        ({"interval": 1, "duration": 1e300}, "duration is 1e.300"),
        ({"interval": 1, "count": 0}, "count is 0"),
        ({"interval": 1, "duration": 0}, "duration is 0"),
        ({"interval": 1, "wait": "nap"}, "wait is 'nap'"),
        ({"interval": 1, "cpu": 100_000}, "cpu is 100000; this process may run on 0"),
        ({"interval": 1, "cpu": []}, "cpu is"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(files, arguments, message):
    """Arguments out of range are ValueErrors, and the Sampler can be used afterwards."""
    sampler = kf.Sampler(files)
    with pytest.raises(ValueError, match=message):
        sampler.run(**{"count": 1} | arguments)
    if "count" not in arguments:
        with pytest.raises(ValueError, match=message):
            sampler.stream(**arguments)
    assert len(sampler.run(0, count=2)) == 2


# ---- schedule


@pytest.mark.parametrize("wait", ["sleep", "spin", "hybrid"])
@pytest.mark.parametrize("interval", [0.00005, 0.001])
def test_taken_and_missed_ticks_are_all_ticks(files, wait, interval):
    """Sweeps taken and ticks missed are all ticks; their numbers ascend, and none is taken before it is due."""
    ticks = round(0.05 / interval)
    sampler = kf.Sampler(files)
    for arguments in ({"count": ticks}, {"duration": 0.05}, {"count": ticks, "duration": 10}):
        samples = sampler.run(interval, wait=wait, **arguments)
        assert len(samples) + samples.missed == ticks
        assert (np.diff(samples.tick.astype(np.int64)) > 0).all()
        assert samples.tick[0] == 0
        assert samples.tick[-1] == ticks - 1
        late = samples.time - samples.time[0] - (samples.tick * np.uint64(interval * 1e9)).astype(np.int64)
        # Tick 0 may itself be late, so that the others seem early by as much; a late one is late by less than a tick,
        # but for the last, which is taken however late it is.
        assert (np.abs(late[:-1]) < interval * 1e9).all()


def test_a_load_that_makes_ticks_late_loses_none_of_them_unseen(files):
    """With both processors busy, taken + missed is still the number of ticks, and the schedule does not drift."""
    code = "import time; end = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    load = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        samples = kf.Sampler(files).run(0.0001, duration=1, wait="spin")
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert len(samples) + samples.missed == 10_000
    assert samples.missed > 0
    late = samples.time - samples.time[0] - samples.tick.astype(np.int64) * 100_000
    assert (np.abs(late[:-1]) <= 100_000).all()


def test_there_is_no_drift_over_thousands_of_ticks(files):
    """The k-th time is within one interval of start + k * interval, from the first tick to the three thousandth."""
    samples = kf.Sampler(files, "exits").run(0.001, count=3000)
    assert len(samples) + samples.missed == 3000
    late = samples.time - samples.time[0] - samples.tick.astype(np.int64) * 1_000_000
    assert (np.abs(late[:-1]) < 1_000_000).all()


def test_interval_0_samples_as_fast_as_it_can(files):
    """Without a schedule there is nothing to miss; count and duration end it."""
    sampler = kf.Sampler(files)
    samples = sampler.run(0, count=5000)
    assert (len(samples), samples.missed, samples.interval) == (5000, 0, 0)
    assert samples.tick.tolist() == list(range(5000))
    assert (np.diff(samples.time) >= samples.sweep_ns[:-1]).all()
    assert len(sampler.run(0, count=10**12, duration=0.02)) > 100
    began = time.monotonic_ns()
    timed = sampler.run(0, duration=0.1)
    assert time.monotonic_ns() - began >= 0.1e9
    assert 0 < timed.time[-1] - timed.time[0] <= 0.1e9
    assert timed.tick.tolist() == list(range(len(timed)))


def test_times_are_of_the_monotonic_clock_and_lead_to_the_wall_clock(files):
    """Sweep times lie between two readings of CLOCK_MONOTONIC around the run; with wall_offset it is CLOCK_REALTIME."""
    before, wall_before = time.monotonic_ns(), time.time_ns()
    samples = kf.Sampler(files).run(0.001, count=5)
    after, wall_after = time.monotonic_ns(), time.time_ns()
    assert before < samples.time[0] < samples.time[-1] < after
    assert wall_before <= samples.time[0] + samples.wall_offset <= wall_after
    assert (samples.sweep_ns > 0).all()


def test_the_timer_slack_of_the_callers_thread_stays(files):
    """A run wants precise timers for itself, not for whoever called it."""
    slack = Path("/proc/self/timerslack_ns")
    if not slack.exists():
        pytest.skip("this kernel does not show the timer slack")
    before = slack.read_text()
    kf.Sampler(files).run(0.001, count=3)
    assert slack.read_text() == before


def test_cpu_pins_the_run_and_not_the_caller(files):
    """The run's thread is on the processors asked for; the caller's mask is untouched."""
    mask = os.sched_getaffinity(0)
    cpu = max(mask)
    sampler, before = kf.Sampler(files), kernel_threads()
    with sampler.stream(0.001, chunk=20, count=200, cpu=cpu) as stream:
        (thread,) = kernel_threads() - before
        assert until(lambda: os.sched_getaffinity(thread) == {cpu})
        assert sum(len(part) + part.missed for part in stream) == 200
    assert os.sched_getaffinity(0) == mask


# ---- ending


def is_prompt(attempt):
    """Whether what `attempt` measures, in seconds, is below 0.1 at least once in ten: the machine may be busy."""
    return any(attempt() < 0.1 for _ in range(10))


@pytest.mark.parametrize("arguments", [{"count": 1000}, {}])
@pytest.mark.parametrize("wait", ["sleep", "spin"])
def test_ctrl_c_ends_a_run_at_once_with_what_was_sampled(files, arguments, wait):
    """SIGINT ends a bounded or endless run within 100 ms; everything sampled before is there, in order."""

    def attempt():
        sent, before = [], kernel_threads()

        def interrupt():
            until(lambda: len(kernel_threads() - before) == 2)  # this one, and that of the run
            time.sleep(0.3)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        try:
            samples = kf.Sampler(files).run(0.01, wait=wait, **arguments)
        except KeyboardInterrupt:  # the thread that calls had not come to wait for the run's yet
            return math.inf
        finally:
            interrupter.join()
        ended = time.monotonic()
        assert samples.interrupted
        assert "interrupted" in repr(samples)
        assert (np.diff(samples.tick.astype(np.int64)) > 0).all()
        began = samples.time[0] / 1e9
        ticks = len(samples) + samples.missed
        assert ticks < (ended - began) / 0.01 + 2
        # Neither long after the signal, nor without the ticks just before it.
        return max(ended - sent[0], sent[0] - (began + ticks * 0.01))

    assert is_prompt(attempt)


@pytest.mark.parametrize("interval", [0.0001, 60])
def test_a_stream_that_is_left_ends_at_once(files, interval):
    """Leaving the with block in mid-stream ends the thread within 100 ms, also when the next tick is far away."""
    sampler = kf.Sampler(files)

    def attempt():
        with sampler.stream(interval, chunk=1):
            time.sleep(0.01)
            start = time.monotonic()
        return time.monotonic() - start

    assert is_prompt(attempt)
    assert len(sampler.run(0, count=2)) == 2


# ---- failure in mid-run


def run_and_close(sampler, victim, **arguments):
    """A run of 1 s, unless it ends before, during which a file's fd is taken away behind its back."""
    timer = threading.Timer(0.1, take_away, (victim,))
    timer.start()
    try:
        return sampler.run(0.001, count=1000, **arguments)
    finally:
        timer.join()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_fails_is_marked_and_the_others_go_on(made, threads, resources):
    """An fd gone bad: its column is 0 from that sweep on, the error says what happened, the others have every tick."""
    fds = [os.dup(one.fileno()) for one in made]
    files = [kf.StatsFile(fd, closefd=False) for fd in fds]
    for fd in fds:
        resources.callback(os.close, fd)
    for one in made:
        one.set("remote_tlb_flush" if one.kind == "vm" else "exits", 6)
    samples = run_and_close(kf.Sampler(files, threads=threads), fds[1])
    (error,) = samples.errors
    assert (error.file, error.error.errno) == (1, errno.EBADF)
    assert 0 < error.sweep < len(samples)
    assert len(samples) + samples.missed == 1000
    exits = samples["exits"]
    assert (exits[: error.sweep, 0] == 6).all()
    assert (exits[error.sweep :, 0] == 0).all()
    assert (exits[:, 1] == 6).all()
    assert (samples["remote_tlb_flush"] == 6).all()
    assert not samples.resets("exits").any()
    assert not samples.delta("exits").any()
    rate = samples.rate("exits")
    assert np.isnan(rate[error.sweep - 1 :, 0]).all()
    assert not np.isnan(rate[: error.sweep - 1]).any()
    assert not np.isnan(rate[:, 1]).any()
    assert "1 files failed" in repr(samples)


def test_strict_raises_with_the_samples_so_far(made, resources):
    """strict=True ends the run at the failure; the exception carries what was sampled."""
    fds = [os.dup(one.fileno()) for one in made]
    files = [kf.StatsFile(fd, closefd=False) for fd in fds]
    for fd in fds:
        resources.callback(os.close, fd)
    with pytest.raises(OSError, match="closed elsewhere") as caught:
        run_and_close(kf.Sampler(files), fds[2], strict=True)
    samples = caught.value.samples
    assert 0 < len(samples) < 1000
    assert samples.errors[0].sweep == len(samples) - 1


def test_a_run_ends_when_no_file_is_left(made):
    """All files gone: the run ends long before its time."""
    files = [one.open() for one in made]
    timer = threading.Timer(0.1, lambda: [file.close() for file in files])
    timer.start()
    samples = kf.Sampler(files).run(0.001, count=100_000)
    assert len(samples) < 10_000
    assert sorted(error.file for error in samples.errors) == [0, 1, 2]
    assert all("was closed while it was being sampled" in str(error.error) for error in samples.errors)


def test_a_file_that_becomes_shorter_fails_with_where_it_ends(made, files):
    """A short read in a sweep is a FormatError at the byte where the file ends."""
    size = len(made[1].to_bytes())
    os.ftruncate(made[1].fileno(), size - 16)
    sampler = kf.Sampler(files)
    sampler.sweep()
    (error,) = sampler.errors
    assert error.file == 1
    assert isinstance(error.error, kf.FormatError)
    assert error.error.offset == size - 16
    with pytest.raises(kf.FormatError):
        sampler.sweep(strict=True)
    os.ftruncate(made[1].fileno(), size)
    sampler.sweep()
    assert sampler.errors == ()


def test_a_sweep_of_which_every_file_failed_raises(made):
    """There is nothing left to go on with."""
    files = [one.open() for one in made]
    sampler = kf.Sampler(files)
    for file in files:
        file.close()
    with pytest.raises(ValueError, match="was closed"):
        sampler.sweep()
    assert len(sampler.errors) == 3


# ---- streams


def test_a_stream_gives_every_tick_once_and_in_order(made, files):
    """Chunk after chunk, the ticks are those of one run, and values never go backwards."""
    with Ticking(made[1]), kf.Sampler(files).stream(0.0005, chunk=37, count=1000) as stream:
        parts = list(stream)
    whole = kf.Samples.concatenate(parts)
    assert len(whole) + whole.missed == 1000
    assert [len(part) for part in parts[:-1]] == [37] * (len(parts) - 1)
    assert (np.diff(whole.tick.astype(np.int64)) > 0).all()
    assert (np.diff(whole["exits"][:, 0].astype(np.int64)) >= 0).all()
    assert whole["exits"][-1, 0] > whole["exits"][0, 0]
    assert (stream.missed, stream.overruns) == (whole.missed, 0)


def test_a_slow_reader_loses_nothing_unseen(files):
    """A reader that sleeps: the ring overruns, every lost tick is counted, and memory stays that of the ring."""
    with kf.Sampler(files).stream(0.001, chunk=10, depth=2, count=500) as stream:
        parts = []
        for part in stream:
            parts.append(part)
            time.sleep(0.05)
    whole = kf.Samples.concatenate(parts)
    assert len(whole) + whole.missed == 500
    assert 0 < whole.overruns <= whole.missed
    assert (stream.missed, stream.overruns) == (whole.missed, whole.overruns)


def test_ticks_missed_behind_the_last_sweep_are_reported_too(files):
    """A reader that wakes up after the end still learns how many ticks had no room."""
    with kf.Sampler(files).stream(0.001, chunk=5, depth=1, count=200) as stream:
        time.sleep(0.4)
        parts = list(stream)
    assert [len(part) for part in parts] == [5, 0]
    assert sum(len(part) + part.missed for part in parts) == 200
    assert 0 < parts[-1].overruns <= parts[-1].missed <= 195


def test_what_a_stream_gave_is_not_overwritten(made, files):
    """Samples are the reader's: the ring that is filled again does not change them."""
    with Ticking(made[1]), kf.Sampler(files).stream(0, chunk=50, depth=2, count=2000) as stream:
        parts = [(part, part["exits"].copy()) for part in stream]
    assert all(np.array_equal(part["exits"], copy) for part, copy in parts)
    assert sum(len(part) for part, _ in parts) == 2000


def test_a_stream_marks_a_failed_file_in_every_chunk(made, resources):
    """The chunk in which a file fails names the sweep; in those that follow it has failed from their first."""
    fds = [os.dup(one.fileno()) for one in made]
    files = [kf.StatsFile(fd, closefd=False) for fd in fds]
    for fd in fds:
        resources.callback(os.close, fd)
    parts = []
    made[0].set("remote_tlb_flush", 7)
    with kf.Sampler(files).stream(0.001, chunk=50, depth=2, count=30_000) as stream:
        for part in stream:
            parts.append(part)
            if len(parts) == 4:
                take_away(fds[0])
            if sum(bool(part.errors) for part in parts) == 3:
                stream.stop()
    assert [len(part.errors) for part in parts[:4]] == [0, 0, 0, 0]
    first = next(i for i, part in enumerate(parts) if part.errors)
    assert all(part.errors[0][:2] == (0, 0) for part in parts[first + 1 :])
    whole = kf.Samples.concatenate(parts)
    (error,) = whole.errors
    assert error.sweep == sum(map(len, parts[:first])) + parts[first].errors[0].sweep >= 100
    # The ring was filled before, so that zeros are written and not left over.
    assert len(parts[0]) * 2 < error.sweep < len(whole) - 1
    assert (whole["remote_tlb_flush"][: error.sweep] == 7).all()
    assert not whole["remote_tlb_flush"][error.sweep :].any()


def test_a_strict_stream_raises_behind_the_samples(made, resources):
    """strict=True: the chunk with the failure still comes, then the error."""
    fds = [os.dup(one.fileno()) for one in made]
    files = [kf.StatsFile(fd, closefd=False) for fd in fds]
    for fd in fds:
        resources.callback(os.close, fd)
    seen = 0
    with kf.Sampler(files).stream(0.001, chunk=20, strict=True) as stream:
        while seen < 40:
            seen += len(next(stream))
        take_away(fds[0])
        with pytest.raises(OSError, match="closed elsewhere"):
            list(stream)
        with pytest.raises(OSError, match="closed elsewhere"):
            next(stream)


def test_a_stream_runs_inside_its_with_block_and_once(files):
    """Iterating outside, or entering twice, says what to do."""
    sampler = kf.Sampler(files)
    stream = sampler.stream(0.001, count=3)
    with pytest.raises(RuntimeError, match="where its `with` block begins"):
        next(stream)
    with stream:
        assert sum(len(part) + part.missed for part in stream) == 3
    with pytest.raises(RuntimeError, match="runs once"), stream:
        pass
    with pytest.raises(ValueError, match="chunk is 0"):
        sampler.stream(0.001, chunk=0)


def test_a_chunk_has_at_most_four_megabytes_by_default(made, resources):
    """Of many files it has as many sweeps as these hold."""
    files = [resources.enter_context(made[1].open()) for _ in range(40)]
    with kf.Sampler(files).stream(0) as stream:
        values = next(stream).groups[0].values
    assert 2 << 20 < values.nbytes <= 4 << 20


@pytest.mark.measures_memory
def test_a_stream_takes_no_more_memory_the_longer_it_runs(files):
    """A million sweeps through a stream leave the process as large as before."""
    sampler = kf.Sampler(files[1:], ["exits", "halt_exits"])
    seen, sizes = 0, []
    with sampler.stream(0, chunk=2000, count=1_000_000) as stream:
        for part in stream:
            seen += len(part)
            if seen % 100_000 == 0:
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert seen == 1_000_000
    assert sizes[-1] - sizes[1] < 1 << 20


# ---- threads and resources


def test_a_sampler_that_is_used_from_two_threads_says_so(files):
    """While a stream runs, sweep, run and stream of the same Sampler are RuntimeErrors; another Sampler is free."""
    sampler = kf.Sampler(files)
    with sampler.stream(0.001) as stream:
        next(stream)
        for use in (sampler.sweep, lambda: sampler.run(0, count=1), sampler.stream(0.001).__enter__):
            with pytest.raises(RuntimeError, match="in use by a run"):
                use()
        assert len(kf.Sampler(files).run(0, count=3)) == 3
    sampler.sweep()
    assert sampler.view("exits").tolist() == [0, 0]


def test_samplers_in_several_threads_run_side_by_side(made, files):
    """Four threads with a Sampler each, all at once, each get every sweep and the right values."""
    made[1].set("exits", 11)
    results = []

    def work():
        results.append(kf.Sampler(files).run(0, count=2000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(samples) for samples in results] == [2000] * 4
    assert all((samples["exits"] == [11, 0]).all() for samples in results)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_threads_share_a_sweep_without_losing_a_file(resources, threads):
    """However many threads share a sweep of 10 files, each file has its own value in its own column."""
    made = [resources.enter_context(SyntheticStats(vcpu_id=i)) for i in range(10)]
    files = [resources.enter_context(one.open()) for one in made]
    for i, one in enumerate(made):
        one.set("exits", 100 + i)
        one.set("pf_taken", 200 + i)
    for stats in (None, ["exits", "pf_taken"]):
        samples = kf.Sampler(files, stats, threads=threads).run(0, count=200)
        assert (samples["exits"] == [100 + i for i in range(10)]).all()
        assert (samples["pf_taken"] == [200 + i for i in range(10)]).all()


def test_runs_that_do_not_fit_into_memory_are_refused_before_they_start(files):
    """A MemoryError says how much it would be and what to do; the Sampler is free afterwards."""
    sampler = kf.Sampler(files)
    before = open_fds()
    with pytest.raises(MemoryError, match=r"MiB.*stats=.*stream\(\)") as caught:
        sampler.run(0.001, count=1 << 40)
    assert caught.value.__traceback__ is not None  # what it holds does not keep the Sampler busy
    assert open_fds() == before
    assert len(sampler.run(0, count=1)) == 1


@pytest.mark.measures_memory
def test_nothing_is_left_of_ten_thousand_samplers(files):
    """Making, sweeping and dropping Samplers, and running some, costs no fd, no thread and no memory."""
    for _ in range(200):
        kf.Sampler(files).sweep()
    fds, threads = open_fds(), threading.active_count()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(10_000):
        sampler = kf.Sampler(files)
        sampler.sweep()
        if i % 50 == 0:
            sampler.run(0, count=2)
    assert (open_fds(), threading.active_count()) == (fds, threads)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 2048  # KiB: 210 bytes for each


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C in a __del__ goes no further
@pytest.mark.parametrize(
    ("arguments", "step"), [({"interval": 0.001, "count": 3}, 3), ({"interval": 0, "count": 3, "duration": 1}, 17)]
)
def test_ctrl_c_at_any_instruction_of_a_run_is_ctrl_c(files, arguments, step):
    """The run returns what it has, or KeyboardInterrupt comes through; no other error, and nothing is left behind."""
    sampler = kf.Sampler(files, "exits")
    fds, before, outcomes, left = open_fds(), kernel_threads(), set(), 0
    for at in itertools.count(1, step):
        if left > 0:
            break
        samples = None
        with CtrlC(at) as ctrl_c:
            samples = sampler.run(**arguments)
        left = ctrl_c.left
        outcomes.add(None if samples is None else samples.interrupted)
        if samples is not None:
            assert (np.diff(samples.tick.astype(np.int64)) > 0).all()
        assert len(sampler.run(0, count=2)) == 2
    assert at > 600
    assert {None, False} <= outcomes
    assert (open_fds(), kernel_threads()) == (fds, before)


RANDOM_CTRL_C = """
import os, random, signal, sys, threading, time
import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

made = [SyntheticStats(vcpu_id=i) for i in range(3)]
files = [one.open() for one in made]
sampler = kf.Sampler(files, threads=2)
random.seed(5)
stop = threading.Event()

def interrupt():
    while not stop.wait(random.uniform(0.0005, 0.008)):
        os.kill(os.getpid(), signal.SIGINT)

def attempt(i):
    kind = i % 3
    if kind == 0:
        sampler.run(0.0002, count=20)
    elif kind == 1:
        sampler.run(0.0002, duration=None if i % 2 else 0.004)
    else:
        with sampler.stream(0.0002, chunk=5, count=20) as stream:
            for part in stream:
                assert part["exits"].shape[1] == 3

left = [0]  # so many Ctrl-C still get through

def handle(*_):
    if left[0]:
        left[0] -= 1
        raise KeyboardInterrupt

def disturbed(i):
    try:
        left[0] = 2
        attempt(i)
    except RuntimeError as error:  # a run that Ctrl-C kept from being closed is still on its way out
        left[0] = 0
        assert "in use by a run" in str(error)
    finally:
        left[0] = 0

signal.signal(signal.SIGINT, handle)
thread = threading.Thread(target=interrupt, daemon=True)
thread.start()
interrupted, i, end = 0, 0, time.monotonic() + 1
while time.monotonic() < end or i <= 20 or not interrupted:
    i += 1
    try:
        try:
            disturbed(i)
        except KeyboardInterrupt:
            interrupted += 1
    except KeyboardInterrupt:  # the second, while the first was caught
        pass
stop.set()
thread.join()
while True:
    try:
        samples = sampler.run(0.001, count=5)
        break
    except RuntimeError as error:  # likewise
        assert "in use by a run" in str(error)
        time.sleep(0.01)
assert len(samples) + samples.missed == 5, samples
assert len(os.listdir("/proc/self/fd")) < 20, os.listdir("/proc/self/fd")
print("fine")
"""


def test_ctrl_c_at_any_moment_leaves_the_sampler_as_it_was():
    """Under a hail of SIGINTs nothing crashes, no fd stays open, and the Sampler is free afterwards."""
    command = [sys.executable, "-W", "ignore", "-c", RANDOM_CTRL_C]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_a_forked_child_has_no_part_in_its_parents_stream(files):
    """In the child the stream raises and the Sampler is free; the parent's stream goes on."""
    sampler = kf.Sampler(files)
    with sampler.stream(0.001, chunk=10, count=300) as stream:
        parts = [next(stream)]

        def work():
            with pytest.raises(RuntimeError, match=r"^this run or stream stayed in the parent process"):
                list(stream)
            stream.__exit__(None, None, None)
            samples = sampler.run(0.001, count=3)
            assert len(samples) + samples.missed == 3

        assert exit_status(forked(work)) == 0
        parts.extend(stream)
    assert sum(len(part) + part.missed for part in parts) == 300


def test_a_stream_has_one_reader(files):
    """A second thread that reads the same stream is told so, and takes nothing away from the first."""
    refused = []
    with kf.Sampler(files).stream(0.02, chunk=10, count=20) as stream:

        def read():
            try:
                assert until(lambda: not stream._turn._free)  # the first one reads
                next(stream)
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=read)
        thread.start()
        parts = list(stream)
        thread.join()
    assert sum(len(part) + part.missed for part in parts) == 20
    assert refused == ["another thread is reading this stream; a stream has one reader"]


def test_a_stopped_stream_ends_at_once_and_what_it_has_can_be_read(files):
    """stop() ends the run within 100 ms; the samples taken before still come, after the with block too."""

    def attempt():
        with kf.Sampler(files).stream(0.001, chunk=7) as stream:
            time.sleep(0.1)
            start = time.monotonic()
            stream.stop()
            first = next(stream)
        took = time.monotonic() - start
        whole = kf.Samples.concatenate([first, *stream])
        assert len(whole) + whole.missed > 40
        assert (np.diff(whole.tick.astype(np.int64)) > 0).all()
        return took

    assert is_prompt(attempt)


def test_a_run_starts_afresh_after_a_sweep_that_failed(made, files):
    """Files that failed in a sweep and came back are sampled by the next run from its first tick."""
    size = len(made[1].to_bytes())
    sampler = kf.Sampler(files)
    os.ftruncate(made[1].fileno(), size - 8)
    sampler.sweep()
    assert len(sampler.errors) == 1
    os.ftruncate(made[1].fileno(), size)
    samples = sampler.run(0.001, count=5, strict=True)
    assert samples.errors == ()
    assert len(samples) + samples.missed == 5


def test_a_sweep_while_a_stream_is_open_is_refused_and_harms_nothing(made, files):
    """From the begin of the with block to its end the Sampler is the stream's, also when its run is over."""
    sampler = kf.Sampler(files)
    made[1].set("exits", 42)
    with sampler.stream(0, chunk=2, depth=3, count=6) as stream:
        time.sleep(0.05)
        with pytest.raises(RuntimeError, match="in use by a run"):
            sampler.sweep()
        parts = list(stream)
    assert (kf.Samples.concatenate(parts)["exits"][:, 0] == 42).all()
    sampler.sweep()
    assert sampler.view("exits").tolist() == [42, 0]


def test_an_endless_strict_run_ends_at_the_failing_sweep(made, resources):
    """strict=True without count or duration is as strict as with them."""
    fds = [os.dup(one.fileno()) for one in made]
    files = [kf.StatsFile(fd, closefd=False) for fd in fds]
    for fd in fds:
        resources.callback(os.close, fd)
    timer = threading.Timer(0.1, take_away, (fds[2],))
    timer.start()
    with pytest.raises(OSError, match="closed elsewhere") as caught:
        kf.Sampler(files).run(0.001, strict=True)
    assert caught.value.samples.errors[0].sweep == len(caught.value.samples) - 1


@pytest.mark.parametrize("integer", [int, np.int64, np.uint8])
def test_any_integer_is_an_integer(files, integer):
    """Counts, chunks, threads and processors may be numpy's."""
    sampler = kf.Sampler(files, threads=integer(1))
    cpu = integer(min(os.sched_getaffinity(0)))
    assert len(sampler.run(0, count=integer(3), cpu=cpu)) == 3
    with sampler.stream(0, chunk=integer(2), depth=integer(2), count=integer(4)) as stream:
        assert [len(part) for part in stream] == [2, 2]
    with pytest.raises(TypeError):
        sampler.run(0, count=2.5)
    with pytest.raises(TypeError):
        kf.Sampler(files, threads=2.0)


@pytest.mark.parametrize("entered", ["with kf.Sampler([made.open()]).stream(0, depth=2) as other", "while True"])
def test_a_program_may_end_while_a_stream_runs(entered):
    """The end of the interpreter ends the thread in C first; nothing crashes, nothing hangs."""
    code = (
        "import sys, kvmstats_fast as kf\n"
        "from kvmstats_fast.testing import SyntheticStats\n"
        "made = SyntheticStats()\n"
        f"{entered}:\n"
        "    stream = kf.Sampler([made.open()]).stream(0.0001)\n"
        "    stream.__enter__(); next(stream)\n"
        "    sys.exit(3)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_stream_that_is_dropped_stops(files):
    """A stream that was entered by hand and forgotten does not sample for ever."""
    stream, before = kf.Sampler(files).stream(0.001), kernel_threads()
    stream.__enter__()
    next(stream)
    assert len(kernel_threads() - before) == 1
    del stream
    assert until(lambda: not kernel_threads() - before)


# ---- the real kernel


@pytest.mark.real_vm
@pytest.mark.parametrize("interval", [0, 0.0001, 0.001, 0.02])
def test_deltas_of_a_run_add_up_to_the_exits_made(guest, stats, interval):
    """While a guest runs in another thread, the sum of a run's deltas is its exits, and nothing goes backwards."""
    sampler = kf.Sampler(stats)
    guest.run(1)
    samples = []
    with sampler.stream(interval) as stream:
        samples.append(next(stream))
        thread = threading.Thread(target=guest.run, args=(1500,))
        thread.start()
        thread.join()
        ended = time.monotonic_ns()
        while not len(samples[-1]) or samples[-1].time[-1] <= ended:  # until a sweep came after the guest's end
            samples.append(next(stream))
    whole = kf.Samples.concatenate(samples)
    counter = exit_counter()
    assert not any(whole.resets(name).any() for name in whole.names if whole.stat(name).type != kf.StatType.INSTANT)
    change = {name: int(whole.delta(name)[:, 0].sum()) for name in whole.vcpu.names if not whole.stat(name).shape}
    assert counts_right(change, 1500)
    assert not whole.delta(counter)[:, 1].any()
    # The last sweep after the guest has stopped is what a plain read gives.
    for column, file in enumerate(stats[1:]):
        for name, value in file.snapshot().items():
            assert np.array_equal(whole.vcpu[name][-1, column], value), name


@pytest.mark.real_vm
@pytest.mark.parametrize("vcpus", [1, 64, 500, 1000])
def test_any_number_of_real_vcpus_is_sampled(vcpus, resources):
    """One to a thousand vCPUs: every sweep reads every file, with one thread and with two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * vcpus + 200:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * vcpus + 200), hard))
    resources.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    try:
        guest = resources.enter_context(TinyGuest(vcpus))
    except kf.KvmStatsError as error:
        pytest.skip(f"KVM makes no {vcpus} vCPUs here: {error}")
    files = [resources.enter_context(file) for file in guest.open_stats()]
    guest.run(3, vcpu=vcpus - 1)
    for threads in (1, 2):
        samples = kf.Sampler(files, ["exits", exit_counter()], threads=threads).run(0, count=20)
        assert samples["exits"].shape == (20, vcpus)
        assert samples[exit_counter()][-1, -1] >= 3
        assert samples.errors == ()
    everything = kf.Sampler(files).run(0, count=3)
    assert everything.files[-1].vcpu_id == vcpus - 1
    assert everything["halt_wait_hist"].shape == (3, vcpus, 32)


def test_the_memory_check_knows_what_is_available():
    """A size that fits is not refused."""
    memory.check_memory(1 << 20, 1)


def test_a_sampler_says_of_what_it_is(resources):
    """How many files of which kind, and how many statistics it reads."""
    made = [resources.enter_context(SyntheticStats(kind=kind)) for kind in ("vm", "vcpu", "vcpu")]
    files = [resources.enter_context(one.open()) for one in made]
    assert repr(kf.Sampler(files, ["exits", "remote_tlb_flush"])) == "<Sampler of 1 VM and 2 vCPU files, 2 statistics>"
