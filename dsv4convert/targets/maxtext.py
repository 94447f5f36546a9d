"""``maxtext``: a checkpoint that MaxText loads with Orbax, without scales: one Zarr array for each leaf of its tree."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.weights import Weight
from ..containers.orbax import (
    ARRAY_NAME,
    ITEMS,
    ITEMSIZES,
    METADATA_NAME,
    SHARDING_NAME,
    ZarrArray,
    sharding_document,
    step_documents,
    tree_document,
)
from ..errors import UnsupportedError, check_choice
from ..model.config import ModelConfig, Version
from ..model.maxtext_names import (
    HYPER_CONNECTIONS,
    ONES,
    PARAMS,
    Part,
    check_scannable,
    layer_path,
    maxtext_parts,
    stacked,
)
from ..model.tensors import Store
from ..plan import Constant, Dropped, OutputFile, Plan, Segment
from .claims import Claims
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import DROP, open_with_draft_option
from .hf_folder import SAFETENSORS_DTYPE, kinds_of
from .safetensors_files import unplaced_tensor, whole_file
from .segments import BF16, F32, I32, ElementType, convert_segments, join_segments

MAXTEXT = "maxtext"
DTYPES = {t.name: t for t in (BF16, F32)}
ZARR_TYPES = {"bf16": "bfloat16", "f32": "float32", "i32": "int32"}

NO_MODULE = "MaxText's model has no such module"

YARN_NOTE = "MaxText 0.2.5 ignores rope_scaling (YaRN): its logits will not be those of the published code"

# Larger matrices are cut into chunks along their first axis, so that a host can read its part of one.
CHUNK_BYTES = 64 * 2**20
# How many times more chunks than that takes may be made, for rows that divide evenly.
MAX_CUTS = 8

# What is published in these stays of its type.
TYPES: Mapping[Store, ElementType] = {Store.F32: F32, Store.TABLE: I32}

YML_NAME = "maxtext.yml"
# MaxText takes the parameters of a model from the file of its name next to the file of parameters that it is given.
MODEL_NAME = "deepseek4-284b"
MODEL_YML_NAME = f"models/{MODEL_NAME}.yml"

# MaxText's parameters by the field of the config that they are.
YML_KEYS: Mapping[str, str] = {
    "base_emb_dim": "hidden_size",
    "base_num_decoder_layers": "num_hidden_layers",
    "base_num_query_heads": "num_attention_heads",
    "base_mlp_dim": "moe_intermediate_size",
    "base_moe_mlp_dim": "moe_intermediate_size",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "normalization_layer_epsilon": "rms_norm_eps",
    "mhc_expansion_rate": "hc_mult",
    "sinkhorn_iterations": "hc_sinkhorn_iters",
    "first_num_hash_layers": "num_hash_layers",
    "indexer_head_dim": "index_head_dim",
    "indexer_n_heads": "index_n_heads",
    "indexer_topk": "index_topk",
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "mlp_activations_limit": "swiglu_limit",
    "routed_score_func": "scoring_func",
    "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window_size": "sliding_window",
    "rope_max_timescale": "rope_theta",
    "compressed_rope_max_timescale": "compress_rope_theta",
    "max_position_embeddings": "max_position_embeddings",
}
# What all models of the architecture have, and what MaxText's own file for DeepSeek-V4-Flash says of training.
YML_VALUES: Mapping[str, Any] = {
    "decoder_block": "deepseek4",
    "attention_type": "compressed",
    "use_indexer": True,
    "mlp_activations": ["silu", "linear"],
    "routed_bias": True,
    "logits_via_embedding": False,
    "rope_type": "default",
    "base_num_kv_heads": 1,
    "enable_dropout": False,
    "routed_bias_update_rate": 0.001,
    "load_balance_loss_weight": 0.0001,
    "log_moe_bias_norms": False,
}


@dataclass
class _Leaf:
    """A leaf that is put together: a part of one weight, and the segments of all such parts by (expert, layer)."""

    part: Part
    to: ElementType
    is_expert: bool
    pieces: dict[tuple[int, int], Sequence[Segment]] = field(default_factory=dict)


def plan_maxtext(
    source: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    scan: bool = False,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``maxtext``: the Orbax checkpoint ``out/0/items`` with the weights of ``source`` in MaxText's tree.

    ``dtype``, bf16 or f32, is that of all weights but those that are published in F32, which are F32. ``scan`` stacks
    the layers that MaxText scans.

    Raises:
        UsageError: an unknown ``dtype``, or folders that overlap.
        UnsupportedError: V4.1, or ``scan`` and layers that MaxText does not scan.
        Dsv4Error: whatever is wrong with the source.
    """
    check_choice("--dtype", dtype, DTYPES)
    checkpoint, _, left_out = open_with_draft_option(source, DROP, strict=strict, index=index)
    config = checkpoint.config
    if config.version is not Version.V4:
        raise UnsupportedError(f"MaxText has no model of DeepSeek-{config.version.value}", where=source)
    if scan:
        check_scannable(config, source)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    leaves, dropped = _leaves(checkpoint, DTYPES[dtype], scan)
    arrays = {name: _array(name, leaf, config, scan) for name, leaf in leaves.items()}
    files = (
        whole_file(YML_NAME, run_yml(scan)),
        whole_file(MODEL_YML_NAME, model_yml(config)),
        *auxiliary_files(source),
        *(whole_file(name, content) for name, content in step_documents()),
        _json_file(METADATA_NAME, tree_document({name: array.shape for name, array in arrays.items()})),
        _json_file(SHARDING_NAME, sharding_document(arrays)),
        *(file for name, array in arrays.items() for file in _array_files(name, array, leaves[name])),
    )
    dropped += tuple(replace(entry, reason=NO_MODULE) for entry in left_out)
    notes = [YARN_NOTE] if config.yarn is not None and config.yarn.factor != 1 else []
    return folder_plan(MAXTEXT, checkpoint, out, files, dropped, {"dtype": dtype, "scan": scan}, notes)


