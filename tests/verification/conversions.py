"""Every kind of output of one small checkpoint, made once, and private copies of them to damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4convert.engine.conversion import execute
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards, plan_unshard

# Small enough to be read hundreds of times; everything of the tiny model is there but half of its experts.
SMALL = {"experts": 4, "vocab": 400}

GGUF_OPTIONS: dict[str, dict[str, Any]] = {
    "gguf": {},
    "gguf-plain": {"dense": "bf16", "experts": "q8_0"},
    "gguf-f16": {"dense": "f16", "experts": "bf16"},
    "gguf-f32": {"dense": "f32", "experts": "f32"},
    "gguf-mtp": {"draft": "only"},
    "gguf-slice": {"layers": (1, 2)},
    "gguf-one-layer": {"layers": (3, 3)},
    "gguf-split": {"split_max_bytes": 700_000},
    "gguf-port": {"dialect": "deepseek-v4"},
    "gguf-port-without-draft": {"dialect": "deepseek-v4", "draft": "drop"},
}
FOLDER_OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "f16": {"dtype": "f16"},
    "f32-transformers": {"dtype": "f32", "names": "transformers"},
    "bf16-transformers": {"names": "transformers"},
    "bf16-files": {"max_file_bytes": 600_000},
}
SHARD_OPTIONS: dict[str, dict[str, Any]] = {
    "shards-1": {"mp": 1},
    "shards-2": {"mp": 2},
    "shards-4": {"mp": 4},
    "shards-fp8": {"mp": 2, "experts": "fp8"},
    "shards-without-draft": {"mp": 2, "draft": "drop"},
    "shards-rank": {"mp": 2, "ranks": (1,)},
}
REPACK_OPTIONS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "nvfp4": {"experts": "nvfp4", "input_scale": "8.4375,150.0"},
    "nvfp4-draft": {"experts": "nvfp4", "draft_experts": True},
}
KINDS = (*GGUF_OPTIONS, *FOLDER_OPTIONS, *REPACK_OPTIONS, *SHARD_OPTIONS, "unsharded", "unsharded-fp8")

Make = Callable[..., Path]


def convert(source: Path, kind: str, folder: Path) -> Path:
    """Convert ``source`` to an output of ``kind`` in ``folder`` and return its path."""
    if kind in GGUF_OPTIONS:
        plan = plan_gguf(source, folder / "model.gguf", GgufOptions(**GGUF_OPTIONS[kind]))
        execute(plan, threads=1)
        return plan.final_paths()[0]
    out = folder / "out"
    if kind in FOLDER_OPTIONS:
        execute(plan_dequantize(source, out, **FOLDER_OPTIONS[kind]), threads=1)
    elif kind in REPACK_OPTIONS:
        execute(plan_repack(source, out, **REPACK_OPTIONS[kind]), threads=1)
    elif kind in SHARD_OPTIONS:
        execute(plan_shards(source, out, ShardOptions(**SHARD_OPTIONS[kind])).plan, threads=1)
    else:
        shards = convert(source, "shards-2", folder)
        shards = shards.rename(folder / "shards")
        execute(plan_unshard(shards, out, wo_a="fp8" if kind == "unsharded-fp8" else "bf16"), threads=1)
    return out
