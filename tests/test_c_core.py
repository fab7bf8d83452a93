import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from kvmstats_fast.testing import SyntheticStats

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
_TOPICS = ("layout", "schedstat", "sweep", "run", "series", "process", "inject", "rename")
CORE = [str(CSRC / f"{name}.c") for name in _TOPICS]
STRICT = ["-Wconversion", "-Wshadow"]  # of the core, not of its tests
TEST_CORE = str(TESTS / "c" / "test_core.c")
TEST_RUN = str(TESTS / "c" / "test_run.c")
TEST_SERIES = str(TESTS / "c" / "test_series.c")
# What each is linked with.
TESTED = {TEST_CORE: ("layout", "schedstat", "sweep", "process"), TEST_RUN: ("layout", "schedstat", "sweep", "run")}
FUZZ_CORE = str(TESTS / "c" / "fuzz_core.c")
FUZZ_TARGETS = sorted((TESTS / "c").glob("fuzz_*.c"))
CAPTURES = sorted((TESTS / "data" / "captures").glob("*/*.bin"))

CC = shlex.split(os.environ.get("CC", "gcc"))
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-g", "-D_DEFAULT_SOURCE", "-pthread", f"-I{CSRC}"]
LARGE_FILES = "-D_FILE_OFFSET_BITS=64"
# The core as it is shipped: it makes the system call in place, which a seccomp filter intercepts.
SHIPPED = ["-fPIC", LARGE_FILES]
IN_PLACE = platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 2**32
NO_SECCOMP = 77
# The core calls pread, which the linker replaces; it is pread64 where glibc is told that files are large.
LIBC_PREAD = "-DKVMSTATS_LIBC_PREAD"
WRAP = "-Wl,--wrap=pread,--wrap=pread64"
# It calls pread under a sanitizer, too, without being told.
ADDRESSES = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-O1", "-fsanitize=thread"]
# The core is compiled as it is shipped; the long tests of it as fast as possible.
NOT_OPTIMIZED = "-O0"
# Rates are worked out four at once where the processor has AVX2, unless the core is told not to.
TWO_LANES = "-DKVMSTATS_TWO_LANES"
HAS_FOUR_LANES = platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text().split()

MUTATIONS = 50_000
SEED = 20210623

