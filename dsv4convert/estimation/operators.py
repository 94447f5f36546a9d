"""Every operator of the forward pass with what it costs: products, bytes of weights, bytes read and written.

FLOPs are those of products of matrices, two for a multiplication with its addition. A query is multiplied with the keys
that it sees, and no others: what a kernel computes and masks is not counted. ``elementwise`` is what operators do that
multiply no matrices, an arithmetic operation on an element each. Bytes are the least that can be moved: weights once in
a step, activations in and out, a cache's row once for all queries of a step. Activations are BF16, but for what the
published code keeps in float32.

Steps are arrays of numpy: a prefill of a million tokens is two thousand steps, and every formula is worked out for all
of them at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..model.cache_bytes import BF16_BYTES, ENTRIES, F32_BYTES, INDEX_KEYS, OVERLAPPING_RATIO, WINDOW, row_bytes
from ..model.config import ModelConfig, Version
from ..model.tensors import Draft
from .subject import Part

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
# What one step costs, or what each of several does.
Amount: TypeAlias = float | Counts | npt.NDArray[np.floating[Any]]

# Bytes of the number of an entry or an expert.
INDEX_BYTES = 4
# Arithmetic on an element: of softmax and weighted sum (subtract, exp, sum, divide, multiply, add); of the clamped
# SwiGLU (two clamps, sigmoid in four, two multiplications); of the gate of n-grams (two products and a sum of the dot,
# a square and a sum for each norm, a product into the stream).
POOLING_OPERATIONS = 6
SWIGLU_OPERATIONS = 8
GATE_OPERATIONS = 8

# The costs of an operator that are added up over layers.
SUMMED = ("flops", "elementwise", "weight_bytes", "read_bytes", "written_bytes")

# Who has a part of an operator's work: every rank its share of heads, vocabulary or experts; the ranks that share the
# output projections; or each rank all of it.
BY_RANK, BY_OUTPUT_RANK, BY_EXPERT, WHOLE = "rank", "output rank", "expert", "whole"

HYPER, ATTENTION, EXPERTS, ENGRAM, HEAD, DRAFT, EMBEDDING = (
    "hyper-connections",
    "attention",
    "experts",
    "engram",
    "head",
    "draft",
    "embedding",
)


class Operator(NamedTuple):
    """What an operator costs in all steps together; ``layer`` None outside the layers.

    ``divided`` says who has a part of the work where ranks share the model, ``arithmetic`` is the family of weights
    whose type decides the speed of its products. ``weights`` are those that are read, by stored type, as often as they
    are.
    """

    layer: int | None
    sublayer: str
    name: str
    flops: float
    elementwise: float
    weight_bytes: float
    read_bytes: float
    written_bytes: float
    weights: Mapping[str, float]
    divided: str
    arithmetic: str

    @property
    def bytes(self) -> float:
        """Return all bytes moved."""
        return self.weight_bytes + self.read_bytes + self.written_bytes

    @property
    def intensity(self) -> float:
        """Return the FLOPs for each byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the operator as plain JSON values."""
        values = self._asdict()
        return values | {"intensity": self.intensity}


@dataclass(frozen=True)
class Steps:
    """Runs of the model: ``tokens`` new tokens of each of ``sequences``, after ``before`` tokens, ``repeats`` times.

    ``heads`` is how many positions of each sequence get logits.
    """

    before: Counts
    tokens: Counts
    sequences: Counts
    repeats: Counts
    heads: Counts

    @property
    def after(self) -> Counts:
        """Return the tokens of a sequence when the step is done."""
        return self.before + self.tokens

    @property
    def computed(self) -> Counts:
        """Return the tokens that a step computes."""
        return self.tokens * self.sequences

    @property
    def count(self) -> int:
        """Return the number of runs."""
        return int(self.repeats.sum())


def _steps(rows: Sequence[tuple[int, int, int, int, int]]) -> Steps:
    return Steps(*np.array(rows, np.int64).T)


def prefill_steps(context: int, batch: int, chunk: int) -> Steps:
    """Return the steps that compute ``context`` tokens of ``batch`` sequences, ``chunk`` tokens at a time at most."""
    if context >= chunk:
        starts = range(0, context, chunk)
        return _steps([(t, min(chunk, context - t), 1, batch, int(t + chunk >= context)) for t in starts])
    together = min(batch, chunk // context)
    rows = [(0, context, together, batch // together, 1)]
    if batch % together:
        rows.append((0, context, batch % together, 1, 1))
    return _steps(rows)


@dataclass(frozen=True)
class Phase:
    """The operators of a phase: what is computed in how many runs of the model.

    ``experts_touched`` is the expected number of experts a layer that a run's tokens are routed to, on average.
    """

    name: str
    tokens: int
    runs: int
    operators: tuple[Operator, ...]
    experts_touched: float

    @property
    def flops(self) -> float:
        """Return the FLOPs of all products."""
        return sum(operator.flops for operator in self.operators)

    def summary(self) -> list[Operator]:
        """Return the operators of all layers added up by name, in the order of computation; their layer is None."""
        found: dict[tuple[str, str], Operator] = {}
        for operator in self.operators:
            before = found.get((operator.sublayer, operator.name))
            if before is not None:
                sums = {key: getattr(before, key) + getattr(operator, key) for key in SUMMED}
                operator = operator._replace(weights=Counter(before.weights) + Counter(operator.weights), **sums)
            found[operator.sublayer, operator.name] = operator._replace(layer=None)
        return list(found.values())

    def as_json(self) -> dict[str, Any]:
        """Return the phase as plain JSON values."""
        return {
            "tokens": self.tokens,
            "runs": self.runs,
            "flops": self.flops,
            "bytes": sum(operator.bytes for operator in self.operators),
            "experts_touched": self.experts_touched,
            "operators": [operator.as_json() for operator in self.operators],
        }


def decode_steps(context: int, batch: int) -> Steps:
    """Return the step that computes the last of ``context`` tokens of each of ``batch`` sequences."""
    return _steps([(context - 1, 1, batch, 1, 1)])


# ---- routing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """How often each expert is chosen, by trunk layer: uniform where nothing was measured."""

    counts: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def touched(self, layer: int | None, experts: int, chosen: int, tokens: Numbers) -> Numbers:
        """Return the expected number of experts that some of ``tokens`` tokens are routed to.

        An expert of share p of the choices is missed by a token with probability 1 − chosen·p.
        """
        counts = None if layer is None else self.counts.get(layer)
        if counts is None:
            return experts * (1 - (1 - chosen / experts) ** tokens)
        share = np.minimum(1.0, chosen * np.asarray(counts, np.float64) / sum(counts))
        found: Numbers = np.sum(1 - (1 - share[:, None]) ** np.atleast_1d(tokens)[None, :], axis=0)
        return found


UNIFORM = Routing()


# ---- how many keys the queries see --------------------------------------------------------------------


class Sees(NamedTuple):
    """Which compressed entries a query may choose: one of ``ratio`` tokens each, at most ``top`` (None: all).

    ``blocks`` of ``size`` entries are all that it may choose from, where a candidate source has chosen them.
    """

    ratio: int
    top: int | None = None
    blocks: int | None = None
    size: int = 1


@cache
def _cumulative(sees: Sees, tokens: int) -> Counts:
    """Return, for every n up to ``tokens``, the entries that the first n queries choose, all together."""
    found: Counts = np.concatenate([[0], np.cumsum(_chosen(sees, np.arange(1, tokens + 1)))])
    return found


def _chosen(sees: Sees, seen_tokens: Counts) -> Counts:
    """Return the entries that a query chooses which sees so many tokens, itself included."""
    visible = seen_tokens // sees.ratio
    if sees.blocks is not None:
        # The block of the newest visible entry is always in, however few of its entries there are.
        newest = (visible - 1) % sees.size + 1
        limited = (sees.blocks - 1) * sees.size + newest
        visible = np.where(-(-visible // sees.size) > sees.blocks, limited, visible)
    chosen: Counts = visible if sees.top is None else np.minimum(visible, sees.top)
    return chosen


def _pairs(sees: Sees, steps: Steps) -> Counts:
    """Return the pairs of a query and an entry that each step's sequences have together."""
    if len(steps.tokens) == 1 and steps.tokens[0] == 1:  # one token: no sum
        return steps.sequences * _chosen(sees, steps.after)
    sums = _cumulative(sees, int(steps.after.max()))
    return steps.sequences * (sums[steps.after] - sums[steps.before])


