"""How big recordings of real guests get, and Parquet, for a vCPU and day; and what it takes to read them.

    python bench/how_big.py DIRECTORY [MINUTES]     # 1 Hz for so many (30), 100 Hz for a sixth, 1 kHz for a 30th

The idle guest is a QEMU with two vCPUs whose firmware has found nothing to boot; the busy one a TinyGuest of two, each
of which leaves the guest some thousand times a second. Recorded are all statistics, of the VM too, which is in the
figures of its vCPUs. What is measured in minutes is scaled to a day; what a file costs once is not in it.
"""

import random
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest

DAY = 86_400
QEMU = ["qemu-system-x86_64", "-accel", "kvm", "-smp", "2", "-display", "none", "-nodefaults", "-name", "idle"]
VCPUS = 2


def work(guest, over):
    """Keep a guest busy: bursts of exits, in turn on each vCPU, until it is over."""
    rng = random.Random(1)
    while not over.is_set():
        for vcpu in range(VCPUS):
            guest.run(rng.randrange(20, 400), vcpu)
        time.sleep(rng.uniform(0.01, 0.1))


def record(root, rate, seconds):
    """Record both guests at a rate, each in a recording of its own."""
    with ExitStack() as stack:
        idle = stack.enter_context(kf.launch(QEMU))
        time.sleep(10)  # for the firmware
        guest = stack.enter_context(TinyGuest(VCPUS))
        busy = [stack.enter_context(file) for file in guest.open_stats()]
        over = threading.Event()
        thread = threading.Thread(target=work, args=(guest, over))
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)
        sampler = kf.Sampler({"idle": idle.files, "busy": busy})
        recorders = {vm: stack.enter_context(kf.Recorder(root / f"{vm}-{rate}")) for vm in ("idle", "busy")}
        stream = stack.enter_context(sampler.stream(1 / rate, duration=seconds))
        for x in stream:
            for vm, recorder in recorders.items():
                recorder.write(x.select(vm=vm))
        idle.process.kill()


def size_of(root, pattern):
    """Return the bytes of all files there."""
    return sum(file.stat().st_size for file in root.rglob(pattern))


def timed(call):
    """Return the least seconds of processor time of three calls."""
    took = []
    for _ in range(3):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return min(took)


def measure(root, vm, rate):
    """Print what a recording takes, for a vCPU and day."""
    path, sets = root / f"{vm}-{rate}", root / "parquet" / f"{vm}-{rate}"
    x = kf.Samples.load(path)
    once = root / "once" / f"{vm}-{rate}"  # what a file costs once
    if not once.exists():
        once.parent.mkdir(exist_ok=True)
        x[:1].save(once, compression="zstd")
        x[:1].to_parquet(root / "once-parquet" / f"{vm}-{rate}")
        kf.to_parquet(path, sets)
    share = len(x) * x.interval / DAY * VCPUS
    recorded = (size_of(path, "*.arrows") - size_of(once, "*.arrows")) / share
    parquet = (size_of(sets, "*.parquet") - size_of(root / "once-parquet" / f"{vm}-{rate}", "*.parquet")) / share
    raw = sum(x.split()[0][name].nbytes for name in x.split()[0].names) + sum(x.vcpu[n].nbytes for n in x.vcpu.names)
    exits = float(np.mean(x.vcpu.mean_rate("exits")))
    load = timed(lambda: kf.Samples.load(path)) / share
    answer = timed(lambda: kf.open_recordings(path).mean_rate("exits")) / share
    sizes = f"{raw / share / 1e6:.0f} | {recorded / 1e6:.2f} | {parquet / 1e6:.2f}"
    print(f"| {vm}, {exits:.0f} exits/s | {rate} Hz | {sizes} | {load:.2f} | {answer:.3f} |", flush=True)


def main(root, minutes):
    """Record, and print a row for each guest and rate."""
    root.mkdir(parents=True, exist_ok=True)
    print("| guest | rate | MB of values | MB recorded | MB of Parquet | s to load | s for a rate |")
    print("|---|---|---|---|---|---|---|")
    for rate, part in ((1000, 30), (100, 6), (1, 1)):
        if not (root / f"busy-{rate}").exists():
            record(root, rate, minutes * 60 / part)
        for vm in ("idle", "busy"):
            measure(root, vm, rate)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 30.0)
