"""PageScreen: one VM or vCPU; TextScreen: lines that are there to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kvmstats_fast._text import printable
from kvmstats_fast.top.page import make_page, seconds_of, vcpus_of
from kvmstats_fast.top.view import View, bindings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmstats_fast.top.table import Who


class PageScreen(View):
    """Statistics and histograms of a VM or vCPU."""

    BINDINGS: ClassVar[Any] = bindings("page")

    def __init__(self, who: Who) -> None:
        super().__init__()
        self.who = who

    def show(self, width: int) -> None:
        """Show its lines."""
        model, who = self.top.model, self.who
        vcpus = vcpus_of(model.total, who)
        pid = "" if who.pid is None else f" (pid {who.pid})"
        whole = f"VM {printable(who.vm)}{pid}, {len(vcpus)} vCPU{'' if len(vcpus) == 1 else 's'}"
        title = whole if who.vcpu is None else f"vCPU {who.vcpu} of {whole}"
        title += f", {seconds_of(model.total, who):,.0f} s since the reset" if model.has(who) else ": it is gone"
        self.head.show_all([((title, "bold"),), (self.top.state(),)])
        lines = make_page(model.last, model.total, who, width, model.events)
        self.body.show_all([((line, ""),) for line in lines])

    def action_vcpu(self, by: int) -> None:
        """Show the vCPU beside; before the first and after the last there is the whole VM."""
        several = [None, *vcpus_of(self.top.model.total, self.who)]
        at = several.index(self.who.vcpu) if self.who.vcpu in several else 0
        self.who = self.who.of(several[(at + by) % len(several)])
        self.body.scroll_home(animate=False)
        self.update()

    def action_back(self) -> None:
        """Go back to all VMs."""
        self.dismiss()


class TextScreen(View):
    """Lines that are there to be read."""

    BINDINGS: ClassVar[Any] = [one for one in bindings("page") if one.action in ("back", "app.quit")]

    def __init__(self, title: str, lines: Sequence[str]) -> None:
        super().__init__()
        self._title, self._lines = title, lines

    def show(self, width: int) -> None:  # noqa: ARG002 - it is cut where the screen ends
        """Show the lines."""
        self.head.show_all([((self._title, "bold"),), (("", ""),)])
        self.body.show_all([((line, ""),) for line in self._lines])

    def action_back(self) -> None:
        """Go back."""
        self.dismiss()
