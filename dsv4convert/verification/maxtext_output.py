"""A finished checkpoint for MaxText: which part of which array holds which weight, and what the other files say."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Weight
from ..containers.json_object import parse_json
from ..containers.orbax import (
    ARRAY_NAME,
    ITEMS,
    METADATA_NAME,
    SHARDING_NAME,
    ZarrArray,
    read_array,
    sharding_document,
    step_documents,
    tree_document,
)
from ..containers.presence import is_file, is_folder
from ..containers.untrusted import read_whole
from ..errors import ConfigError, FileFormatError, InputMissingError
from ..model.config import ModelConfig
from ..model.maxtext_names import HYPER_CONNECTIONS, ONES, Part, layer_path, maxtext_parts, stacked
from ..model.tensors import Store
from .companions import ABSENT, check_files, check_json_keys, read_reported
from .compare import Piece
from .left_out import THE_DRAFT, leave_out
from .matrix import Matrix, read_at, weight_matrix
from .report import EXTRA, FILE, KEY, LAYOUT, MISSING, TENSOR, LeftOut, Report

ENCODINGS = {"bfloat16": "bf16", "float32": "f32", "int32": "i32"}
# What stays of its type whatever was asked for.
FIXED = {Store.F32: "f32", Store.TABLE: "i32"}
ONE = {"bf16": b"\x80\x3f", "f32": b"\0\0\x80\x3f"}

MAX_DOCUMENT_BYTES = 64 * 2**20
MAX_YML_BYTES = 2**20
YML_NAME, MODEL_NAME = "maxtext.yml", "deepseek4-284b"
SCANNED = ".scanned_blocks."
EMBEDDING = "params.params.token_embedder.embedding"


class _Place(NamedTuple):
    """The part of a leaf that a weight is, or a part of it: behind those of other experts and layers."""

    expert: int
    layer: int
    part: Part
    weight: Weight


def is_maxtext_folder(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint in Orbax's form."""
    return is_file(folder / ITEMS / METADATA_NAME)


