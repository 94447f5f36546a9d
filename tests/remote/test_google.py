"""Google's store as a source and as a destination: as S3's, with headers of its own (see ``StoreServer``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..command_line import run_cli
from .hub_server import Hub
from .store_server import SECRET, StoreServer
from .support import Remote, contents

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")

TARGET = "gs://models/mine/Small-V4"


@pytest.fixture
def google(tmp_path: Path) -> Iterator[tuple[StoreServer, Remote]]:
    """Yield a running store with an empty bucket, and the program that has it for Google's."""
    server = StoreServer("gs")
    server.start()
    yield server, Remote(Hub(), tmp_path / "home", server.environment)
    server.stop()


def test_what_is_sent_is_read_again(google: tuple[StoreServer, Remote], snapshot: Path, tmp_path: Path) -> None:
    server, remote = google
    out = tmp_path / "Small-BF16"
    arguments = ["dequantize", snapshot, out, "--max-file-size", "200K", "--upload", TARGET]
    result = remote.run(*arguments)
    assert result.code == 0, result.err
    stored = server.contents("mine/Small-V4")
    assert "dsv4convert: begin Small-BF16" in stored.pop("README.md").decode()
    assert stored == contents(out)
    names = [key.rpartition("/")[2] for key in server.received]
    assert names[-3:] == ["config.json", "model.safetensors.index.json", "README.md"]
    assert len(names) == len(set(names))
    result = remote.run("requantize", TARGET, tmp_path / "remote")
    assert result.code == 0, result.err
    assert run_cli("requantize", out, tmp_path / "local").code == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    result = remote.run(*arguments[:2], tmp_path / "other", *arguments[3:], "--dtype", "f32", "--overwrite")
    assert result.code == 0, result.err
    stored = server.contents("mine/Small-V4")
    assert "dsv4convert: begin other" in stored.pop("README.md").decode()
    assert stored == contents(tmp_path / "other")


def test_keys_that_expire_end_the_upload_and_resume_sends_the_rest(
    google: tuple[StoreServer, Remote], snapshot: Path, tmp_path: Path
) -> None:
    server, remote = google
    server.status = lambda method, key: 403 if len(server.received) >= 2 else None
    arguments = ["dequantize", snapshot, tmp_path / "out", "--max-file-size", "200K", "--upload", TARGET]
    result = remote.run(*arguments)
    assert result.code == 16
    error = result.err.splitlines()[-1]
    assert "the store refuses the upload; check the address, and the store's keys in the environment (GOOGLE_" in error
    assert "AWS_" not in error
    assert SECRET not in result.err
    server.status = lambda method, key: None
    result = remote.run(*arguments, "--resume")
    assert result.code == 0, result.err
    assert len(server.received) == len(set(server.received))
    assert "no such bucket" in remote.run("dequantize", snapshot, tmp_path / "b", "--upload", "gs://nothing/a").error
    assert "gs://nothing/a: nothing there" in remote.run("inspect", "gs://nothing/a").error


def test_a_large_file_goes_in_parts(
    google: tuple[StoreServer, Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4convert.containers.remote import store_upload

    server, _ = google
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store_upload, "PART_BYTES", 5 * 2**20)
    destination = store_upload.StoreDestination("gs", TARGET.removeprefix("gs://"))
    path = tmp_path / "large.gguf"
    path.write_bytes(bytes(range(256)) * (2**20 // 256) * 12)
    sent = store_upload.Sent.of(path)
    destination.begin(["large.gguf"], is_folder=False, overwrite=False, resume=False, fingerprint="f")
    destination.send("large.gguf", path, sent)
    assert sum(write.startswith("PUT") for write in server.writes) == 3
    assert destination.finish({"large.gguf": (path, sent)}, lambda old: "card") == TARGET
    assert server.contents("mine/Small-V4") == {"large.gguf": path.read_bytes(), "README.md": b"card"}
