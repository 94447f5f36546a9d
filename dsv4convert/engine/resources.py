"""Memory, disk space and threads: needed and available."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..containers.fetching import AHEAD_BYTES
from ..containers.sources import READERS, mount_of
from ..errors import SpaceError
from ..plan import LOW_BIT, Plan, Quantise, operation_of
from .consume import room_needed
from .links import shared_bytes
from .operations import COPY_TILE_BYTES, TILE_BYTES
from .outputs import free_bytes

# Memory of the interpreter and its libraries; of a segment of the plan with its digest; and of one worker: tiles,
# scratch and output. Measured on V4-Pro's headers and on slices, rounded up.
BASE_MEMORY_BYTES = 100 * 2**20
SEGMENT_MEMORY_BYTES = 2**10
WORKER_MEMORY_BYTES = 6 * TILE_BYTES + 2 * COPY_TILE_BYTES

OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# More threads than these take processor time and give no speed (benchmarks/results/scale_16core_*.json): writers of
# one file wait for each other at its inode, and all of them for memory or the disk.
ONE_FILE_THREADS, MANY_FILES_THREADS = 8, 16
# Files that share the work: smaller ones than this part of the largest keep no thread busy.
FILE_SHARE = 1 / 16


def default_threads(plan: Plan) -> int:
    """Return the number of worker threads for a plan, of the processors that this process may use.

    Workers that read from a server mostly wait for it, so that there are more of them.
    Low-bit types keep every processor busy with arithmetic in one call a tile. Everything else is bound by writes.
    """
    processors = len(os.sched_getaffinity(0))
    if mount_of(plan.source) is not None:
        return max(processors, READERS)
    low_bit = (tensor.segments for tensor in plan.tensors() if tensor.dtype in LOW_BIT)
    if any(isinstance(operation_of(segments), Quantise) for segments in low_bit):
        return processors
    largest = max((file.nbytes for file in plan.files), default=0)
    files = sum(file.nbytes >= largest * FILE_SHARE for file in plan.files)
    return min(processors, MANY_FILES_THREADS if files > 1 else ONE_FILE_THREADS)


def memory_needed(plan: Plan, threads: int) -> int:
    """Return the bytes of memory that carrying out ``plan`` with ``threads`` workers takes at most."""
    segments = sum(len(tensor.segments) for tensor in plan.tensors())
    ahead = 0 if mount_of(plan.source) is None else AHEAD_BYTES
    return BASE_MEMORY_BYTES + segments * SEGMENT_MEMORY_BYTES + threads * WORKER_MEMORY_BYTES + ahead


def memory_available() -> int:
    """Return the bytes of memory that the system says can be had, within what control groups leave of their limits."""
    available = 2**63
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return min([available, *left_by_groups()])


def left_by_groups(own: Path = OWN_GROUPS, groups: Path = GROUPS) -> Iterator[int]:
    """Yield what can still be had in each of the control groups, of either version, that this process is in.

    That is the limit without what is in use. Cached pages of files count as not in use, as they do in MemAvailable.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, files = groups, _GroupFiles("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            # "total_" are the figures with those of the groups within, as the limit and all figures of version 2 are.
            files = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            top = groups / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the topmost has no such file, and "max" is no limit
                limit = int((folder / files.limit).read_text(encoding="ascii"))
                yield max(0, limit - _used(folder, files))


class _GroupFiles(NamedTuple):
    """Names of a control group's files, and how the names of figures in its memory.stat begin."""

    limit: str
    usage: str
    prefix: str


def _used(folder: Path, files: _GroupFiles) -> int:
    """Return the bytes that a control group uses and cannot let go; 0 where that cannot be told."""
    try:
        usage = int((folder / files.usage).read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        figures = {name: int(figure) for name, _, figure in (line.partition(" ") for line in lines)}
    except (OSError, ValueError):
        return 0
    # Files in a tmpfs are not among these.
    cached = (figures.get(f"{files.prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(0, usage - sum(cached))


def outgrows_memory(plan: Plan) -> bool:
    """Return whether memory cannot cache the output and as much of the source.

    What is read and written then leaves the cache at once: otherwise it would drive out what other programs have there,
    and be driven out itself before anybody comes back to it.
    """
    return 2 * plan.nbytes > memory_available()


def disk_needed(plan: Plan, already: int = 0) -> int:
    """Return the bytes of disk that carrying out ``plan`` takes, where ``already`` bytes of the output are there.

    A plan that uses its source up needs room for two of its files, besides headers and padding. Files that the output
    can share with the source need none.
    """
    needed = max(0, plan.nbytes - shared_bytes(plan.files, plan.destination) - already)
    if not plan.consumes:
        return needed
    segments = sum(tensor.nbytes for tensor in plan.tensors())
    return min(needed, room_needed(plan) + plan.nbytes - segments)


def check_space(plan: Plan, already: int = 0) -> None:
    """Check that the disk holds the output, ``already`` bytes of which are there.

    Raises:
        SpaceError: it does not.
    """
    check_free(plan.destination, disk_needed(plan, already))


def check_free(folder: Path, needed: int) -> None:
    """Check that ``needed`` bytes can be written on the disk of a folder, which need not be there yet.

    Raises:
        SpaceError: they cannot.
    """
    free = free_bytes(folder)
    if free < needed:
        raise SpaceError(
            "not enough disk space for the output",
            where=folder,
            expected=f"{needed} bytes free",
            got=free,
            hint="free some space or choose another folder",
        )
