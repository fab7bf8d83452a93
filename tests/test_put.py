"""What is written is there whole or not at all, is its owner's, and touches nothing of anybody else's."""

import errno
import os
import resource
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import made
import pytest
from helpers import exit_status, forked

import kvmstats_fast as kf
from kvmstats_fast.formats import _put
from kvmstats_fast.groups import Block

VCPU = made.schema_of(None, "vcpu")
X = made.samples([("vcpu", VCPU, 2)], 4)
Y = made.samples([("vcpu", VCPU, 2)], 7)

#: By the name that comes to be in a folder: how it is written.
WRITERS = {"run": kf.Samples.save, "run.npz": kf.Samples.save, "run.csv": kf.to_csv}


@pytest.fixture(params=[(None, None), (errno.ENOSYS, None), (errno.EINVAL, None), (errno.EINVAL, errno.EPERM)])
def renames(request, monkeypatch):
    """With renameat2, and on kernels and file systems that do not know its flags, or that have no hard links either."""
    flags, links = request.param

    def unknown(_, new, __):
        raise OSError(flags, os.strerror(flags), str(new))

    def no_links(_, new, **__):
        raise OSError(links, os.strerror(links), str(new))

    if flags:
        monkeypatch.setattr(_put, "renameat2", unknown)
    if links:
        monkeypatch.setattr(os, "link", no_links)


def names(folder):
    """What is in a folder, hidden files too."""
    return sorted(one.name for one in folder.iterdir())


def mode(path):
    """Permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


# ---- names that others can guess


@pytest.mark.parametrize("name", [*WRITERS, "set"])
@pytest.mark.parametrize("planted", ["link to a file", "link to a directory", "link to nowhere", "directory", "file"])
def test_what_waits_under_a_hidden_name_is_not_written_to(name, planted, tmp_path, monkeypatch):
    """Neither under the name that is taken, which nobody knows in fact, nor under those that carry the process' id."""
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    random = bytes(range(16))
    root = folder / "set" if name == "set" else folder
    root.mkdir(exist_ok=True)
    for hidden in (f".{random.hex()}.part", f".{name}.{os.getpid()}.part"):
        path = root / hidden
        if planted == "file":
            path.write_text("precious")
        elif planted == "directory":
            path.mkdir()
            (path / "vcpu-00000.arrows").write_text("precious")
        else:
            path.symlink_to(victim)
    if planted == "link to a file":
        victim.write_text("precious")
    elif planted == "link to a directory":
        victim.mkdir()
    before = names(root)
    write = kf.to_parquet if name == "set" else WRITERS[name]
    write(X, tmp_path / "first")  # imports, which may want random bytes
    with monkeypatch.context() as patched:
        patched.setattr(_put.os, "urandom", lambda _: random)
        with pytest.raises(FileExistsError):
            write(X, folder / name)
    left = names(root) if name != "set" else [one for one in names(root) if one.startswith(".")]
    assert left == before
    if victim.exists():
        assert victim.is_dir() or victim.read_text() == "precious"
        assert not victim.is_dir() or not names(victim)
    if planted == "file":
        assert {(root / one).read_text() for one in before} == {"precious"}
    write(X, folder / name)
    assert not (folder / name).is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_a_save_that_was_killed_leaves_the_next_alone(name, tmp_path):
    """Whatever its pid was: the next one writes as if nothing had happened."""
    for _ in range(5):
        pid = forked(lambda: WRITERS[name](made.samples([("vcpu", VCPU, 20)], 3000), tmp_path / name))
        time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        if exit_status(pid) == 0:
            break
        assert name not in names(tmp_path)
        (tmp_path / f".{name}.{os.getpid()}.part").mkdir(exist_ok=True)
        (tmp_path / f".{name}.{os.getpid()}.part" / "vcpu-00000.arrows").touch()
    WRITERS[name](X, tmp_path / name, overwrite=True)
    assert [one for one in names(tmp_path) if not one.startswith(".")] == [name]


