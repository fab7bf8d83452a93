"""The recipe for asv of docs/suites.md, in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmstats_fast.testing import exit_counter

RECIPE = Path(__file__).parents[1] / "docs" / "examples" / "asv_exits.py"
MACHINE = {"arch": "", "cpu": "", "machine": "here", "num_cpu": "", "os": "", "ram": ""}


@pytest.mark.needs("asv")
@pytest.mark.real_vm
def test_the_recipe_tracks_what_a_guest_counts(tmp_path):
    """The results of a commit have the exact count of each statistic."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    shutil.copy(RECIPE, tmp_path / "benchmarks" / "exits.py")
    suite = {
        "version": 1,
        "project": "guest",
        "repo": ".",
        "branches": ["HEAD"],
        "benchmark_dir": "benchmarks",
        "environment_type": "existing",
    }
    (tmp_path / "asv.conf.json").write_text(json.dumps(suite))
    (tmp_path / ".asv-machine.json").write_text(json.dumps({"version": 1, "here": MACHINE}))
    environment = os.environ | {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": os.devnull}

    def call(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    call("git", "init", "-q")
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    call("git", *name, "commit", "-q", "--allow-empty", "-m", "one")
    commit = call("git", "rev-parse", "HEAD")
    asv = (sys.executable, "-m", "asv", "run", "--machine", "here", "--quick", "--python=same")
    call(*asv, f"--set-commit-hash={commit}")
    (path,) = (tmp_path / "results" / "here").glob(f"{commit[:8]}*.json")
    result = json.loads(path.read_text())
    ((values, parameters, *_),) = result["results"].values()
    found = dict(zip((one.strip("'") for one in parameters[0]), values, strict=True))
    assert found["io_exits" if exit_counter() == "io_exits" else "fpu_reload"] == 20
