"""bfloat16, float16 and float32: conversions with the rounding counted, and the rounding of exact products.

::

    bfloat16   s eeeeeeee mmmmmmm      bias 127, the upper half of a float32; NaN written as 0x7FC0
    float16    s eeeee mmmmmmmmmm      bias 15, largest 65504;                NaN written as 0x7E00
    float32    s eeeeeeee m*23         bias 127;                              NaN written as 0x7FC00000

numpy has no bfloat16: the arrays are uint16 holding its bits. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import (
    BF16_MIN_NORMAL,
    BF16_NAN_BITS,
    F16_MIN_NORMAL,
    F16_NAN_BITS,
    F32_MIN_NORMAL,
    F32_NAN_BITS,
    Array,
    ArrayF16,
    ArrayF32,
    ArrayF64,
    ArrayU16,
    Scratch,
    Tally,
)

_HALF_BITS = np.uint32(16)
_LOW_HALF = np.uint32(0xFFFF)
_ROUND_BIAS = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_BF16_INF = np.uint16(0x7F80)
_BF16_OVERFLOW = np.uint32(0x7F7F_8000)  # half way from the largest bfloat16 to the next power of two
_F32_MIN_NORMAL = np.uint32(0x0080_0000)
_MAGNITUDE_32 = np.uint32(0x7FFF_FFFF)
_MAGNITUDE_16 = np.uint16(0x7FFF)
_F16_INF = np.uint16(0x7C00)

_BF16_MANTISSA_BITS = 7
_BF16_MIN_EXPONENT = -126
_F64_MANTISSA_BITS = 52
_F64_BIAS = 1023
_F32_MAX_EXPONENT = 127


def bf16_to_f32(source: ArrayU16, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Widen bfloat16 bits [R, C] to float32 [R, C]; exact, a NaN becomes the one NaN."""
    bits = out.view(np.uint32)
    np.copyto(bits, source)
    np.left_shift(bits, _HALF_BITS, out=bits)
    nan = _nan_mask_16(source, _BF16_INF, scratch)
    if nan is not None:
        tally.nan += int(np.count_nonzero(nan))
        np.copyto(bits, F32_NAN_BITS, where=nan)


def widened_bf16(values: ArrayU16, scratch: Scratch) -> ArrayF32:
    """Return bfloat16 bits, any shape, as float32."""
    wide: ArrayF32 = scratch.array("bf16.widened", values.shape, np.float32)
    bf16_to_f32(values, wide, scratch, Tally())
    return wide


