"""float8_e4m3fn, the FP8 weights: decoding times a block scale to F32, BF16 and F16, and the encoder.

::

    bits        s eeee mmm       bias 7
    normal      (1 + m/8) * 2^(e - 7)          0_0001_000 = 2^-6  ...  0_1111_110 = 1.75 * 2^8 = 448
    subnormal   m/8 * 2^-6                     0_0000_001 = 2^-9
    zero        0x00 and 0x80 (-0.0)
    NaN         0x7F and 0xFF; no infinity

One C tool reads 0x7F as 0.0; here it is NaN, and counted.

A value has at most 4 significant bits, so times a power of two it is exact in float32, bfloat16 and
float16, save where the exponent leaves the format's range.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from dsv4convert.formats.base import (
    F16_NAN_BITS,
    F32_NAN_BITS,
    Array,
    ArrayF16,
    ArrayF32,
    ArrayU8,
    ArrayU16,
    Block,
    Scratch,
    Tally,
    check_tile,
    check_tile_of_floats,
    require_subnormals,
    spread_columns,
)
from dsv4convert.formats.bf16 import f32_to_bf16, store_products, widened_bf16
from dsv4convert.formats.e8m0 import BIAS as E8M0_BIAS
from dsv4convert.formats.e8m0 import (
    F32_MANTISSA_BITS,
    F32_OF_BYTE,
    MAX_BYTE,
    byte_range,
    f32_to_e8m0,
    power_of_two_bytes,
    scales_f32,
)

MAX = 448.0  # 1.75 * 2^8
MAX_EXPONENT = 8
MIN_SUBNORMAL_EXPONENT = -9
NAN_CODE = 0x7F
SIGN_BIT = 0x80
_MANTISSA_BITS = 3
_BIAS = 7
_MAX_CODE = 0x7E
_MIN_NORMAL = 2.0**-6
_SUBNORMAL_STEP = 2.0**MIN_SUBNORMAL_EXPONENT

# Placed with its exponent in the lowest bits of a float32's, a code reads as its value times
# 2^(7 - 127), subnormals included.
_PLACE_SHIFT = np.int32(F32_MANTISSA_BITS - _MANTISSA_BITS)
_PLACE_MASK = np.int32(-(1 << 31) | (NAN_CODE << (F32_MANTISSA_BITS - _MANTISSA_BITS)))
PLACED_EXPONENT = E8M0_BIAS - _BIAS  # 120: what multiplies a placed code back to its value
_UNPLACE = np.float32(2.0**PLACED_EXPONENT)

# Scale bytes between which no product leaves the range, and none is rounded.
F32_LAST_SAFE_BYTE = E8M0_BIAS + 127 - MAX_EXPONENT  # 448 * 2^119 < 2^128
BF16_FIRST_EXACT_BYTE = E8M0_BIAS - 133 - MIN_SUBNORMAL_EXPONENT  # 2^-9 * 2^-124 = 2^-133
F16_FIRST_EXACT_BYTE = E8M0_BIAS - 24 - MIN_SUBNORMAL_EXPONENT  # 2^-9 * 2^-15 = 2^-24
F16_LAST_SAFE_BYTE = E8M0_BIAS + 15 - MAX_EXPONENT  # 448 * 2^7 < 65504
_LAST_ONE_STEP_BYTE = MAX_BYTE - PLACED_EXPONENT  # 2^(byte - 127 + 120) is still a float32

_U64_MAGNITUDE = np.uint64(0x7F7F_7F7F_7F7F_7F7F)
_U64_ONES = np.uint64(0x0101_0101_0101_0101)
_U64_HIGH = np.uint64(0x8080_8080_8080_8080)


def decode_table() -> ArrayF32:
    """Return the float32 value of each of the 256 codes, by the arithmetic of the definition."""
    code = np.arange(256)
    exponent, mantissa = (code >> _MANTISSA_BITS) & 0xF, code & 0x7
    value = np.where(
        exponent == 0,
        mantissa * _SUBNORMAL_STEP,
        (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - _BIAS),
    )
    value = np.where(code & SIGN_BIT, -value, value)
    value[(code & NAN_CODE) == NAN_CODE] = np.nan
    return value.astype(np.float32)


def e4m3_to_f32(codes: ArrayU8) -> ArrayF32:
    """Return the float32 value of each code, any shape; exact.

    >>> e4m3_to_f32(np.array([0x38, 0x7E, 0x81, 0x7F], np.uint8)).tolist()
    [1.0, 448.0, -0.001953125, nan]
    """
    return _DECODE[codes]


_DECODE = decode_table()
_DECODE.flags.writeable = False


def f32_to_e4m3(values: ArrayF32) -> ArrayU8:
    """Round float32, any shape, to e4m3 codes: nearest even, saturating at 448, NaN to 0x7F.

    >>> f32_to_e4m3(np.array([1.0, 1e9, -0.0, float("nan")], np.float32)).tolist()
    [56, 126, 128, 127]
    """
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFF_FFFF)
    shift = np.uint32(F32_MANTISSA_BITS - _MANTISSA_BITS)
    just_under_half = np.uint32((1 << (F32_MANTISSA_BITS - _MANTISSA_BITS - 1)) - 1)
    rounded = (magnitude + just_under_half + ((magnitude >> shift) & np.uint32(1))) >> shift
    with np.errstate(invalid="ignore"):
        small = np.abs(values) < _MIN_NORMAL
        steps = np.rint(np.where(small, np.abs(values), 0) / np.float32(_SUBNORMAL_STEP)).astype(np.uint32)
    rebias = np.uint32(PLACED_EXPONENT << _MANTISSA_BITS)
    normal = np.minimum(np.maximum(rounded, rebias) - rebias, _MAX_CODE)
    code: ArrayU8 = np.where(small, steps, normal).astype(np.uint8)
    code |= (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(SIGN_BIT)
    code[np.isnan(values)] = NAN_CODE
    return code


# The scale of a block with no larger value than this one; the published quantiser has a floor of 1e-4 for amax.
SMALLEST_AMAX = np.float32(MAX * 2.0**-126)
PUBLISHED_AMAX = np.float32(1e-4)


def fp8_scales(values: ArrayF32, block: Block, least: np.float32) -> ArrayU8:
    """Return the e8m0 scales per block of float32 [R, C]: the smallest power of two with max(amax, least)/scale <= 448.

    Raises ValueError on NaN and infinity.
    """
    rows, columns = values.shape
    if not np.isfinite(values).all():
        raise ValueError("cannot quantise NaN or infinity")
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = np.zeros((down * block[0], across * block[1]), np.float32)
    padded[:rows, :columns] = np.abs(values)
    amax = padded.reshape(down, block[0], across, block[1]).max(axis=(1, 3))
    fraction, exponent = np.frexp(np.maximum(amax, least))
    # amax = fraction * 2^exponent with fraction in [1/2, 1), and 448 = 0.875 * 2^9.
    limit_fraction, limit_exponent = np.frexp(np.float32(MAX))
    power = exponent - limit_exponent + (fraction > limit_fraction)
    return f32_to_e8m0(np.ldexp(np.float32(1), power))


def quantise_fp8(values: ArrayF32, block: Block, least: np.float32 = SMALLEST_AMAX) -> tuple[ArrayU8, ArrayU8]:
    """Quantise float32 [R, C] the published way: (e4m3 codes [R, C], e8m0 scales per block); see ``fp8_scales``.

    Raises ValueError on NaN and infinity.
    """
    rows, columns = values.shape
    scale = fp8_scales(values, block, least)
    spread = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)[:rows, :columns]
    return f32_to_e4m3(np.ldexp(values, E8M0_BIAS - spread.astype(np.int32)).astype(np.float32)), scale


def f32_to_fp8(values: ArrayF32, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise float32 [R, C] to e4m3 codes [R, C] with the scales of ``f32_to_fp8_scales``.

    Counts: ``underflow`` the elements that vanished, or were rounded among e4m3's subnormal numbers, ``changed`` those
    that were rounded otherwise. Raises LossyError on NaN and infinity.
    """
    check_tile_of_floats(values, out, values.shape)
    codes, scale = quantise_fp8(values, block, PUBLISHED_AMAX)
    back = np.empty_like(values)
    fp8_to_f32(codes, scale, block, back, scratch, Tally())
    inexact = back != values
    spread = spread_blocks(scale, block, values.shape)
    with np.errstate(over="ignore"):
        tiny = np.abs(values) < np.ldexp(np.float32(_MIN_NORMAL), spread.astype(np.int32) - E8M0_BIAS)
    underflow = int(np.count_nonzero(inexact & tiny))
    tally.underflow += underflow
    tally.changed += int(np.count_nonzero(inexact)) - underflow
    np.copyto(out, codes)


