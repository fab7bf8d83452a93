"""Stats files from another process: what arrives, what is refused, and that nothing stays open."""

import array
import errno
import fcntl
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from helpers import NOBODY, CtrlC, examples, exit_status, forked, open_fds, until
from hypothesis import given
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats
from kvmstats_fast.vmm import handover, inherited

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_stays_open():
    """No test of this file leaves an fd behind, whatever failed in it."""
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def pair(resources):
    """Two ends of a connection."""
    return [resources.enter_context(end) for end in socket.socketpair()]


@pytest.fixture
def made(resources):
    """Seven made-up stats files of different content."""
    made = [resources.enter_context(SyntheticStats("x86", "vcpu", vcpu_id=i)) for i in range(7)]
    for i, one in enumerate(made):
        one.set("exits", 1000 + i)
    return made


@pytest.fixture
def files(made, resources):
    """The same, open."""
    return [resources.enter_context(one.open()) for one in made]


@contextmanager
def received(*arguments, **options):
    """What receive_files gives, closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(file) for file in kf.receive_files(*arguments, **options)]


def message(fds, more, magic=b"KVMSTATS", version=1):
    """The bytes of a message, as docs/fd-passing.md has them."""
    return struct.pack("=8sHHI", magic, version, fds, more)


def send(sock, data, fds=()):
    """Send bytes with fds."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], control) == len(data)


# ---- what arrives


@pytest.mark.real_vm
def test_600_stats_files_of_a_real_vm_arrive_from_another_process_and_stay_live(pair):
    """Every value equals what the VMM reads itself, also after the guest ran on, and all fds are close-on-exec."""
    code = (
        "import json, sys, kvmstats_fast as kf\n"
        "from kvmstats_fast.testing import TinyGuest\n"
        "guest = TinyGuest(5)\n"
        "fds = [guest.vm_fd, *guest.vcpu_fds] * 100\n"
        "files = [kf.StatsFile.open(fd) for fd in fds]\n"
        "kf.send_files(int(sys.argv[1]), files)\n"
        "for line in sys.stdin:\n"
        "    for vcpu in range(5): guest.run(10 * (vcpu + 1), vcpu)\n"
        "    print(json.dumps([[file.id, file.read().tolist()] for file in files]), flush=True)\n"
    )
    ours, theirs = pair
    command = [sys.executable, "-W", "ignore", "-c", code, str(theirs.fileno())]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], **streams) as vmm, received(ours) as files:
        assert len(files) == 600
        assert not any(os.get_inheritable(file.fileno()) for file in files)
        seen = []
        for _ in range(2):
            vmm.stdin.write("run\n")
            vmm.stdin.flush()
            seen.append(json.loads(vmm.stdout.readline()))
            assert [[file.id, file.read().tolist()] for file in files] == seen[-1]
        assert seen[0] != seen[1]
        assert [file.vcpu_id for file in files] == [None, 0, 1, 2, 3, 4] * 100
        vmm.stdin.close()
        assert vmm.wait() == 0
        last = [file.read().tolist() for file in files if file.kind == "vcpu"]  # the end itself moves a VM's
        assert last == [values for id_, values in seen[1] if "vcpu" in id_]


