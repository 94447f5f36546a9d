"""What mlx-vlm's models of DeepSeek-V4 and V4.1 call each tensor, and the shapes in which they hold it.

The names are those of mlx-vlm 0.7's modules, under which its loader finds tensors as they are. The modules of the two
versions differ: those of V4 give names of their own to hyper-connections and routing, those of V4.1 keep the official
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .config import Version
from .tensors import Row, is_vision_name

# With this all names of the text model begin, and no name of any other layout.
TEXT_PREFIX = "language_model."

_TOP: Mapping[Version, Mapping[str, str]] = {
    Version.V4: {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "hc_head_fn": "model.hc_head.fn",
        "hc_head_base": "model.hc_head.base",
        "hc_head_scale": "model.hc_head.scale",
    },
    Version.V41: {
        "embed.weight": "embed_tokens.weight",
        "norm.weight": "norm.weight",
        "head.weight": "head.weight",
    },
}
_LAYERS: Mapping[Version, str] = {Version.V4: "model.", Version.V41: ""}

_EXPERTS: Mapping[str, str] = {
    "w1.weight": "ffn.switch_mlp.gate_proj.weight",
    "w2.weight": "ffn.switch_mlp.down_proj.weight",
    "w3.weight": "ffn.switch_mlp.up_proj.weight",
}
_COMMON: Mapping[str, str] = {
    "ffn.shared_experts.w1.weight": "ffn.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "ffn.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "ffn.shared_experts.up_proj.weight",
}
_IN_LAYER: Mapping[Version, Mapping[str, str]] = {
    Version.V4: {
        **_COMMON,
        "hc_attn_fn": "attn_hc.fn",
        "hc_attn_base": "attn_hc.base",
        "hc_attn_scale": "attn_hc.scale",
        "hc_ffn_fn": "ffn_hc.fn",
        "hc_ffn_base": "ffn_hc.base",
        "hc_ffn_scale": "ffn_hc.scale",
        "ffn.gate.bias": "ffn.gate.e_score_correction_bias",
    },
    Version.V41: _COMMON,
}
_IN_VISION_BLOCK: Mapping[Version, Mapping[str, str]] = {
    Version.V4: {"mlp.w1.weight": "ffn.w1.weight", "mlp.w2.weight": "ffn.w2.weight"},
    Version.V41: {},
}

# The symbol of the rows of the projection that works group by group: a matrix for each group, [G, o_lora, Hd/G].
_GROUPED_ROWS = "G*o_lora"


def is_mlx(names: Iterable[str]) -> bool:
    """Return whether the names of tensors are those of mlx-vlm's modules."""
    return any(name.startswith(TEXT_PREFIX) for name in names)


def mlx_name(row: Row, prefix: str, version: Version, *, is_expert: bool = False) -> str:
    """Return the name of a tensor of the trunk or the vision tower; the experts of a layer share one.

    ``prefix`` is what stands before the row's name in the official one, up to the layer.

    >>> from .tensors import EXPERT_ROWS, TOP_ROWS
    >>> mlx_name(TOP_ROWS[2], "", Version.V4)
    'language_model.lm_head.weight'
    >>> mlx_name(EXPERT_ROWS[0], "layers.3.", Version.V41, is_expert=True)
    'language_model.layers.3.ffn.switch_mlp.gate_proj.weight'
    """
    if is_vision_name(prefix + row.name):
        return prefix + _IN_VISION_BLOCK[version].get(row.name, row.name)
    if not prefix:
        return TEXT_PREFIX + _TOP[version][row.name]
    names = _EXPERTS if is_expert else _IN_LAYER[version]
    return TEXT_PREFIX + _LAYERS[version] + prefix + names.get(row.name, row.name)


def mlx_shape(row: Row, shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Return the shape of a tensor, ``shape`` being the official one: the grouped projection has a matrix a group.

    >>> from .tensors import LAYER_ROWS
    >>> (wo_a,) = (row for row in LAYER_ROWS if row.name == "attn.wo_a.weight")
    >>> mlx_shape(wo_a, (8192, 4096), groups=8)
    (8, 1024, 4096)
    """
    return (groups, shape[0] // groups, shape[1]) if row.shape[0] == _GROUPED_ROWS else shape
