"""What other libraries read is what was sampled."""

import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import made
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import xarray as xr
from helpers import DATA, examples
from hypothesis import strategies as st
from large import dask_frames, duckdb, params
from large import polars as pl

import kvmstats_fast as kf
from kvmstats_fast.formats import need
from kvmstats_fast.formats import parquet as tables
from kvmstats_fast.testing import SyntheticStats

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
ODD = made.schema_of(made.ODD)
FLEET = Path(__file__).parents[1] / "docs" / "examples" / "fleet.py"


@pytest.fixture
def x():
    """Two vCPUs, values over the whole of uint64, of which no float holds most; one file fails."""
    return made.samples([("vcpu", VCPU, 2)], 6, errors=[kf.SampleError(1, 4, OSError(9, "gone"))])


def lives(x):
    """(sweep, file) of each row: not those of failed files."""
    failed = {error.file: error.sweep for error in x.errors}
    return [(t, i) for t in range(len(x)) for i in range(len(x.files)) if t < failed.get(i, len(x))]


def rows(x, name):
    """Values in the order of rows, sweep by sweep."""
    return [x[name][t, i].tolist() for t, i in lives(x)]


def sorted_rows(x, name):
    """The same, file by file."""
    return [x[name][t, i].tolist() for t, i in sorted(lives(x), key=lambda row: row[::-1])]


def exactly(value):
    """A number, or a list of numbers: no reader may have made floats of them."""
    if np.ndim(value):
        assert np.asarray(value).dtype.kind in "uiO" or isinstance(value, list | tuple)
        return [int(one) for one in value]
    assert not isinstance(value, float)
    return int(value)


# ---- from memory, through the Arrow C stream


@pytest.mark.parametrize("name", ["exits", "halt_wait_ns", "halt_wait_hist", "blocking"])
def test_arrow_libraries_take_samples_as_they_are(x, name):
    """Pyarrow and pandas read a Samples object itself, to the last bit of uint64."""
    wanted = rows(x, name)
    assert pa.table(x)[name].to_pylist() == wanted
    frame = pd.DataFrame.from_arrow(x) if hasattr(pd.DataFrame, "from_arrow") else pa.table(x).to_pandas()  # pandas 3
    assert [exactly(one) for one in frame[name]] == wanted


@pytest.mark.needs("polars")
@pytest.mark.parametrize("name", ["exits", "halt_wait_ns", "halt_wait_hist", "blocking"])
def test_polars_takes_samples_as_they_are(x, name):
    """It does so, too, and has the wall clock to the ns."""
    assert pl.DataFrame(x)[name].to_list() == rows(x, name)
    times = [int(x.time[t]) + x.wall_offset for t, _ in lives(x)]
    assert pl.DataFrame(x)["time"].dt.epoch("ns").to_list() == times


@pytest.mark.needs("duckdb")
@pytest.mark.parametrize("name", ["exits", "halt_wait_ns", "halt_wait_hist", "blocking"])
def test_duckdb_takes_samples_as_they_are(x, name):
    """It does so, too, and computes with all of the 64 bits."""
    assert [exactly(row[0]) for row in duckdb.sql(f"select {name} from x").fetchall()] == rows(x, name)
    assert duckdb.sql("select max(exits) from x").fetchall()[0][0] == max(rows(x, "exits"))


def test_time_is_the_wall_clock_everywhere(x):
    """In UTC, to the ns."""
    wanted = [int(x.time[t]) + x.wall_offset for t, _ in lives(x)]
    assert pa.table(x)["time"].cast(pa.int64()).to_pylist() == wanted
    frame = x.to_pandas()
    assert frame.index.get_level_values("time").as_unit("ns").asi8.tolist() == wanted
    assert str(frame.index.get_level_values("time").tz) == "UTC"
    assert x.to_xarray()["time"].values.view(np.int64).tolist() == (x.time + x.wall_offset).tolist()


