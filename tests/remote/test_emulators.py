"""Stores of Azure and Google as emulators of other hands speak them: Azurite, and fake-gcs-server, as a source alone.

The variables name the programs: ``nox -s emulators`` installs them and sets both. A program that is named must start.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from ..clusters import free_port
from ..command_line import run_cli
from .hub_server import Hub
from .support import WAIT_SECONDS, Remote, contents

obstore = pytest.importorskip("obstore")

AZURITE_VARIABLE, FAKE_GCS_VARIABLE = "DSV4CONVERT_AZURITE", "DSV4CONVERT_FAKE_GCS"
BUCKET, PREFIX = "models", "mine/Small-V4"
# Of every emulator of Azure's stores.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class Store:
    """A running emulator with an empty bucket, and the program that has it for the store."""

    store: Any
    remote: Remote
    endpoint: str

    def contents(self) -> dict[str, bytes]:
        """Return the objects of the folder by name."""
        keys = [entry["path"] for page in self.store.list(PREFIX) for entry in page]
        return {key.removeprefix(f"{PREFIX}/"): bytes(self.store.get(key).bytes()) for key in keys}


def running(variable: str, port: int, *options: str) -> Iterator[None]:
    """Run the program that a variable names until it answers, and then until the test has ended."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name the program: nox -s emulators")
    process = subprocess.Popen(
        [os.environ[variable], *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + WAIT_SECONDS
        while True:
            assert process.poll() is None, f"{variable}: the program ended"
            assert time.monotonic() < end, f"{variable}: no answer"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def make_container(endpoint: str) -> None:
    """Make Azure's bucket, which the library cannot."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    shown = "".join(f"{name}:{value}\n" for name, value in headers.items())
    # An empty line for each of the standard headers.
    text = "PUT\n" + "\n" * 11 + shown + f"/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
    url = f"{endpoint}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[Store]:
    """Yield Azurite with an empty container."""
    port = free_port()
    options = ("--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry")
    for _ in running(AZURITE_VARIABLE, port, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options):
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        make_container(endpoint)
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_ENDPOINT": endpoint,
            "AZURE_ALLOW_HTTP": "true",
        }
        store = obstore.store.from_url(
            f"az://{BUCKET}",
            account_name=ACCOUNT,
            account_key=KEY,
            endpoint=endpoint,
            client_options={"allow_http": True},
        )
        yield Store(store, Remote(Hub(), tmp_path / "home", environment), endpoint)


@pytest.fixture
def google(tmp_path: Path) -> Iterator[Store]:
    """Yield fake-gcs-server with an empty bucket."""
    port = free_port()
    host = f"127.0.0.1:{port}"
    options = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-public-host", host)
    for _ in running(FAKE_GCS_VARIABLE, port, *options):
        endpoint = f"http://{host}"
        post(f"{endpoint}/storage/v1/b?project=tests", json.dumps({"name": BUCKET}).encode(), "application/json")
        keys = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": "secret"}
        key = json.dumps(keys | {"private_key_id": ""})
        store = obstore.store.from_url(f"gs://{BUCKET}", service_account_key=key, client_options={"allow_http": True})
        environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": key, "GOOGLE_ALLOW_HTTP": "true"}
        yield Store(store, Remote(Hub(), tmp_path / "home", environment), endpoint)


def post(url: str, content: bytes, kind: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, content, {"Content-Type": kind}, method="POST")).close()


def test_a_folder_sent_to_azure_is_read_from_there_and_replaced(azure: Store, snapshot: Path, tmp_path: Path) -> None:
    target = f"az://{BUCKET}/{PREFIX}"
    arguments = ["--max-file-size", "200K", "--upload", target]
    result = azure.remote.run("dequantize", snapshot, tmp_path / "Small-BF16", *arguments)
    assert result.code == 0, result.err
    stored = azure.contents()
    assert "dsv4convert: begin Small-BF16" in stored.pop("README.md").decode()
    assert stored == contents(tmp_path / "Small-BF16")
    for name, content in stored.items():
        told = azure.store.get(f"{PREFIX}/{name}", options={"head": True}).attributes
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
    result = azure.remote.run("requantize", target, tmp_path / "remote")
    assert result.code == 0, result.err
    assert run_cli("requantize", tmp_path / "Small-BF16", tmp_path / "local").code == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    again = azure.remote.run("dequantize", snapshot, tmp_path / "other", *arguments)
    assert "already exists in the store; pass --overwrite to replace it" in again.error
    result = azure.remote.run("dequantize", snapshot, tmp_path / "other", *arguments, "--dtype", "f32", "--overwrite")
    assert result.code == 0, result.err
    stored = azure.contents()
    assert "dsv4convert: begin other" in stored.pop("README.md").decode()
    assert stored == contents(tmp_path / "other")
    assert KEY not in result.out + result.err


def test_azure_takes_parts_and_keeps_runs_apart(
    azure: Store, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4convert.containers.remote import store_upload

    for name, value in azure.remote.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store_upload, "PART_BYTES", 2**20)
    destination = store_upload.StoreDestination("az", f"{BUCKET}/{PREFIX}")
    path = tmp_path / "large.gguf"
    path.write_bytes(bytes(range(256)) * (2**20 // 256) * 5)
    sent = store_upload.Sent.of(path)
    destination.begin(["large.gguf"], is_folder=False, overwrite=False, resume=False, fingerprint="f")
    target = f"az://{BUCKET}/{PREFIX}"
    error = azure.remote.run("hf-to-gguf", snapshot, tmp_path / "a.gguf", "--upload", target).error
    assert "another run sends another output there" in error
    destination.send("large.gguf", path, sent)
    assert destination.finish({"large.gguf": (path, sent)}, lambda old: "card") == target
    assert azure.contents() == {"large.gguf": path.read_bytes(), "README.md": b"card"}


def test_a_folder_of_googles_store_makes_the_local_bytes(google: Store, snapshot: Path, tmp_path: Path) -> None:
    """That server takes uploads by Google's JSON interface alone, and the library sends by the XML interface."""
    source = f"gs://{BUCKET}/{PREFIX}"
    for path in snapshot.iterdir():
        url = f"{google.endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={PREFIX}/{path.name}"
        post(url, path.read_bytes(), "application/octet-stream")
    result = google.remote.run("dequantize", source, tmp_path / "remote")
    assert result.code == 0, result.err
    assert run_cli("dequantize", snapshot, tmp_path / "local").code == 0
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert f"{source}/nothing: nothing there" in google.remote.run("inspect", f"{source}/nothing").error
