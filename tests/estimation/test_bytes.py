"""``estimate``: bytes of weights equal those of the files that conversions make, and published totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

import dsv4convert
from dsv4convert.cli import app
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.json_object import schema_path
from dsv4convert.containers.safetensors import read_header
from dsv4convert.errors import InputMissingError, UnsupportedError, UsageError
from dsv4convert.estimation.estimate import Estimate
from dsv4convert.estimation.subject import open_subject
from dsv4convert.estimation.weights import divided, recipe_sizes
from dsv4convert.targets.gguf_tensors import GgufOptions, gguf_models
from dsv4convert.targets.low_bit import SizesOnly

from ..checkpoints import MakeCheckpoint
from ..v41 import RECORDED, TINY, published_config

CONFIGS = RECORDED.parents[1] / "dsv4convert" / "model" / "configs"

# Payload of the published checkpoints.
PUBLISHED = {
    "v4-flash": 159_609_485_896,
    "v4-pro": 864_704_792_696,
    "v4-flash-base": 292_555_345_480,
    "v4-flash-0731": 166_878_536_440,
    "v4.1-flash": 510_286_023_000,
}
# Of rank 0 of V4.1, by the published script.
V41_RANK_0 = {8: 67_160_720_880}

SOURCES = ["tiny", "base", "dspark", "vision", "v41"]


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Any:
    """Return a function that makes a checkpoint by its name in ``SOURCES``."""

    def make(name: str) -> Path:
        if name == "v41":
            return make_checkpoint("v41-tiny")
        return make_checkpoint("tiny", variant=None if name == "tiny" else name)

    return make


def checked(found: Estimate) -> dict[str, Any]:
    """Return the JSON of an estimate, which keeps to its schema."""
    document: dict[str, Any] = json.loads(json.dumps(found.as_json()))
    schema = json.loads(schema_path("estimate.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)
    return document


@pytest.mark.parametrize("name", ["v4-flash", "v4-flash-base", "v4-flash-0731"])
def test_a_config_alone_gives_the_published_payload(name: str) -> None:
    document = checked(dsv4convert.estimate(CONFIGS / f"{name}.json"))
    assert document["weights"]["bytes"] == PUBLISHED[name]
    for by in ("families", "types"):
        assert sum(row["bytes"] for row in document["weights"][by]) == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-pro", "v4.1-flash"])
def test_a_large_config_alone_gives_the_published_payload(name: str) -> None:
    subject = open_subject(CONFIGS / f"{name}.json")
    assert subject.nbytes == PUBLISHED[name]
    if name == "v4.1-flash":
        assert subject.checkpoint is not None
        assert divided(subject.checkpoint, 8).rank_bytes[0] == V41_RANK_0[8]


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_and_its_config_alone_agree(name: str, source: Any, tmp_path: Path) -> None:
    folder = source(name)
    whole = dsv4convert.estimate(folder)
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in read_header(file).values()]
    assert sum(part.nbytes for part in whole.weights) == sum(tensor.nbytes for tensor in stored)
    assert sum(part.tensors for part in whole.weights) == len(stored)
    assert dict(whole.subject.files) == {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for alone in (tmp_path, tmp_path / "config.json"):
        assert dsv4convert.estimate(alone).weights == whole.weights


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("experts", [None, "fp8"])
def test_ranks_equal_the_shards_that_are_made(name: str, experts: str | None, source: Any, tmp_path: Path) -> None:
    folder = source(name)
    found = dsv4convert.estimate(folder, mp=2, experts=experts)
    document = checked(found)
    summary = dsv4convert.shard(folder, tmp_path / "shards", mp=2, experts=experts)
    files = [tmp_path / "shards" / f"model{rank}-mp2.safetensors" for rank in range(2)]
    assert document["ranks"]["file_bytes"] == [file.stat().st_size for file in files]
    headers = [read_header(file) for file in files]
    assert document["ranks"]["rank_bytes"] == [sum(t.nbytes for t in header.values()) for header in headers]
    assert document["ranks"]["replicated_bytes"] == summary.costs.replicated_bytes
    # The same from the shards themselves.
    again = dsv4convert.estimate(tmp_path / "shards")
    assert again.ranks == found.ranks
    assert again.need.weights == found.need.weights


def test_output_projections_on_a_group_of_their_own(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("tiny")  # four output groups
    whole, halved = (dsv4convert.estimate(folder, mp=4, o_proj_tp=tp) for tp in (None, 2))
    assert whole.ranks is not None
    assert halved.ranks is not None
    projections = [t.nbytes for t in plan_of(folder, 2) if ".attn.wo_" in t.name]
    quarters = [t.nbytes for t in plan_of(folder, 4) if ".attn.wo_" in t.name]
    assert projections
    more = sum(projections) - sum(quarters)
    assert halved.ranks.rank_bytes == tuple(nbytes + more for nbytes in whole.ranks.rank_bytes)


def plan_of(folder: Path, mp: int) -> Any:
    from dsv4convert.targets.shard_tensors import ShardOptions
    from dsv4convert.targets.shards import plan_shards

    plan, _ = plan_shards(folder, folder.parent / "unmade", ShardOptions(mp=mp))
    return plan.files[0].tensors


@pytest.mark.parametrize(
    ("mp", "o_proj_tp", "message"),
    [
        (8, None, "at most 4 ranks for the output projections.*--o-proj-tp 4"),
        (8, 8, "a divisor of o_groups 4, got 8"),
        (4, 3, "a divisor of o_groups 4, got 3"),
        (2, 4, "a divisor of 2, got 4"),
        (3, None, "cannot be divided among 3 ranks"),
    ],
)
def test_ranks_that_cannot_share_the_model(mp: int, o_proj_tp: int | None, message: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=message):
        dsv4convert.estimate(tiny, mp=mp, o_proj_tp=o_proj_tp)


def test_eight_ranks_share_four_groups(tiny: Path) -> None:
    found = dsv4convert.estimate(tiny, mp=8, o_proj_tp=4)
    assert found.ranks is not None
    assert len(found.ranks.rank_bytes) == 8


@pytest.mark.parametrize("name", SOURCES)
def test_a_gguf_equals_the_file_that_is_made(name: str, source: Any, tmp_path: Path) -> None:
    found = dsv4convert.estimate(source(name), gguf=True)
    document = checked(found)
    out = tmp_path / "model.gguf"
    dsv4convert.convert_gguf(source(name), out)
    assert document["gguf"]["files"] == {"model.gguf": out.stat().st_size}
    made = open_gguf(out).tensors.values()
    assert document["gguf"]["bytes"] == sum(tensor.nbytes for tensor in made)
    again = dsv4convert.estimate(out)
    checked(again)
    assert sorted(again.weights) == sorted(found.weights)
    assert again.caches == found.caches


def test_an_unknown_tokenizer_leaves_the_tensors() -> None:
    found = dsv4convert.estimate(TINY["tiny-a"], gguf=True)
    assert found.gguf is not None
    assert found.gguf.nbytes
    assert not found.gguf.files
    assert any("unknown pre-tokenizer" in note for note in found.notes)


def test_a_recipe_equals_the_file_that_is_made(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "model.gguf"
    dsv4convert.convert_gguf(tiny, out, recipe="q4_k_m", importance="weights")
    found = dsv4convert.estimate(tiny, recipe="q4_k_m")
    assert dict(found.gguf.files) == {"model.gguf": out.stat().st_size}  # type: ignore[union-attr]
    assert sorted(dsv4convert.estimate(out).weights) == sorted(found.weights)


@pytest.mark.parametrize("name", SOURCES)
def test_the_table_of_recipes_counts_every_expert(name: str, source: Any) -> None:
    checkpoint = dsv4convert.estimate(source(name)).subject.checkpoint
    assert checkpoint is not None
    sizes = recipe_sizes(checkpoint)
    assert len(sizes) > 10
    for size in sizes:
        (model,) = gguf_models(checkpoint, GgufOptions(recipe=size.recipe), SizesOnly()).models
        assert size.nbytes == sum(tensor.nbytes for tensor in model.tensors), size.recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"o_proj_tp": 2}, "--o-proj-tp needs --mp"),
        ({"experts": "fp8"}, "--experts needs --mp"),
        ({"mp": 2, "gguf": True}, "--mp cannot be combined with a GGUF"),
        ({"context": 5000}, "--context: out of range.*1 to 4096, got 5000"),
        ({"context": "12q"}, "--context: not a number of tokens"),
        ({"memory": "much"}, "--memory: not a size"),
        ({"kv": "q4_0"}, "--kv: unknown"),
        ({"batch": 0}, "--batch: out of range"),
        ({"draft": "split"}, "--draft: unknown"),
        ({"recipe": "none"}, "--recipe: unknown"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=message):
        dsv4convert.estimate(tiny, **options)


def test_a_gguf_cannot_become_ranks(tiny: Path, tmp_path: Path) -> None:
    dsv4convert.convert_gguf(tiny, tmp_path / "model.gguf")
    for options in ({"mp": 2}, {"recipe": "q4_k_m"}):
        with pytest.raises(UsageError, match="already a GGUF"):
            dsv4convert.estimate(tmp_path / "model.gguf", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("variant", "message"), [(None, "not a whole model"), ("dspark", "unsupported architecture")])
def test_the_file_of_a_draft_is_no_model(
    variant: str | None, message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dsv4convert.convert_gguf(make_checkpoint("tiny", variant=variant), tmp_path / "draft.gguf", draft="only")
    with pytest.raises(UnsupportedError, match=message):
        dsv4convert.estimate(tmp_path / "draft.gguf")


def test_a_config_that_gives_a_tensor_no_columns(tmp_path: Path) -> None:
    raw = published_config()
    raw["text_config"]["dspark_target_layer_ids"] = []
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"tensor mtp.0.main_proj.weight has a dimension of 0"):
        dsv4convert.estimate(tmp_path / "config.json")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("mp", [None, 2])
def test_the_parts_add_up_to_all_weights(source: Any, name: str, mp: int | None, tmp_path: Path) -> None:
    model = source(name)
    if mp is not None:
        dsv4convert.shard(model, tmp_path / "shards", mp=mp)
        model = tmp_path / "shards"
    weights = checked(dsv4convert.estimate(model))["weights"]
    assert sum(part["bytes"] for part in weights["parts"]) == weights["bytes"]
    layers = range(6 if name == "v41" else 4)
    assert {part["layer"] for part in weights["parts"] if not part["is_draft"]} == {None, *layers}
    tower = [part for part in weights["parts"] if part["family"] == "vision"]
    assert bool(tower) == (name in ("vision", "v41"))
    assert {part["layer"] for part in tower} <= {None}  # its blocks are no layers of the model
    assert len({part["name"] for part in tower}) == len(tower)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no such file or folder"):
        dsv4convert.estimate(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(InputMissingError, match="neither a checkpoint, a GGUF nor a config"):
        dsv4convert.estimate(tmp_path / "notes.txt")


def test_the_command_prints_tables_and_json(tiny: Path) -> None:
    told = CliRunner().invoke(app, ["estimate", str(tiny), "--memory", "1GiB", "--mp", "2"])
    assert told.exit_code == 0
    for line in ("weights, shards", "it fits", "longest context that fits: 4,096 tokens", "whole on every rank"):
        assert line in told.output
    told = CliRunner().invoke(app, ["estimate", str(tiny), "--memory", "10K", "--gguf", "--json"])
    document = json.loads(told.output)
    assert document["device"]["fits"] is False
    assert document["device"]["longest_context"] == 0


def test_the_draft_can_be_left_out(tiny: Path) -> None:
    kept, dropped = (dsv4convert.estimate(tiny, draft=draft) for draft in ("keep", "drop"))
    draft = sum(part.nbytes for part in kept.weights if part.family == "draft")
    assert draft
    assert kept.need.weights - dropped.need.weights == draft
    assert any(part.is_draft for part in kept.caches.parts)
    assert not any(part.is_draft for part in dropped.caches.parts)
