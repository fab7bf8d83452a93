"""Many recordings at once: answers are those of numpy over all sweeps in memory, wherever the sweeps lie."""

import copy
import gc
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import hypothesis
import made
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import examples, open_fds
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.file_info import group_files
from kvmstats_fast.formats import parquet, recordings

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
EPOCH = 1790000000 * 10**9
NAMES = ["exits", "halt_wait_ns", "halt_wait_hist", "blocking"]


def run_of(host="a", start=0, sweeps=12, *, seed=0, vms=("web", "db"), pid=1, **about):
    """The samples of a host, of each VM and its two vCPUs: what is counted grows, but for a reset."""
    rng = np.random.default_rng(seed)
    x = made.samples([("vm", VM, len(vms)), ("vcpu", VCPU, 2 * len(vms))], sweeps, host=host, **about)
    x.time[:] = (start + np.arange(sweeps)) * 10**9 + 5
    x.tick[:] = np.arange(sweeps)
    x.wall_offset, x.interval, x.missed = EPOCH, 1.0, 0
    for group in x.groups:
        group.values[:] = np.cumsum(rng.integers(0, 1000, group.values.shape), axis=0).astype(np.uint64) + np.uint64(
            2**40
        )
        group.values[sweeps // 2 :, 0] -= group.values[sweeps // 2, 0]
    for error in x.errors:
        for group in x.groups:
            if error.file in group.columns:
                group.values[error.sweep :, group.columns.tolist().index(error.file)] = 0
    files = [kf.FileInfo(f"kvm-{pid}", "vm", None, pid + i, vm, vm, host) for i, vm in enumerate(vms)]
    files += [
        kf.FileInfo(f"kvm-{pid}/vcpu-{vcpu}", "vcpu", vcpu, pid + i, vm, vm, host)
        for i, vm in enumerate(vms)
        for vcpu in range(2)
    ]
    x.files = tuple(files)
    return x


def record(path, runs, size=4, **options):
    """Record runs, some sweeps at a time."""
    with kf.Recorder(path, flush_seconds=0, **options) as recorder:
        for x in runs:
            for start in range(0, len(x), size):
                recorder.write(x[start : start + size])


def added_up(runs, values, by):
    """What files have, added up over runs: `values` gives it of a run and the files it is of."""
    sums = {}
    for x in runs:
        found, files = values(x)
        for label, rows in (group_files(files, by) if by else {"": range(len(files))}).items():
            sums[label] = sums.get(label, 0) + sum(found[row] for row in rows)
    return sums if by else sums[""]


def as_whole(x):
    """Samples without what no answer depends on: views of them have different strides and counts of missed ticks."""
    return replace(x, missed=0, overruns=0)


RUNS = st.fixed_dictionaries(
    {
        "failures": st.dictionaries(st.integers(0, 5), st.integers(0, 12), max_size=3),
        "size": st.integers(1, 12),
        "rotate": st.booleans(),
        "clock": st.dictionaries(st.integers(1, 11), st.sampled_from([10**9, 5 * 10**9, 5]), max_size=2),
    }
)


@pytest.fixture(params=["recording", "parquet"], scope="module")
def form(request):
    """What is opened."""
    return request.param


def opened(root, form, runs, size=4, **options):
    """Recordings of runs, each in one of its own."""
    for number, x in enumerate(runs):
        record(root / "rec" / f"{number}", [x], size, **options)
    if form == "recording":
        return kf.open_recordings(root / "rec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_GROUP_BYTES", size * 8 * 4 * VCPU.num_values)
        kf.open_recordings(root / "rec").to_parquet(root / "set")
    return kf.open_recordings(root / "set")


@hypothesis.given(ask=RUNS)
@hypothesis.settings(examples(8), suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_all_sweeps_in_memory(form, ask, tmp_path_factory):
    """Through resets, failures, parts and steps of the wall clock; of runs of two hosts, one of them rebooted."""
    errors = [kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in ask["failures"].items()]
    steps = tuple((sweep, EPOCH + offset) for sweep, offset in sorted(ask["clock"].items()))
    runs = [
        replace(run_of("a", errors=errors), wall_steps=steps),
        run_of("b", seed=1, vms=("mail",)),
        run_of("a", 100, seed=2, pid=9),
    ]
    rotate = {"rotate_bytes": 1} if ask["rotate"] else {}
    r = opened(tmp_path_factory.mktemp("root"), form, runs, ask["size"], **rotate)
    assert (r.hosts, r.vms, set(r.names)) == (("a", "b"), ("web", "db", "mail"), {*VM, *VCPU})
    for by in ("vm", "host", "vcpu", None):
        for name in NAMES:
            wanted = added_up(runs, lambda x, name=name: (x.total(name), x.columns(name)), by)
            found = r.total(name, by)
            for label, total in wanted.items() if by else {"": wanted}.items():
                assert np.array_equal(found[label] if by else found, total)
        wanted = added_up(runs, lambda x: (x.histogram("halt_wait_hist").counts, x.columns("halt_wait_hist")), by)
        sums = added_up(runs, lambda x: (x.total("halt_wait_ns"), x.columns("halt_wait_ns")), by)
        found = r.histogram("halt_wait_hist", by)
        for label, counts in wanted.items() if by else {"": wanted}.items():
            one = found[label] if by else found
            assert one.counts.tolist() == counts.tolist()
            assert one.raw_total == (sums[label] if by else sums)
    for host in ("a", "b"):
        of_host = r.select(host=host, kind="vcpu")
        assert of_host.total("exits", by=None) == r.total("exits", by="host")[host]


@pytest.mark.parametrize("by", ["vm", "host", "vcpu"])
def test_figures_and_rates_of_one_run_are_those_of_its_samples(form, by, tmp_path):
    """Every figure, every rate; a file that failed is rated until then."""
    x = run_of(errors=[kf.SampleError(3, 7, OSError(9, "gone"))])
    r = opened(tmp_path, form, [x])
    found, wanted = r.figures(by), x.figures(by)
    assert list(found) == list(wanted)
    for name, figure in wanted.items():
        assert found[name].labels == figure.labels
        assert np.allclose(found[name].values, figure.values, equal_nan=True), name
        assert found[name].formula == figure.formula
    if by == "vcpu":
        for name in ("exits", "halt_wait_ns", "halt_wait_hist"):
            rates = dict(zip(map(str, x.columns(name)), x.mean_rate(name), strict=True))
            for label, rate in r.mean_rate(name, by).items():
                assert np.allclose(rate, rates[label], equal_nan=True)


def test_rates_are_by_the_time_that_anything_of_it_was_sampled(tmp_path):
    """A VM that was started again, and one whose host was recorded twice at once: time counts once, gaps do not."""
    lives = [run_of(start=0, vms=("web",)), run_of(start=100, vms=("web",), pid=7, seed=1)]
    beside = run_of(start=106, vms=("db",), pid=20, seed=2)
    for number, x in enumerate([*lives, beside]):
        record(tmp_path / f"{number}", [x])
    r = kf.open_recordings(tmp_path)
    exits = [int(x.total("exits").sum()) for x in (*lives, beside)]
    assert r.mean_rate("exits") == pytest.approx({"web": (exits[0] + exits[1]) / 22, "db": exits[2] / 11})
    assert r.mean_rate("exits", by="host") == pytest.approx({"a": sum(exits) / (11 + 17)})
    assert r.mean_rate("exits", by=None) == pytest.approx(sum(exits) / 28)
    assert r.figures("vm")["exits/s"].values == pytest.approx([(exits[0] + exits[1]) / 22, exits[2] / 11])
    assert r.figures("host")["exits/s"].values == pytest.approx(sum(exits) / 28)
    first = (int(x.total("exits")[0]) for x in lives)
    assert r.figures("vcpu")["exits/s"].values[0] == pytest.approx(sum(first) / 22)


@pytest.mark.parametrize("way", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy])
def test_recordings_go_to_another_process_as_they_are(form, way, tmp_path):
    """With what was selected: a worker of dask or multiprocessing answers the same."""
    run = run_of()
    r = opened(tmp_path, form, [run]).select("exits", vm="web").between(1, 8)
    other = way(r)
    assert repr(other) == repr(r)
    assert other.total("exits", "vcpu") == r.total("exits", "vcpu")
    if form == "recording":
        made.assert_same(way(kf.Recording(tmp_path / "rec" / "0")).load(), run)


def test_what_two_runs_sampled_of_a_file_at_one_time_is_refused(form, tmp_path):
    """It would count twice, and its rate be twice what it was: of two recorders the error says to take one."""
    first, second = run_of(start=0), run_of(start=11)
    third = run_of(start=5, seed=3).select("exits", vm="db")
    one = opened(tmp_path / "one", form, [first, second])
    assert one.total("exits", by=None) == first.total("exits").sum() + second.total("exits").sum()
    r = opened(tmp_path / "two", form, [first, second, third])
    for ask in (lambda r: r.total("exits"), lambda r: r.mean_rate("exits", by="host"), lambda r: r.figures()):
        with pytest.raises(kf.KvmStatsError, match=r"exits of db/[01] was sampled by two runs at the same time"):
            ask(r)
        ask(r.select(vm="web"))
    assert r.total("halt_wait_ns") == one.total("halt_wait_ns")
    assert sum(len(x) for x in r) >= len(first) + len(second) + len(third)


def test_what_counts_twice_is_found_whatever_was_sampled_in_between(tmp_path):
    """A long run goes on behind a short one of another statistic, and meets one of its own."""
    long, other, own = run_of(sweeps=40), run_of(start=10, sweeps=4), run_of(start=20, sweeps=4)
    for number, x in enumerate([long.select("exits"), other.select("halt_wait_ns"), own.select("exits")]):
        record(tmp_path / f"{number}", [x])
    with pytest.raises(kf.KvmStatsError, match=r"exits of \w+/[01] was sampled by two runs at the same time"):
        kf.open_recordings(tmp_path).figures()


@pytest.mark.parametrize("ns", [{"wall_offset": EPOCH - 5 * 10**9}, {"wall_offset": EPOCH + 10**12, "start": 5}])
def test_a_clock_that_begins_anew_is_no_second_run_at_the_same_time(ns, tmp_path):
    """Where the wall clock was set back, or the host booted, only one of the two clocks has them overlap."""
    first, second = run_of(start=0), run_of(start=ns.get("start", 11))
    second.wall_offset = ns["wall_offset"]
    for number, x in enumerate((first, second)):
        record(tmp_path / f"{number}", [x])
    r = kf.open_recordings(tmp_path)
    assert r.total("exits", by=None) == first.total("exits").sum() + second.total("exits").sum()


@pytest.mark.filterwarnings("ignore:.*resets")
def test_a_run_is_one_run_to_compare_however_many_pieces_it_is_read_in(form, tmp_path, monkeypatch):
    """Pieces are no runs: intervals from them would be too narrow. Kinds that a data set keeps apart are one run."""
    monkeypatch.setattr(recordings, "_STEP_BYTES", 1)
    sides = [[run_of(start=100 * n, sweeps=40, seed=n + 10 * side) for n in range(2)] for side in range(2)]
    opened_sides = [opened(tmp_path / str(side), form, runs) for side, runs in enumerate(sides)]
    assert len(list(opened_sides[0])) > 2
    for read, runs in zip(opened_sides, sides, strict=True):
        assert [len(x) for x in read.runs()] == [40, 40]
        for x, whole in zip(read.runs(), runs, strict=True):
            assert {info.id for info in x.files} == {info.id for info in whole.files}
            assert x.total("exits").sum() == whole.total("exits").sum()
    read, whole = kf.compare(*opened_sides), kf.compare(*sides)
    assert read.runs == whole.runs == (2, 2)
    assert read.to_dict().keys() == whole.to_dict().keys()
    for name, change in whole.items():
        np.testing.assert_allclose(read[name].high, change.high, err_msg=name)


def test_a_run_of_another_run_s_recording_is_apart_from_it(form, tmp_path):
    """VMs that come and go while one recorder writes: what happened between two runs is in neither."""
    runs = [run_of(vms=("web",)), run_of(start=50, seed=1), run_of(start=90, vms=("db",), pid=5, seed=2)]
    record(tmp_path / "rec", runs)
    r = kf.open_recordings(tmp_path / "rec")
    if form == "parquet":
        paths = r.to_parquet(tmp_path / "set")
        assert paths == kf.to_parquet(tmp_path / "rec", tmp_path / "set", overwrite=True)
        r = kf.open_recordings(tmp_path / "set")
    wanted = added_up(runs, lambda x: (x.total("exits").tolist(), x.columns("exits")), "vcpu")
    assert r.total("exits", by="vcpu") == wanted


@hypothesis.given(
    edges=st.lists(st.one_of(st.none(), st.integers(-3, 30)), min_size=2, max_size=2),
    names=st.sampled_from([(), ("exits",), ("halt_*", "exits"), ("pages_4k",)]),
    who=st.sampled_from([{}, {"vm": "web"}, {"vcpu": 1}, {"kind": "vm"}, {"host": "a"}, {"vm": "w*", "vcpu": [0, 1]}]),
    seconds=st.sampled_from([None, 2.0, 5.0]),
)
@hypothesis.settings(examples(25), suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_what_is_selected_is_what_samples_would_have_selected(  # noqa: PLR0917 - Hypothesis names them
    form, edges, names, who, seconds, tmp_path_factory
):
    """Statistics, files, a range of time, and the last sweep of each interval, over the borders of batches."""
    x = run_of(sweeps=25)
    r = opened(tmp_path_factory.mktemp("root"), form, [x])
    start, stop = (edge if edge is None else np.datetime64(EPOCH + edge * 10**9 + 5, "ns") for edge in edges)
    try:
        wanted = x.select(*names, **who).between(start, stop)
    except (KeyError, ValueError) as error:
        with pytest.raises(type(error)):
            r.select(*names, **who).between(start, stop)
        return
    found = r.select(*names, **who).between(start, stop)
    if seconds is not None and len(wanted):
        wanted, found = wanted.resample(seconds), found.resample(seconds)
    parts = list(found)
    assert all(parts)
    for kind in ("vm", "vcpu"):
        one = [part for part in (getattr(part, kind) for part in parts) if part.files]
        if getattr(wanted, kind).files and len(wanted):
            made.assert_same(as_whole(kf.Samples.concatenate(one)), as_whole(getattr(wanted, kind)))
        else:
            assert not sum(map(len, one))


def test_vms_of_the_same_name_on_several_hosts_are_told_apart(tmp_path):
    """By the host behind it, in every answer; what is written has the name as it was."""
    runs = [run_of("a", vms=("web", "db")), run_of("b", seed=1, vms=("web",))]
    for x in runs:
        record(tmp_path / "rec" / x.host, [x])
    r = kf.open_recordings(tmp_path / "rec")
    assert r.vms == ("web (a)", "db", "web (b)")
    assert set(r.total("exits")) == set(r.vms)
    assert set(r.total("exits", by="vcpu")) == {f"{vm}/{vcpu}" for vm in r.vms for vcpu in (0, 1)}
    assert r.figures("vm")["exits/s"].vms == r.vms
    assert r.select(vm="web (b)").hosts == ("b",)
    assert {info.vm for x in r for info in x.files} == set(r.vms)
    with pytest.raises(KeyError, match=r"no VM 'web' in these recordings"):
        r.select(vm="web")
    r.to_parquet(tmp_path / "set")
    assert kf.open_recordings(tmp_path / "set" / "vcpu").select(host="a").vms == ("web (a)", "db")
    for file in (tmp_path / "set").rglob("b-*.parquet"):
        file.unlink()
    assert kf.open_recordings(tmp_path / "set").vms == ("web", "db")


def test_what_is_opened_is_found_by_path_directory_or_glob(tmp_path):
    """Anywhere below a directory; hidden ones apart; each once."""
    for host in ("a", "b"):
        record(tmp_path / "rec" / host, [run_of(host)])
    kf.to_parquet(tmp_path / "rec" / "a", tmp_path / "set")
    shutil.copytree(tmp_path / "rec" / "a", tmp_path / "rec" / ".hidden")
    for paths, hosts in (
        (tmp_path / "rec", ("a", "b")),
        (str(tmp_path / "rec" / "*"), ("a", "b")),
        ([tmp_path / "rec" / "b", str(tmp_path / "rec" / "a"), tmp_path / "rec"], ("a", "b")),
        (tmp_path / "rec" / "b" / "vcpu-00000.arrows", ("b",)),
        (tmp_path / "set", ("a",)),
        (str(tmp_path / "**" / "*.parquet"), ("a",)),
    ):
        assert kf.open_recordings(paths).hosts == hosts
    with pytest.raises(kf.KvmStatsError, match="have the same run, of recording"):
        kf.open_recordings(tmp_path)
    shutil.copytree(tmp_path / "rec" / "a", tmp_path / "rec" / "again")
    with pytest.raises(kf.KvmStatsError, match="have the same run, of recording"):
        kf.open_recordings(tmp_path / "rec")


def test_what_cannot_be_opened_is_said(tmp_path):
    """Nothing there, nothing that a glob fits, no recording, no paths."""
    for name in ("nothing", "nothing.npz", "nothing.parquet"):
        with pytest.raises(FileNotFoundError, match="there is no recording") as caught:
            kf.open_recordings(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="name like this"):
        kf.open_recordings(str(tmp_path / "x*"))
    with pytest.raises(kf.KvmStatsError, match="no recording in it, and no Parquet file"):
        kf.open_recordings(tmp_path)
    with pytest.raises(TypeError, match="paths is an int"):
        kf.open_recordings(5)
    with pytest.raises(TypeError, match="paths has an int"):
        kf.open_recordings([5])
    with pytest.raises(ValueError, match="paths is empty"):
        kf.open_recordings([])
    run_of().save(tmp_path / "x.npz")
    with pytest.raises(kf.KvmStatsError, match=r"x\.npz: an \.npz file is not a recording"):
        kf.open_recordings(tmp_path / "x.npz")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(kf.KvmStatsError, match=r"x\.parquet: not a Parquet file, or a damaged one"):
        kf.open_recordings(tmp_path)


def test_what_cannot_be_answered_is_said(tmp_path):
    """Names that are not there, in both kinds, or not in this range; what is no histogram; other words for `by`."""
    record(tmp_path / "rec", [run_of()])
    r = kf.open_recordings(tmp_path)
    with pytest.raises(KeyError, match=r"no statistic 'exit' in these recordings; did you mean"):
        r.total("exit")
    with pytest.raises(ValueError, match="by is 'pid'"):
        r.mean_rate("exits", by="pid")
    with pytest.raises(ValueError, match="by is 'pid'"):
        r.figures(by="pid")
    with pytest.raises(KeyError, match="was not sampled in this range of time"):
        r.between("2031-01-01").total("exits")
    with pytest.raises(ValueError, match="exits is not a histogram"):
        r.histogram("exits")
    with pytest.raises(ValueError, match="start is 'noon'"):
        r.between("noon")
    with pytest.raises(ValueError, match="makes them fewer, not more"):
        list(r.resample(0.5))
    assert list(r.between("2031-01-01")) == []
    assert repr(r) == f"<Recordings: 1 runs of 2 VMs on 1 hosts, {len(VM) + len(VCPU)} statistics>"
    both = made.schema_of(
        [kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)], "vm"
    )
    made.samples([("vm", both, 1), ("vcpu", VCPU, 1)], 3).save(tmp_path / "both")
    with pytest.raises(KeyError, match="in VM and in vCPU files"):
        kf.open_recordings(tmp_path / "both").total("exits")


def test_what_is_missing_of_a_recording_is_told_when_it_is_read(tmp_path):
    """Once for each answer that read it, at the caller's line; the rest is in the answer."""
    x = run_of()
    record(tmp_path / "rec", [x], rotate_bytes=1)
    for file in (tmp_path / "rec").glob("*-00001.arrows"):
        file.unlink()
    r = kf.open_recordings(tmp_path)
    with pytest.warns(kf.RecordingWarning, match="part 1 is missing") as caught:
        total = r.total("exits")
    assert [one.filename for one in caught] == [__file__]
    left = kf.Samples.concatenate([x[:4], x[8:]])
    assert total == added_up([left], lambda x: (x.total("exits").tolist(), x.columns("exits")), "vm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert r.total("exits") == total


def test_a_file_of_a_data_set_that_is_deleted_is_told(tmp_path):
    """The others are read."""
    x = run_of(sweeps=4)
    x.time[2:] += 86400 * 10**9
    x.to_parquet(tmp_path)
    r = kf.open_recordings(tmp_path)
    for file in tmp_path.glob("*/date=2026-09-22/*"):
        file.unlink()
    with pytest.warns(kf.RecordingWarning, match=r"date=2026-09-22/.*: deleted since the data set was opened"):
        assert [len(part) for part in r] == [2, 2]


def test_sweeps_that_cannot_follow_each_other_are_damage(tmp_path):
    """Whatever reads them: the error names the recording."""
    x = run_of()
    with kf.Recorder(tmp_path / "rec", flush_seconds=0) as recorder:
        recorder.write(x[6:])
        recorder._last = None
        recorder.write(x[:6])
    with pytest.raises(kf.KvmStatsError, match=r"rec: this recording is damaged: its sweeps are not in the order"):
        kf.open_recordings(tmp_path).total("exits")
    with kf.Recorder(tmp_path / "again", flush_seconds=0) as recorder:
        recorder.write(replace(x[:6], errors=(kf.SampleError(1, 3, OSError(9, "gone")),)))
        recorder._failed = set()
        recorder.write(x[6:])
    with pytest.raises(kf.KvmStatsError, match=r"again: this recording is damaged: a file that had failed"):
        list(kf.open_recordings(tmp_path / "again"))


def test_what_is_refused_is_closed_at_once(tmp_path, capsys):
    """A recording that is damaged, or counts too much to be added up, does not stay open until the collector comes."""
    x = run_of().vcpu
    with kf.Recorder(tmp_path / "damaged", flush_seconds=0, compression=None) as recorder:
        for part in (x[:4], x[4:8].select("exits"), x[8:]):
            recorder.write(part)
            recorder.rotate()
            recorder._first = None
    for group in x.groups:
        group.values[:3] = np.array([0, 2**64 - 1, 5], np.uint64)[:, None, None]
    record(tmp_path / "overflows", [x], compression=None)

    def why():  # pytest.raises would keep the frames
        try:
            kf.Samples.load(tmp_path / "damaged")
        except kf.KvmStatsError as error:
            return str(error)

    gc.collect()
    gc.disable()
    try:
        fds = open_fds()
        assert "this recording is damaged: its parts are of different statistics" in why()
        assert open_fds() == fds
        assert cli.main(["stat", str(tmp_path / "overflows")]) == 2
        assert "more than a uint64 holds" in capsys.readouterr().err
        assert open_fds() == fds
    finally:
        gc.enable()


PEAK = """
import re, sys
from pathlib import Path
import pyarrow, kvmstats_fast as kf
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
def ask(path):
    r = kf.open_recordings(path)
    return r.total("exits", by=None), r.histogram("halt_wait_hist"), r.figures(), sum(len(x) for x in r)
ask(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
ask(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.measures_memory
def test_memory_does_not_grow_with_a_run(tmp_path):
    """However long it is: 85 MiB of values are asked in a fraction of it."""
    x = made.samples([("vcpu", VCPU, 64)], 60)
    x.groups[0].values[:] >>= np.uint64(30)  # they add up
    for name, parts in (("short", 2), ("long", 20)):
        with kf.Recorder(tmp_path / name, compression="lz4") as recorder:
            for i in range(parts):
                x.time[:] = x.tick[:] = np.arange(60) + 60 * i
                recorder.write(x)
    call = [sys.executable, "-c", PEAK, tmp_path / "short", tmp_path / "long"]
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 45


def test_a_data_set_gives_back_what_was_written(tmp_path_factory, monkeypatch):
    """Bit for bit: failures of all files too, missed ticks, steps of the wall clock, row groups of any size."""

    @hypothesis.given(
        failures=st.dictionaries(st.integers(0, 2), st.integers(0, 9), max_size=3),
        cuts=st.sets(st.integers(0, 9), max_size=4),
        clock=st.dictionaries(st.integers(1, 8), st.integers(-3, 3), max_size=2),
        size=st.sampled_from([1, 3000, 1 << 20]),
    )
    @hypothesis.example(failures={0: 9}, cuts=set(), clock={}, size=1)  # behind the last sweep
    @hypothesis.settings(examples(25))
    def check(failures, cuts, clock, size):
        root = tmp_path_factory.mktemp("root")
        errors = [kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in failures.items()]
        offsets = {0: EPOCH} | {sweep: EPOCH + sweep + offset * 10**9 for sweep, offset in sorted(clock.items())}
        steps = tuple(offsets.items())[1:]
        x = made.samples(
            [("vcpu", made.schema_of(made.ODD), 3)], 9, errors=errors, wall_offset=EPOCH, wall_steps=steps, missed=3
        )
        parts = [x[a:b] for a, b in pairwise(sorted({0, *cuts, 9}))]
        with kf.Recorder(root / "rec", flush_seconds=0) as recorder:
            for part in parts:
                recorder.write(part)
        monkeypatch.setattr(parquet, "_GROUP_BYTES", size)
        kf.to_parquet(root / "rec", root / "set")
        read = list(kf.open_recordings(root / "set"))
        found, wanted = kf.Samples.concatenate(read), kf.Samples.concatenate(parts)
        for one in (found, wanted):  # each file fails once: they are in no order
            one.errors = tuple(sorted(one.errors, key=lambda error: error.file))
        made.assert_same(found, wanted)

    check()


def rewrite(path, change):
    """Write a file of a data set again: `change` gives its table, metadata, and what happened, of those it is given."""
    file = pq.ParquetFile(path)
    table = file.read()
    about = dict(table.schema.metadata)
    table, about, happened = change(table, about, about.pop(b"kvmstats.batches"))
    with pq.ParquetWriter(path, table.schema.with_metadata(about)) as writer:
        writer.write_table(table.replace_schema_metadata(about))
        if happened is not None:
            writer.add_key_value_metadata({b"kvmstats.batches": happened})


def test_data_sets_of_format_2_are_read(tmp_path):
    """Their row groups say nothing of what happened: where the rows of a file end, it had failed."""
    x = run_of(errors=[kf.SampleError(2, 7, OSError(9, "gone"))], vms=("web",))
    x.tick[5:] += np.uint64(2)
    (path,) = x.vcpu.to_parquet(tmp_path)

    def as_format_2(table, about, _):
        about = {key: value for key, value in about.items() if key not in (b"kvmstats.run", b"kvmstats.tail")}
        return table, about | {b"kvmstats.format": b"2"}, None

    rewrite(path, as_format_2)
    r = kf.open_recordings(tmp_path)
    (y,) = r
    assert [(error.file, error.sweep, str(error.error)) for error in y.errors] == [
        (1, 7, "it failed: it has no further rows")
    ]
    made.assert_same(replace(y, errors=()), replace(x.vcpu, errors=(), missed=2))
    assert list(r.figures("vcpu")["exits/s"].values) == list(x.figures("vcpu")["exits/s"].values)
    (path,) = x.vcpu.to_parquet(tmp_path, overwrite=True)
    rewrite(path, lambda table, about, _: as_format_2(table.take([0, 2, 1, *range(3, len(table))]), about, None))
    with pytest.raises(kf.KvmStatsError, match=r"column 'tick' does not have the same sweeps|'file' does not have"):
        list(kf.open_recordings(tmp_path))


def lie_of(**lies):
    """Change what happened in the only row group."""

    def change(table, about, happened):
        (batch,) = json.loads(happened)
        return table, about, json.dumps([batch | lies]).encode()

    return change


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda table, about, _: (table, about, None), "kvmstats.batches is missing"),
        (lambda table, about, _: (table, about, b"[]"), "kvmstats.batches is about 0 row groups; it has 1"),
        (lambda table, about, _: (table, about, b"["), "kvmstats.batches is damaged: it is not JSON"),
        (lie_of(sweeps=-1), r"kvmstats.batches\[0\]\['sweeps'\] is -1"),
        (lie_of(sweeps=5), "column 'file' does not have the files"),
        (lie_of(rowless=5), r"kvmstats.batches\[0\]\['rowless'\] is 5"),
        (lambda table, about, happened: (table.drop_columns(["tick"]), about, happened), "by its metadata it must be"),
        (lambda table, about, happened: (table.sort_by("time"), about, happened), "column 'file' does not have"),
        (lambda table, about, happened: (table, about | {b"kvmstats.tail": b"-1"}, happened), "kvmstats.tail is -1"),
        (lambda table, _, happened: (table, {}, happened), "not a recording of kvmstats_fast"),
    ],
)
def test_what_a_data_set_says_of_itself_is_checked(change, about, tmp_path):
    """The error names the file, and the field or column."""
    (path,) = run_of(sweeps=4).vcpu.to_parquet(tmp_path)
    rewrite(path, change)
    with pytest.raises(kf.KvmStatsError, match=about) as caught:
        list(kf.open_recordings(tmp_path))
    assert str(path) in str(caught.value)


def test_a_row_group_of_more_than_fits_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """By its number of rows, which cost nothing to claim."""
    run_of(sweeps=4).vcpu.to_parquet(tmp_path)
    monkeypatch.setattr("kvmstats_fast.formats.limits.ALWAYS_ALLOWED", 100)
    monkeypatch.setattr("kvmstats_fast.formats.limits.MOST_TIMES", 0.01)
    with pytest.raises(kf.KvmStatsError, match="claim to hold"):
        list(kf.open_recordings(tmp_path).select("exits"))


@pytest.mark.parametrize("size", [2, 4])
def test_changes_that_no_uint64_holds_together_are_an_error_that_names_the_statistic(tmp_path, form, size):
    """Of one vCPU, whose counter was cleared on the way, within a batch or between two."""
    x = run_of("a", sweeps=4)
    for group in x.groups:
        group.values[0::2], group.values[1::2] = 0, 2**63 + 5
    r = opened(tmp_path, form, [x], size)
    with pytest.raises(ValueError, match=r"the changes of exits.* add up to more than a uint64 holds"):
        r.total("exits")


def test_gauges_of_several_runs_add_up_with_their_signs(tmp_path, form):
    """What falls in one run and rises in another is added as signed changes, of one value or of several."""
    stats = [
        kf.Stat(name, kf.StatType.INSTANT, kf.StatUnit.NONE, kf.StatBase.POW10, 0, size, -1)
        for name, size in (("gauge", 1), ("gauges", 3))
    ]
    runs = [made.samples([("vcpu", made.schema_of(stats), 2)], 4, host=host) for host in "ab"]
    for x, last in zip(runs, (3, 9), strict=True):
        for name in ("gauge", "gauges"):
            values = x.groups[0].view(name)
            values[:], values[-1] = 5, last
    r = opened(tmp_path, form, runs)
    assert r.total("gauge", by="host") == {"a": -4, "b": 8}
    assert r.total("gauge", by=None) == 4
    assert r.total("gauges", by=None).tolist() == [4, 4, 4]


def test_a_statistic_of_two_kinds_in_runs_of_two_kernels_is_refused(tmp_path, form):
    """The name alone does not say how to add it up; selected runs are."""
    stats = [
        [kf.Stat("odd", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, exponent, 1, -1)]
        for exponent in (0, 3)
    ]
    runs = [
        made.samples([("vcpu", made.schema_of(one), 1)], 4, host=host) for one, host in zip(stats, "ab", strict=True)
    ]
    r = opened(tmp_path, form, runs)
    with pytest.raises(KeyError, match="'odd' has different types, units or sizes in runs of different kernels"):
        r.total("odd")
    assert r.select(host="a").total("odd", by=None) == runs[0].total("odd")[0]


def test_a_recording_without_a_sweep_adds_nothing(tmp_path):
    """Before the sweeps of one that has some; alone, its statistics were not sampled."""
    x = run_of("a")
    for name, parts in (("empty", [x[:0]]), ("some", [x[:0], x])):
        with kf.Recorder(tmp_path / name, flush_seconds=0) as recorder:
            for part in parts:
                recorder.write(part)
                recorder.rotate()
    with pytest.raises(KeyError, match="'exits' was not sampled in this range of time"):
        kf.open_recordings(tmp_path / "empty").total("exits")
    some = kf.open_recordings(tmp_path / "some")
    assert some.total("exits", by=None) == sum(x.total("exits"))
    assert some.between(0, 3).total("exits", by=None) == sum(x[:3].total("exits"))
    assert [one.time.tolist() for one in some.resample(2.0).runs()] == [x.time[1::2].tolist()]


def test_a_file_that_another_has_replaced_meanwhile_is_an_error_that_names_it(tmp_path, form):
    """What was opened is of other statistics: it is not read as if it were those."""
    r = opened(tmp_path / "one", form, [run_of("a")])
    opened(tmp_path / "two", form, [run_of("b", vms=("mail",))])
    suffix = "vcpu-00000.arrows" if form == "recording" else "*.parquet"
    (old,) = (path for path in (tmp_path / "one").rglob(suffix) if form == "recording" or "/vcpu/" in str(path))
    (new,) = (path for path in (tmp_path / "two").rglob(suffix) if form == "recording" or "/vcpu/" in str(path))
    shutil.copy(new, old)
    with pytest.raises(kf.KvmStatsError, match="another file took its place while it was read") as caught:
        r.select(kind="vcpu").total("exits")
    assert str(old) in str(caught.value)


def test_other_files_in_a_data_set_do_not_keep_samples_from_it(tmp_path):
    """What is no Parquet file says nothing of the values that ours have."""
    folder = tmp_path / "vcpu" / "date=2026-01-01"
    folder.mkdir(parents=True)
    (folder / "notes.parquet").write_bytes(b"nothing of ours")
    x = run_of("a").select(kind="vcpu")
    x.to_parquet(tmp_path)
    (folder / "notes.parquet").unlink()
    assert kf.open_recordings(tmp_path).total("exits", by=None) == sum(x.total("exits"))


def test_runs_of_which_nothing_is_selected_give_nothing(tmp_path, form):
    """Neither a batch nor an answer; the others give what is theirs."""
    r = opened(tmp_path, form, [run_of("a"), run_of("b", vms=("mail",)), run_of("c").select(kind="vm")])
    assert {x.host for x in r.select("exits")} == {"a", "b"}
    some = r.select(vm="mail")
    assert {x.host for x in some} == {"b"}
    assert len(list(some.runs())) == 1
    assert not [x for x in some.between("2031-01-01") if len(x)]


def test_kinds_of_a_run_with_other_sweeps_are_not_put_together(tmp_path):
    """Where a file of one kind is gone from a data set: each kind can be read by itself."""
    x = run_of("a")
    with kf.Recorder(tmp_path / "rec", flush_seconds=0, rotate_bytes=1) as recorder:
        recorder.write(x[:6])
        recorder.write(x[6:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_GROUP_BYTES", 1)
        patch.setattr(parquet, "_FILE_BYTES", 1)
        kf.to_parquet(tmp_path / "rec", tmp_path / "set")
    first, *others = sorted(tmp_path.glob("set/vm/*/*.parquet"))
    assert others
    first.unlink()
    r = kf.open_recordings(tmp_path / "set")
    with pytest.raises(ValueError, match="the vm files of a run have other sweeps than its other files"):
        list(r.runs())
    assert len(next(r.select(kind="vcpu").runs())) == len(x)


def test_a_histogram_of_which_not_all_have_the_sum_has_no_exact_mean(tmp_path, form):
    """A kernel, or a recording, without it: the sum of the others would be taken for that of all."""
    runs = [run_of("a").select(kind="vcpu"), run_of("b", seed=1).select("halt_wait_hist")]
    r = opened(tmp_path, form, runs)
    both = r.histogram("halt_wait_hist", by=None)
    assert both.raw_total is None
    assert both.counts.tolist() == sum(x.histogram("halt_wait_hist").counts.sum(axis=0) for x in runs).tolist()
    assert r.select(host="a").histogram("halt_wait_hist", by=None).raw_total is not None