def f16_to_f32(source: ArrayF16, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Widen float16 [R, C] to float32 [R, C]; exact, a NaN becomes the one NaN."""
    np.copyto(out, source)
    nan = _nan_mask_16(source.view(np.uint16), _F16_INF, scratch)
    if nan is not None:
        tally.nan += int(np.count_nonzero(nan))
        np.copyto(out.view(np.uint32), F32_NAN_BITS, where=nan)


def f32_to_bf16(source: ArrayF32, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Round float32 [R, C] to bfloat16 bits [R, C]."""
    if source.size == 0:
        return
    bits = source.view(np.uint32)
    work = scratch.array("bf16.magnitude", source.shape, np.uint32)
    np.bitwise_and(bits, _MAGNITUDE_32, out=work)
    if work.max() < _BF16_OVERFLOW:
        # No NaN, no infinity, and nothing that rounds to it.
        tiny = 0
        if work.min() < _F32_MIN_NORMAL:
            tiny = int(np.count_nonzero((bits & _LOW_HALF)[work < _F32_MIN_NORMAL]))
        inexact = int(np.count_nonzero(np.bitwise_and(bits, _LOW_HALF, out=work)))
        tally.underflow += tiny
        tally.changed += inexact - tiny
        if inexact:
            round_f32_bits_to_bf16(bits, out, scratch)
        else:
            np.right_shift(bits, _HALF_BITS, out=out, casting="unsafe")
        return
    nan = np.isnan(source)
    tally.nan += int(np.count_nonzero(nan))
    round_f32_bits_to_bf16(bits, out, scratch)
    np.copyto(out, BF16_NAN_BITS, where=nan)
    inexact_mask = ((bits & _LOW_HALF) != 0) & ~nan
    _count(tally, inexact_mask, (out & _MAGNITUDE_16) == _BF16_INF, work < _F32_MIN_NORMAL)


def round_f32_bits_to_bf16(bits: npt.NDArray[np.uint32], out: ArrayU16, scratch: Scratch) -> None:
    """Round float32 bits to bfloat16 bits, to nearest even; NaN must be dealt with by the caller.

    Adding just under half of the dropped part, plus the lowest kept bit, carries into the kept part
    exactly when the nearest even value lies above; a carry out of the mantissa raises the exponent,
    which is the right answer, infinity included.
    """
    work = scratch.array("bf16.u32", bits.shape, np.uint32)
    np.right_shift(bits, _HALF_BITS, out=work)
    np.bitwise_and(work, _ONE, out=work)
    np.add(work, _ROUND_BIAS, out=work)
    np.add(work, bits, out=work)
    np.right_shift(work, _HALF_BITS, out=out, casting="unsafe")


def f32_to_f16(source: ArrayF32, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Round float32 [R, C] to float16 [R, C]."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, source, casting="same_kind")
    nan = np.isnan(source)
    if nan.any():
        tally.nan += int(np.count_nonzero(nan))
        np.copyto(out.view(np.uint16), F16_NAN_BITS, where=nan)
    inexact = out.astype(np.float32) != source
    if inexact.any():
        inexact &= ~nan
        _count(tally, inexact, np.isinf(out), np.abs(source) < F16_MIN_NORMAL)


def bf16_to_f16(source: ArrayU16, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Round bfloat16 bits [R, C] to float16 [R, C]."""
    wide = scratch.array("bf16.wide", source.shape, np.float32)
    bf16_to_f32(source, wide, scratch, Tally())  # the second step counts the NaNs
    f32_to_f16(wide, out, scratch, tally)


def f16_to_bf16(source: ArrayF16, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Round float16 [R, C] to bfloat16 bits [R, C]."""
    wide = scratch.array("bf16.wide", source.shape, np.float32)
    f16_to_f32(source, wide, scratch, Tally())  # the second step counts the NaNs
    f32_to_bf16(wide, out, scratch, tally)


def i64_to_i32(source: npt.NDArray[np.int64], out: npt.NDArray[np.int32], scratch: Scratch, tally: Tally) -> None:
    """Narrow int64 to int32, any shape; a value out of range is counted and saturates."""
    limits = np.iinfo(np.int32)
    outside = int(np.count_nonzero((source < limits.min) | (source > limits.max)))
    if outside:
        tally.overflow += outside
        source = np.clip(source, limits.min, limits.max)
    np.copyto(out, source, casting="same_kind")


def store_products(product: ArrayF64, out: Array, scratch: Scratch, tally: Tally) -> None:
    """Round exact float64 products once to ``out``: float32, float16, or bfloat16 bits as uint16.

    The product of a code of at most 4 significant bits and a float32 has at most 28 of them, so float64
    holds it exactly and this is the only rounding.
    """
    nan = np.isnan(product)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if out.dtype == np.uint16:
            kept = round_f64_to_bf16(product)
            np.right_shift(kept.view(np.uint32), _HALF_BITS, out=out, casting="unsafe")
            np.copyto(out, BF16_NAN_BITS, where=nan)
            smallest = BF16_MIN_NORMAL
        elif out.dtype == np.float16:
            np.copyto(out, product, casting="same_kind")
            np.copyto(out.view(np.uint16), F16_NAN_BITS, where=nan)
            kept = out.astype(np.float32)
            smallest = F16_MIN_NORMAL
        else:
            np.copyto(out, product, casting="same_kind")
            np.copyto(out.view(np.uint32), F32_NAN_BITS, where=nan)
            kept = out
            smallest = F32_MIN_NORMAL
    tally.nan += int(np.count_nonzero(nan))
    inexact = (kept != product) & ~nan
    infinite = np.isinf(kept)
    _count(tally, inexact | infinite, infinite, np.abs(product) < smallest)


def round_f64_to_bf16(values: ArrayF64) -> ArrayF32:
    """Round float64 to bfloat16, to nearest even in one step, and return it as float32.

    Adding and subtracting 1.5 * 2^(52 - 7 + exponent) makes the processor round at the bfloat16's last
    place; going through float32 instead would round twice.
    """
    exponent = (values.view(np.int64) >> _F64_MANTISSA_BITS) & 0x7FF
    np.clip(exponent, _F64_BIAS + _BF16_MIN_EXPONENT, _F64_BIAS + _F32_MAX_EXPONENT + 1, out=exponent)
    magic_bits = (exponent + (_F64_MANTISSA_BITS - _BF16_MANTISSA_BITS)) << _F64_MANTISSA_BITS
    magic_bits |= 1 << (_F64_MANTISSA_BITS - 1)
    magic = magic_bits.view(np.float64)
    rounded = (values + magic) - magic
    return np.copysign(rounded, values).astype(np.float32)


def _nan_mask_16(bits: ArrayU16, infinity: np.uint16, scratch: Scratch) -> npt.NDArray[np.bool_] | None:
    magnitude = scratch.array("bf16.u16", bits.shape, np.uint16)
    np.bitwise_and(bits, _MAGNITUDE_16, out=magnitude)
    if magnitude.size == 0 or magnitude.max() <= infinity:
        return None
    return magnitude > infinity


def _count(
    tally: Tally,
    inexact: npt.NDArray[np.bool_],
    infinite: npt.NDArray[np.bool_],
    tiny: npt.NDArray[np.bool_],
) -> None:
    total = int(np.count_nonzero(inexact))
    over = int(np.count_nonzero(inexact & infinite))
    under = int(np.count_nonzero(inexact & tiny))
    tally.overflow += over
    tally.underflow += under
    tally.changed += total - over - under
