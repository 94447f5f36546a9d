"""``shard`` and ``unshard`` of V4.1: the published script's recorded bytes, tables in runs of rows, and back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import deserialize

from dsv4convert.checkpoint.shards import open_shards
from dsv4convert.containers.folder_names import shard_name
from dsv4convert.containers.safetensors_write import safetensors_header
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import InventoryError, UsageError
from dsv4convert.plan import Fill
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import INFERENCE_CONFIG_NAME, plan_shards, plan_unshard
from dsv4convert.verification import verify

from ..v41 import TINY, recorded

RUNS = [(name, case) for name in sorted(TINY) for case in recorded(f"{name}.expected.json")["shards"]]

# Rank 0 of the whole model: tensors, and their bytes.
FULL_SIZES = {
    1: (96_042, 511_727_454_552),
    2: (48_810, 257_689_320_912),
    4: (25_194, 130_670_254_224),
    8: (13_386, 67_160_720_880),
}

Tensors = dict[str, tuple[str, list[int], bytes]]


def tensors_of(path: Path) -> Tensors:
    return {
        name: (entry["dtype"], list(entry["shape"]), entry["data"]) for name, entry in deserialize(path.read_bytes())
    }


def folder_tensors(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in tensors_of(path).items()}


def shard(source: Path, out: Path, **options: Any) -> Path:
    execute(plan_shards(source, out, ShardOptions(**options)).plan)
    return out


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that shards a tiny checkpoint once. Treat it as read-only."""
    folders: dict[tuple[str, int, str], Path] = {}

    def make(name: str, mp: int, experts: str) -> Path:
        key = (name, mp, experts)
        if key not in folders:
            folders[key] = shard(TINY[name], tmp_path_factory.mktemp("shards") / "s", mp=mp, experts=experts)
        return folders[key]

    return make


@pytest.mark.parametrize(("name", "case"), RUNS, ids=[f"{name} {case}" for name, case in RUNS])
def test_tensors_are_those_of_the_published_script(name: str, case: str, made: Any) -> None:
    mp, experts, rank = case.split()
    folder = made(name, int(mp[2:]), experts)
    found = tensors_of(folder / shard_name(int(rank[4:]), int(mp[2:])))
    want = recorded(f"{name}.expected.json")["shards"][case]
    assert found.keys() == want.keys()
    for key, (dtype, shape, data) in found.items():
        if experts == "fp8" and ".ffn.experts." in key and dtype == "F8_E4M3":
            # The published script reads e2m1 code 8 as +0; here it is -0, as everywhere else (docs/formats.md).
            data = data.replace(b"\x80", b"\x00")
        assert [dtype, shape, digest(data)] == want[key], key


