"""Forms of ModelOpt and compressed-tensors, whose weights are several tensors: one place that all readers ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..containers.safetensors import Stored
from ..containers.wide_scales import as_f32
from ..scale_forms import Pairs
from .int4 import ORDER, SHAPE, ZERO_POINT, packed_as_pairs
from .nvfp4 import (
    CODES,
    E4M3,
    GLOBAL_SCALE,
    INPUT_GLOBAL_SCALE,
    INPUT_SCALE,
    SCALE,
    SECOND_SCALE,
    WEIGHT,
    nvfp4_as_pairs,
)
from .weights import Encoding, Weight

COMPRESSED_TENSORS = "compressed-tensors"
INPUT_SCALES = (INPUT_SCALE, INPUT_GLOBAL_SCALE)

# By which errors about weights in these forms can be told.
SUFFIXES = (SCALE, SECOND_SCALE, GLOBAL_SCALE, CODES, SHAPE, ZERO_POINT, ORDER)

AS_FP4 = (
    "NVFP4 weights are read as the FP4 that they were made of: the same codes, and pairs of scales as one E8M0 scale"
)
AS_NVFP4 = (
    "NVFP4 weights whose pairs of scales are no E8M0 scales are read as they are, each scale times the second one"
)
AS_INT4 = "packed integers of four bits are read with their scales, and zero points where there are any"

# What ModelOpt's configs add to quantization_config for NVFP4 experts.
CONFIG_KEYS = (
    "moe_quant_algo",
    "producer",
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "config_groups",
    "quantized_layers",
    "exclude_modules",
    "ignore",
)


def is_packed(names: Iterable[str]) -> bool:
    """Return whether a folder with such tensors holds one of these forms."""
    return any(name.endswith((SECOND_SCALE, CODES)) for name in names)


def unpacked_forms(stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Return the tensors of a folder with its packed weights as ``.weight``, ``.scale`` and, of INT4, ``.zero``.

    Scales of FP8 that compressed-tensors keeps in BF16 or F16 are float32: no E8M0 scales, as they are elsewhere.

    Raises:
        InventoryError, UnsupportedError: a weight that is not whole or misshapen (see ``nvfp4_as_pairs``).
        InputMissingError, FileFormatError: a scalar cannot be read.
    """
    if not is_packed(stored):
        return stored
    made = packed_as_pairs(nvfp4_as_pairs(stored))
    if any(name.endswith(CODES) for name in stored):
        for name, tensor in made.items():
            weight = made.get(name.removesuffix(SCALE) + WEIGHT) if name.endswith(SCALE) else None
            if weight is not None and weight.dtype == E4M3 and tensor.dtype in ("BF16", "F16"):
                made[name] = as_f32(tensor)
    return made


def forms_of(weights: Iterable[Weight]) -> tuple[str, ...]:
    """Return notes on how weights in these forms are read."""
    notes: dict[str, None] = {}
    for weight in weights:
        if weight.encoding is Encoding.NVFP4:
            notes[AS_NVFP4] = None
        elif weight.encoding is Encoding.INT4:
            notes[AS_INT4] = None
        elif weight.scale is not None and isinstance(weight.scale.scale_form, Pairs):
            notes[AS_FP4] = None
    return tuple(notes)


def config_without_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what ModelOpt adds to it for NVFP4 experts, and what compressed-tensors says."""
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return dict(raw)
    if quantization.get("quant_method") == COMPRESSED_TENSORS:
        return {key: value for key, value in raw.items() if key != "quantization_config"}
    return {**raw, "quantization_config": {k: v for k, v in quantization.items() if k not in CONFIG_KEYS}}
