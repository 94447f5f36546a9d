"""Weight sources that read files: a checkpoint folder, a GGUF, a folder of model-parallel shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from ...checkpoint import Checkpoint, Weight
from ...checkpoint.engram import read_engram_constants
from ...checkpoint.meaning import open_checked
from ...checkpoint.shards import ShardCheckpoint, ShardedWeight, is_shard_folder, open_shards
from ...checkpoint.weights import Encoding
from ...containers.gguf import is_gguf, open_gguf
from ...containers.presence import exists
from ...errors import InputMissingError
from ...model.config import ModelConfig
from ...model.engram import EngramConstants
from .decode import Matrix, Scale, Zero, gather_rows, read_rows
from .gguf import GgufSource
from .protocol import Array, NamedSource, WeightSource

AnyWeight = TypeVar("AnyWeight")


class _FolderSource(NamedSource[AnyWeight]):
    """The weights of a folder of safetensors files by name, with the config and the constants that lie next to them."""

    def __init__(self, folder: Path, config: ModelConfig, weights: Mapping[str, AnyWeight]) -> None:
        super().__init__(config, weights, folder)
        self._folder = folder

    def engram_constants(self) -> EngramConstants:
        """Return what finds the rows of V4.1's n-gram tables, computed from the folder's tokenizer.

        Raises:
            DeviceError, TokenizerError, ConfigError: as for ``read_engram_constants``.
        """
        return read_engram_constants(self._folder, self._config)


class HfSource(_FolderSource[Weight]):
    """Weights of a checkpoint folder, each decoded when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.folder, checkpoint.config, checkpoint.weights)

    def _whole(self, held: Weight) -> Array:
        return read_rows(weight_matrix(held)).reshape(held.shape)

    def _rows(self, held: Weight, indices: Array) -> Array:
        return gather_rows(weight_matrix(held), indices)


class ShardSource(_FolderSource[ShardedWeight]):
    """Weights of a folder of model-parallel shards, joined from all ranks when they are asked for."""

    def __init__(self, checkpoint: ShardCheckpoint) -> None:
        super().__init__(checkpoint.folder, checkpoint.config, checkpoint.weights)

    def _whole(self, held: ShardedWeight) -> Array:
        parts = [read_rows(weight_matrix(part)).reshape(part.shape) for part in held.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=held.axis)

    def _rows(self, held: ShardedWeight, indices: Array) -> Array:
        parts = [weight_matrix(part) for part in held.parts]
        if len(parts) == 1:
            return gather_rows(parts[0], indices)
        if held.axis == 1:
            return np.concatenate([gather_rows(part, indices) for part in parts], axis=1)
        pieces = np.empty((len(indices), held.shape[1]), np.float32)
        first = 0
        for part in parts:
            here = (indices >= first) & (indices < first + part.rows)
            pieces[here] = gather_rows(part, indices[here] - first)
            first += part.rows
        return pieces


def weight_matrix(weight: Weight) -> Matrix:
    """Return where and how a weight lies; a vector is a matrix of one row."""
    rows, columns = weight.shape if len(weight.shape) == 2 else (1, int(np.prod(weight.shape)))
    scale, stored = None, weight.scale
    if stored is not None and weight.block is not None:
        shape = stored.shape[0], stored.shape[1]
        scale = Scale(stored.file, stored.offset, stored.dtype, shape, weight.block, stored.scale_form)
    # Where it is no type of ggml, NVFP4 is FP4 whose scales are read as float32.
    kind = "fp4" if weight.encoding is Encoding.NVFP4 else weight.encoding.value
    zero = None if weight.zero is None else Zero(weight.zero.file, weight.zero.offset, weight.zero.shape[1])
    return Matrix(weight.stored.file, weight.stored.offset, kind, rows, columns, scale, zero)


def open_source(path: Path) -> WeightSource:
    """Open a model in any layout.

    Raises:
        InputMissingError: there is nothing at ``path``.
        Dsv4Error: what is there is not a readable model.
    """
    if not exists(path):
        raise InputMissingError("no such file or folder", where=path)
    if is_gguf(path):
        return GgufSource(open_gguf(path))
    if is_shard_folder(path):
        return ShardSource(open_shards(path))
    # Only --speculate runs a draft, and it looks itself whether there is one.
    return HfSource(open_checked(path, draft_wanted=False))
