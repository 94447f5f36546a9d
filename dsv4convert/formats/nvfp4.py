"""NVFP4: e2m1 codes with an e4m3 scale for each 16 elements of a row and one float32 for the whole matrix.

::

    value = e2m1(code) * e4m3(scale) * second
    16 elements share a scale; the sign bit of a scale is 0; scale 0x7F is NaN

Packed as FP4 is: byte i of a row holds element 2i in the low nibble and element 2i+1 in the high one.

FP4 with e8m0 scales becomes NVFP4 without touching a code. With k_max the largest exponent of the scales that share
a second scale, second = 2^(k_max - 8), and both halves of a block of 32 get 2^(k - k_max + 8), which e4m3 holds from
2^8 down to 2^-9: exact where k_max - k <= 17. A block further down gets 2^-9 and its codes rounded to nearest even.

ggml's blocks of 64 elements take 36 bytes: the e4m3 scales of four runs of 16, then eight bytes for each run, byte k
with element k of the run in the low nibble and element k + 8 in the high one. Their scales have no sign, and 0x7F is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np

from dsv4convert.errors import LossyError
from dsv4convert.formats.base import (
    GROUP,
    Array,
    ArrayF32,
    ArrayU8,
    ArrayU16,
    Scratch,
    Tally,
    check_contiguous,
    check_tile,
)
from dsv4convert.formats.e2m1 import VALUES, f32_to_e2m1, fp4_to_bf16, pack_e2m1, unpack_e2m1
from dsv4convert.formats.e4m3 import MAX_EXPONENT, MIN_SUBNORMAL_EXPONENT, NAN_CODE, e4m3_to_f32, f32_to_e4m3
from dsv4convert.formats.e8m0 import BIAS, NAN_BYTE

BLOCK = 16  # elements of a row that share an e4m3 scale
SCALES_PER_GROUP = GROUP // BLOCK
_BYTE_VALUES = 256

GGML_ELEMENTS, GGML_BYTES = 64, 36
_RUNS = GGML_ELEMENTS // BLOCK
_LOW, _HIGH = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
_FOUR = np.uint32(4)

# How far below the largest exponent a scale may be and still have its power of two among the e4m3 numbers.
EXACT_SPAN = MAX_EXPONENT - MIN_SUBNORMAL_EXPONENT  # 17
# Powers of two by which codes are halved; from the last on every value rounds to zero: 6 * 2^-5 < 0.25.
_LAST_SHIFT = 5


def largest_scale(scales: Sequence[ArrayU8]) -> int:
    """Return the largest e8m0 byte of several arrays that is not NaN, the byte of 1.0 where all are.

    >>> largest_scale([np.array([3, 255], np.uint8), np.array([120], np.uint8)])
    120
    """
    largest = max((int(scale.max()) for scale in scales if scale.size), default=NAN_BYTE)
    if largest == NAN_BYTE:
        real = [scale[scale != NAN_BYTE] for scale in scales]
        largest = max((int(scale.max()) for scale in real if scale.size), default=BIAS)
    return largest


def second_scale(largest: int) -> ArrayF32:
    """Return the one float32 2^(k_max - 8) that matrices share whose largest e8m0 scale byte is ``largest``.

    >>> second_scale(127)
    array([0.00390625], dtype=float32)
    """
    return np.ldexp(np.ones(1, np.float32), largest - BIAS - MAX_EXPONENT)


def fp4_to_nvfp4(packed: ArrayU8, scale: ArrayU8, largest: int, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` the codes [R, C/2] of packed FP4 [R, C/2], e8m0 scales [R, C/32], as NVFP4.

    ``largest`` is the largest e8m0 byte of all that share a second scale. Codes move unchanged, except where
    a scale is more than ``EXACT_SPAN`` below it: these are rounded for the scale 2^-9, and counted as changed where
    their value is another. Elements under a NaN scale are counted and keep it. Raises ValueError on shapes
    that do not fit.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if columns % GROUP:
        raise ValueError(f"FP4 rows come in groups of {GROUP}, got {columns} columns")
    check_tile(rows, columns, scale, (1, GROUP), out, packed.shape)
    np.copyto(out, packed)
    if scale.size == 0:
        return
    if scale.max() == NAN_BYTE:
        tally.nan += GROUP * int(np.count_nonzero(scale == NAN_BYTE))
    if int(scale.min()) >= largest - EXACT_SPAN:
        return
    low = np.argwhere(scale < largest - EXACT_SPAN)
    table, changed = _halved()
    shift = np.minimum(largest - EXACT_SPAN - scale[low[:, 0], low[:, 1]].astype(np.int64), _LAST_SHIFT)
    width = GROUP // 2
    bytes_of_block = low[:, 1:] * width + np.arange(width)
    index = shift[:, None] * _BYTE_VALUES + packed[low[:, :1], bytes_of_block]
    out[low[:, :1], bytes_of_block] = table[index]
    tally.changed += int(changed[index].sum(dtype=np.int64))


def fp4_to_nvfp4_scales(scale: ArrayU8, largest: int, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` [R, 2G] the e4m3 scales of the codes that ``fp4_to_nvfp4`` makes, from e8m0 [R, G].

    Counts nothing. Raises ValueError on shapes that do not fit.
    """
    check_scales(scale, out)
    codes = _scale_codes(largest)
    np.take(codes, scale, out=out.view(np.uint16), mode="clip")


