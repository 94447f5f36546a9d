"""Number formats for a second opinion: plain formulas in float64, element by element, and no tables of others.

An element's *bits* are an integer that says everything that the file holds about it: its code and the
scale that it shares with its block. Bits are equal exactly when the stored bytes are.

======== ================================ =====================================
encoding bits                             value
======== ================================ =====================================
f32      the float's 32 bits              itself
f16      16 bits                          itself
bf16     16 bits                          the float32 with these upper 16 bits
i32, i64 the integer                      itself
fp8      scale << 8 | code                e4m3(code) * scale
fp8/row  the same as fp8                  the same
fp4      scale << 4 | code                e2m1(code) * 2^(scale - 127)
fp4/nv   second << 12 | scale << 4 | code e2m1(code) * e4m3(scale) * second
fp4/e4m3 scale << 4 | code                e2m1(code) * e4m3(scale)
fp4/f32  scale << 4 | code                e2m1(code) * float32(scale)
int4     scale << 8 | zero << 4 | code    (code - zero) * float32(scale)
affine8  bias << 24 | scale << 8 | code   code * bf16(scale) + bf16(bias)
mxfp4    the same as fp4                  the same
q8_0     d << 8 | q                       f16(d) * int8(q)
======== ================================ =====================================

The scale of fp8 is an e8m0 byte, or the bits of a float32 (encoding "fp8/f32"). The second scale of fp4/nv, which is
NVFP4, has the bits of a float32. NVFP4 is fp4/f32 where it is decoded, its scale being the float32 product of both,
and fp4/e4m3 without the second one; ggml's blocks of the latter are "nvfp4/e4m3". Rows of fp8/row have their scales,
one for 32 elements, behind their codes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bits: TypeAlias = npt.NDArray[Any]
Values: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

BLOCK = 32  # elements of an MXFP4, Q8_0 or packed FP4 block
NVFP4_BLOCK = 16
FP8_TILE = 128
E8M0_BIAS = 127
E8M0_NAN = 255
F16_NAN = 0x7E00

INTEGERS = ("i32", "i64")
FLOATS = ("f32", "f16", "bf16")
# Elements whose value is not what is stored, but is worked out from code and scale.
SCALED = ("fp8", "fp8/row", "fp8/f32", "fp4", "fp4/nv", "fp4/f32", "fp4/e4m3", "nvfp4/e4m3", "int4", "mxfp4", "q8_0")


def e4m3_value(code: int) -> float:
    """Return the value of a float8_e4m3fn code: s eeee mmm, bias 7, S.1111.111 is NaN.

    >>> e4m3_value(0x7E), e4m3_value(0x81)
    (448.0, -0.001953125)
    """
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1_value(code: int) -> float:
    """Return the value of a float4_e2m1fn code: s ee m, bias 1, no NaN.

    >>> [e2m1_value(code) for code in range(8)]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    sign = -1.0 if code & 0x8 else 1.0
    exponent, mantissa = code >> 1 & 0x3, code & 0x1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


E4M3: Values = np.array([e4m3_value(code) for code in range(256)])
E2M1: Values = np.array([e2m1_value(code) for code in range(16)])


def e8m0_values(scale: Bits) -> Values:
    """Return 2^(scale - 127), NaN for 255."""
    power: Values = np.ldexp(1.0, scale.astype(np.int64) - E8M0_BIAS)
    return np.where(scale == E8M0_NAN, np.nan, power)


# Encodings of at most 16 bits have all their values worked out once, and looked up from then on.
TABLE_BITS = {"f16": 16, "bf16": 16, "fp8": 16, "fp8/row": 16, "fp4": 12, "mxfp4": 12}


