"""Rates and merged halt histograms of many hosts, with Dask, over a data set that kvmstats_fast.to_parquet wrote.

    python fleet.py DATASET         # a directory that has vcpu/host=.../date=.../*.parquet

Each file is read by whichever worker is free; what travels is a few numbers for each file. On a cluster pass the
address of its scheduler to ``Client``; here two worker processes are started on this machine.
"""

import sys
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from dask.distributed import Client, LocalCluster

import kvmstats_fast as kf
from kvmstats_fast.formats.arrow import Origin

HISTOGRAM = "halt_wait_hist"


def of_one_file(path: str) -> tuple[pd.DataFrame, kf.Histogram]:
    """Sum up exits and seconds of each vCPU in one Parquet file, and what its halt histogram counted."""
    file = pq.ParquetFile(path)
    host = dict(part.split("=", 1) for part in path.split("/") if "=" in part)["host"]
    stat = Origin.decoded(file.schema_arrow.metadata, path).stats[HISTOGRAM]
    table = file.read(["file", "id", "time", "exits", HISTOGRAM])
    which = table["file"].to_numpy()
    time = table["time"].cast("int64").to_numpy()
    exits = table["exits"].to_numpy()
    counts = table[HISTOGRAM].combine_chunks().flatten().to_numpy().reshape(len(which), -1)
    # Rows are sorted by file, then time: changes are between neighbours of the same file.
    same = which[1:] == which[:-1]
    fell = exits[1:] < exits[:-1]  # cleared through debugfs: the new value is the change
    change = np.where(fell, exits[1:], exits[1:] - exits[:-1])[same]
    cleared = (counts[1:] < counts[:-1]).any(axis=1, keepdims=True)
    gained = np.where(cleared, counts[1:], counts[1:] - counts[:-1])[same]
    frame = pd.DataFrame({"id": table["id"].to_pandas()[1:][same], "exits": change, "ns": np.diff(time)[same]})
    sums = frame.groupby("id").sum().assign(host=host).set_index("host", append=True)
    return sums, kf.Histogram(stat, gained.sum(axis=0))


def of_fleet(paths: list[str]) -> tuple[pd.Series, kf.Histogram]:
    """Return exits per second by host and vCPU, and the halt histogram of all of them."""
    parts = dask.compute(*(dask.delayed(of_one_file)(path) for path in paths))
    sums = pd.concat([sums for sums, _ in parts]).groupby(["host", "id"]).sum()
    merged = parts[0][1]
    for _, histogram in parts[1:]:
        merged = merged + histogram
    return sums["exits"] / (sums["ns"] / 1e9), merged


def main(root: str) -> None:
    """Print both."""
    paths = sorted(map(str, Path(root).glob("vcpu/host=*/date=*/*.parquet")))
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster):
        rates, merged = of_fleet(paths)
    print(rates.to_string())
    low, high = merged.quantile(0.99)
    print(f"{merged}: 99 of 100 waits were shorter than {high} s, the 99th percentile is at least {low} s")


if __name__ == "__main__":
    main(sys.argv[1])
