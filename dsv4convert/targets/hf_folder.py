"""The Hugging Face layout: folders without scales, in BF16, F16 or F32, and folders with FP8 experts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Encoding, Weight
from ..containers.folder_names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, file_names
from ..containers.safetensors import Stored
from ..containers.safetensors_write import PYTORCH_METADATA
from ..errors import InventoryError, some
from ..model.config_v41 import TEXT
from ..model.tensors import MODEL_PREFIX, Store, When, scale_name
from ..plan import Dropped, OutputFile, OutputTensor
from .claims import Claims
from .fp8_segments import FP8_BLOCKS, fp4_to_fp8_segments, fp8_scale_shape
from .output_config import QUANTIZATION_KEYS, VISION_KEY_PREFIX
from .safetensors_files import safetensors_file, safetensors_index, unplaced_tensor, whole_file
from .segments import BF16, F16, F32, I32, I64, ElementType, copy_segments, stack_segments

DTYPES = {t.name: t for t in (BF16, F16, F32)}
NAMES = ("official", "transformers")

# The names that config.json and safetensors have for an element type.
CONFIG_DTYPE = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
SAFETENSORS_DTYPE = {"bf16": "BF16", "f16": "F16", "f32": "F32", "i32": "I32", "i64": "I64"}

# What stays as it is whatever the output's dtype: hyper-connections, sinks, biases and routing tables.
UNTOUCHED = {Encoding.F32: F32, Encoding.I64: I64, Encoding.I32: I32}

DEFAULT_MAX_FILE_BYTES = 5 * 10**9

# Upper bounds of what a safetensors header takes, and what a tensor's entry takes in it besides its name.
HEADER_BYTES = 128
HEADER_ENTRY_BYTES = 160

EXPERT_DTYPE_KEY = "expert_dtype"
DTYPE_KEYS = ("torch_dtype", "dtype")  # what transformers called it up to 4.55, and since

# Why transformers' names leave tensors out.
NO_MODULE = "transformers' DeepseekV4 has no such module"

# How many kinds of tensors a summary names of those that were left out.
MAX_NAMED = 4


def dequantized_tensors(
    checkpoint: Checkpoint, dtype: str, names: str
) -> tuple[list[OutputTensor], tuple[Dropped, ...], tuple[str, ...]]:
    """Return the tensors of ``checkpoint`` without scales, what they leave out, and notes.

    ``dtype`` (bf16, f16, f32) is that of all weights but F32 and integer ones, which stay as they are.
    ``names`` is official, or transformers with the experts of a layer stacked.

    Raises:
        InventoryError: experts of one stack that differ in their dtype.
    """
    to = DTYPES[dtype]
    claims = Claims(checkpoint)
    if names == "official":
        tensors = [_dequantized(weight.name, [claims.take(weight)], to) for weight in checkpoint.weights.values()]
        return tensors, claims.close(), ()
    groups: dict[str, list[Weight]] = {}
    nameless: list[Weight] = []
    for weight in checkpoint.weights.values():
        name = transformers_name(weight)
        if name is None:
            nameless.append(weight)
        else:
            groups.setdefault(name, []).append(claims.take(weight))
    claims.drop(kinds_of(nameless), NO_MODULE, nameless)
    note = ("mtp.* keeps its official names: transformers has no draft and skips these names",)
    tensors = [_dequantized(name, groups.pop(name), to) for name in list(groups)]
    return tensors, claims.close(), note if checkpoint.n_draft else ()


def kinds_of(weights: Iterable[Weight]) -> str:
    """Return which kinds of tensors there are, for a summary."""
    return some(list(dict.fromkeys(weight.row.name for weight in weights)), MAX_NAMED)


def transformers_name(weight: Weight) -> str | None:
    """Return the module path of a weight in transformers, None where it has none.

    Draft layers have none either, but transformers skips whatever is called ``mtp.*``, so they can stay; what
    only a vision model has goes from them too.
    """
    if weight.is_draft:
        return None if weight.row.when is When.VISION else weight.name
    name = weight.row.transformers
    if name is None or weight.layer is None:
        return name
    return MODEL_PREFIX + weight.prefix + name


def _dequantized(name: str, group: Sequence[Weight], to: ElementType) -> OutputTensor:
    """Return one weight, or the experts of a layer stacked: [E, out, in], each w1 above its w3."""
    first = group[0]
    element = UNTOUCHED.get(first.encoding, to)
    for weight in group:
        if UNTOUCHED.get(weight.encoding, to) != element:
            raise InventoryError(
                f"tensor {weight.name}: cannot be stacked with {first.name}, its dtype differs",
                where=weight.stored.file,
                expected=element.name,
                got=UNTOUCHED.get(weight.encoding, to).name,
                hint="use --names official",
            )
    segments = stack_segments(group, element)
    shape = first.shape
    if name != first.name and first.expert is not None:
        experts = len({weight.expert for weight in group})
        shape = (experts, len(group) // experts * shape[0], shape[1])
    return unplaced_tensor(name, SAFETENSORS_DTYPE[element.name], shape, segments)


def repacked_tensors(checkpoint: Checkpoint) -> tuple[list[OutputTensor], tuple[Dropped, ...]]:
    """Return the tensors of ``checkpoint`` with FP4 experts as FP8 in blocks of its version's, all else as it is."""
    claims = Claims(checkpoint)
    side = FP8_BLOCKS[checkpoint.config.version]
    tensors: list[OutputTensor] = []
    for weight in checkpoint.weights.values():
        claims.take(weight)
        if is_fp4_expert(weight):
            tensors += _fp8_pair(weight, side)
            continue
        tensors += stored_tensors(weight)
    return tensors, claims.close()


