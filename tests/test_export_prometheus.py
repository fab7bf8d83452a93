"""A real Prometheus scrapes kvmstats export; and what is shipped for it is fit for use: rules, a dashboard, a unit."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import until
from qemu import arguments, firmware, needs_qemu
from test_export_serve import exporting

import kvmstats_fast as kf
from kvmstats_fast.export.names import name_family

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RULES = DOCS / "prometheus" / "kvmstats.rules.yml"
DASHBOARD = json.loads((DOCS / "grafana" / "kvmstats.json").read_text())
UNIT = DOCS / "systemd" / "kvmstats-export.service"
PROMETHEUS, PROMTOOL, SYSTEMD = map(shutil.which, ("prometheus", "promtool", "systemd-analyze"))
needs_prometheus = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="there is no prometheus (apt-get install prometheus)"
)
needs_systemd = pytest.mark.skipif(not SYSTEMD, reason="there is no systemd-analyze (apt-get install systemd)")


class Prometheus:
    """A Prometheus that scrapes some ports of this host every other second."""

    def __init__(self, folder, ports, resources):
        config = folder / "prometheus.yml"
        targets = [f"127.0.0.1:{port}" for port in ports]
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
                    "rule_files": [str(RULES)],
                    "scrape_configs": [{"job_name": "kvm", "static_configs": [{"targets": targets}]}],
                }
            )
        )
        self.log = folder / "log"
        for _ in range(5):  # another process may be faster with a port
            with ExitStack() as free:
                port = free.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
            with self.log.open("wb") as log:
                process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log, stdout=log)
            resources.callback(process.wait)
            resources.callback(process.kill)
            self.url = f"http://127.0.0.1:{port}"
            if until(lambda process=process: process.poll() is not None or self._is_ready()) and process.poll() is None:
                return
        raise AssertionError(self.log.read_text())

    def _is_ready(self):
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    def get(self, path, **parameters):
        """The data of an answer of its API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression):
        """{labels: value} of what an expression gives now."""
        found = self.get("query", query=expression)["result"]
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found}

    def value(self, expression):
        """The only value; None if there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)


def panels():
    """The panels of the dashboard, also of rows that are folded."""
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


QUERIES = [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())]


def filled_in(expression):
    """A query as Grafana sends it when everything is chosen."""
    for name, value in (("$__rate_interval", "10s"), ("$instance", ".+"), ("$vm", ".+")):
        expression = expression.replace(name, value)
    assert "$" not in expression.replace('"$1"', ""), expression
    return expression


class Scene:
    """Two exporters, one of them of each vCPU, on a host with QEMU VMs; and a Prometheus that scrapes both."""

    def __init__(self, folder, resources):
        self._folder, self._resources = folder, resources
        self._bios = firmware(folder, "REST")
        self.names = [f"{name} {time.monotonic_ns()}" for name in ("web", "db")]
        self.web = self.boot(self.names[0], 2)
        guests = [word for name in self.names for word in ("-g", name)]
        exporters = [
            resources.enter_context(exporting("--listen", "127.0.0.1:0", *guests, *more))
            for more in ((), ("--per-vcpu",))
        ]
        self.ports = [exporter.port for exporter in exporters]
        self.prometheus = Prometheus(folder, self.ports, resources)
        self.by_vm, self.by_vcpu = (f'instance="127.0.0.1:{port}"' for port in self.ports)
        assert until(lambda: self.prometheus.value(f"kvm_vm_vcpus{{{self.of_web}}}") == 2)

    def wait_for_scrapes(self):
        """Wait until both exporters were scraped once more."""
        now = time.time()
        for instance in (self.by_vm, self.by_vcpu):
            query = f'timestamp(kvm_vm_vcpus{{{instance},vm="{self.names[0]}"}})'
            assert until(lambda query=query: (self.prometheus.value(query) or 0) > now)

    @property
    def of_web(self):
        """What selects the sums of the VM that is there from the start."""
        return f'{self.by_vm},vm="{self.names[0]}"'

    def boot(self, name, vcpus):
        """Start a QEMU."""
        more = ("-name", f"guest={name},debug-threads=on", *self._bios)
        command, _ = arguments(self._folder, *more, vcpus=vcpus)
        machine = self._resources.enter_context(kf.launch(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        self._resources.callback(machine.process.wait)
        self._resources.callback(machine.process.kill)
        assert until(lambda: machine.refresh() or len(machine.vcpus) == vcpus)
        return machine


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The host; the tests that use it have the marks of `on_the_scene`."""
    with ExitStack() as resources:
        yield Scene(tmp_path_factory.mktemp("scene"), resources)


