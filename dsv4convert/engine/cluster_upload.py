"""Carrying out a plan on a cluster whose workers send its files to an object store themselves.

A file is a task (see ``cluster_worker``). Nothing of the output lies on this machine but the journal, which says what
has arrived: segments with their digests, and each file with its size and SHA-256. Files that a store shows last, and
those that are a header alone, are made here and sent at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..containers.destinations import Sender, Sent
from ..errors import counted
from ..formats.backend import default_codecs
from ..plan import Plan
from .cluster import Cluster, ClusterMakers
from .cluster_worker import FinishedFile, MadeFile, WholeFile, fill_file
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
        """Return nothing: only threads of a run ask, and where other processes make the segments it has none."""
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
    """Makes and sends whole files; ``sent`` are those that have arrived, ``here`` those made in ``folder``."""

    def __init__(
        self, cluster: Cluster, plan: Plan, journal: Journal, sender: Sender, folder: Path, sent: dict[int, Sent]
    ) -> None:
        super().__init__(cluster, plan, _NoOutputs(), journal.claim)
        self._work = sys.maxsize
        self._sender, self._folder = sender, folder
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
                elsewhere.append(tasks)
                continue
            self.here[file.name] = path = self._folder / str(index)
            everything = list(file_tasks(self._plan, index))
            with os_errors(path, "written"), path.open("xb", buffering=0) as output:
                made = fill_file(output.fileno(), path, file.header, file.nbytes, self.parts(everything))
            if made:
                take([Finished(task, *one) for task, one in zip(everything, made, strict=True)])
        super().make(elsewhere, take, stopped)

    def _piece(self, tasks: Sequence[Task]) -> WholeFile:
        index = tasks[0].file
        file = self._plan.files[index]
        return WholeFile(
            work=self.work(list(file_tasks(self._plan, index))),
            name=file.name,
            header=file.header,
            nbytes=file.nbytes,
            sender=self._sender,
        )

    def _made(self, tasks: Sequence[Task], made: Any) -> Sequence[Made]:
        """Return what was made of each task's segment: the others were recorded when a run was killed meanwhile."""
        assert isinstance(made, MadeFile)
        file = tasks[0].file
        by_task = dict(zip(file_tasks(self._plan, file), made.made, strict=True))
        self.sent[file] = made.sent
        return [by_task[task] for task in tasks]


class _SentFiles:
    """The journal of files that workers have sent: of others nothing is recorded, and nothing of them is kept."""

    def __init__(self, journal: Journal, sent: Mapping[int, Sent]) -> None:
        self._journal, self._sent = journal, sent

    def finished(self) -> Mapping[Key, Finished]:
        """Return the segments of files that are in the store."""
        return {key: entry for key, entry in self._journal.finished().items() if key[0] in self._sent}

    def record(self, batch: list[Finished]) -> None:
        """Keep the segments of files that have arrived."""
        files = {entry.task.file for entry in batch} & self._sent.keys()
        self._journal.note_sent({file: self._sent[file] for file in sorted(files)})
        self._journal.record([entry for entry in batch if entry.task.file in files])


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
            left = sum(not is_made_here(file) for file in plan.files) - len(sent)
            workers = sum(cluster.processors.values())
            if left < workers:
                cluster.tell(
                    f"{counted(left, 'file')} for {counted(workers, 'worker')}: a smaller "
                    "--max-file-size would give all of them work; without --delete-uploaded several make one file, on "
                    "the shared file system"
                )
            makers = _FileMakers(cluster, plan, journal, *uploading.lend(), sent)
            report = run_plan(
                plan,
                _NoOutputs(),
                threads=1,
                codecs=default_codecs(),
                watch=watch,
                recorder=_SentFiles(journal, sent),
                record_seconds=record_seconds,
                before_finish=before_end,
                makers=makers,
            )
    uploading.were_sent({plan.files[file].name: what for file, what in sent.items()}, makers.here)
    return summarize(plan, report)
