"""The memory of a device: its weights, the caches of its sequences, and what a step of prefill needs besides them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..model.cache_bytes import (
    BF16_BYTES,
    DEFAULT_UBATCH,
    F32_BYTES,
    LLAMA_CPP_TYPES,
    OVERLAPPING_RATIO,
    CachePart,
    cache_bytes,
    cache_parts,
)
from ..model.config import ModelConfig, Version

# Tokens that a serving engine computes at once in prefill, where llama.cpp has its ubatch.
DEFAULT_CHUNK = 4096

# Engines score queries of the indexer in blocks, so that the scores stay within so many bytes.
MAX_SCORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Caches:
    """The caches of ``batch`` sequences of ``context`` tokens on every device, held as ``kv`` says."""

    context: int
    batch: int
    kv: str
    parts: tuple[CachePart, ...]

    @property
    def sequence_bytes(self) -> int:
        """Return the bytes of one sequence."""
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all sequences."""
        return self.sequence_bytes * self.batch

    def kinds(self) -> dict[str, int]:
        """Return the bytes of one sequence by kind of cache, in the order of the layers."""
        found: Counter[str] = Counter()
        for part in self.parts:
            found[part.kind] += part.nbytes
        return dict(found)

    def as_json(self) -> dict[str, Any]:
        """Return the caches as plain JSON values."""
        return {
            "context": self.context,
            "batch": self.batch,
            "kv": self.kv,
            "bytes": self.nbytes,
            "sequence_bytes": self.sequence_bytes,
            "kinds": self.kinds(),
            "parts": [part._asdict() | {"bytes": part.nbytes} for part in self.parts],
        }


def caches(config: ModelConfig, context: int, batch: int, kv: str, *, n_draft: int, ubatch: int) -> Caches:
    """Return the caches of ``batch`` sequences.

    Raises:
        UsageError: as for ``cache_bytes``.
    """
    parts = tuple(cache_parts(config, context, kv, n_draft=n_draft, ubatch=ubatch))
    return Caches(context, batch, kv, parts)


class Activation(NamedTuple):
    """An array of a step of prefill: the sublayer that needs it, and its bytes on one device."""

    sublayer: str
    name: str
    nbytes: int


STREAMS, ATTENTION, EXPERTS, HEAD = "streams", "attention", "experts", "head"


def default_ubatch(kv: str) -> int:
    """Return the tokens computed at once in prefill where nobody says."""
    return DEFAULT_UBATCH if kv in LLAMA_CPP_TYPES else DEFAULT_CHUNK


def activations(config: ModelConfig, tokens: int, context: int, batch: int, mp: int) -> tuple[Activation, ...]:
    """Return the arrays that a step of ``tokens`` tokens needs at the end of ``context``, on one of ``mp`` ranks.

    BF16, but for what the published code keeps in float32: scores of the indexer, the compressor's projections and
    logits. Attention's own scores are never stored. Routed tokens are taken to spread evenly over the ranks.
    """
    c, t = config, tokens
    heads, index_heads, groups = -(-c.num_attention_heads // mp), -(-c.index_n_heads // mp), -(-c.o_groups // mp)
    routed = -(-t * c.num_experts_per_tok // mp)
    width, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.n_shared_experts
    ratios = {ratio for ratio in c.compress_ratios[: c.num_hidden_layers] if ratio}
    indexed = [ratio for ratio in ratios if ratio == OVERLAPPING_RATIO or c.version is Version.V41]
    entries = max((context // ratio for ratio in indexed), default=0)
    channels = max(((2 if ratio == OVERLAPPING_RATIO else 1) * c.head_dim for ratio in ratios), default=0)
    return (
        Activation(STREAMS, "streams before and after", 2 * t * c.hc_mult * c.hidden_size * BF16_BYTES),
        Activation(STREAMS, "input and output of the sublayer", 2 * t * c.hidden_size * BF16_BYTES),
        Activation(ATTENTION, "low-rank queries", t * c.q_lora_rank * BF16_BYTES),
        Activation(ATTENTION, "queries and results of the heads", 2 * t * heads * c.head_dim * BF16_BYTES),
        Activation(ATTENTION, "keys", t * c.head_dim * BF16_BYTES),
        Activation(ATTENTION, "grouped output", t * groups * c.o_lora_rank * BF16_BYTES),
        Activation(ATTENTION, "compressor's keys and scores", 2 * t * channels * F32_BYTES),
        Activation(ATTENTION, "indexer's queries", t * index_heads * c.index_head_dim * BF16_BYTES if indexed else 0),
        Activation(ATTENTION, "indexer's scores", min(t * entries * F32_BYTES, MAX_SCORE_BYTES)),
        Activation(EXPERTS, "routed inputs and outputs", 2 * routed * c.hidden_size * BF16_BYTES),
        Activation(EXPERTS, "gate, up and product of routed experts", 3 * routed * width * BF16_BYTES),
        Activation(EXPERTS, "gate, up and product of the shared expert", 3 * t * shared * BF16_BYTES),
        Activation(HEAD, "logits", batch * -(-c.vocab_size // mp) * F32_BYTES),
    )


def peak_bytes(found: tuple[Activation, ...]) -> int:
    """Return the bytes that are needed at once: the streams, and the sublayer that needs most."""
    by_sublayer: Counter[str] = Counter()
    for array in found:
        by_sublayer[array.sublayer] += array.nbytes
    streams = by_sublayer.pop(STREAMS)
    return streams + max(by_sublayer.values())


@dataclass(frozen=True)
class Need:
    """What one device has to hold, and what of it there is; ``memory`` and the rest None where nobody said."""

    weights: int
    caches: int
    activations: int
    memory: int | None = None
    longest_context: int | None = None

    @property
    def total(self) -> int:
        """Return the bytes that are needed."""
        return self.weights + self.caches + self.activations

    @property
    def free(self) -> int | None:
        """Return the bytes that are left; negative where they are missing."""
        return None if self.memory is None else self.memory - self.total

    @property
    def fits(self) -> bool | None:
        """Return whether the memory is enough."""
        return None if self.free is None else self.free >= 0

    def as_json(self) -> dict[str, Any]:
        """Return the need as plain JSON values."""
        keys = ("weights", "caches", "activations", "total", "memory", "free", "fits", "longest_context")
        return {key: getattr(self, key) for key in keys}


class Load(NamedTuple):
    """What a device is asked to run: sequences, how their caches are held, ranks that share the model."""

    batch: int
    kv: str
    mp: int
    n_draft: int
    ubatch: int


def need(config: ModelConfig, weights: int, context: int, load: Load, memory: int | None = None) -> Need:
    """Return what a device that holds ``weights`` bytes of the model needs for ``context`` tokens a sequence.

    With ``memory``, also the longest context that fits: 0 where not even one token does.
    """
    held, peak = _beside_weights(config, context, load)
    longest = None if memory is None else _longest(config, weights, load, memory)
    return Need(weights, held, peak, memory, longest)


def _beside_weights(config: ModelConfig, context: int, load: Load) -> tuple[int, int]:
    held = load.batch * cache_bytes(config, context, load.kv, n_draft=load.n_draft, ubatch=load.ubatch)
    tokens = min(load.ubatch, load.batch * context)
    return held, peak_bytes(activations(config, tokens, context, load.batch, load.mp))


def _longest(config: ModelConfig, weights: int, load: Load, memory: int) -> int:
    """Return the largest context, up to the model's own, that fits: caches only grow with it."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if weights + sum(_beside_weights(config, middle, load)) <= memory:
            low = middle
        else:
            high = middle - 1
    return low
