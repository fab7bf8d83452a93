"""Interleaved rounds and the table of their medians: a machine's speed drifts, so only neighbours compare."""

import json
import os
import platform
import statistics
import time
from pathlib import Path

ROUNDS = 31
ROWS = []


def per_call(call, loops):
    """Return the nanoseconds of one call, averaged over a loop."""
    start = time.perf_counter_ns()
    for _ in range(loops):
        call()
    return (time.perf_counter_ns() - start) / loops


def nothing():
    """Do nothing: what the loop itself costs."""


def compare(benchmark, title, contenders, loops=2000):
    """Compare Python calls; see `compare_timers`. The empty loop's cost is measured in each round and taken off."""
    empty = [0.0]

    def overhead():
        empty[0] = per_call(nothing, loops)
        return empty[0]

    for call, _ in contenders.values():
        per_call(call, max(1, loops // 10))
    timers = {
        label: (lambda call=call: per_call(call, loops) - empty[0], target)
        for label, (call, target) in contenders.items()
    }
    compare_timers(benchmark, title, timers, before=overhead)
    # pytest-benchmark's own record, for --benchmark-json and comparisons over time, is of the first call alone.
    benchmark.pedantic(next(iter(contenders.values()))[0], rounds=ROUNDS, iterations=loops)


def compare_timers(benchmark, title, timers, *, before=nothing, rounds=ROUNDS):
    """Run the timers in turn, `rounds` times, and keep their medians and their ratios to the first.

    timers: {label: (timer, target)}. A timer returns nanoseconds. target: ("at least" or "at most", ratio), or None. A
    ratio is taken within each round; the table has the median and the quartiles over all rounds.
    """
    times = {label: [] for label in timers}
    for _ in range(rounds):
        before()
        for label, (timer, _) in timers.items():
            times[label].append(timer())
    first = next(iter(timers))
    for label, values in times.items():
        ratios = [value / own for value, own in zip(values, times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        target = timers[label][1]
        verdict = ""
        if target:
            what, limit = target
            reached = middle >= limit if what == "at least" else middle <= limit
            verdict = f"{what} {limit}x: {'reached' if reached else 'MISSED'}"
        add(title, label, statistics.median(values), ratio=middle, quartiles=(low, high), verdict=verdict)
        benchmark.extra_info[f"{title}: {label}"] = {"ns": round(statistics.median(values), 1), "ratio": middle}


def add(title, label, ns, *, ratio=None, quartiles=None, verdict=""):  # noqa: PLR0913 - the columns of the table
    """Add a row to the table."""
    ROWS.append({"group": title, "what": label, "ns": ns, "ratio": ratio, "quartiles": quartiles, "verdict": verdict})


def machine():
    """Return the date, the machine and the versions."""
    names = (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = next((name for name in names if "CPU" in name or "Processor" in name), platform.machine())
    python = f"CPython {platform.python_version()}"
    return f"{time.strftime('%Y-%m-%d')}  {cpu}, {os.cpu_count()} CPUs, Linux {platform.release()}, {python}"


def lines():
    """Yield the table line by line: every row, those that lose too."""
    yield machine()
    yield "medians of interleaved rounds, an empty loop's cost taken off; ratio to the first row of a group [quartiles]"
    title = None
    for row in ROWS:
        if row["group"] != title:
            title = row["group"]
            yield ""
            yield title
        ratio = ""
        if row["ratio"] is not None:
            low, high = row["quartiles"]
            ratio = f"{row['ratio']:8.3g}x [{low:.3g}, {high:.3g}]"
        ns = "" if row["ns"] is None else f"{row['ns']:>11.0f} ns"
        yield f"  {row['what']:<46} {ns:>14}  {ratio:<26} {row['verdict']}".rstrip()


def write_json(path):
    """Write the table for programs."""
    Path(path).write_text(json.dumps({"machine": machine(), "rows": ROWS}, indent=1) + "\n", encoding="utf-8")
