"""The screen of kvmstats top, driven by textual's pilot and in a real terminal."""

import asyncio
import fcntl
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from holder import Holder
from made_vms import moved, vm

pytest.importorskip("textual", reason="needs textual: pip install 'kvmstats-fast[tui]'")

import kvmstats_fast as kf
from kvmstats_fast.testing import make_samples
from kvmstats_fast.top import app as rooms
from kvmstats_fast.top.app import Prompt, TopApp
from kvmstats_fast.top.feed import Feed, Replay
from kvmstats_fast.top.keys import KEYS
from kvmstats_fast.top.model import Model
from kvmstats_fast.top.page_screen import PageScreen, TextScreen
from kvmstats_fast.top.table_screen import TableScreen


@pytest.fixture(autouse=True)
def every_frame(monkeypatch):
    """Show what came at once, however soon after what came before."""
    monkeypatch.setattr(rooms, "_FRAME", 0)


class Still(Feed):
    """A feed that gives what a test tells it to."""

    def __init__(self):
        super().__init__(1.0)
        self._go, self.raises, self.attached, self.left_out = threading.Event(), None, 1, {}

    def _run(self):
        self._has_begun.set()
        self._go.wait()
        if self.raises:
            raise self.raises

    def _wake(self):
        self._go.set()

    @property
    def vms(self):
        """How many there are."""
        return self.attached

    @property
    def refused(self):
        """Who is left out."""
        return self.left_out


@asynccontextmanager
async def running(feed=None, size=(80, 24), **limits):
    """The application on a terminal of that size, with a feed, and a pilot at its keys."""
    feed = Still() if feed is None else feed
    app = TopApp(feed, Model(), "here", **limits)
    feed.start(app.take, app.wake)
    try:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            for name in ("press", "click", "resize_terminal"):
                setattr(pilot, name, and_settle(pilot, getattr(pilot, name)))
            yield pilot
    finally:
        feed.stop()
    assert not app.return_code


async def settle(pilot):
    """Wait until what follows from what was done has been done, and what follows from that."""
    for _ in range(2):
        await pilot.pause()


def and_settle(pilot, do):
    """Have the pilot wait until something has had its effect."""

    async def doing(*arguments, **more):
        await do(*arguments, **more)
        await settle(pilot)

    return doing


async def give(pilot, samples):
    """Have samples come, and be shown."""
    await asyncio.to_thread(pilot.app.take, samples)
    await settle(pilot)


def seen(pilot):
    """What is on the terminal, as lines."""
    width, height = pilot.app.size
    strips = pilot.app.screen._compositor.render_strips()
    lines = ["".join(segment.text for segment in strip).ljust(width) for strip in strips]
    assert len(lines) == height
    return lines


def rows(pilot):
    """The first cells of the rows of the table."""
    return [line.split("  ")[0].strip() for line in seen(pilot)[4:-1] if line.strip("▁▂▃▄▅▆▇█ ")]


def run(test, *arguments, **more):
    """Run a coroutine; one that hangs ends, if late: the host may be busy."""
    asyncio.run(asyncio.wait_for(test(*arguments, **more), 300))


HOST = [*vm("web", 4), *vm("db", 2), *vm("app", 1)]


def test_keys_sort_by_every_column_and_reverse():
    """The order of the rows is that of the column whose title is marked; it is there in a narrow terminal, too."""

    async def test(width):
        async with running(size=(width, 24)) as pilot:
            await give(pilot, moved(HOST, 3))
            table = pilot.app.screen.table
            sorts, titles = [], []
            for _ in pilot.app.model.sorts(table):
                sort = table.nearest(pilot.app.model.sort)
                assert rows(pilot) == [table.rows[at].label for at in table.order(sort)]
                titles.append(re.search(r"(\S+)[▲▼]", seen(pilot)[3])[1])
                if width > 50:
                    await pilot.press("R")
                    assert rows(pilot) == [table.rows[at].label for at in table.order(sort, reverse=True)]
                await pilot.press("greater_than_sign")
                sorts.append(sort)
            assert sorted(sorts) == sorted(pilot.app.model.sorts(table))
            assert titles[0] == "exits"
            assert {"VM", "vCPUs", "run", "halted", "steal", "success"} <= set(titles)
            await pilot.press("left", "less_than_sign", "right", "right")
            assert re.search(r"(\S+)[▲▼]", seen(pilot)[3])[1] == titles[0]

    run(test, 200)
    run(test, 50)


