"""Segments that make FP8 in square blocks: codes and scales, each an output of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

from ..checkpoint.weights import FP4_BLOCK, Encoding, Weight
from ..containers.safetensors import Stored
from ..errors import InventoryError
from ..model.config import Version
from ..plan import (
    Bf16ToFp8Codes,
    Bf16ToFp8Scales,
    Fp4ToFp8Codes,
    Fp4ToFp8Scales,
    MadeSegments,
    Operand,
    Operation,
    Segment,
    ToFp4Codes,
    ToFp4Scales,
    ToFp8Codes,
    ToFp8Scales,
    text_of,
)
from .segments import SOURCES, operands, scale_operand

# Rows and columns that share a scale.
FP8_BLOCK = 128
FP8_BLOCKS = {Version.V4: FP8_BLOCK, Version.V41: 32}

CODES_PER_BYTE = 2
SCALE_BYTES = {"F8_E8M0": 1, "F32": 4}


@lru_cache(maxsize=64)
def fp8_scale_shape(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of ``shape`` in blocks of ``side`` both ways."""
    rows, columns = shape
    return -(-rows // side), -(-columns // side)


@lru_cache(maxsize=64)
def row_blocks(rows: int, height: int) -> tuple[tuple[int, int, int], ...]:
    """Return (first row, rows, height of a block): all whole blocks, then the ragged one."""
    ragged = rows % height
    whole = rows - ragged
    blocks = ((0, whole, height),) if whole else ()
    return (*blocks, (whole, ragged, ragged)) if ragged else blocks


class PackedFp4(NamedTuple):
    """A packed FP4 weight of ``shape`` where it lies, and the ``side`` of the blocks of the FP8 made from it."""

    file: Path
    offset: int
    scale: Stored
    shape: tuple[int, int]
    side: int


class _SegmentsOf(MadeSegments):
    """One segment for all whole blocks of rows, and one for a ragged block below them."""

    __slots__ = ("_operation", "_source")

    def __init__(self, source: PackedFp4, operation: Operation) -> None:
        self._source = source
        self._operation = operation

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the segments from others: the part, and where the weight and its scales lie."""
        file, offset, scale, shape, side = self._source
        weight = f"{text_of(self._operation)} {names[file]} {offset} {shape} {side}"
        return f"{weight} {names[scale.file]} {scale[1:]}\n".encode()

    def __len__(self) -> int:
        return len(row_blocks(self._source.shape[0], self._source.side))

    def _make(self, number: int) -> Segment:
        return self._of_block(*row_blocks(self._source.shape[0], self._source.side)[number])

    @property
    def operation(self) -> Operation:
        """Return the one operation."""
        return self._operation

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the weight's file, and that of its scales."""
        return self._source.file, self._source.scale.file

    @abstractmethod
    def _of_block(self, first: int, count: int, height: int) -> Segment:
        """Return the segment of ``count`` rows from ``first`` on, in blocks of ``height`` rows."""


class _CodeSegments(_SegmentsOf):
    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self._source.shape)

    def _of_block(self, first: int, count: int, height: int) -> Segment:
        source = self._source
        columns = source.shape[1]
        packed = columns // CODES_PER_BYTE
        weights = Operand(source.file, source.offset + first * packed, packed, 1, "u1")
        scales = scale_operand(source.scale, first, rows_per=height, rows_together=height)
        return Segment(self._operation, (weights, scales), count, columns)


class _ScaleSegments(_SegmentsOf):
    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return math.prod(fp8_scale_shape(self._source.shape, self._source.side))

    def _of_block(self, first: int, count: int, height: int) -> Segment:
        source = self._source
        scales = scale_operand(source.scale, first, rows_together=height)
        columns = fp8_scale_shape(source.shape, source.side)[1]
        return Segment(self._operation, (scales,), count // height, columns)


def fp4_to_fp8_segments(weight: Weight, side: int) -> tuple[Sequence[Segment], Sequence[Segment]]:
    """Return the segments of the e4m3 codes [R, C] and of the e8m0 scales that a packed FP4 weight becomes.

    ``side`` rows and columns share a scale. An operand row that holds the scales of a whole block of rows keeps the
    tiles to whole blocks.

    Raises:
        InventoryError: the weight is not packed FP4.
    """
    scale = weight.scale
    if scale is None or weight.block != (1, FP4_BLOCK):
        raise InventoryError(
            f"tensor {weight.name}: not packed FP4", where=weight.stored.file, got=weight.encoding.value
        )
    shape = cast("tuple[int, int]", weight.shape)
    source = PackedFp4(weight.stored.file, weight.stored.offset, scale, shape, side)
    codes, scales = _operations(shape[1] // FP4_BLOCK, side)
    return _CodeSegments(source, codes), _ScaleSegments(source, scales)


@lru_cache(maxsize=64)  # one object for all tensors of a kind
def _operations(groups: int, side: int) -> tuple[Fp4ToFp8Codes, Fp4ToFp8Scales]:
    return Fp4ToFp8Codes(side), Fp4ToFp8Scales(groups, side)


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
    operations = Bf16ToFp8Codes(block), Bf16ToFp8Scales(weight.shape[1], scale_dtype == "F32", block)
    return _block_segments(weight, block, *operations, SCALE_BYTES[scale_dtype])


def float_to_fp8_segments(weight: Weight, block: tuple[int, int]) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the segments of the e4m3 codes and e8m0 scales that a weight of floats is rounded to, as published."""
    source = SOURCES[weight.encoding]
    operations = ToFp8Codes(source, block), ToFp8Scales(source, weight.shape[1], block)
    return _block_segments(weight, block, *operations, SCALE_BYTES["F8_E8M0"])


def _block_segments(
    weight: Weight, block: tuple[int, int], codes: Operation, scales: Operation, scale_bytes: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the segments of codes and scales of floats; an operand row holds all rows of a block."""
    rows, columns = weight.shape
    (whole,) = operands(weight)
    of_codes: list[Segment] = []
    of_scales: list[Segment] = []
    for first, count, height in row_blocks(rows, block[0]):
        start = whole.offset + first * whole.row_bytes
        operand = whole._replace(offset=start, row_bytes=height * whole.row_bytes, rows_per=height)
        of_codes.append(Segment(codes, (operand,), count, columns))
        row_bytes = -(-columns // block[1]) * scale_bytes
        of_scales.append(Segment(scales, (operand._replace(rows_per=1),), count // height, row_bytes))
    return tuple(of_codes), tuple(of_scales)


def float_to_fp4_segments(weight: Weight) -> tuple[Segment, Segment]:
    """Return the segments of the packed e2m1 codes and e8m0 scales that a weight is rounded to, as published.

    It holds floats, or NVFP4 or INT4, which are decoded first.

    Raises:
        InventoryError: its rows are no multiple of the elements that share a scale.
    """
    rows, columns = weight.shape
    if columns % FP4_BLOCK:
        raise InventoryError(
            f"tensor {weight.name}: rows cannot be cut into blocks of FP4",
            where=weight.stored.file,
            expected=f"a multiple of {FP4_BLOCK} columns",
            got=columns,
        )
    source, inputs = SOURCES[weight.encoding], operands(weight)
    return (
        Segment(ToFp4Codes(source, weight.block), inputs, rows, columns // CODES_PER_BYTE),
        Segment(ToFp4Scales(source, weight.block), inputs, rows, columns // FP4_BLOCK),
    )
