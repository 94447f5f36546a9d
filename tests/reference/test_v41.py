"""The forward pass of DeepSeek-V4.1 against what the published code computed from two tiny checkpoints.

The recorded runs are float32 without activation rounding. Their indexers often score several entries
exactly 0, where the published code's choice among them is arbitrary; a position whose choice is such a
tie is left out in the layers that use the choice. So that one tie does not spoil all that follows,
every sublayer gets the recorded outputs of those before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from dsv4convert.api import convert_gguf, load_model, shard
from dsv4convert.cli import app
from dsv4convert.errors import FileFormatError, InventoryError, UnsupportedError, UsageError
from dsv4convert.model.config_v41 import Candidates
from dsv4convert.reference import Model, Speculation, State, generate, generate_speculatively
from dsv4convert.reference import model as reference_model
from dsv4convert.reference.compare import compare
from dsv4convert.reference.dspark import Draft, DraftState
from dsv4convert.reference.parameters import Record
from dsv4convert.targets.engram_tables import LOSSLESS_TYPES

from ..oracles.gguf_bytes import RawGguf
from ..v41 import RECORDED, TINY

Array = npt.NDArray[Any]

TOLERANCE = 1e-5
# Relative to the largest score of the query.
TIE = 1e-5


def relative(ours: Array, theirs: Array) -> float:
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


class Run:
    """A recorded run, and ours with the recorded outputs of every sublayer put in the place of our own."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.model = load_model(TINY[name], cached=True)
        with np.load(RECORDED / f"{name}.npz") as file:
            self.theirs: dict[str, Array] = dict(file)
        self.tokens = self.theirs["tokens"]
        self.ours: dict[str, Array] = {}
        self.state: State = self.model.new_state()
        attention, mixture = reference_model.attention, reference_model.mixture

        def forced(sublayer: Callable[..., Array], at: Callable[[dict[str, Any]], str]) -> Callable[..., Array]:
            def run(*arguments: Any, **named: Any) -> Array:
                name = f"{at(named)}output"
                self.ours[name] = sublayer(*arguments, **named)
                return self.theirs[name]

            return run

        with patch.context() as inside:
            inside.setattr(reference_model, "attention", forced(attention, lambda named: named["place"].at))
            inside.setattr(reference_model, "mixture", forced(mixture, lambda named: named["at"]))
            self.ours["logits"] = self.model.forward(self.tokens[:-1], self.state, record=self._record)
        assert self.state.main is not None
        self.ours["main_hidden"] = self.state.main

    def _record(self, name: str, value: Array) -> None:
        if name.endswith(".ffn.streams"):
            name = name.replace(".ffn.", ".")
        if not name.endswith("ffn.output"):
            self.ours.setdefault(name, value)

    def tied(self, layer: int) -> Array:
        """Return at which positions the choice that ``layer`` uses may go either way, bool [T]."""
        config = self.model.config
        source = config.index_source(layer)
        if source is None:
            return np.zeros(len(self.tokens) - 1, bool)
        score = self.ours[f"layers.{source}.attn.indexer.score"]
        candidates = config.candidates
        if candidates is None or source <= candidates.source_layer_id:
            return ties(score, config.index_topk)
        at = f"layers.{candidates.source_layer_id}.attn.indexer."
        within = np.where(self.ours[f"{at}candidates"], score, -np.inf)
        of_blocks = block_scores(self.ours[f"{at}score"], candidates)
        return ties(within, config.index_topk) | ties(of_blocks, candidates.topk_blocks)


def ties(score_TS: Array, count: int) -> Array:
    """Return where the last score kept and the first one left out are as good as equal."""
    ordered = -np.sort(-score_TS, axis=1)
    if ordered.shape[1] <= count:
        return np.zeros(len(ordered), bool)
    kept, left = ordered[:, count - 1], ordered[:, count]
    largest = np.max(np.abs(np.where(np.isfinite(score_TS), score_TS, 0)), axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isfinite(left) & (kept - left <= TIE * largest))


