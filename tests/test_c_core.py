import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from kvmstats_fast.testing import SyntheticStats

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
_TOPICS = ("layout", "schedstat", "sweep", "run", "series", "process", "inject", "rename")
CORE = [str(CSRC / f"{name}.c") for name in _TOPICS]
TEST_CORE = str(TESTS / "c" / "test_core.c")
TEST_RUN = str(TESTS / "c" / "test_run.c")
TEST_SERIES = str(TESTS / "c" / "test_series.c")
FUZZ_CORE = str(TESTS / "c" / "fuzz_core.c")
CAPTURES = sorted((TESTS / "data" / "captures").glob("*/*.bin"))

CC = shlex.split(os.environ.get("CC", "gcc"))
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-D_DEFAULT_SOURCE", "-pthread", f"-I{CSRC}"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The core calls pread, which the linker replaces; it is pread64 where glibc is told that files are large.
LIBC_PREAD = ["-DKVMSTATS_LIBC_PREAD", "-Wl,--wrap=pread,--wrap=pread64"]
# The core as it is shipped: it makes the system call in place, which a seccomp filter intercepts.
IN_PLACE = platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 2**32
NO_SECCOMP = 77
LARGE_FILES = "-D_FILE_OFFSET_BITS=64"

MUTATIONS = 100_000
SEED = 20210623

# Of the compiler, not of the core: checks of the stack, addresses, and arithmetic that a machine does not have.
HELPERS = re.compile(
    r"__stack_chk_(fail|fail_local|guard)|_GLOBAL_OFFSET_TABLE_|\.TOC\.|__x86\.\S+|__(u?div|u?mod|bswap)[sd]i[23]"
)
STRING_FUNCTIONS = {"memcpy", "memset", "memchr", "memcmp"}
ERRNO = {"__errno_location", "___errno_location"}
READING = {"kvmstats_copy_values", "kvmstats_parse_schedstat"} | (set() if IN_PLACE else {"pread", "pread64"})
# The clock, the ring, and the threads of a wide sweep. None of them allocates for the core.
RUNNING = {
    *("write", "read", "poll", "prctl", "syscall", "getrusage"),
    *("clock_gettime", "clock_nanosleep", "__clock_gettime64", "__clock_nanosleep_time64"),
    *("pthread_create", "pthread_join", "pthread_sigmask", "sigfillset"),
    *(f"pthread_attr_{what}" for what in ("init", "destroy", "setinheritsched", "setschedpolicy", "setschedparam")),
    *("sem_init", "sem_destroy", "sem_post", "sem_wait", "sem_trywait"),
}
# Tracing, and what a child of a process with threads may do.
TRACING = {
    *("ptrace", "waitpid", "process_vm_readv", "process_vm_writev", "syscall", "kill", "getpid", "_exit"),
    *("open", "open64", "read", "close", "mmap", "mmap64", "munmap", "clock_gettime", "nanosleep"),
    *("pthread_sigmask", "sigemptyset", "sigaddset", "sigfillset", "sigtimedwait", "sigaction"),
    *("strlen", "strstr", "strchr", "strrchr"),
}

# What each file may call beyond the string functions.
IMPORTS = {
    "layout.c": set(),
    "schedstat.c": set(),
    "sweep.c": READING | ERRNO,
    "run.c": RUNNING | READING | ERRNO,
    "series.c": set(),
    "process.c": {"syscall"} | ERRNO,
    "rename.c": {"syscall"} | ERRNO,
    "inject.c": TRACING | ERRNO,
}

#: A source that claims one value more than there is room for.
OVERFLOW = """
#define _GNU_SOURCE
#include "kvmstats.h"
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void)
{
    struct kvmstats_source source = {.fd = memfd_create("values", 0), .value_size = 8, .count = 5};
    source.values = calloc(4, 8);
    return ftruncate(source.fd, 4096) || kvmstats_read(&source);
}
"""

pytestmark = pytest.mark.skipif(shutil.which(CC[0]) is None, reason=f"there is no C compiler {CC[0]}")


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, check=False)


