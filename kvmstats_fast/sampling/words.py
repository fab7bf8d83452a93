"""Words: which words are read of each kind of file, and where in a row they land."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._arguments import check_names, find_fitting
from kvmstats_fast._kvmstats import ffi
from kvmstats_fast.errors import unknown_stat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat


class Words:
    """Words of what is read, in the order in which a row has them.

    Parameters
    ----------
    words : sequence of int
    whole : int, optional
        Read all of so many words, if any.

    Attributes
    ----------
    first, count : int
        The words that are read.
    width : int
        How many of these make the row.
    gather : numpy.ndarray or None
        Which; None: all.
    indices : uint32_t *
        The same for the C core.
    """

    __slots__ = ("count", "first", "gather", "indices", "width")

    def __init__(self, words: Sequence[int], whole: int | None = None) -> None:
        self.width = len(words)
        self.gather: npt.NDArray[np.uint32] | None = None
        self.indices = ffi.NULL
        if isinstance(words, range):  # of 138, min and max would take longer than all the rest
            self.first, self.count = words.start, self.width
            return
        self.first = min(words, default=0) if whole is None else 0
        self.count = (max(words, default=-1) + 1 - self.first) if whole is None else whole
        if [*words] != [*range(self.first, self.first + self.count)]:
            self.gather = np.array(words, np.uint32) - np.uint32(self.first)
            self.indices = ffi.from_buffer("uint32_t[]", self.gather)

    def read_from(self, source: Any) -> tuple[Any, ...]:
        """Return the fields of a ``struct kvmstats_file`` that reads them."""
        position = source.position + self.first * source.value_size
        return source, position, self.count, self.indices, self.width


_NO_WORDS = Words(range(0))


class Row:
    """What a sweep reads of a file of one schema, and keeps.

    Parameters
    ----------
    schema : Schema
    own : int
        How many of its words are in the file; those behind them are in the schedstat of the vCPU's thread.
    found : iterable of dict, optional
        The statistics that each pattern fits; None: all.

    Attributes
    ----------
    schema : Schema
    places : dict
        Name to the statistic and the word of the row at which its values start.
    file, thread : Words
        What is read of the file, and behind it of the thread.
    width : int
        Words of the row.
    scratch_words : int
        Room that it takes to pick them out of what was read.
    """

    __slots__ = ("file", "places", "schema", "scratch_words", "thread", "width")

    def __init__(self, schema: Schema, own: int, found: Iterable[dict[str, Stat]] | None) -> None:
        self.schema = schema
        self.width = schema.num_values
        self.scratch_words = 0
        if found is None:
            self.places = schema.places
            self.file = Words(range(own))
            self.thread = Words(range(self.width - own)) if self.width > own else _NO_WORDS
            return
        chosen: dict[str, Stat] = {}
        for stats in found:
            chosen.update(stats)
        starts = {name: stat.offset // 8 for name, stat in chosen.items()}
        in_file = [name for name in chosen if starts[name] < own]
        behind = [name for name in chosen if starts[name] >= own]
        words: list[int] = []
        found_at: dict[str, int] = {}
        for name in (*in_file, *behind):
            found_at[name] = len(words)
            words.extend(range(starts[name], starts[name] + chosen[name].size))
        self.places = {name: (stat, found_at[name]) for name, stat in chosen.items()}
        self.width = len(words)
        self.file = Words([word for word in words if word < own])
        # A schedstat is one text, all of which is read.
        self.thread = Words([word - own for word in words if word >= own], schema.num_values - own)
        gathered = [part.count for part in (self.file, self.thread) if part.gather is not None]
        self.scratch_words = max(gathered, default=0)


def choose_rows(
    own: Mapping[Schema, int], stats: str | Iterable[str] | None, absent: Collection[str] = ()
) -> dict[Schema, Row]:
    """Return what is read of the files of each schema; KeyError for a pattern that fits no statistic of any.

    Parameters
    ----------
    own : mapping
        The schemas, and how many words of each are in the file, as for `Row`.
    stats : str or iterable of str, optional
        Names or globs; None: all.
    absent : collection of str
        Statistics that may be chosen although no file has them.
    """
    if stats is None:
        return {schema: Row(schema, words, None) for schema, words in own.items()}
    patterns = check_names("stats", stats)
    found = {schema: [schema.matches(pattern) for pattern in patterns] for schema in own}
    for place, pattern in enumerate(patterns):
        if not any(some[place] for some in found.values()) and not find_fitting(pattern, absent):
            raise unknown_stat(pattern, chain.from_iterable(own), "these files")
    return {schema: Row(schema, own[schema], some) for schema, some in found.items()}
