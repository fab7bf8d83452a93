"""KVM's binary statistics, per VM and per vCPU, in numpy.

>>> import kvmstats_fast as kf
>>> with kf.StatsFile.open(vcpu_fd) as f:       # doctest: +SKIP
...     f.snapshot()["exits"]
"""

from importlib.metadata import version

from kvmstats_fast.abi import Layout, StatBase, StatType, StatUnit
from kvmstats_fast.errors import ErrorCode, FormatError, KvmStatsError
from kvmstats_fast.schema import Header, Schema, Stat, StatsImage, parse
from kvmstats_fast.stats_file import StatsFile

__all__ = [
    "ErrorCode",
    "FormatError",
    "Header",
    "KvmStatsError",
    "Layout",
    "Schema",
    "Stat",
    "StatBase",
    "StatType",
    "StatUnit",
    "StatsFile",
    "StatsImage",
    "parse",
]

__version__ = version("kvmstats-fast")
