"""What the columns of statistics hold: raw values, or their changes or rates from sweep to sweep.

A change is in the row of the later of its two sweeps; the first sweep has no row then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmstats_fast import changes
from kvmstats_fast.formats.pending import bytes_per_sweep, cut_sweeps
from kvmstats_fast.groups import join_groups
from kvmstats_fast.joining import join_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

VALUES = ("raw", "delta", "rate")

#: Bytes of values whose changes or rates are worked out at once where they are copied then: memory that is used again
#: and again costs less than new memory, which the system has to find and to clear.
PART_BYTES = 8 << 20


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


def find_parts(
    samples: Samples, values: str, *, si: bool = False
) -> Iterator[tuple[slice, dict[str, npt.NDArray[Any]]]]:
    """Give what `find_values` has of all sweeps, some at a time, and which: what is worked out takes little memory."""
    before = int(values != "raw")  # the sweep whose changes are those of the next
    rows = max(len(samples) - before, 0)
    # What is multiplied is whole numbers if all of them fit (`Stat.to_si`): that takes all of them to tell.
    grown = any(stat.exponent > 0 for group in samples.groups for stat, _ in group.places.values())
    in_parts = (values == "rate" or not grown) if si else before
    step = max(PART_BYTES // max(bytes_per_sweep(samples.groups), 1), 1) if in_parts else max(rows, 1)
    for start in range(0, max(rows, 1), step):
        part = samples[start : start + step + before]
        yield slice(start, min(start + step, rows)), find_values(part, values, si=si)[1]


def find_units(stat: Stat, values: str, *, si: bool) -> str:
    """Return the unit of a column; a histogram's values are counts, whatever its edges are in."""
    if values == "rate":
        return stat.rate_units
    return "" if stat.is_histogram else stat.units(si)


class Columns:
    """What the columns of statistics hold, of samples that come one after the other.

    The first change of each is that since the last sweep before it; where nothing is known of the time between, its
    first sweep has no row.
    """

    def __init__(self, values: str) -> None:
        self._values = values
        self._last: Samples | None = None

    def find(self, samples: Samples, *, follows: bool) -> tuple[Samples, list[npt.NDArray[Any]] | None]:
        """Return the sweeps that have a row, and what the columns hold; None: the sweeps' own values.

        ValueError if these samples cannot follow those before.
        """
        if self._values == "raw":
            return samples, None
        before = self._last if follows else None
        self._last = _copy(samples[-1:]) if len(samples) else before
        if before is not None:
            return samples, self._find(join_samples([before, samples]))
        *_, rows = cut_sweeps(samples, [min(1, len(samples))])
        rows.missed, rows.overruns = samples.missed, samples.overruns
        return rows, self._find(samples)

    def _find(self, samples: Samples) -> list[npt.NDArray[Any]]:
        return [*find_values(samples, self._values)[1].values()]


def _copy(samples: Samples) -> Samples:
    """Return these sweeps alone, where they may be a view of many."""
    return replace(samples, groups=tuple(join_groups([group]) for group in samples.groups))
