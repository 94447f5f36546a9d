"""A local hub with the tiny checkpoint, and the same checkpoint as the hub's cache has it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hub_server import Hub, commit_of
from .store_server import StoreServer, serving
from .support import REPOSITORY, Remote


@pytest.fixture(scope="session")
def snapshot(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny checkpoint in a folder that is named as the hub's cache names it."""
    folder = tmp_path_factory.mktemp("hub") / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots"
    return Path(shutil.copytree(tiny, folder / commit_of(tiny)))


@pytest.fixture
def remote(snapshot: Path, tmp_path: Path) -> Iterator[Remote]:
    """Yield a running hub that has the tiny checkpoint."""
    hub = Hub({REPOSITORY: {"main": snapshot}})
    hub.start()
    yield Remote(hub, tmp_path / "home")
    hub.stop()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """Yield a running store with an empty bucket, see ``serving``."""
    yield from serving(StoreServer(), monkeypatch)
