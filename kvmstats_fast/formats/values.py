"""What the columns of statistics hold: raw values, or their changes or rates from sweep to sweep.

A change is in the row of the later of its two sweeps; the first sweep has no row then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmstats_fast import changes
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.joining import join_samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

VALUES = ("raw", "delta", "rate")


def check_values(values: str) -> None:
    """Raise ValueError if this is not what columns can hold."""
    if values not in VALUES:
        raise ValueError(f"values is {values!r}; it must be 'raw', 'delta' or 'rate'")


def find_values(samples: Samples, values: str, *, si: bool = False) -> tuple[Samples, dict[str, npt.NDArray[Any]]]:
    """Return the sweeps that have a row, and by name what the columns of statistics hold.

    Rates are in base units; raw values and deltas are with `si`.
    """
    check_values(values)
    names = samples.names
    if values == "raw":
        return samples, {name: samples.si(name) if si else samples[name] for name in names}
    if values == "rate":
        return samples[1:], dict(changes.rates(samples, names))
    deltas = changes.deltas(samples, names)
    return samples[1:], {name: samples.stat(name).to_si(one) if si else one for name, one in deltas.items()}


def find_units(stat: Stat, values: str, *, si: bool = False) -> str:
    """Return the unit of a column; a histogram's values are counts, whatever its edges are in."""
    if values == "rate":
        return stat.rate_units
    return "" if stat.is_histogram else stat.units(si)


def overlap(batches: Iterable[Samples], source: object) -> Iterator[Samples]:
    """Give samples that follow each other, and between two of them the last sweep of one with the first of the next.

    So the changes within each are all there are. Samples of other files or statistics are another run, whose first
    sweep has none before it. KvmStatsError, which names the `source`, for what no recorder writes one after the other.
    """
    before: Samples | None = None
    for samples in batches:
        if before is not None and len(samples) and _is_same_run(before, samples):
            try:
                yield join_samples([before, samples[:1]])
            except ValueError as error:
                raise KvmStatsError(f"{source}: this recording is damaged: {error}") from error
        yield samples
        before = samples[-1:] if len(samples) else before


def _is_same_run(before: Samples, after: Samples) -> bool:
    signatures = [[group.signature for group in samples.groups] for samples in (before, after)]
    return before.files == after.files and signatures[0] == signatures[1]
