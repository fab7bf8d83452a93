"""Answers: the methods of Samples that say what was counted, each a line that imports the room which works it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmstats_fast.analysis.duty_cycle import DutyCycle
    from kvmstats_fast.analysis.figures import Figures
    from kvmstats_fast.analysis.halt_poll import HaltPollAdvice
    from kvmstats_fast.analysis.histogram import Histogram


class Answers:
    """What samples say. `Samples` inherits it, and so is every `self`."""

    __slots__ = ()

    def histogram(self: Any, name: str, sweep: int | None = None) -> Histogram:
        """Return the counts of a histogram in this run, file by file; ``.sum()`` adds the files up.

        Parameters
        ----------
        name : str
        sweep : int, optional
            Return instead the counts up to that sweep, since the VM was created (-1: the last sweep); 0 for a file that
            had failed.

        Returns
        -------
        Histogram
            Of shape ``(n, buckets)``, for the files of `columns`. It has a `mean` if the kernel also adds up the same
            values in a counter that was sampled (``halt_wait_ns`` for ``halt_wait_hist``).

        Raises
        ------
        ValueError
            If `name` is not a histogram.
        KeyError, IndexError
            If there is no such statistic, or no such sweep.
        """
        from kvmstats_fast.analysis import histogram  # noqa: PLC0415 - imports rightwards

        return histogram.run_histogram(self, name, sweep)

    def duty_cycle(self: Any, name: str, confidence: float = 0.95) -> DutyCycle:
        """Estimate the fraction of time that a boolean (``blocking``, ``guest_mode``) was 1, from polling.

        Parameters
        ----------
        name : str
        confidence : float
            Confidence level of the interval.

        Returns
        -------
        DutyCycle
            ``fraction``, ``low`` and ``high``, each float64 (n,).

        Raises
        ------
        ValueError
            If it is not a boolean: neither marked as one nor an instant statistic without a unit, or it read more than
            1. The message says why.

        Notes
        -----
        This is Wilson's interval for the number of independent sweeps that these correlated ones are worth (from the
        correlation of neighbours). A value that never changed shows no correlation: its sweeps are taken as
        independent. For one that changed only a few times, the interval is too narrow. A guest with a period that is a
        multiple of the sampling interval misleads any polling.
        """
        from kvmstats_fast.analysis import duty_cycle  # noqa: PLC0415 - imports rightwards

        return duty_cycle.duty_cycle(self, name, confidence)

    def figures(self: Any, by: str = "vcpu") -> Figures:
        """Return derived figures of the run: exits by kind, halt polling, halted time, page faults, large pages.

        Parameters
        ----------
        by : {"vcpu", "vm", "host"}
            Whether to return a value for each file, or for all files of a VM or host together. Then their counts are
            added up; a rate is the sum divided by the time that any of them was read, and a fraction is that of the
            sums.

        Returns
        -------
        Figures
            A mapping of names to `Figure`, each with values of shape ``(n,)``; ``print`` shows a table. A figure is
            missing if no file has its statistics.

        Raises
        ------
        ValueError
            If `by` is none of these.

        Notes
        -----
        A halt is counted when it ends: in a short run, `halted_fraction` can be 0, or above 1.
        """
        from kvmstats_fast.analysis import formulas  # noqa: PLC0415 - imports rightwards

        return formulas.derive_figures(self, by)

    def halt_poll_advice(
        self: Any, settings: Iterable[int] | None = None, most_vain: float = 0.01
    ) -> HaltPollAdvice | None:
        """Return what other settings of ``halt_poll_ns`` would have caught and cost, from the halt histograms.

        Parameters
        ----------
        settings : iterable of int, optional
            In ns. Default: from 0 to 2 ms.
        most_vain : float
            The largest fraction of the vCPUs' time that the best setting may poll in vain.

        Returns
        -------
        HaltPollAdvice or None
            ``print(advice)`` prints a table, ``advice.best`` is a setting. None if these files lack a halt histogram
            (kernels before 5.15); vCPUs without one are left out.

        Raises
        ------
        TypeError, ValueError
            If `settings` are not whole numbers, or negative, or empty; or `most_vain` is not from 0 to 1.

        Notes
        -----
        This assumes that every halt polls up to the setting. KVM's polling grows towards it from 10 us, and shrinks
        (``grow_halt_poll_ns``, ``virt/kvm/kvm_main.c``), so it catches and costs less. Buckets are ranges, so all
        figures are bounds. They do not include the effect on the guest (its CPU stays warm) or its neighbours (the CPU
        is taken).
        """
        from kvmstats_fast.analysis import halt_poll  # noqa: PLC0415 - imports rightwards

        return halt_poll.halt_poll_advice(self, settings, most_vain)
