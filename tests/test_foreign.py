"""Files that somebody else made: what they say is checked before it is used, and they say nothing for free."""

import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import astuple, replace
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import DATA, numbers, watchdog

import kvmstats_fast as kf
from kvmstats_fast.file_info import identify
from kvmstats_fast.formats import ipc, metadata, parquet
from kvmstats_fast.vmm.handover import HandOverError

VM = made.schema_of([made.ODD[1], made.ODD[4]], "vm")
ODD = made.schema_of(made.ODD)
X = made.samples([("vm", VM, 1), ("vcpu", ODD, 2)], 6, errors=[kf.SampleError(1, 3, OSError(9, "gone"))])

#: Whatever reads a recording.
READERS = {
    "Samples.load": lambda path, _: kf.Samples.load(path),
    "Recording": lambda path, _: list(kf.Recording(path)),
    "to_parquet": lambda path, room: kf.to_parquet(path, room / "set"),
    "to_csv": lambda path, room: kf.to_csv(path, room / "x.csv", kind="vcpu"),
}


@pytest.fixture
def path(tmp_path):
    """A recording."""
    X.save(tmp_path / "run")
    return tmp_path / "run"


def rewrite(file, *, about=None, batch=None, change=None, fields=None, compression=None):
    """Write a stream anew as well-formed Arrow, with other metadata or columns."""
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        schema = reader.schema
        columns, metadata = reader.read_next_batch_with_custom_metadata()
    columns, found = list(columns.columns), list(schema)
    if change is not None:
        found, columns = change(found, columns)
    if fields is not None:
        found = [field.with_metadata({**(field.metadata or {}), **fields.get(field.name, {})}) for field in found]
    schema = pa.schema(found, {**schema.metadata, **encoded(about)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:
        batch = {**dict(metadata), **encoded(batch)}
        writer.write_batch(pa.record_batch(columns, schema=schema), custom_metadata=batch)


def encoded(about):
    """Metadata of JSON values, or of bytes as they are."""
    return {
        f"kvmstats.{name}".encode(): value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in (about or {}).items()
    }


# ---- files that are none


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "socket", "device", "directory"])
@pytest.mark.parametrize("where", ["file", "folder", "npz"])
def test_only_regular_files_are_opened(reader, kind, where, tmp_path):
    """A FIFO would wait for a writer for ever: one KvmStatsError that names it, whoever reads."""
    folder = tmp_path / "run"
    folder.mkdir()
    file = folder / ("a.npz" if where == "npz" else "vcpu-00000.arrows")
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "fifo")
        file.symlink_to(tmp_path / "fifo")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(file))
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    target = folder if where == "folder" else file
    with watchdog(), pytest.raises(kf.KvmStatsError, match=str(file) if reader == "Samples.load" else str(target)):
        READERS[reader](target, tmp_path)
    assert not list(tmp_path.glob("x.csv"))


def test_a_recording_is_read_without_what_is_none_of_its_files(path):
    """Beside a FIFO in its folder, with a warning that names that."""
    os.mkfifo(path / "vcpu-00009.arrows")
    with (
        watchdog(),
        pytest.warns(kf.RecordingWarning, match=r"vcpu-00009\.arrows: not a regular file; it was left out"),
    ):
        made.assert_same(kf.Samples.load(path), X)


def record(samples, path):
    """Write by a Recorder."""
    with kf.Recorder(path) as recorder:
        recorder.write(samples)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"host": "h" * 256}, r"host'?\]? is 'h+\.\.\.h+'; it must be a text of at most 255"),
        ({"files": tuple(replace(info, vm="v" * 4097) for info in X.files)}, "of at most 4096 characters"),
        ({"files": tuple(replace(info, pid=2**40) for info in X.files)}, "a whole number"),
    ],
)
@pytest.mark.parametrize("form", ["run", "run.npz", "recorder", "set"])
def test_what_readers_would_refuse_is_not_written(form, change, text, tmp_path):
    """It is a ValueError that says what is wrong, while the samples are still there, and there is no file."""
    path, odd = tmp_path / form, replace(X, **change)
    with pytest.raises(ValueError, match=f"^these samples cannot be written: .*{text}"):
        odd.to_parquet(path) if form == "set" else record(odd, path) if form == "recorder" else odd.save(path)
    assert not [one for one in tmp_path.rglob("*") if one.is_file()]


# ---- what metadata may say

