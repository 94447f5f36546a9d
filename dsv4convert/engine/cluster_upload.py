"""Carrying out a plan on a cluster whose workers send its files to an object store themselves.

A file is a task (see ``cluster_worker``), or a part of one where there are few. Nothing of the output lies on this
machine but the journal, which says what has arrived: segments with their digests, and each file or part with its size
and SHA-256. Files that a store shows last, and those that are a header alone, are made here and sent at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..containers.destinations import Sender, Sent, SentPart
from ..errors import counted
from ..formats.backend import default_codecs
from ..plan import Plan
from .cluster import Cluster, ClusterMakers
from .cluster_parts import FilePart, FilesInParts
from .cluster_worker import FinishedFile, MadeFile, NewFile, fill_file
from .conversion import Summary, begin_upload, interrupted, summarize, work_is_kept
from .fingerprint import check_same, check_unchanged, fingerprint_of
from .journal import Journal, Key, journal_path
from .monitor import Step
from .outputs import os_errors
from .run import Finished, RunReport, Task, file_tasks, run_plan
from .upload import Uploading, is_made_here
from .worker import Made


class _NoOutputs:
    """The output files of a run that has none on this machine."""

    paths: Sequence[Path] = ()

    def descriptor(self, index: int) -> int:
        """Raise: only threads of a run ask, and where other processes make the segments it has none."""
        raise NotImplementedError

    def is_shared(self, index: int) -> bool:
        """Return whether a file shares the bytes of one of the source."""
        return False

    def links_by_name(self) -> Mapping[str, str]:
        """Return how files were made that are files of the source."""
        return {}

    def sync(self, indexes: set[int]) -> None:
        """Do nothing: what a store has confirmed is durable."""

    def finish(self) -> None:
        """Do nothing: ``Uploading.finish`` does it all."""


class _FileMakers(ClusterMakers):
    """Makes and sends files; ``sent`` are those that have arrived, ``here`` those made in ``folder``.

    Those that are not begun yet are sent in ``parts`` where ``begins_parts``.
    """

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        journal: Journal,
        sender: Sender,
        folder: Path,
        sent: dict[int, Sent],
        parts: FilesInParts | None,
        *,
        begins_parts: bool,
    ) -> None:
        super().__init__(cluster, plan, _NoOutputs(), journal.claim)
        self._sender, self._folder = sender, folder
        self._in_parts, self._begins_parts = parts, begins_parts
        self.sent = sent
        self.here: dict[str, Path] = {}

    def make(
        self,
        files: Sequence[Iterator[Task]],
        take: Callable[[Sequence[Finished]], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Make files here or in workers; see ``ClusterMakers.make``."""
        elsewhere = []
        for index, (file, tasks) in enumerate(zip(self._plan.files, files, strict=True)):
            if not is_made_here(file):
                if self._in_parts is not None and self._begins_parts and index not in self.sent:
                    self._in_parts.begin(index)
                elsewhere.append(tasks)
                continue
            self.here[file.name] = path = self._folder / str(index)
            everything = list(file_tasks(self._plan, index))
            with os_errors(path, "written"), path.open("xb", buffering=0) as output:
                made = fill_file(output.fileno(), path, file.header, file.nbytes, self.parts(everything))
            if made:
                take([Finished(task, *one) for task, one in zip(everything, made, strict=True)])
        super().make(elsewhere, take, stopped)

    def _runs(self, tasks: Iterator[Task]) -> Iterator[list[Task]]:
        for _, run in itertools.groupby(tasks, self._number):
            yield list(run)

    def _number(self, task: Task) -> int | None:
        return None if self._in_parts is None else self._in_parts.number(task[:3])

    def _part(self, task: Task) -> FilePart:
        """Return the part that a segment is in; of a file that is sent as a whole, all of it."""
        number = self._number(task)
        if self._in_parts is None or number is None:
            return FilePart(0, self._plan.files[task.file].nbytes, list(file_tasks(self._plan, task.file)))
        return self._in_parts.part(task.file, number)

    def _piece(self, tasks: Sequence[Task]) -> NewFile:
        index, number, part = tasks[0].file, self._number(tasks[0]), self._part(tasks[0])
        file = self._plan.files[index]
        return NewFile(
            work=self.work([task._replace(offset=task.offset - part.begin) for task in part.tasks]),
            name=file.name,
            header=b"" if part.begin else file.header,
            nbytes=part.end - part.begin,
            sender=self._sender,
            part=None if self._in_parts is None or number is None else self._in_parts.upload(index, number),
        )

    def _made(self, tasks: Sequence[Task], made: Any) -> Sequence[Made]:
        """Return what was made of each task's segment: the others were recorded when a run was killed meanwhile."""
        assert isinstance(made, MadeFile)
        file, number = tasks[0].file, self._number(tasks[0])
        by_task = dict(zip(self._part(tasks[0]).tasks, made.made, strict=True))
        if isinstance(made.sent, SentPart):
            assert self._in_parts is not None
            assert number is not None
            self._in_parts.arrived[file, number] = made.sent
        else:
            self.sent[file] = made.sent
        return [by_task[task] for task in tasks]


