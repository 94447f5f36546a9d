"""The example in docs/ that loads shards with torch.distributed: it runs, and it would notice a wrong shard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .sharding import MakeShards

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "load_shards.py"


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_split_layers_on_two_ranks_match_the_whole_model() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert all(kind in done.stdout for kind in ("column-parallel", "row-parallel", "expert-parallel"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [("drop", "Missing key"), ("flip", "row-parallel wo_b, outputs summed: off by")],
)
def test_a_wrong_shard_is_noticed(shards: MakeShards, eight: Path, damage: str, message: str) -> None:
    folder = shards(2)
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    name = "layers.3.attn.wo_b.weight"
    if damage == "drop":
        del tensors[name]
    else:
        tensors[name] = tensors[name].view(torch.uint8).flip(1).view(torch.float8_e4m3fn)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    done = run(eight, folder)
    assert done.returncode != 0
    assert message in done.stderr
