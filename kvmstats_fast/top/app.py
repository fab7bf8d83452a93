"""TopApp: the application, what it says of itself, and the keys that every screen has."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import termios
import textwrap
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from textual.app import App
from textual.binding import Binding
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input, Label

from kvmstats_fast._text import describe_error, display_width, format_si, format_table, printable
from kvmstats_fast.cli._grammar import duration
from kvmstats_fast.top.feed import Replay
from kvmstats_fast.top.keys import KEYS, NOT_HERE
from kvmstats_fast.top.page_screen import TextScreen
from kvmstats_fast.top.table import globs
from kvmstats_fast.top.table_screen import TableScreen
from kvmstats_fast.top.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult
    from textual.events import Key

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.top.feed import Feed
    from kvmstats_fast.top.model import Model

#: However often it is sampled, there is a frame no sooner after another than this, in s.
_FRAME = 0.25
#: How long a message stands, and how often it is looked whether any VM is there, in s.
_MESSAGE, _WATCH = 5.0, 1.0
#: How many warnings are kept.
_MESSAGES = 50


class Prompt(ModalScreen[str | None]):
    """Asks for a line of text at the bottom of the screen."""

    CSS = """
    Prompt { background: transparent; layout: horizontal; align: left bottom; }
    Prompt Label { width: auto; height: 1; text-style: reverse; }
    Prompt Input { width: 1fr; height: 1; border: none; padding: 0; }
    Prompt Input:focus { border: none; }
    """

    def __init__(self, what: str, text: str) -> None:
        super().__init__()
        self._what, self._text = what, text

    def compose(self) -> ComposeResult:
        """Yield what is asked, and where the answer goes."""
        yield Label(f" {self._what}: ", markup=False)
        yield Input(self._text, compact=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the answer."""
        self.dismiss(event.value)

    def on_key(self, event: Key) -> None:
        """Take no answer."""
        if event.key == "escape":
            event.stop()
            self.dismiss(None)


