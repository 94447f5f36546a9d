"""Compiled twins of the numpy codecs: same arguments, same bits, same counts.

Each twin takes the ordinary tile: scales within the range where nothing can over- or underflow, no NaN,
rows of whole groups. Where a tile is not ordinary, which its scales or its kernel say, the numpy codec does
the whole tile again, so that rare cases are written once. Importing this module imports llvmlite; kernels
compile on first use, in some ten milliseconds each.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dsv4convert.formats import bf16, e2m1, e4m3, mxfp4, q8_0
from dsv4convert.formats import compiled_kernels as kernels
from dsv4convert.formats.base import (
    GROUP,
    Array,
    ArrayF16,
    ArrayF32,
    ArrayU8,
    ArrayU16,
    Block,
    Scratch,
    Tally,
    TileFunction,
    check_contiguous,
    check_tile,
)
from dsv4convert.formats.e8m0 import F32_OF_BYTE, NAN_BYTE, byte_range, power_of_two_bytes
from dsv4convert.formats.llvm import Kernel, check_compiler, release_compiler

check_compiler()

_PACKED_BYTES = GROUP // 2
_BF16_OVERFLOW_BITS = 0x7F7F_8000  # rounds to infinity
_BF16_INF_BITS = 0x7F80

# The smallest relative scale at which every product is zero or a normal e4m3 number: 0.5 * 2^-5 = 2^-6.
_FP8_FIRST_NORMAL_LIFT = -5


def _check_same_size(source: Array, out: Array) -> None:
    """Refuse an output of another shape or with gaps: a kernel writes wherever it is told."""
    check_contiguous(out)
    if source.shape != out.shape:
        raise ValueError(f"output: expected {source.shape}, got {out.shape}")


def _ordinary_codes(scale: Array, first_byte: int, last_byte: int, scratch: Scratch) -> ArrayU8 | None:
    """Return the scales as e8m0 bytes if all of them lie in the range, else None."""
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        return None
    first, last, nan = byte_range(codes)
    return None if nan or first < first_byte or last > last_byte else np.ascontiguousarray(codes)


# --- FP8 to F32, BF16, F16 ------------------------------------------------------------------------------


def _fp8_ordinary(
    kernel: Kernel,
    bits: Array,
    first_byte: int,
    last_byte: int,
    weight: ArrayU8,
    scale: Array,
    block: Block,
    scratch: Scratch,
) -> bool:
    """Run ``kernel`` if the tile is ordinary; False when numpy has to do it."""
    codes = _ordinary_codes(scale, first_byte, last_byte, scratch) if weight.size else None
    if codes is None:
        return False
    (rows, columns), (tall, wide) = weight.shape, block
    sizes = rows, tall, *codes.shape, columns, wide
    return kernel(np.ascontiguousarray(weight), codes, F32_OF_BYTE, bits, *sizes) != e4m3.NAN_CODE


def fp8_to_f32(weight: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_f32`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    last = e4m3.F32_LAST_SAFE_BYTE
    if not _fp8_ordinary(kernels.fp8_to_f32, out.view(np.uint32), 0, last, weight, scale, block, scratch):
        e4m3.fp8_to_f32(weight, scale, block, out, scratch, tally)


def fp8_to_bf16(weight: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_bf16`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    first, last = e4m3.BF16_FIRST_EXACT_BYTE, e4m3.F32_LAST_SAFE_BYTE
    if not _fp8_ordinary(kernels.fp8_to_bf16, out, first, last, weight, scale, block, scratch):
        e4m3.fp8_to_bf16(weight, scale, block, out, scratch, tally)


def fp8_to_f16(weight: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_f16`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    first, last = e4m3.F16_FIRST_EXACT_BYTE, e4m3.F16_LAST_SAFE_BYTE
    if not _fp8_ordinary(kernels.fp8_to_f16, out.view(np.uint16), first, last, weight, scale, block, scratch):
        e4m3.fp8_to_f16(weight, scale, block, out, scratch, tally)


# --- FP4 to F32, BF16, F16 ------------------------------------------------------------------------------


def _fp4_ordinary(
    kernel: Kernel,
    bits: Array,
    first_byte: int,
    last_byte: int,
    packed: ArrayU8,
    scale: Array,
    block: Block,
    scratch: Scratch,
) -> bool:
    """Run ``kernel`` if the tile is ordinary; False when numpy has to do it."""
    if packed.size == 0 or block != (1, GROUP) or packed.shape[1] % _PACKED_BYTES:
        return False
    codes = _ordinary_codes(scale, first_byte, last_byte, scratch)
    if codes is None:
        return False
    kernel(np.ascontiguousarray(packed), codes, F32_OF_BYTE, bits, codes.size)
    return True


def fp4_to_f32(packed: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_f32`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    last = e2m1.F32_LAST_SAFE_BYTE
    if not _fp4_ordinary(kernels.fp4_to_f32, out.view(np.uint32), 0, last, packed, scale, block, scratch):
        e2m1.fp4_to_f32(packed, scale, block, out, scratch, tally)


def fp4_to_bf16(packed: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_bf16`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    last = e2m1.F32_LAST_SAFE_BYTE
    if not _fp4_ordinary(kernels.fp4_to_bf16, out.view(np.uint32), 0, last, packed, scale, block, scratch):
        e2m1.fp4_to_bf16(packed, scale, block, out, scratch, tally)


def fp4_to_f16(packed: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_f16`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    first, last = e2m1.F16_FIRST_EXACT_BYTE, e2m1.F16_LAST_SAFE_BYTE
    if not _fp4_ordinary(kernels.fp4_to_f16, out.view(np.uint32), first, last, packed, scale, block, scratch):
        e2m1.fp4_to_f16(packed, scale, block, out, scratch, tally)


# --- FP4 to MXFP4 and to FP8 ----------------------------------------------------------------------------


def fp4_to_mxfp4(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.fp4_to_mxfp4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP or not packed.size:
        mxfp4.fp4_to_mxfp4(packed, scale, out, scratch, tally)
        return
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns // GROUP * mxfp4.BLOCK_BYTES))
    kernels.fp4_to_mxfp4(np.ascontiguousarray(packed), np.ascontiguousarray(scale), out, scale.size)
    if scale.max() == NAN_BYTE:
        tally.nan += GROUP * int(np.count_nonzero(scale == NAN_BYTE))


def _fill_tile_scales(scale: ArrayU8, out_scale: ArrayU8) -> int:
    """Fill the tiles' scales; return the smallest scale relative to its tile's, far below 0 if one is NaN."""
    return kernels.fp4_to_fp8_scales(scale, out_scale, *_tile_sizes(scale, out_scale))


def _tile_sizes(scale: ArrayU8, out_scale: ArrayU8) -> tuple[int, ...]:
    """Return the kernels' parameters of tiles: rows, rows of a tile, rows and columns of tiles, groups of a row."""
    return scale.shape[0], e2m1.FP8_TILE, *out_scale.shape, scale.shape[1]


