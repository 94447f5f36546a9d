"""Weights that compressed-tensors packs and that are no NVFP4: integers of four bits, and FP4 with E8M0 scales.

================================ =====================================
tensor                           what
================================ =====================================
``weight_packed``, I32 [R, C/8]  integers of four bits
``weight_packed``, U8 [R, C/2]   FP4 (its "mxfp4-pack-quantized")
``weight_scale``                 a scale for a group of a row; E8M0 as U8 for FP4
``weight_shape``, I64 or I32 [2] R and C
``weight_zero_point``, I32       zero points, eight rows in a word; none where all are in the middle
``weight_g_idx``, I32 [C]        groups of columns in another order, which is not read
================================ =====================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..containers.safetensors import Stored
from ..errors import InventoryError, UnsupportedError
from ..formats.int4 import PER_WORD
from .nvfp4 import CODES, FP4_SCALE, SCALE, WEIGHT
from .small_tensors import read_small
from .weights import INT4_DTYPE

SHAPE, ZERO_POINT, ORDER = ".weight_shape", ".weight_zero_point", ".weight_g_idx"
ZERO = ".zero"
BYTES_PER_WORD = 4


def packed_as_pairs(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a folder with its packed weights as ``.weight``, ``.scale`` and, if any, ``.zero``.

    Raises:
        InventoryError: a weight is not whole, or its shape is not the one that it says.
        UnsupportedError: columns in another order than that of their groups.
        InputMissingError, FileFormatError: a shape cannot be read.
    """
    made = dict(stored)
    stems = [name.removesuffix(CODES) for name in stored if name.endswith(CODES)]
    for name, tensor in stored.items():
        if name.endswith(SHAPE) and name.removesuffix(SHAPE) + CODES not in stored:
            missing = name.removesuffix(SHAPE) + CODES
            raise InventoryError(f"tensor {missing} is missing, which {name} belongs to", where=tensor.file)
    shapes = _shapes({stem: made.pop(stem + SHAPE) for stem in stems if stem + SHAPE in made})
    for stem in stems:
        packed = made.pop(stem + CODES)
        scale = made.pop(stem + SCALE, None)
        if scale is None:
            raise InventoryError(f"tensor {stem}{SCALE} is missing, which {stem}{CODES} belongs to", where=packed.file)
        if stem + ORDER in made:
            raise UnsupportedError(
                f"tensor {stem}{ORDER}: columns in another order than that of their groups (actorder)",
                where=packed.file,
                hint="quantise with actorder weight or static, or convert the checkpoint that it was made of",
            )
        weight = _as_bytes(stem, packed)
        shape = (weight.shape[0], 2 * weight.shape[1])
        if shapes.get(stem, shape) != shape:
            raise InventoryError(
                f"tensor {stem}{CODES}: {list(shape)} elements of four bits, weight_shape says {list(shapes[stem])}",
                where=packed.file,
            )
        zero = made.pop(stem + ZERO_POINT, None)
        if zero is not None:
            made[stem + ZERO] = zero
        made[stem + WEIGHT], made[stem + FP4_SCALE] = weight, scale
    return made


def _as_bytes(stem: str, packed: Stored) -> Stored:
    """Return packed elements as bytes, two in each."""
    if len(packed.shape) == 2 and packed.dtype == "I32":
        return packed._replace(dtype=INT4_DTYPE, shape=(packed.shape[0], packed.shape[1] * BYTES_PER_WORD))
    if len(packed.shape) == 2 and packed.dtype == "U8":
        return packed
    raise InventoryError(
        f"tensor {stem}{CODES}: not packed elements",
        where=packed.file,
        expected=f"I32, {PER_WORD} integers in each, or U8, two FP4 in each, of two dimensions",
        got=f"{packed.dtype} {list(packed.shape)}",
    )


def _shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Return what the shapes of weights say, by stem."""
    for stem, tensor in tensors.items():
        if tensor.dtype not in ("I64", "I32") or math.prod(tensor.shape) != 2:
            raise InventoryError(
                f"tensor {stem}{SHAPE}: not a shape",
                where=tensor.file,
                expected="I64 [2]",
                got=f"{tensor.dtype} {list(tensor.shape)}",
            )
    found = read_small(tensors)
    dtypes = {"I64": "<i8", "I32": "<i4"}
    return {stem: tuple(np.frombuffer(raw, dtypes[tensors[stem].dtype]).tolist()) for stem, raw in found.items()}
