"""Pairs weights with their scales and reads the encoding off dtypes and shapes, tensor by tensor."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ..containers.safetensors import Stored, tensor_at
from ..containers.wide_scales import E8M0, WIDE_BITS, as_e8m0, as_f32, stored_dtype
from ..errors import InventoryError, either
from ..formats.int4 import PER_WORD
from ..formats.nvfp4 import BLOCK as NVFP4_BLOCK
from ..model.tensors import DRAFT_PREFIX, Expected, Row, Store, scale_name
from ..scale_forms import Over, Times

# Elements of a row that share one scale in packed FP4.
FP4_BLOCK = 32
FP4_SCALE_BLOCK = (1, FP4_BLOCK)


class Encoding(str, Enum):
    """How the bytes of a weight stand for numbers."""

    FP4 = "fp4"  # packed float4_e2m1fn with float8_e8m0fnu scales
    NVFP4 = "nvfp4"  # packed float4_e2m1fn with float8_e4m3fn scales under a second one, read as F32
    INT4 = "int4"  # packed integers of four bits with F32, BF16 or F16 scales, read as F32, and zero points or none
    FP8 = "fp8"  # float8_e4m3fn with float8_e8m0fnu or F32 scales
    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    I64 = "i64"
    I32 = "i32"


PLAIN_ENCODINGS = {
    "BF16": Encoding.BF16,
    "F16": Encoding.F16,
    "F32": Encoding.F32,
    "I64": Encoding.I64,
    "I32": Encoding.I32,
}
PACKED_DTYPES = ("I8", "U8", "F4")
# What no safetensors file says: the bytes of packed integers of four bits.
INT4_DTYPE = "I4"
SCALED_DTYPES = (*PACKED_DTYPES, INT4_DTYPE, "F8_E4M3")
MATRIX_DIMENSIONS = 2
# What no layout but its own stores as it is.
PACKED_ENCODINGS = frozenset({Encoding.NVFP4, Encoding.INT4})
FLOAT_ENCODINGS = frozenset({Encoding.BF16, Encoding.F16, Encoding.F32})
ALLOWED = {
    Store.DENSE: FLOAT_ENCODINGS | {Encoding.FP8, Encoding.NVFP4, Encoding.INT4},
    Store.EXPERT: FLOAT_ENCODINGS | {Encoding.FP4, Encoding.FP8, Encoding.NVFP4, Encoding.INT4},
    Store.BF16: FLOAT_ENCODINGS,
    Store.F32: FLOAT_ENCODINGS,
    Store.ENGRAM: FLOAT_ENCODINGS | {Encoding.FP8},
    Store.TABLE: frozenset({Encoding.I64, Encoding.I32}),
}


class Weight(NamedTuple):
    """One weight of the model under its official name, with the bytes and the scales that make it.

    ``shape`` is the logical one ([out, in]; FP4 counts elements, not bytes); ``block`` is how many
    rows and columns share one scale, None without scales. ``zero`` are the words of zero points, each for eight rows,
    that INT4 may have.
    """

    name: str
    row: Row
    shape: tuple[int, ...]
    encoding: Encoding
    stored: Stored
    scale: Stored | None
    block: tuple[int, int] | None
    prefix: str
    layer: int | None
    expert: int | None
    zero: Stored | None = None

    @property
    def is_draft(self) -> bool:
        """Return whether the weight belongs to a draft layer."""
        return self.prefix.startswith(DRAFT_PREFIX)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the weight and its scales take in the source."""
        return sum(part.nbytes for part in (self.stored, self.scale, self.zero) if part is not None)


def pair(
    expected: Expected, stored: Stored, scale: Stored | None, *, scale_fmt: object = None, zero: Stored | None = None
) -> Weight:
    """Combine what the tables expect with what the files hold; ``zero`` are zero points.

    ``scale_fmt`` is what config.json says of the scales, None where it says nothing. Scales may lie in another type
    than E8M0 (see ``official_scale``).

    Raises:
        InventoryError: a shape, a dtype or a scale that does not fit.
    """
    if scale is not None and scale.scale_form is None:
        scale = official_scale(stored, scale, scale_fmt)
    encoding, shape, block = _classify(expected.name, stored, scale)
    if zero is not None:
        _check_zero(expected.name, zero, encoding, shape, block)
    if encoding not in ALLOWED[expected.row.store]:
        raise InventoryError(
            f"tensor {expected.name}: wrong dtype",
            where=stored.file,
            expected=either(sorted(e.value for e in ALLOWED[expected.row.store])),
            got=stored.dtype,
        )
    if shape != expected.shape:
        raise InventoryError(
            f"tensor {expected.name}: wrong shape",
            where=stored.file,
            expected=list(expected.shape),
            got=list(shape),
            hint="do config.json and the weights belong together?",
        )
    return Weight(
        expected.name,
        expected.row,
        expected.shape,
        encoding,
        stored,
        scale,
        block,
        expected.prefix,
        expected.layer,
        expected.expert,
        zero,
    )