def _leaves(checkpoint: Checkpoint, to: ElementType, scan: bool) -> tuple[dict[str, _Leaf], tuple[Dropped, ...]]:
    """Return the leaves of a checkpoint by their paths joined by dots, and what they leave out."""
    claims = Claims(checkpoint)
    config = checkpoint.config
    leaves: dict[str, _Leaf] = {}
    nameless: list[Weight] = []
    for weight in checkpoint.weights.values():
        is_expert = weight.expert is not None
        parts = maxtext_parts(weight.row, weight.shape, config, is_expert=is_expert)
        if not parts:
            nameless.append(weight)
            continue
        claims.take(weight)
        layer = -1 if weight.layer is None else weight.layer
        path = "" if layer < 0 else layer_path(layer, config.num_hash_layers, scan=scan) + "."
        element = TYPES.get(weight.row.store, to)
        for part in parts:
            leaf = leaves.setdefault(f"params.{part.collection}.{path}{part.name}", _Leaf(part, element, is_expert))
            place = (-1 if weight.expert is None else weight.expert, layer)
            leaf.pieces[place] = convert_segments(_run(weight, part), element)
    claims.drop(kinds_of(nameless), NO_MODULE, nameless)
    width = config.hc_mult * config.hidden_size
    for layer in range(config.num_hidden_layers):
        for module in HYPER_CONNECTIONS.values():
            name = f"params.{PARAMS}.{layer_path(layer, config.num_hash_layers, scan=scan)}.{module}.{ONES}"
            part = Part(ONES, PARAMS, 0, width, (width,), (0,))
            leaves.setdefault(name, _Leaf(part, to, False)).pieces[-1, layer] = (_ones(width, to),)
    return leaves, claims.close()


