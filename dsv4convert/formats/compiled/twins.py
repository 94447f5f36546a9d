"""Twins of the numpy codecs that call ``codecs.c``: same arguments, same bits, same counts.

A twin checks that the arrays belong together, for C writes wherever it is told, and passes them on. Where the C
function finds that the tile is not ordinary, the numpy codec does the whole tile again. Importing this module
loads the library.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from dsv4convert.formats import bf16, e2m1, e4m3, mxfp4, not_finite, nvfp4, q8_0
from dsv4convert.formats.base import (
    FP8_TILE,
    GROUP,
    Array,
    ArrayF16,
    ArrayF32,
    ArrayU8,
    ArrayU16,
    Block,
    PlainCodec,
    ScaledCodec,
    Scratch,
    Tally,
    check_contiguous,
    check_tile,
)
from dsv4convert.formats.compiled.library import Function, load_library
from dsv4convert.formats.e8m0 import power_of_two_bytes

Codec = TypeVar("Codec", bound=Callable[..., Any])

_PACKED_BYTES = GROUP // 2
NEEDS_FALLBACK = -1  # what a C function returns for a tile that is not ordinary

_LIBRARY = load_library()
# Rows, columns, height and width of a block.
_FP8_SIZES = "n n n n"
# The tables of multipliers and d, the output, sizes, the first and the last scale byte that the tables are for.
_fp8_to_q8_0 = Function(_LIBRARY, "fp8_to_q8_0", f"u1 u1 f4 u2 u1 {_FP8_SIZES} n n")
_fp4_to_q8_0 = Function(_LIBRARY, "fp4_to_q8_0", "u1 u1 f4 u2 u1 n n n")
_fp4_to_mxfp4 = Function(_LIBRARY, "fp4_to_mxfp4", "u1 u1 u1 n")
# Packed codes and scales, output, groups and the largest scale.
_fp4_to_nvfp4 = Function(_LIBRARY, "fp4_to_nvfp4", "u1 u1 u1 n n")
_nvfp4_to_ggml = Function(_LIBRARY, "nvfp4_to_ggml", "u1 u1 u1 n")
_fp4_to_nvfp4_scales = Function(_LIBRARY, "fp4_to_nvfp4_scales", "u1 u1 n n")
_fp4_to_fp8 = Function(_LIBRARY, "fp4_to_fp8", "u1 u1 u1 u1 n n")
_fp4_to_fp8_scales = Function(_LIBRARY, "fp4_to_fp8_scales", "u1 u1 n n")
_fp8_to_mxfp4 = Function(_LIBRARY, "fp8_to_mxfp4", f"u1 u1 u1 {_FP8_SIZES}")
# Values, output, counts of changed and underflowed values; and the scales alone.
_f32_to_fp8 = Function(_LIBRARY, "f32_to_fp8", f"f4 u1 i8 {_FP8_SIZES}")
_f32_to_fp8_scales = Function(_LIBRARY, "f32_to_fp8_scales", f"f4 u1 {_FP8_SIZES}")
_bf16_to_fp8 = Function(_LIBRARY, "bf16_to_fp8", f"u2 u1 i8 {_FP8_SIZES}")
_bf16_to_fp8_scales = Function(_LIBRARY, "bf16_to_fp8_scales", f"u2 u1 {_FP8_SIZES}")
# Output, and the counts of changed and underflowed values.
_f32_to_bf16 = Function(_LIBRARY, "f32_to_bf16", "f4 u2 i8 n")
_f32_to_f16 = Function(_LIBRARY, "f32_to_f16", "f4 f2 i8 n")
_bf16_to_f16 = Function(_LIBRARY, "bf16_to_f16", "u2 f2 i8 n")
# Bytes of elements, how many elements, the bits that an element which is not finite has; by the size of an element.
_any = {size: Function(_LIBRARY, f"any_u{8 * size}", "u1 n n") for size in (1, 2, 4)}


def _check_same_size(source: Array, out: Array) -> None:
    """Refuse an output of another shape or with gaps."""
    check_contiguous(out)
    if source.shape != out.shape:
        raise ValueError(f"output: expected {source.shape}, got {out.shape}")


def _count_two(function: Function, source: Array, out: Array, tally: Tally, *sizes: int) -> bool:
    """Run a function of ``sizes`` and add its two counts; False when numpy has to do the tile."""
    _check_same_size(source, out)
    counts = np.empty(2, np.int64)
    if function(np.ascontiguousarray(source), out, counts, *sizes) == NEEDS_FALLBACK:
        return False
    changed, underflow = counts.tolist()
    tally.changed += changed
    tally.underflow += underflow
    return True


def _count_changed(function: Function, tally: Tally, *arguments: Array | int) -> bool:
    """Run a function that returns how many elements changed, and count them; False when numpy has to do the tile."""
    changed = function(*arguments)
    if changed == NEEDS_FALLBACK:
        return False
    tally.changed += changed
    return True


def _twin_of(module: ModuleType, name: str, twin: Codec) -> Codec:
    """Return a function as the twin of ``module.name``, which has its name."""
    twin.__name__ = twin.__qualname__ = name
    twin.__doc__ = f"Twin of `{module.__name__.rpartition('.')[2]}.{name}`."
    return twin


def _plain(
    module: ModuleType, name: str, parameters: str, check: Callable[[Array, Array], None], elements: int
) -> PlainCodec:
    """Return the twin of a function of (values, out): the library's takes the number of groups of ``elements``.

    The library's function returns how many values changed, where there can be any, and 0 elsewhere.
    """
    function = Function(_LIBRARY, name, f"{parameters} n")

    def twin(values: Array, out: Array, scratch: Scratch, tally: Tally) -> None:
        check(values, out)
        if not _count_changed(function, tally, np.ascontiguousarray(values), out, values.size // elements):
            getattr(module, name)(values, out, scratch, tally)

    return _twin_of(module, name, twin)


def _as_bytes(scale: Array, scratch: Scratch) -> ArrayU8 | None:
    """Return the scales as contiguous e8m0 bytes, or None if one is no power of two."""
    codes = power_of_two_bytes(scale, scratch)
    return None if codes is None else np.ascontiguousarray(codes)


# --- FP8 and FP4 to F32, BF16, F16 ----------------------------------------------------------------------


def _decode_fp8(function: Function, weight: ArrayU8, scale: Array, block: Block, out: Array, scratch: Scratch) -> bool:
    """Run ``function``; False when numpy has to do the tile."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    codes = _as_bytes(scale, scratch)
    if codes is None:
        return False
    return function(np.ascontiguousarray(weight), codes, out, *weight.shape, *block) != NEEDS_FALLBACK


