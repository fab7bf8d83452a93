"""Which processes have VMs: made-up proc trees, real VMMs, and what other users see."""

import csv
import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import CAP_SYS_PTRACE, NOBODY, exit_status, forked, open_fds
from qemu import HOLDS_VCPUS, QEMU, needs_qemu

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast._kvmstats import lib
from kvmstats_fast.cli import list as list_
from kvmstats_fast.testing import TinyGuest
from kvmstats_fast.vmm import find
from kvmstats_fast.vmm.find import HeldFile, may_attach, scan


class Proc:
    """A made-up proc tree."""

    def __init__(self, root):
        self.root = root

    def add(self, pid, arguments, links, *, exe=None, comm=None, uid=1000, start_time=4711, flags=0):
        """Add a process; `links` are what its fds are, from 0 on."""
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        for fd, link in enumerate(links):
            (folder / "fd" / str(fd)).symlink_to(link)
        words = [word if isinstance(word, bytes) else word.encode() for word in arguments]
        (folder / "cmdline").write_bytes(b"".join(word + b"\0" for word in words))
        program = os.fsdecode(words[0]) if words else "nothing"
        if exe is not False:
            (folder / "exe").symlink_to(exe or program)
        comm = comm or program.rpartition("/")[2][:15]
        (folder / "comm").write_bytes(comm.encode() + b"\n")
        (folder / "stat").write_text(f"{pid} ({comm}) S 1 7 7 7 7 {flags} " + "7 " * 12 + f"{start_time} 99 98\n")
        (folder / "status").write_text(f"Name:\t{comm}\nUid:\t{uid}\t0\t0\t0\nGid:\t5\t5\t5\t5\n")
        return folder


