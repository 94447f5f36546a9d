"""V4.1 folders: every tensor accounted for, roles held against tensors, the token map of the n-gram tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv4convert
from dsv4convert.checkpoint.engram import read_engram_constants, read_token_map
from dsv4convert.checkpoint.folder import Checkpoint, open_folder
from dsv4convert.checkpoint.meaning import open_checked
from dsv4convert.checkpoint.weights import Encoding
from dsv4convert.errors import ConfigError, InventoryError, TokenizerError
from dsv4convert.model.config import load_config
from dsv4convert.model.tensors import Draft

from ..v41 import TINY, recorded


def opened(folder: Path) -> Checkpoint:
    return open_folder(folder)


@pytest.fixture(params=sorted(TINY))
def folder(request: pytest.FixtureRequest) -> Path:
    return TINY[request.param]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies tiny-a with other keys in its text_config."""

    def edit(**keys: Any) -> Path:
        copied = shutil.copytree(TINY["tiny-a"], tmp_path / "edited")
        config = json.loads((copied / "config.json").read_text())
        config["text_config"].update(keys)
        (copied / "config.json").write_text(json.dumps(config))
        return copied

    return edit


def test_every_tensor_is_claimed(folder: Path) -> None:
    checkpoint = opened(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert checkpoint.n_tensors == len(index)
    assert sum(1 + (w.scale is not None) for w in checkpoint.weights.values()) == len(index)
    assert (checkpoint.draft, checkpoint.n_draft) == (Draft.DSPARK, 3)
    assert not checkpoint.unused
    assert not checkpoint.notes


def test_blocks_are_read_off_the_shapes() -> None:
    weights = opened(TINY["tiny-a"]).weights
    assert weights["layers.0.engram.embed.weight"].block == (1, 32)
    assert weights["layers.0.engram.embed.weight"].encoding is Encoding.FP8
    assert weights["layers.0.attn.wq_b.weight"].block == (32, 32)
    assert weights["layers.0.engram.q_weight"].scale is None


def test_draft_stages_have_their_own_number_of_experts(folder: Path) -> None:
    checkpoint = opened(folder)
    config = checkpoint.config
    for prefix, count in (("layers.0.", config.n_routed_experts), ("mtp.0.", config.draft_n_routed_experts)):
        assert {w.expert for w in checkpoint.weights.values() if w.prefix == prefix} == {None, *range(count)}


@pytest.mark.parametrize(
    "command",
    [
        lambda folder, out: dsv4convert.shard(folder, out, mp=1),
        dsv4convert.dequantize,
        dsv4convert.repack,
        lambda folder, out: dsv4convert.check(folder),
        lambda folder, out: dsv4convert.verify(folder, TINY["tiny-b"]),
        lambda folder, out: dsv4convert.load_model(folder),
    ],
    ids=["shard", "dequantize", "repack", "check", "verify", "load_model"],
)
def test_a_tokenizer_with_another_token_map_is_refused(
    edited: Callable[..., Path], tmp_path: Path, command: Callable[[Path, Path], object]
) -> None:
    folder = edited(engram_compressed_vocab_size=370)
    with pytest.raises(ConfigError, match=r"config\.json: .*token map has another size: expected 371, got 370"):
        command(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_a_note(edited: Callable[..., Path]) -> None:
    folder = edited()
    (folder / "tokenizer.json").write_text("{}")
    assert any("was not checked" in note for note in open_checked(folder).notes)


def test_a_source_without_a_compressor_is_an_error(edited: Callable[..., Path]) -> None:
    folder = edited(kv_source_layer_ids=[1, 3, 4], index_source_layer_ids=[1, 3, 4, 5])
    with pytest.raises(ConfigError, match=r"kv_source_layer_ids and .*expected \[1, 3\], got \[1, 3, 4\]"):
        opened(folder)


def test_a_compressor_in_a_layer_that_is_no_source_is_an_error(edited: Callable[..., Path]) -> None:
    folder = edited(index_source_layer_ids=[1, 3])
    with pytest.raises(ConfigError, match=r"index_source_layer_ids and .*expected \[1, 3, 5\], got \[1, 3\]"):
        opened(folder)


def test_a_table_that_does_not_fit_the_constants_is_an_error(edited: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="the table of layer 0 does not fit its hash functions: expected 660 rows"):
        opened(edited(engram_num_embeddings=[661, 864]))


def test_a_table_with_other_rows_than_the_config_says_is_an_error(edited: Callable[..., Path]) -> None:
    # Heads that begin at another prime: tables that fit the config, not the tensors.
    folder = edited(engram_vocab_size=102, engram_num_embeddings=[690, 896])
    with pytest.raises(InventoryError, match=r"engram\.embed\.weight: wrong shape: expected \[690, 32\], got \[660"):
        opened(folder)


def test_constants_are_those_of_the_recorded_conversion(folder: Path) -> None:
    found = read_engram_constants(folder, load_config(folder))
    keys = recorded(f"{folder.name}.expected.json")["gguf_keys"]
    want = {name: keys[f"deepseek41.engram.{name}"][1] for name in ("multipliers", "primes", "offsets")}
    assert {name: [x for row in getattr(found, name) for x in row] for name in want} == want
    assert found.token_map.tolist() == keys["deepseek41.engram.token_map"][1]
    assert found.pad_id == keys["deepseek41.engram.pad_id"][1]
    assert list(found.layer_ids) == keys["deepseek41.engram.layer_ids"][1]


def test_a_token_map_is_computed_once_for_a_tokenizer() -> None:
    first, second = (read_token_map(TINY[name], 512) for name in ("tiny-a", "tiny-b"))
    assert first is second  # their tokenizers are the same bytes
    assert not first.flags.writeable


def test_a_tokenizer_of_another_model_is_an_error(edited: Callable[..., Path]) -> None:
    folder = edited()
    document = json.loads((folder / "tokenizer.json").read_text())
    last = document["added_tokens"][-1]
    last["content"] = "|" + last["content"].upper()
    merge_free = {"The": "The-", "he": "he-"}
    vocab = document["model"]["vocab"]
    for old, new in merge_free.items():
        if old in vocab:
            vocab[new] = vocab.pop(old)
    document["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="engram_compressed_vocab_size: the tokenizer's token map has another size"):
        read_engram_constants(folder, load_config(folder))


def test_a_tokenizer_that_is_missing_or_unreadable_is_an_error(edited: Callable[..., Path]) -> None:
    folder = edited()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not readable by the package tokenizers"):
        read_token_map(folder, 512)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        read_token_map(folder, 512)
