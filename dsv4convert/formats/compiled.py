"""Compiled twins of the numpy codecs, in numba: same arguments, same bits, same counts.

Each twin takes the ordinary tile: scales within the range where nothing can over- or underflow, no NaN,
rows of whole groups. Its kernel says when a tile is not ordinary, and then the numpy codec does the whole
tile again, so that rare cases are written once. Importing this module imports numba; kernels compile on
first use, a second or two each, and are kept in numba's cache. That cache watches this file only: after a change
to `compiled_groups` or to a constant of another module, touch this one.

What works on groups of 32 takes each as one vector (`compiled_groups`); the rest are flat or row-long loops
that LLVM's vectoriser takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from dsv4convert.formats import bf16, e2m1, e4m3, mxfp4, q8_0
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
from dsv4convert.formats.compiled_groups import (
    HAS_FINE_CODE,
    encode_group,
    float_levels,
    fp4_levels,
    fp4_to_fp8_group,
    fp8_levels,
    largest_bits,
    largest_fp4,
    largest_fp8,
    repack_group,
)
from dsv4convert.formats.e8m0 import F32_OF_BYTE, NAN_BYTE, byte_range, power_of_two_bytes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _kernel(function: _Function) -> _Function:
    # No fastmath: every operation must round as numpy's does.
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


def _inline(function: _Function) -> _Function:
    return cast(_Function, numba.njit(nogil=True, cache=True, inline="always")(function))


# numba widens u32 op u32 to 64 bits; naming the type again after each operation keeps the lanes narrow.
_u8, _u16, _u32, _u64 = np.uint8, np.uint16, np.uint32, np.uint64
_i32, _f32 = np.int32, np.float32

_MAGNITUDE = e4m3.NAN_CODE
_SIGN = e4m3.SIGN_BIT
_E4M3_PLACE = 20  # float32 mantissa bits less e4m3's
_E4M3_REBIAS = e4m3.PLACED_EXPONENT << 23
_E4M3_FIRST_NORMAL = 8
_E4M3_STEP = _f32(2.0**e4m3.MIN_SUBNORMAL_EXPONENT)
_E2M1_PLACE = 22  # float32 mantissa bits less e2m1's
_E2M1_REBIAS = 126 << 23  # code 2, exponent field 1, is 1.0
_HALF = _f32(0.5)
_F16_REBIAS = (127 - 15) << 10
_F16_MIN_NORMAL_BITS = (127 - 14) << 23
_F16_SUBNORMAL_STEPS = _f32(2.0**24)
_PACKED_BYTES = GROUP // 2
_MXFP4_BYTES = mxfp4.BLOCK_BYTES
_Q8_0_BYTES = q8_0.BLOCK_BYTES
_F32_INF_BITS = 0x7F80_0000
_F32_MAGNITUDE_BITS = 0x7FFF_FFFF
_BF16_OVERFLOW_BITS = 0x7F7F_8000  # rounds to infinity
_F32_MIN_NORMAL_BITS = 0x0080_0000
_F16_INF_BITS = 0x7C00


@_inline
def _e4m3_value(code: Any) -> Any:
    """Magnitude of a code; subnormal codes by conversion, so that no subnormal number is touched."""
    magnitude = _u32(_u32(code) & _u32(_MAGNITUDE))
    normal = _u32(_u32(magnitude << _u32(_E4M3_PLACE)) + _u32(_E4M3_REBIAS)).view(_f32)
    subnormal = _f32(_f32(_i32(magnitude)) * _E4M3_STEP)
    return subnormal if magnitude < _u32(_E4M3_FIRST_NORMAL) else normal


@_inline
def _e2m1_value(magnitude: Any) -> Any:
    """Value of a code without its sign (0 to 7)."""
    # Code 1, the only subnormal, is 0.5: the exponent below code 2's, with an empty mantissa.
    bits = _u32(_u32(_u32(magnitude - _u32(magnitude == _u32(1))) << _u32(_E2M1_PLACE)) + _u32(_E2M1_REBIAS))
    return _u32(bits if magnitude else _u32(0)).view(_f32)


@_inline
def _exact_f16(magnitude: Any) -> Any:
    """Bits of a positive float32 that is a float16."""
    bits = magnitude.view(_u32)
    normal = _u32(_u32(bits >> _u32(13)) - _u32(_F16_REBIAS))
    subnormal = _u32(_i32(_f32(magnitude * _F16_SUBNORMAL_STEPS)))
    return subnormal if bits < _u32(_F16_MIN_NORMAL_BITS) else normal


# --- FP8 to F32, BF16, F16: rows of codes times rows of scales ------------------------------------------


@_kernel
def _fp8_row_f32(weight: Array, factor: Array, out: Array) -> Any:
    largest = _u8(0)
    for j in range(weight.size):
        code = weight[j]
        largest = max(largest, _u8(code & _u8(_MAGNITUDE)))
        value = _f32(_e4m3_value(code) * factor[j])
        sign = _u32(_u32(_u32(code) & _u32(_SIGN)) << _u32(24))
        out[j] = _u32(value.view(_u32) | sign)
    return largest


@_kernel
def _fp8_row_bf16(weight: Array, factor: Array, out: Array) -> Any:
    largest = _u8(0)
    for j in range(weight.size):
        code = weight[j]
        largest = max(largest, _u8(code & _u8(_MAGNITUDE)))
        value = _f32(_e4m3_value(code) * factor[j])
        sign = _u16(_u16(code & _u8(_SIGN)) << _u16(8))
        out[j] = _u16(_u16(value.view(_u32) >> _u32(16)) | sign)
    return largest


@_kernel
def _fp8_row_f16(weight: Array, factor: Array, out: Array) -> Any:
    largest = _u8(0)
    for j in range(weight.size):
        code = weight[j]
        largest = max(largest, _u8(code & _u8(_MAGNITUDE)))
        value = _f32(_e4m3_value(code) * factor[j])
        sign = _u16(_u16(code & _u8(_SIGN)) << _u16(8))
        out[j] = _u16(_u16(_exact_f16(value)) | sign)
    return largest


@_kernel
def _spread_row(codes: Array, table: Array, width: int, row: Array) -> None:
    """Write table[code] for every column of its block."""
    columns = row.size
    for block in range(codes.size):
        value = table[codes[block]]
        start = block * width
        for j in range(start, min(start + width, columns)):
            row[j] = value


@_kernel
def _fp8_f32(weight: Array, codes: Array, tall: int, width: int, table: Array, factor: Array, out: Array) -> Any:
    rows, largest = weight.shape[0], _u8(0)
    for r in range(codes.shape[0]):
        _spread_row(codes[r], table, width, factor)
        for i in range(r * tall, min(r * tall + tall, rows)):
            largest = max(largest, _fp8_row_f32(weight[i], factor, out[i]))
    return largest


@_kernel
def _fp8_bf16(weight: Array, codes: Array, tall: int, width: int, table: Array, factor: Array, out: Array) -> Any:
    rows, largest = weight.shape[0], _u8(0)
    for r in range(codes.shape[0]):
        _spread_row(codes[r], table, width, factor)
        for i in range(r * tall, min(r * tall + tall, rows)):
            largest = max(largest, _fp8_row_bf16(weight[i], factor, out[i]))
    return largest


@_kernel
def _fp8_f16(weight: Array, codes: Array, tall: int, width: int, table: Array, factor: Array, out: Array) -> Any:
    rows, largest = weight.shape[0], _u8(0)
    for r in range(codes.shape[0]):
        _spread_row(codes[r], table, width, factor)
        for i in range(r * tall, min(r * tall + tall, rows)):
            largest = max(largest, _fp8_row_f16(weight[i], factor, out[i]))
    return largest


def _fp8_ordinary(
    kernel: Callable[..., Any],
    bits: Array,
    first_byte: int,
    last_byte: int,
    weight: ArrayU8,
    scale: Array,
    block: Block,
    scratch: Scratch,
) -> bool:
    """Run ``kernel`` if the tile is ordinary; False when numpy has to do it."""
    if weight.size == 0:
        return False
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        return False
    first, last, nan = byte_range(codes)
    if nan or first < first_byte or last > last_byte:
        return False
    factor = scratch.array("compiled.factor", (weight.shape[1],), np.float32)
    return bool(kernel(weight, codes, block[0], block[1], F32_OF_BYTE, factor, bits) != _MAGNITUDE)


def fp8_to_f32(weight: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_f32`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    last = e4m3.F32_LAST_SAFE_BYTE
    if not _fp8_ordinary(_fp8_f32, out.view(np.uint32), 0, last, weight, scale, block, scratch):
        e4m3.fp8_to_f32(weight, scale, block, out, scratch, tally)


def fp8_to_bf16(weight: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_bf16`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    first, last = e4m3.BF16_FIRST_EXACT_BYTE, e4m3.F32_LAST_SAFE_BYTE
    if not _fp8_ordinary(_fp8_bf16, out, first, last, weight, scale, block, scratch):
        e4m3.fp8_to_bf16(weight, scale, block, out, scratch, tally)


def fp8_to_f16(weight: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e4m3.fp8_to_f16`."""
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, weight.shape)
    first, last = e4m3.F16_FIRST_EXACT_BYTE, e4m3.F16_LAST_SAFE_BYTE
    if not _fp8_ordinary(_fp8_f16, out.view(np.uint16), first, last, weight, scale, block, scratch):
        e4m3.fp8_to_f16(weight, scale, block, out, scratch, tally)


