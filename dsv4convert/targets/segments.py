"""From a weight to the segments that make it in a given element type; shared by all layouts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import TypeVar, cast

from ..checkpoint.weights import PACKED_ENCODINGS, Encoding, Weight
from ..containers.safetensors import Stored
from ..containers.wide_scales import becomes_f32
from ..errors import InventoryError, UnsupportedError
from ..formats.ggml_types import BY_NAME, GgmlType
from ..formats.int4 import PER_WORD
from ..model.tensors import Store
from ..plan import (
    COPY_SEGMENT_BYTES,
    Columns,
    Convert,
    CopySegments,
    Keep,
    MadeSegments,
    Operand,
    Segment,
    Source,
    Target,
    convert,
    identity_of,
)
from ..scale_forms import Floats, Over, Pairs, PowersOfTwo, ScaleForm, Times

NUMPY_DTYPE = {
    Encoding.FP4: "u1",
    Encoding.NVFP4: "u1",
    Encoding.INT4: "u1",
    Encoding.FP8: "u1",
    Encoding.BF16: "<u2",
    Encoding.F16: "<f2",
    Encoding.F32: "<f4",
    Encoding.I64: "<i8",
    Encoding.I32: "<i4",
}
SOURCES: Mapping[Encoding, Source] = {
    Encoding.FP4: "fp4",
    Encoding.NVFP4: "nvfp4",
    Encoding.INT4: "int4",
    Encoding.FP8: "fp8",
    Encoding.BF16: "bf16",
    Encoding.F16: "f16",
    Encoding.F32: "f32",
    Encoding.I64: "i64",
    Encoding.I32: "i32",
}
TARGETS: Mapping[str, Target] = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "i32": "i32",
    "q8_0": "q8_0",
    "mxfp4": "mxfp4",
}
SCALE_DTYPE = {"F8_E8M0": "u1", "F32": "<f4"}

# What to do with NVFP4 and INT4 where a layout has neither.
DECODE_FIRST = "run requantize first, which rounds experts to FP4, or dequantize"
DEQUANTIZE_FIRST = "run dequantize first, and requantize the folder that it makes"

# The element types of outputs of every kind: BF16 in a safetensors file is that of ggml.
ElementType = GgmlType
F32, F16, BF16 = BY_NAME["f32"], BY_NAME["f16"], BY_NAME["bf16"]
I32, I64 = BY_NAME["i32"], BY_NAME["i64"]
Q8_0, MXFP4 = BY_NAME["q8_0"], BY_NAME["mxfp4"]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return ``shape`` as (rows, columns): a vector is one row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, shape[0] if shape else 1)


def check_stored(weights: Iterable[Weight], layout: str, hint: str = DECODE_FIRST) -> None:
    """Check that ``layout``, which moves weights as they are, has a form for all of them.

    Raises:
        UnsupportedError: one is NVFP4 that is no FP4, or INT4.
    """
    for weight in weights:
        if weight.encoding in PACKED_ENCODINGS or (weight.scale is not None and becomes_f32(weight.scale.scale_form)):
            kind = weight.encoding.value.upper()
            scales = "" if weight.encoding in PACKED_ENCODINGS else " with scales in BF16 or F16"
            raise UnsupportedError(
                f"tensor {weight.name}: {kind}{scales} cannot go into {layout} as it is",
                where=weight.stored.file,
                hint=hint,
            )


Shared = TypeVar("Shared", bound=Hashable)


@lru_cache(maxsize=1024)
def _shared(value: Hashable) -> Hashable:
    return value


def shared(value: Shared) -> Shared:
    """Return one object for all equal sizes or shapes: a plan of a hundred thousand tensors has few different ones."""
    return cast("Shared", _shared(value))


def operands(weight: Weight, first: int = 0) -> tuple[Operand, ...]:
    """Return the operands of a weight from row ``first`` on.

    Raises:
        InventoryError: ``first`` is no multiple of its scale block's height.
    """
    rows, _ = matrix_shape(weight.shape)
    row_bytes = shared(weight.stored.nbytes // rows)
    stored = weight.stored
    weights = Operand(stored.file, stored.offset + first * row_bytes, row_bytes, 1, NUMPY_DTYPE[weight.encoding])
    scale, block = weight.scale, weight.block
    if scale is None or block is None:
        return (weights,)
    if first % block[0]:
        raise InventoryError(
            f"tensor {weight.name}: row {first} does not begin a scale block",
            expected=f"a multiple of {block[0]}",
        )
    scales = scale_operand(scale, first // block[0], rows_per=block[0])
    if weight.zero is None:
        return weights, scales
    if first % PER_WORD:
        raise InventoryError(
            f"tensor {weight.name}: row {first} does not begin a word of zero points",
            expected=f"a multiple of {PER_WORD}",
        )
    words = weight.zero
    width = shared(words.nbytes // words.shape[0])
    zeros = Operand(words.file, words.offset + first // PER_WORD * width, width, PER_WORD, "<i4")
    return weights, scales, zeros


def scale_operand(scale: Stored, first: int = 0, *, rows_per: int = 1, rows_together: int = 1) -> Operand:
    """Return the operand of scales [r, c] from row ``first`` on, a row of it being ``rows_together`` rows of scales."""
    row_bytes = scale.nbytes // scale.shape[0]
    place = scale.offset + first * row_bytes
    together, dtype = shared(rows_together * row_bytes), SCALE_DTYPE[scale.dtype]
    return Operand(scale.file, place, together, rows_per, dtype, scale.scale_form)


def is_verbatim(weight: Weight, to: ElementType) -> bool:
    """Return whether the weight's own bytes are already what ``to`` wants."""
    return weight.encoding.value == to.name


