"""Nothing grows: every public call, hundreds of times."""

import gc
import os
import shutil
import socket
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, open_fds

import kvmstats_fast as kf
from kvmstats_fast.schedstat import Schedstat, with_thread
from kvmstats_fast.testing import SyntheticStats, make_samples

REAL = (DATA / "captures" / "x86_64-6.1" / "vcpu0-after.bin").read_bytes()
DEFECT = (DATA / "captures" / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes()
FILE = kf.StatsFile.from_bytes(REAL)
OUT = np.zeros(FILE.schema.num_values, np.uint64)
MADE = SyntheticStats()
SAMPLER = kf.Sampler([FILE])
SAMPLES = SAMPLER.run(0, count=10)
FEW = kf.Sampler([FILE], ["exits", "halt_wait_*", "blocking"]).run(0, count=10)
HISTOGRAM = SAMPLES.histogram("halt_wait_hist", -1)


def refused(call, *arguments, errors=kf.FormatError):
    """A call that must fail, by default with FormatError."""
    try:
        call(*arguments)
    except errors:
        return
    pytest.fail("not refused")


def open_and_close():
    with MADE.open() as file:
        file.read()


def capture_and_close():
    with kf.StatsFile.from_bytes(REAL) as file:
        file.read_into(OUT)


def schedule_statistics():
    opened = Schedstat.open(os.getpid(), os.getpid())
    FILE.handle.attach(opened)
    opened.read()


def hand_over():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kf.send_files(ours, [MADE] * 3)
        for file in kf.receive_files(theirs):
            file.close()


def hand_over_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kf.send_files(ours, [MADE, 0])
        refused(kf.receive_files, theirs, errors=(kf.FormatError, OSError))


#: Every public call, by the name of what it covers.
CALLS = {
    "parse": lambda: kf.parse(REAL)["exits"],
    "parse repair": lambda: kf.parse(DEFECT, repair=True),
    "parse refused": lambda: refused(kf.parse, REAL[:3000]),
    "StatsFile": open_and_close,
    "StatsFile.from_bytes": capture_and_close,
    "StatsFile.from_bytes refused": lambda: refused(kf.StatsFile.from_bytes, REAL[:3000]),
    "StatsFile.read": FILE.read,
    "StatsFile.read_into": lambda: FILE.read_into(OUT),
    "StatsFile.read_into another": lambda: FILE.read_into(np.empty(len(OUT), np.uint64)),
    "StatsFile.snapshot": lambda: FILE.snapshot(si=True),
    "Schema.select": lambda: FILE.schema.select("exits", "halt_*"),
    "Schema.unpack": lambda: FILE.schema.unpack(OUT),
    "Schema.fingerprint": lambda: FILE.schema.fingerprint,
    "Schema.matches": lambda: FILE.schema.matches("halt_*"),
    "Sampler": lambda: kf.Sampler([FILE], "halt_*"),
    "Schedstat": schedule_statistics,
    "with_thread": lambda: with_thread(FILE.schema),
    "Sampler.sweep": SAMPLER.sweep,
    "Sampler.view": lambda: SAMPLER.view("exits"),
    "Samples.delta": lambda: SAMPLES.delta("exits"),
    "Samples.rate": lambda: SAMPLES.rate("halt_wait_hist"),
    "Samples.rates": lambda: SAMPLES.rates("halt_*"),
    "Samples.resets": lambda: SAMPLES.resets("exits"),
    "Samples.si": lambda: SAMPLES.si("halt_wait_ns"),
    "Samples.histogram": lambda: SAMPLES.histogram("halt_wait_hist"),
    "Samples.duty_cycle": lambda: SAMPLES.duty_cycle("blocking"),
    "Samples.figures": lambda: str(SAMPLES.figures()),
    "Samples.halt_poll_advice": lambda: str(SAMPLES.halt_poll_advice()),
    "Samples.total": lambda: SAMPLES.total("exits"),
    "Samples.wall_time": lambda: SAMPLES.wall_time,
    "Samples.vms": lambda: SAMPLES.vms,
    "Samples.restrict": lambda: SAMPLES.restrict(SAMPLES.groups, range(len(SAMPLES.files))),
    "Samples.select": lambda: SAMPLES.select("exits", "halt_*", kind="vcpu"),
    "Samples.by_vm": SAMPLES.by_vm,
    "Samples.between": lambda: SAMPLES.between("2000-01-01", 0.5),
    "Samples.resample": lambda: SAMPLES.resample(1),
    "Samples.mean_rate": lambda: SAMPLES.mean_rate("exits"),
    "Samples.elapsed": lambda: SAMPLES.elapsed,
    "Samples.split": lambda: SAMPLES.split()[0]["exits"],
    "Samples slice": lambda: SAMPLES[2:8].vcpu["exits"],
    "Samples.concatenate": lambda: kf.Samples.concatenate([SAMPLES[:3], SAMPLES[3:]]),
    "make_samples": lambda: make_samples([MADE], {"exits": [[1], [2]]}),
    "send_files, receive_files": hand_over,
    "receive_files refused": hand_over_refused,
    "inherited_files": kf.inherited_files,
    "Stat.bucket_edges": FILE.schema["halt_wait_hist"].bucket_edges,
    "Stat.units": FILE.schema["halt_wait_ns"].units,
    "Stat.rate_units": lambda: FILE.schema["halt_wait_ns"].rate_units,
    "Stat.to_si": lambda: FILE.schema["halt_wait_ns"].to_si(OUT),
    "Stat.as_signed": lambda: FILE.schema["blocking"].as_signed(OUT),
    "Stat.scale_array": lambda: FILE.schema["halt_wait_ns"].scale_array(OUT),
    "Histogram": lambda: (HISTOGRAM + HISTOGRAM) - HISTOGRAM,
    "Histogram.sum": HISTOGRAM.sum,
    "Histogram.by": lambda: HISTOGRAM.by("vm"),
    "Histogram.to_dict": HISTOGRAM.to_dict,
    "Histogram.to_pandas": HISTOGRAM.to_pandas,
    "Histogram.quantile": lambda: HISTOGRAM[0].quantile(0.9),
    "Histogram.cdf": HISTOGRAM.cdf,
    "Histogram.mean_bounds": HISTOGRAM.mean_bounds,
    "Histogram.mean": lambda: HISTOGRAM.mean,
    "Histogram.total": lambda: HISTOGRAM.total,
    "Histogram.units": lambda: HISTOGRAM.units,
}
ROOM = Path(tempfile.mkdtemp())
FEW.save(ROOM / "load")
CALLS |= {
    "Samples.to_arrow": FEW.to_arrow,
    "Samples.to_pandas": FEW.to_pandas,
    "Samples.to_xarray": FEW.to_xarray,
    "Samples.to_csv": lambda: FEW.to_csv(ROOM / "x.csv", overwrite=True),
    "Samples.to_parquet": lambda: FEW.to_parquet(ROOM / "set", overwrite=True),
    "Samples.to_perfetto": lambda: FEW.to_perfetto(ROOM / "x.pftrace", overwrite=True),
    "Samples.save": lambda: FEW.save(ROOM / "run", overwrite=True),
    "Samples.load": lambda: kf.Samples.load(ROOM / "load")["exits"],
}
#: These take milliseconds.
SLOW = {"Samples.figures", "Samples.halt_poll_advice", "Samples.save", "Samples.load", "Histogram.to_pandas"}
SLOW |= {f"Samples.to_{name}" for name in ("arrow", "pandas", "xarray", "csv", "parquet", "perfetto")}


def grown(call, calls):
    """How many bytes so many calls leave behind, after others have filled what caches there are."""
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(50):
            call()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(calls):
            call()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.measures_memory
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_memory_and_no_fd_behind(name):
    """After a warm-up, 400 calls leave less than 8 bytes each, half of the smallest object, 50 slow ones less than 200
    (they go through caches of pyarrow and pandas that fill up and stay), and no fd.

    Tried up to five times, each with twice the calls: a leak grows with them, a pool of the interpreter's does not.
    """
    call = CALLS[name]
    call()
    gc.collect()  # what others left is theirs
    fds = open_fds()
    calls, room = (50, 200) if name in SLOW else (400, 8)
    assert any(grown(call, calls << doubled) < (calls << doubled) * room for doubled in range(5))
    assert open_fds() == fds


def test_every_public_method_is_in_the_list():
    """A new public call of these classes must be added here; plain attributes and open() are exempt."""
    exempt = {"close", "closed", "fileno", "header", "id", "kind", "vcpu_id", "open"}  # no work, or need a VM
    exempt |= {"keys", "values", "items", "get"}  # of Mapping
    exempt |= {"layout", "byteorder", "num_values", "dtype"}
    exempt |= {
        "is_histogram",
        "shape",
        "scale",
        "to_base_units",
        "unknown",
        "factor",
        "grows",
        "float_factor",
    }
    exempt |= {"stats", "places", "names", "vm", "vcpu", "stat", "columns"}
    exempt |= {"counts", "raw_total", "count", "edges", "files"}
    for cls in (kf.StatsFile, kf.Schema, kf.Stat, kf.Samples, kf.Histogram):
        slots = set(getattr(cls, "__slots__", ()))
        public = {name for name in dir(cls) if not name.startswith("_")} - slots - exempt
        missing = {name for name in public if f"{cls.__name__}.{name}" not in CALLS}
        assert not missing, cls


@pytest.fixture(scope="module", autouse=True)
def _close():
    """The files of this module are closed at its end. Until then the collector need not look at what is there now."""
    gc.collect()
    gc.freeze()
    yield
    FILE.close()
    MADE.close()
    shutil.rmtree(ROOM)