def test_pandas_has_a_row_for_each_sweep_and_file(x):
    """Indexed by time, host, VM and vCPU, a column for each bucket, units beside it; si gives base units."""
    frame = x.to_pandas()
    assert frame["exits"].tolist() == rows(x, "exits")
    assert frame["exits"].dtype == np.uint64
    assert frame["halt_wait_hist[3]"].tolist() == [row[3] for row in rows(x, "halt_wait_hist")]
    assert frame.index.names == ["time", "host", "vm", "vcpu"]
    assert frame.index.get_level_values("vcpu").tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert frame.attrs["units"]["halt_wait_ns"] == "ns"
    assert frame.attrs["units"]["halt_wait_hist[3]"] == ""
    si = x.to_pandas(si=True)
    assert si["halt_wait_ns"].tolist() == [value / 1e9 for value in rows(x, "halt_wait_ns")]
    assert si.attrs["units"]["halt_wait_ns"] == "s"
    assert si["exits"].dtype == np.uint64


def test_xarray_has_a_variable_for_each_statistic_of_both_kinds():
    """Dims time, vcpu, vm and bucket; units as attributes; the bucket's coordinate is its lower edge in base units."""
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 3)], 4, missed=3)
    data = x.to_xarray()
    assert isinstance(data, xr.Dataset)
    assert set(data.data_vars) == set(x.names)
    assert data["exits"].dims == ("time", "vcpu")
    assert data["remote_tlb_flush"].dims == ("time", "vm")
    assert data["halt_wait_hist"].dims == ("time", "vcpu", "bucket")
    for name in x.names:
        assert np.array_equal(data[name].values, x[name])
    assert data["halt_wait_ns"].attrs["units"] == "ns"
    assert data["exits"].attrs["units"] == data["halt_wait_hist"].attrs["units"] == "1"
    assert data["bucket"].attrs["units"] == "s"
    assert data["bucket"].values.tolist() == x.stat("halt_wait_hist").bucket_edges()[:-1].tolist()
    assert data["vcpu"].values.tolist() == [1, 2, 3]
    assert data["vcpu_file"].values.tolist() == [info.id for info in x.vcpu.files]
    about = {"host": x.host, "kernel": x.kernel, "interval": x.interval, "missed": 3, "errors": []}
    assert data.attrs == about
    assert data["tick"].values.tolist() == x.tick.tolist()
    assert data["sweep_ns"].values.tolist() == x.sweep_ns.tolist()
    assert data["exits"].sel(vcpu=2).values.tolist() == x["exits"][:, 1].tolist()
    si = x.to_xarray(si=True)
    assert np.array_equal(si["halt_wait_ns"].values, x.si("halt_wait_ns"))
    assert si["halt_wait_ns"].attrs["units"] == "s"


def test_histograms_of_other_buckets_have_a_dimension_of_their_own():
    """Odd statistics too: unknown codes, several values that are no histogram, a name that is no text."""
    x = made.samples([("vcpu", ODD, 1)], 2)
    data = x.to_xarray()
    dims = {name: data[name].dims[2:] for name in ("wait_hist", "narrow_hist", "several")}
    assert len(set(dims.values())) == 3
    assert data["future"].attrs["units"] == "type 9, unit 11, base 7"
    assert x.to_pandas()["several[2]"].tolist() == x["several"][:, 0, 2].tolist()


def test_several_kinds_or_kernels_are_refused_where_there_is_one_table(tmp_path):
    """The error says what to take instead; the parts that it names work."""
    with pytest.raises(KeyError, match="of no files"):
        made.samples([("vm", VM, 1)], 2).vcpu.to_arrow()
    with pytest.raises(KeyError, match="none of these samples' files is of kind 'vcpu'"):
        kf.to_csv(made.samples([("vm", VM, 1)], 2), tmp_path / "x.csv", kind="vcpu")
    both = made.samples([("vm", VM, 1), ("vcpu", VCPU, 1)], 2)
    mixed = made.samples([("vcpu", VCPU, 1), ("vcpu", ODD, 1)], 2)
    for convert in (kf.Samples.to_arrow, kf.Samples.to_pandas):
        with pytest.raises(KeyError, match=r"samples\.vm or samples\.vcpu"):
            convert(both)
        with pytest.raises(KeyError, match=r"samples\.split\(\)"):
            convert(mixed)
        assert [len(convert(part)) for part in mixed.split()] == [2, 2]
    with pytest.raises(KeyError, match=r"samples\.split\(\)"):
        mixed.to_xarray()


