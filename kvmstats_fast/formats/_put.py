"""Put a file or a directory in its place whole or not at all; every format is written through here.

It is written under a random hidden name beside its place, which nobody can guess: no symbolic link can wait there, and
two threads, containers or hosts that share the folder never meet. Only when it is whole does it get its name, by one
system call. What had the name meanwhile is refused, or with `overwrite` exchanged and then removed, which takes nothing
but what `ours` names.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvmstats_fast._kvmstats import lib

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from pathlib import Path

#: Permissions of what is written unless the caller chooses others: a recording shows what a guest does.
PRIVATE = 0o600

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Ours(Protocol):
    """Tells by its name whether a file in a directory is one that the format writes."""

    def __call__(self, name: str, /) -> object:
        """Return something true if it is."""


def check_mode(mode: int) -> None:
    """Raise ValueError unless these are permissions that let the owner read and write."""
    if not (isinstance(mode, int) and 0 <= mode <= 0o777 and mode & 0o600 == 0o600):
        shown = f"{mode:#o}" if isinstance(mode, int) else repr(mode)
        raise ValueError(f"mode is {shown}; it must be permissions such as 0o600 or 0o644, which let the owner write")


def open_new(path: Path, mode: int) -> int:
    """Return the fd of a new file with exactly these permissions; FileExistsError if there is anything at `path`."""
    fd = os.open(path, _NEW_FILE, PRIVATE)
    try:
        _permit(fd, mode, path)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            path.unlink()
        raise
    return fd


def make_directory(path: Path, mode: int) -> None:
    """Make a directory for files of `mode`, which can be entered by whoever may read them."""
    path.mkdir(0o700)
    try:
        fd = os.open(path, _DIRECTORY)
        try:
            _permit(fd, mode | 0o100 | (mode & 0o044) >> 2, path)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def _permit(fd: int, mode: int, path: Path) -> None:
    """Give what was made its permissions. Where they cannot be chosen (FAT, SMB), nobody may have more than these."""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        given = stat.S_IMODE(os.fstat(fd).st_mode)
        if given & 0o066 & ~mode:
            what = (
                f"its file system gives it the permissions {given:#o}, and refuses others ({error.strerror}): pass "
                f"mode={0o600 | given & 0o666:#o} if others may read it, or mount that with umask=077"
            )
            raise OSError(error.errno, what, str(path)) from None


def make_directories(path: Path, mode: int) -> None:
    """Make a directory, and those above it, where they are missing."""
    if not path.is_dir():
        make_directories(path.parent, mode)
        try:
            make_directory(path, mode)
        except FileExistsError:
            if not path.is_dir():  # else another process was faster
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


@contextmanager
def put_file(path: Path, *, overwrite: bool, mode: int, beside: Path | None = None) -> Iterator[io.FileIO]:
    """Give a file to write to, which is at `path` once the block has ended, and nowhere if it fails.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Replace a file or symbolic link (not what that leads to), or an empty directory.
    mode : int
        Permissions, whatever the umask.
    beside : Path, optional
        A directory of the same file system for the file to be written in. Default: that of `path`.
    """
    check_mode(mode)
    _check_place(path, overwrite=overwrite, ours=_nothing)
    made = _hidden(path if beside is None else beside / path.name)
    with _removed_unless_whole(made, path, _nothing):
        with open(open_new(made, mode), "wb", buffering=0) as file:
            yield file
        _place(made, path, overwrite=overwrite, ours=_nothing)


@contextmanager
def put_directory(path: Path, *, overwrite: bool, mode: int, ours: Ours) -> Iterator[Path]:
    """Give an empty directory to write in, which is at `path` once the block has ended, and nowhere if it fails.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Replace a directory that holds only what is `ours`, a file, or a symbolic link (not what that leads to).
    mode : int
        Permissions of files in it, whatever the umask; its own follow from them.
    ours : callable
        Tells what may be written to, and removed from, the directory.
    """
    check_mode(mode)
    _check_place(path, overwrite=overwrite, ours=ours)
    made = _hidden(path)
    with _removed_unless_whole(made, path, ours):
        make_directory(made, mode)
        yield made
        _place(made, path, overwrite=overwrite, ours=ours)


def _nothing(_: str) -> bool:
    return False


def _hidden(path: Path) -> Path:
    return path.with_name(f".{os.urandom(16).hex()}.part")


@contextmanager
def _removed_unless_whole(made: Path, path: Path, ours: Ours) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        of_made = isinstance(error, OSError) and str(error.filename) == str(made)
        if of_made and isinstance(error, FileExistsError):  # it is not ours
            raise
        with suppress(OSError):
            _remove(made, ours)
        if isinstance(error, OSError) and error.errno and (of_made or error.filename is None):
            error.filename = str(path)
        raise


def _place(made: Path, path: Path, *, overwrite: bool, ours: Ours) -> None:
    """Give `made` its name."""
    try:
        if not overwrite:
            _rename_new(made, path)
        elif made.is_dir() or (path.is_dir() and not path.is_symlink()):
            _replace_directory(made, path, ours)
        else:
            made.replace(path)
    except FileExistsError:
        raise taken(path) from None


def _replace_directory(made: Path, path: Path, ours: Ours) -> None:
    """Give `made` its name, and remove what had it before; one of the two is a directory."""
    displaced: list[Path] = []
    while not displaced:
        try:
            displaced = _displace(made, path)
        except FileNotFoundError:  # noqa: PERF203 - nothing is there now
            with suppress(FileExistsError):
                _rename_new(made, path)
                return
    for old in displaced:
        try:
            _remove(old, ours)
        except OSError as error:  # noqa: PERF203 - something came into it since it was looked at
            what = f"it was replaced, but what else was in it could not be removed: it is kept in {old}"
            raise OSError(error.errno, what, str(path)) from error


def taken(path: Path) -> FileExistsError:
    """Return the error that says that something is at `path`."""
    return FileExistsError(errno.EEXIST, "it is there already; overwrite=True replaces it", str(path))


def _check_place(path: Path, *, overwrite: bool, ours: Ours) -> None:
    """Raise FileExistsError if `path` is taken by what may not be replaced."""
    try:
        is_directory = stat.S_ISDIR(path.lstat().st_mode)
        foreign = _find_foreign(path, ours) if overwrite and is_directory else None
    except (FileNotFoundError, NotADirectoryError):  # nothing is there, or what was there is being replaced
        return
    if not overwrite:
        raise taken(path)
    if foreign is not None:
        what = f"it holds more than a recording ({foreign}), which is not replaced: use another path"
        raise FileExistsError(errno.EEXIST, what, str(path))


def _find_foreign(directory: Path, ours: Ours) -> str | None:
    """Return the name of something in a directory that is not ours; None if there is nothing."""
    with os.scandir(directory) as entries:
        return next((one.name for one in entries if not (one.is_file(follow_symlinks=False) and ours(one.name))), None)


def _remove(path: Path, ours: Ours) -> None:
    """Remove a file or symbolic link, or a directory with what is ours in it."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # the latter on some file systems
        if path.is_symlink() or not path.is_dir():
            raise
        for one in path.iterdir():
            if ours(one.name):
                one.unlink()
        path.rmdir()


