"""What config.json of DeepSeek-V4.1 says beyond V4's: a flat view of its objects, layer roles, engram tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError

# V4's flat names of the keys of vision_config; every other key is called alike in both.
VISION_KEYS = {
    "num_hidden_layers": "vision_n_layers",
    "hidden_size": "vision_dim",
    "num_attention_heads": "vision_n_heads",
    "intermediate_size": "vision_inter_dim",
    "patch_size": "vision_patch_size",
    "rope_theta": "vision_rope_theta",
    "downsample_ratio": "vision_downsample_ratio",
    "max_image_tokens": "vision_max_n_token",
    "min_pixels": "vision_min_pixels",
    "max_wh_ratio": "vision_max_wh_ratio",
}
TEXT, VISION = "text_config", "vision_config"

# Keys that each object of a nested config has for itself.
OWN_KEYS = ("model_type", "dtype", "torch_dtype", "architectures", "transformers_version")


@dataclass(frozen=True)
class Candidates:
    """Index source ``source_layer_id`` marks ``topk_blocks`` blocks of ``block_size`` entries for those after it."""

    source_layer_id: int
    topk_blocks: int
    block_size: int


@dataclass(frozen=True)
class EngramConfig:
    """The n-gram tables: ``num_embeddings`` rows of ``head_dim`` elements at each of ``layer_ids``.

    For each n from 2 to ``max_ngram_size`` a token looks up ``n_heads`` rows. ``vocab_size`` is where the
    search for each head's number of rows starts, ``compressed_vocab_size`` how many different ids the token
    map has, and ``pad_token_id`` the token, not yet mapped, that stands in before the sequence's start.
    """

    layer_ids: tuple[int, ...]
    num_embeddings: tuple[int, ...]
    max_ngram_size: int
    vocab_size: int
    n_heads: int
    head_dim: int
    pad_token_id: int
    compressed_vocab_size: int

    @property
    def rows_per_token(self) -> int:
        """Return how many rows of a table a token looks up."""
        return (self.max_ngram_size - 1) * self.n_heads

    def rows(self, layer: int) -> int:
        """Return the rows of the table of trunk layer ``layer``, 0 where it has none."""
        return dict(zip(self.layer_ids, self.num_embeddings, strict=True)).get(layer, 0)

    def sliced(self, first: int, last: int) -> EngramConfig | None:
        """Return what is left of the tables in layers ``first``..``last``, renumbered from 0."""
        kept = [
            (layer - first, rows)
            for layer, rows in zip(self.layer_ids, self.num_embeddings, strict=True)
            if first <= layer <= last
        ]
        if not kept:
            return None
        return replace(self, layer_ids=tuple(k for k, _ in kept), num_embeddings=tuple(r for _, r in kept))


def flat_view(raw: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return a nested config under the names of V4's flat one; a config that is flat already stays.

    Raises:
        ConfigError: text_config or vision_config is no object, or a key has two values.
    """
    flat = {key: value for key, value in raw.items() if key not in (TEXT, VISION)}
    for part, renamed in ((TEXT, {}), (VISION, VISION_KEYS)):
        inner = raw.get(part, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"key {part}: not an object", where=where, got=type(inner).__name__)
        for key, value in inner.items():
            if key in OWN_KEYS:
                continue
            name = renamed.get(key, key if part == TEXT else f"vision_{key}")
            if name in flat and flat[name] != value:
                raise ConfigError(f"key {part}.{key}: two values", where=where, expected=flat[name], got=value)
            flat[name] = value
    return flat


# The keys of the published inference code's config, in its order.
INFERENCE_KEYS = (
    "vocab_size", "dim", "moe_inter_dim", "n_layers", "n_mtp_layers", "dspark_block_size", "dspark_noise_token_id",
    "dspark_target_layer_ids", "dspark_markov_rank", "dspark_n_routed_experts", "dspark_n_activated_experts", "n_heads",
    "n_routed_experts", "n_shared_experts", "n_activated_experts", "score_func", "route_scale", "swiglu_limit",
    "q_lora_rank", "head_dim", "rope_head_dim", "norm_eps", "o_groups", "o_lora_rank", "window_size",
    "kv_source_layers", "index_source_layers", "original_seq_len", "rope_theta", "rope_factor", "beta_fast",
    "beta_slow", "index_n_heads", "index_head_dim", "index_topk", "candidate_source_layer", "candidate_topk_blocks",
    "candidate_block_size", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "engram_layer_ids", "engram_vocab_size",
    "engram_num_embeddings", "engram_max_ngram_size", "engram_pad_id", "engram_compressed_vocab_size", "dtype",
    "expert_dtype", "compress_rope_theta", "compress_ratios",
    *(name for name in VISION_KEYS.values() if name != "vision_rope_theta"),
    "image_token_id", "engram_n_heads", "engram_head_dim", "vision_rope_theta",
)  # fmt: skip
# Their names in the flat view where these are others; a dotted name lies in an object.
FLAT_NAMES = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "dspark_n_activated_experts": "dspark_num_experts_per_tok",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "norm_eps": "rms_norm_eps",
    "window_size": "sliding_window",
    "kv_source_layers": "kv_source_layer_ids",
    "index_source_layers": "index_source_layer_ids",
    "original_seq_len": "rope_scaling.original_max_position_embeddings",
    "rope_factor": "rope_scaling.factor",
    "beta_fast": "rope_scaling.beta_fast",
    "beta_slow": "rope_scaling.beta_slow",
    "candidate_source_layer": "candidate_source_layer_id",
    "engram_pad_id": "engram_pad_token_id",
}


