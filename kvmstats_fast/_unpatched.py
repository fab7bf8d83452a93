"""The interpreter's own threads and polls, whatever a library has put in their place."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def unpatched(module: str, name: str) -> Any:
    """Return ``module.name`` as the interpreter has it.

    gevent and eventlet replace `_thread` and `select` by their own: a "thread" then runs in its creator's, with its
    signal mask, and a poll that blocks blocks them all; or the name is gone. Both keep the original.
    """
    if (monkey := sys.modules.get("gevent.monkey")) is not None:
        return monkey.get_original(module, name)
    if (patcher := sys.modules.get("eventlet.patcher")) is not None:
        return getattr(patcher.original(module), name)
    return getattr(import_module(module), name)
