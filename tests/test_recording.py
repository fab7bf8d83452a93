"""Recordings: what goes in comes out, whatever happens to the recorder."""

import errno
import gc
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import hypothesis
import made
import numpy as np
import pyarrow as pa
import pytest
from helpers import examples, exit_status, forked, open_fds
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.formats import arrow, recording
from kvmstats_fast.testing import SyntheticStats

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
ODD = made.schema_of(made.ODD)
OTHER = made.schema_of(None, "vcpu", layout="v9")
ERRORS = [OSError(9, "gone"), ValueError("closed"), kf.FormatError(kf.ErrorCode.TRUNCATED, 80, "short")]


@pytest.fixture
def path(tmp_path):
    """Where to record to."""
    return tmp_path / "run"


def record(path, parts, **options):
    """Record Samples after Samples, each a batch."""
    with kf.Recorder(path, **{"flush_seconds": 0} | options) as recorder:
        for part in parts:
            recorder.write(part)
    return recorder


def batches(path):
    """Samples after Samples, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = list(kf.Recording(path))
    return parts, [str(one.message) for one in caught if issubclass(one.category, kf.RecordingWarning)]


GROUPS = st.lists(
    st.tuples(st.sampled_from([("vm", VM), ("vcpu", VCPU), ("vcpu", ODD), ("vcpu", OTHER)]), st.integers(1, 3)),
    min_size=1,
    max_size=4,
    unique_by=lambda one: (one[0][0], id(one[0][1])),
)


@st.composite
def anything(draw, least=0):
    """Samples of any kinds, failures included."""
    groups = [(kind, schema, number) for (kind, schema), number in draw(GROUPS)]
    length = draw(st.integers(least, least + 6))
    files = sum(number for *_, number in groups)
    errors = [
        kf.SampleError(file, draw(st.integers(0, length)), draw(st.sampled_from(ERRORS)))
        for file in draw(st.lists(st.integers(0, files - 1), unique=True, max_size=3))
    ]
    return made.samples(
        groups,
        length,
        seed=draw(st.integers(0, 9)),
        errors=errors,
        missed=draw(st.integers(0, 5)),
        overruns=draw(st.integers(0, 5)),
        interrupted=draw(st.booleans()),
    )


@pytest.mark.parametrize("form", ["run", "run.npz"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@hypothesis.given(x=anything())
@examples(20)
def test_what_is_saved_is_loaded_bit_for_bit(form, compression, x, tmp_path_factory):
    """Every dtype, kind and schema, failed files, empty runs, values over the whole of uint64."""
    path = tmp_path_factory.mktemp("saved") / form
    x.save(path, compression=compression)
    made.assert_same(kf.Samples.load(path), x)
    made.assert_same(x, x)


@pytest.mark.parametrize("number", [1, 300])
def test_one_vcpu_and_three_hundred(number, path):
    """The number of columns does not matter."""
    x = made.samples([("vcpu", VCPU, number), ("vm", VM, 1)], 20)
    record(path, [x[:7], x[7:]])
    made.assert_same(kf.Samples.load(path), kf.Samples.concatenate([x[:7], x[7:]]))


@hypothesis.given(x=anything(least=3), cuts=st.lists(st.integers(0, 9), max_size=3), rotate=st.booleans())
@examples(20)
def test_a_recording_is_the_batches_that_were_written(x, cuts, rotate, tmp_path_factory):
    """Batch by batch and as a whole, in one part or many; nothing is warned of."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    cuts = sorted({0, *(min(cut, len(x)) for cut in cuts), len(x)})
    parts = [x[a:b] for a, b in pairwise(cuts)]
    record(path, parts, **({"rotate_bytes": 1} if rotate else {}))
    read, warned = batches(path)
    assert not warned
    assert len(read) == len(parts)
    for one, part in zip(read, parts, strict=True):
        made.assert_same(one, part)
    made.assert_same(kf.Samples.load(path), kf.Samples.concatenate(parts))
    assert len(list(path.iterdir())) == len(x.groups) * (len(parts) if rotate else 1)


def test_runs_put_together_are_loaded_as_they_were(path):
    """Where their ticks begin anew, as in 0.1, and a file fails in one: sweeps are not taken for each other."""
    x, y = (made.samples([("vcpu", VCPU, 2)], 6, errors=errors) for errors in ([], [kf.SampleError(1, 3, ERRORS[0])]))
    y.time[:] += 10**12
    both = kf.Samples.concatenate([x, y])
    both.tick = np.concatenate([x.tick, y.tick])
    assert len(set(both.tick.tolist())) < len(both)
    both.save(path)
    made.assert_same(kf.Samples.load(path), both)


def test_a_path_that_is_no_text(tmp_path):
    """Linux lets names be any bytes."""
    x = made.samples([("vcpu", VCPU, 2)], 3)
    for name in ("r\udcff", "r\udcff.npz"):
        x.save(tmp_path / name)
        made.assert_same(kf.Samples.load(tmp_path / name), x)
    kf.to_csv(x, tmp_path / "r\udcff.csv")
    assert (tmp_path / "r\udcff.csv").stat().st_size
    (path,) = kf.to_parquet(x, tmp_path / "set\udcff")
    assert path.stat().st_size


def test_samples_of_some_statistics_keep_their_order(path):
    """What a Sampler was told to keep, in its order."""
    with SyntheticStats() as one, one.open() as file:
        one.set("exits", 2**63 + 1)
        x = kf.Sampler([file], ["halt_wait_hist", "exits", "blocking"]).run(0, count=3)
    x.save(path)
    y = kf.Samples.load(path)
    made.assert_same(y, x)
    assert y.names == ("halt_wait_hist", "exits", "blocking")
    assert y["exits"].tolist() == [[2**63 + 1]] * 3


