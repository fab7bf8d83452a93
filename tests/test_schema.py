"""Descriptors become statistics, scaled exactly, found by name, and shared."""

import gc
import itertools
import pickle
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from helpers import DATA, exit_status, forked

import kvmstats_fast as kf
from kvmstats_fast import schema as schema_module
from kvmstats_fast.testing import SyntheticStats

PLAIN = kf.Stat("n", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, 0)
REAL = (DATA / "captures" / "x86_64-6.1" / "vcpu0-after.bin").read_bytes()


def made_of(*stats, **options):
    """The parsed image of a made-up file of these statistics."""
    with SyntheticStats(stats=stats, **options) as made:
        return kf.parse(made.to_bytes())


@pytest.mark.parametrize(
    ("base", "exponent", "raw", "expected"),
    [
        (kf.StatBase.POW10, 0, 2**64 - 1, 2**64 - 1),
        (kf.StatBase.POW10, 3, 2**64 - 1, (2**64 - 1) * 1000),
        (kf.StatBase.POW2, 20, 3, 3 << 20),
        (kf.StatBase.POW10, -9, 3, 3e-9),
        (kf.StatBase.POW10, -9, 1_000_000_001, 1.000000001),
        (kf.StatBase.POW2, -10, 1, 1 / 1024),
        (kf.StatBase.POW10, -400, 1, 0.0),
        (kf.StatBase.POW10, 19, 2**64 - 1, (2**64 - 1) * 10**19),
        (kf.StatBase.POW2, 63, 2**64 - 1, (2**64 - 1) << 63),
        (kf.StatBase.POW10, 20, 3, 3e20),
        (kf.StatBase.POW2, 64, 3, 3.0 * 2**64),
        (kf.StatBase.POW10, 32767, 0, 0.0),
        (kf.StatBase.POW10, 32767, 2**64 - 1, float((2**64 - 1) * 10**270)),
        (kf.StatBase.POW2, -32768, 2**64 - 1, 0.0),
        (7, -9, 5, 5),  # no such base
    ],
)
def test_scaling_is_exact_while_it_is_an_integer_and_else_the_nearest_float(base, exponent, raw, expected):
    """A raw value becomes base units without a rounding that could be avoided; an unknown base leaves it alone."""
    stat = replace(PLAIN, base=base, exponent=exponent)
    assert stat.to_base_units(raw) == expected
    assert type(stat.to_base_units(raw)) is type(expected)
    assert stat.scale == stat.to_base_units(1)