def block_scores(score_TS: Array, candidates: Candidates) -> Array:
    """Return the largest score of each block, with the newest visible block first of all."""
    T, S = score_TS.shape
    starts = range(0, S, candidates.block_size)
    blocks = np.stack([score_TS[:, a : a + candidates.block_size].max(axis=1) for a in starts], axis=1)
    visible = np.isfinite(score_TS).sum(axis=1)
    for t in range(T):
        if visible[t]:
            blocks[t, (visible[t] - 1) // candidates.block_size] = np.inf
    return blocks


@pytest.fixture(scope="module", params=sorted(TINY))
def run(request: pytest.FixtureRequest) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        return Run(request.param, patch)


def test_every_sub_block_equals_the_published_codes(run: Run) -> None:
    compared = 0
    for name, theirs in run.theirs.items():
        if name == "tokens" or name.startswith("decode."):
            continue
        kept = np.ones(len(theirs), bool)
        if name.endswith("attn.output"):
            kept = ~run.tied(int(name.split(".")[1]))
        assert relative(run.ours[name][kept], theirs[kept]) <= TOLERANCE, name
        compared += 1
    assert compared == len(run.theirs) - 5


def test_only_few_positions_are_left_out(run: Run) -> None:
    layers = range(run.model.config.num_hidden_layers)
    assert max(run.tied(layer).mean() for layer in layers) < 0.12


def test_a_decoded_token_and_the_draft_from_it_equal_the_published_codes(run: Run) -> None:
    state = run.state.copy()
    draft_state = run.model.new_draft_state()
    run.model.draft_sees(state.main, draft_state)
    token = int(run.tokens[-1])
    logits = run.model.forward([token], state)[0]
    assert relative(logits, run.theirs["decode.0.logits"]) <= TOLERANCE
    run.model.draft_sees(state.main, draft_state)
    draft = run.model.draft(token, draft_state)
    assert [token, *draft.tokens] == run.theirs["decode.0.draft.tokens"].tolist()
    assert relative(draft.logits, run.theirs["decode.0.draft.logits"]) <= TOLERANCE
    assert relative(draft.confidence, run.theirs["decode.0.draft.confidence"]) <= TOLERANCE


@pytest.mark.parametrize(("name", "step"), [("tiny-a", 1), ("tiny-a", 3), ("tiny-b", 1)])
def test_decoding_equals_prefill_at_every_position(name: str, step: int) -> None:
    model = load_model(TINY[name], cached=True)
    with np.load(RECORDED / f"{name}.npz") as file:
        tokens = file["tokens"]
    whole = model.forward(tokens)
    state = model.new_state()
    pieces = [model.forward(tokens[a : a + step], state) for a in range(0, len(tokens), step)]
    for ours, theirs in zip(np.concatenate(pieces), whole, strict=True):
        assert relative(ours, theirs) <= TOLERANCE


def test_a_copied_state_advances_by_itself() -> None:
    model: Model = load_model(TINY["tiny-a"], cached=True)
    state = model.new_state()
    model.prefill(range(20), state)
    first = model.forward([7, 8, 9], state.copy())
    assert np.array_equal(model.forward([7, 8, 9], state), first)


@pytest.mark.parametrize("mp", [1, 2])
def test_shards_run_as_their_source_does(mp: int, tmp_path: Path) -> None:
    shard(TINY["tiny-a"], tmp_path / "out", mp=mp)
    tokens = np.arange(30)
    ours, source = (load_model(path).forward(tokens) for path in (tmp_path / "out", TINY["tiny-a"]))
    assert relative(ours, source) <= TOLERANCE


@pytest.mark.parametrize("engram", ["q8_0", "bf16", *LOSSLESS_TYPES])
def test_a_gguf_without_lossy_types_runs_as_its_source_does(engram: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert_gguf(TINY["tiny-a"], path, dense="bf16", engram=engram, tokenizer_pre="joyai-llm")
    tokens = np.arange(30)
    ours, source = (load_model(model).forward(tokens) for model in (path, TINY["tiny-a"]))
    if engram in (*LOSSLESS_TYPES, "bf16"):
        assert relative(ours, source) <= TOLERANCE
    else:
        assert TOLERANCE < np.median([relative(a, b) for a, b in zip(ours, source, strict=True)]) < 0.1


@pytest.mark.parametrize(("engram", "tensor"), [("i8-split", "engram_embd_scale"), ("i8-row264", "engram_embd")])
def test_a_table_of_bytes_in_another_shape_is_refused_by_name(engram: str, tensor: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert_gguf(TINY["tiny-a"], path, engram=engram, tokenizer_pre="joyai-llm")
    raw = RawGguf.read(path)
    info = next(info for info in raw.infos if f".{tensor}." in info.name)
    info.dims = (info.dims[1], info.dims[0])
    raw.write(path)
    with pytest.raises(InventoryError, match=rf"tensor {info.name}: wrong shape: expected \[\d+, \d+\], got"):
        load_model(path)


class HalfRight(Model):
    """A model whose draft knows the next two tokens, and no more."""

    known: list[int]

    def draft(self, token: int, draft_state: DraftState, *, record: Record | None = None) -> Draft:
        ours = super().draft(token, draft_state, record=record)
        guesses = np.full(5, -1)
        following = self.known[draft_state.position + 1 :][:2]
        guesses[: len(following)] = following
        guesses[guesses < 0] = (token + 1) % self.config.vocab_size
        return replace(ours, tokens=guesses)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("right", [False, True])
def test_speculation_generates_the_same_tokens(right: bool, temperature: float) -> None:
    source = load_model(TINY["tiny-a"], cached=True).source
    model = HalfRight(source) if right else Model(source)
    prompt, count = list(range(3, 25)), 17
    state = model.new_state()
    logits = model.forward(prompt, state)[-1]
    expected = list(generate(model, logits, state.copy(), count, temperature=temperature, seed=5))
    if isinstance(model, HalfRight):
        model.known = [*prompt, *expected]
    counts = Speculation()
    tokens = generate_speculatively(model, logits, state, count, temperature=temperature, seed=5, speculation=counts)
    assert list(tokens) == expected
    assert state.position == len(prompt)
    if right:
        assert counts.steps <= -(-(count - 1) // 3)
        assert 0 < counts.accepted < counts.drafted


def test_speculation_needs_a_prompt_run_in_one_call_and_all_layers() -> None:
    model = load_model(TINY["tiny-a"], cached=True)
    state = model.new_state()
    model.prefill([1, 2, 3], state)
    logits = model.forward([4], state)[-1]
    with pytest.raises(UsageError, match="the draft has not seen the whole prompt: expected 4, got 1"):
        list(generate_speculatively(model, logits, state, 3))
    shallow = load_model(TINY["tiny-a"], layers="0-2")
    state = shallow.new_state()
    logits = shallow.forward([1, 2], state)[-1]
    with pytest.raises(UsageError, match="the layers that the draft sees were not run"):
        list(generate_speculatively(shallow, logits, state, 3))


def test_a_model_without_a_dspark_draft_does_not_speculate(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="no DSpark draft"):
        load_model(tiny).new_draft_state()


def test_the_command_speculates() -> None:
    arguments = ["forward", str(TINY["tiny-a"]), "--tokens", "3,4,5,6", "--generate", "6", "--json"]
    plain, speculative = (
        CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False) for more in ([], ["--speculate"])
    )
    document = json.loads(speculative.stdout)
    assert document["generated"] == json.loads(plain.stdout)["generated"]
    assert document["speculation"]["steps"] > 0
    refused = CliRunner().invoke(app, ["forward", str(TINY["tiny-a"]), "--tokens", "3", "--speculate"])
    assert "--speculate needs --generate" in str(refused.exception)


def test_runs_that_differ_are_compared_by_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert_gguf(TINY["tiny-a"], path, tokenizer_pre="joyai-llm")
    folder, gguf = (load_model(model).activations(range(40)) for model in (TINY["tiny-a"], path))
    comparison = compare(folder, gguf)
    assert all(np.isfinite(d.error(by_median=False)) for d in comparison.differences)
    assert any(d.name.endswith("indexer.candidates") for d in comparison.differences)


@pytest.mark.parametrize(
    ("key", "at", "value", "says"),
    [
        ("primes", 3, 0, "engram.offsets: rows outside the table"),
        ("offsets", 3, 100_000, "rows outside the table: expected runs within the 660 rows of layer 0, got"),
        ("multipliers", 0, 2**64 - 1, "engram.multipliers: products beyond int64"),
        ("token_map", 5, -1, "engram.token_map: no ids: expected 0 or more, got -1"),
        ("pad_id", 0, 100_000, "engram.pad_id: not in the token map"),
        ("head_count", 0, 3, "engram.primes: wrong length"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() and " " not in value else "",
)
def test_constants_of_a_gguf_that_lead_outside_its_tables_are_refused(
    tmp_path: Path, key: str, at: int, value: int, says: str
) -> None:
    path = tmp_path / "m.gguf"
    convert_gguf(TINY["tiny-a"], path, tokenizer_pre="joyai-llm")
    field = gguf.GGUFReader(path).fields[f"deepseek41.engram.{key}"]
    part = field.data[at]
    where = field.offset + sum(before.nbytes for before in field.parts[:part])
    changed = np.array([value]).astype(field.parts[part].dtype).tobytes()
    data = bytearray(path.read_bytes())
    data[where : where + len(changed)] = changed
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=says) as error:
        load_model(path)
    assert error.value.where is not None
