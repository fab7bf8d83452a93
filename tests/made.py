"""Samples made up from nothing, and what it means that two are the same."""

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.groups import Block
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
    """The schema of a file with these statistics."""
    with SyntheticStats(stats=stats, kind=kind, **options) as made:
        return kf.parse(made.to_bytes()).schema


def samples(groups, sweeps, *, seed=0, errors=(), **about):
    """Samples of `groups`, [(kind, schema, number of files)], every value at random over the whole of uint64."""
    rng = np.random.default_rng(seed)
    about = {"interval": 0.001, "wall_offset": 1790000000 * 10**9, "host": "härd", "kernel": "6.18 x86_64"} | about
    files, made = [], []
    for kind, schema, number in groups:
        columns = np.arange(len(files), len(files) + number)
        for i in columns.tolist():
            vcpu_id = i if kind == "vcpu" else None
            files.append(kf.FileInfo(f"kvm-{7 + i // 2}/{kind}-{i}", kind, vcpu_id, 7, "web", "web", about["host"]))
        values = rng.integers(0, 2**64, (sweeps, number, schema.num_values), np.uint64)
        places = {stat.name: (stat, stat.offset // 8) for stat in schema.stats}
        made.append(Block(schema, kind, places, columns, values))
    for error in errors:
        for group in made:
            if error.file in group.columns:
                group.values[error.sweep :, group.columns.tolist().index(error.file)] = 0
    time = 10**12 + np.cumsum(rng.integers(1, 10**7, sweeps)).astype(np.int64)
    tick = np.cumsum(rng.integers(1, 3, sweeps)).astype(np.uint64)
    clock = (time, rng.integers(0, 10**6, sweeps), tick)
    return kf.Samples(tuple(made), tuple(files), *clock, errors=tuple(errors), **about)


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
