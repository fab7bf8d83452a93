"""Several VMs in one run: every table, plot and figure tells them apart, and the recipes of the documents add up."""

import csv
import itertools
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import made
import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import watchdog
from holder import Holder
from large import NAMES as LARGE
from large import duckdb, is_here, needs, params
from large import polars as pl
from qemu import arguments, needs_qemu

mpl.use("Agg")
import matplotlib.pyplot as plt

import kvmstats_fast as kf
from kvmstats_fast import plot
from kvmstats_fast.testing import counts_right, exit_counter

DOCS = Path(__file__).parents[1] / "docs"
VM, VCPU = (made.schema_of(None, kind) for kind in ("vm", "vcpu"))
WHOSE = ["host", "vm", "pid", "vcpu"]


# ---- tables


def samples_of(vms, sweeps=4):
    """The VM's file and two vCPUs of each of so many VMs, with labels in an order that is not the alphabet's."""
    names = ["web ☃", "db", "pid 7"][:vms]
    x = made.samples([("vm", VM, vms), ("vcpu", VCPU, 2 * vms)], sweeps)
    owners = [names[i % vms] for i in range(3 * vms)]
    x.files = tuple(
        replace(
            info,
            vm=vm,
            vcpu_id=None if info.kind == "vm" else (i - vms) // vms,
            pid=None if vm == "db" else 7,
        )
        for i, (info, vm) in enumerate(zip(x.files, owners, strict=True))
    )
    return x


def rows(x):
    """What the columns of WHOSE have in each row."""
    return [
        (info.host, info.vm, info.pid, -1 if info.vcpu_id is None else info.vcpu_id) for _ in x.time for info in x.files
    ]


def of_pandas(frame):
    """Rows of a pandas frame, whose index may be levels of them; what is null is None."""
    table = frame.reset_index()[WHOSE]
    return [tuple(None if pd.isna(one) else one for one in row) for row in table.itertuples(index=False)]


def of_csv(x, folder):
    """Rows of the CSV of these samples."""
    x.to_csv(folder / "x.csv")
    with (folder / "x.csv").open(newline="", encoding="utf-8") as file:
        table = [[row[name] for name in WHOSE] for row in csv.DictReader(file)]
    return [(host, vm, int(pid) if pid else None, int(vcpu)) for host, vm, pid, vcpu in table]


def of_parquet(x, folder):
    """Rows of the Parquet of these samples, in the order of theirs."""
    table = pq.read_table(*x.to_parquet(folder), partitioning=None)
    table = table.sort_by([("tick", "ascending"), ("file", "ascending")])
    return list(zip(*(table[name].to_pylist() for name in WHOSE), strict=True))


def of_recording(x, folder):
    """Rows of the file of a recording, read without this package."""
    x.save(folder / "run")
    with pa.ipc.open_stream(next((folder / "run").iterdir())) as stream:
        table = stream.read_all()
    return list(zip(*(table[name].to_pylist() for name in WHOSE), strict=True))


def of_recording_by_polars(x, folder):
    """The same."""
    x.save(folder / "run")
    return pl.read_ipc_stream(next((folder / "run").iterdir())).select(WHOSE).rows()


READERS = {
    "arrow": lambda x, _: list(zip(*(x.to_arrow()[name].to_pylist() for name in WHOSE), strict=True)),
    "pandas": lambda x, _: of_pandas(x.to_pandas()),
    "polars": lambda x, _: pl.DataFrame(x).select(WHOSE).rows(),
    "duckdb": lambda x, _: duckdb.from_arrow(x.to_arrow()).order("tick, file").select(*WHOSE).fetchall(),
    "csv": of_csv,
    "parquet": of_parquet,
    "recording": of_recording,
    "recording, polars": of_recording_by_polars,
}


@pytest.mark.parametrize("kind", ["vm", "vcpu"])
@pytest.mark.parametrize("vms", [1, 2, 3])
@pytest.mark.parametrize("reader", params(READERS))
def test_every_row_of_a_table_says_whose_it_is(reader, vms, kind, tmp_path):
    """Host, VM, the VMM's pid and the vCPU, which is -1 for a VM's own file."""
    x = getattr(samples_of(vms), kind)
    assert READERS[reader](x, tmp_path) == rows(x)


