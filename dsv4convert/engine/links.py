"""Files of an output that are files of the source: shared with it where the file system can, and copied elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ..containers.sources import at
from ..plan import OutputFile
from .names import closing, nearest_folder

# How a file came to be, as the manifest says it. A reflink shares the source's blocks until one of the two is
# written; a hard link is the source's file under another name.
REFLINK, HARD_LINK, COPY = "reflink", "hard link", "copy"

# FICLONE of <linux/fs.h>: _IOW(0x94, 9, int).
FICLONE = 0x40049409

# What a kernel or a file system says that cannot share: another device, no such operation, or a file of somebody else.
REFUSED = frozenset(
    {
        *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EINVAL),
        *(errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EBADF),
    }
)


def reflink(source: Path, output: int) -> bool:
    """Let the open file ``output`` share the blocks of ``source``; return False where that cannot be.

    Raises:
        OSError: the system refused for another reason.
    """
    if at(source) is not None:  # a stand-in
        return False
    with closing(os.open(source, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        return _is_shared(lambda: fcntl.ioctl(output, FICLONE, descriptor))


def hard_link(source: Path, path: Path) -> bool:
    """Give the file ``source`` the name ``path`` too; return False where that cannot be.

    Links are followed: the hub's cache keeps a snapshot as links to its files.

    Raises:
        OSError: the system refused for another reason.
    """
    if at(source) is not None:  # a stand-in
        return False
    return _is_shared(lambda: os.link(os.path.realpath(source), path))


def _is_shared(share: Callable[[], object]) -> bool:
    """Share; return False where that cannot be."""
    try:
        share()
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return False
    return True


def can_share(file: OutputFile, folder: Path) -> bool:
    """Return whether an output file in ``folder`` is a file of the source on the same file system."""
    if file.same_as is None or at(file.same_as) is not None:
        return False
    try:
        return file.same_as.stat().st_dev == nearest_folder(folder).stat().st_dev
    except OSError:
        return False


def shared_bytes(files: tuple[OutputFile, ...], folder: Path) -> int:
    """Return the bytes of the output files that need no room in ``folder``."""
    return sum(file.nbytes for file in files if can_share(file, folder))