def test_an_empty_run_is_an_empty_table():
    """No sweeps: no rows, all columns."""
    x = made.samples([("vcpu", VCPU, 2)], 0)
    assert (len(x.to_arrow()), len(x.to_pandas()), x.to_xarray().sizes["time"]) == (0, 0, 0)
    assert set(x.names) <= set(x.to_arrow().column_names)


# ---- Parquet and CSV


def test_parquet_is_what_was_asked_for(x, tmp_path):
    """Hive partitions by host and date, zstd, BYTE_STREAM_SPLIT, no dictionary, rows by file then time."""
    x.time[3:] += 86400 * 10**9  # a date later
    paths = kf.to_parquet(x, tmp_path)
    assert [path.parent.name[:5] for path in paths] == ["date=", "date="]
    assert {path.name.partition("-")[0] for path in paths} == {"h%C3%A4rd"}
    assert {path.parent.parent for path in paths} == {tmp_path / "vcpu"}
    for path in paths:
        file = pq.ParquetFile(path)
        group = file.metadata.row_group(0)
        for index in range(group.num_columns):
            column = group.column(index)
            assert column.compression == "ZSTD"
            assert not any("DICTIONARY" in encoding for encoding in column.encodings)
            if column.physical_type == "INT64":
                assert "BYTE_STREAM_SPLIT" in column.encodings, column.path_in_schema
        names = [group.column(column.column_index).path_in_schema for column in group.sorting_columns]
        assert names == ["file", "time"]
        table = file.read()
        order = list(zip(table["file"].to_pylist(), table["time"].cast(pa.int64()).to_pylist(), strict=True))
        assert order == sorted(order)
        assert table.schema.field("halt_wait_ns").metadata[b"kvmstats.units"] == b"ns"
        assert table["host"].to_pylist() == ["härd"] * len(table)
    assert sum(len(pq.read_table(path, partitioning=None)) for path in paths) == 10
    x.host = "no\udcfftext"  # Linux lets it be any bytes
    assert {path.name.partition("-")[0] for path in kf.to_parquet(x, tmp_path)} == {"no%FFtext"}


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of dask's, to pandas
@pytest.mark.parametrize("reader", params(["duckdb", "polars", "pandas", "dask"]))
@pytest.mark.parametrize("name", ["exits", "halt_wait_hist"])
def test_readers_of_parquet_agree(x, name, reader, tmp_path):
    """Every reader gives the same numbers, and host and date as columns."""
    kf.to_parquet(x, tmp_path, host="h1")
    x.time[:] += 86400 * 10**9
    kf.to_parquet(x, tmp_path, host="h2")
    root = tmp_path / "vcpu"
    wanted = [exactly(value) for value in sorted_rows(x, name) * 2]
    if reader == "duckdb":
        sql = f"select host, {name} from read_parquet('{root}/**/*.parquet') order by host, file, time"
        found = duckdb.sql(sql).fetchall()
    elif reader == "polars":
        frame = pl.scan_parquet(root, hive_partitioning=True).sort("host", "file", "time").collect()
        found = frame.select("host", name).rows()
    else:
        if reader == "pandas":
            frame = pd.read_parquet(root)
        else:
            frame = dask_frames.read_parquet(str(root)).compute(scheduler="synchronous")
        frame = frame.astype({"host": str}).sort_values(["host", "file", "time"], kind="stable")
        found = list(zip(frame["host"], frame[name], strict=True))
    assert [host for host, _ in found] == ["h1"] * 10 + ["h2"] * 10
    assert [exactly(value) for _, value in found] == wanted


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of dask's, to pandas
@pytest.mark.parametrize("hosts", [("007", "7"), ("1e3", "1000"), ("true", "True"), ("2026-01-01", "a"), ("", "null")])
@pytest.mark.parametrize("reader", params(["duckdb", "polars", "pyarrow", "pandas", "dask"]))
def test_no_reader_takes_the_name_of_a_host_for_something_else(reader, hosts, tmp_path):
    """Numbers, booleans, dates: each host is a text in every reader, and no two become one."""
    for number, host in enumerate(hosts):
        x = made.samples([("vcpu", VCPU, 1)], 2 + number, host=host)
        kf.to_parquet(x, tmp_path)
    root = tmp_path / "vcpu"
    if reader == "duckdb":
        sql = f"select host, count(*) from read_parquet('{root}/**/*.parquet', hive_partitioning=true) group by host"
        found = dict(duckdb.sql(sql).fetchall())
    elif reader == "polars":
        found = dict(pl.scan_parquet(root, hive_partitioning=True).group_by("host").len().collect().rows())
    elif reader == "pyarrow":
        counts = pa.dataset.dataset(root, partitioning="hive").to_table()["host"].value_counts()
        found = {row["values"]: row["counts"] for row in counts.to_pylist()}
    elif reader == "pandas":
        found = pd.read_parquet(root)["host"].value_counts().to_dict()
    else:
        found = dask_frames.read_parquet(str(root))["host"].value_counts().compute(scheduler="synchronous").to_dict()
    assert found == {host or "unknown": 2 + number for number, host in enumerate(hosts)}


