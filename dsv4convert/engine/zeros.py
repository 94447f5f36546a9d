"""Names the tensors of the source that a run found to be nothing but zero bytes, as an interrupted download leaves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..containers.safetensors import Stored, read_header

# A stack of experts, [experts, rows, columns], can have some that are zero.
STACK_DIMENSIONS = 3


def zero_tensors(source: Path, ranges: Iterable[tuple[Path, int, int]]) -> tuple[str, ...]:
    """Return the tensors that lie in ranges (file, offset, bytes) of zeros, by their names in the files.

    Experts of a stack that are zero, where others are not, are named NAME[NUMBER].

    Raises:
        InputMissingError, FileFormatError: a file of the source can no longer be read.
    """
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for path, offset, nbytes in ranges:
        if path.parent == source and path.suffix == ".safetensors":
            by_file.setdefault(path, []).append((offset, offset + nbytes))
    found: list[str] = []
    for path, spans in sorted(by_file.items()):
        merged = _merged(spans)
        for name, stored in read_header(path).items():
            found += _zero_parts(name, stored, merged)
    return tuple(dict.fromkeys(found))  # of shards, each rank may hold a part of a tensor


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans (begin, end) in order, those that touch or overlap as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _zero_parts(name: str, stored: Stored, merged: list[tuple[int, int]]) -> Iterator[str]:
    if not stored.nbytes:
        return
    if _holds(merged, stored.offset, stored.nbytes):
        yield name
    elif len(stored.shape) == STACK_DIMENSIONS:
        size = stored.nbytes // stored.shape[0]
        for number in range(stored.shape[0]):
            if _holds(merged, stored.offset + number * size, size):
                yield f"{name}[{number}]"


def _holds(merged: list[tuple[int, int]], offset: int, nbytes: int) -> bool:
    place = bisect_right(merged, offset, key=lambda span: span[0]) - 1
    return place >= 0 and offset + nbytes <= merged[place][1]
