"""What can be seen from outside to harm or to stop an injection is refused before a thread is touched."""

import errno
import os
import platform
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers import stats_fds, until
from holder import Holder

import kvmstats_fast as kf
from kvmstats_fast.vmm import hazard
from kvmstats_fast.vmm.inject import Injection
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.ways import HAND_OVER, INJECT

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="inject.c is for x86-64")

GO_VMM = """
package main
import ("fmt"; "os"; "syscall")
func main() {
    kvm, _, _ := syscall.Syscall(syscall.SYS_OPEN, 0, 0, 0)
    file, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
    if err != nil { panic(err) }
    kvm = file.Fd()
    vm, _, failed := syscall.Syscall(syscall.SYS_IOCTL, kvm, 0xAE01, 0)
    if failed != 0 { panic(failed) }
    syscall.Syscall(syscall.SYS_IOCTL, vm, 0xAE41, 0)
    fmt.Println("ready")
    var word string
    fmt.Scanln(&word)
    fmt.Println("done")
}
"""

#: What the Go linker writes into a shared library, too: a note of its build id.
GO_LIBRARY = r"""
__asm__(".pushsection .note.go.buildid, \"a\", @note\n"
        ".long 4, 4, 4\n.ascii \"Go\\0\\0\"\n.ascii \"id.1\"\n.popsection");
"""

