"""Looks at a run from outside: bytes by thread over time, the file in work, and what the threads wait for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread, current_thread
from typing import Any, NamedTuple

from ..containers.sources import any_mounted
from .names import kind_of_file_system

# Samples that a time line keeps: a long run has them further apart.
MAX_SAMPLES = 100
# How often threads are looked at, and over how long shares are taken.
LOOK_SECONDS, SHARE_SECONDS = 0.1, 1.0

PROCESSOR, DISK, NETWORK, OTHER = "processor", "disk", "network", "other"
# States of a thread in /proc, as proc(5) names them: running or ready to run, and waiting for a device. All else is
# waiting for another thread, for a connection, or for a program that serves a file system.
_RUNNING, _DEVICE = "R", "D"

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs",
        "smb3", "smbfs", "wekafs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs", "fuse.rclone",
        "fuse.s3fs", "fuse.sshfs",
    }
)  # fmt: skip


class Waiting(NamedTuple):
    """How the threads spent the last second, as shares of their time that add up to 1."""

    processor: float
    disk: float
    network: float
    other: float

    @property
    def most(self) -> str:
        """Return the name of the largest share."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


class Step(NamedTuple):
    """How far a run is: bytes done in all and by thread, the name of the file in work, and what the threads wait for.

    ``done`` counts what an interrupted run had done, ``threads`` only the bytes of this one. ``waiting`` is None where
    the system does not tell.
    """

    done: int
    threads: tuple[int, ...] = ()
    file: str | None = None
    waiting: Waiting | None = None


class StepListener(ABC):
    """Progress that wants to know of steps, and not of bytes alone."""

    @abstractmethod
    def __call__(self, done: int, total: int) -> None:
        """Hear how many bytes of so many are done."""

    @abstractmethod
    def step(self, step: Step, total: int) -> None:
        """Hear how far work on ``total`` bytes is."""

    def note(self, line: str) -> None:  # noqa: B027 - not every listener shows lines
        """Hear a line for people: on a wait that begins, or what would be quicker."""


class Timeline:
    """How many bytes each thread had written after so many seconds, in ``MAX_SAMPLES`` samples at most.

    Time is that since the first sample, with which a run begins: what came before, such as planning, is no part of it.
    Runs one after another, as of a model and its draft, are one time line.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._interval = self._seconds = 0.0
        self._samples: list[tuple[float, list[int]]] = []
        self._before: list[int] = []
        self._last: list[int] = []

    def add(self, threads: Sequence[int], now: float | None = None) -> None:
        """Keep the bytes by thread where a sample is due."""
        counts = list(threads)
        if sum(counts) < sum(self._last):  # another run has begun
            self._before, self._last = self._so_far(), []
        self._last = counts
        now = time.monotonic() if now is None else now
        self._started = now if self._started is None else self._started
        self._seconds = seconds = now - self._started
        if self._samples and seconds - self._samples[-1][0] < self._interval:
            return
        self._samples.append((seconds, self._so_far()))
        if len(self._samples) > MAX_SAMPLES:
            del self._samples[1::2]  # the first one stays
            self._interval = seconds / MAX_SAMPLES * 2

    def as_json(self) -> dict[str, Any]:
        """Return the time line as plain JSON values: for each thread a count of bytes for each time."""
        samples = list(self._samples)
        if self._last and samples[-1][1] != self._so_far():
            samples.append((self._seconds, self._so_far()))
        width = max((len(counts) for _, counts in samples), default=0)
        rows = [[*counts, *[0] * (width - len(counts))] for _, counts in samples]
        return {
            "seconds": [round(seconds, 3) for seconds, _ in samples],
            "threads": [list(counts) for counts in zip(*rows, strict=True)],
        }

    def _so_far(self) -> list[int]:
        """Return the bytes of each thread, those of earlier runs among them."""
        width = max(len(self._before), len(self._last))
        before, last = ([*counts, *[0] * (width - len(counts))] for counts in (self._before, self._last))
        return [a + b for a, b in zip(before, last, strict=True)]


class Monitor:
    """Tells what the threads of a run wait for.

    ``media`` are a path of the source and one of the output: a thread that waits for a device waits for the network
    where one of the two lies there. A thread that sleeps waits for the network where a source is read by address.
    """

    def __init__(self, threads: Sequence[Thread], media: Sequence[Path]) -> None:
        self._threads = threads
        self._looked = 0.0
        self._seen: list[tuple[float, Counter[str]]] = []
        is_network = any(kind_of_file_system(path) in NETWORK_FILE_SYSTEMS for path in media)
        self._device = NETWORK if is_network else DISK
        self._asleep = NETWORK if any_mounted() else OTHER

    def waiting(self) -> Waiting | None:
        """Look at the threads where it is time to, and return how they spent the last second; None if unknown."""
        now = time.monotonic()
        if self._threads and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._seen.append((now, Counter(filter(None, map(self._state, self._threads)))))
            self._seen = [entry for entry in self._seen if now - entry[0] <= SHARE_SECONDS]
        total: Counter[str] = Counter()
        for _, states in self._seen:
            total.update(states)
        number = sum(total.values())
        return Waiting(*(total[name] / number for name in Waiting._fields)) if number else None

    def _state(self, thread: Thread) -> str:
        """Return what a thread is at; "" for one that has ended, or where the system does not say."""
        if not thread.is_alive():
            return ""
        try:
            with open(f"/proc/self/task/{thread.native_id}/stat", encoding="ascii", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
        return PROCESSOR if state == _RUNNING else self._device if state == _DEVICE else self._asleep


class Watched:
    """Work that reads ``media``: tells ``watch`` how far it is, in which file, and what its threads wait for.

    Each of its threads calls ``enter`` once; where none does, nothing is told of waiting.
    """

    def __init__(self, watch: Callable[[Step], None] | None, media: Sequence[Path]) -> None:
        self._watch = watch
        self._threads: list[Thread] = []
        self._monitor = None if watch is None else Monitor(self._threads, media)
        self.tell(0)  # rates are counted from here on

    def enter(self) -> None:
        """Count the thread that calls among those of the work."""
        self._threads.append(current_thread())

    def tell(self, done: int, file: str | None = None) -> None:
        """Say that ``done`` bytes are done, and which file is in work."""
        if self._watch is not None and self._monitor is not None:
            self._watch(Step(done, (), file, self._monitor.waiting()))
