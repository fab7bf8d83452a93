"""Real files of other kernels and machines say what the notes beside them say."""

import re

import numpy as np
import pytest
from helpers import DATA, as_tuples

import kvmstats_fast as kf

CAPTURES = DATA / "captures"
KERNELS = sorted(path.name for path in CAPTURES.iterdir())
MERGED = [kernel for kernel in KERNELS if not kernel.startswith("v2")]

#: user space's count of exits by reason, and the statistic that counts the same in that kernel
COUNTERS = {
    "arm64-6.1": {"KVM_EXIT_MMIO": "mmio_exit_user"},
    "riscv64-6.12": {"KVM_EXIT_MMIO": "mmio_exit_user", "hypercalls": "ecall_exit_stat"},
    "v2-x86_64": {"KVM_EXIT_IO": "io_exits", "KVM_EXIT_MMIO": "mmio_exits", "KVM_EXIT_HLT": "halt_exits"},
    "x86_64-6.1": {"KVM_EXIT_IO": "io_exits", "KVM_EXIT_MMIO": "mmio_exits", "KVM_EXIT_HLT": "halt_exits"},
    # PVM emulates real mode: I/O shows only in the sum.
    "x86_64-6.18-pvm": {"KVM_RUN": "exits", "KVM_EXIT_MMIO": "mmio_exits", "KVM_EXIT_HLT": "halt_exits"},
}


def image(kernel, name):
    return kf.parse((CAPTURES / kernel / f"{name}.bin").read_bytes())


def notes(kernel):
    return (CAPTURES / kernel / "notes.txt").read_text()


def deltas(kernel, name):
    before, after = image(kernel, f"{name}-before"), image(kernel, f"{name}-after")
    result = {}
    for stat in after:
        change = np.atleast_1d(np.asarray(after[stat], np.int64) - np.asarray(before[stat], np.int64))
        if change.any():
            result[stat] = change.tolist()
    return result


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "v2-x86_64-defect"])
def test_deltas_equal_the_exits_that_user_space_counted(kernel):
    """Between two captures each counter moved by what the TRUTH lines say of that vCPU."""
    lines = re.findall(r"^TRUTH user (vcpu\d) (.*)$", notes(kernel), re.MULTILINE)
    assert len(lines) >= 2
    for vcpu, text in lines:
        moved = deltas(kernel, vcpu)
        truth = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}
        for reason, counter in COUNTERS[kernel].items():
            assert moved.get(counter, [0]) == [truth.get(reason, 0)], (vcpu, reason)


@pytest.mark.parametrize("kernel", MERGED)
def test_everything_else_moved_as_noted_and_nothing_more(kernel):
    """Every statistic that changed between two captures is in the notes, histograms bucket by bucket."""
    sections = re.findall(r"^changed in (\S+), before to after:\n((?:    .*\n)+)", notes(kernel), re.MULTILINE)
    assert len(sections) >= 5
    for name, body in sections:
        expected = {}
        for line in body.splitlines():
            stat, _, text = line.strip().partition(" ")
            if stat == "nothing":
                continue
            if text.startswith("["):
                buckets = [0] * image(kernel, f"{name}-after").schema[stat].size
                for bucket, count in re.findall(r"\[(\d+)\]\+(\d+)", text):
                    buckets[int(bucket)] = int(count)
                expected[stat] = buckets
            else:
                expected[stat] = [int(re.search(r"\(([+-]\d+)\)", text)[1])]
        assert deltas(kernel, name) == expected, name


@pytest.mark.parametrize("kernel", MERGED)
def test_descriptors_and_values_are_those_of_the_notes(kernel):
    """Each file that the notes list has that header, these descriptors in that order, and these values."""
    row = re.compile(
        r"  (\w+) +0x(\w+) .*,(\d+)\^(-?\d+) size=(\d+) offset=(\d+) bucket_size=(\d+) value=(\d+|\[.*\])$"
    )
    files = re.findall(r"^(\S+)\.bin flags=(.*)\n((?:  .*\n)+)", notes(kernel), re.MULTILINE)
    assert files
    for name, fields, body in files:
        parsed = image(kernel, name)
        header = dict(re.findall(r"(\w+)=(\S+)", "flags=" + fields))
        for field in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset"):
            assert getattr(parsed.header, field) == int(header[field])
        assert parsed.id == header["id"]
        rows = [match.groups() for match in map(row.match, body.splitlines()) if match]
        assert [fields[0] for fields in rows] == list(parsed)
        for stat_name, flags, radix, exponent, size, offset, bucket_size, value in rows:
            stat = parsed.schema[stat_name]
            assert stat.type | stat.unit << 4 | stat.base << 8 == int(flags, 16)
            assert (stat.base.radix, stat.exponent, stat.size) == (int(radix), int(exponent), int(size))
            assert (stat.offset, stat.bucket_size) == (int(offset), int(bucket_size))
            if value.startswith("["):
                counts = {int(bucket): int(count) for bucket, count in re.findall(r"(\d+):(\d+)", value)}
                assert parsed[stat_name].tolist() == [counts.get(bucket, 0) for bucket in range(stat.size)]
            else:
                assert parsed[stat_name] == int(value)


