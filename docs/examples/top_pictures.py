"""The pictures in docs/top.md: the screen of ``kvmstats top``, over VMs that never were.

    python docs/examples/top_pictures.py docs/img

They are drawn by textual itself, without a terminal, and refer to no font of the web.
"""

import asyncio
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvmstats_fast import Samples
from kvmstats_fast.schedstat import STATS
from kvmstats_fast.testing import SyntheticStats, make_samples
from kvmstats_fast.top.app import TopApp
from kvmstats_fast.top.feed import Feed
from kvmstats_fast.top.model import Model

#: Of each VM: vCPUs, exits a second of a vCPU by kind, and the shares of its time: run, poll, halted, steal.
VMS = {
    "web": (16, {"halt_exits": 2100, "io_exits": 900, "mmio_exits": 350, "irq_window_exits": 40}, (55, 3, 40, 2)),
    "db": (16, {"halt_exits": 5200, "mmio_exits": 2600, "irq_window_exits": 210}, (62, 9, 27, 1.4)),
    "build": (8, {"halt_exits": 90, "mmio_exits": 60, "irq_exits": 400}, (84, 0.1, 0.4, 15.2)),
    "cache": (8, {"halt_exits": 9100, "mmio_exits": 1500, "irq_window_exits": 330}, (21, 12, 66, 0.6)),
    "ci-1": (4, {"halt_exits": 400, "io_exits": 2900, "mmio_exits": 10}, (71, 1, 21, 6.3)),
    "ci-2": (4, {"halt_exits": 380, "io_exits": 2700, "mmio_exits": 10}, (69, 1, 22, 7.1)),
    "mail": (2, {"halt_exits": 210, "io_exits": 20, "mmio_exits": 40}, (2, 0.5, 97, 0.2)),
    "idle": (2, {"halt_exits": 31, "io_exits": 1}, (0.4, 0.2, 99, 0)),
}
SWEEPS = 4


def make_host() -> Samples:
    """Make samples of a host with these VMs up, a sweep a second."""
    with SyntheticStats() as one:
        stats = [*(replace(stat, offset=-1) for stat in one.stats.values()), *STATS]
    files, of = [], []
    for pid, (name, (vcpus, *about)) in enumerate(VMS.items(), 4242):
        owner = {"vm": name, "name": name, "pid": pid, "host": "host-a"}
        files += [SyntheticStats(kind="vcpu", stats=stats, vcpu_id=vcpu, **owner) for vcpu in range(vcpus)]
        of += [about] * vcpus
    draw = np.random.default_rng(1)

    def grow(per_second: list[float]) -> np.ndarray:
        some = np.array(per_second) * draw.uniform(0.7, 1.3, (SWEEPS, len(of)))
        return np.cumsum(some.astype(np.uint64), axis=0)

    names = dict.fromkeys(name for kinds, _ in of for name in kinds)
    values = {name: grow([kinds.get(name, 0) for kinds, _ in of]) for name in names}
    values["exits"] = sum(values.values())
    run, poll, _, steal = (grow([1e7 * share for share in column]) for column in zip(*(s for _, s in of), strict=True))
    second = 10**9 * np.arange(1, SWEEPS + 1, dtype=np.uint64)[:, None]
    halted = (np.maximum(second, run + poll + steal) - run - poll - steal) // 100 * 97
    values |= {"halt_poll_success_ns": poll // 2, "halt_poll_fail_ns": poll - poll // 2, "halt_wait_ns": halted}
    values |= {"sched_run_ns": run + poll, "sched_wait_ns": steal, "blocking": np.zeros((SWEEPS, len(of)), int)}
    values["halt_attempted_poll"] = values["halt_exits"]
    values["halt_successful_poll"] = values["halt_exits"] // 3
    shape = np.exp(-(((np.arange(32) - 16) / 4) ** 2)) / 7
    values["halt_wait_hist"] = (values["halt_exits"][:, :, None] * shape).astype(np.uint64)
    return make_samples(files, values, start="2026-11-27T14:03:18Z")


class Made(Feed):
    """Gives samples that were made up, once."""

    def __init__(self, samples: Samples) -> None:
        super().__init__(1.0)
        self._samples, self._end = samples, threading.Event()

    def _run(self) -> None:
        self._give(self._samples)
        self._has_begun.set()
        self._end.wait()

    def _wake(self) -> None:
        self._end.set()


async def draw(folder: Path, name: str, size: tuple[int, int], keys: list[str]) -> None:
    """Write the picture of a screen, after some keys were pressed."""
    feed = Made(make_host())
    app = TopApp(feed, Model(), "host-a")
    feed.start(app.take, app.wake)
    async with app.run_test(size=size) as pilot:
        await pilot.pause(0.5)
        await pilot.press(*keys)
        await pilot.pause(0.5)
        svg = app.export_screenshot(title="kvmstats top")
    feed.stop()
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    (folder / name).write_text(svg)
    print(folder / name, len(svg) // 1000, "kB")


async def main(folder: Path) -> None:
    """Draw them all."""
    await draw(folder, "top-80x24.svg", (80, 24), [])
    await draw(folder, "top-200x50.svg", (200, 50), ["b"])
    await draw(folder, "top-page.svg", (140, 36), ["down", "enter"])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