# ---- what appears meanwhile


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("name", [*WRITERS, "set"])
@pytest.mark.parametrize("rival", ["file", "directory", "full directory", "link"])
def test_what_appears_at_the_path_meanwhile_is_not_replaced(name, rival, tmp_path, monkeypatch):
    """It was not there when the writing began: one FileExistsError, it stays, and nothing is left of ours."""
    path = tmp_path / name
    if name == "set":
        (path,) = kf.to_parquet(X, path)
        path.unlink()
    fchmod = os.fchmod

    def appear(fd, permissions):
        fchmod(fd, permissions)
        if not os.path.lexists(path) and stat.S_ISREG(os.fstat(fd).st_mode):
            if rival == "file":
                path.write_text("precious")
            elif rival == "link":
                path.symlink_to("nowhere")
            else:
                path.mkdir()
                (path / "precious").touch() if rival == "full directory" else None

    monkeypatch.setattr(os, "fchmod", appear)
    write, target = (kf.to_parquet, tmp_path / name) if name == "set" else (WRITERS[name], path)
    with pytest.raises(FileExistsError) as caught:
        write(X, target)
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert "overwrite=True" in str(caught.value)
    if rival == "file":
        assert path.read_text() == "precious"
    elif rival == "link":
        assert path.is_symlink()
    else:
        assert names(path) == (["precious"] if rival == "full directory" else [])
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_two_that_write_to_one_path_both_succeed(name, workers, tmp_path):
    """With overwrite=True one of the two is there in the end, whole, and nothing of the other."""
    path = tmp_path / name
    for _ in range(3):
        if workers == "threads":
            with ThreadPoolExecutor() as pool:
                for future in [pool.submit(WRITERS[name], x, path, overwrite=True) for x in (X, Y)]:
                    future.result()
        else:
            pids = [forked(lambda x=x: WRITERS[name](x, path, overwrite=True)) for x in (X, Y)]
            assert [exit_status(pid) for pid in pids] == [0, 0]
        assert names(tmp_path) == [name]
        if name == "run.csv":
            assert path.read_text().count("\n") in (9, 15)
        else:
            made.assert_same(kf.Samples.load(path), X if len(kf.Samples.load(path)) == len(X) else Y)


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("name", WRITERS)
def test_of_two_that_may_not_overwrite_one_is_refused(name, tmp_path):
    """Whichever is later."""
    path = tmp_path / name
    for number in range(2):
        pids = [forked(lambda x=x: WRITERS[name](x, path)) for x in (X, Y)]
        assert sorted(exit_status(pid) for pid in pids) == [0, 1]
        assert names(tmp_path) == [name]
        path.rename(tmp_path.parent / f"{tmp_path.name}-{number}")


# ---- what overwrite=True takes away


@pytest.mark.parametrize(
    "foreign",
    ["other.arrows", "vcpu-00000.arrows.bak", "vcpu-0.arrows", "backup.arrows/", "vm-00007.arrows/", ".hidden"],
)
@pytest.mark.parametrize("form", ["run", "run.npz"])
def test_only_what_is_ours_is_removed(form, foreign, tmp_path):
    """A directory with anything else in it stays as it is, whatever that is called."""
    path = tmp_path / form
    X.save(tmp_path / "saved")
    (tmp_path / "saved").rename(path)
    if foreign.endswith("/"):
        (path / foreign).mkdir()
        (path / foreign / "thesis").write_text("precious")
    else:
        (path / foreign).write_text("precious")
    before = sorted(path.rglob("*"))
    with pytest.raises(
        FileExistsError, match=rf"more than a recording \({foreign.strip('/') if form == 'run' else ''}"
    ):
        Y.save(path, overwrite=True)
    assert sorted(path.rglob("*")) == before
    assert names(tmp_path) == [form]


@pytest.mark.usefixtures("renames")
def test_what_comes_into_a_directory_while_it_is_replaced_is_kept(tmp_path, monkeypatch):
    """It is not removed, and the error says where it is."""
    path = tmp_path / "run"
    X.save(path)
    fchmod = os.fchmod

    def appear(fd, permissions):
        fchmod(fd, permissions)
        (path / "thesis").write_text("precious")

    monkeypatch.setattr(os, "fchmod", appear)
    with pytest.raises(OSError, match="it is kept in ") as caught:
        Y.save(path, overwrite=True)
    monkeypatch.undo()
    kept = Path(str(caught.value).partition("it is kept in ")[2].partition(":")[0])
    assert (kept / "thesis").read_text() == "precious"
    made.assert_same(kf.Samples.load(path), Y)


# ---- who may read it


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize(("asked", "folder"), [(None, 0o700), (0o640, 0o750), (0o644, 0o755), (0o660, 0o770)])
def test_files_are_their_owners_unless_asked_otherwise(umask, asked, folder, tmp_path):
    """Exactly the mode that was asked for, whatever the umask; directories that are made can be entered with it."""
    options = {} if asked is None else {"mode": asked}
    previous = os.umask(umask)
    try:
        for name, write in WRITERS.items():
            write(X, tmp_path / name, **options)
        with kf.Recorder(tmp_path / "a" / "b", rotate_bytes=1, flush_seconds=0, **options) as recorder:
            recorder.write(X[:2])
            recorder.write(X[2:])
        kf.to_parquet(X, tmp_path / "set", **options)
        X.to_parquet(tmp_path / "set2", **options)
        X.to_csv(tmp_path / "x.csv", **options)
    finally:
        os.umask(previous)
    written = list(tmp_path.rglob("*"))
    assert len(written) == 3 + 1 + 4 + 2 * 4 + 1
    for one in written:
        assert mode(one) == (folder if one.is_dir() else asked or 0o600), one


@pytest.fixture
def file_system(monkeypatch):
    """Return a function that makes the file system one like FAT: all has the same permissions, and keeps them."""
    fchmod = os.fchmod

    def choose(given, error=errno.EPERM):
        def refuse(fd, _):
            fchmod(fd, given)
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "fchmod", refuse)

    return choose


