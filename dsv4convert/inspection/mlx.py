"""Describing a folder in MLX's layout, as ``mlx`` writes it: the modules of mlx-vlm, whose words have scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from ..checkpoint.folder import FolderHeaders, vision_kind
from ..containers.safetensors import Stored
from ..containers.sources import shown
from ..model.config import ModelConfig
from ..model.mlx_names import mlx_name, mlx_shape
from ..model.tensors import Draft, Expected, expected_tensors, vision_tensors
from .description import Description, EncodingUse
from .folder import describe_config, lenient_config
from .naming import DEPTH_KEYS, EXPERTS, OTHER, WIDTH_KEYS, family_of, layer_of, name_variant

WORD, WORD_BITS = "U32", 32
SCALES, BIASES = "scales", "biases"


def describe_mlx(folder: Path, headers: FolderHeaders) -> Description:
    """Return the description of a folder in MLX's layout, whose headers are read.

    Raises:
        Dsv4Error: its config.json cannot be read.
    """
    found = Description(shown(folder), "MLX folder")
    stored, files, notes = headers
    config = lenient_config(folder, found)
    found.files = len(files)
    found.notes += notes
    if config is None:
        for tensor in stored.values():
            found.count(OTHER, tensor.dtype, tensor.nbytes, None)
        return found
    describe_config(found, config)
    left = dict(stored)
    uses: Counter[EncodingUse] = Counter()
    for name, group in _modules(config, stored).items():
        use = _describe_module(found, name, group, left, config)
        if use is not None:
            uses[use] += 1
    found.encodings = [use._replace(weights=count) for use, count in uses.items()]
    for name, tensor in left.items():
        found.count(OTHER, tensor.dtype, tensor.nbytes, None)
        found.unexpected.append(f"tensor {name}: unknown to the MLX layout")
    name_variant(found, {key: getattr(config, key) for key in WIDTH_KEYS + DEPTH_KEYS})
    return found


def _modules(config: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, list[Expected]]:
    """Return the weights that each tensor of words or floats holds: one, or the experts of a layer."""
    has_bias, has_tower = vision_kind(stored)
    weights: Iterator[Expected] = expected_tensors(config, Draft.NONE, 0, has_bias)
    modules: dict[str, list[Expected]] = {}
    for expected in chain(weights, vision_tensors(config) if has_tower else ()):
        name = mlx_name(expected.row, expected.prefix, config.version, is_expert=expected.expert is not None)
        modules.setdefault(name, []).append(expected)
    return modules


def _describe_module(
    found: Description, name: str, group: list[Expected], left: dict[str, Stored], config: ModelConfig
) -> EncodingUse | None:
    """Count the tensors of a module, and list what is missing of it or has another shape."""
    first = group[0]
    family = EXPERTS if first.expert is not None else family_of(first.name)
    stem = name.removesuffix("weight")
    held = left.pop(name, None)
    if held is None:
        found.unexpected.append(f"tensor {name} is missing")
        return None
    scales, biases = left.pop(f"{stem}{SCALES}", None), left.pop(f"{stem}{BIASES}", None)
    for tensor in (held, scales, biases):
        if tensor is not None:
            found.count(family_of(first.name), tensor.dtype, tensor.nbytes, layer_of(first.name))
    shape = mlx_shape(first.row, first.shape, config.o_groups)
    if first.expert is not None:
        shape = (len(group), *shape)
    found.elements += math.prod(shape)
    encoding = held.dtype.lower()
    scale, block = None, None
    logical = held.shape
    if held.dtype == WORD:
        if scales is None or not scales.shape or not shape[-1] or not scales.shape[-1]:
            found.unexpected.append(f"tensor {stem}{SCALES} is missing, the scales of words")
            return None
        scale, block = scales.dtype, (1, shape[-1] // scales.shape[-1])
        bits = held.shape[-1] * WORD_BITS // shape[-1]
        encoding = f"affine{bits}" if biases is not None else f"mxfp{bits}"
        logical = (*held.shape[:-1], held.shape[-1] * WORD_BITS // max(1, bits))
        if scales.shape[:-1] != held.shape[:-1] or (biases is not None and biases.shape != scales.shape):
            found.unexpected.append(f"tensor {stem}{SCALES}: {list(scales.shape)} for words {list(held.shape)}")
    if logical != shape:
        found.unexpected.append(f"tensor {name}: expected shape {list(shape)}, got {list(logical)}")
    return EncodingUse(family, encoding, scale, block, 0)