def on_the_scene(test):
    """Mark a test that takes KVM, QEMU and Prometheus."""
    return pytest.mark.real_vm(needs_qemu(needs_prometheus(test)))


@on_the_scene
def test_prometheus_knows_of_a_vm_what_its_stats_files_say(scene):
    """Each statistic, of the VM and of each vCPU; of a VM that is stopped, so that all read the same."""
    web, prometheus, mine = scene.web, scene.prometheus, scene.of_web
    info = f'kvm_vm_info{{{mine},pid="{web.pid}",guest="{scene.names[0]}"}}'
    assert prometheus.value(info) == 1
    web.process.send_signal(signal.SIGSTOP)
    tasks = list(Path(f"/proc/{web.pid}/task").iterdir())
    assert until(lambda: all("\nState:\tT" in (task / "status").read_text() for task in tasks))
    snapshots = [file.snapshot() for file in web.vcpus]
    scene.wait_for_scrapes()
    assert [file.snapshot()["exits"] for file in web.vcpus] == [snapshot["exits"] for snapshot in snapshots]
    for name, one in web.vcpus[0].schema.items():
        metric = name_family("vcpu", one)
        values = [snapshot[name] for snapshot in snapshots]
        if one.is_histogram:
            assert prometheus.value(f"{metric.name}_count{{{mine}}}") == sum(int(value.sum()) for value in values)
            below = prometheus.value(f'sum({metric.name}_bucket{{{mine},le="3e-09"}})')
            assert below == sum(int(value[:3].sum()) for value in values)
        else:
            sample = metric.name + ("_total" if metric.type == "counter" else "")
            wanted = [one.to_base_units(int(value)) for value in values]
            total = one.to_base_units(sum(map(int, values)))
            assert prometheus.value(f"{sample}{{{mine}}}") == pytest.approx(total, rel=1e-15), name
            each = prometheus.query(f'sum by (vcpu) ({sample}{{{scene.by_vcpu},vm="{scene.names[0]}"}})')
            assert {dict(key)["vcpu"]: value for key, value in each.items()} == pytest.approx(
                {str(i): value for i, value in enumerate(wanted)}, rel=1e-15
            ), name
    assert prometheus.value(f"kvm_vm_pages_4k{{{mine}}}") == web.vm.snapshot()["pages_4k"]
    web.process.send_signal(signal.SIGCONT)
    assert until(lambda: prometheus.value(f"rate(kvm_vcpu_sched_run_seconds_total{{{mine}}}[10s])"))


@on_the_scene
def test_each_query_of_the_dashboard_and_each_rule_gives_data(scene):
    """With all variables chosen; and the variables have values to choose."""
    prometheus = scene.prometheus
    assert until(lambda: prometheus.query(f"rate(kvm_vcpu_exits_total{{{scene.of_web}}}[10s])"))
    assert until(lambda: prometheus.query(f'rate(kvm_vcpu_exits_total{{{scene.by_vcpu},vcpu="1"}}[10s])'))
    empty = {(title, query) for title, query in QUERIES if not prometheus.query(filled_in(query))}
    assert not empty
    assert len(QUERIES) >= 25
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            query = filled_in(variable["query"]["query"])
            metric, values = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
            assert prometheus.query(f"count by ({values}) ({metric})"), variable["name"]
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    for rule in rules:
        assert rule["type"] == "alerting" or until(lambda rule=rule: prometheus.query(rule["name"])), rule["name"]
    assert {rule["health"] for rule in prometheus.get("rules")["groups"][0]["rules"]} == {"ok"}


