"""Triton twins of fp8_to_bf16 and fp4_to_bf16: same layouts, same bits, same counts, on CUDA tensors.

::

    fp8_to_bf16   weight u8 [R, C]      scale u8 or f32 [ceil(R/br), ceil(C/bc)]  ->  out u16 or bf16 [R, C]
    fp4_to_bf16   packed u8 [R, C/2]    scale u8 or f32 [ceil(R/br), ceil(C/bc)]  ->  out u16 or bf16 [R, C]

One thread makes 8 elements, one 16-byte store, from one 8-byte (e4m3) or 4-byte (e2m1) load and one
scale. Value and scale are powers of two apart, so a single exact multiplication decodes an element and
its upper half is the bfloat16.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Block
from .scalar import (
    E2M1_LIFT,
    E4M3_LIFT,
    NAN_CARRY,
    UPPER_HALF,
    AnyTally,
    Counting,
    blocks_of,
    careful,
    check,
    count_rounding,
    e2m1_in_f32,
    e2m1_value,
    e4m3_in_f32,
    e4m3_value,
    either,
    on_device,
    power_of_two,
    round_to_bf16,
    scale_byte,
    scale_of_elements,
    scale_of_vectors,
    scale_value,
    vector_ready,
    vectors_keep_to_scales,
)

# Elements in one 16-byte vector of the output, and words of two elements.
PER_VECTOR = tl.constexpr(8)
WORDS = tl.constexpr(4)

# Scale bytes for which the quick part is exact. Below, the smallest code's product falls under the lowest
# bfloat16 subnormal, 2^-133; above, the multiplier 2^(byte - 127 + lift) is no finite float32 (that
# comes first: the largest product would be finite up to byte 246).
E4M3_LOWEST_BYTE = tl.constexpr(9 - 133 + 127)
E2M1_LOWEST_BYTE = tl.constexpr(1 - 133 + 127)
BF16_MIN_NORMAL = tl.constexpr(2.0**-126)

# Among the best on an H200; see benchmarks/results.
TILE = 128
WARPS = 2
STORE_CACHE = ""

BF16_STORAGE = (torch.uint16, torch.int16, torch.bfloat16)


@triton.jit
def _carefully(
    codes,
    scale,
    out,
    counters,
    start,
    stop,
    FP4: tl.constexpr,
    FLOAT_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Decode elements ``start`` to ``stop`` one by one, rounding once, and count."""
    for part in range(0, (stop - start).to(tl.int32), CAREFUL):
        element = start + part + tl.arange(0, CAREFUL)
        live = element < stop
        held = scale_of_elements(scale, element, live, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        if FP4:
            packed = tl.load(codes + element // 2, mask=live, other=0).to(tl.int32)
            value = e2m1_value(packed >> ((element & 1) * 4).to(tl.int32))
        else:
            value = e4m3_value(tl.load(codes + element, mask=live, other=0).to(tl.int32))
        product = value.to(tl.float64) * scale_value(held, FLOAT_SCALE).to(tl.float64)
        bits = round_to_bf16(product)
        tl.store(out + element, bits.to(tl.int16), mask=live)
        kept = (bits << 16).to(tl.float32, bitcast=True)
        count_rounding(counters, product, kept, BF16_MIN_NORMAL, live)


@triton.jit
def _to_bf16(
    codes,
    code_groups,
    scale,
    out,
    out_words,
    counters,
    elements,
    FP4: tl.constexpr,
    FLOAT_SCALE: tl.constexpr,
    VECTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Decode a tile of ``elements`` codes; ``code_groups`` and ``out_words`` are views for the quick part."""
    # Triton passes small integers in 32 bits, which counts of elements near 2^31 would leave.
    elements = tl.cast(elements, tl.int64)
    tile = tl.cast(tl.program_id(0), tl.int64)
    start = tile * (TILE * PER_VECTOR)
    stop = tl.minimum(start + TILE * PER_VECTOR, elements)
    fall_back = tl.full((), 1, tl.int32)
    if VECTORS and stop - start == TILE * PER_VECTOR:
        lift: tl.constexpr = E2M1_LIFT if FP4 else E4M3_LIFT
        lowest: tl.constexpr = E2M1_LOWEST_BYTE if FP4 else E4M3_LOWEST_BYTE
        highest: tl.constexpr = 254 - lift
        vector = tl.arange(0, TILE)[:, None]
        word = vector * WORDS + tl.arange(0, WORDS)[None, :]
        held = scale_of_vectors(scale, tile, TILE, PER_VECTOR, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        byte = scale_byte(held, FLOAT_SCALE)
        needs_fallback = (byte < lowest) | (byte > highest)
        multiplier = power_of_two(byte - 127 + lift)[:, None]
        if FP4:
            group = tl.load(code_groups + tile * (TILE * WORDS) + word).to(tl.int32)
            low = e2m1_in_f32(group << 28) * multiplier
            high = e2m1_in_f32(group << 24) * multiplier
        else:
            group = tl.load(code_groups + tile * (TILE * 2) + vector * 2 + tl.arange(0, 2)[None, :])
            # Only the magnitude 0x7F carries into the sign's place when 1 is added.
            carried = (group & 0x7F7F7F7F) + 0x01010101
            needs_fallback |= (tl.reduce(carried, 1, either) & NAN_CARRY) != 0
            # Where the two elements of each output word start in an int32 of codes.
            to_top = 16 - (tl.arange(0, WORDS) % 2)[None, :] * 16
            group = tl.reshape(tl.join(group, group), [TILE, WORDS])
            low = e4m3_in_f32(group << (to_top + 8)) * multiplier
            high = e4m3_in_f32(group << to_top) * multiplier
        low_bits = low.to(tl.int32, bitcast=True)
        high_bits = high.to(tl.int32, bitcast=True)
        pair = ((low_bits >> 16) & 0xFFFF) | (high_bits & UPPER_HALF)
        tl.store(out_words + tile * (TILE * WORDS) + word, pair, cache_modifier=STORE_CACHE)
        fall_back = tl.max(needs_fallback.to(tl.int32), axis=0)
        # The careful part overwrites what other threads of this program wrote.
        tl.debug_barrier()
    if fall_back != 0:
        _carefully(
            codes, scale, out, counters, start, stop, FP4, FLOAT_SCALE, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, CAREFUL
        )


def fp8_to_bf16(weight: Tensor, scale: Tensor, block: Block, out: Tensor, scratch: object, tally: AnyTally) -> None:
    """Decode e4m3 [R, C] times a scale per ``block`` to bfloat16 [R, C]; as ``formats.e4m3.fp8_to_bf16``.

    Exact unless counted. ``scratch`` is not used.

    Raises:
        ValueError: tensors that do not belong together.
    """
    _launch(weight, weight.shape[1], scale, block, out, tally, fp4=False)


def fp4_to_bf16(packed: Tensor, scale: Tensor, block: Block, out: Tensor, scratch: object, tally: AnyTally) -> None:
    """Decode packed e2m1 [R, C/2] times a scale per ``block`` to bfloat16 [R, C]; as ``formats.e2m1.fp4_to_bf16``.

    Element 2i of a row is the low nibble of byte i. Exact unless counted. ``scratch`` is not used.

    Raises:
        ValueError: tensors that do not belong together.
    """
    _launch(packed, packed.shape[1] * 2, scale, block, out, tally, fp4=True)


def _launch(
    codes: Tensor, columns: int, scale: Tensor, block: Block, out: Tensor, tally: AnyTally, *, fp4: bool
) -> None:
    rows = codes.shape[0]
    check(codes, "codes", (torch.uint8,), (rows, codes.shape[1]))
    check(scale, "scale", (torch.uint8, torch.float32), blocks_of(rows, columns, block))
    check(out, "out", BF16_STORAGE, (rows, columns))
    elements = rows * columns
    if elements == 0:
        return
    per_vector = int(PER_VECTOR.value)
    vectors = vector_ready(codes, out) and vectors_keep_to_scales(per_vector, rows, columns, block)
    halves = out.view(torch.int16)
    grid = (triton.cdiv(elements, TILE * per_vector),)
    with on_device(codes), Counting(tally, codes.device) as counters:
        _to_bf16[grid](
            codes,
            codes.view(-1).view(torch.int32) if vectors and not fp4 else codes,
            scale,
            halves,
            halves.view(-1).view(torch.int32) if vectors else halves,
            counters,
            elements,
            FP4=fp4,
            FLOAT_SCALE=scale.dtype == torch.float32,
            VECTORS=vectors,
            COLUMNS=columns,
            BLOCK_ROWS=block[0],
            BLOCK_COLUMNS=block[1],
            TILE=TILE,
            STORE_CACHE=STORE_CACHE,
            CAREFUL=careful(codes),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
