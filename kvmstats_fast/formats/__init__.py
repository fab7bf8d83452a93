"""Files and other libraries' objects; each library is an extra, imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, extra: str) -> Any:
    """Import a module of an extra; where it is missing, say how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, but lacks something of its own
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which this needs: pip install 'kvmstats-fast[{extra}]'", name=error.name
        ) from None
    except ImportError as error:
        if "failed to map segment" in str(error) or "Cannot allocate memory" in str(error):  # ld.so's words for it
            raise MemoryError(f"{module} cannot be loaded: {error}") from None
        raise
