"""KVM's binary statistics, per VM and per vCPU, in numpy.

>>> import kvmstats_fast as kf
>>> with kf.StatsFile.open(vcpu_fd) as f:       # doctest: +SKIP
...     f.snapshot()["exits"]
"""

from importlib.metadata import version

from kvmstats_fast.abi import Layout, StatBase, StatType, StatUnit
from kvmstats_fast.analysis.figures import DutyCycle, Figure, Figures, HaltPollAdvice
from kvmstats_fast.analysis.histogram import Histogram
from kvmstats_fast.errors import AttachError, ErrorCode, FormatError, KvmStatsError, VmGoneError
from kvmstats_fast.formats.parquet import to_csv, to_parquet
from kvmstats_fast.formats.recording import Recorder, Recording, RecordingWarning
from kvmstats_fast.merged import to_merged
from kvmstats_fast.samples import FileInfo, SampleError, Samples
from kvmstats_fast.sampling.sampler import Sampler, Stream, measure
from kvmstats_fast.schema import Header, Schema, Stat, StatsImage, parse
from kvmstats_fast.stats_file import StatsFile
from kvmstats_fast.vmm.find import VmProcess, find_vms
from kvmstats_fast.vmm.handover import HandOverError, inherited_files, receive_files, send_files
from kvmstats_fast.vmm.machine import VirtualMachine, attach, launch

__all__ = [
    "AttachError",
    "DutyCycle",
    "ErrorCode",
    "Figure",
    "Figures",
    "FileInfo",
    "FormatError",
    "HaltPollAdvice",
    "HandOverError",
    "Header",
    "Histogram",
    "KvmStatsError",
    "Layout",
    "Recorder",
    "Recording",
    "RecordingWarning",
    "SampleError",
    "Sampler",
    "Samples",
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
    "find_vms",
    "inherited_files",
    "launch",
    "measure",
    "parse",
    "receive_files",
    "send_files",
    "to_csv",
    "to_merged",
    "to_parquet",
]

__version__ = version("kvmstats-fast")
