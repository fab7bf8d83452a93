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
        """Return what a histogram counted in this run, file by file; ``.sum()`` adds the files up.

        Parameters
        ----------
        name : str
        sweep : int, optional
            Instead: what it had counted by that sweep, since its VM was made (-1: the last); 0 of a file that had
            failed.

        Returns
        -------
        Histogram
            Of shape ``(n, buckets)``, the files of `columns`. It has a `mean` if the kernel adds the same values up in
            a counter that was sampled too (``halt_wait_ns`` for ``halt_wait_hist``).

        Raises
        ------
        ValueError
            If `name` is not a histogram.
        KeyError, IndexError
            If it, or the sweep, is not there.
        """
        from kvmstats_fast.analysis import histogram  # noqa: PLC0415 - imports rightwards

        return histogram.run_histogram(self, name, sweep)

    def duty_cycle(self: Any, name: str, confidence: float = 0.95) -> DutyCycle:
        """Estimate how much of the time a boolean was 1 (``blocking``, ``guest_mode``), as polled.

        Parameters
        ----------
        name : str
        confidence : float
            Of the interval.

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
        Wilson's interval, for the number of independent sweeps that as many correlated ones are worth (from the
        correlation of neighbours). A value that never changed shows no correlation: then the sweeps are taken as
        independent, and of one that changed a few times only the interval is too narrow. A guest whose rhythm is a
        multiple of the sampling interval misleads any polling.
        """
        from kvmstats_fast.analysis import duty_cycle  # noqa: PLC0415 - imports rightwards

        return duty_cycle.duty_cycle(self, name, confidence)

    def figures(self: Any, by: str = "vcpu") -> Figures:
        """Return derived figures of the run: exits by kind, halt polling, halted time, page faults, large pages.

        Parameters
        ----------
        by : {"vcpu", "vm", "host"}
            Of what there is a value: of each file, or of all files of a VM or host together. What they counted is added
            up; a rate is that by the time that any of them was read, and a fraction that of the whole.

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
        A halt is counted when it ends: `halted_fraction` of a short run can be 0, or above 1.
        """
        from kvmstats_fast.analysis import formulas  # noqa: PLC0415 - imports rightwards

        return formulas.derive_figures(self, by)

    def halt_poll_advice(
        self: Any, settings: Iterable[int] | None = None, most_vain: float = 0.01
    ) -> HaltPollAdvice | None:
        """Return what different settings of ``halt_poll_ns`` would have caught and cost, from the halt histograms.

        Parameters
        ----------
        settings : iterable of int, optional
            In ns. Default: from 0 to 2 ms.
        most_vain : float
            Of the vCPUs' time, the most that the setting it calls the best may poll in vain.

        Returns
        -------
        HaltPollAdvice or None
            ``print(advice)`` is a table, ``advice.best`` a setting. None if these files lack a halt histogram (kernels
            before 5.15); vCPUs that do so are not in it.

        Raises
        ------
        TypeError, ValueError
            If `settings` are not whole numbers, or negative, or empty; or `most_vain` is not from 0 to 1.

        Notes
        -----
        For every halt of the run, as if each polled up to the setting; KVM's own polling grows towards it from 10 us
        and shrinks (``grow_halt_poll_ns``, ``virt/kvm/kvm_main.c``), so it catches and costs less. Buckets are ranges,
        so all figures are bounds. What it does to the guest (it finds its CPU warm, or a neighbour finds it taken) is
        not in them.
        """
        from kvmstats_fast.analysis import halt_poll  # noqa: PLC0415 - imports rightwards

        return halt_poll.halt_poll_advice(self, settings, most_vain)
