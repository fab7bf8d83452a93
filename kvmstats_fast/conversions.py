"""Conversions: the methods of Samples that make tables and files, each a line that imports the room of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from pathlib import Path


class Conversions:
    """What becomes of samples elsewhere. `Samples` inherits it, and so is every `self`."""

    __slots__ = ()

    def to_arrow(self: Any, *, values: str = "raw") -> Any:
        """Return the samples of one kind and kernel as a ``pyarrow.Table``, with a row for each sweep and file.

        Parameters
        ----------
        values : {"raw", "delta", "rate"}
            Contents of the columns of statistics: raw values, or what `delta` or `rate` returns. Sums over raw counters
            mean nothing, and differences go below 0 where one was cleared; deltas can be added up. A delta or rate is
            in the row of the later of its two sweeps, so the first sweep has none.

        Returns
        -------
        pyarrow.Table
            The columns ``host``, ``vm`` (the label, see `FileInfo`), ``pid`` (null if it is not known) and ``vcpu`` (-1
            for the file of a VM), with ``time`` (the wall clock, timestamp[ns, UTC]), identify a row. Then ``tick``,
            ``sweep_ns``, ``file`` (the index in `files`), ``id``, for vCPUs ``vcpu_id`` (as ``vcpu``, which version 0.1
            lacked), and one column for each statistic: raw values are uint64, rates float64, deltas as from `delta`; a
            histogram's are a fixed size list. Only ``pid`` has nulls. The metadata of a field have the descriptor. Rows
            of files that had failed are left out. A statistic with the name of one of these columns, or ``bucket`` or
            ``date``, is called ``stat.NAME``, here and in the other conversions.

        Raises
        ------
        KeyError
            For both VM and vCPU files, or files of different kernels: see `vm`, `vcpu`, `split`.
        ValueError
            If `values` is none of these.
        ModuleNotFoundError
            Without the extra: ``pip install 'kvmstats-fast[arrow]'``.
        """
        from kvmstats_fast.formats import arrow  # noqa: PLC0415 - only who uses it needs pyarrow

        return arrow.table(self, values=values)

    def __arrow_c_stream__(self: Any, requested_schema: object = None) -> object:
        """Return the samples to any library that speaks Arrow: pandas, polars, duckdb."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self: Any, *, values: str = "raw", si: bool = False) -> Any:
        """Return the samples of one kind and kernel as a ``pandas.DataFrame``, with a row for each sweep and file.

        Parameters
        ----------
        values : {"raw", "delta", "rate"}
            Contents of the columns of statistics, as in `to_arrow`.
        si : bool
            Convert raw values or deltas to base units, as `si` does. Rates always are in base units.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``time`` (the wall clock, UTC), ``host``, ``vm`` and ``vcpu``, with ``pid`` as a nullable column,
            all as in `to_arrow`: ``frame["exits"].unstack(["vm", "vcpu"])`` has a column for each vCPU. A histogram has
            a column for each bucket, ``halt_wait_hist[3]``. ``attrs["units"]`` maps columns to units. Rows of files
            that had failed are left out.

        Raises
        ------
        KeyError
            As `to_arrow`.
        """
        from kvmstats_fast.formats import frames  # noqa: PLC0415 - only who uses it needs pandas

        return frames.to_pandas(self, values=values, si=si)

    def to_xarray(self: Any, *, values: str = "raw", si: bool = False) -> Any:
        """Return the samples as an ``xarray.Dataset``, with a variable for each statistic.

        Parameters
        ----------
        values : {"raw", "delta", "rate"}
            Contents of the variables, as in `to_arrow`: deltas and rates have one value less along ``time``.
        si : bool
            Convert raw values or deltas to base units, as `si` does. Rates always are in base units.

        Returns
        -------
        xarray.Dataset
            Dimensions ``time`` (the wall clock, UTC, datetime64[ns]); ``vcpu`` for files of vCPUs and ``vm`` for those
            of VMs; and for histograms ``bucket``, the buckets' lower edges in base units (``bucket2`` ... where
            histograms have other edges). Each variable has the attribute ``units``. Coordinates along ``vcpu`` or
            ``vm`` are ``host``, ``vm``, ``pid`` and ``vcpu``, as in `to_arrow`, but with -1 for an unknown pid:
            ``data.exits.groupby("vm")``, ``data.exits.sel(vcpu=0)``, which is vCPU 0 of each VM. In a Dataset of both
            kinds each is prefixed with its dimension: ``vcpu_vm``, ``vm_host``. The attribute ``errors`` lists files
            that failed; their values mean nothing from there on, as in ``samples[name]``.

        Raises
        ------
        KeyError
            If both VM and vCPU files have a name, or there are files of different kernels.
        """
        from kvmstats_fast.formats import frames  # noqa: PLC0415 - only who uses it needs xarray

        return frames.to_xarray(self, values=values, si=si)

    def to_csv(
        self: Any,
        path: str | os.PathLike[str],
        *,
        kind: str | None = None,
        values: str = "raw",
        overwrite: bool = False,
        mode: int = 0o600,
    ) -> None:
        """Write the samples of one kind to a CSV file; see `kvmstats_fast.to_csv`, which also takes a recording."""
        from kvmstats_fast.formats import csv  # noqa: PLC0415 - only who uses it needs pyarrow

        csv.to_csv(self, path, kind=kind, values=values, overwrite=overwrite, mode=mode)

    def to_parquet(  # noqa: PLR0913 - what a data set can be like
        self: Any,
        root: str | os.PathLike[str],
        *,
        host: str | None = None,
        values: str = "raw",
        encoding: str = "BYTE_STREAM_SPLIT",
        overwrite: bool = False,
        mode: int = 0o600,
    ) -> list[Path]:
        """Add the samples to a Parquet data set; see `kvmstats_fast.to_parquet`, which also takes a recording."""
        from kvmstats_fast.formats import parquet  # noqa: PLC0415 - only who uses it needs pyarrow

        return parquet.to_parquet(
            self, root, host=host, values=values, encoding=encoding, overwrite=overwrite, mode=mode
        )

    def to_perfetto(self: Any, path: str | os.PathLike[str], *, overwrite: bool = False, mode: int = 0o600) -> None:
        """Write the samples as a Perfetto trace; see `kvmstats_fast.to_perfetto`, which also takes a recording."""
        from kvmstats_fast.formats import perfetto  # noqa: PLC0415 - only who uses it needs perfetto

        perfetto.to_perfetto(self, path, overwrite=overwrite, mode=mode)

    def save(
        self: Any,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        compression: str | None = None,
        mode: int = 0o600,
    ) -> None:
        """Write to disk, completely or not at all; `load` returns it as it was.

        Parameters
        ----------
        path : path-like
            A directory, which becomes a recording like that of a `Recorder`; or a file named ``*.npz``, which needs
            only numpy.
        overwrite : bool
            Replace what is there.
        compression : {None, "zstd", "lz4"}
            None: `load` maps the file without a copy. An ``.npz`` is deflated if this is not None.
        mode : int
            Permissions of the files, whatever the umask; a directory can be entered by whoever may read them. By
            default the owner alone may.

        Raises
        ------
        FileExistsError
            If `path` exists and `overwrite` is False; or if it is a directory that holds more than a recording.
        OSError
            If it cannot be written; then nothing has changed.
        ValueError
            If the samples are of no files.
        """
        from kvmstats_fast.formats import npz  # noqa: PLC0415 - reaches pyarrow

        npz.save(self, path, overwrite=overwrite, compression=compression, mode=mode)
