"""Output files: written under a temporary name, made durable, and renamed when all is done."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ..errors import InputOutputError, OutputExistsError, SpaceError
from ..plan import Plan

PARTIAL_SUFFIX = ".partial"

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
            self._root / file.name if plan.is_folder else partial_path(self._root / file.name)
            for file in plan.files
        ]

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
                if plan.is_folder and any(path.iterdir()) and not overwrite:
                    raise OutputExistsError(
                        "is there and not empty", where=path, hint="give --overwrite to replace it"
                    )
                if not plan.is_folder and not overwrite:
                    raise OutputExistsError("is there", where=path, hint="give --overwrite to replace it")
        parent = plan.destination.parent if plan.is_folder else plan.destination
        if not parent.is_dir():
            raise OutputExistsError("no such folder for the output", where=parent, hint="make it first")

    def create(self) -> None:
        """Make the temporary files at their full size, with their headers.

        Raises:
            SpaceError, InputOutputError: the system refused.
        """
        if self._plan.is_folder:
            with os_errors(self._root, "created"):
                self._root.mkdir(exist_ok=True)
        for path, file in zip(self.paths, self._plan.files, strict=True):
            with os_errors(path, "created"):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                try:
                    os.ftruncate(descriptor, file.nbytes)
                    write_all(descriptor, memoryview(file.header), 0)
                finally:
                    os.close(descriptor)

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
            _sync_folder(self._root)
            with os_errors(plan.destination, "renamed"):
                _replace_folder(self._root, plan.destination)
            _sync_folder(plan.destination.parent)
            return
        for path, final in reversed(list(zip(self.paths, plan.final_paths(), strict=True))):
            with os_errors(final, "renamed"):
                os.replace(path, final)
        _sync_folder(plan.destination)

    def discard(self) -> None:
        """Remove the temporary files."""
        if self._plan.is_folder:
            shutil.rmtree(self._root, ignore_errors=True)
        else:
            for path in self.paths:
                path.unlink(missing_ok=True)


def _replace_folder(new: Path, final: Path) -> None:
    """Give folder ``new`` the name ``final``; an old ``final`` leaves only once the new one is in place."""
    old = final.with_name(final.name + ".replaced")
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    if old.exists():
        shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
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
