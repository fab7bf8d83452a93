"""pyperf hook: what KVM counted per loop beside each run of a benchmark, in the run's metadata.

``python bench.py --hook kvmstats --inherit-environ=KVMSTATS_VM``
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import describe_error
from kvmstats_fast.analysis.suites import PREFIX
from kvmstats_fast.errors import KvmStatsError
from kvmstats_fast.plugins.target import SOCKET_VARIABLE, VM_VARIABLE, open_target
from kvmstats_fast.sampling.plan import Plan
from kvmstats_fast.sampling.readings import Reading, Source, Tally

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from kvmstats_fast.sampling.plan import StatsFiles

_files: StatsFiles | None = None


def use(files: StatsFiles) -> None:
    """Have the hook count these files, in a benchmark script whose VM has no name from outside.

    Parameters
    ----------
    files
        As for `Sampler`; they must stay open.
    """
    global _files  # noqa: PLW0603 - pyperf makes the hook, without arguments
    _files = files


class Hook:
    """Counts between ``__enter__`` and ``__exit__``, which pyperf calls around each value.

    pyperf makes one for the warm-ups of a worker process and another for its values. The last one's metadata stays.
    """

    def __init__(self) -> None:
        self._loops = find_loops(sys.argv)
        self._opened = ExitStack()
        try:
            self._source = Source(Plan(self._choose(), None, threads=1))
        except (KvmStatsError, OSError, ValueError) as error:
            # As pyperf ends for errors of its own hooks, whose class is private.
            sys.exit(f"ERROR setting up hook 'kvmstats': {describe_error(error)}")
        self._tally = Tally(self._source.plan)
        self._first: Reading | None = None

    def _choose(self) -> StatsFiles:
        if _files is not None:
            return _files
        path, vm = os.environ.get(SOCKET_VARIABLE, ""), os.environ.get(VM_VARIABLE, "")
        if not (path or vm):
            raise ValueError(
                f"no VM is named: set {VM_VARIABLE} to its name or pid, and give --inherit-environ={VM_VARIABLE}, "
                "because pyperf's workers start with hardly any environment; or call "
                "kvmstats_fast.plugins.pyperf_hook.use(files) in the benchmark script"
            )
        return self._opened.enter_context(open_target("" if path else vm, path))

    def __enter__(self) -> None:
        self._first = self._source.read()

    def __exit__(self, *_: object) -> None:
        last = self._source.read()
        if self._first is not None:
            self._tally.add(self._first, last)
        self._first = None

    def teardown(self, metadata: MutableMapping[str, Any]) -> None:
        """Write what each loop counted, the mean of this run's values."""
        self._opened.close()
        for name in [name for name in metadata if name.startswith(PREFIX)]:  # of the warm-ups
            del metadata[name]
        if not self._loops:  # calibration: the number of loops differs from one to the next
            return
        loops = self._tally.pairs * self._loops * metadata.get("inner_loops", 1)
        metadata[PREFIX + "values"] = self._tally.pairs
        for name, count in self._tally.counts.items():
            if count:
                metadata[PREFIX + name] = count / loops


def find_loops(argv: Sequence[str]) -> int:
    """Return how many loops a value of this worker process has; 0 where pyperf still looks for the number."""
    if any(option.startswith(("--calibrate-", "--recalibrate-")) for option in argv) or "--loops" not in argv:
        return 0
    last = len(argv) - 1 - argv[::-1].index("--loops")
    return int(argv[last + 1])