@pytest.mark.parametrize(
    "types",
    [
        lambda x: [str(x.to_arrow().schema.field(name).type) for name in WHOSE],
        pytest.param(lambda x: [str(one) for one in pl.DataFrame(x).select(WHOSE).dtypes], marks=needs("polars")),
        lambda x: [*map(str, x.to_pandas().index.dtypes), str(x.to_pandas()["pid"].dtype)],
        lambda x: [x.to_xarray()[name].dtype.kind for name in WHOSE],
        pytest.param(
            lambda x: [str(one) for one in duckdb.from_arrow(x.to_arrow()).select(*WHOSE).types], marks=needs("duckdb")
        ),
    ],
)
def test_columns_have_one_type_however_many_vms_there_are(types):
    """Of either kind, and whether every pid is known or none."""
    known, unknown = (replace(samples_of(1), files=files) for files in (samples_of(1).files, ()))
    unknown.files = tuple(replace(info, pid=None) for info in known.files)
    found = [types(x.vcpu) for x in (known, unknown, samples_of(2), samples_of(3))]
    assert found == found[:1] * 4
    assert types(samples_of(3).vm) == found[0]


@pytest.mark.parametrize("vms", [1, 2, 3])
def test_xarray_has_whose_a_value_is_along_the_files(vms):
    """Coordinates of one kind have plain names; in a Dataset of both each has its dimension in front."""
    x = samples_of(vms)
    for part, kind in ((x.vcpu, "vcpu"), (x.vm, "vm")):
        data = part.to_xarray()
        wanted = [
            (info.host, info.vm, -1 if info.pid is None else info.pid, -1 if info.vcpu_id is None else info.vcpu_id)
            for info in part.files
        ]
        assert list(zip(*(data[name].values.tolist() for name in WHOSE), strict=True)) == wanted
        assert all(data[name].dims == (kind,) for name in WHOSE)
    both = x.to_xarray()
    assert both["vcpu_vm"].values.tolist() == [info.vm for info in x.vcpu.files]
    assert both["vm"].values.tolist() == list(x.vms)
    assert both["vm_pid"].values.tolist() == [-1 if info.pid is None else info.pid for info in x.vm.files]
    assert both["exits"].groupby("vcpu_vm").sum()["vcpu_vm"].values.tolist() == sorted(x.vms)
    assert both["exits"].sel(vcpu=1).values.reshape(len(x), -1).tolist() == x["exits"][:, vms:].tolist()


def test_pandas_unstacks_into_a_column_for_each_vcpu():
    """Whatever is known of pids; no value becomes a float."""
    x = samples_of(3).vcpu
    table = x.to_pandas()["exits"].unstack(["vm", "vcpu"])  # noqa: PD010 - a pivot_table takes means
    assert table.to_numpy().dtype == np.uint64
    assert table.shape == (len(x), 6)
    for column, info in enumerate(x.files):
        assert table[info.vm, info.vcpu_id].tolist() == x["exits"][:, column].tolist()


def can_run(text):
    """Whether all libraries that it names are installed, as where .ci/run runs this file a second time."""
    return all(is_here(name) for name in LARGE if name in text)


# ---- recipes


def recipes(document, start, end):
    """The Python blocks between two lines of a document that name `counts`, what they count."""
    text = (DOCS / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text[text.index(start) : text.index(end)], re.DOTALL)
    return [block for block in blocks if "counts =" in block]


