"""kvmstats export: whoever asks is answered, nobody can keep it from that, and it ends and gives up what it should."""

import http.client
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path

import prometheus_client
import pytest
from helpers import NOBODY, exit_status, forked, open_fds, until, watchdog
from holder import Holder
from nursery import Nursery
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvmstats_fast import cli
from kvmstats_fast.export import serve
from kvmstats_fast.export.notify import notify
from kvmstats_fast.export.serve import LOOPBACK, listen, parse_address, serving
from kvmstats_fast.export.textfile import write_textfile
from kvmstats_fast.testing import exit_counter

#: Names of guests that no other VM of the host has.
WEB, DB = (f"{name}-{os.getpid()}" for name in ("web", "db"))
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root has capabilities to give up")


class Families:
    """A collector of one gauge, which takes its time if told so."""

    def __init__(self):
        self.gate, self.error, self.calls = None, None, 0

    def describe(self):
        """Nothing."""
        return []

    def collect(self):
        """Give the gauge."""
        self.calls += 1
        if self.error:
            raise self.error
        if self.gate:
            self.gate.wait(10)
        yield prometheus_client.core.GaugeMetricFamily("one", "One.", 1)


@contextmanager
def served(host="127.0.0.1", deadline=30.0, say=lambda _: None):
    """A server of one gauge: (port, the collector)."""
    families = Families()
    registry = prometheus_client.CollectorRegistry()
    registry.register(families)
    with listen(host, 0, deadline) as server, serving(server, registry, say):
        yield server.server_port, families


def ask(port, path="/metrics", method="GET", host="127.0.0.1", **headers):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