def test_a_click_on_a_title_sorts_and_on_a_row_opens_it():
    """A second click on the title reverses."""

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            await pilot.click(offset=(1, 3))
            assert rows(pilot) == ["app", "db", "web"]
            await pilot.click(offset=(1, 3))
            assert rows(pilot) == ["web", "db", "app"]
            await pilot.click(offset=(1, 5))
            assert isinstance(pilot.app.screen, PageScreen)
            assert seen(pilot)[0].startswith("VM db (pid ")

    run(test)


def test_filters_choose_vms_and_statistics_and_c_clears_them():
    """What is typed at the prompt; Escape leaves everything as it was."""

    async def test():
        async with running(size=(120, 24)) as pilot:
            await give(pilot, moved(HOST, 3))
            await pilot.press("g", *"w*b", "enter")
            assert rows(pilot) == ["web"]
            assert "guests: w*b" in seen(pilot)[1]
            await pilot.press("f", *"nosuch", "enter")
            assert "no statistic fits: *nosuch*" in seen(pilot)[1]
            pilot.app.model.events = ("exits",)  # which has a column of its own, whatever is chosen
            pilot.app.update()
            await settle(pilot)
            assert "statistics: exits" in seen(pilot)[1]
            pilot.app.model.events = ("*nosuch*",)
            await pilot.press("f", *["backspace"] * 8)
            await pilot.press(*"t_wait", "space", *"mmio", "enter")
            assert "statistics: *t_wait* *mmio*" in seen(pilot)[1]
            assert "halt_wait_ns" in seen(pilot)[3]
            assert "mmio_exits" in seen(pilot)[3]
            await pilot.press("g", *"db")
            assert isinstance(pilot.app.screen, Prompt)
            await pilot.press("escape")
            assert rows(pilot) == ["web"]
            await pilot.press("c")
            assert set(rows(pilot)) == {"web", "db", "app"}
            assert "halt_wait_ns" not in seen(pilot)[3]
            assert not seen(pilot)[1].strip()

    run(test)


def test_vms_come_and_go_on_the_screen():
    """The cursor stays on whose row it was on; where there is no VM any more it says so."""

    async def test():
        async with running() as pilot:
            feed = pilot.app.feed
            assert "reading" in seen(pilot)[1]
            feed.attached = 0
            pilot.app._watch()
            await settle(pilot)
            assert "no VM yet; it waits for one" in seen(pilot)[1]
            feed.attached = 1
            await give(pilot, moved(vm("web"), 3))
            assert rows(pilot) == ["web"]
            assert "1 VM " in seen(pilot)[0]
            assert "2 vCPUs" in seen(pilot)[0]
            await give(pilot, moved([*HOST, *vm("new")], 3))
            assert set(rows(pilot)) == {"web", "db", "app", "new"}
            await pilot.press("end")
            last = rows(pilot)[-1]
            assert pilot.app.screen.at.label == last
            await pilot.press("R")
            assert rows(pilot)[0] == pilot.app.screen.at.label == last
            await pilot.press("R")
            await give(pilot, moved([*vm("db"), *vm("new")], 3))
            assert set(rows(pilot)) == {"db", "new"}
            feed.attached = 0
            pilot.app._watch()
            pilot.app.wake()
            await settle(pilot)
            assert rows(pilot) == []
            assert "no VM yet; it waits for one" in seen(pilot)[1]

    run(test)


def test_the_row_of_the_cursor_alone_stands_out():
    """And goes with it from one row to the next."""

    def reversed_rows(pilot):
        strips = pilot.app.screen._compositor.render_strips()
        lines = [line for line, strip in enumerate(strips) if any(one.style and one.style.reverse for one in strip)]
        return [rows(pilot)[line - 4] for line in lines if line >= 4 and line < len(strips) - 1]

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            assert reversed_rows(pilot) == rows(pilot)[:1]
            await pilot.press("down")
            assert reversed_rows(pilot) == rows(pilot)[1:2]

    run(test)


_FDS = 4096


