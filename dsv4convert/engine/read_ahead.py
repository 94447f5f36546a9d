"""Asks the system for bytes of the source before their turn, for a worker that is by itself.

While it converts and writes, the disk would have nothing to read; several workers keep it busy (docs/performance.md).
The kernel reads ahead by itself only where reads follow each other, and a segment's operands lie apart.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import Dsv4Error
from ..plan import Segment
from .outputs import DescriptorCache

Task = TypeVar("Task")

# Bytes of the source that are asked for before their turn. With 4 MiB, a disk of 0.8 GB/s still waits.
AHEAD_BYTES = 16 * 2**20


def read_ahead(tasks: Iterator[Task], segment_of: Callable[[Task], Segment]) -> Iterator[Task]:
    """Yield tasks in order, having asked for what the next ones read, up to ``AHEAD_BYTES`` and one task at least."""
    with DescriptorCache() as descriptors:
        waiting: deque[tuple[Task, int]] = deque()
        nbytes = 0
        for task in tasks:
            segment = segment_of(task)
            _ask_for(segment, descriptors)
            waiting.append((task, sum(map(segment.bytes_read, segment.operands))))
            nbytes += waiting[-1][1]
            while len(waiting) > 1 and nbytes - waiting[0][1] >= AHEAD_BYTES:
                nbytes -= waiting[0][1]
                yield waiting.popleft()[0]
        while waiting:
            yield waiting.popleft()[0]


def _ask_for(segment: Segment, descriptors: DescriptorCache) -> None:
    """Ask for the operands of a segment; of a long one the start, as reads that follow it need no advice."""
    # Only advice: whoever reads the bytes meets the error, and can say more.
    with contextlib.suppress(Dsv4Error, OSError):
        for operand in segment.operands:
            descriptor = descriptors.get(operand.file, os.O_RDONLY)
            nbytes = min(segment.bytes_read(operand), AHEAD_BYTES)
            os.posix_fadvise(descriptor, operand.offset, nbytes, os.POSIX_FADV_WILLNEED)
