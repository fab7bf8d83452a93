"""The one reader of /proc/PID: whatever is odd about a process or one of its files, the rest is seen."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import NOBODY, exit_status, forked, open_fds
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.errors import VmGoneError
from kvmstats_fast.vmm import proc as proc_module
from kvmstats_fast.vmm.borrow import hold_process, list_files
from kvmstats_fast.vmm.find import is_domain
from kvmstats_fast.vmm.hazard import has_filter
from kvmstats_fast.vmm.inject import open_missing
from kvmstats_fast.vmm.proc import KvmFile, Process, kvm_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a test")


@contextmanager
def running(*command):
    """A process that has printed a line, and is killed at the end."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


# ---- one file among others


@pytest.mark.parametrize(
    ("link", "file"),
    [
        ("anon_inode:kvm-vm", KvmFile("vm", None, 7, is_stats=False)),
        ("anon_inode:[kvm-vm]", KvmFile("vm", None, 7, is_stats=False)),
        ("anon_inode:kvm-vcpu:12", KvmFile("vcpu", 12, 7, is_stats=False)),
        ("anon_inode:kvm-vm-stats", KvmFile("vm", None, 7, is_stats=True)),
        ("anon_inode:[kvm-vcpu-stats:0]", KvmFile("vcpu", 0, 7, is_stats=True)),
        ("anon_inode:kvm-vcpu-statsx", None),
        ("/tmp/anon_inode:kvm-vm", None),
        ("anon_inode:[eventfd]", None),
    ],
)
def test_a_link_says_what_its_file_is(link, file):
    """Kind, vCPU number and whether it is a stats file; None of what only resembles one of KVM's."""
    assert kvm_file(link, 7) == file


#: A VMM, or a backup, with an open file whose path is longer than PATH_MAX.
LONG_PATH = """
import os, sys
from kvmstats_fast.testing import TinyGuest  # first: Python 3.13.0 imports no numpy where there is no getcwd
os.chdir(sys.argv[1])
for _ in range(20):
    os.mkdir("d" * 250)
    os.chdir("d" * 250)
log = open("log", "w")
if sys.argv[2] == "vmm":
    guest = TinyGuest(1)
    files = guest.open_stats()
print("ready", flush=True)
input()
"""


@pytest.mark.real_vm
def test_a_path_longer_than_path_max_hides_nothing_else(tmp_path):
    """Readlink says ENAMETOOLONG of that file; the VMM that has it open, and all others, are seen in every way."""
    try:
        (tmp_path / "backup").mkdir()
        (tmp_path / "vmm").mkdir()
        with (
            running(sys.executable, "-W", "ignore", "-c", LONG_PATH, tmp_path / "backup", "backup"),
            running(sys.executable, "-W", "ignore", "-c", LONG_PATH, tmp_path / "vmm", "vmm") as vmm,
        ):
            assert vmm.pid in {process.pid for process in kf.find_vms()}
            for inject in (False, True):
                with kf.attach(vmm.pid, inject=inject) as machine:
                    assert [file.kind for file in machine] == ["vm", "vcpu"]
                    assert not machine.refresh()
    finally:
        subprocess.run(["rm", "-rf", tmp_path], check=True)  # whose paths are too long for shutil.rmtree


@pytest.mark.real_vm
@pytest.mark.parametrize("number", [number for number in errno.errorcode if number != errno.EINTR])
def test_a_link_that_cannot_be_read_is_left_out_whatever_the_reason(monkeypatch, guest, stats, number):
    """Each errno, of one of several files: the others are seen."""
    readlink = os.readlink
    lost = stats[1].fileno()

    def fails(path, *, dir_fd=None):
        if path == str(lost):
            raise OSError(number, os.strerror(number))
        return readlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "readlink", fails)
    seen = {file.fd for file in Process(os.getpid()).kvm_files()}
    assert lost not in seen
    assert seen >= {guest.vm_fd, *guest.vcpu_fds, stats[0].fileno(), stats[2].fileno()}


def test_links_that_may_not_be_read_are_a_refusal(monkeypatch):
    """Where all are refused the process has guarded itself since: that is not the same as having no files."""

    def refuses(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "readlink", refuses)
    with pytest.raises(PermissionError):
        Process(os.getpid()).kvm_files()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="a kernel without CONFIG_SCHED_INFO")