@pytest.fixture
def proc():
    """An empty one, which every user can read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Proc(Path(folder))


def vm_links(vcpus, *extra, form="anon_inode:{}"):
    """What the fds of a VMM are."""
    names = ["kvm-vm", *(f"kvm-vcpu:{i}" for i in range(vcpus)), *extra]
    return ["/dev/null", "socket:[123]", "/dev/kvm", *(form.format(name) for name in names), "anon_inode:[eventfd]"]


# ---- made-up trees


@pytest.mark.parametrize(
    ("arguments", "vmm", "name"),
    [
        (["qemu-system-x86_64", "-accel", "kvm", "-name", "guest=x"], "qemu-system-x86_64", "x"),
        (["/usr/bin/qemu-system-aarch64", "-name", "plain"], "qemu-system-aarch64", "plain"),
        (["qemu-system-x86_64", "--name", "plain,process=p,debug-threads=on"], "qemu-system-x86_64", "plain"),
        (["/usr/libexec/qemu-kvm", "-name", "guest=db,,1=2,debug-threads=on", "-S"], "qemu-kvm", "db,1=2"),
        (["/usr/bin/kvm", "-id", "100", "-name", "a,,,debug-threads=on"], "kvm", "a,"),
        (["/usr/bin/kvm", "-name", "a,,b=c"], "kvm", "a,b=c"),
        (["qemu-kvm", "-name", "debug-threads=on,guest=later"], "qemu-kvm", "later"),
        (
            ["qemu-kvm", "-name", "first", "-m", "1G", "-name", "debug-threads=on", "-name", "guest=last"],
            "qemu-kvm",
            "last",
        ),
        (["qemu-kvm", "-name", "process=only"], "qemu-kvm", ""),
        (["qemu-kvm", "-name"], "qemu-kvm", ""),
        (["qemu-kvm", "-name", ""], "qemu-kvm", ""),
        (["qemu-kvm", "-m", "1G"], "qemu-kvm", ""),
        (["/firecracker", "--id", "551e7604-e35c", "--api-sock", "/run/fc"], "firecracker", "551e7604-e35c"),
        (["./firecracker-v1.7.0-x86_64", "--api-sock", "s", "--", "--id", "no"], "firecracker-v1.7.0-x86_64", ""),
        (["firecracker", "--id"], "firecracker", ""),
        (["cloud-hypervisor", "--api-socket", "/run/ch.sock", "--cpus", "boot=4"], "cloud-hypervisor", ""),
        (["crosvm", "run", "--cpus", "2", "--name", "arc", "vmlinux"], "crosvm", "arc"),
        (["/usr/bin/crosvm", "--log-level=debug", "run", "--name=termina", "vmlinux"], "crosvm", "termina"),
        (["lkvm", "run", "--name", "g", "-n", "mode=user", "-k", "bzImage"], "lkvm", "g"),
        (["/opt/lkvm-static", "run", "-n", "mode=none"], "lkvm-static", ""),
        (["/usr/bin/python3", "-m", "vmm", "--name", "x", "--id", "y", "-name", "z"], "python3", ""),
        (["/usr/bin/stratovirt", "-machine", "microvm", "-name", "sv"], "stratovirt", "sv"),
        (["/nix/store/x/bin/.qemu-system-x86_64-wrapped", "-name", "n"], "qemu-system-x86_64", "n"),
        (["/nix/store/x/bin/.qemu-system-x86-wrapped", "-name", "guest=n"], "qemu-system-x86", "n"),
        (["/nix/store/x/bin/.qemu-kvm-wrapped_", "-name", "n"], "qemu-kvm", "n"),
        (["/nix/store/x/bin/.cloud-hypervisor-wrapped"], "cloud-hypervisor", ""),
        (["/opt/.hidden", "-name", "n"], ".hidden", ""),
        (["/opt/.helper-wrapped", "-name", "n"], "helper", ""),
        (["/lib64/ld-linux-x86-64.so.2", "/opt/q/qemu-system-x86_64", "-name", "l"], "qemu-system-x86_64", "l"),
        (
            [
                "/lib64/ld-linux-x86-64.so.2",
                "--library-path",
                "/opt/lib",
                "--inhibit-cache",
                "firecracker",
                "--id",
                "f",
            ],
            "firecracker",
            "f",
        ),
        (["/lib/ld-musl-x86_64.so.1", "--argv0", "x", "--", "/bin/lkvm", "run", "--name", "m"], "lkvm", "m"),
        (["/lib/ld-linux-aarch64.so.1", "--preload=a.so", "/usr/bin/qemu-kvm", "-name", "a"], "qemu-kvm", "a"),
        (["/lib64/ld-linux-x86-64.so.2", "--version"], "ld-linux-x86-64.so.2", ""),
    ],
)
def test_vmms_and_the_names_of_their_guests(proc, arguments, vmm, name):
    """Each VMM's way to name a guest is understood; where there is none, the name is empty, not guessed."""
    proc.add(42, arguments, vm_links(2))
    (process,) = kf.find_vms(proc.root)
    assert (process.pid, process.vmm, process.name) == (42, vmm, name)
    assert (process.vms, process.vcpus, process.held) == (1, (0, 1), ())
    assert (process.uid, process.start_time) == (1000, 4711)


def test_qemu_of_libvirt(proc):
    """A whole command line of libvirt's, with brackets around the links, as some kernels print them."""
    line = (
        "/usr/bin/qemu-system-x86_64 -name guest=web-1,debug-threads=on -S -object "
        '{"qom-type":"secret","id":"masterKey0"} -machine pc-q35-6.2,usb=off -accel kvm -cpu host -smp 4,sockets=4 '
        "-uuid ed9c6740-db2a-4554-9f7f-7730782bfd7d -no-user-config -sandbox on -msg timestamp=on"
    )
    proc.add(9, line.split(), vm_links(4, form="anon_inode:[{}]"), uid=64055, comm="qemu-system-x86")
    (process,) = kf.find_vms(str(proc.root))
    assert (process.vmm, process.name, process.uid, process.vcpus) == (
        "qemu-system-x86_64",
        "web-1",
        64055,
        (0, 1, 2, 3),
    )


def test_stats_files_that_are_held_are_listed_with_their_fds(proc):
    """Kind, vCPU and fd number of each, in the order of the fds."""
    proc.add(7, ["firecracker"], vm_links(1, "kvm-vcpu-stats:0", "kvm-vm-stats", "kvm-vcpu-stats:0"))
    (one,) = kf.find_vms(proc.root)
    assert one.held == (HeldFile("vcpu", 0, 5), HeldFile("vm", None, 6), HeldFile("vcpu", 0, 7))


