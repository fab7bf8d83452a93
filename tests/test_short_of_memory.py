"""Too little memory is a MemoryError: never part of a result, nor another error, nor the end of the process."""

import subprocess
import sys
from pathlib import Path

import made
import pyarrow as pa
import pyarrow.parquet
import pytest

import kvmstats_fast as kf

VCPU = made.schema_of(None, "vcpu")
X = made.samples([("vm", made.schema_of(None, "vm"), 1), ("vcpu", VCPU, 2)], 9)


@pytest.mark.measures_memory
def test_at_every_limit_the_result_is_right_or_a_memory_error():
    """Opening, running, streaming, recording, saving, loading and converting, each in a process of its own."""
    command = [sys.executable, Path(__file__).parent / "short_of_memory.py", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("right") == 8
    assert "MemoryError" in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("malloc failed"),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        OSError(12, "Memory mapping file failed: Cannot allocate memory"),
        OSError("ZSTD decompression failed: Allocation error : not enough memory"),
        pa.ArrowInvalid("LZ4: not enough memory"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_memory_that_arrow_lacks_is_not_called_damage(error, batch, tmp_path, monkeypatch):
    """In whatever form it says so, at whichever batch: no part of the recording is returned, and none called torn."""
    with kf.Recorder(tmp_path / "run", flush_seconds=0) as recorder:
        recorder.write(X[:4])
        recorder.write(X[4:])
    open_stream = pa.ipc.open_stream
    calls = []

    class Reader:
        def __init__(self, *arguments, **options):
            self.reader = open_stream(*arguments, **options)

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def read_next_batch_with_custom_metadata(self):
            calls.append(1)
            if len(calls) == batch:
                raise error
            return self.reader.read_next_batch_with_custom_metadata()

    monkeypatch.setattr(pa.ipc, "open_stream", Reader)
    for load in (kf.Samples.load, lambda path: kf.to_parquet(path, tmp_path / "set")):
        calls.clear()
        with pytest.raises(MemoryError):
            load(tmp_path / "run")
    assert not list(tmp_path.rglob("*.part"))


def test_memory_that_arrow_lacks_to_open_a_file_is_not_called_damage(tmp_path, monkeypatch):
    """Nor is the file left out of the recording."""
    X.save(tmp_path / "run")

    def fail(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pa.ipc, "open_stream", fail)
    with pytest.raises(MemoryError):
        kf.Samples.load(tmp_path / "run")


def save(folder):
    """Write an Arrow stream."""
    X.save(folder / "run", compression="zstd")


def convert(folder):
    """Write a Parquet file."""
    kf.to_parquet(X, folder / "set")


@pytest.mark.parametrize(
    ("write", "where", "method"), [(save, pa.ipc, "new_stream"), (convert, pa.parquet, "ParquetWriter")]
)
def test_memory_that_a_codec_lacks_to_write_is_a_memory_error(write, where, method, tmp_path, monkeypatch):
    """Arrow calls that an OSError without a number; nothing half-written is left."""
    make = getattr(where, method)

    class Writer:
        def __init__(self, *arguments, **options):
            self.writer = make(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.writer.close()

        def fail(self, *_, **__):
            raise OSError("ZSTD compression failed: Allocation error : not enough memory")

        write_batch = write_table = fail

        def __getattr__(self, name):
            return getattr(self.writer, name)

    monkeypatch.setattr(where, method, Writer)
    with pytest.raises(MemoryError, match="ZSTD compression failed"):
        write(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_recorder_without_memory_says_so_and_ends_readable(tmp_path, monkeypatch):
    """What it had written can be read."""
    recorder = kf.Recorder(tmp_path / "run", flush_seconds=0)
    recorder.write(X[:4])
    with monkeypatch.context() as patched:

        def fail(*_):
            raise pa.ArrowMemoryError("malloc of size 64 failed")

        patched.setattr("kvmstats_fast.formats.arrow.to_batch", fail)
        with pytest.raises(MemoryError):
            recorder.write(X[4:])
    made.assert_same(kf.Samples.load(tmp_path / "run"), X[:4])
