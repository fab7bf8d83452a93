"""Interleaved rounds, and the table they make: this machine's speed drifts, so only neighbours compare."""

import os
import platform
import statistics
import time
from pathlib import Path

ROUNDS = 31
ROWS = []


def per_call(call, loops):
    """Nanoseconds of one call, over a loop of them."""
    start = time.perf_counter_ns()
    for _ in range(loops):
        call()
    return (time.perf_counter_ns() - start) / loops


def compare(benchmark, title, contenders, loops=2000):
    """Time the contenders in turn, ROUNDS times, and keep their medians and the ratios to the first.

    contenders: {label: (call, target)}; the first is ours. target: our ratio to reach (rival / ours), or None. The
    ratio is the median over the rounds of what stood side by side in a round, with its quartiles. The loop's own cost
    is measured in the same rounds and taken off everything alike.
    """
    calls = {"(empty loop)": lambda: None} | {label: call for label, (call, _) in contenders.items()}
    times = {label: [] for label in calls}
    for call in calls.values():
        per_call(call, loops // 10)
    for _ in range(ROUNDS):
        for label, call in calls.items():
            times[label].append(per_call(call, loops))
    empty = times.pop("(empty loop)")
    times = {label: [ns - e for ns, e in zip(values, empty, strict=True)] for label, values in times.items()}
    ours = next(iter(contenders))
    for label, values in times.items():
        ratios = [value / own for value, own in zip(values, times[ours], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        target = contenders[label][1]
        verdict = "" if target is None else ("reached" if middle >= target else "MISSED")
        row = (title, label, statistics.median(values), middle, low, high, target, verdict)
        ROWS.append(row)
        benchmark.extra_info[label] = {"ns": round(row[2], 1), "ratio": round(middle, 3)}
    # pytest-benchmark's own record, for --benchmark-json and comparisons over time, is of our call alone.
    benchmark.pedantic(calls[ours], rounds=ROUNDS, iterations=loops)


def note(title, label, ns, limit_ns):
    """A row that has a limit in nanoseconds instead of a rival."""
    verdict = "reached" if ns <= limit_ns else "MISSED"
    ROWS.append((title, label, ns, None, None, None, None, f"to stay under {limit_ns:.0f} ns: {verdict}"))


def lines():
    """Give the table, line by line: every row, those that lose too."""
    names = (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = next((name for name in names if "CPU" in name or "Processor" in name), platform.machine())
    python = f"CPython {platform.python_version()}"
    yield f"{time.strftime('%Y-%m-%d')}  {cpu}, {os.cpu_count()} CPUs, Linux {platform.release()}, {python}"
    yield f"median of {ROUNDS} interleaved rounds, the empty loop's cost taken off; ratio to the first row [quartiles]"
    title = None
    for group, label, ns, ratio, low, high, target, verdict in ROWS:
        if group != title:
            yield ""
            yield group
            title = group
        ratios = "" if ratio is None else f"{ratio:7.2f}x [{low:.2f}, {high:.2f}]"
        aim = f"to reach {target}x: {verdict}" if target else verdict
        yield f"  {label:<46} {ns:>10.0f} ns  {ratios:<24}  {aim}".rstrip()
