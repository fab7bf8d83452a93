"""Text for terminals and messages: what other programs choose made printable, and tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def printable(text: str, most: int = 64) -> str:
    """Return text that neither a terminal acts on nor a line breaks at: escaped as in a Python string, and cut.

    Names of programs, guests and files, and the ids in stats files, are whatever their makers like: escape sequences,
    line breaks, characters that turn the writing direction.

    Parameters
    ----------
    text : str
    most : int
        How many of its characters are kept; dots take the place of the rest.
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def describe_error(error: Exception) -> str:
    """Return what an error says to who sits at a terminal: one line, without the number of its errno."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return printable(text, 1 << 14)


def waits_for(names: Sequence[object] | None) -> str:
    """Return what is said where none of the VMs that are wanted, by name or pid, is there yet."""
    which = [f"of process {one}" if isinstance(one, int) else f"called {printable(str(one))}" for one in names or ()]
    return f"no VM{' ' if which else ''}{' or '.join(which)} yet; it waits for one"


def format_table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Return a line for each row, with columns that line up two blanks apart.

    Parameters
    ----------
    rows : sequence of sequence of str
        The cells; a title row is a row.
    align : str
        ``<`` (left) or ``>`` (right) for each column.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = []
        for cell, width, side in zip(row, widths, align, strict=True):
            blanks = " " * (width - display_width(cell))
            line.append(cell + blanks if side == "<" else blanks + cell)
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Return how many cells of a terminal the text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    import unicodedata  # noqa: PLC0415 - its table, for names that have more than ASCII

    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def format_html(rows: Sequence[Sequence[str]], align: str) -> str:
    """Return the table that `format_table` gives as text, as HTML; its cells are escaped."""
    from html import escape  # noqa: PLC0415 - for notebooks alone

    lines = []
    for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False):
        sides = ("left" if side == "<" else "right" for side in align)
        cells = (
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def plain_number(value: float) -> float | None:
    """Return a number that JSON has; None for NaN and infinity."""
    return value if math.isfinite(value) else None


def format_number(value: float, form: str) -> str:
    """Return a number as `format` writes it; ``-`` for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def format_si(value: float, unit: str) -> str:
    """Write a value with at most three digits and the prefix that suits it, ``16.4 µs``; a mere number as it is."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞"
    if not unit:
        return f"{value:.6g}"
    value = float(f"{value:.3g}")  # 999.6 µs is 1 ms
    if value == 0:
        return f"0 {unit}"
    power = min(max(math.floor(math.log10(abs(value)) / 3), -4), 4)
    return f"{value / 10.0 ** (3 * power):.3g} {'pnµm kMGT'[power + 4].strip()}{unit}"
