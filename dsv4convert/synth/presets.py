"""Presets and variants: the config of a synthetic checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import islice
from typing import Any, TypedDict

from ..errors import UsageError, either
from ..model.config_v41 import TEXT, VISION_KEYS
from ..model.config_v41 import VISION as VISION_OBJECT
from ..model.engram import primes_from

PRESETS = ("tiny", "nano", "flash", "pro", "v41-tiny", "v41-flash")
V41_PRESETS = ("v41-tiny", "v41-flash")
VARIANTS = ("base", "dspark", "vision")

# Published configs, as package data; a preset with a variant that is not here gets that variant's keys.
PUBLISHED_CONFIGS = {
    ("flash", None): "v4-flash.json",
    ("flash", "base"): "v4-flash-base.json",
    ("flash", "dspark"): "v4-flash-0731.json",
    ("pro", None): "v4-pro.json",
    ("v41-flash", None): "v4.1-flash.json",
}

# How many files the published checkpoints have. Any other folder gets about the bytes per file of Flash, and
# two files at least.
PUBLISHED_FILES = {
    ("flash", None): 46,
    ("flash", "dspark"): 48,
    ("flash", "vision"): 48,
    ("pro", None): 64,
    ("v41-flash", None): 48,
}
BYTES_PER_FILE = 3_500_000_000

# Every kind of layer in four, and dimensions that are no multiples of 128: width 160 and experts of 96
# leave ragged scale blocks. What cannot be odd: 32 divides the input of every linear (GGML blocks), a
# power of two is the indexer's width (Hadamard rotation), four streams (llama.cpp), and ranks of 1, 2 and
# 4 can share the heads, groups and experts.
TINY = {
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 96,
    "o_groups": 4,
    "o_lora_rank": 128,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_hash_layers": 2,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 16,
    "sliding_window": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "compress_ratios": [0, 4, 128, 4, 0],
}
# YaRN's stretch starts within reach of a test's prompt.
TINY_ORIGINAL_POSITIONS = 256

NANO = {
    "hidden_size": 1024,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 512,
    "o_groups": 4,
    "o_lora_rank": 256,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 3,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 64,
    "vocab_size": 32768,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
}

DSPARK_STAGES = 3  # their input is the output of as many trunk layers
DSPARK = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_markov_rank": 256}
VISION = {
    "vision_n_layers": 32,
    "vision_dim": 1024,
    "vision_n_heads": 16,
    "vision_inter_dim": 2816,
    "vision_patch_size": 14,
    "vision_rope_theta": 10000.0,
    "vision_downsample_ratio": 3,
    "vision_max_n_token": 384,
    "vision_min_pixels": 147456,
    "vision_max_wh_ratio": 8,
}
VISION_RMS_NORM_EPS = 1e-20
SMALL_DSPARK = {"dspark_markov_rank": 32}
# llama.cpp's converter takes the number in aligner.w2 for a block's: there must be more than two blocks.
SMALL_VISION = {
    "vision_n_layers": 3,
    "vision_dim": 64,
    "vision_n_heads": 4,
    "vision_inter_dim": 96,
    "vision_min_pixels": 7056,
}

# Every role in six layers: sources of both ratios, an index source that is no KV source, tables in a layer without
# a compressor and in a KV source, with and without rows that ranks cannot share evenly.
V41_TINY = {
    "hidden_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_groups": 8,
    "o_lora_rank": 64,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 16,
    "sliding_window": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "compress_ratios": [0, 2, 2, 1, 1, 1, 0, 0, 0],
    "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 5],
    "candidate_source_layer_id": 3,
    "candidate_topk_blocks": 3,
    "candidate_block_size": 4,
    "engram_layer_ids": [0, 3],
    "engram_max_ngram_size": 3,
    "engram_vocab_size": 150,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "dspark_markov_rank": 32,
    "dspark_n_routed_experts": 8,
    "dspark_num_experts_per_tok": 2,
}
V41_TINY_VISION = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "min_pixels": 7056,
}

# The special tokens that keys of V4.1's config name by id.
PUBLISHED_VOCABULARY = 129280
# The keys of vision_config by their flat names, under which they can be set.
VISION_NAMES = {flat: key for key, flat in VISION_KEYS.items()}
V41_TOKEN_KEYS = {"image_token_id": "<｜deepseek_image｜>", "dspark_noise_token_id": "<｜System｜>"}


class Cuts(TypedDict, total=False):
    """What a synthetic checkpoint has that its preset has not.

    ``layers`` keeps the leading layers, ``ratios`` gives one compress ratio per trunk layer instead, ``mtp`` False
    leaves the draft out, ``overrides`` replaces config keys, ``engram_rows`` is how many rows each n-gram table has at
    least.
    """

    variant: str | None
    layers: int | None
    ratios: Sequence[int] | None
    experts: int | None
    vocab: int | None
    mtp: bool
    engram_rows: int | None
    overrides: Mapping[str, Any] | None


def synth_config(
    preset: str,
    *,
    variant: str | None = None,
    layers: int | None = None,
    ratios: Sequence[int] | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    mtp: bool = True,
    engram_rows: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config.json of a synthetic checkpoint with its cuts (see ``Cuts``).

    Raises:
        UsageError: an unknown preset, variant or config key, or a cut that leaves no model.
    """
    _one_of("preset", preset, PRESETS)
    if variant is not None:
        _one_of("variant", variant, VARIANTS)
    if variant is not None and preset in V41_PRESETS:
        raise UsageError(f"--variant {variant} is not for preset {preset}", hint="V4.1 has its draft and tower anyway")
    file = _preset_config(preset, variant)
    # The keys of V4.1's text model lie in an object of their own.
    raw = file.get(TEXT, file)
    n_draft = len(raw["compress_ratios"]) - raw["num_hidden_layers"]
    trunk = list(ratios) if ratios is not None else raw["compress_ratios"][: raw["num_hidden_layers"]]
    if layers is not None:
        if not 1 <= layers <= len(trunk):
            hint = "--ratios makes any other stack of layers"
            raise UsageError("--layers outside the model", expected=f"1 to {len(trunk)}", got=layers, hint=hint)
        if ratios is not None and layers != len(trunk):
            raise UsageError("--layers and --ratios disagree", expected=len(trunk), got=layers)
        trunk = trunk[:layers]
    if not trunk:
        raise UsageError("--ratios is empty", expected="one of 0, 4, 128 per layer")
    if not mtp:
        n_draft = 0
        raw["num_nextn_predict_layers"] = 0
        for key in [key for key in raw if key.startswith("dspark_")]:
            del raw[key]
    raw["num_hidden_layers"] = len(trunk)
    raw["compress_ratios"] = trunk + [0] * n_draft
    if "num_hash_layers" in raw:
        raw["num_hash_layers"] = min(raw["num_hash_layers"], len(trunk))
    for key, value in (("n_routed_experts", experts), ("vocab_size", vocab)):
        if value is not None:
            raw[key] = value
    if preset in V41_PRESETS:
        _cut_roles(raw, trunk, anew=ratios is not None)
    for key, value in (overrides or {}).items():
        holders = ((raw, key), (file, key), (file.get(VISION_OBJECT, {}), VISION_NAMES.get(key, key)))
        holder, name = next(((holder, name) for holder, name in holders if name in holder), ({}, ""))
        if not name:
            raise UsageError(f"--set: unknown config key {key}", hint="see config.json of the preset")
        holder[name] = value
    if experts is not None:
        raw["num_experts_per_tok"] = min(raw["num_experts_per_tok"], experts)
    _size_tables(raw, engram_rows)
    if "dspark_block_size" in raw:
        n_layers = raw["num_hidden_layers"]
        if n_layers < DSPARK_STAGES:
            hint = "pass --draft drop to leave the draft out"
            raise UsageError(
                "too few layers for a DSpark draft", expected=f"at least {DSPARK_STAGES}", got=n_layers, hint=hint
            )
        raw["dspark_target_layer_ids"] = list(range(n_layers - DSPARK_STAGES, n_layers))
        raw["dspark_noise_token_id"] = min(raw["dspark_noise_token_id"], raw["vocab_size"] - 1)
    if "image_token_id" in file:
        file["image_token_id"] = min(file["image_token_id"], raw["vocab_size"] - 1)
    return file


