"""A local server whose link and connections are limited, for the benchmarks of remote sources and destinations.

It serves the files of a folder by ranges, over http and as a bucket of S3, and takes objects of S3, whose bytes it
counts and drops. Several processes share the listening socket and one account of the link; the kernel moves the bytes,
so that the server does not limit what it measures: ``streams`` tells what bare sockets get from it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PIECE_BYTES = 2**17
MAX_SECONDS = 3600
BUCKET = "models"
# What a client of S3 needs to take the server for one, beside its address.
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
LIST_HEAD = '<?xml version="1.0"?><ListBucketResult>'


class Limits(NamedTuple):
    """Bytes a second of the link and of a connection (0: no limit), and seconds before an answer."""

    link: float
    connection: float
    delay: float


class Traffic(NamedTuple):
    """What went over the link: bytes, seconds from the first request to the last byte, bytes in the median second."""

    sent: int
    seconds: float
    in_median_second: float
    connections: int


class Link:
    """The account that all processes of a server share."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = multiprocessing.Lock()
        # When the link is free, when the first request came and the last byte went, all bytes, connections.
        self._times = multiprocessing.Array("d", 5, lock=False)
        self._in_second = multiprocessing.Array("q", MAX_SECONDS, lock=False)

    def connect(self) -> None:
        """Note a connection."""
        with self._lock:
            self._times[4] += 1

    def request(self) -> None:
        """Note a request."""
        with self._lock:
            self._times[1] = self._times[1] or time.monotonic()

    def reserve(self, count: int) -> float:
        """Return when ``count`` bytes are over the link."""
        if not self.limits.link:
            return 0.0
        with self._lock:
            self._times[0] = max(time.monotonic(), self._times[0]) + count / self.limits.link
            return self._times[0]

    def note(self, count: int) -> None:
        """Note bytes that are over the link."""
        now = time.monotonic()
        with self._lock:
            self._times[2] = now
            self._times[3] += count
            self._in_second[min(int(now - self._times[1]), MAX_SECONDS - 1)] += count

    def traffic(self) -> Traffic:
        """Return what went over the link, and forget it."""
        with self._lock:
            seconds = self._times[2] - self._times[1]
            median = statistics.median(self._in_second[: int(seconds) + 1])
            found = Traffic(int(self._times[3]), seconds, median, int(self._times[4]))
            self._times[:] = [0.0] * 5
            self._in_second[:] = [0] * MAX_SECONDS
        return found


