"""What the published kernels do to activations: rounding to e4m3 or e2m1 with power-of-two block scales.

The results stay float32: each value is replaced by the nearest one that the narrow format holds.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedError
from .weights.protocol import Array

E4M3_MAX = 1.75 * 2.0**8  # 448, code 0b0_1111_110
E4M3_MANTISSA_BITS = 3
E4M3_MIN_EXPONENT = -6  # of normal numbers; subnormals share it

E2M1_MAX = 1.5 * 2.0**2  # 6, code 0b0_11_1
E2M1_MANTISSA_BITS = 1
E2M1_MIN_EXPONENT = 0

LINEAR_BLOCK = 128  # input of an FP8 or FP4 linear
KV_BLOCK = 64  # raw and compressed kv, without their rotary part
INDEXER_BLOCK = 32  # the indexer's queries and entries

E4M3_AMAX_FLOOR = 1e-4
E2M1_AMAX_FLOOR = E2M1_MAX * 2.0**-126  # the smallest normal scale


def round_to_e4m3(x: Array, block: int) -> Array:
    """Return ``x`` rounded to e4m3 in blocks of ``block`` along the last axis, as float32.

    The scale of a block is 2^⌈log2(amax / 448)⌉, with amax at least 1e-4. Nearest, ties to even.
    """
    return _round_in_blocks(x, block, E4M3_MAX, E4M3_MANTISSA_BITS, E4M3_MIN_EXPONENT, E4M3_AMAX_FLOOR)


def round_to_e2m1(x: Array, block: int) -> Array:
    """Return ``x`` rounded to e2m1 in blocks of ``block`` along the last axis, as float32.

    The scale of a block is 2^⌈log2(amax / 6)⌉. Nearest, ties to even.
    """
    return _round_in_blocks(x, block, E2M1_MAX, E2M1_MANTISSA_BITS, E2M1_MIN_EXPONENT, E2M1_AMAX_FLOOR)


def _round_in_blocks(
    x: Array, block: int, largest: float, mantissa_bits: int, min_exponent: int, amax_floor: float
) -> Array:
    width = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % block)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    amax = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), np.float32(amax_floor))
    scale = _power_of_two_at_least(amax / np.float32(largest))
    value = np.clip(blocks / scale, -largest, largest)
    _, exponent = np.frexp(value)  # value = m·2^exponent with m in [0.5, 1)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, min_exponent) - mantissa_bits)
    rounded: Array = (np.rint(value / step) * step * scale).astype(np.float32)
    return rounded.reshape(padded.shape)[..., :width]


def _power_of_two_at_least(x: Array) -> Array:
    """Return 2^⌈log2 x⌉ without a logarithm's rounding."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5))


def hadamard(x: Array) -> Array:
    """Return ``x`` times the orthonormal Sylvester-Hadamard matrix, along the last axis.

    Raises:
        UnsupportedError: the width is not a power of two.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise UnsupportedError("the Hadamard rotation of the indexer", expected="a power of two", got=n)
    shape = x.shape
    half = 1
    while half < n:
        pair = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pair[..., 0, :], pair[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(shape)
        half *= 2
    return x * np.float32(n**-0.5)