class _SentFiles:
    """The journal of files and parts that workers have sent: of others nothing is recorded or kept.

    A batch has all segments of a file or part that arrived.
    """

    def __init__(self, journal: Journal, sent: dict[int, Sent], parts: FilesInParts | None) -> None:
        self._journal, self._sent, self._in_parts = journal, sent, parts

    def _has(self, key: Key) -> bool:
        return key[0] in self._sent or (self._in_parts is not None and self._in_parts.holds(key))

    def finished(self) -> Mapping[Key, Finished]:
        """Return the segments of files and parts that are in the store."""
        return {key: entry for key, entry in self._journal.finished().items() if self._has(key)}

    def record(self, batch: list[Finished]) -> None:
        """Keep the segments of what has arrived, and have the store make files of parts that are all there."""
        files = {entry.task.file for entry in batch} & self._sent.keys()
        self._journal.note_sent({file: self._sent[file] for file in sorted(files)})
        if self._in_parts is not None:
            self._journal.note_parts(self._in_parts.parts_of(entry.task[:3] for entry in batch))
        self._journal.record([entry for entry in batch if self._has(entry.task[:3])])
        self.finish_files()

    def finish_files(self) -> None:
        """Have the store make files of parts that are all there."""
        whole = {} if self._in_parts is None else self._in_parts.finish()
        self._sent.update(whole)
        self._journal.note_sent(whole)


def send_files(cluster: Cluster, sender: Sender, files: Mapping[str, tuple[Path, int]]) -> dict[str, Sent]:
    """Have workers send finished files of the shared file system, whose paths and sizes are given by name.

    Raises:
        Dsv4Error: see ``Cluster.carry_out`` and ``cluster_worker.send_file``.
    """
    sent: dict[str, Sent] = {}
    cluster.connect()
    cluster.tell(f"all is made: workers send {counted(len(files), 'file')} to {sender.address}")

    def piece(name: str) -> FinishedFile:
        path, nbytes = files[name]
        return FinishedFile(name=name, path=Path(os.path.abspath(path)), nbytes=nbytes, sender=sender)

    cluster.carry_out([iter([name]) for name in files], piece, sent.__setitem__)
    return sent


def execute_in_store(
    plan: Plan,
    cluster: Cluster,
    uploading: Uploading,
    *,
    resume: bool,
    fresh: bool,
    watch: Callable[[Step], None] | None,
    before_finish: Callable[[RunReport], None] | None,
    record_seconds: float,
    lock: bool,
) -> Summary:
    """Carry out a plan so that its files are in the store; ``Uploading.finish`` is to show them, and ends the journal.

    Raises:
        Dsv4Error: as for ``execute``.
    """
    path = journal_path(plan)
    fingerprint = fingerprint_of(plan) | {"destination": uploading.address}
    if os.path.lexists(path) and not (resume or fresh):
        raise interrupted(path)
    cluster.connect()
    with Journal(path, forget=fresh, lock=lock) as journal, contextlib.closing(uploading):
        begin_upload(uploading, journal)
        if journal.is_new:
            journal.begin(fingerprint, (), {}, {})
        elif resume:
            check_same(journal.fingerprint or {}, fingerprint, path)
            journal.check_plan(plan)
            journal.resume()
        else:
            raise interrupted(path)

        def before_end(report: RunReport) -> None:
            check_unchanged(plan, fingerprint)
            if before_finish is not None:
                before_finish(report)

        with work_is_kept(plan):
            complete = journal.complete_files(plan)
            sent = {
                file: what
                for file, what in journal.sent.items()
                if file in complete and uploading.holds(plan.files[file].name, what)
            }
            lent, place = uploading.lend(), uploading.takes_parts
            parts = None if place is None else FilesInParts(plan, journal, place)
            if parts is not None:
                parts.resume(sent)
            recorder = _SentFiles(journal, sent, parts)
            recorder.finish_files()
            left = sum(not is_made_here(file) for file in plan.files) - len(sent)
            workers = sum(cluster.processors.values())
            if left < workers:
                cluster.tell(
                    f"{counted(left, 'file')} for {counted(workers, 'worker')}: "
                    + (
                        "a smaller --max-file-size would give all of them work; without --delete-uploaded several make "
                        "one file, on the shared file system"
                        if parts is None
                        else "several make and send one, in parts"
                    )
                )
            makers = _FileMakers(cluster, plan, journal, *lent, sent, parts, begins_parts=left < workers)
            report = run_plan(
                plan,
                _NoOutputs(),
                threads=1,
                codecs=default_codecs(),
                watch=watch,
                recorder=recorder,
                record_seconds=record_seconds,
                before_finish=before_end,
                makers=makers,
            )
    uploading.were_sent({plan.files[file].name: what for file, what in sent.items()}, makers.here)
    return summarize(plan, report)