def build(program, *arguments):
    """Compile and link; what the compiler says is the failure."""
    result = run(*CC, *FLAGS, *arguments, "-o", program)
    assert result.returncode == 0, result.stderr
    return program


def check(*command):
    """Run, require success, and return what was printed."""
    result = run(*command)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def core_checks(output):
    """Return the number that test_core printed; it must have printed nothing else."""
    match = re.fullmatch(r"test_core: (\d+) checks\n", output)
    assert match, output
    return int(match[1])


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Skip where a program cannot be linked or run with AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("sanitizers")
    source, program = folder / "probe.c", folder / "probe"
    source.write_text("int main(void) { return 0; }\n", encoding="ascii")
    for command in ([*CC, *SANITIZE, source, "-o", program], [program]):
        result = run(*command)
        if result.returncode:
            reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
            pytest.skip(f"no ASan and UBSan here: {reason}")
    return SANITIZE


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The real captures, and made-up files of the layouts and byte orders that no capture has."""
    folder = tmp_path_factory.mktemp("corpus")
    files = list(CAPTURES)
    for kind, layout, byteorder in product(("vm", "vcpu"), ("merged", "v9", "v5", "v2"), ("little", "big")):
        file = folder / f"{kind}-{layout}-{byteorder}"
        with SyntheticStats("x86", kind, layout=layout, byteorder=byteorder) as made:
            file.write_bytes(made.to_bytes())
        files.append(file)
    return files


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    """Compile the core's files as the extension does, and return {file: [(type, name)]} of their symbols."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    folder = tmp_path_factory.mktemp("objects")
    result = {}
    for source in CORE:
        file = folder / f"{Path(source).stem}.o"
        build(file, "-fPIC", LARGE_FILES, "-c", source)
        # The type is one letter, behind an address where there is one.
        lines = [line.split() for line in check(nm, file).splitlines()]
        result[Path(source).name] = [(line[-2], line[-1]) for line in lines]
    return result


@pytest.mark.parametrize("large_files", [[], [LARGE_FILES]], ids=["default", "large-files"])
def test_the_core_keeps_its_manual(tmp_path, large_files):
    """Headers, descriptors, values, reads and every error code are as kvmstats.h says, at the edge of memory."""
    program = build(tmp_path / "test_core", *large_files, TEST_CORE, *CORE, *LIBC_PREAD)
    assert core_checks(check(program)) > 1000


@pytest.mark.skipif(not IN_PLACE, reason="the core calls pread on this machine")
@pytest.mark.parametrize("test", [TEST_CORE, TEST_RUN], ids=["core", "run"])
def test_system_calls_in_place_keep_the_manual_too(tmp_path, test):
    """Interruptions, pieces, early ends and errors of a system call that is made in place are those of pread."""
    program = build(tmp_path / "in_place", LARGE_FILES, test, *CORE)
    result = run(program)
    if result.returncode == NO_SECCOMP:
        pytest.skip(f"no seccomp filter that notifies: {result.stderr.strip()}")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    assert re.fullmatch(r"test_(core|run): \d+ checks\n", result.stdout)


def test_the_core_is_clean_under_the_sanitizers(tmp_path, sanitizers):
    """No check of the core has an invalid access or undefined behaviour."""
    program = build(tmp_path / "test_core", *sanitizers, TEST_CORE, *CORE, *LIBC_PREAD)
    assert core_checks(check(program)) > 1000