@pytest.mark.parametrize("kernel", MERGED)
def test_sums_over_vcpus_equal_debugfs(kernel):
    """What debugfs showed of the VM's vCPUs together is the sum over their files."""
    text = (CAPTURES / kernel / "debugfs-after.txt").read_text()
    debugfs = dict(re.findall(r"^\d+-\d+/(\w+) (\d+)$", text, re.MULTILINE))
    vcpus = [image(kernel, f"vcpu{i}-after") for i in (0, 1, 7)]
    both = [stat for stat in vcpus[0].schema.stats if stat.name in debugfs and not stat.shape]
    assert both or kernel == "x86_64-6.18-pvm"  # that host is locked down: debugfs shows no counter
    for stat in both:
        assert sum(vcpu[stat.name] for vcpu in vcpus) == int(debugfs[stat.name]), stat.name


@pytest.mark.parametrize("kernel", MERGED)
def test_a_vcpu_that_sleeps_says_so(kernel):
    """`blocking` is True in the capture taken while the vCPU slept in HLT or WFI, and False after."""
    assert image(kernel, "halt-vcpu0-blocked")["blocking"] is True
    assert image(kernel, "halt-vcpu0-after")["blocking"] is False


def test_the_halts_of_the_series_own_kernel_are_as_noted():
    """The v2 halt captures moved by what their TRUTH line says."""
    line = re.search(r"^TRUTH halt vcpu0: .* wakes: (.*)$", notes("v2-x86_64"), re.MULTILINE)[1]
    after = image("v2-x86_64", "halt-vcpu0-after")
    truth = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", line)}
    assert len(truth) == 5
    assert {name: after[name] for name in truth} == truth


def test_a_vcpu_that_never_ran_counts_only_what_its_making_costs():
    """On the v2 kernel, the file of vCPU 7 says: host_state_reload is 6, everything else 0."""
    values = {name: value for name, value in image("v2-x86_64", "vcpu7-after").snapshot().items() if value}
    assert values == {"host_state_reload": 6}


def test_an_id_ends_at_its_nul_whatever_stands_behind():
    """The v2 kernel leaves its stack behind the NUL of the id; none of it is handed out."""
    assert image("v2-x86_64", "vm-after").id == "kvm-1"
    assert image("v2-x86_64", "vcpu7-after").id == "kvm-1/vcpu-7"


def test_the_count_defect_is_refused_and_explained():
    """The file of a kernel that ran the series as it was: refused at the count, with what is wrong and what to do."""
    data = (CAPTURES / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes()
    for opened in (kf.parse, kf.StatsFile.from_bytes):
        with pytest.raises(kf.FormatError, match=r"counts 1392 .* 29 descriptors.*repair=True") as caught:
            opened(data)
        assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.COUNT_DEFECT, 68)


def test_a_repaired_file_has_its_descriptors_and_no_values():
    """repair=True gives the same 29 descriptors as the mended kernel's file has, and refuses to hand out values."""
    repaired = kf.parse((CAPTURES / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes(), repair=True)
    assert repaired.schema.stats == image("v2-x86_64", "vcpu0-after").schema.stats
    assert repaired.header.num_desc == len(repaired) == 29
    assert repaired.values is None
    assert "exits" in repaired
    for use in (lambda: repaired["exits"], repaired.snapshot):
        with pytest.raises(kf.KvmStatsError, match="no values"):
            use()


def test_a_repaired_schema_never_opens_a_file():
    """After a repair the same bytes are still refused when they are opened to be read."""
    data = (CAPTURES / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes()
    kf.parse(data, repair=True)
    with pytest.raises(kf.FormatError):
        kf.StatsFile.from_bytes(data)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "v2-x86_64-defect"])
def test_the_live_path_reads_a_capture_as_parse_does(kernel):
    """Every capture, served from a memfd, gives the values, schema, id and kind that parse finds."""
    for path in sorted((CAPTURES / kernel).glob("*.bin")):
        parsed = kf.parse(path.read_bytes())
        with kf.StatsFile.from_bytes(path.read_bytes()) as file:
            assert file.schema is parsed.schema
            assert file.id == parsed.id
            assert file.kind == ("vm" if "vm" in path.name else "vcpu")
            assert np.array_equal(file.read(), parsed.values)
            assert as_tuples(file.snapshot(si=True)) == as_tuples(parsed.snapshot(si=True))


def test_truncation_inside_the_data_is_refused_at_its_first_missing_byte():
    """A capture that lost its last byte is refused, and the offset is where it ends."""
    data = (CAPTURES / "x86_64-6.1" / "vcpu0-after.bin").read_bytes()[:-1]
    for opened in (kf.parse, kf.StatsFile.from_bytes):
        with pytest.raises(kf.FormatError, match="cut short") as caught:
            opened(data)
        assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.TRUNCATED, len(data))
