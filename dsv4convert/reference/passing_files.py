"""Files without names for what does not fit memory: arrays to be read in the order of writing, and rows."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ..engine.outputs import os_errors, write_all
from .weights.protocol import Array

F32 = np.dtype(np.float32)


class ArrayFile:
    """Records of named arrays, written one after another and then read in the same order; gone when closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with os_errors(folder, "written to"):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by ``close``)
        self._count = 0

    def put(self, arrays: Mapping[str, Array]) -> None:
        """Write a record behind those that are there.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        with os_errors(self._folder, "written to"):
            npy.write_array(self._file, np.array(list(arrays)), allow_pickle=False)
            for array in arrays.values():
                npy.write_array(self._file, np.ascontiguousarray(array), allow_pickle=False)
            self._file.flush()  # a full disk is said here, and not where the buffer happens to be full
        self._count += 1

    def take(self) -> Iterator[dict[str, Array]]:
        """Yield all records, and forget them at the end.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        with os_errors(self._folder, "read"):
            self._file.seek(0)
        for _ in range(self._count):
            with os_errors(self._folder, "read"):
                names = npy.read_array(self._file, allow_pickle=False).tolist()
                record = {name: npy.read_array(self._file, allow_pickle=False) for name in names}
            yield record
        self._count = 0
        with os_errors(self._folder, "written to"):
            self._file.seek(0)
            self._file.truncate()

    def close(self) -> None:
        """Close the file, with which it is gone."""
        with contextlib.suppress(OSError):  # what the disk did not take is tried again, and is not needed
            self._file.close()


class RowFile:
    """Rows [N, columns] of float32 in a file; those that were never written are zero."""

    def __init__(self, folder: Path, columns: int) -> None:
        self._folder = folder
        self._columns = columns
        self._row_bytes = columns * F32.itemsize
        with os_errors(folder, "written to"):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by ``close``)

    def write(self, first: int, rows: Array) -> None:
        """Write ``rows`` [n, columns] from row ``first`` on.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        with os_errors(self._folder, "written to"):
            write_all(self._file.fileno(), np.ascontiguousarray(rows, F32).data, first * self._row_bytes)

    def read(self, rows: Array) -> Array:
        """Return the given rows, in their order.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        out = np.zeros((len(rows), self._columns), F32)
        with os_errors(self._folder, "read"):
            for begin, end in _runs(rows):
                _read_into(self._file.fileno(), out[begin:end].data, int(rows[begin]) * self._row_bytes)
        return out

    def add(self, rows: Array, values: Array) -> None:
        """Add ``values`` [n, columns] to the given rows, which differ from each other.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        sums = self.read(rows) + values
        for begin, end in _runs(rows):
            self.write(int(rows[begin]), sums[begin:end])

    def clear(self) -> None:
        """Make all rows zero.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        with os_errors(self._folder, "written to"):
            self._file.truncate(0)

    def close(self) -> None:
        """Close the file, with which it is gone."""
        self._file.close()


def _runs(rows: Array) -> Iterator[tuple[int, int]]:
    """Yield where runs of consecutive row numbers begin and end."""
    breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    yield from ((a, b) for a, b in itertools.pairwise(breaks) if a < b)


def _read_into(descriptor: int, out: memoryview, offset: int) -> None:
    """Fill ``out``; what lies behind the file's end keeps its value."""
    view = out.cast("B")
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            return
        view, offset = view[count:], offset + count
