"""Families of tensors and names of variants and sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from ..model.config_v41 import TEXT
from ..model.tensors import Draft
from .description import CUSTOM, Description

DRAFT_FAMILY = "draft"
# What a name contains, and the family that it then belongs to; the first match counts.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"^mtp\.", DRAFT_FAMILY),
    (r"^(vision|aligner)\.|^image_", "vision"),
    (r"^embed\.", "embedding"),
    (r"^head\.", "head"),
    (r"\.engram\.", "engram"),
    (r"\.experts\.", "routed experts"),
    (r"\.shared_experts\.", "shared experts"),
    (r"\.ffn\.gate\.", "router"),
    (r"\.indexer\.", "indexer"),
    (r"\.compressor\.", "compressor"),
    (r"(^|\.)hc_", "hyper-connections"),
    (r"norm\.weight$", "norms"),
    (r"\.attn\.", "attention"),
)
OTHER = "other"
EXPERTS = "routed experts"

# The config keys that make a model the size it is; the others of these may be cut down in a slice.
WIDTH_KEYS = (
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "moe_intermediate_size",
    "index_n_heads",
    "index_head_dim",
)
DEPTH_KEYS = ("num_hidden_layers", "n_routed_experts", "vocab_size")
V41_FLASH = "V4.1-Flash"

# The releases of V4 that came with a DSpark draft, by size.
DSPARK_RELEASES = {"V4-Flash": "-0731", "V4-Pro": "-0813"}
PUBLISHED_SIZES = {"V4-Flash": "v4-flash.json", "V4-Pro": "v4-pro.json", V41_FLASH: "v4.1-flash.json"}

# What of the config a description shows.
SHOWN_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def family_of(name: str) -> str:
    """Return the family of a tensor by its official name.

    >>> family_of("layers.3.attn.compressor.norm.weight")
    'compressor'
    """
    for pattern, family in _compiled_families():
        if pattern.search(name):
            return family
    return OTHER


LAYER = re.compile(r"layers\.(\d{1,9})\.")


def layer_of(name: str) -> int | None:
    """Return the trunk's layer that a tensor belongs to by its official name, None where it is in none.

    >>> layer_of("layers.3.attn.wq_a.weight"), layer_of("mtp.0.norm.weight")
    (3, None)
    """
    found = LAYER.match(name)
    return None if found is None else int(found[1])


@cache
def _compiled_families() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), family) for pattern, family in FAMILIES)


def name_variant(found: Description, sizes: Mapping[str, Any]) -> None:
    """Name the variant by its sizes, its draft, its vision tower and how its experts are stored."""
    experts = max((use for use in found.encodings if use.family == EXPERTS), key=lambda use: use.weights, default=None)
    size = _published_size(sizes)
    suffix = ""
    if experts is not None and experts.encoding == "fp8" and experts.scale == "F32":
        suffix = "-Base"
    if "vision" in found.families:
        # V4.1 has its tower and its DSpark draft in any case.
        suffix += "" if V41_FLASH in size else " Vision-Exp"
        found.traits.append("vision tower")
    elif V41_FLASH not in size and found.draft == Draft.DSPARK.value:
        suffix += DSPARK_RELEASES.get(size.removeprefix("slice of "), "-0731")
    found.variant = size + suffix if size in PUBLISHED_SIZES else size
    if found.draft != Draft.NONE.value:
        found.traits.append(f"{found.draft} draft")
    if experts is not None:
        scales = f", {experts.scale} scales" if experts.scale is not None else ""
        found.traits.append(f"{experts.encoding} experts{scales}")


def _published_size(sizes: Mapping[str, Any]) -> str:
    """Return the published model whose sizes these are, or of which they are a slice, or "custom"."""
    for name, file in PUBLISHED_SIZES.items():
        text = (resources.files("dsv4convert.model") / "configs" / file).read_text(encoding="utf-8")
        published = json.loads(text)
        published |= published.get(TEXT, {})
        if all(sizes.get(key) == published[key] for key in WIDTH_KEYS):
            whole = all(sizes.get(key) == published[key] for key in DEPTH_KEYS)
            return name if whole else f"slice of {name}"
    return CUSTOM
