"""The operations of a plan, carried out on one tile: which array goes to which codec.

What a codec does is in ``formats/``. An operation takes the operands' tiles and fills the output tile, bytes
[rows, row_bytes].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InventoryError, LossyError
from ..formats.backend import Codecs
from ..formats.base import GROUP, BlockwiseCodec, PlainCodec, ScaledCodec, Scratch, Tally
from ..formats.e8m0 import e8m0_to_f32, power_of_two_bytes, spread_scales
from ..formats.fp8_recovery import bf16_to_fp8_exactly
from ..formats.ggml import Quantiser
from ..formats.ggml_decode import dequantise
from ..formats.int4 import int4_to_float, unpack_zeros
from ..formats.mlx_affine import bf16_to_affine8
from ..formats.nvfp4 import largest_scale, second_scale
from ..plan import (
    ALL_ROWS,
    AllEqual,
    Beside,
    Bf16ToFp8Codes,
    Bf16ToFp8Scales,
    Block,
    Columns,
    Constant,
    Convert,
    Copy,
    Fill,
    Fp4ToFp8Codes,
    Fp4ToFp8Scales,
    Fp4ToNvfp4Codes,
    Fp4ToNvfp4Scales,
    Fp4ToNvfp4Second,
    Join,
    Keep,
    Operand,
    Operation,
    Quantise,
    Segment,
    Source,
    SpreadScales,
    SquaredWeights,
    Sums,
    Target,
    ToAffine,
    ToFp4Codes,
    ToFp4Scales,
    ToFp8Codes,
    ToFp8Scales,
)

# Source plus output bytes of a tile: small enough for the caches, large enough that two writers seldom wait
# for each other at the one file that both write (benchmarks/hf_to_gguf.py: 15 % faster than 512 KiB).
TILE_BYTES = 2**20
COPY_TILE_BYTES = 2**20

FP4_PER_BYTE = 2

Bytes = NDArray[np.uint8]
Inputs = Sequence[NDArray[Any]]

# The numpy dtype of an output's elements; blocks are bytes.
DTYPES: Mapping[Target, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "i32": np.int32,
    "q8_0": np.uint8,
    "mxfp4": np.uint8,
    "nvfp4": np.uint8,
}

_Scaled: TypeAlias = Callable[[Codecs], ScaledCodec]
_Plain: TypeAlias = Callable[[Codecs], PlainCodec]
# Operations that may decode their operands to float32 first.
_Decoded: TypeAlias = Convert | Quantise | ToFp4Codes | ToFp4Scales | ToAffine

SCALED: Mapping[tuple[Source, Target], _Scaled] = {
    ("fp4", "f32"): lambda codecs: codecs.fp4_to_f32,
    ("fp4", "bf16"): lambda codecs: codecs.fp4_to_bf16,
    ("fp4", "f16"): lambda codecs: codecs.fp4_to_f16,
    ("fp4", "q8_0"): lambda codecs: codecs.fp4_to_q8_0,
    ("nvfp4", "f32"): lambda codecs: codecs.fp4_to_f32,
    ("nvfp4", "bf16"): lambda codecs: codecs.fp4_to_bf16,
    ("nvfp4", "f16"): lambda codecs: codecs.fp4_to_f16,
    ("fp8", "f32"): lambda codecs: codecs.fp8_to_f32,
    ("fp8", "bf16"): lambda codecs: codecs.fp8_to_bf16,
    ("fp8", "f16"): lambda codecs: codecs.fp8_to_f16,
    ("fp8", "q8_0"): lambda codecs: codecs.fp8_to_q8_0,
    ("fp8", "mxfp4"): lambda codecs: codecs.fp8_to_mxfp4,
}
PLAIN: Mapping[tuple[Source, Target], _Plain] = {
    ("bf16", "f32"): lambda codecs: codecs.bf16_to_f32,
    ("bf16", "f16"): lambda codecs: codecs.bf16_to_f16,
    ("bf16", "q8_0"): lambda codecs: codecs.bf16_to_q8_0,
    ("bf16", "mxfp4"): lambda codecs: codecs.bf16_to_mxfp4,
    ("f16", "f32"): lambda codecs: codecs.f16_to_f32,
    ("f16", "bf16"): lambda codecs: codecs.f16_to_bf16,
    ("f32", "bf16"): lambda codecs: codecs.f32_to_bf16,
    ("f32", "f16"): lambda codecs: codecs.f32_to_f16,
    ("f32", "q8_0"): lambda codecs: codecs.f32_to_q8_0,
    ("f32", "mxfp4"): lambda codecs: codecs.f32_to_mxfp4,
    ("i64", "i32"): lambda codecs: codecs.i64_to_i32,
}
# The safetensors dtypes of sources that can hold infinities.
FLOATS_OF_FILES: Mapping[Source, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
# Blocks of the source that are those of the output, moved.
MOVED: Mapping[tuple[Source, Target], Callable[[Codecs], BlockwiseCodec]] = {
    ("fp4", "mxfp4"): lambda codecs: codecs.fp4_to_mxfp4,
    ("nvfp4", "nvfp4"): lambda codecs: codecs.nvfp4_to_ggml,
}
# Conversions in two steps, decoding to float32 and quantising that.
BY_WAY_OF_F32: frozenset[tuple[Source, Target]] = frozenset(
    {(source, target) for source in ("f16", "nvfp4", "int4") for target in ("q8_0", "mxfp4")}
)
# By a codec that takes zero points, too.
OF_INT4: frozenset[tuple[Source, Target]] = frozenset({("int4", "f32"), ("int4", "bf16"), ("int4", "f16")})
# Two elements a byte, and scales.
FOUR_BIT: frozenset[Source] = frozenset({"fp4", "nvfp4", "int4"})


def make_tile(operation: Operation, codecs: Codecs, inputs: Inputs, out: Bytes, scratch: Scratch, tally: Tally) -> None:
    """Fill the output tile ``out`` [rows, row_bytes] by one operation on its operands' tiles, and count.

    Behind them stand the weights of the columns (float32 [columns]) that a ``Quantise`` with importance goes by.

    Raises:
        InventoryError: ``AllEqual`` and they are not.
        LossyError: ``Bf16ToFp8Codes`` or its scales, and no codes and scales make these values; ``SpreadScales``, and
            one is no power of two.
    """
    match operation:
        case Convert():
            _convert(operation, codecs, inputs, out, scratch, tally)
        case Quantise():
            _quantise(operation, codecs, inputs, out, scratch, tally)
        case Keep(holds):
            out[...] = inputs[0].view(np.uint8)
            _count(codecs, holds, out, scratch, tally)
        case Beside():
            _beside(operation, codecs, inputs, out, scratch, tally)
        case Columns(first, last, holds):
            out[...] = inputs[0][:, first:last]
            _count(codecs, holds, out, scratch, tally)
        case Join(holds):
            np.concatenate(inputs, axis=1, out=out)
            # Operands may hold different things, as the codes and scales of a table's rows do.
            for kind, rows in zip(holds, inputs, strict=bool(holds)):
                _count(codecs, kind, rows, scratch, tally)
        case AllEqual(holds):
            _all_equal(inputs, out)
            _count(codecs, holds, out, scratch, tally)
        case Fill(byte):
            out[...] = byte
        case Constant(content):
            out[...] = np.frombuffer(content, np.uint8)
        case Fp4ToFp8Codes(side):
            _fp4_to_fp8_codes(codecs, inputs, out, side, scratch, tally)
        case Fp4ToFp8Scales(groups, side):
            codecs.fp4_to_fp8_scales(inputs[0].reshape(-1, groups), out, scratch, tally, side)
        case Fp4ToNvfp4Codes():
            codecs.fp4_to_nvfp4(inputs[0], inputs[1], largest_scale(inputs[2:]), out, scratch, tally)
        case Fp4ToNvfp4Scales():
            codecs.fp4_to_nvfp4_scales(inputs[0], largest_scale(inputs[1:]), out, scratch, tally)
        case Fp4ToNvfp4Second():
            out[...] = second_scale(largest_scale(inputs)).view(np.uint8)
        case Bf16ToFp8Codes(block):
            out[...] = bf16_to_fp8_exactly(inputs[0].reshape(out.shape), block)[0]
        case Bf16ToFp8Scales(columns, in_f32, block):
            scale = bf16_to_fp8_exactly(inputs[0].reshape(-1, columns), block)[1]
            out[...] = e8m0_to_f32(scale).view(np.uint8) if in_f32 else scale
        case SpreadScales(times):
            _spread_scales(inputs[0], times, out, scratch)
            _count(codecs, "F8_E8M0", out, scratch, tally)
        case ToFp8Codes(source, block):
            values = _floats(source, codecs, inputs[0].reshape(out.shape), scratch)
            quantise = codecs.bf16_to_fp8 if source == "bf16" else codecs.f32_to_fp8
            quantise(values, block, out, scratch, tally)
        case ToFp8Scales(source, columns, block):
            values = _floats(source, codecs, inputs[0].reshape(-1, columns), scratch)
            quantise = codecs.bf16_to_fp8_scales if source == "bf16" else codecs.f32_to_fp8_scales
            quantise(values, block, out, scratch, tally)
        case ToFp4Codes("bf16"):
            codecs.bf16_to_fp4(inputs[0], out, scratch, tally)
        case ToFp4Scales("bf16"):
            codecs.bf16_to_fp4_scales(inputs[0], out, scratch, tally)
        case ToFp4Codes():
            codecs.f32_to_fp4(as_f32(operation, codecs, inputs, scratch, Tally()), out, scratch, tally)
        case ToFp4Scales():
            codecs.f32_to_fp4_scales(as_f32(operation, codecs, inputs, scratch, Tally()), out, scratch, tally)
        case ToAffine():
            halves = _bf16(operation, codecs, inputs, scratch)
            made = out if operation.part == "codes" else out.view(np.uint16)
            bf16_to_affine8(halves, operation.group, operation.part, made, scratch, tally)
        case Copy():
            raise TypeError("a copy has no tiles: the worker moves its bytes")
        case _:
            _never(operation)


def _bf16(operation: ToAffine, codecs: Codecs, inputs: Inputs, scratch: Scratch) -> NDArray[np.uint16]:
    """Return elements as bfloat16 bits [rows, columns].

    Raises:
        LossyError: one is NaN or infinite.
    """
    source, values = operation.source, inputs[0]
    bits: NDArray[np.uint16] = scratch.array("bf16", values.shape, np.uint16)
    if source == "bf16":
        np.copyto(bits, values)
    elif (source, "bf16") in SCALED:
        SCALED[source, "bf16"](codecs)(values, inputs[1], _block(operation), bits, scratch, Tally())
    else:
        PLAIN[source, "bf16"](codecs)(values, bits, scratch, Tally())
    magnitudes = scratch.array("magnitudes", (bits.nbytes,), np.uint8)
    if codecs.count_not_finite("BF16", bits.view(np.uint8).reshape(-1), magnitudes):
        raise LossyError(
            "a NaN or infinite value cannot be quantised",
            expected="finite values",
            hint="run dsv4convert check on the source, which names the tensors",
        )
    return bits


def _count(codecs: Codecs, holds: str, rows: Bytes, scratch: Scratch, tally: Tally) -> None:
    """Count the elements of moved rows that are not finite."""
    magnitudes = scratch.array("magnitudes", (rows.size,), np.uint8)
    tally.nan += codecs.count_not_finite(holds, rows.reshape(-1), magnitudes)


def _floats(source: Source, codecs: Codecs, values: NDArray[Any], scratch: Scratch) -> NDArray[Any]:
    """Return floats without scales in a type that quantisers take, F32 or BF16, in their shape.

    What is not finite is for the caller to refuse.
    """
    if source in ("f32", "bf16"):
        return values
    wide: NDArray[np.float32] = scratch.array("floats", values.shape, np.float32)
    PLAIN[source, "f32"](codecs)(values, wide, scratch, Tally())
    return wide


def divides_blocks(operation: Operation) -> bool:
    """Return whether an operation takes any rows of one scale block, with that block's scales.

    Tiles of the others are whole blocks.
    """
    if isinstance(operation, Convert):
        return operation.source == "fp8"
    if isinstance(operation, Quantise) and operation.source == "int4":
        return False  # a word of zero points is for eight rows
    if isinstance(operation, ToAffine):
        return True
    return isinstance(operation, Beside | Quantise | Fp4ToNvfp4Codes | Fp4ToNvfp4Scales)


def tile_operands(segment: Segment) -> tuple[Operand, ...]:
    """Return the operands that a tile reads rows of; those of the weights of columns stand behind them."""
    match segment.operation:
        case Quantise(importance=Sums()):
            return segment.operands[:-1]
        case Quantise(importance=SquaredWeights()):
            return segment.operands[: len(segment.operands) // 2]
    return segment.operands


def rows_per_tile(segment: Segment, tile_bytes: int) -> int:
    """Return how many output rows a tile takes: whole scale blocks, or a part of one that divides it evenly.

    Rows of 16,384 elements make a block of 128 rows larger than a cache; all rows of a part share the
    block's scales, which are read again for each part. Operations that need whole blocks get them.
    """
    alignment = math.lcm(*(operand.rows_per for operand in segment.operands if operand.rows_per < ALL_ROWS))
    row_cost = segment.row_bytes + sum(operand.row_bytes / operand.rows_per for operand in segment.operands)
    fitting = int(tile_bytes / row_cost)
    if fitting >= alignment:
        return fitting // alignment * alignment
    if not divides_blocks(segment.operation):
        return alignment
    part = alignment
    while part > fitting and part % 2 == 0:
        part //= 2
    return part


def _never(operation: NoReturn) -> NoReturn:
    raise TypeError(f"{operation!r} is no operation")


def _convert(operation: Convert, codecs: Codecs, inputs: Inputs, out: Bytes, scratch: Scratch, tally: Tally) -> None:
    kind = operation.source, operation.target
    made = out.view(DTYPES[operation.target])
    counted = tally.nan
    if kind in OF_INT4:
        int4_to_float(inputs[0], inputs[1], _zeros(inputs), _block(operation), made, scratch, tally)
    elif kind in SCALED:
        SCALED[kind](codecs)(inputs[0], inputs[1], _block(operation), made, scratch, tally)
    elif kind in PLAIN:
        PLAIN[kind](codecs)(inputs[0], made, scratch, tally)
    elif kind in MOVED:
        MOVED[kind](codecs)(inputs[0], inputs[1], made, scratch, tally)
    else:
        _by_way_of_f32(operation, codecs, inputs, made, scratch, tally)
    held = FLOATS_OF_FILES.get(operation.source)
    if held is not None:
        # Codecs count NaN, which they write in one form; infinities stay what they are, and no model has them either.
        tally.nan = counted
        _count(codecs, held, inputs[0].view(np.uint8), scratch, tally)


def _zeros(inputs: Inputs) -> NDArray[Any] | None:
    """Return the zero points of INT4, None where it has none; what follows may be weights of columns."""
    if len(inputs) < 3 or inputs[2].dtype != np.int32:
        return None
    zeros: NDArray[np.uint8] = unpack_zeros(inputs[2], len(inputs[0]))
    return zeros


def _block(operation: _Decoded) -> Block:
    if operation.block is None:
        raise TypeError(f"{operation!r} has no scales")
    return operation.block


def _by_way_of_f32(
    operation: Convert, codecs: Codecs, inputs: Inputs, out: Bytes, scratch: Scratch, tally: Tally
) -> None:
    decoding, quantising = Tally(), Tally()
    wide = as_f32(operation, codecs, inputs, scratch, decoding)
    PLAIN["f32", operation.target](codecs)(wide, out, scratch, quantising)
    # What is no number or infinite after the first step is counted by the second; what vanished is not.
    quantising.underflow = max(quantising.underflow, decoding.underflow)
    tally.add(quantising)


def as_f32(
    operation: _Decoded,
    codecs: Codecs,
    inputs: Inputs,
    scratch: Scratch,
    tally: Tally,
) -> NDArray[np.float32]:
    """Return the source's elements of a tile as float32 [rows, columns], and count what decoding counts."""
    source = operation.source
    if source == "f32":
        return inputs[0]
    columns = inputs[0].shape[1] * (FP4_PER_BYTE if source in FOUR_BIT else 1)
    wide: NDArray[np.float32] = scratch.array("by way of f32", (len(inputs[0]), columns), np.float32)
    if source == "int4":
        int4_to_float(inputs[0], inputs[1], _zeros(inputs), _block(operation), wide, scratch, tally)
    elif (source, "f32") in SCALED:
        SCALED[source, "f32"](codecs)(inputs[0], inputs[1], _block(operation), wide, scratch, tally)
    else:
        PLAIN[source, "f32"](codecs)(inputs[0], wide, scratch, tally)
    return wide


