"""Segments of low-bit tensors: cut so that threads share them, each with the importance of its columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..checkpoint.weights import Weight
from ..containers.imatrix import F32_BYTES, Entry, Imatrix, read_imatrix, without_importance
from ..errors import InventoryError, UsageError, counted, some
from ..formats.ggml import Quantiser, find_quantiser
from ..formats.ggml_types import NEED_IMPORTANCE, GgmlType
from ..formats.int4 import PER_WORD
from ..plan import ALL_ROWS, LOW_BIT, Fill, Operand, Quantise, Segment, SquaredWeights, Sums
from .segments import SOURCES, StackedSegments, matrix_shape, operands, shared

# Elements of a segment at most: of the slowest type some seconds' work, so that little is lost with a kill. Tensors of
# fewer than two thousand million are cut finer, so that threads do not wait seconds for the last one at the end, while
# a plan of the largest model stays small.
SEGMENT_ELEMENTS = 2**22
LEAST_SEGMENT_ELEMENTS = 2**20
SEGMENTS_OF_A_TENSOR = 512

MAX_NAMED = 5


@dataclass
class LowBitMaker:
    """Makes the segments of one conversion's low-bit tensors.

    ``ggml_lib`` is ggml's library where the user names one. Importance comes from the file ``imatrix_file``, from the
    weights' own squares where ``squared``, or is the same for all columns. Library and matrix are opened when the
    first tensor wants them; missing and unused entries, and those without any importance, are gathered for the summary.
    """

    ggml_lib: str | None = None
    imatrix_file: str | None = None
    squared: bool = False
    missing: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def is_used(self) -> bool:
        """Return whether any tensor wanted the library."""
        return "quantiser" in self.__dict__

    @cached_property
    def quantiser(self) -> Quantiser:
        """Return ggml's quantisers."""
        return find_quantiser(None if self.ggml_lib is None else Path(self.ggml_lib))

    @cached_property
    def imatrix(self) -> Imatrix | None:
        """Return the importance matrix, if there is one."""
        return None if self.imatrix_file is None else read_imatrix(Path(self.imatrix_file))

    def segments(self, name: str, entry_name: str, weights: Sequence[Weight], to: GgmlType) -> Sequence[Segment]:
        """Return the segments of the tensor ``name``: one weight, or a layer's experts in order.

        ``entry_name`` is the tensor's name in a file of the whole model, which importance matrices use.

        Raises:
            UsageError: the type needs importance, and there is none.
            InventoryError: the entry has another size.
            DeviceError: ggml's library is missing, or does not have the type.
        """
        entry = self._entry(name, entry_name, weights, to)
        self.quantiser.check(to.name)
        most = segment_elements(sum(math.prod(weight.shape) for weight in weights))
        made: list[Segment] = []
        for number, weight in enumerate(weights):
            made += self._of_matrix(weight, to, entry, number, most)
        if len(made) > 1 and len({(s.operation, s.rows, s.row_bytes, _shape(s)) for s in made}) == 1:
            return StackedSegments(made[0], [operand for segment in made for operand in segment.operands])
        return tuple(made)

    def _entry(self, name: str, entry_name: str, weights: Sequence[Weight], to: GgmlType) -> Entry | None:
        entry = None if self.imatrix is None else self.imatrix.entries.get(entry_name)
        _, columns = matrix_shape(weights[0].shape)
        if self.imatrix is not None and entry is not None:
            self.used.add(entry_name)
            wanted = columns * len(weights)
            if entry.values != wanted or (not entry.is_legacy and len(entry.counts) not in (1, len(weights))):
                raise InventoryError(
                    f"importance of {entry_name}: another size",
                    where=self.imatrix.path,
                    expected=f"{len(weights)} x {columns} values" if len(weights) > 1 else f"{columns} values",
                    got=f"{len(entry.counts)} x {entry.columns}" if len(entry.counts) > 1 else entry.values,
                    hint="was the matrix made from another model?",
                )
            if entry_name in self.imatrix.with_zeros:
                numbers = without_importance(entry, len(weights))
                is_stack = len(weights) > 1
                self.without += [f"{entry_name}, expert {n}" if is_stack else entry_name for n in numbers]
            return entry
        if not self.squared and to.name in NEED_IMPORTANCE:
            what = f"tensor {name}: {to.name} needs importance"
            if self.imatrix is not None:
                raise UsageError(f"{what}, and the matrix has no entry", where=self.imatrix.path, hint=_OTHER_TYPE)
            raise UsageError(what, hint=f"pass --imatrix FILE or --importance weights; {_OTHER_TYPE}")
        if self.imatrix is not None:
            self.missing.append(entry_name)
        return None

    def _of_matrix(self, weight: Weight, to: GgmlType, entry: Entry | None, number: int, most: int) -> list[Segment]:
        rows, columns = matrix_shape(weight.shape)
        importance: Sums | SquaredWeights | None = None
        serves_all: tuple[Operand, ...] = ()
        if entry is not None:
            count = entry.counts[number] if len(entry.counts) > 1 else entry.counts[0]
            importance = Sums(count, entry.is_legacy)
            row_bytes = columns * F32_BYTES
            serves_all = (Operand(entry.file, entry.offset + number * row_bytes, row_bytes, ALL_ROWS, "<f4"),)
        elif self.squared:
            importance = SquaredWeights()
            serves_all = tuple(_in_one_row(operand, rows) for operand in operands(weight))
        operation = Quantise(SOURCES[weight.encoding], LOW_BIT[to.name], weight.block, self.quantiser.path, importance)
        height = 1 if weight.block is None else weight.block[0]
        if weight.zero is not None:
            height = math.lcm(height, PER_WORD)
        step = _rows_of_a_segment(rows, columns, height, most)
        row_bytes = shared(to.row_bytes(columns))
        return [
            Segment(operation, (*operands(weight, first), *serves_all), min(step, rows - first), row_bytes)
            for first in range(0, rows, step)
        ]

    def notes(self) -> tuple[str, ...]:
        """Return what of the importance matrix was not used, and what it did not have."""
        notes = []
        if self.missing:
            names = some(self.missing, MAX_NAMED)
            how = "by the squares of their weights" if self.squared else "alike"
            notes.append(f"no importance for {counted(len(self.missing))}, whose columns count {how}: {names}")
        if self.without:
            names = some(self.without, MAX_NAMED)
            which = counted(len(self.without), "matrix", "matrices")
            notes.append(f"importance of 0 for all columns of {which}, which count alike: {names}")
        if self.imatrix is not None:
            unused = [name for name in self.imatrix.entries if name not in self.used]
            if unused:
                what = f"{counted(len(unused), 'entry', 'entries')} of {self.imatrix.path.name}"
                notes.append(f"not needed: {what}: {some(unused, MAX_NAMED)}")
        return tuple(notes)


