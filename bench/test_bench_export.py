"""What a scrape costs beside prometheus_client rendering the same families from constants."""

import resource
import time
import warnings

import prometheus_client
import pytest
import table
from nursery import Nursery

from kvmstats_fast.errors import SamplingWarning
from kvmstats_fast.export import Collector
from kvmstats_fast.testing import KvmUnavailableError, exit_counter

EACH = 8  # vCPUs of a VM
TARGET = ("at most", 1.5)


class Constant:
    """Families that are there already."""

    def __init__(self, families):
        self.families = families

    def collect(self):
        """Yield them."""
        return self.families


@pytest.fixture(scope="module")
def nursery():
    """VMs of 8 vCPUs; how many, the tests say."""
    try:
        exit_counter()
    except KvmUnavailableError as error:
        pytest.skip(f"no real VM: {error.strerror}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Nursery() as host:
        yield host
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def registry_of(collector):
    """A registry of one collector."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    return registry


def cpu(call):
    """The processor time of a call, of this thread, in ns."""
    start = time.thread_time_ns()
    call()
    return time.thread_time_ns() - start


@pytest.mark.parametrize("per_vcpu", [False, True], ids=["per VM", "per vCPU"])
@pytest.mark.parametrize("vcpus", [8, 256, 1024])
def test_scrape(benchmark, nursery, vcpus, per_vcpu):
    """Processor time of a scrape whose VMs are known, of a look at the host, and of the rendering alone."""
    while len(nursery.alive) * EACH < vcpus:
        nursery.bear(EACH)
    while len(nursery.alive) * EACH > vcpus:
        nursery.kill(nursery.alive[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplingWarning)  # which thread runs a vCPU is not known of these
        collector = Collector(list(nursery.alive), per_vcpu=per_vcpu, rescan=1e6)
    with collector:
        live, constant = registry_of(collector), registry_of(Constant(list(collector.collect())))
        series = sum(len(family.samples) for family in constant.collect())
        title = f"a scrape of {vcpus} vCPUs, {'each' if per_vcpu else 'of 8 a VM'}: {series:,} series; processor time"

        def look():
            collector._due = 0.0
            with collector._lock:
                collector._look()

        table.compare_timers(
            benchmark,
            title,
            {
                "prometheus_client, from constants": (
                    lambda: cpu(lambda: prometheus_client.generate_latest(constant)),
                    None,
                ),
                "a scrape": (lambda: cpu(lambda: prometheus_client.generate_latest(live)), TARGET),
                "of it, all but the rendering": (lambda: cpu(lambda: list(collector.collect())), None),
                "a look at the host, at most one a second": (lambda: cpu(look), None),
            },
            rounds=5 if series > 50_000 else 15,
        )
    benchmark.pedantic(lambda: None, rounds=1)
