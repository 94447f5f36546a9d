"""``inspect`` of V4.1 folders: kinds of attention, sources, n-gram tables, and what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from jsonschema import Draft202012Validator

from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.json_object import schema_path
from dsv4convert.engine.conversion import execute
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from ..command_line import run_cli
from ..v41 import TINY


def test_a_folder_shows_attention_sources_and_tables() -> None:
    found = inspect_path(TINY["tiny-b"])
    lines = run_cli("inspect", TINY["tiny-b"]).out.splitlines()
    assert lines[0].endswith("checkpoint folder, custom (vision tower, DSpark draft, fp4 experts, F8_E8M0 scales)")
    for line in (
        "0-1     sliding    learned      2",
        "2-3     CSA/2      learned      2",
        "4-7     CSA/1      learned      4",
        "KV sources: layers 2, 4",
        "index sources: layers 2, 4, 6, 7",
        "candidate source: layer 4",
        "engram table: layer 1, 660 rows of 32",
        "engram table: layer 5, 864 rows of 32",
        "draft: DSpark, 3 layers",
        "nothing unexpected",
    ):
        assert line in lines
    engram = next(i for i, line in enumerate(lines) if line.startswith("engram  "))
    assert any(line.endswith(" 2 fp8, F8_E8M0 scale per 1x32") for line in lines[engram : engram + 3])
    assert any(re.fullmatch("shared experts +.* 24 fp8, F8_E8M0 scale per 32x32", line) for line in lines)
    document = json.loads(json.dumps(found.as_json()))
    Draft202012Validator(json.loads(schema_path("inspect.schema.json").read_text())).validate(document)
    assert document["engram"][1] == {"layer": 5, "rows": 864, "columns": 32}


def test_the_published_sizes_are_recognised(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "v41-flash", headers_only=True)
    found = inspect_path(tmp_path / "m")
    assert (found.variant, found.unexpected) == ("V4.1-Flash", [])
    write_synth(tmp_path / "cut", "v41-flash", headers_only=True, layers=3)
    assert inspect_path(tmp_path / "cut").variant == "slice of V4.1-Flash"


def test_roles_and_tables_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY["tiny-a"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["index_source_layer_ids"] = [1, 3]
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_path(folder)
    assert "key index_source_layer_ids and the layers that have attn.indexer.weights_proj.weight" in found.unexpected[0]
    config["text_config"]["index_source_layer_ids"] = [1, 3, 5]
    config["text_config"]["engram_num_embeddings"] = [660, 860]
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_path(folder)
    assert "the table of layer 2 does not fit its hash functions" in found.unexpected[0]
    assert found.tensors == inspect_path(TINY["tiny-a"]).tensors


def test_ggufs_and_shards_are_described_alike(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny")
    options = GgufOptions(draft="split", mmproj="split", engram="i8-split")
    execute(plan_gguf(tmp_path / "s", tmp_path / "m.gguf", options))
    execute(plan_shards(tmp_path / "s", tmp_path / "mp4", ShardOptions(mp=4)).plan)
    folder, shards = inspect_path(tmp_path / "s"), inspect_path(tmp_path / "mp4")
    text, draft, tower = (inspect_path(tmp_path / f"{part}m.gguf") for part in ("", "dspark-", "mmproj-"))
    for found in (folder, shards, text, draft, tower):
        assert found.unexpected == []
        check = json.loads(json.dumps(found.as_json()))
        Draft202012Validator(json.loads(schema_path("inspect.schema.json").read_text())).validate(check)
    for found in (shards, text):
        assert (found.layers, found.roles, found.engram) == (folder.layers, folder.roles, folder.engram)
    assert text.families["engram"].tensors == 2 * 5  # a table in two tensors, and what mixes its rows in
    assert (draft.draft, draft.draft_layers) == ("DSpark", 3)


def test_roles_of_a_gguf_that_fit_no_tensors_are_listed(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny")
    plan = plan_gguf(tmp_path / "s", tmp_path / "m.gguf", GgufOptions())
    execute(plan)
    path = tmp_path / "m.gguf"
    field = gguf.GGUFReader(path).fields["deepseek41.attention.kv_source_layers"]
    position = field.offset + sum(part.nbytes for part in field.parts[: field.data[-1]])
    data = bytearray(path.read_bytes())
    data[position] = 2  # layer 3 becomes layer 2
    path.write_bytes(data)
    unexpected = inspect_path(path).unexpected
    assert "key attention.kv_source_layers: [1, 2], and the tensors are those of [1, 3]" in unexpected
    assert "tensor blk.2.attn_compressor_kv.weight is missing" in unexpected


BROKEN_KEYS = {
    "no primes": ("primes", None, "key engram.primes: missing, or no list of integers"),
    "too few factors": ("multipliers", [1, 3, 5], "key engram.multipliers: 3 entries for 2 tables"),
    "a layer without a table": ("layer_ids", [1, 3], "key engram.layer_ids: [1, 3], and the tables are of [0, 3]"),
    "a foreign padding token": ("pad_id", 10**6, "key engram.pad_id: 1000000 is not in the token map"),
}


@pytest.mark.parametrize("dialect", ["llama.cpp", "ds4"])
@pytest.mark.parametrize("damage", BROKEN_KEYS)
def test_keys_of_tables_that_do_not_fit_are_listed(
    damage: str, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value, message = BROKEN_KEYS[damage]
    wide = {"hidden_size": 256, "moe_intermediate_size": 256}
    source, path = tmp_path / "s", tmp_path / "m.gguf"
    write_synth(source, "v41-tiny", overrides=wide)
    execute(plan_gguf(source, path, GgufOptions(dialect=dialect, experts="q4_k")))
    model = open_gguf(path)
    assert inspect_path(path).unexpected == []
    metadata = dict(model.metadata)
    metadata[f"{model.architecture}.engram.{key}"] = value
    kept = {name: value for name, value in metadata.items() if value is not None}
    damaged = replace(model, parts=(replace(model.parts[0], metadata=kept), *model.parts[1:]))
    monkeypatch.setattr("dsv4convert.inspection.gguf.open_gguf", lambda path: damaged)
    assert any(line.startswith(message) for line in inspect_path(path).unexpected), inspect_path(path).unexpected