METRIC = b"# HELP one One.\n# TYPE one gauge\none 1.0\n"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10203", ("127.0.0.1", 10203)),
        ("[::1]:0", ("::1", 0)),
        ("10203", ("127.0.0.1", 10203)),
        ("localhost:65535", ("localhost", 65535)),
        ("0.0.0.0:9000", ("0.0.0.0", 9000)),
        ("[fe80::1%eth0]:9000", ("fe80::1%eth0", 9000)),
    ],
)
def test_an_address_is_read_as_it_is_meant(text, address):
    """A port alone is loopback's."""
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", ":9000", "::1:9000", "host", "host:", "host:65536", "-1", "a b:1", "[::1]", "host:1x"]
)
def test_an_address_that_is_none_is_refused(text):
    """And `:9000`, which other programs take for all addresses, is not loopback by mistake."""
    with pytest.raises(ValueError, match="is not an address such as"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_metrics_are_at_metrics(host):
    """GET and HEAD, in plain text, in OpenMetrics, compressed; a page that leads there; nothing else."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"no {host} here: {error.strerror}")
    with served(host) as (port, families):
        status, headers, body = ask(port, host=host)
        assert (status, body) == (200, METRIC)
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with socket.create_connection((host, port), timeout=10) as plain:
            plain.sendall(b"HEAD /metrics HTTP/1.0\r\n\r\n")
            answer = plain.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n")
        assert ask(port, host=host, method="HEAD")[1]["Content-Length"] == str(len(METRIC))
        openmetrics = ask(port, host=host, Accept="application/openmetrics-text; version=1.0.0")
        assert openmetrics[2].endswith(b"# EOF\n")
        assert ask(port, host=host, **{"Accept-Encoding": "gzip"})[1]["Content-Encoding"] == "gzip"
        assert b'href="/metrics"' in ask(port, "/", host=host)[2]
        calls = families.calls
        assert [ask(port, path, host=host)[0] for path in ("/metric", "/metrics/", "/favicon.ico")] == [404] * 3
        assert [ask(port, host=host, method=method)[0] for method in ("POST", "PUT", "DELETE", "X" * 100)] == [405] * 4
        assert families.calls == calls  # none of that reads a VM


def test_a_scrape_that_fails_is_told_to_both_sides_and_the_next_may_succeed():
    """Status 500 with the reason in one line; no traceback."""
    said = []
    with served(say=said.append) as (port, families):
        families.error = OSError(24, "Too many\nopen files")
        status, _, body = ask(port)
        assert (status, body) == (500, b"Too many\\nopen files\n")
        assert said == ["a scrape failed: Too many\\nopen files"]
        families.error = None
        assert ask(port)[0] == 200


def test_scrapes_at_the_same_time_are_all_answered():
    """Each in a thread of its own: none waits for one that takes long."""
    with served() as (port, families):
        families.gate = threading.Event()
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(port)[0])) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert until(lambda: families.calls == 8)
        assert ask(port, "/")[0] == 200
        families.gate.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * 8


def is_cut(connection):
    """Send a byte; return whether the other side has closed the connection."""
    try:
        connection.sendall(b"x")
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_client_that_dawdles_is_cut(sent, capfd):
    """At its deadline, even if it sends a byte now and then, and meanwhile others are answered."""
    with served(deadline=0.3) as (port, _):
        fds = open_fds()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(sent)
            assert until(lambda: ask(port)[0] != 200 or is_cut(slow))
            assert ask(port)[0] == 200
        assert until(lambda: open_fds() <= fds)
    assert capfd.readouterr().err == ""


def test_a_client_that_does_not_read_is_cut(capfd):
    """Its answer may be longer than what the kernel takes."""
    with served(deadline=0.3) as (port, families):
        threads = threading.active_count()
        families.collect = lambda: [prometheus_client.core.GaugeMetricFamily("one", "x" * (32 << 20), 1)]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert until(lambda: threading.active_count() > threads)
            assert until(lambda: threading.active_count() == threads)
        families.collect = Families().collect
        assert ask(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_a_client_that_hangs_up_rudely_is_survived(capfd):
    """Before it has asked, in the middle, and before it is answered; nothing is said of it."""
    with served() as (port, families):
        threads = threading.active_count()
        families.gate = threading.Event()
        for sent in (b"", b"GET /met", b"GET /metrics HTTP/1.0\r\n\r\n"):
            rude = socket.create_connection(("127.0.0.1", port), timeout=10)
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
            rude.sendall(sent)
            time.sleep(0.1)
            rude.close()
        families.gate.set()
        assert until(lambda: threading.active_count() == threads)
        assert ask(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_many_idle_connections_do_not_keep_others_out(monkeypatch):
    """The oldest is cut for one more."""
    monkeypatch.setattr(serve, "_MOST", 4)
    with served() as (port, _), ExitStack() as idle:
        crowd = [idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(12)]
        assert ask(port)[0] == 200
        assert crowd[0].recv(1) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET /metrics?%00%ff&name[]=\xff HTTP/1.1\r\n\r\n",
        b"\0" * 1000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_survived(sent, capfd):
    """No traceback, and the next is answered."""
    with served() as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as odd:
            odd.sendall(sent)
            odd.shutdown(socket.SHUT_WR)
            while odd.recv(65536):
                pass
        assert ask(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_an_address_that_is_taken_is_named():
    """Status 1, one line."""
    with (
        served() as (port, _),
        pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in"),
    ):
        listen("127.0.0.1", port)


def test_all_addresses_are_those_of_both_versions():
    """[::] serves 127.0.0.1, too."""
    try:
        server = listen("::", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    registry = prometheus_client.CollectorRegistry()
    registry.register(Families())
    with server, serving(server, registry):
        assert [ask(server.server_port, host=host)[0] for host in ("127.0.0.1", "::1")] == [200, 200]
        assert server.url == f"http://[::]:{server.server_port}/metrics"


def test_the_address_is_free_again_at_the_end():
    """Also while clients are connected."""
    with served() as (port, _):
        client = socket.create_connection(("127.0.0.1", port))
    with client, listen("127.0.0.1", port):
        pass


# ---- the file


def test_a_textfile_is_there_whole_and_for_all_to_read(tmp_path):
    """A reader never sees half of it; what cannot be written leaves the old one, and nothing beside it."""
    path = tmp_path / "kvm.prom"
    families = Families()
    registry = prometheus_client.CollectorRegistry()
    registry.register(families)
    previous = os.umask(0o077)
    try:
        write_textfile(path, registry)
        write_textfile(path, registry)
    finally:
        os.umask(previous)
    assert path.read_bytes() == METRIC
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    families.error = OSError("no")
    with pytest.raises(OSError, match="no"):
        write_textfile(path, registry)
    assert path.read_bytes() == METRIC
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"does not end in \.prom"):
        write_textfile(tmp_path / "kvm.txt", registry)


# ---- systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(monkeypatch, tmp_path, abstract):
    """One datagram, to a path or an abstract name; without systemd, or with one that is gone, nothing happens."""
    address = f"\0kvmstats-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "not an address")
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


# ---- the command


@contextmanager
def exporting(*arguments, **options):
    """The command in a process of its own; its first lines of stderr, up to where it serves."""
    command = [sys.executable, "-m", "kvmstats_fast", "export", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as running:
        try:
            lines = []
            with watchdog(60):
                for line in running.stderr:
                    lines.append(line)
                    if re.match(r"kvmstats: \d+ VMs? at ", line):
                        break
            running.said = "".join(lines)
            found = re.search(r"http://127.0.0.1:(\d+)/metrics", running.said)
            running.port = int(found[1]) if found else None
            yield running
        finally:
            running.kill()


def samples(text):
    """{(name, vm): value} of a text; of several of one name and vm, the last."""
    if isinstance(text, bytes):
        text = text.decode()
    return {(one.name, one.labels.get("vm")): one.value for family in parse_text(text) for one in family.samples}


@pytest.mark.real_vm
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_vm_is_served_until_a_signal_comes(tmp_path, end):
    """The service manager is told of both ends; what comes later is served; the exit status is 0."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        Holder(name=WEB) as vmm,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with exporting(
            "--listen", "127.0.0.1:0", "-g", WEB, "-g", DB, "-e", "exits", "-e", exit_counter(), env=environment
        ) as running:
            assert manager.recv(100) == b"READY=1"
            vmm.do("guest.run(500)")
            assert samples(ask(running.port)[2])[f"kvm_vcpu_{exit_counter()}_total", WEB] >= 500
            with Holder(name=DB):
                assert until(lambda: ("kvm_vm_vcpus", DB) in samples(ask(running.port)[2]))
            assert until(lambda: ("kvm_vm_vcpus", DB) not in samples(ask(running.port)[2]))
            found = samples(ask(running.port)[2])
            assert found["process_open_fds", None] > 0
            assert ("kvm_vcpu_halt_wakeup_total", WEB) not in found
            running.send_signal(end)
            assert running.wait(10) == 0
            assert manager.recv(100) == b"STOPPING=1"
            assert "Traceback" not in running.stderr.read()


