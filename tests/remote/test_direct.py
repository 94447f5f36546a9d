"""Requests over connections of our own: certificates verified, renewed, proxies left to the hub's client."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import huggingface_hub
import pytest

from dsv4convert import __version__
from dsv4convert.containers.fetching import TransientError
from dsv4convert.containers.remote import direct
from dsv4convert.containers.remote.http import request
from dsv4convert.errors import InputOutputError

# Of localhost, until 2126, made for these tests and known to nobody else's.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUYUzQBYomCicpLwQkoXb91ll5ymIwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzEwMTcxN1oYDzIxMjYxMTAz
MTAxNzE3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASGa71chZlzxDDysqTmlap/LIeoXQn9Qxc6TLpt7jyKDQCF0A/ilamQ
uaACWpUY908AwoOxRwij34GSD/ljAqoPo28wbTAdBgNVHQ4EFgQUxN4ZtnrCpRc0
dQOVHTxpfJjJg4owHwYDVR0jBBgwFoAUxN4ZtnrCpRc0dQOVHTxpfJjJg4owDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhAMuH3A149cCy53RFjCbxYlQfL20m6gGbz0H+p82Mw6U+AiEA
seaC/bWRwQlqy/SpoAePIpaLZym+qZ8svh/9H6hMO1A=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgBk0cENGQfa+u96H4
vJwSfGGEXnqY7zwcVfQ0vh+w+B+hRANCAASGa71chZlzxDDysqTmlap/LIeoXQn9
Qxc6TLpt7jyKDQCF0A/ilamQuaACWpUY908AwoOxRwij34GSD/ljAqoP
-----END PRIVATE KEY-----
"""


class Handler(BaseHTTPRequestHandler):
    """Answers every request with the path that was asked for, or redirects to the bytes of ``location``."""

    protocol_version = "HTTP/1.1"
    closes = False  # without a word of it
    location = b""
    agents: list[list[str]]  # of each request
    opened: list[object]
    before = after = b""  # of an answer
    only: bytes | None = None  # instead of an answer, before it closes

    def setup(self) -> None:
        self.opened.append(self)
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.agents.append(self.headers.get_all("User-Agent", []))
        if self.only is not None:
            self.wfile.write(self.only)
            self.close_connection = True
            return
        if self.location and not self.path.startswith("/new/"):
            self.wfile.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % self.location)
            return
        content = self.path.encode()
        self.wfile.write(self.before)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if self.after:
            time.sleep(0.1)  # it is there when the answer has been read
            self.wfile.write(self.after)
        self.close_connection = self.closes


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Yield a running server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"agents": [], "opened": []}))
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def get(url: str) -> str:
    with request("GET", url, {}, "place") as response:
        return b"".join(response.iter_raw()).decode()


def test_a_connection_that_the_server_closed_is_made_anew(server: ThreadingHTTPServer) -> None:
    server.RequestHandlerClass.closes = True  # type: ignore[attr-defined]
    for number in range(3):
        assert get(f"http://127.0.0.1:{server.server_port}/{number}") == f"/{number}"


