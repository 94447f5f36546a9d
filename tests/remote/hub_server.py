"""A server that behaves like the hub: repositories by revision, redirects to a store on another host, ranges, faults.

The hub answers at 127.0.0.1 and its store at localhost, so that what is sent to the one and not to the other shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT_HEADER, LINKED_ETAG, LINKED_SIZE = "X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size"
WEIGHT_SUFFIXES = (".safetensors", ".gguf")


@dataclass
class Faults:
    """What goes wrong; each number is the probability of it in a request for bytes."""

    cut: float = 0.0
    busy: float = 0.0
    broken: float = 0.0
    most_cuts: int = 10**9
    holds: Callable[[], bool] = lambda: False  # whether requests for bytes wait now
    seconds_before_answer: float = 0.0
    expiring: int = 0  # so many of the store's addresses are refused as expired
    cut_uploads: int = 0  # so many files that are sent are cut in the middle
    broken_posts: int = 0  # so many requests that change something are answered by 503
    lost_commits: int = 0  # so many commits are made, and their answer is lost
    wrong_sha: bool = False  # the hub names another SHA-256 than was sent
    before_upload: Callable[[int], None] = lambda number: None  # called with the number of files sent before

    random: random.Random = field(default_factory=lambda: random.Random(7))


@dataclass
class Hub:
    """Repositories by name, each with folders by revision, and what was asked of them."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    token: str | None = None
    faults: Faults = field(default_factory=Faults)
    extra_names: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # host, method, path
    authorized: list[str] = field(default_factory=list)  # hosts that were sent a token
    sent: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)  # by file, runs of bytes that were sent
    cuts: int = 0
    folders: Path | None = None  # where folders of commits are made
    part_bytes: int | None = None  # files that are sent in parts of so many bytes
    objects: dict[str, bytes] = field(default_factory=dict)  # content of large files by SHA-256
    parts: dict[str, bytes] = field(default_factory=dict)  # parts by object and number
    received: list[str] = field(default_factory=list)  # objects and parts in the order in which they were sent
    commits: list[tuple[str, list[str]]] = field(default_factory=list)  # repository, names
    visibility: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    server: ThreadingHTTPServer | None = None
    port: int = 0

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.close_connections()
            self.server.server_close()
            self.server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        return f"http://localhost:{self.port}"

    def commit(self, repository: str, revision: str) -> str | None:
        """Return the commit that a revision stands for: a hash of the names and bytes of its folder."""
        folders = self.repositories.get(repository, {})
        for name, folder in folders.items():
            digest = commit_of(folder)
            if revision in (name, digest):
                return digest
        return None

    def folder(self, repository: str, revision: str) -> Path | None:
        folders = self.repositories.get(repository, {})
        return next((f for name, f in folders.items() if revision in (name, commit_of(f))), None)

    def record(self, name: str, begin: int, end: int) -> None:
        with self.lock:
            self.sent.setdefault(name, Counter())[(begin, end)] += 1

    def forget(self) -> None:
        with self.lock:
            self.sent.clear()
            self.requests.clear()
            self.authorized.clear()

    def times_sent(self, name: str, size: int) -> bytearray:
        """Return for each byte of a file how often it was sent."""
        counts = bytearray(size)
        for (begin, end), times in self.sent.get(name, {}).items():
            for position in range(begin, end):
                counts[position] += times
        return counts


_commits: dict[tuple[str, int], str] = {}