@pytest.mark.real_vm
def test_a_service_takes_its_textfile_along_and_n_leaves_it(tmp_path):
    """What nobody renews would be read for ever; with -n it is somebody else's, who renews it."""
    path = tmp_path / "kvm.prom"
    with Holder(name=WEB) as vmm:
        with exporting("--textfile", path, "-I", "50ms", "-p", vmm.pid, "--no-sched") as running:
            assert until(path.exists)
            first = path.stat().st_ino
            assert until(lambda: path.stat().st_ino != first)
            assert ("kvm_vcpu_exits_total", WEB) in samples(path.read_text())
            running.send_signal(signal.SIGHUP)  # of the terminal's end
            assert running.wait(10) == 0
        assert not list(tmp_path.iterdir())
        with exporting("--textfile", path, "-n", "2", "-I", "10ms", "-p", vmm.pid, "--no-sched") as running:
            assert running.wait(10) == 0
        found = samples(path.read_text())
        assert ("kvm_vcpu_exits_total", WEB) in found
        assert not any(name.startswith("process_") for name, _ in found)  # node_exporter has these itself


@pytest.mark.real_vm
def test_exporters_and_a_recorder_are_no_vms_to_each_other(tmp_path):
    """Not even in the moment in which one has a VM's own file in its hands, to mark it."""
    with (
        exporting("--listen", "0", "--no-sched") as one,
        exporting("--listen", "0", "--no-sched") as two,
        Nursery() as nursery,
    ):
        recorder = subprocess.Popen(
            [sys.executable, "-m", "kvmstats_fast", "record", "-e", "exits", "-o", tmp_path / "out"],
            stderr=subprocess.DEVNULL,
        )
        try:
            monitors = {str(process.pid) for process in (one, two, recorder)}
            for _ in range(4):
                nursery.bear(1)
                time.sleep(1.1)
                assert recorder.poll() is None
                for exporter in (one, two):
                    text = ask(exporter.port)[2]
                    shown = {sample.labels["pid"] for sample in family(text, "kvm_vm_info")}
                    assert str(nursery.alive[-1]) in shown
                    assert not monitors & shown
        finally:
            recorder.kill()
            recorder.wait()
        for exporter in (one, two):
            exporter.terminate()
            said = exporter.communicate()[1] + exporter.said
            assert not [line for line in said.splitlines() if any(f"process {pid} " in line for pid in monitors)]


