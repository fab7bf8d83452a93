"""Stat: what a descriptor says of one statistic, and how its values are scaled."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.abi import KNOWN, StatBase, StatType, StatUnit

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt


def decode(raw: bytes) -> str:
    """Return the text of a name or id; bytes that are not UTF-8 are kept by ``surrogateescape``."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes of a name or id that `decode` made."""
    return text.encode("utf-8", "surrogateescape")


def is_row(type_: int, size: int) -> bool:
    """Whether a statistic of this type has an array of values, even of one: histograms, and all of another size."""
    return size != 1 or type_ in _HISTOGRAMS


@dataclass(frozen=True, slots=True)
class Stat:
    """One statistic, as described by its descriptor (``struct kvm_stats_desc``).

    Attributes
    ----------
    name : str
        Bytes that are not UTF-8 are kept by ``surrogateescape``.
    type, unit, base : StatType, StatUnit, StatBase, or int
        An int is a code that this package does not know; such a statistic stays raw (see `unknown`).
    exponent : int
        A value in base units is ``raw * 10**exponent``, or ``2**exponent``, depending on `base`.
    size : int
        Number of uint64 values: 1, or the buckets of a histogram.
    offset : int
        Offset in bytes from the start of the values (as uint64), a multiple of 8.
    bucket_size : int
        Width of a linear histogram's buckets, else 0.
    """

    name: str
    type: StatType | int
    unit: StatUnit | int
    base: StatBase | int
    exponent: int
    size: int
    offset: int
    bucket_size: int = 0

    @property
    def is_histogram(self) -> bool:
        """Whether the values are bucket counts."""
        return self.type in _HISTOGRAMS

    @property
    def grows(self) -> bool:
        """Whether values never fall, unless somebody clears them: cumulative ones, peaks and bucket counts."""
        return self.type in _GROWING

    @property
    def shape(self) -> tuple[int, ...]:
        """``()`` for a plain number, ``(size,)`` for a histogram or any other statistic of several values."""
        return (self.size,) if is_row(self.type, self.size) else ()

    @property
    def unknown(self) -> str:
        """The codes that this package does not know, such as ``"type 7, base 3"``; empty for all that exist so far."""
        codes = {"type": self.type, "unit": self.unit, "base": self.base}
        return ", ".join(f"{what} {code}" for what, code in codes.items() if code not in KNOWN[what])

    @property
    def scale(self) -> int | float:
        """Factor from raw values to base units, as `to_base_units` scales 1; 1 if a code is unknown."""
        return self.to_base_units(1)

    def to_base_units(self, raw: int) -> int | float:
        """Return a raw value in base units: seconds, bytes ...

        Parameters
        ----------
        raw : int
            A uint64, as the kernel reports it.

        Returns
        -------
        int or float
            ``raw * base**exponent``. An int, and exact, if the exponent is not negative and ``base**exponent`` is below
            2**64; else the nearest float (a power above 10**270, which no kernel has, counts as 10**270). An instant
            value is signed: the kernel's counters can fall below 0, which reads as a value just below 2**64. The raw
            value if a code is unknown (see `unknown`).
        """
        if raw >> 63 and self.type is StatType.INSTANT and not self.unknown:
            raw -= 1 << 64
        if not self.exponent or self.unknown:
            return raw
        factor: int = StatBase(self.base).radix ** min(abs(self.exponent), _VANISHING)
        if self.exponent < 0:
            return raw / factor
        return raw * factor if factor < 1 << 64 else float(raw * min(factor, _LARGEST))

    def units(self, si: bool = False) -> str:
        """Return the unit of raw values (``"ns"``, ``"KiB"``), or with `si` of base units (``"s"``, ``"B"``).

        Returns
        -------
        str
            Empty for plain counts and booleans. A histogram's unit is that of its bucket edges; its values are counts.
            For an unknown code, the code in words (``"unit 9"``), because the value stays raw.
        """
        if self.unknown:
            return self.unknown
        symbol = _SYMBOLS[StatUnit(self.unit)]
        if si or not self.exponent:
            return symbol
        radix = StatBase(self.base).radix
        prefix = _PREFIXES.get((radix, self.exponent)) if symbol in ("s", "B") else None
        return f"{radix}^{self.exponent} {symbol}".rstrip() if prefix is None else prefix + symbol

    @property
    def rate_units(self) -> str:
        """The unit of a rate: ``"s/s"``, ``"1/s"`` of counts. Internal."""
        symbol = "" if self.is_histogram else self.units(si=True)
        return f"{symbol or 1}/s"

    @property
    def factor(self) -> int:
        """What to multiply a raw value by, or divide it by if the exponent is negative; 1 if a code is unknown."""
        if self.exponent == 0 or self.unknown:
            return 1
        factor: int = StatBase(self.base).radix ** abs(self.exponent)
        return factor

    @property
    def float_factor(self) -> float:
        """`factor` as a float, at most 1e270. Internal."""
        if self.exponent == 0 or self.unknown:
            return 1.0
        return float(min(StatBase(self.base).radix ** min(abs(self.exponent), _VANISHING), _LARGEST))

    def scale_array(self, values: npt.NDArray[np.uint64 | np.int64]) -> npt.NDArray[np.float64]:
        """Return raw values in base units, each as `to_base_units` has it but for a rounding. Internal."""
        result: npt.NDArray[np.float64] = (np.divide if self.exponent < 0 else np.multiply)(
            self.as_signed(values), self.float_factor
        )
        return result

    def to_si(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return raw values in base units, exact where all are whole and fit (`Samples.si`). Internal."""
        values = self.as_signed(values)
        if self.is_histogram or self.unknown or not self.exponent:
            return values
        if self.exponent > 0:
            factor, limits = self.factor, np.iinfo(values.dtype)
            low, high = int(values.min(initial=0)), int(values.max(initial=0))
            if limits.min <= low * factor <= high * factor <= limits.max:
                exact: npt.NDArray[Any] = np.multiply(values, min(factor, limits.max), dtype=values.dtype)
                return exact
        return self.scale_array(values)

    def as_signed(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return raw values as int64 if they are instant, else as they are; a view. Internal."""
        return values.view(np.int64) if self.type == StatType.INSTANT and not self.unknown else values

    def bucket_edges(self) -> npt.NDArray[np.float64]:
        """Return the edges of a histogram's buckets, in base units.

        Bucket i counts values in ``[edges[i], edges[i + 1])``. Linear: ``i * bucket_size``. Logarithmic: 0, 1, 2, 4, 8
        ... (``kvm_stats_linear_hist_update`` and ``kvm_stats_log_hist_update``, ``include/linux/kvm_host.h``).

        Returns
        -------
        numpy.ndarray
            float64, shape ``(size + 1,)``; the last is inf, because the last bucket also counts all larger values. Raw
            if a code is unknown (see `unknown`).

        Raises
        ------
        ValueError
            If this is not a histogram, or a linear one without a bucket size.
        """
        if self.type == StatType.LINEAR_HIST:
            if self.bucket_size == 0:
                raise ValueError(f"{self.name} is a linear histogram, but its descriptor has bucket_size 0")
            raw: Iterable[int] = (i * self.bucket_size for i in range(self.size))
        elif self.type == StatType.LOG_HIST:
            raw = chain((0,), (1 << i for i in range(self.size - 1)))
        else:
            raise ValueError(f"{self.name} is not a histogram: its type is {self.type!r}")
        edges = np.full(self.size + 1, np.inf)
        factor = self.factor
        for i, edge in enumerate(raw):
            edges[i] = _nearest_float(edge, factor, self.exponent)
            if np.isinf(edges[i]):
                break
        return edges


_HISTOGRAMS = (StatType.LINEAR_HIST, StatType.LOG_HIST)
_GROWING = (StatType.CUMULATIVE, StatType.PEAK, *_HISTOGRAMS)
_LARGEST = 10**270  # times any uint64, over a ns, it is still a float
_VANISHING = 1200  # a power of 2 or 10 by which any uint64 is divided to 0.0, and multiplied to inf
_SYMBOLS = {StatUnit.NONE: "", StatUnit.BYTES: "B", StatUnit.SECONDS: "s", StatUnit.CYCLES: "cycles"}
_SYMBOLS[StatUnit.BOOLEAN] = ""
_PREFIXES = dict(zip(((10, exponent) for exponent in (-12, -9, -6, -3, 3, 6, 9, 12)), "pnumkMGT", strict=True))
_PREFIXES |= {(2, 10 * power): f"{letter}i" for power, letter in enumerate("KMGTPE", 1)}


def _nearest_float(raw: int, factor: int, exponent: int) -> float:
    """Return ``raw * factor``, or ``raw / factor`` if the exponent is negative; inf if no float reaches it."""
    bits = raw.bit_length() + (1 if exponent >= 0 else -1) * factor.bit_length()
    if bits < -_VANISHING or not raw:
        return 0.0
    if bits > _VANISHING:  # before integers of such a size are multiplied or divided
        return np.inf
    with suppress(OverflowError):
        return float(raw * factor) if exponent >= 0 else raw / factor
    return np.inf