def test_a_recording_becomes_parquet_batch_by_batch(tmp_path):
    """Of both kinds, and of statistics that no text names; converted twice only if that was asked for."""
    x = made.samples([("vm", VM, 1), ("vcpu", ODD, 2)], 9)
    with kf.Recorder(tmp_path / "run", flush_seconds=0) as recorder:
        for i in range(0, 9, 3):
            recorder.write(x[i : i + 3])
    paths = kf.to_parquet(tmp_path / "run", tmp_path / "set")
    assert len(paths) == 2
    table = pq.read_table(next(path for path in paths if "vcpu" in str(path)), partitioning=None)
    assert table["wait_ns"].to_pylist() == x["wait_ns"].T.reshape(-1).tolist()
    assert table["stat.time"].to_pylist() == x["time"].T.reshape(-1).tolist()
    with pytest.raises(FileExistsError, match="converted before"):
        kf.to_parquet(kf.Recording(tmp_path / "run"), tmp_path / "set")
    assert kf.to_parquet(tmp_path / "run", tmp_path / "set", overwrite=True) == paths
    assert sorted((tmp_path / "set").rglob("*.parquet")) == sorted(paths)
    assert not list((tmp_path / "set").rglob("*.part"))


def test_files_of_a_day_are_numbered_from_0_on_and_each_day_anew(tmp_path, monkeypatch):
    """By kind, date, host and schema: names are the same whatever else is in the recording."""
    monkeypatch.setattr(tables, "_FILE_BYTES", 1)
    monkeypatch.setattr(tables, "_GROUP_BYTES", 1)
    x = made.samples([("vm", VM, 1), ("vcpu", VCPU, 2)], 5)
    x.time[:] += np.array([0, 0, 0, 2, 2]) * 86400 * 10**9
    paths = [path for path in kf.to_parquet(x, tmp_path) if path.parent.parent.name == "vcpu"]
    numbers = {}
    for path in paths:
        numbers.setdefault(path.parent.name, []).append(path.stem.rpartition("-")[2])
    assert list(numbers.values()) == [["00000", "00001", "00002"], ["00000", "00001"]]


def test_the_same_samples_are_converted_once(x, tmp_path):
    """A second time they would stand in the data set twice; other sweeps, statistics or hosts go beside them."""
    paths = kf.to_parquet(x, tmp_path)
    with pytest.raises(FileExistsError, match="converted before"):
        kf.to_parquet(x[:], tmp_path)
    assert kf.to_parquet(x, tmp_path, overwrite=True) == paths
    others = [*kf.to_parquet(x[1:], tmp_path), *kf.to_parquet(x, tmp_path, host="another")]
    assert len({*paths, *others}) == len(paths) + len(others) == len(list(tmp_path.rglob("*.parquet")))


@pytest.mark.parametrize("reader", params(["pyarrow", "polars"]))
def test_a_conversion_that_is_killed_spoils_no_data_set(x, reader, tmp_path, monkeypatch):
    """What it leaves lies where no reader of the data set looks."""
    kf.to_parquet(x, tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: tmp_path)
    kf.to_parquet(x, tmp_path, overwrite=True)
    monkeypatch.undo()
    assert len(list(tmp_path.rglob("*.part"))) == 1
    if reader == "polars":
        assert len(pl.scan_parquet(tmp_path / "vcpu", hive_partitioning=True).collect()) == 10
    else:
        assert pa.dataset.dataset(tmp_path / "vcpu", partitioning="hive").count_rows() == 10


