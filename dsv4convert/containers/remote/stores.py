"""Folders in object stores (S3, Google Cloud Storage, Azure), through ``obstore``.

Keys, endpoints and regions come from the environment, by the stores' own variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import from_url

from ...errors import FileFormatError, InputMissingError, InputOutputError, UsageError
from ..fetching import RUN_AGAIN, TransientError, Transport, retried
from ..sources import RemoteFile
from . import Listing, check_names

PIECE_BYTES = 2**16
# Requests are made again here (see ``sources.Stream``), where a run can be stopped meanwhile.
RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=60)}
# By scheme, the variables that have a store's keys and place.
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}


def keys_hint(address: str) -> str:
    """Return what to look at where a store does not answer as it should."""
    return f"check the address, and the store's keys in the environment ({VARIABLES[address.partition(':')[0]]})"


def list_store(scheme: str, rest: str) -> Listing:
    """Return the files below ``scheme://BUCKET/PREFIX``.

    Raises:
        UsageError: no such address.
        InputMissingError: nothing there, or the store cannot be reached.
        FileFormatError: the store names files that no folder can hold.
    """
    store, prefix, address = open_store(scheme, rest)
    found = retried(lambda: _list(store, prefix, address), address)
    focus = None
    if prefix in found:
        prefix, _, focus = prefix.rpartition("/")
        found = retried(lambda: _list(store, prefix, address), address)
    start = f"{prefix}/" if prefix else ""
    entries = {path.removeprefix(start): entry for path, entry in found.items() if path.startswith(start)}
    check_names(list(entries), address)
    if not entries:
        raise InputMissingError("nothing there", where=address, hint=keys_hint(address))
    bucket = rest.partition("/")[0]
    folder = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
    files: dict[str, RemoteFile] = {}
    for name, entry in entries.items():
        told, place = "e_tag" if entry.get("e_tag") else "last_modified", f"{folder}/{name}"
        value = _quoted(entry[told]) if told == "e_tag" else entry[told]
        ranges = StoreRanges(store, start + name, place, told, value)
        files[name] = RemoteFile(place, entry["size"], str(value), ranges)
    revision = repr(sorted((name, file.size, file.identity) for name, file in files.items()))
    return Listing(folder, revision, files, (prefix.rpartition("/")[2] or bucket,), focus)


def _quoted(e_tag: str) -> str:
    """Return an etag as headers have it: Azure leaves the quotes out of its listings."""
    return e_tag if e_tag.endswith('"') else f'"{e_tag}"'


def open_store(scheme: str, rest: str, **options: Any) -> tuple[Any, str, str]:
    """Return the store of ``scheme://BUCKET/PREFIX``, the prefix, and the address to show.

    ``options`` are the library's. Nothing is asked of the store yet.

    Raises:
        UsageError: no such address.
        InputMissingError: the environment lacks what the store needs.
    """
    bucket, _, prefix = rest.partition("/")
    address = f"{scheme}://{rest}"
    if not re.fullmatch(r"[\w.-]+", bucket) or re.search(r"[?#@]", rest):
        raise UsageError("not an address in a store", where=f"{scheme}://…", expected=f"{scheme}://BUCKET/PREFIX")
    try:
        store = from_url(f"{scheme}://{bucket}", **({"retry_config": RETRIES} | options))
    except (BaseError, ValueError) as error:
        raise InputMissingError(
            f"the store cannot be opened ({type(error).__name__})", where=address, hint=keys_hint(address)
        ) from None
    return store, prefix, address


def _list(store: Any, prefix: str, address: str) -> dict[str, Any]:
    """Return what lies below a prefix by its key, and the object that has the prefix for its key."""
    try:
        found = {entry["path"]: entry for page in obstore.list(store, prefix or None) for entry in page}
        if prefix and not found:
            found[prefix] = obstore.head(store, prefix)
        return found
    except (NotFoundError, FileNotFoundError):
        raise InputMissingError("nothing there", where=address, hint=keys_hint(address)) from None
    except (BaseError, OSError) as error:
        raise error_of(error, address) from None


def error_of(error: Exception, address: str) -> Exception:
    """Return an error of the library as ours: without its text, which can hold signed addresses."""
    status = status_of(error)
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in ("401", "403"):
        return InputMissingError("the store refuses access", where=address, hint=keys_hint(address))
    if status == "404":
        return InputMissingError("nothing there", where=address, hint=keys_hint(address))
    return TransientError(f"{type(error).__name__}{f', HTTP status {status}' if status else ''}")


def status_of(error: Exception) -> str | None:
    """Return the HTTP status that an error of the library tells of, if it does."""
    found = re.search(r"\bstatus code: (\d{3})\b", str(error))
    return found[1] if found else None


class StoreRanges(Transport):
    """Ranges of one object; another ``value`` of what is ``told`` of it (e_tag or last_modified) is an error."""

    def __init__(self, store: Any, key: str, address: str, told: str, value: object) -> None:
        self._store = store
        self._key = key
        self._address = address
        self._told = told
        self._value = value

    @contextmanager
    def fetch(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        """Request bytes; see ``Transport.fetch``."""
        options: Any = {"range": (begin, end)}
        if self._told == "e_tag":
            options["if_match"] = self._value
        try:
            result = obstore.get(self._store, self._key, options=options)
        except PreconditionError:
            raise self._changed() from None
        except (NotFoundError, FileNotFoundError):
            raise InputOutputError("no longer there", where=self._address) from None
        except (BaseError, OSError) as error:
            raise error_of(error, self._address) from None
        if result.meta[self._told] != self._value:
            raise self._changed()
        yield self._pieces(result)

    def _changed(self) -> FileFormatError:
        return FileFormatError("changed in the store since it was first looked at", where=self._address, hint=RUN_AGAIN)

    def _pieces(self, result: Any) -> Iterator[bytes]:
        try:
            yield from result.stream(min_chunk_size=PIECE_BYTES)
        except (BaseError, OSError) as error:
            raise error_of(error, self._address) from None