def _window_pairs(width: int, steps: Steps) -> Counts:
    def first(n: Counts) -> Counts:
        whole = np.minimum(n, width)
        pairs: Counts = whole * (whole + 1) // 2 + (n - whole) * width
        return pairs

    return steps.sequences * (first(steps.after) - first(steps.before))


# ---- the model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Weights that an operator reads: their bytes, and how many there are of each stored type.

    Times an array, they are the weights of every step.
    """

    nbytes: Amount = 0
    elements: Mapping[str, Amount] = field(default_factory=dict)

    # An array leaves the multiplication to ``__rmul__``.
    __array_ufunc__ = None

    def __rmul__(self, times: Amount) -> Held:
        """Return the weights of steps that read them so many times."""
        return Held(times * self.nbytes, {kind: times * count for kind, count in self.elements.items()})

    def __truediv__(self, share: int) -> Held:
        """Return one of so many equal shares."""
        return Held(self.nbytes / share, {kind: count / share for kind, count in self.elements.items()})


NO_WEIGHTS = Held()


class Weights:
    """A model's weights by layer and name."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts: dict[tuple[int | None, bool, str], list[Part]] = {}
        for part in parts:
            self._parts.setdefault((part.layer, part.is_draft, part.name), []).append(part)

    def __call__(self, layer: int | None, *names: str, is_draft: bool = False) -> Held:
        """Return the named weights of a layer."""
        found = [part for name in names for part in self._parts.get((layer, is_draft, name), ())]
        elements: Counter[str] = Counter()
        for part in found:
            elements[part.type] += part.elements
        return Held(sum(part.nbytes for part in found), elements)


