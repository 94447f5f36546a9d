"""The key-values that a GGUF must have, worked out from the source anew, and held against those it has.

Names and special tokens come from gguf's own readers of model cards and vocabularies, which llama.cpp's
converter uses as well; what follows from config.json is a table.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import resources
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.engram import read_token_map
from ..checkpoint.image_processor import read_image_normalisation
from ..checkpoint.model_card import read_model_card
from ..checkpoint.tokenizer import MAX_TOKENIZER_BYTES, load_tokenizer, recognise_pre
from ..containers.folder_names import CONFIG_NAME
from ..containers.gguf import GgufModelFile
from ..containers.imatrix import Imatrix
from ..containers.json_object import read_json_object, read_optional_json_object
from ..containers.presence import exists
from ..errors import TokenizerError
from ..model.config import CHAT_TEMPLATES, ModelConfig, Version, load_config
from .gguf_output import CLIP, DFLASH, LLAMA_CPP, LLAMA_CPP_V41, MTP, PORT, GgufContent, is_ds4_v41
from .low_bit import LOW_BIT
from .numbers import BLOCK
from .report import KEY, Report


class Expected(NamedTuple):
    """The type and value that a key must have, whether it may be absent, and whether its value is our choice."""

    type: str
    value: Any
    optional: bool = False
    ours: bool = False


# Key below the architecture's name, its type, its value; what another dialect calls it is in PORT_NAMES.
CONFIG_KEYS: tuple[tuple[str, str, Callable[[ModelConfig], Any]], ...] = (
    ("context_length", "u32", lambda c: c.max_position_embeddings),
    ("embedding_length", "u32", lambda c: c.hidden_size),
    ("embedding_length_out", "u32", lambda c: c.hidden_size * c.hc_mult),
    ("vocab_size", "u32", lambda c: c.vocab_size),
    ("attention.head_count", "u32", lambda c: c.num_attention_heads),
    ("attention.head_count_kv", "u32", lambda c: 1),
    ("attention.key_length", "u32", lambda c: c.head_dim),
    ("attention.value_length", "u32", lambda c: c.head_dim),
    ("attention.q_lora_rank", "u32", lambda c: c.q_lora_rank),
    ("attention.output_lora_rank", "u32", lambda c: c.o_lora_rank),
    ("attention.output_group_count", "u32", lambda c: c.o_groups),
    ("attention.sliding_window", "u32", lambda c: c.sliding_window),
    ("attention.layer_norm_rms_epsilon", "f32", lambda c: c.rms_norm_eps),
    ("attention.compress_ratios", "[i32]", lambda c: list(c.compress_ratios)),
    ("attention.compress_rope_freq_base", "f32", lambda c: c.compress_rope_theta),
    ("attention.indexer.head_count", "u32", lambda c: c.index_n_heads),
    ("attention.indexer.key_length", "u32", lambda c: c.index_head_dim),
    ("attention.indexer.top_k", "u32", lambda c: c.index_topk),
    ("rope.dimension_count", "u32", lambda c: c.qk_rope_head_dim),
    ("rope.freq_base", "f32", lambda c: c.rope_theta),
    ("expert_count", "u32", lambda c: c.n_routed_experts),
    ("expert_used_count", "u32", lambda c: c.num_experts_per_tok),
    ("expert_shared_count", "u32", lambda c: c.n_shared_experts),
    ("expert_feed_forward_length", "u32", lambda c: c.moe_intermediate_size),
    ("expert_gating_func", "u32", lambda c: {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}[c.scoring_func]),
    ("expert_weights_scale", "f32", lambda c: c.routed_scaling_factor),
    ("expert_weights_norm", "bool", lambda c: c.norm_topk_prob),
    ("hash_layer_count", "u32", lambda c: c.num_hash_layers),
    ("hyper_connection.count", "u32", lambda c: c.hc_mult),
    ("hyper_connection.sinkhorn_iterations", "u32", lambda c: c.hc_sinkhorn_iters),
    ("hyper_connection.epsilon", "f32", lambda c: c.hc_eps),
)
YARN_KEYS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("rope.scaling.type", "str", lambda y: "yarn"),
    ("rope.scaling.factor", "f32", lambda y: y.factor),
    ("rope.scaling.original_context_length", "u32", lambda y: y.original_max_position_embeddings),
    ("rope.scaling.yarn_beta_fast", "f32", lambda y: y.beta_fast),
    ("rope.scaling.yarn_beta_slow", "f32", lambda y: y.beta_slow),
)
# Of V4.1 in dialect ds4: where tensors begin, keys of config.json that are no keys of the file, those that are floats
# however they are spelled, and the types of the n-gram tables' constants.
DS4_V41_ALIGNMENT = 16384
DS4_V41_LEFT_OUT = ("model_type", "dtype", "torch_dtype")
DS4_V41_FLOATS = frozenset(
    {
        "attention_dropout", "compress_rope_theta", "hc_eps", "initializer_range", "rms_norm_eps",
        "rope_scaling.beta_fast", "rope_scaling.beta_slow", "rope_scaling.factor", "rope_theta",
        "routed_scaling_factor", "swiglu_limit",
    }
)  # fmt: skip
DS4_V41_TABLES = {
    "encoding": "str",
    "layer_ids": "[u32]",
    "pad_id": "u32",
    "token_map": "[u32]",
    "primes": "[u32]",
    "multipliers": "[u64]",
}
PORT_NAMES = {
    "attention.output_lora_rank": "o_lora_rank",
    "attention.output_group_count": "o_groups",
    "attention.compress_ratios": "compress_ratios",
    "attention.compress_rope_freq_base": "compress_rope_freq_base",
    "hyper_connection.count": "hyperconnections.count",
    "hyper_connection.sinkhorn_iterations": "hyperconnections.sinkhorn_iterations",
    "hyper_connection.epsilon": "hyperconnections.epsilon",
    "hash_layer_count": "n_hash_layers",
}

# What a draft's file does not say, and what only it says.
NOT_IN_DRAFTS = ("embedding_length_out", "vocab_size")
DRAFT_KEYS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Any]], ...] = (
    ("block_size", "u32", lambda raw: raw.get("dspark_block_size")),
)
# The vision tower's keys below "clip.", from config.json.
TOWER_KEYS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Any]], ...] = (
    ("has_vision_encoder", "bool", lambda raw: True),
    ("use_silu", "bool", lambda raw: True),
    ("vision.projection_dim", "u32", lambda raw: raw["hidden_size"]),
    ("vision.image_size", "u32", lambda raw: 16 * raw["vision_patch_size"] * raw["vision_downsample_ratio"]),
    ("vision.patch_size", "u32", lambda raw: raw["vision_patch_size"]),
    ("vision.embedding_length", "u32", lambda raw: raw["vision_dim"]),
    ("vision.feed_forward_length", "u32", lambda raw: raw["vision_inter_dim"]),
    ("vision.block_count", "u32", lambda raw: raw["vision_n_layers"]),
    ("vision.attention.head_count", "u32", lambda raw: raw["vision_n_heads"]),
    ("vision.attention.layer_norm_epsilon", "f32", lambda raw: 1e-6),
    ("vision.projector.scale_factor", "u32", lambda raw: raw["vision_downsample_ratio"]),
    ("vision.image_min_pixels", "u32", lambda raw: raw["vision_min_pixels"]),
)
PROJECTORS = {Version.V4: "deepseek4v", Version.V41: "deepseek41v"}
# How pixels are normalised where no processor's file says otherwise.
PIXEL_DEFAULTS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# general.file_type by the type of the routed experts.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15,
    "q5_k": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26,
    "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38, "nvfp4": 39,
    "q1_0": 40, "q2_0": 41,
}  # fmt: skip
QUANTIZATION_VERSION = 2

# What is said of the importance matrix of low-bit tensors.
IMATRIX_PREFIX = "quantize.imatrix."
IMATRIX_KEYS = {"file": "str", "dataset": "str", "entries_count": "u32", "chunks_count": "u32"}

SAMPLING = {
    "general.sampling.sequence": ("str", ("sequence",)),
    "general.sampling.top_k": ("i32", ("top_k",)),
    "general.sampling.top_p": ("f32", ("top_p",)),
    "general.sampling.min_p": ("f32", ("min_p",)),
    "general.sampling.xtc_probability": ("f32", ("xtc_probability",)),
    "general.sampling.xtc_threshold": ("f32", ("xtc_threshold",)),
    "general.sampling.temp": ("f32", ("temperature",)),
    "general.sampling.penalty_last_n": ("i32", ("penalty_last_n",)),
    "general.sampling.penalty_repeat": ("f32", ("penalty_repeat", "repetition_penalty")),
    "general.sampling.mirostat": ("i32", ("mirostat",)),
    "general.sampling.mirostat_tau": ("f32", ("mirostat_tau",)),
    "general.sampling.mirostat_eta": ("f32", ("mirostat_eta",)),
}

# What a number of a type can be.
LARGEST = {"i32": 2**31 - 1, "f32": float(np.finfo(np.float32).max)}

CHAT_TEMPLATE = "tokenizer.chat_template"
MAIN_TEMPLATE = "default"

# Characters of a value that a problem shows.
MAX_SHOWN = 80
MASK_TOKEN_KEY = "tokenizer.ggml.mask_token_id"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Keys in which another tool may say what it likes, and those among them that describe the model.
HARMLESS_PREFIXES = ("general.", "quantize.", "tokenizer.chat_template.", "tokenizer.chat_templates")
DESCRIBING = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")


def check_keys(
    model: GgufModelFile, content: GgufContent, source: Path, report: Report, imatrix: Imatrix | None = None
) -> None:
    """Report every key of ``model`` that is missing, unknown, or has another type or value than it must.

    Raises:
        TokenizerError, FileFormatError: the source's own tokenizer or model card is malformed.
    """
    expected = dict(_expected(model, content, source, report))
    expected |= _imatrix_keys(model, imatrix)
    ignored = report.ignored_keys
    for key, want in expected.items():
        if key in ignored or (report.foreign and (want.ours or _is_harmless(key))):
            continue
        report.keys += 1
        if key not in model.metadata:
            if not want.optional:
                report.problem(KEY, key, f"missing, expected {_short(want.value)}")
            continue
        kind, value = model.types[key], model.metadata[key]
        if kind != want.type:
            report.problem(KEY, key, f"expected type {want.type}, got {kind}")
        elif not _equal(kind, want.value, value):
            report.problem(KEY, key, _difference(want.value, value))
    for key in model.metadata:
        known = key in expected or key in ignored or key.startswith("split.")
        if not known and not (report.foreign and _is_harmless(key)):
            report.problem(KEY, key, f"unknown, with the value {_short(model.metadata[key])}")


def _is_harmless(key: str) -> bool:
    """Return whether a key names the model, or says how it was made, and does not change what it computes."""
    return key.startswith(HARMLESS_PREFIXES) and key not in DESCRIBING


def _expected(
    model: GgufModelFile, content: GgufContent, source: Path, report: Report
) -> Iterator[tuple[str, Expected]]:
    architecture = model.architecture or LLAMA_CPP
    yield "general.architecture", Expected("str", architecture)
    yield "general.type", Expected("str", "mmproj" if architecture == CLIP else "model")
    yield "general.quantization_version", Expected("u32", QUANTIZATION_VERSION)
    main = "ffn_down.weight" if architecture == CLIP else "_exps."
    elements: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        if main in name:
            elements[tensor.type] += math.prod(tensor.shape)
    kind = max(elements, key=lambda kind: elements[kind], default="")
    if kind in FILE_TYPES:
        # Another program names the mix of types.
        yield "general.file_type", Expected("u32", FILE_TYPES[kind], ours=kind in LOW_BIT)
    yield from _sampling(source)
    yield from _identity(model, content.config, source)
    if architecture == CLIP:
        yield from _tower_keys(content.config, source, report)
        return
    if is_ds4_v41(model):
        yield from _of_ds4_v41(model, content.config, source, kind)
    else:
        yield from _from_config(content, architecture)
        if architecture == LLAMA_CPP_V41:
            yield from _of_v41(model, content.config, source)
    if architecture == LLAMA_CPP and content.config.has_vision:
        # The port ds4 knows the text model by them, llama.cpp's own dialect has none.
        yield f"{architecture}.checkpoint_variant", Expected("str", "vision-exp", optional=True)
        yield f"{architecture}.vision.sidecar_required", Expected("bool", True, optional=True)
    yield from _vocabulary(source, content.config, report)
    if architecture == DFLASH:
        yield MASK_TOKEN_KEY, Expected("u32", content.config.flat.get("dspark_noise_token_id"))


def _imatrix_keys(model: GgufModelFile, imatrix: Imatrix | None) -> Iterator[tuple[str, Expected]]:
    """Yield what a file says of its importance matrix: without that, it says what it likes, under its own path."""
    if imatrix is not None:
        yield f"{IMATRIX_PREFIX}entries_count", Expected("u32", len(imatrix.entries))
        if imatrix.datasets:
            yield (
                f"{IMATRIX_PREFIX}dataset",
                Expected("str", imatrix.datasets[0].encode()[:127].decode("utf-8", "ignore")),
            )
        if imatrix.chunks > 0:
            yield f"{IMATRIX_PREFIX}chunks_count", Expected("u32", imatrix.chunks)
    unchecked = ("file",) if imatrix is not None else IMATRIX_KEYS
    for name in unchecked:
        key = IMATRIX_PREFIX + name
        if key in model.metadata:
            yield key, Expected(IMATRIX_KEYS[name], model.metadata[key])


def _tower_keys(config: ModelConfig, source: Path, report: Report) -> Iterator[tuple[str, Expected]]:
    for key, kind, value in TOWER_KEYS:
        yield f"{CLIP}.{key}", Expected(kind, value(config.flat))
    yield f"{CLIP}.projector_type", Expected("str", PROJECTORS[config.version])
    stated, notes = read_image_normalisation(source)
    report.notes += notes
    for key, numbers in (PIXEL_DEFAULTS | stated).items():
        yield f"{CLIP}.vision.{key}", Expected("[f32]", numbers)


def _from_config(content: GgufContent, architecture: str) -> Iterator[tuple[str, Expected]]:
    def named(key: str) -> str:
        return f"{architecture}.{PORT_NAMES.get(key, key) if architecture == PORT else key}"

    config = content.config
    yield named("block_count"), Expected("u32", content.block_count)
    for key, kind, value in CONFIG_KEYS:
        if architecture not in (DFLASH, LLAMA_CPP_V41) or key not in NOT_IN_DRAFTS:
            # The embedding's rows say the vocabulary's size as well, and llama.cpp's converter leaves it at that.
            yield named(key), Expected(kind, value(config), optional=key == "vocab_size")
    if architecture == DFLASH:
        for key, kind, draft_value in DRAFT_KEYS:
            yield named(key), Expected(kind, draft_value(config.flat))
        # V4 names the layers behind those whose outputs it records, V4.1 the layers whose inputs it records.
        behind = config.version is Version.V4
        targets = [layer + behind for layer in config.flat.get("dspark_target_layer_ids", [])]
        yield named("target_layers"), Expected("[i32]", targets)
        if config.version is Version.V41:
            yield named("target_model_architecture"), Expected("str", LLAMA_CPP_V41)
    if config.yarn is not None:
        for key, kind, value in YARN_KEYS:
            yield named(key), Expected(kind, value(config.yarn))
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        yield named(key), Expected("[f32]", [config.swiglu_limit] * content.block_count)
    if content.kind == MTP:
        yield named("nextn_predict_layers"), Expected("u32", config.num_nextn_predict_layers)


def _of_v41(model: GgufModelFile, config: ModelConfig, source: Path) -> Iterator[tuple[str, Expected]]:
    """Yield the roles of layers, and what finds the rows of the n-gram tables, worked out anew from the definition."""

    def named(key: str) -> str:
        return f"{LLAMA_CPP_V41}.{key}"

    yield named("attention.kv_source_layers"), Expected("[i32]", list(config.kv_source_layer_ids))
    yield named("attention.index_source_layers"), Expected("[i32]", list(config.index_source_layer_ids))
    if config.candidates is not None:
        for key, value in (
            ("source_layer", config.candidates.source_layer_id),
            ("topk_blocks", config.candidates.topk_blocks),
            ("block_size", config.candidates.block_size),
        ):
            yield named(f"attention.indexer.candidate_{key}"), Expected("u32", value)
    engram, whole = config.engram, load_config(source).engram
    if engram is None or whole is None:
        return
    # The layers of a slice were others of the whole model, whose numbers the constants hang on: told by their rows.
    kept = [whole.num_embeddings.index(rows) for rows in engram.num_embeddings]
    columns = whole.rows_per_token
    runs = list(islice(_primes_from(whole.vocab_size), columns * len(whole.layer_ids)))
    primes = [runs[at * columns : (at + 1) * columns] for at in kept]
    factors = [
        np.random.default_rng(10007 * whole.layer_ids[at]).integers(
            0, max(1, (2**63 - 1) // whole.compressed_vocab_size // 2), whole.max_ngram_size, np.int64
        )
        for at in kept
    ]
    token_map = read_token_map(source, config.vocab_size)
    yield named("engram.head_count"), Expected("u32", whole.n_heads)
    yield named("engram.key_length"), Expected("u32", whole.head_dim)
    yield named("engram.max_ngram_size"), Expected("u32", whole.max_ngram_size)
    yield named("engram.layer_ids"), Expected("[i32]", list(engram.layer_ids))
    yield named("engram.multipliers"), Expected("[u64]", [2 * int(draw) + 1 for row in factors for draw in row])
    yield named("engram.primes"), Expected("[u64]", [prime for run in primes for prime in run])
    yield named("engram.offsets"), Expected("[u64]", [sum(run[:at]) for run in primes for at in range(columns)])
    yield named("engram.token_map"), Expected("[i32]", token_map.tolist())
    yield named("engram.pad_id"), Expected("u32", int(token_map[whole.pad_token_id]))
    table = model.tensors.get(f"blk.{engram.layer_ids[0]}.engram_embd.weight")
    if table is not None and table.type == "i8":
        width = whole.head_dim + whole.head_dim // BLOCK
        split = any("engram_embd_scale." in name for name in model.tensors)
        layout = "split" if split else f"row{width}"
        yield named("engram.encoding"), Expected("str", f"e4m3_e8m0_{BLOCK}_{layout}")


def _of_ds4_v41(
    model: GgufModelFile, config: ModelConfig, source: Path, experts: str
) -> Iterator[tuple[str, Expected]]:
    """Yield V4.1's keys of dialect ds4: config.json's text model as it is, and the tables' constants in its types."""
    prefix = f"{LLAMA_CPP_V41}."
    yield "general.alignment", Expected("u32", DS4_V41_ALIGNMENT)
    yield "general.source.revision", Expected("str", "unknown", ours=True)
    text = dict(config.raw["text_config"])
    text |= {"num_nextn_predict_layers": 0, "num_hidden_layers": config.num_hidden_layers}
    text["compress_ratios"] = list(config.compress_ratios[: config.num_hidden_layers])
    text["kv_source_layer_ids"] = list(config.kv_source_layer_ids)
    text["index_source_layer_ids"] = list(config.index_source_layer_ids)
    text["candidate_source_layer_id"] = None if config.candidates is None else config.candidates.source_layer_id
    flat = {name: value for name, value in text.items() if not isinstance(value, Mapping)}
    for name, value in text.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": number for inner, number in value.items()}
    for name, value in flat.items():
        left_out = name.startswith(("engram_", "dspark_")) or name.rpartition(".")[2] in DS4_V41_LEFT_OUT
        if value is None or left_out:
            continue
        plain = {bool: "bool", list: "[u32]", str: "str", float: "f32"}.get(type(value), "u32")
        yield prefix + name, Expected("f32" if name in DS4_V41_FLOATS else plain, value)
    yield f"{prefix}config", Expected("str", json.dumps(config.raw, ensure_ascii=False))
    yield f"{prefix}quantization", Expected("str", f"routed experts {experts}", ours=True)
    calibration = model.metadata.get(f"{prefix}calibration")  # free text: how low-bit types were weighed
    yield f"{prefix}calibration", Expected("str", calibration if isinstance(calibration, str) else "", ours=True)
    if config.engram is None:
        return
    here = {name.removeprefix(prefix): want.value for name, want in _of_v41(model, config, source)}
    for name, kind in DS4_V41_TABLES.items():
        yield f"{prefix}engram.{name}", Expected(kind, here[f"engram.{name}"])
    yield f"{prefix}engram.rows", Expected("[u32]", list(config.engram.num_embeddings))
    yield f"{prefix}engram.compressed_vocab_size", Expected("u32", config.engram.compressed_vocab_size)