# --- FP4 to F32, BF16, F16: groups of 16 bytes, one scale each ------------------------------------------


@_kernel
def _fp4_f32(packed: Array, codes: Array, table: Array, out: Array) -> None:
    for g in range(packed.shape[0]):
        scale = table[codes[g]]
        for j in range(GROUP // 2):
            byte = _u32(packed[g, j])
            low = _f32(_e2m1_value(_u32(byte & _u32(7))) * scale).view(_u32)
            high = _f32(_e2m1_value(_u32(_u32(byte >> _u32(4)) & _u32(7))) * scale).view(_u32)
            low = _u32(low | _u32(_u32(byte & _u32(0x08)) << _u32(28)))
            high = _u32(high | _u32(_u32(byte & _u32(0x80)) << _u32(24)))
            out[g, j] = _u64(low) | _u64(_u64(high) << _u64(32))


@_kernel
def _fp4_bf16(packed: Array, codes: Array, table: Array, out: Array) -> None:
    for g in range(packed.shape[0]):
        scale = table[codes[g]]
        for j in range(GROUP // 2):
            byte = _u32(packed[g, j])
            low = _f32(_e2m1_value(_u32(byte & _u32(7))) * scale).view(_u32)
            high = _f32(_e2m1_value(_u32(_u32(byte >> _u32(4)) & _u32(7))) * scale).view(_u32)
            signs = _u32(_u32(_u32(byte & _u32(0x08)) << _u32(12)) | _u32(_u32(byte & _u32(0x80)) << _u32(24)))
            # Both are bfloat16 already: the lower halves are empty.
            out[g, j] = _u32(_u32(_u32(low >> _u32(16)) | high) | signs)


@_kernel
def _fp4_f16(packed: Array, codes: Array, table: Array, out: Array) -> None:
    for g in range(packed.shape[0]):
        scale = table[codes[g]]
        for j in range(GROUP // 2):
            byte = _u32(packed[g, j])
            low = _u32(_exact_f16(_f32(_e2m1_value(_u32(byte & _u32(7))) * scale)))
            high = _u32(_exact_f16(_f32(_e2m1_value(_u32(_u32(byte >> _u32(4)) & _u32(7))) * scale)))
            signs = _u32(_u32(_u32(byte & _u32(0x08)) << _u32(12)) | _u32(_u32(byte & _u32(0x80)) << _u32(24)))
            out[g, j] = _u32(_u32(low | _u32(high << _u32(16))) | signs)


def _fp4_ordinary(
    kernel: Callable[..., Any],
    pairs: Array,
    first_byte: int,
    last_byte: int,
    packed: ArrayU8,
    scale: Array,
    block: Block,
    scratch: Scratch,
) -> bool:
    if packed.size == 0 or block != (1, GROUP) or packed.shape[1] % (GROUP // 2):
        return False
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        return False
    first, last, nan = byte_range(codes)
    if nan or first < first_byte or last > last_byte:
        return False
    kernel(packed.reshape(-1, GROUP // 2), codes.reshape(-1), F32_OF_BYTE, pairs.reshape(-1, GROUP // 2))
    return True


def fp4_to_f32(packed: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_f32`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    last = e2m1.F32_LAST_SAFE_BYTE
    if not _fp4_ordinary(_fp4_f32, out.view(np.uint64), 0, last, packed, scale, block, scratch):
        e2m1.fp4_to_f32(packed, scale, block, out, scratch, tally)


def fp4_to_bf16(packed: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_bf16`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    last = e2m1.F32_LAST_SAFE_BYTE
    if not _fp4_ordinary(_fp4_bf16, out.view(np.uint32), 0, last, packed, scale, block, scratch):
        e2m1.fp4_to_bf16(packed, scale, block, out, scratch, tally)


def fp4_to_f16(packed: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `e2m1.fp4_to_f16`."""
    check_tile(packed.shape[0], packed.shape[1] * 2, scale, block, out, (packed.shape[0], packed.shape[1] * 2))
    first, last = e2m1.F16_FIRST_EXACT_BYTE, e2m1.F16_LAST_SAFE_BYTE
    if not _fp4_ordinary(_fp4_f16, out.view(np.uint32), first, last, packed, scale, block, scratch):
        e2m1.fp4_to_f16(packed, scale, block, out, scratch, tally)


# --- FP4 to MXFP4 ---------------------------------------------------------------------------------------


@_kernel
def _fp4_mxfp4(packed: Array, scale: Array, out: Array) -> Any:
    largest = _u8(0)
    for g in range(scale.size):
        byte = scale[g]
        largest = max(largest, byte)
        out[g * _MXFP4_BYTES] = byte
        repack_group(packed, g * _PACKED_BYTES, out, g * _MXFP4_BYTES + 1)
    return largest


def fp4_to_mxfp4(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.fp4_to_mxfp4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP:
        mxfp4.fp4_to_mxfp4(packed, scale, out, scratch, tally)
        return
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns // GROUP * _MXFP4_BYTES))
    if _fp4_mxfp4(packed.reshape(-1), scale.reshape(-1), out.reshape(-1)) == NAN_BYTE:
        tally.nan += GROUP * int(np.count_nonzero(scale == NAN_BYTE))


# --- FP4 to FP8 -----------------------------------------------------------------------------------------

# The smallest relative scale at which every product is zero or a normal e4m3 number: 0.5 * 2^-5 = 2^-6.
_FP8_FIRST_NORMAL_LIFT = -5
# Code 2 is 1.0, whose e4m3 exponent is 7; its own bits, shifted into place, bring 1 of them.
_FP8_BASE_EXPONENT = 7 - 1


@_kernel
def _tile_scales(scale: Array, tile_rows: int, tile_groups: int, out_scale: Array, low: Array, high: Array) -> Any:
    """Write each tile's scale byte; return the smallest scale relative to its tile's, lower still for NaN."""
    rows, groups = scale.shape
    lowest = 0
    for r in range(out_scale.shape[0]):
        low[:] = NAN_BYTE
        high[:] = 0
        for i in range(r * tile_rows, min(r * tile_rows + tile_rows, rows)):
            row = scale[i]
            for g in range(groups):
                low[g] = min(low[g], row[g])
                high[g] = max(high[g], row[g])
        for c in range(out_scale.shape[1]):
            smallest, largest = NAN_BYTE, 0
            for g in range(c * tile_groups, min(c * tile_groups + tile_groups, groups)):
                smallest = min(smallest, _i32(low[g]))
                largest = max(largest, _i32(high[g]))
            if largest == NAN_BYTE:
                return -NAN_BYTE
            tile = max(largest - e2m1.FP8_HEADROOM_EXPONENT, 0)
            out_scale[r, c] = tile
            lowest = min(lowest, smallest - tile)
    return lowest


@_kernel
def _fp4_fp8(packed: Array, scale: Array, tiles: Array, tile_rows: int, tile_groups: int, out: Array) -> None:
    rows, groups = scale.shape
    for i in range(rows):
        row, tile = scale[i], tiles[i // tile_rows]
        for c in range(tile.size):
            zero = _i32(tile[c]) - _FP8_BASE_EXPONENT
            for g in range(c * tile_groups, min(c * tile_groups + tile_groups, groups)):
                base = _u8((_i32(row[g]) - zero) << 3)
                k = i * groups + g
                fp4_to_fp8_group(packed, k * _PACKED_BYTES, base, out, k * GROUP)


def fp4_to_fp8(
    packed: ArrayU8, scale: ArrayU8, out: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally
) -> None:
    """Twin of `e2m1.fp4_to_fp8`."""
    rows, half = packed.shape
    tile_groups = e2m1.FP8_TILE // GROUP
    fits = out_scale.shape == (-(-rows // e2m1.FP8_TILE), -(-2 * half // e2m1.FP8_TILE))
    if half % _PACKED_BYTES == 0 and packed.size and fits:
        check_tile(rows, 2 * half, scale, (1, GROUP), out, (rows, 2 * half))
        low, high = scratch.array("compiled.extremes", (2, scale.shape[1]), np.uint8)
        if _tile_scales(scale, e2m1.FP8_TILE, tile_groups, out_scale, low, high) >= _FP8_FIRST_NORMAL_LIFT:
            _fp4_fp8(packed.reshape(-1), scale, out_scale, e2m1.FP8_TILE, tile_groups, out.reshape(-1))
            return
    e2m1.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally)


# --- to Q8_0 --------------------------------------------------------------------------------------------


@_inline
def _store_d(d: Any, largest: Any, out: Any, where: Any) -> Any:
    """Write the two bytes of d; return whether it is NaN, infinite, or vanished."""
    out[where] = _u8(d)
    out[where + 1] = _u8(d >> 8)
    return (d >= _F16_INF_BITS) | ((d == 0) & (largest != 0))


@_kernel
def _fp8_q8_0(
    weight: Array, codes: Array, tall: int, wide: int, groups: int, multipliers: Array, table: Array, out: Array
) -> Any:
    """Write the blocks; return whether one needs the general treatment."""
    strange = False
    for i in range(weight.size // (groups * GROUP)):
        row = codes[i // tall]
        for c in range(row.size):
            byte = row[c]
            for g in range(c * wide, min(c * wide + wide, groups)):
                k = i * groups + g
                largest = largest_fp8(weight, k * GROUP)
                strange |= _store_d(table[largest, byte], largest, out, k * _Q8_0_BYTES)
                fp8_levels(weight, k * GROUP, multipliers[largest], out, k * _Q8_0_BYTES + 2)
    return strange


def fp8_to_q8_0(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp8_to_q8_0`."""
    q8_0.check_blocks(weight.shape, out)
    check_tile(weight.shape[0], weight.shape[1], scale, block, out, out.shape)
    codes = power_of_two_bytes(scale, scratch)
    if codes is not None and block[1] % GROUP == 0 and weight.size:
        first, last, nan = byte_range(codes)
        if first >= q8_0.TABLE_FIRST_BYTE and last <= q8_0.TABLE_LAST_BYTE and not nan:
            tables = q8_0.multipliers(), q8_0.d_table().reshape(-1, 256)
            shape = block[0], block[1] // GROUP, weight.shape[1] // GROUP
            if not _fp8_q8_0(weight.reshape(-1), codes, *shape, *tables, out.reshape(-1)):
                return
    q8_0.fp8_to_q8_0(weight, scale, block, out, scratch, tally)


@_kernel
def _fp4_q8_0(packed: Array, scale: Array, multipliers: Array, table: Array, out: Array) -> Any:
    strange = False
    for g in range(scale.size):
        largest = largest_fp4(packed, g * _PACKED_BYTES)
        strange |= _store_d(table[largest, scale[g]], largest, out, g * _Q8_0_BYTES)
        fp4_levels(packed, g * _PACKED_BYTES, multipliers[largest], out, g * _Q8_0_BYTES + 2)
    return strange


def fp4_to_q8_0(packed: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp4_to_q8_0`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    q8_0.check_blocks((rows, columns), out)
    check_tile(rows, columns, scale, block, out, out.shape)
    codes = power_of_two_bytes(scale, scratch)
    if codes is not None and block == (1, GROUP) and packed.size:
        first, last, nan = byte_range(codes)
        if first >= q8_0.FP4_TABLE_FIRST_BYTE and last <= q8_0.FP4_TABLE_LAST_BYTE and not nan:
            tables = q8_0.fp4_multipliers(), q8_0.fp4_tables()[1].reshape(-1, 256)
            if not _fp4_q8_0(packed.reshape(-1), codes.reshape(-1), *tables, out.reshape(-1)):
                return
    q8_0.fp4_to_q8_0(packed, scale, block, out, scratch, tally)


@_inline
def _round_f16(value: Any) -> Any:
    """Bits of a positive float32 below 65520 rounded to float16, nearest even."""
    bits = value.view(_u32)
    normal = _u32(_u32(_u32(bits + _u32(0xFFF)) + _u32(_u32(bits >> _u32(13)) & _u32(1))) >> _u32(13))
    subnormal = _u32(_i32(np.rint(_f32(value * _F16_SUBNORMAL_STEPS))))
    return subnormal if bits < _u32(_F16_MIN_NORMAL_BITS) else _u32(normal - _u32(_F16_REBIAS))


@_kernel
def _float_q8_0(values: Array, out: Array) -> Any:
    """Write the blocks of float32 or bfloat16 values; return whether one is beyond the plain formula."""
    for g in range(values.size // GROUP):
        largest = largest_bits(values, g * GROUP)
        if largest >= _u32(_F32_INF_BITS):
            return True
        d = _f32(_u32(largest).view(_f32) / _f32(127.0))
        inverse = _f32(0.0)
        if d != _f32(0.0):
            inverse = _f32(_f32(1.0) / d)
        if d >= _LARGEST_D or _f32(inverse).view(_u32) >= _u32(_F32_INF_BITS):
            return True
        if _store_d(_round_f16(d), largest, out, g * _Q8_0_BYTES):
            return True
        float_levels(values, g * GROUP, inverse, out, g * _Q8_0_BYTES + 2)
    return False


_LARGEST_D = _f32(65520.0)  # rounds to infinity from here


def f32_to_q8_0(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.f32_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    if _float_q8_0(values.reshape(-1), out.reshape(-1)):
        q8_0.f32_to_q8_0(values, out, scratch, tally)


def bf16_to_q8_0(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.bf16_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    if _float_q8_0(values.reshape(-1), out.reshape(-1)):
        q8_0.bf16_to_q8_0(values, out, scratch, tally)


# --- to MXFP4 by rounding -------------------------------------------------------------------------------

_F32_MANTISSA = 0x7F_FFFF
_MANTISSA_OF_6 = 0x40_0000
_INVERSE_BYTE = 254  # 2^(127 - e) as an e8m0 byte is 254 - e


@_kernel
def _float_mxfp4(values: Array, table: Array, out: Array) -> Any:
    """Write the blocks; return how many values were rounded, negative if a block needs the general treatment."""
    changed = 0
    for g in range(values.size // GROUP):
        bits = _i32(largest_bits(values, g * GROUP))
        scale = (bits >> 23) - 2 + ((bits & _F32_MANTISSA) > _MANTISSA_OF_6)
        if bits >= _F32_INF_BITS or scale > 127 or (scale < 2 and bits > 0):
            return -1
        scale = max(scale, 1)
        where = g * _MXFP4_BYTES
        rounded = encode_group(values, g * GROUP, table[_INVERSE_BYTE - scale], out, where + 1)
        if rounded == 0 and (bits & _F32_MANTISSA) == _MANTISSA_OF_6:
            # Exact, with a 6, and no code that twice the scale lacks: that scale is preferred.
            scale += 1
            encode_group(values, g * GROUP, table[_INVERSE_BYTE - scale], out, where + 1)
        out[where] = scale
        changed += rounded & (HAS_FINE_CODE - 1)
    return changed


def _to_mxfp4(values: Array, out: ArrayU8, tally: Tally) -> bool:
    mxfp4.check_blocks(values.shape, out)
    changed = int(_float_mxfp4(values.reshape(-1), F32_OF_BYTE, out.reshape(-1)))
    tally.changed += max(changed, 0)
    return changed >= 0


def f32_to_mxfp4(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.f32_to_mxfp4`."""
    if not _to_mxfp4(values, out, tally):
        mxfp4.f32_to_mxfp4(values, out, scratch, tally)


def bf16_to_mxfp4(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.bf16_to_mxfp4`."""
    if not _to_mxfp4(values, out, tally):
        mxfp4.bf16_to_mxfp4(values, out, scratch, tally)


# --- floats ---------------------------------------------------------------------------------------------


@_kernel
def _f32_bf16(bits: Array, out: Array) -> Any:
    """Round to nearest even; return the largest magnitude, how many were rounded, and those below the normals."""
    largest, inexact, tiny = _u32(0), 0, 0
    for j in range(bits.size):
        value = bits[j]
        magnitude = _u32(value & _u32(_F32_MAGNITUDE_BITS))
        largest = max(largest, magnitude)
        rounded = _u32(value & _u32(0xFFFF)) != _u32(0)
        inexact += rounded
        tiny += rounded & (magnitude < _u32(_F32_MIN_NORMAL_BITS))
        even = _u32(_u32(value >> _u32(16)) & _u32(1))
        out[j] = _u16(_u32(_u32(value + _u32(0x7FFF)) + even) >> _u32(16))
    return largest, inexact, tiny


def f32_to_bf16(source: ArrayF32, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.f32_to_bf16`."""
    check_contiguous(out)
    largest, inexact, tiny = _f32_bf16(source.reshape(-1).view(np.uint32), out.reshape(-1))
    if largest >= _BF16_OVERFLOW_BITS:
        bf16.f32_to_bf16(source, out, scratch, tally)
        return
    tally.underflow += int(tiny)
    tally.changed += int(inexact - tiny)


@_kernel
def _bf16_f32(source: Array, out: Array) -> Any:
    largest = _u16(0)
    for j in range(source.size):
        value = source[j]
        largest = max(largest, _u16(value & _u16(0x7FFF)))
        out[j] = _u32(_u32(value) << _u32(16))
    return largest


_BF16_INF_BITS = 0x7F80


def bf16_to_f32(source: ArrayU16, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Twin of `bf16.bf16_to_f32`."""
    check_contiguous(out)
    if _bf16_f32(source.reshape(-1), out.reshape(-1).view(np.uint32)) > _BF16_INF_BITS:
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
    "fp4_to_mxfp4": fp4_to_mxfp4,
    "fp4_to_q8_0": fp4_to_q8_0,
    "f32_to_bf16": f32_to_bf16,
    "f32_to_mxfp4": f32_to_mxfp4,
    "f32_to_q8_0": f32_to_q8_0,
    "bf16_to_f32": bf16_to_f32,
    "bf16_to_mxfp4": bf16_to_mxfp4,
    "bf16_to_q8_0": bf16_to_q8_0,
}
