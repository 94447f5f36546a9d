"""What every codec shares: the per-thread arena, the counts, and a tile's scales spread over its columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dsv4convert.errors import DeviceError, LossyError

ArrayU8: TypeAlias = npt.NDArray[np.uint8]
ArrayU16: TypeAlias = npt.NDArray[np.uint16]
ArrayF16: TypeAlias = npt.NDArray[np.float16]
ArrayF32: TypeAlias = npt.NDArray[np.float32]
ArrayF64: TypeAlias = npt.NDArray[np.float64]
ArrayI64: TypeAlias = npt.NDArray[np.int64]
Array: TypeAlias = npt.NDArray[Any]
Block: TypeAlias = tuple[int, int]

GROUP = 32  # elements that share a scale along a row, in packed FP4, MXFP4 and Q8_0 alike
FP8_TILE = 128  # rows and columns that share a scale once FP4 is written as FP8; of V4.1 they are GROUP

# One NaN per format, whatever the sign and payload of the input.
F32_NAN_BITS = np.uint32(0x7FC0_0000)  # 0 1111_1111 1000...
BF16_NAN_BITS = np.uint16(0x7FC0)  # 0 1111_1111 100_0000
F16_NAN_BITS = np.uint16(0x7E00)  # 0 11111 10_0000_0000
F32_NAN = F32_NAN_BITS.view(np.float32)

F32_MIN_NORMAL = 2.0**-126
BF16_MIN_NORMAL = 2.0**-126
F16_MIN_NORMAL = 2.0**-14


class Scratch:
    """Arena of one thread: a named buffer per use, kept from tile to tile and grown when needed.

    >>> scratch = Scratch()
    >>> a = scratch.array("index", (2, 3), np.int64)
    >>> b = scratch.array("index", (3,), np.int64)
    >>> np.shares_memory(a, b)
    True
    """

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        self._addresses: dict[str, int] = {}

    def array(self, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return an array of undefined content; the next call with ``key`` hands out the same memory."""
        kind = np.dtype(dtype)
        size = kind.itemsize
        for length in shape:
            size *= length
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            # 64 bytes more, to start on a cache line: vector loads that straddle lines cost a fifth.
            grown = np.empty(size + _CACHE_LINE, np.uint8)
            start = -grown.ctypes.data % _CACHE_LINE
            buffer = self._buffers[key] = grown[start : start + size]
            self._addresses[key] = buffer.ctypes.data
        return buffer[:size].view(kind).reshape(shape)

    def address(self, key: str, nbytes: int) -> int:
        """Return where the first ``nbytes`` bytes of an array lie in memory, until a larger one takes the name."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < nbytes:
            self.array(key, (nbytes,), np.uint8)
        return self._addresses[key]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.size for buffer in self._buffers.values())


_CACHE_LINE = 64


@dataclass(slots=True)
class Tally:
    """How many elements did not come through as they were.

    ``nan``: elements whose code or scale means NaN. ``overflow``: elements whose value is beyond the
    output's range, or infinite because their scale is; an infinite input that stays infinite is none.
    ``underflow``: nonzero elements that the output cannot hold because they are too small: flushed to
    zero, or rounded in the subnormal range. ``changed``: elements that were rounded for any other reason.
    The four never count an element twice. Q8_0 and MXFP4 say in their modules what they count.
    """

    nan: int = 0
    overflow: int = 0
    underflow: int = 0
    changed: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another tally to this one."""
        for field in fields(other):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def counts(self) -> tuple[int, int, int, int]:
        """Return the four counts, in the order in which they are declared."""
        return self.nan, self.overflow, self.underflow, self.changed

    @property
    def lossless(self) -> bool:
        """True when every value survived (a NaN that stays a NaN does)."""
        return not (self.overflow or self.underflow or self.changed)


# What a codec takes, by kind; all of them fill their outputs and return nothing.
# Elements with scales: (weight, scale, block, out, scratch, tally).
ScaledCodec: TypeAlias = Callable[[Array, Array, Block, Array, Scratch, Tally], None]
# Elements, or scales alone: (source, out, scratch, tally).
PlainCodec: TypeAlias = Callable[[Array, Array, Scratch, Tally], None]
# Packed FP4 whose blocks are those of the output: (packed, scale, out, scratch, tally).
BlockwiseCodec: TypeAlias = Callable[[Array, Array, Array, Scratch, Tally], None]


# Elements to those of a format with scales, or to these scales: (values, block, out, scratch, tally).
BlockQuantiser: TypeAlias = Callable[[Array, Block, Array, Scratch, Tally], None]


