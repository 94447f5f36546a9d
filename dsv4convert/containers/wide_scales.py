"""Scales that a folder holds in another type than operations take: read as the E8M0 bytes or float32 they stand for.

E8M0 as F32 or BF16, or as pairs of NVFP4: powers of two fit all these types, so that nothing is lost, and what is made
of such a folder is byte for byte what is made of the published form. Any other value has no E8M0 byte, is refused by
name: rounding it would change weights in silence. Of NVFP4, a byte stands for the e4m3 scales of both halves of a
block, alike, times the power of two of the second scale.

Scales that are no powers of two become float32: those of BF16 and F16 exactly; those of NVFP4, e4m3 times the second
scale (or over its reciprocal), rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..errors import InventoryError
from ..formats.base import Scratch, Tally
from ..formats.bf16 import bf16_to_f32, f16_to_f32
from ..formats.e4m3 import NAN_CODE, e4m3_to_f32
from ..formats.e8m0 import BIAS, MAX_BYTE, NAN_BYTE, wide_to_e8m0
from ..formats.nvfp4 import block_scales
from ..scale_forms import Floats, Over, Pairs, PowersOfTwo, ScaleForm, Times
from .safetensors import Stored, tensor_at

# Integers that hold the bits of a scale, by safetensors dtype.
WIDE_BITS: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2")}
E8M0 = "F8_E8M0"

# The integers that hold two e4m3 scales, and those that hold one.
PAIR_BITS = np.dtype("<u2")
PAIR_BYTES = 2
E4M3_BITS = np.dtype("u1")

FLOAT_BITS: Mapping[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
F32 = "F32"
E4M3 = "F8_E4M3"

_POWERS_OF_TWO = {"F32": PowersOfTwo("F32"), "BF16": PowersOfTwo("BF16")}
_FLOATS = {"BF16": Floats("BF16"), "F16": Floats("F16")}


def as_e8m0(scale: Stored) -> Stored:
    """Return stored scales as E8M0: those of ``WIDE_BITS`` are powers of two, bytes are what they are."""
    return scale._replace(dtype=E8M0, scale_form=_POWERS_OF_TWO.get(scale.dtype))


def as_f32(scale: Stored) -> Stored:
    """Return stored scales as float32: those of BF16 and F16 are to be read so, any other type is what it is."""
    return scale._replace(dtype=F32, scale_form=_FLOATS[scale.dtype]) if scale.dtype in _FLOATS else scale


def second_of(form: Times | Over) -> float:
    """Return the float32 that e4m3 scales are to be multiplied by, rounded where they are divided."""
    return float(np.float32(1) / np.float32(form.second)) if isinstance(form, Over) else form.second


def stored_dtype(scale: Stored) -> str:
    """Return the safetensors dtype that scales have in their file."""
    match scale.scale_form:
        case None:
            return scale.dtype
        case PowersOfTwo(dtype) | Floats(dtype):
            return dtype
        case Pairs() | Times() | Over():
            return E4M3


def bits_of(form: ScaleForm) -> np.dtype[Any]:
    """Return the numbers that hold the bits of what stands for a scale."""
    match form:
        case PowersOfTwo(dtype):
            return WIDE_BITS[dtype]
        case Floats(dtype):
            return FLOAT_BITS[dtype]
        case Pairs():
            return PAIR_BITS
        case Times() | Over():
            return E4M3_BITS


def becomes_f32(form: ScaleForm | None) -> TypeGuard[Floats | Times | Over]:
    """Return whether scales are read as float32, and not as E8M0 bytes."""
    return isinstance(form, Floats | Times | Over)


def read_wide(
    raw: NDArray[np.uint8], form: ScaleForm, file: Path, offset: int, scratch: Scratch, key: str = "scales"
) -> NDArray[Any]:
    """Return what scales as they lie, bytes [r, bytes of a row] read at ``offset`` of ``file``, stand for.

    Those are E8M0 bytes or float32 [r, c], in the array ``key`` of ``scratch``.

    Raises:
        InventoryError: see ``narrow``.
    """
    shape = len(raw), raw.shape[1] // bits_of(form).itemsize
    if isinstance(form, PowersOfTwo | Pairs):
        return narrow(raw, form, file, offset, scratch.array(f"{key} e8m0", shape, np.uint8))
    out: NDArray[np.float32] = scratch.array(f"{key} f32", shape, np.float32)
    match form:
        case Floats(dtype):
            decode = bf16_to_f32 if dtype == "BF16" else f16_to_f32
            decode(raw.view(FLOAT_BITS[dtype]), out, scratch, Tally())
        case Times(second) | Over(second):
            np.take(block_scales(second, isinstance(form, Over)), raw, out=out, mode="clip")
    return out


def narrow(
    raw: NDArray[np.uint8], form: PowersOfTwo | Pairs, file: Path, offset: int, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Return E8M0 bytes [r, c] of scales as they lie, bytes [r, c · 4 or 2] read at ``offset`` of ``file``.

    Raises:
        InventoryError: a scale is no power of two, or a pair of them no such scale; names the tensor and the position.
    """
    bits: NDArray[Any] = raw.view(bits_of(form))
    codes = np.empty(bits.shape, np.uint8) if out is None else out
    match form:
        case Pairs(exponent):
            found = np.take(_bytes_of_pairs(exponent), bits)
            if found.size and found.min() < 0:
                raise _no_pair(raw, int(np.argmin(found)), exponent, file, offset)
            np.copyto(codes, found, casting="unsafe")
        case PowersOfTwo(dtype):
            index = wide_to_e8m0(bits, codes)
            if index is not None:
                raise _no_power_of_two(bits, index, dtype, file, offset)
    return codes


