"""A small checkpoint whose rows low-bit types fill, importance matrices, and the types that take their library long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsv4convert.containers.imatrix import imatrix_file

# Rows of whole super-blocks.
WHOLE = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "o_lora_rank": 64,
    "num_attention_heads": 2,
    "o_groups": 2,
    "num_experts_per_tok": 1,
}
# Few weights: some types take the library microseconds an element.
SMALL = {"ratios": [4], "experts": 2, "vocab": 384}

# Choices that no rounding changes: hash-routed layers, and as many entries to choose as there are. llama.cpp runs
# no model without a layer of ratio 128.
CLEAR = {
    "variant": "base",
    "ratios": [4, 128],
    "experts": 2,
    "vocab": 384,
    "mtp": False,
    "overrides": {**WHOLE, "num_hash_layers": 2, "index_topk": 512},
}

# These take tens of microseconds.
SLOW = ("iq1_s", "iq1_m", "iq2_s", "iq2_xs")


def write_imatrix(
    path: Path,
    sums: Mapping[str, npt.NDArray[np.float32]],
    counts: Mapping[str, npt.NDArray[np.int64]],
    *,
    datasets: Iterable[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix in the GGUF form: ``sums`` [experts, columns] and ``counts`` [experts] by tensor."""
    shapes = {name: values.shape for name, values in sums.items()}
    file = imatrix_file(shapes, datasets=datasets, chunks=chunks, chunk_size=chunk_size)
    content = bytearray(file.header.ljust(file.nbytes, b"\0"))
    for name, places in file.places.items():
        for values, offset in zip((sums[name], counts[name]), places, strict=True):
            data = np.asarray(values, "<f4").tobytes()
            content[offset : offset + len(data)] = data
    path.write_bytes(content)
