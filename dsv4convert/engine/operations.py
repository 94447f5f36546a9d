"""The engine's codec table: how each codec of a plan is called on one tile.

An entry takes the codec backend, the operands' tiles, the output tile as bytes [rows, row_bytes], and
the segment's args. What it means is in ``formats/``; here is only which array goes where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InventoryError
from ..formats.backend import Codecs
from ..formats.base import GROUP, Scratch, Tally
from ..formats.e2m1 import FP8_TILE
from ..formats.e8m0 import e8m0_to_f32
from ..formats.fp8_recovery import bf16_to_fp8_exactly
from ..plan import BESIDE, IDENTITY

Bytes = NDArray[np.uint8]
Inputs = Sequence[NDArray[Any]]
TileCodec = Callable[[Codecs, Inputs, Bytes, tuple[Any, ...], Scratch, Tally], None]

# args of the codecs with scales: (rows, columns) that share one scale.


def _scaled(function: str, dtype: Any) -> TileCodec:
    """Return the entry of a codec (weight, scale, block) -> elements of ``dtype``."""

    def run(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
        getattr(codecs, function)(inputs[0], inputs[1], args, out.view(dtype), scratch, tally)

    return run


def _unscaled(function: str, dtype: Any) -> TileCodec:
    """Return the entry of a codec (elements) -> elements of ``dtype``."""

    def run(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
        getattr(codecs, function)(inputs[0], out.view(dtype), scratch, tally)

    return run


def _by_way_of_f32(to_f32: str, from_f32: str) -> TileCodec:
    """Return the entry of a codec that decodes to float32 and quantises that."""

    def run(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
        weight, *scale = inputs
        wide = scratch.array("by way of f32", weight.shape, np.float32)
        decoding, quantising = Tally(), Tally()
        getattr(codecs, to_f32)(weight, *scale, *((args,) if scale else ()), wide, scratch, decoding)
        getattr(codecs, from_f32)(wide, out, scratch, quantising)
        # What is no number or infinite after the first step is counted by the second; what vanished is not.
        quantising.underflow = max(quantising.underflow, decoding.underflow)
        tally.add(quantising)

    return run


def _fp4_to_mxfp4(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    codecs.fp4_to_mxfp4(inputs[0], inputs[1], out, scratch, tally)


def _identity(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    out[...] = inputs[0].view(np.uint8)


def _beside(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
    """Put the rows of two codecs side by side; args: left bytes a row, then codec and args of each."""
    left_bytes, left, left_args, right, right_args = args
    half = len(inputs) // 2
    for codec, codec_args, part, columns in (
        (left, left_args, inputs[:half], slice(None, left_bytes)),
        (right, right_args, inputs[half:], slice(left_bytes, None)),
    ):
        made = scratch.array(f"beside {columns.start}", out[:, columns].shape, np.uint8)
        TILE_CODECS[codec](codecs, part, made, codec_args, scratch, tally)
        out[:, columns] = made


def _fp4_to_fp8(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    """An operand row holds the FP4 scales of all rows of a tile; the FP8 scales are another output."""
    rows, columns = out.shape
    scale = inputs[1].reshape(-1, columns // GROUP)
    unused = scratch.array("fp8 scales", (-(-rows // FP8_TILE), -(-columns // FP8_TILE)), np.uint8)
    codecs.fp4_to_fp8(inputs[0], scale, out, unused, scratch, tally)


def _fp4_to_fp8_scales(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    """An operand row holds the FP4 scales of all rows of a tile; args: scales of a row of the weight."""
    codecs.fp4_to_fp8_scales(inputs[0].reshape(-1, args[0]), out, scratch, tally)


def _columns(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
    """Take a range of bytes out of every row; args: its first byte and the one behind its last."""
    out[...] = inputs[0][:, args[0] : args[1]]


def _side_by_side(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    """Put the rows of all operands next to each other."""
    np.concatenate(inputs, axis=1, out=out)


def _alike(codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally) -> None:
    """Take the rows of the first operand, which all others must hold as well.

    Raises:
        InventoryError: one of them holds other bytes.
    """
    for number, other in enumerate(inputs[1:], start=1):
        if not np.array_equal(inputs[0], other):
            raise InventoryError(
                f"ranks 0 and {number} hold different bytes of a tensor that every rank has whole",
                hint="are shards of two conversions mixed?",
            )
    out[...] = inputs[0]


def _bf16_to_fp8(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    """Make FP8 codes; an operand row holds all rows of a block. args: the block.

    Raises:
        LossyError: no codes and scales make these values.
    """
    out[...] = bf16_to_fp8_exactly(inputs[0].reshape(out.shape), args)[0]


def _bf16_to_fp8_scales(
    codecs: Codecs, inputs: Inputs, out: Bytes, args: tuple[Any, ...], scratch: Scratch, tally: Tally
) -> None:
    """Make the scales of ``_bf16_to_fp8``; args: columns of the weight, whether as float32, the block.

    Raises:
        LossyError: no codes and scales make these values.
    """
    columns, as_f32, block = args
    scale = bf16_to_fp8_exactly(inputs[0].reshape(-1, columns), block)[1]
    out[...] = e8m0_to_f32(scale).view(np.uint8) if as_f32 else scale


F32, F16, BF16, I32, U8 = np.float32, np.float16, np.uint16, np.int32, np.uint8

TILE_CODECS: dict[str, TileCodec] = {
    IDENTITY: _identity,
    BESIDE: _beside,
    "columns": _columns,
    "side_by_side": _side_by_side,
    "alike": _alike,
    "fp4_to_mxfp4": _fp4_to_mxfp4,
    "fp4_to_f32": _scaled("fp4_to_f32", F32),
    "fp4_to_bf16": _scaled("fp4_to_bf16", BF16),
    "fp4_to_f16": _scaled("fp4_to_f16", F16),
    "fp4_to_q8_0": _scaled("fp4_to_q8_0", U8),
    "fp4_to_fp8": _fp4_to_fp8,
    "fp4_to_fp8_scales": _fp4_to_fp8_scales,
    "bf16_to_fp8": _bf16_to_fp8,
    "bf16_to_fp8_scales": _bf16_to_fp8_scales,
    "fp8_to_f32": _scaled("fp8_to_f32", F32),
    "fp8_to_bf16": _scaled("fp8_to_bf16", BF16),
    "fp8_to_f16": _scaled("fp8_to_f16", F16),
    "fp8_to_q8_0": _scaled("fp8_to_q8_0", U8),
    "fp8_to_mxfp4": _by_way_of_f32("fp8_to_f32", "f32_to_mxfp4"),
    "bf16_to_f32": _unscaled("bf16_to_f32", F32),
    "bf16_to_f16": _unscaled("bf16_to_f16", F16),
    "bf16_to_q8_0": _unscaled("bf16_to_q8_0", U8),
    "bf16_to_mxfp4": _unscaled("bf16_to_mxfp4", U8),
    "f16_to_f32": _unscaled("f16_to_f32", F32),
    "f16_to_bf16": _unscaled("f16_to_bf16", BF16),
    "f16_to_q8_0": _by_way_of_f32("f16_to_f32", "f32_to_q8_0"),
    "f16_to_mxfp4": _by_way_of_f32("f16_to_f32", "f32_to_mxfp4"),
    "f32_to_bf16": _unscaled("f32_to_bf16", BF16),
    "f32_to_f16": _unscaled("f32_to_f16", F16),
    "f32_to_q8_0": _unscaled("f32_to_q8_0", U8),
    "f32_to_mxfp4": _unscaled("f32_to_mxfp4", U8),
    "i64_to_i32": _unscaled("i64_to_i32", I32),
}

# Codecs that take any rows of one scale block, with that block's scales: their tiles need not be whole blocks.
WITHIN_BLOCK_CODECS = frozenset({BESIDE, *(name for name in TILE_CODECS if name.startswith("fp8_to_"))})
