"""How often the interval of `kvmstats_fast.compare` holds the truth, and finds a change of 5 %; by simulation.

Counters of two runs (or of several on each side) of the same guest, whose exits come in bursts; a sweep a ms.
"""

import argparse

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.groups import Block
from kvmstats_fast.testing import SyntheticStats

EXITS = kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)


def make_run(rng, schema, shape, scale, spread):
    """Return a run of so many sweeps, in bursts of so many on average, whose rate differs by `spread` from others'."""
    sweeps, burst = shape
    lengths = rng.geometric(1 / burst, 4 * sweeps // burst + 20)
    level = np.repeat(rng.gamma(2.0, 1.0, len(lengths)), lengths)[: sweeps - 1]
    counts = rng.poisson(50 * scale * rng.normal(1, spread) * level)
    values = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64).reshape(-1, 1, 1)
    group = Block(schema, "vcpu", {"exits": (EXITS, 0)}, np.array([0]), values)
    clock = np.arange(sweeps)
    info = (kf.FileInfo("kvm-1/vcpu-0", "vcpu", 0),)
    return kf.Samples((group,), info, clock * 10**6, np.ones(sweeps, np.int64), clock.astype(np.uint64))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000)
    pairs = parser.parse_args().pairs
    rng = np.random.default_rng(1)
    with SyntheticStats(stats=[EXITS]) as made:
        schema = kf.parse(made.to_bytes()).schema
    print(f"{pairs} pairs a row, 95 % intervals")
    print("runs a side  sweeps  burst  holds the truth  finds +5 %")
    rows = [(1, 600, 5), (1, 600, 20), (1, 2000, 1), (1, 2000, 5), (1, 2000, 20), (1, 2000, 50), (1, 10000, 50)]
    for runs, sweeps, burst in [*rows, (2, 600, 5), (3, 600, 5), (5, 600, 5), (10, 600, 5)]:
        spread = 0.03 if runs > 1 else 0.0
        held = found = 0
        for _ in range(pairs):
            a, same, more = (
                [make_run(rng, schema, (sweeps, burst), scale, spread) for _ in range(runs)] for scale in (1, 1, 1.05)
            )
            change = kf.compare(a, same)["exits"]
            held += change.low < 1 < change.high
            found += kf.compare(a, more).exceeds("exits", 0)
        print(f"{runs:11}  {sweeps:6}  {burst:5}  {held / pairs:14.1%}  {found / pairs:10.1%}", flush=True)


if __name__ == "__main__":
    main()