@pytest.fixture
def cleared():
    """Counters of two VMs beyond what a float holds, that are cleared between sweeps and at one; one file fails."""
    x = made.samples([("vcpu", VCPU, 4)], 50, errors=[kf.SampleError(3, 20, OSError(9, "gone"))])
    x.files = tuple(replace(info, vm="web" if i % 2 else "db", vcpu_id=i // 2) for i, info in enumerate(x.files))
    steps = np.random.default_rng(3).integers(0, 1000, (50, 4)).astype(np.uint64)
    exits = x["exits"]
    exits[:] = np.cumsum(steps, axis=0) + np.uint64(2**63)
    exits[30:, 1] -= exits[30, 1]
    exits[40:, 1] -= exits[39, 1]
    exits[25:, 2] -= np.uint64(2**63 - 7)
    exits[20:, 3] = 0
    return x


def counted(result, name="exits"):
    """What a recipe found, {(host, vm, vcpu): count}."""
    if isinstance(result, pd.Series):
        return {key: int(value) for key, value in result.items()}
    return {(row["host"], row["vm"], row["vcpu"]): int(row[name]) for row in rows_of(result)}


def rows_of(result):
    """Rows of what duckdb or polars found, each a dict."""
    if hasattr(result, "fetchall"):
        return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]
    return result.rows(named=True)


ANALYSIS = recipes("analysis.md", "## Other libraries", "## Plots")


@pytest.mark.parametrize("recipe", params(ANALYSIS))
def test_recipes_count_what_was_counted(cleared, recipe):
    """With several VMs and after counters were cleared: what `total` says, to the last one."""
    names = {"x": cleared, "duckdb": duckdb, "polars": pl, "pandas": pd}
    exec(recipe, names)
    wanted = {
        (one.host, one.vm, one.vcpu_id): total for one, total in zip(cleared.files, cleared.total("exits"), strict=True)
    }
    assert counted(names["counts"]) == wanted


PARQUET = recipes("recording.md", "## Parquet and CSV", "## Perfetto")


def test_there_is_a_recipe_for_each_reader_of_parquet():
    """DuckDB and Polars over changes, and DuckDB over raw values."""
    assert ["duckdb" in one for one in PARQUET] == [True, False, True]


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        pytest.param(
            recipe,
            ("host", "vm", *(["pid"] if "pid" in recipe else []), "vcpu_id"),
            marks=needs(recipe),
        )
        for recipe in PARQUET
    ],
)
def test_recipes_for_parquet_count_what_was_counted(recipe, keys, cleared, tmp_path, monkeypatch):
    """Over two recordings, and a VM that was started again in another process between them."""
    files = tuple(replace(one, pid=8) for one in cleared.files)
    again = replace(cleared[:20], files=files, time=cleared.time[:20] + 10**15)
    for x in (cleared, again):
        x.to_parquet(tmp_path / "dataset")
        x.to_parquet(tmp_path / "changes", values="delta")
    monkeypatch.chdir(tmp_path)
    names = {"duckdb": duckdb, "polars": pl}
    exec(recipe, names)
    wanted = dict.fromkeys([tuple(getattr(one, key) for key in keys) for one in (*cleared.files, *again.files)], 0)
    for x in (cleared, again):
        for one, total in zip(x.files, x.total("exits"), strict=True):
            wanted[tuple(getattr(one, key) for key in keys)] += int(total)
    found = [tuple(row.values()) for row in rows_of(names["counts"])]
    assert {row[: len(keys)]: int(row[-1]) for row in found} == wanted


# ---- real VMs


@pytest.fixture
def plots():
    """No figure outlives its test."""
    yield plot
    plt.close("all")


