"""The formats once more, as plainly as they can be written: what the codecs are compared with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import Tally

Array = npt.NDArray[Any]

NAN_BITS = {"f32": 0x7FC00000, "bf16": 0x7FC0, "f16": 0x7E00}
STORAGE = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16}
SMALLEST_NORMAL = {"f32": 2.0**-126, "bf16": 2.0**-126, "f16": 2.0**-14}


def scale_values(scale: Array) -> Array:
    """Scales as float64; ml_dtypes knows e8m0."""
    if scale.dtype == np.uint8:
        return scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return scale.astype(np.float64)


def spread(scale: Array, block: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Scale of every element."""
    row = np.arange(shape[0]) // block[0]
    column = np.arange(shape[1]) // block[1]
    return scale_values(scale)[row[:, None], column[None, :]]


def fp8_values(weight: Array) -> Array:
    return weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def fp4_values(packed: Array) -> Array:
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def store(exact: Array, kind: str) -> tuple[Array, Tally]:
    """Round exact products to a format: its bits and the counts."""
    with np.errstate(all="ignore"):
        if kind == "bf16":
            stored = round_to_bf16(exact)
            bits = (stored.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif kind == "f16":
            stored = exact.astype(np.float16)
            bits = stored.view(np.uint16).copy()
        else:
            stored = exact.astype(np.float32)
            bits = stored.view(np.uint32).copy()
    nan = np.isnan(exact)
    bits[nan] = NAN_BITS[kind]
    infinite = np.isinf(stored)
    inexact = (stored.astype(np.float64) != exact) & ~nan & ~infinite
    tiny = np.abs(exact) < SMALLEST_NORMAL[kind]
    tally = Tally(
        nan=int(nan.sum()),
        overflow=int(infinite.sum()),
        underflow=int((inexact & tiny).sum()),
        changed=int((inexact & ~tiny).sum()),
    )
    return bits, tally


def round_to_bf16(exact: Array) -> Array:
    """Nearest even in steps of the last place, 2^(e - 7); float64 holds every quantity exactly."""
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(exact)
        step = np.ldexp(1.0, np.maximum(exponent - 1, -126) - 7)
        rounded = np.rint(exact / step) * step
        rounded = np.where(np.isfinite(exact), rounded, exact)
        return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)


def bits_of(stored: Array) -> Array:
    """Unsigned integers of the same width, to compare NaN and -0.0 as well."""
    return stored.view(f"u{stored.dtype.itemsize}")


def mxfp4_blocks(packed: Array, scale: Array) -> Array:
    """Packed FP4 to MXFP4 blocks, element by element."""
    rows, groups = scale.shape
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, groups, 32)
    out = np.empty((rows, groups, 17), np.uint8)
    out[:, :, 0] = scale
    out[:, :, 1:] = codes[:, :, :16] | (codes[:, :, 16:] << 4)
    return out.reshape(rows, groups * 17)


def q8_0_blocks(x: Array) -> Array:
    """The plain formula on float32 [blocks, 32], each operation in float32, half away from zero."""
    with np.errstate(all="ignore"):
        amax = np.abs(x).max(axis=1, keepdims=True)
        d = amax / np.float32(127)
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        scaled = (x * inverse).astype(np.float32)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        q = np.sign(scaled) * (whole + (magnitude - whole >= 0.5))
        usable = np.isfinite(amax) & np.isfinite(inverse)
        q = np.where(usable, q, 0).astype(np.int8)
        d16 = d.astype(np.float16)
    d16 = np.where(np.isnan(d16), np.float16(np.nan), d16)
    return np.concatenate([d16.view(np.uint8), q.view(np.uint8)], axis=1)
