"""Output files: written under a temporary name, made durable, and renamed when all is done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from ..errors import InputOutputError, LockedError, OutputExistsError, ResumeError, SpaceError
from ..plan import Plan

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"

# The next step where an interrupted run cannot go on.
FRESH_HINT = "give --fresh to start over"

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
        self._held: dict[Path, int] = {}
        self._is_ours = False

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
        if plan.is_folder and (old := replaced_path(plan.destination)).exists():
            raise OutputExistsError(
                "an older output that a killed run left under this name", where=old, hint="rename or remove it"
            )
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

    def check_no_work(self) -> None:
        """Check that no temporary file is there, whose work would be lost.

        Raises:
            ResumeError: one is.
        """
        for path in [self._root] if self._plan.is_folder else self.paths:
            if path.is_symlink() or path.exists():
                raise ResumeError(
                    "unfinished work of another run, or of one whose journal is gone",
                    where=path,
                    hint="finish that run, or give --fresh to discard its work",
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
        self._is_ours = True
        for index, path in enumerate(self.paths):
            if not self._plan.is_folder:
                self._remove_leftover(path)
            self._make(index)
        self._sync_names()

    def _create_folder(self) -> None:
        root = self._root
        if root.is_symlink() or (root.exists() and not root.is_dir()):
            raise OutputExistsError("is there and is no folder of ours", where=root, hint="remove it")
        names = {file.name for file in self._plan.files}
        with os_errors(root, "created"):
            root.mkdir(exist_ok=True)
            entries = list(root.iterdir())
            for entry in entries:
                if entry.is_dir() or (entry.name not in names and not CHECKPOINT_FILE.fullmatch(entry.name)):
                    raise OutputExistsError(
                        f"holds {entry.name}, which is not of this output", where=root, hint="remove it"
                    )
            for entry in entries:
                entry.unlink()

    def _remove_leftover(self, path: Path) -> None:
        """Remove a temporary file of an older run, unless a run still has it."""
        with os_errors(path, "removed"):
            try:
                descriptor = self._open_held(path, os.O_RDONLY)
            except FileNotFoundError:
                return
            # Made anew before the old one is closed, so that both cannot have one inode (see ``inodes``).
            path.unlink()
            del self._held[path]
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            finally:
                os.close(descriptor)

    def _make(self, index: int) -> None:
        """Make a temporary file anew, or give the one that is there its size and its header."""
        path, file = self.paths[index], self._plan.files[index]
        with os_errors(path, "created"):
            descriptor = self._open_held(path, os.O_RDWR | os.O_CREAT)
            try:
                if os.fstat(descriptor).st_size != file.nbytes:
                    os.ftruncate(descriptor, 0)
                    os.ftruncate(descriptor, file.nbytes)
                write_all(descriptor, memoryview(file.header), 0)
            finally:
                if self._plan.is_folder:
                    os.close(descriptor)

    def _open_held(self, path: Path, flags: int) -> int:
        """Open a temporary file and lock it until the end of the run; a folder is locked by its journal alone.

        Outputs of different names can share files (a model with its MTP file, and the MTP file alone).
        """
        while True:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            if self._plan.is_folder:
                return descriptor
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise LockedError(
                    "another run is writing this file", where=path, hint="wait for it or stop it"
                ) from None
            # The holder before us may have given the file its final name between our open and our lock.
            if _is_still(path, descriptor):
                self._held[path] = descriptor
                return descriptor
            os.close(descriptor)

    def _sync_names(self) -> None:
        """Make the names of the temporary files durable, before a journal speaks of their bytes."""
        sync_folder(self._root)
        if self._plan.is_folder:
            sync_folder(self._root.parent)

    def close(self) -> None:
        """Let go of the locks."""
        while self._held:
            os.close(self._held.popitem()[1])

    def reopen(self, started: Collection[int], finished: Collection[int]) -> None:
        """Take over the temporary files of an interrupted run.

        ``started`` are the files of which anything is finished, ``finished`` those that miss nothing. A run
        can die before it has made a file, and between the renames at its end, so a file may be missing or
        have its final name. Whether the bytes are those of that run is for the caller to see (``inodes``).

        Raises:
            ResumeError: a file of which something was finished is gone or of the wrong size.
        """
        plan = self._plan
        if plan.is_folder:
            if not self._root.exists() and started and len(finished) == len(self.paths):
                self._root = plan.destination
                self.paths = [self._root / file.name for file in plan.files]
            elif self._root.is_symlink() or (self._root.exists() and not self._root.is_dir()):
                raise ResumeError("is no folder of ours", where=self._root, hint=FRESH_HINT)
            with os_errors(self._root, "created"):
                self._root.mkdir(exist_ok=True)
        self._is_ours = True
        for index, (file, final) in enumerate(zip(plan.files, plan.final_paths(), strict=True)):
            if not plan.is_folder and index in started and index in finished and not self.paths[index].exists():
                self.paths[index] = final
            path = self.paths[index]
            size = _size_of_regular(path)
            if size != file.nbytes and index in started:
                raise ResumeError(
                    "what the interrupted run wrote is not there as it was left",
                    where=path,
                    expected=f"{file.nbytes} bytes",
                    got="no file" if size is None else f"{size} bytes",
                    hint=FRESH_HINT,
                )
            if path != final:
                self._make(index)
            elif not plan.is_folder:
                with os_errors(path, "opened"):
                    self._open_held(path, os.O_RDONLY)
        self._sync_names()

    def inodes(self) -> list[int]:
        """Return the inode numbers of the files: the same file keeps its own through renames."""
        inodes = []
        for path in self.paths:
            with os_errors(path, "read"):
                inodes.append(path.lstat().st_ino)
        return inodes

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
        """Remove the temporary files that are ours; what has its final name stays."""
        if self._plan.is_folder:
            if self._is_ours and self._root != self._plan.destination:
                shutil.rmtree(self._root, ignore_errors=True)
            return
        finals = set(self._plan.final_paths())
        for path in self._held:
            if path not in finals:
                path.unlink(missing_ok=True)


def replaced_path(folder: Path) -> Path:
    """Return the name that an output folder has while its successor takes its place."""
    return folder.with_name(folder.name + REPLACED_SUFFIX)


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether ``path`` still names the file that ``descriptor`` has open."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _size_of_regular(path: Path) -> int | None:
    """Return the size of a regular file, None where there is none; links are not followed."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _replace_folder(new: Path, final: Path) -> None:
    """Give folder ``new`` the name ``final``; an old ``final`` leaves only once the new one is in place.

    A run that goes on after a kill between these steps finds ``new`` in place, and only clears up.
    """
    old = replaced_path(final)
    if new != final:
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
