"""The numpy forward pass against transformers' DeepseekV4ForCausalLM, both in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.model.config import ModelConfig, parse_config
from dsv4convert.reference import DictSource, Model
from dsv4convert.reference.weights.open import HfSource

from ..checkpoints import MakeCheckpoint
from .random_model import random_config, random_tensors, random_tokens, save_for_transformers

pytestmark = pytest.mark.oracle

Array = npt.NDArray[Any]

# float32 rounds at 6e-8; a few hundred operations deep, two right implementations differ by about 1e-6.
TOLERANCE = 1e-5

# Two rounding errors of float32 on scores near 1, with room for the order of summation.
ROUNDING = 5e-6

LENGTHS = [1, 3, 4, 5, 127, 128, 129, 300, 700]
MOST = max(LENGTHS)

# (shape, seed): seeds whose closest choice, of experts or entries, over 700 tokens is clear of rounding.
CLEAR = [(0, 36), (1, 30), (2, 5)]
# Random signs in the indexer: entries that no head sees score exactly 0 together, so choices are ties.
TIED = [(0, 0), (1, 1), (2, 2)]


class Pair(NamedTuple):
    """The same weights twice."""

    source: DictSource
    oracle: Any
    tokens: Array


class Choices(NamedTuple):
    """What an implementation computed: streams after each layer, chosen sets, and logits."""

    streams: list[Array]  # per layer [T, hc, D]
    experts: dict[int, Array]  # per learned layer, bool [T, E]
    entries: dict[int, Array]  # per layer of ratio 4, bool [T, S]
    logits: Array


def load(shape: int, seed: int, folder: Path, *, steady: bool) -> Pair:
    """Return a random model as a DictSource and in transformers."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    config = parse_config(random_config(shape), "test")
    tensors = random_tensors(config, seed, steady_indexer=steady)
    source = DictSource(config, tensors)
    save_for_transformers(source, tensors, folder)
    oracle = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Pair(source, oracle.eval(), random_tokens(config, MOST, seed))


