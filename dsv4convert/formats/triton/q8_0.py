"""Triton twin of fp8_to_q8_0: same layouts, same bits, same counts, on CUDA tensors.

::

    fp8_to_q8_0   weight u8 [R, C]   scale u8 or f32 [ceil(R/br), ceil(C/bc)]   ->   out u8 [R, C/32*34]

The quick part uses what ``formats.q8_0`` proves: with one power-of-two scale in a block, q is the value
times a multiplier that depends on the largest magnitude code only, rounded to nearest. Adding a large
number rounds in float32 and leaves q in the lowest byte. d is amax/127 by true division. The careful
part is the plain formula. Two blocks of 34 bytes fill 17 words, and ``units`` writes those.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import GROUP, Block
from ..e4m3 import PLACED_EXPONENT
from ..q8_0 import BLOCK_BYTES, TABLE_FIRST_BYTE, multipliers
from .scalar import (
    E4M3_LIFT,
    E4M3_NAN,
    E4M3_SHIFT_OUT,
    NAN,
    OVERFLOW,
    UNDERFLOW,
    AnyTally,
    Counting,
    blocks_of,
    careful,
    check,
    e4m3_in_f32,
    e4m3_value,
    on_device,
    power_of_two,
    scale_byte,
    scale_of_elements,
    scale_of_vectors,
    scale_value,
    vector_ready,
    vectors_keep_to_scales,
)
from .units import INNER_WORDS, UNIT_WORDS, store_units

UNIT_BLOCKS = tl.constexpr(2)
BLOCK_WORDS = tl.constexpr(8)
BLOCK_ELEMENTS = tl.constexpr(32)
BYTES_IN_BLOCK = tl.constexpr(BLOCK_BYTES)

LEVELS = tl.constexpr(127.0)
F16_NAN = tl.constexpr(0x7E00)
F16_INFINITY = tl.constexpr(0x7C00)
# Placed codes carry 2^-120. The multipliers, as large as 127 * 2^9, take back 2^111 and stay float32
# numbers; the products are q times 2^-9.
LIFT_OF_MULTIPLIERS = PLACED_EXPONENT - 9
# 1.5 * 2^23 has no fraction bits below 1, so that adding it rounds to nearest; here in units of 2^-9.
ROUNDER = tl.constexpr(1.5 * 2.0 ** (23 - 9))

LOWEST_BYTE = tl.constexpr(TABLE_FIRST_BYTE)
# Above, 2^(byte - 127 + 120) is no finite float32.
HIGHEST_BYTE = tl.constexpr(254 - PLACED_EXPONENT)

# Among the best on an H200; see benchmarks/results.
UNITS = 32
WARPS = 2
STORE_CACHE = ""


@triton.jit
def _quantised_words(zeroth, first, second, third, multiplier):
    """Return int32 words of four q each, from the placed values of the four codes in each word."""
    low = _quantised(zeroth, multiplier) | (_quantised(first, multiplier) << 8)
    return low | (_quantised(second, multiplier) << 16) | (_quantised(third, multiplier) << 24)


@triton.jit
def _quantised(placed, multiplier):
    """Return q in the lowest byte of an int32."""
    return tl.fma(placed, multiplier, ROUNDER).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _placed(words):
    """Return the placed values of the codes in bytes 0 to 3 of int32 words."""
    return e4m3_in_f32(words << 24), e4m3_in_f32(words << 16), e4m3_in_f32(words << 8), e4m3_in_f32(words)


@triton.jit
def _largest(zeroth, first, second, third):
    """Return per row the largest of the magnitudes."""
    low = tl.maximum(tl.abs(zeroth), tl.abs(first))
    return tl.max(tl.maximum(low, tl.maximum(tl.abs(second), tl.abs(third))), axis=1)


@triton.jit
def _four(words, BLOCKS: tl.constexpr):
    """Return the four columns of [BLOCKS, 4]."""
    even, odd = tl.split(tl.reshape(words, [BLOCKS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _by_the_formula(
    weight,
    scale,
    out,
    counters,
    start,
    stop,
    FLOAT_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Quantise blocks ``start`` to ``stop``, ``PARTS`` at a time, and count."""
    inside = tl.arange(0, BLOCK_ELEMENTS)[None, :]
    for part in range(0, (stop - start).to(tl.int32), PARTS):
        number = start + part + tl.arange(0, PARTS)
        alive = number < stop
        live = alive[:, None] & (inside >= 0)
        element = number[:, None] * BLOCK_ELEMENTS + inside
        held = scale_of_elements(scale, element, live, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        value = e4m3_value(tl.load(weight + element, mask=live, other=0).to(tl.int32))
        product = value.to(tl.float64) * scale_value(held, FLOAT_SCALE).to(tl.float64)
        x = product.to(tl.float32)
        is_nan = x != x
        nans = tl.sum((is_nan & live).to(tl.int32), axis=1)
        nonzero = tl.sum(((x != 0.0) & live).to(tl.int32), axis=1)
        amax = tl.max(tl.where(is_nan, 0.0, tl.abs(x)), axis=1)
        d_f32 = tl.div_rn(amax, LEVELS)
        inverse = tl.where(d_f32 == 0.0, 0.0, tl.div_rn(1.0, d_f32))
        usable = (tl.abs(inverse) < float("inf")) & (amax < float("inf")) & (nans == 0)
        exact = tl.where(usable[:, None], x, 0.0) * tl.where(usable, inverse, 0.0)[:, None]
        # Half away from zero: what the conversion to an integer drops is exact.
        whole = exact.to(tl.int32)
        twice = (exact - whole.to(tl.float32)) * 2.0
        q = whole + twice.to(tl.int32)
        d = d_f32.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        d = tl.where(nans > 0, F16_NAN, d)
        target = out + number[:, None] * BYTES_IN_BLOCK + inside
        tl.store(target + 2, q.to(tl.int8).to(tl.uint8, bitcast=True), mask=live)
        tl.store(target, (d[:, None] >> (inside * 8)).to(tl.uint8), mask=live & (inside < 2))
        add(counters + NAN, tl.sum(nans, axis=0))
        overflow = (d == F16_INFINITY) & alive
        add(counters + OVERFLOW, tl.sum(tl.where(overflow, nonzero, 0), axis=0))
        underflow = (d == 0) & (amax > 0.0) & alive
        add(counters + UNDERFLOW, tl.sum(tl.where(underflow, nonzero, 0), axis=0))


@triton.jit
def _fp8_to_q8_0(
    weight,
    weight_words,
    scale,
    multipliers,
    out,
    out_words,
    counters,
    blocks,
    FLOAT_SCALE: tl.constexpr,
    VECTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Quantise a tile of ``blocks`` blocks; ``weight_words`` and ``out_words`` are views for the quick part."""
    # Triton passes small integers in 32 bits, which counts of blocks might leave.
    blocks = tl.cast(blocks, tl.int64)
    tile = tl.cast(tl.program_id(0), tl.int64)
    start = tile * (UNITS * UNIT_BLOCKS)
    stop = tl.minimum(start + UNITS * UNIT_BLOCKS, blocks)
    fall_back = tl.full((), 1, tl.int32)
    if VECTORS and stop - start == UNITS * UNIT_BLOCKS:
        tile_blocks: tl.constexpr = UNITS * 2
        block = tl.arange(0, tile_blocks)
        held = scale_of_vectors(scale, tile, tile_blocks, GROUP, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        byte = scale_byte(held, FLOAT_SCALE)
        word = block[:, None] * BLOCK_WORDS + tl.arange(0, 4)[None, :]
        a0, a1, a2, a3 = _placed(tl.load(weight_words + start * BLOCK_WORDS + word))
        b0, b1, b2, b3 = _placed(tl.load(weight_words + start * BLOCK_WORDS + 4 + word))
        placed = tl.maximum(_largest(a0, a1, a2, a3), _largest(b0, b1, b2, b3))
        largest = placed.to(tl.int32, bitcast=True) >> E4M3_SHIFT_OUT
        amax = placed * power_of_two(byte - 127 + E4M3_LIFT)
        d = tl.div_rn(amax, LEVELS).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        needs_fallback = (byte < LOWEST_BYTE) | (byte > HIGHEST_BYTE) | (largest == E4M3_NAN)
        needs_fallback |= ((d == 0) & (largest > 0)) | (d == F16_INFINITY)
        multiplier = tl.load(multipliers + largest)[:, None]
        q0, q1, q2, q3 = _four(_quantised_words(a0, a1, a2, a3, multiplier), tile_blocks)
        q4, q5, q6, q7 = _four(_quantised_words(b0, b1, b2, b3, multiplier), tile_blocks)
        # A unit: d0 q0 | q1 q2 | ... | q15 d1 | q0 q1 | ...; the first block's halves are moved by one.
        moved = block % UNIT_BLOCKS == 0
        other = (1 - tl.arange(0, UNIT_BLOCKS))[None, :] + tl.zeros([UNITS, 1], tl.int32)
        next_d = tl.reshape(tl.gather(tl.reshape(d, [UNITS, UNIT_BLOCKS]), other, 1), [tile_blocks])
        even = tl.join(
            tl.join(_halves(q0, q1, moved), _halves(q4, q5, moved)),
            tl.join(_halves(q2, q3, moved), _halves(q6, q7, moved)),
        )
        odd = tl.join(
            tl.join(_halves(q1, q2, moved), _halves(q5, q6, moved)),
            tl.join(_halves(q3, q4, moved), _halves(q7, next_d, moved)),
        )
        inner = tl.reshape(tl.join(even, odd), [UNITS, INNER_WORDS])
        target = out_words + tile * (UNITS * UNIT_WORDS)
        store_units(target, inner, d | (q0 << 16), UNITS, UNIT_BLOCKS, STORE_CACHE)
        fall_back = tl.max(needs_fallback.to(tl.int32), axis=0)
        # The careful part overwrites what other threads of this program wrote.
        tl.debug_barrier()
    if fall_back != 0:
        _by_the_formula(
            weight, scale, out, counters, start, stop, FLOAT_SCALE, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, PARTS
        )


@triton.jit
def _halves(low, high, moved):
    """Return the upper half of ``low`` and the lower half of ``high``, or ``low`` where not ``moved``."""
    return tl.where(moved, ((low >> 16) & 0xFFFF) | (high << 16), low)


@triton.jit
def add(counter, number):
    """Add an int32 to a counter, unless it is 0."""
    if number > 0:
        tl.atomic_add(counter, number.to(tl.int64))


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Return the multipliers on the device, one for each largest magnitude code."""
    return torch.from_numpy(multipliers() * np.float32(2.0**LIFT_OF_MULTIPLIERS)).to(device)


def fp8_to_q8_0(weight: Tensor, scale: Tensor, block: Block, out: Tensor, scratch: object, tally: AnyTally) -> None:
    """Quantise e4m3 [R, C] times a scale per ``block`` to Q8_0 blocks [R, C/32*34].

    As ``formats.q8_0.fp8_to_q8_0``: equal to decoding to float32 and quantising that. ``scratch`` is not
    used.

    Raises:
        ValueError: tensors that do not belong together, C not a multiple of 32 among them.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"Q8_0 rows come in groups of {GROUP}, got {columns} columns")
    blocks = rows * columns // GROUP
    check(weight, "weight", (torch.uint8,), (rows, columns))
    check(scale, "scale", (torch.uint8, torch.float32), blocks_of(rows, columns, block))
    check(out, "out", (torch.uint8,), (rows, columns // GROUP * BLOCK_BYTES))
    if blocks == 0:
        return
    vectors = vector_ready(weight, out) and vectors_keep_to_scales(GROUP, rows, columns, block)
    tile = UNITS * int(UNIT_BLOCKS.value)
    # The words of the output; the last bytes may make no word.
    out_words = out.view(-1)[: out.numel() // 4 * 4].view(torch.int32) if vectors else out
    with on_device(weight), Counting(tally, weight.device) as counters:
        _fp8_to_q8_0[(triton.cdiv(blocks, tile),)](
            weight,
            weight.view(-1).view(torch.int32) if vectors else weight,
            scale,
            _multipliers(weight.device),
            out,
            out_words,
            counters,
            blocks,
            FLOAT_SCALE=scale.dtype == torch.float32,
            VECTORS=vectors,
            COLUMNS=columns,
            BLOCK_ROWS=block[0],
            BLOCK_COLUMNS=block[1],
            GROUP=GROUP,
            UNITS=UNITS,
            STORE_CACHE=STORE_CACHE,
            PARTS=careful(weight) // GROUP,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