@pytest.mark.parametrize("own", ["anon_inode:kvm-vm", "anon_inode:[kvm-vcpu:12]"])
def test_a_process_with_stats_files_alone_is_a_borrower(proc, own):
    """A monitor is not listed; a VMM that has closed its VM's fd, or has no vCPU yet, is."""
    held = ["anon_inode:kvm-vcpu-stats:12", "anon_inode:[kvm-vm-stats]"]
    proc.add(8, ["monitor"], held)
    assert kf.find_vms(proc.root) == []
    proc.add(9, ["vmm"], [*held, own])
    (two,) = kf.find_vms(proc.root)
    assert (two.pid, two.held) == (9, (HeldFile("vcpu", 12, 0), HeldFile("vm", None, 1)))


def test_many_vcpus_are_in_the_order_of_their_ids(proc):
    """More than a thousand, whose fds are in no order."""
    proc.add(5, ["qemu-kvm"], vm_links(0, *(f"kvm-vcpu:{i}" for i in reversed(range(1500)))))
    assert kf.find_vms(proc.root)[0].vcpus == tuple(range(1500))


@pytest.mark.parametrize(
    "link",
    [
        "anon_inode:[eventfd]",
        "anon_inode:kvm-vfio",
        "anon_inode:kvm-vmx",
        "anon_inode:kvm-vcpu:x",
        "/tmp/anon_inode:kvm-vm",
        "anon_inode:kvm-vcpu:1/x",
        "/dev/kvm",
    ],
)
def test_other_files_are_not_taken_for_kvms(proc, link):
    """A name that only resembles one of KVM's makes no VMM."""
    proc.add(5, ["qemu-kvm", "-name", "x"], [link])
    assert kf.find_vms(proc.root) == []


def test_what_is_odd_about_a_process_does_no_harm(proc):
    """No text, a huge command line, an odd comm, a replaced program, an ending process, entries of other kinds."""
    proc.add(1, [b"/opt/\xff\xfe/qemu-kvm", "-name", b"guest=\xc3\x28\x1b[31m"], vm_links(1), exe="/x/qemu-kvm")
    proc.add(2, ["qemu-kvm", "-name", "n" * 3_000_000], vm_links(1))
    proc.add(3, ["qemu-kvm"], vm_links(1), comm="a) R 1 (b c", start_time=99)
    proc.add(4, ["/usr/bin/qemu-system-x86_64"], vm_links(1), exe="/usr/bin/qemu-system-x86_64 (deleted)")
    proc.add(5, [], [], comm="qemu-kvm")
    proc.add(6, [], vm_links(1), exe=False, comm="qemu-system-x86")
    (proc.root / "7").write_text("a file")
    (proc.root / "8").mkdir()
    shutil.rmtree(proc.add(9, ["qemu-kvm"], vm_links(1)) / "fd")
    (proc.add(10, ["qemu-kvm"], vm_links(1)) / "stat").unlink()
    for name in ("sys", "self.x", "٣", "-1", "0x1"):
        (proc.root / name).mkdir()
    found = {process.pid: process for process in kf.find_vms(proc.root)}
    assert list(found) == [1, 2, 3, 4, 6]
    assert found[1].name == "\\xc3(\x1b[31m"
    assert len(found[2].name) == 3_000_000
    assert found[3].start_time == 99
    assert found[4].vmm == "qemu-system-x86_64"
    assert (found[6].vmm, found[6].vcpus) == ("qemu-system-x86", (0,))


def test_a_tree_that_is_not_ours_is_not_asked_for_permission(proc):
    """In a container's view of the host, or a copy, a pid means another process than it does to our system calls."""
    proc.add(os.getpid(), ["qemu-kvm"], vm_links(1))
    (process,) = kf.find_vms(proc.root)
    assert not process.attachable
    assert process.why_not == f"{proc.root}/{os.getpid()} is not of this process' pid namespace"


