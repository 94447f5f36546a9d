"""The GGUF keys that follow from config.json: what is written, read back and shown goes by these rows.

The verifier works the same keys out by a table of its own, which checks this one.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias

from ..errors import ConfigError, either
from .config import ModelConfig
from .config_v41 import EngramConfig
from .engram import EngramConstants

# The architectures that files name, by who reads them.
LLAMA_CPP, LLAMA_CPP_V41, PORT = "deepseek4", "deepseek41", "deepseek-v4"
DRAFT, TOWER = "dflash", "clip"  # of drafts and of vision towers, in files of their own

# Value types as the GGUF reader names them; lists in brackets.
KeyType: TypeAlias = Literal["bool", "u32", "f32", "str", "[i32]", "[f32]", "[u64]"]

# deepseek4.expert_gating_func: sqrt(softplus(x)).
GATING_FUNCTIONS = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}

# Every query head shares one key-value head.
KV_HEADS = 1


class GgufKey(NamedTuple):
    """A key below the architecture's name, as llama.cpp calls it, with its type and its value.

    ``value`` is the name that ``ModelConfig`` and config.json have for the same value, which can be read back, with
    ``yarn.`` before the keys of rope_scaling; or what makes it of the config and the number of blocks.
    """

    name: str
    type: KeyType
    value: str | Callable[[ModelConfig, int], Any]

    @property
    def in_config(self) -> str | None:
        """Return the name of the very value in the config, None where it is worked out."""
        return self.value if isinstance(self.value, str) else None

    def of(self, config: ModelConfig, blocks: int) -> Any:
        """Return the value in a file of ``blocks`` blocks, None for a key that the model does not have.

        Raises:
            ConfigError: the config has a value that no GGUF can express.
        """
        if callable(self.value):
            return self.value(config, blocks)
        if config.yarn is None and self.value.startswith(YARN):
            return None
        value = attrgetter(self.value)(config)
        return list(value) if self.type.startswith("[") else value


YARN = "yarn."


def _gating_function(config: ModelConfig, blocks: int) -> int:
    number = GATING_FUNCTIONS.get(config.scoring_func)
    if number is None:
        raise ConfigError("key scoring_func: unknown", expected=either(GATING_FUNCTIONS), got=config.scoring_func)
    return number


# In the order in which llama.cpp's converter writes them.
KEYS: tuple[GgufKey, ...] = (
    GgufKey("block_count", "u32", lambda c, blocks: blocks),
    GgufKey("context_length", "u32", "max_position_embeddings"),
    GgufKey("embedding_length", "u32", "hidden_size"),
    GgufKey("embedding_length_out", "u32", lambda c, blocks: c.hidden_size * c.hc_mult),
    GgufKey("vocab_size", "u32", "vocab_size"),
    GgufKey("attention.head_count", "u32", "num_attention_heads"),
    GgufKey("attention.head_count_kv", "u32", lambda c, blocks: KV_HEADS),
    GgufKey("rope.scaling.type", "str", lambda c, blocks: None if c.yarn is None else "yarn"),
    GgufKey("rope.scaling.factor", "f32", "yarn.factor"),
    GgufKey("rope.scaling.original_context_length", "u32", "yarn.original_max_position_embeddings"),
    GgufKey("rope.scaling.yarn_beta_fast", "f32", "yarn.beta_fast"),
    GgufKey("rope.scaling.yarn_beta_slow", "f32", "yarn.beta_slow"),
    GgufKey("rope.freq_base", "f32", "rope_theta"),
    GgufKey("rope.dimension_count", "u32", "qk_rope_head_dim"),
    GgufKey("attention.layer_norm_rms_epsilon", "f32", "rms_norm_eps"),
    GgufKey("expert_count", "u32", "n_routed_experts"),
    GgufKey("expert_used_count", "u32", "num_experts_per_tok"),
    GgufKey("expert_shared_count", "u32", "n_shared_experts"),
    GgufKey("expert_feed_forward_length", "u32", "moe_intermediate_size"),
    GgufKey("expert_gating_func", "u32", _gating_function),
    GgufKey("expert_weights_scale", "f32", "routed_scaling_factor"),
    GgufKey("expert_weights_norm", "bool", "norm_topk_prob"),
    GgufKey("swiglu_clamp_exp", "[f32]", lambda c, blocks: [c.swiglu_limit] * blocks),
    GgufKey("swiglu_clamp_shexp", "[f32]", lambda c, blocks: [c.swiglu_limit] * blocks),
    GgufKey("attention.key_length", "u32", "head_dim"),
    GgufKey("attention.value_length", "u32", lambda c, blocks: c.head_dim),
    GgufKey("attention.q_lora_rank", "u32", "q_lora_rank"),
    GgufKey("attention.output_lora_rank", "u32", "o_lora_rank"),
    GgufKey("attention.output_group_count", "u32", "o_groups"),
    GgufKey("attention.sliding_window", "u32", "sliding_window"),
    GgufKey("attention.compress_ratios", "[i32]", "compress_ratios"),
    GgufKey("attention.compress_rope_freq_base", "f32", "compress_rope_theta"),
    GgufKey("attention.indexer.head_count", "u32", "index_n_heads"),
    GgufKey("attention.indexer.key_length", "u32", "index_head_dim"),
    GgufKey("attention.indexer.top_k", "u32", "index_topk"),
    GgufKey("hyper_connection.count", "u32", "hc_mult"),
    GgufKey("hyper_connection.sinkhorn_iterations", "u32", "hc_sinkhorn_iters"),
    GgufKey("hyper_connection.epsilon", "f32", "hc_eps"),
    GgufKey("hash_layer_count", "u32", "num_hash_layers"),
)
# Only a file with MTP layers has it.
NEXTN_KEY = GgufKey("nextn_predict_layers", "u32", "num_nextn_predict_layers")

# What V4.1 and drafts have too: the other two follow from the embedding's shape.
COMMON_KEYS = tuple(key for key in KEYS if key.name not in ("embedding_length_out", "vocab_size"))


def _of_candidates(field: str) -> Callable[[ModelConfig, int], Any]:
    """Return what makes a value of the config's candidates, None where it has none."""
    return lambda c, blocks: None if c.candidates is None else getattr(c.candidates, field)


