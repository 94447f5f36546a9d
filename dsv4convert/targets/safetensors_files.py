"""safetensors files of an output folder: one file of tensors, a file given whole, the index."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

from ..containers.safetensors import DTYPE_BITS
from ..containers.safetensors_write import PYTORCH_METADATA, json_string, safetensors_header
from ..plan import OutputFile, OutputTensor, Segment, at_offset, total_bytes
from .segments import shared


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
    placed = tuple(at_offset(tensor, offset) for tensor, offset in zip(ordered, offsets, strict=True))
    end = placed[-1].offset + placed[-1].nbytes if placed else len(header)
    return OutputFile(name, header, placed, end)


def unplaced_tensor(name: str, dtype: str, shape: tuple[int, ...], segments: Sequence[Segment]) -> OutputTensor:
    """Return a tensor that has no place in a file yet."""
    return OutputTensor(name, dtype, shared(shape), 0, shared(total_bytes(segments)), segments)


def whole_file(name: str, content: bytes) -> OutputFile:
    """Return a file whose bytes are known already, such as a config or a tokenizer."""
    return OutputFile(name, content, (), len(content))


def safetensors_index(files: Iterable[OutputFile]) -> bytes:
    """Return ``model.safetensors.index.json`` of ``files``: their payload and which of them holds what."""
    # Written line by line, from names that are sorted by file: the generic encoder, with indents, holds every token of
    # 13 MB at once, and pairs of names take as much.
    names: list[tuple[list[str], str]] = []
    total = 0
    for file in files:
        names.append((sorted(tensor.name for tensor in file.tensors), file.name))
        total += sum(tensor.nbytes for tensor in file.tensors)
    entries = heapq.merge(*(zip(ordered, repeat(holder)) for ordered, holder in names))
    text = io.BytesIO()
    text.write(f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'.encode())
    for number, (name, holder) in enumerate(entries):
        text.write(f"{',' if number else ''}\n    {json_string(name)}: {json_string(holder)}".encode())
    text.write(b"\n  }\n}\n")
    return text.getvalue()