def _decode_fp4(function: Function, packed: ArrayU8, scale: Array, block: Block, out: Array, scratch: Scratch) -> bool:
    """Run ``function``; False when numpy has to do the tile."""
    rows, half = packed.shape
    check_tile(rows, 2 * half, scale, block, out, (rows, 2 * half))
    codes = _as_bytes(scale, scratch)
    if codes is None or block != (1, GROUP) or half % _PACKED_BYTES:
        return False
    return function(np.ascontiguousarray(packed), codes, out, codes.size) != NEEDS_FALLBACK


def _decoder(module: ModuleType, name: str, parameters: str, decode: Callable[..., bool]) -> ScaledCodec:
    """Return the twin of a function that decodes elements with scales; ``decode`` runs the function of the library."""
    function = Function(_LIBRARY, name, parameters)

    def twin(weight: Array, scale: Array, block: Block, out: Array, scratch: Scratch, tally: Tally) -> None:
        if not decode(function, weight, scale, block, out, scratch):
            getattr(module, name)(weight, scale, block, out, scratch, tally)

    return _twin_of(module, name, twin)


fp8_to_f32 = _decoder(e4m3, "fp8_to_f32", f"u1 u1 f4 {_FP8_SIZES}", _decode_fp8)
fp8_to_bf16 = _decoder(e4m3, "fp8_to_bf16", f"u1 u1 u2 {_FP8_SIZES}", _decode_fp8)
fp8_to_f16 = _decoder(e4m3, "fp8_to_f16", f"u1 u1 f2 {_FP8_SIZES}", _decode_fp8)
fp4_to_f32 = _decoder(e2m1, "fp4_to_f32", "u1 u1 f4 n", _decode_fp4)
fp4_to_bf16 = _decoder(e2m1, "fp4_to_bf16", "u1 u1 u2 n", _decode_fp4)
fp4_to_f16 = _decoder(e2m1, "fp4_to_f16", "u1 u1 f2 n", _decode_fp4)


# --- FP4 to MXFP4 and to FP8 ----------------------------------------------------------------------------


