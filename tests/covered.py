"""Which lines of csrc and of the package the tests execute.

    python tests/covered.py [--only-c] [TEST...]      # arguments of pytest; without any, all tests

The C core is counted as its own tests and as Python call it (gcov), the package with the processes that tests start
(coverage.py). Both run in a copy of the tree, so that nothing of it is left here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOPICS = ("layout", "schedstat", "sweep", "run", "series", "process", "inject", "rename")
GCC = ("gcc", "-std=c11", "-D_DEFAULT_SOURCE", "-D_FILE_OFFSET_BITS=64", "-pthread", "-Icsrc", "--coverage", "-O0")
#: The command line, the plug-ins and what draws stand on the core; their share is printed by itself.
OUTER = ("cli", "plugins", "testing", "export", "plot.py", "__main__.py")
CONFIG = """
[run]
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
    for data in tree.rglob("*.gcda"):
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
    """Print a file a line, {name: (lines, those that were not executed)}, and all of them together."""
    total = missed = 0
    for name, (count, not_executed) in sorted(files.items()):
        total, missed = total + count, missed + len(not_executed)
        if not_executed:
            print(f"  {1 - len(not_executed) / count:6.1%}  {name}: not {ranges(not_executed)}")
    print(f"{title}: {1 - missed / total:.1%} of {total} lines")


def main(arguments):
    """Run as the first lines say."""
    only_c = "--only-c" in arguments
    tests = [one for one in arguments if one != "--only-c"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        names = run("git", "ls-files", "-z", cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split("\0")
        for name in filter(None, names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        build(tree)
        run_c_tests(tree)
        (tree / "coveragerc").write_text(CONFIG.format(tree=tree, root=ROOT), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tree), "COVERAGE_FILE": str(tree / ".coverage")}
        # A test whose time is limited may fail when lines are counted; they are counted all the same.
        coverage = (sys.executable, "-m", "coverage")
        pytest = ("run", "--rcfile=coveragerc", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        subprocess.run([*coverage, *pytest], cwd=tree, env=environment, check=False)
        counts = lines_of_c(tree)
        show(
            "csrc",
            {name: (len(lines), [n for n, count in lines.items() if not count]) for name, lines in counts.items()},
        )
        if only_c:
            return
        run(*coverage, "combine", "-q", "--rcfile=coveragerc", cwd=tree, env=environment)
        report = tree / "report.json"
        run(*coverage, "json", "-q", "--rcfile=coveragerc", "-o", report, cwd=tree, env=environment)
        core, outer = {}, {}
        for path, file in json.loads(report.read_text())["files"].items():
            parts = Path(path).relative_to(tree if Path(path).is_absolute() else ".").parts[1:]
            lines = len(file["executed_lines"]) + len(file["missing_lines"])
            if lines:
                (outer if parts[0] in OUTER else core)["/".join(parts)] = lines, file["missing_lines"]
        show("core rooms", core)
        if outer:
            show("command line, plug-ins, testing and plots", outer)


if __name__ == "__main__":
    main(sys.argv[1:])
