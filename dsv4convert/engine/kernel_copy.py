"""Copies between files inside the kernel: bytes that only move never enter this process, save for a look at them.

Bytes that need no look are moved by ``copy_file_range``. For a checksum they must be seen once: there,
``splice`` lays references to the source's pages into a pipe, ``tee`` doubles the references, and one of the
two sets is written to the output while the other is read. So the checksum is of the very pages that were
written, and the source is looked up once, not once for the copy and once for the checksum.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from functools import cache

# What a pipe is asked to hold; without privileges the kernel allows no more (pipe(7), pipe-max-size).
PIPE_BYTES = 2**20

# Kernel copies are refused across some file systems, by some of them, and on old kernels.
REFUSED = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EMFILE, errno.ENFILE}
)


class KernelCopier:
    """One worker's copies; use it as a context manager.

    Both ways of copying return the bytes moved, which can be fewer than asked for. They return 0 where the
    source ends, where the kernel refuses, and for every error: the caller then reads and writes the bytes
    itself, from the same place on, and whatever is wrong shows there, as an error of the source or of the
    output. What was refused for good is not tried again.
    """

    def __init__(self) -> None:
        self._refused: set[Callable[..., int]] = set()
        self._whole: tuple[int, int] | None = None  # read and write end: the pages on their way to the output
        self._shown: tuple[int, int] | None = None  # the same pages again, to be read

    def __enter__(self) -> KernelCopier:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def copy(self, source: int, begin: int, output: int, offset: int, nbytes: int) -> int:
        """Move up to ``nbytes`` bytes at ``begin`` of ``source`` to ``offset`` of ``output``, both descriptors."""
        return self._attempt(_copy_range, source, begin, output, offset, nbytes)

    def copy_and_show(self, source: int, begin: int, output: int, offset: int, shown: memoryview) -> int:
        """Move up to as many bytes as ``shown`` has room for, and leave them there too."""
        return self._attempt(self._copy_and_show, source, begin, output, offset, shown)

    def _attempt(self, way: Callable[..., int], *place: int | memoryview) -> int:
        if way in self._refused:
            return 0
        try:
            return way(*place)
        except OSError as error:
            if error.errno in REFUSED:
                self._refused.add(way)
            self._close()  # what is left in the pipes is of this copy
            return 0

    def _copy_and_show(self, source: int, begin: int, output: int, offset: int, shown: memoryview) -> int:
        if self._whole is None:
            self._whole = _pipe()
        if self._shown is None:
            self._shown = _pipe()
        laid = _splice(source, self._whole[1], shown.nbytes, offset_src=begin)
        done = 0
        while done < laid:
            # As many pages as fit into the second pipe, should it be the smaller one.
            end = done + _some(_tee(self._whole[0], self._shown[1], laid - done))
            written = done
            while written < end:
                written += _some(_splice(self._whole[0], output, end - written, offset_dst=offset + written))
            while done < end:
                done += _some(os.readv(self._shown[0], [shown[done:end]]))
        return laid

    def _close(self) -> None:
        for pipe in (self._whole, self._shown):
            for descriptor in pipe or ():
                os.close(descriptor)
        self._whole = self._shown = None


def _pipe() -> tuple[int, int]:
    """Return the read and write end of a pipe, as large as the kernel allows."""
    ends = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # an account that has many pipes gets small ones
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def _copy_range(source: int, begin: int, output: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise _missing()
    return os.copy_file_range(source, output, nbytes, begin, offset)


def _splice(source: int, target: int, nbytes: int, **offsets: int) -> int:
    if not hasattr(os, "splice"):
        raise _missing()
    return os.splice(source, target, nbytes, **offsets)


def _tee(source: int, target: int, nbytes: int) -> int:
    """Lay references to up to ``nbytes`` bytes in pipe ``source`` into pipe ``target`` too; return how many."""
    count = _libc_tee()(source, target, nbytes, 0)
    if count < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return count


@cache
def _libc_tee() -> Callable[[int, int, int, int], int]:
    """Return the C library's ``tee``, which Python's ``os`` lacks."""
    try:
        function = ctypes.CDLL(None, use_errno=True).tee
    except (OSError, AttributeError):
        raise _missing() from None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    function.restype = ctypes.c_ssize_t
    found: Callable[[int, int, int, int], int] = function
    return found


def _missing() -> OSError:
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _some(count: int) -> int:
    """Return ``count``, unless nothing moved where something had to."""
    if count == 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return count
