"""Decodes stored matrices to float32: all of their rows, a run of rows, or a choice of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from ...containers.sources import SequentialReader, at, prefetch
from ...containers.untrusted import open_regular
from ...containers.wide_scales import bits_of, read_wide
from ...errors import FileFormatError, InputOutputError, not_read
from ...formats.base import Scratch, Tally
from ...formats.bf16 import bf16_to_f32
from ...formats.e2m1 import fp4_to_f32
from ...formats.e4m3 import fp8_to_f32
from ...formats.ggml_decode import dequantise
from ...formats.ggml_types import BY_NAME
from ...formats.int4 import PER_WORD, int4_to_float, unpack_zeros
from ...formats.mxfp4 import mxfp4_to_f32
from ...formats.q8_0 import q8_0_to_f32
from ...scale_forms import ScaleForm
from .protocol import Array

# Decoded bytes of a tile: it and the codecs' scratch space, a few times as large, stay in the cache.
TILE_BYTES = 2**20
F32_BYTES = 4

# A matrix of more decoded bytes than this is divided among threads; numpy's loops run side by side.
THREADED_BYTES = 8 * 2**20
MAX_THREADS = 8

# Of a remote matrix, chosen rows that are no further apart are fetched in one request, with what is between them.
GAP_BYTES = 2**16

# Bytes of a row by kind of storage: those of ggml's types, and of the two that have scales next to them.
GGML_KINDS = {name: kind for name, kind in BY_NAME.items() if name not in ("q8_1", "q8_k", "i8", "i16", "f64")}
# "fp8/row": an n-gram table's row of E4M3 codes, and behind them its E8M0 scales, one for so many elements.
ROW_SCALE_ELEMENTS = 32
SCALE_DTYPES: dict[str, np.dtype[Any]] = {"F8_E8M0": np.dtype(np.uint8), "F32": np.dtype("<f4")}
TABLES = ("i32", "i64")
PLAIN_DTYPES = {"f16": "<f2", "f32": "<f4", "i32": "<i4", "i64": "<i8"}
SCALED = {"fp4": fp4_to_f32, "fp8": fp8_to_f32}


class Scale(NamedTuple):
    """Scales [r, c] of a matrix, row-major at ``offset``; each is for a ``block`` of rows and columns.

    ``wide`` is the type of the file where it holds E8M0 scales as F32 or BF16.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, int]
    block: tuple[int, int]
    scale_form: ScaleForm | None = None

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of scales in the file."""
        bits = SCALE_DTYPES[self.dtype] if self.scale_form is None else bits_of(self.scale_form)
        return self.shape[1] * bits.itemsize

    def decoded(self, raw: Array, first: int) -> Array:
        """Return bytes of rows of the file, of which the first is row ``first``, as E8M0 bytes or float32.

        Raises:
            InventoryError: E8M0 in a wider type, and one is no power of two.
        """
        if self.scale_form is not None:
            return read_wide(raw, self.scale_form, self.file, self.offset + first * self.row_bytes, Scratch())
        return raw.view(SCALE_DTYPES[self.dtype])


class Zero(NamedTuple):
    """Zero points of INT4: 32-bit words [rows / 8, groups], row-major at ``offset``; each is for eight rows."""

    file: Path
    offset: int
    groups: int

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of words."""
        return self.groups * F32_BYTES

    def of_rows(self, indices: Array) -> Array:
        """Return the zero points [rows, groups] of some rows."""
        first = int(indices.min()) // PER_WORD
        last = int(indices.max()) // PER_WORD + 1
        raw = _read_rows(self, first, last)
        zeros = unpack_zeros(raw.view("<i4").reshape(last - first, -1), (last - first) * PER_WORD)
        chosen: Array = zeros[indices - first * PER_WORD]
        return chosen


class Factor(NamedTuple):
    """One float32 at ``offset`` that all elements of a matrix are multiplied by: a second scale of NVFP4."""

    file: Path
    offset: int
    row_bytes: int = F32_BYTES

    def value(self) -> float:
        """Return the number."""
        return float(_read_rows(self, 0, 1).view("<f4")[0])


