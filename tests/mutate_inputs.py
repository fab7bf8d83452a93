"""Whatever comes from outside, damaged or lying, into Python: only documented errors may come out.

    python tests/mutate_inputs.py COUNT [FIRST]     # each number is one input; a failure prints its number
    python tests/mutate_inputs.py --one NUMBER      # that one again, with its traceback

Of 100 inputs 55 are stats files (parse, from_bytes, to_merged, the rules of the format), 15 hand-over messages, 15
command lines, 10 texts of times and conditions, 5 recordings (`mutate_recordings`). Each has 20 seconds of a
processor, the process 2 GiB of address space more than it starts with; no fd may stay open.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
from array import array
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import mutate_recordings
import numpy as np
from mutate_recordings import ADDRESS_SPACE, SECONDS, change_bytes, limit_time

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.conformance import check_file
from kvmstats_fast.sampling.flight import Condition
from kvmstats_fast.spans import Span
from kvmstats_fast.testing import SyntheticStats

CAPTURES = Path(__file__).parent / "data" / "captures"
#: What fields of a stats file hold, and numbers at the ends.
FIELDS = (
    0, 1, 2, 7, 8, 16, 24, 29, 32, 48, 64, 72, 80, 1392, 1472, 4096, 4097, 65535, 65536, 2**24, 2**28, 2**31, 2**32 - 8,
)  # fmt: skip
WORDS = (
    "", "-", "--", "-e", "exits", "halt_*", "[", "-I", "100us", "1ms", "0", "-1", "1e999", "nan", "1h", "9" * 30,
    "-d", "10s", "-n", "3", "--vcpu", "0-3,7", "7-3", "0-99999", "-j", "-x", ";", "ab", "-z", "--per-vcpu", "--by",
    "vm", "--kind", "vcpu", "--to", "csv", "parquet", "arrows", "merged", "npz", "perfetto", "--when", "exits>5/s",
    "halted_fraction<5%", "--before", "--after", "--rotate", "100M", "--keep", "--per", "io_exits", "--confidence",
    "0.95", "2", "--step", "--start", "2026-11-27 14:00", "--stop", "\udcff", "é", "\x1b[2J", "--force",
    "--events=exits", "--json=1", "@x", "%s", "{}",
)  # fmt: skip
TIMES = (
    "2026-11-27", "2026-11-27 14:00", "2026-11-27T14:00:05.123456789+01:00", "0001-01-01", "9999-12-31T23:59:59Z",
    "NaT",
)  # fmt: skip
CONDITIONS = ("exits>50000/s", "halted_fraction<5%", "x > 1e9", "a<1e9999", "exits>0", "no_such<1")


class Originals:
    """What the inputs are made from."""

    def __init__(self, room):
        self.room = room
        self.stats_files = [
            path.read_bytes() for path in sorted(CAPTURES.glob("*/*.bin")) if path.stat().st_size < 10_000
        ]
        kinds = product(("x86", "s390"), ("vm", "vcpu"), ("merged", "v9", "v5", "v2"), ("little", "big"))
        for arch, kind, layout, byteorder in kinds:
            with SyntheticStats(arch, kind, layout=layout, byteorder=byteorder) as one:
                self.stats_files.append(one.to_bytes())
        self.recorded = mutate_recordings.Originals(room)
        samples = mutate_recordings.sample()
        samples.save(room / "x.npz")

        (room / "capture").write_bytes(self.stats_files[0])
        self.samples = samples
        self.made = [SyntheticStats("x86", "vcpu", vcpu_id=i) for i in range(3)]


# ---- stats files


def change_stats_file(rng, raw):
    """Return a stats file with some of its fields changed, or any bytes."""
    if rng.random() < 0.3:
        return change_bytes(rng, raw)
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # in the header, in a descriptor's first words, or anywhere
        at = rng.choice(
            (
                rng.randrange(0, 88, 4),
                72 + 64 * rng.randrange(30) + rng.randrange(0, 20, 2),
                rng.randrange(len(raw) or 1),
            )
        )
        width, order = rng.choice((2, 4, 4, 8)), rng.choice("<>")
        value = rng.choice(FIELDS) if rng.random() < 0.8 else rng.getrandbits(32)
        if at + width <= len(raw):
            struct.pack_into(f"{order}{ {2: 'H', 4: 'I', 8: 'Q'}[width] }", raw, at, value & (1 << 8 * width) - 1)
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw) + 1) :]
    return bytes(raw)


def read_stats_file(rng, originals):
    """Parse it in every way that there is."""
    raw = change_stats_file(rng, rng.choice(originals.stats_files))
    findings = check_file(lambda size, offset: raw[offset : offset + size])
    assert len(findings) == 26
    image = kf.parse(raw, repair=rng.random() < 0.2)
    repr(image), image.id, dict.fromkeys(image)
    if image.values is not None:
        image.snapshot(si=rng.random() < 0.5)
        merged = kf.parse(kf.to_merged(raw))
        assert (merged.values == image.values).all()
        if rng.random() < 0.2:
            with kf.StatsFile.from_bytes(raw) as file:
                assert (file.read() == image.values).all()
                file.snapshot()
    return "parsed"


# ---- hand-over messages


def receive_messages(rng, originals):
    """Send what may be a hand-over, with fds of any kind, and receive it."""
    count = rng.choice((0, 1, 2, 3))
    fds_and_more = [(1, count - 1 - i) for i in range(count)] or [(0, 0)]
    messages = [bytearray(struct.pack("=8sHHI", b"KVMSTATS", 1, *numbers)) for numbers in fds_and_more]
    for message in messages:
        if rng.random() < 0.4:
            message[:] = change_bytes(rng, message)
    if rng.random() < 0.2:
        rng.shuffle(messages)
    odd = [os.open("/dev/null", os.O_RDONLY), os.memfd_create("x"), *os.pipe()]
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for message in messages:
                good = rng.random() < 0.8
                fds = (
                    [one.fileno() for one in rng.sample(originals.made, 1)]
                    if good
                    else rng.sample(odd, rng.randrange(4))
                )
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds and count else []
                cut = rng.randrange(len(message) + 1) if rng.random() < 0.2 else len(message)
                if message[:cut]:
                    theirs.sendmsg([message[:cut]], control)
                if message[cut:]:
                    theirs.sendall(message[cut:])
            theirs.shutdown(socket.SHUT_WR)
            try:
                files = kf.receive_files(ours, timeout=5)
            except OSError as error:
                return f"not received: {type(error).__name__} {error.errno}"  # a pipe, a device
            for file in files:
                with file:
                    file.snapshot()
    finally:
        for fd in odd:
            os.close(fd)
    return "received"


# ---- command lines, times and conditions


@cache
def parser():
    """The command line's, of all verbs."""
    return cli.make_parser()


