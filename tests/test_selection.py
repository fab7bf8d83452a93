"""Which statistics of which files: what is selected is what the whole has, and everything else works on it."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pandas as pd
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

import kvmstats_fast as kf

STATS = ("exits", "io_exits", "halt_wait_ns", "halt_wait_hist")
COUNTER = kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
NS = replace(COUNTER, name="halt_wait_ns", unit=kf.StatUnit.SECONDS, exponent=-9)
HIST = replace(NS, name="halt_wait_hist", type=kf.StatType.LOG_HIST, size=4)
KERNELS = [
    ("vcpu", (COUNTER, replace(COUNTER, name="io_exits"), NS, HIST)),
    ("vcpu", (HIST, COUNTER, NS)),
    ("vm", (replace(COUNTER, name="pages_4k"), replace(COUNTER, name="halts"))),
]


def samples_of(owners, sweeps=6, storage="block", failed=()):
    """Samples of files, [(kernel, VM, number of the vCPU)], every value another."""
    kernels = dict.fromkeys(kernel for kernel, *_ in owners)
    random = np.random.default_rng(len(owners))
    groups = []
    for kernel in kernels:
        kind, stats = KERNELS[kernel]
        columns = [i for i, (one, *_) in enumerate(owners) if one == kernel]
        shape = (sweeps, len(columns))
        values = {one.name: random.integers(0, 2**50, (*shape, *one.shape), np.uint64) for one in stats}
        for file, sweep in failed:
            for column in values.values():
                column[sweep:, [i for i, index in enumerate(columns) if index == file]] = 0
        groups.append(made.group_of(stats, columns, values, kind, storage))
    x = made.run_of(*groups, failed=failed, interval=1.0, wall_offset=10**18)
    x.files = tuple(
        replace(info, id=f"file {i}", vm=vm, vcpu_id=vcpu if info.kind == "vcpu" else None, pid=None)
        for i, (info, (_, vm, vcpu)) in enumerate(zip(x.files, owners, strict=True))
    )
    return x


WEB = ("web", "web-2", "w*", "db")
OWNERS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(WEB), st.integers(0, 3)), min_size=1, max_size=9, unique=True
)


@examples(150)
@given(
    OWNERS,
    st.sampled_from(["block", "columns"]),
    st.sets(st.sampled_from([*STATS, "pages_4k", "halts", "halt_*", "*"])),
    st.tuples(
        st.none() | st.sets(st.sampled_from([*WEB, "web*", "?b"]), min_size=1),
        st.none() | st.sets(st.integers(0, 3), min_size=1),
        st.sampled_from([None, "vm", "vcpu"]),
    ),
    st.integers(0, 5),
)
def test_what_is_selected_is_what_each_file_has_of_it(owners, storage, names, whose, fails):
    """Whatever the mix of VMs, kinds and kernels; a name or condition that nothing fulfils is a KeyError."""
    vms, vcpus, kind = whose
    x = samples_of(owners, storage=storage, failed=[(len(owners) - 1, fails)])
    fits = {"web*": {"web", "web-2"}, "?b": {"db"}} | {vm: {vm} for vm in WEB}
    if "w*" not in x.vms:
        fits["w*"] = fits["web*"]
    labels = None if vms is None else set().union(*(fits[one] for one in vms))
    chosen = [
        (i, info)
        for i, info in enumerate(x.files)
        if (labels is None or info.vm in labels)
        and (vcpus is None or info.vcpu_id in vcpus)
        and kind in (None, info.kind)
    ]
    globs = {"halt_*": {"halt_wait_ns", "halt_wait_hist"}, "*": {*STATS, "pages_4k", "halts"}}
    has = [{stat.name for stat in KERNELS[kernel][1]} for kernel, *_ in owners]
    wanted = set().union(*(globs.get(one, {one}) for one in names)) if names else globs["*"]
    there = set().union(*(has[i] for i, _ in chosen))
    missing = [one for one in vms or () if not fits[one] & set(x.vms)]
    missing += [one for one in vcpus or () if one not in {info.vcpu_id for info in x.files}]
    missing += [one for one in names if not globs.get(one, {one}) & there]
    if missing or not chosen:
        with pytest.raises(KeyError):
            x.select(*names, vm=vms, vcpu=vcpus, kind=kind)
        return
    y = x.select(*names, vm=vms, vcpu=vcpus, kind=kind)
    kept = [(i, info) for i, info in chosen if has[i] & wanted]
    assert y.files == tuple(info for _, info in kept)
    assert {(y.files[one.file], one.sweep) for one in y.errors} == {(x.files[i], fails) for i, _ in kept[-1:]} & {
        (x.files[-1], fails)
    }
    assert set(y.names) == there & wanted
    for part in y.split():
        kernel = owners[x.files.index(part.files[0])][0]
        assert part.names == tuple(stat.name for stat in KERNELS[kernel][1] if stat.name in wanted)
    for part, whole in ((y.vm, x.vm), (y.vcpu, x.vcpu)):
        for name in part.names:
            columns = [i for i, info in enumerate(whole.columns(name)) if info in y.files]
            assert part.columns(name) == tuple(whole.columns(name)[i] for i in columns)
            np.testing.assert_array_equal(part[name], whole[name][:, columns])
            np.testing.assert_array_equal(part.delta(name), whole.delta(name)[:, columns])
    for name in ("time", "tick", "sweep_ns"):
        assert getattr(y, name) is getattr(x, name)


def hosts(vms, vcpus):
    """The owners of VMs with so many vCPUs each, in the order in which a Sampler is given them."""
    return [(kernel, f"vm-{vm}", i) for vm in range(vms) for kernel, i in ((2, 0), *((0, i) for i in range(vcpus)))]


@pytest.mark.parametrize("storage", ["block", "columns"])
def test_what_is_selected_is_a_view_where_files_are_evenly_spaced(storage):
    """One VM's vCPUs, the same vCPU of each VM, every statistic; any other files are copied, without the rest."""
    x = samples_of(hosts(4, 5), storage=storage)
    exits = x["exits"]
    for one in (
        x.select("exits"),
        x.select("exits", "halt_*", vm="vm-2"),
        x.select(vm=["vm-0", "vm-3"], vcpu=3),
        x.select(vcpu=2),
        x.select(vcpu=[1, 3], vm="vm-1"),
        x.select(kind="vcpu"),
        x.by_vm()["vm-3"],
        x.select("e*").select(vm="vm-2").select(vcpu=4)[1:3],
    ):
        assert np.shares_memory(one["exits"], exits)
    few = x.select("exits", vm=["vm-0", "vm-2", "vm-3"])
    assert few["exits"].shape == (6, 15)
    assert few["exits"].base is None or few["exits"].base.nbytes == few["exits"].nbytes


