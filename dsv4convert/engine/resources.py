"""Memory, disk space and threads: needed and available."""

from __future__ import annotations

import os

from ..errors import SpaceError
from ..plan import Plan
from .outputs import free_bytes
from .worker import COPY_TILE_BYTES, TILE_BYTES

# Memory of the interpreter and its libraries; of a segment of the plan with its
# digest; and of one worker: tiles, scratch and output. Measured on V4-Pro's headers and on slices, rounded up.
BASE_MEMORY_BYTES = 100 * 2**20
SEGMENT_MEMORY_BYTES = 2**10
WORKER_MEMORY_BYTES = 6 * TILE_BYTES + 2 * COPY_TILE_BYTES


def default_threads() -> int:
    """Return the number of worker threads: the processors that this process may use, at most 16.

    More threads than that only wait for the disk.
    """
    return max(1, min(16, len(os.sched_getaffinity(0))))


def memory_needed(plan: Plan, threads: int) -> int:
    """Return the bytes of memory that carrying out ``plan`` with ``threads`` workers takes at most."""
    segments = sum(len(tensor.segments) for file in plan.files for tensor in file.tensors)
    return BASE_MEMORY_BYTES + segments * SEGMENT_MEMORY_BYTES + threads * WORKER_MEMORY_BYTES


def memory_available() -> int:
    """Return the bytes of memory that the system says can be had."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63


def check_space(plan: Plan, already: int = 0) -> None:
    """Check that the disk holds the output, ``already`` bytes of which are there.

    Raises:
        SpaceError: it does not.
    """
    free = free_bytes(plan.destination)
    if free < plan.nbytes - already:
        raise SpaceError(
            "not enough disk space for the output",
            where=plan.destination,
            expected=f"{plan.nbytes - already} bytes free",
            got=free,
            hint="free some space or choose another folder",
        )
