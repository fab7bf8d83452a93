"""An asv benchmark that tracks statistics: for the `benchmarks/` of your suite, with your guest in its place."""

import kvmstats_fast as kf
from kvmstats_fast.testing import TinyGuest


class Work:
    """What KVM counts while a guest works."""

    params = ("exits", "fpu_reload", "io_exits")
    param_names = ("statistic",)
    unit = "per call"

    def setup(self, _: str) -> None:
        """Start the guest, and make the measure, which takes longer than to enter it."""
        self.guest = TinyGuest()
        self.files = self.guest.open_stats()
        self.measure = kf.measure(self.files)

    def teardown(self, _: str) -> None:
        """Stop it."""
        for file in self.files:
            file.close()
        self.guest.close()

    def track_work(self, statistic: str) -> int:
        """Return what asv keeps for each commit, draws, and finds regressions in: plain ints."""
        with self.measure as m:
            self.guest.run(20)
        return m.counts[statistic]
