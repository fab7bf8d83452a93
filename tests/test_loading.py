"""Loading: many batches are read as few, and the whole is what its batches are, in little more memory."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import hypothesis
import made
import numpy as np
import pyarrow as pa
import pytest
from helpers import examples
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.formats import recording, steps

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
ODD = made.schema_of(made.ODD)
KINDS = [("vm", VM, 1), ("vcpu", ODD, 2)]


@pytest.fixture
def path(tmp_path):
    """Where to record to."""
    return tmp_path / "run"


def write(path, parts, **options):
    """Record parts, each a batch."""
    with kf.Recorder(path, flush_seconds=0, **options) as recorder:
        for part in parts:
            recorder.write(part)


@st.composite
def batches(draw):
    """Samples that follow each other in batches: failures of all files too, wall clocks, ticks that start again."""
    failing = st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from(["gone", "closed"]))
    failed = draw(st.lists(failing, max_size=3, unique_by=lambda one: one[0]))
    errors = [kf.SampleError(file, sweep, OSError(9, why)) for file, sweep, why in failed]
    x = made.samples(KINDS, 12, errors=errors, seed=draw(st.integers(0, 3)))
    cuts = sorted({0, *draw(st.lists(st.integers(0, 12), max_size=12)), 12})
    parts = []
    for a, b in pairwise(cuts):
        part = x[a:b]
        steps_within = draw(st.lists(st.integers(1, max(b - a - 1, 1)), unique=True, max_size=2 if b - a > 1 else 0))
        parts.append(
            replace(
                part,
                wall_offset=draw(st.sampled_from([0, 5, 2**60])),
                wall_steps=tuple((sweep, 77 + i) for i, sweep in enumerate(sorted(steps_within))),
                missed=draw(st.integers(0, 3)),
                overruns=draw(st.integers(0, 3)),
                interrupted=draw(st.booleans()),
            )
        )
    return parts


@pytest.mark.parametrize("compression", [None, "zstd"])
@hypothesis.given(parts=batches(), size=st.sampled_from([0, 1000, 4000, 1 << 20]), rotate=st.booleans())
@examples(25)
def test_the_whole_is_its_batches_in_steps_of_any_size(compression, parts, size, rotate, tmp_path_factory):
    """Bit for bit; and so are the steps, which conversions take."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    write(path, parts, compression=compression, **({"rotate_bytes": 1} if rotate else {}))
    whole = kf.Samples.concatenate(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "STEP_BYTES", size)
        made.assert_same(kf.Samples.load(path), whole)
    made.assert_same(kf.Samples.concatenate(list(kf.Recording(path).read(size))), whole)
    made.assert_same(kf.Samples.concatenate(list(kf.Recording(path))), whole)


def stream_of(parts):
    """Bytes of a vCPU file whose batches are the parts', though no Recorder would write them so."""
    sink = pa.BufferOutputStream()
    writer = None
    for i, part in enumerate(parts):
        where = part[1].with_name(f"{part[1].name}-{i}")
        write(where, [part[0]])
        with pa.ipc.open_stream(where / "vcpu-00000.arrows") as reader:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            if writer is None:
                schema = reader.schema
                writer = pa.ipc.new_stream(sink, schema)
            writer.write_batch(pa.record_batch(batch.columns, schema=schema), custom_metadata=metadata)
    writer.close()
    return sink.getvalue().to_pybytes()


def test_ticks_that_start_again_within_a_step_are_counted_on(path, tmp_path):
    """As 0.1 recorded two runs: batch by batch they stay, the whole is as `Samples.concatenate` joins them."""
    x = made.samples([("vcpu", ODD, 2)], 9)
    parts = [x[:3], x[3:6], x[6:]]
    for part in parts:
        part.tick = np.arange(3, dtype=np.uint64)
    path.mkdir()
    (path / "vcpu-00000.arrows").write_bytes(stream_of([(part, tmp_path / "part") for part in parts]))
    read = list(kf.Recording(path))
    for one, part in zip(read, parts, strict=True):
        made.assert_same(one, part)
    made.assert_same(kf.Samples.load(path), kf.Samples.concatenate(parts))


def test_a_file_that_was_read_again_within_a_step_is_damage(path, tmp_path):
    """It is never passed over: the error is that of `Samples.concatenate`."""
    failed = made.samples([("vcpu", ODD, 2)], 3, errors=[kf.SampleError(1, 1, OSError(9, "gone"))])
    again = made.samples([("vcpu", ODD, 2)], 3)
    again.time += 10**12
    path.mkdir()
    (path / "vcpu-00000.arrows").write_bytes(stream_of([(part, tmp_path / "part") for part in (failed, again)]))
    with pytest.raises(kf.KvmStatsError, match=f"{re.escape(str(path))}: .*had failed|failed in the earlier part"):
        kf.Samples.load(path)


