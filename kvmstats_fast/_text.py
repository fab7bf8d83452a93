"""Text that other programs choose, made fit for messages."""

from __future__ import annotations


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