def maxtext_pieces(folder: Path, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of a checkpoint for MaxText, and report everything that does not belong or is missing."""
    arrays = _arrays(folder / ITEMS, report)
    scan = any(SCANNED in name for name in arrays)
    config = checkpoint.config
    groups: dict[str, list[_Place]] = {}
    for weight in _present(checkpoint, report):
        for part in maxtext_parts(weight.row, weight.shape, config, is_expert=weight.expert is not None):
            name = f"params.{part.collection}.{_path(weight.layer, config, scan)}{part.name}"
            expert, layer = (-1 if number is None else number for number in (weight.expert, weight.layer))
            groups.setdefault(name, []).append(_Place(expert, layer, part, weight))
    left = dict(arrays)
    embedding = arrays.get(EMBEDDING)
    # The type of all weights that have no fixed one.
    asked = ENCODINGS["bfloat16" if embedding is None else embedding.dtype]
    pieces: list[Piece] = []
    for name, places in groups.items():
        array = left.pop(name, None)
        if array is None:
            report.missing(name, places[0].weight.name)
        else:
            encoding = FIXED.get(places[0].weight.row.store, asked)
            in_order = sorted(places, key=lambda place: place[:2])
            pieces += _leaf_pieces(folder / ITEMS, name, array, in_order, encoding, report)
    _check_ones(folder / ITEMS, left, config, scan, asked, report)
    for name in left:
        report.problem(EXTRA, f"tensor {name}", "not in the source")
    _check_documents(folder, arrays, report)
    _check_yml(folder, config, scan, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


def _arrays(items: Path, report: Report) -> dict[str, ZarrArray]:
    """Return the arrays of a checkpoint by name; what is malformed is reported."""
    arrays: dict[str, ZarrArray] = {}
    for path in sorted(items.iterdir()):
        if not is_folder(path):
            continue
        try:
            array = read_array(path / ARRAY_NAME)
        except (FileFormatError, ConfigError, InputMissingError) as error:
            report.problem(FILE, path, str(error))
            continue
        arrays[path.name] = array
        for name in sorted(set(os.listdir(path)) - {ARRAY_NAME, array.file_name}):
            report.problem(FILE, path / name, "unexpected file next to an array")
    return arrays


def _present(checkpoint: Checkpoint, report: Report) -> Iterator[Weight]:
    """Yield the weights that MaxText's model has a place for; the others are left out."""
    draft, nameless = 0, []
    for weight in checkpoint.weights.values():
        is_expert = weight.expert is not None
        if weight.is_draft:
            draft += 1 + (weight.scale is not None)
        elif not maxtext_parts(weight.row, weight.shape, checkpoint.config, is_expert=is_expert):
            nameless.append(weight)
        else:
            yield weight
    if draft:
        report.left_out.append(LeftOut(THE_DRAFT, "the output holds none", draft))
    leave_out(nameless, "MaxText has no such module", report)


def _path(layer: int | None, config: ModelConfig, scan: bool) -> str:
    return "" if layer is None else layer_path(layer, config.num_hash_layers, scan=scan) + "."


def _leaf_pieces(
    items: Path, name: str, array: ZarrArray, places: list[_Place], encoding: str, report: Report
) -> Iterator[Piece]:
    """Yield the pieces of a leaf, which holds the parts of its weights one behind the other."""
    where = f"tensor {name}"
    first = places[0]
    experts, layers = (len({place[axis] for place in places}) for axis in (0, 1))
    leaf = stacked(first.part, experts if first.expert >= 0 else None, layers if SCANNED in name else None)
    if (array.shape, array.order) != (leaf.shape, leaf.order):
        got = f"shape {list(array.shape)}, axes {list(array.order)}"
        report.problem(LAYOUT, where, f"expected shape {list(leaf.shape)}, axes {list(leaf.order)}, got {got}")
        return
    if not array.is_in_order:
        # The file's bytes are compared as they lie; a loader would put those of such chunks elsewhere.
        what = "expected chunks that are runs of its bytes, one behind the other"
        report.problem(LAYOUT, where, f"{what}, got chunks of {list(array.chunk)}, axes {list(array.order)}")
        return
    matrix = _data(items, name, array, report)
    if matrix is None:
        return
    if matrix.encoding != encoding:
        report.problem(LAYOUT, where, f"expected {encoding}, got {matrix.encoding}")
    is_vector = len(first.weight.shape) == 1
    rows = 1 if is_vector else math.prod(first.part.shape[:-1])
    columns = math.prod(first.part.shape) // rows
    matrix = matrix._replace(rows=rows * len(places), columns=columns)
    for number, place in enumerate(places):
        at = (0, place.part.first) if is_vector else (place.part.first, 0)
        source = weight_matrix(place.weight)
        yield Piece(matrix, leaf.laid_out, (number * rows, 0), source, at, (rows, columns))


def _data(items: Path, name: str, array: ZarrArray, report: Report) -> Matrix | None:
    """Return an array's bytes as one row, None, and a problem, where its file does not hold them behind an index."""
    path = items / name / array.file_name
    index = array.chunk_index()
    try:
        size = path.stat().st_size
    except OSError as error:
        report.problem(FILE, path, f"cannot be read ({error.strerror})")
        return None
    if size != len(index) + array.nbytes:
        report.problem(LAYOUT, f"tensor {name}", f"expected a file of {len(index) + array.nbytes} bytes, got {size}")
        return None
    if read_at(path, 0, len(index)).tobytes() != index:
        report.problem(LAYOUT, f"tensor {name}", "the index of its chunks is wrong")
    return Matrix(name, path, len(index), ENCODINGS[array.dtype], 1, math.prod(array.shape))


def _check_ones(
    items: Path, left: dict[str, ZarrArray], config: ModelConfig, scan: bool, encoding: str, report: Report
) -> None:
    """Report the norms of hyper-connections that are not all ones; take them off ``left``."""
    width = config.hc_mult * config.hidden_size
    counts: dict[str, int] = {}
    for layer in range(config.num_hidden_layers):
        for module in HYPER_CONNECTIONS.values():
            name = f"params.params.{_path(layer, config, scan)}{module}.{ONES}"
            counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        array = left.pop(name, None)
        if array is None:
            report.problem(MISSING, f"tensor {name}", "not in the output")
            continue
        shape = (width, count) if SCANNED in name else (width,)
        if array.shape != shape:
            report.problem(LAYOUT, f"tensor {name}", f"expected shape {list(shape)}, got {list(array.shape)}")
            continue
        matrix = _data(items, name, array, report)
        if matrix is None:
            continue
        if read_at(matrix.file, matrix.offset, matrix.nbytes).tobytes() != ONE.get(encoding, b"") * math.prod(shape):
            report.problem(TENSOR, f"tensor {name}", "expected ones")


def _check_documents(folder: Path, arrays: Mapping[str, ZarrArray], report: Report) -> None:
    """Report what Orbax's own files say wrong of the arrays."""
    shapes = {name: array.shape for name, array in arrays.items()}
    expected = {METADATA_NAME: tree_document(shapes), SHARDING_NAME: sharding_document(arrays)}
    for name, document in expected.items():
        path = folder / ITEMS / name
        found = read_reported(path, report, MAX_DOCUMENT_BYTES)
        if found is not None:
            check_json_keys(path, document, found, report)
    for name, content in step_documents():
        report.keys += 1
        try:
            if read_whole(folder / name, len(content)) != content:
                report.problem(FILE, folder / name, "not as Orbax needs it")
        except (FileFormatError, InputMissingError) as error:
            report.problem(FILE, folder / name, error.what)


def _check_yml(folder: Path, config: ModelConfig, scan: bool, report: Report) -> None:
    """Report the parameters for MaxText that say something else than the source's config; others are the user's."""
    expected = {
        YML_NAME: {"base_config": "base.yml", "model_name": MODEL_NAME, "scan_layers": scan},
        f"models/{MODEL_NAME}.yml": _model_parameters(config),
    }
    for name, values in expected.items():
        path = folder / name
        try:
            lines = read_whole(path, MAX_YML_BYTES).decode(errors="replace").splitlines()
        except (FileFormatError, InputMissingError) as error:
            report.problem(FILE, path, error.what)
            continue
        found = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))
        for key, value in values.items():
            report.keys += 1
            if _value(found.get(key)) != value:
                got = found.get(key, "no such key")
                report.problem(KEY, path, f"key {key}: expected {json.dumps(value)}, got {got:.200}")


