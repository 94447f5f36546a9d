"""A disk that logs every write and flush, and images of it as a power cut would leave them.

The disk is a file of a FUSE file system served here, on which a loop device sits: no module of the kernel is needed
beyond the two. A flush of the block layer reaches the file as an fsync. The loop device has no forced unit access, so
the block layer turns such writes into a write and a flush. Needs root.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import mmap
import os
import random
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512
PAGE_BYTES = 4096

# What the kernel asks of a FUSE server (include/uapi/linux/fuse.h, protocol 7.31).
FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 2, 3, 4, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, INTERRUPT, DESTROY, FALLOCATE, BATCH_FORGET = 20, 25, 26, 36, 38, 43, 42
NO_REPLY = (FORGET, BATCH_FORGET, INTERRUPT)
VERSION = (7, 31)
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
DIRECT_IO = 1
MAX_WRITE_BYTES = 1 << 20
REQUEST = struct.Struct("<IIQQIIII")  # length, operation, request number, node, user, group, process, padding
REPLY = struct.Struct("<IiQ")  # length, error, request number
ATTRIBUTES = struct.Struct("<QII QQQQQQ IIIIIIIIII")
FOREVER_SECONDS = 1 << 30

ENTRY = struct.Struct("<QQ")  # offset and bytes of a write; a flush has no bytes

MS_NOSUID_NODEV, MS_REC, MS_PRIVATE = 2 | 4, 1 << 14, 1 << 18
CLONE_NEWNS = 1 << 17
TRIALS, TRIAL_SECONDS = 50, 0.1


@dataclass(frozen=True)
class Write:
    """A write in a log: where it goes on the disk, and where its bytes stand in the log."""

    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Cut:
    """A power cut after so many entries of the log: all writes before ``flushed`` are kept, and some after it.

    ``kept`` has the number of each such write and how many of its first bytes arrived.
    """

    entries: int
    flushed: int
    kept: tuple[tuple[int, int], ...] = ()


class Log:
    """The writes of a log in order, and the flushes among them: each by the number of writes before it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.writes: list[Write] = []
        self.flushes: list[int] = []
        self._ends: list[int] = []  # of all entries
        self._entries: list[int] = []  # of each write: entries up to and with it
        self._flushed: list[int] = []  # of each write: the writes before the last flush before it
        position = 0
        while position < len(self._bytes):
            offset, nbytes = ENTRY.unpack_from(self._bytes, position)
            position += ENTRY.size + nbytes
            self._ends.append(position)
            if nbytes:
                self.writes.append(Write(offset, nbytes, position - nbytes))
                self._entries.append(len(self._ends))
                self._flushed.append(self.flushes[-1] if self.flushes else 0)
            else:
                self.flushes.append(len(self.writes))

    def entries_within(self, log_bytes: int) -> int:
        """Return how many entries the first bytes of the log hold."""
        return bisect.bisect_right(self._ends, log_bytes)

    def data(self, write: Write) -> memoryview:
        return memoryview(self._bytes)[write.at : write.at + write.nbytes]

    def boundaries(self) -> list[Cut]:
        """Return the cut at each flush: all before it, nothing after."""
        entries = sorted(set(range(1, len(self._ends) + 1)) - set(self._entries))
        return [Cut(entry, flush) for entry, flush in zip(entries, self.flushes, strict=True)]

    def random_cut(self, rng: random.Random, atomic_bytes: int, first: int = 0) -> Cut:
        """Return a cut in the middle of some writes: of those since the last flush, any may have arrived, in part.

        The disk writes so many bytes as one. ``first`` is the earliest write before which it may be.
        """
        last = rng.randrange(first, len(self.writes))
        flushed = self._flushed[last]
        unflushed = range(flushed, last + 1)
        how = rng.choice(("all", "last torn", "one", "one lost", "some", "some", "some torn"))
        share = rng.choice((0.1, 0.5, 0.9))
        lone = rng.choice(unflushed)
        kept = []
        for number in unflushed:
            whole = self.writes[number].nbytes
            nbytes = whole
            torn = rng.randrange(-(-whole // atomic_bytes)) * atomic_bytes
            if how in ("some", "some torn") and rng.random() >= share:
                nbytes = 0
            elif (how == "last torn" and number == last) or (how == "some torn" and rng.random() < 0.3):
                nbytes = torn
            elif (how == "one" and number != lone) or (how == "one lost" and number == lone):
                nbytes = 0
            if nbytes:
                kept.append((number, nbytes))
        return Cut(self._entries[last], flushed, tuple(kept))

    def apply(self, image: int, numbers: range) -> None:
        """Make whole writes in an image."""
        for number in numbers:
            os.pwrite(image, self.data(self.writes[number]), self.writes[number].offset)

    def apply_cut(self, image: int, cut: Cut) -> None:
        """Make what a cut kept of the writes after its flush."""
        for number, nbytes in cut.kept:
            os.pwrite(image, self.data(self.writes[number])[:nbytes], self.writes[number].offset)


def have_mounts_alone() -> None:
    """Give this process a mount namespace of its own: nobody else keeps its disks mounted, and they end with it.

    Raises:
        OSError: the process may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot have a mount namespace of its own")


def try_disk(folder: Path) -> None:
    """Make a disk for a trial.

    Raises:
        OSError, subprocess.CalledProcessError: none can be made.
    """
    image = folder / "trial.img"
    with image.open("wb") as file:
        file.truncate(PAGE_BYTES)
    with logged_disk(image, folder / "trial.log") as device:
        Path(device).read_bytes()


def copy_sparse(old: Path, new: Path) -> None:
    """Copy a file, leaving out pages of zeros."""
    size = old.stat().st_size
    with old.open("rb") as source, new.open("wb") as target:
        target.truncate(size)
        for begin, end in _extents(source.fileno(), size):
            data = os.pread(source.fileno(), end - begin, begin)
            for start in range(0, len(data), PAGE_BYTES):
                page = data[start : start + PAGE_BYTES]
                if page.count(0) != len(page):
                    os.pwrite(target.fileno(), page, begin + start)


def copy_extents(old: Path, new: Path) -> None:
    """Copy a sparse file, extent by extent."""
    size = old.stat().st_size
    with old.open("rb") as source, new.open("wb") as target:
        target.truncate(size)
        for begin, end in _extents(source.fileno(), size):
            os.pwrite(target.fileno(), os.pread(source.fileno(), end - begin, begin), begin)


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


@contextlib.contextmanager
def loop_device(file: Path, *, direct: bool = False) -> Iterator[str]:
    """Set a loop device on a file."""
    options = ["--direct-io=on"] if direct else []
    device = _said("losetup", "--find", "--show", *options, str(file))
    try:
        yield device
    finally:
        _said("losetup", "--detach", device)
        # The kernel puts this off while anybody has the device open; the file is not ours until then.
        backing = Path("/sys/block") / Path(device).name / "loop" / "backing_file"
        for left in reversed(range(TRIALS)):
            try:
                if backing.read_text().strip() != str(file):
                    break
            except OSError:
                break
            if not left:
                raise RuntimeError(f"{device} is still in use")
            time.sleep(TRIAL_SECONDS)


@contextlib.contextmanager
def mounted(device: str, folder: Path, kind: str, options: str) -> Iterator[Path]:
    """Mount a file system.

    Raises:
        subprocess.CalledProcessError: it cannot be mounted.
    """
    folder.mkdir(exist_ok=True)
    _said("mount", "-t", kind, "-o", options, device, str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


def _unmount(path: Path) -> None:
    """Unmount, in a while if something still looks at it."""
    for left in reversed(range(TRIALS)):
        ended = subprocess.run(["umount", str(path)], check=False, capture_output=True, text=True)
        if not ended.returncode:
            return
        if not left:
            raise subprocess.CalledProcessError(ended.returncode, ended.args, ended.stdout, ended.stderr)
        time.sleep(TRIAL_SECONDS)


def _said(*line: str) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def logged_disk(image: Path, log: Path) -> Iterator[str]:
    """Serve an image as a block device that appends each write and flush to a log, in the order of their arrival."""
    served = image.with_suffix(".served")
    served.touch()
    log.touch()
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={descriptor},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
    if libc.mount(b"logged-disk", os.fsencode(served), b"fuse", MS_NOSUID_NODEV, options.encode()):
        raise OSError(ctypes.get_errno(), "mount of the logged disk", str(served))
    server = os.fork()
    if not server:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _serve(descriptor, image, log)
        finally:
            os._exit(0)
    os.close(descriptor)
    try:
        with loop_device(served, direct=True) as device:
            yield device
    finally:
        _unmount(served)
        os.waitpid(server, 0)


def _serve(descriptor: int, image_path: Path, log_path: Path) -> None:
    """Answer the kernel's requests until the file system is unmounted."""
    image = os.open(image_path, os.O_RDWR)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    size = os.fstat(image).st_size
    whole = (size, size // SECTOR_BYTES, 0, 0, 0)
    attributes = ATTRIBUTES.pack(FOREVER_SECONDS, 0, 0, 1, *whole, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)

    def init(_: memoryview) -> bytes:
        numbers = (*VERSION, 0, BIG_WRITES | MAX_PAGES, 0, 0, MAX_WRITE_BYTES, 1, MAX_WRITE_BYTES // PAGE_BYTES)
        return struct.pack("<IIIIHHIIH", *numbers).ljust(64, b"\0")

    def read(body: memoryview) -> bytes:
        _, offset, nbytes = struct.unpack_from("<QQI", body)
        return os.pread(image, nbytes, offset)

    def logged(offset: int, data: bytes | memoryview) -> None:
        os.writev(log, [ENTRY.pack(offset, len(data)), data])
        os.pwrite(image, data, offset)

    def write(body: memoryview) -> bytes:
        _, offset, nbytes = struct.unpack_from("<QQI", body)
        logged(offset, body[40 : 40 + nbytes])
        return struct.pack("<II", nbytes, 0)

    def flush(_: memoryview) -> bytes:
        os.write(log, ENTRY.pack(0, 0))
        return b""

    def zero(body: memoryview) -> bytes:
        # A hole or a range of zeros, which the loop device asks for.
        _, offset, nbytes = struct.unpack_from("<QQQ", body)
        for start in range(offset, offset + nbytes, MAX_WRITE_BYTES):
            logged(start, bytes(min(MAX_WRITE_BYTES, offset + nbytes - start)))
        return b""

    answers: dict[int, Callable[[memoryview], bytes]] = {
        INIT: init,
        GETATTR: lambda _: attributes,
        SETATTR: lambda _: attributes,
        OPEN: lambda _: struct.pack("<QII", 0, DIRECT_IO, 0),
        READ: read,
        WRITE: write,
        FSYNC: flush,
        FALLOCATE: zero,
        STATFS: lambda _: bytes(80),
        RELEASE: lambda _: b"",
        FLUSH: lambda _: b"",
        DESTROY: lambda _: b"",
    }
    buffer = bytearray(MAX_WRITE_BYTES + PAGE_BYTES)
    while True:
        try:
            length = os.readv(descriptor, [buffer])
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            raise
        _, operation, number, *_ = REQUEST.unpack_from(buffer)
        if operation in NO_REPLY:
            continue
        answer = answers.get(operation)
        data, failure = b"", 0
        if answer is None:
            failure = -errno.ENOSYS
        else:
            try:
                data = answer(memoryview(buffer)[REQUEST.size : length])
            except OSError as error:
                failure = -(error.errno or errno.EIO)
        os.writev(descriptor, [REPLY.pack(REPLY.size + len(data), failure, number), data])
