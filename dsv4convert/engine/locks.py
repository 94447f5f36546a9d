"""Locks of files that two runs must not write at once, on whatever the file system offers.

First ``flock``; where it is not there (NFS without a lock daemon, Lustre without its option) a lock of the open file
description, which such file systems may pass on to their server; and last a lock file next to the output that says
who holds it. The first two go with the process however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from ..errors import LockedError, OutputExistsError
from .names import not_ours

LOCK_SUFFIX = ".lock"
# What a lock file begins with, so that no other file is taken for one.
CLAIM = "dsv4convert lock"
MAX_LOCK_BYTES = 1000

_HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN})
_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
# struct flock of 64-bit Linux: type, whence, start, length, pid; the whole file, for writing.
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file (or folder) for this run; return False where the file system has no locks.

    Raises:
        BlockingIOError: another run holds it.
        OSError: the system refused for another reason.
    """
    for attempt in (_flock, _description_lock):
        try:
            attempt(descriptor)
        except OSError as error:
            if error.errno in _HELD:
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path)) from None
            if error.errno not in _WITHOUT_LOCKS and not (error.errno == errno.EBADF and attempt is _description_lock):
                raise
        else:
            return True
    return False


def _flock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _description_lock(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)


class LockFile:
    """The last way: a file that is made only where there is none; it outlives a killed run.

    Raises:
        LockedError: another run holds it, or one that cannot be asked.
        OutputExistsError: a file of that name that is no lock of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileExistsError:
                self._check_stale()
                continue
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{CLAIM}\n{os.getpid()}\n{os.uname().nodename}\n{_boot()}\n{time.ctime()}\n")
            return

    def release(self) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _check_stale(self) -> None:
        """Remove the lock file of a process of this machine that is gone; leave any other."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputExistsError(f"not a lock of dsv4convert ({error.strerror})", where=self.path) from None
        with open(descriptor, "rb") as file:
            lines = file.read(MAX_LOCK_BYTES).decode("utf-8", "replace").split("\n")
        if lines[0] != CLAIM:
            raise not_ours(self.path, "a lock of dsv4convert")
        pid, host, boot = (*lines[1:4], "", "", "")[:3]
        if host == os.uname().nodename and (boot != _boot() or not _is_alive(pid)):
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            return
        raise LockedError(
            "another run is writing this output",
            where=self.path,
            got=f"process {pid} on {host}",
            hint="wait for that run; if that process is certainly gone, remove this file",
        )


def _boot() -> str:
    """Return what tells one start of this machine from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, UnicodeError):
        return ""


def _is_alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