@pytest.mark.real_vm
@pytest.mark.parametrize("vms", [2, 3])
def test_real_vms_are_told_apart_everywhere(vms, resources, tmp_path, plots):
    """VMs of other processes, each with work of its own: what every table counts is what each guest did."""
    holders = [resources.enter_context(Holder()) for _ in range(vms)]
    machines = [resources.enter_context(kf.attach(holder.pid)) for holder in holders]
    sampler = kf.Sampler(machines)
    parts = [sampler.run(0, count=1)]
    for i, holder in enumerate(holders):
        for vcpu in range(2):
            holder.do(f"guest.run({100 * (i + 1) + 1000 * vcpu}, {vcpu})")
            parts.append(sampler.run(0, count=1))
    x = kf.Samples.concatenate(parts)
    labels = [f"pid {holder.pid}" for holder in holders]
    assert x.vms == tuple(labels)
    v = x.vcpu
    for column, info in enumerate(v.files):
        change = {stat: int(v.total(stat)[column]) for stat in v.names if not v.stat(stat).shape}
        assert counts_right(change, 100 * (labels.index(info.vm) + 1) + 1000 * info.vcpu_id)
    name = exit_counter()
    made_exits = {(one.vm, one.vcpu_id): n for one, n in zip(v.files, v.total(name).tolist(), strict=True)}
    assert list(made_exits) == list(itertools.product(labels, range(2)))
    for recipe in filter(can_run, ANALYSIS):
        names = {"x": x, "duckdb": duckdb, "polars": pl, "pandas": pd}
        exec(recipe.replace("exits", name), names)
        assert {key[1:]: count for key, count in counted(names["counts"], name).items()} == made_exits
    for path in (tmp_path / "run", tmp_path / "run.npz"):
        x.save(path)
        loaded = kf.Samples.load(path)
        made.assert_same(loaded, x)
        made.assert_same(loaded.select(name, vm=labels[-1]), x.select(name, vm=labels[-1]))
    rates = x.figures(by="vm")[f"{name}/s"]
    data = v.to_xarray()[name]
    change = (data.isel(time=-1) - data.isel(time=0)).groupby("vm").sum()
    by_vm = {label: made_exits[label, 0] + made_exits[label, 1] for label in labels}
    assert {label: int(part.total(name).sum()) for label, part in v.by_vm().items()} == by_vm
    assert x.select(name, vm=labels[1], vcpu=0).total(name).tolist() == [made_exits[labels[1], 0]]
    by_sweep = v.select(name).between(0, x.elapsed + 1).resample(1e-9)
    np.testing.assert_allclose(by_sweep.mean_rate(name) * x.elapsed, [*made_exits.values()])
    assert dict(zip(change["vm"].values.tolist(), change.values.tolist(), strict=True)) == by_vm
    assert rates.labels == tuple(labels)
    np.testing.assert_allclose(rates.values * x.elapsed, list(by_vm.values()))
    imbalance = x.figures()["exits_imbalance"]
    assert imbalance.vms == tuple(labels)
    by_vcpu = v.total("exits").reshape(vms, 2)
    np.testing.assert_allclose(imbalance.values, by_vcpu.max(axis=1) / by_vcpu.mean(axis=1) - 1)
    names = [f"{label}/{vcpu}" for label, vcpu in made_exits]
    assert [text.get_text() for text in plots.heatmap(v, name).get_yticklabels()] == names
    assert [text.get_text() for text in plots.rates(v, name).get_legend().get_texts()] == names
    one = x.select(name, vm=labels[1], vcpu=1)
    assert [text.get_text() for text in plots.rates(one, name).get_legend().get_texts()] == [f"{labels[1]}/1"]


@pytest.mark.real_vm
def test_a_mapping_takes_virtual_machines(resources):
    """A label joins all files of one, alone or in a list; its pid stays what it was."""
    holders = [resources.enter_context(Holder()) for _ in range(2)]
    one, other = (resources.enter_context(kf.attach(holder.pid)) for holder in holders)
    x = kf.Sampler({"web": one, "db": [other]}).run(0, count=2)
    assert x.vms == ("web", "db")
    assert [(str(info), info.pid) for info in x.vcpu.files] == [
        *((f"web/{vcpu}", one.pid) for vcpu in range(2)),
        *((f"db/{vcpu}", other.pid) for vcpu in range(2)),
    ]


@needs_qemu
@pytest.mark.real_vm
def test_guests_of_the_same_name_are_told_apart_by_the_pids_of_their_vmms(resources, tmp_path, plots):
    """Two QEMUs, whose ids name a thread for each vCPU: all files of one have one label, in every table, too."""
    machines = []
    for _ in range(2):
        command, _ = arguments(tmp_path, "-name", "guest=web,,1", vcpus=2)
        machine = resources.enter_context(kf.launch(command, vcpus=2))
        resources.callback(machine.process.wait)
        resources.callback(machine.process.kill)
        machines.append(machine)
    x = kf.Sampler(machines).run(0, count=2)
    assert x.vms == tuple(f"web,1 (pid {machine.pid})" for machine in machines)
    assert [info.vcpu_id for info in x.files] == [None, 0, 1] * 2
    for kind in ("vm", "vcpu"):
        part = x.select(kind=kind)
        for name in filter(can_run, READERS):
            (tmp_path / kind / name).mkdir(parents=True)
            assert READERS[name](part, tmp_path / kind / name) == rows(part)
    assert x.to_xarray()["vcpu_vm"].values.tolist() == [vm for vm in x.vms for _ in range(2)]
    names = [f"{vm}/{vcpu}" for vm in x.vms for vcpu in range(2)]
    assert [text.get_text() for text in plots.heatmap(x.vcpu, "exits").get_yticklabels()] == names
    assert x.figures(by="vm")["exits/s"].labels == x.figures()["exits_imbalance"].vms == x.vms
    alone = kf.Sampler(machines[0])
    assert {(info.vm, info.name, info.pid) for info in alone.files} == {("web,1", "web,1", machines[0].pid)}