def test_more_rows_than_memory_is_to_hold_become_several_row_groups_and_files(tmp_path, monkeypatch):
    """Each sorted by file then time; together they are the whole, in the order of time."""
    x = made.samples([("vcpu", VCPU, 2)], 12)
    size = 8 * 2 * VCPU.num_values
    monkeypatch.setattr(tables, "_GROUP_BYTES", 2 * size)
    monkeypatch.setattr(tables, "_FILE_BYTES", 5 * size)
    record = tmp_path / "run"
    with kf.Recorder(record, flush_seconds=0) as recorder:
        for i in range(12):
            recorder.write(x[i : i + 1])
    for source, target in ((record, "of_recording"), (x, "of_samples")):
        paths = kf.to_parquet(source, tmp_path / target)
        files = [pq.ParquetFile(path) for path in paths]
        groups = [file.read_row_group(number) for file in files for number in range(file.num_row_groups)]
        assert [len(group) for group in groups] == [4] * 6
        assert [file.num_row_groups for file in files] == [3, 3]
        found = [group["exits"].to_numpy().reshape(2, 2).T for group in groups]
        assert np.concatenate(found).tolist() == x["exits"].tolist()


@pytest.mark.parametrize("encoding", ["BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"])
def test_the_encoding_can_be_one_that_older_readers_know(x, encoding, tmp_path):
    """DuckDB before 2 knows BYTE_STREAM_SPLIT of floats only."""
    (path,) = kf.to_parquet(x, tmp_path, encoding=encoding)
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert encoding in columns["exits"].encodings
    assert pq.read_table(path, partitioning=None)["exits"].to_pylist() == sorted_rows(x, "exits")
    with pytest.raises(ValueError, match="encoding is 'RLE'"):
        kf.to_parquet(x, tmp_path, encoding="RLE")


