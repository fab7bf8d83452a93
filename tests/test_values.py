"""Tables of changes and rates: what `delta` and `rate` say, row by row, whatever the format and however it was cut."""

import csv
from dataclasses import replace
from itertools import pairwise

import hypothesis
import hypothesis.strategies as st
import made
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import examples
from large import duckdb
from large import polars as pl

import kvmstats_fast as kf
from kvmstats_fast.formats import parquet
from kvmstats_fast.formats import values as formats_values
from kvmstats_fast.formats.origin import Origin

VCPU = made.schema_of(made.ODD)
#: What columns are called here; two have names that are taken, or that are no text.
NAMES = {stat.name: stat.name for stat in made.ODD} | {"time": "stat.time", "no\udcfftext": r"no\xfftext"}


@pytest.fixture
def x():
    """Counters at random, that is, cleared at every other sweep; two of four files fail."""
    errors = [kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in ((1, 4), (3, 0))]
    return made.samples([("vcpu", VCPU, 4)], 12, errors=errors)


def wanted(x, name, values):
    """The column that a table must have, in the order of rows: sweep by sweep, without files that had failed."""
    changes = x.delta(name) if values == "delta" else x.rate(name)
    ends = {error.file: error.sweep for error in x.errors}
    rows = [(row, file) for row in range(len(x) - 1) for file in range(4) if row + 1 < ends.get(file, len(x))]
    return np.array([changes[at] for at in rows])


def of_arrow(x, values, _):
    """Columns by name, a histogram's with its buckets."""
    columns = {name: x.to_arrow(values=values)[NAMES[name]].combine_chunks() for name in x.names}
    flat = {name: (column.flatten() if x.stat(name).shape else column).to_numpy() for name, column in columns.items()}
    return {name: values.reshape(-1, *x.stat(name).shape) for name, values in flat.items()}


def of_pandas(x, values, _):
    """The same of a frame, which has a column for each bucket."""
    frame = x.to_pandas(values=values)
    found = {}
    for name in x.names:
        shape, column = x.stat(name).shape, NAMES[name]
        parts = [f"{column}[{i}]" for i in range(*shape)] if shape else column
        found[name] = frame[parts].to_numpy()
    return found


