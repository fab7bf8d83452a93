"""Recorder: many small writes become few batches, and nothing that was written is lost or changed by that."""

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import hypothesis
import made
import numpy as np
import pytest
from helpers import examples, exit_status, forked
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.formats import recorder as recorder_module
from kvmstats_fast.formats.pending import Pending
from kvmstats_fast.testing import SyntheticStats

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
ODD = made.schema_of(made.ODD)
KINDS = [("vm", VM, 1), ("vcpu", ODD, 2)]
SWEEP_BYTES = 8 * sum(schema.num_values * number for _, schema, number in KINDS)


@pytest.fixture
def path(tmp_path):
    """Where to record to."""
    return tmp_path / "run"


def at_1_hz(sweeps, kinds=KINDS, **about):
    """Samples a second apart, sweep by sweep."""
    x = made.samples(kinds, sweeps, interval=1.0, **about)
    x.time[:] = 10**12 + np.arange(sweeps) * 10**9
    x.tick[:] = np.arange(sweeps)
    return x, [x[i : i + 1] for i in range(sweeps)]


def write(path, parts, **options):
    """Record parts."""
    with kf.Recorder(path, **options) as recorder:
        for part in parts:
            recorder.write(part)
    return recorder


def lengths(path):
    """How many sweeps each batch has."""
    return [len(x) for x in kf.Recording(path)]


@st.composite
def runs(draw):
    """Samples that follow each other: chunks of runs that count from 0, failures, wall clocks of their own, resets."""
    whole = made.samples(
        draw(st.sampled_from([[("vm", VM, 1)], [("vcpu", ODD, 3)], KINDS])),
        draw(st.integers(0, 20)),
        errors=[kf.SampleError(0, at, OSError(9, "gone")) for at in draw(st.lists(st.integers(0, 20), max_size=1))],
    )
    cuts = sorted({0, *draw(st.lists(st.integers(0, len(whole)), max_size=6)), len(whole)})
    parts = [whole[a:b] for a, b in pairwise(cuts)] or [whole]
    for part in parts:
        part.wall_offset, part.wall_steps = draw(st.integers(-(2**60), 2**60)), ()
        part.missed, part.overruns = draw(st.integers(0, 9)), draw(st.integers(0, 9))
        part.interrupted = draw(st.booleans())
        if draw(st.booleans()):
            part.tick = np.arange(len(part), dtype=np.uint64)
    return parts


