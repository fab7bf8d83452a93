"""One schedule over many runs: whatever the files do, each tick is taken once, missed, or idle."""

import errno
import itertools
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import open_fds
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.sampling import relay as relay_module
from kvmstats_fast.sampling import run as run_module
from kvmstats_fast.sampling.plan import LiveRow, Plan
from kvmstats_fast.sampling.relay import Relay
from kvmstats_fast.sampling.schedule import Schedule
from kvmstats_fast.testing import SyntheticStats

MS = 1_000_000


class NoThreads:
    """The core on a machine that makes no more threads."""

    def __getattr__(self, name):
        """The core's own, but for the call that makes one."""
        return (lambda _: -errno.EAGAIN) if name == "kvmstats_start" else getattr(lib, name)


@pytest.fixture
def make(resources):
    """Makes files that a run can sample, of this many vCPUs."""

    def make(vcpus):
        made = [resources.enter_context(SyntheticStats(vcpu_id=i)) for i in range(vcpus)]
        return [resources.enter_context(one.open()) for one in made]

    return make


def live(files):
    """What a relay takes of these files."""
    return LiveRow(Plan(files, "exits", 1))


@contextmanager
def relay_of(interval, *, count=None, duration=None, chunk=None, depth=8):
    """A relay, whose accounts are right at its end."""
    with Relay(Schedule(interval, count, duration, "sleep"), chunk, depth) as relay:
        yield relay


def take_all(relay):
    """The chunks that come until no run is left to read, and the rest."""
    chunks = list(iter(lambda: relay.take(5), None))
    assert not relay.is_sampling
    rest = relay.take_rest()
    return chunks + ([] if rest is None else [rest])


def check_accounts(relay, chunks, interval, ticks=None):
    """Ticks ascend, each is taken before the next one is due, and those that are not there were counted."""
    tick = np.concatenate([x.tick for x in chunks]).astype(np.int64)
    times = np.concatenate([x.time for x in chunks])
    assert (np.diff(tick) > 0).all()
    start = relay._start
    due = start + tick * round(interval * 1e9)
    assert (times >= due).all()
    assert (times < due + round(interval * 1e9))[: -1 if ticks else None].all()  # the last of a schedule may be late
    missed = sum(x.missed for x in chunks)
    assert (missed, sum(x.overruns for x in chunks)) == relay.totals
    assert len(tick) + missed + relay.idle == relay._next_tick
    if ticks is not None:
        assert relay._next_tick == ticks
    for x in chunks:  # what is missing within a chunk is no more than it says
        assert len(x) == 0 or int(x.tick[-1] - x.tick[0]) + 1 - len(x) <= x.missed


def test_a_change_of_files_keeps_the_schedule(make):
    """Chunk after chunk of one set of files, in order; the ticks of all are those of one run."""
    sets = [make(n) for n in (2, 3, 1, 2)]
    with relay_of(0.001, chunk=5) as relay:
        chunks = []
        for files in sets:
            relay.hand_over(live(files))
            assert relay.is_sampling
            while len((x := relay.take(5)).files) != len(files):
                chunks.append(x)
            chunks.append(x)
        relay.stop()
        chunks += take_all(relay)
        check_accounts(relay, chunks, 0.001)
    assert [n for n, _ in itertools.groupby(len(x.files) for x in chunks)] == [2, 3, 1, 2]
    assert relay.idle == 0


def test_chunks_that_overlap_leave_nothing_out(resources):
    """Their totals add up to what a run counted; the last sweep of one run is not put before another's."""
    made = [resources.enter_context(SyntheticStats(vcpu_id=i)) for i in range(2)]
    files = [resources.enter_context(one.open()) for one in made]
    for interval, chunk, depth in ((0.001, 20, 8), (0.02, None, 8), (0.001, 1, 1)):
        with Relay(Schedule(interval, None, None, "sleep"), chunk, depth, overlap=True) as relay:
            runs = []
            for _ in range(2):
                relay.hand_over(live(files))
                runs.append([])
                for _ in range(3):
                    made[0].add("exits", 7)
                    assert depth > 1 or until(lambda before=relay.totals[1]: relay.totals[1] > before)
                    runs[-1].append(relay.take(5))
                relay.hand_over(None)
                runs[-1] += take_all(relay)
            missed = sum(x.missed for chunks in runs for x in chunks)
            assert missed == relay.totals[0]
            runs = [list(filter(len, chunks)) for chunks in runs]  # without ticks that were missed at the end
            for chunks in runs:
                for before, after in itertools.pairwise(chunks):
                    assert (after.tick[0], after.time[0]) == (before.tick[-1], before.time[-1])
                growth = chunks[-1]["exits"][-1] - chunks[0]["exits"][0]
                assert sum(x.total("exits") for x in chunks).tolist() == growth.tolist()
            assert runs[1][0].tick[0] > runs[0][-1].tick[-1]


def test_ticks_without_files_are_idle_and_not_missed(make):
    """Before the first files and between two sets; the next sweep is on the schedule."""
    with relay_of(0.001, count=600, chunk=5) as relay:
        chunks = []
        for _ in range(2):
            relay.hand_over(None)
            before, start = relay.idle, time.monotonic_ns()
            time.sleep(0.02)
            passed = (time.monotonic_ns() - start) // MS
            assert not relay.is_over
            assert relay.idle - before >= passed - 1
            assert not relay.is_sampling
            relay.hand_over(live(make(1)))
            chunks.append(relay.take(5))
            assert chunks[-1].tick[0] >= relay.idle
            relay.hand_over(None)
            chunks += take_all(relay)
        relay.hand_over(live(make(1)))
        chunks += take_all(relay)
        check_accounts(relay, chunks, 0.001, 600)
    assert relay.idle > 30


