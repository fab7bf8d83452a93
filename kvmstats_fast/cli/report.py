"""``kvmstats report``: what recordings say, as text, JSON, CSV, a picture, or a page for a ticket."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmstats_fast._text import plain_number
from kvmstats_fast.cli import _report_html, _report_plot, _report_text
from kvmstats_fast.cli._files import choose
from kvmstats_fast.cli._grammar import FILE_HELP, add_guest, add_output, add_selection, interval, usage_errors
from kvmstats_fast.cli._output import RowWriter, open_output
from kvmstats_fast.cli._recorded import SPREAD, summarize
from kvmstats_fast.cli._screen import Screen
from kvmstats_fast.formats._put import PRIVATE, put_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvmstats_fast.cli._recorded import Recorded


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this verb."""
    parser.description = (
        "Summarize recordings: hosts and VMs; rates, with their minimum, median and 99th percentile over time; "
        "figures, histograms, and what another halt_poll_ns would do; missed ticks, and what sampling cost. Several "
        "recordings are added up. Statistics that did not change are left out."
    )
    parser.add_argument("file", nargs="+", metavar="FILE", help=FILE_HELP)
    parser.add_argument(
        "--by",
        choices=("vm", "vcpu", "host"),
        default="vm",
        help="show a value for each of these (default: %(default)s)",
    )
    add_guest(parser)
    add_selection(parser)
    parser.add_argument(
        "-I",
        "--interval",
        type=interval,
        metavar="TIME",
        help="step for rates over time (default: a thousandth of each run)",
    )
    parser.add_argument("-z", "--zero", action="store_true", help="also show statistics that did not change")
    add_output(parser)
    parser.add_argument("--plot", metavar="FILE", help="plot rates over time to a new file, such as rates.png")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained HTML page to a new file")


def run(arguments: argparse.Namespace) -> int:
    """Read the recordings, and say it."""
    with usage_errors():
        recorded = summarize(arguments.file, arguments.by, choose(arguments), arguments.interval)
    made: list[tuple[str, bytes]] = []  # before anything is written: what is missing leaves no half of it
    if arguments.html:
        page = _report_html.make_page(recorded, zero=arguments.zero)
        made.append((arguments.html, page.encode("utf-8", "backslashreplace")))
    if arguments.plot:
        made.append((arguments.plot, _report_plot.draw(recorded, Path(arguments.plot))))
    with open_output(arguments) as output:
        writer = RowWriter(arguments, output, SPREAD)
        if writer.text and arguments.output == "-" and (arguments.plot or arguments.html):
            pass  # the files are what was asked for
        elif writer.text:
            _report_text.write(recorded, Screen.of(output, arguments.color), zero=arguments.zero)
        elif arguments.json:
            writer.write_objects(_objects(recorded, zero=arguments.zero))
        else:
            writer.write([row for row in recorded.rows if row.moved or arguments.zero])
    for path, content in made:
        with put_file(Path(path), overwrite=arguments.force, mode=PRIVATE) as file:
            file.write(content)
    return 0


def _objects(recorded: Recorded, *, zero: bool) -> Iterator[dict[str, Any]]:
    """Yield what JSON has: an object for each run, VM, statistic, figure, and the advice."""
    yield from ({"what": "run"} | run.fields() for run in recorded.runs)
    yield from ({"what": "vm"} | life.fields() for life in recorded.lives)
    yield from ({"what": "statistic"} | row.fields() for row in recorded.rows if row.moved or zero)
    for figure in recorded.figures().values():
        infos = figure.files or [None] * len(figure.values)
        vms = figure.vms or ("",) * len(figure.values)
        for host, vm, info, value in zip(figure.hosts, vms, infos, figure.values.tolist(), strict=True):
            whose = {"host": host, "vm": vm, "pid": info and info.pid, "vcpu": info and info.vcpu_id}
            if not math.isnan(value):
                about = {"name": figure.name, "value": plain_number(value), "unit": figure.units}
                yield {"what": "figure"} | whose | about | {"formula": figure.formula}
    if recorded.advice is not None:
        yield {"what": "halt_poll_advice"} | recorded.advice.to_dict()
