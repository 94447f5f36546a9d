"""Reading the operands of a segment whose files are remote: one request for each, read as the tiles go.

Every byte is fetched once. What several segments read, or one reads twice, is kept on the output's disk meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..containers.sources import Intervals, RemoteFile, SequentialReader, at
from ..plan import Operand, Segment


def extent(segment: Segment, operand: Operand) -> tuple[int, int]:
    """Return the first byte that a segment reads of an operand's file, and the end."""
    return operand.offset, operand.offset + segment.bytes_read(operand)


class SharedRanges:
    """The bytes of remote files that segments read more than once."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        begins: dict[RemoteFile, array[int]] = {}
        ends: dict[RemoteFile, array[int]] = {}
        for segment in segments:
            for operand in segment.operands:
                remote = at(operand.file)
                if remote is None:
                    continue
                begin, end = extent(segment, operand)
                begins.setdefault(remote, array("q")).append(begin)
                ends.setdefault(remote, array("q")).append(end)
        self._shared = {remote: Intervals() for remote in begins}
        for remote, shared in self._shared.items():
            for begin, end in _overlaps(begins[remote], ends[remote]):
                shared.add(begin, end)

    @property
    def is_empty(self) -> bool:
        """Return whether the segments read no remote file."""
        return not self._shared

    def holds(self, remote: RemoteFile, begin: int, end: int) -> bool:
        """Return whether some of the bytes begin..end are read more than once."""
        shared = self._shared.get(remote)
        return shared is not None and (shared.end_of(begin) > begin or shared.next_begin(begin, end) < end)


def _overlaps(begins: array[int], ends: array[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs that more than one of the ranges has."""
    furthest = 0
    for begin, end in sorted(zip(begins, ends, strict=True)):
        if begin < furthest:
            yield begin, min(end, furthest)
        furthest = max(furthest, end)


class RangeReader:
    """One worker's requests for the segment that it is making; use it as a context manager."""

    def __init__(self, shared: SharedRanges, stopped: Callable[[], bool]) -> None:
        self._shared = shared
        self._stopped = stopped
        self._operands: list[tuple[Path, SequentialReader]] = []

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, segment: Segment) -> None:
        """Turn to another segment."""
        self.end()
        if self._shared.is_empty:
            return
        for operand in segment.operands:
            remote = at(operand.file)
            if remote is not None:
                begin, end = extent(segment, operand)
                is_kept = self._shared.holds(remote, begin, end)
                again = operand.row_bytes if operand.rows_per > 1 else 0
                reader = SequentialReader(remote, begin, end, is_kept=is_kept, again=again, stopped=self._stopped)
                self._operands.append((operand.file, reader))
        # Weights and scales together: one after the other, each tensor would wait twice for the server. Those that
        # fit into a block come first, which then share the memory with nobody.
        for _, reader in sorted(self._operands, key=lambda each: each[1].end - each[1].begin):
            reader.start()

    def end(self) -> None:
        """End the requests."""
        for _, reader in self._operands:
            reader.close()
        self._operands = []

    def read_into(self, file: Path, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with the bytes at ``offset`` of a file; return False where the file is local.

        Raises:
            Dsv4Error: they cannot be had.
        """
        for path, reader in self._operands:
            if path == file and reader.begin <= offset and offset + view.nbytes <= reader.end:
                reader.read_into(offset, view)
                return True
        remote = at(file)
        if remote is not None:
            remote.read_into(offset, view, stopped=self._stopped)
        return remote is not None
