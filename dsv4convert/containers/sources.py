"""Where a source's bytes come from: a local file, or a remote one that is read by ranges.

A remote folder is mounted (see ``remote``): a local folder stands for it, with an empty stand-in under each file's
name, and readers go on working with paths. Whatever opens a file through ``untrusted.open_regular``, or asks ``at`` for
it, gets the remote file's bytes. Whatever does neither finds an empty file, and an error, never wrong bytes.

Nothing here imports a network library. For a program that mounts nothing, ``at`` is one look at an empty table.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .. import errors
from ..errors import InputMissingError, InputOutputError, SpaceError, UsageError
from .fetching import BLOCK_BYTES, SLICE_SECONDS, Ahead, Transport, all_at_once
from .folder_names import shard_name

# A reader of a file's header gets this much at once: headers of the published checkpoints take 150 to 300 KiB.
HEAD_BYTES = 256 * 2**10
# What is kept because it is read more than once is fetched so many bytes at a time.
REQUEST_BYTES = 8 * 2**20
# Threads that read remote files: they mostly wait, so that there are more of them than processors.
READERS = 16
# Bytes that serve several tiles, such as a row of scales, are held until the next tile has them too.
MAX_HELD_BYTES = 2**22

# Shards in a folder of a web server, which cannot be listed, are asked for in sets of so many.
SHARD_COUNTS = (1, 2, 4, 8, 16, 32, 64)

ADDRESS = re.compile(r"(hf|https?|s3|gs|az):/+(.+)", re.DOTALL)
# A path has lost a slash.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?")


class RemoteFile:
    """A remote file of ``size`` bytes; ``identity`` (a commit or an etag) changes when its content does.

    Bytes fetched by ``read_into`` are kept, in a nameless file, so that none is fetched twice. ``ahead`` keeps none.
    ``is_wanted_again`` says to those who read weights once in a run whether this run reads them more than once.
    """

    is_wanted_again = False

    def __init__(self, address: str, size: int, identity: str, transport: Transport) -> None:
        self.address = address
        self.size = size
        self.identity = identity
        self._transport = transport
        self._lock = threading.Lock()  # of what is kept, and of what threads are fetching to keep it
        self._more = threading.Condition(self._lock)
        self._kept = Intervals()
        self._claims: list[tuple[int, int]] = []
        self._spool = Spool()

    def kept_until(self, offset: int) -> int:
        """Return up to where bytes from ``offset`` on are kept; ``offset`` itself where that byte is not."""
        with self._lock:
            return self._kept.end_of(offset)

    def next_kept(self, offset: int) -> int:
        """Return where the next kept bytes after ``offset`` begin, the file's size where there are none."""
        with self._lock:
            return self._kept.next_begin(offset, self.size)

    def read_into(
        self,
        offset: int,
        view: memoryview,
        *,
        ahead: int | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        """Fill ``view`` with the bytes at ``offset``; what is missing of them is fetched and kept.

        ``ahead`` is up to where bytes will be wanted next: ``REQUEST_BYTES`` of them are then fetched at once.

        Raises:
            Dsv4Error: they cannot be had.
        """
        end = offset + view.nbytes
        while self.kept_until(offset) < end:
            claim = self._claim(offset, end, ahead or end)
            if claim is not None:
                try:
                    self._keep(*claim, stopped)
                finally:
                    with self._lock:
                        self._claims.remove(claim)
                        self._more.notify_all()
            elif stopped is not None and stopped():
                raise InputOutputError("fetching was stopped", where=self.address)
        self._spool.read_into(offset, view)

    def _claim(self, offset: int, end: int, ahead: int) -> tuple[int, int] | None:
        """Return the first missing bytes of a range that no other thread fetches, for this one to fetch.

        None: others fetch all of them; returned once one of them has, or after a while.
        """
        with self._lock:
            taken = Intervals()
            for claim in self._claims:
                taken.add(*claim)
            gaps = list(self._kept.gaps(offset, end))
            for first, last in (free for gap in gaps for free in taken.gaps(*gap)):
                limit = min(self._kept.next_begin(first, self.size), taken.next_begin(first, self.size))
                claim = first, max(last, min(first + REQUEST_BYTES, ahead, limit))
                self._claims.append(claim)
                return claim
            if gaps:
                self._more.wait(SLICE_SECONDS)
        return None

    def _keep(self, begin: int, end: int, stopped: Callable[[], bool] | None) -> None:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
        with self.ahead(begin, end, stopped) as fetched:
            while begin < end:
                piece = buffer[: end - begin]
                fetched.read_into(piece)
                self._spool.write(begin, piece)
                with self._lock:
                    self._kept.add(begin, begin + piece.nbytes)
                    self._more.notify_all()
                begin += piece.nbytes

    def keep_in(self, folder: Path) -> None:
        """Move what is kept, and what will be, to the disk of ``folder``; not while others read."""
        old, self._spool = self._spool, Spool(folder)
        for begin, end in self._kept.runs():
            for at in range(begin, end, REQUEST_BYTES):
                piece = memoryview(bytearray(min(REQUEST_BYTES, end - at)))
                old.read_into(at, piece)
                self._spool.write(at, piece)

    def ahead(self, begin: int, end: int, stopped: Callable[[], bool] | None = None) -> Ahead:
        """Return bytes begin..end (exclusive) to be read in order, fetched ahead and not kept."""
        return Ahead(self._transport, self.address, begin, end, stopped)

    def open(self) -> io.BufferedReader:
        """Return a file object that reads the remote file, keeping what it fetches."""
        return io.BufferedReader(_Raw(self))


class Spool:
    """A file without a name in a folder, by default that of temporary files: it is gone when the program is."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._making = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``.

        Raises:
            SpaceError: the disk is full, or takes nothing.
        """
        import tempfile

        try:
            with self._making:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as this object
            while data.nbytes:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise SpaceError(
                f"fetched bytes cannot be kept ({error.strerror})",
                where=self._folder,
                hint="free some space there",
            ) from None

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what was written at ``offset``.

        Raises:
            InputOutputError: the disk does not give it back.
        """
        try:
            while view.nbytes:
                read = 0 if self._file is None else os.preadv(self._file.fileno(), [view], offset)
                if read == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                view, offset = view[read:], offset + read
        except OSError as error:
            raise InputOutputError(f"kept bytes cannot be read ({error.strerror})", where=self._folder) from None


class Intervals:
    """Disjoint runs of bytes, in order.

    >>> runs = Intervals()
    >>> runs.add(0, 4), runs.add(8, 12), runs.add(4, 6)
    (None, None, None)
    >>> list(runs.gaps(2, 10)), runs.end_of(1), runs.next_begin(6, 99)
    ([(6, 8)], 6, 8)
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Add begin..end (exclusive)."""
        first = bisect_right(self._ends, begin - 1)
        last = bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def runs(self) -> list[tuple[int, int]]:
        """Return all runs as (begin, end)."""
        return list(zip(self._begins, self._ends, strict=True))

    def end_of(self, offset: int) -> int:
        """Return the end of the run with byte ``offset``, or ``offset`` where there is none."""
        number = bisect_right(self._begins, offset) - 1
        return max(offset, self._ends[number]) if number >= 0 else offset

    def next_begin(self, offset: int, otherwise: int) -> int:
        """Return where the first run after byte ``offset`` begins."""
        number = bisect_right(self._begins, offset)
        return self._begins[number] if number < len(self._begins) else otherwise

    def gaps(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of begin..end that no run has."""
        while begin < end:
            covered = self.end_of(begin)
            if covered > begin:
                begin = covered
                continue
            gap_end = min(end, self.next_begin(begin, end))
            yield begin, gap_end
            begin = gap_end


class _Raw(io.RawIOBase):
    """The bytes of a remote file as a file."""

    def __init__(self, remote: RemoteFile) -> None:
        self._remote = remote
        self._position = 0
        self._last_end = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._remote.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(view.nbytes, self._remote.size - self._position))
        # What is kept is given alone: a buffer asks for more than its reader, and the rest would be waited for.
        count = min(count, self._remote.kept_until(self._position) - self._position or count)
        # A reader at the start is after a header, and one that goes on where it was, after more of it.
        goes_on = self._position in (0, self._last_end)
        ahead = min(self._position + HEAD_BYTES, self._remote.size) if goes_on else None
        if count:
            self._remote.read_into(self._position, view[:count], ahead=ahead)
        self._position += count
        self._last_end = self._position
        return count