def row_operation(weight: Weight, to: ElementType) -> Keep | Convert:
    """Return the operation that makes rows of a weight in element type ``to``.

    Raises:
        InventoryError: there is no codec for it.
    """
    if is_verbatim(weight, to):
        return Keep(weight.stored.dtype)
    if to.name not in TARGETS:
        raise InventoryError(f"tensor {weight.name}: no codec makes {to.name}", where=weight.stored.file)
    return convert(SOURCES[weight.encoding], TARGETS[to.name], weight.block)


def codec_segment(weight: Weight, to: ElementType, first: int = 0, rows: int | None = None) -> Segment:
    """Return the one segment that makes rows ``first``.. of a weight in element type ``to`` through a codec.

    Raises:
        InventoryError: the row length is no multiple of the type's block.
    """
    all_rows, columns = matrix_shape(weight.shape)
    rows = all_rows - first if rows is None else rows
    if columns % to.elements:
        raise InventoryError(
            f"tensor {weight.name}: rows cannot be cut into blocks of {to.name}",
            where=weight.stored.file,
            expected=f"a multiple of {to.elements} columns",
            got=columns,
            hint="choose another output type for it",
        )
    return Segment(row_operation(weight, to), operands(weight, first), rows, shared(to.row_bytes(columns)))


def convert_segments(weight: Weight, to: ElementType, first: int = 0, rows: int | None = None) -> Sequence[Segment]:
    """Return the segments that make rows ``first``.. of a weight in element type ``to``; verbatim bytes are copied.

    Raises:
        InventoryError: the row length is no multiple of the type's block.
    """
    segment = codec_segment(weight, to, first, rows)
    if isinstance(segment.operation, Keep):
        source = segment.operands[0]
        return CopySegments(source.file, source.offset, segment.nbytes, weight.stored.dtype)
    return RowSegments(segment) if weight.row.store is Store.ENGRAM else (segment,)


