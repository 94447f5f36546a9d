"""V4.1's config.json: one view of nested and flat keys, and layer roles that fit each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dsv4convert.errors import ConfigError, UsageError
from dsv4convert.model.config import Attention, Version, parse_config
from dsv4convert.model.config_v41 import VISION_KEYS, Candidates

from ..v41 import published_config


@pytest.fixture
def raw() -> dict[str, Any]:
    return published_config()


def flattened(raw: dict[str, Any]) -> dict[str, Any]:
    vision = {VISION_KEYS.get(key, key): value for key, value in raw["vision_config"].items() if key != "model_type"}
    return {**raw["text_config"], **vision, **{k: v for k, v in raw.items() if not k.endswith("_config")}}


def test_the_published_config(raw: dict[str, Any]) -> None:
    config = parse_config(raw, "here")
    assert config.version is Version.V41
    assert (config.n_routed_experts, config.draft_n_routed_experts, config.n_experts(True)) == (384, 128, 128)
    assert (config.num_experts_per_tok, config.draft_num_experts_per_tok) == (6, 3)
    assert config.candidates == Candidates(20, 2048, 8)
    assert config.engram is not None
    assert (config.engram.rows(14), config.engram.rows(2), config.engram.rows_per_token) == (384016682, 0, 24)
    assert config.has_vision
    assert config.is_dspark
    assert config.num_hash_layers == 0
    assert config.yarn is not None
    assert config.yarn.factor == 16
    kinds = [config.attention(layer) for layer in range(40)]
    assert kinds == [Attention.SLIDING] * 2 + [Attention.SHARED_CSA_2] * 18 + [Attention.SHARED_CSA_1] * 20


def test_layers_read_the_sources_before_them(raw: dict[str, Any]) -> None:
    config = parse_config(raw, "here")
    assert [config.kv_source(layer) for layer in (0, 1, 2, 7, 8, 19, 20, 39)] == [None, None, 2, 2, 8, 14, 20, 20]
    assert [config.index_source(layer) for layer in (1, 2, 23, 24, 39)] == [None, 2, 20, 24, 36]


def test_nested_and_flat_configs_are_one_config(raw: dict[str, Any]) -> None:
    assert parse_config(flattened(raw), "here") == parse_config(raw, "here")


def test_a_slice_renumbers_sources_and_tables(raw: dict[str, Any]) -> None:
    part = parse_config(raw, "here").sliced(14, 24)
    assert part.kv_source_layer_ids == (0, 6)
    assert part.index_source_layer_ids == (0, 6, 10)
    assert part.candidates == Candidates(6, 2048, 8)
    assert part.engram is not None
    assert (part.engram.layer_ids, part.engram.num_embeddings) == ((0,), (384016682,))


def test_a_slice_without_its_kv_source_is_an_error(raw: dict[str, Any]) -> None:
    message = "layer 3 reads the entries of layer 2: expected a range such as 2-9, got 3-9"
    with pytest.raises(UsageError, match=f"layers without their KV source: {message}"):
        parse_config(raw, "here").sliced(3, 9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_source_layer_ids": [1, 2, 8, 14, 20]}, "kv_source_layer_ids: layer 1 has compress ratio 0"),
        ({"kv_source_layer_ids": [2, 8, 14]}, "layer 20 reads the entries of layer 14, of another ratio: expected 2"),
        ({"kv_source_layer_ids": [8, 14, 20]}, "kv_source_layer_ids: no source at or before layer 2"),
        ({"kv_source_layer_ids": [2, 8, 14, 99]}, "kv_source_layer_ids: ascending layers"),
        ({"kv_source_layer_ids": [8, 2, 14, 20]}, "kv_source_layer_ids: ascending layers"),
        ({"index_source_layer_ids": [2, 8, 20]}, "index_source_layer_ids: KV source 14 is missing"),
        ({"candidate_source_layer_id": 21}, "candidate_source_layer_id: not an index source"),
        ({"engram_num_embeddings": [384006168]}, "engram_num_embeddings: one entry per engram layer"),
        ({"engram_layer_ids": [1, 40]}, "engram_layer_ids: ascending layers"),
        ({"engram_pad_token_id": 129280}, "engram_pad_token_id: no token"),
        ({"compress_ratios": [0, 0] + [4] * 38 + [0] * 3}, "key compress_ratios"),
        ({"num_hash_layers": 3}, "key num_hash_layers"),
        ({"dspark_num_experts_per_tok": 200}, "dspark_num_experts_per_tok: does not fit"),
        ({"engram_head_dim": None}, "key engram_head_dim"),
        ({"dspark_noise_token_id": 129280}, "dspark_noise_token_id: no token: expected below vocab_size 129280"),
        ({"dspark_target_layer_ids": [37, 38, 40]}, "dspark_target_layer_ids: not layers of the model"),
        ({"dspark_target_layer_ids": [37, 38, 38]}, "dspark_target_layer_ids: not layers of the model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named_by_its_key(raw: dict[str, Any], change: dict[str, Any], says: str) -> None:
    broken = copy.deepcopy(raw)
    broken["text_config"].update(change)
    with pytest.raises(ConfigError, match=says):
        parse_config(broken, "here")


def test_an_image_token_outside_the_vocabulary_is_an_error(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="image_token_id: no token: expected below vocab_size 129280, got 129280"):
        parse_config(raw | {"image_token_id": 129280}, "here")


@pytest.mark.parametrize("key", ["engram_vocab_size", "candidate_block_size", "kv_source_layer_ids"])
def test_a_missing_key_is_named(raw: dict[str, Any], key: str) -> None:
    del raw["text_config"][key]
    with pytest.raises(ConfigError, match=key):
        parse_config(raw, "here")


def test_a_key_with_two_values_is_an_error(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"key text_config\.hidden_size: two values: expected 4096, got 5120"):
        parse_config(raw | {"hidden_size": 4096}, "here")


def test_an_object_that_is_none_is_an_error(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="key vision_config: not an object"):
        parse_config(raw | {"vision_config": 3}, "here")
