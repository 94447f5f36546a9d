"""Names of files and folders, changed without harm to what is somebody else's.

A name is taken only where nothing stands under it, or where what stands there is the very thing that is to be
replaced. The kernel decides that in the same step where it can (renameat2); elsewhere a hard link, which refuses an
existing name, or a look just before the rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..containers.presence import exists, is_folder
from ..errors import OutputExistsError

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

# What to do about a file system that takes no writes.
ANOTHER_FOLDER = "choose another folder for the output"

# What an old kernel, or a file system without the flags, answers to renameat2.
_WITHOUT_FLAGS = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})


class Identity(NamedTuple):
    """What stands under a name: device, inode, and when its content last changed, in ns (of a folder, its entries)."""

    device: int
    inode: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Identity | None:
        """Return the identity of what ``path`` names itself, links not followed; None where there is nothing."""
        try:
            return cls.in_status(path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def in_status(cls, status: os.stat_result) -> Identity:
        """Return the identity of what a status tells of."""
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns)

    @classmethod
    def from_json(cls, value: Any) -> Identity | None:
        """Return the identity in a journal's line, None where it says that there was nothing.

        Raises:
            ValueError, TypeError: it is neither.
        """
        return None if value is None else cls(*map(int, value))


@contextlib.contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Yield a descriptor, which is closed after the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_same_file(path: Path, descriptor: int) -> bool:
    """Return whether ``path`` names the file that ``descriptor`` has open; links are not followed."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def not_ours(path: Path, what: str) -> OutputExistsError:
    """Return the error of a name that stands for something else than ``what`` of this program."""
    hint = "move that file away or choose another name"
    return OutputExistsError(f"already exists and is not {what}", where=path, hint=hint)


