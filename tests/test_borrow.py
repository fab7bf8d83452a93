"""Stats files of another process, and why they cannot be had."""

import errno
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, NOBODY, exit_status, forked, names_thread, open_fds
from holder import Holder

import kvmstats_fast as kf
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.testing import SyntheticStats, exit_counter
from kvmstats_fast.vmm import borrow as borrow_module
from kvmstats_fast.vmm import proc as proc_module
from kvmstats_fast.vmm import refusal as permission
from kvmstats_fast.vmm.refusal import Facts, explain, explain_refusal


def borrow(pid):
    """Borrow all stats files of a process."""
    with borrow_module.hold_process(pid) as process:
        return borrow_module.borrow(process, borrow_module.list_files(process))


#: The same, for a child.
BORROW = "from kvmstats_fast.vmm import borrow as borrow_module\n" + inspect.getsource(borrow)


@contextmanager
def borrowed(pid):
    with ExitStack() as stack:
        yield [stack.enter_context(file) for file in borrow(pid)]


@pytest.mark.real_vm
def test_borrowed_files_give_the_values_of_the_vm_as_it_runs():
    """VM first, then vCPUs; each exit that the other process makes is seen, and close-on-exec is set."""
    counter = exit_counter()
    with Holder() as other, borrowed(other.pid) as files:
        assert [(file.kind, file.vcpu_id) for file in files] == [("vm", None), ("vcpu", 0), ("vcpu", 1)]
        assert names_thread(files[0].id, other.pid)
        assert not any(os.get_inheritable(file.fileno()) for file in files)
        before = [file.snapshot()[counter] for file in files[1:]]
        other.do("guest.run(500, vcpu=1)")
        after = [file.snapshot()[counter] for file in files[1:]]
        assert after[0] == before[0]
        assert after[1] >= before[1] + 500
        other.end()
        assert files[2].snapshot()[counter] == after[1]


@pytest.mark.real_vm
def test_files_of_vms_come_before_those_of_vcpus_in_whatever_order_they_were_opened():
    """Of the process, the last vCPU's was the first."""
    backwards = "files = [stats_of(fd) for fd in (*reversed(guest.vcpu_fds), guest.vm_fd)]"
    with Holder(3, hold="vcpus", before=backwards) as other, borrowed(other.pid) as files:
        assert other.fds == sorted(other.fds)
        assert [(file.kind, file.vcpu_id) for file in files] == [("vm", None), ("vcpu", 0), ("vcpu", 1), ("vcpu", 2)]


@pytest.mark.real_vm
def test_duplicates_of_a_file_are_borrowed_once():
    """A dup, and a file that was opened a second time for the same vCPU; also while the vCPU ran in between."""
    with Holder(before="os.dup(files[1].fileno()); again = guest.open_stats()") as other:
        for _ in range(2):
            with borrowed(other.pid) as files:
                assert [file.vcpu_id for file in files] == [None, 0, 1]
            other.do("guest.run(100)")


@pytest.mark.real_vm
def test_vms_of_one_process_are_not_taken_for_one_another():
    """Two VMs have the same ids; their files are all borrowed, but for real duplicates."""
    with Holder(before="second = TinyGuest(2); more = second.open_stats(); os.dup(more[0].fileno())") as other:
        with borrowed(other.pid) as files:
            assert [file.vcpu_id for file in files] == [None, None, 0, 0, 1, 1]
            assert files[0].id == files[1].id
        other.do("more[0].close(), second.close(), guest.run(10)")
        # The second VM is gone, but for its vCPUs' files, which were never run: out of step with those of the first.
        with borrowed(other.pid) as files:
            assert [file.vcpu_id for file in files if file.vcpu_id == 0] == [0, 0]


@pytest.mark.real_vm
def test_a_process_without_stats_files_gives_none():
    """Nothing to borrow is no error: a VM whose stats files nobody opened, and a process with no VM."""
    with Holder(before="for file in files: file.close()\nfiles = []") as other:
        assert borrow(other.pid) == []
    assert borrow(os.getpid()) == []


@pytest.mark.real_vm
def test_one_s_own_files_can_be_borrowed_too(guest, stats):
    """The process may be this one."""
    guest.run(3)
    with borrowed(os.getpid()) as files:
        for file, own in zip(files, stats, strict=True):
            assert np.array_equal(file.read(), own.read())


