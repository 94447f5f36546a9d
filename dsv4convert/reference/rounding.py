"""What the published kernels do to activations: rounding to e4m3 or e2m1 with a scale per block.

The results stay float32: each value is replaced by the nearest one that the narrow format holds.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import UnsupportedError
from .weights.protocol import Array


class Narrow(NamedTuple):
    """A format of few bits; subnormals share the least exponent of normal numbers."""

    largest: float
    mantissa_bits: int
    min_exponent: int


E4M3_MAX = 1.75 * 2.0**8  # 448, code 0b0_1111_110
E2M1_MAX = 1.5 * 2.0**2  # 6, code 0b0_11_1
E4M3 = Narrow(E4M3_MAX, mantissa_bits=3, min_exponent=-6)
E2M1 = Narrow(E2M1_MAX, mantissa_bits=1, min_exponent=0)

LINEAR_BLOCK = 128  # input of an FP8 or FP4 linear
KV_BLOCK = 64  # raw and compressed kv, without their rotary part
INDEXER_BLOCK = 32  # the indexer's queries and entries
LINEAR_BLOCK_V41 = 32  # V4.1: input of an FP8 or FP4 linear, and all of the raw kv
ENTRY_BLOCK = 16  # V4.1: all of the compressed kv, with e4m3 scales

E4M3_AMAX_FLOOR = 1e-4
E2M1_AMAX_FLOOR = E2M1_MAX * 2.0**-126  # the smallest normal scale
E2M1_E4M3_AMAX_FLOOR = E2M1_MAX * 2.0**-9  # the smallest e4m3 scale, a subnormal


def round_to_e4m3(x: Array, block: int) -> Array:
    """Return ``x`` rounded to e4m3 in blocks of ``block`` along the last axis, as float32.

    The scale of a block is 2^⌈log2(amax / 448)⌉, with amax at least 1e-4. Nearest, ties to even.
    """
    return _round_in_blocks(x, block, E4M3, E4M3_AMAX_FLOOR, _power_of_two_at_least)


def round_to_e2m1(x: Array, block: int) -> Array:
    """Return ``x`` rounded to e2m1 in blocks of ``block`` along the last axis, as float32.

    The scale of a block is 2^⌈log2(amax / 6)⌉. Nearest, ties to even.
    """
    return _round_in_blocks(x, block, E2M1, E2M1_AMAX_FLOOR, _power_of_two_at_least)


def round_to_e2m1_scaled_e4m3(x: Array, block: int) -> Array:
    """Return ``x`` rounded to e2m1 in blocks whose scales are e4m3, not powers of two.

    The scale of a block is amax / 6 rounded to e4m3, with amax at least 6·2⁻⁹. Nearest, ties to even.
    """
    return _round_in_blocks(x, block, E2M1, E2M1_E4M3_AMAX_FLOOR, lambda scale: _nearest(scale, E4M3))


def _round_in_blocks(
    x: Array, block: int, format: Narrow, amax_floor: float, scale_of: Callable[[Array], Array]
) -> Array:
    """Return ``x`` rounded to ``format``; ``scale_of`` makes a scale of what would fit the block exactly."""
    width = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % block)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    amax = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), np.float32(amax_floor))
    scale = scale_of(amax / np.float32(format.largest))
    rounded: Array = (_nearest(blocks / scale, format) * scale).astype(np.float32)
    return rounded.reshape(padded.shape)[..., :width]


def _nearest(x: Array, format: Narrow) -> Array:
    """Return the nearest values of ``format``, ties to even, beyond the largest the largest."""
    value = np.clip(x, -format.largest, format.largest)
    _, exponent = np.frexp(value)  # value = m·2^exponent with m in [0.5, 1)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, format.min_exponent) - format.mantissa_bits)
    return np.rint(value / step) * step


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