class Pace:
    """The turn of one connection: ``wait`` returns when its next bytes may go."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at = time.monotonic()

    def wait(self, count: int) -> None:
        limits = self._link.limits
        own = self._free_at + count / limits.connection if limits.connection else 0.0
        self._free_at = max(own, self._link.reserve(count))
        time.sleep(max(0.0, self._free_at - time.monotonic()))


@dataclass
class Object:
    """What is kept of an object that was sent: small ones whole."""

    size: int
    metadata: dict[str, str]
    content: bytes


class Handler(BaseHTTPRequestHandler):
    """Files by ranges, and objects taken, as slowly as the link and the connection want it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer's headers in one piece
    folder: Path
    link: Link
    objects: dict[str, Object]
    parts: dict[str, int]

    def setup(self) -> None:
        self.link.connect()
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def begin(self) -> tuple[str, dict[str, list[str]]]:
        """Return the key and the query of a request, after the delay of the link."""
        self.link.request()
        time.sleep(self.link.limits.delay)
        parts = urlsplit(self.path)
        return unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query = self.begin()
        if key == BUCKET:
            self.list(query.get("prefix", [""])[0])
        elif key in self.objects:
            kept = self.objects[key]
            self.answer(200, kept.content, size=kept.size, metadata=kept.metadata)
        else:
            self.send_file(self.folder / Path(key).name)

    def list(self, prefix: str) -> None:
        """Answer with the files of the folder, all of them below any prefix, and the objects that were sent."""
        found = {f"{prefix}{path.name}": path.stat().st_size for path in self.folder.glob("*") if prefix}
        found |= {key.removeprefix(f"{BUCKET}/"): kept.size for key, kept in self.objects.items()}
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;same&quot;</ETag><Size>{size}</Size></Contents>"
            for name, size in found.items()
            if name.startswith(prefix)
        )
        self.answer(200, f"{LIST_HEAD}<IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())

    def answer(
        self, status: int, content: bytes = b"", *, size: int | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.send_header("ETag", '"same"')
        self.send_header("Content-Length", str(len(content) if size is None else size))
        for name, value in (metadata or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.send_header("ETag", '"same"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return
        pace, out = Pace(self.link), self.connection.fileno()
        with path.open("rb") as file:
            while begin < end:
                count = min(PIECE_BYTES, end - begin)
                pace.wait(count)
                while count:
                    sent = os.sendfile(out, file.fileno(), begin, count)
                    self.link.note(sent)
                    begin, count = begin + sent, count - sent

    def do_PUT(self) -> None:
        """Take an object, or a part of one."""
        key, query = self.begin()
        left = size = int(self.headers.get("Content-Length", 0))
        kept, buffer, pace = bytearray(), bytearray(PIECE_BYTES), Pace(self.link)
        while left:
            pace.wait(min(left, PIECE_BYTES))
            view = memoryview(buffer)[: min(left, PIECE_BYTES)]
            count = self.rfile.readinto(view)
            if not count:
                self.close_connection = True
                return
            if size < PIECE_BYTES:
                kept += view[:count]
            self.link.note(count)
            left -= count
        if "partNumber" in query:
            self.parts[query["uploadId"][0]] += size
        else:
            self.objects[key] = Object(size, self.metadata(), bytes(kept))
        self.answer(200)

    def do_POST(self) -> None:
        """Begin an upload in parts, or end one; remove several objects."""
        key, query = self.begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploads" in query:
            upload = hashlib.sha256(os.urandom(8)).hexdigest()
            self.parts[upload] = 0
            self.objects[upload] = Object(0, self.metadata(), b"")
            text = f"<Bucket>{BUCKET}</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId>"
            self.answer(200, f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>".encode())
        elif "uploadId" in query:
            upload = query["uploadId"][0]
            self.objects[key] = Object(self.parts.pop(upload), self.objects.pop(upload).metadata, b"")
            text = f"<Bucket>{BUCKET}</Bucket><Key>{key}</Key><ETag>&quot;same&quot;</ETag><Location>/{key}</Location>"
            self.answer(200, f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>".encode())
        else:
            names = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for name in names:
                self.objects.pop(f"{BUCKET}/{name}", None)
            rows = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self.answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        key, _ = self.begin()
        self.objects.pop(key, None)
        self.answer(204)

    def metadata(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta-")}


class Server(ThreadingHTTPServer):
    """The server of one process, on a socket that others listen on too."""

    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening


class LimitedServer:
    """A running server of ``processes``; one that takes objects knows them in one process only."""

    def __init__(self, folder: Path, limits: Limits, processes: int) -> None:
        self.link = Link(limits)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        Handler.folder, Handler.link, Handler.objects, Handler.parts = folder, self.link, {}, {}
        self._processes = [multiprocessing.Process(target=self._serve, daemon=True) for _ in range(processes)]
        for process in self._processes:
            process.start()

    def _serve(self) -> None:
        Server(self._listening).serve_forever()

    def stop(self) -> None:
        """End serving."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._listening.close()


@contextmanager
def limited_server(folder: Path, limits: Limits, processes: int) -> Iterator[LimitedServer]:
    """Run a server meanwhile."""
    server = LimitedServer(folder, limits, processes)
    try:
        yield server
    finally:
        server.stop()


# ---- the reference: what bare sockets get from the server -----------------------------------------------


def stream(url: str, name: str, connections: int, share: int, of: int, block: int) -> None:
    """Take every ``of``-th block of a file from the ``share``-th, over several connections, and drop the bytes."""
    parts = urlsplit(url)
    size = head_size(parts.hostname or "", parts.port or 80, name)
    blocks = iter(range(share * block, size, of * block))
    lock = threading.Lock()

    def take() -> None:
        buffer = memoryview(bytearray(2**18))
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                with lock:
                    begin = next(blocks, None)
                if begin is None:
                    return
                end = min(begin + block, size)
                connection.sendall(
                    f"GET /{name} HTTP/1.1\r\nHost: a\r\nRange: bytes={begin}-{end - 1}\r\n\r\n".encode()
                )
                head = bytearray()
                while b"\r\n\r\n" not in head:
                    head += connection.recv(2**16)
                left = end - begin - (len(head) - head.index(b"\r\n\r\n") - 4)
                while left:
                    count = connection.recv_into(buffer[: min(left, buffer.nbytes)])
                    if not count:
                        raise OSError("the server closed a connection")
                    left -= count

    threads = [threading.Thread(target=take) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def head_size(host: str, port: int, name: str) -> int:
    """Return the size of a file by its server."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"HEAD /{name} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while piece := connection.recv(2**16):
            head += piece
    found = re.search(rb"Content-Length: (\d+)", head)
    if found is None:
        raise OSError("the server tells no size")
    return int(found[1])


def streams(server: LimitedServer, name: str, connections: int, processes: int, block: int) -> Traffic:
    """Take a file by blocks over bare sockets in several processes; return what went over the link."""
    server.link.traffic()
    arguments: list[Any] = [
        (server.url, name, -(-connections // processes), number, processes, block) for number in range(processes)
    ]
    running = [multiprocessing.Process(target=stream, args=each) for each in arguments]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return server.link.traffic()