@pytest.mark.real_vm
def test_two_vms_of_one_process_are_not_taken_for_one(resources):
    """Their files have the same ids: nothing is joined, and no two rows of a sweep have the same VM and vCPU."""
    holder = resources.enter_context(Holder(before="second = TinyGuest(2); files += second.open_stats()"))
    machine = resources.enter_context(kf.attach(holder.pid))
    x = kf.Sampler(machine).run(0, count=2)
    assert len({(one.vm, one.vcpu_id) for one in x.vcpu.files}) == 4
    assert all(one.vm == f"pid {holder.pid} (file {i})" for i, one in enumerate(x.files))


@pytest.mark.real_vm
def test_totals_are_what_guests_did_whatever_happened_to_them(resources, tmp_path):
    """A vCPU is plugged in, the VM dies and is made anew in its process, then again in another one; a neighbour dies.

    A rotated recording of all that, a data set of it, and the sum of its changes have each exit once.
    """
    # What PVM counts in `exits` may count an exit twice; this is once for each KVM_RUN.
    name = exit_counter() if exit_counter() == "io_exits" else "fpu_reload"
    web, db = f"web-{os.getpid()}", f"db-{os.getpid()}"
    vmms = {label: resources.enter_context(Holder(1, name=label)) for label in (web, db)}
    did = dict.fromkeys((f"{web}/0", f"{web}/1", f"{db}/0"), 0)
    recorder = resources.enter_context(kf.Recorder(tmp_path / "rec", rotate_bytes=1, flush_seconds=0))
    chunks = resources.enter_context(kf.follow([web, db], interval=0.001, stats=name, rescan=0.05))

    def read_until(condition):
        with watchdog(60):
            for x in chunks:
                recorder.write(x)
                if condition(x):
                    return

    def do(exits, *vcpus):
        """Have these vCPUs, and no others, sampled; let them run in between."""
        read_until(lambda x: {str(info) for info in x.files} == {*vcpus} and not x.errors)
        for vcpu in vcpus:
            vmms[vcpu[:-2]].do(f"guest.run({exits}, {vcpu[-1]})")
            did[vcpu] += exits
            exits += 1
        now = time.monotonic_ns()
        read_until(lambda x: x.time[-1] > now)

    do(100, f"{web}/0", f"{db}/0")
    vmms[web].do("guest.add_vcpu(); files.append(stats_of(guest.vcpu_fds[1]))")
    do(200, f"{web}/0", f"{web}/1", f"{db}/0")
    vmms[web].do("[file.close() for file in files]; guest.close(); guest = TinyGuest(1); files = guest.open_stats()")
    do(300, f"{web}/0", f"{db}/0")
    vmms[db].end()
    do(400, f"{web}/0")
    vmms[web].end()
    vmms[web] = resources.enter_context(Holder(2, name=web))
    do(500, f"{web}/0", f"{web}/1")
    chunks.stop()
    for x in chunks:
        recorder.write(x)
    recorder.close()
    r = kf.open_recordings(tmp_path / "rec").select(kind="vcpu")
    assert len(r) >= 5
    assert len(list((tmp_path / "rec").iterdir())) > len(r)  # it was rotated
    assert r.total(name, by="vcpu") == did
    r.to_parquet(tmp_path / "set")
    assert kf.open_recordings(tmp_path / "set").total(name, by="vcpu") == did
    r.to_parquet(tmp_path / "changes", values="delta")
    v = pd.read_parquet(tmp_path / "changes" / "vcpu").astype({"vm": str}).groupby(["vm", "vcpu"])[name].sum()
    assert {f"{vm}/{vcpu}": total for (vm, vcpu), total in v.items()} == did
