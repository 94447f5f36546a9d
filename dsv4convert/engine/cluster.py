"""Carrying out a plan on a Ray cluster: runs of segments are its tasks, and this process alone keeps the journal.

A task carries its piece of the plan with it (see ``cluster_worker``). Ray places the tasks and repeats those whose
worker or machine died; a process of its own (``cluster_bridge``) speaks with it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from ..containers.sources import mount_around
from ..errors import DeviceError, Dsv4Error, InputOutputError, UsageError, missing_package
from ..plan import Plan, Quantise, Segment
from .cluster_bridge import HERE, REACH_HINT, WORKERS, AnyPiece, Done, Nodes, Submit, address_here
from .cluster_worker import NewFile, Part, Piece, Work, library_digest, program_digest, revision_digest
from .fingerprint import mark_of
from .journal import Claim
from .run import Finished, RunOutputs, Task, segment_of
from .schedule import Lane, Schedule
from .worker import Made

EXPECTED = "ray, ray:N, ray:auto or ray://HOST:PORT"

# The work of a task is its bytes read and written, of a low-bit type so many times these, for its arithmetic.
LOW_BIT_WEIGHT = 16
# Each worker gets so many tasks, so that all end at about the same time; on many workers fewer, since the run takes a
# millisecond or two to give one out (``benchmarks/cluster_sim.py``). The work of a task is within these limits.
TASKS_PER_WORKER, MOST_TASKS = 16, 2**12
LEAST_WORK, MOST_WORK = 2**20, 2**29

POLL_SECONDS = 0.2
START_SECONDS, JOIN_SECONDS = 120.0, 30.0  # to start a cluster on this machine, and to join one that is there
SILENT_SECONDS = 45.0  # the bridge tells of the machines every few seconds, unless Ray holds it
END_SECONDS = 10.0

Message = Nodes | Done | Exception
T = TypeVar("T")

_BRIDGE = "import sys; sys.path[:] = {path!r}; from dsv4convert.engine.cluster_bridge import serve; serve({descriptor})"


@dataclass
class _Slot:
    """A processor of the cluster, and the file that it is in: it stays there, where it reads on in its sources."""

    node: str
    lane: Lane[Any] | None = None


@dataclass
class Cluster:
    """The workers of a Ray cluster, as ``--workers`` names them; use it as a context manager.

    The cluster is joined, or a local one started, by the first run that has work; ``note`` is told so before.

    Raises:
        UsageError: it is named wrongly.
        DeviceError: Ray is not installed.
    """

    workers: str
    note: Callable[[str], None] | None = None
    processors: dict[str, int] = field(default_factory=dict, init=False)
    _connection: Connection | None = field(default=None, init=False)
    _bridge: subprocess.Popen[bytes] | None = field(default=None, init=False)
    heard: float = field(default=0.0, init=False)
    numbers: Iterator[int] = field(default_factory=count, init=False)

    def __post_init__(self) -> None:
        if WORKERS.fullmatch(self.workers) is None:
            raise UsageError("--workers: unknown", expected=EXPECTED, got=self.workers)
        if importlib.util.find_spec("ray") is None:
            raise missing_package("--workers", "ray", "ray")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._bridge is not None:
            try:
                self._bridge.wait(END_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # the work has ended: Ctrl-C ends the wait alone
                self._bridge.kill()
                self._bridge.wait()
            self._bridge = None

    def tell(self, line: str) -> None:
        """Tell people something, if anybody listens."""
        if self.note is not None:
            self.note(line)

    def connect(self) -> None:
        """Join the cluster, or start one on this machine.

        Raises:
            DeviceError: it cannot be reached, or has no processor.
        """
        if self._connection is not None:
            return
        is_there = self.workers.startswith((HERE, "ray://"))
        seconds = JOIN_SECONDS if is_there else START_SECONDS
        where = f"{self.workers} ({address_here()})" if self.workers == HERE and address_here() else self.workers
        self.tell(f"{where}: {'joining' if is_there else 'starting'} the Ray cluster; waits {seconds:.0f} s at most")
        ours, theirs = socket.socketpair()
        with theirs:
            code = _BRIDGE.format(path=sys.path, descriptor=theirs.fileno())
            # A session of its own: Ctrl-C is for the run, which then ends the bridge. What Ray says is in its logs too.
            self._bridge = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._connection.send(self.workers)
        if not self._connection.poll(seconds):
            self._bridge.kill()  # it waits for Ray, and would for minutes
            raise DeviceError(
                "the Ray cluster does not answer", where=where, got=f"{seconds:.0f} s of silence", hint=REACH_HINT
            )
        self.receive(0.0)
        if not sum(self.processors.values()):
            raise DeviceError(
                "the Ray cluster has no processor", where=self.workers, hint="start machines with --num-cpus"
            )

    def send(self, task: Submit) -> None:
        """Have a task carried out.

        Raises:
            InputOutputError: the cluster was lost.
        """
        assert self._connection is not None
        try:
            self._connection.send(task)
        except OSError:
            raise self._lost() from None

    def receive(self, seconds: float) -> Done | None:
        """Return what became of a task, None if nothing is known after so many seconds.

        Raises:
            InputOutputError: the cluster was lost.
            DeviceError: it could not be reached.
        """
        assert self._connection is not None
        try:
            message: Message | None = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Nodes):
            self.processors = dict(message.processors)
            self.heard = time.monotonic()
            return None
        return message

    def carry_out(
        self,
        files: Iterable[Iterator[T]],
        piece: Callable[[T], AnyPiece],
        take: Callable[[T, Any], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Have the tasks of each file carried out, as many at once as there are processors, until ``stopped``.

        Raises:
            InputOutputError: the cluster was lost, or a task's worker died again and again.
            Exception: of a task.
        """
        schedule = Schedule(files)
        known: dict[str, int] = {}
        idle: list[_Slot] = []
        running: dict[int, tuple[_Slot, T]] = {}
        is_given_out = False
        while not stopped():
            there = self.processors
            if there is not known:
                idle += [
                    _Slot(node) for node, processors in there.items() if node not in known for _ in range(processors)
                ]
                known = there
            while idle:
                slot = idle.pop()
                if slot.node not in there:
                    continue
                found = schedule.next(slot.lane)
                if found is None:
                    is_given_out = True
                    break
                slot.lane, task = found
                number = next(self.numbers)
                running[number] = slot, task
                self.send(Submit(number, slot.node, piece(task)))
            if is_given_out and not running:
                return
            done = self.receive(POLL_SECONDS)
            if done is None:
                self.check_heard()
                continue
            if done.number not in running:  # of an earlier run that failed
                continue
            if isinstance(done.made, Exception):
                raise done.made
            slot, task = running.pop(done.number)
            take(task, done.made)
            idle.append(slot)

    def _lost(self) -> InputOutputError:
        return InputOutputError("the Ray cluster was lost", where=self.workers, hint="Ray's logs say why")

    def check_heard(self) -> None:
        """Check that the bridge has told of the cluster lately.

        Raises:
            InputOutputError: it has not.
        """
        silence = time.monotonic() - self.heard
        if silence > SILENT_SECONDS:
            raise InputOutputError("the Ray cluster was lost", where=self.workers, got=f"{silence:.0f} s of silence")


