"""The package against tests/twin.py, which reads the same format by other means: valid, damaged and arbitrary files."""

from __future__ import annotations

import pickle
import random
import struct
import warnings
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import twin
from helpers import examples, numbers
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    BOUNDARIES,
    DAMAGES,
    damage,
    damaged,
    files,
    files_with_a_duplicate,
    files_with_a_grown_stat,
    files_with_the_count_defect,
    valid_files,
)

import kvmstats_fast as kf

CAPTURES = sorted((Path(__file__).parent / "data" / "captures").glob("*/*.bin"))
#: One for each kernel and kind of file, which have their sizes; the others differ in id and values.
ONE_OF_A_KIND = {(path.parent, path.stat().st_size): path for path in CAPTURES}.values()


def capture_name(path):
    """Name a capture in the output of pytest."""
    return f"{path.parent.name}/{path.stem}"


@cache
def distinct_captures():
    """Bytes of the captures, each once."""
    return tuple({path.read_bytes(): path for path in CAPTURES})


def of_product(data, repair=False):
    """Say what the package makes of a file, in the twin's terms: the whole result, or (code, offset)."""
    try:
        image = kf.parse(data, repair=repair)
    except kf.FormatError as error:
        return error.code.name, error.offset
    header = image.header
    fields = ("name", "type", "unit", "base", "exponent", "size", "offset", "bucket_size")
    return twin.StatsFile(
        layout=str(header.layout),
        byteorder=header.byteorder,
        flags=header.flags,
        name_size=header.name_size,
        num_desc=header.num_desc,
        id_offset=header.id_offset,
        desc_offset=header.desc_offset,
        data_offset=header.data_offset,
        id=image.id,
        stats=[tuple(getattr(stat, field) for field in fields) for stat in image.schema.stats],
        values=None if image.values is None else image.values.tolist(),
    )


def of_twin(data, repair=False):
    """Say what the twin makes of a file: the whole result, or (code, offset)."""
    try:
        return twin.parse(data, repair)
    except twin.TwinError as error:
        return error.code_name, error.offset


def assert_agreement(data):
    """Compare the two on one file, with and without repair."""
    for repair in (False, True):
        assert of_product(data, repair) == of_twin(data, repair), f"{repair=}"


def built_as_twin(built):
    """Say what a strategy put into a file, in the twin's terms."""
    decode = lambda raw: raw.decode("utf-8", "surrogateescape")  # noqa: E731
    return twin.StatsFile(
        layout=built.layout,
        byteorder=built.byteorder,
        flags=0,
        name_size=built.name_size,
        num_desc=len(built.stats),
        id_offset=built.places.get("id", 16 if built.layout == "v9" else 0),
        desc_offset=built.places["desc"],
        data_offset=built.places["data"],
        id=decode(built.id),
        stats=[(decode(name), *numbers) for name, *numbers in built.stats],
        values=built.words,
    )


# ---- the two agree


@examples(200)
@given(st.binary(max_size=300))
@example(b"")
@example(bytes(24))
@example(b"kvm-")
def test_arbitrary_bytes_are_judged_as_the_twin_judges_them(data):
    """Whatever the bytes are, the package and the twin give the same result or the same code and offset."""
    assert_agreement(data)


@examples(300)
@given(
    st.lists(st.one_of(st.sampled_from(BOUNDARIES), st.just(int.from_bytes(b"kvm-", "little"))), max_size=40),
    st.sampled_from("<>"),
)
def test_boundary_numbers_in_every_field_are_judged_as_the_twin_judges_them(numbers, order):
    """A file made of boundary numbers only gives the same result or the same code and offset."""
    assert_agreement(struct.pack(f"{order}{len(numbers)}I", *numbers))


@examples(150)
@given(valid_files())
def test_a_valid_file_is_read_as_it_was_made(built):
    """A file that keeps every rule is accepted by both parsers, and both find in it exactly what was put there."""
    made = built_as_twin(built)
    assert of_twin(built.data) == made
    assert_agreement(built.data)


@examples(100)
@given(files_with_a_duplicate())
def test_a_name_that_stands_twice_is_refused_at_its_second_place(data):
    """A duplicate name is refused at the same byte by both parsers."""
    code, _ = of_product(data)
    assert code == "DUPLICATE"
    assert_agreement(data)


@examples(150)
@given(files_with_a_grown_stat())
def test_a_statistic_that_reaches_beyond_its_block_is_judged_as_the_twin_judges_it(data):
    """Data that is longer than its place is refused for what it meets first: another block, or the end of the file."""
    assert_agreement(data)


