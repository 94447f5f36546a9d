"""Attention: a sliding window of raw kv, and beyond it compressed entries of which an indexer chooses.

In V4 every layer compresses for itself; in V4.1 KV sources compress and index sources choose, for
themselves and for the layers that follow them.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..model.config import ModelConfig, Version
from ..model.config_v41 import Candidates
from .arithmetic import rms, softmax, softmax_with_sink
from .parameters import Parameters, Record
from .rotary import frequencies, rotate, turns
from .weights.protocol import Array

# The ratio whose compressor overlaps blocks, and which in V4 has an indexer to choose among its entries.
CSA_RATIO = 4

# Queries are scored in blocks: of at most so many, as more would waste scores outside the window,
# and of so few that their scores stay within so many bytes.
QUERY_BLOCK = 128
SCORE_BYTES = 64 * 2**20

F32_BYTES = 4


@dataclass
class CompressorState:
    """What a compressor has made, and the tokens that do not fill a block yet (c is 2 at ratio 4, else 1)."""

    entries: Array  # [S, d]
    pending_k: Array  # [fewer than R, c·d]
    pending_s: Array  # likewise, without the position bias
    previous_k: Array  # [R, d]: first half of the last whole block, which overlaps into the next
    previous_s: Array  # [R, d], with the position bias; −∞ before the first block

    @classmethod
    def empty(cls, ratio: int, width: int) -> CompressorState:
        """Return the state before the first token."""
        c = 2 if ratio == CSA_RATIO else 1
        return cls(
            entries=np.zeros((0, width), np.float32),
            pending_k=np.zeros((0, c * width), np.float32),
            pending_s=np.zeros((0, c * width), np.float32),
            previous_k=np.zeros((ratio, width), np.float32),
            previous_s=np.full((ratio, width), -np.inf, np.float32),
        )


@dataclass
class LayerState:
    """The caches of one attention: the last W raw kv, and its compressors where it has them.

    ``keys`` are the index keys that a KV source makes of its compressor's latents.
    """

    window: Array  # [at most W, d]
    compressor: CompressorState | None = None
    indexer: CompressorState | None = None
    keys: Array | None = None  # [S, di]

    @classmethod
    def empty(cls, config: ModelConfig, layer: int | None) -> LayerState:
        """Return the state of trunk layer ``layer`` before the first token; None: of a draft layer."""
        window = np.zeros((0, config.head_dim), np.float32)
        ratio = 0 if layer is None else config.compress_ratios[layer]
        if config.version is Version.V41:
            if layer not in config.kv_source_layer_ids:
                return cls(window)
            keys = np.zeros((0, config.index_head_dim), np.float32)
            return cls(window, CompressorState.empty(ratio, config.head_dim), keys=keys)
        return cls(
            window,
            compressor=CompressorState.empty(ratio, config.head_dim) if ratio else None,
            indexer=CompressorState.empty(ratio, config.index_head_dim) if ratio == CSA_RATIO else None,
        )

    def copy(self) -> LayerState:
        """Return a state that advances by itself; arrays are replaced in it, never written to."""
        compressor, indexer = (None if s is None else replace(s) for s in (self.compressor, self.indexer))
        return replace(self, compressor=compressor, indexer=indexer)


@dataclass
class Shared:
    """What sources left for the layers that follow, during one call."""

    entries: Array | None = None  # [S, d]
    keys: Array | None = None  # [S, di]
    chosen: Array | None = None  # bool [T, S]
    candidates: Array | None = None  # bool [T, S]


class Place(NamedTuple):
    """Where attention happens: the prefix of its weights, the trunk layer (None: a draft's), the first position.

    ``seen`` are the first and the last position [T] whose raw kv each token sees; None: its window and no later one.
    """

    at: str
    layer: int | None
    t0: int
    seen: tuple[Array, Array] | None = None


def attention(p: Parameters, x_TD: Array, place: Place, state: LayerState, shared: Shared, record: Record) -> Array:
    """Return attention's output [T, D] for tokens at positions t0 … t0+T−1, and advance ``state``."""
    c, at, t0 = p.config, place.at, place.t0
    T = len(x_TD)
    ratio = 0 if place.layer is None else c.compress_ratios[place.layer]
    record(f"{at}input", x_TD)
    f = frequencies(c, ratio)
    turn_Tr = turns(np.arange(t0, t0 + T), f)
    qr, q_THd = queries(p, x_TD, turn_Tr, at)
    record(f"{at}q", q_THd)
    kv_Td = raw_kv(p, x_TD, turn_Tr, at)
    record(f"{at}kv", kv_Td)

    entries_Sd, chosen_TS = None, None
    if ratio and p.is_v41:
        _share(p, x_TD, qr, place, ratio, f, turn_Tr, state, shared, record)
        entries_Sd, chosen_TS = shared.entries, shared.chosen
    elif state.compressor is not None:
        entries_Sd = _compress(p, x_TD, f"{at}compressor.", ratio, f, state.compressor, of_indexer=False)
        record(f"{at}compressor.entries", entries_Sd)
        if state.indexer is not None:
            inner = f"{at}indexer."
            q, w = index_queries(p, x_TD, qr, turn_Tr, inner, record)
            keys_Sd = _compress(p, x_TD, f"{inner}compressor.", ratio, f, state.indexer, of_indexer=True)
            record(f"{inner}compressor.entries", keys_Sd)
            score_TS = _scores(q, w, keys_Sd, ratio, t0)
            chosen_TS = _choose(score_TS, None, c.index_topk, inner, record)

    # One head of kv is both key and value; it is kept for W tokens.
    kv_Nd = np.concatenate([state.window, kv_Td])
    state.window = kv_Nd[-c.sliding_window :]
    sink_H = p.weight(f"{at}attn_sink")
    seen = place.seen if place.seen is not None else window_of(t0, T, c.sliding_window)
    o_THd = _attend(q_THd, kv_Nd, entries_Sd, chosen_TS, sink_H, ratio, t0, seen)
    return output(p, o_THd, turn_Tr, at, record)


def queries(p: Parameters, x_TD: Array, turn_Tr: Array, at: str) -> tuple[Array, Array]:
    """Return the low-rank query [T, q_lora], which the indexer uses as well, and the heads' queries [T, H, d]."""
    c = p.config
    qr = p.rms_norm(p.linear(x_TD, f"{at}wq_a.weight"), f"{at}q_norm.weight")
    q_THd = p.linear(qr, f"{at}wq_b.weight").reshape(len(x_TD), c.num_attention_heads, c.head_dim)
    if not p.is_v41:
        q_THd = q_THd / rms(q_THd, c.rms_norm_eps)
    return qr, rotate(q_THd, turn_Tr)


def raw_kv(p: Parameters, x_TD: Array, turn_Tr: Array, at: str) -> Array:
    """Return the keys, which are the values too, [T, d]."""
    kv_Td = p.rms_norm(p.linear(x_TD, f"{at}wkv.weight"), f"{at}kv_norm.weight")
    return p.rounded_kv(rotate(kv_Td, turn_Tr))


def output(p: Parameters, o_THd: Array, turn_Tr: Array, at: str, record: Record) -> Array:
    """Return the heads' results [T, H, d] projected to [T, D]."""
    c = p.config
    T, H, d, G = len(o_THd), c.num_attention_heads, c.head_dim, c.o_groups
    # Values carry their key's rotation; turning back at t leaves one by the distance.
    o_THd = rotate(o_THd, turn_Tr.conj())
    record(f"{at}heads", o_THd)
    # wo_a is one matrix per group, a block-diagonal linear; the published code keeps it in BF16.
    wo_a = p.weight(f"{at}wo_a.weight").reshape(G, c.o_lora_rank, H * d // G)
    o_TGi = o_THd.reshape(T, G, H * d // G)
    p.see(f"{at}wo_a.weight", o_TGi)
    u_GTo = o_TGi.transpose(1, 0, 2) @ wo_a.transpose(0, 2, 1)
    y_TD = p.linear(u_GTo.transpose(1, 0, 2).reshape(T, G * c.o_lora_rank), f"{at}wo_b.weight")
    record(f"{at}output", y_TD)
    return y_TD


def _attend(
    q_THd: Array,
    kv_Nd: Array,
    entries_Sd: Array | None,
    chosen_TS: Array | None,
    sink_H: Array,
    ratio: int,
    t0: int,
    seen: tuple[Array, Array],
) -> Array:
    """Return Σ softmax(q·k)·k [T, H, d] over the raw kv that is seen and the visible compressed entries.

    The last row of ``kv_Nd`` is that of the last query. Queries go in blocks, to bound the scores.
    """
    T, H, _ = q_THd.shape
    n_entries = 0 if entries_Sd is None else len(entries_Sd)
    first = t0 + T - len(kv_Nd)  # position of the first raw kv
    from_T, to_T = seen
    block = query_block(H, int((to_T - from_T).max()) + 1, n_entries)
    o_THd = np.empty_like(q_THd)
    for a in range(0, T, block):
        b = min(a + block, T)
        t = np.arange(t0 + a, t0 + b)[:, None]
        from_position, end = max(first, from_T[a:b].min()), to_T[a:b].max() + 1
        keys = kv_Nd[from_position - first : end - first]
        j = np.arange(from_position, end)[None, :]
        visible = (from_T[a:b, None] <= j) & (j <= to_T[a:b, None])
        if entries_Sd is not None:
            keys = np.concatenate([keys, entries_Sd])
            finished = np.arange(n_entries)[None, :] < (t + 1) // ratio
            chosen = finished if chosen_TS is None else chosen_TS[a:b]
            visible = np.concatenate([visible, chosen], axis=1)
        o_THd[a:b] = attend_to(q_THd[a:b], keys, visible, sink_H)
    return o_THd


def window_of(t0: int, T: int, W: int) -> tuple[Array, Array]:
    """Return the first and the last position [T] that tokens from position ``t0`` on see, without images."""
    t = np.arange(t0, t0 + T)
    return t - W + 1, t


def attend_to(q_THd: Array, keys_Nd: Array, visible_TN: Array, sink_H: Array) -> Array:
    """Return Σ softmax(q·k)·k [T, H, d] over the keys that each query sees."""
    T, H, d = q_THd.shape
    scores = (q_THd.reshape(-1, d) @ keys_Nd.T).reshape(T, H, -1) * np.float32(d**-0.5)
    scores[~np.broadcast_to(visible_TN[:, None, :], scores.shape)] = -np.inf
    probabilities = softmax_with_sink(scores, sink_H)
    return (probabilities.reshape(T * H, -1) @ keys_Nd).reshape(T, H, d)


# ---- compressed entries -------------------------------------------------------------------------------


def _latents(p: Parameters, x_TD: Array, at: str, ratio: int, state: CompressorState) -> Array:
    """Return the latent [n, d] of every block that ``x_TD`` completes.

    It is a channelwise softmax-weighted sum over the block's R tokens. At ratio 4 blocks overlap: the
    candidates are the first d channels of the previous block and the last d of the current one. At
    ratio 1 there is nothing to weigh. V4's blocks have a bias by position.
    """
    k = p.project(x_TD, f"{at}wkv.weight")
    if ratio == 1:
        return p.rms_norm(k, f"{at}norm.weight")
    k = np.concatenate([state.pending_k, k])
    s = np.concatenate([state.pending_s, p.project(x_TD, f"{at}wgate.weight")])
    n = len(k) // ratio
    state.pending_k, state.pending_s = k[n * ratio :], s[n * ratio :]
    if n == 0:
        return state.entries[:0]
    k = k[: n * ratio].reshape(n, ratio, -1)
    s = s[: n * ratio].reshape(n, ratio, -1)
    if not p.is_v41:
        s = s + p.weight(f"{at}ape")
    if ratio == CSA_RATIO:
        d = state.entries.shape[1]
        before_k = np.concatenate([state.previous_k[None], k[..., :d]])
        before_s = np.concatenate([state.previous_s[None], s[..., :d]])
        state.previous_k, state.previous_s = before_k[-1], before_s[-1]
        k = np.concatenate([before_k[:-1], k[..., d:]], axis=1)  # [n, 2R, d]
        s = np.concatenate([before_s[:-1], s[..., d:]], axis=1)
    return p.rms_norm((softmax(s, axis=1) * k).sum(axis=1), f"{at}norm.weight")


def _block_turns(state: CompressorState, count: int, ratio: int, f: Array) -> Array:
    """Return the rotation of ``count`` new entries: that of their block's first token."""
    return turns((len(state.entries) + np.arange(count)) * ratio, f)


def _compress(
    p: Parameters, x_TD: Array, at: str, ratio: int, f: Array, state: CompressorState, *, of_indexer: bool
) -> Array:
    """Return all entries [S, d] so far, one per whole block of R tokens."""
    latents = _latents(p, x_TD, at, ratio, state)
    entries = rotate(latents, _block_turns(state, len(latents), ratio, f))
    entries = p.rounded_index(entries) if of_indexer else p.rounded_entries(entries)
    state.entries = np.concatenate([state.entries, entries])
    return state.entries


# ---- which entries a query attends to -----------------------------------------------------------------


def index_queries(
    p: Parameters, x_TD: Array, qr: Array, turn_Tr: Array, at: str, record: Record
) -> tuple[Array, Array]:
    """Return the indexer's queries [T, Hi, di] and the weights of its heads [T, Hi]."""
    Hi, di = p.config.index_n_heads, p.config.index_head_dim
    q = p.linear(qr, f"{at}wq_b.weight").reshape(len(x_TD), Hi, di)
    q = p.rounded_index(rotate(q, turn_Tr))
    record(f"{at}q", q)
    return q, p.project(x_TD, f"{at}weights_proj.weight") * np.float32(di**-0.5 * Hi**-0.5)


def _scores(q: Array, w: Array, keys_Sd: Array, ratio: int, t0: int) -> Array:
    """Return Σₕ relu(qₕ·k)·wₕ for every query and key, [T, S]; −∞ where the query cannot see the entry yet."""
    (T, Hi, di), S = q.shape, len(keys_Sd)
    score_TS = np.empty((T, S), np.float32)
    block = query_block(Hi, 0, S)
    for a in range(0, T, block):
        b = min(a + block, T)
        dots = (q[a:b].reshape(-1, di) @ keys_Sd.T).reshape(b - a, Hi, S)
        score_TS[a:b] = (w[a:b, None, :] @ np.maximum(dots, 0))[:, 0]
    seen = np.arange(S)[None, :] < (np.arange(t0, t0 + T)[:, None] + 1) // ratio
    score_TS[~seen] = -np.inf
    return score_TS


def _choose(score_TS: Array, allowed_TS: Array | None, topk: int, at: str, record: Record) -> Array:
    """Return which of the entries each query attends to, bool [T, S]: the best of those that it sees and may take."""
    record(f"{at}score", score_TS)
    chosen_TS = _best(score_TS if allowed_TS is None else np.where(allowed_TS, score_TS, -np.inf), topk)
    record(f"{at}chosen", chosen_TS)
    return chosen_TS


def _best(score_TS: Array, count: int) -> Array:
    """Return where the ``count`` largest scores of each row are, bool, none of them −∞."""
    best_TS = np.zeros(score_TS.shape, bool)
    best = np.argsort(-score_TS, axis=1, kind="stable")[:, :count]
    np.put_along_axis(best_TS, best, True, axis=1)
    return best_TS & ~np.isneginf(score_TS)


def _share(
    p: Parameters,
    x_TD: Array,
    qr: Array,
    place: Place,
    ratio: int,
    f: Array,
    turn_Tr: Array,
    state: LayerState,
    shared: Shared,
    record: Record,
) -> None:
    """Renew what is shared where V4.1's trunk layer is a source: entries and index keys, or the choice."""
    c, layer, inner = p.config, place.layer, f"{place.at}indexer."
    if state.compressor is not None and state.keys is not None:
        latents = _latents(p, x_TD, f"{place.at}compressor.", ratio, state.compressor)
        turn = _block_turns(state.compressor, len(latents), ratio, f)
        # Index keys are made of the latent before it is rotated, as an entry of the KV is.
        keys = rotate(p.rms_norm(p.project(latents, f"{inner}wk.weight"), f"{inner}k_norm.weight"), turn)
        state.keys = np.concatenate([state.keys, p.rounded_index(keys)])
        entries = p.rounded_entries(rotate(latents, turn))
        state.compressor.entries = np.concatenate([state.compressor.entries, entries])
        shared.entries, shared.keys = state.compressor.entries, state.keys
        record(f"{place.at}compressor.entries", state.compressor.entries)
        record(f"{inner}keys", state.keys)
    if layer in c.index_source_layer_ids and shared.keys is not None:
        q, w = index_queries(p, x_TD, qr, turn_Tr, inner, record)
        score_TS = _scores(q, w, shared.keys, ratio, place.t0)
        shared.chosen = _choose(score_TS, shared.candidates, c.index_topk, inner, record)
        if c.candidates is not None and layer == c.candidates.source_layer_id:
            shared.candidates = _candidates(score_TS, c.candidates, ratio, place.t0)
            record(f"{inner}candidates", shared.candidates)


def _candidates(score_TS: Array, candidates: Candidates, ratio: int, t0: int) -> Array:
    """Return which entries lie in the best blocks, bool [T, S]: that of the newest visible one is always in."""
    T, S = score_TS.shape
    size = candidates.block_size
    padded = np.pad(score_TS, [(0, 0), (0, -S % size)], constant_values=-np.inf)
    best_of_block = padded.reshape(T, padded.shape[1] // size, size).max(axis=2)
    seen = (np.arange(t0, t0 + T) + 1) // ratio
    some = np.flatnonzero(seen)
    best_of_block[some, (seen[some] - 1) // size] = np.inf
    return np.repeat(_best(best_of_block, candidates.topk_blocks), size, axis=1)[:, :S]


def query_block(heads: int, window: int, entries: int) -> int:
    """Return how many queries to score at a time so that their scores stay within SCORE_BYTES."""
    keys = QUERY_BLOCK + window + entries
    return max(1, min(QUERY_BLOCK, SCORE_BYTES // (heads * keys * F32_BYTES)))
