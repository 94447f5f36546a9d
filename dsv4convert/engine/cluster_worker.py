"""A task of a cluster, for a worker on any machine: to make a run of segments of an output file, or to send a file.

All machines see source and output under the same paths, on a shared file system. A worker makes the segments at their
offsets of the temporary file, as a thread of one machine does, and sends their digests back.

Two machines never write the same page of a file through a cache: NFS writes whole pages where it holds one, and a page
held by one client lacks what another has written to it. So segments at the ends of a task, whose pages belong to its
neighbours too, are written with O_DSYNC, for which NFS writes exactly the bytes that are given.

Files that go to an object store are tasks as wholes: their SHA-256 goes with them. One that stays here too is sent from
the shared file system; any other is made on the worker's own disk, where it has no name, and sent from there. Where
there are fewer files than workers, a task is a part of a file, made and sent in the same way.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import xxhash

from .. import __version__
from ..containers.destinations import Destination, PartsDestination, Sender, Sent, SentPart
from ..containers.sources import Mount, any_mounted, mount_of
from ..errors import (
    DeviceError,
    Dsv4Error,
    FileFormatError,
    InputMissingError,
    InputOutputError,
    SpaceError,
    shown_path,
)
from ..formats.backend import default_codecs
from ..plan import Operand, Segment
from .fingerprint import mark_of
from .journal import Claim
from .kernel_copy import KernelCopier
from .mappings import Mappings
from .outputs import DescriptorCache, open_file, os_errors, swapped, write_all
from .ranges import RangeReader, SharedRanges
from .run import with_tensor
from .worker import Made, Worker

# No machine has larger pages.
PAGE_BYTES = 2**16

SCRATCH_HINT = (
    "a file is made there before it is sent: free some space, set TMPDIR where Ray is started, or make smaller files "
    "by --max-file-size"
)

KEYS_HINT = "check that it is reached from there, and that its keys are in the environment in which Ray was started"


class Part(NamedTuple):
    """A segment of a task with its tensor's name and its offset in the file."""

    segment: Segment
    tensor: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Parts of one output file in order, and how a worker knows that it would make the driver's bytes of them.

    ``sources`` are the marks (see ``mark_of``) of the files it reads, ``libraries`` the digests of ggml's. Files below
    one of the ``mounts`` are read from its address, whose revision is told by a digest.
    """

    program: str
    mounts: Mapping[Path, tuple[str, str]]
    sources: Mapping[Path, Sequence[int | str]]
    libraries: Mapping[str, str]
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A task in an output file on the shared file system, which is the one that the driver sees.

    A shared file has the source's bytes already: they are only looked at.
    """

    work: Work
    claim: Claim
    path: Path
    inode: int
    nbytes: int
    is_shared: bool