def test_each_vm_by_itself_is_all_there_is():
    """by_vm has every file once, under its label, in the order of vms."""
    x = samples_of(hosts(3, 2)[::-1])
    parts = x.by_vm()
    assert tuple(parts) == x.vms == ("vm-2", "vm-1", "vm-0")
    for vm, part in parts.items():
        assert part.vms == (vm,)
        made.assert_same(part, x.select(vm=vm))
    assert sorted(id(info) for part in parts.values() for info in part.files) == sorted(map(id, x.files))


@pytest.mark.parametrize("storage", ["block", "columns"])
def test_what_is_selected_can_be_saved_joined_and_tabled(storage, tmp_path):
    """Parts that were selected join to what is selected of the whole; files give it back; tables have it alone."""
    x = samples_of(hosts(3, 4), storage=storage, failed=[(7, 3)])
    y = x.select("exits", "halt_*", vm=["vm-0", "vm-1"], vcpu=[1, 2, 3])
    assert [error.file for error in y.errors] == [3]
    parts = [part.select("exits", "halt_*", vm=["vm-0", "vm-1"], vcpu=[1, 2, 3]) for part in (x[:2], x[2:5], x[5:])]
    made.assert_same(kf.Samples.concatenate(parts), y)
    for name in ("run", "run.npz"):
        y.save(tmp_path / name)
        made.assert_same(kf.Samples.load(tmp_path / name), y)
    with kf.Recorder(tmp_path / "recorded") as recorder:
        for part in parts:
            recorder.write(part)
    made.assert_same(kf.Samples.load(tmp_path / "recorded"), y)
    frame = y.to_pandas()
    whole = x.vcpu.to_pandas()[frame.columns]
    index = whole.index
    rows = index.get_level_values("vm").isin(["vm-0", "vm-1"]) & index.get_level_values("vcpu").isin([1, 2, 3])
    pd.testing.assert_frame_equal(frame, whole[rows])
    assert y.to_arrow().column_names[-3:] == ["exits", "halt_wait_ns", "halt_wait_hist"]
    assert y.to_xarray()["exits"].shape == (6, 6)
    whole, part = x.figures()["exits/s"], y.figures()["exits/s"]
    assert part.files == y.files
    assert part.values.tolist() == [whole.values[whole.files.index(info)] for info in y.files]