def f32_to_fp8_scales(values: ArrayF32, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` the e8m0 scales per block of float32 [R, C]: the smallest power of two with amax/scale <= 448.

    amax counts as 1e-4 at least, as in the published quantiser. Raises LossyError on NaN and infinity.
    """
    rows, columns = values.shape
    check_tile_of_floats(values, out, (-(-rows // block[0]), -(-columns // block[1])))
    np.copyto(out, fp8_scales(values, block, PUBLISHED_AMAX))


def bf16_to_fp8(values: ArrayU16, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise bfloat16 bits [R, C]; see `f32_to_fp8`."""
    f32_to_fp8(widened_bf16(values, scratch), block, out, scratch, tally)


def bf16_to_fp8_scales(values: ArrayU16, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` the e8m0 scales per block of bfloat16 bits [R, C]; see `f32_to_fp8_scales`."""
    f32_to_fp8_scales(widened_bf16(values, scratch), block, out, scratch, tally)


def fp8_to_f32(weight: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Decode e4m3 codes [R, C] times their block scales to float32 [R, C].

    ``scale`` [ceil(R/block[0]), ceil(C/block[1])] is e8m0 bytes or float32; row 0 of the tile starts a
    block. Exact for power-of-two scales, else rounded once. Raises ValueError on shapes that do not fit.
    """
    rows, columns = weight.shape
    check_tile(rows, columns, scale, block, out, weight.shape)
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        _store_any_scale(weight, scale, block, out, scratch, tally)
    else:
        _decode_power_of_two(weight, codes, block, out, scratch, tally)


def fp8_to_bf16(weight: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Decode e4m3 codes [R, C] times their block scales to bfloat16 bits [R, C]; see `fp8_to_f32`."""
    rows, columns = weight.shape
    check_tile(rows, columns, scale, block, out, weight.shape)
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        _store_any_scale(weight, scale, block, out, scratch, tally)
        return
    wide = scratch.array("e4m3.wide", weight.shape, np.float32)
    _decode_power_of_two(weight, codes, block, wide, scratch, tally)
    if byte_range(codes)[0] >= BF16_FIRST_EXACT_BYTE:
        np.right_shift(wide.view(np.uint32), np.uint32(16), out=out, casting="unsafe")
    else:
        again = Tally()  # NaN is counted already
        f32_to_bf16(wide, out, scratch, again)
        tally.underflow += again.underflow


def fp8_to_f16(weight: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Decode e4m3 codes [R, C] times their block scales to float16 [R, C]; see `fp8_to_f32`."""
    rows, columns = weight.shape
    check_tile(rows, columns, scale, block, out, weight.shape)
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        _store_any_scale(weight, scale, block, out, scratch, tally)
        return
    if weight.size == 0:
        return
    # numpy narrows to float16 in software, ten times slower than it looks numbers up.
    index = scratch.array("e4m3.index", weight.shape, np.int64)
    row = spread_columns(codes.astype(np.int64) << 8, columns, block[1], scratch, "e4m3.row")
    for number, start in enumerate(range(0, rows, block[0])):
        np.add(weight[start : start + block[0]], row[number], out=index[start : start + block[0]])
    table, loss = _f16_table()
    np.take(table, index, out=out.view(np.uint16), mode="clip")
    first, last, nan_scale = byte_range(codes)
    if nan_scale or has_nan_code(weight, scratch):
        tally.nan += int(np.count_nonzero(out.view(np.uint16) == F16_NAN_BITS))
    if first < F16_FIRST_EXACT_BYTE or last > F16_LAST_SAFE_BYTE:
        lost = np.take(loss, index, mode="clip")
        tally.overflow += int(np.count_nonzero(lost == _OVERFLOWED))
        tally.underflow += int(np.count_nonzero(lost == _UNDERFLOWED))


_OVERFLOWED, _UNDERFLOWED = 1, 2


@cache
def _f16_table() -> tuple[ArrayU16, ArrayU8]:
    """For (scale byte, code): the bits of the float16 product, and whether it over- or underflowed."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = F32_OF_BYTE.astype(np.float64)[:, None] * _DECODE[None, :]
        half = exact.astype(np.float16)
    bits = half.view(np.uint16).copy()
    bits[np.isnan(exact)] = F16_NAN_BITS
    loss = np.where(np.isinf(half), _OVERFLOWED, np.where(half != exact, _UNDERFLOWED, 0)).astype(np.uint8)
    loss[np.isnan(exact)] = 0
    return bits.reshape(-1), loss.reshape(-1)


def has_nan_code(weight: ArrayU8, scratch: Scratch) -> bool:
    """True when a code of a contiguous array is NaN; eight codes at a time."""
    flat = weight.reshape(-1)
    whole = flat.size & ~7
    lanes = flat[:whole].view(np.uint64)
    # 0x7F is the one magnitude that carries into bit 7 when 1 is added.
    found = scratch.array("e4m3.found", lanes.shape, np.uint64)
    np.bitwise_and(lanes, _U64_MAGNITUDE, out=found)
    np.add(found, _U64_ONES, out=found)
    return bool(np.bitwise_or.reduce(found) & _U64_HIGH) or bool(((flat[whole:] & NAN_CODE) == NAN_CODE).any())


def place(weight: ArrayU8, out: ArrayF32) -> None:
    """Write each code's value times 2^-120: sign-extend, shift into place, drop the copies of the sign."""
    bits = out.view(np.int32)
    np.copyto(bits, weight.view(np.int8))
    np.left_shift(bits, _PLACE_SHIFT, out=bits)
    np.bitwise_and(bits, _PLACE_MASK, out=bits)


def _decode_power_of_two(
    weight: ArrayU8, codes: ArrayU8, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally
) -> None:
    if weight.size == 0:
        return
    require_subnormals()
    place(weight, out)
    _, last, nan_scale = byte_range(codes)
    with np.errstate(over="ignore", invalid="ignore"):
        if last <= _LAST_ONE_STEP_BYTE:
            # 2^(byte - 127) * 2^120, exact: one multiplication decodes and scales.
            factor = F32_OF_BYTE[codes] * _UNPLACE
        else:
            np.multiply(out, _UNPLACE, out=out)
            factor = F32_OF_BYTE[codes]
        _multiply_blocks(out, factor, block, scratch)
    if last > F32_LAST_SAFE_BYTE:
        tally.overflow += int(np.count_nonzero(np.isinf(out)))
        # A NaN code has been read as 480 and may count as infinite here; it is not.
        tally.overflow -= int(np.count_nonzero(np.isinf(out) & ((weight & NAN_CODE) == NAN_CODE)))
    if nan_scale or has_nan_code(weight, scratch):
        nan = np.isnan(out)
        nan |= (weight & NAN_CODE) == NAN_CODE
        tally.nan += int(np.count_nonzero(nan))
        np.copyto(out.view(np.uint32), F32_NAN_BITS, where=nan)


def _multiply_blocks(values: ArrayF32, factor: ArrayF32, block: Block, scratch: Scratch) -> None:
    """Multiply [R, C] in place by its block factors [ceil(R/br), ceil(C/bc)]."""
    rows, columns = values.shape
    height, width = block
    if height == 1 and columns % width == 0:
        groups = values.reshape(rows, columns // width, width)
        np.multiply(groups, factor[:, :, None], out=groups)
        return
    spread = spread_columns(factor, columns, width, scratch, "base.factor")
    for index, start in enumerate(range(0, rows, height)):
        part = values[start : start + height]
        np.multiply(part, spread[index], out=part)


def _store_any_scale(weight: ArrayU8, scale: Array, block: Block, out: Array, scratch: Scratch, tally: Tally) -> None:
    product = _DECODE[weight].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        product *= spread_blocks(scales_f32(scale).astype(np.float64), block, weight.shape)
    store_products(product, out, scratch, tally)


def spread_blocks(values: Array, block: Block, shape: tuple[int, ...]) -> Array:
    """Repeat each block's value over its elements: [r, c] to ``shape``."""
    return np.repeat(np.repeat(values, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]
