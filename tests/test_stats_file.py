"""An open stats file: what is read, what is refused, and what is said then."""

import errno
import fcntl
import gc
import os
import resource
import struct
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, exit_status, forked, open_fds

import kvmstats_fast as kf
from kvmstats_fast import abi
from kvmstats_fast._resource import Fd
from kvmstats_fast.testing import SyntheticStats

REAL = (DATA / "captures" / "x86_64-6.1" / "vcpu0-after.bin").read_bytes()


@pytest.fixture
def file(resources):
    """A stats file that serves a capture."""
    return resources.enter_context(kf.StatsFile.from_bytes(REAL))


def test_read_gives_a_fresh_array_each_time(file):
    """Two readings share no memory, and neither changes when the file is read again."""
    one, two = file.read(), file.read()
    assert one.dtype == np.uint64
    assert one.shape == (138,)
    assert not np.shares_memory(one, two)
    one[:] = 0
    assert file.read().tolist() == two.tolist() == kf.parse(REAL).values.tolist()


def test_read_into_fills_the_callers_array_and_returns_it(resources):
    """read_into fills the array it is given, be it a row of a larger one, and follows the file as it changes."""
    made = resources.enter_context(SyntheticStats())
    file = resources.enter_context(made.open())
    rows = np.zeros((3, file.schema.num_values), np.uint64)
    word = file.schema["exits"].offset // 8
    for i in range(3):
        made.add("exits", 10)
        row = rows[i]
        assert file.read_into(row) is row
        assert file.read_into(row) is row
    assert rows[:, word].tolist() == [10, 20, 30]
    assert file.read()[word] == 30
    assert rows[0, word] == 10


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (None, TypeError, "NoneType; it must be a numpy array"),
        ([0] * 138, TypeError, "list; it must be a numpy array"),
        (bytearray(1104), TypeError, "bytearray"),
        (np.zeros(138), TypeError, "<f8"),
        (np.zeros(138, np.int64), TypeError, "<i8"),
        (np.zeros(138, ">u8"), TypeError, ">u8"),
        (np.zeros(137, np.uint64), ValueError, r"shape \(137,\); it must be \(138,\)"),
        (np.zeros((1, 138), np.uint64), ValueError, r"shape \(1, 138\)"),
        (np.zeros(276, np.uint64)[::2], ValueError, "not C-contiguous"),
        (np.broadcast_to(np.uint64(0), (138,)), ValueError, "out is not C-contiguous"),
        (np.frombuffer(bytes(1104), np.uint64), ValueError, "out is read-only; it must be writable"),
    ],
)
def test_an_array_that_cannot_take_the_values_is_refused_before_anything_is_read(file, out, error, message):
    """A wrong type, dtype, byte order, shape, stride or a read-only array is an error that says what it must be."""
    before = np.asarray(out).tobytes()
    with pytest.raises(error, match=message):
        file.read_into(out)
    assert np.asarray(out).tobytes() == before
    assert file.read()[113] == 1072


def test_snapshot_has_python_numbers_booleans_and_rows_of_counts(file):
    """A snapshot has ints, bools and uint64 arrays, in the order of the descriptors."""
    snapshot = file.snapshot()
    assert list(snapshot) == list(file.schema)
    assert type(snapshot["exits"]) is int
    assert snapshot["guest_mode"] is False
    assert snapshot["halt_wait_hist"].shape == (32,)


def test_close_may_be_called_again_and_closes_the_fd():
    """The first close closes the fd; the second leaves alone whatever has the number by then."""
    file = kf.StatsFile.from_bytes(REAL)
    fd = file.fileno()
    file.close()
    assert file.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    reused = os.open(os.devnull, os.O_RDONLY)
    try:
        assert reused == fd
        file.close()
        os.fstat(reused)
    finally:
        os.close(reused)


def test_use_after_close_is_an_error_that_says_so():
    """Reading, fileno() and entering a closed file raise ValueError; its schema and id remain."""
    file = kf.StatsFile.from_bytes(REAL)
    out = np.zeros(138, np.uint64)
    file.read_into(out)
    file.close()
    for use in (file.read, lambda: file.read_into(out), file.snapshot, file.fileno, file.__enter__):
        with pytest.raises(ValueError, match=r"kvm-1/vcpu-0\) is closed"):
            use()
    assert (file.id, len(file.schema)) == ("kvm-1/vcpu-0", 45)
    assert "closed" in repr(file)