def test_the_schedule_ends_without_files(make):
    """A schedule whose last tick passes while there is nothing to sample is over, and all of its ticks are idle."""
    with relay_of(0.001, count=20) as relay:
        relay.hand_over(None)
        assert not relay.is_over
        assert time.monotonic() < relay.end <= time.monotonic() + 0.019
        time.sleep(relay.end - time.monotonic() + 0.001)
        assert relay.is_over
        assert (relay.idle, relay.totals) == (20, (0, 0))
        relay.hand_over(live(make(1)))  # too late
        assert relay.take(5) is None
        assert relay.take_rest() is None


def test_as_fast_as_possible_misses_nothing(make):
    """interval=0: ticks are counted on from run to run, and there is no idle one; a duration ends it from its start."""
    with relay_of(0, duration=0.5, chunk=10) as relay:
        chunks = []
        for _ in range(3):
            relay.hand_over(live(make(1)))
            chunks += [relay.take(5), relay.take(5)]
            relay.hand_over(None)
            chunks += iter(lambda: relay.take(0), None)
        assert np.concatenate([x.tick for x in chunks]).tolist() == list(range(relay._next_tick))
        assert (relay.idle, relay.totals) == (0, (0, 0))
        time.sleep(max(relay.end - time.monotonic(), 0) + 0.001)
        assert relay.is_over
        relay.hand_over(live(make(1)))
        assert take_all(relay) == []


def test_when_all_files_have_failed_the_ticks_are_idle(make):
    """A run that ended by itself has told why; from then on there was nothing to sample."""
    files = make(1)
    with relay_of(0.001, chunk=5) as relay:
        relay.hand_over(live(files))
        chunks = [relay.take(5)]
        files[0].close()
        chunks += take_all(relay)
        assert chunks[-1].errors
        time.sleep(0.02)
        relay.hand_over(live(make(1)))
        chunks.append(relay.take(5))
        relay.stop()
        chunks += take_all(relay)
        assert relay.idle >= 15
        check_accounts(relay, chunks, 0.001)


def test_without_memory_for_more_the_files_before_are_sampled_on(make, monkeypatch):
    """MemoryError; nothing has changed, and no fd is left."""
    with relay_of(0.001, chunk=5) as relay:
        relay.hand_over(live(make(1)))
        more = make(2)
        fds = open_fds()

        def refuse(*_):
            raise MemoryError("none left")

        monkeypatch.setattr(run_module, "check_memory", refuse)
        with pytest.raises(MemoryError, match="none left"):
            relay.hand_over(live(more))
        monkeypatch.undo()
        assert open_fds() == fds
        chunks = [relay.take(5) for _ in range(4)]
        assert [len(x.files) for x in chunks] == [1] * 4
        relay.stop()
        check_accounts(relay, chunks + take_all(relay), 0.001)


def test_a_run_that_cannot_start_leaves_nothing(make, monkeypatch):
    """KvmStatsError; the next files are sampled, and the ticks in between are idle."""
    with relay_of(0.001, chunk=5) as relay:
        relay.hand_over(live(make(1)))
        chunks = [relay.take(5)]
        more = make(2)

        monkeypatch.setattr(run_module, "lib", NoThreads())
        fds = open_fds()
        with pytest.raises((kf.KvmStatsError, MemoryError)):
            relay.hand_over(live(more))
        monkeypatch.undo()
        assert open_fds() == fds
        chunks += take_all(relay)
        relay.hand_over(live(more))
        chunks.append(relay.take(5))
        relay.stop()
        chunks += take_all(relay)
        assert [n for n, _ in itertools.groupby(len(x.files) for x in chunks)] == [1, 2]
        check_accounts(relay, chunks, 0.001)


def test_what_a_slow_reader_loses_is_in_the_chunks(make):
    """Overruns at the end of a run, behind its last sweep, are in the first chunk of the next one."""
    with relay_of(0.001, chunk=2, depth=2) as relay:
        relay.hand_over(live(make(1)))
        assert until(lambda: relay.totals[1] >= 5)
        relay.hand_over(live(make(2)))
        chunks = [relay.take(5) for _ in range(3)]
        assert [len(x.files) for x in chunks] == [1, 1, 2]
        assert chunks[2].overruns >= 5
        relay.stop()
        check_accounts(relay, chunks + take_all(relay), 0.001)


def test_stop_comes_first_whenever_it_comes(make, monkeypatch):
    """From another thread, in the middle of a change: the run that comes next takes no more than a sweep."""
    with relay_of(0.001, chunk=5) as relay:
        relay.hand_over(live(make(1)))
        chunks = [relay.take(5)]

        class Stopping(relay_module.Run):
            def __enter__(self):
                thread = threading.Thread(target=relay.stop)
                thread.start()
                thread.join()
                return super().__enter__()

        monkeypatch.setattr(relay_module, "Run", Stopping)
        relay.hand_over(live(make(2)))
        chunks += take_all(relay)
        assert sum(len(x) for x in chunks if len(x.files) == 2) == 0
        check_accounts(relay, chunks, 0.001)
        monkeypatch.undo()
        relay.hand_over(live(make(1)))
        assert sum(map(len, take_all(relay))) <= 1


def test_the_end_of_the_block_ends_all_runs(make):
    """The one that samples and those that were not read to their end: no fd and no thread is left."""
    threads, fds, sets = threading.active_count(), open_fds(), [make(1), make(1)]
    before = open_fds()
    with relay_of(0.001) as relay:
        for files in sets:
            relay.hand_over(live(files))
        assert threading.active_count() == threads
        assert open_fds() == before + 2
    assert open_fds() == before == fds + 4
