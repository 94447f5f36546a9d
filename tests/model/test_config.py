"""config.json in both of its forms: read alike, and every inconsistency named by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.errors import ConfigError, InputMissingError, UsageError
from dsv4convert.model.config import Attention, load_config, parse_config


@pytest.fixture
def raw(tiny: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    return document


def transformers_form(raw: dict[str, Any]) -> dict[str, Any]:
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    layers = raw["num_hidden_layers"]
    form = dict(raw)
    ratios, hashes, scaling = (form.pop(key) for key in ("compress_ratios", "num_hash_layers", "rope_scaling"))
    form["layer_types"] = [kinds[ratio] for ratio in ratios[:layers]]
    form["mlp_layer_types"] = ["hash_moe"] * hashes + ["moe"] * (layers - hashes)
    form["rope_parameters"] = {
        "main": {"rope_theta": form.pop("rope_theta"), "rope_type": "default"},
        "compress": {"rope_theta": form.pop("compress_rope_theta"), **scaling},
    }
    return form


def test_both_forms_of_a_config_are_one_config(raw: dict[str, Any]) -> None:
    assert parse_config(transformers_form(raw), "here") == parse_config(raw, "here")


def test_layers_know_their_attention_and_routing(raw: dict[str, Any]) -> None:
    config = parse_config(
        raw | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}, "here"
    )
    assert [config.attention(layer) for layer in range(3)] == [Attention.SLIDING, Attention.CSA, Attention.HCA]
    assert [config.is_hash_routed(layer) for layer in range(3)] == [True, False, False]
    assert config.n_draft_ratios == 1


def test_a_slice_keeps_the_layers_asked_for(raw: dict[str, Any]) -> None:
    config = parse_config(
        raw | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 2}, "here"
    )
    part = config.sliced(1, 2)
    assert (part.num_hidden_layers, part.compress_ratios, part.num_hash_layers) == (2, (4, 128), 1)
    assert part.num_nextn_predict_layers == 0
    assert config.sliced(0, 2) == config
    with pytest.raises(UsageError, match="layers outside the model: expected a range within 0-2, got 2-3"):
        config.sliced(2, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk_rope_head_dim": 3}, "key qk_rope_head_dim"),
        ({"qk_rope_head_dim": 10**6}, "key qk_rope_head_dim"),
        ({"num_hash_layers": 50}, "key num_hash_layers"),
        ({"vocab_size": 10**300}, "key vocab_size"),
        ({"routed_scaling_factor": 10**400}, "key routed_scaling_factor"),
        ({"hc_eps": 0}, "key hc_eps"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            "key rope_scaling.original_max_position_embeddings is missing",
        ),
        ({"eos_token_id": []}, "key eos_token_id"),
        ({"norm_topk_prob": "yes"}, "key norm_topk_prob"),
        ({"scoring_func": "softmax"}, "key scoring_func"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_key_that_cannot_be_is_named(raw: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw | change, "config.json")
    assert str(caught.value).startswith(f"config.json: {says}")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_have_are_refused(tmp_path: Path, constant: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"hc_eps": {constant}}}')
    with pytest.raises(ConfigError, match=f"{constant} is no number in JSON"):
        load_config(tmp_path)


def test_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no such folder"):
        load_config(tmp_path / "nowhere")
