"""Arithmetic of the forward pass that needs no weights by name."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import numpy as np

from .weights.protocol import Array


def product(x: Array, w: Array) -> Array:
    """Return x·wᵀ for x [..., in] and w [out, in], as (w·xᵀ)ᵀ.

    BLAS libraries share out the rows of the left factor among threads: w has thousands, and x often
    has fewer than ten, one for each token that an expert is chosen by.
    """
    y = w @ x.reshape(-1, x.shape[-1]).T
    return np.ascontiguousarray(y.T).reshape(*x.shape[:-1], len(w))


def rms(x: Array, eps: float) -> Array:
    """Return sqrt(mean(x²) + eps) along the last axis, kept."""
    return np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return weight · x / sqrt(mean(x²) + eps)."""
    return weight * (x / rms(x, eps))


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^−x); e^−|x| cannot overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x: Array) -> Array:
    """Return x · sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """Return log(1 + e^x) without overflow."""
    return np.logaddexp(x, np.float32(0))


def softmax(x: Array, axis: int) -> Array:
    """Return e^x / Σ e^x along ``axis``."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def softmax_with_sink(scores_THN: Array, sink_H: Array) -> Array:
    """Return the softmax over N keys with e^sink as one more term of the denominator."""
    sink = sink_H[None, :, None]
    top = np.maximum(scores_THN.max(axis=-1, keepdims=True), sink)
    e = np.exp(scores_THN - top)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(sink - top))
