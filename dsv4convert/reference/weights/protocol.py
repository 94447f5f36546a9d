"""WeightSource: where the forward pass gets its weights from, one tensor or some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from ...errors import ConfigError, InventoryError
from ...model.config import ModelConfig
from ...model.engram import EngramConstants

Array = npt.NDArray[Any]
Held = TypeVar("Held")

# Expert weights are each read once per step, so keeping them would only push the others out.
DEFAULT_CACHE_BYTES = 2**30


class WeightSource(Protocol):
    """Decoded weights under the names of the published checkpoints, without scales.

    A name is for instance ``layers.0.attn.wq_a.weight``, ``embed.weight`` or ``mtp.0.e_proj.weight``.
    """

    @property
    def config(self) -> ModelConfig:
        """Return the hyperparameters."""
        ...

    def has(self, name: str) -> bool:
        """Return whether the tensor ``name`` is there."""
        ...

    def tensor(self, name: str) -> Array:
        """Return a whole tensor as float32 (``tid2eid`` as int64); InventoryError names a missing one."""
        ...

    def rows(self, name: str, indices: Array) -> Array:
        """Return the rows ``indices`` of a matrix, decoding no others."""
        ...

    def engram_constants(self) -> EngramConstants:
        """Return what finds the rows of V4.1's n-gram tables; ConfigError where the model has none."""
        ...


def missing_weight(name: str, where: object = None) -> InventoryError:
    """Return the error of a tensor that the forward pass needs and the source does not hold."""
    return InventoryError(
        f"no weight {name}",
        where=where,
        hint="check that the checkpoint is complete and that config.json belongs to it",
    )


def no_engram_constants(where: object = None) -> ConfigError:
    """Return the error of a model whose n-gram tables nothing finds the rows of."""
    return ConfigError("the constants of the engram tables are missing", where=where)


class NamedSource(Generic[Held], ABC):
    """A model's config, and its tensors by name as a source holds them; ``where`` they are, for errors.

    A source says how it decodes what it holds.
    """

    def __init__(self, config: ModelConfig, held: Mapping[str, Held], where: Path | None = None) -> None:
        self._config = config
        self._held = held
        self._where = where

    @property
    def config(self) -> ModelConfig:
        """Return the hyperparameters."""
        return self._config

    def has(self, name: str) -> bool:
        """Return whether the tensor ``name`` is there."""
        return name in self._held

    def held(self, name: str) -> Held:
        """Return a tensor as the source holds it.

        Raises:
            InventoryError: there is no such tensor.
        """
        if name not in self._held:
            raise missing_weight(name, self._where)
        return self._held[name]

    def tensor(self, name: str) -> Array:
        """Return a whole tensor as float32, or int64 for a table.

        Raises:
            InventoryError: there is no such tensor.
        """
        return self._whole(self.held(name))

    def rows(self, name: str, indices: Array) -> Array:
        """Return the rows ``indices`` of a matrix, decoding no others.

        Raises:
            InventoryError: there is no such tensor.
        """
        return self._rows(self.held(name), indices)

    @abstractmethod
    def _whole(self, held: Held) -> Array: ...

    @abstractmethod
    def _rows(self, held: Held, indices: Array) -> Array: ...


class DictSource(NamedSource[Array]):
    """Weights that already lie in memory as float32 arrays (``tid2eid`` as int64)."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Array], engram: EngramConstants | None = None
    ) -> None:
        super().__init__(config, tensors)
        self._engram = engram

    def _whole(self, held: Array) -> Array:
        return held

    def _rows(self, held: Array, indices: Array) -> Array:
        return held[indices]

    def engram_constants(self) -> EngramConstants:
        """Return the constants that were given.

        Raises:
            ConfigError: none were.
        """
        if self._engram is None:
            raise no_engram_constants()
        return self._engram


class CachedSource:
    """Another source, with the most recently used decoded tensors kept up to a number of bytes.

    Token-by-token decoding asks for the same weights at every step; a small model then fits whole.
    """

    def __init__(self, source: WeightSource, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Array] = OrderedDict()
        self._kept_bytes = 0

    @property
    def config(self) -> ModelConfig:
        """Return the hyperparameters."""
        return self._source.config

    def has(self, name: str) -> bool:
        """Return whether the tensor ``name`` is there."""
        return self._source.has(name)

    def tensor(self, name: str) -> Array:
        """Return a whole tensor, decoded now or kept from before."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        array = self._source.tensor(name)
        if array.nbytes <= self._max_bytes:
            self._kept[name] = array
            self._kept_bytes += array.nbytes
            while self._kept_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.nbytes
        return array

    def forget(self) -> None:
        """Let go of all tensors that are kept."""
        self._kept.clear()
        self._kept_bytes = 0

    def rows(self, name: str, indices: Array) -> Array:
        """Return the rows ``indices`` of a matrix."""
        if name in self._kept:
            return self._kept[name][indices]
        return self._source.rows(name, indices)

    def engram_constants(self) -> EngramConstants:
        """Return what finds the rows of V4.1's n-gram tables."""
        return self._source.engram_constants()
