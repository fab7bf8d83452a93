"""Stats files that the service manager passed to this process: sd_listen_fds(3)."""

from __future__ import annotations

import os
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from kvmstats_fast._resource import Fd
from kvmstats_fast.vmm.handover import open_stats_file
from kvmstats_fast.vmm.proc import kvm_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmstats_fast.stats_file import StatsFile

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_FIRST = 3  # SD_LISTEN_FDS_START
#: This package's own stand-ins for stats files: ``StatsFile.from_bytes`` and ``SyntheticStats``.
_STAND_INS = ("/memfd:kvmstats-capture", "/memfd:kvmstats-synthetic")


def inherited_files(name: str | None = None, *, unset_environment: bool = False) -> list[StatsFile]:
    """Return the stats files that the service manager passed to this process, as ``sd_listen_fds(3)`` does.

    ``LISTEN_FDS`` says how many fds there are, from 3 on, ``LISTEN_PID`` for which process they are meant, and
    ``LISTEN_FDNAMES`` what they are called. (A single fd that a parent process left open needs none of this:
    ``StatsFile(fd)``.)

    Parameters
    ----------
    name : str, optional
        Only fds of this name (``FileDescriptorName=``, ``FDNAME=``).
    unset_environment : bool
        Remove the variables, so that no child takes them for its own. Also if an error is raised.

    Returns
    -------
    list of StatsFile
        The fds that are stats files, in order; empty if nothing was passed to this process. They own their fds. The
        other fds stay open.

    Raises
    ------
    ValueError
        If a variable is not valid according to ``sd_listen_fds(3)``.
    OSError
        If an fd that is announced is not open, or a stats file cannot be read.
    FormatError
        If one is a stats file that this package cannot read. After an error all fds stay open.

    Notes
    -----
    All passed fds, stats files or not, are made close-on-exec. A stats file is recognised by its link in
    ``/proc/self/fd``: ``anon_inode:kvm-vm-stats`` and the like (``virt/kvm/kvm_main.c``), and the files that
    `StatsFile.from_bytes` and `SyntheticStats` make.
    """
    try:
        passed = _passed_fds()
    finally:
        if unset_environment:
            for variable in _VARIABLES:
                os.environ.pop(variable, None)
    files: list[StatsFile] = []
    try:
        for fd, its_name in passed:
            try:
                os.set_inheritable(fd, False)
            except OSError as error:
                raise OSError(error.errno, f"LISTEN_FDS says that fd {fd} was passed: {error.strerror}") from None
            if name in (None, its_name) and _is_stats_file(fd):
                files.append(open_stats_file(Fd.adopt(fd, owned=False), f"{its_name!r} of LISTEN_FDS"))
        _set_owned(files, True)
        return files  # noqa: TRY300 - a Ctrl-C that comes here is for the handler too
    except BaseException:
        _set_owned(files, False)
        raise


def _set_owned(files: list[StatsFile], owned: bool) -> None:
    for file in files:
        file.handle.fd.owned = owned


def _passed_fds() -> Iterable[tuple[int, str]]:
    """Return fds and their names, as the environment has them; none if they are not for this process."""
    numbers = []
    for variable in ("LISTEN_PID", "LISTEN_FDS"):
        text = os.environ.get(variable)
        if text is None:
            return ()
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"the environment has {variable}={text!r}, which is not a number; see sd_listen_fds(3)")
        numbers.append(int(text))
    pid, how_many = numbers
    if pid != os.getpid():
        return ()
    text = os.environ.get("LISTEN_FDNAMES")
    if text is None:
        return zip(count(_FIRST), repeat("unknown", how_many), strict=False)
    names = text.split(":") if text else []
    if len(names) != how_many:
        raise ValueError(f"the environment has LISTEN_FDS={how_many}, but LISTEN_FDNAMES={text!r}: {len(names)} names")
    return enumerate(names, _FIRST)


def _is_stats_file(fd: int) -> bool:
    link = str(Path(f"/proc/self/fd/{fd}").readlink())
    file = kvm_file(link, fd)
    return (file is not None and file.is_stats) or link.startswith(_STAND_INS)
