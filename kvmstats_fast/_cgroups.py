"""Cgroups: those that a process is in, and where they are mounted, of either version (cgroups(7), proc(5))."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cgroup(NamedTuple):
    """A cgroup of a process, where one mount shows it.

    Attributes
    ----------
    version : {1, 2}
        Of the hierarchy.
    top : Path
        Where it is mounted.
    below : PurePosixPath or None
        The cgroup's folder below that. None if it is not there: a container may see the paths of its host.
    """

    version: int
    top: Path
    below: PurePosixPath | None


def find_cgroups(controller: str, cgroup: str, mountinfo: str) -> Iterator[Cgroup]:
    """Yield the cgroups in which a controller has a process; lines that make no sense are passed over.

    Parameters
    ----------
    controller : str
        Its name in version 1, ``"memory"``; one hierarchy has all those of version 2.
    cgroup, mountinfo : str
        What these files of ``/proc/PID`` say, mountinfo that of this process.
    """
    paths: dict[str, PurePosixPath] = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            paths["cgroup"] = PurePosixPath(path)
        elif number == "0" and not controllers:
            paths["cgroup2"] = PurePosixPath(path)
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        fields, kinds = mount.split(" "), system.split(" ")
        if len(fields) < 5 or len(kinds) < 3 or kinds[0] not in paths:
            continue
        if kinds[0] == "cgroup2" or controller in kinds[2].split(","):
            root, top = map(_unescape, fields[3:5])
            yield Cgroup(2 if kinds[0] == "cgroup2" else 1, Path(top), _relative(paths[kinds[0]], root))


def _relative(path: PurePosixPath, root: str) -> PurePosixPath | None:
    try:
        below = path.relative_to(root)
    except ValueError:
        return None
    return None if ".." in below.parts else below


def _unescape(path: str) -> str:
    """Return a path of mountinfo, in which spaces and the like are octal (fs/proc_namespace.c)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