class RowSegments(MadeSegments):
    """A segment cut into runs of rows of about ``COPY_SEGMENT_BYTES``, so that a run can go on inside a huge table."""

    __slots__ = ("_rows", "_whole")

    def __init__(self, whole: Segment) -> None:
        self._whole = whole
        heights = math.lcm(*(operand.rows_per for operand in whole.operands))
        self._rows = max(1, COPY_SEGMENT_BYTES // whole.row_bytes // heights) * heights

    @property
    def nbytes(self) -> int:
        """Return how many output bytes the segments make."""
        return self._whole.nbytes

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the runs from others: the whole, and how many rows each has."""
        return f"{self._rows} of ".encode() + identity_of((self._whole,), names)

    def __len__(self) -> int:
        return -(-self._whole.rows // self._rows)

    def _make(self, number: int) -> Segment:
        first = number * self._rows
        return self._whole._replace(
            operands=tuple(
                operand._replace(offset=operand.offset + first // operand.rows_per * operand.row_bytes)
                for operand in self._whole.operands
            ),
            rows=min(self._rows, self._whole.rows - first),
        )


class StackedSegments(MadeSegments):
    """Segments that are alike but for where their operands lie, such as those of a layer's experts."""

    __slots__ = ("_files", "_first", "_forms", "_offsets")

    def __init__(self, first: Segment, places: Sequence[Operand | Stored]) -> None:
        """``places`` are the operands of all segments, in order, or the tensors that these lie at the start of."""
        self._first = first
        self._files = tuple([place.file for place in places])
        self._offsets = array("q", [place.offset for place in places])
        self._forms = tuple([place.scale_form for place in places if place.scale_form is not None])

    @property
    def nbytes(self) -> int:
        """Return how many output bytes the segments make."""
        return len(self) * self._first.nbytes

    @property
    def sizes(self) -> Iterable[int]:
        """Return how many output bytes each segment makes, all the same."""
        return repeat(self._first.nbytes, len(self))

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the file of each operand."""
        return self._files

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the segments from others: the first one, and where all operands lie."""
        files = [names[file] for file in self._files]
        return identity_of((self._first,), names) + f"{files} {self._offsets.tolist()} {self._forms}\n".encode()

    def __len__(self) -> int:
        return len(self._offsets) // len(self._first.operands)

    def _make(self, number: int) -> Segment:
        # Built field by field: a plan is walked several times, and ``_replace`` takes four times as long.
        first = self._first
        begin = number * len(first.operands)
        forms = iter(self._forms[len(self._forms) // len(self) * number :])
        operands = tuple(
            [
                Operand(
                    self._files[place],
                    self._offsets[place],
                    like.row_bytes,
                    like.rows_per,
                    like.dtype,
                    None if like.scale_form is None else next(forms),
                )
                for place, like in enumerate(first.operands, start=begin)
            ]
        )
        return Segment(first.operation, operands, first.rows, first.row_bytes)


def copy_segments(stored: Stored, *, is_repeated: bool = False) -> Sequence[Segment]:
    """Return the segments that copy a stored tensor (see ``copy_rows``); for ``is_repeated`` see ``CopySegments``."""
    if stored.scale_form is not None:
        return copy_rows(stored, 0, stored.shape[0])
    return CopySegments(stored.file, stored.offset, stored.nbytes, stored.dtype, is_repeated=is_repeated)


def copy_rows(stored: Stored, first: int, rows: int) -> Sequence[Segment]:
    """Return the segments that copy rows of a stored tensor byte for byte; scales of a wider type become E8M0."""
    if stored.scale_form is not None:
        columns = stored.shape[1]
        return (Segment(Columns(0, columns, stored.dtype), (scale_operand(stored, first),), rows, columns),)
    width = stored.nbytes // stored.shape[0]
    return CopySegments(stored.file, stored.offset + first * width, rows * width, stored.dtype)


def stack_segments(weights: Sequence[Weight], to: ElementType) -> Sequence[Segment]:
    """Return the segments that make weights in element type ``to``, one weight behind the other.

    Raises:
        InventoryError: the row length of one is no multiple of the type's block.
    """
    first = convert_segments(weights[0], to)
    # Segments of weights that are alike need not be made to see that they are.
    if len(weights) > 1 and isinstance(first, tuple) and len(set(map(_kind_of, weights))) == 1:
        return StackedSegments(first[0], [part for weight in weights for part in _parts(weight)])
    return join_segments([first, *(convert_segments(weight, to) for weight in weights[1:])])


def _parts(weight: Weight) -> tuple[Stored, ...]:
    """Return the tensors of a weight, in the order of its operands."""
    stored, scale, zero = weight.stored, weight.scale, weight.zero
    if scale is None or weight.block is None:
        return (stored,)
    return (stored, scale) if zero is None else (stored, scale, zero)


def _kind_of(weight: Weight) -> tuple[object, ...]:
    """Return all that decides the segment of a weight but where its tensors lie."""
    parts = [(dtype, shape, nbytes, _without_second(form)) for _, dtype, shape, _, nbytes, form in _parts(weight)]
    return weight.shape, weight.encoding, weight.block, *parts


def join_segments(pieces: Sequence[Sequence[Segment]]) -> Sequence[Segment]:
    """Return the segments of several tensors as those of one, in order."""
    if len(pieces) == 1:
        return pieces[0]
    segments = [segment for piece in pieces for segment in piece]
    if len(segments) > 1 and segments[0].operands and len(set(map(_without_places, segments))) == 1:
        return StackedSegments(segments[0], [operand for segment in segments for operand in segment.operands])
    return tuple(segments)


def _without_places(segment: Segment) -> tuple[object, ...]:
    """Return all of a segment but where its operands lie."""
    operation, operands, rows, row_bytes = segment
    forms = [(*kept, _without_second(form)) for _file, _offset, *kept, form in operands]
    return operation, rows, row_bytes, *forms


def _without_second(form: ScaleForm | None) -> ScaleForm | None:
    """Return the form of scales but for the second scale of NVFP4, which is a place's own."""
    match form:
        case Pairs():
            return Pairs(0)
        case Times() | Over():
            return Times(1.0)
        case PowersOfTwo() | Floats() | None:
            return form
