"""What this package tests itself with, for your tests too: a real VM and a made-up stats file."""

from kvmstats_fast.errors import KvmUnavailableError
from kvmstats_fast.testing.synthetic import SyntheticStats
from kvmstats_fast.testing.tiny_guest import TinyGuest, counts_right, exit_counter

__all__ = ["KvmUnavailableError", "SyntheticStats", "TinyGuest", "counts_right", "exit_counter"]
