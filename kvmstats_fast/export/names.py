"""Names: what a statistic of the kernel is called in Prometheus, of which type it is, and the edges of its buckets.

The name is ``kvm_``, the kind of file, the kernel's name without its unit, and the base unit; a cumulative statistic is
a counter, whose samples end in ``_total``. Nothing else is changed, so that each of the two names tells the other.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvmstats_fast._text import printable
from kvmstats_fast.abi import StatType, StatUnit
from kvmstats_fast.schedstat import STATS

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvmstats_fast.stat import Stat

#: Prometheus' word for a unit, and the endings of the kernel's names that it takes the place of.
_UNITS: dict[int, tuple[str, tuple[str, ...]]] = {
    StatUnit.BYTES: ("bytes", ("bytes", "b", "kb", "mb", "kib", "mib")),
    StatUnit.SECONDS: ("seconds", ("seconds", "ns", "us", "ms", "s")),
    StatUnit.CYCLES: ("cycles", ("cycles",)),
}
#: Prometheus' type, and how HELP has the statistic's.
_TYPES: dict[int, tuple[str, str]] = {
    StatType.CUMULATIVE: ("counter", "cumulative"),
    StatType.INSTANT: ("gauge", "as of now"),
    StatType.PEAK: ("gauge", "the highest so far"),
    StatType.LINEAR_HIST: ("histogram", "linear histogram"),
    StatType.LOG_HIST: ("histogram", "logarithmic histogram"),
}
_SCHED = frozenset(stat.name for stat in STATS)
_MOST_LOG_BUCKETS = 66  # as many as a uint64 can fall into, and one that is empty
_FILES = {"vm": "a VM's", "vcpu": "a vCPU's"}


class Family(NamedTuple):
    """A family of metrics.

    Attributes
    ----------
    name : str
        Of a counter without ``_total``.
    type : str
        In prometheus_client's words.
    help : str
    """

    name: str
    type: str
    help: str


def name_family(kind: str, stat: Stat, taken: Collection[str] = ()) -> Family:
    """Return the family of a statistic of a kind of file.

    Parameters
    ----------
    kind : {"vm", "vcpu"}
    stat : Stat
    taken : collection of str
        Names of other families. Where one has the name, this one keeps the kernel's unit, too; then it has a number.
    """
    unit, endings = _UNITS.get(stat.unit, ("", ())) if not stat.unknown else ("", ())
    stem = re.sub(r"[^a-zA-Z0-9_]", "_", stat.name).removesuffix("_total")
    short = next((stem.removesuffix(f"_{ending}") for ending in endings if stem.endswith(f"_{ending}")), stem)
    names = [f"kvm_{kind}_{one}" + (f"_{unit}" if unit else "") for one in (short, stem)]
    name = next((one for one in names if one not in taken), names[1])
    number = 2
    while name in taken:
        name, number = f"{names[1]}_{number}", number + 1
    type_, what = _TYPES.get(stat.type, ("unknown", "")) if not stat.unknown else ("unknown", "")
    if type_ == "histogram" and not bucket_bounds(stat):
        type_, what = "unknown", "counts of buckets whose bounds are not known"
    if type_ == "counter" and stat.shape:
        what = "cumulative, several values"
    what = f"{stat.unknown}: left as the kernel has it" if stat.unknown else what
    of = "the thread of a vCPU, as the host's scheduler counts" if stat.name in _SCHED else f"{_FILES[kind]} stats file"
    return Family(name, type_, f"{printable(stat.name)} of {of} ({what}).")


def bucket_bounds(stat: Stat) -> list[float]:
    """Return the largest value that each bucket of a histogram counts, in base units, without the last, which has none.

    KVM counts whole numbers: the bucket of those below 2**i has the bound 2**i - 1, as ``le`` means it.

    Returns
    -------
    list of float
        Ascending. Empty if this is no histogram, or none that has such bounds.
    """
    if stat.unknown:
        return []
    if stat.type == StatType.LOG_HIST and stat.size <= _MOST_LOG_BUCKETS:
        raw = [(1 << i) - 1 for i in range(stat.size - 1)]
    elif stat.type == StatType.LINEAR_HIST and stat.bucket_size:
        raw = [(i + 1) * stat.bucket_size - 1 for i in range(stat.size - 1)]
    else:
        return []
    bounds = [float(stat.to_base_units(one)) for one in raw]
    return bounds if all(low < high for low, high in pairwise(bounds)) else []


def find_sum(stat: Stat, stats: dict[str, Stat]) -> Stat | None:
    """Return the counter of what a histogram's values add up to: of ``halt_wait_hist`` it is ``halt_wait_ns``."""
    stem = stat.name.removesuffix("_hist")
    if stem == stat.name or stat.unit not in _UNITS:
        return None
    for ending in _UNITS[stat.unit][1]:
        other = stats.get(f"{stem}_{ending}")
        if other is not None and other.type == StatType.CUMULATIVE and not other.shape and other.unit == stat.unit:
            return other
    return None
