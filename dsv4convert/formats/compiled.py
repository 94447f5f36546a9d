"""Compiled twins of the numpy codecs, in numba: same arguments, same bits, same counts.

Each twin takes the ordinary tile: scales within the range where nothing can over- or underflow, no NaN,
rows of whole groups. Its kernel says when a tile is not ordinary, and then the numpy codec does the whole
tile again, so that rare cases are written once. Importing this module imports numba; kernels compile on
first use, a second or two each, and are kept in numba's cache.

The loops are shaped for the vectoriser: flat or row-long, indices from 0, arrays of one type each, and a
staging buffer where input and output would have to be proved apart for every group of 32.
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
    check_tile,
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
_i8, _i32, _f32 = np.int8, np.int32, np.float32

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
_LOW_NIBBLES = 0x0F0F_0F0F_0F0F_0F0F
_BYTE_HIGHS = 0x8080_8080_8080_8080
_BYTE_LOWS = 0x7F7F_7F7F_7F7F_7F7F
_BYTE_SEVENS = 0x0707_0707_0707_0707
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
def _swap_nibbles(lanes: Array, even: Array, odd: Array) -> None:
    for g in range(even.size):
        first, second = lanes[2 * g], lanes[2 * g + 1]
        swap = ((first >> _u64(4)) ^ second) & _u64(_LOW_NIBBLES)
        even[g] = first ^ (swap << _u64(4))
        odd[g] = second ^ swap


@_kernel
def _join_bytes(even: Array, odd: Array, joined: Array) -> None:
    for k in range(joined.size):
        joined[k] = _u16(even[k]) | _u16(_u16(odd[k]) << _u16(8))


@_kernel
def _store_blocks(scale: Array, joined: Array, out_scale: Array, out_first: Array, out_second: Array) -> Any:
    largest = _u8(0)
    for g in range(scale.size):
        out_scale[g] = scale[g]
        out_first[g] = joined[2 * g]
        out_second[g] = joined[2 * g + 1]
        largest = max(largest, scale[g])
    return largest


@_kernel
def _fp4_mxfp4(
    lanes: Array, scale: Array, even: Array, odd: Array, joined: Array, out: Array, first: Array, second: Array
) -> Any:
    blocks, chunk, largest = scale.size, even.size, _u8(0)
    even8, odd8, joined64 = even.view(np.uint8), odd.view(np.uint8), joined.view(np.uint64)
    for start in range(0, blocks, chunk):
        stop = min(start + chunk, blocks)
        n = stop - start
        _swap_nibbles(lanes[2 * start : 2 * stop], even[:n], odd[:n])
        _join_bytes(even8[: 8 * n], odd8[: 8 * n], joined[: 8 * n])
        largest = max(
            largest,
            _store_blocks(scale[start:stop], joined64[: 2 * n], out[start:stop], first[start:stop], second[start:stop]),
        )
    return largest


_CHUNK = 256  # blocks whose staging stays in the first-level cache: 256 * 32 bytes


def _strided(out: ArrayU8, dtype: Any, offset: int, stride: int, blocks: int) -> Array:
    """View one field of every block; numba and the processor cope with its odd addresses."""
    field: Array = np.ndarray((blocks,), dtype, out.data, offset, (stride,))
    return field


def _mxfp4_fields(out: ArrayU8) -> list[Array]:
    blocks = out.size // mxfp4.BLOCK_BYTES
    return [
        _strided(out, kind, offset, mxfp4.BLOCK_BYTES, blocks)
        for kind, offset in ((np.uint8, 0), (np.uint64, 1), (np.uint64, 9))
    ]


def fp4_to_mxfp4(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.fp4_to_mxfp4`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP or packed.size == 0:
        mxfp4.fp4_to_mxfp4(packed, scale, out, scratch, tally)
        return
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns // GROUP * mxfp4.BLOCK_BYTES))
    even = scratch.array("compiled.even", (_CHUNK,), np.uint64)
    odd = scratch.array("compiled.odd", (_CHUNK,), np.uint64)
    joined = scratch.array("compiled.joined", (_CHUNK * 8,), np.uint16)
    lanes = packed.reshape(-1).view(np.uint64)
    largest = _fp4_mxfp4(lanes, scale.reshape(-1), even, odd, joined, *_mxfp4_fields(out))
    if largest == NAN_BYTE:
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
def _group_bases(scale: Array, out_scale: Array, tile_rows: int, tile_groups: int, base: Array) -> None:
    """Write for each group what its codes' e4m3 exponents are counted from, in place."""
    for i in range(scale.shape[0]):
        row, tiles, out = scale[i], out_scale[i // tile_rows], base[i]
        for c in range(tiles.size):
            tile = _i32(tiles[c]) - _FP8_BASE_EXPONENT
            for g in range(c * tile_groups, min(c * tile_groups + tile_groups, out.size)):
                out[g] = (_i32(row[g]) - tile) << 3


@_kernel
def _fp4_fp8(packed: Array, base: Array, out: Array) -> None:
    for g in range(base.size):
        exponent = base[g]
        for j in range(GROUP // 2):
            byte = _u16(packed[g, j])
            low, high = _u16(byte & _u16(7)), _u16(_u16(byte >> _u16(4)) & _u16(7))
            # Code 1, the only subnormal, is 0.5: the exponent below code 2's, with an empty mantissa.
            one = _u16(_u16(_u16(low - _u16(low == _u16(1))) << _u16(2)) + exponent)
            two = _u16(_u16(_u16(high - _u16(high == _u16(1))) << _u16(2)) + exponent)
            one = _u16(one if low else _u16(0))
            two = _u16(two if high else _u16(0))
            signs = _u16(_u16(_u16(byte & _u16(0x08)) << _u16(4)) | _u16(_u16(byte & _u16(0x80)) << _u16(8)))
            out[g, j] = _u16(_u16(one | _u16(two << _u16(8))) | signs)


def fp4_to_fp8(
    packed: ArrayU8, scale: ArrayU8, out: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally
) -> None:
    """Twin of `e2m1.fp4_to_fp8`."""
    rows, half = packed.shape
    tile_groups = e2m1.FP8_TILE // GROUP
    fits = out_scale.shape == (-(-rows // e2m1.FP8_TILE), -(-2 * half // e2m1.FP8_TILE))
    if half % (GROUP // 2) == 0 and packed.size and fits:
        check_tile(rows, 2 * half, scale, (1, GROUP), out, (rows, 2 * half))
        low, high = scratch.array("compiled.extremes", (2, scale.shape[1]), np.uint8)
        if _tile_scales(scale, e2m1.FP8_TILE, tile_groups, out_scale, low, high) >= _FP8_FIRST_NORMAL_LIFT:
            base = scratch.array("compiled.base", scale.shape, np.uint16)
            _group_bases(scale, out_scale, e2m1.FP8_TILE, tile_groups, base)
            groups = (scale.size, GROUP // 2)
            _fp4_fp8(packed.reshape(groups), base.reshape(-1), out.view(np.uint16).reshape(groups))
            return
    e2m1.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally)


# --- to Q8_0 --------------------------------------------------------------------------------------------


@_inline
def _larger_bytes(a: Any, b: Any) -> Any:
    """Maximum of eight bytes below 0x80 at a time."""
    at_least = ((a | _u64(_BYTE_HIGHS)) - b) & _u64(_BYTE_HIGHS)
    mask = at_least - (at_least >> _u64(7))
    return (a & mask) | (b & ~mask)


@_inline
def _largest_byte(lanes: Any) -> Any:
    lanes = _larger_bytes(lanes, lanes >> _u64(32))
    lanes = _larger_bytes(lanes, lanes >> _u64(16))
    return _u8(_larger_bytes(lanes, lanes >> _u64(8)))


@_kernel
def _fp8_group_max(lanes: Array, largest: Array) -> None:
    for g in range(largest.size):
        a = _larger_bytes(lanes[4 * g] & _u64(_BYTE_LOWS), lanes[4 * g + 1] & _u64(_BYTE_LOWS))
        b = _larger_bytes(lanes[4 * g + 2] & _u64(_BYTE_LOWS), lanes[4 * g + 3] & _u64(_BYTE_LOWS))
        largest[g] = _largest_byte(_larger_bytes(a, b))


@_kernel
def _fp8_levels(weight: Array, largest: Array, multipliers: Array, q: Array) -> None:
    for g in range(largest.size):
        multiplier = multipliers[largest[g]]
        for j in range(GROUP):
            code = _u32(weight[g, j])
            # The multipliers keep every product away from the halves, so this rounds as the formula does.
            level = _i32(_f32(_f32(_e4m3_value(code) * multiplier) + _HALF))
            q[g, j] = _i8(_i32(-level) if code >= _u32(_SIGN) else level)


@_kernel
def _store_d(largest: Array, scale: Array, table: Array, out: Array) -> Any:
    """Write every d; return whether a NaN, or a d that is infinite or vanished, is among them."""
    strange = 0
    for g in range(largest.size):
        d = table[largest[g], scale[g]]
        out[g] = d
        strange |= (d >= _F16_INF_BITS) | ((d == 0) & (largest[g] != 0))
    return strange


@_kernel
def _store_levels(q: Array, first: Array, second: Array, third: Array, fourth: Array) -> None:
    for g in range(first.size):
        first[g] = q[4 * g]
        second[g] = q[4 * g + 1]
        third[g] = q[4 * g + 2]
        fourth[g] = q[4 * g + 3]


@_kernel
def _group_scales(codes: Array, tall: int, groups_wide: int, identity: Array, scale: Array) -> None:
    """Write the scale byte of each group of each row."""
    rows = scale.shape[0]
    for r in range(codes.shape[0]):
        start = r * tall
        _spread_row(codes[r], identity, groups_wide, scale[start])
        for i in range(start + 1, min(start + tall, rows)):
            scale[i] = scale[start]


@_kernel
def _fp8_q8_0(
    weight: Array,
    lanes: Array,
    scale: Array,
    multipliers: Array,
    table: Array,
    largest: Array,
    q: Array,
    out: Array,
    first: Array,
    second: Array,
    third: Array,
    fourth: Array,
) -> Any:
    blocks, chunk, strange = scale.size, largest.size, 0
    q64 = q.reshape(-1).view(np.uint64)
    for start in range(0, blocks, chunk):
        stop = min(start + chunk, blocks)
        n = stop - start
        _fp8_group_max(lanes[4 * start : 4 * stop], largest[:n])
        _fp8_levels(weight[start:stop], largest[:n], multipliers, q[:n])
        strange |= _store_d(largest[:n], scale[start:stop], table, out[start:stop])
        _store_levels(q64[: 4 * n], first[start:stop], second[start:stop], third[start:stop], fourth[start:stop])
    return strange


_IDENTITY = np.arange(256, dtype=np.uint8)


def _q8_0_fields(out: ArrayU8) -> list[Array]:
    blocks = out.size // q8_0.BLOCK_BYTES
    fields = [_strided(out, np.uint16, 0, q8_0.BLOCK_BYTES, blocks)]
    for offset in range(2, q8_0.BLOCK_BYTES, 8):
        fields.append(_strided(out, np.uint64, offset, q8_0.BLOCK_BYTES, blocks))
    return fields


def fp8_to_q8_0(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp8_to_q8_0`."""
    rows, columns = weight.shape
    if columns % GROUP == 0 and block[1] % GROUP == 0 and weight.size:
        check_tile(rows, columns, scale, block, out, (rows, columns // GROUP * q8_0.BLOCK_BYTES))
        codes = power_of_two_bytes(scale, scratch)
        if codes is not None:
            first, last, nan = byte_range(codes)
            if first >= q8_0.TABLE_FIRST_BYTE and last <= q8_0.TABLE_LAST_BYTE and not nan:
                group_scale = scratch.array("compiled.group_scale", (rows, columns // GROUP), np.uint8)
                _group_scales(codes, block[0], block[1] // GROUP, _IDENTITY, group_scale)
                strange = _fp8_q8_0(
                    weight.reshape(-1, GROUP),
                    weight.reshape(-1).view(np.uint64),
                    group_scale.reshape(-1),
                    q8_0.multipliers(),
                    q8_0.d_table().reshape(-1, 256),
                    scratch.array("compiled.largest", (_CHUNK,), np.uint8),
                    scratch.array("compiled.q", (_CHUNK, GROUP), np.int8),
                    *_q8_0_fields(out),
                )
                if not strange:
                    return
    q8_0.fp8_to_q8_0(weight, scale, block, out, scratch, tally)


@_kernel
def _fp4_group_max(lanes: Array, largest: Array) -> None:
    for g in range(largest.size):
        first, second = lanes[2 * g], lanes[2 * g + 1]
        a = _larger_bytes(first & _u64(_BYTE_SEVENS), (first >> _u64(4)) & _u64(_BYTE_SEVENS))
        b = _larger_bytes(second & _u64(_BYTE_SEVENS), (second >> _u64(4)) & _u64(_BYTE_SEVENS))
        largest[g] = _largest_byte(_larger_bytes(a, b))


@_kernel
def _fp4_levels(packed: Array, largest: Array, pairs: Array, q: Array) -> None:
    for g in range(largest.size):
        row = _i32(largest[g]) << 8
        for j in range(GROUP // 2):
            q[g, j] = pairs[row + packed[g, j]]


@_kernel
def _fp4_q8_0(
    packed: Array,
    lanes: Array,
    scale: Array,
    pairs: Array,
    table: Array,
    largest: Array,
    q: Array,
    out: Array,
    first: Array,
    second: Array,
    third: Array,
    fourth: Array,
) -> Any:
    blocks, chunk, strange = scale.size, largest.size, 0
    q64 = q.reshape(-1).view(np.uint64)
    for start in range(0, blocks, chunk):
        stop = min(start + chunk, blocks)
        n = stop - start
        _fp4_group_max(lanes[2 * start : 2 * stop], largest[:n])
        _fp4_levels(packed[start:stop], largest[:n], pairs, q[:n])
        strange |= _store_d(largest[:n], scale[start:stop], table, out[start:stop])
        _store_levels(q64[: 4 * n], first[start:stop], second[start:stop], third[start:stop], fourth[start:stop])
    return strange


def fp4_to_q8_0(packed: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.fp4_to_q8_0`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % GROUP == 0 and block == (1, GROUP) and packed.size:
        check_tile(rows, columns, scale, block, out, (rows, columns // GROUP * q8_0.BLOCK_BYTES))
        codes = power_of_two_bytes(scale, scratch)
        if codes is not None:
            first, last, nan = byte_range(codes)
            if first >= q8_0.FP4_TABLE_FIRST_BYTE and last <= q8_0.FP4_TABLE_LAST_BYTE and not nan:
                pairs, d = q8_0.fp4_tables()
                strange = _fp4_q8_0(
                    packed.reshape(-1, GROUP // 2),
                    packed.reshape(-1).view(np.uint64),
                    codes.reshape(-1),
                    pairs,
                    d.reshape(-1, 256),
                    scratch.array("compiled.largest", (_CHUNK,), np.uint8),
                    scratch.array("compiled.pairs", (_CHUNK, GROUP // 2), np.uint16),
                    *_q8_0_fields(out),
                )
                if not strange:
                    return
    q8_0.fp4_to_q8_0(packed, scale, block, out, scratch, tally)


@_inline
def _round_f16(value: Any) -> Any:
    """Bits of a positive float32 below 65520 rounded to float16, nearest even."""
    bits = value.view(_u32)
    normal = _u32(_u32(_u32(bits + _u32(0xFFF)) + _u32(_u32(bits >> _u32(13)) & _u32(1))) >> _u32(13))
    subnormal = _u32(_i32(np.rint(_f32(value * _F16_SUBNORMAL_STEPS))))
    return _u16(subnormal if bits < _u32(_F16_MIN_NORMAL_BITS) else _u32(normal - _u32(_F16_REBIAS)))


_LARGEST_D = _f32(65520.0)  # rounds to infinity from here


@_inline
def _larger(a: Any, b: Any) -> Any:
    return b if b > a else a


@_kernel
def _f32_group_max(values: Array, largest: Array) -> None:
    """Largest magnitude of each group, infinity included; NaN is passed over, and seen by who uses it."""
    for g in range(largest.size):
        # Four chains, since the vectoriser may not reorder the maxima of one.
        a, b, c, d = abs(values[g, 0]), abs(values[g, 1]), abs(values[g, 2]), abs(values[g, 3])
        for j in range(4, GROUP, 4):
            a = _larger(a, abs(values[g, j]))
            b = _larger(b, abs(values[g, j + 1]))
            c = _larger(c, abs(values[g, j + 2]))
            d = _larger(d, abs(values[g, j + 3]))
        largest[g] = _larger(_larger(a, b), _larger(c, d))


@_kernel
def _float_scales(largest: Array, inverse: Array, out: Array) -> Any:
    """Write every d and 1/d; return whether a block is beyond the plain formula."""
    strange = False
    for g in range(largest.size):
        d = _f32(largest[g] / _f32(127.0))
        if d == _f32(0.0):
            strange = strange or largest[g] != _f32(0.0)
            inverse[g] = _f32(0.0)
            out[g] = _u16(0)
            continue
        factor = _f32(_f32(1.0) / d)
        bits = _round_f16(d)
        if not d < _LARGEST_D or not factor.view(_u32) < _u32(_F32_INF_BITS) or bits == 0:
            return True
        inverse[g] = factor
        out[g] = bits
    return strange


@_kernel
def _float_levels(values: Array, inverse: Array, q: Array) -> Any:
    """Write the levels; return how many elements are NaN."""
    nan = 0
    for g in range(inverse.size):
        factor = inverse[g]
        found = _i32(0)
        for j in range(GROUP):
            scaled = _f32(values[g, j] * factor)
            found = _i32(found + _i32(scaled != scaled))
            magnitude = _f32(abs(scaled))
            whole = _i32(magnitude)
            level = _i32(whole + _i32(_f32(magnitude - _f32(whole)) >= _HALF))
            q[g, j] = _i8(_i32(-level) if scaled < _f32(0.0) else level)
        nan += found
    return nan


@_kernel
def _widen(source: Array, out: Array) -> None:
    for j in range(source.size):
        out[j] = _u32(_u32(source[j]) << _u32(16))


@_kernel
def _f32_q8_0(
    values: Array,
    largest: Array,
    inverse: Array,
    q: Array,
    out: Array,
    first: Array,
    second: Array,
    third: Array,
    fourth: Array,
) -> Any:
    blocks, chunk = values.shape[0], largest.size
    q64 = q.reshape(-1).view(np.uint64)
    for start in range(0, blocks, chunk):
        stop = min(start + chunk, blocks)
        n = stop - start
        _f32_group_max(values[start:stop], largest[:n])
        if _float_scales(largest[:n], inverse[:n], out[start:stop]):
            return True
        if _float_levels(values[start:stop], inverse[:n], q[:n]):
            return True
        _store_levels(q64[: 4 * n], first[start:stop], second[start:stop], third[start:stop], fourth[start:stop])
    return False


def _quantise_f32(values: ArrayF32, out: ArrayU8, scratch: Scratch) -> bool:
    groups = values.reshape(-1, GROUP)
    return not _f32_q8_0(
        groups,
        scratch.array("compiled.top", (_CHUNK,), np.float32),
        scratch.array("compiled.inverse", (_CHUNK,), np.float32),
        scratch.array("compiled.levels", (_CHUNK, GROUP), np.int8),
        *_q8_0_fields(out),
    )


def f32_to_q8_0(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.f32_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    if not (values.size and _quantise_f32(values, out, scratch)):
        q8_0.f32_to_q8_0(values, out, scratch, tally)


def bf16_to_q8_0(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `q8_0.bf16_to_q8_0`."""
    q8_0.check_blocks(values.shape, out)
    wide = scratch.array("compiled.wide", values.shape, np.uint32)
    _widen(values.reshape(-1), wide.reshape(-1))
    if not (values.size and _quantise_f32(wide.view(np.float32), out, scratch)):
        q8_0.bf16_to_q8_0(values, out, scratch, tally)


# --- to MXFP4 by rounding -------------------------------------------------------------------------------

_F32_MANTISSA = 0x7F_FFFF
_MANTISSA_OF_6 = 0x40_0000
_ONE_BITS = 127 << 23
_MAGIC_LIFT = 22 << 23
_TWICE_E_BASE = 2 * (127 + 22)


@_kernel
def _mxfp4_scales(largest: Array, scale: Array) -> Any:
    """Write every scale byte; return whether a block needs the general treatment."""
    strange = 0
    for g in range(largest.size):
        bits = _i32(largest[g])
        byte = (bits >> 23) - 2 + ((bits & _F32_MANTISSA) > _MANTISSA_OF_6)
        strange |= (bits >= _F32_INF_BITS) | (byte > 127) | ((byte < 2) & (bits > 0))
        scale[g] = max(byte, 1)
    return strange


@_kernel
def _mxfp4_codes(bits: Array, largest: Array, scale: Array, table: Array, codes: Array) -> Any:
    """Write the codes, moving blocks to twice the scale as the numpy codec does.

    Returns how many elements were rounded, or a negative number if one is NaN.
    """
    changed, nan = 0, _u32(0)
    for g in range(largest.size):
        inverse = table[254 - scale[g]]
        inexact = _i32(0)
        fine = _i32(0)
        for j in range(GROUP):
            value = _u32(bits[g, j])
            magnitude = _u32(value & _u32(_F32_MAGNITUDE_BITS))
            nan = _u32(nan | _u32(magnitude > _u32(_F32_INF_BITS)))
            y = _f32(magnitude.view(_f32) * inverse)
            magic = _u32(max(_u32(y.view(_u32) & _u32(_F32_INF_BITS)), _u32(_ONE_BITS)) + _u32(_MAGIC_LIFT))
            lifted = _f32(y + magic.view(_f32))
            inexact = _i32(inexact + _i32(_f32(lifted - magic.view(_f32)) != y))
            steps = _u32(_u32(_u32(lifted.view(_u32) & _u32(7)) + _u32(magic >> _u32(22))) - _u32(_TWICE_E_BASE))
            # Codes 1 and 3 have no counterpart at twice the scale.
            fine = _i32(fine | _i32(_u32(steps & _u32(1)) & _u32(steps < _u32(4))))
            codes[g, j] = _u8(_u32(steps | _u32(_u32(value >> _u32(28)) & _u32(8))))
        changed += inexact
        if inexact == 0 and fine == 0 and (_i32(largest[g]) & _F32_MANTISSA) == _MANTISSA_OF_6:
            scale[g] += 1
            for j in range(GROUP):
                code = codes[g, j]
                single = _u8(code & _u8(7))
                half = _u8(single - _u8(2)) if single >= _u8(4) else _u8(single >> _u8(1))
                codes[g, j] = _u8(half | _u8(code & _u8(8)))
    return -1 if nan else changed


@_kernel
def _store_codes(lanes: Array, scale: Array, out_scale: Array, first: Array, second: Array) -> None:
    for g in range(scale.size):
        out_scale[g] = scale[g]
        first[g] = lanes[4 * g] | (lanes[4 * g + 2] << _u64(4))
        second[g] = lanes[4 * g + 1] | (lanes[4 * g + 3] << _u64(4))


@_kernel
def _f32_mxfp4(
    values: Array,
    bits: Array,
    table: Array,
    largest: Array,
    scale: Array,
    codes: Array,
    out_scale: Array,
    first: Array,
    second: Array,
) -> Any:
    blocks, chunk, changed = bits.shape[0], largest.size, 0
    lanes, largest_bits = codes.reshape(-1).view(np.uint64), largest.view(np.uint32)
    for start in range(0, blocks, chunk):
        stop = min(start + chunk, blocks)
        n = stop - start
        _f32_group_max(values[start:stop], largest[:n])
        if _mxfp4_scales(largest_bits[:n], scale[:n]):
            return -1
        rounded = _mxfp4_codes(bits[start:stop], largest_bits[:n], scale[:n], table, codes[:n])
        if rounded < 0:
            return -1
        changed += rounded
        _store_codes(lanes[: 4 * n], scale[:n], out_scale[start:stop], first[start:stop], second[start:stop])
    return changed


def _to_mxfp4(bits: Array, out: ArrayU8, scratch: Scratch, tally: Tally) -> bool:
    groups = bits.reshape(-1, GROUP)
    changed = _f32_mxfp4(
        groups.view(np.float32),
        groups,
        F32_OF_BYTE,
        scratch.array("compiled.top", (_CHUNK,), np.float32),
        scratch.array("compiled.scale", (_CHUNK,), np.uint8),
        scratch.array("compiled.codes", (_CHUNK, GROUP), np.uint8),
        *_mxfp4_fields(out),
    )
    if changed < 0:
        return False
    tally.changed += int(changed)
    return True


def f32_to_mxfp4(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.f32_to_mxfp4`."""
    mxfp4.check_blocks(values.shape, out)
    if not (values.size and _to_mxfp4(values.view(np.uint32), out, scratch, tally)):
        mxfp4.f32_to_mxfp4(values, out, scratch, tally)


def bf16_to_mxfp4(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Twin of `mxfp4.bf16_to_mxfp4`."""
    mxfp4.check_blocks(values.shape, out)
    wide = scratch.array("compiled.wide", values.shape, np.uint32)
    _widen(values.reshape(-1), wide.reshape(-1))
    if not (values.size and _to_mxfp4(wide, out, scratch, tally)):
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
