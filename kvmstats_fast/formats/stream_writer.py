"""Arrow IPC streams that are written together, one for each kind of file: a batch is in all of them or in none."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmstats_fast.formats import arrow, need
from kvmstats_fast.formats._put import open_new
from kvmstats_fast.formats.limits import MOST_IN_BATCH, saying_shortage
from kvmstats_fast.formats.origin import Origin
from kvmstats_fast.formats.pending import bytes_per_sweep, cut_sweeps
from kvmstats_fast.formats.stream_file import END_OF_STREAM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmstats_fast.samples import Samples


class Written(NamedTuple):
    """What is in the kernel's hands: sweeps, and bytes of their batches."""

    sweeps: int = 0
    size: int = 0


class Options(NamedTuple):
    """How streams are written: see `Recorder`."""

    compression: str | None
    sync: bool
    mode: int


class StreamWriter:
    """Streams that are written together.

    Parameters
    ----------
    directory : Path
    name : str
        What follows the kind in the names of the files: ``"-00000"`` makes ``vcpu-00000.arrows``.
    samples : Samples
        The first of those that will be written.
    options : Options
    **origin : Any
        Fields of `Origin` that samples do not know.

    Attributes
    ----------
    written : Written
        Replaced by one assignment when a batch is whole, so that nothing that is raised leaves it half counted.
    is_over : bool
        Whether nothing can be written any more.
    """

    def __init__(self, directory: Path, name: str, samples: Samples, options: Options, **origin: Any) -> None:
        self.written = Written()
        self.is_over = False
        self._options = options
        self._files: list[_File] = []
        self._writers: list[Any] = []
        self._schemas: list[Any] = []
        pa = need("pyarrow", "arrow")
        # Without Arrow's threads: it ends the process where it cannot start one.
        ipc = pa.ipc.IpcWriteOptions(compression=options.compression, use_threads=False)
        counts: dict[str, int] = {}
        try:
            for group in samples.groups:
                counts[group.kind] = number = counts.get(group.kind, 0) + 1
                label = group.kind + (str(number) if number > 1 else "")
                schema = arrow.arrow_schema(Origin.of(samples, group, **origin), list(group.places))
                file = _File(directory / f"{label}{name}.arrows", options.mode)
                self._files.append(file)
                self._schemas.append(schema)
                self._writers.append(pa.ipc.new_stream(pa.PythonFile(file, "w"), schema, options=ipc))
        except BaseException:
            self._cut([0] * len(self._files))
            raise

    @property
    def longest(self) -> int:
        """Return the bytes of the largest file."""
        return max(file.position for file in self._files)

    def append(self, samples: Samples) -> None:
        """Write samples as one batch, or as several that any reader has room to decompress.

        If that fails, what was written of a batch is taken back, and the streams end before it.
        """
        before, ends = self.written, [file.position for file in self._files]
        try:
            for part in self._split(samples):
                ends = [file.position for file in self._files]
                before = self.written
                for file, writer, schema, group in zip(
                    self._files, self._writers, self._schemas, part.groups, strict=True
                ):
                    batch, happened = arrow.to_batch(part, group, schema)
                    metadata = {f"kvmstats.{what}": json.dumps(value) for what, value in happened.items()}
                    with saying_shortage(file.path):
                        writer.write_batch(batch, custom_metadata=metadata)
                    if self._options.sync:
                        file.sync()
                grown = sum(file.position for file in self._files) - sum(ends)
                self.written = Written(before.sweeps + len(part), before.size + grown)
        except BaseException:
            # Ctrl-C too may have left half a batch behind.
            if self.written is before:
                self._cut(ends if before.size else [0] * len(ends))
            raise

    def _split(self, samples: Samples) -> Iterator[Samples]:
        """Cut samples into batches; uncompressed ones are read in place, whatever their size."""
        if self._options.compression is None:
            return iter([samples])
        step = max(MOST_IN_BATCH // (max(bytes_per_sweep([group]) for group in samples.groups) + 1), 1)
        return cut_sweeps(samples, range(step, len(samples), step))

    def _cut(self, ends: list[int]) -> None:
        """End the streams at these bytes; a file of which nothing is left is removed."""
        self.is_over = True
        for file, end in zip(self._files, ends, strict=True):
            file.cut(end)

    def end(self) -> None:
        """Write the end marks, and close the files; a second call does nothing."""
        if not self.is_over:
            self.is_over = True
            with ExitStack() as stack:
                for file, writer in zip(self._files, self._writers, strict=True):
                    stack.callback(file.close)
                    stack.callback(writer.close)

    def stop(self) -> None:
        """End the streams after an error: without end marks, if there is no room for them."""
        if not self.is_over:
            self._cut([file.position for file in self._files])

    def let_go(self) -> None:
        """Close the files as they are: in a forked child, because they are its parent's to end."""
        self.is_over = True
        for file in self._files:
            file.close()

    def remove(self) -> None:
        """Delete the files, which are no longer needed."""
        for file in self._files:
            with suppress(FileNotFoundError):
                file.path.unlink()
        self.let_go()


class _File:
    """What pyarrow writes to: every byte reaches the kernel or raises."""

    closed = False

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.position = 0
        self._fd = open_new(path, mode)

    def write(self, data: Any) -> int:
        """Write all of it, which may take several system calls."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view and not self.closed:
            written = os.write(self._fd, view)
            self.position += written
            view = view[written:]
        return size

    def flush(self) -> None:
        """Do nothing: no byte waits here."""

    def sync(self) -> None:
        """Have it on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if not self.closed:
            self.closed = True
            os.close(self._fd)

    def cut(self, position: int) -> None:
        """End the stream at `position`, after its last whole batch; remove the file if it has none."""
        try:
            with suppress(OSError):  # if there is no room for the end mark, the file ends without it
                if position:
                    os.ftruncate(self._fd, position)
                    os.pwrite(self._fd, END_OF_STREAM, position)
                else:
                    self.path.unlink()
        finally:
            self.close()
