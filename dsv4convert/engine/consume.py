"""Source files that a plan uses up: each is cut to its header once all that is read of it is durably in the output.

So a copy needs room for two of them only, and not for all at once. A file that was cut is too short for what
its header says, so that no program takes it for whole; only the run that cut it can go on with it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import FileFormatError, ResumeError
from ..plan import Plan, Segment
from .names import Identity, closing
from .outputs import open_file, os_errors

# How often a thread that waits for room looks whether the run is stopped.
POLL_SECONDS = 0.05


class Consumer:
    """Counts what is left to read of each file that a plan uses up, and cuts those of which nothing is.

    Only the files that stood under the names when the run began are ever cut.
    """

    def __init__(self, plan: Plan) -> None:
        self.freed = 0  # bytes of what was cut
        self._keep = dict(plan.consumes)
        self._known = {path: Identity.of(path) for path in self._keep}
        segments = plan.segments() if plan.consumes else ()
        self._left = Counter(path for segment in segments for path in self._files(segment))

    def _files(self, segment: Segment) -> set[Path]:
        return {operand.file for operand in segment.operands if operand.file in self._keep}

    def take(self, segments: Iterable[Segment]) -> None:
        """Note segments whose bytes and records are durable; cut the files that they were the last of.

        Raises:
            FileFormatError: another file has taken the name of one; it is left as it is.
            InputOutputError: the system refused.
        """
        for segment in segments if self._keep else ():
            for path in self._files(segment):
                self._left[path] -= 1
                if not self._left[path]:
                    self.freed += _cut(path, self._keep[path], self._known[path])


class Room:
    """Keeps what is written and not yet made up for by cuts within ``nbytes``, as the disk may have no room for more.

    Threads of the run wait with a segment until enough is durable and cut. Room is given in the order in which the
    segments were handed out, whichever thread comes first: files are cut in that order. Where all before a segment is
    durable and too little was cut, because tensors lie in another order than in their files, its thread need not wait.
    """

    def __init__(self, nbytes: int) -> None:
        self._room = nbytes  # with what has been cut
        self._asked = 0  # bytes of the segments that were handed out
        self._places = 0  # and how many they are
        self._durable = 0  # how many of them
        self._changed = threading.Condition()
        self.wanted = threading.Event()  # somebody waits: what is finished should become durable now

    def ask(self, nbytes: int) -> tuple[int, int]:
        """Return the place in the queue of a segment that is handed out, for ``take``; one thread may ask at a time."""
        self._asked += nbytes
        self._places += 1
        return self._asked, self._places

    def take(self, place: tuple[int, int], is_stopped: Callable[[], bool]) -> None:
        """Wait until the segment of a place may be written, or the run is stopped."""
        asked, number = place
        with self._changed:
            while asked > self._room and self._durable < number - 1 and not is_stopped():
                self.wanted.set()
                self._changed.wait(POLL_SECONDS)

    def give_back(self, segments: int, nbytes: int) -> None:
        """Note that ``segments`` became durable, and that ``nbytes`` of the source have been cut with them."""
        with self._changed:
            self._room += nbytes
            self._durable += segments
            self._changed.notify_all()


def room_needed(plan: Plan) -> int:
    """Return how many bytes of a plan that uses its source up may lie on the disk twice.

    They are those of two of its files: one that is copied, and one that waits until its copy is durable.
    """
    return 2 * max(read_bytes_by_file(plan).values(), default=0)


def _cut(path: Path, nbytes: int, known: Identity | None) -> int:
    """Cut a file that still is the one that is ``known``; return the bytes that it had too many."""
    with os_errors(path, "cut"), closing(open_file(path, os.O_WRONLY)) as descriptor:
        status = os.fstat(descriptor)
        if Identity.in_status(status) != known:
            raise FileFormatError(
                "changed during the conversion, and is not used up",
                where=path,
                hint="restore the file that was moved or replaced, and run again with --resume",
            )
        if status.st_size > nbytes:
            os.ftruncate(descriptor, nbytes)
        return max(0, status.st_size - nbytes)


def read_bytes_by_file(plan: Plan) -> dict[Path, int]:
    """Return how many bytes are read of each file that ``plan`` uses up."""
    keep = dict(plan.consumes)
    found: Counter[Path] = Counter()
    for segment in plan.segments() if plan.consumes else ():
        for operand in segment.operands:
            if operand.file in keep:
                found[operand.file] += segment.bytes_read(operand)
    return dict(found)


def is_cut(plan: Plan, path: Path) -> bool:
    """Return whether a file that ``plan`` uses up was cut, and so is used up."""
    keep = dict(plan.consumes).get(path)
    if keep is None:
        return False
    with os_errors(path, "read"):
        return path.stat().st_size <= keep


def check_whole(plan: Plan) -> None:
    """Check that a run can begin: nothing of the source was used up by an earlier one.

    Raises:
        ResumeError: it was.
    """
    for path, _ in plan.consumes:
        if is_cut(plan, path):
            raise ResumeError(
                "used up by an interrupted run: its tensors are in that run's output only",
                where=path,
                hint="pass --resume to continue that run; without its work, restore the file",
            )