def test_activity_changes_when_a_thread_runs_and_not_before():
    """Of the only thread, and of a second one; with many it is not known, nor of a process that has ended."""
    code = (
        "import sys, threading\n"
        "for line in sys.stdin:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    print(flush=True)"
    )

    def go_on(child):
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()

    with running(sys.executable, "-c", "print(flush=True)\n" + code) as child:
        process = Process(child.pid)

        def settled():
            before = process.activity()
            time.sleep(0.01)
            return before is not None and process.activity() == before

        for threads in (1, 2):
            assert until(settled)
            before = process.activity()
            assert len(before) == threads
            go_on(child)
            assert process.activity() != before
        for _ in range(10):
            go_on(child)
        assert process.activity() is None
    assert process.activity() is None


# ---- threads


@pytest.fixture(scope="module")
def leaderless(tmp_path_factory):
    """A VMM whose first thread has ended, compiled: it holds its stats files if it is told so."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    source = tmp_path_factory.mktemp("leaderless") / "leaderless.c"
    source.write_text(r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <pthread.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/ioctl.h>
        #include <unistd.h>
        static pthread_t first;
        static void *work(void *unused)
        {
            char byte;
            pthread_join(first, NULL);
            puts("up");
            fflush(stdout);
            while (read(0, &byte, 1) != 0)
                ;
            return unused;
        }
        int main(int argc, char **argv)
        {
            int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, 0xAE01, 0), cpu = ioctl(vm, 0xAE41, 0);
            pthread_t thread;
            if (argc > 1 && !strcmp(argv[1], "hold") && (ioctl(vm, 0xAECE, 0) < 0 || ioctl(cpu, 0xAECE, 0) < 0))
                return 1;
            first = pthread_self();
            pthread_create(&thread, NULL, work, NULL);
            pthread_exit(NULL);
        }
    """)
    program = source.with_suffix("")
    subprocess.run(["gcc", "-pthread", source, "-o", program], check=True)
    return program


@pytest.mark.real_vm
def test_a_vmm_whose_first_thread_has_ended_is_found_borrowed_from_and_watched(leaderless):
    """It is seen through a thread that lives, and its files go when all threads have ended."""
    with running(leaderless, "hold") as vmm:
        kf.attach(vmm.pid).close()  # the watch has fds of its own
    fds = open_fds()
    with running(leaderless, "hold") as vmm:
        (found,) = [process for process in kf.find_vms() if process.pid == vmm.pid]
        assert (found.vmm, found.vms, found.vcpus, len(found.held)) == ("leaderless", 1, (0,), 2)
        assert (found.attachable, found.why_not) == (True, "")
        with kf.attach(vmm.pid) as machine:
            assert machine.alive
            assert [file.kind for file in machine] == ["vm", "vcpu"]
            assert not machine.refresh()
            machine.vm.read()
            sampler = kf.Sampler(machine, "exits")
            vmm.kill()
            vmm.wait()
            errors = sampler.run(0.001, duration=30).errors
            assert [type(error.error) for error in errors] == [VmGoneError]
            assert not machine.alive
    assert open_fds() == fds


@pytest.mark.real_vm
def test_a_vmm_whose_first_thread_has_ended_can_be_injected(leaderless):
    """Its VM's file is opened by a thread that lives."""
    with running(leaderless, "nothing") as vmm:
        with hold_process(vmm.pid) as process:
            vm, vcpu = open_missing(process, timeout=2)
            assert (vm.opened, vm.error) == (True, None)
            assert "KVM_RUN" in str(vcpu.error)  # it was never run
        with kf.attach(vmm.pid) as machine:
            assert [file.kind for file in machine] == ["vm"]


@pytest.fixture
def refuse_threads(monkeypatch):
    """refuse_threads(errno): from now on no pidfd of a thread is to be had, and that is why."""
    pidfd_open = os.pidfd_open

    def refuse_threads(error):
        def refuse(pid, flags=0):
            if flags:
                raise OSError(error, os.strerror(error))
            return pidfd_open(pid)

        monkeypatch.setattr(os, "pidfd_open", refuse)

    return refuse_threads