def test_an_uncompressed_batch_is_read_in_place(path):
    """Loading copies nothing: the arrays are the file's memory, and read-only."""
    x = made.samples([("vcpu", VCPU, 2)], 50)
    x.save(path)
    before = pa.total_allocated_bytes()
    y = kf.Samples.load(path)
    assert pa.total_allocated_bytes() - before < 1000
    assert not y["exits"].flags.owndata
    assert not y["exits"].flags.writeable
    compressed = path.with_name("compressed")
    x.save(compressed, compression="zstd")
    before = pa.total_allocated_bytes()
    z = kf.Samples.load(compressed)
    assert pa.total_allocated_bytes() - before > z["exits"].nbytes


def test_the_file_says_what_its_columns_are(path):
    """Descriptors in the fields' metadata, the origin and the verbatim header and descriptors in the schema's."""
    x = made.samples([("vcpu", ODD, 2), ("vm", VM, 1)], 4)
    record(path, [x])
    with pa.ipc.open_stream(path / "vcpu-00000.arrows") as reader:
        table = reader.read_all()
    assert [field.name for field in table.schema if field.nullable] == ["pid"]
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["kvmstats.host"] == '"h\\u00e4rd"'
    assert metadata["kvmstats.wall_offset"] == str(x.wall_offset)
    assert metadata["kvmstats.version"] == f'"{kf.__version__}"'
    about = {key.decode(): value.decode() for key, value in table.schema.field("wait_hist").metadata.items()}
    assert about == {
        "kvmstats.type": "log_hist",
        "kvmstats.unit": "seconds",
        "kvmstats.base": "pow10",
        "kvmstats.exponent": "-9",
        "kvmstats.size": "5",
        "kvmstats.offset": str(ODD["wait_hist"].offset),
        "kvmstats.bucket_size": "0",
        "kvmstats.units": "ns",
        "kvmstats.descriptor": "4",
    }
    assert table.schema.field("wait_hist").type == pa.list_(pa.field("item", pa.uint64(), nullable=False), 5)
    assert table.schema.field("future").metadata[b"kvmstats.type"] == b"9"
    assert table["time"].cast(pa.int64()).to_pylist() == np.repeat(x.time + x.wall_offset, 2).tolist()
    assert table["stat.time"].to_pylist() == x.vcpu["time"].reshape(-1).tolist()
    assert table["id"].to_pylist() == [info.id for info in x.vcpu.files] * 4


def documented(heading):
    """First column of the table under a heading of docs/recording-format.md, a row's names apart."""
    text = (Path(__file__).parents[1] / "docs" / "recording-format.md").read_text()
    rows = [line.split("|")[1] for line in text.split(f"| {heading} |")[1].partition("\n\n")[0].splitlines()[2:]]
    return [name for row in rows for name in re.findall("`([^`]*)`", row) or [row.strip()]]


def test_the_document_describes_the_file_that_is_written(path):
    """Every key and column that a Recorder writes is in the tables of docs/recording-format.md, and nothing else."""
    errors = [kf.SampleError(file, 2, error) for file, error in enumerate(ERRORS)]
    x = replace(made.samples([("vm", VM, 1), ("vcpu", ODD, 2)], 4, errors=errors), wall_steps=((1, 5),))
    record(path, [x])
    with pa.ipc.open_stream(path / "vcpu-00000.arrows") as reader:
        batch, metadata = reader.read_next_batch_with_custom_metadata()
    keys = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    assert sorted(keys) == sorted(documented("key of the schema"))
    assert sorted(key.decode() for key in metadata) == sorted(documented("key of a batch"))
    for name in x.vcpu.names:
        about = batch.schema.field(arrow.column_name(name)).metadata
        assert sorted(key.decode() for key in about) == sorted(documented("key of a field"))
    columns = documented("column")
    assert batch.schema.names == [*columns[:-1], *map(arrow.column_name, x.vcpu.names)]
    text = " ".join((Path(__file__).parents[1] / "docs" / "recording-format.md").read_text().split())
    assert f"This is format {keys['kvmstats.format']}. " in text
    fields = re.search(
        r"each `\[([a-z_, ]*)\]`", next(line for line in text.split("| `kvmstats.") if line.startswith("files"))
    )
    assert fields[1].split(", ") == list(kf.FileInfo.__dataclass_fields__)
    taken = re.search(r"is called (.*?), is the column `stat.NAME`", text)[1]
    assert {*columns[:-1], *re.findall("`([a-z]*)`", taken)} == arrow.TAKEN


def test_rows_of_a_failed_file_are_left_out(path):
    """A reader that knows nothing of failures meets no row that means nothing."""
    x = made.samples([("vcpu", VCPU, 2)], 5, errors=[kf.SampleError(1, 2, ERRORS[0])])
    record(path, [x])
    with pa.ipc.open_stream(path / "vcpu-00000.arrows") as reader:
        assert reader.read_all()["file"].to_pylist() == [0, 1, 0, 1, 0, 0, 0]


def test_every_byte_reaches_the_file_however_few_a_write_takes(path, monkeypatch):
    """The kernel may take less than it is given."""
    x = made.samples([("vcpu", VCPU, 2)], 9)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, memoryview(data)[:100]))
    record(path, [x])
    monkeypatch.undo()
    made.assert_same(kf.Samples.load(path), x)