@pytest.fixture(scope="module", params=CLEAR, ids=lambda p: f"shape{p[0]}-seed{p[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(*request.param, tmp_path_factory.mktemp("clear"), steady=True)


@pytest.fixture(scope="module", params=TIED, ids=lambda p: f"shape{p[0]}-seed{p[1]}")
def tied_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(*request.param, tmp_path_factory.mktemp("tied"), steady=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: these shapes are too small to share out."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def hooks(oracle: Any, config: ModelConfig, into: Choices) -> Iterator[None]:
    """Fill ``into`` with what the layers, routers and indexers of ``oracle`` return."""
    handles = []

    def as_mask(indices: Any, width: int) -> Array:
        mask = np.zeros((len(indices), width + 1), bool)  # −1, an entry not chosen, falls on the last column
        np.put_along_axis(mask, indices.numpy(), True, axis=1)
        return mask[:, :width]

    for n, layer in enumerate(oracle.model.layers):
        handles.append(layer.register_forward_hook(lambda _m, _i, out: into.streams.append(out[0].numpy())))
        if not config.is_hash_routed(n):

            def on_route(_m: Any, _i: Any, out: Any, n: int = n) -> None:
                into.experts[n] = as_mask(out[2], config.n_routed_experts)

            handles.append(layer.mlp.gate.register_forward_hook(on_route))
        if config.compress_ratios[n] == 4:

            def on_index(_m: Any, inputs: Any, out: Any, n: int = n) -> None:
                into.entries[n] = as_mask(out[0], inputs[0].shape[1] // 4)

            handles.append(layer.self_attn.compressor.indexer.register_forward_hook(on_index))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_oracle(pair: Pair, length: int) -> Choices:
    import torch

    theirs = Choices([], {}, {}, np.empty((length, pair.source.config.vocab_size), np.float32))
    with torch.no_grad(), hooks(pair.oracle, pair.source.config, theirs):
        tokens = torch.tensor(pair.tokens[:length])[None]
        theirs.logits[:] = pair.oracle(tokens, use_cache=False).logits[0].numpy()
    return theirs


def run_ours(pair: Pair, length: int) -> tuple[Choices, dict[str, Array]]:
    config = pair.source.config
    trace = dict(Model(pair.source).activations(pair.tokens[:length]))
    experts, entries = {}, {}
    for n in range(config.num_hidden_layers):
        if not config.is_hash_routed(n):
            experts[n] = np.zeros((length, config.n_routed_experts), bool)
            np.put_along_axis(experts[n], trace[f"layers.{n}.ffn.gate.experts"], True, axis=1)
        if config.compress_ratios[n] == 4:
            entries[n] = trace[f"layers.{n}.attn.indexer.chosen"]
    streams = [trace[f"layers.{n}.ffn.streams"] for n in range(config.num_hidden_layers)]
    return Choices(streams, experts, entries, trace["logits"]), trace


def relative_rmse(ours: Array, theirs: Array) -> float:
    difference = ours.astype(np.float64) - theirs
    return float(np.sqrt(np.mean(difference**2) / np.mean(theirs.astype(np.float64) ** 2)))


def margins(trace: dict[str, Array], source: DictSource, n: int) -> tuple[Array, Array]:
    """Return, per token, how far the last chosen is from the best unchosen: among experts, among entries."""
    config = source.config
    length = len(trace["embed"])

    def margin(scores: Array, k: int) -> Array:
        if scores.shape[1] <= k:
            return np.full(length, np.inf)
        best = -np.sort(-scores, axis=1)
        scale = max(1, np.abs(scores[np.isfinite(scores)]).max())
        # Where fewer than k are visible there is no choice; a difference with −∞ says so.
        with np.errstate(invalid="ignore"):
            gap = (best[:, k - 1] - best[:, k]) / scale
        return np.where(np.isfinite(best[:, k]), gap, np.inf)

    of_experts = of_entries = np.full(length, np.inf)
    if not config.is_hash_routed(n):
        bias = source.tensor(f"layers.{n}.ffn.gate.bias")
        of_experts = margin(trace[f"layers.{n}.ffn.gate.affinity"] + bias, config.num_experts_per_tok)
    if config.compress_ratios[n] == 4:
        of_entries = margin(trace[f"layers.{n}.attn.indexer.score"], config.index_topk)
    return of_experts, of_entries


def reached(touched_T: Array, config: ModelConfig, ratio: int) -> Array:
    """Return which positions attention can carry a difference at ``touched_T`` to, bool [T]."""
    T = len(touched_T)
    t, j = np.arange(T)[:, None], np.arange(T)[None, :]
    sees = (j <= t) & (j > t - config.sliding_window)
    if ratio:
        sees |= (j // ratio + 1) * ratio <= t + 1  # within a block that t sees whole
    result: Array = (sees & touched_T[None, :]).any(axis=1)
    return result


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_and_every_layer_equal_transformers(pair: Pair, length: int) -> None:
    theirs = run_oracle(pair, length)
    ours, _ = run_ours(pair, length)
    for n, (mine, its) in enumerate(zip(ours.streams, theirs.streams, strict=True)):
        assert relative_rmse(mine, its) <= TOLERANCE, f"layer {n}"
    assert relative_rmse(ours.logits, theirs.logits) <= TOLERANCE
    for n, chosen in ours.experts.items():
        assert np.array_equal(chosen, theirs.experts[n]), f"layer {n}"
    for n, chosen in ours.entries.items():
        assert np.array_equal(chosen, theirs.entries[n]), f"layer {n}"


def test_the_clear_models_have_clear_margins_and_use_every_branch(pair: Pair) -> None:
    config = pair.source.config
    _, trace = run_ours(pair, MOST)
    for n in range(config.num_hidden_layers):
        of_experts, of_entries = margins(trace, pair.source, n)
        assert min(of_experts.min(), of_entries.min()) > ROUNDING
        if config.compress_ratios[n] == 4:
            chosen = trace[f"layers.{n}.attn.indexer.chosen"]
            assert chosen.shape[1] > 4 * config.index_topk
            assert chosen[-1].sum() == config.index_topk
        assert len(np.unique(trace[f"layers.{n}.ffn.gate.experts"])) > config.num_experts_per_tok
    assert {0, 4, 128} <= set(config.compress_ratios)


@pytest.mark.parametrize("length", [129, 700])
def test_different_choices_are_ties_and_nothing_else_differs(tied_pair: Pair, length: int) -> None:
    config = tied_pair.source.config
    theirs = run_oracle(tied_pair, length)
    ours, trace = run_ours(tied_pair, length)
    touched = np.zeros(length, bool)
    for n, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        of_experts, of_entries = margins(trace, tied_pair.source, n)
        before = touched
        touched = reached(touched, config, ratio)
        if n in ours.entries:
            other = (ours.entries[n] != theirs.entries[n]).any(axis=1) & ~before
            assert (of_entries[other] <= ROUNDING).all(), f"layer {n}"
            touched = touched | other
        if n in ours.experts:
            other = (ours.experts[n] != theirs.experts[n]).any(axis=1) & ~touched
            assert (of_experts[other] <= ROUNDING).all(), f"layer {n}"
            touched = touched | other
        kept = ~touched
        assert relative_rmse(ours.streams[n][kept], theirs.streams[n][kept]) <= TOLERANCE, f"layer {n}"
    assert (~touched).sum() >= 20
    assert relative_rmse(ours.logits[~touched], theirs.logits[~touched]) <= TOLERANCE


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quantised_checkpoint_equals_transformers(make_checkpoint: MakeCheckpoint, tmp_path: Path, seed: int) -> None:
    """The whole way: FP8 and FP4 bytes decoded here, the same numbers in transformers."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    source = HfSource(open_folder(make_checkpoint("tiny", seed=seed)))
    raw = {k: v for k, v in source.config.raw.items() if k not in ("quantization_config", "expert_dtype")}
    config = parse_config(raw, "test")
    tensors = {name: source.tensor(name) for name in open_folder(make_checkpoint("tiny", seed=seed)).weights}
    save_for_transformers(DictSource(config, tensors), tensors, tmp_path)
    oracle = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = random_tokens(config, 200, seed)
    with torch.no_grad():
        theirs = oracle(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    assert relative_rmse(Model(source).forward(tokens), theirs) <= TOLERANCE


def test_decoding_token_by_token_equals_transformers(pair: Pair) -> None:
    length = 300
    model = Model(pair.source)
    state = model.new_state()
    logits = np.concatenate([model.forward([token], state) for token in pair.tokens[:length]])
    assert relative_rmse(logits, run_oracle(pair, length).logits) <= TOLERANCE
