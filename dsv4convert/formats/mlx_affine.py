"""MLX's affine mode of eight bits: a scale and a bias, both bfloat16, for each group of 64 or 32 elements of a row.

::

    value = code * scale + bias              code 0 to 255

The rule is that of ``mx.quantize`` on bfloat16 weights, every operation rounded to float32. Of a group, the end that is
farther from zero is an exact multiple of the scale, and is the bias; zero is a code then, too:

    scale = max((largest - smallest) / 255, 1e-7), negative where the largest is the farther end (or both are as far)
    edge  = that end; n = round(edge / scale); scale = edge / n and bias = edge, unless n is 0: bias = 0
    code  = round((value - bias) / scale), within 0 to 255

Codes go by the float32 scale, of which bfloat16 is stored.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dsv4convert.formats.base import Array, ArrayF32, ArrayF64, ArrayU16, Scratch, Tally, check_contiguous
from dsv4convert.formats.bf16 import bf16_to_f32, f32_to_bf16, widened_bf16

Part = Literal["codes", "scales", "biases"]

LEVELS = 255
SMALLEST_SCALE = np.float32(1e-7)


def bf16_to_affine8(values: ArrayU16, group: int, part: Part, out: Array, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` a part of bfloat16 bits [R, C] in affine mode: uint8 codes [R, C], or bf16 bits [R, C/group].

    Counts as ``changed``, with the codes, the elements whose value is another. Raises ValueError on NaN and infinity,
    and on shapes that do not fit.
    """
    rows, columns = values.shape
    shape = (rows, columns) if part == "codes" else (rows, columns // group)
    if columns % group or out.shape != shape:
        raise ValueError(f"{part} of {rows}x{columns} elements in groups of {group}: got {out.shape}")
    check_contiguous(out)
    wide = widened_bf16(values, scratch)
    if not np.isfinite(wide).all():
        raise ValueError("cannot quantise NaN or infinity")
    groups = wide.reshape(-1, group)
    scale, bias = scales_and_biases(groups)
    if part != "codes":
        f32_to_bf16((scale if part == "scales" else bias).reshape(shape), out, scratch, Tally())
        return
    codes = np.clip(np.rint((groups - bias[:, None]) / scale[:, None]), 0, LEVELS)
    np.copyto(out, codes.reshape(shape), casting="unsafe")
    stored = codes.astype(np.float64) * _stored(scale, scratch)[:, None] + _stored(bias, scratch)[:, None]
    tally.changed += int(np.count_nonzero(stored != groups))


def scales_and_biases(groups: ArrayF32) -> tuple[ArrayF32, ArrayF32]:
    """Return the float32 scales and biases [n] of groups [n, elements].

    >>> scales_and_biases(np.array([[0, 255], [-255, 0]], np.float32))
    (array([-1.,  1.], dtype=float32), array([ 255., -255.], dtype=float32))
    """
    smallest, largest = groups.min(axis=1), groups.max(axis=1)
    is_below = np.abs(smallest) > np.abs(largest)
    step = np.maximum((largest - smallest) / np.float32(LEVELS), SMALLEST_SCALE)
    scale = np.where(is_below, step, -step)
    edge = np.where(is_below, smallest, largest)
    steps = np.rint(edge / scale)
    has_steps = steps != 0
    scale = np.where(has_steps, edge / np.where(has_steps, steps, 1), scale)
    return scale.astype(np.float32), np.where(has_steps, edge, 0).astype(np.float32)


def _stored(values: ArrayF32, scratch: Scratch) -> ArrayF64:
    """Return values as they are stored, rounded to bfloat16."""
    bits = scratch.array("affine.bits", values.shape, np.uint16)
    f32_to_bf16(values, bits, scratch, Tally())
    wide = scratch.array("affine.stored", values.shape, np.float32)
    bf16_to_f32(bits, wide, scratch, Tally())
    return wide.astype(np.float64)