def fp4_to_fp8_scales(scale: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_fp8_scales`."""
    e2m1.check_fp8_scales(scale, out_scale)
    if not scale.size or _fill_tile_scales(np.ascontiguousarray(scale), out_scale) == kernels.HAS_NAN:
        e2m1.fp4_to_fp8_scales(scale, out_scale, scratch, tally)


def fp4_to_fp8(
    packed: ArrayU8, scale: ArrayU8, out: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally
) -> None:
    """Twin of `e2m1.fp4_to_fp8`."""
    rows, half = packed.shape
    if half % _PACKED_BYTES == 0 and packed.size:
        check_tile(rows, 2 * half, scale, (1, GROUP), out, (rows, 2 * half))
        e2m1.check_fp8_scales(scale, out_scale)
        scale = np.ascontiguousarray(scale)
        if _fill_tile_scales(scale, out_scale) >= _FP8_FIRST_NORMAL_LIFT:
            sizes = _tile_sizes(scale, out_scale)
            kernels.fp4_to_fp8(np.ascontiguousarray(packed), scale, out_scale, out, *sizes)
            return
    e2m1.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally)


# --- to Q8_0 --------------------------------------------------------------------------------------------


def fp8_to_q8_0(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp8_to_q8_0`."""
    q8_0.check_blocks(weight.shape, out)
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, out.shape)
    if block[1] % GROUP == 0 and weight.size:
        codes = _ordinary_codes(scale, q8_0.TABLE_FIRST_BYTE, q8_0.TABLE_LAST_BYTE, scratch)
        if codes is not None:
            sizes = weight.shape[0], block[0], *codes.shape, weight.shape[1] // GROUP, block[1] // GROUP
            tables = q8_0.multipliers(), q8_0.d_table()
            if not kernels.fp8_to_q8_0(np.ascontiguousarray(weight), codes, *tables, out, *sizes):
                return
    q8_0.fp8_to_q8_0(weight, scale, block, out, scratch, tally)


def fp4_to_q8_0(packed: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp4_to_q8_0`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    q8_0.check_blocks((rows, columns), out)
    check_tile(rows, columns, scale, block, out, out.shape)
    if block == (1, GROUP) and packed.size:
        codes = _ordinary_codes(scale, q8_0.FP4_TABLE_FIRST_BYTE, q8_0.FP4_TABLE_LAST_BYTE, scratch)
        if codes is not None:
            tables = q8_0.fp4_multipliers(), q8_0.fp4_tables()[1]
            if not kernels.fp4_to_q8_0(np.ascontiguousarray(packed), codes, *tables, out, codes.size):
                return
    q8_0.fp4_to_q8_0(packed, scale, block, out, scratch, tally)


def f32_to_q8_0(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.f32_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    check_contiguous(out)
    bits = np.ascontiguousarray(values).view(np.uint32)
    if kernels.f32_to_q8_0(bits, out, values.size // GROUP):
        q8_0.f32_to_q8_0(values, out, scratch, tally)


def bf16_to_q8_0(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.bf16_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    check_contiguous(out)
    if kernels.bf16_to_q8_0(np.ascontiguousarray(values), out, values.size // GROUP):
        q8_0.bf16_to_q8_0(values, out, scratch, tally)


# --- to MXFP4 by rounding -------------------------------------------------------------------------------


def _to_mxfp4(kernel: Kernel, bits: Array, out: ArrayU8, tally: Tally) -> bool:
    """Run ``kernel``; False when numpy has to do the tile."""
    mxfp4.check_blocks(bits.shape, out)
    check_contiguous(out)
    changed = kernel(np.ascontiguousarray(bits), F32_OF_BYTE, out, bits.size // GROUP)
    tally.changed += max(changed, 0)
    return changed >= 0


def f32_to_mxfp4(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.f32_to_mxfp4`."""
    if not _to_mxfp4(kernels.f32_to_mxfp4, np.ascontiguousarray(values).view(np.uint32), out, tally):
        mxfp4.f32_to_mxfp4(values, out, scratch, tally)


def bf16_to_mxfp4(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.bf16_to_mxfp4`."""
    if not _to_mxfp4(kernels.bf16_to_mxfp4, values, out, tally):
        mxfp4.bf16_to_mxfp4(values, out, scratch, tally)


# --- floats ---------------------------------------------------------------------------------------------


def f32_to_bf16(source: ArrayF32, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.f32_to_bf16`."""
    _check_same_size(source, out)
    counts = np.empty(2, np.int64)
    bits = np.ascontiguousarray(source).view(np.uint32)
    if kernels.f32_to_bf16(bits, out, counts, source.size) >= _BF16_OVERFLOW_BITS:
        bf16.f32_to_bf16(source, out, scratch, tally)
        return
    inexact, tiny = counts.tolist()
    tally.underflow += tiny
    tally.changed += inexact - tiny


def bf16_to_f32(source: ArrayU16, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.bf16_to_f32`."""
    _check_same_size(source, out)
    if kernels.bf16_to_f32(np.ascontiguousarray(source), out.view(np.uint32), source.size) > _BF16_INF_BITS:
        bf16.bf16_to_f32(source, out, scratch, tally)


TWINS: dict[str, TileFunction] = {
    "fp8_to_f32": fp8_to_f32,
    "fp8_to_bf16": fp8_to_bf16,
    "fp8_to_f16": fp8_to_f16,
    "fp8_to_q8_0": fp8_to_q8_0,
    "fp4_to_f32": fp4_to_f32,
    "fp4_to_bf16": fp4_to_bf16,
    "fp4_to_f16": fp4_to_f16,
    "fp4_to_fp8": fp4_to_fp8,
    "fp4_to_fp8_scales": fp4_to_fp8_scales,
    "fp4_to_mxfp4": fp4_to_mxfp4,
    "fp4_to_q8_0": fp4_to_q8_0,
    "f32_to_bf16": f32_to_bf16,
    "f32_to_mxfp4": f32_to_mxfp4,
    "f32_to_q8_0": f32_to_q8_0,
    "bf16_to_f32": bf16_to_f32,
    "bf16_to_mxfp4": bf16_to_mxfp4,
    "bf16_to_q8_0": bf16_to_q8_0,
}

# Kernels that do not have their codec's name.
_KERNELS = {"fp4_to_fp8": (kernels.fp4_to_fp8_scales, kernels.fp4_to_fp8)}


def prepare(names: Iterable[str]) -> None:
    """Compile the kernels of codecs now; names without a twin are passed over. LLVM's pages are let go of."""
    wanted = [kernel for name in names if name in TWINS for kernel in _KERNELS.get(name) or (vars(kernels)[name],)]
    missing = [kernel for kernel in wanted if not kernel.is_compiled]
    for kernel in missing:
        kernel.compile()
    if missing:
        release_compiler()