def _primes_from(start: int) -> Iterator[int]:
    """Yield the primes from ``start`` on, by a sieve of one stretch after the other."""
    stretch = 4096
    while True:
        composite = np.zeros(stretch, np.bool_)
        for factor in range(2, math.isqrt(start + stretch) + 1):
            first = max(factor * factor, -(-start // factor) * factor)
            composite[first - start :: factor] = True
        yield from (start + int(at) for at in np.flatnonzero(~composite) if start + at > 1)
        start += stretch


def _sampling(source: Path) -> Iterator[tuple[str, Expected]]:
    generation = read_model_card(source).generation
    for key, (kind, names) in SAMPLING.items():
        values = [generation[name] for name in names if name in generation]
        usable = [value for value in values if _fits(kind, value)]
        if usable:
            yield key, Expected(kind, int(usable[0]) if kind == "i32" else usable[0])


def _fits(kind: str, value: object) -> bool:
    """Return whether a key of type ``kind`` can hold a value of generation_config.json."""
    if kind == "str" or isinstance(value, bool):
        return isinstance(value, str)
    return isinstance(value, (int, float)) and abs(value) <= LARGEST[kind]


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Keep gguf's readers from logging what is no concern of the user."""
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


GGUF_TYPES = {4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "str", 9: "[]", 10: "u64"}


def _recorded(writer: Any) -> Iterator[tuple[str, Expected]]:
    """Yield what was given to a gguf.GGUFWriter that writes nothing."""
    for key, entry in writer.kv_data[0].items():
        if key == "general.architecture":
            continue
        kind = GGUF_TYPES[int(entry.type)]
        value = entry.value
        if kind == "[]":
            value = list(value)
            kind = "[str]" if all(isinstance(item, str) for item in value) else "[i32]"
        yield key, Expected(kind, str(value) if kind == "str" else value)


def _identity(model: GgufModelFile, config: ModelConfig, source: Path) -> Iterator[tuple[str, Expected]]:
    """Yield the keys that say what the model is called, by and from whom: from model card and folder name."""
    import gguf

    total = shared = expert = 0
    stacks: list[int] = []
    for name, tensor in model.tensors.items():
        elements = math.prod(tensor.shape)
        total += elements
        if "_exps." in name and len(tensor.shape) > 2:
            expert += elements // tensor.shape[0]
            stacks.append(tensor.shape[0])
        else:
            shared += elements
    card = read_model_card(source)
    with _quiet_gguf():
        about = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(), deepcopy(dict(card.front_matter)), dict(config.raw), PurePath(card.folder_name), total
        )
        if about.name is None:
            about.name = card.folder_name
        if about.size_label is None and total:
            about.size_label = gguf.size_label(total, shared, expert, sum(stacks) // len(stacks) if stacks else 0)
        writer = gguf.GGUFWriter(None, LLAMA_CPP)
        about.set_gguf_meta_model(writer)
    # What generation_config.json says is read by ``_sampling``, which asks whether it is a number.
    yield from ((key, value) for key, value in _recorded(writer) if key not in SAMPLING)


def _vocabulary(source: Path, config: ModelConfig, report: Report) -> Iterator[tuple[str, Expected]]:
    """Yield the tokenizer's keys: tokens from the file itself, merges and special tokens as gguf reads them."""
    import gguf

    path, vocab_size, version = source / "tokenizer.json", config.vocab_size, config.version
    tokenizer = load_tokenizer(source, vocab_size, "given")  # malformed files end here
    report.notes += tokenizer.notes
    templates = tokenizer.chat_templates
    document = read_json_object(path, MAX_TOKENIZER_BYTES, error=TokenizerError)
    yield "tokenizer.ggml.model", Expected("str", "gpt2")
    try:
        yield "tokenizer.ggml.pre", Expected("str", recognise_pre(document, path))
    except TokenizerError:
        report.notes.append("tokenizer.ggml.pre: the source's pre-tokenizer is not a known one, not compared")
        report.ignored_keys.append("tokenizer.ggml.pre")
    tokens, types = _tokens(document, source, vocab_size)
    yield "tokenizer.ggml.tokens", Expected("[str]", tokens)
    yield "tokenizer.ggml.token_type", Expected("[i32]", types)
    with _quiet_gguf():
        try:
            special = _special_vocab(document, source, vocab_size)
            # The package does not know yet what llama.cpp's own copy of it does: a ByteLevel post-processor
            # adds nothing, whatever tokenizer_config.json says.
            kinds = _processors(document.get("post_processor"))
            if "ByteLevel" in kinds and not kinds & {"TemplateProcessing", "RobertaProcessing"}:
                special.add_special_token |= {"bos": False, "eos": False}
            writer = gguf.GGUFWriter(None, LLAMA_CPP)
            special.add_to_gguf(writer, quiet=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise TokenizerError(f"not readable by the gguf package ({reason})"[:300], where=path) from None
    yield from _recorded(writer)
    named = {name: text for name, text in templates.items() if name != MAIN_TEMPLATE}
    for name, text in named.items():
        yield f"{CHAT_TEMPLATE}.{name}", Expected("str", text)
    if named:
        yield f"{CHAT_TEMPLATE}s", Expected("[str]", list(named))
    if MAIN_TEMPLATE in templates:
        yield CHAT_TEMPLATE, Expected("str", templates[MAIN_TEMPLATE])
    else:
        ours = resources.files("dsv4convert.model") / CHAT_TEMPLATES[version]
        yield CHAT_TEMPLATE, Expected("str", ours.read_text(encoding="utf-8"), optional=True, ours=True)


def _special_vocab(document: Mapping[str, Any], source: Path, vocab_size: int) -> Any:
    """Return what gguf reads of the special tokens and merges, of plain JSON and without chat templates."""
    import gguf

    documents = {
        "tokenizer.json": document,
        "tokenizer_config.json": {key: value for key, value in _settings(source).items() if key != "chat_template"},
        CONFIG_NAME: read_optional_json_object(source / CONFIG_NAME),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in documents.items():
            if content or exists(source / name):
                (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        return gguf.SpecialVocab(Path(folder), load_merges=True, n_vocab=vocab_size)


def _settings(source: Path) -> dict[str, Any]:
    path = source / "tokenizer_config.json"
    return read_optional_json_object(path, MAX_TOKENIZER_BYTES, error=TokenizerError)


def _processors(step: Any) -> set[str]:
    """Return the kinds of the post-processor's steps, those of a Sequence apart."""
    if not isinstance(step, dict):
        return set()
    inner = step.get("processors", [step])
    parts = inner if isinstance(inner, list) else []
    return {str(part.get("type")) for part in parts if isinstance(part, dict)}


def _tokens(document: Mapping[str, Any], source: Path, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return tokens and types by id: vocabulary, then added tokens, then padding where there is nothing."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, number in document["model"]["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    special = _texts_called_special(source)
    for added in document.get("added_tokens", []):
        text, number = added["content"], added["id"]
        tokens[number] = text
        if added.get("special") or text in special or _looks_like_control(text):
            types[number] = CONTROL
        else:
            tokens[number], types[number] = text.replace("\u2581", " "), USER_DEFINED
    return tokens, types


def _looks_like_control(text: str) -> bool:
    """llama.cpp's rule for added tokens that should have been marked as special and are not."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    bracketed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return bracketed or (text.startswith("<unused") and text.endswith(">"))


def _texts_called_special(source: Path) -> set[str]:
    settings = _settings(source)
    values = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    more = settings.get("additional_special_tokens", settings.get("extra_special_tokens"))
    values += more if isinstance(more, list) else []
    texts = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {text for text in texts if isinstance(text, str)}


def _equal(kind: str, expected: Any, found: Any) -> bool:
    if kind in ("f32", "[f32]"):
        # By bits: a flipped sign of zero is a difference.
        return np.array(expected, np.float32).tobytes() == np.array(found, np.float32).tobytes()
    return bool(expected == found)


def _difference(expected: Any, found: Any) -> str:
    """Say how two values of one type differ: of arrays and long texts, where."""
    is_long = isinstance(expected, list) or max(len(str(expected)), len(str(found))) > MAX_SHOWN
    if isinstance(expected, (list, str)) and isinstance(found, (list, str)) and is_long:
        if len(expected) != len(found):
            return f"expected {len(expected)} {_unit(expected)}, got {len(found)}"
        where = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), 0)
        return f"[{where}]: expected {_short(expected[where])}, got {_short(found[where])}"
    return f"expected {_short(expected)}, got {_short(found)}"


def _unit(value: Any) -> str:
    return "elements" if isinstance(value, list) else "characters"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
