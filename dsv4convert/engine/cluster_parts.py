"""Files that the workers of a cluster send to a store in parts, several workers one file, and what of them has arrived.

How a file is cut depends on the plan alone, so that a run goes on with the parts of an earlier one. The journal says
which parts have arrived; a part is looked at again as the store tells it, and is a whole number of segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..containers.destinations import PartsDestination, Sent, SentPart, sent_in_parts
from ..plan import Plan
from .cluster_worker import PartUpload
from .journal import Journal, Key
from .run import Task, file_tasks

# Of S3: a file has so many parts at most, and all but the last have at least 5 MiB.
MAX_PARTS = 10_000
PART_BYTES = 2**25


class FilePart(NamedTuple):
    """The bytes ``begin`` to ``end`` (exclusive) of a file, and the segments that lie there."""

    begin: int
    end: int
    tasks: list[Task]


def cut_into_parts(plan: Plan, file: int, part_bytes: int = PART_BYTES) -> list[FilePart]:
    """Return the parts of a file: each has segments and begins with one, the first with the header."""
    nbytes = plan.files[file].nbytes
    least = max(part_bytes, -(-nbytes // (MAX_PARTS - 1)))
    parts = [FilePart(0, nbytes, [])]
    for task in file_tasks(plan, file):
        last = parts[-1]
        if last.tasks and task.offset - last.begin >= least:
            parts[-1] = last._replace(end=task.offset)
            parts.append(FilePart(task.offset, nbytes, []))
        parts[-1].tasks.append(task)
    return parts


class FilesInParts:
    """The files of a run that are sent in parts; ``arrived`` are the parts that have, by file and number."""

    def __init__(self, plan: Plan, journal: Journal, destination: PartsDestination) -> None:
        self._plan, self._journal, self._destination = plan, journal, destination
        self._parts: dict[int, list[FilePart]] = {}
        self._numbers: dict[Key, int] = {}
        self.arrived: dict[tuple[int, int], SentPart] = {}

    def resume(self, sent: dict[int, Sent]) -> None:
        """Find the parts that earlier runs have sent and that are in the store; files that are whole go to ``sent``.

        Raises:
            Dsv4Error: see ``PartsDestination``.
        """
        finished = self._journal.finished()
        for file, upload in self._journal.uploads.items():
            if file in sent or file not in range(len(self._plan.files)):
                continue
            name, parts = self._plan.files[file].name, cut_into_parts(self._plan, file)
            noted = self._journal.parts[file]
            known = {
                number: noted[number]
                for number, part in enumerate(parts, 1)
                if number in noted and all(task[:3] in finished for task in part.tasks)
            }
            there = self._destination.parts_there(name, upload)
            if there is not None:
                self._take(file, parts)
                self.arrived |= {
                    (file, number): part
                    for number, part in known.items()
                    if there.get(number) == (part.size, part.etag)
                }
            elif len(known) == len(parts):  # it was finished just before the run was killed
                whole = sent_in_parts(known.values())
                if self._destination.holds({name: (Path(name), whole)}):
                    sent[file] = whole

    def begin(self, file: int) -> None:
        """Begin to send a file in parts, if an earlier run has not, and where the file and the store allow it.

        Raises:
            Dsv4Error: see ``PartsDestination.begin_parts``.
        """
        parts = cut_into_parts(self._plan, file)
        if file in self._parts or len(parts) == 1:
            return
        upload = self._destination.begin_parts(self._plan.files[file].name)
        if upload is not None:
            self._journal.note_upload(file, upload)
            self._take(file, parts)

    def _take(self, file: int, parts: list[FilePart]) -> None:
        self._parts[file] = parts
        self._numbers |= {task[:3]: number for number, part in enumerate(parts, 1) for task in part.tasks}

    def number(self, key: Key) -> int | None:
        """Return the number of the part that a segment is in, None where its file is sent as a whole."""
        return self._numbers.get(key)

    def part(self, file: int, number: int) -> FilePart:
        """Return a part by its number."""
        return self._parts[file][number - 1]

    def upload(self, file: int, number: int) -> PartUpload:
        """Return where a worker sends a part."""
        return PartUpload(self._journal.uploads[file], number)

    def holds(self, key: Key) -> bool:
        """Return whether the part that a segment is in has arrived."""
        number = self.number(key)
        return number is not None and (key[0], number) in self.arrived

    def parts_of(self, keys: Iterable[Key]) -> dict[tuple[int, int], SentPart]:
        """Return the parts that have arrived in which segments are, by file and number."""
        found = {(key[0], number) for key in keys if (number := self.number(key)) is not None}
        return {place: self.arrived[place] for place in sorted(found)}

    def finish(self) -> Mapping[int, Sent]:
        """Have the store make files of those whose parts all have arrived; return these files.

        Raises:
            Dsv4Error: see ``PartsDestination.finish_parts``.
        """
        finished: dict[int, Sent] = {}
        for file, parts in list(self._parts.items()):
            noted = self._journal.parts[file]
            places = [(file, number) for number in range(1, len(parts) + 1)]
            if not all(place in self.arrived and noted.get(place[1]) == self.arrived[place] for place in places):
                continue
            sent = [self.arrived[place] for place in places]
            self._destination.finish_parts(self._plan.files[file].name, self._journal.uploads[file], sent)
            finished[file] = sent_in_parts(sent)
            del self._parts[file]
        return finished
