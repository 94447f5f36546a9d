"""Fixtures that many tests share: small synthetic checkpoints, made once a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dsv4convert.synth.write import write_synth

from .checkpoints import MakeCheckpoint
from .fixtures import editable, fast_tmp

# How long an example takes says nothing on a machine that does other work.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# No test asks the hub; those of tests/remote have one of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

__all__ = ["editable", "fast_tmp", "make_checkpoint", "tiny"]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that makes a synthetic checkpoint, once for the same arguments. Treat it as read-only."""
    made: dict[str, Path] = {}

    def make(preset: str = "tiny", **options: Any) -> Path:
        key = repr((preset, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / preset
            write_synth(made[key], preset, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """Return the tiny checkpoint of seed 0. Treat it as read-only."""
    return make_checkpoint("tiny")


@pytest.fixture(scope="session")
def slow(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a checkpoint of which low-bit types take a processor some seconds. Treat it as read-only."""
    return make_checkpoint("tiny", experts=40)
