"""Rotary position embedding: the frequencies of each layer kind, and the rotation itself."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import math

import numpy as np

from ..model.config import ModelConfig, YarnScaling
from .weights.protocol import Array

# Keeps the YaRN ramp finite when both of its corners fall on the same pair.
RAMP_MIN_WIDTH = 0.001


def frequencies(config: ModelConfig, ratio: int) -> Array:
    """Return the angle per position of each rotary pair in a layer of compression ``ratio``.

    Layers without compressor (ratio 0) use ``rope_theta`` plainly; all others ``compress_rope_theta``
    with YaRN, for everything in them: queries, raw and compressed kv, and the indexer.

    Result: float32 [r/2]. It is float32 on purpose, as are the angles made from it: the published
    code and transformers compute so, and at position t the last bit of f is worth t times as much.
    """
    r = config.qk_rope_head_dim
    theta = np.float32(config.rope_theta if ratio == 0 else config.compress_rope_theta)
    f = 1 / theta ** (np.arange(0, r, 2, dtype=np.float32) / np.float32(r))
    if ratio == 0 or config.yarn is None:
        return f
    ramp = _yarn_ramp(config.yarn, float(theta), r)
    return f / np.float32(config.yarn.factor) * ramp + f * (1 - ramp)


def _yarn_ramp(yarn: YarnScaling, theta: float, r: int) -> Array:
    """Return, per pair, how far YaRN interpolates: 0 keeps the frequency, 1 divides it by the factor."""

    def pair_that_turns(times: float) -> float:
        """Return the (fractional) pair that turns so often over the original context."""
        length = yarn.original_max_position_embeddings
        return r * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_that_turns(yarn.beta_slow)), r - 1)
    if high == low:
        high += RAMP_MIN_WIDTH
    return np.clip((np.arange(r // 2, dtype=np.float32) - low) / np.float32(high - low), 0, 1)


def turns(positions: Array, f: Array) -> Array:
    """Return e^{i·t·f}: complex64 [T, r/2] for int positions [T] and frequencies [r/2]."""
    angle_Tr = positions.astype(np.float32)[:, None] * f
    return np.exp(1j * angle_Tr.astype(np.float64)).astype(np.complex64)


def rotate(x: Array, turn_Tr: Array) -> Array:
    """Return ``x`` [T, ..., d] with its last r dimensions, taken as r/2 complex numbers, turned.

    Dimensions 2i and 2i+1 make one number. Turning by the conjugate undoes it.
    """
    r = 2 * turn_Tr.shape[-1]
    pairs = np.ascontiguousarray(x[..., -r:]).view(np.complex64)
    turned = pairs * turn_Tr.reshape(turn_Tr.shape[:1] + (1,) * (x.ndim - 2) + turn_Tr.shape[1:])
    return np.concatenate([x[..., :-r], turned.view(np.float32)], axis=-1)