def test_a_process_that_is_not_there_is_gone(monkeypatch):
    """No such pid, and one that ended between the pidfd and /proc; none of the two leaves an fd behind."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    fds = open_fds()
    with pytest.raises(kf.VmGoneError, match=f"pidfd_open of process {ended.pid}: .*has ended") as caught:
        borrow(ended.pid)
    assert caught.value.errno == errno.ESRCH
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    listdir = os.listdir

    def ends_first(path):
        process.communicate()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", ends_first)
    with pytest.raises(kf.VmGoneError, match=f"process {process.pid} has ended"):
        borrow(process.pid)
    monkeypatch.undo()
    assert open_fds() == fds


def test_a_process_that_is_about_to_end_has_ended(monkeypatch):
    """/proc says so of its threads before its pidfd does."""

    def none_lives(process):
        raise ProcessLookupError(errno.ESRCH, "no thread lives", process.folder)

    monkeypatch.setattr(proc_module.Process, "kvm_files", none_lives)
    with pytest.raises(kf.VmGoneError, match=f"process {os.getpid()} has ended"):
        borrow(os.getpid())


@pytest.mark.real_vm
@pytest.mark.parametrize("before", ["", "for file in files: file.close()\nfiles = []"], ids=["a VMM", "no VMM"])
def test_a_pid_that_became_another_process_is_not_taken_for_it(monkeypatch, before):
    """What /proc shows of a pid that was handed out anew is not used: the first process is known to have ended."""
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Holder(before=before) as other:
        look = proc_module.Process.kvm_files

        def handed_out_anew(process):
            gone.communicate()
            process.pid = process._tid = other.pid
            files = look(process)
            process.pid = gone.pid
            return files

        monkeypatch.setattr(proc_module.Process, "kvm_files", handed_out_anew)
        with pytest.raises(kf.VmGoneError, match=f"process {gone.pid} has ended"):
            borrow(gone.pid)


@pytest.mark.real_vm
def test_a_process_that_ends_while_it_is_borrowed_from_is_gone(monkeypatch):
    """The end is noticed at the first fd that cannot be taken, and what was taken already is closed."""
    with Holder() as other:
        take = borrow_module._take
        taken = []

        def ends_after_the_first(process, file):
            if taken:
                other.end()
            taken.append(file)
            return take(process, file)

        monkeypatch.setattr(borrow_module, "_take", ends_after_the_first)
        fds = open_fds() - 2  # the pipes to it
        with pytest.raises(kf.VmGoneError, match="has ended"):
            borrow(other.pid)
        assert open_fds() == fds


@pytest.mark.real_vm
@pytest.mark.parametrize("then", ["", "; os.dup2(0, {fd})"], ids=["closed", "another file by now"])
def test_an_fd_that_is_closed_meanwhile_is_left_out(monkeypatch, then):
    """The other files are had, and a file that took its number is not touched."""
    with Holder() as other:
        look = proc_module.Process.kvm_files
        fd = other.fds[1]

        def closes_then(process):
            found = look(process)
            other.do(f"os.close({fd})" + then.format(fd=fd))
            return found

        monkeypatch.setattr(proc_module.Process, "kvm_files", closes_then)
        with borrowed(other.pid) as files:
            assert [file.vcpu_id for file in files] == [None, 1]


def test_a_thread_and_no_pid_are_refused():
    """A pidfd is of a process: the id of a thread is refused with the way to the right one, and so are others."""
    end = threading.Event()
    tids = []
    thread = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), end.wait()))
    thread.start()
    try:
        while not tids:
            time.sleep(0.001)
        with pytest.raises(kf.AttachError, match=f"{tids[0]} is a thread: pass the pid of its process"):
            borrow(tids[0])
    finally:
        end.set()
        thread.join()
    for pid in (0, -1, 2**31, 2**70):
        with pytest.raises(ValueError, match=f"{pid} is not a pid"):
            borrow(pid)


@pytest.mark.parametrize("pid", [None, 1.5, True, [1], b"1"], ids=repr)
@pytest.mark.parametrize("options", [{}, {"inject": True}], ids=repr)
def test_what_is_no_number_is_not_a_pid(pid, options):
    """A fraction or a truth value gets a sentence that says what to pass."""
    with pytest.raises(TypeError, match=rf"^{re.escape(repr(pid))} is not a pid: pass the number .* find_vms"):
        kf.attach(pid, **options)


def test_the_core_tells_what_the_kernel_says():
    """-errno for a pidfd that is none, an fd that is not open, and duplicates and files opened apart told apart."""
    assert lib.kvmstats_getfd(-1, 0) == -errno.EBADF
    with open(os.devnull) as one, open(os.devnull) as two:  # noqa: PTH123
        pidfd = os.pidfd_open(os.getpid())
        assert lib.kvmstats_getfd(pidfd, 999) == -errno.EBADF
        copy = lib.kvmstats_getfd(pidfd, one.fileno())
        assert not os.get_inheritable(copy)
        same = lib.kvmstats_same_file(os.getpid(), one.fileno(), os.getpid(), copy)
        apart = lib.kvmstats_same_file(os.getpid(), one.fileno(), os.getpid(), two.fileno())
        os.close(copy), os.close(pidfd)
    if same == -errno.ENOSYS:
        pytest.skip("this kernel has no kcmp")
    assert (same, apart) == (1, 0)
    assert lib.kvmstats_same_file(os.getpid(), 998, os.getpid(), 999) == -errno.EBADF


# ---- refusals: the table


ME = {"my_ids": (1000, 100), "ids": (1000, 1000, 1000, 100, 100, 100)}


@pytest.mark.parametrize(
    ("facts", "reason", "first", "last"),
    [
        ({"errno": errno.ENOSYS}, "came with Linux 5.6", "SCM_RIGHTS", "newer kernel"),
        ({"errno": errno.ENOTSUP}, "the first thread of process 7 has ended", "SCM_RIGHTS", "newer kernel"),
        ({"errno": errno.EMFILE}, "this process has as many files", "ulimit -n", "ulimit -n"),
        ({"errno": errno.ENFILE}, "the machine has as many files", "fs.file-max", "fs.file-max"),
        ({"errno": errno.ESRCH, "visible": False}, "has ended, or cannot be seen", "NSpid", "nsenter"),
        ({"errno": errno.ENOENT, "visible": False}, "another pid namespace", "NSpid", "nsenter"),
        ({"visible": False}, "hidepid, which hides", "the VMM's user", "CAP_SYS_PTRACE"),
        ({"errno": errno.EIO}, "the kernel says: Input/output error", "SCM_RIGHTS", "SCM_RIGHTS"),
        ({"ids": (5, 5, 5, 6, 6, 6)}, "as uid 5 and gid 6, this one as uid 1000 and gid 100", "--reuid 5", "as root"),
        ({"ids": (1000, 1000, 1000, 6, 6, 6)}, "uid 1000 and gid 6", "--regid 6", "as root"),
        ({"ids": (1000, 0, 0, 100, 100, 100)}, "other real or saved ids", "SCM_RIGHTS", "as root"),
        ({"ids": (1000, 1000, 0, 100, 100, 100)}, "other real or saved ids", "SCM_RIGHTS", "as root"),
        ({"ids": (5, 5, 5, 6, 6, 6), "yama": 1, "dumpable": False}, "as uid 5", "--reuid 5", "as root"),
        ({"dumpable": False, "yama": 1}, "PR_SET_DUMPABLE", "SCM_RIGHTS", "as root"),
        ({"yama": 3}, "ptrace_scope is 3: nobody", "SCM_RIGHTS", "next boot"),
        ({"yama": 3, "capable": True}, "ptrace_scope is 3: nobody", "SCM_RIGHTS", "next boot"),
        (
            {"yama": 2, "descendant": True},
            "ptrace_scope is 2: only a process with CAP_SYS_PTRACE",
            "SCM_RIGHTS",
            "ptrace_scope=1",
        ),
        ({"yama": 1}, "process 7 is not one of this process' children", "kvmstats run", "ptrace_scope=0"),
        (
            {"yama": 1, "descendant": True, "more_capable": True},
            "capabilities that this process lacks",
            "run the VMM",
            "root",
        ),
        ({"more_capable": True}, "capabilities that this process lacks", "run the VMM without", "as root"),
        (
            {"errno": errno.EACCES, "capable": True, "ids": (5, 5, 5, 6, 6, 6)},
            "/proc/7/fd belongs to another user",
            "SCM_RIGHTS",
            "as root",
        ),
        ({"errno": errno.EACCES, "capable": True, "dumpable": False}, "does not open it", "SCM_RIGHTS", "as root"),
        (
            {"errno": errno.EACCES, "capable": True, "reads_all": True, "dumpable": False},
            "probably a security module",
            "SCM_RIGHTS",
            "policy",
        ),
        ({"capable": True, "other_user_namespace": True}, "another user namespace", "the VMM's user", "SCM_RIGHTS"),
        ({"capable": True, "filtered": True}, "a seccomp filter of this process", "SCM_RIGHTS", "policy"),
        ({"capable": True, "ids": (5, 5, 5, 6, 6, 6)}, "a security module", "SCM_RIGHTS", "policy"),
        ({"yama": 0}, "probably a security module", "SCM_RIGHTS", "policy"),
        ({"errno": errno.EACCES, "ids": (5, 5, 5, 6, 6, 6)}, "as uid 5 and gid 6", "--reuid 5", "as root"),
        ({"ids": ()}, "probably a security module", "SCM_RIGHTS", "policy"),
    ],
)
def test_each_refusal_has_its_reason_and_the_least_remedy_first(facts, reason, first, last):
    """The table: from the facts to what stops it, in the kernel's order, and what helps."""
    text = explain(Facts(**({"pid": 7, "errno": errno.EPERM} | ME | facts)))
    said, _, remedies = text.partition(". What helps")
    assert reason in said
    assert "\n" not in text
    numbered = remedies.split("(1) ")
    assert first in (numbered[1].partition("; (2) ")[0] if len(numbered) == 2 else remedies)
    assert last in remedies.rpartition(") ")[2] or last in remedies.rpartition("; (")[2]