# V4.1's roles of layers, which llama.cpp's pending converter leaves to be told by tensors: the keys of forks where
# they have some.
ROLE_KEYS: tuple[GgufKey, ...] = (
    GgufKey("attention.kv_source_layers", "[i32]", "kv_source_layer_ids"),
    GgufKey("attention.index_source_layers", "[i32]", "index_source_layer_ids"),
    GgufKey("attention.indexer.candidate_source_layer", "u32", _of_candidates("source_layer_id")),
    GgufKey("attention.indexer.candidate_topk_blocks", "u32", _of_candidates("topk_blocks")),
    GgufKey("attention.indexer.candidate_block_size", "u32", _of_candidates("block_size")),
)

# What finds the rows of V4.1's n-gram tables, as llama.cpp's pending converter has it, and how their bytes are called
# where they are no type of ggml's.
ENGRAM_KEYS: tuple[tuple[str, KeyType, Callable[[EngramConfig, EngramConstants], Any]], ...] = (
    ("engram.head_count", "u32", lambda engram, constants: engram.n_heads),
    ("engram.key_length", "u32", lambda engram, constants: engram.head_dim),
    ("engram.max_ngram_size", "u32", lambda engram, constants: engram.max_ngram_size),
    ("engram.layer_ids", "[i32]", lambda engram, constants: list(constants.layer_ids)),
    ("engram.multipliers", "[u64]", lambda engram, constants: [n for row in constants.multipliers for n in row]),
    ("engram.primes", "[u64]", lambda engram, constants: [n for row in constants.primes for n in row]),
    ("engram.offsets", "[u64]", lambda engram, constants: [n for row in constants.offsets for n in row]),
    ("engram.token_map", "[i32]", lambda engram, constants: constants.token_map.tolist()),
    ("engram.pad_id", "u32", lambda engram, constants: constants.pad_id),
)
ENGRAM_ENCODING = "engram.encoding"

# What the early port calls the keys that it spells its own way.
PORT_NAMES = {
    "attention.output_lora_rank": "o_lora_rank",
    "attention.output_group_count": "o_groups",
    "attention.compress_ratios": "compress_ratios",
    "attention.compress_rope_freq_base": "compress_rope_freq_base",
    "hyper_connection.count": "hyperconnections.count",
    "hyper_connection.sinkhorn_iterations": "hyperconnections.sinkhorn_iterations",
    "hyper_connection.epsilon": "hyperconnections.epsilon",
    "hash_layer_count": "n_hash_layers",
}


def key_name(architecture: str, name: str) -> str:
    """Return the whole key of ``name`` in a file of ``architecture``.

    >>> key_name("deepseek4", "hash_layer_count"), key_name("deepseek-v4", "hash_layer_count")
    ('deepseek4.hash_layer_count', 'deepseek-v4.n_hash_layers')
    """
    return f"{architecture}.{PORT_NAMES.get(name, name) if architecture == PORT else name}"
