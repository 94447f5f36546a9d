"""NVFP4 weights as ModelOpt stores them, read as the FP4 that the closed-form cast made them of.

The scales of such a weight are powers of two under a second scale that is one too, alike for both halves of each block
of 32: together they are one E8M0 scale, and the codes are the same. Whether all are so shows when they are read (see
``containers.wide_scales``); the second scales are read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..containers.safetensors import Stored
from ..containers.sources import prefetch
from ..containers.untrusted import open_regular
from ..containers.wide_scales import E8M0, of_pairs
from ..errors import FileFormatError, InputMissingError, InventoryError
from ..formats.nvfp4 import BLOCK, SCALES_PER_GROUP

WEIGHT, SCALE, SECOND_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"
FP4_SCALE = ".scale"
E4M3 = "F8_E4M3"
CODES_PER_BYTE = 2

NOTE = "NVFP4 weights are read as the FP4 that they were made of: the same codes, and pairs of scales as one E8M0 scale"

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


def has_nvfp4(names: Iterable[str]) -> bool:
    """Return whether a folder with such tensors holds NVFP4 in ModelOpt's form."""
    return any(name.endswith(SECOND_SCALE) for name in names)


def nvfp4_as_fp4(stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Return the tensors of a folder with NVFP4 weights as packed FP4; the scales of activations stay.

    Raises:
        InventoryError: one is not whole, misshapen, has scales of FP4 as well, or its second scale is no power of two.
        InputMissingError, FileFormatError: a second scale cannot be read.
    """
    seconds = {name: tensor for name, tensor in stored.items() if name.endswith(SECOND_SCALE)}
    if not seconds:
        return stored
    alone = (name for name in stored if name.endswith(SCALE) and name.removesuffix(SCALE) + SECOND_SCALE not in seconds)
    lost = next((name for name in alone if stored[name].dtype == E4M3), None)
    if lost is not None:
        missing = lost.removesuffix(SCALE) + SECOND_SCALE
        raise InventoryError(f"tensor {missing} is missing, which {lost} belongs to", where=stored[lost].file)
    made = {name: tensor for name, tensor in stored.items() if name not in seconds}
    for name, value in read_scalars(seconds).items():
        exponent = _exponent(name, value, seconds[name].file)
        stem = name.removesuffix(SECOND_SCALE)
        weight, scale = made.get(stem + WEIGHT), made.pop(stem + SCALE, None)
        if weight is None or scale is None:
            missing = stem + (WEIGHT if weight is None else SCALE)
            raise InventoryError(f"tensor {missing} is missing, which {name} belongs to", where=seconds[name].file)
        if stem + FP4_SCALE in made:
            raise InventoryError(
                f"tensor {stem}{WEIGHT}: scales of both FP4 and NVFP4",
                where=made[stem + FP4_SCALE].file,
                expected=f"{SCALE} and {SECOND_SCALE}, or {FP4_SCALE} alone",
                got=f"{FP4_SCALE} as well",
            )
        made[stem + WEIGHT] = weight._replace(dtype="I8")
        made[stem + FP4_SCALE] = _as_e8m0(stem, weight, scale, exponent)
    return made


def _as_e8m0(stem: str, weight: Stored, scale: Stored, exponent: int) -> Stored:
    """Return the scales of a weight as E8M0, each of which is a pair of those that are there."""
    rows, width = weight.shape if len(weight.shape) == 2 else (0, 0)
    columns = width * CODES_PER_BYTE
    expected = (rows, columns // BLOCK)
    if weight.dtype not in ("U8", "I8") or columns % (BLOCK * SCALES_PER_GROUP):
        raise InventoryError(
            f"tensor {stem}{WEIGHT}: not the codes of NVFP4",
            where=weight.file,
            expected=f"U8 of rows of a multiple of {BLOCK * SCALES_PER_GROUP} elements",
            got=f"{weight.dtype} {list(weight.shape)}",
        )
    if scale.dtype != E4M3 or scale.shape != expected:
        raise InventoryError(
            f"tensor {stem}{SCALE}: not the scale of NVFP4",
            where=scale.file,
            expected=f"{E4M3} {list(expected)}",
            got=f"{scale.dtype} {list(scale.shape)}",
        )
    return scale._replace(dtype=E8M0, shape=(rows, columns // BLOCK // SCALES_PER_GROUP), wide=of_pairs(exponent))


def read_scalars(tensors: Mapping[str, Stored]) -> dict[str, float]:
    """Return the value of each tensor of one float32 by its name, every file opened once.

    Raises:
        InventoryError: one is another tensor.
        InputMissingError, FileFormatError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != "F32" or math.prod(tensor.shape) != 1:
            raise InventoryError(
                f"tensor {name}: not a scale",
                where=tensor.file,
                expected="one F32",
                got=f"{tensor.dtype} {list(tensor.shape)}",
            )
        by_file.setdefault(tensor.file, []).append(name)
    prefetch((tensor.file, tensor.offset, tensor.nbytes) for tensor in tensors.values())
    values: dict[str, float] = {}
    for path, names in by_file.items():
        try:
            with open_regular(path) as file:
                for name in sorted(names, key=lambda name: tensors[name].offset):
                    file.seek(tensors[name].offset)
                    content = file.read(tensors[name].nbytes)
                    if len(content) != tensors[name].nbytes:
                        raise FileFormatError("truncated", where=path, hint="download the file again")
                    values[name] = float(np.frombuffer(content, "<f4")[0])
        except OSError as error:
            raise InputMissingError(f"cannot be read ({error.strerror})", where=path) from None
    return {name: values[name] for name in tensors}


def _exponent(name: str, value: float, path: Path) -> int:
    fraction, exponent = math.frexp(value) if math.isfinite(value) else (0.0, 0)
    if fraction != 0.5:
        raise InventoryError(
            f"tensor {name}: not a power of two, so that the weight is no FP4",
            where=path,
            expected="2^n, as the closed-form cast of FP4 makes it",
            got=f"{value:.9g}",
        )
    return exponent - 1


def config_as_fp4(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what ModelOpt adds to it for NVFP4 experts."""
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return dict(raw)
    return {**raw, "quantization_config": {k: v for k, v in quantization.items() if k not in CONFIG_KEYS}}
