"""Compares pieces of an output with the source weights that they stand for, a block of elements at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..errors import InventoryError
from ..formats.ggml import Quantiser
from ..inspection.naming import family_of, layer_of
from .low_bit import LOW_BIT, ROWS_ELEMENTS, ImportanceOf, RowCheck, decode
from .matrix import STORAGE, Matrix, Scale, Span, largest_e8m0, read_bits, read_raw, same_bytes
from .numbers import (
    BLOCK,
    FLOATS,
    FP8_TILE,
    INTEGERS,
    SCALED,
    TABLE_BITS,
    Bits,
    Mask,
    Values,
    affine8_bits,
    all_conversions,
    bits_of,
    fp4_as_fp8_bits,
    fp4_as_nvfp4_bits,
    published_fp4_bits,
    published_fp8_bits,
    values_of,
    within_half_step,
)
from .report import TensorResult

# Elements that are compared at a time: bytes against bytes, and where there is arithmetic, whose float64
# temporaries are then small enough to be reused memory and no fresh pages (a factor of six).
SAME_BLOCK_ELEMENTS = 2**18
BLOCK_ELEMENTS = 2**15
TILED_BLOCK_ELEMENTS = 2**17
# A sample is cut finer, so that it comes from many places.
SAMPLE_BLOCK_ELEMENTS = 2**13

# What ``requantize`` makes of floats, whose errors are summed as those of low-bit types are.
REQUANTISED = ("fp8", "fp8/f32", "fp4")

# Two elements a byte; scales are for at least so many columns, or a power of two of them.
FOUR_BIT = ("fp4", "fp4/nv", "fp4/f32", "fp4/e4m3", "int4")
# Storages of the same bits.
MOVED = ({"fp4", "mxfp4"}, {"fp8", "fp8/row"}, {"fp4/e4m3", "nvfp4/e4m3"})

# Pieces that are handed out at a time: results wait for the slowest of them, not for all.
BATCH = 256


class Piece(NamedTuple):
    """A rectangle of an output tensor that holds a rectangle of a source weight.

    ``shape`` is the output tensor's own, in which indices are reported. ``sharing`` are the source's scales that the
    second scale of NVFP4 goes by. ``by_value``: other codes and scales of the same values are right as well.
    """

    output: Matrix
    shape: tuple[int, ...]
    at: tuple[int, int]
    source: Matrix
    source_at: tuple[int, int]
    size: tuple[int, int]
    importance: ImportanceOf | None = None
    sharing: tuple[Scale, ...] = ()
    by_value: bool = False


class Comparison(NamedTuple):
    """How to compare: a seeded fraction or everything, and another tool's rounding or not.

    ``quantiser`` makes rows of low-bit types anew, to be compared byte for byte; None: by their error alone.
    """

    sample: float | None = None
    seed: int = 0
    foreign: bool = False
    quantiser: Quantiser | None = None

    def share_of(self, blocks: int) -> int:
        """Return how many of so many blocks to look at: one at least."""
        return blocks if self.sample is None else min(blocks, max(1, math.ceil(self.sample * blocks)))


def compare_pieces(
    pieces: Iterable[Piece], how: Comparison, threads: int, enter: Callable[[], None]
) -> Iterator[tuple[Piece, TensorResult, int]]:
    """Yield (piece, result, bytes read) of every piece, in order; each of the threads calls ``enter`` first.

    Raises:
        InputOutputError: a read failed.
    """
    remaining = iter(pieces)
    with ThreadPoolExecutor(threads, initializer=enter) as pool:
        while batch := list(islice(remaining, BATCH)):
            yield from pool.map(lambda piece: (piece, *compare_piece(piece, how)), batch)


def compare_piece(piece: Piece, how: Comparison) -> tuple[TensorResult, int]:
    """Return the result of one piece and the bytes that were read for it."""
    output, source = piece.output, piece.source
    is_low_bit = output.encoding in LOW_BIT
    result = TensorResult(
        output.name,
        source.encoding,
        output.encoding,
        math.prod(piece.size),
        family=family_of(source.name),
        layer=layer_of(source.name),
        nbytes=_nbytes(output, piece.size),
        is_low_bit=is_low_bit,
        is_measured=is_low_bit
        or output.encoding == "affine8"
        or (source.encoding in FLOATS and output.encoding in REQUANTISED),
    )
    cut = _cut(piece, how)
    largest = largest_e8m0(piece.sharing) if piece.sharing else 0
    check = None
    if is_low_bit:
        check = RowCheck(source, output.encoding, piece.importance, how.quantiser, foreign=how.foreign)
    for top, bottom, left, right in map(cut.block, _chosen(piece, cut, how)):
        rows = piece.at[0] + top, piece.at[0] + bottom
        columns = piece.at[1] + left, piece.at[1] + right
        source_rows = piece.source_at[0] + top, piece.source_at[0] + bottom
        source_columns = piece.source_at[1] + left, piece.source_at[1] + right
        result.compared += (bottom - top) * (right - left)
        if check is not None:
            _compare_rows(result, piece, check, (rows, columns), (source_rows, source_columns))
            continue
        if same_bytes(output, (rows, columns), source, (source_rows, source_columns)):
            continue
        found = read_bits(output, rows, columns)
        original = read_bits(source, source_rows, source_columns)
        _compare(result, piece, (rows[0], columns[0]), original, found, how.foreign, largest)
    share = result.compared / max(1, math.prod(piece.size))
    return result, round(share * piece_bytes(piece))


def _compare_rows(
    result: TensorResult, piece: Piece, check: RowCheck, at: tuple[Span, Span], source_at: tuple[Span, Span]
) -> None:
    """Compare rows of a low-bit type."""
    output, source = piece.output, piece.source
    raw = read_raw(output, *at)
    before = values_of(source.encoding, read_bits(source, *source_at))
    after = decode(output.encoding, raw)
    _measure(result, before, after)
    with np.errstate(invalid="ignore", over="ignore"):
        whole_rows = piece.size[1] == output.columns == source.columns
        wrong = check.wrong(before, after, raw, whole_rows=whole_rows)
    _record(result, piece, (at[0][0], at[1][0]), wrong, before, after)


def piece_bytes(piece: Piece) -> int:
    """Return the bytes of a piece on both sides, scales among them."""
    return sum(_nbytes(matrix, piece.size) for matrix in (piece.output, piece.source))


def bytes_to_read(piece: Piece, how: Comparison) -> int:
    """Return about how many bytes of a piece a comparison reads."""
    cut = _cut(piece, how)
    return piece_bytes(piece) * how.share_of(cut.blocks) // max(1, cut.blocks)


def _nbytes(matrix: Matrix, size: tuple[int, int]) -> int:
    nbytes = matrix.row_bytes * size[0] * size[1] // max(1, matrix.columns)
    scale = matrix.scale
    return nbytes + (0 if scale is None else size[0] * size[1] // (scale.block[0] * scale.block[1]))


class Cut(NamedTuple):
    """A rectangle cut into blocks of ``height`` rows and ``width`` columns."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return -(-self.rows // self.height) * -(-self.columns // self.width)

    def block(self, number: int) -> tuple[int, int, int, int]:
        """Return (top, bottom, left, right) of a block."""
        down, across = divmod(number, -(-self.columns // self.width))
        top, left = down * self.height, across * self.width
        return top, min(top + self.height, self.rows), left, min(left + self.width, self.columns)


def _cut(piece: Piece, how: Comparison) -> Cut:
    """Cut a piece into blocks: whole rows if they are not too long, whole tiles where they share a scale."""
    rows, columns = piece.size
    kinds = {piece.output.encoding, piece.source.encoding}
    width, step = columns, 1
    if piece.source.encoding in ("fp4", *FLOATS) and piece.output.encoding == "fp8":
        elements, step = TILED_BLOCK_ELEMENTS, _tile(piece)
    else:
        moved = len(kinds) == 1 or kinds in MOVED
        elements = SAME_BLOCK_ELEMENTS if moved else BLOCK_ELEMENTS
    if piece.output.encoding in LOW_BIT:  # whole rows, as they are quantised
        elements = max(ROWS_ELEMENTS if how.sample is None else SAMPLE_BLOCK_ELEMENTS, columns)
    elif how.sample is not None:
        elements = SAMPLE_BLOCK_ELEMENTS
    if step > 1:
        width = max(step, elements // step // step * step)
    elif columns > elements:
        width = elements // BLOCK * BLOCK
    height = max(step, elements // max(1, min(width, columns)) // step * step)
    return Cut(rows, columns, height, max(1, width))


def _chosen(piece: Piece, cut: Cut, how: Comparison) -> Iterable[int]:
    """Return the numbers of the blocks to compare, in order."""
    if how.sample is None:
        return range(cut.blocks)
    chosen = random.Random(f"{how.seed} {piece.output.name} {piece.source.name}")
    return sorted(chosen.sample(range(cut.blocks), how.share_of(cut.blocks)))


def _compare(
    result: TensorResult,
    piece: Piece,
    corner: tuple[int, int],
    original: Bits,
    found: Bits,
    foreign: bool,
    largest: int,
) -> None:
    source, output = piece.source.encoding, piece.output.encoding
    same, exact = _same(piece, original, found, foreign, largest)
    right = exact and bool(same.all())
    if right and not result.is_measured:
        return
    before, after = values_of(source, original), values_of(output, found)
    if result.is_measured:
        _measure(result, before, after)
    if not right:
        _record(result, piece, corner, ~same, before, after)


def _measure(result: TensorResult, before: Values, after: Values) -> None:
    """Add the squares of a block's errors and of its source; what is not finite makes them so."""
    with np.errstate(invalid="ignore", over="ignore"):
        result.squared_error += float(np.square(after - before).sum())
        result.squared_source += float(np.square(before).sum())


def _record(
    result: TensorResult, piece: Piece, corner: tuple[int, int], wrong: Mask, before: Values, after: Values
) -> None:
    """Count what is wrong and what is rounded in a block whose first element is at ``corner``."""
    with np.errstate(invalid="ignore"):
        error = np.abs(after - before)
    differs = ~((before == after) | (np.isnan(before) & np.isnan(after)))
    result.wrong += int(np.count_nonzero(wrong))
    result.rounded += int(np.count_nonzero(differs & ~wrong))
    if result.wrong and not wrong.any():
        return  # rounded elements are of no interest next to wrong ones
    shown = wrong if wrong.any() else differs
    if not shown.any():
        return
    if wrong.any() and result.wrong == np.count_nonzero(wrong):
        result.largest_error, result.first_index = 0.0, None  # forget what only rounded
    largest = float(np.max(np.where(np.isnan(error), np.inf, error)[shown]))
    result.largest_error = max(result.largest_error, largest)
    if result.first_index is None:
        row, column = np.unravel_index(int(np.argmax(shown)), shown.shape)
        flat = (corner[0] + int(row)) * piece.output.columns + corner[1] + int(column)
        result.first_index = tuple(int(i) for i in np.unravel_index(flat, piece.shape or (1,)))


def _same(piece: Piece, original: Bits, found: Bits, foreign: bool, largest: int) -> tuple[Mask, bool]:
    """Return where an output is what it must be, and whether what must be is the source's very value.

    ``largest`` is the largest scale of those that share the second scale of NVFP4.
    """
    source, output = piece.source.encoding, piece.output.encoding
    if source == output or any({source, output} <= kinds for kinds in MOVED):
        same = np.equal(original, found)
        if (foreign or piece.by_value) and not same.all() and source in SCALED:
            before, after = values_of(source, original), values_of(output, found)
            same |= (before == after) & (foreign | (np.signbit(before) == np.signbit(after)))
        return same, True
    if source in INTEGERS or output in INTEGERS:
        if source in INTEGERS and output in INTEGERS:
            return np.equal(original, found), True
        return np.zeros(found.shape, np.bool_), False
    expected, exact = _expected(piece, original, found, largest)
    same = np.equal(expected, found)
    if not same.all():
        before = values_of(source, original)
        # Which NaN stands for a NaN is not the source's to say.
        same |= np.isnan(before) & np.isnan(values_of(output, found))
        if foreign and not same.all():
            same |= within_half_step(output, before, found)
    return same, exact


def _tile(piece: Piece) -> int:
    """Return the rows and columns that share a scale in the FP8 of a piece, which a small matrix shows on one side."""
    scale = piece.output.scale
    return FP8_TILE if scale is None else max(scale.block)


def _expected(piece: Piece, original: Bits, found: Bits, largest: int) -> tuple[Bits, bool]:
    """Return the bits that an output must have, and whether they are known to have the source's values.

    FP8 of FP4 follows the tile rule, NVFP4 of FP4 that of its second scale, FP8 and FP4 of floats the published
    quantiser. Of floats that were FP8 or FP4 once, the scale is not known: where a stored element has the source's
    value, it is what it must be.
    """
    source, output = piece.source.encoding, piece.output.encoding
    if source == "fp4" and output == "fp8":
        return fp4_as_fp8_bits(original, _tile(piece))
    if source == "fp4" and output == "fp4/nv":
        return fp4_as_nvfp4_bits(original, largest)
    if output == "affine8" and piece.output.scale is not None:
        return affine8_bits(values_of(source, original), piece.output.scale.block[1]), False
    if output in ("fp8", "fp8/f32", "fp4"):
        values = values_of(source, original)
        if source in SCALED:
            values = values.astype(np.float32).astype(np.float64)  # decoded first
        equal = values == values_of(output, found)
        if equal.all() or output == "fp8/f32" or not np.isfinite(values).all():
            return np.where(equal, found, found + found.dtype.type(1)), True
        scale = piece.output.scale
        block = (FP8_TILE, FP8_TILE) if scale is None else scale.block
        rule = published_fp4_bits(values) if output == "fp4" else published_fp8_bits(values, block)
        return np.where(equal, found, rule), False
    if source in TABLE_BITS and output in FLOATS:
        bits, changed = all_conversions(source, output)
        return np.take(bits, original), not np.take(changed, original).any()
    return bits_of(output, values_of(source, original)), False


def check_fits(piece: Piece) -> None:
    """Check that a piece lies inside both matrices, where blocks of both begin.

    Raises:
        InventoryError: it does not, so that the two cannot be compared.
    """
    for matrix, at in ((piece.output, piece.at), (piece.source, piece.source_at)):
        inside = at[0] + piece.size[0] <= matrix.rows and at[1] + piece.size[1] <= matrix.columns
        width = BLOCK if matrix.encoding in (*FOUR_BIT, "affine8") else STORAGE[matrix.encoding][1]
        blocked = matrix.encoding in (*FOUR_BIT, "affine8", "q8_0", "mxfp4", "nvfp4/e4m3") or matrix.encoding in LOW_BIT
        if not inside or (blocked and (at[1] % width or piece.size[1] % width)):
            raise InventoryError(
                f"tensor {matrix.name}: cannot be compared in parts",
                where=matrix.file,
                expected=f"{list(piece.size)} at {list(at)}",
                got=[matrix.rows, matrix.columns],
            )