@pytest.fixture
def many_fds():
    """As many fds as a thousand vCPUs take: more than a user has as a rule, and fewer than one may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _FDS:
        pytest.skip(f"a thousand vCPUs take {_FDS} fds; this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, _FDS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_fds")
@pytest.mark.parametrize("count", [1, 60, 1000])
def test_any_number_of_vcpus_is_shown(count):
    """A row for each, of which those that are seen are drawn; End goes to the last, Enter opens it."""

    async def test():
        files = [one for number in range(-(-count // 8)) for one in vm(f"vm{number}", min(8, count - 8 * number))]
        async with running(size=(200, 50)) as pilot:
            await give(pilot, moved(files, 3))
            await pilot.press("b", "less_than_sign")
            assert f"{count:,} vCPU" in seen(pilot)[0]
            await pilot.press("end", "enter")
            page = pilot.app.screen
            assert page.who.vcpu == (count - 1) % 8
            assert seen(pilot)[0].startswith(f"vCPU {page.who.vcpu} of VM ")
            await pilot.press("right")
            await pilot.press("escape")
            before = pilot.app.screen.body
            await pilot.press("home")
            assert before.cursor == 0
            assert len(rows(pilot)) == min(count, 45)
            await pilot.press("end", "b")
            assert before.cursor == 0

    run(test)


def test_only_lines_that_changed_are_drawn():
    """What the same VM does again costs nothing; what another one does costs its line."""

    async def test():
        files = [*vm("web", 1), *vm("db", 1)]
        async with running() as pilot:

            def do(web, db, start):
                values = {"exits": [[0, 0], [web, db]]}
                return make_samples(files, values, start=f"2026-01-01T00:00:{start:02}Z")

            await give(pilot, do(200, 100, 0))
            body = pilot.app.screen.body
            drawn = []
            body.refresh_line = drawn.append
            await give(pilot, do(200, 100, 1))
            assert drawn == []
            await give(pilot, do(200, 101, 2))
            assert drawn == [1]

    run(test)


def test_the_terminal_may_change_its_size():
    """Columns fit it at once, and nothing is wider."""

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            titles = {}
            for size in ((200, 50), (50, 15), (20, 5), (80, 24)):
                await pilot.resize_terminal(*size)
                lines = seen(pilot)
                assert {len(line) for line in lines} == {size[0]}
                titles[size[0]] = lines[3].split()
            assert len(titles[200]) > len(titles[80]) > len(titles[50]) > len(titles[20])
            await pilot.press("enter")
            await pilot.resize_terminal(200, 50)
            assert any("exits" in line and "█" in line for line in seen(pilot))

    run(test)


def test_the_page_of_a_vm_goes_from_vcpu_to_vcpu_and_says_when_it_is_gone():
    """After the last there is the VM again; it is filled as samples come."""

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            await pilot.press("g", *"web", "enter", "enter")
            assert "2 s since the reset" in seen(pilot)[0]
            titles = []
            for _ in range(6):
                titles.append(seen(pilot)[0].split(" of ")[0].strip())
                await pilot.press("right")
            assert titles[1:5] == [f"vCPU {number}" for number in range(4)]
            assert titles[0] == titles[5]
            await pilot.press("left")
            before = seen(pilot)
            await give(pilot, moved(HOST, 5, 1, start_time=100 * 10**9))
            assert seen(pilot) != before
            await give(pilot, moved(vm("db"), 3))
            assert "it is gone" in seen(pilot)[0]
            await pilot.press("escape")
            assert isinstance(pilot.app.screen, TableScreen)
            assert rows(pilot) == []  # what it shows is of now

    run(test)


def test_a_reset_and_what_was_counted_since():
    """Key o shows means since the reset, r begins anew."""

    async def test():
        async with running() as pilot:
            files = vm("web", 1)

            def do(exits, start):
                return make_samples(files, {"exits": [[0], [exits]]}, start=f"2026-01-01T00:00:{start:02}Z")

            await give(pilot, do(1000, 0))
            await give(pilot, do(3000, 2))
            assert " 3,000 " in seen(pilot)[4]
            await pilot.press("o")
            assert " 2,000 " in seen(pilot)[4]
            assert "since the reset" in seen(pilot)[1]
            await pilot.press("r")
            await give(pilot, do(5000, 4))
            assert " 5,000 " in seen(pilot)[4]
            await pilot.press("o")
            assert "since" not in seen(pilot)[1]

    run(test)


def test_the_interval_is_set_while_it_runs():
    """In seconds where there is no unit, as kvm_stat's; what is no time is said, and changes nothing."""

    async def test():
        async with running() as pilot:
            changed = []
            pilot.app.feed.change = changed.append
            await pilot.press("s", *"250ms", "enter", "s", "2", "enter")
            assert changed == [0.25, 2.0]
            await pilot.press("s", *"soon", "enter")
            await settle(pilot)
            assert changed == [0.25, 2.0]
            assert "'soon' is not a time" in seen(pilot)[1]

    run(test)