def test_a_root_that_cannot_be_read_is_an_error(proc):
    """No proc file system there is not the same as no VM."""
    with pytest.raises(FileNotFoundError):
        kf.find_vms(proc.root / "absent")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_whose_files_may_not_be_seen_is_listed_if_its_name_is_a_vmms(proc):
    """Its vCPUs are None, the reason is given, and processes without a name that says anything are counted."""
    hidden = [
        proc.add(1, ["/usr/bin/qemu-system-x86_64", "-name", "guest=hers"], vm_links(2)),
        proc.add(2, ["renamed"], vm_links(2), comm="cloud-hyperviso"),
        proc.add(3, ["/usr/bin/python3", "-m", "vmm"], vm_links(2)),
        proc.add(4, ["/usr/bin/qemu-img", "convert"], []),
        proc.add(5, [], [], comm="kworker/0:1"),
        proc.add(6, [], [], comm="qemu-system-x86"),
        proc.add(7, ["firecracker"], vm_links(2)),
        proc.add(8, ["/lib64/ld-linux-x86-64.so.2", "/opt/qemu-kvm", "-name", "linked"], vm_links(2)),
        proc.add(9, ["/nix/store/x/.crosvm-wrapped", "--name=nix"], vm_links(2), comm=".crosvm-wrapped"),
    ]
    for folder in hidden:
        (folder / "fd").chmod(0o700)
    (proc.root / "7" / "cmdline").chmod(0)

    def work():
        found, unseen = scan(proc.root)
        assert [(process.pid, process.vmm, process.name) for process in found] == [
            (1, "qemu-system-x86_64", "hers"),
            (2, "cloud-hyperviso", ""),
            (8, "qemu-kvm", "linked"),
            (9, "crosvm", "nix"),
        ]
        for process in found:
            assert (process.vms, process.vcpus, process.held, process.attachable) == (None, None, None, False)
            assert process.why_not
        assert unseen == 3

    assert exit_status(forked(work, NOBODY)) == 0
    assert len(kf.find_vms(proc.root)) == 6