def run_command_line(rng, originals):
    """Parse a command line; run it if it is about files."""
    verb = rng.choice(("stat", "report", "compare", "convert", "check", "capture", "record", "list", "demo", "run"))
    words = [verb, *rng.choices(WORDS, k=rng.randrange(6))]
    files = rng.sample(["x.npz", "capture", "a", "b", "runs", "set", "tail", "."], rng.choice((1, 1, 2)))
    for file in files:
        words.insert(rng.randrange(1, len(words) + 1), file)
    if verb == "convert" and rng.random() < 0.8:
        words += ["-o", rng.choice(("out.csv", "out.npz", "out", "out.parquet", "out.merged"))]
    if rng.random() < 0.3:
        at = rng.randrange(1, len(words))
        raw = change_bytes(rng, words[at].encode(errors="surrogateescape"))
        # No argument has a NUL, and nothing is to be written elsewhere.
        words[at] = raw.translate(None, b"\0/").decode(errors="surrogateescape")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            arguments = parser().parse_args(words)
            about_files = bool(getattr(arguments, "file", None)) and not any(
                getattr(arguments, name, None) for name in ("pid", "guest", "socket", "inject", "command")
            )
            of_files = verb in ("stat", "report", "compare", "convert", "check") and "--" not in words  # runs a command
            if not (of_files and about_files) or rng.random() < 0.8:
                return "command line parsed"
            status = cli.main(words)
        except SystemExit as end:
            return f"command line refused, status {end.code}"
    for path in originals.room.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert status in (0, 1, 2), status
    return f"command line run, status {status}"


def read_text(rng, originals):
    """Read a time or a condition."""
    about_time = rng.random() < 0.5
    text = rng.choice(TIMES if about_time else CONDITIONS)
    if rng.random() < 0.9:
        text = change_bytes(rng, text.encode()).decode(errors=rng.choice(("replace", "surrogateescape")))
    try:
        if about_time:
            value = rng.choice(
                (
                    text,
                    text,
                    rng.choice(mutate_recordings.NUMBERS),
                    np.datetime64(rng.choice((0, 2**62, -(2**63))), "ns"),
                )
            )
            Span.of(*rng.sample([value, None], 2))
            originals.samples.between(value)
        else:
            Condition.parse(text).judge(originals.samples)
    except (ValueError, KeyError) as error:
        return f"text: {type(error).__name__}"
    return "text read"


def run_one(number, originals):
    """Make an input and read it; return what came of it. An exception that is not documented comes out."""
    rng = random.Random(number)
    what = rng.randrange(100)
    if what < 55:
        return read_stats_file(rng, originals)
    if what < 70:
        return receive_messages(rng, originals)
    if what < 85:
        return run_command_line(rng, originals)
    if what < 95:
        return read_text(rng, originals)
    return "recording " + mutate_recordings.run_one(number, originals.recorded, originals.room / "input")


def open_fds(wanted=0):
    """How many there are; if not those that are wanted, after a while, for Arrow's threads close some."""
    end = time.monotonic() + 1
    while (found := sum(1 for _ in Path("/proc/self/fd").iterdir())) != wanted and wanted and time.monotonic() < end:
        time.sleep(0.001)
    return found


def main():
    """Run as the first lines say."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("count", type=int, nargs="?", default=1)
    options.add_argument("first", type=int, nargs="?", default=0)
    options.add_argument("--one", type=int)
    given = options.parse_args()
    first, count = (given.first, given.count) if given.one is None else (given.one, 1)
    warnings.simplefilter("ignore")
    came, failures = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        originals = Originals(Path(folder))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
        fds = open_fds()
        for number in range(first, first + count):
            print(number, file=sys.stderr, end="\r", flush=True)  # for who looks for the one that ended the process
            limit_time(SECONDS)
            try:
                came[run_one(number, originals)] += 1
            except kf.KvmStatsError as error:
                came[type(error).__name__] += 1
                if given.one is not None:
                    print(repr(error))
            except Exception as error:
                failures += 1
                print(f"{number}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                if given.one is not None:
                    traceback.print_exc()
            limit_time(0)
            if (found := open_fds(fds)) != fds:
                failures, fds = failures + 1, found
                print(f"{number}: {fds} fds are open", flush=True)
        for one in originals.made:
            one.close()
        os.chdir("/")
    print(f"{count} inputs from {first} on: {dict(sorted(came.items()))}, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main()))