def test_what_ends_the_sampling_is_shown_and_the_screen_stays():
    """An error is in its line until the user quits."""

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            pilot.app.feed.raises = OSError(24, "Too many open files")
            pilot.app.feed._wake()
            await asyncio.to_thread(pilot.app.feed._thread.join)
            pilot.app.wake()
            await settle(pilot)
            assert "sampling ended: Too many open files" in seen(pilot)[1]
            assert len(rows(pilot)) == 3

    run(test)


def test_what_cannot_be_had_is_counted_and_told():
    """Key e has the reasons whole; warnings are shown for a while, and no terminal acts on what is in them."""

    async def test():
        async with running() as pilot:
            await give(pilot, moved(HOST, 3))
            pilot.app.feed.left_out = {4711: "it holds no stats files. " + "What helps " * 30}
            pilot.app.wake()
            await settle(pilot)
            assert "1 process left out (e says why)" in seen(pilot)[1]
            await pilot.press("e")
            assert "process 4711 is left out: it holds no stats files" in " ".join(seen(pilot))
            assert " ".join(" ".join(seen(pilot)).split()).count("What helps") == 30
            await pilot.press("escape")
            pilot.app.note(UserWarning("no statistics of vcpu-1\x1b[2J"))
            await settle(pilot)
            assert "no statistics of vcpu-1\\x1b[2J" in seen(pilot)[1]
            pilot.app.note(UserWarning("no statistics of vcpu-2"))
            await settle(pilot)
            assert "vcpu-1" in seen(pilot)[1]
            await pilot.press("e")
            assert "no statistics of vcpu-2" in " ".join(seen(pilot))

    run(test)


def test_pause_holds_the_screen_and_not_the_counts():
    """What came meanwhile is in the next frame."""

    async def test():
        async with running() as pilot:
            run_of_all = moved(vm("web", 1), 5)
            await give(pilot, run_of_all[:2])
            before = seen(pilot)[4]
            await pilot.press("space")
            await give(pilot, run_of_all[1:])
            assert seen(pilot)[4] == before
            assert "paused" in seen(pilot)[1]
            await pilot.press("space")
            await settle(pilot)
            exits = int(run_of_all["exits"][-1, 0] - run_of_all["exits"][1, 0]) / 3
            assert f"{exits:,.0f}" in seen(pilot)[4]

    run(test)


def test_a_recording_is_replayed_paused_stepped_and_ends(tmp_path):
    """With its own time; the last step stays on the screen."""
    moved(vm("web"), 6).save(path := tmp_path / "run.npz")

    async def test():
        feed = Replay([str(path)])
        feed.pause(is_paused=True)
        async with running(feed) as pilot:
            pilot.app._is_paused = True

            async def reads(text, line=0):
                for _ in range(500):
                    if text in seen(pilot)[line]:
                        return True
                    await pilot.pause(0.02)
                return False

            assert await reads("2026-01-01 00:00:01 UTC")
            assert "replay x1" in seen(pilot)[0]
            await pilot.press("full_stop")
            assert await reads("2026-01-01 00:00:02 UTC")
            await pilot.press("plus", "plus")
            assert await reads("replay x4")
            await pilot.press("minus", "space")
            assert await reads("replay x2")
            assert await reads("2026-01-01 00:00:05 UTC")
            assert await reads("the recording has ended", 1)
            assert rows(pilot) == ["web"]

    run(test)


def test_the_help_has_every_key_and_every_key_does_something():
    """Each key of the table is bound where it says, to a method that is there, and is in the help."""

    async def test():
        async with running(size=(120, 40)) as pilot:
            await give(pilot, moved(HOST, 3))
            screens = {"table": TableScreen, "page": PageScreen}
            for key in KEYS:
                action = key.action.partition("(")[0]
                owner = TopApp if action.startswith("app.") else screens[key.where]
                assert hasattr(owner, f"action_{action.removeprefix('app.')}"), key
                where = [screens[key.where]] if key.where else screens.values()
                for screen in where:
                    assert {key.keys, key.action} <= {one for b in screen.BINDINGS for one in (b.key, b.action)}
            guide = Path(kf.__file__).parents[1] / "docs" / "top.md"
            documented = re.findall(
                r"^\| ((?:`.`|[A-Z]\S+).*?) \|", guide.read_text().partition("## Keys")[2], re.MULTILINE
            )
            for key in KEYS:
                shown = {one for one in key.shown.split(", ") if one not in "←→"}
                assert all(re.search(rf"(^|\W){re.escape(one)}(\W|$)", " ".join(documented)) for one in shown), key
            for key in ("question_mark", "h"):
                await pilot.press(key)
                assert isinstance(pilot.app.screen, TextScreen)
                for one in KEYS:
                    assert any(one.text in line for line in seen(pilot)), one
                await pilot.press("escape")
                assert isinstance(pilot.app.screen, TableScreen)
            await pilot.press("q")

    run(test)