def commit_of(folder: Path) -> str:
    stamp = max((path.stat().st_mtime_ns for path in folder.rglob("*")), default=0)
    key = str(folder), stamp
    if key not in _commits:
        digest = hashlib.sha1()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
        _commits[key] = digest.hexdigest()
    return _commits[key]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: object) -> None:
        self.connections: set[object] = set()
        super().__init__(*args)  # type: ignore[arg-type]

    def process_request(self, request, client_address):  # type: ignore[no-untyped-def]
        self.connections.add(request)
        super().process_request(request, client_address)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(2)  # type: ignore[attr-defined]
            except OSError:
                continue

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: connections are meant to break."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        """Take the content of a file, or a part of it, as the store does."""
        hub, name = self.hub, urlsplit(self.path).path.removeprefix("/lfs/")
        self.note_request()
        hub.faults.before_upload(len(hub.received))
        with hub.lock:
            is_cut = hub.faults.cut_uploads > 0
            hub.faults.cut_uploads -= is_cut
        if is_cut:
            self.rfile.read(1)
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        content = self.read_body()
        with hub.lock:
            hub.received.append(name)
            if "/" in name:
                hub.parts[name] = content
            elif hashlib.sha256(content).hexdigest() == name:
                hub.objects[name] = content
        return self.refuse(200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def do_POST(self) -> None:
        """Answer what changes a repository."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.note_request()
        body = self.read_body()
        with hub.lock:
            is_broken = hub.faults.broken_posts > 0
            hub.faults.broken_posts -= is_broken
        is_signed = path.startswith("/lfs-")
        if not is_signed and hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401)
        if is_broken:
            return self.refuse(503)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            assert hub.folders is not None
            folder = hub.folders / name
            folder.mkdir(parents=True)
            hub.repositories[name] = {"main": folder}
            hub.visibility[name] = asked.get("visibility", "public")
            return self.send_json({"url": f"{hub.endpoint}/{name}"})
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(WEIGHT_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send_json({"files": files})
        if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.send_json({"objects": [self.batch(entry) for entry in json.loads(body)["objects"]]})
        if found := re.fullmatch(r"/lfs-complete/(\w+)", path):
            pieces = [hub.parts[f"{found[1]}/{part['partNumber']}"] for part in json.loads(body)["parts"]]
            content = b"".join(pieces)
            if hashlib.sha256(content).hexdigest() == found[1]:
                hub.objects[found[1]] = content
            return self.send_json({})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/lfs-verify":
            return self.refuse(200 if json.loads(body)["oid"] in hub.objects else 422)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.take_commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self.refuse(404)

    def note_request(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        with self.hub.lock:
            self.hub.requests.append((host, self.command, self.path))
            if "Authorization" in self.headers:
                self.hub.authorized.append(host)

    def read_body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = bytearray()
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(content)

    def batch(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return where the content of a file is to be sent, if it is not there."""
        hub, oid = self.hub, entry["oid"]
        if oid in hub.objects:
            return entry
        place = f"{hub.store}/lfs/{oid}"
        verify = {"href": f"{hub.endpoint}/lfs-verify?Signature=secret-signature"}
        if hub.part_bytes is None:
            return entry | {"actions": {"upload": {"href": f"{place}?Signature=secret-signature"}, "verify": verify}}
        count = -(-entry["size"] // hub.part_bytes)
        parts = {str(number): f"{place}/{number}?Signature=secret-signature" for number in range(1, count + 1)}
        upload = {"href": f"{hub.endpoint}/lfs-complete/{oid}", "header": {"chunk_size": str(hub.part_bytes), **parts}}
        return entry | {"actions": {"upload": upload, "verify": verify}}

    def take_commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        main = hub.repositories[repository]["main"]
        if lines[0]["value"].get("parentCommit") != hub.commit(repository, "main"):
            return self.refuse(412)
        assert hub.folders is not None
        folder = hub.folders / f"{repository}-{len(hub.commits)}"
        shutil.copytree(main, folder, copy_function=shutil.copy)
        names = []
        for line in lines[1:]:
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            names.append(line["value"]["path"])
            if line["key"] == "deletedFile":
                path.unlink()
            elif line["key"] == "lfsFile":
                path.write_bytes(hub.objects[line["value"]["oid"]])
            else:
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        hub.commits.append((repository, names))
        hub.repositories[repository] = {"main": folder, f"before-{len(hub.commits)}": main}
        if hub.faults.lost_commits:
            hub.faults.lost_commits -= 1
            return self.refuse(503)
        oid = hub.commit(repository, "main")
        return self.send_json({"commitUrl": f"{hub.endpoint}/{repository}", "commitOid": oid, "pullRequestUrl": None})

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        host = self.headers.get("Host", "").partition(":")[0]
        hub = self.hub
        self.note_request()
        if host != "localhost" and hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid credentials"})
        faults = hub.faults
        with hub.lock:
            draw = faults.random.random()
        if draw < faults.busy:
            return self.refuse(429, {"Retry-After": "0"})
        if draw < faults.busy + faults.broken:
            return self.refuse(503)
        if host == "localhost":
            return self.stored(path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        found = found or re.fullmatch(r"/api/models/([^/]+/[^/]+)()", path)
        if found:
            return self.info(found[1], found[2] or "main")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        if found:
            return self.tree(found[1], found[2])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            return self.resolve(*found.groups())
        return self.refuse(404)

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def info(self, repository: str, revision: str) -> None:
        hub = self.hub
        if repository not in hub.repositories:
            return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
        folder = hub.folder(repository, revision)
        if folder is None:
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [self.sibling(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in hub.extra_names]
        return self.send_json(
            {"id": repository, "sha": hub.commit(repository, revision), "siblings": siblings, "tags": []}
        )

    def sibling(self, path: Path, folder: Path) -> dict[str, Any]:
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": str(path.relative_to(folder)), "size": len(content), "blobId": blob}
        if path.name.endswith(WEIGHT_SUFFIXES):
            sha = "0" * 64 if self.hub.faults.wrong_sha else hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, repository: str, revision: str) -> None:
        folder = self.hub.folder(repository, revision)
        if folder is None:
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.send_json(
            [
                {"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": str(path.relative_to(folder))}
                for path in files
            ]
        )

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def resolve(self, repository: str, revision: str, name: str) -> None:
        folder = self.hub.folder(repository, revision)
        if folder is None or not (folder / name).is_file():
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        path = folder / name
        etag = f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"' if path.stat().st_size < 2**26 else '"large"'
        headers = {COMMIT_HEADER: self.hub.commit(repository, revision) or "", "ETag": etag}
        if name.endswith(WEIGHT_SUFFIXES):
            self.send_response(302)
            headers |= {LINKED_ETAG: etag, LINKED_SIZE: str(path.stat().st_size)}
            headers["Location"] = f"{self.hub.store}/{repository}/{revision}/{name}?Signature=secret-signature"
            headers["Content-Length"] = "0"
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            return None
        return self.send_file(path, f"{repository}/{name}", headers)

    def stored(self, path: str) -> None:
        hub = self.hub
        _, owner, name, revision, file = path.split("/", 4)
        with hub.lock:
            expired = hub.faults.expiring > 0
            hub.faults.expiring -= expired
        if expired:
            return self.refuse(403)
        folder = hub.folder(f"{owner}/{name}", revision)
        if folder is None or not (folder / file).is_file():
            return self.refuse(404)
        return self.send_file(folder / file, f"{owner}/{name}/{file}", {"ETag": '"store"'})

    def send_file(self, path: Path, name: str, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(size, int(asked[2] or size - 1) + 1)) if asked else (0, size)
        if begin >= size and asked:
            return self.refuse(416)
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return None
        return self.send_bytes(path, name, begin, end)

    def send_bytes(self, path: Path, name: str, begin: int, end: int) -> None:
        faults, hub = self.hub.faults, self.hub
        while faults.holds():
            time.sleep(0.01)
        if faults.seconds_before_answer:
            time.sleep(faults.seconds_before_answer)
        last = end
        with hub.lock:
            if end - begin > 1 and hub.cuts < faults.most_cuts and faults.random.random() < faults.cut:
                hub.cuts += 1
                last = faults.random.randrange(begin + 1, end)
        with path.open("rb") as file:
            file.seek(begin)
            left = last - begin
            step = 2**16
            while left:
                piece = file.read(min(step, left))
                self.wfile.write(piece)
                left -= len(piece)
        hub.record(name, begin, last)
        if last < end:
            self.close_connection = True
            self.connection.shutdown(2)


Make = Callable[[], Hub]
