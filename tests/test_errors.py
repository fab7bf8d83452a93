"""Exceptions keep what they say wherever they go, and a wrong argument gets a sentence."""

import copy
import errno
import pickle

import numpy as np
import pytest
from helpers import DATA
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast import errors
from kvmstats_fast.testing import SyntheticStats

STATS = [
    kf.Stat("exits", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1),
    kf.Stat("hist", kf.StatType.LOG_HIST, kf.StatUnit.SECONDS, kf.StatBase.POW10, -9, 3, -1),
]
REAL = (DATA / "captures" / "x86_64-6.1" / "vcpu0-after.bin").read_bytes()
ARGUMENTS = {
    errors.KvmStatsError: ("what, where, what to do",),
    errors.FormatError: (errors.ErrorCode.LAYOUT, 4, "fd 3: byte 4: not a KVM stats file"),
    errors.AttachError: (errno.EPERM, "process 7 may not be traced"),
    errors.VmGoneError: (errno.ESRCH, "process 7 has ended"),
    errors.HandOverError: ("the sender went away",),
    errors.KvmUnavailableError: (errno.ENOENT, "no /dev/kvm"),
    errors.RecordingWarning: ("run: part 3 is missing",),
    errors.SamplingWarning: ("the wall clock jumped by 3600 s",),
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "called with its arguments": lambda error: type(error)(*error.args),
    **{
        f"pickle {n}": lambda error, n=n: pickle.loads(pickle.dumps(error, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


def x():
    """Samples of two vCPUs, three sweeps."""
    return run_of(group_of(STATS, range(2), {"exits": np.arange(6).reshape(3, 2)}))


def test_every_exception_is_in_one_room_and_here():
    """Whoever looks for one finds it in errors.py; each is in the list that these tests copy."""
    found = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)}
    assert found == set(ARGUMENTS)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_exception_is_the_same_after_a_copy(kind, way):
    """Type, text, arguments, errno, code and offset stay, and so do samples that a strict run attached."""
    error = kind(*ARGUMENTS[kind])
    error.samples = None if way == "called with its arguments" else x()
    other = COPIES[way](error)
    assert type(other) is kind
    assert (str(other), other.args) == (str(error), error.args)
    for name in ("errno", "strerror", "code", "offset"):
        assert getattr(other, name, None) == getattr(error, name, None)
    if error.samples is not None:
        assert other.samples["exits"].tolist() == error.samples["exits"].tolist()


def test_what_the_core_refuses_is_the_same_after_a_copy():
    """Also that of a real file, whose text names the byte."""
    with pytest.raises(kf.FormatError) as caught:
        kf.parse(REAL[:3000])
    other = pickle.loads(pickle.dumps(caught.value))
    assert (other.code, other.offset, str(other)) == (kf.ErrorCode.TRUNCATED, 3000, str(caught.value))


def view(name):
    """View one statistic of a Sampler."""
    with SyntheticStats() as made, made.open() as file:
        kf.Sampler([file]).view(name)


WRONG = {
    "a Samples index": lambda wrong: x()[wrong],
    "delta": lambda wrong: x().delta(wrong),
    "rate": lambda wrong: x().rate(wrong),
    "total": lambda wrong: x().total(wrong),
    "resets": lambda wrong: x().resets(wrong),
    "si": lambda wrong: x().si(wrong),
    "stat": lambda wrong: x().stat(wrong),
    "columns": lambda wrong: x().columns(wrong),
    "histogram": lambda wrong: x().histogram(wrong),
    "duty_cycle": lambda wrong: x().duty_cycle(wrong),
    "a Schema index": lambda wrong: kf.parse(REAL).schema[wrong],
    "a StatsImage index": lambda wrong: kf.parse(REAL)[wrong],
    "select": kf.parse(REAL).schema.select,
    "view": view,
}


@pytest.mark.parametrize("wrong", [3, None, b"exits", ["exits"], 1.5, ("exits",), np.int64(0)], ids=repr)
@pytest.mark.parametrize("call", WRONG)
def test_what_is_not_a_name_is_a_type_error_with_a_sentence(call, wrong):
    """Of any type, hashable or not, the message shows it and says what it should be."""
    with pytest.raises(TypeError, match=r"name( or glob)?\b.*|neither the name") as caught:
        WRONG[call](wrong)
    assert len(str(caught.value)) > 30


@pytest.mark.parametrize("wrong", [3, None, b"exits", ["exits"], 1.5], ids=repr)
def test_what_is_not_a_name_is_refused_by_recordings_too(wrong, tmp_path):
    """And a mapping that is asked for one has no such key."""
    pytest.importorskip("pyarrow")
    x().save(tmp_path / "run")
    recordings = kf.open_recordings(tmp_path / "run")
    for ask in (recordings.total, recordings.mean_rate, recordings.histogram):
        with pytest.raises(TypeError, match="not the name of a statistic"):
            ask(wrong)
    if not isinstance(wrong, list):
        assert wrong not in kf.compare(x(), x())


@pytest.mark.parametrize("by", [[], {}, 5, "pid", ""], ids=repr)
def test_what_is_added_up_by_is_one_of_three_words(by, tmp_path):
    """Whatever else it is, and whoever is asked."""
    pytest.importorskip("pyarrow")
    x().save(tmp_path / "run")
    recordings = kf.open_recordings(tmp_path / "run")
    asks = [
        lambda: x().figures(by=by),
        lambda: x().histogram("hist").by(by),
        lambda: recordings.figures(by),
        lambda: recordings.total("exits", by),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"by is .*; it must be one of 'host', 'vm', 'vcpu'"):
            ask()


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("rotate_bytes", "1M", TypeError, "rotate_bytes is a str; it must be a whole number, at least 1"),
        ("rotate_bytes", 0, ValueError, "rotate_bytes is 0; it must be at least 1"),
        ("rotate_seconds", "60", TypeError, "rotate_seconds is a str; it must be a number of seconds"),
        ("rotate_seconds", 0, ValueError, "rotate_seconds is 0; it must be more than 0 seconds"),
        ("rotate_seconds", float("nan"), ValueError, "rotate_seconds is nan; it must be more than 0 seconds"),
        ("flush_seconds", None, TypeError, "flush_seconds is a NoneType; it must be a number of seconds"),
        ("flush_seconds", -1, ValueError, "flush_seconds is -1; it must be 0 or more seconds"),
        ("flush_bytes", 1.5, TypeError, "flush_bytes is a float; it must be a whole number, at least 1"),
        ("batch_bytes", b"", TypeError, "batch_bytes is a bytes; it must be a whole number, at least 0"),
        ("batch_bytes", -1, ValueError, "batch_bytes is -1; it must be at least 0"),
        ("host", 7, TypeError, "host is an int; it must be the name of a host"),
    ],
)
def test_a_wrong_argument_of_a_writer_is_named_before_anything_is_made(name, wrong, error, message, tmp_path):
    """What is wrong, and what would be right."""
    pytest.importorskip("pyarrow")
    x().save(tmp_path / "run")
    write = kf.Recorder if name != "host" else lambda path, host: kf.to_parquet(tmp_path / "run", path, host=host)
    with pytest.raises(error) as caught:
        write(tmp_path / "new", **{name: wrong})
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: x().histogram("hist")[0].quantile("0.5"), TypeError, "q is a str; it must be a number from 0 to 1"),
        (lambda: x().histogram("hist").quantile(None), TypeError, "q is a NoneType; it must be a number from 0 to 1"),
        (lambda: x().histogram("hist").quantile([[0.5]]), TypeError, "q is a list; it must be a number from 0 to 1"),
        (lambda: x().histogram("hist").quantile([0.5, 2]), ValueError, "q is 2; it must be from 0 to 1"),
        (lambda: x().histogram("hist").quantile(1.5), ValueError, "q is 1.5; it must be from 0 to 1"),
        (lambda: x().histogram("hist").quantile(float("nan")), ValueError, "q is nan; it must be from 0 to 1"),
        (lambda: x().histogram("hist", "1"), TypeError, "sweep is a str; it must be a whole number, from -3 to 2"),
        (lambda: x().histogram("hist", 1.0), TypeError, "sweep is a float; it must be a whole number, from -3 to 2"),
        (lambda: x().histogram("hist", 3), IndexError, "sweep is 3; it must be from -3 to 2"),
        (lambda: x().histogram("hist", -4), IndexError, "sweep is -4; it must be from -3 to 2"),
        (lambda: kf.Histogram("hist", [1]), TypeError, "stat is a str; it must be the Stat of a histogram"),
        (lambda: kf.Samples.concatenate(3), TypeError, "parts is an int; it must be several Samples"),
        (lambda: kf.Samples.concatenate(x()), TypeError, "parts is a Samples; it must be several Samples"),
        (lambda: kf.Samples.concatenate([x(), "y"]), TypeError, "parts has a str; it must be several Samples"),
        (lambda: kf.parse(3), TypeError, "data is an int; it must be the bytes of a stats file"),
        (lambda: kf.parse("kvm"), TypeError, "data is a str; it must be the bytes of a stats file"),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_must_be(call, error, message):
    """What is wrong, and what would be right."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_near_misses_are_looked_for_in_all_files():
    """A name that only the last kind of file has is suggested, by samples, a Sampler, and for a glob."""
    with SyntheticStats(kind="vm") as vm, SyntheticStats() as vcpu, vm.open() as a, vcpu.open() as b:
        x = kf.Sampler([a, b]).run(0, count=1)
        for call in (lambda: x["halt_exit"], lambda: kf.Sampler([a, b], "halt_exit"), lambda: x.stat("halt_exit")):
            with pytest.raises(KeyError, match="did you mean halt_exits"):
                call()
        with pytest.raises(KeyError, match=r"did you mean .*remote_tlb_flush"):
            kf.Sampler([b, a], ["exits", "remote_tlb_flus"])
        with pytest.raises(KeyError, match="none of the 60 names there is similar"):
            x["ZZZ"]