@pytest.mark.parametrize(("mp", "size"), FULL_SIZES.items())
def test_full_size_ranks_have_the_published_tensors_and_bytes(mp: int, size: tuple[int, int], tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-flash", headers_only=True)
    plan = plan_shards(tmp_path / "s", tmp_path / "o", ShardOptions(mp=mp, ranks=(0, mp - 1))).plan
    first, last = plan.files[0], plan.files[min(1, mp - 1)]
    assert (len(first.tensors), sum(tensor.nbytes for tensor in first.tensors)) == size
    for layer, pad in ((1, 0), (14, {4: 2, 8: 6}.get(mp, 0))):
        for suffix, width in (("weight", 256), ("scale", 8)):
            table = next(t for t in last.tensors if t.name == f"layers.{layer}.engram.embed.{suffix}")
            filled = sum(s.nbytes for s in table.segments if isinstance(s.operation, Fill))
            assert filled == pad * width
            assert sum(segment.nbytes for segment in table.segments) == table.nbytes
            assert len(table.segments) > (100 if suffix == "weight" else 1)


def test_ranks_beyond_the_rows_are_padding_with_scales_of_one(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny", overrides={"engram_n_heads": 1, "engram_vocab_size": 2})
    whole = folder_tensors(tmp_path / "s")
    name = "layers.0.engram.embed"
    rows = whole[f"{name}.weight"][1][0]
    assert rows == 2 + 3
    shard(tmp_path / "s", tmp_path / "o", mp=4)
    parts = [tensors_of(tmp_path / "o" / shard_name(rank, 4)) for rank in range(4)]
    codes, scales = (b"".join(part[f"{name}.{kind}"][2] for part in parts) for kind in ("weight", "scale"))
    assert [part[f"{name}.weight"][1] for part in parts] == [[2, 64]] * 4
    assert codes == whole[f"{name}.weight"][2] + bytes(3 * 64)
    assert scales == whole[f"{name}.scale"][2] + b"\x7f" * (3 * 2)


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
def test_unshard_gives_the_checkpoint_back(mp: int, tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny")
    shard(tmp_path / "s", tmp_path / "o", mp=mp)
    execute(plan_unshard(tmp_path / "o", tmp_path / "back", wo_a="fp8"))
    source, back = folder_tensors(tmp_path / "s"), folder_tensors(tmp_path / "back")
    assert source.keys() == back.keys()
    differing = {name for name in source if source[name] != back[name]}
    # A BF16 weight has several FP8 forms; the one made of it stands for the same numbers.
    assert all(".attn.wo_a." in name for name in differing)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "s" / "config.json").read_bytes()
    assert not (tmp_path / "back" / INFERENCE_CONFIG_NAME).exists()


def test_config_comes_as_published_and_in_the_inference_codes_form(made: Any, tmp_path: Path) -> None:
    folder = made("tiny-a", 2, "fp4")
    assert (folder / "config.json").read_bytes() == (TINY["tiny-a"] / "config.json").read_bytes()
    write_synth(tmp_path / "s", "v41-flash", headers_only=True)
    for options, change in (
        ({}, {}),
        ({"experts": "fp8"}, {"expert_dtype": "fp8"}),
    ):
        plan = plan_shards(tmp_path / "s", tmp_path / "o", ShardOptions(mp=8, ranks=(0,), **options)).plan
        files = {file.name: file for file in plan.files}
        found = json.loads(files[INFERENCE_CONFIG_NAME].header)
        size = found["engram_compressed_vocab_size"]  # that of the synthetic tokenizer
        want = {**recorded("inference_config.json"), **change, "engram_compressed_vocab_size": size}
        assert found == want
        assert list(found) == list(want)


def test_fp8_experts_are_said_where_v41_says_it(made: Any) -> None:
    config = json.loads((made("tiny-a", 1, "fp8") / "config.json").read_text())
    assert config["quantization_config"]["expert_dtype"] == "fp8"
    assert "expert_dtype" not in config


def test_the_draft_can_be_left_out(tmp_path: Path) -> None:
    folder = shard(TINY["tiny-a"], tmp_path / "o", mp=2, draft="drop")
    assert not any(name.startswith("mtp.") for name in tensors_of(folder / shard_name(0, 2)))
    config = json.loads((folder / "config.json").read_text())["text_config"]
    assert config["num_nextn_predict_layers"] == 0
    assert config["compress_ratios"] == [0, 2, 2, 1, 1, 1]
    assert not any(key.startswith("dspark_") for key in config)
    flat = json.loads((folder / INFERENCE_CONFIG_NAME).read_text())
    assert (flat["n_mtp_layers"], len(flat["compress_ratios"])) == (0, 6)
    assert open_shards(folder).n_draft == 0


@pytest.mark.parametrize(
    ("name", "mp", "says"),
    [
        ("tiny-a", 4, r"o_groups: 2 cannot be divided among 4 ranks"),
        ("tiny-b", 2, r"n_routed_experts: 9 cannot be divided among 2 ranks"),
    ],
)
def test_an_mp_that_the_model_does_not_allow_is_refused(name: str, mp: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        plan_shards(TINY[name], tmp_path / "o", ShardOptions(mp=mp))


def test_draft_experts_must_divide_too(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny", overrides={"dspark_n_routed_experts": 6})
    with pytest.raises(UsageError, match=r"key dspark_n_routed_experts: 6 cannot be divided among 4 ranks"):
        plan_shards(tmp_path / "s", tmp_path / "o", ShardOptions(mp=4))


def test_a_table_with_rows_of_another_rank_is_refused(made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made("tiny-a", 2, "fp4"), tmp_path / "o")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(engram_vocab_size=102, engram_num_embeddings=[690, 896])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InventoryError, match=r"engram\.embed\.weight: wrong shape: expected \[345, 32\], got \[330, 32\]"
    ):
        open_shards(folder)


def test_a_draft_that_was_stripped_is_not_in_the_output_configs(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY["tiny-a"], tmp_path / "s")
    kept = {name: tensor for name, tensor in folder_tensors(folder).items() if not name.startswith("mtp.")}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    entries = [(name, dtype, tuple(shape), len(data)) for name, (dtype, shape, data) in kept.items()]
    header, _ = safetensors_header(entries)
    (folder / "model.safetensors").write_bytes(header + b"".join(data for _, _, data in kept.values()))
    plan = plan_shards(folder, tmp_path / "o", ShardOptions(mp=2)).plan
    assert any("speaks of draft layers and no tensor is of one" in note for note in plan.notes)
    execute(plan)
    for name, config in (
        ("config.json", json.loads((tmp_path / "o" / "config.json").read_text())["text_config"]),
        (INFERENCE_CONFIG_NAME, json.loads((tmp_path / "o" / INFERENCE_CONFIG_NAME).read_text())),
    ):
        assert not any(key.startswith("dspark_") for key in config), name
        assert config.get("num_nextn_predict_layers", config.get("n_mtp_layers")) == 0
    assert [str(problem) for problem in verify(folder, tmp_path / "o").problems] == []


def test_a_draft_that_is_dropped_need_not_be_divided(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny", overrides={"dspark_n_routed_experts": 6})
    with pytest.raises(UsageError, match="dspark_n_routed_experts: 6 cannot be divided among 4 ranks"):
        shard(tmp_path / "s", tmp_path / "kept", mp=4)
    shard(tmp_path / "s", tmp_path / "out", mp=4, draft="drop")
    assert open_shards(tmp_path / "out").n_draft == 0
