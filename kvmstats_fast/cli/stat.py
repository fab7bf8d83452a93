"""``kvmstats stat``: count for a while, or while a command runs, and show what was counted."""

from __future__ import annotations

import heapq
import math
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._text import describe_error
from kvmstats_fast.analysis.several_runs import SeveralRuns
from kvmstats_fast.cli._command import call_at_end, ended_by_signals, start, wait_for
from kvmstats_fast.cli._files import check_no_capture, check_selection, choose, open_runs
from kvmstats_fast.cli._grammar import (
    UsageError,
    add_output,
    add_sched,
    add_selection,
    add_targets,
    check_sched,
    duration,
    interval,
    number,
    usage_errors,
)
from kvmstats_fast.cli._output import RowWriter, open_output
from kvmstats_fast.cli._present import present, vms_of
from kvmstats_fast.cli._recorded import cover, summarize
from kvmstats_fast.cli._rows import rows_of
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.cli._targets import are_named, check_targets, open_targets
from kvmstats_fast.cli.run import start_and_show
from kvmstats_fast.errors import SamplingWarning, VmGoneError
from kvmstats_fast.formats.wanted import resample_steps
from kvmstats_fast.samples import Samples
from kvmstats_fast.sampling.measure import measure
from kvmstats_fast.sampling.sampler import Sampler

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvmstats_fast.cli._present import Vm
    from kvmstats_fast.cli._recorded import Run
    from kvmstats_fast.cli._rows import Key, Row
    from kvmstats_fast.formats.wanted import Step
    from kvmstats_fast.stats_file import StatsFile

