"""Folders of web servers as sources, and the small parts that all remote sources share."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4convert.containers.remote.http import _look_at, list_web_folder
from dsv4convert.containers.sources import Intervals, is_address, looks_like_hub_id
from dsv4convert.errors import FileFormatError, InputMissingError

from ..command_line import run_cli
from .hub_server import Hub
from .support import Remote, contents


class Folder(SimpleHTTPRequestHandler):
    """Files of a folder with etags, by ranges unless ``whole``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    whole = False
    told = ("ETag", '"first"')  # with every answer
    heeds_conditions = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        asked = self.headers.get("If-Match") or self.headers.get("If-Unmodified-Since") or self.told[1]
        if self.heeds_conditions and asked != self.told[1]:
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        part = content if self.whole or not first else content[int(first) : int(last) + 1]
        self.send_response(200 if part is content else 206)
        self.send_header("Content-Length", str(len(part)))
        if part is not content:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified" or value == self.told[1]:  # the date of the file on the disk is not told
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        self.send_header(*self.told)
        super().end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True


@contextmanager
def serving(folder: Path, handler: type[Folder] = Folder) -> Iterator[str]:
    """Yield the address of a web server with a folder."""
    server = Server(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(snapshot: Path) -> Iterator[tuple[str, type[Folder]]]:
    """Yield the address of a web server with the checkpoint, and its handler."""

    class Handler(Folder):
        pass

    with serving(snapshot, Handler) as address:
        yield address, Handler


def connections(handler: type[Folder], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that gets an entry for each connection which a server is asked for, by this process too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    opened: list[object] = []
    monkeypatch.setattr(handler, "setup", lambda made: (opened.append(made), SimpleHTTPRequestHandler.setup(made)))
    return opened


def test_requests_one_after_another_share_a_connection(
    web: tuple[str, type[Folder]], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = connections(web[1], monkeypatch)
    found = [_look_at(web[0], "config.json") for _ in range(3)][-1]
    assert found is not None
    content = bytearray(30)
    for begin in range(0, 30, 10):
        with found.ahead(begin, begin + 10) as reader:
            reader.read_into(memoryview(content)[begin : begin + 10])
    assert content == (snapshot / "config.json").read_bytes()[:30]
    assert len(opened) == 1


def test_a_process_that_was_forked_reads_over_connections_of_its_own(
    web: tuple[str, type[Folder]], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = connections(web[1], monkeypatch)
    found = _look_at(web[0], "config.json")
    assert found is not None

    def is_read() -> bool:
        content = bytearray(found.size)
        with found.ahead(0, found.size) as reader:
            reader.read_into(memoryview(content))
        return content == (snapshot / "config.json").read_bytes()

    assert is_read()
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            os._exit(not is_read())
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(opened) == 2


@pytest.fixture
def plain(tmp_path: Path) -> Remote:
    """Return what runs the program without a hub."""
    return Remote(Hub(), tmp_path / "home")


def test_a_folder_of_a_web_server_makes_the_local_bytes(
    web: tuple[str, type[Folder]], plain: Remote, snapshot: Path, tmp_path: Path
) -> None:
    result = plain.run("dequantize", f"{web[0]}/", tmp_path / "out")
    assert result.code == 0, result.err
    assert run_cli("dequantize", snapshot, tmp_path / "local").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_shards_are_found_without_a_listing(plain: Remote, snapshot: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert run_cli("shard", snapshot, shards, "--mp", "2").code == 0
    assert run_cli("unshard", shards, tmp_path / "local").code == 0
    with serving(shards) as address:
        result = plain.run("unshard", address, tmp_path / "out")
        assert result.code == 0, result.err
        assert contents(tmp_path / "out") == contents(tmp_path / "local")
        assert json.loads(plain.run("inspect", address, "--json").out)["ranks"] == 2
        found, local = plain.run("estimate", address, "--json"), run_cli("estimate", shards, "--json")
        assert [json.loads(each.out)["weights"] for each in (found, local)] == [json.loads(local.out)["weights"]] * 2
        (shards / "model1-mp2.safetensors").unlink()
        assert "the shard of rank 1 of 2 is missing" in plain.run("unshard", address, tmp_path / "other").error


def test_a_folder_that_seems_to_have_no_weights_is_not_taken_for_a_config_alone(
    plain: Remote, snapshot: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_bytes((snapshot / "config.json").read_bytes())
    (folder / "model0-mp3.safetensors").touch()
    with serving(folder) as address:
        for command in (["inspect"], ["estimate"], ["unshard"]):
            out = [str(tmp_path / "out")] if command == ["unshard"] else []
            error = plain.run(*command, address, *out).error
            assert "a web server cannot list a folder: shards are looked for as model0-mp1.safetensors to" in error
        assert f"for its config alone, pass {address}/config.json" in plain.run("estimate", address).error
        assert "a config alone: every weight is taken" in plain.run("estimate", f"{address}/config.json").out


def test_a_server_without_ranges_is_named(web: tuple[str, type[Folder]], plain: Remote) -> None:
    web[1].whole = True
    result = plain.run("inspect", web[0])
    assert result.code == 16
    assert "the server does not send ranges: expected HTTP status 206, got 200" in result.error


@pytest.mark.parametrize("heeds_conditions", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ETag", '"first"'), ("ETag", '"second"')),
        (("ETag", '"first"'), ("X-Nothing", "told")),
        (("Last-Modified", "Thu, 26 Nov 2026 10:00:00 GMT"), ("Last-Modified", "Thu, 26 Nov 2026 10:00:01 GMT")),
        (("Last-Modified", "Thu, 26 Nov 2026 10:00:00 GMT"), ("X-Nothing", "told")),
    ],
    ids=["other etag", "etag no longer told", "other date", "date no longer told"],
)
def test_a_file_that_may_have_changed_on_the_server_is_an_error(
    web: tuple[str, type[Folder]],
    before: tuple[str, str],
    after: tuple[str, str],
    heeds_conditions: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web[1].told, web[1].heeds_conditions = before, heeds_conditions
    with pytest.raises(InputMissingError, match="HF_HUB_OFFLINE forbids fetching it; unset HF_HUB_OFFLINE"):
        list_web_folder(web[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    file = list_web_folder(web[0]).files["config.json"]
    web[1].told = after
    with pytest.raises(FileFormatError, match="since it was first looked at; run again, a conversion with --fresh"):
        file.read_into(0, memoryview(bytearray(10)))


def test_an_error_of_a_folder_waits_for_no_other_file(
    web: tuple[str, type[Folder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(handler: Folder) -> None:
        handler.send_response(403 if handler.path == "/config.json" else 503)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(web[1], "do_HEAD", answer)
    begin = time.monotonic()
    with pytest.raises(InputMissingError, match="the server refuses access"):
        list_web_folder(web[0])
    assert time.monotonic() - begin < 10


def test_what_is_no_folder_on_a_server_is_one_line(web: tuple[str, type[Folder]], plain: Remote) -> None:
    assert "no such file on the server" in plain.run("inspect", f"{web[0]}/elsewhere").error
    assert "only https is read" in plain.run("inspect", "http://192.0.2.1/model").error
    error = plain.run("inspect", "https://somebody:password@192.0.2.1/model?key=secret").error
    assert "has no password, query or fragment" in error
    assert "secret" not in error
    assert "password@" not in error


def test_a_missing_package_is_told_with_the_address_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dsv4convert.containers.remote.stores", None)
    result = run_cli("inspect", "s3://models/some/Small-V4")
    assert result.code == 15
    assert result.error.startswith("s3://models/some/Small-V4: no such folder here")


@pytest.mark.parametrize(
    "url", ["https://[::1", "https://host:port/m", "https://[::1]:99999/m", "https://u:password@\u2100.com/m"]
)
def test_what_is_no_web_address_is_one_line(url: str, plain: Remote) -> None:
    result = plain.run("inspect", url)
    assert result.code == 2
    assert "not a web address: expected https://HOST/FOLDER" in result.error
    assert "password" not in result.error


def test_a_host_that_cannot_be_is_one_line(plain: Remote) -> None:
    result = plain.run("inspect", f"https://{'a' * 64}.example/m")
    assert result.code == 16
    assert "config.json: no such address; check the address" in result.error


@pytest.mark.parametrize(
    "target",
    ["http://[bad", "//host:port/x", "http://[::1]:99999/", "ftp://localhost/x", "file:///etc/passwd"],
)
def test_a_redirect_to_no_address_is_one_line(
    target: str, web: tuple[str, type[Folder]], plain: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def redirect(handler: Folder) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setattr(web[1], "do_HEAD", redirect)
    result = plain.run("inspect", web[0])
    assert result.code == 16
    assert "the server redirects to what is no address" in result.error


@pytest.mark.parametrize(
    ("text", "expected"),
    [("o/n", True), ("o/n@main", True), ("o/n@refs/pr/1", True), ("a/b/c", False), ("../n", False), ("./o", False)],
)
def test_names_of_the_hub_are_told_from_paths(text: str, expected: bool) -> None:
    assert looks_like_hub_id(text) is expected
    assert not is_address(text)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12), st.integers(0, 50), st.integers(0, 20))
def test_runs_of_bytes_are_those_that_were_added(added: list[tuple[int, int]], begin: int, count: int) -> None:
    runs, held = Intervals(), set()
    for first, size in added:
        if size:
            runs.add(first, first + size)
            held |= set(range(first, first + size))
    assert [n for a, b in runs.runs() for n in range(a, b)] == sorted(held)
    missing = [n for a, b in runs.gaps(begin, begin + count) for n in range(a, b)]
    assert missing == [n for n in range(begin, begin + count) if n not in held]
