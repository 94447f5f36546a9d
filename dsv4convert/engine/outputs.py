"""Output files: written under a temporary name, made durable, and given their names when all is done.

An output is a folder that appears whole (``FolderOutput``) or files that appear one by one (``FileOutputs``). Each
temporary file stays open and locked while the run lasts, and workers write through that very descriptor: whatever
happens to names meanwhile, the bytes go where they belong, and a name is given only to the file that was written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import stat
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ..containers.presence import exists, is_file, is_folder, is_link
from ..errors import (
    FileFormatError,
    InputOutputError,
    LockedError,
    OutputExistsError,
    ResumeError,
    SpaceError,
    UsageError,
)
from ..plan import Plan
from .links import COPY, HARD_LINK, REFLINK, can_share, hard_link, reflink
from .locks import LOCK_SUFFIX, try_lock
from .names import (
    ANOTHER_FOLDER,
    Identity,
    check_file_can_be_replaced,
    check_folder_can_be_replaced,
    check_name_fits,
    check_no_mount_point,
    closing,
    entries_within,
    exchange,
    folders_of_names,
    is_same_file,
    nearest_folder,
    not_ours,
    remove_known,
    remove_known_folder,
    rename_new,
    take_name,
    try_rename,
)

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
TRIAL_SUFFIX = ".trial"
JOURNAL_SUFFIX = ".journal"
MANIFEST_SUFFIX = ".manifest.json"

# The next step where an interrupted run cannot go on.
FRESH_HINT = "pass --fresh to start over"
APPEARED_HINT = "move that output away and run again with --resume"

# The unit of st_blocks, whatever the file system's own blocks are.
STAT_BLOCK_BYTES = 512

# Files of an older conversion, which --overwrite may replace together with their folder.
CHECKPOINT_FILE = re.compile(
    r"model[\w.-]*\.(safetensors|safetensors\.index\.json)|[\w.-]+\.json|chat_template\.jinja|merges\.txt|LICENSE"
    # Of a checkpoint for MaxText.
    r"|maxtext\.yml|models/[\w.-]+\.yml|0/(items/)?(_[A-Z]+(_[A-Z]+)?|_sharding|commit_success\.txt)"
    r"|0/items/(array_metadatas/process_0|params\.[\w.]+/(zarr\.json|[0-9.]+))"
)
# Folders of an older conversion within its folder.
CHECKPOINT_FOLDER = re.compile(r"models|0(/items(/array_metadatas|/params\.[\w.]+)?)?")

# The unit in which the kernel writes, or a power loss leaves out, parts of a file.
PAGE_BYTES = 4096

# Files that one worker keeps open; shards of 16 ranks and a few sources fit.
OPEN_FILES_PER_WORKER = 24


def partial_path(path: Path) -> Path:
    """Return the temporary name of ``path``, next to it.

    Raises:
        UsageError: ``path`` has no name, as the current folder has none.
    """
    if not path.name:
        raise UsageError("the output has no name", where=path, hint="give the name of a file or a folder")
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
        hint = ANOTHER_FOLDER if error.errno == errno.EROFS else None
        raise InputOutputError(f"cannot be {doing} ({error.strerror})", where=path, hint=hint) from None


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
            if flags == os.O_RDONLY and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # only advice
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._open[key] = descriptor
        else:
            self._open.move_to_end(key)
        return descriptor

    def __enter__(self) -> DescriptorCache:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Outputs(ABC):
    """The files of a plan while they are being made.

    ``paths`` are their names as they are now, ``replaces`` what stood under each final name when the run began (under
    that of the folder, with ``held``, the files in it): only that is ever replaced. ``discards`` are the files of older
    runs that had temporary names then, by name. ``links`` says how files were made that are files of the source: a
    shared one is never open for writing.
    """

    def __init__(self, plan: Plan, *, lock: bool = True) -> None:
        self._plan = plan
        self._lock = lock
        self.paths: list[Path] = []
        self.replaces: list[Identity | None] = []
        self.held: dict[str, Identity] = {}
        self.discards: dict[str, Identity] = {}
        self.links: dict[int, str] = {}
        self._open: dict[int, int] = {}
        self._made: set[Path] = set()
        self._leftovers: dict[Path, Identity | None] = {}  # of older runs, when this one began
        self._has_looked = False

    # ---- before the run

    @abstractmethod
    def check_absent(self, overwrite: bool) -> None:
        """Check that nothing is replaced unasked, and keep in mind what will be replaced.

        Raises:
            OutputExistsError: an output is there and ``overwrite`` is false, or what is there can never be replaced.
        """

    @abstractmethod
    def final(self) -> list[Path]:
        """Return the names that the work has after its end."""

    @abstractmethod
    def temporary(self) -> list[Path]:
        """Return the names that the work of a run has before its end."""

    def check_no_work(self) -> None:
        """Check that no temporary file is there, whose work would be lost.

        Raises:
            ResumeError: one is.
        """
        for path in self.temporary():
            if os.path.lexists(path):
                raise ResumeError(
                    "unfinished work of another run, or of one whose journal is gone",
                    where=path,
                    hint="finish that run, or pass --fresh to discard its work",
                )

    def check_own_work(self, is_ours: Callable[[bytes], bool]) -> None:
        """Check that a temporary file, where there is one, is left by an earlier run of the same command.

        That is for runs without a journal. ``is_ours`` says it by the first page; or the header is not written yet.

        Raises:
            OutputExistsError: something else has the name.
            InputOutputError: it cannot be read.
        """
        for path, file in zip(self.paths, self._plan.files, strict=True):
            if not os.path.lexists(path):
                continue
            with os_errors(path, "read"), closing(open_file(path, os.O_RDONLY)) as descriptor:
                size = os.fstat(descriptor).st_size
                begins = os.pread(descriptor, PAGE_BYTES, 0)
            is_blank = size in (0, file.nbytes) and not begins.strip(b"\0")
            if not is_blank and not is_ours(begins):
                raise not_ours(path, "unfinished work of this command")

    def look(self) -> None:
        """Keep in mind what has the final and the temporary names: only that is ever replaced or discarded."""
        self.replaces = [_identity(path) for path in self.final()]
        self._leftovers = {path: _identity(path) for path in (*self.temporary(), *self.paths)}
        self.discards = self._found_work()
        self._has_looked = True

    @abstractmethod
    def _found_work(self) -> dict[str, Identity]:
        """Return the files that have temporary names, by name in ``_work_folder``."""

    @abstractmethod
    def _work_folder(self) -> Path:
        """Return the folder in which the temporary files lie."""

    def remove_discarded(self) -> None:
        """Remove what is left of the work that a run discarded which died as it began anew, and nothing else.

        Raises:
            InputOutputError: the system refused.
        """
        for name, identity in self.discards.items():
            path = self._work_folder() / name
            with os_errors(path, "removed"):
                if not is_folder(path):
                    remove_known(path, identity)

    def _check_as_looked(self) -> None:
        """Check that the final names stand for what they stood for when the run began.

        Raises:
            OutputExistsError: one does not.
        """
        if not self._has_looked:
            self.look()
        for path, identity in zip(self.final(), self.replaces, strict=True):
            if _identity(path) != identity:
                raise appeared(path)

    @abstractmethod
    def check_not_taken(self) -> None:
        """Check that nothing but the work of this output, or what it replaces, stands under the final names.

        Raises:
            OutputExistsError: something else does.
        """

    @abstractmethod
    def create(self) -> None:
        """Make the temporary files at their full size, with their headers; leftovers of an older run go.

        Raises:
            LockedError: another run holds one of them.
            OutputExistsError: something else has a temporary name.
            SpaceError, InputOutputError: the system refused.
        """

    @abstractmethod
    def reopen(self, started: Collection[int], finished: Collection[int], inodes: Sequence[int]) -> None:
        """Take over the temporary files of an interrupted run.

        ``started`` are the files of which anything is finished, ``finished`` those that miss nothing, ``inodes`` the
        numbers that the files had. A run can die before it has made a file, and between the renames at its end, so a
        file may be missing or have its final name. Whether the bytes are those of that run is for the caller to see.

        Raises:
            ResumeError: a file of which something was finished is gone or of the wrong size.
        """

    # ---- during the run

    def descriptor(self, index: int) -> int:
        """Return the descriptor of a file, open until the end of the run: for reading and writing, unless shared."""
        return self._open[index]

    def is_shared(self, index: int) -> bool:
        """Return whether a file shares the bytes of a file of the source, so that there is nothing to write."""
        return self.links.get(index, COPY) != COPY

    def links_by_name(self) -> dict[str, str]:
        """Return how the files were made that are files of the source."""
        return {self._plan.files[index].name: how for index, how in sorted(self.links.items())}

    def inodes(self) -> list[int]:
        """Return the inode numbers of the files: the same file keeps its own through renames."""
        return [os.fstat(self._open[index]).st_ino for index in range(len(self.paths))]

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the temporary files take already."""
        files = zip(self.paths, self._plan.files, strict=True)
        own = [path for path, file in files if not can_share(file, self._plan.destination)]
        return sum(status.st_blocks for path in own if (status := _status(path))) * STAT_BLOCK_BYTES

    def sync(self, indexes: set[int]) -> None:
        """Make what was written to the given files durable."""
        for index in sorted(indexes):
            with os_errors(self.paths[index], "flushed"):
                os.fdatasync(self._open[index])

    # ---- after the run

    @abstractmethod
    def finish(self) -> None:
        """Make all files durable and give them their names.

        Raises:
            OutputExistsError: something else took a name meanwhile; it stays, and so does the work.
            InputOutputError: a temporary file is not the one that was written any more, or the system refused.
        """

    @abstractmethod
    def discard(self) -> None:
        """Remove the temporary files that are ours; what has its final name stays."""

    def close(self) -> None:
        """Close the files, which releases their locks."""
        while self._open:
            os.close(self._open.popitem()[1])

    # ---- shared steps

    def _try_names(self, path: Path) -> None:
        """Rename a temporary file or folder, still empty, to a trial name and back, before any work is done.

        Raises:
            OutputExistsError: what is made here could never get its final name.
        """
        try:
            try_rename(path, trial_path(self._plan.output_path()))
        except FileExistsError as error:
            raise appeared(Path(error.filename2 or path)) from None
        except OSError as error:
            raise OutputExistsError(
                f"what is made in this folder cannot be renamed ({error.strerror}), so the output could never get its "
                "name",
                where=path.parent,
                hint="convert to another file system and copy the finished output",
            ) from None

    def _check_written(self) -> None:
        """Check that each temporary name still stands for the file that was written, whole.

        Raises:
            InputOutputError: it does not.
        """
        for index, (path, file) in enumerate(zip(self.paths, self._plan.files, strict=True)):
            with os_errors(path, "looked at"):
                same = is_same_file(path, self._open[index])
                size = os.fstat(self._open[index]).st_size
            if not same:
                raise swapped(path)
            if size != file.nbytes:
                raise InputOutputError(
                    "the size differs from what was written", where=path, expected=file.nbytes, got=size
                )

    def _keep_open(self, index: int, flags: int) -> int:
        """Open a file and lock it until the end of the run.

        Raises:
            LockedError: another run has it.
            OSError: the system refused.
        """
        path = self.paths[index]
        while True:
            descriptor = open_file(path, flags)
            try:
                self._lock_open(descriptor, path)
                # The holder before us may have given the file its final name between our open and our lock.
                if is_same_file(path, descriptor):
                    self._open[index] = descriptor
                    return descriptor
            except BaseException:
                self._open.pop(index, None)
                if flags & os.O_EXCL:  # made just now
                    remove_known(path, descriptor)
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock_open(self, descriptor: int, path: Path) -> None:
        if self._lock:
            lock_open(descriptor, path)  # where there are no locks at all, the journal has a lock file

    def _make(self, index: int) -> None:
        """Make a file with its size and its header, or share the file of the source that has its bytes.

        Raises:
            FileFormatError: that file changed since its header was read.
        """
        source = self._plan.files[index].same_as
        descriptor = self._keep_open(index, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if source is not None:
            if _reflinked(source, descriptor):
                self.links[index] = REFLINK
                self._check_shared(index, source)
                return
            self._forget(index)
            if self._link(index, source):
                return
            self._keep_open(index, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self.links[index] = COPY
        self._size_up(index)

    def _forget(self, index: int) -> None:
        """Remove a file that was made just now, and close it."""
        with closing(self._open.pop(index)) as descriptor:
            remove_known(self.paths[index], descriptor)

    def _link(self, index: int, source: Path) -> bool:
        """Make a file by a hard link, and open it for reading; there is no lock on a file that is not this run's own.

        Raises:
            FileFormatError: as for ``_make``.
        """
        with os_errors(source, "linked"):
            if not hard_link(source, self.paths[index]):
                return False
        self._open[index] = open_file(self.paths[index], os.O_RDONLY)
        self.links[index] = HARD_LINK
        self._check_shared(index, source)
        return True

    def _check_shared(self, index: int, source: Path) -> None:
        """Check that a shared file is as the plan has it.

        Raises:
            FileFormatError: it is not.
        """
        file, descriptor = self._plan.files[index], self._open[index]
        size = os.fstat(descriptor).st_size
        if size != file.nbytes or os.pread(descriptor, file.header_bytes, 0) != file.header:
            raise FileFormatError(
                "changed during the conversion", where=source, hint="run again once nothing writes to the file"
            )

    def _take_over_shared(self, index: int, source: Path) -> bool:
        """Take over a file of an interrupted run that may be shared; return False where it is a copy.

        A file with other names is never opened for writing, whosever they are.

        Raises:
            ResumeError: it has other names and is not the source's file.
        """
        path = self.paths[index]
        status = _status(path)
        if status is None:
            self._make(index)
            return True
        with os_errors(source, "looked at"):
            is_source = os.path.samestat(status, source.stat())
        if not is_source:
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                raise ResumeError("not the file of the interrupted run", where=path, hint=FRESH_HINT)
            return False
        self._open[index] = open_file(path, os.O_RDONLY)
        self.links[index] = HARD_LINK
        self._check_shared(index, source)
        return True

    def _size_up(self, index: int) -> None:
        """Give an open file its size and its header."""
        descriptor, file = self._open[index], self._plan.files[index]
        if os.fstat(descriptor).st_size != file.nbytes:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, file.nbytes)
        write_all(descriptor, memoryview(file.header), 0)

    def _take_over(self, index: int, started: Collection[int], inodes: Sequence[int]) -> None:
        """Open the file of an interrupted run, or make it if that run died before.

        A file of which something was finished is not written before its checksums are compared. Any other must be
        the one that was made, by its inode number or, if the run died before it kept that, by how it begins.

        Raises:
            ResumeError: it is another file, which is left as it is.
        """
        path, source = self.paths[index], self._plan.files[index].same_as
        if source is not None and self._take_over_shared(index, source):
            return
        made = _status(path) is None
        descriptor = self._keep_open(index, os.O_RDWR | os.O_CREAT | os.O_EXCL if made else os.O_RDWR)
        if source is not None and index in started:
            self.links[index] = REFLINK if _reflinked(source, descriptor) else COPY
        if index in started:
            return
        if not made:
            header, known = self._plan.files[index].header, inodes[index : index + 1]
            begins = os.pread(descriptor, len(header), 0)
            if os.fstat(descriptor).st_ino not in known if known else not _is_part_of(begins, header):
                raise ResumeError("not the file of the interrupted run", where=path, hint=FRESH_HINT)
        if source is not None:
            self._forget(index)
            self._make(index)
            return
        self._size_up(index)

    def _check_size(self, index: int, started: Collection[int]) -> None:
        path, file = self.paths[index], self._plan.files[index]
        size = _size_of_regular(path)
        if size != file.nbytes and index in started:
            raise ResumeError(
                "file of the interrupted run is missing or changed",
                where=path,
                expected=f"{file.nbytes} bytes",
                got="no file" if size is None else f"{size} bytes",
                hint=FRESH_HINT,
            )


class FolderOutput(Outputs):
    """The files of one folder, which appears whole; it is made as ``OUT.partial``."""

    def __init__(self, plan: Plan, *, lock: bool = True) -> None:
        super().__init__(plan, lock=lock)
        self._final = plan.destination
        self._root = partial_path(plan.destination)
        self._names = frozenset(file.name for file in plan.files)
        self._folders = folders_of_names(self._names)
        # A file that this run alone has, by whose inode number the folder is known again.
        self._own = next((index for index, file in enumerate(plan.files) if file.same_as is None), 0)
        self.paths = [self._root / file.name for file in plan.files]
        self._folder: int | None = None

    def final(self) -> list[Path]:
        """Return the folder's name."""
        return [self._final]

    def temporary(self) -> list[Path]:
        """Return the folder's temporary name."""
        return [self._root]

    def look(self) -> None:
        """Keep in mind the folder and its files too."""
        super().look()
        self.held = held_in(self._final) if self.replaces[0] is not None else {}

    def _found_work(self) -> dict[str, Identity]:
        status = _status(self._root)
        return held_in(self._root) if status is not None and stat.S_ISDIR(status.st_mode) else {}

    def _work_folder(self) -> Path:
        return self._root

    def check_absent(self, overwrite: bool) -> None:
        """Check that the folder is not there, is empty, or may be replaced."""
        final = self._final
        check_parent(final)
        check_name_fits(final, SUFFIXES)
        if os.path.lexists(final):
            if is_link(final) or not is_folder(final):
                what = "is a link" if is_link(final) else "already exists, and is no folder"
                hint = (
                    f"pass the target of the link, {os.path.realpath(final)}"
                    if is_link(final)
                    else "choose another name"
                )
                raise OutputExistsError(what, where=final, hint=hint)
            check_no_mount_point(final)
            self._check_replaceable(final, overwrite)
        check_none_replaced(final)
        self._check_as_looked()

    def _check_replaceable(self, folder: Path, overwrite: bool) -> None:
        """Check that a folder may be replaced: it is empty, or unasked-for things are not lost with it."""
        with os_errors(folder, "read"):
            if any(folder.iterdir()) and not overwrite:
                raise OutputExistsError(
                    "already exists and is not empty", where=folder, hint="pass --overwrite to replace the output"
                )
            for entry in entries_within(folder, self._may_open):
                name = os.path.relpath(entry.path, folder)
                if entry.is_dir() or not self._may_hold(name):
                    raise OutputExistsError(
                        f"contains {name}, which no conversion wrote",
                        where=folder,
                        hint="move that file away or choose another folder",
                    )

    def _may_open(self, name: str) -> bool:
        """Return whether a folder of this name in the folder is one that a conversion makes."""
        return name in self._folders or CHECKPOINT_FOLDER.fullmatch(name) is not None

    def _may_hold(self, name: str) -> bool:
        """Return whether a file of this name in the folder is one that a conversion writes, this one or an older."""
        return name in self._names or CHECKPOINT_FILE.fullmatch(name) is not None

    def check_not_taken(self) -> None:
        """Check that nothing but the work, or the older folder as it was, stands under the final name."""
        final, old = self._final, self._old()
        if self._root == final:
            return
        now = Identity.of(final)
        if now is not None and (now != old or held_in(final) != self.held):
            raise appeared(final)

    def _old(self) -> Identity | None:
        """Return the identity of the older folder that is replaced, None where there was none."""
        return self.replaces[0] if self.replaces else None

    def create(self) -> None:
        """Make the folder and its files."""
        root = self._root
        remove_trial(trial_path(self._final))
        if os.path.lexists(root) and (is_link(root) or not is_folder(root)):
            raise OutputExistsError(
                "already exists and is not a working folder of dsv4convert", where=root, hint="remove that folder"
            )
        with os_errors(root, "created"):
            existed = exists(root)
            root.mkdir(exist_ok=True)
            if not existed:
                self._made.add(root)
            self._hold_folder(root)
            # Looked at once: what comes after this, or came after the run began, is somebody else's.
            found = [(os.path.relpath(entry.path, root), entry) for entry in entries_within(root, self._may_open)]
            entries = {name: Identity.of(root / name) for name, entry in found if not entry.is_dir()}
            if any(identity != self.discards.get(name) for name, identity in entries.items()):
                raise appeared(root)
            for name, entry in found:
                # A run that was killed at its start can leave folders without files.
                is_ours = self._may_open(name) if entry.is_dir(follow_symlinks=False) else self._may_hold(name)
                if not is_ours or (entry.is_symlink() and entry.is_dir()):
                    raise OutputExistsError(
                        f"contains {name}, which does not belong to this output",
                        where=root,
                        hint="remove that file",
                    )
            self._made.add(root)
            for name, identity in entries.items():
                remove_known(root / name, identity)
            _remove_folders(root, [os.path.relpath(path, root) for path, _, _ in os.walk(root) if path != str(root)])
            self._try_names(root)
            self._make_folders(root)
            for index in range(len(self.paths)):
                self._make(index)
                if not index and os.path.lexists(self._final):
                    check_folder_can_be_replaced(self._final, root)
        self._sync_names()

    def reopen(self, started: Collection[int], finished: Collection[int], inodes: Sequence[int]) -> None:
        """Take over the folder, under its temporary or, after a late kill, its final name."""
        root, final = self._root, self._final
        remove_trial(trial_path(final))
        own = self._own
        is_own = _inode(final / self._plan.files[own].name) in inodes[own : own + 1]
        in_place = len(finished) == len(self.paths) and is_own
        if in_place:
            self._move_paths(final)
            root = final
        elif os.path.lexists(root) and (is_link(root) or not is_folder(root)):
            raise ResumeError("not a working folder of dsv4convert", where=root, hint=FRESH_HINT)
        with os_errors(root, "created"):
            root.mkdir(exist_ok=True)
            self._hold_folder(root)
            self._make_folders(root)
        self._made.add(root)
        for index in range(len(self.paths)):
            self._check_size(index, started)
            with os_errors(self.paths[index], "opened"):
                self._take_over(index, started, inodes)
        if not in_place:
            self._sync_names()

    def _hold_folder(self, root: Path) -> None:
        """Lock the folder, so that no other run makes its files anew while this one writes them."""
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._lock_open(descriptor, root)
        except BaseException:
            os.close(descriptor)
            raise
        self._folder = descriptor

    def _make_folders(self, root: Path) -> None:
        """Make the folders within the folder."""
        for name in self._folders:
            (root / name).mkdir(exist_ok=True)

    def _sync_names(self) -> None:
        """Make the names of the temporary files durable, before a journal speaks of their bytes."""
        self._sync_folders()
        sync_folder(self._root.parent)

    def _sync_folders(self) -> None:
        """Make the names in the folder durable, and those in the folders within it."""
        for name in reversed(self._folders):
            sync_folder(self._root / name)
        sync_folder(self._root)

    def finish(self) -> None:
        """Give the folder its name; an older one leaves in the same step, where the system can."""
        self.sync(set(range(len(self.paths))))
        root, final, old = self._root, self._final, self._old()
        self._sync_folders()
        self._check_written()
        if self._folder is None or not is_same_file(root, self._folder):
            raise InputOutputError("no longer the folder that was written", where=root, hint=APPEARED_HINT)
        with os_errors(final, "renamed"):
            if root != final:
                self.check_not_taken()
                take_final_name(root, final, self._folder, old, replaced_path(final))
                self._check_renamed(old)
        sync_folder(final.parent)  # the new name is durable before anything of the older output goes
        with os_errors(final, "removed"):
            self._clear_up(old)
        sync_folder(final.parent)

    def _check_renamed(self, old: Identity | None) -> None:
        """Look at the files once more; if one was swapped before the folder had its name, the name is given back.

        Raises:
            InputOutputError: one was.
        """
        root, final = self._root, self._final
        self._move_paths(final)
        try:
            self._check_written()
        except InputOutputError:
            if old is None or Identity.of(root) != old or not exchange(final, root):
                rename_new(final, root)
                if old is not None and Identity.of(replaced_path(final)) == old:
                    rename_new(replaced_path(final), final)
            self._move_paths(root)
            raise

    def _move_paths(self, root: Path) -> None:
        """Note the name that the folder has now."""
        self._root = root
        self.paths = [root / file.name for file in self._plan.files]

    def _clear_up(self, old: Identity | None) -> None:
        """Remove the older output, under whichever name it has now; nothing else has its identity."""
        for path in (partial_path(self._final), replaced_path(self._final)):
            if old is not None:
                remove_known_folder(path, old, self.held)

    def discard(self) -> None:
        """Remove the files of this run, and the temporary folder if nothing else is in it."""
        root = self._root
        if root not in self._made or root == self._final:
            return
        for index, descriptor in self._open.items():
            remove_known(self.paths[index], descriptor)
        _remove_folders(root, self._folders)
        for path in (root, trial_path(self._final)):
            with contextlib.suppress(OSError):
                path.rmdir()

    def close(self) -> None:
        """Close the files and the folder."""
        super().close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


class FileOutputs(Outputs):
    """Files that appear one by one in a folder that is there; each is made as ``NAME.partial``."""

    def __init__(self, plan: Plan, *, lock: bool = True) -> None:
        super().__init__(plan, lock=lock)
        self._finals = plan.final_paths()
        self._partials = [partial_path(final) for final in self._finals]
        self.paths = list(self._partials)

    def final(self) -> list[Path]:
        """Return the files' names."""
        return self._finals

    def temporary(self) -> list[Path]:
        """Return the files' temporary names."""
        return self._partials

    def _found_work(self) -> dict[str, Identity]:
        return {path.name: identity for path in self._partials if (identity := _identity(path)) is not None}

    def _work_folder(self) -> Path:
        return self._plan.destination

    def check_absent(self, overwrite: bool) -> None:
        """Check that no file is there, or that it may be replaced."""
        for final in self._finals:
            check_new_file(final, overwrite)
        check_none_replaced(self._finals[0])
        self._check_as_looked()

    def create(self) -> None:
        """Make the files."""
        remove_trial(trial_path(self._finals[0]))
        for index, path in enumerate(self.paths):
            self._remove_leftover(index)
            with os_errors(path, "created"):
                self._made.add(path)
                self._keep_open(index, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                if not index:
                    self._try_names(path)
                self._size_up(index)
        self._sync_names()

    def check_not_taken(self) -> None:
        """Check that nothing but the work, or the older files, stands under the final names."""
        replaces = self.replaces or [None] * len(self.paths)
        for path, final, old in zip(self.paths, self._finals, replaces, strict=True):
            now = Identity.of(final)
            if path != final and now is not None and now != old:
                raise appeared(final)

    def _remove_leftover(self, index: int) -> None:
        """Remove a temporary file of an older run, unless a run still has it."""
        path = self.paths[index]
        with os_errors(path, "removed"):
            if not os.path.lexists(path):
                return
            if is_link(path) or not is_file(path):
                raise OutputExistsError(
                    "already exists and is not a working file of dsv4convert", where=path, hint="remove that file"
                )
            self._keep_open(index, os.O_RDONLY)
            with closing(self._open.pop(index)) as descriptor:
                if Identity.in_status(os.fstat(descriptor)) != self._leftovers.get(path):
                    raise appeared(path)
                remove_known(path, descriptor)

    def reopen(self, started: Collection[int], finished: Collection[int], inodes: Sequence[int]) -> None:
        """Take over the files, each under its temporary or, after a late kill, its final name."""
        remove_trial(trial_path(self._finals[0]))
        for index, (partial, final) in enumerate(zip(self._partials, self._finals, strict=True)):
            in_place = index in finished and index in started and _inode(final) in inodes[index : index + 1]
            self.paths[index] = final if in_place else partial
            self._check_size(index, started)
            with os_errors(self.paths[index], "opened"):
                if not in_place:
                    self._made.add(partial)
                self._take_over(index, started, inodes)
        self._sync_names()

    def _sync_names(self) -> None:
        """Make the names of the temporary files durable, before a journal speaks of their bytes."""
        sync_folder(self._plan.destination)

    def finish(self) -> None:
        """Give the files their names.

        Readers find the parts of a split by the first one. An older first part leaves before any new part comes, and
        the new one comes last, so that no reader takes a mixture.
        """
        self.sync(set(range(len(self.paths))))
        self._check_written()
        self.check_not_taken()
        replaces = self.replaces or [None] * len(self.paths)
        first, first_old = self._finals[0], replaces[0]
        is_split = len(self.paths) > 1
        with os_errors(first, "renamed"):
            if is_split and first_old is not None and self.paths[0] != first and Identity.of(first) == first_old:
                rename_new(first, replaced_path(first))
                sync_folder(self._plan.destination)
        for index, path, final, old in reversed(
            list(zip(range(len(self.paths)), self.paths, self._finals, replaces, strict=True))
        ):
            with os_errors(final, "renamed"):
                if path != final:
                    if is_split and not index:
                        sync_folder(self._plan.destination)
                    take_final_name(path, final, self._open[index], old)
                remove_known(partial_path(final), old)  # after a kill too, which came when the two had changed places
        sync_folder(self._plan.destination)
        with os_errors(first, "removed"):
            remove_known(replaced_path(first), first_old)

    def discard(self) -> None:
        """Remove the temporary files."""
        for index, descriptor in self._open.items():
            if self.paths[index] in self._made:
                remove_known(self.paths[index], descriptor)
        if 0 in self._open:
            remove_known(trial_path(self._finals[0]), self._open[0])


# Names next to an output that are made with it.
SUFFIXES = (
    *(PARTIAL_SUFFIX, REPLACED_SUFFIX, TRIAL_SUFFIX),
    *(JOURNAL_SUFFIX, MANIFEST_SUFFIX, MANIFEST_SUFFIX + PARTIAL_SUFFIX, LOCK_SUFFIX),
)


def check_new_file(path: Path, overwrite: bool) -> None:
    """Check that a file can be made under a name, or that the one that is there may be replaced.

    Raises:
        OutputExistsError: the folder is missing, or something is there that is no file or not to be replaced.
    """
    check_parent(path)
    check_name_fits(path, SUFFIXES)
    if not os.path.lexists(path):
        return
    if is_folder(path) or not (is_link(path) or is_file(path)):
        raise OutputExistsError("already exists and is not a file", where=path, hint="choose another name")
    if not overwrite:
        raise OutputExistsError("already exists", where=path, hint="pass --overwrite to replace the output")
    check_file_can_be_replaced(path)


def outputs_of(plan: Plan, *, lock: bool = True) -> Outputs:
    """Return the outputs of a plan: a folder, or files."""
    return FolderOutput(plan, lock=lock) if plan.is_folder else FileOutputs(plan, lock=lock)


def _is_part_of(begins: bytes, header: bytes) -> bool:
    """Return whether a file begins as one whose header was being written: a kill ends a write after any page."""
    return all(
        header[start : start + PAGE_BYTES].startswith(begins[start : start + PAGE_BYTES].rstrip(b"\0"))
        for start in range(0, len(begins), PAGE_BYTES)
    )


def appeared(path: Path) -> OutputExistsError:
    """Return the error of a name that something else took while the run lasted."""
    return OutputExistsError(
        "appeared or changed during the conversion and is left in place", where=path, hint=APPEARED_HINT
    )


def swapped(path: Path) -> InputOutputError:
    """Return the error of a temporary name that does not stand for the file that was written."""
    return InputOutputError(
        "no longer the file that was written", where=path, hint="restore the file that was moved or replaced"
    )


def check_parent(path: Path) -> None:
    """Check that the folder in which an output will appear is there, and lets files be made.

    Raises:
        OutputExistsError: it is not.
        InputOutputError: it cannot be looked at.
    """
    with os_errors(path.parent, "looked at"):
        status = path.parent.stat() if os.path.exists(path.parent) else None
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise OutputExistsError("output folder is missing", where=path.parent, hint="create the folder first")


def check_none_replaced(path: Path) -> None:
    """Check that no killed run left an older output under the name that it has while it is replaced.

    Raises:
        OutputExistsError: one did.
    """
    old = replaced_path(path)
    if os.path.lexists(old):
        raise OutputExistsError(
            "an older output that a killed run left under this name", where=old, hint="rename or remove that file"
        )


def open_file(path: Path, flags: int) -> int:
    """Open a regular file of ours; a pipe or a device under its name is refused.

    Raises:
        OutputExistsError: it is no regular file.
        OSError: the system refused.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.EMFILE and _raise_open_files():
            return open_file(path, flags)
        if error.errno in (errno.ENXIO, errno.ELOOP, errno.ENODEV, errno.EISDIR):
            raise OutputExistsError(
                "already exists and is not a regular file", where=path, hint="move that file away"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputExistsError("already exists and is not a regular file", where=path, hint="move that file away")
    return descriptor


def lock_open(descriptor: int, path: Path) -> None:
    """Lock an open file or folder until it is closed, where the file system has locks.

    Raises:
        LockedError: another run has it.
        OSError: the system refused.
    """
    try:
        try_lock(descriptor, path)
    except BlockingIOError:
        raise LockedError(
            "another run is writing this output", where=path, hint="wait for the other run or stop it"
        ) from None


def _raise_open_files() -> bool:
    """Let this process open as many files as it may at all; return whether that is more than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def replaced_path(path: Path) -> Path:
    """Return the name that an older output has while its successor takes its place."""
    return path.with_name(path.name + REPLACED_SUFFIX)


def trial_path(path: Path) -> Path:
    """Return the name by which a run tries whether names can be changed next to an output."""
    return path.with_name(path.name + TRIAL_SUFFIX)


def remove_trial(path: Path) -> None:
    """Remove what a run left that was killed while it tried names: an empty file or folder, which holds nothing.

    Raises:
        OutputExistsError: something else has the name.
    """
    with os_errors(path, "removed"), contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            with contextlib.suppress(OSError):
                path.rmdir()
        elif stat.S_ISREG(status.st_mode) and not status.st_size:
            remove_known(path, Identity.in_status(status))
        if os.path.lexists(path):
            raise OutputExistsError(
                "already exists and is not of dsv4convert", where=path, hint="move it away or choose another name"
            )


def _reflinked(source: Path, output: int) -> bool:
    """Let an open file share the blocks of ``source``; return False where that cannot be."""
    with os_errors(source, "linked"):
        return reflink(source, output)


def held_in(folder: Path) -> dict[str, Identity]:
    """Return the identity of each file of a folder, by name from there; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return {
            os.path.relpath(entry.path, folder): Identity.in_status(entry.stat(follow_symlinks=False))
            for entry in entries_within(folder, opens=lambda name: True)
        }
    return {}


def _remove_folders(root: Path, names: Sequence[str]) -> None:
    """Remove folders within a folder, as far as nothing is in them; ``names`` has outer ones first."""
    for name in reversed(names):
        with contextlib.suppress(OSError):
            (root / name).rmdir()


def _status(path: Path) -> os.stat_result | None:
    """Return the status of what ``path`` names itself, None where it cannot be told."""
    try:
        return path.lstat()
    except OSError:
        return None


def _identity(path: Path) -> Identity | None:
    status = _status(path)
    return None if status is None else Identity.in_status(status)


def _inode(path: Path) -> int | None:
    status = _status(path)
    return None if status is None else status.st_ino


def _size_of_regular(path: Path) -> int | None:
    """Return the size of a regular file, None where there is none; links are not followed."""
    status = _status(path)
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def take_final_name(path: Path, final: Path, descriptor: int, old: Identity | None, aside: Path | None = None) -> None:
    """Give an open file or folder its final name; see ``take_name``.

    Raises:
        OutputExistsError: something else took the name; all is as it was.
        InputOutputError: something else stands under the temporary name.
    """
    try:
        take_name(path, final, descriptor, old, aside)
    except FileExistsError:
        raise appeared(final) from None
    except FileNotFoundError:
        raise swapped(path) from None


def check_no_partial(path: Path) -> None:
    """Check that nothing stands under the temporary name of ``path``, as a run that was killed leaves it.

    Raises:
        OutputExistsError: something does.
    """
    if os.path.lexists(partial_path(path)):
        raise OutputExistsError("already exists", where=partial_path(path), hint="move that file away")


def write_file(path: Path, pieces: Iterable[bytes | memoryview], replaced: Identity | None) -> None:
    """Write a file that appears under its name whole and durable, in place of what it replaces, if anything.

    Raises:
        OutputExistsError: something else has its name, or its temporary name.
        SpaceError, InputOutputError: the system refused.
    """
    partial = partial_path(path)
    check_no_partial(path)
    with os_errors(path, "written"):
        with closing(open_file(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL)) as descriptor:
            try:
                position = 0
                for piece in pieces:
                    write_all(descriptor, memoryview(piece), position)
                    position += memoryview(piece).nbytes
                os.fsync(descriptor)
                take_final_name(partial, path, descriptor, replaced)
            except BaseException:
                remove_known(partial, descriptor)
                raise
        remove_known(partial, replaced)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    with os_errors(folder, "flushed"), closing(os.open(folder, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        os.fsync(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a short write goes on where it stopped."""
    view = data.cast("B") if data.nbytes else data
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def free_bytes(folder: Path) -> int:
    """Return the bytes that an ordinary user can still write on the file system of ``folder``."""
    return shutil.disk_usage(nearest_folder(folder)).free
