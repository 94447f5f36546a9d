"""Writing GGUF: the header of a file, key-values and tensor entries, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gguf import GGUFValueType

from ..errors import ConfigError
from ..plan import align_up
from .gguf import DEFAULT_ALIGNMENT, MAGIC, SCALARS, VERSION

U16, U32, I32 = GGUFValueType.UINT16, GGUFValueType.UINT32, GGUFValueType.INT32
U64 = GGUFValueType.UINT64
F32, BOOL = GGUFValueType.FLOAT32, GGUFValueType.BOOL
STRING, ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY

# struct codes of the scalar value types, little-endian without padding.
SCALAR_CODES = {GGUFValueType(number): code for number, (_, code) in SCALARS.items()} | {BOOL: "?"}


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry; ``sub_type`` is the element type of an array and None otherwise."""

    key: str
    type: GGUFValueType
    value: Any
    sub_type: GGUFValueType | None = None


class TensorInfo(NamedTuple):
    """A tensor's entry in a header: row-major ``shape``, ggml's type ``number``, ``offset`` from the data's start."""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


def gguf_header(
    entries: Sequence[KeyValue], tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """Return the header of a GGUF v3 file, zeros up to the data's start included.

    Layout: magic, version (u32), number of tensors and of key-values (u64 each), the key-values, the tensors' entries.

    Raises:
        ConfigError: see ``encode_key_values``.
    """
    counts = struct.pack("<IQQ", VERSION, len(tensors), len(entries))
    head = MAGIC + counts + encode_key_values(entries) + b"".join(map(_tensor_info, tensors))
    return head.ljust(align_up(len(head), alignment), b"\0")


def _tensor_info(tensor: TensorInfo) -> bytes:
    """Return an entry: name, dimensions fastest first, type, offset in the data."""
    name = tensor.name.encode()
    dims = tuple(reversed(tensor.shape)) or (1,)
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.number, tensor.offset)
    return struct.pack("<Q", len(name)) + name + numbers


def encode_key_values(entries: Iterable[KeyValue]) -> bytes:
    """Return the bytes of a GGUF v3 key-value section, little-endian.

    Layout: for each entry, the key (u64 length, UTF-8), the type (u32) and the value. A text is its
    length and its UTF-8; an array is its element type (u32), its length (u64) and its elements.

    Raises:
        ConfigError: a value that its type cannot hold; the key is named.
    """
    parts: list[bytes] = []
    for entry in entries:
        try:
            parts.append(_encode_text(entry.key))
            parts.append(struct.pack("<I", entry.type))
            if entry.type == ARRAY:
                parts.append(_encode_array(entry.value, entry.sub_type))
            else:
                parts.append(_encode_scalar(entry.value, entry.type))
        except (struct.error, OverflowError, UnicodeEncodeError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"GGUF key {entry.key}: {entry.value!r:.80} does not fit ({error})",
                expected=entry.type.name if entry.sub_type is None else f"{entry.sub_type.name} array",
            ) from None
    return b"".join(parts)


def _encode_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encode_scalar(value: Any, kind: GGUFValueType) -> bytes:
    return _encode_text(value) if kind == STRING else struct.pack("<" + SCALAR_CODES[kind], value)


def _encode_array(values: Sequence[Any], kind: GGUFValueType | None) -> bytes:
    if kind is None:
        raise TypeError("an array without an element type")
    head = struct.pack("<IQ", kind, len(values))
    if kind != STRING:
        return head + struct.pack(f"<{len(values)}{SCALAR_CODES[kind]}", *values)
    # One join over both halves: a vocabulary is a quarter of a million short texts.
    pack_length = struct.Struct("<Q").pack
    texts = [text.encode("utf-8") for text in values]
    return head + b"".join([part for text in texts for part in (pack_length(len(text)), text)])
