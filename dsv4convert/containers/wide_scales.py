"""E8M0 scales that a folder holds as F32 or BF16: read as the bytes that they stand for, or refused by name.

Powers of two fit all three types, so that nothing is lost, and what is made of such a folder is byte for byte what is
made of the published form. Any other value has no E8M0 byte, and rounding it would change weights in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InventoryError
from ..formats.e8m0 import wide_to_e8m0
from .safetensors import Stored, tensor_at

# Integers that hold the bits of a scale, by safetensors dtype.
WIDE_BITS: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2")}
E8M0 = "F8_E8M0"


def as_e8m0(scale: Stored) -> Stored:
    """Return stored scales as E8M0: one of ``WIDE_BITS`` is to be read through ``narrow``, bytes are what they are."""
    return scale._replace(dtype=E8M0, wide=scale.dtype if scale.dtype in WIDE_BITS else "")


def narrow(
    raw: NDArray[np.uint8], wide: str, file: Path, offset: int, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Return E8M0 bytes [r, c] of scales as they lie, bytes [r, c · 4 or 2] read at ``offset`` of ``file``.

    Raises:
        InventoryError: a scale is no power of two; names the tensor and the position.
    """
    bits: NDArray[Any] = raw.view(WIDE_BITS[wide])
    codes = np.empty(bits.shape, np.uint8) if out is None else out
    index = wide_to_e8m0(bits, codes)
    if index is not None:
        raise _no_power_of_two(bits, index, wide, file, offset)
    return codes


def _no_power_of_two(bits: NDArray[Any], index: int, wide: str, file: Path, offset: int) -> InventoryError:
    size = WIDE_BITS[wide].itemsize
    value = (int(bits.reshape(-1)[index]) << (32 - 8 * size)).to_bytes(4, "little")
    place = offset + index * size
    found = tensor_at(file, place)
    where = f"at byte {place}"
    if found is not None:
        name, stored = found
        position = np.unravel_index((place - stored.offset) // size, stored.shape)
        where = f"tensor {name}: {wide} scale {list(map(int, position))}"
    return InventoryError(
        f"{where} is not a power of two",
        where=file,
        expected="2^-127 to 2^127, as E8M0 holds",
        got=f"{np.frombuffer(value, '<f4')[0]:.9g}",
        hint="E8M0 scales were changed; take the published checkpoint",
    )