def test_it_ends_after_so_many_intervals_or_so_long():
    """Of -n the first interval is the first that was counted."""

    async def test(limits, frames):
        async with running(**limits) as pilot:
            for at in range(frames):
                assert pilot.app.is_running, at
                await give(pilot, moved(HOST, 2, start_time=10**10 * at))
            for _ in range(500):
                if not pilot.app.is_running:
                    break
                await asyncio.sleep(0.01)
            assert not pilot.app.is_running

    run(test, {"count": 2}, 2)
    run(test, {"seconds": 0.05}, 0)


def test_however_often_it_is_sampled_there_are_few_frames(monkeypatch):
    """Chunks that come at once are one frame; the last of them is shown, too."""
    monkeypatch.setattr(rooms, "_FRAME", 0.1)

    async def test():
        async with running() as pilot:
            shown = []
            update = pilot.app.update
            pilot.app.update = lambda: (shown.append(1), update())
            whole = moved(vm("web"), 400)
            began = time.monotonic()
            for at in range(399):
                await asyncio.to_thread(pilot.app.take, whole[at : at + 2])
                await asyncio.sleep(0)
            took = time.monotonic() - began
            await pilot.pause(0.3)
            assert 1 <= len(shown) <= took / 0.1 + 3
            assert not pilot.app.model.advance()

    run(test)


# ---- a real terminal


class Terminal:
    """``kvmstats top`` on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(child)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmstats_fast", "top", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            # Its own terminal, which sends it SIGHUP when it is closed.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - it takes no lock
            env=os.environ | {"TERM": "xterm-256color"},
        )
        self.fd, self._child, self.text = parent, child, ""

    def reads(self, text, seconds=30):
        """Whether a text comes."""
        deadline = time.monotonic() + seconds
        while text not in self.text and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 1 << 16).decode(errors="replace")
            elif self.process.poll() is not None:
                break
        return text in self.text

    def end(self):
        """Its exit status; the terminal is as it was before."""
        reader = threading.Thread(target=self.reads, args=("no such text", 30), daemon=True)
        reader.start()
        status = self.process.wait(30)
        assert termios.tcgetattr(self._child) == self.before
        reader.join()
        os.close(self._child)
        os.close(self.fd)
        return status


@pytest.mark.real_vm
@pytest.mark.parametrize("how", ["q", "\x03", signal.SIGTERM, signal.SIGHUP, "the VM's end"])
def test_a_real_vm_on_a_real_terminal(how):
    """Its name is read there; whatever ends the program leaves the terminal as it was; and it is no VM itself."""
    with Holder(2, name="real-one") as holder:
        terminal = Terminal("-p", str(holder.pid), "-I", "100ms")
        assert terminal.reads("real-one")
        assert [one.pid for one in kf.find_vms() if one.pid in (holder.pid, terminal.process.pid)] == [holder.pid]
        if how == "the VM's end":
            holder.end()
            assert terminal.reads("these VMs have ended")
            how = "q"
        if isinstance(how, str):
            os.write(terminal.fd, how.encode() + b"e?g")  # keys that come too late open nothing
        else:
            terminal.process.send_signal(how)
        assert terminal.end() == 0
        assert "\x1b[?1049l" in terminal.text
        assert "Traceback" not in terminal.text


def test_where_the_terminal_goes_the_program_goes(tmp_path):
    """With the window closed, or the connection lost, nothing is left running."""
    moved(vm("web"), 1000).save(path := tmp_path / "run.npz")
    for _ in range(3):
        terminal = Terminal(str(path))
        assert terminal.reads("replay")
        os.close(terminal._child)
        os.close(terminal.fd)
        assert terminal.process.wait(20) == -signal.SIGHUP


def test_what_fails_at_once_is_one_line_and_its_status():
    """Nothing is drawn before it is known that there is something to show."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    terminal = Terminal("-p", str(gone.pid))
    assert terminal.end() == 4
    assert "\x1b[?1049h" not in terminal.text
    assert terminal.text.count("\n") == 1
    assert "Traceback" not in terminal.text
