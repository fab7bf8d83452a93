"""Rows that stand on public names alone, so that any two states of the package have them: JSON, {row: ns}.

`before_after.py` runs it with both. Each row is the fastest of several loops; files are written to memory.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest

CAPTURE = Path(__file__).parent.parent / "tests" / "data" / "captures" / "x86_64-6.1" / "vcpu0-after.bin"


def fastest(call, loops=1, *, rounds=7):
    """Nanoseconds of processor time of one call."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time_ns()
        for _ in range(loops):
            call()
        best = min(best, (time.process_time_ns() - start) / loops)
    return best


def main():
    """Measure a vCPU's file, and a run of 20,000 sweeps of eight."""
    with TinyGuest() as guest:
        vm, vcpu = guest.open_stats()
        out, data = np.empty(vcpu.schema.num_values, np.uint64), CAPTURE.read_bytes()
        x = kf.Sampler([vcpu] * 8).run(0, count=20_000)
        rows = {
            "StatsFile.read_into(out)": fastest(lambda: vcpu.read_into(out), 20_000),
            "StatsFile.read()": fastest(vcpu.read, 20_000),
            "StatsFile.snapshot()": fastest(vcpu.snapshot, 2000),
            "parse(data)": fastest(lambda: kf.parse(data), 2000),
            "x.rate(name)": fastest(lambda: x.rate("exits"), 3),
            "x.delta(histogram)": fastest(lambda: x.delta("halt_wait_hist"), 2),
            "x.figures()": fastest(x.figures),
            "x.histogram(name)": fastest(lambda: x.histogram("halt_wait_hist")),
            "x.to_arrow()": fastest(x.to_arrow),
            "x.to_pandas()": fastest(x.to_pandas, rounds=3),
        }
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            paths = (Path(folder, str(number)) for number in itertools.count())
            with kf.Recorder(recording := next(paths)) as recorder:
                for start in range(0, len(x), 1000):
                    recorder.write(x[start : start + 1000])
            rows["Samples.load(path)"] = fastest(lambda: kf.Samples.load(recording))
            rows["x.save(path)"] = fastest(lambda: x.save(next(paths)), rounds=5)
        for file in (vm, vcpu):
            file.close()
    print(json.dumps({f"public names, processor time: {row}": ns for row, ns in rows.items()}))


if __name__ == "__main__":
    main()
