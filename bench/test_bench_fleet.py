"""A tenth of three days of three hosts: what asking many recordings takes, and their size. See fleet.py."""

import fleet
import table


def test_fleet(benchmark, tmp_path):
    """The 99th percentile of halt waits and mean rates by VM, beside pyarrow reading the same columns."""
    days = 0.3
    size, pieces, _ = fleet.record(tmp_path, days)
    ask, read, (ratio, of_processor) = fleet.compare(tmp_path / "1", 3)
    title = f"{fleet.HOSTS} hosts of {fleet.VMS * fleet.VCPUS} vCPUs, {days:g} days at 1 Hz, {size / 1e6:.0f} MB"
    table.add(title, "limit: pyarrow reads the columns", read[0], verdict=f"peak memory {read[2]:.0f} MiB")
    reached = "reached" if ratio <= 2 else "MISSED"
    text = (
        f"{ratio:.2f}x, {of_processor:.2f}x of its processor time, at most 2x: {reached}; peak memory {ask[2]:.0f} MiB"
    )
    table.add(title, "open_recordings, p99 and rates by VM", ask[0], verdict=text)
    ratio = size / pieces
    reached = "reached" if ratio <= 1.2 else "MISSED"
    table.add(
        title, "bytes, written sweep by sweep", None, verdict=f"{ratio:.3f}x of large pieces, at most 1.2x: {reached}"
    )
    benchmark.pedantic(lambda: fleet.measure(fleet.ASK, tmp_path / "1"), rounds=1)
