"""The forward pass in numpy: what a conversion must not change."""

from __future__ import annotations

from .model import Model, State
from .sampling import Speculation, generate, generate_speculatively, greedy, gumbel_max
from .weights.protocol import CachedSource, DictSource, WeightSource

__all__ = [
    "CachedSource",
    "DictSource",
    "Model",
    "Speculation",
    "State",
    "WeightSource",
    "generate",
    "generate_speculatively",
    "greedy",
    "gumbel_max",
]
