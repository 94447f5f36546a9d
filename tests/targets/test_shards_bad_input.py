"""Ranks that do not divide, sets that are incomplete or mixed: each with its own line, and nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dsv4convert.checkpoint.shards import open_shards
from dsv4convert.errors import (
    ConfigError,
    Dsv4Error,
    FileFormatError,
    InputMissingError,
    InventoryError,
    OutputExistsError,
    UsageError,
)

from ..checkpoints import MakeCheckpoint
from .sharding import EIGHT, MakeShards, shard, unshard


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("vocab_size", 516, {}),
        ("num_attention_heads", 12, {"o_groups": 4}),
        ("index_n_heads", 12, {}),
        ("o_groups", 4, {}),
        ("n_routed_experts", 12, {}),
    ],
)
def test_mp_that_does_not_divide_names_the_key_and_both_numbers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, key: str, value: int, others: dict[str, Any]
) -> None:
    source = make_checkpoint(overrides=EIGHT | others | {key: value})
    with pytest.raises(UsageError, match=rf"key {key}: {value} cannot be divided among 8 ranks"):
        shard(source, tmp_path / "out", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "keys", "length"),
    [
        ({"index_head_dim": 64}, "index_n_heads * index_head_dim", 512),
        ({"head_dim": 120, "qk_rope_head_dim": 32}, "num_attention_heads * head_dim", 960),
        ({"o_lora_rank": 96}, "o_groups * o_lora_rank", 768),
    ],
)
def test_blocks_that_mp_would_cut_name_the_keys_and_the_numbers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, overrides: dict[str, Any], keys: str, length: int
) -> None:
    source = make_checkpoint(overrides=EIGHT | overrides)
    with pytest.raises(UsageError) as caught:
        shard(source, tmp_path / "out", 8)
    assert f"keys {keys}: the {length} of tensor" in str(caught.value)
    assert "blocks of 128, which cannot be divided among 8 ranks" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mp", [0, -2])
def test_mp_below_one_is_refused(eight: Path, tmp_path: Path, mp: int) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        shard(eight, tmp_path / "out", mp)


@pytest.mark.parametrize("rank", [4, -1])
def test_rank_out_of_range_names_the_range(eight: Path, tmp_path: Path, rank: int) -> None:
    with pytest.raises(UsageError, match=rf"--rank {rank}: out of range: expected 0 to 3"):
        shard(eight, tmp_path / "out", 4, ranks=(1, rank))
    assert list(tmp_path.iterdir()) == []


def test_fp8_experts_cannot_become_fp4(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(overrides=EIGHT, variant="base")
    with pytest.raises(UsageError, match=r"--experts fp4: .*got fp8 in layers\.0\.ffn\.experts\.0\.w1\.weight"):
        shard(source, tmp_path / "out", 2, experts="fp4")


def test_shards_cannot_be_sharded(shards: MakeShards, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already a folder of shards"):
        shard(shards(2), tmp_path / "out", 2)


def test_a_checkpoint_is_not_a_set_of_shards(eight: Path, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no model-parallel shards"):
        unshard(eight, tmp_path / "out")


def test_output_inside_the_source_is_refused(eight: Path) -> None:
    with pytest.raises(UsageError, match="inside the source"):
        shard(eight, eight / "shards", 2)


def test_a_folder_with_something_in_it_is_kept(shards: MakeShards, eight: Path) -> None:
    folder = shards(2)
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExistsError):
        shard(eight, folder, 4)
    assert (folder / "mine.txt").read_text() == "keep me"


def test_a_missing_rank_is_named(shards: MakeShards) -> None:
    folder = shards(4)
    (folder / "model1-mp4.safetensors").unlink()
    (folder / "model3-mp4.safetensors").unlink()
    with pytest.raises(
        InputMissingError, match=r"the shard of rank 1 of 4 is missing \(and 1 more\).*model1-mp4\.safetensors"
    ):
        open_shards(folder)


def test_shards_of_two_divisions_are_named(shards: MakeShards) -> None:
    folder = shards(2)
    shutil.copy(shards(4, "others") / "model3-mp4.safetensors", folder)
    with pytest.raises(InventoryError, match=r"several conversions.*got mp2, mp4"):
        open_shards(folder)


def test_a_rank_that_the_set_does_not_have_is_named(shards: MakeShards) -> None:
    folder = shards(2)
    shutil.copy(folder / "model1-mp2.safetensors", folder / "model2-mp2.safetensors")
    with pytest.raises(InventoryError, match="rank 2 of 2: out of range"):
        open_shards(folder)


def test_files_that_changed_places_are_named(shards: MakeShards) -> None:
    folder = shards(2)
    (folder / "model0-mp2.safetensors").rename(folder / "x")
    (folder / "model1-mp2.safetensors").rename(folder / "model0-mp2.safetensors")
    (folder / "x").rename(folder / "model1-mp2.safetensors")
    with pytest.raises(
        InventoryError, match=r"rank 0: tensor .*experts\.0.* missing: got a tensor of that name in model1-mp2"
    ):
        open_shards(folder)


def test_a_rank_of_another_model_is_named(shards: MakeShards, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = shards(2)
    shard(make_checkpoint(overrides=EIGHT | {"q_lora_rank": 64}), tmp_path / "others", 2)
    shutil.copy(tmp_path / "others" / "model1-mp2.safetensors", folder)
    with pytest.raises(InventoryError, match=r"wrong shape: expected .*96.* got .*64"):
        open_shards(folder)


def test_ranks_with_different_experts_are_named(shards: MakeShards) -> None:
    folder = shards(2)
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"] = tensors["norm.weight"].float()
    save_file(tensors, path)
    with pytest.raises(InventoryError, match=r"norm\.weight: stored differently on rank 1 than on rank 0"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.attn.surprise.weight", "rank 1: tensor .*surprise.*unknown"),
        ("layers.0.ffn.experts.0.w1.weight", "another rank"),
    ],
)
def test_a_tensor_too_many_is_named(shards: MakeShards, name: str, message: str) -> None:
    folder = shards(2)
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors["norm.weight"]
    save_file({n: t.clone() for n, t in tensors.items()}, path)
    with pytest.raises(InventoryError, match=message):
        open_shards(folder)


def test_a_missing_tensor_is_named(shards: MakeShards) -> None:
    folder = shards(2)
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    del tensors["layers.3.attn.indexer.weights_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(
        InventoryError, match=r"rank 1: tensor layers\.3\.attn\.indexer\.weights_proj\.weight is missing"
    ):
        open_shards(folder)


def test_a_truncated_shard_is_named(shards: MakeShards) -> None:
    folder = shards(2)
    path = folder / "model1-mp2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"model1-mp2\.safetensors"):
        open_shards(folder)


def test_shards_without_a_config_say_where_to_get_one(shards: MakeShards) -> None:
    folder = shards(2)
    (folder / "config.json").unlink()
    with pytest.raises(InputMissingError, match=r"copy config\.json from the checkpoint"):
        open_shards(folder)


def test_a_config_of_another_model_is_refused(shards: MakeShards, make_checkpoint: MakeCheckpoint) -> None:
    folder = shards(2)
    config = make_checkpoint(overrides=EIGHT | {"num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 0, 0]})
    shutil.copy(config / "config.json", folder)
    with pytest.raises(InventoryError, match=r"rank 0: tensor layers\.4\..* missing"):
        open_shards(folder)


def test_a_broken_config_is_refused(shards: MakeShards) -> None:
    folder = shards(2)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_shards(folder)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv4convert", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--mp", "3"), UsageError),
        (("--mp", "2", "--rank", "2"), UsageError),
    ],
    ids=["mp", "rank"],
)
def test_the_command_prints_one_line(
    eight: Path, tmp_path: Path, arguments: tuple[str, ...], error: type[Dsv4Error]
) -> None:
    done = run("shard", str(eight), str(tmp_path / "out"), *arguments)
    assert (done.returncode, done.stdout) == (error.exit_code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_commands_go_there_and_back(eight: Path, tmp_path: Path) -> None:
    dry = run("shard", str(eight), str(tmp_path / "out"), "--mp", "4", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "\n3 of 4 " in dry.stdout
    assert "whole on every rank " in dry.stdout
    assert "Their copies on the other ranks cost " in dry.stdout
    assert list(tmp_path.iterdir()) == []
    done = run("shard", str(eight), str(tmp_path / "out"), "--mp", "4", "--experts", "fp8", "--draft", "drop")
    assert done.returncode == 0, done.stderr
    assert "--draft drop" in done.stdout
    back = run("unshard", str(tmp_path / "out"), str(tmp_path / "back"), "--wo-a", "fp8", "--max-file-size", "1M")
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
