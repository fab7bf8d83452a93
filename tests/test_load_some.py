"""Loading some of it: what is asked for is what `select` and `between` give, and nothing else is decompressed."""

from dataclasses import replace
from itertools import pairwise

import hypothesis
import made
import numpy as np
import pytest
from helpers import examples
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.formats import ipc, stream_file

VM = made.schema_of(None, "vm")
VCPU = made.schema_of(None, "vcpu")
ODD = made.schema_of(made.ODD)
KINDS = [("vm", VM, 1), ("vcpu", ODD, 2)]


@pytest.fixture
def path(tmp_path):
    """Where to record to."""
    return tmp_path / "run"


def write(path, parts, **options):
    """Record parts, each a batch."""
    with kf.Recorder(path, flush_seconds=0, **options) as recorder:
        for part in parts:
            recorder.write(part)


def outcome(call):
    """Samples, or what was raised instead."""
    try:
        return call()
    except (KeyError, ValueError) as error:
        return type(error)


EDGE = st.one_of(st.none(), st.floats(0, 14), st.integers(-2, 14).map(lambda second: ("wall", second)))
QUESTIONS = st.fixed_dictionaries(
    {
        "failures": st.dictionaries(st.integers(0, 2), st.integers(0, 12), max_size=3),
        "clock": st.dictionaries(st.integers(1, 11), st.sampled_from([10**9, -2 * 10**9, 5]), max_size=2),
        "cuts": st.sets(st.integers(0, 12), max_size=6),
        "names": st.sampled_from([None, "exits", ["wait_*", "exits"], ["remote_tlb_flush"], ["*"], ["none"]]),
        "edges": st.tuples(EDGE, EDGE),
    }
)
EPOCH = 1790000000 * 10**9


def wall(x, second):
    """The time of the wall clock, so many seconds after the first sweep."""
    return np.datetime64(int(x.time[0]) + EPOCH + second * 10**9, "ns")


