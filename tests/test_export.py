"""export: what Prometheus is told of VMs is what their stats files say, whatever comes and goes."""

import errno
import os
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
from helpers import exit_status, forked, numbers, open_fds, until
from holder import Holder
from nursery import Nursery
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import kvmstats_fast as kf
from kvmstats_fast.abi import StatBase, StatType, StatUnit
from kvmstats_fast.export import Collector
from kvmstats_fast.export import collector as collector_module
from kvmstats_fast.export.names import bucket_bounds, find_sum, name_family
from kvmstats_fast.schedstat import STATS
from kvmstats_fast.stat import Stat
from kvmstats_fast.testing import SyntheticStats, exit_counter
from kvmstats_fast.testing.stat_lists import ARCHITECTURES, OPTIONS, stats_of
from kvmstats_fast.vmm.roster import REASONS, Refusal

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (apt-get install prometheus)")
unknown_threads = pytest.mark.filterwarnings("ignore:no sched_:kvmstats_fast.errors.SamplingWarning")
#: How many VMs are born and die while they are scraped; the whole proof is KVMSTATS_BIRTHS=200.
BIRTHS = int(os.environ.get("KVMSTATS_BIRTHS", "8"))


def stat(name, type_=StatType.CUMULATIVE, unit=StatUnit.NONE, exponent=0, *, base=StatBase.POW10, size=1, width=0):
    """A statistic, as a descriptor has it."""
    return Stat(name, type_, unit, base, exponent, size, -1, width)


def ns(name, type_=StatType.CUMULATIVE, size=1):
    """A statistic in nanoseconds."""
    return stat(name, type_, StatUnit.SECONDS, -9, size=size)


def scrape(collector):
    """What a collector gives, by name and labels: {(name, {(label, value)}): value}."""
    found = {}
    for family in collector.collect():
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def of(found, name, **labels):
    """The value of a sample; None if it is not there."""
    return found.get((name, frozenset(labels.items())))


def pids_of(found):
    """The processes whose VMs are there."""
    return {dict(labels)["pid"] for name, labels in found if name == "kvm_vm_info"}


def registry_of(collector):
    """A registry of one collector."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    return registry


# ---- names


@pytest.mark.parametrize(
    ("kind", "of_kernel", "name", "type_"),
    [
        ("vcpu", stat("exits"), "kvm_vcpu_exits", "counter"),
        ("vm", stat("remote_tlb_flush"), "kvm_vm_remote_tlb_flush", "counter"),
        ("vcpu", ns("halt_wait_ns"), "kvm_vcpu_halt_wait_seconds", "counter"),
        ("vcpu", STATS[1], "kvm_vcpu_sched_wait_seconds", "counter"),
        ("vcpu", ns("halt_wait_hist", StatType.LOG_HIST, size=32), "kvm_vcpu_halt_wait_hist_seconds", "histogram"),
        ("vcpu", stat("blocking", StatType.INSTANT, StatUnit.BOOLEAN), "kvm_vcpu_blocking", "gauge"),
        ("vm", stat("max_mmu_rmap_size", StatType.PEAK), "kvm_vm_max_mmu_rmap_size", "gauge"),
        (
            "vm",
            stat("memory_kib", StatType.INSTANT, StatUnit.BYTES, 10, base=StatBase.POW2),
            "kvm_vm_memory_bytes",
            "gauge",
        ),
        ("vm", stat("spent_cycles", unit=StatUnit.CYCLES), "kvm_vm_spent_cycles", "counter"),
        ("vm", stat("faults_total"), "kvm_vm_faults", "counter"),
        ("vm", stat("odd", 7, 9), "kvm_vm_odd", "unknown"),
        ("vm", stat("a b\n\"'é\udcff{}"), "kvm_vm_a_b_______", "counter"),
        ("vcpu", ns("hist", StatType.LINEAR_HIST, 4), "kvm_vcpu_hist_seconds", "unknown"),
    ],
)
def test_a_statistic_is_called_by_its_kind_its_kernel_name_and_the_base_unit(kind, of_kernel, name, type_):
    """One rule for all; HELP has the kernel's own name, and can be printed whatever that is."""
    family = name_family(kind, of_kernel)
    assert (family.name, family.type) == (name, type_)
    assert (
        family.help.encode().decode().startswith(of_kernel.name.encode("unicode_escape", "surrogatepass").decode()[:1])
    )
    assert "\n" not in family.help


