"""Why a process' threads must not, or cannot, be made to do anything, as far as that can be seen from outside."""

from __future__ import annotations

import errno
import os
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._cgroups import find_cgroups
from kvmstats_fast.errors import AttachError
from kvmstats_fast.vmm.ways import advise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmstats_fast.vmm.proc import Process

_MOUNTS = Path("/proc/self/mountinfo")
#: By version: which file says that a cgroup is frozen, and how.
_FREEZERS = {1: ("freezer.state", re.compile("FR")), 2: ("cgroup.events", re.compile("^frozen 1$", re.MULTILINE))}

_EHDR = struct.Struct("<16s2HI3QI6H")  # Elf64_Ehdr; inject.c is for x86-64
_PHDR = struct.Struct("<2I6Q")
_SHDR = struct.Struct("<2I4Q2I2Q")
_PT_NOTE = 4
_GO_NOTE = re.compile(rb"\x04\0\0\0....\x04\0\0\0Go\0\0", re.DOTALL)  # size of the name, of the build id; type; name
_MOST = 1 << 20  # bytes of a table or a note


def check_hazards(process: Process) -> None:
    """Raise AttachError if injection would do harm, or would wait for what does not come.

    A thread gets a signal frame below its stack. C, C++ and Rust keep room for that; a goroutine's stack is a few
    hundred bytes that the Go runtime has measured out, and writing below it ends the VMM now and then. Threads of a
    frozen cgroup do nothing until it is thawed.
    """
    if _has_go(process):
        raise AttachError(
            errno.ENOTSUP,
            f"process {process.pid} runs code written in Go, whose stacks have no room for a signal frame: injection "
            f"could end it. What helps, the least intrusive first: {advise(inject=False)}",
        )
    if folder := _frozen_cgroup(process):
        raise AttachError(
            errno.EBUSY,
            f"process {process.pid} is frozen with its cgroup, {folder} (docker pause, systemctl freeze, virsh suspend "
            "of a container): thaw it first",
        )


def has_filter(process: Process) -> bool:
    """Return whether the process runs under a seccomp filter, which injection refuses."""
    try:
        return process.status().get("Seccomp", "0") != "0"
    except OSError:
        return False


# ---- Go


def _has_go(process: Process) -> bool:
    """Return whether Go built the program or a library that it has loaded: by a note or a section of its ELF."""
    with suppress(OSError), process.open_program() as program:
        if b".go.buildinfo" in _section_names(program.fileno()):
            return True
    with process.open_memory() as memory:
        return any(_has_go_note(memory.fileno(), start) for start in _images(process))


def _images(process: Process) -> Iterator[int]:
    """Yield where files begin in memory."""
    for line in process.read("maps").splitlines():
        span, _, offset, _, inode, *_ = line.split(maxsplit=5)
        if int(offset, 16) == 0 and inode != b"0":
            yield int(span.partition(b"-")[0], 16)


def _has_go_note(memory: int, start: int) -> bool:
    """Return whether an ELF image has the note that the Go linker writes."""
    try:
        head = _EHDR.unpack(os.pread(memory, _EHDR.size, start))
        if head[0][:6] != b"\x7fELF\2\1" or head[9] != _PHDR.size:
            return False
        table = os.pread(memory, _PHDR.size * head[10], start + head[5])
        for kind, _, offset, _, _, size, _, _ in _PHDR.iter_unpack(table):
            if kind == _PT_NOTE:
                notes = os.pread(memory, min(size, _MOST), start + offset)
                if _GO_NOTE.search(notes):
                    return True
    except (OSError, struct.error):  # not mapped whole, or not an ELF file
        pass
    return False


def _section_names(program: int) -> bytes:
    """Return the section names of an ELF file, one after the other; none if it has no sections."""
    try:
        head = _EHDR.unpack(os.pread(program, _EHDR.size, 0))
        at = head[6] + head[13] * _SHDR.size
        section = _SHDR.unpack(os.pread(program, _SHDR.size, at))
        return os.pread(program, min(section[5], _MOST), section[4])
    except (OSError, OverflowError, struct.error):
        return b""


# ---- frozen cgroups


def _frozen_cgroup(process: Process) -> Path | None:
    """Return the folder of the process' cgroup if that is frozen, and can be seen."""
    cgroup = process.read("cgroup").decode(errors="surrogateescape")
    for version, top, below in find_cgroups("freezer", cgroup, _MOUNTS.read_text(errors="surrogateescape")):
        name, frozen = _FREEZERS[version]
        with suppress(OSError, ValueError):
            if below is not None and frozen.search((top / below / name).read_text()):
                return top / below
    return None
