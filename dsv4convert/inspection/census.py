"""Reads every byte of a checkpoint once: values that are not finite, tensors and experts that are all zero.

Bytes are looked at in pieces that stay in the cache, with as few passes as tell anything: one says whether any of a
piece's elements is NaN or infinite, and only then are they counted.
"""

from __future__ import annotations

import os
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

from ..checkpoint.engram import token_map_notes
from ..checkpoint.folder import BY_INDEX, Checkpoint, open_folder
from ..checkpoint.layouts import companion_notes
from ..checkpoint.meaning import (
    NOT_FINITE,
    Finding,
    config_notes,
    file_findings,
    refuse,
    zero_findings,
)
from ..checkpoint.weights import Weight
from ..containers.presence import is_file
from ..containers.safetensors import Stored
from ..containers.sources import SequentialReader, at, shown
from ..containers.untrusted import fill, shrank
from ..containers.wide_scales import read_wide
from ..engine.kernel_copy import REFUSED
from ..engine.monitor import Step, Watched
from ..errors import UnsupportedError, counted, not_read
from ..formats.backend import Codecs, default_codecs
from ..formats.base import Scratch
from ..formats.not_finite import MAGNITUDES
from ..model.tensors import scale_name

PIECE_BYTES = 2**18

# A tensor is not all zero if it is not here, as a rule.
FIRST_BYTES = 4096

# Tensors that a thread takes at a time, and how many such tasks wait.
TASK_BYTES = 16 * 2**20
TASKS_AHEAD = 4


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
    file: str
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

    def run(self, threads: int = 1, watch: Callable[[Step], None] | None = None) -> CheckReport:
        """Read every tensor; ``watch`` is told how many bytes have been read, and in which file.

        Raises:
            InputOutputError: a file cannot be read.
            InventoryError: ``strict``, and something is suspicious.
        """
        report = self.report
        not_finite: dict[str, int] = {}
        zero: dict[str, bool] = {}
        watched = Watched(watch, (self.checkpoint.folder,))
        for seen in _look(_tasks(self.checkpoint.weights.values()), threads, watched.enter):
            report.bytes_read += seen.nbytes
            if seen.not_finite:
                not_finite[seen.name] = not_finite.get(seen.name, 0) + seen.not_finite
            if zero.get(seen.name, True) and seen.nbytes:
                zero[seen.name] = seen.is_zero
            watched.tell(report.bytes_read, seen.file)
        if not_finite:
            names = tuple(f"{name} ({count:,})" for name, count in not_finite.items())
            report.findings.append(Finding(NOT_FINITE.format(count=counted(len(names), "tensor")), names))
        report.findings += zero_findings([name for name, is_zero in zero.items() if is_zero])
        report.seconds = time.monotonic() - self.started
        if self.strict and report.findings:
            refuse(report.findings, report.path)
        return report


def prepare_check(folder: Path, *, index: str = BY_INDEX, strict: bool = False) -> Census:
    """Open a checkpoint folder and read its tables; what is left is to read all else.

    Raises:
        Dsv4Error: the folder is no checkpoint, or a table is not one that a model can have.
    """
    if folder.suffix == ".gguf" and is_file(folder):
        raise UnsupportedError(
            "check reads no GGUF files",
            where=folder,
            hint="pass the folder of the safetensors checkpoint; inspect, forward and verify read GGUF files",
        )
    started = time.monotonic()
    found = open_folder(folder, index=index)
    weights = found.weights.values()
    report = CheckReport(shown(folder), len(found.files), found.n_tensors)
    beside = (*companion_notes(folder), *token_map_notes(folder, found.config))
    report.notes += [*found.notes, *beside, *config_notes(found.config, weights, found.draft, found.n_draft)]
    report.findings += file_findings(found.config, weights, found.files)
    return Census(found, report, strict, started)


Task = list[tuple[str, Stored]]


def _tasks(weights: Iterable[Weight]) -> Iterator[Task]:
    """Yield runs of tensors, or of pieces of a large one, in the order in which they lie in the files.

    The tensors of a run follow each other in one file, with no more than ``PIECE_BYTES`` of others between two of them.
    """
    places = [(w.name, w.stored) for w in weights] + [
        (scale_name(w.name), w.scale) for w in weights if w.scale is not None
    ]
    places.sort(key=lambda place: (place[1].file, place[1].offset))
    task: Task = []
    size = 0
    for name, stored in places:
        for begin in range(0, max(1, stored.nbytes), TASK_BYTES):
            part = stored._replace(offset=stored.offset + begin, nbytes=min(TASK_BYTES, stored.nbytes - begin))
            if task and (size >= TASK_BYTES or not _follows(part, task[-1][1])):
                yield task
                task, size = [], 0
            task.append((name, part))
            size += part.nbytes
    if task:
        yield task


def _follows(part: Stored, last: Stored) -> bool:
    return part.file == last.file and 0 <= part.offset - _end(last) <= PIECE_BYTES