class PartUpload(NamedTuple):
    """Which part of a file a task sends, and to which upload of the file (see ``PartsDestination``)."""

    upload: str
    number: int


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A task that makes all of an output file, or a ``part`` of it, and sends it.

    ``header`` are its first bytes, ``nbytes`` its size; both, and the offsets of segments, are those of the part.
    """

    work: Work
    name: str
    header: bytes
    nbytes: int
    sender: Sender
    part: PartUpload | None = None


@dataclass(frozen=True, kw_only=True)
class FinishedFile:
    """A task that sends a file of the output, which is on the shared file system."""

    name: str
    path: Path
    nbytes: int
    sender: Sender


class FinalError(Exception):
    """An InputOutputError, its argument, after which Ray is not to begin the task again: it came after long tries."""


class MadeFile(NamedTuple):
    """What became of all segments of a file, or of a part of one, and what was sent."""

    made: list[Made]
    sent: Sent | SentPart


def make_piece(piece: Piece) -> list[Made]:
    """Make the segments of a task, in a worker; their bytes are durable when it returns.

    Raises:
        FileFormatError, DeviceError: this machine has another program, library or source file.
        FinalError, InputMissingError: it cannot reach the source's address.
        LockedError: the run is over, or another has taken its output.
        Dsv4Error: as for a thread's segment; says the tensor.
    """
    _check_machine(piece.work)
    parts = _parts_here(piece.work)
    flags = os.O_RDONLY if piece.is_shared else os.O_WRONLY
    made = []
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(_worker(parts))
        make = worker.look if piece.is_shared else worker.run
        output, exact = (_open_output(piece, more, stack) for more in (flags, flags | os.O_DSYNC))
        edges = _edges(piece)
        for part in parts:
            piece.claim.check()  # after the file was opened
            descriptor = exact if _touches(part, edges) else output
            made.append(_make_part(make, part, descriptor, piece.path))
        if not piece.is_shared:
            with os_errors(piece.path, "flushed"):
                os.fdatasync(output)
    return made


def make_file(file: NewFile) -> MadeFile:
    """Make a file, or a part of one, on this machine's disk and send it.

    Raises:
        FileFormatError, DeviceError: this machine has another program, library or source file.
        SpaceError: the disk is too small for it.
        FinalError, InputMissingError: it cannot reach the source's address.
        FinalError, Dsv4Error: see ``send_file``, and as for a thread's segment; says the tensor.
    """
    _check_machine(file.work)
    parts = _parts_here(file.work)
    destination = _open_destination(file.sender)
    folder = Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with os_errors(folder, "written"):
            output = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0)).fileno()
        try:
            made = fill_file(output, folder / file.name, file.header, file.nbytes, parts)
        except SpaceError as error:
            what = f"no room for a file of {file.nbytes} bytes on machine {os.uname().nodename}"
            raise error.with_changes(what=what, hint=SCRATCH_HINT) from None
        path = Path(f"/proc/self/fd/{output}")
        with os_errors(folder / file.name, "read"):
            sent = Sent.of(path)
        with _remote_errors():
            if file.part is None:
                destination.send(file.name, path, sent)
                return MadeFile(made, sent)
            assert isinstance(destination, PartsDestination)  # it began the upload
            return MadeFile(made, destination.send_part(file.name, *file.part, path, sent))


def send_file(file: FinishedFile) -> Sent:
    """Send a file from the shared file system.

    Raises:
        FinalError: the store cannot be reached, or refuses.
        DeviceError: this machine has no ``obstore``.
        InputMissingError: it has no variables of the store.
        OutputExistsError: another run sends files there now.
        InputOutputError: the file cannot be read, or is another one here.
    """
    destination = _open_destination(file.sender)
    with os_errors(file.path, "read"):
        sent = Sent.of(file.path)
    if sent.size != file.nbytes:
        raise swapped(file.path)
    with _remote_errors():
        destination.send(file.name, file.path, sent)
    return sent


def _open_destination(sender: Sender) -> Destination:
    with _remote_errors(KEYS_HINT):
        return sender.open()  # keys that are missing here are missed before the work


@contextlib.contextmanager
def _remote_errors(hint: str | None = None) -> Iterator[None]:
    """Name this machine in errors of a remote place, and a ``hint`` where it is no package that is missing.

    Raises:
        FinalError: of an InputOutputError.
    """
    try:
        yield
    except (DeviceError, InputMissingError, InputOutputError) as error:
        if isinstance(error, DeviceError):
            hint = None
        told = error.with_changes(what=f"{error.what} on machine {os.uname().nodename}", hint=hint)
        raise (FinalError(told) if isinstance(error, InputOutputError) else told) from None


def fill_file(output: int, path: Path, header: bytes, nbytes: int, parts: Sequence[Part]) -> list[Made]:
    """Make all of a file in an open one that is empty; ``path`` is its name, for errors.

    Raises:
        Dsv4Error: as for a thread's segment; says the tensor.
    """
    with os_errors(path, "written"):
        if nbytes:
            os.posix_fallocate(output, 0, nbytes)
        write_all(output, memoryview(header), 0)
    with _worker(parts) as worker:
        return [_make_part(worker.run, part, output, path) for part in parts]


@contextlib.contextmanager
def _worker(parts: Sequence[Part]) -> Iterator[Worker]:
    with DescriptorCache() as descriptors, KernelCopier() as kernel, contextlib.ExitStack() as stack:
        ranges = None
        if any_mounted():
            shared = SharedRanges(part.segment for part in parts)
            ranges = stack.enter_context(RangeReader(shared, lambda: False))
        yield Worker(default_codecs(), descriptors, kernel, {}, Mappings(), ranges=ranges)


def _make_part(make: Callable[[Segment, int, Path, int], Made], part: Part, output: int, path: Path) -> Made:
    try:
        return make(part.segment, output, path, part.offset)
    except Exception as error:
        if isinstance(error, Dsv4Error) and error.where is not None:
            error.where = shown_path(str(error.where))  # the run has its mounts elsewhere
        raise with_tensor(error, part.tensor) from error


def _parts_here(work: Work) -> Sequence[Part]:
    """Return the parts with remote files as they are mounted in this process."""
    if not work.mounts:
        return work.parts
    with _remote_errors(KEYS_HINT):
        places = {root: _mounted(*told) for root, told in work.mounts.items()}

    def here(operand: Operand) -> Operand:
        root = next((root for root in places if operand.file.is_relative_to(root)), None)
        return operand if root is None else operand._replace(file=places[root] / operand.file.relative_to(root))

    def part_here(part: Part) -> Part:
        operands = tuple(here(operand) for operand in part.segment.operands)
        return part._replace(segment=part.segment._replace(operands=operands))

    return [part_here(part) for part in work.parts]


@cache
def _mounted(address: str, revision: str) -> Path:
    """Return where an address is mounted, once for all tasks of this process.

    Raises:
        FileFormatError: it has another revision now.
        Dsv4Error: see ``mount``.
    """
    from ..containers.remote import mount

    path = mount(address, stand_ins=False)
    found = mount_of(path)  # none where this machine's cache has all of a commit
    if found is not None and revision_digest(found) != revision:
        raise FileFormatError("changed since the run looked at it", where=address, hint="run again with --fresh")
    return path


def revision_digest(mount: Mount) -> str:
    """Return the xxh3-128 of a mount's revision, which of a store is long."""
    return xxhash.xxh3_128_hexdigest(mount.revision.encode())


