"""Ranges of files on web servers, and folders of them.

Proxies and certificates come from the environment as for the hub's own program: behind a proxy, requests go through the
HTTP client of ``huggingface_hub``, else see ``direct``. Redirects are followed here, so that credentials go to the host
they are for and to no other; certificates are always verified.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils.logging import set_verbosity_error

from ...errors import Dsv4Error, FileFormatError, InputMissingError, InputOutputError, UsageError
from ..fetching import RUN_AGAIN, TransientError, Transport, all_at_once, retried
from ..folder_names import AUXILIARY_FILES, CONFIG_NAME, INDEX_NAME, SINGLE_NAME, shard_name
from ..gguf import SPLIT_FILE, SPLIT_NAME
from ..json_object import parse_json_object
from ..sources import READERS, SHARD_COUNTS, RemoteFile
from . import MAX_FILES, Listing, check_names
from .direct import is_direct, send

# The library's warnings repeat the addresses that failed, which are signed.
set_verbosity_error()

TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
MAX_REDIRECTS = 5
MAX_INDEX_BYTES = 32 * 2**20

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
DENIED = frozenset({401, 403})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
BROKEN = (httpx2.TransportError, http.client.HTTPException, OSError)
REDIRECTED_NOWHERE = "the server redirects to what is no address"

# What a folder may hold next to its weights, where it cannot be listed.
OTHER_NAMES = (*AUXILIARY_FILES, "README.md")


def origin(url: str) -> tuple[str, str, int | None]:
    """Return the scheme, host and port of a URL: where its credentials may go.

    Raises:
        ValueError: the URL has no such host or port as there can be.
    """
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def check_secure(url: str, address: str) -> None:
    """Check that a URL is one of HTTPS, or of this machine.

    Raises:
        UsageError: it is neither.
    """
    scheme, host, _ = origin(url)
    if scheme != "https" and not (scheme == "http" and host in LOOPBACK):
        raise UsageError("only https is read", where=address, hint="pass an https address")


@contextmanager
def request(
    method: str, url: str, headers: Mapping[str, str], address: str, *, secret: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """Send a request and yield the response, its body unread; ``secret`` headers go to the URL's own host only.

    Raises:
        TransientError: it failed and may be made again.
        InputOutputError: no such address, or the redirects lead to none, round in circles, or away from HTTPS.
    """
    home, start = origin(url), url
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_REDIRECTS + 1):
            own = secret if secret and origin(url) == home else {}
            sent = {**headers, "Accept-Encoding": "identity", **own}
            try:
                response = _send(method, url, sent, with_secret=bool(own))
            except OfflineModeIsEnabled:
                raise InputMissingError(
                    "HF_HUB_OFFLINE forbids fetching it", where=address, hint="unset HF_HUB_OFFLINE"
                ) from None
            # Such as a host with a label of more than 63 characters.
            except (httpx2.InvalidURL, http.client.InvalidURL, UnicodeError):
                what = "no such address" if url == start else REDIRECTED_NOWHERE
                raise InputOutputError(what, where=address, hint="check the address") from None
            except BROKEN as error:
                raise _broken(error) from None
            stack.callback(response.close)
            target = response.headers.get("Location")
            if response.status_code not in REDIRECTS or target is None:
                if response.status_code in TRANSIENT_STATUSES:
                    raise TransientError(f"HTTP status {response.status_code}", _retry_after(response.headers))
                if method == "HEAD":
                    response.read()  # nothing; but an answer that is not read to its end costs the connection
                yield response
                return
            stack.pop_all().close()
            before = origin(url)
            try:
                url = urljoin(url, target)
                scheme, host, _ = origin(url)
            except ValueError:
                scheme = host = ""
            if scheme not in ("http", "https") or not host:
                raise InputOutputError(REDIRECTED_NOWHERE, where=address)
            if scheme != "https" and before[0] == "https":
                raise InputOutputError("the server redirects from https to http", where=address)
        raise InputOutputError("the server redirects without end", where=address)


def _send(method: str, url: str, headers: Mapping[str, str], *, with_secret: bool) -> Any:
    """Send a request, with the hub's client where a connection of our own would not go the same way."""
    if is_direct() and not constants.is_offline_mode():
        return send(method, url, headers, origin(url))
    built = get_session().build_request(method, url, headers=headers, timeout=TIMEOUT)
    if not with_secret:
        built.headers.pop("authorization", None)
    return get_session().send(built, stream=True, follow_redirects=False, auth=None)


