"""Samples of a long run, made up: counters that grow as real ones do."""

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.groups import Block
from kvmstats_fast.testing import SyntheticStats

FIVE = ["exits", "fpu_reload", "halt_wakeup", "halt_wait_ns", "blocking"]


def long_run(sweeps, files, stats=None):
    """Samples of counters that grow as real ones do, and gauges that stay."""
    with SyntheticStats() as one:
        schema = kf.parse(one.to_bytes()).schema
    chosen = schema.stats if stats is None else schema.select(*stats)
    rng = np.random.default_rng(1)
    width, places = 0, {}
    for stat in chosen:
        places[stat.name] = (stat, width)
        width += stat.size
    values = np.zeros((sweeps, files, width), np.uint64)
    for stat, word in places.values():
        for i in range(word, word + stat.size, 4):  # every fourth bucket is in use
            np.cumsum(rng.integers(0, 50, (sweeps, files), np.uint64), axis=0, out=values[:, :, i])
    time_ = np.arange(sweeps, dtype=np.int64) * 10**6
    infos = tuple(kf.FileInfo(f"kvm-1/vcpu-{i}", "vcpu", i) for i in range(files))
    clock = (time_, np.full(sweeps, 1000, np.int64), np.arange(sweeps, dtype=np.uint64))
    return kf.Samples((Block(schema, "vcpu", places, np.arange(files), values),), infos, *clock, interval=0.001)
