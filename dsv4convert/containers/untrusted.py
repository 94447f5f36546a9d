"""Opens untrusted files safely: regular files only, with a size limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import Dsv4Error, FileFormatError, InputOutputError, not_read
from . import sources

# What a read of a few bytes reads ahead. With the 128 KiB of Python 3.14, probes all over a model take eight times as
# long.
BUFFER_BYTES = 2**13


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, links followed; a pipe or a device would wait for ever or never end.

    Of a stand-in, the remote file is opened (see ``sources``).

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
    """
    remote = sources.at(path)
    if remote is not None:
        return remote.open()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:  # a NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, "not a file name") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    # Not above: Ctrl-C can come when the file has the descriptor already, and it would be closed twice.
    return os.fdopen(descriptor, "rb", BUFFER_BYTES)


def file_size(file: BinaryIO) -> int:
    """Return the size in bytes of a file just opened with ``open_regular``."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def fill(view: memoryview, descriptor: int, offset: int, where: Path) -> None:
    """Fill ``view`` with the bytes at ``offset`` of an open file, whose name is ``where``.

    Raises:
        InputOutputError: the file ends before.
        OSError: the system refused.
    """
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise shrank(where)
        view, offset = view[count:], offset + count


def shrank(where: Path) -> InputOutputError:
    """Return the error of a file that ends before what its header says of it."""
    return InputOutputError(
        "the file shrank while being read", where=where, hint="was the file replaced during the run?"
    )


def read_whole(path: Path, max_bytes: int, *, error: type[Dsv4Error] = FileFormatError) -> bytes:
    """Return the content of a regular file of at most ``max_bytes``; no more than that is ever read.

    Raises:
        InputMissingError: it is not there, or is no regular file.
        InputOutputError: the system refused to read it.
        ``error``: it is larger.
    """
    try:
        with open_regular(path) as file:
            content = file.read(max_bytes + 1)
    except OSError as reason:
        raise not_read(path, reason) from None
    if len(content) > max_bytes:
        raise error("too large", where=path, expected=f"at most {max_bytes} bytes")
    return content