EXPERT_NAMES = ("ffn.experts.w1.weight", "ffn.experts.w2.weight", "ffn.experts.w3.weight")
SHARED_NAMES = ("ffn.shared_experts.w1.weight", "ffn.shared_experts.w2.weight", "ffn.shared_experts.w3.weight")


class _Sublayer(NamedTuple):
    """A part of a layer that operators are of: ``layer`` counts in the trunk or the draft, None is outside of layers.

    ``costs`` has the steps that are computed and the weights.
    """

    costs: Costs
    layer: int | None
    name: str
    is_draft: bool

    def weights(self, *names: str) -> Held:
        """Return named weights of the layer."""
        return self.costs.weights(self.layer, *names, is_draft=self.is_draft)

    def operator(
        self,
        name: str,
        *,
        flops: Amount = 0,
        elementwise: Amount = 0,
        weights: Held = NO_WEIGHTS,
        read: Amount = 0,
        written: Amount = 0,
        divided: str = WHOLE,
        arithmetic: str = "dense",
    ) -> Operator:
        """Return an operator from what it costs in each step."""
        repeats = self.costs.steps.repeats
        costs = dict(zip(SUMMED, (flops, elementwise, weights.nbytes, read, written), strict=True))
        totals = {key: float(np.sum(cost * repeats)) for key, cost in costs.items()}
        held = {kind: float(np.sum(count * repeats)) for kind, count in weights.elements.items()}
        return Operator(self.layer, self.name, name, **totals, weights=held, divided=divided, arithmetic=arithmetic)

    def product(
        self,
        name: str,
        tokens: Amount,
        inputs: int,
        outputs: int,
        weights: Held,
        *,
        out_bytes: int = BF16_BYTES,
        divided: str = WHOLE,
        arithmetic: str = "dense",
    ) -> Operator:
        """Return a product of ``tokens`` rows of ``inputs`` elements with a matrix of ``outputs`` rows."""
        return self.operator(
            name,
            flops=2 * tokens * inputs * outputs,
            weights=weights,
            read=tokens * inputs * BF16_BYTES,
            written=tokens * outputs * out_bytes,
            divided=divided,
            arithmetic=arithmetic,
        )