DEEP = b"[" * 100_000
FILES = [list(astuple(info)) for info in identify(X.files, X.host)]
SCHEMA_LIES = [
    ("recording", "/tmp/x", "32 hexadecimal digits"),
    ("recording", "../../../x", "32 hexadecimal digits"),
    ("recording", 5, "32 hexadecimal digits"),
    ("recording", "A" * 32, "32 hexadecimal digits"),
    ("part", -1, "a whole number"),
    ("part", True, "a whole number"),
    ("part", 1.0, "a whole number"),
    ("part", b"9" * 5000, "not JSON"),
    ("host", None, "a text"),
    ("host", "h" * 300, "a text of at most 255"),
    ("host", b'"\\ud800"', "UTF-8"),
    ("interval", "1", "a number"),
    ("interval", -1.0, "a number"),
    ("interval", b"NaN", "not JSON"),
    ("interval", b"1e999", "a number"),
    ("interval", b"-Infinity", "not JSON"),
    ("wall_offset", 2**63, "a whole number"),
    ("wall_offset", 0.5, "a whole number"),
    ("kind", "../vcpu", "'vm' or 'vcpu'"),
    ("kind", ["vcpu"], "'vm' or 'vcpu'"),
    ("columns", [2, 1], "ascending"),
    ("columns", [1, 1], "ascending"),
    ("columns", [-1, 2], "a whole number"),
    ("columns", [], "a list of 1 to"),
    ("columns", [0, 1], "not all of its files are of kind 'vcpu'"),
    ("columns", [1, 99], "not all of its files are of kind 'vcpu'"),
    ("columns", {}, "a list"),
    ("files", DEEP, "not JSON"),
    ("files", "x", "a list"),
    ("files", [["a", "vcpu", 0]], "a list of 7"),
    ("files", [[7, *FILES[0][1:]], *FILES[1:]], "a text"),
    ("files", [FILES[0], ["a", "vcpu", None, None, "", "v", "h"], FILES[2]], "the id of a vCPU"),
    ("files", [FILES[0], ["a", "vcpu", 2**40, None, "", "v", "h"], FILES[2]], "a whole number"),
    ("files", [FILES[0], ["a", "vcpu", 0, -5, "", "v", "h"], FILES[2]], "a whole number"),
    ("version", [], "a text"),
    ("kernel", {"a": 1}, "a text"),
    ("header_and_descriptors", b"%%%", "base64"),
    ("format", b"x", "not JSON"),
    ("format", 0, "formats 1 to"),
    ("format", 10**30, "not JSON"),
]


@pytest.mark.parametrize(("field", "value", "must_be"), SCHEMA_LIES)
def test_what_a_file_says_of_itself_is_checked(field, value, must_be, path):
    """Types, shapes and ranges: the error names the file, the field, and what it must be."""
    file = path / "vcpu-00000.arrows"
    rewrite(file, about={field: value})
    with watchdog(), pytest.raises(kf.KvmStatsError) as caught:
        kf.Samples.load(file)
    assert str(file) in str(caught.value)
    if field != "format":
        assert f"kvmstats.{field}" in str(caught.value)
    assert must_be in str(caught.value)
    assert len(str(caught.value)) < 500


def test_metadata_without_measure_is_not_parsed(path, monkeypatch):
    """A field that is longer than any of ours is refused by its size."""
    monkeypatch.setattr(metadata, "MOST_METADATA", 100)
    with pytest.raises(kf.KvmStatsError, match=r"kvmstats\.files has [0-9]{3} bytes; more than 100 are refused"):
        kf.Samples.load(path)


def test_header_and_descriptors_that_are_none_are_a_format_error(path):
    """It names the file and the field, and the byte of the stats file."""
    rewrite(path / "vcpu-00000.arrows", about={"header_and_descriptors": b"AAAA"})
    with pytest.raises(kf.FormatError, match=r"vcpu-00000\.arrows: kvmstats\.header_and_descriptors: byte "):
        kf.Samples.load(path / "vcpu-00000.arrows")


@pytest.mark.parametrize("field", ["recording", "files", "kind", "columns", "part", "host", "header_and_descriptors"])
def test_what_a_file_does_not_say_is_missed(field, path):
    """By name."""
    file = path / "vcpu-00000.arrows"
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        batch = reader.read_next_batch()
    about = {key: value for key, value in batch.schema.metadata.items() if key != f"kvmstats.{field}".encode()}
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batch.schema.with_metadata(about)) as writer:
        writer.write_batch(batch)
    with pytest.raises(kf.KvmStatsError, match=rf"kvmstats\.{field} is missing"):
        kf.Samples.load(file)


