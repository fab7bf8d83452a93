"""A Perfetto trace has every value of every sweep, at its time; read back by the classes of the package itself."""

import stat
from collections import defaultdict
from dataclasses import replace

import made
import numpy as np
import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb
from perfetto.trace_builder.proto_builder import TraceProtoBuilder

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.formats import perfetto

ODD = made.schema_of(made.ODD)


def small(x):
    """The same samples with values that an int64 holds."""
    for group in x.groups:
        np.bitwise_and(group.values, np.uint64((1 << 63) - 1), out=group.values)
    return x


@pytest.fixture
def x():
    """A VM file, two vCPUs of which one fails, statistics of every type and unit."""
    parts = [("vm", made.schema_of(None, "vm"), 1), ("vcpu", ODD, 2)]
    return small(made.samples(parts, 6, errors=[kf.SampleError(2, 4, OSError(9, "gone"))]))


def read(path):
    """{path of names: [(time, value)]} of all counters, their descriptors by path, and all packets."""
    packets = pb.Trace.FromString(path.read_bytes()).packet
    tracks = {one.track_descriptor.uuid: one.track_descriptor for one in packets if one.HasField("track_descriptor")}
    assert len(tracks) == sum(one.HasField("track_descriptor") for one in packets)

    def name(uuid):
        track = tracks[uuid]
        return (*(name(track.parent_uuid) if track.parent_uuid else ()), track.name)

    counters = defaultdict(list)
    for one in packets:
        if one.HasField("track_event"):
            assert one.timestamp_clock_id == pb.BUILTIN_CLOCK_MONOTONIC
            assert one.trusted_packet_sequence_id
            assert one.track_event.type == pb.TrackEvent.TYPE_COUNTER
            counters[name(one.track_event.track_uuid)].append((one.timestamp, one.track_event.counter_value))
    return counters, {name(uuid): track.counter for uuid, track in tracks.items()}, packets


def filled(points, times):
    """What a counter shows at these times: its last value before or at each."""
    stamps, values = zip(*points, strict=True)
    assert list(stamps) == sorted(stamps)
    return [values[at] for at in np.searchsorted(stamps, times, "right") - 1]


def test_every_value_of_every_sweep_is_in_it(x, tmp_path):
    """Each statistic and bucket of each file has a counter that shows what was read, until the file failed."""
    x.to_perfetto(tmp_path / "x.pftrace")
    counters, about, _ = read(tmp_path / "x.pftrace")
    assert counters.pop(("härd", "sweep_ns")) == list(zip(x.time.tolist(), x.sweep_ns.tolist(), strict=True))
    seen = 0
    for part, name in [(group, name) for group in x.groups for name in group.places]:
        one, shown = part.places[name][0], name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for column, index in enumerate(part.columns.tolist()):
            stop = 4 if index == 2 else 6
            values = one.as_signed(part.view(name)[:stop, column]).reshape(stop, -1)
            labels = [f"{shown}[{i}]" for i in range(one.size)] if one.shape else [shown]
            for label, series in zip(labels, values.T.tolist(), strict=True):
                path = ("härd", "VM web (pid 1)", *([f"vCPU {index}"] if part.kind == "vcpu" else []), label)
                assert filled(counters[path], x.time[:stop]) == series
                assert counters[path][-1][0] <= x.time[stop - 1]
                seen += 1
    assert seen == len(counters)
    vcpu = ("härd", "VM web (pid 1)", "vCPU 1")
    assert about[(*vcpu, "wait_ns")].unit == pb.CounterDescriptor.UNIT_TIME_NS
    gauge = about[(*vcpu, "gauge")]
    assert (gauge.unit, gauge.unit_multiplier) == (pb.CounterDescriptor.UNIT_SIZE_BYTES, 1024)
    assert about[(*vcpu, "wait_hist[2]")].unit == pb.CounterDescriptor.UNIT_COUNT


def test_what_does_not_change_is_written_once(tmp_path):
    """A counter has its first value and those that differ from the one before."""
    values = np.array([[5], [5], [7], [7], [5]])
    x = made.run_of(made.group_of(made.ODD[:2], [0], {"exits": values}))
    x.to_perfetto(tmp_path / "x.pftrace")
    counters, _, _ = read(tmp_path / "x.pftrace")
    assert counters["here", "VM web (pid 1)", "vCPU 0", "exits"] == [(0, 5), (2 * 10**9, 7), (4 * 10**9, 5)]
    assert counters["here", "VM web (pid 1)", "vCPU 0", "time"] == [(0, 0)]


def test_clock_snapshots_say_what_time_it_was(tmp_path):
    """At the first sweep, and where the wall clock was set; the trace's own time is CLOCK_MONOTONIC."""
    x = made.run_of(made.group_of(made.ODD, [0], {"exits": np.zeros((5, 1))}), wall_offset=10**18)
    x.wall_steps = ((3, 2 * 10**18),)
    x.to_perfetto(tmp_path / "x.pftrace")
    snapshots = [one.clock_snapshot for one in read(tmp_path / "x.pftrace")[2] if one.HasField("clock_snapshot")]
    clocks = [{clock.clock_id: clock.timestamp for clock in one.clocks} for one in snapshots]
    assert clocks == [{3: 0, 1: 10**18}, {3: 3 * 10**9, 1: 2 * 10**18 + 3 * 10**9}]
    assert {one.primary_trace_clock for one in snapshots} == {pb.BUILTIN_CLOCK_MONOTONIC}