def test_sync_has_every_batch_on_the_disk(path, monkeypatch):
    """One fsync for each kind and batch, and none without it."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 9)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    record(path, [x[:4], x[4:]])
    assert not synced
    record(path.with_name("synced"), [x[:4], x[4:]], sync=True)
    assert len(synced) >= 4


def test_a_format_of_the_future_is_refused(path):
    """It says which format it is, and which this version reads."""
    made.samples([("vcpu", VCPU, 1)], 2).save(path)
    file = path / "vcpu-00000.arrows"
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        table = reader.read_all()
    future = table.schema.with_metadata({**table.schema.metadata, b"kvmstats.format": b"4"})
    with pa.ipc.new_stream(file, future) as writer:
        writer.write_table(table.cast(future))
    with pytest.raises(kf.KvmStatsError, match="recording of format 4; this version reads formats 1 to 3"):
        kf.Recording(path)


def test_kinds_that_are_not_of_the_same_sweeps_are_refused(path):
    """A file of another moment under the same name of a recording."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 1)], 6)
    record(path, [x])
    other = path.with_name("other")
    record(other, [x[1:]])
    file = other / "vm-00000.arrows"
    right_bytes, wrong_bytes = (path / "vm-00000.arrows").read_bytes(), file.read_bytes()
    with pa.ipc.open_stream(right_bytes) as right, pa.ipc.open_stream(wrong_bytes) as wrong:
        schema = right.schema
        batch, metadata = wrong.read_next_batch_with_custom_metadata()
    with pa.ipc.new_stream(path / "vm-00000.arrows", schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema), custom_metadata=metadata)
    with pytest.raises(kf.KvmStatsError, match="not of the same sweeps"):
        kf.Samples.load(path)


# ---- what can happen to a recorder


def test_a_torn_file_is_read_to_its_last_whole_batch(path):
    """At whatever byte it ends, the batches before are read, and what was lost is said."""
    x = made.samples([("vcpu", VCPU, 1)], 9)
    ends = []
    with kf.Recorder(path, flush_seconds=0) as recorder:
        for i in range(3):
            recorder.write(x[3 * i : 3 * i + 3])
            ends.append(recorder.size)
    file = path / "vcpu-00000.arrows"
    whole = file.read_bytes()
    assert len(whole) == ends[-1] + 8
    start_of_batches = 8 + int.from_bytes(whole[4:8], "little")  # behind the schema's message
    rng = random.Random(1)
    for end in {*ends, *(e + 1 for e in ends), *(rng.randrange(8, len(whole)) for _ in range(150))}:
        file.write_bytes(whole[:end])
        complete = sum(e <= end for e in ends)
        if end < start_of_batches:
            with pytest.raises(kf.KvmStatsError, match=f"in its {end} bytes"):
                batches(path)
            continue
        parts, warned = batches(path)
        assert len(parts) == complete
        for i, part in enumerate(parts):
            made.assert_same(part, x[3 * i : 3 * i + 3])
        lost = end - (ends[complete - 1] if complete else 0)
        assert len(warned) == 1
        assert "not ended" in warned[0]
        if complete:
            assert f"; the {lost} bytes after that" in warned[0] if lost else "; nothing follows" in warned[0]


def test_garbage_behind_the_last_batch_is_no_batch(path):
    """Zeros, as a file system leaves them after a crash, and noise: the recording ends with its last whole batch."""
    x = made.samples([("vcpu", VCPU, 1)], 4)
    record(path, [x])
    file = path / "vcpu-00000.arrows"
    whole = file.read_bytes()[:-8]
    for garbage in (bytes(4096), b"\xff" * 100, random.Random(2).randbytes(500)):
        file.write_bytes(whole + garbage)
        parts, warned = batches(path)
        made.assert_same(parts[0], x)
        assert f"the {len(garbage)} bytes after that" in warned[0]


