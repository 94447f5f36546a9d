"""Fixtures of several packages: a checkpoint to damage, and a folder in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import MakeCheckpoint
from .targets.folders import Editable


@pytest.fixture
def editable(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Editable]:
    """Return a function that makes a private copy of a tiny checkpoint."""

    def make(**options: Any) -> Editable:
        return Editable(shutil.copytree(make_checkpoint(**options), tmp_path / "source"))

    return make


@pytest.fixture
def fast_tmp(tmp_path: Path) -> Iterator[Path]:
    """Return an empty folder in memory where there is one: what is tested is the order of calls, not a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="dsv4convert-test-", dir=memory) as name:
        yield Path(name)