@pytest.mark.parametrize("bad", [1, 4, 8])
def test_the_one_batch_of_a_step_that_is_damaged_is_named(bad, path):
    """Though many are looked at together."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 8)
    x.tick += np.uint64(123456789123)
    write(path, [x[i : i + 1] for i in range(8)], compression=None)
    file = path / "vcpu-00000.arrows"
    whole = bytearray(file.read_bytes())
    ticks = x.tick.astype("<u8").tolist()
    place = whole.index(np.array([ticks[bad - 1]] * 2, "<u8").tobytes())
    whole[place] ^= 1
    file.write_bytes(whole)
    for convert in (kf.Samples.load, lambda path: kf.to_parquet(path, path.with_name("set"))):
        with pytest.raises(kf.KvmStatsError, match=f"batch {bad}: column 'tick' has several values in one sweep"):
            convert(path)
        shutil.rmtree(path.with_name("set"), ignore_errors=True)


def test_conversions_of_many_batches_are_those_of_the_whole(path, tmp_path):
    """Parquet and CSV, byte for byte where they have the same name."""
    x = made.samples([("vcpu", ODD, 3)], 50, errors=[kf.SampleError(1, 20, OSError(9, "gone"))])
    write(path, [x[i : i + 1] for i in range(50)])
    kf.to_csv(path, tmp_path / "many.csv")
    kf.to_csv(x, tmp_path / "one.csv")
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    (many,), (one,) = (kf.to_parquet(source, tmp_path / where) for source, where in ((path, "many"), (x, "one")))
    assert pa.parquet.read_table(many, partitioning=None).equals(pa.parquet.read_table(one, partitioning=None))


def test_a_step_is_bounded(path):
    """However many batches there are: one batch beyond the size ends it."""
    x = made.samples([("vcpu", VCPU, 4)], 400)
    write(path, [x[i : i + 1] for i in range(400)])
    size = 8 * VCPU.num_values * 4 * 50
    lengths = [len(part) for part in kf.Recording(path).read(size)]
    assert len(lengths) > 6
    assert max(lengths) <= 50
    assert len(list(kf.Recording(path).read(steps.STEP_BYTES))) == 1


PEAK = """
import re, sys
from pathlib import Path
import pyarrow, kvmstats_fast as kf
kf.Samples.load(sys.argv[1])
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = peak()
x = kf.Samples.load(sys.argv[2])
print(peak() - before, sum(x[name].nbytes for name in x.names))
"""


@pytest.mark.measures_memory
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_whole_takes_little_more_memory_than_its_values(compression, path):
    """Batches are let go of as they are copied, those that are mapped from the file too; so it is through growth."""
    small = path.with_name("small")
    one = made.samples([("vcpu", VCPU, 64)], 60, seed=1)
    write(small, [one[:30], one[30:]], compression=compression)
    with kf.Recorder(path, compression=compression, flush_seconds=0) as recorder:
        for i in range(50):
            one.time[:] = np.arange(60) + 60 * i
            one.tick[:] = np.arange(60) + 60 * i
            recorder.write(one)
    result = subprocess.run([sys.executable, "-c", PEAK, small, path], capture_output=True, text=True, check=True)
    peak, values = map(int, result.stdout.split())
    assert values > 100 << 20
    assert peak < 1.15 * values + steps.STEP_BYTES


def test_a_step_of_the_clock_behind_its_batch_is_not_one_of_the_next(path):
    """Though many are looked at together, the batch is named that has not so many sweeps."""
    x = made.samples([("vcpu", ODD, 2)], 9)
    write(path, [x[:3], x[3:6], x[6:]])
    file = path / "vcpu-00000.arrows"
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        read = [reader.read_next_batch_with_custom_metadata() for _ in range(3)]
        schema = reader.schema
    with pa.ipc.new_stream(file, schema) as writer:
        for number, (batch, metadata) in enumerate(read, 1):
            lie = {b"kvmstats.wall_steps": b"[[3, 5]]"} if number == 2 else {}
            writer.write_batch(batch, custom_metadata={**metadata, **lie})
    with pytest.raises(kf.KvmStatsError, match="batch 2: wall_steps are not at ascending sweeps, from 1 to 2"):
        kf.Samples.load(path)
