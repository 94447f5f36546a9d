"""Output files: written under a temporary name, made durable, and renamed when all is done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from ..errors import InputOutputError, LockedError, OutputExistsError, ResumeError, SpaceError
from ..plan import Plan

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"

# The unit of st_blocks, whatever the file system's own blocks are.
STAT_BLOCK_BYTES = 512

# Files of an older conversion, which --overwrite may replace together with their folder.
CHECKPOINT_FILE = re.compile(
    r"model[\w.-]*\.(safetensors|safetensors\.index\.json)|[\w.-]+\.json|chat_template\.jinja|merges\.txt|LICENSE"
)

# Files that one worker keeps open; shards of 16 ranks and a few sources fit.
OPEN_FILES_PER_WORKER = 24


def partial_path(path: Path) -> Path:
    """Return the temporary name of ``path``, beside it."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


@contextlib.contextmanager
def os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError on ``path`` into one of ours.

    Raises:
        SpaceError: the disk or the quota is full.
        InputOutputError: anything else that the system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpaceError(
                f"cannot be {doing} ({error.strerror})", where=path, hint="free some space and run again"
            ) from None
        raise InputOutputError(f"cannot be {doing} ({error.strerror})", where=path) from None


class DescriptorCache:
    """The descriptors of one worker: at most ``OPEN_FILES_PER_WORKER``, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, int], int] = OrderedDict()

    def get(self, path: Path, flags: int) -> int:
        """Return a descriptor of ``path`` opened with ``flags``."""
        key = (path, flags)
        descriptor = self._open.get(key)
        if descriptor is None:
            if len(self._open) >= OPEN_FILES_PER_WORKER:
                os.close(self._open.popitem(last=False)[1])
            with os_errors(path, "opened"):
                descriptor = os.open(path, flags | os.O_CLOEXEC)
            self._open[key] = descriptor
        else:
            self._open.move_to_end(key)
        return descriptor

    def __enter__(self) -> DescriptorCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Outputs:
    """The files of a plan while they are being made."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._root = partial_path(plan.destination) if plan.is_folder else plan.destination
        self.paths = [
            self._root / file.name if plan.is_folder else partial_path(self._root / file.name) for file in plan.files
        ]
        self._held: list[int] = []

    def check_absent(self, overwrite: bool) -> None:
        """Check that nothing is replaced unasked.

        Raises:
            OutputExistsError: an output is there and ``overwrite`` is false, or is of the wrong kind.
        """
        plan = self._plan
        for path in [plan.destination] if plan.is_folder else plan.final_paths():
            if path.is_symlink() or path.exists():
                if path.is_dir() != plan.is_folder or (plan.is_folder and path.is_symlink()):
                    raise OutputExistsError("is there, and cannot be replaced by this output", where=path)
                if plan.is_folder:
                    self._check_replaceable(path, overwrite)
                if not plan.is_folder and not overwrite:
                    raise OutputExistsError("is there", where=path, hint="give --overwrite to replace it")
        parent = plan.destination.parent if plan.is_folder else plan.destination
        if not parent.is_dir():
            raise OutputExistsError("no such folder for the output", where=parent, hint="make it first")

    def _check_replaceable(self, folder: Path, overwrite: bool) -> None:
        """Check that a folder may be replaced: it is empty, or unasked-for things are not lost with it."""
        entries = list(folder.iterdir())
        if entries and not overwrite:
            raise OutputExistsError("is there and not empty", where=folder, hint="give --overwrite to replace it")
        ours = {file.name for file in self._plan.files}
        for entry in entries:
            if entry.is_dir() or (entry.name not in ours and not CHECKPOINT_FILE.fullmatch(entry.name)):
                raise OutputExistsError(
                    f"holds {entry.name}, which no conversion wrote",
                    where=folder,
                    hint="move it away or give another folder",
                )

    def create(self) -> None:
        """Make the temporary files at their full size, with their headers; leftovers of an older run go.

        Raises:
            LockedError: another run holds one of them.
            OutputExistsError: a folder with the temporary name holds files that are not ours.
            SpaceError, InputOutputError: the system refused.
        """
        if self._plan.is_folder:
            self._create_folder()
        for path, file in zip(self.paths, self._plan.files, strict=True):
            with os_errors(path, "created"):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    self._hold(path)
                    os.ftruncate(descriptor, 0)
                    os.ftruncate(descriptor, file.nbytes)
                    write_all(descriptor, memoryview(file.header), 0)
                finally:
                    os.close(descriptor)

    def _create_folder(self) -> None:
        with os_errors(self._root, "created"):
            self._root.mkdir(exist_ok=True)
            foreign = {path.name for path in self._root.iterdir()} - {file.name for file in self._plan.files}
            if foreign:
                raise OutputExistsError(
                    f"holds {sorted(foreign)[0]}, which is not of this output", where=self._root, hint="remove it"
                )

    def _hold(self, path: Path) -> None:
        """Lock a temporary file until the end of the run; a folder is locked by its journal alone.

        Outputs of different names can share files (a model with its MTP file, and the MTP file alone).
        """
        if self._plan.is_folder:
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._held.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError("another run is writing this file", where=path) from None

    def close(self) -> None:
        """Let go of the locks."""
        while self._held:
            os.close(self._held.pop())

    def reopen(self, finished: Collection[int]) -> None:
        """Take over the temporary files of an interrupted run; ``finished`` are the files that miss nothing.

        Of those, some (or the folder) may have got their names already, when the run died between renames.

        Raises:
            ResumeError: a temporary file is gone or of the wrong size.
        """
        if self._plan.is_folder and not self._root.exists() and len(finished) == len(self.paths):
            self._root = self._plan.destination
            self.paths = [self._root / file.name for file in self._plan.files]
        for index, (path, file) in enumerate(zip(self.paths, self._plan.files, strict=True)):
            final = self._plan.final_paths()[index]
            if not path.exists() and index in finished and final.exists():
                path = self.paths[index] = final
            try:
                size = path.stat().st_size if not path.is_symlink() else None
            except OSError:
                size = None
            if size != file.nbytes:
                raise ResumeError(
                    "the work of the interrupted run is not there any more",
                    where=path,
                    expected=f"{file.nbytes} bytes",
                    got="no file" if size is None else f"{size} bytes",
                    hint="give --fresh to start over",
                )
            with os_errors(path, "opened"):
                self._hold(path)

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the temporary files take already."""
        return sum(path.stat().st_blocks * STAT_BLOCK_BYTES for path in self.paths if path.exists())

    def sync(self, indexes: set[int]) -> None:
        """Make what was written to the given files durable."""
        for index in sorted(indexes):
            with os_errors(self.paths[index], "flushed"):
                descriptor = os.open(self.paths[index], os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)

    def finish(self) -> None:
        """Make all files durable and give them their names.

        Several files that are no folder are renamed in reverse order, so that the first file, by which
        readers find the others, appears last.
        """
        self.sync(set(range(len(self.paths))))
        plan = self._plan
        if plan.is_folder:
            sync_folder(self._root)
            if self._root != plan.destination:
                with os_errors(plan.destination, "renamed"):
                    _replace_folder(self._root, plan.destination)
            sync_folder(plan.destination.parent)
            return
        for path, final in reversed(list(zip(self.paths, plan.final_paths(), strict=True))):
            if path != final:
                with os_errors(final, "renamed"):
                    os.replace(path, final)
        sync_folder(plan.destination)

    def discard(self) -> None:
        """Remove the temporary files."""
        if self._plan.is_folder:
            shutil.rmtree(self._root, ignore_errors=True)
        else:
            for path in self.paths:
                path.unlink(missing_ok=True)


def _replace_folder(new: Path, final: Path) -> None:
    """Give folder ``new`` the name ``final``; an old ``final`` leaves only once the new one is in place."""
    old = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    if old.exists():
        shutil.rmtree(old)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    with os_errors(folder, "flushed"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a short write goes on where it stopped."""
    view = data.cast("B") if data.nbytes else data
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def free_bytes(folder: Path) -> int:
    """Return the bytes that an ordinary user can still write on the file system of ``folder``."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
