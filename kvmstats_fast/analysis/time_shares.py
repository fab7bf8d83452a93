"""Where the time of vCPUs goes: what KVM counts of their halts, put together with what the scheduler counts.

KVM adds the time of a halt when the halt ends (``kvm_vcpu_halt`` in ``virt/kvm/kvm_main.c``), and the scheduler that of
a wait (``sched_info_arrive`` in ``kernel/sched/stats.h``): until then it is in no counter, and then it may reach back
further than the run. Here it is put where it was, as far as that can be known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.schedstat import STATS
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmstats_fast.samples import Samples

    Seconds = npt.NDArray[np.float64]

RUN, WAIT = (stat.name for stat in STATS[:2])
POLLS = ("halt_poll_success_ns", "halt_poll_fail_ns")
HALT = "halt_wait_ns"
BLOCKING = "blocking"
#: What `divide` takes.
NEEDED = (RUN, WAIT, *POLLS, HALT)


def divide(elapsed: Seconds, run: Seconds, wait: Seconds, poll: Seconds, halted: Seconds) -> dict[str, Seconds]:
    """Divide the time of vCPUs into what they did; all in seconds, of any one shape.

    The thread ran, waited for a processor or slept, and it is the scheduler that says how long. A vCPU that polls runs;
    one that is halted sleeps, but from when it is woken up it waits, which KVM counts as halted, too. So the scheduler
    bounds both.

    Returns
    -------
    dict
        ``running`` (without polling), ``polling``, ``halted``, ``steal`` (waiting) and ``other`` (asleep, but not
        halted: in the VMM or the kernel, or paused), which add up to `elapsed` unless more was counted than passed.
    """
    polling = np.minimum(poll, run)
    asleep = np.maximum(elapsed - run - wait, 0)
    halted = np.minimum(halted, asleep)
    return {"running": run - polling, "polling": polling, "halted": halted, "steal": wait, "other": asleep - halted}


def time_between(samples: Samples, name: str, edges: npt.NDArray[np.intp]) -> Seconds:
    """Return how long each vCPU was halted, or waited, from each of some sweeps to the next.

    Parameters
    ----------
    samples : Samples
        Of vCPUs of one kernel.
    name : str
        `HALT` or `WAIT`: to each a halt or wait is added when it ends.
    edges : numpy.ndarray
        Indices of sweeps, ascending, (E,).

    Returns
    -------
    numpy.ndarray
        float64 (E - 1, n), in seconds. Of a halt that is under way at the end it is not known when it began: not before
        the last sweep that saw the vCPU not blocking, or the last but one before the halts counted more. From there on
        it counts, which is the most that it can have lasted in these samples.
    """
    seconds = (samples.time - samples.time[0]) / 1e9
    changes = samples.stat(name).scale_array(samples.delta(name))
    is_halted = name == HALT and BLOCKING in samples.names
    blocking = samples[BLOCKING] if is_halted else np.zeros((len(seconds), changes.shape[1]))
    columns = zip(last_sweeps(samples).tolist(), changes.T, blocking.T, strict=True)
    until = [_time_until(seconds, np.minimum(edges, max(last, 0)), *column) for last, *column in columns]
    between: Seconds = np.maximum(np.diff(np.reshape(until, (-1, len(edges))).T, axis=0), 0)
    return between


def _time_until(
    seconds: Seconds, edges: npt.NDArray[np.intp], changes: Seconds, blocking: npt.NDArray[np.float64]
) -> Seconds:
    """Return how long a vCPU had been halted, or waited, by some sweeps: what was counted, and what was under way."""
    last = int(edges[-1])
    ends = np.flatnonzero(changes[:last]) + 1  # sweeps that saw that one had ended
    begins = seconds[ends] - changes[ends - 1]
    if blocking[last]:
        awake = np.flatnonzero(blocking[: last + 1] == 0)
        since = max(int(awake[-1]) if awake.size else 0, int(ends[-1]) - 1 if ends.size else 0)
        ends, begins = np.append(ends, last + 1), np.append(begins, seconds[since])
    next_end = np.searchsorted(ends, edges, side="right")
    under_way = np.maximum(seconds[edges] - np.append(begins, np.inf)[next_end], 0)
    until: Seconds = np.append(0, np.cumsum(changes))[edges] + under_way
    return until


def divide_samples(samples: Samples, edges: npt.NDArray[np.intp]) -> tuple[Seconds, dict[str, Seconds]]:
    """Divide the time of vCPUs of one kernel from each of some sweeps to the next.

    Returns
    -------
    tuple
        How long each vCPU was sampled, and what `divide` makes of it: float64 (E - 1, n), in seconds.
    """
    lasts = np.maximum(last_sweeps(samples), 0)
    at = np.minimum(np.asarray(edges)[:, None], lasts)
    elapsed = np.diff((samples.time[at] - samples.time[0]) / 1e9, axis=0)

    def change(name: str) -> Seconds:
        changes = samples.stat(name).scale_array(samples.delta(name))
        until = np.concatenate([np.zeros((1, changes.shape[1])), np.cumsum(changes, axis=0)])
        changed: Seconds = np.diff(np.take_along_axis(until, at, axis=0), axis=0)
        return changed

    poll = np.sum([change(name) for name in POLLS], axis=0)
    waited, halted = time_between(samples, WAIT, edges), time_between(samples, HALT, edges)
    return elapsed, divide(elapsed, change(RUN), waited, poll, halted)
