"""A local server that speaks S3 (moto's) or Google's form of it, counts what it is sent, and fails as it is told to."""

from __future__ import annotations

import io
import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import unescape

import pytest

from dsv4convert.containers import fetching

SECRET = "very-secret-key"
BUCKET = "models"
# What a run writes besides its files, to be known by other runs.
MARK = "dsv4convert-upload.json"
# By which moto knows a request for S3, and in which it checks nothing.
S3_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class StoreServer:
    """A server with one empty bucket.

    ``received`` are the keys of objects that arrived whole, one for each time, ``reads`` the ranges asked for.
    ``before_upload`` is called with how many requests that write or remove something came before; those of marks do not
    count. ``status`` answers such a request instead of the store, when it returns a number for the key. With
    ``conditions`` false, an object that is to be put on a condition is refused, as by stores that implement none.

    Google's store takes the requests of S3, as the library sends them, with metadata in headers of other names.
    """

    def __init__(self, scheme: str = "s3") -> None:
        self.scheme = scheme
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.received: list[str] = []
        self.writes: list[str] = []
        self.reads: list[tuple[str, range]] = []
        self.before_upload: Callable[[int], None] = lambda number: None
        self.status: Callable[[str, str], int | None] = lambda method, key: None
        self.conditions = True

    def start(self, *, shares: bool = False) -> None:
        """Serve an empty bucket, or one that ``shares`` its objects with the other servers of this process."""
        self._thread.start()
        if not shares:
            self._request("POST", "/moto-api/reset")
            self._request("PUT", f"/{BUCKET}")
        self.writes.clear()

    def stop(self) -> None:
        """End serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the program reaches the server."""
        if self.scheme == "gs":
            keys = {"gcs_base_url": self.endpoint, "disable_oauth": True, "client_email": "", "private_key": SECRET}
            return {
                "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(keys | {"private_key_id": ""}),
                "GOOGLE_ALLOW_HTTP": "true",
            }
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true", **keys}

    def store(self) -> Any:
        """Return the bucket, as ``obstore`` has it."""
        import obstore

        if self.scheme == "gs":
            key = self.environment["GOOGLE_SERVICE_ACCOUNT_KEY"]
            return obstore.store.from_url(
                f"gs://{BUCKET}", service_account_key=key, client_options={"allow_http": True}
            )
        return obstore.store.from_url(
            f"s3://{BUCKET}",
            endpoint=self.endpoint,
            access_key_id="key",
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return the objects below a prefix by name."""
        store = self.store()
        keys = [entry["path"] for page in store.list(prefix) for entry in page]
        return {key.removeprefix(f"{prefix}/"): bytes(store.get(key).bytes()) for key in keys}

    def _request(self, method: str, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(self.endpoint + path, method=method)).close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if self.scheme != "gs":
            return self._answer_s3(environ, start)
        environ["HTTP_AUTHORIZATION"] = S3_AUTHORIZATION
        for name in [name for name in environ if name.startswith("HTTP_X_GOOG_META_")]:
            environ[name.replace("GOOG", "AMZ")] = environ.pop(name)

        def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start(status, [(name.lower().replace("x-amz-", "x-goog-"), value) for name, value in headers], *rest)

        return self._answer_s3(environ, started)

    def _answer_s3(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        fields = parse_qs(query, keep_blank_values=True)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
        if method == "GET" and asked is not None:
            with self._lock:
                self.reads.append((path.removeprefix(f"/{BUCKET}/"), range(int(asked[1]), int(asked[2]) + 1)))
        if "delete" in fields:  # several objects, named in the body
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            method, keys = "DELETE", [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", body.decode())]
        elif path.startswith(f"/{BUCKET}/") and method in ("PUT", "POST", "DELETE"):
            keys = [path.removeprefix(f"/{BUCKET}/")]
        else:
            return self._moto(environ, start)  # type: ignore[no-any-return, no-untyped-call]
        if not self.conditions and "HTTP_IF_NONE_MATCH" in environ:
            return self._refuse(501, environ, start)
        if keys[0].endswith(MARK):
            return self._moto(environ, start)  # type: ignore[no-any-return, no-untyped-call]
        for key in keys:
            with self._lock:
                self.writes.append(f"{method} {key}")
                number = len(self.writes) - 1
            self.before_upload(number)
            status = self.status(method, key)
            if status is not None:
                return self._refuse(status, environ, start)
        statuses: list[str] = []

        def started(status: str, *rest: Any) -> Any:
            statuses.append(status)
            return start(status, *rest)

        answer: Iterable[bytes] = self._moto(environ, started)  # type: ignore[no-untyped-call]
        whole = "uploadId" in fields if method == "POST" else method == "PUT" and "partNumber" not in fields
        if whole and statuses[:1] == ["200 OK"]:
            with self._lock:
                self.received += keys
        return answer

    def _refuse(self, status: int, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{status} {quote('told to')}", [("Content-Length", "0")])
        return [b""]


def serving(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """Yield a store while it runs, whose keys this process and those that it starts have."""
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetching, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(fetching, "LONGEST_WAIT_SECONDS", 0.1)
    yield server
    server.stop()
