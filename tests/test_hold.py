"""A VMM under the hold library does what it does without it, and its stats files are there."""

import ctypes
import errno
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from functools import cache
from importlib import machinery
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import NOBODY, exit_status, forked, until
from qemu import HOLDS_VCPUS, Qmp, arguments, needs_qemu

import kvmstats_fast as kf
from kvmstats_fast.vmm import hold
from kvmstats_fast.vmm.proc import Process

TESTS = Path(__file__).parent
VMM = TESTS / "c" / "vmm.c"
SOURCE = TESTS.parent / "csrc" / "hold.c"
LIBRARY = hold.hold_library()
CC = shlex.split(os.environ.get("CC", "gcc"))

#: By mode of vmm.c: what it finds above its own fds, each time it looks.
HELD = {
    "basic": [5, 3],
    "threads": [17] * 20 + [0],
    "signals": [0],
    "forks": [2, 3, 1, 2, 0, 2],
    "exhausted": [0, 0],
    "churn": [0, 2, 0],
    "slots": [],
    "long-path": [],
    "cancelled": [1],
    "filtered": [0],
}

#: Compilers of VMMs: which libc, which word size, and which of ioctl's names they import.
BUILDS = {
    "glibc": ["gcc"],
    "undefined": ["gcc", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"],  # ends at undefined behaviour
    "musl": ["musl-gcc", "-idirafter", "/usr/include", "-idirafter", f"/usr/include/{os.uname().machine}-linux-gnu"],
    "32-bit": ["gcc", "-m32"],
    "32-bit-time64": ["gcc", "-m32", "-D_TIME_BITS=64", "-D_FILE_OFFSET_BITS=64"],
}


def compile_or_skip(program, command, *arguments):
    """Compile a probe first: a compiler that is not there, or lacks a libc, is no failure of ours."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    probe = program.with_suffix(".probe.c")
    probe.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
    libraries = [word for word in arguments if str(word).startswith("-f") or word == "-static"]
    done = subprocess.run([*command, probe, *libraries, "-o", program], capture_output=True, text=True, check=False)
    if done.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
        pytest.skip(f"`{' '.join(command)}` makes no program that runs here: {done.stderr.strip()[-200:]}")
    command = [*command, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", *arguments, "-o", program]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(name): vmm.c by one of BUILDS, and the library that fits it."""
    folder = tmp_path_factory.mktemp("vmm")
    made = {}

    def build(name):
        if name not in made:
            command = BUILDS[name]
            program = compile_or_skip(folder / name, command, "-pthread", VMM)
            library = LIBRARY
            if name not in ("glibc", "musl"):
                library = folder / f"{name}.so"
                flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-nostdlib", "-fvisibility=hidden", "-ffreestanding"]
                subprocess.run([*command, *flags, SOURCE, "-o", library, "-lgcc"], check=True)
            made[name] = program, library
        return made[name]

    return build


@pytest.fixture(scope="module")
def vmm(build):
    """vmm.c as this machine's programs are."""
    return build("glibc")[0]


def run(*command, preload=None, status=0):
    """Run with only this preloaded; (what was printed but for the held lines, the numbers of these)."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if preload:
        environment["LD_PRELOAD"] = str(preload)
    command = [str(word) for word in command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    held = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("held")]
    return [line for line in lines if not line.startswith("held")], held


@pytest.fixture(scope="module")
def without(build):
    """without(name, mode): what that build prints without the library, which is the same for all of its word size."""

    @cache
    def without(name, mode):
        printed, held = run(build(name)[0], mode)
        assert held == [0] * len(HELD[mode])
        return printed

    return without


# ---- the library


def test_the_slot_of_a_file_is_as_far_above_as_the_library_says():
    """Python knows a held file by its number."""
    assert f"#define HOLD_OFFSET {hold.HOLD_OFFSET}\n" in SOURCE.read_text()


@pytest.mark.real_vm
@pytest.mark.parametrize("mode", HELD)
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_changes_for_the_vmm_but_that_its_stats_files_are_held(build, without, name, mode):
    """Every result, errno and fd number is the same with and without the library, and what is held is known."""
    program, library = build(name)
    bits_32 = name.startswith("32-bit")
    held = HELD[mode]
    if bits_32 and mode == "basic":
        held = [4, 2]  # it has no request of more than 32 bits, which made a second VM
    assert run(program, mode, preload=library) == (without("32-bit" if bits_32 else "glibc", mode), held)


#: By errno, what the kernel may say of a link in /proc: only ENOENT means that there is no such fd.
UNREADABLE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

long syscall(long number, ...)
{
    static const char slot[] = "/proc/thread-self/fd/5"; /* and two more digits */
    long (*next)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; ++i)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_readlinkat && strncmp((char *)a[1], slot, sizeof slot - 1) == 0 &&
        strlen((char *)a[1]) == sizeof slot - 1 + 2) {
        errno = atoi(getenv("LINK_ERRNO"));
        return -1;
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


@pytest.mark.real_vm
@pytest.mark.parametrize("name", ["ENAMETOOLONG", "EACCES", "EPERM", "EIO", "ELOOP", "ENOMEM", "ENOENT"])
def test_a_slot_whose_link_cannot_be_read_is_in_use(tmp_path, monkeypatch, vmm, name):
    """Unless the kernel says that there is no such fd, the slot is left alone: nothing is put there, or elsewhere."""
    source, links = tmp_path / "links.c", tmp_path / "links.so"
    source.write_text(UNREADABLE)
    subprocess.run([*CC, "-shared", "-fPIC", source, "-o", links], check=True)
    monkeypatch.setenv("LINK_ERRNO", str(getattr(errno, name)))
    held = HELD["basic"] if name == "ENOENT" else [0, 0]
    assert run(vmm, "basic", preload=f"{LIBRARY}:{links}") == (run(vmm, "basic")[0], held)


#: Answers KVM's numbers with 0 and 999999, on whatever fd.
FOREIGN = """
int ioctl(int fd, unsigned long request, ...)
{
    (void)fd;
    return request == 0xAE41 ? 999999 : 0;
}
"""


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="vmm.c opens /dev/kvm")
def test_nothing_is_asked_of_what_is_no_kvm_fd(tmp_path, vmm):
    """A driver's answer to KVM's numbers may be any number: an fd of something else, or none. Asking would kill."""
    source, driver = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(FOREIGN)
    subprocess.run([*CC, "-shared", "-fPIC", source, "-o", driver], check=True)
    lines, held = run(vmm, "foreign", preload=f"{LIBRARY}:{driver}")
    assert held == [0]
    assert lines[:2] == ["a number: 0, errno 77", "a number: 999999, errno 77"]


@pytest.mark.real_vm
@pytest.mark.parametrize("mode", ["basic", "threads"])
def test_a_vmm_under_asan_and_the_library_is_clean(tmp_path, vmm, mode):
    """The library goes behind libasan, whose functions it calls, and nothing is found."""
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_or_skip(tmp_path / "vmm", CC, *sanitize, "-pthread", VMM)
    asan = subprocess.run([*CC, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    preload = f"{asan.stdout.strip()}:{LIBRARY}"
    assert run(program, mode, preload=preload) == (run(vmm, mode)[0], HELD[mode])


@pytest.mark.real_vm
@pytest.mark.parametrize("mode", ["basic", "slots"])
def test_a_vmm_under_valgrind_and_the_library_is_clean(vmm, mode):
    """Valgrind sees no invalid access and no use of what is not initialised."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("there is no valgrind")
    # Its words go nowhere: it does not know KVM's ioctls, and says so.
    options = ["--error-exitcode=99", "--leak-check=full", "--log-file=/dev/null"]
    _, own = run(valgrind, *options, vmm, mode)  # valgrind's fds are below the limit, and so may be among those counted
    _, held = run(valgrind, *options, vmm, mode, preload=LIBRARY)
    assert [with_library - without for with_library, without in zip(held, own, strict=True)] == HELD[mode]


def test_the_library_asks_little_of_a_libc():
    """It imports three symbols, exports two (on 32-bit three), needs no library, and is small."""
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    lines = subprocess.run(["nm", "-D", LIBRARY], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    assert {name for kind, name in symbols if kind in "Uwv"} == {"__errno_location", "dlsym", "syscall"}
    wrapped = {"close", "ioctl"} | ({"__ioctl_time64"} if struct.calcsize("P") == 4 else set())
    assert {name for kind, name in symbols if kind not in "Uwv"} == wrapped
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "(NEEDED)" not in dynamic
    assert "NOW" in dynamic
    assert LIBRARY.stat().st_size < 64 * 1024


def test_the_library_is_no_python_module():
    """It lies beside the extension, under a name that no import statement can say."""
    assert LIBRARY.parent == Path(kf.__file__).resolve().parent
    assert not LIBRARY.name.partition(".")[0].isidentifier()
    assert LIBRARY.suffix in machinery.EXTENSION_SUFFIXES  # so the name is what keeps it out


def test_hold_path_prints_the_path():
    """`kvmstats hold-path` is for LD_PRELOAD=$(...): a line with the path, no more."""
    command = [sys.executable, "-m", "kvmstats_fast", "hold-path"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{LIBRARY}\n"


@pytest.mark.parametrize("folder", ["a b", "a:b", "a$b"])
def test_a_path_that_ld_preload_cannot_name_is_refused(monkeypatch, tmp_path, folder):
    """Spaces, colons and dollars mean something else to the dynamic linker."""
    monkeypatch.setattr(hold, "__file__", str(tmp_path / folder / "vmm" / "hold.py"))
    with pytest.raises(kf.AttachError, match="LD_PRELOAD cannot name"):
        hold.hold_library()


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    """Half an installation is no reason to start a VMM that holds nothing."""
    monkeypatch.setattr(hold, "__file__", str(tmp_path / "vmm" / "hold.py"))
    with pytest.raises(kf.AttachError, match="is missing: install"):
        hold.hold_library()


# ---- who can hold


def elf(**changes):
    """The start of this Python's own program, with bytes changed."""
    head = bytearray(Path(sys.executable).resolve().read_bytes()[:4096])
    for at, value in changes.values():
        head[at : at + len(value)] = value
    return bytes(head)


def program_of(path, content, mode=0o755):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_dynamic_programs_and_scripts_can_hold(tmp_path):
    """Python itself, a script of it, and a script of a script."""
    hold.check_can_hold(sys.executable)
    script = program_of(tmp_path / "script", f"#!{sys.executable} -I\nimport this".encode())
    hold.check_can_hold(script)
    hold.check_can_hold(program_of(tmp_path / "of-script", f"#! {script}\n".encode()))


@pytest.mark.parametrize("how", ["-static", "-static-pie"])
def test_a_static_program_is_refused_itself_and_as_an_interpreter(tmp_path, how):
    """Static, and static-pie too, which has a dynamic section but no dynamic linker."""
    program = tmp_path / "static"
    if shutil.which(CC[0]) is None:
        pytest.skip(f"there is no C compiler {CC[0]}")
    (tmp_path / "static.c").write_text("int main(void) { return 0; }\n")
    command = [*CC, how, tmp_path / "static.c", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no static programs are made here: {done.stderr.strip()[-200:]}")
    with pytest.raises(kf.AttachError, match=r"static cannot .*statically linked.*dynamically linked build"):
        hold.check_can_hold(program)
    script = program_of(tmp_path / "script", f"#!{program}\n".encode())
    with pytest.raises(kf.AttachError, match=r"static cannot .*statically linked"):
        hold.check_can_hold(script)
    with pytest.raises(kf.AttachError, match="statically linked"):
        hold.start([program])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: elf(size=(4, b"\1" if struct.calcsize("P") == 8 else b"\2")), r"it is a (32|64)-bit program"),
        (lambda: elf(machine=(18, b"\xf3\xf3")), r"for ELF machine 62451"),
        (lambda: b"\x7fELF\2\1", "neither an ELF program nor a script"),
        (lambda: b"echo hello\n", "neither an ELF program nor a script"),
        (lambda: b"", "neither an ELF program nor a script"),
        (lambda: b"#!\n", "names no interpreter"),
        (lambda: elf(table=(32 if struct.calcsize("P") == 8 else 28, b"\xff" * 4)), "statically linked"),
    ],
)
def test_what_cannot_load_the_library_is_refused_with_the_reason(tmp_path, content, reason):
    """Another word size or machine, no program at all, and headers beyond the end of the file."""
    with pytest.raises(kf.AttachError, match=reason):
        hold.check_can_hold(program_of(tmp_path / "program", content()))


def test_a_real_32_bit_program_is_refused(build):
    """What gcc -m32 makes, as long as this Python is a 64-bit one."""
    if struct.calcsize("P") == 4:
        pytest.skip("this Python is a 32-bit one")
    with pytest.raises(kf.AttachError, match="32-bit program"):
        hold.check_can_hold(build("32-bit")[0])


def test_a_missing_program_is_the_kernels_error(tmp_path):
    """No such file stays FileNotFoundError, by path and by name."""
    with pytest.raises(FileNotFoundError):
        hold.check_can_hold(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no such program in PATH"):
        hold.start(["no-such-vmm-anywhere"])


#: Says, as another user, whether it can hold: python -c CHECK uid gid program
CHECK = """
import os, pathlib, sys
from kvmstats_fast.vmm import hold
if library := sys.argv[4:]:
    hold.hold_library = lambda: pathlib.Path(*library)
uid, gid = int(sys.argv[1]), int(sys.argv[2])
os.setgroups([]), os.setresgid(gid, gid, gid), os.setresuid(uid, uid, uid)
try: hold.check_can_hold(sys.argv[3])
except OSError as error: print(error.strerror)
else: print("yes")
"""


def as_nobody(program, uid=NOBODY, gid=NOBODY, *wrapper):
    """Whether a user may hold a program, with a library beside it that every user may read."""
    command = [*wrapper, sys.executable, "-c", CHECK, str(uid), str(gid), str(program)]
    command.append(shutil.copy(LIBRARY, program.parent))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def open_folder(open_folder):
    """The one of all tests, where setuid is honoured and other users can be had."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user for a test")
    if os.statvfs(open_folder).f_flag & os.ST_NOSUID:
        pytest.skip("temporary files are on a nosuid mount")
    return open_folder


def test_programs_that_gain_privilege_are_refused_to_those_who_gain_it(open_folder):
    """Setuid and setgid programs, for other users than their owner; file capabilities, for others than root."""
    program = program_of(open_folder / "vmm", Path("/bin/true").read_bytes())
    assert as_nobody(program) == "yes"
    program.chmod(0o4755)
    assert "it is setuid to uid 0" in as_nobody(program)
    assert as_nobody(program, 0, 0) == "yes"
    program.chmod(0o2755)
    assert "it is setgid to gid 0" in as_nobody(program)
    program.chmod(0o2745)  # mandatory locking, of old: no privilege
    assert stat.S_IMODE(program.stat().st_mode) == 0o2745
    program.chmod(0o4755)
    assert as_nobody(program, NOBODY, NOBODY, "setpriv", "--no-new-privs") == "yes"
    program.chmod(0o711)
    assert "cannot be read by this user" in as_nobody(program)
    program.chmod(0o755)
    # struct vfs_cap_data of include/uapi/linux/capability.h: revision 2, effective; CAP_NET_RAW
    os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    assert "it has file capabilities" in as_nobody(program)
    assert as_nobody(program, 0, 0) == "yes"


def test_a_file_system_without_attributes_has_no_capabilities(tmp_path, monkeypatch):
    """A virtiofs that passes none on answers ENOTSUP: its programs can hold."""

    def listxattr(path):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)

    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    monkeypatch.setattr(os, "listxattr", listxattr)
    hold.check_can_hold(program_of(tmp_path / "vmm", elf()))


def test_a_library_that_the_user_cannot_read_is_named(open_folder):
    """It is not the program that is at fault."""
    closed = open_folder / "closed"
    closed.mkdir(0o700)
    there = f"hold.__file__ = {str(closed / 'vmm' / 'hold.py')!r}"
    script = CHECK.replace("hold.hold_library = lambda: pathlib.Path(*library)", there)
    library = shutil.copy(LIBRARY, closed)
    command = [sys.executable, "-c", script, str(NOBODY), str(NOBODY), "/bin/true", library]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"{library} cannot be read by this user: install the package where its VMMs can read it\n"


def test_the_dynamic_linker_agrees(open_folder):
    """Where check_can_hold says no the library is really not loaded, and where it says yes it is."""
    maps = program_of(open_folder / "cat", Path(shutil.which("cat")).read_bytes())
    library = open_folder / LIBRARY.name
    shutil.copy(LIBRARY, library)

    def loaded():
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", maps, "/proc/self/maps"]
        done = subprocess.run(command, capture_output=True, env={"LD_PRELOAD": library}, check=True)
        return LIBRARY.name.encode() in done.stdout

    assert loaded()
    maps.chmod(0o4755)
    assert not loaded()
    maps.chmod(0o755)
    os.setxattr(maps, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    assert not loaded()


# ---- start


def test_start_adds_the_library_behind_what_is_preloaded_already(tmp_path):
    """LD_PRELOAD keeps what it has, gets the library once, and the rest of the environment is the caller's."""
    show = "import os; print(os.environ['LD_PRELOAD'], os.environ.get('KEPT'))"
    other = tmp_path / "other.so"
    shutil.copy(LIBRARY, other)

    def preload_of(**environment):
        process = hold.start([sys.executable, "-c", show], env=environment, stdout=subprocess.PIPE, text=True)
        return process.communicate()[0].split()

    assert preload_of() == [str(LIBRARY), "None"]
    assert preload_of(LD_PRELOAD=f"{other}", KEPT="1") == [f"{other}:{LIBRARY}", "1"]
    assert preload_of(LD_PRELOAD=f"{LIBRARY} {other}") == [f"{LIBRARY}:{other}", "None"]


def test_start_finds_the_program_where_popen_does(tmp_path, monkeypatch):
    """PATH of the environment that is passed, cwd, and executable count, for the check and for the start."""
    program_of(tmp_path / "vmm", f"#!{sys.executable}\nprint('here')\n".encode())
    program_of(tmp_path / "static", b"no program")
    monkeypatch.chdir("/")

    def output(*argv, **options):
        return hold.start(argv, stdout=subprocess.PIPE, text=True, **options).communicate()[0]

    assert output("vmm", env={"PATH": str(tmp_path)}) == "here\n"
    assert output("./vmm", cwd=tmp_path) == "here\n"
    assert output("named otherwise", executable=str(tmp_path / "vmm")) == "here\n"
    with pytest.raises(kf.AttachError, match="neither an ELF"):
        hold.start([sys.executable], executable=tmp_path / "static")
    for argv, options in ((["true"], {"shell": True}), ("true", {}), ([], {})):
        with pytest.raises(ValueError, match="must be a list"):
            hold.start(argv, **options)


# ---- QEMU


@contextmanager
def qemu(folder, *more, **options):
    """QEMU with four vCPUs, under the library, its firmware booting: (process, monitor)."""
    command, path = arguments(folder, *more)
    with (folder / "log").open("wb") as log:
        process = hold.start(command, stdout=log, stderr=log, **options)
    try:
        monitor = Qmp(path, process)
        with closing(monitor):
            yield process, monitor
    finally:
        process.kill()
        process.wait()


#: Of nobody on most machines.
KVM_GROUP = 12345


def of_qemu(monitor):
    """What QEMU itself says of its VM and vCPUs, as dicts, the VM's first."""
    paths = [cpu["qom-path"] for cpu in sorted(monitor("query-cpus-fast"), key=lambda cpu: cpu["cpu-index"])]
    answers = monitor("query-stats", target="vm") + monitor("query-stats", target="vcpu", vcpus=paths)
    by_path = {answer.get("qom-path"): answer for answer in answers if answer["provider"] == "kvm"}
    named = [{one["name"]: one["value"] for one in by_path[path]["stats"]} for path in (None, *paths)]
    # QEMU lists the last bucket of a histogram first (7.2, 10.0): add_kvmstat_entry of accel/kvm/kvm-all.c prepends.
    forward = [{name: v[::-1] if isinstance(v, list) else v for name, v in one.items()} for one in named]
    return [{name: value for name, value in one.items() if value is not None} for one in forward]


def plain(snapshot):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in snapshot.items()}


def same_as_qemu_says(process, monitor):
    """Borrow everything of a VM that is stopped, and compare each number."""

    def held():
        return sum(file.is_stats for file in Process(process.pid).kvm_files()) == (9 if HOLDS_VCPUS else 5)

    assert until(held)
    with kf.attach(process.pid) as machine:
        files = machine.files
        assert [(file.kind, file.vcpu_id) for file in files] == [("vm", None), *(("vcpu", i) for i in range(4))]
        assert until(lambda: files[1].snapshot()["exits"])
        monitor("stop")
        for _ in range(50):  # a vCPU's thread that is still on its way out, or the host, may yet move a counter
            before = [plain(file.snapshot()) for file in files]
            said = of_qemu(monitor)
            if before == said == [plain(file.snapshot()) for file in files]:
                break
            time.sleep(0.02)
        assert [set(one) for one in said] == [set(one) for one in before]
        assert said == before
        assert before[1]["exits"] > 0


@pytest.mark.real_vm
@needs_qemu
@pytest.mark.parametrize(
    "arguments",
    [[], ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]],
    ids=["plain", "sandbox-of-libvirt"],
)
def test_qemus_stats_files_are_all_there_and_say_what_qemu_says(tmp_path, arguments):
    """The VM's and four vCPUs', each number as query-stats has it; also under the seccomp filter of libvirt."""
    with qemu(tmp_path, *arguments) as (process, monitor):
        same_as_qemu_says(process, monitor)