@pytest.mark.parametrize("names", [["vm"], ["vm", "vcpu"]], ids=["one", "all"])
def test_an_error_of_a_file_that_is_left_out_goes_at_once(path, names):
    """In a cycle it would keep the frames of its traceback, and whatever they have open, until it is collected."""
    record(path, [made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 3)])
    for name in names:
        raw = (path / f"{name}-00000.arrows").read_bytes()
        (path / f"{name}-00000.arrows").write_bytes(raw.replace(b"kvmstats.descriptor", b"kvmstats.xescriptor"))
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        with suppress(kf.KvmStatsError):
            kf.Recording(path)
        gc.collect()
        assert not any(isinstance(one, kf.KvmStatsError) for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_the_other_kind_without_its_last_batch(path):
    """Killed between the two: what both kinds have is read, and the file that has more is named."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 6)
    record(path, [x[:3], x[3:]])
    file = path / "vcpu-00000.arrows"
    file.write_bytes(file.read_bytes()[:-200])
    parts, warned = batches(path)
    assert len(parts) == 1
    made.assert_same(parts[0], x[:3])
    assert len(warned) == 1
    assert "vm-00000.arrows has batches after the end of the other kind's file" in warned[0]
    assert "vcpu-00000.arrows was not ended" in warned[0]
    alone, warned = batches(path / "vm-00000.arrows")
    assert not warned
    made.assert_same(alone[0], x[:3].vm)
    made.assert_same(alone[1], x[3:].vm)


def test_a_missing_part_is_said(path):
    """Parts are numbered: one that is gone is not passed over in silence."""
    x = made.samples([("vcpu", VCPU, 2)], 6)
    record(path, [x[:2], x[2:4], x[4:]], rotate_bytes=1)
    (path / "vcpu-00001.arrows").unlink()
    parts, warned = batches(path)
    assert [part.time.tolist() for part in parts] == [x.time[:2].tolist(), x.time[4:].tolist()]
    assert warned == [f"{path}: not all of this recording could be read: part 1 is missing"]
    (path / "vcpu-00000.arrows").write_bytes(b"")
    parts, warned = batches(path)
    assert len(parts) == 1
    assert "vcpu-00000.arrows: not a recording: no Arrow stream begins in its 0 bytes" in warned[0]


GONE = [
    ([0], "part 0 is missing"),
    ([0, 1], "parts 0 to 1 are missing"),
    ([2], "part 2 is missing"),
    ([0, 2, 3], "parts 0, 2 to 3 are missing"),
    ([1, 2, 3, 4], "parts 1 to 4 are missing"),
]


@pytest.mark.parametrize(("gone", "told"), GONE)
@pytest.mark.parametrize("kinds", [[("vcpu", VCPU, 2)], [("vm", VM, 1), ("vcpu", VCPU, 2)]])
def test_parts_that_are_gone_are_told_once_at_the_callers_line(gone, told, kinds, path):
    """The first ones, too; whether they are gone before the recording is opened, or after that."""
    x = made.samples(kinds, 12)
    left = [x[2 * i : 2 * i + 2] for i in range(6) if i not in gone]
    for before in (True, False):
        shutil.rmtree(path, ignore_errors=True)
        record(path, [x[2 * i : 2 * i + 2] for i in range(6)], rotate_bytes=1)
        recording = None if before else kf.Recording(path)
        for file in [file for number in gone for file in path.glob(f"*-{number:05}.arrows")]:
            file.unlink()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = kf.Samples.load(path) if before else recording.load()
            line = sys._getframe().f_lineno - 1
        made.assert_same(loaded, kf.Samples.concatenate(left))
        assert [str(one.message) for one in caught] == [f"{path}: not all of this recording could be read: {told}"]
        assert (caught[0].filename, caught[0].lineno) == (__file__, line)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_part_that_is_deleted_while_others_are_read_is_as_one_that_was_gone(number, path):
    """A retention job does not wait: what is left is read, and the loop that reads it is told at its end."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 12)
    record(path, [x[2 * i : 2 * i + 2] for i in range(6)], rotate_bytes=1)
    read = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        for part in kf.Recording(path):
            read.append(part)
            if len(read) == 1:
                for file in path.glob(f"*-{number:05}.arrows"):
                    file.unlink()
    for one, i in zip(read, [i for i in range(6) if i != number], strict=True):
        made.assert_same(one, x[2 * i : 2 * i + 2])
    (warned,) = caught
    assert str(warned.message).endswith(f"could be read: part {number} is missing")
    assert (warned.filename, warned.lineno) == (__file__, line)


@pytest.mark.parametrize("reader", [kf.Samples.load, lambda path: list(kf.Recording(path)), "to_parquet", "to_csv"])
def test_what_a_killed_recorder_left_is_told_once(reader, path):
    """Of all kinds together, with each file's name, by whatever reads it."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 6)
    record(path, [x[:3], x[3:]])
    for file in path.iterdir():
        file.write_bytes(file.read_bytes()[:-50])
    if isinstance(reader, str):
        options = {"kind": "vm"} if reader == "to_csv" else {}
        convert, target = getattr(kf, reader), path.with_name("converted")
        with pytest.warns(kf.RecordingWarning) as caught:
            convert(path, target, **options)
    else:
        with pytest.warns(kf.RecordingWarning) as caught:
            reader(path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for file in path.iterdir():
        assert f"{file} was not ended: it has 1 whole batches" in str(caught[0].message)


def test_rotation_by_time(path):
    """A part ends with the batch that makes it as long as was asked."""
    x = made.samples([("vcpu", VCPU, 1)], 30)
    x.time[:] = np.arange(30) * 10**9
    record(path, [x[i : i + 1] for i in range(30)], rotate_seconds=10)
    assert [len(kf.Samples.load(file)) for file in sorted(path.iterdir())] == [10, 10, 10]
    made.assert_same(kf.Samples.load(path)[:], kf.Samples.concatenate([x[i : i + 1] for i in range(30)]))


def test_a_part_that_begins_with_no_sweep_lasts_as_long(path):
    """Its time begins with its first sweep."""
    x = made.samples([("vcpu", VCPU, 1)], 4)
    record(path, [x[:0], x[:1], x[1:]], rotate_seconds=10)
    assert [one.name for one in path.iterdir()] == ["vcpu-00000.arrows"]


#: Forks a recorder for each path on stdin, which says its pid and how many sweeps it has written.
RECORD = """
import os, sys
import kvmstats_fast as kf
from kvmstats_fast.formats import arrow
from kvmstats_fast.testing import SyntheticStats

def record(path):
    vm, vcpus = SyntheticStats(kind="vm"), [SyntheticStats(vcpu_id=i) for i in range(8)]
    files = [one.open() for one in (vm, *vcpus)]
    recorder = kf.Recorder(path, compression=None, flush_seconds=0)
    with recorder, kf.Sampler(files).stream(0.0002, chunk=7) as stream:
        for i, x in enumerate(stream):
            for one in (vm, *vcpus):
                one.set("remote_tlb_flush" if one is vm else "exits", i + 1)
            recorder.write(x)
            sys.stdout.write(f"{recorder.sweeps}\\n")  # in one piece, also where Python does not buffer
            sys.stdout.flush()

import pyarrow
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        print("pid", os.getpid(), flush=True)
        record(line.strip())
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_a_killed_recorder_loses_at_most_the_batch_it_was_writing(tmp_path):
    """SIGKILL at 20 random moments: every sweep that was reported as written is there and right, the loss is stated."""
    rng = random.Random(3)
    server = subprocess.Popen(
        [sys.executable, "-c", RECORD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with server:
        for attempt in range(20):
            path = tmp_path / f"run{attempt}"
            print(path, file=server.stdin)
            pid = int(server.stdout.readline().split()[1])
            written = int(server.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            while (line := server.stdout.readline()) != "dead\n":
                written = int(line)
            parts, warned = batches(path)
            assert written <= sum(map(len, parts)) <= written + 7
            assert warned  # it was never ended
            ticks = np.concatenate([part.tick for part in parts])
            assert (np.diff(ticks.astype(np.int64)) > 0).all()
            assert len(ticks) + sum(part.missed for part in parts) == int(ticks[-1]) + 1
            exits = np.concatenate([part.vcpu["exits"] for part in parts])
            assert (np.diff(exits.astype(np.int64), axis=0) >= 0).all()
            assert exits[0].max() == 0
            assert exits[-1].max() <= len(parts)
            shutil.rmtree(path)
        server.stdin.close()


def write_all(recorder, parts):
    """Write until it fails, and give the error."""
    with pytest.raises(OSError, match="the recording ends after") as caught:  # noqa: PT012 - which one fails is open
        for part in parts:
            recorder.write(part)
    return caught.value


def test_a_full_disk_ends_the_recording_and_leaves_it_readable(tmp_path):
    """At whatever size the disk is full: one clear error, and everything written before reads back."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 3)], 40)
    parts = [x[i : i + 4] for i in range(0, 40, 4)]
    full = tmp_path / "full"
    size = record(full, parts, compression=None).path.joinpath("vcpu-00000.arrows").stat().st_size
    smallest = 12_000  # the vcpu stream's schema alone
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    gc.collect()  # of other tests
    fds = open_fds()
    try:
        for limit in random.Random(4).sample(range(smallest, size), 20):
            path = tmp_path / f"run{limit}"
            recorder = kf.Recorder(path, compression=None, flush_seconds=0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            error = write_all(recorder, parts)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            written = recorder.sweeps
            can_be_read = ", which can be read" if written else ""
            assert f"the recording ends after {written} sweeps{can_be_read}: " in str(error)
            with pytest.raises(ValueError, match="has ended"):
                recorder.write(parts[0])
            read, warned = batches(path) if written else ([], [])
            # The end mark itself may have had no room.
            assert all("nothing follows" in text for text in warned)
            assert len(read) == written // 4
            for one, part in zip(read, parts, strict=False):
                made.assert_same(one, part)
            recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert open_fds() == fds


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_full_file_system_too(tmp_path):
    """A tmpfs of 300 KiB: ENOSPC, and all batches written before are there."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("mount is not permitted here")
    try:
        x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 3)], 400)
        with kf.Recorder(mount / "run", compression=None, flush_seconds=0) as recorder:
            error = write_all(recorder, [x[i : i + 4] for i in range(0, 400, 4)])
        assert error.errno == errno.ENOSPC
        written = recorder.sweeps
        assert 0 < written < 400
        parts, _ = batches(mount / "run")
        assert sum(map(len, parts)) == written
        for i, part in enumerate(parts):
            made.assert_same(part, x[4 * i : 4 * i + 4])
        del parts, part  # they are maps of its files
        with pytest.raises(OSError, match="No space"):
            x.save(mount / "saved")
        assert sorted(one.name for one in mount.iterdir()) == ["run"]
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def test_ctrl_c_in_the_midst_of_a_batch_cuts_it_off(path, monkeypatch):
    """Half a batch is taken back: what is there was written whole."""
    x = made.samples([("vcpu", VCPU, 2)], 6)
    recorder = kf.Recorder(path, flush_seconds=0)
    recorder.write(x[:3])
    calls = []
    write = os.write

    def interrupted(fd, data):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return write(fd, data)

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.write(x[3:])
    monkeypatch.undo()
    recorder.close()
    parts, warned = batches(path)
    assert not warned
    made.assert_same(parts[0], x[:3])
    assert len(parts) == 1


def test_a_forked_child_leaves_the_recording_alone(path):
    """It can neither write to it nor end it: what the parent writes afterwards is read."""
    x = made.samples([("vcpu", VCPU, 2)], 6)
    with kf.Recorder(path, flush_seconds=0) as recorder:
        recorder.write(x[:3])

        def work():
            with pytest.raises(RuntimeError):
                recorder.write(x[3:])
            recorder.close()

        assert exit_status(forked(work)) == 0
        recorder.write(x[3:])
    parts, warned = batches(path)
    assert not warned
    made.assert_same(kf.Samples.concatenate(parts), kf.Samples.concatenate([x[:3], x[3:]]))


@pytest.mark.parametrize("kinds", [[("vcpu", VCPU, 1)], [("vm", VM, 1), ("vcpu", VCPU, 1)]])
def test_a_part_that_cannot_begin_leaves_nothing_behind(kinds, path):
    """What lies where a part is to go stays, the parts before it are read, and no file without a batch is left."""
    x = made.samples(kinds, 4)
    path.mkdir()
    with kf.Recorder(path, rotate_bytes=1, flush_seconds=0) as recorder:
        recorder.write(x[:2])
        before = sorted(path.iterdir())
        taken = path / "vcpu-00001.arrows"
        taken.write_text("mine")
        with pytest.raises(FileExistsError, match=r"ends after 2 sweeps, which can be read: .*vcpu-00001\.arrows"):
            recorder.write(x[2:])
    assert taken.read_text() == "mine"
    taken.unlink()
    assert sorted(path.iterdir()) == before
    parts, warned = batches(path)
    assert not warned
    made.assert_same(parts[0], x[:2])


def test_a_batch_that_cannot_be_written_at_the_beginning_of_a_part_leaves_no_part(path, monkeypatch):
    """An error in the first batch of new files: they are taken back, the part before is read without a warning."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 1)], 4)
    recorder = kf.Recorder(path, rotate_bytes=1, flush_seconds=0)
    recorder.write(x[:2])
    write = os.write

    def full(fd, data):
        if "vcpu-00001" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    assert write_all(recorder, [x[2:]]).errno == errno.ENOSPC
    monkeypatch.undo()
    assert sorted(one.name for one in path.iterdir()) == ["vcpu-00000.arrows", "vm-00000.arrows"]
    parts, warned = batches(path)
    assert not warned
    made.assert_same(parts[0], x[:2])


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_without_one_of_its_files_is_left_out(part, torn, path):
    """All that is read has all files, the warning names what is missing, and the rest can be read by itself."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 6)
    record(path, [x[:2], x[2:4], x[4:]], rotate_bytes=1)
    file = path / f"vcpu-0000{part}.arrows"
    if torn:
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    wanted = [x[2 * i : 2 * i + 2] for i in range(3) if i != part]
    parts, warned = batches(path)
    for one, other in zip(parts, wanted, strict=True):
        made.assert_same(one, other)
    assert f"part {part} has no file of kind vcpu" in warned[-1]
    assert str(path / f"vm-0000{part}.arrows") in warned[-1]
    with pytest.warns(kf.RecordingWarning):
        made.assert_same(kf.Samples.load(path), kf.Samples.concatenate(wanted))


def test_a_kind_that_is_gone_is_said(path):
    """The other kind is read, and a warning says that there was more."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 4)
    record(path, [x])
    (path / "vcpu-00000.arrows").unlink()
    parts, warned = batches(path)
    made.assert_same(parts[0], x.vm)
    assert warned == [f"{path}: not all of this recording could be read: the file of kind vcpu is missing"]


THREADS = """
import os, sys
import kvmstats_fast as kf
import pyarrow
x = kf.Samples.load(sys.argv[1])
before = os.listdir("/proc/self/task")
x.save(sys.argv[2], compression="zstd")
kf.Samples.load(sys.argv[2])
assert os.listdir("/proc/self/task") == before
"""


def test_no_thread_is_started_to_write_or_read_a_recording(tmp_path):
    """Arrow would end the process where it cannot start one."""
    made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 100).save(tmp_path / "x.npz")
    subprocess.run((sys.executable, "-c", THREADS, tmp_path / "x.npz", tmp_path / "run"), check=True)


def test_two_threads_do_not_mix_their_batches(path, monkeypatch):
    """A write while another thread writes is refused, and nothing of it is in the recording."""
    x = made.samples([("vcpu", VCPU, 2)], 6)
    recorder = kf.Recorder(path, flush_seconds=0)
    refused = []
    write = os.write

    def second():
        try:
            recorder.write(x[3:])
        except RuntimeError as error:
            refused.append(str(error))

    def slow(fd, data):
        if not refused:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return write(fd, data)

    monkeypatch.setattr(os, "write", slow)
    recorder.write(x[:3])
    monkeypatch.undo()
    assert refused == [f"{path}: another thread is writing to this recording: it has one writer"]
    recorder.write(x[3:])
    recorder.close()
    made.assert_same(kf.Samples.load(path), kf.Samples.concatenate([x[:3], x[3:]]))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_bytes_that_changed_on_the_disk_are_no_riddle(compression, path):
    """What is noticed of them is a KvmStatsError that names the file, wherever they are."""
    x = made.samples([("vcpu", ODD, 2)], 6, errors=[kf.SampleError(1, 3, ERRORS[0])])
    record(path, [x], compression=compression)
    file = path / "vcpu-00000.arrows"
    whole = file.read_bytes()
    rng = random.Random(5)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 30])):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            batches(path)
        except kf.KvmStatsError as error:
            assert "vcpu-00000.arrows" in str(error)  # noqa: PT017 - most are not noticed
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("true", "false", "about"),
    [
        (b"[1, 2]", b"[1, 7]", "not all of its files"),
        (b"[1, 2]", b"[0, 2]", "not all of its files"),
        (b'"vcpu", 2', b'"vcpu", 3', "differs from that of the other files"),
    ],
)
def test_metadata_that_contradicts_itself_is_no_riddle(true, false, about, path):
    """Which stats files a stream is of: the error names it."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 6)
    record(path, [x])
    file = path / "vcpu-00000.arrows"
    whole = file.read_bytes()
    assert true in whole
    file.write_bytes(whole.replace(true, false))
    with pytest.raises(kf.KvmStatsError, match=about) as caught:
        kf.Samples.load(path if "other files" in about else file)
    assert str(file) in str(caught.value)


def test_batches_out_of_order_are_damage(path):
    """Nothing that Recorder writes is so: the error names the recording."""
    x = made.samples([("vcpu", VCPU, 1)], 6)
    with kf.Recorder(path, flush_seconds=0) as recorder:
        recorder.write(x[3:])
        recorder._last = None
        recorder.write(x[:3])
    with pytest.raises(kf.KvmStatsError, match=f"{re.escape(str(path))}: .*order of time"):
        kf.Samples.load(path)


# ---- what is refused


def test_what_lies_there_is_not_overwritten(path, tmp_path):
    """A recording or file is replaced only if that was asked for, and then as a whole."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    y = made.samples([("vcpu", ODD, 1)], 3)
    for target in (path, tmp_path / "run.npz"):
        x.save(target)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            y.save(target)
        made.assert_same(kf.Samples.load(target), x)
        y.save(target, overwrite=True)
        made.assert_same(kf.Samples.load(target), y)
    with pytest.raises(FileExistsError, match="another path"):
        kf.Recorder(path)
    assert {one.name for one in tmp_path.iterdir()} == {"run", "run.npz"}


def test_a_file_that_the_kernel_refuses_to_open_is_not_called_damaged(path):
    """With too many files open, or no permission: the error is the kernel's."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 2)
    record(path, [x])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))  # room for one more
    try:
        with pytest.raises(OSError, match=r"vcpu-00000\.arrows") as caught:
            kf.Samples.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    made.assert_same(kf.Samples.load(path), x)


