"""config.json of an output: the source's, with what it says wrong of its tensors put right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.meaning import has_draft_keys, stated_expert_dtypes, stored_expert_dtype
from ..checkpoint.shards import ShardCheckpoint
from ..model.config import Version
from ..model.config_v41 import TEXT
from ..model.tensors import Draft


def true_config(checkpoint: Checkpoint | ShardCheckpoint) -> Mapping[str, Any]:
    """Return config.json as the tensors bear it out: drafts and experts that there are, ratios as published.

    The very object of the source where nothing is to be put right.
    """
    config = checkpoint.config.raw
    if checkpoint.draft is Draft.NONE and has_draft_keys(checkpoint.config.flat):
        config = config_without_draft(config)
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
