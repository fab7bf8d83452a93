"""The tail of a recording: a kill at any moment loses no more than what waits, and nobody reads anything twice."""

import os
import random
import warnings
from contextlib import suppress
from dataclasses import replace

import made
import numpy as np
import pyarrow as pa
import pytest
from helpers import open_fds

import kvmstats_fast as kf
from kvmstats_fast.formats.recorded_run import _RunReader

VM = made.schema_of(None, "vm")
ODD = made.schema_of(made.ODD)
KINDS = [("vm", VM, 1), ("vcpu", ODD, 2)]
SWEEP_BYTES = 8 * sum(schema.num_values * number for _, schema, number in KINDS)


@pytest.fixture
def path(tmp_path):
    """Where to record to."""
    return tmp_path / "run"


def at_1_hz(sweeps, kinds=KINDS, start=0, **about):
    """Samples a second apart, sweep by sweep."""
    x = made.samples(kinds, sweeps, **{"interval": 1.0} | about)
    x.time[:] = 10**12 + (start + np.arange(sweeps)) * 10**9
    x.tick[:] = np.arange(sweeps)
    return x, [x[i : i + 1] for i in range(sweeps)]


def read(recording):
    """Samples of what is there now, and whether something was said to be missing; None if there is nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return (recording() if callable(recording) else recording).load(), [str(one.message) for one in caught]
        except kf.KvmStatsError:
            return None, []


def names(path):
    """Of the files of a recording."""
    return sorted(one.name for one in path.iterdir())


def test_small_batches_are_written_again_as_one(path):
    """The tail comes, grows, and goes; what is left are large batches."""
    x, sweeps = at_1_hz(40)
    seen = []
    with kf.Recorder(path, flush_seconds=3, batch_bytes=12 * SWEEP_BYTES) as recorder:
        for part in sweeps:
            recorder.write(part)
            seen.append((recorder.sweeps, "vm-00000.tail.arrows" in names(path), "vm-00000.arrows" in names(path)))
    assert seen[3:13] == [(4, True, False)] * 4 + [(8, True, False)] * 4 + [(12, False, True)] * 2
    assert seen[15:20] == [(16, True, True)] * 4 + [(20, True, True)]
    assert names(path) == ["vcpu-00000.arrows", "vm-00000.arrows"]
    assert [len(part) for part in kf.Recording(path)] == [12, 12, 12, 4]
    made.assert_same(kf.Samples.load(path), x)


@pytest.mark.parametrize("options", [{}, {"rotate_seconds": 9}, {"sync": True, "batch_bytes": 7 * SWEEP_BYTES}])
def test_a_kill_at_any_moment_loses_what_waits_and_nothing_else(options, path, monkeypatch):
    """What `sweeps` counts is there after every system call, and in the midst of each write, once and in order."""
    x, sweeps = at_1_hz(23)
    os_write, os_unlink = os.write, os.unlink
    looks, some = 0, random.Random(1)

    def look():
        nonlocal looks
        looks += 1
        found, _ = read(lambda: kf.Recording(path))
        if recorder.sweeps:  # before that, one kind may be all there is
            assert recorder.sweeps <= len(found)
            made.assert_same(found, x[: len(found)])

    def slow_write(fd, data):
        if some.random() > 0.02:  # there are thousands
            return os_write(fd, data)
        written = os_write(fd, memoryview(data)[: len(data) // 2])
        look()
        return written

    def slow_unlink(*arguments, **options):
        look()
        os_unlink(*arguments, **options)
        look()

    recorder = kf.Recorder(path, **{"flush_seconds": 2, "batch_bytes": 7 * SWEEP_BYTES} | options)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", slow_write)
        patch.setattr(os, "unlink", slow_unlink)
        for part in sweeps:
            recorder.write(part)
        recorder.close()
    assert looks > 10
    made.assert_same(kf.Samples.load(path), x)


def test_a_recording_that_was_opened_earlier_is_read_as_it_is_now(path):
    """Its tail may have become part of the others, or another tail meanwhile: all that was there is read."""
    x, sweeps = at_1_hz(30)
    with kf.Recorder(path, flush_seconds=2, batch_bytes=7 * SWEEP_BYTES) as recorder:
        opened = []
        for part in sweeps:
            recorder.write(part)
            if recorder.sweeps:
                opened.append((kf.Recording(path), recorder.sweeps))
        for recording, there in opened:
            found, _ = read(recording)
            assert len(found) >= there
            made.assert_same(found, x[: len(found)])
    for recording, _ in opened:
        assert len(recording.load()) >= 21


@pytest.mark.parametrize("first", [False, True])
def test_a_tail_that_is_merged_between_two_looks_is_not_missed(first, path, monkeypatch):
    """A reader opens the tail before the files that it is merged into."""
    x, sweeps = at_1_hz(20)
    open_tail = _RunReader._open_tail
    recorder = kf.Recorder(path, flush_seconds=2, batch_bytes=7 * SWEEP_BYTES)

    def merged_meanwhile(*arguments, **options):
        opened = None if first else open_tail(*arguments, **options)
        for part in sweeps[12:]:
            recorder.write(part)
        assert recorder.sweeps == 18
        return open_tail(*arguments, **options) if first else opened

    for part in sweeps[:12]:
        recorder.write(part)
    assert names(path)[1:] == ["vcpu-00000.tail.arrows", "vm-00000.arrows", "vm-00000.tail.arrows"]
    with monkeypatch.context() as patch:
        patch.setattr(_RunReader, "_open_tail", merged_meanwhile)
        found, _ = read(lambda: kf.Recording(path))
    recorder.close()
    assert len(found) >= 12
    made.assert_same(found, x[: len(found)])


@pytest.mark.parametrize("kind", ["vm", "vcpu"])
def test_a_file_of_a_tail_that_is_gone_is_said(kind, path):
    """Unless what it had is elsewhere, too."""
    x, sweeps = at_1_hz(10)
    recorder = kf.Recorder(path, flush_seconds=2, batch_bytes=5 * SWEEP_BYTES)
    for part in sweeps:
        recorder.write(part)
    (path / f"{kind}-00000.tail.arrows").unlink()
    found, warned = read(lambda: kf.Recording(path))
    made.assert_same(found, x[:6])
    assert f"part 0 has no file of kind {kind}" in warned[0]
    recorder.close()
    made.assert_same(kf.Samples.load(path), x)


def test_sweeps_that_are_gone_in_front_of_a_tail_are_counted(path):
    """The tail is read, and how many are missing is said."""
    x, sweeps = at_1_hz(10)
    recorder = kf.Recorder(path, flush_seconds=2, batch_bytes=5 * SWEEP_BYTES)
    for part in sweeps:
        recorder.write(part)
    for kind in ("vm", "vcpu"):
        file = path / f"{kind}-00000.arrows"
        file.write_bytes(file.read_bytes()[:-200])
    found, warned = read(lambda: kf.Recording(path))
    assert len(found) == 3
    assert np.array_equal(found.time, x.time[6:9])
    assert "of part 0, 6 sweeps before those in its tail are missing" in warned[0]
    recorder.close()


@pytest.mark.parametrize("batch", [5, 9])
@pytest.mark.parametrize("at", range(1, 40, 3))
def test_ctrl_c_at_any_write_of_a_tail_or_of_a_merge_loses_nothing(at, batch, path, monkeypatch):
    """`close` writes what waited; what was in the tail is read from there; all files are ended, and none stays open."""
    x, sweeps = at_1_hz(12)
    fds = open_fds()
    recorder = kf.Recorder(path, flush_seconds=2, batch_bytes=batch * SWEEP_BYTES)
    for part in sweeps[:8]:
        recorder.write(part)
    os_write, calls = os.write, 0

    def interrupted(fd, data):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return os_write(fd, data)

    given = 8
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "write", interrupted)
        for part in sweeps[8:]:
            given += 1
            recorder.write(part)
    recorder.close()
    assert open_fds() == fds
    made.assert_same(kf.Samples.load(path), x[:given])


def test_samples_of_other_files_are_another_run_of_the_recording(path):
    """VMs that come and go: each set of files by itself, in order, ticks and failures of its own."""
    failed = [kf.SampleError(1, 2, OSError(9, "gone"))]
    x, first = at_1_hz(5, errors=failed)
    y, second = at_1_hz(6, [("vm", VM, 1), ("vcpu", ODD, 3)], 10)
    z, third = at_1_hz(4, start=20, interval=2.0)
    with kf.Recorder(path) as recorder:
        for part in (*first, *second, *third):
            recorder.write(part)
        assert recorder.pending + recorder.sweeps == 15
    read = list(kf.Recording(path))
    for one, other in zip(read, (x, y, z), strict=True):
        made.assert_same(one, other)
    recording = kf.Recording(path)
    assert recording.files == tuple(dict.fromkeys((*x.files, *y.files)))
    with pytest.raises(kf.KvmStatsError, match=r"its 3 runs are of different stats files .*open_recordings"):
        recording.load()
    assert names(path) == [f"{kind}-0000{part}.arrows" for kind in ("vcpu", "vm") for part in range(3)]
    made.assert_same(kf.Samples.load(path / "vcpu-00001.arrows"), y.vcpu)


def test_a_part_of_another_run_that_is_gone_is_said(path):
    """Parts are numbered through all runs."""
    x, first = at_1_hz(3)
    y, second = at_1_hz(3, [("vm", VM, 1), ("vcpu", ODD, 3)], 10)
    _, third = at_1_hz(3, start=20)
    with kf.Recorder(path) as recorder:
        for part in (*first, *second, *third):
            recorder.write(part)
    for file in path.glob("*-00002.arrows"):
        file.unlink()
    for file in path.glob("vm-00000.arrows"):
        file.unlink()
    with pytest.warns(kf.RecordingWarning, match="the file of kind vm is missing"):
        read = list(kf.Recording(path))
    for one, other in zip(read, (x.vcpu, y), strict=True):
        made.assert_same(one, other)


def test_runs_out_of_order_are_damage(path):
    """No Recorder writes them so."""
    _, first = at_1_hz(2)
    with kf.Recorder(path) as recorder:
        for part in (*first, *at_1_hz(2, [("vcpu", ODD, 3)], 10)[1]):
            recorder.write(part)
    (path / "vcpu-00000.arrows").unlink()
    file = path / "vm-00000.arrows"
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        batch, metadata = reader.read_next_batch_with_custom_metadata()
        schema = reader.schema.with_metadata({**reader.schema.metadata, b"kvmstats.part": b"9"})
    with pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema), custom_metadata=metadata)
    with pytest.raises(kf.KvmStatsError, match=r"kvmstats.run is damaged: part 1 is of run 1, part 9 of run 0"):
        kf.Recording(path)


def test_what_begins_no_run_is_refused(path):
    """Other statistics of the same files, or another host: a mistake; nothing is lost by it."""
    x, sweeps = at_1_hz(2)
    with kf.Recorder(path) as recorder:
        recorder.write(sweeps[0])
        for other in (
            replace(x[1:], host="other"),
            replace(x[1:], kernel="other"),
            replace(x[1:], interval=2.0),
            x[1:].select("exits", "remote_tlb_flush"),
        ):
            with pytest.raises(ValueError, match="record them apart"):
                recorder.write(replace(other, files=x.files) if other.files != x.files else other)
        recorder.write(sweeps[1])
    made.assert_same(kf.Samples.load(path), x)
