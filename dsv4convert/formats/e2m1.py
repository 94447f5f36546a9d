"""float4_e2m1fn, the FP4 expert weights: packing, decoding times a block scale, re-encoding as FP8.

::

    bits     s ee m         bias 1
    code     0    1    2    3    4    5    6    7      8 ... 15 are their negatives
    value    0   .5    1   1.5   2    3    4    6      8 is -0.0
    no infinity, no NaN

Packed in safetensors (dtype I8): byte i of a row holds element 2i in its low nibble and element 2i+1
in the high one. gguf-py and the published convert script read code 8 as +0.0; here it is -0.0.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import (
    BF16_NAN_BITS,
    F16_NAN_BITS,
    F32_NAN_BITS,
    FP8_TILE,
    GROUP,
    Array,
    ArrayF16,
    ArrayF32,
    ArrayI64,
    ArrayU8,
    ArrayU16,
    Block,
    Scratch,
    Tally,
    check_contiguous,
    check_tile,
    check_tile_of_floats,
    column_blocks,
)
from dsv4convert.formats.bf16 import store_products, widened_bf16
from dsv4convert.formats.e4m3 import MIN_SUBNORMAL_EXPONENT as E4M3_MIN_EXPONENT
from dsv4convert.formats.e4m3 import e4m3_to_f32, f32_to_e4m3, spread_blocks
from dsv4convert.formats.e8m0 import BIAS as E8M0_BIAS
from dsv4convert.formats.e8m0 import F32_OF_BYTE, NAN_BYTE, byte_range, f32_to_e8m0, power_of_two_bytes, scales_f32

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
VALUES.flags.writeable = False
MAX = 6.0
MIN_EXPONENT = -1  # 0.5, the smallest positive value
# The tile's scale is its largest FP4 scale divided by this: 6 * 2^6 = 384 still fits under 448.
FP8_HEADROOM_EXPONENT = 6

_NIBBLE = 0xF
_NIBBLE_BITS = 4
_BYTE_VALUES = 256
_SIGN_SHIFT = 3

# Between neighbours, and whether the midpoint itself goes up (to the even code above).
_MIDPOINTS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)

# Scale bytes between which no product leaves the range and none is rounded.
F32_LAST_SAFE_BYTE = E8M0_BIAS + 125  # 6 * 2^125 < 2^128; downwards 0.5 * 2^-127 is exact
F16_FIRST_EXACT_BYTE = E8M0_BIAS - 24 - MIN_EXPONENT  # 0.5 * 2^-23 = 2^-24
F16_LAST_SAFE_BYTE = E8M0_BIAS + 13  # 6 * 2^13 < 65504


def unpack_e2m1(packed: ArrayU8) -> ArrayU8:
    """Unpack bytes [..., C/2] to codes [..., C], low nibble first.

    >>> unpack_e2m1(np.array([0x21, 0x8F], np.uint8)).tolist()
    [1, 2, 15, 8]
    """
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2] = packed & _NIBBLE
    out[..., 1::2] = packed >> _NIBBLE_BITS
    return out


def pack_e2m1(codes: ArrayU8) -> ArrayU8:
    """Pack codes [..., C] (0 to 15, C even) to bytes [..., C/2], low nibble first.

    >>> pack_e2m1(np.array([1, 2, 15, 8], np.uint8)).tolist()
    [33, 143]
    """
    packed: ArrayU8 = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(_NIBBLE_BITS))
    return packed


def f32_to_e2m1(values: ArrayF32) -> ArrayU8:
    """Round float32, any shape, to e2m1 codes: nearest, ties to the even code, saturating at 6.

    Raises ValueError on NaN, which the format cannot hold.

    >>> f32_to_e2m1(np.array([0.25, 0.75, -5.0, 100.0], np.float32)).tolist()
    [0, 2, 14, 7]
    """
    values = np.asarray(values, np.float32)
    if np.isnan(values).any():
        raise ValueError("float4_e2m1fn has no NaN")
    magnitude = np.abs(values)
    code = np.zeros(values.shape, np.uint8)
    for midpoint, up in _MIDPOINTS:
        code += magnitude >= midpoint if up else magnitude > midpoint
    code |= np.signbit(values).astype(np.uint8) << np.uint8(_SIGN_SHIFT)
    return code


def fp4_scales(values: ArrayF32) -> ArrayU8:
    """Return the e8m0 scales [R, C/32] of float32 [R, C]: the smallest power of two with amax/scale <= 6.

    It is 2^-126 at least, so that a block of zeros has a scale too. Raises ValueError on NaN, infinity, or C not a
    multiple of 32.
    """
    rows, columns = values.shape
    if columns % GROUP:
        raise ValueError(f"FP4 rows come in groups of {GROUP}, got {columns} columns")
    if not np.isfinite(values).all():
        raise ValueError("cannot quantise NaN or infinity")
    amax = np.abs(values.reshape(rows, columns // GROUP, GROUP)).max(axis=2)
    fraction, exponent = np.frexp(np.maximum(amax, np.float32(MAX * 2.0**-126)))
    limit_fraction, limit_exponent = np.frexp(np.float32(MAX))
    return f32_to_e8m0(np.ldexp(np.float32(1), exponent - limit_exponent + (fraction > limit_fraction)))


def quantise_fp4(values: ArrayF32) -> tuple[ArrayU8, ArrayU8]:
    """Quantise float32 [R, C] the published way: (packed codes [R, C/2], e8m0 scales [R, C/32]); see ``fp4_scales``.

    Raises ValueError on NaN, infinity, or C not a multiple of 32.
    """
    rows, columns = values.shape
    scale = fp4_scales(values)
    groups = values.reshape(rows, columns // GROUP, GROUP)
    scaled = np.ldexp(groups, E8M0_BIAS - scale.astype(np.int32)[:, :, None]).astype(np.float32)
    return pack_e2m1(f32_to_e2m1(scaled)).reshape(rows, columns // 2), scale


def f32_to_fp4(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise float32 [R, C] to packed FP4 [R, C/2] with the scales of ``f32_to_fp4_scales``.

    Counts as ``changed`` the elements that were rounded. Raises LossyError on NaN and infinity.
    """
    rows, columns = values.shape
    check_tile_of_floats(values, out, (rows, columns // 2))
    packed, scale = quantise_fp4(values)
    back = np.empty_like(values)
    fp4_to_f32(packed, scale, (1, GROUP), back, scratch, Tally())
    tally.changed += int(np.count_nonzero(back != values))
    np.copyto(out, packed)


def f32_to_fp4_scales(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` [R, C/32] the e8m0 scales of float32 [R, C] as FP4; see ``fp4_scales``.

    Raises LossyError on NaN and infinity.
    """
    rows, columns = values.shape
    check_tile_of_floats(values, out, (rows, columns // GROUP))
    np.copyto(out, fp4_scales(values))


def bf16_to_fp4(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise bfloat16 bits [R, C]; see `f32_to_fp4`."""
    f32_to_fp4(widened_bf16(values, scratch), out, scratch, tally)


def bf16_to_fp4_scales(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Return in ``out`` [R, C/32] the e8m0 scales of bfloat16 bits [R, C] as FP4; see ``fp4_scales``."""
    f32_to_fp4_scales(widened_bf16(values, scratch), out, scratch, tally)


def fp4_to_f32(packed: ArrayU8, scale: Array, block: Block, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Decode packed FP4 [R, C/2] times its block scales to float32 [R, C].

    ``scale`` [ceil(R/block[0]), ceil(C/block[1])] is e8m0 bytes or float32; row 0 of the tile starts a
    block. Exact for power-of-two scales, else rounded once. Raises ValueError on shapes that do not fit.
    """
    _decode(packed, scale, block, out, "f32", scratch, tally)


def fp4_to_bf16(packed: ArrayU8, scale: Array, block: Block, out: ArrayU16, scratch: Scratch, tally: Tally) -> None:
    """Decode packed FP4 [R, C/2] times its block scales to bfloat16 bits [R, C]; see `fp4_to_f32`."""
    _decode(packed, scale, block, out, "bf16", scratch, tally)


def fp4_to_f16(packed: ArrayU8, scale: Array, block: Block, out: ArrayF16, scratch: Scratch, tally: Tally) -> None:
    """Decode packed FP4 [R, C/2] times its block scales to float16 [R, C]; see `fp4_to_f32`."""
    _decode(packed, scale, block, out, "f16", scratch, tally)


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
    """Re-encode packed FP4 [R, C/2], scales [R, C/32], as e4m3 [R, C] with one scale per tile of ``side`` both ways.

    The tile's e8m0 scale is its largest scale / 2^6 and each element becomes value * (its scale / the
    tile's). Lossless while the scales of a tile spread by at most 2^14; below that an element rounds to
    nearest even and is counted as changed. A NaN scale makes its 32 elements NaN codes and takes no
    part in choosing the tile's; a tile of NaN scales only keeps the NaN scale.
    Row 0 starts a tile. Raises ValueError on shapes that do not fit.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns))
    check_fp8_scales(scale, out_scale, side)
    if packed.size == 0:
        return
    lifted = _tile_scales(scale, out_scale, side)
    index = _byte_index(packed, lifted, (1, GROUP), scratch)
    pairs, loss = fp8_pair_tables()
    np.take(pairs, index, out=out.view(np.uint16), mode="clip")
    nan_groups = scale == NAN_BYTE
    if nan_groups.any():
        tally.nan += int(np.count_nonzero(np.repeat(nan_groups, GROUP, axis=1)[:, :columns]))
    if lifted.min() < E8M0_BIAS + FP8_FIRST_LOSSLESS_LIFT:
        tally.changed += int(np.take(loss, index, mode="clip").sum(dtype=np.int64))


def fp4_to_fp8_scales(
    scale: ArrayU8, out_scale: ArrayU8, scratch: Scratch, tally: Tally, side: int = FP8_TILE, /
) -> None:
    """Fill the scales that `fp4_to_fp8` makes of tiles of ``side`` from FP4 scales [R, C/32]; counts nothing.

    Raises ValueError on shapes that do not fit.
    """
    check_fp8_scales(scale, out_scale, side)
    if scale.size:
        _fill_tile_scales(scale, out_scale, side)


def check_fp8_scales(scale: ArrayU8, out_scale: ArrayU8, side: int = FP8_TILE) -> None:
    """Refuse scales that are not those of one matrix, in groups of 32 and in tiles. Raises ValueError."""
    want = (-(-scale.shape[0] // side), -(-scale.shape[1] * GROUP // side))
    if out_scale.shape != want:
        raise ValueError(f"tiles of {scale.shape} groups have {want} scales, got {out_scale.shape}")
    check_contiguous(out_scale)


def _fill_tile_scales(scale: ArrayU8, out_scale: ArrayU8, side: int) -> npt.NDArray[np.int16]:
    """Fill the tiles' scales; return them as numbers, 0 where all scales of a tile are NaN."""
    ranked = scale + np.uint8(1)  # NaN wraps to 0, below all others
    by_rows = np.maximum.reduceat(ranked, np.arange(0, scale.shape[0], side), axis=0)
    largest = np.maximum.reduceat(by_rows, np.arange(0, scale.shape[1], side // GROUP), axis=1)
    tile: npt.NDArray[np.int16] = largest.astype(np.int16) - np.int16(1 + FP8_HEADROOM_EXPONENT)
    np.maximum(tile, 0, out=tile)
    np.copyto(out_scale, np.where(largest == 0, NAN_BYTE, tile), casting="unsafe")
    return tile


# The lift is an element's scale relative to its tile's, a power of two, in tables as an e8m0 byte. Below
# this one the smallest values lose bits: 0.5 * 2^-8 = 2^-9.
FP8_FIRST_LOSSLESS_LIFT = E4M3_MIN_EXPONENT - MIN_EXPONENT


def _tile_scales(scale: ArrayU8, out_scale: ArrayU8, side: int) -> ArrayU8:
    """Fill the tiles' scale bytes and return each group's scale relative to them, as e8m0 bytes."""
    tile = _fill_tile_scales(scale, out_scale, side)
    spread = spread_blocks(tile, (side, side // GROUP), scale.shape)
    lifted = np.maximum(scale.astype(np.int16) - spread + E8M0_BIAS, 0)
    codes: ArrayU8 = np.where(scale == NAN_BYTE, NAN_BYTE, lifted).astype(np.uint8)
    return codes


@cache
def fp8_pair_tables() -> tuple[ArrayU16, ArrayU8]:
    """For (lift byte, packed byte): two e4m3 codes as one uint16, and how many of the two changed."""
    with np.errstate(over="ignore"):
        value = F32_OF_BYTE[:, None] * VALUES[None, :]
    value[E8M0_BIAS + FP8_HEADROOM_EXPONENT + 1 :] = 0  # lifts that cannot occur
    value[NAN_BYTE] = np.nan
    codes = f32_to_e4m3(value)
    changed = e4m3_to_f32(codes) != value
    changed[NAN_BYTE] = False
    low, high = _nibbles()
    pairs = np.stack([codes[:, low], codes[:, high]], axis=-1)
    loss = changed[:, low].astype(np.uint8) + changed[:, high]
    return np.ascontiguousarray(pairs).view(np.uint16).reshape(-1), loss.reshape(-1)


def _nibbles() -> tuple[ArrayU8, ArrayU8]:
    byte = np.arange(_BYTE_VALUES, dtype=np.uint8)
    return byte & np.uint8(_NIBBLE), byte >> np.uint8(_NIBBLE_BITS)


@cache
def pair_tables(kind: str) -> tuple[Array, ArrayU8, ArrayU8]:
    """Decoded pairs for (scale byte, packed byte), and how many of a pair over- and underflow.

    The pairs are uint64 (two float32) or uint32 (two 16-bit values), element 2i in the low half. The
    rows that a tensor's few scale bytes touch stay in the first-level cache.
    """
    exact = F32_OF_BYTE.astype(np.float64)[:, None] * VALUES[None, :]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if kind == "bf16":
            single = exact.astype(np.float32)  # truncation is exact: 2 significant bits
            codes: Array = (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            codes[NAN_BYTE] = BF16_NAN_BITS
            kept = single
        elif kind == "f16":
            half = exact.astype(np.float16)
            codes = half.view(np.uint16).copy()
            codes[NAN_BYTE] = F16_NAN_BITS
            kept = half.astype(np.float32)
        else:
            single = exact.astype(np.float32)
            codes = single.view(np.uint32).copy()
            codes[NAN_BYTE] = F32_NAN_BITS
            kept = single
    over = np.isinf(kept)
    under = (kept != exact) & ~over
    under[NAN_BYTE] = False
    low, high = _nibbles()
    pairs = np.ascontiguousarray(np.stack([codes[:, low], codes[:, high]], axis=-1))
    wide = np.uint64 if kind == "f32" else np.uint32

    def count(flags: npt.NDArray[np.bool_]) -> ArrayU8:
        return (flags[:, low].astype(np.uint8) + flags[:, high]).reshape(-1)

    return pairs.view(wide).reshape(-1), count(over), count(under)


_SAFE_BYTES = {
    "f32": (0, F32_LAST_SAFE_BYTE),
    "bf16": (0, F32_LAST_SAFE_BYTE),
    "f16": (F16_FIRST_EXACT_BYTE, F16_LAST_SAFE_BYTE),
}


def _decode(packed: ArrayU8, scale: Array, block: Block, out: Array, kind: str, scratch: Scratch, tally: Tally) -> None:
    rows, columns = packed.shape[0], packed.shape[1] * 2
    check_tile(rows, columns, scale, block, out, (rows, columns))
    if packed.size == 0:
        return
    codes = power_of_two_bytes(scale, scratch)
    if codes is None or block[1] % 2:
        # Any scale, or pairs that do not share one.
        product = VALUES[unpack_e2m1(packed)].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            product *= spread_blocks(scales_f32(scale).astype(np.float64), block, product.shape)
        store_products(product, out, scratch, tally)
        return
    pairs, over, under = pair_tables(kind)
    index = _byte_index(packed, codes, block, scratch)
    np.take(pairs, index, out=out.view(pairs.dtype), mode="clip")
    first, last, nan_scale = byte_range(codes)
    if nan_scale:
        tally.nan += int(np.count_nonzero(spread_blocks(codes == NAN_BYTE, block, (rows, columns))))
    safe_first, safe_last = _SAFE_BYTES[kind]
    if first < safe_first or last > safe_last:
        tally.overflow += int(np.take(over, index, mode="clip").sum(dtype=np.int64))
        tally.underflow += int(np.take(under, index, mode="clip").sum(dtype=np.int64))


@cache
def index_rows() -> ArrayI64:
    """For each scale byte, its table row's offset, once for each byte of a group."""
    rows = np.repeat(np.arange(_BYTE_VALUES, dtype=np.int64)[:, None] * _BYTE_VALUES, GROUP // 2, axis=1)
    rows.flags.writeable = False
    return rows


def _byte_index(packed: ArrayU8, codes: ArrayU8, block: Block, scratch: Scratch) -> ArrayI64:
    """Return scale byte * 256 + packed byte for every packed byte [R, C/2]."""
    rows, width = packed.shape
    pair_columns = block[1] // 2
    index: ArrayI64 = scratch.array("e2m1.index", packed.shape, np.int64)
    if block == (1, GROUP) and width % pair_columns == 0:
        # Copying a row of 16 ready offsets per group beats broadcasting one over 16 elements.
        offset = scratch.array("e2m1.offset", (rows, width // pair_columns, pair_columns), np.int64)
        np.take(index_rows(), codes, axis=0, out=offset, mode="clip")
        np.add(packed, offset.reshape(packed.shape), out=index)
        return index
    high = np.take(codes.astype(np.int64) * _BYTE_VALUES, column_blocks(width, pair_columns), axis=1)
    for number, start in enumerate(range(0, rows, block[0])):
        np.add(packed[start : start + block[0]], high[number], out=index[start : start + block[0]])
    return index