@pytest.mark.parametrize("raw", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_instant_value_below_0_is_signed_in_base_units(raw):
    """KVM's counters of pages are signed inside; a value that only grows, and every raw value, is not."""
    signed = raw - 2**64 if raw >= 2**63 else raw
    image = made_of(replace(PLAIN, type=kf.StatType.INSTANT), replace(PLAIN, name="m", offset=8))
    image.values[:] = raw
    assert image.snapshot() == {"n": raw, "m": raw}
    assert image.snapshot(si=True) == {"n": signed, "m": raw}


@pytest.mark.parametrize("exponent", [32767, -32768, 5000])
def test_scales_that_no_kernel_has_take_no_time(exponent):
    """Thousands of such numbers are scaled by powers that are bounded, not by integers of 13 kB each."""
    scaled = []

    class Radix(int):
        def __pow__(self, exponent, modulo=None):
            scaled.append(exponent)
            return int(self) ** exponent

    with mock.patch.object(kf.StatBase, "radix", Radix(10)):
        stat = replace(PLAIN, exponent=exponent)
        stat.to_base_units(2**64 - 1)
        stat.scale_array(np.ones(1, np.uint64))
    assert max(scaled) <= 2000


def test_edges_of_a_scale_that_no_kernel_has_take_no_time():
    """Of 65534 edges divided by 10^32768 only those that a float holds are divided."""
    edges = replace(PLAIN, type=kf.StatType.LOG_HIST, size=65535, exponent=-19000).bucket_edges()
    first, last = np.flatnonzero(edges)[0], np.flatnonzero(np.isinf(edges))[0]
    assert 1000 < last - first < 2200
    assert edges[first + 100] == float(Fraction(2 ** (int(first) + 99), 10**19000))
    assert (edges[:first] == 0).all()
    assert np.isinf(edges[last:]).all()


def test_snapshot_in_si_scales_numbers_and_leaves_booleans_and_counts():
    """si=True gives seconds and bytes; booleans stay booleans and bucket counts stay counts."""
    image = made_of(
        replace(PLAIN, name="time", unit=kf.StatUnit.SECONDS, exponent=-9),
        replace(PLAIN, name="memory", unit=kf.StatUnit.BYTES, base=kf.StatBase.POW2, exponent=10, offset=8),
        replace(PLAIN, name="flag", unit=kf.StatUnit.BOOLEAN, offset=16),
        replace(
            PLAIN, name="hist", type=kf.StatType.LOG_HIST, size=2, unit=kf.StatUnit.SECONDS, exponent=-9, offset=24
        ),
    )
    image.values[:] = [1_500_000_000, 3, 1, 5, 6]
    si = image.snapshot(si=True)
    assert (si["time"], si["memory"], si["flag"]) == (1.5, 3072, True)
    assert si["flag"] is True
    assert si["hist"].tolist() == [5, 6]
    assert image["time"] == 1_500_000_000


def test_a_boolean_that_is_neither_0_nor_1_stays_a_number():
    """Nothing is repaired: 2 is not made True."""
    image = made_of(replace(PLAIN, unit=kf.StatUnit.BOOLEAN))
    image.values[:] = [2]
    assert image["n"] == 2
    assert image["n"] is not True


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({"type": 9}, "type 9"),
        ({"unit": 10}, "unit 10"),
        ({"base": 11}, "base 11"),
        ({"type": 5, "base": 2}, "type 5, base 2"),
    ],
)
def test_unknown_codes_stay_plain_ints_and_are_not_scaled_in_silence(codes, said):
    """A type, unit or base beyond what is known is kept as it is; the value stays raw, and si=True warns."""
    image = made_of(replace(PLAIN, exponent=-3, **codes))
    stat = image.schema["n"]
    assert {what: getattr(stat, what) for what in codes} == codes
    assert all(type(getattr(stat, what)) is int for what in codes)
    assert stat.unknown == said
    image.values[:] = [1234]
    with pytest.warns(RuntimeWarning, match=f"n is left as it is: unknown {said}"):
        assert image.snapshot(si=True) == {"n": 1234}
    assert not PLAIN.unknown


@pytest.mark.parametrize(
    ("unit", "base", "exponent", "raw", "si"),
    [
        (kf.StatUnit.NONE, kf.StatBase.POW10, 0, "", ""),
        (kf.StatUnit.NONE, kf.StatBase.POW10, 3, "10^3", ""),
        (kf.StatUnit.NONE, kf.StatBase.POW2, -2, "2^-2", ""),
        (kf.StatUnit.BOOLEAN, kf.StatBase.POW10, 0, "", ""),
        (kf.StatUnit.CYCLES, kf.StatBase.POW10, 0, "cycles", "cycles"),
        (kf.StatUnit.CYCLES, kf.StatBase.POW10, 6, "10^6 cycles", "cycles"),
        *[
            (kf.StatUnit.SECONDS, kf.StatBase.POW10, exponent, symbol, "s")
            for exponent, symbol in (
                (0, "s"),
                (-3, "ms"),
                (-6, "us"),
                (-9, "ns"),
                (-12, "ps"),
                (3, "ks"),
                (-5, "10^-5 s"),
            )
        ],
        (kf.StatUnit.SECONDS, kf.StatBase.POW2, -9, "2^-9 s", "s"),
        *[
            (kf.StatUnit.BYTES, kf.StatBase.POW2, 10 * i, symbol, "B")
            for i, symbol in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "2^70 B"))
        ],
        (kf.StatUnit.BYTES, kf.StatBase.POW2, 12, "2^12 B", "B"),
        *[
            (kf.StatUnit.BYTES, kf.StatBase.POW10, 3 * i, symbol, "B")
            for i, symbol in enumerate(("B", "kB", "MB", "GB", "TB", "10^15 B"))
        ],
        (9, kf.StatBase.POW10, -9, "unit 9", "unit 9"),
        (kf.StatUnit.SECONDS, 7, -9, "base 7", "base 7"),
        (9, 7, 0, "unit 9, base 7", "unit 9, base 7"),
    ],
)
def test_units_are_written_as_people_write_them(unit, base, exponent, raw, si):
    """The unit of raw values and of base units, of numbers and of histogram edges; where a code is unknown, that."""
    for type_ in (kf.StatType.CUMULATIVE, kf.StatType.INSTANT, kf.StatType.LOG_HIST):
        stat = replace(PLAIN, type=type_, unit=unit, base=base, exponent=exponent)
        assert (stat.units(), stat.units(si=True)) == (raw, si)
    assert replace(stat, type=12).units().startswith("type 12")


