"""Synthetic checkpoints of V4.1: the published inventory to the byte, and small ones that hold together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint.engram import read_engram_constants
from dsv4convert.checkpoint.folder import Checkpoint, open_folder
from dsv4convert.errors import UsageError
from dsv4convert.model.config import load_config, parse_config
from dsv4convert.synth.presets import synth_config
from dsv4convert.synth.write import plan_synth, write_synth

from ..v41 import published_config, recorded


def opened(folder: Path) -> Checkpoint:
    return open_folder(folder)


def header(path: Path) -> list[str]:
    with path.open("rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "flash"
    write_synth(folder, "v41-flash", headers_only=True)
    return folder


def test_full_inventory_has_the_published_counts_bytes_and_file_sizes(flash: Path) -> None:
    checkpoint = opened(flash)
    assert checkpoint.n_tensors == 96_085
    assert checkpoint.nbytes == 510_286_023_000
    assert [path.stat().st_size for path in sorted(flash.glob("*.safetensors"))] == recorded("file_sizes.json")
    index = json.loads((flash / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 510_286_023_000
    files = Counter(index["weight_map"].values())
    assert files["model-00047-of-00048.safetensors"] == files["model-00048-of-00048.safetensors"] == 6
    assert index["weight_map"]["layers.1.attn_norm.weight"] == "model-00004-of-00048.safetensors"


def test_files_look_like_the_published_ones(flash: Path) -> None:
    names = header(flash / "model-00047-of-00048.safetensors")
    assert names[:2] == ["__metadata__", "layers.1.engram.k_weight"]
    assert names[-2:] == ["layers.1.engram.embed.scale", "layers.1.engram.wkv.scale"]
    assert "__metadata__" not in header(flash / "model-00003-of-00048.safetensors")


def test_config_differs_from_the_published_one_in_the_token_map_only(flash: Path) -> None:
    config, published = json.loads((flash / "config.json").read_text()), published_config()
    size = config["text_config"].pop("engram_compressed_vocab_size")
    published["text_config"].pop("engram_compressed_vocab_size")
    assert config == published
    assert int(read_engram_constants(flash, load_config(flash)).token_map.max()) + 1 == size
    assert not (flash / "generation_config.json").exists()


def test_tiny_holds_every_role_and_its_constants_fit(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "v41-tiny", seed=5)
    config = opened(tmp_path / "m").config
    assert config.engram is not None
    constants = read_engram_constants(tmp_path / "m", config)
    assert constants.rows == config.engram.num_embeddings
    assert any(rows % 4 for rows in constants.rows)
    roles = [set(config.kv_source_layer_ids), set(config.index_source_layer_ids), set(config.engram.layer_ids)]
    assert roles == [{1, 3}, {1, 3, 5}, {0, 3}]
    added = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert config.flat["dspark_noise_token_id"] == ids["<｜System｜>"]
    assert config.flat["image_token_id"] == ids["<｜deepseek_image｜>"]


@pytest.mark.parametrize(
    ("options", "kv", "index", "tables"),
    [
        ({"layers": 4}, (1, 3), (1, 3), (0, 3)),
        ({"layers": 3}, (1,), (1,), (0,)),
        ({"layers": 3, "mtp": False}, (1,), (1,), (0,)),
        ({"ratios": [0, 0, 2, 1, 1]}, (2, 3), (2, 3), (0, 3)),
        ({"ratios": [1, 1, 1]}, (0,), (0,), (0,)),
        ({"experts": 4, "vocab": 600}, (1, 3), (1, 3, 5), (0, 3)),
    ],
    ids=["four", "three", "no-draft", "ratios", "one-ratio", "small"],
)
def test_cuts_hold_together(
    options: dict[str, Any], kv: tuple[int, ...], index: tuple[int, ...], tables: tuple[int, ...], tmp_path: Path
) -> None:
    write_synth(tmp_path / "m", "v41-tiny", **options)
    config = opened(tmp_path / "m").config
    assert (config.kv_source_layer_ids, config.index_source_layer_ids) == (kv, index)
    assert config.engram is not None
    assert config.engram.layer_ids == tables
    assert config.n_draft_ratios == (0 if options.get("mtp") is False else 3)


@pytest.mark.parametrize("rows", [1, 9, 1000, 100_003])
def test_tables_have_at_least_the_rows_asked_for(rows: int) -> None:
    raw = synth_config("v41-tiny", engram_rows=rows)
    found = raw["text_config"]["engram_num_embeddings"]
    assert all(rows <= count <= rows * 1.2 + 100 for count in found)
    plan = plan_synth("v41-tiny", engram_rows=rows)
    shapes = {t.name: t.shape for file in plan.files for t in file}
    assert shapes["layers.0.engram.embed.weight"] == (found[0], 64)
    assert shapes["layers.3.engram.embed.scale"] == (found[1], 2)


def test_options_of_the_other_version_are_refused() -> None:
    with pytest.raises(UsageError, match="--engram-rows: the model has no engram tables"):
        synth_config("tiny", engram_rows=10)
    with pytest.raises(UsageError, match="--variant vision is not for preset v41-tiny"):
        synth_config("v41-tiny", variant="vision")
    with pytest.raises(UsageError, match="engram_head_dim cannot hold scale blocks"):
        plan_synth("v41-tiny", overrides={"engram_head_dim": 48})


def test_the_preset_of_the_published_model_is_its_config() -> None:
    assert parse_config(synth_config("v41-flash"), "synth") == parse_config(published_config(), "published")