def _broken(error: Exception) -> TransientError:
    """Return an error of the connection without anything of the request in it."""
    if isinstance(error, socket.gaierror):
        return TransientError("host name not resolved")
    return TransientError(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", type(error).__name__).lower())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: a number, or a date."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", value):
        return float(value)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


# What tells one content of a file from another, the better one first, and the header that asks for no other.
VALIDATORS: Mapping[str, str] = {"ETag": "If-Match", "Last-Modified": "If-Unmodified-Since"}


class HttpRanges(Transport):
    """Ranges of one file at a URL; any other value of the header ``told`` (of ``VALIDATORS``) is an error."""

    def __init__(self, url: str, address: str, size: int, told: tuple[str, str] | None = None) -> None:
        self._url = url
        self._address = address
        self._size = size
        self._told = told

    def url(self) -> str:
        """Return where to send the next request."""
        return self._url

    def secret(self, url: str) -> Mapping[str, str]:
        """Return the credentials for the host of a URL that ``url`` returned, which may return another by now."""
        return {}

    def denied(self, url: str, status: int) -> Dsv4Error | TransientError:
        """Return the error of a refusal by ``url``."""
        return InputOutputError(
            "the server refuses access", where=self._address, got=f"HTTP status {status}", hint="check your access"
        )

    @contextmanager
    def fetch(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        """Request bytes; see ``Transport.fetch``."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if self._told is not None and not self._told[1].startswith("W/"):
            headers[VALIDATORS[self._told[0]]] = self._told[1]
        url = self.url()
        with request("GET", url, headers, self._address, secret=self.secret(url)) as response:
            status = response.status_code
            if status in DENIED:
                raise self.denied(url, status)
            if status == 412 or (status in (200, 206) and self._may_have_changed(response.headers)):
                raise FileFormatError(
                    "changed on the server since it was first looked at",
                    where=self._address,
                    hint=RUN_AGAIN,
                )
            whole = begin == 0 and end == self._size and status == 200
            if status == 416:
                raise self._wrong_size("fewer")
            if status == 404:
                raise InputMissingError("no longer there", where=self._address)
            if status != 206 and not whole:
                raise InputOutputError(
                    "the server does not send ranges",
                    where=self._address,
                    expected="HTTP status 206",
                    got=status,
                    hint="download the files and pass their folder",
                )
            self._check_range(response.headers, begin, end, whole)
            yield self._pieces(response)

    def _may_have_changed(self, headers: Mapping[str, str]) -> bool:
        return self._told is not None and headers.get(self._told[0]) != self._told[1]

    def _check_range(self, headers: Mapping[str, str], begin: int, end: int, whole: bool) -> None:
        if headers.get("Content-Encoding", "identity") != "identity":
            raise InputOutputError("the server sends compressed bytes unasked", where=self._address)
        if whole:
            if headers.get("Content-Length", str(self._size)) != str(self._size):
                raise self._wrong_size(headers["Content-Length"])
            return
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("Content-Range", ""))
        if found is None or int(found[1]) != begin or int(found[2]) + 1 != end:
            raise InputOutputError(
                "the server sends other bytes than asked for",
                where=self._address,
                expected=f"bytes {begin}-{end - 1}",
                got=headers.get("Content-Range", "no Content-Range")[:80],
            )
        if found[3] not in ("*", str(self._size)):
            raise self._wrong_size(found[3])

    def _wrong_size(self, got: str) -> FileFormatError:
        return FileFormatError(
            "size on the server changed",
            where=self._address,
            expected=f"{self._size} bytes",
            got=got,
            hint=RUN_AGAIN,
        )

    def _pieces(self, response: Any) -> Iterator[bytes]:
        try:
            yield from response.iter_raw()  # as they arrive, so that a cut loses none
        except BROKEN as error:
            raise _broken(error) from None


# ---- folders of web servers ---------------------------------------------------------------------------


def list_web_folder(url: str) -> Listing:
    """Return a folder below a URL: with no listing, its files are those of its index, or shards, and the usual others.

    Raises:
        UsageError: the URL has a password or a query, or is not one of HTTPS.
        InputMissingError: no config.json there, or the server cannot be reached.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "an address of a folder has no password, query or fragment",
            where=f"{parts.scheme}://{parts.hostname}{parts.path}",
            hint="pass the address of the folder alone",
        )
    check_secure(url, url)
    if parts.path.endswith((".gguf", ".safetensors", ".json")):
        url, _, focus = url.rpartition("/")
        names = sorted({focus, *_of_split(focus)} | ({CONFIG_NAME} if focus != CONFIG_NAME else set()))
        needed = focus
    else:
        focus, needed = None, CONFIG_NAME
        names = [CONFIG_NAME, INDEX_NAME, *OTHER_NAMES]
    files = _look(url, names)
    if needed not in files:
        raise InputMissingError("no such file on the server", where=f"{url}/{needed}", hint="check the address")
    if focus is None:
        weights = _indexed(files[INDEX_NAME]) if INDEX_NAME in files else [SINGLE_NAME, *_shards(url)]
        check_names([*files, *weights], url)
        files |= _look(url, weights)
    digest = json.dumps({name: file.identity for name, file in sorted(files.items())})
    return Listing(url, digest, files, (parts.path.rstrip("/").rpartition("/")[2] or "source",), focus)


def _shards(url: str) -> list[str]:
    """Return the names of the shards of each set whose first one is there."""
    first = {shard_name(0, mp): mp for mp in SHARD_COUNTS}
    return [shard_name(rank, first[name]) for name in _look(url, list(first)) for rank in range(first[name])]


def _of_split(name: str) -> list[str]:
    """Return the names of all files of a split GGUF."""
    found = SPLIT_FILE.fullmatch(name)
    if found is None:
        return []
    stem, count = found["stem"], int(found["count"])
    return [SPLIT_NAME.format(stem=stem, number=n, count=count) for n in range(1, min(count, MAX_FILES) + 1)]


def _look(url: str, names: list[str]) -> dict[str, RemoteFile]:
    """Return those of the files that are there."""
    found = all_at_once(lambda name: retried(lambda: _look_at(url, name), f"{url}/{name}"), names, READERS)
    return {name: file for name, file in zip(names, found, strict=True) if file is not None}


def _look_at(folder: str, name: str) -> RemoteFile | None:
    url, address = f"{folder}/{quote(name)}", f"{folder}/{name}"
    with request("HEAD", url, {}, address) as response:
        if response.status_code in (404, 410):
            return None
        length, headers = response.headers.get("Content-Length", ""), response.headers
        if response.status_code in DENIED:
            raise InputMissingError("the server refuses access", where=address, got=f"HTTP {response.status_code}")
        if response.status_code != 200 or not re.fullmatch(r"\d{1,18}", length):
            raise InputMissingError(
                "cannot be read from the server", where=address, expected="HTTP 200", got=response.status_code
            )
    told = next(((name, headers[name]) for name in VALIDATORS if headers.get(name)), None)
    if told is None:
        raise InputMissingError(
            "the server tells neither etag nor date, so that a change would go unseen",
            where=address,
            hint="download the files and pass their folder",
        )
    return RemoteFile(address, int(length), told[1], HttpRanges(url, address, int(length), told))


def _indexed(file: RemoteFile) -> list[str]:
    """Return the files that an index names."""
    if file.size > MAX_INDEX_BYTES:
        raise FileFormatError("too large", where=file.address, expected=f"at most {MAX_INDEX_BYTES} bytes")
    content = bytearray(file.size)
    file.read_into(0, memoryview(content))
    weight_map = parse_json_object(bytes(content), file.address, error=FileFormatError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FileFormatError("not an index of weights", where=file.address)
    return sorted(set(weight_map.values()))
