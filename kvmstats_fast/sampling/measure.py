"""measure: what happened while a block of code ran."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from kvmstats_fast._arguments import article
from kvmstats_fast.sampling.measured import Measured, Results
from kvmstats_fast.sampling.plan import Plan
from kvmstats_fast.sampling.readings import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from kvmstats_fast.sampling.measured import Phase, PhaseBlock
    from kvmstats_fast.sampling.plan import StatsFiles
    from kvmstats_fast.sampling.readings import Span

    _Function = TypeVar("_Function", bound=Callable[..., Any])

#: The block that this thread or task entered last and has not left: several may be in one `measure` at once.
_INNERMOST: ContextVar[Measured | None] = ContextVar("kvmstats_measured", default=None)


class measure(Results):  # noqa: N801 - used as a function is
    """Measure what the files count while a block of code runs.

    Create it once, and enter it as often as you like: creating it looks at every file, entering it takes one sweep.

    Parameters
    ----------
    files, stats, sched
        As for `Sampler`.

    Attributes
    ----------
    counts, delta, rate, elapsed, cost, samples, phases
        Those of the block entered last that is still open, or else of the block that ended last: see `Measured`, which
        ``as m`` returns for each block.

    Raises
    ------
    OSError, FormatError, ValueError
        If no file can be read, before or after the block; if the block raised, its own error is raised instead.
    RuntimeError
        From an attribute, if there was no block yet.

    Warns
    -----
    SamplingWarning
        If the wall clock jumped by more than 10 ms in the meantime.

    Notes
    -----
    ``async with`` works as ``with`` does, and ``@measure(files)`` measures each call of a function or coroutine
    function. Blocks may be nested, and threads and tasks may be in blocks of one `measure` at the same time: every
    block counts whatever the files count meanwhile, on whoever's behalf.

    Examples
    --------
    >>> with measure(files, "exits") as m:      # doctest: +SKIP
    ...     with m.phase("boot"):
    ...         boot()
    ...     work()
    >>> m.counts, m.phases["boot"].counts       # doctest: +SKIP
    ({'exits': 1000}, {'exits': 700})
    """

    def __init__(self, files: StatsFiles, stats: str | Iterable[str] | None = None, *, sched: bool = False) -> None:
        self._source = Source(Plan(files, stats, threads=1, sched=sched))
        self._open: list[Measured] = []
        self._last: Measured | None = None

    @property
    def _current(self) -> Measured:
        found = self._open[-1] if self._open else self._last
        if found is None:
            raise RuntimeError("nothing was measured yet: enter this measure using `with`, or call what it decorates")
        return found

    def read_span(self) -> Span:
        """Return the readings of the block that counts. Internal."""
        return self._current.read_span()

    @property
    def phases(self) -> Mapping[str, Phase]:
        """As `Measured.phases`."""
        return self._current.phases

    def phase(self, name: str) -> PhaseBlock:
        """Measure a part of the block that is open, as `Measured.phase` does."""
        return self._current.phase(name)

    def __enter__(self) -> Measured:
        block = Measured(self._source)
        block.outer = _INNERMOST.get()
        _INNERMOST.set(block)
        self._open.append(block)
        return block

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block = self._leave()
        self._last = block
        block.close(exc)

    def _leave(self) -> Measured:
        """Return the block that this thread or task leaves."""
        block = innermost = _INNERMOST.get()
        while block is not None and block not in self._open:
            block = block.outer
        if block is None:  # entered in another context, as the fixtures of some test runners are
            if not self._open:
                raise RuntimeError("this measure is left, but was not entered")
            block = self._open[-1]
        elif block is innermost:
            _INNERMOST.set(block.outer)
        self._open.remove(block)
        return block

    async def __aenter__(self) -> Measured:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    def __call__(self, function: _Function) -> _Function:
        """Return the function so that each call of it is a block.

        Raises
        ------
        TypeError
            If it is no function; or a generator function, whose code runs after the call: use ``with`` in it.
        """
        if not callable(function):
            raise TypeError(f"{article(function)} cannot be decorated; measure takes functions")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is a generator, which runs after the call: use `with` inside it")
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def measured(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

        else:

            @wraps(function)
            def measured(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        return measured  # type: ignore[return-value]  # of the same signature