@pytest.mark.parametrize(("num_desc", "code"), [(1, None), (2, "OVERLAP")])
@pytest.mark.parametrize("behind", ["id", "desc"])
def test_data_is_refused_only_from_the_word_that_reaches_into_the_block_behind(behind, num_desc, code):
    """Data that ends where the id or the table begins is read; one word more is an overlap, told at data_offset."""
    table = b"".join(struct.pack("<IhHII8s", 0, 0, 1, 8 * i, 0, b"abc"[i : i + 1]) for i in range(num_desc))
    blocks = {"id": b"kvm-1".ljust(8, b"\0"), "desc": table}
    other = {"id": "desc", "desc": "id"}[behind]
    places = {other: 24, "data": 24 + len(blocks[other])}
    places[behind] = places["data"] + 8
    head = struct.pack("<6I", 0, 8, num_desc, places["id"], places["desc"], places["data"])
    data = head + blocks[other] + bytes(8) + blocks[behind]
    assert of_product(data) == ((code, 20) if code else of_twin(data))
    assert_agreement(data)


def test_a_count_that_is_no_whole_table_is_not_the_count_defect():
    """A count that is the room for the table, but not for whole descriptors, is refused, repair or not."""
    room = 48 + 8
    numbers = struct.pack("<4I", 32, room, 80, 80 + room)
    data = b"kvm-1".ljust(64, b"\0") + numbers + struct.pack("<IhHII32s", 0, 0, 1, 0, 0, b"a") + bytes(200)
    assert of_product(data) == of_product(data, repair=True) == ("OVERLAP", 76)
    assert_agreement(data)


@examples(100)
@given(files_with_the_count_defect())
def test_the_count_defect_is_refused_and_repaired_without_values(built):
    """A count that is the table's size is refused at the count; repaired, all descriptors are there and no values."""
    assert of_product(built.data) == ("COUNT_DEFECT", 68)
    assert of_product(built.data, repair=True) == built_as_twin(built)
    assert_agreement(built.data)


@examples(200)
@given(damaged(files()))
def test_a_damaged_file_is_judged_as_the_twin_judges_it(original_and_damaged):
    """A damaged file gives the same result or the same code and offset, also right after the sound one was read."""
    original, results = original_and_damaged
    for data in results:
        of_product(original)  # its schema is known now
        assert_agreement(data)


@examples(150)
@given(damaged(st.sampled_from(distinct_captures())))
def test_a_damaged_capture_is_judged_as_the_twin_judges_it(original_and_damaged):
    """The same for captures of real kernels."""
    original, results = original_and_damaged
    for data in results:
        of_product(original)
        assert_agreement(data)


@pytest.mark.parametrize("layout", ["v2", "v9"])
def test_a_file_without_its_mark_is_refused_also_when_its_schema_is_known(layout):
    """What was read before changes nothing: an id that does not start with kvm- is no id of these layouts."""
    numbers = struct.pack("<4I", 32, 1, 80, 128)
    rest = struct.pack("<IhHII32s", 0, 0, 1, 0, 0, b"exits") + bytes(8)
    ident = b"kvm-1".ljust(64, b"\0")
    good, bad = ((numbers + name if layout == "v9" else name + numbers) + rest for name in (ident, b"KVM-" + ident[4:]))
    alone = of_product(bad)
    assert of_product(good).layout == layout
    assert of_product(bad) == alone == of_twin(bad)