def test_closefd_false_leaves_the_fd_open():
    """A StatsFile with closefd=False leaves the caller's fd open."""
    with SyntheticStats() as made:
        with kf.StatsFile(made.fileno(), closefd=False) as file:
            file.read()
        os.fstat(made.fileno())


def test_a_file_that_is_forgotten_warns_and_closes_its_fd():
    """Garbage collection of an open StatsFile warns (ResourceWarning) and closes the fd."""
    file = kf.StatsFile.from_bytes(REAL)
    fd = file.fileno()
    with pytest.warns(ResourceWarning, match=r"unclosed <StatsFile kvm-1/vcpu-0"):
        del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_constructor_that_fails_leaves_the_fd_to_its_owner():
    """After a FormatError the fd that was passed is still open, and nothing warns."""
    fd = os.memfd_create("nothing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(kf.FormatError):
                kf.StatsFile(fd)
        os.fstat(fd)
    finally:
        os.close(fd)


def test_from_bytes_that_fails_leaves_no_fd_behind():
    """A refused capture costs no fd, also while the error is kept."""
    before, kept = open_fds(), []
    for data in (b"", b"kvm-", REAL[:100], REAL[:-8], "text"):
        with pytest.raises((kf.FormatError, TypeError)) as caught:
            kf.StatsFile.from_bytes(data)
        kept.append(caught.value)
    assert [type(error) for error in kept] == [kf.FormatError] * 4 + [TypeError]
    assert open_fds() == before


def test_a_file_that_fails_behind_its_first_read_is_refused_with_its_fd(monkeypatch):
    """What was read of it is no capture of a shorter file."""
    pread = os.pread

    def fails_behind(fd, size, offset):
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    with SyntheticStats(stats=[kf.Stat(f"s{i}", 0, 0, 0, 0, 1, -1) for i in range(300)]) as made:
        fd = os.dup(made.fileno())
        monkeypatch.setattr(os, "pread", fails_behind)
        with pytest.raises(OSError, match=rf"fd {fd}\b") as caught:
            kf.StatsFile(fd)
        os.close(fd)
    assert caught.value.errno == errno.EIO


def test_an_fd_that_is_not_a_stats_file_is_refused_with_its_name():
    """An empty file, a pipe, a directory, an fd that is not KVM's: each error names the file and the call."""
    null = os.open(os.devnull, os.O_RDONLY)
    folder = os.open("/", os.O_RDONLY)
    reading, writing = os.pipe()
    try:
        with pytest.raises(kf.FormatError, match=r"fd \d+ \(/dev/null\): byte 0: the file is cut short"):
            kf.StatsFile(null)
        with pytest.raises(OSError, match=r"pread on fd \d+ \(pipe:.*not a stats file") as caught:
            kf.StatsFile(reading)
        assert caught.value.errno == errno.ESPIPE
        with pytest.raises(OSError, match=r"pread on fd \d+ \(/\).*not a stats file") as caught:
            kf.StatsFile(folder)
        assert caught.value.errno == errno.EISDIR
        with pytest.raises(OSError, match=r"KVM_GET_STATS_FD on fd .*/dev/null.*Linux 5\.14") as caught:
            kf.StatsFile.open(null)
        assert caught.value.errno == errno.ENOTTY
    finally:
        for fd in (null, folder, reading, writing):
            os.close(fd)


def test_a_text_file_is_refused_at_its_first_byte(tmp_path):
    """A long file of another kind is a LAYOUT error at byte 0."""
    (tmp_path / "text").write_text("a long text, " * 1000)
    with (tmp_path / "text").open("rb") as text, pytest.raises(kf.FormatError, match="not a KVM stats file") as caught:
        kf.StatsFile(text.fileno())
    assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.LAYOUT, 0)


