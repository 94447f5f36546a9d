"""What ``shard`` writes, bit for bit against the slow oracle."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dsv4convert.checkpoint import open_folder
from dsv4convert.engine import outputs as engine_files
from dsv4convert.targets.segments import matrix_shape
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from ..checkpoints import MakeCheckpoint
from ..engine.kernel_copies import refuse_kernel_copies
from ..oracles import shards as oracle
from .sharding import EIGHT, shard

E = 8


def assert_as_published(out: Path, source: Path, mp: int, fp8: bool = False, ranks: range | None = None) -> None:
    """Compare names, dtypes, shapes and bytes of every tensor of every rank."""
    expected = oracle.shards(oracle.load_checkpoint(source), E, mp, fp8)
    for rank in ranks or range(mp):
        got = load_file(out / f"model{rank}-mp{mp}.safetensors")
        assert got.keys() == expected[rank].keys()
        for name, tensor in got.items():
            assert oracle.bits(tensor) == oracle.bits(expected[rank][name]), f"rank {rank}: {name}"


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
@pytest.mark.parametrize("mp", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shards_equal_the_published_ones(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, seed: int, mp: int, expert_dtype: str
) -> None:
    source = make_checkpoint(overrides=EIGHT, seed=seed)
    summary = shard(source, tmp_path / "out", mp, experts=expert_dtype)
    assert_as_published(tmp_path / "out", source, mp, expert_dtype == "fp8")
    assert summary.report.tally.lossless
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == mp


@pytest.mark.parametrize("variant", ["base", "dspark", "vision"])
def test_other_variants_are_divided_alike(make_checkpoint: MakeCheckpoint, tmp_path: Path, variant: str) -> None:
    source = make_checkpoint(overrides=EIGHT, variant=variant)
    shard(source, tmp_path / "out", 4)
    assert_as_published(tmp_path / "out", source, 4)


def test_ragged_blocks_go_whole_to_one_rank(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(overrides={"head_dim": 72, "o_lora_rank": 24, "qk_rope_head_dim": 8, "index_head_dim": 40})
    weight = open_folder(source).weights["layers.0.attn.wq_b.weight"]
    assert matrix_shape(weight.shape)[0] % 128, "the last block is not ragged"
    shard(source, tmp_path / "out", 1, experts="fp8")
    assert_as_published(tmp_path / "out", source, 1, fp8=True)


def test_chosen_ranks_are_written_alone_and_as_among_all(eight: Path, tmp_path: Path) -> None:
    shard(eight, tmp_path / "out", 8, ranks=(5, 2, 5))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        "model2-mp8.safetensors",
        "model5-mp8.safetensors",
    ]
    assert_as_published(tmp_path / "out", eight, 8, ranks=range(2, 3))
    assert_as_published(tmp_path / "out", eight, 8, ranks=range(5, 6))


def test_names_with_prefix_and_v3_aliases_make_the_same_shards(eight: Path, tmp_path: Path) -> None:
    aliases = {
        "attn": "self_attn",
        "ffn": "mlp",
        "scale": "weight_scale_inv",
        "wq_a": "q_a_proj",
        "w2": "down_proj",
        "embed": "embed_tokens",
        "head": "lm_head",
        "attn_norm": "input_layernorm",
        "wq_b": "q_b_proj",
    }

    def alias(name: str) -> str:
        if name.startswith("mtp."):
            return name
        return "model." + ".".join(aliases.get(part, part) for part in name.split("."))

    source = tmp_path / "renamed"
    shutil.copytree(eight, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    renamed = {alias(name): tensor for name, tensor in oracle.load_checkpoint(eight).items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    assert sum(name.endswith("weight_scale_inv") for name in renamed) > 100
    shard(source, tmp_path / "out", 2)
    assert_as_published(tmp_path / "out", eight, 2)


def test_copies_of_embedding_and_head_in_the_draft_are_left_out(eight: Path, tmp_path: Path) -> None:
    source = tmp_path / "with-copies"
    shutil.copytree(eight, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = oracle.load_checkpoint(eight)
    tensors["mtp.0.emb.tok_emb.weight"] = tensors["embed.weight"] * 1
    tensors["mtp.0.head.weight"] = tensors["head.weight"] * 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    summary = shard(source, tmp_path / "out", 2)
    assert_as_published(tmp_path / "out", eight, 2)
    assert [(entry.count, entry.nbytes) for entry in summary.dropped] == [(2, 2 * 512 * 160 * 2)]


def test_mtp_drop_leaves_out_the_draft_and_its_config(eight: Path, tmp_path: Path) -> None:
    summary = shard(eight, tmp_path / "out", 2, draft="drop")
    whole = oracle.shards(oracle.load_checkpoint(eight), E, 2, False)
    for rank in range(2):
        names = load_file(tmp_path / "out" / f"model{rank}-mp2.safetensors").keys()
        assert names == {name for name in whole[rank] if not name.startswith("mtp.")}
    dropped = sum(name.startswith("mtp.") for name in oracle.load_checkpoint(eight))
    assert [(entry.count, entry.reason) for entry in summary.dropped] == [(dropped, "--draft drop")]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]


def test_config_and_tokenizer_lie_beside_the_shards_byte_for_byte(eight: Path, tmp_path: Path) -> None:
    shard(eight, tmp_path / "out", 2)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (eight / name).read_bytes()


def test_config_names_the_experts_new_dtype(eight: Path, tmp_path: Path) -> None:
    shard(eight, tmp_path / "out", 2, experts="fp8")
    source, made = (json.loads((folder / "config.json").read_text()) for folder in (eight, tmp_path / "out"))
    assert made == {**source, "expert_dtype": "fp8"}


def test_a_missing_tokenizer_is_noted(eight: Path, tmp_path: Path) -> None:
    source = shutil.copytree(eight, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer.json"))
    summary = shard(source, tmp_path / "out", 2)
    assert any("tokenizer.json" in note for note in summary.notes)


@pytest.mark.parametrize("refusal", ["EXDEV", "EOPNOTSUPP"])
def test_shards_are_the_same_where_the_system_cannot_copy_ranges(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    refuse_kernel_copies(monkeypatch, getattr(errno, refusal))
    shard(eight, tmp_path / "out", 4)
    assert_as_published(tmp_path / "out", eight, 4)


def test_descriptors_stay_bounded(eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with room for three files each convert ten, and never have more than that open."""
    most = 0
    really = engine_files.DescriptorCache.get

    def count(self: engine_files.DescriptorCache, *arguments: Any) -> int:
        nonlocal most
        descriptor = really(self, *arguments)
        mine = _open_files()
        most = max(most, sum(str(tmp_path) in name or str(eight) in name for name in mine))
        return descriptor

    monkeypatch.setattr(engine_files, "OPEN_FILES_PER_WORKER", 3)
    monkeypatch.setattr(engine_files.DescriptorCache, "get", count)
    shard(eight, tmp_path / "out", 8)
    assert_as_published(tmp_path / "out", eight, 8)
    # Besides the workers' own: every output file, its folder and the journal stay open.
    outputs = len(list((tmp_path / "out").iterdir()))
    assert outputs < most <= 2 * 3 + outputs + 3


def _open_files() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed by another thread meanwhile
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return names


def test_costs_tell_what_every_rank_holds(eight: Path, tmp_path: Path) -> None:
    plan, costs = plan_shards(eight, tmp_path / "out", ShardOptions(4))
    ranks = oracle.shards(oracle.load_checkpoint(eight), E, 4, False)
    on_all = set.intersection(*(set(rank) for rank in ranks))
    whole = {n for n in on_all if all(oracle.bits(rank[n]) == oracle.bits(ranks[0][n]) for rank in ranks)}
    assert costs.replicated_bytes == sum(ranks[0][name].nbytes for name in whole)
    assert costs.extra_bytes == 3 * costs.replicated_bytes
    assert costs.rank_bytes == {rank: plan.files[rank].nbytes for rank in range(4)}
    assert costs.replicated["attn.wq_a"] == sum(ranks[0][name].nbytes for name in whole if ".attn.wq_a." in name)