# Elements of which all are smaller have scales that float16 holds, in all of ggml's types.
SCALE_MAY_OVERFLOW = 2.0**15


def squares(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sum over rows of the squares of each column, in float64."""
    total: NDArray[np.float64] = np.einsum("rc,rc->c", values, values, dtype=np.float64)
    return total


def _quantise(operation: Quantise, codecs: Codecs, inputs: Inputs, out: Bytes, scratch: Scratch, tally: Tally) -> None:
    decoding = Tally()
    wide = as_f32(operation, codecs, inputs, scratch, decoding)
    tally.underflow += decoding.underflow  # which way every other element is rounded, quantising decides
    magnitudes = scratch.array("magnitudes", (wide.nbytes,), np.uint8)
    if codecs.count_not_finite("F32", wide.reshape(-1).view(np.uint8), magnitudes):
        row, column = np.argwhere(~np.isfinite(wide))[0]
        raise LossyError(
            f"a NaN or infinite value cannot be stored as {operation.target}",
            expected="finite values",
            got=f"{wide[row, column]} in column {column}",
            hint="pass --strict to find such values before a conversion, or choose a --tensor-type that keeps them",
        )
    weights = None if operation.importance is None else inputs[-1]
    loaded_quantiser(operation.library).quantise(operation.target, wide, out, weights)
    if np.abs(wide).max(initial=0) >= SCALE_MAY_OVERFLOW:
        tally.overflow += int(np.count_nonzero(~np.isfinite(dequantise(operation.target, out))))


@cache
def loaded_quantiser(library: str) -> Quantiser:
    """Return ggml's quantisers of a library, loaded once.

    Raises:
        DeviceError: it cannot be used.
    """
    return Quantiser(library)


def _beside(operation: Beside, codecs: Codecs, inputs: Inputs, out: Bytes, scratch: Scratch, tally: Tally) -> None:
    half = len(inputs) // 2
    for part, operands, columns in (
        (operation.left, inputs[:half], slice(None, operation.left_bytes)),
        (operation.right, inputs[half:], slice(operation.left_bytes, None)),
    ):
        made = scratch.array(f"beside {columns.start}", out[:, columns].shape, np.uint8)
        make_tile(part, codecs, operands, made, scratch, tally)
        out[:, columns] = made


def _all_equal(inputs: Inputs, out: Bytes) -> None:
    for number, other in enumerate(inputs[1:], start=1):
        if not np.array_equal(inputs[0], other):
            raise InventoryError(
                f"ranks 0 and {number} hold different bytes of a tensor that every rank has whole",
                hint="are shards of two conversions mixed?",
            )
    out[...] = inputs[0]


def _spread_scales(scale: NDArray[Any], times: Block, out: Bytes, scratch: Scratch) -> None:
    codes = power_of_two_bytes(scale, scratch)
    if codes is None:
        raise LossyError(
            "a scale that is no power of two cannot be stored as E8M0",
            expected="a power of two from 2^-127 to 2^127",
            hint="pass --dense bf16, which decodes such weights",
        )
    spread_scales(codes, times, out)


def _fp4_to_fp8_codes(codecs: Codecs, inputs: Inputs, out: Bytes, side: int, scratch: Scratch, tally: Tally) -> None:
    """An operand row holds the FP4 scales of all rows of a tile; the FP8 scales are another output."""
    rows, columns = out.shape
    scale = inputs[1].reshape(-1, columns // GROUP)
    unused = scratch.array("fp8 scales", (-(-rows // side), -(-columns // side)), np.uint8)
    codecs.fp4_to_fp8(inputs[0], scale, out, unused, scratch, tally, side)
