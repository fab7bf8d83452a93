"""Commands that a verb runs beside its own work, and the signals that end both."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmstats_fast.cli.run import not_started

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command; its failure has a shell's exit status."""
    try:
        return subprocess.Popen(command)  # noqa: S603 - what the user asks for
    except OSError as error:
        raise not_started(error) from None


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command; return its exit status as a shell has it."""
    status = process.wait()
    return status if status >= 0 else 128 - status


def call_at_end(process: subprocess.Popen[bytes], call: Callable[[], object]) -> None:
    """Call a function when a command has ended, in a thread of its own."""

    def wait() -> None:
        process.wait()
        call()

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def on_signals(numbers: Sequence[int], call: Callable[[], object]) -> Iterator[None]:
    """Call a function when one of these signals comes; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: call()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals(stop: Callable[[], object] = lambda: None) -> Iterator[threading.Event]:
    """Have Ctrl-C, SIGTERM and the end of the terminal end the work, whose result is then shown, as is ordinary."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        stop()

    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)  # ignored under nohup
    with on_signals((signal.SIGINT, signal.SIGTERM, *hang_up), end):
        yield ended