BATCH_LIES = [
    ("sweeps", -1, "a whole number"),
    ("sweeps", 2**40, "rows and 0 sweeps without a row"),
    ("sweeps", 5, "column 'file'"),
    ("sweeps", 0, "column 'file'"),
    ("sweeps", None, "a whole number"),
    ("missed", -1, "a whole number"),
    ("missed", "3", "a whole number"),
    ("overruns", [], "a whole number"),
    ("interrupted", 1, "true or false"),
    ("wall_offset", -(2**63), "within 64 bits"),
    ("wall_offset", 2**64, "a whole number"),
    ("wall_steps", [[0, 5]], "a whole number"),
    ("wall_steps", [[3, 5], [2, 6]], "ascending"),
    ("wall_steps", [[6, 5]], "ascending"),
    ("wall_steps", [3, 5], "a list of 2"),
    ("errors", [], "column 'file'"),
    ("errors", [[1, 4, "OSError", [9, "gone"]]], "column 'file'"),
    ("errors", [[2, 3, "OSError", [9, "gone"]]], "column 'file'"),
    ("errors", [[-1, 3, "OSError", [9, "gone"]]], "a whole number"),
    ("errors", [[3, 3, "OSError", [9, "gone"]]], "a whole number"),
    ("errors", [[1, 3, "OSError", [9, "gone"]]] * 2, "of different files"),
    ("errors", [[1, 3, "OSError", ["x", "gone"]]], "a whole number"),
    ("errors", [[1, 3, "OSError", 5]], "a list"),
    ("errors", [[1, 3, ["OSError"], [9, "gone"]]], "a text"),
    ("errors", [[1, 3, "FormatError", [999, 0, ""]]], "a whole number"),
    ("errors", [[1, 3, "FormatError", [-1]]], "a list of 3"),
    ("errors", DEEP, "not JSON"),
    ("rowless", [[1], [], []], "the same length"),
    ("rowless", [[1], [2], [3]], "column 'file'"),
    ("rowless", [[-1], [2], [3]], "a whole number"),
    ("rowless", 5, "a list of 3"),
]


@pytest.mark.parametrize(("field", "value", "about"), BATCH_LIES)
def test_what_a_batch_says_of_itself_is_checked(field, value, about, path):
    """The error names the file, the batch, and what contradicts what."""
    file = path / "vcpu-00000.arrows"
    rewrite(file, batch={field: value})
    with watchdog(), pytest.raises(kf.KvmStatsError, match=r"vcpu-00000\.arrows: batch 1") as caught:
        kf.Samples.load(file)
    assert about in str(caught.value)
    assert len(str(caught.value)) < 500


def replace_column(name, values):
    """Return a change of a stream's columns: one of them replaced."""

    def change(fields, columns):
        place = [field.name for field in fields].index(name)
        made_of = values(columns[place])
        fields[place] = pa.field(name, made_of.type, True, fields[place].metadata)
        columns[place] = made_of
        return fields, columns

    return change


def first_twice(fields, columns):
    """Repeat a statistic."""
    return [*fields, fields[-1]], [*columns, columns[-1]]


def as_row(values, kind):
    """Return a column of one value again and again."""
    return lambda column: pa.array([values] * len(column), kind)