C_HOST = """
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
int main(int argc, char **argv)
{
    int vm = ioctl(open("/dev/kvm", O_RDWR), 0xAE01, 0);
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    puts(vm >= 0 && (argc == 1 || library) ? "ready" : dlerror());
    fflush(stdout);
    return getchar() == 0;
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(source, name, compiler, ...): a program, or skip."""
    folder = tmp_path_factory.mktemp("hazard")
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}

    def build(source, name, *command):
        if shutil.which(command[0]) is None:
            pytest.skip(f"there is no {command[0]}")
        (folder / name).write_text(source)
        command = [*command, "-o", folder / "program", folder / name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{command[0]} builds nothing here: {done.stderr[-200:]}")
        return shutil.copy(folder / "program", tmp_path_factory.mktemp("built"))

    return build


@contextmanager
def running(*command):
    """A program that has said that it is ready."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


# ---- Go


@pytest.mark.real_vm
@pytest.mark.parametrize("flags", ["", "-s -w", "-s -w -buildid="], ids=["plain", "stripped", "without a build id"])
def test_a_vmm_in_go_is_refused_and_not_touched(build, flags):
    """However it was linked; the message says why, and advises everything but injection. It goes on as before."""
    program = build(GO_VMM, "vmm.go", "go", "build", f"-ldflags={flags}")
    with running(program) as vmm:
        with pytest.raises(kf.AttachError, match=rf"process {vmm.pid} runs code written in Go.*send_files") as caught:
            kf.attach(vmm.pid, inject=True)
        assert caught.value.errno == errno.ENOTSUP
        assert INJECT.advice not in str(caught.value)
        assert not stats_fds(vmm.pid)
        assert vmm.communicate("x\n")[0] == "done\n"
        assert vmm.returncode == 0


@pytest.mark.real_vm
def test_a_library_in_go_is_refused_too_and_c_is_not(build):
    """A C program that has loaded one has goroutines; without it, it can be injected."""
    host = build(C_HOST, "host.c", "gcc")
    with running(host) as vmm, kf.attach(vmm.pid, inject=True) as machine:
        assert (machine.how, len(machine)) == ("inject", 1)
    library = build(GO_LIBRARY, "library.c", "gcc", "-shared", "-fPIC")
    with running(host, library) as vmm:
        with pytest.raises(kf.AttachError, match="written in Go"):
            kf.attach(vmm.pid, inject=True)
        assert not stats_fds(vmm.pid)


def test_what_is_not_an_elf_file_has_no_marks_of_go(tmp_path):
    """Empty, short and lying files: no section names, and no crash."""
    header = bytearray(Path("/proc/self/exe").read_bytes()[:64])
    lying = bytes(header[:40]) + b"\xff" * 8 + bytes(header[48:])
    for content in (b"", b"\x7fELF", bytes(64), lying, b"\xff" * 200):
        (tmp_path / "file").write_bytes(content)
        with (tmp_path / "file").open("rb") as file:
            assert b".go.buildinfo" not in hazard._section_names(file.fileno())
            assert not hazard._has_go_note(file.fileno(), 0)


# ---- frozen


@pytest.fixture
def freezer():
    """A cgroup of the first version's freezer: (folder, what freezes, what thaws)."""
    parent = Path("/sys/fs/cgroup/freezer")
    folder = parent / f"kvmstats-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    yield folder
    with suppress(OSError):
        (folder / "freezer.state").write_text("THAWED")
    assert until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


@pytest.mark.real_vm
def test_a_frozen_vmm_is_said_to_be_frozen(freezer, monkeypatch):
    """Its cgroup is named without an attempt, which would wait for the timeout; thawed, it can be injected."""
    with Holder(1, hold="nothing") as vmm:
        (freezer / "cgroup.procs").write_text(str(vmm.pid))
        (freezer / "freezer.state").write_text("FROZEN")
        assert until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n")
        with monkeypatch.context() as patch:
            patch.setattr(Injection, "attempt", lambda *_, **__: pytest.fail("a thread was touched"))
            match = f"process {vmm.pid} is frozen with its cgroup, {freezer} "
            with pytest.raises(kf.AttachError, match=match) as caught:
                kf.attach(vmm.pid, inject=True, timeout=60)
        assert caught.value.errno == errno.EBUSY
        (freezer / "freezer.state").write_text("THAWED")
        with kf.attach(vmm.pid, inject=True) as machine:
            assert machine.how == "inject"


class Tree:
    """A process with this cgroup file."""

    def __init__(self, text):
        self.text = text

    def read(self, _):
        """Give it."""
        return self.text.encode()


@pytest.mark.parametrize(
    ("cgroup", "root", "kind", "options", "file", "content", "frozen"),
    [
        ("0::/a/b c", "/", "cgroup2", "rw", "cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/a/b c", "/a", "cgroup2", "rw", "cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/a/b c", "/", "cgroup2", "rw", "cgroup.events", "populated 1\nfrozen 0\n", False),
        ("3:cpu:/x\n6:freezer:/a/b c\n0::/", "/", "cgroup", "rw,freezer", "freezer.state", "FROZEN\n", True),
        ("6:freezer,cpu:/a/b c\n0::/", "/", "cgroup", "rw,cpu,freezer", "freezer.state", "FREEZING\n", True),
        ("6:freezer:/a/b c\n0::/", "/", "cgroup", "rw,freezer", "freezer.state", "THAWED\n", False),
        ("6:freezer:/a/b c", "/", "cgroup", "rw,memory", "freezer.state", "FROZEN\n", False),
        ("0::/../outside", "/", "cgroup2", "rw", "cgroup.events", "frozen 1\n", False),
        ("0::/a/b c", "/other", "cgroup2", "rw", "cgroup.events", "frozen 1\n", False),
        ("0::/a/b c", "/", "cgroup2", "rw", "no such file", "frozen 1\n", False),
        ("", "/", "cgroup2", "rw", "cgroup.events", "frozen 1\n", False),
    ],
)
def test_a_frozen_cgroup_is_found_where_it_is_mounted(  # noqa: PLR0917
    monkeypatch, tmp_path, cgroup, root, kind, options, file, content, frozen
):
    """Both versions, any root of the mount, spaces in paths; what cannot be seen is not frozen."""
    mount = tmp_path / "my mounts"
    folder = mount / "a/b c".removeprefix(root.strip("/")).lstrip("/")
    folder.mkdir(parents=True)
    (folder / file).write_text(content)
    point = str(mount).replace(" ", "\\040")
    lines = f"1 0 0:1 / / rw - tmpfs tmpfs rw\n30 1 0:29 {root} {point} rw,relatime shared:9 - {kind} none {options}\n"
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(hazard, "_MOUNTS", tmp_path / "mountinfo")
    assert hazard._frozen_cgroup(Tree(cgroup)) == (folder if frozen else None)


# ---- seccomp

FILTER = """
import ctypes, struct
libc = ctypes.CDLL(None)
code = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)  # BPF_RET: SECCOMP_RET_ALLOW
keep = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(keep))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.syscall(317, 1, 1, program) == 0  # seccomp(2) of x86-64: SECCOMP_SET_MODE_FILTER, all threads
"""


@pytest.mark.real_vm
@pytest.mark.parametrize("hold", ["nothing", "vcpus"])
def test_injection_is_not_advised_where_a_filter_forbids_it(hold):
    """Neither by the refusal nor by explain, nor after it was just refused; without a filter it is."""
    for before, advised in (("", True), (FILTER, False)):
        with Holder(1, hold=hold, before=before) as vmm:
            assert hazard.has_filter(Process(vmm.pid)) is not advised
            if hold == "nothing":
                with pytest.raises(kf.AttachError, match="holds no stats files") as caught:
                    kf.attach(vmm.pid)
                text = str(caught.value)
            else:
                with kf.attach(vmm.pid) as machine:
                    text = machine.explain()
            assert (INJECT.advice in text, HAND_OVER.advice in text) == (advised, True)
            if not advised and hold == "nothing":
                with pytest.raises(kf.AttachError, match="seccomp filter") as caught:
                    kf.attach(vmm.pid, inject=True)
                assert INJECT.advice not in str(caught.value)