def _value(text: str | None) -> object:
    """Return the value of a line of YAML: what JSON also writes as that value, any other text as it stands."""
    if text is None:
        return ABSENT
    try:
        return parse_json(text.encode(), YML_NAME, hint=None)
    except ConfigError:
        return text


def _model_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return what MaxText has to be told of a model."""
    yarn = config.yarn
    return {
        "decoder_block": "deepseek4",
        "attention_type": "compressed",
        "use_indexer": True,
        "routed_bias": True,
        "mlp_activations": ["silu", "linear"],
        "logits_via_embedding": False,
        "rope_type": "default",
        "vocab_size": config.vocab_size,
        "base_emb_dim": config.hidden_size,
        "mhc_expansion_rate": config.hc_mult,
        "base_num_decoder_layers": config.num_hidden_layers,
        "first_num_hash_layers": config.num_hash_layers,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": 1,
        "head_dim": config.head_dim,
        "q_lora_rank": config.q_lora_rank,
        "o_lora_rank": config.o_lora_rank,
        "o_groups": config.o_groups,
        "sliding_window_size": config.sliding_window,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "indexer_n_heads": config.index_n_heads,
        "indexer_head_dim": config.index_head_dim,
        "indexer_topk": config.index_topk,
        "num_experts": config.n_routed_experts,
        **dict.fromkeys(("base_mlp_dim", "base_moe_mlp_dim"), config.moe_intermediate_size),
        "num_experts_per_tok": config.num_experts_per_tok,
        "shared_experts": config.n_shared_experts,
        "routed_score_func": config.scoring_func,
        "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.norm_topk_prob,
        "mlp_activations_limit": config.swiglu_limit,
        "normalization_layer_epsilon": config.rms_norm_eps,
        "sinkhorn_iterations": config.hc_sinkhorn_iters,
        "rope_max_timescale": config.rope_theta,
        "compressed_rope_max_timescale": config.compress_rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        **({} if yarn is None else {"original_max_position_embeddings": yarn.original_max_position_embeddings}),
        "compress_ratios": list(config.compress_ratios[: config.num_hidden_layers]),
    }
