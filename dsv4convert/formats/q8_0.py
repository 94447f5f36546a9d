"""GGML's Q8_0 blocks: from FP8, FP4, BF16 and F32, equal to llama.cpp's bit for bit, and the reader.

::

    34 bytes hold 32 elements:   d d | q0 q1 ... q31
    d   float16, little-endian: amax/127 in float32, rounded
    q   int8: x * (1/d) in float32, d still unrounded, rounded half away from zero

When the 32 elements of a block share one power-of-two scale, that scale cancels: q depends on nothing
but the pair (largest magnitude code, code), so one multiplier per largest magnitude code replaces the
division and the rounding rule. `q8_0_table` writes the pairs out with the plain formula, and the
multipliers are proved against it for every pair.

Where llama.cpp's own arithmetic is undefined or contradicts itself, chosen here:

- 1/d overflows (amax below about 2^-121): its conversion of infinity to int8 is undefined, 0 on x86; all
  q are 0 here. d is 0 there, so the block reads as zeros either way.
- A NaN in the block: d is NaN (0x7E00) and all q are 0, as in gguf-py; the C reference forgets all that
  came before the NaN.
- An infinity: d is infinite and all q are 0, as in both.

Q8_0 rounds by design, so rounding is not counted. Counted are NaN elements, elements of blocks whose d is
infinite (``overflow``) and nonzero elements of blocks whose d is zero (``underflow``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import (
    F16_NAN_BITS,
    F32_NAN_BITS,
    GROUP,
    Array,
    ArrayF32,
    ArrayI64,
    ArrayU8,
    ArrayU16,
    Block,
    Scratch,
    Tally,
    check_contiguous,
    check_tile,
    column_blocks,
    group_max,
    require_subnormals,
)
from dsv4convert.formats.bf16 import bf16_to_f32
from dsv4convert.formats.e2m1 import MIN_EXPONENT, VALUES, fp4_to_f32, index_rows, unpack_e2m1
from dsv4convert.formats.e4m3 import (
    MIN_SUBNORMAL_EXPONENT,
    NAN_CODE,
    PLACED_EXPONENT,
    decode_table,
    fp8_to_f32,
    has_nan_code,
    place,
)
from dsv4convert.formats.e8m0 import BIAS as E8M0_BIAS
from dsv4convert.formats.e8m0 import F32_OF_BYTE, byte_range, power_of_two_bytes

BLOCK_BYTES = 2 + GROUP  # 34
LEVELS = 127
_BLOCK = np.dtype([("d", np.uint16), ("q", np.dtype(f"V{GROUP}"))])
_MAGNITUDES = 128  # e4m3 codes without the sign, NaN the last
_F16_INF = np.uint16(0x7C00)
_MAGNITUDE_16 = np.uint16(0x7FFF)

# Within these scale bytes d = amax/127 stays a normal float32 and amax finite, so that the power of two
# cancels: 2^-9 / 127 > 2^-16, and 448 < 2^9.
TABLE_FIRST_BYTE = E8M0_BIAS - 126 - (MIN_SUBNORMAL_EXPONENT - 7)
TABLE_LAST_BYTE = E8M0_BIAS + 127 - 9
# The same for FP4: 2^-1 / 127 > 2^-8, and 6 < 2^3.
FP4_TABLE_FIRST_BYTE = E8M0_BIAS - 126 - (MIN_EXPONENT - 7)
FP4_TABLE_LAST_BYTE = E8M0_BIAS + 127 - 3


def quantise_blocks(x: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally, nan_counted: bool = False) -> None:
    """Quantise float32 [blocks, 32] to Q8_0 [blocks, 34] by the plain formula.

    ``nan_counted`` says that the caller has counted the NaN elements already.
    """
    blocks = x.shape[0]
    if blocks == 0:
        return
    require_subnormals()
    work = scratch.array("q8_0.work", x.shape, np.float32)
    whole = scratch.array("q8_0.whole", x.shape, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        np.abs(x, out=work)
        amax = group_max(work, whole)
        d = amax / np.float32(LEVELS)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        np.multiply(x, inverse[:, None], out=work)
        nonfinite = ~(np.isfinite(inverse) & np.isfinite(amax))
        if nonfinite.any():
            work[nonfinite] = 0
        # Half away from zero: what trunc drops is exact, and its double truncates to -1, 0 or 1.
        np.trunc(work, out=whole)
        np.subtract(work, whole, out=work)
        np.add(work, work, out=work)
        np.trunc(work, out=work)
        np.add(whole, work, out=whole)
        d16 = d.astype(np.float16).view(np.uint16)
    d16[np.isnan(d)] = F16_NAN_BITS
    target = out.reshape(-1, BLOCK_BYTES)
    np.copyto(target[:, 2:].view(np.int8), whole, casting="unsafe")
    np.copyto(out.reshape(-1).view(_BLOCK)["d"], d16)
    if not nan_counted:
        nan = np.isnan(amax)
        if nan.any():
            tally.nan += int(np.count_nonzero(np.isnan(x[nan])))
    _count_range(d16, amax > 0, lambda chosen: np.count_nonzero(x[chosen], axis=1), tally)


def f32_to_q8_0(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise float32 [R, C] to Q8_0 blocks [R, C/32*34]. Raises ValueError on shapes that do not fit."""
    check_blocks(values.shape, out)
    quantise_blocks(values.reshape(-1, GROUP), out, scratch, tally)


