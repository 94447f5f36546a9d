"""Folders at an address: repositories of the hub, folders on web servers, and object stores.

Each is listed by a module of its own, which returns its files by name, and mounted here: see ``sources``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DeviceError, FileFormatError, InputMissingError, UsageError, missing_package
from ..sources import ADDRESS, Mount, RemoteFile, register

# A folder of more files is no checkpoint; V4-Pro has 80.
MAX_FILES = 10_000
MAX_NAME_BYTES = 255
MAX_DEPTH = 8

# Of glibc's malloc.h.
M_ARENA_MAX = -8


@dataclass(frozen=True)
class Listing:
    """The files of a remote folder by name.

    ``address`` is what to call it, ``revision`` what changes when a file does. ``folder`` are the names of the local
    folders that stand for it: readers call a model by them. ``focus`` is the one file that was asked for. ``local`` is
    a folder that holds all of it already; ``cached`` are single files that are on this disk.
    """

    address: str
    revision: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    folder: tuple[str, ...] = ("source",)
    focus: str | None = None
    local: Path | None = None
    cached: Mapping[str, Path] = field(default_factory=dict)


# Where files without stand-ins are: nothing can be there.
NOWHERE = Path("/dev/null/dsv4convert")

_mounted: dict[tuple[str, str, bool, bool], Path] = {}
_root: list[Path] = []


def mount(text: str, *, headers_only: bool = False, cache: bool = False, stand_ins: bool = True) -> Path:
    """Return the local path that stands for an address or a repository of the hub.

    Without ``stand_ins`` no folder is made, and nothing is left behind by a process that is killed: for those that know
    the names of the files, and read them by ``sources.at`` alone.

    Raises:
        InputMissingError: there is nothing there, or it cannot be reached.
        FileFormatError: the server names files in a way that no folder can hold.
        UsageError: an address that is none, or ``cache`` for what is not the hub's.
        DeviceError: the packages for it are not installed.
    """
    _share_freed_memory()  # before a library's threads have areas of their own
    found = ADDRESS.fullmatch(text)
    scheme, rest = (found[1], found[2]) if found else ("hf", text)
    rest = rest.rstrip("/")
    if scheme in ("http", "https"):
        listing = _list_web(f"{scheme}://{rest}", cache)
    elif scheme == "hf":
        listing = _list_hub(rest, cache)
    else:
        _refuse_cache(cache)
        try:
            from .stores import list_store
        except ImportError:
            raise _missing_package("obstore", "stores", f"{scheme}://{rest}") from None
        listing = list_store(scheme, rest)
    if listing.local is not None:
        return _focused(listing.local, listing)
    key = listing.address, listing.revision, headers_only, stand_ins
    if key not in _mounted:
        _mounted[key] = _mount(listing, headers_only, stand_ins)
    return _focused(_mounted[key], listing)


def _focused(path: Path, listing: Listing) -> Path:
    return path if listing.focus is None else path / listing.focus


def _list_hub(text: str, cache: bool) -> Listing:
    try:
        from .hub import list_hub
    except ImportError:
        raise _missing_package("huggingface_hub", "hub", text) from None
    return list_hub(text, cache=cache)


def _list_web(url: str, cache: bool) -> Listing:
    """List a folder of a web server; a page of the hub is taken for its repository.

    Raises:
        UsageError: the URL has no such host or port as there can be.
    """
    try:
        from .http import list_web_folder, origin
        from .hub import repository_of_page
    except ImportError:
        raise _missing_package("huggingface_hub", "hub", url.partition("?")[0]) from None
    try:
        origin(url)
    except ValueError:  # the URL may have a password, and is not repeated
        raise UsageError("not a web address", expected="https://HOST/FOLDER or https://HOST:PORT/FOLDER") from None
    repository = repository_of_page(url)
    if repository is not None:
        return _list_hub(repository, cache)
    _refuse_cache(cache)
    return list_web_folder(url)


def _refuse_cache(cache: bool) -> None:
    if cache:
        raise UsageError("--cache is for repositories of the hub", hint="leave out --cache, or download the files")


def _missing_package(package: str, extra: str, address: str) -> DeviceError:
    what = "no such folder here, and reading it from its address"
    otherwise = "check the name, or download the files and pass their folder"
    return missing_package(what, package, extra, otherwise, where=address)


def _mount(listing: Listing, headers_only: bool, stand_ins: bool) -> Path:
    if not listing.files and not listing.cached:
        raise InputMissingError("no files there", where=listing.address, hint="check the address")
    if not stand_ins:
        found = Mount(NOWHERE.joinpath(str(len(_mounted))), listing.address, listing.revision, headers_only)
        for name, file in listing.files.items():
            found.add(name, file, stand_in=False)
        register(found)
        return found.path
    if not _root:
        _root.append(Path(tempfile.mkdtemp(prefix="dsv4convert-")).resolve())
        atexit.register(shutil.rmtree, _root[0], ignore_errors=True)
    path = _root[0].joinpath(str(len(_mounted)), *listing.folder)
    path.mkdir(parents=True)
    found = Mount(path, listing.address, listing.revision, headers_only)
    for name, file in listing.files.items():
        if name in listing.cached:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).symlink_to(listing.cached[name])
        else:
            found.add(name, file)
    register(found)
    return path


def _share_freed_memory() -> None:
    """Have all threads allocate from two areas: else glibc gives each one its own, which keeps what the thread freed.

    With 16 processors, conversions from a store took 70 MiB more.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def check_names(names: list[str], address: str) -> None:
    """Check names that a server gave: plain relative paths, which stay inside the folder, and not too many.

    Raises:
        FileFormatError: one is something else.
    """
    if len(names) > MAX_FILES:
        raise FileFormatError("too many files", where=address, expected=f"at most {MAX_FILES}", got=len(names))
    taken = set(names)
    if len(taken) != len(names):
        raise FileFormatError("the server names a file twice", where=address)
    for name in names:
        parts = name.split("/")
        if (
            len(parts) > MAX_DEPTH
            or any(part in ("", ".", "..") or len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in parts)
            or re.search(r"[\\\x00-\x1f\x7f]", name)
            or name != name.encode("utf-8", "replace").decode()
            or any("/".join(parts[:count]) in taken for count in range(1, len(parts)))
        ):
            raise FileFormatError(
                "the server gives a file name that is not a plain one", where=address, got=repr(name)[:200]
            )
