"""How the Triton kernels write blocks of 17 and 34 bytes in whole words.

Four MXFP4 blocks and two Q8_0 blocks alike fill 68 bytes: 17 words, a *unit*. A kernel makes the
first word of each unit (`leads`) and the other 16 (`words`) where the data is, already shifted
into their places; 16 is a power of two and 17 is not, so the words then change threads through shared
memory, and every store is a full-width, aligned part of one contiguous run.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

UNIT_WORDS = tl.constexpr(17)
INNER_WORDS = tl.constexpr(16)
UNIT_BYTES = 68


@triton.jit
def _exchange(words, starts, position, BLOCKS: tl.constexpr):
    """Return the words at ``position`` of a tile's output."""
    unit = position // UNIT_WORDS
    inside = position - unit * UNIT_WORDS
    inner = tl.gather(words, unit * INNER_WORDS + tl.maximum(inside - 1, 0), 0)
    lead = tl.gather(starts, unit * BLOCKS, 0)
    return tl.where(inside == 0, lead, inner)


@triton.jit
def store_units(out_words, words, starts, units, UNITS: tl.constexpr, BLOCKS: tl.constexpr, CACHE: tl.constexpr):
    """Store the first ``units`` of ``UNITS`` units of ``BLOCKS`` blocks.

    int32 ``words`` [UNITS*16]; ``starts`` [UNITS*BLOCKS], the first four bytes of every block.
    """
    position = tl.arange(0, UNITS * INNER_WORDS)
    made = _exchange(words, starts, position, BLOCKS)
    tl.store(out_words + position, made, mask=position < units * UNIT_WORDS, cache_modifier=CACHE)
    position = UNITS * INNER_WORDS + tl.arange(0, UNITS)
    made = _exchange(words, starts, position, BLOCKS)
    tl.store(out_words + position, made, mask=position < units * UNIT_WORDS, cache_modifier=CACHE)


@triton.jit
def store_units_scattered(
    out_words, words, starts, units, UNITS: tl.constexpr, BLOCKS: tl.constexpr, CACHE: tl.constexpr
):
    """As ``store_units``, without the exchange."""
    unit = tl.arange(0, UNITS)[:, None]
    word = tl.arange(0, INNER_WORDS)[None, :]
    made = tl.reshape(words, [UNITS, INNER_WORDS])
    tl.store(out_words + unit * UNIT_WORDS + 1 + word, made, mask=(unit < units) & (word < INNER_WORDS))
    block = tl.arange(0, UNITS * BLOCKS)
    leads = (block % BLOCKS == 0) & (block < units * BLOCKS)
    tl.store(out_words + block // BLOCKS * UNIT_WORDS, starts, mask=leads)


@triton.jit
def funnel(low, high, shift):
    """Return the low half of (high:low) >> shift of uint32; a shift by 32 is not defined, hence two."""
    return (low >> shift) | ((high << 1) << (31 - shift))