# Packed FP4 under a scale that several matrices share: (packed, scale, largest, out, scratch, tally).
SharingCodec: TypeAlias = Callable[[Array, Array, int, Array, Scratch, Tally], None]
# Its scales: (scale, largest, out, scratch, tally).
SharingScalesCodec: TypeAlias = Callable[[Array, int, Array, Scratch, Tally], None]


class RescalingCodec(Protocol):
    """Packed FP4 to codes and scales of tiles."""

    def __call__(
        self,
        packed: Array,
        scale: Array,
        out: Array,
        out_scale: Array,
        scratch: Scratch,
        tally: Tally,
        side: int = FP8_TILE,
        /,
    ) -> None: ...


class TileScalesCodec(Protocol):
    """FP4 scales to those of tiles."""

    def __call__(
        self, scale: Array, out_scale: Array, scratch: Scratch, tally: Tally, side: int = FP8_TILE, /
    ) -> None: ...


@lru_cache(maxsize=256)
def column_blocks(columns: int, width: int) -> npt.NDArray[np.intp]:
    """Index of the block of ``width`` that each of ``columns`` columns lies in."""
    index = np.arange(columns, dtype=np.intp) // width
    index.flags.writeable = False
    return index


def spread_columns(values: Array, columns: int, width: int, scratch: Scratch, key: str) -> Array:
    """Repeat every column of ``values`` [r, ceil(columns/width)] ``width`` times, to [r, columns]."""
    out = scratch.array(key, (values.shape[0], columns), values.dtype)
    return np.take(values, column_blocks(columns, width), axis=1, out=out, mode="clip")


def check_tile(rows: int, columns: int, scale: Array, block: Block, out: Array, out_shape: Block) -> None:
    """Refuse arrays that do not belong together: a wrong scale would give wrong numbers in silence.

    Raises ValueError: the plan is wrong, not the user's file.
    """
    want = (-(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != want:
        raise ValueError(f"scale of a {rows}x{columns} tile, block {block}: expected {want}, got {scale.shape}")
    if out.shape != out_shape:
        raise ValueError(f"output of a {rows}x{columns} tile: expected {out_shape}, got {out.shape}")
    check_contiguous(out)


def check_tile_of_floats(values: Array, out: Array, out_shape: tuple[int, ...]) -> None:
    """Refuse an output of another shape, and values that no quantised format holds.

    Raises LossyError on NaN and infinity, ValueError on shapes.
    """
    if out.shape != out_shape:
        raise ValueError(f"output of a tile of {values.shape}: expected {out_shape}, got {out.shape}")
    check_contiguous(out)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = (int(index) for index in np.argwhere(~finite)[0])
        raise LossyError(
            "a NaN or infinite value cannot be quantised",
            expected="finite values",
            got=f"{values[row, column]} at row {row}, column {column} of a tile",
            hint="run dsv4convert check on the source, which names the tensors",
        )


def check_contiguous(out: Array) -> None:
    """Refuse an output with gaps: flattening it would make a copy, and the results would go there.

    Raises ValueError.
    """
    if not out.flags.c_contiguous:
        raise ValueError("the output of a tile must be contiguous")


def group_max(values: Array, spare: Array) -> Array:
    """Maximum of each row of [groups, 2^n] as a fresh [groups]; uses up both arrays.

    Maxima of the flat array against itself moved by half a row, a quarter, ... one element leave each
    row's at its start: whole-array vector operations, where a reduction along rows starts anew per row.
    """
    width = values.shape[1]
    source, target = values.reshape(-1), spare.reshape(-1)
    length, step = source.size, width // 2
    while step:
        length -= step
        np.maximum(source[:length], source[step : step + length], out=target[:length])
        source, target = target, source
        step //= 2
    largest: Array = source[::width].copy()
    return largest


_SMALLEST_NORMAL = np.array([F32_MIN_NORMAL], np.float32)
_HALF = np.array([0.5], np.float32)


def require_subnormals() -> None:
    """Refuse to compute on a thread whose processor flushes subnormal numbers to zero.

    A library built with -ffast-math, or torch.set_flush_denormal, switches that on for a whole thread;
    small values would then vanish without a trace. Raises DeviceError.
    """
    if not (_SMALLEST_NORMAL * _HALF)[0]:
        raise DeviceError(
            "this thread flushes subnormal numbers to zero, so conversions would not be exact",
            hint="run without the library that switched the processor to flush-to-zero",
        )
