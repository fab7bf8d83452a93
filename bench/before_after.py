"""Time the benchmarks of a commit with that commit's package and with this tree's, in turn, and print both.

``python bench/before_after.py COMMIT [ROUNDS [PYTEST_ARGUMENT...]]``. The benchmarks are those of the commit, so that
both packages are asked the same, and then `public_rows.py`. Both are installed as a wheel is; what they need is this
environment's. A round is a run of each, in another order each time: a row's ratio is the median over the rounds of what
stood side by side.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
ROWS = TREE / "bench" / "public_rows.py"


def install(source, target):
    """Build the package in a folder and unpack it into another."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([*command, source], check=True)


def measure(bench, package, arguments):
    """Run the benchmarks with this package; return {row: ns}."""
    with tempfile.NamedTemporaryFile(suffix=".json") as kept:
        # The package is found before the one that is installed here, whose pytest plugin it may not have.
        environment = os.environ | {"PYTHONPATH": str(package)}
        # The script, not -m pytest, which would look for the package where it is started.
        pytest = [str(Path(sys.executable).with_name("pytest")), "-q", "-c", bench.parent / "pyproject.toml"]
        options = ["-p", "no:kvmstats", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [*pytest, *options, f"--benchmark-json={kept.name}", bench, *arguments]
        run = subprocess.run(command, check=False, env=environment, cwd="/", stdout=subprocess.PIPE, text=True)
        for line in run.stdout.splitlines():
            # A benchmark may stand on an inner name that the other package does not have.
            if line.startswith(("ERROR ", "FAILED ")):
                print(f"with the package {package.name}: {line}", file=sys.stderr)
        benchmarks = json.loads(Path(kept.name).read_text())["benchmarks"]
    # Not as a file of the tree, whose folder would come first on the path.
    rows = [sys.executable, "-W", "ignore", "-c", f"import runpy; runpy.run_path({str(ROWS)!r}, run_name='__main__')"]
    told = subprocess.run(rows, check=True, env=environment, cwd="/", stdout=subprocess.PIPE, text=True).stdout
    return {row: values["ns"] for one in benchmarks for row, values in one["extra_info"].items()} | json.loads(told)


def main(commit, rounds="5", *arguments):
    """Print a line for each row that both have."""
    with tempfile.TemporaryDirectory() as folder:
        clone, *packages = (Path(folder, name) for name in ("clone", "before", "after"))
        subprocess.run(["git", "clone", "-q", "--no-checkout", TREE, clone], check=True)
        subprocess.run(["git", "checkout", "-q", commit], check=True, cwd=clone)
        for source, package in zip((clone, TREE), packages, strict=True):
            install(source, package)
        found = {package.name: [] for package in packages}
        for number in range(int(rounds)):
            for package in packages[:: 1 if number % 2 else -1]:
                found[package.name].append(measure(clone / "bench", package, arguments))
    for row in found["before"][0]:
        if not all(row in one for one in found["after"]):
            print(f"{row:<110} not run with the package after")
            continue
        before, after = ([one[row] for one in found[side]] for side in ("before", "after"))
        ratios = [new / old for new, old in zip(after, before, strict=True)]
        middle = statistics.median(ratios)
        print(
            f"{row:<110} {statistics.median(before):14.1f} {statistics.median(after):14.1f} ns"
            f" {middle:8.3g}x [{min(ratios):.3g}, {max(ratios):.3g}]" + (" slower" if middle > 1 else "")
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
