"""Mappings of output files in memory, for workers that share one.

A file system lets one writer at a time into a file; on a tmpfs, all writers of one together then get no further than
one and a half. Stores into a mapping do not take that lock, and cost more. 16 workers in one file: 2.6 GB/s by writes
and 4.9 by a mapping; in two files 4.4 and 8.3, in four 9.0 and 9.2, in eight 18.9 and 9.9
(benchmarks/results/scale_16core_2026-11-26_causes.txt). On ext4 mappings only lose.
"""

from __future__ import annotations

import mmap
import threading

from ..formats.compiled.segments import address_of, lies_in_memory

# From so many workers in a file on, its mapping is the quicker way.
SHARERS = 4


class Mappings:
    """The mapped outputs of a run, each mapped once for all workers, for as long as this object lasts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap | None] = {}

    def address(self, descriptor: int) -> int | None:
        """Return where an output of the run is mapped, None where it cannot be or should not."""
        with self._lock:
            if descriptor not in self._maps:
                self._maps[descriptor] = _map(descriptor)
            mapped = self._maps[descriptor]
        return None if mapped is None else address_of(memoryview(mapped))


def _map(descriptor: int) -> mmap.mmap | None:
    if not lies_in_memory(descriptor):
        return None
    try:
        return mmap.mmap(descriptor, 0)
    except (OSError, ValueError):  # no address space, or an empty file
        return None
