"""Tables of changes and rates: what `delta` and `rate` say, row by row, whatever the format and however it was cut."""

import csv
from dataclasses import replace

import made
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import kvmstats_fast as kf
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.values import overlap

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
    found, first, second = (pl.read_csv(tmp_path / f"{name}.csv") for name in ("all", "x", "other"))
    columns = ["file", "exits", "wait_hist[4]", "gauge", "several[0]"]
    assert found.select(columns).rows() == first.select(columns).rows() + second.select(columns).rows()


def test_batches_that_contradict_each_other_have_no_changes(x):
    """What is not in the order of time is an error that names the recording, and no difference."""
    with pytest.raises(kf.KvmStatsError, match=r"run7: this recording is damaged: .* not in the order of time"):
        list(overlap([x[5:], x[:5]], "run7"))


@pytest.mark.parametrize("convert", [kf.Samples.to_arrow, kf.Samples.to_pandas, kf.Samples.to_xarray, kf.to_csv])
def test_what_columns_cannot_have_is_refused(x, convert, tmp_path):
    """With the three that they can, and before anything is written."""
    with pytest.raises(ValueError, match="values is 'deltas'; it must be 'raw', 'delta' or 'rate'"):
        convert(x, *[tmp_path / "x.csv"] * (convert is kf.to_csv), values="deltas")
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_changes_is_not_taken_for_one_of_values(x):
    """What it says of itself is refused where samples are made of tables."""
    for values in ("delta", "rate"):
        with pytest.raises(kf.KvmStatsError, match=r"x\.parquet: its columns have changes, not raw values"):
            Origin.decode(x.to_arrow(values=values).schema.metadata, "x.parquet")
    assert Origin.decode(x.to_arrow().schema.metadata, "x.parquet").stats == VCPU
