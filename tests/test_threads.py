"""What threads may share stays right without a lock, and without the GIL."""

import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
from helpers import DATA, kernel_threads, open_fds, until

import kvmstats_fast as kf
from kvmstats_fast import schema
from kvmstats_fast._resource import Fd
from kvmstats_fast.sampling import run
from kvmstats_fast.testing import SyntheticStats

CAPTURES = [DATA / "captures" / of / "vcpu0-after.bin" for of in ("arm64-6.1", "riscv64-6.12", "x86_64-6.1")]
THREADS = 4


@pytest.fixture(autouse=True)
def _often():
    """Switch threads after each few instructions, where there is a GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work):
    """What `work(number)` gives in each of several threads, which begin together."""
    barrier = threading.Barrier(THREADS)

    def wait_and_work(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(wait_and_work, range(THREADS)))


def test_of_threads_that_close_an_fd_one_does():
    """No other closes the number, which is somebody else's by then."""
    for _ in range(300):
        fd = Fd(os.eventfd, 0, os.EFD_CLOEXEC)

        def close_and_open(_, fd=fd):
            fd.close()
            return os.eventfd(0, os.EFD_CLOEXEC)

        opened = at_once(close_and_open)
        assert len(set(opened)) == THREADS
        for number in opened:
            os.close(number)


def test_a_sampler_that_threads_fight_for_serves_one_at_a_time():
    """Each sweep, run and stream is whole, or a RuntimeError that says that the Sampler is in use; then it is free."""
    with SyntheticStats() as made, made.open() as file:
        made.set("exits", 7)
        sampler = kf.Sampler([file])

        def sweep():
            sampler.sweep()
            assert sampler.view("exits").tolist() == [7]

        def take():
            assert sampler.run(0, count=5)["exits"].tolist() == [[7]] * 5

        def stream():
            with sampler.stream(0, chunk=2, count=4) as parts:
                assert [part["exits"].tolist() for part in parts] == [[[7]] * 2] * 2

        def is_served(use):
            try:
                use()
            except RuntimeError as error:
                assert "in use by a run, a stream or another thread" in str(error)  # noqa: PT017 - not always
                return False
            return True

        uses = (sweep, take, stream)
        assert any(map(any, at_once(lambda number: [is_served(uses[(number + turn) % 3]) for turn in range(1000)])))
        assert len(sampler.run(0, count=3)) == 3
        assert not run._RINGS


def test_threads_that_open_read_and_forget_leave_nothing_and_see_no_other():
    """Files, schemas that are forgotten, runs, streams that are dropped: each has its own values, no fd stays."""
    images = [kf.parse(path.read_bytes()) for path in CAPTURES]
    expected = [{name: str(value) for name, value in image.snapshot().items()} for image in images]
    gc.collect()  # of what other tests have left, nothing goes meanwhile
    fds, threads = open_fds(), kernel_threads()

    def use(number):
        for turn in range(150):
            which = (turn + number) % len(CAPTURES)
            with kf.StatsFile.from_bytes(CAPTURES[which].read_bytes()) as file:
                assert {name: str(value) for name, value in file.snapshot().items()} == expected[which]
                assert file.schema == images[which].schema
                x = kf.Sampler([file]).run(0, count=3)
                assert x.names == tuple(file.schema)
                kf.Sampler([file]).stream(0.001).__enter__()
            schema.CACHE.clear()

    at_once(use)

    def is_clean():
        with kf.StatsFile.from_bytes(CAPTURES[0].read_bytes()) as file:
            kf.Sampler([file]).run(0, count=1)  # which ends what was dropped, once it has stopped
        # A thread that had ended may have been listed before.
        return kernel_threads() <= threads and (open_fds(), len(run._RINGS)) == (fds, 0)

    assert until(is_clean)


@pytest.mark.parametrize("count", [2, 100])
def test_threads_that_meet_several_kinds_of_files_get_the_schemas_of_their_own(count):
    """Also with more kinds than the cache has room for, each thread's file has the names that it was made with."""
    with ExitStack() as stack:
        plain = next(one for one in kf.parse(CAPTURES[0].read_bytes()).schema.stats if not one.shape)
        kinds = [
            stack.enter_context(SyntheticStats(stats=[replace(plain, name=f"kind{kind}", offset=0)])).to_bytes()
            for kind in range(count)
        ]

        def use(number):
            for turn in range(3000):
                kind = (turn * (number + 1)) % count
                image = kf.parse(kinds[kind])
                assert list(image.schema) == [f"kind{kind}"]
                assert list(image.snapshot()) == [f"kind{kind}"]
                assert image.schema.dtype.names == (f"kind{kind}",)

        at_once(use)