_LOOK = 1.0  # s between looks at what there is


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.usage = "kvmstats stat [options] [FILE ...] [-- COMMAND ...]"
    parser.description = (
        "Count until Ctrl-C, for a while (-d), or while COMMAND runs, and show the result; with COMMAND, exit with "
        "its status. Without -p, -g or --socket, COMMAND is a VMM: as by `kvmstats run`, it is started under the hold "
        "library, and the values of its stats files at its end are shown on stderr. Of the options, -e goes with it, "
        "and -j with -o FILE. With FILE, show what was recorded. Statistics that did not change are left out."
    )
    add_targets(parser)
    add_selection(parser)
    add_sched(parser)
    parser.add_argument("-I", "--interval", type=interval, metavar="TIME", help="show each interval (1s, 100ms)")
    parser.add_argument("-d", "--duration", type=duration, metavar="TIME", help="stop after this time (10s, 5m)")
    parser.add_argument("-n", "--count", type=number, metavar="N", help="stop after N intervals")
    parser.add_argument("--per-vcpu", action="store_true", help="show each vCPU separately")
    parser.add_argument("-z", "--zero", action="store_true", help="also show statistics that did not change")
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Count, and show it."""
    check_targets(arguments, guests_of_files=True)
    if arguments.count and not arguments.interval:
        raise UsageError("-n is the number of intervals: it takes -I")
    if arguments.command and arguments.file:
        raise UsageError(f"{arguments.file[0]} is a recording, and nothing is counted while a command runs: leave one")
    if arguments.command and arguments.duration:
        raise UsageError("-d cannot be combined with a command: sampling lasts as long as the command")
    if arguments.file and arguments.duration and not arguments.interval:
        raise UsageError("-d of a recording is for how long intervals of it are shown: it needs -I")
    if arguments.file and arguments.sched:
        raise UsageError("a recording has what was recorded: --sched does not go with it")
    if not arguments.file:
        check_sched(arguments)
    if arguments.command and not are_named(arguments):
        return _run_vmm(arguments)
    with ExitStack() as opened:
        if arguments.file:
            (_show_recorded_intervals if arguments.interval else _show_recorded)(
                arguments, _Shown(arguments, opened, {})
            )
            return 0
        targets = open_targets(arguments, opened)
        files = _of_vcpus(targets.files, arguments.vcpu)
        show = _Shown(arguments, opened, targets.vmms)
        return (_count_intervals if arguments.interval else _count_once)(arguments, files, show)


def _run_vmm(arguments: argparse.Namespace) -> int:
    for option, given in (
        ("-I", arguments.interval),
        ("-x", arguments.csv),
        ("--vcpu", arguments.vcpu),
        ("--per-vcpu", arguments.per_vcpu),
        ("-z", arguments.zero),
        ("--sched", arguments.sched),
        ("-j without -o", arguments.json and arguments.output == "-"),
        ("-o without -j", arguments.output != "-" and not arguments.json),
    ):
        if given:
            raise UsageError(
                f"{option} does not go with a VMM that is started here, as `kvmstats run` does, and whose stdout it "
                "is. To count what other VMs do while a command runs, name them: -p PID, -g '*'"
            )
    path = Path(arguments.output) if arguments.json else None
    return start_and_show(arguments.command, arguments.event, path, force=arguments.force)


class _Shown:
    """Shows what was counted as the command line asks for it."""

    def __init__(self, arguments: argparse.Namespace, opened: ExitStack, vmms: Mapping[int, str]) -> None:
        self._arguments, self._vmms = arguments, vmms
        self._writer = RowWriter(arguments, opened.enter_context(open_output(arguments)))
        self._blocks = 0

    @property
    def by(self) -> str:
        """Return of what there is a row."""
        return "vcpu" if self._arguments.per_vcpu else "vm"

    def __call__(self, runs: Sequence[Samples], time: float | None = None) -> None:
        """Show runs of the same time; with the time since the start, if they are some of many."""
        together = SeveralRuns()
        rows: dict[Key, Row] = {}
        for samples in runs:
            together.add_step(samples, follows=False)
            rows |= rows_of(together.end_run(), self.by)
        elapsed: dict[tuple[str, str], float] = {}
        for samples in runs:
            for info in samples.files:
                elapsed[info.host, info.vm] = max(samples.elapsed, elapsed.get((info.host, info.vm), 0.0))
        files = [info for samples in runs for info in samples.files]
        self.write([*rows.values()], lambda: vms_of(files, together.figures("vm"), elapsed.get, self._vmms), time)

    def write(
        self, every: Sequence[Row], vms: Callable[[], dict[tuple[str, str], Vm]], time: float | None = None
    ) -> None:
        """Show rows of these VMs."""
        zero = self._arguments.zero
        if not self._writer.text:
            self._writer.write([row for row in every if row.moved or zero], time)
            return
        output = self._writer.output
        if self._blocks:
            print(file=output)
        self._blocks += 1
        if time is not None:
            print(f"{time:.3f} s", file=output)
        present(every, vms(), Screen.of(output, self._arguments.color), zero=zero)
        output.flush()


def _show_recorded(arguments: argparse.Namespace, show: _Shown) -> None:
    with usage_errors():
        recorded = summarize(arguments.file, show.by, choose(arguments), with_steps=False)
    runs: dict[tuple[str, str], list[Run]] = {}
    for life in recorded.lives:
        runs.setdefault((life.host, life.vm), []).extend(life.runs)

    def seconds(whose: tuple[str, str]) -> float | None:
        return None if all(run.is_capture for run in runs[whose]) else cover(runs[whose])

    show.write([row.whole() for row in recorded.rows], lambda: vms_of(recorded.files, recorded.figures("vm"), seconds))


def _show_recorded_intervals(arguments: argparse.Namespace, show: _Shown) -> None:
    """Show what was recorded as it would have been shown then: runs of the same time together."""
    with usage_errors():
        runs = open_runs(arguments.file)
        check_no_capture(runs, "-I")
        selection = choose(arguments)
        check_selection(runs, selection, "these files")
        intervals = heapq.merge(*(_pairs(run.read(selection), arguments.interval) for run in runs), key=_end)
        start: int | None = None
        for number, (end, found) in enumerate(groupby(intervals, _end), 1):
            together = list(found)
            start = int(together[0].wall_time[0]) if start is None else start
            time = (end - start) / 1e9
            if time > (arguments.duration or math.inf) or number > (arguments.count or math.inf):
                break
            show(together, time)


def _end(samples: Samples) -> int:
    return int(samples.wall_time[-1])


def _pairs(steps: Iterable[Step], interval: float) -> Iterator[Samples]:
    """Give the first and last sweep of each interval; the last is the first of the next one."""
    begins: deque[Samples] = deque()

    def noted() -> Iterator[Step]:
        follows = False
        for step in steps:
            follows &= step.follows
            if len(step.samples) and not follows:
                begins.append(step.samples[:1])
                follows = True
            yield step

    before: Samples | None = None
    for step in resample_steps(noted(), interval):
        if before is None or not step.follows:
            before = begins.popleft()
        for sweep in range(len(step.samples)):
            after = step.samples[sweep : sweep + 1]
            if after.time[0] > before.time[0]:
                yield Samples.concatenate([replace(before, interval=after.interval), after])
            before = after


def _of_vcpus(files: Sequence[StatsFile], vcpus: Sequence[int] | None) -> Sequence[StatsFile]:
    """Return the files of some vCPUs."""
    there = {file.vcpu_id for file in files}
    for one in vcpus or ():
        if one not in there:
            raise UsageError(f"no VM that is counted has a vCPU {one}")
    return files if vcpus is None else [file for file in files if file.vcpu_id in vcpus]


class _Latest:
    """What each VM had counted when it was read last, and what cannot be read any more."""

    def __init__(self) -> None:
        self._of: dict[str, Samples] = {}
        self._lost: dict[str, None] = {}

    def take(self, samples: Samples) -> list[str]:
        """Take another reading; return the VMs of which there is anything left, for which it counts."""
        failed = {error.file for error in samples.errors}
        there = dict.fromkeys((info.vm for at, info in enumerate(samples.files) if at not in failed), samples)
        self._of |= there
        for error in samples.errors:
            gone = isinstance(error.error, VmGoneError)  # which says of what itself
            self.lose(describe_error(error.error) if gone else f"{samples.files[error.file]}: {error.error}")
        return [*there]

    def lose(self, text: str) -> None:
        """Say, once, what cannot be read any more."""
        if text not in self._lost:
            self._lost[text] = None
            print(f"kvmstats: {text}", file=sys.stderr)

    def runs(self) -> list[Samples]:
        """Return the readings, each of the VMs for which it is the last."""
        readings = {id(samples): samples for samples in self._of.values()}
        return [one.select(vm=[vm for vm, its in self._of.items() if its is one]) for one in readings.values()]


def _count_once(arguments: argparse.Namespace, files: Sequence[StatsFile], show: _Shown) -> int:
    """Count until the end; now and then look what there is, because nobody says beforehand when a VM ends."""
    process, latest, gone = None, _Latest(), None
    with usage_errors():
        measuring = measure(files, arguments.event, sched=arguments.sched)
    with ended_by_signals() as ended:
        try:
            with measuring as measured:
                over = ended
                if arguments.command:
                    process, over = start(arguments.command), threading.Event()
                    call_at_end(process, over.set)
                end = time.monotonic() + (arguments.duration or math.inf)
                while not over.wait(min(_LOOK, max(end - time.monotonic(), 0))) and time.monotonic() < end:
                    latest.take(measured.samples)
            latest.take(measured.samples)
        except VmGoneError as error:
            gone = error
        status = 0 if process is None else wait_for(process)
    runs = latest.runs()
    if gone is not None:
        if not runs:
            raise gone
        for file in files:  # the error is about one of them
            try:
                file.read()
            except VmGoneError as error:  # noqa: PERF203
                latest.lose(describe_error(error))
    show(runs)
    return status


def _count_intervals(arguments: argparse.Namespace, files: Sequence[StatsFile], show: _Shown) -> int:
    with usage_errors():
        sampler = Sampler(files, arguments.event, sched=arguments.sched)
    process, latest = None, _Latest()
    with ended_by_signals(sampler.stop), warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplingWarning)  # said once, at the end
        count = None if arguments.count is None else arguments.count + 1
        stream = sampler.stream(arguments.interval, 1, count=count, duration=arguments.duration)
        with stream as chunks:
            if arguments.command:
                process = start(arguments.command)
                call_at_end(process, sampler.stop)
            first = None
            for before, after in pairwise(chunks):
                first = before if first is None else first
                if there := latest.take(after):
                    both = Samples.concatenate([before, after]).select(vm=there)
                    show([both], (int(after.time[-1]) - int(first.time[0])) / 1e9)
        if stream.missed:
            print(f"kvmstats: intervals missed: {stream.missed}", file=sys.stderr)
    return 0 if process is None else wait_for(process)