def test_every_row_of_the_table_is_reached():
    """Each row is the answer to some facts: none stands behind a row that takes all of its cases."""
    values = {
        "errno": [errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EMFILE, errno.ENFILE, errno.ESRCH],
        "visible": [True, False],
        "ids": [ME["ids"], (5, 5, 5, 6, 6, 6), (1000, 0, 0, 100, 100, 100)],
        "capable": [False, True],
        "more_capable": [False, True],
        "dumpable": [True, False],
        "yama": [None, 1, 2, 3],
        "other_user_namespace": [False, True],
        "filtered": [False, True],
    }
    reached = set()
    for choice in product(*values.values()):
        facts = Facts(7, my_ids=ME["my_ids"], **dict(zip(values, choice, strict=True)))
        reached.add(next(row for row in permission._TABLE if row.applies(facts)))
    assert reached == set(permission._TABLE)


# ---- refusals: the kernel's own


def as_other(code, *arguments, uid=NOBODY, gid=NOBODY):
    """Run Python code in a child that has become another user; what it printed."""
    become = (
        "import os, sys\nimport kvmstats_fast as kf\n"
        + BORROW
        + "from kvmstats_fast.vmm import refusal as permission\nfrom kvmstats_fast.stats_file import StatsFile\n"
        f"os.setgroups([]); os.setresgid({gid}, {gid}, {gid}); os.setresuid({uid}, {uid}, {uid})\n"
    )
    command = [sys.executable, "-c", become + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def refusal_to_other(pid, **options):
    """The message that another user gets who would borrow from a process."""
    code = "try: borrow(int(sys.argv[1]))\nexcept kf.AttachError as error: print(error.errno, error.strerror)"
    number, _, text = as_other(code, pid, **options).partition(" ")
    assert int(number) in (errno.EPERM, errno.EACCES)
    return text


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a test")


@pytest.fixture
def sleeper(resources):
    """sleeper(code): a process that ran the code and waits."""

    def sleeper(code):
        command = [sys.executable, "-c", f"import ctypes, os\n{code}\nprint(flush=True)\ninput()"]
        process = resources.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        resources.callback(process.kill)
        process.stdout.readline()
        return process

    return sleeper


@needs_root
def test_another_user_is_told_whose_process_it_is(sleeper):
    """A process of root, asked for by nobody, and one of nobody with another group."""
    text = refusal_to_other(sleeper("").pid)
    assert f"as uid 0 and gid 0, this one as uid {NOBODY} and gid {NOBODY}" in text
    assert "(1) run this as its user (`setpriv --reuid 0 --regid 0" in text
    code = f"os.setgroups([]); os.setresgid(7, 7, 7); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
    assert "gid 7, this one" in refusal_to_other(sleeper(code).pid)


@needs_root
def test_a_guarded_process_is_told_from_one_of_another_user(sleeper):
    """The same user, but the process is not dumpable, as all that change their user are."""
    become = f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
    assert "the kernel guards process" in refusal_to_other(sleeper(become).pid)
    undo = "\nctypes.CDLL(None).prctl(4, 1, 0, 0, 0)"  # PR_SET_DUMPABLE
    code = "print(borrow(int(sys.argv[1])))"
    assert as_other(code, sleeper(become + undo).pid) == "[]\n"


@needs_root
def test_more_capabilities_are_told(sleeper):
    """The same user, but the process kept a capability."""
    code = (
        "libc = ctypes.CDLL(None)\n"
        "assert libc.prctl(8, 1, 0, 0, 0) == 0\n"  # PR_SET_KEEPCAPS
        f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        "assert libc.prctl(4, 1, 0, 0, 0) == 0"
    )
    process = sleeper(code)
    facts = as_other("print(permission.facts_of(int(sys.argv[1]), 1).more_capable)", process.pid)
    assert facts == "True\n"
    assert "has capabilities that this process lacks" in refusal_to_other(process.pid)


@needs_root
def test_a_process_without_the_capability_that_root_has_is_told(sleeper):
    """Root in a container without CAP_SYS_PTRACE meets a process of another user."""
    process = sleeper(f"os.setgroups([]); os.setresgid(7, 7, 7); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})")
    code = "import sys, kvmstats_fast as kf\n" + BORROW
    code += "try: borrow(int(sys.argv[1]))\nexcept kf.AttachError as error: print(error.strerror)"
    drop = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    command = [*drop, sys.executable, "-c", code, str(process.pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"as uid {NOBODY} and gid 7, this one as uid 0 and gid 0" in done.stdout


@needs_root
@pytest.mark.parametrize("guarded", [False, True])
def test_the_capabilities_that_are_advised_are_enough(sleeper, guarded):
    """For the process of another user, and a guarded one of the same; CAP_SYS_PTRACE alone is told apart."""
    become = f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
    pid = sleeper(become if guarded else "").pid
    advised = re.escape("--ambient-caps +sys_ptrace,+dac_read_search`")

    def without():
        with pytest.raises(kf.AttachError, match=advised):
            borrow(pid)

    def traces():
        with pytest.raises(
            kf.AttachError, match=f"CAP_SYS_PTRACE, which this process has, does not open it.*{advised}"
        ):
            borrow(pid)

    def traces_and_reads():
        assert borrow(pid) == []

    assert exit_status(forked(without, NOBODY)) == 0
    assert exit_status(forked(traces, NOBODY, CAP_SYS_PTRACE)) == 0
    assert exit_status(forked(traces_and_reads, NOBODY, CAP_SYS_PTRACE | CAP_DAC_READ_SEARCH)) == 0


def test_facts_are_what_the_system_says(sleeper):
    """Ids, capabilities, descent and dumpability of a child of this process, and of one that is none."""
    child = sleeper("")
    facts = permission.facts_of(child.pid, errno.EPERM)
    assert facts.ids == (*os.getresuid(), *os.getresgid())
    assert facts.my_ids == (os.getuid(), os.getgid())
    assert (facts.visible, facts.descendant, facts.more_capable, facts.other_user_namespace) == (
        True,
        True,
        False,
        False,
    )
    assert not permission.facts_of(os.getppid(), errno.EPERM).descendant
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not permission.facts_of(child.pid, errno.ESRCH).visible


def test_yama_is_read_where_there_is_one(monkeypatch, tmp_path):
    """The sysctl's number; None where the kernel has none, or it cannot be read."""
    monkeypatch.setattr(permission, "_YAMA", tmp_path / "ptrace_scope")
    assert permission._yama() is None
    (tmp_path / "ptrace_scope").write_text("2\n")
    assert permission._yama() == 2
    assert permission.facts_of(os.getpid(), errno.EPERM).yama == 2
    if os.geteuid() == 0 and permission.facts_of(1, errno.EPERM).capable:
        (tmp_path / "ptrace_scope").write_text("3\n")
        assert "ptrace_scope is 3" in explain_refusal(1, errno.EPERM)


def unshared(*options, command, env=None):
    """Run a command in namespaces of its own; what it prints."""
    probe = subprocess.run(["unshare", *options, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no such namespace can be made here: {probe.stderr.strip()}")
    done = subprocess.run(["unshare", *options, *command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_root
def test_a_process_in_another_pid_namespace_is_not_visible():
    """A child that is first in a pid namespace of its own does not see the pids of this one."""
    code = (
        "import sys, kvmstats_fast as kf\n"
        + BORROW
        + "try: borrow(int(sys.argv[1]))\nexcept kf.VmGoneError as error: print(error.strerror)"
    )
    command = [sys.executable, "-c", code, str(os.getpid())]
    assert "in another pid namespace" in unshared("--pid", "--fork", "--mount-proc", command=command)


#: In a pid namespace of its own, because all mounts of /proc in one may share their options.
HIDING = """
import subprocess, sys
import kvmstats_fast as kf
from helpers import NOBODY, exit_status, forked
from holder import Holder
def attach():
    try: kf.attach(vmm.pid)
    except kf.AttachError as error: print(type(error).__name__, error.strerror, flush=True)
with Holder() as vmm:
    kf.attach(vmm.pid).close()  # imports what that user may not
    subprocess.run(["mount", "-o", f"remount,hidepid={sys.argv[1]}", "/proc"], check=True)
    sys.exit(exit_status(forked(attach, uid=NOBODY)))
"""


@needs_root
@pytest.mark.real_vm
@pytest.mark.parametrize("hidepid", ["1", "2"])
def test_a_vmm_that_proc_hides_is_not_taken_for_one_that_ended(hidepid):
    """It runs on; the error says that other users cannot see it, and what helps."""
    command = [sys.executable, "-c", HIDING, hidepid]
    tests = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    said = unshared("--mount", "--pid", "--fork", "--mount-proc", command=command, env=tests)
    assert said.startswith("AttachError ")
    assert "hidepid, which hides the processes of other users" in said


@needs_root
def test_where_there_is_no_proc_it_is_said():
    """It is not taken for that of another pid namespace."""
    code = "import kvmstats_fast as kf\ntry: kf.attach(1)\nexcept kf.AttachError as error: print(error.strerror)"
    mount = ["sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", sys.executable, "-c", code]
    assert "there is no proc file system at /proc" in unshared("--mount", command=mount)


@needs_root
@pytest.mark.parametrize("inject", [False, True])
def test_a_proc_of_another_pid_namespace_is_not_believed(inject):
    """Its process 2 is not the kernel's: what was seen of the one would be done to the other."""
    code = (
        "import subprocess, kvmstats_fast as kf\nprocess = subprocess.Popen(['sleep', '60'])\n"
        f"try: kf.attach(process.pid, inject={inject})\nexcept kf.AttachError as error: print(error.strerror)\n"
        "finally: process.kill()"
    )
    command = [sys.executable, "-c", code]
    assert "/proc belongs to another pid namespace" in unshared("--pid", "--fork", command=command)


@needs_root
def test_root_of_a_user_namespace_is_told_that_its_capabilities_do_not_count():
    """As in a container without root that sees the host's processes: it has all capabilities, and may do nothing."""
    code = (
        "import sys, kvmstats_fast as kf\n"
        + BORROW
        + "try: borrow(int(sys.argv[1]))\nexcept kf.AttachError as error: print(error.strerror)"
    )
    command = [sys.executable, "-c", code, str(os.getpid())]
    said = unshared("--user", "--map-root-user", command=command)
    assert "in another user namespace" in said


@pytest.mark.real_vm
@needs_root
def test_another_user_may_be_given_what_it_may_not_take(guest, stats):
    """The remedy that needs no permission works: a stats file that is passed on is read by nobody."""
    guest.run(5)
    fd = os.dup(stats[1].fileno())
    os.set_inheritable(fd, True)
    code = "import os, sys\nfrom kvmstats_fast import StatsFile\nos.setresuid(65534, 65534, 65534)\n"
    code += f"print(StatsFile(int(sys.argv[1])).snapshot()['{exit_counter()}'])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(fd)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, pass_fds=[fd])
    os.close(fd)
    assert int(done.stdout) == stats[1].snapshot()[exit_counter()]


def test_files_of_other_statistics_are_not_one(resources):
    """Where the kernel cannot tell files apart, and their ids are the same: nor are those that count apart."""
    made = [resources.enter_context(SyntheticStats(kind=kind)) for kind in ("vm", "vcpu", "vcpu")]
    vm, one, other = (resources.enter_context(file.open()) for file in made)
    assert borrow_module._is_in_step(one, other)
    assert not borrow_module._is_in_step(one, vm)
    made[2].add("exits", 5)
    assert not borrow_module._is_in_step(one, other)