@pytest.mark.parametrize("number", [0, 1, 2, 252, 253, 254, 506, 507, 600])
def test_any_number_of_files_arrives_in_order_and_not_a_byte_more_is_read(pair, files, number):
    """Batches end where SCM_MAX_FD does; what follows on the connection is left for others."""
    sender, receiver = pair
    sent = [files[i % 7] for i in range(number)]
    kf.send_files(sender, sent)
    sender.sendall(b"behind")
    with received(receiver) as got:
        assert [file.id for file in got] == [file.id for file in sent]
        assert all((file.read() == one.read()).all() for file, one in zip(got[:10], sent, strict=False))
        assert all(fcntl.fcntl(file.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC for file in got)
    assert receiver.recv(100) == b"behind"


@pytest.mark.parametrize("as_what", ["StatsFile", "fd", "object"])
def test_files_are_given_as_objects_or_numbers_and_stay_the_senders(pair, made, files, as_what):
    """A StatsFile, an fd, and anything with fileno() are sent alike, and are open afterwards."""
    sent = {"StatsFile": files, "fd": [file.fileno() for file in files], "object": made}[as_what]
    kf.send_files(pair[0].fileno(), iter(sent))
    with received(pair[1].fileno()) as got:
        assert [file.vcpu_id for file in got] == list(range(7))
    assert [int(file.snapshot()["exits"]) for file in files] == [1000 + i for i in range(7)]


@pytest.mark.parametrize("timeout", [None, 0, 5], ids=["blocking", "non-blocking", "timeout"])
def test_the_sockets_own_mode_does_not_matter_and_stays(pair, files, timeout):
    """Blocking, non-blocking and timeout sockets serve alike, before the peer is there and after, unchanged."""
    for end in pair:
        end.settimeout(timeout)
    blocking = [os.get_blocking(end.fileno()) for end in pair]
    thread = threading.Timer(0.1, kf.send_files, (pair[0], files * 50))
    thread.start()
    with received(pair[1]) as got:
        assert len(got) == 350
    thread.join()
    assert [end.gettimeout() for end in pair] == [timeout] * 2
    assert [os.get_blocking(end.fileno()) for end in pair] == blocking


def test_the_default_timeout_of_new_sockets_changes_nothing(pair, files):
    """socket.setdefaulttimeout, which makes Python switch sockets to non-blocking, does not reach the caller's."""
    socket.setdefaulttimeout(5)
    try:
        kf.send_files(pair[0], files)
        received(pair[1]).__enter__()[0].close()
    finally:
        socket.setdefaulttimeout(None)
    assert [os.get_blocking(end.fileno()) for end in pair] == [True, True]


def test_a_message_in_pieces_is_put_together(pair, files):
    """Bytes may come one by one, fds with any of them, and plain bytes before them."""
    sender, receiver = pair
    for first in (message(3, 2), message(2, 0)):
        fds = [file.fileno() for file in files[: first[10]]]
        for i, byte in enumerate(first):
            send(sender, bytes([byte]), fds[i - 5 : i - 4] if 5 <= i < 5 + len(fds) else [])
    with received(receiver) as got:
        assert [file.vcpu_id for file in got] == [0, 1, 2, 0, 1]


def test_the_sender_may_close_and_go_before_anything_is_read(pair, files):
    """What is under way is the kernel's to keep."""
    with ExitStack() as own:
        kf.send_files(pair[0], [own.enter_context(kf.StatsFile(os.dup(file.fileno()))) for file in files])
    pair[0].close()
    with received(pair[1]) as got:
        assert len(got) == 7


# ---- who may


@pytest.fixture
def connect_as_nobody(tmp_path, resources):
    """A function: `work(connection)` in a forked child of user nobody; gives our end and the child's pid."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    listener = resources.enter_context(socket.socket(socket.AF_UNIX))
    path = f"/tmp/kvmstats-test-{os.getpid()}-{tmp_path.name[-8:]}"
    resources.callback(Path(path).unlink)
    listener.bind(path)
    Path(path).chmod(0o777)
    listener.listen()

    def start(work):
        def child():
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            work(connection)

        pid = forked(child, NOBODY)
        return resources.enter_context(listener.accept()[0]), pid

    return start


def test_another_users_files_are_refused_unless_that_user_is_named(connect_as_nobody, files):
    """The receiver says who the peer is and how to allow it, and reads nothing before."""
    fds = [file.fileno() for file in files]
    connection, pid = connect_as_nobody(lambda connection: kf.send_files(connection, fds, uid=0))
    assert exit_status(pid) == 0
    for uid, allowed in ((None, "0"), (12345, "12345")):
        with pytest.raises(
            kf.HandOverError, match=rf"process {pid}, has uid {NOBODY}; allowed is {allowed}: pass uid={NOBODY}"
        ):
            kf.receive_files(connection, uid=uid)
    with received(connection, uid=NOBODY) as got:
        assert len(got) == 7


def test_files_are_not_sent_to_another_user_unless_named(connect_as_nobody, files):
    """The sender refuses likewise, and the peer, who gets nothing, sees the connection end."""

    def work(connection):
        with pytest.raises(kf.HandOverError, match="nothing had arrived"):
            kf.receive_files(connection, uid=0)

    connection, pid = connect_as_nobody(work)
    with pytest.raises(kf.HandOverError, match=rf"uid {NOBODY}; allowed is 0"):
        kf.send_files(connection, files)
    connection.close()
    assert exit_status(pid) == 0
    connection, pid = connect_as_nobody(lambda connection: [f.close() for f in kf.receive_files(connection, uid=0)])
    kf.send_files(connection, files, uid=NOBODY)
    assert exit_status(pid) == 0


def test_root_may_by_default_and_not_if_another_user_is_named(connect_as_nobody, files):
    """Root, who could read everything anyway, is allowed by default; uid= allows that user alone."""

    def work(connection):
        with pytest.raises(kf.HandOverError, match="has uid 0; allowed is 12345"):
            kf.receive_files(connection, uid=12345)
        assert len([file.close() for file in kf.receive_files(connection)]) == 7

    # SO_PEERCRED of the connecting end names who called listen: root.
    connection, pid = connect_as_nobody(work)
    kf.send_files(connection, files, uid=NOBODY)
    assert exit_status(pid) == 0


def test_more_files_under_way_than_a_user_may_have_is_an_error_that_says_so(connect_as_nobody, files):
    """ETOOMANYREFS of an unprivileged sender names the limit, and what to do."""
    fds = [file.fileno() for file in files] * 40

    def work(connection):
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with pytest.raises(OSError, match=r"sendmsg with 27 fds.*under way.*RLIMIT_NOFILE.*253 of 280 files") as caught:
            kf.send_files(connection, fds, uid=0)
        assert caught.value.errno == errno.ETOOMANYREFS

    assert exit_status(connect_as_nobody(work)[1]) == 0


# ---- what goes wrong


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([], "closed the connection, or died: nothing had arrived"),
        ([(message(2, 3)[:11], 2)], "nothing had arrived"),
        ([(message(2, 3), 2)], "closed the connection, or died: 2 of 5 files had arrived"),
        ([(message(2, 3), 2), (message(1, 2)[:5], 1)], "2 of 5 files had arrived"),
        ([(b"GET / HTTP/1.1\r\n", 0)], r"does not speak the hand-over protocol: it sent b'GET / HTTP/1.1\\r\\n'"),
        ([(message(1, 0, magic=b"kvmstats"), 1)], "does not speak the hand-over protocol"),
        ([(message(1, 0, version=2), 1)], "version 2 of the hand-over protocol, this package version 1"),
        ([(message(1, 0, version=0), 1)], "version 0"),
        ([(message(2, 0), 1)], "announces 2 fds, but has 1; nothing had arrived"),
        ([(message(1, 0), 2)], "announces 1 fds, but has 2"),
        ([(message(0, 0), 1)], "announces 0 fds, but has 1"),
        ([(message(3, 0), 0)], "announces 3 fds, but has 0"),
        ([(message(0, 1), 0)], "of 0 fds announces 1 more"),
        ([(message(2, 3), 2), (message(1, 1), 1)], "of 1 fds announces 1 more, where 2 were due; 2 of 5 files"),
        ([(message(2, 3), 2), (message(1, 3), 1)], "of 1 fds announces 3 more, where 2 were due"),
        ([(message(2, 3), 2), (message(4, 0), 4)], "of 4 fds announces 0 more, where -1 were due"),
        ([(message(2, 3), 2), (message(0, 3), 0)], "of 0 fds announces 3 more, where 3 were due"),
    ],
)
def test_a_peer_that_goes_away_or_talks_nonsense_is_one_clear_error(pair, files, sent, error):
    """Whatever does not keep the protocol is refused, with what had arrived, and that is closed."""
    for data, fds in sent:
        send(pair[0], data, [file.fileno() for file in files[:fds]])
    pair[0].close()
    before = open_fds()
    with pytest.raises(kf.HandOverError, match=error):
        kf.receive_files(pair[1])
    assert open_fds() == before


def test_a_peer_that_dies_with_our_bytes_unread_is_the_same_error(pair):
    """ECONNRESET is an end of the connection, too."""
    pair[1].sendall(b"something")
    pair[0].close()
    with pytest.raises(kf.HandOverError, match="closed the connection, or died: nothing had arrived"):
        kf.receive_files(pair[1])


def test_too_many_files_for_this_process_says_what_to_raise(pair, files):
    """Fds that the kernel drops (MSG_CTRUNC) are an error that names ulimit -n, and the others are closed."""
    kf.send_files(pair[0], files * 10)
    before = open_fds()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, limits[1]))
    try:
        with pytest.raises(
            kf.HandOverError, match=r"could not give .* all fds .* files open as it may, \d+: raise `ulimit -n`"
        ):
            kf.receive_files(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_fds() == before


@pytest.mark.parametrize("position", [0, 3, 7])
@pytest.mark.parametrize("what", ["text", "zero", "pipe", "folder", "path"])
def test_a_file_that_is_no_stats_file_is_named(pair, files, tmp_path, position, what):
    """The error says which of how many, from whom, and what it is; everything is closed."""
    (tmp_path / "text").write_text("no stats file at all\n" * 10)
    os.mkfifo(tmp_path / "pipe")
    path, flags = {
        "text": (tmp_path / "text", os.O_RDONLY),
        "zero": ("/dev/zero", os.O_RDONLY),
        "pipe": (tmp_path / "pipe", os.O_RDWR),
        "folder": (tmp_path, os.O_RDONLY),
        "path": (tmp_path, os.O_PATH),
    }[what]
    odd = os.open(path, flags)
    kf.send_files(pair[0], [*files[:position], odd, *files[position:]])
    os.close(odd)
    before = open_fds()
    kind = kf.FormatError if what in ("text", "zero") else OSError
    name = re.escape(str(path))
    with pytest.raises(kind, match=rf"file {position + 1} of 8 from process {os.getpid()}: .*fd \d+ \({name}\)"):
        kf.receive_files(pair[1])
    assert open_fds() == before


def test_a_peer_that_stops_is_a_timeout_that_says_how_far_it_came(pair, files):
    """The timeout is for the whole hand-over, not for each message."""
    kf_error = r"the peer took too long: 2 of 5 files had arrived"
    send(pair[0], message(2, 3), [file.fileno() for file in files[:2]])
    before = open_fds()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=kf_error) as caught:
        kf.receive_files(pair[1], timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - start >= 0.05
    assert open_fds() == before


def test_a_peer_that_does_not_read_is_a_timeout(pair, files):
    """A sender does not wait for ever either."""
    pair[0].setblocking(False)
    with suppress(BlockingIOError):
        while True:
            pair[0].send(bytes(100_000))
    with pytest.raises(TimeoutError, match="took too long: 0 of 7 files were sent"):
        kf.send_files(pair[0], files, timeout=0.05)


def test_a_peer_that_is_gone_is_an_error_of_the_sender(pair, files):
    """EPIPE says how much was sent; there is no SIGPIPE, also where it would end the process."""
    pair[1].close()

    def work():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with pytest.raises(kf.HandOverError, match="closed the connection: 0 of 7 files were sent"):
            kf.send_files(pair[0], files)

    assert exit_status(forked(work)) == 0


@pytest.mark.parametrize("call", [kf.receive_files, lambda sock: kf.send_files(sock, [])], ids=["receive", "send"])
def test_what_is_no_connected_unix_stream_socket_is_refused(resources, tmp_path, call):
    """Each wrong kind of socket, and what is none, has an error that says what it must be."""
    unix = resources.enter_context(socket.socket(socket.AF_UNIX))
    listening = resources.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(bytes(tmp_path / "s")[-100:])
    listening.listen()
    inet = resources.enter_context(socket.socket())
    datagrams = [resources.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
    packets = [resources.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    file = resources.enter_context(SyntheticStats())
    closed = socket.socket()
    closed.close()
    for sock, error, words in (
        ("/run/socket", TypeError, "not a file descriptor"),
        (None, TypeError, "not a file descriptor"),
        (file, ValueError, r"fd \d+ \(/memfd:.*\) is not a socket"),
        (file.fileno(), ValueError, "is not a socket"),
        (unix, ValueError, "not connected .*connect\\(\\) or accept\\(\\) first"),
        (listening, ValueError, "is a listening socket"),
        (inet, ValueError, r"of family 2 and type 1: .*AF_UNIX \(1\), SOCK_STREAM \(1\)"),
        (datagrams[0], ValueError, "type 2"),
        (packets[0], ValueError, "type 5"),
        (closed, OSError, "fstat on fd -1"),
        (999_999, OSError, "fstat on fd 999999: Bad file descriptor"),
    ):
        with pytest.raises(error, match=words):
            call(sock)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_none_is_refused(pair, timeout):
    """Negative and NaN are no number of seconds."""
    for call in (kf.receive_files, lambda sock, **options: kf.send_files(sock, [], **options)):
        with pytest.raises(ValueError, match="timeout is"):
            call(pair[0], timeout=timeout)


def test_a_uid_that_is_no_number_is_refused(pair):
    """A user's name is not looked up, and does not silently match nobody."""
    with pytest.raises(TypeError):
        kf.receive_files(pair[0], uid="root")


def test_a_file_that_is_not_open_is_named_before_anything_is_sent(pair, files):
    """The peer of a sender that fails so has not got half a hand-over."""
    with pytest.raises(OSError, match="file 3 to send, fd 999999") as caught:
        kf.send_files(pair[0], [*files[:2], 999_999])
    assert caught.value.errno == errno.EBADF
    closed = kf.StatsFile(os.dup(files[0].fileno()))
    closed.close()
    with pytest.raises(ValueError, match="is closed"):
        kf.send_files(pair[0], [closed])
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[1].recv(1)


def pass_pidfds(sock):
    """Have the kernel add the sender's pidfd to each message, and its credentials."""
    so_passpidfd = 76  # include/uapi/asm-generic/socket.h
    try:
        sock.setsockopt(socket.SOL_SOCKET, so_passpidfd, 1)
    except OSError as error:
        pytest.skip(f"this kernel has no SO_PASSPIDFD: {error.strerror}")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


@pytest.mark.parametrize("number", [0, 1, 3, 600])
def test_the_pidfd_that_comes_with_each_message_is_closed(pair, files, number):
    """A socket with SO_PASSPIDFD gets the sender's; only the files stay open."""
    pass_pidfds(pair[1])
    kf.send_files(pair[0], [files[i % 7] for i in range(number)])
    before = open_fds()
    with received(pair[1]) as got:
        assert [file.vcpu_id for file in got] == [i % 7 for i in range(number)]
        assert open_fds() == before + number


@pytest.mark.parametrize(
    "sent",
    [[(b"GET / HTTP/1.1\r\n", 1)], [(message(2, 3), 2)], [(message(2, 0)[:5], 1), (b"x", 1)], [(message(2, 0), 1)]],
)
def test_pidfds_are_closed_after_an_error_too(pair, files, sent):
    """With a message of nonsense, of half a hand-over, and of too few fds."""
    pass_pidfds(pair[1])
    for data, fds in sent:
        send(pair[0], data, [file.fileno() for file in files[:fds]])
    pair[0].close()
    before = open_fds()
    with pytest.raises(kf.HandOverError):
        kf.receive_files(pair[1])
    assert open_fds() == before


# ---- Ctrl-C


@pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")  # of what the interpreter then closes in our place
@pytest.mark.parametrize("work", ["receive", "receive with pidfds", "inherit", "send"])
def test_a_ctrl_c_at_any_instruction_leaves_nothing_open(monkeypatch, files, work):
    """KeyboardInterrupt at each bytecode instruction of the package in turn: no fd is left, none is closed twice."""
    monkeypatch.setattr(handover, "_MOST_FDS", 2)
    monkeypatch.setattr(inherited, "_FIRST", 700)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "3")
    closed_twice = []

    def close(fd, close=os.close):
        try:
            close(fd)
        except OSError:
            closed_twice.append(fd)

    monkeypatch.setattr(os, "close", close)

    call = {
        "receive": lambda sock: kf.receive_files(sock, timeout=None),
        "receive with pidfds": lambda sock: kf.receive_files(sock, timeout=None),
        "inherit": lambda _: kf.inherited_files(),
        "send": lambda sock: kf.send_files(sock, fds, timeout=None) or [],
    }[work]

    def transfer(at):
        """Transfer three files; how many instructions were left, and what came back."""
        got = []
        with ExitStack() as own:
            sock, peer = (own.enter_context(end) for end in socket.socketpair())
            if work == "receive with pidfds":
                pass_pidfds(sock)
            send(peer, message(2, 1), fds[:2])
            send(peer, message(1, 0), fds[2:])
            with CtrlC(at) as ctrl_c:
                got = call(sock)
        return ctrl_c.left, got

    left = at = 0
    before = open_fds()
    while left <= 0:
        fds = [fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, 700 + i) for i, file in enumerate(files[:3])]
        at += 1
        left, got = transfer(at)
        # Inherited fds are the files' from the return on, and stay open before it.
        if work != "inherit" or (not got and Path("/proc/self/fd/700").exists()):
            for fd in fds:
                os.close(fd)
        assert len(got) == (3 if left > 0 and work != "send" else 0)
        for file in got:
            file.close()
        assert (open_fds(), closed_twice) == (before, []), at
    assert at > 200