def _end(stored: Stored) -> int:
    return stored.offset + stored.nbytes


def _look(tasks: Iterator[Task], threads: int, enter: Callable[[], None]) -> Iterator[Seen]:
    """Yield what is seen of every part of every task; a few tasks wait at a time, whatever there is in all.

    Each of the threads calls ``enter`` first.
    """
    codecs = default_codecs()
    readers = local()

    def look(task: Task) -> list[Seen]:
        if not hasattr(readers, "own"):
            readers.own = _Reader(codecs)
        reader: _Reader = readers.own
        return reader.look_at(task)

    with ThreadPoolExecutor(threads, initializer=enter) as pool:
        waiting = [pool.submit(look, task) for task in islice(tasks, threads + TASKS_AHEAD)]
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(look, task) for task in islice(tasks, 1)]
            yield from done


class _Reader:
    """Reads parts of tensors, piece by piece, in buffers that one thread has for itself.

    Bytes in which nothing is looked for, because any of them is a sound value, are read by the kernel alone: sent
    to /dev/null, which costs a third of a copy to this process and finds unreadable places just the same.
    """

    def __init__(self, codecs: Codecs) -> None:
        self._count = codecs.count_not_finite
        self._piece, self._arena = np.empty(PIECE_BYTES, np.uint8), Scratch()
        self._path: Path | None = None
        self._remote: SequentialReader | None = None
        self._descriptor = -1
        self._null = _open_null()

    def __del__(self) -> None:
        for descriptor in (self._descriptor, self._null):
            if descriptor >= 0:
                os.close(descriptor)

    def look_at(self, task: Task) -> list[Seen]:
        """Return what is seen of each part of a task; a remote file's bytes are asked for together, and read ahead.

        Raises:
            InputMissingError, InputOutputError: a file ended early, or cannot be read.
            InventoryError: a scale that must be a power of two is none.
        """
        file, begin, end = task[0][1].file, task[0][1].offset, _end(task[-1][1])
        remote = at(file)
        if remote is None:
            return [self._look(name, stored) for name, stored in task]
        seen = []
        self._remote = SequentialReader(remote, begin, end)
        try:
            for name, stored in task:
                self._fill(self._piece[: stored.offset - begin], file, begin)  # of tensors that nothing uses
                seen.append(self._look(name, stored))
                begin = _end(stored)
        finally:
            self._remote.close()
            self._remote = None
        return seen

    def _look(self, name: str, stored: Stored) -> Seen:
        bad, is_zero, done = 0, True, 0
        # Every byte of a remote file comes to this process anyway.
        is_looked_at = self._remote is not None or stored.scale_form is not None or stored.dtype in MAGNITUDES
        try:
            if self._remote is None:
                self._open(stored.file)
            while done < stored.nbytes:
                if not is_looked_at and not is_zero:
                    self._pass(stored.file, stored.offset + done, stored.nbytes - done)
                    break
                size = PIECE_BYTES if is_looked_at or done else FIRST_BYTES
                piece = self._piece[: min(size, stored.nbytes - done)]
                self._fill(piece, stored.file, stored.offset + done)
                is_zero = is_zero and not piece[:FIRST_BYTES].any() and not piece.any()
                bad += self._not_finite(piece, stored, stored.offset + done)
                done += len(piece)
        except OSError as error:
            raise not_read(stored.file, error) from None
        return Seen(name, stored.file.name, stored.nbytes, bad, is_zero)

    def _not_finite(self, piece: NDArray[np.uint8], stored: Stored, offset: int) -> int:
        if stored.scale_form is not None:
            read = read_wide(piece[None], stored.scale_form, stored.file, offset, self._arena)
            piece = read.view(np.uint8).reshape(-1)
        return self._count(stored.dtype, piece, self._arena.array("magnitudes", piece.shape, np.uint8))

    def _open(self, path: Path) -> None:
        if path != self._path:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._path = path

    def _fill(self, piece: NDArray[np.uint8], path: Path, offset: int) -> None:
        if self._remote is not None:
            self._remote.read_into(offset, piece.data)
        else:
            fill(piece.data, self._descriptor, offset, path)

    def _pass(self, path: Path, offset: int, nbytes: int) -> None:
        """Read bytes without looking at them."""
        while nbytes and self._null >= 0:
            try:
                count = os.sendfile(self._null, self._descriptor, offset, nbytes)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                os.close(self._null)
                self._null = -1
                break
            if count == 0:
                raise shrank(path)
            offset, nbytes = offset + count, nbytes - count
        for begin in range(0, nbytes, PIECE_BYTES):
            self._fill(self._piece[: min(PIECE_BYTES, nbytes - begin)], path, offset + begin)


def _open_null() -> int:
    """Return a descriptor of /dev/null for ``os.sendfile``, -1 where there is none."""
    try:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) if hasattr(os, "sendfile") else -1
    except OSError:
        return -1
