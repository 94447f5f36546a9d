"""The journal: what a run has finished, durable before it says so, so that a killed run can go on.

It lies next to the output as ``OUT.journal`` and holds one line per fact, each behind a checksum of its
own, so that a line torn by a power loss is told from one that is whole. The first line is the
fingerprint of the plan, and by its form says whose the file is; the others are finished segments. The file is
locked while a run uses it (see ``locks``).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from ..errors import LockedError, ResumeError
from ..formats.base import Tally
from ..plan import Plan, sizes_of
from .ledger import DIGEST_BYTES, digest_of_range
from .locks import LOCK_SUFFIX, LockFile, try_lock
from .names import Identity, closing, is_same_file, not_ours, remove_known
from .outputs import FRESH_HINT, JOURNAL_SUFFIX, open_file, os_errors, sync_folder, write_all
from .run import Finished, Task

if TYPE_CHECKING:
    from ..containers.destinations import Sent, SentPart

FORMAT = 3

# A journal of V4-Pro has some 75,000 lines of about 120 bytes.
MAX_JOURNAL_BYTES = 2**28
MAX_LINE_BYTES = 2**24

# How a journal of ours begins: the first line's checksum and its first key. A power loss can cut it short.
CLAIM = b'0123456789abcdef {"journal":'
HEX, HEX_BYTES = frozenset(b"0123456789abcdef"), 16

Key = tuple[int, int, int]

# How the text of a line begins with which a run takes a journal.
HOLDER = b'{"holder":'


class Claim(NamedTuple):
    """A run's hold on its journal, for its workers elsewhere: the line with which it took it, and where that stands.

    Bytes before ``end`` were that run's own when this was asked for.
    """

    path: Path
    offset: int
    line: bytes
    end: int

    def check(self) -> None:
        """Check that no other run has taken the journal since.

        A run takes the journal before it makes or opens a file of the output. So a file that was opened before this
        check is not one that a later run made.

        Raises:
            LockedError: one has, or the journal is gone, as it is after the end of a run.
            InputOutputError: it cannot be read.
        """
        with os_errors(self.path, "read"):
            try:
                with self.path.open("rb", buffering=0) as file:  # opened anew: NFS then asks the server
                    is_same = os.pread(file.fileno(), len(self.line), self.offset) == self.line
                    file.seek(self.end)
                    rest = file.readall()
            except FileNotFoundError:
                is_same, rest = False, b""
        if not is_same or HOLDER in rest:
            raise LockedError(
                "the run that this worker belongs to has ended, or another has taken over its output",
                where=self.path,
                hint="run again with --resume",
            )


def journal_path(plan: Plan) -> Path:
    """Return where the journal of a plan lies."""
    output = plan.output_path()
    return output.with_name(output.name + JOURNAL_SUFFIX)


class Journal:
    """An open, locked journal; use it as a context manager.

    With ``forget`` it is not read: whatever it says, even damaged, the run starts over. ``lock`` False leaves out
    the lock.

    Raises:
        LockedError: another run holds it; says which.
        OutputExistsError: a file of that name that is no journal of ours.
        ResumeError: it is damaged.
    """

    def __init__(self, path: Path, forget: bool = False, lock: bool = True) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] | None = None
        self.inodes: list[int] = []
        self.replaces: list[Identity | None] = []
        self.held: dict[str, Identity] = {}
        self.discards: dict[str, Identity] = {}
        self.sent: dict[int, Sent] = {}
        self.uploads: dict[int, str] = {}
        self.parts: dict[int, dict[int, SentPart]] = {}
        self._finished: dict[Key, Finished] = {}
        self._lock_file: LockFile | None = None
        self._descriptor = self._open(lock)
        self._end = 0
        self._held_by = b""
        self._held_at = 0
        try:
            self._check_claim()
            if not forget:
                self._end = self._read()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        if self._lock_file is not None:
            self._lock_file.release()

    @property
    def is_new(self) -> bool:
        """Return whether no earlier run left anything in it."""
        return self.fingerprint is None

    @property
    def has_content(self) -> bool:
        """Return whether there is anything in the file, whether or not it was read."""
        return os.fstat(self._descriptor).st_size > 0

    def finished(self) -> Mapping[Key, Finished]:
        """Return the segments that earlier runs finished."""
        return self._finished

    def check_plan(self, plan: Plan) -> None:
        """Check that every finished segment is one of the plan's.

        Raises:
            ResumeError: it is not.
        """
        for file, tensor, segment in self._finished:
            if not (
                0 <= file < len(plan.files)
                and 0 <= tensor < len(plan.files[file].tensors)
                and 0 <= segment < len(plan.files[file].tensors[tensor].segments)
            ):
                raise ResumeError(
                    "the journal names a segment that the plan does not have", where=self.path, hint=FRESH_HINT
                )

    def check_bytes(self, plan: Plan, file: int, path: Path) -> None:
        """Check that ``path`` holds the header of output file ``file`` and its finished segments.

        Raises:
            ResumeError: it does not; names the tensor.
            InputOutputError: it cannot be read.
        """
        with os_errors(path, "read"), path.open("rb", buffering=0) as stream:
            header = plan.files[file].header
            if stream.read(len(header)) != header:
                raise ResumeError("differs from what the interrupted run wrote", where=path, hint=FRESH_HINT)
            for entry in self._finished.values():
                if entry.task.file != file:
                    continue
                tensor = plan.files[file].tensors[entry.task.tensor]
                sizes = list(sizes_of(tensor))
                offset = tensor.offset + sum(sizes[: entry.task.segment])
                if digest_of_range(stream.fileno(), offset, sizes[entry.task.segment]) != entry.digest:
                    raise ResumeError(
                        f"tensor {tensor.name} differs from what the interrupted run wrote", where=path, hint=FRESH_HINT
                    )

    def started_files(self) -> set[int]:
        """Return the files of which any segment is finished."""
        return {file for file, _, _ in self._finished}

    def complete_files(self, plan: Plan) -> set[int]:
        """Return the files of which every segment is finished."""
        counts = [sum(len(tensor.segments) for tensor in file.tensors) for file in plan.files]
        for file, _, _ in self._finished:
            counts[file] -= 1
        return {index for index, count in enumerate(counts) if not count}

    def begin(
        self,
        fingerprint: Mapping[str, Any],
        replaces: Sequence[Identity | None],
        held: Mapping[str, Identity],
        discards: Mapping[str, Identity],
    ) -> None:
        """Start over with a plan's fingerprint, forgetting whatever was there.

        ``replaces`` and ``held`` are what stands under the final names, ``discards`` older work under the temporary
        ones, which this run removes.
        """
        with os_errors(self.path, "written"):
            os.ftruncate(self._descriptor, 0)
            self._end = 0
            self._finished = {}
            self.sent, self.uploads, self.parts = {}, {}, {}
            self.inodes = []
            self.replaces, self.held, self.discards = list(replaces), dict(held), dict(discards)
            self.fingerprint = dict(fingerprint)
            first = {"journal": FORMAT, "fingerprint": self.fingerprint}
            device = os.fstat(self._descriptor).st_dev
            found = {"replaces": self.replaces, "held": self.held, "discards": self.discards, "device": device}
            self._append([first, found])
            self._hold()
            sync_folder(self.path.parent)

    def resume(self) -> None:
        """Note that this process has taken over; a torn last line goes."""
        with os_errors(self.path, "written"):
            os.ftruncate(self._descriptor, self._end)
        self._hold()

    def claim(self) -> Claim:
        """Return this run's hold on the journal."""
        return Claim(self.path, self._held_at, self._held_by, self._end)

    def _hold(self) -> None:
        """Note that this run has the journal from now on."""
        fact = _holder()
        self._held_at, self._held_by = self._end, _line(_encode(fact))
        self._append([fact])

    def note_inodes(self, inodes: list[int]) -> None:
        """Keep the inode numbers of the output's files, by which they are found again under their final names."""
        self.inodes = inodes
        self._append([{"inodes": inodes}])

    def record(self, batch: list[Finished]) -> None:
        """Keep finished segments, whose bytes are durable already; durable itself on return."""
        self._write(b"".join(map(_line_of, batch)))

    def note_sent(self, files: Mapping[int, Sent]) -> None:
        """Keep which files are whole in a store; durable on return, and noted before their segments are."""
        self.sent.update(files)
        self._append([{"sent": [file, sent.size, sent.sha256]} for file, sent in files.items()])

    def note_upload(self, file: int, upload: str) -> None:
        """Keep what the upload of a file is called that is sent in parts; what was noted of an earlier one is void."""
        self.uploads[file], self.parts[file] = upload, {}
        self._append([{"upload": [file, upload]}])

    def note_parts(self, parts: Mapping[tuple[int, int], SentPart]) -> None:
        """Keep which parts are in a store, by file and number; as ``note_sent``."""
        for (file, number), part in parts.items():
            self.parts[file][number] = part
        self._append([{"part": [*key, part.size, part.sha256, part.etag]} for key, part in parts.items()])

    def remove(self) -> None:
        """Remove the file, where its name still stands for it; the lock goes with the process or the context."""
        with os_errors(self.path, "removed"):
            remove_known(self.path, self._descriptor)

    def _open(self, lock: bool) -> int:
        while True:
            with os_errors(self.path, "opened"):
                descriptor = open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if lock and not try_lock(descriptor, self.path):
                    self._lock_file = LockFile(self.path.with_suffix(LOCK_SUFFIX))
            except BlockingIOError:
                holder = _last_holder(descriptor)
                os.close(descriptor)
                raise LockedError(
                    "another run is writing this output",
                    where=self.path,
                    got=holder,
                    hint="wait for the other run or stop it",
                ) from None
            except OSError as error:
                self._give_up(descriptor)
                raise LockedError(
                    f"cannot be locked ({error.strerror})",
                    where=self.path,
                    hint="pass --no-lock where no other run can write this output",
                ) from None
            except BaseException:
                self._give_up(descriptor)
                raise
            # The holder before us may have removed the file between our open and our lock.
            if is_same_file(self.path, descriptor):
                return descriptor
            os.close(descriptor)
            if self._lock_file is not None:
                self._lock_file.release()

    def _give_up(self, descriptor: int) -> None:
        """Close a journal that was not locked, and remove it where this run made it."""
        with closing(descriptor):
            if not os.fstat(descriptor).st_size:
                remove_known(self.path, descriptor)

    def _check_claim(self) -> None:
        """Check that what is in the file is a journal of ours, or nothing: a power loss can leave zeros.

        Raises:
            OutputExistsError: it is something else.
        """
        with os_errors(self.path, "read"):
            start = os.pread(self._descriptor, len(CLAIM), 0).rstrip(b"\0")
        if not all(byte in (HEX if number < HEX_BYTES else (CLAIM[number],)) for number, byte in enumerate(start)):
            raise not_ours(self.path, "a journal of dsv4convert")

    def _read(self) -> int:
        """Read all lines; return where the next one goes. A torn last line is cut off, any other damage refused."""
        with os_errors(self.path, "read"):
            size = os.fstat(self._descriptor).st_size
            if size > MAX_JOURNAL_BYTES:
                raise ResumeError("not a journal: too large", where=self.path, got=f"{size} bytes", hint=FRESH_HINT)
            end = 0
            with open(os.dup(self._descriptor), "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b"")):
                    fact = _checked(line)
                    if fact is None:
                        if file.read(1):
                            raise ResumeError(f"line {number + 1}: damaged", where=self.path, hint=FRESH_HINT)
                        break
                    self._take(fact, number)
                    end += len(line)
        return end

    def _take(self, fact: Any, number: int) -> None:
        try:
            if number == 0:
                if fact["journal"] != FORMAT:
                    raise ResumeError(
                        "unsupported version of the journal",
                        where=self.path,
                        expected=FORMAT,
                        got=str(fact["journal"])[:60],
                        hint=FRESH_HINT,
                    )
                self.fingerprint = dict(fact["fingerprint"])
            elif "s" in fact:
                task = Task(*map(int, fact["s"]))
                digest = bytes.fromhex(fact["d"])
                if len(digest) != DIGEST_BYTES:
                    raise ValueError
                self._finished[task[:3]] = Finished(task, digest, Tally(*map(int, fact["n"])), int(fact.get("z", 0)))
            elif "replaces" in fact:
                device = fact.get("device")
                replaces = [Identity.from_json(value) for value in fact["replaces"]]
                self.replaces = [identity and self._here(identity, device) for identity in replaces]
                self.held, self.discards = (
                    {name: self._here(Identity(*map(int, value)), device) for name, value in fact.get(key, {}).items()}
                    for key in ("held", "discards")
                )
            elif "sent" in fact:
                from ..containers.destinations import Sent

                file, size, sha256 = fact["sent"]
                self.sent[int(file)] = Sent(int(size), str(sha256))
            elif "upload" in fact:
                file, upload = fact["upload"]
                self.uploads[int(file)], self.parts[int(file)] = str(upload), {}
            elif "part" in fact:
                from ..containers.destinations import SentPart

                file, part, size, sha256, etag = fact["part"]
                bytes.fromhex(sha256)
                self.parts[int(file)][int(part)] = SentPart(int(size), str(sha256), str(etag))
            elif "inodes" in fact:
                self.inodes = list(map(int, fact["inodes"]))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise ResumeError(f"line {number + 1}: not a line of a journal", where=self.path, hint=FRESH_HINT) from None

    def _here(self, identity: Identity, device: Any) -> Identity:
        """Return an identity that the journal kept when it was on ``device``.

        A disk can have another device number after a restart: what was on the journal's device is on it now.
        """
        return identity._replace(device=os.fstat(self._descriptor).st_dev) if identity.device == device else identity

    def _append(self, facts: Sequence[Mapping[str, Any]]) -> None:
        self._write(b"".join(_line(_encode(fact)) for fact in facts))

    def _write(self, text: bytes) -> None:
        with os_errors(self.path, "written"):
            write_all(self._descriptor, memoryview(text), self._end)
            os.fdatasync(self._descriptor)
        self._end += len(text)


def _line_of(entry: Finished) -> bytes:
    # There are so many that they do without an encoder.
    zeros = f',"z":{entry.zeros}' if entry.zeros else ""
    (file, tensor, segment, offset), counts = entry.task, ",".join(map(str, entry.tally.counts()))
    return _line(f'{{"s":[{file},{tensor},{segment},{offset}],"d":"{entry.digest.hex()}","n":[{counts}]{zeros}}}')


# Made once: json.dumps makes an encoder for every call.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def _line(text: str) -> bytes:
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode()


def _checked(line: bytes) -> Any:
    """Return the fact in a line with its end, or None where its checksum does not fit."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _holder() -> dict[str, Any]:
    return {
        "holder": f"process {os.getpid()} on {os.uname().nodename}",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "run": os.urandom(8).hex(),
    }


def _last_holder(descriptor: int) -> str:
    """Return who wrote to the journal last, as far as it says."""
    found = "a process that has not said its name yet"
    with open(os.dup(descriptor), "rb") as file:
        for line in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
            fact = _checked(line) if b'"holder"' in line else None
            if isinstance(fact, dict) and "holder" in fact:
                found = f"{fact['holder']} since {fact.get('since')}"[:200]
    return found