def test_where_there_is_no_vm_it_serves_and_waits():
    """Of whoever may come: with nothing to show but itself."""
    with exporting(
        "--listen", "0", "-g", "nobody-is-called-so", "--listen", "[::1]:0" if socket.has_ipv6 else "0"
    ) as running:
        assert running.said.startswith("kvmstats: 0 VMs at http://127.0.0.1:")
        assert samples(ask(running.port)[2])["kvmstats_vms", None] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (
            ["--listen", ":9000"],
            2,
            "':9000' is not an address such as 127.0.0.1:9000, [::1]:9000 or 9000; 0.0.0.0:PORT",
        ),
        (["--textfile", "/tmp/x.txt"], 2, "does not end in .prom"),
        (["-n", "1"], 2, "-n is for writing a file: it needs --textfile"),
        (["-I", "1s"], 2, "-I is for writing a file"),
        (["--textfile", "/tmp/x.prom", "-n", "1", "--listen", "0"], 2, "give one or the other"),
        (["--listen", "0", "-p", "999999999"], 4, ""),
        (
            ["--textfile", "/nonexistent/x.prom", "-n", "1", "-g", "nobody-is-called-so"],
            1,
            "/nonexistent/x.prom: No such file",
        ),
        (["--listen", "203.0.113.1:0"], 1, "cannot listen on 203.0.113.1:0: "),
        (["--listen", "no.such.host.invalid:0"], 1, "cannot listen on no.such.host.invalid:0: "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, status, said):
    """With the exit status of all verbs."""
    done = subprocess.run(
        [sys.executable, "-m", "kvmstats_fast", "export", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.real_vm
def test_a_statistic_that_no_vm_has_is_an_error_of_the_command_line():
    """With what is near."""
    with Holder() as vmm:
        done = subprocess.run(
            [sys.executable, "-m", "kvmstats_fast", "export", "--listen", "0", "-p", str(vmm.pid), "-e", "exitz"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr.splitlines()[-1].partition(";")[2]) == (2, " did you mean exits, io_exits?")


def test_without_the_extra_it_says_what_to_install():
    """In the words that all extras have; and nothing of it is imported for other verbs, or for --help."""
    code = "import sys; sys.modules['prometheus_client'] = None; from kvmstats_fast import cli; sys.exit(cli.main())"
    for arguments, status, said in ((["export"], 1, "pip install 'kvmstats-fast[prometheus]'"), (["hold-path"], 0, "")):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, said in done.stderr) == (status, True)


def is_answered(port):
    """Whether somebody listens."""
    with suppress(ConnectionError):
        return ask(port, "/")[0] == 200
    return False


def family(text, name):
    """The samples of a family."""
    return next(one.samples for one in parse_text(text.decode()) if one.name == name)


def capabilities(pid):
    """{thread: (effective, permitted, bounding, no_new_privs)} of a process."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # the one that has just answered
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found[task.name] = (
            *(int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")),
            int(status["NoNewPrivs"]),
        )
    return found


TO_ATTACH = 1 << 2 | 1 << 19


@needs_root
@pytest.mark.real_vm
@pytest.mark.parametrize("once", [False, True])
def test_capabilities_are_given_up(once):
    """By every thread: all but those that attaching takes; with --attach-once all. What is there is read on."""
    with Nursery() as nursery:
        nursery.bear(1)
        with exporting("--listen", "0", "-g", nursery.name, *["--attach-once"] * once) as running:
            ask(running.port)
            kept = 0 if once else TO_ATTACH
            assert set(capabilities(running.pid).values()) == {(kept, kept, kept, 1)}
            assert len(capabilities(running.pid)) >= 3  # the watch over VMMs, and who serves
            nursery.bear(1)
            assert until(lambda: samples(ask(running.port)[2])["kvmstats_vms", None] == (1 if once else 2))
            time.sleep(1.1)
            assert samples(ask(running.port)[2])["kvmstats_vms", None] == (1 if once else 2)
            nursery.kill(nursery.alive[0])
            assert until(lambda: samples(ask(running.port)[2])["kvmstats_vms", None] == (0 if once else 1))


@needs_root
@pytest.mark.real_vm
@pytest.mark.parametrize("capable", [False, True])
def test_two_capabilities_are_enough_for_vms_of_other_users(capable):
    """A user who has them exports the VM of another one; without them it is refused, and counted as such."""
    with Nursery() as nursery, socket.create_server((LOOPBACK, 0)) as taken:
        nursery.bear(1)
        port = taken.getsockname()[1]
        taken.close()
        arguments = ["export", "--listen", str(port), "-g", nursery.name]
        for module in ("concurrent.futures.thread", "kvmstats_fast.cli.export", "kvmstats_fast.cli._privileges"):
            import_module(module)  # now: another user may not read where Python is
        child = forked(lambda: cli.main(arguments), NOBODY, TO_ATTACH if capable else 0)
        try:
            assert until(lambda: is_answered(port))
            found = samples(ask(port)[2])
            refused = {one.labels["reason"]: one.value for one in family(ask(port)[2], "kvmstats_vms_refused")}
            assert found["kvmstats_vms", None] == capable
            assert (refused["not_permitted"] > 0) == (not capable)
            kept = TO_ATTACH if capable else 0
            assert {(*some[:2], some[3]) for some in capabilities(child).values()} == {(kept, kept, 1)}
        finally:
            os.kill(child, signal.SIGTERM)
            assert exit_status(child) == 0
