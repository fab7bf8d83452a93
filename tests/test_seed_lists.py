"""A made-up file of the original series holds what the series' macros say."""

import json
import struct

import pytest
from helpers import DATA

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

LISTS = json.loads((DATA / "v2-descriptors.json").read_text())
VZ, LOONGSON = "CONFIG_KVM_MIPS_VZ", "CONFIG_CPU_LOONGSON64"
#: mips in its three configurations, the others in their only one
CONFIGURATIONS = [
    (arch, kind, options)
    for arch, kinds in LISTS.items()
    for kind in kinds
    for options in ([(), (VZ,), (VZ, LOONGSON)] if arch == "mips" else [(VZ, LOONGSON)])
]
COUNTS = {  # VM, vCPU
    ("arm64", 2): (1, 12),
    ("mips", 0): (1, 24),
    ("mips", 1): (1, 32),
    ("mips", 2): (1, 33),
    ("powerpc-book3s", 2): (3, 36),
    ("powerpc-booke", 2): (3, 29),
    ("s390", 2): (6, 98),
    ("x86", 2): (11, 29),
}
#: macro to flags (type | unit << 4 | base << 8) and exponent, from the series' STATS_DESC_* definitions
MACROS = {"COUNTER": (0x000, 0), "ICOUNTER": (0x001, 0), "TIME_NSEC": (0x020, -9)}


def rows(arch, kind, options):
    """The names and macros that a kernel with these options has."""
    for name, macro, *condition in LISTS[arch][kind]:
        if all(option in options for option in "".join(condition).split("&") if option):
            yield name, macro


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("arch", "kind", "options"), CONFIGURATIONS)
def test_a_v2_file_is_byte_for_byte_what_the_macros_say(arch, kind, options, order):
    """Header, names, order, flags, exponents and values of a v2 file, unpacked with struct, are those of the series."""
    expected = list(rows(arch, kind, options))
    assert len(expected) == COUNTS[arch, len(options)][kind == "vcpu"]
    byteorder = {"<": "little", ">": "big"}[order]
    with SyntheticStats(arch, kind, layout="v2", byteorder=byteorder, options=options, vcpu_id=5, pid=77) as made:
        for i, name in enumerate(made.stats):
            made.set(name, (i + 1) << 40)
        data = made.to_bytes()
    n = len(expected)
    assert len(data) == 80 + n * 48 + n * 8
    assert data[:64].split(b"\0")[0].decode() == ("kvm-77/vcpu-5" if kind == "vcpu" else "kvm-77")
    assert struct.unpack_from(order + "4I", data, 64) == (32, n, 80, 80 + n * 48)
    for i, (name, macro) in enumerate(expected):
        flags, exponent, size, unused1, unused2, raw = struct.unpack_from(order + "IhHII32s", data, 80 + i * 48)
        assert raw == name.encode()[:32].ljust(32, b"\0")
        assert (flags, exponent, size, unused1, unused2) == (*MACROS[macro], 1, 0, 0)
        assert struct.unpack_from(order + "Q", data, 80 + n * 48 + i * 8) == ((i + 1) << 40,)


@pytest.mark.parametrize("layout", ["v2", "v5", "v9", "merged"])
@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize(("arch", "kind", "options"), CONFIGURATIONS)
def test_every_layout_and_byte_order_is_read_back(arch, kind, options, layout, byteorder):
    """Names, macros and values of every list come back through parse and through the live path."""
    room = 32 if layout == "v2" else 48
    with SyntheticStats(arch, kind, layout=layout, byteorder=byteorder, options=options, vcpu_id=3) as made:
        for i, (name, stat) in enumerate(made.stats.items()):
            made.set(name, [i * 1000 + bucket for bucket in range(stat.size)] if stat.shape else i)
        parsed = kf.parse(made.to_bytes())
        with made.open() as file:
            assert file.schema is parsed.schema
            assert file.read().tolist() == parsed.values.tolist()
            assert (file.kind, file.vcpu_id) == (kind, 3 if kind == "vcpu" else None)
    assert (parsed.header.layout, parsed.header.byteorder) == (layout, byteorder)
    if not (arch == "x86" and layout == "merged"):  # today's x86 has lists of its own
        expected = list(rows(arch, kind, options))
        assert list(parsed) == [name.encode()[:room].decode() for name, _ in expected]
        for stat, (_, macro) in zip(parsed.schema.stats, expected, strict=True):
            assert (stat.type | stat.unit << 4 | stat.base << 8, stat.exponent) == MACROS[macro]
    for i, (name, stat) in enumerate(parsed.schema.items()):
        value = parsed[name]
        assert (value.tolist() if stat.shape else value) == (
            [i * 1000 + bucket for bucket in range(stat.size)] if stat.shape else i
        )


@pytest.mark.parametrize("kind", ["vm", "vcpu"])
def test_todays_x86_lists_are_those_of_a_real_kernel(kind):
    """A made-up merged x86 file has exactly the descriptors of a file captured from Linux 6.18."""
    name = "vm" if kind == "vm" else "vcpu0"
    real = kf.parse((DATA / "captures" / "x86_64-6.18-pvm" / f"{name}-after.bin").read_bytes())
    with SyntheticStats("x86", kind, byteorder="little") as made:
        assert kf.parse(made.to_bytes()).schema is real.schema


def test_names_longer_than_their_field_end_with_it():
    """Two s390 names of 34 bytes stand in fields of 32 without a NUL, and are read as what fits."""
    with SyntheticStats("s390", "vcpu", layout="v2", byteorder="big") as made, made.open() as file:
        assert [name for name in file.schema if len(name) == 32] == [
            "instruction_sigp_stop_store_stat",
            "instruction_sigp_store_adtl_stat",
        ]


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("layout", ["v2", "v5"])
def test_values_of_a_32_bit_kernel_are_widened(layout, byteorder):
    """A VM file with 4-byte values gives uint64, live and parsed; a vCPU file cut to half is cut short."""
    with SyntheticStats("x86", "vm", layout=layout, byteorder=byteorder, value_size=4) as made, made.open() as file:
        for i, name in enumerate(made.stats):
            made.set(name, 0xFFFFFFF0 + i)
        expected = [0xFFFFFFF0 + i for i in range(11)]
        assert file.read().tolist() == expected
        assert file.read_into(file.read()).tolist() == expected
        assert kf.parse(made.to_bytes()).values.tolist() == expected
        assert [stat.offset for stat in file.schema.stats] == [8 * i for i in range(11)]
    with SyntheticStats("x86", "vcpu", layout=layout, byteorder=byteorder) as made:
        data = made.to_bytes()
    for opened in (kf.parse, kf.StatsFile.from_bytes):
        with pytest.raises(kf.FormatError, match="cut short"):
            opened(data[: -29 * 4])


def test_the_made_up_count_defect_is_the_real_one():
    """The defect switch gives a file that agrees with the captured one to the end of the VM's table behind its own."""
    real = (DATA / "captures" / "v2-x86_64-defect" / "vcpu0-after.bin").read_bytes()
    with SyntheticStats("x86", "vcpu", layout="v2", byteorder="little", count_defect=True) as made:
        data = made.to_bytes()
        with pytest.raises(kf.FormatError) as caught:
            made.open()
        assert caught.value.code == kf.ErrorCode.COUNT_DEFECT
        for change in (lambda: made.set("exits", 1), lambda: made.add("exits", 1)):
            with pytest.raises(ValueError, match="no values"):
                change()
    vm_table = 16 + 11 * 48
    assert data[64 : 1472 + vm_table] == real[64 : 1472 + vm_table]
