"""Orbax checkpoints of Zarr 3 arrays, one file of data each: what stands in their files, and reading it.

An array's bytes lie in its axes' order or any other (Zarr's codec ``transpose``), in chunks one behind the other (its
codec ``sharding_indexed``) behind an index of (offset, size) for each chunk. There is neither compression nor OCDBT, so
that bytes have known places before they are written.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import FileFormatError
from .json_object import read_json_object

# Of a checkpoint: the step, its item, and their files.
STEP, ITEMS = "0", "0/items"
CHECKPOINT_METADATA_NAME = "_CHECKPOINT_METADATA"
METADATA_NAME, SHARDING_NAME, COMMIT_NAME = "_METADATA", "_sharding", "commit_success.txt"
ARRAY_NAME = "zarr.json"

# What a file on an object store stands for: the writer came to its end.
COMMIT_TEXT = b"Checkpoint commit was successful\n"

ITEMSIZES = {"bfloat16": 2, "float32": 4, "int32": 4}

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICT_KEY = 2  # Orbax's number of a key of a dict

_BYTES: Mapping[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


class ZarrArray(NamedTuple):
    """An array: its shape, Zarr's name of its type, the axis that each axis of its bytes is, the shape of a chunk."""

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the number of chunks along each axis."""
        return tuple(size // step for size, step in zip(self.shape, self.chunk, strict=True))

    @property
    def is_in_order(self) -> bool:
        """Return whether every chunk is a run of the elements as they lie in the axes' order, and so the next one.

        >>> [ZarrArray((4, 6), "float32", (0, 1), chunk).is_in_order for chunk in ((2, 6), (1, 3), (4, 3))]
        [True, True, False]
        """
        grid = [self.grid[axis] for axis in self.order]
        cut = max((axis for axis, count in enumerate(grid) if count > 1), default=0)
        return all(self.chunk[axis] == 1 for axis in self.order[:cut])

    @property
    def nbytes(self) -> int:
        """Return the bytes of all elements."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    @property
    def file_name(self) -> str:
        """Return the name of the one file of data."""
        return ".".join("0" * len(self.shape))

    @property
    def index_bytes(self) -> int:
        """Return the bytes of the index of chunks, behind which the elements lie: two 64-bit numbers for each chunk."""
        return math.prod(self.grid) * 2 * np.dtype("<u8").itemsize

    def chunk_index(self) -> bytes:
        """Return what a file of data begins with: offset and size of every chunk, in the order of the array's axes.

        >>> np.frombuffer(ZarrArray((2, 4), "float32", (1, 0), (2, 2)).chunk_index(), "<u8").reshape(-1, 2).tolist()
        [[32, 16], [48, 16]]
        """
        grid, itemsize = self.grid, ITEMSIZES[self.dtype]
        size = math.prod(self.chunk) * itemsize
        count = math.prod(grid)
        places = np.arange(count).reshape([grid[axis] for axis in self.order])
        places = places.transpose(np.argsort(self.order)).reshape(-1)
        index = np.empty((count, 2), "<u8")
        index[:, 0] = self.index_bytes + places * size
        index[:, 1] = size
        return index.tobytes()

    def document(self) -> dict[str, Any]:
        """Return what ``zarr.json`` says of the array."""
        codecs = [{"name": "transpose", "configuration": {"order": list(self.order)}}, _BYTES]
        if self.order == tuple(range(len(self.order))):
            del codecs[0]
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": codecs,
            "index_codecs": [_BYTES],
            "index_location": "start",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shape)}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }


def read_array(path: Path) -> ZarrArray:
    """Read a ``zarr.json`` of the form that ``ZarrArray.document`` has.

    Raises:
        FileFormatError: it has another one.
        InputMissingError, ConfigError: it is not there, or no JSON object.
    """
    found = read_json_object(path)
    try:
        inner = found["codecs"][0]["configuration"]
        shape = tuple(map(int, found["shape"]))
        order: Sequence[int] = range(len(shape))
        if inner["codecs"][0]["name"] == "transpose":
            order = inner["codecs"][0]["configuration"]["order"]
        array = ZarrArray(shape, str(found["data_type"]), tuple(map(int, order)), tuple(map(int, inner["chunk_shape"])))
        fits = array.dtype in ITEMSIZES and sorted(array.order) == list(range(len(shape))) and len(shape) > 0
        fits = fits and all(step > 0 and size % step == 0 for size, step in zip(shape, array.chunk, strict=True))
        if fits and array.document() == found:
            return array
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    raise FileFormatError(
        "not an array as dsv4convert writes them", where=path, expected="one shard without compression, index at start"
    )


def step_documents() -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a step that do not depend on its arrays."""
    empty: dict[str, Any] = {}
    document = {
        "item_handlers": {"items": _HANDLER},
        "metrics": empty,
        "performance_metrics": empty,
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": empty,
    }
    yield f"{STEP}/{CHECKPOINT_METADATA_NAME}", json.dumps(document).encode()
    for folder in (STEP, ITEMS):
        yield f"{folder}/{COMMIT_NAME}", COMMIT_TEXT


def tree_document(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what ``_METADATA`` says of a tree of arrays with these shapes; a name is a path joined by dots."""
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def sharding_document(names: Iterable[str]) -> dict[str, str]:
    """Return what ``_sharding`` says of arrays: each is whole on one device, where nothing else is asked for."""
    sharding = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    return {base64.b64encode(name.encode()).decode(): sharding for name in names}
