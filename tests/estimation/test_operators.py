"""Operators: their FLOPs equal those of the products that the reference forward pass carries out, layer by layer.

The reference multiplies a query with keys that it cannot see and masks the scores; of those products the pairs that
are not masked are counted.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import dsv4convert
from dsv4convert.api import load_model
from dsv4convert.errors import FileFormatError
from dsv4convert.estimation.operators import (
    UNIFORM,
    Costs,
    Operator,
    Routing,
    Sees,
    Steps,
    decode_steps,
    prefill_steps,
)
from dsv4convert.estimation.operators import _chosen as chosen
from dsv4convert.model.config import ModelConfig, parse_config
from dsv4convert.model.config_v41 import Candidates
from dsv4convert.model.tensors import Draft
from dsv4convert.reference import Model, attention, dspark, hyper_connections
from dsv4convert.reference import model as reference_model

from ..checkpoints import MakeCheckpoint
from ..reference.random_model import SHAPES, random_config, random_source
from ..v41 import TINY, published_config

Array = npt.NDArray[Any]


class Counted(np.ndarray):  # type: ignore[type-arg]
    """An array whose products of matrices are counted, and those of all arrays that are made of it."""

    counts: ClassVar[Counter[str]] = Counter()
    stack: ClassVar[list[str]] = ["other"]
    paused = 0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, Counted) else x for x in inputs]
        out = options.pop("out", None)
        if out is not None:
            options["out"] = tuple(np.asarray(x) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul and not Counted.paused:
            Counted.counts[Counted.stack[-1]] += 2 * result.size * plain[0].shape[-1]
        if out is not None:
            return out[0]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


class CountedSource:
    """A source whose weights count the products that they are in."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensor(self, name: str) -> Array:
        return self._source.tensor(name).view(Counted)

    def rows(self, name: str, indices: Array) -> Array:
        rows = self._source.rows(name, indices)
        return rows if rows.dtype.kind == "i" else rows.view(Counted)


