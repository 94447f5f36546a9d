"""MaxText's tree of parameters: which leaves a tensor of DeepSeek-V4 becomes, and how they lie in its bytes.

Read off MaxText 0.2.5. A kernel is [in, out] there, so that the bytes of the official [out, in] are its axes in
another order; no leaf needs bytes to be moved within a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import UnsupportedError
from .config import ModelConfig
from .tensors import Row, When

# Collections of variables: of weights, and those that MaxText keeps apart from them.
PARAMS, BIASES, TABLES = "params", "MoEBiasVar", "Tid2EidVar"

_TOP: Mapping[str, str] = {
    "embed.weight": "token_embedder.embedding",
    "norm.weight": "decoder.decoder_norm.scale",
    "head.weight": "decoder.logits_dense.kernel",
    "hc_head_fn": "decoder.hc_head.hc_fn",
    "hc_head_base": "decoder.hc_head.hc_base",
    "hc_head_scale": "decoder.hc_head.hc_scale",
}

_IN_LAYER: Mapping[str, str] = {
    "attn_norm.weight": "pre_self_attention_layer_norm.scale",
    "ffn_norm.weight": "post_self_attention_layer_norm.scale",
    "attn.attn_sink": "self_attention.sinks",
    "attn.wq_a.weight": "self_attention.wq_a.kernel",
    "attn.q_norm.weight": "self_attention.q_norm.scale",
    "attn.wq_b.weight": "self_attention.wq_b.kernel",
    "attn.wkv.weight": "self_attention.wkv.kernel",
    "attn.kv_norm.weight": "self_attention.kv_norm.scale",
    "attn.wo_a.weight": "self_attention.o_a_proj.kernel",
    "attn.wo_b.weight": "self_attention.o_b_proj.kernel",
    "attn.compressor.ape": "self_attention.{compressor}.position_bias",
    "attn.compressor.wkv.weight": "self_attention.{compressor}.kv_proj.kernel",
    "attn.compressor.wgate.weight": "self_attention.{compressor}.gate_proj.kernel",
    "attn.compressor.norm.weight": "self_attention.{compressor}.kv_norm.scale",
    "attn.indexer.wq_b.weight": "self_attention.{compressor}.indexer.q_proj.kernel",
    "attn.indexer.weights_proj.weight": "self_attention.{compressor}.indexer.weights_proj.kernel",
    "attn.indexer.compressor.ape": "self_attention.{compressor}.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attention.{compressor}.indexer.kv_proj.kernel",
    "attn.indexer.compressor.wgate.weight": "self_attention.{compressor}.indexer.gate_proj.kernel",
    "attn.indexer.compressor.norm.weight": "self_attention.{compressor}.indexer.kv_norm.scale",
    "ffn.gate.weight": "mlp.MoeBlock_0.gate.kernel",
    "ffn.gate.bias": "mlp.MoeBlock_0.gate.bias",
    "ffn.gate.tid2eid": "mlp.MoeBlock_0.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.wi_0.kernel",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.wo.kernel",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.wi_1.kernel",
}
_EXPERTS: Mapping[str, str] = {
    "w1.weight": "mlp.MoeBlock_0.wi_0",
    "w2.weight": "mlp.MoeBlock_0.wo",
    "w3.weight": "mlp.MoeBlock_0.wi_1",
}
_COLLECTIONS: Mapping[str, str] = {"ffn.gate.bias": BIASES, "ffn.gate.tid2eid": TABLES}
_COMPRESSORS: Mapping[When, str] = {When.CSA: "csa_compressor", When.HCA: "hca_compressor"}

# The hyper-connections of attention and of the experts: MaxText's module, and its leaves for the three tensors of one,
# each of which is divided into what goes in, what comes out, and the residual.
HYPER_CONNECTIONS: Mapping[str, str] = {"hc_attn": "mhc_attention", "hc_ffn": "mhc_mlp"}
_DIVISIONS: Mapping[str, str] = {"fn": "alpha", "base": "beta", "scale": "alpha_scale"}
# Published checkpoints do without the weights of the norm in front of a hyper-connection: they are ones.
ONES = "mhc_norm.scale"

# The axes of a leaf as axes of the reshaped tensor, where it is neither itself nor its transpose: a projection to heads
# is [in, heads, head], the grouped one [groups, in, out].
_RESHAPED: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "attn.wq_b.weight": (("H", "d", "q_lora"), (2, 0, 1)),
    "attn.wkv.weight": (("1", "d", "D"), (2, 0, 1)),
    "attn.wo_a.weight": (("G", "o_lora", "Hd/G"), (0, 2, 1)),
}
# Matrices that are not transposed.
_AS_THEY_ARE = ("embed.weight", "attn.compressor.ape", "attn.indexer.compressor.ape", "ffn.gate.tid2eid")


class Part(NamedTuple):
    """A leaf that a tensor becomes, or a part of it does.

    ``name`` is below the tensor's layer. ``first`` and ``rows`` choose a run along the tensor's first axis, which is
    reshaped to ``shape``; the leaf's axis i is axis ``axes[i]`` of that.
    """

    name: str
    collection: str
    first: int
    rows: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def maxtext_parts(row: Row, shape: tuple[int, ...], config: ModelConfig, *, is_expert: bool = False) -> list[Part]:
    """Return the leaves that a tensor of the trunk becomes, none where MaxText's model has no place for it.

    ``shape`` is the official one.

    >>> from .tensors import EXPERT_ROWS
    >>> maxtext_parts(EXPERT_ROWS[0], (2048, 4096), None, is_expert=True)
    [Part(name='mlp.MoeBlock_0.wi_0', collection='params', first=0, rows=2048, shape=(2048, 4096), axes=(1, 0))]
    """
    module, _, kind = row.name.rpartition("_")
    if module in HYPER_CONNECTIONS:
        return _divided(HYPER_CONNECTIONS[module], _DIVISIONS[kind], shape, config.hc_mult)
    name = (_EXPERTS if is_expert else _TOP if row.name in _TOP else _IN_LAYER).get(row.name)
    if name is None or row.when is When.VISION_HASH:
        return []
    name = name.format(compressor=_COMPRESSORS.get(row.when))
    collection = _COLLECTIONS.get(row.name, PARAMS)
    axes = tuple(range(len(shape)))
    laid_out = shape
    if row.name in _RESHAPED:
        symbols, axes = _RESHAPED[row.name]
        dims = {**config.dims, "G": config.o_groups, "o_lora": config.o_lora_rank}
        laid_out = tuple(dims[symbol] for symbol in symbols)
    elif row.name not in _AS_THEY_ARE:
        axes = axes[::-1]
    return [Part(name, collection, 0, shape[0], laid_out, axes)]


def _divided(module: str, kind: str, shape: tuple[int, ...], streams: int) -> list[Part]:
    """Return the three leaves of a tensor of hyper-connections: [(2 + streams) * streams, ..], or one number each."""
    counts = (streams, streams, streams * streams) if kind != "alpha_scale" else (1, 1, 1)
    parts: list[Part] = []
    first = 0
    for place, count in zip(("pre", "post", "res"), counts, strict=True):
        laid_out = (count, *shape[1:])
        if kind == "beta" and place == "res":
            laid_out = (streams, streams)
        axes = (1, 0) if kind == "alpha" else tuple(range(len(laid_out)))
        parts.append(Part(f"{module}.{place}_{kind}", PARAMS, first, count, laid_out, axes))
        first += count
    return parts


def check_scannable(config: ModelConfig, where: object) -> None:
    """Check that the layers behind the hash-routed ones are pairs of HCA and CSA, which is what MaxText scans.

    Raises:
        UnsupportedError: they are not.
    """
    ratios: Sequence[int] = config.compress_ratios[config.num_hash_layers : config.num_hidden_layers]
    if not ratios or len(ratios) % 2 or list(ratios) != [128, 4] * (len(ratios) // 2):
        raise UnsupportedError(
            "--scan: MaxText scans pairs of layers with compress_ratios 128 and 4",
            where=where,
            expected=f"such pairs behind the {config.num_hash_layers} hash-routed layers",
            got=list(ratios),
            hint="leave out --scan",
        )


def layer_path(layer: int, hash_layers: int, *, scan: bool) -> str:
    """Return where a layer lies in the tree; layers that are scanned share one of two places.

    >>> layer_path(4, 3, scan=False), layer_path(2, 3, scan=True), layer_path(4, 3, scan=True)
    ('decoder.layers_4', 'decoder.layers_2', 'decoder.scanned_blocks.layers_1')
    """
    if scan and layer >= hash_layers:
        return f"decoder.scanned_blocks.layers_{(layer - hash_layers) % 2}"
    return f"decoder.layers_{layer}"


class Leaf(NamedTuple):
    """A leaf as a whole: its shape, and which of its axes each axis of the bytes is."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def laid_out(self) -> tuple[int, ...]:
        """Return the shape in which the bytes lie."""
        return tuple(self.shape[axis] for axis in self.order)


