"""What the guides show: each block of Python runs, kvmstats takes each command line, and all public names are there."""

import asyncio
import re
import shlex
import socket
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from holder import Holder
from large import duckdb, needs, polars

mpl.use("Agg")
import kvmstats_fast as kf
from kvmstats_fast import cli, export, plot, testing
from kvmstats_fast.testing import SyntheticStats, TinyGuest, make_samples

DOCS = Path(__file__).parents[1] / "docs"
#: What a page says in seconds and for ever, as a test says it. The rest of a block is run as it stands.
SHORTER = {
    "duration=10": "duration=0.05",
    "stream(interval=0.001": "stream(interval=0.001, duration=0.05",
    "interval=1,": "interval=0.02,",
    "kf.receive_files(connection)": "kf.receive_files(peer)",
}
#: Blocks that do nothing when they are run here, and which test runs what they show.
ELSEWHERE = {
    "@pytest.fixture": "test_pytest_plugin.py",
    "@pytest.mark.kvm_budget": "test_pytest_plugin.py",
    "pyperf_hook.use": "test_pyperf_hook.py",
    "start_http_server(": "test_export.py",
}


def blocks(language, *, least):
    """Each block of this language in the guides: a parameter each, named after its page and line."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            needs_vm = language == "python" and re.search(
                r"\b(attach|find_vms|follow|machine|vm_fd|time_shares)\b", match[1]
            )
            marks = [pytest.mark.real_vm] if needs_vm else []
            marks += needs(match[1]) if language == "python" else []
            found.append(pytest.param(match[1], id=f"{page.stem}-{line}", marks=marks))
    assert len(found) >= least
    return found


def run_of(host, vm, day="2026-11-27"):
    """A VM's samples from 14:00 on, as the guides date theirs."""
    kinds = ("vm", "vcpu", "vcpu")
    files = [SyntheticStats(kind=kind, vcpu_id=max(i - 1, 0), vm=vm, host=host, pid=7) for i, kind in enumerate(kinds)]
    ramp = np.arange(30)[:, None]
    halts = ramp[:, :, None] * np.ones(32, int)
    values = {"exits": ramp * 1000, "io_exits": ramp * 100, "halt_exits": ramp * 10, "halt_wait_ns": ramp * 1000}
    values |= {"halt_wait_hist": halts, "guest_mode": ramp % 2, "pages_4k": ramp}
    return make_samples(files, values, start=f"{day} 14:00")


def stop_soon(sampler):
    """Stop what an asyncio program awaits, once it has begun."""
    if not sampler.stop():
        asyncio.get_running_loop().call_later(0.05, stop_soon, sampler)


@pytest.fixture
def world(tmp_path, monkeypatch, request):
    """The names that the guides take for granted, in a folder where their recordings lie."""
    monkeypatch.chdir(tmp_path)
    x = run_of("node1", "web")
    for name in ("before.arrows", "after.arrows"):
        x.save(name)
    for number, vm in enumerate(("web", "db", "web-1")):
        with kf.Recorder(f"rec/{number}") as recorder:
            recorder.write(run_of("node1", vm, "2026-11-23"))
    names = {name: __import__(name) for name in ("asyncio", "pandas")}
    names |= {"kf": kf, "plot": plot, "Sampler": kf.Sampler, "x": x, "send": lambda *_: None, "work": lambda: None}
    names |= {"duckdb": duckdb, "polars": polars, "stop_soon": stop_soon}
    names |= {"boot": lambda _: None, "configurations": (1, 2), "results": {}, "handed": []}
    made = SyntheticStats(vm="web", host="node1", pid=7)
    names["files"] = [made.open()]
    names["sampler"] = kf.Sampler(names["files"])
    names["connection"], names["peer"] = socket.socketpair()
    opened = [*names["files"], names["connection"], names["peer"], made]
    if request.node.get_closest_marker("real_vm"):
        # Its one thread has a vCPU thread's name, so that the scheduler's numbers are had too.
        holder, guest = Holder(1, name="web", before='open("/proc/self/comm", "w").write("vcpu0")'), TinyGuest(2)
        names |= {"pid": holder.pid, "machine": kf.attach(holder.pid), "vm_fd": guest.vm_fd}
        names["vcpu_fds"] = guest.vcpu_fds
        opened += [names["machine"], guest]
        names["x"] = kf.Sampler(names["machine"], sched=True).run(0.001, count=20)
    yield names
    for one in [*opened, *names["files"]]:
        one.close()
    if "pid" in names:
        holder.end()


def record(x, block):
    """The recording that the block takes for granted, and the data sets that it reads and does not write."""
    if 'kf.Recorder("run1")' not in block:
        with kf.Recorder("run1") as recorder:
            recorder.write(x)
    if "to_parquet(" not in block:
        kf.to_parquet(x, "dataset")
        kf.to_parquet(x, "changes", values="delta")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what a block opens it leaves open
@pytest.mark.parametrize("block", blocks("python", least=30))
def test_each_block_of_python_runs(block, world):
    """As it stands, but for how long it takes."""
    if any(block.startswith(start) or start in block for start in ELSEWHERE):
        for start, test in ELSEWHERE.items():
            assert start not in block or (Path(__file__).parent / test).exists()
        compile(block, "block", "exec")
        return
    if not hasattr(pd.DataFrame, "from_arrow"):  # of pandas 3, as the block says
        block = re.sub(r"^pandas\.DataFrame\.from_arrow.*$", "", block, flags=re.MULTILINE)
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    record(world["x"], block)
    if "await" in block:
        body = "\n".join(f"    {line}" for line in block.splitlines())
        block = f"async def main():\n    stop_soon(sampler)\n{body}\nasyncio.run(main())\n"
    if "kf.follow" in block:
        block = block.replace('"web-*"', "None").replace("send(", "chunks.stop(); send(")
    try:
        exec(block, world)
    except PermissionError as error:
        if "priority=" not in block:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("block", blocks("sh", least=10))
def test_each_command_line_is_one_that_kvmstats_takes(block, capsys):
    """Its verbs and options are there. What they do has tests of its own."""
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "kvmstats":
            continue
        words = ["4242" if word == "PID" else word for word in words[1:]]
        words = words[: words.index("--")] if "--" in words else words
        try:
            cli.make_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")


def test_the_reference_has_every_public_name():
    """One made public, or taken away, is so in the reference."""
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")]
    named = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", "\n".join(pages), re.MULTILINE)
    assert len(named) == len(set(named))
    public = {*kf.__all__, *testing.__all__, *export.__all__}
    assert set(named) == public