def test_no_two_statistics_have_the_same_metric():
    """The second keeps the kernel's unit, and then gets a number; none takes the name of what is no statistic."""
    taken = {"kvm_vm_info"}
    names = []
    for one in (
        ns("t_ns"),
        ns("t"),
        replace(ns("t_us"), exponent=-6),
        stat("t-us", unit=StatUnit.SECONDS),
        stat("info"),
    ):
        names.append(name_family("vm", one, taken).name)
        taken.add(names[-1])
    assert names == [
        "kvm_vm_t_seconds",
        "kvm_vm_t_seconds_2",
        "kvm_vm_t_us_seconds",
        "kvm_vm_t_us_seconds_2",
        "kvm_vm_info_2",
    ]


def test_a_bound_is_the_largest_number_that_a_bucket_counts():
    """KVM counts whole ns: below 4 is at most 3, and 3e-09 is written so because it is divided, not multiplied."""
    log = ns("halt_wait_hist", StatType.LOG_HIST, size=32)
    assert [repr(bound) for bound in bucket_bounds(log)[:5]] == ["0.0", "1e-09", "3e-09", "7e-09", "1.5e-08"]
    assert bucket_bounds(log) == [(2**i - 1) / 10**9 for i in range(31)]
    linear = stat("queue", StatType.LINEAR_HIST, size=4, width=10)
    assert bucket_bounds(linear) == [9, 19, 29]
    with SyntheticStats(stats=[linear]) as made:  # and they are those of the edges that all else is drawn with
        edges = made.stats["queue"].bucket_edges()
        assert (np.array(bucket_bounds(linear)) + 1 == edges[1:-1]).all()


@pytest.mark.parametrize(
    "odd",
    [
        replace(ns("h", StatType.LOG_HIST, size=32), exponent=-30000),
        ns("h", StatType.LOG_HIST, size=300),
        stat("h", StatType.LINEAR_HIST, size=4),
        stat("h", StatType.LOG_HIST, 9, size=3),
    ],
)
def test_a_histogram_whose_bounds_do_not_ascend_is_not_made_up(odd, resources):
    """It is shown bucket by bucket, with its index; HELP says why."""
    made = resources.enter_context(SyntheticStats(stats=[odd], vm="web"))
    found = scrape(resources.enter_context(collector_of(resources, made, per_vcpu=True)))
    assert bucket_bounds(odd) == []
    assert of(found, name_family("vcpu", odd).name, vm="web", vcpu="0", index=str(odd.size - 1)) == 0


def test_the_sum_of_a_histogram_is_the_counter_of_the_same_name():
    """halt_wait_hist and halt_wait_ns; what has no such counter has no sum."""
    with SyntheticStats("x86", "vcpu") as made:
        hists = [one for one in made.stats.values() if one.is_histogram]
        assert {one.name: find_sum(one, made.stats).name for one in hists} == {
            "halt_wait_hist": "halt_wait_ns",
            "halt_poll_success_hist": "halt_poll_success_ns",
            "halt_poll_fail_hist": "halt_poll_fail_ns",
        }
        assert find_sum(hists[0], {}) is None
        assert find_sum(hists[0], {hists[0].name.replace("_hist", "_ns"): stat("x")}) is None


