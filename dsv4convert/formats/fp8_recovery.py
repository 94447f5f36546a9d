"""Finds the FP8 codes and block scales that a BF16 weight was decoded from, where there are any.

Decoding FP8 to BF16 loses no value, but several pairs of codes and scale can stand for the same values:
a block whose largest code is at most 224 could as well have half the scale and codes twice as large. The
choice here is that of the published quantiser: the smallest power of two with amax / scale <= 448. So
whatever was quantised that way comes back byte for byte, and any other block comes back with the same
values. The smallest scale is also the finest, so where it does not fit, no other does.

What is lost for good: the scale of a block of zeros (here 2^-126), and the sign of NaN.
"""

from __future__ import annotations

import numpy as np

from ..errors import LossyError
from .base import ArrayU8, ArrayU16, Block, Scratch, Tally
from .bf16 import bf16_to_f32
from .e4m3 import fp8_to_bf16, quantise_fp8


def bf16_to_fp8_exactly(bits: ArrayU16, block: Block) -> tuple[ArrayU8, ArrayU8]:
    """Return (e4m3 codes [R, C], e8m0 scales per block) whose product is ``bits`` [R, C], bit for bit.

    >>> codes, scale = bf16_to_fp8_exactly(np.array([[0x3F80, 0xC040, 0x8000]], np.uint16), (128, 128))
    >>> [hex(code) for code in codes[0]], scale.tolist()  # 1.0, -3.0 and -0.0
    (['0x70', '0xfc', '0x80'], [[120]])

    Raises:
        LossyError: no codes and power-of-two scale make these values.
    """
    values = np.empty(bits.shape, np.float32)
    scratch = Scratch()
    bf16_to_f32(bits, values, scratch, Tally())
    if not np.isfinite(values).all():
        raise LossyError("cannot be FP8: NaN or infinity", hint="keep the tensor in BF16")
    codes, scale = quantise_fp8(values, block)
    again = np.empty_like(bits)
    fp8_to_bf16(codes, scale, block, again, scratch, Tally())
    differ = np.argwhere(again != bits)
    if differ.size:
        row, column = (int(index) for index in differ[0])
        raise LossyError(
            "cannot be FP8 without rounding",
            expected=f"{block[0]}x{block[1]} blocks of e4m3 values times a power of two",
            got=f"{values[row, column]} at row {row}, column {column} of a tile ({len(differ)} such elements)",
            hint="keep the tensor in BF16",
        )
    return codes, scale
