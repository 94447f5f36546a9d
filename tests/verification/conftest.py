"""Every kind of output of one small checkpoint, made once, and private copies of them to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ..checkpoints import MakeCheckpoint
from .conversions import SMALL, Make, convert


@pytest.fixture(scope="session")
def small(make_checkpoint: MakeCheckpoint) -> Path:
    """Return the small checkpoint. Treat it as read-only."""
    return make_checkpoint("tiny", **SMALL)


@pytest.fixture(scope="session")
def outputs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes an output of a kind, once. Treat it as read-only."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = convert(small, kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@pytest.fixture
def copy_of(outputs: Make, tmp_path: Path) -> Make:
    """Return a function that makes a private copy of an output of a kind."""

    def make(kind: str) -> Path:
        original = outputs(kind)
        if original.is_dir():
            return shutil.copytree(original, tmp_path / original.name)
        for path in original.parent.glob("*.gguf"):
            shutil.copy(path, tmp_path / path.name)
        return tmp_path / original.name

    return make
