"""``verify`` of V4.1: every kind of output passes, and every kind of damage to what is V4.1's own is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from dsv4convert.checkpoint.folder import read_folder_headers
from dsv4convert.containers.safetensors import read_header
from dsv4convert.engine.conversion import execute
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.engram_tables import ENGRAM_TYPES
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards, plan_unshard
from dsv4convert.verification import Report, verify

from ..v41 import TINY


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "source"
    write_synth(folder, "v41-tiny", seed=2)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a GGUF once for the same options. Treat it as read-only."""
    made: dict[str, Path] = {}

    def make(file: str = "m.gguf", **options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf")
            execute(plan_gguf(source, made[key] / "m.gguf", GgufOptions(**options)))
        return made[key] / file

    return make


def check_passes(report: Report, *, exact: bool | None = None) -> None:
    assert [str(problem) for problem in report.problems] == []
    assert report.results
    if exact is not None:
        assert all(result.verdict == "exact" for result in report.results.values()) == exact


def flip(path: Path, position: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bits]))


# Outputs that are right


@pytest.mark.parametrize("kind", ENGRAM_TYPES)
def test_every_encoding_of_the_tables_passes(kind: str, source: Path, converted: Callable[..., Path]) -> None:
    report = verify(source, converted(engram=kind))
    check_passes(report)
    tables = {name: result for name, result in report.results.items() if "engram_embd" in name}
    assert len(tables) == 2
    lossless = kind.startswith("i8-") or kind == "bf16"
    assert {result.verdict for result in tables.values()} == ({"exact"} if lossless else {"rounded"})
    assert all(result.compared == result.elements > 0 for result in tables.values())


