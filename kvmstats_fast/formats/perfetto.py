"""Samples and recordings as a Perfetto trace: a counter track for each statistic of each VM and vCPU."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast.abi import StatBase, StatUnit
from kvmstats_fast.formats import need
from kvmstats_fast.formats._put import PRIVATE, put_file
from kvmstats_fast.formats.arrow import readable
from kvmstats_fast.formats.recording import read_batches
from kvmstats_fast.spans import last_sweeps

if TYPE_CHECKING:
    import io
    import os
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvmstats_fast.formats.recording import Recording
    from kvmstats_fast.samples import Samples
    from kvmstats_fast.stat import Stat

_PACKETS = 1 << 14  # that are made before they are written
_LARGEST = (1 << 63) - 1  # that counter_value holds
_NANO = -9
_MONOTONIC = 3  # BUILTIN_CLOCK_MONOTONIC, protos/perfetto/common/builtin_clock.proto


def to_perfetto(
    source: Samples | Recording | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    mode: int = PRIVATE,
) -> None:
    """Convert samples or a recording to a trace for https://ui.perfetto.dev and ``trace_processor``.

    Parameters
    ----------
    source : Samples, Recording or path of a recording
    path : path-like
        Usually ``NAME.pftrace``.
    overwrite : bool
        Replace the file.
    mode : int
        Permissions of the file, whatever the umask. By default the owner alone may read it.

    Raises
    ------
    FileExistsError
        If there is something at `path`, without `overwrite`.
    KvmStatsError
        If a recording has no whole batch.
    ModuleNotFoundError
        Without the extra: ``pip install 'kvmstats-fast[perfetto]'``.
    ValueError
        If a value is above 2**63 - 1, the most that a counter of a trace holds; or a recording is of several hosts, or
        of several boots of one.

    Notes
    -----
    Each VM has a track, with a track for each vCPU below it, and below these one for each statistic; a histogram has
    one for each bucket (``halt_wait_hist[3]``). Values are raw, in the unit that the track names. A track has its first
    value, and after that each value that differs from the previous one; it ends where a file failed. The track
    ``sweep_ns`` of the host has a value for each sweep.

    Times are CLOCK_MONOTONIC, with clock snapshots that tie it to CLOCK_REALTIME, so that the counters line up with a
    trace of the same host from the same boot: ``cat host.pftrace kvm.pftrace > both.pftrace``. The file is there as a
    whole or not at all.
    """
    builder = need("perfetto.trace_builder.proto_builder", "perfetto").TraceProtoBuilder
    with put_file(Path(path), overwrite=overwrite, mode=mode) as file:
        trace = _Trace(builder, file)
        for samples in read_batches(source):
            trace.add(samples)
        trace.flush()


def _number(run: str, path: tuple[str, ...]) -> int:
    """Return the 64-bit number of a track, which no track of another trace has: they may be put together."""
    name = "\0".join((run, *path)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


class _Trace:
    """Writes packets; a trace is as many Trace messages as one likes, one after the other."""

    def __init__(self, builder: Any, file: io.FileIO) -> None:
        self._builder, self._file = builder, file
        self._made = builder()
        self._waiting = 0
        self._described: dict[tuple[str, ...], int] = {}  # path to uuid
        self._host = self._run = ""
        self._sequence = self._time = 0

    def add(self, samples: Samples) -> None:
        """Add the sweeps of one batch, with what they are of."""
        if not len(samples):
            return
        self._check_clock(samples)
        self._add_clocks(samples)
        sweeps = self._describe((self._host, "sweep_ns"), _about_time)
        self._add_values(sweeps, samples.time, samples.sweep_ns, np.ones(len(samples), np.bool_))
        lasts = last_sweeps(samples).tolist()
        paths = _paths(samples, self._host)
        for group in samples.groups:
            for name, (stat, _) in group.places.items():
                values = stat.as_signed(group.view(name))
                for column, index in enumerate(group.columns.tolist()):
                    stop = lasts[index] + 1
                    for label, one in _series(stat, values[:stop, column]):
                        uuid = self._describe((*paths[index], label), _about(stat))
                        signed = _check(one, label, paths[index])
                        changed = np.append(np.ones(min(stop, 1), np.bool_), signed[1:] != signed[:-1])
                        self._add_values(uuid, samples.time[:stop], signed, changed)

    def flush(self) -> None:
        """Write what is made."""
        self._file.write(self._made.serialize())
        self._made, self._waiting = self._builder(), 0

    def _check_clock(self, samples: Samples) -> None:
        """Raise ValueError unless the sweeps go on with the clock of those before."""
        host = readable(samples.host) or "host"
        if not self._run:
            self._host, self._run = host, f"{samples.host} {int(samples.time[0])} {samples.wall_offset}"
            # A packet without one is not taken; those of the host's own trace are small.
            self._sequence = _number(self._run, ()) >> 33 | 1 << 30
        elif host != self._host or int(samples.time[0]) < self._time:
            raise ValueError(
                f"a trace has one CLOCK_MONOTONIC, and this recording is of {self._host} and "
                f"{'of a later boot' if host == self._host else host}: convert its runs by themselves"
            )
        self._time = int(samples.time[-1])

    def _packet(self) -> Any:
        self._waiting += 1
        if self._waiting > _PACKETS:
            self.flush()
            self._waiting = 1
        return self._made.add_packet()

    def _describe(self, path: tuple[str, ...], about: Callable[[Any], None] | None = None) -> int:
        """Return the uuid of a track, which is described where it is new, as are those above it."""
        known = self._described.get(path)
        if known is None:
            above = self._describe(path[:-1]) if len(path) > 1 else 0
            track = self._packet().track_descriptor
            known = track.uuid = self._described[path] = _number(self._run, path)
            track.name = path[-1]
            track.sibling_merge_behavior = track.SIBLING_MERGE_BEHAVIOR_NONE
            if above:
                track.parent_uuid = above
            if about is not None:
                about(track.counter)
        return known

    def _add_clocks(self, samples: Samples) -> None:
        """Add what CLOCK_REALTIME was at the first sweep, and where its offset changed."""
        for sweep in dict.fromkeys([0, *(sweep for sweep, _ in samples.wall_steps)]):
            packet = self._packet()
            packet.trusted_packet_sequence_id = self._sequence
            snapshot, time = packet.clock_snapshot, int(samples.time[sweep])
            clocks = {snapshot.Clock.MONOTONIC: time, snapshot.Clock.REALTIME: int(samples.wall_time[sweep])}
            for clock, now in clocks.items():
                if now < 0:  # a trace has no time before 1970, and is by CLOCK_MONOTONIC anyway
                    continue
                snapshot.clocks.add(clock_id=clock, timestamp=now)
            snapshot.primary_trace_clock = snapshot.Clock.MONOTONIC

    def _add_values(
        self, uuid: int, time: npt.NDArray[np.int64], values: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]
    ) -> None:
        for when, value in zip(time[kept].tolist(), values[kept].tolist(), strict=True):
            packet = self._packet()
            packet.timestamp, packet.timestamp_clock_id = when, _MONOTONIC
            packet.trusted_packet_sequence_id = self._sequence
            event = packet.track_event
            event.type, event.track_uuid, event.counter_value = event.TYPE_COUNTER, uuid, value


def _paths(samples: Samples, host: str) -> list[tuple[str, ...]]:
    """Return the names of each file's track and of those above it."""
    labels = [f"{info.host}/{info}" for info in samples.files]
    counts, paths = Counter(labels), []
    for index, (info, label) in enumerate(zip(samples.files, labels, strict=True)):
        vm = readable(info.vm or info.id)
        pid = f"pid {info.pid}"
        vm += f" ({pid})" if info.pid is not None and pid not in vm else ""
        vm += f" (file {index})" if counts[label] > 1 else ""  # labels of the caller's may be those of several files
        paths.append((host, f"VM {vm}", *([] if info.vcpu_id is None else [f"vCPU {info.vcpu_id}"])))
    return paths


