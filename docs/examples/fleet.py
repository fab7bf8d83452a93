"""Rates and merged halt histograms of many hosts, with Dask, over a data set that kvmstats_fast.to_parquet wrote.

    python fleet.py DATASET         # a directory that has vcpu/date=.../*.parquet

Each recording is read by whichever worker is free; what travels is a few numbers for each of them. On a cluster pass
the address of its scheduler to ``Client``; here two worker processes are started on this machine.
"""

import itertools
import sys
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.distributed import Client, LocalCluster

import kvmstats_fast as kf
from kvmstats_fast.formats.origin import Origin

HISTOGRAM = "halt_wait_hist"
#: Whose a row is.
WHOSE = ["host", "vm", "vcpu"]


def recording_of(path: str) -> str:
    """Tell of which recording a file is: they are called DATE/HOST-RECORDING-KERNEL-NUMBER."""
    return Path(path).name.rpartition("-")[0]


def sum_recording(paths: list[str]) -> tuple[pd.DataFrame, kf.Histogram]:
    """Sum up exits and seconds of each vCPU in one recording, and what its halt histogram counted.

    It has a file for each day, and more if it is large. They are put together, because what happened from the last
    sweep in one of them to the first in the next is part of the sum.
    """
    files = [pq.ParquetFile(path) for path in paths]
    stat = Origin.decode(files[0].schema_arrow.metadata, paths[0]).stats[HISTOGRAM]
    table = pa.concat_tables([file.read(["host", "vm", "vcpu", "file", "time", "exits", HISTOGRAM]) for file in files])
    table = table.sort_by([("file", "ascending"), ("time", "ascending")])
    which = table["file"].to_numpy()
    time = table["time"].cast("int64").to_numpy()
    exits = table["exits"].to_numpy()
    counts = table[HISTOGRAM].combine_chunks().flatten().to_numpy().reshape(len(which), -1)
    # Changes are between neighbours of the same file.
    same = which[1:] == which[:-1]
    fell = exits[1:] < exits[:-1]  # cleared through debugfs: the new value is the change
    change = np.where(fell, exits[1:], exits[1:] - exits[:-1])[same]
    cleared = (counts[1:] < counts[:-1]).any(axis=1, keepdims=True)
    gained = np.where(cleared, counts[1:], counts[1:] - counts[:-1])[same]
    frame = table.select(WHOSE).to_pandas()[1:][same].assign(exits=change, ns=np.diff(time)[same])
    return frame.groupby(WHOSE).sum(), kf.Histogram(stat, gained.sum(axis=0))


def sum_fleet(paths: list[str]) -> tuple[pd.Series, kf.Histogram]:
    """Return exits per second by host, VM and vCPU, and the halt histogram of all of them."""
    recordings = [list(group) for _, group in itertools.groupby(sorted(paths, key=recording_of), recording_of)]
    parts = dask.compute(*(dask.delayed(sum_recording)(one) for one in recordings))
    sums = pd.concat([sums for sums, _ in parts]).groupby(WHOSE).sum()
    merged = parts[0][1]
    for _, histogram in parts[1:]:
        merged = merged + histogram
    return sums["exits"] / (sums["ns"] / 1e9), merged


def main(root: str) -> None:
    """Print both."""
    paths = sorted(map(str, Path(root).glob("vcpu/date=*/*.parquet")))
    if not paths:
        sys.exit(f"{root}: there is no vcpu/date=.../*.parquet, as kvmstats_fast.to_parquet writes")
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster):
        rates, merged = sum_fleet(paths)
    print(rates.to_string())
    low, high = merged.quantile(0.99)
    print(f"{merged}: 99 of 100 waits were shorter than {high} s, the 99th percentile is at least {low} s")


if __name__ == "__main__":
    main(sys.argv[1])