def test_a_process_that_guards_itself_meanwhile_is_no_error(monkeypatch, proc):
    """Its files were seen and its program is not: then it is one that does not show them, and the others are listed."""
    for pid, program in ((1, "crosvm"), (2, "renamed"), (3, "lkvm")):
        proc.add(pid, [program], vm_links(1))
    readlink = Path.readlink

    def refusing(path):
        if path.name == "exe" and path.parent.name in ("1", "2"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return readlink(path)

    monkeypatch.setattr(Path, "readlink", refusing)
    found, unseen = scan(proc.root)
    assert [(process.pid, process.vmm, process.vms) for process in found] == [(1, "crosvm", None), (3, "lkvm", 1)]
    assert unseen == 1


# ---- real processes


@contextmanager
def running(command, **options):
    """A process, which is killed at the end."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def found(pid):
    """What find_vms says of one process."""
    return next((process for process in kf.find_vms() if process.pid == pid), None)


@pytest.mark.real_vm
@needs_qemu
def test_a_real_qemu_is_found():
    """Program, name, vCPUs and permission of a QEMU that runs, with its threads as one process."""
    command = [QEMU, "-accel", "kvm", "-smp", "3", "-name", "guest=x,,y,debug-threads=on", "-display", "none"]
    with running([*command, "-nodefaults", "-S", "-qmp", "stdio"], stderr=subprocess.DEVNULL) as qemu:
        assert b"QMP" in qemu.stdout.readline()
        qemu.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        qemu.stdin.flush()
        assert b"return" in qemu.stdout.readline()  # answered when the machine is made
        process = found(qemu.pid)
        assert (process.vmm, process.name) == ("qemu-system-x86_64", "x,y")
        assert (process.vms, process.vcpus) == (1, (0, 1, 2))
        assert [file.vcpu_id for file in process.held] == ([0, 1, 2] if HOLDS_VCPUS else [])
        assert (process.uid, process.attachable, process.why_not) == (os.getuid(), True, "")
        assert process.start_time == found(qemu.pid).start_time > 0
    assert found(qemu.pid) is None


TWO_VMS = """
import os, sys, kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest
guests = [TinyGuest(2), TinyGuest(3)]
files = guests[0].open_stats()
copies = [os.dup(fd) for fd in (guests[0].vm_fd, guests[0].vm_fd, guests[1].vcpu_fds[0])]
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.real_vm
def test_vms_count_once_however_often_they_are_open():
    """Of two VMs, one of them open three times, and duplicates of a vCPU: two VMs, and each vCPU once per VM."""
    with running([sys.executable, "-W", "ignore", "-c", TWO_VMS]) as process:
        assert process.stdout.readline() == b"ready\n"
        it = found(process.pid)
        assert (it.vms, it.vcpus) == (2, (0, 0, 1, 1, 2))
        assert [(file.kind, file.vcpu_id) for file in it.held] == [("vm", None), ("vcpu", 0), ("vcpu", 1)]
        for file in it.held:
            link = Path(f"/proc/{process.pid}/fd/{file.fd}").readlink()
            assert str(link).startswith(f"anon_inode:kvm-{file.kind}-stats")
        assert it.vmm.startswith("python")
        assert it.name == ""


@pytest.mark.real_vm
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_sees_that_there_may_be_a_vm_and_that_it_may_not_attach(resources):
    """The kernel's own refusals: files that may not be seen, and a pidfd_getfd that is not permitted."""
    guest = resources.enter_context(TinyGuest(1))
    assert found(os.getpid()).vcpus == (0,)
    sleep = shutil.which("sleep")
    folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
    folder.chmod(0o755)
    shutil.copy(sleep, folder / "qemu-system-x86_64")
    with running([folder / "qemu-system-x86_64", "100"], pass_fds=[guest.vm_fd]) as process:
        assert found(process.pid).vms == 1

        def work():
            it = found(process.pid)
            assert (it.vmm, it.vms, it.vcpus, it.held, it.uid) == ("qemu-system-x86_64", None, None, None, 0)
            assert not it.attachable
            assert it.why_not.startswith(f"pidfd_getfd: process {process.pid} runs as uid ")
            assert found(os.getppid()) is None
            assert scan("/proc")[1] >= 1
            assert may_attach(process.pid) == it.why_not

        assert exit_status(forked(work, NOBODY)) == 0

        def traces():
            assert found(process.pid).why_not.startswith(f"/proc/{process.pid}/fd belongs to another user")

        assert exit_status(forked(traces, NOBODY, CAP_SYS_PTRACE)) == 0


@pytest.mark.real_vm
def test_processes_that_end_meanwhile_are_no_error():
    """VMMs that are killed while they are looked at: listed or not, never an error, and gone in the end."""
    for _ in range(2):
        ready, tell = os.pipe()

        def work(tell=tell):
            with TinyGuest(4):
                os.write(tell, b"x")
                time.sleep(60)

        pids = [forked(work) for _ in range(4)]
        os.close(tell)
        while os.read(ready, 8):
            if len([process for process in kf.find_vms() if process.pid in pids]) == len(pids):
                break
        else:
            pytest.fail("the VMMs ended by themselves")
        os.close(ready)
        for pid in pids:
            os.kill(pid, 9)
            assert all(process.vmm for process in kf.find_vms() if process.pid in pids)
        for pid in pids:
            os.waitpid(pid, 0)
        assert not [process for process in kf.find_vms() if process.pid in pids]


def test_may_attach_asks_the_kernel():
    """Ourselves: yes; a process that has ended, or never was: no; nothing stays open."""
    before = open_fds()
    assert may_attach(os.getpid()) == ""
    pid = forked(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert may_attach(pid) == "it has ended"
    os.waitpid(pid, 0)
    assert may_attach(pid) == "it has ended"
    assert open_fds() == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.ENOSYS, "this kernel has no pidfd_getfd, which came with Linux 5.6, or a container's filter hides it"),
        (errno.EPERM, "kernel.yama.ptrace_scope is 3: nobody may attach to a process, not even root"),
        (errno.EMFILE, "this process has as many files open as it may"),
    ],
)
def test_each_refusal_says_why(monkeypatch, tmp_path, error, words):
    """The reason that attach would give, without the remedies. Old kernels and limits are reasons, too."""
    (tmp_path / "ptrace_scope").write_text("3\n")
    monkeypatch.setattr("kvmstats_fast.vmm.refusal._YAMA", tmp_path / "ptrace_scope")
    monkeypatch.setattr("kvmstats_fast.vmm.proc.lib", type("Lib", (), {"kvmstats_getfd": lambda *_: -error}))
    assert may_attach(os.getpid()) == f"pidfd_getfd: {words}"


