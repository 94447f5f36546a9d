"""The forward pass of DeepSeek-V4 in numpy, float32, one layer and one expert at a time, to be read.

Suffixes of arrays name their axes:

    T tokens of this call      S compressed entries      N keys that a block of queries sees
    D hidden                   H heads, d their width    r rotary dimensions (the last of d)
    G output groups            W sliding window          R compression ratio
    E experts, K per token     I expert width            V vocabulary
    hc streams of the residual

A call takes the next T tokens after those that its ``State`` has seen, so prefill, decoding token by
token and prefill in pieces are the same code; nothing loops over tokens.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UnsupportedError, UsageError
from ..model.config import ModelConfig
from .rotary import frequencies, rotate, turns
from .rounding import INDEXER_BLOCK, KV_BLOCK, LINEAR_BLOCK, hadamard, round_to_e2m1, round_to_e4m3
from .weights.protocol import Array, WeightSource

# Called with the name and the value of each activation, in the order of computation.
Record = Callable[[str, Array], None]

# The ratio whose compressor overlaps blocks, and which has an indexer to choose among its entries.
CSA_RATIO = 4

# Rows of the output matrix that are decoded at a time: [8192, 7168] float32 is 224 MiB.
HEAD_ROWS = 8192

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
    """The caches of one attention: the last W raw kv, and its compressors where it has them."""

    window: Array  # [at most W, d]
    compressor: CompressorState | None
    indexer: CompressorState | None

    @classmethod
    def empty(cls, config: ModelConfig, ratio: int) -> LayerState:
        """Return the state before the first token."""
        return cls(
            window=np.zeros((0, config.head_dim), np.float32),
            compressor=CompressorState.empty(ratio, config.head_dim) if ratio else None,
            indexer=CompressorState.empty(ratio, config.index_head_dim) if ratio == CSA_RATIO else None,
        )


@dataclass
class State:
    """All that a model has to remember of the tokens it has seen."""

    position: int = 0
    layers: list[LayerState] = field(default_factory=list)
    streams: Array | None = None  # [T, hc, D] after the last layer, of the latest call: input of the MTP


class Model:
    """A DeepSeek-V4 model that reads its weights when it needs them and keeps none.

    Args:
        source: the weights.
        activation_rounding: round activations as the published FP8/FP4 kernels do.
        layers: run only so many trunk layers, then the head (default: all).
    """

    def __init__(self, source: WeightSource, *, activation_rounding: bool = False, layers: int | None = None) -> None:
        self.source = source
        self.config = source.config
        self.activation_rounding = activation_rounding
        self.n_layers = self.config.num_hidden_layers if layers is None else layers
        if not 0 < self.n_layers <= self.config.num_hidden_layers:
            raise UsageError("number of layers", expected=f"1 to {self.config.num_hidden_layers}", got=layers)

    # ---- running it -----------------------------------------------------------------------------------

    def new_state(self) -> State:
        """Return the state before the first token."""
        ratios = self.config.compress_ratios[: self.n_layers]
        return State(layers=[LayerState.empty(self.config, ratio) for ratio in ratios])

    def forward(
        self,
        tokens: Sequence[int] | Array,
        state: State | None = None,
        *,
        record: Record | None = None,
        last_only: bool = False,
    ) -> Array:
        """Return the logits [T, V] of the next ``tokens`` ([1, V] with ``last_only``), and advance ``state``.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, or more than ``max_position_embeddings``.
            InventoryError: a weight is missing.
        """
        state = self.new_state() if state is None else state
        for _ in self._trunk(tokens, state, record or _ignore):
            pass
        X = _streams_of(state)
        return self._head(X[-1:] if last_only else X, "", record or _ignore)

    def prefill(self, tokens: Sequence[int] | Array, state: State) -> None:
        """Advance ``state`` over ``tokens`` without computing logits.

        Raises:
            UsageError, InventoryError: as for ``forward``.
        """
        for _ in self._trunk(tokens, state, _ignore):
            pass

    def activations(self, tokens: Sequence[int] | Array, state: State | None = None) -> Iterator[tuple[str, Array]]:
        """Yield every sub-block's activation by name, in the order of computation; the last is ``logits``.

        Only one layer's are held at a time, so two models can be compared in step in little memory.
        """
        state = self.new_state() if state is None else state
        done: list[tuple[str, Array]] = []

        def record(name: str, value: Array) -> None:
            done.append((name, value))

        for _ in self._trunk(tokens, state, record):
            yield from done
            done.clear()
        self._head(_streams_of(state), "", record)
        yield from done

    def _trunk(self, tokens: Sequence[int] | Array, state: State, record: Record) -> Iterator[None]:
        """Run embedding and layers, pausing after each, and leave the streams in ``state``."""
        tokens_T = self._checked(tokens, state.position)
        embedding_TD = self.source.rows("embed.weight", tokens_T)
        record("embed", embedding_TD)
        X = np.repeat(embedding_TD[:, None, :], self.config.hc_mult, axis=1)
        yield
        for n in range(self.n_layers):
            ratio = self.config.compress_ratios[n]
            X = self._layer(X, tokens_T, f"layers.{n}.", ratio, state.layers[n], state.position, record)
            yield
        state.streams = X
        state.position += len(tokens_T)

    def _checked(self, tokens: Sequence[int] | Array, position: int) -> Array:
        """Return ``tokens`` as int64 [T], or say what is wrong with them."""
        tokens_T = np.asarray(tokens, dtype=np.int64).reshape(-1)
        if not tokens_T.size:
            raise UsageError("the prompt is empty", hint="pass at least one token")
        outside = tokens_T[(tokens_T < 0) | (tokens_T >= self.config.vocab_size)]
        if outside.size:
            ids = f"0 to {self.config.vocab_size - 1}"
            raise UsageError("token id out of range", expected=ids, got=outside[0])
        end = position + tokens_T.size
        if end > self.config.max_position_embeddings:
            raise UsageError(
                "more tokens than the model's context",
                expected=f"at most {self.config.max_position_embeddings} (max_position_embeddings)",
                got=end,
            )
        return tokens_T

    # ---- multi-token prediction -----------------------------------------------------------------------

    def new_mtp_state(self) -> State:
        """Return the state of the MTP layer before its first token."""
        return State(layers=[LayerState.empty(self.config, 0)])

    def mtp(
        self,
        streams: Array,
        next_tokens: Sequence[int] | Array,
        state: State | None = None,
        *,
        record: Record | None = None,
    ) -> Array:
        """Return the MTP head's logits [T, V] for the token after next.

        ``streams`` [T, hc, D] are those of the trunk's last layer (``State.streams``), and
        ``next_tokens[t]`` is the token that follows the one at t.

        Raises:
            UnsupportedError: the model has another draft head.
            UsageError: the number of tokens differs, or an id is outside the vocabulary.
            InventoryError: a weight is missing.
        """
        record = record or _ignore
        state = self.new_mtp_state() if state is None else state
        if self.source.has("mtp.0.main_proj.weight"):
            raise UnsupportedError("no forward pass for a DSpark draft head", hint="run the trunk only")
        tokens_T = self._checked(next_tokens, state.position)
        if len(tokens_T) != len(streams):
            raise UsageError("one next token per position", expected=len(streams), got=len(tokens_T))
        eps = self.config.rms_norm_eps
        e_TD = rms_norm(self.source.rows("embed.weight", tokens_T), self._weight("mtp.0.enorm.weight"), eps)
        h = rms_norm(streams, self._weight("mtp.0.hnorm.weight"), eps)
        X = self._linear(e_TD, "mtp.0.e_proj.weight")[:, None, :] + self._linear(h, "mtp.0.h_proj.weight")
        record("mtp.0.input", X)
        X = self._layer(X, tokens_T, "mtp.0.", 0, state.layers[0], state.position, record)
        state.streams = X
        state.position += len(tokens_T)
        return self._head(X, "mtp.0.", record)

    # ---- one layer ------------------------------------------------------------------------------------

    def _layer(
        self, X: Array, tokens_T: Array, at: str, ratio: int, state: LayerState, t0: int, record: Record
    ) -> Array:
        """Return the streams [T, hc, D] after attention and MoE, each inside its hyper-connection."""
        x_TD, post, C = self._hyper_connection(X, f"{at}hc_attn", record)
        x_TD = self._rms_norm(x_TD, f"{at}attn_norm.weight")
        y_TD = self._attention(x_TD, f"{at}attn.", ratio, state, t0, record)
        X = connect(X, y_TD, post, C)
        record(f"{at}attn.streams", X)

        x_TD, post, C = self._hyper_connection(X, f"{at}hc_ffn", record)
        x_TD = self._rms_norm(x_TD, f"{at}ffn_norm.weight")
        y_TD = self._moe(x_TD, tokens_T, f"{at}ffn.", record)
        X = connect(X, y_TD, post, C)
        record(f"{at}ffn.streams", X)
        return X

    # ---- hyper-connections ----------------------------------------------------------------------------

    def _hyper_connection(self, X: Array, at: str, record: Record) -> tuple[Array, Array, Array]:
        """Return the sublayer's input [T, D], ``post`` [T, hc] and the mixing matrices C [T, hc, hc]."""
        hc, eps = self.config.hc_mult, np.float32(self.config.hc_eps)
        base, scale = self._weight(f"{at}_base"), self._weight(f"{at}_scale")
        m = self._mixing_logits(X, f"{at}_fn")  # [T, (2+hc)·hc]
        pre = sigmoid(m[:, :hc] * scale[0] + base[:hc]) + eps
        post = 2 * sigmoid(m[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
        C = (m[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
        C = sinkhorn(softmax(C, axis=-1) + eps, self.config.hc_sinkhorn_iters, eps)
        record(f"{at}.pre", pre)
        record(f"{at}.post", post)
        record(f"{at}.mix", C)
        return collapse(X, pre), post, C

    def _mixing_logits(self, X: Array, fn: str) -> Array:
        x = X.reshape(len(X), -1)  # [T, hc·D]
        return product(x, self._weight(fn)) / rms(x, self.config.rms_norm_eps)

    # ---- attention ------------------------------------------------------------------------------------

    def _attention(self, x_TD: Array, at: str, ratio: int, state: LayerState, t0: int, record: Record) -> Array:
        """Return attention's output [T, D] for tokens at positions t0 … t0+T−1, and advance ``state``."""
        c = self.config
        T, H, d, G = len(x_TD), c.num_attention_heads, c.head_dim, c.o_groups
        record(f"{at}input", x_TD)
        f = frequencies(c, ratio)
        turn_Tr = turns(np.arange(t0, t0 + T), f)

        qr = self._rms_norm(self._linear(x_TD, f"{at}wq_a.weight"), f"{at}q_norm.weight")
        q_THd = self._linear(qr, f"{at}wq_b.weight").reshape(T, H, d)
        q_THd = rotate(q_THd / rms(q_THd, c.rms_norm_eps), turn_Tr)
        record(f"{at}q", q_THd)

        kv_Td = self._rms_norm(self._linear(x_TD, f"{at}wkv.weight"), f"{at}kv_norm.weight")
        kv_Td = self._rounded_kv(rotate(kv_Td, turn_Tr))
        record(f"{at}kv", kv_Td)

        entries_Sd, chosen_TS = None, None
        if state.compressor is not None:
            entries_Sd = self._compress(x_TD, f"{at}compressor.", ratio, f, state.compressor, rotated=False)
            record(f"{at}compressor.entries", entries_Sd)
        if state.indexer is not None:
            chosen_TS = self._index(x_TD, qr, f"{at}indexer.", ratio, f, turn_Tr, state.indexer, t0, record)

        # One head of kv is both key and value; it is kept for W tokens.
        kv_Nd = np.concatenate([state.window, kv_Td])
        state.window = kv_Nd[-c.sliding_window :]
        o_THd = self._attend(q_THd, kv_Nd, entries_Sd, chosen_TS, self._weight(f"{at}attn_sink"), ratio, t0)
        # Values carry their key's rotation; turning back at t leaves one by the distance.
        o_THd = rotate(o_THd, turn_Tr.conj())
        record(f"{at}heads", o_THd)

        # wo_a is one matrix per group, a block-diagonal linear; the published code keeps it in BF16.
        wo_a = self._weight(f"{at}wo_a.weight").reshape(G, c.o_lora_rank, H * d // G)
        u_GTo = o_THd.reshape(T, G, H * d // G).transpose(1, 0, 2) @ wo_a.transpose(0, 2, 1)
        y_TD = self._linear(u_GTo.transpose(1, 0, 2).reshape(T, G * c.o_lora_rank), f"{at}wo_b.weight")
        record(f"{at}output", y_TD)
        return y_TD

    def _attend(
        self,
        q_THd: Array,
        kv_Nd: Array,
        entries_Sd: Array | None,
        chosen_TS: Array | None,
        sink_H: Array,
        ratio: int,
        t0: int,
    ) -> Array:
        """Return Σ softmax(q·k)·k [T, H, d] over the raw kv in the window and the visible compressed entries.

        The last row of ``kv_Nd`` is that of the last query. Queries go in blocks, to bound the scores.
        """
        T, H, d = q_THd.shape
        W = self.config.sliding_window
        n_entries = 0 if entries_Sd is None else len(entries_Sd)
        first = t0 + T - len(kv_Nd)  # position of the first raw kv
        block = query_block(H, W, n_entries)
        o_THd = np.empty_like(q_THd)
        for a in range(0, T, block):
            b = min(a + block, T)
            t = np.arange(t0 + a, t0 + b)[:, None]
            from_position = max(first, t0 + a - W + 1)
            keys = kv_Nd[from_position - first : t0 + b - first]
            j = np.arange(from_position, t0 + b)[None, :]
            visible = (t - W < j) & (j <= t)
            if entries_Sd is not None:
                keys = np.concatenate([keys, entries_Sd])
                finished = np.arange(n_entries)[None, :] < (t + 1) // ratio
                seen = finished if chosen_TS is None else chosen_TS[a:b]
                visible = np.concatenate([visible, seen], axis=1)
            scores = (q_THd[a:b].reshape(-1, d) @ keys.T).reshape(b - a, H, -1) * np.float32(d**-0.5)
            scores[~np.broadcast_to(visible[:, None, :], scores.shape)] = -np.inf
            p = softmax_with_sink(scores, sink_H)
            o_THd[a:b] = (p.reshape((b - a) * H, -1) @ keys).reshape(b - a, H, d)
        return o_THd

    def _compress(self, x_TD: Array, at: str, ratio: int, f: Array, state: CompressorState, *, rotated: bool) -> Array:
        """Return all entries [S, d] so far, one per whole block of R tokens.

        An entry is a channelwise softmax-weighted sum over its block. At ratio 4 blocks overlap: the
        candidates are the first d channels of the previous block and the last d of the current one.
        """
        k = np.concatenate([state.pending_k, self._project(x_TD, f"{at}wkv.weight")])
        s = np.concatenate([state.pending_s, self._project(x_TD, f"{at}wgate.weight")])
        n = len(k) // ratio
        state.pending_k, state.pending_s = k[n * ratio :], s[n * ratio :]
        if n == 0:
            return state.entries
        k = k[: n * ratio].reshape(n, ratio, -1)
        s = s[: n * ratio].reshape(n, ratio, -1) + self._weight(f"{at}ape")
        if ratio == CSA_RATIO:
            d = state.entries.shape[1]
            before_k = np.concatenate([state.previous_k[None], k[..., :d]])
            before_s = np.concatenate([state.previous_s[None], s[..., :d]])
            state.previous_k, state.previous_s = before_k[-1], before_s[-1]
            k = np.concatenate([before_k[:-1], k[..., d:]], axis=1)  # [n, 2R, d]
            s = np.concatenate([before_s[:-1], s[..., d:]], axis=1)
        entries = (softmax(s, axis=1) * k).sum(axis=1)
        entries = self._rms_norm(entries, f"{at}norm.weight")
        position = (len(state.entries) + np.arange(n)) * ratio  # of the block's first token
        entries = rotate(entries, turns(position, f))
        entries = self._rounded_index(entries) if rotated else self._rounded_kv(entries)
        state.entries = np.concatenate([state.entries, entries])
        return state.entries

    def _index(
        self,
        x_TD: Array,
        qr: Array,
        at: str,
        ratio: int,
        f: Array,
        turn_Tr: Array,
        state: CompressorState,
        t0: int,
        record: Record,
    ) -> Array:
        """Return which of the entries each query attends to, bool [T, S]: the ``index_topk`` best."""
        c = self.config
        T, Hi, di = len(x_TD), c.index_n_heads, c.index_head_dim
        q = self._linear(qr, f"{at}wq_b.weight").reshape(T, Hi, di)
        q = self._rounded_index(rotate(q, turn_Tr))
        record(f"{at}q", q)
        entries_Sd = self._compress(x_TD, f"{at}compressor.", ratio, f, state, rotated=True)
        record(f"{at}compressor.entries", entries_Sd)
        w = self._project(x_TD, f"{at}weights_proj.weight") * np.float32(di**-0.5 * Hi**-0.5)  # [T, Hi]

        S = len(entries_Sd)
        score_TS = np.empty((T, S), np.float32)
        block = query_block(Hi, 0, S)
        for a in range(0, T, block):
            b = min(a + block, T)
            dots = (q[a:b].reshape(-1, di) @ entries_Sd.T).reshape(b - a, Hi, S)
            score_TS[a:b] = (w[a:b, None, :] @ np.maximum(dots, 0))[:, 0]
        seen = np.arange(S)[None, :] < (np.arange(t0, t0 + T)[:, None] + 1) // ratio
        score_TS[~seen] = -np.inf
        record(f"{at}score", score_TS)

        chosen_TS = np.zeros((T, S), bool)
        best = np.argsort(-score_TS, axis=1, kind="stable")[:, : c.index_topk]
        np.put_along_axis(chosen_TS, best, True, axis=1)
        chosen_TS &= seen
        record(f"{at}chosen", chosen_TS)
        return chosen_TS

    # ---- mixture of experts ---------------------------------------------------------------------------

    def _moe(self, x_TD: Array, tokens_T: Array, at: str, record: Record) -> Array:
        """Return Σ weight·expert(x) + shared(x), reading only the experts that some token is routed to."""
        record(f"{at}input", x_TD)
        experts_TK, weights_TK = self._route(x_TD, tokens_T, at, record)
        routed_TD = np.zeros_like(x_TD)
        for e in np.unique(experts_TK):
            hit_TK = experts_TK == e
            rows = np.flatnonzero(hit_TK.any(axis=1))
            weight = np.where(hit_TK, weights_TK, 0)[rows].sum(axis=1)
            routed_TD[rows] += self._expert(x_TD[rows], f"{at}experts.{e}.", weight[:, None])
        record(f"{at}routed", routed_TD)
        shared_TD = self._expert(x_TD, f"{at}shared_experts.", None)
        record(f"{at}shared", shared_TD)
        return routed_TD + shared_TD

    def _route(self, x_TD: Array, tokens_T: Array, at: str, record: Record) -> tuple[Array, Array]:
        """Return the experts of each token and their weights, both [T, K]."""
        c = self.config
        affinity_TE = np.sqrt(softplus(self._project(x_TD, f"{at}gate.weight")))
        record(f"{at}gate.affinity", affinity_TE)
        if self._is_hash_routed(at):
            experts_TK = self.source.rows(f"{at}gate.tid2eid", tokens_T)
        else:
            biased = affinity_TE + self._weight(f"{at}gate.bias")  # the bias chooses, it does not weigh
            experts_TK = np.argsort(-biased, axis=1, kind="stable")[:, : c.num_experts_per_tok]
        weights_TK = np.take_along_axis(affinity_TE, experts_TK, axis=1)
        weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True) * np.float32(c.routed_scaling_factor)
        record(f"{at}gate.experts", experts_TK)
        record(f"{at}gate.weights", weights_TK)
        return experts_TK, weights_TK

    def _is_hash_routed(self, at: str) -> bool:
        kind, n = at.split(".")[:2]
        return kind == "layers" and self.config.is_hash_routed(int(n))

    def _expert(self, x_TD: Array, at: str, weight_T1: Array | None) -> Array:
        """Return the clamped SwiGLU of one expert, [T, D]."""
        limit = np.float32(self.config.swiglu_limit)
        g = np.minimum(self._linear(x_TD, f"{at}w1.weight"), limit)
        u = np.clip(self._linear(x_TD, f"{at}w3.weight"), -limit, limit)
        y_TI = silu(g) * u
        if weight_T1 is not None:
            y_TI = y_TI * weight_T1
        return self._linear(y_TI, f"{at}w2.weight")

    # ---- head -----------------------------------------------------------------------------------------

    def _head(self, X: Array, at: str, record: Record) -> Array:
        """Return the logits [T, V]; the MTP head (``at`` "mtp.0.") shares only the output matrix."""
        scale, base = self._weight(f"{at}hc_head_scale"), self._weight(f"{at}hc_head_base")
        pre = sigmoid(self._mixing_logits(X, f"{at}hc_head_fn") * scale + base)
        pre = pre + np.float32(self.config.hc_eps)
        x_TD = self._rms_norm(collapse(X, pre), f"{at}norm.weight")
        record(f"{at}head.input", x_TD)
        V = self.config.vocab_size
        logits_TV = np.empty((len(X), V), np.float32)
        for a in range(0, V, HEAD_ROWS):
            rows = np.arange(a, min(a + HEAD_ROWS, V))
            logits_TV[:, rows] = product(x_TD, self.source.rows("head.weight", rows))
        record(f"{at}logits", logits_TV)
        return logits_TV

    # ---- weights, and rounding where it is on ---------------------------------------------------------

    def _weight(self, name: str) -> Array:
        return self.source.tensor(name)

    def _rms_norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self._weight(name), self.config.rms_norm_eps)

    def _project(self, x: Array, name: str) -> Array:
        """Return x·wᵀ for a weight that is published in BF16 or float32."""
        return product(x, self._weight(name))

    def _linear(self, x: Array, name: str) -> Array:
        """Return x·wᵀ for a weight that is published in FP8 or FP4: its kernel takes e4m3 inputs."""
        if self.activation_rounding:
            x = round_to_e4m3(x, LINEAR_BLOCK)
        return product(x, self._weight(name))

    def _rounded_kv(self, kv: Array) -> Array:
        """Round all but the rotary part."""
        if not self.activation_rounding:
            return kv
        r = self.config.qk_rope_head_dim
        return np.concatenate([round_to_e4m3(kv[..., :-r], KV_BLOCK), kv[..., -r:]], axis=-1)

    def _rounded_index(self, x: Array) -> Array:
        """Rotate queries or entries of the indexer and round them; unrounded, both rotations would cancel."""
        return round_to_e2m1(hadamard(x), INDEXER_BLOCK) if self.activation_rounding else x


# ---- pieces without weights ---------------------------------------------------------------------------


def product(x: Array, w: Array) -> Array:
    """Return x·wᵀ for x [..., in] and w [out, in], as (w·xᵀ)ᵀ.

    BLAS libraries share out the rows of the left factor among threads: w has thousands, and x often
    has fewer than ten, one for each token that an expert is chosen by.
    """
    y = w @ x.reshape(-1, x.shape[-1]).T
    return np.ascontiguousarray(y.T).reshape(*x.shape[:-1], -1)


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


def query_block(heads: int, window: int, entries: int) -> int:
    """Return how many queries to score at a time so that their scores stay within SCORE_BYTES."""
    keys = QUERY_BLOCK + window + entries
    return max(1, min(QUERY_BLOCK, SCORE_BYTES // (heads * keys * F32_BYTES)))


def _streams_of(state: State) -> Array:
    if state.streams is None:
        raise UsageError("nothing has been run with this state")
    return state.streams


def _ignore(_name: str, _value: Array) -> None:
    """Record nothing."""
