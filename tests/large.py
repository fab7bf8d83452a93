"""Libraries that read what this one writes and that `[dev]` installs, but not `[test]`: they are 300 MB.

They are imported when they are used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

NAMES = ("asv", "dask", "duckdb", "polars")


def is_here(name):
    """Whether it is installed."""
    return find_spec(name) is not None


def why_missing(name):
    """Why a test that needs it is skipped; .ci/run ends where `[dev]` has not installed what it should have."""
    if name == "duckdb" and sys.version_info < (3, 11):
        return "there is no duckdb 2 for this Python"
    return f"there is no {name}, which `[dev]` installs"


def needs(text):
    """Marks for all that a text names."""
    return [pytest.mark.needs(name) for name in NAMES if name in text]


def params(names):
    """Parameters of a test, each with its marks."""
    return [pytest.param(name, marks=needs(name)) for name in names]


class _Library:
    """A module that is imported by its first use, of which pytest's looks for fixtures and marks are none."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name.startswith(("_", "pytest")):
            raise AttributeError(name)
        return getattr(import_module(self._name), name)


dask_frames, duckdb, polars = map(_Library, ("dask.dataframe", "duckdb", "polars"))
