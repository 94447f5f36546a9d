"""float8_e8m0fnu, the power-of-two scales: bits to float32 and back, and F32 scales that are powers of two.

::

    bits   eeeeeeee            value = 2^(e - 127)
    0x00   2^-127              a float32 subnormal
    0x7F   1.0
    0xFE   2^127               largest
    0xFF   NaN                 no sign, no zero, no infinity

gguf-py, llama.cpp and compressed-tensors read 0xFF as a number or as infinity; torch, ml_dtypes and
torchao as NaN, and so does this package.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import F32_NAN_BITS, Array, ArrayF32, ArrayU8, Scratch

BIAS = 127
NAN_BYTE = 0xFF
MAX_BYTE = 0xFE
F32_MANTISSA_BITS = 23
_BF16_SHIFT = 16  # a bfloat16 is the upper half of a float32
# 2^-127 has no exponent of its own in float32: it is half of the smallest normal number.
_BYTE_0_BITS = np.uint32(1 << (F32_MANTISSA_BITS - 1))


def _f32_table() -> ArrayF32:
    bits = np.arange(256, dtype=np.uint32) << np.uint32(F32_MANTISSA_BITS)
    bits[0] = _BYTE_0_BITS
    bits[NAN_BYTE] = F32_NAN_BITS
    table: ArrayF32 = bits.view(np.float32)
    return table


F32_OF_BYTE = _f32_table()
F32_OF_BYTE.flags.writeable = False


def e8m0_to_f32(scale: ArrayU8) -> ArrayF32:
    """Return the float32 value of each e8m0 byte, any shape; exact, 0xFF is NaN.

    >>> e8m0_to_f32(np.array([0, 127, 128, 255], np.uint8)).tolist()
    [5.877471754111438e-39, 1.0, 2.0, nan]
    """
    return np.take(F32_OF_BYTE, scale, mode="clip")


def f32_to_e8m0(scale: ArrayF32) -> ArrayU8:
    """Return the e8m0 byte of each float32 scale; NaN becomes 0xFF.

    Raises ValueError where a scale is neither NaN nor a power of two from 2^-127 to 2^127.

    >>> f32_to_e8m0(np.array([1.0, 0.25], np.float32)).tolist()
    [127, 125]
    """
    codes = power_of_two_bytes(np.atleast_2d(np.ascontiguousarray(scale, np.float32)), Scratch())
    if codes is None:
        raise ValueError("a scale is not a power of two")
    result: ArrayU8 = codes.reshape(np.shape(scale)).copy()
    return result


def power_of_two_bytes(scale: Array, scratch: Scratch) -> ArrayU8 | None:
    """Return ``scale`` as e8m0 bytes, or None when an F32 scale is no positive power of two.

    E8M0 bytes come back as they are. The F32 scales of the Base checkpoints are e8m0 values written as
    floats; everything exact about e8m0 then holds for them too.
    """
    if scale.dtype == np.uint8:
        return scale
    codes: ArrayU8 = scratch.array("e8m0.codes", scale.shape, np.uint8)
    return codes if wide_to_e8m0(scale.view(np.uint32), codes) is None else None


def wide_to_e8m0(bits: Array, out: ArrayU8) -> int | None:
    """Fill ``out`` with the e8m0 bytes of scales given as the bits of F32 (uint32) or BF16 (uint16), NaN as 0xFF.

    Return the index, in the flattened array, of the first that is neither NaN nor a power of two from 2^-127 to 2^127,
    or None where all are.

    >>> out = np.empty(3, np.uint8)
    >>> wide_to_e8m0(np.array([0x3F80, 0x0040, 0x7FC0], np.uint16), out), out.tolist()  # 1, 2^-127, NaN
    (None, [127, 0, 255])
    >>> wide_to_e8m0(np.array([0x3F80, 0x4040, 0], np.uint16), out)  # 3 is no power of two, and neither is 0
    1
    """
    if bits.dtype == np.uint16:
        bits = bits.astype(np.uint32) << np.uint32(_BF16_SHIFT)
    np.right_shift(bits, np.uint32(F32_MANTISSA_BITS), out=out, casting="unsafe")
    # A byte's float32 bits name the scale completely; what differs is negative, zero, infinite, or
    # between two powers of two. NaN may carry any sign and payload.
    is_nan = np.isnan(bits.view(np.float32))
    np.copyto(out, NAN_BYTE, where=is_nan)
    same: npt.NDArray[np.bool_] = np.take(F32_OF_BYTE.view(np.uint32), out) == bits
    same |= is_nan
    return None if bool(same.all()) else int(np.argmin(same.reshape(-1)))


def spread_scales(scale: ArrayU8, times: tuple[int, int], out: ArrayU8) -> None:
    """Fill ``out`` [R, C] with each scale of [ceil(R / down), ceil(C / across)], ``times`` (down, across) over.

    Raises ValueError where ``scale`` has another shape.

    >>> out = np.empty((3, 3), np.uint8)
    >>> spread_scales(np.array([[1, 2], [3, 4]], np.uint8), (2, 2), out)
    >>> out.tolist()
    [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    """
    rows, columns = out.shape
    down, across = times
    if scale.shape != (-(-rows // down), -(-columns // across)):
        raise ValueError(f"scales: expected {(-(-rows // down), -(-columns // across))}, got {scale.shape}")
    wide = np.repeat(scale, across, axis=1)[:, :columns]
    np.take(wide, np.arange(rows) // down, axis=0, out=out, mode="clip")


def byte_range(codes: ArrayU8) -> tuple[int, int, bool]:
    """Smallest and largest scale byte that is not NaN, and whether a NaN is among them.

    Two reductions of the few scale bytes of a tile decide whether any element can leave a format's range.
    """
    if codes.size == 0:
        return BIAS, BIAS, False
    smallest, largest = int(codes.min()), int(codes.max())
    if largest != NAN_BYTE:
        return smallest, largest, False
    real = codes[codes != NAN_BYTE]
    if real.size == 0:
        return BIAS, BIAS, True
    return smallest, int(real.max()), True


def scales_f32(scale: Array) -> ArrayF32:
    """Return scales of either storage as float32."""
    return e8m0_to_f32(scale) if scale.dtype == np.uint8 else scale