class ClusterMakers:
    """Makes a plan's segments by tasks of a cluster that was joined, in place of a run's threads.

    ``claim`` gives the run's hold on its journal.
    """

    def __init__(self, cluster: Cluster, plan: Plan, outputs: RunOutputs, claim: Callable[[], Claim]) -> None:
        self._cluster, self._plan, self._outputs, self._claim = cluster, plan, outputs, claim
        self._paths: dict[Path, Path] = {}
        self._given: dict[str, Path] = {}
        self._marks: dict[Path, Sequence[int | str]] = {}
        work, libraries = _size_up(plan)
        self._libraries = {library: library_digest(library) for library in sorted(libraries)}
        self._work = work_of_a_task(work, self.count)

    @property
    def count(self) -> int:
        """Return the number of the cluster's processors."""
        return max(1, sum(self._cluster.processors.values()))

    def make(
        self,
        files: Sequence[Iterator[Task]],
        take: Callable[[Sequence[Finished]], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Have the segments of each file made, as many tasks at once as there are processors, until ``stopped``.

        ``take`` gets segments that are finished and durable.

        Raises:
            InputOutputError: the cluster was lost, or a task's worker died again and again.
            Dsv4Error: as a worker's; says the tensor.
        """

        def take_all(tasks: Sequence[Task], made: Any) -> None:
            take([Finished(task, *one) for task, one in zip(tasks, self._made(tasks, made), strict=True)])

        try:
            self._cluster.carry_out(map(self._runs, files), self._piece, take_all, stopped)
        except Dsv4Error as error:
            raise self._as_given(error) from None

    def _runs(self, tasks: Iterator[Task]) -> Iterator[list[Task]]:
        """Yield the segments of a file that make a task."""
        return cut(tasks, lambda task: work_of(segment_of(self._plan, task)), self._work)

    def _as_given(self, error: Dsv4Error) -> Dsv4Error:
        """Return a worker's error with its path as it was given to this run."""
        error.where = self._given.get(str(error.where), error.where)
        return error.with_changes()

    def _piece(self, tasks: Sequence[Task]) -> Piece | NewFile:
        file = tasks[0].file
        status = os.fstat(self._outputs.descriptor(file))
        return Piece(
            work=self.work(tasks),
            claim=self._claim_anywhere(),
            path=self._absolute(self._outputs.paths[file]),
            inode=status.st_ino,
            nbytes=status.st_size,
            is_shared=self._outputs.is_shared(file),
        )

    def _made(self, tasks: Sequence[Task], made: Any) -> Sequence[Made]:
        """Return what was made of each task's segment."""
        return made  # type: ignore[no-any-return] # what `make_piece` returned in a worker

    def parts(self, tasks: Sequence[Task]) -> list[Part]:
        """Return segments of one file as workers know them."""
        return [
            Part(
                self._found_anywhere(segment_of(self._plan, task)),
                self._plan.files[task.file].tensors[task.tensor].name,
                task.offset,
            )
            for task in tasks
        ]

    def work(self, tasks: Sequence[Task]) -> Work:
        """Return the making of segments of one file as a task."""
        parts = self.parts(tasks)
        read = {operand.file for part in parts for operand in part.segment.operands}
        around = {path: mount_around(path) for path in read}
        mounts = {mount.path: (mount.address, revision_digest(mount)) for mount in around.values() if mount is not None}
        used = {part.segment.operation.library for part in parts if isinstance(part.segment.operation, Quantise)}
        return Work(
            program=program_digest(),
            mounts=mounts,
            sources={path: self._marks[path] for path in read if around[path] is None},
            libraries={library: self._libraries[library] for library in used},
            parts=parts,
        )

    def _claim_anywhere(self) -> Claim:
        claim = self._claim()
        return claim._replace(path=self._absolute(claim.path))

    def _found_anywhere(self, segment: Segment) -> Segment:
        """Return a segment whose sources have absolute paths."""
        operands = [operand._replace(file=self._source(operand.file)) for operand in segment.operands]
        return segment._replace(operands=tuple(operands))

    def _source(self, path: Path) -> Path:
        absolute = self._absolute(path)
        if absolute not in self._marks:
            self._marks[absolute] = mark_of(path)
        return absolute

    def _absolute(self, path: Path) -> Path:
        if path not in self._paths:
            self._paths[path] = Path(os.path.abspath(path))
            self._given[str(self._paths[path])] = path
        return self._paths[path]


def bytes_read(segment: Segment) -> int:
    """Return the bytes that a segment reads."""
    return sum(map(segment.bytes_read, segment.operands))


def work_of(segment: Segment) -> int:
    """Return the work of a segment in bytes read and written."""
    weight = LOW_BIT_WEIGHT if isinstance(segment.operation, Quantise) else 1
    return (bytes_read(segment) + segment.nbytes) * weight


def work_of_a_task(work: int, workers: int) -> int:
    """Return how much of the whole work makes a task."""
    return min(MOST_WORK, max(LEAST_WORK, work // min(TASKS_PER_WORKER * workers, MOST_TASKS)))


def cut(segments: Iterable[T], work_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield segments of a file together, as many as make a task."""
    run: list[T] = []
    work = 0
    for segment in segments:
        run.append(segment)
        work += work_of(segment)
        if work >= most:
            yield run
            run, work = [], 0
    if run:
        yield run


def _size_up(plan: Plan) -> tuple[int, set[str]]:
    """Return the work of all segments, and the libraries that some of them need."""
    work, libraries = 0, set()
    for segment in plan.segments():
        work += work_of(segment)
        if isinstance(segment.operation, Quantise):
            libraries.add(segment.operation.library)
    return work, libraries
