"""Figures that follow from several statistics of a run, each with its formula.

What the kernel counts is described in ``Documentation/virt/kvm/halt-polling.rst`` and, statistic by statistic, where
it is counted: ``virt/kvm/kvm_main.c`` (halts), ``arch/x86/kvm/mmu`` (page faults, pages).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast._text import format_number, format_table
from kvmstats_fast.analysis.whole_run import WholeRun

if TYPE_CHECKING:
    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples

#: Counters of exits by kind: ``io_exits``, ``exit_instruction``, ``wfi_exit_stat``, ``mmio_exit_user``.
_EXIT_KIND = re.compile(r"(?:.+_)?exits?(?:_.+)?")
_ALL_EXITS = ("exits", "sum_exits")
_PAGE_SIZES = {"pages_4k": 1 << 12, "pages_2m": 1 << 21, "pages_1g": 1 << 30}
_HALT_TIMES = ("halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns")
_POLL_COUNTS = ("halt_successful_poll", "halt_attempted_poll")
_POLL_TIMES = ("halt_poll_success_ns", "halt_poll_fail_ns")


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One derived figure of a run.

    Attributes
    ----------
    name : str
    values : numpy.ndarray
        float64, shape ``(n,)``: one for each of `files`, or of `vms` if the figure is over the vCPUs of a VM. NaN where
        it is not defined: a ratio to nothing, a run of one sweep, a file that failed at once, a count that reads below
        0.
    units : str
        ``"1/s"``, or empty for a fraction.
    files : tuple of FileInfo
        The files that have every statistic of the formula; empty if the figure is over the vCPUs of a VM.
    formula : str
        How it follows from the statistics.
    vms : tuple of str
        The VM of each value: a label, as in `FileInfo`.
    """

    name: str
    values: Values
    units: str
    files: tuple[FileInfo, ...]
    formula: str
    vms: tuple[str, ...] = ()


class Figures(Mapping[str, Figure]):
    """Derived figures by name; ``print(figures)`` is a table. A figure is missing if no file has its statistics."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._by_name = {figure.name: figure for figure in figures}

    def __getitem__(self, name: str) -> Figure:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __str__(self) -> str:
        if not self:
            return "no figures: these files have the statistics of none"
        rows: list[tuple[str, ...]] = [("", "min", "mean", "max", "", "")]
        for figure in self.values():
            known = figure.values[~np.isnan(figure.values)]
            numbers = (known.min(), known.mean(), known.max()) if known.size else (np.nan,) * 3
            cells = [format_number(number, ".4g") for number in numbers]
            whose = f"of {_count(figure.files, 'file') if figure.files else _count(figure.vms, 'VM')}"
            rows.append((figure.name, *cells, figure.units, f"{whose}: {figure.formula}"))
        return format_table(rows, "<>>>><")


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _ratio(a: Values, b: Values) -> Values:
    result: Values = np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0)
    return result


def _figure(  # noqa: PLR0913, PLR0917 - what a figure is made of
    run: WholeRun, name: str, values: Values, units: str, formula: str, parts: Iterable[str]
) -> Figure:
    """Return a figure of the files that have all its parts, which may be none."""
    kept = run.files_having(parts)
    files = tuple(run.files[i] for i in kept)
    return Figure(name, values[kept], units, files, formula, tuple(info.vm for info in files))


def figures(samples: Samples) -> Figures:
    """Return the derived figures of a run; see `Samples.figures`."""
    vcpu = WholeRun(samples, "vcpu")
    found = [*_exits(vcpu), *_halts(vcpu), *_page_faults(vcpu), *_pages(WholeRun(samples, "vm"))]
    return Figures(figure for figure in found if figure.values.size)


def _exits(vcpu: WholeRun) -> Iterator[Figure]:
    for name in filter(_EXIT_KIND.fullmatch, vcpu.counts):
        rates = _figure(vcpu, f"{name}/s", vcpu.change(name) / vcpu.seconds, "1/s", name, [name])
        yield rates
        if name in _ALL_EXITS:
            yield _imbalance(name, rates)


def _imbalance(name: str, figure: Figure) -> Figure:
    """Return how uneven a figure is over the vCPUs of each VM."""
    by_vm: dict[str, list[float]] = {vm: [] for vm in figure.vms}
    for vm, value in zip(figure.vms, figure.values.tolist(), strict=True):
        if not np.isnan(value):
            by_vm[vm].append(value)
    imbalance = [max(known) / mean - 1 if (mean := np.mean(known or 0)) > 0 else np.nan for known in by_vm.values()]
    formula = f"max / mean - 1 of {figure.name} in a VM"
    return Figure(f"{name}_imbalance", np.array(imbalance, np.float64), "", (), formula, tuple(by_vm))


def _halts(vcpu: WholeRun) -> Iterator[Figure]:
    names = set(vcpu.names)
    if names.issuperset(_POLL_COUNTS):
        success, attempted = map(vcpu.change, _POLL_COUNTS)
        formula = " / ".join(_POLL_COUNTS)
        yield _figure(vcpu, "halt_poll_success_ratio", _ratio(success, attempted), "", formula, _POLL_COUNTS)
    if names.issuperset(_POLL_TIMES):
        success, fail = map(vcpu.change, _POLL_TIMES)
        formula = f"{_POLL_TIMES[0]} / ({' + '.join(_POLL_TIMES)})"
        yield _figure(vcpu, "halt_poll_time_ratio", _ratio(success, success + fail), "", formula, _POLL_TIMES)
    if names.issuperset(_HALT_TIMES):
        halted = sum(map(vcpu.change, _HALT_TIMES)) / vcpu.seconds
        formula = f"({' + '.join(_HALT_TIMES)}) / elapsed"
        fraction = _figure(vcpu, "halted_fraction", halted, "", formula, _HALT_TIMES)
        yield fraction
        yield _imbalance("halted", fraction)


def _page_faults(vcpu: WholeRun) -> Iterator[Figure]:
    if "pf_taken" not in vcpu.names:
        return
    taken = vcpu.change("pf_taken")
    yield _figure(vcpu, "pf_taken/s", taken / vcpu.seconds, "1/s", "pf_taken", ["pf_taken"])
    for name in vcpu.names:
        # pf_guest counts faults that the guest handles itself, which KVM did not take.
        if name.startswith("pf_") and name not in ("pf_taken", "pf_guest"):
            share = _ratio(vcpu.change(name), taken)
            yield _figure(vcpu, f"{name}_share", share, "", f"{name} / pf_taken", [name, "pf_taken"])


def _pages(vm: WholeRun) -> Iterator[Figure]:
    if not set(vm.names).issuperset(_PAGE_SIZES):
        return
    pages = {name: vm.end(name) for name in _PAGE_SIZES}
    for count in pages.values():
        count[count < 0] = np.nan  # KVM has taken away more than it added: what is mapped is not known
    mapped = {name: pages[name] * size for name, size in _PAGE_SIZES.items()}
    everything = np.sum(list(mapped.values()), axis=0)
    share = _ratio(everything - mapped["pages_4k"], everything)
    formula = "bytes mapped by pages_2m and pages_1g / all, at the end"
    yield _figure(vm, "large_page_share", share, "", formula, _PAGE_SIZES)