def write_recording(x, path, **options):
    """Write by a Recorder."""
    with kf.Recorder(path, **options) as recorder:
        recorder.write(x)


WRITE = {**WRITERS, "set": kf.to_parquet, "recording": write_recording}


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name", WRITE)
def test_permissions_that_cannot_be_chosen_may_not_be_wider_than_asked(name, error, file_system, tmp_path):
    """It is written if others get no more than was asked for; else the error names the path and the mode to pass."""
    write = WRITE[name]
    file_system(0o700, error)
    write(X, tmp_path / name)
    file_system(0o755, error)
    write(X, tmp_path / f"open {name}", mode=0o644)
    before = names(tmp_path)
    with pytest.raises(OSError, match=r"permissions 0o755.*pass mode=0o644") as caught:
        write(X, tmp_path / f"other {name}")
    assert caught.value.errno == error
    assert caught.value.filename.startswith(str(tmp_path / f"other {name}"))
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", WRITE)
def test_what_cannot_be_written_names_where_to(name, tmp_path):
    """An error of the kernel that says no path, as where the file is too large, gets that of what was to be written."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large") as caught:
            WRITE[name](X, tmp_path / name)
        assert caught.value.filename.startswith(str(tmp_path / name))

    assert exit_status(forked(limited)) == 0
    assert not [one for one in tmp_path.rglob("*") if one.is_file()]


@pytest.mark.parametrize("wrong", [0o400, 0o1600, -1, 0o200, "600", None])
def test_a_mode_that_cannot_be_is_refused_before_anything_is_made(wrong, tmp_path):
    """One ValueError."""
    writes = [lambda write=write, name=name: write(X, tmp_path / name, mode=wrong) for name, write in WRITERS.items()]
    writes += [lambda: kf.Recorder(tmp_path / "r", mode=wrong), lambda: kf.to_parquet(X, tmp_path / "set", mode=wrong)]
    for write in writes:
        with pytest.raises(ValueError, match="mode is "):
            write()
    assert not names(tmp_path)


class Failing(Block):
    """Values that cannot be had."""

    error = MemoryError()

    def take_sweeps(self, _):
        """Nor can these."""
        return self

    def view(self, _):
        """Raise."""
        raise self.error

    def contiguous(self):
        """Raise."""
        raise self.error


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_nothing(error, tmp_path, monkeypatch):
    """Of whatever kind: what was there before is there as it was, and nothing else."""
    for name, write in WRITERS.items():
        write(X, tmp_path / name)
    kf.to_parquet(X, tmp_path / "set")
    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    monkeypatch.setattr(Failing, "error", error)
    (group,) = Y.groups
    failing = replace(Y, groups=(Failing(*(getattr(group, field.name) for field in fields(group))),))
    for name, write in WRITERS.items():
        with pytest.raises(type(error)):
            write(failing, tmp_path / name, overwrite=True)
    with pytest.raises(type(error)):
        kf.to_parquet(failing, tmp_path / "set", overwrite=True)
    assert {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before
    assert names(tmp_path) == ["run", "run.csv", "run.npz", "set"]


def test_what_takes_the_place_of_a_claim_is_not_removed(tmp_path, monkeypatch):
    """Without hard links a name is claimed by an empty file; if the rest fails, only that is removed."""

    def refused(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def overtaken(made, path):
        (tmp_path / "rival").write_text("of another")
        (tmp_path / "rival").replace(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(made))

    monkeypatch.setattr(_put, "renameat2", refused)
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(OSError, match="Input/output error"), _put.put_file(tmp_path / "x", overwrite=False, mode=0o600):
        pass
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "of another"


@pytest.mark.parametrize("write", [kf.Samples.to_parquet, lambda _, path: kf.Recorder(path)], ids=["set", "recorder"])
@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_directory_below_a_file_is_refused_by_the_name_of_the_file(write, below, tmp_path):
    """It is not said to have been written before, and the file stays as it is."""
    file = tmp_path / "notes"
    file.write_text("precious")
    with pytest.raises(NotADirectoryError) as caught:
        write(X, file / below)
    assert caught.value.filename == str(file)
    assert file.read_text() == "precious"


def test_a_directory_that_another_process_makes_meanwhile_is_taken(tmp_path, monkeypatch):
    """Whoever was faster: both write into it."""
    make = _put.make_directory

    def be_late(path, mode):
        path.mkdir()
        make(path, mode)

    monkeypatch.setattr(_put, "make_directory", be_late)
    X.to_parquet(tmp_path / "a" / "set")
    assert len(kf.open_recordings(tmp_path / "a" / "set").vms) == 1


def test_what_may_not_be_removed_is_an_error_and_stays(tmp_path):
    """A file that cannot be replaced for want of permission is not called a directory."""
    folder, path = tmp_path / "run", tmp_path / "run" / "x.arrows"
    folder.mkdir()
    path.write_text("precious")

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(PermissionError):
            _put._remove(path, lambda _: True)
    assert path.read_text() == "precious"