def test_log_histogram_edges_are_powers_of_two_in_base_units():
    """Bucket 0 is [0,1), bucket i is [2^(i-1),2^i), the last is open; nanoseconds become seconds."""
    stat = replace(PLAIN, type=kf.StatType.LOG_HIST, size=5)
    assert stat.bucket_edges().tolist() == [0, 1, 2, 4, 8, np.inf]
    seconds = replace(stat, unit=kf.StatUnit.SECONDS, exponent=-9).bucket_edges()
    assert seconds.tolist() == [0, 1e-9, 2e-9, 4e-9, 8e-9, np.inf]
    assert seconds.dtype == np.float64


def test_linear_histogram_edges_are_multiples_of_the_bucket_size():
    """Bucket i is [i*w,(i+1)*w), the last is open."""
    stat = replace(PLAIN, type=kf.StatType.LINEAR_HIST, size=3, bucket_size=50)
    assert stat.bucket_edges().tolist() == [0, 50, 100, np.inf]
    scaled = replace(stat, unit=kf.StatUnit.BYTES, base=kf.StatBase.POW2, exponent=10)
    assert scaled.bucket_edges().tolist() == [0, 51200, 102400, np.inf]


def test_edges_of_one_bucket_and_of_more_than_floats_reach():
    """A single bucket is [0, inf); edges that no float reaches are inf and no error."""
    stat = replace(PLAIN, type=kf.StatType.LOG_HIST)
    assert stat.bucket_edges().tolist() == [0, np.inf]
    assert np.isinf(replace(stat, size=2000).bucket_edges()[-900:]).all()
    huge = replace(stat, size=65535, exponent=32767).bucket_edges()
    assert huge[0] == 0
    assert np.isinf(huge[1:]).all()


def test_what_has_no_edges_says_why():
    """No histogram, or a linear one without a width, is a ValueError that names the statistic."""
    with pytest.raises(ValueError, match="n is not a histogram"):
        PLAIN.bucket_edges()
    with pytest.raises(ValueError, match="bucket_size 0"):
        replace(PLAIN, type=kf.StatType.LINEAR_HIST, size=3).bucket_edges()


def test_a_stat_cannot_be_changed():
    """Stats are shared by all files of a kind, so they are frozen."""
    with pytest.raises(FrozenInstanceError):
        PLAIN.name = "other"