@pytest.mark.parametrize("form", ["run", "run.npz"])
def test_a_directory_of_other_things_is_never_replaced(form, tmp_path):
    """Whoever names a home or a data directory by mistake keeps what is in it; a recording, or nothing, is replaced."""
    path = tmp_path / form
    x = made.samples([("vcpu", VCPU, 1)], 2)
    path.mkdir()
    x.save(path, overwrite=True)
    if path.is_file():
        path.unlink()
        path.mkdir()
    (path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="more than a recording"):
        x.save(path, overwrite=True)
    assert (path / "mine").exists()
    assert [one.name for one in tmp_path.iterdir()] == [form]


@pytest.mark.parametrize("form", ["run", "run.npz"])
@pytest.mark.parametrize("there", [None, "directory", "file"])
def test_a_symbolic_link_is_replaced_not_what_it_leads_to(form, there, tmp_path):
    """Wherever it leads, even nowhere; nothing else is left in the directory."""
    target, link = tmp_path / "target", tmp_path / form
    if there == "directory":
        target.mkdir()
        (target / "mine").touch()
    elif there == "file":
        target.write_text("mine")
    link.symlink_to(target)
    x = made.samples([("vcpu", VCPU, 1)], 2)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        x.save(link)
    x.save(link, overwrite=True)
    made.assert_same(kf.Samples.load(link), x)
    assert not link.is_symlink()
    assert {one.name for one in tmp_path.iterdir()} == {form, *(["target"] if there else [])}
    assert there != "directory" or (target / "mine").exists()


