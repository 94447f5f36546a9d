"""One worker: makes a segment tile by tile, in buffers that stay in the processor's cache.

The compiled library makes the tiles that it can (see ``compiled_segments``); the others are made here, and all of them
where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..containers.sources import at
from ..containers.untrusted import fill
from ..containers.wide_scales import read_wide
from ..formats.backend import Codecs
from ..formats.base import Scratch, Tally
from ..formats.compiled.segments import Control
from ..formats.not_finite import element_bytes
from ..plan import Copy, Operand, Quantise, Segment, SquaredWeights
from .column_sums import ColumnSums, SharedSums
from .compiled_segments import CompiledSegments, Known
from .kernel_copy import KernelCopier
from .mappings import Mappings
from .operations import COPY_TILE_BYTES, TILE_BYTES, as_f32, make_tile, rows_per_tile, squares, tile_operands
from .outputs import DescriptorCache, os_errors, write_all
from .ranges import RangeReader

MAX_ELEMENT_BYTES = 8

# Segments that are known before their turn: those of a tensor, which come right after those of another.
MAX_KNOWN = 4

# Bytes of a tile that tell, as a rule, that it is not all zero.
FIRST_BYTES = 64


class Made(NamedTuple):
    """A segment that has been made: its xxh3-128 digest, and what was counted.

    ``zeros`` has bit N set where every byte that was read of operand N is zero.
    """

    digest: bytes
    tally: Tally
    zeros: int = 0


class Worker:
    """Reads, converts and writes segments; owns its buffers, descriptors and pipes.

    ``copies`` are what repeated copies were found to be, which all workers share: the first worker at one looks at its
    bytes, and the others need not. They share ``mappings`` and the ``sums`` of matrices, too. With ``drops``, bytes
    that the library moves do not stay in the page cache.
    """

    def __init__(
        self,
        codecs: Codecs,
        descriptors: DescriptorCache,
        kernel: KernelCopier,
        copies: dict[Segment, Made],
        mappings: Mappings,
        tile_bytes: int = TILE_BYTES,
        ranges: RangeReader | None = None,
        *,
        sums: SharedSums | None = None,
        drops: bool = False,
    ) -> None:
        self._codecs = codecs
        self._ranges = ranges
        self._descriptors = descriptors
        self._tile_bytes = tile_bytes
        self._scratch = Scratch()
        self._kernel = kernel
        self._copies = copies
        self._all_sums = SharedSums() if sums is None else sums
        self._sums: ColumnSums | None = None
        self.file: int | None = None  # the number of the output file in work
        self._control = Control(stopped=False, done_bytes=0)
        self._known: dict[Segment, Known] = {}
        self._compiled = CompiledSegments(
            codecs, self._scratch, descriptors, self._control, mappings, tile_bytes, drops=drops
        )

    def share(self, workers: int) -> None:
        """Note how many workers are in the output that is next."""
        self._compiled.sharers = workers

    @property
    def done_bytes(self) -> int:
        """Return the bytes written so far."""
        return self._control.done_bytes

    @property
    def stopped(self) -> bool:
        """Return whether the worker is to end before its next tile."""
        return bool(self._control.stopped)

    @stopped.setter
    def stopped(self, stopped: bool) -> None:
        """Let the worker end, or go on."""
        self._control.stopped = stopped

    def run(self, segment: Segment, output: int, path: Path, offset: int) -> Made:
        """Make ``segment`` at ``offset`` of an open file.

        ``path`` is the file's name, for errors.

        Raises:
            InputOutputError, SpaceError: the system refused a read or a write, or the source was cut short.
        """
        if self._ranges is not None:
            self._ranges.begin(segment)
        known = self._known.pop(segment, None) if self._known else None
        if known is not None:
            return self._write_known(known, path, output, offset)
        if isinstance(segment.operation, Copy):
            return self._copy(segment, segment.operation, path, output, offset)
        return self._convert(segment, path, output, offset)

    def look(self, segment: Segment, output: int, path: Path, offset: int) -> Made:
        """Read a copy that is in the output already, for its digest and its counts; see ``run``.

        Raises:
            InputOutputError: the system refused, or the file was cut short.
        """
        holds = segment.operation.holds if isinstance(segment.operation, Copy) else ""
        digest, tally, zeros = xxhash.xxh3_128(), Tally(), 1
        chunk = self._scratch.array("copy", (min(COPY_TILE_BYTES, segment.rows),), np.uint8)
        done = 0
        while done < segment.rows and not self.stopped:
            seen = chunk[: segment.rows - done]  # whole elements: a tile is a multiple of each
            with os_errors(path, "read"):
                fill(seen.data, output, offset + done, path)
            digest.update(seen.data)
            zeros = zeros and int(is_zero(seen))
            self._count(holds, chunk[:0], seen, tally)
            done += len(seen)
            self._control.done_bytes += len(seen)
        return Made(digest.digest(), tally, zeros)

    def _convert(self, segment: Segment, path: Path, output: int, offset: int) -> Made:
        tally = Tally()
        operands = tile_operands(segment)
        # Scales of another type are not what lies in the file once they are read.
        zeros = {number for number, operand in enumerate(operands) if operand.scale_form is None}
        operation = segment.operation
        weights = self._column_weights(segment, operands)
        compiled = None
        if not self._is_remote(segment):
            compiled = self._compiled.begin(segment, output, offset, weights=weights)
        digest = xxhash.xxh3_128() if compiled is None else compiled.digest
        first = 0 if compiled is None else compiled.make(0)
        if compiled is not None and first == segment.rows and (known := compiled.known()) is not None:
            if len(self._known) == MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known.update([known])
        if first < segment.rows:
            step = rows_per_tile(segment, self._tile_bytes)
        while first < segment.rows and not self.stopped:
            rows = min(step, segment.rows - first)
            inputs = self._inputs(operands, first, rows, follows=first > 0 and compiled is None)
            if weights is not None:
                inputs.append(weights)
            zeros = {number for number in zeros if is_zero(inputs[number])}
            out = self._scratch.array("output", (rows, segment.row_bytes), np.uint8)
            make_tile(operation, self._codecs, inputs, out, self._scratch, tally)
            digest.update(out.data)
            with os_errors(path, "written"):
                write_all(output, out.data, offset + first * segment.row_bytes)
            self._control.done_bytes += out.nbytes
            first += rows
            if compiled is not None:
                first = compiled.make(first)
        zero_bits = sum(1 << number for number in zeros)
        if compiled is not None:
            compiled.add_counts(tally)
            zero_bits &= compiled.zeros
        return Made(digest.digest(), tally, zero_bits)

    def _write_known(self, known: Known, path: Path, output: int, offset: int) -> Made:
        """Write a segment that came with another, which need not be read again."""
        with os_errors(path, "written"):
            write_all(output, known.content.data, offset)
        self._control.done_bytes += known.content.nbytes
        return Made(xxhash.xxh3_128_digest(known.content.data), Tally(), known.zeros)

    def _is_remote(self, segment: Segment) -> bool:
        return self._ranges is not None and any(at(operand.file) is not None for operand in segment.operands)

    def _inputs(
        self, operands: Sequence[Operand], first: int, rows: int, *, follows: bool = False
    ) -> list[NDArray[Any]]:
        """Return the operands' tiles; ``follows`` a tile of the same segment that was read here as well."""
        return [self._read(index, operand, first, rows, follows=follows) for index, operand in enumerate(operands)]

    def _column_weights(self, segment: Segment, mine: tuple[Operand, ...]) -> NDArray[np.float32] | None:
        """Return the weights of columns that an operation goes by, whose own operands are behind ``mine``."""
        operation = segment.operation
        if not isinstance(operation, Quantise) or operation.importance is None:
            return None
        if isinstance(operation.importance, SquaredWeights):
            return self._squared_weights(segment, operation, mine)
        from ..containers.imatrix import importance  # loads gguf, which only this needs

        sums = self._read(len(mine), segment.operands[-1], 0, 1, follows=False).reshape(-1)
        return importance(sums, operation.importance.count, operation.importance.is_legacy)

    def _squared_weights(self, segment: Segment, operation: Quantise, mine: tuple[Operand, ...]) -> NDArray[np.float32]:
        """Return the weights of columns that are the squares of all rows of the matrix."""
        step = rows_per_tile(segment, self._tile_bytes)
        whole = segment.operands[len(mine) :]
        matrix = [
            operand._replace(file=all_rows.file, offset=all_rows.offset)
            for operand, all_rows in zip(mine, whole, strict=True)
        ]
        rows = whole[0].row_bytes // mine[0].row_bytes

        def take(part: int) -> NDArray[np.float64]:
            first = part * step
            inputs = self._inputs(matrix, first, min(step, rows - first))
            return squares(as_f32(operation, self._codecs, inputs, self._scratch, Tally()))

        self._sums = self._all_sums.of(whole, -(-rows // step))
        return self._sums.get(take, lambda: self.stopped)

    def _read(self, index: int, operand: Operand, first: int, rows: int, *, follows: bool) -> NDArray[Any]:
        """Return the rows of an operand that serve output rows first..first+rows."""
        begin = first // operand.rows_per
        count = -(-(first + rows) // operand.rows_per) - begin
        tile = self._scratch.array(f"input {index}", (count, operand.row_bytes), np.uint8)
        offset = operand.offset + begin * operand.row_bytes
        # An operand's first row serves every tile that ends within its output rows, and is there since the first.
        if not (follows and first + rows <= operand.rows_per):
            self._read_into(operand.file, offset, tile)
        if operand.scale_form is not None:
            return read_wide(tile, operand.scale_form, operand.file, offset, self._scratch, f"scales {index}")
        return tile.view(operand.dtype)

    def _read_into(self, file: Path, offset: int, buffer: NDArray[np.uint8]) -> None:
        if self._ranges is not None and self._ranges.read_into(file, offset, buffer.data.cast("B")):
            return
        with os_errors(file, "read"):
            descriptor = self._descriptors.get(file, os.O_RDONLY)
            fill(buffer.data.cast("B"), descriptor, offset, file)

    def _copy(self, segment: Segment, operation: Copy, path: Path, output: int, offset: int) -> Made:
        """Copy bytes as they are, in the kernel where it can (see ``kernel_copy``)."""
        operand = segment.operands[0]
        known = self._copies.get(segment) if operation.is_repeated else None
        compiled = None
        is_remote = self._is_remote(segment)
        if not is_remote:
            compiled = self._compiled.begin(segment, output, offset, with_digest=known is None)
        digest = xxhash.xxh3_128() if compiled is None else compiled.digest
        tally, zeros = Tally(), 1
        done = 0
        if compiled is not None:
            done = compiled.make(0)
            compiled.add_counts(tally)
            zeros = compiled.zeros
        chunk = self._scratch.array("copy", (min(COPY_TILE_BYTES, segment.rows - done),), np.uint8)
        source = -1 if is_remote else self._descriptors.get(operand.file, os.O_RDONLY)
        cut = chunk[:0]  # the first bytes of an element that the kernel moved in two parts
        while done < segment.rows and not self.stopped:
            begin = operand.offset + done
            seen = chunk[: segment.rows - done]
            if is_remote:
                moved = 0
            elif known is None:
                moved = self._kernel.copy_and_show(source, begin, output, offset + done, seen.data)
            else:
                moved = self._kernel.copy(source, begin, output, offset + done, seen.nbytes)
            if not moved:
                self._read_into(operand.file, begin, seen)
                with os_errors(path, "written"):
                    write_all(output, seen.data, offset + done)
                moved = seen.nbytes
            if known is None:
                digest.update(seen[:moved].data)
                zeros = zeros and int(is_zero(seen[:moved]))
                cut = self._count(operation.holds, cut, seen[:moved], tally)
            done += moved
            self._control.done_bytes += moved
        if known is not None:
            return known
        made = Made(digest.digest(), tally, zeros)
        if operation.is_repeated and done == segment.rows:
            self._copies[segment] = made
        return made

    def _count(self, holds: str, cut: NDArray[np.uint8], seen: NDArray[np.uint8], tally: Tally) -> NDArray[np.uint8]:
        """Count the elements of copied bytes that are not finite; return the bytes of a last one that is cut."""
        content = np.concatenate((cut, seen)) if len(cut) else seen
        scratch = self._scratch.array("magnitudes", (COPY_TILE_BYTES + MAX_ELEMENT_BYTES,), np.uint8)
        tally.nan += self._codecs.count_not_finite(holds, content, scratch)
        left = len(content) % element_bytes(holds)
        return content[len(content) - left :].copy() if left else content[:0]


def is_zero(tile: NDArray[Any]) -> bool:
    """Return whether every byte of a tile is zero; one look tells, as a rule, that not."""
    content = tile.reshape(-1).view(np.uint8)
    return not content[:FIRST_BYTES].any() and not content.max(initial=0)
