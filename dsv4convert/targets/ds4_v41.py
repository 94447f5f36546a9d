"""The V4.1 file of the port DwarfStar (``--dialect ds4``): its names of three tensors, its keys; types are in ``ds4``.

Written after descriptions of its files; the port itself reads other sizes than the published one's not at all, so that
no small file of ours was read by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType

from ..containers.gguf_write import ARRAY, BOOL, F32, STRING, U32, U64, KeyValue
from ..errors import UnsupportedError
from ..model.config import ModelConfig
from ..model.config_v41 import TEXT
from ..model.engram import EngramConstants
from ..model.gguf_keys import LLAMA_CPP_V41

ARCHITECTURE = LLAMA_CPP_V41  # as llama.cpp, with other keys
ALIGNMENT = 16384

# Names of the llama.cpp layout that are others here.
NAMES = {
    "engram_q.weight": "engram_q_norm.weight",
    "engram_k.weight": "engram_k_norm.weight",
    "engram_wkv.weight": "engram_kv.weight",
}
# Keys of the text model that are floats, however config.json spells them.
FLOAT_KEYS = frozenset((
    "attention_dropout", "compress_rope_theta", "hc_eps", "initializer_range", "rms_norm_eps", "rope_scaling.beta_fast",
    "rope_scaling.beta_slow", "rope_scaling.factor", "rope_theta", "routed_scaling_factor", "swiglu_limit",
))  # fmt: skip
# The types of all other values; numbers that are not listed are whole.
PLAIN_TYPES = {bool: BOOL, list: ARRAY, str: STRING, float: F32}
LEFT_OUT = ("model_type", "dtype", "torch_dtype")


def ds4_keys(
    config: ModelConfig, constants: EngramConstants | None, encoding: str | None, experts: str, calibration: str
) -> list[KeyValue]:
    """Return the architecture's key-values: the text model's config under its own names, and the tables' constants.

    ``experts`` is the type of the routed experts, ``encoding`` the name of the tables' bytes, ``calibration`` what
    low-bit types were weighed by.

    Raises:
        UnsupportedError: the config does not lie in the published, nested form.
    """
    if TEXT not in config.raw:
        raise UnsupportedError("--dialect ds4: needs config.json in its published form", expected=f"an object {TEXT}")
    text = {key: value for key, value in config.raw[TEXT].items() if not key.startswith(("engram_", "dspark_"))}
    text |= {
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "compress_ratios": list(config.compress_ratios[: config.num_hidden_layers]),
        "kv_source_layer_ids": list(config.kv_source_layer_ids),
        "index_source_layer_ids": list(config.index_source_layer_ids),
        "candidate_source_layer_id": None if config.candidates is None else config.candidates.source_layer_id,
    }
    entries = list(_entries(text, ""))
    entries += [
        ("config", STRING, json.dumps(config.raw, ensure_ascii=False), None),
        ("quantization", STRING, f"routed experts {experts}", None),
        ("calibration", STRING, calibration, None),
    ]
    engram = config.engram
    if engram is not None and constants is not None:
        entries += [
            ("engram.encoding", STRING, encoding, None),
            ("engram.layer_ids", ARRAY, list(constants.layer_ids), U32),
            ("engram.rows", ARRAY, list(constants.rows), U32),
            ("engram.compressed_vocab_size", U32, engram.compressed_vocab_size, None),
            ("engram.pad_id", U32, constants.pad_id, None),
            ("engram.token_map", ARRAY, constants.token_map.tolist(), U32),
            ("engram.primes", ARRAY, [prime for row in constants.primes for prime in row], U32),
            ("engram.multipliers", ARRAY, [factor for row in constants.multipliers for factor in row], U64),
        ]
    keys = [KeyValue(f"{ARCHITECTURE}.{key}", kind, value, sub) for key, kind, value, sub in entries]
    return [
        KeyValue("general.alignment", U32, ALIGNMENT),
        KeyValue("general.source.revision", STRING, "unknown"),
        *keys,
    ]


Entry = tuple[str, GGUFValueType, Any, GGUFValueType | None]


def _entries(values: Mapping[str, Any], prefix: str) -> list[Entry]:
    """Return the entries of a config's object: numbers, texts and lists of whole numbers; objects by dotted names."""
    entries: list[Entry] = []
    for key, value in values.items():
        name = prefix + key
        if key in LEFT_OUT or value is None:
            continue
        if isinstance(value, Mapping):
            entries += _entries(value, f"{name}.")
        else:
            kind = PLAIN_TYPES.get(type(value), F32 if name in FLOAT_KEYS else U32)
            entries.append((name, kind, value, U32 if kind == ARRAY else None))
    return entries