class SequentialReader:
    """Reads bytes begin..end of a remote file from front to back, without keeping them; what is kept is not fetched.

    The last ``again`` bytes can be read again. With ``is_kept`` all bytes are kept, for others that read them.
    """

    def __init__(
        self,
        remote: RemoteFile,
        begin: int,
        end: int,
        *,
        is_kept: bool = False,
        again: int = 0,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        self.begin = begin
        self.end = end
        self._remote = remote
        self._is_kept = is_kept
        self._again = min(again, MAX_HELD_BYTES)
        self._stopped = stopped
        self._fetched: Ahead | None = None
        self._position = begin
        self._held = b""

    def start(self) -> None:
        """Ask for the first bytes, before anybody waits for them."""
        if not self._is_kept and self._remote.kept_until(self.begin) == self.begin:
            self._ahead().ask()

    def _ahead(self) -> Ahead:
        """Return what is fetched from where the last read ended."""
        if self._fetched is None or self._fetched.position != self._position:
            self.close()
            end = min(self.end, self._remote.next_kept(self._position))
            self._fetched = self._remote.ahead(self._position, end, self._stopped)
        return self._fetched

    def close(self) -> None:
        """End the request."""
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``offset``.

        Raises:
            Dsv4Error: they cannot be had.
        """
        if self._is_kept:
            self._remote.read_into(offset, view, ahead=self.end, stopped=self._stopped)
            return
        back = self._position - offset
        if not 0 <= back <= len(self._held):
            # Out of order: right all the same, and kept for whatever reads it next.
            self._remote.read_into(offset, view, ahead=self.end, stopped=self._stopped)
            return
        seen = min(back, view.nbytes)
        view[:seen] = self._held[len(self._held) - back : len(self._held) - back + seen]
        self._read_on(view[seen:])
        if self._again:
            self._held = bytes(view[-self._again :]) if back <= seen else self._held

    def _read_on(self, view: memoryview) -> None:
        """Fill ``view`` from where the last read ended: what is kept from there, the rest from the server."""
        while view.nbytes:
            kept_end = self._remote.kept_until(self._position)
            if kept_end > self._position:
                self.close()
                count = min(view.nbytes, kept_end - self._position)
                self._remote.read_into(self._position, view[:count])
            else:
                fetched = self._ahead()
                count = min(view.nbytes, fetched.end - self._position)
                fetched.read_into(view[:count])
                if fetched.position == fetched.end:
                    self.close()
            self._position += count
            view = view[count:]


# ---- mounted folders ----------------------------------------------------------------------------------

_files: dict[Path, RemoteFile] = {}
_mounts: dict[Path, Mount] = {}


class Mount:
    """A remote folder and the local folder ``path`` that stands for it.

    ``revision`` changes when any file does. ``headers_only``: weights are not looked at before a conversion.
    """

    def __init__(self, path: Path, address: str, revision: str, headers_only: bool = False) -> None:
        self.path = path
        self.address = address
        self.revision = revision
        self.headers_only = headers_only

    def add(self, name: str, file: RemoteFile, *, stand_in: bool = True) -> None:
        """Give the mount a file: a stand-in takes its name."""
        path = self.path / name
        if stand_in:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        _files[path] = file


def register(mount: Mount) -> None:
    """Make a mount known, and its address the name under which errors show its path."""
    _mounts[mount.path] = mount
    errors.SHOWN_PATHS[str(mount.path)] = mount.address


def at(path: Path) -> RemoteFile | None:
    """Return the remote file that a path stands for, None for a local file."""
    return _files.get(path) if _files else None


def any_mounted() -> bool:
    """Return whether the program reads remote files."""
    return bool(_files)


def mount_of(folder: Path) -> Mount | None:
    """Return the mount whose folder a path is."""
    return _mounts.get(folder) if _mounts else None


def mount_around(path: Path) -> Mount | None:
    """Return the mount that a file is in."""
    return next((_mounts[folder] for folder in path.parents if folder in _mounts), None) if _mounts else None


def unlisted(folder: Path) -> str | None:
    """Return what to do where a folder of a web server seems to hold no weights; None for any other folder."""
    mount = mount_of(folder)
    if mount is None or not mount.address.startswith("http"):
        return None
    return (
        f"a web server cannot list a folder: shards are looked for as {shard_name(0, SHARD_COUNTS[0])} to "
        f"{shard_name(0, SHARD_COUNTS[-1])}; read others from a folder or a store"
    )


def shown(path: Path) -> str:
    """Return a path as users know it: of a mounted folder, its address."""
    return errors.shown_path(str(path))


def size_of(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        OSError: a local file is not there.
    """
    remote = at(path)
    return path.stat().st_size if remote is None else remote.size


def keep_in(folder: Path) -> None:
    """Keep fetched bytes that are wanted again on the disk of ``folder``, from now on."""
    for remote in _files.values():
        remote.keep_in(folder)


def want_again(place: Path) -> None:
    """Keep what is fetched from now on of a mounted folder, or of a file in one: the run reads it more than once."""
    for path, remote in _files.items():
        if place in (path, *path.parents) or place.parent == path.parent:
            remote.is_wanted_again = True


def prefetch(ranges: Iterable[tuple[Path, int, int]]) -> None:
    """Fetch (file, offset, bytes) of remote files over several connections, and keep them.

    Raises:
        Dsv4Error: something cannot be had.
    """
    wanted = [(remote, offset, nbytes) for path, offset, nbytes in ranges if (remote := at(path)) is not None]
    if wanted:
        all_at_once(_prefetch, wanted, READERS)


def _prefetch(wanted: tuple[RemoteFile, int, int]) -> None:
    remote, offset, nbytes = wanted
    begin, end = min(offset, remote.size), min(offset + nbytes, remote.size)
    remote.read_into(begin, memoryview(bytearray(end - begin)))


def prefetch_heads(paths: Iterable[Path]) -> None:
    """Fetch the beginnings of remote files, where headers lie.

    Raises:
        Dsv4Error: one cannot be had.
    """
    prefetch((path, 0, HEAD_BYTES) for path in paths)


def is_address(text: str) -> bool:
    """Return whether a source is named by a scheme, such as ``hf://`` or ``s3://``."""
    return ADDRESS.fullmatch(text) is not None


def check_scheme(text: str) -> None:
    """Check that what is written like an address is one that can be read.

    Raises:
        UsageError: it is not.
    """
    found = SCHEME.match(text)
    if found is not None and not is_address(text):
        raise UsageError(
            "no such address can be read",
            expected="hf://OWNER/NAME, https://HOST/FOLDER, s3://BUCKET/PREFIX, gs:// or az://",
            got=f"{found[1]}://…",
            hint="download the files and pass their folder",
        )


def looks_like_hub_id(text: str) -> bool:
    """Return whether a path that does not exist is written like a repository of the hub: OWNER/NAME[@REVISION]."""
    return HUB_ID.fullmatch(text) is not None


def local_path(source: str | os.PathLike[str], *, headers_only: bool = False, cache: bool = False) -> Path:
    """Return the path that stands for a source: the folder itself, or where its address is mounted.

    A name OWNER/NAME that is nothing local is a repository of the hub. ``cache`` keeps what is fetched of it in the
    hub's own cache, unless only headers are wanted.

    Raises:
        InputMissingError: there is no such repository or folder, or it cannot be reached.
        UsageError: an address that is none, or ``cache`` for what is not the hub's.
        DeviceError: the packages for it are not installed.
    """
    text = os.fspath(source)
    path = Path(text)
    if not is_address(text) and os.path.lexists(path):
        return path
    check_scheme(text)
    if not is_address(text) and not looks_like_hub_id(text):
        return path
    from .remote import mount

    return mount(text, headers_only=headers_only, cache=cache and not headers_only)


def needs_local_files(path: Path, what: str) -> None:
    """Check that a path is local, for what reads weights in no order or again and again.

    Raises:
        InputMissingError: it is not.
    """
    mount = mount_of(path) or mount_of(path.parent)
    if mount is not None:
        raise InputMissingError(
            f"{what} needs the files on this machine",
            where=path,
            hint="download them first with hf download, or convert with --cache, which keeps them",
        )
