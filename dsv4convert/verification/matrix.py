"""Stored matrices, on either side of a comparison: where they lie, and reading a part of one as bits."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.weights import Weight
from ..containers.safetensors import Stored, tensor_at
from ..containers.sources import SequentialReader, at
from ..containers.untrusted import fill
from ..errors import InventoryError, not_read
from ..formats.ggml_types import BY_NAME, QUANTISED
from ..scale_forms import Floats, Over, Pairs, PowersOfTwo, ScaleForm, Times
from .numbers import BLOCK, E4M3, E8M0_BIAS, E8M0_NAN, NVFP4_BLOCK, Bits

Bytes = npt.NDArray[np.uint8]

# Bytes of a row by encoding: so many bytes for so many elements.
STORAGE = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "i32": (4, 1),
    "i64": (8, 1),
    "fp8": (1, 1),
    "fp8/f32": (1, 1),
    "fp8/row": (BLOCK + 1, BLOCK),  # the codes of a row, then its scales
    "fp4": (1, 2),
    "fp4/nv": (1, 2),
    "fp4/f32": (1, 2),
    "fp4/e4m3": (1, 2),
    "nvfp4/e4m3": (36, 64),
    "int4": (1, 2),
    "affine8": (1, 1),
    "mxfp4": (17, BLOCK),
    "q8_0": (34, BLOCK),
    **{name: (BY_NAME[name].nbytes, BY_NAME[name].elements) for name in QUANTISED},
}
# Encodings whose elements are numbers as numpy reads them.
PLAIN = {"f32": "<u4", "i32": "<i4", "f16": "<u2", "bf16": "<u2", "i64": "<i8"}
SCALE_DTYPE = {"F8_E8M0": "<u1", "F8_E4M3": "<u1", "F32": "<u4", "BF16": "<u2"}
# Rows that share a word of zero points.
PER_WORD = 8


class Scale(NamedTuple):
    """The scales of a matrix, [rows, columns]; each serves a ``block`` of (rows, columns) elements.

    ``form`` is how the file holds them, where that is not as ``dtype`` says.
    """

    file: Path
    offset: int
    dtype: str
    rows: int
    columns: int
    block: tuple[int, int]
    form: ScaleForm | None = None


class Matrix(NamedTuple):
    """A row-major matrix in a file; a vector is one row, a stack of matrices is one above the other.

    ``second`` is the place of the float32 that all scales of NVFP4 are under; ``zero`` that of the zero points of INT4,
    or of the biases of MLX's affine mode, which lie as its scales do.
    """

    name: str
    file: Path
    offset: int
    encoding: str
    rows: int
    columns: int
    scale: Scale | None = None
    second: Stored | None = None
    zero: Stored | None = None

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row, scales aside."""
        nbytes, elements = STORAGE[self.encoding]
        return self.columns // elements * nbytes

    @property
    def nbytes(self) -> int:
        """Return the bytes of the matrix, scales aside."""
        return self.rows * self.row_bytes


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a shape as (rows, columns): leading dimensions are rows, a vector is one row."""
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def block_of(length: int, scales: int) -> int | None:
    """Return how many of ``length`` elements share one of ``scales`` scales: the power of two that fits.

    A length that the scales divide evenly and that no power of two fits gives the quotient.
    """
    power = 1
    while scales and -(-length // power) > scales:
        power *= 2
    if scales and -(-length // power) == scales:
        return power
    return length // scales if scales and length % scales == 0 else None


def stored_matrix(name: str, stored: Stored, scale: Stored | None, second: Stored | None = None) -> Matrix | str:
    """Return the matrix that a safetensors tensor and its scales make, or what is wrong with them."""
    plain = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I32": "i32", "I64": "i64"}.get(stored.dtype)
    rows, columns = as_matrix(stored.shape)
    if plain is not None:
        if scale is not None:
            return f"a scale next to {stored.dtype}"
        return Matrix(name, stored.file, stored.offset, plain, rows, columns)
    if stored.dtype not in ("F8_E4M3", "I8", "U8", "F4", "I4"):
        return f"{stored.dtype} is not decoded here"
    if scale is None:
        return f"a {stored.dtype} weight without a scale"
    if stored.dtype in ("I8", "U8", "I4"):
        columns *= 2
    grid = as_matrix(scale.shape)
    block = block_of(rows, grid[0]), block_of(columns, grid[1])
    if block[0] is None or block[1] is None or scale.dtype not in SCALE_DTYPE:
        return f"a scale {scale.dtype} {list(scale.shape)} that fits no blocks of {[rows, columns]}"
    encoding = "fp4"
    if second is not None:
        if stored.dtype != "U8" or scale.dtype != "F8_E4M3" or block != (1, NVFP4_BLOCK):
            return f"NVFP4 of {stored.dtype} with a scale {scale.dtype} {list(scale.shape)}"
        if second.dtype != "F32" or second.shape != ():
            return f"NVFP4 with a second scale {second.dtype} {list(second.shape)}"
        encoding = "fp4/nv"
    elif stored.dtype == "I4":
        if scale.dtype != "F32":
            return f"INT4 with a scale {scale.dtype} {list(scale.shape)}"
        encoding = "int4"
    elif isinstance(scale.scale_form, Times | Over):
        encoding = "fp4/f32"
    elif scale.dtype == "BF16":
        return "a scale BF16 without a bias"
    elif scale.dtype == "F8_E4M3":
        return "a scale F8_E4M3 without a second scale"
    elif stored.dtype == "F8_E4M3":
        encoding = "fp8" if scale.dtype == "F8_E8M0" else "fp8/f32"
    elif block != (1, BLOCK) or scale.dtype != "F8_E8M0":
        return f"packed FP4 with a scale {scale.dtype} {list(scale.shape)}"
    place = Scale(scale.file, scale.offset, scale.dtype, *grid, (block[0], block[1]), scale.scale_form)
    return Matrix(name, stored.file, stored.offset, encoding, rows, columns, place, second)


def weight_matrix(weight: Weight) -> Matrix:
    """Return a source weight as a matrix, its encoding and block worked out anew.

    Raises:
        InventoryError: they are not what the reader of checkpoints found.
    """
    made = stored_matrix(weight.name, weight.stored, weight.scale)
    if isinstance(made, str) or (made.rows, made.columns) != as_matrix(weight.shape):
        got = made if isinstance(made, str) else [made.rows, made.columns]
        raise InventoryError(
            f"tensor {weight.name}: cannot be read", where=weight.stored.file, expected=list(weight.shape), got=got
        )
    return made._replace(zero=weight.zero)


def without_second(matrix: Matrix) -> Matrix:
    """Return an NVFP4 weight as its codes and e4m3 scales alone, as they lie in the file.

    Raises:
        InventoryError: it has no scales.
    """
    if matrix.scale is None:
        raise InventoryError(f"tensor {matrix.name}: no scale", where=matrix.file)
    return matrix._replace(encoding="fp4/e4m3", scale=matrix.scale._replace(dtype="F8_E4M3", form=None))


def second_scale(matrix: Matrix) -> float:
    """Return the float32 that the e4m3 scales of an NVFP4 weight are under.

    Raises:
        InventoryError: it has none.
    """
    form = None if matrix.scale is None else matrix.scale.form
    if not isinstance(form, Times | Over):
        raise InventoryError(f"tensor {matrix.name}: no second scale", where=matrix.file)
    second = np.float32(form.second)
    return float(np.float32(1.0) / second if isinstance(form, Over) else second)


Span: TypeAlias = tuple[int, int]


def read_bits(matrix: Matrix, rows: Span, columns: Span) -> Bits:
    """Return the bits of elements [rows[0]:rows[1], columns[0]:columns[1]] (see numbers.py).

    ``columns`` begin and end where bytes or blocks do.

    Raises:
        InputMissingError, InputOutputError: the file cannot be read, or ended early.
    """
    bits: Bits = _as_bits(matrix, read_raw(matrix, rows, columns), rows, columns)
    return bits


def same_bytes(left: Matrix, at: tuple[Span, Span], right: Matrix, right_at: tuple[Span, Span]) -> bool:
    """Return whether two regions (rows, columns) of one size hold the same codes and scales.

    False says nothing: they may still be the same under another cut of the scales.

    Raises:
        InputMissingError, InputOutputError: a file cannot be read, or ended early.
    """
    if {left.encoding, right.encoding} == {"fp4", "mxfp4"}:
        codes, scales = _fp4_parts(left, *at)
        other_codes, other_scales = _fp4_parts(right, *right_at)
        return np.array_equal(scales, other_scales) and np.array_equal(codes, other_codes)
    if left.encoding != right.encoding:
        return False
    if not np.array_equal(read_raw(left, *at), read_raw(right, *right_at)):
        return False
    if left.scale is None or right.scale is None:
        return left.scale is right.scale
    (height, width), like = left.scale.block, left.scale.block == right.scale.block
    shifted = any((a[0] - b[0]) % step for a, b, step in zip(at, right_at, (height, width), strict=True))
    if not like or shifted or left.scale.dtype != right.scale.dtype:
        return False
    return np.array_equal(_read_grid(left.scale, *at), _read_grid(right.scale, *right_at))


def largest_e8m0(scales: tuple[Scale, ...]) -> int:
    """Return the largest E8M0 byte of several grids of scales that is not NaN, that of 1.0 where there is none.

    Raises:
        InputMissingError, InputOutputError: a file cannot be read, or ended early.
    """
    largest = -1
    for scale in scales:
        height, width = scale.block
        grid = _read_grid(scale, (0, scale.rows * height), (0, scale.columns * width)).astype(np.int64)
        largest = max(largest, int(np.max(grid, where=grid != E8M0_NAN, initial=-1)))
    return E8M0_BIAS if largest < 0 else largest


def read_at(file: Path, offset: int, nbytes: int) -> Bytes:
    """Return bytes of a file.

    Raises:
        InputMissingError, InputOutputError: the file cannot be read, or ended early.
    """
    raw: Bytes = _read(file, offset, nbytes, (0, 1), (0, nbytes)).reshape(-1)
    return raw


def read_raw(matrix: Matrix, rows: Span, columns: Span) -> Bytes:
    """Return the bytes of a region, scales aside; see ``read_bits``."""
    nbytes, elements = STORAGE[matrix.encoding]
    first, last = (column // elements * nbytes for column in columns)
    return _read(matrix.file, matrix.offset, matrix.row_bytes, rows, (first, last))


def _read_grid(scale: Scale, rows: Span, columns: Span) -> Any:
    """Return the scales that serve a region of elements, as integers."""
    height, width = scale.block
    form = scale.form
    if isinstance(form, Times | Over):
        return _nvfp4_grid(scale, form, rows, columns)
    item = np.dtype(_kind(scale))
    down = rows[0] // height, (rows[1] - 1) // height + 1
    right = columns[0] // width, (columns[1] - 1) // width + 1
    row_bytes = scale.columns * item.itemsize
    grid = _read(scale.file, scale.offset, row_bytes, down, (0, row_bytes)).view(item)[:, right[0] : right[1]]
    match form:
        case None:
            return grid
        case Floats(dtype):
            return grid.astype(np.uint32) << np.uint32(16) if dtype == "BF16" else grid.astype("<f4").view("<u4")
        case Pairs(exponent):
            return _e8m0_of_pairs(grid, scale, exponent)
        case PowersOfTwo(dtype):
            return _as_e8m0(grid, scale, dtype, (down[0], right[0]))


def _kind(scale: Scale) -> str:
    """Return the numpy type of scales in the file."""
    match scale.form:
        case PowersOfTwo(dtype):
            return "<u4" if dtype == "F32" else "<u2"
        case Floats(dtype):
            return "<f2" if dtype == "F16" else "<u2"
        case Pairs():
            return "<u2"
        case None | Times() | Over():
            return SCALE_DTYPE[scale.dtype]


def _nvfp4_grid(scale: Scale, form: Times | Over, rows: Span, columns: Span) -> Any:
    """Return the bits of the float32 that e4m3 scales are, times their second scale or over it."""
    codes = _read_grid(scale._replace(form=None, dtype="F8_E4M3"), rows, columns)
    values, second = E4M3[codes].astype(np.float32), np.float32(form.second)
    with np.errstate(over="ignore", under="ignore"):
        return (values / second if isinstance(form, Over) else values * second).view(np.uint32)


def _as_e8m0(grid: Any, scale: Scale, dtype: str, corner: Span) -> Bytes:
    """Return the E8M0 bytes that scales of a wider type stand for: the exponent of each, NaN as 255.

    Raises:
        InventoryError: one is no power of two.
    """
    values = (grid.astype(np.uint32) << np.uint32(32 - 8 * grid.dtype.itemsize)).view(np.float32).astype(np.float64)
    fraction, exponent = np.frexp(values)
    codes = np.where(np.isnan(values), E8M0_NAN, exponent - 1 + E8M0_BIAS)
    right = np.isnan(values) | ((fraction == 0.5) & (codes >= 0) & (codes < E8M0_NAN))
    if not right.all():
        row, column = np.argwhere(~right)[0]
        position = [int(corner[0] + row), int(corner[1] + column)]
        found = tensor_at(scale.file, scale.offset)
        raise InventoryError(
            f"tensor {'?' if found is None else found[0]}: {dtype} scale {position} is not a power of two",
            where=scale.file,
            got=values[row, column],
        )
    return np.asarray(codes, np.uint8)


def _e8m0_of_pairs(grid: Any, scale: Scale, power: int) -> Bytes:
    """Return the E8M0 bytes that pairs of E4M3 scales stand for, times 2^``power``.

    Raises:
        InventoryError: a pair is not twice the same power of two.
    """
    first, second = grid & 0xFF, grid >> 8
    fraction, exponent = np.frexp(E4M3[first])
    codes = exponent - 1 + power + E8M0_BIAS
    nan = np.isnan(E4M3[first])
    right = (first == second) & (nan | ((fraction == 0.5) & (codes >= 0) & (codes < E8M0_NAN)))
    if not right.all():
        raise InventoryError("a pair of NVFP4 scales is not one E8M0 scale", where=scale.file)
    return np.asarray(np.where(nan, E8M0_NAN, codes), np.uint8)


def _fp4_parts(matrix: Matrix, rows: Span, columns: Span) -> tuple[Bytes, Bytes]:
    """Return the codes [rows, columns] and the scale bytes [rows, columns/32] of FP4 in either storage."""
    raw = read_raw(matrix, rows, columns)
    if matrix.encoding == "fp4" and matrix.scale is not None:
        return _codes(raw), _read_grid(matrix.scale, rows, columns)
    codes = np.empty((len(raw), columns[1] - columns[0]), np.uint8)
    blocks = raw.reshape(len(raw), -1, STORAGE["mxfp4"][0])
    halves = codes.reshape(len(raw), -1, 2, BLOCK // 2)
    halves[:, :, 0] = blocks[:, :, 1:] & 0xF
    halves[:, :, 1] = blocks[:, :, 1:] >> 4
    return codes, blocks[:, :, 0]


def _codes(raw: Bytes) -> Bytes:
    """Return the codes of packed bytes [rows, columns/2], the low nibble first."""
    codes = np.empty((len(raw), 2 * raw.shape[1]), np.uint8)
    codes[:, 0::2] = raw & 0xF
    codes[:, 1::2] = raw >> 4
    return codes


def _as_bits(matrix: Matrix, raw: Bytes, rows: Span, columns: Span) -> Any:
    if matrix.encoding in PLAIN:
        return raw.view(PLAIN[matrix.encoding])
    if matrix.encoding == "q8_0":
        blocks = raw.reshape(len(raw), -1, STORAGE["q8_0"][0])
        d = np.ascontiguousarray(blocks[:, :, :2]).view("<u2").astype(np.uint32)
        return ((d << np.uint32(8)) | blocks[:, :, 2:]).reshape(len(raw), -1)
    if matrix.encoding == "fp8/row":
        width = columns[1] - columns[0]
        return (np.repeat(raw[:, width:], BLOCK, axis=1).astype(np.uint16) << np.uint16(8)) | raw[:, :width]
    if matrix.encoding == "fp4/nv" and matrix.second is not None:
        second = np.uint64(read_at(matrix.second.file, matrix.second.offset, 4).view("<u4")[0])
        return (second << np.uint64(12)) | _with_scale(matrix, _codes(raw), rows, columns, shift=4)
    if matrix.encoding == "nvfp4/e4m3":
        return _ggml_nvfp4_bits(raw)
    if matrix.encoding in ("fp4/f32", "fp4/e4m3"):
        return _with_scale(matrix, _codes(raw), rows, columns, shift=4)
    if matrix.encoding == "affine8" and matrix.scale is not None and matrix.zero is not None:
        biases = matrix.scale._replace(file=matrix.zero.file, offset=matrix.zero.offset)
        spread = np.repeat(_read_grid(biases, rows, columns).astype(np.uint64), biases.block[1], axis=1)
        return spread << np.uint64(24) | _with_scale(matrix, raw, rows, columns)
    if matrix.encoding == "int4":
        codes = _codes(raw).astype(np.uint64) | _zeros(matrix, rows, columns) << np.uint64(4)
        return _with_scale(matrix, codes, rows, columns)
    if matrix.encoding in ("fp4", "mxfp4"):
        codes, scales = _fp4_parts(matrix, rows, columns)
        return (np.repeat(scales, BLOCK, axis=1).astype(np.uint16) << np.uint16(4)) | codes
    return _with_scale(matrix, raw, rows, columns)


def _ggml_nvfp4_bits(raw: Bytes) -> Any:
    """Return the bits of ggml's NVFP4 blocks: four scales, then their runs of 16, elements k and k + 8 in a byte."""
    blocks = raw.reshape(len(raw), -1, STORAGE["nvfp4/e4m3"][0])
    pairs = blocks[:, :, 4:].reshape(len(raw), -1, 4, NVFP4_BLOCK // 2)
    codes = np.concatenate([pairs & 0xF, pairs >> 4], axis=-1).astype(np.uint16)
    bits = blocks[:, :, :4, None].astype(np.uint16) << np.uint16(4) | codes
    return bits.reshape(len(raw), -1)


def _zeros(matrix: Matrix, rows: Span, columns: Span) -> Any:
    """Return the zero point of each element of INT4, 8 where the matrix has none."""
    if matrix.zero is None or matrix.scale is None:
        return np.uint64(8)
    words, groups = (rows[0] // PER_WORD, (rows[1] - 1) // PER_WORD + 1), matrix.zero.shape[1]
    raw = _read(matrix.zero.file, matrix.zero.offset, 4 * groups, words, (0, 4 * groups)).view("<u4")
    row = np.arange(*rows)
    of_rows = raw[row // PER_WORD - words[0]] >> (4 * (row % PER_WORD)).astype(np.uint32)[:, None] & np.uint32(0xF)
    return of_rows[:, np.arange(*columns) // matrix.scale.block[1]].astype(np.uint64)


def _with_scale(matrix: Matrix, codes: Any, rows: Span, columns: Span, shift: int = 8) -> Any:
    """Return codes of so many bits with the scale of each above it."""
    scale = matrix.scale
    if scale is None:
        raise InventoryError(f"tensor {matrix.name}: no scale", where=matrix.file)
    height, width = scale.block
    row = np.arange(*rows) // height - rows[0] // height
    column = np.arange(*columns) // width - columns[0] // width
    spread = _read_grid(scale, rows, columns)[:, column][row]
    kind = np.uint16 if matrix.encoding in ("fp8", "fp4/e4m3") else np.uint64
    return (spread.astype(kind) << kind(shift)) | codes


def _read(file: Path, offset: int, row_bytes: int, rows: tuple[int, int], columns: tuple[int, int]) -> Bytes:
    """Return bytes [rows, columns] of a matrix of ``row_bytes`` a row at ``offset``."""
    count, width = rows[1] - rows[0], columns[1] - columns[0]
    remote = at(file)
    if remote is not None:
        whole = np.empty((count, row_bytes), np.uint8)
        begin = offset + rows[0] * row_bytes
        with contextlib.closing(SequentialReader(remote, begin, begin + whole.nbytes)) as reader:
            reader.read_into(begin, memoryview(whole.data).cast("B"))
        return whole[:, columns[0] : columns[1]]
    out = np.empty((count, width), np.uint8)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if width == row_bytes:
                fill(out.data.cast("B"), descriptor, offset + rows[0] * row_bytes, file)
            else:
                for number in range(count):
                    start = offset + (rows[0] + number) * row_bytes + columns[0]
                    fill(out[number].data.cast("B"), descriptor, start, file)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise not_read(file, error) from None
    return out