def stacked(part: Part, experts: int | None, layers: int | None) -> Leaf:
    """Return the leaf that the parts of so many experts, and of so many layers, make; None: it has no such axis.

    The bytes of all parts lie one behind the other, those of an expert's layers together. In the leaf experts are the
    first axis; layers are the second, and the first of routing biases.

    >>> stacked(Part("wo", "params", 0, 4, (4, 8), (1, 0)), experts=16, layers=3)
    Leaf(shape=(16, 3, 8, 4), order=(0, 1, 3, 2))
    >>> stacked(Part("scale", "params", 0, 4, (4,), (0,)), experts=None, layers=3)
    Leaf(shape=(4, 3), order=(1, 0))
    """
    expert, layer = len(part.shape), len(part.shape) + 1  # axes after those of the part
    sizes = [*part.shape, experts or 1, layers or 1]
    axes = list(part.axes)
    lead = [axis for axis, there in ((expert, experts), (layer, layers)) if there is not None]
    if experts is not None:
        axes = [*lead, *axes]
    elif layers is not None:
        axes.insert(0 if part.collection == BIASES else 1, layer)
    bytes_axes = [*lead, *range(len(part.shape))]
    return Leaf(tuple(sizes[axis] for axis in axes), tuple(axes.index(axis) for axis in bytes_axes))