def _series(stat: Stat, values: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the values of a statistic, or of each bucket, by name."""
    name = readable(stat.name)
    if not stat.shape:
        yield name, values
    for index in range(stat.size if stat.shape else 0):
        yield f"{name}[{index}]", values[:, index]


def _check(values: npt.NDArray[Any], name: str, path: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return values as int64; ValueError if they are none."""
    if values.dtype == np.uint64 and values.size and int(values.max()) > _LARGEST:
        raise ValueError(
            f"{name} of {', '.join(path[1:])} reads {int(values.max())}, and a counter of a trace at most 2**63 - 1: "
            "leave it out with select"
        )
    return values.view(np.int64)


def _about_time(counter: Any) -> None:
    counter.unit = counter.UNIT_TIME_NS


def _about(stat: Stat) -> Callable[[Any], None]:
    """Return what describes a counter: its unit, as a trace has it or else by name. Of a bucket it is a count."""

    def describe(counter: Any) -> None:
        unit, base, exponent = stat.unit, stat.base, stat.exponent
        if stat.unknown or stat.is_histogram:
            counter.unit = counter.UNIT_COUNT
        elif unit == StatUnit.SECONDS and base == StatBase.POW10 and exponent == _NANO:
            counter.unit = counter.UNIT_TIME_NS
        elif unit == StatUnit.BYTES and exponent >= 0 and stat.factor <= _LARGEST:
            counter.unit, counter.unit_multiplier = counter.UNIT_SIZE_BYTES, stat.factor
        elif stat.units():
            counter.unit_name = stat.units()
        else:
            counter.unit = counter.UNIT_COUNT

    return describe