@pytest.mark.real_vm
def test_a_kernel_without_pidfds_of_threads_is_said_to_lack_them(refuse_threads, leaderless):
    """Before Linux 6.9 the files of such a VMM cannot be taken, and the error says so."""
    refuse_threads(errno.EINVAL)
    with running(leaderless, "hold") as vmm, pytest.raises(kf.AttachError, match=r"first thread .* Linux 6\.9"):
        kf.attach(vmm.pid)


@pytest.mark.real_vm
def test_a_thread_that_cannot_be_held_is_the_kernels_error(refuse_threads, leaderless):
    """With no file free, its errno: that is no end of the process, and no old kernel."""
    refuse_threads(errno.EMFILE)
    with running(leaderless, "hold") as vmm, pytest.raises(OSError, match="Too many open files") as caught:
        kf.attach(vmm.pid)
    assert caught.value.errno == errno.EMFILE


@pytest.mark.real_vm
def test_a_thread_that_ends_before_it_is_held_is_passed_over(monkeypatch, leaderless):
    """While another lives the process has not ended: its files are taken through that."""
    pidfd_open, has_ended, missed, ended = os.pidfd_open, Process._has_ended, [], []

    def be_late(pid, flags=0):
        if flags and not missed:
            missed.append(pid)
            ended.append(pid)
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return pidfd_open(pid, flags)

    def look(process, tid):
        return (bool(ended) and ended.pop() == tid) or has_ended(process, tid)

    monkeypatch.setattr(os, "pidfd_open", be_late)
    monkeypatch.setattr(Process, "_has_ended", look)
    with running(leaderless, "hold") as vmm, kf.attach(vmm.pid) as machine:
        assert missed
        assert [file.kind for file in machine] == ["vm", "vcpu"]


def test_any_thread_may_be_the_one_that_lives(monkeypatch):
    """Threads that end while they are looked through are passed over, until none is left."""
    started, end = threading.Event(), threading.Event()
    tids = []
    thread = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), started.set(), end.wait()))
    thread.start()
    started.wait()
    ended = set()
    process = Process(os.getpid())
    monkeypatch.setattr(Process, "_has_ended", lambda _, tid: tid not in tids or tid in ended)
    assert process.find_live_thread()
    assert process.tid == tids[0]
    assert not process.find_live_thread()
    assert process.arguments()
    ended |= {*tids}
    with pytest.raises(ProcessLookupError):
        process.find_live_thread()
    end.set()
    thread.join()


# ---- processes that have ended


