"""Folders in object stores as sources, on a local server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dsv4convert.errors import FileFormatError

from ..command_line import run_cli
from .hub_server import Hub
from .store_server import SECRET, StoreServer
from .support import Remote, contents

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture
def s3(snapshot: Path, tmp_path: Path) -> Iterator[Remote]:
    """Yield what runs the program with a store in which ``s3://models/some/Small-V4`` is the checkpoint."""
    server = StoreServer()
    server.start()
    store = server.store()
    for path in snapshot.iterdir():
        obstore.put(store, f"some/Small-V4/{path.name}", path)
    yield Remote(Hub(), tmp_path / "home", server.environment)
    server.stop()


def test_a_folder_of_a_store_makes_the_local_bytes(s3: Remote, snapshot: Path, tmp_path: Path) -> None:
    result = s3.run("dequantize", "s3://models/some/Small-V4", tmp_path / "out")
    assert result.code == 0, result.err
    assert run_cli("dequantize", snapshot, tmp_path / "local").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    result = s3.run("inspect", "s3://models/nothing/here")
    assert result.code == 3
    assert "s3://models/nothing/here: nothing there" in result.error
    assert SECRET not in result.err
    assert "--cache is for repositories of the hub" in (
        s3.run("dequantize", "s3://models/some/Small-V4", tmp_path / "c", "--cache").error
    )


def test_etags_without_quotes_in_a_listing_are_those_of_the_headers(
    s3: Remote, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4convert.containers.remote import stores

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    listed = stores._list

    def unquoted(*arguments: Any) -> dict[str, Any]:
        return {key: {**entry, "e_tag": entry["e_tag"].strip('"')} for key, entry in listed(*arguments).items()}

    quoted = stores.list_store("s3", "models/some/Small-V4")
    monkeypatch.setattr(stores, "_list", unquoted)
    listing = stores.list_store("s3", "models/some/Small-V4")
    assert listing.revision == quoted.revision
    file, content = listing.files["config.json"], (snapshot / "config.json").read_bytes()
    read = bytearray(file.size)
    file.read_into(0, memoryview(read))
    assert read == content


@pytest.mark.parametrize("told", ["e_tag", "last_modified"])
def test_an_object_that_changes_in_the_store_is_an_error(told: str) -> None:
    from dsv4convert.containers.remote.stores import StoreRanges

    store = obstore.store.MemoryStore()
    obstore.put(store, "model", b"first")
    ranges = StoreRanges(store, "model", "s3://models/model", told, obstore.head(store, "model")[told])
    with ranges.fetch(0, 5) as pieces:
        assert b"".join(map(bytes, pieces)) == b"first"
    obstore.put(store, "model", b"other")
    with pytest.raises(FileFormatError, match="changed in the store"), ranges.fetch(0, 5):
        pass


def test_an_object_whose_etag_is_no_longer_told_is_an_error() -> None:
    from dsv4convert.containers.remote.stores import StoreRanges

    class Silent:
        meta: ClassVar = {"e_tag": None}

    store = obstore.store.MemoryStore()
    obstore.put(store, "model", b"first")
    ranges = StoreRanges(store, "model", "s3://models/model", "e_tag", obstore.head(store, "model")["e_tag"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "get", lambda *_, **__: Silent())
        with pytest.raises(FileFormatError, match="changed in the store"), ranges.fetch(0, 5):
            pass