COLUMN_LIES = [
    (replace_column("exits", lambda column: column.cast(pa.int64(), safe=False)), "'exits' of type 'int64'"),
    (replace_column("exits", lambda column: column.dictionary_encode()), "'exits' of type 'dictionary"),
    (replace_column("exits", as_row(None, pa.uint64())), "column 'exits' has nulls"),
    (replace_column("exits", as_row("x", pa.string())), "'exits' of type 'string'"),
    (replace_column("exits", as_row([5], pa.list_(pa.uint64(), 1))), "'exits' of type 'fixed_size_l"),
    (replace_column("wait_hist", as_row([], pa.list_(pa.uint64(), 0))), "'wait_hist' of type 'fixed_size_l"),
    (replace_column("wait_hist", as_row([1] * 5, pa.list_(pa.uint64()))), "'wait_hist' of type 'list"),
    (replace_column("wait_hist", as_row([1] * 6, pa.list_(pa.uint64(), 6))), "'wait_hist' of type 'fixed_size_l"),
    (replace_column("wait_hist", as_row([1, None, 1, 1, 1], pa.list_(pa.uint64(), 5))), "'wait_hist'"),
    (replace_column("time", lambda column: column.cast(pa.timestamp("us", "UTC"), safe=False)), "'time' of type"),
    (replace_column("time", lambda column: column.take(pa.array(range(len(column))[::-1]))), "several values in one"),
    (replace_column("time", lambda column: pa.array([0] * len(column), column.type)), "within 64 bits"),
    (replace_column("tick", lambda column: pa.array(range(len(column)), column.type)), "column 'tick' has several"),
    (replace_column("file", lambda column: pa.array([0] * len(column), column.type)), "column 'file'"),
    (replace_column("file", lambda column: pa.array([-1] * len(column), column.type)), "column 'file'"),
    (first_twice, "that no other column has"),
    (lambda fields, columns: (fields[:7], columns[:7]), "column 'file' is missing"),
    (lambda fields, columns: (fields[1:], columns[1:]), "column 0 is 'vm'"),
    (lambda fields, columns: (fields[::-1], columns[::-1]), "column 0 is"),
]


@pytest.mark.parametrize(("change", "about"), COLUMN_LIES)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_columns_must_be_what_the_metadata_says(change, about, compression, path):
    """Well-formed Arrow of other types, with nulls, columns twice or out of place: the error names the column."""
    file = path / "vcpu-00000.arrows"
    batch = {"wall_offset": -(2**63)} if about == "within 64 bits" else None
    rewrite(file, change=change, compression=compression, batch=batch)
    with watchdog(), pytest.raises(kf.KvmStatsError, match=r"vcpu-00000\.arrows") as caught:
        kf.Samples.load(file)
    assert about in str(caught.value)


def test_a_file_without_a_statistic_has_nothing_to_read(path):
    """The other kind's file is read; by itself it is an error."""
    file = path / "vcpu-00000.arrows"

    def bare(fields, columns):
        own = [place for place, field in enumerate(fields) if b"kvmstats.descriptor" not in (field.metadata or {})]
        return [fields[place] for place in own], [columns[place] for place in own]

    rewrite(file, change=bare)
    assert {info.kind for info in kf.Samples.load(path).files} == {"vm"}
    with pytest.raises(kf.KvmStatsError, match="there is no whole batch"):
        kf.Samples.load(file)


@pytest.mark.parametrize("descriptor", [b"99", b"-1", b"x", b"", b"1.0", b"9" * 5000, "²".encode(), b"0"])
def test_the_descriptor_of_a_column_must_be_one_of_the_file(descriptor, path):
    """By its number, which no other column has."""
    file = path / "vcpu-00000.arrows"
    rewrite(file, fields={"exits": {b"kvmstats.descriptor": descriptor}})
    with pytest.raises(kf.KvmStatsError, match=r"vcpu-00000\.arrows: column .*descriptor|by its metadata"):
        kf.Samples.load(file)


def test_a_name_with_slashes_names_no_file(tmp_path):
    """Neither a statistic's, nor a host's: all that is written is where it was asked for."""
    stats = [kf.Stat("../../x/y", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)]
    root = tmp_path / "a" / "b"
    for host in ("../../x", "..", ".", "/etc", "a/b", "\0", ".hidden", "_hidden", "é" * 80, "a=b", "007"):
        x = made.samples([("vcpu", made.schema_of(stats), 1)], 2, host=host)
        x.save(tmp_path / "run", overwrite=True)
        for path in kf.to_parquet(tmp_path / "run", root):
            assert path.parent.parent == root / "vcpu"
            assert path.name[0] not in "._"
            assert pa.parquet.read_table(path, partitioning=None)["host"].to_pylist() == [host] * 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "run"]


@pytest.mark.parametrize("field", ["files", "host", "kernel", "interval", "recording", "columns"])
def test_files_that_do_not_belong_together_are_refused(field, path):
    """Each kind's file is right by itself, but not beside the other."""
    value = {
        "files": [*FILES[:2], ["z", "vcpu", 9, None, "", "v", "h"]],
        "interval": 5,
        "recording": "0" * 32,
        "columns": [0],
    }
    if field == "columns":
        (path / "vm2-00000.arrows").write_bytes((path / "vm-00000.arrows").read_bytes())
    else:
        rewrite(path / "vcpu-00000.arrows", about={field: value.get(field, "other")})
    with pytest.raises(kf.KvmStatsError, match="different recordings" if field == "recording" else f"kvmstats.{field}"):
        kf.Samples.load(path)