def stored_tensors(weight: Weight) -> list[OutputTensor]:
    """Return a weight as it is stored, and its scale."""
    tensors = [_verbatim(weight.name, weight.stored)]
    if weight.scale is not None:
        tensors.append(_verbatim(scale_name(weight.name), weight.scale))
    return tensors


def is_fp4_expert(weight: Weight) -> bool:
    """Return whether ``repack`` converts the weight."""
    return weight.row.store is Store.EXPERT and weight.encoding is Encoding.FP4


def _verbatim(name: str, stored: Stored) -> OutputTensor:
    return unplaced_tensor(name, stored.dtype, stored.shape, copy_segments(stored))


def _fp8_pair(weight: Weight, side: int) -> tuple[OutputTensor, OutputTensor]:
    """Return the e4m3 codes and the e8m0 scales of a packed FP4 weight."""
    codes, scales = fp4_to_fp8_segments(weight, side)
    return (
        unplaced_tensor(weight.name, "F8_E4M3", weight.shape, codes),
        unplaced_tensor(scale_name(weight.name), "F8_E8M0", fp8_scale_shape(weight.shape, side), scales),
    )


def hf_files(
    tensors: Sequence[OutputTensor],
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    metadata: Mapping[str, str] = PYTORCH_METADATA,
) -> list[OutputFile]:
    """Return the safetensors files of a folder, numbered and with an index where there is more than one.

    ``metadata`` is what each header says of its maker. A file has at most ``max_file_bytes``, header included; a tensor
    larger than that gets its own file.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = HEADER_BYTES
    for tensor in tensors:
        cost = tensor.nbytes + len(tensor.name) + HEADER_ENTRY_BYTES
        if groups[-1] and size + cost > max_file_bytes:
            groups.append([])
            size = HEADER_BYTES
        groups[-1].append(tensor)
        size += cost
    names = file_names(len(groups))
    files = [safetensors_file(name, group, metadata) for name, group in zip(names, groups, strict=True)]
    return [*files, *index_files(files)]


def index_files(files: Sequence[OutputFile]) -> list[OutputFile]:
    """Return the index of safetensors files, which a single one under its usual name does without."""
    if [file.name for file in files] == [SINGLE_NAME]:
        return []
    return [whole_file(INDEX_NAME, safetensors_index(files))]


def json_file(name: str, document: Mapping[str, Any]) -> OutputFile:
    """Return a file with a JSON document, the way the published folders hold it."""
    return whole_file(name, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def dequantized_config(raw: Mapping[str, Any], dtype: str, names: str) -> OutputFile:
    """Return config.json of a folder without scales; transformers' names leave out what it has no modules for."""
    config = {key: value for key, value in raw.items() if key not in (*QUANTIZATION_KEYS, *DTYPE_KEYS)}
    if names == "transformers":
        config = {key: value for key, value in config.items() if not key.startswith(VISION_KEY_PREFIX)}
    return json_file(CONFIG_NAME, config | dict.fromkeys(DTYPE_KEYS, CONFIG_DTYPE[dtype]))


def repacked_config(raw: Mapping[str, Any]) -> OutputFile:
    """Return config.json of a folder with FP8 experts."""
    # V4.1 says it in one place, V4 at the top level in any case.
    config = dict(raw) if TEXT in raw else {**raw, EXPERT_DTYPE_KEY: "fp8"}
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and EXPERT_DTYPE_KEY in quantization:
        config["quantization_config"] = {**quantization, EXPERT_DTYPE_KEY: "fp8"}
    return json_file(CONFIG_NAME, config)
