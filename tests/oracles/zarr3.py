"""A second, slow opinion on Zarr 3: an array of one shard, decoded chunk by chunk as the specification says."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4"), "int32": np.dtype("<i4")}


def read_zarr(folder: Path) -> npt.NDArray[Any]:
    """Return the array in a folder, and check that its file holds nothing else."""
    meta = json.loads((folder / "zarr.json").read_text())
    assert (meta["zarr_format"], meta["node_type"]) == (3, "array")
    assert meta["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": meta["shape"]}}
    assert meta["chunk_key_encoding"] == {"name": "v2", "configuration": {"separator": "."}}
    (sharding,) = meta["codecs"]
    assert sharding["name"] == "sharding_indexed"
    sharding = sharding["configuration"]
    little = [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert (sharding["index_location"], sharding["index_codecs"]) == ("start", little)
    transposes, last = sharding["codecs"][:-1], sharding["codecs"][-1:]
    assert last == little
    data = (folder / ".".join("0" * len(meta["shape"]))).read_bytes()
    step = sharding["chunk_shape"]
    grid = [size // part for size, part in zip(meta["shape"], step, strict=True)]
    assert [size * part for size, part in zip(grid, step, strict=True)] == meta["shape"]
    index = np.frombuffer(data, "<u8", 2 * int(np.prod(grid))).reshape(*grid, 2)
    out = np.empty(meta["shape"], DTYPES[meta["data_type"]])
    seen = index.nbytes
    for place in product(*map(range, grid)):
        offset, size = map(int, index[place])
        order = list(range(len(step)))
        for transpose in transposes:
            assert transpose["name"] == "transpose"
            order = transpose["configuration"]["order"]
        encoded = np.frombuffer(data[offset : offset + size], out.dtype).reshape([step[axis] for axis in order])
        decoded = np.empty(step, out.dtype)
        np.transpose(decoded, order)[...] = encoded
        out[tuple(slice(at * part, (at + 1) * part) for at, part in zip(place, step, strict=True))] = decoded
        seen += size
    assert seen == len(data)
    assert len({int(offset) for offset in index[..., 0].flat}) == int(np.prod(grid))
    return out


def read_leaves(out: Path) -> dict[str, npt.NDArray[Any]]:
    """Return every leaf of a checkpoint for MaxText by the keys of its path, joined by dots."""
    return {path.parent.name: read_zarr(path.parent) for path in sorted((out / "0" / "items").glob("*/zarr.json"))}
