"""Every step with too little address space: the right result, or MemoryError.

python tests/short_of_memory.py [STEPS]     # of RLIMIT_AS, from 0 to 2 GiB more than the process has; default: 40

Most limits are low: above a few hundred MiB all is right.
"""

import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute  # noqa: F401 - before memory is short: modules that are loaded then are another matter
import pyarrow.parquet as pq
from helpers import forked

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

FILES, SWEEPS, BATCH = 48, 1500, 300
SHORT = 3  # exit status
HIGHEST = 2 << 30


class Room:
    """What the steps work with."""

    def __init__(self, folder):
        self.folder = folder
        self.made = SyntheticStats(vcpu_id=0)
        self.made.set("exits", 2**63 + 5)
        self.files = [self.made.open() for _ in range(FILES)]
        self.samples = kf.Sampler(self.files).run(0, count=SWEEPS)
        self.recording = folder / "recording"
        with kf.Recorder(self.recording, flush_seconds=0) as recorder:
            for start in range(0, SWEEPS, BATCH):
                recorder.write(self.samples[start : start + BATCH])
        kf.to_parquet(self.samples[:2], folder / "warm up")  # what is loaded when first used, of modules and in them
        self.samples[:2].save(folder / "warm up" / "recording")
        kf.Samples.load(folder / "warm up" / "recording")

    def open(self, _):
        """Open and read."""
        with self.made.open() as file:
            assert file.snapshot()["exits"] == 2**63 + 5

    def run(self, _):
        """Sample at once."""
        self._check(kf.Sampler(self.files).run(0, count=SWEEPS))

    def stream(self, _):
        """Sample in chunks."""
        with kf.Sampler(self.files).stream(0, chunk=BATCH, count=SWEEPS) as stream:
            chunks = list(stream)
        self._check(kf.Samples.concatenate(chunks))

    def record(self, path):
        """Record; what was written before memory was short can be read, which is looked at later."""
        with kf.Recorder(path, flush_seconds=0) as recorder:
            for start in range(0, SWEEPS, BATCH):
                recorder.write(self.samples[start : start + BATCH])

    def save(self, path):
        """Write a whole Samples."""
        self.samples.save(path)

    def load(self, _):
        """Read a compressed recording."""
        self._check(kf.Samples.load(self.recording))

    def to_parquet(self, path):
        """Convert a recording."""
        kf.to_parquet(self.recording, path)

    def to_csv(self, path):
        """Convert a part of it."""
        kf.to_csv(self.samples[:100], path)

    def _check(self, samples):
        assert len(samples) == SWEEPS
        assert samples["exits"].shape == (SWEEPS, FILES)
        assert samples["exits"].min() == samples["exits"].max() == 2**63 + 5

    def check_written(self, step, path, *, whole):
        """Look at what a step left on the disk, with enough memory."""
        if step == "record":
            read = sum(map(len, kf.Recording(path))) if path.exists() and list(path.iterdir()) else 0
            assert read == SWEEPS if whole else read % BATCH == 0
        elif step in ("save", "to_csv", "to_parquet"):
            assert not [one for one in self.folder.rglob("*.part") if one.is_file()]
            if not whole:
                assert step == "to_parquet" or not path.exists()
            elif step == "save":
                assert np.array_equal(kf.Samples.load(path)["exits"], self.samples["exits"])
            elif step == "to_csv":
                assert path.read_text().count("\n") == 100 * FILES + 1
            else:
                rows = sum(pq.ParquetFile(one).metadata.num_rows for one in path.rglob("*.parquet"))
                assert rows == SWEEPS * FILES


STEPS = ("open", "run", "stream", "record", "save", "load", "to_parquet", "to_csv")


def attempt(room, step, path, limit):
    """Do a step in a child whose address space may grow by `limit` bytes; return its exit status."""

    def work():
        signal.alarm(120)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + limit, resource.RLIM_INFINITY))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                getattr(room, step)(path)
        except MemoryError:
            os._exit(SHORT)

    return os.waitpid(forked(work), 0)[1]


def main(steps):
    """Run all steps at all limits."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder))
        for step in STEPS:
            came = Counter()
            for number in range(steps):
                path = Path(folder) / f"{step}{number}"
                status = attempt(room, step, path, round(HIGHEST * (number / max(steps - 1, 1)) ** 3))
                code = os.waitstatus_to_exitcode(status)
                came[{0: "right", SHORT: "MemoryError"}.get(code, f"status {code}")] += 1
                if code in (0, SHORT):
                    room.check_written(step, path, whole=code == 0)
                else:
                    failures += 1
            print(f"{step}: {dict(came)}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)))