def _cut_roles(raw: dict[str, Any], trunk: Sequence[int], *, anew: bool) -> None:
    """Leave the sources and tables of the layers that there are; ``anew``: a source wherever the ratio changes."""
    if anew:
        sources = [n for n, ratio in enumerate(trunk) if ratio and ratio != (trunk[n - 1] if n else 0)]
        raw["kv_source_layer_ids"] = raw["index_source_layer_ids"] = sources
        raw["candidate_source_layer_id"] = None
    for key in ("kv_source_layer_ids", "index_source_layer_ids", "engram_layer_ids"):
        raw[key] = [layer for layer in raw[key] if layer < len(trunk)]
    if raw["candidate_source_layer_id"] not in raw["index_source_layer_ids"]:
        raw["candidate_source_layer_id"] = None


def _size_tables(raw: dict[str, Any], engram_rows: int | None) -> None:
    """Give every n-gram table the rows that the primes of its heads add up to, ``engram_rows`` or more of them."""
    if not raw.get("engram_layer_ids"):
        if engram_rows is not None:
            raise UsageError("--engram-rows: the model has no engram tables", expected="a preset of V4.1")
        return
    heads = (raw["engram_max_ngram_size"] - 1) * raw["engram_n_heads"]
    if engram_rows is not None:
        raw["engram_vocab_size"] = max(2, -(-engram_rows // heads))
    primes = primes_from(raw["engram_vocab_size"])
    raw["engram_num_embeddings"] = [sum(islice(primes, heads)) for _ in raw["engram_layer_ids"]]


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"unknown {what}", expected=either(known), got=value)


def _preset_config(preset: str, variant: str | None) -> dict[str, Any]:
    published = PUBLISHED_CONFIGS.get((preset, variant))
    if published is not None:
        return _published_config(published)
    if preset == "v41-tiny":
        raw = _published_config(PUBLISHED_CONFIGS["v41-flash", None])
        raw[TEXT].update(json.loads(json.dumps(V41_TINY)))
        raw[TEXT]["rope_scaling"]["original_max_position_embeddings"] = TINY_ORIGINAL_POSITIONS
        raw[VISION_OBJECT].update(V41_TINY_VISION)
        return raw
    raw = _published_config(PUBLISHED_CONFIGS[("pro" if preset == "pro" else "flash", None)])
    if preset in ("tiny", "nano"):
        raw.update(json.loads(json.dumps(TINY if preset == "tiny" else NANO)))
        if preset == "tiny":
            raw["rope_scaling"]["original_max_position_embeddings"] = TINY_ORIGINAL_POSITIONS
    if variant == "base":
        raw["expert_dtype"] = "fp8"
    if variant in ("dspark", "vision"):
        raw["compress_ratios"] = raw["compress_ratios"][: raw["num_hidden_layers"]] + [0] * DSPARK_STAGES
        raw.update(DSPARK)
        if preset == "tiny":
            raw.update(SMALL_DSPARK)
    if variant == "vision":
        raw.update(VISION)
        if preset == "tiny":
            raw.update(SMALL_VISION)
        raw["rms_norm_eps"] = VISION_RMS_NORM_EPS
    return raw


def _published_config(name: str) -> dict[str, Any]:
    text = (resources.files("dsv4convert.model") / "configs" / name).read_text(encoding="utf-8")
    raw: dict[str, Any] = json.loads(text)
    return raw
