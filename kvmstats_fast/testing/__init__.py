"""What this package tests itself with, for your tests too: a real VM, and made-up stats files and samples."""

from kvmstats_fast.errors import KvmUnavailableError
from kvmstats_fast.testing.made import make_samples
from kvmstats_fast.testing.synthetic import SyntheticStats
from kvmstats_fast.testing.tiny_guest import TinyGuest, counts_right, exit_counter

__all__ = ["KvmUnavailableError", "SyntheticStats", "TinyGuest", "counts_right", "exit_counter", "make_samples"]
