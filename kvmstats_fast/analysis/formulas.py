"""Which figures follow from which statistics of a run.

What the kernel counts is described in ``Documentation/virt/kvm/halt-polling.rst`` and, statistic by statistic, where
it is counted: ``virt/kvm/kvm_main.c`` (halts), ``arch/x86/kvm/x86.c`` and its like (exits), ``arch/x86/kvm/mmu`` (page
faults, pages).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmstats_fast.analysis.figures import PER_SECOND, Figure, Figures
from kvmstats_fast.analysis.time_shares import HALT, NEEDED, POLLS, RUN, WAIT, divide
from kvmstats_fast.analysis.whole_run import Whole, WholeRun
from kvmstats_fast.file_info import check_by, group_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvmstats_fast.analysis.whole_run import Values
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.samples import Samples

#: Counters of exits by kind: ``io_exits``, ``exit_instruction``, ``wfi_exit_stat``, ``mmio_exit_user``.
EXIT_KIND = re.compile(r"(?:.+_)?exits?(?:_.+)?")
ALL_EXITS = ("exits", "sum_exits")
#: Counters of why KVM_RUN returned to the VMM (``vcpu_run`` in ``arch/x86/kvm/x86.c``), or did not: what made the guest
#: exit before, or nothing did, is counted elsewhere.
NO_KIND = ("signal_exits", "request_irq_exits", "light_exits")
_PAGE_SIZES = {"pages_4k": 1 << 12, "pages_2m": 1 << 21, "pages_1g": 1 << 30}
_HALT_TIMES = (HALT, *POLLS)
_POLL_COUNTS = ("halt_successful_poll", "halt_attempted_poll")
#: By what `divide` calls it: what a share is of.
_TIMES = {
    "running": f"({RUN} - polling) / elapsed",
    "polling": f"({' + '.join(POLLS)}, at most {RUN}) / elapsed",
    "halted": f"({HALT}, and the halt under way, at most asleep) / elapsed",
    "steal": f"{WAIT} / elapsed",
    "other": f"(asleep, elapsed - {RUN} - {WAIT}, but not halted) / elapsed",
}


class _Deriver:
    """Makes figures of the files of one kind: of each, of each VM, or of each host."""

    def __init__(self, run: Whole, by: str) -> None:
        self.run = run
        self.by = by

    def rate(self, name: str, by: str | None = None) -> Figure:
        """Return how much of a statistic was counted per second."""
        kept, rate = self.run.files_having([name]), self.run.per_second(self.run.change(name), by or self.by)
        return self.figure(f"{name}/s", name, kept, rate, by=by)

    def figure(  # noqa: PLR0913 - what a figure is made of
        self,
        name: str,
        formula: str,
        kept: Sequence[int],
        top: Values,
        bottom: Values | None = None,
        *,
        by: str | None = None,
    ) -> Figure:
        """Return a figure of the files `kept`, which have all its parts; there may be none.

        It is what the files of a VM or host add up to: a rate `top`, or a fraction of which `top` and `bottom` do.
        """
        files = tuple(self.run.files[index] for index in kept)
        by = by or self.by
        owner, firsts = _group(files, by)
        known = ~np.isnan((top if bottom is None else top + bottom)[kept])

        def add_up(of_files: Values) -> Values:
            return np.bincount(owner[known], of_files[kept][known], len(firsts)).astype(np.float64)

        divisor = np.minimum(add_up(np.ones_like(top)), 1) if bottom is None else add_up(bottom)
        values = np.divide(add_up(top), divisor, out=np.full(len(firsts), np.nan), where=divisor != 0)
        return Figure(
            name,
            values,
            PER_SECOND if bottom is None else "",
            files if by == "vcpu" else (),
            formula,
            () if by == "host" else tuple(info.vm for info in firsts),
            tuple(info.host for info in firsts),
        )

    def imbalance(self, name: str, figure: Figure) -> Iterator[Figure]:
        """Yield how uneven a figure of files is over the vCPUs of each VM; of a host that is nothing."""
        if self.by == "host":
            return
        values = []
        groups = group_files(figure.files, "vm")
        for group in groups.values():
            known = figure.values[group][~np.isnan(figure.values[group])]
            mean = known.mean() if known.size else 0.0
            values.append(known.max() / mean - 1 if mean > 0 else np.nan)
        formula = f"max / mean - 1 of {figure.name} in a VM"
        hosts = tuple(figure.hosts[group[0]] for group in groups.values())
        yield Figure(f"{name}_imbalance", np.array(values, np.float64), "", (), formula, tuple(groups), hosts)


def _group(files: tuple[FileInfo, ...], by: str) -> tuple[npt.NDArray[np.intp], tuple[FileInfo, ...]]:
    """Return to which VM or host each file belongs, by number, and the first file of each; or each file alone."""
    if by == "vcpu":
        return np.arange(len(files)), files
    groups = list(group_files(files, by).values())
    owner = np.empty(len(files), np.intp)
    for number, group in enumerate(groups):
        owner[group] = number
    return owner, tuple(files[group[0]] for group in groups)


def derive_figures(samples: Samples, by: str) -> Figures:
    """Return the derived figures of a run; see `Samples.figures`."""
    check_by(by)
    return figures_of(WholeRun(samples, "vcpu"), WholeRun(samples, "vm"), by)


def figures_of(vcpus: Whole, vms: Whole, by: str) -> Figures:
    """Return the figures that follow from what files of vCPUs and of VMs did over a whole run."""
    vcpu, vm = _Deriver(vcpus, by), _Deriver(vms, by)
    found = [*_exits(vcpu), *_halts(vcpu), *_times(vcpu), *_page_faults(vcpu), *_pages(vm)]
    return Figures(figure for figure in found if figure.values.size)


def rates_of(run: Whole, names: Iterable[str], by: str) -> Figures:
    """Return how often some statistics counted per second; of those that count time, the share of it."""
    deriver = _Deriver(run, by)
    found = []
    for name in names:
        if name in run.counts:
            found.append(deriver.rate(name))
        else:
            kept = run.files_having([name])
            found.append(deriver.figure(f"{name}/s", f"{name} / elapsed", kept, run.change(name), run.seconds))
    return Figures(figure for figure in found if figure.values.size)


def _exits(vcpu: _Deriver) -> Iterator[Figure]:
    run = vcpu.run
    names = [name for name in run.counts if EXIT_KIND.fullmatch(name)]
    for name in names:
        yield vcpu.rate(name)
        if name in ALL_EXITS:
            yield from vcpu.imbalance(name, vcpu.rate(name, "vcpu"))
    kinds = [name for name in names if name not in ALL_EXITS + NO_KIND]
    for name in ALL_EXITS:
        having = {kind: run.files_having([name, kind]) for kind in kinds}
        there = sorted(set().union(*having.values()))
        if there:
            other = run.change(name)
            for kind, files in having.items():
                other[files] -= run.change(kind)[files]
            formula = f"max({name} - ({' + '.join(kind for kind in kinds if having[kind])}), 0)"
            yield vcpu.figure("other_exits/s", formula, there, run.per_second(np.maximum(other, 0), vcpu.by))
            return


def _halts(vcpu: _Deriver) -> Iterator[Figure]:
    run, names = vcpu.run, set(vcpu.run.names)
    if names.issuperset(_POLL_COUNTS):
        kept = run.files_having(_POLL_COUNTS)
        formula = " / ".join(_POLL_COUNTS)
        yield vcpu.figure("halt_poll_success_ratio", formula, kept, *map(run.change, _POLL_COUNTS))
    if names.issuperset(POLLS):
        success, fail = map(run.change, POLLS)
        formula = f"{POLLS[0]} / ({' + '.join(POLLS)})"
        kept = run.files_having(POLLS)
        yield vcpu.figure("halt_poll_time_ratio", formula, kept, success, success + fail)
    if names.issuperset(_HALT_TIMES):
        halted = np.sum([run.change(name) for name in _HALT_TIMES], axis=0)
        kept, formula = run.files_having(_HALT_TIMES), f"({' + '.join(_HALT_TIMES)}) / elapsed"
        about = ("halted_fraction", formula, kept, halted, run.seconds)
        yield vcpu.figure(*about)
        yield from vcpu.imbalance("halted", vcpu.figure(*about, by="vcpu"))


def _times(vcpu: _Deriver) -> Iterator[Figure]:
    run = vcpu.run
    if not set(run.names).issuperset(NEEDED):
        return
    kept = run.files_having(NEEDED)
    poll = np.sum([run.change(name) for name in POLLS], axis=0)
    parts = divide(run.seconds, run.change(RUN), run.change(WAIT), poll, run.halted())
    for name, seconds in parts.items():
        yield vcpu.figure(f"{name}_share", _TIMES[name], kept, seconds, run.seconds)


def _page_faults(vcpu: _Deriver) -> Iterator[Figure]:
    run = vcpu.run
    if "pf_taken" not in run.names:
        return
    yield vcpu.rate("pf_taken")
    for name in run.names:
        # pf_guest counts faults that the guest handles itself, which KVM did not take.
        if name.startswith("pf_") and name not in ("pf_taken", "pf_guest"):
            parts = (name, "pf_taken")
            yield vcpu.figure(f"{name}_share", " / ".join(parts), run.files_having(parts), *map(run.change, parts))


def _pages(vm: _Deriver) -> Iterator[Figure]:
    if not set(vm.run.names).issuperset(_PAGE_SIZES):
        return
    pages = {name: vm.run.end(name) for name in _PAGE_SIZES}
    for count in pages.values():
        count[count < 0] = np.nan  # KVM has taken away more than it added: what is mapped is not known
    mapped = {name: pages[name] * size for name, size in _PAGE_SIZES.items()}
    everything = np.sum(list(mapped.values()), axis=0)
    formula = "bytes mapped by pages_2m and pages_1g / all, at the end"
    kept = vm.run.files_having(_PAGE_SIZES)
    yield vm.figure("large_page_share", formula, kept, everything - mapped["pages_4k"], everything)
