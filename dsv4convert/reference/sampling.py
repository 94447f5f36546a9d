"""Choosing the next token from logits: greedy, or sampled by the Gumbel-max trick."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from .source import Array


def greedy(logits_V: Array) -> int:
    """Return the token with the largest logit; the lowest id on a tie."""
    return int(np.argmax(logits_V))


def gumbel_max(logits_V: Array, temperature: float, rng: np.random.Generator) -> int:
    """Return a token sampled from softmax(logits / temperature).

    argmax of logits / temperature + G, with G independent standard Gumbel noise, has exactly that
    distribution, and needs neither a normalisation nor a cumulative sum. Temperature 0 is greedy.

    Raises:
        UsageError: the temperature is negative or not a number.
    """
    if not temperature >= 0:
        raise UsageError("temperature", expected="0 or more", got=temperature)
    if temperature == 0:
        return greedy(logits_V)
    return int(np.argmax(logits_V.astype(np.float64) / temperature + rng.gumbel(size=logits_V.shape)))
