"""What the Triton kernels share: element arithmetic, flat addressing, exact counting, and the launch.

Every program converts one flat tile, a few KiB, and every kernel has two parts. The quick part works on
16-byte vectors of a whole tile and assumes what every sound checkpoint fulfils: no NaN, and scales so
far from the ends of the exponent range that nothing is rounded. It only notes whether that held. Where
it did not, and for what is left at the end of the tensor, the program goes over its tile element by
element, exactly, and counts. So the counts cost nothing until there is something to count. (Programs
that stay and walk through many tiles were slower at every size, and one NaN cost one of them its walk.)

Floats are made from bits wherever they can be. The multiplications that remain are exact in the quick
part, and plain IEEE float32 or float64 (subnormals kept, no fused multiply-add) in the careful one.
"""

# Kernel bodies are Triton's language, not Python's: no types, and compile-time parameters in capitals.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Block, Tally


def _signed(bits: int) -> int:
    """Return the int32 with these 32 bits; Triton widens larger constants to 64 bits."""
    return bits - (1 << 32) if bits >> 31 else bits


F32_MANTISSA_BITS = tl.constexpr(23)
F32_OF_BYTE_0 = tl.constexpr(1 << 22)  # 2^-127, a subnormal
SIGN_AND_MANTISSA = tl.constexpr(_signed(0x807F_FFFF))
F32_NAN = tl.constexpr(0x7FC0_0000)
BF16_NAN = tl.constexpr(0x7FC0)
MAGNITUDE = tl.constexpr(0x7FFF_FFFF)
UPPER_HALF = tl.constexpr(_signed(0xFFFF_0000))
E8M0_NAN = tl.constexpr(255)

# A code in the top byte (e4m3) or nibble (e2m1) of an int32, shifted right with its sign, lands with its
# exponent and mantissa where float32 has them: s00000eeeemmm... is the code's value times 2^(7 - 127),
# s0000000eem... times 2^(1 - 127), subnormal codes included, because float32's subnormals continue the
# line in the same way.
E4M3_IN_F32 = tl.constexpr(_signed(0b1_0000_1111_111 << 20))
E4M3_SHIFT = tl.constexpr(4)
E4M3_SHIFT_OUT = tl.constexpr(20)
E4M3_LIFT = tl.constexpr(127 - 7)
E4M3_UNLIFT = tl.constexpr(2.0 ** (127 - 7))
E4M3_NAN = tl.constexpr(0x7F)
NAN_CARRY = tl.constexpr(_signed(0x8080_8080))
E2M1_IN_F32 = tl.constexpr(_signed(0b1_0000_0011_1 << 22))
E2M1_SHIFT = tl.constexpr(6)
E2M1_LIFT = tl.constexpr(127 - 1)
E2M1_UNLIFT = tl.constexpr(2.0 ** (127 - 1))

# Columns of the counters tensor, in the order of Tally's fields.
NAN = tl.constexpr(0)
OVERFLOW = tl.constexpr(1)
UNDERFLOW = tl.constexpr(2)
CHANGED = tl.constexpr(3)
COUNTERS = 4

# Elements that the careful part takes at a time: few on a GPU, where each costs registers, many in the
# interpreter, where each step costs time. Not the quick part's number of vectors: Triton gives index
# tensors of one shape one layout, and the quick part's scales would then travel through shared memory.
CAREFUL_ON_GPU = 256
CAREFUL_IN_INTERPRETER = 2048


