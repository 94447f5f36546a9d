"""Shards back to a checkpoint: everything that sharding keeps comes back byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4convert.checkpoint import open_folder
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import InventoryError, LossyError, UnsupportedError
from dsv4convert.plan import AllEqual
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.shards import plan_unshard
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..oracles import shards as oracle
from .sharding import EIGHT, MakeShards, shard, unshard

E4M3_MAX_CODE = 0x7E
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

Tensors = dict[str, torch.Tensor]


def all_bits(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: oracle.bits(tensor) for name, tensor in tensors.items()}


def with_wo_a_in_bf16(tensors: Tensors) -> Tensors:
    """Return what sharding keeps of a checkpoint: one rank of one holds it all."""
    whole = oracle.shards(tensors, 8, 1, False)[0]
    return {
        name: tensor.view(torch.int8) if tensor.dtype == torch.float4_e2m1fn_x2 else tensor
        for name, tensor in whole.items()
    }


@pytest.mark.parametrize("variant", [None, "base", "dspark", "vision"])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_unshard_after_shard_is_the_identity(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, mp: int, variant: str | None
) -> None:
    source = make_checkpoint(overrides=EIGHT, variant=variant)
    shard(source, tmp_path / "shards", mp)
    summary = unshard(tmp_path / "shards", tmp_path / "back")
    expected = with_wo_a_in_bf16(oracle.load_checkpoint(source))
    assert all_bits(oracle.load_checkpoint(tmp_path / "back")) == all_bits(expected)
    assert any("wo_a" in note and "BF16" in note for note in summary.notes)
    for name in SIDE_FILES:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert open_folder(tmp_path / "back").n_tensors == len(expected)


@pytest.fixture
def edited(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Callable[..., Path]:
    """Return a function that makes a copy of a tiny checkpoint in one file, its tensors changed by ``change``."""

    def make(change: Callable[[Tensors], None], variant: str | None = None) -> Path:
        source, folder = make_checkpoint(overrides=EIGHT, variant=variant), tmp_path / "edited"
        folder.mkdir()
        for name in SIDE_FILES:
            (folder / name).write_bytes((source / name).read_bytes())
        tensors = oracle.load_checkpoint(source)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def use_the_whole_range(tensors: Tensors) -> None:
    """Give every block of wo_a the code 448, as a quantiser that looks for the largest value leaves it."""
    for name in [name for name in tensors if name.endswith("attn.wo_a.weight")]:
        tensors[name].view(torch.uint8)[::128, ::128] = E4M3_MAX_CODE


@pytest.mark.parametrize("variant", [None, "base"])
@pytest.mark.parametrize("mp", [1, 2, 8])
def test_wo_a_comes_back_as_fp8_byte_for_byte(
    edited: Callable[..., Path], tmp_path: Path, mp: int, variant: str | None
) -> None:
    source = edited(use_the_whole_range, variant)
    shard(source, tmp_path / "shards", mp)
    summary = unshard(tmp_path / "shards", tmp_path / "back", wo_a="fp8")
    original = oracle.load_checkpoint(source)
    assert any(name.endswith("wo_a.scale") for name in original)
    assert all_bits(oracle.load_checkpoint(tmp_path / "back")) == all_bits(original)
    assert not any("wo_a" in note for note in summary.notes)


def test_wo_a_of_small_codes_comes_back_with_the_same_values(edited: Callable[..., Path], tmp_path: Path) -> None:
    """Half the scale and twice the codes stand for the same numbers; the bytes are then not determined."""
    name = "layers.0.attn.wo_a"

    def shrink(tensors: Tensors) -> None:
        codes = tensors[f"{name}.weight"].float().clamp(-100, 100)
        tensors[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)

    source = edited(shrink)
    shard(source, tmp_path / "shards", 2)
    unshard(tmp_path / "shards", tmp_path / "back", wo_a="fp8")
    original, back = oracle.load_checkpoint(source), oracle.load_checkpoint(tmp_path / "back")
    assert oracle.bits(original[f"{name}.weight"]) != oracle.bits(back[f"{name}.weight"])
    values = [
        t[f"{name}.weight"].float() * oracle.spread(t[f"{name}.scale"].float(), t[f"{name}.weight"].shape)
        for t in (original, back)
    ]
    assert torch.equal(*values)
    report = verify(source, tmp_path / "back")
    assert report.ok, report.problems
    path = tmp_path / "back" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{name}.weight"].view(torch.uint8)[-1, -1] ^= 0x80
    save_file(tensors, path, {"format": "pt"})
    assert [problem.where for problem in verify(source, tmp_path / "back").problems] == [f"tensor {name}.weight"]


def test_wo_a_has_the_blocks_of_the_model_where_the_first_weight_is_under_one_scale(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(overrides={"q_lora_rank": 48})
    shard(source, tmp_path / "shards", 2)
    unshard(tmp_path / "shards", tmp_path / "back", wo_a="fp8")
    back = oracle.load_checkpoint(tmp_path / "back")
    assert back["layers.0.attn.wq_a.scale"].shape == (1, 2)
    assert back["layers.0.attn.wo_a.scale"].shape == (4, 2)
    report = verify(source, tmp_path / "back")
    assert report.ok, report.problems


def test_wo_a_of_ranks_that_end_inside_a_block_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    execute(plan_dequantize(make_checkpoint(overrides={"o_lora_rank": 36}), tmp_path / "floats"), threads=1)
    shard(tmp_path / "floats", tmp_path / "shards", 2)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.attn\.wo_a\.weight cannot be FP8.* 128 rows, got 72"):
        plan_unshard(tmp_path / "shards", tmp_path / "back", wo_a="fp8")
    unshard(tmp_path / "shards", tmp_path / "back")
    assert verify(tmp_path / "floats", tmp_path / "back").ok


@pytest.mark.parametrize("damage", [0x3F81, 0x7FC0, 0x7F80], ids=["eight significant bits", "nan", "infinity"])
def test_wo_a_that_no_fp8_makes_is_refused(shards: MakeShards, tmp_path: Path, damage: int) -> None:
    folder = shards(2)
    name = "layers.2.attn.wo_a.weight"
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    tensors[name].view(torch.uint16)[130, 5] = damage
    save_file(tensors, path)
    with pytest.raises(LossyError, match=r"layers\.2\.attn\.wo_a\.(weight|scale)"):  # whichever was made first
        unshard(folder, tmp_path / "back", wo_a="fp8")
    assert not (tmp_path / "back").exists()
    unshard(folder, tmp_path / "back")


def test_no_tile_cuts_an_element_of_a_tensor_that_each_rank_has_whole(shards: MakeShards, tmp_path: Path) -> None:
    """Elements that are not finite are counted tile by tile."""
    plan = plan_unshard(shards(2), tmp_path / "back")
    found = {
        (tensor.dtype, segment.row_bytes)
        for file in plan.files
        for tensor in file.tensors
        for segment in tensor.segments
        if isinstance(segment.operation, AllEqual)
    }
    assert found == {("BF16", 2), ("F32", 4), ("F8_E4M3", 1), ("F8_E8M0", 1), ("I64", 1)}


def test_fp8_experts_come_back_as_fp8(shards: MakeShards, eight: Path, tmp_path: Path) -> None:
    unshard(shards(4, experts="fp8"), tmp_path / "back")
    expected = oracle.shards(oracle.load_checkpoint(eight), 8, 1, True)[0]
    assert all_bits(oracle.load_checkpoint(tmp_path / "back")) == all_bits(expected)
    assert open_folder(tmp_path / "back").weights["layers.0.ffn.experts.3.w2.weight"].encoding.value == "fp8"


def test_shards_of_the_published_script_can_be_put_together(eight: Path, tmp_path: Path) -> None:
    """They differ in the order of tensors and in the header, and come without a config."""
    folder = tmp_path / "published"
    folder.mkdir()
    for rank, tensors in enumerate(oracle.shards(oracle.load_checkpoint(eight), 8, 4, False)):
        save_file({n: t.contiguous() for n, t in reversed(tensors.items())}, folder / f"model{rank}-mp4.safetensors")
    (folder / "config.json").write_bytes((eight / "config.json").read_bytes())
    unshard(folder, tmp_path / "back")
    expected = with_wo_a_in_bf16(oracle.load_checkpoint(eight))
    assert all_bits(oracle.load_checkpoint(tmp_path / "back")) == all_bits(expected)


def test_shards_without_a_draft_make_a_checkpoint_without_one(shards: MakeShards, tmp_path: Path) -> None:
    unshard(shards(2, draft="drop"), tmp_path / "back")
    back = open_folder(tmp_path / "back")
    assert back.n_draft == 0
    assert len(back.weights) > 100
    assert not any(name.startswith("mtp.") for name in back.weights)


def test_large_outputs_are_cut_into_files_with_an_index(shards: MakeShards, eight: Path, tmp_path: Path) -> None:
    unshard(shards(2), tmp_path / "back", max_file_bytes=10**6)
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 4
    assert all(path.stat().st_size <= 10**6 for path in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == held
    expected = with_wo_a_in_bf16(oracle.load_checkpoint(eight))
    assert all_bits(oracle.load_checkpoint(tmp_path / "back")) == all_bits(expected)


def test_ranks_that_differ_in_a_replicated_tensor_are_refused(shards: MakeShards, tmp_path: Path) -> None:
    folder = shards(4)
    path = folder / "model2-mp4.safetensors"
    tensors = load_file(path)
    tensors["layers.3.ffn.shared_experts.w3.weight"].view(torch.uint8)[-1, -1] ^= 1
    save_file(tensors, path)
    with pytest.raises(InventoryError, match=r"ranks 0 and 2 .*shared_experts\.w3\.weight"):
        unshard(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_recovery_of_every_code_and_scale_is_exact() -> None:
    """Whatever the scale: BF16 of all 254 finite codes times it, where BF16 can hold them, comes back."""
    from dsv4convert.formats.base import Scratch, Tally
    from dsv4convert.formats.e4m3 import fp8_to_bf16
    from dsv4convert.formats.fp8_recovery import bf16_to_fp8_exactly

    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)[None, :]
    exact = 0
    for byte in range(255):
        scale, tally = np.array([[byte]], np.uint8), Tally()
        bits = np.empty(codes.shape, np.uint16)
        fp8_to_bf16(codes, scale, (128, 256), bits, Scratch(), tally)
        if not tally.lossless:
            continue
        exact += 1
        got_codes, got_scale = bf16_to_fp8_exactly(bits, (128, 256))
        assert got_scale.tolist() == [[byte]]
        assert got_codes.tobytes() == codes.tobytes()
    assert exact == 244