# ---- what files may claim


def patch_claims(raw, claim):
    """Return a compressed stream whose first buffer of any size says that it decompresses to so many bytes."""
    with pa.ipc.open_stream(raw) as reader:
        batch = reader.read_next_batch()
    size = (batch.num_rows * 8).to_bytes(8, "little")
    place = raw.rindex(size + b"\x28\xb5\x2f\xfd")  # the magic number of zstd
    return raw[:place] + claim.to_bytes(8, "little") + raw[place + 8 :]


@pytest.mark.parametrize("claim", [2**31, 2**40, 2**62])
def test_a_batch_may_not_claim_more_than_it_can_hold(claim, tmp_path):
    """It is refused before Arrow allocates anything."""
    x = made.samples([("vcpu", ODD, 1)], 500)
    x.save(tmp_path / "run", compression="zstd")
    file = tmp_path / "run" / "vcpu-00000.arrows"
    file.write_bytes(patch_claims(file.read_bytes(), claim))
    before = pa.default_memory_pool().max_memory()
    with watchdog(), pytest.raises(kf.KvmStatsError, match=r"vcpu-00000\.arrows.* claim to hold [0-9]{10,}"):
        kf.Samples.load(file)
    assert pa.default_memory_pool().max_memory() == before


def test_what_does_not_begin_as_a_message_is_not_measured_as_one(path):
    """Arrow takes the first word for a length where it is not the mark: it would read what was not measured."""
    raw = bytearray((path / "vcpu-00000.arrows").read_bytes())
    source = pa.BufferReader(raw)
    pa.ipc.open_stream(source)
    start = source.tell()
    mark, size = struct.unpack_from("<Ii", raw, start)
    assert ipc.measure_next(memoryview(raw), start) is not None
    for begin in ((0, size), (mark - 1, size), (mark, size - len(raw))):  # which ends where it did, from the end
        struct.pack_into("<Ii", raw, start, *begin)
        with pytest.raises(ipc.NoMessageError):
            ipc.measure_next(memoryview(raw), start)


def test_a_batch_that_does_not_fit_is_a_memory_error_before_it_is_decompressed(tmp_path, monkeypatch):
    """Where a bomb, or a large recording, is more than what is available."""
    x = made.samples([("vcpu", ODD, 1)], 500)
    x.save(tmp_path / "run", compression="zstd")
    file = tmp_path / "run" / "vcpu-00000.arrows"
    file.write_bytes(patch_claims(file.read_bytes(), 2**29))
    monkeypatch.setattr("kvmstats_fast.sampling.memory.Memory.available", lambda _: 2**28)
    with pytest.raises(MemoryError, match=r"vcpu-00000\.arrows: it takes 512 MiB, and 256 MiB are available"):
        kf.Samples.load(file)
    x.save(tmp_path / "plain")
    monkeypatch.setattr("kvmstats_fast.formats.limits._SMALL", 0)
    monkeypatch.setattr("kvmstats_fast.sampling.memory.Memory.available", lambda _: 0)
    made.assert_same(kf.Samples.load(tmp_path / "plain"), x)  # it is read in place, whatever its size


def test_what_is_compressed_is_cut_into_batches_that_can_be_read(tmp_path, monkeypatch):
    """However large the samples are."""
    monkeypatch.setattr("kvmstats_fast.formats.stream_writer.MOST_IN_BATCH", 3000)
    x = made.samples([("vm", VM, 1), ("vcpu", ODD, 2)], 50, errors=[kf.SampleError(2, 33, OSError(9, "gone"))])
    x = replace(x, missed=30, overruns=4)
    x.save(tmp_path / "run", compression="zstd")
    assert len(list(kf.Recording(tmp_path / "run"))) > 3
    made.assert_same(kf.Samples.load(tmp_path / "run"), x)
    x.save(tmp_path / "plain")
    assert len(list(kf.Recording(tmp_path / "plain"))) == 1


def npz_members(path):
    """Members of an .npz."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    """Write a ZIP archive of (name, bytes)."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in members:
            archive.writestr(name, data)


def npy(array, **options):
    """Return the bytes of an .npy file."""
    sink = io.BytesIO()
    np.save(sink, array, **options)
    return sink.getvalue()