def open_kvm_to_its_group(folder):
    """Give this process a /dev/kvm of its own that a group may use, where the machine's is the owner's alone."""
    info = Path("/dev/kvm").stat()
    if info.st_mode & 0o060 == 0o060:
        return info.st_gid
    clone_newns = 0x00020000  # os.unshare came with Python 3.12
    assert ctypes.CDLL(None).unshare(clone_newns) == 0
    node = folder / "kvm"
    os.mknod(node, stat.S_IFCHR | 0o660, info.st_rdev)
    os.chown(node, 0, KVM_GROUP)
    node.chmod(0o660)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", node, "/dev/kvm"], check=True)
    return KVM_GROUP


@pytest.mark.real_vm
@needs_qemu
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_an_unprivileged_user_of_kvm_holds_and_borrows(open_folder):
    """A user who owns nothing but is in the group of /dev/kvm starts QEMU and reads its statistics."""
    shutil.copy(LIBRARY, open_folder)
    os.chown(open_folder, NOBODY, -1)

    def work():
        group = open_kvm_to_its_group(open_folder)
        hold.hold_library = lambda: open_folder / LIBRARY.name
        os.setgroups([group])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with qemu(open_folder) as (process, monitor):
            same_as_qemu_says(process, monitor)

    assert exit_status(forked(work)) == 0


def test_the_library_says_what_its_file_says():
    """The number of the place in hold.c is the one that vmm.c looks from."""
    assert re.search(r"#define HOLD_OFFSET (\d+)", SOURCE.read_text())[1] == "512"
    assert "FIRST_HELD = 512" in VMM.read_text()


def test_where_the_kernel_gives_no_privilege_the_bits_mean_none(tmp_path, monkeypatch):
    """On a file system that is mounted nosuid anybody may hold a program that is setuid."""
    program = program_of(tmp_path / "vmm", elf(), 0o4755)
    monkeypatch.setattr(os, "getuid", lambda: program.stat().st_uid + 1)
    with pytest.raises(kf.AttachError, match="it is setuid to uid"):
        hold.check_can_hold(program)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOSUID))
    hold.check_can_hold(program)


def test_capabilities_that_cannot_be_looked_for_are_the_kernels_error(tmp_path, monkeypatch):
    """They are not taken to be none."""

    def listxattr(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    monkeypatch.setattr(os, "listxattr", listxattr)
    with pytest.raises(OSError, match="Input/output error"):
        hold.check_can_hold(program_of(tmp_path / "vmm", elf()))
