"""Recordings, data sets, .npz and stats files that lie or are damaged: only documented errors may come out.

    python tests/mutate_recordings.py COUNT [FIRST]     # each number is one input; a failure prints its number
    python tests/mutate_recordings.py --one NUMBER      # that one again, with its traceback

Each input has 20 seconds of a processor, and the process 2 GiB of address space more than it starts with.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

SECONDS = 20
ADDRESS_SPACE = 2 << 30
NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**63, 2**64, 10**30, 1.5, -0.5, 1e308)
TEXTS = ("", "vm", "vcpu", "../x", "/tmp/x", "a/b", "\0", "\ud800", "\udcff", "é" * 300, "0" * 32, "007")
RAW = (
    b"", b"[", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe",
    b'"\\ud800"', b"null", b"{}", b"[[]]", b"[null]", b"\xef\xbb\xbf1",
)  # fmt: skip


def sample():
    """Samples of both kinds, of which files fail, also all vCPUs."""
    odd, vm = made.schema_of(made.ODD), made.schema_of([made.ODD[1], made.ODD[4]], "vm")
    errors = [
        kf.SampleError(1, 2, OSError(9, "gone")),
        kf.SampleError(2, 4, kf.FormatError(kf.ErrorCode.TRUNCATED, 80, "short")),
    ]
    return made.samples([("vm", vm, 1), ("vcpu", odd, 2)], 5, errors=errors, wall_steps=((3, 77),))


def files_of(room):
    """Bytes by name."""
    return {one.name: one.read_bytes() for one in room.iterdir()}


def two_runs(x, room):
    """A recording of other files from the second sweep on."""
    with kf.Recorder(room, flush_seconds=0) as recorder:
        recorder.write(x[:1])
        recorder.write(x.vcpu[1:])
    return files_of(room)


def with_a_tail(x, room):
    """A recording as a kill leaves it."""
    with kf.Recorder(room, flush_seconds=0, batch_bytes=3 * 8 * 40) as recorder:
        for i in range(len(x)):
            recorder.write(x[i : i + 1])
        return files_of(room)


def limit_time(seconds):
    """End this process after so much time of processors, or after 15 times as much of any; 0: no more.

    Of a busy host it may get little, and a hang may take none. No handler: Python would run it behind a call only.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(15 * seconds)


class Originals:
    """What the inputs are made from."""

    def __init__(self, room):
        x = sample()
        self.recordings = []
        for name, samples, compression in (
            ("a", x, None),
            ("b", x, "zstd"),
            ("c", x[:2], "lz4"),
            ("d", x.vcpu[:2], None),
        ):
            with kf.Recorder(
                room / name, compression=compression, rotate_bytes=1 if name == "b" else None, flush_seconds=0
            ) as recorder:
                recorder.write(samples[:1])
                recorder.write(samples[1:])
            self.recordings.append(files_of(room / name))
        self.recordings += [two_runs(x, room / "runs"), with_a_tail(x, room / "tail")]
        self.parquet = [path.read_bytes() for path in kf.to_parquet(x, room / "set")]
        self.parquet += [path.read_bytes() for path in kf.to_parquet(room / "runs", room / "set")]
        self.npz = []
        for name, compression in (("a.npz", None), ("b.npz", "zstd")):
            x.save(room / name, compression=compression)
            self.npz.append((room / name).read_bytes())
        self.stats_files = []
        for layout in ("v2", "v5", "v9", "merged"):
            with SyntheticStats(layout=layout) as one:
                self.stats_files.append(one.to_bytes())


def hostile(rng, depth=0):
    """Any JSON value."""
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.randrange(-3, 9)
    if kind == 4:
        return [hostile(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS[:3]): hostile(rng, depth + 1) for _ in range(rng.randrange(3))}


