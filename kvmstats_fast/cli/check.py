"""``kvmstats check``: whether stats files keep the rules of their format, and which ways there are to a VM's."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._text import describe_error, printable
from kvmstats_fast.cli._captures import list_files, read_bytes
from kvmstats_fast.cli._grammar import add_output, add_vms
from kvmstats_fast.cli._output import ObjectWriter, open_output
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.cli._targets import named_pids
from kvmstats_fast.conformance import FAIL, NOT_APPLICABLE, PASS, Finding, Live, check_file
from kvmstats_fast.errors import AttachError, KvmStatsError
from kvmstats_fast.stats_file import StatsFile
from kvmstats_fast.testing import TinyGuest
from kvmstats_fast.vmm.borrow import hold_process
from kvmstats_fast.vmm.find import is_qemu, look_at
from kvmstats_fast.vmm.hazard import check_hazards, has_filter
from kvmstats_fast.vmm.hold import kept_files
from kvmstats_fast.vmm.machine import attach
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.ways import WAYS, leave_out_advice

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvmstats_fast.vmm.find import VmProcess
    from kvmstats_fast.vmm.proc import KvmFile

_CHECK_EXTENSION, _CAP_BINARY_STATS_FD = 0xAE03, 203  # include/uapi/linux/kvm.h
_FIELDS = ("file", *Finding._fields)
_UNSEEN = "not known: this user may not see its files"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Check stats files against each rule of their format: C1 to C20 of the kernel's selftest, D1 to D6 of its "
        "documentation. The files are captured ones, those of a VMM (-p, -g), or without arguments those of a tiny "
        "VM that is made on this kernel. For a VMM, also list the ways to get its files. The exit status is 1 if a "
        "rule is broken."
    )
    add_vms(parser)
    add_output(parser)
    parser.add_argument("file", nargs="*", metavar="FILE", help="a captured stats file, or a directory of them")


def run(arguments: argparse.Namespace) -> int:
    """Check, and say what is broken."""
    broken = False
    refused: list[AttachError] = []
    with ExitStack() as opened:
        output = opened.enter_context(open_output(arguments))
        writer, screen = ObjectWriter(arguments, output, _FIELDS), Screen.of(output, arguments.color)
        pids = named_pids(arguments)
        for name, findings in _subjects(arguments.file, pids, opened, refused):
            broken = broken or any(one.verdict == FAIL for one in findings)
            if writer.text:
                _print(name, findings, screen)
            else:
                writer.write_objects({"file": name} | one._asdict() for one in findings)
        for pid in pids if writer.text else []:
            if ways := [line for way in ways_to(pid) for line in screen.wrap(way, " " * 13)]:
                screen.print("", f"Ways to the files of process {pid}:", *ways)
    if refused:
        *before, last = refused
        for error in before:
            print(f"kvmstats: {describe_error(error)}", file=sys.stderr)
        raise last
    return 1 if broken else 0


def _subjects(
    files: list[str], pids: list[int], opened: ExitStack, refused: list[AttachError]
) -> Iterator[tuple[str, list[Finding]]]:
    """Yield what each file breaks; a process whose files cannot be had is `refused`."""
    for file in (file for path in files for file in list_files(Path(path))):
        yield str(file), check_file(partial(_slice, read_bytes(file)))
    for pid in pids:
        try:
            machine = opened.enter_context(attach(pid))
        except AttachError as error:
            refused.append(error)
            continue
        for stats in machine.files:
            fd = stats.fileno()
            findings = check_file(partial(_pread, fd), Live(fd, partial(time.sleep, 0.1), _capability()))
            yield f"{stats.id} (process {pid})", findings
    if not files and not pids:
        yield from _check_kernel()


def _check_kernel() -> Iterator[tuple[str, list[Finding]]]:
    """Check the files of a tiny VM; its fds are closed on the way."""
    for kind in ("vm", "vcpu"):
        guest = TinyGuest()
        subject = guest.vm_fd if kind == "vm" else guest.vcpu_fds[0]
        with ExitStack() as opened:
            opened.callback(guest.close)
            fd = opened.enter_context(StatsFile.open(subject)).fileno()
            live = Live(
                fd, partial(guest.run, 100), _capability(), partial(_open, subject), partial(_read_without, guest, fd)
            )
            yield f"{kind} file of a VM of this kernel", check_file(partial(_pread, fd), live)


def _open(subject: int) -> int:
    with StatsFile.open(subject) as file:
        return os.dup(file.fileno())


def _read_without(guest: TinyGuest, fd: int) -> bytes:
    guest.close()
    return os.pread(fd, 24, 0)


def _slice(data: bytes, size: int, offset: int) -> bytes:
    return data[offset : offset + size]


def _pread(fd: int, size: int, offset: int) -> bytes:
    return os.pread(fd, size, offset)


def _capability() -> int | None:
    with suppress(OSError):
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(fd, _CHECK_EXTENSION, _CAP_BINARY_STATS_FD)
        finally:
            os.close(fd)
    return None


def _print(name: str, findings: list[Finding], screen: Screen) -> None:
    counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in (PASS, FAIL, NOT_APPLICABLE)}
    title = f"{printable(name, 4096)}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}"
    screen.print(*map(screen.title, screen.wrap(title)))
    paint = {PASS: screen.good, FAIL: screen.bad, NOT_APPLICABLE: screen.head}
    for one in findings:
        text = f"  {one.verdict:4}  {one.rule:3}  {one.title}" + (f": {one.evidence}" if one.evidence else "")
        first, *rest = screen.wrap(text, " " * 13)
        screen.print(first.replace(one.verdict, paint[one.verdict](one.verdict), 1), *rest)


def ways_to(pid: int) -> Iterator[str]:
    """Yield a line for each way to the files of a process that has a VM: whether it is open, or what it lacks."""
    process = Process(pid)
    found = look_at(process).vms
    if found is None:
        return
    lacks = {
        "borrow": found.why_not or ("" if found.held else "it holds no stats file"),
        "hold": _UNSEEN,
        "QEMU 8.1": _UNSEEN,
        "hand over": "known only to who changed the VMM; `kvmstats stat --socket PATH` receives them",
        "inherit": "known only to who started this process",
        "inject": found.why_not or _why_no_injection(pid),
    }
    with suppress(OSError):
        files = process.kvm_files()
        kept = kept_files(files)
        lacks["hold"] = "" if kept else "it was not started under the hold library"
        lacks["QEMU 8.1"] = _why_not_of_qemu(found, [file for file in files if file.is_stats and file not in kept])
    for way in WAYS:
        yield f"  {way.name:9}  {lacks[way.name] or 'yes'}"


def _why_not_of_qemu(process: VmProcess, stats: list[KvmFile]) -> str:
    """Return why these files are not what QEMU opens by itself; empty if they are."""
    if not is_qemu(process):
        return "it is not QEMU"
    if not any(file.kind == "vcpu" for file in stats):
        return "it has opened no stats file of a vCPU by itself"
    if any(file.kind == "vm" for file in stats):
        return "not known: the VM's file was injected, so perhaps those of vCPUs were, too"
    return ""


def _why_no_injection(pid: int) -> str:
    try:
        with hold_process(pid) as process:
            if has_filter(process):
                return "it runs under a seccomp filter"
            check_hazards(process)
    except (KvmStatsError, OSError) as error:
        return leave_out_advice(describe_error(error))
    return ""
