"""GGML's MXFP4 blocks: packed FP4 rearranged bit for bit, the rounding quantiser, and the reader.

::

    17 bytes hold 32 elements:   e | q0 q1 ... q15
    e      the e8m0 scale byte
    q[j]   element j in the low nibble, element j + 16 in the high one; e2m1 codes

Packed FP4 in safetensors has elements 2i and 2i+1 in byte i, so going to MXFP4 moves bits and nothing
else: same codes, same scale byte, 0xFF included. llama.cpp gives 0xFF no meaning of its own (it reads
2^128); here it reads as NaN.

Quantising floats, the scale is the smallest power of two with amax/scale <= 6. One kind of block has two
exact encodings: largest magnitude 6 at scale s with every code among 0, 1, 2, 3, 4, 6, and the same
values, largest magnitude 3, at scale 2s. Blocks whose largest value rounded to 3 are a fifth of all that
the published quantiser makes, and blocks with a 6 and no 0.5 or 1.5 are rare, so 2s is chosen. Every
other block with a value in it has one encoding that the published quantiser can have made, and comes
back to its codes and scale. A block of zeros does not tell its scale: 2^-126 is written, the smallest
that the published quantiser uses. 2^-127 is used only for values that need it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from dsv4convert.formats.base import (
    F32_NAN_BITS,
    GROUP,
    Array,
    ArrayF32,
    ArrayU8,
    ArrayU16,
    Block,
    Scratch,
    Tally,
    check_contiguous,
    check_tile,
    group_max,
    require_subnormals,
)
from dsv4convert.formats.bf16 import bf16_to_f32
from dsv4convert.formats.e2m1 import MAX as E2M1_MAX
from dsv4convert.formats.e2m1 import VALUES, f32_to_e2m1
from dsv4convert.formats.e4m3 import fp8_to_f32
from dsv4convert.formats.e8m0 import BIAS, F32_MANTISSA_BITS, F32_OF_BYTE, NAN_BYTE

BLOCK_BYTES = 1 + GROUP // 2  # 17
_CODES_BYTES = GROUP // 2
_BLOCK = np.dtype([("e", np.uint8), ("q", np.dtype(f"V{_CODES_BYTES}"))])

_LOW_NIBBLES = np.uint64(0x0F0F_0F0F_0F0F_0F0F)
_FOUR = np.uint64(4)


def fp4_to_mxfp4(packed: ArrayU8, scale: ArrayU8, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Rearrange packed FP4 [R, C/2], e8m0 scales [R, C/32], to MXFP4 blocks [R, C/32*17].

    Lossless: moves bits only. Elements under a NaN scale are counted and keep it. Raises ValueError on
    shapes that do not fit.
    """
    rows, half = packed.shape
    columns = 2 * half
    if columns % GROUP:
        raise ValueError(f"MXFP4 rows come in groups of {GROUP}, got {columns} columns")
    check_tile(rows, columns, scale, (1, GROUP), out, (rows, columns // GROUP * BLOCK_BYTES))
    blocks = scale.size
    # Two uint64 per block: A holds elements 0 to 15, B elements 16 to 31.
    lanes = packed.reshape(blocks, _CODES_BYTES).view(np.uint64)
    target = out.reshape(-1).view(_BLOCK)
    chunk = min(blocks, _CHUNK)
    a, b, swap = scratch.array("mxfp4.lanes", (3, chunk), np.uint64)
    wide_a, wide_b = scratch.array("mxfp4.wide", (2, chunk * _CODES_BYTES // 2), np.uint16)
    for start in range(0, blocks, _CHUNK):
        stop = min(start + _CHUNK, blocks)
        n = stop - start
        _interleave(lanes[start:stop], a[:n], b[:n], swap[:n], wide_a[: 8 * n], wide_b[: 8 * n])
        np.copyto(target["q"][start:stop], wide_a[: 8 * n].view(_BLOCK["q"]))
    np.copyto(target["e"], scale.reshape(-1))
    if scale.size and scale.max() == NAN_BYTE:
        tally.nan += GROUP * int(np.count_nonzero(scale == NAN_BYTE))


# Blocks a time, the engine's tile: fewer pay more for numpy's calls than the second-level cache gives back.
_CHUNK = 1 << 15


def _interleave(lanes: Array, a: Array, b: Array, swap: Array, wide_a: ArrayU16, wide_b: ArrayU16) -> None:
    """Leave the code bytes of blocks of two uint64 in ``wide_a``; the other arrays are used up."""
    np.copyto(a, lanes[:, 0])
    np.copyto(b, lanes[:, 1])
    # Swapping A's high nibbles with B's low ones leaves elements 2i and 2i+16 together in byte i of A,
    # elements 2i+1 and 2i+17 together in byte i of B.
    np.right_shift(a, _FOUR, out=swap)
    np.bitwise_xor(swap, b, out=swap)
    np.bitwise_and(swap, _LOW_NIBBLES, out=swap)
    np.bitwise_xor(swap, b, out=b)
    np.left_shift(swap, _FOUR, out=swap)
    np.bitwise_xor(swap, a, out=a)
    # The bytes of the two then alternate. Widening leaves an empty byte after each of A's, and after each
    # of B's, which read one byte late fall into A's gaps.
    np.copyto(wide_a, a.view(np.uint8))
    np.copyto(wide_b, b.view(np.uint8))
    gaps = wide_a.view(np.uint8)[1:]
    np.bitwise_or(gaps, wide_b.view(np.uint8)[:-1], out=gaps)


def check_blocks(shape: tuple[int, ...], out: ArrayU8) -> None:
    """Raise ValueError unless a tile of ``shape`` fills the MXFP4 blocks of ``out``."""
    rows, columns = shape
    if columns % GROUP or out.shape != (rows, columns // GROUP * BLOCK_BYTES):
        raise ValueError(f"a {rows}x{columns} tile does not fill MXFP4 blocks of shape {out.shape}")
    check_contiguous(out)


def join_blocks(codes: ArrayU8, scale: ArrayU8, out: ArrayU8) -> None:
    """Write codes [blocks, 32] and scale bytes [blocks] as MXFP4 blocks."""
    pairs = codes[:, GROUP // 2 :] << np.uint8(4)
    pairs |= codes[:, : GROUP // 2]
    target = out.reshape(-1).view(_BLOCK)
    np.copyto(target["q"], pairs.reshape(-1).view(_BLOCK["q"]))
    np.copyto(target["e"], scale)


def fp8_to_mxfp4(weight: ArrayU8, scale: Array, block: Block, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise e4m3 codes [R, C] times their block scales to MXFP4 blocks [R, C/32*17].

    ``scale`` is e8m0 bytes or float32 per block. Equal to decoding to float32 and quantising that, and counts as
    `f32_to_mxfp4` does; what vanishes in decoding is counted too. Raises ValueError on shapes that do not fit.
    """
    check_blocks(weight.shape, out)
    wide = scratch.array("mxfp4.wide_fp8", weight.shape, np.float32)
    decoded, quantised = Tally(), Tally()
    fp8_to_f32(weight, scale, block, wide, scratch, decoded)
    f32_to_mxfp4(wide, out, scratch, quantised)
    quantised.underflow += decoded.underflow
    tally.add(quantised)


def f32_to_mxfp4(values: ArrayF32, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise float32 [R, C] to MXFP4 blocks [R, C/32*17]; the scale is chosen as the module says.

    Counts: ``changed`` the finite elements that were rounded, ``overflow`` the infinities, which become
    6, ``nan`` the NaNs. A NaN makes its whole block NaN, for that is all the format can say, and the
    numbers lost with it are counted as changed. Raises ValueError on shapes that do not fit.
    """
    check_blocks(values.shape, out)
    if values.size == 0:
        return
    require_subnormals()
    groups = values.reshape(-1, GROUP)
    work = scratch.array("mxfp4.work", groups.shape, np.float32)
    spare = scratch.array("mxfp4.spare", groups.shape, np.float32)
    np.abs(groups, out=work)
    amax = group_max(work, spare)
    scale = smallest_scale(amax)
    # Dividing by a scale of at most 1 loses nothing, and above 2^-126 nothing special happens.
    if not np.isfinite(amax).all() or scale.max() > BIAS or (amax[scale == 1] > 0).any():
        _quantise_plainly(groups, out, tally)
        return
    np.abs(groups, out=work)
    np.multiply(work, F32_OF_BYTE[_INVERSE_BYTE - scale][:, None], out=work)
    # A code is k + 2e for a magnitude in [2^e, 2^(e+1)), e = 0 below 1, where k counts steps of
    # 2^(e-1). Adding 2^(22+e), whose last place is such a step, makes the processor round to nearest even
    # and leaves k in the lowest bits.
    magic = scratch.array("mxfp4.magic", groups.shape, np.uint32)
    np.bitwise_and(work.view(np.uint32), _EXPONENT_MASK, out=magic)
    np.maximum(magic, _ONE_BITS, out=magic)
    np.add(magic, _MAGIC_LIFT, out=magic)
    np.add(work, magic.view(np.float32), out=spare)
    codes = scratch.array("mxfp4.codes", groups.shape, np.uint8)
    twice_e = scratch.array("mxfp4.twice_e", groups.shape, np.uint8)
    np.copyto(codes, spare.view(np.uint32), casting="unsafe")
    np.bitwise_and(codes, 7, out=codes)
    np.subtract(spare, magic.view(np.float32), out=spare)
    inexact = scratch.array("mxfp4.inexact", groups.shape, np.bool_)
    np.not_equal(spare, work, out=inexact)
    np.right_shift(magic, _TWICE_E_SHIFT, out=twice_e, casting="unsafe")
    np.bitwise_and(twice_e, _TWICE_E_MASK, out=twice_e)
    np.subtract(twice_e, _TWICE_E_BASE, out=twice_e)
    np.add(codes, twice_e, out=codes)
    _prefer_coarser(codes, scale, inexact, amax)
    np.right_shift(groups.view(np.uint32), _SIGN_TO_CODE, out=twice_e, casting="unsafe")
    np.bitwise_and(twice_e, _CODE_SIGN, out=twice_e)
    np.bitwise_or(codes, twice_e, out=codes)
    tally.changed += int(np.count_nonzero(inexact))
    join_blocks(codes, scale, out)


# 2^(127 - e) as an e8m0 byte is 254 - e.
_INVERSE_BYTE = np.uint8(2 * BIAS)
_EXPONENT_MASK = np.uint32(0x7F80_0000)
_ONE_BITS = np.uint32(BIAS << F32_MANTISSA_BITS)
_MAGIC_LIFT = np.uint32((F32_MANTISSA_BITS - 1) << F32_MANTISSA_BITS)
_TWICE_E_SHIFT = np.uint32(F32_MANTISSA_BITS - 1)
_TWICE_E_MASK = np.uint8(0xFE)
_TWICE_E_BASE = np.uint8(2 * (BIAS + F32_MANTISSA_BITS - 1) & 0xFF)
_SIGN_TO_CODE = np.uint32(28)
_CODE_SIGN = np.uint8(8)


def _prefer_coarser(codes: ArrayU8, scale: ArrayU8, inexact: npt.NDArray[np.bool_], amax: ArrayF32) -> None:
    """Move the exact blocks with a 6, and no code that twice the scale lacks, to twice the scale."""
    # Only amax = 1.5 * 2^k is a 6.
    candidates = np.flatnonzero((amax.view(np.uint32) & _MANTISSA_MASK) == _MANTISSA_OF_6)
    coarse, allowed = _coarser_codes()
    chosen = codes[candidates]
    keep = allowed[chosen].all(axis=1)
    keep &= ~inexact[candidates].any(axis=1)
    moved = candidates[keep]
    codes[moved] = coarse[chosen[keep]]
    scale[moved] += 1


def _quantise_plainly(groups: ArrayF32, out: ArrayU8, tally: Tally) -> None:
    """Quantise float32 [blocks, 32] of any kind: NaN, infinities, the smallest and the largest scales."""
    nan: npt.NDArray[np.bool_] = np.isnan(groups)
    nan_blocks: npt.NDArray[np.bool_] = np.any(nan, axis=1)
    x = np.where(nan_blocks[:, None], np.float32(0), groups)
    amax = np.abs(x).max(axis=1)
    scale = smallest_scale(amax)
    codes, exact = _encode(x, scale)
    # Values below 2^-127 of a small block need the last scale of all.
    finer = (scale == 1) & ~exact.all(axis=1) & (amax <= E2M1_MAX * 2.0**-BIAS)
    if finer.any():
        scale[finer] = 0
        codes[finer], exact[finer] = _encode(x[finer], scale[finer])
    signs = codes & _CODE_SIGN
    codes &= np.uint8(7)
    settled = np.where(scale == 0, np.float32(0), amax)  # 2^-127 was needed: no other scale holds the block
    _prefer_coarser(codes, scale, ~exact, settled)
    codes |= signs
    infinite = np.isinf(x)
    tally.nan += int(np.count_nonzero(nan))
    tally.overflow += int(np.count_nonzero(infinite))
    tally.changed += int(np.count_nonzero(~exact & ~infinite))
    if nan_blocks.any():
        scale[nan_blocks] = NAN_BYTE
        codes[nan_blocks] = 0
        tally.changed += int(np.count_nonzero(~nan[nan_blocks]))
    join_blocks(codes, scale, out)


def bf16_to_mxfp4(values: ArrayU16, out: ArrayU8, scratch: Scratch, tally: Tally) -> None:
    """Quantise bfloat16 bits [R, C] to MXFP4 blocks [R, C/32*17]; see `f32_to_mxfp4`."""
    wide = scratch.array("mxfp4.wide", values.shape, np.float32)
    bf16_to_f32(values, wide, scratch, Tally())  # the second step counts the NaNs
    f32_to_mxfp4(wide, out, scratch, tally)


def mxfp4_to_f32(blocks: ArrayU8, out: ArrayF32, scratch: Scratch, tally: Tally) -> None:
    """Decode MXFP4 blocks [R, C/32*17] to float32 [R, C]; exact up to 2^125, infinite above the range.

    Raises ValueError on shapes that do not fit.
    """
    if out.shape != (blocks.shape[0], blocks.shape[1] // BLOCK_BYTES * GROUP) or blocks.shape[1] % BLOCK_BYTES:
        raise ValueError(f"MXFP4 blocks of shape {blocks.shape} do not fill an output of {out.shape}")
    flat = blocks.reshape(-1, BLOCK_BYTES)
    scale, pairs = flat[:, 0], flat[:, 1:]
    target = out.reshape(-1, GROUP)
    np.take(VALUES, pairs & np.uint8(0xF), out=target[:, : GROUP // 2], mode="clip")
    np.take(VALUES, pairs >> np.uint8(4), out=target[:, GROUP // 2 :], mode="clip")
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(target, F32_OF_BYTE[scale][:, None], out=target)
    nan = scale == NAN_BYTE
    if nan.any():
        tally.nan += GROUP * int(np.count_nonzero(nan))
        target.view(np.uint32)[nan] = F32_NAN_BITS
    tally.overflow += int(np.count_nonzero(np.isinf(target)))


_MANTISSA_MASK = np.uint32(0x7F_FFFF)
_MANTISSA_OF_6 = np.uint32(0x40_0000)  # 1.5 * 2^2


def smallest_scale(amax: ArrayF32) -> ArrayU8:
    """Byte of the smallest power of two with amax/scale <= 6, between 2^-126 and 2^127."""
    bits = amax.view(np.uint32)
    exponent = (bits >> np.uint32(F32_MANTISSA_BITS)).astype(np.int32)
    # 6 = 1.5 * 2^2: amax = 1.m * 2^k needs 2^(k-2), or 2^(k-1) once 1.m passes 1.5.
    over = (bits & _MANTISSA_MASK) > _MANTISSA_OF_6
    byte: ArrayU8 = np.clip(exponent - 2 + over, 1, NAN_BYTE - 1).astype(np.uint8)
    return byte


def _encode(x: Array, scale: ArrayU8) -> tuple[ArrayU8, npt.NDArray[np.bool_]]:
    """Codes of x [blocks, 32] at the given scales, and where they hold x exactly."""
    power: Array = F32_OF_BYTE[scale][:, None]
    # Dividing by a power of two is exact, or far too small to reach the first midpoint.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        quotient: Array = x / power
        codes = f32_to_e2m1(quotient)
        return codes, VALUES[codes] * power == x


@cache
def _coarser_codes() -> tuple[ArrayU8, npt.NDArray[np.bool_]]:
    """Each code's code at twice the scale, and whether it has one."""
    half = f32_to_e2m1((VALUES / 2).astype(np.float32))
    return half, VALUES[half] * 2 == VALUES