@lru_cache(maxsize=256)
def block_scales(second: float, is_reciprocal: bool) -> ArrayF32:
    """Return the float32 that each e4m3 scale code is under a second scale: times it, or divided by it.

    Rounded once, as compressed-tensors and ModelOpt do.

    >>> float(block_scales(0.75, False)[0x38]), float(block_scales(8.0, True)[0x38])  # of 1.0
    (0.75, 0.125)
    """
    codes, factor = e4m3_to_f32(np.arange(_BYTE_VALUES, dtype=np.uint8)), np.float32(second)
    with np.errstate(over="ignore", under="ignore"):
        scales: ArrayF32 = codes / factor if is_reciprocal else codes * factor
    scales.flags.writeable = False
    return scales


def nvfp4_to_bf16(
    packed: ArrayU8,
    scale: ArrayU8,
    second: float,
    is_reciprocal: bool,
    out: ArrayU16,
    scratch: Scratch,
    tally: Tally,
) -> None:
    """Decode NVFP4 [R, C/2], e4m3 scales [R, C/16] under a second scale, to bfloat16 bits [R, C].

    A scale is the float32 of ``block_scales``; the exact product with it is rounded once. Raises ValueError on shapes
    that do not fit.
    """
    scales = block_scales(second, is_reciprocal)[scale]
    fp4_to_bf16(packed, scales, (1, BLOCK), out, scratch, tally)


def nvfp4_to_ggml(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` [R, C/64*36] ggml's blocks of NVFP4: packed codes [R, C/2] and e4m3 scales [R, C/16].

    Lossless: moves bits only. Raises LossyError on scales that the blocks do not have, NaN or with a sign, and
    ValueError on shapes that do not fit.
    """
    check_ggml_blocks(packed, scale, out)
    if scale.size and scale.max() >= NAN_CODE:
        row, column = (int(index) for index in np.argwhere(scale >= NAN_CODE)[0])
        raise LossyError(
            "ggml's NVFP4 has no scale that is NaN or negative",
            expected="scales from 0x00 to 0x7E",
            got=f"0x{scale[row, column]:02X} for row {row}, block {column} of a tile",
            hint="choose another type for the experts",
        )
    halves = packed.reshape(-1, 2, BLOCK // 4).view(np.uint32)[:, :, 0]
    first, second = halves[:, 0], halves[:, 1]
    codes = scratch.array("nvfp4.codes", (len(first), BLOCK // 2), np.uint8)
    codes[:, 0::2] = ((first & _LOW) | (second & _LOW) << _FOUR).view(np.uint8).reshape(-1, BLOCK // 4)
    codes[:, 1::2] = ((first >> _FOUR & _LOW) | (second & _HIGH)).view(np.uint8).reshape(-1, BLOCK // 4)
    blocks = out.reshape(-1, GGML_BYTES)
    blocks[:, :_RUNS] = scale.reshape(-1, _RUNS)
    blocks[:, _RUNS:] = codes.reshape(len(blocks), blocks.shape[1] - _RUNS)


def check_ggml_blocks(packed: ArrayU8, scale: ArrayU8, out: ArrayU8) -> None:
    """Refuse arrays that are not one matrix as NVFP4 and as ggml's blocks of it. Raises ValueError."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if columns % GGML_ELEMENTS:
        raise ValueError(f"ggml's NVFP4 rows come in blocks of {GGML_ELEMENTS}, got {columns} columns")
    check_tile(rows, columns, scale, (1, BLOCK), out, (rows, columns // GGML_ELEMENTS * GGML_BYTES))


def check_scales(scale: ArrayU8, out: ArrayU8) -> None:
    """Refuse an output that has not two scales for each of ``scale`` [R, G]. Raises ValueError."""
    want = (scale.shape[0], SCALES_PER_GROUP * scale.shape[1])
    if out.shape != want:
        raise ValueError(f"e4m3 scales of {scale.shape} e8m0 scales: expected {want}, got {out.shape}")
    check_contiguous(out)


@cache
def _scale_codes(largest: int) -> Array:
    """Return for each e8m0 byte two e4m3 codes of its power of two over the second scale, as one uint16."""
    lift = np.clip(np.arange(_BYTE_VALUES) - largest + MAX_EXPONENT, MIN_SUBNORMAL_EXPONENT, MAX_EXPONENT)
    code = f32_to_e4m3(np.ldexp(np.float32(1), lift).astype(np.float32)).astype(np.uint16)
    code[NAN_BYTE] = NAN_CODE
    pairs: Array = code | code << np.uint16(8)
    return pairs


@cache
def _halved() -> tuple[ArrayU8, ArrayU8]:
    """For (shift, packed byte): the codes of both values over 2^shift, and how many of the two are other values."""
    codes = unpack_e2m1(np.arange(_BYTE_VALUES, dtype=np.uint8)[:, None])
    tables, counts = [], []
    for shift in range(_LAST_SHIFT + 1):
        value = np.ldexp(VALUES[codes], -shift).astype(np.float32)
        made = f32_to_e2m1(value)
        tables.append(pack_e2m1(made)[:, 0])
        counts.append((VALUES[made] != value).sum(axis=1).astype(np.uint8))
    return np.concatenate(tables), np.concatenate(counts)