def test_an_fd_of_another_process_can_be_taken(resources):
    """kvmstats_getfd gives a close-on-exec fd for the same open file, and says what is wrong otherwise."""
    ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
    pid = forked(lambda: theirs.recv(1))
    pidfd = os.pidfd_open(pid)
    fd = lib.kvmstats_getfd(pidfd, theirs.fileno())
    assert fd >= 0
    assert not os.get_inheritable(fd)
    os.write(fd, b"hello")
    assert ours.recv(5) == b"hello"
    assert lib.kvmstats_getfd(pidfd, 2**31 - 1) == -errno.EBADF
    assert lib.kvmstats_getfd(-1, 0) == -errno.EBADF
    ours.send(b"x")
    assert exit_status(pid) == 0
    assert lib.kvmstats_getfd(pidfd, 0) == -errno.ESRCH
    os.close(fd)
    os.close(pidfd)


# ---- the command line


def listed(monkeypatch, capsys, root, *arguments):
    """Exit status, stdout and stderr of ``kvmstats list`` over a made-up tree."""
    monkeypatch.setattr("kvmstats_fast.cli.list.scan", lambda _: scan(root))
    status = cli.main(["list", *arguments])
    return status, *capsys.readouterr()


def test_the_table_has_a_line_a_process(monkeypatch, capsys, proc):
    """Pid, VMM, name, vCPUs, held stats files, permission; a terminal's control characters are not passed on."""
    held = ["kvm-vm-stats", *(f"kvm-vcpu-stats:{i}" for i in (0, 1, 2, 5))]
    proc.add(7, ["qemu-system-x86_64", "-name", "we\x1b[31mb"], vm_links(6, *held))
    proc.add(12345, ["firecracker"], vm_links(1, "kvm-vm", "kvm-vcpu:0"))
    status, out, err = listed(monkeypatch, capsys, proc.root)
    assert (status, err) == (0, "")
    why = f"no: {proc.root}/%s is not of this process' pid namespace"
    assert out.splitlines() == [
        "  PID  VMM                 NAME         VCPUS       STATS FILES     ATTACH",
        f"    7  qemu-system-x86_64  we\\x1b[31mb  6           vm, vcpu 0-2,5  {why % 7}",
        f"12345  firecracker         -            2 in 2 VMs  none            {why % 12345}",
    ]


def test_the_table_says_who_has_nothing_to_attach_to_and_what_helps_once(monkeypatch, capsys, proc):
    """In the column that a narrow terminal keeps, too; -w has each reason, and the advice once for all of them."""
    for pid, name in ((7, "web"), (8, "db")):
        proc.add(pid, ["qemu-system-x86_64", "-name", name], vm_links(2))
    found, _ = scan(proc.root)
    found = [replace(one, attachable=True, why_not="") for one in found]
    monkeypatch.setattr("kvmstats_fast.cli.list.scan", lambda _: (found, 0))

    def refuse(pid):
        raise kf.AttachError(errno.ENOENT, f"process {pid} holds none. What helps: something")

    monkeypatch.setattr("kvmstats_fast.vmm.machine.attach", refuse)
    monkeypatch.setenv("COLUMNS", "50")
    assert cli.main(["list", "-w"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:3]] == ["no files: see -w"] * 2
    assert lines[3:] == ["", "7: process 7 holds none", "8: process 8 holds none", "What helps: something"]


def test_a_long_name_does_not_widen_the_table(monkeypatch, capsys, proc):
    """Anybody may give a process a name of some megabytes: the table has its beginning, JSON all of it."""
    proc.add(7, ["qemu-system-x86_64", "-name", "n" * 3_000_000], vm_links(1))
    _, out, _ = listed(monkeypatch, capsys, proc.root)
    assert f"  {'n' * 61}...  1  " in out
    _, out, _ = listed(monkeypatch, capsys, proc.root, "--json")
    assert len(json.loads(out)["name"]) == 3_000_000


