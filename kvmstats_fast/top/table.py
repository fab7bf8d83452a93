"""Table: rows of VMs or vCPUs and columns of figures, which are sorted, filtered, and chosen to fit a width."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._text import display_width, printable
from kvmstats_fast.abi import StatType, StatUnit
from kvmstats_fast.analysis.formulas import ALL_EXITS, EXIT_KIND, NO_KIND, figures_of, rates_of
from kvmstats_fast.top.counted import WholeCounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.analysis.figures import Figure
    from kvmstats_fast.top.counted import Counted

    Values = npt.NDArray[np.float64]

#: Shares of vCPUs' time: their figures, the first that is known, and their titles.
_SHARES = (
    (("running_share",), "run"),
    (("polling_share",), "poll"),
    (("halted_share", "halted_fraction"), "halted"),
    (("steal_share",), "steal"),
    (("other_share",), "other"),
)
_POLLS = ("halt_poll_success_ratio", "success")
#: Which columns are given room first; `kind` is the next kind of exits, by how many there are.
_FIRST = ("exits", "halted", "steal", "run", "kind", "vCPUs", "success", "kind", "kind", "poll", "other")
#: Above which a share of time that a vCPU waited for a processor is marked.
MUCH_STEAL = 0.05
_LEAST, _MOST_NAME = 8, 40
_GAP = 1


@dataclass(frozen=True, slots=True)
class Column:
    """What is in a column: its `group` stands above the `title`; `name` is that of the figure.

    form: what its values are: a "rate" per second, a "share" of time or of polls, a "number".
    is_kind: whether there may be any number of its like, of which a table has those that there is room for.
    """

    name: str
    title: str
    group: str
    form: str = "rate"
    is_kind: bool = False

    @property
    def width(self) -> int:
        """How wide it is, without the gap before it."""
        return max(len(self.title) + 1, 10 if self.form == "rate" else 6)  # the title may be marked

    def format(self, value: float) -> str:
        """Return a value as text: a share in per cent, a rate as a number."""
        if math.isnan(value):
            return "-"
        if self.form == "share":
            return f"{100 * value:.1f}"
        return f"{value:.1f}" if self.form == "rate" and 0 < value < 10 else f"{value:,.0f}"


@dataclass(frozen=True, slots=True)
class Who:
    """Whose a row is: that of a VM, or of one of its vCPUs."""

    host: str
    vm: str
    vcpu: int | None
    pid: int | None
    name: str

    @property
    def label(self) -> str:
        """Its name: ``web``, or ``web/0`` of a vCPU."""
        return self.vm if self.vcpu is None else f"{self.vm}/{self.vcpu}"

    def of(self, vcpu: int | None) -> Who:
        """Return a vCPU of the same VM, or the VM."""
        return replace(self, vcpu=vcpu)

    def fits(self, patterns: Sequence[str]) -> bool:
        """Return whether any pattern fits its label, the guest's name or the pid; if there is none, everything does."""
        return not patterns or any(
            fits(pattern, text)
            for pattern in patterns
            for text in (self.label, self.vm, self.name, str(self.pid or ""))
        )


def fits(pattern: str, text: str) -> bool:
    """Return whether a text is what a glob says; case does not matter."""
    return fnmatchcase(text.lower(), pattern.lower())


def globs(text: str) -> tuple[str, ...]:
    """Return the globs of what was typed at a prompt: a word without wildcards is a part of a name."""
    return tuple(word if set(word) & set("*?[") else f"*{word}*" for word in text.split())


