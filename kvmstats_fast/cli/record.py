"""``kvmstats record``: the VMs of a host into a recording, while they come and go."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvmstats_fast._text import format_si, printable, waits_for
from kvmstats_fast.cli._command import call_at_end, ended_by_signals, on_signals, start, wait_for
from kvmstats_fast.cli._grammar import (
    UsageError,
    add_event,
    add_sched,
    add_targets,
    check_sched,
    duration,
    interval,
    named_vms,
    number,
    size,
    usage_errors,
)
from kvmstats_fast.formats.recorder import Recorder, is_stream_name
from kvmstats_fast.sampling.flight import Condition, EachSecond, Flight
from kvmstats_fast.sampling.follow import follow
from kvmstats_fast.vmm.find import may_have_vm
from kvmstats_fast.vmm.machine import attach
from kvmstats_fast.vmm.ways import leave_out_advice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.follow import Follow

_PROGRESS = 0.5  # s between lines of progress
_PART = re.compile(r"(?:vm|vcpu)[0-9]*-([0-9]{5,})\.arrows")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.usage = "kvmstats record [options] [-- COMMAND ...]"
    parser.description = (
        "Record every VM of this host, or those that are named, until Ctrl-C, for a while (-d), or while COMMAND "
        "runs. VMs and vCPUs are picked up as they appear, and dropped as they go. SIGHUP starts new files. With "
        "--when, act as a flight recorder: PATH/full has every sweep around those for which CONDITION holds, "
        "PATH/overview one sweep a second."
    )
    add_targets(parser, recorded=False, socket=False)
    add_event(parser)
    add_sched(parser)
    parser.add_argument(
        "-I", "--interval", type=interval, default=1.0, metavar="TIME", help="time between sweeps (default: 1s)"
    )
    parser.add_argument("-d", "--duration", type=duration, metavar="TIME", help="stop after this time (10m, 24h)")
    parser.add_argument("-n", "--count", type=number, metavar="N", help="stop after N sweeps")
    parser.add_argument(
        "--priority", type=number, metavar="1-99", help="sample at this real-time priority (SCHED_FIFO)"
    )
    parser.add_argument("-o", "--output", metavar="PATH", help="a new directory (default: kvmstats-DATE-TIME)")
    parser.add_argument("--force", action="store_true", help="replace an existing recording")
    parser.add_argument(
        "--rotate", metavar="SIZE|TIME", type=_rotation, help="start new files at this size or age (100M, 1h)"
    )
    parser.add_argument("--keep", type=number, metavar="N", help="keep only the last N files of each kind")
    parser.add_argument(
        "--when", metavar="CONDITION", help="'exits>50000/s' or 'halted_fraction<5%%': what to keep sweeps around"
    )
    parser.add_argument(
        "--before", type=duration, metavar="TIME", help="time kept before CONDITION holds (default: 1s)"
    )
    parser.add_argument("--after", type=duration, metavar="TIME", help="time kept after it (default: 1s)")
    parser.add_argument("--per-vcpu", action="store_true", help="apply CONDITION to each vCPU, not to a VM's sum")


def _rotation(text: str) -> dict[str, Any]:
    for name, parse in (("rotate_bytes", size), ("rotate_seconds", duration)):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return {name: parse(text)}
    raise argparse.ArgumentTypeError(f"{text!r} is neither a size above 0 (500k, 100M, 2G) nor a time (30s, 10m, 1h)")


class _Writer(Protocol):
    """What samples are written to."""

    sweeps: int
    size: int

    def write(self, samples: Samples) -> None: ...
    def rotate(self) -> None: ...
    def close(self) -> None: ...


def run(arguments: argparse.Namespace) -> int:
    """Record."""
    condition = _condition(arguments)
    check_sched(arguments)
    if arguments.output == "-":
        raise UsageError("a recording is a directory, which stdout cannot be: name one with -o")
    if arguments.keep and not arguments.rotate:
        raise UsageError("--keep removes old files: it needs --rotate, which starts new ones")
    path = Path(arguments.output or time.strftime("kvmstats-%Y%m%d-%H%M%S"))
    names = named_vms(arguments)
    for pid in arguments.pid or ():
        if not may_have_vm(pid):
            attach(pid).close()  # raises why not; otherwise it has made a VM by now
    with ExitStack() as opened:
        with usage_errors():
            following = follow(
                names,
                arguments.interval,
                arguments.event,
                inject=arguments.inject,
                count=arguments.count,
                duration=arguments.duration,
                priority=arguments.priority,
                sched=arguments.sched,
            )
            chunks = opened.enter_context(following)
        hung_up = threading.Event()
        opened.enter_context(ended_by_signals(chunks.stop))  # before there is a path, by which others know that it runs
        opened.enter_context(on_signals((signal.SIGHUP,), hung_up.set))
        if arguments.force:
            _remove(path)
        if not path.exists():
            opened.callback(_remove_empty, path)  # of a command that is not there, or a VM that never came
        writer = opened.enter_context(_open(path, arguments, condition))
        shown = _Shown(chunks, writer, waits_for(names))
        chunks.on_look = shown.tell_refused
        status = _record(arguments, chunks, writer, shown, hung_up)
    if arguments.keep:
        _retain(writer, arguments.keep)  # the last files have come into being at the end
    shown.end(path)
    return status


def _record(
    arguments: argparse.Namespace, chunks: Follow, writer: _Writer, shown: _Shown, hung_up: threading.Event
) -> int:
    process = None
    if arguments.command:
        process = start(arguments.command)
        call_at_end(process, chunks.stop)
    for samples in _each(chunks):
        writer.write(samples)
        if hung_up.is_set():
            hung_up.clear()
            writer.rotate()
        if arguments.keep:
            _retain(writer, arguments.keep)
        shown.update(samples)
    return 0 if process is None else wait_for(process)


def _each(chunks: Follow) -> Iterator[Samples]:
    """Yield the chunks; a statistic that no VM has is found when the first one comes."""
    while True:
        with usage_errors():
            samples = next(chunks, None)
        if samples is None:
            return
        yield samples


def _condition(arguments: argparse.Namespace) -> Condition | None:
    if not arguments.when:
        for option, given in (
            ("--before", arguments.before),
            ("--after", arguments.after),
            ("--per-vcpu", arguments.per_vcpu),
        ):
            if given:
                raise UsageError(f"--{option.replace('_', '-')} is for a flight recorder: it needs --when")
        return None
    with usage_errors():
        return Condition.parse(arguments.when, per_vcpu=arguments.per_vcpu)


@contextlib.contextmanager
def _open(path: Path, arguments: argparse.Namespace, condition: Condition | None) -> Iterator[Any]:
    rotation = arguments.rotate or {}
    if condition is None:
        with Recorder(path, **rotation) as recorder:
            yield recorder
        return
    with Recorder(path / "full", **rotation) as full, Recorder(path / "overview") as overview:
        flight = _FlightWriter(Flight(condition, arguments.before or 1.0, arguments.after or 1.0), full, overview)
        yield flight
        flight.end()


class _FlightWriter:
    """Writes what a flight recorder keeps."""

    def __init__(self, flight: Flight, full: Recorder, overview: Recorder) -> None:
        self._flight, self._each_second = flight, EachSecond()
        self.full, self._overview = full, overview

    @property
    def sweeps(self) -> int:
        """Sweeps in both."""
        return self.full.sweeps + self._overview.sweeps

    @property
    def size(self) -> int:
        """Bytes of both."""
        return self.full.size + self._overview.size

    @property
    def path(self) -> Path:
        """Where the rotated files are."""
        return self.full.path

    def write(self, samples: Samples) -> None:
        """Write what is to be kept."""
        with usage_errors():  # a name that is not there
            kept = list(self._flight.feed(samples))
        for part in kept:
            self.full.write(part)
        for sweep in self._each_second.feed(samples):
            self._overview.write(sweep)

    def rotate(self) -> None:
        """Begin new files."""
        self.full.rotate()
        self._overview.rotate()

    def end(self) -> None:
        """Write the last second."""
        for sweep in self._each_second.end():
            self._overview.write(sweep)


def _retain(writer: Any, keep: int) -> None:
    """Remove the oldest files of a recording."""
    parts: dict[int, list[str]] = {}
    with os.scandir(writer.path) as entries:
        for entry in entries:
            if found := _PART.fullmatch(entry.name):
                parts.setdefault(int(found[1]), []).append(entry.path)
    for number_of_part in sorted(parts)[:-keep]:
        for path in parts[number_of_part]:
            Path(path).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a recording that is there, and nothing but recordings."""
    for folder in (path / "full", path / "overview", path):
        if folder.is_dir():
            names = [one.name for one in folder.iterdir()]
            if foreign := [name for name in names if not is_stream_name(name)]:
                raise FileExistsError(
                    errno.EEXIST, f"it holds more than a recording ({printable(foreign[0])})", str(folder)
                )
            for name in names:
                (folder / name).unlink()
            folder.rmdir()