def test_the_guide_counts_series_right():
    """The table of docs/export.md: for each choice of statistics, a VM, one of 4 vCPUs, and 100 of 8."""
    guide = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    rows = re.findall(r"\| (all|`-e .*`) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+), ([\d,]+) \|", guide)
    assert len(rows) == 3
    vm, vcpu = (stats_of("x86", kind, merged=True, options=OPTIONS) for kind in ("vm", "vcpu"))
    for chosen, *said in rows:
        patterns = re.findall(r"-e '?([\w*]+)", chosen) or ["*"]

        def count(stats, patterns=patterns):
            found = [one for one in stats if any(fnmatchcase(one.name, pattern) for pattern in patterns)]
            return sum(one.size + 2 if one.is_histogram else 1 for one in found)

        own, each = count(vm) + 2, count([*vcpu, *STATS])
        wanted = [own + each, own + 4 * each, 100 * (own + each), 100 * (own + 8 * each)]
        assert [int(one.replace(",", "")) for one in said] == wanted


# ---- values


class Host:
    """Made-up VMs in place of a Roster: {label: [SyntheticStats]}, which tests change."""

    def __init__(self, vms):
        self.vms, self.opened = vms, {}
        self.machines, self.refusals = {}, {}

    @property
    def refused(self):
        """As a Roster's."""
        return {pid: one.why for pid, one in self.refusals.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.opened.values():
            file.close()

    def update(self, _):
        """Open what came, close what went."""
        there = [made for some in self.vms.values() for made in some]
        for made in list(self.opened):
            if made not in there or self.opened[made].closed:
                self.opened.pop(made).close()
        for made in there:
            if made not in self.opened:
                self.opened[made] = made.open()

    def files(self):
        """Those that are open."""
        found = {vm: [self.opened[made] for made in some if made in self.opened] for vm, some in self.vms.items()}
        open_ones = {vm: [file for file in some if not file.closed] for vm, some in found.items()}
        return {vm: some for vm, some in open_ones.items() if some}

    def settle(self):
        """Nothing to do."""


def collector_of(resources, *made, vms=None, **options):
    """A Collector of made-up files; its `host` can be changed."""
    vms = vms or {}
    for one in made:
        vms.setdefault(one.owner.vm, []).append(one)
    host = Host(vms)
    patch = resources.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(collector_module, "Roster", lambda *_, **__: host)
    options = {"rescan": 0.0, "sched": False} | options
    collector = resources.enter_context(Collector(**options))
    collector.host = host
    return collector


def x86(resources, vm="web", vcpus=2):
    """The files of a VM: its own, and its vCPUs'."""
    made = [SyntheticStats("x86", "vm", vm=vm)]
    made += [SyntheticStats("x86", "vcpu", vm=vm, vcpu_id=i) for i in range(vcpus)]
    return [resources.enter_context(one) for one in made]


def test_a_vcpu_of_x86_is_144_series(resources):
    """What docs/export.md says of cardinality is counted: of a vCPU, of a VM's sums, of a VM's own file."""
    vm, *vcpus = x86(resources)
    with collector_of(resources, vm, *vcpus, per_vcpu=True) as collector:
        names = [name for name, labels in scrape(collector) if ("vcpu", "0") in labels]
        assert len(names) == 144
    with collector_of(resources, vm, *vcpus) as collector:
        found = [name for name, labels in scrape(collector) if ("vm", "web") in labels]
        assert sum(name.startswith("kvm_vcpu_") for name in found) == 144
        assert sum(name.startswith("kvm_vm_") for name in found) == 15 + 1  # and kvm_vm_vcpus


MOST = 2**51  # of three, the sum is a float's


@pytest.mark.parametrize("seed", numbers(20))
def test_values_are_what_the_stats_file_says_in_base_units(seed, resources):
    """Of each vCPU; those of a VM are their sum, of peaks the highest."""
    draw = random.Random(seed).randint
    stats = [
        stat("exits"),
        ns("halt_wait_ns"),
        stat("signed", StatType.INSTANT),
        stat("on", StatType.INSTANT, StatUnit.BOOLEAN),
        stat("memory_kib", StatType.INSTANT, StatUnit.BYTES, 10, base=StatBase.POW2),
        stat("top", StatType.PEAK),
        stat("later", 7, 9),
        stat("several", size=3),
        ns("halt_wait_hist", StatType.LOG_HIST, 5),
    ]
    made = [resources.enter_context(SyntheticStats(stats=stats, vm="web", vcpu_id=i)) for i in range(3)]
    for one in made:
        one.set("exits", draw(0, MOST))
        one.set("halt_wait_ns", draw(0, MOST))
        one.set("signed", draw(-MOST, MOST) % 2**64)
        one.set("on", draw(0, 1))
        one.set("memory_kib", draw(0, 2**40))
        one.set("top", draw(0, MOST))
        one.set("later", draw(0, MOST))
        one.set("several", [draw(0, MOST) for _ in range(3)])
        one.set("halt_wait_hist", [draw(0, 2**40) for _ in range(5)])
    snapshots = [resources.enter_context(one.open()).snapshot() for one in made]
    each = scrape(collector_of(resources, *made, per_vcpu=True))
    together = scrape(collector_of(resources, *made))

    def check(found, some, **labels):
        def value(name):
            one = made[0].stats[name]
            raw = [int(snapshot[name]) for snapshot in some]
            raw = max(raw) if one.type == StatType.PEAK else sum(raw)
            return one.to_base_units(raw % 2**64)

        assert of(found, "kvm_vcpu_exits_total", **labels) == value("exits")
        assert of(found, "kvm_vcpu_halt_wait_seconds_total", **labels) == pytest.approx(
            value("halt_wait_ns"), rel=1e-15
        )
        assert of(found, "kvm_vcpu_signed", **labels) == value("signed")
        assert of(found, "kvm_vcpu_on", **labels) == value("on")
        assert of(found, "kvm_vcpu_memory_bytes", **labels) == value("memory_kib")
        assert of(found, "kvm_vcpu_top", **labels) == value("top")
        assert of(found, "kvm_vcpu_later", **labels) == value("later")
        several = np.sum([snapshot["several"] for snapshot in some], axis=0).tolist()
        assert [of(found, "kvm_vcpu_several_total", index=str(i), **labels) for i in range(3)] == several
        counts = np.cumsum(np.sum([snapshot["halt_wait_hist"] for snapshot in some], axis=0)).tolist()
        edges = ["0.0", "1e-09", "3e-09", "7e-09", "+Inf"]
        name = "kvm_vcpu_halt_wait_hist_seconds"
        assert [of(found, f"{name}_bucket", le=edge, **labels) for edge in edges] == counts
        assert of(found, f"{name}_count", **labels) == counts[-1]
        assert of(found, f"{name}_sum", **labels) == of(found, "kvm_vcpu_halt_wait_seconds_total", **labels)

    for i, snapshot in enumerate(snapshots):
        check(each, [snapshot], vm="web", vcpu=str(i))
    check(together, snapshots, vm="web")


def test_chosen_statistics_and_vcpus_alone_are_shown(resources):
    """What is asked for; a histogram keeps its sum; what fits nothing is an error, with what is near."""
    made = x86(resources, vcpus=3)
    chosen = collector_of(resources, *made, stats=["exits", "halt_wait_h*"], vcpus=[1, 2], per_vcpu=True)
    shown = {(name, dict(labels)["vcpu"]) for name, labels in scrape(chosen) if "vcpu" in dict(labels)}
    hist = "kvm_vcpu_halt_wait_hist_seconds"
    wanted = ["kvm_vcpu_exits_total", f"{hist}_bucket", f"{hist}_sum", f"{hist}_count"]
    assert shown == {(name, vcpu) for name in wanted for vcpu in "12"}
    with pytest.raises(KeyError, match=r"no statistic 'exit'.*did you mean exits"):
        collector_of(resources, *made, stats="exit")


def test_what_fits_nothing_shows_nothing_once_vms_come(resources):
    """Not everything, if there was none when it began: then it is a warning."""
    vm, *vcpus = x86(resources)
    collector = collector_of(resources, vms={}, stats=["exits", "typo"])
    collector.host.vms["web"] = [vm, *vcpus]
    with pytest.warns(kf.SamplingWarning, match="no statistic 'typo'"):
        found = scrape(collector)
    assert {name for name, _ in found if name.startswith("kvm_vcpu_")} == {"kvm_vcpu_exits_total"}


# ---- what comes and goes


def test_a_sum_does_not_fall_when_a_vcpu_is_unplugged(resources):
    """Prometheus would take it for a reset, and count all that the others ever counted once more."""
    vm, zero, one = x86(resources)
    zero.set("exits", 100)
    one.set("exits", 1000)
    collector = collector_of(resources, vm, zero, one)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 1100
    collector.host.vms["web"].remove(one)
    zero.add("exits", 5)
    found = scrape(collector)
    assert of(found, "kvm_vcpu_exits_total", vm="web") == 1105
    assert of(found, "kvm_vm_vcpus", vm="web") == 1
    assert of(found, "kvm_vcpu_blocking", vm="web") == 0
    one.add("exits", 7)  # it is plugged in again, and counts on: QEMU keeps it
    collector.host.vms["web"].append(one)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 1112
    collector.host.vms["web"].remove(one)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 1112
    fresh = resources.enter_context(SyntheticStats("x86", "vcpu", vm="web", vcpu_id=1))
    fresh.set("exits", 3)  # another one of that number
    collector.host.vms["web"].append(fresh)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 1115
    collector.host.vms["web"].remove(fresh)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 1115


def test_a_vm_that_is_made_anew_begins_at_its_own_numbers(resources):
    """Those of the VM that had its label are not in them, nor those of a vCPU that was unplugged from that."""
    made = x86(resources)
    for one in made[1:]:
        one.set("exits", 1000)
    collector = collector_of(resources, *made)
    scrape(collector)
    collector.host.vms["web"].remove(made.pop())
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 2000
    for one in made:
        one.rebuild()
    made[1].set("exits", 3)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 3


def test_a_vm_that_dies_in_a_scrape_is_gone_from_it(resources):
    """No error, nothing that it had counted, and the others are there."""
    web, db = x86(resources), x86(resources, "db")
    collector = collector_of(resources, *web, *db, rescan=1e6)
    scrape(collector)
    for one in web:
        one.die()
    collector.host.vms.pop("web")
    found = scrape(collector)
    assert {dict(labels)["vm"] for _, labels in found if "vm" in dict(labels)} == {"db"}
    assert of(found, "kvmstats_vms") == 1
    assert of(found, "kvmstats_read_errors_total") == 0
    for one in db:
        one.die()
    collector.host.vms.clear()
    assert of(scrape(collector), "kvmstats_vms") == 0


@pytest.mark.parametrize("per_vcpu", [False, True])
def test_a_vcpu_that_cannot_be_read_makes_no_sum_that_is_too_low(resources, per_vcpu):
    """The sums of its VM are left out of that scrape, and the error is counted; the next goes on where it was."""
    made = x86(resources)
    for one in made[1:]:
        one.set("exits", 1000)
    collector = collector_of(resources, *made, *x86(resources, "db"), per_vcpu=per_vcpu)
    labels = {"vm": "web"} | ({"vcpu": "1"} if per_vcpu else {})
    before = of(scrape(collector), "kvm_vcpu_exits_total", **labels)
    made[2].fail(errno.EIO)
    found = scrape(collector)
    assert of(found, "kvm_vcpu_exits_total", **labels) is None
    assert of(found, "kvm_vcpu_exits_total", **labels | {"vm": "db"}) == 0
    assert of(found, "kvm_vm_pages_4k", vm="web") == 0
    assert of(found, "kvmstats_read_errors_total") == 1
    if per_vcpu:
        assert of(found, "kvm_vcpu_exits_total", vm="web", vcpu="0") == 1000
    collector.host.vms["web"].remove(made[2])  # unplugged, and never read again: what it had counted is not lost
    if not per_vcpu:
        assert of(scrape(collector), "kvm_vcpu_exits_total", **labels) == before
    made[2].recover()
    collector.host.vms["web"].append(made[2])
    assert of(scrape(collector), "kvm_vcpu_exits_total", **labels) == before


def test_a_vm_whose_vcpus_differ_has_sums_of_what_all_of_them_have(resources):
    """As those of which not every vCPU's thread is known: a sum over some would jump when the others join."""
    both = [stat("exits"), stat("top", StatType.PEAK), ns("halt_wait_hist", StatType.LOG_HIST, 4)]
    zero = resources.enter_context(SyntheticStats(stats=[*both, stat("more")], vm="web"))
    one = resources.enter_context(SyntheticStats(stats=[stat("else"), *both], vm="web", vcpu_id=1))
    db = resources.enter_context(SyntheticStats(stats=[*both, stat("more")], vm="db"))
    for number, made in enumerate((zero, one, db), 1):
        made.set("exits", number)
        made.set("top", number)
        made.set("halt_wait_hist", [number] * 4)
    collector = collector_of(resources, zero, one, db)
    found = scrape(collector)
    assert of(found, "kvm_vcpu_exits_total", vm="web") == 3
    assert of(found, "kvm_vcpu_top", vm="web") == 2
    assert of(found, "kvm_vcpu_halt_wait_hist_seconds_count", vm="web") == 12
    assert of(found, "kvm_vcpu_more_total", vm="web") is None
    assert of(found, "kvm_vcpu_else_total", vm="web") is None
    assert of(found, "kvm_vcpu_more_total", vm="db") == 0
    collector.host.vms["web"].remove(one)
    assert of(scrape(collector), "kvm_vcpu_exits_total", vm="web") == 3


@pytest.mark.parametrize(("error", "counted"), [(OSError(5, "EIO"), 1), (ProcessLookupError(3, "ended"), 0)])
def test_what_goes_in_the_middle_of_a_scrape_is_no_error(resources, monkeypatch, error, counted):
    """A VM may die between the two readings that a scrape makes at most; what cannot be read is counted."""
    collector = collector_of(resources, *x86(resources))
    monkeypatch.setattr(collector, "_sweep", lambda: {1: error})
    found = scrape(collector)
    assert of(found, "kvmstats_read_errors_total") == counted
    assert of(found, "kvm_vcpu_exits_total", vm="web") is None
    assert of(found, "kvm_vm_pages_4k", vm="web") == 0


def test_who_is_left_out_is_counted_by_reason(resources):
    """Each reason has a series, so that an alert has something to look at before the first refusal."""
    collector = collector_of(resources, vms={})
    collector.host.refusals = {
        1: Refusal.of(kf.AttachError(errno.EPERM, "no")),
        2: Refusal.of(kf.AttachError(errno.ENODATA, "none")),
        3: Refusal.of(OSError(errno.EMFILE, "full")),
        4: Refusal("it is another's", "shared_vm"),
        5: Refusal.of(ValueError("odd")),
    }
    found = scrape(collector)
    counts = {reason: of(found, "kvmstats_vms_refused", reason=reason) for reason in REASONS}
    assert counts == dict.fromkeys(REASONS, 1) | {"no_vm": 0}
    assert collector.refused[1] == "no"


def test_a_collector_says_when_it_cannot_be_used(resources):
    """Closed, or in a forked child; twice closed is closed."""
    collector = collector_of(resources, *x86(resources))
    assert exit_status(forked(lambda: scrape(collector))) == 1
    collector.close()
    collector.close()
    with pytest.raises(ValueError, match="closed"):
        scrape(collector)


# ---- what is written


#: "tb" is no unit, but the instruction TEST BLOCK.
TEST_BLOCK = "kvm_vcpu_instruction_tb_total metric names should not contain abbreviated units\n"
HOSTILE = 'we"b\\n\n{x="y"} é 漢\u202e\x1b[31m\r'


def test_labels_may_be_anything(resources):
    """Quotes, line breaks, backslashes and what is not ASCII come back as they were, in both formats."""
    collector = collector_of(resources, *x86(resources, HOSTILE))
    registry = registry_of(collector)
    for families in (
        parse_text(prometheus_client.generate_latest(registry).decode()),
        parse_openmetrics(generate_openmetrics(registry).decode()),
    ):
        vms = {sample.labels["vm"] for family in families for sample in family.samples if "vm" in sample.labels}
        assert vms == {HOSTILE}


@needs_promtool
@pytest.mark.parametrize("per_vcpu", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_promtool_finds_nothing_to_say(resources, arch, per_vcpu):
    """Of the statistics of every architecture, and of names that no VM should have."""
    made = [SyntheticStats(arch, "vm", vm=HOSTILE), *(SyntheticStats(arch, vm=HOSTILE, vcpu_id=i) for i in (0, 1))]
    collector = collector_of(resources, *map(resources.enter_context, made), per_vcpu=per_vcpu)
    text = prometheus_client.generate_latest(registry_of(collector))
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
    said = done.stderr.decode().replace(TEST_BLOCK, "")
    assert (said, done.returncode) == ("", 3 if arch == "s390" else 0)


def test_a_registry_can_be_asked_for_some_metrics(resources):
    """?name[]= of the HTTP server, and a default registry, which wants to know beforehand what a collector has."""
    registry = prometheus_client.CollectorRegistry(auto_describe=True, support_collectors_without_names=True)
    registry.register(collector_of(resources, *x86(resources)))
    text = prometheus_client.generate_latest(registry.restricted_registry(["kvm_vcpu_exits_total"])).decode()
    assert re.sub("#.*\n", "", text) == 'kvm_vcpu_exits_total{vm="web"} 0.0\n'


def test_an_exporter_of_ones_own_serves_it(resources):
    """What the guide shows: the collector in a registry, and prometheus_client's own server."""
    registry = registry_of(collector_of(resources, *x86(resources)))
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            assert b'kvm_vcpu_exits_total{vm="web"} 0.0\n' in answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- real VMs


@pytest.mark.real_vm
@unknown_threads
@pytest.mark.parametrize("per_vcpu", [False, True])
def test_a_real_vm_is_exported_with_the_right_numbers(per_vcpu):
    """Every statistic of a VM that does nothing meanwhile, as its stats files have it."""
    with Holder(name="web") as vmm, Collector(vmm.pid, per_vcpu=per_vcpu) as collector:
        vmm.do("guest.run(500, vcpu=1)")
        found = scrape(collector)
        assert of(found, "kvm_vm_info", vm="web", pid=str(vmm.pid), vmm=collector.machines["web"].vmm, guest="web") == 1
        with kf.attach(vmm.pid) as machine:
            snapshots = [file.snapshot() for file in machine.vcpus]
            for name, one in machine.vcpus[0].schema.items():
                if one.is_histogram:
                    continue
                metric = name_family("vcpu", one)
                sample = metric.name + ("_total" if metric.type == "counter" else "")
                raw = [int(snapshot[name]) for snapshot in snapshots]
                wanted = {(): sum(raw)} if not per_vcpu else {("vcpu", str(i)): value for i, value in enumerate(raw)}
                for label, value in wanted.items():
                    labels = {"vm": "web"} | dict([label] if label else [])
                    assert of(found, sample, **labels) == pytest.approx(one.to_base_units(value), rel=1e-15), name
        assert (
            of(found, f"kvm_vcpu_{exit_counter()}_total", **{"vm": "web"} | ({"vcpu": "1"} if per_vcpu else {})) >= 500
        )


def test_a_name_that_is_no_text_is_shown_as_text(resources):
    """Names of programs and guests are bytes; what is not UTF-8 is escaped, and the scrape goes on."""
    vm, *_ = made = x86(resources)
    collector = collector_of(resources, *made)
    handle = collector.host.opened[vm].handle
    handle.owner = handle.owner._replace(machine=SimpleNamespace(pid=7, vmm="qemu\udcff", name="w\ud800"))
    text = prometheus_client.generate_latest(registry_of(collector)).decode()
    info = next(one for one in parse_text(text) if one.name == "kvm_vm_info").samples[0].labels
    assert info == {"vm": "web", "pid": "7", "vmm": "qemu\\udcff", "guest": "w\\ud800"}


@pytest.mark.real_vm
@unknown_threads
def test_vms_that_are_made_and_killed_while_scraped_leave_nothing():
    """No error, no fd, no series of one that is gone; two collectors and a follow beside it are no VMs to it."""
    with Nursery() as nursery:
        base = [nursery.bear(2)[0] for _ in range(2)]
        with (
            Collector(nursery.name, sched=False, rescan=0.0) as collector,
            Collector(nursery.name, sched=False) as other,
            kf.follow(nursery.name, 0.01, stats="exits") as chunks,
        ):
            scrape(collector), scrape(other), next(chunks)
            # The follow, which looks at the host meanwhile, has at times an fd more.
            fds = min(open_fds() for _ in range(100) if not time.sleep(0.001))
            stop, trouble = threading.Event(), []

            def go_on():
                try:
                    while not stop.is_set():
                        scrape(collector)
                except Exception as error:  # noqa: BLE001 - to be told
                    trouble.append(error)

            threads = [threading.Thread(target=go_on) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                for number in range(BIRTHS):
                    pid, _ = nursery.bear(1 + number % 3)
                    found = scrape(collector)
                    assert str(pid) in pids_of(found)
                    nursery.kill(pid)
                    os.sched_yield()
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert not trouble
            assert until(lambda: pids_of(scrape(collector)) == set(map(str, base)))  # the last one may still be dying
            found = scrape(collector)
            labels = {dict(labels)["vm"] for _, labels in found if "vm" in dict(labels)}
            assert len(labels) == 2
            assert of(found, "kvmstats_read_errors_total") == 0

            def nothing_is_left():
                scrape(other), next(chunks)  # which look when they do
                return open_fds() == fds

            assert until(nothing_is_left, 10), (open_fds(), fds)
            assert not {os.getpid()} & set(collector.refused)


@pytest.mark.real_vm
def test_a_vcpu_whose_thread_is_not_known_is_counted_until_it_is():
    """It is warned of once, at the start; when its thread has a name that tells, steal is there at the next look."""
    vm = f"web {os.getpid()}"
    with Holder(1, name=vm) as vmm:
        with pytest.warns(kf.SamplingWarning, match="no sched_"):
            collector = Collector([vm, f"{vm} 2"], rescan=0.0)
        with collector:
            found = scrape(collector)
            assert of(found, "kvmstats_vcpus_without_sched") == 1
            assert of(found, "kvm_vcpu_sched_run_seconds_total", vm=vm) is None
            vmm.do("open('/proc/thread-self/comm', 'w').write('CPU 0/KVM')")
            found = scrape(collector)
            assert of(found, "kvmstats_vcpus_without_sched") == 0
            assert of(found, "kvm_vcpu_sched_run_seconds_total", vm=vm) > 0
            with Holder(1, name=f"{vm} 2"):  # of another VM, nothing is said any more
                assert of(scrape(collector), "kvmstats_vcpus_without_sched") == 1


@pytest.mark.real_vm
@unknown_threads
def test_the_host_is_looked_at_no_more_often_than_asked_for(monkeypatch):
    """Many who scrape cost many readings, but one look."""
    with Holder() as vmm, Collector(vmm.pid, rescan=1e6) as collector:
        looks = []
        monkeypatch.setattr(collector._roster, "update", looks.append)
        vmm.do("guest.run(50)")
        first = of(scrape(collector), "kvm_vcpu_exits_total", vm=f"pid {vmm.pid}")
        vmm.do("guest.run(50)")
        assert of(scrape(collector), "kvm_vcpu_exits_total", vm=f"pid {vmm.pid}") >= first + 50
        assert looks == []


@pytest.mark.real_vm
@unknown_threads
def test_looking_once_takes_up_nothing_later():
    """rescan=None: what is there is read on, what goes is let go of, what comes is not seen."""
    with Nursery() as nursery:
        first, second = nursery.bear(1)[0], nursery.bear(1)[0]
        with Collector(nursery.name, rescan=None) as collector:
            nursery.bear(1)
            assert of(scrape(collector), "kvmstats_vms") == 2
            nursery.kill(first)
            deadline = time.monotonic() + 10
            while of(found := scrape(collector), "kvmstats_vms") != 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            pids = {dict(labels)["pid"] for name, labels in found if name == "kvm_vm_info"}
            assert pids == {str(second)}