class Matrix(NamedTuple):
    """Rows of ``columns`` elements each, row-major at ``offset`` of ``file``, stored as ``kind``.

    ``zero`` are the zero points that INT4 may have, ``factor`` is what ggml's NVFP4 is multiplied by.
    """

    file: Path
    offset: int
    kind: str
    rows: int
    columns: int
    scale: Scale | None = None
    zero: Zero | None = None
    factor: Factor | None = None

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row."""
        match self.kind:
            case "fp4" | "int4":
                return self.columns // 2
            case "fp8":
                return self.columns
            case "fp8/row":
                return self.columns + self.columns // ROW_SCALE_ELEMENTS
        return GGML_KINDS[self.kind].row_bytes(self.columns)

    @property
    def is_table(self) -> bool:
        """Return whether the elements are integers."""
        return self.kind in TABLES

    def row_slice(self, first: int, count: int) -> Matrix:
        """Return ``count`` rows from ``first`` on, of a matrix without scales."""
        return self._replace(offset=self.offset + first * self.row_bytes, rows=count)


def read_rows(matrix: Matrix, first: int = 0, last: int | None = None) -> Array:
    """Return rows ``first`` to ``last`` (exclusive) as float32, or int64 for a table.

    Raises:
        InputMissingError, InputOutputError, FileFormatError: the file is not there, unreadable, too short.
    """
    last = matrix.rows if last is None else last
    out = np.empty((last - first, matrix.columns), np.int64 if matrix.is_table else np.float32)
    tiles = _tiles(matrix, first, last)
    if out.nbytes <= THREADED_BYTES:
        _read_tiles(matrix, tiles, first, out)
    else:
        pool, workers = _pool()
        runs = [tiles[len(tiles) * n // workers : len(tiles) * (n + 1) // workers] for n in range(workers)]
        for _ in pool.map(lambda run: _read_tiles(matrix, run, first, out), runs):
            pass
    return out


def _tiles(matrix: Matrix, first: int, last: int) -> list[tuple[int, int]]:
    """Cut rows into tiles that begin where scale blocks do; a first one inside a block is cut short."""
    height = 1 if matrix.scale is None else matrix.scale.block[0]
    step = max(height, TILE_BYTES // (matrix.columns * F32_BYTES) // height * height)
    begins = [first, *range(first // height * height + step, last, step)]
    return [(a, b) for a, b in zip(begins, [*begins[1:], last], strict=True) if a < b]


def _read_tiles(matrix: Matrix, tiles: list[tuple[int, int]], first: int, out: Array) -> None:
    """Decode ``tiles`` into ``out``, whose row 0 is row ``first`` of the matrix."""
    if not tiles:
        return
    scratch, scale = Scratch(), matrix.scale
    begin, end = tiles[0][0], tiles[-1][1]
    if scale is not None:
        height = scale.block[0]
        top = begin // height
        all_scales = scale.decoded(_read_rows(scale, top, -(-end // height)).reshape(-1, scale.row_bytes), top)
    with _opened(matrix, begin, end) as read:
        for a, b in tiles:
            raw = np.empty((b - a) * matrix.row_bytes, np.uint8)
            read(matrix.offset + a * matrix.row_bytes, raw.data)
            scales, block = None, (1, 1)
            if scale is not None:
                block = scale.block
                scales = all_scales[a // height - top : -(-b // height) - top]
                if a % height:
                    scales, block = scales[np.arange(a, b) // height - a // height], (1, block[1])
            part = out[a - first : b - first]
            _decode(matrix, raw.reshape(b - a, -1), scales, block, part, scratch, np.arange(a, b))


@cache
def _pool() -> tuple[ThreadPoolExecutor, int]:
    workers = min(os.cpu_count() or 1, MAX_THREADS)
    return ThreadPoolExecutor(workers, thread_name_prefix="decode"), workers


def gather_rows(matrix: Matrix, indices: Array) -> Array:
    """Return the rows ``indices`` as float32, or int64 for a table, touching no others.

    Raises:
        InputMissingError, InputOutputError, FileFormatError: the file is not there, unreadable, too short.
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) and (np.diff(indices) == 1).all():
        return read_rows(matrix, int(indices[0]), int(indices[-1]) + 1)
    out = np.empty((len(indices), matrix.columns), np.int64 if matrix.is_table else np.float32)
    raw = _chosen(matrix, matrix.rows, indices)
    scales, block = None, (1, 1)
    if matrix.scale is not None:
        scales = _gather_scales(matrix.scale, indices // matrix.scale.block[0])
        block = (1, matrix.scale.block[1])
    _decode(matrix, np.ascontiguousarray(raw), scales, block, out, Scratch(), indices)
    return out


def _decode(
    matrix: Matrix,
    raw: Array,
    scales: Array | None,
    block: tuple[int, int],
    out: Array,
    scratch: Scratch,
    rows: Array,
) -> None:
    """Decode bytes [rows, row_bytes] into ``out`` [rows, columns]; ``rows`` says which rows of the matrix they are."""
    tally = Tally()
    match matrix.kind:
        case "fp4" | "fp8" as kind:
            SCALED[kind](raw, _present(scales, matrix), block, out, scratch, tally)
        case "int4":
            zero = None if matrix.zero is None or not len(rows) else matrix.zero.of_rows(rows)
            int4_to_float(raw, _present(scales, matrix), zero, block, out, scratch, tally)
        case "fp8/row":
            codes, own = (np.ascontiguousarray(part) for part in np.split(raw, [matrix.columns], axis=1))
            fp8_to_f32(codes, own, (1, ROW_SCALE_ELEMENTS), out, scratch, tally)
        case "mxfp4":
            mxfp4_to_f32(raw, out, scratch, tally)
        case "q8_0":
            q8_0_to_f32(raw, out, scratch, tally)
        case "bf16":
            bf16_to_f32(raw.view("<u2"), out, scratch, tally)
        case "f16" | "f32" | "i32" | "i64" as kind:
            out[:] = raw.view(PLAIN_DTYPES[kind])
        case _:
            out[:] = dequantise(matrix.kind, raw)
    if matrix.factor is not None:
        out *= np.float32(matrix.factor.value())


def _present(scales: Array | None, matrix: Matrix) -> Array:
    if scales is None:
        raise FileFormatError(f"{matrix.kind} weight without a scale", where=matrix.file)
    return scales


# What fills a view with the bytes at an offset of a file.
_Read: TypeAlias = Callable[[int, memoryview], None]


@contextmanager
def _opened(place: Matrix | Scale | Zero | Factor, first: int, last: int, *, is_kept: bool = False) -> Iterator[_Read]:
    """Yield what reads rows ``first`` to ``last`` (exclusive) from front to back.

    Of a remote file they are fetched once; with ``is_kept``, also where they are read again.
    """
    remote = at(place.file)
    if remote is not None:
        begin, end = (place.offset + row * place.row_bytes for row in (first, last))
        with closing(SequentialReader(remote, begin, end, is_kept=is_kept or remote.is_wanted_again)) as reader:
            yield reader.read_into
        return
    try:
        with open_regular(place.file) as file:
            yield partial(_fill, file, place.file)
    except OSError as error:
        raise not_read(place.file, error) from None


def _fill(file: BinaryIO, where: Path, offset: int, view: memoryview) -> None:
    file.seek(offset)
    if file.readinto(view) < view.nbytes:  # type: ignore[attr-defined]
        expected = f"{offset + view.nbytes} bytes"
        raise FileFormatError("truncated", where=where, expected=expected, hint="download the file again")


def _read_rows(place: Scale | Zero | Factor, first: int, last: int) -> Array:
    """Return the bytes of rows of what goes with a matrix."""
    raw = np.empty((last - first) * place.row_bytes, np.uint8)
    # Zero points of neighbouring runs of rows can share a word, and a factor belongs to all rows.
    with _opened(place, first, last, is_kept=not isinstance(place, Scale)) as read:
        read(place.offset + first * place.row_bytes, raw.data)
    return raw


def _gather_scales(scale: Scale, indices: Array) -> Array:
    """Return rows of scales, touching no others: those of an n-gram table take gigabytes."""
    raw = _chosen(scale, scale.shape[0], indices)
    if scale.scale_form is not None:
        return np.concatenate([scale.decoded(row[None], int(index)) for row, index in zip(raw, indices, strict=True)])
    return np.ascontiguousarray(raw).view(SCALE_DTYPES[scale.dtype])


def _chosen(place: Matrix | Scale, rows: int, indices: Array) -> Array:
    """Return the bytes [indices, row_bytes] of chosen rows; those of a remote file are kept for the next time."""
    remote = at(place.file)
    if remote is None:
        return _mapped(place.file, place.offset, (rows, place.row_bytes))[indices]
    width = place.row_bytes
    wanted = np.unique(indices)
    breaks = np.flatnonzero((np.diff(wanted) - 1) * width > GAP_BYTES) + 1
    runs = [run for run in np.split(wanted, breaks) if len(run)]
    prefetch((place.file, place.offset + int(run[0]) * width, int(run[-1] - run[0] + 1) * width) for run in runs)
    out = np.empty((len(indices), width), np.uint8)
    for row, index in zip(out, indices, strict=True):
        remote.read_into(place.offset + int(index) * width, row.data)
    return out


def _mapped(path: Path, offset: int, shape: tuple[int, int]) -> Array:
    try:
        return np.memmap(path, np.uint8, "r", offset, shape)
    except OSError as error:
        raise not_read(path, error) from None
    except ValueError as error:
        raise InputOutputError(f"cannot be read ({error})", where=path) from None
