"""Segments that make NVFP4 of packed FP4 (codes, e4m3 scales and the second scale), and ggml's NVFP4 of NVFP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint.weights import FP4_SCALE_BLOCK, Weight
from ..containers.safetensors import Stored
from ..containers.wide_scales import second_of
from ..errors import InventoryError
from ..formats.ggml_types import BY_NAME
from ..formats.nvfp4 import BLOCK as NVFP4_BLOCK
from ..plan import NVFP4_CODES, NVFP4_SCALES, NVFP4_SECOND, Constant, MadeSegments, Operand, Operation, Segment, convert
from ..scale_forms import Over, Times
from .fp8_segments import CODES_PER_BYTE
from .segments import join_segments, matrix_shape, operands, scale_operand, shared

SCALAR_BYTES = 4


class Part(Enum):
    """What of an NVFP4 matrix a tensor holds."""

    CODES = "codes"
    SCALES = "scales"
    SECOND = "second"


_OPERATIONS: dict[Part, Operation] = {Part.CODES: NVFP4_CODES, Part.SCALES: NVFP4_SCALES, Part.SECOND: NVFP4_SECOND}


class _Source(NamedTuple):
    """A packed FP4 weight of ``shape`` where it lies, and the scales of all weights that share its second scale."""

    file: Path
    offset: int
    shape: tuple[int, int]
    scale: Stored
    sharing: tuple[Stored, ...]


class _Segments(MadeSegments):
    """The one segment of a part."""

    __slots__ = ("_part", "_source")

    def __init__(self, source: _Source, part: Part) -> None:
        self._source = source
        self._part = part

    @property
    def nbytes(self) -> int:
        """Return how many output bytes the segment makes."""
        rows, columns = self._source.shape
        sizes = {Part.CODES: rows * columns // CODES_PER_BYTE, Part.SCALES: rows * columns // NVFP4_BLOCK}
        return shared(sizes.get(self._part, SCALAR_BYTES))

    @property
    def operation(self) -> Operation:
        """Return the operation that makes the part."""
        return _OPERATIONS[self._part]

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the segment from others: the part, and where the weight and all scales lie."""
        file, offset, shape, own, sharing = self._source
        scales = " ".join(f"{names[scale.file]} {scale[1:]}" for scale in (own, *sharing))
        return f"{self._part} {names[file]} {offset} {shape} {scales}\n".encode()

    def __len__(self) -> int:
        return 1

    def _make(self, number: int) -> Segment:
        source = self._source
        rows, columns = source.shape
        if self._part is Part.SECOND:
            return Segment(self.operation, self._whole(1), 1, SCALAR_BYTES)
        scale = scale_operand(source.scale)
        if self._part is Part.SCALES:
            return Segment(self.operation, (scale, *self._whole(rows)), rows, shared(columns // NVFP4_BLOCK))
        packed = shared(columns // CODES_PER_BYTE)
        codes = Operand(source.file, source.offset, packed, 1, "u1")
        return Segment(self.operation, (codes, scale, *self._whole(rows)), rows, packed)

    def _whole(self, rows_per: int) -> tuple[Operand, ...]:
        """Return all scales under the second scale, each matrix of them in one row that serves ``rows_per`` rows."""
        return tuple(
            scale_operand(scale, rows_per=rows_per, rows_together=scale.shape[0]) for scale in self._source.sharing
        )


def fp4_to_nvfp4_segments(weight: Weight, sharing: Sequence[Weight]) -> dict[Part, Sequence[Segment]]:
    """Return the segments of each part of the NVFP4 that a packed FP4 weight becomes.

    ``sharing`` are the weights under one second scale, this one among them.

    Raises:
        InventoryError: one is not packed FP4.
    """
    for held in sharing:
        if held.scale is None or held.block != FP4_SCALE_BLOCK:
            raise InventoryError(f"tensor {held.name}: not packed FP4", where=held.stored.file, got=held.encoding.value)
    scales = tuple(held.scale for held in sharing if held.scale is not None)
    own = scales[[held.name for held in sharing].index(weight.name)]
    source = _Source(weight.stored.file, weight.stored.offset, shared(matrix_shape(weight.shape)), own, scales)
    return {part: _Segments(source, part) for part in Part}


@lru_cache(maxsize=1024)
def scalar_segments(value: float) -> tuple[Segment, ...]:
    """Return the segments of a float32 scalar, one object for all tensors with the value."""
    return (Segment(Constant(np.float32(value).tobytes()), (), 1, SCALAR_BYTES),)


def moved_segments(weights: Sequence[Weight]) -> Sequence[Segment]:
    """Return the segments that make ggml's NVFP4 blocks of NVFP4 weights, one behind the other; second scales are left.

    Their rows are a multiple of a block.
    """
    return join_segments([(_moved(weight),) for weight in weights])


def _moved(weight: Weight) -> Segment:
    rows, columns = weight.shape
    codes, scale = operands(weight)
    # Scales as they lie.
    raw = scale._replace(scale_form=None, dtype="u1")
    return Segment(convert("nvfp4", "nvfp4"), (codes, raw), rows, shared(BY_NAME["nvfp4"].row_bytes(columns)))


def second_scales(weights: Sequence[Weight]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the float32 second scale of each NVFP4 weight."""
    forms = [weight.scale.scale_form for weight in weights if weight.scale is not None]
    return np.array([second_of(form) for form in forms if isinstance(form, Times | Over)], "<f4")
