"""DuckDB, whose version 2 needs Python 3.11."""

import pytest

try:
    import duckdb
except ImportError:
    duckdb = None

needs_duckdb = pytest.mark.skipif(duckdb is None, reason="there is no duckdb")
