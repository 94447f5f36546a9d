"""The forward pass in numpy: what a conversion must not change."""

from __future__ import annotations

from .model import Model, State
from .sampling import generate, greedy, gumbel_max
from .weights.protocol import CachedSource, DictSource, WeightSource

__all__ = ["CachedSource", "DictSource", "Model", "State", "WeightSource", "generate", "greedy", "gumbel_max"]
