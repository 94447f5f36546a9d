"""Hyper-connections: several residual streams, collapsed before each sublayer and mixed after it.

In V4 a sublayer's input is collapsed by weights of its own. In V4.1 they lag by one sublayer: each
computes those of the next from the streams that come in, the first takes stream 0, and the last
one's collapse the streams for the head.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .arithmetic import product, rms, sigmoid, softmax
from .parameters import Parameters, Record
from .weights.protocol import Array


def first_pre(tokens: int, hc: int) -> Array:
    """Return the weights [T, hc] that collapse the streams before the first sublayer: stream 0 alone."""
    pre = np.zeros((tokens, hc), np.float32)
    pre[:, 0] = 1
    return pre


class Entrance(NamedTuple):
    """What a sublayer takes, and how its output joins the streams.

    ``x`` [T, D] is the sublayer's input; ``own`` [T, hc] are the weights that lag to the next sublayer, ``post``
    [T, hc] those of the output in each stream, and ``mix`` [T, hc, hc] mixes the streams.
    """

    x: Array
    own: Array
    post: Array
    mix: Array


def around(
    p: Parameters, X: Array, pre: Array, fn: str, norm: str, sublayer: Callable[[Array], Array], record: Record
) -> tuple[Array, Array]:
    """Return the streams [T, hc, D] after a sublayer, and the weights [T, hc] that lag to the next one.

    For the arguments see ``enter``.
    """
    entrance = enter(p, X, pre, fn, norm, record)
    return connect(X, sublayer(entrance.x), entrance.post, entrance.mix), entrance.own


def enter(p: Parameters, X: Array, pre: Array, fn: str, norm: str, record: Record) -> Entrance:
    """Return what a sublayer takes of the streams ``X`` [T, hc, D].

    ``fn`` is the prefix of the hyper-connection's weights, ``norm`` the weight of the sublayer's norm.
    ``pre`` are the weights that lag here; V4 leaves them aside.
    """
    hc, eps = p.config.hc_mult, np.float32(p.config.hc_eps)
    base, scale = p.weight(f"{fn}_base"), p.weight(f"{fn}_scale")
    m = mixing_logits(p, X, f"{fn}_fn")  # [T, (2+hc)·hc]
    own = sigmoid(m[:, :hc] * scale[0] + base[:hc]) + eps
    post = 2 * sigmoid(m[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    C = (m[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
    C = sinkhorn(softmax(C, axis=-1) + eps, p.config.hc_sinkhorn_iters, eps)
    record(f"{fn}.pre", own)
    record(f"{fn}.post", post)
    record(f"{fn}.mix", C)
    x_TD = collapse(X, pre if p.is_v41 else own)
    return Entrance(p.rms_norm(x_TD, norm), own, post, C)


def head_pre(p: Parameters, X: Array, at: str) -> Array:
    """Return the weights [T, hc] that collapse the streams before the head, in V4."""
    scale, base = p.weight(f"{at}hc_head_scale"), p.weight(f"{at}hc_head_base")
    pre = sigmoid(mixing_logits(p, X, f"{at}hc_head_fn") * scale + base)
    return pre + np.float32(p.config.hc_eps)


def mixing_logits(p: Parameters, X: Array, fn: str) -> Array:
    """Return the projection of all streams as one vector, divided by its root mean square."""
    x = X.reshape(len(X), -1)  # [T, hc·D]
    scale = rms(x, p.config.rms_norm_eps)
    if p.observe is not None:
        p.see(fn, x / scale)
    return product(x, p.weight(fn)) / scale


def sinkhorn(C: Array, iterations: int, eps: np.float32) -> Array:
    """Return C [T, hc, hc] with rows and columns normalised in turn; it starts and ends with columns."""
    C = C / (C.sum(axis=1, keepdims=True) + eps)
    for _ in range(iterations - 1):
        C = C / (C.sum(axis=2, keepdims=True) + eps)
        C = C / (C.sum(axis=1, keepdims=True) + eps)
    return C


def collapse(X: Array, pre: Array) -> Array:
    """Return Σᵢ preᵢ·Xᵢ, [T, D]: the streams as one input."""
    return (pre[:, None, :] @ X)[:, 0]


def connect(X: Array, y_TD: Array, post: Array, C: Array) -> Array:
    """Return the new streams: Xₖ = postₖ·y + Σⱼ C[j, k]·Xⱼ."""
    return post[:, :, None] * y_TD[:, None, :] + C.transpose(0, 2, 1) @ X