@on_the_scene
def test_a_vm_that_comes_is_there_at_the_next_scrape_and_one_that_goes_is_not(scene):
    """Its series are stale at once, not in five minutes; no scrape fails, nothing could not be read."""
    prometheus = scene.prometheus
    theirs = f'{scene.by_vm},vm="{scene.names[1]}"'
    for _ in range(2):
        db = scene.boot(scene.names[1], 1)
        assert until(lambda: prometheus.value(f"kvm_vm_vcpus{{{theirs}}}") == 1)
        assert prometheus.value(f"kvm_vcpu_sched_timeslices_total{{{theirs}}}") > 0
        db.process.kill()
        assert until(lambda: prometheus.value(f"kvm_vm_vcpus{{{theirs}}}") is None)
        assert not prometheus.query(f'{{{theirs},__name__=~"kvm_.*"}}')
    assert prometheus.value(f"kvm_vm_vcpus{{{scene.of_web}}}") == 2
    assert set(prometheus.query("min_over_time(up[1m])").values()) == {1.0}
    assert set(prometheus.query("max_over_time(kvmstats_read_errors_total[1m])").values()) == {0.0}


@on_the_scene
def test_promtool_has_nothing_to_say_of_what_is_served(scene):
    """By VM and by vCPU."""
    for port in scene.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            text = answer.read()
        done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


@needs_prometheus
def test_the_rules_are_sound():
    """To Prometheus itself."""
    done = subprocess.run([PROMTOOL, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_the_unit_is_sound_and_opens_little(tmp_path):
    """To systemd itself, and no more exposed than "OK"; its command line is one that there is."""
    text = UNIT.read_text()
    command = re.search(r"ExecStart=(/usr/bin/kvmstats)( export.*)", text)
    script = Path(sys.executable).with_name("kvmstats")
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(command[1], str(script)))
    done = subprocess.run([SYSTEMD, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = subprocess.run(
        [SYSTEMD, "security", "--offline=yes", "--threshold=30", unit], capture_output=True, text=True, check=False
    )
    if "unrecognized option" not in done.stderr:  # before systemd 250
        assert done.returncode == 0, done.stdout[-1000:]
    assert "CAP_SYS_PTRACE CAP_DAC_READ_SEARCH" in text


def test_the_dashboard_asks_for_metrics_by_their_names():
    """Each name in it, and in the rules, is one that a kernel's statistic has, or the exporter itself."""
    from kvmstats_fast.testing.stat_lists import ARCHITECTURES, OPTIONS, stats_of  # noqa: PLC0415

    known = {"kvm_vm_vcpus", "kvmstats_vms", "kvmstats_vms_refused", "kvmstats_scrape_duration_seconds"}
    known |= {"kvmstats_read_errors_total", "kvmstats_vms_refused", "process_cpu_seconds_total"}
    for arch in ARCHITECTURES:
        for kind in ("vm", "vcpu"):
            for one in [*stats_of(arch, kind, merged=True, options=OPTIONS), *kf.schedstat.STATS]:
                family = name_family(kind, one)
                endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
                known |= {family.name + ending for ending in endings}
    rules = re.findall(r"(?<!:)\bkvm(?:stats)?_\w+", re.sub(r"record: .*|instance_\w+:\S+", "", RULES.read_text()))
    asked = {
        name
        for _, query in QUERIES
        for name in re.findall(r"\b(?:kvm_v|kvmstats_|process_)\w+", re.sub('"[^"]*"', "", query))
    }
    assert asked | set(rules) <= known
    assert len(asked) > 15
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    assert {panel["type"] for panel in panels()} == {"row", "stat", "timeseries", "bargauge", "heatmap"}