def test_draft_tower_slice_and_splits_pass(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    for file in ("m.gguf", "dspark-m.gguf", "mmproj-m.gguf"):
        check_passes(verify(source, converted(file, draft="split", mmproj="split")))
    execute(plan_gguf(source, tmp_path / "slice.gguf", GgufOptions(layers=(3, 5))))
    check_passes(verify(source, tmp_path / "slice.gguf"))
    plan = plan_gguf(source, tmp_path / "parts.gguf", GgufOptions(split_max_bytes=2_000_000, engram_last=True))
    execute(plan)
    check_passes(verify(source, plan.final_paths()[0]))


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
@pytest.mark.parametrize("experts", [None, "fp8"])
def test_shards_pass(source: Path, tmp_path: Path, mp: int, experts: str | None) -> None:
    execute(plan_shards(source, tmp_path / "o", ShardOptions(mp=mp, experts=experts)).plan)
    check_passes(verify(source, tmp_path / "o"), exact=True)


def test_shards_without_a_draft_pass(source: Path, tmp_path: Path) -> None:
    execute(plan_shards(source, tmp_path / "o", ShardOptions(mp=2, draft="drop")).plan)
    check_passes(verify(source, tmp_path / "o"), exact=True)


def test_folders_pass(source: Path, tmp_path: Path) -> None:
    execute(plan_dequantize(source, tmp_path / "bf16"))
    check_passes(verify(source, tmp_path / "bf16"), exact=True)
    execute(plan_repack(source, tmp_path / "fp8"))
    check_passes(verify(source, tmp_path / "fp8"), exact=True)
    execute(plan_shards(source, tmp_path / "mp4", ShardOptions(mp=4)).plan)
    execute(plan_unshard(tmp_path / "mp4", tmp_path / "back"))
    check_passes(verify(source, tmp_path / "back"))


def test_conversions_of_the_recorded_checkpoints_pass(tmp_path: Path) -> None:
    execute(plan_gguf(TINY["tiny-b"], tmp_path / "m.gguf", GgufOptions(engram="i8-row264"), tokenizer_pre="joyai-llm"))
    check_passes(verify(TINY["tiny-b"], tmp_path / "m.gguf"))


# Damage


@pytest.mark.parametrize("kind", ENGRAM_TYPES)
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_flipped_bit_in_a_table_is_found(
    kind: str, at: str, source: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(converted(engram=kind), tmp_path / "m.gguf"))
    for tensor in gguf.GGUFReader(path).tensors:
        if "engram_embd" in tensor.name:
            break
    position = tensor.data_offset + (0 if at == "first" else tensor.n_bytes - 1)
    flip(path, int(position), 0x10)
    (problem,) = verify(source, path).problems
    assert "engram_embd" in str(problem)
    assert "wrong" in str(problem) or "other codes" in str(problem)


def test_a_table_without_its_scales_is_found(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    """What the recorded conversion of another tool holds: codes quantised as if they were the values."""
    import ml_dtypes
    import numpy as np

    path = Path(shutil.copy(converted(), tmp_path / "m.gguf"))
    stored = read_folder_headers(source)[0]["layers.0.engram.embed.weight"]
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        codes = np.frombuffer(file.read(stored.nbytes), ml_dtypes.float8_e4m3fn).reshape(stored.shape)
    unscaled = gguf.quants.quantize(codes.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.engram_embd.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(unscaled.tobytes())
    assert any("blk.0.engram_embd.weight" in str(problem) for problem in verify(source, path).problems)


@pytest.mark.parametrize(
    "key", ["multipliers", "primes", "offsets", "token_map", "pad_id", "layer_ids", "head_count", "encoding"]
)
def test_a_wrong_constant_is_found(key: str, source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(converted(engram="i8-split"), tmp_path / "m.gguf"))
    field = gguf.GGUFReader(path).fields[f"deepseek41.engram.{key}"]
    value = field.parts[field.data[-1]]
    position = field.offset + sum(part.nbytes for part in field.parts[: field.data[-1]])
    assert value.nbytes
    flip(path, position)
    (problem,) = verify(source, path).problems
    assert f"deepseek41.engram.{key}" in str(problem)


@pytest.mark.parametrize("key", ["kv_source_layers", "index_source_layers", "indexer.candidate_block_size"])
def test_a_wrong_role_is_found(key: str, source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(converted(), tmp_path / "m.gguf"))
    field = gguf.GGUFReader(path).fields[f"deepseek41.attention.{key}"]
    flip(path, field.offset + sum(part.nbytes for part in field.parts[: field.data[-1]]))
    (problem,) = verify(source, path).problems
    assert f"deepseek41.attention.{key}" in str(problem)


@pytest.mark.parametrize("kind", ["weight", "scale"])
@pytest.mark.parametrize("where", ["row", "padding"])
def test_damage_in_a_ranks_run_of_rows_is_found(kind: str, where: str, source: Path, tmp_path: Path) -> None:
    execute(plan_shards(source, tmp_path / "o", ShardOptions(mp=4)).plan)
    path = tmp_path / "o" / "model3-mp4.safetensors"
    stored = read_header(path)[f"layers.0.engram.embed.{kind}"]  # 638 rows: two are padding
    flip(path, stored.offset if where == "row" else stored.offset + stored.nbytes - 1)
    (problem,) = verify(source, tmp_path / "o").problems
    assert "layers.0.engram.embed.weight" in str(problem)
    assert ("filled with" in str(problem)) == (where == "padding")


def test_a_wrong_inference_config_is_found(source: Path, tmp_path: Path) -> None:
    execute(plan_shards(source, tmp_path / "o", ShardOptions(mp=2)).plan)
    path = tmp_path / "o" / "inference_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "engram_pad_id": 3}))
    (problem,) = verify(source, tmp_path / "o").problems
    assert "key engram_pad_id: expected 2, got 3" in str(problem)
    path.unlink()
    assert any("inference_config.json" in str(problem) for problem in verify(source, tmp_path / "o").problems)


def test_experts_in_larger_blocks_are_found(source: Path, tmp_path: Path) -> None:
    execute(plan_repack(source, tmp_path / "o"))
    for path in sorted((tmp_path / "o").glob("*.safetensors")):
        name = next((name for name in read_header(path) if "experts.0.w1.scale" in name), None)
        if name:
            break
    assert name is not None
    flip(path, read_header(path)[name].offset)
    assert any(name.removesuffix(".scale") in str(problem) for problem in verify(source, tmp_path / "o").problems)


@pytest.mark.parametrize(
    ("key", "value"), [("index_topk", 17), ("vocab_size", 513), ("compress_ratios", [0, 2, 2, 1, 1, 2, 0, 0, 0])]
)
def test_a_change_deep_inside_the_texts_config_is_found(key: str, value: object, source: Path, tmp_path: Path) -> None:
    execute(plan_dequantize(source, tmp_path / "out"), threads=1)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"][key] = value
    path.write_text(json.dumps(config))
    (problem,) = verify(source, tmp_path / "out").problems
    assert f"key text_config.{key}: expected" in str(problem)