def test_a_connection_that_was_idle_for_long_is_made_anew(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = server.RequestHandlerClass.opened  # type: ignore[attr-defined]
    for now, expected in ((0.0, 1), (29.0, 1), (60.0, 2)):
        monkeypatch.setattr(direct, "monotonic", partial(float, now))
        get(f"http://127.0.0.1:{server.server_port}/a")
        assert len(opened) == expected


def test_a_program_is_named_once(server: ThreadingHTTPServer) -> None:
    with request("GET", f"http://127.0.0.1:{server.server_port}/a", {"user-agent": "hub"}, "place") as response:
        response.read()
    get(f"http://127.0.0.1:{server.server_port}/a")
    agents = server.RequestHandlerClass.agents  # type: ignore[attr-defined]
    assert agents == [["hub"], [f"dsv4convert/{__version__}"]]


def test_a_redirect_may_have_letters_of_any_language(server: ThreadingHTTPServer) -> None:
    server.RequestHandlerClass.location = "/new/ü?é".encode()  # type: ignore[attr-defined]
    assert get(f"http://127.0.0.1:{server.server_port}/a") == "/new/%C3%BC?%C3%A9"
    server.RequestHandlerClass.location = b"/new/\xfc"  # type: ignore[attr-defined]
    assert get(f"http://127.0.0.1:{server.server_port}/a") == "/new/%C3%BC"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "host name not resolved"),
        (ssl.SSLZeroReturnError(6, "closed"), "ssl zero return error"),
        (ConnectionRefusedError(111, "refused"), "connection refused error"),
    ],
    ids=["host", "TLS", "refused"],
)
def test_errors_of_a_connection_are_words(error: OSError, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(direct, "_connect", fail)
    with pytest.raises(TransientError, match=f"^{words}$"):
        get("https://localhost/a")


def test_more_than_an_answer_is_not_taken_for_the_next_one(server: ThreadingHTTPServer) -> None:
    server.RequestHandlerClass.after = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n/0"  # type: ignore[attr-defined]
    for number in range(1, 4):
        assert get(f"http://127.0.0.1:{server.server_port}/{number}") == f"/{number}"
        time.sleep(0.2)


def test_an_answer_may_be_announced(server: ThreadingHTTPServer) -> None:
    announced = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
    server.RequestHandlerClass.before = announced * 2  # type: ignore[attr-defined]
    for number in range(2):
        assert get(f"http://127.0.0.1:{server.server_port}/{number}") == f"/{number}"


def test_a_head_that_is_cut_anywhere_may_be_asked_for_again(server: ThreadingHTTPServer) -> None:
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /b\r\n\r\n"
    for size in range(len(head)):
        server.RequestHandlerClass.only = head[:size]  # type: ignore[attr-defined]
        with pytest.raises(TransientError, match=r"^(incomplete read|remote disconnected)$"):
            get(f"http://127.0.0.1:{server.server_port}/a")


@pytest.mark.parametrize("date", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon", "soon"])
def test_a_date_that_is_none_is_not_waited_for(server: ThreadingHTTPServer, date: str) -> None:
    busy = f"HTTP/1.1 429 Busy\r\nRetry-After: {date}\r\nContent-Length: 0\r\n\r\n"
    server.RequestHandlerClass.before = busy.encode()  # type: ignore[attr-defined]
    with pytest.raises(TransientError, match=r"^HTTP status 429$") as caught:
        get(f"http://127.0.0.1:{server.server_port}/a")
    assert caught.value.wait is None


def test_a_path_is_sent_as_it_is_and_what_no_path_has_is_encoded(server: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    assert get(f"{url}/a%20b/c?Signature=x%2By~&d=e+f") == "/a%20b/c?Signature=x%2By~&d=e+f"
    assert get(f"{url}/a b/ü") == "/a%20b/%C3%BC"
    assert get(url) == "/"


def test_certificates_are_verified(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setattr(direct, "_context", [])
    with pytest.raises(InputOutputError, match=r"the server's certificate cannot be verified \(self-signed") as told:
        get(f"https://localhost:{server.server_port}/a")
    assert "SSL_CERT_FILE" in str(told.value)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setattr(direct, "_context", [])
    with pytest.raises(InputOutputError, match=r"none.pem: certificates cannot be read \(No such file"):
        get(f"https://localhost:{server.server_port}/a")
    monkeypatch.setattr(direct, "_context", [])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert get(f"https://localhost:{server.server_port}/a") == "/a"


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_behind_a_proxy_the_hubs_client_sends(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct.is_direct()
    monkeypatch.setenv(variable, "http://localhost:3128")
    assert not direct.is_direct()


def test_a_client_of_the_programs_own_sends(server: ThreadingHTTPServer) -> None:
    seen: list[str] = []

    def make() -> httpx2.Client:
        return httpx2.Client(event_hooks={"request": [lambda request: seen.append(str(request.url))]})

    url = f"http://127.0.0.1:{server.server_port}/a"
    huggingface_hub.set_client_factory(make)
    try:
        assert get(url) == "/a"
        assert seen == [url]
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert direct.is_direct()
