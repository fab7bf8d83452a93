"""Three hosts of 40 vCPUs over three days at 1 Hz, made up: what a recording of them takes, and to ask it something.

    python bench/fleet.py DIRECTORY [DAYS]      # makes about 800 MB there, in some minutes; what is there is used again

Recorded are 20 statistics and two histograms, sweep by sweep as a recorder at 1 Hz is given them; and once in pieces
of ten minutes, for the size. Asked are the 99th percentile of halt waits and mean rates by VM, beside what pyarrow
takes to read the same columns, and do nothing with them. Each is a process of its own, in turn; medians.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats, make_samples

HOSTS, VMS, VCPUS = 3, 4, 10
DAY = 86_400
HISTOGRAMS = ["halt_wait_hist", "halt_poll_success_hist"]
RATES = ["exits", "halt_wait_ns"]
PIECE = 600
ROUNDS = 5


def statistics_of(schema):
    """Return 20 statistics of a vCPU, and the histograms."""
    single = [name for name, stat in schema.items() if not stat.shape and name not in RATES]
    return [*RATES, *single[:18], *HISTOGRAMS]


def make(host, sweeps, seed):
    """Give the samples of a host in pieces: a quarter of the vCPUs is idle, of the others 2 in 5 counters are."""
    rng = np.random.default_rng(seed)
    files = [
        SyntheticStats(vm=f"vm{vm}", vcpu_id=vcpu, pid=1000 + vm, host=host)
        for vm in range(VMS)
        for vcpu in range(VCPUS)
    ]
    schema = files[0].schema
    shapes = {name: (len(files), *schema[name].shape) for name in statistics_of(schema)}
    pace = {name: np.exp(rng.normal(5, 2, shape)) * (rng.random(shape) < 0.6) for name, shape in shapes.items()}
    for name in HISTOGRAMS:
        buckets = np.arange(shapes[name][-1])
        pace[name] = 300 * np.exp(-0.8 * (buckets - rng.integers(8, 20, (len(files), 1))) ** 2)
    for one in pace.values():
        one[::4] *= 0.01
    # Drawn once, and then taken in another order each time: drawing takes longer than recording.
    draws = {name: rng.poisson(one, (4 * PIECE, *one.shape)).astype(np.uint64) for name, one in pace.items()}
    counts = {name: rng.integers(0, 1 << 40, shape, np.uint64) for name, shape in shapes.items()}
    for first in range(0, sweeps, PIECE):
        order = rng.permutation(4 * PIECE)[: min(PIECE, sweeps - first)]
        values = {name: counts[name] + np.cumsum(draws[name][order], axis=0) for name in draws}
        counts = {name: value[-1] for name, value in values.items()}
        tick = np.arange(first, first + len(order), dtype=np.uint64)
        yield make_samples(files, values, start="2026-11-23T00:00Z", tick=tick, kernel="made up")


def record(root, days):
    """Record each host sweep by sweep, and in large pieces; return the bytes of both, and seconds for a host-day."""
    sizes, took = {"1": 0, "pieces": 0}, []
    for number in range(HOSTS):
        for way in sizes:
            path = root / way / f"host{number}"
            if not path.exists():
                start = time.process_time()
                with kf.Recorder(path) as recorder:
                    for piece in make(f"host{number}", round(days * DAY), number):
                        for part in [piece[i : i + 1] for i in range(len(piece))] if way == "1" else [piece]:
                            recorder.write(part)
                took.append((time.process_time() - start) / days)
            sizes[way] += sum(file.stat().st_size for file in path.iterdir())
    return sizes["1"], sizes["pieces"], took


MEASURED = """
import json, re, sys, time
from pathlib import Path
import numpy, pyarrow
import kvmstats_fast as kf
kf.open_recordings, kf.Histogram  # each library is loaded before it is timed
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
root = Path(sys.argv[1])
start, own = time.perf_counter_ns(), time.process_time_ns()
{body}
print(json.dumps([time.perf_counter_ns() - start, time.process_time_ns() - own, peak()]))
"""

ASK = """
r = kf.open_recordings(root)
waits = {vm: h.quantile(0.99) for vm, h in r.histogram("halt_wait_hist").items()}
rates = [r.mean_rate(name) for name in ("exits", "halt_wait_ns")]
assert len(waits) == len(rates[0]) == 12
"""

#: The same columns, with pyarrow alone: those of rows, the histogram, what adds it up, and the counter.
READ = """
for path in sorted(root.glob("*/*.arrows")):
    with pyarrow.memory_map(str(path)) as file:
        names = pyarrow.ipc.open_stream(file).schema.names
        wanted = ["time", "tick", "sweep_ns", "file", "halt_wait_hist", "halt_wait_ns", "exits"]
        file.seek(0)
        options = pyarrow.ipc.IpcReadOptions(included_fields=[names.index(name) for name in wanted])
        for batch in pyarrow.ipc.open_stream(file, options=options):
            pass
"""


def measure(body, root):
    """Return wall ns, processor ns, and peak MiB of a new process."""
    code = MEASURED.format(body=body)
    result = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def compare(root, rounds=ROUNDS):
    """Return the medians of (wall ns, processor ns, peak MiB) of asking and of reading, and of their ratios."""
    found = {ASK: [], READ: []}
    for number in range(rounds):
        for body in (ASK, READ) if number % 2 else (READ, ASK):
            found[body].append(measure(body, root))
    ask, read = ([statistics.median(column) for column in zip(*found[body], strict=True)] for body in (ASK, READ))
    ratios = [
        statistics.median(a[place] / b[place] for a, b in zip(found[ASK], found[READ], strict=True)) for place in (0, 1)
    ]
    return ask, read, ratios


def main(root, days):
    """Print it all."""
    size, pieces, took = record(root, days)
    vcpu_days = HOSTS * VMS * VCPUS * days
    print(f"{HOSTS} hosts of {VMS * VCPUS} vCPUs, {days:g} days at 1 Hz")
    if took:
        print(f"made and recorded in {statistics.median(took):.0f} s of processor time for a host and day")
    print(f"{size / 1e6:.1f} MB, {size / vcpu_days / 1e6:.2f} MB a vCPU and day; {size / pieces:.3f}x of large pieces")
    ask, read, (wall, own) = compare(root / "1")
    for label, (ns, processor, peak) in (("open_recordings, p99 by VM, rates by VM", ask), ("pyarrow reads", read)):
        print(f"{label:<40} {ns / 1e9:6.2f} s, {processor / 1e9:6.2f} s of processor time, peak {peak:4.0f} MiB")
    print(f"ratio {wall:.2f}, of processor time {own:.2f}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0)