@dataclass(frozen=True, slots=True)
class Table:
    """What VMs or vCPUs did.

    Attributes
    ----------
    what : str
        Of what there are rows.
    columns : tuple of Column
    rows : tuple of Who
    values : numpy.ndarray
        float64 (rows, columns); NaN is not known.
    failed : list of bool
        Which rows are of files that cannot be read any more.
    """

    what: str
    columns: tuple[Column, ...]
    rows: tuple[Who, ...]
    values: Values
    failed: list[bool]

    @property
    def exits(self) -> str:
        """Name of the column of all exits; that of the names if there is none."""
        return next((column.name for column in self.columns if column.title == "exits"), "name")

    def nearest(self, name: str) -> str:
        """Return a name if there is a column of it, and that of all exits if not."""
        return name if name in ("name", *(column.name for column in self.columns)) else self.exits

    def column(self, name: str) -> Values:
        """Return the values of a column; NaN if there is none of this name."""
        for place, column in enumerate(self.columns):
            if column.name == name:
                return self.values[:, place]
        return np.full(len(self.rows), np.nan)

    def order(self, by: str, patterns: Sequence[str] = (), *, reverse: bool = False) -> list[int]:
        """Return which rows are shown, in order: the largest first, by name the smallest; what is not known last."""
        kept = [place for place, who in enumerate(self.rows) if who.fits(patterns)]
        kept.sort(key=lambda place: _natural(self.rows[place].label))
        if by == "name":
            return kept[::-1] if reverse else kept
        values = self.column(by).tolist()
        known = [place for place in kept if not math.isnan(values[place])]
        known.sort(key=lambda place: values[place], reverse=not reverse)
        return known + [place for place in kept if math.isnan(values[place])]

    def fit(self, width: int, sort: str, weights: Mapping[str, float]) -> Layout:
        """Choose the columns that a width has room for.

        Parameters
        ----------
        width : int
        sort : str
            Name of the column that is always among them.
        weights : mapping
            How many of each kind of exits there were: those with most come first, those with none are left out.
        """
        names = max((display_width(printable(who.label)) for who in self.rows), default=0)
        name_width = max(min(names, _MOST_NAME, width // 3), 6)
        room = width - name_width
        kinds = [column for column in self.columns if weights.get(column.name)]
        kinds.sort(key=lambda column: -weights[column.name])
        by_title = {column.title: column for column in self.columns if not column.is_kind}
        wanted = [column for column in self.columns if column.name == sort]
        for title in _FIRST:
            if title == "kind":
                wanted += kinds[:1]
                kinds = kinds[1:]
            elif title in by_title:
                wanted.append(by_title[title])
        chosen = []
        for column in dict.fromkeys([*wanted, *kinds]):
            if column.width + _GAP <= room:
                chosen.append(column)
                room -= column.width + _GAP
            elif not column.is_kind:
                break  # what comes after it matters less
        return Layout(name_width, tuple(place for place, column in enumerate(self.columns) if column in chosen))


@dataclass(frozen=True, slots=True)
class Layout:
    """How wide the names are, and which columns are beside them."""

    name_width: int
    places: tuple[int, ...]

    def head(self, table: Table, sort: str, *, reverse: bool) -> tuple[str, str]:
        """Return the lines above a table: groups, and titles, of which the one that it is sorted by is marked."""
        mark = "▲" if reverse != (sort == "name") else "▼"
        titles = _fit_name(table.what + (mark if sort == "name" else ""), self.name_width)
        groups = " " * self.name_width
        shown = [table.columns[place] for place in self.places]
        for group, columns in groupby(shown, key=lambda column: column.group):
            several = list(columns)
            groups += " " * _GAP + _rule(group, sum(one.width + _GAP for one in several) - _GAP)
            titles += "".join(
                " " * _GAP + (one.title + (mark if one.name == sort else "")).rjust(one.width) for one in several
            )
        return groups, titles

    def find(self, table: Table, x: int) -> str | None:
        """Return the name of the column at a place of the title line; None beyond the last."""
        right = self.name_width
        if x < right:
            return "name"
        for place in self.places:
            right += _GAP + table.columns[place].width
            if x < right:
                return table.columns[place].name
        return None

    def line(self, table: Table, row: int) -> list[tuple[str, bool]]:
        """Return a row as text, in pieces: which of them are marked."""
        text, pieces = _fit_name(printable(table.rows[row].label, 256), self.name_width), []
        for place in self.places:
            column, value = table.columns[place], float(table.values[row, place])
            cell = " " * _GAP + column.format(value).rjust(column.width)
            if column.name == "steal_share" and value > MUCH_STEAL:
                pieces += [(text, False), (cell, True)]
                text = ""
            else:
                text += cell
        return [*pieces, (text, False)]


def _rule(text: str, width: int) -> str:
    """Return a line with a text in it, or the text alone."""
    return f" {text} ".center(width, "─") if text and len(text) + 4 <= width else text[:width].rjust(width)


def _fit_name(text: str, width: int) -> str:
    """Return text that takes so many cells; what is too long keeps its end, where numbers are."""
    if display_width(text) > width:
        start, end = text, text[-(width // 2) :]
        while display_width(start + end) > width - 1:
            start, end = (start[:-1], end) if start else ("", end[1:])
        text = f"{start}…{end}"
    return text + " " * (width - display_width(text))


def _natural(text: str) -> list[tuple[int, str]]:
    """Return what text is sorted by: web/10 comes after web/9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def make_table(counted: Counted, by: str, events: Sequence[str] = ()) -> Table:
    """Return what was counted as rows of VMs or vCPUs.

    Parameters
    ----------
    counted : Counted
    by : {"vm", "vcpu"}
    events : sequence of str
        Globs of statistics that have columns; none: exits by kind.
    """
    rows, failed = _make_rows(counted, by)
    vcpus, vms = WholeCounted(counted, "vcpu"), WholeCounted(counted, "vm")
    figures = figures_of(vcpus, vms, by)
    columns = _Columns(rows, by)
    if by == "vm":
        columns.count_vcpus(vcpus)
    for name in ALL_EXITS:
        if f"{name}/s" in figures:
            columns.put(Column(f"{name}/s", "exits", "per second"), figures[f"{name}/s"])
            break
    if events:
        for whole in [vcpus, vms] if by == "vm" else [vcpus]:
            names = [name for name in _counters(counted) if any(fits(one, name) for one in events)]
            columns.put_kinds(rates_of(whole, names, by).values(), str)
    else:
        columns.put_kinds((one for one in figures.values() if _is_kind(one)), _shorten)
    for several, title in _SHARES:
        columns.put(Column(several[0], title, "% time", "share"), *(figures[one] for one in several if one in figures))
    if _POLLS[0] in figures:
        columns.put(Column(*_POLLS, "% polls", "share"), figures[_POLLS[0]])
    return Table("VM" if by == "vm" else "vCPU", tuple(columns.columns), tuple(rows), columns.stack(), failed)


class _Columns:
    """The columns of a table, one after the other."""

    def __init__(self, rows: Sequence[Who], by: str) -> None:
        self._places = {(who.host, who.label): place for place, who in enumerate(rows)}
        self._by = by
        self.columns: list[Column] = []
        self._values: list[Values] = []

    def put(self, column: Column, *figures: Figure) -> None:
        """Put a column, if there is a figure: of several each row has the first that is known of it."""
        values = np.full(len(self._places), np.nan)
        for figure in figures[::-1]:
            labels = map(str, figure.files) if self._by == "vcpu" else figure.vms
            rows = np.array([self._places[key] for key in zip(figure.hosts, labels, strict=True)], np.intp)
            known = ~np.isnan(figure.values)
            values[rows[known]] = figure.values[known]
        if figures:
            self.columns.append(column)
            self._values.append(values)

    def put_kinds(self, figures: Iterable[Figure], title: Callable[[str], str]) -> None:
        """Put rates, then shares of time."""
        there = {column.name for column in self.columns}  # all exits are, whatever is chosen
        for figure in sorted((one for one in figures if one.name not in there), key=lambda one: not one.units):
            name = title(figure.name.removesuffix("/s"))
            group, form = ("per second", "rate") if figure.units else ("% time", "share")
            self.put(Column(figure.name, name, group, form, is_kind=True), figure)

    def count_vcpus(self, vcpus: WholeCounted) -> None:
        """Put how many vCPUs each VM has."""
        places = [self._places[info.host, info.vm] for info in vcpus.files]
        self.columns.append(Column("vcpus", "vCPUs", "", "number"))
        self._values.append(np.bincount(np.array(places, np.intp), minlength=len(self._places)).astype(np.float64))

    def stack(self) -> Values:
        """Return the values, (rows, columns)."""
        return np.stack(self._values, axis=1) if self._values else np.empty((len(self._places), 0))


def _is_kind(figure: Figure) -> bool:
    name = figure.name.removesuffix("/s")
    return bool(figure.units and EXIT_KIND.fullmatch(name) and name not in ALL_EXITS)


def _make_rows(counted: Counted, by: str) -> tuple[list[Who], list[bool]]:
    """Return VMs or vCPUs, each once, and whether all its files have failed."""
    failed: dict[Who, bool] = {}
    for part in counted:
        if by == "vcpu" and part.kind != "vcpu":
            continue
        for info, gone in zip(part.files, part.failed.tolist(), strict=True):
            who = Who(info.host, info.vm, info.vcpu_id if by == "vcpu" else None, info.pid, info.name)
            failed[who] = gone and failed.get(who, True)
    return list(failed), list(failed.values())


def _counters(counted: Counted) -> Iterable[str]:
    """Return the statistics of one value that count up: times, or numbers."""
    return dict.fromkeys(
        name
        for part in counted
        for name, stat in part.stats.items()
        if not stat.shape and stat.type == StatType.CUMULATIVE and stat.unit in (StatUnit.NONE, StatUnit.SECONDS)
    )


def _shorten(name: str) -> str:
    """Return what tells a kind of exits from others: ``io`` of io_exits, ``wfi`` of wfi_exit_stat."""
    if name in NO_KIND:
        return name.removesuffix("_exits")
    return re.sub(r"^exits?_|_exits?(_stat)?$", "", name) or name