#: What renameat2(2) says on a kernel, or a file system such as NFS, that does not know the flag.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
#: What link(2) says on a file system without hard links, such as FAT and some of FUSE.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


def renameat2(old: Path, new: Path, flag: int) -> None:
    """Rename, with one of the flags of renameat2(2)."""
    code = lib.kvmstats_rename(os.fsencode(old), os.fsencode(new), flag)
    if code:
        raise OSError(-code, os.strerror(-code), str(new))


def _rename_new(made: Path, path: Path) -> None:
    """Rename; FileExistsError if the new name is taken, even by something that appears in that instant."""
    try:
        renameat2(made, path, lib.KVMSTATS_RENAME_NEW)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    else:
        return
    # A claim on the name, for rename(2) to replace: a directory takes the place of an empty one only.
    if made.is_dir() and not made.is_symlink():
        path.mkdir(0o700)
        abandon = path.rmdir
    else:
        try:
            os.link(made, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            made.unlink()
            return
        abandon = partial(_remove_claim, path, _claim(path))
    try:
        made.rename(path)
    except BaseException as error:
        with suppress(OSError):
            abandon()
        if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:  # another has taken the place of the claim
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        raise


def _claim(path: Path) -> os.stat_result:
    """Make an empty file, and return what it is known by."""
    fd = os.open(path, _NEW_FILE, PRIVATE)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _remove_claim(path: Path, claim: os.stat_result) -> None:
    """Remove a file that was made to claim its name, unless another has taken its place."""
    if os.path.samestat(path.lstat(), claim):
        path.unlink()


def _displace(made: Path, path: Path) -> list[Path]:
    """Give `made` its name and return where what had it lies now; FileNotFoundError if nothing had it."""
    try:
        renameat2(made, path, lib.KVMSTATS_RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    else:
        return [made]
    displaced: list[Path] = []
    try:
        while True:
            displaced.append(_hidden(path))
            path.rename(displaced[-1])
            with suppress(FileExistsError):  # another process came in between
                _rename_new(made, path)
                return displaced
    except BaseException:
        for old in displaced:
            with suppress(OSError):
                _rename_new(old, path)
        raise
