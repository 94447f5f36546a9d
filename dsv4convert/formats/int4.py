"""Integers of four bits with a float scale, and at times a zero point, for a group of a row.

::

    value = (nibble - zero) * scale          zero is 8 where there are no zero points

compressed-tensors keeps them as I32 [R, C/8], element i of each word in bits 4i to 4i + 3: as little-endian bytes,
[R, C/2] with element 2i in the low nibble and element 2i+1 in the high one. Zero points are packed so along the rows,
I32 [ceil(R/8), groups]. Its "int4" of -8 to 7 is the nibble less 8, and so is its zero point.
"""

from __future__ import annotations

import numpy as np

from dsv4convert.formats.base import Array, Block, Scratch, Tally, check_tile
from dsv4convert.formats.bf16 import store_products
from dsv4convert.formats.e2m1 import unpack_e2m1
from dsv4convert.formats.e4m3 import spread_blocks

PER_WORD = 8  # elements in 32 bits
BITS = 4
SYMMETRIC_ZERO = 8
_NIBBLE = 0xF


def int4_to_float(
    packed: Array, scale: Array, zero: Array | None, block: Block, out: Array, scratch: Scratch, tally: Tally
) -> None:
    """Decode nibbles [R, C/2] times their scales to float32, float16 or bfloat16 bits [R, C].

    ``scale`` [ceil(R/block[0]), ceil(C/block[1])] is float32; ``zero``, of the same shape, holds zero points (see
    ``unpack_zeros``), None where all are 8. The exact product is rounded once, and counted where that
    changed it. Raises ValueError on shapes that do not fit.

    >>> out = np.empty((1, 2), np.float32)
    >>> int4_to_float(np.array([[0xF0]], np.uint8), np.ones((1, 1), np.float32), None, (1, 2), out, Scratch(), Tally())
    >>> out.tolist()
    [[-8.0, 7.0]]
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    check_tile(rows, columns, scale, block, out, (rows, columns))
    codes = unpack_e2m1(packed).astype(np.float64)
    if zero is None:
        codes -= SYMMETRIC_ZERO
    else:
        if zero.shape != scale.shape:
            raise ValueError(f"zero points of a {rows}x{columns} tile: expected {scale.shape}, got {zero.shape}")
        codes -= spread_blocks(zero.astype(np.float64), block, codes.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        codes *= spread_blocks(scale.astype(np.float64), block, codes.shape)
    store_products(codes, out, scratch, tally)


def unpack_zeros(words: Array, rows: int) -> Array:
    """Return the zero points [rows, groups] of words [ceil(rows/8), groups], which hold eight rows each.

    >>> unpack_zeros(np.array([[0x21]], np.int32), 3).tolist()
    [[1], [2], [0]]
    """
    shifts = np.arange(0, BITS * PER_WORD, BITS, dtype=np.uint32)[None, :, None]
    nibbles = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32(_NIBBLE)
    zeros: Array = nibbles.reshape(-1, words.shape[1])[:rows].astype(np.uint8)
    return zeros
