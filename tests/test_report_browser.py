"""The page of a report as a browser shows it: sorted by a click, in the reader's colors, and without any request."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from test_report import run_of

from kvmstats_fast import cli

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
#: A folder to leave pictures in, for those who want to look.
PICTURES = os.environ.get("KVMSTATS_PICTURES")


class Browser:
    """A headless Chromium, spoken to by DevTools' protocol over two pipes."""

    def __init__(self, folder):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()

        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
        command += [f"--user-data-dir={folder}", "about:blank"]
        place = f'exec "$@" 3</proc/self/fd/{theirs_in} 4>/proc/self/fd/{theirs_out}'
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", place, "sh", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers, self._rest, self.events = count(1), b"", []
        self.session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _receive(self):
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **parameters):
        """Do a command, and return its answer; what happens meanwhile is in `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, method):
        """Wait until something happens."""
        while all(event.get("method") != method for event in self.events):
            self.events.append(self._receive())

    def value(self, expression):
        """Evaluate an expression of JavaScript."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, name, **parameters):
        """Return a screenshot, and leave it where those who want to look find it."""
        data = base64.b64decode(self("Page.captureScreenshot", **parameters)["data"])
        if PICTURES:
            (Path(PICTURES) / name).write_bytes(data)
        return data

    def requests(self):
        """Return the number and address of each request."""
        sent = [one["params"] for one in self.events if one.get("method") == "Network.requestWillBeSent"]
        return [(one["requestId"], one["request"]["url"]) for one in sent]

    def close(self):
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._out)
        os.close(self._in)


@contextmanager
def browser(folder):
    """A browser that has the page of a report before it."""
    page = folder / "page.html"
    run_of().save(folder / "made.npz")
    assert cli.main(["report", str(folder / "made.npz"), "--html", str(page)]) == 0
    one = Browser(folder / "profile")
    try:
        for domain in ("Page", "Network", "Log", "Runtime"):
            one(f"{domain}.enable")
        one("Emulation.setDeviceMetricsOverride", width=1000, height=1400, deviceScaleFactor=1, mobile=False)
        one("Page.navigate", url=page.as_uri())
        one.wait_for("Page.loadEventFired")
        yield one
    finally:
        one.close()


#: The names in the first column of the table whose first title is "statistic".
NAMES = """[...document.querySelectorAll("table.sortable")].find((table) =>
    table.tHead.textContent.startsWith("statistic"))"""
ROWS = f"[...({NAMES}).tBodies[0].rows].map((row) => row.cells[0].textContent)"
CLICK = "[...({NAMES}).tHead.querySelectorAll('button')].find((one) => one.textContent === {title}).click()"


def test_a_click_on_a_title_sorts_and_nothing_is_requested(tmp_path):
    """By value, the other way round with the second click; no request, no error, in light and dark, and in print."""
    with browser(tmp_path) as page:
        assert page.value(ROWS) == ["exits", "halt_exits", "io_exits", "halt_wait_ns", "memory"]
        click = CLICK.format(NAMES=NAMES, title='"total"')
        page.value(click)
        first = page.value(ROWS)
        page.value(click)
        assert page.value(ROWS) == first[::-1]
        assert {first[0], first[-1]} == {"exits", "halt_wait_ns"}
        page.value(CLICK.format(NAMES=NAMES, title='"statistic"'))
        assert page.value(ROWS) in (sorted(first), sorted(first, reverse=True))
        assert page.value(f"({NAMES}).tHead.querySelectorAll('[aria-sort]').length") == 1
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        light = page.picture("report-light.png")
        page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        dark = page.picture("report-dark.png")
        assert light.startswith(b"\x89PNG")
        assert light != dark
        page("Emulation.setEmulatedMedia", media="print", features=[])
        assert base64.b64decode(page("Page.printToPDF")["data"]).startswith(b"%PDF")
        assert [url[:5] for _, url in page.requests()] == ["file:"]
        page.value("fetch('https://example.com/').catch(() => 0); new Image().src = 'https://example.com/x.png'; 1")
        page("Page.captureScreenshot")  # so that what was tried has been told
        tried = [number for number, url in page.requests() if not url.startswith("file:")]
        blocked = {one["params"]["requestId"] for one in page.events if one.get("method") == "Network.loadingFailed"}
        assert blocked >= set(tried)
        assert not [event for event in page.events if event.get("method") == "Runtime.exceptionThrown"]
