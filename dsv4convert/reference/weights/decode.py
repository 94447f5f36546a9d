"""Decodes stored matrices to float32: all of their rows, a run of rows, or a choice of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

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

# Bytes of a row by kind of storage: those of ggml's types, and of the two that have scales next to them.
GGML_KINDS = {name: kind for name, kind in BY_NAME.items() if name not in ("q8_1", "q8_k", "i8", "i16", "f64")}
# "fp8/row": an n-gram table's row of E4M3 codes, and behind them its E8M0 scales, one for so many elements.
ROW_SCALE_ELEMENTS = 32
SCALE_DTYPES: dict[str, np.dtype[Any]] = {"F8_E8M0": np.dtype(np.uint8), "F32": np.dtype("<f4")}
TABLE_DTYPES: dict[str, np.dtype[Any]] = {"i32": np.dtype("<i4"), "i64": np.dtype("<i8")}


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
        with _opened(self.file) as file:
            raw = _read(file, self, self.offset + first * self.row_bytes, (last - first) * self.row_bytes)
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
        with _opened(self.file) as file:
            return float(_read(file, self, self.offset, self.row_bytes).view("<f4")[0])


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
        return self.kind in TABLE_DTYPES

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
    scratch, scale = Scratch(), matrix.scale
    with _opened(matrix.file) as file:
        for a, b in tiles:
            raw = _read(file, matrix, matrix.offset + a * matrix.row_bytes, (b - a) * matrix.row_bytes)
            scales, block = None, (1, 1)
            if scale is not None:
                height, block = scale.block[0], scale.block
                scales = _read_scales(scale, a // height, -(-b // height))
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
    raw = _mapped(matrix.file, matrix.offset, (matrix.rows, matrix.row_bytes))[indices]
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
        case "fp4":
            fp4_to_f32(raw, _present(scales, matrix), block, out, scratch, tally)
        case "int4":
            zero = None if matrix.zero is None or not len(rows) else matrix.zero.of_rows(rows)
            int4_to_float(raw, _present(scales, matrix), zero, block, out, scratch, tally)
        case "fp8":
            fp8_to_f32(raw, _present(scales, matrix), block, out, scratch, tally)
        case "fp8/row":
            codes, own = (np.ascontiguousarray(part) for part in np.split(raw, [matrix.columns], axis=1))
            fp8_to_f32(codes, own, (1, ROW_SCALE_ELEMENTS), out, scratch, tally)
        case "mxfp4":
            mxfp4_to_f32(raw, out, scratch, tally)
        case "q8_0":
            q8_0_to_f32(raw, out, scratch, tally)
        case "bf16":
            bf16_to_f32(raw.view("<u2"), out, scratch, tally)
        case "f16":
            out[:] = raw.view("<f2")
        case "f32":
            out[:] = raw.view("<f4")
        case "i32" | "i64":
            out[:] = raw.view(TABLE_DTYPES[matrix.kind])
        case _:
            out[:] = dequantise(matrix.kind, raw)
    if matrix.factor is not None:
        out *= np.float32(matrix.factor.value())


def _present(scales: Array | None, matrix: Matrix) -> Array:
    if scales is None:
        raise FileFormatError(f"{matrix.kind} weight without a scale", where=matrix.file)
    return scales


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise not_read(path, error) from None


def _read(file: BinaryIO, matrix: Matrix | Scale | Zero | Factor, offset: int, nbytes: int) -> Array:
    file.seek(offset)
    raw = np.fromfile(file, np.uint8, nbytes)
    if len(raw) < nbytes:
        expected = f"{offset + nbytes} bytes"
        raise FileFormatError("truncated", where=matrix.file, expected=expected, hint="download the file again")
    return raw


def _read_scales(scale: Scale, first: int, last: int) -> Array:
    with _opened(scale.file) as file:
        raw = _read(file, scale, scale.offset + first * scale.row_bytes, (last - first) * scale.row_bytes)
    return scale.decoded(raw.reshape(last - first, -1), first)


def _gather_scales(scale: Scale, indices: Array) -> Array:
    """Return rows of scales, touching no others: those of an n-gram table take gigabytes."""
    raw = _mapped(scale.file, scale.offset, (scale.shape[0], scale.row_bytes))[indices]
    if scale.scale_form is not None:
        return np.concatenate([scale.decoded(row[None], int(index)) for row, index in zip(raw, indices, strict=True)])
    return np.ascontiguousarray(raw).view(SCALE_DTYPES[scale.dtype])


def _mapped(path: Path, offset: int, shape: tuple[int, int]) -> Array:
    try:
        return np.memmap(path, np.uint8, "r", offset, shape)
    except OSError as error:
        raise not_read(path, error) from None
    except ValueError as error:
        raise InputOutputError(f"cannot be read ({error})", where=path) from None
