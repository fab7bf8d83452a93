"""Which lines of csrc and of the package the tests execute.

    python tests/covered.py -n 2 --dist loadfile      # all tests; what follows are pytest's own arguments
    python tests/covered.py --of kvmstats_fast/vmm    # the lines of a room, by the tests that are about it
    python tests/covered.py --of csrc tests/test_inject.py

The C core is counted as its own tests and as Python call it (gcov), the package with the processes that tests start
(coverage.py). Both run in a copy of the tree, so that nothing of it is left here.

It takes Python 3.12 or later, whose `sys.monitoring` counts in each thread and beside any `sys.settrace`. A tracer, as
coverage.py is before, hears nothing of threads that start without `threading`, and no more once a test sets its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

from mutants import tests_about

ROOT = Path(__file__).parent.parent
TOPICS = ("layout", "schedstat", "sweep", "run", "series", "process", "inject", "rename")
GCC = ("gcc", "-std=c11", "-D_DEFAULT_SOURCE", "-D_FILE_OFFSET_BITS=64", "-pthread", "-Icsrc", "--coverage", "-O0")
#: The command line, the plug-ins and what draws stand on the core; their share is printed by itself.
OUTER = ("cli", "top", "plugins", "testing", "export", "plot.py", "__main__.py")
CONFIG = """
[run]
core = sysmon
source_pkgs = kvmstats_fast
parallel = true
branch = false
patch = subprocess, fork, _exit
sigterm = true
disable_warnings = no-data-collected, module-not-measured, module-not-imported
[paths]
# What a test starts without PYTHONPATH takes the package that is installed, which is the same.
package =
    {tree}
    {root}
[report]
exclude_also =
    if TYPE_CHECKING:
    @overload
"""
#: Python's own way to end without clean-up: what the core has counted is written down then, too.
SITE = """
import os, sys
end = os._exit
def dump_and_end(status):
    if "kvmstats_fast._kvmstats" in sys.modules:
        import ctypes
        ctypes.CDLL(sys.modules["kvmstats_fast._kvmstats"].__file__).covered_dump()
    end(status)
os._exit = dump_and_end
"""


def run(*command, **options):
    """Run a command, which must succeed."""
    return subprocess.run([str(word) for word in command], check=True, **options)


def build(tree):
    """Build the extension in the tree, with counters."""
    flags = {"CFLAGS": f"-include {tree}/tests/c/covered.h", "LDFLAGS": "-Wl,--wrap=_exit"}
    environment = {**os.environ, "KVMSTATS_COVERAGE": "1", **flags}
    command = (sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build")
    run(*command, cwd=tree, env=environment, stderr=subprocess.DEVNULL)
    for library in tree.glob("build/lib*/kvmstats_fast/*.so"):
        shutil.copy(library, tree / "kvmstats_fast")
    # Where it counts the hold library cannot stand alone.
    hold = tree / "kvmstats_fast/libkvmstats-hold.so"
    run(*GCC, "-fPIC", "-shared", "-fvisibility=hidden", "csrc/hold.c", "-o", hold, cwd=tree)
    (tree / "sitecustomize.py").write_text(SITE, encoding="ascii")
    for notes in tree.rglob("*.gcno"):
        notes.with_suffix(".gcda").touch()
        notes.with_suffix(".gcda").chmod(0o666)  # for tests that become another user


def run_c_tests(tree):
    """Build and run the C core's own tests with counters: what is shipped, and what calls pread."""
    for name, way in (("core", "pread"), ("run", "pread"), ("series", "place"), ("core", "place"), ("run", "place")):
        folder = tree / f"c-{name}-{way}"
        folder.mkdir()
        flags = ["-DKVMSTATS_LIBC_PREAD"] if way == "pread" else []
        objects = []
        for source in [f"tests/c/test_{name}.c", *(f"csrc/{topic}.c" for topic in TOPICS)]:
            objects.append(folder / f"{Path(source).stem}.o")
            run(*GCC, *flags, "-c", source, "-o", objects[-1], cwd=tree)
        wrap = ["-Wl,--wrap=pread,--wrap=pread64"] if flags else []
        run(*GCC, *objects, *wrap, "-o", folder / "test", cwd=tree)
        subprocess.run([folder / "test"], check=False, stdout=subprocess.DEVNULL)


