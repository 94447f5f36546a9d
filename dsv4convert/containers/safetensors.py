"""Reads the header of a safetensors file: names, dtypes, shapes and byte ranges, and no weights.

A file is an 8-byte little-endian header length, the header (one JSON object) and the payload. The
safetensors package checks the same rules but maps the whole file and tells only that something is
wrong; here every broken rule names the file, the tensor and both sides of the comparison.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileFormatError, not_read
from ..scale_forms import ScaleForm
from .json_object import parse_json_object
from .untrusted import file_size, open_regular

HEADER_LENGTH_BYTES = 8

# All 145,116 tensors of V4-Pro in one file would take 19 MB. The safetensors package allows 100 MB, of which
# a forged header makes gigabytes of objects.
MAX_HEADER_BYTES = 32 * 2**20

# Limits of this reader; no tensor of any model comes near them.
MAX_DIMS = 16
MAX_NAME_CHARACTERS = 1024
MAX_INT64 = 2**63 - 1

# Bits per element; F4 packs two elements a byte, and its shape counts elements.
DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}
METADATA_KEY = "__metadata__"


class Stored(NamedTuple):
    """A tensor where it lies: ``nbytes`` row-major bytes at ``offset`` (from the file's start).

    ``scale_form`` says how scales lie that stand for values of ``dtype``, such as E8M0 in F32 or BF16; shape and bytes
    are then as ``containers.wide_scales`` has them.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scale_form: ScaleForm | None = None


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name, in the header's order.

    Raises:
        InputMissingError, InputOutputError: the file is not there, or cannot be read.
        FileFormatError: truncated, malformed, unknown dtypes, overlapping or out-of-range offsets.
    """
    header, start, size = _read_json_header(path)
    return _tensors(header, path, start, size)


def tensor_at(path: Path, offset: int) -> tuple[str, Stored] | None:
    """Return the name and place of the tensor that has a byte of a file, None where no tensor has it.

    Raises:
        InputMissingError, FileFormatError: as for ``read_header``.
    """
    tensors = read_header(path).items()
    return next((found for found in tensors if 0 <= offset - found[1].offset < found[1].nbytes), None)


def read_metadata(path: Path) -> Any:
    """Return what the header of a safetensors file has for ``__metadata__``, None where it has nothing.

    Raises:
        InputMissingError, InputOutputError: the file is not there, or cannot be read.
        FileFormatError: it is truncated, or its header is not a JSON object.
    """
    return _read_json_header(path)[0].get(METADATA_KEY)


def _read_json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header as it is, where the payload starts, and the size of the file."""
    try:
        with open_regular(path) as file:
            size = file_size(file)
            prefix = file.read(HEADER_LENGTH_BYTES)
            if len(prefix) < HEADER_LENGTH_BYTES:
                raise FileFormatError(
                    "truncated",
                    where=path,
                    expected=f"at least {HEADER_LENGTH_BYTES} bytes",
                    got=size,
                    hint="download the file again",
                )
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, size - HEADER_LENGTH_BYTES):
                raise FileFormatError(
                    "header longer than the file" if length > size - HEADER_LENGTH_BYTES else "header too long",
                    where=path,
                    expected=f"at most {min(MAX_HEADER_BYTES, size - HEADER_LENGTH_BYTES)} bytes",
                    got=length,
                    hint="is this a safetensors file, completely downloaded?",
                )
            text = file.read(length)
    except OSError as error:
        raise not_read(path, error) from None
    if len(text) < length:
        raise FileFormatError("header truncated", where=path, expected=length, got=len(text))
    header = parse_json_object(text, path, error=FileFormatError, subject="header", hint="download the file again")
    return header, HEADER_LENGTH_BYTES + length, size


class _Kind(NamedTuple):
    """What tensors of equal dtype and shape share."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _tensors(header: dict[str, Any], path: Path, data_start: int, size: int) -> dict[str, Stored]:
    header.pop(METADATA_KEY, None)
    payload = size - data_start
    tensors: dict[str, Stored] = {}
    # A hundred thousand tensors are of a few dozen kinds: what is right about a kind is checked once, and kept once.
    kinds: dict[str, _Kind] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if len(name) > MAX_NAME_CHARACTERS:
            raise FileFormatError(
                f"tensor {name[:60]!r}…: name too long",
                where=path,
                expected=f"at most {MAX_NAME_CHARACTERS} characters",
                got=len(name),
            )
        try:
            dtype, dims, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            dims = None
        if not isinstance(dims, list) or len(dims) > MAX_DIMS:
            raise FileFormatError(
                f"tensor {name!r}: malformed entry",
                where=path,
                expected=f"dtype, shape of at most {MAX_DIMS} dimensions, data_offsets",
            )
        # bool is an int to Python, and JSON's true no dimension: [1] and [true] are equal, and not written alike.
        kind = kinds.get(key := f"{dtype} {dims!r}")
        if not (
            type(begin) is type(end) is int
            and 0 <= begin <= MAX_INT64
            and 0 <= end <= MAX_INT64
            and (kind is not None or all(type(n) is int and 0 <= n <= MAX_INT64 for n in dims))
        ):
            raise FileFormatError(
                f"tensor {name!r}: shape and offsets must be integers of 0 or more, within 63 bits", where=path
            )
        if kind is None:
            bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
            if bits is None:
                raise FileFormatError(f"tensor {name!r}: unknown dtype", where=path, got=repr(dtype)[:40])
            kind = kinds[key] = _Kind(sys.intern(dtype), tuple(dims), (math.prod(dims) * bits + 7) // 8)
        dtype, shape, nbytes = kind
        if end - begin != nbytes:
            raise FileFormatError(
                f"tensor {name!r}: bytes do not match dtype {dtype} and shape {list(shape)}"[:300],
                where=path,
                expected=nbytes,
                got=end - begin,
            )
        if end > payload:
            raise FileFormatError(
                f"tensor {name!r}: truncated, the data extends past the end of the file",
                where=path,
                expected=f"{data_start + end} bytes",
                got=f"{size}",
                hint="download the file again",
            )
        tensors[name] = Stored(path, dtype, shape, data_start + begin, nbytes)
        spans.append((begin, end, name))
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            rule = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise FileFormatError(f"tensor {name!r}: {rule}", where=path, expected=f"offset {position}", got=begin)
        position = end
    if position != payload:
        raise FileFormatError(
            "bytes after the last tensor", where=path, expected=f"{data_start + position} bytes", got=size
        )
    return tensors