@pytest.mark.parametrize("form", [None, "zstd", "run.npz"])
@hypothesis.given(ask=QUESTIONS)
@hypothesis.settings(examples(60))
def test_some_of_it_is_what_select_and_between_give_of_all(form, ask, tmp_path_factory):
    """Bit for bit, whatever failed and however the wall clock was set; and what they refuse is refused."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    errors = [kf.SampleError(file, sweep, OSError(9, "gone")) for file, sweep in ask["failures"].items()]
    steps = tuple((sweep, EPOCH + offset) for sweep, offset in sorted(ask["clock"].items()))
    x = made.samples(KINDS, 12, errors=errors, wall_offset=EPOCH, wall_steps=steps)
    x.time[:] = 10**12 + np.arange(12) * 10**9
    parts = [x[a:b] for a, b in pairwise(sorted({0, *ask["cuts"], 12}))]
    whole = kf.Samples.concatenate(parts)
    if form == "run.npz":
        path = path.with_name(form)
        whole.save(path)
    else:
        write(path, parts, compression=form)
    names = ask["names"]
    edges = [wall(x, edge[1]) if isinstance(edge, tuple) else edge for edge in ask["edges"]]

    def wanted():
        some = whole if names is None else whole.select(*([names] if isinstance(names, str) else names))
        return some.between(*edges)

    expected, found = outcome(wanted), outcome(lambda: kf.Samples.load(path, names, *edges))
    if isinstance(expected, kf.Samples):
        assert isinstance(found, kf.Samples)
        for one in (found, expected):
            one.errors = tuple(sorted(one.errors, key=lambda error: error.file))
        made.assert_same(found, expected)
    else:
        assert isinstance(found, type)


def spoil(file, values):
    """Break the zstd frame of the column that has these values, which are at random and so stand there as they are."""
    whole = bytearray(file.read_bytes())
    place = whole.index(np.ascontiguousarray(values).astype("<u8").tobytes()[:64])
    whole[whole.rindex(b"\x28\xb5\x2f\xfd", 0, place)] = 0
    file.write_bytes(whole)


def test_other_statistics_are_not_looked_at(path):
    """Not even where their bytes are damaged."""
    x = made.samples([("vcpu", ODD, 2)], 40)
    write(path, [x[:20], x[20:]], compression="zstd")
    x = kf.Samples.concatenate([x[:20], x[20:]])
    spoil(path / "vcpu-00000.arrows", x["gauge"][20:])
    made.assert_same(kf.Samples.load(path, ["exits", "wait_hist"]), x.select("exits", "wait_hist"))
    with pytest.warns(kf.RecordingWarning, match="it has 1 whole batches"):
        made.assert_same(kf.Samples.load(path, "gauge"), x[:20].select("gauge"))


def test_other_batches_are_not_looked_at(path):
    """Those before the range, and those after it."""
    x = made.samples([("vm", VM, 1), ("vcpu", ODD, 2)], 50)
    x.time[:] = np.arange(50) * 10**9
    write(path, [x[i : i + 10] for i in range(0, 50, 10)], compression="zstd")
    for batch in (1, 4):
        spoil(path / "vcpu-00000.arrows", x.vcpu["gauge"][10 * batch : 10 * batch + 10])
    made.assert_same(kf.Samples.load(path, start=29, stop=33.5), x[29:34])
    start, stop = (str(wall(x, second))[:-3] for second in (20, 40))
    made.assert_same(kf.Samples.load(path, start=start, stop=stop), x[20:40])
    with pytest.warns(kf.RecordingWarning, match="it has 4 whole batches"):
        kf.Samples.load(path, start=30, stop=43)


def test_some_of_one_uncompressed_batch_stays_in_the_file(path):
    """Columns and sweeps are views of it."""
    x = made.samples([("vcpu", VCPU, 2)], 50)
    x.time[:] = np.arange(50) * 10**9
    x.save(path)
    y = kf.Samples.load(path, "exits", 10, 20)
    assert not y["exits"].flags.owndata
    assert not y["exits"].flags.writeable
    made.assert_same(y, x.select("exits")[10:20])


@pytest.mark.parametrize("form", ["run", "run.npz"])
def test_what_is_not_there_is_named(form, tmp_path):
    """A statistic that no file has, with what is near; times that are none."""
    path = tmp_path / form
    x = made.samples([("vcpu", VCPU, 2)], 5)
    x.save(path)
    with pytest.raises(KeyError, match=r"no statistic 'exit' in .*run.*did you mean exits"):
        kf.Samples.load(path, "exit")
    with pytest.raises(ValueError, match="stats is empty"):
        kf.Samples.load(path, [])
    with pytest.raises(TypeError, match="stats is an int"):
        kf.Samples.load(path, 5)
    with pytest.raises(ValueError, match="start is 'noon'"):
        kf.Samples.load(path, start="noon")
    assert len(kf.Samples.load(path, start="2031-01-01")) == 0
    assert kf.Samples.load(path, "exits", "2031-01-01").names == ("exits",)


@pytest.mark.parametrize(("stats", "words"), [(["wait_hist"], 5), (["several", "exits"], 4), (None, 16)])
def test_what_is_weighed_is_what_will_be_decompressed(stats, words, path, monkeypatch):
    """Of the columns that are asked for, and of those that say which row is whose: 8, 8, 8 and 4 bytes."""
    x = made.samples([("vcpu", ODD, 2)], 40)
    write(path, [x], compression="zstd")
    claims = []
    monkeypatch.setattr(stream_file, "check_size", lambda size, *_, **__: claims.append(size))
    kf.Samples.load(path, stats)
    dictionaries = sum(len(one) + 8 for one in ("härd".encode(), b"web")) + sum(len(info.id) for info in x.files) + 12
    assert 0 <= claims[0] - 80 * (8 * words + 28) <= dictionaries


def test_what_a_message_says_of_itself_is_weighed_or_no_message(path):
    """Whatever is damaged in it: no other error, and nothing beyond the stream is looked at."""
    write(path, [made.samples([("vcpu", ODD, 2)], 4)], compression="zstd")
    (file,) = path.iterdir()
    stream = file.read_bytes()
    start = 8 + int.from_bytes(stream[4:8], "little", signed=True)
    end = ipc.measure_next(memoryview(stream), start)[2]
    with pytest.raises(ipc.NoMessageError):
        ipc.measure_next(memoryview(stream), start, np.array([0, 10**6]))  # of which the batch has only the first
    weighed = refused = 0
    for at in range(start, min(end, start + 2000)):
        for value in (0, 1, 0x7F, 0xFF):
            try:
                found = ipc.measure_next(memoryview(stream[:at] + bytes([value]) + stream[at + 1 :]), start)
            except ipc.NoMessageError:  # noqa: PERF203 - each by itself
                refused += 1
            else:
                weighed += 1
                assert found is None or (found[0] >= 0 and found[2] <= len(stream))
    assert weighed > 1000
    assert refused > 1000


def test_a_range_that_a_clock_passes_twice_is_no_one_stretch(path):
    """Where it was set back between two batches: seconds from the start name one of them."""
    x = made.samples([("vcpu", VCPU, 1)], 10)
    x.time[:] = np.arange(10) * 10**9
    write(path, [x[:5], replace(x[5:], wall_offset=x.wall_offset - 5 * 10**9)])
    start, stop = (np.datetime64(x.wall_offset + second * 10**9, "ns") for second in (1, 3))
    with pytest.raises(ValueError, match=r"the wall clock was set back.*: give seconds from the start"):
        kf.Samples.load(path, None, start, stop)
    assert kf.Samples.load(path, None, 1, 3).time.tolist() == x.time[1:3].tolist()