class SizesOnly(LowBitMaker):
    """In place of ``LowBitMaker`` where nothing is made: segments of the right size, without ggml's library."""

    def segments(self, name: str, entry_name: str, weights: Sequence[Weight], to: GgmlType) -> Sequence[Segment]:
        """Return one segment of the tensor's size."""
        rows, columns = matrix_shape(weights[0].shape)
        return (Segment(Fill(0), (), rows * len(weights), to.row_bytes(columns)),)


_OTHER_TYPE = "or choose another type for it with --tensor-type"


def _in_one_row(operand: Operand, rows: int) -> Operand:
    """Return the operand of ``rows`` rows of output as one row that serves all of them."""
    return operand._replace(row_bytes=shared(-(-rows // operand.rows_per) * operand.row_bytes), rows_per=ALL_ROWS)


def _shape(segment: Segment) -> tuple[tuple[int, int, str], ...]:
    return tuple((operand.row_bytes, operand.rows_per, operand.dtype) for operand in segment.operands)


def segment_elements(elements: int) -> int:
    """Return how many elements a segment of a tensor of ``elements`` has at most.

    >>> segment_elements(2**20) == segment_elements(2**29) == 2**20, segment_elements(2**30) == 2**21
    (True, True)
    >>> segment_elements(2**31) == segment_elements(2**33) == 2**22
    True
    """
    return min(SEGMENT_ELEMENTS, max(LEAST_SEGMENT_ELEMENTS, elements // SEGMENTS_OF_A_TENSOR))


def _rows_of_a_segment(rows: int, columns: int, height: int, most_elements: int) -> int:
    """Return the rows of equal segments: whole scale blocks, the last one shorter where it must be.

    A stack of experts wants all segments of a tensor equal, so parts that divide the rows come first.
    """
    most = max(1, most_elements // columns)
    if rows <= most:
        return rows
    for parts in range(-(-rows // most), 4 * -(-rows // most)):
        if rows % parts == 0 and (rows // parts) % height == 0:
            return rows // parts
    return max(height, most // height * height)
