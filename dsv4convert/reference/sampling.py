"""Choosing the next tokens from logits: greedy, or sampled by the Gumbel-max trick."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import UsageError
from .model import Model, State
from .weights.protocol import Array


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


def generate(
    model: Model, logits_V: Array, state: State, count: int, *, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Yield up to ``count`` tokens after those that ``state`` has seen; end of sentence ends them early.

    ``logits_V`` are those of the last token seen.

    Raises:
        UsageError: a bad temperature, or a context that gets too long.
    """
    rng = np.random.default_rng(seed)
    for left in range(count, 0, -1):
        token = gumbel_max(logits_V, temperature, rng)
        yield token
        if token == model.config.eos_token_id:
            return
        if left > 1:
            logits_V = model.forward([token], state)[0]