class Costs:
    """The operators of a model in some steps.

    ``kv`` says how caches are held, ``routing`` how tokens choose experts.
    """

    def __init__(
        self, config: ModelConfig, parts: Sequence[Part], steps: Steps, kv: str, routing: Routing = UNIFORM
    ) -> None:
        self.config = config
        self.weights = Weights(parts)
        self.steps = steps
        self.routing = routing
        self._rows = {kind: row_bytes(config, kind, kv) for kind in (WINDOW, ENTRIES, INDEX_KEYS)}

    def trunk(self) -> Iterator[Operator]:
        """Yield the operators of embedding, layers and head, in the order of computation."""
        c, n = self.config, self.steps.computed
        width = c.hidden_size
        at = self._in(None, EMBEDDING)
        row = c.vocab_size and at.weights("embed.weight").nbytes / c.vocab_size
        yield at.operator("embedding", read=n * row, written=n * c.hc_mult * width * BF16_BYTES, divided=BY_RANK)
        for layer in range(c.num_hidden_layers):
            if c.engram is not None and layer in c.engram.layer_ids:
                yield from self._engram(layer)
            yield from self._hyper(layer, "attn")
            yield from self._attention(layer)
            yield from self._hyper(layer, "ffn")
            yield from self._experts(layer)
        yield from self._head(None)

    def phase(self, name: str) -> Phase:
        """Return the trunk's operators as a phase."""
        c, steps = self.config, self.steps
        layers = range(c.num_hidden_layers)
        computed = np.asarray(steps.computed, np.float64)
        touched = [self.routing.touched(layer, c.n_routed_experts, c.num_experts_per_tok, computed) for layer in layers]
        mean = float(np.sum(np.mean(touched, axis=0) * steps.repeats) / steps.count)
        return Phase(name, int(np.sum(computed * steps.repeats)), steps.count, tuple(self.trunk()), mean)

    # ---- pieces ---------------------------------------------------------------------------------------

    def _in(self, layer: int | None, sublayer: str, *, is_draft: bool = False) -> _Sublayer:
        return _Sublayer(self, layer, DRAFT if is_draft else sublayer, is_draft)

    def _hyper(
        self, layer: int, which: str, *, is_draft: bool = False, tokens: Counts | None = None
    ) -> Iterator[Operator]:
        """Yield the mixing weights, Sinkhorn's normalisation, the collapse and the connection around a sublayer."""
        c, n = self.config, self.steps.computed if tokens is None else tokens
        at = self._in(layer, HYPER, is_draft=is_draft)
        hc, width = c.hc_mult, c.hidden_size
        mixes = (2 + hc) * hc
        weights = at.weights(f"hc_{which}_fn", f"hc_{which}_base", f"hc_{which}_scale")
        yield at.product(f"{which} mixing", n, hc * width, mixes, weights, out_bytes=F32_BYTES, arithmetic="full")
        # Rows or columns are summed with epsilon, and every element is divided.
        normalisations = 2 * c.hc_sinkhorn_iters - 1
        yield at.operator(
            f"{which} Sinkhorn",
            elementwise=n * normalisations * 2 * hc * hc,
            read=n * hc * hc * F32_BYTES,
            written=n * hc * hc * F32_BYTES,
        )
        yield at.operator(
            f"{which} collapse and norm",
            flops=2 * n * hc * width,
            weights=at.weights(f"{which}_norm.weight"),
            read=n * hc * width * BF16_BYTES,
            written=n * width * BF16_BYTES,
            arithmetic="full",
        )
        yield at.operator(
            f"{which} connection",
            flops=2 * n * hc * hc * width,
            read=n * (hc + 1) * width * BF16_BYTES,
            written=n * hc * width * BF16_BYTES,
            arithmetic="full",
        )

    def _projections(self, layer: int, n: Counts, *, is_draft: bool = False) -> Iterator[Operator]:
        """Yield the projections to queries and to the key that all heads share."""
        c, at = self.config, self._in(layer, ATTENTION, is_draft=is_draft)
        heads = c.num_attention_heads * c.head_dim
        down = at.weights("attn.wq_a.weight", "attn.q_norm.weight")
        yield at.product("query down", n, c.hidden_size, c.q_lora_rank, down)
        yield at.product("query up", n, c.q_lora_rank, heads, at.weights("attn.wq_b.weight"), divided=BY_RANK)
        yield self._key(layer, n, is_draft=is_draft)

    def _key(self, layer: int, n: Counts, *, is_draft: bool) -> Operator:
        c, at = self.config, self._in(layer, ATTENTION, is_draft=is_draft)
        return at.operator(
            "key",
            flops=2 * n * c.hidden_size * c.head_dim,
            weights=at.weights("attn.wkv.weight", "attn.kv_norm.weight"),
            read=n * c.hidden_size * BF16_BYTES,
            written=n * self._rows[WINDOW],
        )

    def _output(self, layer: int, n: Counts, *, is_draft: bool = False) -> Iterator[Operator]:
        """Yield the two halves of the grouped output."""
        c, at = self.config, self._in(layer, ATTENTION, is_draft=is_draft)
        heads, ranks = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
        yield at.operator(
            "grouped output down",
            flops=2 * n * heads * c.o_lora_rank,
            weights=at.weights("attn.wo_a.weight"),
            read=n * heads * BF16_BYTES,
            written=n * ranks * BF16_BYTES,
            divided=BY_OUTPUT_RANK,
        )
        yield at.product(
            "grouped output up",
            n,
            ranks,
            c.hidden_size,
            at.weights("attn.wo_b.weight"),
            divided=BY_OUTPUT_RANK,
        )

    def _scaled_dot_products(
        self, layer: int, pairs: Counts, n: Counts, cache_bytes: Amount, *, is_draft: bool = False
    ) -> Operator:
        """Return attention with sink over ``pairs`` of queries and keys, whose rows are read from the caches."""
        c, at = self.config, self._in(layer, ATTENTION, is_draft=is_draft)
        heads = c.num_attention_heads * c.head_dim
        return at.operator(
            "sparse attention",
            flops=2 * 2 * pairs * heads,
            weights=at.weights("attn.attn_sink"),
            read=n * heads * BF16_BYTES + cache_bytes,
            written=n * heads * BF16_BYTES,
            arithmetic="cache",
            divided=BY_RANK,
        )

    def _attention(self, layer: int) -> Iterator[Operator]:
        c, steps = self.config, self.steps
        n, ratio = steps.computed, c.compress_ratios[layer]
        yield from self._projections(layer, n)
        pairs = _window_pairs(c.sliding_window, steps)
        rows = steps.sequences * np.minimum(steps.after, c.sliding_window - 1 + steps.tokens)
        cached = rows * self._rows[WINDOW]
        if ratio:
            is_v41 = c.version is Version.V41
            if not is_v41 or layer in c.kv_source_layer_ids:
                yield from self._compressor(layer, "attn.compressor", ratio, c.head_dim, ENTRIES)
            if is_v41:
                yield from self._shared_index(layer, ratio)
            elif ratio == OVERLAPPING_RATIO:
                yield from self._compressor(layer, "attn.indexer.compressor", ratio, c.index_head_dim, INDEX_KEYS)
                yield from self._index(layer, Sees(ratio))
            sees = self._sees(layer, ratio)
            chosen = _pairs(sees, steps)
            pairs = pairs + chosen
            held = steps.sequences * (steps.after // ratio)
            cached = cached + np.minimum(chosen, held) * self._rows[ENTRIES]
        yield self._scaled_dot_products(layer, pairs, n, cached)
        yield from self._output(layer, n)

    def _sees(self, layer: int, ratio: int) -> Sees:
        """Return which entries the queries of a layer choose."""
        c = self.config
        if c.version is Version.V4:
            return Sees(ratio, c.index_topk if ratio == OVERLAPPING_RATIO else None)
        return self._candidates(c.index_source(layer), Sees(ratio, c.index_topk))

    def _candidates(self, source: int | None, sees: Sees) -> Sees:
        """Return ``sees`` within the blocks that a candidate source chose before index source ``source``."""
        found = self.config.candidates
        if found is None or source is None or source <= found.source_layer_id:
            return sees
        return sees._replace(blocks=found.topk_blocks, size=found.block_size)

    def _compressor(self, layer: int, module: str, ratio: int, width: int, kind: str) -> Iterator[Operator]:
        """Yield the compressor's projections and the pooling of its blocks."""
        c, steps, n = self.config, self.steps, self.steps.computed
        at = self._in(layer, ATTENTION)
        channels = (2 if ratio == OVERLAPPING_RATIO else 1) * width
        made = steps.sequences * (steps.after // ratio - steps.before // ratio)
        what = "indexer's compressor" if kind == INDEX_KEYS else "compressor"
        matrices = 1 if ratio == 1 else 2
        weights = at.weights(*(f"{module}.{name}" for name in ("wkv.weight", "norm.weight", "wgate.weight", "ape")))
        yield at.product(what, n, c.hidden_size, matrices * channels, weights, out_bytes=F32_BYTES, arithmetic="full")
        candidates = (2 if ratio == OVERLAPPING_RATIO else 1) * ratio
        yield at.operator(
            f"{what} pooling",
            # Softmax over a block's candidates, channel by channel, and the weighted sum.
            elementwise=0 if ratio == 1 else made * candidates * width * POOLING_OPERATIONS,
            read=made * matrices * candidates * width * F32_BYTES,
            written=made * self._rows[kind],
        )

    def _index(self, layer: int, sees: Sees) -> Iterator[Operator]:
        """Yield the indexer's queries, its scores of the keys that queries see, and the choice of the best."""
        c, steps, n = self.config, self.steps, self.steps.computed
        at = self._in(layer, ATTENTION)
        heads, width = c.index_n_heads, c.index_head_dim
        wq_b, weigh = (at.weights(f"attn.indexer.{name}.weight") for name in ("wq_b", "weights_proj"))
        yield at.product("indexer query", n, c.q_lora_rank, heads * width, wq_b, divided=BY_RANK)
        yield at.product("indexer head weights", n, c.hidden_size, heads, weigh, out_bytes=F32_BYTES, divided=BY_RANK)
        pairs = _pairs(sees, steps)
        keys = np.minimum(pairs, steps.sequences * (steps.after // sees.ratio))
        yield at.operator(
            "indexer scores",
            flops=pairs * (2 * heads * width + 2 * heads),
            elementwise=pairs * heads,  # relu
            read=n * heads * (width * BF16_BYTES + F32_BYTES) + keys * self._rows[INDEX_KEYS],
            written=pairs * F32_BYTES,
            arithmetic="cache",
            divided=BY_RANK,
        )
        yield at.operator(
            "indexer top-k",
            elementwise=pairs,  # each score is looked at once
            read=pairs * F32_BYTES,
            written=np.minimum(pairs, n * c.index_topk) * INDEX_BYTES,
        )

    def _shared_index(self, layer: int, ratio: int) -> Iterator[Operator]:
        """Yield V4.1's index keys of a KV source, and the choice of an index source."""
        c, steps, at = self.config, self.steps, self._in(layer, ATTENTION)
        if layer in c.kv_source_layer_ids:
            made = steps.sequences * (steps.after // ratio - steps.before // ratio)
            yield at.operator(
                "index keys",
                flops=2 * made * c.head_dim * c.index_head_dim,
                weights=at.weights("attn.indexer.wk.weight", "attn.indexer.k_norm.weight"),
                read=made * c.head_dim * BF16_BYTES,
                written=made * self._rows[INDEX_KEYS],
                arithmetic="full",
            )
        if layer in c.index_source_layer_ids:
            yield from self._index(layer, self._candidates(layer, Sees(ratio)))

    def _experts(self, layer: int, *, is_draft: bool = False, tokens: Counts | None = None) -> Iterator[Operator]:
        """Yield the router, the routed experts that some token touches, and the shared expert."""
        c, n = self.config, self.steps.computed if tokens is None else tokens
        at = self._in(layer, EXPERTS, is_draft=is_draft)
        experts = c.n_experts(is_draft)
        chosen = c.draft_num_experts_per_tok if is_draft else c.num_experts_per_tok
        width, inner = c.hidden_size, c.moe_intermediate_size
        names = ("ffn.gate.weight", "ffn.gate.bias", "ffn.gate.bias_vl")
        yield at.product("router", n, width, experts, at.weights(*names), out_bytes=F32_BYTES, arithmetic="full")
        hashed = not is_draft and c.is_hash_routed(layer)
        table = at.weights("ffn.gate.tid2eid").nbytes
        yield at.operator(
            "hash routing" if hashed else "top-k routing",
            elementwise=0 if hashed else n * experts,
            read=n * (table / c.vocab_size if hashed else experts * F32_BYTES),
            written=n * chosen * (INDEX_BYTES + F32_BYTES),
        )
        touched = self.routing.touched(None if is_draft else layer, experts, chosen, np.asarray(n, np.float64))
        of_one = at.weights(*EXPERT_NAMES) / experts
        yield at.operator(
            "routed experts",
            flops=2 * 3 * n * chosen * width * inner,
            elementwise=n * chosen * inner * SWIGLU_OPERATIONS,
            weights=touched * of_one,
            read=n * chosen * width * BF16_BYTES,
            written=n * chosen * width * BF16_BYTES,
            divided=BY_EXPERT,
            arithmetic="experts",
        )
        shared = inner * c.n_shared_experts
        yield at.operator(
            "shared expert",
            flops=2 * 3 * n * width * shared,
            elementwise=n * shared * SWIGLU_OPERATIONS,
            weights=at.weights(*SHARED_NAMES),
            read=n * width * BF16_BYTES,
            written=n * width * BF16_BYTES,
        )

    def _engram(self, layer: int) -> Iterator[Operator]:
        """Yield the lookup of n-grams, their projection, and the gate into every stream."""
        c, n = self.config, self.steps.computed
        engram, at = c.engram, self._in(layer, ENGRAM)
        if engram is None:
            return
        hc, width = c.hc_mult, c.hidden_size
        columns = engram.rows_per_token * engram.head_dim
        row = at.weights("engram.embed.weight", "engram.embed.scale").nbytes / max(1, engram.rows(layer))
        yield at.operator(
            "n-gram lookup",
            read=n * engram.rows_per_token * row,
            written=n * columns * BF16_BYTES,
        )
        yield at.product("n-gram projection", n, columns, (hc + 1) * width, at.weights("engram.wkv.weight"))
        yield at.operator(
            "n-gram gate",
            elementwise=n * hc * width * GATE_OPERATIONS,
            weights=at.weights("engram.q_weight", "engram.k_weight"),
            read=n * (2 * hc + 1) * width * BF16_BYTES,
            written=n * hc * width * BF16_BYTES,
        )

    def _head(self, layer: int | None, *, is_draft: bool = False, tokens: Counts | None = None) -> Iterator[Operator]:
        """Yield what collapses the streams, and the output matrix, for the positions that get logits."""
        c = self.config
        at = self._in(layer, HEAD, is_draft=is_draft)
        n = self.steps.heads * self.steps.sequences if tokens is None else tokens
        hc, width = c.hc_mult, c.hidden_size
        runs = np.minimum(n, 1)  # the matrix is read in steps that need it
        if c.version is Version.V4:
            weights = at.weights("hc_head_fn", "hc_head_base", "hc_head_scale")
            yield at.product("head mixing", n, hc * width, hc, runs * weights, out_bytes=F32_BYTES, arithmetic="full")
        yield at.operator(
            "head collapse and norm",
            flops=2 * n * hc * width,
            weights=runs * at.weights("norm.weight"),
            read=n * hc * width * BF16_BYTES,
            written=n * width * BF16_BYTES,
            arithmetic="full",
        )
        yield at._replace(layer=None).product(
            "head",
            n,
            width,
            c.vocab_size,
            runs * self.weights(None, "head.weight"),
            out_bytes=F32_BYTES,
            arithmetic="full",
            divided=BY_RANK,
        )

    # ---- drafts ---------------------------------------------------------------------------------------

    def draft(self, kind: Draft, stages: int) -> Iterator[Operator]:
        """Yield the operators of one draft: MTP's next token, or DSpark's block of tokens; none without a draft."""
        if kind is Draft.MTP and stages:
            yield from self._mtp()
        elif kind is Draft.DSPARK and stages:
            yield from self._dspark(stages)

    def draft_phase(self, kind: Draft, stages: int) -> Phase:
        """Return the operators of one draft as a phase; its experts are those of draft layers."""
        c, steps = self.config, self.steps
        block = int(c.flat.get("dspark_block_size", 1)) if kind is Draft.DSPARK else 1
        n = steps.sequences * block
        touched = UNIFORM.touched(None, c.draft_n_routed_experts, c.draft_num_experts_per_tok, n.astype(np.float64))
        return Phase("draft", int(n.sum()), steps.count, tuple(self.draft(kind, stages)), float(touched[0]))

    def _mtp(self) -> Iterator[Operator]:
        """Yield what the MTP layer computes in the steps, after the trunk."""
        c, steps = self.config, self.steps
        n, width, at = steps.computed, c.hidden_size, self._in(0, DRAFT, is_draft=True)
        yield at.product("e_proj", n, width, width, at.weights("e_proj.weight", "enorm.weight"))
        yield at.product("h_proj", n * c.hc_mult, width, width, at.weights("h_proj.weight", "hnorm.weight"))
        yield from self._hyper(0, "attn", is_draft=True)
        yield from self._projections(0, n, is_draft=True)
        rows = steps.sequences * np.minimum(steps.after, c.sliding_window - 1 + steps.tokens)
        pairs = _window_pairs(c.sliding_window, steps)
        yield self._scaled_dot_products(0, pairs, n, rows * self._rows[WINDOW], is_draft=True)
        yield from self._output(0, n, is_draft=True)
        yield from self._hyper(0, "ffn", is_draft=True)
        yield from self._experts(0, is_draft=True)
        yield from self._head(0, is_draft=True)

    def _dspark(self, stages: int) -> Iterator[Operator]:
        """Yield what DSpark's stages compute of the trunk's new tokens, and for one block of guesses a sequence."""
        c, steps = self.config, self.steps
        seen, width = steps.computed, c.hidden_size
        block = int(c.flat.get("dspark_block_size", 1))
        n = steps.sequences * block
        targets = len(c.flat.get("dspark_target_layer_ids", (0, 0, 0)))
        first, last = (self._in(stage, DRAFT, is_draft=True) for stage in (0, stages - 1))
        weights = first.weights("main_proj.weight", "main_norm.weight")
        yield first.product("main_proj", seen, targets * width, width, weights)
        for stage in range(stages):
            yield self._key(stage, seen, is_draft=True)
        for stage in range(stages):
            yield from self._hyper(stage, "attn", is_draft=True, tokens=n)
            yield from self._projections(stage, n, is_draft=True)
            rows = np.minimum(steps.after, c.sliding_window) + block
            cached = steps.sequences * rows * self._rows[WINDOW]
            yield self._scaled_dot_products(stage, n * rows, n, cached, is_draft=True)
            yield from self._output(stage, n, is_draft=True)
            yield from self._hyper(stage, "ffn", is_draft=True, tokens=n)
            yield from self._experts(stage, is_draft=True, tokens=n)
        yield from self._head(stages - 1, tokens=n, is_draft=True)
        rank = int(c.flat.get("dspark_markov_rank", 0))
        tables = [("embed", "markov_w1"), ("head", "markov_w2")]
        lookup, matrix = (last.weights(*(f"markov_head.{name}.weight" for name in names)) for names in tables)
        yield last.operator(
            "Markov head",
            flops=2 * n * rank * c.vocab_size,
            weights=block * matrix,  # one guess after the other
            read=n * lookup.nbytes / c.vocab_size,
            written=n * c.vocab_size * F32_BYTES,
            divided=BY_RANK,
        )
        confidence = last.weights("confidence_head.proj.weight")
        yield last.product("confidence", n, width + rank, 1, confidence, out_bytes=F32_BYTES, arithmetic="full")
