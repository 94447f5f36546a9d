"""The mixture of experts: routing, and the experts that some token is routed to."""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..checkpoint.meaning import check_table_rows
from ..model.tensors import DRAFT_PREFIX
from .arithmetic import silu, softplus
from .parameters import Parameters, Record
from .weights.protocol import Array


def mixture(p: Parameters, x_TD: Array, tokens_T: Array, image_T: Array, at: str, record: Record) -> Array:
    """Return Σ weight·expert(x) + shared(x), reading only the experts that some token is routed to."""
    record(f"{at}input", x_TD)
    experts_TK, weights_TK = route(p, x_TD, tokens_T, image_T, at, record)
    routed_TD = np.zeros_like(x_TD)
    for e, rows, weight in routed_rows(experts_TK, weights_TK):
        routed_TD[rows] += routed_expert(p, x_TD[rows], weight, e, at)
    record(f"{at}routed", routed_TD)
    shared_TD = shared_expert(p, x_TD, at)
    record(f"{at}shared", shared_TD)
    return routed_TD + shared_TD


def routed_rows(experts_TK: Array, weights_TK: Array) -> Iterator[tuple[int, Array, Array]]:
    """Yield each expert that some token is routed to, in order: number, rows of its tokens, their weights [rows]."""
    for e in np.unique(experts_TK):
        hit_TK = experts_TK == e
        rows = np.flatnonzero(hit_TK.any(axis=1))
        yield int(e), rows, np.where(hit_TK[rows], weights_TK[rows], 0).sum(axis=1)


def routed_expert(p: Parameters, x_TD: Array, weight_T: Array, expert: int, at: str) -> Array:
    """Return weight·expert(x) [T, D] of one routed expert."""
    return _expert(p, x_TD, f"{at}experts.{expert}.", weight_T[:, None])


def shared_expert(p: Parameters, x_TD: Array, at: str) -> Array:
    """Return what the shared expert makes of every token, [T, D]."""
    return _expert(p, x_TD, f"{at}shared_experts.", None)


def route(p: Parameters, x_TD: Array, tokens_T: Array, image_T: Array, at: str, record: Record) -> tuple[Array, Array]:
    """Return the experts of each token and their weights, both [T, K].

    Raises:
        InventoryError: a routing table names an expert that is not there, or one twice.
    """
    c = p.config
    is_draft = at.startswith(DRAFT_PREFIX)
    K = c.draft_num_experts_per_tok if is_draft else c.num_experts_per_tok
    affinity_TE = np.sqrt(softplus(p.project(x_TD, f"{at}gate.weight")))
    record(f"{at}gate.affinity", affinity_TE)
    # The bias chooses, it does not weigh. Tokens of an image have one of their own.
    if not is_draft and c.is_hash_routed(int(at.split(".")[1])):
        experts_TK = _from_table(p, f"{at}gate.tid2eid", tokens_T)
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


def _from_table(p: Parameters, name: str, tokens_T: Array) -> Array:
    """Return the experts [T, K] that a routing table has for each token.

    Nothing has checked the tables of a GGUF or of shards before, and there is no model in which an expert is not there
    or counts twice.

    Raises:
        InventoryError: an id outside 0..E-1, or one twice in a row; names the tensor, the row and the id.
    """
    experts_TK = p.source.rows(name, tokens_T)
    check_table_rows(name, experts_TK, tokens_T, p.config.n_routed_experts)
    return experts_TK


def _best(biased_TE: Array, K: int) -> Array:
    return np.argsort(-biased_TE, axis=1, kind="stable")[:, :K]


def _expert(p: Parameters, x_TD: Array, at: str, weight_T1: Array | None) -> Array:
    """Return the clamped SwiGLU of one expert, [T, D].

    An observer sees what meets w2 before it is weighed, as llama.cpp's imatrix tool does.
    """
    limit = np.float32(p.config.swiglu_limit)
    g = np.minimum(p.linear(x_TD, f"{at}w1.weight"), limit)
    u = np.clip(p.linear(x_TD, f"{at}w3.weight"), -limit, limit)
    y_TI = silu(g) * u
    return p.linear(y_TI if weight_T1 is None else y_TI * weight_T1, f"{at}w2.weight", seen=y_TI)
