"""TableScreen: rows of VMs or vCPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kvmstats_fast.top.page_screen import PageScreen
from kvmstats_fast.top.table import Layout, Table, globs
from kvmstats_fast.top.view import View, bindings

if TYPE_CHECKING:
    from kvmstats_fast.top.lines import Line, Lines
    from kvmstats_fast.top.table import Who

_TITLES = 3  # the line of the head that has the titles of columns


class TableScreen(View):
    """Rows of VMs or vCPUs, and a cursor."""

    BINDINGS: ClassVar[Any] = bindings("table")
    HEAD = 4
    HAS_CURSOR = True

    def __init__(self) -> None:
        super().__init__()
        self.table = Table("VM", (), (), np.empty((0, 0)), [])
        self.order: list[int] = []  # which of its rows are shown
        self.columns = Layout(0, ())

    @property
    def at(self) -> Who | None:
        """Whose row the cursor is on."""
        return self.table.rows[self.order[self.body.cursor]] if self.order else None

    def show(self, width: int) -> None:
        """Show the rows; the cursor stays on whose row it was on, but for the first, which is whoever is first."""
        model, at = self.top.model, self.at if self.body.cursor else None
        self.table = table = model.table()
        sort = table.nearest(model.sort)
        self.order = table.order(sort, model.guests, reverse=model.is_reversed)
        self.columns = columns = table.fit(width, sort, model.weights)
        groups, titles = columns.head(table, sort, reverse=model.is_reversed)
        whole = float(np.nansum(table.column(table.exits)[self.order]))
        self.head.show_all(
            [
                ((self.top.describe(width, whole), "bold"),),
                (self.top.state(),),
                ((groups, "dim"),),
                ((titles.ljust(width), "title"),),
            ]
        )
        rows = [table.rows[place] for place in self.order]
        self.body.show(len(rows), self._line, rows.index(at) if at in rows else None)

    def _line(self, row: int) -> Line:
        place = self.order[row]
        pieces = self.columns.line(self.table, place)
        if self.table.failed[place]:
            return tuple((text, "dim") for text, _ in pieces)
        return tuple((text, "mark" if is_marked else "") for text, is_marked in pieces)

    def on_lines_clicked(self, event: Lines.Clicked) -> None:
        """Sort by a title that was clicked at, or open a row."""
        if event.lines.id == "head":
            name = self.columns.find(self.table, event.x) if event.line == _TITLES else None
            if name is not None:
                model = self.top.model
                model.is_reversed = self.table.nearest(model.sort) == name and not model.is_reversed
                model.sort = name
                self.update()
        elif event.line < len(self.order):
            self.body.move_to(event.line)
            self.action_open()

    def action_by(self) -> None:
        """Have rows of vCPUs, or of VMs."""
        model = self.top.model
        model.by = "vcpu" if model.by == "vm" else "vm"
        self.body.move_to(0)
        self.update()

    def action_sort(self, by: int) -> None:
        """Sort by the column beside."""
        model = self.top.model
        names = model.sorts(self.table)
        sort = self.table.nearest(model.sort)
        at = names.index(sort) if sort in names else 0
        model.sort, model.is_reversed = names[(at + by) % len(names)], False
        self.update()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.top.model.is_reversed = not self.top.model.is_reversed
        self.update()

    def action_total(self) -> None:
        """Show what was counted since the reset, or in the last interval."""
        self.top.model.is_total = not self.top.model.is_total
        self.update()

    def action_guests(self) -> None:
        """Ask which VMs are shown."""
        model = self.top.model

        def choose(text: str) -> None:
            model.guests = globs(text)

        self.top.ask("guests or pids", " ".join(model.guests), choose)

    def action_open(self) -> None:
        """Open the page of whose row the cursor is on."""
        if self.at is not None:
            self.app.push_screen(PageScreen(self.at))
