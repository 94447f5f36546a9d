"""Random float32 models at tiny shapes that are not the defaults, under the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4convert.model.config import ModelConfig, parse_config
from dsv4convert.reference import DictSource

Tensors = dict[str, npt.NDArray[Any]]

# Three sets of shapes; between them every ratio, both routers, several groups, an odd number of
# streams, a window smaller and larger than a compression block, and an index_topk below the number of
# entries that 300 tokens make.
SHAPES: list[dict[str, Any]] = [
    {
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 6,
        "head_dim": 24,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 20,
        "o_groups": 3,
        "o_lora_rank": 10,
        "moe_intermediate_size": 40,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
        "sliding_window": 20,
        "index_n_heads": 17,
        "index_head_dim": 16,
        "index_topk": 7,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "vocab_size": 211,
        "routed_scaling_factor": 1.5,
    },
    {
        "compress_ratios": [128, 128, 4, 0, 4, 0],
        "num_hash_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 8,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 28,
        "o_groups": 2,
        "o_lora_rank": 12,
        "moe_intermediate_size": 24,
        "n_routed_experts": 13,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "index_n_heads": 20,
        "index_head_dim": 32,
        "index_topk": 13,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 3,
        "vocab_size": 97,
        "routed_scaling_factor": 2.5,
    },
    {
        "compress_ratios": [4, 0, 128, 4, 0],
        "num_hash_layers": 0,
        "hidden_size": 60,
        "num_attention_heads": 4,
        "head_dim": 20,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 33,
        "o_groups": 4,
        "o_lora_rank": 7,
        "moe_intermediate_size": 36,
        "n_routed_experts": 7,
        "num_experts_per_tok": 4,
        "sliding_window": 5,
        "index_n_heads": 15,
        "index_head_dim": 8,
        "index_topk": 20,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 11,
        "vocab_size": 150,
        "routed_scaling_factor": 1.0,
    },
]

STEADY = 5.0  # the value of the residual's constant channel

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "swiglu_limit": 1.5,  # low enough that all three clamps act
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def random_config(shape: int) -> dict[str, Any]:
    """Return a config.json in the published form."""
    shapes = SHAPES[shape]
    return {**COMMON, **shapes, "num_hidden_layers": len(shapes["compress_ratios"]) - 1}


def random_tensors(config: ModelConfig, seed: int, *, steady_indexer: bool = True) -> Tensors:
    """Return every tensor of a model with an MTP layer, scaled so that all of its parts matter.

    With ``steady_indexer`` the residual's channel 0 is a positive constant (no sublayer writes to it) and
    the indexer's head weights lean on it, so they are positive. Otherwise they have random signs, and
    many entries score exactly 0 (no head's relu passes), which makes the choice among them a tie.
    """
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}

    def normal(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        tensors[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, out: int, width: int, gain: float = 1.0) -> None:
        normal(f"{name}.weight", out, width, std=gain / width**0.5)

    def norm(name: str, width: int) -> None:
        normal(f"{name}.weight", width, mean=1.0, std=0.2)

    c = config
    D, hc, d, di = c.hidden_size, c.hc_mult, c.head_dim, c.index_head_dim
    mixes = (2 + hc) * hc

    def compressor(at: str, ratio: int, width: int) -> None:
        channels = (2 if ratio == 4 else 1) * width
        normal(f"{at}.ape", ratio, channels)
        linear(f"{at}.wkv", channels, D)
        linear(f"{at}.wgate", channels, D, gain=2.0)
        norm(f"{at}.norm", width)

    def layer(at: str, ratio: int, hashed: bool) -> None:
        for sublayer in ("attn", "ffn"):
            normal(f"{at}.hc_{sublayer}_fn", mixes, hc * D, std=1 / (hc * D) ** 0.5)
            normal(f"{at}.hc_{sublayer}_base", mixes, std=0.5)
            normal(f"{at}.hc_{sublayer}_scale", 3, mean=1.0, std=0.3)
            norm(f"{at}.{sublayer}_norm", D)
        normal(f"{at}.attn.attn_sink", c.num_attention_heads)
        linear(f"{at}.attn.wq_a", c.q_lora_rank, D)
        norm(f"{at}.attn.q_norm", c.q_lora_rank)
        linear(f"{at}.attn.wq_b", c.num_attention_heads * d, c.q_lora_rank)
        linear(f"{at}.attn.wkv", d, D)
        norm(f"{at}.attn.kv_norm", d)
        heads_per_group = c.num_attention_heads // c.o_groups
        linear(f"{at}.attn.wo_a", c.o_groups * c.o_lora_rank, heads_per_group * d, gain=3.0)
        linear(f"{at}.attn.wo_b", D, c.o_groups * c.o_lora_rank)
        if ratio:
            compressor(f"{at}.attn.compressor", ratio, d)
        if ratio == 4:
            linear(f"{at}.attn.indexer.wq_b", c.index_n_heads * di, c.q_lora_rank)
            linear(f"{at}.attn.indexer.weights_proj", c.index_n_heads, D)
            compressor(f"{at}.attn.indexer.compressor", ratio, di)
        linear(f"{at}.ffn.gate", c.n_routed_experts, D, gain=2.0)
        if hashed:
            shuffled = [rng.permutation(c.n_routed_experts) for _ in range(c.vocab_size)]
            tensors[f"{at}.ffn.gate.tid2eid"] = np.array([row[: c.num_experts_per_tok] for row in shuffled])
        else:
            normal(f"{at}.ffn.gate.bias", c.n_routed_experts, std=0.3)
        for expert in [*(f"experts.{e}" for e in range(c.n_routed_experts)), "shared_experts"]:
            linear(f"{at}.ffn.{expert}.w1", c.moe_intermediate_size, D)
            linear(f"{at}.ffn.{expert}.w3", c.moe_intermediate_size, D)
            linear(f"{at}.ffn.{expert}.w2", D, c.moe_intermediate_size, gain=2.0)

    def head(at: str) -> None:
        normal(f"{at}hc_head_fn", hc, hc * D, std=1 / (hc * D) ** 0.5)
        normal(f"{at}hc_head_base", hc, std=0.5)
        normal(f"{at}hc_head_scale", 1, mean=1.0, std=0.3)
        norm(f"{at}norm", D)

    normal("embed.weight", c.vocab_size, D)
    if steady_indexer:
        tensors["embed.weight"][:, 0] = STEADY
    for n in range(c.num_hidden_layers):
        layer(f"layers.{n}", c.compress_ratios[n], c.is_hash_routed(n))
    head("")
    linear("head", c.vocab_size, D)

    layer("mtp.0", 0, False)
    for name in ("e_proj", "h_proj"):
        linear(f"mtp.0.{name}", D, D)
    for name in ("enorm", "hnorm"):
        norm(f"mtp.0.{name}", D)
    head("mtp.0.")
    if steady_indexer:
        for name, tensor in tensors.items():
            if name.endswith(("wo_b.weight", "w2.weight")):
                tensor[0] = 0
            elif name.endswith("weights_proj.weight"):
                tensor[:, 0] = np.abs(tensor[:, 0]) + 1
            elif name.endswith("gate.weight"):
                tensor[:, 0] = 0  # else the constant would favour the same experts for every token
    return tensors


def random_source(shape: int, seed: int) -> DictSource:
    """Return a random model of ``SHAPES[shape]``."""
    config = parse_config(random_config(shape), "test")
    return DictSource(config, random_tensors(config, seed))


def random_tokens(config: ModelConfig, length: int, seed: int) -> npt.NDArray[np.int64]:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, length)


def save_for_transformers(source: DictSource, tensors: Tensors, folder: Path) -> None:
    """Write config.json and model.safetensors as a published checkpoint has them, but in float32."""
    from safetensors.numpy import save_file

    raw = dict(source.config.raw)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
