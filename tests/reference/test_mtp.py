"""The MTP layer against the same formulas in torch, float64, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dsv4convert.reference import DictSource, Model

from .random_model import random_source, random_tokens

pytestmark = pytest.mark.oracle


def mtp_in_torch(source: DictSource, streams: Any, next_tokens: Any) -> Any:
    """Return MTP logits, written out per token and per head: slow, and sharing no code with the model."""
    import torch
    from torch.nn import functional

    c = source.config

    def w(name: str) -> Any:
        return torch.tensor(source.tensor(name), dtype=torch.float64)

    def norm(x: Any, weight: Any = None) -> Any:
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps)
        return x if weight is None else weight * x

    def rope(x: Any, t: int, direction: int) -> Any:
        r = c.qk_rope_head_dim
        out = x.clone()
        for i in range(r // 2):
            angle = direction * t / c.rope_theta ** (2 * i / r)
            even, odd = x[..., -r + 2 * i], x[..., -r + 2 * i + 1]
            out[..., -r + 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
            out[..., -r + 2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
        return out

    def hyper(X: Any, at: str) -> tuple[Any, Any, Any]:
        hc = c.hc_mult
        m = w(f"{at}_fn") @ norm(X.flatten())
        scale, base = w(f"{at}_scale"), w(f"{at}_base")
        pre = torch.sigmoid(m[:hc] * scale[0] + base[:hc]) + c.hc_eps
        post = 2 * torch.sigmoid(m[hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
        mix = torch.softmax((m[2 * hc :] * scale[2] + base[2 * hc :]).view(hc, hc), dim=1) + c.hc_eps
        mix = mix / (mix.sum(0, keepdim=True) + c.hc_eps)
        for _ in range(c.hc_sinkhorn_iters - 1):
            mix = mix / (mix.sum(1, keepdim=True) + c.hc_eps)
            mix = mix / (mix.sum(0, keepdim=True) + c.hc_eps)
        return pre @ X, post, mix

    def expert(x: Any, at: str) -> Any:
        gate = torch.clamp(w(f"{at}.w1.weight") @ x, max=c.swiglu_limit)
        up = torch.clamp(w(f"{at}.w3.weight") @ x, -c.swiglu_limit, c.swiglu_limit)
        return w(f"{at}.w2.weight") @ (functional.silu(gate) * up)

    def connect(X: Any, y: Any, post: Any, mix: Any) -> Any:
        hc = range(c.hc_mult)
        return torch.stack([post[k] * y + sum(mix[j, k] * X[j] for j in hc) for k in hc])

    at = "mtp.0"
    X_all = torch.tensor(streams, dtype=torch.float64)
    embed, e_proj, h_proj = w("embed.weight"), w(f"{at}.e_proj.weight"), w(f"{at}.h_proj.weight")
    X_in = []
    for t, token in enumerate(next_tokens):
        e = e_proj @ norm(embed[token], w(f"{at}.enorm.weight"))
        X_in.append(torch.stack([e + h_proj @ norm(x, w(f"{at}.hnorm.weight")) for x in X_all[t]]))

    past: list[Any] = []
    logits = []
    for t, X in enumerate(X_in):
        x, post, mix = hyper(X, f"{at}.hc_attn")
        x = norm(x, w(f"{at}.attn_norm.weight"))
        qr = norm(w(f"{at}.attn.wq_a.weight") @ x, w(f"{at}.attn.q_norm.weight"))
        q = norm((w(f"{at}.attn.wq_b.weight") @ qr).view(c.num_attention_heads, c.head_dim))
        q = rope(q, t, 1)
        past.append(rope(norm(w(f"{at}.attn.wkv.weight") @ x, w(f"{at}.attn.kv_norm.weight")), t, 1))
        kv = torch.stack(past[-c.sliding_window :])
        sink = w(f"{at}.attn.attn_sink")
        heads = []
        for h in range(c.num_attention_heads):
            scores = torch.exp(kv @ q[h] / math.sqrt(c.head_dim))
            heads.append((scores @ kv) / (scores.sum() + torch.exp(sink[h])))
        groups = rope(torch.stack(heads), t, -1).view(c.o_groups, -1)
        wo_a = w(f"{at}.attn.wo_a.weight").view(c.o_groups, c.o_lora_rank, -1)
        low = torch.cat([wo_a[g] @ groups[g] for g in range(c.o_groups)])
        y = w(f"{at}.attn.wo_b.weight") @ low
        X = connect(X, y, post, mix)

        x, post, mix = hyper(X, f"{at}.hc_ffn")
        x = norm(x, w(f"{at}.ffn_norm.weight"))
        affinity = torch.sqrt(functional.softplus(w(f"{at}.ffn.gate.weight") @ x))
        best = torch.topk(affinity + w(f"{at}.ffn.gate.bias"), c.num_experts_per_tok).indices
        total = affinity[best].sum()
        y = expert(x, f"{at}.ffn.shared_experts")
        for e in best.tolist():
            weight = affinity[e] / total * c.routed_scaling_factor
            y = y + weight * expert(x, f"{at}.ffn.experts.{e}")
        X = connect(X, y, post, mix)

        m = w(f"{at}.hc_head_fn") @ norm(X.flatten())
        pre = torch.sigmoid(m * w(f"{at}.hc_head_scale") + w(f"{at}.hc_head_base")) + c.hc_eps
        logits.append(w("head.weight") @ norm(pre @ X, w(f"{at}.norm.weight")))
    return torch.stack(logits).numpy()


@pytest.mark.parametrize(("shape", "seed"), [(0, 36), (1, 30), (2, 5)])
def test_mtp_equals_the_formulas_in_torch(shape: int, seed: int) -> None:
    source = random_source(shape, seed)
    model = Model(source)
    tokens = random_tokens(source.config, 31, seed)
    state = model.new_state()
    model.forward(tokens[:-1], state)
    assert state.streams is not None
    ours = model.mtp(state.streams, tokens[1:])
    theirs = mtp_in_torch(source, state.streams, tokens[1:])
    error = np.sqrt(np.mean((ours - theirs) ** 2, axis=1) / np.mean(theirs**2, axis=1))
    assert error.max() <= 1e-5
