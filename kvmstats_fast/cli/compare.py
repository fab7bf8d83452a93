"""``kvmstats compare``: what became of each statistic from one set of recordings, or of results, to another."""

from __future__ import annotations

import argparse
import glob
import re
import sys
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import plain_number, printable
from kvmstats_fast.analysis.compare import compare
from kvmstats_fast.analysis.suites import compare_suites, is_suite, read_suite
from kvmstats_fast.cli._files import HAS_NO_RATE, load_runs
from kvmstats_fast.cli._grammar import UsageError, add_guest, add_output, add_selection, usage_errors
from kvmstats_fast.cli._output import ObjectWriter, open_output
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmstats_fast.analysis.compare import Comparison

_LIMIT = re.compile(r"(?P<name>.+?)\s*(?P<side>[<>])\s*(?P<percent>[+-]?[0-9]+\.?[0-9]*)\s*%")
_EXCEEDED = 1
_FIELDS = ("benchmark", "name", "a", "b", "ratio", "low", "high", "unit")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Compare recordings: the rate of each statistic in A and in B, the ratio, and its confidence interval. Give "
        "several recordings for each side (commas or globs): one run does not show how runs differ. With --fail-if, "
        "exit with status 1 if the whole interval is beyond a limit. Results of pytest-benchmark and pyperf (JSON) "
        "are compared by benchmark: what KVM counted per iteration or loop."
    )
    parser.add_argument("a", metavar="A", help="recordings or JSON results, separated by commas, or a glob")
    parser.add_argument("b", metavar="B", help="what to compare A with, likewise")
    add_selection(parser)
    add_guest(parser)
    per = parser.add_mutually_exclusive_group()
    per.add_argument("--per", metavar="STAT", help="divide by this statistic, instead of seconds")
    per.add_argument("--work", metavar="N[,M]", type=_work, help="divide by the units of work of each run (A: N, B: M)")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="confidence level of the intervals (default: %(default)s)"
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        metavar="LIMIT",
        help="limit of a change, such as 'exits>5%%' or 'exits<-5%%' (may be repeated)",
    )
    add_output(parser)


def _work(text: str) -> tuple[float, float]:
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if not 0 < len(parts) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of units of work, such as 1000, or two: 1000,2000")
    return parts[0], parts[-1]


def run(arguments: argparse.Namespace) -> int:
    """Compare them; exit status 1 if a limit is exceeded."""
    limits = [_parse_limit(text) for text in arguments.fail_if or []]
    sides = [[path for part in side.split(",") for path in _expand(part)] for side in (arguments.a, arguments.b)]
    kinds = {is_suite(path) for paths in sides for path in paths}
    if len(kinds) > 1:
        raise UsageError("recordings and results of suites (JSON) do not compare; give the same kind on both sides")
    exceeded = []
    with usage_errors():
        compared = _compare_results(sides, arguments) if kinds.pop() else {"": _compare_recordings(sides, arguments)}
        for benchmark, comparison in compared.items():
            where = f"{benchmark}: " if benchmark else ""
            exceeded += [f"{where}{text}" for text, name, fraction in limits if comparison.exceeds(name, fraction)]
        with open_output(arguments) as output:
            writer = ObjectWriter(arguments, output, _FIELDS)
            for benchmark, comparison in compared.items():
                chosen = comparison.select(*arguments.event) if arguments.event else comparison
                if writer.text:
                    _print(benchmark, chosen, Screen.of(output, arguments.color))
                else:
                    writer.write_objects(_objects(benchmark, chosen))
    for text in exceeded:
        print(f"kvmstats: exceeded: {text}", file=sys.stderr)
    return _EXCEEDED if exceeded else 0


def _compare_recordings(sides: list[list[str]], arguments: argparse.Namespace) -> Comparison:
    chosen = Selection.of((), arguments.guest, arguments.vcpu, None, None)
    a, b = ([run for path in paths for run in load_runs(path, chosen)] for paths in sides)
    if arguments.per is None and arguments.work is None and not all(run.elapsed for run in (*a, *b)):
        raise UsageError(f"{HAS_NO_RATE}: divide by a statistic (--per STAT), or by units of work (--work N)")
    return compare(a, b, per=arguments.per or arguments.work, confidence=arguments.confidence)


def _compare_results(sides: list[list[str]], arguments: argparse.Namespace) -> dict[str, Comparison]:
    for option, given in (
        ("--per", arguments.per),
        ("--work", arguments.work),
        ("-g", arguments.guest),
        ("--vcpu", arguments.vcpu),
    ):
        if given is not None:
            raise UsageError(f"{option} is for recordings; results of suites are per iteration, of all files")
    if not 0 < arguments.confidence < 1:
        raise UsageError(f"confidence is {arguments.confidence}; it must be between 0 and 1")
    a, b = ([read_suite(path) for path in paths] for paths in sides)
    compared, missing = compare_suites(a, b, arguments.confidence)
    if missing:
        print(f"kvmstats: on one side only: {', '.join(map(printable, missing))}", file=sys.stderr)
    if not compared:
        raise UsageError("no benchmark has counters on both sides; docs/suites.md says how they are counted")
    return compared


def _expand(part: str) -> list[str]:
    return sorted(glob.glob(part)) or [part]  # noqa: PTH207 - a name that looks like a glob is one, too


def _parse_limit(text: str) -> tuple[str, str, float]:
    found = _LIMIT.fullmatch(text.strip())
    fraction = float(found["percent"]) / 100 if found else 0.0
    if not found or (found["side"] == ">") != (fraction >= 0):
        raise UsageError(f"{text!r} is not a limit such as 'exits>5%' (more by that) or 'exits<-5%' (less by that)")
    return text, found["name"], fraction


def _print(benchmark: str, compared: Comparison, screen: Screen) -> None:
    cells = [tuple(map(printable, row)) for row in compared.table()]
    lines = [*screen.wrap(compared.heading), *screen.table(cells, "<>>>>><", (6, (1, 2)))]
    lines += [line for remark in compared.remarks for line in screen.wrap(remark)]
    screen.print(*([screen.title(printable(benchmark, 1 << 10)), *lines, ""] if benchmark else lines))


def _objects(benchmark: str, compared: Comparison) -> Iterator[dict[str, Any]]:
    head = {"benchmark": benchmark} if benchmark else {}
    for name, change in compared.to_dict().items():
        numbers = {key: plain_number(value) for key, value in change.items() if not isinstance(value, str)}
        yield head | {"name": name} | numbers | {"unit": change["units"]}
