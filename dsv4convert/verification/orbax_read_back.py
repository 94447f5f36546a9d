"""Reads a checkpoint for MaxText with Orbax, and holds every leaf against the bytes of its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..containers.orbax import ARRAY_NAME, ITEMS, ITEMSIZES, ZarrArray, read_array
from ..errors import FileFormatError, missing_package

# Leaves are restored together up to so many bytes. Larger ones, stacks of experts, are read a chunk at a time by
# TensorStore, the library by which Orbax reads arrays; Orbax itself would hold one whole.
RESTORE_BYTES = 128 * 2**20


def import_orbax() -> Any:
    """Return the module ``orbax.checkpoint``.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import orbax.checkpoint
    except ImportError:
        raise missing_package("--check", "orbax-checkpoint", "maxtext", "leave out --check") from None
    return orbax.checkpoint


def read_back(folder: Path) -> str:
    """Read every leaf of a checkpoint for MaxText and compare it with its file; return what was found, as a note.

    Raises:
        DeviceError: Orbax is not installed.
        FileFormatError: Orbax finds other leaves, shapes, types or bits than are in the files.
    """
    orbax = import_orbax()
    items = folder / ITEMS
    handler = orbax.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    checkpointer = orbax.Checkpointer(handler)
    try:
        metadata = handler.metadata(items)
        found = dict(_flat(metadata if isinstance(metadata, dict) else metadata.tree))
        arrays = {path.parent.name: read_array(path) for path in sorted(items.glob(f"*/{ARRAY_NAME}"))}
        _check_equal("leaves", items, sorted(arrays), sorted(found))
        for name, array in arrays.items():
            said = (tuple(found[name].shape), str(found[name].dtype))
            _check_equal(f"leaf {name}", items, (array.shape, array.dtype), said)
        for names in _batches(arrays):
            if arrays[names[0]].nbytes > RESTORE_BYTES:
                _compare_chunks(items / names[0], arrays[names[0]])
                continue
            for name, value in _flat(_restore(orbax, checkpointer, items, names)):
                _compare(items / name, arrays[name], np.asarray(value), tuple(slice(None) for _ in value.shape))
    finally:
        checkpointer.close()
    return f"read back with Orbax {orbax.__version__}: {len(arrays)} leaves, each as its file has it"


def _check_equal(what: str, where: Path, expected: object, got: object) -> None:
    if expected != got:
        raise FileFormatError(f"{what}: Orbax reads something else", where=where, expected=expected, got=got)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts by their keys, joined by dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _batches(arrays: Mapping[str, ZarrArray]) -> Iterator[list[str]]:
    """Yield names of arrays that are restored together; a larger one stands alone."""
    batch: list[str] = []
    size = 0
    for name, array in arrays.items():
        if batch and size + array.nbytes > RESTORE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += array.nbytes
    if batch:
        yield batch


def _restore(orbax: Any, checkpointer: Any, items: Path, names: list[str]) -> Any:
    """Return the leaves of these names as Orbax restores them, as numpy arrays in nested dicts."""
    item: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name in names:
        *outer, last = name.split(".")
        inner, inner_arguments = item, arguments
        for key in outer:
            inner, inner_arguments = inner.setdefault(key, {}), inner_arguments.setdefault(key, {})
        inner[last], inner_arguments[last] = 0, orbax.RestoreArgs(restore_type=np.ndarray)
    wanted = orbax.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
    return checkpointer.restore(items, args=wanted)


def _compare_chunks(folder: Path, array: ZarrArray) -> None:
    """Compare a leaf chunk by chunk, so that no more than one is in memory."""
    import tensorstore

    store = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}, read=True)
    opened = store.result()
    for place in product(*map(range, array.grid)):
        box = tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, array.chunk, strict=True))
        _compare(folder, array, opened[box].read().result(), box)


def _compare(folder: Path, array: ZarrArray, value: NDArray[Any], box: tuple[slice, ...]) -> None:
    """Compare elements of a leaf with those that lie in its file, bit for bit."""
    bits = np.dtype(f"<u{ITEMSIZES[array.dtype]}")
    laid_out = tuple(array.shape[axis] for axis in array.order)
    stored = np.memmap(folder / array.file_name, bits, "r", array.index_bytes, laid_out)
    expected = stored.transpose(np.argsort(array.order))[box]
    if str(value.dtype) != array.dtype or not np.array_equal(value.view(bits), expected):
        raise FileFormatError(f"leaf {folder.name}: Orbax reads something else", where=folder, got=value.dtype)
