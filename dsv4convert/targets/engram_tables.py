"""The n-gram tables of V4.1 in a GGUF: quantised, or as published, codes and scales in one tensor or in two."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.weights import Encoding, Weight
from ..errors import InventoryError
from ..formats.ggml_types import BY_NAME
from ..plan import Join, Segment
from .segments import ElementType, RowSegments, convert_segments, copy_segments, operands

# A row's codes and then its scales; codes and scales in tensors of their own. Named after the published width.
ROW264, SPLIT = "i8-row264", "i8-split"
ENGRAM_TYPES = ("q8_0", "mxfp4", "bf16", ROW264, SPLIT)
LOSSLESS_TYPES = (ROW264, SPLIT)

I8 = BY_NAME["i8"]
SCALE_BLOCK = 32
SCALE_SUFFIX = "_scale"

Table = tuple[str, tuple[int, ...], ElementType, Sequence[Segment]]


def table_type(kind: str) -> ElementType:
    """Return ggml's element type of a table of one of ``ENGRAM_TYPES``."""
    return I8 if kind in LOSSLESS_TYPES else BY_NAME[kind]


def encoding_name(kind: str, columns: int) -> str | None:
    """Return what the key ``engram.encoding`` calls the bytes of a lossless table; None for ggml's own types.

    >>> encoding_name("i8-row264", 256), encoding_name("q8_0", 256)
    ('e4m3_e8m0_32_row264', None)
    """
    if kind not in LOSSLESS_TYPES:
        return None
    layout = f"row{columns + columns // SCALE_BLOCK}" if kind == ROW264 else "split"
    return f"e4m3_e8m0_{SCALE_BLOCK}_{layout}"


def table_tensors(name: str, weight: Weight, kind: str) -> list[Table]:
    """Return the tensors (name, shape, type, segments) that hold a table in one of ``ENGRAM_TYPES``.

    Raises:
        InventoryError: a lossless kind, and the table is not FP8 with e8m0 scales of 32 columns.
    """
    rows, columns = weight.shape
    if kind not in LOSSLESS_TYPES:
        to = table_type(kind)
        return [(name, weight.shape, to, convert_segments(weight, to))]
    scale = weight.scale
    if (
        weight.encoding is not Encoding.FP8
        or weight.block != (1, SCALE_BLOCK)
        or scale is None
        or scale.dtype != "F8_E8M0"
    ):
        raise InventoryError(
            f"tensor {weight.name}: {kind} holds FP8 tables as they were published",
            where=weight.stored.file,
            expected=f"F8_E4M3 with F8_E8M0 scales of 1x{SCALE_BLOCK} blocks",
            got=weight.encoding.value if weight.block is None else f"{weight.encoding.value} in blocks {weight.block}",
            hint="choose another --engram",
        )
    if kind == ROW264:
        width = columns + scale.shape[1]
        joined = Segment(Join((weight.stored.dtype, scale.dtype)), operands(weight), rows, width)
        return [(name, (rows, width), I8, RowSegments(joined))]
    stem = name.removesuffix(".weight")
    return [
        (name, weight.shape, I8, copy_segments(weight.stored)),
        (f"{stem}{SCALE_SUFFIX}.weight", scale.shape, I8, copy_segments(scale)),
    ]