def test_chunks_of_one_run_keep_the_wall_clock_that_each_had(path):
    """The clock may be set, or the host suspended, while a recorder runs: every batch has an offset of its own."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 9, errors=[kf.SampleError(1, 4, ERRORS[0])])
    parts = [replace(x[a:b], wall_offset=offset) for a, b, offset in ((0, 3, -(10**18)), (3, 6, 7), (6, 9, 10**18))]
    record(path, parts)
    read, warned = batches(path)
    assert not warned
    for one, part in zip(read, parts, strict=True):
        made.assert_same(one, part)
    whole = kf.Samples.load(path)
    made.assert_same(whole, kf.Samples.concatenate(parts))
    assert whole.wall_time.tolist() == [t for part in parts for t in (part.time + part.wall_offset).tolist()]
    for form in ("saved", "saved.npz"):
        whole.save(path.with_name(form))
        made.assert_same(kf.Samples.load(path.with_name(form)), whole)


def test_what_could_not_be_loaded_is_not_written(path):
    """Samples out of order, of no files, or none at all: refused, and the recording goes on."""
    x = made.samples([("vcpu", VCPU, 1)], 6)
    with kf.Recorder(path, flush_seconds=0) as recorder:
        with pytest.raises(ValueError, match="no files"):
            recorder.write(x.vm)
        with pytest.raises(TypeError, match="it must be Samples"):
            recorder.write([1])
        recorder.write(x[2:4])
        with pytest.raises(ValueError, match="order of time"):
            recorder.write(x[:2])
        recorder.write(x[4:4])
        with pytest.raises(ValueError, match="order of time"):
            recorder.write(x[:2])
        recorder.write(x[4:])
    assert kf.Samples.load(path).time.tolist() == x.time[2:].tolist()
    for name in ("nothing", "nothing.npz"):
        with pytest.raises(ValueError, match=rf"/{name}: these samples are of no files"):
            x.vm.save(path.with_name(name))
    assert [one.name for one in path.parent.iterdir()] == ["run"]


def test_a_folder_of_recordings_names_those_below_it(tmp_path):
    """As of a flight recorder, whose two are read one at a time; of many the first."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    for name in ("overview", "full"):
        x.save(tmp_path / name)
    folder = re.escape(str(tmp_path))
    named = (
        f"no .arrows file in it; there are recordings below it, of which to name one: {folder}/full, {folder}/overview"
    )
    with pytest.raises(kf.KvmStatsError, match=f"{named}$"):
        kf.Samples.load(tmp_path)
    for name in ("a", "b", "c"):
        x.save(tmp_path / name)
    with pytest.raises(kf.KvmStatsError, match=rf"one: {folder}/a, {folder}/b, {folder}/c, {folder}/full, \.\.\.$"):
        kf.Samples.load(tmp_path)