# ---- a hostile peer


def odd_fds(resources):
    """Fds of many kinds."""
    made = resources.enter_context(SyntheticStats())
    pipe = os.pipe()
    fds = [
        os.dup(made.fileno()),
        os.memfd_create("short"),
        *pipe,
        os.open("/dev/zero", os.O_RDWR),
        os.open("/dev/null", os.O_WRONLY),
        os.open("/", os.O_RDONLY),
        os.open("/", os.O_PATH),
        os.open("/proc/self/maps", os.O_RDONLY),
        os.pidfd_open(os.getpid()),
    ]
    for fd in fds:
        resources.callback(os.close, fd)
    os.write(fds[1], made.to_bytes()[:3000])
    return fds


@st.composite
def hand_overs(draw):
    """A hand-over by the book, of which any part may then be something else."""
    total = draw(st.integers(0, 12))
    pieces = []
    left = total
    while True:
        here = draw(st.integers(min(1, left), left))
        left -= here
        data = message(here, left)
        if draw(st.integers(0, 4)) == 0:
            data = draw(
                st.one_of(
                    st.binary(max_size=40),
                    st.builds(message, st.integers(0, 65535), st.integers(0, 2**32 - 1)),
                    st.integers(0, 16).map(lambda n, data=data: data[:n]),
                )
            )
        good = st.just(0) if draw(st.booleans()) else st.integers(0, 9)
        fds = draw(st.lists(good, min_size=here, max_size=here if draw(st.integers(0, 5)) else 15))
        cut = draw(st.integers(0, 16)) if draw(st.booleans()) else 0
        pieces += [(data[:cut], []), (data[cut:], fds)]
        if not left:
            return pieces


