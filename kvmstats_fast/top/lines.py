"""Lines: a widget of lines of text, which draws again only those that have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from textual.events import Click, Resize

    #: A line: pieces of text, each with one of STYLES.
    Line: TypeAlias = tuple[tuple[str, str], ...]

STYLES = {
    "": Style(),
    "bold": Style(bold=True),
    "dim": Style(dim=True),
    "title": Style(bold=True, underline=True),
    "mark": Style(bold=True, color="red"),
    "error": Style(bold=True, color="red"),
}
_CURSOR = Style(reverse=True)


class Lines(ScrollView):
    """Lines of text, with or without a cursor.

    Only the lines that are seen are asked for, and only those that differ from what is seen are drawn.
    """

    DEFAULT_CSS = """
    Lines { overflow-x: hidden; scrollbar-size-vertical: 1; }
    """

    class Clicked(Message):
        """A line was clicked at, at a place in it."""

        def __init__(self, lines: Lines, line: int, x: int) -> None:
            super().__init__()
            self.lines, self.line, self.x = lines, line, x

    def __init__(self, *, has_cursor: bool = False, id: str | None = None) -> None:  # noqa: A002 - textual's word
        super().__init__(id=id)
        self.can_focus = True
        self._has_cursor = has_cursor
        self._count = 0
        self._line: Callable[[int], Line] = lambda _: ()
        self._seen: dict[int, tuple[Line, bool]] = {}
        self.cursor = 0

    def show(self, count: int, line: Callable[[int], Line], cursor: int | None = None) -> None:
        """Show so many lines, which a function returns, with the cursor where it was or on another line."""
        self._line = line
        if count != self._count:
            self._count = count
            self.virtual_size = Size(self.size.width, count)
        self.move_to(self.cursor if cursor is None or cursor == self.cursor else cursor)
        top = self.scroll_offset.y
        for row in range(top, top + self.size.height):
            if self._seen.get(row) != self._make(row):
                self.refresh_line(row)

    def show_all(self, lines: Sequence[Line]) -> None:
        """Show these lines."""
        self.show(len(lines), lines.__getitem__)

    def _make(self, row: int) -> tuple[Line, bool]:
        if row >= self._count:
            return (), False
        return self._line(row), self._has_cursor and row == self.cursor

    def render_line(self, y: int) -> Strip:
        """Return a line as textual draws it."""
        row = y + self.scroll_offset.y
        self._seen[row] = line, is_cursor = self._make(row)
        if len(self._seen) > 4 * self.size.height + 100:  # those that were scrolled away
            self._seen = {row: self._seen[row]}
        base = self.rich_style
        style = base + _CURSOR if is_cursor else base
        strip = Strip([Segment(text, style + STYLES[name]) for text, name in line])
        return strip.adjust_cell_length(self.size.width, style)

    def move_to(self, row: int) -> None:
        """Have the cursor on a line, and that in sight."""
        before, self.cursor = self.cursor, max(min(row, self._count - 1), 0)
        if self.cursor == before or not self._has_cursor:
            return
        self.refresh_line(before)
        self.refresh_line(self.cursor)
        top, height = self.scroll_offset.y, max(self.size.height, 1)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False)

    def on_resize(self, event: Resize) -> None:
        """Take what room there is."""
        self.virtual_size = Size(event.size.width, self._count)

    def on_click(self, event: Click) -> None:
        """Say which line it was."""
        self.post_message(self.Clicked(self, event.y + self.scroll_offset.y, event.x))

    def _move(self, by: int) -> None:
        if self._has_cursor:
            self.move_to(self.cursor + by)
        else:
            self.scroll_to(y=self.scroll_offset.y + by, animate=False)

    def action_scroll_up(self) -> None:
        """Up by a line."""
        self._move(-1)

    def action_scroll_down(self) -> None:
        """Down by a line."""
        self._move(1)

    def action_page_up(self) -> None:
        """Up by a screen."""
        self._move(-max(self.size.height - 1, 1))

    def action_page_down(self) -> None:
        """Down by a screen."""
        self._move(max(self.size.height - 1, 1))

    def action_scroll_home(self) -> None:
        """To the first line."""
        self._move(-self._count)

    def action_scroll_end(self) -> None:
        """To the last line."""
        self._move(self._count)
