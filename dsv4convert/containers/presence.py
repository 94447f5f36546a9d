"""Whether a path is there, and what it is.

Python 3.14's ``pathlib`` answers no for what may not be looked at, so that a folder without permission
would be a missing one. These functions answer no only where there is nothing, and raise otherwise, in
every version of Python.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})


def exists(path: Path) -> bool:
    """Return whether there is anything at ``path``, links followed.

    Raises:
        OSError: the path may not be looked at, or cannot be.
    """
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a regular file, links followed.

    Raises:
        OSError: the path may not be looked at, or cannot be.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder, links followed.

    Raises:
        OSError: the path may not be looked at, or cannot be.
    """
    return stat.S_ISDIR(_mode(path))


def is_link(path: Path) -> bool:
    """Return whether ``path`` itself is a symbolic link.

    Raises:
        OSError: the path may not be looked at, or cannot be.
    """
    return stat.S_ISLNK(_mode(path, follow_symlinks=False))


def _mode(path: Path, *, follow_symlinks: bool = True) -> int:
    """Return the mode that ``stat`` gives, 0 where there is nothing."""
    try:
        return os.stat(path, follow_symlinks=follow_symlinks).st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return 0
        raise
    except ValueError:  # a NUL, or half a surrogate pair: no file has such a name
        return 0
