"""Segments that make FP8 in 128x128 blocks: codes and scales, each an output of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.weights import FP4_BLOCK, Weight
from ..errors import InventoryError
from ..plan import Operand, Segment

# Rows and columns that share a scale.
FP8_BLOCK = 128

FP4_TO_FP8 = "fp4_to_fp8"
FP4_TO_FP8_SCALES = "fp4_to_fp8_scales"


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of ``shape``."""
    rows, columns = shape
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def row_blocks(rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, rows, height of a block): all whole blocks, then the ragged one."""
    whole = rows // FP8_BLOCK * FP8_BLOCK
    if whole:
        yield 0, whole, FP8_BLOCK
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
