"""Choosing the next tokens from logits: greedy, or sampled by the Gumbel-max trick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass
class Speculation:
    """What became of the drafts: runs of the trunk after the prompt, guesses made, and guesses kept."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


def generate_speculatively(
    model: Model,
    logits_V: Array,
    state: State,
    count: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    speculation: Speculation | None = None,
) -> Iterator[int]:
    """Yield the tokens that ``generate`` does, several for each run of the trunk where the DSpark draft guesses right.

    A guess is kept where it is the token that ``generate`` would have drawn from the trunk's logits with the same
    noise. ``state`` must have seen the prompt in one call, and is left as it is; ``speculation`` is counted up.

    Raises:
        UnsupportedError: the model has no DSpark draft of V4.1's.
        UsageError: as for ``generate``; or the prompt was run in pieces, or not through all layers.
    """
    counts = Speculation() if speculation is None else speculation
    rng = np.random.default_rng(seed)
    state = state.copy()
    draft_state = model.new_draft_state()
    model.draft_sees(state.main, draft_state)
    if draft_state.position != state.position:
        raise UsageError(
            "the draft has not seen the whole prompt",
            expected=state.position,
            got=draft_state.position,
            hint="run the prompt in one call",
        )
    if count < 1:
        return
    token = gumbel_max(logits_V, temperature, rng)
    yield token
    left = count - 1
    while left and token != model.config.eos_token_id:
        # The last token that is wanted need not be guessed: the trunk's run gives it.
        room = min(left - 1, model.config.max_position_embeddings - state.position - 1)
        guesses = model.draft(token, draft_state).tokens[:room].tolist() if room > 0 else []
        block = [token, *guesses]
        ahead = state.copy()
        logits_TV = model.forward(block, ahead)
        main = ahead.main
        seen = 0
        for guess, logits in zip([*guesses, None], logits_TV, strict=True):
            token = gumbel_max(logits, temperature, rng)
            seen += 1
            left -= 1
            yield token
            if token != guess or not left or token == model.config.eos_token_id:
                break
        counts.steps += 1
        counts.drafted += len(guesses)
        counts.accepted += seen - 1
        if not left or token == model.config.eos_token_id:
            return
        if seen == len(block):
            state = ahead
        else:
            model.prefill(block[:seen], state)
        model.draft_sees(None if main is None else main[:seen], draft_state)
