"""Triton twin of fp4_to_fp8: same layouts, same bits, same counts, on CUDA tensors.

::

    fp4_to_fp8   packed u8 [R, C/2]   scale u8 [R, C/32]
                 ->   out u8 [R, C]   out_scale u8 [ceil(R/128), ceil(C/128)]

Two launches: the tiles' scales, then the codes. The quick part re-encodes four elements at a time in the
bytes of one word. With s eem an e2m1 code and `lift` its scale relative to its tile's, as a power of
two from -5 to 6, every result is a normal e4m3 number, so only exponents are added:

::

    magnitude code    0        1 (0.5)           2 ... 7
    e4m3              0        (lift + 6) << 3   (eem << 2) + ((lift + 6) << 3)
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import GROUP
from .scalar import (
    CHANGED,
    E4M3_NAN,
    E4M3_SHIFT_OUT,
    E8M0_NAN,
    MAGNITUDE,
    NAN,
    AnyTally,
    Counting,
    blocks_of,
    careful,
    check,
    count,
    e2m1_value,
    e4m3_value,
    on_device,
    power_of_two,
    scale_of_elements,
    scale_of_vectors,
    vector_ready,
    vectors_keep_to_scales,
)

FP8_TILE = 128
# 6 * 2^6 = 384 fits under e4m3's 448.
HEADROOM = tl.constexpr(6)

# Elements in one 16-byte vector of the output.
PER_VECTOR = tl.constexpr(16)
WORDS = tl.constexpr(4)

# An e2m1 code's 1.0 has the exponent field 1; e4m3's bias is 6 more.
REBIAS = tl.constexpr(6)
LOWEST_EXPONENT = tl.constexpr(1)
HIGHEST_EXPONENT = tl.constexpr(6 + 6)

ONES = tl.constexpr(0x01010101)
LOW_BYTES = tl.constexpr(0x00FF00FF)
LOW_NIBBLES = tl.constexpr(0x0F0F0F0F)

# What rounds a float32 to e4m3's bits, to nearest even; 2^(7 - 127) has put them in their place.
E4M3_JUST_UNDER_HALF = tl.constexpr((1 << 19) - 1)
E4M3_PLACE = tl.constexpr(2.0 ** (7 - 127))
# A lift this low turns every element into zero, and keeps the arithmetic on the way exact in float32.
NO_LIFT = tl.constexpr(-25)

# Among the best on an H200; see benchmarks/results.
TILE = 256
WARPS = 1
STORE_CACHE = ""
SCALE_TILES = 8
SCALE_WARPS = 4


@triton.jit
def _tile_scales(
    scale, out_scale, rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SIDE: tl.constexpr, TILES: tl.constexpr
):
    """Fill the scales of ``TILES`` tiles in a row of tiles: the largest scale that is no NaN, over 2^HEADROOM."""
    scale_columns: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    tile_columns: tl.constexpr = (COLUMNS + SIDE - 1) // SIDE
    groups: tl.constexpr = SIDE // GROUP
    tile_row = tl.cast(tl.program_id(0), tl.int64)
    first_tile = tl.program_id(1) * TILES
    row = tile_row * SIDE + tl.arange(0, SIDE)[:, None]
    column = first_tile * groups + tl.arange(0, TILES * groups)[None, :]
    live = (row < rows) & (column < scale_columns)
    byte = tl.load(scale + row * scale_columns + column, mask=live, other=E8M0_NAN).to(tl.int32)
    largest = tl.max(tl.where(byte == E8M0_NAN, -1, byte), axis=0)
    largest = tl.max(tl.reshape(largest, [TILES, groups]), axis=1)
    made = tl.where(largest < 0, E8M0_NAN, tl.maximum(largest - HEADROOM, 0))
    tile = first_tile + tl.arange(0, TILES)
    tl.store(out_scale + tile_row * tile_columns + tile, made.to(tl.uint8), mask=tile < tile_columns)


@triton.jit
def _carefully(
    packed,
    scale,
    out,
    out_scale,
    counters,
    start,
    stop,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Re-encode elements ``start`` to ``stop`` one by one, rounding to nearest even, and count."""
    for part in range(0, (stop - start).to(tl.int32), CAREFUL):
        element = start + part + tl.arange(0, CAREFUL)
        live = element < stop
        pair = tl.load(packed + element // 2, mask=live, other=0).to(tl.int32)
        value = e2m1_value(pair >> ((element & 1) * 4).to(tl.int32))
        byte = scale_of_elements(scale, element, live, COLUMNS, 1, GROUP).to(tl.int32)
        tile_byte = scale_of_elements(out_scale, element, live, COLUMNS, SIDE, SIDE).to(tl.int32)
        lift = tl.minimum(tl.maximum(byte - tile_byte, NO_LIFT), HEADROOM)
        lifted = value * power_of_two(lift)
        bits = (lifted * E4M3_PLACE).to(tl.int32, bitcast=True)
        size = bits & MAGNITUDE
        size = (size + E4M3_JUST_UNDER_HALF + ((size >> E4M3_SHIFT_OUT) & 1)) >> E4M3_SHIFT_OUT
        nan = byte == E8M0_NAN
        made = tl.where(nan, E4M3_NAN, size | ((bits >> 24) & 0x80))
        tl.store(out + element, made.to(tl.uint8), mask=live)
        count(counters, NAN, nan & live)
        count(counters, CHANGED, (e4m3_value(made) != lifted) & (byte != E8M0_NAN) & live)


@triton.jit
def _fp4_to_fp8(
    packed,
    packed_quads,
    scale,
    out,
    out_words,
    out_scale,
    counters,
    elements,
    VECTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Re-encode a tile of ``elements`` codes; ``packed_quads`` and ``out_words`` are views for the quick part."""
    # Triton passes small integers in 32 bits, which counts of elements near 2^31 would leave.
    elements = tl.cast(elements, tl.int64)
    tile = tl.cast(tl.program_id(0), tl.int64)
    start = tile * (TILE * PER_VECTOR)
    stop = tl.minimum(start + TILE * PER_VECTOR, elements)
    fall_back = tl.full((), 1, tl.int32)
    if VECTORS and stop - start == TILE * PER_VECTOR:
        word = tl.arange(0, TILE)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        byte = scale_of_vectors(scale, tile, TILE, PER_VECTOR, COLUMNS, 1, GROUP).to(tl.int32)
        tile_byte = scale_of_vectors(out_scale, tile, TILE, PER_VECTOR, COLUMNS, SIDE, SIDE).to(tl.int32)
        exponent = byte - tile_byte + REBIAS
        needs_fallback = (exponent < LOWEST_EXPONENT) | (exponent > HIGHEST_EXPONENT) | (byte == E8M0_NAN)
        quad = tl.load(packed_quads + tile * (TILE * WORDS) + word).to(tl.int32)
        code = quad & 0xFFFF
        code = (code | (code << 8)) & LOW_BYTES
        code = (code | (code << 4)) & LOW_NIBBLES
        magnitude = code & (ONES * 7)
        nonzero = ((magnitude + ONES * 7) >> 3) & ONES
        from_one = ((magnitude + ONES * 6) >> 3) & ONES
        # 0.5 is the one subnormal: its lowest bit stands for the 1 that e4m3 does not write.
        made = (magnitude << 2) + nonzero * ((exponent << 3) - 4)[:, None] + (from_one << 2)
        made |= (code & (ONES * 8)) << 4
        tl.store(out_words + tile * (TILE * WORDS) + word, made, cache_modifier=STORE_CACHE)
        fall_back = tl.max(needs_fallback.to(tl.int32), axis=0)
        # The careful part overwrites what other threads of this program wrote.
        tl.debug_barrier()
    if fall_back != 0:
        _carefully(packed, scale, out, out_scale, counters, start, stop, COLUMNS, GROUP, SIDE, CAREFUL)


def fp4_to_fp8(packed: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, scratch: object, tally: AnyTally) -> None:
    """Re-encode packed FP4 [R, C/2], scales [R, C/32], as e4m3 [R, C] with one scale per 128x128 tile.

    As ``formats.e2m1.fp4_to_fp8``: elements that do not survive are counted as changed. ``scratch`` is
    not used.

    Raises:
        ValueError: tensors that do not belong together.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    tiles_down, tiles_across = blocks_of(rows, columns, (FP8_TILE, FP8_TILE))
    check(packed, "packed", (torch.uint8,), (rows, columns // 2))
    check(scale, "scale", (torch.uint8,), blocks_of(rows, columns, (1, GROUP)))
    check(out, "out", (torch.uint8,), (rows, columns))
    check(out_scale, "out_scale", (torch.uint8,), (tiles_down, tiles_across))
    elements = rows * columns
    if elements == 0:
        return
    per_vector = int(PER_VECTOR.value)
    vectors = vector_ready(packed, out) and vectors_keep_to_scales(per_vector, rows, columns, (1, GROUP))
    with on_device(packed), Counting(tally, packed.device) as counters:
        _tile_scales[(tiles_down, triton.cdiv(tiles_across, SCALE_TILES))](
            scale,
            out_scale,
            rows,
            COLUMNS=columns,
            GROUP=GROUP,
            SIDE=FP8_TILE,
            TILES=SCALE_TILES,
            num_warps=SCALE_WARPS,
        )
        _fp4_to_fp8[(triton.cdiv(elements, TILE * per_vector),)](
            packed,
            packed.view(-1).view(torch.int16) if vectors else packed,
            scale,
            out,
            out.view(-1).view(torch.int32) if vectors else out,
            out_scale,
            counters,
            elements,
            VECTORS=vectors,
            COLUMNS=columns,
            GROUP=GROUP,
            SIDE=FP8_TILE,
            TILE=TILE,
            STORE_CACHE=STORE_CACHE,
            CAREFUL=careful(packed),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
