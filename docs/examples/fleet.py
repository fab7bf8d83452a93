"""Rates and merged halt histograms of many hosts, with Dask, over a data set that kvmstats_fast.to_parquet wrote.

    python fleet.py DATASET         # a directory that has vcpu/date=.../*.parquet

Each host is asked by whichever worker is free; what travels is a few numbers for each of them. On a cluster pass the
address of its scheduler to ``Client``; here two worker processes are started on this machine. One process would do
the same in one line each: ``kf.open_recordings("DATASET").mean_rate("exits", by="vcpu")``.
"""

import sys
from collections import defaultdict
from functools import reduce
from operator import add
from pathlib import Path

import dask
from dask.distributed import Client, LocalCluster

import kvmstats_fast as kf

HISTOGRAM = "halt_wait_hist"


def host_of(path: str) -> str:
    """Tell of which host a file is: they are called HOST-RECORDING-KERNEL-NUMBER.parquet."""
    return Path(path).name.rsplit("-", 3)[0]


def ask_host(paths: list[str]) -> tuple[dict[tuple[str, str], float], kf.Histogram]:
    """Return exits per second of each vCPU of a host, and what its halt histograms counted, over all its recordings."""
    r = kf.open_recordings(paths)
    rates = {(r.hosts[0], vcpu): rate for vcpu, rate in r.mean_rate("exits", by="vcpu").items()}
    return rates, r.histogram(HISTOGRAM, by=None)


def ask_fleet(paths: list[str]) -> tuple[dict[tuple[str, str], float], kf.Histogram]:
    """Return exits per second by host and vCPU, and the halt histogram of all of them."""
    by_host = defaultdict(list)
    for path in paths:
        by_host[host_of(path)].append(path)
    answers = dask.compute(*(dask.delayed(ask_host)(of_host) for of_host in by_host.values()))
    rates = {whose: rate for of_host, _ in answers for whose, rate in of_host.items()}
    return rates, reduce(add, (histogram for _, histogram in answers))


def main(root: str) -> None:
    """Print both."""
    paths = sorted(map(str, Path(root).glob("vcpu/date=*/*.parquet")))
    if not paths:
        sys.exit(f"{root}: there is no vcpu/date=.../*.parquet, as kvmstats_fast.to_parquet writes")
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster):
        rates, merged = ask_fleet(paths)
    print(f"{'host':<20} {'vCPU':<20} {'exits/s':>12}")
    for (host, vcpu), rate in sorted(rates.items()):
        print(f"{host:<20} {vcpu:<20} {rate:>12.1f}")
    low, high = merged.quantile(0.99)
    print(f"{merged}: 99 of 100 waits were shorter than {high} s, the 99th percentile is at least {low} s")


if __name__ == "__main__":
    main(sys.argv[1])
