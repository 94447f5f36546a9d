"""Triton twin of fp4_to_mxfp4: same layouts, same bits, same counts, on CUDA tensors.

::

    fp4_to_mxfp4   packed u8 [R, C/2]   scale u8 [R, C/32]   ->   out u8 [R, C/32*17]

Both sides lie in the order of their blocks, so rows do not matter. A block of 17 bytes starts anywhere
in a word; four of them fill 17 words, and ``units`` writes those.
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
from .scalar import E8M0_NAN, NAN, AnyTally, Counting, careful, check, on_device, vector_ready
from .units import INNER_WORDS, UNIT_WORDS, funnel, store_units

BLOCK_BYTES = tl.constexpr(1 + 16)
CODES_BYTES = tl.constexpr(16)
BLOCK_ELEMENTS = tl.constexpr(32)
UNIT_BLOCKS = tl.constexpr(4)
LOW_NIBBLES = tl.constexpr(0x0F0F0F0F)
HIGH_NIBBLES = tl.constexpr(0xF0F0F0F0)

# Among the best on an H200; see benchmarks/results.
UNITS = 32
WARPS = 4
STORE_CACHE = ""


@triton.jit
def _alternate(low, high):
    """Return the word of bytes low0, high0, low1, high1 of two uint32."""
    return (low & 0xFF) | ((high & 0xFF) << 8) | ((low & 0xFF00) << 8) | ((high & 0xFF00) << 16)


@triton.jit
def _byte_by_byte(packed, scale, out, counters, start, stop, PARTS: tl.constexpr):
    """Rearrange blocks ``start`` to ``stop``, ``PARTS`` at a time."""
    place = tl.arange(0, BLOCK_ELEMENTS)[None, :]
    for part in range(0, (stop - start).to(tl.int32), PARTS):
        number = start + part + tl.arange(0, PARTS)[:, None]
        live = (number < stop) & (place < BLOCK_BYTES)
        of_codes = tl.maximum(place - 1, 0)
        source = packed + number * CODES_BYTES + of_codes // 2
        early = tl.load(source, mask=live, other=0).to(tl.int32)
        late = tl.load(source + CODES_BYTES // 2, mask=live, other=0).to(tl.int32)
        nibble = (of_codes % 2) * 4
        made = ((early >> nibble) & 0xF) | (((late >> nibble) & 0xF) << 4)
        byte = tl.load(scale + number + place * 0, mask=live, other=0).to(tl.int32)
        made = tl.where(place == 0, byte, made)
        tl.store(out + number * BLOCK_BYTES + place, made.to(tl.uint8), mask=live)
        count_blocks(counters, tl.sum(tl.sum(((byte == E8M0_NAN) & (place == 0)).to(tl.int32), axis=1), axis=0))


@triton.jit
def _fp4_to_mxfp4(
    packed,
    packed_words,
    scale,
    out,
    out_words,
    counters,
    blocks,
    VECTORS: tl.constexpr,
    UNITS: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Rearrange a tile of ``blocks`` blocks; ``packed_words`` and ``out_words`` are views for the quick part."""
    # Triton passes small integers in 32 bits, which counts of blocks might leave.
    blocks = tl.cast(blocks, tl.int64)
    tile = tl.cast(tl.program_id(0), tl.int64)
    start = tile * (UNITS * UNIT_BLOCKS)
    stop = tl.minimum(start + UNITS * UNIT_BLOCKS, blocks)
    if VECTORS and stop - start == UNITS * UNIT_BLOCKS:
        block = tl.arange(0, UNITS * UNIT_BLOCKS)
        half = tl.arange(0, 2)[None, :]
        word = block[:, None] * 4 + half
        byte = tl.load(scale + start + block).to(tl.uint32)
        # Bytes 0-7 of a block hold elements 0-15, two a byte; bytes 8-15 elements 16-31.
        a = tl.load(packed_words + start * 4 + word).to(tl.uint32, bitcast=True)
        b = tl.load(packed_words + start * 4 + 2 + word).to(tl.uint32, bitcast=True)
        even = (a & LOW_NIBBLES) | ((b & LOW_NIBBLES) << 4)
        odd = ((a >> 4) & LOW_NIBBLES) | (b & HIGH_NIBBLES)
        # Words 0 and 2 of the block's codes, and words 1 and 3.
        left = _alternate(even, odd)
        right = _alternate(even >> 16, odd >> 16)
        word_0 = tl.sum(tl.where(half == 0, left, 0), axis=1)
        word_2 = tl.sum(tl.where(half == 1, left, 0), axis=1)
        starts = byte | (word_0 << 8)
        # Of a unit's 17 words, word 4j + k + 1 starts at byte 4k + 3 - j of block j's codes. Behind the
        # last block's codes nothing follows: its shift is 0.
        shift = (24 - (block % UNIT_BLOCKS) * 8).to(tl.uint32)[:, None]
        following = tl.minimum(tl.arange(0, UNIT_BLOCKS) + 1, UNIT_BLOCKS - 1)[None, :] + tl.zeros([UNITS, 1], tl.int32)
        next_start = tl.gather(tl.reshape(starts, [UNITS, UNIT_BLOCKS]), following, 1)
        next_start = tl.reshape(next_start, [UNITS * UNIT_BLOCKS])
        after_right = tl.where(half == 0, word_2[:, None], next_start[:, None])
        inner = tl.join(funnel(left, right, shift), funnel(right, after_right, shift))
        inner = tl.reshape(inner, [UNITS, INNER_WORDS]).to(tl.int32, bitcast=True)
        target = out_words + tile * (UNITS * UNIT_WORDS)
        store_units(target, inner, starts.to(tl.int32, bitcast=True), UNITS, UNIT_BLOCKS, STORE_CACHE)
        count_blocks(counters, tl.sum((byte == E8M0_NAN).to(tl.int32), axis=0))
    else:
        _byte_by_byte(packed, scale, out, counters, start, stop, PARTS)


