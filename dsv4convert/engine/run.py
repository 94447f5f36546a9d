"""Carries out a plan: segments to worker threads, progress and records to the caller, files to their names."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..containers.sources import any_mounted, keep_in
from ..errors import Dsv4Error, RunInterruptedError, SpaceError
from ..formats.backend import Codecs, default_codecs
from ..formats.base import Tally
from ..plan import Plan, Segment, sizes_of
from .column_sums import SharedSums
from .consume import Consumer, Room, room_needed
from .kernel_copy import KernelCopier
from .ledger import Ledger, TensorReport
from .mappings import Mappings
from .monitor import Monitor, Step
from .names import nearest_folder
from .operations import TILE_BYTES
from .outputs import DescriptorCache
from .ranges import RangeReader, SharedRanges
from .read_ahead import read_ahead
from .resources import outgrows_memory
from .schedule import Lane, Schedule
from .worker import Made, Worker
from .zeros import zero_tensors

if TYPE_CHECKING:
    from .cluster import ClusterMakers

# How often the main thread looks at progress, and how often finished work is made durable and recorded.
POLL_SECONDS = 0.05
RECORD_SECONDS = 5.0

# How long an interrupted run waits for the disk to take what is finished and not yet recorded.
GRACE_SECONDS = 0.5


class Task(NamedTuple):
    """A segment with its place in the plan: file, tensor and segment number, and the offset in the file."""

    file: int
    tensor: int
    segment: int
    offset: int


class Finished(NamedTuple):
    """A segment that has been written, with its xxh3-128 digest, what its codec counted, and ``Made.zeros``."""

    task: Task
    digest: bytes
    tally: Tally
    zeros: int = 0


class Recorder(Protocol):
    """Keeps what is finished, so that an interrupted run can go on (see ``journal``)."""

    def finished(self) -> Mapping[tuple[int, int, int], Finished]:
        """Return the segments that an earlier run finished, by (file, tensor, segment)."""
        ...

    def record(self, batch: list[Finished]) -> None:
        """Keep ``batch``; the caller has made its bytes durable."""
        ...


class RunOutputs(Protocol):
    """What a run wants of its output files (see ``outputs``)."""

    @property
    def paths(self) -> Sequence[Path]:
        """Return the names that they have until the end."""
        ...

    def descriptor(self, index: int) -> int:
        """Return an open file, to be written at any offset."""
        ...

    def is_shared(self, index: int) -> bool:
        """Return whether a file shares the bytes of one of the source."""
        ...

    def links_by_name(self) -> Mapping[str, str]:
        """Return how files were made that are files of the source."""
        ...

    def sync(self, indexes: set[int]) -> None:
        """Make what is written of some files durable."""
        ...

    def finish(self) -> None:
        """Give the files their final names."""
        ...


@dataclass(frozen=True)
class RunReport:
    """What a run did: bytes, seconds, and per tensor its checksum and counts.

    ``flagged`` are the tensors in which anything was counted, ``zero`` the source tensors whose every byte is zero,
    ``links`` how the files were made that are files of the source, by name.
    """

    tensors: Sequence[TensorReport]
    tally: Tally
    written_bytes: int
    seconds: float
    threads: int
    backend: str
    resumed_bytes: int = 0
    flagged: Sequence[TensorReport] = ()
    zero: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)


class _Worker(Protocol):
    """What a run wants of its workers: how many bytes each has made, in which file, and that each stops when told."""

    stopped: bool
    file: int | None

    @property
    def done_bytes(self) -> int: ...


@dataclass
class _Elsewhere:
    """The workers of other processes, as one."""

    stopped: bool = False
    done_bytes: int = 0
    file: int | None = None


@dataclass
class _Shared:
    """What the workers of one run share: ``copies``, ``mappings`` and ``sums`` unguarded, the rest under ``lock``."""

    tasks: Schedule[Task]
    lock: threading.Lock = field(default_factory=threading.Lock)
    batch: list[Finished] = field(default_factory=list)
    copies: dict[Segment, Made] = field(default_factory=dict)
    mappings: Mappings = field(default_factory=Mappings)
    sums: SharedSums = field(default_factory=SharedSums)
    ranges: SharedRanges | None = None
    room: Room | None = None
    drops: bool = False
    error: BaseException | None = None


def run_plan(
    plan: Plan,
    outputs: RunOutputs,
    *,
    threads: int,
    codecs: Codecs | None = None,
    tile_bytes: int = TILE_BYTES,
    watch: Callable[[Step], None] | None = None,
    recorder: Recorder | None = None,
    record_seconds: float = RECORD_SECONDS,
    before_finish: Callable[[RunReport], None] | None = None,
    file_done: Callable[[int, Path], None] | None = None,
    makers: ClusterMakers | None = None,
) -> RunReport:
    """Make all files of ``plan`` and give them their names.

    ``outputs`` have been created (or, with a ``recorder``, are those of the interrupted run). ``watch`` is told how far
    the run is, several times a second. ``before_finish`` sees the report while the files still have their temporary
    names; an error from it keeps them from getting their own. ``file_done`` is told each file that is whole, by number
    and the name that it has until ``before_finish`` is called, in no order. ``makers`` make the segments in other
    processes, in place of ``threads`` of this one.

    Raises:
        InputOutputError, SpaceError: the system refused a read or a write; names the file.
        RunInterruptedError: Ctrl-C.
        Dsv4Error: whatever a codec or ``before_finish`` raises; says the tensor.
        RuntimeError: a worker raised anything else; says the tensor.
    """
    started = time.monotonic()
    backend = codecs if codecs is not None else default_codecs()
    done = Ledger(plan)
    consumer = Consumer(plan)
    resumed = 0
    for entry in recorder.finished().values() if recorder is not None else ():
        done.add(*entry.task[:3], *entry[1:])
        segment = segment_of(plan, entry.task)
        resumed += segment.nbytes
        consumer.take([segment])
    whole = _WholeFiles(plan, outputs, done, file_done)
    files = [_tasks_left(plan, done, number) for number in range(len(plan.files))]
    if threads == 1 and makers is None and not any_mounted() and hasattr(os, "posix_fadvise"):
        files = [read_ahead(tasks, partial(segment_of, plan)) for tasks in files]
    shared = _Shared(Schedule(files if makers is None else ()))
    if any_mounted():
        keep_in(nearest_folder(plan.destination).resolve())
        shared.ranges = SharedRanges(plan.segments())
    shared.drops = outgrows_memory(plan)
    if plan.consumes and recorder is not None:
        shared.room = Room(room_needed(plan))
    workers: list[_Worker] = []
    if makers is None:
        worker_threads = [
            threading.Thread(target=_work, args=(shared, plan, outputs, backend, tile_bytes, workers), daemon=True)
            for _ in range(threads)
        ]
    else:
        threads = makers.count
        watcher = partial(_have_made, shared, plan, outputs, makers, files, workers)
        worker_threads = [threading.Thread(target=watcher, daemon=True)]

    def record(batch: list[Finished]) -> None:
        if recorder is not None:
            recorder.record(batch)
            before = consumer.freed
            consumer.take(segment_of(plan, entry.task) for entry in batch)
            if shared.room is not None:
                shared.room.give_back(len(batch), consumer.freed - before)

    def note(batch: list[Finished]) -> None:
        for entry in batch:
            done.add(*entry.task[:3], *entry[1:])
        whole.tell(batch)

    # What workers of other processes are at cannot be seen from here.
    monitor = Monitor(worker_threads, (plan.source, plan.destination)) if watch is not None and makers is None else None

    def tell() -> None:
        counts = tuple(worker.done_bytes for worker in workers)
        counts += (0,) * (len(worker_threads) - len(counts))  # those that have not begun
        done_bytes = resumed + sum(counts)
        if watch is not None:
            waiting = None if monitor is None else monitor.waiting()
            watch(Step(done_bytes, counts, _file_in_work(plan, workers), waiting))

    keeper = _Keeper(shared, workers, outputs, note, None if recorder is None else record, record_seconds)
    try:
        tell()  # rates are counted from here on
        for thread in (*worker_threads, keeper):
            thread.start()
        while any(thread.is_alive() for thread in worker_threads):
            for thread in worker_threads:
                thread.join(POLL_SECONDS / len(worker_threads))
            tell()
        tell()  # all of a run that was over before anybody looked
        keeper.finish()
        while keeper.is_alive():
            keeper.join(POLL_SECONDS)
        if shared.error is not None:
            raise shared.error
    except BaseException as error:
        _stop(shared, workers)
        for thread in worker_threads:
            if thread.ident is not None:
                thread.join()
        keeper.finish()
        keeper.give_up_after(GRACE_SECONDS)
        if isinstance(error, KeyboardInterrupt):
            raise RunInterruptedError("interrupted", where=plan.output_path()) from None
        raise
    if not done.is_complete:
        raise RuntimeError("the workers ended before their work did")
    seconds = time.monotonic() - started
    report = RunReport(
        done,
        done.total(),
        plan.nbytes,
        seconds,
        threads,
        backend.name,
        resumed,
        done.flagged(),
        zero_tensors(plan.source, done.zeros()),
        outputs.links_by_name(),
    )
    if before_finish is not None:
        before_finish(report)
    outputs.finish()
    return report


class _Keeper(threading.Thread):
    """Makes finished segments durable and records them, now and then and at the end.

    It is a thread of its own because a disk can take its time over a flush, and the main thread must
    answer to Ctrl-C meanwhile.
    """

    def __init__(
        self,
        shared: _Shared,
        workers: list[_Worker],
        outputs: RunOutputs,
        note: Callable[[list[Finished]], None],
        record: Callable[[list[Finished]], None] | None,
        seconds: float,
    ) -> None:
        super().__init__(daemon=True)
        self._shared, self._workers, self._outputs, self._note = shared, workers, outputs, note
        self._record = record
        self._seconds = seconds
        self._ending = threading.Event()
        self._writing = threading.Lock()
        self._given_up = False

    def run(self) -> None:
        """Flush every so many seconds until told to finish, then once more."""
        try:
            while not self._wait():
                self._flush()
            self._flush()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            _fail(self._shared, self._workers, error)

    def _wait(self) -> bool:
        """Wait until it is time to flush, or a worker waits for room; return whether the run is over."""
        room = self._shared.room
        if room is None:
            return self._ending.wait(self._seconds)
        room.wanted.wait(self._seconds)
        room.wanted.clear()
        return self._ending.is_set()

    def finish(self) -> None:
        """Ask for the last flush."""
        self._ending.set()
        if self._shared.room is not None:
            self._shared.room.wanted.set()

    def give_up_after(self, seconds: float) -> None:
        """Wait for the last flush; if the disk takes longer, leave what it holds unrecorded."""
        if self.ident is None:
            return
        self.join(seconds)
        with self._writing:
            self._given_up = True

    def _flush(self) -> None:
        with self._shared.lock:
            batch, self._shared.batch = self._shared.batch, []
        if self._record is not None and batch:
            self._outputs.sync({entry.task.file for entry in batch})
            with self._writing:
                if self._given_up:
                    return
                self._record(batch)
        self._note(batch)


class _WholeFiles:
    """Tells a function which files are whole, each once."""

    def __init__(self, plan: Plan, outputs: RunOutputs, done: Ledger, tell: Callable[[int, Path], None] | None) -> None:
        self._outputs = outputs
        self._tell = tell
        self._left = [
            sum(
                not done.holds(index, tensor, segment)
                for tensor, made in enumerate(file.tensors)
                for segment in range(len(made.segments))
            )
            for index, file in enumerate(plan.files if tell is not None else ())
        ]
        for index, left in enumerate(self._left):
            if not left:
                self._say(index)

    def tell(self, batch: list[Finished]) -> None:
        """Note segments that have been written."""
        for entry in batch if self._left else ():
            self._left[entry.task.file] -= 1
            if not self._left[entry.task.file]:
                self._say(entry.task.file)

    def _say(self, index: int) -> None:
        if self._tell is not None:
            self._tell(index, self._outputs.paths[index])


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had.

    Not ``ru_maxrss`` where it can be helped: that one survives exec, so a small program started by a
    large one would report the large one's size.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _work(
    shared: _Shared, plan: Plan, outputs: RunOutputs, codecs: Codecs, tile_bytes: int, workers: list[_Worker]
) -> None:
    try:
        with DescriptorCache() as descriptors, KernelCopier() as kernel, contextlib.ExitStack() as stack:
            ranges = None
            if shared.ranges is not None:
                ranges = stack.enter_context(RangeReader(shared.ranges, lambda: worker.stopped))
            worker = Worker(
                codecs,
                descriptors,
                kernel,
                shared.copies,
                shared.mappings,
                tile_bytes,
                ranges,
                sums=shared.sums,
                drops=shared.drops,
            )
            with shared.lock:
                workers.append(worker)
                worker.stopped = shared.error is not None
            lane: Lane[Task] | None = None
            finished: Finished | None = None
            while True:
                # Once for both: every time, a worker may have to wait for the others.
                with shared.lock:
                    if finished is not None:
                        shared.batch.append(finished)
                    found = None if worker.stopped else shared.tasks.next(lane)
                    if found is None:
                        return
                    lane, task = found
                    place = None if shared.room is None else shared.room.ask(segment_of(plan, task).nbytes)
                worker.file = task.file
                worker.share(lane.workers)
                if shared.room is not None and place is not None:
                    shared.room.take(place, lambda: worker.stopped)
                make = worker.look if outputs.is_shared(task.file) else worker.run
                try:
                    made = make(
                        segment_of(plan, task), outputs.descriptor(task.file), outputs.paths[task.file], task.offset
                    )
                except Exception as error:
                    raise with_tensor(error, plan.files[task.file].tensors[task.tensor].name) from error
                # A worker that was stopped may have left the segment half done.
                finished = None if worker.stopped else Finished(task, *made)
    except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
        _fail(shared, workers, error)


def _have_made(
    shared: _Shared,
    plan: Plan,
    outputs: RunOutputs,
    makers: ClusterMakers,
    files: Sequence[Iterator[Task]],
    workers: list[_Worker],
) -> None:
    elsewhere = _Elsewhere()

    def take(finished: Sequence[Finished]) -> None:
        with shared.lock:
            shared.batch.extend(finished)
        elsewhere.done_bytes += sum(segment_of(plan, entry.task).nbytes for entry in finished)
        elsewhere.file = finished[-1].task.file

    try:
        # Headers are on the disk before another machine writes into the same page.
        outputs.sync(set(range(len(plan.files))))
        with shared.lock:
            workers.append(elsewhere)
            elsewhere.stopped = shared.error is not None
        makers.make(files, take, lambda: elsewhere.stopped)
    except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
        _fail(shared, workers, error)


def _fail(shared: _Shared, workers: list[_Worker], error: BaseException) -> None:
    """Stop the run with ``error``, unless another was first."""
    with shared.lock:
        if shared.error is None:
            shared.error = error
    _stop(shared, workers)


def _stop(shared: _Shared, workers: list[_Worker]) -> None:
    with shared.lock:
        shared.tasks.stop()
        for worker in workers:
            worker.stopped = True


def _file_in_work(plan: Plan, workers: Sequence[_Worker]) -> str | None:
    """Return the name of the file that most workers are in, None before any has begun."""
    numbers = Counter(worker.file for worker in workers if worker.file is not None)
    return plan.files[numbers.most_common(1)[0][0]].name if numbers else None


def with_tensor(error: Exception, name: str) -> Exception:
    """Return the error with the tensor's name in it."""
    if isinstance(error, MemoryError):
        return SpaceError(f"not enough memory for tensor {name}", hint="use fewer --threads")
    if not isinstance(error, Dsv4Error):
        return RuntimeError(f"while making tensor {name}: {type(error).__name__}: {error}")
    return error.with_changes(what=f"{error.what} (while making tensor {name})")


def file_tasks(plan: Plan, file_number: int) -> Iterator[Task]:
    """Yield the segments of a file."""
    for tensor_number, tensor in enumerate(plan.files[file_number].tensors):
        offset = tensor.offset
        for number, nbytes in enumerate(sizes_of(tensor)):
            yield Task(file_number, tensor_number, number, offset)
            offset += nbytes


def _tasks_left(plan: Plan, done: Ledger, file_number: int) -> Iterator[Task]:
    tasks = file_tasks(plan, file_number)
    return (task for task in tasks if not done.holds(*task[:3])) if done.has_any else tasks


def segment_of(plan: Plan, task: Task) -> Segment:
    """Return the segment that a task makes."""
    return plan.files[task.file].tensors[task.tensor].segments[task.segment]
