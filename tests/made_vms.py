"""VMs that never were, whose vCPUs do all that KVM and the scheduler count of them."""

from dataclasses import replace

import numpy as np

from kvmstats_fast.schedstat import STATS
from kvmstats_fast.testing import SyntheticStats, make_samples

S = 10**9
with SyntheticStats() as one:
    KERNELS = [replace(stat, offset=-1) for stat in one.stats.values()]


def vm(name, vcpus=2, pid=None):
    """The files of a made-up VM, with the scheduler's statistics."""
    about = {"vm": name, "host": "here", "name": name, "pid": pid or 100 + sum(map(ord, name))}
    made = (SyntheticStats(stats=[*KERNELS, *STATS], vcpu_id=i, **about) for i in range(vcpus))
    return [SyntheticStats("x86", "vm", **about), *made]


def moved(files, sweeps, seed=0, start_time=0):
    """Sweeps of files whose vCPUs exit, halt and poll at random rates, from one second to the next."""
    made = [one for one in files if one.kind == "vcpu"]
    draw = np.random.default_rng(seed)

    def grow(most, *more):
        return np.cumsum(draw.integers(0, most, (sweeps, len(made), *more)), axis=0)

    values = {name: grow(1000) for name in ("exits", "io_exits", "halt_exits", "mmio_exits")}
    values["exits"] = sum(values.values())
    values |= {name: grow(S // 4) for name in ("halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns")}
    values["halt_attempted_poll"] = 2 * (polls := grow(100))
    values |= {"sched_run_ns": 3 * grow(S // 8), "sched_wait_ns": grow(S // 8)}
    values |= {"halt_successful_poll": polls, "blocking": grow(9) % 2, "halt_wait_hist": grow(50, 32)}
    values["signal_exits"] = np.zeros((sweeps, len(made)), np.int64)
    values["nx_lpage_splits"] = np.ones((sweeps, len(files) - len(made)), np.int64)
    samples = make_samples(files, values)
    samples.time += start_time
    return samples
