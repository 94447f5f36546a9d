"""The mixture of experts: routing, and the experts that some token is routed to."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

import numpy as np

from ..model.tensors import DRAFT_PREFIX
from .arithmetic import silu, softplus
from .parameters import Parameters, Record
from .weights.protocol import Array


def mixture(p: Parameters, x_TD: Array, tokens_T: Array, image_T: Array, at: str, record: Record) -> Array:
    """Return Σ weight·expert(x) + shared(x), reading only the experts that some token is routed to."""
    record(f"{at}input", x_TD)
    experts_TK, weights_TK = _route(p, x_TD, tokens_T, image_T, at, record)
    routed_TD = np.zeros_like(x_TD)
    for e in np.unique(experts_TK):
        hit_TK = experts_TK == e
        rows = np.flatnonzero(hit_TK.any(axis=1))
        weight = np.where(hit_TK, weights_TK, 0)[rows].sum(axis=1)
        routed_TD[rows] += _expert(p, x_TD[rows], f"{at}experts.{e}.", weight[:, None])
    record(f"{at}routed", routed_TD)
    shared_TD = _expert(p, x_TD, f"{at}shared_experts.", None)
    record(f"{at}shared", shared_TD)
    return routed_TD + shared_TD


def _route(p: Parameters, x_TD: Array, tokens_T: Array, image_T: Array, at: str, record: Record) -> tuple[Array, Array]:
    """Return the experts of each token and their weights, both [T, K]."""
    c = p.config
    is_draft = at.startswith(DRAFT_PREFIX)
    K = c.draft_num_experts_per_tok if is_draft else c.num_experts_per_tok
    affinity_TE = np.sqrt(softplus(p.project(x_TD, f"{at}gate.weight")))
    record(f"{at}gate.affinity", affinity_TE)
    # The bias chooses, it does not weigh. Tokens of an image have one of their own.
    if not is_draft and c.is_hash_routed(int(at.split(".")[1])):
        experts_TK = p.source.rows(f"{at}gate.tid2eid", tokens_T)
        if image_T.any():
            of_image = _best(affinity_TE[image_T] + p.weight(f"{at}gate.bias_vl"), K)
            experts_TK = experts_TK.copy()
            experts_TK[image_T] = of_image
    else:
        bias = p.weight(f"{at}gate.bias")
        if image_T.any() and not is_draft:
            bias = np.where(image_T[:, None], p.weight(f"{at}gate.bias_vl"), bias)
        experts_TK = _best(affinity_TE + bias, K)
    weights_TK = np.take_along_axis(affinity_TE, experts_TK, axis=1)
    weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True) * np.float32(c.routed_scaling_factor)
    record(f"{at}gate.experts", experts_TK)
    record(f"{at}gate.weights", weights_TK)
    return experts_TK, weights_TK


def _best(biased_TE: Array, K: int) -> Array:
    return np.argsort(-biased_TE, axis=1, kind="stable")[:, :K]


def _expert(p: Parameters, x_TD: Array, at: str, weight_T1: Array | None) -> Array:
    """Return the clamped SwiGLU of one expert, [T, D]."""
    limit = np.float32(p.config.swiglu_limit)
    g = np.minimum(p.linear(x_TD, f"{at}w1.weight"), limit)
    u = np.clip(p.linear(x_TD, f"{at}w3.weight"), -limit, limit)
    y_TI = silu(g) * u
    if weight_T1 is not None:
        y_TI = y_TI * weight_T1
    return p.linear(y_TI, f"{at}w2.weight")