def test_the_structured_dtype_names_values_without_a_copy():
    """values.view(dtype)[name] shares memory with values, a histogram is a sub-array, gaps stay gaps."""
    image = made_of(
        replace(PLAIN, name="second", offset=16),
        replace(PLAIN, name="first", offset=0),
        replace(PLAIN, name="hist", type=kf.StatType.LINEAR_HIST, bucket_size=1, size=3, offset=32),
    )
    schema = image.schema
    assert (schema.num_values, schema.data_size, schema.dtype.itemsize) == (7, 56, 56)
    image.values[:] = range(7)
    view = image.values.view(schema.dtype)
    assert view.shape == (1,)
    assert (view["second"].tolist(), view["first"].tolist(), view["hist"].tolist()) == ([2], [0], [[4, 5, 6]])
    assert np.shares_memory(view["hist"], image.values)
    assert list(schema) == ["second", "first", "hist"]


def test_select_finds_names_and_globs_once_each_in_the_order_asked():
    """Names and globs give Stats, each once; what fits nothing is a KeyError with near misses."""
    schema = kf.parse(REAL).schema
    names = [stat.name for stat in schema.select("exits", "halt_*_hist", "io_exits", "*exits")]
    assert names[:5] == ["exits", "halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist", "io_exits"]
    assert len(names) == len(set(names))
    assert schema.select() == ()
    with pytest.raises(KeyError, match="did you mean halt_exits"):
        schema.select("halt_exit")
    with pytest.raises(KeyError, match="xyz_"):
        schema.select("xyz_*")


def test_an_unknown_name_is_a_key_error_with_near_misses():
    """image["exit"] says what there is instead."""
    image = kf.parse(REAL)
    for find in (image, image.schema):
        with pytest.raises(KeyError, match="did you mean exits"):
            find["exit"]
    assert image.schema.get("exit") is None


def test_parse_takes_any_buffer_and_nothing_else():
    """Bytes, bytearray, memoryview and numpy bytes are alike; an int or a str is a TypeError."""
    values = kf.parse(REAL).values
    for data in (bytearray(REAL), memoryview(REAL), np.frombuffer(REAL, np.uint8)):
        assert np.array_equal(kf.parse(data).values, values)
    for data in (4056, "kvm-1"):
        with pytest.raises(TypeError):
            kf.parse(data)


def test_an_image_is_a_mapping_in_all_but_its_values():
    """Names, length, membership and dict() work on what parse gives."""
    image = kf.parse(REAL)
    assert len(image) == 45
    assert "exits" in image
    assert list(image) == list(image.keys()) == list(image.schema)
    assert dict(image)["exits"] == image["exits"] == 1072


def test_values_of_the_wrong_length_are_not_unpacked():
    """A reading of another file is refused, not cut or padded."""
    image = kf.parse(REAL)
    with pytest.raises(ValueError, match=r"shape \(137,\)"):
        image.schema.unpack(image.values[1:])


def test_a_name_that_is_no_utf8_is_kept():
    """Bytes that are not text come back through surrogateescape, also as dtype field and key."""
    image = made_of(replace(PLAIN, name="caf\udce9"))
    assert list(image) == ["caf\udce9"]
    image.values[:] = [3]
    assert image["caf\udce9"] == image.values.view(image.schema.dtype)["caf\udce9"][0] == 3


def test_a_name_that_stands_twice_is_refused_and_both_places_are_named():
    """Duplicate names: the code, the offset of the second, and in the text the offset of the first."""
    data = bytearray(REAL)
    first, second = 72 + 16, 72 + 5 * 64 + 16
    data[second : second + 48] = data[first : first + 48]
    with pytest.raises(kf.FormatError, match=rf"'halt_successful_poll'.*byte {first} ") as caught:
        kf.parse(data)
    assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.DUPLICATE, second)


@pytest.mark.measures_memory
def test_a_header_that_promises_four_billion_descriptors_allocates_nothing():
    """num_desc 2^32-1 is refused before anything is made room for, parsed and live."""
    data = struct.pack("=6I", 0, 48, 0xFFFFFFFF, 24, 72, 0x7FFFFFF8).ljust(4096, b"\0")
    for opened in (kf.parse, kf.StatsFile.from_bytes):
        with pytest.raises(kf.FormatError, match="more than 65536 are refused") as caught:
            opened(data)
        assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.NUM_DESC, 8)


