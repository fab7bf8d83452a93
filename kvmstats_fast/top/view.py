"""View: what the screens of ``kvmstats top`` have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, cast

from textual.binding import Binding
from textual.screen import Screen
from textual.widgets import Footer

from kvmstats_fast.top.keys import KEYS
from kvmstats_fast.top.lines import Lines

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from kvmstats_fast.top.app import TopApp


def bindings(where: str) -> list[Binding]:
    """Return the keys of a screen, and those of every screen, as textual binds them."""
    return [
        Binding(key.keys, key.action, key.short, show=bool(key.short), key_display=key.shown.split(",")[0])
        for key in KEYS
        if key.where in (where, "")
    ]


class View(Screen[None]):
    """A head, lines below it that are scrolled, and keys at the bottom."""

    CSS = """
    #head { height: 2; overflow-y: hidden; }
    #body { height: 1fr; scrollbar-gutter: stable; }
    """
    HEAD: ClassVar[int] = 2  #: lines of the head
    HAS_CURSOR: ClassVar[bool] = False

    def compose(self) -> ComposeResult:
        """Yield what it is made of."""
        yield Lines(id="head")
        yield Lines(has_cursor=self.HAS_CURSOR, id="body")
        yield Footer(show_command_palette=False, compact=True)

    @property
    def top(self) -> TopApp:
        """The application."""
        return cast("TopApp", self.app)

    @property
    def head(self) -> Lines:
        """What stands above."""
        return cast("Lines", self.query_one("#head"))

    @property
    def body(self) -> Lines:
        """What is scrolled."""
        return cast("Lines", self.query_one("#body"))

    @property
    def _is_composed(self) -> bool:
        """Whether it has its parts: one that a key opened after the end had begun is given none."""
        return bool(self.query(Lines))

    def on_mount(self) -> None:
        """Begin in the body."""
        if self._is_composed:
            self.head.can_focus = False
            self.head.styles.height = self.HEAD
            self.body.focus()

    def on_screen_resume(self) -> None:
        """Show what came while another screen was there."""
        self.call_after_refresh(self.update)

    def on_resize(self) -> None:
        """Fit another size."""
        self.call_after_refresh(self.update)

    def update(self) -> None:
        """Show what there is, once there is a place for it."""
        if self.is_mounted and self._is_composed and self.body.size.width:
            self.show(self.body.size.width)

    @abstractmethod
    def show(self, width: int) -> None:
        """Show what there is."""