def test_an_fd_that_is_not_open_is_ebadf():
    """A closed fd is EBADF from the constructor and from open(), with the call that failed."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    for use, call in ((kf.StatsFile, "pread"), (kf.StatsFile.open, "KVM_GET_STATS_FD")):
        with pytest.raises(OSError, match=rf"{call} on fd {fd}: Bad file descriptor; .*not open") as caught:
            use(fd)
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("wrong", ["3", 1.5, None, b"3"])
def test_what_is_not_an_fd_is_a_type_error(wrong):
    """The constructor and open() accept numbers and objects with fileno(), and nothing else."""
    for use in (kf.StatsFile, kf.StatsFile.open):
        with pytest.raises(TypeError, match="not a file descriptor: pass its number, or an object with"):
            use(wrong)
    with SyntheticStats() as made, kf.StatsFile(made, closefd=False) as file:
        assert file.fileno() == made.fileno()


def test_a_subclass_that_fails_early_is_dropped_in_silence():
    """An object whose constructor never reached ours counts as closed, and is collected without a warning."""
    file = kf.StatsFile.__new__(kf.StatsFile)
    assert file.closed
    file.close()
    del file


def test_a_capture_cannot_be_changed_behind_the_reader(file):
    """The memfd of a capture is sealed and close-on-exec."""
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(file.fileno(), b"x", 0)
    assert not os.get_inheritable(file.fileno())


def test_arrays_are_let_go_at_close(file):
    """The last array is kept alive until close(), and no longer."""
    out = np.zeros(138, np.uint64)
    file.read_into(out)
    held = sys.getrefcount(out)
    file.close()
    assert sys.getrefcount(out) < held


def test_a_file_of_4_byte_values_that_is_cut_says_where_it_should_end():
    """The offset that an error names counts the bytes of the file, not of the array."""
    with SyntheticStats("x86", "vm", layout="v2", value_size=4) as made, made.open() as file:
        size = len(made.to_bytes())
        os.ftruncate(made.fileno(), size - 1)
        with pytest.raises(kf.FormatError, match=rf"byte {size - 1}: .*reach byte {size}"):
            file.read()


def test_an_fd_that_was_closed_elsewhere_is_ebadf_at_the_next_read():
    """A close behind our back is told apart from close()."""
    with SyntheticStats() as made:
        fd = os.dup(made.fileno())
        file = kf.StatsFile(fd, closefd=False)
        file.read()
        os.close(fd)
        with pytest.raises(OSError, match="closed elsewhere") as caught:
            file.read()
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EPERM, "security module or seccomp"),
        (errno.EIO, "only the process that created it"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOTTY, "Linux 5.14"),
        (errno.EINVAL, "KVM_CREATE_VM"),
    ],
)
def test_each_refusal_of_the_kernel_says_what_to_do(monkeypatch, number, remedy):
    """The errno is kept; the message names the call and the fd, and says what to do."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(OSError, match=remedy) as caught:
        kf.StatsFile.open(0)
    assert caught.value.errno == number
    assert "KVM_GET_STATS_FD on fd 0" in str(caught.value)


def test_a_file_that_becomes_shorter_is_a_format_error_at_its_end():
    """A short read is TRUNCATED at the byte where the file ends; reading works again once the file has grown back."""
    with SyntheticStats() as made, made.open() as file:
        size = len(made.to_bytes())
        os.ftruncate(made.fileno(), size - 12)
        with pytest.raises(kf.FormatError, match=rf"byte {size - 12}: .*reach byte {size}") as caught:
            file.read()
        assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.TRUNCATED, size - 12)
        os.ftruncate(made.fileno(), size)
        assert file.read().shape == (file.schema.num_values,)


def large_file(descriptors, cut=0):
    """A merged file longer than what opening reads first."""
    stats = [kf.Stat(f"n{i}", 0, 0, 0, 0, 1, 8 * i) for i in range(descriptors)]
    with SyntheticStats(stats=stats) as made:
        for i in range(descriptors):
            made.set(f"n{i}", i)
        data = made.to_bytes()
    return data[: len(data) - cut]


@pytest.mark.parametrize("descriptors", [90, 113, 126, 127, 128, 129, 1000, 5000])
def test_files_longer_than_the_first_read_are_read_whole(descriptors):
    """Wherever the first read ends (in the data, in the table), all descriptors and values are there."""
    with kf.StatsFile.from_bytes(large_file(descriptors)) as file:
        assert file.read().tolist() == list(range(descriptors))


@pytest.mark.parametrize("descriptors", [90, 113, 127, 1000])
def test_long_files_that_are_cut_are_refused_where_they_end(descriptors):
    """A file that lacks data or descriptors is refused with the offset where it ends."""
    whole = len(large_file(descriptors))
    for cut in (1, 8, whole // 8, whole // 2):
        with pytest.raises(kf.FormatError) as caught:
            kf.StatsFile.from_bytes(large_file(descriptors, cut))
        assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.TRUNCATED, whole - cut)


