"""The forward pass of DeepSeek-V4 and V4.1 in numpy, float32, one layer and one expert at a time, to be read.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..errors import UnsupportedError, UsageError
from ..model.engram import EngramConstants
from .arithmetic import product, rms_norm
from .attention import LayerState, Place, Shared, attention, window_of
from .dspark import Draft, DraftState, draft, new_draft_state, see
from .engram import engram, looked_up
from .experts import mixture
from .hyper_connections import around, collapse, first_pre, head_pre
from .parameters import Observe, Parameters, Product, Record
from .vision import IMAGE
from .weights.protocol import Array, WeightSource

# Rows of the output matrix that are decoded at a time: [8192, 7168] float32 is 224 MiB.
HEAD_ROWS = 8192


@dataclass
class State:
    """All that a model has to remember of the tokens it has seen.

    Of the latest call: ``streams`` [T, hc, D] after the last layer, ``pre`` [T, hc], which collapse them
    in V4.1, and ``main`` [T, targets·D], what its DSpark draft sees. ``context`` are the last tokens, which
    the next ones make n-grams with, and ``context_image`` whether they belong to an image.
    """

    position: int = 0
    layers: list[LayerState] = field(default_factory=list)
    streams: Array | None = None
    pre: Array | None = None
    main: Array | None = None
    context: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    context_image: Array = field(default_factory=lambda: np.zeros(0, bool))

    def copy(self) -> State:
        """Return a state that advances by itself; arrays are replaced in it, never written to."""
        return replace(self, layers=[layer.copy() for layer in self.layers])


@dataclass
class Flow:
    """What passes from layer to layer of a call over T tokens at positions ``t0`` and on.

    ``streams`` [T, hc, D] and ``pre`` [T, hc], the weights that lag; ``seen`` is that of ``Place``; ``rows`` are the
    rows [T, columns] of the n-gram table of each layer that has one, ``main`` what the layers that a DSpark draft sees
    have seen so far.
    """

    tokens: Array
    image: Array
    streams: Array
    pre: Array
    t0: int = 0
    seen: tuple[Array, Array] | None = None
    rows: dict[int, Array] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)
    main: list[Array] = field(default_factory=list)


class Model:
    """A DeepSeek-V4 or V4.1 model that reads its weights when it needs them and keeps none.

    Args:
        source: the weights.
        activation_rounding: round activations as the published FP8/FP4 kernels do.
        layers: run only so many trunk layers, then the head (default: all).
        observe: called with what the matrices are multiplied with.
        product: multiplies the larger matrices.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        activation_rounding: bool = False,
        layers: int | None = None,
        observe: Observe | None = None,
        product: Product = product,
    ) -> None:
        self.source = source
        self.config = source.config
        self.activation_rounding = activation_rounding
        self.n_layers = self.config.num_hidden_layers if layers is None else layers
        if not 0 < self.n_layers <= self.config.num_hidden_layers:
            raise UsageError("number of layers", expected=f"1 to {self.config.num_hidden_layers}", got=layers)
        self.parameters = Parameters(source, activation_rounding, observe, product)
        self._engram: EngramConstants | None = None
        ids = () if self.config.engram is None else self.config.engram.layer_ids
        self._engram_layers = tuple(layer for layer in ids if layer < self.n_layers)
        self._targets = self.config.flat.get("dspark_target_layer_ids", ()) if self.parameters.is_v41 else ()

    # ---- running it -----------------------------------------------------------------------------------

    def new_state(self) -> State:
        """Return the state before the first token."""
        return State(layers=[LayerState.empty(self.config, layer) for layer in range(self.n_layers)])

    def forward(
        self,
        tokens: Sequence[int] | Array,
        state: State | None = None,
        *,
        images: Sequence[Array] = (),
        record: Record | None = None,
        last_only: bool = False,
    ) -> Array:
        """Return the logits [T, V] of the next ``tokens`` ([1, V] with ``last_only``), and advance ``state``.

        ``images`` are embeddings [tokens of the image, D], in order, of the tokens with the image token's id, which in
        V4 is ``vision.IMAGE``; see ``vision.with_images``. An image is within one call.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, more than ``max_position_embeddings``, or
                images that do not fit the image tokens.
            InventoryError: a weight is missing.
        """
        state = self.new_state() if state is None else state
        for _ in self._trunk(tokens, state, record or ignore, images):
            pass
        return self._trunk_head(state, record or ignore, last_only=last_only)

    def prefill(self, tokens: Sequence[int] | Array, state: State) -> None:
        """Advance ``state`` over ``tokens`` without computing logits.

        Raises:
            UsageError, InventoryError: as for ``forward``.
        """
        for _ in self._trunk(tokens, state, ignore):
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
        self._trunk_head(state, record)
        yield from done

    def _trunk(
        self, tokens: Sequence[int] | Array, state: State, record: Record, images: Sequence[Array] = ()
    ) -> Iterator[None]:
        """Run embedding and layers, pausing after each, and leave the streams in ``state``."""
        flow = self.begin(tokens, state, record, images)
        yield
        for n in range(self.n_layers):
            self.attend(flow, n, state.layers[n], record)
            flow.streams, flow.pre = self._mix(flow.streams, flow.pre, flow.tokens, flow.image, f"layers.{n}.", record)
            yield
        state.streams, state.pre = flow.streams, flow.pre
        is_whole = self._targets and len(flow.main) == len(self._targets)
        state.main = np.concatenate(flow.main, axis=1) if is_whole else None
        state.position += len(flow.tokens)

    def begin(self, tokens: Sequence[int] | Array, state: State, record: Record, images: Sequence[Array] = ()) -> Flow:
        """Return the streams of the next ``tokens`` before the first layer.

        Raises:
            UsageError, InventoryError: as for ``forward``.
        """
        tokens_T, image_T = self._placed(tokens, images, state.position)
        embedding_TD = self._embedded(tokens_T, image_T, images)
        record("embed", embedding_TD)
        hc = self.config.hc_mult
        X = np.repeat(embedding_TD[:, None, :], hc, axis=1)
        rows = self._engram_rows(tokens_T, image_T, state)
        seen = self._seen(image_T, images, state.position)
        return Flow(tokens_T, image_T, X, first_pre(len(X), hc), state.position, seen, rows)

    def attend(self, flow: Flow, n: int, state: LayerState, record: Record) -> None:
        """Advance ``flow`` over the n-gram table and the attention of layer ``n``, and ``state`` with it."""
        at = f"layers.{n}."
        if n in flow.rows:
            flow.streams = engram(self.parameters, flow.streams, flow.rows[n], flow.image, f"{at}engram.")
            record(f"{at}engram.streams", flow.streams)
        if n in self._targets:
            flow.main.append(flow.streams.mean(axis=1))
        place = Place(f"{at}attn.", n, flow.t0, flow.seen)
        flow.streams, flow.pre = self._attend(flow.streams, flow.pre, at, place, state, flow.shared, record)

    def _placed(self, tokens: Sequence[int] | Array, images: Sequence[Array], position: int) -> tuple[Array, Array]:
        """Return the ids [T] and which tokens belong to an image; V4 has no id for these, and theirs is 0."""
        tokens_T = np.asarray(tokens, dtype=np.int64).reshape(-1)
        image_token = self.config.flat.get("image_token_id", IMAGE)
        image_T = (tokens_T == image_token) & bool(images)
        of_images = sum(map(len, images))
        if of_images != image_T.sum():
            raise UsageError(
                "tokens of the images", expected=f"{of_images} image tokens in the prompt", got=int(image_T.sum())
            )
        return self._checked(np.where(image_T & (tokens_T == IMAGE), 0, tokens_T), position), image_T

    def _embedded(self, tokens_T: Array, image_T: Array, images: Sequence[Array]) -> Array:
        """Return the embedding [T, D] of tokens and images."""
        embedding_TD = self.source.rows("embed.weight", tokens_T)
        if images:
            embedding_TD = embedding_TD.copy()
            embedding_TD[image_T] = np.concatenate(list(images))
        return embedding_TD

    def _seen(self, image_T: Array, images: Sequence[Array], t0: int) -> tuple[Array, Array] | None:
        """Return the first and last position that each token sees where it is not its window: in V4's images.

        Tokens of an image see all of it, however long it is, and what their window reaches before it.
        """
        if not images or self.parameters.is_v41:
            return None
        from_T, to_T = window_of(t0, len(image_T), self.config.sliding_window)
        places, done = np.flatnonzero(image_T), 0
        for image in images:
            span = places[done : done + len(image)]
            from_T[span] = np.minimum(from_T[span], t0 + span[0])
            to_T[span] = t0 + span[-1]
            done += len(image)
        return from_T, to_T

    def _engram_rows(self, tokens_T: Array, image_T: Array, state: State) -> dict[int, Array]:
        """Return the rows [T, columns] of the n-gram table of each layer that has one."""
        if self.config.engram is None or not self._engram_layers:
            return {}
        if self._engram is None:
            self._engram = self.source.engram_constants()
        sequence = np.concatenate([state.context, tokens_T])
        image = np.concatenate([state.context_image, image_T])
        rows = looked_up(self._engram, sequence, image, len(tokens_T))
        kept = self.config.engram.max_ngram_size - 1
        state.context, state.context_image = sequence[-kept:], image[-kept:]
        return {layer: rows[:, at] for at, layer in enumerate(self._engram.layer_ids) if layer in self._engram_layers}

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
        return State(layers=[LayerState.empty(self.config, None)])

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
        record = record or ignore
        state = self.new_mtp_state() if state is None else state
        if self.source.has("mtp.0.main_proj.weight"):
            raise UnsupportedError("no forward pass for a DSpark draft head", hint="run the trunk only")
        tokens_T = self._checked(next_tokens, state.position)
        if len(tokens_T) != len(streams):
            raise UsageError("one next token per position", expected=len(streams), got=len(tokens_T))
        eps = self.config.rms_norm_eps
        e_TD = rms_norm(self.source.rows("embed.weight", tokens_T), self.parameters.weight("mtp.0.enorm.weight"), eps)
        h = rms_norm(streams, self.parameters.weight("mtp.0.hnorm.weight"), eps)
        X = self.parameters.linear(e_TD, "mtp.0.e_proj.weight")[:, None, :] + self.parameters.linear(
            h, "mtp.0.h_proj.weight"
        )
        record("mtp.0.input", X)
        pre, no_image = first_pre(len(X), self.config.hc_mult), np.zeros(len(X), bool)
        place = Place("mtp.0.attn.", None, state.position)
        X, pre = self._attend(X, pre, "mtp.0.", place, state.layers[0], Shared(), record)
        X, _ = self._mix(X, pre, tokens_T, no_image, "mtp.0.", record)
        state.streams = X
        state.position += len(tokens_T)
        return self._head(X, head_pre(self.parameters, X, "mtp.0."), "mtp.0.", record)

    # ---- the DSpark draft -----------------------------------------------------------------------------

    def new_draft_state(self) -> DraftState:
        """Return the state of the draft before its first token.

        Raises:
            UnsupportedError: the model has no DSpark draft of V4.1's.
        """
        return new_draft_state(self.parameters)

    def draft(self, token: int, draft_state: DraftState, *, record: Record | None = None) -> Draft:
        """Return a block of guesses for what follows ``token``, itself the next after those that the draft has seen.

        Raises:
            InventoryError: a weight is missing.
        """
        return draft(self.parameters, token, draft_state, self._output_product, record or ignore)

    def draft_sees(self, main: Array | None, draft_state: DraftState) -> None:
        """Advance ``draft_state`` over the tokens that ``main`` [T, targets·D] was recorded of (``State.main``).

        Raises:
            UsageError: the trunk has not recorded it.
            InventoryError: a weight is missing.
        """
        if main is None:
            raise UsageError("the layers that the draft sees were not run", hint="run all layers")
        see(self.parameters, main, draft_state)

    # ---- one layer ------------------------------------------------------------------------------------

    def _attend(
        self, X: Array, pre: Array, at: str, place: Place, state: LayerState, shared: Shared, record: Record
    ) -> tuple[Array, Array]:
        """Return the streams [T, hc, D] after a layer's attention, and the weights that lag to its MoE."""
        p = self.parameters
        attend = partial(attention, p, place=place, state=state, shared=shared, record=record)
        X, pre = around(p, X, pre, f"{at}hc_attn", f"{at}attn_norm.weight", attend, record)
        record(f"{at}attn.streams", X)
        return X, pre

    def _mix(
        self, X: Array, pre: Array, tokens_T: Array, image_T: Array, at: str, record: Record
    ) -> tuple[Array, Array]:
        """Return the streams [T, hc, D] after a layer's MoE, and the weights that lag to the next layer."""
        p = self.parameters
        mix = partial(mixture, p, tokens_T=tokens_T, image_T=image_T, at=f"{at}ffn.", record=record)
        X, pre = around(p, X, pre, f"{at}hc_ffn", f"{at}ffn_norm.weight", mix, record)
        record(f"{at}ffn.streams", X)
        return X, pre

    # ---- head -----------------------------------------------------------------------------------------

    def _trunk_head(self, state: State, record: Record, *, last_only: bool = False) -> Array:
        """Return the logits of the tokens that ``state`` saw last."""
        X = _streams_of(state)
        pre = state.pre
        if last_only:
            X, pre = X[-1:], None if pre is None else pre[-1:]
        return self._head(X, self._trunk_head_pre(X, pre), "", record)

    def _trunk_head_pre(self, X: Array, pre: Array | None) -> Array:
        """Return the weights [T, hc] that collapse the streams: those that lag in V4.1, the head's own in V4."""
        return head_pre(self.parameters, X, "") if pre is None or not self.parameters.is_v41 else pre

    def head_input(self, flow: Flow) -> Array:
        """Return what the output matrix is multiplied with, [T, D], after the last layer."""
        pre = self._trunk_head_pre(flow.streams, flow.pre)
        return self.parameters.rms_norm(collapse(flow.streams, pre), "norm.weight")

    def _head(self, X: Array, pre: Array, at: str, record: Record) -> Array:
        """Return the logits [T, V]; the MTP head (``at`` "mtp.0.") shares only the output matrix."""
        x_TD = self.parameters.rms_norm(collapse(X, pre), f"{at}norm.weight")
        record(f"{at}head.input", x_TD)
        logits_TV = self._output_product(x_TD)
        record(f"{at}logits", logits_TV)
        return logits_TV

    def _output_product(self, x_TD: Array) -> Array:
        """Return x·headᵀ [T, V], some rows of the output matrix at a time."""
        V = self.config.vocab_size
        logits_TV = np.empty((len(x_TD), V), np.float32)
        for a in range(0, V, HEAD_ROWS):
            rows = np.arange(a, min(a + HEAD_ROWS, V))
            logits_TV[:, rows] = product(x_TD, self.source.rows("head.weight", rows))
        return logits_TV


def _streams_of(state: State) -> Array:
    if state.streams is None:
        raise UsageError("nothing has been run with this state")
    return state.streams


def ignore(_name: str, _value: Array) -> None:
    """Record nothing."""
