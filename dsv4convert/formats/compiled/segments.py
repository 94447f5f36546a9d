"""Whole segments made in C (``segments.c``): its structures, and the calls. ctypes lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
from enum import IntEnum, auto
from functools import cache
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

from dsv4convert.formats.compiled.library import load_library
from dsv4convert.formats.ggml import PARAMETERS, Chunk

DIGEST_BYTES = 16
# The C has the long form of XXH3 only; fewer bytes have one of their own.
MIN_BYTES = 241


class Making(IntEnum):
    """What is made of the operands' rows: ``enum making``, by the same numbers."""

    COPY = 0
    COLUMNS = auto()
    JOIN = auto()
    FP8_TO_F32 = auto()
    FP8_TO_BF16 = auto()
    FP8_TO_F16 = auto()
    FP8_TO_Q8_0 = auto()
    FP8_TO_MXFP4 = auto()
    FP4_TO_F32 = auto()
    FP4_TO_BF16 = auto()
    FP4_TO_F16 = auto()
    FP4_TO_Q8_0 = auto()
    FP4_TO_MXFP4 = auto()
    FP4_TO_FP8_CODES = auto()
    FP4_TO_FP8_SCALES = auto()
    BF16_TO_F32 = auto()
    BF16_TO_F16 = auto()
    BF16_TO_Q8_0 = auto()
    BF16_TO_MXFP4 = auto()
    F16_TO_F32 = auto()
    F16_TO_BF16 = auto()
    F32_TO_BF16 = auto()
    F32_TO_F16 = auto()
    F32_TO_Q8_0 = auto()
    F32_TO_MXFP4 = auto()
    FP4_TO_NVFP4_CODES = auto()
    FP4_TO_NVFP4_SCALES = auto()
    BF16_TO_FP8_CODES = auto()
    BF16_TO_FP8_SCALES = auto()
    BF16_TO_FP4_CODES = auto()
    BF16_TO_FP4_SCALES = auto()
    F32_TO_FP8_CODES = auto()
    F32_TO_FP8_SCALES = auto()
    F32_TO_FP4_CODES = auto()
    F32_TO_FP4_SCALES = auto()
    FP8_TO_GGML = auto()
    FP4_TO_GGML = auto()
    BF16_TO_GGML = auto()
    F16_TO_GGML = auto()
    F32_TO_GGML = auto()


Int: TypeAlias = Annotated[int, ctypes.c_int64]
Address: TypeAlias = Annotated[int | None, ctypes.c_void_p]
Structure = TypeVar("Structure", bound=type[ctypes.Structure])


def _structure(kind: Structure) -> Structure:
    """Give a structure the fields that its annotations name, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    kind._fields_ = [(name, getattr(hint, "__metadata__", (hint,))[0]) for name, hint in hints.items()]
    return kind


@_structure
class Control(ctypes.Structure):
    """What a worker shares with the thread that watches it; of use without the library, too."""

    stopped: Int
    done_bytes: Int


@_structure
class Elements(ctypes.Structure):
    """The bytes of elements that are looked at, and the bits of one that is not finite; or 0."""

    bytes: Int
    not_finite: Int


@_structure
class OperandPlace(ctypes.Structure):
    """A matrix in an open source, whose rows serve ``rows_per`` rows of the output each, and room for a tile of it."""

    descriptor: Int
    offset: Int
    row_bytes: Int
    rows_per: Int
    tile: Address
    holds: Elements
    held_from: Int
    held_to: Int


@_structure
class SegmentCall(ctypes.Structure):
    """Everything about one segment; what the fields mean is in ``segments.c``."""

    making: Int
    operands: Annotated[Any, ctypes.POINTER(OperandPlace)]
    operand_count: Int
    output: Int
    offset: Int
    mapping: Address
    rows: Int
    row_bytes: Int
    step: Int
    tile: Address
    columns: Int
    height: Int
    width: Int
    scales_are_f32: Int
    drops: Int
    spare: Address
    tables: Annotated[Any, ctypes.c_void_p * 2]
    first: Int
    last: Int
    largest: Int
    quantise: Address
    type: Int
    weights: Address
    wide: Address
    wide_rows: Int
    scales: Address
    holds: Elements
    counts: Annotated[Any, ctypes.c_int64 * 4]
    zeros: Int
    checksum: Address
    control: Annotated[Any, ctypes.POINTER(Control)]


class _DigestState(ctypes.Structure):
    _fields_ = [
        ("lanes", ctypes.c_uint64 * 8),
        ("recent", ctypes.c_uint8 * 128),
        ("waiting", ctypes.c_int64),
        ("stripes", ctypes.c_int64),
        ("total", ctypes.c_int64),
    ]


class LongDigest:
    """The xxh3-128 of ``MIN_BYTES`` bytes and more, by the methods of ``xxhash.xxh3_128``; segments add to it in C."""

    def __init__(self) -> None:
        self._library, self._short = functions(), short_functions()
        self._state = _DigestState()
        self.address = ctypes.addressof(self._state)
        self.begin()

    def begin(self) -> None:
        """Start anew."""
        self._short.xxh3_begin(self.address)

    def update(self, data: memoryview) -> None:
        """Add the bytes of a contiguous, writable buffer."""
        view = data.cast("B") if data.nbytes else data
        if view.nbytes:
            self._library.xxh3_update(self.address, address_of(view), view.nbytes)

    def digest(self) -> bytes:
        """Return the digest of all bytes so far."""
        found = ctypes.create_string_buffer(DIGEST_BYTES)
        self._short.xxh3_digest(self.address, found)
        return found.raw


def make_segment(call: SegmentCall, first: int) -> int:
    """Make the tiles from row ``first`` on; return the first row that is not made, ``call.rows`` when all are.

    A tile that the C cannot make, for whatever reason, is for the caller to make.
    """
    end: int = functions().make_segment(ctypes.byref(call), first)
    return end


def lies_in_memory(descriptor: int) -> bool:
    """Return whether a file lies in a tmpfs."""
    return bool(functions().lies_in_memory(descriptor))


def low_bit_twin() -> Chunk:
    """Return the function of ``ggml_quantize_chunk``'s parameters that makes some of its types (``low_bit.c``)."""
    twin: Chunk = functions().quantise_here
    return twin


def address_of(view: memoryview) -> int:
    """Return where a writable buffer lies in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@cache
def functions() -> ctypes.CDLL:
    """Return the library with the types of the functions that this module calls.

    Raises:
        OSError: none is built for this processor, or its file is damaged.
        AttributeError: a function is missing.
    """
    library = load_library()
    for name, result, parameters in (
        ("xxh3_update", None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("lies_in_memory", ctypes.c_int64, (ctypes.c_int64,)),
        ("make_segment", ctypes.c_int64, (ctypes.POINTER(SegmentCall), ctypes.c_int64)),
        ("quantise_here", ctypes.c_size_t, PARAMETERS),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
    return library


@cache
def short_functions() -> ctypes.PyDLL:
    """Return the library with the functions that are done in no time, and are called with the interpreter's lock.

    To give the lock up and wait for it again takes longer, where many threads want it.

    Raises:
        OSError, AttributeError: as for ``functions``.
    """
    library = ctypes.PyDLL(load_library()._name)
    library.xxh3_begin.restype, library.xxh3_begin.argtypes = None, (ctypes.c_void_p,)
    library.xxh3_digest.restype, library.xxh3_digest.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p)
    return library