def test_a_long_file_of_4_byte_values_is_recognised():
    """The VM file of a 32-bit kernel whose table fills the first read is widened all the same."""
    stats = [kf.Stat(f"n{i}", 0, 0, 0, 0, 1, 0) for i in range(400)]
    with SyntheticStats(kind="vm", layout="v2", stats=stats, value_size=4) as made, made.open() as file:
        made.set("n399", 0xFFFFFFFF)
        assert file.snapshot()["n399"] == 0xFFFFFFFF
        assert sum(file.snapshot().values()) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("file_id", "kind", "vcpu"),
    [
        ("kvm-1", "vm", None),
        ("kvm-1/vcpu-0", "vcpu", 0),
        ("kvm-4194304/vcpu-1023", "vcpu", 1023),
        ("a\n/vcpu-2", "vcpu", 2),
        ("vcpu-7", "vcpu", 7),
        ("kvm-1/vcpu-3/vcpu-4", "vcpu", 4),
        ("kvm-1/vcpu-", "vm", None),
        ("kvm-1/vcpu-0x", "vm", None),
        ("kvm-1-vcpu-0", "vm", None),
        ("kvm-1/vcpu-\u0661", "vm", None),
    ],
)
def test_kind_and_number_come_from_the_id(file_id, kind, vcpu):
    """kvm-PID is a VM, kvm-TID/vcpu-N a vCPU."""
    data = REAL[:24] + file_id.encode().ljust(48, b"\0") + REAL[72:]
    with kf.StatsFile.from_bytes(data) as file:
        assert (file.id, file.kind, file.vcpu_id) == (file_id, kind, vcpu)


def test_a_layout_is_found_by_its_text():
    """What is equal has one hash, so that a table by layouts can be asked with the text, and the other way round."""
    for layout in kf.Layout:
        assert {layout: 1}[str(layout)] == {str(layout): 1}[layout]


def test_an_id_without_nul_ends_with_its_field():
    """An id that fills its field is read to the end of the field, and no further."""
    data = REAL[:24] + b"kvm-".ljust(48, b"9") + REAL[72:]
    assert kf.parse(data).id == "kvm-".ljust(48, "9")


def test_the_next_file_of_a_kind_is_not_parsed(monkeypatch):
    """Opening a second file with known descriptors calls no parser: the bytes are only compared."""
    with kf.StatsFile.from_bytes(REAL) as first:
        monkeypatch.setattr("kvmstats_fast.encoding.lib", None)
        other = REAL[:24] + b"kvm-2/vcpu-9".ljust(48, b"\0") + REAL[72:]
        with kf.StatsFile.from_bytes(other) as second:
            assert second.schema is first.schema
            assert second.vcpu_id == 9


def test_no_byte_of_header_or_table_can_differ_unnoticed():
    """Whichever byte outside the id changes, the file is refused, or gets a schema of its own."""
    known = kf.parse(REAL).schema
    for position in [*range(24), *range(72, 2952)]:
        data = bytearray(REAL)
        data[position] ^= 0x10
        try:
            other = kf.parse(data).schema
        except kf.FormatError:
            continue
        assert other is not known
        assert other != known


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x", "riscv64", "loongarch64"])
def test_the_ioctl_numbers_of_most_machines(machine):
    """KVM_GET_STATS_FD is 0xAECE, the series' call 0x8050AECC."""
    assert abi.ioctl_number(kf.Layout.MERGED, machine) == ("KVM_GET_STATS_FD", 0xAECE)
    assert abi.ioctl_number(kf.Layout.V2, machine) == ("KVM_STATS_GETFD", 0x8050AECC)


@pytest.mark.parametrize("machine", ["mips", "mips64", "ppc64le", "ppc64", "ppc"])
def test_the_ioctl_numbers_of_mips_and_powerpc(machine):
    """There "no direction" is a bit of its own: 0x2000AECE and 0x4050AECC."""
    assert abi.ioctl_number(kf.Layout.MERGED, machine)[1] == 0x2000AECE
    assert abi.ioctl_number(kf.Layout.V2, machine)[1] == 0x4050AECC


def test_open_issues_the_ioctl_of_the_layout_asked_for(monkeypatch):
    """layout= selects the call; a layout that never had one is refused, with what works instead."""
    calls = []

    def note(fd, number):
        calls.append((fd, number))
        return os.dup(made.fileno())

    monkeypatch.setattr(fcntl, "ioctl", note)
    monkeypatch.setattr("kvmstats_fast.stats_file.ioctl_number", lambda layout: abi.ioctl_number(layout, "ppc64le"))
    with SyntheticStats() as made:
        for layout in ("merged", kf.Layout.V2):
            kf.StatsFile.open(made, layout=layout).close()
        assert calls == [(made.fileno(), 0x2000AECE), (made.fileno(), 0x4050AECC)]
        with pytest.raises(ValueError, match=r"'v5'.*StatsFile\(stats_fd\)"):
            kf.StatsFile.open(made, layout="v5")
        with pytest.raises(ValueError, match="v3"):
            kf.StatsFile.open(made, layout="v3")