def csv_rows(path):
    """Rows by Python's own csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_column_for_each_bucket(x, tmp_path):
    """Python's own csv reads the raw integers back; a part of both kinds is asked for."""
    kf.to_csv(x, tmp_path / "x.csv")
    read = csv_rows(tmp_path / "x.csv")
    assert [int(row["exits"]) for row in read] == rows(x, "exits")
    assert [[int(row[f"halt_wait_hist[{i}]"]) for i in range(32)] for row in read] == rows(x, "halt_wait_hist")
    assert read[0]["id"] == x.files[0].id
    assert read[0]["time"].endswith("Z")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        kf.to_csv(x, tmp_path / "x.csv")
    both = made.samples([("vm", VM, 1), ("vcpu", VCPU, 1)], 2)
    with pytest.raises(KeyError, match=r"samples\.vm"):
        kf.to_csv(both, tmp_path / "y.csv")
    kf.to_csv(both, tmp_path / "y.csv", kind="vm")
    assert [int(row["pages_4k"]) for row in csv_rows(tmp_path / "y.csv")] == both["pages_4k"][:, 0].tolist()
    with pytest.raises(ValueError, match="kind"):
        kf.to_csv(both, tmp_path / "z.csv", kind="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "y.csv"]


@pytest.mark.needs("polars")
def test_polars_reads_csv_to_the_last_bit(x, tmp_path):
    """As texts, which it casts."""
    kf.to_csv(x, tmp_path / "x.csv")
    assert pl.read_csv(tmp_path / "x.csv", infer_schema=False)["exits"].cast(pl.UInt64).to_list() == rows(x, "exits")


@pytest.mark.skipif(os.geteuid() != 0, reason="hiding the system's time zones takes root")
def test_conversions_need_no_time_zones_of_the_system(tmp_path):
    """Small containers have none, and everything is in UTC."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(made.__file__).parent)!r})\n"
        "import made, kvmstats_fast as kf\n"
        "x = made.samples([('vcpu', made.schema_of(None), 1)], 2)\n"
        f"print(kf.to_parquet(x, {str(tmp_path)!r})[0].parent.name)\n"
        f"kf.to_csv(x, {str(tmp_path / 'x.csv')!r})\n"
    )
    hidden = 'mount -t tmpfs none /usr/share/zoneinfo && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", hidden, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    result = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "date=2026-09-21\n"
    assert "2026-09-21 14:30:00.0" in (tmp_path / "x.csv").read_text()


def test_a_recording_without_a_whole_batch_is_no_empty_table(x, tmp_path):
    """As `load` does, conversions say so, and leave nothing."""
    with kf.Recorder(tmp_path / "run", compression=None) as recorder:
        recorder.write(x)
    file = tmp_path / "run" / "vcpu-00000.arrows"
    file.write_bytes(file.read_bytes()[:-100])
    for convert, target in ((kf.to_csv, "x.csv"), (kf.to_parquet, "set")):
        with pytest.warns(kf.RecordingWarning), pytest.raises(kf.KvmStatsError, match=r"run.*no whole batch"):
            convert(tmp_path / "run", tmp_path / target)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_csv_does_not_replace_a_symbolic_link(x, tmp_path):
    """Not even one that leads nowhere."""
    (tmp_path / "x.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        kf.to_csv(x, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").is_symlink()


# ---- a fleet, with Dask


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Three hosts of two VMs of one vCPU in two nights, whose counters grow; one is cleared on the way."""
    root = tmp_path_factory.mktemp("fleet")
    runs = {}
    rng = np.random.default_rng(5)
    for host, day in itertools.product(("a", "b", "ç"), (0, 1)):
        x = made.samples([("vcpu", VCPU, 2)], 50, host=host, seed=day)
        x.files = tuple(replace(info, vm=vm, vcpu_id=0) for info, vm in zip(x.files, ("web", "db"), strict=True))
        values = x.groups[0].values
        values[:] = np.cumsum(rng.integers(0, 1000, values.shape), axis=0).astype(np.uint64) + np.uint64(2**60)
        if host == "b":
            values[20:, 1] -= values[20, 1]
        midnight = (20000 + day) * 86400 * 10**9
        x.time[:] += midnight - x.wall_offset - x.time[25]
        assert len(kf.to_parquet(x, root)) == 2
        runs[host, day] = x
    return root, runs


#: Runs the example, and shows what it has summed up; then as its first lines say, on a folder that has no data set.
RUN_FLEET = """
import json, runpy, sys
import fleet
from distributed import default_client

def ask_fleet(paths, of_example=fleet.ask_fleet):
    rates, merged = of_example(paths)
    workers = len(default_client().scheduler_info()["workers"])
    print(json.dumps([workers, {" ".join(map(str, k)): rate for k, rate in rates.items()}, merged.counts.tolist()]))
    return rates, merged

if __name__ == "__main__":
    fleet.ask_fleet = ask_fleet
    fleet.main(sys.argv[1])
    sys.argv = [fleet.__file__, "."]
    runpy.run_path(fleet.__file__, run_name="__main__")
"""


@pytest.mark.needs("dask")
def test_dask_gives_what_numpy_gives_in_memory(fleet):
    """The documented example, on a cluster of two workers: the same rates and the same merged histogram, as a table."""
    root, runs = fleet
    script = root / "run_fleet.py"
    script.write_text(RUN_FLEET)
    environment = os.environ | {"PYTHONPATH": str(FLEET.parent)}
    command = [sys.executable, script, root]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FLEET.parent, check=False)
    assert result.returncode == 1, result.stderr[-2000:]
    assert "there is no vcpu/date=" in result.stderr.splitlines()[-1]  # behind what a slow cluster may say
    summed, header, *table = result.stdout.splitlines()
    assert header.split() == ["host", "vCPU", "exits/s"]
    assert "99th percentile" in table[-1]
    workers, rates, counts = json.loads(summed)
    assert workers == 2
    wanted, merged = {}, None
    for host in "abç":
        days = [runs[host, day] for day in (0, 1)]
        change = sum(x.delta("exits").sum(axis=0) for x in days)
        seconds = sum((int(x.time[-1]) - int(x.time[0])) / 1e9 for x in days)
        for info, rate in zip(days[0].files, change / seconds, strict=True):
            wanted[f"{host} {info}"] = rate
        for x in days:
            own = x.histogram("halt_wait_hist").sum()
            merged = own if merged is None else merged + own
    assert rates == pytest.approx(wanted, rel=1e-12)
    assert counts == merged.counts.tolist()


