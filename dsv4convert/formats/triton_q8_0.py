"""Triton twin of fp8_to_q8_0: same layouts, same bits, same counts, on CUDA tensors.

::

    fp8_to_q8_0   weight u8 [R, C]   scale u8 or f32 [ceil(R/br), ceil(C/bc)]   ->   out u8 [R, C/32*34]

The hot loop uses what ``formats.q8_0`` proves: with one power-of-two scale in a block, q is the value
times a multiplier that depends on the largest magnitude code only, rounded to nearest. Adding
1.5 * 2^23 rounds in float32 and leaves q in the lowest byte. d is amax/127 by true division. The careful
part is the plain formula. Two blocks of 34 bytes fill 17 words, and ``triton_units`` writes those.
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

from .base import GROUP, Block, Tally
from .e4m3 import PLACED_EXPONENT
from .q8_0 import BLOCK_BYTES, TABLE_FIRST_BYTE, multipliers
from .triton_scalar import (
    E4M3_LIFT,
    E4M3_NAN,
    E4M3_SHIFT_OUT,
    MAGNITUDE,
    NAN,
    OVERFLOW,
    UNDERFLOW,
    Counting,
    DeviceTally,
    blocks_of,
    careful,
    check,
    e4m3_in_f32,
    e4m3_value,
    on_device,
    power_of_two,
    programs,
    scale_byte,
    scale_of_elements,
    scale_of_vectors,
    scale_value,
    vector_ready,
    vectors_keep_to_scales,
)
from .triton_units import INNER_WORDS, UNIT_WORDS

UNIT_BLOCKS = tl.constexpr(2)
BLOCK_WORDS = tl.constexpr(8)
BLOCK_ELEMENTS = tl.constexpr(32)
BYTES_IN_BLOCK = tl.constexpr(BLOCK_BYTES)

LEVELS = tl.constexpr(127.0)
F16_NAN = tl.constexpr(0x7E00)
F16_INFINITY = tl.constexpr(0x7C00)
# 1.5 * 2^23: float32 has no fraction bits there, so that the addition rounds to nearest.
ROUNDER = tl.constexpr(1.5 * 2.0**23)

# Placed codes carry 2^-120. Half of it goes into the multipliers, as large as 127 * 2^9, and half into
# the values, and both stay float32 numbers.
HALF_LIFT = tl.constexpr(2.0 ** (PLACED_EXPONENT // 2))
LOWEST_BYTE = tl.constexpr(TABLE_FIRST_BYTE)
# Above, 2^(byte - 127 + 120) is no finite float32.
HIGHEST_BYTE = tl.constexpr(254 - PLACED_EXPONENT)

# Measured on an H200 (benchmarks/codecs_gpu.py --tune).
UNITS = 64
WARPS = 4
PROGRAMS_PER_PROCESSOR = 16
STORE_CACHE = ""


@triton.jit
def _quantised(words, BYTE: tl.constexpr, multiplier):
    """Return q, in the lowest byte of an int32, of the e4m3 codes in byte ``BYTE`` of int32 ``words``."""
    scaled = e4m3_in_f32(words << (24 - 8 * BYTE)) * HALF_LIFT * multiplier
    return (scaled + ROUNDER).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _output_words(words, d, position):
    """Return the words at ``position`` of a tile's output, from the q words [UNITS*16] and d [UNITS*2].

    ::

        word of a unit    0         1 ... 7               8              9 ... 16
        halves            d0 q      q1 q2 .. q13 q14      q15 d1         words 8 ... 15 as they are
    """
    unit = position // UNIT_WORDS
    inside = position - unit * UNIT_WORDS
    at = unit * INNER_WORDS
    before = tl.gather(words, at + tl.maximum(inside - 1, 0), 0)
    here = tl.gather(words, at + tl.minimum(inside, INNER_WORDS - 1), 0)
    scale = tl.gather(d, unit * UNIT_BLOCKS + (inside == BLOCK_WORDS).to(tl.int32), 0)
    low = tl.where(inside == 0, scale, (before >> 16) & 0xFFFF)
    high = tl.where(inside == BLOCK_WORDS, scale, here)
    return tl.where(inside > BLOCK_WORDS, before, low | (high << 16))


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
    CAREFUL: tl.constexpr,
):
    """Quantise ``blocks`` blocks; ``weight_words`` and ``out_words`` are 32-bit views for the hot loop."""
    first = tl.program_id(0)
    step = tl.num_programs(0)
    tile_blocks: tl.constexpr = UNITS * 2
    tiles = tl.cdiv(blocks, tile_blocks)
    if VECTORS:
        unsound = tl.zeros([tile_blocks], tl.int32)
        block = tl.arange(0, tile_blocks)
        word = block[:, None] * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
        main = tl.arange(0, UNITS * INNER_WORDS)
        rest = UNITS * INNER_WORDS + tl.arange(0, UNITS)
        for tile in range(first, tiles, step):
            base = tl.cast(tile, tl.int64) * tile_blocks
            left = tl.minimum(blocks - base, tile_blocks).to(tl.int32)
            live = block < left
            held = scale_of_vectors(scale, base, block, live, GROUP, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
            byte = scale_byte(held, FLOAT_SCALE)
            codes = tl.load(weight_words + base * BLOCK_WORDS + word, mask=live[:, None], other=0)
            # Placed magnitudes are ordered as the numbers that they stand for.
            even = tl.maximum(e4m3_magnitude(codes << 24), e4m3_magnitude(codes << 8))
            odd = tl.maximum(e4m3_magnitude(codes << 16), e4m3_magnitude(codes))
            placed = tl.max(tl.maximum(even, odd), axis=1)
            largest = placed >> E4M3_SHIFT_OUT
            amax = placed.to(tl.float32, bitcast=True) * power_of_two(byte - 127 + E4M3_LIFT)
            d = tl.div_rn(amax, LEVELS).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            strange = (byte < LOWEST_BYTE) | (byte > HIGHEST_BYTE) | (largest == E4M3_NAN)
            strange |= ((d == 0) & (largest > 0)) | (d == F16_INFINITY)
            unsound |= (strange & live).to(tl.int32)
            multiplier = tl.load(multipliers + largest)[:, None]
            q = _quantised(codes, 0, multiplier) | (_quantised(codes, 1, multiplier) << 8)
            q |= (_quantised(codes, 2, multiplier) << 16) | (_quantised(codes, 3, multiplier) << 24)
            q = tl.reshape(q, [UNITS * INNER_WORDS])
            target = out_words + tl.cast(tile, tl.int64) * (UNITS * UNIT_WORDS)
            # An odd block at the very end is left to the careful part.
            here = (left // UNIT_BLOCKS) * UNIT_WORDS
            tl.store(target + main, _output_words(q, d, main), mask=main < here, cache_modifier=STORE_CACHE)
            tl.store(target + rest, _output_words(q, d, rest), mask=rest < here, cache_modifier=STORE_CACHE)
            unsound |= (((left % UNIT_BLOCKS) != 0) & (block == 0)).to(tl.int32)
        go_over = tl.max(unsound, axis=0) != 0
        # The second pass overwrites what other threads of this program wrote.
        tl.debug_barrier()
    else:
        go_over = True
    if go_over:
        careful_blocks: tl.constexpr = CAREFUL // 32
        inside = tl.arange(0, BLOCK_ELEMENTS)[None, :]
        for tile in range(first, tiles, step):
            start = tl.cast(tile, tl.int64) * tile_blocks
            stop = tl.minimum(start + tile_blocks, blocks)
            for part in range(0, (stop - start).to(tl.int32), careful_blocks):
                number = start + part + tl.arange(0, careful_blocks)
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
                scale_f32 = tl.div_rn(amax, LEVELS)
                inverse = tl.where(scale_f32 == 0.0, 0.0, tl.div_rn(1.0, scale_f32))
                usable = (tl.abs(inverse) < float("inf")) & (amax < float("inf")) & (nans == 0)
                exact = tl.where(usable[:, None], x, 0.0) * tl.where(usable, inverse, 0.0)[:, None]
                whole = exact.to(tl.int32)
                twice = (exact - whole.to(tl.float32)) * 2.0
                q = whole + twice.to(tl.int32)
                d = scale_f32.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
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
def e4m3_magnitude(top):
    """Return the int32 bits of the magnitude of ``e4m3_in_f32(top)``."""
    return e4m3_in_f32(top).to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def add(counter, number):
    """Add an int32 to a counter, unless it is 0."""
    if number > 0:
        tl.atomic_add(counter, number.to(tl.int64))


@cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """Return the multipliers with half the lift on the device, one for each largest magnitude code."""
    return torch.from_numpy(multipliers() * np.float32(2.0 ** (PLACED_EXPONENT // 2))).to(device)


def fp8_to_q8_0(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: Block,
    out: torch.Tensor,
    scratch: object,
    tally: Tally | DeviceTally,
) -> None:
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
    vectors = vector_ready(weight, out) and vectors_keep_to_scales(GROUP, columns, block)
    tile = UNITS * int(UNIT_BLOCKS.value)
    # The words of the output's whole units; an odd block's last bytes may make no word.
    out_words = out.view(-1)[: out.numel() // 4 * 4].view(torch.int32) if vectors else out
    with on_device(weight), Counting(tally, weight.device) as counters:
        _fp8_to_q8_0[(programs(weight, triton.cdiv(blocks, tile), PROGRAMS_PER_PROCESSOR),)](
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
            CAREFUL=careful(weight),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
