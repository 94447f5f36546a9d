"""Tensors of ggml's low-bit types: decoded, and quantised anew by ggml's own library.

A row is quantised by itself, so any rows can be made again: with the same importance of columns their bytes must be
those in the file. Without the library, or without the importance matrix that a file was made with, the rows' error is
all that can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..containers.imatrix import F32_BYTES, Entry, importance
from ..formats.ggml import Quantiser
from ..formats.ggml_decode import dequantise
from ..formats.ggml_types import BY_NAME, NEED_IMPORTANCE, QUANTISED
from .matrix import Bytes, Matrix, read_at, read_bits
from .numbers import Mask, Values, values_of

LOW_BIT = frozenset(QUANTISED)

# Elements of the rows that are quantised together.
ROWS_ELEMENTS = 2**17

# How far the error of a row may be from what is usual, where nobody can tell what it must be: as a multiple of
# 2^-(bits an element), the error of an ideal quantiser of normally distributed values, and at most this part of the
# row's own size. Rows of another matrix are further away, by the square root of 2.
USUAL_ERRORS = 8.0
LARGEST_RELATIVE_ERROR = 1.2
# What is allowed to every element, since scales are float16: its smallest positive value times 16.
SMALLEST_STEP = 2.0**-20
# Another program's rounding: its error in a row is at most this multiple of the library's own.
FOREIGN_ERRORS = 2.0

Weights = npt.NDArray[np.float32] | None


class ImportanceOf(NamedTuple):
    """The entry of an importance matrix that is about a tensor, and which expert's part of it a piece wants."""

    entry: Entry
    expert: int


def decode(kind: str, raw: Bytes) -> Values:
    """Return the values of rows [rows, row bytes] of a low-bit type."""
    values: Values = dequantise(kind, raw).astype(np.float64)
    return values


class RowCheck:
    """Says of rows of one matrix which elements are wrong.

    ``quantiser`` makes the bytes that rows must have; None where nobody can tell them, and the rows' error decides.
    """

    def __init__(
        self, source: Matrix, kind: str, of: ImportanceOf | None, quantiser: Quantiser | None, *, foreign: bool
    ) -> None:
        self._source = source
        self._kind = BY_NAME[kind]
        self._of = of
        self._quantiser = quantiser
        self._foreign = foreign
        self._known: list[Weights] = []

    def wrong(self, before: Values, after: Values, raw: Bytes, *, whole_rows: bool) -> Mask:
        """Return where elements are not what they must be.

        ``before`` [rows, columns] are the source's values, ``after`` those of the output, ``raw`` its bytes.
        """
        wrong = ~(np.isfinite(after) & np.isfinite(before))
        if wrong.any():
            return wrong
        if self._quantiser is None or not whole_rows:
            return wrong | _beyond(_norm(after - before), self._largest_error(before))
        made = self._again(self._quantiser, before, raw)
        if not self._foreign:
            return self._other_blocks(raw, made)
        allowed = FOREIGN_ERRORS * _norm(decode(self._kind.name, made) - before)
        same = ~self._other_blocks(raw, made)
        return _beyond(_norm(after - before), allowed + self._smallest(before)) & ~same

    def _other_blocks(self, raw: Bytes, made: Bytes) -> Mask:
        differ = (raw != made).reshape(len(raw), -1, self._kind.nbytes).any(axis=2)
        spread: Mask = np.repeat(differ, self._kind.elements, axis=1)
        return spread

    def _again(self, quantiser: Quantiser, before: Values, raw: Bytes) -> Bytes:
        """Return the bytes that ggml's library makes of rows.

        A file does not say whether the weights' own squares served as importance: where no matrix did, bytes made
        with them are right, and so are those made without.
        """
        if not self._known:
            self._known = [self._usual_weights()]
        made = self._quantised(quantiser, before, self._known[0])
        if np.array_equal(raw, made) or self._of is not None or self._kind.name in NEED_IMPORTANCE:
            return made
        if len(self._known) == 1:
            self._known.append(self._squared_weights())
        other = self._quantised(quantiser, before, self._known[1])
        if np.count_nonzero(raw == other) <= np.count_nonzero(raw == made):
            return made
        self._known.reverse()  # the likelier one first
        return other

    def _usual_weights(self) -> Weights:
        if self._of is None:
            return self._squared_weights() if self._kind.name in NEED_IMPORTANCE else None
        entry, expert = self._of
        nbytes = self._source.columns * F32_BYTES
        raw = read_at(entry.file, entry.offset + expert * nbytes, nbytes)
        count = entry.counts[expert] if len(entry.counts) > 1 else entry.counts[0]
        return np.ascontiguousarray(importance(raw.view("<f4"), count, entry.is_legacy))

    def _squared_weights(self) -> Weights:
        """Return the sum over the source's rows of the squares of each column, of values as float32 as for a file."""
        total = np.zeros(self._source.columns)
        for values in rows_of(self._source):
            total += np.square(values.astype(np.float32), dtype=np.float64).sum(axis=0)
        return total.astype(np.float32)

    def _quantised(self, quantiser: Quantiser, before: Values, weights: Weights) -> Bytes:
        rows, columns = before.shape
        made = np.empty((rows, columns // self._kind.elements * self._kind.nbytes), np.uint8)
        quantiser.quantise(self._kind.name, np.ascontiguousarray(before, np.float32), made, weights)
        return made

    def _largest_error(self, before: Values) -> Values:
        bits = 8 * self._kind.nbytes / self._kind.elements
        relative = min(USUAL_ERRORS * 2.0**-bits, LARGEST_RELATIVE_ERROR)
        if self._kind.name.startswith("tq"):  # made for three values, not for a choice of them
            relative = LARGEST_RELATIVE_ERROR
        largest: Values = relative * _norm(before) + self._smallest(before)
        return largest

    def _smallest(self, before: Values) -> float:
        return float(SMALLEST_STEP * np.sqrt(before.shape[1]))


def _norm(values: Values) -> Values:
    """Return the root of the sum of squares of each row, [rows, 1]."""
    norm: Values = np.sqrt(np.square(values).sum(axis=1, keepdims=True))
    return norm


def _beyond(error: Values, allowed: Values) -> Mask:
    beyond: Mask = error > allowed
    return beyond


def rows_of(matrix: Matrix) -> Iterator[Values]:
    """Yield the values of all rows of a source matrix, a few at a time."""
    block = 1 if matrix.scale is None else matrix.scale.block[0]
    step = max(1, ROWS_ELEMENTS // matrix.columns // block) * block
    for first in range(0, matrix.rows, step):
        rows = first, min(first + step, matrix.rows)
        yield values_of(matrix.encoding, read_bits(matrix, rows, (0, matrix.columns)))
