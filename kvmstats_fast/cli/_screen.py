"""Where text goes: how wide it may be, whether it has color, and tables that fit."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from kvmstats_fast._text import display_width, format_table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_LEAST = 20  # columns
_UNKNOWN = 80  # columns of what is no terminal
_BOLD, _DIM, _RED, _GREEN, _CYAN = "1", "2", "31", "32", "36"
_LEAST_CELL = 8


def add_color(parser: argparse.ArgumentParser) -> None:
    """Add the argument that asks for color or forbids it."""
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="use color (default: on a terminal, unless NO_COLOR is set)",
    )


@dataclass(frozen=True, slots=True)
class Screen:
    """A terminal, or what takes its place.

    Attributes
    ----------
    output : text file
    width : int
        Columns; 80 where it is no terminal, but for what COLUMNS says.
    is_terminal : bool
        Whether anything is known of the width.
    has_color : bool
    encoding : str
    """

    output: TextIO
    width: int = _UNKNOWN
    is_terminal: bool = False
    has_color: bool = False
    encoding: str = "ascii"

    @classmethod
    def of(cls, output: TextIO, color: str = "auto") -> Screen:
        """Look at an output; `color` is what ``--color`` says."""
        is_tty = output.isatty()
        known = is_tty or "COLUMNS" in os.environ
        width = max(shutil.get_terminal_size().columns, _LEAST) if known else _UNKNOWN
        auto = is_tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        encoding = getattr(output, "encoding", None) or "ascii"
        return cls(output, width, known, color == "always" or (color == "auto" and auto), encoding)

    @property
    def has_blocks(self) -> bool:
        """Whether there are the characters that bars are of."""
        return self.encoding.lower().replace("-", "") == "utf8"

    def _encoded(self, text: str) -> str:
        """Return text with what cannot be shown escaped, which then has its width."""
        return text if text.isascii() else text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def title(self, text: str) -> str:
        """Return the name of what follows."""
        return self._paint(_BOLD, text)

    def head(self, text: str) -> str:
        """Return the titles of columns."""
        return self._paint(_DIM, text)

    def bar(self, text: str) -> str:
        """Return a bar."""
        return self._paint(_CYAN, text)

    def good(self, text: str) -> str:
        """Return what is as it should be."""
        return self._paint(_GREEN, text)

    def bad(self, text: str) -> str:
        """Return what is not as it should be."""
        return self._paint(_RED, text)

    def _paint(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_color and text else text

    def wrap(self, text: str, indent: str = "  ") -> list[str]:
        """Return text as lines, those but the first indented; as one where it is no terminal."""
        return wrap_text(text, self.width, indent) if self.is_terminal else [text]

    def print(self, *lines: str) -> None:
        """Print lines."""
        print("\n".join(lines), file=self.output)

    def table(self, rows: Sequence[Sequence[str]], align: str, drop: Sequence[int | tuple[int, ...]] = ()) -> list[str]:
        """Return a table, the first row a title; it is made to fit if this is a terminal (`fit_table`)."""
        cells = [[self._encoded(cell) for cell in row] for row in rows]
        lines = (
            fit_table(cells, align, self.width, drop) if self.is_terminal else format_table(cells, align).splitlines()
        )
        return [self.head(lines[0]), *lines[1:]]


def wrap_text(text: str, width: int, indent: str = "  ") -> list[str]:
    """Return text as lines that are no wider than that, those but the first indented; a longer word is on its own."""
    lines: list[str] = []
    line = ""
    start = text[: len(text) - len(text.lstrip())]
    for word in re.findall(r"\S+\s*", text):
        before = indent if lines else start
        if line and display_width(before + line + word.rstrip()) > width:
            lines.append((before + line).rstrip())
            line = ""
        line += word
    return [*lines, ((indent if lines else start) + line).rstrip()]


def fit_table(
    rows: Sequence[Sequence[str]], align: str, width: int, drop: Sequence[int | tuple[int, ...]] = ()
) -> list[str]:
    """Return the lines of a table that is no wider than that.

    Where there is no room, the columns `drop` go, one after the other or some together; then the widest cells are cut.
    """
    kept = list(range(len(align)))
    for columns in ((), *drop):
        gone = (columns,) if isinstance(columns, int) else columns
        kept = [one for one in kept if one not in gone]
        cells = [[row[one] for one in kept] for row in rows]
        lines = format_table(cells, sides := "".join(align[one] for one in kept)).splitlines()
        if max(map(display_width, lines)) <= width:
            return lines
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    widest = widths.index(max(widths))
    room = max(width - sum(widths) - 2 * (len(widths) - 1) + widths[widest], _LEAST_CELL)
    cut = [[_cut(cell, room) if place == widest else cell for place, cell in enumerate(row)] for row in cells]
    return format_table(cut, sides).splitlines()


def _cut(text: str, room: int) -> str:
    if display_width(text) <= room:
        return text
    while display_width(text) > room - 3:
        text = text[:-1]
    return text + "..."
