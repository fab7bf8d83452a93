"""A report as a picture: rates over time, a panel for each statistic, a line for each VM, vCPU or host."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmstats_fast._text import printable
from kvmstats_fast.cli._grammar import UsageError
from kvmstats_fast.cli._present import arrange
from kvmstats_fast.formats import need

if TYPE_CHECKING:
    from pathlib import Path

    from kvmstats_fast.cli._recorded import Recorded, Summary

_PANELS = 8


def draw(recorded: Recorded, path: Path) -> bytes:
    """Draw the statistics that moved, in the format that the ending of `path` says; the first ones if there are many.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    UsageError
        If nothing has a rate over time, or no format is called so.
    """
    figure_module = need("matplotlib.figure", "plot")
    panels: dict[str, list[Summary]] = {}
    for _, row, _ in arrange(recorded.rows):
        if row.steps and row.moved:
            panels.setdefault(row.stat.name, []).append(row)
    if not panels:
        raise UsageError(f"{path}: no statistic that changed has a rate over time: there is nothing to plot")
    shown = dict([*panels.items()][:_PANELS])
    figure = figure_module.Figure(figsize=(10, 1.2 + 2.2 * len(shown)), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in formats:
        raise UsageError(f"{path} does not end in the name of a format: {', '.join(sorted(formats))}")
    labels = dict.fromkeys(_label(row) for rows in shown.values() for row in rows)
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for ax, (name, rows) in zip(axes, shown.items(), strict=True):
        _draw_panel(ax, name, rows, colors)
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()


def _draw_panel(ax: Any, name: str, rows: list[Summary], colors: dict[str, str]) -> None:
    for row in sorted(rows, key=lambda row: [*colors].index(_label(row))):
        labels: list[str | None] = [_label(row), *[None] * len(row.steps)]
        for edges, steps, label in zip(row.time, row.steps, labels, strict=False):
            ax.stairs(steps, edges.astype("datetime64[ns]"), baseline=None, label=label, color=colors[_label(row)])
    unit = rows[0].unit
    ax.set_ylabel(f"{printable(name)}\n({unit if rows[0].rate is None else f'{unit or 1}/s'})".replace("\n()", ""))
    ax.set_ylim(bottom=min(float(np.fmin.reduce(steps, initial=0)) for row in rows for steps in row.steps))
    ax.margins(x=0)
    if len(rows) <= _PANELS:
        ax.legend(loc="best", fontsize="small")


def _label(row: Summary) -> str:
    whose = printable(row.vm or row.host).replace("$", r"\$")
    return whose if row.vcpu is None else f"{whose}/{row.vcpu}"