def bf16_to_q8_0(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise bfloat16 bits [R, C] to Q8_0 blocks [R, C/32*34]; see `f32_to_q8_0`."""
    check_blocks(values.shape, out)
    wide = scratch.array("q8_0.wide", values.shape, np.float32)
    bf16_to_f32(values, wide, scratch, Tally())  # the second step counts the NaNs
    quantise_blocks(wide.reshape(-1, GROUP), out, scratch, tally)


def fp4_to_q8_0(packed: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise packed FP4 [R, C/2] times its block scales to Q8_0 blocks [R, C/32*34]; see `fp8_to_q8_0`."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    check_blocks((rows, columns), out)
    check_tile(rows, columns, scale, block, out, out.shape)
    if packed.size == 0:
        return
    codes = power_of_two_bytes(scale, scratch)
    if codes is not None and block[1] % GROUP == 0:
        first, last, nan_scale = byte_range(codes)
        if first >= FP4_TABLE_FIRST_BYTE and last <= FP4_TABLE_LAST_BYTE and not nan_scale:
            _quantise_pairs(packed, codes, block, out, scratch, tally)
            return
    wide = scratch.array("q8_0.wide", (rows, columns), np.float32)
    decoded = Tally()
    fp4_to_f32(packed, scale, block, wide, scratch, decoded)
    tally.nan += decoded.nan
    quantise_blocks(wide.reshape(-1, GROUP), out, scratch, tally, nan_counted=True)


def fp8_to_q8_0(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise e4m3 codes [R, C] times their block scales to Q8_0 blocks [R, C/32*34].

    ``scale`` is e8m0 bytes or float32 per block. Equal to decoding to float32 and quantising that.
    Raises ValueError on shapes that do not fit, C not a multiple of 32 among them.
    """
    rows, columns = weight.shape
    check_blocks(weight.shape, out)
    check_tile(rows, columns, scale, block, out, out.shape)
    if weight.size == 0:
        return
    codes = power_of_two_bytes(scale, scratch)
    if codes is not None and block[1] % GROUP == 0:
        first, last, nan_scale = byte_range(codes)
        if first >= TABLE_FIRST_BYTE and last <= TABLE_LAST_BYTE and not nan_scale:
            _quantise_codes(weight, codes, block, out, scratch, tally)
            return
    wide = scratch.array("q8_0.wide", weight.shape, np.float32)
    decoded = Tally()
    fp8_to_f32(weight, scale, block, wide, scratch, decoded)
    tally.nan += decoded.nan
    quantise_blocks(wide.reshape(-1, GROUP), out, scratch, tally, nan_counted=True)


def q8_0_to_f32(blocks: ArrayU8, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Decode Q8_0 blocks [R, C/32*34] to float32 [R, C]: q * d, exact. Raises ValueError on shapes that do not fit."""
    rows = blocks.shape[0]
    if blocks.shape[1] % BLOCK_BYTES or out.shape != (rows, blocks.shape[1] // BLOCK_BYTES * GROUP):
        raise ValueError(f"Q8_0 blocks of shape {blocks.shape} do not fill an output of {out.shape}")
    flat = blocks.reshape(-1, BLOCK_BYTES)
    d = np.ascontiguousarray(flat[:, :2]).view(np.float16).astype(np.float32)
    target = out.reshape(-1, GROUP)
    np.copyto(target, flat[:, 2:].view(np.int8))
    with np.errstate(invalid="ignore"):
        np.multiply(target, d, out=target)
    nan = np.isnan(target)
    if nan.any():
        tally.nan += int(np.count_nonzero(nan))
        np.copyto(target.view(np.uint32), F32_NAN_BITS, where=nan)
    tally.overflow += int(np.count_nonzero(np.isinf(target)))


@cache
def q8_0_table() -> npt.NDArray[np.int8]:
    """Return q for every (largest magnitude code, code) by the plain formula, [128, 256] int8.

    Row 127 is a block with a NaN: all 0. Entries whose magnitude exceeds the row's are 0.
    """
    return _levels(decode_table(), NAN_CODE)


def _levels(value: ArrayF32, magnitudes: int) -> npt.NDArray[np.int8]:
    """Return q for every (largest magnitude, code) of a format whose codes are sign and magnitude."""
    table = np.zeros((value.size // 2, value.size), np.int8)
    magnitude = np.arange(value.size) % (value.size // 2)
    for largest in range(1, magnitudes):
        inverse = np.float32(1) / (value[largest] / np.float32(LEVELS))
        inside = magnitude <= largest
        q = value[inside] * inverse
        # Adding a half is exact enough: no pair comes close below one.
        table[largest, inside] = np.trunc(q + np.copysign(np.float32(0.5), q)).astype(np.int8)
    return table


@cache
def multipliers() -> ArrayF32:
    """Return m [128] with rint(code's value * m[largest]) = q for every pair; 0 for rows of zeros.

    Each q bounds m to (|q| - 1/2, |q| + 1/2) / |value|; the bounds of a row's 127 codes overlap, and the
    middle is as far from every rounding boundary as can be, so that to nearest even does as well as half
    away from zero. The tests go through all pairs.
    """
    return _multipliers(decode_table(), q8_0_table(), NAN_CODE)


@cache
def fp4_multipliers() -> ArrayF32:
    """The same for FP4, [8]."""
    return _multipliers(VALUES, _levels(VALUES, VALUES.size // 2), VALUES.size // 2)


def _multipliers(values: ArrayF32, table: npt.NDArray[np.int8], magnitudes: int) -> ArrayF32:
    value = values.astype(np.float64)
    result = np.zeros(value.size // 2, np.float32)
    for largest in range(1, magnitudes):
        codes = np.arange(1, largest + 1)
        q = table[largest, codes].astype(np.float64)
        low = ((q - 0.5) / value[codes]).max()
        high = ((q + 0.5) / value[codes]).min()
        result[largest] = (low + high) / 2
    return result


@cache
def d_table() -> ArrayU16:
    """Return the bits of d for every (largest e4m3 magnitude code, scale byte), [128 * 256]."""
    return _d_bits(decode_table()[:_MAGNITUDES])


@cache
def fp4_tables() -> tuple[ArrayU16, ArrayU16]:
    """Return for FP4 the pairs of q for every (largest magnitude code, packed byte), and the bits of d.

    Both flat, [8 * 256]; element 2i is the low half of a pair; d is by (largest magnitude code, scale byte).
    """
    byte = np.arange(256, dtype=np.uint8)[:, None]
    pairs = _levels(VALUES, VALUES.size // 2)[:, unpack_e2m1(byte)]
    return np.ascontiguousarray(pairs).view(np.uint16).reshape(-1), _d_bits(VALUES[: VALUES.size // 2])


def _d_bits(magnitudes: ArrayF32) -> ArrayU16:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        amax = magnitudes[:, None] * F32_OF_BYTE[None, :]
        d = (amax / np.float32(LEVELS)).astype(np.float16).view(np.uint16).copy()
    d[np.isnan(amax)] = F16_NAN_BITS
    flat: ArrayU16 = d.reshape(-1)
    return flat


# Placed codes carry 2^-120. Half of it is multiplied into the multipliers, which may be as large as
# 127 * 2^9, the other half into the values, and both stay float32 numbers.
_HALF_PLACED = np.float32(2.0 ** (PLACED_EXPONENT // 2))


@cache
def _multiplier_rows() -> ArrayF32:
    """The multipliers times 2^60, each once for every element of a block."""
    rows = np.repeat((multipliers() * _HALF_PLACED)[:, None], GROUP, axis=1)
    rows.flags.writeable = False
    return rows


def _quantise_codes(
    weight: ArrayU8, codes: ArrayU8, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally
) -> None:
    rows, columns = weight.shape
    groups = columns // GROUP
    require_subnormals()
    magnitude = scratch.array("q8_0.magnitude", weight.shape, np.uint8)
    spare = scratch.array("q8_0.spare", weight.shape, np.uint8)
    np.bitwise_and(weight, NAN_CODE, out=magnitude)
    largest = group_max(magnitude.reshape(-1, GROUP), spare.reshape(-1, GROUP))
    x = scratch.array("q8_0.work", weight.shape, np.float32)
    place(weight, x)
    np.multiply(x, _HALF_PLACED, out=x)
    factor = scratch.array("q8_0.factor", (rows * groups, GROUP), np.float32)
    row = _as_index(largest, scratch)
    np.take(_multiplier_rows(), row, axis=0, out=factor, mode="clip")
    work = x.reshape(-1, GROUP)
    np.multiply(work, factor, out=work)
    np.rint(work, out=work)
    target = out.reshape(-1, BLOCK_BYTES)
    np.copyto(target[:, 2:].view(np.int8), work, casting="unsafe")
    d16 = _store_d(d_table(), row, codes, block, rows, out, scratch)
    if has_nan_code(weight, scratch):
        tally.nan += int(np.count_nonzero((weight & NAN_CODE) == NAN_CODE))
    by_block = weight.reshape(-1, GROUP)  # the maximum has used `magnitude` up
    _count_range(d16, largest > 0, lambda chosen: np.count_nonzero(by_block[chosen] & NAN_CODE, axis=1), tally)


def _store_d(
    table: ArrayU16, row: ArrayI64, codes: ArrayU8, block: Block, rows: int, out: ArrayU8, scratch: Scratch
) -> ArrayU16:
    """Look up and write every block's d, and return them; uses up ``row``, the largest codes."""
    groups = row.size // rows
    # The scale byte of each block of 32: rows repeat by the block's height, columns by its width / 32.
    byte = codes if block[1] == GROUP else np.take(codes, column_blocks(groups, block[1] // GROUP), axis=1)
    if block[0] != 1:
        byte = np.repeat(byte, block[0], axis=0)[:rows]
    np.left_shift(row, 8, out=row)
    np.bitwise_or(row, byte.reshape(-1), out=row)
    d16: ArrayU16 = scratch.array("q8_0.d", row.shape, np.uint16)
    np.take(table, row, out=d16, mode="clip")
    np.copyto(out.reshape(-1).view(_BLOCK)["d"], d16)
    return d16


def _as_index(largest: ArrayU8, scratch: Scratch) -> ArrayI64:
    """The largest codes as table rows, in the type that numpy would convert them to at every use."""
    row: ArrayI64 = scratch.array("q8_0.row", largest.shape, np.int64)
    np.copyto(row, largest)
    return row


def _quantise_pairs(
    packed: ArrayU8, codes: ArrayU8, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally
) -> None:
    rows, half = packed.shape
    groups = (rows * half // (GROUP // 2), GROUP // 2)
    magnitude = scratch.array("q8_0.magnitude", packed.shape, np.uint8)
    spare = scratch.array("q8_0.spare", packed.shape, np.uint8)
    np.right_shift(packed, 4, out=spare)
    np.bitwise_and(spare, _FP4_MAGNITUDE, out=spare)
    np.bitwise_and(packed, _FP4_MAGNITUDE, out=magnitude)
    np.maximum(magnitude, spare, out=magnitude)
    largest = group_max(magnitude.reshape(groups), spare.reshape(groups))
    pairs, d = fp4_tables()
    index = scratch.array("q8_0.index", packed.shape, np.int64)
    offset = scratch.array("q8_0.offset", groups, np.int64)
    row = _as_index(largest, scratch)
    np.take(index_rows(), row, axis=0, out=offset, mode="clip")
    np.add(packed, offset.reshape(packed.shape), out=index)
    q = scratch.array("q8_0.pairs", packed.shape, np.uint16)
    np.take(pairs, index, out=q, mode="clip")
    np.copyto(out.reshape(-1).view(_BLOCK)["q"], q.reshape(-1).view(_BLOCK["q"]))
    d16 = _store_d(d, row, codes, block, rows, out, scratch)

    def nonzero(chosen: Array) -> Array:
        count: Array = np.count_nonzero(unpack_e2m1(packed.reshape(groups)[chosen]) & _FP4_MAGNITUDE, axis=1)
        return count

    _count_range(d16, largest > 0, nonzero, tally)


_FP4_MAGNITUDE = np.uint8(0x7)


def _count_range(d16: ArrayU16, nonzero: npt.NDArray[np.bool_], count: Callable[[Array], Array], tally: Tally) -> None:
    infinite = (d16 & _MAGNITUDE_16) == _F16_INF
    if infinite.any():
        tally.overflow += int(count(infinite).sum())
    vanished = d16 == 0
    vanished &= nonzero
    if vanished.any():
        tally.underflow += int(count(vanished).sum())


def check_blocks(shape: tuple[int, ...], out: ArrayU8) -> None:
    """Raise ValueError unless a tile of ``shape`` fills the Q8_0 blocks of ``out``."""
    rows, columns = shape
    if columns % GROUP or out.shape != (rows, columns // GROUP * BLOCK_BYTES):
        raise ValueError(f"a {rows}x{columns} tile does not fill Q8_0 blocks of shape {out.shape}")
    check_contiguous(out)