def nearest_folder(folder: Path) -> Path:
    """Return ``folder``, or the nearest folder above it that is there."""
    while not exists(folder):
        folder = folder.parent
    return folder


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name under which nothing stands.

    Raises:
        FileExistsError: something stands there; it is left alone, and ``source`` keeps its name.
        OSError: the system refused.
    """
    try:
        _renameat2(source, target, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _WITHOUT_FLAGS:
            raise
    else:
        return
    if not stat.S_ISDIR(source.lstat().st_mode):
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:
            pass  # a file system without hard links
        else:
            os.unlink(source)
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; return False, with nothing done, where the system cannot.

    Raises:
        OSError: the system refused for another reason.
    """
    try:
        _renameat2(one, other, RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _WITHOUT_FLAGS:
            raise
        return False
    return True


def take_name(source: Path, target: Path, descriptor: int, old: Identity | None, aside: Path | None = None) -> None:
    """Rename ``source``, which ``descriptor`` has open, to ``target``, in place of ``old`` where that stands there.

    What it replaces is under the name ``source`` afterwards, or ``aside``, or (a file, where the system cannot let
    names change places) gone.

    Raises:
        FileExistsError: something else stands under ``target``; all is as it was.
        FileNotFoundError: something else stands under ``source``; all is as it was.
        OSError: the system refused.
    """
    now = Identity.of(target)
    if now is not None and now != old:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    exchanged = now is not None and not is_overlay(target.parent) and exchange(source, target)
    moved = False
    if not exchanged:
        if now is not None and aside is None:
            os.replace(source, target)
        else:
            if now is not None and aside is not None:
                rename_new(target, aside)
                moved = True
            try:
                rename_new(source, target)
            except OSError:
                if moved and aside is not None:
                    _give_back(aside, target)
                raise
    # Somebody can have been quicker than the looks: then all names go back.
    is_ours = is_same_file(target, descriptor)
    if is_ours and not (exchanged and Identity.of(source) != old):
        return
    if not (exchanged and exchange(source, target)):
        rename_new(target, source)
        if moved and aside is not None:
            _give_back(aside, target)
    number = errno.EEXIST if is_ours else errno.ENOENT
    raise OSError(number, os.strerror(number), str(target if is_ours else source))


def _give_back(aside: Path, target: Path) -> None:
    """Give what was moved aside its name again, unless somebody else has taken that."""
    with contextlib.suppress(OSError):
        rename_new(aside, target)


def remove_known(path: Path, known: Identity | int | None) -> None:
    """Remove the file at ``path`` if it is the known one, by its identity or by the descriptor that has it open."""
    if known is None:
        return
    same = is_same_file(path, known) if isinstance(known, int) else Identity.of(path) == known
    if same:
        path.unlink(missing_ok=True)


def remove_known_folder(path: Path, known: Identity, held: Mapping[str, Identity]) -> None:
    """Remove the folder at ``path`` if it is the known one, with the files that it is known to have held, in order.

    Whatever else is in it, or has changed since, stays, and the folder with it.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    with closing(folder) as descriptor:
        now = Identity.in_status(os.fstat(descriptor))
        if now[:2] != known[:2]:  # its time changes as its files go, in this run or in one that was killed
            return
        for name, identity in held.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if Identity.in_status(status) == identity:
                    os.unlink(name, dir_fd=descriptor)
        for name in reversed(folders_of_names(held)):
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=descriptor)
    with contextlib.suppress(OSError):  # somebody's file is in it, and stays
        path.rmdir()


def folders_of_names(names: Iterable[str]) -> list[str]:
    """Return the folders within a folder in which files of these names lie, outer ones first.

    >>> folders_of_names(["a/b/file", "a/file", "file"])
    ['a', 'a/b']
    """
    return sorted({str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."})


def entries_within(folder: Path, opens: Callable[[str], bool], within: str = "") -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, and in place of folders that ``opens`` accepts by name the entries of those.

    The path of an entry begins with ``folder``. An empty folder is an entry; links are not followed.

    Raises:
        OSError: the system refused.
    """
    with os.scandir(folder / within) as entries:
        for entry in entries:
            name = within + entry.name
            if entry.is_dir(follow_symlinks=False) and opens(name):
                is_empty = True
                for found in entries_within(folder, opens, name + "/"):
                    is_empty = False
                    yield found
                if is_empty:
                    yield entry
            else:
                yield entry


def try_rename(path: Path, trial: Path) -> None:
    """Rename ``path`` to a trial name and back, to see what its folder and its file system say to that.

    Raises:
        OSError: a rename is refused, or somebody took a name; ``path`` can then be under the trial name.
    """
    rename_new(path, trial)
    rename_new(trial, path)


def check_file_can_be_replaced(path: Path) -> None:
    """Check that the file at ``path`` could give its name away, by an attempt that passes all checks but the last.

    ``rmdir`` asks the system for everything that a removal takes (the folder's permissions, owners in a sticky
    folder, attributes), and then refuses because it is no folder.

    Raises:
        OutputExistsError: it could not.
    """
    check_no_mount_point(path)
    _attempt(lambda: os.rmdir(path), path, {errno.ENOTDIR})


def check_folder_can_be_replaced(path: Path, full: Path) -> None:
    """Check that the folder at ``path`` could give its name away, by an attempt that passes all checks but the last.

    It is renamed to the name of the folder ``full``, which the system refuses, because that is not empty.

    Raises:
        OutputExistsError: it could not.
    """
    check_no_mount_point(path)
    _attempt(lambda: _rename_in_vain(path, full), path, {errno.ENOTEMPTY, errno.EEXIST})


def _rename_in_vain(path: Path, full: Path) -> None:
    os.rename(path, full)
    rename_new(full, path)  # somebody has just emptied ``full``: the name goes back at once


def _attempt(change: Callable[[], None], path: Path, expected: Collection[int]) -> None:
    """Try a change that must fail in the expected way, or else say why it is refused."""
    try:
        change()
    except FileNotFoundError:
        return  # it has gone meanwhile
    except OSError as error:
        if error.errno in expected or not os.path.lexists(path):  # a file system that takes no writes looks up no name
            return
        if error.errno == errno.EXDEV:
            raise OutputExistsError(
                "lies in a lower layer of an overlay, where folders can be copied and not renamed",
                where=path,
                hint="choose another name, or remove that folder first",
            ) from None
        hint = "choose another name, or see who owns that output and its folder"
        raise OutputExistsError(
            f"could not be replaced ({error.strerror})",
            where=path,
            hint=ANOTHER_FOLDER if error.errno == errno.EROFS else hint,
        ) from None


def check_no_mount_point(path: Path) -> None:
    """Check that nothing is mounted on ``path``: no rename takes a name from a mount point.

    Raises:
        OutputExistsError: something is.
    """
    if not os.path.lexists(path) or not _is_mount_point(path):
        return
    hint = "choose a name inside the mount point" if is_folder(path) else "choose another name"
    raise OutputExistsError(
        "a mount point cannot be replaced", where=path, hint=f"{hint}, or copy the finished output into its place"
    )


def check_name_fits(path: Path, suffixes: tuple[str, ...]) -> None:
    """Check that the file system takes a name with each suffix.

    Raises:
        OutputExistsError: one is too long.
    """
    try:
        most = os.pathconf(path.parent if is_folder(path.parent) else ".", "PC_NAME_MAX")
    except (OSError, ValueError):
        return
    longest = max((path.name + suffix for suffix in suffixes), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > most:
        raise OutputExistsError(
            "the name is too long with the suffixes of unfinished outputs",
            where=path,
            expected=f"at most {most - len(os.fsencode(longest)) + len(os.fsencode(path.name))} bytes",
            got=len(os.fsencode(path.name)),
            hint="choose a shorter name",
        )


def is_overlay(folder: Path) -> bool:
    """Return whether ``folder`` lies in an overlay, which copies an old file whole to let it change places."""
    try:
        device = folder.stat().st_dev
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(mount.device == number and mount.kind == "overlay" for mount in _mounts())


def _is_mount_point(path: Path) -> bool:
    """Return whether something is mounted on ``path``, a bind-mounted file too."""
    if is_folder(path) and os.path.ismount(path):
        return True
    wanted = os.path.join(os.path.realpath(path.parent), path.name)
    return any(mount.point == wanted for mount in _mounts())


def kind_of_file_system(path: Path) -> str | None:
    """Return the kind of the file system that ``path`` lies on, as the mount table has it; None if it does not tell."""
    where = Path(os.path.realpath(path))
    found = [mount for mount in _mounts() if where.is_relative_to(mount.point)]
    return max(found, key=lambda mount: len(mount.point)).kind if found else None


class _Mount(NamedTuple):
    """A line of the mount table: the file system's number, where it is mounted, and its kind."""

    device: str
    point: str
    kind: str


def _mounts() -> Iterator[_Mount]:
    """Yield what is mounted for this process; nothing where that cannot be told."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if len(fields) > 4:
            # Spaces and the like are octal there.
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            yield _Mount(fields[2], point, kind)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    call = _libc_renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def _libc_renameat2() -> Any:
    """Return the C library's renameat2, None where it has none (before glibc 2.28)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_int
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