def test_a_clock_before_1970_and_a_host_that_is_no_text_are_in_it(x, tmp_path):
    """A trace cannot hold such a time: it is by CLOCK_MONOTONIC alone. Bytes that are no UTF-8 are escaped."""
    x.wall_offset = -(10**18)
    replace(x, host="h\udcff").to_perfetto(tmp_path / "x")
    counters, _, packets = read(tmp_path / "x")
    assert {path[0] for path in counters} == {"h\\xff"}
    assert {clock.clock_id for one in packets for clock in one.clock_snapshot.clocks} == {pb.BUILTIN_CLOCK_MONOTONIC}


def test_a_recording_is_converted_batch_by_batch(x, tmp_path, monkeypatch, capsys):
    """Of several batches, and more packets than are made at once, it shows what the samples do."""
    made_at_once, serialize = [], TraceProtoBuilder.serialize
    monkeypatch.setattr(perfetto, "_PACKETS", 7)
    monkeypatch.setattr(
        TraceProtoBuilder, "serialize", lambda self: made_at_once.append(len(self.trace.packet)) or serialize(self)
    )
    with kf.Recorder(tmp_path / "r", flush_seconds=0) as recorder:
        recorder.write(x[:2])
        recorder.write(x[2:])
    assert cli.main(["convert", str(tmp_path / "r"), "-o", str(tmp_path / "r.pftrace")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.pftrace'}\n"
    assert set(made_at_once[:-1]) == {7}
    x.to_perfetto(tmp_path / "x.pftrace")
    counters, whole = (read(tmp_path / f"{name}.pftrace")[0] for name in "rx")
    assert set(counters) == set(whole)
    for path, points in counters.items():
        times = x.time[x.time <= points[-1][0]]
        assert filled(points, times) == filled(whole[path], times)


def test_tracks_of_two_traces_do_not_mix(x, tmp_path):
    """Traces that are put together keep their tracks and sequences apart; files with one label have a track each."""
    twins = replace(x, files=tuple(replace(info, vm="same", kind="vm", vcpu_id=None) for info in x.files))
    twins.to_perfetto(tmp_path / "twins")
    x[1:].to_perfetto(tmp_path / "later")
    (tmp_path / "both").write_bytes((tmp_path / "twins").read_bytes() + (tmp_path / "later").read_bytes())
    counters, _, packets = read(tmp_path / "both")
    assert {path[1] for path in counters if len(path) == 3} >= {f"VM same (pid 1) (file {i})" for i in range(3)}
    assert len({one.trusted_packet_sequence_id for one in packets if one.HasField("track_event")}) == 2


def test_what_a_trace_cannot_hold_is_one_error(x, tmp_path, monkeypatch):
    """A value beyond int64, and runs whose clocks are not one: then there is no file; one is not replaced unasked."""
    place = x.select("exits").groups[0].view("exits")[:1, 0]
    before, place[0] = int(place[0]), np.uint64(1 << 63)
    with pytest.raises(ValueError, match=r"exits of VM web \(pid 1\), vCPU 1 reads 9223372036854775808"):
        x.to_perfetto(tmp_path / "x.pftrace")
    place[0] = before
    for other, whose in ((replace(x, host="there"), "härd and there"), (x, "härd and of a later boot")):
        monkeypatch.setattr(perfetto, "read_batches", lambda _, other=other: [x, other])
        with pytest.raises(ValueError, match=f"a trace has one CLOCK_MONOTONIC, and this recording is of {whose}"):
            kf.to_perfetto("run", tmp_path / "x.pftrace")
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    x.to_perfetto(tmp_path / "x")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        x.to_perfetto(tmp_path / "x")


def test_counters_of_other_units_are_named_by_them(tmp_path):
    """Where a trace knows no such unit, its name is there as the table of a report has it."""
    stats = [
        kf.Stat("cycles", kf.StatType.CUMULATIVE, kf.StatUnit.CYCLES, kf.StatBase.POW10, 3, 1, -1),
        kf.Stat("waited", kf.StatType.CUMULATIVE, kf.StatUnit.SECONDS, kf.StatBase.POW10, -6, 1, -1),
    ]
    small(made.samples([("vcpu", made.schema_of(stats), 1)], 3)).to_perfetto(tmp_path / "x")
    about = {path[-1]: counter.unit_name for path, counter in read(tmp_path / "x")[1].items()}
    assert {name: about[name] for name in ("cycles", "waited")} == {stat.name: stat.units() for stat in stats}


def test_samples_without_a_sweep_add_nothing(x, tmp_path):
    """Nor do they break the batches that follow."""
    with kf.Recorder(tmp_path / "r", flush_seconds=0) as recorder:
        recorder.write(x[:0])
        recorder.write(x)
    kf.to_perfetto(tmp_path / "r", tmp_path / "r.pftrace")
    x.to_perfetto(tmp_path / "x.pftrace")
    assert dict(read(tmp_path / "r.pftrace")[0]) == dict(read(tmp_path / "x.pftrace")[0])
    x[:0].to_perfetto(tmp_path / "empty.pftrace")
    assert not read(tmp_path / "empty.pftrace")[0]
