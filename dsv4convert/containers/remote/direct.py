"""Requests by the standard library's HTTP client, over connections that are kept: for many large ranges at once.

The client of ``huggingface_hub`` takes a tenth of a millisecond of the interpreter for every 64 KiB, and all threads
share one interpreter. What it alone can do, proxies and clients of a program's own, is left to it: see ``is_direct``.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub.utils import _http

from ... import __version__
from ...errors import InputOutputError

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
# A connection is kept so long without a request: after minutes, routers forget it without a word to either end, and the
# next request would be waited for in vain.
IDLE_SECONDS = 30.0
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
CERTIFICATES_HINT = f"{' or '.join(CERTIFICATES)} names the certificates of authorities to trust"
# At most: glibc would map, clear and unmap memory for each piece of 128 KiB.
PIECE_BYTES = 2**17 - 2**12
# Characters of a path and query that stay as they are; anything else is percent-encoded.
AS_THEY_ARE = "%/:=&?~+!$,;'@()*[]"

Origin = tuple[str, str, "int | None"]

# With the moment from which each is idle, the latest last.
_idle: defaultdict[Origin, list[tuple[http.client.HTTPConnection, float]]] = defaultdict(list)
_context: list[Any] = []  # of certificates, made once
_lock = threading.Lock()
# A process that was forked has the same connections, and the answers would go to either of the two.
os.register_at_fork(after_in_child=_idle.clear)


def is_direct() -> bool:
    """Return whether nothing stands between this program and servers: no proxy, and no client of the program's own."""
    proxies = urllib.request.getproxies()
    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    is_default = factory is not None and factory is getattr(_http, "default_client_factory", None)
    return is_default and not any(proxies.get(scheme) for scheme in ("http", "https", "all"))


class _Head:
    """The lines before a body: where the connection ends, ``http.client`` would take them for all of them."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readline(self, limit: int) -> bytes:
        """Return the next line.

        Raises:
            http.client.IncompleteRead: the connection was closed before its end.
        """
        line: bytes = self._file.readline(limit)
        if not line.endswith(b"\n") and len(line) < limit:
            raise http.client.IncompleteRead(line)
        return line


class _Response(http.client.HTTPResponse):
    """A response whose head is whole, after those that announce it, such as 103 (Early Hints)."""

    def begin(self) -> None:
        """Read the head."""
        whole = self.fp
        self.fp = _Head(whole)  # type: ignore[assignment]
        try:
            super().begin()
            while self.status < 200:
                self.headers = self.msg = None  # type: ignore[assignment] # as before the first
                super().begin()
        finally:
            self.fp = whole


class Answer:
    """An answer whose body is read once; its connection serves the next request if all of the body has been read."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, key: Origin) -> None:
        self._connection = connection
        self._response = response
        self._key = key
        self.status_code = response.status
        location = response.headers.get("Location")
        if location is not None:
            with contextlib.suppress(UnicodeError):  # the library takes all bytes for Latin-1
                response.headers.replace_header("Location", location.encode("latin-1").decode())
        self.headers: Mapping[str, str] = response.headers  # type: ignore[assignment] # names in any case

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the body as it arrives."""
        while piece := self._response.read1(PIECE_BYTES):
            yield piece

    def read(self) -> bytes:
        """Return the body."""
        return self._response.read()

    def close(self) -> None:
        """Keep the connection, or close it where more could come."""
        is_read = self._response.length == 0 and not self._response.will_close
        self._response.close()
        if is_read:
            _idle[self._key].append((self._connection, monotonic()))
        else:
            self._connection.close()


def send(method: str, url: str, headers: Mapping[str, str], key: Origin) -> Answer:
    """Send a request to the origin ``key`` of a URL; redirects are answers too.

    Raises:
        OSError, http.client.HTTPException: the server cannot be reached, or does not answer as one.
        UnicodeError, http.client.InvalidURL: no such address.
        InputOutputError: the server's certificate, or those of the authorities, are not as they must be.
    """
    parts = urlsplit(url)
    target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe=AS_THEY_ARE)
    sent = {name.title(): value for name, value in headers.items()}  # each once, in whichever case it is given
    while True:
        kept = _kept(key)
        connection = kept or _connect(key)
        try:
            connection.request(method, target, headers={"User-Agent": f"dsv4convert/{__version__}", **sent})
            return Answer(connection, connection.getresponse(), key)
        except BaseException as error:
            connection.close()
            # One that was kept may have been closed by the server meanwhile: another is tried, or made.
            was_closed = kept is not None and isinstance(error, (OSError, http.client.HTTPException))
            if not was_closed or isinstance(error, TimeoutError):
                raise


def _kept(key: Origin) -> http.client.HTTPConnection | None:
    """Return a connection that has not been idle for long; others are closed.

    So is one with bytes to read: the server closed it, or they would pass for the next answer.
    """
    while True:
        try:
            connection, since = _idle[key].pop()
        except IndexError:
            return None
        readable = select.poll()
        readable.register(connection.sock, select.POLLIN)
        if monotonic() - since < IDLE_SECONDS and not readable.poll(0):
            return connection
        connection.close()


def _connect(key: Origin) -> http.client.HTTPConnection:
    scheme, host, port = key
    if scheme == "http":
        made = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    else:
        made = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=_certificates())
    made.response_class = _Response
    try:
        made.connect()
    except ssl.SSLCertVerificationError as error:
        what = f"the server's certificate cannot be verified ({error.verify_message})"
        raise InputOutputError(what, where=f"{scheme}://{host}:{port}", hint=CERTIFICATES_HINT) from None
    made.sock.settimeout(ANSWER_SECONDS)
    made.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return made


def _certificates() -> Any:
    """Return the context of certificates, as the hub's client has it.

    Raises:
        InputOutputError: they cannot be read.
    """
    with _lock:
        if not _context:
            try:
                _context.append(httpx2.create_ssl_context())
            except OSError as error:
                where = next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), None)
                what = f"certificates cannot be read ({error.strerror or type(error).__name__})"
                raise InputOutputError(what, where=where, hint=CERTIFICATES_HINT) from None
        return _context[0]