@pytest.mark.parametrize(
    ("name_size", "num_desc", "data_end"),
    [(4096, 1, 8), (4097, 1, 8), (1, 65536, 8), (1, 65537, 8), (1, 1, 2**28), (1, 1, 2**28 + 8), (1, 1, 2**32 + 2**19)],
)
def test_the_limits_are_judged_as_the_twin_judges_them(name_size, num_desc, data_end):
    """At each limit, and one beyond it, the two parsers agree."""
    table = 24 + -(-name_size // 8) * 8
    values = table + -(-num_desc * (16 + name_size) // 8) * 8
    head = struct.pack("<6I", 0, name_size, num_desc, 24, table, values)
    size = min(-(-data_end // 8), 65535)
    one = struct.pack(f"<IhHII{name_size}s", 0, 0, size, data_end - 8 * size & 0xFFFFFFF8, 0, b"a")
    assert_agreement(head.ljust(table, b"\0") + one * num_desc)


def test_positional_data_beyond_the_limit_is_refused_at_the_size_that_exceeds_it():
    """Where descriptors have no offsets, it is the sum of the sizes that goes beyond the limit."""
    count = 513  # of 65535 * 8 bytes each: 512 of them stay within 256 MiB
    table = b"".join(struct.pack("<IhHII32s", 0, 0, 65535, 0, 0, b"%d" % i) for i in range(count))
    data = b"kvm-1".ljust(64, b"\0") + struct.pack("<4I", 32, count, 80, 80 + len(table)) + table
    assert of_product(data) == ("DATA_SIZE", 80 + 512 * 48 + 6)
    assert_agreement(data)


# ---- captures of real kernels


def test_there_are_captures():
    """The tests below have something to work on."""
    assert len(distinct_captures()) > 20


@pytest.mark.parametrize("path", ONE_OF_A_KIND, ids=capture_name)
def test_a_capture_cut_at_any_length_is_judged_as_the_twin_judges_it(path):
    """At every length of a real file, both parsers give the same result or the same code and offset."""
    data = path.read_bytes()
    for length in range(len(data) + 1):
        cut = data[:length]
        assert of_product(cut) == of_twin(cut), length
        # The data of a repaired file is not looked at, and where nothing is repaired, repair changes nothing.
        if "defect" in path.parent.name and (length < 4096 or length % 61 == 0):
            assert of_product(cut, repair=True) == of_twin(cut, repair=True), length


@pytest.mark.parametrize("path", [path for path in ONE_OF_A_KIND if "defect" not in path.parent.name], ids=capture_name)
def test_a_cut_capture_is_refused_as_truncated_at_its_end(path):
    """At every length but the whole, a real file is refused, and the offset is that of the cut."""
    data = path.read_bytes()
    whole = of_product(data)
    halved = len(data) - 4 * len(whole.values)  # which looks like the VM file of a 32-bit kernel
    for length in range(len(data)):
        if (whole.layout, length) == ("v2", halved) and "vcpu" not in whole.id:
            assert of_product(data[:length]).stats == whole.stats
        else:
            assert of_product(data[:length]) == ("TRUNCATED", length)


def random_damage(number):
    """Return a real file with one to three random changes; the same for the same number."""
    rng = random.Random(number)
    captures = distinct_captures()
    data = rng.choice(captures)
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = 4 * rng.randrange(24) if rng.random() < 0.4 else rng.randrange(min(len(data), 4096) + 1)
        value = rng.choice(BOUNDARIES) if rng.random() < 0.5 else rng.getrandbits(32)
        kind = rng.choice(DAMAGES)
        other = rng.choice(captures)[:4096] if kind == "splice" else rng.randbytes(value % 64)
        data = damage(data, kind, where, value, other)
    return data


def test_tens_of_thousands_of_damaged_captures_give_a_result_or_a_format_error():
    """Random damage to real files makes parse raise FormatError or nothing; the twin agrees on two in twenty-five."""
    refused = 0
    for number in numbers(40_000):
        data = random_damage(number)
        repair = number % 2 == 1
        try:
            kf.parse(data, repair=repair)
        except kf.FormatError:
            refused += 1
        except Exception as error:  # noqa: BLE001 - that it is another one is the point
            pytest.fail(f"random_damage({number}): {error!r}")
        if number % 25 < 2:
            assert of_product(data, repair) == of_twin(data, repair), f"random_damage({number})"
    assert 4_000 < refused < 36_000  # else the damage is too rough, or none


# ---- what is done with a file that was accepted

accepted_files = st.one_of(valid_files(), files_with_the_count_defect())


def quiet_snapshot(image, si):
    """Take a snapshot; give it and the texts of its warnings, each of which must be a RuntimeWarning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snapshot = image.snapshot(si=si)
    assert all(warning.category is RuntimeWarning for warning in caught)
    return snapshot, [str(warning.message) for warning in caught]


@examples(60)
@given(valid_files(at_least=1))
def test_the_dtype_shows_the_values_that_the_image_shows(built):
    """values.view(schema.dtype)[name] is image[name], for every statistic of every accepted file."""
    image = kf.parse(built.data)
    view = image.values.view(image.schema.dtype)
    assert view.shape == (1,)
    for name in image:
        assert np.array_equal(view[name][0], image[name])
        assert np.shares_memory(view[name], image.values)


@examples(60)
@given(accepted_files)
def test_a_pickled_schema_comes_back(built):
    """An unpickled schema is the schema itself; a repaired one, which is never shared, is equal to it."""
    image = kf.parse(built.data, repair=True)
    schema = image.schema
    again = pickle.loads(pickle.dumps(schema))
    assert again is schema or image.values is None
    assert again == schema
    assert hash(again) == hash(schema)
    assert again.fingerprint == schema.fingerprint
    assert (again.stats, again.header, again.num_values) == (schema.stats, schema.header, schema.num_values)


def scaled_exactly(stat, raw):
    """Return raw * base**exponent, an int if the power is below 2**64, else the nearest float.

    Instant values are signed, and a power above 10**270 counts as that.
    """
    number = raw - (2**64 if stat.type == kf.StatType.INSTANT and raw >> 63 else 0)
    power = {kf.StatBase.POW10: 10, kf.StatBase.POW2: 2}[stat.base] ** abs(stat.exponent)
    if stat.exponent < 0:
        return float(Fraction(number, power))
    return number * power if power < 2**64 else float(number * min(power, 10**270))


exponents = st.one_of(
    st.sampled_from([-32768, -400, -9, 0, 9, 300, 32767]), st.integers(-400, 400), st.integers(-32768, 32767)
)
numbers_of_one = st.builds(
    kf.Stat,
    name=st.just("n"),
    type=st.sampled_from([kf.StatType.CUMULATIVE, kf.StatType.INSTANT, kf.StatType.PEAK]),
    unit=st.sampled_from(kf.StatUnit),
    base=st.sampled_from(kf.StatBase),
    exponent=exponents,
    size=st.just(1),
    offset=st.just(0),
    bucket_size=st.just(0),
)


@examples(300)
@given(numbers_of_one, st.one_of(st.sampled_from([0, 1, 2**53 + 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)))
def test_a_number_is_scaled_exactly(stat, raw):
    """In base units it is the int, or the float that is nearest to the exact product; up to the largest power."""
    right = scaled_exactly(stat, raw)
    assert (type(stat.to_base_units(raw)), stat.to_base_units(raw)) == (type(right), right)


@examples(60)
@given(valid_files())
def test_plain_numbers_are_scaled_exactly(built):
    """A snapshot in base units has each of them so."""
    image = kf.parse(built.data)
    scaled, _ = quiet_snapshot(image, si=True)
    raw, warned = quiet_snapshot(image, si=False)
    assert not warned
    assert list(scaled) == list(raw) == list(image.schema)
    for name, stat in image.schema.items():
        known = isinstance(stat.base, kf.StatBase) and isinstance(stat.unit, kf.StatUnit)
        if stat.shape or isinstance(raw[name], bool) or not (known and isinstance(stat.type, kf.StatType)):
            continue
        right = scaled_exactly(stat, raw[name])
        assert (type(scaled[name]), scaled[name]) == (type(right), right), stat


@examples(60)
@given(valid_files())
def test_a_statistic_with_a_code_that_is_not_known_stays_raw_and_says_so(built):
    """Unknown type, unit or base: the statistic is kept, raw and unscaled, and a snapshot in base units warns of it."""
    image = kf.parse(built.data)
    scaled, warned = quiet_snapshot(image, si=True)
    raw, _ = quiet_snapshot(image, si=False)
    for name, stat in image.schema.items():
        known = stat.type <= 4 and stat.unit <= 4 and stat.base <= 1
        if not known and not stat.shape and not isinstance(raw[name], bool):  # a bool has no scale
            unchanged = scaled[name] == raw[name]
            assert unchanged, stat
            assert any(text.startswith(f"{name} ") for text in warned), stat


histograms = st.builds(
    kf.Stat,
    name=st.just("halt_wait_hist"),
    type=st.sampled_from([kf.StatType.LINEAR_HIST, kf.StatType.LOG_HIST]),
    unit=st.sampled_from(kf.StatUnit),
    base=st.sampled_from(kf.StatBase),
    exponent=exponents,
    size=st.integers(1, 40),
    offset=st.just(0),
    bucket_size=st.integers(1, 2**32 - 1),
)


@examples(100)
@given(histograms)
def test_buckets_have_the_edges_the_format_says(stat):
    """Linear edges are i * bucket_size, logarithmic ones 0, 1, 2, 4 ..., scaled; the last is infinite."""
    edges = stat.bucket_edges()
    assert edges.shape == (stat.size + 1,)
    assert edges[-1] == np.inf
    base = {kf.StatBase.POW10: 10, kf.StatBase.POW2: 2}[stat.base]
    for i, edge in enumerate(edges[:-1].tolist()):
        raw = i * stat.bucket_size if stat.type == kf.StatType.LINEAR_HIST else (2**i) // 2
        exact = raw * Fraction(base) ** stat.exponent
        assert edge == (np.inf if exact >= 2**1024 else float(exact)), i


@examples(60)
@given(valid_files())
def test_only_histograms_have_edges(built):
    """bucket_edges of any accepted statistic gives size + 1 numbers, or ValueError where there are no buckets."""
    for stat in kf.parse(built.data).schema.stats:
        if stat.type == kf.StatType.LOG_HIST or (stat.type == kf.StatType.LINEAR_HIST and stat.bucket_size):
            assert stat.bucket_edges().shape == (stat.size + 1,)
        else:
            with pytest.raises(ValueError, match="histogram"):
                stat.bucket_edges()