def lines_of_c(tree):
    """Return, by file of csrc, how often each line was executed."""
    counts = defaultdict(Counter)
    for data in (one for one in tree.rglob("*.gcda") if one.stat().st_size):
        command = ("gcov", "--json-format", "--stdout", data)
        found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
        for one in map(json.loads, found.splitlines()):
            for file in one["files"]:
                if Path(file["file"]).parent.name == "csrc":
                    for line in file["lines"]:
                        counts[Path(file["file"]).name][line["line_number"]] += line["count"]
    return counts


def ranges(numbers):
    """Return 1-3, 7 of 1, 2, 3, 7."""
    found = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def show(title, files):
    """Print a file a line, {name: (lines, those that were not executed)}, each folder, and all of them together."""
    folders = defaultdict(lambda: [0, 0])
    for name, (count, not_executed) in sorted(files.items()):
        for folder in {str(Path(name).parent), title}:
            folders[folder][0] += count
            folders[folder][1] += len(not_executed)
        if not_executed:
            print(f"  {1 - len(not_executed) / count:6.1%}  {name}: not {ranges(not_executed)}")
    for folder, (count, missed) in folders.items():
        if folder != title:
            print(f"  {1 - missed / count:6.1%} of {count:5} lines: {folder}")
    count, missed = folders[title]
    print(f"{title}: {1 - missed / count:.1%} of {count} lines")


def main():
    """Run as the first lines say."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--of", default="", help="only these files, by the beginning of their path")
    given, arguments = options.parse_known_args()
    if sys.version_info < (3, 12):
        options.error("it takes Python 3.12 or later")
    names = run("git", "ls-files", "-z", cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    if given.of and not any(one.startswith("tests/") for one in arguments):
        about = [tests_about(name) for name in names if name.startswith(given.of)]
        arguments += dict.fromkeys(chain.from_iterable(about))
    with tempfile.TemporaryDirectory() as folder:
        tree, data = Path(folder) / "tree", Path(folder) / "data"
        data.mkdir()
        for one, mode in ((Path(folder), 0o755), (data, 0o777)):
            one.chmod(mode)  # for these tests, too
        for name in filter(None, names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        build(tree)
        run_c_tests(tree)
        (tree / "coveragerc").write_text(CONFIG.format(tree=tree, root=ROOT), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tree), "COVERAGE_FILE": str(data / "coverage")}
        # A test may fail whose time is limited, or that looks at what was built; its lines are counted all the same.
        coverage = (sys.executable, "-m", "coverage")
        pytest = ("run", "--rcfile=coveragerc", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        subprocess.run([*coverage, *pytest], cwd=tree, env=environment, check=False)
        run(*coverage, "combine", "-q", "--rcfile=coveragerc", cwd=tree, env=environment)
        report = tree / "report.json"
        run(*coverage, "json", "-q", "--rcfile=coveragerc", "-o", report, cwd=tree, env=environment)
        found = {
            f"csrc/{name}": (len(lines), [number for number, count in lines.items() if not count])
            for name, lines in lines_of_c(tree).items()
        }
        for path, file in json.loads(report.read_text())["files"].items():
            name = str(Path(path).relative_to(tree if Path(path).is_absolute() else "."))
            if lines := len(file["executed_lines"]) + len(file["missing_lines"]):
                found[name] = lines, file["missing_lines"]
        rooms = defaultdict(dict)
        for name, lines in found.items():
            where = name.split("/")
            title = "csrc" if where[0] == "csrc" else "the rooms around" if where[1] in OUTER else "core rooms"
            if name.startswith(given.of):
                rooms[title][name] = lines
        for title, files in rooms.items():
            show(title, files)


if __name__ == "__main__":
    main()
