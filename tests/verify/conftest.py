"""Every kind of output of one small checkpoint, made once, and private copies of them to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.convert import execute
from dsv4convert.convert_gguf import plan_gguf
from dsv4convert.convert_hf import plan_dequantize, plan_repack
from dsv4convert.convert_shards import plan_shards, plan_unshard
from dsv4convert.layouts.gguf import GgufOptions
from dsv4convert.layouts.shards import ShardOptions

from ..conftest import MakeCheckpoint

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
    "shards-fp8": {"mp": 2, "expert_dtype": "fp8"},
    "shards-without-draft": {"mp": 2, "mtp": "drop"},
    "shards-rank": {"mp": 2, "ranks": (1,)},
}
KINDS = (*GGUF_OPTIONS, *FOLDER_OPTIONS, "fp8", *SHARD_OPTIONS, "unsharded", "unsharded-fp8")

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
    elif kind == "fp8":
        execute(plan_repack(source, out), threads=1)
    elif kind in SHARD_OPTIONS:
        execute(plan_shards(source, out, ShardOptions(**SHARD_OPTIONS[kind])).plan, threads=1)
    else:
        shards = convert(source, "shards-2", folder)
        shards = shards.rename(folder / "shards")
        execute(plan_unshard(shards, out, wo_a="fp8" if kind == "unsharded-fp8" else "bf16"), threads=1)
    return out


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