class TopApp(App[None]):
    """What VMs do, on a screen.

    Parameters
    ----------
    feed : Feed
        It has been started, with `take` and `wake`.
    model : Model
    host : str
    count : int or None
        Frames until it ends.
    seconds : float or None
        Until it ends.
    """

    BINDINGS: ClassVar[Any] = [Binding("ctrl+c", "quit", show=False, priority=True)]
    ENABLE_COMMAND_PALETTE = False

    class Came(Message):
        """Samples came, or will not come any more."""

    def __init__(
        self, feed: Feed, model: Model, host: str = "", *, count: int | None = None, seconds: float | None = None
    ) -> None:
        super().__init__(ansi_color=True)
        self.feed, self.model, self._host = feed, model, host
        self._count, self._seconds = count, seconds
        self._is_awake = self._is_ready = self._is_paused = self._has_timer = False
        self._last_frame = 0.0
        self._message, self._until = "", 0.0
        self._messages: deque[str] = deque(maxlen=_MESSAGES)
        self._vms: int | None = None

    # ---- what comes from the thread that reads samples

    def take(self, samples: Samples) -> None:
        """Take samples; from any thread."""
        self.model.take(samples)
        self.wake()

    def wake(self) -> None:
        """Have it look at what came; from any thread, as often as one likes."""
        if self._is_ready and not self._is_awake:
            self._is_awake = True
            self.post_message(self.Came())

    def note(self, message: Warning | str, *_: object, **__: object) -> None:
        """Show a message for a while; from any thread. Takes what `warnings.showwarning` does.

        A warning is kept, and shown by itself only if it is the first of its kind: with each VM that comes, there may
        be another one.
        """
        text = printable(str(message), 500)
        if isinstance(message, Warning):
            is_known = any(_kind(text) == _kind(other) for other in self._messages)
            self._messages.append(text)
            if is_known:
                return
        self._message, self._until = text, time.monotonic() + _MESSAGE
        self.wake()

    # ---- its life

    def on_mount(self) -> None:
        """Begin."""
        self.theme = "ansi-dark"  # the colours of the terminal
        self.push_screen(TableScreen())
        self._is_ready = True
        self.set_interval(_WATCH, self._watch)
        if self._seconds is not None:
            self.set_timer(self._seconds, self.exit)
        with suppress(ValueError, RuntimeError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        self._watch()
        self.wake()

    def _end(self, number: int) -> None:
        """End because of a signal.

        Where the terminal is gone, nothing is left to put in order, and textual would wait for what nobody reads.
        """
        try:
            termios.tcgetattr(0)
        except termios.error:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.exit()

    def on_unmount(self) -> None:
        """Take nothing any more."""
        self._is_ready = False
        with suppress(ValueError, RuntimeError):
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().remove_signal_handler(number)

    def on_top_app_came(self) -> None:
        """Show what came, unless a frame was shown a moment ago."""
        self._is_awake = False
        left = self._last_frame + _FRAME - time.monotonic()
        if self._has_timer:
            return
        if left <= 0:
            self._show()
        else:
            self._has_timer = True
            self.set_timer(left, self._show)

    def _show(self) -> None:
        self._has_timer = False
        self._last_frame = time.monotonic()
        if not self._is_paused or isinstance(self.feed, Replay):
            self.model.advance()
        self.update()
        if self._count is not None and self.model.frames >= self._count:
            self.exit()

    def update(self) -> None:
        """Have the screens show what there is."""
        for screen in self.screen_stack:
            if isinstance(screen, View) and (screen is self.screen or isinstance(self.screen, Prompt)):
                screen.update()

    def _watch(self) -> None:
        """Look whether any VM is there, and what is said of those that cannot be had."""
        vms = self.feed.vms
        if vms == 0 and self.model.last:
            self.model.forget()
        if vms != self._vms or vms == 0 or (self._message and time.monotonic() > self._until):
            self._vms = vms
            self.wake()

    # ---- what it says of itself

    def describe(self, width: int, exits: float) -> str:
        """Return the title, which fits a width."""
        model, feed = self.model, self.feed
        clock = str(np.datetime64(model.wall_time, "ns").astype("datetime64[s]")) if model.wall_time else ""
        parts = {
            "what": "kvmstats top",
            "host": printable(self._host),
            "vms": _count(model.vms, "VM"),
            "vcpus": _count(model.vcpus, "vCPU"),
            "exits": f"{exits:,.0f} exits/s",
            "pace": f"replay x{feed.speed:g}" if isinstance(feed, Replay) else f"every {format_si(feed.interval, 's')}",
            "missed": f"{model.missed:,} missed" if model.missed else "",
            "clock": clock and f"{clock.replace('T', ' ') if feed.is_recorded else clock[11:]} UTC",
        }
        for least in ("host", "missed", "what", "pace", "vcpus", "clock", ""):
            text = "  ".join(filter(None, parts.values()))
            if display_width(text) <= width:
                break
            parts[least] = ""
        return text

    def state(self) -> tuple[str, str]:
        """Return what is the matter, and its style."""
        model, feed = self.model, self.feed
        if feed.error is not None:
            return f"sampling ended: {describe_error(feed.error)}", "error"
        if self._message and time.monotonic() < self._until:
            return self._message, "bold"
        self._message = ""
        said = []
        if feed.is_over:
            said.append("the recording has ended" if feed.is_recorded else "these VMs have ended")
        elif not model.last:
            said.append(feed.waits if feed.vms == 0 else "reading")
        if self._is_paused:
            said.append("paused (Space goes on)")
        if model.is_total:
            said.append("since the reset")
        said += [
            f"{what}: {' '.join(some)}"
            for what, some in (
                ("no statistic fits" if model.last and not model.has_events else "statistics", model.events),
                ("guests", model.guests),
            )
            if some
        ]
        if refused := feed.refused:
            said.append(f"{_count(len(refused), 'process')} left out (e says why)")
        return printable("  ".join(said), 500), "bold"

    def ask(self, what: str, text: str, take: Callable[[str], None]) -> None:
        """Ask for a line of text, and show what comes of it; ValueError and the like of `take` are messages."""

        def answer(given: str | None) -> None:
            if given is not None:
                try:
                    take(given)
                except (ValueError, argparse.ArgumentTypeError) as error:
                    self.note(str(error))
            self.update()

        self.push_screen(Prompt(what, text), answer)

    # ---- its keys

    def action_help(self) -> None:
        """Show the keys."""
        where = {"": "", "table": "", "page": "on the page of a VM"}
        rows = [(f" {key.shown}", key.text, where[key.where]) for key in KEYS]
        about = [
            f" {line}" for line in (NOT_HERE, "steal is red above 5 %. The man page and docs/top.md have the rest.")
        ]
        self.push_screen(TextScreen(" Keys", [*format_table(rows, "<<<").splitlines(), "", *about]))

    def action_errors(self) -> None:
        """Show which processes are left out, and why; and what was said."""
        left_out = [f"process {pid} is left out: {printable(why, 4000)}" for pid, why in self.feed.refused.items()]
        lines = []
        for text in [*left_out, *self._messages] or ["No process is left out, and nothing was said."]:
            lines += textwrap.wrap(text, max(self.size.width - 4, 20), initial_indent=" ", subsequent_indent="   ")
        self.push_screen(TextScreen(" Left out, and messages", lines))

    def action_events(self) -> None:
        """Ask which statistics are shown."""

        def choose(text: str) -> None:
            self.model.events = globs(text)

        self.ask("statistics", " ".join(self.model.events), choose)

    def action_clear(self) -> None:
        """Show all VMs, and exits by kind."""
        self.model.events = self.model.guests = ()
        self.update()

    def action_reset(self) -> None:
        """Count from here on."""
        self.model.reset()
        self.update()

    def action_interval(self) -> None:
        """Ask for another interval."""
        self.ask("interval, such as 100ms or 2s", "", lambda text: self.feed.change(duration(text.strip())))

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self._is_paused = not self._is_paused
        if isinstance(self.feed, Replay):
            self.feed.pause(is_paused=self._is_paused)
        self.wake()

    def action_step(self) -> None:
        """Take the next step of a recording."""
        if isinstance(self.feed, Replay):
            self.feed.step()

    def action_speed(self, factor: float) -> None:
        """Replay faster or slower."""
        if isinstance(self.feed, Replay):
            self.feed.change_speed(factor)
            self.update()


def _kind(text: str) -> str:
    """Return what messages about other things of the same kind have in common."""
    return " ".join(word for word in text.split() if not re.search("[0-9]", word))


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"
