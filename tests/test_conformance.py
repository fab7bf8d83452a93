"""Each rule of the format is checked by itself: what breaks one is found as that one, with the bytes that show it."""

import json
import os
import re
import struct
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import qemu
from helpers import until
from holder import Holder

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.cli.check import ways_to
from kvmstats_fast.conformance import FAIL, NOT_APPLICABLE, PASS, Live, check_file
from kvmstats_fast.vmm.find import look_at
from kvmstats_fast.vmm.proc import Process
from kvmstats_fast.vmm.ways import WAYS

CAPTURES = Path(__file__).parent / "data" / "captures"
ONLY_LIVE = {"C16", "C17", "C18", "C19", "C20", "D5"}
#: flags, exponent, size, bucket_size, name. Types 0 to 4, units none, bytes, seconds, boolean.
STATS = [
    (0x000, 0, 1, 0, b"exits"),
    (0x012, 10, 2, 0, b"peak"),
    (0x041, 0, 1, 0, b"blocking"),
    (0x024, -9, 4, 0, b"wait_hist"),
    (0x043, 0, 2, 1, b"boolean_hist"),
    (0x003, 0, 3, 5, b"linear_hist"),
]
#: "kvm-" as a word, and two of zeros: an id.
KVM = [int.from_bytes(b"kvm-", "little"), 0, 0]


def build(order="<", header=None, stats=None, offsets=None, values=None, file_id=b"kvm-1/vcpu-0"):  # noqa: PLR0917
    """A merged file: header, id, descriptors, data; any part another one."""
    stats = STATS if stats is None else stats
    at, table, total = 0, b"", sum(stat[2] for stat in stats)
    for index, (flags, exponent, size, bucket_size, name) in enumerate(stats):
        offset = at if offsets is None else offsets[index]
        table += struct.pack(order + "IhHII", flags, exponent, size, offset, bucket_size) + name.ljust(48, b"\0")[:48]
        at += 8 * size
    fields = {"flags": 0, "name_size": 48, "num": len(stats), "id": 24, "desc": 72, "data": 72 + len(table)} | (
        header or {}
    )
    head = struct.pack(order + "6I", *fields.values()) + file_id.ljust(48, b"\0")[:48]
    words = [0] * total if values is None else values
    return head + table + struct.pack(f"{order}{len(words)}Q", *words)


def changed(index, **parts):
    """The statistics, with parts of one of them changed."""
    names = ("flags", "exponent", "size", "bucket_size", "name")
    stat = tuple(parts.get(name, value) for name, value in zip(names, STATS[index], strict=True))
    return [*STATS[:index], stat, *STATS[index + 1 :]]


def overlapping():
    """Data before descriptors, and reaching into them."""
    whole = build()
    table, data = whole[72 : 72 + 64 * len(STATS)], whole[72 + 64 * len(STATS) :]
    head = struct.pack("<6I", 0, 48, len(STATS), 24, 72 + len(data) - 8, 72)
    return head + whole[24:72] + data[:-8] + table + data


BROKEN = {
    "C1": (build()[:20], "20"),
    "C2": (build(file_id=b"xen-1"), "78 65 6e"),
    "C4": (build(header={"desc": 16}), "it is 16, bytes 16 to 19"),
    "C5": (build(header={"data": 0}), "it is 0, bytes 20 to 23: 00 00 00 00"),
    "C6": (build(header={"data": 72 + 64 * 6 - 8}) + bytes(8), "data from byte 448"),
    "C7": (build(stats=changed(1, name=b"n" * 48)), "no NUL in 6e 6e"),
    "C8": (build(stats=changed(0, flags=0x005)), "type 5, unit 0, base 0; bytes 72 to 75: 05 00 00 00"),
    "C9": (build(stats=changed(0, exponent=-3)), "exponent -3; bytes 76 to 77: fd ff"),
    "C10": (build(stats=changed(1, size=0), values=[0] * 13), "'peak' at byte 136: bytes 142 to 143: 00 00"),
    "C11": (build(stats=changed(0, bucket_size=7)), "type 0, bytes 84 to 87: 07 00 00 00"),
    "C12": (build(stats=[STATS[0], STATS[2]], offsets=[0, 0], values=[0, 0]), "data are 8 bytes, and 2 statistics"),
    "C13": (overlapping(), "data are from byte 72 to"),
    "C14": (build()[:-8], "104 bytes were asked for at byte 456, and 96 came"),
    "D1": (build(offsets=[0, 8, 28, 32, 64, 80]), "'blocking' at byte 200: offset 28, bytes 208 to 211: 1c 00 00 00"),
    "D2": (build(header={"id": 536}, values=[*[0] * 10, *KVM]), "id from byte 536 to 584, data from byte 456 to 560"),
    "D3": (build(values=[0, 0, 0, 2, *[0] * 9]), "'blocking' is 2, bytes 480 to 487: 02 00"),
    "D4": (build(stats=changed(4, size=3), values=[0] * 14), "type 3, size 3, bucket_size 1"),
    "D6": (build(stats=changed(5, name=b"exits")), "'exits' at byte 392, and at byte 72"),
}


