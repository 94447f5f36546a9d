"""The name tables, and nothing else: every tensor of a DeepSeek-V4 or V4.1 checkpoint, one row each.

A row says what a tensor is called in each layout, which shape it has, how the published checkpoints
store it, when it is there, and how model parallelism divides it. Targets and variants are columns
and rows of these tables; no code elsewhere knows a tensor's name.

Shapes are symbolic, [out, in], with the symbols of ``ModelConfig.dims``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from ..containers.folder_names import CONFIG_NAME
from ..errors import ConfigError
from .config import ModelConfig, Version


class Store(str, Enum):
    """How the published FP4 checkpoints store a tensor; what a file really holds is read off its header."""

    DENSE = "dense"  # float8_e4m3fn with scales
    EXPERT = "expert"  # packed float4_e2m1fn with scales
    BF16 = "bf16"
    F32 = "f32"
    TABLE = "table"  # int64
    ENGRAM = "engram table"  # float8_e4m3fn with scales along the row


class When(str, Enum):
    """In which layers a row exists."""

    ALWAYS = "always"
    CSA = "ratio 4"
    HCA = "ratio 128"
    HASH = "hash-routed"
    LEARNED = "learned routing"
    VISION = "vision text model"
    VISION_HASH = "vision text model, hash-routed"
    FIRST = "first draft stage"
    LAST = "last draft stage"
    KV_SOURCE = "KV source"
    GATED_SOURCE = "KV source, ratio above 1"
    INDEX_SOURCE = "index source"
    ENGRAM = "engram layer"


class Split(str, Enum):
    """How model parallelism divides a tensor among ranks."""

    ROWS = "dimension 0"
    COLUMNS = "dimension 1"
    EXPERT = "whole experts"
    RUNS = "runs of rows, the last padded"
    COPY = "copied to every rank"


class Row(NamedTuple):
    """One tensor: official name and shape, and its name in each other layout (None: not there)."""

    name: str
    shape: tuple[str, ...]
    store: Store
    split: Split
    gguf: str | None
    port: str | None
    transformers: str | None
    when: When = When.ALWAYS


_DENSE, _EXPERT, _BF16, _F32, _TABLE = Store.DENSE, Store.EXPERT, Store.BF16, Store.F32, Store.TABLE
_ROWS, _COLS, _COPY = Split.ROWS, Split.COLUMNS, Split.COPY

# fmt: off
TOP_ROWS: tuple[Row, ...] = (
    Row("embed.weight",  ("V", "D"), _BF16, _ROWS, "token_embd.weight", "token_embd.weight", "model.embed_tokens.weight"),
    Row("norm.weight",   ("D",),     _BF16, _COPY, "output_norm.weight", "output_norm.weight", "model.norm.weight"),
    Row("head.weight",   ("V", "D"), _BF16, _ROWS, "output.weight", "output.weight", "lm_head.weight"),
    Row("hc_head_fn",    ("hc", "hc*D"), _F32, _COPY, "output_hc_fn.weight", "output.hc_head.fn", "model.hc_head.hc_fn"),
    Row("hc_head_base",  ("hc",),    _F32, _COPY, "output_hc_base.weight", "output.hc_head.base", "model.hc_head.hc_base"),
    Row("hc_head_scale", ("1",),     _F32, _COPY, "output_hc_scale.weight", "output.hc_head.scale", "model.hc_head.hc_scale"),
)

LAYER_ROWS: tuple[Row, ...] = (
    Row("hc_attn_fn",    ("(2+hc)*hc", "hc*D"), _F32, _COPY, "hc_attn_fn.weight", "hc_attn.fn", "attn_hc.fn"),
    Row("hc_attn_base",  ("(2+hc)*hc",), _F32, _COPY, "hc_attn_base.weight", "hc_attn.base", "attn_hc.base"),
    Row("hc_attn_scale", ("3",),         _F32, _COPY, "hc_attn_scale.weight", "hc_attn.scale", "attn_hc.scale"),
    Row("hc_ffn_fn",     ("(2+hc)*hc", "hc*D"), _F32, _COPY, "hc_ffn_fn.weight", "hc_ffn.fn", "ffn_hc.fn"),
    Row("hc_ffn_base",   ("(2+hc)*hc",), _F32, _COPY, "hc_ffn_base.weight", "hc_ffn.base", "ffn_hc.base"),
    Row("hc_ffn_scale",  ("3",),         _F32, _COPY, "hc_ffn_scale.weight", "hc_ffn.scale", "ffn_hc.scale"),
    Row("attn_norm.weight", ("D",), _BF16, _COPY, "attn_norm.weight", "attn_norm.weight", "input_layernorm.weight"),
    Row("ffn_norm.weight",  ("D",), _BF16, _COPY, "ffn_norm.weight", "ffn_norm.weight", "post_attention_layernorm.weight"),

    Row("attn.attn_sink",     ("H",),            _F32,   _ROWS, "attn_sinks.weight", "attn_sinks", "self_attn.sinks"),
    Row("attn.wq_a.weight",   ("q_lora", "D"),   _DENSE, _COPY, "attn_q_a.weight", "attn_q_a.weight", "self_attn.q_a_proj.weight"),
    Row("attn.q_norm.weight", ("q_lora",),       _BF16,  _COPY, "attn_q_a_norm.weight", "attn_q_a_norm.weight", "self_attn.q_a_norm.weight"),
    Row("attn.wq_b.weight",   ("Hd", "q_lora"),  _DENSE, _ROWS, "attn_q_b.weight", "attn_q_b.weight", "self_attn.q_b_proj.weight"),
    Row("attn.wkv.weight",    ("d", "D"),        _DENSE, _COPY, "attn_kv.weight", "attn_kv.weight", "self_attn.kv_proj.weight"),
    Row("attn.kv_norm.weight", ("d",),           _BF16,  _COPY, "attn_kv_a_norm.weight", "attn_kv_norm.weight", "self_attn.kv_norm.weight"),
    Row("attn.wo_a.weight",   ("G*o_lora", "Hd/G"), _DENSE, _ROWS, "attn_output_a.weight", "attn_o_a.weight", "self_attn.o_a_proj.weight"),
    Row("attn.wo_b.weight",   ("D", "G*o_lora"), _DENSE, _COLS, "attn_output_b.weight", "attn_o_b.weight", "self_attn.o_b_proj.weight"),

    Row("attn.compressor.ape",          ("4", "2d"),   _F32,  _COPY, "attn_compressor_ape.weight", "compressor.ape", "self_attn.compressor.position_bias", When.CSA),
    Row("attn.compressor.wkv.weight",   ("2d", "D"),   _BF16, _COPY, "attn_compressor_kv.weight", "compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", When.CSA),
    Row("attn.compressor.wgate.weight", ("2d", "D"),   _BF16, _COPY, "attn_compressor_gate.weight", "compressor.wgate.weight", "self_attn.compressor.gate_proj.weight", When.CSA),
    Row("attn.compressor.norm.weight",  ("d",),        _BF16, _COPY, "attn_compressor_norm.weight", "compressor.norm.weight", "self_attn.compressor.kv_norm.weight", When.CSA),
    Row("attn.compressor.ape",          ("128", "d"),  _F32,  _COPY, "attn_compressor_ape.weight", "compressor.ape", "self_attn.compressor.position_bias", When.HCA),
    Row("attn.compressor.wkv.weight",   ("d", "D"),    _BF16, _COPY, "attn_compressor_kv.weight", "compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", When.HCA),
    Row("attn.compressor.wgate.weight", ("d", "D"),    _BF16, _COPY, "attn_compressor_gate.weight", "compressor.wgate.weight", "self_attn.compressor.gate_proj.weight", When.HCA),
    Row("attn.compressor.norm.weight",  ("d",),        _BF16, _COPY, "attn_compressor_norm.weight", "compressor.norm.weight", "self_attn.compressor.kv_norm.weight", When.HCA),

    Row("attn.indexer.wq_b.weight",             ("Hi*di", "q_lora"), _DENSE, _ROWS, "indexer.attn_q_b.weight", "indexer.attn_q_b.weight", "self_attn.compressor.indexer.q_b_proj.weight", When.CSA),
    Row("attn.indexer.weights_proj.weight",     ("Hi", "D"),   _BF16, _ROWS, "indexer.proj.weight", "indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight", When.CSA),
    Row("attn.indexer.compressor.ape",          ("4", "2di"),  _F32,  _COPY, "indexer_compressor_ape.weight", "indexer.compressor.ape", "self_attn.compressor.indexer.position_bias", When.CSA),
    Row("attn.indexer.compressor.wkv.weight",   ("2di", "D"),  _BF16, _COPY, "indexer_compressor_kv.weight", "indexer.compressor.wkv.weight", "self_attn.compressor.indexer.kv_proj.weight", When.CSA),
    Row("attn.indexer.compressor.wgate.weight", ("2di", "D"),  _BF16, _COPY, "indexer_compressor_gate.weight", "indexer.compressor.wgate.weight", "self_attn.compressor.indexer.gate_proj.weight", When.CSA),
    Row("attn.indexer.compressor.norm.weight",  ("di",),       _BF16, _COPY, "indexer_compressor_norm.weight", "indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight", When.CSA),

    Row("ffn.gate.weight",  ("E", "D"), _BF16,  _COPY, "ffn_gate_inp.weight", "ffn_gate_inp.weight", "mlp.gate.weight"),
    Row("ffn.gate.bias",    ("E",),     _F32,   _COPY, "exp_probs_b.bias", "exp_probs_b", "mlp.gate.e_score_correction_bias", When.LEARNED),
    # A vision model's hash layers route text by the table and images by bias_vl; this one is unused.
    Row("ffn.gate.bias",    ("E",),     _F32,   _COPY, None, None, None, When.VISION_HASH),
    Row("ffn.gate.bias_vl", ("E",),     _F32,   _COPY, "exp_probs_b_vl.bias", "exp_probs_b_vl", None, When.VISION),
    Row("ffn.gate.tid2eid", ("V", "K"), _TABLE, _COPY, "ffn_gate_tid2eid.weight", "ffn_gate_tid2eid", "mlp.gate.tid2eid", When.HASH),

    Row("ffn.shared_experts.w1.weight", ("I", "D"), _DENSE, _COPY, "ffn_gate_shexp.weight", "ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
    Row("ffn.shared_experts.w2.weight", ("D", "I"), _DENSE, _COPY, "ffn_down_shexp.weight", "ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
    Row("ffn.shared_experts.w3.weight", ("I", "D"), _DENSE, _COPY, "ffn_up_shexp.weight", "ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
)

# One routed expert; official names lie under ``ffn.experts.{k}.``, the other layouts stack all experts
# of a layer (transformers puts w1 and w3 of each expert one above the other).
EXPERT_ROWS: tuple[Row, ...] = (
    Row("w1.weight", ("I", "D"), _EXPERT, Split.EXPERT, "ffn_gate_exps.weight", "ffn_gate_exps.weight", "mlp.experts.gate_up_proj"),
    Row("w2.weight", ("D", "I"), _EXPERT, Split.EXPERT, "ffn_down_exps.weight", "ffn_down_exps.weight", "mlp.experts.down_proj"),
    Row("w3.weight", ("I", "D"), _EXPERT, Split.EXPERT, "ffn_up_exps.weight", "ffn_up_exps.weight", "mlp.experts.gate_up_proj"),
)

# What an MTP layer holds besides LAYER_ROWS, under ``mtp.{m}.``. The GGUF name of e_proj and h_proj is
# that of their concatenation along the input, e first. Names that start with "output" are top level.
MTP_ROWS: tuple[Row, ...] = (
    Row("e_proj.weight", ("D", "D"), _DENSE, _COPY, "nextn.eh_proj.weight", "mtp.e_proj.weight", None),
    Row("h_proj.weight", ("D", "D"), _DENSE, _COPY, "nextn.eh_proj.weight", "mtp.h_proj.weight", None),
    Row("enorm.weight",  ("D",), _BF16, _COPY, "nextn.enorm.weight", "mtp.enorm.weight", None),
    Row("hnorm.weight",  ("D",), _BF16, _COPY, "nextn.hnorm.weight", "mtp.hnorm.weight", None),
    Row("norm.weight",   ("D",), _BF16, _COPY, "nextn.shared_head_norm.weight", "mtp.norm.weight", None),
    Row("hc_head_fn",    ("hc", "hc*D"), _F32, _COPY, "output_hc_fn.weight", "mtp.hc_head.fn", None),
    Row("hc_head_base",  ("hc",), _F32, _COPY, "output_hc_base.weight", "mtp.hc_head.base", None),
    Row("hc_head_scale", ("1",),  _F32, _COPY, "output_hc_scale.weight", "mtp.hc_head.scale", None),
)

# What DSpark's draft stages hold besides LAYER_ROWS. GGUF names are those of the dflash architecture, all
# of them top level.
DSPARK_ROWS: tuple[Row, ...] = (
    Row("main_proj.weight", ("D", "targets*D"), _DENSE, _COPY, "fc.weight", None, None, When.FIRST),
    Row("main_norm.weight", ("D",), _BF16, _COPY, "enc.output_norm.weight", None, None, When.FIRST),
    Row("norm.weight",      ("D",), _BF16, _COPY, "output_norm.weight", None, None, When.LAST),
    Row("markov_head.markov_w1.weight", ("V", "markov"), _BF16, _COPY, "markov_w1.weight", None, None, When.LAST),
    Row("markov_head.markov_w2.weight", ("V", "markov"), _BF16, _COPY, "markov_w2.weight", None, None, When.LAST),
    Row("confidence_head.proj.weight",  ("1", "D+markov"), _BF16, _COPY, "conf_proj.weight", None, None, When.LAST),
    Row("hc_head_fn",    ("hc", "hc*D"), _F32, _COPY, "output_hc_fn.weight", None, None, When.LAST),
    Row("hc_head_base",  ("hc",), _F32, _COPY, "output_hc_base.weight", None, None, When.LAST),
    Row("hc_head_scale", ("1",),  _F32, _COPY, "output_hc_scale.weight", None, None, When.LAST),
)
# fmt: on

# What V4.1 has in common with V4, and what it has of its own: sources of KV entries and of their choice, n-gram
# tables, no mix of the streams at the end, no hash routing.
_COMMON_ROWS = tuple(row for row in LAYER_ROWS if row.when in (When.ALWAYS, When.VISION) or row.when is When.LEARNED)

# fmt: off
V41_TOP_ROWS: tuple[Row, ...] = TOP_ROWS[:3]

V41_LAYER_ROWS: tuple[Row, ...] = (
    *(row for row in _COMMON_ROWS if not row.name.startswith("ffn.")),
    Row("attn.compressor.wkv.weight",   ("d", "D"),  _BF16, _COPY, "attn_compressor_kv.weight", None, None, When.KV_SOURCE),
    Row("attn.compressor.wgate.weight", ("d", "D"),  _BF16, _COPY, "attn_compressor_gate.weight", None, None, When.GATED_SOURCE),
    Row("attn.compressor.norm.weight",  ("d",),      _BF16, _COPY, "attn_compressor_norm.weight", None, None, When.KV_SOURCE),
    Row("attn.indexer.wk.weight",       ("di", "d"), _BF16, _COPY, "indexer.attn_k.weight", None, None, When.KV_SOURCE),
    Row("attn.indexer.k_norm.weight",   ("di",),     _BF16, _COPY, "indexer.k_norm.weight", None, None, When.KV_SOURCE),
    Row("attn.indexer.wq_b.weight",     ("Hi*di", "q_lora"), _DENSE, _ROWS, "indexer.attn_q_b.weight", None, None, When.INDEX_SOURCE),
    Row("attn.indexer.weights_proj.weight", ("Hi", "D"), _BF16, _ROWS, "indexer.proj.weight", None, None, When.INDEX_SOURCE),

    # Rows of the table, each with scales of its own; model parallelism deals them out in runs, the last one padded.
    Row("engram.embed.weight", ("rows", "ed"),        Store.ENGRAM, Split.RUNS, "engram_embd.weight", None, None, When.ENGRAM),
    Row("engram.wkv.weight",   ("(hc+1)*D", "ng*ed"), _DENSE, _COPY, "engram_wkv.weight", None, None, When.ENGRAM),
    Row("engram.q_weight",     ("hc", "D"),           _BF16,  _COPY, "engram_q.weight", None, None, When.ENGRAM),
    Row("engram.k_weight",     ("hc", "D"),           _BF16,  _COPY, "engram_k.weight", None, None, When.ENGRAM),

    *(row for row in _COMMON_ROWS if row.name.startswith("ffn.")),
)

_V41_DSPARK_RENAMED = {"markov_head.markov_w1.weight": "markov_head.embed.weight", "markov_head.markov_w2.weight": "markov_head.head.weight"}
V41_DSPARK_ROWS: tuple[Row, ...] = tuple(
    row._replace(name=_V41_DSPARK_RENAMED[row.name], split=_ROWS) if row.name in _V41_DSPARK_RENAMED else row
    for row in DSPARK_ROWS
    if not row.name.startswith("hc_head_")
)
# fmt: on

# GGUF names that stand without a block, in a draft too.
TOP_LEVEL_GGUF_NAMES = frozenset(row.gguf for row in TOP_ROWS + DSPARK_ROWS)

# Why a layout leaves a kind of tensor out, where there is more to say than that it has no name for it.
LEFT_OUT_REASONS = {
    When.VISION_HASH: "unused: hash layers route text by tid2eid and images by bias_vl",
    When.VISION: "the draft routes text only",
}

# Copies of the trunk's embedding and head that some folders carry in the draft: never read.
UNUSED_DRAFT_SUFFIXES = ("emb.tok_emb.weight", "head.weight", "head.scale", "embed.weight")

# FP8 weights that model-parallel shards hold in BF16, because the published code does not scale them.
BF16_IN_SHARDS = frozenset({"attn.wo_a.weight"})

# The two halves of attention's output, which engines can divide among fewer ranks than the rest.
OUTPUT_PROJECTIONS = frozenset({"attn.wo_a.weight", "attn.wo_b.weight"})

MATRIX = 2  # dimensions

# Optional prefix of re-saved folders, and that of draft layers.
MODEL_PREFIX = "model."
DRAFT_PREFIX = "mtp."

# What a re-saved folder calls the tensors of a layer: transformers' modules, and what transformers makes of
# them where it restores the official names. It does so pattern by pattern; which of them match depends on
# the names that it had loaded.
_MODULES = {row.transformers: row.name for row in LAYER_ROWS if row.transformers is not None}
RESAVED_LAYER_NAMES = {
    **_MODULES,
    **{name.replace("self_attn.", "attn.").replace("mlp.", "ffn."): official for name, official in _MODULES.items()},
    "attn.norm.weight": "attn.kv_norm.weight",
    "attn.compressor.indexer.wq_b.weight": "attn.indexer.wq_b.weight",
    "attn.compressor.indexer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "attn.compressor.indexer.ape": "attn.indexer.compressor.ape",
    "attn.compressor.indexer.wkv.weight": "attn.indexer.compressor.wkv.weight",
    "attn.compressor.indexer.wgate.weight": "attn.indexer.compressor.wgate.weight",
    "attn.compressor.indexer.norm.weight": "attn.indexer.compressor.norm.weight",
}
RESAVED_TOP_NAMES = {
    row.transformers.removeprefix(MODEL_PREFIX): row.name for row in TOP_ROWS if row.transformers is not None
}
RESAVED_SCALE_SUFFIXES = (".weight_scale_inv", ".weight_scale", "_scale_inv", ".scale")

# The weights of an expert that a stack of all experts of a layer holds, one above the other, by the stack's
# name below ``experts.``.
STACKED_EXPERTS = {
    "gate_up_proj": ("w1.weight", "w3.weight"),
    "gate_proj": ("w1.weight",),
    "up_proj": ("w3.weight",),
    "down_proj": ("w2.weight",),
}

# The V3-style names that the published shard script accepts, component by component of a dotted name.
# Transformers' names are whole-suffix rows of the tables above and are tried first.
V3_COMPONENT_ALIASES = {
    "self_attn": "attn",
    "mlp": "ffn",
    "weight_scale_inv": "scale",
    "weight_scale": "scale",
    "e_score_correction_bias": "bias",
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv",
    "kv_a_layernorm": "kv_norm",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "head",
}


class Draft(str, Enum):
    """What kind of draft head a checkpoint carries."""

    NONE = "none"
    MTP = "MTP"
    DSPARK = "DSpark"


def is_draft_alone(names: Iterable[str]) -> bool:
    """Return whether there are tensors, by their official names, and all are of draft layers: ``--draft only``.

    >>> is_draft_alone(["mtp.0.norm.weight"]), is_draft_alone(["mtp.0.norm.weight", "norm.weight"]), is_draft_alone([])
    (True, False, False)
    """
    found = False
    for name in names:
        if not name.startswith(DRAFT_PREFIX):
            return False
        found = True
    return found


def is_vision_name(name: str) -> bool:
    """Return whether an official name is that of a tensor of the vision tower or its aligner.

    >>> is_vision_name("image_pad"), is_vision_name("layers.0.ffn.gate.bias_vl")
    (True, False)
    """
    return name.startswith(("vision.", "aligner.", "image_"))


def is_multiplied(row: Row) -> bool:
    """Return whether activations are multiplied by the tensor: a matrix, and no table or list of biases.

    >>> [row.gguf for row in TOP_ROWS if is_multiplied(row)]
    ['output.weight', 'output_hc_fn.weight']
    """
    is_matrix = len(row.shape) == MATRIX and row.store not in (Store.TABLE, Store.ENGRAM)
    return is_matrix and row.name.endswith((".weight", "_fn")) and row.name != "embed.weight"


def gguf_name(name: str, layer: int | None) -> str:
    """Return the full GGUF name of a tensor of block ``layer`` from the name in its row.

    >>> gguf_name("attn_kv.weight", 3), gguf_name("output_hc_fn.weight", 3)
    ('blk.3.attn_kv.weight', 'output_hc_fn.weight')
    """
    return name if layer is None or name in TOP_LEVEL_GGUF_NAMES else f"blk.{layer}.{name}"


class Expected(NamedTuple):
    """A weight that a checkpoint must hold: its official name, its row, its resolved shape, and where it sits.

    ``layer`` is the trunk layer or the draft stage, ``expert`` the routed expert; None where there is none.
    """

    name: str
    row: Row
    shape: tuple[int, ...]
    prefix: str
    layer: int | None
    expert: int | None

    @property
    def is_draft(self) -> bool:
        """Return whether the tensor belongs to a draft layer."""
        return self.prefix.startswith(DRAFT_PREFIX)


def scale_name(weight_name: str) -> str:
    """Return the official name of the scale that belongs to a weight.

    >>> scale_name("layers.0.attn.wq_a.weight")
    'layers.0.attn.wq_a.scale'
    """
    return weight_name.removesuffix(".weight") + ".scale"


class LayerKind(NamedTuple):
    """What decides which rows of the tables a layer has."""

    ratio: int = 0
    hash_routed: bool = False
    has_vision: bool = False
    first: bool = False
    last: bool = False
    kv_source: bool = False
    index_source: bool = False
    engram: bool = False


def layer_kind(config: ModelConfig, layer: int, has_vision: bool) -> LayerKind:
    """Return the kind of trunk layer ``layer``; ``has_vision``: the routers have their bias for images."""
    return LayerKind(
        ratio=config.compress_ratios[layer],
        hash_routed=config.is_hash_routed(layer),
        has_vision=has_vision,
        kv_source=layer in config.kv_source_layer_ids,
        index_source=layer in config.index_source_layer_ids,
        engram=config.engram is not None and layer in config.engram.layer_ids,
    )


def applies(when: When, kind: LayerKind) -> bool:
    """Return whether a row of the tables exists in a layer of the given kind."""
    return {
        When.ALWAYS: True,
        When.CSA: kind.ratio == 4,
        When.HCA: kind.ratio == 128,
        When.HASH: kind.hash_routed,
        When.LEARNED: not kind.hash_routed,
        When.VISION: kind.has_vision,
        When.VISION_HASH: kind.has_vision and kind.hash_routed,
        When.FIRST: kind.first,
        When.LAST: kind.last,
        When.KV_SOURCE: kind.kv_source,
        When.GATED_SOURCE: kind.kv_source and kind.ratio > 1,
        When.INDEX_SOURCE: kind.index_source,
        When.ENGRAM: kind.engram,
    }[when]


def expected_tensors(config: ModelConfig, draft: Draft, n_draft: int, has_vision: bool = False) -> Iterator[Expected]:
    """Yield every weight of a checkpoint, in the published order: top level, layers, draft layers.

    ``n_draft`` is the number of draft layers or stages; scales are not listed, they follow their weights.
    """
    tables = TABLES[config.version]

    def layers(prefix: str, number: int, rows: tuple[Row, ...], kind: LayerKind, dims: Dims) -> Iterator[Expected]:
        for row in rows:
            if applies(row.when, kind):
                yield Expected(prefix + row.name, row, dims.resolve(row), prefix, number, None)
        for expert in range(dims.experts):
            for row in EXPERT_ROWS:
                name = f"{prefix}ffn.experts.{expert}.{row.name}"
                yield Expected(name, row, dims.resolve(row), prefix, number, expert)

    dims = Dims(config.dims)
    for row in tables.top:
        yield Expected(row.name, row, dims.resolve(row), "", None, None)
    for number in range(config.num_hidden_layers):
        kind = layer_kind(config, number, has_vision)
        if kind.engram and config.engram is not None:
            dims = Dims({**config.dims, "rows": config.engram.rows(number)})
        yield from layers(f"layers.{number}.", number, tables.layer, kind, dims)
    dims = Dims({**config.dims, "E": config.draft_n_routed_experts})
    for number in range(n_draft):
        kind = LayerKind(has_vision=has_vision, first=number == 0, last=number == n_draft - 1)
        yield from layers(f"mtp.{number}.", number, tables.layer + tables.draft[draft], kind, dims)


class Dims:
    """Symbolic dimensions with their values, which resolve the shapes of rows: one tuple for all equal ones."""

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = values
        self._shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    @property
    def experts(self) -> int:
        """Return the number of routed experts."""
        return self._values["E"]

    def resolve(self, row: Row) -> tuple[int, ...]:
        """Return the shape of a row of the tables."""
        shape = self._shapes.get(row.shape)
        if shape is None:
            shape = self._shapes[row.shape] = tuple(self._values[symbol] for symbol in row.shape)
        return shape


# The vision tower of Vision-Exp: all BF16, official names at the top level. GGUF names are those of the
# ``mmproj-`` file (architecture ``clip``). Symbols besides ModelConfig.dims come from ``vision_dims``.
# fmt: off
VISION_ROWS: tuple[Row, ...] = (
    # [vd, 3 * patch * patch], channel first; the GGUF holds it as a convolution [vd, 3, patch, patch].
    Row("vision.patch_embed.proj.weight", ("vd", "3pp"), _BF16, _COPY, "v.patch_embd.weight", None, None),
    Row("vision.patch_embed.proj.bias",   ("vd",),       _BF16, _COPY, "v.patch_embd.bias", None, None),
    Row("vision.norm.weight", ("vd",),       _BF16, _COPY, "v.post_ln.weight", None, None),
    Row("aligner.w1.weight",  ("D", "vd*rr"), _BF16, _COPY, "mm.1.weight", None, None),
    Row("aligner.w1.bias",    ("D",),        _BF16, _COPY, "mm.1.bias", None, None),
    Row("aligner.w2.weight",  ("D", "D"),    _BF16, _COPY, "mm.2.weight", None, None),
    Row("aligner.w2.bias",    ("D",),        _BF16, _COPY, "mm.2.bias", None, None),
    Row("image_start",        ("D",),        _BF16, _COPY, "v.token_embd.img_start", None, None),
    Row("image_end",          ("D",),        _BF16, _COPY, "v.token_embd.img_end", None, None),
    Row("image_newline",      ("D",),        _BF16, _COPY, "v.image_newline", None, None),
    Row("image_pad",          ("D",),        _BF16, _COPY, "v.token_embd.img_pad", None, None),
)

# One block, official names under ``vision.blocks.{n}.``, GGUF names under ``v.blk.{n}.``. Where two GGUF
# names stand, a space between them, the rows of the tensor are halved among them in that order.
VISION_BLOCK_ROWS: tuple[Row, ...] = (
    Row("norm1.weight",     ("vd",),        _BF16, _COPY, "ln1.weight", None, None),
    Row("attn.wqkv.weight", ("3vd", "vd"),  _BF16, _COPY, "attn_qkv.weight", None, None),
    Row("attn.wqkv.bias",   ("3vd",),       _BF16, _COPY, "attn_qkv.bias", None, None),
    Row("attn.wo.weight",   ("vd", "vd"),   _BF16, _COPY, "attn_out.weight", None, None),
    Row("attn.wo.bias",     ("vd",),        _BF16, _COPY, "attn_out.bias", None, None),
    Row("norm2.weight",     ("vd",),        _BF16, _COPY, "ln2.weight", None, None),
    Row("mlp.w1.weight",    ("2vi", "vd"),  _BF16, _COPY, "ffn_gate.weight ffn_up.weight", None, None),
    Row("mlp.w2.weight",    ("vd", "vi"),   _BF16, _COPY, "ffn_down.weight", None, None),
)
# fmt: on


class Tables(NamedTuple):
    """All rows of a version of the architecture; ``draft`` holds what a draft layer has besides ``layer``."""

    top: tuple[Row, ...]
    layer: tuple[Row, ...]
    draft: Mapping[Draft, tuple[Row, ...]]
    vision: tuple[Row, ...]


TABLES = {
    Version.V4: Tables(
        TOP_ROWS, LAYER_ROWS, {Draft.NONE: (), Draft.MTP: MTP_ROWS, Draft.DSPARK: DSPARK_ROWS}, VISION_ROWS
    ),
    # V4.1 has no draft of MTP layers; what claims to be one lacks its tensors.
    Version.V41: Tables(
        V41_TOP_ROWS,
        V41_LAYER_ROWS,
        {Draft.NONE: (), Draft.MTP: MTP_ROWS, Draft.DSPARK: V41_DSPARK_ROWS},
        tuple(row for row in VISION_ROWS if row.name != "image_pad"),
    ),
}

# The config keys that the shapes of the vision tower depend on.
VISION_SHAPE_KEYS = (
    "vision_n_layers",
    "vision_dim",
    "vision_inter_dim",
    "vision_patch_size",
    "vision_downsample_ratio",
)


def vision_size(config: ModelConfig, key: str) -> int:
    """Return a size that the config says of the vision tower.

    Raises:
        ConfigError: it is missing, or no positive integer.
    """
    value = config.flat.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"key {key}: not a size of the vision tower",
            where=CONFIG_NAME,
            expected="a positive integer",
            got=value,
            hint="a nested config.json says the sizes of the tower in vision_config",
        )
    return value


def vision_dims(config: ModelConfig) -> dict[str, int]:
    """Return the symbolic dimensions of the vision tables: width vd, inner width vi, patch p, merge ratio r.

    Raises:
        ConfigError: a ``vision_*`` key is missing, is not a positive integer, or does not fit the others.
    """
    values = {key: vision_size(config, key) for key in VISION_SHAPE_KEYS}
    width, inner = values["vision_dim"], values["vision_inter_dim"]
    heads = config.flat.get("vision_n_heads")
    # A head's elements turn in pairs, half of them by the row and half by the column.
    if heads is not None and (type(heads) is not int or heads < 1 or width % (4 * heads)):
        raise ConfigError(
            "key vision_n_heads: does not fit the other keys",
            where=CONFIG_NAME,
            expected=f"4 * vision_n_heads to divide vision_dim {width}",
            got=heads,
        )
    return {
        "D": config.hidden_size,
        "vd": width,
        "3vd": 3 * width,
        "vi": inner,
        "2vi": 2 * inner,
        "3pp": 3 * values["vision_patch_size"] ** 2,
        "vd*rr": width * values["vision_downsample_ratio"] ** 2,
    }


def vision_tensors(config: ModelConfig) -> Iterator[Expected]:
    """Yield every tensor of the vision tower and its aligner; ``layer`` is the vision block.

    Raises:
        ConfigError: a ``vision_*`` key is missing or is not a positive integer.
    """
    dims = Dims(vision_dims(config))
    for row in TABLES[config.version].vision:
        yield Expected(row.name, row, dims.resolve(row), "", None, None)
    for block in range(config.flat["vision_n_layers"]):
        prefix = f"vision.blocks.{block}."
        for row in VISION_BLOCK_ROWS:
            yield Expected(prefix + row.name, row, dims.resolve(row), prefix, block, None)


def checkpoint_tensors(
    config: ModelConfig, draft: Draft, n_draft: int, *, has_vision: bool, has_tower: bool
) -> Iterator[Expected]:
    """Yield every weight of a checkpoint, the vision tower after the text model.

    ``has_vision``: the routers have their bias for images. ``has_tower``: the tower itself is there.

    Raises:
        ConfigError: there is a tower, and a ``vision_*`` key is missing or is not a positive integer.
    """
    yield from expected_tensors(config, draft, n_draft, has_vision)
    if has_tower:
        yield from vision_tensors(config)
