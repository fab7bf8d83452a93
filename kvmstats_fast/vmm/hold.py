"""Start a VMM under the hold library, so that it opens the stats files of its VMs and keeps them; see csrc/hold.c."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import struct
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import printable
from kvmstats_fast.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmstats_fast.vmm.proc import KvmFile

#: How far above the fd of a VM or vCPU the library keeps its stats file (csrc/hold.c).
HOLD_OFFSET = 512
_PT_INTERP = 3
_SCRIPTS_DEEP = 5  # what the kernel allows: fs/exec.c, exec_binprm


def hold_library() -> Path:
    """Return the path of the hold library, for ``LD_PRELOAD``.

    Raises
    ------
    AttachError
        If LD_PRELOAD cannot name it (in its syntax a space or a colon ends a path, a ``$`` is replaced), or it cannot
        be read.
    """
    path = Path(__file__).resolve().parents[1] / "libkvmstats-hold.so"
    if any(character in ":$" or character.isspace() for character in str(path)):
        raise AttachError(
            errno.EINVAL, f"LD_PRELOAD cannot name {path}: install the package where no path has a space, ':' or '$'"
        )
    try:
        with path.open("rb"):
            return path
    except FileNotFoundError:
        raise AttachError(errno.ENOENT, f"{path} is missing: install the package again") from None
    except PermissionError:
        raise AttachError(
            errno.EACCES, f"{path} cannot be read by this user: install the package where its VMMs can read it"
        ) from None


def check_can_hold(program: str | os.PathLike[str]) -> None:
    """Raise AttachError unless a program will load the hold library when this process starts it.

    Parameters
    ----------
    program : path
        An ELF program or a script (then its interpreter is what counts). ``PATH`` is not searched.

    Raises
    ------
    AttachError
        If it would not, with the reason and what to do: it is static, of another machine or word size than this Python,
        or setuid, setgid or given capabilities; or it cannot be read, which also keeps its files from others.
    OSError
        If there is no such file.

    Notes
    -----
    What a script starts is not checked, nor whether a security module starts the program in another domain with a clean
    environment.
    """
    _check(Path(program), _SCRIPTS_DEEP)


def start(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    started: list[subprocess.Popen[Any]] | None = None,
    **popen: Any,
) -> subprocess.Popen[Any]:
    """Start a VMM under the hold library.

    Parameters
    ----------
    argv : sequence of str or path
        The program, searched for in ``PATH``, and its arguments.
    env : mapping, optional
        Its environment; default: that of this process. The library is added to its ``LD_PRELOAD``, after what is there
        already: some libraries (the sanitizers') must be the first.
    started : list, optional
        Where to put the process, too, in the instant in which it is there, so that Ctrl-C cannot come in between.
    **popen
        Passed on to `subprocess.Popen`.

    Returns
    -------
    subprocess.Popen

    Raises
    ------
    AttachError
        If the VMM would not load the library; see `check_can_hold`.
    OSError
        If it cannot be started.
    """
    if popen.get("shell") or not argv or isinstance(argv, str | bytes):
        raise ValueError("argv must be a list of a program and its arguments; a shell cannot come in between")
    environment = dict(os.environ if env is None else env)
    program = os.fspath(popen.get("executable") or argv[0])
    if "/" not in program:
        found = shutil.which(program, path=os.pathsep.join(os.get_exec_path(environment)))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such program in PATH", program)
        program = found
    check_can_hold(Path(popen.get("cwd") or "", program))
    library = str(hold_library())
    loaded = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    environment["LD_PRELOAD"] = ":".join(dict.fromkeys([*loaded, library]))
    started = [] if started is None else started
    with _CtrlCLater():
        started.extend(map(partial(subprocess.Popen, env=environment, **popen), (argv,)))
    return started[-1]


def kept_files(files: Iterable[KvmFile]) -> list[KvmFile]:
    """Return the stats files, of a process' files of KVM, that the hold library keeps: each is in its slot."""
    files = list(files)
    slots = {(file.kind, file.vcpu_id, file.fd + HOLD_OFFSET) for file in files if not file.is_stats}
    return [file for file in files if file.is_stats and (file.kind, file.vcpu_id, file.fd) in slots]


class _CtrlCLater:
    """In its block Ctrl-C is only taken note of; at the end of the block it takes effect.

    Popen is written in Python: interrupted between fork and the line that stores the pid, it would leave a VMM that
    nobody knows, and pipes. Python runs handlers of signals in the main thread alone.
    """

    def __enter__(self) -> None:
        self._came: list[tuple[int, Any]] = []
        self._handler = signal.getsignal(signal.SIGINT)
        self._put_off = callable(self._handler) and threading.current_thread() is threading.main_thread()
        if self._put_off:
            signal.signal(signal.SIGINT, lambda *came: self._came.append(came))

    def __exit__(self, *_: object) -> None:
        if self._put_off:
            signal.signal(signal.SIGINT, self._handler)
        for came in self._came:
            self._handler(*came)  # type: ignore[operator,misc]  # it is callable, or nothing came


def _check(path: Path, deep: int) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            if head.startswith(b"#!") and deep:
                words = head[2:].partition(b"\n")[0].split()
                if not words:
                    raise _cannot(path, "it is a script that names no interpreter")
                _check(Path(os.fsdecode(words[0])), deep - 1)
                return
            _check_elf(path, head, file)
    except PermissionError:
        raise _cannot(
            path, "it cannot be read by this user, and the kernel guards the files of such a process: `chmod +r` it"
        ) from None
    _check_privilege(path)


def _check_elf(path: Path, head: bytes, file: Any) -> None:
    with hold_library().open("rb") as library:
        mine = library.read(20)
    if not head.startswith(b"\x7fELF") or len(head) < 64:
        raise _cannot(path, "it is neither an ELF program nor a script")
    # Word size, byte order, machine.
    if (head[4:6], head[18:20]) != (mine[4:6], mine[18:20]):
        bits = {1: "32-bit", 2: "64-bit"}.get(head[4], "unknown")
        (machine,) = struct.unpack_from(">H" if head[5] == 2 else "<H", head, 18)
        raise _cannot(
            path,
            f"it is a {bits} program for ELF machine {machine}, and this package was built for another; "
            "install it with a Python of that kind",
        )
    order = ">" if head[5] == 2 else "<"
    wide = head[4] == 2
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    file.seek(table)
    headers = file.read(size * count)
    types = [struct.unpack_from(order + "I", headers, at)[0] for at in range(0, len(headers) - 3, size or 4)]
    if _PT_INTERP not in types:
        raise _cannot(
            path, "it is statically linked (no PT_INTERP), so nothing can be preloaded; use a dynamically linked build"
        )


def _check_privilege(path: Path) -> None:
    """Refuse what the dynamic linker runs in secure mode, ignoring LD_PRELOAD (AT_SECURE; security/commoncap.c)."""
    if _ignores_privilege(path):
        return
    info = path.stat()
    if info.st_mode & stat.S_ISUID and info.st_uid != os.getuid():
        raise _cannot(path, f"it is setuid to uid {info.st_uid}; start it as that user, or a copy without the bit")
    group = stat.S_ISGID | stat.S_IXGRP
    if info.st_mode & group == group and info.st_gid != os.getgid():
        raise _cannot(path, f"it is setgid to gid {info.st_gid}; start it with that group, or a copy without the bit")
    if os.getuid() != 0 and _has_capabilities(path):
        raise _cannot(path, "it has file capabilities; start a copy without them, from a parent that passes them on")


def _has_capabilities(path: Path) -> bool:
    try:
        return "security.capability" in os.listxattr(path)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # a file system that has none, as virtiofs may be
            raise
        return False


def _ignores_privilege(path: Path) -> bool:
    """Whether the kernel ignores such bits of the file: on a nosuid mount, or after PR_SET_NO_NEW_PRIVS."""
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return True
    return "\nNoNewPrivs:\t1\n" in Path("/proc/thread-self/status").read_text()


def _cannot(path: Path, reason: str) -> AttachError:
    return AttachError(errno.ENOTSUP, f"{printable(str(path), 4096)} cannot be made to hold its stats files: {reason}")