@contextmanager
def no_counting() -> Iterator[None]:
    Counted.paused += 1
    try:
        yield
    finally:
        Counted.paused -= 1


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], dict[str, int]]:
    """Return a function that runs something and returns the FLOPs of its products by sublayer."""

    def inside(label: Callable[[dict[str, Any]], str], function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def wrapped(*args: Any, **options: Any) -> Any:
            Counted.stack.append(label(signature.bind(*args, **options).arguments))
            try:
                return function(*args, **options)
            finally:
                Counted.stack.pop()

        return wrapped

    def attend_to(q: Array, keys: Array, visible: Array, sink: Array) -> Array:
        H, d = q.shape[1:]
        Counted.counts[Counted.stack[-1]] += 4 * H * d * int(np.broadcast_to(visible, (len(q), len(keys))).sum())
        with no_counting():
            return plain_attend_to(q, keys, visible, sink)

    def scores(q: Array, w: Array, keys: Array, ratio: int, t0: int) -> Array:
        with no_counting():
            return plain_scores(q, w, keys, ratio, t0)

    def choose(score: Array, allowed: Array | None, topk: int, at: str, record: Any) -> Array:
        seen = ~np.isneginf(score) if allowed is None else ~np.isneginf(score) & allowed
        Counted.counts[Counted.stack[-1]] += int(seen.sum()) * score_flops[0]
        return plain_choose(score, allowed, topk, at, record)

    def index_queries(*args: Any) -> Any:
        q, w = plain_index_queries(*args)
        score_flops[0] = 2 * q.shape[1] * (q.shape[2] + 1)
        return q, w

    score_flops = [0]
    plain_attend_to, plain_scores, plain_choose = attention.attend_to, attention._scores, attention._choose
    plain_index_queries = attention.index_queries
    monkeypatch.setattr(attention, "attend_to", attend_to)
    monkeypatch.setattr(dspark, "attend_to", attend_to)
    monkeypatch.setattr(attention, "_scores", scores)
    monkeypatch.setattr(attention, "_choose", choose)
    monkeypatch.setattr(attention, "index_queries", index_queries)
    around = inside(lambda a: a["fn"], reference_model.around)
    for module in (reference_model, dspark):
        monkeypatch.setattr(module, "around", around)
        monkeypatch.setattr(module, "mixture", inside(lambda a: a["at"], module.mixture))
    monkeypatch.setattr(reference_model, "attention", inside(lambda a: a["place"].at, reference_model.attention))
    monkeypatch.setattr(reference_model, "engram", inside(lambda a: a["at"], reference_model.engram))

    def run(action: Callable[[], Any]) -> dict[str, int]:
        Counted.counts = Counter()
        action()
        return {name: flops for name, flops in Counted.counts.items() if flops}

    return run


def by_sublayer(operators: Sequence[Operator]) -> dict[str, int]:
    """Return the FLOPs of operators by the prefixes of the reference's names."""
    found: Counter[str] = Counter()
    for operator in operators:
        at = f"layers.{operator.layer}."
        key = {
            "attention": f"{at}attn.",
            "experts": f"{at}ffn.",
            "engram": f"{at}engram.",
            "hyper-connections": f"{at}hc_{operator.name.split()[0]}",
        }.get(operator.sublayer, "other")
        assert operator.flops == int(operator.flops)
        found[key] += int(operator.flops)
    return {name: flops for name, flops in found.items() if flops}


def step(before: int, tokens: int) -> Steps:
    return Steps(*(np.array([value]) for value in (before, tokens, 1, 1, 1)))


def counted_model(source: Any, config: ModelConfig | None = None) -> Model:
    model = Model(CountedSource(source))  # type: ignore[arg-type]
    if config is not None:
        model.config = config
        model.source._source._config = config  # type: ignore[attr-defined]
    return model


RUNS = (1, 1, 3, 130, 1, 1, 2, 1, 1, 9)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_flops_are_those_of_the_forward_pass(shape: int, count: Any) -> None:
    model = counted_model(random_source(shape, 1))
    state, done = model.new_state(), 0
    for tokens in RUNS:
        ids = np.arange(tokens) % model.config.vocab_size
        counted = count(lambda ids=ids: model.forward(ids, state, last_only=True))
        wanted = by_sublayer(list(Costs(model.config, (), step(done, tokens), "f32").trunk()))
        assert wanted == counted
        done += tokens


@pytest.mark.parametrize("topk", [4, 100])
@pytest.mark.parametrize("name", TINY)
def test_flops_of_v41_are_those_of_the_forward_pass(name: str, topk: int, count: Any) -> None:
    source = load_model(TINY[name]).source
    # Few candidates, so that they limit both what is scored and what is chosen.
    candidates = Candidates(source.config.index_source_layer_ids[-2], 3, 4)
    model = counted_model(source, replace(source.config, candidates=candidates, index_topk=topk))
    state, done = model.new_state(), 0
    for tokens in (1, 1, 3, 40, 1, 1, 2, 1):
        ids = np.arange(tokens) + 3
        counted = count(lambda ids=ids: model.forward(ids, state, last_only=True))
        assert by_sublayer(list(Costs(model.config, (), step(done, tokens), "f32").trunk())) == counted
        done += tokens


def test_flops_of_an_mtp_layer_are_those_of_the_forward_pass(count: Any) -> None:
    model = counted_model(random_source(0, 1))
    trunk, state, done = model.new_state(), model.new_mtp_state(), 0
    for tokens in (30, 1, 4):
        ids = np.arange(tokens)
        model.forward(ids, trunk)
        assert trunk.streams is not None
        counted = count(lambda ids=ids: model.mtp(trunk.streams, ids, state))
        steps = replace(step(done, tokens), heads=np.array([tokens]))
        draft = list(Costs(model.config, (), steps, "f32").draft(Draft.MTP, 1))
        assert sum(operator.flops for operator in draft) == sum(counted.values())
        done += tokens


@pytest.mark.parametrize("name", TINY)
def test_flops_of_a_dspark_draft_are_those_of_the_forward_pass(name: str, count: Any) -> None:
    model = counted_model(load_model(TINY[name]).source)
    trunk, state, done = model.new_state(), model.new_draft_state(), 0
    for tokens in (20, 1, 70):
        model.forward(np.arange(tokens) + 3, trunk)

        def run() -> None:
            model.draft_sees(trunk.main, state)
            model.draft(5, state)

        counted = count(run)
        stages = model.config.num_nextn_predict_layers
        draft = list(Costs(model.config, (), step(done, tokens), "f32").draft(Draft.DSPARK, stages))
        assert sum(operator.flops for operator in draft) == sum(counted.values())
        done += tokens


def test_sinkhorn_is_counted_element_by_element() -> None:
    """Sums are one addition an element, with epsilon's; every element is divided."""

    class Elements(np.ndarray):  # type: ignore[type-arg]
        operations = 0

        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
            plain = [np.asarray(x) if isinstance(x, Elements) else x for x in inputs]
            result = getattr(ufunc, method)(*plain, **options)
            Elements.operations += result.size if method == "__call__" else plain[0].size - result.size
            return result.view(Elements)

    config = parse_config(random_config(0), "test")
    tokens, hc = 5, config.hc_mult
    mix = np.ones((tokens, hc, hc), np.float32).view(Elements)
    hyper_connections.sinkhorn(mix, config.hc_sinkhorn_iters, np.float32(config.hc_eps))
    operators = Costs(config, (), step(0, tokens), "f32").trunk()
    (told,) = {o.elementwise for o in operators if o.name.endswith("Sinkhorn")}
    assert told == Elements.operations


def by_hand(sees: Sees, tokens: int) -> int:
    """Return how many entries a query chooses, entry by entry."""
    visible = [entry for entry in range(tokens) if (entry + 1) * sees.ratio <= tokens]
    blocks = sorted({entry // sees.size for entry in visible}, reverse=True)
    kept = blocks if sees.blocks is None else blocks[: sees.blocks]  # the newest, and any others
    allowed = [entry for entry in visible if entry // sees.size in kept]
    return len(allowed if sees.top is None else allowed[: sees.top])


@pytest.mark.parametrize("sees", [Sees(4, 7), Sees(128), Sees(1, 9, 2, 4), Sees(2, 100, 3, 8), Sees(1, None, 3, 8)])
def test_how_many_entries_a_query_chooses(sees: Sees) -> None:
    tokens = np.arange(1, 300)
    assert chosen(sees, tokens).tolist() == [by_hand(sees, int(n)) for n in tokens]


@pytest.mark.parametrize(("context", "batch", "chunk"), [(1000, 3, 256), (1000, 7, 3000), (1000, 1, 1000), (5, 9, 4)])
def test_a_prefill_computes_every_token_once(context: int, batch: int, chunk: int) -> None:
    steps = prefill_steps(context, batch, chunk)
    assert int((steps.computed * steps.repeats).sum()) == context * batch
    assert int((steps.heads * steps.sequences * steps.repeats).sum()) == batch
    assert int(steps.computed.max()) <= chunk


def test_products_do_not_depend_on_how_a_prefill_is_cut() -> None:
    config = parse_config(random_config(1), "test")

    def flops(context: int, batch: int, chunk: int) -> float:
        return sum(o.flops for o in Costs(config, (), prefill_steps(context, batch, chunk), "f32").trunk())

    assert flops(900, 1, 64) == flops(900, 1, 900) == flops(900, 1, 77)
    assert flops(900, 4, 2000) == 4 * flops(900, 1, 900)
    assert sum(o.flops for o in Costs(config, (), decode_steps(900, 3), "f32").trunk()) == 3 * sum(
        o.flops for o in Costs(config, (), step(899, 1), "f32").trunk()
    )


def test_experts_that_a_batch_touches() -> None:
    tokens = np.array([1.0, 2.0, 10_000.0])
    uniform = UNIFORM.touched(3, 8, 2, tokens)
    assert uniform.tolist() == pytest.approx([2, 8 * (1 - 0.75**2), 8])
    measured = Routing({3: [5, 1, 1, 1, 0, 0, 0, 0]})
    shares = [1.0, 0.25, 0.25, 0.25]  # two choices a token; no expert is chosen twice by one
    assert measured.touched(3, 8, 2, tokens).tolist() == pytest.approx(
        [sum(1 - (1 - share) ** n for share in shares) for n in tokens]
    )
    assert measured.touched(2, 8, 2, tokens).tolist() == uniform.tolist()
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(5) for e in rng.permutation(16)[:3]}) for _ in range(4000)]
    assert UNIFORM.touched(None, 16, 3, np.array([5.0]))[0] == pytest.approx(np.mean(drawn), rel=0.01)


def test_decoding_reads_the_least_that_it_can() -> None:
    config = parse_config(published_config(), "test")
    (scores, *_) = (o for o in Costs(config, (), decode_steps(4096, 1), "published").trunk() if "scores" in o.name)
    # Layer 2, of ratio 2: every index key once, at 68 bytes, and the query with its head weights.
    assert scores.layer == 2
    assert scores.read_bytes == 2048 * 68 + 32 * (128 * 2 + 4)


@pytest.mark.parametrize("form", ["json", "imatrix"])
def test_measured_routing_is_read(form: str, tiny: Path, tmp_path: Path) -> None:
    counts = [90, 5, 1, 1, 1, 1, 1, 0]
    path = tmp_path / f"counts.{form}"
    if form == "json":
        path.write_text(json.dumps({str(layer): counts for layer in range(4)}))
    else:
        write_imatrix(path, counts)
    even, skewed = (dsv4convert.estimate(tiny, batch=4, routing=routing) for routing in (None, path))
    assert even.decode.experts_touched == pytest.approx(8 * (1 - (5 / 8) ** 4))
    assert skewed.decode.experts_touched < even.decode.experts_touched
    for phase, other in ((even.decode, skewed.decode), (even.prefill, skewed.prefill)):
        assert phase.flops == other.flops
        weights, fewer = (
            sum(o.weight_bytes for o in p.operators if o.name == "routed experts") for p in (phase, other)
        )
        assert fewer < weights


def write_imatrix(path: Path, counts: list[int]) -> None:
    """Write an importance matrix in GGUF form: the gate's of layers 0 to 3, one count for each expert."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer in range(4):
        name = f"blk.{layer}.ffn_gate_exps.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(counts), 160), np.float32))
        writer.add_tensor(f"{name}.counts", np.array(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"4": [1, 1, 1, 1, 1, 1, 1, 1]}', "no layer"),
        ('{"0": [1, 2]}', "layer 0: not a list of counts.*8 counts, got 2"),
        ('{"0": 3}', "layer 0: not a list of counts"),
        ('{"0": [1, 1, 1, 1, 1, 1, 1, -1]}', "layer 0: counts of experts"),
        ('{"0": [0, 0, 0, 0, 0, 0, 0, 0]}', "not all 0"),
        ('{"0": [1e400, 1, 1, 1, 1, 1, 1, 1]}', "layer 0: counts of experts"),
        (f'{{"0": [1{"0" * 400}, 1, 1, 1, 1, 1, 1, 1]}}', "layer 0: counts of experts"),
        ('{"00": [1, 1, 1, 1, 1, 1, 1, 1]}', "no layer"),
        (f'{{"{"9" * 5000}": [1, 1, 1, 1, 1, 1, 1, 1]}}', "key '999"),
        ("{}", "no counts of experts"),
        ("[1]", "counts"),
    ],
)
def test_counts_that_do_not_fit(text: str, message: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        dsv4convert.estimate(tiny, routing=path)


def test_the_bytes_of_weights_are_all_read_in_a_large_step(tiny: Path) -> None:
    """A run that touches every expert reads every weight of the trunk once, but for tables that are looked up."""
    found = dsv4convert.estimate(tiny, context=4000, chunk=4000, draft="drop")
    tables = sum(p.nbytes for p in found.weights if p.name in ("embed.weight", "ffn.gate.tid2eid"))
    assert found.prefill.runs == 1
    read = sum(operator.weight_bytes for operator in found.prefill.operators)
    assert read == pytest.approx(sum(part.nbytes for part in found.weights) - tables, rel=1e-9)


@pytest.mark.parametrize("form", ["gguf", "v41", "dspark"])
def test_every_weight_belongs_to_an_operator(form: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("v41-tiny" if form == "v41" else "tiny", variant="dspark" if form == "dspark" else None)
    found = dsv4convert.estimate(folder, context=4000, chunk=4000, gguf=form == "gguf")
    tables = ("embed.weight", "ffn.gate.tid2eid", "engram.embed.weight")
    weights = sum(p.nbytes for p in found.weights if not p.is_draft and p.name not in tables and p.family != "vision")
    read = sum(operator.weight_bytes for operator in found.prefill.operators)
    assert read == pytest.approx(weights, rel=1e-9)