@pytest.mark.parametrize("compression", [None, "zstd"])
@hypothesis.given(
    parts=runs(),
    limits=st.tuples(st.sampled_from([0, 1e-3, 2e-2, 10.0]), st.sampled_from([1, 1 << 10, 1 << 14, 1 << 20])),
    rotate=st.sampled_from([{}, {"rotate_bytes": 1}, {"rotate_seconds": 0.015}]),
)
@examples(30)
def test_what_is_loaded_is_what_was_written_however_batched(compression, parts, limits, rotate, tmp_path_factory):
    """Ticks, wall clocks, counts, failures: as `Samples.concatenate` joins what `write` was given."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    seconds, size = limits
    recorder = write(path, parts, flush_seconds=seconds, flush_bytes=size, compression=compression, **rotate)
    assert (recorder.sweeps, recorder.pending) == (sum(map(len, parts)), 0)
    made.assert_same(kf.Samples.load(path), kf.Samples.concatenate(parts))


def test_a_slow_run_is_as_small_as_one_written_in_large_chunks(path):
    """Sweep by sweep: as many batches, and as many bytes, as the same samples in pieces of `batch_bytes` make."""
    x, sweeps = at_1_hz(600)
    recorder = write(path, sweeps, batch_bytes=200 * SWEEP_BYTES)
    assert lengths(path) == [209, 209, 182]
    large = path.with_name("large")
    least = write(large, [x[:209], x[209:418], x[418:]], flush_seconds=0)
    assert recorder.size == least.size
    assert sorted(one.name for one in path.iterdir()) == ["vcpu-00000.arrows", "vm-00000.arrows"]
    made.assert_same(kf.Samples.load(path), x)


def test_a_large_chunk_comes_behind_the_small_ones_before_it(path):
    """What the tail has is in a batch before the chunk that is one by itself."""
    x, sweeps = at_1_hz(40)
    write(path, [*sweeps[:2], x[2:]], flush_bytes=1, batch_bytes=20 * SWEEP_BYTES)
    assert lengths(path) == [2, 38]
    made.assert_same(kf.Samples.load(path), x)


def test_the_largest_chunks_of_a_stream_are_written_once(path):
    """Each is a batch at once: none of them waits, or is written again."""
    written = []
    with ExitStack() as stack:
        synthetic = stack.enter_context(SyntheticStats())
        sampler = kf.Sampler([stack.enter_context(synthetic.open()) for _ in range(100)])
        stream = stack.enter_context(sampler.stream(0, count=90))
        recorder = stack.enter_context(kf.Recorder(path))
        for x in stream:
            recorder.write(x)
            written.append(len(x))
            assert recorder.pending == 0 or sum(written) == 90
    assert len(written) > 2
    assert lengths(path) == written


def test_what_waits_is_written_when_it_takes_so_many_bytes(path):
    """Not counted in writes: samples that are large enough by themselves become a batch of their own."""
    x, sweeps = at_1_hz(30)
    parts = [*sweeps[:5], x[5:15], *sweeps[15:]]
    recorder = kf.Recorder(path, flush_seconds=1000, flush_bytes=10 * SWEEP_BYTES, batch_bytes=0)
    seen = []
    for part in parts:
        recorder.write(part)
        seen.append((recorder.sweeps, recorder.pending))
    recorder.close()
    assert seen[:7] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (15, 0), (15, 1)]
    assert seen[-1] == (25, 5)
    assert lengths(path) == [5, 10, 10, 5]


def test_a_slow_writer_s_samples_wait_no_longer_than_they_may(path, monkeypatch):
    """Though their own clock covers little: by ours, at the next write."""
    _, sweeps = at_1_hz(3)
    now = [0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    recorder = kf.Recorder(path, flush_seconds=10)
    recorder.write(sweeps[0])
    now[0] = 9 * 10**9
    recorder.write(sweeps[1])
    assert (recorder.sweeps, recorder.pending) == (0, 2)
    now[0] = 10 * 10**9
    recorder.write(sweeps[2])
    assert (recorder.sweeps, recorder.pending) == (3, 0)
    assert re.fullmatch(r"<Recorder .*: 3 sweeps, [0-9]+ bytes>", repr(recorder))
    recorder.close()


@pytest.mark.parametrize("loaded", [False, True])
def test_what_the_caller_does_to_its_arrays_later_is_not_recorded(loaded, path):
    """Whatever kind of samples: what waits is a copy."""
    x, _ = at_1_hz(3)
    if loaded:
        x.save(path.with_name("saved"), compression="zstd")
        x = kf.Samples.load(path.with_name("saved"))
        x = replace(x, groups=tuple(replace(g, arrays=tuple(a.copy() for a in g.arrays)) for g in x.groups))
        for name in ("time", "tick", "sweep_ns"):
            setattr(x, name, getattr(x, name).copy())
    x.save(path.with_name("before"))
    with kf.Recorder(path) as recorder:
        recorder.write(x)
        for name in x.names:
            for kind in (x.vm, x.vcpu):
                if name in kind.names:
                    kind[name][...] = 7
        for array in (x.time, x.tick, x.sweep_ns):
            array[...] = 0
    made.assert_same(kf.Samples.load(path), kf.Samples.load(path.with_name("before")))


def test_sync_lets_nothing_wait(path, monkeypatch):
    """Each write is on the disk when it returns."""
    _, sweeps = at_1_hz(4)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with kf.Recorder(path, sync=True) as recorder:
        for i, part in enumerate(sweeps):
            recorder.write(part)
            assert (recorder.sweeps, recorder.pending, len(synced)) == (i + 1, 0, 2 * (i + 1))


def test_a_killed_recorder_loses_what_waits_and_nothing_else(path):
    """What `sweeps` counts is there; what `pending` counts is not."""
    x, sweeps = at_1_hz(30)
    read, told = os.pipe()

    def work():
        recorder = kf.Recorder(path, flush_seconds=10)
        for part in sweeps:
            recorder.write(part)
        os.write(told, b"%d %d" % (recorder.sweeps, recorder.pending))
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(forked(work)) == -signal.SIGKILL
    written, pending = map(int, os.read(read, 100).split())
    os.close(read)
    os.close(told)
    assert (written, pending) == (22, 8)
    with pytest.warns(kf.RecordingWarning, match="was not ended"):
        made.assert_same(kf.Samples.load(path), x[:22])


@pytest.mark.parametrize("at", ["write", "close"])
@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_says_how_much_is_lost_and_keeps_what_was_written(full, at, path, monkeypatch):
    """Of what waits and of what was just given; the recording has ended."""
    x, sweeps = at_1_hz(30)
    recorder = kf.Recorder(path, flush_seconds=10)
    for part in sweeps[:15]:
        recorder.write(part)

    def refuse(*_):
        raise OSError(full, os.strerror(full))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="the recording ends after") as caught:  # noqa: PT012 - one of them fails
        if at == "write":
            for part in sweeps[15:]:
                recorder.write(part)
        else:
            recorder.close()
    monkeypatch.undo()
    lost = 11 if at == "write" else 4
    assert caught.value.errno == full
    message = f"; the last {lost} sweeps given to it are lost; the recording ends after 11 sweeps, which can be read"
    assert message in str(caught.value)
    assert (recorder.sweeps, recorder.pending) == (11, 0)
    recorder.close()
    with pytest.raises(ValueError, match="has ended"):
        recorder.write(x[15:])
    made.assert_same(kf.Samples.load(path), x[:11])


@pytest.mark.parametrize("before", [0, 11])
def test_ctrl_c_while_a_batch_is_written_loses_nothing_that_had_been_given(before, path, monkeypatch):
    """At whatever write to the files: `close` writes what waited into new files, once."""
    x, sweeps = at_1_hz(before + 11)
    calls = 0
    os_write = os.write

    def interrupted(fd, data):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return os_write(fd, data)

    at, ended = 1, False
    while not ended:
        where = path.with_name(f"run{at}")
        calls = -(10**6)
        recorder = kf.Recorder(where, flush_seconds=10)
        for part in sweeps[:-1]:
            recorder.write(part)
        monkeypatch.setattr(os, "write", interrupted)
        calls = 0
        try:
            recorder.write(sweeps[-1])
            ended = True
        except KeyboardInterrupt:
            with pytest.raises(ValueError, match="has ended"):
                recorder.write(sweeps[-1])
        monkeypatch.undo()
        recorder.close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.assert_same(kf.Samples.load(where), x)
        at += 1
    assert at > 5


def test_a_forked_child_writes_nothing_of_what_waits(path):
    """Nor does it by going away; the parent writes it, once."""
    x, sweeps = at_1_hz(4)
    with kf.Recorder(path) as recorder:
        for part in sweeps[:3]:
            recorder.write(part)
        for leave in (recorder.close, recorder.__del__):
            assert exit_status(forked(leave)) == 0
            assert not any(path.iterdir())
        recorder.write(sweeps[3])
    assert lengths(path) == [4]
    made.assert_same(kf.Samples.load(path), x)


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "del recorder", "recorder = None; import gc; gc.collect()"])
def test_a_recorder_that_is_not_closed_writes_what_waits_when_it_goes(end, path):
    """Also at the end of the program."""
    code = (
        "import sys\n"
        "import kvmstats_fast as kf\n"
        "from kvmstats_fast.testing import SyntheticStats\n"
        "files = [SyntheticStats().open()]\n"
        f"recorder = kf.Recorder({str(path)!r})\n"
        "recorder.write(kf.Sampler(files).run(0, count=3))\n"
        f"{end}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not result.stderr
    assert len(kf.Samples.load(path)) == 3


def test_parts_are_as_long_as_they_were_to_be(path):
    """Rotation writes what waits: a part that is to last less than the samples may wait, and one that lasts longer."""
    x, sweeps = at_1_hz(30)
    write(path, sweeps, rotate_seconds=5)
    assert [len(kf.Samples.load(one)) for one in sorted(path.glob("vm-*"))] == [5] * 6
    longer = path.with_name("longer")
    write(longer, sweeps, rotate_seconds=15, flush_seconds=10)
    assert [len(kf.Samples.load(one)) for one in sorted(longer.glob("vm-*"))] == [15, 15]
    for one in (path, longer):
        made.assert_same(kf.Samples.load(one), x)


def test_a_file_that_failed_before_the_first_sweep_is_not_read_again(path):
    """Empty samples that say so are enough: what would not load is refused when it is written."""
    x, sweeps = at_1_hz(2)
    failed = replace(x[:0], errors=(kf.SampleError(1, 0, OSError(9, "gone")),))
    with kf.Recorder(path) as recorder:
        recorder.write(failed)
        with pytest.raises(ValueError, match="had failed and was read again"):
            recorder.write(sweeps[0])
    made.assert_same(kf.Samples.load(path), failed)


def test_a_recorder_is_not_closed_under_another_thread_s_write(path, monkeypatch):
    """It is refused, nothing is lost, and closing again ends the recording."""
    x, _ = at_1_hz(3)
    recorder = kf.Recorder(path, flush_seconds=0)
    refused = []
    os_write = os.write

    def close():
        try:
            recorder.close()
        except RuntimeError as error:
            refused.append(str(error))

    def slow(fd, data):
        if not refused:
            thread = threading.Thread(target=close)
            thread.start()
            thread.join()
        return os_write(fd, data)

    monkeypatch.setattr(os, "write", slow)
    recorder.write(x)
    monkeypatch.undo()
    assert refused == [f"{path}: another thread is writing to this recording: it has one writer"]
    recorder.close()
    made.assert_same(kf.Samples.load(path), x)


@pytest.mark.parametrize(
    "options", [{"flush_seconds": -1}, {"flush_seconds": float("nan")}, {"flush_bytes": 0}, {"flush_bytes": -5}]
)
def test_bounds_that_bound_nothing_are_refused(options, path):
    """One ValueError, and no directory."""
    with pytest.raises(ValueError, match=next(iter(options))):
        kf.Recorder(path, **options)
    assert not path.exists()


def test_the_document_states_the_defaults():
    """What a kill can lose, in docs/recording.md: the seconds and bytes that are the defaults."""
    text = (Path(__file__).parents[1] / "docs" / "recording.md").read_text()
    options = kf.Recorder.__init__.__kwdefaults__
    assert f"`flush_seconds={options['flush_seconds']:g}`" in text
    assert options["flush_bytes"] == 1 << 20
    assert "`flush_bytes=1 << 20`" in text


def test_ctrl_c_behind_a_write_does_not_have_it_written_twice(path, monkeypatch):
    """What waited was in the files already: `close` writes what came after it, and nothing again."""
    x, sweeps = at_1_hz(6)
    clear, interrupted = Pending.clear, []

    def interrupt(pending):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        clear(pending)

    monkeypatch.setattr(Pending, "clear", interrupt)
    recorder = kf.Recorder(path, flush_bytes=3 * SWEEP_BYTES)
    written = []
    for sweep in sweeps:
        with suppress(KeyboardInterrupt):
            recorder.write(sweep)
        written.append(recorder.sweeps)
    recorder.close()
    assert interrupted
    assert recorder.sweeps == 6
    made.assert_same(kf.Samples.load(path), x)


def test_a_recorder_that_is_not_closed_ends_its_files_when_it_goes(path):
    """Also where nothing waits: no reader is told that they were cut off."""
    x, _ = at_1_hz(6)
    recorder = kf.Recorder(path, flush_bytes=1)
    recorder.write(x)
    assert recorder.pending == 0
    del recorder
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.assert_same(kf.Samples.load(path), x)


def test_what_no_reader_would_take_is_refused_when_it_is_written(path):
    """Not with the batch it would have waited for, which would be lost with it; what comes after it is recorded."""
    x, parts = at_1_hz(3)
    named = replace(parts[0], files=tuple(replace(info, vm="v" * 4097) for info in x.files))
    with kf.Recorder(path) as recorder:
        with pytest.raises(ValueError, match="of at most 4096 characters"):
            recorder.write(named)
        for part in parts:
            recorder.write(part)
    assert sum(lengths(path)) == 3


def test_at_the_end_of_a_program_a_recorder_that_fails_keeps_no_other_from_writing(path, monkeypatch):
    """The error is told, behind all of them."""

    class Failing:
        def leave(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = kf.Recorder(path)
    recorder.write(at_1_hz(1)[0])
    assert recorder.pending == 1
    monkeypatch.setattr(recorder_module, "_RECORDERS", [Failing(), recorder, Failing()])
    with pytest.raises(OSError, match="No space left"):
        recorder_module._leave_all()
    assert lengths(path) == [1]
