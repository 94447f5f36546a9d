"""Checkpoints that eight ranks can share, and conversions without the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.convert import Summary, execute
from dsv4convert.convert_shards import plan_shards, plan_unshard
from dsv4convert.layouts.shards import ShardOptions

from ..conftest import MakeCheckpoint

# Eight groups, heads, indexer heads and experts, and eight blocks of 128 in every split dimension.
EIGHT = {"o_groups": 8, "index_head_dim": 128}

MakeShards = Callable[..., Path]


def shard(source: Path, out: Path, mp: int, *, threads: int = 2, overwrite: bool = False, **options: Any) -> Summary:
    plan = plan_shards(source, out, ShardOptions(mp, **options)).plan
    return execute(plan, threads=threads, overwrite=overwrite)


def unshard(source: Path, out: Path, **options: Any) -> Summary:
    return execute(plan_unshard(source, out, **options), threads=2)


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