@pytest.mark.measures_memory
def test_a_table_that_is_promised_and_missing_allocates_nothing():
    """65536 descriptors of 4112 bytes that are not there are cut short, not 270 MB of zeros."""
    code = (
        "import re, resource, struct, kvmstats_fast as kf\n"
        "size = struct.pack('=6I', 0, 4096, 65536, 24, 4120, 0xFFFFFFF8).ljust(20000, b'\\0')\n"
        "ways = kf.parse, kf.StatsFile.from_bytes\n"  # imports what they take
        "limit = (int(re.search(r'VmData:\\s*(\\d+)', open('/proc/self/status').read())[1]) << 10) + (100 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "for opened in ways:\n"
        "    try: opened(size)\n"
        "    except kf.FormatError as error: print(error.code.name, error.offset)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["TRUNCATED", "20000"] * 2


def test_schemas_are_equal_if_their_descriptors_are_and_survive_pickling():
    """Pickling gives back the one shared object; fingerprints and hashes follow equality."""
    one, other = kf.parse(REAL).schema, made_of(PLAIN).schema
    assert pickle.loads(pickle.dumps(one)) is one
    assert one != other
    assert one != one.fingerprint
    assert one.fingerprint != other.fingerprint
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))
    for kernel in ("v2-x86_64", "arm64-6.1"):
        schema = kf.parse((DATA / "captures" / kernel / "vm-after.bin").read_bytes()).schema
        assert pickle.loads(pickle.dumps(schema)) is schema


@pytest.fixture
def cache(monkeypatch):
    """An empty cache of at most four schemas and 100 kB."""
    cache = schema_module.SchemaCache(capacity=4, size=100_000)
    monkeypatch.setattr(schema_module, "CACHE", cache)
    return cache


def image_of(number, stats=1, name_size=48):
    """The bytes of a merged file of one kind in many: so many statistics, with names of so many bytes."""
    head = struct.pack("=6I", 0, name_size, stats, 24, 24 + name_size, 24 + name_size + stats * (16 + name_size))
    table = b"".join(
        struct.pack(f"=IhHII{name_size}s", 0, 0, 1, 8 * i, number, f"n{i}".encode().rjust(name_size - 1, b"n"))
        for i in range(stats)
    )
    return head + b"kvm-1".ljust(name_size, b"\0") + table + bytes(8 * stats)


def test_the_cache_is_bounded_and_keeps_what_is_used(cache):
    """Of many kinds of files only the last ones are kept, and one that is asked for again and again stays."""
    kept = kf.parse(REAL).schema
    for number in range(20):
        kf.parse(image_of(number))
        assert kf.parse(REAL).schema is kept
    assert sum(cache.find(image_of(number)) is not None for number in range(20)) == 3


@pytest.mark.parametrize(("stats", "name_size"), [(1, 8), (60, 48), (130, 16), (4, 4096), (200, 8), (600, 48)])
def test_the_cache_is_bounded_by_what_it_keeps(cache, stats, name_size):
    """However large the tables and names of strange files are, no more memory than was set stays in use for them."""
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(30):
            image = kf.parse(image_of(number, stats, name_size))
            image.snapshot()
            assert image.schema.dtype.itemsize == 8 * stats
        del image
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 100_000 + 20_000
    finally:
        tracemalloc.stop()
    assert kf.parse(REAL).schema is kf.parse(REAL).schema
    cache.clear()
    assert cache.find(REAL) is None


def meanwhile_forked(parse):
    """Parse in a child that is forked now, and is killed if it hangs."""

    def work():
        signal.alarm(20)
        parse()

    assert exit_status(forked(work)) == 0


