"""The same VMs' statistics from QEMU and from libvirt: what that takes, and what it does to the guests."""

import contextlib
import subprocess

import pytest
from helpers import until
from libvirtd import documented, domain, needs_libvirt, running_libvirt
from qemu import Qmp, arguments, firmware, needs_qemu
from table import add, compare_timers, per_call

import kvmstats_fast as kf

ROUNDS = 21
SWEEP = "Sampler.sweep()"


def exits_of(sampler, ask, times):
    """How often each vCPU left the guest because of a signal while that was asked, by the number of askings."""
    view = sampler.view("signal_exits")
    sampler.sweep()
    before = view.copy()
    for _ in range(times):
        ask()
    sampler.sweep()
    return (view - before) / times


def add_exits(title, sampler, ask, label, *, times=50):
    """Rows that say how often that makes a vCPU leave the guest, and how often a sweep does."""
    for name, call, number in ((SWEEP, sampler.sweep, 1000 * times), (label, ask, times)):
        exits = exits_of(sampler, call, number)
        text = (
            f"each of {len(exits)} vCPUs left the guest {exits.min():+.2f} to {exits.max():+.2f} times (signal_exits)"
        )
        add(title, name, None, verdict=text)


@needs_qemu
@pytest.mark.benchmark(group="rivals")
def test_against_qemu_query_stats(benchmark, tmp_path):
    """query-stats over QMP on a live QEMU, one of whose 4 vCPUs is busy, beside a sweep of the same vCPUs."""
    command, path = arguments(tmp_path, *firmware(tmp_path))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with kf.launch(command, vcpus=4, **pipes) as machine, contextlib.closing(Qmp(path, machine.process)) as monitor:
        try:
            sampler = kf.Sampler(machine.vcpus)
            count = len(machine.vcpus)
            assert until(lambda: monitor.word(0x7000))  # what the busy one counts up

            def ask():
                return monitor("query-stats", target="vcpu")

            assert len([entry for entry in ask() if entry["provider"] == "kvm"]) == count
            timers = {
                SWEEP: (lambda: per_call(sampler.sweep, 500) / count, None),
                "QEMU query-stats over QMP": (lambda: per_call(ask, 10) / count, ("at least", 1000)),
            }
            compare_timers(benchmark, "all statistics of a vCPU, ns per vCPU", timers, rounds=ROUNDS)
            title = "what one asking does to a guest with one busy vCPU"
            add_exits(title, sampler, ask, "QEMU query-stats over QMP")
            benchmark.pedantic(sampler.sweep, rounds=ROUNDS, iterations=100)
        finally:
            machine.process.kill()
            machine.process.wait()


class Virsh:
    """A virsh that stays connected, so that a question is a call of libvirt's and no process."""

    END = "end of the answer"

    def __init__(self, uri):
        self.process = subprocess.Popen(
            ["virsh", "-c", uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, command):
        """Do a command, and return the lines that it prints."""
        self.process.stdin.write(f"{command}\necho '{self.END}'\n")
        self.process.stdin.flush()
        lines = []
        while (line := self.process.stdout.readline()).strip() != self.END:
            assert line, "virsh has ended"
            lines.append(line)
        return lines

    def close(self):
        """Hang up."""
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()


@needs_qemu
@pytest.mark.benchmark(group="rivals")
@pytest.mark.parametrize("domains", [3])
def test_against_libvirt(benchmark, tmp_path, domains):
    """`virsh domstats` (virConnectGetAllDomainStats) of some domains beside a sweep of the same ones."""
    names = [f"web{number}" for number in range(domains)]
    with contextlib.ExitStack() as stack:
        libvirt = stack.enter_context(running_libvirt(tmp_path))
        for name in names:
            assert libvirt.create(domain(name, documented())) is not None
        virsh = stack.enter_context(contextlib.closing(Virsh(libvirt.uri)))
        machines = [stack.enter_context(kf.attach(libvirt.pid(name))) for name in names]
        everything, vcpus = kf.Sampler(machines), kf.Sampler([machine.vcpus for machine in machines])

        def ask():
            return virsh(f"domstats {' '.join(names)}")

        if not any("signal_exits" in line for line in ask()):
            pytest.skip("this libvirt shows no statistics of KVM (they came with 8.9)")
        label = "libvirt, virsh domstats, connected"
        timers = {
            SWEEP: (lambda: per_call(everything.sweep, 500), None),
            label: (lambda: per_call(ask, 2), ("at least", 300)),
        }
        count = f"{domains} domains of {len(machines[0].vcpus)} vCPUs"
        compare_timers(benchmark, f"all statistics of {count}", timers, rounds=9)
        add_exits(f"what one asking does to {count}", vcpus, ask, label, times=20)
        benchmark.pedantic(everything.sweep, rounds=ROUNDS, iterations=100)


for mark in needs_libvirt:
    test_against_libvirt = mark(test_against_libvirt)