@pytest.mark.parametrize("uid", [None, pytest.param(NOBODY, marks=needs_root)], ids=["own", "another user's"])
def test_a_zombie_has_ended_in_every_reader(uid):
    """Its folder in /proc is root's, which must not be taken for a guard: attach, inject and find say it has ended."""
    pid = forked(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def look():
        for inject in (False, True):
            with pytest.raises(VmGoneError, match=f"process {pid} has ended"):
                kf.attach(pid, inject=inject)
        with hold_process(pid) as process, pytest.raises(VmGoneError, match="has ended"):
            list_files(process)
        assert pid not in {process.pid for process in kf.find_vms()}

    look()  # which also imports what another user may not read
    assert exit_status(forked(look, uid)) == 0
    os.waitpid(pid, 0)


# ---- how much is asked

#: A VMM that holds its stats files.
VMM = """
from kvmstats_fast.testing import TinyGuest
guest = TinyGuest(2)
files = guest.open_stats()
print("ready", flush=True)
input()
"""


@pytest.mark.real_vm
def test_attach_opens_one_pidfd_and_lists_the_files_once(monkeypatch):
    """Calls of the system are counted: one pidfd_open, one open of /proc/PID/fd, one getfd for each file."""
    code = (
        "from kvmstats_fast.testing import TinyGuest\ng = TinyGuest(2)\nf = g.open_stats()\nprint(flush=True)\ninput()"
    )
    with running(sys.executable, "-W", "ignore", "-c", code) as vmm:
        kf.attach(vmm.pid).close()
        counts = dict.fromkeys(("pidfd_open", "listdir", "getfd"), 0)

        class Counting:
            """The core, counted."""

            def __getattr__(self, name):
                return getattr(lib, name)

            def kvmstats_getfd(self, *arguments):
                counts["getfd"] += 1
                return lib.kvmstats_getfd(*arguments)

        def counted(name):
            call = getattr(os, name)

            def count(*arguments):
                counts[name] += 1
                return call(*arguments)

            monkeypatch.setattr(os, name, count)

        monkeypatch.setattr(proc_module, "lib", Counting())
        counted("pidfd_open")
        counted("listdir")
        with kf.attach(vmm.pid) as machine:
            assert counts == {"pidfd_open": 1, "listdir": 1, "getfd": len(machine) + 1}  # and whether it is attachable


@pytest.mark.real_vm
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_strace_sees_one_pidfd_and_one_listing(tmp_path):
    """The same, as the kernel is asked: nothing goes past what is counted in Python."""
    code = (
        "from kvmstats_fast.testing import TinyGuest\ng = TinyGuest(2)\nf = g.open_stats()\nprint(flush=True)\ninput()"
    )
    with running(sys.executable, "-W", "ignore", "-c", code) as vmm:
        attach = f"import kvmstats_fast as kf\nkf.attach({vmm.pid}).close()"
        trace = tmp_path / "trace"
        command = ["strace", "-f", "-o", trace, "-e", "trace=pidfd_open,openat", sys.executable, "-c", attach]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
    lines = trace.read_text().splitlines()
    assert sum("pidfd_open(" in line for line in lines) == 1
    assert sum(f'"/proc/{vmm.pid}/fd"' in line for line in lines) == 1


def test_a_process_lets_go_of_its_pidfds():
    """Closed or dropped; one that is not held says so when it is asked."""
    fds = open_fds()
    with Process.hold(os.getpid()) as process:
        assert process.is_held
        assert not process.ended
        assert process.refusal() == 0
    assert not process.is_held
    Process.hold(os.getpid())
    assert open_fds() == fds
    with pytest.raises(ValueError, match="is not held"):
        Process(os.getpid()).check_alive()
    assert Path(process.folder) == Path("/proc", str(os.getpid()))


def test_what_is_asked_of_a_process_that_has_ended_is_answered_with_no():
    """It has no filter, is nobody's domain, and holds nothing: that it is gone is said by whoever needs it."""
    process = subprocess.Popen(["true"])
    process.wait()
    gone = Process(process.pid)
    assert (has_filter(gone), is_domain(gone), gone.held_pids(), gone.activity()) == (False, False, set(), None)


@needs_root
@pytest.mark.real_vm
def test_another_user_sees_a_vmm_of_its_own_whose_first_thread_has_ended(leaderless, open_folder):
    """The folder of what has ended is root's: its files are seen through a thread that lives."""
    program = shutil.copy(leaderless, open_folder)
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--groups", str(Path("/dev/kvm").stat().st_gid)]
    with running(*command, program, "hold") as vmm:

        def look():
            assert [file.kind for file in Process(vmm.pid).kvm_files() if file.is_stats] == ["vm", "vcpu"]
            if os.getuid():
                with pytest.raises(ProcessLookupError):  # of the first thread
                    Process(vmm.pid).thread_syscall(vmm.pid)
                with pytest.raises(PermissionError):  # of one that lives, and is another's
                    Process(1).thread_syscall(1)

        assert until(lambda: b"Z" in Path(f"/proc/{vmm.pid}/stat").read_bytes().rpartition(b")")[2])
        look()
        assert exit_status(forked(look, NOBODY)) == 0


def test_files_are_seen_through_another_thread_when_one_ends(monkeypatch):
    """That through which they were looked at: while any lives, the process has not ended."""
    links, seen = Process._links, []

    def be_gone(process):
        seen.append(process.tid)
        if len(seen) == 1:
            process._tid = 1 << 22  # no thread has this number
            raise FileNotFoundError(errno.ENOENT, "gone")
        return links(process)

    monkeypatch.setattr(Process, "_links", be_gone)
    assert Process(os.getpid()).kvm_files() == []
    assert len(seen) == 2
