"""The keys of ``kvmstats top``: in one table, of which the screen binds them and the help shows them."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """A key: keys that do the same are separated by commas.

    where: "" for everywhere, else the screen. short: its text at the bottom of the screen; empty: none.
    """

    keys: str
    shown: str
    action: str
    short: str
    text: str
    where: str = ""


KEYS = (
    Key("q", "q", "app.quit", "quit", "quit; so does Ctrl-C"),
    Key("question_mark,h", "?, h", "app.help", "help", "show these keys"),
    Key("b", "b", "by", "by vCPU", "rows of VMs, or of vCPUs", "table"),
    Key("enter", "Enter", "open", "open", "statistics and histograms of the VM or vCPU", "table"),
    Key("less_than_sign,left", "<, ←", "sort(-1)", "", "sort by the column to the left", "table"),
    Key("greater_than_sign,right", ">, →", "sort(1)", "", "sort by the column to the right; or click a title", "table"),
    Key("R", "R", "reverse", "", "reverse the order", "table"),
    Key("g,p", "g, p", "guests", "guests", "choose VMs: globs or parts of their names, or pids", "table"),
    Key("f", "f", "app.events", "stats", "choose statistics: globs or parts of their names: halt, pf_*"),
    Key("c", "c", "app.clear", "", "clear both choices"),
    Key("o", "o", "total", "total", "count since the reset, or in the last interval", "table"),
    Key("r", "r", "app.reset", "reset", "reset: count from here on"),
    Key("s", "s", "app.interval", "interval", "set the interval: 100ms, 2s; a bare number is seconds"),
    Key("space", "Space", "app.pause", "", "pause, or continue"),
    Key("full_stop", ".", "app.step", "", "recording: one step"),
    Key("plus,equals_sign", "+", "app.speed(2)", "", "recording: twice as fast"),
    Key("minus", "-", "app.speed(0.5)", "", "recording: half as fast"),
    Key("e", "e", "app.errors", "", "which processes are left out, and why; messages"),
    Key("escape,enter,backspace", "Esc", "back", "back", "back to all VMs", "page"),
    Key("left", "←", "vcpu(-1)", "", "the previous vCPU; before the first, the whole VM", "page"),
    Key("right", "→", "vcpu(1)", "vCPU", "the next vCPU", "page"),
    Key("ctrl+z", "Ctrl-Z", "app.suspend_process", "", "suspend; fg continues"),
)

#: What kvm_stat has, and this has not.
NOT_HERE = "kvm_stat's x has no meaning here: kinds of exits are statistics of their own."
