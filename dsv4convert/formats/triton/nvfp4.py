"""Triton twin of nvfp4_to_bf16: same layouts, same bits, same counts, on CUDA tensors.

::

    nvfp4_to_bf16   packed u8 [R, C/2]   scale e4m3 u8 [R, C/16]   second f32   ->   out bfloat16 [R, C]

The scales of NVFP4 are hardly ever powers of two, so there is no part that assumes it: every product is made in
float64 and rounded once. What each e4m3 code is under the second scale comes from a table of 256 float32, so that its
rounding is numpy's.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nvfp4 import BLOCK, block_scales
from .bf16 import BF16_MIN_NORMAL, BF16_STORAGE
from .scalar import (
    AnyTally,
    Counting,
    careful,
    check,
    count_rounding,
    e2m1_value,
    on_device,
    round_to_bf16,
)

BLOCK_BYTES = tl.constexpr(8)  # of a scale's codes
NIBBLE_BITS = tl.constexpr(4)


@triton.jit
def _kept(counters, value, scale, live):
    """Return the bfloat16 bits (int32) of values times their scales, and count what rounding did."""
    product = value.to(tl.float64) * scale
    bits = round_to_bf16(product)
    count_rounding(counters, product, (bits << 16).to(tl.float32, bitcast=True), BF16_MIN_NORMAL, live)
    return bits


@triton.jit
def _nvfp4_to_bf16(packed, scale, table, out, counters, size, BYTES: tl.constexpr):
    """Decode ``BYTES`` bytes of packed codes, which lie in the order of their scales, so that rows do not matter."""
    size = tl.cast(size, tl.int64)
    byte = tl.cast(tl.program_id(0), tl.int64) * BYTES + tl.arange(0, BYTES)
    live = byte < size
    codes = tl.load(packed + byte, mask=live, other=0).to(tl.int32)
    held = tl.load(scale + byte // BLOCK_BYTES, mask=live, other=0).to(tl.int32)
    factor = tl.load(table + held, mask=live, other=0.0).to(tl.float64)
    low = _kept(counters, e2m1_value(codes), factor, live)
    high = _kept(counters, e2m1_value(codes >> NIBBLE_BITS), factor, live)
    tl.store(out + 2 * byte, low.to(tl.int16), mask=live)
    tl.store(out + 2 * byte + 1, high.to(tl.int16), mask=live)


def nvfp4_to_bf16(
    packed: Tensor, scale: Tensor, second: float, is_reciprocal: bool, out: Tensor, scratch: object, tally: AnyTally
) -> None:
    """Decode NVFP4 [R, C/2], e4m3 scales [R, C/16] under a second scale, to bfloat16 [R, C].

    As ``formats.nvfp4.nvfp4_to_bf16``. ``scratch`` is not used.

    Raises:
        ValueError: tensors that do not belong together.
    """
    rows, half = packed.shape
    columns = 2 * half
    if columns % BLOCK:
        raise ValueError(f"NVFP4 rows come in blocks of {BLOCK}, got {columns} columns")
    check(packed, "packed", (torch.uint8,), (rows, half))
    check(scale, "scale", (torch.uint8,), (rows, columns // BLOCK))
    check(out, "out", BF16_STORAGE, (rows, columns))
    if packed.numel() == 0:
        return
    table = torch.from_numpy(block_scales(second, is_reciprocal).copy()).to(packed.device)
    size = careful(packed)
    with on_device(packed), Counting(tally, packed.device) as counters:
        _nvfp4_to_bf16[(triton.cdiv(packed.numel(), size),)](
            packed, scale, table, out.view(torch.int16), counters, packed.numel(), BYTES=size, enable_fp_fusion=False
        )