def test_a_format_of_the_future_is_refused_clearly():
    """Header flags other than 0 say that a newer package is needed."""
    data = struct.pack("=I", 4) + REAL[4:]
    with pytest.raises(kf.FormatError, match=r"flags are 0x4.*newer") as caught:
        kf.parse(data)
    assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.FLAGS, 0)


def counting_preads(monkeypatch):
    """The (size, offset) of each os.pread from here on."""
    calls, pread = [], os.pread

    def note(fd, size, offset):
        calls.append((size, offset))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", note)
    return calls


def test_a_small_file_takes_one_read_to_open(resources, monkeypatch):
    """It ends in what is read first, data included, and no more is asked for, be its kind new or known."""
    made = resources.enter_context(SyntheticStats(stats=[made_stat(f"small_{os.getpid()}_{i}") for i in range(9)]))
    calls = counting_preads(monkeypatch)
    for _ in range(2):
        resources.enter_context(made.open())
    assert calls == [(8192, 0)] * 2


@pytest.mark.parametrize("count", [126, 127, 400])
def test_a_file_that_is_longer_than_the_first_read_is_read_on(resources, count, monkeypatch):
    """From where that ended to the end of its data: with 126 statistics these alone, with more descriptors too."""
    made = resources.enter_context(SyntheticStats(stats=[made_stat(f"large_{i}") for i in range(count)]))
    made.set(f"large_{count - 1}", 5)
    calls = counting_preads(monkeypatch)
    file = resources.enter_context(made.open())
    assert list(file.schema) == [f"large_{i}" for i in range(count)]
    assert file.read()[-1] == 5
    end = 8192
    for size, offset in calls[1:]:
        assert offset == end
        end += size
    assert end == file.header.data_offset + 8 * count


def made_stat(name):
    """A plain counter."""
    return kf.Stat(name, kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1, 0)


def test_what_stands_in_for_a_revoked_file_goes_to_no_child(resources):
    """Its number is /dev/null's from then on, and close-on-exec as before."""
    file = resources.enter_context(kf.StatsFile.from_bytes(REAL))
    fd = file.fileno()
    file.handle.revoke(kf.VmGoneError(errno.ESRCH, "gone"))
    assert str(Path(f"/proc/self/fd/{fd}").readlink()) == os.devnull
    assert not os.get_inheritable(fd)
    with pytest.raises(kf.VmGoneError, match="gone"):
        file.read()


@pytest.mark.parametrize("ask", [kf.StatsFile.read, kf.StatsFile.snapshot, kf.StatsFile.fileno])
def test_a_file_whose_vm_is_gone_keeps_nothing_of_those_who_ask_for_it(resources, ask):
    """Each gets an error of its own: one that is raised again and again would keep all frames it went through."""
    file = resources.enter_context(kf.StatsFile.from_bytes(REAL))
    file.handle.revoke(kf.VmGoneError(errno.ESRCH, "gone"))
    kept = []

    def try_it():
        mine = {0}
        kept.append(weakref.ref(mine))
        with pytest.raises(kf.VmGoneError, match="gone") as caught:
            ask(file)
        assert (caught.value.errno, caught.value.strerror) == (errno.ESRCH, "gone")

    try_it()
    gc.collect()  # its own frame has the error, too
    assert kept[0]() is None
    assert file.handle.lost.__traceback__ is None


def test_an_fd_above_a_limit_that_was_lowered_is_closed(tmp_path):
    """Where nothing can be put in its place: it is not kept open, which would keep the memory of a VM."""
    (tmp_path / "a").write_bytes(b"")

    def work():
        with (tmp_path / "a").open() as other:
            fd = Fd(fcntl.fcntl, other.fileno(), fcntl.F_DUPFD_CLOEXEC, 200)
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))
            fd.replace(other.fileno())
            assert fd.closed
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(200)
            fd.replace(other.fileno())  # of one that is closed nothing is left to replace

    assert exit_status(forked(work)) == 0