def lie(rng, value):
    """Return a JSON value with something inside it changed."""
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        place = rng.randrange(len(value))
        change = rng.randrange(5)
        if change == 0:
            del value[place]
        elif change == 1:
            value.insert(place, value[rng.randrange(len(value))])
        elif change == 2:
            rng.shuffle(value)
        else:
            value[place] = lie(rng, value[place])
        return value
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value = dict(value)
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            del value[name]
        else:
            value[name] = lie(rng, value[name])
        return value
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1))
    return hostile(rng)


def lie_raw(rng, raw):
    """Return the bytes of a metadata value, changed."""
    if rng.random() < 0.15:
        return rng.choice(RAW)
    try:
        return json.dumps(lie(rng, json.loads(raw))).encode()
    except (ValueError, RecursionError):  # base64, or what was changed before
        return change_bytes(rng, raw)


def change_bytes(rng, raw):
    """Return bytes with some of them changed, left out or added."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 30))):
        place = rng.randrange(len(raw) + 1)
        change = rng.randrange(6)
        if change == 0:
            del raw[place : place + rng.randrange(1, 200)]
        elif change == 1:
            raw[place:place] = rng.randbytes(rng.randrange(1, 16))
        elif change == 2 and rng.random() < 0.2:
            del raw[place:]
        elif change == 3:
            raw[place : place + 8] = rng.choice(NUMBERS[:10]).to_bytes(9, "little", signed=True)[:8]
        elif raw:
            raw[place % len(raw)] = rng.randrange(256)
    return bytes(raw)


def lie_metadata(rng, metadata):
    """Return a schema's, batch's or field's metadata, changed."""
    metadata = dict(metadata or {})
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(sorted(metadata) or [b"kvmstats.x"])
        if rng.random() < 0.1:
            metadata.pop(key, None)
        elif rng.random() < 0.05:
            metadata[rng.choice((b"kvmstats.\xff", b"kvmstats.x", b"kvmstats.rowless"))] = rng.choice(RAW)
        else:
            metadata[key] = lie_raw(rng, metadata.get(key, b"1"))
    return {key: value for key, value in metadata.items() if b"\0" not in value or rng.random() < 0.5}


def lie_column(rng, field, column):
    """Return a column's field and values, of another type, length or with nulls."""
    rows = len(column)
    change = rng.randrange(9)
    if change == 0:
        values = pa.array([rng.choice((0, 1, 2, 3, 2**31 - 1)) for _ in range(rows)], pa.int32())
    elif change == 1:
        values = pa.array([None] * rows, column.type)
    elif change == 2 and not pa.types.is_dictionary(column.type) and not pa.types.is_fixed_size_list(column.type):
        values = column.dictionary_encode()
    elif change == 3:
        values = pa.array([rng.choice(TEXTS[:6]) for _ in range(rows)], pa.string())
    elif change == 4:
        values = pa.array([[]] * rows, pa.list_(pa.uint64(), 0))
    elif change == 5:
        values = pa.array([[rng.choice((0, None, 2**63))] * 5 for _ in range(rows)], pa.list_(pa.uint64(), 5))
    elif change == 6 and pa.types.is_integer(column.type):
        values = pa.array([rng.choice((0, 1, 7, 2**31 - 1, None)) for _ in range(rows)], column.type)
    elif change == 7:
        values = column.take(pa.array([rng.randrange(rows) for _ in range(rows)], pa.int64())) if rows else column
    else:
        values = pa.array([0.5] * rows, pa.float64())
    keep_type = rng.random() < 0.3
    return (
        field if keep_type and values.type == field.type else pa.field(field.name, values.type, True, field.metadata)
    ), values