def of_bytes(data):
    """Read as pread does."""
    return lambda size, offset: data[offset : offset + size]


def verdicts(findings, verdict):
    """The rules of this verdict."""
    return {one.rule for one in findings if one.verdict == verdict}


@pytest.mark.parametrize("order", "<>")
def test_a_file_that_keeps_all_rules_passes_them(order):
    """In either byte order; what takes an open file does not apply, nor what is said of a file without statistics."""
    findings = check_file(of_bytes(build(order)))
    assert [one.rule for one in findings] == [f"C{i}" for i in range(1, 21)] + [f"D{i}" for i in range(1, 7)]
    assert verdicts(findings, NOT_APPLICABLE) == ONLY_LIVE | {"C3"}
    assert not verdicts(findings, FAIL)
    assert "C3" in verdicts(check_file(of_bytes(build(order, stats=[]))), PASS)


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_a_rule_is_found_as_that_rule(rule):
    """And as no other, with the bytes that show it."""
    data, evidence = BROKEN[rule]
    findings = check_file(of_bytes(data))
    assert verdicts(findings, FAIL) == {rule}, [one for one in findings if one.verdict == FAIL]
    assert evidence in next(one.evidence for one in findings if one.rule == rule)


@pytest.mark.parametrize(
    ("unit", "fits", "odd"), [(0, 0, -1), (1, 0, -1), (2, 0, 1), (3, 0, -1), (4, 0, 1), (4, 0, -1)]
)
def test_the_exponent_is_judged_at_its_edge(unit, fits, odd):
    """None, bytes, cycles: 0 and up; seconds: 0 and down; booleans: 0."""
    for exponent, broken in ((fits, set()), (odd, {"C9"})):
        data = build(stats=changed(0, flags=unit << 4, exponent=exponent))
        assert verdicts(check_file(of_bytes(data)), FAIL) == broken


class Odd:
    """A file whose reads are not what they should be, and its fd."""

    def __init__(self, tmp_path, data):
        self.path = tmp_path / "file"
        self.path.write_bytes(data)
        self.fd = os.open(self.path, os.O_RDWR)
        self.live = Live(self.fd, lambda: None, 1, partial(os.dup, self.fd), lambda: os.pread(self.fd, 24, 0))

    def read(self, size, offset):
        """As pread."""
        return os.pread(self.fd, size, offset)


@pytest.fixture
def odd(tmp_path):
    """A file that keeps all rules."""
    subject = Odd(tmp_path, build(values=[5] * 2 + [0] * 11))
    yield subject
    os.close(subject.fd)


def test_a_live_file_that_keeps_all_rules_passes_them(odd):
    """All 26 of them, but for what is said of a file without statistics."""
    assert verdicts(check_file(odd.read, odd.live), PASS) == {one.rule for one in check_file(odd.read)} - {"C3"}


BROKEN_LIVE = ("C1", "C15", "C16", "C17", "C18", "C19", "C20", "D5")


def test_every_rule_has_a_file_that_breaks_it():
    """But for C3, which allows something: it passes where a file makes use of that, and nothing can break it."""
    rules = {one.rule for one in check_file(of_bytes(build()))}
    assert {*BROKEN, *BROKEN_LIVE} == rules - {"C3"}