@triton.jit
def count_blocks(counters, nan_blocks):
    """Count the elements of ``nan_blocks`` blocks as NaN."""
    if nan_blocks > 0:
        tl.atomic_add(counters + NAN, nan_blocks.to(tl.int64) * BLOCK_ELEMENTS)


def fp4_to_mxfp4(packed: Tensor, scale: Tensor, out: Tensor, scratch: object, tally: AnyTally) -> None:
    """Rearrange packed FP4 [R, C/2], e8m0 scales [R, C/32], to MXFP4 blocks [R, C/32*17].

    As ``formats.mxfp4.fp4_to_mxfp4``: lossless, moves bits only; elements under a NaN scale are counted.
    ``scratch`` is not used.

    Raises:
        ValueError: tensors that do not belong together.
    """
    rows, half = packed.shape
    groups = 2 * half // GROUP
    if 2 * half % GROUP:
        raise ValueError(f"MXFP4 rows come in groups of {GROUP}, got {2 * half} columns")
    check(packed, "packed", (torch.uint8,), (rows, half))
    check(scale, "scale", (torch.uint8,), (rows, groups))
    check(out, "out", (torch.uint8,), (rows, groups * int(BLOCK_BYTES.value)))
    blocks = rows * groups
    if blocks == 0:
        return
    vectors = vector_ready(packed, out)
    tile = UNITS * int(UNIT_BLOCKS.value)
    # The words of the output's whole tiles; the last bytes may make no word.
    out_words = out.view(-1)[: out.numel() // 4 * 4].view(torch.int32) if vectors else out
    with on_device(packed), Counting(tally, packed.device) as counters:
        _fp4_to_mxfp4[(triton.cdiv(blocks, tile),)](
            packed,
            packed.view(-1).view(torch.int32) if vectors else packed,
            scale,
            out,
            out_words,
            counters,
            blocks,
            VECTORS=vectors,
            UNITS=UNITS,
            STORE_CACHE=STORE_CACHE,
            PARTS=careful(packed) // GROUP,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