@cache
def all_values(encoding: str) -> Values:
    """Return the value of every pattern of bits of an encoding of at most 16."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: Values = _values(encoding, np.arange(2 ** TABLE_BITS[encoding], dtype=np.uint16))
    return values


@cache
def all_conversions(source: str, output: str) -> tuple[Bits, Mask]:
    """Return what every pattern of bits must become in a float format, and where that is another value."""
    values = all_values(source)
    bits = bits_of(output, values)
    back = values_of(output, bits)
    changed: Mask = ~((back == values) | (np.isnan(back) & np.isnan(values)))
    return bits, changed


def values_of(encoding: str, bits: Bits) -> Values:
    """Return the exact value of each element."""
    values: Values
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.take(all_values(encoding), bits) if encoding in TABLE_BITS else _values(encoding, bits)
    return values


def _values(encoding: str, bits: Bits) -> Any:
    if encoding in INTEGERS:
        return bits.astype(np.float64)
    if encoding == "f32":
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if encoding == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if encoding == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if encoding in ("fp4", "mxfp4"):
        return E2M1[bits & 0xF] * e8m0_values(bits >> 4)
    if encoding == "fp4/nv":
        scale = E4M3[(bits >> np.uint64(4) & np.uint64(0xFF)).astype(np.intp)]
        return E2M1[(bits & np.uint64(0xF)).astype(np.intp)] * scale * _f32_scale(bits, 12)
    if encoding in ("fp4/e4m3", "nvfp4/e4m3"):
        return E2M1[bits & 0xF] * E4M3[bits >> 4]
    if encoding == "fp4/f32":
        return E2M1[(bits & np.uint64(0xF)).astype(np.intp)] * _f32_scale(bits, 4)
    if encoding == "int4":
        code, zero = (bits & np.uint64(0xF)).astype(np.int64), (bits >> np.uint64(4) & np.uint64(0xF)).astype(np.int64)
        return (code - zero) * _f32_scale(bits, 8)
    if encoding == "affine8":
        scale, bias = (_values("bf16", (bits >> np.uint64(shift)).astype(np.uint16)) for shift in (8, 24))
        return (bits & np.uint64(0xFF)).astype(np.float64) * scale + bias
    if encoding in ("fp8", "fp8/row"):
        return E4M3[bits & 0xFF] * e8m0_values(bits >> 8)
    if encoding == "fp8/f32":
        return E4M3[(bits & np.uint64(0xFF)).astype(np.intp)] * _f32_scale(bits, 8)
    if encoding == "q8_0":
        d = np.take(all_values("f16"), bits >> 8)
        return (bits & 0xFF).astype(np.uint8).view(np.int8).astype(np.float64) * d
    raise KeyError(encoding)


def _f32_scale(bits: Bits, shift: int) -> Values:
    """Return the float32 scale whose bits stand above so many others."""
    scale: Values = (bits >> np.uint64(shift)).astype(np.uint32).view(np.float32).astype(np.float64)
    return scale


def bits_of(encoding: str, values: Values) -> Bits:
    """Return the bits that a conversion of exact values [rows, columns] to ``encoding`` must give.

    Floats round once, to nearest even. Q8_0 and MXFP4 follow their reference quantisers.
    """
    bits: Bits = _bits(encoding, values)
    return bits


def _bits(encoding: str, values: Values) -> Any:
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        if encoding == "f32":
            return values.astype(np.float32).view(np.uint32)
        if encoding == "f16":
            return values.astype(np.float16).view(np.uint16)
        if encoding == "bf16":
            return _bf16_bits(values)
        if encoding == "q8_0":
            return _q8_0_bits(values)
        if encoding == "mxfp4":
            return _mxfp4_bits(values)
    raise KeyError(encoding)


BF16_PRECISION = 8  # bits of the significand, the hidden one among them
BF16_MIN_EXPONENT = -126
BF16_MAX = (2 - 2.0**-7) * 2.0**127


def _bf16_bits(values: Values) -> Any:
    """Round to eight significant bits, to nearest even; above the range is infinity."""
    _, exponent = np.frexp(values)  # |values| = [0.5, 1) * 2^exponent
    unit = np.maximum(exponent - 1, BF16_MIN_EXPONENT) - (BF16_PRECISION - 1)
    rounded = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
    rounded = np.where(np.isfinite(values), rounded, values)
    rounded = np.where(np.abs(rounded) > BF16_MAX, np.copysign(np.inf, values), rounded)
    bits = (rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


def _q8_0_bits(values: Values) -> Any:
    """ggml's reference: in float32, d = amax / 127, q = x * (1 / d) rounded half away from zero."""
    rows, columns = values.shape
    x = values.astype(np.float32).reshape(rows, columns // BLOCK, BLOCK)
    amax = np.max(np.abs(x), axis=2, keepdims=True)
    d = amax / np.float32(127)
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    scaled = (x * inverse).astype(np.float64)
    q = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    # A block with a NaN or an infinity, and one too small for 1/d, holds zeros under its d.
    q = np.where(np.isfinite(inverse) & np.isfinite(amax), q, 0).astype(np.int8)
    d16 = np.where(np.isnan(d), np.uint16(F16_NAN), d.astype(np.float16).view(np.uint16))
    bits = (d16.astype(np.uint32) << np.uint32(8)) | q.view(np.uint8)
    return bits.reshape(rows, columns)


AFFINE_LEVELS = 255


def affine8_bits(values: Values, group: int) -> Bits:
    """Return finite values [rows, columns] that begin a group as MLX's affine mode of eight bits, BF16 before.

    In float32: the end of a group that is farther from zero is its bias, and a whole number of scales.
    """
    one = np.float32
    x = _values("bf16", _bf16_bits(values)).astype(one).reshape(-1, group)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scale = np.maximum((high - low) / one(AFFINE_LEVELS), one(1e-7))
    upper = np.abs(low) <= np.abs(high)
    scale, edge = np.where(upper, -scale, scale), np.where(upper, high, low)
    count = np.rint(edge / scale)
    scale = np.divide(edge, count, out=scale.copy(), where=count != 0)
    bias = np.where(count == 0, one(0), edge)
    code = np.minimum(np.maximum(np.rint((x - bias) / scale), 0), AFFINE_LEVELS).astype(np.uint64)
    above = _bf16_bits(scale.astype(np.float64)).astype(np.uint64) << np.uint64(8)
    above |= _bf16_bits(bias.astype(np.float64)).astype(np.uint64) << np.uint64(24)
    bits: Bits = (above | code).reshape(values.shape)
    return bits


def _nearest_e2m1(scaled: Values) -> Any:
    """Return the code of the nearest e2m1 value, the even code of two; beyond 6 is 6."""
    magnitude = np.abs(scaled)
    code = np.zeros(scaled.shape, np.uint8)
    for lower in range(7):
        middle = (E2M1[lower] + E2M1[lower + 1]) / 2
        upward = magnitude >= middle if lower % 2 else magnitude > middle
        code = np.where(upward, np.uint8(lower + 1), code)
    return code | np.where(np.signbit(scaled), np.uint8(8), np.uint8(0))


def _mxfp4_bits(values: Values) -> Any:
    """The quantiser of formats/mxfp4.py: the smallest scale that reaches the largest magnitude.

    Blocks that are exact at two scales take the coarser one; blocks that only 2^-127 holds take it; a
    block with a NaN is NaN, without codes.
    """
    rows, columns = values.shape
    x = values.astype(np.float32).astype(np.float64).reshape(rows, columns // BLOCK, BLOCK)
    nan = np.isnan(x).any(axis=2, keepdims=True)
    x = np.where(nan, 0.0, x)
    amax = np.max(np.abs(x), axis=2, keepdims=True)
    # amax = f * 2^k with f in [0.5, 1) and 6 = 0.75 * 2^3: amax <= 6 * 2^s needs s = k - 3, or one more.
    # Infinity counts as 2^128, the first number that float32 does not have.
    fraction, exponent = np.frexp(np.minimum(amax, 2.0**128))
    power = np.clip(exponent - 3 + (fraction > 0.75), -126, 127)
    power = np.where(amax == 0, -126, power)
    code = _nearest_e2m1(np.ldexp(x, -power))
    exact = (np.ldexp(E2M1[code], power) == x).all(axis=2, keepdims=True)
    fine = _nearest_e2m1(np.ldexp(x, E8M0_BIAS))
    finer = ~exact & (power == -126) & (amax <= 6 * 2.0**-127)
    code = np.where(finer, fine, code)
    power = np.where(finer, -127, power)
    exact = (np.ldexp(E2M1[code], power) == x).all(axis=2, keepdims=True)
    halved = _nearest_e2m1(E2M1[code] / 2)
    has_half = (E2M1[halved] * 2 == E2M1[code]).all(axis=2, keepdims=True)
    has_six = ((code & 7) == 7).any(axis=2, keepdims=True)
    coarser = exact & has_half & has_six & (power < 127)
    code = np.where(coarser, halved, code)
    scale = np.where(nan, E8M0_NAN, power + coarser + E8M0_BIAS)
    bits = (scale.astype(np.uint16) << np.uint16(4)) | np.where(nan, 0, code)
    return bits.astype(np.uint16).reshape(rows, columns)


# The published quantiser's floors for the largest magnitude of a block.
FP8_LEAST = float(np.float32(1e-4))
FP4_LEAST = 6 * 2.0**-126


def _published_power(amax: Any, least: float, largest: float) -> Any:
    """Return the smallest power with amax / 2^power <= largest, the format's own largest value."""
    fraction, exponent = np.frexp(np.maximum(amax, least))
    limit_fraction, limit_exponent = np.frexp(largest)
    return exponent - limit_exponent + (fraction > limit_fraction)


def published_fp8_bits(values: Values, block: tuple[int, int]) -> Bits:
    """Return finite values [rows, columns] that begin a block as FP8 with an e8m0 scale per ``block``."""
    out = np.zeros(values.shape, np.uint16)
    for top in range(0, values.shape[0], block[0]):
        for left in range(0, values.shape[1], block[1]):
            place = (slice(top, top + block[0]), slice(left, left + block[1]))
            power = int(_published_power(np.max(np.abs(values[place])), FP8_LEAST, E4M3_POSITIVE[-1]))
            out[place] = nearest_e4m3(np.ldexp(values[place], -power)) | (power + E8M0_BIAS) << 8
    return out


def published_fp4_bits(values: Values) -> Bits:
    """Return finite values [rows, columns] that begin a block as packed FP4's codes under scales of 32 elements."""
    rows, columns = values.shape
    x = values.reshape(rows, columns // BLOCK, BLOCK)
    power = _published_power(np.max(np.abs(x), axis=2, keepdims=True), FP4_LEAST, E2M1[7])
    bits: Bits = (power + E8M0_BIAS).astype(np.uint16) << np.uint16(4) | _nearest_e2m1(np.ldexp(x, -power))
    return bits.reshape(rows, columns)


def fp4_as_fp8_bits(bits: Bits, side: int = FP8_TILE) -> tuple[Bits, bool]:
    """Return FP4 [rows, columns] that begin a tile as FP8 under the tile's scale, and whether exactly.

    A tile has ``side`` rows and columns.

    The scale is the tile's largest FP4 scale / 2^6 (2^-127 at least); a NaN scale has no part in it.
    """
    scale, code = (bits >> 4).astype(np.int32), bits & 0xF
    out = np.zeros(bits.shape, np.uint16)
    smallest = NAN_LIFT
    for top in range(0, bits.shape[0], side):
        for left in range(0, bits.shape[1], side):
            tile = (slice(top, top + side), slice(left, left + side))
            largest = int(np.max(scale[tile], where=scale[tile] != E8M0_NAN, initial=-1))
            shared = E8M0_NAN if largest < 0 else max(largest - FP8_HEADROOM, 0)
            lift = np.where(scale[tile] == E8M0_NAN, NAN_LIFT, np.maximum(scale[tile] - shared, MIN_LIFT))
            out[tile] = np.take(_e4m3_of_e2m1(), (lift - MIN_LIFT) * 16 + code[tile]) | shared << 8
            smallest = min(smallest, int(lift.min()))
    return out, smallest >= EXACT_LIFT


def fp4_as_nvfp4_bits(bits: Bits, largest: int) -> tuple[Bits, bool]:
    """Return FP4 [rows, columns] as NVFP4 under the second scale of the largest scale byte, and whether exactly.

    The second scale is 2^-8 of the largest scale; an e4m3 scale is the power of two that is left, 2^-9 at least, where
    codes are then rounded to nearest even.
    """
    scale, code = (bits >> 4).astype(np.int32), (bits & 0xF).astype(np.uint64)
    second = np.ldexp(np.float32(1), largest - E8M0_BIAS - E4M3_MAX_POWER)
    power = scale - largest + E4M3_MAX_POWER
    nan, low = scale == E8M0_NAN, power < E4M3_MIN_POWER
    kept = np.where(nan, 0, np.maximum(power, E4M3_MIN_POWER))
    made = np.where(nan, np.uint16(E4M3_NAN), nearest_e4m3(np.ldexp(1.0, kept))).astype(np.uint64)
    if low.any():
        halved = _nearest_e2m1(np.ldexp(E2M1[bits & 0xF], np.where(low, power - E4M3_MIN_POWER, 0)))
        code = np.where(low, halved, code).astype(np.uint64)
    shared = np.uint64(int(second.view(np.uint32)))
    return (shared << np.uint64(12)) | (made << np.uint64(4)) | code, not low.any()


# The powers of two among the e4m3 numbers.
E4M3_MAX_POWER, E4M3_MIN_POWER, E4M3_NAN = 8, -9, 0x7F

FP8_HEADROOM = 6  # 6 * 2^6 = 384 fits under 448
# How many powers of two a scale is above its tile's: at most the headroom; one beyond stands for NaN.
EXACT_LIFT = -8  # 0.5 * 2^-8 is e4m3's smallest value
MIN_LIFT, NAN_LIFT = -E8M0_NAN, FP8_HEADROOM + 1


@cache
def _e4m3_of_e2m1() -> npt.NDArray[np.uint16]:
    """Return the e4m3 code of every e2m1 code at every lift, lifts in rows from ``MIN_LIFT`` on."""
    lifts = np.arange(MIN_LIFT, FP8_HEADROOM + 1)[:, None]
    codes = nearest_e4m3(np.ldexp(E2M1[None, :], lifts))
    nan = np.full((1, 16), nearest_e4m3(np.array([np.nan]))[0], np.uint16)
    return np.concatenate([codes, nan]).reshape(-1)


E4M3_POSITIVE = E4M3[: 0x7E + 1]  # ascending, 0 to 448


def nearest_e4m3(values: Values) -> npt.NDArray[np.uint16]:
    """Return the code of the nearest e4m3 value, the even code of two; NaN is 0x7F."""
    magnitude = np.where(np.isnan(values), 0, np.abs(values))
    above = np.clip(np.searchsorted(E4M3_POSITIVE, magnitude), 1, len(E4M3_POSITIVE) - 1)
    below = above - 1
    up = E4M3_POSITIVE[above] - magnitude
    down = magnitude - E4M3_POSITIVE[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = np.where(np.signbit(values), code | 0x80, code)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint16)


def within_half_step(encoding: str, source: Values, bits: Bits) -> Mask:
    """Return where stored elements [rows, columns] are as near to the source as their format allows.

    What another quantiser may have chosen: the rounding rule, and within reason the scale. Float formats:
    either neighbour. Q8_0: half a step of the larger of its d and the reference's, and what rounding d to
    float16 adds. MXFP4 and FP8: the nearest code at the stored scale, which is at most one power of two
    from the reference's.
    """
    allowed: Mask = _allowed(encoding, source, bits)
    return allowed


def _allowed(encoding: str, source: Values, bits: Bits) -> Any:
    value = values_of(encoding, bits)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        error = np.abs(value - source)
        both_nan = np.isnan(value) & np.isnan(source)
        if encoding in ("f32", "f16", "bf16"):
            nearest = values_of(encoding, bits_of(encoding, source))
            return both_nan | (value == nearest) | (error <= 2 * np.abs(nearest - source))
        if encoding == "q8_0":
            rows, columns = source.shape
            amax = np.max(np.abs(source).reshape(rows, columns // BLOCK, BLOCK), axis=2)
            d = np.repeat(amax / 127, BLOCK, axis=1)
            stored = (bits >> 8).astype(np.uint16).view(np.float16).astype(np.float64)
            step = np.maximum(d, np.abs(stored))
            return both_nan | (error <= 0.5 * step + 127 * np.maximum(step * 2.0**-11, 2.0**-25))
        if encoding == "mxfp4":
            reference = bits_of("mxfp4", source)
            near = np.abs((bits >> 4).astype(np.int64) - (reference >> 4).astype(np.int64)) <= 1
            best = _nearest_e2m1(source / e8m0_values(bits >> 4))
            return both_nan | (near & (error <= np.abs(E2M1[best] * e8m0_values(bits >> 4) - source)))
        if encoding == "fp8":
            scale = e8m0_values(bits >> 8)
        else:
            scale = (bits >> np.uint64(8)).astype(np.uint32).view(np.float32).astype(np.float64)
        best = np.minimum(nearest_e4m3(source / scale), 0xFF)
        return both_nan | (error <= np.abs(E4M3[best] * scale - source))