def meanwhile_threaded(parse):
    """Parse in another thread, while this one waits."""
    thread = threading.Thread(target=parse, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.usefixtures("cache")  # whose steps are few, and evictions many
@pytest.mark.parametrize("meanwhile", [lambda parse: parse(), meanwhile_forked, meanwhile_threaded])
def test_a_file_can_be_parsed_at_any_step_of_parsing_another(meanwhile):
    """In a signal handler, in a forked child and in another thread: no step holds a lock that these wait for."""

    def work():
        number, steps = itertools.count(), itertools.count()

        def others():
            for data in (image_of(next(number)), REAL):
                assert kf.parse(data).schema is kf.parse(data).schema

        def trace(frame, event, _):
            if not isinstance(frame.f_locals.get("self"), type(schema_module.CACHE)):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(steps) % stride == 0:
                sys.settrace(None)
                signal.alarm(60)  # a step that hangs is killed; all of them may take longer, where forks are slow
                meanwhile(others)
                sys.settrace(trace)
            return trace

        stride = 11 if meanwhile is meanwhile_forked else 1
        sys._getframe().f_trace_opcodes = True
        kf.parse(REAL)
        sys.settrace(trace)
        for _ in range(3):
            kf.parse(REAL)
            kf.parse(image_of(-next(number) & 0xFFFFFFFF))
        sys.settrace(None)
        assert next(steps) > 100

    assert exit_status(forked(work)) == 0


def test_files_with_different_ids_share_a_schema_in_every_layout():
    """The id is not part of what makes a schema, wherever the layout puts it."""
    for layout in ("v2", "v5", "v9", "merged"):
        schemas = set()
        for pid in (1, 22, 4194304):
            with SyntheticStats("s390", "vcpu", layout=layout, pid=pid) as made:
                image = kf.parse(made.to_bytes())
                assert image.id == f"kvm-{pid}/vcpu-0"
                schemas.add(id(image.schema))
        assert len(schemas) == 1


def test_threads_that_meet_a_new_kind_of_file_at_once_get_one_schema():
    """However many threads parse a kind for the first time together, one Schema comes out."""
    for attempt in range(20):
        with SyntheticStats(stats=[replace(PLAIN, name=f"thread{attempt}")]) as made:
            data = made.to_bytes()
        barrier = threading.Barrier(8)
        found = []

        def work(barrier=barrier, data=data, found=found):
            barrier.wait()
            found.append(kf.parse(data).schema)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(schema) for schema in found}) == 1
        assert len(found) == 8


