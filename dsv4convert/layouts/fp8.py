"""Segments that make FP8 in 128x128 blocks: codes and scales, each an output of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.weights import FP4_BLOCK, Encoding, Weight
from ..errors import InventoryError
from ..plan import Operand, Segment

# Rows and columns that share a scale.
FP8_BLOCK = 128

FP4_TO_FP8 = "fp4_to_fp8"
FP4_TO_FP8_SCALES = "fp4_to_fp8_scales"
BF16_TO_FP8 = "bf16_to_fp8"
BF16_TO_FP8_SCALES = "bf16_to_fp8_scales"

BF16_BYTES = 2
SCALE_BYTES = {"F8_E8M0": 1, "F32": 4}


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of ``shape``."""
    rows, columns = shape
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def row_blocks(rows: int, height: int = FP8_BLOCK) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, rows, height of a block): all whole blocks, then the ragged one."""
    whole = rows // height * height
    if whole:
        yield 0, whole, height
    if rows > whole:
        yield whole, rows - whole, rows - whole


def fp4_to_fp8_segments(weight: Weight) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the segments of the e4m3 codes [R, C] and of the e8m0 scales that a packed FP4 weight becomes.

    An operand row that holds the scales of a whole block of rows keeps the tiles to whole blocks.

    Raises:
        InventoryError: the weight is not packed FP4.
    """
    scale = weight.scale
    if scale is None or weight.block != (1, FP4_BLOCK):
        raise InventoryError(
            f"tensor {weight.name}: not packed FP4", where=weight.stored.file, got=weight.encoding.value
        )
    rows, columns = weight.shape
    packed, groups = weight.stored.nbytes // rows, columns // FP4_BLOCK
    codes: list[Segment] = []
    scales: list[Segment] = []
    for first, count, tall in row_blocks(rows):
        start = scale.offset + first * groups
        codes.append(
            Segment(
                FP4_TO_FP8,
                (
                    Operand(weight.stored.file, weight.stored.offset + first * packed, packed, 1, "u1"),
                    Operand(scale.file, start, tall * groups, tall, "u1"),
                ),
                count,
                columns,
            )
        )
        scales.append(
            Segment(
                FP4_TO_FP8_SCALES,
                (Operand(scale.file, start, tall * groups, 1, "u1"),),
                count // tall,
                fp8_scale_shape(weight.shape)[1],
                (groups,),
            )
        )
    return tuple(codes), tuple(scales)


def bf16_to_fp8_segments(
    weight: Weight, block: tuple[int, int], scale_dtype: str
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the segments of the e4m3 codes and of the scales (F8_E8M0 or F32) that make a BF16 weight exactly.

    Whether there are any shows only when the bytes are read: the codecs raise LossyError where not.

    Raises:
        InventoryError: the weight is not BF16.
    """
    if weight.encoding is not Encoding.BF16:
        raise InventoryError(f"tensor {weight.name}: not BF16", where=weight.stored.file, got=weight.encoding.value)
    rows, columns = weight.shape
    row_bytes = columns * BF16_BYTES
    scales_per_row = -(-columns // block[1])
    codes: list[Segment] = []
    scales: list[Segment] = []
    for first, count, tall in row_blocks(rows, block[0]):
        start = weight.stored.offset + first * row_bytes
        operand = Operand(weight.stored.file, start, tall * row_bytes, tall, "<u2")
        codes.append(Segment(BF16_TO_FP8, (operand,), count, columns, block))
        scales.append(
            Segment(
                BF16_TO_FP8_SCALES,
                (operand._replace(rows_per=1),),
                count // tall,
                scales_per_row * SCALE_BYTES[scale_dtype],
                (columns, scale_dtype == "F32", block),
            )
        )
    return tuple(codes), tuple(scales)