def test_the_recipes_of_the_guide_give_what_they_say():
    """Those of docs/analysis.md about VMs, times and histograms, on two VMs."""
    text = (Path(__file__).parents[1] / "docs" / "analysis.md").read_text(encoding="utf-8")
    part = text[text.index("## Selecting VMs, statistics and times") : text.index("## Derived figures")]
    x = samples_of([(kernel, vm, vcpu) for vm in ("web", "db") for kernel, vcpu in ((2, 0), (0, 0), (0, 1))], 20)
    x.wall_offset = 1795788000 * 10**9  # 14:00
    names = {"x": x}
    for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL):
        exec(block, names)
    assert [str(info) for info in names["web"].files] == ["web/0"]
    assert names["web"].names == ("exits", "halt_wait_ns", "halt_wait_hist")
    assert len(names["later"]) == 20
    assert list(names["totals"]) == list(names["p99"]) == ["web", "db"]
    assert names["totals"]["db"] == x.total("exits")[2:].sum()
    assert len(names["seconds"]) == 20


def test_a_copy_of_what_is_selected_takes_no_room_for_the_rest():
    """Neither joined nor kept by a Recorder does one statistic of many bring the others along."""
    stats = [replace(COUNTER, name=f"n{i}") for i in range(100)]
    x = made.run_of(made.group_of(stats, range(8), {"n0": np.arange(80).reshape(10, 8)}))
    joined = kf.Samples.concatenate([x[:5].select("n7", "n0"), x[5:].select("n7", "n0")])
    assert joined["n0"].tolist() == x["n0"].tolist()
    assert sum(array.nbytes for array in joined.groups[0].arrays) == 8 * 80 * 2


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_same_statistics_of_a_wide_and_a_narrow_run_can_be_joined(order):
    """Where they lie in memory does not matter, as long as they are the same of the same files."""
    names = ("exits", "halt_wait_ns", "halt_wait_hist")
    wide = samples_of(hosts(1, 3)).select(*names, kind="vcpu")
    (group,) = wide.groups
    stats = [stat for stat, _ in group.places.values()]
    starts = itertools.accumulate((stat.size for stat in stats), initial=0)
    narrow = replace(
        group,
        places={stat.name: (stat, start) for stat, start in zip(stats, starts, strict=False)},
        values=np.concatenate([wide[stat.name].reshape(6, 3, stat.size) for stat in stats], axis=2),
    )
    columns = group.with_arrays([group.view(name) for name in group.places], group.columns)
    assert group.is_dense
    assert narrow.is_dense
    groups = [(group,), (narrow,), (columns,)]
    parts = [replace(wide, groups=groups[one], time=wide.time + place * 10**11) for place, one in enumerate(order)]
    for joined in (parts, parts[:2], parts[1:]):
        whole = kf.Samples.concatenate(joined)
        for name in names:
            assert whole[name].tolist() == [*wide[name].tolist()] * len(joined)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": ["exit"]}, KeyError, "no statistic 'exit' in these samples; did you mean exits"),
        ({"names": ["exits"], "kind": "vm"}, KeyError, "no statistic 'exits' in these samples"),
        ({"vm": "vm-7"}, KeyError, "no VM 'vm-7' in these samples; did you mean vm-2, vm-1"),
        ({"vm": ["vm-1", "x*"]}, KeyError, r"no VM 'x\*' in these samples; none of the 3"),
        ({"vcpu": [0, 4]}, KeyError, "no vCPU 4 in these samples; the numbers of vCPUs there are from 0 to 3"),
        ({"host": "there"}, KeyError, "no host 'there' in these samples; did you mean here"),
        ({"vcpu": 1, "kind": "vm"}, KeyError, r"no file in these samples fulfils all of these: vcpu \(1,\), kind 'vm'"),
        ({"vm": []}, KeyError, r"no file in these samples fulfils all of these: vm \(\)"),
        ({"kind": "cpu"}, ValueError, "kind is 'cpu'; it must be 'vm' or 'vcpu'"),
        ({"vcpu": -1}, ValueError, "vcpu is -1; it must be at least 0"),
        ({"vcpu": "0"}, TypeError, "vcpu is a str; it must be a whole number"),
        ({"vcpu": 0.0}, TypeError, "vcpu is a float; it must be a whole number"),
        ({"vm": 3}, TypeError, "vm is an int; it must be a name or glob, or several"),
        ({"names": [3]}, TypeError, "names has an int; it must be a name or glob"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(arguments, error, message):
    """A condition that no file fulfils, alone or with the others, and arguments of a wrong type."""
    x = samples_of(hosts(3, 4))
    with pytest.raises(error, match=message):
        x.select(*arguments.pop("names", ()), **arguments)


def test_a_number_of_numpys_and_a_label_that_looks_like_a_glob_are_taken_as_they_are():
    """Numbers come from arrays; and a VM may be called w*."""
    x = samples_of([(0, "w*", 0), (0, "web", 1)])
    assert [str(info) for info in x.select(vcpu=np.arange(2)).files] == ["w*/0", "web/1"]
    assert [str(info) for info in x.select(vcpu=np.int64(1), host="h*").files] == ["web/1"]
    assert x.select(vm="w*").vms == ("w*",)
    assert x.select(vm="w?*").vms == ("w*", "web")
