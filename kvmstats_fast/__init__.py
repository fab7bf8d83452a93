"""Read KVM's binary statistics, per VM and per vCPU, into numpy.

>>> import kvmstats_fast as kf
>>> with kf.StatsFile.open(vcpu_fd) as f:       # doctest: +SKIP
...     f.snapshot()["exits"]

Each name is imported on first use, so ``import kvmstats_fast`` costs next to nothing.
"""

import os
from _thread import RLock
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public names are listed thrice: type checkers read the imports and __all__, the interpreter __all__ and the rooms.
# tests/test_packaging.py compares them.
if TYPE_CHECKING:
    from kvmstats_fast.abi import Layout, StatBase, StatType, StatUnit
    from kvmstats_fast.analysis.compare import Change, Comparison, compare
    from kvmstats_fast.analysis.duty_cycle import DutyCycle
    from kvmstats_fast.analysis.figures import Figure, Figures
    from kvmstats_fast.analysis.halt_poll import HaltPollAdvice
    from kvmstats_fast.analysis.histogram import Histogram
    from kvmstats_fast.encoding import Header
    from kvmstats_fast.errors import (
        AttachError,
        ErrorCode,
        FormatError,
        HandOverError,
        KvmStatsError,
        RecordingWarning,
        SamplingWarning,
        VmGoneError,
    )
    from kvmstats_fast.file_info import FileInfo
    from kvmstats_fast.formats.csv import to_csv
    from kvmstats_fast.formats.parquet import to_parquet
    from kvmstats_fast.formats.perfetto import to_perfetto
    from kvmstats_fast.formats.recorder import Recorder
    from kvmstats_fast.formats.recording import Recording
    from kvmstats_fast.formats.recordings import Recordings, open_recordings
    from kvmstats_fast.image import StatsImage, parse, to_merged
    from kvmstats_fast.samples import SampleError, Samples
    from kvmstats_fast.sampling.follow import Follow, follow
    from kvmstats_fast.sampling.measure import measure
    from kvmstats_fast.sampling.measured import Measured
    from kvmstats_fast.sampling.sampler import Sampler
    from kvmstats_fast.sampling.stream import Stream
    from kvmstats_fast.schema import Schema
    from kvmstats_fast.stat import Stat
    from kvmstats_fast.stats_file import StatsFile
    from kvmstats_fast.vmm.find import HeldFile, VmProcess, find_vms
    from kvmstats_fast.vmm.handover import receive_files, send_files
    from kvmstats_fast.vmm.inherited import inherited_files
    from kvmstats_fast.vmm.launch import launch
    from kvmstats_fast.vmm.machine import VirtualMachine, attach

__all__ = [
    "AttachError",
    "Change",
    "Comparison",
    "DutyCycle",
    "ErrorCode",
    "Figure",
    "Figures",
    "FileInfo",
    "Follow",
    "FormatError",
    "HaltPollAdvice",
    "HandOverError",
    "Header",
    "HeldFile",
    "Histogram",
    "KvmStatsError",
    "Layout",
    "Measured",
    "Recorder",
    "Recording",
    "RecordingWarning",
    "Recordings",
    "SampleError",
    "Sampler",
    "Samples",
    "SamplingWarning",
    "Schema",
    "Stat",
    "StatBase",
    "StatType",
    "StatUnit",
    "StatsFile",
    "StatsImage",
    "Stream",
    "VirtualMachine",
    "VmGoneError",
    "VmProcess",
    "attach",
    "compare",
    "find_vms",
    "follow",
    "inherited_files",
    "launch",
    "measure",
    "open_recordings",
    "parse",
    "receive_files",
    "send_files",
    "to_csv",
    "to_merged",
    "to_parquet",
    "to_perfetto",
]

_ROOMS = {
    "abi": ("Layout", "StatBase", "StatType", "StatUnit"),
    "analysis.compare": ("Change", "Comparison", "compare"),
    "analysis.duty_cycle": ("DutyCycle",),
    "analysis.figures": ("Figure", "Figures"),
    "analysis.halt_poll": ("HaltPollAdvice",),
    "analysis.histogram": ("Histogram",),
    "encoding": ("Header",),
    "errors": (
        "AttachError",
        "ErrorCode",
        "FormatError",
        "HandOverError",
        "KvmStatsError",
        "RecordingWarning",
        "SamplingWarning",
        "VmGoneError",
    ),
    "file_info": ("FileInfo",),
    "formats.csv": ("to_csv",),
    "formats.parquet": ("to_parquet",),
    "formats.perfetto": ("to_perfetto",),
    "formats.recorder": ("Recorder",),
    "formats.recording": ("Recording",),
    "formats.recordings": ("Recordings", "open_recordings"),
    "image": ("StatsImage", "parse", "to_merged"),
    "samples": ("SampleError", "Samples"),
    "sampling.follow": ("Follow", "follow"),
    "sampling.measure": ("measure",),
    "sampling.measured": ("Measured",),
    "sampling.sampler": ("Sampler",),
    "sampling.stream": ("Stream",),
    "schema": ("Schema",),
    "stat": ("Stat",),
    "stats_file": ("StatsFile",),
    "vmm.find": ("HeldFile", "VmProcess", "find_vms"),
    "vmm.handover": ("receive_files", "send_files"),
    "vmm.inherited": ("inherited_files",),
    "vmm.launch": ("launch",),
    "vmm.machine": ("VirtualMachine", "attach"),
}

if not TYPE_CHECKING:  # to a type checker, __getattr__ would make every name a good one
    # A child that is forked while another thread imports would wait for the module's lock for ever: a fork waits first.
    _importing = RLock()
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )

    def __getattr__(name: str) -> object:
        """Import a public name from its room, and keep it."""
        for room, names in _ROOMS.items():
            if name in names:
                with _importing:
                    globals()[name] = value = getattr(import_module(f"{__name__}.{room}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