# ---- the layouts before the merge, as merged files


@hypothesis.given(
    st.sampled_from(["arm64", "mips", "powerpc-book3s", "powerpc-booke", "s390", "x86"]),
    st.sampled_from(["vm", "vcpu"]),
    st.sampled_from(["v2", "v5", "v9"]),
    st.sampled_from(["little", "big"]),
    st.integers(0, 99),
)
@examples(40)
def test_a_file_before_the_merge_becomes_a_merged_one(arch, kind, layout, byteorder, seed):
    """Same names, descriptors and values in the same byte order; blocks aligned, in order, apart; the id is kept."""
    value_size = 4 if kind == "vm" and layout != "v9" and seed % 2 else 8
    rng = np.random.default_rng(seed)
    with SyntheticStats(arch, kind, layout=layout, byteorder=byteorder, value_size=value_size, vcpu_id=seed) as one:
        for name, stat in one.stats.items():
            one.set(name, rng.integers(0, 2 ** (8 * value_size), stat.size, np.uint64).tolist())
        old = one.to_bytes()
    new = kf.to_merged(old)
    a, b = kf.parse(old), kf.parse(new)
    assert b.schema.layout is kf.Layout.MERGED
    assert (b.id, b.schema.byteorder, list(b)) == (a.id, byteorder, list(a))
    assert b.values.tolist() == a.values.tolist()
    assert b.schema.stats == a.schema.stats
    header = b.header
    assert 24 == header.id_offset < header.desc_offset < header.data_offset < len(new)
    assert header.desc_offset % 8 == header.data_offset % 8 == header.name_size % 8 == 0
    assert header.name_size >= 48
    assert all(len(name) < header.name_size for name in (*b, b.id))
    assert len(new) == header.data_offset + 8 * len(b.values)
    assert kf.to_merged(new) == new


def test_a_captured_v2_file_becomes_a_merged_one():
    """Of a kernel that was built with the series' own code; the one with the count defect is refused."""
    for path in sorted((DATA / "captures" / "v2-x86_64").glob("*.bin")):
        old, new = kf.parse(path.read_bytes()), kf.parse(kf.to_merged(path.read_bytes()))
        assert dict(new) == dict(old)
    with pytest.raises(kf.FormatError, match="count") as caught:
        kf.to_merged((DATA / "captures" / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes())
    assert caught.value.code is kf.ErrorCode.COUNT_DEFECT


def test_a_long_name_and_a_long_id_keep_their_length():
    """Fields grow, rather than that a name loses its end."""
    long = kf.Stat("n" * 48, kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
    for pid, name_size in ((1, 56), (10**50, 64)):
        with SyntheticStats(stats=[long], layout="v5", pid=pid) as one:
            new = kf.parse(kf.to_merged(one.to_bytes()))
        assert (list(new), new.id) == (["n" * 48], one.id)
        assert new.header.name_size == name_size  # each ends with a NUL


def test_only_an_extra_that_is_missing_is_said_to_be_missing(tmp_path, monkeypatch):
    """One that is there, but lacks something of its own, or is too old, says so itself."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text("import no_such_module_of_anybody")
    (tmp_path / "too_old.py").write_text("raise ImportError('needs another numpy')")
    (tmp_path / "too_large.py").write_text("raise ImportError('x.so: failed to map segment from shared object')")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_module_of_anybody'$"):
        need("half_there", "arrow")
    with pytest.raises(ImportError, match=r"^needs another numpy$"):
        need("too_old", "arrow")
    with pytest.raises(MemoryError, match=r"too_large cannot be loaded: .*failed to map"):
        need("too_large", "arrow")
    with pytest.raises(ModuleNotFoundError, match=r"not_there is not installed.*kvmstats-fast\[arrow\]"):
        need("not_there", "arrow")