@examples(150)
@given(hand_overs())
def test_a_hostile_peer_makes_clear_errors_only(pieces):
    """Whatever bytes and fds come: the files by the book, or one documented error; no leak, no hang."""
    with ExitStack() as resources:
        fds = odd_fds(resources)
        sender, receiver = (resources.enter_context(end) for end in socket.socketpair())
        for data, numbers in pieces:
            if data:
                send(sender, data, [fds[i] for i in numbers])
        sender.close()
        before = open_fds()
        try:
            with received(receiver, timeout=20) as got:
                assert all(file.kind == "vcpu" for file in got)
        except kf.HandOverError:
            pass
        except (kf.FormatError, OSError) as error:
            if not re.search(r"file \d+ of \d+ from process", str(error)):
                raise
        assert open_fds() == before


# ---- C


def example():
    """The C of docs/fd-passing.md."""
    return re.search(r"```c\n(.*?)```", (ROOT / "docs" / "fd-passing.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def c_sender(tmp_path_factory):
    """A program that sends an fd a number of times by the documented function: socket, fd, number."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    main = """
        #include <stdio.h>
        #include <stdlib.h>
        int main(int argc, char **argv)
        {
            static int fds[70000];
            uint32_t count = argc == 4 ? (uint32_t)atoi(argv[3]) : 0;
            for (uint32_t i = 0; i < count; ++i)
                fds[i] = atoi(argv[2]);
            if (kvmstats_send_files(atoi(argv[1]), fds, count) == 0)
                return 0;
            perror("sendmsg");
            return 1;
        }
    """
    folder = tmp_path_factory.mktemp("c-sender")
    (folder / "sender.c").write_text(example() + main)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-O2"]
    subprocess.run(["gcc", *flags, folder / "sender.c", "-o", folder / "sender"], check=True)
    return folder / "sender"


@pytest.mark.parametrize("number", [0, 1, 253, 254, 600])
def test_the_sender_of_the_documentation_speaks_the_protocol(c_sender, pair, made, number):
    """The C that a VMM pastes in hands over any number of files."""
    fds = (pair[0].fileno(), made[3].fileno())
    command = [c_sender, *map(str, fds), str(number)]
    with subprocess.Popen(command, pass_fds=fds) as sender:
        with received(pair[1]) as got:
            assert [file.vcpu_id for file in got] == [3] * number
        assert sender.wait() == 0


def test_the_sender_of_the_documentation_says_that_the_peer_is_gone(c_sender, pair, made):
    """EPIPE is its return value, not a signal that ends the VMM."""
    pair[1].close()
    fds = (pair[0].fileno(), made[3].fileno())
    done = subprocess.run([c_sender, *map(str, fds), "1"], pass_fds=fds, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "sendmsg: Broken pipe\n")


# ---- the service manager


LISTENER = """
import json, os, sys, kvmstats_fast as kf
files = kf.inherited_files(*sys.argv[1:], unset_environment=True)
print(json.dumps([[file.fileno(), file.vcpu_id, int(file.snapshot()["exits"])] for file in files]))
print(json.dumps([os.get_inheritable(fd) for fd in range(3, 7)]), [name for name in os.environ if "LISTEN" in name])
"""


@pytest.mark.parametrize(("name", "fds"), [(None, [3, 5, 6]), ("two", [5, 6]), ("other", []), ("absent", [])])
def test_a_service_takes_the_stats_files_that_its_manager_passed(made, resources, name, fds):
    """As systemd starts it: fds 3 to 6, a socket among them; all become close-on-exec, the environment is cleared."""
    other = resources.enter_context(socket.socket(socket.AF_UNIX))
    passed = [made[0].fileno(), other.fileno(), made[1].fileno(), made[2].fileno()]
    moved = " ".join(f"{to}<&{fd}" for to, fd in enumerate(passed, 3))
    names = "LISTEN_FDNAMES=one:other:two:two"
    # Via high numbers, for the ones above may be among 3 to 6.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in passed]
    for fd in high:
        resources.callback(os.close, fd)
    moved = " ".join(f"{to}<&{fd}" for to, fd in enumerate(high, 3))
    command = f'exec {moved}; LISTEN_PID=$$ LISTEN_FDS=4 {names} exec "$@"'
    arguments = [sys.executable, "-W", "ignore", "-c", LISTENER, *([name] if name else [])]
    done = subprocess.run(
        ["/bin/bash", "-c", command, "sh", *arguments], pass_fds=high, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert json.loads(first) == [[fd, {3: 0, 5: 1, 6: 2}[fd], {3: 1000, 5: 1001, 6: 1002}[fd]] for fd in fds]
    assert second == "[false, false, false, false] []"


@pytest.fixture
def listen(monkeypatch):
    """A function that sets the variables."""

    def setting(**variables):
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return setting


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "3"},
        {"LISTEN_PID": os.getpid()},
        {"LISTEN_PID": "1", "LISTEN_FDS": "3"},
        {"LISTEN_PID": os.getpid(), "LISTEN_FDS": "0"},
        {"LISTEN_PID": os.getpid(), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
    ],
)
def test_nothing_was_passed_to_this_process(listen, monkeypatch, resources, made, variables):
    """Without the variables, or with those of another process, there are no files, and the fds stay as they are."""
    for i in range(3):
        resources.callback(os.close, fcntl.fcntl(made[i].fileno(), fcntl.F_DUPFD, 800 + i))
    monkeypatch.setattr(inherited, "_FIRST", 800)
    listen(**variables)
    assert kf.inherited_files() == []
    assert [os.get_inheritable(fd) for fd in (800, 801, 802)] == [True] * 3


@pytest.mark.parametrize(
    ("variables", "error", "words"),
    [
        ({"LISTEN_PID": "x", "LISTEN_FDS": "3"}, ValueError, "LISTEN_PID='x'"),
        ({"LISTEN_FDS": "-3"}, ValueError, "LISTEN_FDS='-3'"),
        ({"LISTEN_FDS": ""}, ValueError, "LISTEN_FDS=''"),
        ({"LISTEN_FDS": "²"}, ValueError, "LISTEN_FDS='²'"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "one"}, ValueError, "LISTEN_FDS=2, but LISTEN_FDNAMES='one': 1 names"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": ""}, ValueError, "0 names"),
        ({"LISTEN_FDS": "1000000000000"}, OSError, r"LISTEN_FDS says that fd 900 was passed: Bad file descriptor"),
    ],
)
def test_variables_that_are_not_valid_are_refused_and_unset(listen, monkeypatch, variables, error, words):
    """What sd_listen_fds(3) calls invalid is an error that names the variable; unset_environment holds all the same."""
    monkeypatch.setattr(inherited, "_FIRST", 900)
    listen(**{"LISTEN_PID": os.getpid()} | variables)
    with pytest.raises(error, match=re.escape(words)):
        kf.inherited_files()
    assert "LISTEN_FDS" in os.environ
    with pytest.raises(error):
        kf.inherited_files(unset_environment=True)
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


def test_a_stats_file_that_cannot_be_read_is_an_error_and_all_stay_open(listen, monkeypatch, resources, made):
    """A passed stats file is not left out silently; the fds are as they were, so that it can be tried again."""
    with SyntheticStats("x86", "vcpu", layout="v2", count_defect=True) as defect:
        fds = [fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, 800 + i) for i, file in enumerate((made[0], defect))]
    for fd in fds:
        resources.callback(os.close, fd)
    monkeypatch.setattr(inherited, "_FIRST", 800)
    listen(LISTEN_PID=os.getpid(), LISTEN_FDS=2, LISTEN_FDNAMES="a:b")
    with pytest.raises(kf.FormatError, match=r"'b' of LISTEN_FDS: fd 801 .*the count defect of the original series"):
        kf.inherited_files()
    assert [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds] == [fcntl.FD_CLOEXEC] * 2
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.delenv("LISTEN_FDNAMES")
    (file,) = kf.inherited_files("unknown")
    assert file.fileno() == 800
    file.close()
    resources.pop_all()
    os.close(801)
    for one in made:
        one.close()


@pytest.mark.real_vm
def test_real_stats_files_are_known_by_their_links(listen, monkeypatch, guest, stats):
    """Of a VM's fds only the stats files are taken; VM and vCPU fds are left."""
    fds = [guest.vm_fd, *(file.fileno() for file in stats), *guest.vcpu_fds]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 800 + i) for i, fd in enumerate(fds)]
    monkeypatch.setattr(inherited, "_FIRST", 800)
    listen(LISTEN_PID=os.getpid(), LISTEN_FDS=len(fds))
    with ExitStack() as opened:
        files = [opened.enter_context(file) for file in kf.inherited_files()]
        assert [(file.fileno(), file.vcpu_id) for file in files] == [(801, None), (802, 0), (803, 1)]
    for fd in (high[0], *high[4:]):
        os.close(fd)


