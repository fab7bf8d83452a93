"""What verbs print of fixed input, to the letter; KVMSTATS_GOLDEN=1 writes the files anew."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import cli

CAPTURES = DATA / "captures" / "x86_64-6.1"
COUNT = (kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
STATS = [
    *(kf.Stat(name, *COUNT) for name in ("exits", "io_exits", "halt_exits", "hypercalls")),
    kf.Stat("halt_wait_ns", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 1, -1),
    kf.Stat("halt_wait_hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 20, -1),
    kf.Stat("pages_4k", kf.StatType.INSTANT, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
]


def made(scale):
    """A minute of two VMs, one of which has a name of wide characters, and exits that grow by `scale` a second."""
    steps = np.arange(61)[:, None] * np.array([[1, 2, 5]]) * scale
    buckets = np.zeros(20, np.int64)
    buckets[12:15] = 1, 3, 2
    values = {"exits": steps * 7, "io_exits": steps * 2, "halt_exits": steps * 4, "halt_wait_ns": steps * 10**6}
    values |= {"halt_wait_hist": steps[:, :, None] * buckets, "pages_4k": steps % 11}
    x = run_of(group_of(STATS, [0, 1, 2], values), wall_offset=1_790_000_000 * 10**9, interval=1.0, kernel="6.18.0")
    vms = ("web", "web", "\u65e5\u672c\u8a9e")
    vcpus = (0, 1, 0)
    x.files = tuple(
        replace(info, vm=vm, vcpu_id=vcpu, pid=1 + (vm != "web"), id=f"kvm-{index}/vcpu-{vcpu}")
        for index, (info, vm, vcpu) in enumerate(zip(x.files, vms, vcpus, strict=True))
    )
    return x


LINES = {
    "stat": ["stat", "a.npz"],
    "stat-per-vcpu": ["stat", "a.npz", "--per-vcpu", "-e", "*exits", "-e", "halt_wait_*"],
    "stat-intervals": ["stat", "a.npz", "-I", "20s", "-e", "exits"],
    "stat-csv": ["stat", "a.npz", "-x"],
    "stat-json": ["stat", "a.npz", "-j"],
    "stat-capture": ["stat", "vcpu0-after.bin"],
    "report-host": ["report", "a.npz", "b.npz", "--by", "host"],
    "compare": ["compare", "a.npz", "b.npz"],
    "list": ["list", "a.npz"],
    "list-csv": ["list", "vcpu0-after.bin", "-x"],
    "check": ["check", "vcpu0-after.bin"],
}


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("name", LINES)
def test_the_text_is_what_it_was(name, columns, tmp_path, capsys, monkeypatch):
    """In a terminal of 50 columns, and one of 80; what programs read is the same in both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    made(3).save("a.npz")
    later = made(4)
    later.time += 10 * 60 * 10**9
    later.save("b.npz")
    Path("vcpu0-after.bin").symlink_to(CAPTURES / "vcpu0-after.bin")
    assert cli.main(LINES[name]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    path = DATA / "cli" / (f"{name}.txt" if name.endswith(("csv", "json")) else f"{name}-{columns}.txt")
    if os.environ.get("KVMSTATS_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(out)
    assert out == path.read_text()