def _remove_empty(path: Path) -> None:
    """Remove a recording in which there is nothing."""
    for folder in (path / "full", path / "overview", path):
        with contextlib.suppress(OSError):
            folder.rmdir()


class _Shown:
    """Says on stderr how far it is: on a terminal in one line that changes."""

    def __init__(self, chunks: Follow, writer: _Writer, waits: str) -> None:
        self._chunks, self._writer = chunks, writer
        self._began = self._said = time.monotonic()
        self._live = sys.stderr.isatty()
        self._refused: dict[int, str] = {}
        self.vms: dict[str, None] = {}
        self._sweeps = 0
        self.tell_refused()
        if not chunks.machines and self._refused:
            self._print("no VM can be recorded yet; it waits for one (`kvmstats list -w` says what helps)")
        elif not chunks.machines:
            self._print(waits)

    def tell_refused(self) -> None:
        """Say who is left out that was not before, and why."""
        refused = self._chunks.refused
        for pid, why in refused.items():
            if self._refused.get(pid) != why:
                self._print(f"process {pid} is left out: {printable(leave_out_advice(why), 400)}")
        self._refused = refused

    def update(self, samples: Samples) -> None:
        """Take note of what was written."""
        self._sweeps += len(samples)
        self.vms |= dict.fromkeys(samples.vms)
        now = time.monotonic()
        if self._live and now - self._said >= _PROGRESS:
            self._said = now
            print(f"\r\x1b[K{self._describe()}", end="", file=sys.stderr, flush=True)

    def _describe(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        hours, minutes = divmod(minutes, 60)
        vms = len(self._chunks.machines)
        return (
            f"{hours:02}:{minutes:02}:{seconds:02}  {vms} VM{'' if vms == 1 else 's'}  {self._sweeps:,} sweeps  "
            f"{self._chunks.missed:,} missed  {format_si(self._writer.size, 'B')}"
        )

    def _print(self, text: str) -> None:
        print(("\r\x1b[K" if self._live else "") + f"kvmstats: {text}", file=sys.stderr)

    def end(self, path: Path) -> None:
        """Say what was recorded, and what can be done with it."""
        sweeps, vms = self._sweeps, len(self.vms)
        if not self._writer.sweeps:
            none = "" if vms else "no VM could be attached to; " if self._refused else "no VM came; "
            self._print(f"{none}nothing was recorded")
            return
        kept = ""
        if isinstance(self._writer, _FlightWriter):
            found = self._writer.full.sweeps
            kept = f", {found:,} of them kept" if found else ", none kept: the condition never held"
            path /= "full" if found else "overview"
        self._print(
            f"{sweeps:,} sweep{'' if sweeps == 1 else 's'} of {vms} VM{'' if vms == 1 else 's'}{kept}, "
            f"{self._chunks.missed:,} ticks missed, {format_si(self._writer.size, 'B')}: "
            f"kvmstats report {shlex.quote(str(path))}"
        )
        if sweeps == 1:
            self._print(
                "one sweep was recorded; rates, and conditions about them, need two: a longer -d or a shorter -I"
            )
