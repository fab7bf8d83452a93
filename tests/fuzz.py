"""The C core under libFuzzer, with ASan and UBSan: whatever bytes it is given, it keeps the promises of its manuals.

    python tests/fuzz.py --seconds 60                        # shared by the targets
    python tests/fuzz.py --runs 50000000 --corpus FOLDER     # likewise; FOLDER keeps what was found
    python tests/fuzz.py --coverage --corpus FOLDER          # which lines of csrc the inputs of FOLDER reach

The targets are tests/c/fuzz_*.c. Real captures, and files made up in each layout and byte order, are where the parser's
inputs start from. What breaks a promise is left in the folder; the target's program runs it again. It takes clang.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kvmstats_fast.testing import SyntheticStats

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
FLAGS = ("-std=c11", "-D_DEFAULT_SOURCE", "-DKVMSTATS_LIBC_PREAD", "-g", "-O1", f"-I{CSRC}")
SANITIZERS = "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"
COVERAGE = "-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping"
SEED = 20210623


@dataclass(frozen=True)
class Target:
    """A fuzz target: its name, what it is linked with, the share of runs that is its, and the longest input."""

    name: str
    core: tuple[str, ...]
    share: float
    max_len: int
    flags: tuple[str, ...] = ()

    def build(self, folder, *flags):
        """Compile and link it; return the program."""
        program = folder / f"fuzz_{self.name}"
        sources = [TESTS / "c" / f"fuzz_{self.name}.c", *(CSRC / f"{one}.c" for one in self.core)]
        subprocess.run(["clang", *FLAGS, *flags, *self.flags, *sources, "-o", program], check=True)
        return program

    def run(self, folder, corpus, *limits):
        """Run it; return how many inputs that were, and what it printed if a promise was broken."""
        program = self.build(folder, *SANITIZERS)
        dictionary = TESTS / "c" / f"fuzz_{self.name}.dict"
        options = [f"-dict={dictionary}"] if dictionary.exists() else []
        options += [
            f"-max_len={self.max_len}",
            f"-seed={SEED}",
            "-timeout=20",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
        ]
        options += [f"-artifact_prefix={corpus}/broken-{self.name}-", *limits]
        done = subprocess.run([program, *options, corpus / self.name], stderr=subprocess.PIPE, text=True, check=False)
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        broken = done.returncode not in (0, 72)  # by Ctrl-C
        return int(count[1]) if count else 0, "\n".join(done.stderr.splitlines()[-60:]) if broken else ""


TARGETS = (
    Target("core", ("layout",), 0.5, 4608),
    Target("schedstat", ("schedstat",), 0.3, 100),
    Target("sweep", ("layout", "schedstat", "sweep"), 0.18, 256, ("-Wl,--wrap=pread",)),
    Target("series", ("series",), 0.02, 1024),
)


def fill(corpus):
    """Put what inputs start from into a folder for each target."""
    for target in TARGETS:
        (corpus / target.name).mkdir(parents=True, exist_ok=True)
    for path in sorted((TESTS / "data" / "captures").glob("*/*.bin")):
        shutil.copyfile(path, corpus / "core" / f"{path.parent.name}-{path.stem}")
    for kind, layout, byteorder in product(("vm", "vcpu"), ("merged", "v9", "v5", "v2"), ("little", "big")):
        with SyntheticStats("x86", kind, layout=layout, byteorder=byteorder) as made:
            (corpus / "core" / f"{kind}-{layout}-{byteorder}").write_bytes(made.to_bytes())
    (corpus / "schedstat" / "real").write_text("3561729011 25184231 1803\n", encoding="ascii")


def fuzz(folder, corpus, seconds, runs):
    """Run all targets, as many at once as there are processors; return whether no promise was broken."""
    fill(corpus)
    workers = min(len(TARGETS), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        jobs = []
        for target in TARGETS:
            each = max(1, round(seconds * workers / len(TARGETS))) if seconds else 0
            limit = f"-max_total_time={each}" if seconds else f"-runs={round(runs * target.share)}"
            jobs.append(pool.submit(target.run, folder, corpus, limit))
    good, total = True, 0
    for target, job in zip(TARGETS, jobs, strict=True):
        count, broken = job.result()
        good, total = good and not broken, total + count
        print(f"fuzz_{target.name}: {count:,} inputs{', a promise is broken' if broken else ''}")
        print(broken, end="", file=sys.stderr)
    print(f"{total:,} inputs in all")
    return good


def cover(folder, corpus):
    """Print the share of lines of csrc that the inputs of a corpus reach, and which they do not."""
    fill(corpus)
    programs, profile = [], folder / "profile"
    for target in TARGETS:
        programs.append(target.build(folder, *COVERAGE))
        environment = {**os.environ, "LLVM_PROFILE_FILE": str(folder / f"{target.name}.profraw")}
        command = [programs[-1], "-runs=0", f"-max_len={1 << 20}", corpus / target.name]
        subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
    subprocess.run(["llvm-profdata", "merge", "-o", profile, *folder.glob("*.profraw")], check=True)
    objects = [programs[0], *(word for one in programs[1:] for word in ("-object", one))]
    command = ["llvm-cov", "export", "-format=lcov", f"-instr-profile={profile}", *objects]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for path, text in re.findall(r"^SF:(.+)\n((?:.+\n)*?)end_of_record$", report, re.MULTILINE):
        if Path(path).parent.name == "csrc":
            lines = [(int(line), int(count)) for line, count in re.findall(r"^DA:(\d+),(\d+)", text, re.MULTILINE)]
            missed = [str(line) for line, count in lines if not count]
            print(f"{Path(path).name:12} {1 - len(missed) / len(lines):6.1%} of {len(lines)} lines", end="")
            print(f": not {', '.join(missed)}" if missed else "")


def main():
    """Run as the first lines say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--seconds", type=float, default=0)
    how.add_argument("--runs", type=int, default=0)
    how.add_argument("--coverage", action="store_true")
    parser.add_argument("--corpus", type=Path, help="a folder with an input a file for each target, which is kept")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpus = options.corpus or folder / "corpus"
        if options.coverage:
            cover(folder, corpus)
            return 0
        return 0 if fuzz(folder, corpus, options.seconds, options.runs) else 1


if __name__ == "__main__":
    sys.exit(main())
