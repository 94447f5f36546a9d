"""Checkpoints that eight ranks can share, and their shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..checkpoints import MakeCheckpoint
from .sharding import EIGHT, MakeShards, shard


@pytest.fixture(scope="session")
def eight(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a tiny checkpoint that 1, 2, 4 and 8 ranks can share. Treat it as read-only."""
    return make_checkpoint(overrides=EIGHT)


@pytest.fixture
def shards(eight: Path, tmp_path: Path) -> MakeShards:
    """Return a function that makes shards of ``eight`` in a folder of their own."""

    def make(mp: int = 2, name: str = "shards", **options: Any) -> Path:
        shard(eight, tmp_path / name, mp, **options)
        return tmp_path / name

    return make
