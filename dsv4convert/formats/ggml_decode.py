"""Blocks of ggml's types decoded to float32: by the gguf package, and here where it cannot.

Layout of the blocks that are decoded here, little-endian:

    q1_0, 128 elements: float16 d, then 128 bits, lowest first; 1 is d, 0 is -d
    q2_0,  64 elements: float16 d, then 64 codes of two bits, lowest first; code c is (c - 1) * d

Exact: a code times a float16 is a float32.
"""

from __future__ import annotations

import numpy as np

from dsv4convert.formats.base import ArrayF32, ArrayU8
from dsv4convert.formats.ggml_types import BY_NAME

SCALE_BYTES = 2
BITS = {"q1_0": 1, "q2_0": 2}


def dequantise(name: str, raw: ArrayU8) -> ArrayF32:
    """Return the float32 values [rows, columns] of rows ``raw`` [rows, row bytes] of the type ``name``.

    >>> block = np.array([[0x00, 0x3E, 0b101] + [0] * 15], np.uint8)
    >>> dequantise("q1_0", block)[0, :4].tolist()
    [1.5, -1.5, 1.5, -1.5]
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite is for the caller to judge
        if name in BITS:
            return _of_few_bits(raw, BY_NAME[name].nbytes, BITS[name])
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values: ArrayF32 = dequantize(raw, GGMLQuantizationType(BY_NAME[name].number))
    return values


def _of_few_bits(raw: ArrayU8, block_bytes: int, bits: int) -> ArrayF32:
    blocks = raw.reshape(-1, block_bytes)
    d = np.ascontiguousarray(blocks[:, :SCALE_BYTES]).view("<f2").astype(np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[:, SCALE_BYTES:, None] >> shifts & (2**bits - 1)).reshape(len(blocks), -1).astype(np.float32)
    signed = codes * 2 - 1 if bits == 1 else codes - 1
    values: ArrayF32 = (signed * d).reshape(len(raw), -1)
    return values
