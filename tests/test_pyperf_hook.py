"""The pyperf hook: what a guest counted per loop, in the metadata of each run, and pyperf works with it as before."""

import json
import os
import subprocess
import sys

import pytest

from kvmstats_fast.plugins import pyperf_hook
from kvmstats_fast.testing import SyntheticStats, exit_counter

pytest.importorskip("pyperf")

SCRIPT = """
import pyperf
from kvmstats_fast.plugins import pyperf_hook
from kvmstats_fast.testing import TinyGuest
guest = TinyGuest()
pyperf_hook.use(guest.open_stats())
runner = pyperf.Runner(values=3, warmups=2, processes=1, min_time=1e-6)
runner.bench_func("exits", guest.run, 20)
"""
FEW = ("--hook", "kvmstats", "--quiet")


def run_python(*arguments, **environment):
    """Run Python; pyperf warns of such short benchmarks, which is not looked at."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.real_vm
def test_each_run_has_what_a_loop_counted(tmp_path):
    """A guest of 20 exits per loop, end to end: calibration and warm-up are kept out, and compare_to works."""
    script, out = tmp_path / "bench.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    done = run_python(str(script), *FEW, "-o", str(out))
    assert done.returncode == 0, done.stderr
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    calibration, run = benchmark["runs"]
    assert not any(name.startswith("kvmstats_") for name in calibration["metadata"])
    counter = exit_counter() if exit_counter() == "io_exits" else "fpu_reload"
    assert run["metadata"][f"kvmstats_{counter}"] == 20.0
    assert run["metadata"]["kvmstats_values"] == len(run["values"]) == 3
    compared = run_python("-m", "pyperf", "compare_to", str(out), str(out))
    assert compared.returncode == 0, compared.stderr


@pytest.fixture
def hooked(resources, monkeypatch):
    """A made-up file that the hook counts, in a worker of 4 loops."""
    made = resources.enter_context(SyntheticStats("x86", "vcpu"))
    monkeypatch.setattr(pyperf_hook, "_files", [resources.enter_context(made.open())])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--loops", "9", "--worker", "--loops", "4"])
    return made


def work(made, *counts):
    """What pyperf does around values that count so much."""
    hook = pyperf_hook.Hook()
    for count in counts:
        with hook:
            made.add("exits", count)
        made.add("exits", 1000)
    return hook


def test_warm_ups_leave_nothing_behind(hooked):
    """The values' metadata takes the place of theirs; loops within a loop divide, too."""
    metadata = {"inner_loops": 5, "unit": "second"}
    work(hooked, 70).teardown(metadata)
    hooked.add("io_exits", 3)
    work(hooked, 40, 80).teardown(metadata)
    assert metadata == {"inner_loops": 5, "unit": "second", "kvmstats_values": 2, "kvmstats_exits": 120 / 2 / 4 / 5}


def test_calibration_tells_nothing(hooked, monkeypatch):
    """Its loops differ from value to value."""
    metadata = {}
    monkeypatch.setattr(sys, "argv", ["bench.py", "--worker", "--calibrate-loops"])
    work(hooked, 70).teardown(metadata)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--worker", "--loops", "4", "--recalibrate-loops"])
    work(hooked, 70).teardown(metadata)
    assert metadata == {}


def test_a_vm_is_named_by_the_environment(monkeypatch, holder):
    """What pyperf does not hand on is said."""
    monkeypatch.delenv("KVMSTATS_VM", raising=False)
    with pytest.raises(SystemExit, match=r"hook 'kvmstats': no VM is named: .* --inherit-environ=KVMSTATS_VM"):
        pyperf_hook.Hook()
    monkeypatch.setenv("KVMSTATS_VM", "no-such-guest")
    with pytest.raises(SystemExit, match=r"hook 'kvmstats': .*no-such-guest"):
        pyperf_hook.Hook()
    monkeypatch.setenv("KVMSTATS_VM", str(holder.pid))
    hook = pyperf_hook.Hook()
    with hook:
        pass
    monkeypatch.setattr(sys, "argv", ["bench.py", "--loops", "1"])
    hook.teardown({})