# Of the compiler, not of the core: checks of the stack, addresses, what a processor has, and arithmetic that it lacks.
HELPERS = re.compile(
    r"__stack_chk_(fail|fail_local|guard)|_GLOBAL_OFFSET_TABLE_|\.TOC\.|__x86\.\S+|__cpu_model"
    r"|__(u?div|u?mod|bswap)[sd]i[23]"
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
def compiled(tmp_path_factory):
    """compiled(source, *flags): its object file, made once."""
    folder = tmp_path_factory.mktemp("objects")

    @cache
    def compiled(source, *flags):
        number = len(list(folder.iterdir()))
        strict = STRICT if source in CORE else []
        return build(folder / f"{number}-{Path(source).stem}.o", *strict, *flags, "-c", source)

    return compiled


@pytest.fixture(scope="module")
def linked(tmp_path_factory, compiled):
    """linked(test, *flags): that test with the core that these flags make, linked once."""
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def linked(test, *flags):
        core = [compiled(str(CSRC / f"{name}.c"), *flags) for name in TESTED[test]]
        number = len(list(folder.iterdir()))
        if list(flags) == SHIPPED:
            return build(folder / f"{number}", *core, compiled(test, *flags, NOT_OPTIMIZED))
        test = compiled(test, *dict.fromkeys([*flags, LIBC_PREAD]), NOT_OPTIMIZED)
        return build(folder / f"{number}", *flags, *core, test, WRAP)

    return linked


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Skip where a program cannot be linked or run with AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("sanitizers")
    source, program = folder / "probe.c", folder / "probe"
    source.write_text("int main(void) { return 0; }\n", encoding="ascii")
    for command in ([*CC, *ADDRESSES, source, "-o", program], [program]):
        result = run(*command)
        if result.returncode:
            reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
            pytest.skip(f"no ASan and UBSan here: {reason}")


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
def symbols(compiled):
    """The core's files, compiled as the extension does: {file: [(type, name)]} of their symbols."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    result = {}
    for source in CORE:
        # The type is one letter, behind an address where there is one.
        lines = [line.split() for line in check(nm, compiled(source, *SHIPPED)).splitlines()]
        result[Path(source).name] = [(line[-2], line[-1]) for line in lines]
    return result


@pytest.mark.parametrize("large_files", [[], [LARGE_FILES]], ids=["default", "large-files"])
def test_the_core_keeps_its_manual(linked, large_files):
    """Headers, descriptors, values, reads and every error code are as kvmstats.h says, at the edge of memory."""
    assert core_checks(check(linked(TEST_CORE, LIBC_PREAD, *large_files))) > 1000


@pytest.mark.skipif(not IN_PLACE, reason="the core calls pread on this machine")
@pytest.mark.parametrize("test", [TEST_CORE, TEST_RUN], ids=["core", "run"])
def test_system_calls_in_place_keep_the_manual_too(linked, test):
    """Interruptions, pieces, early ends and errors of a system call that is made in place are those of pread."""
    result = run(linked(test, *SHIPPED))
    if result.returncode == NO_SECCOMP:
        pytest.skip(f"no seccomp filter that notifies: {result.stderr.strip()}")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    assert re.fullmatch(r"test_(core|run): \d+ checks\n", result.stdout)


@pytest.mark.usefixtures("sanitizers")
def test_the_core_is_clean_under_the_sanitizers(linked):
    """No check of the core has an invalid access or undefined behaviour."""
    assert core_checks(check(linked(TEST_CORE, *ADDRESSES))) > 1000


@pytest.mark.parametrize("test", [TEST_CORE, TEST_RUN], ids=["core", "run"])
def test_the_core_is_clean_under_valgrind(linked, test):
    """No check of the core uses an uninitialised value, accesses memory it does not own, or leaks."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("there is no valgrind")
    most_threads = ["4"] if test == TEST_RUN else []  # it runs one at a time, and is slow to hand on to the next of 64
    command = [valgrind, "--quiet", "--error-exitcode=99", "--leak-check=full", linked(test, LIBC_PREAD), *most_threads]
    output = check(*command)
    assert re.fullmatch(r"test_(core|run): \d{4,} checks\n", output)


@pytest.mark.usefixtures("sanitizers")
@pytest.mark.parametrize("way", ["plain", "sanitizers", "threads", "valgrind"])
@pytest.mark.parametrize("lanes", [4, 2])
def test_series_are_those_of_the_plainest_loops(tmp_path, compiled, way, lanes):
    """Changes, rates, resets and sums of any shape, to the last bit, at the edge of memory, and clean as above."""
    if lanes == 4 and not HAS_FOUR_LANES:
        pytest.skip("rates are worked out in four lanes on an x86-64 with AVX2 only")
    valgrind = shutil.which("valgrind") if way == "valgrind" else None
    if way == "valgrind" and valgrind is None:
        pytest.skip("there is no valgrind")
    flags = {"sanitizers": ADDRESSES, "threads": THREADS}.get(way, []) + ([TWO_LANES] if lanes == 2 else [])
    objects = [compiled(source, *flags) for source in (TEST_SERIES, str(CSRC / "series.c"))]
    program = build(tmp_path / "test_series", *flags, *objects)
    wrapper = [valgrind, "--quiet", "--error-exitcode=99"] if valgrind else []
    assert re.fullmatch(r"test_series: \d{6,} checks\n", check(*wrapper, program))


@pytest.mark.usefixtures("sanitizers")
@pytest.mark.parametrize("flags", [[LIBC_PREAD], THREADS, ADDRESSES], ids=["plain", "threads", "addresses"])
def test_runs_account_for_every_tick(linked, flags):
    """Sweeps and runs with up to 64 threads, a reader and a stopper keep their contract and have no data race."""
    match = re.fullmatch(r"test_run: (\d+) checks\n", check(linked(TEST_RUN, *flags)))
    assert match
    assert int(match[1]) > 1000


def fuzz(compiled, folder, *flags):
    """The fuzzer with its own main, and what it fuzzes."""
    objects = [compiled(FUZZ_CORE, "-DSTANDALONE", *flags), compiled(str(CSRC / "layout.c"), *flags)]
    return build(folder / "fuzz_core", *flags, *objects)


@pytest.mark.usefixtures("sanitizers")
def test_mutated_captures_break_no_promise(tmp_path, compiled, corpus):
    """However the bytes of a real file are changed, the core refuses it or reads it, and either by the contract."""
    output = check(fuzz(compiled, tmp_path, *ADDRESSES), MUTATIONS, SEED, *corpus)
    match = re.fullmatch(r"fuzz_core: (\d+) inputs, (\d+) accepted\n", output)
    assert match, output
    inputs, accepted = int(match[1]), int(match[2])
    assert inputs == MUTATIONS + len(corpus)
    # Mutations that all fail, or all pass, would test only half of the core.
    assert inputs // 10 < accepted < inputs * 9 // 10


def test_unmutated_captures_are_accepted(tmp_path, compiled, corpus):
    """The core accepts every real file, and the same statistics in each layout and byte order."""
    output = check(fuzz(compiled, tmp_path, LIBC_PREAD), 0, SEED, *corpus)
    assert output == f"fuzz_core: {len(corpus)} inputs, {len(corpus)} accepted\n"


@pytest.mark.parametrize("source", CORE, ids=lambda path: Path(path).name)
def test_the_core_compiles_without_a_warning(tmp_path, compiled, source):
    """With the strict warnings, and with either of the macros that declare the system's functions."""
    compiled(source, *SHIPPED)
    build(tmp_path / "nothing", *STRICT, LARGE_FILES, "-D_GNU_SOURCE", "-fsyntax-only", source)  # it only declares more


@pytest.mark.parametrize("target", FUZZ_TARGETS, ids=lambda path: path.stem)
def test_the_fuzz_targets_compile_without_a_main(tmp_path, target):
    """There is only the entry point that libFuzzer calls."""
    build(tmp_path / "nothing", "-c", target, "-fsyntax-only")


@pytest.mark.parametrize("source", IMPORTS)
def test_the_core_has_no_writable_data(symbols, source):
    """Two calls share nothing: no object file of the core has a writable variable."""
    assert [name for kind, name in symbols[source] if kind in "BbDdCcGgSs"] == []


@pytest.mark.parametrize("source", IMPORTS)
def test_the_core_imports_no_allocator(symbols, source):
    """The core calls the string functions, itself and the system: nothing that allocates, prints or locks."""
    imported = {name for kind, name in symbols[source] if kind in "Uwv"}
    assert {name for name in imported - STRING_FUNCTIONS - IMPORTS[source] if not HELPERS.fullmatch(name)} == set()


@pytest.mark.usefixtures("sanitizers")
def test_a_sanitizer_sees_what_a_read_writes(tmp_path, compiled):
    """Under a sanitizer the core calls pread, and a read past the end of a buffer is found."""
    source = tmp_path / "overflow.c"
    source.write_text(OVERFLOW, encoding="ascii")
    core = [compiled(str(CSRC / f"{name}.c"), *ADDRESSES) for name in TESTED[TEST_CORE]]
    result = run(build(tmp_path / "overflow", *ADDRESSES, source, *core))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "pread" in result.stderr
