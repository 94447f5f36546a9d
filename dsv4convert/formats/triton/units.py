"""How the Triton kernels write blocks of 17 and 34 bytes in whole words.

Four MXFP4 blocks and two Q8_0 blocks alike fill 68 bytes: 17 words, a *unit*. A kernel makes, where the
data is, the first word of each unit and the other 16, shifted into their places already. The 16 are
stored side by side, a run of 64 bytes in one instruction; the memory's cache joins the runs and the
first words before they go out. (Exchanging words between threads, so that every store is part of one
contiguous run, was slower for its barriers.)
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

UNIT_WORDS = tl.constexpr(17)
INNER_WORDS = tl.constexpr(16)


@triton.jit
def store_units(out_words, words, starts, UNITS: tl.constexpr, BLOCKS: tl.constexpr, CACHE: tl.constexpr):
    """Store ``UNITS`` units of ``BLOCKS`` blocks.

    int32 ``words`` [UNITS, 16]; ``starts`` [UNITS*BLOCKS], the first four bytes of every block.
    """
    place = tl.arange(0, UNITS)[:, None] * UNIT_WORDS + 1 + tl.arange(0, INNER_WORDS)[None, :]
    tl.store(out_words + place, words, cache_modifier=CACHE)
    block = tl.arange(0, UNITS * BLOCKS)
    tl.store(out_words + block // BLOCKS * UNIT_WORDS, starts, mask=block % BLOCKS == 0, cache_modifier=CACHE)


@triton.jit
def funnel(low, high, shift):
    """Return the low half of (high:low) >> shift of uint32; a shift by 32 is not defined, hence two."""
    return (low >> shift) | ((high << 1) << (31 - shift))
