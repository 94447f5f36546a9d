"""``requantize``: a folder in BF16, F16 or F32 back to the official layout, with FP8 and FP4 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.weights import FLOAT_ENCODINGS, FP4_BLOCK, PACKED_ENCODINGS, Weight
from ..containers.folder_names import CONFIG_NAME
from ..errors import UnsupportedError
from ..model.config import Version
from ..model.config_v41 import TEXT
from ..model.tensors import Store, scale_name
from ..plan import OutputFile, OutputTensor, Plan
from .claims import Claims
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import KEEP, open_with_draft_option
from .fp8_segments import FP8_BLOCKS, float_to_fp4_segments, float_to_fp8_segments
from .hf_folder import (
    DEFAULT_MAX_FILE_BYTES,
    DTYPE_KEYS,
    EXPERT_DTYPE_KEY,
    SAFETENSORS_DTYPE,
    hf_files,
    json_file,
    stored_tensors,
)
from .safetensors_files import unplaced_tensor
from .segments import BF16, DEQUANTIZE_FIRST, F32, check_stored, convert_segments

REQUANTIZE = "requantize"

# Rows and columns of an n-gram table that share a scale.
TABLE_BLOCK = (1, FP4_BLOCK)
# What the published folders hold in no quantised type.
PLAIN = {Store.BF16: BF16, Store.F32: F32}


def plan_requantize(
    source: Path,
    out: Path,
    *,
    draft: str = KEEP,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``requantize``: the folder ``out`` with the floats of ``source`` in the published types and names.

    Weights that are FP8 or FP4 already stay as they are.

    Raises:
        UsageError: an unknown ``draft``, or folders that overlap.
        UnsupportedError: nothing is left to quantise.
        Dsv4Error: whatever is wrong with the source.
    """
    checkpoint, config, left_out = open_with_draft_option(source, draft, strict=strict, index=index)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    # Of NVFP4 and compressed-tensors' forms, those that are FP4 get their published form.
    if not checkpoint.is_packed and not any(map(_is_quantised_here, checkpoint.weights.values())):
        raise UnsupportedError(
            "nothing to quantise: no weight that is published as FP8 or FP4 is in BF16, F16 or F32",
            where=source,
            hint="use repack or dequantize for other types",
        )
    claims = Claims(checkpoint)
    decoded = sum(map(_is_decoded_first, checkpoint.weights.values()))
    rounded = f"{decoded} experts' weights are rounded to FP4: every element that changes is counted"
    tensors = [tensor for weight in checkpoint.weights.values() for tensor in _tensors(claims.take(weight), checkpoint)]
    files = (*hf_files(tensors, max_file_bytes), requantized_config(checkpoint, config), *auxiliary_files(source))
    options = {"draft": draft, "max_file_bytes": max_file_bytes}
    notes = [rounded] if decoded else []
    return folder_plan(REQUANTIZE, checkpoint, out, files, (*claims.close(), *left_out), options, notes)


def _is_quantised_here(weight: Weight) -> bool:
    if _is_decoded_first(weight):
        return True
    return weight.encoding in FLOAT_ENCODINGS and weight.row.store in (Store.DENSE, Store.EXPERT, Store.ENGRAM)


def _is_decoded_first(weight: Weight) -> bool:
    """Return whether a weight is an expert in NVFP4 that is no FP4, or in INT4."""
    return weight.row.store is Store.EXPERT and weight.encoding in PACKED_ENCODINGS


def _tensors(weight: Weight, checkpoint: Checkpoint) -> list[OutputTensor]:
    """Return the tensors of a weight as the published folders store it: codes and scales, or floats."""
    if weight.encoding not in FLOAT_ENCODINGS and not _is_decoded_first(weight):
        check_stored([weight], "the published layout", DEQUANTIZE_FIRST)
        return stored_tensors(weight)
    name, store = weight.name, weight.row.store
    if store in PLAIN:
        to = PLAIN[store]
        return [unplaced_tensor(name, SAFETENSORS_DTYPE[to.name], weight.shape, convert_segments(weight, to))]
    rows, columns = weight.shape
    if store is Store.EXPERT:
        codes, scales = float_to_fp4_segments(weight)
        return [
            unplaced_tensor(name, "I8", (rows, codes.row_bytes), (codes,)),
            unplaced_tensor(scale_name(name), "F8_E8M0", (rows, scales.row_bytes), (scales,)),
        ]
    side = FP8_BLOCKS[checkpoint.config.version]
    block = TABLE_BLOCK if store is Store.ENGRAM else (side, side)
    of_codes, of_scales = float_to_fp8_segments(weight, block)
    scale_shape = (-(-rows // block[0]), -(-columns // block[1]))
    return [
        unplaced_tensor(name, "F8_E4M3", weight.shape, of_codes),
        unplaced_tensor(scale_name(name), "F8_E8M0", scale_shape, of_scales),
    ]


def requantized_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> OutputFile:
    """Return config.json with what the published ones say of their types."""
    version = checkpoint.config.version
    side = FP8_BLOCKS[version]
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [side, side],
    }
    if version is Version.V4:
        quantization["fmt"] = "e4m3"
    kept = {key: value for key, value in config.items() if key not in DTYPE_KEYS}
    if TEXT in config:  # V4.1 says the experts' type in one place
        quantization[EXPERT_DTYPE_KEY] = "fp4"
    else:
        kept[EXPERT_DTYPE_KEY] = "fp4"
    dtypes = {key: "bfloat16" for key in DTYPE_KEYS if key in config}
    return json_file(CONFIG_NAME, {**kept, **dtypes, "quantization_config": quantization})