def test_the_core_is_clean_under_valgrind(tmp_path):
    """No check of the core uses an uninitialised value, accesses memory it does not own, or leaks."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("there is no valgrind")
    program = build(tmp_path / "test_core", "-g", TEST_CORE, *CORE, *LIBC_PREAD)
    assert core_checks(check(valgrind, "--quiet", "--error-exitcode=99", "--leak-check=full", program)) > 1000


@pytest.mark.parametrize("way", ["plain", "sanitizers", "valgrind"])
def test_series_are_those_of_the_plainest_loops(tmp_path, sanitizers, way):
    """Changes, rates, resets and sums of any shape, to the last bit, at the edge of memory, and clean as above."""
    valgrind = shutil.which("valgrind") if way == "valgrind" else None
    if way == "valgrind" and valgrind is None:
        pytest.skip("there is no valgrind")
    options = sanitizers if way == "sanitizers" else ["-g"]
    program = build(tmp_path / "test_series", *options, TEST_SERIES, str(CSRC / "series.c"))
    wrapper = [valgrind, "--quiet", "--error-exitcode=99"] if valgrind else []
    assert re.fullmatch(r"test_series: \d{6,} checks\n", check(*wrapper, program))


@pytest.mark.parametrize("sanitize", [[], ["-g", "-fsanitize=thread"], SANITIZE], ids=["plain", "threads", "addresses"])
def test_runs_account_for_every_tick(tmp_path, sanitizers, sanitize):
    """Sweeps and runs with up to 64 threads, a reader and a stopper keep their contract and have no data race."""
    assert sanitizers
    program = build(tmp_path / "test_run", *sanitize, TEST_RUN, *CORE, *LIBC_PREAD)
    match = re.fullmatch(r"test_run: (\d+) checks\n", check(program))
    assert match
    assert int(match[1]) > 1000


def test_mutated_captures_break_no_promise(tmp_path, sanitizers, corpus):
    """However the bytes of a real file are changed, the core refuses it or reads it, and either by the contract."""
    program = build(tmp_path / "fuzz_core", *sanitizers, "-DSTANDALONE", FUZZ_CORE, str(CSRC / "layout.c"))
    output = check(program, MUTATIONS, SEED, *corpus)
    match = re.fullmatch(r"fuzz_core: (\d+) inputs, (\d+) accepted\n", output)
    assert match, output
    inputs, accepted = int(match[1]), int(match[2])
    assert inputs == MUTATIONS + len(corpus)
    # Mutations that all fail, or all pass, would test only half of the core.
    assert inputs // 10 < accepted < inputs * 9 // 10


def test_unmutated_captures_are_accepted(tmp_path, corpus):
    """The core accepts every real file, and the same statistics in each layout and byte order."""
    program = build(tmp_path / "fuzz_core", "-DSTANDALONE", FUZZ_CORE, str(CSRC / "layout.c"))
    assert check(program, 0, SEED, *corpus) == f"fuzz_core: {len(corpus)} inputs, {len(corpus)} accepted\n"


@pytest.mark.parametrize("source", CORE, ids=lambda path: Path(path).name)
def test_the_core_compiles_without_a_warning(tmp_path, source):
    """With the strict warnings, and with either of the macros that declare the system's functions."""
    for macro in ("_DEFAULT_SOURCE", "_GNU_SOURCE"):
        build(tmp_path / "object.o", "-Wconversion", "-Wshadow", LARGE_FILES, f"-D{macro}", "-c", source)


def test_the_fuzz_target_compiles_without_its_own_main(tmp_path):
    """Without STANDALONE there is only the entry point that libFuzzer calls."""
    build(tmp_path / "fuzz_core.o", "-c", FUZZ_CORE)


@pytest.mark.parametrize("source", IMPORTS)
def test_the_core_has_no_writable_data(symbols, source):
    """Two calls share nothing: no object file of the core has a writable variable."""
    assert [name for kind, name in symbols[source] if kind in "BbDdCcGgSs"] == []


@pytest.mark.parametrize("source", IMPORTS)
def test_the_core_imports_no_allocator(symbols, source):
    """The core calls the string functions, itself and the system: nothing that allocates, prints or locks."""
    imported = {name for kind, name in symbols[source] if kind in "Uwv"}
    assert {name for name in imported - STRING_FUNCTIONS - IMPORTS[source] if not HELPERS.fullmatch(name)} == set()


def test_a_sanitizer_sees_what_a_read_writes(tmp_path, sanitizers):
    """Under a sanitizer the core calls pread, and a read past the end of a buffer is found."""
    source = tmp_path / "overflow.c"
    source.write_text(OVERFLOW, encoding="ascii")
    program = build(tmp_path / "overflow", *sanitizers, source, *CORE)
    result = run(program)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "pread" in result.stderr
