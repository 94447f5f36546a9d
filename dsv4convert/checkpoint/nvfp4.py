"""NVFP4 weights as ModelOpt and compressed-tensors store them: read as the FP4 that they were made of, or as they are.

Where the scales of NVFP4 are powers of two under a second scale that is one too, alike for both halves of each block of
32, the closed-form cast of FP4 made it: the two are one E8M0 scale, the codes are the same, and the weight is read as
that FP4. Whether all scales are so shows when they are read (see ``containers.wide_scales``). Second scales, and a few
scales, are read here: any that is none of the cast's says that a folder was quantised otherwise, and all of it is read
as NVFP4.

======================== ============================ =========================
tensor                   ModelOpt                     compressed-tensors
======================== ============================ =========================
codes, U8 [R, C/2]       ``weight``                   ``weight_packed``
scales, E4M3 [R, C/16]   ``weight_scale``             ``weight_scale``
second scale, F32        ``weight_scale_2``           1 / ``weight_global_scale``
scale of activations     ``input_scale``              1 / ``input_global_scale``
======================== ============================ =========================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..containers.safetensors import Stored
from ..containers.wide_scales import E8M0, F32, pairs_up
from ..errors import InventoryError
from ..formats.nvfp4 import BLOCK, SCALES_PER_GROUP
from ..scale_forms import Over, Pairs, Times
from .small_tensors import read_scalars, read_small

WEIGHT, SCALE, SECOND_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"
CODES, GLOBAL_SCALE, INPUT_GLOBAL_SCALE = ".weight_packed", ".weight_global_scale", ".input_global_scale"
FP4_SCALE = ".scale"
E4M3 = "F8_E4M3"
CODES_PER_BYTE = 2

# How many matrices are looked at, a row of scales of each, to tell a cast of FP4 from other NVFP4.
LOOKED_AT = 8


class _Parts(NamedTuple):
    """The names of an NVFP4 weight's tensors; ``is_reciprocal`` says that scales are divided by the second one."""

    stem: str
    weight: str
    second: str
    is_reciprocal: bool


