"""Samples and recordings as CSV."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmstats_fast._arguments import check_kind
from kvmstats_fast.formats import arrow, need
from kvmstats_fast.formats._put import PRIVATE, put_file
from kvmstats_fast.formats.recording import read_runs
from kvmstats_fast.formats.values import Columns, check_values

if TYPE_CHECKING:
    import os

    from kvmstats_fast.formats.recording import Recording
    from kvmstats_fast.samples import Samples


def to_csv(  # noqa: PLR0913 - what a file can be like
    source: Samples | Recording | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    values: str = "raw",
    overwrite: bool = False,
    mode: int = PRIVATE,
) -> None:
    """Convert samples or a recording of one kind to a CSV file.

    Parameters
    ----------
    source : Samples, Recording or path of a recording
    path : path-like
    kind : {"vm", "vcpu"}, optional
        Which, if both were sampled.
    values : {"raw", "delta", "rate"}
        Contents of the columns of statistics, as in `Samples.to_arrow`.
    overwrite : bool
        Replace the file.
    mode : int
        Permissions of the file, whatever the umask. By default the owner alone may read it.

    Raises
    ------
    FileExistsError
        If there is something at `path`, without `overwrite`.
    KeyError
        As `Samples.to_arrow`.
    KvmStatsError
        If a recording has no whole batch.

    Notes
    -----
    The columns are those of `Samples.to_arrow`, with one for each bucket of a histogram (``halt_wait_hist[3]``). The
    file is written completely or not at all.
    """
    csv = need("pyarrow.csv", "arrow")
    check_kind(kind)
    check_values(values)
    writer = None
    with put_file(Path(path), overwrite=overwrite, mode=mode) as file, ExitStack() as stack:
        last = None
        for run, step in read_runs(source):
            samples = step.samples if kind is None else _of_kind(step.samples, kind)
            if run != last:
                last, columns = run, Columns(values)
            table = _flatten(arrow.table(samples, values=values, columns=columns, follows=step.follows))
            if writer is None:
                schema = table.schema
                writer = stack.enter_context(csv.CSVWriter(file, schema))
            elif not schema.equals(table.schema):
                raise KeyError(
                    f"{path}: the runs of this recording have different statistics, which one CSV file has no columns "
                    "for: see kvmstats_fast.open_recordings(...).select"
                )
            writer.write_table(table)


def _of_kind(samples: Samples, kind: str) -> Samples:
    one = samples.vm if kind == "vm" else samples.vcpu
    if not one.files:
        raise KeyError(f"none of these samples' files is of kind {kind!r}")
    return one


def _flatten(table: Any) -> Any:
    """Return a table without lists or dictionaries."""
    pa, pc = need("pyarrow", "arrow"), need("pyarrow.compute", "arrow")
    columns: dict[str, Any] = {}
    table = arrow.decode_dictionaries(table)
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_fixed_size_list(field.type):
            values = arrow.as_numpy(column.combine_chunks())
            columns |= {f"{field.name}[{i}]": pa.array(values[:, i]) for i in range(field.type.list_size)}
        elif pa.types.is_timestamp(field.type):
            # Without its time zone, which pyarrow would look up in a database that not every system has.
            text = column.cast(pa.timestamp("ns")).cast(pa.string())
            columns[field.name] = pc.binary_join_element_wise(text, "Z", "")
        else:
            columns[field.name] = column
    return pa.table(columns)
