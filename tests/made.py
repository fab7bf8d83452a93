"""Samples made up from nothing, and what it means that two are the same."""

from functools import cache

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.groups import Block, Columns
from kvmstats_fast.testing import SyntheticStats

#: A statistic of every type and unit, unknown codes, names that are ours or no text, several values, both bases.
ODD = [
    kf.Stat("time", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("gauge", kf.StatType.INSTANT, kf.StatUnit.BYTES, kf.StatBase.POW2, 10, 1, -1),
    kf.Stat("wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 5, -1),
    kf.Stat("narrow_hist", kf.StatType.LINEAR_HIST, kf.StatUnit.CYCLES, kf.StatBase.POW10, 3, 1, -1, 7),
    kf.Stat("several", kf.StatType.PEAK, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 3, -1),
    kf.Stat("blocking", kf.StatType.INSTANT, kf.StatUnit.BOOLEAN, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("future", 9, 11, 7, -3, 1, -1),
    kf.Stat("no\udcfftext", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
]


def schema_of(stats, kind="vcpu", **options):
    """The schema of a file with these statistics; None: those that it has by default."""
    return _schema_of(stats and tuple(stats), kind, tuple(options.items()))


@cache
def _schema_of(stats, kind, options):
    with SyntheticStats(stats=stats, kind=kind, **dict(options)) as made:
        return kf.parse(made.to_bytes()).schema


def group_of(stats, columns, values, kind="vcpu", storage="block"):
    """Files of one kernel, at these indices among all files; `values` is (T, n) or (T, n, buckets) by name."""
    schema = schema_of(stats, kind)
    shape = np.shape(next(iter(values.values())))[:2]
    arrays = [np.zeros((*shape, *stat.shape), np.uint64) for stat in schema.stats]
    for array, stat in zip(arrays, schema.stats, strict=True):
        array[...] = np.array(values.get(stat.name, 0), np.uint64)
    columns = np.array(columns, np.intp)
    if storage == "columns":
        places = {stat.name: (stat, index) for index, stat in enumerate(schema.stats)}
        return Columns(schema, kind, places, columns, tuple(arrays))
    block = np.zeros((*shape, schema.num_values), np.uint64)
    for array, stat in zip(arrays, schema.stats, strict=True):
        word = stat.offset // 8
        block[:, :, word : word + stat.size] = array.reshape(*shape, stat.size)
    return block_of(schema, kind, columns, block)


def block_of(schema, kind, columns, values):
    """Files of one kernel whose values, (T, n, words), are those of the whole file."""
    return Block(schema, kind, {stat.name: (stat, stat.offset // 8) for stat in schema.stats}, columns, values)


def run_of(*groups, times=None, ticks=None, failed=(), errors=(), **about):
    """The Samples of these groups, a sweep a second; `failed` is pairs of a file and the sweep at which it failed."""
    host = about.setdefault("host", "here")
    sweeps = len(groups[0].view(next(iter(groups[0].places))))
    files = {}
    for group in groups:
        for index in group.columns.tolist():
            vcpu_id = index if group.kind == "vcpu" else None
            file_id = "kvm-1" if vcpu_id is None else f"kvm-1/vcpu-{index}"
            files[index] = kf.FileInfo(file_id, group.kind, vcpu_id, 1, "web", "web", host)
    clock = (
        np.array(range(0, sweeps * 10**9, 10**9) if times is None else times, np.int64),
        about.pop("sweep_ns", np.ones(sweeps, np.int64)),
        np.array(range(sweeps) if ticks is None else ticks, np.uint64),
    )
    errors = [*errors, *(kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in failed)]
    return kf.Samples(groups, tuple(files[index] for index in sorted(files)), *clock, errors=tuple(errors), **about)


def samples(groups, sweeps, *, seed=0, errors=(), **about):
    """Samples of `groups`, [(kind, schema, number of files)], every value at random over the whole of uint64."""
    rng = np.random.default_rng(seed)
    made, first = [], 0
    for kind, schema, number in groups:
        columns = np.arange(first, first + number)
        first += number
        made.append(
            block_of(schema, kind, columns, rng.integers(0, 2**64, (sweeps, number, schema.num_values), np.uint64))
        )
    for error in errors:
        for group in made:
            if error.file in group.columns:
                group.values[error.sweep :, group.columns.tolist().index(error.file)] = 0
    times = 10**12 + np.cumsum(rng.integers(1, 10**7, sweeps)).astype(np.int64)
    ticks = np.cumsum(rng.integers(1, 3, sweeps)).astype(np.uint64)
    about = {"interval": 0.001, "wall_offset": 1790000000 * 10**9, "host": "härd", "kernel": "6.18 x86_64"} | about
    sweep_ns = rng.integers(0, 10**6, sweeps)
    return run_of(*made, times=times, ticks=ticks, errors=errors, sweep_ns=sweep_ns, **about)


def assert_same(x, y):
    """Everything that samples say is equal, bit for bit."""
    for name in (
        "interval",
        "wall_offset",
        "wall_steps",
        "missed",
        "overruns",
        "interrupted",
        "host",
        "kernel",
        "files",
    ):
        assert getattr(x, name) == getattr(y, name), name
    for name in ("time", "sweep_ns", "tick"):
        a, b = getattr(x, name), getattr(y, name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), name
    errors = [[(e.file, e.sweep, repr(e.error), vars(e.error)) for e in one.errors] for one in (x, y)]
    assert errors[0] == errors[1]
    assert len(x.groups) == len(y.groups)
    for a, b in zip(x.groups, y.groups, strict=True):
        assert (a.kind, a.schema, list(a.places)) == (b.kind, b.schema, list(b.places))
        assert a.columns.tolist() == b.columns.tolist()
        for name in a.places:
            assert a.places[name][0] == b.places[name][0]
            assert (a.view(name).dtype, a.view(name).shape) == (b.view(name).dtype, b.view(name).shape)
            assert np.array_equal(a.view(name), b.view(name)), name
