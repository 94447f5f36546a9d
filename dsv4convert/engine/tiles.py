"""One worker: makes a segment tile by tile, in buffers that stay in the processor's cache."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import InputOutputError
from ..formats.backend import Codecs
from ..formats.base import Tally
from ..plan import COPY, Operand, Segment
from .codecs import TILE_CODECS, WITHIN_BLOCK_CODECS
from .cuda import scratch_for
from .files import DescriptorCache, os_errors, write_all

# Source plus output bytes of a tile: small enough for the caches, large enough that two writers seldom wait
# for each other at the one file that both write (benchmarks/hf_to_gguf.py: 15 % faster than 512 KiB).
TILE_BYTES = 2**20
COPY_TILE_BYTES = 2**20

# Chunks by which each way of copying is tried, before the quicker is kept.
COPY_TRIALS = 8

# copy_file_range is refused across some file systems and on old kernels.
REFUSED = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})


class CopyWays:
    """Which way bytes are copied: by the kernel, or from the buffer in which they lie for their checksum.

    Where a file system shares blocks or a server copies by itself, the kernel's way costs nothing. Elsewhere
    it copies as often as a write does, and takes a seventh longer (benchmarks/shard.py, in memory). So both
    are tried in turn on whole chunks, the kernel's first, and the quicker is kept, by medians.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._by_kernel: bool | None = None

    def by_kernel(self) -> bool:
        """Return the way to take next."""
        if self._by_kernel is not None:
            return self._by_kernel
        return len(self._seconds[True]) <= len(self._seconds[False])

    def took(self, by_kernel: bool, seconds: float) -> None:
        """Note how long a whole chunk took."""
        if self._by_kernel is None:
            self._seconds[by_kernel].append(seconds)
            if all(len(seconds) >= COPY_TRIALS for seconds in self._seconds.values()):
                # statistics.median would cost ten milliseconds of import.
                middle = {way: sorted(seconds)[COPY_TRIALS // 2] for way, seconds in self._seconds.items()}
                self._by_kernel = middle[True] <= middle[False]


class Worker:
    """Reads, converts and writes segments; owns its buffers and descriptors and shares nothing."""

    def __init__(self, codecs: Codecs, descriptors: DescriptorCache, tile_bytes: int = TILE_BYTES) -> None:
        self._codecs = codecs
        self._descriptors = descriptors
        self._tile_bytes = tile_bytes
        self._scratch = scratch_for(codecs)
        self._can_copy_in_kernel = hasattr(os, "copy_file_range")
        self._ways = CopyWays()
        self.done_bytes = 0
        self.stopped = False

    def run(self, segment: Segment, path: Path, offset: int) -> tuple[bytes, Tally]:
        """Make ``segment`` at ``offset`` of ``path``; return its xxh3-128 digest and what was counted.

        Raises:
            InputOutputError, SpaceError: the system refused a read or a write, or the source was cut short.
        """
        tally = Tally()
        digest = xxhash.xxh3_128()
        output = self._descriptors.get(path, os.O_RDWR)
        if segment.codec == COPY:
            self._copy(segment, path, output, offset, digest)
        else:
            self._convert(segment, path, output, offset, digest, tally)
        return digest.digest(), tally

    def _convert(
        self, segment: Segment, path: Path, output: int, offset: int, digest: xxhash.xxh3_128, tally: Tally
    ) -> None:
        codec = TILE_CODECS[segment.codec]
        step = rows_per_tile(segment, self._tile_bytes)
        for first in range(0, segment.rows, step):
            if self.stopped:
                return
            rows = min(step, segment.rows - first)
            inputs = [
                self._read(index, operand, first, rows) for index, operand in enumerate(segment.operands)
            ]
            out = self._scratch.array("output", (rows, segment.row_bytes), np.uint8)
            codec(self._codecs, inputs, out, segment.args, self._scratch, tally)
            digest.update(out.data)
            with os_errors(path, "written"):
                write_all(output, out.data, offset + first * segment.row_bytes)
            self.done_bytes += out.nbytes

    def _read(self, index: int, operand: Operand, first: int, rows: int) -> NDArray[Any]:
        """Return the rows of an operand that serve output rows first..first+rows."""
        begin = first // operand.rows_per
        count = -(-(first + rows) // operand.rows_per) - begin
        tile = self._scratch.array(f"input {index}", (count, operand.row_bytes), np.uint8)
        self._read_into(operand.file, operand.offset + begin * operand.row_bytes, tile)
        return tile.view(operand.dtype)

    def _read_into(self, file: Path, offset: int, buffer: NDArray[np.uint8]) -> None:
        view = buffer.data.cast("B")
        with os_errors(file, "read"):
            descriptor = self._descriptors.get(file, os.O_RDONLY)
            while view.nbytes:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise InputOutputError(
                        "the file became shorter while it was read",
                        where=file,
                        hint="was it replaced during the run?",
                    )
                view = view[count:]
                offset += count

    def _copy(self, segment: Segment, path: Path, output: int, offset: int, digest: xxhash.xxh3_128) -> None:
        """Copy bytes the quicker way (see ``CopyWays``), with a look at each chunk for the checksum while it is hot."""
        operand = segment.operands[0]
        for begin in range(0, segment.rows, COPY_TILE_BYTES):
            if self.stopped:
                return
            size = min(COPY_TILE_BYTES, segment.rows - begin)
            chunk = self._scratch.array("copy", (size,), np.uint8)
            self._read_into(operand.file, operand.offset + begin, chunk)
            by_kernel = self._ways.by_kernel()
            started = time.perf_counter()
            with os_errors(path, "written"):
                if not (by_kernel and self._copy_in_kernel(operand, begin, output, offset + begin, size)):
                    write_all(output, chunk.data, offset + begin)
            if size == COPY_TILE_BYTES:
                self._ways.took(by_kernel, time.perf_counter() - started)
            digest.update(chunk.data)
            self.done_bytes += size

    def _copy_in_kernel(self, operand: Operand, begin: int, output: int, offset: int, size: int) -> bool:
        """Return whether ``copy_file_range`` moved the chunk."""
        if not self._can_copy_in_kernel:
            return False
        source = self._descriptors.get(operand.file, os.O_RDONLY)
        done = 0
        while done < size:
            try:
                moved = os.copy_file_range(
                    source, output, size - done, operand.offset + begin + done, offset + done
                )
            except OSError as error:
                if error.errno in REFUSED:
                    self._can_copy_in_kernel = False
                    return False
                raise
            if moved == 0:
                return False
            done += moved
        return True


def rows_per_tile(segment: Segment, tile_bytes: int) -> int:
    """Return how many output rows a tile takes: whole scale blocks, or a part of one that divides it evenly.

    Rows of 16,384 elements make a block of 128 rows larger than a cache; all rows of a part share the
    block's scales, which are read again for each part. Codecs that need whole blocks get them.
    """
    alignment = math.lcm(*(operand.rows_per for operand in segment.operands))
    row_cost = segment.row_bytes + sum(operand.row_bytes / operand.rows_per for operand in segment.operands)
    fitting = int(tile_bytes / row_cost)
    if fitting >= alignment:
        return fitting // alignment * alignment
    if segment.codec not in WITHIN_BLOCK_CODECS:
        return alignment
    part = alignment
    while part > fitting and part % 2 == 0:
        part //= 2
    return part