def nvfp4_as_pairs(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a folder with its NVFP4 weights as pairs of ``.weight`` and ``.scale``.

    NVFP4 that is FP4 becomes that. Scales of activations stay as they are.

    Raises:
        InventoryError: a weight is not whole, misshapen, has scales of FP4 as well, or its second scale is no number.
        InputMissingError, InputOutputError, FileFormatError: a second scale cannot be read.
    """
    _check_no_second_is_missing(stored)
    parts = [part for name in stored if (part := _parts_of(name)) is not None]
    seconds = {part.second: stored[part.second] for part in parts}
    values = read_scalars(seconds)
    for part in parts:
        if not 0 < values[part.second] < math.inf:
            raise InventoryError(
                f"tensor {part.second}: not a scale",
                where=stored[part.second].file,
                expected="a positive number",
                got=f"{values[part.second]:.9g}",
            )
    made = {name: tensor for name, tensor in stored.items() if name not in seconds}
    found: list[tuple[_Parts, Stored, Stored]] = []
    for part in parts:
        weight, scale = made.pop(part.weight, None), made.pop(part.stem + SCALE, None)
        if weight is None or scale is None:
            missing = part.weight if weight is None else part.stem + SCALE
            raise InventoryError(
                f"tensor {missing} is missing, which {part.second} belongs to", where=stored[part.second].file
            )
        if part.stem + FP4_SCALE in made:
            raise InventoryError(
                f"tensor {part.stem}{WEIGHT}: scales of both FP4 and NVFP4",
                where=made[part.stem + FP4_SCALE].file,
                expected=f"{SCALE} and {part.second.removeprefix(part.stem)}, or {FP4_SCALE} alone",
                got=f"{FP4_SCALE} as well",
            )
        _check_shapes(part, weight, scale)
        found.append((part, weight, scale))
    is_fp4 = _is_cast_of_fp4(found, values)
    for part, weight, scale in found:
        made[part.stem + WEIGHT] = weight._replace(dtype="I8")
        made[part.stem + FP4_SCALE] = _scale_of(part, scale, values[part.second], is_fp4=is_fp4)
    return made


def _parts_of(name: str) -> _Parts | None:
    """Return the names of the weight whose second scale has this name, None where it is no second scale."""
    if name.endswith(SECOND_SCALE):
        stem = name.removesuffix(SECOND_SCALE)
        return _Parts(stem, stem + WEIGHT, name, is_reciprocal=False)
    if name.endswith(GLOBAL_SCALE):
        stem = name.removesuffix(GLOBAL_SCALE)
        return _Parts(stem, stem + CODES, name, is_reciprocal=True)
    return None


def _check_no_second_is_missing(stored: Mapping[str, Stored]) -> None:
    for name, tensor in stored.items():
        if tensor.dtype != E4M3 or not name.endswith(SCALE):
            continue
        stem = name.removesuffix(SCALE)
        if stem + SECOND_SCALE not in stored and stem + GLOBAL_SCALE not in stored:
            second = GLOBAL_SCALE if stem + CODES in stored else SECOND_SCALE
            raise InventoryError(f"tensor {stem}{second} is missing, which {name} belongs to", where=tensor.file)


def _check_shapes(part: _Parts, weight: Stored, scale: Stored) -> None:
    rows, width = weight.shape if len(weight.shape) == 2 else (0, 0)
    columns = width * CODES_PER_BYTE
    expected = (rows, columns // BLOCK)
    if weight.dtype not in ("U8", "I8") or columns % (BLOCK * SCALES_PER_GROUP):
        raise InventoryError(
            f"tensor {part.weight}: not the codes of NVFP4",
            where=weight.file,
            expected=f"U8 of rows of a multiple of {BLOCK * SCALES_PER_GROUP} elements",
            got=f"{weight.dtype} {list(weight.shape)}",
        )
    if scale.dtype != E4M3 or scale.shape != expected:
        raise InventoryError(
            f"tensor {part.stem}{SCALE}: not the scale of NVFP4",
            where=scale.file,
            expected=f"{E4M3} {list(expected)}",
            got=f"{scale.dtype} {list(scale.shape)}",
        )


def _is_cast_of_fp4(found: list[tuple[_Parts, Stored, Stored]], values: Mapping[str, float]) -> bool:
    """Return whether all second scales are powers of two, and the scales that are looked at those of FP4.

    Scales that a quantiser chose are hardly ever so, and never all of a row.

    Raises:
        InputMissingError, InputOutputError, FileFormatError: they cannot be read.
    """
    if any(math.frexp(values[part.second])[0] != 0.5 for part, _, _ in found):
        return False
    step = max(1, len(found) // LOOKED_AT)
    exponents = {part.stem: _exponent(part, values[part.second]) for part, _, _ in found[::step]}
    rows = {
        part.stem: scale._replace(nbytes=scale.nbytes // scale.shape[0])
        for part, _, scale in found[::step]
        if scale.nbytes
    }
    return all(pairs_up(np.frombuffer(raw, np.uint8), exponents[stem]) for stem, raw in read_small(rows).items())


def _exponent(part: _Parts, value: float) -> int:
    """Return the exponent of the second scale, a power of two."""
    exponent = math.frexp(value)[1] - 1
    return -exponent if part.is_reciprocal else exponent


def _scale_of(part: _Parts, scale: Stored, value: float, *, is_fp4: bool) -> Stored:
    """Return the scales of a weight as E8M0, each of which is a pair of those that are there, or as float32."""
    if not is_fp4:
        return scale._replace(dtype=F32, scale_form=Over(value) if part.is_reciprocal else Times(value))
    rows, columns = scale.shape
    pairs = Pairs(_exponent(part, value))
    return scale._replace(dtype=E8M0, shape=(rows, columns // SCALES_PER_GROUP), scale_form=pairs)