def head(shape, descr="<u8"):
    """Return the header of an array that is not there."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode()


NPZ_LIES = [
    ("time.npy", head("(1000000000000,)", "<i8"), "time"),
    ("time.npy", head("(-1,)", "<i8"), "time"),
    ("time.npy", head("((((((", "<i8"), "time"),
    ("time.npy", npy(np.array([{}], object), allow_pickle=True), "time"),
    ("time.npy", npy(np.zeros(6)), "time"),
    ("time.npy", npy(np.zeros(5, np.int64)), "sweep_ns"),
    ("time.npy", npy(np.arange(6)[::-1].copy()), "order of time"),
    ("time.npy", npy(np.zeros((6, 1), np.int64)), "time"),
    ("tick.npy", npy(np.zeros(6, np.int64)), "tick"),
    ("1.columns.npy", npy(np.array([2, 1])), "1.columns"),
    ("1.columns.npy", npy(np.array([1, 1])), "1.columns"),
    ("1.columns.npy", npy(np.array([-1, 1])), "1.columns"),
    ("1.columns.npy", npy(np.array([1, 7])), "1.columns"),
    ("1.columns.npy", npy(np.array([0, 1])), "1.columns"),
    ("1.header_and_descriptors.npy", npy(np.zeros(5, np.uint8)), "1.header_and_descriptors"),
    ("1.4.npy", npy(np.zeros((6, 2), np.uint64)), "1.4"),
    ("1.4.npy", npy(np.zeros((6, 2, 6), np.uint64)), "1.4"),
    ("about.npy", npy(np.frombuffer(DEEP, np.uint8)), "about"),
    ("about.npy", npy(np.frombuffer(b'{"format": 4, "files": []}', np.uint8)), "formats 1 to 3"),
    ("about.npy", npy(np.frombuffer(b'{"format": 2, "files": [5]}', np.uint8)), "about['files'][0]"),
    ("about.npy", b"", "about"),
]


def test_a_statistic_twice_in_an_npz_is_refused(tmp_path):
    """It would be two arrays of one name."""
    path = tmp_path / "x.npz"
    X.save(path)
    members = npz_members(path)
    about = json.loads(np.load(io.BytesIO(members["about.npy"])).tobytes())
    about["groups"][1]["stats"][1] = about["groups"][1]["stats"][0]
    members["about.npy"] = npy(np.frombuffer(json.dumps(about).encode(), np.uint8))
    write_zip(path, members.items())
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: about\['groups'\]\[1\]\['stats'\] must be different"):
        kf.Samples.load(path)


@pytest.mark.parametrize(("member", "data", "about"), NPZ_LIES)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_an_npz_are_checked(member, data, about, compression, tmp_path):
    """Pickles, shapes that are not there, other types: the error names the file and the member."""
    path = tmp_path / "x.npz"
    X.save(path)
    members = npz_members(path)
    assert member in members
    write_zip(path, (members | {member: data}).items(), compression)
    with watchdog(), pytest.raises(kf.KvmStatsError, match=r"x\.npz") as caught:
        kf.Samples.load(path)
    assert about in str(caught.value)


def test_an_npz_that_is_a_bomb_is_refused(tmp_path):
    """Members twice, of other compression, that claim more than the file has, or more than it could hold."""
    path = tmp_path / "x.npz"
    X.save(path)
    members = list(npz_members(path).items())
    write_zip(path, [*members, members[0]])
    with pytest.raises(kf.KvmStatsError, match="the same name"):
        kf.Samples.load(path)
    write_zip(path, members, zipfile.ZIP_LZMA)
    with pytest.raises(kf.KvmStatsError, match=r"a way that Samples\.save does not use"):
        kf.Samples.load(path)
    write_zip(path, members)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("time.npy")
    sizes = info.compress_size.to_bytes(4, "little") + info.file_size.to_bytes(4, "little")
    place = raw.rindex(sizes)
    for claimed, about in (((2**30, info.file_size), "of its"), ((info.compress_size, 2**31), "claim to hold")):
        lied = b"".join(size.to_bytes(4, "little") for size in claimed)
        path.write_bytes(raw[:place] + lied + raw[place + 8 :])
        with watchdog(), pytest.raises(kf.KvmStatsError, match=about):
            kf.Samples.load(path)


@pytest.mark.parametrize("form", ["run", "run.npz"])
def test_opening_takes_time_in_proportion_to_the_files(form, tmp_path):
    """Eight times as many stats files take about eight times as long, not sixty-four times."""

    def measure(files):
        x = made.samples([("vcpu", VM, files)], 1)
        path = tmp_path / f"{files}" / form
        path.parent.mkdir()
        x.save(path)
        took = []
        for _ in range(3):
            start = time.process_time()
            assert len(kf.Samples.load(path).files) == files
            took.append(time.process_time() - start)
        return min(took)

    measure(10)
    assert measure(16000) < 30 * measure(2000)


def test_a_recording_on_too_many_dates_is_not_converted(tmp_path):
    """Each date is a directory: a file of a few kB could ask for a hundred thousand."""
    x = made.samples([("vcpu", VM, 1)], 4000)
    x.time[:] = np.arange(4000) * 86400 * 10**9
    x.save(tmp_path / "run")
    with pytest.raises(kf.KvmStatsError, match="'time' is on more than 3660 dates"):
        kf.to_parquet(tmp_path / "run", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("dates", [2, 3])
def test_a_recording_may_be_on_as_many_dates_as_is_said(tmp_path, monkeypatch, dates):
    """On one more it is refused."""
    monkeypatch.setattr(parquet, "MOST_DATES", 2)
    x = made.samples([("vcpu", VM, 1)], dates)
    x.time[:] = np.arange(dates) * 86400 * 10**9
    x.save(tmp_path / "run")
    with nullcontext() if dates == 2 else pytest.raises(kf.KvmStatsError, match="more than 2 dates"):
        kf.to_parquet(tmp_path / "run", tmp_path / "set")


# ---- of other versions, and of other errors


@pytest.mark.parametrize("form", ["run", "run.npz"])
def test_recordings_of_version_0_1_are_read(form):
    """Both were written by it, and expected.json says what they held."""
    expected = json.loads((DATA / "recordings-0.1" / "expected.json").read_text())
    x = kf.Samples.load(DATA / "recordings-0.1" / form)
    for name in ("time", "tick", "sweep_ns"):
        assert getattr(x, name).tolist() == expected[name]
    for name in ("wall_offset", "interval", "host", "kernel"):
        assert getattr(x, name) == expected[name]
    assert x.wall_steps == ()
    assert x.missed == expected["missed"][form]
    assert x.files == identify([kf.FileInfo(*info) for info in expected["files"]], x.host)
    assert [[error.file, error.sweep, repr(error.error)] for error in x.errors] == expected["errors"]
    for name, values in expected["values"].items():
        assert [x.vcpu[name].tolist(), *([x.vm[name].tolist()] if name in x.vm.names else [])] == values


@pytest.mark.parametrize("form", ["run", "run.npz"])
@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (kf.VmGoneError(3, "process 7 has ended"), kf.VmGoneError),
        (kf.AttachError(1, "may not"), kf.AttachError),
        (HandOverError(32, "broken"), kf.AttachError),
        (PermissionError(13, "no"), PermissionError),
        (FileNotFoundError(2, "no"), FileNotFoundError),
        (OSError(19, "gone"), OSError),
        (OSError("words"), OSError),
        (kf.FormatError(kf.ErrorCode.LAYOUT, 3, "not one"), kf.FormatError),
        (ValueError("closed"), ValueError),
        (kf.KvmStatsError("odd"), kf.KvmStatsError),
        (RuntimeError("other"), kf.KvmStatsError),
    ],
    ids=repr,
)
def test_errors_keep_their_type_through_a_file(error, kept, form, tmp_path):
    """What a handler catches while sampling it catches after load, too; errno, text, code and offset are the same."""
    if isinstance(error, HandOverError):
        kept = next(one for one in type(error).__mro__ if one in (kf.AttachError, OSError, kf.KvmStatsError))
    x = made.samples([("vcpu", ODD, 2)], 3, errors=[kf.SampleError(1, 2, error)])
    x.save(tmp_path / form)
    (loaded,) = kf.Samples.load(tmp_path / form).errors
    assert type(loaded.error) is kept
    assert str(loaded.error) == str(error)
    for name in ("errno", "strerror", "code", "offset"):
        assert getattr(loaded.error, name, None) == getattr(error, name, None)


def test_parquet_files_of_one_run_that_contradict_each_other_are_refused(tmp_path):
    """By the name of the one that says otherwise than the first."""
    with kf.Recorder(tmp_path / "run", flush_seconds=0) as recorder:
        recorder.write(X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_GROUP_BYTES", 1)
        patch.setattr(parquet, "_FILE_BYTES", 1)
        files = sorted(one for one in kf.to_parquet(tmp_path / "run", tmp_path / "set") if "vcpu" in str(one))
    assert len(files) > 1
    file = pq.ParquetFile(files[1])
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    schema = groups[0].schema.with_metadata({**groups[0].schema.metadata, b"kvmstats.interval": b"7.0"})
    with pq.ParquetWriter(files[1], schema) as writer:
        for group in groups:
            writer.write_table(group.cast(schema))
    with pytest.raises(kf.KvmStatsError, match=r"kvmstats\.interval is damaged: it is not that of .*, of the same run"):
        kf.open_recordings(tmp_path / "set")


def test_a_parquet_file_without_the_rows_that_it_speaks_of_is_damaged(path, tmp_path):
    """As one that somebody has filtered: the error names the file, and what it lacks."""
    (file,) = [one for one in kf.to_parquet(path, tmp_path / "set") if "vcpu" in str(one)]
    whole = pq.ParquetFile(file)
    about = {**whole.schema_arrow.metadata, **whole.metadata.metadata}
    pq.write_table(whole.read().slice(0, 0).replace_schema_metadata(about), file)
    with pytest.raises(kf.KvmStatsError, match=r"vcpu.*: row group 1: kvmstats\.sweeps is 6; 0 rows and 0 sweeps"):
        kf.open_recordings(tmp_path / "set")


@pytest.mark.parametrize("text", [b"tick", b"time"])
def test_names_in_parquet_that_are_no_text_are_an_error_of_the_file(path, tmp_path, text):
    """Wherever one stands: in the schema, or in the metadata of a row group."""
    (file,) = [one for one in kf.to_parquet(path, tmp_path / "set") if "vcpu" in str(one)]
    raw, at, refused = file.read_bytes(), -1, 0
    while (at := raw.find(text, at + 1)) >= 0:
        file.write_bytes(raw[:at] + b"\xfb" + raw[at + 1 :])
        try:
            for x in kf.open_recordings(tmp_path / "set"):
                x.wall_time.sum()
        except kf.KvmStatsError:
            refused += 1
    assert refused


# ---- by the thousand


def mutate(script, *arguments):
    """What a script of tests/ says of the inputs that it changes at random, and how many came to what."""
    command = [sys.executable, Path(__file__).parent / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-300:]
    counted = re.search(r"\{.*\}", done.stdout)
    return done.stdout, json.loads(counted[0].replace("'", '"'))


def test_of_inputs_of_every_kind_none_is_a_riddle():
    """Stats files, hand-over messages, command lines, times and conditions: only documented errors, and no fd stays."""
    inputs = numbers(1000)
    said, came = mutate("mutate_inputs.py", len(inputs), inputs.start)
    assert said.startswith("1000 inputs from ")
    assert min(came[name] for name in ("parsed", "FormatError", "received", "HandOverError", "text read")) > 5
    assert sum(count for name, count in came.items() if name.startswith("command line")) > 100


def test_of_thousands_of_lies_none_is_a_riddle():
    """Bytes, well-formed Arrow and .npz members changed at random: only documented errors, in bounded time."""
    inputs = numbers(600)
    said, came = mutate("mutate_recordings.py", len(inputs), inputs.start)
    assert said.startswith("600 inputs: ")
    # Of 600 about 20 are the rarest, "merged": 10 or fewer come once in a hundred runs, and 2 or fewer in two million.
    assert min(came["read"], came["KvmStatsError"], came["FormatError"], came["merged"]) > 2


def test_a_footer_that_contradicts_itself_does_not_end_the_process():
    """An input that did: pyarrow calls std::terminate when it is asked for what such a footer says of a column."""
    _, came = mutate("mutate_recordings.py", "--one", 1093535)
    assert came in ({"read": 1}, {"KvmStatsError": 1})  # as pyarrow has it


def test_random_bytes_are_no_recording(tmp_path):
    """Of any length, under any of the names that are read."""
    rng = random.Random(1)
    for size in (0, 1, 7, 8, 9, 100, 5000):
        for name in ("x.npz", "x.arrows", "x"):
            (tmp_path / name).write_bytes(rng.randbytes(size))
            with pytest.raises(kf.KvmStatsError, match=f"/{name}: not a"):
                kf.Samples.load(tmp_path / name)