def of_csv(x, values, folder):
    """The same of a file, in the types of the deltas."""
    x.to_csv(folder / "x.csv", values=values)
    with (folder / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in x.names:
        shape, column = x.stat(name).shape, NAMES[name]
        dtype = float if values == "rate" else x.delta(name).dtype.type
        parts = [f"{column}[{i}]" for i in range(*shape)] if shape else [column]
        found[name] = np.array([[dtype(row[part]) for part in parts] for row in rows]).reshape(-1, *shape)
    return found


@pytest.mark.parametrize("values", ["delta", "rate"])
@pytest.mark.parametrize("read", [of_arrow, of_pandas, of_csv])
def test_tables_have_what_delta_and_rate_say(x, read, values, tmp_path):
    """In every row, to the last bit, and no row of the first sweep or of a file that had failed."""
    found = read(x, values, tmp_path)
    for name in x.names:
        column = wanted(x, name, values)
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


@pytest.mark.parametrize("values", ["delta", "rate"])
def test_datasets_have_what_delta_and_rate_say(x, values):
    """Along the time of the later sweeps; of files that had failed 0 and NaN, as `delta` and `rate`."""
    data = x.to_xarray(values=values)
    changes = x.delta if values == "delta" else x.rate
    for name in x.names:
        np.testing.assert_array_equal(data["stat.time" if name == "time" else NAMES[name]].values, changes(name))
    assert data["time"].values.view(np.int64).tolist() == x.wall_time[1:].tolist()
    assert data["tick"].values.tolist() == x.tick[1:].tolist()


def test_a_row_is_at_the_later_of_its_sweeps(x):
    """Its time, tick and duration are those of the sweep that ended the change."""
    one = replace(x, errors=())
    for table in (one.to_arrow(values="delta"), one.to_arrow(values="rate"), one[1:].to_arrow()):
        for name in ("time", "tick", "sweep_ns", "host", "vm", "pid", "vcpu", "file", "id"):
            assert table[name].to_pylist() == one[1:].to_arrow()[name].to_pylist()
    assert [len(part.to_arrow(values="delta")) for part in (one, one[:1], one[:0])] == [44, 0, 0]
    assert [len(part.to_pandas(values="rate")) for part in (one, one[:1], one[:0])] == [44, 0, 0]


def test_types_and_units_of_changes(x):
    """Deltas are signed where values go up and down; rates are floats per second, in base units, and say so."""
    types = {name: x.to_arrow(values="delta").schema.field(NAMES[name]).type for name in x.names}
    assert (types["exits"], types["gauge"], types["future"]) == (pa.uint64(), pa.int64(), pa.int64())
    assert types["wait_hist"].value_type == pa.uint64()
    fields = {name: x.to_arrow(values="rate").schema.field(NAMES[name]) for name in x.names}
    units = {name: field.metadata[b"kvmstats.units"].decode() for name, field in fields.items()}
    assert all(
        field.type in (pa.float64(), pa.list_(pa.field("item", pa.float64(), nullable=False), x.stat(name).size))
        for name, field in fields.items()
    )
    assert (units["wait_ns"], units["exits"], units["gauge"], units["wait_hist"]) == ("s/s", "1/s", "B/s", "1/s")
    frame = x.to_pandas(values="rate")
    assert {column: frame.attrs["units"][column] for column in ("wait_ns", "wait_hist[2]")} == {
        "wait_ns": "s/s",
        "wait_hist[2]": "1/s",
    }
    assert x.to_xarray(values="rate")["wait_ns"].attrs["units"] == "s/s"
    assert x.to_xarray(values="delta")["wait_ns"].attrs["units"] == "ns"


def test_deltas_are_had_in_base_units_too(x):
    """With si=True, scaled as values are; rates are in base units anyway."""
    one = replace(x, errors=())
    frame = one.to_pandas(values="delta", si=True)
    assert frame.attrs["units"]["wait_ns"] == "s"
    np.testing.assert_array_equal(frame["wait_ns"].to_numpy(), one.delta("wait_ns").ravel() / 1e9)
    np.testing.assert_array_equal(frame["gauge"].to_numpy(), one.stat("gauge").to_si(one.delta("gauge")).ravel())
    assert one.to_pandas(values="rate", si=True).equals(one.to_pandas(values="rate"))


def test_a_recording_is_converted_as_a_whole(x, tmp_path):
    """Changes between its batches are in it, and those between runs of other files are not."""
    with kf.Recorder(tmp_path / "run", flush_seconds=0) as recorder:
        for part in (x[:1], x[1:5], x[5:6], x[6:]):
            recorder.write(part)
        other = made.samples([("vcpu", VCPU, 2)], 3, seed=1)
        recorder.write(replace(other, time=other.time + x.time[-1], errors=()))
    kf.to_csv(tmp_path / "run", tmp_path / "all.csv", values="delta")
    x.to_csv(tmp_path / "x.csv", values="delta")
    other.to_csv(tmp_path / "other.csv", values="delta")
    columns = ["file", "exits", "wait_hist[4]", "gauge", "several[0]"]

    def read(name):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            return [[row[column] for column in columns] for row in csv.DictReader(file)]

    assert read("all") == read("x") + read("other")


@pytest.mark.parametrize("values", ["raw", "delta", "rate"])
@pytest.mark.parametrize("convert", [kf.to_csv, kf.to_parquet])
def test_batches_that_contradict_each_other_have_no_changes(x, convert, values, tmp_path):
    """What is not in the order of time is an error that names the recording, and no difference; nothing is written."""
    with kf.Recorder(tmp_path / "run7", flush_seconds=0) as recorder:
        recorder.write(x[5:])
        recorder._failed, recorder._last = set(), None
        recorder.write(replace(x[:5], errors=()))
    with pytest.raises(kf.KvmStatsError, match=r"run7: this recording is damaged: .* not in the order of time"):
        convert(tmp_path / "run7", tmp_path / "out", values=values)
    assert not [one for one in tmp_path.rglob("*") if one.is_file() and "run7" not in one.parts]


@pytest.mark.parametrize("errors", [(), ((1, 4), (3, 0), (0, 7))])
@pytest.mark.parametrize(
    "asked", [{"values": "delta"}, {"values": "rate"}, {"si": True}, {"values": "delta", "si": True}]
)
@pytest.mark.parametrize("sweeps", [0, 1, 2, 12])
def test_a_frame_that_is_filled_part_by_part_is_the_same(monkeypatch, errors, asked, sweeps):
    """Whatever the size of the parts: a change between two of them, files that fail within one, and no sweep at all."""
    errors = [kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in errors]
    x = made.samples([("vcpu", VCPU, 4)], 12, errors=errors)[:sweeps]
    whole = x.to_pandas(**asked)
    for size in (1, 5 * x.groups[0].words * 4 * 8):
        monkeypatch.setattr(formats_values, "PART_BYTES", size)
        in_parts = x.to_pandas(**asked)
        pd.testing.assert_frame_equal(in_parts, whole, check_exact=True)
        assert in_parts.attrs == whole.attrs


@pytest.mark.parametrize("values", ["raw", "delta", "rate"])
@pytest.mark.parametrize("places", [[0, 1, 2], [2, 1, 0]])
def test_what_is_multiplied_in_parts_is_as_in_one(monkeypatch, values, places):
    """Whole numbers where all of a column fit, whichever part holds the one that does not; several such columns."""
    kib = [replace(made.ODD[0], name=name, exponent=3) for name in ("first", "second", "third")]
    x = made.samples([("vcpu", made.schema_of(kib), 2)], 3)
    (group,) = x.groups
    group.values[:] = np.arange(3)[:, None, None] + 1
    for sweep, name in enumerate(("first", "second", "third")):
        group.values[places[sweep], 0, group.places[name][1]] = 2**63
    whole = x.to_pandas(values=values, si=True)
    monkeypatch.setattr(formats_values, "PART_BYTES", 1)
    pd.testing.assert_frame_equal(x.to_pandas(values=values, si=True), whole, check_exact=True)


def test_changes_of_no_sweep_keep_their_failures(x):
    """A file that failed before the first sweep is not said to have failed before that."""
    failed = replace(x[:0], errors=(kf.SampleError(1, 0, OSError(9, "gone")),))
    rows, _ = formats_values.Columns("delta").find(failed, follows=False)
    assert [error.sweep for error in rows.errors] == [0]


@pytest.mark.parametrize(
    "convert", [kf.Samples.to_arrow, kf.Samples.to_pandas, kf.Samples.to_xarray, kf.to_csv, kf.to_parquet]
)
def test_what_columns_cannot_have_is_refused(x, convert, tmp_path):
    """With the three that they can, and before anything is written."""
    with pytest.raises(ValueError, match="values is 'deltas'; it must be 'raw', 'delta' or 'rate'"):
        convert(x, *[tmp_path / "x.csv"] * (convert in (kf.to_csv, kf.to_parquet)), values="deltas")
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_changes_is_not_taken_for_one_of_values(x):
    """What it says of itself is refused where samples are made of tables."""
    for values in ("delta", "rate"):
        with pytest.raises(kf.KvmStatsError, match=r"x\.parquet: its columns have changes, not raw values"):
            Origin.decode(x.to_arrow(values=values).schema.metadata, "x.parquet")
    assert Origin.decode(x.to_arrow().schema.metadata, "x.parquet").stats == VCPU


# ---- Parquet, whose rows lie in batches, row groups, files and dates

MIDNIGHT = 20000 * 86400 * 10**9


def run_of(sweeps=12, *, start=0, seed=0, files=3, pid=7, errors=(), **about):
    """A sweep each second from `start` seconds before midnight on; counters at random, cleared at every other sweep."""
    x = made.samples([("vcpu", VCPU, files)], sweeps, seed=seed, errors=errors, wall_offset=MIDNIGHT, **about)
    x.time[:] = (np.arange(sweeps) + start) * 10**9
    x.files = tuple(replace(info, pid=pid) for info in x.files)
    return x


def rows_of(paths):
    """All rows of a data set, file by file of each run, in the order of time; without the names of directories."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(paths)]
    return [table.replace_schema_metadata() for table in tables if len(table)]


def wanted_rows(runs, values):
    """The tables of whole runs in memory, as a data set has them together."""
    whole = pa.concat_tables(plain(x.to_arrow(values=values)) for x in runs)
    return whole.sort_by([("pid", "ascending"), ("file", "ascending"), ("time", "ascending")])


def plain(table):
    """A table without metadata, whose texts are text."""
    fields = [pa.field(f.name, pa.string(), f.nullable) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields)).replace_schema_metadata()


def found_rows(paths):
    """The same of the files of a data set."""
    whole = pa.concat_tables(rows_of(paths))
    return whole.sort_by([("pid", "ascending"), ("file", "ascending"), ("time", "ascending")])


@hypothesis.given(
    cuts=st.sets(st.integers(1, 11), max_size=5),
    failures=st.dictionaries(st.integers(0, 2), st.integers(0, 12), max_size=2),
    midnight=st.integers(-13, 1),
    group=st.integers(1, 12),
    file=st.integers(1, 12),
    values=st.sampled_from(["raw", "delta", "rate"]),
)
@hypothesis.settings(examples(8), suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_data_set_has_the_changes_of_whole_runs(  # noqa: PLR0917 - Hypothesis names them
    cuts, failures, midnight, group, file, values, tmp_path_factory
):
    """Wherever batches, row groups, files and dates begin: none is lost, and between two runs none is made up.

    Of a recording, of Samples, and of a data set of raw values, whichever of them is converted.
    """
    root = tmp_path_factory.mktemp("root")
    errors = [kf.SampleError(number, sweep, OSError(9, "gone")) for number, sweep in failures.items()]
    first, other = run_of(start=midnight, errors=errors), run_of(5, start=midnight + 30, seed=1, files=2, pid=8)
    third = run_of(4, start=midnight + 40, seed=2)  # of the first one's files, later
    with kf.Recorder(root / "rec", flush_seconds=0) as recorder:
        edges = sorted({0, *cuts, 12})
        for start, stop in pairwise(edges):
            recorder.write(first[start:stop])
        recorder.write(other)
        recorder.write(third)
    size = 8 * 3 * VCPU.num_values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_GROUP_BYTES", group * size)
        patch.setattr(parquet, "_FILE_BYTES", file * size)
        of_recording = kf.to_parquet(root / "rec", root / "1", values=values)
        of_samples = [path for x in (first, other, third) for path in x.to_parquet(root / "2", values=values)]
        kf.to_parquet(root / "rec", root / "raw")
        of_many = kf.open_recordings(root / "rec").to_parquet(root / "3", values=values)
        of_raw = kf.open_recordings(root / "raw").to_parquet(root / "4", values=values)
    wanted = wanted_rows([first, other, third], values)
    for paths in (of_recording, of_samples, of_many, of_raw):
        assert found_rows(paths).equals(wanted)
        for table, path in zip(rows_of(paths), sorted(paths), strict=True):  # a file without rows is not written
            dates = {time.date().isoformat() for time in table["time"].cast(pa.timestamp("us")).to_pylist()}
            assert path.parent.name == f"date={dates.pop()}"
            assert not dates


def test_what_is_not_between_two_sweeps_is_no_change(tmp_path):
    """A run that is selected of another's files, and a time that was left out, begin anew: as `total` counts."""
    x, y = run_of(6, files=3), run_of(6, start=10, seed=1, files=2)
    with kf.Recorder(tmp_path / "rec", flush_seconds=0) as recorder:
        recorder.write(x)
        recorder.write(y)
    r = kf.open_recordings(tmp_path / "rec").select("exits", "gauge", vcpu=0)
    assert r.vms == x.vms[:1]
    chosen = [one.select("exits", "gauge", vcpu=0) for one in (x, y)]
    found = found_rows(r.to_parquet(tmp_path / "1", values="delta"))
    assert found["exits"].to_pylist() == [*chosen[0].delta("exits")[:, 0], *chosen[1].delta("exits")[:, 0]]
    assert found["gauge"].to_pylist() == [*chosen[0].delta("gauge")[:, 0], *chosen[1].delta("gauge")[:, 0]]
    # The wall clock goes back by 4 s in the middle: what is asked for is passed twice.
    back = replace(run_of(12), wall_steps=((7, MIDNIGHT - 4 * 10**9),))
    back.save(tmp_path / "back")
    day = np.datetime64(MIDNIGHT, "ns")
    seconds = [day + np.timedelta64(second, "s") for second in (3, 6)]
    twice = kf.open_recordings(tmp_path / "back").between(*seconds).select("exits", vcpu=0)
    found = found_rows(twice.to_parquet(tmp_path / "2", values="delta"))
    counted = [change for part in (back[3:6], back[7:10]) for change in part.delta("exits")[:, 0].tolist()]
    assert sorted(found["exits"].to_pylist()) == sorted(counted)


@pytest.mark.needs("duckdb")
@pytest.mark.needs("polars")
@pytest.mark.parametrize("values", ["delta", "rate"])
@pytest.mark.parametrize("encoding", ["BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"])
def test_other_readers_of_changes_agree(x, values, encoding, tmp_path):
    """DuckDB, Polars and pandas have in each row what the table in memory has, whatever the encoding."""
    x.to_parquet(tmp_path, values=values, encoding=encoding)
    names = ["tick", "file", "exits", "gauge", "wait_hist"]
    wanted = pl.DataFrame(x.to_arrow(values=values)).select(names).sort("file", "tick")
    files = f"{tmp_path}/vcpu/*/*.parquet"
    read = duckdb.sql(f"select {', '.join(names)} from read_parquet('{files}') order by file, tick").pl()
    assert read.with_columns(pl.col("wait_hist").cast(wanted["wait_hist"].dtype)).equals(wanted)
    assert pl.read_parquet(files).select(names).sort("file", "tick").equals(wanted)
    path = next(tmp_path.glob("vcpu/*/*.parquet"))
    frame = pd.read_parquet(path, columns=names[:4])
    assert frame.sort_values(["file", "tick"])["exits"].tolist() == wanted["exits"].to_list()
    group = pq.ParquetFile(path).metadata.row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    split = values == "rate" and encoding != "PLAIN"
    assert ("BYTE_STREAM_SPLIT" if split else encoding) in encodings["exits"]
    assert encoding in encodings["tick"]


def test_a_data_set_of_changes_says_so(x, tmp_path):
    """In its metadata; what needs raw values refuses it and says what to do, and so does a data set of other values."""
    (path,) = x.to_parquet(tmp_path / "delta", values="delta")
    assert pq.read_schema(path).metadata[b"kvmstats.values"] == b'"delta"'
    assert b"kvmstats.values" not in pq.read_schema(*x.to_parquet(tmp_path / "raw")).metadata
    with pytest.raises(
        kf.KvmStatsError, match=rf"^{path}: its columns have changes, not raw values; .*: read it with DuckDB"
    ):
        kf.open_recordings(tmp_path / "delta")
    for root, values, there in (("delta", "raw", "delta"), ("delta", "rate", "delta"), ("raw", "delta", "raw")):
        before = sorted((tmp_path / root).rglob("*"))
        with pytest.raises(
            kf.KvmStatsError, match=rf'has "{there}" values, and these are "{values}": give them a data'
        ):
            x[1:].to_parquet(tmp_path / root, values=values, overwrite=True)
        assert sorted((tmp_path / root).rglob("*")) == before
    assert x[1:].to_parquet(tmp_path / "delta", values="delta")
    assert x[:1].to_parquet(tmp_path / "few", values="delta") == []  # nothing changed yet
