"""Triton twins of the published quantisers: float32 to FP8 in blocks, and to packed FP4; same bits, same counts.

::

    f32_to_fp8   values f32 [R, C]   ->   out u8 [R, C]     out_scale u8 [ceil(R/height), ceil(C/width)]
    f32_to_fp4   values f32 [R, C]   ->   out u8 [R, C/2]   out_scale u8 [R, C/32]

Unlike the numpy functions, which make codes or scales, each launch makes both: a program holds a block, finds its
largest magnitude, and divides by the scale, a multiplication by a power of two that is made from bits. What becomes
subnormal in float32 by it lies far below the smallest code, so that its rounding cannot show.

A magnitude of 1 or more (FP4), or 2^-6 or more (FP8), is rounded in its float32 bits; below, where the codes are evenly
spaced, by the addition of a number so large that integers are all that float32 holds next to it.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import LossyError
from ..base import GROUP, Block
from .scalar import (
    CHANGED,
    F32_MANTISSA_BITS,
    MAGNITUDE,
    UNDERFLOW,
    AnyTally,
    DeviceTally,
    blocks_of,
    check,
    e2m1_value,
    e4m3_value,
    on_device,
    power_of_two,
)

F32_MANTISSA = tl.constexpr((1 << 23) - 1)
F32_INFINITY = tl.constexpr(0xFF << 23)
# Next to 1.5 * 2^23 float32 holds integers alone: adding and taking it away rounds to nearest, ties to even.
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)

# 448 = 1.75 * 2^8; the published quantiser counts an amax below 1e-4 as that.
E4M3_MAX_EXPONENT = tl.constexpr(8)
E4M3_MAX_MANTISSA = tl.constexpr(0x60_0000)
AMAX_FLOOR_BITS = tl.constexpr(0x38D1_B717)  # float32 1e-4
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
E4M3_SUBNORMALS = tl.constexpr(2.0**9)  # one over the smallest of them
E4M3_DROPPED = tl.constexpr(20)  # mantissa bits
E4M3_UNDER_HALF = tl.constexpr((1 << 19) - 1)  # just under half of what is dropped
E4M3_REBIAS = tl.constexpr((127 - 7) << 3)

# 6 = 1.5 * 2^2; 2^-126 is the smallest scale.
E2M1_MAX_EXPONENT = tl.constexpr(2)
E2M1_MAX_MANTISSA = tl.constexpr(0x40_0000)
E2M1_SUBNORMALS = tl.constexpr(2.0)
E2M1_DROPPED = tl.constexpr(22)
E2M1_UNDER_HALF = tl.constexpr((1 << 21) - 1)
E2M1_REBIAS = tl.constexpr((127 - 1) << 1)

# Groups of 32 that a program of f32_to_fp4 makes.
GROUPS = 64
WARPS = 4
BLOCK_WARPS = 8


@triton.jit
def _rounded(
    scaled,
    SMALLEST: tl.constexpr,
    SUBNORMALS: tl.constexpr,
    DROPPED: tl.constexpr,
    UNDER_HALF: tl.constexpr,
    REBIAS: tl.constexpr,
):
    """Return the magnitude codes (int32) of float32 ``scaled``, rounded to nearest, ties to even."""
    size = scaled.to(tl.int32, bitcast=True) & MAGNITUDE
    normal = ((size + UNDER_HALF + ((size >> DROPPED) & 1)) >> DROPPED) - REBIAS
    magnitude = size.to(tl.float32, bitcast=True)
    even = tl.minimum(magnitude, SMALLEST) * SUBNORMALS
    subnormal = ((even + TO_INTEGER) - TO_INTEGER).to(tl.int32)
    return tl.where(magnitude < SMALLEST, subnormal, normal)


@triton.jit
def _sum(hits):
    """Return how many of a matrix are true."""
    return tl.sum(tl.sum(hits.to(tl.int32), axis=1), axis=0)


@triton.jit
def _add(counters, which, total):
    if total > 0:
        tl.atomic_add(counters + which, total.to(tl.int64))


@triton.jit
def _f32_to_fp8(
    values, out, out_scale, counters, refused, rows, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Quantise one block; ``refused`` becomes 1 where it holds NaN or infinity."""
    across: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    down = tl.cast(tl.program_id(0), tl.int64)
    row = down * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    live = (row < rows) & (column < COLUMNS)
    place = row * COLUMNS + column
    value = tl.load(values + place, mask=live, other=0.0)
    bits = value.to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(bits & MAGNITUDE, axis=1), axis=0)
    if largest >= F32_INFINITY:
        tl.atomic_max(refused, 1)
    largest = tl.maximum(largest, AMAX_FLOOR_BITS)
    byte = (largest >> F32_MANTISSA_BITS) - E4M3_MAX_EXPONENT
    byte += ((largest & F32_MANTISSA) > E4M3_MAX_MANTISSA).to(tl.int32)
    scaled = value * power_of_two(127 - byte)
    made = _rounded(scaled, E4M3_MIN_NORMAL, E4M3_SUBNORMALS, E4M3_DROPPED, E4M3_UNDER_HALF, E4M3_REBIAS) | (
        (bits >> 24) & 0x80
    )
    tl.store(out + place, made.to(tl.uint8), mask=live)
    tl.store(out_scale + down * across + tl.program_id(1), byte.to(tl.uint8))
    inexact = ((e4m3_value(made) != scaled) | ((scaled == 0.0) & (value != 0.0))) & live
    tiny = tl.abs(scaled) < E4M3_MIN_NORMAL
    _add(counters, UNDERFLOW, _sum(inexact & tiny))
    _add(counters, CHANGED, _sum(inexact & (tl.abs(scaled) >= E4M3_MIN_NORMAL)))