@cache
def _bytes_of_pairs(exponent: int) -> NDArray[np.int16]:
    """Return for the bits of each pair of e4m3 scales, times 2^exponent, their E8M0 byte, or -1 where there is none."""
    found = np.full(1 << 16, -1, np.int16)
    codes = np.arange(NAN_CODE, dtype=np.uint8)
    fraction, power = np.frexp(e4m3_to_f32(codes))
    byte = power - 1 + exponent + BIAS
    fits = (fraction == 0.5) & (byte >= 0) & (byte <= MAX_BYTE)
    pair = codes[fits].astype(np.uint16) * np.uint16((1 << 8) + 1)
    found[pair] = byte[fits]
    found[NAN_CODE * ((1 << 8) + 1)] = NAN_BYTE
    return found


def pairs_up(scales: NDArray[np.uint8], exponent: int) -> bool:
    """Return whether e4m3 scales under a second scale of 2^exponent are pairs that are E8M0 scales."""
    return bool((_bytes_of_pairs(exponent)[scales.view(PAIR_BITS)] >= 0).all())


def _named(file: Path, place: int, what: str, size: int) -> str:
    """Return the tensor that has a byte of a file, and ``what`` with the position, of elements of ``size`` bytes."""
    found = tensor_at(file, place)
    if found is None:
        return f"at byte {place}"
    name, stored = found
    position = np.unravel_index((place - stored.offset) // size, stored.shape)
    return f"tensor {name}: {what.format(list(map(int, position)))}"


def _no_pair(raw: NDArray[np.uint8], index: int, exponent: int, file: Path, offset: int) -> InventoryError:
    first, second = e4m3_to_f32(raw.reshape(-1)[PAIR_BYTES * index : PAIR_BYTES * (index + 1)])
    return InventoryError(
        f"{_named(file, offset + PAIR_BYTES * index, 'scales from {} on', size=1)} are not one E8M0 scale",
        where=file,
        expected="twice the same power of two, as the closed-form cast of FP4 makes it",
        got=f"{first:.9g} and {second:.9g}, times 2^{exponent}",
        hint="these weights are NVFP4 that is not FP4; convert the checkpoint that they were made of",
    )


def _no_power_of_two(bits: NDArray[Any], index: int, dtype: str, file: Path, offset: int) -> InventoryError:
    size = WIDE_BITS[dtype].itemsize
    value = (int(bits.reshape(-1)[index]) << (32 - 8 * size)).to_bytes(4, "little")
    return InventoryError(
        f"{_named(file, offset + index * size, f'{dtype} scale {{}}', size)} is not a power of two",
        where=file,
        expected="2^-127 to 2^127, as E8M0 holds",
        got=f"{np.frombuffer(value, '<f4')[0]:.9g}",
        hint="E8M0 scales were changed; take the published checkpoint",
    )