def _run(weight: Weight, part: Part) -> Weight:
    """Return the run of a weight along its first axis that is a part of a leaf."""
    if part.rows == weight.shape[0]:
        return weight
    stored = weight.stored
    step = stored.nbytes // weight.shape[0]
    shape = (part.rows, *weight.shape[1:])
    run = stored._replace(offset=stored.offset + part.first * step, nbytes=part.rows * step, shape=shape)
    return weight._replace(shape=shape, stored=run)


def _ones(count: int, to: ElementType) -> Segment:
    one = {BF16.name: b"\x80\x3f", F32.name: b"\0\0\x80\x3f"}[to.name]
    return Segment(Constant(count * one), (), 1, count * len(one))


def _array(name: str, leaf: _Leaf, config: ModelConfig, scan: bool) -> ZarrArray:
    """Return the array of a leaf, of which every weight's part is a chunk, or several."""
    experts = {expert for expert, _ in leaf.pieces}
    layers = {layer for _, layer in leaf.pieces}
    is_scanned = scan and min(layers) >= config.num_hash_layers
    made = stacked(leaf.part, len(experts) if leaf.is_expert else None, len(layers) if is_scanned else None)
    dtype = ZARR_TYPES[leaf.to.name]
    laid_out = leaf.part.shape
    step = _rows_of_a_chunk(laid_out, ITEMSIZES[dtype])
    chunk_laid_out = (*[1] * (len(made.shape) - len(laid_out)), step, *laid_out[1:])
    chunk = [0] * len(made.shape)
    for axis, size in zip(made.order, chunk_laid_out, strict=True):
        chunk[axis] = size
    return ZarrArray(made.shape, dtype, made.order, tuple(chunk))


def _rows_of_a_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many of a part's rows, which lie one behind the other, make a chunk of about ``CHUNK_BYTES``."""
    least = -(-math.prod(shape) * itemsize // CHUNK_BYTES)
    cuts = next((cuts for cuts in range(least, MAX_CUTS * least) if shape[0] % cuts == 0), 1)
    return shape[0] // cuts


def _array_files(name: str, array: ZarrArray, leaf: _Leaf) -> Iterator[OutputFile]:
    """Yield the two files of an array: what it is, and its bytes."""
    yield _json_file(f"{name}/{ARRAY_NAME}", array.document())
    index = array.chunk_index()
    segments = join_segments([leaf.pieces[place] for place in sorted(leaf.pieces)])
    tensor = unplaced_tensor(name, SAFETENSORS_DTYPE[leaf.to.name], array.shape, segments)
    tensor = tensor._replace(offset=len(index))
    yield OutputFile(f"{ITEMS}/{name}/{array.file_name}", index, (tensor,), len(index) + tensor.nbytes)


def _json_file(name: str, document: Mapping[str, Any]) -> OutputFile:
    return whole_file(f"{ITEMS}/{name}", json.dumps(document).encode())


def run_yml(scan: bool) -> bytes:
    """Return the file of parameters with which MaxText is started."""
    values = {"base_config": "base.yml", "model_name": MODEL_NAME, "scan_layers": scan}
    return _yml("MaxText is started with this file; it finds that of the model in models/.", values)


def model_yml(config: ModelConfig) -> bytes:
    """Return MaxText's parameters of a model."""
    values = {key: getattr(config, field) for key, field in YML_KEYS.items()}
    values["compress_ratios"] = list(config.compress_ratios[: config.num_hidden_layers])
    if config.yarn is not None:
        values["original_max_position_embeddings"] = config.yarn.original_max_position_embeddings
    return _yml("Parameters of the model under MaxText's names.", {**values, **YML_VALUES})


def _yml(comment: str, values: Mapping[str, Any]) -> bytes:
    return "".join([f"# {comment}\n", *(f"{key}: {_yml_value(value)}\n" for key, value in values.items())]).encode()


def _yml_value(value: Any) -> str:
    """Return a value as YAML: whole numbers as such, and none like JSON's 1e-06, which YAML 1.1 takes for text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
