"""The DSpark draft of V4.1: a block of tokens guessed at once from what the trunk's last layers saw.

The block is the last real token and as many noise tokens as make it whole. Its positions see each
other, without a causal mask, and a window of kv that each stage makes of the trunk's hidden states. A
Markov head then corrects the logits of each position by the token before it.
"""

# numpy's arithmetic on arrays of any dtype is typed Any.
# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import UnsupportedError
from .arithmetic import product
from .attention import attend_to, output, queries, raw_kv
from .experts import mixture
from .hyper_connections import around, collapse, first_pre
from .parameters import Parameters, Record
from .rotary import frequencies, turns
from .weights.protocol import Array


@dataclass
class DraftState:
    """The windows of the stages: kv [at most W, d] of the real tokens seen."""

    position: int = 0
    windows: list[Array] = field(default_factory=list)

    def copy(self) -> DraftState:
        """Return a state that advances by itself; arrays are replaced in it, never written to."""
        return replace(self, windows=list(self.windows))


@dataclass(frozen=True)
class Draft:
    """A block's guesses: tokens [B], their logits [B, V], and a confidence [B] before its sigmoid."""

    tokens: Array
    logits: Array
    confidence: Array


def check_dspark(p: Parameters) -> int:
    """Return the number of draft stages.

    Raises:
        UnsupportedError: the model has no DSpark draft of V4.1's.
    """
    stages = p.config.num_nextn_predict_layers
    if not p.is_v41 or not stages or not p.source.has("mtp.0.main_proj.weight"):
        raise UnsupportedError(
            "the model has no DSpark draft that can be run",
            expected="a DeepSeek-V4.1 checkpoint with its mtp.* tensors",
            hint="run without --speculate",
        )
    return stages


def new_draft_state(p: Parameters) -> DraftState:
    """Return the state before the first token.

    Raises:
        UnsupportedError: the model has no DSpark draft of V4.1's.
    """
    empty = np.zeros((0, p.config.head_dim), np.float32)
    return DraftState(windows=[empty] * check_dspark(p))


def see(p: Parameters, main_TX: Array, state: DraftState) -> None:
    """Advance ``state`` over the next tokens: ``main_TX`` [T, targets·D] are the trunk's recorded streams."""
    m_TD = p.rms_norm(p.linear(main_TX, "mtp.0.main_proj.weight"), "mtp.0.main_norm.weight")
    turn_Tr = turns(np.arange(state.position, state.position + len(m_TD)), frequencies(p.config, 0))
    for n, window in enumerate(state.windows):
        kv_Td = raw_kv(p, m_TD, turn_Tr, f"mtp.{n}.attn.")
        state.windows[n] = np.concatenate([window, kv_Td])[-p.config.sliding_window :]
    state.position += len(m_TD)


def draft(
    p: Parameters, token: int, state: DraftState, output_product: Callable[[Array], Array], record: Record
) -> Draft:
    """Return the guesses for the tokens that follow ``token``, the one after those that ``state`` has seen.

    ``output_product`` multiplies [B, D] by the trunk's output matrix.
    """
    flat = p.config.flat
    B, noise = int(flat["dspark_block_size"]), int(flat["dspark_noise_token_id"])
    tokens_B = np.full(B, noise, np.int64)
    tokens_B[0] = token
    X = np.repeat(p.source.rows("embed.weight", tokens_B)[:, None, :], p.config.hc_mult, axis=1)
    pre = first_pre(B, p.config.hc_mult)
    no_image = np.zeros(B, bool)
    turn_Br = turns(np.arange(state.position, state.position + B), frequencies(p.config, 0))
    last = f"mtp.{len(state.windows) - 1}."
    for n, window in enumerate(state.windows):
        at = f"mtp.{n}."

        def attend(x_BD: Array, at: str = f"{at}attn.", window: Array = window) -> Array:
            _, q_BHd = queries(p, x_BD, turn_Br, at)
            keys_Nd = np.concatenate([window, raw_kv(p, x_BD, turn_Br, at)])
            all_seen = np.ones((B, len(keys_Nd)), bool)
            o_BHd = attend_to(q_BHd, keys_Nd, all_seen, p.weight(f"{at}attn_sink"))
            return output(p, o_BHd, turn_Br, at, record)

        def mix(x_BD: Array, at: str = f"{at}ffn.") -> Array:
            return mixture(p, x_BD, tokens_B, no_image, at, record)

        X, pre = around(p, X, pre, f"{at}hc_attn", f"{at}attn_norm.weight", attend, record)
        X, pre = around(p, X, pre, f"{at}hc_ffn", f"{at}ffn_norm.weight", mix, record)
        record(f"{at}streams", X)
    x_BD = collapse(X, pre)
    logits_BV = output_product(p.rms_norm(x_BD, f"{last}norm.weight"))
    markov_head = p.weight(f"{last}markov_head.head.weight")
    guessed = np.empty(B, np.int64)
    before = token
    markov_BM = np.empty((B, markov_head.shape[1]), np.float32)
    for b in range(B):
        markov_BM[b] = p.source.rows(f"{last}markov_head.embed.weight", np.array([before]))[0]
        logits_BV[b] += product(markov_BM[b], markov_head)
        before = guessed[b] = int(np.argmax(logits_BV[b]))
    confidence = p.project(np.concatenate([x_BD, markov_BM], axis=1), f"{last}confidence_head.proj.weight")[:, 0]
    return Draft(guessed, logits_BV, confidence)