def test_what_is_no_recording_is_said_so(path, tmp_path):
    """Nothing there, an empty directory, another Arrow file, two recordings in one place, a damaged .npz."""
    with pytest.raises(FileNotFoundError, match="no recording"):
        kf.Recording(path)
    with pytest.raises(kf.KvmStatsError, match=r"no \.arrows file"):
        kf.Recording(tmp_path)
    foreign = tmp_path / "foreign.arrows"
    table = pa.table({"a": [1]})
    with pa.ipc.new_stream(foreign, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(kf.KvmStatsError, match="not a recording of kvmstats_fast"):
        kf.Samples.load(foreign)
    x = made.samples([("vcpu", VCPU, 1)], 2)
    x.save(path)
    x.save(tmp_path / "again")
    shutil.copy(tmp_path / "again" / "vcpu-00000.arrows", path / "vcpu-00001.arrows")
    with pytest.raises(kf.KvmStatsError, match="different recordings"):
        kf.Recording(path)
    npz = tmp_path / "x.npz"
    x.save(npz)
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: an \.npz file is not a recording: read it with Samples\.load"):
        kf.Recording(npz)
    npz.write_bytes(npz.read_bytes()[:-100])
    with pytest.raises(kf.KvmStatsError, match="damaged"):
        kf.Samples.load(npz)
    with npz.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: not an \.npz that Samples\.save wrote"):
        kf.Samples.load(npz)
    np.savez(npz, about=np.frombuffer(b"[1]", np.uint8))
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: about is \[1\]; it must be an object"):
        kf.Samples.load(npz)
    np.savez(npz, a=1)
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: not an \.npz that Samples\.save wrote: 'about' is missing"):
        kf.Samples.load(npz)


@pytest.mark.parametrize("name", ["x", "x.npz"])
def test_what_cannot_be_written_is_named_as_the_caller_named_it(name, tmp_path):
    """Not by the name that it would have had until it was whole; nor is anything left."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / name
    with pytest.raises(OSError, match="Not a directory") as caught:
        x.save(path)
    assert caught.value.filename == str(path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"rotate_bytes": 0}, {"rotate_seconds": 0}, {"rotate_seconds": float("nan")}]
)
def test_bad_options_are_refused_before_anything_is_made(options, path):
    """One ValueError, and no directory."""
    with pytest.raises(ValueError, match=next(iter(options))):
        kf.Recorder(path, **options)
    assert not path.exists()


def test_without_pyarrow_the_message_says_what_to_install(path):
    """And an .npz needs none."""
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import kvmstats_fast as kf\n"
        "from kvmstats_fast.testing import SyntheticStats\n"
        "x = kf.Sampler([SyntheticStats().open()]).run(0, count=2)\n"
        f"x.save({str(path) + '.npz'!r}); print(len(kf.Samples.load({str(path) + '.npz'!r})))\n"
        "try: x.save('nowhere')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "2\npyarrow is not installed, which this needs: pip install 'kvmstats-fast[arrow]'\n"


def test_the_core_imports_no_extra():
    """Importing the package imports neither pyarrow nor pandas, xarray or matplotlib."""
    extras = ("pyarrow", "pandas", "xarray", "matplotlib")
    code = f"import sys, kvmstats_fast; print([m for m in {extras} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_recording_is_loaded_without_what_takes_long_to_import(path):
    """With a histogram in it, and of some sweeps of a batch: neither pyarrow.compute nor pandas is imported."""
    code = (
        "import sys, kvmstats_fast as kf\n"
        "from kvmstats_fast.testing import SyntheticStats\n"
        f"x = kf.Sampler([SyntheticStats().open()]).run(0, count=5); x.save({str(path)!r})\n"
        f"assert (kf.Samples.load({str(path)!r})['halt_wait_hist'] == x['halt_wait_hist']).all()\n"
        f"assert len(kf.Samples.load({str(path)!r}, start=0, stop=1)) == 5\n"
        "print([m for m in ('pyarrow.compute', 'pandas') if m in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_compression_that_there_is_not_is_refused(tmp_path):
    """By the names of those that there are, before there is a file."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    for name in ("run", "run.npz"):
        with pytest.raises(ValueError, match="compression is 'gzip'; it must be 'zstd', 'lz4' or None"):
            x.save(tmp_path / name, compression="gzip")
    assert not list(tmp_path.iterdir())


def test_a_recording_that_has_ended_takes_no_more(path):
    """Neither samples nor a new part."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    recorder = record(path, [x])
    for more in (recorder.rotate, lambda: recorder.write(x)):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: this recording has ended"):
            more()
    made.assert_same(kf.Samples.load(path), x)
    assert repr(kf.Recording(path)) == f"<Recording {str(path)!r}>"


def test_parts_of_other_statistics_are_damage(path):
    """No Recorder writes them into one run: the error names the recording, not an array of numpy's."""
    x = made.samples([("vcpu", VCPU, 1)], 6)
    with kf.Recorder(path, flush_seconds=0) as recorder:
        recorder.write(x[:3])
        recorder.rotate()
        recorder._first = None
        recorder.write(x[3:].select("exits"))
    with pytest.raises(kf.KvmStatsError, match=f"{re.escape(str(path))}: .*damaged: its parts are of different stat"):
        kf.Samples.load(path)
    with pytest.raises(KeyError, match="one CSV file has no columns"):
        kf.to_csv(path, path.with_suffix(".csv"))
    assert not path.with_suffix(".csv").exists()


def test_a_file_that_is_deleted_while_the_directory_is_read_is_none_of_the_recording(path, monkeypatch):
    """The others are read; a single file that is gone is not there."""
    x = made.samples([("vcpu", VCPU, 1)], 2)
    x.save(path)
    find = recording.find_files
    monkeypatch.setattr(recording, "find_files", lambda path: [*find(path), path / "vcpu-00001.arrows"])
    made.assert_same(kf.Samples.load(path), x)
    monkeypatch.setattr(recording, "find_files", lambda path: [path])
    with pytest.raises(FileNotFoundError):
        kf.Samples.load(path / "vcpu-00001.arrows")


def test_kinds_of_other_times_are_refused_where_a_range_has_one_of_them(path):
    """What is not in the range is not decompressed, and yet is not taken to fit."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 1)], 6)
    record(path, [x])
    record(path.with_name("other"), [replace(x, time=x.time + 10**13)])
    file = path / "vm-00000.arrows"
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        schema = reader.schema
    with pa.ipc.open_stream((path.with_name("other") / file.name).read_bytes()) as reader:
        batch, metadata = reader.read_next_batch_with_custom_metadata()
    with pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema), custom_metadata=metadata)
    for span in ((), (0, 3)):
        with pytest.raises(kf.KvmStatsError, match="column 'time' is not that of the other kinds"):
            kf.Samples.load(path, None, *span)


def test_a_recording_that_is_deleted_before_it_is_read_has_no_batch(path):
    """The one file of it: a warning says that it is gone, and the error that nothing is left."""
    made.samples([("vcpu", VCPU, 1)], 6).save(path)
    r = kf.Recording(path)
    (path / "vcpu-00000.arrows").unlink()
    with (
        pytest.warns(kf.RecordingWarning, match="part 0 is missing"),
        pytest.raises(kf.KvmStatsError, match="there is no whole batch in this recording"),
    ):
        r.load()