def test_a_name_that_stdout_cannot_encode_hides_no_vm(monkeypatch, proc):
    """A terminal that is not UTF-8 gets an escape, not a traceback."""
    proc.add(7, ["qemu-system-x86_64", "-name", "\u65e5"], vm_links(1))
    monkeypatch.setattr("kvmstats_fast.cli.list.scan", lambda _: scan(proc.root))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert cli.main(["list"]) == 0
    assert b"  \\u65e5  1  " in raw.getvalue()


def test_json_is_one_object_a_line(monkeypatch, capsys, proc):
    """All that find_vms knows, by the same names, and what the other verbs call the VM."""
    proc.add(7, ["qemu-system-x86_64", "-name", "web"], vm_links(2, "kvm-vcpu-stats:1"))
    status, out, err = listed(monkeypatch, capsys, proc.root, "--json")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    assert json.loads(line) == {
        "vm": "web",
        "pid": 7,
        "vmm": "qemu-system-x86_64",
        "name": "web",
        "uid": 1000,
        "vms": 1,
        "vcpus": [0, 1],
        "held": [{"kind": "vcpu", "vcpu_id": 1, "fd": 6}],
        "start_time": 4711,
        "attachable": False,
        "why_not": f"{proc.root}/7 is not of this process' pid namespace",
    }


def test_json_and_the_table_agree_on_who_has_nothing_to_attach_to(monkeypatch, capsys, proc):
    """Who may be attached to and holds no files is not attachable; the reason is that, with what helps."""
    for pid, held in ((7, []), (8, ["kvm-vcpu-stats:0"])):
        proc.add(pid, ["qemu-system-x86_64"], vm_links(1, *held))
    found = [replace(one, attachable=True, why_not="") for one in scan(proc.root)[0]]
    monkeypatch.setattr("kvmstats_fast.cli.list.scan", lambda _: (found, 0))
    assert cli.main(["list", "-j"]) == 0
    none, some = map(json.loads, capsys.readouterr().out.splitlines())
    assert (some["attachable"], some["why_not"], none["attachable"]) == (True, "", False)
    assert none["why_not"].startswith("qemu-system-x86_64 (process 7) holds no stats files")
    assert "What helps, the least intrusive first: " in none["why_not"]
    assert cli.main(["list"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2].strip() for line in table[1:]] == ["no files: see -w", "yes"]


def test_csv_has_plain_cells(monkeypatch, capsys, proc):
    """Numbers with blanks between, and true and false as JSON has them: nothing is as Python writes it."""
    proc.add(7, ["qemu-system-x86_64", "-name", "web"], vm_links(2))
    status, out, _ = listed(monkeypatch, capsys, proc.root, "-x")
    (row,) = csv.DictReader(out.splitlines())
    assert (status, row["vm"], row["vcpus"], row["attachable"]) == (0, "web", "0 1", "false")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_no_vm_is_a_message_and_no_error(monkeypatch, capsys, proc, arguments):
    """Stdout stays empty, stderr says it, and the exit status is 0."""
    assert listed(monkeypatch, capsys, proc.root, *arguments) == (0, "", "kvmstats: no process has a VM open\n")


@pytest.mark.parametrize("hidden", [0, 2])
def test_a_guest_that_is_not_found_may_be_of_a_process_that_is_hidden(monkeypatch, hidden):
    """The error counts the processes that say nothing, if there are any."""
    monkeypatch.setattr(find, "scan", lambda _: ([], hidden))
    with pytest.raises(kf.AttachError, match="no VM is called 'web'") as caught:
        kf.attach("web")
    told = f". Processes that may have one, but whose files this user may not see: {hidden}. `kvmstats list`"
    assert (told in str(caught.value)) == bool(hidden)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_list_says_what_it_could_not_see(proc):
    """Unknown is `?`, and stderr counts the processes that say nothing."""
    for pid, program in ((1, "crosvm"), (2, "bash"), (3, "sshd")):
        (proc.add(pid, [program], vm_links(1)) / "fd").chmod(0o700)
    reading, writing = os.pipe()

    def work():
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        list_.scan = lambda _: scan(proc.root)
        cli.main(["list"])
        sys.stdout.flush()
        sys.stderr.flush()

    assert exit_status(forked(work, NOBODY)) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert "  1  crosvm  -     ?      ?            no: " in text
    assert "kvmstats: processes whose files this user may not see, and whose name is not a known VMM's: 2\n" in text
