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


def turns(labels, number):
    """Return the labels in the order of round `number`: each is first, and each last, equally often."""
    labels = list(labels)
    first = number % len(labels)
    return labels[first:] + labels[:first]


def compare_timers(  # noqa: PLR0913 - what is compared, with what, and how often
    benchmark, title, timers, *, reference=None, before=nothing, rounds=ROUNDS, note=nothing
):
    """Run the timers in rounds, in another order each time, and keep their medians and their ratios to a reference.

    timers: {label: (timer, target)}. A timer returns nanoseconds. target: ("at least" or "at most", ratio), or with a
    label behind it: of that row, not of the reference; or None. reference: labels of which the fastest in a round is
    what its ratios are to; the first label by itself, if none are given. The table has the median of the rounds'
    ratios, and the quartiles. note: called at the end of each round; its last result is a remark in the title.
    """
    times = {label: [] for label in timers}
    for number in range(rounds):
        before()
        for label in turns(timers, number):
            times[label].append(timers[label][0]())
        remark = note()
    title += f"; {remark}" if remark else ""
    fastest = [min(values) for values in zip(*(times[label] for label in reference or list(times)[:1]), strict=True)]
    for label, values in times.items():
        low, middle, high = statistics.quantiles(ratios_of(values, fastest), n=4)
        verdict = judge(timers[label][1], values, fastest, times)
        add(title, label, statistics.median(values), ratio=middle, quartiles=(low, high), verdict=verdict)
        benchmark.extra_info[f"{title}: {label}"] = {"ns": round(statistics.median(values), 1), "ratio": middle}


def ratios_of(values, others):
    """Return the ratio in each round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def judge(target, values, fastest, times):
    """Say whether a row has reached its target; nothing if it has none."""
    if not target:
        return ""
    what, limit, *other = target
    middle = statistics.median(ratios_of(values, times[other[0]] if other else fastest))
    reached = "reached" if (middle >= limit if what == "at least" else middle <= limit) else "MISSED"
    return f"{what} {limit}x of {other[0]}: {middle:.3g}x, {reached}" if other else f"{what} {limit}x: {reached}"


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
    yield "medians of interleaved rounds in changing order, an empty loop's cost taken off; ratio [quartiles] to what"
    yield "is 1x: the first row of a group, or in each round the faster of its limits"
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