def lie_stream(rng, raw):
    """Return a well-formed Arrow stream whose metadata or columns lie."""
    with pa.ipc.open_stream(raw) as reader:
        schema, batches = reader.schema, []
        while True:
            try:
                batches.append(reader.read_next_batch_with_custom_metadata())
            except StopIteration:
                break
    fields = list(schema)
    columns = [list(batch.columns) for batch, _ in batches]
    metadata = [dict(one or {}) for _, one in batches]
    about = dict(schema.metadata)
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.randrange(8)
        place = rng.randrange(len(fields))
        if what <= 1:
            about = lie_metadata(rng, about)
        elif what <= 3:
            at = rng.randrange(len(metadata))
            metadata[at] = lie_metadata(rng, metadata[at])
        elif what == 4:
            fields[place] = fields[place].with_metadata(lie_metadata(rng, fields[place].metadata))
        elif what == 5:
            other = rng.randrange(len(fields))
            for some in (fields, *columns):
                if rng.random() < 0.98:
                    some[place], some[other] = some[other], some[place]
        elif what == 6:
            change = rng.random()
            for some in (fields, *columns):
                if change < 0.5 and len(some) > 1:
                    del some[place]
                else:
                    some.append(some[place])
        else:
            lied = [lie_column(random.Random(place), fields[place], one[place]) for one in columns]
            fields[place] = lied[0][0]
            for one, (_, values) in zip(columns, lied, strict=True):
                one[place] = values
    if rng.random() < 0.1:
        columns, metadata = columns * 2, metadata * 2
    if rng.random() < 0.1:
        keep = rng.randrange(4)
        columns = [[one.slice(0, keep) for one in some] for some in columns]
    schema = pa.schema(fields, about)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "zstd", "lz4")), use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for some, one in zip(columns, metadata, strict=True):
            try:
                batch = pa.record_batch(some, schema=schema)
            except (pa.ArrowException, ValueError, TypeError):
                continue
            writer.write_batch(batch, custom_metadata=one)
    return sink.getvalue()


def lie_parquet(rng, raw):
    """Return a well-formed Parquet file whose metadata or columns lie."""
    file = pq.ParquetFile(io.BytesIO(raw))
    table = file.read()
    fields, columns = list(table.schema), [column.combine_chunks() for column in table.columns]
    about = dict(table.schema.metadata)
    happened = {b"kvmstats.batches": file.metadata.metadata[b"kvmstats.batches"]}
    for _ in range(rng.choice((1, 1, 2))):
        what, place = rng.randrange(5), rng.randrange(len(fields))
        if what == 0:
            about = lie_metadata(rng, about)
        elif what == 1:
            happened = lie_metadata(rng, happened)
        elif what == 2:
            fields[place] = fields[place].with_metadata(lie_metadata(rng, fields[place].metadata))
        elif what == 3:
            other = rng.randrange(len(fields))
            for some in (fields, columns):
                some[place], some[other] = some[other], some[place]
        else:
            fields[place], columns[place] = lie_column(rng, fields[place], columns[place])
    if rng.random() < 0.1:
        about[b"kvmstats.format"] = rng.choice((b"1", b"2"))
    sink = io.BytesIO()
    options = {"compression": rng.choice(("zstd", "snappy", "none")), "use_dictionary": rng.random() < 0.3}
    with pq.ParquetWriter(sink, pa.schema(fields, about), **options) as writer:
        made_of = pa.table(columns, schema=pa.schema(fields, about))
        writer.write_table(made_of, row_group_size=rng.choice((1, 3, 1000)) if rng.random() < 0.2 else 1000)
        writer.add_key_value_metadata({key: value for key, value in happened.items() if b"\0" not in value})
    return sink.getvalue()