def _open_output(piece: Piece, flags: int, stack: contextlib.ExitStack) -> int:
    with os_errors(piece.path, "opened"):
        descriptor = open_file(piece.path, flags)
        stack.callback(os.close, descriptor)
        status = os.fstat(descriptor)
    if (status.st_ino, status.st_size) != (piece.inode, piece.nbytes):
        raise swapped(piece.path)
    return descriptor


def _edges(piece: Piece) -> tuple[int, int]:
    """Return the end of the piece's first page and the begin of its last one: outside of them are others' bytes too."""
    begin, last = piece.work.parts[0].offset, piece.work.parts[-1]
    end = last.offset + last.segment.nbytes
    return -(-begin // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES


def _touches(part: Part, edges: tuple[int, int]) -> bool:
    return part.offset < edges[0] or part.offset + part.segment.nbytes > edges[1]


def _check_machine(work: Work) -> None:
    """Check that this machine would make the driver's bytes.

    Raises:
        DeviceError: another program or library.
        FileFormatError: another source file.
        InputOutputError: it does not see one of the files.
    """
    if (program := program_digest()) != work.program:
        raise DeviceError(
            f"machine {os.uname().nodename} has another dsv4convert",
            expected=work.program,
            got=program,
            hint="install the same version on every machine",
        )
    for library, digest in work.libraries.items():
        if (got := library_digest(library)) != digest:
            raise DeviceError(
                f"machine {os.uname().nodename} has another library of ggml",
                where=library,
                expected=digest,
                got=got,
                hint="install the same release on every machine, or pass --ggml-lib on the shared file system",
            )
    for path, mark in work.sources.items():
        if (seen := mark_of(path)) != list(mark):
            raise FileFormatError(
                f"differs on machine {os.uname().nodename}",
                where=path,
                expected=f"size and time {mark}",
                got=seen,
                hint="every machine must see the same file system under the same path",
            )


@cache
def program_digest() -> str:
    """Return the version and the xxh3-128 of the package's sources: what decides the bytes that a worker makes."""
    digest = xxhash.xxh3_128()
    package = Path(__file__).parents[1]
    for path in sorted(path for kind in ("*.py", "*.c") for path in package.rglob(kind)):
        digest.update(f"{path.relative_to(package)}\n".encode())
        digest.update(path.read_bytes())
    return f"{__version__} ({digest.hexdigest()})"


@cache
def library_digest(path: str) -> str:
    """Return the xxh3-128 of a library; of one that only the loader knows, its name.

    Raises:
        InputOutputError: it cannot be read.
    """
    if not os.path.isabs(path):
        return path
    with os_errors(Path(path), "read"):
        return xxhash.xxh3_128_hexdigest(Path(path).read_bytes())
