"""Figure and Figures: what follows from the statistics of a run, as a table, a frame or plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import format_html, format_number, format_table, plain_number
from kvmstats_fast.formats import need
from kvmstats_fast.formats.arrow import NONE, readable, row_key

if TYPE_CHECKING:
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.file_info import FileInfo

#: Unit of what adds up over files; of a fraction nothing does.
PER_SECOND = "1/s"


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One derived figure of a run.

    Attributes
    ----------
    name : str
    values : numpy.ndarray
        float64, shape ``(n,)``: one for each of `files`; or of `vms` or `hosts`, if the figure is over all their files.
        NaN where it is undefined: a ratio to nothing, a run of one sweep, a file that failed at once, a count that
        reads below 0.
    units : str
        ``"1/s"``, or empty for a fraction.
    files : tuple of FileInfo
        The files that have every statistic of the formula; empty if the figure is of VMs or hosts.
    formula : str
        How it is computed from the statistics.
    vms : tuple of str
        The VM of each value: a label, as in `FileInfo`; empty if the figure is of hosts.
    hosts : tuple of str
        The host of each value.
    """

    name: str
    values: Values
    units: str
    files: tuple[FileInfo, ...]
    formula: str
    vms: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What each value belongs to, as text: ``web/0`` is vCPU 0 of the VM web; or the VM, or the host."""
        return tuple(map(str, self.files)) or self.vms or self.hosts

    @property
    def sum(self) -> float:
        """Sum of the values of a rate, without undefined ones; NaN for a fraction."""
        known = self.values[~np.isnan(self.values)]
        return float(known.sum()) if known.size and self.units == PER_SECOND else np.nan


class Figures(Mapping[str, Figure]):
    """Derived figures by name; ``print(figures)`` prints a table. A figure is missing if no file has its statistics."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._by_name = {figure.name: figure for figure in figures}

    def __getitem__(self, name: str) -> Figure:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __str__(self) -> str:
        return format_table(self._rows(), "<>>>><<") if self else _NONE

    def _repr_html_(self) -> str:
        return format_html(self._rows(), "<>>>><<") if self else _NONE

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "sum", "min", "mean", "max", "", "")]
        for figure in self.values():
            known = figure.values[~np.isnan(figure.values)]
            numbers = (figure.sum, *((known.min(), known.mean(), known.max()) if known.size else (np.nan,) * 3))
            cells = (format_number(number, ".4g") for number in numbers)
            rows.append((figure.name, *cells, figure.units, f"of {_count(figure)}: {figure.formula}"))
        return rows

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain Python by name, ready for ``json.dumps``.

        Returns
        -------
        dict
            For each figure ``units``, ``formula``, ``sum``, ``of`` (labels, as in `Figure.labels`) and ``values``, in
            the same order. Undefined values are None.
        """
        return {
            name: {
                "units": figure.units,
                "formula": figure.formula,
                "sum": plain_number(figure.sum),
                "of": list(figure.labels),
                "values": [plain_number(value) for value in figure.values.tolist()],
            }
            for name, figure in self.items()
        }

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a column for each figure and a row for each vCPU or VM.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``host``, ``vm`` and ``vcpu`` (-1: the VM itself), as `Samples.to_pandas`; for figures of VMs or
            hosts without ``vcpu``, or ``vm``. NaN where a figure is undefined, or does not apply to the row.
            ``attrs["units"]`` and ``attrs["formulas"]`` are by column.
        """
        pd = need("pandas", "pandas")
        rows: dict[tuple[Any, ...], dict[str, float]] = {}
        for name, figure in self.items():
            taken: dict[tuple[Any, ...], int] = {}
            for key, value in zip(_keys(figure), figure.values.tolist(), strict=True):
                taken[key] = taken.get(key, 0) + 1  # labels of the caller's may be those of several files
                rows.setdefault((*key, taken[key]), {})[name] = value
        levels = ["host", "vm", "vcpu"]
        if not any(figure.files for figure in self.values()):
            levels = levels[: 2 if any(figure.vms for figure in self.values()) else 1]
        columns = [[key[place] for key in rows] for place in range(len(levels))]
        index = pd.MultiIndex.from_arrays(columns, names=levels) if len(levels) > 1 else pd.Index(*columns, name="host")
        frame = pd.DataFrame(list(rows.values()), index=index, columns=list(self), dtype=np.float64)
        frame.attrs["units"] = {name: figure.units for name, figure in self.items()}
        frame.attrs["formulas"] = {name: figure.formula for name, figure in self.items()}
        return frame


_NONE = "no figures: these files have the statistics of none"


def _count(figure: Figure) -> str:
    noun = "file" if figure.files else "VM" if figure.vms else "host"
    return f"{len(figure.values)} {noun}{'' if len(figure.values) == 1 else 's'}"


def _keys(figure: Figure) -> list[tuple[str, str, int]]:
    """Return host, VM and number of the vCPU of each value."""
    if figure.files:
        return [row_key(info) for info in figure.files]
    vms = figure.vms or ("",) * len(figure.hosts)
    return [(readable(host), readable(vm), NONE) for host, vm in zip(figure.hosts, vms, strict=True)]
