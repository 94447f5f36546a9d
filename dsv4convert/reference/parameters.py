"""The weights of a forward pass by name, and what the published kernels do to the numbers they multiply."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..model.config import ModelConfig, Version
from .arithmetic import product as numpy_product
from .arithmetic import rms_norm
from .rounding import (
    ENTRY_BLOCK,
    INDEXER_BLOCK,
    KV_BLOCK,
    LINEAR_BLOCK,
    LINEAR_BLOCK_V41,
    hadamard,
    round_to_e2m1,
    round_to_e2m1_scaled_e4m3,
    round_to_e4m3,
)
from .weights.protocol import Array, WeightSource

# Called with the name and the value of each activation, in the order of computation.
Record = Callable[[str, Array], None]

# Called with the name of a matrix and the rows [..., columns] that are multiplied by it.
Observe = Callable[[str, Array], None]

# Returns x·wᵀ for x [..., in] and w [out, in].
Product = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Parameters:
    """A source of weights, and whether activations are rounded as the published FP8 and FP4 kernels do.

    ``observe`` is called with what every matrix is multiplied with, and ``product`` multiplies.
    """

    source: WeightSource
    activation_rounding: bool = False
    observe: Observe | None = None
    product: Product = numpy_product

    @property
    def config(self) -> ModelConfig:
        """Return the hyperparameters."""
        return self.source.config

    @property
    def is_v41(self) -> bool:
        """Return whether the model is of DeepSeek-V4.1's architecture."""
        return self.config.version is Version.V41

    def weight(self, name: str) -> Array:
        """Return a whole tensor as float32, or int64 for a table."""
        return self.source.tensor(name)

    def rms_norm(self, x: Array, name: str) -> Array:
        """Return weight · x / rms(x)."""
        return rms_norm(x, self.weight(name), self.config.rms_norm_eps)

    def project(self, x: Array, name: str) -> Array:
        """Return x·wᵀ for a weight that is published in BF16 or float32."""
        self.see(name, x)
        return self.product(x, self.weight(name))

    def linear(self, x: Array, name: str, seen: Array | None = None) -> Array:
        """Return x·wᵀ for a weight that is published in FP8 or FP4: its kernel takes e4m3 inputs.

        ``seen`` is what observers are shown, where that is not ``x``.
        """
        self.see(name, x if seen is None else seen)
        if self.activation_rounding:
            x = round_to_e4m3(x, LINEAR_BLOCK_V41 if self.is_v41 else LINEAR_BLOCK)
        return self.product(x, self.weight(name))

    def see(self, name: str, x: Array) -> None:
        """Show an observer the rows [..., columns] that the matrix ``name`` is multiplied with."""
        if self.observe is not None:
            self.observe(name, x)

    def rounded_kv(self, kv: Array) -> Array:
        """Round raw kv: V4 spares the rotary part."""
        if not self.activation_rounding:
            return kv
        return round_to_e4m3(kv, LINEAR_BLOCK_V41) if self.is_v41 else self._rounded_but_rotary(kv)

    def rounded_entries(self, entries: Array) -> Array:
        """Round compressed kv: as raw kv in V4, to e2m1 with e4m3 scales in V4.1."""
        if not self.activation_rounding:
            return entries
        return round_to_e2m1_scaled_e4m3(entries, ENTRY_BLOCK) if self.is_v41 else self._rounded_but_rotary(entries)

    def rounded_index(self, x: Array) -> Array:
        """Round queries or keys of the indexer; V4 rotates them first, which cancels where nothing is rounded."""
        if not self.activation_rounding:
            return x
        return round_to_e2m1(x if self.is_v41 else hadamard(x), INDEXER_BLOCK)

    def _rounded_but_rotary(self, kv: Array) -> Array:
        r = self.config.qk_rope_head_dim
        return np.concatenate([round_to_e4m3(kv[..., :-r], KV_BLOCK), kv[..., -r:]], axis=-1)
