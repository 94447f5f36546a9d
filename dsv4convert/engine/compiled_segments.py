"""Which segments the compiled library makes by itself (``formats/compiled/segments.c``), and how they are asked for.

Between two tiles of Python stands the interpreter's lock, which goes from worker to worker some ten times a tile: more
than a few workers then wait for it and not for the disk. The library makes a segment in one call without it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formats import q8_0
from ..formats.backend import COMPILED, Codecs
from ..formats.base import FP8_TILE, GROUP, Scratch, Tally
from ..formats.compiled.segments import (
    MIN_BYTES,
    Control,
    Elements,
    LongDigest,
    Making,
    OperandPlace,
    SegmentCall,
    low_bit_twin,
    make_segment,
)
from ..formats.ggml_types import BY_NAME
from ..formats.not_finite import MAGNITUDES
from ..formats.nvfp4 import BLOCK as NVFP4_BLOCK
from ..plan import (
    Columns,
    Convert,
    Copy,
    Fp4ToFp8Codes,
    Fp4ToFp8Scales,
    Fp4ToNvfp4Codes,
    Fp4ToNvfp4Scales,
    Join,
    Operand,
    Operation,
    Quantise,
    Segment,
    Source,
    Target,
    ToFp4Codes,
    ToFp4Scales,
    ToFp8Codes,
    ToFp8Scales,
)
from .mappings import SHARERS, Mappings
from .operations import (
    FLOATS_OF_FILES,
    FP4_PER_BYTE,
    MOVED,
    PLAIN,
    SCALED,
    loaded_quantiser,
    rows_per_tile,
    tile_operands,
)
from .outputs import OPEN_FILES_PER_WORKER, DescriptorCache

BYTES, F32 = "u1", "<f4"
F32_BYTES = 4
# Copied bytes are written while they are in the processor's own cache: with 16 workers up to 13 % faster than 1 MiB
# (benchmarks/results/scale_16core_2026-11-26_start.txt).
COPIED_BYTES = 2**18
FP4_BLOCK = (1, GROUP)
# Decoded rows that ggml's library takes at a time: they stay in a processor's own cache.
WIDE_BYTES = 2**18


def _makings(kinds: Iterable[tuple[Source, Target]]) -> dict[tuple[Source, Target], Making]:
    """Return those conversions that the library has."""
    names = {kind: "{}_TO_{}".format(*kind).upper() for kind in kinds}
    return {kind: Making[name] for kind, name in names.items() if name in Making.__members__}


_SCALED = _makings((*SCALED, *MOVED))
_PLAIN = _makings(PLAIN)
_SOURCE_BYTES: Mapping[Source, int] = {"bf16": 2, "f16": 2, "f32": 4}
# Codes and scales of floats.
_FP8_PARTS: Mapping[Source, tuple[Making, Making]] = {
    "bf16": (Making.BF16_TO_FP8_CODES, Making.BF16_TO_FP8_SCALES),
    "f32": (Making.F32_TO_FP8_CODES, Making.F32_TO_FP8_SCALES),
}
_FP4_PARTS: Mapping[Source, tuple[Making, Making]] = {
    "bf16": (Making.BF16_TO_FP4_CODES, Making.BF16_TO_FP4_SCALES),
    "f32": (Making.F32_TO_FP4_CODES, Making.F32_TO_FP4_SCALES),
}
# Floats that ggml's library quantises, once they are decoded.
_FOR_GGML: Mapping[Source, Making] = {
    "fp8": Making.FP8_TO_GGML,
    "fp4": Making.FP4_TO_GGML,
    "bf16": Making.BF16_TO_GGML,
    "f16": Making.F16_TO_GGML,
    "f32": Making.F32_TO_GGML,
}
# Segments whose bytes are those of an operand.
_UNCHANGED = (Making.COPY, Making.FP4_TO_NVFP4_CODES)

# Codes with which the scales are found that they go by.
_WITH_SCALES = tuple(codes for codes, _ in (*_FP8_PARTS.values(), *_FP4_PARTS.values()))
# Bytes of such scales that are kept until they are written: those of a matrix of experts are less than one MiB.
MAX_KNOWN_BYTES = 2**21
# The operands of NVFP4's codes that are the matrix itself; the others are scales under one second scale.
_OWN_OPERANDS = 2


class Shape(NamedTuple):
    """What the operands of all segments of a kind share: fields of ``Operand`` that say nothing of its place."""

    row_bytes: int
    rows_per: int
    dtype: str


class Recipe(NamedTuple):
    """How segments of one kind are made: fields of ``SegmentCall`` that are the same for all."""

    making: Making
    columns: int
    height: int = 1
    width: int = 1
    scales_are_f32: bool = False
    spare_bytes: int = 0  # for each row of the output
    wide_bytes: int = 0  # of a row that is decoded for ggml's library
    holds: str = ""  # what is looked for values that are not finite: the output, and each operand
    operands_hold: tuple[str, ...] = ()


def output_bytes(target: Target, columns: int) -> int | None:
    """Return the bytes of a row of ``columns`` elements, None where blocks do not fill it."""
    kind = BY_NAME[target]
    return None if columns % kind.elements else kind.row_bytes(columns)


def recipe_of(operation: Operation, operands: tuple[Shape, ...], row_bytes: int) -> Recipe | None:
    """Return how the library makes rows of ``row_bytes`` bytes by an operation; None where it does not.

    It has no checks of its own: what is not exactly as it expects is left to Python, which has them.
    """
    first = operands[0] if operands else Shape(0, 1, "")
    match operation:
        case Copy(holds=holds) if first.row_bytes == row_bytes == 1:
            return Recipe(Making.COPY, 1, holds=holds)
        case Columns(begin, end, holds) if 0 <= begin < end <= first.row_bytes and end - begin == row_bytes:
            return Recipe(Making.COLUMNS, row_bytes, height=begin, width=end, holds=holds)
        case Join(holds) if sum(operand.row_bytes for operand in operands) == row_bytes:
            return Recipe(Making.JOIN, row_bytes, operands_hold=holds)
        case Convert():
            return _conversion(operation, operands, row_bytes)
        case Quantise() if operation.source in _FOR_GGML:
            return _quantisation(operation, operands, row_bytes)
        case Fp4ToFp8Codes(side) if side == FP8_TILE and row_bytes % GROUP == 0:
            # A row of the second operand holds the scales of a tile's rows. Ragged tiles are Python's, here and below.
            scales = Shape(side * row_bytes // GROUP, side, BYTES)
            if operands == (Shape(row_bytes // FP4_PER_BYTE, 1, BYTES), scales):
                return Recipe(Making.FP4_TO_FP8_CODES, row_bytes, spare_bytes=-(-row_bytes // side))
        case Fp4ToFp8Scales(groups, side) if side == FP8_TILE:
            if operands == (Shape(side * groups, 1, BYTES),) and row_bytes == -(-groups * GROUP // side):
                return Recipe(Making.FP4_TO_FP8_SCALES, groups)
        case Fp4ToNvfp4Codes() if _share_scales(operands[_OWN_OPERANDS:], row_bytes * FP4_PER_BYTE):
            columns = row_bytes * FP4_PER_BYTE
            if operands[:2] == (Shape(row_bytes, 1, BYTES), Shape(columns // GROUP, 1, BYTES)):
                return Recipe(Making.FP4_TO_NVFP4_CODES, columns)
        case Fp4ToNvfp4Scales() if _share_scales(operands[1:], row_bytes * NVFP4_BLOCK):
            columns = row_bytes * NVFP4_BLOCK
            if first == Shape(columns // GROUP, 1, BYTES):
                return Recipe(Making.FP4_TO_NVFP4_SCALES, columns)
        case ToFp8Codes(source, block) if source in _FP8_PARTS:
            height = min(first.rows_per, block[0])
            if first.row_bytes == first.rows_per * row_bytes * _SOURCE_BYTES[source]:
                return Recipe(_FP8_PARTS[source][0], row_bytes, height, block[1])
        case ToFp8Scales(source, columns, block) if source in _FP8_PARTS:
            height, rest = divmod(first.row_bytes, columns * _SOURCE_BYTES[source])
            if (first.rows_per, rest) == (1, 0) and height <= block[0] and row_bytes == -(-columns // block[1]):
                return Recipe(_FP8_PARTS[source][1], columns, height, block[1])
        case ToFp4Codes(source, None) if source in _FP4_PARTS:
            return _fp4_recipe(_FP4_PARTS[source][0], source, first, row_bytes * FP4_PER_BYTE)
        case ToFp4Scales(source, None) if source in _FP4_PARTS:
            return _fp4_recipe(_FP4_PARTS[source][1], source, first, row_bytes * GROUP)
    return None


def _share_scales(operands: tuple[Shape, ...], columns: int) -> bool:
    """Return whether each operand is a row of all scales of a matrix of packed FP4 that serves all rows of it."""
    row_bytes = columns // GROUP
    return columns % GROUP == 0 and all(
        operand == Shape(operand.rows_per * row_bytes, operand.rows_per, BYTES) for operand in operands
    )


def _fp4_recipe(making: Making, source: Source, operand: Shape, columns: int) -> Recipe | None:
    fits = columns % GROUP == 0 and operand[:2] == (columns * _SOURCE_BYTES[source], 1)
    return Recipe(making, columns, *FP4_BLOCK) if fits else None


def known_with(segment: Segment) -> Segment | None:
    """Return the segment of the scales that the library finds with the codes of another, None where that has none."""
    operands = segment.operands
    match segment.operation:
        case ToFp8Codes(source, block):
            blocks = segment.rows // operands[0].rows_per, -(-segment.row_bytes // block[1])
            return Segment(ToFp8Scales(source, segment.row_bytes, block), (operands[0]._replace(rows_per=1),), *blocks)
        case ToFp4Codes(source, block):
            return Segment(
                ToFp4Scales(source, block), operands, segment.rows, segment.row_bytes * FP4_PER_BYTE // GROUP
            )
    return None


def _conversion(operation: Convert, operands: tuple[Shape, ...], row_bytes: int) -> Recipe | None:
    source, kind = operation.source, (operation.source, operation.target)
    element = operands[0]
    if kind in _PLAIN:
        columns = element.row_bytes // _SOURCE_BYTES[source]
        fits = element.rows_per == 1 and row_bytes == output_bytes(operation.target, columns)
        return Recipe(_PLAIN[kind], columns, operands_hold=(FLOATS_OF_FILES[source],)) if fits else None
    if kind not in _SCALED or (operation.block is None and source == "fp8"):
        return None
    columns = element.row_bytes * (FP4_PER_BYTE if source == "fp4" else 1)
    height, width = operation.block or FP4_BLOCK
    scale = operands[1]
    scale_bytes = 4 if scale.dtype == F32 else 1
    fits = (
        row_bytes == output_bytes(operation.target, columns)
        and (element.rows_per, scale.rows_per) == (1, height)
        and scale.row_bytes == -(-columns // width) * scale_bytes
        and scale.dtype in ((BYTES,) if kind == ("fp4", "mxfp4") else (BYTES, F32))
    )
    if source == "fp4":
        fits = fits and (height, width) == FP4_BLOCK and columns % GROUP == 0
    elif operation.target in ("q8_0", "mxfp4"):
        fits = fits and width % GROUP == 0
    if not fits:
        return None
    return Recipe(_SCALED[kind], columns, height, width, scale_bytes > 1, scale.row_bytes if scale_bytes > 1 else 0)


def _quantisation(operation: Quantise, operands: tuple[Shape, ...], row_bytes: int) -> Recipe | None:
    source, kind = operation.source, BY_NAME[operation.target]
    columns = row_bytes // kind.nbytes * kind.elements
    if source == "f32":
        decoding = Recipe(Making.F32_TO_GGML, columns) if operands == (Shape(columns * F32_BYTES, 1, F32),) else None
    else:
        decoding = _conversion(Convert(source, "f32", operation.block), operands, columns * F32_BYTES)
    if decoding is None or kind.row_bytes(columns) != row_bytes:
        return None
    # What is not finite is refused, and not counted.
    return decoding._replace(making=_FOR_GGML[source], operands_hold=(), wide_bytes=F32_BYTES * columns)


def _elements(holds: str) -> Elements:
    kind = MAGNITUDES.get(holds)
    return Elements() if kind is None else Elements(np.dtype(kind.dtype).itemsize, kind.least)


class Known(NamedTuple):
    """The bytes of a segment that nothing is counted in, and ``Made.zeros``."""

    content: NDArray[np.uint8]
    zeros: int


class CompiledSegment:
    """Segments of one kind, one after the other: the call that makes them, and the digest of the one at hand."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: tuple[Shape, ...],
        row_bytes: int,
        step: int,
        digest: LongDigest,
        *,
        drops: bool = False,
        quantise: tuple[int, int] | None = None,
    ) -> None:
        self.digest = digest
        self._recipe, self._shapes = recipe, shapes
        self._places = (OperandPlace * len(shapes))(
            *(OperandPlace(row_bytes=shape.row_bytes, rows_per=shape.rows_per) for shape in shapes)
        )
        self._call = SegmentCall(
            making=recipe.making,
            operands=self._places,
            operand_count=len(shapes),
            row_bytes=row_bytes,
            step=step,
            columns=recipe.columns,
            height=recipe.height,
            width=recipe.width,
            scales_are_f32=recipe.scales_are_f32,
            drops=drops,
        )
        # An operand's row more than a tile takes, for tiles that start inside a scale's block.
        self._tile_bytes = [(-(-step // shape.rows_per) + 1) * shape.row_bytes for shape in shapes]
        if recipe.making is Making.FP8_TO_Q8_0:
            self._set_tables(q8_0.multipliers(), q8_0.d_table(), q8_0.TABLE_FIRST_BYTE, q8_0.TABLE_LAST_BYTE)
        elif recipe.making is Making.FP4_TO_Q8_0:
            d = q8_0.fp4_tables()[1]
            self._set_tables(q8_0.fp4_multipliers(), d, q8_0.FP4_TABLE_FIRST_BYTE, q8_0.FP4_TABLE_LAST_BYTE)
        if quantise is not None:
            self._call.quantise, self._call.type = quantise
            self._call.wide_rows = max(1, min(step, WIDE_BYTES // recipe.wide_bytes))
        self._call.holds = _elements(recipe.holds)
        for place, holds in zip(self._places, recipe.operands_hold, strict=bool(recipe.operands_hold)):
            place.holds = _elements(holds)

    def _set_tables(self, multipliers: NDArray[Any], d: NDArray[Any], first: int, last: int) -> None:
        # The call has addresses only. A cache does not keep every array that it hands out: two threads that ask for a
        # table at once make one each, and the second takes the place of the first.
        self._tables = multipliers, d
        self._call.tables[:] = [multipliers.ctypes.data, d.ctypes.data]
        self._call.first, self._call.last = first, last

    def fits(self, weights: NDArray[np.float32] | None) -> bool:
        """Return whether there is a weight for each column; those of a run that was stopped can be any."""
        return weights is None or weights.shape == (self._call.columns,)

    def place(
        self,
        segment: Segment,
        operands: Sequence[Operand],
        weights: NDArray[np.float32] | None,
        descriptors: Sequence[int],
        scratch: Scratch,
        output: int,
        offset: int,
        mapping: int | None,
    ) -> None:
        """Say where the next segment's operands lie, and where it goes."""
        call = self._call
        for index, (place, operand) in enumerate(zip(self._places, operands, strict=True)):
            place.descriptor, place.offset = descriptors[index], operand.offset
            place.tile = scratch.address(f"input {index}", self._tile_bytes[index])
        if self._recipe.making in _UNCHANGED:
            call.tile = self._places[0].tile
        else:
            call.tile = scratch.address("output", call.step * call.row_bytes)
        call.spare = scratch.address("spare", self._recipe.spare_bytes * call.step)
        call.wide = scratch.address("wide", self._recipe.wide_bytes * call.wide_rows)
        self._weights = None if weights is None else np.ascontiguousarray(weights)
        call.weights = None if self._weights is None else self._weights.ctypes.data
        call.output, call.offset, call.mapping, call.rows = output, offset, mapping, segment.rows
        call.counts[:] = (0, 0, 0, 0)
        call.zeros = (1 << len(operands)) - 1
        self._known = known_with(segment)
        self._scales = None
        if self._known is not None and self._recipe.making in _WITH_SCALES and self._known.nbytes <= MAX_KNOWN_BYTES:
            self._scales = np.empty(self._known.nbytes, np.uint8)
        call.scales = None if self._scales is None else self._scales.ctypes.data

    def share(self, control: Control, *, with_digest: bool) -> None:
        """Say who may stop the work, and whether a digest is wanted."""
        self._call.control = ctypes.pointer(control)
        self._call.checksum = self.digest.address if with_digest else None

    def make(self, first: int) -> int:
        """Make tiles from row ``first`` on; return the first row that is left, for the caller to make."""
        return make_segment(self._call, first)

    @property
    def zeros(self) -> int:
        """Return the operands of which every byte was zero in the tiles that the library made, as in ``Made.zeros``."""
        return self._call.zeros

    def known(self) -> tuple[Segment, Known] | None:
        """Return the segment of the scales that were found with the codes, once all rows of these are made here."""
        if self._known is None or self._scales is None:
            return None
        return self._known, Known(self._scales, self.zeros)

    def add_counts(self, tally: Tally) -> None:
        """Add what was counted in the tiles that the library made."""
        if any(self._call.counts):
            tally.add(Tally(*self._call.counts))


class CompiledSegments:
    """The segments that the library makes in the buffers of one worker, one at a time.

    With ``drops``, what was read and written does not stay in the page cache.

    What segments of a kind share is looked up once: whatever is left to do for each is done with the interpreter's
    lock, which all workers want.
    """

    def __init__(
        self,
        codecs: Codecs,
        scratch: Scratch,
        descriptors: DescriptorCache,
        control: Control,
        mappings: Mappings,
        tile_bytes: int,
        *,
        drops: bool = False,
    ) -> None:
        self.sharers = 1  # workers in the output at hand
        self._drops = drops
        self._mappings = mappings
        self._scratch = scratch
        self._descriptors = descriptors
        self._control = control
        self._tile_bytes = tile_bytes
        self._digest = LongDigest() if codecs.name == COMPILED else None
        self._kinds: dict[tuple[object, ...], CompiledSegment | None] = {}

    def begin(
        self,
        segment: Segment,
        output: int,
        offset: int,
        *,
        weights: NDArray[np.float32] | None = None,
        with_digest: bool = True,
    ) -> CompiledSegment | None:
        """Return a segment that is ready to be made at ``offset`` of a descriptor; None where the library does not.

        ``weights`` are those of its columns, for a ``Quantise`` with importance. Without a digest, copies are left to
        the kernel where it takes them, and nothing is counted in them.

        Raises:
            InputOutputError: a source cannot be opened.
            DeviceError: ggml's library does not have the type.
        """
        operands = tile_operands(segment)
        # The library takes scales as they lie. Asked before kinds are: of NVFP4, each tensor has a form of its own.
        held_otherwise = any(operand.scale_form is not None for operand in segment.operands)
        if self._digest is None or segment.nbytes < MIN_BYTES or held_otherwise:
            return None
        kind = (segment.operation, segment.row_bytes, *[operand[2:5] for operand in operands])
        if kind not in self._kinds:
            self._kinds[kind] = self._of_kind(segment, operands, self._digest)
        compiled = self._kinds[kind]
        if compiled is None or not compiled.fits(weights):
            return None
        descriptors = [self._descriptors.get(operand.file, os.O_RDONLY) for operand in operands]
        self._digest.begin()
        compiled.share(self._control, with_digest=with_digest)
        mapping = self._mappings.address(output) if self.sharers >= SHARERS else None
        compiled.place(segment, operands, weights, descriptors, self._scratch, output, offset, mapping)
        return compiled

    def _of_kind(self, segment: Segment, operands: Sequence[Operand], digest: LongDigest) -> CompiledSegment | None:
        shapes = tuple(Shape(*operand[2:5]) for operand in operands)
        recipe = recipe_of(segment.operation, shapes, segment.row_bytes)
        # More sources than a worker keeps open would be closed under the call.
        if recipe is None or len(shapes) > OPEN_FILES_PER_WORKER:
            return None
        copies = recipe.making is Making.COPY
        step = COPIED_BYTES if copies else rows_per_tile(segment, self._tile_bytes)
        quantise = None
        if isinstance(segment.operation, Quantise):
            target, weighted = segment.operation.target, segment.operation.importance is not None
            library = loaded_quantiser(segment.operation.library)
            quantise = library.address(target, low_bit_twin(), weighted=weighted), BY_NAME[target].number
        return CompiledSegment(recipe, shapes, segment.row_bytes, step, digest, drops=self._drops, quantise=quantise)
