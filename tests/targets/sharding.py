"""Checkpoints that eight ranks can share, and conversions without the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4convert.engine.conversion import Summary, execute
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards, plan_unshard

# Eight groups, heads, indexer heads and experts, and eight blocks of 128 in every split dimension.
EIGHT = {"o_groups": 8, "index_head_dim": 128}

MakeShards = Callable[..., Path]


def shard(source: Path, out: Path, mp: int, *, threads: int = 2, overwrite: bool = False, **options: Any) -> Summary:
    plan = plan_shards(source, out, ShardOptions(mp, **options)).plan
    return execute(plan, threads=threads, overwrite=overwrite)


def unshard(source: Path, out: Path, **options: Any) -> Summary:
    return execute(plan_unshard(source, out, **options), threads=2)