@triton.jit
def e4m3_in_f32(top):
    """Return float32 value * 2^-E4M3_LIFT of the e4m3 code in the top byte of an int32; a NaN code as 480."""
    return ((top >> E4M3_SHIFT) & E4M3_IN_F32).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_in_f32(top):
    """Return float32 value * 2^-E2M1_LIFT of the e2m1 code in the top four bits of an int32."""
    return ((top >> E2M1_SHIFT) & E2M1_IN_F32).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent as float32 for int32 -126..127, from bits."""
    return ((exponent + 127) << F32_MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def scale_byte(scale, FLOAT_SCALE: tl.constexpr):
    """Return as int32 the e8m0 byte of a scale; of a float32 that has none, the byte of NaN."""
    if FLOAT_SCALE:
        bits = scale.to(tl.int32, bitcast=True)
        power = ((bits & SIGN_AND_MANTISSA) == 0) & (bits != 0)
        byte = tl.where(power, bits >> F32_MANTISSA_BITS, E8M0_NAN)
    else:
        byte = scale.to(tl.int32)
    return byte


@triton.jit
def scale_value(scale, FLOAT_SCALE: tl.constexpr):
    """Return the exact value of a scale as float32: 0x00 is the subnormal 2^-127, 0xFF is NaN."""
    if FLOAT_SCALE:
        value = scale
    else:
        byte = scale.to(tl.int32)
        bits = tl.where(byte == 0, F32_OF_BYTE_0, byte << F32_MANTISSA_BITS)
        value = tl.where(byte == E8M0_NAN, F32_NAN, bits).to(tl.float32, bitcast=True)
    return value


@triton.jit
def e4m3_value(code):
    """Return the exact value of e4m3 codes (int32) as float32."""
    value = e4m3_in_f32(code << 24) * E4M3_UNLIFT
    return tl.where((code & 0x7F) == E4M3_NAN, nan_like(value), value)


@triton.jit
def e2m1_value(code):
    """Return the exact value of e2m1 codes (int32) as float32."""
    return e2m1_in_f32(code << 28) * E2M1_UNLIFT


@triton.jit
def nan_like(value):
    """Return the one NaN in the shape of a float32 ``value``."""
    return (value.to(tl.int32, bitcast=True) * 0 + F32_NAN).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bf16(product):
    """Return bfloat16 bits (int32) of float64 values, rounded once, ties to even; a NaN is the one NaN.

    Rounding to float32 first would round twice. If that first rounding was inexact and gave an even
    float32, the odd neighbour on the side of the exact value is taken instead: no tie can then arise by
    accident, and the second rounding comes out as if it had been the only one.
    """
    near = product.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.int32, bitcast=True)
    outwards = (product > back) == (product > 0.0)
    step = tl.where(outwards, 1, -1)
    bits = tl.where((product != back) & ((bits & 1) == 0), bits + step, bits)
    magnitude = bits & MAGNITUDE
    rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    signed = rounded | ((bits >> 16) & 0x8000)
    return tl.where(product == product, signed, BF16_NAN)


@triton.jit
def count(counters, which, hits):
    """Add the number of true ``hits`` to a counter."""
    total = tl.sum(hits.to(tl.int32), axis=0)
    if total > 0:
        tl.atomic_add(counters + which, total.to(tl.int64))


@triton.jit
def count_rounding(counters, product, kept, smallest, live):
    """Count what storing float64 ``product`` as float32-valued ``kept`` did, as ``bf16.store_products`` does."""
    nan = product != product
    wide = kept.to(tl.float64)
    infinite = tl.abs(wide) == float("inf")
    inexact = (wide != product) & (product == product)
    tiny = tl.abs(product) < smallest
    count(counters, NAN, nan & live)
    count(counters, OVERFLOW, infinite & live)
    count(counters, UNDERFLOW, inexact & tiny & (wide == wide) & live)
    count(counters, CHANGED, inexact & (tl.abs(product) >= smallest) & (tl.abs(wide) < float("inf")) & live)


@triton.jit
def scale_of_elements(
    scale,
    element,
    live,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return the scale of each flat int64 element index of a matrix with ``COLUMNS`` columns."""
    row = element // COLUMNS
    column = element - row * COLUMNS
    scale_columns = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    return tl.load(scale + (row // BLOCK_ROWS) * scale_columns + column // BLOCK_COLUMNS, mask=live, other=1)


@triton.jit
def scale_of_vectors(
    scale,
    tile,
    TILE: tl.constexpr,
    PER_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return the scale of each of the ``TILE`` vectors, of ``PER_VECTOR`` elements, of a whole tile.

    Vectors may not straddle rows or scale blocks, and are fewer than 2^32. Division by these constants
    becomes a multiplication, cheapest when unsigned.
    """
    vectors_in_row: tl.constexpr = COLUMNS // PER_VECTOR
    vectors_in_block: tl.constexpr = (BLOCK_COLUMNS + PER_VECTOR - 1) // PER_VECTOR
    vector = tile.to(tl.uint32) * TILE + tl.arange(0, TILE).to(tl.uint32)
    if BLOCK_ROWS == 1 and COLUMNS % BLOCK_COLUMNS == 0:
        # The scales lie in the order of the elements, so rows do not matter.
        place = vector // vectors_in_block
    else:
        scale_columns: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        row = vector // vectors_in_row
        column = vector - row * vectors_in_row
        place = row // BLOCK_ROWS * scale_columns + column // vectors_in_block
    return tl.load(scale + place)


@triton.jit
def either(a, b):
    """Return a | b, to reduce with."""
    return a | b


# --- launch


def vector_ready(*tensors: Tensor) -> bool:
    """Return whether every tensor starts on a 16-byte boundary, as full-width loads and stores need."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def vectors_keep_to_scales(per_vector: int, rows: int, columns: int, block: Block) -> bool:
    """Return whether runs of ``per_vector`` elements straddle neither rows nor scale blocks, and number under 2^32."""
    whole = columns % per_vector == 0 and (block[1] % per_vector == 0 or block[1] >= columns)
    return whole and rows * columns // per_vector < 1 << 32


def check(tensor: Tensor, what: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor that a kernel would misread; the plan is wrong then, not the user's file.

    Raises ValueError.
    """
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{what}: expected contiguous {list(shape)} of {' or '.join(map(str, dtypes))}, "
            f"got {list(tensor.shape)} of {tensor.dtype}"
        )


def blocks_of(rows: int, columns: int, block: Block) -> tuple[int, int]:
    """Return the shape of the scales of a matrix."""
    return math.ceil(rows / block[0]), math.ceil(columns / block[1])


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one; under the interpreter tensors lie in host memory."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def careful(tensor: Tensor) -> int:
    """Return how many elements the careful part takes at a time."""
    return CAREFUL_ON_GPU if tensor.is_cuda else CAREFUL_IN_INTERPRETER


class DeviceTally:
    """Counts that stay on the device, so that a launch need not wait for them.

    Any codec of the Triton modules takes one in place of a ``Tally``; ``read`` waits and returns it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.counters = torch.zeros(COUNTERS, dtype=torch.int64, device=device)

    def read(self) -> Tally:
        """Wait for the device and return the counts so far."""
        return Tally(*(int(number) for number in self.counters.tolist()))


# What takes the counts of a launch.
AnyTally: TypeAlias = Tally | DeviceTally


class Counting:
    """Gives a launch its counters, and hands them to a host ``Tally`` afterwards if there is one."""

    def __init__(self, tally: AnyTally, device: torch.device) -> None:
        self._tally = tally
        self._on_device = tally if isinstance(tally, DeviceTally) else DeviceTally(device)
        self.counters = self._on_device.counters

    def __enter__(self) -> Tensor:
        return self.counters

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and isinstance(self._tally, Tally):
            self._tally.add(self._on_device.read())