def _check_zero(
    name: str, zero: Stored, encoding: Encoding, shape: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    """Check the zero points of a weight.

    Raises:
        InventoryError: the weight has none, or they are of another shape.
    """
    height, width = block or (1, 1)
    wanted = (-(-shape[0] // PER_WORD), -(-shape[-1] // width))
    if encoding is not Encoding.INT4 or height != 1 or zero.dtype != "I32" or zero.shape != wanted:
        raise InventoryError(
            f"tensor {_name_in_file(zero) or name}: zero points that do not fit",
            where=zero.file,
            expected=f"I32 {list(wanted)}, of groups of a row" if encoding is Encoding.INT4 else "none",
            got=f"{zero.dtype} {list(zero.shape)}",
        )


def official_scale(stored: Stored, scale: Stored, scale_fmt: object) -> Stored:
    """Return the scale of a weight as the published checkpoints have it, where its type leaves no doubt.

    Those of packed FP4 are E8M0, whether as U8, F32 or BF16. FP8 has E8M0 as well, as U8 or BF16; its F32 scales are a
    published form of their own, whose values need not be powers of two. A config that names another format than
    "ue8m0" is believed of bytes.
    """
    if stored.dtype == INT4_DTYPE:
        return as_f32(scale)
    if stored.dtype in PACKED_DTYPES:
        return as_e8m0(scale) if scale.dtype in ("U8", *WIDE_BITS) else scale
    if stored.dtype == "F8_E4M3" and (scale.dtype == "BF16" or (scale.dtype == "U8" and scale_fmt in (None, "ue8m0"))):
        return as_e8m0(scale)
    return scale


def needs_scale(stored: Stored) -> bool:
    """Return whether a stored weight means nothing without a scale."""
    return stored.dtype in SCALED_DTYPES and len(stored.shape) == MATRIX_DIMENSIONS


def _classify(
    name: str, stored: Stored, scale: Stored | None
) -> tuple[Encoding, tuple[int, ...], tuple[int, int] | None]:
    """Return (encoding, logical shape, block) of a weight and its scale."""
    plain = PLAIN_ENCODINGS.get(stored.dtype)
    if plain is not None:
        if scale is not None:
            raise InventoryError(
                f"tensor {scale_name(name)}: unexpected scale",
                where=scale.file,
                got=f"a {stored.dtype} weight",
            )
        return plain, stored.shape, None
    if not needs_scale(stored):
        raise InventoryError(
            f"tensor {name}: unknown encoding", where=stored.file, got=f"{stored.dtype} {list(stored.shape)}"
        )
    if scale is None:
        raise InventoryError(
            f"tensor {scale_name(name)} is missing, the scale of a {stored.dtype} weight",
            where=stored.file,
            hint="is the download complete?",
        )
    rows, columns = stored.shape
    if stored.dtype == INT4_DTYPE:
        columns *= 2
        block = _blocks(name, (rows, columns), scale, ("F32",), "INT4", "F32, BF16 or F16")
        return Encoding.INT4, (rows, columns), block
    if isinstance(scale.scale_form, Times | Over):
        return Encoding.NVFP4, (rows, columns * 2), (1, NVFP4_BLOCK)
    if stored.dtype == "F8_E4M3":
        return (
            Encoding.FP8,
            stored.shape,
            _blocks(name, stored.shape, scale, (E8M0, "F32"), "FP8", "F8_E8M0, F32 or BF16"),
        )
    if stored.dtype != "F4":
        columns *= 2
    if scale.dtype != E8M0 or scale.shape != (rows, columns // FP4_BLOCK) or columns % FP4_BLOCK:
        raise InventoryError(
            f"tensor {scale_name(name)}: not the scale of packed FP4",
            where=scale.file,
            expected=f"F8_E8M0 {[rows, columns // FP4_BLOCK]} ({FP4_BLOCK} elements a scale)",
            got=f"{stored_dtype(scale)} {list(scale.shape)}",
        )
    return Encoding.FP4, (rows, columns), FP4_SCALE_BLOCK


def _blocks(
    name: str, shape: tuple[int, ...], scale: Stored, dtypes: tuple[str, ...], kind: str, expected: str
) -> tuple[int, int]:
    """Return how many rows and columns of a weight share one scale, which is read as one of ``dtypes``.

    Raises:
        InventoryError: the scales are of another type or shape.
    """
    if scale.dtype not in dtypes or len(scale.shape) != MATRIX_DIMENSIONS:
        raise InventoryError(
            f"tensor {_name_in_file(scale) or scale_name(name)}: not a scale of {kind}",
            where=scale.file,
            expected=f"{expected} of two dimensions",
            got=f"{stored_dtype(scale)} {list(scale.shape)}",
        )
    rows, columns = shape
    return _block(rows, scale.shape[0], name, scale), _block(columns, scale.shape[1], name, scale)


def _name_in_file(tensor: Stored) -> str | None:
    """Return what the file itself calls a tensor, which folders of other tools name otherwise; None if it is empty."""
    found = tensor_at(tensor.file, tensor.offset) if tensor.nbytes else None  # where nothing lies, the next one begins
    return None if found is None else found[0]


def _block(length: int, scales: int, name: str, scale: Stored) -> int:
    """Return how many of ``length`` rows (or columns) share one of ``scales`` scales.

    The last block may be ragged, so the quotient alone does not tell: the block is the power of two
    that fits, of which there is at most one when there are two scales or more, else the exact quotient.
    """
    if scales > 0:
        least = -(-length // scales)
        power = 1 << (least - 1).bit_length()
        for candidate in (power, least):
            if -(-length // candidate) == scales and (candidate == power or length % scales == 0):
                return candidate
    raise InventoryError(
        f"tensor {_name_in_file(scale) or scale_name(name)}: the shape fits no block size",
        where=scale.file,
        expected=f"scales that divide {length} evenly",
        got=scales,
    )
