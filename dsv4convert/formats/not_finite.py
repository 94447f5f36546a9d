"""Counts elements that are NaN or infinite in bytes that only move: the magnitude of an element tells.

| dtype | magnitude | not finite from | which are |
|---|---|---|---|
| F32 | 0x7FFF_FFFF | 0x7F80_0000 | NaN and infinities |
| BF16 | 0x7FFF | 0x7F80 | NaN and infinities |
| F16 | 0x7FFF | 0x7C00 | NaN and infinities |
| F8_E4M3 | 0x7F | 0x7F | NaN; there are no infinities |
| F8_E8M0 | 0xFF | 0xFF | NaN; there is no sign |

An element is not finite exactly where it has all bits of that least magnitude. Packed FP4 and integers have no such
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

# A count of elements: (dtype, bytes, scratch of as many bytes).
NotFiniteCounter: TypeAlias = Callable[[str, NDArray[np.uint8], NDArray[np.uint8]], int]


class Magnitude(NamedTuple):
    """Unsigned integers that hold elements, the bits of their magnitude, and the least one that is not finite."""

    dtype: str
    mask: int
    least: int


MAGNITUDES = {
    "F32": Magnitude("<u4", 0x7FFFFFFF, 0x7F800000),
    "BF16": Magnitude("<u2", 0x7FFF, 0x7F80),
    "F16": Magnitude("<u2", 0x7FFF, 0x7C00),
    "F8_E4M3": Magnitude("u1", 0x7F, 0x7F),
    "F8_E8M0": Magnitude("u1", 0xFF, 0xFF),
}


def count_not_finite(dtype: str, content: NDArray[np.uint8], scratch: NDArray[np.uint8]) -> int:
    """Return how many elements of a tensor's bytes are NaN or infinite; ``scratch`` has room for as many bytes.

    ``content`` is one-dimensional and begins with an element; bytes of a last one that is cut are not looked at. One
    pass finds the largest magnitude; elements are counted only where that is not finite.

    >>> bits = np.array([0x3F80, 0xFF80, 0x7FC0], "<u2")  # 1, -infinity, NaN
    >>> count_not_finite("BF16", bits.view(np.uint8), np.empty(6, np.uint8))
    2
    """
    kind = MAGNITUDES.get(dtype)
    if kind is None:
        return 0
    size = np.dtype(kind.dtype).itemsize
    bits = content[: len(content) // size * size].view(kind.dtype)
    if not bits.size:
        return 0
    if kind.mask != np.iinfo(bits.dtype).max:
        bits = np.bitwise_and(bits, bits.dtype.type(kind.mask), out=scratch[: bits.nbytes].view(bits.dtype))
    return int(np.count_nonzero(bits >= kind.least)) if bits.max() >= kind.least else 0


def element_bytes(dtype: str) -> int:
    """Return the bytes of an element of a type that has values which are not finite, 1 of any other."""
    return np.dtype(MAGNITUDES[dtype].dtype).itemsize if dtype in MAGNITUDES else 1