def fp4_to_mxfp4(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.fp4_to_mxfp4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP:
        raise ValueError(f"MXFP4 rows come in groups of {GROUP}, got {columns} columns")
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns // GROUP * mxfp4.BLOCK_BYTES))
    nan = _fp4_to_mxfp4(np.ascontiguousarray(packed), np.ascontiguousarray(scale), out, scale.size)
    tally.nan += GROUP * nan


def fp4_to_nvfp4(packed: ArrayU8, scale: ArrayU8, largest: int, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `nvfp4.fp4_to_nvfp4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP == 0:
        check_tile(rows, columns, scale, (1, GROUP), out, packed.shape)
        arrays = np.ascontiguousarray(packed), np.ascontiguousarray(scale), out
        if _fp4_to_nvfp4(*arrays, scale.size, largest) != NEEDS_FALLBACK:
            return
    nvfp4.fp4_to_nvfp4(packed, scale, largest, out, scratch, tally)


def nvfp4_to_ggml(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `nvfp4.nvfp4_to_ggml`."""
    nvfp4.check_ggml_blocks(packed, scale, out)
    arrays = np.ascontiguousarray(packed), np.ascontiguousarray(scale), out
    if _nvfp4_to_ggml(*arrays, out.size // nvfp4.GGML_BYTES) == NEEDS_FALLBACK:
        nvfp4.nvfp4_to_ggml(packed, scale, out, scratch, tally)


def fp4_to_nvfp4_scales(scale: ArrayU8, largest: int, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `nvfp4.fp4_to_nvfp4_scales`."""
    nvfp4.check_scales(scale, out)
    if _fp4_to_nvfp4_scales(np.ascontiguousarray(scale), out, scale.size, largest) == NEEDS_FALLBACK:
        nvfp4.fp4_to_nvfp4_scales(scale, largest, out, scratch, tally)


def fp4_to_fp8_scales(
    scale: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally, side: int = FP8_TILE, /
) -> None:
    """Twin of `e2m1.fp4_to_fp8_scales`; the C has tiles of 128 only."""
    e2m1.check_fp8_scales(scale, out_scale, side)
    if side != FP8_TILE or _fp4_to_fp8_scales(np.ascontiguousarray(scale), out_scale, *scale.shape) == NEEDS_FALLBACK:
        e2m1.fp4_to_fp8_scales(scale, out_scale, scratch, tally, side)


def fp4_to_fp8(
    packed: ArrayU8,
    scale: ArrayU8,
    out: ArrayU8,
    out_scale: ArrayU8,
    scratch: Scratch,
    tally: Tally,
    side: int = FP8_TILE,
    /,
) -> None:
    """Twin of `e2m1.fp4_to_fp8`; the C has tiles of 128 only."""
    rows, half = packed.shape
    if side == FP8_TILE and half % _PACKED_BYTES == 0:
        check_tile(rows, 2 * half, scale, (1, GROUP), out, (rows, 2 * half))
        e2m1.check_fp8_scales(scale, out_scale)
        arrays = np.ascontiguousarray(packed), np.ascontiguousarray(scale), out, out_scale
        if _fp4_to_fp8(*arrays, *scale.shape) != NEEDS_FALLBACK:
            return
    e2m1.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally, side)


# --- to Q8_0 --------------------------------------------------------------------------------------------


def fp8_to_q8_0(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp8_to_q8_0`."""
    q8_0.check_blocks(weight.shape, out)
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, out.shape)
    codes = _as_bytes(scale, scratch) if block[1] % GROUP == 0 else None
    if codes is not None:
        arrays = np.ascontiguousarray(weight), codes, q8_0.multipliers(), q8_0.d_table(), out
        span = q8_0.TABLE_FIRST_BYTE, q8_0.TABLE_LAST_BYTE
        if _fp8_to_q8_0(*arrays, *weight.shape, *block, *span) != NEEDS_FALLBACK:
            return
    q8_0.fp8_to_q8_0(weight, scale, block, out, scratch, tally)


def fp4_to_q8_0(packed: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp4_to_q8_0`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    q8_0.check_blocks((rows, columns), out)
    check_tile(rows, columns, scale, block, out, out.shape)
    codes = _as_bytes(scale, scratch) if block == (1, GROUP) else None
    if codes is not None:
        arrays = np.ascontiguousarray(packed), codes, q8_0.fp4_multipliers(), q8_0.fp4_tables()[1], out
        span = q8_0.FP4_TABLE_FIRST_BYTE, q8_0.FP4_TABLE_LAST_BYTE
        if _fp4_to_q8_0(*arrays, codes.size, *span) != NEEDS_FALLBACK:
            return
    q8_0.fp4_to_q8_0(packed, scale, block, out, scratch, tally)


def _check_q8_0(values: Array, out: Array) -> None:
    q8_0.check_blocks(values.shape, out)


f32_to_q8_0 = _plain(q8_0, "f32_to_q8_0", "f4 u1", _check_q8_0, GROUP)
bf16_to_q8_0 = _plain(q8_0, "bf16_to_q8_0", "u2 u1", _check_q8_0, GROUP)


# --- to MXFP4 by rounding -------------------------------------------------------------------------------


def fp8_to_mxfp4(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.fp8_to_mxfp4`."""
    mxfp4.check_blocks(weight.shape, out)
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, out.shape)
    codes = _as_bytes(scale, scratch) if block[1] % GROUP == 0 else None
    arrays = None if codes is None else (np.ascontiguousarray(weight), codes, out)
    if arrays is None or not _count_changed(_fp8_to_mxfp4, tally, *arrays, *weight.shape, *block):
        mxfp4.fp8_to_mxfp4(weight, scale, block, out, scratch, tally)


def _check_mxfp4(values: Array, out: Array) -> None:
    mxfp4.check_blocks(values.shape, out)


f32_to_mxfp4 = _plain(mxfp4, "f32_to_mxfp4", "f4 u1", _check_mxfp4, GROUP)
bf16_to_mxfp4 = _plain(mxfp4, "bf16_to_mxfp4", "u2 u1", _check_mxfp4, GROUP)


# --- to FP8 and FP4 with scales ------------------------------------------------------------------------


def f32_to_fp8(values: ArrayF32, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.f32_to_fp8`."""
    if not _count_two(_f32_to_fp8, values, out, tally, *values.shape, *block):
        e4m3.f32_to_fp8(values, block, out, scratch, tally)


def bf16_to_fp8(values: ArrayU16, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.bf16_to_fp8`."""
    if not _count_two(_bf16_to_fp8, values, out, tally, *values.shape, *block):
        e4m3.bf16_to_fp8(values, block, out, scratch, tally)


def f32_to_fp8_scales(values: ArrayF32, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.f32_to_fp8_scales`."""
    _check_scales(values, block, out)
    if _f32_to_fp8_scales(np.ascontiguousarray(values), out, *values.shape, *block) == NEEDS_FALLBACK:
        e4m3.f32_to_fp8_scales(values, block, out, scratch, tally)


def bf16_to_fp8_scales(values: ArrayU16, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.bf16_to_fp8_scales`."""
    _check_scales(values, block, out)
    if _bf16_to_fp8_scales(np.ascontiguousarray(values), out, *values.shape, *block) == NEEDS_FALLBACK:
        e4m3.bf16_to_fp8_scales(values, block, out, scratch, tally)


def _check_scales(values: Array, block: Block, out: Array, per_group: int = 1) -> None:
    """Refuse an output that is not of ``per_group`` bytes for each block, or with gaps, and FP4 of ragged rows."""
    check_contiguous(out)
    rows, columns = values.shape
    expected = (-(-rows // block[0]), -(-columns // block[1]) * per_group)
    if out.shape != expected:
        raise ValueError(f"output: expected {expected}, got {out.shape}")
    if block == (1, GROUP) and columns % GROUP:
        raise ValueError(f"FP4 rows come in groups of {GROUP}, got {columns} columns")


def _check_fp4(values: Array, out: Array) -> None:
    _check_scales(values, (1, GROUP), out, per_group=_PACKED_BYTES)


def _check_fp4_scales(values: Array, out: Array) -> None:
    _check_scales(values, (1, GROUP), out)


f32_to_fp4 = _plain(e2m1, "f32_to_fp4", "f4 u1", _check_fp4, GROUP)
f32_to_fp4_scales = _plain(e2m1, "f32_to_fp4_scales", "f4 u1", _check_fp4_scales, GROUP)
bf16_to_fp4 = _plain(e2m1, "bf16_to_fp4", "u2 u1", _check_fp4, GROUP)
bf16_to_fp4_scales = _plain(e2m1, "bf16_to_fp4_scales", "u2 u1", _check_fp4_scales, GROUP)


# --- floats -------------------------------------------------------------------------------------------


def f32_to_bf16(source: ArrayF32, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.f32_to_bf16`."""
    if not _count_two(_f32_to_bf16, source, out, tally, source.size):
        bf16.f32_to_bf16(source, out, scratch, tally)


def f32_to_f16(source: ArrayF32, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.f32_to_f16`."""
    if not _count_two(_f32_to_f16, source, out, tally, source.size):
        bf16.f32_to_f16(source, out, scratch, tally)


def bf16_to_f16(source: ArrayU16, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.bf16_to_f16`."""
    if not _count_two(_bf16_to_f16, source, out, tally, source.size):
        bf16.bf16_to_f16(source, out, scratch, tally)


f16_to_bf16 = _plain(bf16, "f16_to_bf16", "f2 u2", _check_same_size, 1)
bf16_to_f32 = _plain(bf16, "bf16_to_f32", "u2 f4", _check_same_size, 1)
f16_to_f32 = _plain(bf16, "f16_to_f32", "f2 f4", _check_same_size, 1)


# --- values that are not finite -------------------------------------------------------------------------


def count_not_finite(dtype: str, content: ArrayU8, scratch: ArrayU8) -> int:
    """Twin of `not_finite.count_not_finite`; the C tells whether there is anything to count."""
    kind = not_finite.MAGNITUDES.get(dtype)
    if kind is None:
        return 0
    size = np.dtype(kind.dtype).itemsize
    found = _any[size](np.ascontiguousarray(content), len(content) // size, kind.least)
    return not_finite.count_not_finite(dtype, content, scratch) if found else 0
