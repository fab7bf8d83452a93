"""Collector: the VMs of a host as metrics, read when Prometheus scrapes."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

import kvmstats_fast
from kvmstats_fast._arguments import check_integer, check_names, check_seconds
from kvmstats_fast._kvmstats import lib
from kvmstats_fast._resource import Closing
from kvmstats_fast.errors import AttachError, SamplingWarning, VmGoneError, warn_caller
from kvmstats_fast.export.families import Families
from kvmstats_fast.export.ledger import Ledger
from kvmstats_fast.sampling.follow import Choice
from kvmstats_fast.sampling.plan import IN_USE, LiveRow, NothingToSample, Plan
from kvmstats_fast.sampling.schedule import LONGEST
from kvmstats_fast.schedstat import STATS
from kvmstats_fast.vmm.roster import REASONS, Roster

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.machine import VirtualMachine

    _Files = dict[str, list[StatsFile]]


#: Why a file cannot be read whose VM, vCPU or thread has gone in this moment, which is no error.
_GONE = (AttachError, ProcessLookupError)


class Collector(Closing):
    """The statistics of the VMs of this host, for a registry of prometheus_client; read at each scrape.

    Each `collect` looks at the host, unless the last look was a moment ago, picks up new VMs and vCPUs, drops those
    that are gone, and reads each file once. Nothing is read in between.

    Parameters
    ----------
    names : str, int, or iterable of these, optional
        Names of guests, or globs of names, and pids of VMMs; as for `follow`. Default: all VMs.
    stats : str or iterable of str, optional
        Names or globs of statistics. Default: all.
    per_vcpu : bool
        Export each vCPU's values, with the label ``vcpu``, instead of the sum over a VM's vCPUs (the maximum of peaks).
        The names of the metrics are the same.
    vcpus : iterable of int, optional
        Only these vCPUs; and no statistics of the VM itself.
    sched : bool
        Also export what the host's scheduler counts for each vCPU's thread, as for `Sampler`.
    inject, timeout
        As for `attach`.
    rescan : float or None
        Minimum seconds between looks at the host. None: it looks once, at creation, and does not pick up later VMs;
        after that, it needs no privilege.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type or out of range.
    KeyError
        If `stats` has a name or glob that matches no statistic of the existing VMs.
    VmGoneError, AttachError
        If there is no process with a given pid, or it may not be held.
    OSError
        If /proc cannot be read.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[prometheus]'``.

    Attributes
    ----------
    refused : dict of int to str
        Pids of VMMs that were asked for and cannot be attached to, and why. As of the last look.

    Warns
    -----
    SamplingWarning
        As `Sampler`, with `sched`; only at creation: for later vCPUs see ``kvmstats_vcpus_without_sched``.

    Notes
    -----
    It may be collected from several threads; they take turns. It does not survive a fork: create it in the process that
    serves.

    A counter of a VM does not fall while the VM exists: when a vCPU is unplugged, its counts stay in the sum. A VM that
    is recreated, also in the same process, begins at 0, which Prometheus takes for a reset, as it is. A VM with a file
    that cannot be read has no sums in that scrape, rather than sums that are too low.

    Examples
    --------
    >>> import prometheus_client                                                # doctest: +SKIP
    >>> prometheus_client.REGISTRY.register(kvmstats_fast.export.Collector())   # doctest: +SKIP
    >>> prometheus_client.start_http_server(8000, "127.0.0.1")                  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - what `follow` takes, and the form of what is shown
        self,
        names: str | int | Iterable[str | int] | None = None,
        stats: str | Iterable[str] | None = None,
        *,
        per_vcpu: bool = False,
        vcpus: Iterable[int] | None = None,
        sched: bool = True,
        inject: bool = False,
        timeout: float = 2.0,
        rescan: float | None = 1.0,
    ) -> None:
        self._patterns = None if stats is None else check_names("stats", stats)
        self._choice = Choice(self._patterns, sched=sched)
        self._per_vcpu, self._sched = per_vcpu, sched
        self._vcpus = None if vcpus is None else frozenset(check_integer("vcpus", one, 0) for one in vcpus)
        self._rescan = None if rescan is None else check_seconds("rescan", rescan, LONGEST, zero=True)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._due = 0.0
        self._files: _Files = {}
        self._live: LiveRow | None = None
        self._families: Families | None = None
        self._ledger = Ledger()
        self._lacking = 0  # vCPUs whose thread is not known
        self._threads = 0  # known then
        self._errors = 0
        self._roster = Roster(names, inject=inject, timeout=timeout)
        with ExitStack() as opened:
            opened.enter_context(self._roster)
            self._look(first=True)
            self._opened: ExitStack | None = opened.pop_all()

    @property
    def refused(self) -> dict[int, str]:
        """Pids of VMMs that cannot be attached to, and why."""
        return self._roster.refused

    @property
    def machines(self) -> dict[str, VirtualMachine]:
        """The VMs attached to, by label; closed by the collector."""
        return self._roster.machines

    def describe(self) -> list[Metric]:
        """Return nothing, because the metrics depend on the VMs. A registry calls this."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read everything once, and yield it as metric families. A registry calls this.

        Raises
        ------
        ValueError
            If it is closed.
        RuntimeError
            In a forked child.
        OSError
            If /proc cannot be read.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("this Collector stayed in the parent process; make one of your own")
        with self._lock:
            if self._opened is None:
                raise ValueError("this Collector is closed")
            began = time.monotonic()
            if began >= self._due:
                self._look()
            looked = time.monotonic()
            failed = self._sweep()
            if failed:  # as a rule a VM that has gone since; what was plugged out takes a look
                self._look(anew=True)
                failed = self._sweep()
            self._errors += sum(not isinstance(error, _GONE) for error in failed.values())
            families, live = self._families, self._live
            values = [] if live is None else [group.values[0].copy() for group in live.groups]
            if live is not None:
                self._ledger.note(live.plan, values, failed)
            own = list(self._describe_itself(looked - began, time.monotonic() - looked))
        yield from own
        if families is not None:
            yield from families.collect(values, failed)

    def close(self) -> None:
        """Close the files of all VMs. A second call does nothing."""
        with self._lock:
            opened, self._opened = self._opened, None
            self._live = self._families = None
        if opened is not None:
            opened.close()

    # ---- what is there

    def _look(self, *, first: bool = False, anew: bool = False) -> None:
        """Look at the host, and plan what is read from now on; `anew`, even if the files are the same."""
        if first or self._rescan is not None:
            self._roster.update(lambda: None)
        self._due = math.inf if self._rescan is None else time.monotonic() + self._rescan
        files = self._choose()
        if anew or files != self._files or (self._lacking and self._count_threads() != self._threads):
            self._ledger.settle(files)
            self._take(files, first=first)
        self._roster.settle()

    def _choose(self) -> _Files:
        """Return the files that are wanted, of those that are open."""
        files = self._roster.files()
        if self._vcpus is None:
            return files
        chosen = {vm: [file for file in some if file.vcpu_id in self._vcpus] for vm, some in files.items()}
        return {vm: some for vm, some in chosen.items() if some}

    def _count_threads(self) -> int:
        """Return of how many vCPUs the thread is known; of those that are not, it may be later."""
        count = 0
        for machine in self._roster.machines.values():
            with suppress(AttachError):  # it has gone, or hides them
                count += len(machine.threads)
        return count

    def _take(self, files: _Files, *, first: bool) -> None:
        """Plan how these files are read, and what becomes of them."""
        self._live = self._families = None
        plan = None
        while files and plan is None:
            try:
                plan = self._plan(files, first=first)
            except NothingToSample:  # noqa: PERF203 - a VM may go at any time
                files = {}
            except VmGoneError:  # a moment ago: its files are closed
                files = self._choose()
        self._files = files
        self._lacking = 0
        if plan is None:
            return
        try:
            self._choice.of(file for some in files.values() for file in some)
        except KeyError as error:
            if first:
                raise
            warn_caller(str(error.args[0]), SamplingWarning)
        if self._sched:
            known = sum(len(group.columns) for group in plan.groups if STATS[0].name in group.places)
            self._lacking = sum(file.kind == "vcpu" for some in files.values() for file in some) - known
            self._threads = self._count_threads() if self._lacking else 0
        self._live = LiveRow(plan)
        self._families = Families(
            plan.groups, plan.origin.files, per_vcpu=self._per_vcpu, patterns=self._patterns, gone=self._ledger.gone
        )

    def _plan(self, files: _Files, *, first: bool) -> Plan:
        def tell(text: str, category: type[Warning]) -> None:
            if first:  # later, kvmstats_vcpus_without_sched does
                warn_caller(text, category)

        try:
            return Plan(files, None, 1, sched=self._sched, tell=tell)
        except VmGoneError:
            raise
        except OSError as error:  # as for too many open files
            if not self._sched:
                raise
            tell(f"no sched_* statistics: {error}", SamplingWarning)
            return Plan(files, None, 1)

    # ---- reading it

    def _sweep(self) -> dict[int, Exception]:
        """Read every file once; return the indices of those that failed, and why."""
        live = self._live
        if live is None:
            return {}
        status = lib.kvmstats_sweep(live.c)
        if status < 0:
            raise RuntimeError(IN_USE)
        return {error.file: error.error for error in live.find_errors(0, 1)} if status else {}

    # ---- what it says of itself

    def _describe_itself(self, look: float, sweep: float) -> Iterator[Metric]:
        about = InfoMetricFamily("kvm_vm", "A VM that is exported: its VMM's process and program, its guest's name.")
        vcpus = GaugeMetricFamily("kvm_vm_vcpus", "vCPUs of a VM that are exported.", labels=["vm"])
        for vm, files in self._files.items():
            machine: Any = files[0].handle.owner.machine
            if machine is not None:
                known = {"pid": str(machine.pid), "vmm": machine.vmm, "guest": machine.name}
                about.add_metric([], {"vm": vm} | {name: _valid(text) for name, text in known.items()})
            vcpus.add_metric([vm], sum(file.kind == "vcpu" for file in files))
        yield about
        yield vcpus
        yield GaugeMetricFamily("kvmstats_vms", "VMs that are exported.", len(self._files))
        reasons = Counter(refusal.reason for refusal in self._roster.refusals.values())
        refused = GaugeMetricFamily(
            "kvmstats_vms_refused", "VMs that are wanted and cannot be attached to, or not anew.", labels=["reason"]
        )
        for reason in REASONS:
            refused.add_metric([reason], reasons[reason])
        yield refused
        spent = GaugeMetricFamily(
            "kvmstats_scrape_duration_seconds", "How long this scrape looked at the host, and read.", labels=["stage"]
        )
        spent.add_metric(["look"], look)
        spent.add_metric(["sweep"], sweep)
        yield spent
        yield GaugeMetricFamily(
            "kvmstats_vcpus_without_sched",
            "vCPUs without sched_* statistics: their thread is not known.",
            self._lacking,
        )
        yield CounterMetricFamily("kvmstats_read_errors", "Stats files that could not be read.", self._errors)
        yield InfoMetricFamily("kvmstats_build", "This exporter.", {"version": kvmstats_fast.__version__})


def _valid(text: str) -> str:
    """Return text as UTF-8 has it: names of programs and guests are whatever bytes their makers like."""
    return text.encode("utf-8", "backslashreplace").decode()