@pytest.mark.parametrize("rule", BROKEN_LIVE)
def test_what_breaks_a_rule_of_live_files_is_found_as_that_rule(odd, rule, tmp_path, monkeypatch):
    """A header that changes, a short read, no capability, a closed fd that reads, other files, a counter that falls."""
    read, live = odd.read, odd.live
    if rule == "C1":
        calls = []
        live = replace(live, open_again=None, read_without_vm=None)

        def read(size, offset):
            calls.append((size, offset))
            header = odd.read(size, offset)
            return b"\0" * size if calls.count((24, 0)) == 2 and (size, offset) == (24, 0) else header

    if rule == "C15":
        read = lambda size, offset: odd.read(size - 8 * (size == 32), offset)  # noqa: E731 - of wait_hist alone
    other = tmp_path / "other"
    other.write_bytes(b"x" * 24)
    if rule == "C16":
        live = replace(live, capability=0)
    if rule == "C17":
        monkeypatch.setattr(os, "close", lambda _: None)
    if rule == "C18":
        live = replace(live, open_again=lambda: os.open(other, os.O_RDONLY))
    if rule == "C19":
        monkeypatch.setattr(os, "dup", lambda _: os.open(other, os.O_RDONLY))
        live = replace(live, open_again=partial(os.open, odd.path, os.O_RDONLY))
    if rule == "C20":
        live = replace(live, read_without_vm=lambda: b"")
    if rule == "D5":
        live = replace(live, wait=lambda: os.pwrite(odd.fd, struct.pack("<Q", 4), 72 + 64 * 6))
    found = verdicts(check_file(read, live), FAIL)
    monkeypatch.undo()
    assert found == {rule}


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*/*.bin")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_real_kernels_wrote_keeps_the_rules(path):
    """All but the seed's defect, whose header promises descriptors that are none."""
    broken = verdicts(check_file(of_bytes(path.read_bytes())), FAIL)
    assert broken == ({"C6", "C7", "C8", "C9", "C10", "C14", "D4", "D6"} if "defect" in str(path) else set())


@pytest.mark.real_vm
def test_this_kernel_keeps_the_rules(capsys):
    """`kvmstats check`: all 26 of the files of a VM that is made for it, but for what is said of empty ones."""
    assert cli.main(["check", "-j"]) == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["rule"] for one in findings if one["verdict"] != PASS] == ["C3", "C3"]
    assert len(findings) == 2 * 26


@pytest.mark.real_vm
def test_the_files_of_a_vmm_are_checked_and_the_ways_to_them_told(capsys):
    """As far as another process can."""
    with Holder(1) as vmm:
        assert cli.main(["check", "-p", str(vmm.pid)]) == 0
    out = capsys.readouterr().out
    assert out.count("23 PASS, 0 FAIL, 3 N/A") == 2
    assert f"\nWays to the files of process {vmm.pid}:\n" in out
    ways = ways_in(out)
    assert list(ways) == [way.name for way in WAYS]
    assert ways["borrow"] == "yes"
    assert ways["hold"] == "it was not started under the hold library"
    assert ways["QEMU 8.1"] == "it is not QEMU"


def ways_in(out):
    """What is said of each way, at the end of the output."""
    names = "|".join(way.name for way in WAYS)
    return dict(re.findall(rf"^  ({names}) +(.*)$", out, re.MULTILINE))


@pytest.mark.real_vm
def test_the_ways_to_a_vm_that_holds_nothing_are_told_before_the_error(capsys):
    """There they are wanted; the files of another process are checked all the same."""
    with Holder(1, hold="nothing") as bare, Holder(1) as vmm:
        assert cli.main(["check", "-p", str(bare.pid), "-p", str(vmm.pid)]) == 1
        assert cli.main(["check", "-p", str(bare.pid), "-j"]) == 1
    out, err = capsys.readouterr()
    assert out.count("23 PASS, 0 FAIL, 3 N/A") == 2
    first, second = map(ways_in, out.split("Ways to")[1:])
    assert (first["borrow"], second["borrow"]) == ("it holds no stats file", "yes")
    assert [line.partition(" holds")[2] for line in err.splitlines()] == [
        err.splitlines()[0].partition(" holds")[2]
    ] * 2


def test_a_process_that_is_gone_has_no_ways(capsys):
    """The error says all."""
    assert cli.main(["check", "-p", str(2**22 + 1)]) == 4
    assert capsys.readouterr().out == ""


@qemu.needs_qemu
@pytest.mark.real_vm
def test_who_opened_the_files_of_a_qemu_is_told(tmp_path):
    """QEMU itself from 8.1 on, the hold library, or injection, after which those of vCPUs may be anybody's."""

    def ways(pid):
        return ways_in("\n".join(ways_to(pid)))

    none = "it has opened no stats file of a vCPU by itself"
    by_itself = "yes" if qemu.HOLDS_VCPUS else none
    with ExitStack() as resources:
        process, _ = qemu.plain_qemu(tmp_path, resources, vcpus=1)
        assert until(lambda: look_at(Process(process.pid)).vms.vcpus)
        assert ways(process.pid)["QEMU 8.1"] == by_itself
        with kf.attach(process.pid, inject=True) as machine:
            assert [file.kind for file in machine] == ["vm", "vcpu"]
        told = ways(process.pid)
        assert told["borrow"] == "yes"
        assert told["hold"] == "it was not started under the hold library"
        assert told["QEMU 8.1"] == "not known: the VM's file was injected, so perhaps those of vCPUs were, too"
    command, _ = qemu.arguments(tmp_path, vcpus=1)
    with kf.launch(command, stdin=subprocess.DEVNULL) as machine, machine.process as process:
        try:
            told = ways(process.pid)
        finally:
            process.kill()
    assert (told["borrow"], told["hold"], told["QEMU 8.1"]) == ("yes", "yes", by_itself)


def test_a_broken_file_is_status_1_and_no_file_an_error(tmp_path, capsys):
    """Each FAIL with its evidence."""
    (tmp_path / "broken").write_bytes(BROKEN["C2"][0])
    assert cli.main(["check", str(tmp_path / "broken")]) == 1
    assert "FAIL  C2   the id can be read, starts with kvm, and is shorter than its field: it starts with 78 65 6e" in (
        capsys.readouterr().out
    )
    assert cli.main(["check", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"kvmstats: {tmp_path}/none: No such file or directory\n"