def test_threads_that_meet_a_schema_at_once_all_get_every_statistic():
    """The first snapshots of a kind, taken in many threads at once, are all complete."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for attempt in range(60):
            stats = [replace(PLAIN, name=f"s{attempt}n{i}", offset=-1) for i in range(150)]
            with SyntheticStats(stats=stats) as made:
                image = kf.parse(made.to_bytes())
            barrier, sizes, found = threading.Barrier(4), [], []

            def work(image=image, barrier=barrier, sizes=sizes, found=found):
                barrier.wait()
                sizes.append(len(image.snapshot()))
                found.append(image.schema.stats)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sizes == [150] * 4
            assert len({id(stats) for stats in found}) == 1
    finally:
        sys.setswitchinterval(before)


def test_a_file_can_be_opened_and_read_without_an_object_for_each_statistic(monkeypatch):
    """They are made when one is asked for; names are there before, and equal ones are refused at once."""
    data = image_of(0xABCD, 3)
    with monkeypatch.context() as no_stats:
        no_stats.setattr("kvmstats_fast.schema.Stat", None)
        with kf.StatsFile.from_bytes(data) as file:
            assert file.read().tolist() == [0, 0, 0]
            names = list(file.schema)
            assert (len(names), names[2] in file.schema, "m" in file.schema) == (3, True, False)
        with pytest.raises(kf.FormatError, match="descriptor 2 has the name 'nnnnnn1', as the one at byte 72 has"):
            kf.parse(image_of(0xABCD, 3, 8).replace(b"n2", b"n1"))
    assert [stat.name for stat in kf.parse(data).schema.stats] == names


def test_a_schema_cannot_be_changed():
    """It is shared by all files of its kind: assigning to it is an AttributeError."""
    schema = kf.parse(REAL).schema
    for name in ("stats", "header", "data_size"):
        with pytest.raises(AttributeError, match="shared"):
            setattr(schema, name, ())
    assert len(kf.parse(REAL).schema.stats) == 45


def test_a_table_beyond_measure_is_not_kept(cache):
    """A schema that takes much memory is parsed each time; what is kept stays small."""
    header = struct.pack("=6I", 0, 4096, 300, 24, 4120, 4120 + 300 * 4112)
    table = b"".join(struct.pack("=IhHII4096s", 0, 0, 1, 8 * i, 0, b"n%d" % i) for i in range(300))
    data = header + bytes(4096) + table + bytes(2400)
    assert kf.parse(data).schema == kf.parse(data).schema
    assert cache.find(data) is None


def test_a_statistic_of_several_values_that_is_no_histogram_is_a_row():
    """Size alone makes an array of it, whatever its type."""
    image = made_of(replace(PLAIN, size=3))
    image.values[:] = [1, 2, 3]
    assert image["n"].tolist() == image.snapshot()["n"].tolist() == [1, 2, 3]


def test_an_id_that_is_cut_is_refused_also_when_the_schema_is_known():
    """A file whose id stands behind the table must reach to its end."""
    with SyntheticStats(stats=[PLAIN]) as made:
        data = made.to_bytes()
    moved = struct.pack("=6I", 0, 48, 1, 96, 24, 88) + data[72:136] + bytes(8) + b"kvm-7".ljust(48, b"\0")
    assert kf.parse(moved).id == "kvm-7"
    with pytest.raises(kf.FormatError) as caught:
        kf.parse(moved[:-1])
    assert (caught.value.code, caught.value.offset) == (kf.ErrorCode.TRUNCATED, len(moved) - 1)


def test_no_data_is_asked_of_a_file_without_descriptors():
    """num_desc 0 and a data_offset behind the end of the file: there is nothing to be cut."""
    image = kf.parse(struct.pack("=6I", 0, 48, 0, 24, 72, 720) + b"kvm-1".ljust(48, b"\0"))
    assert image.values.shape == (0,)


def test_only_uint64_values_are_unpacked():
    """Lists and other dtypes are TypeErrors."""
    schema = kf.parse(REAL).schema
    for values in ([0] * 138, np.zeros(138), np.zeros(138, np.int64)):
        with pytest.raises(TypeError, match="uint64"):
            schema.unpack(values)


def test_a_format_error_survives_pickling():
    """Code, offset and text cross process boundaries."""
    with pytest.raises(kf.FormatError) as caught:
        kf.parse(b"")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.code, error.offset, str(error)) == (kf.ErrorCode.TRUNCATED, 0, str(caught.value))


def test_no_descriptors_is_a_legal_file():
    """num_desc 0 gives an empty schema and an empty array, parsed and live."""
    with SyntheticStats(stats=[]) as made, made.open() as file:
        image = kf.parse(made.to_bytes())
        assert (len(image), image.values.shape, file.read().shape) == (0, (0,), (0,))
        assert file.snapshot() == {}


def test_blocks_may_stand_in_any_order_with_gaps():
    """Data before descriptors before id, with gaps: read by their offsets."""
    with SyntheticStats(stats=[PLAIN, replace(PLAIN, name="m", offset=8)]) as made:
        made.set("m", 9)
        data = made.to_bytes()
    table, values = data[72 : 72 + 128], data[72 + 128 :]
    moved = struct.pack("=6I", 0, 48, 2, 232, 64, 32) + bytes(8) + values + bytes(16) + table + bytes(40)
    moved += b"kvm-7/vcpu-2".ljust(48, b"\0")
    image = kf.parse(moved)
    assert (image.id, image["n"], image["m"]) == ("kvm-7/vcpu-2", 0, 9)
    with kf.StatsFile.from_bytes(moved) as file:
        assert (file.vcpu_id, file.snapshot()) == (2, {"n": 0, "m": 9})
