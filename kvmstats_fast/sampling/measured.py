"""Measured: two readings around a block of code, what they say, and its phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmstats_fast._arguments import article
from kvmstats_fast.errors import KvmStatsError, SamplingWarning, warn_caller
from kvmstats_fast.sampling.readings import Span, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import numpy.typing as npt

    from kvmstats_fast.samples import Samples
    from kvmstats_fast.sampling.plan import Plan
    from kvmstats_fast.sampling.readings import Source


class _Changes(Mapping[str, "npt.NDArray[Any]"]):
    """Names to changes, worked out when asked for."""

    def __init__(self, samples: Samples, change: Callable[[str], npt.NDArray[Any]]) -> None:
        self._samples = samples
        self._change = change

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = self._change(name)[0]
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples.names)

    def __len__(self) -> int:
        return len(self._samples.names)


class Results(ABC):
    """What a block says, while it runs and afterwards."""

    @abstractmethod
    def read_span(self) -> Span:
        """Return the readings that count; within a block the second one is taken now. Internal."""

    @property
    def counts(self) -> dict[str, int]:
        """The increase of each cumulative statistic, raw, added up over all files: ``{"exits": 1000}``.

        A new dict of Python ints, for JSON and arithmetic, with the cumulative statistics of one value; the others are
        in `delta`. Files that could not be read are not included: `samples.errors` names them.
        """
        return self.read_span().count()

    @property
    def elapsed(self) -> float:
        """Seconds from one reading to the other."""
        return self.read_span().elapsed

    @property
    def cost(self) -> float:
        """Seconds that the two readings took together.

        About half of it lies between the two readings and is part of `elapsed`: the measurement adds that much to what
        it measures.
        """
        return self.read_span().cost

    @property
    def samples(self) -> Samples:
        """The two readings."""
        return self.read_span().samples

    @property
    def delta(self) -> Mapping[str, npt.NDArray[Any]]:
        """The raw change of each file, by name, as in `Samples.delta`: shape ``(n,)`` or ``(n, buckets)``."""
        samples = self.read_span().samples
        return _Changes(samples, samples.delta)

    @property
    def rate(self) -> Mapping[str, npt.NDArray[Any]]:
        """The same per second in base units, as in `Samples.rate`."""
        samples = self.read_span().samples
        return _Changes(samples, samples.rate)


class Phase:
    """A named part of a block, all its entries added up."""

    def __init__(self, plan: Plan) -> None:
        self._tally = Tally(plan)
        self._elapsed = self._cost = 0.0

    def add(self, span: Span) -> None:
        """Add what one entry said. Internal."""
        self._elapsed += span.elapsed
        self._cost += span.cost
        span.add_to(self._tally)

    @property
    def entries(self) -> int:
        """How often it was entered, and left."""
        return self._tally.pairs

    @property
    def counts(self) -> dict[str, int]:
        """As `Measured.counts`."""
        return self._tally.counts

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return self._elapsed

    @property
    def cost(self) -> float:
        """Seconds, as `Measured.cost`."""
        return self._cost

    def __repr__(self) -> str:
        return f"<Phase: entered {self.entries} times, {self._elapsed:.6g} s>"


class Measured(Results):
    """The counts of one block: ``with measure(files) as m:`` returns one.

    After the block, all attributes cover the whole block. Within it they cover the block so far, and each access to an
    attribute reads the files again.

    Attributes
    ----------
    counts : dict of str to int
        ``m.counts["exits"]``: the increase of each cumulative statistic, added up over all files.
    delta, rate : mapping of str to numpy.ndarray
        ``m.delta["exits"]``: the change of each file; ``m.rate["exits"]`` the same per second.
    elapsed, cost : float
        Seconds from one reading to the other, and seconds that the readings took.
    samples : Samples
        The two readings.

    Raises
    ------
    OSError, FormatError, ValueError
        From an attribute within the block: if no file can be read any more.
    RuntimeError
        From an attribute after a block at whose end no file could be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole: Span | None = None
        self._phases: dict[str, Phase] = {}
        self.outer: Measured | None = None
        self.is_open = True
        self._first = source.read()

    def read_span(self) -> Span:
        """Return those at the start and at the end. Internal."""
        if self._whole is not None:
            return self._whole
        if not self.is_open:
            raise RuntimeError("nothing is known of this block: at its end no file could be read")
        return Span(self._source.plan, self._first, self._source.read())

    def close(self, exc: BaseException | None) -> None:
        """Take the second reading at the end of the block, which raised `exc`. Internal."""
        self.is_open = False
        try:
            last = self._source.read()
        except (KvmStatsError, OSError, ValueError):
            if exc is not None:
                return  # what went wrong in the block is the news
            raise
        self._whole = Span(self._source.plan, self._first, last)
        try:
            for remark in self._whole.remarks:
                warn_caller(remark, SamplingWarning)
        except SamplingWarning:  # where warnings are errors
            if exc is None:
                raise

    @property
    def phases(self) -> Mapping[str, Phase]:
        """The measured phases: name to `Phase`, in the order in which they first ended."""
        return MappingProxyType(self._phases)

    def phase(self, name: str) -> PhaseBlock:
        """Measure a part of the block separately.

        Parameters
        ----------
        name : str
            Key in `phases`. The counts of a phase that is entered again are added up.

        Returns
        -------
        context manager
            ``with m.phase("boot") as part:`` returns a `Measured` of this one entry. A phase may have phases.

        Raises
        ------
        TypeError
            If `name` is not a str.
        RuntimeError
            If the block has ended.
        """
        if not isinstance(name, str):
            raise TypeError(f"name is {article(name)}; it must be the name of a phase")
        if not self.is_open:
            raise RuntimeError(f"phase {name!r} is a part of a block that has ended")
        return PhaseBlock(self, name)

    def enter_phase(self) -> Measured:
        """Begin a part of this block. Internal."""
        return Measured(self._source)

    def leave_phase(self, name: str, part: Measured, exc: BaseException | None) -> None:
        """End it, and add it to `phases`. Internal."""
        try:
            part.close(exc)
        finally:
            if part._whole is not None:
                self._phases.setdefault(name, Phase(self._source.plan)).add(part._whole)


class PhaseBlock:
    """Enters and leaves a phase."""

    def __init__(self, whole: Measured, name: str) -> None:
        self._whole, self._name = whole, name
        self._parts: list[Measured] = []

    def __enter__(self) -> Measured:
        self._parts.append(self._whole.enter_phase())
        return self._parts[-1]

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._whole.leave_phase(self._name, self._parts.pop(), exc)