@pytest.fixture
def waits(monkeypatch):
    """What was waited for; the first time for each, the socket is said to be ready when it is not."""
    wait, waits = handover._wait, []

    def be_hasty(connection, event, deadline, progress):
        waits.append(event)
        if waits.count(event) > 1:
            wait(connection, event, deadline, progress)

    monkeypatch.setattr(handover, "_wait", be_hasty)
    return waits


def test_a_sender_waits_for_room_that_another_has_taken(pair, files, waits):
    """That there was some a moment ago promises nothing: the files arrive, whole."""
    one, other = pair
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += one.send(b"x" * 4096, socket.MSG_DONTWAIT)
    sender = threading.Thread(target=kf.send_files, args=(one, files))
    sender.start()
    assert until(lambda: waits.count(select.POLLOUT) > 1)
    while filled:
        filled -= len(other.recv(min(filled, 4096)))
    with received(other) as got:
        assert [file.id for file in got] == [file.id for file in files]
    sender.join(20)
    assert not sender.is_alive()


def test_a_receiver_waits_for_what_another_has_taken(pair, files, waits):
    """That something was there a moment ago promises nothing: the files arrive, whole."""
    one, other = pair
    got = []
    receiver = threading.Thread(target=lambda: got.extend(kf.receive_files(other)))
    receiver.start()
    assert until(lambda: waits.count(select.POLLIN) > 1)
    kf.send_files(one, files)
    receiver.join(20)
    assert [file.id for file in got] == [file.id for file in files]
    for file in got:
        file.close()
