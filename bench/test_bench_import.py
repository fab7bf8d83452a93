"""What a fresh interpreter pays for the package: processor time of whole processes, started in turn."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from table import compare_timers

ROUNDS = 31
# Installers compile what they install, and an interpreter keeps what it has compiled; under this variable each process
# would compile the package again, and numpy, which was installed, not.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
KVMSTATS = str(Path(sysconfig.get_path("scripts"), "kvmstats"))


def processor_ns(*command):
    """Processor time of a process, user and system, in ns."""
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1e9


def python(code):
    """A timer of Python with this code."""
    return lambda: processor_ns(sys.executable, "-c", code)


@pytest.mark.benchmark(group="import")
def test_import_against_numpy(benchmark):
    """The first name that needs numpy is to cost little more than numpy."""
    timers = {
        "import numpy": (python("import numpy"), None),
        "import kvmstats_fast; kvmstats_fast.StatsFile": (
            python("import kvmstats_fast; kvmstats_fast.StatsFile"),
            ("at most", 1.25),
        ),
        "from kvmstats_fast import *": (python("from kvmstats_fast import *"), None),
        "import kvmstats_fast": (python("import kvmstats_fast"), None),
        "pass": (python("pass"), None),
    }
    compare_timers(benchmark, "processor time of python -c ...", timers, rounds=ROUNDS)
    benchmark.pedantic(python("import kvmstats_fast"), rounds=3)


@pytest.mark.benchmark(group="import")
def test_help_against_argparse(benchmark):
    """The command line's help is to cost little more than its parser."""
    timers = {
        "python -c 'import argparse'": (python("import argparse"), None),
        "kvmstats --help": (lambda: processor_ns(KVMSTATS, "--help"), ("at most", 2)),
        "kvmstats list": (lambda: processor_ns(KVMSTATS, "list", "--json"), None),
    }
    compare_timers(benchmark, "processor time of a command", timers, rounds=ROUNDS)
    benchmark.pedantic(timers["kvmstats --help"][0], rounds=3)
