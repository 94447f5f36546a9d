"""Lays out safetensors files: a header of names, dtypes and shapes, and the tensors behind it without gaps."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence

from ..checkpoint.safetensors_header import DTYPE_BITS, HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY
from ..errors import UsageError
from ..plan import OutputFile, OutputTensor, align_up

# The payload starts at a multiple of this, so that a mapped file gives aligned tensors.
HEADER_ALIGNMENT = 8

# What transformers asks of a file before it loads it.
PYTORCH_METADATA = {"format": "pt"}

# Made once: json.dumps makes an encoder for every call.
_json = json.JSONEncoder(separators=(",", ":")).encode


def safetensors_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Return the head of a file that holds ``tensors`` in the given order, and each one's offset in the file.

    ``tensors`` are (name, safetensors dtype, shape, bytes). The format allows no gaps, so whoever wants
    aligned tensors gives the widest elements first (``safetensors_file`` does).

    Raises:
        UsageError: more tensors than a header may list.
    """
    # Written piece by piece: the generic encoder needs a dict and three lists per tensor.
    parts = [f"{_json(METADATA_KEY)}:{_json(dict(metadata))}"] if metadata else []
    starts: list[int] = []
    position = 0
    for name, dtype, shape, nbytes in tensors:
        end = position + nbytes
        dimensions = ",".join(map(str, shape))
        parts.append(f'{_json(name)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[{position},{end}]}}')
        starts.append(position)
        position = end
    text = ("{" + ",".join(parts) + "}").encode()
    text = text.ljust(align_up(len(text), HEADER_ALIGNMENT))
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            "too many tensors for one safetensors file",
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
            got=len(text),
            hint="give a smaller maximum size of a file",
        )
    header = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
    return header, [len(header) + start for start in starts]


def safetensors_file(
    name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str] | None = PYTORCH_METADATA
) -> OutputFile:
    """Return the file ``name`` that holds ``tensors``, whose offsets are filled in here.

    Wider dtypes come first, as in files that the safetensors package writes, so that every tensor is
    aligned to its element; within a dtype the given order stays.

    Raises:
        UsageError: more tensors than a header may list.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    header, offsets = safetensors_header(((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), metadata)
    placed = tuple(tensor._replace(offset=offset) for tensor, offset in zip(ordered, offsets, strict=True))
    end = placed[-1].offset + placed[-1].nbytes if placed else len(header)
    return OutputFile(name, header, placed, end)


def whole_file(name: str, content: bytes) -> OutputFile:
    """Return a file whose bytes are known already, such as a config or a tokenizer."""
    return OutputFile(name, content, (), len(content))


def safetensors_index(files: Iterable[OutputFile]) -> bytes:
    """Return ``model.safetensors.index.json`` of ``files``: their payload and which of them holds what."""
    # Written line by line: the generic encoder, with indents, holds every token of 13 MB at once.
    entries: list[tuple[str, str]] = []
    total = 0
    for file in files:
        entries += ((tensor.name, file.name) for tensor in file.tensors)
        total += sum(tensor.nbytes for tensor in file.tensors)
    entries.sort()
    text = io.BytesIO()
    text.write(f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'.encode())
    for number, (name, holder) in enumerate(entries):
        text.write(f"{',' if number else ''}\n    {_json(name)}: {_json(holder)}".encode())
    text.write(b"\n  }\n}\n")
    return text.getvalue()
