"""What a plan would write and need, told without writing anything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..containers.sources import shown
from ..errors import OutputExistsError
from ..plan import Dropped, Plan
from .names import check_name_fits, check_no_mount_point
from .outputs import SUFFIXES, free_bytes, outputs_of
from .resources import disk_needed, memory_available, memory_needed
from .upload import is_made_here


@dataclass(frozen=True)
class PlannedFile:
    """A file that a conversion would write."""

    path: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class DryRun:
    """The files of a plan, the tensors it leaves out, and the disk and memory (bytes) it needs and finds.

    ``worker_disk_needed`` is for a file on the disk of each worker of a cluster that sends what it makes to a store.
    """

    target: str
    source: str
    files: tuple[PlannedFile, ...]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    read_bytes: int
    disk_needed: int
    disk_free: int
    memory_needed: int
    memory_available: int
    worker_disk_needed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def foresee(plan: Plan, threads: int, *, sent_by_workers: bool = False) -> DryRun:
    """Return what ``plan`` would write, and what it needs with ``threads`` worker threads.

    ``sent_by_workers``: nothing lies at the destination, see ``execute_in_store``.
    """
    needed, folder, by_worker = disk_needed(plan), plan.destination, 0
    if sent_by_workers:
        needed, folder = sum(file.nbytes for file in plan.files if is_made_here(file)), Path(tempfile.gettempdir())
        by_worker = max((file.nbytes for file in plan.files if not is_made_here(file)), default=0)
    return DryRun(
        target=plan.target,
        source=shown(plan.source),
        files=tuple(
            PlannedFile(str(path), file.nbytes, len(file.tensors))
            for path, file in zip(plan.final_paths(), plan.files, strict=True)
        ),
        dropped=plan.dropped,
        notes=(*plan.notes, *_obstacles(plan)),
        read_bytes=plan.source_bytes,
        disk_needed=needed,
        disk_free=free_bytes(folder),
        memory_needed=memory_needed(plan, threads),
        memory_available=memory_available(),
        worker_disk_needed=by_worker,
    )


def _obstacles(plan: Plan) -> Iterator[str]:
    """Yield why an output could not get its name, as far as that can be seen without writing anything."""
    for path in outputs_of(plan).final():
        try:
            check_no_mount_point(path)
            check_name_fits(path, SUFFIXES)
        except OutputExistsError as error:
            yield str(error)


def join_dry_runs(runs: Sequence[DryRun]) -> DryRun:
    """Return what runs that follow one another write and need together: the disk of all, the memory of the largest."""
    return replace(
        runs[0],
        files=tuple(chain.from_iterable(run.files for run in runs)),
        dropped=tuple(dict.fromkeys(chain.from_iterable(run.dropped for run in runs))),
        notes=tuple(dict.fromkeys(chain.from_iterable(run.notes for run in runs))),
        read_bytes=sum(run.read_bytes for run in runs),
        disk_needed=sum(run.disk_needed for run in runs),
        memory_needed=max(run.memory_needed for run in runs),
    )