@triton.jit
def _f32_to_fp4(values, out, out_scale, counters, refused, groups, GROUPS: tl.constexpr):
    """Quantise ``GROUPS`` groups of 32 elements; the two elements of a byte lie next to each other."""
    group = tl.cast(tl.program_id(0), tl.int64) * GROUPS + tl.arange(0, GROUPS)
    pair = tl.arange(0, 16)[None, :]
    live = (group[:, None] < groups) & (pair < 16)
    place = group[:, None] * 32 + 2 * pair
    low = tl.load(values + place, mask=live, other=0.0)
    high = tl.load(values + place + 1, mask=live, other=0.0)
    low_bits, high_bits = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    largest = tl.max(tl.maximum(low_bits & MAGNITUDE, high_bits & MAGNITUDE), axis=1)
    if tl.max(largest, axis=0) >= F32_INFINITY:
        tl.atomic_max(refused, 1)
    byte = (largest >> F32_MANTISSA_BITS) - E2M1_MAX_EXPONENT
    byte = tl.maximum(byte + ((largest & F32_MANTISSA) > E2M1_MAX_MANTISSA).to(tl.int32), 1)
    inverse = power_of_two(127 - byte)[:, None]
    early, late = low * inverse, high * inverse
    first = _rounded(early, 1.0, E2M1_SUBNORMALS, E2M1_DROPPED, E2M1_UNDER_HALF, E2M1_REBIAS) | ((low_bits >> 28) & 8)
    second = _rounded(late, 1.0, E2M1_SUBNORMALS, E2M1_DROPPED, E2M1_UNDER_HALF, E2M1_REBIAS) | ((high_bits >> 28) & 8)
    tl.store(out + group[:, None] * 16 + pair, (first | (second << 4)).to(tl.uint8), mask=live)
    tl.store(out_scale + group, byte.to(tl.uint8), mask=group < groups)
    changed = (e2m1_value(first) != early) | ((early == 0.0) & (low != 0.0))
    changed_late = (e2m1_value(second) != late) | ((late == 0.0) & (high != 0.0))
    _add(counters, CHANGED, _sum(changed & live) + _sum(changed_late & live))


def _refuse(refused: Tensor) -> None:
    """Raise LossyError where a kernel found NaN or infinity."""
    if int(refused.item()):
        raise LossyError(
            "a NaN or infinite value cannot be quantised",
            expected="finite values",
            hint="run dsv4convert check on the source, which names the tensors",
        )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def f32_to_fp8(values: Tensor, block: Block, out: Tensor, out_scale: Tensor, scratch: object, tally: AnyTally) -> None:
    """Quantise float32 [R, C] to e4m3 codes and e8m0 scales per ``block``, powers of two both ways.

    As ``formats.e4m3.f32_to_fp8`` and ``f32_to_fp8_scales`` together. ``scratch`` is not used. Waits for the device.

    Raises:
        LossyError: NaN or infinity among the values; nothing is counted then.
        ValueError: tensors that do not belong together, or another block.
    """
    rows, columns = values.shape
    if not (_is_power_of_two(block[0]) and _is_power_of_two(block[1])):
        raise ValueError(f"block: expected powers of two, got {block}")
    grid = blocks_of(rows, columns, block)
    check(values, "values", (torch.float32,), (rows, columns))
    check(out, "out", (torch.uint8,), (rows, columns))
    check(out_scale, "out_scale", (torch.uint8,), grid)
    if rows * columns == 0:
        return
    counts, refused = DeviceTally(values.device), torch.zeros(1, dtype=torch.int32, device=values.device)
    with on_device(values):
        _f32_to_fp8[grid](
            values,
            out,
            out_scale,
            counts.counters,
            refused,
            rows,
            COLUMNS=columns,
            HEIGHT=block[0],
            WIDTH=block[1],
            num_warps=BLOCK_WARPS,
            enable_fp_fusion=False,
        )
    _refuse(refused)
    _hand_over(counts, tally)


def f32_to_fp4(values: Tensor, out: Tensor, out_scale: Tensor, scratch: object, tally: AnyTally) -> None:
    """Quantise float32 [R, C] to packed FP4 [R, C/2] with e8m0 scales [R, C/32].

    As ``formats.e2m1.f32_to_fp4`` and ``f32_to_fp4_scales`` together. ``scratch`` is not used. Waits for the device.

    Raises:
        LossyError: NaN or infinity among the values; nothing is counted then.
        ValueError: tensors that do not belong together.
    """
    rows, columns = values.shape
    if columns % GROUP:
        raise ValueError(f"FP4 rows come in groups of {GROUP}, got {columns} columns")
    check(values, "values", (torch.float32,), (rows, columns))
    check(out, "out", (torch.uint8,), (rows, columns // 2))
    check(out_scale, "out_scale", (torch.uint8,), (rows, columns // GROUP))
    groups = rows * columns // GROUP
    if groups == 0:
        return
    counts, refused = DeviceTally(values.device), torch.zeros(1, dtype=torch.int32, device=values.device)
    with on_device(values):
        _f32_to_fp4[(triton.cdiv(groups, GROUPS),)](
            values,
            out,
            out_scale,
            counts.counters,
            refused,
            groups,
            GROUPS=GROUPS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    _refuse(refused)
    _hand_over(counts, tally)


def _hand_over(counts: DeviceTally, tally: AnyTally) -> None:
    """Add the counts of a launch to those of its caller."""
    if isinstance(tally, DeviceTally):
        tally.counters += counts.counters
    else:
        tally.add(counts.read())
