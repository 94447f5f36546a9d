"""The n-gram tables of V4.1: rows looked up by the last few tokens, gated into every stream."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import numpy as np

from ..model.engram import EngramConstants, engram_rows
from .arithmetic import rms, sigmoid
from .parameters import Parameters
from .weights.protocol import Array

# The least magnitude whose root the gate takes.
GATE_FLOOR = 1e-6


def looked_up(constants: EngramConstants, tokens: Array, image: Array, count: int) -> Array:
    """Return the rows [T, layers, columns] of the last ``count`` of ``tokens``, those before being context."""
    return engram_rows(constants, tokens.tolist(), image.tolist())[-count:]


def engram(p: Parameters, X: Array, rows_TN: Array, image_T: Array, at: str) -> Array:
    """Return the streams [T, hc, D] with the value of the n-grams added, as far as each stream's gate opens.

    ``rows_TN`` are the rows of the table that each token looks up; only these are read.
    """
    c = p.config
    T, hc, D = X.shape
    wanted, inverse = np.unique(rows_TN, return_inverse=True)
    table = p.source.rows(f"{at}embed.weight", wanted)
    embedding = table[inverse.reshape(-1)].reshape(T, -1)
    kv = p.linear(embedding, f"{at}wkv.weight")
    key, value_TD = kv[:, : hc * D].reshape(T, hc, D), kv[:, hc * D :]
    weight = p.weight(f"{at}q_weight") * p.weight(f"{at}k_weight")  # [hc, D]
    dot = (X * weight * key).sum(axis=-1, keepdims=True)
    dot = dot / rms(X, c.rms_norm_eps) / rms(key, c.rms_norm_eps) * np.float32(D**-0.5)
    gate = sigmoid(np.sign(dot) * np.sqrt(np.maximum(np.abs(dot), np.float32(GATE_FLOOR))))
    gate = np.where(image_T[:, None, None], np.float32(0), gate)
    return X + gate * value_TD[:, None, :]
