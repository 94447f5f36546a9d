"""The numpy forward pass against itself: decoding, prefill in pieces, laziness, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.errors import InventoryError, UnsupportedError, UsageError
from dsv4convert.model.config import parse_config
from dsv4convert.reference import CachedSource, DictSource, Model

from .random_model import random_config, random_source, random_tensors, random_tokens

Array = npt.NDArray[Any]

TOLERANCE = 1e-5

# The models of test_transformers.py whose choices are all clear of rounding.
CLEAR = [(0, 36), (1, 30), (2, 5)]


@pytest.fixture(scope="module", params=CLEAR, ids=lambda p: f"shape{p[0]}-seed{p[1]}")
def model(request: pytest.FixtureRequest) -> Model:
    return Model(random_source(*request.param))


@pytest.fixture(scope="module")
def tokens(model: Model) -> Array:
    seed = {random_config(shape)["vocab_size"]: seed for shape, seed in CLEAR}[model.config.vocab_size]
    return random_tokens(model.config, 300, seed)


class CountingSource(DictSource):
    """Remembers what was read."""

    def __init__(self, source: DictSource) -> None:
        super().__init__(source.config, source._held)
        self.read: list[str] = []
        self.rows_read: dict[str, int] = {}

    def tensor(self, name: str) -> Array:
        self.read.append(name)
        return super().tensor(name)

    def rows(self, name: str, indices: Array) -> Array:
        self.rows_read[name] = self.rows_read.get(name, 0) + len(indices)
        return self._held[name][indices]


def worst_position(ours: Array, theirs: Array) -> float:
    """Return the largest relative RMSE of any position."""
    difference = np.sqrt(np.mean((ours.astype(np.float64) - theirs) ** 2, axis=-1))
    scale = np.sqrt(np.mean(theirs.astype(np.float64) ** 2, axis=-1))
    return float((difference / scale).max())


def test_decoding_equals_prefill_at_every_position(model: Model, tokens: Array) -> None:
    whole = model.forward(tokens)
    state = model.new_state()
    one_by_one = np.concatenate([model.forward([token], state) for token in tokens])
    assert worst_position(one_by_one, whole) <= TOLERANCE
    assert state.position == len(tokens)


@pytest.mark.parametrize("cuts", [[1], [3, 4, 5, 133], [127, 128, 129], [130, 131, 258]], ids=str)
def test_prefill_in_pieces_equals_prefill_at_once(model: Model, tokens: Array, cuts: list[int]) -> None:
    whole = model.forward(tokens)
    state = model.new_state()
    pieces = np.concatenate([model.forward(piece, state) for piece in np.split(tokens, cuts)])
    assert worst_position(pieces, whole) <= TOLERANCE


def test_caches_hold_a_window_and_whole_blocks(model: Model, tokens: Array) -> None:
    state = model.new_state()
    model.forward(tokens[:150], state)
    for layer, ratio in zip(state.layers, model.config.compress_ratios, strict=False):
        assert len(layer.window) == min(150, model.config.sliding_window)
        assert (layer.compressor is not None) == (ratio > 0)
        if layer.compressor is not None:
            assert len(layer.compressor.entries) == 150 // ratio
            assert len(layer.compressor.pending_k) == 150 % ratio


def test_queries_in_small_blocks_give_the_same(model: Model, tokens: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.forward(tokens)
    monkeypatch.setattr("dsv4convert.reference.attention.QUERY_BLOCK", 7)
    assert worst_position(model.forward(tokens), whole) <= TOLERANCE


def test_a_later_token_changes_no_earlier_logit(model: Model, tokens: Array) -> None:
    changed = tokens.copy()
    changed[200] = (changed[200] + 1) % model.config.vocab_size
    before, after = model.forward(tokens), model.forward(changed)
    # Not bit by bit: a product's order of summation depends on how many rows it has.
    assert worst_position(before[:200], after[:200]) <= TOLERANCE
    assert worst_position(before[200:201], after[200:201]) > 0.01


def test_mtp_decoding_equals_mtp_prefill(model: Model, tokens: Array) -> None:
    state = model.new_state()
    model.forward(tokens[:-1], state)
    assert state.streams is not None
    whole = model.mtp(state.streams, tokens[1:])
    mtp_state = model.new_mtp_state()
    one_by_one = [
        model.mtp(streams[None], [token], mtp_state) for streams, token in zip(state.streams, tokens[1:], strict=True)
    ]
    assert worst_position(np.concatenate(one_by_one), whole) <= TOLERANCE


def test_last_only_is_the_last_row(model: Model, tokens: Array) -> None:
    last = model.forward(tokens, last_only=True)
    assert last.shape == (1, model.config.vocab_size)
    assert worst_position(last, model.forward(tokens)[-1:]) <= TOLERANCE


def test_activations_come_in_order_and_end_with_the_logits(model: Model, tokens: Array) -> None:
    names = [name for name, _ in model.activations(tokens[:9])]
    assert len(set(names)) == len(names)
    assert names[0] == "embed"
    assert names[-1] == "logits"
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)
    assert set(layers) == set(range(model.config.num_hidden_layers))


def test_only_experts_with_tokens_are_read() -> None:
    source = CountingSource(random_source(0, 36))
    trace = dict(Model(source).activations([5, 17]))
    for n in range(source.config.num_hidden_layers):
        hit = {int(e) for e in np.unique(trace[f"layers.{n}.ffn.gate.experts"])}
        at = f"layers.{n}.ffn.experts."
        read = {int(name.split(".")[4]) for name in source.read if name.startswith(at)}
        assert read == hit
        assert len(hit) < source.config.n_routed_experts


def test_embedding_and_hash_table_are_read_by_row() -> None:
    source = CountingSource(random_source(0, 36))
    Model(source).forward([5, 17, 5])
    assert source.rows_read["embed.weight"] == 3
    assert source.rows_read["layers.0.ffn.gate.tid2eid"] == 3
    assert "embed.weight" not in source.read
    assert "head.weight" not in source.read


def test_a_cache_reads_each_weight_once_and_stays_within_its_bytes() -> None:
    counting = CountingSource(random_source(0, 36))
    tokens = [5, 17]
    model = Model(CachedSource(counting))
    first, second = model.forward(tokens), model.forward(tokens)
    assert np.array_equal(first, second)
    assert len(set(counting.read)) == len(counting.read)

    small = CachedSource(counting, max_bytes=20_000)
    assert np.array_equal(Model(small).forward(tokens), first)
    assert 0 < small._kept_bytes <= 20_000


def test_fewer_layers_need_no_weight_of_the_others() -> None:
    config = parse_config(random_config(0), "test")
    tensors = random_tensors(config, 36)
    for name in [name for name in tensors if name.startswith(("layers.2", "layers.3"))]:
        del tensors[name]
    trace = dict(Model(DictSource(config, tensors), layers=2).activations([1, 2, 3]))
    assert not any(name.startswith("layers.2.") for name in trace)
    assert trace["logits"].shape == (3, config.vocab_size)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([4, 4, 4], "row 7 names an expert twice"),
        ([0, 1, 10**6], "row 7 names an expert that is not there"),
        ([0, -1, 1], "row 7 names an expert that is not there"),
    ],
)
def test_a_routing_table_that_no_model_can_have_is_refused(row: list[int], says: str) -> None:
    config = parse_config(random_config(0), "test")
    tensors = random_tensors(config, 36)
    table = "layers.0.ffn.gate.tid2eid"
    tensors[table] = tensors[table].copy()
    tensors[table][7] = row
    model = Model(DictSource(config, tensors), layers=1)
    with pytest.raises(InventoryError, match=f"tensor {table}: {says}"):
        dict(model.activations([7]))
    assert "layers.0.ffn.routed" in dict(model.activations([6]))


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ([], "the prompt is empty; pass at least one token"),
        ([3, 211], "token id out of range: expected 0 to 210, got 211"),
        ([-1], "token id out of range: expected 0 to 210, got -1"),
        (
            [1] * 1025,
            "more tokens than the model's context: expected at most 1024 (max_position_embeddings), got 1025",
        ),
    ],
    ids=["empty", "above", "negative", "too-long"],
)
def test_bad_prompts_are_refused_in_one_line(prompt: list[int], line: str) -> None:
    with pytest.raises(UsageError) as error:
        Model(random_source(0, 36)).forward(prompt)
    assert str(error.value) == line


def test_a_context_is_counted_over_calls() -> None:
    model = Model(random_source(0, 36), layers=1)
    state = model.new_state()
    model.forward([1] * 1024, state)
    with pytest.raises(UsageError, match="got 1025"):
        model.forward([1], state)


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_a_number_of_layers_outside_the_model_is_refused(layers: int) -> None:
    with pytest.raises(UsageError, match="number of layers: expected 1 to 4"):
        Model(random_source(0, 36), layers=layers)


@pytest.mark.parametrize(
    "name",
    ["embed.weight", "layers.1.attn.compressor.ape", "head.weight", "layers.3.ffn.shared_experts.w2.weight"],
)
def test_a_missing_weight_is_named(name: str) -> None:
    config = parse_config(random_config(0), "test")
    tensors = random_tensors(config, 36)
    del tensors[name]
    with pytest.raises(InventoryError, match=f"no weight {name}"):
        Model(DictSource(config, tensors)).forward([1, 2, 3, 4])


def test_mtp_wants_one_next_token_per_position() -> None:
    model = Model(random_source(0, 36))
    state = model.new_state()
    model.forward([1, 2, 3], state)
    assert state.streams is not None
    with pytest.raises(UsageError, match="one next token per position: expected 3, got 2"):
        model.mtp(state.streams, [2, 3])


def test_a_dspark_draft_head_is_refused_by_name() -> None:
    config = parse_config(random_config(0), "test")
    tensors = random_tensors(config, 36)
    tensors["mtp.0.main_proj.weight"] = np.zeros((72, 216), np.float32)
    with pytest.raises(UnsupportedError, match="DSpark"):
        Model(DictSource(config, tensors)).mtp(np.zeros((1, 4, 72), np.float32), [1])