def inference_config(flat: Mapping[str, Any], expert_dtype: str, *, with_draft: bool) -> dict[str, Any]:
    """Return a flat view as the published inference code names its keys; those that it lacks are left out.

    ``expert_dtype`` is fp4 or fp8, how the experts are stored. The code reads as many draft stages as
    ``n_mtp_layers`` says.
    """
    stored = {"dtype": "fp8", "expert_dtype": expert_dtype}
    found: dict[str, Any] = {}
    for name in INFERENCE_KEYS:
        if name in stored:  # the code's own words, whatever the config says
            found[name] = stored[name]
            continue
        outer, _, inner = FLAT_NAMES.get(name, name).partition(".")
        holder, last = (flat.get(outer) or {}, inner) if inner else (flat, outer)
        if last in holder and (with_draft or not name.startswith("dspark_")):
            found[name] = holder[last]
    if not with_draft:
        found["n_mtp_layers"] = 0
        found["compress_ratios"] = flat["compress_ratios"][: flat["num_hidden_layers"]]
    return found


def engram_config(flat: Mapping[str, Any], where: object) -> EngramConfig | None:
    """Return the engram tables that a config describes, None without any.

    Raises:
        ConfigError: a key is missing, or the tables do not fit the layers.
    """
    layer_ids = flat.get("engram_layer_ids") or []
    if not layer_ids:
        return None
    keys = ("max_ngram_size", "vocab_size", "n_heads", "head_dim", "compressed_vocab_size", "pad_token_id")
    for key in ("num_embeddings", *keys):
        if f"engram_{key}" not in flat:
            raise ConfigError(f"key engram_{key} is missing", where=where)
    rows = flat["engram_num_embeddings"]
    if len(rows) != len(layer_ids):
        raise ConfigError(
            "key engram_num_embeddings: one entry per engram layer", where=where, expected=len(layer_ids), got=len(rows)
        )
    _check_layers("engram_layer_ids", layer_ids, flat["num_hidden_layers"], where)
    if flat["engram_pad_token_id"] >= flat["vocab_size"]:
        raise ConfigError(
            "key engram_pad_token_id: no token",
            where=where,
            expected=f"below vocab_size {flat['vocab_size']}",
            got=flat["engram_pad_token_id"],
        )
    return EngramConfig(tuple(layer_ids), tuple(rows), **{key: flat[f"engram_{key}"] for key in keys})


def candidates(flat: Mapping[str, Any], where: object) -> Candidates | None:
    """Return how a config limits the later index sources to candidates, None where it does not.

    Raises:
        ConfigError: a key is missing.
    """
    if flat.get("candidate_source_layer_id") is None:
        return None
    keys = ("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size")
    for key in keys:
        if key not in flat:
            raise ConfigError(f"key {key} is missing", where=where)
    return Candidates(*(flat[key] for key in keys))


def source_before(layer: int, sources: Sequence[int]) -> int | None:
    """Return the nearest of ``sources`` at or before ``layer``.

    >>> source_before(13, (2, 8, 14, 20)), source_before(1, (2, 8, 14, 20))
    (8, None)
    """
    return max((source for source in sources if source <= layer), default=None)


def check_roles(
    ratios: Sequence[int],
    kv_sources: Sequence[int],
    index_sources: Sequence[int],
    found: Candidates | None,
    where: object,
) -> None:
    """Check that every layer that compresses or chooses has whom to take it from. ``ratios``: the trunk's.

    Raises:
        ConfigError: a source that cannot be one, or a layer without its source; names the key and the layer.
    """
    for key, ids in (("kv_source_layer_ids", kv_sources), ("index_source_layer_ids", index_sources)):
        _check_layers(key, ids, len(ratios), where)
        for layer in ids:
            if not ratios[layer]:
                raise ConfigError(
                    f"key {key}: layer {layer} has compress ratio 0, so nothing to share",
                    where=where,
                    expected="layers of compress ratio 1 or 2",
                )
    for layer in kv_sources:
        if layer not in index_sources:
            raise ConfigError(
                f"key index_source_layer_ids: KV source {layer} is missing", where=where, got=list(index_sources)
            )
    for layer, ratio in enumerate(ratios):
        source = source_before(layer, kv_sources)
        if ratio and source is None:
            raise ConfigError(
                f"key kv_source_layer_ids: no source at or before layer {layer}", where=where, got=list(kv_sources)
            )
        if ratio and source is not None and ratios[source] != ratio:
            raise ConfigError(
                f"key compress_ratios: layer {layer} reads the entries of layer {source}, of another ratio",
                where=where,
                expected=ratios[source],
                got=ratio,
            )
    if found is not None and found.source_layer_id not in index_sources:
        raise ConfigError(
            "key candidate_source_layer_id: not an index source",
            where=where,
            expected=f"one of {list(index_sources)}",
            got=found.source_layer_id,
        )


def _check_layers(key: str, ids: Sequence[int], layers: int, where: object) -> None:
    if list(ids) != sorted(set(ids)) or any(layer >= layers for layer in ids):
        raise ConfigError(f"key {key}: ascending layers", where=where, expected=f"of 0-{layers - 1}", got=list(ids))
