"""config.json of an output: the source's, with what it says wrong of its tensors put right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.meaning import has_draft_keys, stated_expert_dtypes, stored_expert_dtype, wrong_mtp_layers
from ..checkpoint.shards import ShardCheckpoint
from ..checkpoint.weights import Weight
from ..model.config import Version
from ..model.config_v41 import TEXT, VISION
from ..model.tensors import Draft, is_vision_name

# Keys of config.json that speak of quantized weights, and those of a vision tower, as V4 has them.
QUANTIZATION_KEYS = ("quantization_config", "expert_dtype")
VISION_KEY_PREFIX = "vision_"


def true_config(checkpoint: Checkpoint | ShardCheckpoint) -> Mapping[str, Any]:
    """Return config.json as the tensors bear it out: drafts and experts that there are, ratios as published.

    The very object of the source where nothing is to be put right.
    """
    config = checkpoint.config.raw
    if checkpoint.draft is Draft.NONE and has_draft_keys(checkpoint.config.flat):
        config = config_without_draft(config)
    if wrong_mtp_layers(checkpoint.config, checkpoint.draft, checkpoint.n_draft) is not None:
        config = {**config, "num_nextn_predict_layers": checkpoint.n_draft}
    # V4.1 lies in a nested form, whose ratios must be as published to be read at all.
    ratios = config.get("compress_ratios") if checkpoint.config.version is Version.V4 else None
    if ratios is not None:
        # An entry for every layer, 0 where nothing is compressed: readers index the list without a check.
        needed = checkpoint.config.num_hidden_layers + checkpoint.n_draft
        true = list(checkpoint.config.compress_ratios)[: max(len(ratios), needed)]
        if ratios != true:
            config = {**config, "compress_ratios": true}
    held = stored_expert_dtype(checkpoint.weights.values())
    for key, value in stated_expert_dtypes(config).items():
        if held is not None and value != held:
            config = with_expert_dtype(config, key, held)
    return config


def pruned_config(config: Mapping[str, Any], weights: Iterable[Weight]) -> Mapping[str, Any]:
    """Return ``config`` without the keys of a vision tower, or of quantised weights, where ``weights`` have none.

    The very object where there is nothing to leave out.
    """
    held = list(weights)
    left_out: set[str] = set()
    if not any(is_vision_name(weight.name) for weight in held):
        left_out |= {key for key in config if key == VISION or key.startswith(VISION_KEY_PREFIX)}
    if all(weight.scale is None for weight in held):
        left_out |= {key for key in QUANTIZATION_KEYS if key in config}
    return {key: value for key, value in config.items() if key not in left_out} if left_out else config


def with_expert_dtype(config: Mapping[str, Any], key: str, value: str) -> dict[str, Any]:
    """Return ``config`` with another encoding of the experts at ``key``, which may lie in quantization_config."""
    outer, _, inner = key.rpartition(".")
    return {**config, outer: {**config[outer], inner: value}} if outer else {**config, key: value}


def config_without_draft(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the keys of draft layers."""
    if TEXT in raw:
        return {**raw, TEXT: config_without_draft(raw[TEXT])}
    config = {key: value for key, value in raw.items() if not key.startswith("dspark_")}
    config["num_nextn_predict_layers"] = 0
    if "compress_ratios" in raw:
        config["compress_ratios"] = raw["compress_ratios"][: raw["num_hidden_layers"]]
    return config