def lie_npz(rng, raw):
    """Return a ZIP archive whose members lie."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(one, archive.read(one)) for one in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(members))
        name, data = members[place]
        what = rng.randrange(7)
        if what == 0:
            del members[place]
        elif what == 1:
            members.append((rng.choice((name, "x.npy", "../x.npy")), data))
        elif what == 2:
            members[place] = name, change_bytes(rng, data)
        elif what == 3:
            arrays = (
                np.zeros(
                    rng.choice(((), 3, (5, 2), (0, 2), (5, 2, 5))), rng.choice(("u8", "i8", "f8", ">u8", "u1", "S3"))
                ),
                np.array([{}, None], object),
                np.zeros((5, 2), [("a", "u8")]),
                np.asfortranarray(np.zeros((5, 2), "u8")),
            )
            sink = io.BytesIO()
            np.save(sink, rng.choice(arrays), allow_pickle=True)
            members[place] = name, sink.getvalue()
        elif what == 4:
            shape = rng.choice(("(10**9,)", "(1000000000000, 5)", "(-1,)", "(99999999999999999999,)", "((((", "(5, 2)"))
            head = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
            members[place] = name, b"\x93NUMPY\x01\0\x76\0" + head.encode() + bytes(rng.randrange(200))
        else:
            at = [one for one, _ in members].index("about.npy") if "about.npy" in dict(members) else place
            try:
                about = json.loads(np.load(io.BytesIO(members[at][1])).tobytes())
                text = lie_raw(rng, json.dumps(lie(rng, about)).encode())
            except Exception:  # it was changed before, and numpy lets anything out
                continue
            sink = io.BytesIO()
            np.save(sink, np.frombuffer(text, np.uint8))
            members[at] = "about.npy", sink.getvalue()
    sink = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(sink, "w", rng.choice((0, 8, 8, 12))) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, data in members:
            archive.writestr(name, data)
    return sink.getvalue()


def look_at(x):
    """Read every value."""
    x.wall_time.sum()
    for group in x.groups:
        for stat in group.places:
            group.view(stat).sum()


def read_some(rng, path):
    """Read all runs, or a range of time."""
    r = kf.open_recordings(path)
    for x in r.between(rng.choice((None, 0.001)), rng.choice((None, 0.002))) if rng.random() < 0.5 else r:
        look_at(x)
    return "read"


def read_parquet(rng, what, raw, room):
    """Make a data set of one file, and read it."""
    try:
        raw = change_bytes(rng, raw) if what == 10 else lie_parquet(rng, raw)
    except (pa.ArrowException, ValueError, TypeError):
        return "not written"
    (room / "x.parquet").write_bytes(raw)
    return read_some(rng, room)


def run_one(number, originals, room):
    """Make an input and read it; return what came of it. An exception that is not documented comes out."""
    rng = random.Random(number)
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    what = rng.randrange(12)
    if what >= 10:
        return read_parquet(rng, what, rng.choice(originals.parquet), room)
    if what == 0:
        kf.to_merged(change_bytes(rng, rng.choice(originals.stats_files)))
        return "merged"
    if what <= 3:
        raw = rng.choice(originals.npz)
        path = room / "x.npz"
        path.write_bytes(change_bytes(rng, raw) if what == 1 else lie_npz(rng, raw))
    else:
        path = room / "x"
        path.mkdir()
        files = dict(rng.choice(originals.recordings))
        name = rng.choice(sorted(files))
        files[name] = change_bytes(rng, files[name]) if what <= 5 else lie_stream(rng, files[name])
        for one, raw in files.items():
            (path / one).write_bytes(raw)
    if path.suffix != ".npz" and rng.random() < 0.3:
        return read_some(rng, path)
    x = kf.Samples.load(path)
    look_at(x)
    if number % 4 == 0:
        written = kf.to_parquet(x if path.suffix == ".npz" else path, room / "set")
        assert all((room / "set") in one.parents for one in written)
    return "read"


def main(arguments):
    """Run as the first lines say."""
    warnings.simplefilter("ignore", kf.RecordingWarning)
    one = arguments[0] == "--one"
    first, count = (
        (int(arguments[1]), 1) if one else (int(arguments[1]) if len(arguments) > 1 else 0, int(arguments[0]))
    )
    came, failures = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        originals = Originals(Path(folder))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
        for number in range(first, first + count):
            print(number, file=sys.stderr, end="\r", flush=True)  # for who looks for the one that ended the process
            limit_time(SECONDS)
            try:
                came[run_one(number, originals, Path(folder) / "input")] += 1
            except kf.KvmStatsError as error:
                came[type(error).__name__] += 1
                if one:
                    print(repr(error))
            except Exception as error:
                failures += 1
                print(f"{number}: {type(error).__name__}: {str(error)[:200]}")
                if one:
                    traceback.print_exc()
            limit_time(0)
    print(f"{count} inputs: {dict(came)}, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
