"""Reads every byte of a checkpoint once: values that are not finite, tensors and experts that are all zero.

Bytes are looked at in pieces that stay in the cache, with as few passes as tell anything: the largest of a piece's
magnitudes says whether one of them is NaN or infinite, and only then are they counted.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.folder import BY_INDEX, Checkpoint, open_folder
from ..checkpoint.meaning import (
    ALL_ZERO,
    NOT_FINITE,
    Finding,
    config_notes,
    counted,
    file_findings,
    refuse,
)
from ..checkpoint.weights import Weight
from ..containers.safetensors import Stored
from ..errors import InputMissingError, InputOutputError
from ..formats.not_finite import count_not_finite
from ..model.config import Version
from ..model.tensors import scale_name

PIECE_BYTES = 2**20

# Tensors that a thread takes at a time, and how many such tasks wait.
TASK_BYTES = 16 * 2**20
TASKS_AHEAD = 4

EXPERT = re.compile(r"(.*\.experts\.\d+)\.w[123]\.weight")
MATRICES_OF_AN_EXPERT = 3


@dataclass
class CheckReport:
    """What a whole checkpoint was found to hold; ``findings`` is empty where nothing is suspicious."""

    path: str
    files: int
    tensors: int
    bytes_read: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Return whether nothing is suspicious."""
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values (schemas/check.schema.json)."""
        values = asdict(self)
        values["findings"] = [{"what": finding.what, "names": list(finding.names)} for finding in self.findings]
        return {"verdict": "ok" if self.ok else "suspicious", **values}


class Seen(NamedTuple):
    """What was seen of a part of a tensor."""

    name: str
    nbytes: int
    not_finite: int
    is_zero: bool


@dataclass
class Census:
    """A check that has read headers and tables, and has the rest still to read."""

    checkpoint: Checkpoint
    report: CheckReport
    strict: bool
    started: float

    @property
    def nbytes(self) -> int:
        """Return how many bytes are to be read."""
        return self.checkpoint.nbytes

    def run(self, threads: int = 1, progress: Callable[[int], None] | None = None) -> CheckReport:
        """Read every tensor; ``progress`` is told how many bytes have been read.

        Raises:
            InputOutputError: a file cannot be read.
            InventoryError: ``strict``, and something is suspicious.
        """
        report = self.report
        not_finite: dict[str, int] = {}
        zero: dict[str, bool] = {}
        for seen in _look(_tasks(self.checkpoint.weights.values()), threads):
            report.bytes_read += seen.nbytes
            if seen.not_finite:
                not_finite[seen.name] = not_finite.get(seen.name, 0) + seen.not_finite
            if zero.get(seen.name, True) and seen.nbytes:
                zero[seen.name] = seen.is_zero
            if progress is not None:
                progress(report.bytes_read)
        if not_finite:
            names = tuple(f"{name} ({count:,})" for name, count in not_finite.items())
            report.findings.append(Finding(NOT_FINITE.format(count=counted(len(names), "tensor")), names))
        report.findings += _zero_findings([name for name, is_zero in zero.items() if is_zero])
        report.seconds = time.monotonic() - self.started
        if self.strict and report.findings:
            refuse(report.findings, report.path)
        return report


def prepare_check(folder: Path, *, index: str = BY_INDEX, strict: bool = False) -> Census:
    """Open a checkpoint folder and read its tables; what is left is to read all else.

    Raises:
        Dsv4Error: the folder is no checkpoint, or a table is not one that a model can have.
    """
    started = time.monotonic()
    found = open_folder(folder, versions=tuple(Version), index=index)
    weights = found.weights.values()
    report = CheckReport(str(folder), len(found.files), found.n_tensors)
    report.notes += [*found.notes, *config_notes(found.config, weights, found.draft)]
    report.findings += file_findings(found.config, weights, found.files)
    return Census(found, report, strict, started)


def _zero_findings(names: list[str]) -> Iterator[Finding]:
    """Yield the tensors that are all zero, experts as such where all of their matrices are."""
    matrices: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.fullmatch(name)
        if match is not None:
            matrices.setdefault(match[1], []).append(name)
    experts = [expert for expert, found in matrices.items() if len(found) == MATRICES_OF_AN_EXPERT]
    whole = {name for expert in experts for name in matrices[expert]}
    others = tuple(name for name in names if name not in whole)
    if experts:
        yield Finding(ALL_ZERO.format(count=counted(len(experts), "expert")), tuple(experts))
    if others:
        yield Finding(ALL_ZERO.format(count=counted(len(others), "tensor")), others)


Task = list[tuple[str, Stored]]


def _tasks(weights: Iterable[Weight]) -> Iterator[Task]:
    """Yield runs of tensors, or of pieces of a large one, in the order in which they lie in the files."""
    places = [(w.name, w.stored) for w in weights] + [
        (scale_name(w.name), w.scale) for w in weights if w.scale is not None
    ]
    places.sort(key=lambda place: (place[1].file, place[1].offset))
    task: Task = []
    size = 0
    for name, stored in places:
        for begin in range(0, max(1, stored.nbytes), TASK_BYTES):
            part = stored._replace(offset=stored.offset + begin, nbytes=min(TASK_BYTES, stored.nbytes - begin))
            task.append((name, part))
            size += part.nbytes
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _look(tasks: Iterator[Task], threads: int) -> Iterator[Seen]:
    """Yield what is seen of every part of every task; a few tasks wait at a time, whatever there is in all."""
    buffers = local()
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(_look_at, task, buffers) for task in islice(tasks, threads + TASKS_AHEAD)]
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(_look_at, task, buffers) for task in islice(tasks, 1)]
            yield from done


def _look_at(task: Task, buffers: local) -> list[Seen]:
    """Read the parts of a task, piece by piece, into buffers that each thread has for itself."""
    if not hasattr(buffers, "piece"):
        buffers.piece, buffers.scratch = np.empty(PIECE_BYTES, np.uint8), np.empty(PIECE_BYTES, np.uint8)
    seen: list[Seen] = []
    path: Path | None = None
    descriptor = -1
    try:
        for name, stored in task:
            if stored.file != path:
                if descriptor >= 0:
                    os.close(descriptor)
                path, descriptor = stored.file, os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
            bad, is_zero = 0, True
            for begin in range(0, stored.nbytes, PIECE_BYTES):
                piece = buffers.piece[: min(PIECE_BYTES, stored.nbytes - begin)]
                _fill(descriptor, piece, stored.offset + begin, stored.file)
                is_zero = is_zero and not piece[:64].any() and not piece.any()
                bad += count_not_finite(stored.dtype, piece, buffers.scratch)
            seen.append(Seen(name, stored.nbytes, bad, is_zero))
    except OSError as error:
        raise InputOutputError(f"cannot be read ({error.strerror})", where=path) from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return seen


def _fill(descriptor: int, piece: NDArray[np.uint8], offset: int, path: Path) -> None:
    view = piece.data
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise InputMissingError("became shorter while it was read", where=path)
        view, offset = view[count:], offset + count
