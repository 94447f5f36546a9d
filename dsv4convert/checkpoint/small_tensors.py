"""Reads tensors of a few bytes, of which a folder may have a hundred thousand, before anything else of it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..containers.safetensors import Stored
from ..containers.sources import prefetch
from ..containers.untrusted import open_regular
from ..errors import FileFormatError, InventoryError, not_read


def read_small(tensors: Mapping[str, Stored]) -> dict[str, bytes]:
    """Return the bytes of small tensors by name, every file opened once.

    Raises:
        InputMissingError, InputOutputError, FileFormatError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    prefetch((tensor.file, tensor.offset, tensor.nbytes) for tensor in tensors.values())
    found: dict[str, bytes] = {}
    for path, names in by_file.items():
        try:
            with open_regular(path) as file:
                for name in sorted(names, key=lambda name: tensors[name].offset):
                    file.seek(tensors[name].offset)
                    content = file.read(tensors[name].nbytes)
                    if len(content) != tensors[name].nbytes:
                        raise FileFormatError("truncated", where=path, hint="download the file again")
                    found[name] = content
        except OSError as error:
            raise not_read(path, error) from None
    return {name: found[name] for name in tensors}


def read_scalars(tensors: Mapping[str, Stored]) -> dict[str, float]:
    """Return the value of each tensor of one float32 by its name.

    Raises:
        InventoryError: one is another tensor.
        InputMissingError, InputOutputError, FileFormatError: a file cannot be read.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != "F32" or math.prod(tensor.shape) != 1:
            raise InventoryError(
                f"tensor {name}: not a scale",
                where=tensor.file,
                expected="one F32",
                got=f"{tensor.dtype} {list(tensor.shape)}",
            )
    return {name: float(np.frombuffer(raw, "<f4")[0]) for name, raw in read_small(tensors).items()}
